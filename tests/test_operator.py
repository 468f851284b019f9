"""Products with curvature against the matrices themselves, built by loops."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, random_loss
from oracle import close, grad, trainable
from scipy.sparse.linalg import cg
from test_quantities import MODELS
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from hookjac import HookjacError, extend


def matrices(model: nn.Module, x: Tensor, penalty: Callable[[Any], Tensor] | None) -> tuple[Tensor, Tensor]:
    """GGN and Hessian over all parameters."""
    params = list(trainable(model).values())

    def flat(t: Tensor) -> Tensor:
        return torch.cat([grad(t, p).reshape(-1) for p in params])

    with sdpa_kernel(SDPBackend.MATH):
        output = model(x)
    J = torch.stack([flat(o).detach() for o in output.reshape(-1)])
    free = output.detach().requires_grad_()
    slope = grad(random_loss(free), free).reshape(-1)
    H = torch.stack([grad(s, free).detach().reshape(-1) for s in slope])
    extra = torch.zeros(len(J[0]), len(J[0]))
    if penalty is not None:
        extra = torch.stack([flat(g).detach() for g in flat(penalty(model))])
    return J.T @ H @ J + extra, torch.stack([flat(g).detach() for g in flat(random_loss(output))]) + extra


@pytest.mark.parametrize("name", MODELS)
def test_products(name: str) -> None:
    case = MODELS[name]
    model, x = case.build(), case.inputs()
    G, H = matrices(model, x, case.penalty)
    with extend(model, "ggn_mp", "hess_mp") as ext:
        (random_loss(model(x)) + (case.penalty(model) if case.penalty else 0.0)).backward()
        inside = ext.ggn @ torch.ones(len(G))
    close(inside, G.sum(1), "inside the block")
    assert ext.ggn.shape == ext.hessian.shape == tuple(G.shape)
    one, many = torch.randn(len(G)), torch.randn(len(G), 3)
    for operator, M in ((ext.ggn, G), (ext.hessian, H)):
        close(operator @ one, M @ one, name)
        close(operator @ many, M @ many, name)
    start = 0
    for key, p in trainable(model).items():
        here = slice(start, start := start + p.numel())
        v = torch.randn(2, *p.shape)
        close(p.ggn_mp(v).reshape(2, -1), v.reshape(2, -1) @ G[here, here], key)
        close(p.hess_mp(v).reshape(2, -1), v.reshape(2, -1) @ H[here, here], key)
        close(p.hess_mp(v[0]), p.hess_mp(v)[0], key)
        assert not p.hess_mp(v).requires_grad


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))


def test_a_solver_of_somebody_elses() -> None:
    model, x, y = mlp(), torch.randn(N, D), torch.tensor([0, 1, 2, 1])
    with extend(model, "ggn_mp") as ext:
        (F.cross_entropy(model(x), y) + sum(p.square().sum() for p in model.parameters())).backward()
    b = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    operator = ext.ggn.to_scipy()
    found, failed = cg(operator, b.numpy(), rtol=1e-12)
    assert not failed
    close(ext.ggn @ torch.as_tensor(found), b, "solution", 1e-9)


def test_penalties_alone() -> None:
    model = mlp()
    with extend(model, "ggn_mp", "hess_mp") as ext:
        (model(torch.randn(N, D)).sum() + sum(p.pow(3).sum() for p in model.parameters())).backward()
    p = torch.cat([q.detach().reshape(-1) for q in model.parameters()])
    v = torch.randn(len(p))
    close(ext.ggn @ v, 6 * p * v, "ggn")


def test_a_parameter_that_is_not_reached() -> None:
    model = Fn(lambda m, x: m.a(x), a=nn.Linear(D, C), b=nn.Linear(D, C))
    with extend(model, "hess_mp", "ggn_mp"):
        random_loss(model(torch.randn(N, D))).backward()
    v = torch.randn(2, C, D)
    assert not model.b.weight.hess_mp(v).any()
    assert not model.b.weight.ggn_mp(v).any()
    assert model.a.weight.ggn_mp(v).any()


def test_after_a_step_the_graph_is_stale() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with extend(model, "hess_mp") as ext:
        random_loss(model(torch.randn(N, D))).backward()
    optimizer.step()
    with pytest.raises(HookjacError, match="Take products before the optimizer's step"):
        ext.hessian @ torch.ones(ext.hessian.shape[0])


def test_hooks_of_the_user_are_not_called_again() -> None:
    model, calls = mlp(), []
    model[0].weight.register_hook(calls.append)
    x = torch.randn(N, D)
    _, H = matrices(model, x, None)
    calls.clear()
    with extend(model, "hess_mp") as ext:
        random_loss(model(x)).backward()
    assert len(calls) == 1
    close(ext.hessian @ torch.ones(len(H)), H.sum(1), "sum")
    assert len(calls) == 1


def test_products_inside_another_block() -> None:
    """They are no backward of that block: its results stay, before and after its own."""
    model, x = MODELS["MLP"].build(), MODELS["MLP"].inputs()
    with extend(model, "hess_mp", "ggn_mp") as ext:
        random_loss(model(x)).backward()
    v = torch.randn(ext.hessian.shape[1], 2)
    wanted = ext.hessian @ v, ext.ggn @ v
    calls: list[int] = []
    with extend(model, "ggn_diag", after=lambda params: calls.append(1)):
        loss = random_loss(model(x))
        for k in range(2):
            close(ext.hessian @ v, wanted[0], "hessian")
            close(ext.ggn @ v[:, 0], wanted[1][:, 0], "ggn")
            assert len(calls) == k
            if k == 0:
                loss.backward()
                found = [p.ggn_diag for p in model.parameters()]
        assert all(p.ggn_diag is t for p, t in zip(model.parameters(), found, strict=True))


def test_what_was_not_asked_for() -> None:
    model = mlp()
    with extend(model, "ggn_mp") as ext:
        with pytest.raises(HookjacError, match=r"ext\.ggn: there was no backward in this block yet"):
            _ = ext.ggn
        random_loss(model(torch.randn(N, D))).backward()
        with pytest.raises(HookjacError, match=r"ext\.hessian: 'hess_mp' was not asked for"):
            _ = ext.hessian
    with pytest.raises(ValueError, match=r"expected a vector \[39\] or vectors \[39, K\], got \(5,\)"):
        ext.ggn @ torch.ones(5)
    with pytest.raises(ValueError, match=r"p = \(4, 5\), got \(5, 4\)"):
        model[0].weight.ggn_mp(torch.ones(5, 4))


def test_checkpoints() -> None:
    parts = {"a": nn.Linear(D, 4), "b": nn.Linear(4, C)}
    x, plain = torch.randn(N, D), Fn(lambda m, x: m.b(m.a(x).tanh()), **parts)
    G, H = matrices(plain, x, None)
    model = Fn(lambda m, x: checkpoint(lambda x: m.b(m.a(x).tanh()), x, use_reentrant=False), **parts)
    with extend(model, "ggn_mp", "hess_mp") as ext:
        random_loss(model(x)).backward()
    v = torch.randn(len(G))
    close(ext.ggn @ v, G @ v, "ggn")
    close(ext.hessian @ v, H @ v, "hessian")
    model = Fn(lambda m, x: checkpoint(lambda x: m.b(x.tanh()), m.a(x), use_reentrant=True), **parts)
    with pytest.raises(HookjacError, match="use_reentrant=False"), extend(model, "hess_mp"):
        random_loss(model(x)).backward()


def test_a_solver_of_linear_operators() -> None:
    """Damped Gauss-Newton by conjugate gradients, and least squares through the Jacobian's transpose."""
    from linear_operator.operators import DiagLinearOperator
    from linear_operator.settings import cg_tolerance, max_cholesky_size

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with extend(model, "ggn_mp", "hess_mp", "jac") as ext:
        model(torch.randn(6, 4)).square().sum().backward()
    P = ext.ggn.shape[0]
    v, eye = torch.randn(P, 2), torch.eye(P)
    for operator in (ext.ggn, ext.hessian):
        wrapped = operator.as_linear_operator()
        assert (wrapped.shape, wrapped.dtype) == (torch.Size([P, P]), torch.float64)
        close(wrapped.to_dense(), operator @ eye, "dense")
        close(wrapped.mT @ v, operator @ v, "transposed")
    with max_cholesky_size(1), cg_tolerance(1e-12):
        damped = ext.ggn.as_linear_operator() + DiagLinearOperator(torch.full((P,), 2.0))
        close(damped.solve(v), torch.linalg.solve(ext.ggn @ eye + 2 * eye, v), "solved", 1e-5)  # as far as its CG goes
    J = ext.jacobian.as_linear_operator()
    dense = ext.jacobian.to_dense()
    close(J.to_dense(), dense, "Jacobian")
    close(J @ v, dense @ v, "J v")
    u = torch.randn(12, 3, requires_grad=True)
    close(J.mT @ u, dense.T @ u, "u J")
    (J.mT @ u).square().sum().backward()
    assert u.grad is not None
    close(u.grad, 2 * dense @ (dense.T @ u.detach()), "gradient through the product")


