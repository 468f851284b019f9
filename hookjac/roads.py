"""Which road `hess_diag` takes to each parameter, and what that will cost.

columns   unit columns of every curved station walk down with its second derivative (`curvature`).
features  for a layer z = W x + b used once: H_ij,ij = sum_n x_j² [H_z]_ii, one Hessian-vector product for each
          feature of z, by double backward.
entries   one Hessian-vector product for each entry of the parameter. Always exact.

The bill is known before anything walks. One that could never be paid is refused.

N samples · D features of one sample at a tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hookjac import gathering, structure
from hookjac.curvature import bends, features
from hookjac.errors import HookjacError
from hookjac.factor import Factor
from hookjac.graph import Edge, edge_of, gradients
from hookjac.head import unit_columns
from hookjac.plan import Plan, reachable
from hookjac.products import Product, block, rows, second_backward
from hookjac.progress import Progress, Tick
from hookjac.quantity.record import Road
from hookjac.route import Columns, Group, Key, walk
from hookjac.streamed import Pairs, Reduce, Streamed, add_up, streams
from hookjac.uses import Use, can_mix, received, straight

_STATION = 1e5  # FLOPs that the overhead of one call is worth
_HELD = 1 << 22  # entries of a block that is held, for all quantities; larger ones are cheaper made anew for each
PRODUCT = 4.0  # a double backward, in walks over the same stations


@dataclass(eq=False)
class Roads:
    """How `hess_diag` will be found, and the bill."""

    road: dict[int, Road] = field(default_factory=dict)  # id of a parameter -> columns, features or entries
    why: dict[int, str] = field(default_factory=dict)
    crossings: dict[Key, list[tuple[int, Use]]] = field(
        default_factory=dict
    )  # uses above another of the same parameter
    curves: dict[Key, list[Edge]] = field(default_factory=dict)
    diagonal: set[Key] = field(default_factory=set)  # of those, the ones that curve entry by entry
    gathered: frozenset[Key] = frozenset()  # stations below which columns are gathered into a block
    active: set[Key] = field(default_factory=set)  # stations above parameters that go by columns
    cost: dict[int, float] = field(default_factory=dict)  # FLOPs of each parameter that goes by products
    columns: float = 0.0  # FLOPs of the columns, for all parameters together

    @property
    def flops(self) -> float:
        return self.columns + sum(self.cost.values())

    def going(self, road: Road) -> set[int]:
        return {p for p, r in self.road.items() if r == road}

    def by_products(self, params: Collection[int], road: Road, why: str) -> None:
        for p in params:
            self.road[p], self.why[p] = road, why


def choose(plan: Plan, edges: list[Edge], bare: list[str], wish: Road) -> Roads:
    """A road for every parameter: columns if they can be had and are cheaper than products, else products."""
    roads = Roads()
    if wish == "entries":
        roads.by_products(plan.names, "entries", "as asked for")
        candidates: set[int] = set()
    else:
        candidates = _candidates(plan, roads)
    inside = reachable(plan.route, [plan.route.key(e) for e in edges])  # what lies above is the loss, not the network
    candidates = _settle(plan, roads, candidates, inside)
    if bare:
        _without_columns(plan, roads, candidates, "the loss uses parameters before the model's output")
        candidates, roads.active, roads.curves, roads.crossings = set(), set(), {}, {}
    price = _Prices(plan)
    if candidates:
        found = gathering.best(plan, edges, roads.active, roads.curves, roads.crossings, roads.diagonal, price.station)
        roads.columns, roads.gathered = found.flops, found.at
        products = sum(price.product(p, _product_road(plan, p)) for p in candidates)
        if wish == "features" or (wish == "auto" and roads.columns > products):
            _without_columns(plan, roads, candidates, f"{products:.1e} FLOPs; columns {roads.columns:.1e}")
            roads.active, roads.curves, roads.crossings, roads.columns = set(), {}, {}, 0.0
    roads.cost = {p: price.product(p, r) for p, r in roads.road.items() if r != "columns"}
    return roads


def _candidates(plan: Plan, roads: Roads) -> set[int]:
    """Parameters that columns could serve."""
    found: set[int] = set()
    for p in plan.names:
        uses = plan.uses.of.get(p, [])
        if p in plan.glue or p in plan.top.entwined or (not uses and p in plan.top.direct):
            roads.by_products([p], "entries", "used where no rule explains it: one product for each entry")
        elif not uses:
            roads.road[p], roads.why[p] = "columns", "not reached from the loss: zero"
        elif not all(straight(plan.route, use) for use in uses):
            roads.by_products([p], "entries", "made into a weight by something that is not linear")
        elif (feeding := _feeding(plan, uses)) is None or not all(_can_cross(plan, use) for use in feeding):
            roads.by_products([p], "entries", "one use feeds another, and no rule has their mixed second derivative")
        else:
            found.add(p)
            roads.road[p], roads.why[p] = "columns", "rule"
            for use in feeding:
                roads.crossings.setdefault(use.key, []).append((p, use))
    return found


def _product_road(plan: Plan, p: int) -> Road:
    uses = plan.uses.of.get(p, [])
    return "features" if len(uses) == 1 and straight(plan.route, uses[0]) else "entries"


def _without_columns(plan: Plan, roads: Roads, params: Collection[int], why: str) -> None:
    for p in params:
        roads.by_products([p], _product_road(plan, p), why)


def _feeding(plan: Plan, uses: list[Use]) -> list[Use] | None:
    """The uses whose input depends on another use: there the parameter and the input, bilinear, have a mixed second
    derivative. None where two inputs of one station are the same parameter."""
    keys = {use.key for use in uses}
    if len(keys) < len(uses):
        return None
    found = []
    for use in uses if len(uses) > 1 else []:
        below = reachable(plan.route, [plan.route.key(e) for e in plan.uses.data(plan.route, use.key)])
        found += [] if below.isdisjoint(keys) else [use]
    return found


def _can_cross(plan: Plan, use: Use) -> bool:
    data = plan.uses.data(plan.route, use.key)
    return can_mix(plan.route, use) and len(data) == 1 and data[0] in plan.layout


def _settle(plan: Plan, roads: Roads, candidates: set[int], inside: set[Key]) -> set[int]:
    """Find the curved stations above the candidates. Those below one that cannot be parted go by products."""
    route = plan.route
    while candidates:
        roads.active = {k for k in route.needed(candidates) if k in plan.below}
        roads.curves, roads.diagonal, lost = {}, set(), set()
        if all(_flat(plan, roads.active, key) for key in roads.active & inside):
            return candidates  # piecewise linear, by its structure
        group = Group("loss", 1)
        seeds: dict[Edge, Columns] = {
            e: {group: g.detach().unsqueeze(0)} for e, g in zip(plan.top.frontier, plan.top.gradients, strict=True)
        }
        for stop in walk(route, seeds, plan.needed):
            if stop.key not in roads.active or stop.key not in inside:
                continue
            below = [e for e in plan.uses.data(route, stop.key) if route.key(e) in roads.active]
            below = list(dict.fromkeys(e for e in below if e.leaf is None))
            if not below:
                continue
            call = route.calls.get(stop.key)
            if call is not None:
                if call.rule.bend is not None:
                    roads.curves[stop.key] = below
                    roads.diagonal.add(stop.key)
            else:
                grads = {e.nr: c[group][0] for e, c in stop.incoming.items()}
                try:
                    bent = bends(plan, stop.key, grads, below)
                    if bent is not None:
                        roads.curves[stop.key] = below
                        roads.diagonal |= {stop.key} if bent == "diagonal" else set()
                except RuntimeError:
                    roads.curves[stop.key] = below
                    lost |= _params_below(plan, below) & candidates
            if stop.key in roads.curves and any(e not in plan.layout for e in below):
                lost |= _params_below(plan, below) & candidates
        if not lost:
            return candidates
        roads.by_products(lost, "entries", "below a curved step in which samples cannot be told apart")
        candidates = candidates - lost
    roads.active, roads.curves = set(), {}
    return candidates


def _flat(plan: Plan, active: Collection[Key], key: Key) -> bool:
    """Is this station known to have no second derivative in what it is given?"""
    route = plan.route
    call = route.calls.get(key)
    if call is not None:
        return call.rule.bend is None
    below = [e for e in plan.uses.data(route, key) if route.key(e) in active and e.leaf is None]
    return not below or structure.bend(key, route.raw(key, below)) == "none"


def piecewise_linear(plan: Plan, edges: Collection[Edge]) -> bool:
    """Is the network below these edges known, by its structure, to be linear in what each parameter makes of its input?
    Then its Hessian is its Gauss-Newton matrix."""
    for uses in plan.uses.of.values():
        if not all(straight(plan.route, use) for use in uses) or _feeding(plan, uses) != []:
            return False
    active = plan.route.needed(plan.names.keys()) & plan.below
    inside = reachable(plan.route, [plan.route.key(e) for e in edges])
    return all(_flat(plan, active, key) for key in active & inside)


def _params_below(plan: Plan, edges: Collection[Edge]) -> set[int]:
    keys = reachable(plan.route, [plan.route.key(e) for e in edges])
    return {p for p, uses in plan.uses.of.items() if any(use.key in keys for use in uses)}


# The bill ---------------------------------------------------------------------------------------------------


class _Prices:
    """FLOPs of one column through each station, roughly, and of all products for a parameter."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.station = {key: station(plan, key) for key in plan.route.order}
        self._above: dict[Key, float] = {}  # a product towards this station
        total = 0.0
        for key in plan.route.order:
            self._above[key] = total
            if key in plan.needed:
                total += self.station[key] + _STATION / 16
        self._whole = total

    def product(self, p: int, road: Road) -> float:
        plan = self._plan
        if road == "features":
            key, shape = plan.uses.of[p][0].key, plan.params[p].shape
            D = float(features(plan.route.outs[key][0], plan.N))
            products = D * PRODUCT * self._above[key]
            if len(shape) < 2 or shape[0] >= D:
                return products
            return products + 4 * plan.N * D * D * shape[1:].numel()  # several positions: all rows meet (`streamed`)
        return plan.params[p].numel() * PRODUCT * self._whole


