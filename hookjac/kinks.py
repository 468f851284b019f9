"""Does a loss mix samples where no second derivative would show it?

`max` over a batch, `|mean|`, a hinge on a difference of two samples: piecewise linear, so that their Hessian is
zero and says nothing. Above the frontier such a node is allowed only where each of its entries depends on one
sample, and where what it chooses among belongs to one sample.

N samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hookjac.graph import Edge, fenced, gradients, meta, signed
from hookjac.route import Key, Route
from hookjac.samples import Layout, random, scaled

# entry by entry, with a kink
_BENT = (
    "Abs", "Relu", "Threshold", "LeakyRelu", "Hardtanh", "Clamp", "ClampMin", "ClampMax", "Hardshrink", "Softshrink",
    "PreluKernel", "RreluWithNoise", "Hardswish", "Hardsigmoid", "SmoothL1Loss", "HuberLoss", "L1Loss", "LogSigmoid",
)  # fmt: skip
# choosing among entries
_CHOOSING = (
    "Max", "Min", "Amax", "Amin", "Aminmax", "Median", "Nanmedian", "Kthvalue", "Topk", "Sort", "Mode", "Cummax",
    "Cummin",
)  # fmt: skip
_PAIRS = ("Maximum", "Minimum", "Fmax", "Fmin")


def crossing(route: Route, above: Iterable[Key], frontier: Sequence[Edge], N: int, rounding: float) -> str | None:
    """The name of a node above the frontier that bends or chooses across samples."""
    for key in above:
        name = type(key).__name__.rstrip("0123456789").removesuffix("Backward")
        order = getattr(key, "_saved_ord", getattr(key, "_saved_p", None)) if "Norm" in name else None
        if name not in _BENT + _CHOOSING + _PAIRS and order not in (0, 1, float("inf"), float("-inf")):
            continue
        owners = [_owners(e, frontier, N, rounding) for e in route.after[key] if e is not None]
        if any(o is None for o in owners):
            return name
        known = [o for o in owners if o is not None]
        if name in _PAIRS and len(known) == 2 and not _meet(*torch.broadcast_tensors(*known)):
            return name
        if (name in _CHOOSING or order in (float("inf"), float("-inf"))) and not _one_along(key, known[0]):
            return name
    return None


def _owners(edge: Edge, frontier: Sequence[Edge], N: int, rounding: float) -> Tensor | None:
    """Which sample each entry of a tensor depends on, -1 where on none; None if an entry depends on several."""
    shape, dtype, device = meta(edge)
    v = random(shape, 5, device, dtype).requires_grad_()
    with torch.enable_grad(), fenced(frontier):
        pulled = gradients([edge], frontier, [v], create_graph=True)
        factors = 1 + torch.arange(N, device=device, dtype=dtype) / N  # all different: they name the sample
        w = [random(t.shape, 17, t.device, t.dtype) for t in pulled]
        pushed = []
        for tangents in (w, [scaled(t, factors.to(t.dtype), Layout(N)) for t in w]):
            used = [(p, t) for p, t in zip(pulled, tangents, strict=True) if p.requires_grad]
            grads = (
                torch.autograd.grad([p for p, _ in used], v, [t for _, t in used], retain_graph=True) if used else ()
            )
            pushed.append(grads[0] if grads else torch.zeros_like(v))
    told = pushed[0] != 0
    ratio = torch.where(told, pushed[1] / pushed[0], factors[0])
    owner = ((ratio.detach() - 1) * N).round().clamp(0, N - 1).long()
    if bool(((ratio - factors[owner]).abs() > max(rounding, 1e-6)).any()):
        return None
    return torch.where(told, owner, -1)


def _meet(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a < 0) | (b < 0)).all())


def _one_along(key: Key, owners: Tensor) -> bool:
    """Does each group of entries that a node chooses among belong to one sample?"""
    dims = getattr(key, "_saved_dim", None)
    along = list(range(owners.dim())) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    if owners.dim() == 0 or owners.numel() == 0:
        return True
    along = [signed(d) % owners.dim() for d in along] or list(range(owners.dim()))
    high = owners.amax(along, keepdim=True)
    return bool(((owners == high) | (owners < 0)).all())
