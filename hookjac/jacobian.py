"""The Jacobian of a whole model, as an operator that is never built.

N samples · C entries of one sample's output · P entries of all parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hookjac import given, handover
from hookjac.factor import Dense, Factor, Lookup, Outer, add_gram, each_gram
from hookjac.factor.metric import CHUNK
from hookjac.kronecker import Kronecker, KroneckerEigen, KroneckerSum
from hookjac.memory import fresh
from hookjac.structured import JacTensor

Which = Literal["full", "outputs", "trace"]


class Jacobian:
    """`ext.jacobian`: d output / d all trainable parameters, a [N C, P] matrix that is never built.

    Rows are samples and their outputs, columns the parameters in the order of `model.parameters()`, each in row-major
    order. `J @ v`, `J.T @ u`; `gram()`, the neural tangent kernel; `diagonal(metric)` of Jᵀ Λ J;
    `variance(covariance)`, J Σ Jᵀ of each sample; `to_dense()`, `to_scipy()` and its like. Exact to rounding.
    """

    def __init__(self, parts: Mapping[str, JacTensor]) -> None:
        given.mapping("parts", parts, JacTensor)
        self.parts = dict(parts)
        first = next(iter(self.parts.values()))
        for name, jac in self.parts.items():
            if (jac.shape[0], jac.out) != (first.shape[0], first.out):
                raise ValueError(
                    f"parts must be of the same samples and outputs: {[first.shape[0], *first.out]} and, for {name!r}, "
                    f"{[jac.shape[0], *jac.out]}"
                )
        self.N, self.out, self.C = first.shape[0], first.out, first.out.numel()
        self._dtype, self._device = first.dtype, first.device
        self._sizes = [jac.factor.param.numel() for jac in self.parts.values()]

    def __repr__(self) -> str:
        return f"Jacobian({self.N} samples of {self.C} outputs x {self.shape[1]} parameters)"

    @property
    def shape(self) -> tuple[int, int]:
        """(N C, P)."""
        return self.N * self.C, sum(self._sizes)

    @property
    def T(self) -> Transposed:
        """The transposed matrix: `J.T @ u`."""
        return Transposed(self)

    def split(self, v: Tensor) -> list[Tensor]:  # [K, P] -> [K, *p] each
        """Vectors over all parameters, parameter by parameter."""
        if not isinstance(v, Tensor) or v.dim() != 2 or v.shape[1] != self.shape[1]:
            raise ValueError(f"expected vectors [K, {self.shape[1]}], got {given.said(v)}")
        parts = v.split(self._sizes, 1)
        return [t.reshape(len(v), *jac.factor.param) for t, jac in zip(parts, self.parts.values(), strict=True)]

    def __matmul__(self, v: Tensor) -> Tensor:
        rows = given.vectors(v, self.shape[1])
        if rows.is_complex():
            return torch.complex(self @ v.real, self @ v.imag)
        found = sum(jac.times(t) for jac, t in zip(self.parts.values(), self.split(rows), strict=True))
        assert isinstance(found, Tensor)
        return found.reshape(len(rows), -1).T.reshape(self.shape[0], *v.shape[1:])

    def to_dense(self) -> Tensor:
        """[N C, P]."""
        return torch.cat([jac.to_dense().reshape(self.shape[0], -1) for jac in self.parts.values()], 1)

    def gram(self, other: Jacobian | None = None, *, kind: Which = "full") -> Tensor:
        """J J'ᵀ, the (empirical) neural tangent kernel, between this batch and itself or another.

        kind: "full" [N, *out, N', *out']; "outputs" [*out, N, N'], of each output with itself; "trace" [N, N'], their
        sum. Nothing of size N C P is built for dense layers and tables: memory is the result and tens of megabytes.
        """
        other = self if other is None else other
        if not isinstance(other, Jacobian):
            raise TypeError(f"gram takes the ext.jacobian of another batch, got {type(other).__name__}")
        if list(self.parts) != list(other.parts) or self.out != other.out:
            raise ValueError("gram needs two Jacobians of one model: the same parameters and the same outputs")
        given.choice(("full", "outputs", "trace"), kind=kind)
        N, M, C = self.N, other.N, self.C
        if kind == "full":
            full = fresh((N, C, M, C), torch.empty(0, dtype=self._dtype, device=self._device)).zero_()
            for mine, its in zip(self.parts.values(), other.parts.values(), strict=True):
                add_gram(full, mine.intact, its.intact)
            return full.reshape(N, *self.out, M, *self.out)
        found = torch.zeros(C if kind == "outputs" else 1, N, M, dtype=self._dtype, device=self._device)
        for mine, its in zip(self.parts.values(), other.parts.values(), strict=True):
            for c in range(C):
                one = slice(c, c + 1)
                into = found[c if kind == "outputs" else 0].view(N, 1, M, 1)
                add_gram(into, mine.intact.columns(one), its.intact.columns(one))
        return found.reshape(*self.out, N, M) if kind == "outputs" else found[0]

    def diagonal(self, metric: Tensor) -> Tensor:
        """[P]: the diagonal of Jᵀ Λ J, with Λ of each sample diagonal [N, C] or full [N, C, C]."""
        if not isinstance(metric, Tensor):
            raise TypeError(f"expected a metric as a tensor, got {given.said(metric)}")
        if metric.shape not in {(self.N, self.C), (self.N, self.C, self.C)}:
            raise ValueError(f"expected a metric [{self.N}, {self.C}] or [.., {self.C}], got {tuple(metric.shape)}")
        metric = given.real("metric", metric, self._dtype, self._device)
        return torch.cat([jac.intact.quad(metric).reshape(-1) for jac in self.parts.values()])

    def variance(self, covariance: Tensor | Sequence[Kronecker | KroneckerEigen | KroneckerSum]) -> Tensor:
        """[N, C, C]: J_n Σ J_nᵀ for each sample, the predictive covariance of a linearised model (Laplace).

        covariance: the diagonal of Σ [P], or a `Kronecker` (or `KroneckerEigen`) for each parameter in order, Σ being
        block-diagonal.
        """
        factors = [jac.intact for jac in self.parts.values()]
        out = torch.zeros(self.N, self.C, self.C, dtype=self._dtype, device=self._device)
        if isinstance(covariance, Tensor):
            if covariance.shape != self.shape[1:]:
                raise ValueError(
                    f"expected the diagonal of a covariance [{self.shape[1]}], or a Kronecker for each parameter; got "
                    f"a tensor {list(covariance.shape)}"
                )
            covariance = given.real("covariance", covariance, self._dtype, self._device)
            for factor, (S,) in zip(factors, self.split(given.vectors(covariance, self.shape[1])), strict=True):
                out += factor.scaled_gram(S)
            return out
        if not isinstance(covariance, Sequence) or len(covariance) != len(factors):
            raise ValueError(
                f"expected a Kronecker for each of {len(factors)} parameters, got {given.said(covariance)}"
            )
        for (name, jac), K in zip(self.parts.items(), covariance, strict=True):
            if not isinstance(K, (Kronecker, KroneckerEigen, KroneckerSum)):
                raise TypeError(f"expected a Kronecker for parameter {name!r}, got {given.said(K)}")
            if K.shape != jac.factor.param:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(jac.factor.param)}, its Kronecker {tuple(K.shape)}"
                )
            its = _one_of(K)
            if (its.dtype, its.device) != (out.dtype, out.device):
                raise TypeError(
                    f"parameter {name!r} has a Jacobian of {out.dtype} on {out.device}, and its Kronecker is of "
                    f"{its.dtype} on {its.device}. Convert that one with its to(...)."
                )
            out += _spread(jac.factor, K)
        return out

    def to_scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator` (needs scipy)."""
        return handover.to_scipy(self, self._dtype, self._device)

    def as_linear_operator(self) -> Any:
        """A `linear_operator.LinearOperator` (needs that package, the one under GPyTorch)."""
        return handover.as_linear_operator(self, self._dtype, self._device)

    def to_curvlinops(self) -> Any:
        """A `PyTorchLinearOperator` of curvlinops (needs that package, below 4)."""
        columns, rows = [jac.factor.param for jac in self.parts.values()], [torch.Size([self.N, *self.out])]
        return handover.to_curvlinops(self, columns, rows, self._dtype, self._device)


