"""What quantities would cost, from the sizes in a plan: nothing walks, and nothing of their size is made.

What columns cost on their way is known station by station (`roads`); what a parameter makes of them is found by letting
the quantity's own code run on tensors without data.

N samples · V columns · D features of one sample where the loss ends · P a parameter's entries.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hookjac.curvature import cut, features
from hookjac.errors import HookjacError
from hookjac.factor import Dense, Factor, total
from hookjac.gathering import ENTRY
from hookjac.graph import meta
from hookjac.plan import Plan
from hookjac.quantity.record import (
    Averaged,
    Diagonal,
    Graph,
    Hessian,
    Loss,
    Output,
    Probes,
    Quantity,
    Received,
    Sampled,
)
from hookjac.roads import PRODUCT, Roads, station
from hookjac.route import Key
from hookjac.structured import JacTensor
from hookjac.uses import received


@dataclass(frozen=True)
class Cost:
    """FLOPs: of products, and one for each entry that anything else makes; passes: those entries, over in memory."""

    flops: float = 0.0
    passes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.passes + other.passes)

    def __mul__(self, times: float) -> Cost:
        return Cost(times * self.flops, times * self.passes)

    @property
    def work(self) -> float:
        """What it takes, in FLOPs of products."""
        return self.flops + ENTRY * self.passes


@dataclass(frozen=True)
class Price:
    """Of one quantity for one parameter: FLOPs of what it makes of its columns, bytes of the result."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Bill:
    """What a quantity costs on top of a step, for all parameters together.

    columns: how many start; 0: none, the work is done by products. flops: of their walk (which the step's own backward
    often saves those of the loss gradient), and of what parameters make of them. backwards: that, with every pass over
    memory, in units of a plain backward; None where that one has nothing to do (no samples). bytes: of the results;
    held: of the columns where they are widest. each: the part of every parameter. note: what else there is to know;
    refused: why it would be.
    """

    quantity: str
    columns: int
    flops: float
    backwards: float | None
    bytes: float
    held: float
    each: Mapping[str, Price]
    note: str = ""
    refused: str = ""


@dataclass(frozen=True)
class Survey:
    """Sizes of a plan: all that prices follow from. It holds no tensor with data.

    C, out: entries of one sample's selected output, and its shape. widest: entries of the largest tensor on the way.
    through, masked: of one column, through all stations that pass columns of all samples together, or each sample's by
    itself. stepwise: of the recursions that approximate. forms: what each parameter receives, of one column.
    roads, hessian, products: how many parameters go by each, and its work.
    """

    N: int
    C: int
    D: int
    out: torch.Size
    widest: int
    through: Cost
    masked: Cost
    stepwise: Cost
    params: Mapping[str, Tensor]
    forms: Mapping[str, Factor | None]
    roads: Mapping[str, int]
    hessian: float
    products: Mapping[str, float]

    def columns(self, q: Quantity) -> int:
        """V: how many start."""
        wish = q.wish
        if isinstance(wish, Loss):
            return 1
        if isinstance(wish, Output):
            return self.C if wish.rows is None else len(wish.rows)
        if isinstance(wish, Sampled):
            return wish.samples
        if isinstance(wish, Hessian) and "columns" not in self.roads:
            return 0
        return 0 if isinstance(wish, (Graph, Probes)) else self.D

    @functools.cached_property
    def backward(self) -> Cost:
        """A plain one: a column, and one gradient for each parameter."""
        found = self.through + self.masked
        for form in self._forms(1).values():
            if form is not None:
                _counted(form.sum)  # leaves patches there: a convolution's own backward does without
                found += _counted(form.sum)[0]
        return found

    def _forms(self, V: int) -> dict[str, Factor | None]:
        """Anew each time: what one quantity makes of them and leaves there (patches), no other shall find for free."""
        picks = torch.zeros(V, dtype=torch.long, device="meta")
        return {name: None if f is None else _hollow(f).columns(picks) for name, f in self.forms.items()}

    def bill(self, q: Quantity, refused: str = "") -> Bill:
        V = self.columns(q)
        forms = self._forms(self.D if q.full else V)
        cost, size, each = Cost(), 0.0, dict[str, Price]()
        for name, p in self.params.items():
            try:
                own, made = self._reduced(q, name, p, forms[name])
            except HookjacError as error:
                refused = refused or f"{q.name} of parameter {name!r}: {error}"
                continue
            if isinstance(q.wish, Hessian):
                by = Cost(self.products.get(name, 0.0))
                own = own + by if q.full else by  # a diagonal's share is in the columns' bill
            cost, size = cost + own, size + size_of(made)
            each[name] = Price(own.flops, size_of(made))
        way, note = self._way(q, V)
        cost += way
        plain = self.backward.work
        held = float(V) * self.widest * next(iter(self.params.values())).element_size()
        return Bill(
            q.name, V, cost.flops, cost.work / plain if plain else None, size, held, each, note, refused
        )  # fmt: skip

    def _way(self, q: Quantity, V: int) -> tuple[Cost, str]:
        """What comes before the parameters make something of it, and what there is to say of that."""
        wish, plain = q.wish, self.backward
        if isinstance(wish, Graph):
            return Cost(), f"each product: about {PRODUCT:.0f} backwards"
        if isinstance(wish, Probes):
            return plain * (PRODUCT * wish.samples), f"{wish.samples} products"
        if isinstance(wish, Hessian):
            return Cost(self.hessian), ", ".join(f"{count} by {road}" for road, count in self.roads.items())
        if isinstance(wish, (Averaged, Diagonal)):
            return self.stepwise, "a block at every step"
        return (self.through + self.masked * self.N) * V, ""

    def _reduced(self, q: Quantity, name: str, p: Tensor, form: Factor | None) -> tuple[Cost, Any]:
        try:
            return _counted(functools.partial(q.reduce, self._received(q, name, p, form)))
        except NotImplementedError:  # a size that depends on the data (which rows of a table meet)
            passed = sum(t.numel() for t in form.tensors) if form is not None else 0
            return Cost(passed, passed), _counted(functools.partial(q.reduce, self._received(q, name, p, None)))[1]

    def _received(self, q: Quantity, name: str, p: Tensor, form: Factor | None) -> Received:
        M = self.N if q.subsample is None else len(q.subsample)
        pieces: list[tuple[Factor, Tensor | None]] = []
        probed = None
        if form is not None and not isinstance(q.wish, (Graph, Probes)) and (q.full or not isinstance(q.wish, Hessian)):
            if q.subsample is not None:
                form = form.samples(torch.zeros(M, dtype=torch.long, device="meta"))
            full, V = q.full or isinstance(q.wish, Averaged), form.V
            metric = None if isinstance(q.wish, (Loss, Output)) else p.new_empty(M, V, V) if full else p.new_empty(M, V)
            pieces = [(form, metric)]
        if isinstance(q.wish, Probes):
            probed = (p.new_empty(q.wish.samples, *p.shape), p.new_empty(q.wish.samples, *p.shape))
        return Received(p, self.N, M, self.out, pieces, probed=probed, times=lambda v: v, name=name)


def survey(plan: Plan, roads: Roads | None = None) -> Survey:
    """roads: where the Hessian's are known."""
    edges = plan.selected
    with contextlib.suppress(HookjacError):
        edges = cut(plan)[0] or edges
    below = [e for key in plan.needed for e in plan.route.outs[key] if e.leaf is None]
    names, N = plan.names, plan.N
    works = {key: Cost(station(plan, key), _made(plan, key)) for key in plan.route.order if key in plan.needed}
    return Survey(
        N=N,
        C=plan.out_shape.numel() if plan.selected else 0,
        D=sum(features(e, N) for e in edges),
        out=plan.out_shape,
        widest=max((e.shape.numel() for e in below), default=0),
        through=sum((cost for key, cost in works.items() if key in plan.through), Cost()),
        masked=sum((cost for key, cost in works.items() if key in plan.masked and key not in plan.through), Cost()),
        stepwise=sum((_boiled(plan, key, cost) for key, cost in works.items() if key in plan.through), Cost()),
        params={names[p]: _hollow(t.detach()) for p, t in plan.params.items()},
        forms={names[p]: _form(plan, p) for p in plan.names},
        roads={} if roads is None else collections.Counter(roads.road.values()),
        hessian=0.0 if roads is None else roads.columns,
        products={} if roads is None else {names[p]: cost for p, cost in roads.cost.items()},
    )


