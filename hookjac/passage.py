"""The way of columns through a graph of known structure, worked out once.

A plan finds out where the samples lie in each tensor and which parameters meet which rule. Where all of that follows
from the structure of the graph, it holds for every graph of that structure, so it is kept: written in numbers of nodes,
as they are met coming down from the loss (`described`), and without a tensor. `passing` goes by it.

N samples · V columns.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from hookjac.curvature import cut
from hookjac.deliver import Cost
from hookjac.described import Described, Structure
from hookjac.explanation import Explanation
from hookjac.graph import Edge, Node, meta
from hookjac.head import Bending, bending
from hookjac.plan import Plan, reachable
from hookjac.roads import Roads, choose, piecewise_linear
from hookjac.rule import NodeRule, node_rule
from hookjac.samples import Layout
from hookjac.talkers import talks
from hookjac.uses import turns
from hookjac.ways import Join, Way, joins, ways

_REMEMBERED = 32  # structures of one model: a last batch of another size, sequences of several lengths

Numbered = Edge  # whose node is a number


class Use(NamedTuple):
    """A parameter, by its number; its place at the node; the nodes between that and the parameter."""

    param: int
    slot: int
    chain: tuple[Numbered, ...]
    turned: bool  # they do nothing but transpose it, once


class Take(NamedTuple):
    """A node at which parameters meet a rule, and which of its outputs the rule looks at."""

    number: int
    nr: int
    layout: Layout
    rule: NodeRule
    uses: tuple[Use, ...]


class On(NamedTuple):
    """By which input of a node columns go on, where to, and their shape and type there. way: the closed form, if all
    inputs have one."""

    slot: int
    below: Numbered
    way: Way | None
    shape: torch.Size
    dtype: torch.dtype


class Step(NamedTuple):
    """A node on the way."""

    number: int
    outs: tuple[Numbered, ...]
    take: Take | None
    on: tuple[On, ...]
    join: Join | None  # for a node of several outputs: the closed form that takes all of them


@dataclass(eq=False)
class Passage:
    """What is known of all graphs of one structure."""

    N: int
    names: tuple[str, ...]  # of the parameters that are served
    out_shape: torch.Size  # of one sample's selected output
    explanation: Explanation
    curved: Explanation | None  # with the road of `hess_diag`; None where that has a curvature of its own
    takes: tuple[Take, ...]
    uses: tuple[int, ...]  # of each parameter
    costs: tuple[Cost, ...]  # of each parameter
    widest: int  # entries of the largest tensor that columns pass
    steps: tuple[Step, ...]  # below the selected output, each after all that it receives from
    output: Numbered | None  # the selected output, if there is one and it is met
    bending: Bending | None  # how the loss bends in it, where a closed form says
    splits: bool  # the loss splits into a loss of that output and a network
    alone: bool  # nothing but parameters that are served is differentiated, and no gradient is sparse

    def __post_init__(self) -> None:
        self.odd = sum(step.join is None and any(on.way is None for on in step.on) for step in self.steps)
        self.by_engine: dict[tuple[bool, bool], list[int] | None] = {}  # whose gradients it had better compute


def passage_of(plan: Plan, found: Described, tell: Callable[[Roads | None], Explanation]) -> Passage | None:
    """None unless all that the plan found is a matter of structure, and every parameter is met by rules of nodes.

    tell: explains the roads.
    """
    plain = not (plan.glue or plan.masked or plan.top.direct or plan.top.entwined or plan.route.calls)
    if not plan.certain or not plain or plan.route.reopened or plan.route.recomputes:
        return None
    index = {node: k for k, node in enumerate(found.nodes)}
    number = {p: k for k, p in enumerate(plan.names)}

    def told(edge: Edge) -> Numbered:
        return Edge(index[edge.node], edge.nr)

    takes: dict[Node, Take] = {}
    for key, uses in plan.uses.at.items():
        (edge,) = plan.route.outs[key]
        rule = node_rule(key)
        assert rule is not None
        here = tuple(
            Use(number[p], int(u.slot), tuple(told(e) for e in u.chain), len(u.chain) == 1 and turns(u.chain[0].node))
            for p, u in uses
        )
        takes[key] = Take(index[key], edge.nr, plan.layout[edge], rule, here)
    selected = plan.selected[0] if len(plan.selected) == 1 else None
    bent, splits = _loss(plan, selected)
    return Passage(
        N=plan.N,
        names=tuple(plan.names.values()),
        out_shape=plan.selected[0].shape[1:] if plan.selected else torch.Size(),
        explanation=tell(None),
        curved=None if (roads := _flat(plan, selected, splits)) is None else tell(roads),
        takes=tuple(takes.values()),
        uses=tuple(len(plan.uses.of.get(p, ())) for p in plan.names),
        costs=tuple(_cost(plan, p) for p in plan.names),
        widest=max((e.shape.numel() for k in plan.needed for e in plan.route.outs[k] if e.leaf is None), default=0),
        steps=_steps(plan, selected, takes, told) if selected is not None else (),
        output=None if selected is None else told(selected),
        bending=None if bent is None else bent.renamed(told),
        splits=splits,
        alone=_alone(plan, found),
    )


def _loss(plan: Plan, selected: Edge | None) -> tuple[Bending | None, bool]:
    """How the loss bends in the selected output, if a closed form says; and whether it is a loss of that alone."""
    if selected is None or plan.lost:
        return None, False
    edges, bare = cut(plan)
    if bare or edges != [selected]:
        return None, False
    return bending(plan.route, selected, plan.N), True


def _flat(plan: Plan, selected: Edge | None, splits: bool) -> Roads | None:
    """Of a network that is piecewise linear: there the Hessian is the Gauss-Newton matrix, at that price."""
    if selected is None or not splits or not piecewise_linear(plan, [selected]):
        return None
    with torch.enable_grad():
        roads = choose(plan, [selected], [], "auto")
    return roads if set(roads.road.values()) <= {"columns"} else None


def _steps(
    plan: Plan, selected: Edge, takes: Mapping[Node, Take], told: Callable[[Edge], Numbered]
) -> tuple[Step, ...]:
    """All stations that columns pass or are seen at, as `Route.step` takes them."""
    route = plan.route
    both = (plan.through | plan.visit) & reachable(route, [route.key(selected)])
    found = []
    for key in route.order:
        if key not in both or route.leaf(key) is not None:
            continue
        closed = plan.uses.parted.get(key, ()) if key in plan.through else range(len(route.after[key]))
        after = [(k, e) for k, e in enumerate(route.after[key]) if e is not None and k not in closed]
        after = [(k, e) for k, e in after if route.key(e) in both]
        outs = route.outs[key]
        known = ways(key) or {}
        if not known.keys() >= {k for k, _ in after} or len(outs) > 1 or meta(outs[0])[1].is_complex:
            known = {}
        on = tuple(On(k, told(e), known.get(k), *meta(e)[:2]) for k, e in after)
        together = None if meta(outs[0])[1].is_complex else joins(key)
        found.append(Step(told(Edge(key, 0)).node, tuple(told(e) for e in outs), takes.get(key), on, together))
    return tuple(found)


def _cost(plan: Plan, p: int) -> Cost:
    flops, positions, copies = 0.0, 1, False
    shape = plan.params[p].shape
    for use in plan.uses.of.get(p, ()):
        (edge,) = plan.route.outs[use.key]
        rule = node_rule(use.key)
        if len(shape) > 1:
            o = edge.shape[1] if len(shape) > 2 and len(edge.shape) > 1 else edge.shape[-1]  # channels, features
            rows = edge.shape.numel() / max(1, o)
            flops += 2.0 * rows * shape.numel()
            positions = max(positions, int(rows / max(1, plan.N)))
        copies |= rule is not None and rule.copies
    return Cost(flops, positions, copies)


def _alone(plan: Plan, found: Described) -> bool:
    """Does the graph lead to no leaf but parameters that are served, all of whose gradients are dense, by no node that
    waits for them to be there when the backward ends?"""
    if any(talks(node) for node in found.nodes):
        return False
    if any(getattr(node, "_saved_sparse", False) for node in found.nodes):  # optimizers rely on it: autograd's own
        return False
    leaves = [leaf for node in found.nodes if (leaf := Edge(node, 0).leaf) is not None]
    return all(id(leaf) in plan.names and plan.uses.of.get(id(leaf)) for leaf in leaves)


# What is remembered -----------------------------------------------------------------------------------------------

_PASSAGES: weakref.WeakKeyDictionary[nn.Module, dict[Structure, Passage | None]] = weakref.WeakKeyDictionary()


def recall(model: nn.Module, names: tuple[str, ...], found: Described) -> Passage | Literal["unknown"] | None:
    """None: this structure is known, and there is no passage."""
    kept = _PASSAGES.get(model)
    return "unknown" if kept is None else kept.get((names, found.structure), "unknown")


def remember(model: nn.Module, names: tuple[str, ...], found: Described, passage: Passage | None) -> None:
    kept = _PASSAGES.setdefault(model, {})
    while len(kept) >= _REMEMBERED:
        kept.pop(next(iter(kept)))
    kept[names, found.structure] = passage


def known(model: nn.Module) -> Iterable[Passage | None]:
    """What is remembered of this model."""
    return _PASSAGES.get(model, {}).values()
