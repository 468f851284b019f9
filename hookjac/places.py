"""Where the samples lie, told by the structure of the graph alone.

Most graphs need no probing: what each kind of node does to the axis that holds the samples follows from shapes and
from numbers that the node saved, whatever the values are. A `Placing` says so for one kind of node. Where one is
missing, or says that it cannot tell, `samples.find` looks at values instead.

N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from hookjac.graph import Node, signed
from hookjac.samples import Layout

Shapes = Sequence[torch.Size | None]
Placed = Sequence[Layout | None] | None


@dataclass(frozen=True, kw_only=True)
class Placing:
    """Where the samples lie in what goes into one kind of autograd node.

    nodes: the type names of the nodes.
    into: `(node, layout, out, shapes)`: from the layout and the shape of what comes out, and the shapes of what goes in
        (an entry for each of `next_functions`), to the layout of each; None where all samples share it, so that its
        gradient is a sum over them. None instead of a list: the structure does not tell.
    product: what is shared is multiplied with more than one sample's rows, unless their values say otherwise (the
        blocks of a graph's adjacency matrix).
    """

    nodes: tuple[str, ...]
    into: Callable[[Node, Layout, torch.Size, Shapes], Placed]
    product: bool = False


_PLACINGS: dict[str, Placing] = {}


def place(*nodes: str, into: Callable[[Node, Layout, torch.Size, Shapes], Placed], product: bool = False) -> None:
    for name in nodes:
        if name in _PLACINGS:
            raise ValueError(f"{name} has a placing already")
        _PLACINGS[name] = Placing(nodes=nodes, into=into, product=product)


def placing(node: Node) -> Placing | None:
    return _PLACINGS.get(type(node).__name__)


# What kinds of nodes have in common -------------------------------------------------------------------------------


def same(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    """Entry by entry, with broadcasting."""
    return [None if s is None else stretched(layout, out, s) for s in shapes]


def stretched(layout: Layout, out: torch.Size, shape: torch.Size) -> Layout | None:
    """Of an operand that was broadcast to `out`."""
    axis = layout.axis - (len(out) - len(shape))
    return replace(layout, axis=axis) if axis >= 0 and shape[axis] == out[layout.axis] else None


def reshaped(layout: Layout, out: torch.Size, shape: torch.Size) -> Layout | None:
    """Of a tensor whose entries, in order, are those of `out`: each sample's come in runs of one length."""
    run = layout.inner * out[layout.axis + 1 :].numel()
    size = 1
    for axis in reversed(range(len(shape))):
        if run % size == 0 and size * shape[axis] % (run * layout.N) == 0:
            return Layout(layout.N, axis, size * shape[axis] // (run * layout.N), run // size)
        size *= shape[axis]
    return None


def view(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    found = reshaped(layout, out, shapes[0]) if shapes[0] is not None else None
    return None if found is None else [found]


def dims_of(node: Node, name: str, dim: int) -> list[int]:
    """Axes that a node saved, counted from the front of `dim` of them; all where it saved none."""
    given = getattr(node, name)
    given = [given] if isinstance(given, int) else list(given or range(dim))
    return [signed(d) % max(dim, 1) for d in given]


def kept(name: str = "_saved_dim") -> Callable[[Node, Layout, torch.Size, Shapes], Placed]:
    """Along other axes, of which every one remains: softmax, cumsum, cat, glu."""

    def into(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
        if layout.axis in dims_of(node, name, len(out)):
            return None
        return [None if s is None else layout for s in shapes]

    return into


def reduced(name: str = "_saved_dim") -> Callable[[Node, Layout, torch.Size, Shapes], Placed]:
    """Over other axes: sum, mean, max."""

    def into(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
        if shapes[0] is None:
            return None
        gone = dims_of(node, name, len(shapes[0]))
        if getattr(node, "_saved_keepdim", False):
            return None if layout.axis in gone else [layout]
        left = [d for d in range(len(shapes[0])) if d not in gone]
        return [replace(layout, axis=left[layout.axis])]

    return into


def leading(axes: int) -> Callable[[Node, Layout, torch.Size, Shapes], Placed]:
    """What happens, happens behind the first axes."""

    def into(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
        fits = layout.axis < axes and all(s is None or s[layout.axis] == out[layout.axis] for s in shapes)
        return [None if s is None else layout for s in shapes] if fits else None

    return into


def rows_of_first(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    """The first input has the samples where the output has them, on axis 0; all else is shared."""
    if layout.axis != 0:
        return None
    return [layout if k == 0 and s is not None else None for k, s in enumerate(shapes)]


def nothing(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    """No input holds samples: a table that is looked up."""
    return [None] * len(shapes)