class Transposed:
    """Jᵀ of a `Jacobian`: `J.T @ u` for u [N C] or [N C, K]."""

    def __init__(self, jacobian: Jacobian) -> None:
        self.T = jacobian
        self.shape = jacobian.shape[::-1]

    def __repr__(self) -> str:
        return f"{self.T!r}.T"

    def to_dense(self) -> Tensor:
        """[P, N C]."""
        return self.T.to_dense().T

    def __matmul__(self, u: Tensor) -> Tensor:
        J = self.T
        rows = given.vectors(u, self.shape[1])
        if rows.is_complex():
            return torch.complex(self @ u.real, self @ u.imag)
        cotangents = rows.reshape(len(rows), J.N, *J.out)
        found = torch.cat([jac.back(cotangents).reshape(len(rows), -1) for jac in J.parts.values()], 1)
        return found.T.reshape(self.shape[0], *u.shape[1:])


def _one_of(K: Kronecker | KroneckerEigen | KroneckerSum) -> Tensor:
    if isinstance(K, KroneckerSum):
        return K.parts[0].B
    return K.B if isinstance(K, Kronecker) else K.values


def _spread(factor: Factor, K: Kronecker | KroneckerEigen | KroneckerSum) -> Tensor:  # -> [N, V, V]
    """The covariance of each sample's columns under K. Where the sides fit together nothing of size N V P is built;
    where not, a few samples' columns at a time."""
    if isinstance(K, KroneckerSum):
        return torch.stack([_spread(factor, part) for part in K.parts]).sum(0)
    if isinstance(K, Kronecker) and K.A is not None:
        if isinstance(factor, Outer) and _sides_fit(factor, K):
            return each_gram(factor, factor.multiplied(K._a, K._b))
        if isinstance(factor, Lookup) and K.swapped and factor.g.shape[2] > 1:
            return each_gram(factor, factor.multiplied(K.A if K.A.dim() == 1 else K._a, K._b))
    if isinstance(K, KroneckerEigen):
        facing = K if isinstance(factor, Outer) and _sides_fit(factor, K.source) else K.facing()
        if isinstance(factor, Outer) and facing is not None and _sides_fit(factor, facing.source):
            return factor.rotated(facing.Q_A, facing.Q_B).scaled_gram(facing.diagonal())
    step = max(1, CHUNK // max(1, factor.V * factor.param.numel()))
    parts = [_spread_rows(factor.samples(slice(n, n + step)).dense(), K) for n in range(0, factor.N, step)]
    return torch.cat(parts) if parts else factor.tensors[0].new_zeros(0, factor.V, factor.V)


def _sides_fit(factor: Outer, K: Kronecker) -> bool:
    return K.A is not None and K.swapped == factor.swapped and K._b.shape[:2] == (factor.g.shape[2], factor.g.shape[4])


def _spread_rows(t: Tensor, K: Kronecker | KroneckerEigen) -> Tensor:  # [V, N, *p] -> [N, V, V]
    V, N = t.shape[:2]
    rows = t.reshape(V * N, *K.shape)
    if isinstance(K, KroneckerEigen):
        turned = K.rotate(K.source._open(rows)).reshape(V, N, -1)
        return Dense(turned).scaled_gram(K.values.reshape(-1))
    return Dense(t).each_gram(Dense((K @ rows).reshape(t.shape)))
