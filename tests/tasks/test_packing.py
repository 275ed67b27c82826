"""Windows of several documents: nothing is lost, nothing is learned across an edge."""

import itertools
import random

import pytest

from sparse_ft.tasks.examples import Example
from sparse_ft.tasks.packing import packed


def documents(count=40, longest=20, seed=0):
    draw = random.Random(seed)
    sizes = [draw.randint(2, longest) for _ in range(count)]
    numbers = itertools.count()
    return [Example([next(numbers) for _ in range(size)], draw.randint(1, size - 1)) for size in sizes]


def apart(window):
    """The documents of a window again, with the tokens that are learned of each."""
    begin, found = 0, []
    for size in window.documents:
        ids = window.input_ids[begin : begin + size]
        learned = [
            window.input_ids[at]
            for at in range(max(begin, window.answer_start), begin + size)
            if at not in window.left_out
        ]
        found.append((ids, learned))
        begin += size
    assert begin == len(window.input_ids)
    return found


def test_documents_stay_whole_and_are_learned_as_they_would_be_alone():
    given = documents()
    windows = list(packed(given, 20))
    assert all(len(window.input_ids) <= 20 for window in windows)
    again = sorted(part for window in windows for part in apart(window))
    assert again == sorted((e.input_ids, e.input_ids[e.answer_start :]) for e in given)
    tokens = sum(len(example.input_ids) for example in given)
    assert len(windows) <= 1.2 * tokens / 20  # in the fullest window that has room, little is left empty


def test_a_document_keeps_what_it_leaves_out():
    given = [Example([1, 2, 3], 1), Example([4, 5, 6, 7, 8], 2, (3,))]
    (window,) = packed(given, 8)
    assert (window.answer_start, window.left_out, window.documents) == (1, (3, 4, 6), (3, 5))


@pytest.mark.parametrize("length", [2, 7, 20])
def test_texts_fill_windows_to_the_end(length):
    texts = [Example(e.input_ids, 1) for e in documents(longest=50)]
    windows = list(packed(texts, length, cut=True))
    assert all(length - 1 <= len(window.input_ids) <= length for window in windows[:-1])
    parts = [part for window in windows for part in apart(window)]
    assert all(learned == ids[1:] and learned for ids, learned in parts)
    kept = [token for ids, _ in parts for token in ids]
    every = [token for text in texts for token in text.input_ids]
    assert kept == sorted(kept) and len(every) - len(kept) <= len(texts)  # a last token alone has nothing to teach


def test_no_more_is_read_than_is_taken():
    read = []

    def reading():
        for example in documents(1000):
            read.append(example)
            yield example

    next(packed(reading(), 20))
    assert len(read) < 60
