"""The table of docs/models.md is that of the code, which makes it."""

from documents import text

from sparse_ft.models.families import ARCHITECTURES

HEAD = (
    "| models | `model_type` | linear maps of a block | shrink | inside of | Cerebras |",
    "|---|---|---|---|---|---|",
)


def maps(projections):
    return ", ".join(projection.name.removesuffix("_proj") for projection in projections)


def line(row):
    """What a family supports beyond what all do."""
    linear, units = maps(row.projections), "heads and channels" if row.head_dim else "channels"
    if row.experts is not None:
        units += ", experts"
        linear += (
            f"; experts: {', '.join(name.removesuffix('_proj') for m in row.experts.matrices for name in m.singles)}"
        )
        for what, projections in (("shared experts", row.experts.shared), ("dense blocks", row.experts.dense)):
            linear += f"; {what}: {maps(projections)}" if projections else ""
    inside, modelzoo = ", ".join(f"`{kind}`" for kind in row.inside), "yes" if row.modelzoo else ""
    return f"| {row.title} | `{row.model_type}` | {linear} | {units} | {inside} | {modelzoo} |"


def test_the_table_of_families_is_the_codes():
    table = "\n".join([*HEAD, *map(line, ARCHITECTURES.values())])
    assert table in text("docs/models.md"), f"docs/models.md lacks this table:\n{table}"


def test_every_family_says_what_people_call_it():
    titles = [row.title for row in ARCHITECTURES.values()]
    assert all(titles) and len(set(titles)) == len(titles)
