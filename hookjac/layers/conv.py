"""Convolutions of any dimension, stride, dilation, padding and number of groups, and their transposes.

A convolution multiplies its weight with patches of its input, so a weight's gradient is an outer product summed
over positions; a transposed one multiplies its input with patches of what it writes to. Paddings other than
zeros are nodes of their own before this one.

V columns · N samples · B groups · L positions · k kernel
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookjac.factor import Dense, Factor, Outer, Unfolded, patches
from hookjac.graph import Edge, Node, saved
from hookjac.layers.broadcast import operand
from hookjac.memory import fresh
from hookjac.places import place, rows_of_first
from hookjac.rule import NodeRule, register
from hookjac.samples import Layout
from hookjac.ways import way


def _grouped(t: Tensor, groups: int) -> Tensor:  # [M, C, *space] -> [M, B, L, C/B]
    return t.reshape(t.shape[0], groups, t.shape[1] // groups, -1).transpose(2, 3)


def _apart(t: Tensor, V: int, layout: Layout) -> Tensor:  # [V rows, B, L, d] -> [V, N, B, L, d]
    t = layout.split(t.reshape(V, -1, *t.shape[1:]))
    return t if t.dim() == 5 else t.transpose(2, 3).flatten(3, 4)  # several images a sample: more positions


def _part(node: Node, slot: int, G: Tensor, layout: Layout) -> Factor:  # G [V, rows, O, *space]
    V = G.shape[0]
    if slot == 2:
        t = layout.split(G.flatten(3).sum(3))  # [V, N, (L), O]
        return Dense(t if t.dim() == 3 else t.sum(2), fresh=True)
    x, weight, groups = saved(node._saved_input), operand(node, 1), node._saved_groups
    slide = node._saved_stride, node._saved_padding, node._saved_dilation
    if not node._saved_transposed and layout.plain:  # [V, N, B, L, o], a view
        g = G.reshape(*G.shape[:2], groups, weight[0] // groups, -1).transpose(3, 4)
        return Outer(g, Unfolded(x, groups, tuple(G.shape[3:]), tuple(weight[2:]), *slide), weight)
    G = G.reshape(-1, *G.shape[2:])
    if node._saved_transposed:
        g, a = patches(G, groups, x.shape[2:], weight[2:], *slide), _grouped(x, groups)
    else:
        g, a = _grouped(G, groups), patches(x, groups, G.shape[2:], weight[2:], *slide)
    return Outer(_apart(g, V, layout), _apart(a, 1, layout)[0], weight, swapped=node._saved_transposed)


_CACHED = 1 << 20  # entries of columns that one call takes: more of them would not stay in the cache


def _pull(node: Node, G: Tensor, shape: torch.Size) -> Tensor:  # [V, rows, O, *space] -> [V, *in]
    """What autograd's node does, without the weight's gradient."""
    stride = node._saved_stride
    one_entry = set(node._saved_weight.shape[2:]) == {1} and not any(node._saved_padding)
    if not one_entry or node._saved_transposed or set(stride) == {1}:
        return _pull_by(stride, node, G, shape)
    # a kernel of one entry skips what lies between its strides; PyTorch is slow at that (benchmarks/test_conv.py)
    found = _pull_by([1] * len(stride), node, G, torch.Size((*shape[:2], *G.shape[3:])))
    out = fresh((len(G), *shape), G).zero_()
    hit: Any = (..., *(slice(None, None, s) for s in stride))
    out[hit] = found
    return out


def _pull_by(stride: Sequence[int], node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    """By PyTorch's kernel, in pieces that stay in the cache. shape: of the input, as this stride has it."""
    weight, mask = node._saved_weight, [True, False, False]

    def back(g: Tensor) -> Tensor:
        x = G.new_empty(len(g), *shape[1:])  # only its shape matters
        return torch.ops.aten.convolution_backward(
            g, x, weight, None, stride, node._saved_padding, node._saved_dilation, node._saved_transposed,
            node._saved_output_padding, node._saved_groups, mask,
        )[0]  # fmt: skip

    if len(G) * max(G[0].numel(), shape.numel()) > _CACHED and not G.is_cuda:
        out = fresh((len(G), *shape), G)
        turned = G.stride(0) < G.stride(1)  # the samples come first in memory: some samples of all columns, then
        G, into = (G.transpose(0, 1), out.transpose(0, 1)) if turned else (G, out)
        step = max(1, _CACHED // max(1, G[0].numel(), into[0].numel()))
        for some, part in zip(G.split(step), into.split(step), strict=True):
            part.copy_(back(some.reshape(-1, *G.shape[2:])).view(part.shape))
        return out
    return back(G.reshape(-1, *G.shape[2:])).view(len(G), *shape)


def _channels_as_samples(node: Node, layout: Layout) -> str | None:
    if layout.axis != 1 or layout.N == 1:
        return None
    weight = node.next_functions[1][0]
    # the samples' own kernels, as groups of one convolution, are no parameters of the model
    if node._saved_groups > 1 and (weight is None or Edge(weight, 0).leaf is None):
        return None
    return f"the {layout.N} output channels of a convolution would be the samples (was it given one image, unbatched?)"


register(
    NodeRule(
        name="convolution",
        nodes=("ConvolutionBackward0",),
        slots=(1, 2),
        fits=lambda node, slot, layout: layout.axis == 0,
        part=_part,
        refuses=_channels_as_samples,
        copies=True,
    )
)
place("ConvolutionBackward0", into=rows_of_first)
way("ConvolutionBackward0", into={0: _pull})
