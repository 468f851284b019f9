"""The numbers are those of the loss that was really backpropagated, whatever it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, mlp, par
from oracle import close, compare, expected, grad, hessian_diagonal, trainable
from torch import Tensor, nn

import hookjac

QUANTITIES = ("grad_sample", "ggn_diag", "hess_diag")
Y = torch.tensor([0, 2, 1, 2])


def targets(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


CE_WEIGHT = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
SMALL = torch.rand(N, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross entropy": lambda o: F.cross_entropy(o, Y),
    "cross entropy, sum": lambda o: F.cross_entropy(o, Y, reduction="sum"),
    "cross entropy module, weights": lambda o: nn.CrossEntropyLoss(weight=CE_WEIGHT)(o, Y),
    "cross entropy, ignore_index": lambda o: F.cross_entropy(o, torch.tensor([0, -100, 1, -100])),
    "cross entropy, label smoothing": lambda o: F.cross_entropy(o, Y, label_smoothing=0.2),
    "cross entropy, probabilities": lambda o: F.cross_entropy(o, SMALL.softmax(1)),
    "nll of log_softmax": lambda o: F.nll_loss(F.log_softmax(o, 1), Y),
    "mse": lambda o: F.mse_loss(o, targets(N, C)),
    "half mse, sum": lambda o: 0.5 * F.mse_loss(o, targets(N, C), reduction="sum"),
    "bce with logits": lambda o: F.binary_cross_entropy_with_logits(o, SMALL.round(), pos_weight=CE_WEIGHT),
    "bce of sigmoid": lambda o: F.binary_cross_entropy(o.sigmoid(), SMALL.round()),
    "huber": lambda o: F.huber_loss(o, targets(N, C), delta=0.5),
    "l1": lambda o: F.l1_loss(o, targets(N, C)),
    "kl": lambda o: F.kl_div(F.log_softmax(o, 1), SMALL.softmax(1), reduction="batchmean"),
    "poisson": lambda o: F.poisson_nll_loss(o, SMALL),
    "gaussian": lambda o: F.gaussian_nll_loss(o[:, :1], targets(N, 1), o[:, 1:2].exp()),
    "hinge": lambda o: (1 - o.gather(1, Y[:, None]) + o).clamp(min=0).mean(),
    "sample weights": lambda o: (F.cross_entropy(o, Y, reduction="none") * targets(N).abs()).mean(),
    "per-sample square root": lambda o: o.square().sum(1).add(1).sqrt().mean(),
    "linear": lambda o: (o * targets(N, C)).sum(),
    "only some samples": lambda o: F.cross_entropy(o[1:3], Y[1:3]),
    "only one output": lambda o: o[:, 1].exp().sum(),
    "one number, shape [1]": lambda o: F.mse_loss(o, targets(N, C)).reshape(1),
}


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh], ids=["relu", "tanh"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, act: type[nn.Module]) -> None:
    model, x, loss = mlp(act), torch.randn(N, D), LOSSES[name]
    wanted = expected(model, lambda: model(x), loss)
    with hookjac.extend(model, *QUANTITIES):
        loss(model(x)).sum().backward()
    for key, p in trainable(model).items():
        close(p.grad_sample.sum(0), p.grad, (key, "sum"))
        for q in QUANTITIES:
            close(getattr(p, q), wanted[key][q], (key, q))


SEQUENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "classes last, flattened": lambda o: F.cross_entropy(o.reshape(-1, C), Y.repeat(2)),
    "classes second": lambda o: F.cross_entropy(o.transpose(1, 2), Y[:, None].expand(N, 2)),
    "padding": lambda o: F.cross_entropy(o.flatten(0, 1), torch.tensor([0, 1, -100, 2, 1, -100, 0, 2])),
    "time first": lambda o: F.cross_entropy(o.transpose(0, 1).reshape(-1, C), Y.repeat(2)),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_losses_of_sequences(name: str) -> None:
    model, x, loss = mlp(nn.Tanh), torch.randn(N, 2, D), SEQUENCES[name]
    wanted = expected(model, lambda: model(x), loss)
    with hookjac.extend(model, *QUANTITIES):
        loss(model(x)).backward()
    compare(model, wanted, QUANTITIES)


PENALTIES: dict[str, Callable[[nn.Module], Tensor]] = {
    "L2": lambda m: 0.3 * sum((p.square().sum() for p in m.parameters()), torch.zeros(())),
    "L2 of one layer, by norm": lambda m: 0.1 * m[0].weight.norm() ** 2,
    "L1": lambda m: 0.3 * sum((p.abs().sum() for p in m.parameters()), torch.zeros(())),
    "not diagonal": lambda m: m[2].weight.norm() + (m[2].weight.sum() * m[2].bias.sum()).sin(),
    "log barrier": lambda m: -(m[0].bias + 3).log().mean(),
    "same first axis as the batch": lambda m: m[2].weight.pow(4).mean(),
}


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh], ids=["relu", "tanh"])
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties(name: str, act: type[nn.Module]) -> None:
    model, x, penalty = mlp(act), torch.randn(N, D), PENALTIES[name]
    assert model[2].weight.shape[0] == N
    wanted = expected(model, lambda: model(x), lambda o: F.cross_entropy(o, Y), lambda: penalty(model))
    for road in ("auto", "columns", "features", "entries"):
        with hookjac.extend(model, "grad_sample", "ggn_diag", hookjac.HessDiag(road=road)):  # type: ignore[arg-type]
            (F.cross_entropy(model(x), Y) + penalty(model)).backward()
        compare(model, wanted, QUANTITIES)


def test_penalty_only_on_an_unused_parameter() -> None:
    model = Fn(lambda m, x: m.a(x), a=nn.Linear(D, C), spare=par(3))
    x = torch.randn(N, D)
    with hookjac.extend(model, *QUANTITIES) as ext:
        (F.cross_entropy(model(x), Y) + model.spare.pow(3).sum()).backward()
    close(model.spare.grad_sample.sum(0), model.spare.grad, "sum")
    close(model.spare.grad_sample[0], model.spare.grad / N, "shared equally")
    close(model.spare.hess_diag, 6 * model.spare.detach(), "hess_diag")
    close(model.spare.ggn_diag, 6 * model.spare.detach(), "ggn_diag")
    assert ext.explain().to_dict()["parameters"]["spare"]["road"] == "shared equally"


def both(m: Any, x: Tensor) -> dict[str, Tensor]:
    h = torch.tanh(m.a(x))
    return {"y": m.b(h), "aux": m.c(h), "hidden": h}


def check_joint(model: nn.Module, run: Callable[[], Tensor], joint: Callable[[Tensor], Tensor], **extend: Any) -> None:
    """`run` returns all outputs side by side; the loss of the block is joint(run()) spelled by the caller."""
    wanted = expected(model, run, joint)
    compare(model, wanted, extend.get("quantities", QUANTITIES))


def test_second_loss_on_another_output() -> None:
    model = Fn(both, a=nn.Linear(D, 4), b=nn.Linear(4, C), c=nn.Linear(4, 2))
    x = torch.randn(N, D)
    with hookjac.extend(model, *QUANTITIES, output="y"):
        out = model(x)
        (F.cross_entropy(out["y"], Y) + 0.3 * F.mse_loss(out["aux"], targets(N, 2))).backward()

    def run() -> Tensor:
        out = model(x)
        return torch.cat([out["y"], out["aux"]], 1)

    check_joint(model, run, lambda o: F.cross_entropy(o[:, :C], Y) + 0.3 * F.mse_loss(o[:, C:], targets(N, 2)))


def test_second_loss_on_an_output_above_the_first() -> None:
    """The hidden layer feeds the selected output and is penalised itself."""
    model = Fn(both, a=nn.Linear(D, 4), b=nn.Linear(4, C), c=nn.Linear(4, 2))
    x = torch.randn(N, D)
    with hookjac.extend(model, *QUANTITIES, output="y"):
        out = model(x)
        (F.cross_entropy(out["y"], Y) + out["hidden"].pow(4).mean()).backward()

    def run() -> Tensor:
        out = model(x)
        return torch.cat([out["y"], out["hidden"]], 1)

    check_joint(model, run, lambda o: F.cross_entropy(o[:, :C], Y) + o[:, C:].pow(4).mean())


@pytest.mark.parametrize("kind", ["layer output", "functional"])
def test_penalty_on_a_hidden_tensor(kind: str) -> None:
    """It never passes the model's output, and still belongs to the samples."""
    if kind == "functional":

        def forward(m: Any, x: Tensor) -> Tensor:
            m.h = [F.linear(x, m.w)]
            return F.linear(torch.tanh(m.h[0]), m.v)

        model = Fn(forward, w=par(4, D), v=par(C, 4))
        hidden = lambda: model.h[0]
        quantities = ("grad_sample", "hess_diag")
    else:
        model = Fn(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(D, 4), b=nn.Linear(4, C))
        kept: list[Tensor] = []
        model.a.register_forward_hook(lambda mod, args, out: kept.append(out))
        hidden = lambda: kept[-1]
        quantities = QUANTITIES
    x = torch.randn(N, D)
    with hookjac.extend(model, *quantities):
        (F.cross_entropy(model(x), Y) + hidden().pow(4).mean()).backward()
    for p in trainable(model).values():
        close(p.grad_sample.sum(0), p.grad, "sum")

    def run() -> Tensor:
        out = model(x)
        return torch.cat([out, hidden()], 1)

    check_joint(model, run, lambda o: F.cross_entropy(o[:, :C], Y) + o[:, C:].pow(4).mean(), quantities=quantities)


