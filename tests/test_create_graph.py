"""Results that carry a graph: derivatives of Jacobians and per-sample gradients, against plain double backward."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import C, D, Fn, N, par
from oracle import RTOL, trainable
from test_quantities import MODELS, Model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hookjac
from hookjac import HookjacError
from hookjac.testing import twice_differentiable

MORE = {
    "norms": Model(lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Flatten(), nn.LayerNorm(8),
                                         nn.Softplus(), nn.Linear(8, C)), (2, 3)),
    "norm by autograd's node": Model(
        lambda: Fn(lambda m, x: m.b(torch.relu(m.n(torch.mul(*m.a(x).chunk(2, -1)))).square()), a=nn.Linear(D, 8),
                   n=Plain(4), b=nn.Linear(4, C))),
    "identity": Model(lambda: eye(nn.Sequential(nn.Linear(D, C), nn.Tanh(), nn.Linear(C, C)))),
    "scale": Model(lambda: Fn(lambda m, x: m.b(torch.tanh(m.a(x)) * m.s) / m.t, a=nn.Linear(D, 4), s=par(4), t=par(C),
                              b=nn.Linear(4, C))),
    "bilinear": Model(lambda: Fn(lambda m, x: m.b(torch.tanh(m.a(x)), x), a=nn.Linear(D, 3), b=nn.Bilinear(3, D, C))),
    "transposed": Model(lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, C)),
                        (2, 3)),
    "prelu": Model(lambda: nn.Sequential(nn.Linear(D, 4), nn.PReLU(4), nn.Linear(4, C))),
    "masked": Model(lambda: Fn(lambda m, x: m.b(torch.tanh(m.a(x))) * m.g.prod(), a=nn.Linear(D, 3), b=nn.Linear(3, C),
                               g=par(3))),
    "checkpoint": Model(lambda: Fn(lambda m, x: m.b(checkpoint(lambda h: torch.tanh(m.a(h)), x, use_reentrant=False)),
                                   a=nn.Linear(D, 4), b=nn.Linear(4, C))),
    "gru": Model(lambda: Fn(lambda m, x: m.o(m.r(x)[0][:, -1]), r=nn.GRU(2, 3, batch_first=True), o=nn.Linear(3, C)),
                 (3, 2)),
    "weight norm": Model(lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(D, 4)), nn.Tanh(),
                                               nn.Linear(4, C))),
}  # fmt: skip
ALL = {**{k: v for k, v in MODELS.items() if v.penalty is None}, **MORE}


class Plain(nn.Module):
    """A LayerNorm whose weights are made by something else, so that masked columns serve it."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.w, self.d = par(d), d

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (self.d,), self.w.exp(), self.w.sin())


def eye(net: nn.Sequential) -> nn.Sequential:
    """The upper weight is an identity by value, and has derivatives none the less."""
    with torch.no_grad():
        torch.nn.init.eye_(net[2].weight)
    return net


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(4)
    model = ALL[name].build().double()
    x = ALL[name].inputs()
    return model, x.double().requires_grad_() if x.is_floating_point() else x


def differentiable_jacobian(out: Tensor, p: Tensor) -> Tensor:  # [N, C, *p]
    rows = [torch.autograd.grad(o, p, create_graph=True, allow_unused=True, materialize_grads=True)[0]
            for o in out.reshape(-1)]  # fmt: skip
    return torch.stack(rows).reshape(*out.shape, *p.shape)


def slopes(value: Tensor, model: nn.Module, x: Tensor) -> list[Tensor]:
    into = [*model.parameters(), *([x] if x.requires_grad else [])]
    return list(torch.autograd.grad(value, into, allow_unused=True, materialize_grads=True, retain_graph=True))


