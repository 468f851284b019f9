"""Where the Hessian's columns are best gathered into a dense block, and what they cost.

Every curved station adds a group of columns: the unit columns of what it is given, weighed by its second derivative.
They may walk on as they are, K columns of all samples, or be gathered: replaced by the D unit columns of the tensors
that they are passing, with the dense symmetric block [N, D, D] of what has come so far as their metric. A block makes
the next linear step free (its unit columns are the same for every sample) and all later ones dearer to weigh. Which
places are best follows from the sizes alone, by dynamic programming over the stations: what comes after a gathering
depends on nothing before it.

N samples · D features of one sample at the tensors that columns are passing · K columns of one group.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from hookjac.graph import Edge
from hookjac.plan import Plan
from hookjac.route import Key

ENTRY = 60.0  # FLOPs that one pass over an entry in memory is worth
_STATION = 1e5  # FLOPs that the overhead of one call is worth
_MEMORY = float(1 << 30)  # entries of columns alive at once; beyond, products are the only way
BLOCK = 1 << 27  # entries of one dense block [N, D, D]: a gigabyte in float64


@dataclass(frozen=True)
class _Group:
    """size: number of columns. full: weighed by a matrix, not by one number each. shared: the same for all samples.
    unit: the unit columns of the tensor that they are at."""

    size: int
    full: bool
    shared: bool = False
    unit: bool = False


@dataclass(frozen=True)
class _Place:
    """A station that columns reach. work: FLOPs of one column of all samples through it. weighs: for each parameter
    used here, entries of one sample's column at it. D, entries: of the tensors passed below."""

    key: Key
    work: float
    linear: bool
    weighs: tuple[int, ...]
    bends: int  # features of what curves here
    full: bool  # not entry by entry
    D: int
    entries: float


@dataclass(frozen=True)
class Gathering:
    """at: the stations below which columns are gathered. flops: of all columns, for all parameters together."""

    at: frozenset[Key]
    flops: float


def best(
    plan: Plan,
    edges: Collection[Edge],
    active: Collection[Key],
    curves: Mapping[Key, list[Edge]],
    crossings: Mapping[Key, Sequence[object]],
    diagonal: Collection[Key],
    work: Mapping[Key, float],
) -> Gathering:
    """edges: where the first columns start. diagonal: curved stations that act entry by entry. work: see `_Place`."""
    N = plan.N
    C = sum(_features(e, N) for e in edges)
    start = _Group(C, full=True, shared=True, unit=True)
    places = _places(plan, edges, active, curves, crossings, diagonal, work)
    if float(N) * C * C > _MEMORY:
        return Gathering(frozenset(), float("inf"))
    # costs[k]: the least from place k on, if columns are gathered below it; then[k]: where to gather next
    after: dict[int, tuple[float, int | None]] = {}
    for k in reversed(range(len(places))):
        block = _Group(places[k].D, full=True, shared=True, unit=True)
        if places[k].D and float(N) * places[k].D ** 2 <= BLOCK:
            after[k] = _onward([block], places, k + 1, N, after)
    cost, first = _onward([start], places, 0, N, after)
    chosen: set[Key] = set()
    while first is not None:
        chosen.add(places[first].key)
        first = after[first][1]
    return Gathering(frozenset(chosen), cost)


def _onward(
    groups: list[_Group], places: list[_Place], k: int, N: int, after: Mapping[int, tuple[float, int | None]]
) -> tuple[float, int | None]:
    """The least cost of these groups from place k on, and where to gather them first (None: nowhere)."""
    so_far, found, where = 0.0, float("inf"), None
    for j in range(k, len(places)):
        place = places[j]
        so_far += _STATION + sum(_weighed(g, o, N) for o in place.weighs for g in groups)
        so_far += sum((1 / N if g.shared and place.linear else 1.0) * g.size * place.work for g in groups)
        groups = [replace(g, shared=g.shared and place.linear, unit=False) for g in groups]
        if place.bends:
            groups = [*groups, _Group(place.bends, full=place.full, shared=True, unit=True)]
        if j in after and sum(g.size for g in groups) > 1:
            here = so_far + sum(_gathered(g, place.D, N) for g in groups) + after[j][0]
            if here < found:
                found, where = here, j
        if sum(g.size * (1 / N if g.shared else 1.0) for g in groups) * place.entries > _MEMORY:
            return found, where
        if so_far > found:
            return found, where
    return (so_far, None) if so_far <= found else (found, where)


def _weighed(g: _Group, o: int, N: int) -> float:
    """Squares of the columns of one parameter's layer, weighed and summed: [N, o]."""
    if g.unit:
        return float(N) * o
    if g.full:
        return 2.0 * N * g.size * g.size * o + ENTRY * N * g.size * o
    return (2.0 if g.shared else ENTRY) * N * g.size * o


def _gathered(g: _Group, D: int, N: int) -> float:
    """What a group adds to a block [N, D, D]."""
    if g.unit:
        return ENTRY * N * (D if not g.full else D * D)
    product = 2.0 * N * g.size * D * D + ENTRY * N * (g.size * D + D * D)
    return product + (2.0 * N * g.size * g.size * D if g.full else 0.0)


def _features(edge: Edge, N: int) -> int:
    return edge.shape.numel() // max(N, 1)


def _places(
    plan: Plan,
    edges: Collection[Edge],
    active: Collection[Key],
    curves: Mapping[Key, list[Edge]],
    crossings: Mapping[Key, Sequence[object]],
    diagonal: Collection[Key],
    work: Mapping[Key, float],
) -> list[_Place]:
    route, N = plan.route, plan.N
    alive: dict[Edge, None] = dict.fromkeys(edges)
    found = []
    for key in route.order:
        here = [e for e in route.outs[key] if e in alive]
        if key not in active or not here:
            continue
        for e in here:
            del alive[e]
        call = route.calls.get(key)
        data = [e for e in plan.uses.data(route, key) if route.key(e) in active]
        alive.update(dict.fromkeys(data))
        bends = sum(_features(e, N) for e in curves.get(key, ()))
        bends += sum(_features(e, N) for _ in crossings.get(key, ()) for e in data)
        weighs = tuple(_features(e, N) for _ in plan.uses.at.get(key, ()) for e in here[:1])
        passed = float(sum(e.shape.numel() for e in data))
        found.append(
            _Place(
                key,
                work[key] * bool(data) + ENTRY * passed,
                call is not None and call.rule.constant,
                weighs,
                bends,
                key not in diagonal,
                sum(_features(e, N) for e in alive),
                float(sum(e.shape.numel() for e in alive)),
            )
        )
    return found
