"""Where other libraries are silently wrong, or fail aloud: the same models here, against loops.

A row for each thing known to break elsewhere; `hookjac` is right or says why it cannot be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, par, random_loss
from oracle import close, compare, expected, grad
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from hookjac import HookjacError, extend

ALL = ("grad_sample", "jac", "ggn_diag", "hess_diag")
PADDINGS = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Row:
    what: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (D,)
    ids: int = 0  # inputs are indices below this
    loss: Callable[[Tensor], Tensor] = random_loss
    instead: Callable[..., Tensor] | None = None  # the same function of the same parts, for loops
    hessian: bool = True  # PyTorch has a second derivative


seq = nn.Sequential


def image(conv: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: seq(conv(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(C))


def words(table: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Fn(lambda m, i: m.o(torch.tanh(m.e(i)).flatten(1)), e=table(), o=nn.LazyLinear(C))


def tied() -> nn.Module:
    a, b = nn.Linear(D, 4), nn.Linear(4, D)
    b.weight = nn.Parameter(a.weight.detach().T.clone())
    c = nn.Linear(D, 4)
    c.weight = a.weight
    return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), c)


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C))
    prune.random_unstructured(model[0], "weight", amount=0.4)
    return model


class Own(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2 + x.sum(-1, keepdim=True)


def _inplace(m: Any, x: Tensor) -> Tensor:
    h = m.c(F.relu(m.a(x), inplace=True))
    h += m.b(x)
    return F.relu(h, inplace=True)


def _last_state(m: Any, x: Tensor) -> Tensor:
    start = torch.tanh(m.s(x[:, 0])).unsqueeze(0)
    return m.o(m.r(x, (start, start * 0.5))[0][:, -1])


def _targets_left_out(out: Tensor) -> Tensor:
    return F.cross_entropy(out, torch.tensor([0, -100, 2, 1]))


def _two_losses(out: Tensor) -> Tensor:
    return F.cross_entropy(out, torch.tensor([0, 1, 2, 1])) + out.square().sum() / 7


ROWS = [
    Row("a view between layers", lambda: Fn(lambda m, x: m.b(torch.tanh(m.a(x)).view(-1, 2, 3)[:, 1]),
                                            a=nn.Linear(D, 6), b=nn.Linear(3, C))),
    Row("a slice between layers", lambda: Fn(lambda m, x: m.b(torch.tanh(m.a(x))[:, 1:4]), a=nn.Linear(D, 6),
                                             b=nn.Linear(3, C))),
    Row("tied weights", tied),
    Row("a module used twice", lambda: Fn(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Linear(D, D))),
    Row("pruned weights", pruned),
    *[Row(f"conv padding_mode {mode}", image(lambda mode=mode: nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)),
          (2, 4, 4)) for mode in PADDINGS],
    Row("conv padding same", image(lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=2)), (2, 4, 4)),
    Row("divisor_override", lambda: seq(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.AvgPool2d(2, divisor_override=3),
                                        nn.Flatten(), nn.Linear(3, C)), (2, 4, 4)),
    Row("targets of -100", lambda: seq(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)), loss=_targets_left_out),
    Row("two losses on one trunk", lambda: seq(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)), loss=_two_losses),
    Row("an initial state that is not zero", lambda: Fn(_last_state, s=nn.Linear(D, 3), o=nn.Linear(3, C),
                                                        r=nn.LSTM(D, 3, batch_first=True)), (3, D)),
    Row("functional calls between layers", lambda: Fn(lambda m, x: m.b(F.silu(F.layer_norm(m.a(x), (6,)))),
                                                      a=nn.Linear(D, 6), b=nn.Linear(6, C))),
    Row("a residual add", lambda: Fn(lambda m, x: m.b(x + torch.tanh(m.a(x))), a=nn.Linear(D, D), b=nn.Linear(D, C))),
    Row("layer norm without bias", lambda: seq(nn.Linear(D, 6), nn.LayerNorm(6, bias=False), nn.GELU(),
                                               nn.Linear(6, C))),
    Row("group norm", lambda: seq(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(),
                                  nn.Linear(36, C)),
        (2, 4, 4)),
    Row("attention", lambda: Fn(lambda m, x: m.t(x).mean(1),
                                t=nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True)), (3, 4)),
    Row("softplus, softmax", lambda: seq(nn.Linear(D, 6), nn.Softplus(), nn.Linear(6, C), nn.Softmax(1))),
    Row("GRU", lambda: Fn(lambda m, x: m.o(m.r(x)[0][:, -1]), r=nn.GRU(D, 3, batch_first=True), o=nn.Linear(3, C)),
        (3, D)),
    Row("upsampling", lambda: seq(nn.Conv2d(2, 2, 2), nn.Tanh(), nn.Upsample(scale_factor=2, mode="bilinear"),
                          nn.Conv2d(2, 1, 4), nn.Flatten()), (2, 3, 3)),
    Row("in-place ReLU and +=", lambda: Fn(_inplace, a=nn.Linear(D, 6), b=nn.Linear(D, C), c=nn.Linear(6, C))),
    Row("a submodule named output", lambda: Fn(lambda m, x: m.output(torch.tanh(m.a(x))), a=nn.Linear(D, 6),
                                               output=nn.Linear(6, C))),
    Row("keyword calls", lambda: Fn(lambda m, x: m.b(input=torch.tanh(m.a(input=x))), a=nn.Linear(D, 6),
                                    b=nn.Linear(6, C))),
    Row("several inputs", lambda: Fn(lambda m, x: m.b(torch.tanh(x), x.square()), b=nn.Bilinear(D, D, C))),
    Row("a subclass with its own forward", lambda: seq(Own(D, 6), nn.Tanh(), nn.Linear(6, C))),
    Row("weight norm", lambda: seq(parametrizations.weight_norm(nn.Linear(D, 6)), nn.Tanh(),
                                             nn.Linear(6, C))),
    Row("PReLU", lambda: seq(nn.Linear(D, 6), nn.PReLU(6), nn.Linear(6, C))),
    Row("cdist", lambda: Fn(lambda m, x: m.b(torch.cdist(m.a(x).unsqueeze(1), m.c.unsqueeze(0)).squeeze(1)),
                            a=nn.Linear(D, 3), b=nn.Linear(4, C), c=par(4, 3)), hessian=False),
    Row("padding_idx", words(lambda: nn.Embedding(5, 3, padding_idx=1)), (3,), ids=5),
    Row("scale_grad_by_freq", words(lambda: nn.Embedding(5, 3, scale_grad_by_freq=True)), (3,), ids=5),
    *[Row(f"a bag with a repeated id, {mode}", words(lambda mode=mode: nn.EmbeddingBag(3, 3, mode=mode)), (5,), ids=3,
          hessian=False)
      for mode in ("sum", "mean", "max")],
    Row("a layer that sees [B*T, d]", lambda: Fn(
        lambda m, x: m.b(torch.tanh(m.a(x.reshape(-1, D))).reshape(-1, 3, 6).sum(1)), a=nn.Linear(D, 6),
        b=nn.Linear(6, C)), (3, D)),
    Row("weights used functionally", lambda: Fn(lambda m, x: torch.tanh(F.linear(x, m.a.weight, m.a.bias))
                                                @ m.a.weight[:, :C], a=nn.Linear(D, D))),
    Row("a linear layer on four axes", lambda: seq(nn.Linear(D, 4), nn.Tanh(), nn.Flatten(), nn.Linear(24, C)),
        (2, 3, D)),
    *[Row(f"a {'' if reentrant else 'non-'}reentrant checkpoint", lambda reentrant=reentrant: Fn(
        lambda m, x: m.o(checkpoint(m.b, m.a(x), use_reentrant=reentrant)), a=nn.Linear(D, 4), o=nn.Linear(4, C),
        b=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())), instead=lambda m, x: m.o(m.b(m.a(x))))
      for reentrant in (True, False)],
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_right_where_others_are_not(row: Row) -> None:
    x = torch.randint(row.ids, (N, *row.shape)) if row.ids else torch.randn(N, *row.shape)
    model = row.build()
    model(x)  # lazy layers take shape
    plain = Fn(row.instead, **model._modules) if row.instead else model
    wanted = expected(plain, lambda: plain(x), row.loss, hessian=row.hessian)
    asked = ALL if row.hessian else ALL[:3]
    with extend(model, *asked):
        row.loss(model(x)).backward()
    compare(model, wanted, asked)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C))


def test_the_frequency_scale_is_that_of_the_whole_batch() -> None:
    """`scale_grad_by_freq` is no derivative: each sample's part of what `.grad` becomes."""
    e = nn.Embedding(5, 3, scale_grad_by_freq=True)
    ids = torch.tensor([[0, 1], [1, 1], [2, 0]])
    with extend(e, "grad_sample"):
        e(ids).square().sum().backward()
    count = torch.bincount(ids.reshape(-1), minlength=5)
    wanted = torch.zeros(3, 5, 3)
    for n in range(3):
        for i in ids[n]:
            wanted[n, i] += 2 * e.weight.detach()[i] / count[i]
    close(e.weight.grad_sample, wanted, "scaled")
    assert e.weight.grad is not None
    close(e.weight.grad_sample.sum(0), e.weight.grad, "sum")


