"""Rows of the tasks that papers score beside, in the hub's columns: made up, few, and enough to tell models apart."""

import json
import random
from pathlib import Path

NAMES = ("arc_challenge", "arc_easy", "openbookqa", "piqa", "winogrande")
SUBJECTS = {"rivers": 3, "seas": 4, "trees": 2}  # of a group as mmlu is one; questions each
_THINGS = ("water", "sand", "oil", "iron", "snow", "wood", "stone", "salt")


def write_suite(folder: Path, rows: int = 4) -> Path:
    """``folder/TASK/SPLIT.jsonl`` of every name, and of the group's members; returns the folder."""
    dice = random.Random(5)

    def things(count: int) -> list[str]:
        return dice.sample(_THINGS, count)

    def arc() -> dict:
        right = dice.randrange(4)
        choices = {"text": things(4), "label": list("ABCD")}
        return {
            "id": "x",
            "question": f"What is {dice.choice(_THINGS)}?",
            "choices": choices,
            "answerKey": "ABCD"[right],
        }

    def openbookqa() -> dict:
        return {k: v for k, v in arc().items() if k != "question"} | {"question_stem": f"The {dice.choice(_THINGS)} is"}

    def piqa() -> dict:
        one, other = things(2)
        return {
            "goal": f"Carry {dice.choice(_THINGS)}",
            "sol1": f"in {one}.",
            "sol2": f"in {other}.",
            "label": dice.randrange(2),
        }

    def winogrande() -> dict:
        one, other = things(2)
        said = {"sentence": f"The {one} was on the {other} because _ was light.", "option1": one, "option2": other}
        return said | {"answer": str(1 + dice.randrange(2))}

    made = {"arc_challenge": arc, "arc_easy": arc, "openbookqa": openbookqa, "piqa": piqa, "winogrande": winogrande}
    for name, row in made.items():
        for split in ("train", "validation", "test"):
            _write(folder / name / f"{split}.jsonl", [row() for _ in range(rows)])
    for subject, count in SUBJECTS.items():
        for split, number in (("test", count), ("dev", 5)):
            asked = [
                {"question": f"What is {dice.choice(_THINGS)}?", "choices": things(4), "answer": dice.randrange(4)}
                for _ in range(number)
            ]
            _write(folder / f"tiny_{subject}" / f"{split}.jsonl", asked)
    return folder


def write_group(folder: Path, data: Path | None = None) -> Path:
    """YAML of a group as mmlu is one, of tasks whose rows `write_suite` makes; with ``data`` for lm-eval's own command,
    which reads the rows from there. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    common = (
        "test_split: test\nfewshot_split: dev\nfewshot_config:\n  sampler: first_n\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question.strip()}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}'
        '\\nD. {{choices[3]}}\\nAnswer:"\ndoc_to_choice: ["A", "B", "C", "D"]\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\nmetadata:\n  version: 1.0\n"
    )
    for subject in SUBJECTS:
        source = "dataset_path: none/none\n"
        if data is not None:
            files = {split: str((data / f"tiny_{subject}" / f"{split}.jsonl").resolve()) for split in ("test", "dev")}
            source = f"dataset_path: json\ndataset_kwargs: {json.dumps({'data_files': files})}\n"
        (folder / f"tiny_{subject}.yaml").write_text(f"task: tiny_{subject}\ntag: tiny_waters\n{source}{common}")
    aggregate = "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\nmetadata:\n  version: 2\n"
    (folder / "_part.yaml").write_text(f"group: tiny_part\ntask:\n  - tiny_rivers\n  - tiny_seas\n{aggregate}")
    (folder / "_all.yaml").write_text(f"group: tiny_all\ntask:\n  - tiny_part\n  - tiny_trees\n{aggregate}")
    (folder / "_bare.yaml").write_text("group: tiny_bare\ntask:\n  - tiny_rivers\n  - tiny_trees\n")
    return folder


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
