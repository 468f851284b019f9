"""The loss's second derivative in the model's outputs: in closed form for the losses that people use, else by products.

Where everything above one node is linear, that node alone bends, and its second derivative is known:

log-softmax       -sum(G) (diag p - p pᵀ) for each row, with G the loss gradient at the node's output and p the softmax
entry by entry    a diagonal: one product with ones gives it (squared error, logistic, Huber, ...)

Neither needs C products of a double backward, nor the eigenvectors of an [N, C, C], of which the random columns of
`ggn_diag_mc` and `kfac` are made otherwise: a language model's [T, vocabulary] logits would be out of reach.

N samples · C entries of one sample's outputs · V columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hookjac.errors import HookjacError
from hookjac.factor.metric import eigen
from hookjac.graph import Bend, Edge, children, gradients, meta, ordered, pull, signed
from hookjac.loss import hessian, leading_to
from hookjac.places import placing
from hookjac.plan import Plan
from hookjac.quantity.record import Sampled
from hookjac.route import Route
from hookjac.samples import Layout
from hookjac.structure import SEPARATE, scales_linearly

_LARGEST = 1 << 28  # entries of [N, C, C]: two gigabytes in float64
_ROUNDINGS = 16  # of the loss gradient, that may add up to an entry


def unit_columns(
    edges: Sequence[Edge], layouts: Sequence[Layout], like: Tensor, rows: Sequence[int] | None = None
) -> list[Tensor]:
    """Unit vectors of the joint features of several tensors, the same for every sample: [D, *tensor] each.

    rows: numbers of the features that are wanted; None: all.
    """
    rests = _rests(edges, layouts, like)
    sizes = [rest.numel() for rest in rests]
    D = sum(sizes)
    if rows is None or len(rows) == D:
        eye = torch.eye(D, dtype=like.dtype, device=like.device)
    else:  # of a language model's logits, all would never fit
        eye = torch.zeros(len(rows), D, dtype=like.dtype, device=like.device)
        eye.scatter_(1, torch.tensor(rows, device=like.device).unsqueeze(1), 1.0)
    found = []
    for edge, layout, rest, part in zip(edges, layouts, rests, eye.split(sizes, 1), strict=True):
        t = part.reshape(part.shape[0], 1, *rest).expand(-1, layout.N, *rest)
        found.append(layout.join(t, edge.shape))
    return found


def _rests(edges: Sequence[Edge], layouts: Sequence[Layout], like: Tensor) -> list[torch.Size]:
    """The shape of one sample's part of each tensor."""
    return [layout.split(like.expand(1, *edge.shape)).shape[2:] for edge, layout in zip(edges, layouts, strict=True)]


@dataclass(frozen=True)
class _Softmax:
    """scale (diag p - p pᵀ) along `dim`."""

    p: Tensor
    scale: Tensor  # 1 along `dim`
    dim: int

    def root(self, e: Tensor) -> tuple[Tensor, Tensor | None]:  # e [V, *t]
        """Columns with this second moment if e has that of the identity; the second of a pair where a sign is needed.

        S = diag √p - p √pᵀ has S Sᵀ = diag p - p pᵀ.
        """
        e = e * self.p.sqrt()
        u = torch.addcmul(e, self.p, e.sum(self.dim + 1, keepdim=True), value=-1)
        if _none_below_zero(self.scale):
            return u.mul_(self.scale.sqrt()), None
        u = u * self.scale.abs().sqrt()
        return u, u * self.scale.sign()

    def rows(self) -> tuple[Tensor, Tensor] | None:
        """Of one softmax for each sample: the fewest columns [C - 1, N, C], and what each sample's weigh [N]: its sign.

        S = diag √p T, where T [C, C - 1] completes q = √p to an orthonormal basis: the other columns of the reflection
        that takes q to an axis j. With the likeliest j, 1 + q_j is far from zero and no difference cancels. Column k
        stands for class k, and column j for the last.
        """
        if self.p.dim() != 2 or self.dim != 1 or self.p.shape[1] < 2:
            return None
        C = self.p.shape[1]
        top, j = self.p.max(1, keepdim=True)  # [N, 1]
        top = top.sqrt()
        w = (self.p / (1 + top)).scatter_(1, j, top)
        q = self.p.sqrt() * self.scale.abs().sqrt()
        eye = torch.eye(C, dtype=q.dtype, device=q.device).unsqueeze(1)
        u = (eye - w).mul_(q.T.unsqueeze(2))  # [C, N, C]
        here = torch.arange(C - 1, device=q.device).view(-1, 1, 1) == j
        return torch.where(here, u[C - 1 :], u[: C - 1]), self.scale[:, 0]

    def dense(self, N: int) -> Tensor | None:  # -> [N, C, C], or [N, C] if that is diagonal
        if self.p.dim() != 2 or self.dim != 1:
            return None
        weighed = self.p * self.scale
        return torch.diag_embed(weighed) - weighed.unsqueeze(2) * self.p.unsqueeze(1)


@dataclass(frozen=True)
class _Diagonal:
    """Entry by entry."""

    d: Tensor

    def root(self, e: Tensor) -> tuple[Tensor, Tensor | None]:
        u = e * self.d.abs().sqrt()
        return u, None if _none_below_zero(self.d) else u * self.d.sign()

    def rows(self) -> tuple[Tensor, Tensor] | None:
        return None

    def dense(self, N: int) -> Tensor | None:
        return self.d.reshape(N, self.d.numel() // max(1, N))


Form = _Softmax | _Diagonal


def _none_below_zero(t: Tensor) -> bool:
    return not t.numel() or t.min().item() >= 0


class Bending(NamedTuple):
    """Where the one node that bends lies between the loss and an output of the model."""

    at: Edge  # what it is given
    out: Edge  # what it makes
    chain: list[Edge]  # from there down to the output, not included
    output: Edge
    dim: int | None  # of a log-softmax; None: entry by entry
    a_row_each: bool  # the n-th row of what bends is made of the n-th sample

    def renamed(self, name: Callable[[Edge], Edge]) -> Bending:
        """The same in another graph of this structure, or written in numbers of nodes."""
        at, out, output = name(self.at), name(self.out), name(self.output)
        return self._replace(at=at, out=out, output=output, chain=[name(e) for e in self.chain])

    def form(self, loss: Tensor) -> tuple[Form, Tensor]:
        """The second derivative there, and the loss gradient at the output."""
        G, slope = gradients([loss], [self.out, self.output], [None])
        return self._form(G), slope

    def _form(self, G: Tensor) -> Form:
        if self.dim is not None:
            return _Softmax(self.out.node._saved_result.detach().exp(), -G.sum(self.dim, keepdim=True), self.dim)
        bend = Bend(self.out.node, {self.out.nr: G}, [self.at])
        shape, dtype, device = meta(self.at)
        with torch.enable_grad():
            return _Diagonal(bend.times([torch.ones((1, *shape), dtype=dtype, device=device)])[0][0].detach())

    def down(self, t: Tensor) -> Tensor:  # [V, *at] -> [V, *output]
        for edge in self.chain:
            found = [c for c in pull(edge.node, {edge.nr: t}) if c is not None]
            (t,) = found
        return t.to(meta(self.output)[1])

    def root(self, form: Form, N: int) -> tuple[Tensor, Tensor] | None:
        """Columns [V, *output] whose second moment is the Hessian up to signs, and these as their metric.

        For a softmax of a row for each sample; None otherwise.
        """
        found = form.rows() if self.a_row_each else None
        if found is None:
            return None
        u, weights = found
        columns = self.down(u)
        if u.device.type == "cpu" and _none_below_zero(weights):  # elsewhere, to ask would be to wait
            return columns, weights.new_ones(()).expand(N, len(u))
        return columns, weights.sign().unsqueeze(1).expand(-1, len(u))

    def draw(self, form: Form, wish: Sampled, N: int) -> tuple[Tensor, Tensor]:
        """Random columns [V, *output] with that second moment, and their metric."""
        like = form.p if isinstance(form, _Softmax) else form.d
        u, w = form.root(_signs((wish.samples, *like.shape), like, wish))
        return self.down(u if w is None else torch.cat([u, w])), _metric(wish.samples, N, like, paired=w is not None)


def bending(route: Route, edge: Edge, N: int) -> Bending | None:
    """Up from an output of the model by ways of one thread to the one node that bends; None if there is no such."""
    above = leading_to(route, [edge])
    if route.real(edge) != edge or any(key in route.calls for key in above):
        return None
    at, chain = edge, list[Edge]()
    while True:
        here = [key for key in above if at in route.after[key]]
        if len(here) != 1 or len(route.outs[here[0]]) != 1 or sum(e is not None for e in route.after[here[0]]) != 1:
            return None
        (key,) = here
        (out,) = route.outs[key]
        if not scales_linearly(route, key):
            break
        if out in route.starts:
            return None
        chain.insert(0, out)
        at = out
    name = type(key).__name__
    softmax = name == "LogSoftmaxBackward0"
    if not (softmax or name in SEPARATE) or meta(at)[1].is_complex or route.raw(key, [at]) != [at]:
        return None
    if not all(scales_linearly(route, k) for k in leading_to(route, [out])) or (softmax and not at.shape):
        return None
    dim = signed(key._saved_dim) % len(at.shape) if softmax else None
    return Bending(at, out, chain, edge, dim, _a_row_each(chain, edge, N))


def _a_row_each(chain: list[Edge], output: Edge, N: int) -> bool:
    """Is the n-th row of what bends made of the n-th sample, by the structure of the way there? A sample that has two
    rows would see the sum of their columns, whose square is not the sum of squares."""
    plain = Layout(N)
    for edge, below in zip(chain, [*chain[1:], output], strict=False):
        rule = placing(edge.node)
        shapes = [below.shape if e is not None else None for e in children(edge.node)]
        found = None if rule is None else rule.into(edge.node, plain, edge.shape, shapes)
        if found is None or [la for la, s in zip(found, shapes, strict=True) if s is not None] != [plain]:
            return False
    return (chain[0] if chain else output).shape[:1] == (N,)


@dataclass(eq=False)
class Head:
    """The Hessian of the loss in `edges`, joint for each sample.

    edges: as the user's graph has them. bending: the closed form, where there is one. demand: raises where what lies
    above cannot be differentiated twice.
    """

    loss: Tensor
    edges: list[Edge]
    layouts: list[Layout]
    N: int
    bending: Bending | None
    demand: Callable[[], None] = lambda: None
    form: Form | None = field(init=False, default=None)
    slope: Tensor | None = field(init=False, default=None)  # the loss gradient at the one edge, where there is a form
    _dense: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.bending is not None:
            self.form, self.slope = self.bending.form(self.loss)

    @classmethod
    def of(cls, plan: Plan, edges: list[Edge]) -> Head:
        route = plan.route
        network = leading_to(route, edges)

        def demand() -> None:
            route.demand_twice(k for k in route.order if k in plan.needed and k in network)

        found = bending(route, edges[0], plan.N) if len(edges) == 1 else None
        return cls(
            plan.top.loss, [route.real(e) for e in edges], [plan.layout[e] for e in edges], plan.N, found, demand
        )

    def metric(self) -> Tensor:
        """[N, C, C]; [N, C] where that is a diagonal."""
        if self._dense is None:
            known = None
            if self.bending is not None and self.form is not None and not self.bending.chain:
                known = self.form.dense(self.N)
            self._dense = self._by_products() if known is None else known
        return self._dense

    def noise(self) -> float:
        """What rounding may make of an eigenvalue that is zero, as where a softmax is sure: a difference of what is of
        the size of the loss gradient, on its way from the loss to the outputs."""
        ends = {e.node for e in self.edges}
        below = lambda node: [] if node in ends else [e.node for e in children(node) if e is not None]
        leading = set(ends)
        for node in reversed(ordered([self.loss.grad_fn], below)):
            if not leading.isdisjoint(below(node)):
                leading.add(node)
        above = [Edge(node, nr) for node in leading - ends for nr in range(len(node._input_metadata))]
        found = gradients([self.loss], above, [None]) if above else []
        # each in its own precision: outputs in half are mostly cast before anything cancels
        return _ROUNDINGS * max(
            (torch.finfo(g.dtype).eps * float(g.abs().max()) for g in found if g.numel()), default=0.0
        )

    def full(self) -> Tensor:
        """[N, C, C]."""
        found = self.metric()
        return torch.diag_embed(found) if found.dim() == 2 else found

    def columns(self) -> tuple[list[Tensor], Tensor]:
        """Columns [V, *tensor] of each edge with a metric such that their second moment is this Hessian.

        Of a softmax, the columns of a root: all weigh one, which every later step is the faster for. Else unit columns.
        """
        if self.bending is not None and self.form is not None:
            root = self.bending.root(self.form, self.N)
            if root is not None:
                return [root[0]], root[1]
        return self.units(), self.metric()

    def units(self) -> list[Tensor]:
        """Unit columns [C, *tensor] of each edge."""
        _, dtype, device = meta(self.edges[0])
        return unit_columns(self.edges, self.layouts, torch.zeros((), dtype=dtype, device=device))

    def draw(self, wish: Sampled) -> tuple[list[Tensor], Tensor]:
        """Random columns [V, *tensor] of each edge whose second moment is this Hessian, and their metric."""
        if self.bending is None or self.form is None:
            return self._draw_apart(wish)
        columns, metric = self.bending.draw(self.form, wish, self.N)
        return [columns], metric

    def _draw_apart(self, wish: Sampled) -> tuple[list[Tensor], Tensor]:
        """From the eigenvectors of each sample's own."""
        H, N = self.full(), self.N
        values, vectors = eigen(H)
        signs = _signs((wish.samples, *values.shape), values, wish)
        size = values.abs().sqrt()
        u = torch.einsum("ncd,knd->knc", vectors * size.unsqueeze(1), signs)
        rounding = H.shape[1] * torch.finfo(H.dtype).eps * values.abs().amax(1, keepdim=True) if H.numel() else values
        paired = bool((values < -rounding).any())
        if paired:
            w = torch.einsum("ncd,knd->knc", vectors * (size * values.sign()).unsqueeze(1), signs)
            u = torch.cat([u, w])
        parts = u.split([e.shape.numel() // N for e in self.edges], 2)
        rests = _rests(self.edges, self.layouts, u.new_zeros(()))
        columns = [
            layout.join(t.reshape(len(u), N, *rest), edge.shape).to(meta(edge)[1])
            for edge, layout, rest, t in zip(self.edges, self.layouts, rests, parts, strict=True)
        ]
        return columns, _metric(wish.samples, N, values, paired=paired)

    def _by_products(self) -> Tensor:
        N = self.N
        C = sum(e.shape.numel() // max(1, N) for e in self.edges)
        if N * C * C > _LARGEST:
            raise HookjacError(
                f"the loss's Hessian in the model's outputs would take {N} x {C} x {C} entries, more than fit in "
                "memory. Ask for what needs no such matrix: ggn_mp (products), kfac with fisher='empirical', "
                "grad_sample; or ggn_diag_mc and kfac under a loss whose Hessian has a closed form (cross entropy, "
                "squared or logistic errors); or take fewer outputs."
            )
        try:
            self.demand()
            with torch.enable_grad():
                return hessian(self.loss, self.edges, N)
        except RuntimeError as error:
            raise HookjacError(
                f"the loss cannot be differentiated twice in the model's output ({error}); curvature needs that."
            ) from error


def _signs(shape: tuple[int, ...], like: Tensor, wish: Sampled) -> Tensor:
    device = wish.generator.device if wish.generator is not None else like.device
    drawn = torch.randint(0, 2, shape, generator=wish.generator, device=device).to(like)
    return drawn.mul_(2).sub_(1)


def _metric(K: int, N: int, like: Tensor, *, paired: bool) -> Tensor:
    """Of K random columns; or of K pairs u and w with E[u wᵀ] = H, where a negative eigenvalue allows no real root."""
    if not paired:
        return like.new_full((), 1 / K).expand(N, K)
    eye = torch.eye(K, dtype=like.dtype, device=like.device) / (2 * K)
    pairs = torch.cat([torch.cat([0 * eye, eye], 1), torch.cat([eye, 0 * eye], 1)])
    return pairs.expand(N, 2 * K, 2 * K)
