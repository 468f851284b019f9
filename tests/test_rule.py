"""Records check themselves, and the register has manners."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookjac import HookjacError, Rule, extend, register, rule
from hookjac.factor import Dense
from hookjac.rule import NodeRule, elementwise, linear_map, lookup


@pytest.fixture(autouse=True)
def separate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "_RULES", dict(rule._RULES))


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_rule_of_ones_own() -> None:
    register(linear_map("double", Double, pull=lambda call, G: 2 * G))
    model = nn.Sequential(nn.Linear(3, 2), Double())
    with extend(model, "grad_sample"):
        model(torch.randn(4, 3)).square().sum().backward()
    assert torch.allclose(model[0].weight.grad_sample.sum(0), model[0].weight.grad)
    register(elementwise("cube", Cube, d1=lambda c: 3 * c.x**2, d2=lambda c: 6 * c.x))
    assert lookup(Cube()) is not None


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**3


def test_a_class_has_one_rule() -> None:
    with pytest.raises(ValueError, match="Linear has the rule 'linear' already"):
        register(linear_map("mine", nn.Linear, pull=lambda call, G: G))


def test_a_rule_checks_itself() -> None:
    with pytest.raises(TypeError, match="must be subclasses of"):
        Rule(name="x", modules=(int,), pull=lambda c, G: G)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be subclasses of"):
        Rule(name="x", modules=(), pull=lambda c, G: G)
    with pytest.raises(ValueError, match="`params` and `factors` go together"):
        Rule(name="x", modules=(Double,), pull=lambda c, G: G, params=("weight",))
    for bad, message in (
        ({"name": 3}, "a rule's name must be a text, got 3"),
        ({"modules": Double}, "`modules` must be a tuple of classes"),
        ({"params": "weight"}, "`params` must be a tuple of names, got 'weight'"),
        ({"pull": 3}, "pull must be a function"),
        ({"bend": 3}, "bend must be a function, or None"),
        ({"constant": 1}, "constant must be True or False"),
    ):
        with pytest.raises(TypeError, match=message):
            Rule(**{"name": "x", "modules": (Double,), "pull": lambda c, G: G, **bad})  # type: ignore[dict-item]
    for params in (("",), ("weight", ""), ("child.weight",), (".",)):
        with pytest.raises(
            ValueError, match=r"`params` must be names of parameters of the layer itself.*child's class"
        ):
            Rule(name="x", modules=(Double,), pull=lambda c, G: G, params=params, factors=lambda c, G, la: {})
    for bad, message in (
        ({"params": ("a", "a"), "factors": lambda c, G, la: {}}, r"`params` must be different names, got \('a', 'a'\)"),
        ({"modules": (Double, Double)}, "`modules` must be different classes"),
    ):
        with pytest.raises(ValueError, match=message):
            Rule(**{"name": "x", "modules": (Double,), "pull": lambda c, G: G, **bad})  # type: ignore[dict-item]
    good = Rule(name="x", modules=(Double,), pull=lambda c, G: G)
    with pytest.raises(dataclasses.FrozenInstanceError):
        good.name = "y"  # type: ignore[misc]


class Plain(nn.Linear):
    """Nothing changed."""


class Loud(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class More(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(1))


def test_which_modules_are_claimed() -> None:
    assert lookup(Plain(2, 2)) is lookup(nn.Linear(2, 2)) is not None
    assert lookup(Loud(2, 2)) is None
    assert lookup(More(2, 2)) is None
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    assert lookup(patched) is None
    assert lookup(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) is None
    assert lookup(nn.ReLU(inplace=True)) is None
    assert lookup(nn.Flatten(0)) is None
    assert lookup(nn.Flatten(1)) is not None
    assert lookup(nn.Bilinear(2, 2, 2)) is None


def test_a_patched_instance_is_still_exact() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    inner = model[2].forward
    model[2].forward = lambda x: inner(x).exp()  # type: ignore[method-assign]
    with extend(model, "grad_sample", "hess_diag") as ext:
        model(torch.randn(4, 3)).square().sum().backward()
    assert ext.explain().to_dict()["parameters"]["2.weight"]["why"].startswith("linear map")  # its node, not its module
    for p in model.parameters():
        assert torch.allclose(p.grad_sample.sum(0), p.grad)


def test_a_rule_for_a_node_checks_itself() -> None:
    good: Any = {"fits": lambda n, k, la: True, "part": lambda n, k, G, la: Dense(G)}
    with pytest.raises(TypeError, match="must be type names of autograd nodes"):
        NodeRule(name="x", nodes=("not a name",), slots=(0,), **good)
    with pytest.raises(TypeError, match="`nodes` must be a tuple of type names"):
        NodeRule(name="x", nodes="SinBackward0", slots=(0,), **good)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`slots` must be a tuple of numbers"):
        NodeRule(name="x", nodes=("SinBackward0",), slots=0, **good)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="part must be a function"):
        NodeRule(name="x", nodes=("SinBackward0",), slots=(0,), fits=good["fits"], part=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`mixed` must be a mapping"):
        NodeRule(name="x", nodes=("SinBackward0",), slots=(0,), mixed=3, **good)  # type: ignore[arg-type]
    for slots in ((True,), (-1,)):
        with pytest.raises(ValueError, match="`slots` must be numbers from 0 on"):
            NodeRule(name="x", nodes=("SinBackward0",), slots=slots, **good)
    with pytest.raises(ValueError, match="`slots` must be different numbers"):
        NodeRule(name="x", nodes=("SinBackward0",), slots=(1, 1), **good)
    with pytest.raises(ValueError, match="`nodes` must be different type names"):
        NodeRule(name="x", nodes=("SinBackward0", "SinBackward0"), slots=(0,), **good)
    with pytest.raises(TypeError, match="`mixed` must have functions, or None; got 3 for input 1"):
        NodeRule(name="x", nodes=("SinBackward0",), slots=(1,), mixed={1: 3}, **good)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="`mixed` speaks of inputs"):
        NodeRule(name="x", nodes=("SinBackward0",), slots=(1,), mixed={"a": None, 0: None}, **good)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="`slots` must name an input"):
        NodeRule(name="x", nodes=("SinBackward0",), slots=(), **good)
    with pytest.raises(ValueError, match="MmBackward0 has the rule 'matrix product' already"):
        register(NodeRule(name="x", nodes=("MmBackward0",), slots=(0,), **good))


def test_error_is_a_runtime_error() -> None:
    assert issubclass(HookjacError, RuntimeError)
