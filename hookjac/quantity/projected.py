"""Each sample's gradient in a few random directions: what comparisons of very many samples keep of it.

N samples · k directions · p the parameter's shape, as a matrix [r, c] whose rows are its first axis.
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor

from hookjac import given
from hookjac.factor import Dense, Factor
from hookjac.quantity.gradient import Samples
from hookjac.quantity.record import Quantity, Received, chosen


def GradSampleProjected(*, k: int = 512, seed: int = 0, subsample: Samples = None) -> Quantity:
    """`p.grad_sample_projected` [N, k]: each sample's gradient for this parameter in k random directions.

    Entry [n, j] is <R_j, p.grad_sample[n]> with R_j = x_j y_jᵀ / sqrt(k), exact to rounding; x_j [r] and y_j [c] are
    random signs. Inner products of two samples' rows estimate those of their gradients: without bias, and with a
    variance of at most 9 / k of the product of their squared norms. The signs depend on `seed`, `k`, and the
    parameter's name and shape only: two batches, or two processes, are projected alike, and parameters independently
    of each other. For the whole model sum the rows over parameters (k numbers a sample), or lay them side by side
    (less noise).

    Nothing of size N P or k P is built: for a layer both sides meet the signs by themselves, k (r + c) products for
    each position, or single samples' gradients in turn, where that is cheaper. subsample: as for `GradSample`.
    Units: loss / parameter. Cost: about one backward, those products, and k (r + c) signs.
    """
    given.counts(1, k=k)
    given.counts(0, seed=seed)

    def reduce(got: Received) -> Tensor:
        out = got.numbers(got.M, k)
        X, Y = signs(got.name, got.param.shape, k, seed)
        factors: list[Factor] = [] if got.factor is None else [got.factor]
        if got.direct is not None:  # a penalty, of which each sample has its share
            factors.append(Dense((got.direct.head / got.N)[None, None]))
        for factor in factors:
            out = out + factor.project(X.to(factor.tensors[0]), Y.to(factor.tensors[0]))[:, 0].T
        return (out / k**0.5).to(got.param.dtype).contiguous()

    return Quantity(name="grad_sample_projected", columns="loss", reduce=reduce, subsample=chosen(subsample),
                    entries=lambda M, C, P: M * k, instead="Use a smaller k.", single=True)  # fmt: skip


# what wrappers put before or into a parameter's name, which is the same parameter with and without them
_WRAPPED = re.compile(r"^module\.|(?<![^.])(_orig_mod|_checkpoint_wrapped_module)\.")


def signs(name: str, shape: torch.Size, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """x [k, r] and y [k, c] of a parameter: bits of a hash, so the same everywhere, and of no generator's state."""
    r = shape[0] if shape else 1
    c = shape.numel() // max(1, r)
    told = f"{seed}/{k}/{_WRAPPED.sub('', name)}/{tuple(shape)}".encode()
    drawn = bytearray(hashlib.shake_256(told).digest(-(-k * (r + c) // 8)))
    octets = torch.frombuffer(drawn, dtype=torch.uint8).cpu().unsqueeze(1)
    bits = (octets >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    found = 2 * bits.reshape(-1)[: k * (r + c)].to(torch.int8) - 1
    return found[: k * r].view(k, r), found[k * r :].view(k, c)
