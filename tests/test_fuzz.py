"""Every argument of the public face replaced by what does not belong there; and valid ones in random combinations.

Allowed is a result, or an error (HookjacError, TypeError, ValueError) that says what was found or which argument it is
about. What each argument accepts is said here, so that nonsense taken in silence fails as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import C, D, N, mlp
from hypothesis import given, settings
from leftovers import attributes, clear, state
from oracle import close, expected
from torch import Tensor, nn

import hookjac
from hookjac import HookjacError, distributed, extend, optim, plot, testing

EXAMPLES = 60 * int(os.environ.get("HOOKJAC_TEST_LONG", "1"))
Y = torch.tensor([0, 2, 1, 2])


class Odd:
    """Of no use to anybody."""

    def __repr__(self) -> str:
        return "Odd()"


def none(*given: Any, **more: Any) -> None:
    """A function that returns nothing."""


JUNK: list[Any] = [
    None, True, False, -1, 0, 3, 1.5, math.nan, math.inf, -1e308, 10**30, "", "jac", "nonsense", b"x", [], (), {},
    [None], ["a"], [-1], [99], [1.5], [True], [0, 0], {1, 2}, range(3), range(0), object, Odd(), none, nn.Linear,
    torch.float32, torch.tensor(1.0), torch.zeros(0), torch.zeros(2, 3), torch.zeros(2, 2, 2, 2, 2),
    torch.full((17,), math.nan), torch.zeros(5, device="meta"), torch.zeros(3, dtype=torch.int64),
    torch.tensor([True, False]), torch.zeros(2, dtype=torch.complex64), ("",), ("a", "a"), ("a.b",), ([],), {1: 3},
    (nn.Linear, nn.Linear), ("MulBackward0", "MulBackward0"),
]  # fmt: skip

# What an argument accepts. Whatever else is given must be refused; what is accepted may still be refused later on, by a
# HookjacError ---------------------------------------------------------------------------------------------------------

Accepts = Callable[[Any], bool]


def nothing(value: Any) -> bool:
    return False


def missing(value: Any) -> bool:
    return value is None


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def integers(least: int, most: int = 1 << 63) -> Accepts:
    return lambda value: type(value) is int and least <= value < most


def number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point()
    return (type(value) is int or type(value) is float) and 0 <= value < 1 << 63


def any_number(value: Any) -> bool:
    return number(value) or (type(value) in (int, float) and value in (-1, -1e308))


def positive(value: Any) -> bool:
    return number(value) and bool(value > 0)


def fraction(value: Any) -> bool:
    return number(value) and bool(value < 1)


def limit(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def indices(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dtype == torch.int64
    return value is None or (
        isinstance(value, (list, range)) and len(value) > 0 and all(type(k) is int and k >= 0 for k in value)
    )


def text(value: Any) -> bool:
    return isinstance(value, str)


def path(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def word(known: str) -> Accepts:
    return lambda value: isinstance(value, str) and value == known


def a_function(value: Any) -> bool:
    return callable(value)


def our_function(value: Any) -> bool:
    return value is none


def or_none(accepts: Accepts) -> Accepts:
    return lambda value: value is None or accepts(value)


@dataclass
class Row:
    """A callable, the arguments of a valid call, what each accepts, and what is done with the result."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    accepts: dict[int | str, Accepts]
    use: Callable[[Any], Any] = field(default=lambda found: found)
    names: dict[int | str, str] = field(default_factory=dict)  # of arguments by position


def used(record: hookjac.Quantity) -> Any:
    model = mlp(nn.Tanh)
    with extend(model, record):
        F.cross_entropy(model(torch.randn(N, D)), Y).backward()
    return [vars(p)[record.name] for p in model.parameters()]


def record(kind: Callable[..., hookjac.Quantity], **accepts: Accepts) -> Row:
    return Row(kind, (), {}, dict(accepts), used)