def test_a_penalty_is_part_of_the_diagonals() -> None:
    model, x = mlp(), torch.randn(N, D)

    def penalty() -> Tensor:
        return sum((p.square().sum() * 0.3 for p in model.parameters()), torch.zeros(()))

    wanted = expected(model, lambda: model(x), random_loss, penalty)
    with extend(model, *ALL):
        (random_loss(model(x)) + penalty()).backward()
    compare(model, wanted, ALL)


def test_extended_again_and_again() -> None:
    model, x = mlp(), torch.randn(N, D)
    for _ in range(3):
        with extend(model, "grad_sample"):
            random_loss(model(x)).backward()
        assert model[0].weight.grad_sample.shape == (N, 6, D)
        del model[0].weight.grad_sample


def test_a_subset_of_inputs_gets_results() -> None:
    model, x = mlp(), torch.randn(N, D)
    wanted = expected(model, lambda: model(x), random_loss)
    with extend(model, *ALL):
        random_loss(model(x)).backward(inputs=[model[0].weight])
    for q in ALL:
        close(getattr(model[0].weight, q), wanted["0.weight"][q], q)
    assert not hasattr(model[2].weight, "grad_sample")


def test_a_second_backward_from_one_forward() -> None:
    model, x = mlp(), torch.randn(N, D)
    with extend(model, "grad_sample"):
        loss = random_loss(model(x))
        loss.backward(retain_graph=True)
        first = model[0].weight.grad_sample
        loss.backward()
    close(model[0].weight.grad_sample, first, "again")


