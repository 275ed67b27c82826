"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations

__all__ = ["DataMissingError", "ModelUnavailableError", "UserError"]


class UserError(Exception):
    """Wrong input or surroundings: one line that says what, where and what to do.

    Entry points print it to stderr without a traceback and exit with status 2.
    """

    def __init__(self, message: str):
        # One line, whatever was interpolated: a message that wraps is a message that is not read.
        super().__init__(" ".join(str(message).split()))


class ModelUnavailableError(UserError):
    """A model that cannot be had: unknown, gated, or the hub is out of reach."""


class DataMissingError(UserError):
    """Task data that cannot be had: no such task, split or file, or the hub is out of reach."""
