"""Batches of no sample, as ranks without data and Poisson sampling make them: zeros, at the first step and later.

Right is: nothing for each of no samples, zeros for sums over them, and of a penalty what it has by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn
from oracle import close
from torch import Tensor, nn

import hookjac
from hookjac import HookjacError, extend, optim
from hookjac.quantity import names


def attentive() -> nn.Module:
    def forward(m: Any, ids: Tensor) -> Tensor:
        h = m.table(ids)
        return m.out(h + m.attention(h, h, h)[0])  # type: ignore[no-any-return]

    return Fn(forward, table=nn.Embedding(5, 4), attention=nn.MultiheadAttention(4, 2, batch_first=True),
              out=nn.Linear(4, C))  # fmt: skip


def recurrent() -> nn.Module:
    return Fn(lambda m, x: m.out(m.lstm(x)[0][:, -1]), lstm=nn.LSTM(3, 4, batch_first=True), out=nn.Linear(4, C))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "dense": (lambda: nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, C)),
              lambda n: torch.randn(n, D)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(), nn.MaxPool2d(2),
                                          nn.Flatten(), nn.Linear(8, C)), lambda n: torch.randn(n, 1, 6, 6)),
    "attention": (attentive, lambda n: torch.randint(5, (n, 3))),
    "recurrent": (recurrent, lambda n: torch.randn(n, 2, 3)),
}  # fmt: skip
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "squares": lambda o: F.mse_loss(o, torch.ones_like(o)),
    "half squares, sum": lambda o: (o - 1).square().sum() / 2,
    "logistic": lambda o: F.binary_cross_entropy_with_logits(o, torch.full_like(o, 0.3)),
    "huber": lambda o: F.huber_loss(o, torch.ones_like(o)),
    "smooth absolute": lambda o: F.smooth_l1_loss(o, torch.ones_like(o)),
    "cross entropy": lambda o: F.cross_entropy(o.flatten(0, -2), o.new_zeros(o[..., 0].numel(), dtype=torch.long)),
    "log-sum-exp": lambda o: o.logsumexp(-1).sum(),
    "fourth powers": lambda o: o.pow(4).sum(),
}
SINGLE = ("grad_sample", "grad_sample_norm", "grad_sample_gram", "grad_sample_projected", "jac", "ggn_sqrt",
          "ggn_diag_sample", "hess_diag_sample", "ntk")  # fmt: skip


def asked(name: str) -> list[str]:
    """hesscale is not defined for what is used at several times."""
    return [q for q in names() if not (q == "hesscale" and name == "recurrent")]


def tensors(result: Any, p: Tensor) -> list[Tensor]:
    if isinstance(result, hookjac.JacTensor):
        return [result.to_dense()]
    if isinstance(result, Tensor):
        return [result]
    if callable(result):
        return [result(torch.ones_like(p))]
    parts = result.parts if isinstance(result, hookjac.KroneckerSum) else (result,)
    return [t for part in parts for t in (part.A, part.B) if t is not None]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETS)
def test_every_quantity(name: str, loss: str) -> None:
    build, inputs = NETS[name]
    for q in asked(name):
        for sizes in ((0,), (3, 0)):
            model = build()
            for n in sizes:
                with extend(model, q):
                    LOSSES[loss](model(inputs(n))).backward()
            for key, p in model.named_parameters():
                result = vars(p)[q]
                if q in SINGLE:
                    assert 0 in result.shape, (q, key)
                for t in tensors(result, p):
                    if q == "grad_var":
                        assert bool(t.isnan().all()), key  # the variance of nothing
                    else:
                        assert not bool(t.any()), (q, key)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETS)
def test_the_next_batch(name: str, loss: str) -> None:
    """Is what it would be, had there been no empty one before."""
    build, inputs = NETS[name]
    torch.manual_seed(1)
    model, x = build(), inputs(3)
    found: list[dict[str, list[Tensor]]] = []
    for sizes in ((3,), (0, 3)):
        for n in sizes:
            torch.manual_seed(2)
            with extend(model, *asked(name)):
                LOSSES[loss](model(x[:n])).backward()
        found.append({k: [s + 0 for q in asked(name) for s in tensors(vars(p)[q], p)]
                      for k, p in model.named_parameters()})  # fmt: skip
    for key, one in found[0].items():
        for k, (s, t) in enumerate(zip(one, found[1][key], strict=True)):
            close(t, s, (key, k))


@pytest.mark.parametrize("name", NETS)
def test_a_penalty_by_itself(name: str) -> None:
    build, inputs = NETS[name]
    model = build()
    curved = ("hess_diag", "ggn_diag", "hutchinson", "hess_mp", "ggn_mp")
    with extend(model, *curved, "grad_sq_sum", "grad_sample"):
        penalty = sum((p.pow(3).sum() for p in model.parameters()), torch.zeros(()))
        (LOSSES["half squares, sum"](model(inputs(0))) + penalty).backward()
    for key, p in model.named_parameters():
        its, v = vars(p), torch.randn_like(p)
        for q in ("hess_diag", "ggn_diag", "hutchinson"):
            close(its[q], 6 * p.detach(), (key, q))
        for q in ("hess_mp", "ggn_mp"):
            close(its[q](v), 6 * p.detach() * v, (key, q))
        assert not bool(its["grad_sq_sum"].any())
        assert its["grad_sample"].shape == (0, *p.shape)


def test_where_batches_add_up() -> None:
    model, x, y = nn.Linear(D, C), torch.randn(6, D), torch.randn(6, C)
    wanted = hookjac.accumulate(model, F.mse_loss, [(x, y)], "ggn_diag", "grad_var")
    found = hookjac.accumulate(model, F.mse_loss, [(x[:0], y[:0]), (x[:4], y[:4]), (x[4:4], y[4:4]), (x[4:], y[4:])],
                               "ggn_diag", "grad_var")  # fmt: skip
    for key in ("weight", "bias"):
        for q in ("ggn_diag", "grad_var"):
            close(found[q][key], wanted[q][key], (key, q))
    with pytest.raises(HookjacError, match="no batch of the loader had a sample"):
        hookjac.accumulate(model, F.mse_loss, [(x[:0], y[:0])], "ggn_diag")


def test_a_private_step() -> None:
    """Of a Poisson batch that nobody is in: noise alone."""
    model, before = nn.Linear(D, C), None
    for way in ("closure", "block"):
        optimizer = optim.DPSGD(model, lr=1.0, batch_size=4, noise=0.0)
        before = [p.detach().clone() for p in model.parameters()]

        def closure(optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(torch.randn(0, D)), torch.zeros(0, C), reduction="sum")
            loss.backward()
            return loss

        if way == "closure":
            optimizer.step(closure)
        else:
            with optimizer.block():
                closure()
            optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)), way


def test_explained() -> None:
    told = hookjac.explain(nn.Linear(D, C), torch.randn(0, D), "ggn_diag", "grad_var",
                           loss_fn=lambda o: F.mse_loss(o, torch.zeros_like(o)))  # fmt: skip
    assert list(told.to_dict()["quantities"]) == ["ggn_diag", "grad_var"]
