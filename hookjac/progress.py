"""A progress bar for work that turns out to be long: nothing for the first seconds, and nothing without tqdm."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

Tick = Callable[[float], None]  # told which fraction of some work is done

_PATIENCE = 5.0  # seconds before a bar appears


class Progress:
    """Counts towards `total` (any unit: FLOPs, chunks) and shows a tqdm bar once it has taken too long.

    with Progress("hess_diag", total) as progress:
        with progress.part(amount) as tick:
            tick(0.5)  # half of that amount is done
    """

    def __init__(self, what: str, total: float) -> None:
        self._what, self._total = what, total
        self._done = 0.0
        self._start = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @contextlib.contextmanager
    def part(self, amount: float) -> Iterator[Tick]:
        """A piece of the work; what it gives is to be told which fraction of that piece is done."""
        yield lambda done: self._show(self._done + done * amount)
        self._show(self._done + amount)
        self._done += amount

    def _show(self, done: float) -> None:
        if self._bar is None:
            if time.monotonic() - self._start < _PATIENCE:
                return
            self._bar = _new_bar(self._what, self._total)
            if self._bar is None:
                self._start = float("inf")  # no tqdm here; do not ask again
                return
        self._bar.n = min(done, self._total)
        self._bar.refresh()


def _new_bar(what: str, total: float) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(desc=what, total=total, unit_scale=True, leave=False)


@contextlib.contextmanager
def unseen() -> Iterator[Tick]:
    """Work that is always short."""
    yield lambda done: None
