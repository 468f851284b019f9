"""Which road every layer and every parameter takes, and why; and what quantities cost."""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hookjac import tables
from hookjac.graph import Edge
from hookjac.memory import said
from hookjac.plan import Plan
from hookjac.quantity.record import Quantity
from hookjac.roads import Roads, station
from hookjac.route import Key
from hookjac.rule import lookup
from hookjac.survey import Bill, Survey, survey


@dataclass(frozen=True)
class Row:
    """One parameter: its layer, the road of its first-order results, the road of `hess_diag`."""

    parameter: str
    shape: tuple[int, ...]
    layer: str
    road: str
    why: str
    hessian: str = ""


@dataclass(frozen=True)
class Layer:
    """One call of a layer, in the order of the forward; or "", all autograd nodes that no layer made.

    shape: of its output. road: the rule that serves it, or autograd's nodes. columns: "V" where columns of all samples
    pass it together, "V N" where each sample's go by themselves, "" where none do. flops: of one column (of all
    samples) through it. After a backward only layers that a rule serves are told from what lies between.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    road: str
    columns: str
    flops: float


class Explanation:
    """Rows for layers, parameters and quantities; printable, in a notebook, too.

    rows: of parameters. layers. quantities: the bill of every quantity asked for, by name: see `Bill`. flops: of
    `hess_diag`, where a road had to be chosen for it. What a bill says is counted from sizes: FLOPs of products by
    PyTorch's own formulas, one for each entry of all else. The time that they take is another matter: memory that is
    written for the first time, and overheads, are not in it.
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

    def _tables(self) -> list[tuple[tables.Cells, Sequence[int]]]:
        found: list[tuple[tables.Cells, Sequence[int]]] = []
        if self._asked:
            layers = [("layer", "", "output", "road", "columns", "FLOPs of one")]
            for a in self.layers:
                cost = f"{a.flops:.1e}" if a.columns else ""
                layers.append((a.layer or "(between)", a.kind, _sized(a.shape), a.road, a.columns, cost))
            found.append((layers, [5]))
        params = [("parameter", "shape", "layer", "road", "hess_diag", "why")]
        for r in self.rows:
            params.append((r.parameter, _sized(r.shape) or "()", r.layer, r.road, r.hessian, r.why))
        found.append((params, []))
        if self._asked:
            costs = [("quantity", "columns", "FLOPs", "backwards", "result", "columns take", "")]
            for b in self.quantities.values():
                note = "refused" if b.refused else b.note
                costs.append((
                    b.quantity, str(b.columns or ""), f"{b.flops:.1e}" if b.flops else "",
                    f"{b.backwards:.1f}" if b.flops else "", said(b.bytes) if b.bytes else "",
                    said(b.held) if b.columns else "", note,
                ))  # fmt: skip
            found.append((costs, [1, 2, 3, 4, 5]))
        return found

    def _refusals(self) -> list[str]:
        return [f"{b.quantity} would be refused: {b.refused}" for b in self.quantities.values() if b.refused]

    def __str__(self) -> str:
        return "\n\n".join([*(tables.plain(*table) for table in self._tables()), *self._refusals()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        refusals = [f"<p>{html.escape(line)}</p>" for line in self._refusals()]
        return "\n".join([*(tables.notebook(*table) for table in self._tables()), *refusals])


def _sized(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def tell(model: nn.Module, plan: Plan, roads: Roads | None, called: Sequence[Called] | None = None) -> Explanation:
    """What is known of a plan. roads: those of `hess_diag`. called: all calls of layers, where they were watched."""
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
            if roads.why[p] not in ("rule", why):
                why += f"; hess_diag: {roads.why[p]}"
        rows.append(Row(name, tuple(plan.params[p].shape), type(owner).__name__, road, why, hessian))
    return Explanation(rows, _layers(plan, called), survey(plan, roads), roads.flops if roads else 0.0)


def _why_not(owner: nn.Module) -> str:
    rule = lookup(owner)
    if rule is None:
        return f"no rule could serve this use of a {type(owner).__name__}"
    return f"the rule {rule.name!r} could not serve this call (used functionally, autocast, modified or samples moved)"


@dataclass(frozen=True)
class Called:
    """A call of a layer that was watched: the autograd nodes numbered `first` and up to `last` were made in it."""

    layer: str
    kind: str
    shape: tuple[int, ...]
    first: int
    last: int


def _layers(plan: Plan, called: Sequence[Called] | None) -> list[Layer]:
    """First to last; at the end, what lies between them. called: every layer's calls, where they were watched."""
    route = plan.route
    stations = [key for key in reversed(route.order) if any(e.leaf is None for e in route.outs[key])]
    if called is None:
        calls = [(key, route.calls[key]) for key in stations if key in route.calls]
        parts = [(call.name, type(call.module).__name__, tuple(key.shape), [key]) for key, call in calls]
        between = [key for key in stations if key not in route.calls]
    else:
        of, between = _by_calls(stations, called)
        parts = [(c.layer, c.kind, c.shape, keys) for c, keys in zip(called, of, strict=True)]
    found = [_layer(plan, *part) for part in parts]
    return [*found, _layer(plan, "", f"{len(between)} autograd nodes", (), between)] if between else found


def _by_calls(stations: Sequence[Key], called: Sequence[Called]) -> tuple[list[list[Key]], list[Key]]:
    """The stations made in each call, not in one within it, and those made in none."""
    of: list[list[Key]] = [[] for _ in called]
    between = []
    for key in stations:
        number = (key.node if isinstance(key, Edge) else key)._sequence_nr()
        inside = [k for k, c in enumerate(called) if c.first <= number < c.last]
        if inside:
            of[min(inside, key=lambda k: called[k].last - called[k].first)].append(key)
        else:
            between.append(key)
    return of, between


def _layer(plan: Plan, name: str, kind: str, shape: tuple[int, ...], keys: Sequence[Key]) -> Layer:
    route = plan.route
    rules = [route.calls[k].rule.name for k in keys if k in route.calls]
    rules += [use.rule for k in keys for _, use in plan.uses.at.get(k, ()) if k not in route.calls]
    roads = [f"rule {rule!r}" for rule in dict.fromkeys(rules)]
    if any(k not in route.calls and k not in plan.uses.at for k in keys):
        roads.append("autograd's nodes")
    columns = "V" if any(k in plan.through or k in plan.visit for k in keys) else ""
    if not columns and any(k in plan.masked for k in keys):
        columns = "V N"
    road = " and ".join(roads) or "hands its input on, or takes no part"
    return Layer(name, kind, shape, road, columns, sum(station(plan, k) for k in keys))