def records() -> dict[str, Row]:
    roads: dict[str, Accepts] = {"road": nothing, "flop_limit": limit, "subsample": indices}
    draws: dict[str, Accepts] = {"samples": integers(1), "generator": missing}
    found = {
        kind.__name__: record(kind, subsample=indices)
        for kind in (hookjac.GradSampleNorm, hookjac.GradSampleGram, hookjac.GradSqSum, hookjac.GradVar,
                     hookjac.GGNDiag, hookjac.GGNDiagSample, hookjac.GGNBlock)
    }  # fmt: skip
    hessians = (hookjac.HessDiag, hookjac.HessDiagSample, hookjac.HessBlock)
    found |= {kind.__name__: record(kind, **roads) for kind in hessians}
    found |= {kind.__name__: record(kind, outputs=indices, subsample=indices) for kind in (hookjac.Jac, hookjac.NTK)}
    return found | {
        "GradSample": record(hookjac.GradSample, loss_reduction=nothing, subsample=indices),
        "GradSampleProjected": record(hookjac.GradSampleProjected, k=integers(1), seed=integers(0), subsample=indices),
        "GGNDiagMC": record(hookjac.GGNDiagMC, **draws, subsample=indices),
        "GGNSqrt": record(hookjac.GGNSqrt, samples=or_none(integers(1)), generator=missing, structured=flag,
                          subsample=indices),
        "Hutchinson": record(hookjac.Hutchinson, **draws),
        "KFAC": record(hookjac.KFAC, fisher=nothing, **draws, sharing=nothing, otherwise=nothing, subsample=indices,
                       corrected=lambda v: flag(v) or (isinstance(v, dict) and not v)),
        "Quantity": Row(hookjac.Quantity, (), {"name": "mine", "columns": "loss", "reduce": lambda got: got.sum()}, {
            "name": lambda v: text(v) and v.isidentifier(), "columns": nothing, "reduce": our_function,
            "subsample": indices, "full": flag, "each": missing, "whole": flag, "instead": text, "adds": missing,
            "single": flag, "opens": or_none(our_function)}, used),
        "Adds": Row(hookjac.Adds, (), {}, {
            "powers": nothing, "measure": or_none(a_function), "split": a_function,
            "join": a_function, "label": text}),
        "Rule": Row(hookjac.Rule, (), {"name": "mine", "modules": (nn.Linear,), "pull": none}, {
            "name": lambda v: text(v) and v != "", "modules": nothing, "pull": a_function,
            "params": lambda v: isinstance(v, tuple) and not v, "factors": missing, "fits": a_function,
            "refuses": a_function, "mixed": or_none(a_function), "bend": or_none(a_function), "linear": flag,
            "constant": flag, "claims": a_function, "place": or_none(a_function)}),
        "Rule with a parameter": Row(hookjac.Rule, (), {
            "name": "mine", "modules": (nn.Linear,), "pull": none, "params": ("w",), "factors": none}, {
            "params": nothing, "factors": a_function}),
        "NodeRule": Row(hookjac.NodeRule, (), {
            "name": "mine", "nodes": ("MulBackward0",), "slots": (1,), "fits": none, "part": none}, {
            "name": lambda v: text(v) and v != "", "nodes": nothing, "slots": nothing, "fits": a_function,
            "part": a_function, "refuses": a_function, "mixed": lambda v: isinstance(v, dict) and not v,
            "copies": flag}),
    }  # fmt: skip


def stepped(optimizer: Any) -> None:
    x = torch.randn(N, D)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(optimizer.model(x), Y)
        loss.backward()
        return loss

    optimizer.step(closure)


def optimizers() -> dict[str, Row]:
    def row(kind: Callable[..., Any], must: dict[str, Any], accepts: dict[int | str, Accepts]) -> Row:
        common: dict[int | str, Accepts] = {0: nothing, 1: missing, "lr": number, "output": missing}
        return Row(lambda model, *more, **options: kind(model, *more, **options), (mlp(nn.Tanh), None), must,
                   common | accepts, stepped, {1: "params"})  # fmt: skip

    levenberg: dict[int | str, Accepts] = {"damping": positive, "least_damping": positive}
    return {
        "optim.KFAC": row(optim.KFAC, {}, {
            "momentum": fraction, "damping": number, "decay": fraction, "inverse_every": integers(1),
            "corrected": flag, "fisher": nothing, "sharing": nothing, "clip": number, "weight_decay": number,
            "adapt_every": integers(0), "least_damping": positive, "other_lr": number, "group": missing}),
        "optim.GaussNewton": row(optim.GaussNewton, {}, levenberg | {"tries": integers(1), "refine": integers(0)}),
        "optim.NaturalGradient": row(optim.NaturalGradient, {}, levenberg | {
            "iterations": integers(1), "tolerance": number, "keep": number}),
        "optim.DPSGD": row(optim.DPSGD, {"batch_size": N}, {
            "clip": positive, "noise": number, "momentum": number, "weight_decay": number, "loss_reduction": nothing,
            "independent": flag, "generator": missing, "batch_size": positive}),
        "optim.DiagonalNewton": row(optim.DiagonalNewton, {}, {
            "betas": lambda v: isinstance(v, list) and v == [0, 0], "damping": positive, "negative": nothing,
            "every": integers(1), "clip": number, "weight_decay": number}),
    }  # fmt: skip


