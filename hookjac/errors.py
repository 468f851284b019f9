"""The library's one exception of its own; wrong arguments raise the built-in ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class HookjacError(RuntimeError):
    """A model, loss or call for which no exact answer exists (or none that we know).

    The message names the layer or parameter as the user's model calls it, says what was found, what was
    expected, and what to do. Nothing is left behind: hooks are gone after the block, results are not set.
    """


class NotInstalled(HookjacError, ImportError):
    """Something that only this part of hookjac needs is not installed; the message says what to install."""


@contextlib.contextmanager
def needed_by(what: str, install: str) -> Iterator[None]:
    """A block of imports. what: what the user asked for; install: what to give to pip."""
    try:
        yield
    except ImportError as error:
        raise NotInstalled(f"{what} needs more than torch and einops ({error}): pip install '{install}'") from error
