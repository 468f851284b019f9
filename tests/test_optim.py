"""Each optimizer's steps against closed formulas on small nets, and what every optimizer has to do besides.

P entries of all parameters · N samples · C outputs.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import pickle
import re
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N
from largest import Largest
from oracle import close, grad
from torch import Tensor, nn

import hookjac
from benchmarks.peak import Peak
from hookjac import HookjacError, apart, optim

ROOT = Path(__file__).resolve().parents[1]
Y = torch.tensor([0, 2, 1, 1])
MAKE: dict[str, Callable[..., optim.Curved]] = {
    "KFAC": lambda m, *a, **k: optim.KFAC(m, *a, fisher="exact", **k),
    "EKFAC": lambda m, *a, **k: optim.KFAC(m, *a, fisher="exact", corrected=True, inverse_every=2, **k),
    "KFAC adapting": lambda m, *a, **k: optim.KFAC(m, *a, fisher="exact", adapt_every=2, **k),
    "DiagonalNewton": lambda m, *a, **k: optim.DiagonalNewton(m, *a, **k),
    "GaussNewton": lambda m, *a, **k: optim.GaussNewton(m, *a, **k),
    "NaturalGradient": lambda m, *a, **k: optim.NaturalGradient(m, *a, **k),
    "DPSGD": lambda m, *a, **k: optim.DPSGD(m, *a, batch_size=N, noise=0.0, momentum=0.5, clip=0.1, **k),
}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))


def work(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), Y)
        loss.backward()
        return loss

    return closure


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def derivatives(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient [P] and the generalised Gauss-Newton matrix [P, P] of the mean cross entropy, by loops."""
    params = list(model.parameters())
    out = model(x)
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(F.cross_entropy(out, Y), params, retain_graph=True)])
    G = torch.zeros(len(g), len(g))
    for n in range(len(x)):
        J = torch.stack([torch.cat([t.reshape(-1) for t in torch.autograd.grad(o, params, retain_graph=True)])
                         for o in out[n]])  # fmt: skip
        p = out[n].detach().softmax(0)
        G += J.T @ (torch.diag(p) - torch.outer(p, p)) @ J / len(x)
    return g, G


def split(model: nn.Module, v: Tensor) -> list[Tensor]:
    params = list(model.parameters())
    return [t.view_as(p) for p, t in zip(params, v.split([p.numel() for p in params]), strict=True)]


# One step against the closed formula ----------------------------------------------------------------------------


@pytest.mark.parametrize("refine", [0, 1])
def test_gauss_newton(refine: int) -> None:
    model, x = net(), torch.randn(N, D)
    before, (g, G) = vector(model), derivatives(model, x)
    optimizer = optim.GaussNewton(model, damping=0.3, lr=0.7, refine=refine)
    optimizer.step(work(model, x, optimizer))
    close(vector(model) - before, -0.7 * torch.linalg.solve(G + 0.3 * torch.eye(len(g)), g), "step")


def test_gauss_newton_at_small_damping_in_single_precision() -> None:
    """Woodbury's difference of two large vectors: a correction brings back what it loses."""
    model = nn.Sequential(nn.Linear(D, 64), nn.Tanh(), nn.Linear(64, C)).float()
    x, y = 3 * torch.randn(64, D).float(), torch.randint(C, (64,))
    with hookjac.extend(model, hookjac.GGNSqrt(structured=True)):
        F.cross_entropy(model(x), y).backward()
    params: list[Any] = list(model.parameters())
    W = torch.cat([p.ggn_sqrt.to_dense().flatten(0, 1).flatten(1) for p in params], 1).double()
    g = torch.cat([p.grad.reshape(-1) for p in params]).double()
    wanted = -torch.linalg.solve(W.T @ W + 1e-4 * torch.eye(len(g)), g)
    errors = []
    for refine in (0, 1):
        single = copy.deepcopy(model)
        optimizer = optim.GaussNewton(single, damping=1e-4, refine=refine)
        with optimizer.block():
            F.cross_entropy(single(x), y).backward()
        optimizer.step()
        errors.append(float((vector(single).double() - vector(model).double() - wanted).norm() / wanted.norm()))
    assert errors[1] < 1e-4
    assert errors[1] < errors[0] / 10


def test_natural_gradient() -> None:
    model, x = net(), torch.randn(N, D)
    before, (g, G) = vector(model), derivatives(model, x)
    optimizer = optim.NaturalGradient(model, damping=0.3, lr=0.7, iterations=200, tolerance=1e-13)
    optimizer.step(work(model, x, optimizer))
    close(vector(model) - before, -0.7 * torch.linalg.solve(G + 0.3 * torch.eye(len(g)), g), "step")
    before, (g, G) = vector(model), derivatives(model, x)
    damping = optimizer.param_groups[0]["damping"]
    assert damping == pytest.approx(0.2)  # the model was right
    optimizer.step(work(model, x, optimizer))  # from another start to the same end
    close(vector(model) - before, -0.7 * torch.linalg.solve(G + damping * torch.eye(len(g)), g), "second step", 1e-8)


