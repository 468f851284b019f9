"""The way down the graph: which stations there are, in which order, and columns walking from one to the next.

A *station* is either a layer that a rule explains (key: the edge of its output; the walk goes straight to the
layer's input) or one autograd node (key: the node). Leaves are the nodes that fill `.grad`.

V columns; `[V, *t]` are V cotangents of a tensor of shape t.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hookjac.called import Trail
from hookjac.checkpoints import Recomputed, is_reentrant, reopen
from hookjac.graph import Edge, Node, attributes, children, differentiable_once, edge_of, meta, ordered, pull
from hookjac.mended import mend
from hookjac.rule import Call
from hookjac.samples import tolerance
from hookjac.tape import Mark, Tape

Key = Any  # Edge of a layer's output, or an autograd node


@dataclass(eq=False)
class Group:
    """Columns that belong together: `size` of them, weighed by `metric` ([N, V] or [N, V, V]; None: not curvature).

    noise: how much of the metric may be rounding.
    """

    name: str
    size: int
    metric: Tensor | None = None
    noise: Callable[[], float] = lambda: 0.0
    alone: bool = False  # never batched with others: same shapes, same kernels, same rounding
    owner: int | None = None  # the id of the one parameter that they are for; None: for all


Columns = dict[Group, Tensor]  # of one tensor


class Route:
    """All stations between a loss and the tracked leaves, consumers before producers."""

    def __init__(
        self, tape: Tape, starts: Iterable[Edge], recomputed: Recomputed, rejected: Collection[Edge] = ()
    ) -> None:
        self.tape = tape
        self._recomputed = recomputed
        self.rejected = set(rejected)
        self._alias: dict[Edge, Edge] = {}
        self._outer: dict[Edge, Edge] = {}  # an output within a checkpoint -> the checkpoint's
        self._held: list[Any] = []
        self.calls: dict[Key, Call] = {}
        self.outs: dict[Key, list[Edge]] = {}
        self.after: dict[Key, list[Edge | None]] = {}
        self._keys: dict[Edge, Key] = {}
        self._with_data: dict[Key, bool] = {}
        self.trails: list[Trail] = []  # of the calls that it was made in
        self.starts = [self.resolve(edge) for edge in starts]
        self.order: list[Key] = ordered(
            [self.key(edge) for edge in self.starts],
            lambda key: [self.key(edge) for edge in self._explore(key) if edge is not None],
        )
        recomputed.meet(key for key in self.order if key not in self.calls)

    @property
    def recomputes(self) -> bool:
        """Did a checkpoint throw away what some nodes saved?"""
        return self._recomputed.any

    def constants(self, key: Key) -> list[Tensor]:
        """Tensors without a gradient that enter at a station: data, masks, indices."""
        call = self.calls.get(key)
        if call is not None:
            return [call.x] if call.source is None else []
        found: list[Tensor] = []
        for name in attributes(key, "_saved_"):
            try:
                saved = getattr(key, name)
            except RuntimeError:  # freed, or modified in place since: the user's backward will say so
                continue
            found += [t for t in (saved if isinstance(saved, (list, tuple)) else [saved]) if isinstance(t, Tensor)]
        found += getattr(key, "saved_tensors", ())
        return [t for t in found if t.dim() and not t.requires_grad]

    def with_data(self, key: Key) -> bool:
        """May data enter at this station or below? What the others make is made of parameters alone."""
        if key not in self._with_data:
            below = ordered([key], lambda k: [self.key(e) for e in self.after[k] if e is not None])
            for k in reversed(below):
                leaf = self.leaf(k)
                own = not isinstance(leaf, torch.nn.Parameter)
                if leaf is None:
                    own = None in self.after[k] or bool(self.constants(k))
                self._with_data[k] = own or any(self._with_data[self.key(e)] for e in self.after[k] if e is not None)
        return self._with_data[key]

    @functools.cached_property
    def rounding(self) -> float:
        """How far two roundings of one number may be apart after a walk through the coarsest tensor on the way."""
        found = [meta(e)[1] for outs in self.outs.values() for e in outs]
        return max((tolerance(d) for d in set(found) if d.is_floating_point), default=0.0)

    def mark(self, edge: Edge) -> Mark | None:
        return self.tape.mark(edge)

    def raw(self, key: Node, edges: Iterable[Edge]) -> list[Edge]:
        """The edges below a node as autograd has them, for those that the walk goes by."""
        own = dict(zip(self.after[key], children(key), strict=True))
        return [found for e in edges if (found := own[e]) is not None]

    def real(self, edge: Edge) -> Edge:
        """The edge of the user's graph that an output of an opened checkpoint stands for."""
        return self._outer.get(edge, edge)

    @functools.cached_property
    def reopened(self) -> set[Key]:
        """Stations in or below a checkpoint that was opened: a second backward of the user's graph gives zero there."""
        found: set[Key] = set()
        for key in self.order:
            if key in found or any(e in self._outer for e in self.outs[key]):
                found.add(key)
                found.update(self.key(e) for e in self.after[key] if e is not None)
        return found

    def key(self, edge: Edge) -> Key:
        """The station that a resolved edge arrives at."""
        key = self._keys.get(edge)
        if key is None:
            key = self._keys[edge] = self._find(edge)
        return key

    def _find(self, edge: Edge) -> Key:
        mark = self.tape.mark(edge)
        note = mark.note if mark is not None else None
        if mark is not None and mark.trail is not None:
            self.trails.append(mark.trail)
        key: Key = edge.node
        if note is not None and note.intact and edge not in self.rejected:
            key = edge
            self.calls[key] = note.call(edge)
        self.outs.setdefault(key, []).append(edge)
        return key

    def _explore(self, key: Key) -> list[Edge | None]:
        if key not in self.after:
            call = self.calls.get(key)
            if call is None:
                mend(key)
            found: list[Edge | None] = children(key) if call is None else [call.source]
            self.after[key] = [None if edge is None else self.resolve(edge) for edge in found]
        return self.after[key]

    def leaf(self, key: Key) -> Tensor | None:
        return None if isinstance(key, Edge) else Edge(key, 0).leaf

    def resolve(self, edge: Edge) -> Edge:
        """An edge as the walk sees it: reentrant checkpoints are opened and replaced by what they recompute."""
        if edge in self._alias:
            return self.resolve(self._alias[edge])
        if is_reentrant(edge.node):
            self._open(edge.node)
            return self.resolve(edge)
        return edge

    def _open(self, node: Node) -> None:
        """Splice the graph of a reentrant checkpoint into ours."""
        self._recomputed.meet([node])
        outputs, joints, held = reopen(node)
        for nr, tensor in enumerate(outputs):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                self._alias[Edge(node, nr)] = edge_of(tensor)
                self._outer[edge_of(tensor)] = Edge(node, nr)
                self.tape.carry(Edge(node, nr), tensor)
        self._alias.update(joints)
        self._held.append(held)

    def needed(self, wanted: Collection[int]) -> set[Key]:
        """Stations from which a tensor with one of these ids is reached."""
        found: set[Key] = set()
        for key in reversed(self.order):
            call, leaf = self.calls.get(key), self.leaf(key)
            here = (call is not None and any(id(p) in wanted for p in call.params.values())) or id(leaf) in wanted
            if here or any(edge is not None and self.key(edge) in found for edge in self.after[key]):
                found.add(key)
        return found

    def demand_twice(self, keys: Iterable[Key]) -> None:
        """Raise what autograd leaves unsaid: a second backward through one of these would be zero, not right."""
        for key in keys:
            if differentiable_once(key):
                raise RuntimeError(f"{type(key).__name__} is marked once_differentiable")

    def step(
        self, key: Key, incoming: dict[Edge, Columns], into: Collection[Key], closed: Collection[int] = ()
    ) -> dict[Edge, Columns]:
        """Columns through one station, to its children whose stations are in `into`, but not by `closed` inputs."""
        after = [
            edge if edge is not None and k not in closed and self.key(edge) in into else None
            for k, edge in enumerate(self.after[key])
        ]
        outgoing: dict[Edge, Columns] = {}
        if not any(after):
            return outgoing
        call = self.calls.get(key)
        if call is not None:
            (columns,) = incoming.values()
            assert after[0] is not None
            return {after[0]: {group: _pull_call(call, G) for group, G in columns.items()}}
        groups = list(dict.fromkeys(group for columns in incoming.values() for group in columns))
        for together in [g for g in groups if not g.alone], *([g] for g in groups if g.alone):
            if together:
                self._pull(key, incoming, together, after, outgoing)
        return outgoing

    def _pull(
        self,
        key: Key,
        incoming: dict[Edge, Columns],
        groups: list[Group],
        after: list[Edge | None],
        outgoing: dict[Edge, Columns],
    ) -> None:
        joined: dict[int, Tensor] = {}
        for edge, columns in incoming.items():
            parts = [columns[g] if g in columns else _nothing(edge, g.size) for g in groups]
            joined[edge.nr] = parts[0] if len(parts) == 1 else torch.cat(parts)
        found = pull(key, joined, [k for k, edge in enumerate(after) if edge is not None])
        for below, t in zip(after, found, strict=True):
            if below is None or t is None:
                continue
            for group, part in zip(groups, t.split([g.size for g in groups]), strict=True):
                accumulate(outgoing.setdefault(below, {}), group, part)


