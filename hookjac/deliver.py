"""Gradients that were computed elsewhere, delivered to `.grad` by autograd itself.

So hooks on parameters are called, gradients accumulate, and whatever waits for a parameter's gradient is told, as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


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