def station(plan: Plan, key: Key) -> float:
    """FLOPs of one column of all samples through it, roughly."""
    size = float(sum(e.shape.numel() for e in plan.route.outs[key] if e.leaf is None))
    call = plan.route.calls.get(key)
    if call is not None:
        matrix = [v for v in call.values.values() if v.dim() > 1]
        return size * (2 * sum(m.shape[1:].numel() for m in matrix) + 2)
    if "mm" in type(key).__name__.lower():
        widths = [e.shape[-1] for e in plan.route.after[key] if e is not None and e.leaf is None and e.shape]
        return size * 2 * max(widths, default=1)
    if type(key).__name__.startswith(("ConvolutionBackward", "CudnnConvolution")):
        return size * 2 * key._saved_weight.shape[1:].numel()
    return size * 4


def refuse_endless(plan: Plan, roads: Roads, limit: float) -> None:
    """Better said now than after a week."""
    if roads.flops <= limit:
        return
    dearest = max(roads.cost, key=lambda p: roads.cost[p], default=None)
    where = ""
    if dearest is not None:
        where = (
            f" The dearest parameter is {plan.names[dearest]!r} {tuple(plan.params[dearest].shape)}, which goes by "
            f"{roads.road[dearest]} ({roads.why[dearest]}) for {roads.cost[dearest]:.0e}."
        )
    raise HookjacError(
        f"hess_diag would cost about {roads.flops:.0e} FLOPs, more than its limit of {limit:.0e}.{where} Ask for "
        "ggn_diag, freeze what you do not need (requires_grad=False) or list parameters in backward(inputs=...), take "
        "fewer samples; or raise the limit: hookjac.HessDiag(flop_limit=math.inf)."
    )


