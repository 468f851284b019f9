"""Random models, losses and requests, held to plain autograd entry by entry: `python tests/sweep.py --minutes 30`.

hypothesis draws a recipe (see recipes.py) and makes one that fails small. What may come of a recipe: equal numbers, at
the first step and at those that go by what was learnt; or an error of ours, of the kinds that are known. All else is
printed, as a test.
"""

from __future__ import annotations

import collections
import contextlib
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import click
import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from leftovers import clear
from oracle import grad, trainable
from recipes import LOSSES, Ask, Recipe, at_rest, build, chunked, data_loss, inputs, penalty, recipes, records
from torch import Tensor, nn
from truths import Truth, pairs

import hookjac
from hookjac import HookjacError

# What hookjac may refuse, and of which recipes
KNOWN: dict[str, Callable[[Recipe], bool]] = {
    "passes no output of the model": lambda r: r.output is not None,
    "the selected output does not require grad|returned no tensor that requires grad": lambda r: not possible(r),
    "hesscale is defined for parameters that are used once": lambda r: True,
    "kfra is defined for parameters that are used once": lambda r: True,
    "simplifies the curvature at every step down, and cannot": lambda r: True,
    "the loss is not convex": lambda r: curvature(r) < 0,
    "a part that passes through no sample": lambda r: r.penalty is not None,
    "it is used in ways of different form": lambda r: (
        r.given == "tied ids" or not {"own slope", "weight again"}.isdisjoint(dict(r.steps))
    ),
    "the loss is not connected to an output": lambda r: r.output == "middle",  # which is what the model was given
    "0 selected outputs of the model were met": lambda r: r.output == "middle",  # the same
    "it bends complex numbers": lambda r: "fourier" in dict(r.steps),
    # of one sample, what all samples share, or what nothing arrives at, looks like a sample's own
    "another form in batch": lambda r: True,
}

Came = collections.Counter[str]


class NoTruth(Exception):
    """There is nothing to compare with."""


