"""Where each parameter is used by something that a rule explains, and what it receives there.

A use is a layer's call (its rule names the parameter), or an autograd node with a rule for one of its operands,
from which a chain of nodes with one input each (a transpose, a slice) leads to the parameter.

N samples · V columns.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hookjac.errors import HookjacError
from hookjac.factor import Dense, Factor, Lookup, Outer, share, total
from hookjac.graph import Bend, Edge, Node, children, meta, pull, signed
from hookjac.route import Key, Route
from hookjac.rule import node_rule
from hookjac.samples import Layout


@dataclass(frozen=True, eq=False)
class Use:
    """One place where a parameter is used. `slot`: the input of a node, or the name within a layer."""

    key: Key
    slot: int | str
    rule: str
    chain: tuple[Edge, ...] = ()  # from the operand down to, not including, the parameter


@dataclass(eq=False)
class Uses:
    of: dict[int, list[Use]] = field(default_factory=dict)  # id of a parameter -> its uses
    at: dict[Key, list[tuple[int, Use]]] = field(default_factory=dict)
    parted: dict[Key, set[int]] = field(default_factory=dict)  # inputs that lead to nothing but uses of this station

    def add(self, p: int, use: Use) -> None:
        self.of.setdefault(p, []).append(use)
        self.at.setdefault(use.key, []).append((p, use))
        if isinstance(use.slot, int):
            self.parted.setdefault(use.key, set()).add(use.slot)

    def data(self, route: Route, key: Key) -> list[Edge]:
        """The edges below a station that go on to other stations."""
        gone = self.parted.get(key, ())
        return [e for k, e in enumerate(route.after[key]) if e is not None and k not in gone]


def find_uses(route: Route, names: Mapping[int, str], below: Collection[Key], layout: Mapping[Edge, Layout]) -> Uses:
    uses = Uses()
    for key in route.order:
        call = route.calls.get(key)
        if call is not None:
            for attribute, p in call.params.items():
                if id(p) in names:
                    uses.add(id(p), Use(key, attribute, call.rule.name))
            continue
        rule = node_rule(key)
        if rule is None or key not in below:
            continue
        edge = Edge(key, 0)
        if route.outs[key] != [edge] or edge not in layout or meta(edge)[1].is_complex:
            continue  # the rules' formulas are those of real numbers
        for slot in rule.slots:
            operand = route.after[key][slot] if slot < len(route.after[key]) else None
            if operand is None or not rule.fits(key, slot, layout[edge]):
                continue
            if layout[edge].N == 1 and route.with_data(route.key(operand)):
                continue  # with one sample every shape fits; what holds data is no weight
            end, chain = _follow(route, operand)
            if end is not None and id(end) in names:
                uses.add(id(end), Use(key, slot, rule.name, chain))
    return uses


def _follow(route: Route, operand: Edge) -> tuple[Tensor | None, tuple[Edge, ...]]:
    """The leaf below an operand, if nothing but nodes with a single input lie between."""
    chain: list[Edge] = []
    while True:
        key = route.key(operand)
        leaf = route.leaf(key)
        if leaf is not None:
            return leaf, tuple(chain)
        after = [e for e in route.after[key] if e is not None]
        if key in route.calls or len(after) != 1:
            return None, ()
        if meta(operand)[1].is_complex:
            return None, ()
        chain.append(operand)
        operand = after[0]


def received(
    route: Route, uses: Uses, key: Key, G: Tensor, layout: Layout, only: int | None = None
) -> dict[int, Factor]:
    """What the parameters used at a station get from columns G [V, *out] of its output."""
    found: dict[int, Factor] = {}
    call = route.calls.get(key)
    if call is not None and call.rule.factors is not None:
        answer = call.rule.factors(call, G, layout)
        if not isinstance(answer, dict) or not answer.keys() <= call.params.keys():
            said = f"keys {sorted(answer)}" if isinstance(answer, dict) else f"a {type(answer).__name__}"
            raise HookjacError(
                f"rule {call.rule.name!r} of layer {call.name!r}: `factors` must return a dict from parameter names to "
                f"factors, of {', '.join(map(repr, call.params))}; got {said}."
            )
        for attribute, factor in answer.items():
            _demand(f"rule {call.rule.name!r} of layer {call.name!r}", factor, G, layout, call.params[attribute].shape)
            p = id(call.params[attribute])
            found[p] = total([found[p], factor]) if p in found else factor
        share(found.values(), G)
        return found
    rule = node_rule(key)
    for p, use in uses.at.get(key, ()):
        if rule is None or not isinstance(use.slot, int) or only not in (None, p):
            continue
        factor = rule.part(key, use.slot, G, layout)
        operand = children(key)[use.slot]
        assert operand is not None
        _demand(f"rule {rule.name!r} of the node {type(key).__name__}", factor, G, layout, meta(operand)[0])
        factor = down(use.chain, factor)
        found[p] = total([found[p], factor]) if p in found else factor
    share(found.values(), G)
    return found


def _demand(who: str, factor: object, G: Tensor, layout: Layout, shape: torch.Size) -> None:
    """Refuse what cannot be a factor of this parameter: wrong shapes would broadcast into wrong numbers."""
    if not isinstance(factor, (Dense, Outer, Lookup)):
        raise HookjacError(f"{who} returned a {type(factor).__name__}, expected a Dense, Outer or Lookup.")
    found, wanted = (factor.V, factor.N, *factor.param), (len(G), layout.N, *shape)
    if found != wanted:
        raise HookjacError(
            f"{who} returned a factor of shape {list(found)}, expected [V, N, *p] = {list(wanted)} for {len(G)} "
            f"columns and {layout.N} samples. Split the samples off with layout.split, and sum over other positions."
        )


def can_mix(route: Route, use: Use) -> bool:
    """Is the second derivative in this parameter and the station's input written down?"""
    call, rule = route.calls.get(use.key), node_rule(use.key)
    return call.rule.mixed is not None if call is not None else rule is not None and use.slot in rule.mixed