@pytest.mark.parametrize("negative", ["abs", "clamp", "still"])
def test_diagonal_newton(negative: Any) -> None:
    model, x = net(), 3 * torch.randn(N, D)
    params = list(model.parameters())
    optimizer = optim.DiagonalNewton(
        model, lr=0.1, betas=(0.8, 0.9), damping=1e-2, curvature="hess_diag", negative=negative, clip=2.0,
        weight_decay=0.1,
    )  # fmt: skip
    m, h = torch.zeros(len(vector(model))), torch.zeros(len(vector(model)))
    met: set[bool] = set()
    for t in (1, 2):
        theta = vector(model).requires_grad_()

        def loss(v: Tensor) -> Tensor:
            names = [name for name, _ in model.named_parameters()]
            out = torch.func.functional_call(model, dict(zip(names, split(model, v), strict=True)), (x,))
            return F.cross_entropy(out, Y)

        g, H = grad(loss(theta), theta), torch.autograd.functional.hessian(loss, theta).diagonal()
        m, h = 0.8 * m + 0.2 * g, 0.9 * h + 0.1 * H
        mean, bend = m / (1 - 0.8**t), h / (1 - 0.9**t)
        size = bend.abs() if negative == "abs" else bend.clamp(min=0)
        step = (mean / (size + 1e-2)).clamp(-2, 2)
        if negative == "still":
            step[bend < 0] = 0
        met |= {*(bend < 0).tolist(), bool((step.abs() == 2).any())}
        optimizer.step(work(model, x, optimizer))
        close(vector(model), (theta * (1 - 0.1 * 0.1) - 0.1 * step).detach(), (negative, t))
    assert met == {True, False}
    assert len(params) == 4


def by_hand(model: nn.Sequential, x: Tensor) -> list[tuple[Tensor | None, Tensor]]:
    """(A, B) of each parameter of `net()` under cross entropy: the definition, by loops."""
    h = model[1](model[0](x)).detach()
    A = [x.T @ x / len(x), None, h.T @ h / len(x), None]
    B = [torch.zeros(4, 4), torch.zeros(4, 4), torch.zeros(C, C), torch.zeros(C, C)]
    for n in range(len(x)):
        p = model(x)[n].detach().softmax(0)
        H = (torch.diag(p) - torch.outer(p, p)) / len(x)
        J = model[2].weight.detach() * (1 - h[n] ** 2)  # d out / d z of the first layer
        for k, t in enumerate((J.T @ H @ J, J.T @ H @ J, H, H)):
            B[k] = B[k] + t
    return list(zip(A, B, strict=True))


def mixed(old: list[tuple[Tensor | None, Tensor]] | None, new: list[tuple[Tensor | None, Tensor]]) -> Any:
    if old is None:
        return new
    return [(None if a is None or c is None else 0.8 * a + 0.2 * c, 0.8 * b + 0.2 * d)
            for (a, b), (c, d) in zip(old, new, strict=True)]  # fmt: skip


def test_kfac() -> None:
    model, x, damping, factors = net(), torch.randn(N, D), 1e-2, None
    optimizer = optim.KFAC(model, lr=0.1, momentum=0.5, damping=damping, decay=0.8, inverse_every=2, clip=1e-3,
                           weight_decay=0.1, fisher="exact")  # fmt: skip
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    inverses: list[tuple[Tensor | None, Tensor]] = []
    for k in range(3):
        factors = mixed(factors, by_hand(model, x))
        if k % 2 == 0:
            inverses = []
            for A, B in factors:
                if A is None:
                    inverses.append((None, torch.linalg.inv(B + damping * torch.eye(len(B)))))
                    continue
                pi = math.sqrt(A.trace() / len(A) / (B.trace() / len(B)))
                root = math.sqrt(damping)
                inverses.append((torch.linalg.inv(A + root * pi * torch.eye(len(A))),
                                 torch.linalg.inv(B + root / pi * torch.eye(len(B)))))  # fmt: skip
        g = split(model, derivatives(model, x)[0])
        d = [B @ t if A is None else B @ t @ A for (A, B), t in zip(inverses, g, strict=True)]
        pulls = sum(0.01 * float((a * b).sum()) for a, b in zip(d, g, strict=True))
        scale = min(1.0, math.sqrt(1e-3 / pulls))
        assert scale < 1
        velocity = [0.5 * v + scale * t for v, t in zip(velocity, d, strict=True)]
        wanted = [(p - 0.1 * (v + 0.1 * p)).detach() for p, v in zip(model.parameters(), velocity, strict=True)]
        optimizer.step(work(model, x, optimizer))
        for (name, p), w in zip(model.named_parameters(), wanted, strict=True):
            close(p.detach(), w, (k, name))


def test_ekfac() -> None:
    """Dense matrices: the average's eigenvectors, and the moving average of the exact blocks' diagonals in them."""
    model, x, damping = net(), torch.randn(N, D), 1e-2
    optimizer = optim.KFAC(model, lr=0.1, momentum=0.0, damping=damping, decay=0.8, inverse_every=2, clip=0.0,
                           corrected=True, fisher="exact")  # fmt: skip
    factors, matrices, bases = None, None, []
    for k in range(3):
        factors = mixed(factors, by_hand(model, x))
        sizes = [p.numel() for p in model.parameters()]
        G = derivatives(model, x)[1]
        blocks = [row.split(sizes, 1)[j] for j, row in enumerate(G.split(sizes))]
        if matrices is None:
            bases = [basis(A, B) for A, B in factors]
            matrices = [Q @ torch.diag((Q.T @ b @ Q).diagonal()) @ Q.T for Q, b in zip(bases, blocks, strict=True)]
        else:  # diagonal in the basis that the factors had a step before
            matrices = [Q @ torch.diag((Q.T @ (0.8 * m + 0.2 * b) @ Q).diagonal()) @ Q.T
                        for Q, m, b in zip(bases, matrices, blocks, strict=True)]  # fmt: skip
            if k % 2 == 0:
                bases = [basis(A, B) for A, B in factors]
                matrices = [Q @ torch.diag((Q.T @ m @ Q).diagonal()) @ Q.T
                            for Q, m in zip(bases, matrices, strict=True)]  # fmt: skip
        g = split(model, derivatives(model, x)[0])
        wanted = [(p - 0.1 * torch.linalg.solve(m + damping * torch.eye(len(m)), t.reshape(-1)).view_as(p)).detach()
                  for p, m, t in zip(model.parameters(), matrices, g, strict=True)]  # fmt: skip
        optimizer.step(work(model, x, optimizer))
        for (name, p), w in zip(model.named_parameters(), wanted, strict=True):
            close(p.detach(), w, (k, name), 1e-8)


