"""Gradients of single samples, read while the user's own backward passes; and other columns, sent by autograd itself.

The loss gradient is the one column that needs no walk of ours: autograd carries it past every layer anyway, and a hook
on the layer's node sees it. A few more columns from the outputs, a root of the loss's Hessian or random ones, autograd
carries fast enough, one after the other, when it is asked for nothing but what those layers see. What has to be known
beforehand is where the samples lie there and which parameters meet which rule. That follows from the structure of the
graph wherever `structure` can tell, so it is worked out once, by a plan as for any other quantity, and remembered under
a description of that structure. Each step describes its own graph anew, and takes this way only if it finds the same.

N samples · V columns.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hookjac.checkpoints import is_reentrant
from hookjac.curvature import cut
from hookjac.explain import Explanation
from hookjac.factor import Factor, total
from hookjac.graph import Edge, Node, attributes, gradients
from hookjac.head import Bending, bending
from hookjac.limits import refuse_large_results
from hookjac.plan import Plan
from hookjac.quantity.record import GGN, Loss, Quantity, Received, Sampled, Wish, demand_samples
from hookjac.rule import node_rule
from hookjac.samples import Layout
from hookjac.tape import Tape
from hookjac.uses import down

_REMEMBERED = 32  # structures of one model: a last batch of another size, sequences of several lengths

Structure = tuple[Any, ...]


class Described:
    """The graph of one loss: its nodes, as they are met, and what there is to say of each but its values."""

    __slots__ = ("nodes", "structure")

    def __init__(self, nodes: list[Node], structure: Structure) -> None:
        self.nodes, self.structure = nodes, structure


def describe(tape: Tape, loss: Tensor, position: Mapping[int, int]) -> Described | None:
    """position: id of a parameter to serve -> its number. None where a graph is no fixed structure (a checkpoint), or
    where something is amiss that the plan has words for."""
    if loss.grad_fn is None:
        return None
    nodes: list[Node] = [loss.grad_fn]
    index: dict[Node, int] = {loss.grad_fn: 0}
    facts: list[Any] = []
    for node in nodes:  # grows as we go
        kind = type(node)
        told = _KINDS.get(kind) or _kind(node)
        what: Any = kind
        if told.leaf:
            variable = node.variable
            (out,) = node._input_metadata
            if out.dtype != variable.dtype or tuple(out.shape) != variable.shape:
                return None
            facts.append((position.get(id(variable), -1), type(variable), *out.shape, out.dtype))
            continue
        if told.reopens:
            return None
        if told.numbers:
            what = (kind, *[_fixed(getattr(node, name)) for name in told.numbers])
        below: list[int | None] = []
        for child, nr in node.next_functions:
            if child is None:
                below.append(None)
                continue
            k = index.get(child)
            if k is None:
                k = index[child] = len(nodes)
                nodes.append(child)
            below += (k, nr)
        marks: Any = node.metadata.get(tape)
        if marks is not None:
            marks = tuple([(nr, mark.selected, mark.output) for nr, mark in marks.items() if mark.output]) or None
        facts.append((what, marks, *[(*out.shape, out.dtype) for out in node._input_metadata], *below))
    return Described(nodes, tuple(facts))


class _Kind(NamedTuple):
    """What does not differ between nodes of one type. numbers: names of what they save besides tensors."""

    leaf: bool
    reopens: bool
    numbers: tuple[str, ...]


_KINDS: weakref.WeakKeyDictionary[type, _Kind] = weakref.WeakKeyDictionary()


def _kind(node: Node) -> _Kind:
    held = {name.removeprefix("_raw") for name in attributes(node, "_raw_saved_")}  # tensors: not to be read
    numbers = tuple(name for name in attributes(node, "_saved_") if name not in held)
    found = _KINDS[type(node)] = _Kind(Edge(node, 0).leaf is not None, is_reentrant(node), numbers)
    return found


def _fixed(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple([_fixed(v) for v in value])
    return value if isinstance(value, (int, float, str, type(None))) else type(value)


class Take:
    """A node at which parameters meet a rule."""

    __slots__ = ("index", "layout", "nr", "uses")

    def __init__(self, index: int, nr: int, layout: Layout, uses: list[tuple[int, int, tuple[Any, ...]]]) -> None:
        self.index, self.nr, self.layout = index, nr, layout
        self.uses = uses  # number of the parameter, its place there, the nodes between


class Passage:
    """Where to look as a backward of this structure passes."""

    def __init__(self, plan: Plan, found: Described, explanation: Explanation, *, curved: bool) -> None:
        index = {node: k for k, node in enumerate(found.nodes)}
        number = {p: k for k, p in enumerate(plan.names)}
        self.N, self.explanation, self.names = plan.N, explanation, list(plan.names.values())
        self.out_shape = plan.selected[0].shape[1:] if plan.selected else torch.Size()
        self.uses = [len(plan.uses.of.get(p, ())) for p in plan.names]
        self.takes: list[Take] = []
        self.size = 0  # entries of one column at all of them
        for key, uses in plan.uses.at.items():
            (edge,) = plan.route.outs[key]
            here = [(number[p], int(u.slot), tuple((index[e.node], e.nr) for e in u.chain)) for p, u in uses]
            self.takes.append(Take(index[edge.node], edge.nr, plan.layout[edge], here))
            self.size += edge.shape.numel()
        self.curved = curved  # whether anybody looked for what follows
        self.bending = _bending(plan, index) if curved else None

    def serves(self, quantities: Sequence[Quantity]) -> bool:
        """None of them asks for more columns than fit side by side, or for a loss without a closed form."""
        for wish in {q.wish for q in quantities}:
            if isinstance(wish, Loss):
                continue
            if self.bending is None or not isinstance(wish, (GGN, Sampled)):
                return False
            V = wish.samples if isinstance(wish, Sampled) else self.out_shape.numel()
            if isinstance(wish, GGN) and not (self.bending.a_row_each and self.bending.dim):
                return False
            if V * self.size > (_ALONE if V == 1 else _BESIDE):
                return False
        return True

    def run(
        self,
        found: Described,
        loss: Tensor,
        params: Sequence[nn.Parameter],
        quantities: Sequence[Quantity],
        quiet: Callable[[], contextlib.AbstractContextManager[None]],
        call: Callable[[], Any],
    ) -> tuple[Any, list[list[Any]]] | None:
        """The user's backward, and for each parameter the result of each quantity. None: these values have no root."""
        for q in quantities:
            demand_samples(q, self.N)
        if any(q.entries is not None for q in quantities):
            refuse_large_results(quantities, params, self.names, self.N, self.out_shape.numel())
        reading = _Reading(self, found, params, quantities)
        others = dict.fromkeys(q.wish for q in reversed(quantities) if not isinstance(q.wish, Loss))
        if others:
            with torch.no_grad(), quiet():
                if not reading.send(loss, others):
                    return None
        handles = []
        if len(others) < len({q.wish for q in quantities}):
            handles = [found.nodes[take.index].register_prehook(reading.at(take)) for take in self.takes]
        try:
            answer = call()
        finally:
            for handle in handles:
                handle.remove()
        return answer, reading.results()


