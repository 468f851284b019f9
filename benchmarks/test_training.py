"""The comparison of optimizers, a few steps of it; and its table from made-up runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import training
from benchmarks.training import Run, Trained, Training


@pytest.fixture(autouse=True)
def single() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", training.TASKS)
def test_everything_runs(name: str) -> None:
    task = training.TASKS[name]
    made = training.configurations(task)
    assert {len(m) for m in made.values()} == {6}, "the same budget for all"
    for optimizer, configurations in made.items():
        first = next(iter(configurations.values()))
        run = training.train(task, first, 0, 2)
        assert len(run.losses) == len(run.seconds) == 2, optimizer
        assert run.seconds[0] > 0
        assert math.isfinite(run.held_out), optimizer


def test_batches_go_through_the_data() -> None:
    rows = list(training.batches(10, 4, 5, 0))
    assert [len(r) for r in rows] == [4, 4, 4, 4, 4]
    assert len(set(torch.cat(rows[:2]).tolist())) == 8
    assert not torch.equal(torch.cat(rows), torch.cat(list(training.batches(10, 4, 5, 1))))


def test_what_the_table_says(tmp_path: Path) -> None:
    seconds = [0.1 * k for k in range(1, 41)]
    slow, fast = [4.0] * 20 + [1.0] * 20, [4.0] * 5 + [1.0] * 35
    lost = Run([4.0, math.inf], [0.1, 0.2], math.inf)
    made = Training({"cpu": "x"}, [
        Trained("t", "AdamW", "lr 1", 6, [Run(slow, seconds, 2.0)] * 3),
        Trained("t", "KFAC", "lr 2", 6, [Run(fast, seconds, 3.0)] * 3),
        Trained("t", "SGD", "lr 3", 6, [Run([4.0] * 40, seconds, 4.0), lost, lost]),
    ])  # fmt: skip
    adam, kfac, sgd = training.rows(made)
    assert adam[3:] == ["1", "1 to 1", "2", "30", "100.0", "3.00"]
    assert kfac[3:] == ["1", "1 to 1", "3", "15", "100.0", "1.50"]
    assert sgd[3:] == ["inf", "4 to inf", "inf", "never", "100.0", "never"]
    training.save(made, tmp_path / "t.json")
    loaded = training.load(tmp_path / "t.json")
    assert training.rows(loaded)[:2] == [adam, kfac]
    assert loaded.found[2].runs[1].held_out > 1e29
    page = tmp_path / "page.md"
    page.write_text("<!-- training -->\n<!-- end of training -->\n")
    training.write_page(made, page)
    assert "| t | KFAC | lr 2 | 1 | 1 to 1 | 3 | 15 | 100.0 | 1.50 |" in page.read_text()
    training.draw(made, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_training_goes_down() -> None:
    task = training.TASKS["digits"]
    run = training.train(task, training.configurations(task)["KFAC"]["lr 0.03, damping 0.01"], 0, 30)
    assert run.last < 0.2 * run.losses[0]