def test_parameters_of_every_shape_and_no_vectors() -> None:
    model = Fn(lambda m, x: torch.tanh(m.a(x)) * m.s, a=nn.Linear(D, C), s=nn.Parameter(torch.tensor(0.7)))
    x = torch.randn(N, D)
    with extend(model, "hess_mp", "ggn_mp") as ext:
        random_loss(model(x)).backward()
    P = ext.hessian.shape[0]
    for operator in (ext.hessian, ext.ggn):
        close(operator @ torch.eye(P), (operator @ torch.eye(P)).T, "symmetric")
        assert (operator @ torch.zeros(P, 0)).shape == (P, 0)
        assert f"{P} parameters" in repr(operator)
        with pytest.raises(TypeError, match="expected a tensor"):
            operator @ [1.0] * P
    assert model.a.weight.hess_mp(torch.zeros(0, C, D)).shape == (0, C, D)
    with pytest.raises(ValueError, match="expected vectors of shape"):
        model.a.weight.ggn_mp(torch.ones(D, C))


def test_an_empty_batch() -> None:
    model = nn.Linear(D, C)
    with extend(model, "hess_mp", "ggn_mp") as ext:
        model(torch.randn(0, D)).square().sum().backward()
    v = torch.randn(ext.hessian.shape[0])
    assert not (ext.hessian @ v).any()
    assert not (ext.ggn @ v).any()


