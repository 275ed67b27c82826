"""Special tokens where text is split or joined: an open end, and ids that the embedding has."""

from __future__ import annotations

from pathlib import Path

from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from sparse_ft.errors import UserError
from sparse_ft.models.families import architecture_of
from sparse_ft.models.opening import open_checkpoint

__all__ = ["embedding_rows", "leave_open", "pad_inside"]

_PROBES = ("a", "one two", "The end.")


def leave_open(tokenizer: PreTrainedTokenizerBase, where: str | Path) -> None:
    """Takes away, in place, the tokens that a tokenizer puts *after* a text; what it puts before stays.

    lm-eval, training and calibration split a pair by encoding the context alone and the whole: a context that is
    closed by an end token is longer than it is in the whole, and the first tokens of the answer are lost.

    Raises:
        UserError: the closing tokens cannot be taken away.
    """
    ends = [_around(tokenizer, text) for text in _PROBES]
    if not any(after for _, after in ends):
        return
    before = ends[0][0]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Whatever was there (a template, BERT's, a sequence of both) gave these ids; offsets are not used.
        names = dict(zip(tokenizer.convert_ids_to_tokens(before), before, strict=True))
        first = list(names) if len(names) == len(before) else tokenizer.convert_ids_to_tokens(before)
        backend.post_processor = processors.TemplateProcessing(
            single=[*first, "$A"], pair=[*first, "$A", "$B"], special_tokens=list(names.items())
        )
    elif hasattr(tokenizer, "add_eos_token"):
        tokenizer.add_eos_token = False
    for text in _PROBES:
        if _around(tokenizer, text) != (before, []):
            raise UserError(
                f"{where}: the tokenizer closes every text with {tokenizer.convert_ids_to_tokens(ends[0][1])}, so that"
                " prompt and answer cannot be told apart; set add_eos_token to false in its tokenizer_config.json"
            )


def pad_inside(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Gives, in place, a pad token that the model's embedding has: the end token where there is none such.

    Raises:
        UserError: neither a pad nor an end token that the embedding has, or a tokenizer of a larger vocabulary.
    """
    rows = embedding_rows(folder)
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {rows}; they do not"
            " belong together"
        )
    for token in (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token):
        number = None if token is None else tokenizer.convert_tokens_to_ids(token)
        if number is not None and number < rows:
            if tokenizer.pad_token != token:
                tokenizer.pad_token = token
            break
    else:
        raise UserError(
            f"{folder}: the tokenizer has no end token and no pad token that the model knows; name eos_token in its"
            " tokenizer_config.json"
        )


def embedding_rows(folder: str | Path) -> int:
    """Rows of the embedding that a checkpoint holds, whatever its configuration says.

    Raises:
        UserError: the folder is no checkpoint.
    """
    checkpoint = open_checkpoint(folder)
    return checkpoint.shape(architecture_of(checkpoint.config).embedding_weight)[0]


def _around(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    plain, whole = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []
