"""Where the network bends, and columns that gather all of its curvature in one walk.

H = sum over curved stations u of J_uᵀ M_u J_u, with J_u the Jacobian of what u is given in the parameters and
M_u the second derivative of u under the loss gradient; the loss itself is the first such station. Each is a
group of columns with a metric: the unit columns of what u is given, weighed by M_u. At places that were chosen
beforehand (`gathering`) they are replaced by the unit columns of the features that they are passing, with the dense
symmetric block of what has come so far as their metric.

N samples · D features of one sample at a tensor · V columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from hookjac import structure
from hookjac.errors import HookjacError
from hookjac.factor import Factor, quad_block
from hookjac.gathering import BLOCK
from hookjac.graph import Bend, Edge, meta
from hookjac.head import unit_columns
from hookjac.loss import leading_to
from hookjac.plan import Plan
from hookjac.products import second_backward
from hookjac.route import Group, Key, Stop
from hookjac.samples import random, same
from hookjac.uses import Use, mixed


def cut(plan: Plan) -> tuple[list[Edge], list[str]]:
    """Where the loss ends and the network begins: the model's outputs that the loss uses.

    An output made of the selected one (probabilities of logits) belongs to the loss. On a path that goes around all
    outputs, it is the first layer output. Second, parameters met before any of them.
    """
    route, found, bare = plan.route, [], []
    above = leading_to(route, plan.selected)
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
        elif edge in plan.selected or (
            layout is not None
            and layout.plain
            and mark is not None
            and (mark.output or key in route.calls)
            and key not in above
        ):
            found.append(edge)
        else:
            stack += [after for after in route.after[key] if after is not None]
            call = route.calls.get(key)  # its parameters are no leaves of the route
            its = {} if call is None else call.params
            bare += [plan.names[id(p)] for p in its.values() if id(p) in plan.names]
    return sorted(found, key=lambda e: not ((m := route.mark(e)) and m.selected)), bare


def features(edge: Edge, N: int) -> int:
    return edge.shape.numel() // max(N, 1)


def bend_of(plan: Plan, key: Key, grads: dict[int, Tensor], edges: list[Edge]) -> tuple[list[Tensor], bool]:
    """M of a station: [*in] diagonals if it is diagonal, else rows [D, *in] for the joint unit columns."""
    call = plan.route.calls.get(key)
    if call is not None:
        assert call.rule.bend is not None
        return [call.rule.bend(call, next(iter(grads.values())))], True
    raw = plan.route.raw(key, edges)
    bend = Bend(key, grads, raw)
    known = structure.bend(key, raw)
    found, is_diagonal = _row_sums(bend, grads, edges) if known else _try_diagonal(bend, grads, edges)
    if is_diagonal:
        return found, True
    like = next(iter(grads.values())).new_zeros(())
    return bend.times(unit_columns(edges, [plan.layout[e] for e in edges], like)), False


def _row_sums(bend: Bend, grads: dict[int, Tensor], edges: list[Edge]) -> tuple[list[Tensor], bool]:
    """The diagonal of what is known to have nothing else."""
    like = next(iter(grads.values()))
    ones = [torch.ones((1, *edge.shape), dtype=like.dtype, device=like.device) for edge in edges]
    return [t[0] for t in bend.times(ones)], True


def _try_diagonal(bend: Bend, grads: dict[int, Tensor], edges: list[Edge]) -> tuple[list[Tensor], bool]:
    """Row sums, and whether they are all there is: a random vector tells."""
    like = next(iter(grads.values()))
    if any(meta(edge)[1].is_complex for edge in edges):
        raise RuntimeError("it bends complex numbers, in both of their parts together")
    probes = []
    for k, edge in enumerate(edges):
        r = random(edge.shape, k, like.device, like.dtype)
        probes.append(torch.stack([torch.ones_like(r), r]))
    found = bend.times(probes)
    alike = all(same(t[1], t[0] * p[1]) for t, p in zip(found, probes, strict=True))
    return [t[0] for t in found], alike


def bends(plan: Plan, key: Key, grads: dict[int, Tensor], edges: list[Edge]) -> Literal["diagonal", "full"] | None:
    """How a node curves in these inputs; None where it is linear. Raises where its second derivative is missing,
    infinite or complex."""
    raw = plan.route.raw(key, edges)
    known = structure.bend(key, raw)
    if known == "none":
        return None
    bend = Bend(key, grads, raw)
    if bend.flat:
        return None
    found, is_diagonal = _row_sums(bend, grads, edges) if known else _try_diagonal(bend, grads, edges)
    if any(t.is_complex() for t in (*found, *grads.values())):
        raise RuntimeError("complex")
    # what is no number already, may be none here: it stays in its sample
    if _finite(grads.values()) and not _finite(found):
        raise RuntimeError("not finite")
    if not is_diagonal:
        return "full"
    return "diagonal" if any(bool((t != 0).any()) for t in found) else None


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)


class Bundle:
    """The groups of columns that make up the Hessian, while they walk."""

    def __init__(
        self,
        plan: Plan,
        curves: Mapping[Key, list[Edge]],
        active: Collection[Key],
        gathered: Collection[Key],
        first: Group,
        keep: bool,
    ) -> None:
        self.plan, self.curves, self.active, self.gathered = plan, curves, active, gathered
        self._due = False  # a block should have been made, and could not yet
        self.members: list[Group] = [first]
        self._keep = {first} if keep else set()  # another quantity reads these columns further down

    def cross(self, stop: Stop, p: int, use: Use, loss: Group) -> tuple[Group, Factor] | None:
        """A parameter that this station and others below it use: unit columns of the station's input, to meet there
        what the parameter and that input have in common here."""
        (data,) = self.plan.uses.data(self.plan.route, stop.key)
        (edge, arrived) = next(iter(stop.incoming.items()))
        like = arrived[loss].new_zeros(())
        (columns,) = unit_columns([data], [self.plan.layout[data]], like.to(meta(data)[1]))
        factor = mixed(self.plan.route, use, arrived[loss][0], columns, self.plan.layout[edge])
        if factor is None:
            return None
        group = Group(f"crossing {use.rule}", columns.shape[0], owner=p)
        stop.outgoing.setdefault(data, {})[group] = columns
        return group, factor

    def pass_station(self, stop: Stop, loss: Group, *, may_reroot: bool) -> None:
        """Add what this station bends, then drop to fewer columns where that is possible."""
        route, N = self.plan.route, self.plan.N
        for edge, columns in stop.outgoing.items():
            if route.key(edge) not in self.active:
                for group in self.members:
                    if group not in self._keep:
                        columns.pop(group, None)
        curve = self.curves.get(stop.key)
        if stop.key not in self.active:
            return
        alive = [e for e in {**stop.waiting, **stop.outgoing} if self._carries(stop, e)]
        if curve is not None:
            alive += [e for e in curve if e not in alive]
        if not alive:
            return
        D = sum(features(e, N) for e in alive)
        metric = None
        if curve is not None:
            grads = {e.nr: c[loss][0] for e, c in stop.incoming.items() if loss in c}
            metric = self._metric(stop.key, grads, curve)
        # the real and imaginary parts of a complex tensor are features of their own, and units would be half of them
        whole = all(e in self.plan.layout and not meta(e)[1].is_complex for e in alive)
        self._due |= stop.key in self.gathered
        if self._due and may_reroot and whole and N * D * D <= BLOCK:
            self._due = False
            self._reroot(stop, alive, curve, metric)
        elif curve is not None and metric is not None:
            self._add(stop, curve, metric, f"bend {len(self.members)}")

    def _carries(self, stop: Stop, edge: Edge) -> bool:
        if self.plan.route.key(edge) not in self.active:
            return False
        return any(g in c for c in (stop.waiting.get(edge, {}), stop.outgoing.get(edge, {})) for g in self.members)

    def _metric(self, key: Key, grads: dict[int, Tensor], curve: list[Edge]) -> Tensor | None:
        if not grads:
            return None
        found, is_diagonal = bend_of(self.plan, key, grads, curve)
        layouts = [self.plan.layout[e] for e in curve]
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
        columns = unit_columns(edges, [self.plan.layout[e] for e in edges], metric.new_zeros(()))
        for edge, t in zip(edges, columns, strict=True):
            stop.outgoing.setdefault(edge, {})[group] = t.to(meta(edge)[1])  # autocast has several precisions
        self.members.append(group)

    def _reroot(self, stop: Stop, alive: list[Edge], curve: list[Edge] | None, metric: Tensor | None) -> None:
        """All that has come so far, as one dense block on the unit columns of the tensors it is passing."""
        total = gathered(self.plan, stop, alive, self.members)
        if curve is not None and metric is not None:
            total = self._bent(total, alive, curve, metric)
        _drop(stop, alive, [g for g in self.members if g not in self._keep])
        self.members = []
        self._add(stop, alive, total, "block")

    def _bent(self, total: Tensor, alive: list[Edge], curve: list[Edge], metric: Tensor) -> Tensor:
        """What has come so far, and what bends here."""
        sizes = [features(e, self.plan.N) for e in alive]
        if any(total is g.metric for g in self.members):
            total = total.clone()
        starts, at = {e: sum(sizes[:k]) for k, e in enumerate(alive)}, 0
        if metric.dim() == 2:
            diagonal = total.diagonal(dim1=1, dim2=2)
            for e in curve:
                D = sizes[alive.index(e)]
                diagonal[:, starts[e] : starts[e] + D] += metric[:, at : at + D]
                at += D
            return total
        where = torch.cat([torch.arange(sizes[alive.index(e)], device=total.device) + starts[e] for e in curve])
        if len(where) == total.shape[1] and len(curve) == 1:
            return total.add_(metric)
        total[:, where[:, None], where[None, :]] += metric
        return total


def gathered(plan: Plan, stop: Stop, alive: list[Edge], members: Collection[Group]) -> Tensor:  # -> [N, D, D]
    """What groups of columns amount to at the tensors that they are passing."""
    N, layout = plan.N, plan.layout
    total: Tensor | None = None
    for group in members:
        parts = []
        assert group.metric is not None
        for edge in alive:
            found = [c[group] for c in (stop.waiting.get(edge, {}), stop.outgoing.get(edge, {})) if group in c]
            if found:
                parts.append(layout[edge].features(sum(found[1:], found[0])))
            else:
                parts.append(group.metric.new_zeros(group.size, N, features(edge, N)))
        block_ = quad_block(parts[0] if len(parts) == 1 else torch.cat(parts, 2), group.metric)
        total = block_ if total is None else total + block_
    assert total is not None
    return total


def _drop(stop: Stop, edges: Collection[Edge], groups: Collection[Group]) -> None:
    for edge in edges:
        for columns in (stop.waiting.get(edge, {}), stop.outgoing.get(edge, {})):
            for group in groups:
                columns.pop(group, None)


class Stepwise:
    """One group of columns whose curvature is simplified after every station: the recursions that approximate.

    What has arrived at the tensors that the columns are passing is boiled down to a metric on their unit columns.
    """

    name = ""

    def __init__(self, plan: Plan, first: Group, loss: Group) -> None:
        self.plan, self.members, self.loss = plan, [first], loss

    def pass_station(self, stop: Stop) -> None:
        group, N, layout = self.members[-1], self.plan.N, self.plan.layout
        alive = [e for e in {**stop.waiting, **stop.outgoing} if self._carries(stop, e, group)]
        if not any(group in c for c in stop.outgoing.values()) or self.commutes(stop.key):
            return
        D = sum(features(e, N) for e in alive)
        if not all(e in layout for e in alive) or N * D * D > BLOCK:
            raise HookjacError(
                f"{self.name} simplifies the curvature at every step down, and cannot here: "
                f"{' and '.join(str(tuple(e.shape)) for e in alive)} holds samples that cannot be told apart, or a "
                f"block [{N}, {D}, {D}] is too large. Use an exact or a sampled quantity: ggn_diag_mc, kfac."
            )
        metric = self.simplified(stop, alive, group)
        _drop(stop, alive, [group])
        fresh = Group(self.name, D, metric)
        columns = unit_columns(alive, [layout[e] for e in alive], metric.new_zeros(()))
        for edge, t in zip(alive, columns, strict=True):
            stop.outgoing.setdefault(edge, {})[fresh] = t.to(meta(edge)[1])
        self.members.append(fresh)

    def commutes(self, key: Key) -> bool:
        """Is nothing lost by simplifying later?"""
        return False

    def simplified(self, stop: Stop, alive: list[Edge], group: Group) -> Tensor:
        """The metric that stands for all that has come so far."""
        raise NotImplementedError

    def _carries(self, stop: Stop, edge: Edge, group: Group) -> bool:
        return any(group in c for c in (stop.waiting.get(edge, {}), stop.outgoing.get(edge, {})))


class Averaging(Stepwise):
    """KFRA: the Gauss-Newton matrix of each tensor, averaged over the samples."""

    name = "kfra"

    def commutes(self, key: Key) -> bool:
        call = self.plan.route.calls.get(key)
        return call is not None and call.rule.constant

    def simplified(self, stop: Stop, alive: list[Edge], group: Group) -> Tensor:
        mean = gathered(self.plan, stop, alive, [group]).mean(0)
        return mean.expand(self.plan.N, *mean.shape)


class Diagonal(Stepwise):
    """HesScale: the Hessian of each tensor, of which only the diagonal goes on."""

    name = "hesscale"

    def simplified(self, stop: Stop, alive: list[Edge], group: Group) -> Tensor:
        diagonal = gathered(self.plan, stop, alive, [group]).diagonal(dim1=1, dim2=2).clone()
        route, N = self.plan.route, self.plan.N
        grads = {e.nr: c[self.loss][0] for e, c in stop.incoming.items() if self.loss in c}
        below = [e for e in dict.fromkeys(self.plan.uses.data(route, stop.key)) if e in alive]
        call = route.calls.get(stop.key)
        if not grads or not below or (call is not None and call.rule.bend is None):
            return diagonal
        with second_backward([type(stop.key).__name__]), torch.enable_grad():
            found, is_diagonal = bend_of(self.plan, stop.key, grads, below)
        offset = 0
        for edge, rows in zip(below, found, strict=True):
            start, size = sum(features(e, N) for e in alive[: alive.index(edge)]), features(edge, N)
            layout = self.plan.layout[edge]
            bent = layout.features(rows.unsqueeze(0) if is_diagonal else rows[offset : offset + size])
            diagonal[:, start : start + size] += bent[0] if is_diagonal else bent.diagonal(dim1=0, dim2=2)
            offset += size
        return diagonal
