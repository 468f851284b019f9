"""Columns that go by what is known of the structure of their graph, and gradients read in passing.

The loss gradient is the one column that needs no walk of ours: autograd carries it past every layer anyway, and a hook
on the layer's node sees it. Few or small columns from the output are autograd's engine's business as well, asked for
nothing but what those layers see; more of them go side by side by the closed forms of the nodes. Nothing is planned
here: all that has to be known is in the `Passage`.

Where that is cheaper, the parameters' own gradients are taken from what was read (their sum over the samples), and
autograd does not compute them a second time.

N samples · V columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hookjac.deliver import deliver, slower
from hookjac.described import Described
from hookjac.graph import Edge, Held, fitted, gradients, meta, pull
from hookjac.head import Head, unit_columns
from hookjac.limits import refuse_large_results, refuse_many_columns
from hookjac.passage import Numbered, Passage
from hookjac.quantity.record import GGN, Hessian, Loss, Output, Quantity, Sampled, demand_samples
from hookjac.reading import Group, Reading
from hookjac.samples import Layout
from hookjac.seeds import places_of, wanted_rows
from hookjac.switches import QUIET_VMAP, uncast
from hookjac.watch import Start

Quiet = Callable[[], contextlib.AbstractContextManager[None]]

# Microseconds that a node costs in autograd's engine, and here; that a batched call of one without a closed form does.
# About what benchmarks/test_overhead.py finds, with the hooks and lookups of a walk
_IN_ENGINE, _STARTED, _BY_WAY, _BY_VMAP = 4.0, 15.0, 8.0, 150.0


def serves(passage: Passage, quantities: Sequence[Quantity]) -> bool:
    """Are all of them made of columns that this passage carries?"""
    for q in quantities:
        wish = q.wish
        if isinstance(wish, Loss):
            continue
        if passage.output is None:
            return False
        if isinstance(wish, (GGN, Sampled)) and passage.splits:
            continue
        if isinstance(wish, Hessian) and passage.curved is not None:
            if wish.road in ("auto", "columns") and passage.curved.flops <= wish.flop_limit:
                continue
            return False
        if not isinstance(wish, Output):
            return False
    return True


class Pass:
    """One backward's worth of it."""

    def __init__(
        self,
        passage: Passage,
        found: Described,
        params: Sequence[nn.Parameter],
        quantities: Sequence[Quantity],
        *,
        retained: bool = False,
    ) -> None:
        self.retained = retained  # tensors of the graph wait for their own gradients: the user's backward has to run
        self.passage, self.nodes, self.params, self.quantities = passage, found.nodes, params, quantities
        self.made: list[list[Any]] = [[None] * len(quantities) for _ in params]
        self.sums: list[Tensor | None] = [None] * len(params)
        self.rode = False  # the loss gradient went with other columns
        self.slope: Tensor | None = None  # the loss gradient at the output, where somebody has worked it out
        for q in quantities:
            demand_samples(q, passage.N)
        if any(q.entries is not None for q in quantities):
            refuse_large_results(quantities, params, passage.names, passage.N, passage.out_shape.numel())

    def run(self, start: Start, quiet: Quiet) -> tuple[Any, list[list[Any]]]:
        """The user's backward, and for each parameter the result of each quantity."""
        loss = Group()
        others: list[tuple[int, Quantity]] = []
        for k, q in enumerate(self.quantities):
            (loss.asked if isinstance(q.wish, Loss) else others).append((k, q))
        by_engine = self._by_engine(start, loss)
        rides = by_engine == [] and bool(others) and self.passage.splits and not self.passage.odd
        if others:
            with torch.inference_mode(False), torch.no_grad(), quiet():
                for group, columns in self._groups(start.tensors[0], others):
                    if rides and not self.rode:
                        self._send_with(group, columns, loss, start.tensors[0])
                    else:
                        self._send(group, columns)
        if by_engine is None:
            return self._read(start, loss), self.made
        if self.rode:
            self._free(start)
        else:
            self._read_all(start, loss, by_engine)
        self._deliver()
        return None, self.made

    # Columns from the output --------------------------------------------------------------------------------------

    def _reading(self, group: Group) -> Reading:
        return Reading(self.passage, self.nodes, self.params, group, self.made, self.sums)

    def _real(self, edge: Numbered) -> Edge:
        return Edge(self.nodes[edge.node], edge.nr)

    def _groups(self, loss: Tensor, asked: list[tuple[int, Quantity]]) -> Iterator[tuple[Group, Tensor]]:
        passage = self.passage
        assert passage.output is not None
        at, N = self._real(passage.output), passage.N
        C = passage.out_shape.numel()
        refuse_many_columns({q.wish: q.name for _, q in reversed(asked)}, C, passage.widest, self.params[0])
        outs = {k: q.wish for k, q in asked if isinstance(q.wish, Output)}
        curved = [(k, q) for k, q in asked if isinstance(q.wish, (GGN, Hessian))]
        sampled: dict[Sampled, list[tuple[int, Quantity]]] = {}
        for k, q in asked:
            if isinstance(q.wish, Sampled):
                sampled.setdefault(q.wish, []).append((k, q))
        bends = None if passage.bending is None else passage.bending.renamed(self._real)
        head = Head(loss, [at], [Layout(N)], N, bends) if curved or sampled else None
        self.slope = None if head is None else head.slope
        if outs:
            rows = wanted_rows([(wish, self.quantities[k].name) for k, wish in outs.items()], passage.out_shape)
            (units,) = unit_columns([at], [Layout(N)], _zero(at), rows)
            group = Group([(k, self.quantities[k]) for k in outs])
            for k, wish in outs.items():
                if wish.rows is not None:
                    group.rows[k] = places_of(wish.rows, rows, units.device)
            if curved and len(rows) == C:  # the same unit columns serve both
                assert head is not None
                group.asked, group.metric, group.noise, curved = group.asked + curved, head.metric(), head.noise, []
            yield group, units
        if curved:
            assert head is not None
            (columns,), metric = head.columns()
            yield Group(curved, metric, head.noise), columns
        for drawn, quantities in sampled.items():
            assert head is not None
            (columns,), metric = head.draw(drawn)
            yield Group(quantities, metric), columns

    def _send(self, group: Group, U: Tensor) -> None:  # U [V, *output]
        """By autograd's own engine, one by one, or all side by side by closed forms: whichever costs less."""
        passage, V = self.passage, len(U)
        reading = self._reading(group)
        steps = len(passage.steps)
        engine = V * (_STARTED + _IN_ENGINE * steps)
        if V == 0 or engine > _BY_WAY * steps + _BY_VMAP * passage.odd:
            self._side_by_side(U, [(reading, slice(0, V))])
        else:
            self._one_by_one(U, reading)
        reading.close()

    def _send_with(self, group: Group, U: Tensor, loss: Group, start: Tensor) -> None:  # U [V, *output]
        """The same, and the loss gradient beside the others: it is one more of them."""
        assert self.passage.output is not None
        self.rode = True
        loss.summed = frozenset(range(len(self.params)))
        (g,) = gradients([start], [self._real(self.passage.output)], [None]) if self.slope is None else (self.slope,)
        mine, its = self._reading(group), self._reading(loss)
        V = len(U)
        self._side_by_side(torch.cat([U, g.unsqueeze(0).to(U.dtype)]), [(mine, slice(0, V)), (its, slice(V, V + 1))])
        mine.close()
        its.close()

    def _one_by_one(self, U: Tensor, reading: Reading) -> None:
        assert self.passage.output is not None
        at, takes = self._real(self.passage.output), self.passage.takes
        rows = [gradients([at], [Edge(self.nodes[t.number], t.nr) for t in takes], [u]) for u in U]
        for k, take in enumerate(takes):
            G = rows[0][k].unsqueeze(0) if len(rows) == 1 else torch.stack([row[k] for row in rows])
            reading.meet(take, self.nodes[take.number], G)

    def _side_by_side(self, U: Tensor, readings: Sequence[tuple[Reading, slice]]) -> None:
        passage, nodes = self.passage, self.nodes
        assert passage.output is not None
        waiting = {passage.output: U}
        for number, outs, take, on, join in passage.steps:
            here = {e.nr: waiting.pop(e) for e in outs if e in waiting}
            if not here:
                continue
            node = nodes[number]
            if take is not None and take.nr in here:
                G = here[take.nr]
                for reading, which in readings:
                    reading.meet(take, node, G if len(readings) == 1 else G[which])
            made: list[tuple[Edge, Tensor | None]] = [
                (o.below, fitted(o.way(node, here[0], o.shape), o.shape, o.dtype, 1)) for o in on if o.way is not None
            ]
            if join is not None:
                made = [(o.below, fitted(join(node, here, o.shape), o.shape, o.dtype, 1)) for o in on]
            elif len(made) < len(on):  # all have one, or none
                with QUIET_VMAP.held():
                    found = pull(node, here, [o.slot for o in on])
                made = [(o.below, found[o.slot]) for o in on]
            del here
            for below, t in made:
                if t is not None:
                    waiting[below] = waiting[below] + t if below in waiting else t

    # The loss gradient --------------------------------------------------------------------------------------------

    def _read(self, start: Start, group: Group) -> Any:
        """As the user's own backward passes."""
        if not group.asked:
            return start.call()
        reading = self._reading(group)
        handles: list[Any] = []
        try:
            for take in self.passage.takes:
                handles.append(self.nodes[take.number].register_prehook(reading.hook(take)))
            answer = start.call()
        finally:
            reading.over = True  # first: an interrupt may leave a hook behind
            for handle in handles:
                handle.remove()
        with torch.no_grad(), uncast():
            reading.close()
        return answer

    def _read_all(self, start: Start, group: Group, by_engine: list[int]) -> None:
        """Autograd goes down to the last layers only, and to the parameters that it serves itself; what the others'
        gradients add up to is delivered."""
        passage, nodes, params = self.passage, self.nodes, self.params
        group.summed = frozenset(range(len(params))) - frozenset(by_engine)
        held = [Held(nodes[take.number]) for take in passage.takes]
        targets = [GradientEdge(nodes[take.number], take.nr) for take in passage.takes]
        targets += [get_gradient_edge(params[k]) for k in by_engine]
        found = list(torch.autograd.grad(start.tensors, targets, retain_graph=start.retain, allow_unused=True))
        for k in reversed(by_engine):
            self.sums[k] = found.pop()
        with torch.no_grad(), uncast():
            reading = self._reading(group)
            for take, node, g in zip(passage.takes, held, found, strict=True):
                if g is not None:
                    reading.meet(take, node, g.unsqueeze(0))
            reading.close()

    def _free(self, start: Start) -> None:
        """Nothing is left for the user's backward to do but to free the graph: it runs with nothing to carry."""
        passage, nodes = self.passage, self.nodes
        if start.retain:
            return
        targets = [GradientEdge(nodes[take.number], take.nr) for take in passage.takes]
        freeing = [True]
        handles: list[Any] = []
        try:
            handles.append(
                nodes[0].register_prehook(lambda gradients: (None,) * len(gradients) if freeing else gradients)
            )
            torch.autograd.grad(start.tensors, targets, allow_unused=True)
        finally:
            freeing.clear()  # first: an interrupt may leave the hook behind
            for handle in handles:
                handle.remove()

    def _deliver(self) -> None:
        served = [k for k, t in enumerate(self.sums) if t is not None]
        sums = [self.sums[k] for k in served]
        self.sums.clear()
        deliver([self.params[k] for k in served], sums)

    def _by_engine(self, start: Start, group: Group) -> list[int] | None:
        """The parameters whose own gradients autograd had better compute; None: all, as it would anyway."""
        passage, params = self.passage, self.params
        usual = start.fills and not start.creates and passage.alone and not torch.is_anomaly_enabled()
        usual = usual and not self.retained
        if not usual or params[0].device.type != "cpu":
            return None
        if any(p._backward_hooks or not p.is_contiguous() for p in params):
            return None
        each, whole = any(q.each is not None for _, q in group.asked), any(q.whole for _, q in group.asked)
        known = passage.by_engine
        if (each, whole) not in known:
            known[each, whole] = slower(passage.costs, params, passage.N, each=each, whole=whole)
        return known[each, whole]


def _zero(edge: Edge) -> Tensor:
    _, dtype, device = meta(edge)
    return torch.zeros((), dtype=dtype, device=device)
