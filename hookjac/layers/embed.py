"""Tables that are looked up: their gradients stay the looked-up rows.

V columns · N samples · M rows looked up by all samples together
"""

from __future__ import annotations

import torch
from torch import Tensor

from hookjac.factor import Factor, Lookup
from hookjac.graph import Node, saved, signed
from hookjac.layers.broadcast import operand, result
from hookjac.places import nothing, place
from hookjac.rule import NodeRule, register
from hookjac.samples import Layout


def _sample_of(layout: Layout, size: int, device: torch.device) -> Tensor:
    """Which sample each place along the samples' axis belongs to."""
    return torch.arange(size, device=device) // layout.inner % layout.N


def _counts(row: Tensor, rows: int, keep: Tensor) -> Tensor:
    return torch.zeros(rows, device=row.device, dtype=torch.long).index_add_(0, row, keep.long())


def _embedding_part(node: Node, slot: int, G: Tensor, layout: Layout) -> Factor:  # G [V, *index, d]
    index: Tensor = node._saved_indices
    along = [1] * index.dim()
    along[layout.axis] = -1
    sample = _sample_of(layout, index.shape[layout.axis], index.device).view(along).expand(index.shape)
    row, sample, g = index.reshape(-1), sample.reshape(-1), G.reshape(G.shape[0], -1, G.shape[-1])
    padding = signed(node._saved_padding_idx)
    if padding >= 0:
        keep = row != padding
        row, sample, g = row[keep], sample[keep], g[:, keep]
    return Lookup(g, row, sample, layout.N, operand(node, 0))


def _bag_part(node: Node, slot: int, G: Tensor, layout: Layout) -> Factor:  # G [V, bags, d]
    row, offsets = node._saved_indices, node._saved_offsets
    bags, d = G.shape[1], G.shape[2]
    bag = torch.searchsorted(offsets[:bags].contiguous(), torch.arange(len(row), device=row.device), right=True) - 1
    keep = row != signed(node._saved_padding_idx)
    sample = _sample_of(layout, bags, row.device)
    filled = _counts(bag, bags, keep)
    if node._saved_mode == 2:  # the largest entry of each feature: one entry of the table for each
        place = (node._saved_result3 * d + torch.arange(d, device=row.device)).reshape(-1)
        g = (G * (filled > 0).unsqueeze(1)).reshape(G.shape[0], -1, 1)
        return Lookup(g, place.clamp(min=0), sample.repeat_interleave(d), layout.N, operand(node, 0))
    weight = keep.to(G.dtype)
    if node._saved_per_sample_weights is not None:
        weight = weight * saved(node._saved_per_sample_weights)
    if node._saved_mode == 1:
        weight = weight / filled.clamp(min=1)[bag]
    return Lookup(G[:, bag] * weight.unsqueeze(1), row, sample[bag], layout.N, operand(node, 0))


def _fits(node: Node, slot: int, layout: Layout) -> bool:
    # scaled by frequency, the gradient is no derivative of anything, and a bag's not what PyTorch's documentation says
    # (seen on 2.13): the nodes themselves then have the last word, in second order, too
    return layout.axis < len(result(node)) - 1 and not node._saved_scale_grad_by_freq


register(NodeRule(name="embedding", nodes=("EmbeddingBackward0",), slots=(0,), fits=_fits, part=_embedding_part))
register(NodeRule(name="embedding bag", nodes=("EmbeddingBagBackward0",), slots=(0,), fits=_fits, part=_bag_part))
place("EmbeddingBackward0", into=nothing)
place("EmbeddingBagBackward0", into=lambda n, la, out, s: nothing(n, la, out, s) if not any(s[1:]) else None)
