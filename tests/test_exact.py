"""Every model, every quantity, against float64 loops; with the rules and with the rules hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, NODES, RULES, Case, random_loss
from oracle import close, expected, trainable
from torch import Tensor, nn

import hookjac
from hookjac import rule, service
from hookjac.engine import Walk

QUANTITIES = ("grad_sample", "jac", "ggn_diag", "hess_diag")


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule at all: every layer goes by autograd's own nodes."""
    monkeypatch.setattr(rule, "_RULES", {})
    monkeypatch.setattr(rule, "_NODES", {})


@pytest.fixture
def functional(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule for a module: layers are recognised by the nodes they leave, as functional code is."""
    monkeypatch.setattr(rule, "_RULES", {})


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No structure is remembered, so that module rules and the walk serve every step. Counts the walks."""
    counted: list[int] = []
    real = Walk.run

    def run(self: Walk) -> Any:
        counted.append(1)
        return real(self)

    monkeypatch.setattr(service, "describe", lambda *_: None)
    monkeypatch.setattr(Walk, "run", run)
    return counted


def prepare(
    case: Case, seed: int = 0, build: Callable[[], nn.Module] | None = None
) -> tuple[nn.Module, Callable[[], Any], Callable[[Any], Tensor]]:
    """The model, a forward that draws the same random numbers each time, and the selection of its output."""
    torch.manual_seed(seed)
    model = (build or case.build)()
    args, kwargs = case.inputs(), case.kwargs()

    def run() -> Any:
        torch.manual_seed(seed + 1)
        return model(*args, **kwargs)

    def pick(output: Any) -> Tensor:
        if case.output is None:
            return output
        return case.output(output) if callable(case.output) else output[case.output]

    return model, run, pick


def compare(case: Case, quantities: tuple[Any, ...] = QUANTITIES, seed: int = 0, times: int = 1) -> hookjac.extend:
    model, run, pick = prepare(case, seed)
    loss = case.loss or random_loss
    if case.oracle is None:
        wanted = expected(model, lambda: pick(run()), loss)
    else:
        other, run_other, _ = prepare(case, seed, case.oracle)
        wanted = expected(other, lambda: pick(run_other()), loss)
    for _ in range(times):
        model.zero_grad()
        with hookjac.extend(model, *quantities, output=case.output) as ext:
            loss(pick(run())).backward()
    names = [q if isinstance(q, str) else q.name for q in quantities]
    for name, p in trainable(model).items():
        if p.grad is not None:
            close(p.grad, wanted[name]["grad"], (name, "grad"))
        for q in names:
            if q == "hess_diag" and "no oracle hessian" in case.tags:
                continue
            close(getattr(p, q), wanted[name][q], (case.name, name, q))
    return ext


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact(case: Case) -> None:
    ext = compare(case)
    if case.road is not None:
        assert {row.road for row in ext.explain().rows} == {case.road}, ext.explain()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("hidden")
def test_exact_without_rules(case: Case) -> None:
    if case.oracle is not None:  # what no rule explains needs a second backward, and here PyTorch has none
        with pytest.raises(hookjac.HookjacError, match="second backward"):
            compare(case)
        ext = compare(case, ("grad_sample", "jac", "ggn_diag"))
    else:
        ext = compare(case)
    assert not {row.road for row in ext.explain().rows} & {"rule"}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("functional")
def test_exact_as_functional_code(case: Case) -> None:
    compare(case, QUANTITIES if case.oracle is None else ("grad_sample", "jac", "ggn_diag"))


@pytest.mark.parametrize("asked", [("grad_sample", "jac"), ("ggn_diag",)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_on_the_walk(case: Case, asked: tuple[str, ...], walked: list[int]) -> None:
    """What a passage would serve."""
    ext = compare(case, asked, times=2)
    assert len(walked) == 2
    if case.road is not None:
        assert {row.road for row in ext.explain().rows} == {case.road}, ext.explain()


@pytest.mark.parametrize("asked", [("grad_sample", "jac", "ggn_diag"), ("hess_diag",)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_again(case: Case, asked: tuple[str, ...]) -> None:
    """The third step, by what was learned at the first."""
    compare(case, asked, times=3)


@pytest.mark.parametrize("road", ["columns", "features", "entries"])
@pytest.mark.parametrize("case", [c for c in RULES + NODES if c.oracle is None], ids=str)
def test_roads_of_the_hessian(case: Case, road: str) -> None:
    compare(case, (hookjac.HessDiag(road=road),), seed=3)  # type: ignore[arg-type]
