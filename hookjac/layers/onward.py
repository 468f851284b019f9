"""The way of columns through nodes that need nothing but a line: views, arithmetic, activations, pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from hookjac.graph import Node, signed
from hookjac.memory import above_zero, fresh, room, scaled_by
from hookjac.ways import join, way

# The same entries --------------------------------------------------------------------------------------------------


def _reshape(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    return G.reshape(len(G), *shape)


def _swap(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    a, b = (signed(d) % len(shape) + 1 for d in (node._saved_dim0, node._saved_dim1))
    return G.transpose(a, b)


def _permute(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    dims = [signed(d) % len(shape) for d in node._saved_dims]
    back = [dims.index(d) + 1 for d in range(len(dims))]
    return G.permute(0, *back)


def _as_it_is(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    return G


_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze")
way(*(f"{name}Backward0" for name in _VIEWS), "SqueezeBackward1", "SqueezeBackward2", into={0: _reshape})
way("TransposeBackward0", into={0: _swap})
way("PermuteBackward0", into={0: _permute})
way("TBackward0", into={0: lambda node, G, shape: G.mT if len(shape) == 2 else G})
way("CloneBackward0", "AliasBackward0", "ExpandBackward0", into={0: _as_it_is})  # what was stretched is summed by `fit`


def _slice(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    axis = signed(node._saved_dim) % len(shape)
    start = slice(signed(node._saved_start), None).indices(shape[axis])[0]
    out = G.new_zeros(len(G), *shape)
    out.narrow(axis + 1, start, shape[axis] - start)[
        (slice(None),) * (axis + 1) + (slice(None, None, node._saved_step),)
    ].narrow(axis + 1, 0, G.shape[axis + 1]).copy_(G)
    return out


def _select(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    out = G.new_zeros(len(G), *shape)
    out.select(signed(node._saved_dim) % len(shape) + 1, signed(node._saved_index)).copy_(G)
    return out


way("SliceBackward0", into={0: _slice})
way("SelectBackward0", into={0: _select})

# Put together again ------------------------------------------------------------------------------------------------


def _side_by_side(columns: Mapping[int, Tensor], shape: torch.Size, axis: int, starts: Sequence[int]) -> Tensor:
    """Output k is what begins at starts[k] of the axis; where nothing arrived, it is zero."""
    like = next(iter(columns.values()))
    out = fresh((len(like), *shape), like)
    if len(columns) < len(starts):
        out.zero_()
    for k, G in columns.items():
        out.narrow(axis + 1, starts[k], G.shape[axis + 1]).copy_(G)
    return out


def _unbound(node: Node, columns: Mapping[int, Tensor], shape: torch.Size) -> Tensor:
    axis = signed(node._saved_dim) % len(shape)
    return _side_by_side({k: G.unsqueeze(axis + 1) for k, G in columns.items()}, shape, axis, range(shape[axis]))


def _split(node: Node, columns: Mapping[int, Tensor], shape: torch.Size) -> Tensor:
    axis = signed(node._saved_dim) % len(shape)
    return _side_by_side(columns, shape, axis, range(0, max(1, shape[axis]), max(1, node._saved_split_size)))


def _split_by_sizes(node: Node, columns: Mapping[int, Tensor], shape: torch.Size) -> Tensor:
    axis = signed(node._saved_dim) % len(shape)
    return _side_by_side(columns, shape, axis, [0, *accumulate(node._saved_split_sizes)][:-1])


join("UnbindBackward0", by=_unbound)
join("SplitBackward0", by=_split)
join("SplitWithSizesBackward0", by=_split_by_sizes)


# Sums --------------------------------------------------------------------------------------------------------------


def _summed_axes(node: Node, shape: torch.Size) -> list[int]:
    return [signed(d) % max(len(shape), 1) for d in node._saved_dim or range(len(shape))]


def _spread(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    """Back over the axes that were summed, as a view."""
    if not node._saved_keepdim:
        for axis in sorted(_summed_axes(node, shape)):
            G = G.unsqueeze(axis + 1)
    return G.expand(len(G), *shape)


def _mean(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    count = torch.Size([shape[axis] for axis in _summed_axes(node, shape)]).numel()
    return _spread(node, G / max(1, count), shape)


way("SumBackward1", into={0: _spread})
way("MeanBackward1", into={0: _mean})

# Arithmetic --------------------------------------------------------------------------------------------------------


def _times(G: Tensor, number: float) -> Tensor:
    return G if number == 1 else G * number


way("AddBackward0", into={0: _as_it_is, 1: lambda node, G, shape: _times(G, node._saved_alpha)})
way("SubBackward0", into={0: _as_it_is, 1: lambda node, G, shape: _times(G, -node._saved_alpha)})
way("NegBackward0", into={0: lambda node, G, shape: -G})
way("MulBackward0", into={0: lambda node, G, shape: scaled_by(G, node._saved_other),
                          1: lambda node, G, shape: scaled_by(G, node._saved_self)})  # fmt: skip
way("DivBackward0", into={0: lambda node, G, shape: G / node._saved_other})

# Activations -------------------------------------------------------------------------------------------------------

way("ReluBackward0", into={0: lambda node, G, shape: above_zero(G, node._saved_result)})
way("TanhBackward0", into={0: lambda node, G, shape: scaled_by(G, 1 - node._saved_result.square())})
way("SigmoidBackward0", into={0: lambda node, G, shape: scaled_by(G, (1 - node._saved_result) * node._saved_result)})


def _softmax(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    s, dim = node._saved_result, signed(node._saved_dim) % max(1, len(shape)) + 1
    weighed = scaled_by(G, s)
    return weighed.sub_(weighed.sum(dim, keepdim=True) * s)


way("SoftmaxBackward0", into={0: _softmax})


def _gelu(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    """The slope by PyTorch's own kernel, once for all columns."""
    x = node._saved_self
    return scaled_by(G, torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=node._saved_approximate))


def _silu(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    x = node._saved_self
    return scaled_by(G, torch.ops.aten.silu_backward(torch.ones_like(x), x))


way("GeluBackward0", into={0: _gelu})
way("SiluBackward0", into={0: _silu})

# Pooling -----------------------------------------------------------------------------------------------------------


def _chosen(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
    """Each entry goes to where the largest was found: [V, rows, C, *space]."""
    where = node._saved_result1
    space = len(node._saved_kernel_size)
    stride = node._saved_stride or node._saved_kernel_size
    into = room((len(G), *shape), G)
    out = (G.new_empty(len(G), *shape) if into is None else into).zero_().flatten(-space)
    index = where.flatten(-space).expand(len(G), *[-1] * (where.dim() - space + 1))
    reach = [d * (k - 1) + 1 for d, k in zip(node._saved_dilation, node._saved_kernel_size, strict=True)]
    if all(s >= r for s, r in zip(stride, reach, strict=True)):  # no two windows share an entry
        out.scatter_(-1, index, G.flatten(-space))
    else:
        out.scatter_add_(-1, index, G.flatten(-space))
    return out.view(len(G), *shape)


way("MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0", into={0: _chosen})
