"""How columns are weighed against each other, separately for each sample.

A *metric* is `[N, V]` (diagonal; one number, stretched, if all columns weigh the same) or `[N, V, V]` (full). The
curvature of a network is a sum of groups of columns A with a metric M each; its diagonal is
`sum_n sum_vw M[n, v, w] A[v, n] * A[w, n]`.

V columns · N samples · D entries of what the columns arrive at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hookjac import gemm
from hookjac.memory import room

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
    if (weight := uniform(metric)) is not None and not shared(A):
        return (A[0].square() if len(A) == 1 else A.square().sum(0)) * weight
    if is_unit(A):
        return metric if metric.dim() == 2 else metric.diagonal(dim1=1, dim2=2)
    if shared(A):
        W = A[:, 0]  # [V, D]
        if metric.dim() == 2:
            return metric @ W.square()
        return ((metric @ W) * W).sum(1)
    if metric.dim() == 2:
        return torch.einsum("nv,vnd->nd", metric, A.square())
    rows = A.transpose(0, 1)  # [N, V, D]
    return ((metric @ rows) * rows).sum(1)


def quad_block(A: Tensor, metric: Tensor) -> Tensor:  # A [V, N, D], metric [N, V] or [N, V, V] -> [N, D, D]
    """Aᵀ M A for each sample: the columns' whole curvature at that tensor."""
    A, metric = _alike(A, metric)
    if is_unit(A):
        return torch.diag_embed(metric) if metric.dim() == 2 else metric
    if shared(A):
        W = A[:, 0]
        if metric.dim() == 2:
            return (W.T.unsqueeze(0) * metric.unsqueeze(1)) @ W
        return W.T @ (metric @ W)
    rows = A.transpose(0, 1)  # [N, V, D]
    if metric.dim() == 2:
        return (rows * metric.unsqueeze(2)).transpose(1, 2) @ rows
    return rows.transpose(1, 2) @ (metric @ rows)


def root(t: Tensor) -> Tensor:
    """The root of a sum of squares, whatever rounding made of a zero; its derivative at zero is taken as zero."""
    if not t.requires_grad:
        return t.clamp(min=0).sqrt()
    return torch.where(t > 0, t, 1).sqrt() * (t > 0)


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
    return (metric @ rows.reshape(*rows.shape[:2], -1)).view(*rows.shape).transpose(0, 1)


def uniform(metric: Tensor | None) -> Tensor | None:
    """The one number that all columns are weighed by, if the metric is made of it."""
    if metric is None or metric.dim() != 2 or metric.stride() != (0, 0) or not metric.numel():
        return None
    return metric[0, 0]


def inner(X: Tensor, Y: Tensor, scale: float = 1.0) -> Tensor:  # [..., L, d], [..., L, e] -> [d, e]
    """The sum of scale Xᵀ Y over all axes before the last. einsum takes up to seventeen times as long."""
    d, e = X.shape[-1], Y.shape[-1]
    into = room((d, e), X, Y)
    if X.dim() > 2 and X.shape[-2] > 1 and X.stride(-2) == 1 and Y.stride(-2) == 1:  # positions lie side by side
        left, right = X.mT.reshape(-1, d, X.shape[-2]), Y.mT.reshape(-1, e, Y.shape[-2]).mT
        if len(left) * d * e <= CHUNK:
            return torch.bmm(left, right).sum(0) * scale
        return torch.addbmm(X.new_zeros(()), left, right, beta=0, alpha=scale, out=into)
    found = gemm.mm(X.reshape(-1, d).T, Y.reshape(-1, e), into)
    return found if scale == 1 else found.mul_(scale)


def summed_block(A: Tensor, metric: Tensor | None) -> Tensor:  # A [V, N, ..., D] -> [D, D]
    """sum_n Aᵀ M A over all samples and whatever axes lie between them and the last."""
    if metric is not None and A.dim() == 3 and is_unit(A):
        return torch.diag(metric.sum(0)) if metric.dim() == 2 else metric.sum(0)
    B = weighed(A, metric)
    D = A.shape[-1]
    return B.reshape(-1, D).T @ A.to(B.dtype).reshape(-1, D)
