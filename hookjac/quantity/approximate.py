"""Approximations of the Hessian's diagonal that go by a name. Next to them stands `HessDiag`, which is exact."""

from __future__ import annotations

import torch
from torch import Tensor

from hookjac.errors import HookjacError
from hookjac.quantity.record import Adds, Diagonal, Probes, Quantity, Received


def Hutchinson(*, samples: int = 1, generator: torch.Generator | None = None) -> Quantity:
    """`p.hutchinson` [*p]: an estimate of `hess_diag`, the mean of v * (H v) over random signs v. Unbiased, and noisy.

    The signs are drawn for all parameters together, anew for each backward, from `generator` or torch's global one.
    Entry i is off by sqrt(sum over j != i of H_ij² / samples), root mean square, whatever its own size: often by more
    than the entry. Used by AdaHessian (Yao et al. 2021) and Sophia; Bekas et al. 2007. Units: loss / parameter².
    Cost: two backwards for each sample.
    """

    def reduce(got: Received) -> Tensor:
        assert got.probed is not None
        signs, products = got.probed
        return (signs * products).mean(0)

    return Quantity(name="hutchinson", columns=Probes(samples, generator), reduce=reduce, adds=Adds())


def HesScale() -> Quantity:
    """`p.hesscale` [*p]: the diagonal of the Hessian, carrying nothing but diagonals down. Biased, without noise.

    At every step the curvature of a tensor is taken to be its diagonal: h_x = (dz/dx)² h_z plus the diagonal of what
    the step itself bends, from the exact diagonal of the loss's Hessian in the outputs (Becker & LeCun 1989; Elsayed &
    Mahmood 2022). Exact for the last layer; below, what outputs have in common is lost, and no number bounds the error.
    For parameters that are used once. Units: loss / parameter². Cost: C columns at the outputs, and one for each
    feature of each layer below: made for comparison, not for speed (`ggn_diag` and `hess_diag` are often cheaper).
    """

    def reduce(got: Received) -> Tensor:
        if len(got.pieces) > 1:
            raise HookjacError("hesscale is defined for parameters that are used once. Use hess_diag.")
        return got.diagonal().to(got.param.dtype)

    return Quantity(name="hesscale", columns=Diagonal(), reduce=reduce, adds=Adds())
