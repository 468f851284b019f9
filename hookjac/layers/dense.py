"""Layers that multiply by a matrix. o/i output/input features, L positions: all axes but samples and features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hookjac import gemm
from hookjac.factor import Dense, Factor, Outer
from hookjac.graph import Node, saved
from hookjac.layers.broadcast import operand, summed
from hookjac.layers.broadcast import stretched as was_stretched
from hookjac.memory import fresh
from hookjac.places import Placed, Shapes, place, rows_of_first, stretched
from hookjac.rule import Call, NodeRule, Rule, register
from hookjac.samples import Layout
from hookjac.ways import Way, way


def _positions(t: Tensor) -> Tensor:  # [V, N, *positions, d] -> [V, N, L, d], views where possible
    return t.unsqueeze(2) if t.dim() == 3 else t.flatten(2, -2)


def _linear_pull(call: Call, G: Tensor) -> Tensor:  # [V, ..., o] -> [V, ..., i]
    return gemm.rows(G, call.values["weight"])


def _linear_factors(call: Call, G: Tensor, layout: Layout) -> dict[str, Factor]:
    found: dict[str, Factor] = {}
    if G.dim() == 3 and layout.plain:
        if "weight" in call.params:
            found["weight"] = Outer(G[:, :, None, None], call.x[:, None, None])
        if "bias" in call.params:
            found["bias"] = Dense(G)
        return found
    g = _positions(layout.split(G))  # [V, N, L, o]
    if "weight" in call.params:
        found["weight"] = Outer(g.unsqueeze(2), _positions(layout.split(call.x.unsqueeze(0)))[0].unsqueeze(1))
    if "bias" in call.params:
        found["bias"] = Dense(g[:, :, 0] if g.shape[2] == 1 else g.sum(2))
    return found


def _linear_mixed(call: Call, g: Tensor, X: Tensor, layout: Layout) -> dict[str, Factor]:
    """d²(g·(W x)) / dW dx takes a tangent X of x to g Xᵀ."""
    if "weight" not in call.params:
        return {}
    g = _positions(layout.split(g.unsqueeze(0)))[0]  # [N, L, o]
    X = _positions(layout.split(X))  # [V, N, L, i]
    return {"weight": Outer(X.unsqueeze(2), g.unsqueeze(1), swapped=True)}


def _features_as_samples(call: Call, layout: Layout) -> str | None:
    if layout.axis < call.x.dim() - 1 or layout.N == 1:
        return None
    return f"its {layout.N} output features would be the samples"


register(
    Rule(
        name="linear",
        modules=(nn.Linear,),
        params=("weight", "bias"),
        pull=_linear_pull,
        factors=_linear_factors,
        fits=lambda call, layout: layout.axis < call.x.dim() - 1,
        refuses=_features_as_samples,
        mixed=_linear_mixed,
        constant=True,
        place=lambda call, layout, out: layout if layout.axis < len(out) - 1 else None,
    )
)


# The same in functional code: x @ w, F.linear, attention's projections, as the nodes they leave ------------------


def _rows(t: Tensor, layout: Layout) -> Tensor:  # samples among the rows: [V, N L, d] -> [V, N, L, d]
    return _positions(layout.split(t))


def _columns(t: Tensor, layout: Layout) -> Tensor:  # samples among the columns: [V, d, N L] -> [V, N, L, d]
    t = layout.split(t)
    return t.unsqueeze(2) if t.dim() == 3 else t.transpose(2, 3)


def _product(g: Tensor, a: Tensor, scale: float, *, swapped: bool) -> Outer:
    g = g if scale == 1 else g * scale
    return Outer(g.unsqueeze(2), saved(a).unsqueeze(1), swapped=swapped)


def _mm_part(node: Node, slot: int, G: Tensor, layout: Layout) -> Factor:
    """out [r, c] = left [r, k] @ right [k, c]. Samples among the rows: `right` is shared; else `left` is."""
    if slot == 1:
        return _product(_rows(G, layout), _rows(node._saved_self.unsqueeze(0), layout)[0], 1, swapped=True)
    return _product(_columns(G, layout), _columns(node._saved_mat2.unsqueeze(0), layout)[0], 1, swapped=False)


def _addmm_part(node: Node, slot: int, G: Tensor, layout: Layout) -> Factor:
    if layout.plain and node._saved_alpha == node._saved_beta == 1:  # nn.Linear: few steps, for they are the price
        if slot == 2:
            V, N, o = G.shape
            a = saved(node._saved_mat1)
            return Outer(G.view(V, N, 1, 1, o), a.view(N, 1, 1, -1), swapped=True)
        if slot == 0 and len(operand(node, 0)) == 1:
            return Dense(G)
    if slot == 0:
        return summed(G if node._saved_beta == 1 else G * node._saved_beta, operand(node, 0), layout)
    scale = node._saved_alpha
    if slot == 2:
        return _product(_rows(G, layout), _rows(node._saved_mat1.unsqueeze(0), layout)[0], scale, swapped=True)
    return _product(_columns(G, layout), _columns(node._saved_mat2.unsqueeze(0), layout)[0], scale, swapped=False)


def _mm_mixed(node: Node, slot: int, g: Tensor, X: Tensor, layout: Layout) -> Factor:
    """Samples among the rows, so that `right` [k, c] is the operand: it gets Xᵀ g."""
    return _product(_rows(X, layout), _rows(g.unsqueeze(0), layout)[0], getattr(node, "_saved_alpha", 1), swapped=False)


def _addmm_fits(node: Node, slot: int, layout: Layout) -> bool:
    return was_stretched(node, 0, layout) if slot == 0 else layout.axis == (0 if slot == 2 else 1)


def _bmm_part(node: Node, slot: int, G: Tensor, layout: Layout) -> Factor:
    """out [B, r, c] = left [B, r, k] @ right [B, k, c], samples among the rows."""

    def blocks(t: Tensor) -> Tensor:  # [V, B, N L, d] -> [V, N, B, L, d]
        t = layout.split(t)
        return t.unsqueeze(3) if t.dim() == 4 else t

    return Outer(blocks(G), blocks(saved(node._saved_self).unsqueeze(0))[0], operand(node, 1), swapped=True)


def _mv_part(node: Node, slot: int, G: Tensor, layout: Layout) -> Factor:
    """out [r] = left [r, k] @ right [k], samples among the rows."""
    g = layout.split(G)  # [V, N, L] or [V, N]
    g = (g.unsqueeze(2) if g.dim() == 2 else g).unsqueeze(3)
    return Outer(g.unsqueeze(2), _rows(saved(node._saved_self).unsqueeze(0), layout)[0].unsqueeze(1), operand(node, 1))


def _mm_fits(node: Node, slot: int, layout: Layout) -> bool:
    return layout.axis == (0 if slot == 1 else 1)


register(
    NodeRule(
        name="matrix product", nodes=("MmBackward0",), slots=(0, 1), fits=_mm_fits, part=_mm_part, mixed={1: _mm_mixed}
    )
)
register(
    NodeRule(
        name="linear map",
        nodes=("AddmmBackward0",),
        slots=(0, 1, 2),
        fits=_addmm_fits,
        part=_addmm_part,
        mixed={0: None, 2: _mm_mixed},
    )
)
register(
    NodeRule(
        name="batched product", nodes=("BmmBackward0",), slots=(1,), fits=lambda n, k, la: la.axis == 1, part=_bmm_part
    )
)
register(
    NodeRule(
        name="product with a vector", nodes=("MvBackward0",), slots=(1,), fits=lambda n, k, la: True, part=_mv_part
    )
)


def _trilinear_part(node: Node, slot: int, G: Tensor, layout: Layout) -> Factor:
    """nn.Bilinear: out [r, o] = sum_ab x[r, a] w[o, a, b] y[r, b], samples among the rows."""
    x, y = saved(node._saved_i1), saved(node._saved_i3)
    both = (x.unsqueeze(2) * y.unsqueeze(1)).flatten(1)  # [rows, a b]
    a = _rows(both.unsqueeze(0), layout)[0]
    return Outer(_rows(G, layout).unsqueeze(2), a.unsqueeze(1), operand(node, 1))


def _bilinear_form(node: Node, slot: int, layout: Layout) -> bool:
    """As nn.Bilinear calls it, not another contraction of three tensors."""
    sums = (node._saved_expand1, node._saved_expand2, node._saved_expand3, node._saved_sumdim)
    return layout.axis == 0 and [tuple(s) for s in sums] == [(1, 3), (0,), (1, 2), (2, 3)]


register(
    NodeRule(name="bilinear form", nodes=("TrilinearBackward0",), slots=(1,), fits=_bilinear_form, part=_trilinear_part)
)


# Where the samples lie in the factors of a product ----------------------------------------------------------------


def _mm_place(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    return [layout if k == layout.axis and s is not None else None for k, s in enumerate(shapes)]


def _bmm_place(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    if layout.axis == 0:
        return [None if s is None else layout for s in shapes]
    return [layout if k == layout.axis - 1 and s is not None else None for k, s in enumerate(shapes)]


def _behind(product: Callable[[Node, Layout, torch.Size, Shapes], Placed]) -> Callable[..., Placed]:
    """A product to which the first input is added."""

    def into(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
        first = None if shapes[0] is None else stretched(layout, out, shapes[0])
        return [first, *(product(node, layout, out, shapes[1:]) or ())]

    return into


def _scaled(t: Tensor, by: float) -> Tensor:
    return t if by == 1 else t * by


def _through(left: bool, name: str) -> Way:
    """Columns of a product [.., r, c] on to its left factor, times the right one, or the other way round."""

    def back(node: Node, G: Tensor, shape: torch.Size) -> Tensor:
        other = getattr(node, name)
        if not left:
            return gemm.left(other.mT, G)
        if G.dim() == 3 and G.shape[1] > 1 and G.stride(1) == 0:  # the same for every row: so is what comes of it
            return gemm.rows(G[:, 0], other.mT).unsqueeze(1).expand(-1, G.shape[1], -1)
        return gemm.rows(G, other.mT)

    return back


def _each(A: Tensor, B: Tensor) -> Tensor:  # [V, M, r, k] @ [M, k, c], or [M, r, k] @ [V, M, k, c]
    """A column at a time: PyTorch would copy the other factor for each, and the columns, to have one batch of all."""
    V, M = max(A, B, key=Tensor.dim).shape[:2]
    if A.dtype != B.dtype or A.numel() + B.numel() < _COPIED:
        return A @ B
    out = fresh((V, M, A.shape[-2], B.shape[-1]), A)
    for v, into in enumerate(out.unbind(0)):
        torch.bmm(A[v] if A.dim() == 4 else A, B[v] if B.dim() == 4 else B, out=into)
    return out


_COPIED = 1 << 18  # entries of which copies cost more than calls


def _scaled_by_alpha(back: Way) -> Way:
    return lambda node, G, shape: _scaled(back(node, G, shape), node._saved_alpha)


# the way on of columns, without what the weight gets from each
_LEFT, _RIGHT = _through(True, "_saved_mat2"), _through(False, "_saved_self")
way("MmBackward0", into={0: _LEFT, 1: _RIGHT})
way(
    "BmmBackward0",
    into={
        0: lambda node, G, shape: _each(G, node._saved_mat2.mT),
        1: lambda node, G, shape: _each(node._saved_self.mT, G),
    },
)
way(
    "AddmmBackward0",
    into={
        0: lambda n, G, shape: _scaled(G, n._saved_beta),
        1: _scaled_by_alpha(_LEFT),
        2: _scaled_by_alpha(_through(False, "_saved_mat1")),
    },
)

place("MmBackward0", into=_mm_place, product=True)
place("AddmmBackward0", into=_behind(_mm_place), product=True)
place("BmmBackward0", into=_bmm_place, product=True)
place("BaddbmmBackward0", into=_behind(_bmm_place), product=True)
place("MvBackward0", into=rows_of_first)
place("TrilinearBackward0", into=lambda node, la, out, s: [la, None, la] if _bilinear_form(node, 1, la) else None)
