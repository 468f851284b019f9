"""How columns are weighed against each other, separately for each sample.

A *metric* is `[N, V]` (diagonal; one number, stretched, if all columns weigh the same) or `[N, V, V]` (full). The
curvature of a network is a sum of groups of columns A with a metric M each; its diagonal is
`sum_n sum_vw M[n, v, w] A[v, n] * A[w, n]`.

V columns · N samples · D entries of what the columns arrive at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hookjac import gemm
from hookjac.memory import fresh, room

CHUNK = 1 << 22  # entries of a temporary; a few tens of megabytes


def shared(t: Tensor) -> bool:
    """True for [V, N, ...] that holds one sample's values N times by stride, as unit columns do."""
    return t.dim() > 1 and t.shape[1] > 1 and t.stride(1) == 0


def is_unit(t: Tensor) -> bool:  # [V, N, D]
    """True if column v is the v-th unit vector, for every sample. Costs V², saves a product of V³."""
    V, N, D = t.shape
    if V != D or N == 0 or not (shared(t) or N == 1) or t.requires_grad:
        return False  # what is a unit by value only, an identity weight's, has derivatives of its own
    return torch.equal(t[:, 0], torch.eye(V, dtype=t.dtype, device=t.device))


def _alike(A: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type: a trunk in half precision below a head in single has columns and metric of two."""
    if A.dtype == metric.dtype:
        return A, metric
    dtype = torch.promote_types(A.dtype, metric.dtype)
    return A.to(dtype), metric.to(dtype)


def quad_rows(A: Tensor, metric: Tensor) -> Tensor:  # A [V, N, D], metric [N, V] or [N, V, V] -> [N, D]
    """The diagonal of Aᵀ M A for each sample, in the wider of the two precisions."""
    A, metric = _alike(A, metric)
    if is_unit(A):
        return metric if metric.dim() == 2 else metric.diagonal(dim1=1, dim2=2)
    if shared(A):
        W = A[:, 0]  # [V, D]
        return gemm.mm(metric, W.square()) if metric.dim() == 2 else _met(gemm.rows(metric, W), W.unsqueeze(0))
    weight = uniform(metric)
    if weight is not None and len(A) == 1:
        return A[0].square() * weight
    V, N, D = A.shape
    step = max(1, _CACHED // max(1, V * D))
    if step >= N:
        return _weighed_squares(A, metric, weight)
    parts = [slice(n, n + step) for n in range(0, N, step)]
    return torch.cat([_weighed_squares(A[:, n], metric[n], weight) for n in parts])


_CACHED = 1 << 18  # entries of a temporary that stays in the cache: a third of the time of one in fresh memory, or less


def _weighed_squares(A: Tensor, metric: Tensor, weight: Tensor | None) -> Tensor:
    """`quad_rows` of a few samples, whose columns are their own."""
    if weight is not None:
        return A.square().sum(0) * weight
    if metric.dim() == 2:
        return torch.bmm(metric.unsqueeze(1), A.square().transpose(0, 1))[:, 0]
    rows = A.transpose(0, 1)  # [N, V, D]
    if gemm.faster(float(rows.shape[1]) ** 2 * rows.shape[2], A):
        return torch.stack([(gemm.mm(m, r) * r).sum(0) for m, r in zip(metric, rows, strict=True)])
    return (torch.bmm(metric, rows) * rows).sum(1)


def _met(X: Tensor, Y: Tensor) -> Tensor:  # [N, V, D] -> [N, D]
    """The sum over columns of X Y, entry by entry."""
    N, V, D = X.shape
    step = max(1, _CACHED // max(1, V * D))
    if step >= N:
        return (X * Y).sum(1)
    Y = Y.expand(N, V, D)
    return torch.cat([(X[n : n + step] * Y[n : n + step]).sum(1) for n in range(0, N, step)])


def quad_block(A: Tensor, metric: Tensor) -> Tensor:  # A [V, N, D], metric [N, V] or [N, V, V] -> [N, D, D]
    """Aᵀ M A for each sample: the columns' whole curvature at that tensor."""
    A, metric = _alike(A, metric)
    if is_unit(A):
        return torch.diag_embed(metric) if metric.dim() == 2 else metric
    V, _, D = A.shape
    one_by_one = gemm.faster(float(V) * D * D, A)
    if shared(A):
        W = A[:, 0]
        if metric.dim() == 3:
            return gemm.left(W.mT, gemm.rows(metric, W))
        if one_by_one:
            return _each_block(((W * m.unsqueeze(1), W) for m in metric), A)
        return (W.T.unsqueeze(0) * metric.unsqueeze(1)) @ W
    rows = A.transpose(0, 1)  # [N, V, D]
    if one_by_one and metric.dim() == 2:
        return _each_block(((r * m.unsqueeze(1), r) for r, m in zip(rows, metric, strict=True)), A)
    if one_by_one:
        return _each_block(((gemm.mm(m, r), r) for r, m in zip(rows, metric, strict=True)), A)
    return (rows * metric.unsqueeze(2) if metric.dim() == 2 else metric @ rows).transpose(1, 2) @ rows


def _each_block(pairs: Iterable[tuple[Tensor, Tensor]], A: Tensor) -> Tensor:  # -> [N, D, D]
    """Xᵀ Y of each sample."""
    _, N, D = A.shape
    out = fresh((N, D, D), A)
    for (X, Y), into in zip(pairs, out.unbind(0), strict=True):
        into.copy_(gemm.mm(X.mT, Y))
    return out


def root(t: Tensor) -> Tensor:
    """The root of a sum of squares, whatever rounding made of a zero; its derivative at zero is taken as zero."""
    if not t.requires_grad:
        return t.clamp(min=0).sqrt()
    return torch.where(t > 0, t, 1).sqrt() * (t > 0)


def eigen(metric: Tensor) -> tuple[Tensor, Tensor]:  # [N, V, V] -> [N, V], [N, V, V]
    """Eigenvalues and eigenvectors of each sample's. Where entries are not finite, they are not numbers: to LAPACK one
    such sample would be an error for all."""
    fine = metric.isfinite().all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(fine[:, None, None], metric, 0))
    return torch.where(fine[:, None], values, torch.nan), torch.where(fine[:, None, None], vectors, torch.nan)