def _nothing(edge: Edge, size: int) -> Tensor:
    shape, dtype, device = meta(edge)
    return torch.zeros((size, *shape), dtype=dtype, device=device)


def _pull_call(call: Call, G: Tensor) -> Tensor:
    if call.rule.constant and G.dim() > 2 and G.shape[1] > 1 and G.stride(1) == 0:
        # the same columns for every sample, through a map that is the same for every sample: walk one
        out = call.rule.pull(call, G[:, :1])
        return out.expand(out.shape[0], G.shape[1], *out.shape[2:])
    return call.rule.pull(call, G)


def accumulate(columns: Columns, group: Group, t: Tensor) -> None:
    columns[group] = columns[group] + t if group in columns else t


@dataclass(eq=False)
class Stop:
    """The walk at one station: what arrived, what leaves (to be changed by the visitor), what waits elsewhere."""

    key: Key
    incoming: dict[Edge, Columns]
    outgoing: dict[Edge, Columns] = field(default_factory=dict)
    waiting: dict[Edge, Columns] = field(default_factory=dict)


def walk(
    route: Route,
    seeds: dict[Edge, Columns],
    through: Collection[Key],
    visit: Collection[Key] = (),
    closed: Mapping[Key, Collection[int]] | None = None,
    create_graph: bool = False,
) -> Iterator[Stop]:
    """Columns from `seeds` downwards, each station once, after all its consumers.

    Columns go on through the stations in `through`; those only in `visit` are shown but not passed. `closed`: inputs
    of stations that they do not leave by. create_graph: the columns shall be differentiable themselves.
    """
    buffers: dict[Edge, Columns] = {edge: dict(columns) for edge, columns in seeds.items()}
    both = set(through) | set(visit)
    with torch.set_grad_enabled(create_graph):
        for key in route.order:
            if key not in both:
                continue
            incoming = {edge: buffers.pop(edge) for edge in route.outs[key] if edge in buffers}
            if not incoming:
                continue
            stop = Stop(key, incoming, waiting=buffers)
            if key in through:
                stop.outgoing = route.step(key, incoming, both, closed.get(key, ()) if closed else ())
            yield stop
            for edge, columns in stop.outgoing.items():
                for group, t in columns.items():
                    accumulate(buffers.setdefault(edge, {}), group, t)
