"""Work on Kronecker factors that the ranks of a process group share, each rank its part; all ranks have all results.

What second-order optimizers do between two steps: after a reduction all ranks hold the same factors, and inverting all
of them on every rank would be the same work many times.

n rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from hookjac import given
from hookjac.errors import HookjacError
from hookjac.kronecker import inverted
from hookjac.ranks import Group, demand_equal, gathered, group_of, reaching, turn


def shares(sizes: Sequence[torch.Size], ranks: int) -> list[int]:
    """Which rank works on which matrix [n, n] or [b, n, n]: the costliest first, each to the rank with least to do.

    Cost: b n³. The same on every rank, whatever the values are.
    """
    given.sequence("sizes", sizes, "shapes")
    for size in sizes:
        if not isinstance(size, torch.Size) or not _square(size):
            raise ValueError(
                f"sizes must hold a torch.Size [n, n] or [b, n, n], or [n] of a diagonal; got {size!r:.80}"
            )
    given.counts(1, ranks=ranks)
    cost = [float(size.numel()) * (size[-1] if len(size) > 1 else 1) for size in sizes]
    load, owner = [0.0] * ranks, [0] * len(sizes)
    for k in sorted(range(len(sizes)), key=lambda k: (-cost[k], k)):
        owner[k] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owner[k]] += cost[k]
    return owner


def inverse(matrices: Sequence[Tensor], group: Group | Literal["world"]) -> list[Tensor]:
    """The inverses of symmetric positive definite matrices [n, n], [b, n, n] or diagonals [n], on all ranks.

    Collective: every rank of the group calls it with the same matrices in the same order. By Cholesky, each rank its
    share. One that is not positive definite is an error on all ranks.
    """

    def work(t: Tensor) -> list[Tensor]:
        found = inverted(t)
        if not bool(t.isfinite().all()):
            raise HookjacError("it has entries that are not finite, and so no inverse")
        if found is None:
            raise HookjacError("it is not positive definite. Raise its diagonal (a larger damping)")
        return [found]

    return [t for (t,) in _shared(matrices, work, lambda t: [t.shape], group_of(group))]


def eigh(matrices: Sequence[Tensor], group: Group | Literal["world"]) -> list[tuple[Tensor, Tensor]]:
    """Eigenvalues [n] and eigenvectors [n, n] of symmetric matrices, or [b, n] and [b, n, n], on all ranks.

    As `torch.linalg.eigh` has them, and the same bits on every rank. Collective: every rank of the group calls it with
    the same matrices in the same order.
    """

    def work(t: Tensor) -> list[Tensor]:
        if t.dim() == 1:
            raise HookjacError("it is a diagonal [n], whose eigenvalues are its entries. Leave it out")
        return list(torch.linalg.eigh(t))

    found = _shared(matrices, work, lambda t: [t.shape[:-1], t.shape], group_of(group))
    return [(values, vectors) for values, vectors in found]


def _shared(
    matrices: Sequence[Tensor],
    work: Callable[[Tensor], list[Tensor]],
    shapes: Callable[[Tensor], list[torch.Size]],
    group: Group,
) -> list[list[Tensor]]:
    """`work` of each matrix, done on one rank. What goes wrong on one rank is raised on all."""
    mine = group.rank()
    # junk takes part in the exchange: raised on one rank alone, it would leave the others waiting
    forms = gathered(turn("shared work", group), _forms(matrices), group)
    demand_equal("the matrices", forms)
    if isinstance(forms[0], str):
        raise TypeError(f"matrices must be a list or a tuple of tensors, got {forms[0]}")
    for form in forms[0]:
        if isinstance(form, str):
            raise ValueError(
                f"expected square matrices [n, n] or [b, n, n], or diagonals [n], of real floating-point numbers; got "
                f"{form}"
            )
    owner = shares([t.shape for t in matrices], group.size())
    done: dict[int, list[Tensor]] = {}
    wrong: dict[int, str] = {}
    for k, rank in enumerate(owner):
        if rank == mine:
            try:
                done[k] = work(matrices[k])
            except RuntimeError as error:
                wrong[k] = str(error)
    for its in gathered("", wrong, group):
        for k, why in its.items():
            raise HookjacError(f"matrix {k} of {len(matrices)} (counted from 0) {list(matrices[k].shape)}: {why}.")
    found: list[list[Tensor]] = [[] for _ in matrices]
    for dtype in sorted({t.dtype for t in matrices}, key=str):
        for rank in range(group.size()):
            here = [k for k, r in enumerate(owner) if r == rank and matrices[k].dtype == dtype]
            if here:
                pieces = [(k, shape) for k in here for shape in shapes(matrices[k])]
                together = torch.empty(sum(s.numel() for _, s in pieces), dtype=dtype, device=matrices[here[0]].device)
                if rank == mine:
                    torch.cat([t.to(together.device).reshape(-1) for k in here for t in done[k]], out=together)
                with reaching():
                    dist.broadcast(together, group=group, group_src=rank)
                for (k, shape), t in zip(pieces, together.split([s.numel() for _, s in pieces]), strict=True):
                    found[k].append(t.view(shape).clone().to(matrices[k].device))
    return found


def _forms(matrices: Any) -> list[tuple[Any, ...] | str] | str:
    return [_form(t) for t in matrices] if isinstance(matrices, (list, tuple)) else given.said(matrices)


def _form(t: Any) -> tuple[Any, ...] | str:
    if not isinstance(t, Tensor):
        return f"a {type(t).__name__}"
    if not _square(t.shape):
        return f"a tensor {list(t.shape)}"
    if not t.is_floating_point() or t.is_meta or t.layout != torch.strided:
        return f"{given.said(t)}{'' if t.layout == torch.strided else f', {t.layout}'}"
    return (*t.shape, t.dtype)


def _square(shape: torch.Size) -> bool:
    """[n], [n, n] or [b, n, n]."""
    return len(shape) == 1 or (len(shape) in (2, 3) and shape[-1] == shape[-2])
