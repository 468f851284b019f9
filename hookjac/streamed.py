"""The Hessian of a layer's parameters from rows of that at the layer's output, without holding those.

From columns at the layer's output a parameter receives A, linear in them. So its Hessian is the sum over the D features
v there of A_v times A of the v-th row. N samples · M of them asked for · k rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hookjac.factor import Dense, Factor, Outer, paired, side_by_side

Pairs = Iterator[dict[int, tuple[Factor, Factor]]]  # of each parameter, by id: A_v, and A of the v-th rows
Reduce = Callable[[Factor, Factor], Tensor]


def streams(factor: Factor, D: int, *, full: bool) -> bool:
    """Would the rows of all features be needed at once otherwise, and is a factor cheap to build a few at a time?

    With one position, a diagonal needs only the rows' own diagonal. Of a table, only few rows meet.
    """
    if isinstance(factor, Outer):
        return full or factor.g.shape[3] > 1
    return isinstance(factor, Dense) and (full or factor.param.numel() != D)


class Streamed:
    """What `Product` is to parameters that go by entries. found: by which sum over v, to that sum."""

    def __init__(self, found: Callable[[Reduce], Tensor]) -> None:
        self._found = found

    def diagonal(self) -> Tensor:  # -> [*p]
        return self._found(paired)

    def diagonals(self) -> Tensor:  # -> [M, *p]
        """Of each sample by itself."""
        return self._found(each_paired)

    def matrix(self) -> Tensor:  # -> [P, P]
        full = self._found(crossed)
        return (full + full.T) / 2


def each_paired(A: Factor, B: Factor) -> Tensor:  # -> [N, *p]
    return torch.cat([(a * b).sum(0) for a, b in side_by_side(A, B)])


def crossed(A: Factor, B: Factor) -> Tensor:  # -> [P, P]
    P = A.param.numel()
    return functools.reduce(torch.add, (a.reshape(-1, P).T @ b.reshape(-1, P) for a, b in side_by_side(A, B)))


def add_up(pairs: Pairs, reduce: Reduce, samples: Sequence[int] | None) -> dict[int, Tensor]:
    """Of each parameter, the sum over all rows; of all samples, or of some."""
    totals: dict[int, Tensor] = {}
    for found in pairs:
        for p, (A, B) in found.items():
            if samples is not None:
                pick = torch.tensor(samples, device=A.tensors[0].device)
                A, B = A.samples(pick), B.samples(pick)
            part = reduce(A, B)
            totals[p] = totals[p].add_(part) if p in totals else part
    return totals
