"""`hookjac.check`: it says "ok" of what is right, on every awkward model, and "WRONG" of a rule that is."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, C, Case, D, Fn, N, random_loss
from click.testing import CliRunner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hookjac
from hookjac import HookjacError
from hookjac.check import _CHECKS, _row

ROOT = Path(__file__).resolve().parents[1]
FEW = [c for c in CASES if c.oracle is None and c.name not in ("pruned", "Embedding by frequency")]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_models(case: Case) -> None:
    model = case.build()
    inputs: Any = case.kwargs() or case.inputs()
    if case.kwargs() and case.inputs():
        pytest.skip("positional and keyword arguments at once")
    pick = {} if case.output is None else {"output": case.output}

    def loss(out: Any) -> Tensor:
        if callable(case.output):
            out = case.output(out)
        elif case.output is not None:
            out = (
                out[case.output] if isinstance(case.output, int) or isinstance(out, dict) else getattr(out, case.output)
            )
        return (case.loss or random_loss)(out)

    report = hookjac.check(model, inputs, loss, "grad_sample", "jac", "ggn_diag", "grad_sample_norm", entries=2, **pick)
    assert report.fine, report
    assert {r.parameter for r in report.rows} == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("quantity", _CHECKS)
def test_quantities(quantity: str) -> None:
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, C))
    x, y = torch.randn(N, D), torch.randint(C, (N,))

    def loss(out: Tensor) -> Tensor:
        return F.cross_entropy(out, y)

    report = hookjac.check(model, x, loss, quantity, entries=4)
    assert report.fine, report
    assert [r.quantity for r in report.rows] == [quantity] * 4
    assert max(r.error for r in report.rows) < 1e-12


@pytest.mark.parametrize("quantity", ["grad_sample", "grad_sample_norm", "grad_sample_gram", "ggn_diag", "ggn_block",
                                      "ggn_mp", "hess_diag", "hess_mp", "grad_var"])  # fmt: skip
def test_penalties(quantity: str) -> None:
    x = torch.randn(N, D)
    given: list[nn.Module] = []

    class Penalised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            given[:] = [self]
            return super().forward(x)

    def loss(out: Tensor) -> Tensor:
        return random_loss(out) + given[0].weight.pow(4).sum()  # type: ignore[operator]

    report = hookjac.check(nn.Sequential(Penalised(D, C)), x, loss, quantity)
    assert report.fine, report


def test_the_users_model_is_left_alone() -> None:
    model = nn.Linear(D, C).float()
    dropping = nn.Sequential(nn.Linear(D, C), nn.Dropout(0.5))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(N, D).float()
    state = torch.get_rng_state()
    report = hookjac.check(model, x, lambda out: out.square().sum())
    assert report.fine
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert model.weight.dtype == torch.float32
    assert model.weight.grad is None
    assert not [key for key in vars(model.weight) if not key.startswith("_")]
    hookjac.check(dropping, x, lambda out: out.square().sum())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from hookjac.factor import Outer

    real = Outer.dense
    monkeypatch.setattr(Outer, "dense", lambda self: real(self) * 1.0001)
    report = hookjac.check(nn.Linear(D, C), torch.randn(N, D), random_loss, "grad_sample", "ggn_diag")
    assert not report.fine
    wrong = {(r.parameter, r.quantity) for r in report.rows if not r.fine}
    assert ("weight", "grad_sample") in wrong
    assert "WRONG" in str(report)
    assert all(0 < r.error < 1e-3 for r in report.rows if (r.parameter, r.quantity) == ("weight", "grad_sample"))


class TwoHeads(nn.Module):
    """Both are in the loss, and the second is made of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.a(x))
        return {"h": h, "logits": self.b(h)}


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(D, C)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.a(x)
        return {"logits": out, "loss": out.square().mean()}


@pytest.mark.parametrize("picked", ["h", "logits"])
def test_several_outputs(picked: str) -> None:
    model, x = TwoHeads(), torch.randn(N, D)

    def loss(out: dict[str, Tensor]) -> Tensor:
        return random_loss(out["h"]) + random_loss(out["logits"])

    asked = [q for q in _CHECKS if q not in ("grad_sample_gram", "ntk") and (picked == "logits" or "ggn" not in q)]
    report = hookjac.check(model, x, loss, *asked, output=picked)
    assert report.fine, report
    if picked == "h":
        for p in model.b.parameters():  # what is made of the selected output belongs to the loss then
            p.requires_grad_(False)
        for q in ("ggn_diag", "ggn_block", "ggn_mp", "ggn_diag_sample"):
            assert hookjac.check(model, x, loss, q, output="h").fine, q
        for p in model.b.parameters():
            p.requires_grad_(True)
        with pytest.raises(HookjacError, match=r"ggn_diag: the loss depends on parameter 'b\.\w+' by a way"):
            hookjac.check(model, x, loss, "ggn_diag", output="h")


def test_a_loss_of_the_models_own() -> None:
    report = hookjac.check(OwnLoss(), torch.randn(N, D), lambda o: o["loss"], *_CHECKS, output="logits")
    assert report.fine, report


def test_what_is_not_finite_is_not_fine() -> None:
    nan, one = torch.tensor(math.nan), torch.tensor(1.0)
    for pairs in ([(one, one), (nan, one), (one, one)], [(one, torch.tensor(math.inf))], [(one, nan)], [(nan, nan)]):
        assert not _row("w", "hess_diag", "rule", "", pairs, 1e-8).fine
    assert _row("w", "hess_diag", "rule", "", [(one, one)], 1e-8).fine


