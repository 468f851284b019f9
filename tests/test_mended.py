"""Second derivatives that PyTorch itself has wrong: against functions written out, and against finite differences."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import close, compare, expected
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from hookjac import extend
from hookjac.testing import random_loss, twice_differentiable

KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "rows": parametrizations.weight_norm,
    "columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "the old way": nn.utils.weight_norm,
    "as a whole": lambda layer: parametrizations.weight_norm(layer, dim=None),
}


def net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(KINDS[kind](nn.Linear(3, 4)), nn.Tanh(), KINDS[kind](nn.Linear(4, 2)))


def test_pytorch_still_has_it_wrong() -> None:
    """When this fails, `mended` can go."""
    v, g = torch.randn(2, 3, requires_grad=True), torch.randn(2, 1)
    assert not torch.autograd.gradgradcheck(lambda v: torch._weight_norm(v, g, 0), (v,), raise_exception=False)
    with twice_differentiable():
        assert torch.autograd.gradgradcheck(lambda v: torch._weight_norm(v, g, 0), (v,))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_weight_norm(kind: str) -> None:
    model, x = net(kind), torch.randn(5, 3)
    asked = ("grad_sample", "jac", "ggn_diag", "hess_diag")
    wanted = expected(model, lambda: model(x), random_loss)
    with extend(model, *asked, "hess_block", "hess_mp") as ext:
        random_loss(model(x)).backward()
        compare(model, wanted, asked)
        whole = ext.hessian @ torch.eye(ext.hessian.shape[0])
        close(whole, whole.T, "symmetric")
        start = 0
        for name, p in model.named_parameters():
            P = p.numel()
            units = torch.eye(P).reshape(P, *p.shape)
            close(p.hess_block, p.hess_mp(units).reshape(P, P), (name, "block"))
            close(p.hess_block.diagonal(), wanted[name]["hess_diag"].flatten(), (name, "diagonal"))
            close(whole[start : start + P, start : start + P], p.hess_block, (name, "whole"))
            start += P


def test_by_finite_differences() -> None:
    """No second derivative of PyTorch's at all."""
    model, x = net("rows"), torch.randn(5, 3)
    with extend(model, "hess_diag"):
        random_loss(model(x)).backward()
    step = 1e-5
    for p in model.parameters():
        for k in range(p.numel()):
            slopes = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[k] += sign * step
                (slope,) = torch.autograd.grad(random_loss(model(x)), p)
                slopes.append(slope.flatten()[k])
                with torch.no_grad():
                    p.view(-1)[k] -= sign * step
            found = p.hess_diag.flatten()[k]  # type: ignore[attr-defined]
            assert abs(found - (slopes[0] - slopes[1]) / (2 * step)) < 1e-7 * p.hess_diag.abs().max() + 1e-8  # type: ignore


def test_inside_a_loss() -> None:
    model, x = net("rows"), torch.randn(5, 3)
    with extend(model, "grad_sample", create_graph=True):
        random_loss(model(x)).backward()
    found = torch.autograd.grad(
        sum(p.grad_sample.sin().sum() for p in model.parameters()),
        list(model.parameters()),  # type: ignore[arg-type]
    )
    with twice_differentiable():
        out = model(x)
    rows: dict[str, Any] = {}
    for name, p in model.named_parameters():
        each = []
        for n in range(5):
            mask = torch.zeros(5, 1)
            mask[n] = 1
            slope = torch.autograd.grad(random_loss(out), out, create_graph=True)[0]
            each.append(torch.autograd.grad(out, p, slope * mask, create_graph=True)[0])
        rows[name] = torch.stack(each)
    wanted = torch.autograd.grad(sum(t.sin().sum() for t in rows.values()), list(model.parameters()))
    for name, f, w in zip(rows, found, wanted, strict=True):
        close(f, w, name)


def test_plain_backwards_stay_as_they_are() -> None:
    """To the last bit: first derivatives are PyTorch's own."""
    model, x, y = net("rows"), torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    plain = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    with extend(model, "hess_diag"):
        F.cross_entropy(model(x), y).backward()
    for p, wanted in zip(model.parameters(), plain, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, wanted)


def test_a_modified_weight_is_refused() -> None:
    model, x = net("rows"), torch.randn(5, 3)
    with extend(model, "hess_mp"):
        random_loss(model(x)).backward()
    v: Any = next(p for name, p in model.named_parameters() if name.endswith("original1"))
    with torch.no_grad():
        v.mul_(2)
    with pytest.raises(Exception, match="modified by an inplace operation"):
        v.hess_mp(torch.ones_like(v))


def test_graphs_are_freed() -> None:
    class Witness:
        pass

    model, x = net("rows"), torch.randn(5, 3)
    gc.disable()
    try:
        with extend(model, "hess_diag"):
            loss: Tensor = random_loss(model(x))
            stack: list[Any] = [loss.grad_fn]
            while type(stack[-1]).__name__ != "WeightNormInterfaceBackward0":
                stack += [below for below, _ in stack.pop(0).next_functions if below is not None]
            witness = Witness()
            gone = weakref.ref(witness)
            stack[-1].metadata["witness"] = witness
            del stack, witness
            assert gone() is not None
            loss.backward()
            del loss
        assert gone() is None
    finally:
        gc.enable()
