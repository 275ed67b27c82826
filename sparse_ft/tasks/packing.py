"""Sequences put together: long texts in pieces, several documents in one window, two sources in one training."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle

from sparse_ft.tasks.examples import Example

__all__ = ["mixed", "packed", "pieces"]

_OPEN = 16  # windows that wait for a document that still fits


def pieces(texts: Iterable[Example], length: int) -> Iterator[Example]:
    """Texts in sequences of at most ``length`` tokens, without overlap; a last one of a single token is left out.

    Args:
        texts: learned on all their tokens.
        length: most tokens of a sequence.
    """
    for text in texts:
        for begin in range(0, len(text.input_ids), length):
            if len(ids := text.input_ids[begin : begin + length]) > 1:
                yield Example(ids, 1)


def packed(documents: Iterable[Example], length: int, cut: bool = False) -> Iterator[Example]:
    """Windows of at most ``length`` tokens, each of several documents, read as far as windows are taken.

    Args:
        documents: in their order; where they are not cut none is longer than a window.
        length: most tokens of a window.
        cut: texts, learned on all their tokens: a window is filled to its end, and what is left of a text begins the
            next. Otherwise documents stay whole, each in the fullest of the windows begun that has room for it.
    """
    yield from (_stream if cut else _best_fit)(documents, length)


def mixed(first: Sequence[Example], second: Sequence[Example], counts: tuple[int, int], seed: int) -> list[Example]:
    """Sequences of two sources, so many of each.

    Args:
        first: of the one source; where there are too few they come again, in the same order.
        second: of the other.
        counts: how many of each.
        seed: of the order in which the sources alternate; each keeps its own.
    """
    turns = [first] * counts[0] + [second] * counts[1]
    random.Random(seed).shuffle(turns)
    sources = {id(source): cycle(source) for source in (first, second)}
    return [next(sources[id(source)]) for source in turns]


def _stream(texts: Iterable[Example], length: int) -> Iterator[Example]:
    window: list[Example] = []
    room = length
    for text in texts:
        ids = text.input_ids
        while len(ids) > 1:
            piece, ids = ids[:room], ids[room:]
            window.append(Example(piece, 1))
            room -= len(piece)
            if room < 2:  # a document of one token has nothing to learn
                yield _window(window)
                window, room = [], length
    if window:
        yield _window(window)


def _best_fit(documents: Iterable[Example], length: int) -> Iterator[Example]:
    begun: list[tuple[int, list[Example]]] = []  # room, what is in it
    for document in documents:
        size = len(document.input_ids)
        fits = [number for number, (room, _) in enumerate(begun) if room >= size]
        if fits:
            room, inside = begun.pop(min(fits, key=lambda number: begun[number][0]))
        else:
            room, inside = length, []
        begun.append((room - size, [*inside, document]))
        if begun[-1][0] < 2 or len(begun) > _OPEN:
            fullest = min(range(len(begun)), key=lambda number: begun[number][0])
            yield _window(begun.pop(fullest)[1])
    for _, inside in begun:
        yield _window(inside)


def _window(documents: Sequence[Example]) -> Example:
    """One example of several: nothing foretells a document's first token, so none but the first window's is counted."""
    ids: list[int] = []
    unlearned: list[int] = []
    for document in documents:
        begin = len(ids)
        unlearned += [begin + at for at in (*range(document.answer_start), *document.left_out)]
        ids += document.input_ids
    start = documents[0].answer_start
    left_out = tuple(at for at in unlearned if at >= start)
    return Example(ids, start, left_out, tuple(len(document.input_ids) for document in documents))
