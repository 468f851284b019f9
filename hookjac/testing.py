"""Plain loops that everything here must equal, and `check_rule`, which holds a layer of yours to them.

No vmap anywhere: one backward for each entry of an output, one for each entry of a parameter.

N samples · C entries of one sample's output.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hookjac import given
from hookjac.extend import extend
from hookjac.quantity import Jac
from hookjac.rule import lookup
from hookjac.samples import random
from hookjac.switches import MATH_ATTENTION, Switch
from hookjac.tables import Table


def grad(output: Tensor, inputs: Tensor, seed: Tensor | None = None) -> Tensor:
    """d <seed, output> / d inputs, zeros where there is no path."""
    if not output.requires_grad:
        return torch.zeros_like(inputs)
    (found,) = torch.autograd.grad(output, inputs, seed, retain_graph=True, create_graph=True, allow_unused=True)
    if found is None:
        return torch.zeros_like(inputs)
    return found.to_dense() if found.is_sparse else found


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def jacobian(output: Tensor, p: Tensor) -> Tensor:  # [N, *out, *p]
    rows = [grad(entry, p).detach() for entry in output.reshape(-1)]
    return torch.stack(rows).reshape(*output.shape, *p.shape) if rows else p.new_zeros(*output.shape, *p.shape)


def hessian_diagonal(loss: Tensor, p: Tensor) -> Tensor:  # [*p]
    first = grad(loss, p).reshape(-1)
    entries = [grad(first[k], p).reshape(-1)[k].detach() for k in range(first.numel())]
    return torch.stack(entries).reshape(p.shape) if entries else torch.zeros_like(p)


def _own_weight_norm() -> Generator[None, None, None]:
    one: Any = torch
    other: Any = importlib.import_module("torch.nn.utils.weight_norm")
    own = one._weight_norm
    try:
        one._weight_norm = other._weight_norm = _weight_norm
        yield
    finally:  # without a loop or a call, at which a signal would be taken notice of
        one._weight_norm = own
        other._weight_norm = own


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    axes = list(range(v.dim())) if dim == -1 else [k for k in range(v.dim()) if k != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=True))


_WEIGHT_NORM = Switch(_own_weight_norm)


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, PyTorch runs functions that it differentiates twice, and rightly: attention by its definition, and weight
    norm, whose fused kernel has a wrong second derivative on torch 2.13."""
    with MATH_ATTENTION.held(), _WEIGHT_NORM.held():
        yield


