"""What is known before any column of the user's walks: where the samples are, and which road every parameter takes.

N samples · V columns. Roads of first order: a rule's closed form, or columns masked by sample and walked through
autograd's own nodes. Roads of second order are chosen in `curvature`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hookjac.errors import HookjacError
from hookjac.graph import Edge, edge_of, meta
from hookjac.loss import Top, top
from hookjac.route import Columns, Group, Key, Route, walk
from hookjac.samples import Layout, agree, find, scaled, scales
from hookjac.tape import Tape, mixing_batchnorm


@dataclass(eq=False)
class Plan:
    """The way of one backward, ready to be walked."""

    route: Route
    top: Top
    N: int
    names: Mapping[int, str]  # id of a tracked parameter -> qualified name
    params: Mapping[int, nn.Parameter]
    selected: list[Edge]  # the outputs that `jac` differentiates: one for each call of the model
    layout: dict[Edge, Layout]  # of every tensor whose samples are known not to mix
    needed: set[Key]
    masked: set[Key] = field(default_factory=set)  # stations that must see each sample by itself
    through: set[Key] = field(default_factory=set)  # stations that pass on columns of all samples together
    visit: set[Key] = field(default_factory=set)
    uses: dict[int, list[Key]] = field(default_factory=dict)  # id -> stations where a rule explains it
    glue: set[int] = field(default_factory=set)  # parameters reached through autograd's nodes

    below: set[Key] = field(default_factory=set)  # stations below the place where samples part

    def __post_init__(self) -> None:
        self.below = reachable(self.route, [self.route.key(e) for e in [*self.top.frontier, *self.selected]])
        self._find_uses()
        self._find_masked()

    def _find_uses(self) -> None:
        for key in self.route.order:
            call = self.route.calls.get(key)
            if call is not None:
                for p in call.params.values():
                    if id(p) in self.names:
                        self.uses.setdefault(id(p), []).append(key)
            leaf = self.route.leaf(key)
            if leaf is not None and id(leaf) in self.names and key in self.below:
                self.glue.add(id(leaf))

    def _find_masked(self) -> None:
        """Bottom up: a station whose child needs samples apart, and cannot part them itself, must part them."""
        for key in reversed(self.route.order):
            if key not in self.needed or key not in self.below:
                continue
            call = self.route.calls.get(key)
            if call is not None and any(id(p) in self.names for p in call.params.values()):
                self.visit.add(key)
            for edge in self.route.after[key]:
                if edge is None:
                    continue
                child = self.route.key(edge)
                leaf = self.route.leaf(child)
                if id(leaf) in self.names or (child in self.masked and edge not in self.layout):
                    self.masked.add(key)
                if child in self.visit or child in self.through or (child in self.masked and edge in self.layout):
                    self.through.add(key)
            if key in self.masked and any(edge in self.layout for edge in self.route.outs[key]):
                self.visit.add(key)


def reachable(route: Route, starts: Iterable[Key]) -> set[Key]:
    found = set(starts)
    stack = list(found)
    while stack:
        for edge in route.after[stack.pop()]:
            if edge is not None and (key := route.key(edge)) not in found:
                found.add(key)
                stack.append(key)
    return found


def make_plan(
    tape: Tape, loss: Tensor, params: Mapping[str, nn.Parameter], known: Mapping[int, str], current: Collection[int]
) -> Plan:
    """Survey the graph of a loss.

    params: the parameters to be served, by qualified name. known: all that the model had when the block began;
    current: all that it has now.
    """
    names = {id(p): name for name, p in params.items()}
    rejected: set[Edge] = set()
    while True:
        route = Route(tape, [edge_of(loss)], rejected)
        selected, outputs, N = _outputs(route)
        _check_parameters(route, names, known, current)
        needed = route.needed(names.keys())
        layout, unfit = _probe(route, outputs, N, needed, names, {})
        if not unfit:
            part = top(loss, route, layout.keys(), N, names)
            layout, unfit = _probe(route, part.frontier, N, needed, names, layout)
        if not unfit:
            by_id = {id(p): p for p in params.values()}
            return Plan(route, part, N, names, by_id, selected, layout, needed)
        rejected |= unfit  # these layers go by autograd's nodes; look again


def _outputs(route: Route) -> tuple[list[Edge], list[Edge], int]:
    """What `jac` differentiates, what the samples are counted on, and how many there are."""
    marked = [(e, m) for key in route.order for e in route.outs[key] if (m := route.mark(e)) and m.output]
    selected = [e for e, m in marked if m.selected]
    first = selected or [e for e, _ in marked] or _first_layers(route)
    if not first:
        raise HookjacError(
            "the loss is not connected to an output of the model: no tensor that the model returned inside this block "
            "(and none of its layers) was met on the way down from the loss. Call the extended model itself inside "
            "the block, with grad enabled, and compute the loss from what it returns."
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
            if key not in below and mark and (mark.output or key in route.calls) and e.shape[:1] == (N,):
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


def _probe(
    route: Route,
    starts: list[Edge],
    N: int,
    needed: set[Key],
    names: Mapping[int, str],
    known: Mapping[Edge, Layout],
) -> tuple[dict[Edge, Layout], set[Edge]]:
    """Find the samples below `starts`, down to tensors where they are `known`; there they must agree.

    Also returns the layers whose rule cannot serve the layout that was found.
    """
    layout = dict(known)
    unfit: set[Edge] = set()
    if N == 0:
        return dict.fromkeys((e for key in route.order for e in route.outs[key]), Layout(0)), unfit
    group = Group("probe", 2)
    seeds: dict[Edge, Columns] = {}
    for edge in starts:
        shape, dtype, device = meta(edge)
        u = torch.randn(shape, generator=torch.Generator().manual_seed(len(seeds)), dtype=torch.float64)
        u = u.to(device, dtype)
        seeds[edge] = {group: torch.stack([u, scaled(u, scales(N, device, dtype), Layout(N))])}
    starting = {route.key(edge) for edge in starts}
    for stop in walk(route, seeds, needed | starting):
        if type(stop.key).__name__.endswith("BatchNormBackward0") and getattr(stop.key, "_saved_training", False):
            raise mixing_batchnorm("a functional batch norm")
        for edge, columns in stop.incoming.items():
            if edge.leaf is not None:
                continue
            u, su = columns[group]
            factors = scales(N, u.device, u.dtype)
            if edge in known:
                if not agree(su, scaled(u, factors, known[edge])):
                    raise _entangled(route, edge)
                stop.outgoing = {}
                continue
            if edge in starts:
                if not agree(su, scaled(u, factors, Layout(N))):
                    raise _entangled(route, edge)
                layout[edge] = Layout(N)
            elif found := find(u, su, factors):
                layout[edge] = found
            call = route.calls.get(stop.key)
            serves = call is not None and any(id(p) in names for p in call.params.values())
            if serves and call and not (edge in layout and call.rule.fits(call, layout[edge])):
                unfit.add(edge)
    return layout, unfit


def _entangled(route: Route, edge: Edge) -> HookjacError:
    mark = route.mark(edge)
    what = (mark.output or (mark.call and f"layer {mark.call.name!r}")) if mark else None
    return HookjacError(
        f"the loss mixes samples: its gradient at {what or 'a tensor'} of shape {tuple(edge.shape)} couples rows of "
        "the first axis. Per-sample quantities need a loss that is a sum (or mean) over samples, and outputs whose "
        "first axis counts them."
    )
