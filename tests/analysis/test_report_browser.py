"""The page in headless Chromium: it renders, sorts, filters, complains of nothing and loads nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread

import pytest
from synthetic import cell, study

from sparse_ft.analysis.write import write_analysis

BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt-get install chromium, or set CHROMIUM)")

# Acts as a reader would and tells what is then on the page. Runs inside the page, also where that is a
# sandboxed frame that may not touch its parent: hence the message.
PROBE = """
(function () {
  const found = { errors: [], origin: String(window.origin) };
  window.addEventListener("error", (event) => found.errors.push(String(event.message)));
  document.addEventListener("securitypolicyviolation", (event) => found.errors.push("blocked " + event.blockedURI));
  window.addEventListener("load", () => {
    const table = document.querySelector("#cells table");
    const column = (name) => Array.from(table.tHead.rows[0].cells).findIndex((h) => h.textContent === name);
    const visible = () => Array.from(table.tBodies[0].rows).filter((row) => !row.hidden);
    const values = (name) => visible().map((row) => row.cells[column(name)].textContent);
    const type = (element, value) => { element.value = value; element.dispatchEvent(new Event("input")); };
    const pick = (element, value) => { element.value = value; element.dispatchEvent(new Event("change")); };
    const tools = document.querySelector("#cells .tools");
    const sort = (name) => table.tHead.rows[0].cells[column(name)].querySelector("button").click();
    found.rows = visible().length;
    sort("perplexity"); found.rising = values("perplexity");
    found.aria = table.tHead.rows[0].cells[column("perplexity")].getAttribute("aria-sort");
    sort("perplexity"); found.falling = values("perplexity");
    type(tools.querySelector("input"), "structured HELLASWAG"); found.words = values("task");
    found.count = tools.querySelector(".count").textContent;
    type(tools.querySelector("input"), "");
    const modes = Array.from(tools.querySelectorAll("select")).find((s) => s.options[0].text === "mode: all");
    pick(modes, "dense"); found.dense = values("mode");
    type(tools.querySelector("input"), "no such thing"); found.none = visible().length;
    found.pictures = Array.from(document.images).map((image) => [image.complete, image.naturalWidth]);
    found.text = document.body.innerText;
    const pre = document.createElement("pre");
    pre.id = "found"; pre.textContent = JSON.stringify(found);
    document.body.append(pre);
    if (window.parent !== window) window.parent.postMessage(JSON.stringify(found), "*");
  });
})();
"""
# As MLflow's artifact view shows a page: its text in a blob, in a frame that may run scripts and nothing else.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><title>frame</title><iframe id="f" sandbox="allow-scripts"
 style="width:1200px;height:900px"></iframe><script>
window.addEventListener("message", (event) => fetch("/found", { method: "POST", body: event.data }));
document.getElementById("f").src = URL.createObjectURL(new Blob([PAGE], { type: "text/html" }));
</script>"""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
    "--disable-extensions", "--enable-logging=stderr", "--window-size=1280,1000",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


def opened(page: Path, folder: Path) -> tuple[dict, str, list[str]]:
    """Opens a file: what the probe found, the browser's console, and every address that the page asked for."""
    log = folder / "net.json"
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=300, check=False)
    found = re.search(r'<pre id="found"[^>]*>(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page did not answer: {done.stderr[-2000:]}"
    return json.loads(unescape(found.group(1))), console(done.stderr), requested(log.read_text("utf-8", "replace"))


def framed(page: Path, folder: Path) -> tuple[dict, str, list[str]]:
    """The same for a page that a server hands out (a blob needs an origin) and that sends its answer back."""
    log, errors, answers = folder / "net.json", folder / "stderr.txt", Queue()

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self):
            answers.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        own = f"http://127.0.0.1:{server.server_port}"
        command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
        with errors.open("w") as stream:
            browser = subprocess.Popen([*command, "--remote-debugging-port=0", f"{own}/{page.name}"], stderr=stream,
                                       stdout=stream, start_new_session=True)  # fmt: skip
            try:
                found = json.loads(answers.get(timeout=300))
            finally:
                os.killpg(browser.pid, signal.SIGTERM)
                browser.wait(timeout=60)
                server.shutdown()
    addresses = requested(log.read_text("utf-8", "replace"))
    return found, console(errors.read_text("utf-8", "replace")), [url for url in addresses if not url.startswith(own)]