def weights(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


def loss_of(out: Tensor) -> Tensor:
    return (out.sin() * weights(out, 1) + out.square()).mean()


def agree(found: list[Tensor], wanted: list[Tensor], what: str) -> None:
    top = max(t.abs().max().item() for t in wanted)
    assert top > 1e-6, f"{what}: this test compares nothing"
    for k, (f, w) in enumerate(zip(found, wanted, strict=True)):
        error = (f - w).abs().max().item()
        assert error <= 10 * RTOL * top, f"{what}, tensor {k}: off by {error:.1e} of {top:.1e}"


OF_ROWS: dict[str, tuple[Callable[[Any], Tensor], Callable[[Tensor], Tensor]]] = {
    "dense": (lambda j: (j * weights(j, 2)).square().sum(), lambda j: (j * weights(j, 2)).square().sum()),
    "gram": (lambda j: j.gram().square().sum(),
             lambda j: torch.einsum("ncp,mdp->ncmd", *[j.flatten(2)] * 2).square().sum()),
    "norms": (lambda j: j.norms().sin().sum(), lambda j: j.flatten(2).norm(dim=2).sin().sum()),
    "squares": (lambda j: j.sq_sum().sin().sum(), lambda j: j.square().sum((0, 1)).sin().sum()),
    "times": (lambda j: j.times(weights(j[0, 0], 3)).square().sum(),
              lambda j: (j * weights(j[0, 0], 3)).flatten(2).sum(2).square().sum()),
    "back": (lambda j: j.back(weights(j[..., 0] if j.dim() == 3 else j.flatten(2)[..., 0], 3)).square().sum(),
             lambda j: torch.einsum("nc,nc...->...", weights(j.flatten(2)[..., 0], 3), j).square().sum()),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_functions_of_the_jacobian(name: str) -> None:
    model, x = build(name)
    with twice_differentiable():
        out = model(x)
        plain = {k: differentiable_jacobian(out, p) for k, p in trainable(model).items()}
        wanted = {k: slopes(sum(f(j) for j in plain.values()), model, x) for k, (_, f) in OF_ROWS.items()}  # type: ignore
    with hookjac.extend(model, "jac", "ntk", create_graph=True) as ext:
        loss_of(model(x)).backward()
    for kind, (f, _) in OF_ROWS.items():
        value = sum(f(p.jac) for p in trainable(model).values())  # type: ignore[attr-defined]
        agree(slopes(value, model, x), wanted[kind], f"{name} {kind}")  # type: ignore[arg-type]
    kernel = sum((p.ntk**2).sum() for p in trainable(model).values())  # type: ignore[attr-defined]
    agree(slopes(kernel, model, x), wanted["gram"], f"{name} ntk")  # type: ignore[arg-type]
    J = torch.cat([j.reshape(N * C, -1) for j in plain.values()], 1)
    v = weights(J[0], 5)
    agree(slopes((ext.jacobian @ v).sin().sum(), model, x), slopes((J @ v).sin().sum(), model, x), "operator")
    trace = torch.einsum("ncp,mcp->nm", *[J.reshape(N, C, -1)] * 2)
    agree(slopes(ext.jacobian.gram(kind="trace").square().sum(), model, x), slopes((trace**2).sum(), model, x), "trace")


@pytest.mark.parametrize("name", ALL)
def test_functions_of_the_gradients(name: str) -> None:
    model, x = build(name)
    with twice_differentiable():
        out = model(x)
        each = [(out[n].sin() * weights(out, 1)[n] + out[n].square()).sum() / out.numel() for n in range(N)]
        wanted = {}
        for k, p in trainable(model).items():
            wanted[k] = torch.stack([torch.autograd.grad(e, p, create_graph=True, allow_unused=True,
                                                         materialize_grads=True)[0] for e in each])  # fmt: skip
        made: dict[str, Callable[[Tensor], Tensor]] = {
            "grad_sample": lambda g: (g * weights(g, 2)).sin().sum(),
            "grad_sample_norm": lambda g: g.flatten(1).norm(dim=1).sin().sum(),
            "grad_sq_sum": lambda g: g.square().sum(0).sin().sum(),
            "grad_sample_gram": lambda g: (g.flatten(1) @ g.flatten(1).T).square().sum(),
        }
        plain = {q: slopes(sum(f(g) for g in wanted.values()), model, x) for q, f in made.items()}  # type: ignore
    with hookjac.extend(model, *plain, create_graph=True):
        loss_of(model(x)).backward()
    takes: dict[str, Callable[[Tensor], Tensor]] = {
        "grad_sample": lambda g: (g * weights(g, 2)).sin().sum(),
        "grad_sample_norm": lambda g: g.sin().sum(),
        "grad_sq_sum": lambda g: g.sin().sum(),
        "grad_sample_gram": lambda g: g.square().sum(),
    }
    for q, f in takes.items():
        value = sum(f(getattr(p, q)) for p in trainable(model).values())
        agree(slopes(value, model, x), plain[q], f"{name} {q}")  # type: ignore[arg-type]


def test_a_penalty_on_the_jacobian_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C))
    x = torch.randn(N, D)
    optimizer, sizes = torch.optim.SGD(model.parameters(), 0.05), []
    for _ in range(30):
        optimizer.zero_grad()
        with hookjac.extend(model, "jac", create_graph=True):
            (0 * model(x)).sum().backward()
        size = torch.stack([p.jac.sq_sum().sum() for p in model.parameters()]).sum()  # type: ignore[attr-defined]
        size.backward()
        optimizer.step()
        sizes.append(size.item())
    assert sizes[-1] < 0.75 * sizes[0]


