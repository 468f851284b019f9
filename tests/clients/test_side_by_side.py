"""Programs of pages and docstrings that call BackPACK or Opacus."""

from __future__ import annotations

import re
import textwrap
import warnings
from typing import Any

import pytest
import torch
from shown import PAGES, examples, fenced
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hookjac
from hookjac.clients.opacus import PrivacyEngine, ghost_clipping


def run(snippets: list[str], names: dict[str, Any]) -> None:
    """With the warnings of their hooks off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for snippet in snippets:
            exec(snippet, names)


def test_the_page_for_those_who_come_from_backpack() -> None:
    torch.set_default_dtype(torch.float32)
    snippets = fenced(PAGES["backpack"].read_text())
    assert len(snippets) == 3
    run(snippets, {"__name__": "page"})


def test_the_part_on_opacus_for_those_who_come_from_elsewhere() -> None:
    torch.set_default_dtype(torch.float32)
    page = PAGES["coming"].read_text()
    (part,) = re.findall(r"^## Opacus\n.*?(?=^## )", page, re.S | re.M)
    assert len(fenced(part)) == 2
    run([fenced(page)[0], *fenced(part)], {"__name__": "page"})


EXAMPLES = {place: code for place, code in examples().items() if place.startswith("clients")}


@pytest.mark.parametrize("place", EXAMPLES)
def test_examples_in_docstrings(place: str) -> None:
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    x, y = torch.randn(10, 4), torch.randint(3, (10,))
    hooks, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=5), poisson_sampling=False,
        noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode="no_op", wrap_model=False,
    )  # fmt: skip
    names = {"hookjac": hookjac, "model": model, "hooks": hooks, "x": x, "y": y}
    if "ghost" in EXAMPLES[place]:
        names["ghost"], optimizer, criterion = ghost_clipping(hooks, optimizer, criterion)
    before = model.weight.detach().clone()
    run([textwrap.dedent(EXAMPLES[place])], names | {"optimizer": optimizer, "criterion": criterion})
    assert not torch.equal(before, model.weight), "a step was taken"
