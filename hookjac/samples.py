"""Where the samples sit in a tensor, and the proof that they do not mix.

A model may move its batch axis about: transpose it behind time, merge it with heads, flatten it into rows.
Nothing is assumed about that. Two columns travel through the graph once: u, random, and u with the n-th sample
multiplied by a factor s_n. Wherever the second is the first with one axis scaled by s, that axis holds
the samples and they do not interact above that tensor; where no axis fits, they do.

V columns · N samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Samples lie along `axis`, which has size outer * N * inner (both 1 for a plain batch axis)."""

    N: int
    axis: int = 0
    outer: int = 1
    inner: int = 1

    @property
    def plain(self) -> bool:
        return self.axis == 0 and self.outer == self.inner == 1

    def split(self, t: Tensor) -> Tensor:  # [V, *shape] -> [V, N, *rest]
        if self.plain:
            return t
        at = self.axis + 1
        t = t.reshape(*t.shape[:at], self.outer, self.N, self.inner, *t.shape[at + 1 :])
        t = t.movedim(at + 1, 1)
        # merged axes of size one go: a transposed batch leaves the plain rest
        return (
            t.reshape(*t.shape[: at + 1], self.outer * self.inner, *t.shape[at + 3 :])
            if self.merged
            else (t.reshape(*t.shape[: at + 1], *t.shape[at + 3 :]))
        )

    @property
    def merged(self) -> bool:
        return self.outer * self.inner > 1

    def join(self, t: Tensor, shape: torch.Size) -> Tensor:  # [V, N, *rest] -> [V, *shape]
        if self.plain:
            return t
        at = self.axis + 1
        t = t.reshape(*t.shape[: at + 1], self.outer, self.inner, *shape[at:])
        return t.movedim(1, at + 1).reshape(t.shape[0], *shape)

    def features(self, t: Tensor) -> Tensor:  # [V, *shape] -> [V, N, D], keeping a shared sample axis shared
        t = self.split(t)
        if t.shape[1] > 1 and t.stride(1) == 0:
            return t[:, :1].reshape(t.shape[0], 1, t.shape[2:].numel()).expand(-1, t.shape[1], -1)
        return t.flatten(2) if t.dim() > 2 else t.reshape(*t.shape[:2], 1)


def scales(N: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A factor for each sample, in a random but repeatable order: powers of two, so that scaling rounds nothing.

    What a sample's columns cancel down to, noise included, is then scaled exactly as long as no other sample meets
    it. Up to eight samples have factors of their own.
    """
    order = torch.randperm(N, generator=torch.Generator("cpu").manual_seed(20_113), device="cpu")
    return torch.exp2((order % 8).to(torch.float64)).to(device=device, dtype=dtype)


def random(shape: Iterable[int], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Repeatable normal numbers, whatever the user's default device and random state."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)


def tolerance(dtype: torch.dtype) -> float:
    """How far two roundings of one number may be apart, relative to the largest entry."""
    eps = torch.finfo(dtype).eps
    return min(1e3 * eps, math.sqrt(eps))


def scaled(u: Tensor, factors: Tensor, layout: Layout) -> Tensor:
    """u [*shape] with each sample multiplied by its factor."""
    rows = layout.split(u.unsqueeze(0))
    rows = rows * factors.reshape(1, -1, *[1] * (rows.dim() - 2))
    return layout.join(rows, u.shape)[0]


def agree(u: Tensor, v: Tensor, within: float = 0.0) -> bool:
    """Equal up to rounding, measured against the largest entry of v. NaN and Inf say nothing.

    within: a tolerance that may be wider than that of the tensors' own precision.
    """
    if u.numel() == 0:
        return True
    off, top = (u - v).abs(), v.abs()
    if not bool(torch.isfinite(off.sum() + top.sum())):
        off, top = off.nan_to_num(0, 0, 0), top.nan_to_num(0, 0, 0)
    return bool((off <= max(within, tolerance(u.dtype)) * top.max()).all())


def same(u: Tensor, v: Tensor) -> bool:
    """Equal entry by entry, each to its own rounding: beside a large entry a small one matters as much."""
    return bool(((u - v).abs() <= min(64 * torch.finfo(u.dtype).eps, 0.02) * v.abs()).all())


def _each_agrees(u: Tensor, v: Tensor, layout: Layout, within: float) -> bool:
    """`agree`, each sample measured by its own largest entry: what leaks into a small one from a large one is seen."""
    off, top = (layout.split(t.abs().unsqueeze(0))[0].reshape(layout.N, -1) for t in (u - v, v))
    off, top = off.nan_to_num(0, 0, 0), top.nan_to_num(0, 0, 0)
    return bool((off <= max(within, tolerance(u.dtype)) * top.amax(1, keepdim=True)).all())


_LOOKED_AT = 256  # entries that a layout is tried on before whole tensors are compared


def find(u: Tensor, su: Tensor, factors: Tensor, within: float = 0.0) -> Layout | None:
    """The layout of a tensor from its two probe columns [*shape].

    None where samples mix or are absent, and where the columns do not tell: they vanish, or fit several layouts.
    """
    N = factors.numel()
    told = (torch.isfinite(su) & torch.isfinite(u) & (u != 0)).reshape(-1).nonzero()[:, 0]
    if N == 0 or len(told) == 0:
        return None
    # a few entries spread over the tensor rule out most layouts at once
    few = told[:: max(1, len(told) // _LOOKED_AT)]
    here, there = u.reshape(-1)[few], su.reshape(-1)[few]
    found: list[Layout] = []
    stride = u.numel()
    for axis, size in enumerate(u.shape):
        stride //= size
        if size % N:
            continue
        place, rest = few // stride % size, size // N
        for outer in (d for d in range(1, rest + 1) if rest % d == 0):
            layout = Layout(N, axis, outer, rest // outer)
            guess = here * factors[place // layout.inner % N]
            if agree(there, guess, within=within) and _each_agrees(su, scaled(u, factors, layout), layout, within):
                if N == 1:
                    return layout
                found.append(layout)
    return found[0] if len(found) == 1 else None
