"""The Hessian's diagonal: where the network bends, which road each parameter takes, and what it will cost.

H = sum over curved stations u of J_uᵀ M_u J_u, with J_u the Jacobian of what u is given in the parameters and
M_u the second derivative of u under the loss gradient; the loss itself is the first such station. Each is a
group of columns with a metric, and three roads lead to the diagonal:

columns   unit columns of each curved station walk down. As soon as they are more than the features they pass
          through, they are replaced by the unit columns of those features, with the dense symmetric block of
          what has come so far as their metric (`Bundle.reroot`).
features  for a layer z = W x + b used once: H_ij,ij = sum_n x_j² [H_z]_ii, one Hessian-vector product for each
          feature of z, by double backward.
entries   one Hessian-vector product for each entry of the parameter. Always exact.

N samples · D features of one sample at a tensor · V columns.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hookjac.errors import HookjacError
from hookjac.factor import quad_block
from hookjac.graph import Bend, Edge, edge_of, gradients
from hookjac.loss import hessian
from hookjac.plan import Plan, reachable
from hookjac.products import block, diagonal, second_backward
from hookjac.quantity import Road
from hookjac.route import Columns, Group, Key, Stop, walk
from hookjac.samples import Layout, agree

_BLOCK = 1 << 27  # entries of one dense block [N, D, D]: a gigabyte in float64
_MEMORY = 1 << 30  # entries of columns alive at once; beyond, products are the only way
_STATION = 1e5  # FLOPs that the overhead of one call is worth
_PRODUCT = 4.0  # a double backward, in walks over the same stations
_RATE = 5e9  # FLOPs a second, for telling the bill in time


@dataclass(eq=False)
class Curve:
    """A station that is not linear in these of its inputs."""

    edges: list[Edge]
    diagonal: bool


def cut(plan: Plan) -> tuple[list[Edge], list[str]]:
    """Where the loss ends and the network begins: the model's outputs that the loss uses.

    On a path that goes around those, the first layer output. Second, parameters met before any of them.
    """
    route, found, bare = plan.route, [], []
    seen: set[Edge] = set()
    stack = list(plan.top.frontier)
    while stack:
        edge = stack.pop()
        if edge in seen:
            continue
        seen.add(edge)
        key = route.key(edge)
        if key not in plan.needed:
            continue
        mark, layout = route.mark(edge), plan.layout.get(edge)
        leaf = route.leaf(key)
        if leaf is not None:
            bare += [plan.names[id(leaf)]] if id(leaf) in plan.names else []
        elif layout is not None and layout.plain and mark and (mark.output or key in route.calls):
            found.append(edge)
        else:
            stack += [after for after in route.after[key] if after is not None]
    return sorted(found, key=lambda e: not ((m := route.mark(e)) and m.selected)), bare


def loss_hessian(plan: Plan, edges: list[Edge]) -> Tensor:  # [N, C, C]
    route = plan.route
    stops = {route.key(e) for e in edges}
    network = reachable(route, stops)
    try:
        route.demand_twice(k for k in route.order if k in plan.needed and k not in network)
        return hessian(plan.top.loss, edges, plan.N)
    except RuntimeError as error:
        raise HookjacError(
            f"the loss cannot be differentiated twice in the model's output ({error}); curvature needs that."
        ) from error


def unit_columns(edges: Sequence[Edge], layouts: Sequence[Layout], like: Tensor) -> list[Tensor]:
    """Unit vectors of the joint features of several tensors, the same for every sample: [D, *tensor] each."""
    rests = [layout.split(like.expand(1, *edge.shape)).shape[2:] for edge, layout in zip(edges, layouts, strict=True)]
    sizes = [rest.numel() for rest in rests]
    eye = torch.eye(sum(sizes), dtype=like.dtype, device=like.device)
    found = []
    for edge, layout, rest, part in zip(edges, layouts, rests, eye.split(sizes, 1), strict=True):
        t = part.reshape(-1, 1, *rest).expand(-1, layout.N, *rest)
        found.append(layout.join(t, edge.shape))
    return found


def features(edge: Edge, N: int) -> int:
    return edge.shape.numel() // max(N, 1)


def bend_of(plan: Plan, key: Key, grads: dict[int, Tensor], edges: list[Edge]) -> tuple[list[Tensor], bool]:
    """M of a station: [*in] diagonals if it is diagonal, else rows [D, *in] for the joint unit columns."""
    call = plan.route.calls.get(key)
    if call is not None:
        assert call.rule.bend is not None
        return [call.rule.bend(call, next(iter(grads.values())))], True
    bend = Bend(key, grads, edges)
    found, is_diagonal = _try_diagonal(bend, grads, edges)
    if is_diagonal:
        return found, True
    like = next(iter(grads.values())).reshape(-1)[0]
    return bend.times(unit_columns(edges, [plan.layout[e] for e in edges], like)), False


def _try_diagonal(bend: Bend, grads: dict[int, Tensor], edges: list[Edge]) -> tuple[list[Tensor], bool]:
    """Row sums, and whether they are all there is: a random vector tells."""
    like = next(iter(grads.values()))
    probes = []
    for k, edge in enumerate(edges):
        r = torch.rand(edge.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64) + 0.5
        r = r.to(like.device, like.dtype)
        probes.append(torch.stack([torch.ones_like(r), r]))
    found = bend.times(probes)
    size = max((t.abs().max() for t in found if t.numel()), default=like.new_zeros(()))
    alike = all(agree(t[1], t[0] * p[1], size) for t, p in zip(found, probes, strict=True))
    return [t[0] for t in found], alike


@dataclass(eq=False)
class Roads:
    """How `hess_diag` will be found, and the bill."""

    road: dict[int, Road] = field(default_factory=dict)  # id of a parameter -> columns, features or entries
    why: dict[int, str] = field(default_factory=dict)
    curves: dict[Key, Curve] = field(default_factory=dict)
    active: set[Key] = field(default_factory=set)  # stations above parameters that go by columns
    flops: float = 0.0

    def going(self, road: Road) -> set[int]:
        return {p for p, r in self.road.items() if r == road}


def choose(plan: Plan, edges: list[Edge], bare: list[str], wish: Road) -> Roads:
    """A road for every parameter: columns if they can be had and are cheaper than products, else products."""
    roads = Roads()
    candidates: set[int] = set()
    for p in plan.names:
        uses = plan.uses.get(p, [])
        if p in plan.glue or (not uses and p in plan.top.direct):
            roads.road[p], roads.why[p] = "entries", "used outside a layer that a rule explains"
        elif not uses:
            roads.road[p], roads.why[p] = "columns", "not reached from the loss: zero"
        elif _feeds_itself(plan, uses):
            roads.road[p], roads.why[p] = "entries", "one use feeds another: the layer is bilinear in weight and input"
        else:
            candidates.add(p)
            roads.road[p], roads.why[p] = "columns", "rule"
    if bare:
        _by_products(plan, roads, candidates, "the loss uses parameters before the model's output")
        candidates = set()
    inside = reachable(plan.route, [plan.route.key(e) for e in edges])  # what lies above is the loss, not the network
    candidates = _settle(plan, roads, candidates, inside)
    columns = _columns_cost(plan, roads, edges)
    products = sum(_product_cost(plan, p, _product_road(plan, p)) for p in candidates)
    if wish == "features" or (wish == "auto" and columns > products):
        _by_products(plan, roads, candidates, f"{products:.1e} FLOPs; columns {columns:.1e}")
        roads.active, roads.curves, columns = set(), {}, 0.0
    if wish == "entries":
        for p in plan.names:
            roads.road[p], roads.why[p] = "entries", "as asked for"
        roads.active, roads.curves, columns = set(), {}, 0.0
    roads.flops = columns + sum(_product_cost(plan, p, r) for p, r in roads.road.items() if r != "columns")
    return roads


def _by_products(plan: Plan, roads: Roads, params: Collection[int], why: str) -> None:
    for p in params:
        roads.road[p], roads.why[p] = _product_road(plan, p), why


def _product_road(plan: Plan, p: int) -> Road:
    return "features" if len(plan.uses.get(p, [])) == 1 else "entries"


def _feeds_itself(plan: Plan, uses: list[Key]) -> bool:
    if len(uses) < 2:
        return False
    for key in uses:
        source = plan.route.after[key][0]
        if source is not None and reachable(plan.route, [plan.route.key(source)]) & set(uses):
            return True
    return False


def _settle(plan: Plan, roads: Roads, candidates: set[int], inside: set[Key]) -> set[int]:
    """Find the curved stations above the candidates. Those below one that cannot be parted go by products."""
    route = plan.route
    while True:
        roads.active = {k for k in route.needed(candidates) if k in plan.below} if candidates else set()
        roads.curves, lost = {}, set()
        if not candidates:
            return candidates
        group = Group("loss", 1)
        seeds: dict[Edge, Columns] = {
            e: {group: g.detach().unsqueeze(0)} for e, g in zip(plan.top.frontier, plan.top.gradients, strict=True)
        }
        for stop in walk(route, seeds, plan.needed):
            below = [e for e in route.after[stop.key] if e is not None and route.key(e) in roads.active]
            below = list(dict.fromkeys(e for e in below if e.leaf is None))
            if not below or stop.key not in roads.active or stop.key not in inside:
                continue
            call = route.calls.get(stop.key)
            if call is not None:
                if call.rule.bend is not None:
                    roads.curves[stop.key] = Curve(below, True)
            else:
                grads = {e.nr: c[group][0] for e, c in stop.incoming.items()}
                try:
                    curve = _curve(stop.key, grads, below)
                except RuntimeError:
                    curve = Curve(below, False)
                    lost |= _params_below(plan, below) & candidates
                if curve is not None:
                    roads.curves[stop.key] = curve
            if stop.key in roads.curves and any(e not in plan.layout for e in below):
                lost |= _params_below(plan, below) & candidates
        if not lost:
            return candidates
        _by_products(plan, roads, lost, "below a curved step in which samples cannot be told apart")
        candidates = candidates - lost


def _curve(key: Key, grads: dict[int, Tensor], edges: list[Edge]) -> Curve | None:
    bend = Bend(key, grads, edges)
    if bend.flat:
        return None
    found, is_diagonal = _try_diagonal(bend, grads, edges)
    if is_diagonal and all(bool((t == 0).all()) for t in found):
        return None
    return Curve(edges, is_diagonal)


def _params_below(plan: Plan, edges: Collection[Edge]) -> set[int]:
    keys = reachable(plan.route, [plan.route.key(e) for e in edges])
    return {p for p, uses in plan.uses.items() if any(k in keys for k in uses)}


# The bill ---------------------------------------------------------------------------------------------------


def work(plan: Plan, key: Key) -> float:
    """FLOPs of one column through one station, roughly."""
    size = float(sum(e.shape.numel() for e in plan.route.outs[key] if e.leaf is None))
    call = plan.route.calls.get(key)
    if call is not None:
        matrix = [v for v in call.values.values() if v.dim() > 1]
        return size * (2 * sum(m[0].numel() for m in matrix) + 2)
    if "mm" in type(key).__name__.lower():
        widths = [e.shape[-1] for e in plan.route.after[key] if e is not None and e.leaf is None and e.shape]
        return size * 2 * max(widths, default=1)
    return size * 4


def worth_rerooting(size: int, D: int, N: int) -> bool:
    """More columns than features: the features' own unit columns and one dense block are fewer."""
    return size > D and N * D * D <= _BLOCK