def basis(A: Tensor | None, B: Tensor) -> Tensor:  # -> [P, P], columns are eigenvectors of B (x) A
    Q = torch.linalg.eigh(B)[1]
    return Q if A is None else torch.kron(Q, torch.linalg.eigh(A)[1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("passes", [1, 2])
def test_private(passes: int, reduction: Any) -> None:
    model, x = net(), torch.randn(N, D)
    noise = torch.Generator().manual_seed(3)
    optimizer = optim.DPSGD(model, batch_size=7, lr=0.3, clip=1.2, noise=0.5, momentum=0.9, weight_decay=0.1,
                            loss_reduction=reduction, generator=noise)  # fmt: skip
    again, velocity, shares = torch.Generator().manual_seed(3), None, []
    for k in range(3):
        params, total = list(model.parameters()), torch.zeros(len(vector(model)))
        for n in range(N):
            g = torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), Y[n : n + 1]), params)
            flat = torch.cat([t.reshape(-1) for t in g])
            shares.append(min(1.0, 1.2 / float(flat.norm())))
            total += shares[-1] * flat
        z = torch.cat([torch.randn(p.shape, generator=again).reshape(-1) for p in params])
        g = (total + 0.5 * 1.2 * z) / 7
        step = g + 0.1 * vector(model)
        velocity = step if velocity is None else 0.9 * velocity + step
        wanted = vector(model) - 0.3 * velocity

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), Y, reduction=reduction)
            loss.backward()
            return loss

        if passes == 2:
            optimizer.step(closure)
        else:
            with optimizer.block():
                closure()
            optimizer.step()
        close(vector(model), wanted, k)
        close(torch.cat([p.grad.reshape(-1) for p in params if p.grad is not None]), g, "p.grad")
    assert min(shares) < 1 <= max(shares)


def test_private_draws_the_same_masks_twice() -> None:
    steps = []
    for passes in (1, 2):
        torch.manual_seed(5)
        model, x = nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.5), nn.Linear(8, C)), torch.randn(N, D)
        optimizer = optim.DPSGD(model, batch_size=N, noise=0.0, clip=0.1)
        closure = work(model, x, optimizer)
        if passes == 2:
            optimizer.step(closure)
        else:
            with optimizer.block():
                closure()
            optimizer.step()
        steps.append((vector(model), torch.rand(3)))
    close(*(v for v, _ in steps), "step")
    assert torch.equal(*(r for _, r in steps)), "what is drawn afterwards is the same"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_private_with_no_sample(reduction: Any) -> None:
    model = net()
    optimizer = optim.DPSGD(model, batch_size=N, noise=1.0, lr=0.5, loss_reduction=reduction,
                            generator=torch.Generator().manual_seed(0))  # fmt: skip
    before, wanted = vector(model), torch.Generator().manual_seed(0)
    z = torch.cat([torch.randn(p.shape, generator=wanted).reshape(-1) for p in model.parameters()])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.randn(0, D)), Y[:0], reduction=reduction)
        loss.backward()
        return loss

    optimizer.step(closure)
    close(vector(model), before - 0.5 * z / N, reduction)


def test_private_refuses() -> None:
    model, x = net(), torch.randn(N, D)
    optimizer = optim.DPSGD(model, batch_size=N)

    def penalised() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), Y) + model[0].weight.square().sum()
        loss.backward()
        return loss

    def twice() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x) + model(x), Y)
        loss.backward()
        return loss

    before = vector(model)
    with pytest.raises(HookjacError, match=r"'0\.weight' past the model's outputs \(a penalty"):
        optimizer.step(penalised)
    with pytest.raises(HookjacError, match="calls the model once, and it did 2 times"):
        optimizer.step(twice)
    assert torch.equal(vector(model), before)
    optimizer.step(work(model, x, optimizer))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def one_step(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], passes: int, **more: Any) -> Tensor:
    """What a step releases without noise: the clipped sum [P]."""
    optimizer = optim.DPSGD(model, batch_size=1, noise=0.0, lr=0.0, loss_reduction="sum", **more)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(x))
        value.backward()
        return value

    if passes == 2:
        optimizer.step(closure)
    else:
        with optimizer.block():
            closure()
        optimizer.step()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("passes", [1, 2])
def test_what_one_sample_can_do_is_bounded(passes: int) -> None:
    """The released sum with and without each sample differs by the bound at most, and by nearly that for some."""
    model, x, y = net(), 3 * torch.randn(8, D), torch.randint(C, (8,))
    whole = one_step(model, x, lambda out: 20 * F.cross_entropy(out, y, reduction="sum"), passes, clip=0.5)
    moved = []
    for n in range(8):
        rest = [k for k in range(8) if k != n]
        left = one_step(model, x[rest], lambda out, r=rest: 20 * F.cross_entropy(out, y[r], reduction="sum"),
                        passes, clip=0.5)  # type: ignore[misc] # fmt: skip
        moved.append(float((whole - left).norm()))
    assert max(moved) == pytest.approx(0.5)


