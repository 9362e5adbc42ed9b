"""The one family of exceptions for mistakes of the user."""

from __future__ import annotations


class ArchlintError(Exception):
    """A target, an option or a configuration that archlint cannot work with.

    The message is one line that says what is wrong; the hint says what to do about it. ``details``
    is the traceback of an exception that the user's own code raised, with their frames alone.
    The command line prints these without a traceback of archlint's and exits with 2.
    """

    def __init__(self, message: str, hint: str | None = None, details: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details
