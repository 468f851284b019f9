"""What the Hessian's diagonal costs: said beforehand, shown while it lasts, refused when it could never be paid."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, mlp, par
from torch import nn

from hookjac import HessDiag, HookjacError, extend, progress

Y = torch.tensor([0, 2, 1, 2])


def unruly() -> nn.Module:
    """A parameter `w` that no rule explains, below one that a rule does."""
    return Fn(lambda m, x: torch.atan2(m.w, x.unsqueeze(1)).sum(2) @ m.v, w=par(D, D), v=par(D, C))


def test_a_bill_that_could_never_be_paid_is_refused_before_it_runs() -> None:
    model = unruly()
    with pytest.raises(HookjacError) as caught, extend(model, HessDiag(flop_limit=1e3)):
        F.cross_entropy(model(torch.randn(N, D)), Y).backward()
    for part in ("'w'", f"({D}, {D})", "by entries", "limit of 1e+03", "flop_limit=math.inf", "ggn_diag"):
        assert part in str(caught.value)
    assert all(p.grad is None and not hasattr(p, "hess_diag") for p in model.parameters())
    with extend(model, HessDiag(flop_limit=math.inf)) as ext:
        F.cross_entropy(model(torch.randn(N, D)), Y).backward()
    assert ext.explain().flops > 1e3
    assert ext.explain().quantities["hess_diag"].flops == pytest.approx(ext.explain().flops)
    assert f"{ext.explain().flops:.1e}" in str(ext.explain())


def test_columns_have_a_bill_too() -> None:
    model = mlp(nn.Tanh)
    with pytest.raises(HookjacError, match=r"hess_diag would cost about .* limit of 1e\+00\. Ask for"):
        with extend(model, HessDiag(flop_limit=1.0)):
            F.cross_entropy(model(torch.randn(N, D)), Y).backward()


def test_a_limit_is_a_positive_number() -> None:
    with pytest.raises(ValueError, match="flop_limit must be a positive number"):
        HessDiag(flop_limit=-1)


class Bar:
    """What tqdm looks like from here."""

    made: list[Bar]

    def __init__(self, **options: Any) -> None:
        self.options, self.n, self.seen, self.closed = options, 0.0, [0.0], False
        Bar.made.append(self)

    def refresh(self) -> None:
        self.seen.append(self.n)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    Bar.made = []
    fake = types.ModuleType("tqdm.auto")
    fake.tqdm = Bar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm.auto", fake)
    return Bar.made


def step() -> None:
    model = unruly()
    with extend(model, "grad_sample", HessDiag(road="entries")):
        F.cross_entropy(model(torch.randn(N, D)), Y).backward()


def test_short_work_shows_nothing(bars: list[Bar]) -> None:
    step()
    assert not bars


def test_long_work_shows_how_far_it_is(bars: list[Bar], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    step()
    assert [bar.options["desc"] for bar in bars] == ["hess_diag, FLOPs", "masked columns"]
    for bar in bars:
        assert bar.seen == sorted(bar.seen)
        assert bar.seen[-1] == pytest.approx(bar.options["total"])
        assert bar.closed


def test_long_work_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    step()