# Products ---------------------------------------------------------------------------------------------------


class Products:
    """What double backward gives each parameter that goes by it, made when it is asked for."""

    def __init__(self, plan: Plan, roads: Roads, progress: Progress) -> None:
        self._plan, self._roads, self._progress = plan, roads, progress
        self._heads: dict[Edge, Tensor] = {}
        self._blocks: dict[tuple[Edge, bool], Tensor] = {}
        self._pieces: dict[tuple[int, bool], tuple[Factor, Tensor]] = {}
        self._sums: dict[tuple[Edge, Reduce, tuple[int, ...] | None], dict[int, Tensor]] = {}

    def check(self) -> None:
        """Refuse at once what a second backward of the user's graph would get wrong, or not get."""
        chosen = [p for p in self._plan.names if self._roads.road[p] != "columns"]
        for p in chosen:
            with second_backward([self._plan.names[p]]):
                _demand_twice(self._plan, p)
        by_loss = [p for p in chosen if self._roads.road[p] == "features" or p in self._plan.top.entwined]
        unique = list(dict.fromkeys(self._edge(p) for p in by_loss))
        if not unique:
            return
        with second_backward([self._plan.names[p] for p in by_loss]), torch.enable_grad():
            found = gradients([self._plan.top.loss], unique, [None], create_graph=True)
        self._heads = dict(zip(unique, found, strict=True))

    def _edge(self, p: int) -> Edge:
        by_features = self._roads.road[p] == "features"
        return self._plan.route.outs[self._plan.uses.of[p][0].key][0] if by_features else edge_of(self._plan.params[p])

    def streamed(self, p: int, samples: Sequence[int] | None, *, full: bool) -> Streamed | None:
        """By features, where the block of them all would be large; None: use `piece`."""
        plan, edge, head = self._plan, self._edge(p), self._heads[self._edge(p)]
        D = features(edge, plan.N)
        if plan.N * D * D <= _HELD or not head.requires_grad:
            return None
        one = head.new_zeros(()).expand(1, *edge.shape)
        if not streams(self._receives(edge, one, p)[p], D, full=full):
            return None
        return Streamed(lambda reduce: self._sum(p, edge, reduce, samples))

    def _sum(self, p: int, edge: Edge, reduce: Reduce, samples: Sequence[int] | None) -> Tensor:
        """Layers' parameters share the products."""
        kind = edge, reduce, None if samples is None else tuple(samples)
        if p not in self._sums.get(kind, {}):
            names = [self._plan.names[p]]
            with second_backward(names), torch.enable_grad(), self._work(p) as tick:
                self._sums[kind] = add_up(self._pairs(p, edge, tick), reduce, samples)
        return self._sums[kind].pop(p)

    def _pairs(self, p: int, edge: Edge, tick: Tick) -> Pairs:
        served = {q for q in self._roads.going("features") if self._edge(q) == edge}
        for _, columns, made in rows(self._heads[edge], edge, self._plan.layout[edge], tick=tick):
            below = self._receives(edge, columns, None if len(served) > 1 else p)
            above = self._receives(edge, made, None if len(served) > 1 else p)
            yield {q: (below[q], above[q]) for q in served}

    def _receives(self, edge: Edge, columns: Tensor, only: int | None) -> dict[int, Factor]:
        plan = self._plan
        with torch.no_grad():
            return received(plan.route, plan.uses, plan.route.key(edge), columns, plan.layout[edge], only=only)

    def piece(self, p: int, *, full: bool) -> tuple[Factor, Tensor]:
        """By features: what unit columns of the layer's output become, and the loss's curvature there.

        full: off-diagonal entries of the parameter's block are wanted, too.
        """
        if (p, full) in self._pieces:
            return self._pieces[p, full]
        plan, edge = self._plan, self._edge(p)
        layout, head = plan.layout[edge], self._heads[edge]
        columns = unit_columns([edge], [layout], head.new_zeros(()))[0]
        factor = received(plan.route, plan.uses, plan.uses.of[p][0].key, columns, layout, only=p)[p]
        parted = factor.parted() and not full
        if (edge, parted) not in self._blocks:
            with second_backward([plan.names[p]]), torch.enable_grad(), self._work(p) as tick:
                self._blocks[edge, parted] = block(head, edge, layout, diagonal_only=parted, tick=tick)
        self._pieces[p, full] = factor, self._blocks[edge, parted]
        return self._pieces[p, full]

    def product(self, p: int, samples: Sequence[int] | None) -> Product:
        """By entries: the Hessian of all samples, or of some."""
        plan, edge = self._plan, edge_of(self._plan.params[p])
        part = plan.top

        def heads(which: Sequence[int] | None) -> Tensor:
            which = samples if which is None else which
            if p in part.entwined:
                if which is None:
                    return self._heads[edge]
                raise HookjacError(
                    f"parameter {plan.names[p]!r} scales the loss above the samples, so that its Hessian is no sum "
                    "over samples that could be told apart. hess_diag of all samples has no such limit."
                )
            masked = list(part.gradients)
            for k, g in enumerate(masked if which is not None else ()):
                times = torch.zeros(plan.N, dtype=g.dtype, device=g.device)
                for n in which or ():  # one may be listed twice
                    times[n] += 1
                times = times.view(plan.N, *[1] * (g.dim() - 1))
                masked[k] = torch.where(times > 0, g * times, torch.zeros_like(g))  # not NaN times zero
            return gradients(part.real, [edge], masked, create_graph=True)[0]

        alone = range(plan.N) if samples is None else samples
        return Product(plan.names[p], edge, heads, alone, lambda: self._work(p))

    def _work(self, p: int) -> contextlib.AbstractContextManager[Tick]:
        return self._progress.part(self._roads.cost[p])


def _demand_twice(plan: Plan, p: int) -> None:
    """A second backward of the user's graph towards this parameter must be right, not silently zero."""
    on_the_way = plan.route.needed({p})
    plan.route.demand_twice(on_the_way)
    if not plan.route.reopened.isdisjoint(on_the_way):
        raise RuntimeError("a reentrant checkpoint has none")