def _columns_cost(plan: Plan, roads: Roads, edges: list[Edge]) -> float:
    """The walk of `Bundle`, in numbers."""
    route, N = plan.route, plan.N
    alive: dict[Edge, int] = {}
    total, most = 0.0, 0.0
    size = sum(features(e, N) for e in edges)
    for edge in edges:
        alive[edge] = 1
    for key in route.order:
        here = [e for e in route.outs[key] if e in alive]
        if key not in roads.active or not here:
            continue
        for e in here:
            del alive[e]
        total += size * work(plan, key) + _STATION
        alive.update({e: 1 for e in route.after[key] if e is not None and route.key(e) in roads.active})
        curve = roads.curves.get(key)
        if curve is not None:
            size += sum(features(e, N) for e in curve.edges)
        D = sum(features(e, N) for e in alive)
        if D and worth_rerooting(size, D, N):
            total += 2.0 * N * min(size, D) * D * D
            size = D
        most = max(most, size * sum(float(e.shape.numel()) for e in alive))
    return float("inf") if most > _MEMORY else total


def _product_cost(plan: Plan, p: int, road: Road) -> float:
    route = plan.route
    if road == "entries" or p not in plan.uses:
        stations = [k for k in route.order if k in plan.needed]
        count = plan.params[p].numel()
    else:
        (key,) = plan.uses[p]
        stations = [k for k in route.order[: route.order.index(key)] if k in plan.needed]
        count = features(route.outs[key][0], plan.N)
    return count * _PRODUCT * (sum(work(plan, k) for k in stations) + _STATION * len(stations) / 16)