def breast_cancer() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_breast_cancer

    table = load_breast_cancer()
    x = torch.as_tensor(table.data)
    return (x - x.mean(0)) / x.std(0), torch.as_tensor(table.target)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_private_on_real_data(noise: float) -> None:
    """Breast cancer in Poisson batches, next to a plain loop over samples: the same losses, and they fall."""
    x, y = breast_cancer()
    model = nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 2))
    twin = copy.deepcopy(model)
    drawn, first, second = (torch.Generator().manual_seed(seed) for seed in (1, 2, 2))
    optimizer = optim.DPSGD(model, batch_size=32, lr=1.0, clip=0.5, noise=noise, generator=first)
    params, losses, clipped, met = list(twin.parameters()), [], 0, 0
    for k in range(60):
        rows = (torch.rand(len(x), generator=drawn) < 32 / len(x)).nonzero().squeeze(1)
        total = [torch.zeros_like(p) for p in params]
        for n in rows:
            g = torch.autograd.grad(F.cross_entropy(twin(x[n : n + 1]), y[n : n + 1]), params)
            norm = math.sqrt(sum(float(t.square().sum()) for t in g))
            total = [s + min(1.0, 0.5 / norm) * t for s, t in zip(total, g, strict=True)]
            clipped, met = clipped + (norm > 0.5), met + 1
        wanted = F.cross_entropy(twin(x[rows]), y[rows])
        with torch.no_grad():
            for p, s in zip(params, total, strict=True):
                z = torch.randn(p.shape, generator=second) if noise else torch.zeros_like(p)
                p -= 1.0 * (s + noise * 0.5 * z) / 32

        def closure(rows: Tensor = rows) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert loss is not None
        close(loss, wanted.detach(), (k, noise), 1e-8)
        losses.append(float(loss))
    assert losses[0] > 0.5
    assert sum(losses[-10:]) / 10 < 0.15
    assert 0.1 * met < clipped < 0.9 * met, "the bound is in force for some samples, and not for others"


MEAN = Fn(lambda m, h: h.mean(1))  # [N, T, C] -> [N, C]
WIDE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "rows": (lambda: nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, C)),
             lambda: torch.randn(24, 5)),
    "sequences": (lambda: nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 40), nn.Linear(40, C), MEAN),
                  lambda: torch.randn(24, 6, 5)),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(2, 20, 3), nn.Tanh(), nn.Conv1d(20, 40, 3), nn.Flatten(),
                                          nn.Linear(160, C)), lambda: torch.randn(24, 2, 8)),
    "table": (lambda: nn.Sequential(nn.Embedding(50, 40), nn.Tanh(), nn.Linear(40, C), MEAN),
              lambda: torch.randint(50, (24, 4))),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
def test_private_builds_no_per_sample_gradient(name: str) -> None:
    """With a closure the largest tensor of a step is of a parameter or an activation; a block makes one [N, *p]."""
    make, data = WIDE[name]
    model, x = make(), data()
    y, most = torch.randint(C, (24,)), max(p.numel() for p in model.parameters())
    optimizer = optim.DPSGD(model, batch_size=24)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def blocked() -> None:
        with optimizer.block():
            closure()
        optimizer.step()

    found: list[tuple[int, int]] = []
    for step in (lambda: optimizer.step(closure), blocked):
        with Largest() as seen:
            step()
        with Peak() as peak:
            step()
        found.append((seen.entries, peak.bytes))
    (ghost, ghost_bytes), (whole, whole_bytes) = found
    assert whole == 24 * most
    assert ghost < whole / 4
    assert ghost_bytes < 8 * 24 * most < whole_bytes, "all that is alive at once, against one such gradient"


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize("late", ["penalty", "in place", "state", "detached"])
def test_private_refuses_at_a_later_step_too(late: str) -> None:
    model: Any = Counting(D, C) if late == "state" else nn.Linear(D, C)
    x, y = torch.randn(N, D), Y
    optimizer = optim.DPSGD(model, batch_size=N, independent=True)
    odd = False

    def closure() -> Tensor:
        optimizer.zero_grad()
        out = model(x)
        if odd and late == "in place":
            out *= 3
        loss = F.cross_entropy(out, y)
        if odd and late == "penalty":
            loss = loss + 0.1 * model.weight.square().sum()
        loss.backward()
        return loss.detach() if odd and late == "detached" else loss

    if late != "state":
        optimizer.step(closure)
    odd, before = True, vector(model)
    says = {"penalty": "'weight' past the model's outputs", "in place": "changed in place",
            "state": "keeps a state between calls", "detached": "return the loss itself"}[late]  # fmt: skip
    with pytest.raises(HookjacError, match=says):
        optimizer.step(closure)
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("passes", [1, 2])
def test_private_refuses_a_model_that_mixes_samples(passes: int) -> None:
    model, x = Fn(lambda m, x: m.a(x - x.mean(0)), a=nn.Linear(D, C)), torch.randn(N, D)
    with pytest.raises(HookjacError, match="the model mixes samples"):
        one_step(model, x, lambda out: F.cross_entropy(out, Y), passes)
    one_step(model, x, lambda out: F.cross_entropy(out, Y), passes, independent=True)
    assert not model._forward_pre_hooks


