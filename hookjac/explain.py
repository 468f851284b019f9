"""`hookjac.explain`: roads and costs of a model, before any column walks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hookjac import given
from hookjac.errors import HookjacError
from hookjac.explanation import Explanation
from hookjac.extend import extend
from hookjac.members import Members, as_it_was
from hookjac.quantity import Quantity, names
from hookjac.sharded import whole_awhile
from hookjac.tape import Select, select
from hookjac.watch import Start


def explain(
    model: nn.Module,
    inputs: Any,
    *quantities: str | Quantity,
    loss_fn: Callable[[Any], Tensor] | None = None,
    output: Select = None,
) -> Explanation:
    """Which road every layer and every parameter will take, and what each quantity will cost, before it is paid.

        print(hookjac.explain(model, x, loss_fn=lambda out: F.cross_entropy(out, y)))

    A *road* is how results are found: by a closed form (a rule), by the formulas of autograd's own nodes, or sample by
    sample where no rule helps. A *column* is what an ordinary backward carries down from the loss, a cotangent of every
    tensor that it passes; a quantity needs one or several.

    The model runs forward once, on the same random numbers as before and after, and what it keeps in buffers is put
    back; no backward runs, and nothing of a result's size is made. inputs: a tensor, a tuple of arguments, or a dict of
    arguments by name (a model that takes a list or a dict itself: a tuple of it). quantities: names or records; all, if
    none are named. loss_fn: of what the model returns; if none is given, half the sum of squares of the selected
    output. output: as for `extend`.

    Returns an `Explanation`: tables of layers, of parameters and of quantities, for a terminal or a notebook, or as
    data: `.rows`, `.layers`, `.quantities`, `.to_dict()`. FLOPs are counted from sizes; "backwards" are in units of a
    plain one, and count the step's own, which carries a single column anyway. Curvature counts D columns, one for each
    entry of a sample's outputs (under cross entropy one less will do). A quantity that would be refused says why; what
    no block would serve (batch normalisation in training) is refused here, too, and what the model raises is raised.
    Under `fully_shard` it is collective, as a forward is, and tells of the rank's own samples and of whole parameters.

    Cost: a forward; where `hess_diag` is asked for and the model is not piecewise linear, also one column's walk, to
    see where it bends.
    """
    asked = quantities or tuple(names())
    given.model("explain", model)
    given.function(optional=True, loss_fn=loss_fn)
    args, kwargs = arguments(inputs)
    block = _Foreseeing(model, *asked, output=output)
    with block, as_it_was(model), torch.enable_grad():
        out = model(*args, **kwargs)
        loss = _half_squares(select(out, output)) if loss_fn is None else loss_fn(out)
        given.loss("loss_fn", loss)
        loss.backward()
    return block.foreseen


class _Foreseeing(extend):
    """A block whose backwards do not run, but are looked at."""

    _passing = False
    foreseen: Explanation

    def _backward(self, start: Start) -> None:
        assert self._service is not None
        with whole_awhile(self._shards):
            members = Members(self.model)
            self.foreseen = self._service.foresee(start, members, members.trainable)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of a call, from a tensor, a tuple or a dict."""
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _half_squares(out: Tensor) -> Tensor:
    if not out.is_floating_point():
        raise HookjacError(f"the selected output is of {out.dtype}, which has no gradient: give loss_fn= or output=")
    return out.square().sum() / 2