def console(stderr: str) -> str:
    return "\n".join(line for line in stderr.splitlines() if "CONSOLE" in line and "favicon" not in line)


def requested(log: str) -> list[str]:
    """Addresses that the page asked for. The browser's own requests name no origin, or its maker's, as initiator."""
    found = []
    for line in log.splitlines():
        initiator = re.search(r'"initiator":"([^"]*)"', line)
        url = re.search(r'"url":"((?:https?|wss?)://[^"]*)"', line)
        if initiator and url and initiator.group(1).startswith(("file:", "null", "http://127.0.0.1")):
            found.append(url.group(1))
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def rows():
    rows = study(("synthetic-a",), levels=(0.0, 0.5, 0.9))
    rows.append(cell("synthetic-a", sparsity=0.7, status="FAILED"))
    rows.append(cell("synthetic-a", sparsity=0.8, metrics={"eval/perplexity": float("inf")}))
    return rows


@pytest.fixture(scope="module")
def report(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("report")
    hostile = "<img src=https://example.invalid/x.png onerror=alert(1)> & co"
    return write_analysis(rows, folder, "builtin", title=hostile).report


def probed(text: str) -> str:
    return text.replace("<head>", f"<head><script>{PROBE}</script>", 1)


@pytest.fixture(scope="module", params=["file", "sandboxed frame"])
def answer(request, report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    page, text = folder / "page.html", probed(report.read_text("utf-8"))
    if request.param != "file":
        text = FRAME.replace("PAGE", json.dumps(text).replace("</", "<\\/"))
    page.write_text(text, encoding="utf-8")
    return (request.param, *(opened if request.param == "file" else framed)(page, folder))


def number(text: str) -> float:
    return float(text.partition(" ± ")[0].replace(",", ""))


@pytest.mark.slow
def test_it_renders_without_a_complaint(answer, rows):
    how, found, console, _ = answer
    assert found["errors"] == [] and console == ""
    assert found["rows"] == len(rows) - 1  # all but the study's own run
    assert found["pictures"] and all(complete and width > 0 for complete, width in found["pictures"])
    assert how == "file" or found["origin"] == "null"  # the frame really is a sandbox
    for part in ("BoolQ on synthetic-a keeps 95 %", "out_of_memory", "shears", "Not comparable"):
        assert part.lower() in found["text"].lower()


def test_it_loads_nothing_from_the_network(answer):
    assert answer[3] == []


def test_a_request_would_have_been_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<img src="http://example.invalid/x.png"><pre id="found">{}</pre>', encoding="utf-8")
    assert opened(page, tmp_path)[2] == ["http://example.invalid/x.png"]


def test_it_sorts_by_number_with_the_missing_last(answer):
    _, found, _, _ = answer
    for order, sign in (("rising", 1), ("falling", -1)):
        assert found[order][-2:] == ["–", "–"]  # the failed cell's, and the infinity that is no number
        shown = [sign * number(value) for value in found[order][:-2]]
        assert shown == sorted(shown)
    assert found["aria"] == "ascending"


def test_it_filters_by_words_and_by_choice(answer, rows):
    _, found, _, _ = answer
    expected = [row for row in rows if "structured|" in row.name and "hellaswag|" in row.name
                and "|dense|" not in row.name]  # fmt: skip
    assert found["words"] == ["hellaswag"] * len(expected)
    assert found["count"].startswith(f"{len(expected)} of ")
    assert found["dense"] == ["dense"] * 3
    assert found["none"] == 0