class Odd(nn.Module):
    """Mixes samples in training only; counts its calls in a buffer that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(D, C)
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.n = self.n + 1
        out = self.a(x)
        return {"apart": out, "mixed": out - out.mean(0), "either": out - out.mean(0) if self.training else out}


def test_a_trial_is_of_the_model_as_it_is() -> None:
    model, x = Odd(), torch.randn(N, D)

    def step(output: str) -> None:
        optimizer = optim.DPSGD(model, batch_size=N, output=output)
        with optimizer.block():
            F.cross_entropy(model(x)[output], Y).backward()
        optimizer.step()

    step("apart")
    assert float(model.n) == 1, "the trial left nothing behind"
    with pytest.raises(HookjacError, match="the model mixes samples"):
        step("mixed")
    model.eval()
    step("either")
    model.train()
    with pytest.raises(HookjacError, match="the model mixes samples"):
        step("either")


def test_private_noises_what_no_sample_reached() -> None:
    model = Fn(lambda m, x: m.a(x), a=nn.Linear(D, C), b=nn.Linear(2, 2))
    optimizer = optim.DPSGD(model, batch_size=N, noise=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(work(model, torch.randn(N, D), optimizer))
    for name, p in model.named_parameters():
        assert bool((p != before[name]).all()), name


@pytest.mark.parametrize("name", ["DPSGD", "GaussNewton", "NaturalGradient"])
def test_two_backwards_are_refused_where_a_step_is_of_one(name: str) -> None:
    model, x = net(), torch.randn(N, D)
    optimizer = MAKE[name](model)
    for _ in range(2):
        with optimizer.block():
            F.cross_entropy(model(x), Y).backward()
    before = vector(model)
    with pytest.raises(HookjacError, match="there were 2 since the last"):
        optimizer.step()
    assert torch.equal(vector(model), before)
    with optimizer.block():
        F.cross_entropy(model(x), Y).backward()
    optimizer.zero_grad()  # thrown away
    with optimizer.block():
        F.cross_entropy(model(x), Y).backward()
    optimizer.step()
    assert not torch.equal(vector(model), before)


# Levenberg and Marquardt ----------------------------------------------------------------------------------------


def test_linear_regression_takes_one_step() -> None:
    model, x = nn.Linear(D, 2), torch.randn(20, D)
    y = torch.randn(20, 2)
    optimizer = optim.GaussNewton(model, damping=1e-12, least_damping=1e-14, refine=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    wanted = torch.linalg.lstsq(torch.cat([x, torch.ones(20, 1)], 1), y).solution
    close(torch.cat([model.weight.T, model.bias.unsqueeze(0)]).detach(), wanted, "least squares", 1e-6)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-12 / 1.5)


@pytest.mark.parametrize("name", ["GaussNewton", "NaturalGradient", "KFAC adapting"])
def test_a_step_that_raises_the_loss_is_taken_back(name: str) -> None:
    model, x = net(), torch.randn(N, D)
    optimizer = MAKE[name](model, lr=1e5, damping=1e-2)
    closure = work(model, x, optimizer)
    if name == "KFAC adapting":
        optimizer.clip = 0.0  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step(closure)
        for group in optimizer.param_groups:
            group["lr"] = 1e5
    before, loss = vector(model), closure().item()
    assert optimizer.step(closure) == pytest.approx(loss)
    assert torch.equal(vector(model), before)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-2 * 4 ** (5 if name == "GaussNewton" else 1))


def test_adapting_needs_a_closure() -> None:
    model, x = net(), torch.randn(N, D)
    optimizer = optim.KFAC(model, adapt_every=1)
    with optimizer.block():
        F.cross_entropy(model(x), Y).backward()
    with pytest.raises(HookjacError, match=r"optimizer\.step\(closure\)"):
        optimizer.step()


def test_a_loss_that_bends_down() -> None:
    """No product helps; then the step is the gradient's, and damping does not fall while nothing moves."""
    model, x = net(), torch.randn(N, D)
    optimizer = optim.NaturalGradient(model, damping=1e-3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).cos().mean()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(40):
        optimizer.step(closure)
    assert closure().item() < first - 0.5
    model = net()
    skewed = optim.KFAC(model, fisher="exact", corrected=True, damping=1e-6, lr=1e-3)
    for _ in range(10):
        before = vector(model)
        skewed.zero_grad()
        with skewed.block():
            model(x).cos().mean().backward()
        g = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        skewed.step()
        assert float(g @ (vector(model) - before)) < 0 or skewed.param_groups[0]["momentum"] > 0


def test_a_trial_that_fails_leaves_the_parameters() -> None:
    model, x = net(), torch.randn(N, D)
    for name in ("GaussNewton", "NaturalGradient"):
        optimizer, calls = MAKE[name](model), [0]

        def closure(optimizer: Any = optimizer, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            if calls[0] == 2:
                raise KeyboardInterrupt
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), Y)
            loss.backward()
            return loss

        before = vector(model)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert torch.equal(vector(model), before), name
        assert not [q for p in model.parameters() for q in vars(p) if not q.startswith("_")]


def test_one_damping_for_all_groups() -> None:
    model, x = net(), torch.randn(N, D)
    for name in ("GaussNewton", "NaturalGradient"):
        optimizer = MAKE[name](
            model, [{"params": model[0].parameters()}, {"params": model[2].parameters(), "damping": 5.0}]
        )
        with pytest.raises(HookjacError, match="one damping; its groups have"):
            optimizer.step(work(model, x, optimizer))


# What every optimizer has to do ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_going_on_from_its_state(name: str) -> None:
    """Saved and loaded (weights only), it takes the same steps, damping and all."""
    model, x = net(), torch.randn(N, D)
    optimizer = MAKE[name](model)
    for _ in range(3):
        optimizer.step(work(model, x, optimizer))
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), model.state_dict()), file)
    other = net()
    fresh = MAKE[name](other)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    fresh.load_state_dict(state)
    other.load_state_dict(weights)
    for _ in range(3):
        optimizer.step(work(model, x, optimizer))
        fresh.step(work(other, x, fresh))
    assert torch.equal(vector(model), vector(other))


@pytest.mark.parametrize("name", MAKE)
def test_groups_schedules_and_frozen_parameters(name: str) -> None:
    model, x = net(), torch.randn(N, D)
    model.unused = nn.Parameter(torch.ones(2))  # type: ignore[assignment]
    model.forward = lambda x: nn.Sequential.forward(nn.Sequential(model[0], model[1], model[2]), x)  # type: ignore[method-assign]
    model[0].bias.requires_grad_(False)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    groups = [{"params": [model[0].weight, model[0].bias], "lr": 0.0}, {"params": [model[2].weight]}]
    optimizer = MAKE[name](model, groups, lr=0.5)
    if isinstance(optimizer, optim.KFAC):  # a step that is clipped does not depend on lr
        optimizer.clip = 0.0
        for group in optimizer.param_groups:
            group["momentum"] = 0.0
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    sizes = []
    for _ in range(2):
        old = model[2].weight.detach().clone()
        optimizer.step(work(model, x, optimizer))
        schedule.step()
        sizes.append((model[2].weight - old).norm().item())
        assert model[2].weight.grad is not None
    assert 0 < sizes[1] < 0.5 * sizes[0]
    for key, p in model.named_parameters():
        assert torch.equal(p, before[key]) == (key != "2.weight"), key
        assert not [q for q in vars(p) if not q.startswith("_")], "results are taken off"


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "DiagonalNewton", "DPSGD"])
def test_block_and_closure_are_one(name: str) -> None:
    model, x = net(), torch.randn(N, D)
    twin = copy.deepcopy(model)
    first, second = MAKE[name](model), MAKE[name](twin)
    for _ in range(3):
        first.step(work(model, x, first))
        with second.block():
            work(twin, x, second)()
        second.step()
    close(vector(model), vector(twin), "steps")


