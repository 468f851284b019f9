"""What K-FAC remembers of one parameter: moving averages of its factors, and what they were last solved for.

All of it lies in the optimizer's state, under plain names and as tensors, so that a state dict has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import hookjac

State = dict[str, Any]


def average(state: State, shape: torch.Size) -> hookjac.Kronecker:
    """That of the batches so far."""
    return hookjac.Kronecker(state["A"], state["B"], shape, state["swapped"])


def factors(found: Any) -> list[Tensor]:
    """Those of a pair; none where there is no pair, or a sum of several."""
    pair = found.source if isinstance(found, hookjac.KroneckerEigen) else found
    if not isinstance(pair, hookjac.Kronecker):
        return []
    return [pair.B] if pair.A is None else [pair.A, pair.B]


def learn(state: State, found: hookjac.Kronecker | hookjac.KroneckerEigen, decay: float) -> None:
    """Of this batch's factors; and, where those are in a basis (EKFAC), of the eigenvalues there."""
    source, basis = (found.source, found) if isinstance(found, hookjac.KroneckerEigen) else (found, None)
    assert isinstance(source, hookjac.Kronecker)
    if not source.rows:  # not reached by this batch: no news of it
        return
    if "B" not in state:
        state.update(A=source.A, B=source.B, swapped=source.swapped)
        if basis is not None:
            state.update(Q_A=basis.Q_A, Q_B=basis.Q_B, values=basis.values)
        return
    mean = average(state, source.shape).lerp(source, 1 - decay)
    state.update(A=mean.A, B=mean.B)
    if basis is not None:
        state["values"] = torch.lerp(state["values"], basis.values, 1 - decay)


def invert(states: Sequence[tuple[State, torch.Size, float]], group: Any = None) -> None:
    """The inverse of each average, under its damping; over a process group each is made on one rank."""
    averages = [(average(state, shape), damping) for state, shape, damping in states]
    if group is None:
        inverses = [mean.inverse(damping) for mean, damping in averages]
    else:
        damped = [mean.damped(damping) for mean, damping in averages]
        found = iter(hookjac.distributed.inverse([t for k in damped for t in (k.A, k.B) if t is not None], group))
        inverses = [replace(k, A=None if k.A is None else next(found), B=next(found)) for k in damped]
    for (state, *_), inverse in zip(states, inverses, strict=True):
        state.update(A_inverse=inverse.A, B_inverse=inverse.B)


def turn(state: State, shape: torch.Size) -> None:
    """To the average's eigenvectors. Eigenvalues are the diagonal of the same matrix in the new basis: (Qnewᵀ Q)² times
    those of the old."""
    new = average(state, shape).eigen()
    values = (new.Q_B.mT @ state["Q_B"]).square() @ state["values"]
    if new.Q_A is not None:
        values = values @ (new.Q_A.mT @ state["Q_A"]).square().mT
    state.update(Q_A=new.Q_A, Q_B=new.Q_B, values=values)


def basis(state: State) -> hookjac.KroneckerEigen:
    """The one to ask for the next batch's eigenvalues in."""
    source = hookjac.Kronecker(None, state["B"], torch.Size([len(state["B"])]))
    return hookjac.KroneckerEigen(state["Q_A"], state["Q_B"], state["values"], source)


def solve(state: State, g: Tensor, damping: float) -> Tensor:
    """F⁻¹ g: by the eigenvalues and damping where there is a basis, else by the inverses, which have their damping."""
    if "Q_B" not in state:
        return hookjac.Kronecker(state["A_inverse"], state["B_inverse"], g.shape, state["swapped"]) @ g
    values = state["values"].clamp(min=0)
    return hookjac.KroneckerEigen(state["Q_A"], state["Q_B"], values, average(state, g.shape)).solve(g, damping)


def adam(state: State, g: Tensor) -> Tensor:
    """The direction of Adam with its usual constants (Kingma & Ba 2015)."""
    first, second = (state.setdefault(key, torch.zeros_like(g)) for key in ("first", "second"))
    state["seen"] = state.get("seen", 0) + 1
    first.lerp_(g, 0.1)
    second.lerp_(g.square(), 0.001)
    return first / (1 - 0.9 ** state["seen"]) / ((second / (1 - 0.999 ** state["seen"])).sqrt() + 1e-8)
