"""Opacus' own tests of per-sample gradients, unmodified, with ours in the place of its GradSampleModule.

They ship in its wheel and compare with one backward per sample. Each of their methods is a test here; what cannot apply
is left out by name. They draw few examples (they were written for hundreds), always the same.
"""

from __future__ import annotations

import importlib
import pkgutil
import unittest
from collections.abc import Iterator
from typing import Any

import opacus.tests.grad_samples
import opacus.utils.per_sample_gradients_utils
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from hookjac.clients.opacus import grad_samples

open_blocks: list[Any] = []


def close_all() -> None:
    while open_blocks:
        open_blocks.pop().__exit__()


class SamplesFirst(nn.Module):
    """One tensor, the samples its first axis: what we differentiate."""

    def __init__(self, model: nn.Module, batch_first: bool) -> None:
        super().__init__()
        self.model, self.batch_first = model, batch_first

    def forward(self, *x: Any) -> Tensor:
        out = self.model(*x)
        if isinstance(out, PackedSequence):
            out, self.lengths = pad_packed_sequence(out, batch_first=True)
            return out
        self.lengths = None
        return out if self.batch_first else out.transpose(0, 1)


class StandIn(nn.Module):
    """What Opacus' tests need of its GradSampleModule."""

    def __init__(self, model: nn.Module, batch_first: bool = True, loss_reduction: str = "mean", **_: Any) -> None:
        super().__init__()
        self.inner = SamplesFirst(model, batch_first)
        open_blocks.append(grad_samples(self.inner, loss_reduction=loss_reduction))
        open_blocks[-1].__enter__()

    @property
    def _module(self) -> nn.Module:
        """Where the tests read the results: the backward is over."""
        close_all()
        return self.inner.model

    def forward(self, *x: Any) -> Any:
        out = self.inner(*x)
        if self.inner.lengths is not None:
            return pack_padded_sequence(out, self.inner.lengths, batch_first=True, enforce_sorted=False)
        return out if self.inner.batch_first else out.transpose(0, 1)


def wrap_model(model: nn.Module, grad_sample_mode: str, **options: Any) -> StandIn:
    return StandIn(model, **options)


def methods() -> Iterator[Any]:
    package = opacus.tests.grad_samples
    before = settings.get_current_profile_name()
    settings.register_profile("few", max_examples=6, derandomize=True, database=None, deadline=None)
    settings.load_profile("few")
    try:
        modules = [
            importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)
        ]
    finally:
        settings.load_profile(before)
    for module in modules:
        for suite in unittest.defaultTestLoader.loadTestsFromModule(module):
            for case in suite:
                yield pytest.param(module, case, id=f"{module.__name__.split('.')[-1]}.{case._testMethodName}")


@pytest.mark.parametrize(("module", "case"), list(methods()))
def test_of_opacus(module: Any, case: unittest.TestCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opacus.utils.per_sample_gradients_utils, "wrap_model", wrap_model)
    result = unittest.TestResult()
    try:
        case.run(result)
    finally:
        close_all()
        torch.use_deterministic_algorithms(False)
    assert result.testsRun == 1
    assert not result.skipped
    assert not result.failures + result.errors, "\n".join(trace for _, trace in result.failures + result.errors)
