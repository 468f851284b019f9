"""Identities that must hold to rounding, whatever the oracle says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, mlp, random_loss
from oracle import close, grad, trainable
from test_exact import prepare
from torch import nn

from hookjac import HessDiag, extend

PIECEWISE = ["ReLU", "LeakyReLU", "Hardtanh", "ReLU6", "Hardshrink", "Softshrink", "Threshold", "Dropout",
             "linear only"]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_first_order(case: Case) -> None:
    """sum of grad_sample = grad; the Jacobian times the loss's slope = grad_sample."""
    model, run, pick = prepare(case)
    with extend(model, "grad_sample", "jac", output=case.output):
        output = pick(run())
        random_loss(output).backward()
    free = output.detach().requires_grad_()
    slope = grad(random_loss(free), free).detach()
    for name, p in trainable(model).items():
        if p.grad is not None:
            close(p.grad_sample.sum(0), p.grad, (name, "sum"))
        rows = p.jac.reshape(len(slope), -1, p.numel())
        product = (slope.reshape(len(slope), -1, 1) * rows).sum(1).reshape(p.grad_sample.shape)
        if case.name != "graph convolution":  # there a summand's gradient is one Jacobian row too, but let it be seen
            close(p.grad_sample, product, (name, "jac"))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in PIECEWISE], ids=str)
def test_hessian_is_ggn_on_piecewise_linear_nets(case: Case) -> None:
    model, run, _ = prepare(case)
    with extend(model, "ggn_diag", "hess_diag"):
        random_loss(run()).backward()
    for name, p in trainable(model).items():
        close(p.hess_diag, p.ggn_diag, name)


def test_roads_agree_on_a_larger_net() -> None:
    """Too large for the oracle, large enough for chunks and dense blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 30), nn.GELU(), nn.Linear(30, 60), nn.Sigmoid(),
                          nn.Linear(60, 10))  # fmt: skip
    x, y = torch.randn(33, 40), torch.randint(10, (33,))
    found = {}
    for road in ("columns", "features", "entries"):
        with extend(model, HessDiag(road=road)):  # type: ignore[arg-type]
            F.cross_entropy(model(x), y).backward()
        found[road] = {name: p.hess_diag for name, p in trainable(model).items()}
    for name in found["columns"]:
        close(found["columns"][name], found["features"][name], (name, "features"))
        close(found["columns"][name], found["entries"][name], (name, "entries"))


def test_hessian_of_a_sum_is_the_sum() -> None:
    """Quantities of the loss are linear in the batch: two halves add up."""
    model, x, y = mlp(nn.Tanh), torch.randn(6, 5), torch.randint(3, (6,))

    def run(rows: slice) -> dict[str, torch.Tensor]:
        with extend(model, "ggn_diag", "hess_diag"):
            F.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
        return {f"{name} {q}": getattr(p, q) for name, p in trainable(model).items() for q in ("ggn_diag", "hess_diag")}

    whole, first, second = run(slice(0, 6)), run(slice(0, 2)), run(slice(2, 6))
    for key in whole:
        close(first[key] + second[key], whole[key], key)
