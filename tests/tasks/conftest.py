"""Small task files in the hub's columns, and tokenizers."""

import json

import pytest

ROWS = {
    "boolq/train": [
        {"question": f"is {word} a word", "passage": f"Words -- The word {word} is one.", "answer": index % 2 == 0}
        for index, word in enumerate(["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"])
    ],
    "boolq/validation": [
        {"question": "do lamps burn oil", "passage": "Lamps -- They burnt oil.", "answer": "True"},
        {"question": "do lamps sing", "passage": "Lamps -- They burnt oil.", "answer": "False"},
        {"question": "is tea hot", "passage": "Tea -- It is made hot.", "answer": True},
    ],
    "hellaswag/train": [
        {"activity_label": "Roof", "ctx": f"A man is on roof {number}. he", "label": str(number % 4),
         "endings": [f"goes {way}." for way in ("up", "down", "left", "right")]}
        for number in range(6)
    ],
    "hellaswag/validation": [
        {"activity_label": "Roof repair", "ctx": "A man is on a roof. He pulls. the man in the USA",
         "endings": ["sits down.", "[step] sings  twice.", "flies.", "runs away fast."], "label": "0"},
        {"activity_label": "Food", "ctx": "How to cook rice [title] Wash it. Use cold water.",
         "endings": ["Drain it.", "Sell it.", "Paint the rice.", "Ask."], "label": "2"},
    ],
    "gsm8k/train": [
        {"question": f"What is {number} + 1?",
         "answer": f"{number}+1 = <<{number}+1={number + 1}>>{number + 1}\n#### {number + 1}"}
        for number in range(8)
    ],
    "gsm8k/test": [
        {"question": "What is 20 + 2?", "answer": "20+2 = <<20+2=22>>22\n#### 22"},
        {"question": "What is 1,000 + 2?", "answer": "1,000+2 = 1,002\n#### 1,002"},
    ],
}  # fmt: skip


def write(folder, rows=ROWS):
    for name, lines in rows.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tokenizer():
    from sparse_ft.models.tiny import tiny_tokenizer

    return tiny_tokenizer()
