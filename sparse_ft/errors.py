"""Errors that are meant for the person at the keyboard, and what no line may show."""

from __future__ import annotations

import re

__all__ = ["DataMissingError", "ModelUnavailableError", "UserError", "masked"]

# scheme://user:password@host. A password may hold '@', '/', quotes and '%40': it ends at the last '@' of the word.
_PASSWORD = re.compile(r"([a-zA-Z][\w+.-]*://[^\s:/@]*:)\S*(?=@)")
_TOKEN = re.compile(r"(https?://)[^\s:/@]+(?=@)")  # a server's token stands in the user's place
_SECRET = re.compile(  # in an address' query, or in a database's own words (password=...)
    r"(?i)((?:[?&;][\w.-]*(?:token|secret|key|signature|credential)|(?<![a-z])(?:ssl_?)?(?:password|passwd|pwd))=)[^&\s'\"]+"
)


def masked(text: str) -> str:
    """The text with every password and token of an address replaced by ``***``: what is shown, logged or raised.

    Rather too much than too little: what stands between a user's name and the last '@' of a word is taken for one.
    """
    text = _PASSWORD.sub(r"\1***", text)
    text = _TOKEN.sub(r"\1***", text)
    return _SECRET.sub(r"\1***", text) if "=" in text else text


class UserError(Exception):
    """Wrong input or surroundings: one line that says what, where and what to do, and shows no password.

    Entry points print it to stderr without a traceback and exit with status 2.
    """

    def __init__(self, message: str):
        # One line, whatever was interpolated: a message that wraps is a message that is not read.
        super().__init__(masked(" ".join(str(message).split())))


class ModelUnavailableError(UserError):
    """A model that cannot be had: unknown, gated, or the hub is out of reach."""


class DataMissingError(UserError):
    """Task data that cannot be had: no such task, split or file, or the hub is out of reach."""
