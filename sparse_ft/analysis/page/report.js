// Sorting and filtering of the tables. Without it the page still shows everything.
"use strict";

(function () {
  const NONE = "";

  function cellValue(row, column) {
    const cell = row.cells[column];
    const value = cell.dataset.value;
    if (value !== undefined) return value === NONE ? null : Number(value);
    return cell.textContent.trim().toLowerCase() || null;
  }

  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  }

  // What is missing stays at the end whichever way a column is sorted.
  function sortBy(table, column, direction) {
    const body = table.tBodies[0];
    const rows = Array.from(body.rows).map((row, place) => ({ row, place, value: cellValue(row, column) }));
    rows.sort((a, b) => {
      if (a.value === null || b.value === null) {
        return (a.value === null) - (b.value === null) || a.place - b.place;
      }
      return direction * compare(a.value, b.value) || a.place - b.place;
    });
    body.append(...rows.map((entry) => entry.row));
    Array.from(table.tHead.rows[0].cells).forEach((head, index) => {
      head.setAttribute("aria-sort", index === column ? (direction > 0 ? "ascending" : "descending") : "none");
    });
  }

  function makeSortable(table) {
    Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        sortBy(table, column, head.getAttribute("aria-sort") === "ascending" ? -1 : 1);
      });
    });
  }

  function makeFilterable(table) {
    const rows = Array.from(table.tBodies[0].rows);
    const tools = document.createElement("div");
    tools.className = "tools";
    const text = document.createElement("input");
    text.type = "search";
    text.placeholder = "filter: all words must occur";
    text.setAttribute("aria-label", "filter the rows of this table");
    tools.append(text);
    const choices = [];
    Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
      if (head.dataset.choices === undefined) return;
      const values = Array.from(new Set(rows.map((row) => row.cells[column].textContent.trim()))).sort((a, b) =>
        compare(a, b));
      if (values.length < 2) return;
      const select = document.createElement("select");
      select.setAttribute("aria-label", "only this " + head.textContent);
      select.append(new Option(head.textContent + ": all", "\u0000"));
      values.forEach((value) => select.append(new Option(value || "(none)", value)));
      choices.push({ column, select });
      tools.append(select);
    });
    const count = document.createElement("span");
    count.className = "count";
    count.setAttribute("aria-live", "polite");
    tools.append(count);

    function apply() {
      const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row) => {
        const content = row.textContent.toLowerCase();
        const visible =
          words.every((word) => content.includes(word)) &&
          choices.every(({ column, select }) =>
            select.value === "\u0000" || row.cells[column].textContent.trim() === select.value);
        row.hidden = !visible;
        shown += visible ? 1 : 0;
      });
      count.textContent = shown + " of " + rows.length + " rows";
    }

    text.addEventListener("input", apply);
    choices.forEach(({ select }) => select.addEventListener("change", apply));
    table.closest(".scroll").before(tools);
    apply();
  }

  document.querySelectorAll("table.data").forEach((table) => {
    makeFilterable(table);
    makeSortable(table);
  });
  // Links to parts of the page do not work in every frame a page is shown in; scrolling does.
  document.querySelectorAll("nav button").forEach((button) => {
    button.addEventListener("click", () => {
      const part = document.getElementById(button.dataset.part);
      if (part) part.scrollIntoView();
    });
  });
})();
