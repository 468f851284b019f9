"""Some recipes of the sweep, and those that it found to be wrong: `python tests/sweep.py` runs more."""

from __future__ import annotations

import collections

import pytest
from recipes import Recipe
from sweep import run, sweep

EXAMPLES, PARTS = 50, 8

WRONG = {
    "random columns of an output [N]": Recipe(
        steps=(("linear", 0),),
        asked=(("ggn_diag_mc", {"samples": 400, "generator": 0}), ("grad_sample", {})),
        head="one",
    ),
    "random columns of an output [N, T, C] under a loss that bends twice": Recipe(
        steps=(("halves", 0),),
        asked=(("kfac", {"fisher": "mc", "samples": 400, "generator": 1, "sharing": "expand"}),),
        loss="focal",
        head="positions",
        T=3,
    ),
    "the modulus of complex numbers was taken for piecewise linear": Recipe(
        steps=(("fourier", 0),), asked=(("hess_diag_sample", {}), ("hess_diag", {})), given="ids", T=3, d=3
    ),
    "the graph of a gradient that was written into place": Recipe(
        steps=(("lora", 0),), asked=(("grad_sample", {}),), T=2, way="create_graph"
    ),
    "a penalty was differentiated twice through all of the network, fused attention included": Recipe(
        steps=(("self-attention", 0),), asked=(("ggn_diag", {}), ("ggn_block", {})), T=2, penalty="wave"
    ),
    "a loss of inputs that require a gradient was taken for what a penalty meets": Recipe(
        steps=(("tanh", 0), ("tanh", 0)),
        asked=(("grad_sample", {}),),
        penalty="wave",
        output="last",
        used=("middle",),
        seed=1,
    ),
    "samples along the features of a weight that is generated, by chance": Recipe(
        steps=(("linear", 0), ("in-place relu", 0), ("generated weight", 0)), asked=(("grad_sample", {}),), C=1
    ),
    "a root of nothing but padding": Recipe(
        steps=(("padded table", 0),), asked=(("grad_sq_sum", {}), ("ggn_sqrt", {})), given="ids", d=3, C=1, seed=285
    ),
    "a root of a softmax that is sure, of which rounding lies below zero": Recipe(
        steps=(("no bias", 0), ("where", 0), ("where", 0), ("where", 0)),
        asked=(("ggn_sqrt", {}),),
        loss="cross entropy",
        given="ids",
        head="positions",
        T=2,
        d=3,
        C=1,
    ),
    "eigenvectors of a loss in half precision were asked of LAPACK, which knows none": Recipe(
        steps=(("linear", 0),),
        asked=(("ggn_sqrt", {}), ("ggn_diag_mc", {"samples": 400, "generator": 4})),
        T=2,
        C=3,
        dtype="bfloat16",
    ),
    "a group norm's kernel was given columns whose rows do not lie one after the other": Recipe(
        steps=(("temperature", 0), ("group norm", 0)), asked=(("grad_sample", {}),), T=3, C=1
    ),
    "second derivatives of a group norm, batched by PyTorch, were those of other columns": Recipe(
        steps=(("linear", 0), ("group norm", 0)),
        asked=(("hess_block", {"road": "entries"}), ("hess_diag", {"road": "entries"})),
        N=1,
        T=3,
        d=3,
        C=1,
    ),
    "a kernel, of which some parameters' parts are constant, was added up in place under create_graph": Recipe(
        steps=(("tanh", 0),),
        asked=(("grad_sample", {}), ("ntk", {})),
        output="side",
        way="create_graph",
        later=("freeze",),
    ),
}


@pytest.mark.parametrize("part", range(PARTS))
def test_the_sweep(part: int) -> None:
    """Equal to plain autograd, at the first step and at those that follow, or refused for a reason that is known."""
    came: collections.Counter[str] = collections.Counter()
    found = sweep(part, EXAMPLES, came)
    assert found is None, f"{found[1]}\nrun({found[0]})"  # paste the call as a test
    assert came["equal"] > 0.8 * EXAMPLES


@pytest.mark.parametrize("name", WRONG)
def test_recipes_that_were_wrong(name: str) -> None:
    came: collections.Counter[str] = collections.Counter()
    run(WRONG[name], came)
    assert came == {"equal": 1}


def test_a_bend_downwards_is_no_rounding() -> None:
    """Of a loss of outputs in half precision, which it casts before it bends: an error, not a root of zero."""
    came: collections.Counter[str] = collections.Counter()
    steps = (("convolution", 0), ("replicating", 0), ("softplus", 0), ("functional gelu", 0), ("circular", 0))
    asked = (("ggn_sqrt", {}),)
    run(
        Recipe(steps=steps, asked=asked, loss="similarity", given="ids", N=1, T=2, C=1, dtype="bfloat16", seed=13), came
    )
    assert any("not convex" in said for said in came)
