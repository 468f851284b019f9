"""Our operators handed over to curvlinops: equal to its own, and its routines run on them."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import C, D, N
from curvlinops import (
    CGInverseLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    LSMRInverseLinearOperator,
    hutchpp_trace,
    lanczos_approximate_spectrum,
)
from oracle import close
from torch import nn

import hookjac


class Found:
    """A model, its operators, and curvlinops' own of the same loss."""

    def __init__(self, ridge: float = 0.0) -> None:
        self.model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
        self.x, self.y = torch.randn(N, D), torch.randint(C, (N,))
        self.params = list(self.model.parameters())
        self.P = sum(p.numel() for p in self.params)
        with hookjac.extend(self.model, "jac", "hess_mp", "ggn_mp") as ext:
            loss = F.cross_entropy(self.model(self.x), self.y)
            (loss + ridge / 2 * sum(p.square().sum() for p in self.params)).backward()
        self.ext = ext
        data = (self.model, nn.CrossEntropyLoss(), self.params, [(self.x, self.y)])
        self.its = {"hessian": HessianLinearOperator(*data), "ggn": GGNLinearOperator(*data)}
        self.its["jacobian"] = JacobianLinearOperator(self.model, self.params, [(self.x, self.y)])
        self.ours: dict[str, Any] = {name: getattr(ext, name).to_curvlinops() for name in self.its}


@pytest.mark.parametrize("kind", ["hessian", "ggn", "jacobian"])
def test_products_are_those_of_its_own(kind: str) -> None:
    found = Found()
    ours, its = found.ours[kind], found.its[kind]
    assert ours.shape == its.shape
    assert (ours.dtype, ours.device) == (torch.float64, torch.device("cpu"))
    v, V = torch.randn(found.P), torch.randn(found.P, 3)
    close(ours @ v, its @ v, kind)
    close(ours @ V, its @ V, kind)
    listed = [torch.randn(*p.shape, 2) for p in found.params]
    for a, b in zip(ours @ listed, its @ listed, strict=True):
        close(a, b, kind)
    close((2.0 * ours + ours) @ v, 3 * (its @ v), "sums")
    u = torch.randn(ours.shape[0])
    close(ours.adjoint() @ u, its.adjoint() @ u, "adjoint")
    close(ours.adjoint().adjoint() @ v, its @ v, "twice")
    assert (kind != "jacobian") == ours.SELF_ADJOINT
    assert np.allclose(ours.to_scipy() @ v.numpy(), (its @ v).numpy(), rtol=1e-10)


def test_trace() -> None:
    """Hutch++ is exact where its sketch spans the range: of a GGN of N samples it has rank N (C - 1) at most."""
    found = Found()
    G = found.ext.ggn @ torch.eye(found.P)
    assert torch.linalg.matrix_rank(G) <= N * (C - 1)
    close(hutchpp_trace(found.ours["ggn"], 3 * N * C), G.trace(), "trace")


def test_solving_by_conjugate_gradients() -> None:
    found = Found(ridge=0.1)
    v = torch.randn(found.P)
    G = found.ext.ggn @ torch.eye(found.P)
    inverse = CGInverseLinearOperator(found.ours["ggn"], eps=0, tolerance=1e-14, max_iter=1000, max_tridiag_iter=1000)
    close(inverse @ v, torch.linalg.solve(G, v), "CG", rtol=1e-8)


def test_solving_an_indefinite_one() -> None:
    found = Found(ridge=0.01)
    v = torch.randn(found.P)
    H = found.ext.hessian @ torch.eye(found.P)
    inverse = LSMRInverseLinearOperator(found.ours["hessian"], atol=1e-15, btol=1e-15, maxiter=5000)
    close(inverse @ v, torch.linalg.solve(H, v), "LSMR", rtol=1e-6)


def test_chains_of_operators() -> None:
    found = Found()
    J, v = found.ours["jacobian"], torch.randn(found.P)
    dense = found.ext.jacobian.to_dense()
    close((J.adjoint() @ J) @ v, dense.T @ (dense @ v), "JᵀJ")


def test_spectrum() -> None:
    """A density over the eigenvalues: its integral is 1, and its mean their mean."""
    found = Found()
    values = torch.linalg.eigvalsh(found.ext.hessian @ torch.eye(found.P))
    bounds = (float(values[0]), float(values[-1]))
    np.random.seed(0)
    grid, density = lanczos_approximate_spectrum(
        found.ours["hessian"], 25, num_points=4000, num_repeats=200, boundaries=bounds
    )
    step = float(grid[1] - grid[0])
    assert float(density.sum()) * step == pytest.approx(1, abs=0.02)
    middle = float((grid * density).sum()) * step
    assert middle == pytest.approx(float(values.mean()), abs=0.03 * (bounds[1] - bounds[0]))


def test_after_the_step_it_refuses() -> None:
    found = Found()
    with torch.no_grad():
        found.params[0].add_(1)
    with pytest.raises(hookjac.HookjacError, match="Take products before the optimizer's step"):
        found.ours["hessian"] @ torch.randn(found.P)


def test_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "handover.md").read_text()
    torch.set_default_dtype(torch.float32)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for snippet in re.findall(r"```python\n(.*?)```", page, re.S):
            exec(snippet, names := {"__name__": "page"})
    lines = said.getvalue().splitlines()
    assert lines[0] == "[(16, 8), (16,), (3, 16), (3,)]"
    ext: Any = names["ext"]
    P = ext.ggn.shape[0]
    values = torch.linalg.eigvalsh(ext.hessian @ torch.eye(P))
    assert float(lines[2].split()[1]) == pytest.approx(float(values[-1]), rel=1e-3)
    assert float(re.findall(r"[\d.]+", lines[1])[0]) == pytest.approx(float((ext.ggn @ torch.eye(P)).trace()), rel=0.3)
    grad = torch.cat([p.grad.reshape(-1) for p in names["model"].parameters()])  # type: ignore[attr-defined]
    step = torch.cat([t.reshape(-1) for t in names["step"]])  # type: ignore[attr-defined]
    assert (ext.ggn @ step - grad).norm() < 0.05 * grad.norm()