# The walk ---------------------------------------------------------------------------------------------------


class Bundle:
    """The groups of columns that make up the Hessian, while they walk."""

    def __init__(self, plan: Plan, roads: Roads, first: Group, keep: bool) -> None:
        self.plan, self.roads = plan, roads
        self.members: list[Group] = [first]
        self._keep = {first} if keep else set()  # another quantity reads these columns further down

    def pass_station(self, stop: Stop, loss: Group, *, may_reroot: bool) -> None:
        """Add what this station bends, then drop to fewer columns where that is possible."""
        route, N = self.plan.route, self.plan.N
        for edge, columns in stop.outgoing.items():
            if route.key(edge) not in self.roads.active:
                for group in self.members:
                    if group not in self._keep:
                        columns.pop(group, None)
        curve = self.roads.curves.get(stop.key)
        if stop.key not in self.roads.active:
            return
        alive = [e for e in {**stop.waiting, **stop.outgoing} if self._carries(stop, e)]
        if curve is not None:
            alive += [e for e in curve.edges if e not in alive]
        if not alive:
            return
        D = sum(features(e, N) for e in alive)
        size = sum(g.size for g in self.members)
        metric = None
        if curve is not None:
            grads = {e.nr: c[loss][0] for e, c in stop.incoming.items() if loss in c}
            metric = self._metric(stop.key, grads, curve)
            size += metric.shape[1] if metric is not None else 0
        if may_reroot and worth_rerooting(size, D, N) and all(e in self.plan.layout for e in alive):
            self._reroot(stop, alive, curve, metric)
        elif curve is not None and metric is not None:
            self._add(stop, curve.edges, metric, f"bend {len(self.members)}")

    def _carries(self, stop: Stop, edge: Edge) -> bool:
        if self.plan.route.key(edge) not in self.roads.active:
            return False
        return any(g in c for c in (stop.waiting.get(edge, {}), stop.outgoing.get(edge, {})) for g in self.members)

    def _metric(self, key: Key, grads: dict[int, Tensor], curve: Curve) -> Tensor | None:
        if not grads:
            return None
        found, is_diagonal = bend_of(self.plan, key, grads, curve.edges)
        layouts = [self.plan.layout[e] for e in curve.edges]
        if is_diagonal:
            rows = [la.features(t.unsqueeze(0))[0] for la, t in zip(layouts, found, strict=True)]
            metric = torch.cat(rows, 1)  # [N, D]
        else:
            rows = [la.features(t) for la, t in zip(layouts, found, strict=True)]
            metric = torch.cat(rows, 2).transpose(0, 1)  # [N, D, D]
            metric = (metric + metric.transpose(1, 2)) / 2
        return metric if bool((metric != 0).any()) else None

    def _add(self, stop: Stop, edges: list[Edge], metric: Tensor, name: str) -> None:
        group = Group(name, metric.shape[1], metric)
        columns = unit_columns(edges, [self.plan.layout[e] for e in edges], metric.reshape(-1)[0])
        for edge, t in zip(edges, columns, strict=True):
            stop.outgoing.setdefault(edge, {})[group] = t
        self.members.append(group)

    def _reroot(self, stop: Stop, alive: list[Edge], curve: Curve | None, metric: Tensor | None) -> None:
        """All that has come so far, as one dense block on the unit columns of the tensors it is passing."""
        N, layout = self.plan.N, self.plan.layout
        sizes = [features(e, N) for e in alive]
        total: Tensor | None = None
        for group in self.members:
            parts = []
            for edge, size in zip(alive, sizes, strict=True):
                found = [c[group] for c in (stop.waiting.get(edge, {}), stop.outgoing.get(edge, {})) if group in c]
                if found:
                    parts.append(layout[edge].features(sum(found[1:], found[0])))
                else:
                    assert group.metric is not None
                    parts.append(group.metric.new_zeros(group.size, N, size))
            assert group.metric is not None
            block_ = quad_block(parts[0] if len(parts) == 1 else torch.cat(parts, 2), group.metric)
            total = block_ if total is None else total + block_
        assert total is not None
        if curve is not None and metric is not None:
            where = torch.cat(
                [torch.arange(sizes[k], device=total.device) + sum(sizes[:k]) for k in map(alive.index, curve.edges)]
            )
            bent = torch.diag_embed(metric) if metric.dim() == 2 else metric
            total = total.clone()
            total[:, where[:, None], where[None, :]] += bent
        for edge in alive:
            for columns in (stop.waiting.get(edge, {}), stop.outgoing.get(edge, {})):
                for group in self.members:
                    if group not in self._keep:
                        columns.pop(group, None)
        self.members = []
        self._add(stop, alive, total, "block")


