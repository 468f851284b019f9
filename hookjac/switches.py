"""Switches of the whole process that blocks turn while they are open.

Here and wherever something is undone, it is written out twice: once, and once more if that was interrupted. A function
for it would bring what it guards against, for a signal is also taken notice of where a function begins.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


class Switch:
    """A switch of the whole process: the first that needs it turns it, the last one turns it back.

    Taking and giving may be done twice: whoever was interrupted (Ctrl-C) does it again, and nothing is counted wrongly.
    The first and the last may be on different threads. So both turns run in one `contextvars.Context`: sdpa_kernel of
    torch 2.15 sets a context variable, and refuses to take it back in another context than the one it was set in.
    """

    def __init__(self, turned: Callable[[], Generator[None, None, None]]) -> None:
        """turned: turns it, yields, turns it back."""
        self._turned = turned
        self._users: set[int] = set()  # ids, for a user that nobody else holds shall die and give it back
        self._lock = threading.RLock()  # a user may die in here
        self._turn: Generator[None, None, None] | None = None
        self._context = contextvars.Context()

    def take(self, user: object) -> None:
        with self._lock:
            self._users.add(id(user))
            self._settle()

    def give(self, user: object) -> None:
        with self._lock:
            self._users.discard(id(user))
            self._settle()

    def held(self) -> Held:
        """For a `with`."""
        return Held(self)

    def _settle(self) -> None:
        if self._users and self._turn is None:
            self._context, turn = contextvars.copy_context(), self._turned()
            try:
                self._context.run(next, turn)
                self._turn = turn
            except BaseException:
                self._context.run(turn.close)
                self._turn = None
                raise
        elif not self._users and self._turn is not None:
            self._context.run(self._turn.close)
            self._turn = None


class Held:
    """A switch, while this is open; after an interrupt at the worst moment, while this lives."""

    _taken = False

    def __init__(self, switch: Switch) -> None:
        self._switch = switch

    def __enter__(self) -> None:
        self._taken = True
        try:
            self._switch.take(self)
        except BaseException:
            self._switch.give(self)
            raise

    def __exit__(self, *exc: object) -> None:
        try:
            self._switch.give(self)
        except BaseException:
            self._switch.give(self)
            raise
        self._taken = False

    def __del__(self) -> None:
        if self._taken:
            self._switch.give(self)


@contextlib.contextmanager
def uncast() -> Iterator[None]:
    """Where a backward is started under autocast: our own products are not to be rounded by it. Autograd's own
    backward is left as it is."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _no_fallback_warnings() -> Generator[None, None, None]:
    functorch: Any = torch._C._functorch
    try:
        functorch._set_vmap_fallback_warning_enabled(False)
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)


def _math_attention() -> Generator[None, None, None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


# fused attention has no second derivative on CPU; the math kernel does
MATH_ATTENTION = Switch(_math_attention)
# vmap tells of kernels that it must loop over; that is our own affair, and `explain()` tells of roads
QUIET_VMAP = Switch(_no_fallback_warnings)