@dataclass
class Left:
    """What one backward left: results of each parameter that no later step can touch, gradients and those before."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    grads: dict[str, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    operators: dict[str, Tensor] = field(default_factory=dict)


class Step:
    """One batch for a model in its n-th state, which `build` and `change` make again and again."""

    def __init__(self, r: Recipe, number: int) -> None:
        self.r, self.number, self.seed = r, number, r.seed + 7 * number
        self.N, self.T = r.N, r.T
        for what in r.later[:number]:
            self.N, self.T = self.N + (what == "size"), min(self.T + (what == "longer"), 4)
        self.scale = 1.0
        self.x = inputs(r, self.N, self.T, self.seed)
        if r.given == "numbers" and self.seed % 2 and r.trigger != "inputs" and r.way != "accumulate":
            self.x.requires_grad_()

    def run(self, model: nn.Module, x: Tensor) -> Any:
        torch.manual_seed(self.seed)
        half = self.r.dtype == "bfloat16" and next(model.parameters()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(x)

    def truth(self, dtype: torch.dtype) -> Truth:
        """By plain autograd, on a model of its own."""
        model = build(self.r)
        for number in range(self.number):
            change(self.r, number, model)
        x = self.x.detach().clone()
        if x.is_floating_point():
            x = x.to(dtype).requires_grad_(self.x.requires_grad)
        with default(dtype):
            model = model.to(dtype)
            try:
                return Truth(self.r, model, x, self.seed, lambda: self.run(model, x))
            except RuntimeError as error:
                raise NoTruth(str(error)) from error

    def served(self, model: nn.Module) -> dict[str, Any]:
        params = trainable(model)
        return dict(list(params.items())[::2]) if self.r.trigger == "inputs" else params

    def go(self, model: nn.Module) -> Left:
        """A backward."""
        loss = data_loss(self.r, self.run(model, self.x), self.seed) + penalty(self.r, model)
        served, trigger = self.served(model), self.r.trigger
        before = {key: None if p.grad is None else p.grad.clone() for key, p in served.items()}
        if trigger == "autograd.grad":
            found = torch.autograd.grad(loss, list(served.values()), allow_unused=True)
            return Left(grads=dict(zip(served, ((t, None) for t in found), strict=True)))
        if trigger == "inputs":
            loss.backward(inputs=list(served.values()))
        elif trigger == "autograd.backward":
            torch.autograd.backward([loss])
        else:
            loss.backward(retain_graph=trigger == "retain")
        if trigger == "retain":
            before = {key: None if p.grad is None else p.grad.clone() for key, p in served.items()}
            loss.backward()
        return Left(grads={key: (None if p.grad is None else p.grad.clone(), before[key]) for key, p in served.items()})

    def collect(self, model: nn.Module, left: Left, ext: hookjac.extend) -> None:
        for key, p in self.served(model).items():
            left.results[key] = {name: kept(getattr(p, name), p) for name, _ in self.r.asked}
        asked = dict(self.r.asked)
        params = list(self.served(model).values())
        if self.r.trigger == "inputs":
            return
        v, u = self.directions(sum(p.numel() for p in params), params[0].dtype)
        if "hess_mp" in asked:
            left.operators["hessian"] = (ext.hessian @ v).detach()
        if "jac" in asked and not asked["jac"]:
            J = ext.jacobian
            left.operators["back"] = (J.T @ u(J.shape[0])).detach()
            left.operators["along"] = ((J @ v) @ u(J.shape[0])).detach()
        if "ntk" in asked:
            left.operators["ntk"] = (ext.ntk - sum(p.ntk for p in params)).detach()

    def directions(self, P: int, dtype: torch.dtype) -> tuple[Tensor, Callable[[int], Tensor]]:
        draw = torch.Generator().manual_seed(self.seed)
        v = torch.randn(P, generator=draw, dtype=dtype)
        return v, lambda size: torch.randn(size, generator=draw.manual_seed(self.seed), dtype=dtype)

    def compare(self, left: Left, asked: tuple[Ask, ...], gradients: bool = True) -> Truth:
        own = torch.float64 if self.r.dtype == "float64" else torch.float32
        truth = self.truth(own)
        # how far plain autograd is off in that precision tells how far one may be
        twin = None if own is torch.float64 else self.truth(torch.float64)
        exact = truth if twin is None else twin
        heads = [exact.loss, exact.output.sum()]
        size = max(float(grad(t, p).abs().max()) for p in trainable(exact.model).values() for t in heads)
        self.scale = max(1.0, size, size**2)  # what cancels leaves the rounding of its terms
        if gradients:
            self.compare_gradients(left, truth, twin)
        torch.manual_seed(self.seed + 1)
        for key, p in self.served(truth.model).items():
            picks = torch.randperm(p.numel())[:2].tolist()
            for name, options in asked:
                state, found = torch.get_rng_state(), left.results[key][name]
                mine = pairs(truth, name, options, key, p, found, picks)
                its = []
                if twin is not None:
                    torch.set_rng_state(state)
                    its = pairs(twin, name, options, key, twin.model.get_parameter(key), found, picks)
                self.hold(f"{name} of {key}", mine, its)
        if twin is None:
            self.compare_operators(left, truth)
        return truth

    def compare_gradients(self, left: Left, truth: Truth, twin: Truth | None) -> None:
        """They are plain autograd's, whether we computed them or it did."""
        params = self.served(truth.model)
        right = torch.autograd.grad(truth.loss, list(params.values()), allow_unused=True, retain_graph=True)
        for (key, p), wanted in zip(params.items(), right, strict=True):
            found, before = left.grads[key]
            if wanted is None:
                assert found is None or before is not None or not bool(found.any()), f"grad of {key} is not None"
                continue
            assert found is not None, f"grad of {key} is None"
            assert found.dtype == p.dtype, f"grad of {key} is {found.dtype}"
            found = found - before if before is not None else found
            its = [] if twin is None else [(found, grad(twin.loss, twin.model.get_parameter(key)))]
            self.hold(f"grad of {key}", [(found, wanted)], its, floor=before)

    def compare_operators(self, left: Left, truth: Truth) -> None:
        """Of all parameters together."""
        params = list(self.served(truth.model).values())
        P = sum(p.numel() for p in params)
        v, u = self.directions(P, params[0].dtype)
        for what, found in left.operators.items():
            if what == "hessian":
                parts = v.split([p.numel() for p in params])
                along = sum((grad(truth.loss, p) * t.view_as(p)).sum() for p, t in zip(params, parts, strict=True))
                right = torch.cat([grad(along, p).reshape(-1) for p in params])  # type: ignore[arg-type]
            elif what == "ntk":
                right = torch.zeros_like(found)
            else:
                seed = u(truth.output.numel()).view_as(truth.output)
                right = torch.cat([grad(truth.output, p, seed).reshape(-1) for p in params])
                right = right @ v if what == "along" else right
            self.hold(f"the operator: {what}", [(found, right)], [])

    def hold(self, what: str, mine: Any, its: Any, floor: Tensor | None = None) -> None:
        """Equal to rounding. In low precision, no further off than some times what plain autograd is in it."""
        found, right = (
            torch.cat([t[k].detach().double().reshape(-1) for t in mine] or [torch.zeros(0)]) for k in (0, 1)
        )
        if not len(right):
            return
        if not bool(right.isfinite().all()):
            raise NoTruth("not finite")
        assert bool(found.isfinite().all()), f"{what} is not finite"
        top, off = float(right.abs().max()), (found - right).abs()
        before = 0.0 if floor is None else float(floor.abs().max())
        # a root is taken of what may be rounding, and what norms of two features bend cancels
        bound = 1e-8 * top + (1e-12 if what.startswith(("ggn_sqrt", "hess")) else 1e-13) + 1e-14 * before
        bound += 4e-16 * self.scale
        if self.r.dtype != "float64":
            eps = torch.finfo(getattr(torch, self.r.dtype)).eps
            exact = torch.cat([t[1].detach().double().reshape(-1) for t in its])
            rough = float((right - exact).abs().max())
            if what.startswith("hess"):  # columns add up the bends of stations, which may be large and cancel
                rough, eps = 100 * rough, 100 * eps
            bound = 20 * rough + eps * (50 * max(top, float(exact.abs().max())) + before + 4 * self.scale)
        assert bool((off <= bound).all()), f"{what} is off by {float(off.max()):.1e} where the largest is {top:.1e}"


