"""`hookjac.testing`: a layer of one's own, with a rule of one's own, held to loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookjac import Rule, register, rule
from hookjac.factor import Dense
from hookjac.testing import check_rule


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
    assert {row.quantity for row in report.rows} == {"grad_sample", "jac", "ggn_diag", "hess_diag"}
    assert len(report.rows) == 2 * 4 * 5  # all samples and one, quantities, parameters


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
