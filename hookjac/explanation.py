"""Which road every layer and every parameter takes, and why; and what quantities cost."""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hookjac.called import Called, listed
from hookjac.checkpoints import is_hidden
from hookjac.graph import Edge
from hookjac.memory import said
from hookjac.plan import Plan
from hookjac.quantity.record import Quantity
from hookjac.roads import Roads, station
from hookjac.route import Key
from hookjac.rule import claimed, lookup
from hookjac.survey import Bill, Survey, survey
from hookjac.tables import Table


@dataclass(frozen=True)
class Row:
    """One parameter: the class of its layer, the road of its first-order results and why, the road of `hess_diag`.

    road: "rule": `why` names the closed forms that give each sample's part, of its layer or of autograd's nodes;
    "masked columns": no rule helps, and columns with one sample's rows each go down to it (N times the work of that
    stretch); "rule + masked columns": it is used in both ways; "shared equally": only a penalty reaches it; "zero".
    hessian: "columns", "features" or "entries" (see `HessDiag`), where a road was chosen for it; else "".
    """

    parameter: str
    shape: tuple[int, ...]
    layer: str
    road: str
    why: str
    hessian: str = ""


@dataclass(frozen=True)
class Layer:
    """One call of a layer, in the order of the forward; or "", all autograd nodes that no layer made.

    A layer is a module without children, or with parameters of its own; those that nobody called come last. shape: of
    its output (of the first tensor in it). road: the rule that serves it, or autograd's nodes, or none. why: it is that
    one. columns: "V" where columns of all samples pass it together, "V N" where each sample's go by themselves, ""
    where none do. flops: of one column (of all samples) through it.

    A quick step, whose columns go by what is known of the graphs of a model that was met before, looks at nodes only.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    road: str
    columns: str
    flops: float
    why: str = ""


class Explanation:
    """Rows for layers, parameters and quantities; printable, in a notebook, too.

    rows: of parameters, a `Row` each. layers: a `Layer` for each call of one. quantities: by name, the `Bill` of each
    that was asked for. flops: of `hess_diag`, where a road had to be chosen for it. What a bill says is counted from
    sizes: FLOPs of products by PyTorch's own formulas, one for each entry of all else. The time that they take is
    another matter: memory that is written for the first time, and overheads, are not in it.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        layers: Sequence[Layer] = (),
        sizes: Survey | None = None,
        flops: float = 0.0,
        asked: Sequence[Quantity] = (),
        refused: Mapping[str, str] | None = None,
    ) -> None:
        self.rows, self.layers, self.flops = list(rows), list(layers), flops
        self._sizes, self._asked, self._refused = sizes, list(asked), dict(refused or {})

    def asking(self, quantities: Sequence[Quantity], refused: Mapping[str, str] | None = None) -> Explanation:
        """The same, with the bills of these. refused: why some would be, by name."""
        return Explanation(self.rows, self.layers, self._sizes, self.flops, quantities, refused)

    @functools.cached_property
    def quantities(self) -> dict[str, Bill]:
        """The bill of every quantity asked for, by name."""
        if self._sizes is None:
            return {}
        return {q.name: self._sizes.bill(q, self._refused.get(q.name, "")) for q in self._asked}

    def to_dict(self) -> dict[str, Any]:
        """{"parameters": by name, "layers": in order, "quantities": by name, with the part of each parameter}."""
        return {
            "parameters": {row.parameter: asdict(row) for row in self.rows},
            "layers": [asdict(layer) for layer in self.layers],
            "quantities": {name: asdict(bill) for name, bill in self.quantities.items()},
        }

    def _tables(self) -> list[Table]:
        found: list[Table] = []
        if self._asked:
            layers = [("layer", "class", "output", "road", "columns", "FLOPs of one", "why")]
            for a in self.layers:
                cost = f"{a.flops:.1e}" if a.columns else ""
                layers.append((a.layer or "(between)", a.kind, _sized(a.shape), a.road, a.columns, cost, a.why))
            found.append(Table(layers, right=[5], prose=[3, 6]))
        params = [("parameter", "shape", "layer", "road", "hess_diag", "why")]
        for r in self.rows:
            params.append((r.parameter, _sized(r.shape) or "()", r.layer, r.road, r.hessian, r.why))
        found.append(Table(params, prose=[5]))
        if self._asked:
            costs = [("quantity", "columns", "FLOPs", "backwards", "result", "columns take", "")]
            for b in self.quantities.values():
                times = f"{b.backwards:.1f}" if b.flops and b.backwards is not None else ""
                note = "refused" if b.refused else b.note
                costs.append((
                    b.quantity, str(b.columns or ""), f"{b.flops:.1e}" if b.flops else "", times,
                    said(b.bytes) if b.bytes else "", said(b.held) if b.columns else "", note,
                ))  # fmt: skip
            found.append(Table(costs, right=[1, 2, 3, 4, 5]))
        return found

    def _refusals(self) -> list[str]:
        return [f"{b.quantity} would be refused: {b.refused}" for b in self.quantities.values() if b.refused]

    def __str__(self) -> str:
        return "\n\n".join([*(table.plain() for table in self._tables()), *self._refusals()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        refusals = [f"<p>{html.escape(line)}</p>" for line in self._refusals()]
        return "\n".join([*(table.notebook() for table in self._tables()), *refusals])


def _sized(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def tell(model: nn.Module, plan: Plan, roads: Roads | None) -> Explanation:
    """What is known of a plan. roads: those of `hess_diag`."""
    owners = {id(p): m for m in model.modules() for p in m._parameters.values() if p is not None}
    rows = []
    for p, name in plan.names.items():
        uses = plan.uses.of.get(p, [])
        owner = owners.get(p, model)  # which may list what lies in no layer
        if uses and p in plan.glue:
            road, why = "rule + masked columns", f"used by {uses[0].rule} and elsewhere"
        elif uses:
            road, why = "rule", ", ".join(dict.fromkeys(use.rule for use in uses))
            why += f", {len(uses)} uses" if len(uses) > 1 else ""
        elif p in plan.glue:
            road, why = "masked columns", _why_not(owner)
        elif p in plan.top.direct:
            road, why = "shared equally", "only reached through a term of the loss that passes no sample"
        else:
            road, why = "zero", "not reached from the loss: unused in this forward, or detached"
        if p in plan.top.direct and road != "shared equally":
            why += "; a penalty on it is shared equally"
        hessian = ""
        if roads is not None:
            hessian = roads.road[p]
            if roads.why[p] not in ("rule", why) and road != "zero":
                why += f"; hess_diag: {roads.why[p]}"
        rows.append(Row(name, tuple(plan.params[p].shape), type(owner).__name__, road, why, hessian))
    return Explanation(rows, _layers(plan), survey(plan, roads), roads.flops if roads else 0.0)


def _why_not(owner: nn.Module) -> str:
    rule = lookup(owner)
    if rule is None:
        return f"no rule could serve this use of {type(owner).__name__}"
    how = "used functionally, compiled, autocast, modified, or samples moved"
    return f"the rule {rule.name!r} could not serve this call ({how})"


def _layers(plan: Plan) -> list[Layer]:
    """First to last; at the end, what lies between them."""
    route = plan.route
    modules = {name: module for module, name in route.tape.names.items()}
    called = listed(route.trails, reopened=bool(route.reopened))
    called = [call for call in called if call.name in modules and _is_layer(modules[call.name])]
    of: list[list[Key]] = [[] for _ in called]
    around, between = set[int](), list[Key]()
    for key in reversed(route.order):
        if all(e.leaf is not None for e in route.outs[key]):
            continue
        number = _number(key)
        inside = [k for k, c in enumerate(called) if c.first <= number < c.last]
        if not inside:
            between.append(key)
            continue
        innermost = min(inside, key=lambda k: called[k].last - called[k].first)
        of[innermost].append(key)
        around.update({*inside} - {innermost})
    layers = []
    for k, (call, keys) in enumerate(zip(called, of, strict=True)):
        none = "" if keys else _WITHIN if k in around else _UNREACHED if call.first < call.last else _UNRECORDED
        layers.append(_layer(plan, call, modules[call.name], keys, none))
    for key in [k for k in between if k in route.calls]:  # a call that no trail tells of
        note = route.calls[key]
        seen = Called(note.name, type(note.module).__name__, tuple(key.shape), _number(key), _number(key) + 1)
        layers.append(_layer(plan, seen, note.module, [key]))
        between.remove(key)
    seen_names = {layer.layer for layer in layers}
    for name, module in modules.items():
        if _is_layer(module) and (name or "(model)") not in seen_names:
            layers.append(Layer(name or "(model)", type(module).__name__, (), "none", "", 0.0, _UNSEEN))
    if between:
        nodes = f"{len(between)} autograd node{'s' if len(between) > 1 else ''}"
        layers.append(_row(plan, Called("", nodes, (), 0, 0), "made in no layer", between))
    return layers


_WITHIN = "all of it is of layers within"
_UNREACHED = "the loss does not depend on it"
_UNSEEN = "not called: unused, or others use its parameters, or compiled"
_UNRECORDED = "no graph: frozen, no grad, or its input handed on"


def _is_layer(module: nn.Module) -> bool:
    """Has parameters of its own, or no children: all else only calls others."""
    return any(p is not None for p in module._parameters.values()) or not any(True for _ in module.children())


def _number(key: Key) -> int:
    """By which autograd counts its nodes in the order they are made."""
    return int((key.node if isinstance(key, Edge) else key)._sequence_nr())


def _walked(plan: Plan, keys: Sequence[Key]) -> Sequence[Key]:
    """Those that columns meet, if they meet any: not what turns a weight, say, before it is used."""
    return [k for k in keys if k in plan.through or k in plan.visit or k in plan.masked] or keys


def _layer(plan: Plan, call: Called, module: nn.Module, keys: Sequence[Key], none: str = "") -> Layer:
    """none: why it has no station."""
    route, reasons, keys = plan.route, [none] if none else [], _walked(plan, keys)
    passed = any(k in plan.through or k in plan.visit or k in plan.masked for k in keys)
    kinds = dict.fromkeys(type(k).__name__ for k in keys if k in plan.uses.at and k not in route.calls)
    if any(k in route.calls for k in keys):
        reasons.append(claimed(module)[1])
        if not all(k in route.calls for k in keys):
            reasons.append("nodes of hooks beside it")
    elif passed:
        reasons += [f"by its node{'s' if len(kinds) > 1 else ''} {', '.join(kinds)}"] if kinds else []
        reasons.append(_why_by_nodes(plan, module, keys))
    if keys and not any(k in plan.needed for k in keys):
        reasons.append("no trainable parameter in it or below")
    elif keys and not passed:
        chains = {edge.node for uses in plan.uses.of.values() for use in uses for edge in use.chain}
        alone = any(k in chains for k in keys)
        reasons.append("made of weights alone: served where it is used" if alone else "no column passes it")
    return _row(plan, call._replace(name=call.name or "(model)"), "; ".join(reasons), keys)


def _why_by_nodes(plan: Plan, module: nn.Module, keys: Sequence[Key]) -> str:
    """Why no rule for its class serves (all of) a layer."""
    route = plan.route
    rule, why = claimed(module)
    if rule is None:
        return why
    if not route.tape.rules:
        return "quick step: nodes only"
    nodes = [key for key in keys if key not in route.calls]
    edges = [e for key in nodes for e in route.outs[key]]
    if any(e in route.rejected for e in edges):
        return f"samples lie where rule {rule.name!r} cannot follow"
    if any((mark := route.mark(e)) is not None and mark.note is not None for e in edges):
        return "its input or weight was modified in place"
    if any(is_hidden(node) for node in nodes):
        return "within a checkpoint"
    return "called with several inputs, or under autocast"


def _row(plan: Plan, call: Called, why: str, keys: Sequence[Key]) -> Layer:
    route = plan.route
    rules = [route.calls[k].rule.name for k in keys if k in route.calls]
    rules += [use.rule for k in keys for _, use in plan.uses.at.get(k, ()) if k not in route.calls]
    named = list(dict.fromkeys(map(repr, rules)))
    roads = [f"rule{'s' if len(named) > 1 else ''} {', '.join(named)}"] if named else []
    if any(k not in route.calls and k not in plan.uses.at for k in keys):
        roads.append("autograd's nodes")
    columns = "V" if any(k in plan.through or k in plan.visit for k in keys) else ""
    if not columns and any(k in plan.masked for k in keys):
        columns = "V N"
    road = " and ".join(roads) or "none"
    return Layer(call.name, call.kind, tuple(call.shape), road, columns, sum(station(plan, k) for k in keys), why)
