"""Opacus' own tests of per-sample gradients, unmodified, with ours in the place of its GradSampleModule.

They ship in its wheel, and compare with one backward per sample. Each of their methods is a test here; what cannot
apply is left out by name. Where hypothesis draws, it draws few examples (they were written for a hundred), always the
same.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any

import opacus.grad_sample.utils
import opacus.tests.grad_samples
import opacus.utils.per_sample_gradients_utils
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from hookjac.clients.opacus import GhostClipping, grad_samples

EXAMPLES = 20
LEFT_OUT = {
    r"embedding_norm_sample_test\.": "calls a function of Opacus' that finds norms; no model runs",
    r"\.test_unfold2d": "compares two ways to unfold; no model runs",
    r"BatchMemoryManagerTest\.test_empty_batch": "Opacus skips it itself",
    r"ManagerTestWith|AccumulationTestFunctorch": "the same tests again, in other modes of Opacus'; ours has one",
    r"DPTensorArithmeticTest\.": "arithmetic of Opacus' loss, with mocks; no model runs",
    r"\.test_multidevice": "needs two GPUs",
    r"ClippingTest\.(?!test_(norm_calc|weight_update))": "the wrapper itself: hooks, state_dict, refusals",
}


# What stands in ---------------------------------------------------------------------------------------------------

_OPEN: list[Callable[[], None]] = []  # how to close what the tests have opened
_CALLS: list[nn.Module] = []  # what stood in was called


class SamplesFirst(nn.Module):
    """One tensor, the samples its first axis: what we differentiate."""

    def __init__(self, model: nn.Module, batch_first: bool) -> None:
        super().__init__()
        self.model, self.batch_first = model, batch_first

    def forward(self, *x: Any) -> Tensor:
        self.lengths, out = None, self.model(*x)
        if isinstance(out, PackedSequence):
            out, self.lengths = pad_packed_sequence(out, batch_first=True)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out


class StandIn(nn.Module):
    """What the tests need of GradSampleModule."""

    def __init__(self, model: nn.Module, batch_first: bool = True, loss_reduction: str = "mean", **_: Any) -> None:
        super().__init__()
        self.inner, self.loss_reduction = SamplesFirst(model, batch_first), loss_reduction
        self.accumulate, self.block = True, None
        for p in model.parameters():
            if p.requires_grad:
                p.grad_sample = None
        _OPEN.append(self.close)

    def forward(self, *x: Any) -> Any:
        _CALLS.append(self)
        if self.block is None:
            # batches of sequences and of bags have no axis of samples, by which to replace some
            self.block = grad_samples(
                self.inner, loss_reduction=self.loss_reduction, accumulate=self.accumulate, independent=True
            )
            self.block.__enter__()
        out = self.inner(*x)
        if self.inner.lengths is not None:
            return pack_padded_sequence(out, self.inner.lengths, batch_first=True, enforce_sorted=False)
        return out if self.inner.batch_first else out.transpose(0, 1)

    @property
    def _module(self) -> nn.Module:
        """Where the tests read the results: the backward is over, and the next one may be plain."""
        self.close()
        return self.inner.model

    def close(self) -> None:
        if self.block is not None:
            self.block.__exit__()
            self.block = None

    def forbid_grad_accumulation(self) -> None:
        self.accumulate = False


class GhostStandIn(nn.Module):
    """What they need of GradSampleModuleFastGradientClipping."""

    def __init__(self, model: nn.Module, max_grad_norm: float, loss_reduction: str = "mean", **_: Any) -> None:
        super().__init__()
        self.inner, self.loss_reduction = model, loss_reduction
        optimizer: Any = types.SimpleNamespace(max_grad_norm=max_grad_norm, loss_reduction=loss_reduction)
        self.ghost = GhostClipping(model, optimizer)  # theirs is made before the optimizer
        self.disable_hooks = self.ghost.disable_hooks
        _OPEN.append(self.ghost.disable_hooks)

    def enable_hooks(self) -> None:
        """At the next forward: in between, the tests run another model."""

    def forward(self, x: Tensor) -> Tensor:
        _CALLS.append(self)
        self.ghost.enable_hooks()
        return self.inner(x)

    def get_clipping_coef(self) -> Tensor:
        for name, p in self.inner.named_parameters():
            norms = self.ghost._fresh[name]
            p._norm_sample = norms * len(norms)  # the tests look at each parameter's
        return self.ghost.get_clipping_coef()


# Their tests ------------------------------------------------------------------------------------------------------


class FakeData(torch.utils.data.Dataset):
    """Of torchvision, which is not here, what they import: random images."""

    def __init__(self, size: int, image_size: tuple[int, ...], num_classes: int, transform: Any) -> None:
        self.images = torch.randn(size, *image_size)
        self.labels = torch.randint(num_classes, (size,))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        if n >= len(self):
            raise IndexError(n)
        return self.images[n], self.labels[n]


def modules() -> Iterator[types.ModuleType]:
    """With few examples, and something for torchvision, as they are imported."""
    names = [f"grad_samples.{m.name}" for m in pkgutil.iter_modules(opacus.tests.grad_samples.__path__)]
    names += ["per_sample_gradients_utils_test", "batch_memory_manager_test", "gradient_accumulation_test"]
    names += ["grad_sample_module_fast_gradient_clipping_test"]
    nothing: Any = lambda *_, **__: None
    fakes = {
        "torchvision": {},
        "torchvision.transforms": dict.fromkeys(("Compose", "Normalize", "ToTensor"), nothing),
        "torchvision.datasets": {"FakeData": FakeData},
        "torchvision.models": {"mobilenet_v3_small": nothing},
    }
    before = settings.get_current_profile_name()
    settings.register_profile("few", max_examples=EXAMPLES, derandomize=True, database=None, deadline=None)
    settings.load_profile("few")
    for name, content in fakes.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
    try:
        for name in names:
            yield importlib.import_module(f"opacus.tests.{name}")
    finally:
        settings.load_profile(before)
        for name in fakes:
            del sys.modules[name]


def found() -> Iterator[tuple[str, types.ModuleType, unittest.TestCase]]:
    for module in list(modules()):
        for suite in unittest.defaultTestLoader.loadTestsFromModule(module):
            for case in suite:
                assert isinstance(case, unittest.TestCase)
                # what a module imports from another is tested there
                if type(case).__module__ == module.__name__:
                    where = module.__name__.removeprefix("opacus.tests.").removeprefix("grad_samples.")
                    yield f"{where}.{type(case).__name__}.{case._testMethodName}", module, case


TESTS = list(found())


def test_nothing_is_left_out_that_is_not_there() -> None:
    for pattern in LEFT_OUT:
        assert any(re.search(pattern, name) for name, *_ in TESTS), pattern


@pytest.mark.parametrize(
    ("module", "case"),
    [
        pytest.param(module, case, id=name)
        for name, module, case in TESTS
        if not any(re.search(pattern, name) for pattern in LEFT_OUT)
    ],
)
def test_of_opacus(module: Any, case: unittest.TestCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opacus.grad_sample.utils, "get_gsm_class", lambda mode: StandIn)
    for name, ours in (
        ("get_gsm_class", lambda mode: StandIn),
        ("GradSampleModuleFastGradientClipping", GhostStandIn),
    ):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, ours)
    if case._testMethodName == "test_asymetric_dilation_and_kernel_size":
        monkeypatch.setattr(module, "GradSampleModule", StandIn)  # elsewhere in that module its table of rules is used
    torch.set_default_dtype(torch.float32)  # as they are meant
    _CALLS.clear()
    result = unittest.TestResult()
    try:
        case.run(result)
    finally:
        while _OPEN:
            _OPEN.pop()()
        torch.use_deterministic_algorithms(False)
    assert result.testsRun == 1
    assert not result.skipped
    assert not result.failures + result.errors, "\n".join(trace for _, trace in result.failures + result.errors)
    assert _CALLS, "it ran past us"
