"""Which columns start where, for all that the quantities wish for; equal wishes share theirs.

V columns · N samples · C entries of one sample's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hookjac import curvature
from hookjac.curvature import Averaging, Bundle, Stepwise, cut
from hookjac.errors import HookjacError
from hookjac.graph import Edge, meta, saved
from hookjac.head import Head, unit_columns
from hookjac.limits import refuse_many_columns
from hookjac.plan import Plan
from hookjac.quantity.record import GGN, Averaged, Diagonal, Graph, Hessian, Loss, Output, Sampled, Wish
from hookjac.roads import Roads, choose, refuse_endless
from hookjac.route import Columns, Group


class Seeds:
    """The columns of one backward. asked: each wish, with the name of a quantity that has it. start: make them; else
    only find out whether and how they would be."""

    def __init__(self, plan: Plan, asked: Mapping[Wish, str], *, start: bool = True) -> None:
        self.plan, self.asked = plan, asked
        self.start: dict[Edge, Columns] = {}
        self.loss = Group("loss", 1)  # it travels, too, where the Hessian's columns need it
        self.groups: dict[Wish, Group] = {}
        self.some: dict[Wish, Tensor] = {}  # numbers of the columns of a group that are meant
        self.bundle: Bundle | None = None
        self.stepwise: dict[Wish, Stepwise] = {}
        self.roads: Roads | None = None
        self.edges: list[Edge] = []  # where the loss ends and the network begins
        self._bare: list[str] = []
        if plan.N:
            self._foresee()
            if start:
                self._seed()

    def of(self, wish: Wish) -> list[Group]:
        """The groups that make up what was wished for."""
        if isinstance(wish, Hessian):
            return list(self.bundle.members) if self.bundle is not None else []
        if wish in self.stepwise:
            return list(self.stepwise[wish].members)
        return [self.groups[wish]] if wish in self.groups else []

    def travelling(self, group: Group) -> bool:
        """Does this group carry what parameters that no rule explains must have, too?"""
        return group in self.groups.values() or any(group in s.members for s in self.stepwise.values())

    def _named(self, *kinds: type) -> str | None:
        return next((name for wish, name in self.asked.items() if isinstance(wish, kinds)), None)

    def _foresee(self) -> None:
        """What is refused, and the roads of the Hessian; nothing of the columns' size is made."""
        plan = self.plan
        if self._named(GGN, Sampled, Averaged, Diagonal, Hessian, Graph):
            self.edges, self._bare = cut(plan)
        C = sum(e.shape.numel() // plan.N for e in self.edges)
        C = C or (plan.selected[0].shape[1:].numel() if plan.selected else 0)
        below = [e for key in plan.needed for e in plan.route.outs[key] if e.leaf is None]
        widest = max((e.shape.numel() for e in below), default=0)
        refuse_many_columns(self.asked, C, widest, next(iter(plan.params.values())))
        self._choose_roads(self._bare)
        gauss_newton = self._named(GGN, Sampled, Averaged, Diagonal) or (
            "ggn_mp" if Graph("ggn") in self.asked else None
        )
        if gauss_newton:
            self._demand_outputs(gauss_newton, self._bare)
        if self._named(Loss):
            self._demand_summands()
        if self._named(Output):
            self._demand_one_output()

    def _seed(self) -> None:
        plan = self.plan
        by_columns = self.roads is not None and bool(self.roads.active)
        bent = by_columns and self.roads is not None and bool(self.roads.curves or self.roads.crossings)
        if self._named(Loss, Diagonal) or bent:
            for edge, g in zip(plan.top.frontier, plan.top.gradients, strict=True):
                self.start.setdefault(edge, {})[self.loss] = saved(g).unsqueeze(0)
            self.groups[Loss()] = self.loss
        self._seed_outputs()
        if self._named(GGN, Sampled, Averaged, Diagonal) or by_columns:
            with torch.enable_grad():
                self._seed_curvature(by_columns)

    def _choose_roads(self, bare: list[str]) -> None:
        wishes = [wish for wish in self.asked if isinstance(wish, Hessian)]
        if wishes:
            (wish,) = wishes
            with torch.enable_grad():
                self.roads = choose(self.plan, self.edges, bare, wish.road)
            refuse_endless(self.plan, self.roads, wish.flop_limit)

    def _demand_outputs(self, name: str, bare: list[str]) -> None:
        if self.plan.lost:
            raise HookjacError(
                f"{name}: no output of the model was met on the way down from the loss, so that it is unknown where "
                "the loss ends and the network begins. Was the tensor that the model returned modified in place since?"
            )
        if bare:
            raise HookjacError(
                f"{name}: the loss depends on parameter {bare[0]!r} by a way that passes no output of the model, so "
                "that it does not split into a loss of outputs and a network. hess_diag has no such limit."
            )

    def _demand_summands(self) -> None:
        part = self.plan.top
        if part.entwined:
            raise HookjacError(
                f"parameter {self.plan.names[min(part.entwined)]!r} scales the loss above the samples (after they were "
                "reduced or flattened), so that its gradient is no sum over samples that could be told apart. Use it "
                "inside the model's forward, or before the reduction; hess_diag and jac have no such limit."
            )

    def _demand_one_output(self) -> None:
        selected = self.plan.selected
        if len(selected) != 1:
            raise HookjacError(
                f"{self._named(Output)}: {len(selected)} selected outputs of the model were met on the way down from "
                "the loss, expected one. With several calls of the model, use one backward for each. With none, the "
                "loss does not use the output that extend(output=...) selects, or that tensor was modified in place "
                "after the model returned it. Or leave jac out."
            )
        self._rows(selected[0])

    def _rows(self, edge: Edge) -> list[int]:
        return wanted_rows(
            [(wish, name) for wish, name in self.asked.items() if isinstance(wish, Output)], edge.shape[1:]
        )

    def _seed_outputs(self) -> None:
        wishes = [wish for wish in self.asked if isinstance(wish, Output)]
        if not wishes:
            return
        (edge,) = self.plan.selected
        rows = self._rows(edge)
        group = Group("output", len(rows))
        self._enter(group, [edge], self._units([edge], rows))
        for wish in wishes:
            self.groups[wish] = group
            if wish.rows is not None:
                self.some[wish] = places_of(wish.rows, rows, meta(edge)[2])

    def _seed_curvature(self, by_columns: bool) -> None:
        plan, edges = self.plan, self.edges
        if not edges:
            return
        head = Head.of(plan, edges)
        output = self.groups.get(Output())
        first: Group | None = None
        if self._named(GGN) or by_columns:
            if output is not None and edges == plan.selected:
                first = output  # the same unit columns serve both
                first.metric, first.noise = head.metric(), head.noise
            else:
                columns, metric = head.columns()
                first = Group("ggn", len(columns[0]), metric, head.noise)
                self._enter(first, edges, columns)
            self.groups[GGN()] = first
        for wish in self.asked:
            if isinstance(wish, Sampled):
                columns, metric = head.draw(wish)
                self.groups[wish] = Group("sampled", len(columns[0]), metric)
                self._enter(self.groups[wish], edges, columns)
        if by_columns and self.roads is not None and first is not None:
            keep = bool(self._named(GGN)) or first is output
            self.bundle = Bundle(plan, self.roads.curves, self.roads.active, self.roads.gathered, first, keep)
        for wish in self.asked:
            if isinstance(wish, (Averaged, Diagonal)):
                kind = Averaging if isinstance(wish, Averaged) else curvature.Diagonal
                H = head.full()
                metric = H.mean(0).expand_as(H) if kind is Averaging else H.diagonal(dim1=1, dim2=2)
                first = Group(kind.name, H.shape[1], metric)
                self._enter(first, edges, self._units(edges))
                self.stepwise[wish] = kind(plan, first, self.loss)

    def _enter(self, group: Group, edges: list[Edge], columns: list[Tensor]) -> None:
        for edge, t in zip(edges, columns, strict=True):
            self.start.setdefault(edge, {})[group] = t

    def _units(self, edges: list[Edge], rows: Sequence[int] | None = None) -> list[Tensor]:
        _, dtype, device = meta(edges[0])
        like = torch.zeros((), dtype=dtype, device=device)
        return unit_columns(edges, [self.plan.layout[e] for e in edges], like, rows)


def places_of(wanted: Sequence[int], rows: Sequence[int], device: torch.device) -> Tensor:
    """Where among the rows those wanted are."""
    place = {r: k for k, r in enumerate(rows)}
    return torch.tensor([place[r] for r in wanted], device=device)


def wanted_rows(wishes: Sequence[tuple[Output, str]], out: torch.Size) -> list[int]:
    """The entries of one sample's output [*out] that are wanted by any of these, each with a quantity's name."""
    C = out.numel()
    for wish, name in wishes:
        if wish.rows and max(wish.rows) >= C:
            raise HookjacError(
                f"{name}: outputs={max(wish.rows)} was asked for, but one sample's output of shape {tuple(out)} has "
                f"{C} entries (numbered from 0 in row-major order)."
            )
    return sorted({r for wish, _ in wishes for r in (range(C) if wish.rows is None else wish.rows)})