def test_two_calls_of_the_model_added_up() -> None:
    model, x1, x2 = mlp(nn.Tanh), torch.randn(N, D), torch.randn(N, D)
    with hookjac.extend(model, *QUANTITIES):
        (F.cross_entropy(model(x1), Y) + 0.5 * F.mse_loss(model(x2), targets(N, C))).backward()
    check_joint(model, lambda: torch.cat([model(x1), model(x2)], 1),
                lambda o: F.cross_entropy(o[:, :C], Y) + 0.5 * F.mse_loss(o[:, C:], targets(N, C)))  # fmt: skip


def test_loss_inside_the_model() -> None:
    model = Fn(lambda m, x, y: {"loss": F.cross_entropy(o := m.b(m.a(x).tanh()), y), "logits": o}, a=nn.Linear(D, 4),
               b=nn.Linear(4, C))  # fmt: skip
    x = torch.randn(N, D)
    wanted = expected(model, lambda: model(x, Y)["logits"], lambda o: F.cross_entropy(o, Y))
    with hookjac.extend(model, output="logits"):
        model(x, Y)["loss"].backward()
    compare(model, wanted, ("grad_sample", "jac", "hess_diag"))


def test_parameter_in_the_loss() -> None:
    """A temperature outside the forward: per-sample and Hessian are right, GGN has no meaning and says so."""
    model = Fn(lambda m, x: m.a(x), a=nn.Linear(D, C), T=nn.Parameter(torch.tensor(1.3)))
    x = torch.randn(N, D)
    with hookjac.extend(model, "grad_sample", "hess_diag"):
        F.cross_entropy(model(x) / model.T, Y).backward()
    per_sample = F.cross_entropy(model(x) / model.T, Y, reduction="none") / N
    wanted = torch.stack([grad(entry, model.T).detach() for entry in per_sample])
    close(model.T.grad_sample, wanted, "grad_sample of the temperature")
    close(model.T.hess_diag, hessian_diagonal(per_sample.sum(), model.T), "hess_diag of the temperature")
    close(model.a.weight.hess_diag, hessian_diagonal(per_sample.sum(), model.a.weight), "hess_diag of the weight")
    with (
        pytest.raises(hookjac.HookjacError, match="ggn_diag: the loss depends on parameter 'T'"),
        hookjac.extend(model, "ggn_diag"),
    ):
        F.cross_entropy(model(x) / model.T, Y).backward()