def mixed(route: Route, use: Use, g: Tensor, X: Tensor, layout: Layout) -> Factor | None:
    """That second derivative under the loss gradient g [*out], applied to tangents X [V, *in]; None where zero."""
    call, rule = route.calls.get(use.key), node_rule(use.key)
    if call is not None:
        assert call.rule.mixed is not None
        return call.rule.mixed(call, g, X, layout).get(str(use.slot))
    assert rule is not None
    assert isinstance(use.slot, int)
    way = rule.mixed[use.slot]
    return None if way is None else down(use.chain, way(use.key, use.slot, g, X, layout))


def down(chain: tuple[Edge, ...], factor: Factor) -> Factor:
    """A factor of an operand through the nodes between it and the parameter."""
    for edge in chain:
        moved: Factor | None = None
        if isinstance(factor, Outer) and turns(edge.node):
            moved = factor.turned()
        elif isinstance(factor, Outer) and (place := _slice(edge)) is not None:
            moved = factor.padded(*place)
        elif isinstance(factor, (Outer, Lookup)) and (dtype := _cast(edge)) is not None:
            moved = factor.map(functools.partial(Tensor.to, dtype=dtype))
        if moved is not None:
            factor = moved
            continue
        t = factor.dense()  # [V, N, *operand]
        V, N = t.shape[:2]
        columns = pull(edge.node, {edge.nr: t.reshape(V * N, *meta(edge)[0])})
        (out,) = [c for c in columns if c is not None]
        factor = Dense(out.reshape(V, N, *out.shape[1:]), fresh=True)
    return factor


def _slice(edge: Edge) -> tuple[int, int, int] | None:
    """Axis, entries before and entries after, if this is a slice of a matrix."""
    node, name = edge.node, type(edge.node).__name__
    (below,) = [e for e in children(node) if e is not None]
    whole, part = meta(below)[0], meta(edge)[0]
    if len(whole) != 2 or len(part) != 2:
        return None
    if name == "SliceBackward0" and node._saved_step == 1:
        axis = signed(node._saved_dim) % 2
        before = slice(signed(node._saved_start), None).indices(whole[axis])[0]
    elif name in ("SplitBackward0", "UnsafeSplitBackward0"):
        axis, before = signed(node._saved_dim) % 2, edge.nr * node._saved_split_size
    elif name in ("SplitWithSizesBackward0", "UnsafeSplitWithSizesBackward0"):
        axis, before = signed(node._saved_dim) % 2, sum(node._saved_split_sizes[: edge.nr])
    else:
        return None
    return axis, before, whole[axis] - before - part[axis]


def _cast(edge: Edge) -> torch.dtype | None:
    """What this was cast from, if that is all that was done to it: by autocast, say."""
    if type(edge.node).__name__ != "ToCopyBackward0":
        return None
    (below,) = [e for e in children(edge.node) if e is not None]
    shape, dtype, device = meta(below)
    return dtype if (shape, device) == (meta(edge)[0], meta(edge)[2]) and dtype.is_floating_point else None


def turns(node: Node) -> bool:
    """Does this node transpose a matrix?"""
    name = type(node).__name__
    if name == "TBackward0":
        return True
    if name == "TransposeBackward0":
        return len(meta(Edge(node, 0))[0]) == 2 and (node._saved_dim0 - node._saved_dim1) % 2 == 1
    return name == "PermuteBackward0" and [d % 2 for d in node._saved_dims] == [1, 0] and len(node._saved_dims) == 2


def straight(route: Route, use: Use) -> bool:
    """Is the way from the parameter to this station's output linear in it? Then columns alone carry its curvature."""
    call = route.calls.get(use.key)
    if call is not None and not call.rule.linear:
        return False
    for edge in use.chain:
        shape, dtype, device = meta(edge)
        below = [e for e in children(edge.node) if e is not None]
        try:
            if not Bend(edge.node, {edge.nr: torch.ones(shape, dtype=dtype, device=device)}, below).flat:
                return False
        except RuntimeError:
            return False
    return True
