"""Every quantity on every workload: hookjac, its peers and a plain step, in turn.

All results are compared before anything is timed. `python -m benchmarks` times and prints the table; without
`--benchmark-enable` each contender runs once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import contenders, measure
from benchmarks.contenders import CONTENDERS, RANDOM, Results, Step
from benchmarks.workloads import WORKLOADS, C, Job
from hookjac import JacTensor, Kronecker, KroneckerSum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CELLS = [
    (workload, quantity)
    for workload in WORKLOADS
    for quantity in CONTENDERS
    if not (workload == "gpt2" and quantity in ("jac", "ntk", "ggn_diag", "kfac exact", "hess_diag"))  # T x V columns
    and not (workload in ("resnet", "transformer") and quantity == "hess_diag")  # products for every feature: minutes
]


def steps_of(quantity: str, job: Job) -> dict[str, Step]:
    found: dict[str, Step] = {}
    for name, prepare in CONTENDERS[quantity].items():
        try:
            found[name] = prepare(job)
        except NotImplementedError:
            continue
    return found


def compare(quantity: str, name: str, found: Results, wanted: Results) -> None:
    """Ours (`wanted`, which the tests hold against loops) and theirs."""
    for key, right in wanted.items():
        theirs = found[key]
        if isinstance(right, Kronecker):
            sides = [t for t in (right.B, right.A) if t is not None]
            assert len(sides) == len(theirs), key
            # they share out the number of positions between the sides in another way
            pairs = [(a / a.trace(), b / b.trace()) for a, b in zip(theirs, sides, strict=True)]
            for k, (a, b) in enumerate(pairs):
                # of a convolution, BackPACK sums the output side over positions before it is squared
                if k == 1 or (quantity not in RANDOM and len(right.shape) < 4):
                    close(a, b, (name, key))
            continue
        if quantity in RANDOM:
            assert 0.5 < theirs.sum() / right.sum() < 2, (name, key)
            continue
        close(theirs, right, (name, key))


def close(a: Tensor, b: Tensor, what: Any) -> None:
    assert a.shape == b.shape, (what, a.shape, b.shape)
    top = b.abs().max().item()
    worst = max(((s - t).abs().max().item() for s, t in zip(a.split(16), b.split(16), strict=True)), default=0.0)
    assert worst <= 2e-4 * top + 1e-12, (what, worst, top)  # single precision, and sums of thousands of terms


def drop(results: Results) -> None:
    """Nobody's results live into the next round, where their memory would be in the way."""


def size(results: Results) -> int:
    def of(t: Any) -> int:
        if isinstance(t, KroneckerSum):
            return sum(of(part) for part in t.parts)
        return sum(s.nbytes for s in (t.A, t.B) if s is not None) if isinstance(t, Kronecker) else t.nbytes

    return sum(of(t) for t in results.values())


@pytest.mark.parametrize(("workload", "quantity"), CELLS)
def test_speed(benchmark: Any, workload: str, quantity: str) -> None:
    torch.set_default_dtype(torch.float32)
    job = WORKLOADS[workload].job(DEVICE)
    steps = steps_of(quantity, job)
    ours = steps.pop("hookjac")
    wanted = ours()
    for name, step in steps.items():
        compare(quantity, name, step(), wanted)
    nbytes = size(wanted)
    assert not any(isinstance(t, JacTensor) for t in wanted.values()), "dense against dense"
    del wanted
    if not benchmark.enabled:
        benchmark.pedantic(ours)
        return
    steps["plain"] = contenders.plain(job)
    turns = measure.Turns(ours, steps)
    count = measure.rounds([ours, *steps.values()])
    benchmark.pedantic(lambda: drop(ours()), setup=turns, rounds=count)
    columns = C if quantity in ("jac", "ntk", "ggn_diag", "kfac exact", "hess_diag") else int(quantity in RANDOM)
    benchmark.group = workload
    benchmark.extra_info.update(
        workload=workload,
        quantity=quantity,
        peers=turns.medians(),
        peak={name: measure.peak(step) for name, step in {"hookjac": ours, **steps}.items()},
        floor=turns.medians()["plain"] + columns * measure.column(job) + nbytes / measure.bandwidth(DEVICE),
    )