def test_input_derivatives_in_the_loss() -> None:
    """As in physics-informed nets: the loss holds du/dx, a gradient taken inside the block."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(N, 2, requires_grad=True)

    def residuals() -> Tensor:
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope[:, 0] - u[:, 0]).square() + slope[:, 1].sin()

    with hookjac.extend(model, "grad_sample", "hess_diag"):
        residuals().mean().backward()
    for key, p in trainable(model).items():
        wanted = torch.stack([grad(entry, p).detach() for entry in residuals() / N])
        close(p.grad_sample, wanted, (key, "grad_sample"))
        close(p.hess_diag, hessian_diagonal(residuals().mean(), p), (key, "hess_diag"))


def side_head(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    m.kept = m.c(x) if hasattr(m, "c") else F.linear(x, m.w)  # never returned, never below what is
    return m.b(h)


def test_side_head_that_is_never_returned() -> None:
    """A layer's output is met on the way down, so the samples are known there."""
    model, x = Fn(side_head, a=nn.Linear(D, 4), b=nn.Linear(4, C), c=nn.Linear(D, 2)), torch.randn(N, D)
    with hookjac.extend(model, *QUANTITIES):
        (F.cross_entropy(model(x), Y) + model.kept.pow(4).mean()).backward()
    check_joint(model, lambda: torch.cat([model(x), model.kept], 1),
                lambda o: F.cross_entropy(o[:, :C], Y) + o[:, C:].pow(4).mean())  # fmt: skip