def _made(plan: Plan, key: Key) -> float:
    """Entries that one column of all samples has below a station."""
    return float(sum(e.shape.numel() for e in plan.uses.data(plan.route, key) if e.leaf is None))


def _boiled(plan: Plan, key: Key, cost: Cost) -> Cost:
    """Unit columns through a station, and the block [N, D, D] that is made of them."""
    N, call = max(1, plan.N), plan.route.calls.get(key)
    above = float(sum(features(e, plan.N) for e in plan.route.outs[key] if e.leaf is None))
    D = _made(plan, key) / N
    shared = call is not None and call.rule.constant
    return cost * (above / N if shared else above) + Cost(2 * N * above * D * D, N * D * D)


def _form(plan: Plan, p: int) -> Factor | None:
    """What a parameter receives of one column, without its data."""
    found: list[Factor] = []
    for use in plan.uses.of.get(p, []) if plan.N else ():
        edge = plan.route.outs[use.key][0]
        shape, dtype, device = meta(edge)
        G = torch.zeros((), dtype=dtype, device=device).expand(1, *shape)
        factor = received(plan.route, plan.uses, use.key, G, plan.layout[edge], only=p).get(p)
        if factor is not None:
            found.append(_hollow(factor))
    if p in plan.glue and plan.N:
        like = plan.params[p]
        found.append(Dense(torch.empty(1, plan.N, *like.shape, dtype=like.dtype, device="meta"), fresh=True))
    return total(found) if found else None


def _hollow(found: Any) -> Any:
    """The same of tensors without data."""
    if isinstance(found, Tensor):
        return torch.empty(found.shape, dtype=found.dtype, device="meta")
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        own = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.init}
        return type(found)(**{key: _hollow(value) for key, value in own.items()})
    return tuple(map(_hollow, found)) if type(found) is tuple else found


def size_of(made: Any) -> float:
    """Bytes of what a quantity leaves on a parameter; of a `JacTensor`, those that it is kept as."""
    if isinstance(made, JacTensor):
        return float(sum(t.numel() * t.element_size() for t in made.factor.tensors))
    if isinstance(made, Tensor):
        return float(made.numel() * made.element_size())
    if dataclasses.is_dataclass(made) and not isinstance(made, type):
        return sum(size_of(getattr(made, f.name)) for f in dataclasses.fields(made))
    return float(sum(map(size_of, made))) if isinstance(made, (list, tuple)) else 0.0


def _gemm(x: Any, w: Any, *rest: Any, out_val: Any) -> float:
    return 2.0 * x.numel() * w.shape[0]


_FLOPS: dict[Any, Callable[..., Any]] = {**flop_registry, getattr(torch.ops.mkldnn, "_linear_pointwise", None): _gemm}


class Count(TorchDispatchMode):
    """Counts the cost of what runs inside. Questions about data that is not there are answered with no."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        if func is torch.ops.aten.bincount.default and args[0].is_meta and len(args) > 2 and args[1] is None:
            return args[0].new_empty(args[2])
        out = func(*args, **kwargs)
        known = _FLOPS.get(func._overloadpacket)
        if known is not None:
            self.cost += Cost(float(known(*args, **kwargs, out_val=out)))
        elif not func.is_view and isinstance(out, Tensor):
            entries = float(max([out.numel(), *(t.numel() for t in args if isinstance(t, Tensor))]))
            self.cost += Cost(entries, entries)
        return out


def _counted(run: Callable[[], Any]) -> tuple[Cost, Any]:
    with Count() as count, torch.no_grad():
        made = run()
    return count.cost, made
