"""`extend(after=...)`: called at the end of every backward, with the parameters that have results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hookjac


@pytest.mark.parametrize("name", ["grad_sample", "hess_diag"])  # read in passing, and by a walk
def test_after_sees_the_results_of_every_backward(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    seen: list[dict[str, Any]] = []

    def after(params: dict[str, nn.Parameter]) -> None:
        assert list(params) == [key for key, _ in model.named_parameters()]
        assert all(p.grad is not None for p in params.values())
        seen.append({key: getattr(p, name) for key, p in params.items()})

    with hookjac.extend(model, name, after=after):
        for n in range(3):
            model(torch.randn(5, 4)).square().sum().backward()
            assert len(seen) == n + 1
            for key, p in model.named_parameters():
                assert seen[-1][key] is getattr(p, name)
    assert not torch.equal(seen[0]["0.weight"], seen[1]["0.weight"]), "what it kept is not overwritten"


@pytest.mark.parametrize("inner", ["hess_mp", "ggn_mp", "hutchinson"])
def test_derivatives_of_another_block_are_no_backward(inner: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(5, 4)
    calls: list[int] = []
    with hookjac.extend(model, "grad_sample", after=lambda params: calls.append(1)):
        with hookjac.extend(model, inner):
            model(x).square().sum().backward()
    assert len(calls) == 1


def test_after_sees_the_parameters_that_were_asked_for() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    seen: list[list[str]] = []
    x = torch.randn(5, 4, requires_grad=True)
    with hookjac.extend(model, "grad_sample", after=lambda params: seen.append(list(params))):
        model(x).square().sum().backward(inputs=[model[2].weight])
        torch.autograd.grad(model(x).sum(), x)  # towards something else
    assert seen == [["2.weight"]]


def test_after_is_not_called_for_a_backward_that_failed() -> None:
    model = nn.Linear(4, 3)
    seen: list[Any] = []
    with hookjac.extend(model, "grad_sample", after=seen.append):
        with pytest.raises(hookjac.HookjacError, match="mixes samples"):
            model(torch.randn(5, 4)).square().sum().sqrt().backward()
    assert not seen


def test_after_must_be_a_function() -> None:
    with pytest.raises(TypeError, match="after must be a function of the parameters, or None; got 'print'"):
        hookjac.extend(nn.Linear(2, 2), after="print")  # type: ignore[arg-type]