@pytest.mark.parametrize("needs_grad", [False, True])
def test_functional_side_head_is_refused(needs_grad: bool) -> None:
    """Without a layer it looks like a penalty on a parameter; sharing it equally would be silently wrong."""
    model, x = Fn(side_head, a=nn.Linear(D, 4), b=nn.Linear(4, C), w=par(2, D)), torch.randn(N, D)
    x.requires_grad_(needs_grad)
    with pytest.raises(hookjac.HookjacError, match="reaches parameter 'w' past the model's outputs"):
        with hookjac.extend(model, "grad_sample"):
            (F.cross_entropy(model(x), Y) + model.kept.pow(4).mean()).backward()


@pytest.mark.parametrize(
    "meets",
    [
        lambda w, x: (x.sin() @ w.T).square().sum(),
        lambda w, x: (w.sum() + x).sin().sum(),
        lambda w, x: (w[0] * (x * 2)).sum(),
        lambda w, x: (w.sum() * x.mean(1)).exp().mean(),
    ],
)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_data_that_meet_a_parameter_in_the_loss_are_refused(meets: Any, needs_grad: bool) -> None:
    model, x = nn.Linear(D, C), torch.randn(N, D, requires_grad=needs_grad)
    with pytest.raises(hookjac.HookjacError, match="reaches parameter 'weight' past the model's outputs"):
        with hookjac.extend(model, "grad_sample"):
            (F.cross_entropy(model(x), Y) + meets(model.weight, x)).backward()


