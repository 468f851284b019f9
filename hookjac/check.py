"""`hookjac.check`: results on a model of yours against plain autograd, entry by entry, on a few entries of each.

N samples · C entries of one sample's output · k one entry of a parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hookjac.errors import HookjacError
from hookjac.extend import extend
from hookjac.tape import Select, select
from hookjac.testing import Checked, Report, grad, trainable, twice_differentiable

_OURS = ("grad_sample", "jac", "hess_diag")


def check(
    model: nn.Module,
    inputs: Any,
    loss_fn: Callable[[Any], Tensor],
    *quantities: str,
    entries: int = 5,
    seed: int = 0,
    output: Select = None,
    rtol: float = 1e-8,
) -> Report:
    """Hold a model to plain autograd, in float64, on `entries` random entries of every parameter.

        print(hookjac.check(model, x, lambda out: F.cross_entropy(out, y)))

    A copy is made of the model, cast to float64 as are floating inputs; yours is not touched. inputs: a tensor, a tuple
    of arguments, or a dict of them. loss_fn: of what the model returns. quantities: grad_sample, jac and hess_diag, if
    none are named. output: as for `extend`.

    What is sampled is exact: entry k of the Jacobian by one product with its unit vector, which with the loss's slope
    and Hessian in the outputs also gives entry k of per-sample gradients, their squares and variance, and of the
    Gauss-Newton diagonal; a row of the Hessian by a second backward; a sample's norm by its own backward. kfac is held
    to its definition only by the library's own tests and is refused here, as are random estimates.

    Returns a `Report`: parameter, quantity, road, largest error relative to the largest entry seen, verdict. `fine`
    tells whether all errors are below `rtol`. Cost: some backwards for each entry.
    """
    for q in quantities:
        if not isinstance(q, str):
            raise TypeError(f"check takes names of quantities, got {q!r:.80}: options change what there is to compare")
        if q not in _CHECKS:
            raise ValueError(f"check knows no entry-by-entry definition of {q!r}. It knows {', '.join(_CHECKS)}.")
    asked = quantities or _OURS
    if entries < 1:
        raise ValueError(f"entries must be positive, got {entries}")
    twin = _copied(model)
    args, kwargs = _arguments(inputs)
    truth = _Truth(twin, lambda: twin(*args, **kwargs), loss_fn, output)
    with extend(twin, *asked, output=output) as ext:
        loss_fn(truth.call()).backward()
    told, rows = ext.explain().to_dict(), []
    draw = torch.Generator().manual_seed(seed)
    for name, p in trainable(twin).items():
        picks = torch.randperm(p.numel(), generator=draw)[:entries].tolist()
        for q in asked:
            road = told[name]["hessian"] if q.startswith("hess") and told[name]["hessian"] else told[name]["road"]
            rows.append(_row(name, q, road, told[name]["why"], _CHECKS[q](truth, p, getattr(p, q), picks), rtol))
    return Report(rows)


def _copied(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.scale_grad_by_freq:
            raise HookjacError(
                f"check compares with second derivatives, and those of {name!r} ({type(module).__name__} with "
                "scale_grad_by_freq=True) forget the scale. Check a copy of the model without that option."
            )
    try:
        return copy.deepcopy(model).double()
    except RuntimeError as error:
        raise HookjacError(
            f"check works on a copy in float64, and this model cannot be copied ({str(error).split('.')[0]}). Remove "
            "what keeps computed tensors on its modules, such as torch.nn.utils.prune."
        ) from error


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cast = pytree.tree_map(
        lambda t: t.detach().double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs
    )
    if isinstance(cast, dict):
        return (), cast
    return (tuple(cast) if isinstance(cast, (tuple, list)) else (cast,)), {}


class _Truth:
    """The model and its loss as plain autograd has them, each call on the same random numbers."""

    def __init__(
        self, model: nn.Module, run: Callable[[], Any], loss_fn: Callable[[Any], Tensor], output: Select
    ) -> None:
        self._run, self._state = run, torch.get_rng_state()
        with twice_differentiable():
            whole = self.call()
        self.output = select(whole, output)
        self.loss = loss_fn(whole)
        self.slope = grad(self.loss, self.output)  # [N, *out], differentiable
        # the cotangents u of the output: J v = d (Jᵀ u) / du . v
        self.cotangents = torch.zeros_like(self.output).requires_grad_()

    def call(self) -> Any:
        torch.set_rng_state(self._state)
        return self._run()

    @property
    def N(self) -> int:
        return len(self.output)

    def column(self, p: Tensor, k: int) -> Tensor:
        """[N, *out]: d output / d entry k."""
        pulled = grad(self.output, p, self.cotangents).reshape(-1)[k]
        return grad(pulled, self.cotangents).detach()

    def share(self, p: Tensor, k: int) -> Tensor:
        """What comes to entry k past the outputs (a penalty), a sample's share of it."""
        through = grad(self.output, p, self.slope).reshape(-1)[k]
        return ((grad(self.loss, p).reshape(-1)[k] - through) / self.N).detach()

    def each(self, p: Tensor, k: int) -> Tensor:
        """[N]: entry k of every sample's gradient."""
        return (self.slope * self.column(p, k)).detach().reshape(self.N, -1).sum(1) + self.share(p, k)

    def of_sample(self, p: Tensor, n: int) -> Tensor:
        """[P]: the whole gradient of one sample."""
        only = torch.zeros_like(self.slope)
        only[n] = self.slope[n].detach()
        through = grad(self.output, p, self.slope.detach())
        return (grad(self.output, p, only) + (grad(self.loss, p) - through) / self.N).reshape(-1).detach()

    def curved(self, p: Tensor, k: int) -> Tensor:
        """[N]: what each sample adds to entry k of the Gauss-Newton diagonal, but for penalties."""
        column = self.column(p, k)
        return (column * grad(self.slope, self.output, column)).detach().reshape(self.N, -1).sum(1)

    def penalty(self, p: Tensor, k: int) -> Tensor:
        """What a penalty adds to entry k of the curvature's diagonal."""
        past = grad(self.loss, p) - grad(self.output, p, self.slope)
        return grad(past.reshape(-1)[k], p).reshape(-1)[k].detach()

    def row(self, p: Tensor, k: int) -> Tensor:
        """[P]: a row of the Hessian's block."""
        return grad(grad(self.loss, p).reshape(-1)[k], p).reshape(-1).detach()


