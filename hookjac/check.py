"""`hookjac.check`: results on a model of yours against plain autograd, entry by entry, on a few entries of each.

N samples · C entries of one sample's output · k one entry of a parameter.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hookjac import given
from hookjac.errors import HookjacError
from hookjac.explain import arguments
from hookjac.extend import extend
from hookjac.quantity import parse
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
    of arguments, or a dict of them. loss_fn: of what the model returns; what it uses besides must be float64 or
    integers, and a penalty in it on the parameters of your model is not one on the copy's. quantities: grad_sample, jac
    and hess_diag, if none are named. output: as for `extend`.

    What is sampled is exact: entry k of the Jacobian by one product with its unit vector, which with the loss's slope
    and Hessian in the outputs also gives entry k of per-sample gradients, their squares and variance, and of the
    Gauss-Newton diagonal; a row of the Hessian by a second backward; a sample's norm by its own backward. Half of the
    entries are drawn, from `seed`, where the gradient is not zero. kfac is held to its definition only by the library's
    own tests and is refused here, as are random estimates; so are models that plain autograd cannot answer for
    (reentrant checkpoints) or that cannot be copied. Frozen parameters are left out.

    Returns a `Report`: parameter, quantity, road, largest error relative to the largest entry seen, verdict. `fine`
    tells whether all errors are below `rtol` (or 1e-13 by themselves); a model that rounds to float32 inside needs one
    of 1e-5. Cost: some backwards for each entry.
    """
    for q in quantities:
        if not isinstance(q, str):
            raise TypeError(f"check takes names of quantities, got {q!r:.80}: options change what there is to compare")
        if q not in _CHECKS:
            parse((q,))  # no quantity at all: it says which one may be meant
            raise ValueError(f"check knows no entry-by-entry definition of {q!r}. It knows {', '.join(_CHECKS)}.")
    asked = quantities or _OURS
    given.model("check", model)
    given.function(loss_fn=loss_fn)
    given.counts(1, entries=entries)
    given.counts(0, seed=seed)
    given.numbers(rtol=rtol)
    twin = _copied(model)
    args, kwargs = arguments(_cast(inputs))
    devices = sorted({p.device.index for p in twin.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), _in_our_words():
        truth = _Truth(twin, lambda: twin(*args, **kwargs), loss_fn, output)
        with extend(twin, *asked, output=output) as ext:
            out = truth.call()
            loss_fn(out).backward()
    again, before = select(out, output).detach(), truth.output.detach()
    if not torch.allclose(again, before, rtol=1e-12, atol=1e-12, equal_nan=True):
        raise HookjacError(
            "the model, called twice on the same inputs and random numbers, gave outputs that differ by "
            f"{float((again - before).abs().max()):.1e}: it keeps a state between calls. Put that back in its forward."
        )
    told, rows = ext.explain().to_dict()["parameters"], []
    draw = torch.Generator().manual_seed(seed)
    with _in_our_words():
        for name, p in trainable(twin).items():
            picks = _picks(p, entries, draw)
            for q in asked:
                road = told[name]["hessian"] if q.startswith("hess") and told[name]["hessian"] else told[name]["road"]
                rows.append(_row(name, q, road, told[name]["why"], _CHECKS[q](truth, p, getattr(p, q), picks), rtol))
    return Report(rows)


def _picks(p: Tensor, entries: int, draw: torch.Generator) -> list[int]:
    """Entries of a parameter; half of them where its gradient is not zero, if there are such."""
    live = torch.zeros(0, dtype=torch.long) if p.grad is None else p.grad.reshape(-1).cpu().nonzero().flatten()
    first = live[torch.randperm(len(live), generator=draw)[: -(-entries // 2)]].tolist()
    rest = [k for k in torch.randperm(p.numel(), generator=draw)[: 2 * entries].tolist() if k not in first]
    return (first + rest)[:entries]


@contextlib.contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" in str(error) and not isinstance(error, HookjacError):
            raise HookjacError(
                "check compares with torch.autograd.grad, which a checkpoint with use_reentrant=True does not serve. "
                "Check a copy of the model with use_reentrant=False, or without checkpoints: the numbers are the same."
            ) from error
        if isinstance(error, HookjacError) or not re.search("scalar type|same dtype|dtype", str(error)):
            raise
        raise HookjacError(
            f"check runs the model and the loss in float64, and something in them is of another type ({error}). Make "
            "tensors of float32 buffers of the model, or cast them to the type of what they meet."
        ) from error


def _copied(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.scale_grad_by_freq:
            raise HookjacError(
                f"check compares with second derivatives, and those of {name!r} ({type(module).__name__} with "
                "scale_grad_by_freq=True) forget the scale. Check a copy of the model without that option."
            )
    try:
        twin = copy.deepcopy(model).double()
    except RuntimeError as error:
        raise HookjacError(
            f"check works on a copy in float64, and this model cannot be copied ({str(error).split('.')[0]}). Remove "
            "what keeps computed tensors on its modules, such as torch.nn.utils.prune."
        ) from error
    if not all(p.is_leaf for p in twin.parameters()):
        raise HookjacError(
            f"check works on a copy in float64, and that of this {type(model).__name__} has parameters that are no "
            "leaves of autograd's graph. Check the model that was scripted."
        )
    return twin


def _cast(inputs: Any) -> Any:
    return pytree.tree_map(
        lambda t: t.detach().double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs
    )


class _Truth:
    """The model and its loss as plain autograd has them, each call on the same random numbers.

    The loss is looked at as a function of everything that the model returns for each sample: `heads`, which are copies
    that it hangs on; where it hangs on something else that the model returns (a loss of its own), of `output` alone.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[], Any], loss_fn: Callable[[Any], Tensor], output: Select
    ) -> None:
        self._run, self._state = run, torch.get_rng_state()
        with twice_differentiable():
            whole = self.call()
        self.output, self.loss = select(whole, output), loss_fn(whole)
        given.loss("loss_fn", self.loss)
        if not self.output.dim() or not len(self.output):
            raise HookjacError(f"check needs a sample at least; the model gave an output {list(self.output.shape)}")
        if not self.output.requires_grad:
            raise HookjacError("the selected output depends on no trainable parameter: there is nothing to compare")
        leaves, spec = pytree.tree_flatten(whole)
        rows = [k for k, t in enumerate(leaves) if self._a_row_a_sample(t)]
        others = [t for k, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad and k not in rows]
        free = [t.detach().requires_grad_() if k in rows else t for k, t in enumerate(leaves)]
        apart = loss_fn(pytree.tree_unflatten(free, spec))
        if any(bool(grad(apart, t).any()) for t in others) or not any(leaves[k] is self.output for k in rows):
            self._outputs, self._heads, self._apart = [self.output], [self.output], self.loss
            self._subtract = True
        else:
            self._outputs, self._heads, self._apart = [leaves[k] for k in rows], [free[k] for k in rows], apart
            self._subtract = False
        self._slopes = [grad(self._apart, t) for t in self._heads]  # differentiable
        # What is made of the selected output belongs to the loss, when it comes to curvature in outputs
        used = [t for t, s in zip(self._outputs, self._slopes, strict=True) if t is not self.output and bool(s.any())]
        above = [bool(grad(t.sum(), self.output).any()) for t in used]
        self._whole = grad(self.loss, self.output) if any(above) else None
        self._mixed = any(above) and not all(above)
        # the cotangents u of the outputs: J v = d (Jᵀ u) / du . v
        self._cotangents = [torch.zeros_like(t).requires_grad_() for t in self._outputs]

    def _a_row_a_sample(self, t: Any) -> bool:
        return isinstance(t, Tensor) and t.requires_grad and t.dim() > 0 and len(t) == len(self.output)

    def call(self) -> Any:
        torch.set_rng_state(self._state)
        return self._run()

    @property
    def N(self) -> int:
        return len(self.output)

    def _pulled(self, p: Tensor, seeds: Sequence[Tensor]) -> Tensor:
        """[*p]: Jᵀ of cotangents of all outputs."""
        return sum((grad(t, p, u) for t, u in zip(self._outputs, seeds, strict=True)), torch.zeros_like(p))

    def _columns(self, p: Tensor, k: int) -> list[Tensor]:
        pulled = self._pulled(p, self._cotangents).reshape(-1)[k]
        return [grad(pulled, u).detach() for u in self._cotangents]

    def column(self, p: Tensor, k: int) -> Tensor:
        """[N, *out]: d output / d entry k."""
        at = next(j for j, t in enumerate(self._outputs) if t is self.output)
        return self._columns(p, k)[at]

    def _past(self, p: Tensor) -> Tensor:
        """[*p]: what comes to a parameter past the outputs (a penalty), differentiable."""
        direct = grad(self._apart, p)
        return direct - self._pulled(p, self._slopes) if self._subtract else direct

    def _inner(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:  # -> [N]
        return sum(((s * t).detach().reshape(self.N, -1).sum(1) for s, t in zip(a, b, strict=True)), torch.zeros(()))

    def each(self, p: Tensor, k: int) -> Tensor:
        """[N]: entry k of every sample's gradient."""
        return self._inner(self._slopes, self._columns(p, k)) + self._past(p).reshape(-1)[k].detach() / self.N

    def of_sample(self, p: Tensor, n: int) -> Tensor:
        """[P]: the whole gradient of one sample."""
        only = [torch.zeros_like(s) for s in self._slopes]
        for into, s in zip(only, self._slopes, strict=True):
            into[n] = s[n].detach()
        return (self._pulled(p, only) + self._past(p) / self.N).reshape(-1).detach()

    def _bent(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """The loss's Hessian in the outputs, times columns."""
        pairs = list(zip(self._slopes, columns, strict=True))
        return [sum((grad(s, t, c) for s, c in pairs), torch.zeros_like(t)) for t in self._heads]

    def curved(self, p: Tensor, k: int) -> Tensor:
        """[N]: what each sample adds to entry k of the Gauss-Newton diagonal, but for penalties."""
        columns, bent = self._curvature(p, k)
        return self._inner(columns, bent)

    def _curvature(self, p: Tensor, k: int) -> tuple[list[Tensor], list[Tensor]]:
        """Columns of the outputs that count, and the loss's Hessian in them times those."""
        if self._whole is None:
            columns = self._columns(p, k)
            return columns, self._bent(columns)
        whole = grad(self.loss, p)
        around = whole - grad(self.output, p, self._whole) - self._past(p)
        if self._mixed or bool(around.abs().max() > 1e-10 * whole.abs().max()):
            raise HookjacError(
                "the loss uses outputs that are made of the selected one, and others or ways around it; check has no "
                "Gauss-Newton matrix to compare with. Select another output."
            )
        column = self.column(p, k)
        return [column], [grad(self._whole, self.output, column)]

    def penalty(self, p: Tensor, k: int) -> Tensor:
        """What a penalty adds to entry k of the curvature's diagonal."""
        return grad(self._past(p).reshape(-1)[k], p).reshape(-1)[k].detach()

    def gauss_newton_row(self, p: Tensor, k: int) -> Tensor:
        """[P]: a row of the Gauss-Newton matrix's block."""
        _, bent = self._curvature(p, k)
        through = self._pulled(p, bent) if self._whole is None else grad(self.output, p, bent[0])
        return (through + grad(self._past(p).reshape(-1)[k], p)).reshape(-1).detach()

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


def _by_entry(right: Callable[[_Truth, Tensor, int], Tensor], lead: int) -> Callable[..., Pairs]:
    """Of results [*lead, *p]."""
    return lambda truth, p, found, picks: [
        (found.reshape(*found.shape[:lead], -1)[..., k] if lead else found.reshape(-1)[k], right(truth, p, k))
        for k in picks
    ]


def _variance(truth: _Truth, p: Tensor, found: Tensor, picks: list[int]) -> Pairs:
    """Beside the squared mean, in whose rounding a variance of zero lies."""
    pairs = []
    for k in picks:
        each = truth.N * truth.each(p, k)
        pairs.append((found.reshape(-1)[k] + each.mean().square(), each.square().mean()))
    return pairs


def _jac(truth: _Truth, p: Tensor, found: Tensor, picks: list[int]) -> Pairs:
    dense = found.reshape(*truth.output.shape, -1)
    return [(dense[..., k], truth.column(p, k)) for k in picks]


_CHECKS: dict[str, Callable[[_Truth, Any, Any, list[int]], Pairs]] = {
    "grad_sample": _by_entry(lambda t, p, k: t.each(p, k), 1),
    "grad_sample_norm": _norms,
    "grad_sample_gram": _gram,
    "grad_sq_sum": _by_entry(lambda t, p, k: t.each(p, k).square().sum(), 0),
    "grad_var": _variance,
    "jac": _jac,
    "ntk": _kernel,
    "ggn_diag": _by_entry(lambda t, p, k: t.curved(p, k).sum() + t.penalty(p, k), 0),
    "ggn_diag_sample": _by_entry(lambda t, p, k: t.curved(p, k) + t.penalty(p, k) / t.N, 1),
    "ggn_block": lambda t, p, found, picks: [(found[k], t.gauss_newton_row(p, k)) for k in picks],
    "ggn_mp": _products(_Truth.gauss_newton_row),
    "hess_diag": _by_entry(lambda t, p, k: t.row(p, k)[k], 0),
    "hess_block": lambda t, p, found, picks: [(found[k], t.row(p, k)) for k in picks],
    "hess_mp": _products(_Truth.row),
}


def _row(name: str, q: str, road: str, why: str, pairs: Pairs, rtol: float) -> Checked:
    both = [(found.detach().reshape(-1), right.reshape(-1)) for found, right in pairs]
    found, right = (torch.cat([pair[k] for pair in both]) if both else torch.zeros(0) for k in (0, 1))
    top = float(right.abs().max()) if len(right) else 0.0
    off = float((found - right).abs().max()) if len(right) else 0.0  # NaN, if there is one
    if not math.isfinite(top):
        return Checked(name, q, road, why, math.nan, False)
    return Checked(name, q, road, why, off / top if top else off, off <= rtol * top + 1e-13)