def test_data_beside_a_penalty() -> None:
    """They meet in a sum: it is a penalty none the less. A prior that is learned by others is no data."""
    model, x, prior = nn.Linear(D, C), torch.randn(N, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    penalty = lambda: (model.weight - prior).pow(4).sum() + model.bias.cos().sum()
    wanted = expected(model, lambda: model(x), lambda o: F.cross_entropy(o, Y), penalty)
    with hookjac.extend(model, *QUANTITIES):
        (F.cross_entropy(model(x), Y) + 0.5 * (x.tanh().exp().mean() + 2 * penalty())).backward()
    compare(model, wanted, QUANTITIES)


def test_penalty_that_remembers_old_weights() -> None:
    """Elastic weight consolidation: constants of the parameter's shape, whose first axis is as long as the batch."""
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    fisher, old = targets(N, 6).abs(), targets(N, 6)
    penalty = lambda: (fisher * (model[2].weight - old) ** 2).sum()
    assert model[2].weight.shape == fisher.shape
    wanted = expected(model, lambda: model(x), lambda o: F.cross_entropy(o, Y), penalty)
    with hookjac.extend(model, *QUANTITIES):
        (F.cross_entropy(model(x), Y) + penalty()).backward()
    compare(model, wanted, QUANTITIES)


@pytest.mark.parametrize("way", ["backward", "function", "list", "grad", "cotangent", "inputs", "grad of one"])
def test_every_way_to_start_a_backward(way: str) -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    seed = targets(N, C)
    loss_of = (lambda o: (o * seed).sum()) if way == "cotangent" else (lambda o: F.cross_entropy(o, Y))
    wanted = expected(model, lambda: model(x), loss_of)
    served = set(trainable(model))
    with hookjac.extend(model, *QUANTITIES):
        if way == "backward":
            F.cross_entropy(model(x), Y).backward()
        elif way == "function":
            torch.autograd.backward(F.cross_entropy(model(x), Y))
        elif way == "list":
            losses = F.cross_entropy(model(x), Y, reduction="none") / N
            torch.autograd.backward([losses[0], losses[1:].sum()])
        elif way == "grad":
            found = torch.autograd.grad(F.cross_entropy(model(x), Y), list(model.parameters()))
            assert len(found) == len(served)
        elif way == "cotangent":
            model(x).backward(gradient=seed)
        elif way == "inputs":
            served = {"0.weight", "2.bias"}
            F.cross_entropy(model(x), Y).backward(inputs=[model[0].weight, model[2].bias])
        else:
            served = {"2.weight"}
            torch.autograd.grad(F.cross_entropy(model(x), Y), model[2].weight)
    for key, p in trainable(model).items():
        for q in QUANTITIES:
            assert hasattr(p, q) == (key in served)
            if key in served:
                close(getattr(p, q), wanted[key][q], (key, q))


def test_loss_reduction_mean() -> None:
    model, x = mlp(nn.ReLU), torch.randn(N, D)
    wanted = expected(model, lambda: model(x), lambda o: F.cross_entropy(o, Y))
    with hookjac.extend(model, hookjac.GradSample(loss_reduction="mean")):
        F.cross_entropy(model(x), Y).backward()
    for key, p in trainable(model).items():
        close(p.grad_sample, wanted[key]["grad_sample"] * N, key)


def test_row_sums_are_not_the_diagonal() -> None:
    """The recipe `grad(grad(L), p, ones)` is far off; ours is not."""
    torch.manual_seed(0)
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    loss = F.cross_entropy(model(x), Y)
    weight = model[0].weight
    sums = grad(grad(loss, weight), weight, torch.ones_like(weight))
    with hookjac.extend(model, "hess_diag"):
        F.cross_entropy(model(x), Y).backward()
    close(weight.hess_diag, hessian_diagonal(loss, weight), "diagonal")
    assert (sums - weight.hess_diag).norm() / weight.hess_diag.norm() > 0.5
    assert math.isfinite(sums.norm().item())


def test_custom_loss_function_without_second_derivative() -> None:
    """First order works and warns that the check for mixing samples was not possible; curvature is refused."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.pow(3).sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 3 * x.square() * g

    model, x = nn.Linear(D, C), torch.randn(N, D)
    with pytest.warns(UserWarning, match="could not check"), hookjac.extend(model, "grad_sample"):
        Once.apply(model(x)).backward()
    close(model.weight.grad_sample.sum(0), model.weight.grad, "sum")
    with (
        pytest.raises(hookjac.HookjacError, match="cannot be differentiated twice"),
        pytest.warns(match="could not check"),
    ):
        with hookjac.extend(model, "ggn_diag"):
            Once.apply(model(x)).backward()
