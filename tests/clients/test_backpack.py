"""The table in docs/backpack.md: BackPACK's numbers, with the scaling that it states."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backpack
import pytest
import torch
from cases import C, D, N
from oracle import close
from torch import Tensor, nn

import hookjac

ROWS: dict[str, tuple[Any, str, Callable[[Any], Tensor]]] = {
    "BatchGrad": ("grad_sample", "grad_batch", lambda p: p.grad_sample),
    "BatchL2Grad": ("grad_sample_norm", "batch_l2", lambda p: p.grad_sample_norm**2),
    "SumGradSquared": ("grad_sq_sum", "sum_grad_squared", lambda p: p.grad_sq_sum),
    "Variance": ("grad_var", "variance", lambda p: p.grad_var / N**2),
    "DiagGGNExact": ("ggn_diag", "diag_ggn_exact", lambda p: p.ggn_diag),
    "BatchDiagGGNExact": ("ggn_diag_sample", "diag_ggn_exact_batch", lambda p: p.ggn_diag_sample),
    "DiagHessian": ("hess_diag", "diag_h", lambda p: p.hess_diag),
    "BatchDiagHessian": ("hess_diag_sample", "diag_h_batch", lambda p: p.hess_diag_sample),
    "KFLR": (hookjac.KFAC(fisher="exact"), "kflr", lambda p: p.kfac.B),
    "KFRA": (hookjac.KFAC(fisher="kfra"), "kfra", lambda p: p.kfac.B),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ROWS)
def test_same_numbers(name: str, reduction: str) -> None:
    asked, attribute, ours = ROWS[name]
    model, loss = (nn.Sequential(nn.Linear(D, 6), nn.Sigmoid(), nn.Linear(6, C)),
                   nn.CrossEntropyLoss(reduction=reduction))  # fmt: skip
    x, y = torch.randn(N, D), torch.randint(C, (N,))
    with hookjac.extend(model, asked):
        loss(model(x), y).backward()
    wanted = {key: ours(p) for key, p in model.named_parameters()}
    theirs, their_loss = backpack.extend(model), backpack.extend(loss)
    with backpack.backpack(getattr(backpack.extensions, name)()):
        their_loss(theirs(x), y).backward()
    for key, p in theirs.named_parameters():
        found = getattr(p, attribute)
        close(found[0] if isinstance(found, list) else found, wanted[key], key)


def test_the_page_names_them() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "backpack.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)\([^`]*\)` \| `(\w+)` \|", page, re.M))
    assert {name: attribute for name, (_, attribute, _) in ROWS.items()}.items() <= table.items()