def test_a_forward_without_backward_does_no_harm() -> None:
    model, x = mlp(), torch.randn(N, D)
    with extend(model, "grad_sample"):
        model(torch.randn(N + 3, D))
        random_loss(model(x)).backward()
    assert model[0].weight.grad_sample.shape[0] == N


def test_why_a_parameter_got_nothing_is_said() -> None:
    model = Fn(lambda m, x: m.a(x), a=nn.Linear(D, C), unused=nn.Linear(D, C))
    with extend(model, "grad_sample") as ext:
        random_loss(model(torch.randn(N, D))).backward()
    assert "not reached from the loss" in ext.explain().to_dict()["parameters"]["unused.weight"]["why"]
    assert not model.unused.weight.grad_sample.any()


def test_row_sums_are_not_the_diagonal() -> None:
    model, x = mlp(), torch.randn(N, D)
    weight = model[0].weight
    loss = F.cross_entropy(model(x), torch.tensor([0, 1, 2, 1]))
    first = grad(loss, weight)
    sums = grad(first, weight, torch.ones_like(first)).detach()
    with extend(model, "hess_diag"):
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 1])).backward()
    assert (sums - weight.hess_diag).norm() > 0.5 * weight.hess_diag.norm()


def test_batch_norm_in_training_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Linear(6, C))
    with pytest.raises(HookjacError, match="layer '1'"), extend(model, "grad_sample"):
        model(torch.randn(N, D))
