"""What is measured is what the table says it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import measure
from benchmarks.workloads import WORKLOADS, Job


@pytest.fixture(autouse=True)
def single() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_column_goes_through_the_whole_model(workload: str) -> None:
    """Down to what its first layer gave: the transformer has a parameter of its own, whose output is the model's."""
    job = WORKLOADS[workload].job("cpu")
    first, out = measure.earliest(job)
    assert first.grad_fn is not None
    assert first.grad_fn.name() in ("AddmmBackward0", "ConvolutionBackward0", "EmbeddingBackward0")
    assert first is not out
    (g,) = torch.autograd.grad(out, first, torch.randn_like(out))
    assert g.any()


def test_a_single_layer_has_nothing_before_its_output() -> None:
    first, out = measure.earliest(Job(WORKLOADS["small"], nn.Linear(3, 2), torch.randn(4, 3), torch.zeros(4)))
    assert first is out
