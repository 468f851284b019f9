"""Gradients that were computed elsewhere, delivered to `.grad` by autograd itself.

So hooks on parameters are called, gradients accumulate, and whatever waits for a parameter's gradient is told, as ever.
Where per-sample results are made anyway, their sum may cost less than what autograd would do: `slower` weighs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hookjac import gemm
from hookjac.factor.metric import CHUNK


class _Deliver(torch.autograd.Function):
    """Of no value; its backward hands out what it was given."""

    @staticmethod
    def forward(ctx: Any, box: list[list[Tensor | None]], *params: nn.Parameter) -> Tensor:
        ctx.box = box
        return params[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        # nobody else may hold them: then autograd takes them over as they are, without a copy
        return (None, *ctx.box.pop())


def deliver(params: Sequence[nn.Parameter], gradients: list[Tensor | None]) -> None:
    """`gradients` is emptied."""
    box = [gradients[:]]
    gradients.clear()
    with torch.enable_grad():
        # what Function.apply does once it has seen that no functorch transform is at work
        torch.autograd.backward(super(torch.autograd.Function, _Deliver).apply(box, *params))


class Cost(NamedTuple):
    """Of the gradient of one parameter: FLOPs, the most positions of a sample that share it, and whether a rule copies
    the layer's input before it can begin."""

    flops: float
    positions: int
    copies: bool


# In a microsecond: FLOPs of products by autograd, by the faster library, by convolutions; entries summed. Less than
# benchmarks/test_overhead.py finds: this is in the midst of a step
_PRODUCT, _FASTER, _CONVOLVED, _ADDED = 1.9e5, 3e5, 3.5e5, 7e3
_DELIVERY, _FOR_EACH = 60.0, 4.0  # microseconds that delivering takes, and for each parameter
_LARGE = 1e9


def slower(
    costs: Sequence[Cost], params: Sequence[nn.Parameter], N: int, *, each: bool, whole: bool
) -> list[int] | None:
    """The parameters for which our sum would take longer than autograd's gradient; None: all in all, it would.

    each: what each sample contributes is at hand, if small enough; whole: the sum itself is.
    """
    found, gain = [], -_DELIVERY - _FOR_EACH * len(params)
    fast = gemm.faster(_LARGE, params[0].detach())
    for k, (p, cost) in enumerate(zip(params, costs, strict=True)):
        theirs = cost.flops / (_CONVOLVED if cost.copies else _PRODUCT)
        entries = N * p.numel()
        ours = cost.flops / (_FASTER if fast else _PRODUCT)
        if whole:
            ours = 0.0
        elif each and cost.positions > 1 and entries <= CHUNK:
            ours = entries / _ADDED
        elif cost.copies:
            ours = theirs + 1
        if ours <= theirs:
            gain += theirs - ours
        else:
            found.append(k)
    return found if gain > 0 else None