def blocks() -> dict[str, Row]:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    batches = [(torch.randn(N, D), Y) for _ in range(2)]

    def loss(out: Tensor) -> Tensor:
        return F.cross_entropy(out, Y)

    def block(model: nn.Module, *asked: Any, **options: Any) -> None:
        with extend(model, *asked, **options):
            F.cross_entropy(model(x), Y).backward()

    def apart(model: nn.Module, output: Any = None) -> None:
        with hookjac.demand_apart(model, output):
            model(x)

    def held(module: nn.Module, *inputs: Any, **options: Any) -> testing.Report:
        try:
            return testing.check_rule(module, *inputs, **options)
        except AssertionError as error:  # its answer to a rule that was never used
            raise HookjacError(str(error)) from error

    return {
        "extend": Row(block, (model, "grad_sample"), {}, {
            0: nothing, 1: word("jac"), "output": missing, "create_graph": flag, "group": missing,
            "reduction": missing, "after": or_none(our_function)}),
        "explain": Row(hookjac.explain, (model, x, "jac"), {}, {
            0: nothing, 2: word("jac"), "loss_fn": missing, "output": missing}),
        "accumulate": Row(hookjac.accumulate, (model, F.cross_entropy, batches, "ggn_diag"), {}, {
            0: nothing, 1: nothing, 2: nothing, 3: nothing, "reduction": nothing, "output": missing, "step": missing,
            "checkpoint": or_none(path), "every": integers(1), "group": missing}, names={1: "loss_fn"}),
        "check": Row(hookjac.check, (model, x, loss, "jac"), {"entries": 1}, {
            0: nothing, 2: nothing, 3: word("jac"), "entries": integers(1), "seed": integers(0), "output": missing,
            "rtol": number}, names={2: "loss_fn"}),
        "demand_apart": Row(apart, (model,), {}, {0: nothing, "output": missing}),
        "check_rule": Row(held, (nn.Linear(2, 2), torch.randn(3, 2)), {"rule": "linear"}, {
            0: nothing, "loss": nothing, "hessian": flag, "rtol": number, "rule": missing}),
        "loops": Row(testing.loops, (model, lambda: model(x), loss), {}, {
            0: nothing, 1: nothing, 2: nothing, "penalty": missing, "hessian": flag}, names={1: "run", 2: "loss"}),
    }  # fmt: skip


