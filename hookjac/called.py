"""Which calls a forward consisted of: noted as they begin and end, by the numbers that autograd gives to nodes.

A node numbered between the beginning and the end of a call was made in it. What is noted hangs on the graph, at what
the outermost call returned, and goes with it. It is texts and numbers: no module, whose parameters may hold the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

sequence = torch._C._autograd._get_sequence_nr  # type: ignore[attr-defined]


class Called(NamedTuple):
    """A call of a module: its qualified name and class, the shape of what it returned (of the first tensor in it), and
    which autograd nodes were made in it: those numbered `first` and up to `last`."""

    name: str
    kind: str
    shape: tuple[int, ...]
    first: int
    last: int


Trail = list[tuple[str, str, tuple[int, ...], int, int]]  # `Called`, but quicker to make


class Calls:
    """Those that are under way, `begun`, each as its name and `sequence()`; and those within the outermost of them that
    are over."""

    __slots__ = ("begun", "over")

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.over: Trail = []

    def anew(self) -> None:
        """The outermost begins. One that was interrupted may never have ended."""
        self.begun, self.over = [], []

    def end(self, name: str) -> int:
        """The number at which it began; -1 if that was not seen."""
        begun = self.begun
        while begun:
            at, first = begun.pop()
            if at is name or at == name:
                return first  # those above it failed, and whoever called them caught the error
        return -1

    def taken(self) -> Trail:
        """What is over, once the outermost is."""
        trail, self.over = self.over, []
        return trail


def listed(trails: Iterable[Trail], *, reopened: bool = False) -> list[Called]:
    """All calls, in the order in which they ended.

    reopened: checkpoints were opened, in which modules ran again. A call within, which made no node when it first ran,
    then stands for what it made the second time.
    """
    once = {id(one): one for trail in trails for one in trail}  # outputs of one call share what hangs on them
    found = sorted((Called(*one) for one in once.values()), key=lambda call: call.last)
    return _with_second_runs(found) if reopened else found


def _with_second_runs(found: Sequence[Called]) -> list[Called]:
    second: dict[int, int] = {}  # where the second run is -> where the first is
    for k, call in enumerate(found):
        again = range(k + 1, len(found)) if call.first == call.last else ()
        its = (j for j in again if found[j].name == call.name and found[j].first < found[j].last and j not in second)
        if (j := next(its, None)) is not None:
            second[j] = k
    again_at = {k: j for j, k in second.items()}
    return [found[again_at.get(k, k)] for k in range(len(found)) if k not in second]
