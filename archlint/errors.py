"""The one family of exceptions for mistakes of the user."""

from __future__ import annotations


class ArchlintError(Exception):
    """A target, an option or a configuration that archlint cannot work with.

    The message is one line that says what is wrong; the hint says what to do about it.
    The command line prints both without a traceback and exits with 2.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