def results() -> dict[str, Row]:
    """Methods of what a backward left."""
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    with extend(model, "jac", "ntk", "kfac", "ggn_mp", "hess_mp", "ggn_diag", "grad_sample_norm") as ext:
        F.cross_entropy(model(x), Y).backward()
    p: Any = model[0].weight
    K, J, P, v = p.kfac, ext.jacobian, ext.jacobian.shape[1], torch.randn(6, D)
    found = {
        "hessian @": Row(ext.hessian.__matmul__, (torch.randn(P),), {}, {0: nothing}),
        "ggn @": Row(ext.ggn.__matmul__, (torch.randn(P),), {}, {0: nothing}),
        "jacobian @": Row(J.__matmul__, (torch.randn(P),), {}, {0: nothing}),
        "jacobian.T @": Row(J.T.__matmul__, (torch.randn(J.shape[0]),), {}, {0: nothing}),
        "jacobian.gram": Row(J.gram, (J,), {}, {0: missing, "kind": nothing}),
        "jacobian.diagonal": Row(J.diagonal, (torch.randn(N, C),), {}, {0: nothing}),
        "jacobian.variance": Row(J.variance, (torch.ones(P),), {}, {0: nothing}),
        "jacobian.split": Row(J.split, (torch.ones(2, P),), {}, {0: nothing}),
        "Jacobian": Row(hookjac.Jacobian, (J.parts,), {}, {0: nothing}, names={0: "parts"}),
        "Curvature": Row(lambda plan: plan is J or hookjac.Curvature("ggn", plan, (), none), (J,), {}, {0: nothing}),
        "JacTensor": Row(hookjac.JacTensor, (p.jac.factor, p.jac.out, p.jac.dtype), {}, {
            0: nothing, 1: nothing, 2: lambda v: v is torch.float32}, names={1: "out", 2: "dtype"}),
        "jac.times": Row(p.jac.times, (v,), {}, {0: nothing}),
        "jac.back": Row(p.jac.back, (torch.randn(N, C),), {}, {0: nothing}),
        "jac.gram": Row(p.jac.gram, (p.jac,), {}, {0: missing}),
        "ggn_mp": Row(p.ggn_mp, (v,), {}, {0: nothing}),
        "hess_mp": Row(p.hess_mp, (v,), {}, {0: nothing}),
        "new Kronecker": Row(hookjac.Kronecker, (torch.eye(D), torch.eye(6), torch.Size([6, D])), {}, {
            0: nothing, 1: nothing, 2: nothing, "swapped": flag, "rows": integers(0)}, names={0: "A", 1: "B"}),
        "new KroneckerSum": Row(hookjac.KroneckerSum, ((K, K),), {}, {0: nothing}),
        "plot.diagonals": Row(plot.diagonals, (model, "ggn_diag"), {}, {
            0: nothing, 1: nothing, "columns": integers(1)}),
        "plot.kronecker": Row(plot.kronecker, (model,), {}, {0: nothing, "columns": integers(1)}),
        "plot.kernel": Row(plot.kernel, (ext.ntk, Y), {}, {0: nothing, 1: missing}),
        "plot.gradient_norms": Row(plot.gradient_norms, (model,), {}, {
            0: lambda v: isinstance(v, Tensor) and v.dim() == 1 and not (v.is_complex() or v.is_meta),
            "images": missing, "captions": missing, "show": integers(1)}),
        "plot.Watched": Row(plot.Watched("ggn_diag").note, (model,), {}, {0: nothing, "step": or_none(integers(0))}),
    }  # fmt: skip
    for name, k in (("Kronecker", K), ("KroneckerSum", hookjac.KroneckerSum((K, K))), ("vector", model[0].bias.kfac)):
        t = torch.randn(k.shape)
        found[f"{name} @"] = Row(k.__matmul__, (t,), {}, {0: nothing})
        found[f"{name}.solve"] = Row(k.solve, (t,), {"damping": 0.1}, {0: nothing, "damping": number})
        found[f"{name}.logdet"] = Row(k.logdet, (0.1,), {}, {0: number})
        found[f"{name}.lerp"] = Row(k.lerp, (k, 0.1), {}, {0: nothing, 1: any_number})
        if name != "KroneckerSum":
            e = k.eigen()
            found[f"{name}.inverse"] = Row(k.inverse, (0.1,), {}, {0: number, "pi": flag})
            found[f"{name}.damped"] = Row(k.damped, (0.1,), {}, {0: number, "pi": flag})
            found[f"{name}.eigen().solve"] = Row(e.solve, (t,), {"damping": 0.1}, {0: nothing, "damping": number})
            found[f"{name}.eigen().logdet"] = Row(e.logdet, (0.1,), {}, {0: number})
    return found


