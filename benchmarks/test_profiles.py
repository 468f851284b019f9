"""Shares are shares of a step, and they are of the cells that the table calls dearest."""

from __future__ import annotations

import pytest
import torch

from benchmarks import contenders, profiles, report
from benchmarks.workloads import WORKLOADS


def test_shares_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "SECONDS", 0.0)
    torch.set_default_dtype(torch.float32)
    step = contenders.CONTENDERS["kfac"]["hookjac"](WORKLOADS["small"].job("cpu"))
    found = profiles.Profile("small", "kfac", 2e-3, 1e-3, profiles.shares(step))
    assert all(a.share >= b.share > -1e-9 for a, b in zip(found.operators, found.operators[1:], strict=False))
    assert {"aten::addmm", "aten::copy_"} <= {s.operator for s in found.operators}
    assert 0 < found.outside < 1
    assert len(profiles.rows(found)) == profiles.OPERATORS + 2
    assert found.heading.startswith("`kfac`, small (MLP 64-64x2-10, ReLU, N=64): 2 ms, 2 plain steps; ")


def test_dearest() -> None:
    cells = [report.Cell("small", str(k), ours, plain, {}, {}, 0.0, 1)
             for k, (ours, plain) in enumerate([(3, 1), (9, 4), (1, 1), (8, 2), (7, 1), (12, 3), (2, 1)])]  # fmt: skip
    assert [c.quantity for c in profiles.dearest(report.Results({}, cells))] == ["4", "3", "5", "0", "1"]