def test_without_it_results_carry_no_graph() -> None:
    model, x = build("MLP")
    for create_graph in (False, True):
        with hookjac.extend(model, "jac", "grad_sample", create_graph=create_graph):
            loss_of(model(x)).backward()
        for p in trainable(model).values():
            assert p.jac.requires_grad is create_graph or p is model[4].bias  # type: ignore[index, attr-defined]
            assert p.grad_sample.requires_grad is create_graph  # type: ignore[attr-defined]
            assert not p.jac.detach().requires_grad  # type: ignore[attr-defined]
            assert not p.jac.detach().gram().requires_grad  # type: ignore[attr-defined]


def test_a_gradient_of_zero_has_a_norm_without_slope() -> None:
    model, x = nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, C)).double(), torch.randn(N, D).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # dead
    with hookjac.extend(model, "grad_sample_norm", create_graph=True):
        model(x).square().sum().backward()
    norms = model[0].weight.grad_sample_norm
    assert norms.eq(0).all()
    assert torch.autograd.grad(norms.sum(), model[0].weight, allow_unused=True, materialize_grads=True)[0].eq(0).all()


def test_refusals() -> None:
    model, x = build("MLP")
    with pytest.raises(ValueError, match=r"create_graph=True serves .*'hess_diag'"):
        hookjac.extend(model, create_graph=True)

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * g

    once = Fn(lambda m, x: m.b(Once.apply(m.a(x))), a=nn.Linear(D, 4), b=nn.Linear(4, C)).double()
    with pytest.raises(HookjacError, match="once_differentiable"), hookjac.extend(once, "jac", create_graph=True):
        loss_of(once(x)).backward()
    reentrant = Fn(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=True)), a=nn.Linear(D, 4), b=nn.Linear(4, C))
    with (
        pytest.raises(HookjacError, match="use_reentrant=False"),
        hookjac.extend(reentrant.double(), "jac", create_graph=True),
    ):
        loss_of(reentrant(x)).backward()


def test_the_second_backward_belongs_after_the_block() -> None:
    model, x = build("MLP")
    with hookjac.extend(model, "jac", create_graph=True):
        loss_of(model(x)).backward()
        penalty = sum(p.jac.sq_sum().sum() for p in model.parameters())  # type: ignore[attr-defined]
        with pytest.raises(HookjacError, match="is backpropagated after the block"):
            penalty.backward()  # type: ignore[union-attr]
    penalty.backward()  # type: ignore[union-attr]


def test_results_that_were_deleted_are_freed() -> None:
    model, x = build("MLP")
    with hookjac.extend(model, "jac", "grad_sample", create_graph=True):
        loss_of(model(x)).backward()
    alive = weakref.ref(model[0].weight)  # type: ignore[index]
    for p in model.parameters():
        del p.jac, p.grad_sample  # type: ignore[attr-defined]
    del model, p
    gc.collect()
    assert alive() is None


def test_a_step_replaces_the_graph_of_the_last() -> None:
    model, x = build("MLP")
    alive = []
    for _ in range(5):
        with hookjac.extend(model, "jac", "grad_sample", create_graph=True):
            loss_of(model(x)).backward()
        gc.collect()
        alive.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    assert alive[1] == alive[-1]