@pytest.mark.parametrize("name", MAKE)
def test_copies_and_pickles(name: str) -> None:
    model, x = net(), torch.randn(N, D)
    optimizer = MAKE[name](model)
    for _ in range(2):
        optimizer.step(work(model, x, optimizer))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other = copy.deepcopy(model)
        twin.model.load_state_dict(other.state_dict())
        mine = MAKE[name](other)
        mine.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for _ in range(2):
            twin.step(work(twin.model, x, twin))
            mine.step(work(other, x, mine))
        assert torch.equal(vector(twin.model), vector(other)), name


@pytest.mark.parametrize("name", MAKE)
def test_after_an_error_in_the_block(name: str) -> None:
    model, x = net(), torch.randn(N, D)
    optimizer = MAKE[name](model)
    with pytest.raises(RuntimeError, match="boom"), optimizer.block():
        F.cross_entropy(model(x), Y).backward()
        raise RuntimeError("boom")
    before = vector(model)
    with pytest.raises(HookjacError, match="no backward of its own"):
        optimizer.step()
    assert torch.equal(vector(model), before)
    assert not [q for p in model.parameters() for q in vars(p) if not q.startswith("_")]


@pytest.mark.parametrize("name", MAKE)
def test_what_is_not_finite_moves_nothing(name: str) -> None:
    model, x = net(), torch.randn(N, D)
    optimizer = MAKE[name](model)
    optimizer.step(work(model, x, optimizer))
    before, bad = vector(model), x.clone()
    bad[1, 2] = math.nan
    with pytest.raises(HookjacError, match="not finite"):
        optimizer.step(work(model, bad, optimizer))
    assert torch.equal(vector(model), before)
    for _ in range(3):
        optimizer.step(work(model, x, optimizer))
    assert bool(vector(model).isfinite().all())


@pytest.mark.parametrize("name", [n for n in MAKE if n != "KFAC adapting"])
def test_a_scaler_is_refused(name: str) -> None:
    model, x = net().float(), torch.randn(N, D).float()
    optimizer, scaler = MAKE[name](model), torch.amp.GradScaler("cpu")
    before = vector(model)
    with optimizer.block():
        scaler.scale(F.cross_entropy(model(x), Y)).backward()
    with pytest.raises(HookjacError, match="GradScaler"):
        scaler.step(optimizer)
    assert torch.equal(vector(model), before)
    optimizer.zero_grad()
    with optimizer.block():
        F.cross_entropy(model(x), Y).backward()
    optimizer.step()


@pytest.mark.parametrize("name", MAKE)
def test_outputs_of_several_tensors(name: str) -> None:
    model, x = (
        Fn(lambda m, x: {"h": m.a(x), "logits": m.b(torch.tanh(m.a(x)))}, a=nn.Linear(D, 4), b=nn.Linear(4, C)),
        torch.randn(N, D),
    )
    twin = copy.deepcopy(nn.Sequential(model.a, nn.Tanh(), model.b))
    first, second = MAKE[name](model, output="logits"), MAKE[name](twin)

    def closure() -> Tensor:
        first.zero_grad()
        loss = F.cross_entropy(model(x)["logits"], Y)
        loss.backward()
        return loss

    for _ in range(2):
        first.step(closure)
        second.step(work(twin, x, second))
    close(vector(model), vector(twin), name, 1e-8)


@pytest.mark.parametrize("name", MAKE)
def test_groups_that_come_later(name: str) -> None:
    model, x = net(), torch.randn(N, D)
    optimizer = MAKE[name](model, model[0].parameters())
    optimizer.step(work(model, x, optimizer))
    before = model[2].weight.detach().clone()
    optimizer.add_param_group({"params": model[2].parameters()})
    optimizer.step(work(model, x, optimizer))
    assert not torch.equal(model[2].weight, before)
    for group, says in (({"params": [nn.Parameter(torch.ones(2))]}, "not one of its model's"),):
        with pytest.raises(ValueError, match=says):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 2
    model[2].weight.requires_grad_(False)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    before = model[2].weight.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(x), Y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(model[2].weight, before)


@pytest.mark.parametrize("name", MAKE)
def test_closures_and_tables_of_the_wrong_kind(name: str) -> None:
    model, x = net(), torch.randn(N, D)
    optimizer = MAKE[name](model)
    before = vector(model)
    with pytest.raises(TypeError, match="should return the loss, got float"):
        optimizer.step(lambda: work(model, x, optimizer)().item())  # type: ignore[arg-type, return-value]
    assert torch.equal(vector(model), before)
    sparse: Any = Fn(lambda m, i: m.o(m.t(i).mean(1)), t=nn.Embedding(5, 3, sparse=True), o=nn.Linear(3, C))
    ids = torch.randint(5, (N, 2))
    with pytest.raises(HookjacError, match=r"the gradient of 't.weight' is sparse"):
        over = MAKE[name](sparse)
        over.step(work(sparse, ids, over))