# Entries of all columns at all takes: one column is autograd's business, several large ones go faster side by side
_ALONE, _BESIDE = 1 << 26, 1 << 19


def _bending(plan: Plan, index: Mapping[Node, int]) -> Bending | None:
    """That of the loss in the model's one output, told by the numbers of nodes."""
    edges, bare = cut(plan)
    if plan.lost or bare or len(edges) != 1 or (found := bending(plan.route, edges[0], plan.N)) is None:
        return None

    def number(edge: Edge) -> Edge:
        return Edge(index[edge.node], edge.nr)

    return found._replace(
        at=number(found.at), out=number(found.out), output=number(found.output), chain=[number(e) for e in found.chain]
    )


class _Reading:
    """One backward's worth of it."""

    def __init__(
        self, passage: Passage, found: Described, params: Sequence[nn.Parameter], quantities: Sequence[Quantity]
    ) -> None:
        self.passage, self.found, self.params, self.quantities = passage, found, params, quantities
        self.open = list(passage.uses)
        self.factors: list[list[Factor]] = [[] for _ in params]
        self.sent: dict[Wish, tuple[list[list[Factor]], Tensor]] = {}  # factors of each parameter, and the metric
        self.made: list[list[Any] | None] = [None] * len(params)

    def send(self, loss: Tensor, wishes: Iterable[Wish]) -> bool:
        """Columns of the outputs, by autograd's own engine, which computes no more than what the takes see."""
        passage, nodes = self.passage, self.found.nodes
        at = passage.bending
        assert at is not None

        def real(edge: Edge) -> Edge:
            return Edge(nodes[edge.node], edge.nr)

        at = at._replace(at=real(at.at), out=real(at.out), output=real(at.output), chain=[real(e) for e in at.chain])
        form = at.form(loss)
        targets = [Edge(nodes[take.index], take.nr) for take in passage.takes]
        for wish in wishes:
            made = at.draw(form, wish, passage.N) if isinstance(wish, Sampled) else at.root(form, passage.N)
            if made is None:
                return False
            columns, metric = made
            rows = [gradients([at.output], targets, [u]) for u in columns]
            factors: list[list[Factor]] = [[] for _ in self.params]
            for k, take in enumerate(passage.takes):
                G = rows[0][k].unsqueeze(0) if len(rows) == 1 else torch.stack([row[k] for row in rows])
                self._parts(take, G, factors)
            self.sent[wish] = factors, metric
        return True

    def at(self, take: Take) -> Callable[[tuple[Tensor | None, ...]], None]:
        def see(gradients: tuple[Tensor | None, ...]) -> None:
            g = gradients[take.nr]
            if g is None:
                return
            if not torch.is_grad_enabled():
                self._meet(take, g.unsqueeze(0))
                return
            with torch.no_grad():  # a backward that makes a graph
                self._meet(take, g.detach().unsqueeze(0))

        return see

    def _parts(self, take: Take, G: Tensor, into: list[list[Factor]]) -> None:  # G [V, *out]
        node = self.found.nodes[take.index]
        rule = node_rule(node)
        assert rule is not None
        for k, slot, chain in take.uses:
            factor = rule.part(node, slot, G, take.layout)
            if chain:
                factor = down(tuple(Edge(self.found.nodes[i], nr) for i, nr in chain), factor)
            into[k].append(factor)

    def _meet(self, take: Take, G: Tensor) -> None:  # G [1, *out]
        self._parts(take, G, self.factors)
        for k, _, _ in take.uses:
            self.open[k] -= 1
            if not self.open[k]:
                self._finish(k)

    def _finish(self, k: int) -> None:
        loss, self.factors[k] = self.factors[k], []
        wholes: dict[Wish, Factor | None] = {}
        passage, param = self.passage, self.params[k]
        found = []
        for q in self.quantities:
            factors, metric = (
                (loss, None) if isinstance(q.wish, Loss) else (self.sent[q.wish][0][k], self.sent[q.wish][1])
            )
            if q.wish not in wholes:
                wholes[q.wish] = total(factors) if factors else None
            factor, M = wholes[q.wish], passage.N
            if q.subsample is not None:
                M = len(q.subsample)
                pick = torch.tensor(q.subsample, device=param.device)
                factor = factor and factor.samples(pick)
                metric = metric if metric is None else metric[pick]
            pieces = [] if factor is None else [(factor, metric)]
            found.append(q.reduce(Received(param, passage.N, M, passage.out_shape, pieces)))
        self.made[k] = found

    def results(self) -> list[list[Any]]:
        """After the backward: a parameter that it did not meet has gradients of zero."""
        for k, found in enumerate(self.made):
            if found is None:
                with torch.no_grad():
                    self._finish(k)
        return [found for found in self.made if found is not None]


# What is remembered -----------------------------------------------------------------------------------------------

_PASSAGES: weakref.WeakKeyDictionary[nn.Module, dict[Structure, Passage | None]] = weakref.WeakKeyDictionary()


def passed(model: nn.Module) -> bool:
    """Is there a structure of this model that is passed through?"""
    return any(passage is not None for passage in _PASSAGES.get(model, {}).values())


def recall(model: nn.Module, names: tuple[str, ...], found: Described) -> Passage | Literal["unknown"] | None:
    """None: this structure is known, and there is no passage."""
    known = _PASSAGES.get(model)
    return "unknown" if known is None else known.get((names, found.structure), "unknown")


def remember(model: nn.Module, names: tuple[str, ...], found: Described, passage: Passage | None) -> None:
    known = _PASSAGES.setdefault(model, {})
    while len(known) >= _REMEMBERED:
        known.pop(next(iter(known)))
    known[names, found.structure] = passage


def may_pass(plan: Plan) -> bool:
    """Is all that the plan found a matter of structure, and every parameter met by rules of nodes alone?"""
    plain = not (plan.glue or plan.masked or plan.top.direct or plan.top.entwined or plan.route.calls)
    return plan.certain and plain and not (plan.route.reopened or plan.route.recomputes)