def kept(found: Any, p: Tensor) -> Any:
    """A result as it is now: products need a graph that the next step makes stale."""
    if callable(found) and not isinstance(found, Tensor):
        units = torch.eye(p.numel(), dtype=p.dtype).view(-1, *p.shape)
        return found(units).reshape(p.numel(), -1).detach()
    if isinstance(found, hookjac.JacTensor):
        return found.to_dense().detach(), found.sq_sum().detach()
    return found.detach() if isinstance(found, Tensor) else found


@contextlib.contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def change(r: Recipe, number: int, model: nn.Module) -> None:
    """What is different at the next step: always the data and the parameters, as after an optimizer's step."""
    what, draw = r.later[number], torch.Generator().manual_seed(r.seed + number)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.97).add_((0.01 * torch.randn(p.shape, generator=draw)).to(p) * (p != 0))
    params = list(model.parameters())
    if what in ("eval", "train"):
        model.train(what == "train")
        at_rest(model)
    if what == "freeze":
        live = [p for p in params if p.requires_grad]
        if len(live) > 1:
            live[r.seed % len(live)].requires_grad_(False)
    if what == "thaw":
        for p in params:
            p.requires_grad_(True)


def nobody(step: Step, model: nn.Module, block: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
    """A batch of no sample first, where plain autograd has one: it shall go through, or be refused, and change nothing
    for those that follow."""
    empty, alone = step.x.detach()[:0], build(step.r)
    for number in range(step.number):
        change(step.r, number, alone)
    try:
        torch.autograd.grad(
            data_loss(step.r, step.run(alone, empty), step.seed), list(trainable(alone).values()), allow_unused=True
        )
    except (RuntimeError, IndexError, ValueError, ZeroDivisionError):
        return
    before = {p: p.grad for p in model.parameters()}
    try:
        with block():
            torch.autograd.backward(data_loss(step.r, step.run(model, empty), step.seed))
    except HookjacError:
        pass
    except ValueError as error:  # a choice of samples, of none
        if "subsample" not in str(error):
            raise
    for p, g in before.items():
        p.grad = g


def refusals(r: Recipe, step: Step) -> dict[int, str]:
    """Which quantities are refused, each by itself, and why."""
    found = {}
    for k, q in enumerate(records(r)):
        model = build(r)
        for number in range(step.number):
            change(r, number, model)
        try:
            with hookjac.extend(model, q, output=r.output, create_graph=r.way == "create_graph"):
                step.go(model)
        except HookjacError as error:
            found[k] = str(error)
    return found


def by_extend(r: Recipe, came: Came) -> None:
    model, again = build(r), r.way == "create_graph"
    steps = [Step(r, number) for number in range(1 + len(r.later))]
    one_block = r.one_block and not {"freeze", "thaw"} & set(r.later)
    made: list[Left] = []

    def block() -> hookjac.extend:
        return hookjac.extend(model, *records(r), output=r.output, create_graph=again)

    try:
        with contextlib.ExitStack() as whole:
            if one_block:
                ext = whole.enter_context(block())
            for step in steps:
                if step.number:
                    change(r, step.number - 1, model)
                if step.number % 2 == 0:
                    model.zero_grad()
                if step.number and r.later[step.number - 1] == "nobody":
                    nobody(step, model, (lambda: contextlib.nullcontext()) if one_block else block)
                with contextlib.nullcontext(ext) if one_block else block() as ext:
                    made.append(step.go(model))
                    str(ext.explain())
                step.collect(model, made[-1], ext)
    except HookjacError as err:
        error, step = err, steps[len(made) - (len(made) == len(steps))]
        why = refusals(r, step)
        for message in why.values() or [str(error)]:
            came[f"refused: {told(message)}"] += 1
            assert known(message, r), f"refused: {message}"
        assert why, f"refused together, and not apart: {error}"
        rest = tuple(a for k, a in enumerate(r.asked) if k not in why)
        if rest:
            by_extend(replace(r, asked=rest), came)
        return
    for step, left in zip(steps, made, strict=True):
        truth = step.compare(left, r.asked)
    if again:
        compare_again(step, model, truth)
        clear(model)  # what has a graph lives forever with the parameters that it hangs on


def compare_again(step: Step, model: nn.Module, truth: Truth) -> None:
    """Derivatives of the results of the last step themselves."""

    def leaves(model: nn.Module, x: Tensor) -> list[Tensor]:
        return [*trainable(model).values(), *([x] if x.requires_grad else [])]

    def rows(tensors: list[Tensor]) -> dict[str, Tensor]:  # [len(tensors), P] for each parameter
        each = [derivatives(t, list(served.values()), create_graph=True) for t in tensors]
        return {key: torch.stack([row[k].reshape(-1) for row in each]) for k, key in enumerate(served)}

    names, served = {name for name, _ in step.r.asked}, step.served(truth.model)
    gradients = rows([truth.summand(n) for n in range(truth.N)])
    jacobian = rows(list(truth.output.reshape(-1))) if "jac" in names else {}
    wanted, found = torch.zeros(()), torch.zeros(())
    for key, g in gradients.items():
        right = {"grad_sample": g, "grad_sample_gram": g @ g.T, "grad_sq_sum": g.square().sum(0)}
        if "jac" in names:
            right["jac"] = jacobian[key]
        if float(g.detach().norm(dim=1).min()) > 1e-4:  # a root has no derivative at zero
            right["grad_sample_norm"] = g.norm(dim=1)
        for name, _ in step.r.asked:
            if name in right:
                t = getattr(model.get_parameter(key), name)
                t = (t.to_dense() if isinstance(t, hookjac.JacTensor) else t).reshape(-1)
                of = right[name].reshape(-1)
                # of large numbers, a sine is rounding
                w = torch.linspace(-1, 1, len(t)).to(t) / of.detach().abs().max().clamp(min=1)
                found = found + (t * w).sin().sum()
                wanted = wanted + (of * w).sin().sum()
    if wanted.requires_grad and step.r.dtype == "float64":
        exact = derivatives(wanted, leaves(truth.model, truth.x))
        mine = derivatives(found, leaves(model, step.x))
        step.hold("derivative of the results", list(zip(mine, exact, strict=True)), [])


def derivatives(t: Tensor, leaves: list[Tensor], *, create_graph: bool = False) -> tuple[Tensor, ...]:
    """In all of them at once: a graph for each by itself takes gigabytes."""
    if not t.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(
        t, leaves, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def by_accumulate(r: Recipe, came: Came) -> None:
    """A data set in batches against all of it at once."""
    r = replace(r, N=r.N + 1, later=(), trigger="backward")
    if any(name in RANDOM for name, _ in r.steps):
        raise NoTruth("batches have random numbers of their own")
    step, model, left = Step(r, 0), build(r), Left()
    x = step.x

    def loss(m: nn.Module, rows: slice) -> Tensor:
        return data_loss(r, step.run(m, x[rows]), step.seed, rows, r.N) + penalty(r, m)

    reduction: Any = LOSSES[r.loss][0]
    refused = ""
    batches = [slice(0, 1), slice(1, r.N)]
    try:
        hookjac.accumulate(model, None, batches, *records(r), step=loss, reduction=reduction, output=r.output)
    except HookjacError as error:
        refused = str(error)
    if refused:
        came[f"refused: {told(refused)}"] += 1
        assert known(refused, r), f"refused: {refused}"
        return
    assert all(p.grad is None for p in model.parameters()), "accumulate touched .grad"
    for key, p in trainable(model).items():
        left.results[key] = {name: kept(getattr(p, name), p) for name, _ in r.asked}
    step.compare(left, r.asked, gradients=False)


RANDOM = ("dropout", "alpha dropout", "rrelu", "encoder layer", "checkpoint")


def possible(r: Recipe) -> bool:
    """Can plain autograd do this?"""
    try:
        for number in range(1 + len(r.later)):
            Step(r, number).truth(torch.float64 if r.dtype == "float64" else torch.float32)
    except (NoTruth, RuntimeError):
        return False
    return True


def told(message: str) -> str:
    """A message without names and numbers."""
    return re.sub(r"'[^']*'|\d+|\[[^]]*\]|\([^)]*\)", "_", message)[:90]


def known(message: str, r: Recipe) -> bool:
    return any(re.search(words, message) and may(r) for words, may in KNOWN.items())


def curvature(r: Recipe) -> float:
    """The least eigenvalue of the loss's Hessian in the outputs, beyond rounding."""
    found = [torch.linalg.eigvalsh(Step(r, k).truth(torch.float64).hessians()) for k in range(1 + len(r.later))]
    return min(float(t.min() + 1e-12 * t.abs().max()) for t in found)


def run(r: Recipe, came: Came | None = None) -> None:
    """AssertionError for all that may not be."""
    came = collections.Counter() if came is None else came
    before = dict(torch.nn.modules.module._global_forward_hooks)
    with default(torch.float64 if r.dtype == "float64" else torch.float32), chunked(r.chunk), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            (by_accumulate if r.way == "accumulate" else by_extend)(r, came)
            came["equal"] += 1
        except NoTruth as error:
            came[f"no truth: {told(str(error))}"] += 1
        except Exception as error:
            if isinstance(error, AssertionError) and str(error):
                raise
            if not possible(r):
                came["no truth: plain autograd fails, too"] += 1
                return
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise AssertionError(f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})") from error
    assert before == dict(torch.nn.modules.module._global_forward_hooks), "a hook was left"


def sweep(
    number: int,
    examples: int,
    came: Came,
    until: float = float("inf"),
    skip: Callable[[str], bool] | None = None,
    shrinking: float = 60.0,
    see: Callable[[Recipe], None] = lambda r: None,
) -> tuple[Recipe, str] | None:
    """So many recipes; the first that fails, made small, and how. skip: failures that are not news."""
    failed: list[tuple[Recipe, str]] = []
    since: list[float] = []

    @hypothesis.seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False)  # fmt: skip
    @given(recipes())
    def once(r: Recipe) -> None:
        now = time.monotonic()
        if now > until or (since and now > since[0] + shrinking):
            return
        see(r)
        try:
            run(r, came)
        except AssertionError as error:
            says = str(error)
            if skip is not None and skip(says):
                came["seen before"] += 1
                return
            if failed and told(failed[0][1])[:40] != told(says)[:40]:
                return  # another fault: one at a time
            since.append(now)
            failed.append((r, says))
            raise

    try:
        once()
    except AssertionError:
        pass
    except hypothesis.errors.Flaky:
        assert failed, "a recipe that fails once and not again"
    return min(failed, key=lambda f: len(repr(f[0]))) if failed else None


