"""Switches of the whole process that blocks turn while they are open."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


class Switch:
    """A switch of the whole process: the first block that needs it turns it, the last one turns it back.

    The two may be on different threads. So both run in one `contextvars.Context`: sdpa_kernel of torch 2.15 sets a
    context variable, and refuses to take it back in another context than the one it was set in.
    """

    def __init__(self, turned: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._turned, self._users = turned, 0
        self._lock, self._undo = threading.Lock(), contextlib.ExitStack()
        self._context = contextvars.Context()

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._context = contextvars.copy_context()
                self._context.run(self._undo.enter_context, self._turned())

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._context.run(self._undo.close)


@contextlib.contextmanager
def _no_fallback_warnings() -> Iterator[None]:
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)


# fused attention has no second derivative on CPU; the math kernel does
MATH_ATTENTION = Switch(lambda: sdpa_kernel(SDPBackend.MATH))
# vmap tells of kernels that it must loop over; that is our own affair, and `explain()` tells of roads
QUIET_VMAP = Switch(_no_fallback_warnings)
