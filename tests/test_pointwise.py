"""The table of derivatives: each row against autograd, at kinks and far out too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import ACTIVATIONS
from oracle import close
from torch import nn

from hookjac import extend
from hookjac.layers.pointwise import _DROPOUTS
from hookjac.rule import lookup, rules

SMOOTH = ["Hardsigmoid"]  # PyTorch has no second backward for it
KINKS = torch.tensor([-3.0, -0.4, -0.3, -0.2, 0.0, 0.1, 0.2, 0.3, 0.5, 0.6, 3.0, 6.0])


def pulled(act: nn.Module, x: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The Jacobian's diagonal as the rule has it: through a bias that is added right below."""
    below = nn.Linear(1, x.numel())
    with torch.no_grad():
        below.weight.zero_()
        below.bias.copy_(x)
    model = nn.Sequential(below, act)
    with extend(model, "grad_sample") as ext:
        loss(model(torch.zeros(1, 1))).backward()
    assert ext.explain().to_dict()["parameters"]["0.bias"]["road"] == "rule"
    return below.bias.grad_sample[0]


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if "ropout" not in n and n != "RReLU"])
def test_first_derivative(name: str) -> None:
    act = ACTIVATIONS[name]()
    for x in (KINKS, torch.linspace(-9, 9, 41), torch.tensor([-300.0, -40.0, 40.0, 300.0])):
        x = x.double()
        free = x.clone().requires_grad_()
        weights = torch.linspace(0.5, 2, x.numel())
        (wanted,) = torch.autograd.grad((weights * act(free)).sum(), free)
        close(pulled(act, x, lambda y, w=weights: (w * y).sum()), wanted, name)


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if "ropout" not in n and "RReLU" not in n])
def test_second_derivative(name: str) -> None:
    act = ACTIVATIONS[name]()
    rule = lookup(act)
    assert rule is not None
    x = torch.cat([torch.linspace(-9, 9, 40), torch.tensor([-300.0, 300.0])]).double()
    below = nn.Linear(1, x.numel())
    with torch.no_grad():
        below.weight.zero_()
        below.bias.copy_(x)
    with extend(nn.Sequential(below, act), "hess_diag"):
        act(below(torch.zeros(1, 1))).sum().backward()
    found = below.bias.hess_diag
    if name in SMOOTH:
        wanted = torch.zeros_like(x)
    else:
        free = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(act(free).sum(), free, create_graph=True)
        wanted = torch.zeros_like(x)
        if first.requires_grad:
            (wanted,) = torch.autograd.grad(first.sum(), free)
    close(found, wanted, name)


@pytest.mark.parametrize("kind", [*_DROPOUTS, nn.RReLU])
def test_random_masks_are_those_drawn(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    shape = {nn.Dropout1d: (2, 3, 4), nn.Dropout2d: (2, 3, 2, 2), nn.Dropout3d: (2, 3, 2, 2, 2)}.get(kind, (4, 6))
    below, act = nn.Linear(shape[-1], shape[-1]), kind()
    x = torch.randn(shape)
    with extend(model := nn.Sequential(below, act), "grad_sample", "jac") as ext:
        out = model(x)
        out.square().sum().backward()
    assert ext.explain().to_dict()["parameters"]["bias" if False else "0.bias"]["road"] == "rule"
    close(below.bias.grad_sample.sum(0), below.bias.grad, kind.__name__)
    close(below.weight.grad_sample.sum(0), below.weight.grad, kind.__name__)
    slope = (2 * out).detach().flatten(1)
    close((slope[..., None] * below.bias.jac.reshape(shape[0], -1, shape[-1])).sum((0, 1)), below.bias.grad, "jac")


def test_every_entrywise_module_of_torch_nn_has_a_rule() -> None:
    """Those left out act on more than one entry, or have parameters of their own."""
    others = {"PReLU", "GLU", "Softmax", "Softmin", "Softmax2d", "LogSoftmax", "MultiheadAttention"}
    found = {cls.__name__ for cls, _ in rules()}
    for module in (torch.nn.modules.activation, torch.nn.modules.dropout):
        for name in module.__all__:
            assert name in others or name in found, f"no rule for torch.nn.{name}"
