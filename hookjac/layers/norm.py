"""Normalisations: what their scale and shift receive. Their curvature is the node's own.

LayerNorm, GroupNorm, and BatchNorm with running statistics. InstanceNorm is the same node as BatchNorm with the
samples among its channels and its scale repeated for each; RMSNorm is a product (`broadcast`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hookjac.factor import Dense, Factor
from hookjac.graph import Node, saved
from hookjac.layers.broadcast import result
from hookjac.memory import fresh, scaled_by
from hookjac.places import Placed, Shapes, place, rows_of_first
from hookjac.rule import NodeRule, register
from hookjac.samples import Layout
from hookjac.ways import way


def _normal(x: Tensor, mean: Tensor, rstd: Tensor, axes: list[int]) -> Tensor:
    """(x - mean) rstd. A node may keep mean and rstd as numbers: where a graph is wanted they must get theirs back."""
    if torch.is_grad_enabled() and x.requires_grad and not mean.requires_grad:
        own = x.mean(axes, keepdim=True)
        variance = (x - own).square().mean(axes, keepdim=True)
        mean = mean + (own - own.detach())
        rstd = (rstd.pow(-2) + (variance - variance.detach())).rsqrt()
    return saved((x - mean) * rstd)


def _layer_part(node: Node, slot: int, G: Tensor, layout: Layout) -> Factor:
    if slot == 1:
        x = node._saved_input
        axes = list(range(x.dim() - len(node._saved_normalized_shape), x.dim()))
        G = G * _normal(x, node._saved_result1, node._saved_result2, axes)
    rows = layout.split(G)
    positions = list(range(2, rows.dim() - len(node._saved_normalized_shape)))
    return Dense(rows.sum(positions) if positions else rows, fresh=bool(positions) or slot == 1)


def _layer_fits(node: Node, slot: int, layout: Layout) -> bool:
    return layout.axis < len(result(node)) - len(node._saved_normalized_shape)


def _channel_part(normal: Tensor | None, G: Tensor, layout: Layout) -> Factor:
    """G [V, rows, C, *space], summed over all but samples and channels."""
    G = G if normal is None else scaled_by(G, saved(normal))
    G = G.flatten(3).sum(3) if G.dim() > 3 else G
    found = layout.split(G)  # [V, N, (L), C]
    return Dense(found if found.dim() == 3 else found.sum(2))


def _group_part(node: Node, slot: int, G: Tensor, layout: Layout) -> Factor:
    if slot == 2:
        return _channel_part(None, G, layout)
    x = node._saved_input
    grouped = x.reshape(x.shape[0], node._saved_group, -1)
    normal = _normal(grouped, node._saved_result1.unsqueeze(2), node._saved_result2.unsqueeze(2), [2])
    return _channel_part(normal.reshape(x.shape), G, layout)


def _batch_part(node: Node, slot: int, G: Tensor, layout: Layout) -> Factor:
    if slot == 2:
        return _channel_part(None, G, layout)
    x = node._saved_input
    along = (-1, *[1] * (x.dim() - 2))
    scale = torch.rsqrt(node._saved_running_var + node._saved_eps)
    return _channel_part((x - node._saved_running_mean.view(along)) * scale.view(along), G, layout)


def _rows_are_samples(node: Node, slot: int, layout: Layout) -> bool:
    return layout.axis == 0


def _running(node: Node, slot: int, layout: Layout) -> bool:
    return layout.axis == 0 and not node._saved_training


_LAYER, _GROUP, _BATCH = "NativeLayerNormBackward0", "NativeGroupNormBackward0", "NativeBatchNormBackward0"
register(NodeRule(name="layer norm", nodes=(_LAYER,), slots=(1, 2), fits=_layer_fits, part=_layer_part))
register(NodeRule(name="group norm", nodes=(_GROUP,), slots=(1, 2), fits=_rows_are_samples, part=_group_part))
register(NodeRule(name="batch norm", nodes=(_BATCH,), slots=(1, 2), fits=_running, part=_batch_part))


def _behind_positions(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    return [layout, None, None] if _layer_fits(node, 1, layout) else None


_TOGETHER = 1 << 17  # entries of a call; of more, the result is memory fresh from the system (benchmarks/test_norm.py)


def _few_by_few(G: Tensor, back: Callable[..., Tensor], kept: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """PyTorch's kernel on a few columns at a time, as if they were more samples, without what scale and shift get.

    kept: what it has of each sample, beside the columns.
    """
    V, N = G.shape[:2]
    step = max(1, min(V, _TOGETHER * V // max(1, G.numel())))
    if step > 1:
        kept = tuple(fresh((step * N, *t.shape[1:]), t).view(step, *t.shape).copy_(t).flatten(0, 1) for t in kept)
    for v in range(0, V, step):
        g, into = G[v : v + step], out[v : v + step]
        rows = len(g) * N
        g = g.reshape(rows, *g.shape[2:]).contiguous()  # the kernel of group norms takes other strides for these
        into.copy_(back(g, *(t[:rows] for t in kept)).view(into.shape))
    return out


def _layer_way(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    kernel, its, weight = torch.ops.aten.native_layer_norm_backward, node._saved_normalized_shape, node._saved_weight

    def back(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        found: Tensor = kernel(g, x, its, mean, rstd, weight, None, [True, False, False])[0]
        return found

    rows = shape[: len(shape) - len(its)].numel()
    kept = (
        node._saved_input.reshape(rows, *its),
        node._saved_result1.reshape(rows, 1),
        node._saved_result2.reshape(rows, 1),
    )
    found = _few_by_few(G.reshape(len(G), rows, *its), back, kept, fresh((len(G), rows, *its), G))
    return found.view(len(G), *shape)


def _group_way(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    kernel, weight = torch.ops.aten.native_group_norm_backward, node._saved_weight
    sizes = (node._saved_C, node._saved_HxW, node._saved_group)

    def back(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        found: Tensor = kernel(g, x, mean, rstd, weight, len(g), *sizes, [True, False, False])[0]
        return found

    kept = (node._saved_input.contiguous(), node._saved_result1, node._saved_result2)
    # the samples first in memory: so a convolution above it will want them, for its products with patches
    return _few_by_few(G, back, kept, fresh((shape[0], len(G), *shape[1:]), G).transpose(0, 1))


way(_LAYER, into={0: _layer_way})
way(_GROUP, into={0: _group_way})
place(_LAYER, into=_behind_positions)
place(_GROUP, into=rows_of_first)


def _in_batch_norm(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    if layout.axis == 1:  # each channel by itself: so PyTorch writes an instance norm
        return [None if s is None else layout if k == 0 else replace(layout, axis=0) for k, s in enumerate(shapes)]
    return None if node._saved_training else rows_of_first(node, layout, out, shapes)


place(_BATCH, into=_in_batch_norm)
