"""Quantities of the model's output, whatever the loss. N samples · C entries of one sample's output."""

from __future__ import annotations

import torch
from torch import Tensor

from hookjac.quantity.gradient import Samples
from hookjac.quantity.record import Output, Quantity, Received, chosen
from hookjac.structured import JacTensor, zero


def Jac(*, outputs: Samples = None, subsample: Samples = None) -> Quantity:
    """`p.jac` [N, *out, *p]: d output[n] / d p of the model's (selected) output, exact to rounding.

    A `JacTensor`: a tensor kept as its factors, built when it is read. `ext.jacobian` is the same for all parameters
    together. Independent of the loss. outputs: numbers of the entries of one sample's output that are wanted, in
    row-major order; the result is then [N, len(outputs), *p]. subsample: as for `GradSample`. Units: output /
    parameter. Cost: C backwards; when read, writing N C times the parameters.
    """
    rows = chosen(outputs, "outputs")

    def reduce(got: Received) -> JacTensor:
        shape = got.out_shape if rows is None else torch.Size([len(rows)])
        if got.factor is None:
            return zero(got.param, got.M, shape)
        return JacTensor(got.factor, shape, got.param.dtype)

    return Quantity(name="jac", columns=Output(rows), reduce=reduce, subsample=chosen(subsample), single=True)


def NTK(*, outputs: Samples = None, subsample: Samples = None) -> Quantity:
    """`p.ntk` [N, *out, N, *out]: this parameter's part of the (empirical) neural tangent kernel J Jᵀ, exact.

    `ext.ntk` is the sum over parameters. Nothing of size N C P is built for dense layers and tables. outputs,
    subsample: as for `Jac`. Units: (output / parameter)². Cost: C backwards, and N² C² inner products.
    """
    whole = Jac(outputs=outputs, subsample=subsample)

    def reduce(got: Received) -> Tensor:
        found: JacTensor = whole.reduce(got)
        return found.gram()

    return Quantity(name="ntk", columns=whole.columns, reduce=reduce, subsample=whole.subsample)
