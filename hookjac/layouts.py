"""Where the samples are in every tensor below the outputs: by structure where it tells, else by a probe.

A probe is a random cotangent, and the same one with each sample scaled by a number of its own: where the samples do not
mix, the second is the first with those numbers along some axis.

N samples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from hookjac.errors import HookjacError
from hookjac.graph import Edge, meta, ordered
from hookjac.route import Columns, Group, Key, Route, Stop, walk
from hookjac.rule import Call, node_rule
from hookjac.samples import Layout, agree, find, random, scaled, scales
from hookjac.structure import placed
from hookjac.tape import mixing_batchnorm

# layouts; layers whose rule cannot serve theirs; whether all that follows from structure
Placed = tuple[dict[Edge, Layout], set[Edge], bool]


def layouts_below(
    route: Route,
    starts: list[Edge],
    N: int,
    needed: set[Key],
    names: Mapping[int, str],
    known: Mapping[Edge, Layout],
) -> Placed:
    """Find the samples below `starts`, by structure if it tells, else by probing."""
    if all(edge in known for edge in starts):
        return dict(known), set(), True
    found = placed(route, starts, N, needed | {route.key(edge) for edge in starts})
    if found is None or any(found.get(edge, layout) != layout for edge, layout in known.items()):
        return *probe(route, starts, N, needed, names, known), False
    layout, unfit = dict(known), set[Edge]()
    for edge, its in found.items():
        if edge not in known:
            if its is not None:
                layout[edge] = its
            if _unfit(route, edge, layout, names):
                unfit.add(edge)
    return layout, unfit, True


def _unfit(route: Route, edge: Edge, layout: Mapping[Edge, Layout], names: Mapping[int, str]) -> bool:
    """A layer whose rule cannot serve the layout of its output. Raises where that cannot be meant."""
    key = route.key(edge)
    call = route.calls.get(key)
    serves = call is not None and any(id(p) in names for p in call.params.values())
    why = _refusal(key, call if serves else None, layout[edge]) if edge in layout else None
    if why and not (call is not None and call.source is not None and _of_parameters(route, call.source)):
        raise HookjacError(
            f"the first axis of the model's output does not count samples: {why}. The output must have the "
            "batch first; add it with unsqueeze(0) for a single sample."
        )
    return bool(serves and call and not (edge in layout and call.rule.fits(call, layout[edge])))


def probe(
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
    hidden: list[Edge] = []  # outputs at which the probe vanished, under a layer of zeros
    if N == 0:
        return {e: Layout(0) for key in route.order for e in route.outs[key] if e.shape[:1] == (0,)}, unfit
    plain, times = Group("probe", 1, alone=True), Group("scaled probe", 1, alone=True)
    seeds: dict[Edge, Columns] = {}
    for edge in starts:
        shape, dtype, device = meta(edge)
        u = random(shape, len(seeds), device, dtype)
        seeds[edge] = {plain: u[None], times: scaled(u, scales(N, device, dtype), Layout(N))[None]}
    starting = {route.key(edge) for edge in starts}
    consumers = _consumers(route, needed | starting)
    for stop in walk(route, seeds, needed | starting):
        _calm(stop, plain)
        for edge, columns in stop.incoming.items():
            if edge.leaf is not None:
                continue
            u, su = columns[plain][0], columns[times][0]
            factors = scales(N, u.device, u.dtype)
            if edge in known:
                if not agree(su, scaled(u, factors, known[edge]), route.rounding):
                    raise _entangled(route, edge)
                stop.outgoing = {}
                continue
            if edge in starts:
                if not agree(su, scaled(u, factors, Layout(N)), route.rounding):
                    raise _entangled(route, edge)
                layout[edge] = Layout(N)
            elif found := find(u, su, factors, route.rounding) or _inherited(route, u, consumers.get(edge, ()), layout):
                layout[edge] = found
            elif norm := next((k for k in consumers.get(edge, ()) if _batch_statistics(k)), None):
                raise mixing_batchnorm(f"a functional batch norm ({type(norm).__name__})")
            elif edge.shape[:1] == (N,) and (mark := route.mark(edge)) and mark.output and not bool(u.any()):
                hidden.append(edge)
            if _unfit(route, edge, layout, names):
                unfit.add(edge)
    if hidden:
        layout, more = probe(route, hidden[:1], N, needed, names, layout)
        unfit = {edge for edge in unfit | more if _unfit(route, edge, layout, names)}
    return layout, unfit


def _refusal(key: Key, call: Call | None, layout: Layout) -> str | None:
    if call is not None:
        why = call.rule.refuses(call, layout)
        return why and f"at layer {call.name!r} (input {tuple(call.x.shape)}) {why}"
    rule = node_rule(key)
    return None if rule is None else rule.refuses(key, layout)


def _of_parameters(route: Route, edge: Edge) -> bool:
    """Is this made of parameters alone, as what a layer that generates a weight is given? There samples may lie along
    features by chance (ReLUs that let each of two samples pass elsewhere); data would enter a layer further down."""
    below = ordered([route.key(edge)], lambda key: [route.key(e) for e in route.after[key] if e is not None])
    leaves = [leaf for key in below if (leaf := route.leaf(key)) is not None]
    return bool(leaves) and all(isinstance(leaf, torch.nn.Parameter) for leaf in leaves)


def _consumers(route: Route, keys: Collection[Key]) -> dict[Edge, list[Key]]:
    found: dict[Edge, list[Key]] = {}
    for key in route.order:
        if key in keys:
            for edge in route.after[key]:
                if edge is not None:
                    found.setdefault(edge, []).append(key)
    return found


def _calm(stop: Stop, plain: Group) -> None:
    """Keep the probe's size: in a deep net it would vanish or overflow. Both columns shrink by one power of two."""
    for columns in stop.outgoing.values():
        top = columns[plain].abs().max() if columns[plain].numel() else columns[plain].new_zeros(())
        if 0 < top < 1e-3 or 1e3 < top < math.inf:
            for group, t in columns.items():
                columns[group] = t * torch.exp2(-top.log2().round())


def _inherited(route: Route, u: Tensor, consumers: Collection[Key], layout: Mapping[Edge, Layout]) -> Layout | None:
    """The layout of a tensor at which the probe vanished (a saturated activation, a layer that begins at zero).

    Rules leave the samples where they are; a tensor that only they use has the layout of what they make of it.
    """
    if bool((u != 0).any()) or not all(key in route.calls for key in consumers):
        return None
    found = {layout.get(key) for key in consumers}
    return found.pop() if len(found) == 1 else None


def _batch_statistics(key: Key) -> bool:
    """A batch norm with the statistics of several rows; with one row it is how PyTorch writes an instance norm."""
    name = type(key).__name__
    return name.endswith("BatchNormBackward0") and bool(getattr(key, "_saved_training", False)) and _rows(key) > 1


def _rows(key: Key) -> int:
    return Edge(key, 0).shape[0]


def _entangled(route: Route, edge: Edge) -> HookjacError:
    mark = route.mark(edge)
    what = (mark.output or (mark.note and f"layer {mark.note.name!r}")) if mark else None
    return HookjacError(
        f"the loss mixes samples: its gradient at {what or 'a tensor'} of shape {tuple(edge.shape)} couples rows of "
        "the first axis. Per-sample quantities need a loss that is a sum (or mean) over samples, and outputs whose "
        "first axis counts them."
    )
