import os
from collections.abc import Iterator

import pytest
import torch

DEVICE = os.environ.get("HOOKJAC_TEST_DEVICE") or None  # "cuda": all tests there


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """float64 everywhere, and one thread: the models are tiny."""
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.set_default_device(DEVICE)
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(before)
    torch.set_num_threads(threads)
