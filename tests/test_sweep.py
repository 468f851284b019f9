"""The first few hundred cases of the sweep: `python tests/sweep.py` runs more."""

from __future__ import annotations

import collections

import pytest
from sweep import case, run

CASES, PARTS = 400, 8
KNOWN = ("the loss depends on par", "selected output depe", "the loss reaches par", "the loss uses outputs")


@pytest.mark.parametrize("part", range(PARTS))
def test_the_sweep(part: int) -> None:
    """Equal to plain autograd, at the first step and at the next two, or refused for a reason that is known."""
    came = collections.Counter(run(case(number)) for number in range(part, CASES, PARTS))
    refused = {what for what in came if what != "equal"}
    assert all(any(words in what for words in KNOWN) for what in refused), refused
    assert came["equal"] > 0.8 * sum(came.values())


@pytest.mark.parametrize("number", [2008387])  # an output under a layer of zeros, where the probe for samples vanishes
def test_cases_that_were_wrong(number: int) -> None:
    assert run(case(number)) == "equal"
