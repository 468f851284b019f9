"""Arithmetic with an operand that all samples share: what it gets is summed over the axes it was stretched along.

A learned scale, a bias added by hand, a class token expanded over the batch, RMSNorm's weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hookjac.factor import Dense, Factor
from hookjac.graph import Edge, Node, meta, saved
from hookjac.places import Placed, Shapes, place, same
from hookjac.rule import NodeRule, register
from hookjac.samples import Layout


def operand(node: Node, slot: int) -> torch.Size:
    """The shape of one input of a node."""
    below, nr = node.next_functions[slot]
    return torch.Size(below._input_metadata[nr].shape)


def result(node: Node) -> torch.Size:
    return meta(Edge(node, 0))[0]


def stretched(node: Node, slot: int, layout: Layout) -> bool:
    """Was this operand broadcast along the samples' axis?"""
    return layout.N == 1 or _aligned(operand(node, slot), len(result(node)))[layout.axis] == 1


def _aligned(shape: torch.Size, dim: int) -> list[int]:
    return [1] * (dim - len(shape)) + [*shape]


def summed(G: Tensor, shape: torch.Size, layout: Layout) -> Dense:  # [V, *out] -> [V, N, *shape]
    """Columns of a result, summed sample by sample to the shape of an operand."""
    own = _aligned(shape, G.dim() - 1)
    rows = layout.split(G)  # [V, N, *rest]
    if not layout.merged:
        del own[layout.axis]
    axes = [k + 2 for k, d in enumerate(own) if d == 1 and rows.shape[k + 2] != 1]
    rows = rows.sum(axes, keepdim=True) if axes else rows
    return Dense(rows.reshape(*rows.shape[:2], *shape))


def arithmetic(name: str, *nodes: str, slopes: dict[int, Callable[[Node], Tensor | float]]) -> NodeRule:
    """Nodes whose result depends on operand k by a slope, entry by entry."""

    def part(node: Node, slot: int, G: Tensor, layout: Layout) -> Factor:
        slope = slopes[slot](node)
        if isinstance(slope, Tensor) or slope != 1:
            G = G * slope
        return summed(G, operand(node, slot), layout)

    constant = {} if name in ("product", "quotient", "prelu") else dict.fromkeys(slopes)
    return NodeRule(name=name, nodes=nodes, slots=tuple(slopes), fits=stretched, part=part, mixed=constant)


def _other(node: Node) -> Tensor:
    return saved(node._saved_other)


def _self(node: Node) -> Tensor:
    return saved(node._saved_self)


register(arithmetic("sum", "AddBackward0", slopes={0: lambda n: 1.0, 1: lambda n: n._saved_alpha}))
register(arithmetic("difference", "SubBackward0", slopes={0: lambda n: 1.0, 1: lambda n: -n._saved_alpha}))
register(arithmetic("product", "MulBackward0", slopes={0: _other, 1: _self}))
register(arithmetic("quotient", "DivBackward0", slopes={0: lambda n: 1 / _other(n)}))
register(arithmetic("expand", "ExpandBackward0", slopes={0: lambda n: 1.0}))
register(arithmetic("prelu", "PreluKernelBackward0", slopes={1: lambda n: _self(n).clamp(max=0)}))


# Repeat lays copies side by side: an axis of r copies of s is [r, s] ---------------------------------------------


def _copies_are_samples(node: Node, slot: int, layout: Layout) -> bool:
    size = _aligned(operand(node, slot), len(result(node)))[layout.axis]
    return size > 0 and layout.inner % size == 0


def _repeat_part(node: Node, slot: int, G: Tensor, layout: Layout) -> Factor:
    shape = operand(node, slot)
    own = _aligned(shape, G.dim() - 1)
    rows = layout.split(G)
    V, N = rows.shape[:2]
    if not layout.merged:
        rows = rows.unsqueeze(layout.axis + 2)  # the samples' axis, now of size one
    parts = [size for d, k in zip(own, rows.shape[2:], strict=True) for size in (k // max(d, 1), d)]
    rows = rows.reshape(V, N, *parts).sum([2 + 2 * k for k in range(len(own))])
    return Dense(rows.reshape(V, N, *shape), fresh=True)


register(NodeRule(name="repeat", nodes=("RepeatBackward0",), slots=(0,), fits=_copies_are_samples, part=_repeat_part))


def _repeat_place(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    if _copies_are_samples(node, 0, layout):
        return [None]
    return (
        same(node, layout, out, shapes)
        if _aligned(operand(node, 0), len(out))[layout.axis] == out[layout.axis]
        else None
    )


place("RepeatBackward0", into=_repeat_place)
