"""What is known before any column of the user's walks: where the samples are, and which road every parameter takes.

N samples · V columns. Roads of first order: a rule's closed form, or columns masked by sample and walked through
autograd's own nodes. Roads of second order are chosen in `curvature`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hookjac.checkpoints import Recomputed
from hookjac.errors import HookjacError
from hookjac.graph import Edge, edge_of
from hookjac.layouts import Placed, layouts_below
from hookjac.loss import Top, top
from hookjac.products import second_backward
from hookjac.route import Key, Route
from hookjac.samples import Layout
from hookjac.sharded import is_spread
from hookjac.tape import Tape, demand_seen
from hookjac.uses import Uses, find_uses


@dataclass(eq=False)
class Plan:
    """The way of one backward, ready to be walked."""

    route: Route
    top: Top
    N: int
    names: Mapping[int, str]  # id of a tracked parameter -> qualified name
    params: Mapping[int, nn.Parameter]
    selected: list[Edge]  # the outputs that `jac` differentiates: one for each call of the model
    lost: bool  # the model was called, but nothing that it returned was met
    layout: dict[Edge, Layout]  # of every tensor whose samples are known not to mix
    needed: set[Key]
    certain: bool = False  # all of this follows from the structure of the graph, whatever the values are
    masked: set[Key] = field(init=False, default_factory=set)  # stations that must see each sample by itself
    through: set[Key] = field(init=False, default_factory=set)  # stations that pass on columns of all samples together
    visit: set[Key] = field(init=False, default_factory=set)
    uses: Uses = field(init=False, default_factory=Uses)  # where a rule explains a parameter
    glue: set[int] = field(init=False, default_factory=set)  # parameters reached through autograd's nodes

    below: set[Key] = field(init=False, default_factory=set)  # stations below the place where samples part

    def __post_init__(self) -> None:
        self.below = reachable(self.route, [self.route.key(e) for e in [*self.top.frontier, *self.selected]])
        self.uses = find_uses(self.route, self.names, self.below, self.layout)
        starts = [self.route.key(e) for e in [*self.top.frontier, *self.selected]]
        # what only a rule's parameters are made of is the rule's affair: with one sample it would look like data
        self._find_masked(reachable(self.route, starts, lambda key: self.uses.data(self.route, key)))
        self._find_glue()

    @property
    def out_shape(self) -> torch.Size:
        """Of one sample's selected output."""
        return self.selected[0].shape[1:] if self.selected else torch.Size()

    def demand_graph(self) -> None:
        """Refuse a second backward through what autograd would take the derivatives of for zero."""
        with second_backward(list(self.names.values())):
            self.route.demand_twice(k for k in self.route.order if k in self.needed)
            if not self.route.reopened.isdisjoint(self.needed):
                raise RuntimeError("a reentrant checkpoint has none")

    def _find_masked(self, walked: Collection[Key]) -> None:
        """Bottom up: a station whose child needs samples apart, and cannot part them itself, must part them."""
        for key in reversed(self.route.order):
            if key not in self.needed or key not in walked:
                continue
            if key in self.uses.at:
                self.visit.add(key)
            for edge in self.uses.data(self.route, key):
                child = self.route.key(edge)
                leaf = self.route.leaf(child)
                if id(leaf) in self.names or (child in self.masked and edge not in self.layout):
                    self.masked.add(key)
                if child in self.visit or child in self.through or (child in self.masked and edge in self.layout):
                    self.through.add(key)
            if key in self.masked and any(edge in self.layout for edge in self.route.outs[key]):
                self.visit.add(key)

    def _find_glue(self) -> None:
        """Parameters that masked columns arrive at."""
        stack = list(self.masked & self.visit)
        seen = set(stack)
        while stack:
            for edge in self.uses.data(self.route, stack.pop()):
                key = self.route.key(edge)
                leaf = self.route.leaf(key)
                if leaf is not None and id(leaf) in self.names:
                    self.glue.add(id(leaf))
                elif key in self.masked and edge not in self.layout and key not in seen:
                    seen.add(key)
                    stack.append(key)


def reachable(
    route: Route, starts: Iterable[Key], after: Callable[[Key], Iterable[Edge | None]] | None = None
) -> set[Key]:
    found = set(starts)
    stack = list(found)
    while stack:
        key = stack.pop()
        for edge in route.after[key] if after is None else after(key):
            if edge is not None and (key := route.key(edge)) not in found:
                found.add(key)
                stack.append(key)
    return found


def make_plan(
    tape: Tape,
    loss: Tensor,
    params: Mapping[str, nn.Parameter],
    known: Mapping[int, str],
    current: Collection[int],
    recomputed: Recomputed,
    rejected: Collection[Edge] = (),
) -> Plan:
    """Survey the graph of a loss.

    params: the parameters to be served, by qualified name. known: all that the model had when the block began;
    current: all that it has now. recomputed: open as long as the plan is used. rejected: layers to be gone through by
    autograd's nodes.
    """
    names = {id(p): name for name, p in params.items()}
    rejected = set(rejected)
    while True:
        route = Route(tape, [edge_of(loss)], recomputed, rejected)
        if any(type(key).__name__ in _COMPILED for key in route.order):
            demand_seen(tape.names, {name for trail in route.trails for name, *_ in trail})
        selected, outputs, N = _outputs(route)
        _check_parameters(route, names, known, current)
        needed = route.needed(names.keys())
        layout, unfit, certain = layouts_below(route, outputs, N, needed, names, {})
        if not unfit:
            part, (layout, unfit, sure) = _join(loss, route, outputs, N, needed, names, layout)
            certain = certain and sure and part.certain
        if not unfit:
            by_id = {id(p): p for p in params.values()}
            lost = tape.calls > 0 and not any(m and m.output for e in outputs for m in [route.mark(e)])
            return Plan(route, part, N, names, by_id, selected, lost, layout, needed, certain)
        rejected |= unfit  # these layers go by autograd's nodes; look again


