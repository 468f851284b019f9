"""`hookjac.testing`: a layer of one's own, with a rule of one's own, held to loops."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookjac import HookjacError, NodeRule, Rule, register, rule
from hookjac.factor import Dense
from hookjac.testing import _compared, check_rule


class Scale(nn.Module):
    """y = x * exp(s), entry by entry."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.randn(d) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.s.exp()


def scale_rule(slip: float = 1.0) -> Rule:
    """First order by hand. The parameter enters by an exponential, so its Hessian must go by products: no `mixed`."""

    def factors(call: Any, G: Tensor, layout: Any) -> dict[str, Any]:
        return {"s": Dense(slip * layout.split(G * call.x * call.values["s"].exp()))}

    return Rule(name="scale", modules=(Scale,), params=("s",), pull=lambda call, G: G * call.values["s"].exp(),
                factors=factors, linear=False)  # fmt: skip


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "_RULES", dict(rule._RULES))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Scale(4), nn.Linear(4, 2))


def test_without_a_rule() -> None:
    report = check_rule(model(), torch.randn(3, 3))
    assert report.fine
    assert {row.quantity for row in report.rows} == {"grad_sample", "jac", "ggn_diag", "hess_diag", "jac, 1 rows"}
    assert {row.parameter for row in report.rows} >= {"2.s", "module.2.s", "input_scale.0"}
    # all samples and one; as it is with 5 parameters, and above a scale with 6; 4 quantities and one row by itself
    assert len(report.rows) == 2 * (5 + 6) * 5


def test_with_a_rule() -> None:
    register(scale_rule())
    report = check_rule(model(), torch.randn(3, 3))
    (first, *_) = [row for row in report.rows if row.parameter == "2.s"]
    assert (first.road, first.why.split(";")[0]) == ("rule", "scale")
    assert "2.s" in str(report)


def test_a_wrong_rule_is_caught() -> None:
    register(scale_rule(slip=1.001))
    with pytest.raises(AssertionError, match=r"disagrees with plain autograd loops(.|\n)*2\.s .*WRONG"):
        check_rule(model(), torch.randn(3, 3))


def test_integers_dropout_and_float32_modules() -> None:
    text = nn.Sequential(nn.Embedding(5, 3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(6, 2)).float()
    before = text[0].weight.clone()
    assert check_rule(text, torch.randint(5, (3, 2))).fine
    assert text[0].weight.dtype == torch.float32
    assert torch.equal(text[0].weight, before)
    assert not hasattr(text[0].weight, "grad_sample")


# Mistakes in rules: none passes ---------------------------------------------------------------------------------


class Gate(nn.Module):
    """y = (x * w) ** 3, with w [d] shared by all positions."""

    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w) ** 3


def slope(call: Any) -> Tensor:
    return 3 * (call.x * call.values["w"]) ** 2


def gate_factors(call: Any, G: Tensor, layout: Any) -> dict[str, Any]:
    g = layout.split(G * slope(call) * call.x)  # [V, N, *positions, d]
    return {"w": Dense(g.flatten(2, -2).sum(2) if g.dim() > 3 else g)}


def gate_rule(**changes: Any) -> Rule:
    right: dict[str, Any] = {
        "name": "gate",
        "modules": (Gate,),
        "params": ("w",),
        "pull": lambda call, G: G * slope(call) * call.values["w"],
        "factors": gate_factors,
        "bend": lambda call, g: g * 6 * call.x * call.values["w"] ** 3,
        "linear": False,
    }
    return Rule(**{**right, **changes})


@pytest.mark.parametrize("shape", [(4,), (2, 4), (1, 4)])
def test_a_right_rule_passes(shape: tuple[int, ...]) -> None:
    register(gate_rule())
    assert check_rule(Gate(), torch.randn(3, *shape), rule="gate").fine


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "pull": ({"pull": lambda call, G: G * slope(call)}, "disagrees"),
    "bend": ({"bend": lambda call, g: g * call.x}, "disagrees"),
    "no bend": ({"bend": None}, "disagrees"),
    "said to be linear": ({"linear": True}, "disagrees"),
    "factors": ({"factors": lambda c, G, la: {"w": Dense(2 * gate_factors(c, G, la)["w"].t)}}, "disagrees"),
    "positions not summed": (
        {"factors": lambda c, G, la: {"w": Dense(la.split(G * slope(c) * c.x))}}, "expected [V, N,"),
    "a tensor": ({"factors": lambda call, G, layout: {"w": G}}, "rule 'gate' of layer '' returned a Tensor"),
    "no dict": ({"factors": lambda call, G, layout: Dense(G)}, "must return a dict"),
    "another name": ({"factors": lambda call, G, layout: {"weight": Dense(G)}}, "of 'w'; got keys ['weight']"),
    "summed over samples": (
        {"factors": lambda c, G, la: {"w": Dense(la.split(G).sum(1, keepdim=True))}}, "expected [V"),
    "never used": ({"claims": lambda module: False}, "rule 'gate' was never used"),
    "a name it does not know": ({"params": ("v",)}, "rule 'gate' was never used"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    register(gate_rule(**changes))
    with pytest.raises((AssertionError, HookjacError), match=re.escape(message)):
        check_rule(Gate(), torch.randn(3, 2, 4), rule="gate")


def test_a_node_rule_that_returns_no_factor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = NodeRule(name="mine", nodes=("MulBackward0",), slots=(1,), fits=lambda node, slot, layout: slot == 1,
                    part=lambda node, slot, G, layout: G)  # fmt: skip
    monkeypatch.setattr(rule, "_NODES", {"MulBackward0": made})
    with pytest.raises(HookjacError, match="rule 'mine' of the node MulBackward0 returned a Tensor"):
        check_rule(Gate(), torch.randn(3, 4))


def test_shapes_are_compared() -> None:
    """With one position a forgotten sum broadcasts to the right numbers in the wrong shape."""
    row = _compared("w", "jac", "rule", "gate", torch.zeros(3, 1, 4), torch.zeros(3, 4), 1e-9)
    assert not row.fine
    assert row.shapes == "[3, 1, 4] not [3, 4]"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gate_rule(params="w"), "`params` must be a tuple of names"),
        (lambda: NodeRule(name="x", nodes=("A",), slots=(1,), fits=lambda *a: True, part=lambda *a: None,
                          mixed={0: None}), "`slots` of"),
        (lambda: register("gate"), "register takes a Rule or a NodeRule, got str"),
    ],
)  # fmt: skip
def test_records_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()