def test_entries_are_drawn_where_something_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Embedding(20000, 3), nn.Flatten(), nn.Linear(6, C))
    report = hookjac.check(model, torch.randint(20000, (N, 2)), random_loss, "grad_sample", entries=4)
    assert report.fine
    real = hookjac.factor.Lookup.dense
    monkeypatch.setattr(hookjac.factor.Lookup, "dense", lambda self: real(self) * 1.001)
    report = hookjac.check(model, torch.randint(20000, (N, 2)), random_loss, "grad_sample", entries=4)
    assert [r.fine for r in report.rows if r.parameter == "0.weight"] == [False]


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def test_misuse() -> None:
    model, x = nn.Linear(D, C), torch.randn(N, D)
    with pytest.raises(ValueError, match=r"no entry-by-entry definition of 'kfac'. It knows grad_sample, "):
        hookjac.check(model, x, random_loss, "kfac")
    with pytest.raises(ValueError, match="unknown quantity 'grad_samples'; did you mean 'grad_sample'"):
        hookjac.check(model, x, random_loss, "grad_samples")
    with pytest.raises(ValueError, match="loss_fn must return the loss as one number, got a tensor"):
        hookjac.check(model, x, lambda out: out.sum(1))
    with pytest.raises(TypeError, match="takes names of quantities"):
        hookjac.check(model, x, random_loss, hookjac.GradSample(loss_reduction="mean"))  # type: ignore[arg-type]
    cases = {c.name: c for c in CASES}
    for name, message in (("pruned", "cannot be copied"), ("Embedding by frequency", "forget the scale")):
        with pytest.raises(HookjacError, match=message):
            hookjac.check(cases[name].build(), cases[name].inputs(), random_loss)
    with pytest.raises(HookjacError, match="keeps a state between calls"):
        hookjac.check(Counting(D, C), x, random_loss)
    weight = torch.ones(C, dtype=torch.float32)
    with pytest.raises(HookjacError, match="float64, and something in them is of another type"):
        hookjac.check(model, x, lambda out: F.cross_entropy(out, torch.zeros(N, dtype=torch.long), weight=weight))
    with pytest.raises(HookjacError, match=r"a sample at least; the model gave an output \[0, 3\]"):
        hookjac.check(model, x[:0], random_loss)
    with pytest.raises(ValueError, match="entries must be a positive integer, got 0"):
        hookjac.check(model, x, random_loss, entries=0)


FACTORY = """
import torch
from torch import nn

def good():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3), lambda out: out.square().sum()

def mixes():
    return nn.Linear(3, 2), torch.randn(5, 3), lambda out: out.square().mean().sqrt()

def short():
    return nn.Linear(3, 2), torch.randn(5, 3)

class Two(nn.Linear):
    def forward(self, x):
        return {"a": super().forward(x).float().to(x.dtype), "b": super().forward(x)}  # a: rounded

def two():
    return Two(3, 2), torch.randn(5, 3), lambda out: out["a"].sin().exp().mean()
"""


@pytest.mark.parametrize(("target", "code", "said"), [
    ("mine:good", 0, "2.bias"), ("mine:mixes", 1, "mixes samples"), ("mine:short", 2, "a model, its inputs and a loss"),
    ("mine:absent", 2, "'absent'"), ("nowhere:good", 2, "'nowhere'"), ("mine", 2, "module:factory"),
])  # fmt: skip
def test_command(target: str, code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    command = [sys.executable, "-m", "hookjac", "check", target, "jac", "hess_diag", "--entries", "2"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_command_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hookjac.__main__ import main

    (tmp_path / "those.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for more, code, said in (
        ([], 1, "Say which one to differentiate"),
        (["--output", "a"], 1, "WRONG"),
        (["--output", "a", "--rtol", "1e-5"], 0, "weight"),
        (["--output", "c"], 1, "output='c' finds nothing"),
        (["--output", "1"], 1, "output=1 finds nothing"),
        (["--rtol", "-1"], 2, "is not in the range"),
    ):
        done = CliRunner().invoke(main, ["check", "those:two", "grad_sample", "ggn_diag", *more])
        assert done.exit_code == code, done.output
        assert said in done.output


def test_a_reentrant_checkpoint_is_refused() -> None:
    """PyTorch serves no autograd.grad through it."""
    model = Fn(lambda m, x: m.c(checkpoint(m.b, m.a(x), use_reentrant=True)), a=nn.Linear(D, D), b=nn.Tanh(),
               c=nn.Linear(D, C))  # fmt: skip
    with pytest.raises(HookjacError, match="use_reentrant=False"):
        hookjac.check(model, torch.randn(N, D), lambda out: out.square().sum())


def test_a_scripted_model_is_refused() -> None:
    """Its deepcopy has parameters that hang on those of the original."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        scripted: Any = torch.jit.script(nn.Sequential(nn.Linear(D, C)))
    with pytest.raises(HookjacError, match="Check the model that was scripted"):
        hookjac.check(scripted, torch.randn(N, D), lambda out: out.square().sum())
    with pytest.raises(HookjacError, match=r"parameter '0\.weight' is no leaf of autograd's graph"):
        with hookjac.extend(copy.deepcopy(scripted)):
            pass