@pytest.mark.parametrize("name", ["KFAC", "EKFAC"])
def test_what_some_batches_do_not_reach(name: str) -> None:
    """A depthwise convolution and a table that the first batch, and every other, leaves out."""

    def forward(m: Any, x: Tensor, on: bool) -> Tensor:
        h = torch.tanh(m.a(x))
        return m.o(h + m.c(x[:, None].expand(-1, 3, -1)).sum((1, 2))[:, None] if on else h)

    model: Any = Fn(forward, a=nn.Linear(D, 4), c=nn.Conv1d(3, 3, 2, groups=3), o=nn.Linear(4, C))
    optimizer, x = MAKE[name](model), torch.randn(N, D)
    for k in range(24):
        optimizer.zero_grad(set_to_none=False)
        with optimizer.block():
            F.cross_entropy(model(x, k % 2 == 1), Y).backward()
        before = model.c.weight.detach().clone()
        optimizer.step()
        if k == 1:
            assert not torch.equal(model.c.weight, before)
    assert bool(vector(model).isfinite().all())
    assert optimizer.state[model.c.weight]["A"].shape == (3, 2, 2)


@pytest.mark.parametrize("name", MAKE)
def test_misuse(name: str) -> None:
    model, x = net(), torch.randn(N, D)
    with pytest.raises(TypeError, match="expects the model first, got generator"):
        MAKE[name](model.parameters())
    with pytest.raises(ValueError, match="not one of its model's"):
        MAKE[name](model, net().parameters())
    with pytest.raises(ValueError, match=r"lr must be a number that is not negative, got -1"):
        MAKE[name](model, lr=-1.0)
    optimizer = MAKE[name](model)
    F.cross_entropy(model(x), Y).backward()
    before = vector(model)
    with pytest.raises(HookjacError, match="found no backward of its own"):
        optimizer.step()

    def broken() -> Tensor:
        optimizer.zero_grad()
        F.cross_entropy(model(x), Y).backward()
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        optimizer.step(broken)
    with pytest.raises(HookjacError, match=r"no backward of all its parameters in its block"):
        optimizer.step(lambda: F.cross_entropy(model(x), Y))  # there are gradients, but of before
    optimizer.zero_grad()
    with pytest.raises(HookjacError, match=r"no backward of all its parameters in its block"):
        optimizer.step(lambda: F.cross_entropy(model(x), Y))
    assert torch.equal(vector(model), before)
    loss = optimizer.step(work(model, x, optimizer))  # unharmed
    assert loss is not None
    assert not loss.requires_grad
    assert not torch.equal(vector(model), before)


@pytest.mark.parametrize(("make", "message"), [
    (lambda m: optim.KFAC(m, momentum=1.0), "momentum must be at least 0 and less than 1"),
    (lambda m: optim.KFAC(m, inverse_every=0), "inverse_every must be a positive integer"),
    (lambda m: optim.DiagonalNewton(m, betas=(0.9, 1.0)), "the second of betas must be"),
    (lambda m: optim.DiagonalNewton(m, negative="no"), "'abs', 'clamp' or 'still', got 'no'"),
    (lambda m: optim.DiagonalNewton(m, every=0), "every must be"),
    (lambda m: optim.GaussNewton(m, damping=0.0), "damping must be positive"),
    (lambda m: optim.GaussNewton(m, tries=0), "tries must be a positive integer"),
    (lambda m: optim.NaturalGradient(m, iterations=0), "iterations must be a positive integer"),
    (lambda m: optim.NaturalGradient(m, damping=0.0), "damping must be positive"),
    (lambda m: optim.DiagonalNewton(m, damping=0.0), "damping must be positive"),
    (lambda m: optim.KFAC(m, [{"params": m.parameters(), "lr": -1.0}]), "lr must be a number"),
    (lambda m: optim.KFAC(m, [{"params": m.parameters(), "momentum": 1.5}]), "momentum must be at least 0"),
    (lambda m: optim.KFAC(m, [{"params": m.parameters(), "decay": 0.5}]), r"one decay .*KFAC\(model, groups, decay="),
    (lambda m: optim.KFAC(m, [{"params": m.parameters(), "least_damping": 0.0}]), "least_damping must be positive"),
    (lambda m: optim.KFAC(m, fisher="none"), "'empirical' or 'kfra', got 'none'"),
    (lambda m: optim.KFAC(m, sharing="none"), "'expand' or 'reduce', got 'none'"),
    (lambda m: optim.DiagonalNewton(m, [{"params": m.parameters(), "damping": 0.0}]), "damping must be positive"),
    (lambda m: optim.DiagonalNewton(m, [{"params": m.parameters(), "betas": 0.9}]), "betas must be two numbers"),
    (lambda m: optim.GaussNewton(m, [{"params": m.parameters(), "damping": 0.0}]), "damping must be positive"),
    (lambda m: optim.NaturalGradient(m, [{"params": m.parameters(), "least_damping": -1.0}]), "least_damping must be"),
    (lambda m: optim.DPSGD(m, batch_size=4, noise=math.inf), "noise must be a number"),
    (lambda m: optim.DPSGD(m, batch_size=4, clip=0.0), "clip must be positive"),
    (lambda m: optim.DPSGD(m, batch_size=4, loss_reduction="none"), "'mean' or 'sum', got 'none'"),
])  # fmt: skip
def test_bad_numbers(make: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(net())


def test_what_stands_where_parameters_should() -> None:
    with pytest.raises(TypeError, match=r"parameters or groups of them after the model, got 0.1: .* as in lr=0.1"):
        optim.KFAC(net(), 0.1)  # type: ignore[arg-type]
    with pytest.raises(HookjacError, match=r"group= was given, but torch.distributed is not initialised"):
        optim.KFAC(net(), group="world")


def test_another_function_that_picks_an_output_is_tried_by_itself() -> None:
    """Often it lies where the one before it lay, which is gone."""

    class Two(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            return out, out - out.mean(0)

    model, x = Two(D, 3), torch.randn(N, D)
    for _ in range(5):
        with hookjac.demand_apart(model, lambda out: out[0]):
            model(x)
        with pytest.raises(HookjacError, match="the model mixes samples"):
            with hookjac.demand_apart(model, lambda out: out[1]):
                model(x)


def test_what_was_tried_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, runs = nn.Sequential(nn.Linear(D, 3)), torch.randn(N, D), []
    real = apart._run
    monkeypatch.setattr(apart, "_run", lambda *args: (runs.append(1), real(*args))[1])

    class Picks:
        def all(self, out: Tensor) -> Tensor:
            return out

    picks, function = Picks(), lambda out, model=model: out
    gone = weakref.ref(model)
    for output in (None, picks.all, function):
        for wanted in (3, 0):
            runs.clear()
            with hookjac.demand_apart(model, output):
                model(x)
            assert len(runs) == wanted, output
    del model, function, output
    gc.collect()
    assert gone() is None, "what is remembered must not keep the model"


def test_half_precision() -> None:
    for name in ("KFAC", "GaussNewton"):
        with pytest.raises(HookjacError, match=r"a parameter in torch.bfloat16.*autocast"):
            MAKE[name](net().bfloat16())
    model, x = net().float(), torch.randn(N, D).float()
    for name in MAKE:
        optimizer = MAKE[name](model)

        def closure(optimizer: optim.Curved = optimizer) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), Y)
            loss.backward()
            return loss

        assert all(math.isfinite(float(optimizer.step(closure) or 0)) for _ in range(2)), name
        assert bool(vector(model).isfinite().all()), name