def test_a_model_with_products_can_be_saved() -> None:
    model = nn.Linear(D, C)
    with extend(model, "hess_mp"):
        random_loss(model(torch.randn(N, D))).backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again.weight, model.weight)
    with pytest.raises(HookjacError, match=r"products with the hessian block of 'weight' .* needed the graph"):
        again.weight.hess_mp(torch.ones(C, D))


def test_products_live_as_long_as_they_are_held() -> None:
    """Those of an earlier backward, too; and where the model was a wrapping of the moment."""
    layer, x, v = nn.Linear(D, C), torch.randn(N, D), torch.randn(C, D)

    def run() -> Tensor:
        model = nn.Sequential(layer, nn.Tanh())
        with extend(model, "ggn_mp") as ext:
            model(x).pow(4).sum().backward()
        return (ext.ggn @ torch.cat([v.reshape(-1), torch.zeros(C)]))[: v.numel()].view_as(v)

    first, early = run(), layer.weight.ggn_mp  # type: ignore[attr-defined]
    x = x * 2
    second = run()
    gc.collect()
    close(early(v), first, "the first backward's")
    close(layer.weight.ggn_mp(v), second, "the second's")  # type: ignore[attr-defined]
    assert not torch.equal(first, second)


def test_products_without_their_layer() -> None:
    layer = nn.Linear(D, C)
    with extend(layer, "hess_mp"):
        layer(torch.randn(N, D)).pow(2).sum().backward()
    weight = layer.weight
    del layer
    with pytest.raises(HookjacError, match=r"need their layer, which nobody holds any more\. Keep the model"):
        weight.hess_mp(torch.zeros(C, D))  # type: ignore[attr-defined]


def test_products_of_a_parameter_that_lies_in_no_layer() -> None:
    """Nobody but the parameter can keep its graph."""

    class Listing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loose = [nn.Parameter(torch.randn(D, C))]

        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            yield "loose", self.loose[0]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.loose[0]

    model, x, v = Listing(), torch.randn(N, D), torch.randn(D, C)
    with extend(model, "hess_mp"):
        model(x).square().sum().backward()
    gc.collect()
    close(model.loose[0].hess_mp(v), 2 * x.T @ x @ v, "loose")  # type: ignore[attr-defined]
