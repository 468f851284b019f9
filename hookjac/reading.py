"""What the parameters receive of columns that reach their nodes, reduced at once.

N samples · V columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hookjac.errors import HookjacError
from hookjac.factor import Factor, Outer, share, total
from hookjac.graph import Edge, Node
from hookjac.passage import Passage, Take
from hookjac.quantity.record import GGN, Hessian, Quantity, Received, Sampled
from hookjac.switches import uncast
from hookjac.uses import down


@dataclass(eq=False)
class Group:
    """Columns that travel together, and which quantities they are for. rows: numbers of the columns that one means."""

    asked: list[tuple[int, Quantity]] = field(default_factory=list)
    metric: Tensor | None = None
    noise: Callable[[], float] = lambda: 0.0  # how much of it may be rounding
    rows: dict[int, Tensor] = field(default_factory=dict)
    summed: frozenset[int] = frozenset()  # parameters of which the sum over the samples is wanted, too


class Reading:
    """What the parameters receive of one group of columns."""

    def __init__(
        self,
        passage: Passage,
        nodes: Sequence[Node],
        params: Sequence[nn.Parameter],
        group: Group,
        made: list[list[Any]],
        sums: list[Tensor | None],
    ) -> None:
        """made: where results go, of each parameter and quantity; sums: where those of `group.summed` do."""
        self.passage, self.nodes, self.params, self.group = passage, nodes, params, group
        self.made, self.sums = made, sums
        self.over = False
        self.uses = passage.uses
        self.open = list(self.uses)
        self.factors: dict[int, list[Factor]] = {}  # of parameters that are used more than once
        asked = {q.each for _, q in group.asked}
        self.prepares, self.entries = bool(group.summed) and bool(asked - {None}), "entries" in asked

    def hook(self, take: Take) -> Callable[[tuple[Tensor | None, ...]], None]:
        node = self.nodes[take.number]

        def see(gradients: tuple[Tensor | None, ...]) -> None:
            g = gradients[take.nr]
            if g is None or self.over:
                return
            if not (torch.is_grad_enabled() or torch.is_autocast_enabled(g.device.type)):
                self.meet(take, node, g.unsqueeze(0))
                return
            with torch.no_grad(), uncast():  # a backward that makes a graph, or is surrounded by autocast
                self.meet(take, node, g.detach().unsqueeze(0))

        return see

    def meet(self, take: Take, node: Node, G: Tensor) -> None:  # G [V, *out]
        found = []
        for k, slot, chain, turned in take.uses:
            factor = take.rule.part(node, slot, G, take.layout)
            if chain:
                moved = factor.turned() if turned and isinstance(factor, Outer) else None
                factor = down(tuple(Edge(self.nodes[e.node], e.nr) for e in chain), factor) if moved is None else moved
            found.append((k, factor))
        if len(found) > 1 and (self.group.metric is not None or len(G) > 1):
            share((factor for _, factor in found), G)
        for k, factor in found:
            self.open[k] -= 1
            if self.uses[k] == 1:
                self._finish(k, factor)
                continue
            self.factors.setdefault(k, []).append(factor)
            if not self.open[k]:
                self._finish(k, total(self.factors.pop(k)))

    def close(self) -> None:
        """A parameter that was not met by all receives nothing more."""
        for k, left in enumerate(self.open):
            if left or not self.uses[k]:
                found = self.factors.get(k)
                self._finish(k, total(found) if found else None)

    def _finish(self, k: int, factor: Factor | None) -> None:
        gradient = None
        if factor is not None and self.prepares:
            factor.prepare(entries=self.entries)
        if factor is not None and k in self.group.summed:
            gradient = self.sums[k] = factor.sum().to(self.params[k].dtype)
        for number, q in self.group.asked:
            try:
                self.made[k][number] = q.reduce(self._received(k, number, q, factor, gradient))
            except HookjacError as error:
                raise HookjacError(f"{q.name} of parameter {self.passage.names[k]!r}: {error}") from error

    def _received(self, k: int, number: int, q: Quantity, factor: Factor | None, gradient: Tensor | None) -> Received:
        passage, group, param = self.passage, self.group, self.params[k]
        N, metric, name = passage.N, group.metric, passage.names[k]
        if metric is not None and not isinstance(q.wish, _CURVED):
            metric = None
        if factor is None:
            return Received(param, N, N if q.subsample is None else len(q.subsample), passage.out_shape, name=name)
        if q.subsample is None and not group.rows:
            its = ((factor, metric),)
            return Received(param, N, N, passage.out_shape, its, whole=gradient, noise=group.noise, name=name)
        if number in group.rows:
            factor = factor.columns(group.rows[number])
        if q.subsample is None:
            its = ((factor, metric),)
            return Received(param, N, N, passage.out_shape, its, whole=gradient, noise=group.noise, name=name)
        pick = torch.tensor(q.subsample, device=param.device)
        pieces = ((factor.samples(pick), None if metric is None else metric[pick]),)
        return Received(param, N, len(q.subsample), passage.out_shape, pieces, noise=group.noise, name=name)


_CURVED = (GGN, Hessian, Sampled)