def test_a_curvature_that_is_no_diagonal() -> None:
    model, x = net(), torch.randn(N, D)
    optimizer = optim.DiagonalNewton(model, curvature="grad_sample")
    with pytest.raises(HookjacError, match=r"expected a quantity of shape \[\*p\] = \[4, 5\], got \[4, 4, 5\]"):
        optimizer.step(work(model, x, optimizer))


@pytest.mark.parametrize("curvature", ["ggn_diag", "ggn_diag_mc", "hess_diag", "hesscale", "hutchinson", "a record"])
def test_diagonals_to_choose_from(curvature: str) -> None:
    model, x = net(), torch.randn(N, D)
    asked = hookjac.GGNDiagMC(samples=3) if curvature == "a record" else curvature
    optimizer = optim.DiagonalNewton(model, curvature=asked, every=2)
    losses = [float(optimizer.step(work(model, x, optimizer)) or 0) for _ in range(20)]
    assert losses[-1] < losses[0]


# Whole models ---------------------------------------------------------------------------------------------------


def transformer(tied: bool) -> nn.Module:
    def forward(m: Any, ids: Tensor) -> Tensor:
        h = m.table(ids)
        h = h + m.mix(m.norm(h), m.norm(h), m.norm(h), need_weights=False)[0]
        return m.out(torch.tanh(m.up(h))).mean(1) if not tied else (torch.tanh(m.up(h)) @ m.table.weight.T).mean(1)

    parts: dict[str, nn.Module] = {
        "table": nn.Embedding(7, 8), "norm": nn.LayerNorm(8), "up": nn.Linear(8, 8),
        "mix": nn.MultiheadAttention(8, 2, batch_first=True),
    }  # fmt: skip
    return Fn(forward, **parts, **({} if tied else {"out": nn.Linear(8, 7)}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_a_transformer_learns(name: str, tied: bool) -> None:
    model, ids = transformer(tied), torch.randint(7, (16, 5))
    target = ids[:, 0]
    optimizer = MAKE[name](model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids), target)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure) or 0) for _ in range(12)]
    assert losses[-1] < losses[0]
    if tied and name.startswith("KFAC"):
        assert "first" in optimizer.state[model.table.weight], "a sum of products takes Adam's step"  # type: ignore[union-attr, index]


def test_adams_step_for_what_has_no_factors() -> None:
    model, ids = transformer(tied=True), torch.randint(7, (16, 5))
    table: nn.Parameter = model.table.weight  # type: ignore[union-attr, assignment]
    optimizer = optim.KFAC(model, other_lr=0.02, lr=0.0)
    copied = table.detach().clone().requires_grad_()
    adam = torch.optim.Adam([copied], lr=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        with optimizer.block():
            F.cross_entropy(model(ids), ids[:, 0]).backward()
        assert table.grad is not None
        copied.grad = table.grad.clone()
        optimizer.step()
        adam.step()
        close(table.detach(), copied.detach(), "table")


PAGE = (ROOT / "docs" / "optimizers.md").read_text()


def test_the_page_runs() -> None:
    torch.set_default_dtype(torch.float32)
    said, names = io.StringIO(), {"__name__": "page"}
    with contextlib.redirect_stdout(said):
        for snippet in re.findall(r"```python\n(.*?)```", PAGE, re.S):
            exec(snippet, names)
    lines = [line.split() for line in said.getvalue().splitlines()]
    losses = dict(line for line in lines if len(line) == 2)
    assert set(losses) == {"KFAC", "DiagonalNewton", "Cautious"}
    assert float(losses["KFAC"]) < 0.6
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.S)
    rows, told = lines[-5:], [line.split() for line in shown.splitlines()[1:]]
    assert [row[:-6] for row in rows] == [row[:-6] for row in told]
    for row, page in zip(rows, told, strict=True):
        for k in range(-6, 0):  # three losses, and what is right of 143: another machine rounds otherwise
            assert abs(float(row[k]) - float(page[k])) < (0.01 if k < -3 else 2.5 / 143), (row, page)


def test_what_the_page_says_of_privacy() -> None:
    pytest.importorskip("opacus")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import RDPAccountant
    told = re.findall(r"noise (\d) spends ε = ([\d.]+)", PAGE)
    assert len(told) == 3
    for noise, epsilon in told:
        accountant = RDPAccountant()
        accountant.history = [(float(noise), 64 / 426, 100)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert f"{accountant.get_epsilon(delta=1e-3):.1f}" == epsilon
