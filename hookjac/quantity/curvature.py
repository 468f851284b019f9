"""Quantities of curvature: diagonals, square roots, blocks. N samples · p the parameter's shape, P its entries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hookjac import given
from hookjac.errors import HookjacError
from hookjac.factor.metric import eigen
from hookjac.quantity.gradient import Samples
from hookjac.quantity.record import GGN, Adds, Hessian, Quantity, Received, Road, Sampled, Wish, chosen
from hookjac.structured import JacTensor, zero

_BLOCK = 1 << 28  # entries of a block: two gigabytes in float64


def _diagonal(got: Received) -> Tensor:
    return got.diagonal().to(got.param.dtype)


def _diagonals(got: Received) -> Tensor:
    return got.diagonals().to(got.param.dtype)


def GGNDiag(*, subsample: Samples = None) -> Quantity:
    """`p.ggn_diag` [*p]: the diagonal of the generalised Gauss-Newton matrix, exact to rounding.

    G = sum_n J_nᵀ H_n J_n with J_n the Jacobian of the model's outputs and H_n the Hessian of the reduced loss in
    them; penalties add their own Hessian. What is made of the selected output counts as loss; where the loss goes
    around all outputs, the first layer's output stands for one. For cross entropy of logits it is the Fisher
    information (Schraudolph 2002, Martens 2014). subsample: as for `GradSample`. Units: loss / parameter². Cost: C
    backwards.
    """
    return Quantity(name="ggn_diag", columns=GGN(), reduce=_diagonal, subsample=chosen(subsample), adds=Adds())


def GGNDiagSample(*, subsample: Samples = None) -> Quantity:
    """`p.ggn_diag_sample` [N, *p]: the summands of `ggn_diag`, exact to rounding; they add up to it.

    Penalties are shared equally by the samples. subsample: as for `GradSample`. Units: loss / parameter². Cost: C
    backwards, and writing N times the parameters.
    """
    return Quantity(name="ggn_diag_sample", columns=GGN(), reduce=_diagonals, subsample=chosen(subsample),
                    entries=lambda M, C, P: M * P, instead="ggn_diag is their sum.", single=True)  # fmt: skip


def GGNDiagMC(*, samples: int = 1, generator: torch.Generator | None = None, subsample: Samples = None) -> Quantity:
    """`p.ggn_diag_mc` [*p]: `ggn_diag`, estimated with `samples` random columns. Unbiased.

    Each column is H_n^(1/2) e with random signs e, drawn anew for each sample and each backward, from `generator` or
    from torch's global one. For an H_n that is not positive semi-definite two columns are sent for each, u and w, with
    E[u wᵀ] = H_n. subsample: as for `GradSample`. Units: loss / parameter². Cost: `samples` backwards, whatever C is.
    """
    wish = Sampled(samples, generator)
    return Quantity(name="ggn_diag_mc", columns=wish, reduce=_diagonal, subsample=chosen(subsample), adds=Adds())


def HessDiag(*, road: Road = "auto", flop_limit: float = 1e17, subsample: Samples = None) -> Quantity:
    """`p.hess_diag` [*p]: the diagonal of the Hessian of the loss that was backpropagated, exact to rounding.

    Not the row sums that `grad(grad(L), p, ones)` gives. road: how to find it; "auto" counts FLOPs and takes the
    cheapest of "columns" (closed forms where there are some), "features" and "entries" (Hessian-vector products,
    one for each output feature of a layer, or each entry of the parameter). A road that cannot serve a parameter
    is replaced by the next that can. flop_limit: the bill is known before anything walks, and one beyond this limit
    is refused (1e17 keeps a CPU busy for months). subsample: as for `GradSample`. Units: loss / parameter². Cost: for
    piecewise-linear nets that of `ggn_diag`; else see `explain()`. Long work shows a progress bar where tqdm is
    installed.
    """
    wish = Hessian(road, flop_limit)
    return Quantity(name="hess_diag", columns=wish, reduce=_diagonal, subsample=chosen(subsample), adds=Adds())


def HessDiagSample(*, road: Road = "auto", flop_limit: float = 1e17, subsample: Samples = None) -> Quantity:
    """`p.hess_diag_sample` [N, *p]: the summands of `hess_diag`, exact to rounding; they add up to it.

    Penalties are shared equally by the samples. road, flop_limit: as for `HessDiag`; subsample: as for `GradSample`.
    Units: loss / parameter². Cost: as `hess_diag`, and writing N times the parameters; for parameters on the road
    "entries", N times as many products.
    """
    wish = Hessian(road, flop_limit)
    return Quantity(name="hess_diag_sample", columns=wish, reduce=_diagonals, subsample=chosen(subsample),
                    entries=lambda M, C, P: M * P, instead="hess_diag is their sum.", single=True)  # fmt: skip


def GGNSqrt(
    *,
    samples: int | None = None,
    generator: torch.Generator | None = None,
    structured: bool = False,
    subsample: Samples = None,
) -> Quantity:
    """`p.ggn_sqrt` [V, N, *p]: S with G = sum over v and n of s sᵀ for this parameter's block, exact to rounding.

    V = C columns H_n^(1/2) J_n, or C - 1 under cross entropy (the rank of its H_n); with `samples`, that many random
    ones from `generator`, unbiased (see `GGNDiagMC`). subsample: as for `GradSample`. Of the data's part of the loss: a
    penalty has no place in it. Needs a loss that is convex in the outputs. Units: sqrt(loss) / parameter. Cost: C (or
    `samples`) backwards, and writing V N times the parameters.

    structured: instead a `JacTensor` [N, V, *p], samples first as in `jac`, kept as its factors, so that none of that
    size is written. `hookjac.Jacobian({name: p.ggn_sqrt, ...})` is the root of the whole matrix as an operator W
    [N V, P]: the Gauss-Newton matrix is W.T @ W, and W.gram() has its eigenvalues. A parameter that the loss does not
    reach has V = 0 columns; so have all, dense or not, of a batch without samples.
    """
    given.generator(generator)
    given.flag(structured=structured)
    wish: Wish = GGN() if samples is None else Sampled(samples, generator)

    def reduce(got: Received) -> Tensor:
        if not got.pieces:
            return zero(got.param, got.M, torch.Size([0])) if structured else got.zeros(0, got.M)
        factor, metric = got.pieces[0]
        assert metric is not None
        factor = factor.mix(_root(metric, got.noise))
        if structured:
            return JacTensor(factor, torch.Size([factor.V]), got.param.dtype)
        return factor.dense().to(got.param.dtype).contiguous()

    return Quantity(name="ggn_sqrt", columns=wish, reduce=reduce, subsample=chosen(subsample),
                    entries=None if structured else lambda M, C, P: M * P * (C if samples is None else samples),
                    instead="structured=True keeps its factors; samples= gives fewer, random columns.",
                    single=True)  # fmt: skip


def _root(metric: Tensor, noise: Callable[[], float]) -> Tensor:  # [N, V] or [N, V, V]
    """R of the same shape with M = Rᵀ R."""
    values, vectors = (metric, None) if metric.dim() == 2 else eigen(metric)
    own, made = torch.finfo(values.dtype).eps, torch.finfo(metric.dtype).eps  # half precision is widened for LAPACK
    low = values.amin(1) + max(1e3 * own, metric.shape[1] * made) * values.abs().amax(1) if metric.numel() else values
    if bool((low < 0).any()) and bool((low < -noise()).any()):
        raise HookjacError(
            f"the loss is not convex in the outputs (its Hessian there has an eigenvalue {values.min():.1e}),"
            " so that the generalised Gauss-Newton matrix has no real square root. ggn_diag and ggn_block have no such "
            "limit."
        )
    sizes = values.clamp(min=0).sqrt()
    return sizes if vectors is None else sizes.unsqueeze(2) * vectors.transpose(1, 2)


def GGNBlock(*, subsample: Samples = None) -> Quantity:
    """`p.ggn_block` [P, P]: this parameter's block of the generalised Gauss-Newton matrix, exact, in row-major order.

    Penalties add their own Hessian. For small parameters: P² entries are written. subsample: as for `GradSample`.
    Units: loss / parameter². Cost: C backwards, and N C P².
    """
    return Quantity(name="ggn_block", columns=GGN(), reduce=_block, subsample=chosen(subsample), adds=Adds())


def HessBlock(*, road: Road = "auto", flop_limit: float = 1e17, subsample: Samples = None) -> Quantity:
    """`p.hess_block` [P, P]: this parameter's block of the Hessian of the loss, exact, in row-major order.

    Its diagonal is `hess_diag`. For small parameters: P² entries are written. road, flop_limit: as for `HessDiag`;
    subsample: as for `GradSample`. Units: loss / parameter². Cost: that of `hess_diag`, and a product of columns of P²
    for each.
    """
    wish = Hessian(road, flop_limit)
    return Quantity(name="hess_block", columns=wish, reduce=_block, subsample=chosen(subsample), full=True, adds=Adds())


def _block(got: Received) -> Tensor:
    P = got.param.numel()
    if P * P > _BLOCK:
        raise HookjacError(
            f"the block of a parameter of shape {tuple(got.param.shape)} has {P}² entries, more than fit in memory. "
            "Freeze large parameters, list small ones in backward(inputs=...), or ask for kfac, ggn_mp or hess_mp."
        )
    return got.block().to(got.param.dtype)
