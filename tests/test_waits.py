"""On a GPU, to look at a value is to wait for it: once a structure is known, who does, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, N
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hookjac import extend

# operators whose result, or its shape, the processor has to know
WAITING = {"_local_scalar_dense", "nonzero", "argwhere", "masked_select", "equal", "is_nonzero", "item", "bincount",
           "_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(t, Tensor) and t.dtype is torch.bool for t in (args[1] if isinstance(args[1], list) else ())
        )
        if name in WAITING or masks:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def dense(depth: int = 1) -> nn.Module:
    inner: list[nn.Module] = [layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.ReLU())]
    return nn.Sequential(nn.Linear(D, 6), nn.ReLU(), *inner, nn.Linear(6, C))


def convolutional(depth: int = 1) -> nn.Module:
    inner = [layer for _ in range(depth) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(2, 4, 2), nn.ReLU(), *inner, nn.Flatten(), nn.Linear(36, C))


def table(depth: int = 1) -> nn.Module:
    inner = [layer for _ in range(depth) for layer in (nn.Linear(9, 9), nn.ReLU())]
    return nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), *inner, nn.Linear(9, C))


NETS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Tensor]]] = {
    "dense": (dense, lambda: torch.randn(N, D)),
    "convolution": (convolutional, lambda: torch.randn(N, 2, 4, 4)),
    "table": (table, lambda: torch.randint(5, (N, 3))),
}
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross entropy": lambda o: F.cross_entropy(o, torch.arange(N) % C),
    "squared": lambda o: F.mse_loss(o, torch.ones_like(o)),
}
FIRST = ["grad_sample", "grad_sample_norm", "grad_sample_gram", "grad_sq_sum", "grad_var", "jac", "ntk"]
SECOND = ["ggn_diag", "ggn_diag_sample", "ggn_diag_mc", "ggn_block", "hess_diag", "hess_diag_sample", "kfac"]
IN_TABLES = {"grad_sample", "jac"}  # the others add up what was looked up twice


def waits(model: nn.Module, data: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], *asked: str) -> Counter[str]:
    """Of one step, after others."""
    for _ in range(4):
        x = data()
        model.zero_grad()
        with Waits() as seen:
            if asked:
                with extend(model, *asked):
                    loss(model(x)).backward()
            else:
                loss(model(x)).backward()
    return seen.found


def test_what_is_counted() -> None:
    t = torch.randn(3)
    with Waits() as seen:
        bool(t.sum() > 0)
        t[t > 0]
        t.index_put_((t > 0,), torch.tensor(1.0))  # t[t > 0] = 1.0 is a fill on torch 2.15, which waits for nothing
        t.nonzero()
        torch.equal(t, t)
        t[torch.tensor([0])] + t[:2]
    assert seen.found == {"_local_scalar_dense": 1, "index": 1, "index_put_": 1, "nonzero": 1, "equal": 1}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETS)
def test_plain_steps_wait_for_nothing(name: str, loss: str) -> None:
    build, data = NETS[name]
    assert not waits(build(1), data, LOSSES[loss])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("asked", FIRST)
@pytest.mark.parametrize("name", NETS)
def test_gradients_and_jacobians_wait_for_nothing(name: str, asked: str, loss: str) -> None:
    if name == "table" and asked not in IN_TABLES:
        pytest.skip("rows that were looked up twice are found by sorting")
    build, data = NETS[name]
    assert not waits(build(1), data, LOSSES[loss], asked)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("asked", [*FIRST, *SECOND])
@pytest.mark.parametrize("name", NETS)
def test_waits_do_not_grow_with_depth(name: str, asked: str, loss: str) -> None:
    """A question or two about the loss, and some for a table; none for each layer."""
    build, data = NETS[name]
    shallow, deep = (waits(build(depth), data, LOSSES[loss], asked) for depth in (1, 4))
    assert shallow == deep
    assert shallow.total() <= (6 if name == "table" else 2)
