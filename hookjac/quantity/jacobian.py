"""Quantities of the model's output, whatever the loss. N samples · C entries of one sample's output."""

from __future__ import annotations

from torch import Tensor

from hookjac.quantity.gradient import Samples, own
from hookjac.quantity.record import Output, Quantity, Received, chosen


def Jac(*, outputs: Samples = None, subsample: Samples = None) -> Quantity:
    """`p.jac` [N, *out, *p]: d output[n] / d p of the model's (selected) output, exact to rounding.

    Independent of the loss. outputs: numbers of the entries of one sample's output that are wanted, in row-major order;
    the result is then [N, len(outputs), *p]. Units: output / parameter. Cost: C backwards, and writing N C times the
    parameters.
    """
    rows = chosen(outputs)

    def reduce(got: Received) -> Tensor:
        shape = got.out_shape if rows is None else (len(rows),)
        if got.factor is None:
            return got.zeros(got.M, *shape)
        t = own(got.factor).transpose(0, 1)
        return t.reshape(got.M, *shape, *got.param.shape).to(got.param.dtype).contiguous()

    return Quantity(name="jac", columns=Output(rows), reduce=reduce, subsample=chosen(subsample))