@click.command(help=__doc__)
@click.option("--minutes", type=float, default=1.0)
@click.option("--start", type=int, default=0, help="The first seed.")
@click.option("--examples", type=int, default=30, help="Recipes for each seed.")
@click.option("--shrinking", type=float, default=60.0, help="Seconds for making a failing case small.")
def main(minutes: float, start: int, examples: int, shrinking: float) -> None:
    torch.set_num_threads(1)
    came: Came = collections.Counter()
    seen: dict[str, Came] = collections.defaultdict(collections.Counter)
    news: set[str] = set()
    end, number, recipes_seen = time.process_time() + 60 * minutes, start, [0]

    def see(r: Recipe) -> None:
        recipes_seen[0] += 1
        seen["steps"].update(name for name, _ in r.steps)
        seen["quantities"].update(name for name, _ in r.asked)
        seen["losses"][r.loss] += 1
        for what in ("way", "trigger", "dtype", "given", "head", "output", "penalty", "chunk", "N", "T"):
            seen[what][str(getattr(r, what))] += 1
        seen["then"].update(r.later)
        seen["options"].update(f"{name} {option}={value}" for name, options in r.asked for option, value in
                               options.items() if isinstance(value, str | bool))  # fmt: skip
        seen["batches"][str(1 + len(r.later))] += 1

    while time.process_time() < end:
        until = time.monotonic() + (end - time.process_time())
        found = sweep(number, examples, came, until, lambda says: told(says)[:60] in news, shrinking, see)
        if found is not None:
            r, says = found
            news.add(told(says)[:60])
            came["WRONG"] += 1
            click.echo(f"\n# seed {number}: {says[:700]}\nrun({r})\n")
        number += 1
    click.echo(
        f"{recipes_seen[0]} recipes, seeds {start} to {number - 1}, {time.process_time() / 60:.1f} minutes of CPU"
    )
    click.echo(f"torch {torch.__version__}, hypothesis {hypothesis.__version__}")
    for what, count in came.most_common():
        click.echo(f"{count:6} {what}")
    for what, counts in seen.items():
        click.echo(f"{what}: {len(counts)}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))


if __name__ == "__main__":
    main()
