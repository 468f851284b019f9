"""Every module of torch.nn against loops, and none forgotten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Fn, N, random_loss
from every_layer import CONTAINERS, LAYERS, LOSSES, REFUSED, WITHOUT_LOOPS, Row
from layer_table import PAGE, page
from oracle import close, compare, expected, jacobian, trainable
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hookjac import Jac, extend, rule

ROWS = [pytest.param(row, id=f"{name}-{k}") for name, rows in LAYERS.items() for k, row in enumerate(rows)]


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "_RULES", {})
    monkeypatch.setattr(rule, "_NODES", {})


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.usefixtures("hidden")
def test_exact_without_rules(row: Row) -> None:
    check(row)


@pytest.mark.parametrize("row", ROWS)
def test_exact(row: Row) -> None:
    check(row)


@pytest.mark.parametrize("row", ROWS)
def test_any_number_of_columns(row: Row) -> None:
    """V in {1, N, other}: some of one sample's outputs, or all."""
    torch.manual_seed(3)
    layer, args = row.build(), row.inputs()

    def wide(m: Any, *args: Any) -> Tensor:
        out = m.inner(*args)
        out = out.reshape(len(out), -1)
        return torch.cat([(out * (1 + k)).sin() for k in range(N // out.shape[1] + 1)], 1)

    model = Fn(wide, inner=layer)
    with torch.no_grad():
        model(*args)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    with sdpa_kernel(SDPBackend.MATH):
        output = model(*args)
    C = output.shape[1]
    wanted = {name: jacobian(output, p) for name, p in trainable(model).items()}
    for V in sorted({1, N, C}):
        rows = torch.randperm(C)[:V]
        torch.set_rng_state(state)
        with extend(model, Jac(outputs=rows)):
            random_loss(model(*args)).backward()
        for name, p in trainable(model).items():
            close(p.jac, wanted[name][:, rows], (name, V))


def check(row: Row) -> None:
    torch.manual_seed(3)
    model, args = row.build(), row.inputs()
    with torch.no_grad():
        model(*args)  # lazy modules take shape

    def run() -> torch.Tensor:
        torch.manual_seed(4)
        return model(*args)  # type: ignore[no-any-return]

    asked = ("grad_sample", "jac", "ggn_diag") + (("hess_diag",) if row.hessian else ())
    wanted = expected(model, run, random_loss, hessian=row.hessian)
    with extend(model, *asked):
        random_loss(run()).backward()
    compare(model, wanted, asked)


def test_none_is_forgotten() -> None:
    known = {*LAYERS, *CONTAINERS, *REFUSED, *WITHOUT_LOOPS, *LOSSES}
    found = {n for n in dir(nn) if isinstance(getattr(nn, n), type) and issubclass(getattr(nn, n), nn.Module)}
    assert found == known, "torch.nn gained (or lost) a module: add its row, or say why there is none"


def test_the_page_says_what_is_so() -> None:
    assert PAGE.read_text() == page(), "run: python tests/layer_table.py"