_COMPILED = ("CompiledFunctionBackward", "CppFunction")  # of torch.compile, of TorchScript


def _join(
    loss: Tensor,
    route: Route,
    outputs: list[Edge],
    N: int,
    needed: set[Key],
    names: Mapping[int, str],
    layout: dict[Edge, Layout],
) -> tuple[Top, Placed]:
    """The loss's part of the graph, and the layouts between it and the outputs."""
    sampled = {edge for edge in layout if route.with_data(route.key(edge))} | set(outputs)
    # a first axis may have the right size by chance (N tokens kept by a mask, N classes): then the outputs decide
    with contextlib.suppress(HookjacError):
        part = top(loss, route, sampled, N, names)
        return part, layouts_below(route, part.frontier, N, needed, names, layout)
    part = top(loss, route, sampled, N, names, low=True)
    part.certain = False  # the values of the first attempt spoke
    return part, layouts_below(route, part.frontier, N, needed, names, layout)


def _outputs(route: Route) -> tuple[list[Edge], list[Edge], int]:
    """What `jac` differentiates, what the samples are counted on, and how many there are."""
    marked = [(e, m) for key in route.order for e in route.outs[key] if (m := route.mark(e)) and m.output]
    selected = [e for e, m in marked if m.selected]
    first = selected or [e for e, _ in marked] or _first_layers(route)
    if not first:
        raise HookjacError(
            "the loss is not connected to an output of the model: no tensor that the model returned inside this block "
            "(and none of its layers) was met on the way down from the loss. Call the extended model itself inside "
            "the block, in the thread that opened it, with grad enabled, and compute the loss from what it returns."
            + ("" if route.tape.rules else " A loss made of create_graph's results is backpropagated after the block.")
        )
    N = first[0].shape[0]
    if any(e.shape[0] != N for e in first):
        sizes = sorted({e.shape[0] for e in first})
        raise HookjacError(
            f"the number of samples differs between calls of the model that share this loss: {sizes}. Use one extend "
            "block and one backward for each batch size."
        )
    # outputs and layers beside the way down from there: an auxiliary head, say. Consumers come first in the order,
    # so that of a chain only the topmost starts
    starts, below = list(first), reachable(route, [route.key(e) for e in first])
    for key in route.order:
        for e in route.outs[key]:
            mark = route.mark(e)
            if key in below or not mark or e.shape[:1] != (N,):
                continue
            if (mark.output or key in route.calls) and route.with_data(key):
                starts.append(e)
                below |= reachable(route, [key])
    return selected, starts, N


def _first_layers(route: Route) -> list[Edge]:
    """When only parts of the model were called: the first layers with a rule, coming down from the loss."""
    found: list[Edge] = []
    seen: set[Edge] = set()
    stack = list(route.starts)
    while stack:
        edge = stack.pop()
        if edge in seen:
            continue
        seen.add(edge)
        key = route.key(edge)
        if key in route.calls:
            found.append(edge)
        else:
            stack += [after for after in route.after[key] if after is not None]
    return found


def _check_parameters(
    route: Route, names: Mapping[int, str], known: Mapping[int, str], current: Collection[int]
) -> None:
    """A parameter that the graph remembers must still be the model's, and the same."""
    for key in route.order:
        call, leaf = route.calls.get(key), route.leaf(key)
        found: list[Tensor] = [leaf] if leaf is not None else [] if call is None else list(call.params.values())
        for p in found:
            if id(p) in known and id(p) not in current and is_spread(p):
                raise HookjacError(
                    f"the loss reaches the shards of parameter {known[id(p)]!r} themselves, past the model (a penalty "
                    "on model.parameters() under fully_shard). Leave it out of the loss: weight decay belongs to the "
                    "optimizer, and its curvature is known."
                )
            if id(p) in known and id(p) not in current:
                raise HookjacError(
                    f"parameter {known[id(p)]!r} was replaced or removed between forward and backward: the graph still "
                    "leads to the old one. Run the forward again after changing the model."
                )
        moved: list[Tensor] = []
        if call is not None:
            moved = [
                p
                for k, p in call.params.items()
                if id(p) in names and (p.data_ptr(), p.dtype, p.shape) != _like(call.values[k])
            ]
        elif leaf is not None and id(leaf) in names:
            entry = key._input_metadata[0]
            if (torch.Size(entry.shape), entry.dtype, entry.device) != (leaf.shape, leaf.dtype, leaf.device):
                moved = [leaf]
        for p in moved:
            raise HookjacError(
                f"parameter {names[id(p)]!r} was moved, cast or given new data between forward and backward. Run the "
                "forward again after changing the model."
            )


def _like(t: Tensor) -> tuple[int, torch.dtype, torch.Size]:
    return t.data_ptr(), t.dtype, t.shape
