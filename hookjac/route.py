"""The way down the graph: which stations there are, in which order, and columns walking from one to the next.

A *station* is either a layer that a rule explains (key: the edge of its output; the walk goes straight to the
layer's input) or one autograd node (key: the node). Leaves are the nodes that fill `.grad`.

V columns; `[V, *t]` are V cotangents of a tensor of shape t.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import detach_variable, set_device_states

from hookjac.graph import Edge, Node, children, differentiable_once, edge_of, meta, ordered, pull
from hookjac.rule import Call
from hookjac.tape import Mark, Tape

Key = Any  # Edge of a layer's output, or an autograd node


@dataclass(eq=False)
class Group:
    """Columns that belong together: `size` of them, weighed by `metric` ([N, V] or [N, V, V]; None: not curvature)."""

    name: str
    size: int
    metric: Tensor | None = None


Columns = dict[Group, Tensor]  # of one tensor


class Route:
    """All stations between a loss and the tracked leaves, consumers before producers."""

    def __init__(self, tape: Tape, starts: Iterable[Edge], rejected: Collection[Edge] = ()) -> None:
        self.tape = tape
        self.rejected = set(rejected)
        self._alias: dict[Edge, Edge] = {}
        self._held: list[Any] = []
        self.calls: dict[Key, Call] = {}
        self.outs: dict[Key, list[Edge]] = {}
        self.after: dict[Key, list[Edge | None]] = {}
        self.starts = [self.resolve(edge) for edge in starts]
        self.order: list[Key] = ordered(
            [self.key(edge) for edge in self.starts],
            lambda key: [self.key(edge) for edge in self._explore(key) if edge is not None],
        )

    def mark(self, edge: Edge) -> Mark | None:
        return self.tape.mark(edge)

    def key(self, edge: Edge) -> Key:
        """The station that a resolved edge arrives at."""
        mark = self.mark(edge)
        key: Key = edge.node
        if mark and mark.call and mark.call.intact and edge not in self.rejected:
            key = edge
            if key not in self.calls:
                mark.call.edge = None
                self.calls[key] = _at(mark.call, edge)
        outs = self.outs.setdefault(key, [])
        if edge not in outs:
            outs.append(edge)
        return key

    def _explore(self, key: Key) -> list[Edge | None]:
        if key not in self.after:
            call = self.calls.get(key)
            found: list[Edge | None] = children(key) if call is None else [call.source]
            self.after[key] = [None if edge is None else self.resolve(edge) for edge in found]
        return self.after[key]

    def leaf(self, key: Key) -> Tensor | None:
        return getattr(key, "variable", None)

    def resolve(self, edge: Edge) -> Edge:
        """An edge as the walk sees it: reentrant checkpoints are opened and replaced by what they recompute."""
        if edge in self._alias:
            return self.resolve(self._alias[edge])
        if type(edge.node).__name__ == "CheckpointFunctionBackward":
            self._open(edge.node)
            return self.resolve(edge)
        return edge

    def _open(self, node: Node) -> None:
        """Run a reentrant checkpoint's function again with grad, and splice its graph into ours."""
        inputs, tensors = list(node.inputs), node.saved_tensors
        for k, index in enumerate(node.tensor_indices):
            inputs[index] = tensors[k]
        devices = getattr(node, "fwd_devices", [])
        with torch.random.fork_rng(devices, enabled=node.preserve_rng_state, device_type=node.device_type):
            if node.preserve_rng_state:
                torch.set_rng_state(node.fwd_cpu_state)
                if node.had_device_in_fwd:
                    set_device_states(node.fwd_devices, node.fwd_device_states, device_type=node.device_type)
            fresh = detach_variable(tuple(inputs))
            cast = torch.autocast(node.device_type, **node.device_autocast_kwargs)
            with torch.enable_grad(), cast, torch.autocast("cpu", **node.cpu_autocast_kwargs):
                outputs = node.run_function(*fresh)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for nr, tensor in enumerate(outputs):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                self._alias[Edge(node, nr)] = edge_of(tensor)
        # the function's tensor arguments, in order, are the node's children, in order
        given = [t for t in fresh if isinstance(t, Tensor)]
        after = children(node)
        for tensor, outer in zip(given, after[len(after) - len(given) :], strict=True):
            if outer is not None and tensor.requires_grad:
                self._alias[edge_of(tensor)] = outer
        self._held += [fresh, outputs]

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

    def step(self, key: Key, incoming: dict[Edge, Columns], into: Collection[Key]) -> dict[Edge, Columns]:
        """Columns through one station, to those of its children whose stations are in `into`."""
        after = [edge if edge is not None and self.key(edge) in into else None for edge in self.after[key]]
        outgoing: dict[Edge, Columns] = {}
        if not any(after):
            return outgoing
        call = self.calls.get(key)
        if call is not None:
            (columns,) = incoming.values()
            assert after[0] is not None
            return {after[0]: {group: _pull_call(call, G) for group, G in columns.items()}}
        groups = list(dict.fromkeys(group for columns in incoming.values() for group in columns))
        joined: dict[int, Tensor] = {}
        for edge, columns in incoming.items():
            parts = [columns[g] if g in columns else _nothing(edge, g.size) for g in groups]
            joined[edge.nr] = parts[0] if len(parts) == 1 else torch.cat(parts)
        found = pull(key, joined)
        for below, t in zip(after, found, strict=True):
            if below is None or t is None:
                continue
            for group, part in zip(groups, t.split([g.size for g in groups]), strict=True):
                accumulate(outgoing.setdefault(below, {}), group, part)
        return outgoing


def _at(call: Call, edge: Edge) -> Call:
    """The call with its place in the graph. A copy: the note itself must not point back at its node."""
    return Call(**{**vars(call), "edge": edge})


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
) -> Iterator[Stop]:
    """Columns from `seeds` downwards, each station once, after all its consumers.

    Columns go on through the stations in `through`; those only in `visit` are shown but not passed.
    """
    buffers: dict[Edge, Columns] = {edge: dict(columns) for edge, columns in seeds.items()}
    both = set(through) | set(visit)
    with torch.no_grad():
        for key in route.order:
            if key not in both:
                continue
            incoming = {edge: buffers.pop(edge) for edge in route.outs[key] if edge in buffers}
            if not incoming:
                continue
            stop = Stop(key, incoming, waiting=buffers)
            if key in through:
                stop.outgoing = route.step(key, incoming, both)
            yield stop
            for edge, columns in stop.outgoing.items():
                for group, t in columns.items():
                    accumulate(buffers.setdefault(edge, {}), group, t)
