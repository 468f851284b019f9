"""The comparison of optimizers, a few steps of it; and its table from made-up runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import training
from benchmarks.training import Run, Trained, Training


@pytest.fixture(autouse=True)
def single() -> Iterator[None]:
    """The nets are small: threads would wait for each other."""
    torch.set_default_dtype(torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    assert sgd[3:] == ["diverged", "4 to diverged", "diverged", "never", "100.0", "never"]
    training.save(made, tmp_path / "t.json")
    loaded = training.load(tmp_path / "t.json")
    assert training.rows(loaded) == [adam, kfac, sgd]
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


def test_curvature_needs_fewer_steps() -> None:
    """What docs/optimizers.md says, on one of its tasks: the loss after 60 steps, the best of three rates for the plain
    ones, in the median of three seeds."""
    task = training.TASKS["diabetes"]
    made = training.configurations(task)

    def after(optimizer: str, said: str) -> float:
        runs = [training.train(task, made[optimizer][said], seed, 60).last for seed in (1, 2, 3)]
        return sorted(runs)[1]

    rates = {"SGD": ("lr 0.03", "lr 0.09", "lr 0.3"), "AdamW": ("lr 0.01", "lr 0.03", "lr 0.1")}
    plain = min(after(name, said) for name, known in rates.items() for said in known)
    assert 0.05 < plain < 0.5
    assert after("DiagonalNewton", "lr 0.03, damping 0.001") < 1.2 * plain
    assert after("KFAC", "lr 0.1, damping 0.001") < plain / 3
    assert after("EKFAC", "lr 0.1, damping 0.001") < plain / 3
    assert after("NaturalGradient", "damping 0.01, 20 products") < plain / 3
    assert after("GaussNewton", "damping 0.01, at least 0.0001") < plain / 3
