import os
from collections.abc import Iterator

import pytest
import torch
from workers import Workers, working

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


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two processes of a gloo group."""
    with working(2, tmp_path_factory.mktemp("two")) as workers:
        yield workers


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Three of them."""
    with working(3, tmp_path_factory.mktemp("three")) as workers:
        yield workers