def loops(
    model: nn.Module,
    run: Callable[[], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    penalty: Callable[[], Tensor] | None = None,
    *,
    hessian: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """By loops: parameter name -> "grad_sample", "jac", "ggn_diag", "hess_diag" and "grad" -> value.

    The loss is loss_of(run()) + penalty().
    hessian: False where PyTorch has no second derivative. Cost: a backward for each output entry and, for the Hessian,
    for each parameter entry.
    """
    given.model("loops", model)
    given.function(run=run, loss_of=loss_of)
    given.function(optional=True, penalty=penalty)
    given.flag(hessian=hessian)
    with twice_differentiable():
        output = run()
    _demand_output("run", output)
    N, rest = output.shape[0], output.shape[1:]
    free = output.detach().requires_grad_()
    value = loss_of(free)
    given.loss("the loss function", value)
    if penalty is not None:
        given.loss("penalty", penalty())
    slope = grad(value, free)  # dL/d output
    H = torch.stack(
        [torch.stack([grad(s, free)[n].detach().reshape(-1) for s in slope[n].reshape(-1)]) for n in range(N)]
    )  # [N, C, C]
    loss = loss_of(output) + (penalty() if penalty else 0.0)
    found: dict[str, dict[str, Tensor]] = {}
    for name, p in trainable(model).items():
        J = jacobian(output, p)
        rows = J.reshape(N, rest.numel(), *p.shape)
        per_sample = torch.stack(
            [
                sum((g * r for g, r in zip(slope[n].detach().reshape(-1), rows[n], strict=True)), torch.zeros_like(p))
                for n in range(N)
            ]
        ).detach()
        ggn = torch.zeros_like(p).detach()
        for n in range(N):
            for c in range(rest.numel()):
                ggn += torch.tensordot(H[n, c], rows[n], 1) * rows[n, c]
        if penalty is not None:
            per_sample = per_sample + grad(penalty(), p).detach() / N
            ggn = ggn + hessian_diagonal(penalty(), p)
        found[name] = {
            "grad_sample": per_sample,
            "jac": J,
            "ggn_diag": ggn,
            "hess_diag": hessian_diagonal(loss, p) if hessian else torch.zeros(0),
            "grad": grad(loss, p).detach(),
        }
    return found


def _demand_output(who: str, output: Any) -> None:
    expected = f"{who} must return the output [N, ...] of a sample or more, as a tensor of real floating-point numbers"
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.is_meta:
        raise TypeError(f"{expected}; got {given.said(output)}")
    if output.dim() == 0 or output.numel() == 0:
        raise ValueError(f"{expected}; got {given.said(output)}")


def random_loss(output: Tensor) -> Tensor:
    """Twice differentiable, a sum over samples, curved, different for every entry."""
    w = random(output.shape, 5, output.device, output.dtype)
    return (w * output).sum() + 0.3 * ((output - w).square() * (1 + w.square())).mean() + 0.1 * (output.sin() * w).sum()


@dataclass(frozen=True)
class Checked:
    """One result of one parameter: how it was found, and its largest error relative to the largest entry."""

    parameter: str
    quantity: str
    road: str
    why: str
    error: float
    fine: bool
    shapes: str = ""  # found and expected, where they differ


class Report:
    """What `check` and `check_rule` return: `rows`, a `Checked` each, printable."""

    def __init__(self, rows: list[Checked]) -> None:
        self.rows = rows

    @property
    def fine(self) -> bool:
        """Does every result equal the loops?"""
        return all(row.fine for row in self.rows)

    def __str__(self) -> str:
        table = [("parameter", "quantity", "road", "error", "", "why")]
        table += [(r.parameter, r.quantity, r.road, r.shapes or f"{r.error:.0e}", "ok" if r.fine else "WRONG", r.why)
                  for r in self.rows]  # fmt: skip
        return Table(table).plain()

    __repr__ = __str__


class _Between(nn.Module):
    """The module above a learned scale of its floating inputs, so that what it does to cotangents is seen."""

    def __init__(self, module: nn.Module, inputs: list[Any]) -> None:
        super().__init__()
        self.module = module
        self.scaled = [k for k, t in enumerate(inputs) if isinstance(t, Tensor) and t.is_floating_point() and t.dim()]
        scales = [random(inputs[k].shape[1:], k, inputs[k].device, inputs[k].dtype) / 4 + 1 for k in self.scaled]
        self.input_scale = nn.ParameterList(scales)

    def forward(self, *inputs: Any) -> Any:
        given = list(inputs)
        for k, scale in zip(self.scaled, self.input_scale, strict=True):
            given[k] = (given[k] * scale).sin()
        return self.module(*given)


def check_rule(
    module: nn.Module,
    *inputs: Any,
    loss: Callable[[Tensor], Tensor] = random_loss,
    hessian: bool = True,
    rtol: float = 1e-9,
    rule: str | None = None,
) -> Report:
    """Hold a layer, or any small model, to loops in float64: first order, Jacobian, GGN and Hessian diagonals.

    A copy of the module is cast to float64, and so are floating inputs [N, ...]. It runs for one sample and for all;
    as it is, and above a learned scale of its inputs (`input_scale`), whose results show what the module does to
    cotangents; Jacobian rows are asked for all together, one by itself, and N of them. The output's first axis must
    count the samples. Returns a `Report`; raises AssertionError with that report if a result has another shape than
    loops give, or is off by more than `rtol` of its largest entry.

    loss: of the output; by default one that is different for every entry, and curved.
    rule: the name of the rule that is meant to be checked; AssertionError if it was never used, so that no silent
    fallback passes for it. hessian: False where PyTorch has no second derivative. Cost: a backward for each entry of
    the output and of the parameters: take it small.
    """
    given.model("check_rule", module)
    given.function(loss=loss)
    given.flag(hessian=hessian)
    given.numbers(rtol=rtol)
    if rule is not None and not isinstance(rule, str):
        raise TypeError(f"rule must be the name of a rule, or None; got {given.said(rule)}")
    model = copy.deepcopy(module).double()
    cast = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    rows: list[Checked] = []
    used: set[str] = set()
    for args in (cast, [t[:1] if isinstance(t, Tensor) else t for t in cast]):
        between = _Between(model, args)
        for one in [model] if not between.scaled else [model, between]:
            if any(p.requires_grad for p in one.parameters()):
                rows += _check(one, args, loss, hessian, rtol)
                used |= {found.name for m in one.modules() if (found := lookup(m)) is not None}
    if not rows:
        raise ValueError(
            f"{type(module).__name__} has no parameter that requires a gradient, and no floating-point input [N, ...] "
            "was given: there is nothing to compare"
        )
    report = Report(rows)
    if not report.fine:
        raise AssertionError(f"{type(module).__name__} disagrees with plain autograd loops\n{report}")
    used |= {name for row in rows for name in row.why.split(";")[0].split(", ")}
    if rule is not None and rule not in used:
        raise AssertionError(
            f"rule {rule!r} was never used: it claims no such module, or could not serve the call\n{report}"
        )
    return report


def _check(
    model: nn.Module, args: list[Any], loss: Callable[[Tensor], Tensor], hessian: bool, rtol: float
) -> list[Checked]:
    state = torch.get_rng_state()

    def run() -> Tensor:
        torch.set_rng_state(state)  # dropout draws the same mask each time
        output = model(*args)
        _demand_output(f"the module {type(model).__name__}", output)
        return output  # type: ignore[no-any-return]

    asked = ("grad_sample", "jac", "ggn_diag", *(("hess_diag",) if hessian else ()))
    wanted = loops(model, run, loss, hessian=hessian)
    with extend(model, *asked) as ext:
        output = run()
        loss(output).backward()
    told, rows = ext.explain().to_dict()["parameters"], []
    for name, p in trainable(model).items():
        for q in asked:
            road = told[name]["hessian"] if q == "hess_diag" else told[name]["road"]
            rows.append(_compared(name, q, road, told[name]["why"], getattr(p, q), wanted[name][q], rtol))
    N, C = output.shape[0], output.shape[1:].numel()
    for V in sorted({1, N} - {C}):
        chosen = list(range(C))[:: max(1, C // V)][:V]
        if len(chosen) == V:
            with extend(model, Jac(outputs=chosen)):
                loss(run()).backward()
            for name, p in trainable(model).items():
                right = wanted[name]["jac"].reshape(N, C, *p.shape)[:, chosen]
                why = told[name]["why"]
                rows.append(_compared(name, f"jac, {V} rows", told[name]["road"], why, vars(p)["jac"], right, rtol))
    return rows


def _compared(name: str, q: str, road: str, why: str, found: Tensor, right: Tensor, rtol: float) -> Checked:
    if found.shape != right.shape:
        return Checked(name, q, road, why, float("inf"), False, f"{list(found.shape)} not {list(right.shape)}")
    top = right.abs().max().item() if right.numel() else 0.0
    off = (found - right).abs().max().item() if right.numel() else 0.0
    return Checked(name, q, road, why, off / top if top else off, off <= rtol * top + 1e-13)
