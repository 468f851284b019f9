"""Kronecker factors as laplace-torch adds them up: an entry for each parameter, two sides or its whole block.

N samples of the data, M of them in a batch · o/i output/input features · V columns · P entries of a parameter
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from laplace.utils.matrix import Kron
from torch import Tensor, nn

from hookjac.errors import HookjacError
from hookjac.factor import Dense, Factor, Lookup, Outer
from hookjac.kronecker import Kronecker
from hookjac.quantity import KFAC, Quantity, Received

LARGEST = 1 << 13  # entries of a parameter whose whole block is kept: half a gigabyte in float64
NAME = "laplace_kron"  # the attribute that a walk leaves on parameters

Fisher = Literal["mc", "exact", "empirical"]
Sharing = Literal["expand", "reduce"]


class Blocks(Kron):  # type: ignore[misc]
    """A `Kron` in which a matrix may have its whole block [P, P] where Laplace makes room for two sides.

    Laplace's own starts from zeros of two sides for each matrix, adds pair by pair, and drops what is left over.
    """

    def __add__(self, other: Kron) -> Blocks:
        if not isinstance(other, Kron) or len(other) != len(self):
            found = f"a Kron of {len(other)}" if isinstance(other, Kron) else type(other).__name__
            raise ValueError(f"a Kron of {len(self)} parameters cannot be added to {found}")
        pairs: Any = zip(self.kfacs, other.kfacs, strict=True)
        return _blocks(_sum(k, mine, its) for k, (mine, its) in enumerate(pairs))

    __radd__ = __add__

    def __mul__(self, scalar: float | Tensor) -> Blocks:
        return Blocks(super().__mul__(scalar).kfacs)

    __rmul__ = __mul__


def _blocks(found: Iterable[list[Tensor]]) -> Blocks:
    factors: Any = list(found)  # Laplace's own annotation says otherwise than its code
    return Blocks(factors)


def _sum(k: int, mine: Sequence[Tensor], its: Sequence[Tensor]) -> list[Tensor]:
    if [t.shape for t in mine] == [t.shape for t in its]:
        return [s + t for s, t in zip(mine, its, strict=True)]
    for left, right in ((mine, its), (its, mine)):
        if not any(bool(t.any()) for t in left):  # Laplace's zeros, or of a batch that did not reach it
            return list(right)
    shapes = [[tuple(t.shape) for t in part] for part in (mine, its)]
    raise ValueError(f"parameter {k} has factors {shapes[0]} in some batches and {shapes[1]} in others: use 'diag'")


@dataclass(frozen=True)
class Entry:
    """What one parameter has, sides or a block; and what arrived [V, M, o] of all positions, to tell a layer's bias."""

    found: Kronecker | Tensor
    arrived: Tensor | None

    def scaled(self, M: int, N: int) -> list[Tensor]:
        """The side of the parameter's first axis adds up over batches, the other one becomes a mean over the data."""
        if isinstance(self.found, Tensor):
            return [self.found]
        K = self.found
        if K.A is None:
            return [K.B]
        A = torch.diag(K.A) if K.A.dim() == 1 else K.A
        return [A * M, K.B / N] if K.swapped else [K.B, A * (M / N)]


def entries(fisher: Fisher, samples: int, sharing: Sharing) -> Quantity:
    """`p.laplace_kron`, an `Entry`: the sides that `KFAC` gives, where there is one pair; else the exact block."""
    kfac = KFAC(fisher=fisher, samples=samples, sharing=sharing)

    def reduce(got: Received) -> Entry:
        if not got.pieces:
            return Entry(kfac.reduce(got), None)
        factor, metric = got.pieces[0]
        if _has_sides(factor, got.param):
            positions = isinstance(factor, Outer) and factor.g.shape[3] > 1 and sharing == "expand"
            return Entry(kfac.reduce(got), factor.g.sum(3)[:, :, 0] if positions else None)  # type: ignore[union-attr]
        if got.param.numel() > LARGEST:
            raise HookjacError(
                f"a parameter of shape {tuple(got.param.shape)} has no one pair of Kronecker factors (it is used in "
                f"different ways, has groups, or no rule), and its whole block is too large: {LARGEST} entries are the "
                "limit. Freeze it, or use hessian_structure='diag' or subset_of_weights='last_layer'."
            )
        arrived = factor.t if isinstance(factor, Dense) and got.param.dim() == 1 else None
        return Entry(factor.block(metric).to(got.param.dtype), arrived)

    return replace(kfac, name=NAME, reduce=reduce, adds=None)


def _has_sides(factor: Factor, param: Tensor) -> bool:
    """Is it one Kronecker product, with sides where Laplace looks for them: the first axis, and all others?"""
    if isinstance(factor, Outer):
        first = factor.i if factor.swapped else factor.g.shape[4]
        return 2 <= param.dim() <= 4 and factor.g.shape[2] == 1 and first == param.shape[0]
    return isinstance(factor, Lookup) and param.dim() == 2 and factor.g.shape[2] == param.shape[1] > 1


def kron_of(model: nn.Module, params: Sequence[nn.Parameter], M: int, N: int) -> Blocks:
    """From the entries that a walk has left on parameters.

    Under "expand" a layer's bias takes positions for samples, as its weight does; a layer's, that is, which receives
    the same as the weight, summed over positions. Any other bias has its exact block.
    """
    found: dict[int, Entry] = {id(p): getattr(p, NAME) for p in params}
    for module in model.modules():
        weight, bias = (found.get(id(getattr(module, name, None))) for name in ("weight", "bias"))
        if weight is None or bias is None or weight.arrived is None or bias.arrived is None:
            continue
        if _same(weight.arrived, bias.arrived):
            assert isinstance(weight.found, Kronecker)
            found[id(module.bias)] = Entry(weight.found.B, None)
    return _blocks(found[id(p)].scaled(M, N) for p in params)


def _same(s: Tensor, t: Tensor) -> bool:  # to rounding: both were added up, in orders of their own
    return s.shape == t.shape and bool((s - t).abs().max() <= 1e3 * torch.finfo(t.dtype).eps * t.abs().max())
