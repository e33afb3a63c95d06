"""What the user sees when a run fails: a message for what they can mend, a traceback for the rest."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from passion_monai.config import check_switches

__all__ = ["causes", "end_with_words", "find_words"]

_PACKAGE = Path(__file__).parent


def end_with_words(*, debug: bool) -> None:
    """Make ``python -m monai.bundle`` end with the message of our errors, instead of a traceback through MONAI.

    Nothing that is raised changes, and no other program, which may have a use for the traceback.

    Args:
        debug: print the traceback all the same.

    Raises:
        ValueError: when `debug` is no switch.
    """
    if getattr(sys.modules["__main__"].__spec__, "name", "") == "monai.bundle.__main__":
        sys.excepthook = functools.partial(_show, debug=debug is True)
    check_switches(debug=debug)


def find_words(error: BaseException) -> str:
    """The message of an error that the user can mend; empty for any other error.

    MONAI raises an error of its own from ours, one for each component around it; and what ours was raised from says
    less.
    """
    for cause in causes(error):
        if _can_be_mended(cause):
            written_by_us = isinstance(cause, OSError) and cause.filename is None
            return str(getattr(cause, "strerror", None) or cause) if written_by_us else str(cause)
    return ""


def _can_be_mended(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    end = frames[-1]
    # The package raises an error itself where it knows what is wrong and what to do.
    ours = Path(end.filename).is_relative_to(_PACKAGE) and str(end.line).startswith("raise ")
    about_a_file = isinstance(error, OSError) and error.filename is not None
    # A component of the configuration was given an argument that it does not have.
    misspelt = isinstance(error, TypeError) and end.name == "instantiate"
    return ours or about_a_file or misspelt


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None, *, debug: bool) -> None:
    words = find_words(error)
    if debug or not words:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"\nError: {words}", file=sys.stderr)  # noqa: T201 - the last words of a command
