"""Approximations that go by a name: their own definition exactly, and how far that is from the Hessian's diagonal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N
from oracle import close, grad, trainable
from torch import Tensor, nn

import hookjac
from hookjac import HookjacError, Hutchinson


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, C))


def hessian(loss: Tensor, params: list[nn.Parameter]) -> Tensor:  # [P, P], of all parameters
    first = torch.cat([grad(loss, p).reshape(-1) for p in params])
    return torch.stack([torch.cat([grad(g, p).reshape(-1) for p in params]) for g in first]).detach()


def flat(model: nn.Module, q: str) -> Tensor:
    return torch.cat([getattr(p, q).reshape(-1) for p in trainable(model).values()])


@pytest.mark.parametrize("samples", [1, 3])
def test_hutchinson_is_unbiased_with_the_noise_it_says(samples: int) -> None:
    model, x, y = net(), torch.randn(N, D), torch.randint(C, (N,))
    loss = F.cross_entropy(model(x), y) + 0.1 * model[0].weight.square().sum()
    H = hessian(loss, list(model.parameters()))
    off = H - torch.diag(H.diagonal())
    noise = (off.square().sum(1) / samples).sqrt()  # root mean square of each entry's error
    generator, found = torch.Generator().manual_seed(4), []
    draws = 1500
    for _ in range(draws):
        with hookjac.extend(model, Hutchinson(samples=samples, generator=generator)):
            (F.cross_entropy(model(x), y) + 0.1 * model[0].weight.square().sum()).backward()
        found.append(flat(model, "hutchinson"))
    errors = torch.stack(found) - H.diagonal()
    bars = 5 * noise / draws**0.5 + 1e-12
    assert (errors.mean(0).abs() <= bars).all()
    assert errors.mean(0).abs().max() > 0.01 * bars.max()
    spread = errors.square().mean(0).sqrt()
    assert torch.allclose(spread, noise, rtol=0.15, atol=1e-12)
    with torch.no_grad():
        assert (noise > H.diagonal().abs()).any(), "the noise should drown some entries: that is what the docs say"


def test_hutchinson_repeats_with_its_generator() -> None:
    model, x = net(), torch.randn(N, D)

    def once(seed: int) -> Tensor:
        with hookjac.extend(model, Hutchinson(generator=torch.Generator().manual_seed(seed))):
            model(x).square().sum().backward()
        return flat(model, "hutchinson")

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))


def recursion(model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """HesScale as its authors write it, layer by layer, sample by sample."""
    found = {k: torch.zeros_like(p) for k, p in model.named_parameters()}
    for n in range(len(x)):
        inputs = [x[n : n + 1]]
        for layer in model:
            inputs.append(layer(inputs[-1]))
        loss = F.cross_entropy(inputs[-1], y[n : n + 1]) / len(x)
        slopes = torch.autograd.grad(loss, inputs[1:], create_graph=True)
        h = torch.stack([grad(slopes[-1][0, c], inputs[-1])[0, c] for c in range(C)])
        for k in reversed(range(len(model))):
            layer, a = model[k], inputs[k][0]
            if isinstance(layer, nn.Linear):
                found[f"{k}.bias"] += h
                found[f"{k}.weight"] += torch.outer(h, a.square())
                h = layer.weight.square().T @ h
            else:
                at = a.detach().requires_grad_()
                first = grad(layer(at).sum(), at)
                second = grad(first.sum(), at)
                h = first.square() * h + second * slopes[k][0]
    return {k: t.detach() for k, t in found.items()}


def test_hesscale_is_its_recursion() -> None:
    model, x, y = net(), torch.randn(N, D), torch.randint(C, (N,))
    with hookjac.extend(model, "hesscale", "hess_diag", "ggn_diag", "grad_sample"):
        F.cross_entropy(model(x), y).backward()
    for k, wanted in recursion(model, x, y).items():
        p = model.get_parameter(k)
        close(p.hesscale, wanted, k)  # type: ignore[attr-defined]
        if k.startswith("4."):
            close(p.hesscale, p.hess_diag, k)  # type: ignore[attr-defined]
        else:
            assert (p.hesscale - p.hess_diag).abs().max() > 1e-3 * p.hess_diag.abs().max()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Fn(lambda m, x: m.b(torch.tanh(m.a(x)) * x[:, :3]), a=nn.Linear(D, 3), b=nn.Linear(3, C)),
        lambda: Fn(lambda m, x: m.b(torch.tanh(m.a(x)).sin()), a=nn.Linear(D, 3), b=nn.Linear(3, C)),
        lambda: Fn(lambda m, x: F.linear(torch.tanh(m.a(x)), m.b.weight), a=nn.Linear(D, 3), b=nn.Linear(3, C)),
    ],
)
def test_hesscale_where_diagonals_are_all_there_is(build: Any) -> None:
    """One hidden layer under a quadratic loss of each output: below orthogonal rows nothing is lost."""
    model, x = build(), torch.randn(N, D)
    with torch.no_grad():
        torch.nn.init.orthogonal_(model.b.weight)
    with hookjac.extend(model, "hesscale", "hess_diag"):
        model(x).square().sum().backward()
    for k, p in trainable(model).items():
        close(p.hesscale, p.hess_diag, k)  # type: ignore[attr-defined]


def test_penalties_are_exact_in_both() -> None:
    model, x = nn.Sequential(nn.Linear(D, C)), torch.randn(N, D)
    with hookjac.extend(model, "hesscale", "hess_diag"):
        (model(x).square().sum() + model[0].weight.pow(4).sum()).backward()
    close(model[0].weight.hesscale, model[0].weight.hess_diag, "weight")


def test_refusals() -> None:
    twice = Fn(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Linear(D, D))
    with (
        pytest.raises(HookjacError, match=r"hesscale of parameter 'a.weight': .*used once"),
        hookjac.extend(twice, "hesscale"),
    ):
        twice(torch.randn(N, D)).square().sum().backward()
    with pytest.raises(ValueError, match="samples must be a positive integer"):
        Hutchinson(samples=0)
