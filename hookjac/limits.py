"""What cannot fit is said before anything is allocated, with what to ask for instead.

N samples · C entries of one sample's output · P parameters · V columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hookjac.errors import HookjacError
from hookjac.memory import available, said
from hookjac.quantity.record import GGN, Averaged, Diagonal, Hessian, Output, Quantity, Wish

_NOTICED = 1 << 28  # bytes: below, nobody needs to be asked what is left


def refuse_large_results(
    quantities: Sequence[Quantity], params: Sequence[Tensor], names: Sequence[str], N: int, C: int
) -> None:
    """Dense results larger than the memory that is left."""
    for q in quantities:
        if q.entries is None:
            continue
        M = N if q.subsample is None else len(q.subsample)
        sizes = [q.entries(M, C, p.numel()) * p.element_size() for p in params]
        if sum(sizes) < _NOTICED:
            continue
        left = available(params[0].device)
        if sum(sizes) > left:
            worst = max(range(len(sizes)), key=sizes.__getitem__)
            raise HookjacError(
                f"{q.name} for {M} samples and {sum(p.numel() for p in params):,} parameters would take "
                f"{said(sum(sizes))}, and {said(left)} are available. The largest part is {names[worst]!r} "
                f"{tuple(params[worst].shape)}: {said(sizes[worst])}. {q.instead} Or take smaller batches, subsample=, "
                "list parameters in backward(inputs=...), or freeze what you do not need."
            )


def refuse_many_columns(asked: Mapping[Wish, str], C: int, widest: int, like: Tensor) -> None:
    """Columns of which not even those at the widest place would fit, and the unit columns that they start from.

    asked: each wish with the name of a quantity that has it. widest: entries of the largest tensor that they pass.
    """
    for wish, name in asked.items():
        if not isinstance(wish, (Output, GGN, Averaged, Diagonal, Hessian)):
            continue
        V = len(wish.rows) if isinstance(wish, Output) and wish.rows is not None else C
        need = like.element_size() * (float(V) * widest + float(V) * C)
        if need < _NOTICED or need <= (left := available(like.device)):
            continue
        raise HookjacError(
            f"{name} needs {V:,} columns, one for each entry of a sample's output, and each is as large as the "
            f"activations: {said(need)} at the widest place, and {said(left)} are available; in time, {V:,} backwards. "
            "Ask for outputs= (jac), for random columns (ggn_diag_mc, kfac with fisher='mc', hutchinson), for products "
            "(ggn_mp, hess_mp), or take smaller batches."
        )