def weighed(A: Tensor, metric: Tensor | None) -> Tensor:  # A [V, N, ...] -> [V, N, ...]
    """M A for each sample; A itself without a metric."""
    if metric is None:
        return A
    A, metric = _alike(A, metric)
    if (weight := uniform(metric)) is not None:
        return A * weight
    if metric.dim() == 2:
        return A * metric.T.reshape(*A.shape[:2], *[1] * (A.dim() - 2))
    rows = A.transpose(0, 1)
    return (metric @ rows.reshape(*rows.shape[:2], rows.shape[2:].numel())).view(*rows.shape).transpose(0, 1)


def uniform(metric: Tensor | None) -> Tensor | None:
    """The one number that all columns are weighed by, if the metric is made of it."""
    if metric is None or metric.dim() != 2 or metric.stride() != (0, 0) or not metric.numel():
        return None
    return metric[0, 0]


def inner(X: Tensor, Y: Tensor, scale: float = 1.0) -> Tensor:  # [..., L, d], [..., L, e] -> [d, e]
    """The sum of scale Xᵀ Y over all axes before the last. einsum takes up to seventeen times as long."""
    d, e = X.shape[-1], Y.shape[-1]
    if X.dim() > 2 and X.shape[-2] > 1 and X.stride(-2) == 1 and Y.stride(-2) == 1:  # positions lie side by side
        return _inner_turned(X, X if Y is X else Y, scale)
    left = X.reshape(-1, d).T
    if scale != 1:
        left = left * scale
    return gemm.mm(left, Y.reshape(-1, e), room((d, e), X, Y))


def _inner_turned(X: Tensor, Y: Tensor, scale: float) -> Tensor:
    d, e, L = X.shape[-1], Y.shape[-1], X.shape[-2]
    left = X.mT.reshape(-1, d, L)
    right = left if Y is X else Y.mT.reshape(-1, e, L)
    some = max(1, _PIECE // max(1, L * max(d, e)))
    if not gemm.faster(float(min(some, len(left))) * L * d * e, X):
        if len(left) * d * e <= CHUNK:
            return torch.bmm(left, right.mT).sum(0) * scale
        return torch.addbmm(X.new_zeros(()), left, right.mT, beta=0, alpha=scale, out=room((d, e), X, Y))
    total: Tensor | None = None
    for m in range(0, len(left), some):  # as many as fit the cache, all their positions side by side
        mine = left[m : m + some].transpose(0, 1).reshape(d, -1)
        its = mine if right is left else right[m : m + some].transpose(0, 1).reshape(e, -1)
        found = gemm.mm(mine, its.T)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total if scale == 1 else total.mul_(scale)


_PIECE = 1 << 20  # entries that are laid out anew at once


_KEPT = 1 << 25  # entries of products of columns that are kept: as many as one parameter's kernel has, for each layer


class Columns:
    """Columns at a layer's output, G [V, N, o], and what they amount to: the weight and the bias ask for the same.

    Nothing is kept of columns that carry a graph: who asks later may want it, or not.
    """

    def __init__(self, G: Tensor) -> None:
        self.G = G
        self._known: dict[str, list[tuple[Tensor | None, Tensor]]] = {"rows": [], "block": [], "gram": []}

    def _once(self, what: str, metric: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
        for known, found in self._known[what]:
            if known is metric:
                return found
        made = make()
        if not made.requires_grad and not self.G.requires_grad:
            self._known[what].append((metric, made))
        return made

    def rows(self, metric: Tensor) -> Tensor:  # -> [N, o]
        """`quad_rows`. Not to be written to."""
        return self._once("rows", metric, lambda: quad_rows(self.G, metric))

    def block(self, metric: Tensor | None) -> Tensor:  # -> [o, o]
        """`summed_block`. The first to ask gets what is kept: not to be written to until all have asked."""
        asked_before = any(known is metric for known, _ in self._known["block"])
        found = self._once("block", metric, lambda: summed_block(self.G, metric))
        return found.clone() if asked_before else found

    def gram(self) -> Tensor | None:  # -> [N, V, N, V]
        """Inner products of all columns of all samples; None where these are too many. Not to be written to."""
        return None if (len(self.G) * self.G.shape[1]) ** 2 > _KEPT else self._once("gram", None, self._products)

    def _products(self) -> Tensor:
        V, N, o = self.G.shape
        if shared(self.G):
            one = gemm.mm(self.G[:, 0], self.G[:, 0].T)
            return one.view(1, V, 1, V).expand(N, V, N, V)
        rows = self.G.transpose(0, 1).reshape(N * V, o)
        return gemm.mm(rows, rows.T).view(N, V, N, V)


def summed_block(A: Tensor, metric: Tensor | None) -> Tensor:  # A [V, N, ..., D] -> [D, D]
    """sum_n Aᵀ M A over all samples and whatever axes lie between them and the last."""
    if metric is not None and A.dim() == 3 and is_unit(A):
        return torch.diag(metric.sum(0)) if metric.dim() == 2 else metric.sum(0)
    B = weighed(A, metric)
    D = A.shape[-1]
    return gemm.mm(B.reshape(-1, D).T, A.to(B.dtype).reshape(-1, D))