def shared() -> dict[str, Row]:
    """What the ranks of a group share, for a group of one."""

    def empty(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and not value

    def no_numbers(value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape == (0,)

    found = {
        "shares": Row(distributed.shares, ([torch.Size([2, 2])], 2), {}, {0: empty, 1: integers(1)},
                      names={0: "sizes", 1: "ranks"}),
        "one of shares": Row(lambda size: distributed.shares([size], 2), (torch.Size([2, 2]),), {}, {0: nothing}),
    }  # fmt: skip
    for name, work in (("inverse", distributed.inverse), ("eigh", distributed.eigh)):
        found[name] = Row(work, ([torch.eye(2)], "world"), {}, {0: empty, 1: nothing}, names={0: "matrices"})
        found[f"one of {name}"] = Row(lambda t, work=work: work([t], "world"), (torch.eye(2),), {}, {0: no_numbers})
    return found


FAMILIES: dict[str, Callable[[], dict[str, Row]]] = {
    "records": records, "optimizers": optimizers, "blocks": blocks, "results": results, "shared": shared
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    before = state()
    yield tmp_path
    assert state() == before


def told(error: Exception, slot: int | str, value: Any) -> bool:
    """Does the message name the argument, or what was found?"""
    words = str(error)
    if isinstance(slot, str) and slot in words:
        return True
    if isinstance(value, (str, list, tuple, dict, range)) and not value and ("empty" in words or "none" in words):
        return True
    names = [repr(value)[:20], type(value).__name__, getattr(value, "__name__", "?")]
    if isinstance(value, Tensor):
        names += [str(list(value.shape)), str(tuple(value.shape)), str(value.dtype)]
    return any(name in words for name in names)


def wrong(name: str, row: Row, slot: int | str, value: Any) -> str:
    """What is wrong with the answer to one argument; nothing if nothing is."""
    args, kwargs = list(row.args), dict(row.kwargs)
    if isinstance(slot, int):
        args[slot] = value
    else:
        kwargs[slot] = value
    what, before = f"{name}: {slot}={value!r:.60}", state()
    try:
        row.use(row.call(*args, **kwargs))
        found = "" if row.accepts[slot](value) else f"{what} was taken"
    except HookjacError as error:
        found = "" if len(str(error)) > 20 else f"{what}: {error}"
    except (TypeError, ValueError) as error:
        fine = not row.accepts[slot](value) and told(error, row.names.get(slot, slot), value)
        found = "" if fine else f"{what}: {error}"
    except Exception as error:
        found = f"{what}: {type(error).__name__}: {error}"
    return found or ("" if state() == before else f"{what} left something behind")


@pytest.fixture
def alone(family: str) -> Iterator[None]:
    """A process group of this process only, where one is needed."""
    if family != "shared":
        yield
        return
    if not dist.is_gloo_available():
        pytest.skip("needs gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_junk_for_every_argument(family: str, folder: Path, alone: None) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    failed = []
    for name, row in FAMILIES[family]().items():
        row.use(row.call(*row.args, **row.kwargs))
        for slot in row.accepts:
            failed += [found for value in JUNK if (found := wrong(name, row, slot, value))]
            pyplot.close("all")
    assert not failed, "\n".join(failed)


def test_paths(folder: Path) -> None:
    model = mlp(nn.Tanh)
    with extend(model, "ggn_diag"):
        F.cross_entropy(model(torch.randn(N, D)), Y).backward()
    hookjac.save(model, "ok.safetensors")
    for value in [v for v in JUNK if not path(v)]:
        with pytest.raises((TypeError, HookjacError), match="path"):
            hookjac.save(model, value)
        with pytest.raises((TypeError, HookjacError), match="path"):
            hookjac.load(value)
    for value in [v for v in JUNK if not flag(v)]:
        with pytest.raises(TypeError, match="dense must be True or False"):
            hookjac.save(model, "a.safetensors", dense=value)
        with pytest.raises(TypeError, match=r"expects a (model|torch)"):
            hookjac.save(value, "a.safetensors")
        if value is not None:
            with pytest.raises(TypeError, match="expects a model"):
                hookjac.load("ok.safetensors", value)
    with pytest.raises(FileNotFoundError):
        hookjac.load("nowhere.safetensors")
    assert [p.name for p in folder.iterdir()] == ["ok.safetensors"]


@pytest.mark.parametrize("value", [None, 3, (), Odd(), torch.tensor([True])])
def test_losses_that_are_none(value: Any, folder: Path) -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    before = attributes(model)
    with pytest.raises((TypeError, HookjacError), match="loss"):
        hookjac.accumulate(model, None, [(x, Y)], "ggn_diag", step=lambda m, batch: value)
    with pytest.raises((TypeError, HookjacError), match="loss"):
        hookjac.check(model, x, lambda out: value)
    for q in ("grad_sample", "hess_diag", "kfac", "hess_mp"):
        with pytest.raises((TypeError, HookjacError), match="loss does not require grad"), extend(model, q):
            torch.autograd.backward(value if isinstance(value, Tensor) else F.cross_entropy(model(x), Y).detach())
    assert attributes(model) == before


def test_outputs_that_are_none() -> None:
    def output(v: Any) -> bool:
        return isinstance(v, Tensor) and v.is_floating_point() and not v.is_meta and v.dim() > 0 and v.numel() > 0

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return value

    layer, x = Layer(2, 2), torch.randn(3, 2)
    for value in [v for v in JUNK if not output(v)]:
        with pytest.raises((TypeError, ValueError), match="run must return the output") as first:
            testing.loops(layer, lambda: layer(x), lambda out: out.sum())
        with pytest.raises((TypeError, ValueError), match="the module Layer must return the output") as second:
            testing.check_rule(layer, x)
        assert all(told(found.value, 0, value) for found in (first, second))


def test_a_check_of_nothing() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    with pytest.raises(ValueError, match=r"Doubled has no parameter that requires a gradient, .* nothing to compare"):
        testing.check_rule(Doubled(), torch.zeros(2, 3, dtype=torch.int64))


# Valid ones, in random combinations -----------------------------------------------------------------------------------


@st.composite
def asked(draw: st.DrawFn) -> tuple[list[hookjac.Quantity], list[int] | None, bool]:
    """Some quantities that loops define, with options; the outputs picked; and whether gradients are times N."""
    picks = st.none() | st.lists(st.integers(0, N - 1), min_size=1, max_size=N, unique=draw(st.booleans()))
    outs = draw(st.none() | st.lists(st.integers(0, C - 1), min_size=1, max_size=C, unique=True))
    road: Any = draw(st.sampled_from(["auto", "columns", "features", "entries"]))
    times_n = draw(st.booleans())
    kinds: dict[str, Callable[[Any], hookjac.Quantity]] = {
        "grad_sample": lambda s: hookjac.GradSample(loss_reduction="mean" if times_n else "sum", subsample=s),
        "grad_sample_norm": lambda s: hookjac.GradSampleNorm(subsample=s),
        "grad_sample_gram": lambda s: hookjac.GradSampleGram(subsample=s),
        "grad_sq_sum": lambda s: hookjac.GradSqSum(subsample=s),
        "jac": lambda s: hookjac.Jac(outputs=outs, subsample=s),
        "ggn_diag": lambda s: hookjac.GGNDiag(subsample=s),
        "hess_diag": lambda s: hookjac.HessDiag(road=road, subsample=s),
        "hess_diag_sample": lambda s: hookjac.HessDiagSample(road=road, subsample=s),
    }
    names = draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=5, unique=True))
    return [kinds[name](draw(picks)) for name in names], outs, times_n


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(asked(), st.sampled_from([nn.Tanh, nn.ReLU]), st.booleans())
def test_valid_options_together(chosen: Any, act: type[nn.Module], later: bool) -> None:
    quantities, outs, times_n = chosen
    torch.manual_seed(0)
    model, x = mlp(act), torch.randn(N, D)
    for _ in range(2 if later else 1):
        clear(model)
        with extend(model, *quantities):
            F.cross_entropy(model(x), Y).backward()
    found = {name: dict(vars(p)) for name, p in model.named_parameters()}
    clear(model)
    each = [expected(model, lambda n=n: model(x[n : n + 1]),  # type: ignore[misc]
                     lambda o, n=n: F.cross_entropy(o, Y[n : n + 1]) / N) for n in range(N)]  # fmt: skip
    for name, its in found.items():
        for q in quantities:
            of = [each[n][name] for n in (range(N) if q.subsample is None else q.subsample)]
            g, jac = torch.cat([one["grad_sample"] for one in of]), torch.cat([one["jac"] for one in of])
            h = torch.stack([one["hess_diag"] for one in of])
            wanted = {
                "grad_sample": g * (N if times_n else 1),
                "grad_sample_norm": g.flatten(1).norm(dim=1),
                "grad_sample_gram": g.flatten(1) @ g.flatten(1).T,
                "grad_sq_sum": g.square().sum(0),
                "jac": jac if outs is None else jac[:, outs],
                "ggn_diag": torch.stack([one["ggn_diag"] for one in of]).sum(0),
                "hess_diag": h.sum(0),
                "hess_diag_sample": h,
            }[q.name]
            close(its[q.name], wanted, (name, q.name))