def by_products(plan: Plan, roads: Roads) -> dict[int, Tensor]:
    """The diagonals of all parameters that go by double backward."""
    found: dict[int, Tensor] = {}
    chosen = [p for p in plan.names if roads.road[p] != "columns"]
    if not chosen:
        return found
    edges: list[Edge] = []
    for p in chosen:
        edges.append(plan.route.outs[plan.uses[p][0]][0] if roads.road[p] == "features" else edge_of(plan.params[p]))
    unique = list(dict.fromkeys(edges))
    with second_backward([plan.names[p] for p in chosen]):
        first = gradients([plan.top.loss], unique, [None], create_graph=True)
    heads = dict(zip(unique, first, strict=True))
    blocks: dict[Edge, Tensor] = {}
    for p, edge in zip(chosen, edges, strict=True):
        with second_backward([plan.names[p]]):
            plan.route.demand_twice(plan.route.needed({p}))
            found[p] = _by_product(plan, roads.road[p], p, edge, heads[edge], blocks)
    return found


def _by_product(plan: Plan, road: Road, p: int, edge: Edge, head: Tensor, blocks: dict[Edge, Tensor]) -> Tensor:
    if road == "entries":
        return diagonal(head, edge)
    (key,) = plan.uses[p]
    call, layout = plan.route.calls[key], plan.layout[edge]
    assert call.rule.factors is not None
    columns = unit_columns([edge], [layout], head.detach().reshape(-1)[0])[0]
    name = next(k for k, q in call.params.items() if id(q) == p)
    if edge not in blocks:
        spread = layout.split(columns[:1]).dim() > 3  # several positions share the weight
        blocks[edge] = block(head, edge, layout, diagonal_only=not spread)
    return call.rule.factors(call, columns, layout)[name].quad(blocks[edge])
