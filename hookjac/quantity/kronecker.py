"""Kronecker-factored curvature. N samples · L shared positions · V columns · p the parameter's shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from hookjac import given
from hookjac.errors import HookjacError
from hookjac.factor import Factor, Lookup, Outer, Sum
from hookjac.kronecker import Kronecker, KroneckerEigen, KroneckerSum
from hookjac.quantity.gradient import Samples
from hookjac.quantity.record import GGN, Adds, Averaged, Loss, Quantity, Received, Sampled, Wish, chosen

_SMALL = 1 << 13  # entries of a parameter without an input side: its B is the whole block


def KFAC(
    *,
    fisher: Literal["mc", "exact", "empirical", "kfra"] = "mc",
    samples: int = 1,
    generator: torch.Generator | None = None,
    sharing: Literal["expand", "reduce"] = "expand",
    corrected: bool | Mapping[Tensor | str, KroneckerEigen] = False,
    otherwise: Literal["refuse", "none"] = "refuse",
    subsample: Samples = None,
) -> Quantity:
    """`p.kfac`, a `Kronecker(A, B)`: the parameter's curvature, approximately B (x) A in row-major order.

    For a weight, A = mean of a aᵀ over samples and positions, with a the layer's input; B = the sum over samples,
    positions and columns of g gᵀ, with g what arrives at its output, so that B carries the loss's reduction. For a
    table A is diagonal; a bias or a norm has B alone, its exact block. Uses of one form are positions of one product;
    of different forms (a table that is a weight as well), a `KroneckerSum`. Of the data's part of the loss.

    fisher: which columns g. "mc": `samples` random ones, from `generator` or torch's global one, with the loss's
    Hessian as second moment (unbiased; Martens & Grosse 2015); "exact": all C (KFLR, Botev et al. 2017); "empirical":
    the loss gradients of the samples themselves, a different matrix; "kfra": the Gauss-Newton matrix of each layer
    averaged over samples on the way (Botev et al. 2017; for parameters used once).
    sharing: where a weight is used at L positions, "expand" takes positions for samples, "reduce" adds them up first
    (Eschenhagen et al. 2023). corrected: `p.kfac` is a `KroneckerEigen` whose eigenvalues are the diagonal of the exact
    curvature in the eigenvectors' basis (EKFAC, George et al. 2018). That basis is the batch's own; or, for parameters
    (or their names) in a mapping, the one given there (say, of a moving average of the factors: `p.kfac.source` has
    this batch's).
    otherwise: what becomes of a parameter whose curvature has no such factors and is too large as a block: an error, or
    None for `p.kfac`. subsample: as for `GradSample`.

    Exact for one sample without shared positions, and for linear nets under a quadratic loss; else an approximation,
    for the block is a sum of products and not a product of sums. Units: B loss /
    output², A input². Cost: `samples`, C or one backward, and products of i² and o² for each position.
    """
    wishes: dict[str, Wish] = {"mc": Sampled(samples, generator), "exact": GGN(), "empirical": Loss(),
                               "kfra": Averaged()}  # fmt: skip
    given.choice(tuple(wishes), fisher=fisher)
    given.choice(("expand", "reduce"), sharing=sharing)
    given.choice(("refuse", "none"), otherwise=otherwise)
    if not isinstance(corrected, (bool, Mapping)):
        raise TypeError(
            f"corrected must be True, False, or a mapping of parameters to KroneckerEigen; got {given.said(corrected)}"
        )
    own = corrected if isinstance(corrected, Mapping) else {}
    bases: dict[str, KroneckerEigen] = {}  # of the open block's parameters
    correct = corrected is not False

    def opens(params: Mapping[str, Tensor]) -> None:
        named = {id(p): name for name, p in params.items()}
        bases.clear()
        for key, basis in own.items():
            name = key if isinstance(key, str) else named.get(id(key), "")
            if name not in params:
                what = repr(key) if isinstance(key, str) else f"a tensor {list(getattr(key, 'shape', []))}"
                raise HookjacError(
                    f"kfac: corrected= has a basis for {what}, which is no trainable parameter of the model"
                )
            if not isinstance(basis, KroneckerEigen):
                raise TypeError(f"kfac: corrected= wants a KroneckerEigen for {name!r}, got {type(basis).__name__}")
            bases[name] = basis

    def reduce(got: Received) -> Kronecker | KroneckerEigen | KroneckerSum | None:
        if len(got.pieces) > 1:
            raise HookjacError("kfra is defined for parameters that are used once. Use fisher='exact' or 'mc'.")
        if not got.pieces:
            return _nothing(got, correct)
        factor, metric = got.pieces[0]
        if otherwise == "none" and not _has_factors(factor, got.param):
            return None
        if isinstance(factor, Sum):
            if correct:
                if otherwise == "none":
                    return None
                raise HookjacError(
                    "it is used in ways of different form (a table that is a weight as well), so that its factors are "
                    "a sum of Kronecker products, which has no eigenvectors of that form. Use corrected=False."
                )
            return KroneckerSum(tuple(_factored(part, metric, got.param, sharing == "reduce") for part in factor.parts))
        found = _factored(factor, metric, got.param, sharing == "reduce")
        return _correct(found, factor, metric, bases.get(got.name)) if correct else found

    power = 2 if fisher == "empirical" else 1
    adds = Adds(powers=(0, 0, power), split=_split, join=_join, label=f"{fisher} {sharing}")
    return Quantity(
        name="kfac",
        columns=wishes[fisher],
        reduce=reduce,
        subsample=chosen(subsample),
        opens=opens if isinstance(corrected, Mapping) else None,
        # each batch has eigenvectors of its own, and averages of averages are no average
        adds=None if correct or fisher == "kfra" else adds,
    )


def _split(found: Kronecker | KroneckerSum | None) -> tuple[list[Tensor], dict[str, Any]]:
    """A as a sum over its rows, their number, and B; for each of the products."""
    if found is None:
        return [], {"none": True}
    if isinstance(found, KroneckerSum):
        each = [_split(part) for part in found.parts]
        return [t for parts, _ in each for t in parts], {"sum": [note for _, note in each]}
    A = found.B.new_zeros(0) if found.A is None else found.A * found.rows
    rows = torch.tensor(found.rows, dtype=torch.float64)
    note = {"shape": list(found.shape), "swapped": found.swapped, "biased": found.A is None, "empty": not found.rows}
    return [A, rows, found.B], note


def _join(note: dict[str, Any], sums: list[Tensor], N: int) -> Any:
    if "none" in note:
        return None
    if "sum" in note:
        return KroneckerSum(tuple(_join(one, sums[3 * k : 3 * k + 3], N) for k, one in enumerate(note["sum"])))
    A, rows, B = sums
    A = A / max(1.0, rows.item())
    return Kronecker(None if note["biased"] else A, B, torch.Size(note["shape"]), note["swapped"], int(rows))


def _has_factors(factor: Factor, param: Tensor) -> bool:
    if isinstance(factor, Sum):
        return all(_has_factors(part, param) for part in factor.parts)
    sided = isinstance(factor, Outer) or (isinstance(factor, Lookup) and factor.g.shape[2] > 1)
    return sided or param.numel() <= _SMALL


def _factored(factor: Factor, metric: Tensor | None, param: Tensor, reduce: bool) -> Kronecker:
    dtype = param.dtype
    if isinstance(factor, Outer):
        A, B = (t.to(dtype) for t in factor.kron(metric, reduce=reduce))
        if len(A) == 1:
            A, B = A[0], B[0]
        rows = factor.N if reduce else factor.N * factor.a.shape[2]
        return Kronecker(A, B, param.shape, factor.swapped, rows)
    if isinstance(factor, Lookup) and factor.g.shape[2] > 1:
        A, B = (t.to(dtype) for t in factor.kron(metric, reduce=reduce))
        return Kronecker(A, B, param.shape, swapped=True, rows=factor.N if reduce else len(factor.row))
    if param.numel() > _SMALL:
        raise HookjacError(
            f"a parameter of shape {tuple(param.shape)} reaches the output by a way without known factors (no rule), "
            "and its whole block is too large. List the others in backward(inputs=...), freeze it, or use ggn_diag."
        )
    return Kronecker(None, factor.block(metric).to(dtype), param.shape, rows=factor.N)


def _nothing(got: Received, corrected: bool) -> Kronecker | KroneckerEigen:
    """A parameter that the loss does not reach: zeros, of two sides for a matrix."""
    size = got.param.shape[0] if got.param.dim() > 1 else got.param.numel()
    zero = got.param.new_zeros(size, size).detach()
    if got.param.dim() < 2:
        found = Kronecker(None, zero, got.param.shape)
    else:
        i = got.param.numel() // max(1, size)
        found = Kronecker(zero.new_zeros(i, i), zero, got.param.shape)
    return found.eigen() if corrected else found


def _correct(found: Kronecker, factor: Factor, metric: Tensor | None, basis: KroneckerEigen | None) -> KroneckerEigen:
    if basis is not None:
        sides = [None if t is None else t.shape for t in (basis.Q_A, basis.Q_B)]
        wanted = [None if found.A is None or found.A.dim() == 1 else found._a.shape, found._b.shape]
        if sides[1] != wanted[1] or (found.A is not None and sides[0] != wanted[0]):
            raise HookjacError(
                f"the basis that corrected= has for it is of sides {[s and list(s) for s in sides]} (Q_A, Q_B), and "
                f"its factors are of {[s and list(s) for s in wanted]}"
            )
    eigen = found.eigen() if basis is None else replace(basis, source=found)
    if found.A is None:
        if basis is None:
            return eigen  # its eigenvalues are those of the exact block
        return replace(eigen, values=(basis.Q_B * (found._b @ basis.Q_B)).sum(1).unsqueeze(2))
    assert isinstance(factor, (Outer, Lookup))
    turned = factor.rotated(eigen.Q_A, eigen.Q_B)
    weights = torch.ones(factor.N, factor.V, dtype=eigen.values.dtype, device=eigen.values.device)
    exact = turned.quad(weights if metric is None else metric)
    dtype = eigen.values.dtype
    return replace(eigen, values=found.to(dtype)._open(exact.reshape(found.shape).to(dtype))[0])
