"""The programs in docs/examples, at a size that takes seconds; their pieces against plain definitions; their pages."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from oracle import close
from torch import Tensor, nn

import hookjac
from hookjac.demo import Digits, load

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def beside(double: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs lie next to each other, and work in float32."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    torch.set_default_dtype(torch.float32)


def program(name: str) -> Any:
    return importlib.import_module(name)


def rows(text: str) -> list[list[str]]:
    """Of the markdown tables in a text."""
    return [[c.strip() for c in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("| ")]


def run(name: str, tmp_path: Path, *options: str) -> list[list[str]]:
    out = tmp_path / "it.png"
    done = CliRunner().invoke(program(name).main, [*options, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert out.read_bytes().startswith(b"\x89PNG")
    return rows(done.output)


@pytest.mark.parametrize("name", ["influence", "pruning"])
def test_programs_run_and_pages_have_their_tables(name: str, tmp_path: Path) -> None:
    found, told = run(name, tmp_path, "--quick"), rows((ROOT / "docs" / f"{name}.md").read_text())
    assert [row[0] for row in found] == [row[0] for row in told[: len(found)]]
    number = r"-?\d+\.\d+ ± \d+\.\d+"
    for row in (*found[1:], *told[1 : len(found)]):
        assert all(re.fullmatch(number, cell) for cell in row[1:]), row
    assert (ROOT / "docs" / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"pictures/{name}.png" in (ROOT / "docs" / f"{name}.md").read_text()


@pytest.mark.parametrize("name", ["influence", "pruning"])
def test_snippets_of_pages_run(name: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{name}.md").read_text(), re.S):
            exec(snippet, names := {"__name__": "page"})
    assert said.getvalue() == {"influence": "torch.Size([20, 500])\n", "pruning": "torch.Size([500])\n"}[name]
    assert names["__name__"] == "page"


# The pieces -------------------------------------------------------------------------------------------------


def small() -> tuple[nn.Sequential, tuple[Tensor, Tensor, Tensor, Tensor]]:
    torch.set_default_dtype(torch.float64)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 10))
    return model, (torch.randn(7, 4), torch.randint(10, (7,)), torch.randn(2, 4), torch.randint(10, (2,)))


def flat(t: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(t, list(model.parameters()), retain_graph=True)])


def test_margins() -> None:
    margin = program("digits").margin
    logits, y = torch.randn(5, 10).double(), torch.randint(10, (5,))
    p = logits.softmax(1)[torch.arange(5), y]
    close(margin(logits, y), (p / (1 - p)).log(), "margin")
    close(margin(logits.expand(3, 5, 10), y), (p / (1 - p)).log().expand(3, 5), "of several nets")


def test_influence_by_loops() -> None:
    """One gradient at a time, and the matrices built."""
    it, decay = program("influence"), program("digits").DECAY
    model, (x, y, at, label) = small()
    margins, losses = it.margin(model(at), label), F.cross_entropy(model(x), y, reduction="none")
    slopes, pulls = (torch.stack([flat(t, model) for t in many]) for many in (margins, losses))
    close(it.plain(model, x, y, at, label), -slopes @ pulls.T, "plain")
    with hookjac.extend(model, "ggn_block", hookjac.KFAC(fisher="exact")):
        F.cross_entropy(model(x), y).backward()
    blocks = torch.block_diag(*[p.kfac.to_dense() for p in model.parameters()])  # type: ignore[attr-defined]
    wanted = -slopes @ torch.linalg.solve(blocks + decay * torch.eye(len(blocks)), pulls.T)
    close(it.influence(model, x, y, at, label), wanted, "kfac", rtol=1e-8)
    J = torch.stack([torch.stack([flat(t, model) for t in row]) for row in model(x)])  # [N, 10, P]
    p = model(x).softmax(1).detach()
    G = sum(j.T @ (torch.diag(q) - torch.outer(q, q)) @ j for j, q in zip(J, p, strict=True)) / len(x)
    wanted = -slopes @ torch.linalg.solve(G + decay * torch.eye(len(G)), pulls.T)
    close(it.influence(model, x, y, at, label, whole=True), wanted, "whole", rtol=1e-8)


def test_projected_scores_tend_to_those_without_projection() -> None:
    it, decay = program("influence"), program("digits").DECAY
    model, (x, y, at, label) = small()
    mine, its = ([flat(t, model) for t in it.margin(model(a), b)] for a, b in ((x, y), (at, label)))
    phi, slopes = torch.stack(mine), torch.stack(its)
    p = it.margin(model(x), y).sigmoid().detach()
    kernel = phi.T @ (phi * (p * (1 - p))[:, None]) / len(x) + decay * torch.eye(phi.shape[1])
    wanted = torch.linalg.solve(kernel, slopes.T).T @ phi.T * (1 - p)
    found = torch.stack([it.projected(model, x, y, at, label, k=1500, seed=s) for s in range(3)]).mean(0)
    assert torch.corrcoef(torch.stack([found.reshape(-1), wanted.reshape(-1)]))[0, 1] > 0.97
    assert (found - wanted).norm() < 0.2 * wanted.norm()


def test_training_side_by_side_is_training_one_by_one() -> None:
    it, data = program("digits"), load(0)
    data = Digits(data.x[:60].double(), data.y[:60], 40)
    torch.set_default_dtype(torch.float64)
    share = (torch.rand(2, 40) < 0.6).double()
    both = it.train(data, share, seed=1, hidden=4, steps=15, done=lambda more: None)
    start = it.start(2, 4, 1000)
    for e in range(2):
        model = it.net(start, e)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=15)
        chosen = share[e].bool()
        for _ in range(15):
            optimizer.zero_grad()
            ridge = sum(p.square().sum() for p in model.parameters())
            (F.cross_entropy(model(data.x[:40][chosen]), data.y[:40][chosen]) + it.DECAY / 2 * ridge).backward()
            optimizer.step()
            schedule.step()
        trained = it.net(both, e)
        for p, q in zip(model.parameters(), trained.parameters(), strict=True):
            close(q.detach(), p.detach(), e, rtol=1e-8)


def test_what_is_left_out() -> None:
    it, pruning = program("influence"), program("pruning")
    tau = torch.randn(3, 10)
    share = it.without(tau, 4)
    for row, kept in zip(tau, share, strict=True):
        assert kept.sum() == 6
        assert row[kept == 0].min() > row[kept == 1].max()
    halves = it.halves(11, 5, 0)
    assert (halves.sum(1) == 5).all()
    assert len(halves.unique(dim=0)) == 5
    norms, errors = torch.rand(10), torch.rand(10)
    for method, order in (("easy", norms), ("easy, EL2N", errors), ("hard", -norms)):
        share = pruning.kept((norms, errors), method, 0.3, 2)
        assert (share.sum(1) == 7).all()
        assert all(order[kept == 0].max() < order[kept == 1].min() for kept in share)
    share = pruning.kept((norms, errors), "random", 0.3, 2)
    assert (share.sum(1) == 7).all()
    assert not torch.equal(*share)
    a = torch.randn(6, 2)
    assert it.rank_correlation(a, a.exp()).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert it.rank_correlation(a, -a).tolist() == pytest.approx([-1, -1], abs=1e-6)


def test_difficulty_by_loops() -> None:
    pruning, it, data = program("pruning"), program("digits"), load(0)
    data = Digits(data.x[:12], data.y[:12], 8)
    quiet = {"hidden": 4, "steps": 3, "done": lambda more: None}
    norms, errors = pruning.difficulty(data, 2, **quiet)
    weights = it.train(data, torch.ones(2, 8), seed=50, **quiet)
    wanted, missed = torch.zeros(8), torch.zeros(8)
    for e in range(2):
        model = it.net(weights, e)
        for n in range(8):
            logits = model(data.x[n : n + 1])
            wanted[n] += flat(F.cross_entropy(logits, data.y[n : n + 1]), model).norm() / 2
            missed[n] += (logits.softmax(1) - F.one_hot(data.y[n : n + 1], 10)).norm().detach() / 2
    close(norms, wanted, "norms", rtol=1e-5)
    close(errors, missed, "errors", rtol=1e-5)
