"""Kronecker-factored matrices over one parameter, and the same in the basis of their eigenvectors.

For a weight [o, i] in memory order the matrix is B (x) A: entry ((o, i), (o', i')) is B[o, o'] A[i, i']. A is the input
side, B the output side. Groups (of a convolution) are blocks on the diagonal.

b groups · o/i output/input features · P entries of the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hookjac import given
from hookjac.errors import HookjacError
from hookjac.factor.metric import eigen


def inverted(t: Tensor) -> Tensor | None:  # [n, n], [b, n, n], or a diagonal [n]
    """The inverse of a positive definite matrix, by Cholesky; None where it is not."""
    if t.dim() == 1:
        return 1 / t if bool((t > 0).all()) else None
    factor, info = torch.linalg.cholesky_ex(t.to(_at_least_single(t)))
    return None if bool(info.any()) else torch.cholesky_inverse(factor).to(t.dtype)


def _at_least_single(t: Tensor) -> torch.dtype:
    """What to factorise in: half precision has too few digits for it, and LAPACK does not know it."""
    return torch.promote_types(t.dtype, torch.float32)


def _moved(tensors: Sequence[Tensor | None], args: Any, kwargs: Any) -> list[Any]:
    try:
        return [None if t is None else t.to(*args, **kwargs) for t in tensors]
    except RuntimeError as error:  # of a device that is none
        raise ValueError(f"to(...) takes what Tensor.to takes: {error}") from error


def _demand_weight(weight: Any) -> None:
    if not given.is_number(weight) or not math.isfinite(weight):
        raise ValueError(f"weight must be a finite number, got {given.said(weight)}")


def _logdet(values: Tensor, damping: float, of: Any, rounded: torch.dtype) -> Tensor:
    """rounded: what the factors are in, as whose rounding a negative eigenvalue may pass."""
    given.numbers(damping=damping)
    raised = values + damping
    low, top = raised.min(), raised.abs().max()
    if bool(low < -min(1e3 * torch.finfo(rounded).eps, 0.1) * top):
        raise HookjacError(
            f"{of!r:.200} has a negative eigenvalue ({low:.1e}, of a loss that is not convex): its "
            f"determinant has no logarithm. Give a larger damping than {damping}."
        )
    return raised.clamp(min=0).log().sum()


@dataclass(frozen=True, eq=False, repr=False)
class Kronecker:
    """`p.kfac`: the curvature of one parameter as B (x) A.

    A: [i, i], or its diagonal [i] (a table's rows), or [b, i, i] with groups; None for a bias, or whatever else has no
    input side, where B alone is the matrix. B: [o, o], or [b, o, o]. shape: the parameter's. swapped: the parameter is
    [i, o] in memory order, so that the matrix is A (x) B. rows: how many inputs A is the mean of.

    `to_dense()`, `K @ v` for v [*p] or [k, *p], `trace()`, `logdet(damping)`, `inverse(damping)`, `solve(v, damping)`,
    `eigen()`; `lerp(other, weight)`, what a moving average of the factors needs; `to(device or dtype)`.
    """

    A: Tensor | None
    B: Tensor
    shape: torch.Size
    swapped: bool = False
    rows: int = 0

    def __post_init__(self) -> None:
        A, B = self.A, self.B
        if not isinstance(B, Tensor) or B.dim() not in (2, 3) or B.shape[-1] != B.shape[-2]:
            raise ValueError(f"B must be a tensor [o, o] or [b, o, o], got {given.said(B)}")
        sides = torch.Size([1, 1]) if A is None else A.shape if isinstance(A, Tensor) else torch.Size()
        if len(sides) not in (1, 2, 3) or (len(sides) > 1 and sides[-1] != sides[-2]):
            raise ValueError(f"A must be a tensor [i, i], [i] or [b, i, i], or None; got {given.said(A)}")
        given.flag(swapped=self.swapped)
        given.counts(0, rows=self.rows)
        if A is not None and (A.dtype, A.device) != (B.dtype, B.device):
            raise ValueError(f"A and B must be of one type and on one device, got {given.said(A)} and {given.said(B)}")
        P = B.shape[:-1].numel() * sides[-1]
        if not isinstance(self.shape, torch.Size) or self.shape.numel() != P:
            raise ValueError(
                f"shape must be a torch.Size of {P} entries, as A and B have; got {given.said(self.shape)}"
            )

    @property
    def _a(self) -> Tensor:  # [b, i, i]
        if self.A is None:
            return torch.ones(self._b.shape[0], 1, 1, dtype=self.B.dtype, device=self.B.device)
        full = torch.diag(self.A) if self.A.dim() == 1 else self.A
        return full if full.dim() == 3 else full.unsqueeze(0)

    @property
    def _b(self) -> Tensor:  # [b, o, o]
        return self.B if self.B.dim() == 3 else self.B.unsqueeze(0)

    def __matmul__(self, v: Tensor) -> Tensor:
        t = self._open(v)
        left = torch.einsum("bop,kbpi->kboi", self._b, t)
        if self.A is not None and self.A.dim() == 1:
            return self._close(left * self.A, v)
        return self._close(torch.einsum("kboi,bij->kboj", left, self._a), v)

    def _open(self, v: Tensor) -> Tensor:  # [*p] or [k, *p] -> [k, b, o, i]
        given.tensor("v", v, self.B)
        if v.shape[v.dim() - len(self.shape) :] != self.shape or v.dim() - len(self.shape) not in (0, 1):
            raise ValueError(
                f"expected a vector of shape [*p] or [k, *p] with p = {tuple(self.shape)}, got {tuple(v.shape)}"
            )
        b, o = self._b.shape[:2]
        i = 1 if self.A is None else self.A.shape[-1]
        t = v.reshape(-1, b, *((i, o) if self.swapped else (o, i)))
        return t.transpose(2, 3) if self.swapped else t

    def _close(self, t: Tensor, v: Tensor) -> Tensor:
        return (t.transpose(2, 3) if self.swapped else t).reshape(v.shape)

    def __repr__(self) -> str:
        sides = [None if t is None else list(t.shape) for t in (self.A, self.B)]
        return f"Kronecker(A={sides[0]}, B={sides[1]}, shape={list(self.shape)}, swapped={self.swapped})"

    def to_dense(self) -> Tensor:
        """[P, P], in the parameter's row-major order."""
        pairs = zip(self._a.contiguous(), self._b.contiguous(), strict=True)
        return torch.block_diag(*[torch.kron(A, B) if self.swapped else torch.kron(B, A) for A, B in pairs])

    def trace(self) -> Tensor:
        """The sum of the diagonal, a number."""
        traces = [t.diagonal(dim1=1, dim2=2).sum(1) for t in (self._a, self._b)]
        return (traces[0] * traces[1]).sum()

    def to(self, *args: Any, **kwargs: Any) -> Kronecker:
        """The factors in another precision or on another device, as `Tensor.to`."""
        A, B = _moved((self.A, self.B), args, kwargs)
        return replace(self, A=A, B=B)

    def lerp(self, other: Kronecker, weight: float) -> Kronecker:
        """Factor by factor: self + weight (other - self), what a moving average does with every new batch."""
        if not isinstance(other, Kronecker):
            raise TypeError(f"lerp takes another Kronecker, got {given.said(other)}")
        _demand_weight(weight)
        forms = [(k.shape, k.swapped, None if k.A is None else k.A.shape, k.B.shape) for k in (self, other)]
        if forms[0] != forms[1]:
            raise ValueError(f"lerp of Kronecker products of different forms: {self} and {other}")
        A = None if self.A is None or other.A is None else torch.lerp(self.A, other.A, weight)
        return replace(self, A=A, B=torch.lerp(self.B, other.B, weight))

    def damped(self, damping: float, *, pi: bool = True) -> Kronecker:
        """(B + sqrt(damping) / pi) (x) (A + sqrt(damping) pi), with pi balancing the two (Martens & Grosse 2015).

        pi² is the mean of A's diagonal over that of B's; 1 with `pi=False`. Without A, B + damping.
        """
        given.numbers(damping=damping)
        given.flag(pi=pi)
        if self.A is None:
            return replace(self, B=self._raised(self.B, damping))
        ratio: float | Tensor = 1.0
        if pi:
            means = [t.diagonal(dim1=1, dim2=2).mean() for t in (self._a, self._b)]
            found = (means[0] / means[1]).sqrt()
            ratio = torch.where(torch.isfinite(found) & (found > 0), found, torch.ones_like(found))
        root = math.sqrt(damping)
        return replace(self, A=self._raised(self.A, root * ratio), B=self._raised(self.B, root / ratio))

    @staticmethod
    def _raised(t: Tensor, by: float | Tensor) -> Tensor:
        return t + by * (1 if t.dim() == 1 else torch.eye(t.shape[-1], dtype=t.dtype, device=t.device))

    def inverse(self, damping: float = 0.0, *, pi: bool = True) -> Kronecker:
        """The inverse of `damped(damping, pi=pi)`, again a Kronecker product; by Cholesky.

        Error where that is not positive definite, or not finite; without damping, also where it is singular to
        rounding.
        """
        given.numbers(damping=damping)
        given.flag(pi=pi)
        wide = self.to(_at_least_single(self.B))
        damped = wide.damped(damping, pi=pi) if damping else wide
        A, B = None if damped.A is None else inverted(damped.A), inverted(damped.B)
        if not all(bool(t.isfinite().all()) for t in (self.A, self.B) if t is not None):
            raise HookjacError(f"a factor of {self} has entries that are not finite, so that it has no inverse.")
        if B is None or (A is None and damped.A is not None) or (not damping and self._singular()):
            raise HookjacError(
                f"a factor of {self} is not positive definite (singular, or of a loss that is not convex), so that "
                f"it has no inverse. Give a larger damping than {damping}."
            )
        return replace(damped, A=A, B=B).to(self.B.dtype)

    def _singular(self) -> bool:
        """To rounding. What is solved with such a side is rounding, divided by rounding."""
        A = self.A.unsqueeze(0) if self.A is not None and self.A.dim() == 1 else eigen(self._a)[0]
        for sizes in (A.abs(), eigen(self._b)[0].abs()):  # [b, n]
            least = sizes.shape[1] * torch.finfo(self.B.dtype).eps
            if sizes.numel() and bool((sizes.amin(1) <= least * sizes.amax(1)).any()):
                return True
        return False

    def solve(self, v: Tensor, damping: float = 0.0) -> Tensor:
        """(B (x) A + damping)⁻¹ v, exactly damped: by eigenvectors. v [*p] or [k, *p].

        Error where that is singular, without damping also to rounding: B of the last layer's weight under cross
        entropy is, and A of fewer inputs than features.
        """
        return self.eigen().solve(v, damping)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """The logarithm of the determinant of B (x) A + damping."""
        return self.eigen().logdet(damping)

    def eigen(self) -> KroneckerEigen:
        """The same in the basis of its eigenvectors: not numbers, where a factor has entries that are not finite; in
        single precision, where the factors are in half."""
        values, vectors = eigen(self._b)
        if self.A is not None and self.A.dim() == 1:
            outer = values.unsqueeze(2) * self.A
            return KroneckerEigen(None, vectors, outer, self)
        first, basis = eigen(self._a)
        return KroneckerEigen(basis, vectors, values.unsqueeze(2) * first.unsqueeze(1), self)


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerEigen:
    """Q diag(values) Qᵀ with Q = Q_B (x) Q_A, the eigenvectors of `source`.

    Q_A: [b, i, i], None where it is the identity. Q_B: [b, o, o]. values: [b, o, i]; with EKFAC they are not those of
    `source` but the diagonal of the exact curvature in that basis (George et al. 2018). Of factors in half precision,
    all three are in single, and so is what they are computed in; what is applied to v is in v's own.

    `to_dense()`, `K @ v` for v [*p] or [k, *p], `trace()`, `logdet(damping)`, `solve(v, damping)`, `diagonal()`;
    `to(device or dtype)`.
    """

    Q_A: Tensor | None
    Q_B: Tensor
    values: Tensor
    source: Kronecker

    def __post_init__(self) -> None:
        for name, t in (("Q_B", self.Q_B), ("Q_A", self.Q_A)):
            square = isinstance(t, Tensor) and t.dim() == 3 and t.shape[1] == t.shape[2]
            if not square and (t is not None or name == "Q_B"):
                raise ValueError(f"{name} must be a tensor [b, n, n], got {given.said(t)}")
        sides = (*self.Q_B.shape[:2], "i" if self.Q_A is None else self.Q_A.shape[1])
        shape = tuple(self.values.shape) if isinstance(self.values, Tensor) else ()
        if len(shape) != 3 or any(n != side for n, side in zip(shape, sides, strict=True) if side != "i"):
            raise ValueError(
                f"values must be a tensor [{sides[0]}, {sides[1]}, {sides[2]}], got {given.said(self.values)}"
            )
        if not isinstance(self.source, Kronecker):
            raise TypeError(f"source must be a Kronecker, got {given.said(self.source)}")

    def __repr__(self) -> str:
        sides = [None if t is None else list(t.shape) for t in (self.Q_A, self.Q_B)]
        return f"KroneckerEigen(Q_A={sides[0]}, Q_B={sides[1]}, shape={list(self.shape)})"

    @property
    def shape(self) -> torch.Size:
        """The parameter's."""
        return self.source.shape

    def to(self, *args: Any, **kwargs: Any) -> KroneckerEigen:
        """The same in another precision or on another device, as `Tensor.to`."""
        Q_A, Q_B, values = _moved((self.Q_A, self.Q_B, self.values), args, kwargs)
        return KroneckerEigen(Q_A, Q_B, values, self.source.to(*args, **kwargs))

    def diagonal(self) -> Tensor:
        """[*p]: the eigenvalues, each at the place of the parameter that its eigenvector would have."""
        return self.source._close(self.values.unsqueeze(0), self.values.new_empty(1, *self.shape))[0]

    def facing(self) -> KroneckerEigen | None:
        """The same with the sides called by each other's names; None where groups or a single side forbid."""
        if self.Q_A is None or self.Q_B.shape[0] > 1:
            return None
        turned = replace(self.source, A=self.source._b[0], B=self.source._a[0], swapped=not self.source.swapped)
        return KroneckerEigen(self.Q_B, self.Q_A, self.values.transpose(1, 2), turned)

    def rotate(self, t: Tensor, *, back: bool = False) -> Tensor:  # [k, b, o, i] -> same
        """Qᵀ t; Q t with `back`."""
        t = torch.einsum("bop,kbpi->kboi" if back else "bpo,kbpi->kboi", self.Q_B, t)
        if self.Q_A is None:
            return t
        return torch.einsum("kbpj,bij->kbpi" if back else "kbpj,bji->kbpi", t, self.Q_A)

    def _apply(self, v: Tensor, values: Tensor) -> Tensor:
        t = self.rotate(self.source._open(v).to(values.dtype)) * values
        return self.source._close(self.rotate(t, back=True), v).to(v.dtype)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self._apply(v, self.values)

    def solve(self, v: Tensor, damping: float = 0.0) -> Tensor:
        """(Q diag(values) Qᵀ + damping)⁻¹ v. v [*p] or [k, *p]. Error where that is singular; see `Kronecker.solve`."""
        given.numbers(damping=damping)
        raised = self.values + damping
        if bool((raised == 0).any()) or (not damping and self.source._singular()):
            raise HookjacError(
                f"{self.source} has eigenvalues of zero, to rounding. Give a larger damping than {damping}."
            )
        return self._apply(v, 1 / raised)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """The logarithm of the determinant, with damping added to every eigenvalue; -inf where it is singular."""
        return _logdet(self.values, damping, self.source, self.source.B.dtype)

    def trace(self) -> Tensor:
        """The sum of the eigenvalues."""
        return self.values.sum()

    def to_dense(self) -> Tensor:
        """[P, P], in the parameter's row-major order."""
        P = self.source.shape.numel()
        units = torch.eye(P, dtype=self.values.dtype, device=self.values.device)
        return (self.to(units.dtype) @ units.reshape(P, *self.source.shape)).reshape(P, P)


@dataclass(frozen=True, eq=False)
class KroneckerSum:
    """`p.kfac` of a parameter that is used in ways of different form (a table that is also the last layer's weight).

    The sum of a `Kronecker` for each way; what the ways have in common is left out, as KFAC leaves out what positions
    have in common. Such a sum has no inverse of Kronecker form: `solve` runs conjugate gradients.
    """

    parts: tuple[Kronecker, ...]

    def __post_init__(self) -> None:
        parts = self.parts
        if not isinstance(parts, tuple) or not parts or not all(isinstance(part, Kronecker) for part in parts):
            raise TypeError(f"parts must be a tuple of Kroneckers, at least one; got {given.said(parts)}")
        if any(part.shape != parts[0].shape for part in parts):
            raise ValueError(f"parts must be of one shape, got {[list(part.shape) for part in parts]}")

    @property
    def shape(self) -> torch.Size:
        """The parameter's."""
        return self.parts[0].shape

    def __matmul__(self, v: Tensor) -> Tensor:
        return torch.stack([part @ v for part in self.parts]).sum(0)

    def to_dense(self) -> Tensor:
        """[P, P], in the parameter's row-major order."""
        return torch.stack([part.to_dense() for part in self.parts]).sum(0)

    def trace(self) -> Tensor:
        """The sum of the diagonal, a number."""
        return torch.stack([part.trace() for part in self.parts]).sum()

    def to(self, *args: Any, **kwargs: Any) -> KroneckerSum:
        """The factors in another precision or on another device, as `Tensor.to`."""
        return KroneckerSum(tuple(part.to(*args, **kwargs) for part in self.parts))

    def lerp(self, other: KroneckerSum, weight: float) -> KroneckerSum:
        """Factor by factor: self + weight (other - self)."""
        if not isinstance(other, KroneckerSum) or len(other.parts) != len(self.parts):
            raise TypeError(f"lerp takes another KroneckerSum of {len(self.parts)} parts, got {given.said(other)}")
        return KroneckerSum(tuple(a.lerp(b, weight) for a, b in zip(self.parts, other.parts, strict=True)))

    def logdet(self, damping: float = 0.0) -> Tensor:
        """The logarithm of the determinant with `damping` on the diagonal, from the [P, P] matrix: small ones only."""
        return _logdet(eigen(self.to_dense().unsqueeze(0))[0], damping, self, self.parts[0].B.dtype)

    def solve(self, v: Tensor, damping: float = 0.0, *, steps: int = 1000) -> Tensor:
        """(self + damping)⁻¹ v to rounding, by conjugate gradients. v [*p] or [k, *p].

        Cost: a product for each step, as many as the matrix has different eigenvalues. Error after `steps` without
        success: a matrix that is nearly singular needs more damping. Not numbers, where the matrix or v is not finite.
        """
        given.numbers(damping=damping)
        given.counts(1, steps=steps)
        self.parts[0]._open(v)  # refuses other shapes
        wide = _at_least_single(v)
        if v.dtype != wide:
            return self.to(wide).solve(v.to(wide), damping, steps=steps).to(v.dtype)
        b = v.reshape(-1, self.shape.numel())
        x, r = torch.zeros_like(b), b.clone()
        d, size = r.clone(), r.square().sum(1)
        enough = size * (16 * torch.finfo(b.dtype).eps) ** 2
        for _ in range(steps):
            odd = ~size.isfinite()  # of what is not finite, or too large to be squared, no step makes a number
            if bool((odd | (size <= enough)).all()):
                return torch.where(odd.unsqueeze(1), torch.nan, x).reshape(v.shape)
            product = (self @ d.reshape(-1, *self.shape)).reshape(b.shape) + damping * d
            step = size / (d * product).sum(1).clamp(min=torch.finfo(b.dtype).tiny)
            step = torch.where(size > enough, step, torch.zeros_like(step)).unsqueeze(1)
            x, r = x + step * d, r - step * product
            before, size = size, r.square().sum(1)
            d = r + (size / before.clamp(min=torch.finfo(b.dtype).tiny)).unsqueeze(1) * d
        raise HookjacError(
            f"conjugate gradients did not solve a sum of {len(self.parts)} Kronecker products of shape "
            f"{tuple(self.shape)} in {steps} steps: it is nearly singular. Use a larger damping (it was {damping}), or "
            "more steps."
        )
