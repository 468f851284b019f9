"""The walk: columns from the loss and the outputs down to the parameters, and what each parameter makes of them.

It knows neither layers nor quantities: rules answer for layers, autograd's nodes for all else, quantities say
which columns they want and reduce what arrives.

V columns · N samples · K = V N columns with one sample's rows each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from hookjac.curvature import Bundle, cut, loss_hessian, unit_columns
from hookjac.errors import HookjacError
from hookjac.factor import Dense, Factor, total
from hookjac.graph import Edge, edge_of, meta
from hookjac.plan import Plan
from hookjac.products import diagonal
from hookjac.progress import Progress
from hookjac.quantity import Quantity, Received
from hookjac.roads import Roads, by_products, choose, refuse_endless
from hookjac.route import Columns, Group, Stop, accumulate, walk
from hookjac.uses import received

_CHUNK = 1 << 24  # entries of one tensor of masked columns

Results = dict[int, dict[str, Tensor]]  # id of a parameter -> quantity -> value


@dataclass(eq=False)
class Receipt:
    """What one parameter has received so far."""

    factors: dict[Group, list[Factor]] = field(default_factory=dict)  # of each use
    open: int = 0  # uses that have not reported yet
    crossings: list[tuple[Group, Factor]] = field(default_factory=list)

    def take(self, group: Group, factor: Factor) -> None:
        self.factors.setdefault(group, []).append(factor)


class Walk:
    """One backward's worth of derivatives."""

    def __init__(self, plan: Plan, quantities: Sequence[Quantity]) -> None:
        self.plan, self.quantities = plan, quantities
        self.wanted = {q.columns for q in quantities}
        self.results: Results = {p: {} for p in plan.names}
        self.receipts = {p: Receipt(open=len(plan.uses.of.get(p, [])) + (p in plan.glue)) for p in plan.names}
        self.out_shape = plan.selected[0].shape[1:] if plan.selected else torch.Size()
        self.seeds: dict[Edge, Columns] = {}
        self.loss = Group("loss", 1)
        self.output: Group | None = None
        self.ggn: Group | None = None
        self.bundle: Bundle | None = None
        self.roads: Roads | None = None
        self.bent: dict[int, Tensor] = {}

    def run(self) -> Results:
        with torch.no_grad():
            if self.plan.N:
                self._seed()
            with torch.enable_grad():
                self._curvature_of_penalties()
                products = by_products(self.plan, self.roads) if self.roads else {}
            for p in products:
                if self.roads and self.roads.road[p] == "features" and p in self.bent:
                    products[p] = products[p] + self.bent[p]
            sources: dict[Edge, Columns] = {}
            for p, receipt in self.receipts.items():
                if not receipt.open:
                    self._finish(p, products)
            if self.seeds:
                for stop in walk(
                    self.plan.route, self.seeds, self.plan.through, self.plan.visit, self.plan.uses.parted
                ):
                    self._arrive(stop, products, sources)
                self._walk_masked(sources, products)
            for p, receipt in self.receipts.items():
                if receipt.open:  # asked-for columns never met it: they do not depend on it
                    self._finish(p, products)
        return self.results

    # Seeds ------------------------------------------------------------------------------------------------

    def _seed(self) -> None:
        plan, part = self.plan, self.plan.top
        edges, bare = cut(plan) if self.wanted & {"ggn", "hessian"} else ([], [])
        if "hessian" in self.wanted:
            (wish,) = {(q.road, q.flop_limit) for q in self.quantities if q.columns == "hessian"}
            with torch.enable_grad():
                self.roads = choose(plan, edges, bare, wish[0])
            refuse_endless(plan, self.roads, wish[1])
        if "ggn" in self.wanted and plan.lost:
            raise HookjacError(
                "ggn_diag: no output of the model was met on the way down from the loss, so that it is unknown where "
                "the loss ends and the network begins. Was the tensor that the model returned modified in place since?"
            )
        if "ggn" in self.wanted and bare:
            raise HookjacError(
                f"ggn_diag: the loss depends on parameter {bare[0]!r} by a way that passes no output of the model, so "
                "that it does not split into a loss of outputs and a network. hess_diag has no such limit."
            )
        by_columns = self.roads is not None and bool(self.roads.active)
        if "loss" in self.wanted and part.entwined:
            raise HookjacError(
                f"parameter {plan.names[min(part.entwined)]!r} scales the loss above the samples (after they were "
                "reduced or flattened), so that its gradient is no sum over samples that could be told apart. Use it "
                "inside the model's forward, or before the reduction; hess_diag and jac have no such limit."
            )
        if "loss" in self.wanted or by_columns:
            for edge, g in zip(part.frontier, part.gradients, strict=True):
                self.seeds.setdefault(edge, {})[self.loss] = g.detach().unsqueeze(0)
        if "output" in self.wanted:
            if len(plan.selected) != 1:
                raise HookjacError(
                    f"jac: {len(plan.selected)} selected outputs of the model were met on the way down from the loss, "
                    "expected one. With several calls of the model, use one backward for each. With none, the loss "
                    "does not use the output that extend(output=...) selects, or that tensor was modified in place "
                    "after the model returned it. Or leave jac out."
                )
            self.output = self._unit("output", plan.selected)
        if "ggn" in self.wanted or by_columns:
            with torch.enable_grad():
                H = loss_hessian(plan, edges)
            if self.output is not None and edges == plan.selected:
                self.ggn = self.output  # the same unit columns serve both
                self.ggn.metric = H
            elif edges:
                self.ggn = self._unit("ggn", edges, H)
        if by_columns and self.ggn is not None and self.roads is not None:
            keep = bool(self.wanted & {"output", "ggn"})
            self.bundle = Bundle(plan, self.roads.curves, self.roads.active, self.ggn, keep)

    def _unit(self, name: str, edges: list[Edge], metric: Tensor | None = None) -> Group:
        _, dtype, device = meta(edges[0])
        like = torch.zeros((), dtype=dtype, device=device)
        columns = unit_columns(edges, [self.plan.layout[e] for e in edges], like)
        group = Group(name, columns[0].shape[0], metric)
        for edge, t in zip(edges, columns, strict=True):
            self.seeds.setdefault(edge, {})[group] = t
        return group

    def _curvature_of_penalties(self) -> None:
        if not self.wanted & {"ggn", "hessian"}:
            return
        for p, g in self.plan.top.direct.items():
            self.bent[p] = diagonal(g, edge_of(self.plan.params[p]))

    # On the way -------------------------------------------------------------------------------------------

    def _arrive(self, stop: Stop, products: dict[int, Tensor], sources: dict[Edge, Columns]) -> None:
        plan = self.plan
        used = plan.uses.at.get(stop.key)
        if used:
            (edge,) = stop.incoming
            for group, G in stop.incoming[edge].items():
                for p, factor in received(plan.route, plan.uses, stop.key, G, plan.layout[edge]).items():
                    if p in self.receipts and group.owner in (None, p):
                        self.receipts[p].take(group, factor)
            if self.bundle is not None and self.roads is not None:
                for p, use in self.roads.crossings.get(stop.key, ()):
                    if p in self.roads.going("columns") and (made := self.bundle.cross(stop, p, use, self.loss)):
                        self.receipts[p].crossings.append(made)
            for p, _ in used:
                self.receipts[p].open -= 1
                if not self.receipts[p].open:
                    self._finish(p, products)
        if stop.key in plan.masked:
            for edge, columns in stop.incoming.items():
                if edge in plan.layout:
                    mine = {g: t for g, t in columns.items() if g in (self.loss, self.output, self.ggn)}
                    sources[edge] = mine
        if self.bundle is not None:
            self.bundle.pass_station(stop, self.loss, may_reroot=not self._half_done())

    def _half_done(self) -> bool:
        """Is a parameter between two of its uses? Then the columns of the first must meet those of the second."""
        assert self.roads is not None
        return any(self.receipts[p].factors and self.receipts[p].open for p in self.roads.going("columns"))

    def _walk_masked(self, sources: dict[Edge, Columns], products: dict[int, Tensor]) -> None:
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
            self._finish(p, products)

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

    def _finish(self, p: int, products: dict[int, Tensor]) -> None:
        receipt = self.receipts[p]
        for q in self.quantities:
            groups: list[Group | None]
            if q.columns == "hessian":
                groups = list(self.bundle.members) if self.bundle is not None else []
            else:
                groups = [{"loss": self.loss, "output": self.output, "ggn": self.ggn}[q.columns]]
            got = Received(
                param=self.plan.params[p],
                N=self.plan.N,
                out_shape=self.out_shape,
                pieces=[
                    (total(receipt.factors[g]), g.metric) for g in groups if g is not None and g in receipt.factors
                ],
                direct=self._direct(p),
                bent=self.bent.get(p),
                done=products.get(p) if q.columns == "hessian" else None,
                crossed=[(total(receipt.factors[g]), f) for g, f in receipt.crossings if g in receipt.factors]
                if q.columns == "hessian"
                else (),
            )
            self.results[p][q.name] = q.reduce(got).detach()
        receipt.factors.clear()
        receipt.crossings.clear()
        receipt.open = 0

    def _direct(self, p: int) -> Tensor | None:
        found = self.plan.top.direct.get(p)
        return None if found is None else found.detach()
