"""Quantities of each sample's own gradient. N samples · p the parameter's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hookjac import given
from hookjac.factor import Dense, Factor, add_gram, root
from hookjac.graph import saved
from hookjac.quantity.record import Adds, Quantity, Received, chosen

Samples = Sequence[int] | Tensor | None


def GradSample(*, loss_reduction: Literal["sum", "mean"] = "sum", subsample: Samples = None) -> Quantity:
    """`p.grad_sample` [N, *p]: the gradient of the n-th summand of the loss, exact to rounding.

    It refers to the loss as it was reduced: `p.grad_sample.sum(0) == p.grad`. `loss_reduction="mean"` multiplies by
    N, the scale that Opacus expects under a mean loss. A part of the loss that passes through no sample (an L2
    penalty) is shared equally by the N samples. subsample: indices of the samples wanted, in the batch; the loss is
    that of the whole batch. Units: loss / parameter. Cost: about one backward, and writing N times the parameters.
    """
    given.choice(("sum", "mean"), loss_reduction=loss_reduction)

    def reduce(got: Received) -> Tensor:
        out = own(got.factor)[0] if got.factor is not None else got.zeros(got.M)
        if got.direct is not None:
            out = out + got.direct.head / got.N
        out = out * got.N if loss_reduction == "mean" else out
        return out.to(got.param.dtype).contiguous()  # autocast works in another

    return Quantity(name="grad_sample", columns="loss", reduce=reduce, subsample=chosen(subsample), each="entries",
                    single=True,
                    entries=lambda M, C, P: M * P,
                    instead="grad_sample_norm, grad_sample_gram and grad_var build nothing of that size.")  # fmt: skip


def GradSampleNorm(*, subsample: Samples = None) -> Quantity:
    """`p.grad_sample_norm` [N]: the L2 norm of each sample's gradient for this parameter, exact to rounding.

    Nothing of size N P is built: for a layer with one position a product of two norms, with several the inner
    products of positions, or single samples' gradients in turn, whichever is cheaper (Goodfellow 2015, Rochette et
    al. 2019). For the whole model: the root of the sum of squares over parameters. subsample: as for `GradSample`.
    Units: loss / parameter. Cost: about one backward.
    """

    def reduce(got: Received) -> Tensor:
        factor = got.factor
        if got.direct is None and factor is not None:
            return factor.lengths()[0].to(got.param.dtype)
        return root(squares(got)).to(got.param.dtype)

    return Quantity(
        name="grad_sample_norm", columns="loss", reduce=reduce, subsample=chosen(subsample), each="norm", single=True
    )


def GradSampleGram(*, subsample: Samples = None) -> Quantity:
    """`p.grad_sample_gram` [N, N]: inner products between the samples' gradients for this parameter, exact.

    Sums over parameters are those of the whole model. Nothing of size N P is built for dense layers and tables.
    subsample: as for `GradSample`. Units: (loss / parameter)². Cost: about one backward.
    """

    def reduce(got: Received) -> Tensor:
        out = got.numbers(got.M, 1, got.M, 1)
        if got.factor is not None:
            add_gram(out, got.factor, got.factor)
        out = out[:, 0, :, 0]
        if got.direct is not None:
            with_it, itself = _shared(got)
            out = out + with_it[:, None] + with_it[None, :] + itself
        return out.to(got.param.dtype)

    return Quantity(name="grad_sample_gram", columns="loss", reduce=reduce, subsample=chosen(subsample))


def GradSqSum(*, subsample: Samples = None) -> Quantity:
    """`p.grad_sq_sum` [*p]: the sum over samples of the squared gradients, entry by entry, exact to rounding.

    It refers to the loss as it was reduced: under a mean loss, N² times this is the sum in the natural scale.
    subsample: as for `GradSample`. Units: (loss / parameter)². Cost: about one backward.
    """
    adds = Adds(powers=(2,))
    return Quantity(
        name="grad_sq_sum", columns="loss", reduce=_sq_sum, subsample=chosen(subsample), adds=adds, each="entries"
    )


def GradVar(*, subsample: Samples = None) -> Quantity:
    """`p.grad_var` [*p]: the population variance over samples of N times the gradient (the natural scale).

    N times, so that under a mean loss it is the variance of single losses' gradients. Exact to rounding relative to
    the mean square: where the samples hardly differ, few digits are left. subsample: as for `GradSample`; the variance
    is then over those. Units: (loss / parameter)². Cost: about one backward.
    """

    def measure(got: Received, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        whole = got.sum()
        if got.direct is not None:
            whole = whole + saved(got.direct.head) * got.share
        return whole.to(got.param.dtype), _sq_sum(got, scale)

    def variance(whole: Tensor, squares: Tensor, M: int, N: int) -> Tensor:  # squares: times N² / M
        return torch.addcmul(squares, whole, whole, value=-((N / M) ** 2)).clamp_(min=0)

    def reduce(got: Received) -> Tensor:
        if not got.M:
            return got.zeros() / 0  # of no sample there is none, as PyTorch has it
        return variance(*measure(got, got.N**2 / got.M), got.M, got.N)

    adds = Adds(
        powers=(1, 2),
        measure=measure,
        split=lambda found: (list(found), {}),
        join=lambda note, sums, N: variance(sums[0], sums[1] * N, N, N),
    )

    return Quantity(
        name="grad_var",
        columns="loss",
        reduce=reduce,
        subsample=chosen(subsample),
        adds=adds,
        each="entries",
        whole=True,
    )


def _sq_sum(got: Received, scale: float = 1.0) -> Tensor:
    """scale: what each square weighs."""
    factor = got.factor
    if factor is None:
        out = got.zeros()
    else:
        weight = torch.full((), scale, dtype=factor.tensors[0].dtype, device=got.param.device)
        out = factor.quad(weight.expand(got.M, 1))
    if got.direct is not None and got.M:
        share = got.direct.head / got.N
        out = out + scale * (2 * share * got.sum() + got.M * share.square())
    return out.to(got.param.dtype)


def squares(got: Received) -> Tensor:  # -> [M]
    """Squared norms of the samples' gradients."""
    out = got.numbers(got.M)
    if got.factor is not None:
        out = out + got.factor.norms()[0]
    if got.direct is not None:
        with_it, itself = _shared(got)
        out = out + 2 * with_it + itself
    return out


def _shared(got: Received) -> tuple[Tensor, Tensor]:
    """Inner products of each sample's share of a penalty with its own gradient [M], and with itself."""
    assert got.direct is not None
    share = got.direct.head / got.N
    with_it = share.new_zeros(got.M)
    if got.factor is not None:
        with_it = got.factor.times(share.unsqueeze(0).to(got.factor.tensors[0].dtype))[0, 0]
    return with_it, share.square().sum()


def own(factor: Factor) -> Tensor:
    """The dense contribution in memory of its own: results must not be views of each other or of the graph."""
    t = factor.dense()
    return t.clone(memory_format=torch.contiguous_format) if isinstance(factor, Dense) and not factor.fresh else t
