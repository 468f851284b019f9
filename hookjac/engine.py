"""The walk: columns from the loss and the outputs down to the parameters, and what each parameter makes of them.

It knows neither layers nor quantities: rules answer for layers, autograd's nodes for all else, quantities say
which columns they want and reduce what arrives.

V columns · N samples · K = V N columns with one sample's rows each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from hookjac.errors import HookjacError
from hookjac.factor import Dense, Factor, total
from hookjac.graph import Edge, edge_of, saved
from hookjac.limits import refuse_large_results
from hookjac.operator import Curvature, Quiet
from hookjac.plan import Plan
from hookjac.products import Product
from hookjac.progress import Progress
from hookjac.quantity.record import (
    GGN,
    Averaged,
    Diagonal,
    Graph,
    Hessian,
    Loss,
    Probes,
    Quantity,
    Received,
    Sampled,
    demand_samples,
)
from hookjac.roads import Products
from hookjac.route import Columns, Group, Stop, accumulate, walk
from hookjac.seeds import Seeds
from hookjac.streamed import Streamed
from hookjac.structured import JacTensor
from hookjac.uses import received

_CHUNK = 1 << 24  # entries of one tensor of masked columns

Results = dict[int, dict[str, Any]]  # id of a parameter -> quantity -> value


@dataclass(eq=False)
class Receipt:
    """What one parameter has received so far."""

    factors: dict[Group, list[Factor]] = field(default_factory=dict)  # of each use
    open: int = 0  # uses that have not reported yet
    crossings: list[tuple[Group, Factor]] = field(default_factory=list)

    def take(self, group: Group, factor: Factor) -> None:
        self.factors.setdefault(group, []).append(factor)


def demand_possible(plan: Plan, quantities: Sequence[Quantity]) -> None:
    """Refuse samples that are not there, and results that would not fit."""
    for q in quantities:
        demand_samples(q, plan.N)
    params = list(plan.params.values())
    refuse_large_results(quantities, params, [plan.names[id(p)] for p in params], plan.N, plan.out_shape.numel())


class Walk:
    """One backward's worth of derivatives."""

    def __init__(
        self,
        plan: Plan,
        quantities: Sequence[Quantity],
        quiet: Quiet,
        *,
        create_graph: bool = False,
    ) -> None:
        self.plan, self.quantities, self._quiet, self._create_graph = plan, quantities, quiet, create_graph
        self.operators: dict[str, Curvature] = {}
        self.probed: dict[Probes, dict[int, tuple[Tensor, Tensor]]] = {}
        self.results: Results = {p: {} for p in plan.names}
        self.receipts = {p: Receipt(open=len(plan.uses.of.get(p, [])) + (p in plan.glue)) for p in plan.names}
        self.out_shape = plan.out_shape
        self.direct = {p: self._penalty(p, g) for p, g in plan.top.direct.items()}
        demand_possible(plan, quantities)

    def _penalty(self, p: int, gradient: Tensor) -> Product:
        return Product(self.plan.names[p], edge_of(self.plan.params[p]), lambda which: gradient)

    def run(self) -> Results:
        asked = {q.wish: q.name for q in reversed(self.quantities)}
        if self._create_graph:
            self.plan.demand_graph()
        with torch.set_grad_enabled(self._create_graph):
            self.seeds = Seeds(self.plan, asked)
            for wish in asked:
                if isinstance(wish, Graph):
                    self.operators[wish.curved] = Curvature(wish.curved, self.plan, self.seeds.edges, self._quiet)
                elif isinstance(wish, Probes):
                    self.probed[wish] = self._probe(wish)
            roads = self.seeds.roads
            curved = sum(isinstance(q.wish, Hessian) for q in self.quantities)
            with Progress("hess_diag, FLOPs", curved * sum(roads.cost.values()) if roads else 0.0) as progress:
                self.products = Products(self.plan, roads, progress) if roads else None
                if self.products is not None:
                    self.products.check()
                self._walk()
        return self.results

    def _probe(self, wish: Probes) -> dict[int, tuple[Tensor, Tensor]]:
        """Random signs [K, *p] for all parameters together, and what the Hessian makes of them."""
        signs = {}
        for p, t in self.plan.params.items():
            device = wish.generator.device if wish.generator is not None else t.device
            drawn = torch.randint(0, 2, (wish.samples, *t.shape), generator=wish.generator, device=device)
            signs[p] = drawn.to(device=t.device, dtype=t.dtype) * 2 - 1
        found = Curvature("hessian", self.plan, (), self._quiet).products(signs)
        return {p: (signs[p], found[p].detach()) for p in signs}

    def _walk(self) -> None:
        for p, receipt in self.receipts.items():
            if not receipt.open:
                self._finish(p)
        if self.seeds.start:
            plan, sources = self.plan, dict[Edge, Columns]()
            parted, graph = plan.uses.parted, self._create_graph
            for stop in walk(plan.route, self.seeds.start, plan.through, plan.visit, parted, graph):
                self._arrive(stop, sources)
            self._walk_masked(sources)
        for p, receipt in self.receipts.items():
            if receipt.open:  # asked-for columns never met it: they do not depend on it
                self._finish(p)

    # On the way -------------------------------------------------------------------------------------------

    def _arrive(self, stop: Stop, sources: dict[Edge, Columns]) -> None:
        plan, seeds = self.plan, self.seeds
        bundle, roads = seeds.bundle, seeds.roads
        used = plan.uses.at.get(stop.key)
        if used:
            (edge,) = stop.incoming
            for group, G in stop.incoming[edge].items():
                for p, factor in received(plan.route, plan.uses, stop.key, G, plan.layout[edge]).items():
                    if p in self.receipts and group.owner in (None, p):
                        self.receipts[p].take(group, factor)
            if bundle is not None and roads is not None:
                for p, use in roads.crossings.get(stop.key, ()):
                    if p in roads.going("columns") and (made := bundle.cross(stop, p, use, seeds.loss)):
                        self.receipts[p].crossings.append(made)
            for p, _ in used:
                self.receipts[p].open -= 1
                if not self.receipts[p].open:
                    self._finish(p)
        if stop.key in plan.masked:
            for edge, columns in stop.incoming.items():
                if edge in plan.layout:
                    sources[edge] = {g: t for g, t in columns.items() if seeds.travelling(g)}
        if bundle is not None:
            bundle.pass_station(stop, seeds.loss, may_reroot=not self._half_done())
        for step in seeds.stepwise.values():
            step.pass_station(stop)

    def _half_done(self) -> bool:
        """Is a parameter between two of its uses? Then the columns of the first must meet those of the second."""
        assert self.seeds.roads is not None
        return any(self.receipts[p].factors and self.receipts[p].open for p in self.seeds.roads.going("columns"))

    def _walk_masked(self, sources: dict[Edge, Columns]) -> None:
        """Columns with one sample's rows each, from where samples can be parted to the parameters no rule explains."""
        plan, route = self.plan, self.plan.route
        if not sources:
            return
        groups = list(dict.fromkeys(g for columns in sources.values() for g in columns))
        leaves = {k for k in route.order if id(route.leaf(k)) in plan.glue}
        with Progress("masked columns", plan.N * sum(group.size for group in groups)) as progress:
            for group in groups:
                found: dict[int, list[Tensor]] = {}
                largest = max(t.numel() for columns in sources.values() for g, t in columns.items() if g is group)
                step = max(1, _CHUNK // max(1, largest))
                for start in range(0, plan.N, step):
                    stop_at = min(plan.N, start + step)
                    part = Group(group.name, group.size * (stop_at - start))
                    with progress.part(part.size):
                        got = self._masked_chunk(sources, group, part, start, stop_at, leaves)
                    for p in plan.glue:
                        t, like = got.get(p), plan.params[p]
                        if t is None:
                            t = torch.zeros(part.size, *like.shape, dtype=like.dtype, device=like.device)
                        found.setdefault(p, []).append(rearrange(t, "(n v) ... -> n v ...", v=group.size))
                for p, parts in found.items():
                    dense = parts[0] if len(parts) == 1 else torch.cat(parts)
                    self.receipts[p].take(group, Dense(dense.transpose(0, 1), fresh=len(parts) > 1))
        for p in plan.glue:
            self.receipts[p].open = 0
            self._finish(p)

    def _masked_chunk(
        self, sources: dict[Edge, Columns], group: Group, part: Group, start: int, stop: int, leaves: set[object]
    ) -> dict[int, Tensor]:
        plan, route = self.plan, self.plan.route
        masked = {
            edge: {part: self._mask(columns[group], edge, start, stop)}
            for edge, columns in sources.items()
            if group in columns
        }
        found: dict[int, Columns] = {}
        buffers: dict[Edge, Columns] = masked
        for key in route.order:
            if key in leaves:
                for edge in route.outs[key]:
                    if edge in buffers:
                        leaf = route.leaf(key)
                        accumulate(found.setdefault(id(leaf), {}), part, buffers.pop(edge)[part])
                continue
            if key not in plan.masked:
                continue
            incoming = {e: buffers.pop(e) for e in route.outs[key] if e in buffers}
            if not incoming:
                continue
            into = leaves | {k for e in plan.uses.data(route, key) if (k := route.key(e)) in plan.masked}
            for edge, columns in route.step(key, incoming, into, plan.uses.parted.get(key, ())).items():
                if route.key(edge) in leaves or edge not in plan.layout:
                    for g, t in columns.items():
                        accumulate(buffers.setdefault(edge, {}), g, t)
        return {p: columns[part] for p, columns in found.items()}

    def _mask(self, U: Tensor, edge: Edge, start: int, stop: int) -> Tensor:  # [V, *t] -> [n V, *t]
        layout = self.plan.layout[edge]
        rows = layout.split(U)  # [V, N, *rest]
        n = stop - start
        out = rows.new_zeros(n, *rows.shape)
        index = torch.arange(n, device=U.device)
        out[index, :, start + index] = rows[:, start:stop].transpose(0, 1)
        return layout.join(rearrange(out, "k v n ... -> (k v) n ..."), edge.shape)

    # At the parameter -------------------------------------------------------------------------------------

    def _finish(self, p: int) -> None:
        receipt = self.receipts[p]

        @functools.cache
        def whole(group: Group) -> Factor:
            return total(receipt.factors[group])

        for q in self.quantities:
            try:
                found = q.reduce(self._received(q, p, receipt, whole))
            except HookjacError as error:
                raise HookjacError(f"{q.name} of parameter {self.plan.names[p]!r}: {error}") from error
            plain = isinstance(found, Tensor) and not isinstance(found, JacTensor)
            self.results[p][q.name] = saved(found) if plain else found
        receipt.factors.clear()
        receipt.crossings.clear()
        receipt.open = 0

    def _received(self, q: Quantity, p: int, receipt: Receipt, whole: Callable[[Group], Factor]) -> Received:
        plan, seeds, wish = self.plan, self.seeds, q.wish
        rows = seeds.some.get(wish)
        pick = None if q.subsample is None else torch.tensor(q.subsample, device=plan.params[p].device)

        def picked(factor: Factor) -> Factor:
            return factor if pick is None else factor.samples(pick)

        pieces: list[tuple[Factor, Tensor | None]] = []
        noise: Callable[[], float] = lambda: 0.0
        for group in seeds.of(wish):
            if group in receipt.factors:
                factor = whole(group) if rows is None else whole(group).columns(rows)
                metric, noise = group.metric, group.noise
                pieces.append((picked(factor), metric if metric is None or pick is None else metric[pick]))
        direct = self.direct.get(p) if isinstance(wish, (Loss, GGN, Sampled, Averaged, Diagonal, Hessian)) else None
        product: Product | Streamed | None = None
        crossed: list[tuple[Factor, Factor]] = []
        if isinstance(wish, Hessian) and seeds.roads is not None and self.products is not None:
            road = seeds.roads.road[p]
            if road == "features":
                pieces, product = [], self.products.streamed(p, q.subsample, full=q.full)
                if product is None:
                    factor, metric = self.products.piece(p, full=q.full)
                    pieces = [(picked(factor), metric if pick is None else metric[pick])]
            elif road == "entries":
                pieces, product = [], self.products.product(p, q.subsample)
                if p in plan.top.entwined:
                    direct = None  # a part of that Hessian
            else:
                crossed = [(picked(whole(g)), picked(f)) for g, f in receipt.crossings if g in receipt.factors]
        M = plan.N if q.subsample is None else len(q.subsample)
        times = self.operators[wish.curved].block(p) if isinstance(wish, Graph) else None
        probed = self.probed[wish][p] if isinstance(wish, Probes) else None
        return Received(
            plan.params[p], plan.N, M, self.out_shape, pieces, direct, product, crossed, times, probed,
            noise=noise, name=plan.names[p],
        )  # fmt: skip