# Found and right, for some entries of one result ------------------------------------------------------------------

Pairs = list[tuple[Tensor, Tensor]]


def _samples(truth: _Truth, picks: Sequence[int]) -> list[int]:
    """As many samples as entries, spread over the batch."""
    return sorted({k * truth.N // len(picks) for k in range(len(picks))}) if truth.N else []


def _norms(truth: _Truth, p: Tensor, found: Tensor, picks: list[int]) -> Pairs:
    return [(found[n], truth.of_sample(p, n).norm()) for n in _samples(truth, picks)]


def _gram(truth: _Truth, p: Tensor, found: Tensor, picks: list[int]) -> Pairs:
    each = {n: truth.of_sample(p, n) for n in _samples(truth, picks)}
    return [(found[n, m], each[n] @ each[m]) for n in each for m in each]


def _kernel(truth: _Truth, p: Tensor, found: Tensor, picks: list[int]) -> Pairs:
    C = truth.output[0].numel() if truth.N else 0
    units = torch.eye(truth.output.numel(), dtype=found.dtype, device=found.device)
    rows = {}
    for j, n in enumerate(_samples(truth, picks)):
        at = n * C + j % C
        rows[at] = grad(truth.output, p, units[at].view_as(truth.output)).reshape(-1).detach()
    whole = found.reshape(truth.N * C, truth.N * C)
    return [(whole[a, b], rows[a] @ rows[b]) for a in rows for b in rows]


def _products(row: Callable[[_Truth, Tensor, int], Tensor]) -> Callable[[_Truth, Tensor, Any, list[int]], Pairs]:
    def compare(truth: _Truth, p: Tensor, found: Any, picks: list[int]) -> Pairs:
        units = torch.eye(p.numel(), dtype=p.dtype, device=p.device)
        return [(found(units[k].view_as(p)).reshape(-1), row(truth, p, k)) for k in picks]

    return compare


def _gauss_newton_row(truth: _Truth, p: Tensor, k: int) -> Tensor:
    bent = grad(truth.slope, truth.output, truth.column(p, k))
    past = grad(truth.loss, p) - grad(truth.output, p, truth.slope)
    return (grad(truth.output, p, bent) + grad(past.reshape(-1)[k], p)).reshape(-1).detach()


def _hessian_row(truth: _Truth, p: Tensor, k: int) -> Tensor:
    return truth.row(p, k)


def _by_entry(right: Callable[[_Truth, Tensor, int], Tensor], lead: int) -> Callable[..., Pairs]:
    """Of results [*lead, *p]."""
    return lambda truth, p, found, picks: [
        (found.reshape(*found.shape[:lead], -1)[..., k] if lead else found.reshape(-1)[k], right(truth, p, k))
        for k in picks
    ]


def _jac(truth: _Truth, p: Tensor, found: Tensor, picks: list[int]) -> Pairs:
    dense = found.reshape(*truth.output.shape, -1)
    return [(dense[..., k], truth.column(p, k)) for k in picks]


_CHECKS: dict[str, Callable[[_Truth, Any, Any, list[int]], Pairs]] = {
    "grad_sample": _by_entry(lambda t, p, k: t.each(p, k), 1),
    "grad_sample_norm": _norms,
    "grad_sample_gram": _gram,
    "grad_sq_sum": _by_entry(lambda t, p, k: t.each(p, k).square().sum(), 0),
    "grad_var": _by_entry(lambda t, p, k: (t.N * t.each(p, k)).var(correction=0), 0),
    "jac": _jac,
    "ntk": _kernel,
    "ggn_diag": _by_entry(lambda t, p, k: t.curved(p, k).sum() + t.penalty(p, k), 0),
    "ggn_diag_sample": _by_entry(lambda t, p, k: t.curved(p, k) + t.penalty(p, k) / t.N, 1),
    "ggn_block": lambda t, p, found, picks: [(found[k], _gauss_newton_row(t, p, k)) for k in picks],
    "ggn_mp": _products(_gauss_newton_row),
    "hess_diag": _by_entry(lambda t, p, k: t.row(p, k)[k], 0),
    "hess_block": lambda t, p, found, picks: [(found[k], t.row(p, k)) for k in picks],
    "hess_mp": _products(_hessian_row),
}


def _row(name: str, q: str, road: str, why: str, pairs: Pairs, rtol: float) -> Checked:
    top = max((float(right.abs().max()) for _, right in pairs if right.numel()), default=0.0)
    off = max((float((found - right).abs().max()) for found, right in pairs if right.numel()), default=0.0)
    return Checked(name, q, road, why, off / top if top else off, off <= rtol * top + 1e-13)
