"""Gradients of single samples, read as the user's own backward passes: the same numbers, whatever changes between."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, C, Case, D, Fn, N, mlp, par, random_loss
from oracle import close, expected, grad, trainable
from test_exact import prepare
from test_models import OWN, gpt2
from torch import Tensor, nn

import hookjac
from hookjac import HookjacError, extend
from hookjac.service import Service

PLAIN = [c for c in CASES if c.output is None and c.oracle is None and c.loss is None]
ALL = ("grad_sample", "grad_sample_norm", "grad_sample_gram", "grad_sq_sum", "grad_var")


@pytest.fixture(autouse=True)
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the backwards that were read in passing."""
    counted: list[int] = []
    real = Service._pass

    def seen(self: Service, *args: Any) -> Any:
        counted.append(1)
        return real(self, *args)

    monkeypatch.setattr(Service, "_pass", seen)
    return counted


def each_gradient(model: nn.Module, loss: Callable[[Tensor], Tensor], run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """[N, *p] by plain loops: the output is cut into rows, the loss gradient goes back through one at a time."""
    out = run()
    head = out.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(head), head)
    found: dict[str, Tensor] = {}
    for name, p in trainable(model).items():
        rows = []
        for n in range(len(out)):
            only = torch.zeros_like(slope)
            only[n] = slope[n]
            rows.append(grad((out * only).sum(), p))
        found[name] = torch.stack(rows)
    return found


def check(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    for name, p in trainable(model).items():
        g = wanted[name]
        rows = g.reshape(len(g), -1)
        close(p.grad_sample, g, (name, "grad_sample"))  # type: ignore[attr-defined]
        top = rows.norm(dim=1).max() ** 2 + 1e-16
        for q, true in {
            "grad_sample_gram": rows @ rows.T,
            "grad_sq_sum": g.square().sum(0),
        }.items():
            close(getattr(p, q), true, (name, q))
        close(p.grad_sample_norm, rows.norm(dim=1), (name, "norm"), rtol=1e-7)  # type: ignore[attr-defined]
        spread = (p.grad_var - len(g) ** 2 * (g - g.mean(0)).square().mean(0)).abs().max()  # type: ignore[attr-defined]
        assert spread <= 1e-12 * len(g) ** 2 * top, (name, "grad_var")
        close(torch.zeros_like(p) if p.grad is None else p.grad, g.sum(0), (name, "grad"))


def step(model: nn.Module, run: Callable[[], Any], loss: Callable[[Any], Tensor] = random_loss, *asked: Any) -> extend:
    model.zero_grad()
    with extend(model, *(asked or ALL)) as ext:
        loss(run()).backward()
    return ext


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_every_case_over_and_over(case: Case, passes: list[int]) -> None:
    model, run, pick = prepare(case)
    other, run_other, _ = prepare(case, seed=5)  # other data, same structure as a rule
    for model_, run_ in ((model, run), (other, run_other)):
        wanted = each_gradient(model_, random_loss, lambda run_=run_: pick(run_()))  # type: ignore[misc]
        for _ in range(3):
            step(model_, lambda run_=run_: pick(run_()))  # type: ignore[misc]
            check(model_, wanted)
    assert len(passes) in (0, 6)
    if case.road == "rule" and case.name not in BY_VALUES:
        assert passes


# their samples are found by values, or a parameter meets no rule of nodes
BY_VALUES = {"in-place everywhere"}


@pytest.mark.parametrize("name", OWN)
def test_models(name: str, passes: list[int]) -> None:
    build, inputs = OWN[name]
    model, args = build(), inputs()
    wanted = each_gradient(model, random_loss, lambda: model(*args))
    for _ in range(3):
        step(model, lambda: model(*args))
        check(model, wanted)


def test_gpt2(passes: list[int]) -> None:
    model, ids = gpt2(), torch.randint(7, (N, 5))
    wanted = each_gradient(model, random_loss, lambda: model(input_ids=ids).logits)
    for _ in range(3):
        model.zero_grad()
        with extend(model, *ALL, output="logits"):
            random_loss(model(input_ids=ids).logits).backward()
        check(model, wanted)
    assert len(passes) == 3


CURVED = ("ggn_diag", "ggn_diag_sample", "grad_sample_norm")


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_columns_that_autograd_sends(case: Case, passes: list[int]) -> None:
    """A root of cross entropy's Hessian and random columns: as loops and as the first step had them."""
    model, run, _ = prepare(case)
    out = run()
    if out.dim() != 2:
        pytest.skip("one row of logits for each sample")
    y = torch.arange(len(out)) % out.shape[1]
    loss = lambda o: F.cross_entropy(o, y)
    wanted = expected(model, run, loss)
    found: list[dict[str, Any]] = []
    for _ in range(3):
        generator = torch.Generator().manual_seed(3)
        drawn = (hookjac.GGNDiagMC(samples=2, generator=generator), hookjac.KFAC(fisher="exact"))
        step(model, run, loss, *CURVED, *drawn)
        for name, p in trainable(model).items():
            close(p.ggn_diag, wanted[name]["ggn_diag"], name)  # type: ignore[attr-defined]
        found.append({n: (p.ggn_diag_mc, p.ggn_diag_sample, p.kfac) for n, p in trainable(model).items()})  # type: ignore[attr-defined]
    for later in found[1:]:
        for name, (mc, each, kfac) in later.items():
            close(mc, found[0][name][0], (name, "mc"))
            close(each, found[0][name][1], (name, "each"))
            if not isinstance(kfac, hookjac.KroneckerSum):
                close(kfac.B, found[0][name][2].B, (name, "B"))
    if case.road == "rule" and case.name not in BY_VALUES:
        assert len(passes) == 3


@pytest.mark.parametrize("name", ["squared", "smoothed", "for and against", "two losses", "by rows and columns"])
def test_losses_and_the_columns_that_are_sent(name: str, passes: list[int]) -> None:
    """Where there is no root, the walk goes on as before."""
    y = torch.tensor([0, 2, 1, 1])
    signs = torch.tensor([1.0, -1.0, 2.0, 0.0])
    loss: Callable[[Tensor], Tensor] = {
        "squared": lambda o: o.square().sum(1).mean(),
        "smoothed": lambda o: F.cross_entropy(o / 2, y, label_smoothing=0.3),
        "for and against": lambda o: (signs * F.cross_entropy(o, y, reduction="none")).sum(),
        "two losses": lambda o: F.cross_entropy(o, y) + o.square().sum(),
        "by rows and columns": lambda o: F.cross_entropy(o[[2, 2, 0, 1]], y),
    }[name]
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    wanted = expected(model, lambda: model(x), loss)
    for _ in range(4):
        step(model, lambda: model(x), loss, "ggn_diag", "grad_sample")
        for key, p in trainable(model).items():
            close(p.ggn_diag, wanted[key]["ggn_diag"], key)  # type: ignore[attr-defined]
            close(p.grad_sample, wanted[key]["grad_sample"], key)  # type: ignore[attr-defined]
    assert len(passes) == (0 if name == "by rows and columns" else 4)


def test_curvature_after_steps_that_asked_for_none(passes: list[int]) -> None:
    model, x, y = mlp(nn.Tanh), torch.randn(N, D), torch.tensor([0, 2, 1, 1])
    loss = lambda o: F.cross_entropy(o, y)
    wanted = expected(model, lambda: model(x), loss)
    for asked in ("grad_sample", "grad_sample", "ggn_diag", "ggn_diag", "hess_diag", "ggn_diag"):
        step(model, lambda: model(x), loss, asked)
        for key, p in trainable(model).items():
            close(getattr(p, asked), wanted[key][asked], (key, asked))
    assert len(passes) == 5


def test_subsamples_of_columns_that_are_sent(passes: list[int]) -> None:
    model, x, y = mlp(nn.Tanh), torch.randn(N, D), torch.tensor([0, 2, 1, 1])
    for _ in range(3):
        step(
            model,
            lambda: model(x),
            lambda o: F.cross_entropy(o, y),
            "ggn_diag_sample",
            hookjac.GGNDiag(subsample=[3, 1]),
        )
        for p in model.parameters():
            close(p.ggn_diag, p.ggn_diag_sample[[3, 1]].sum(0), "subsample")  # type: ignore[attr-defined]
    assert len(passes) == 3


# What changes between steps ----------------------------------------------------------------------------------------


def stepped(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = random_loss) -> None:
    wanted = each_gradient(model, loss, lambda: model(x))
    step(model, lambda: model(x), loss)
    check(model, wanted)


def test_training_on_batches_of_several_sizes(passes: list[int]) -> None:
    model = mlp(nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for n in (4, 4, 4, 3, 3, 4, 2, 1, 1, 3):
        stepped(model, torch.randn(n, D))
        optimizer.step()
    assert len(passes) == 8  # one sample alone is looked at anew each time


def test_frozen_and_thawed_parameters(passes: list[int]) -> None:
    model = mlp(nn.Tanh)
    first: Any = model[0]  # type: ignore[index]
    for frozen in (False, False, True, True, False, True):
        first.weight.requires_grad_(not frozen)
        stepped(model, torch.randn(N, D))
    assert len(passes) == 6
    assert first.bias.requires_grad


def test_parameters_replaced_tied_and_moved(passes: list[int]) -> None:
    model: Any = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, C))
    x = torch.randn(N, D)
    stepped(model, x)
    stepped(model, x)
    model[2].weight = nn.Parameter(torch.randn(D, D))
    stepped(model, x)
    model[2].weight = model[0].weight
    stepped(model, x)
    stepped(model, x)
    model[2].weight = nn.Parameter(torch.randn(D, D))
    with torch.no_grad():
        model[0].weight.data = torch.randn(D, D)
    stepped(model, x)
    assert len(passes) == 6
    model.float()
    with extend(model, "grad_sample"):
        model(x.float()).square().sum().backward()
    assert model[0].weight.grad_sample.dtype == torch.float32


def test_another_activation_another_loss(passes: list[int]) -> None:
    model: Any = mlp(nn.Tanh)
    x, y = torch.randn(N, D), torch.tensor([0, 2, 1, 1])
    losses = [random_loss, lambda o: F.cross_entropy(o, y), lambda o: F.cross_entropy(o, y, reduction="sum")]
    for _ in range(2):
        for loss in losses:
            stepped(model, x, loss)
    model[1] = nn.Softplus()
    stepped(model, x)
    assert len(passes) == 7


def test_a_layer_with_another_number_of_heads_or_another_slope(passes: list[int]) -> None:
    """What a node saved besides tensors is part of the structure."""
    shift = [1]
    model = Fn(lambda m, x: m.b(m.a(x).tanh().reshape(len(x), 2, 3).roll(shift[0], 1).flatten(1)), a=nn.Linear(D, 6),
               b=nn.Linear(6, C))  # fmt: skip
    for shift[0] in (1, 1, 0, 2, 1):
        stepped(model, torch.randn(N, D))


def test_a_loss_that_begins_to_mix_is_refused(passes: list[int]) -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    stepped(model, x, lambda o: o.square().sum(1).mean())
    stepped(model, x, lambda o: o.square().sum(1).mean())
    with pytest.raises(HookjacError, match="mixes samples"):
        step(model, lambda: model(x), lambda o: o.square().mean().sqrt())
    stepped(model, x, lambda o: o.square().sum(1).mean())
    assert len(passes) == 3


def test_a_graph_whose_values_keep_samples_apart_is_never_taken_for_granted(passes: list[int]) -> None:
    """Block-diagonal adjacency: whether samples mix is a matter of values, and these change."""
    blocks = torch.block_diag(*[torch.rand(2, 2) for _ in range(N)])
    model = Fn(lambda m, x, A, y: m.b(torch.tanh(A @ m.a(x))).reshape(N, -1), a=nn.Linear(D, 3), b=nn.Linear(3, 2))
    x, y = torch.randn(2 * N, D), torch.zeros(N)
    for A in (blocks, blocks, torch.rand(2 * N, 2 * N), blocks):
        wanted = each_gradient(model, random_loss, lambda A=A: model(x, A, y))  # type: ignore[misc]
        step(model, lambda A=A: model(x, A, y))  # type: ignore[misc]
        check(model, wanted)
    assert not passes


# The user's own business -------------------------------------------------------------------------------------------


def test_quantities_may_differ_from_step_to_step(passes: list[int]) -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    wanted = each_gradient(model, random_loss, lambda: model(x))
    step(model, lambda: model(x), random_loss, "grad_sample_norm")
    step(model, lambda: model(x), random_loss, hookjac.GradSample(subsample=[2, 0]))
    for name, p in trainable(model).items():
        close(p.grad_sample, wanted[name][[2, 0]], name)  # type: ignore[attr-defined]
    step(model, lambda: model(x), random_loss, hookjac.GradSample(loss_reduction="mean"))
    for name, p in trainable(model).items():
        close(p.grad_sample, N * wanted[name], name)  # type: ignore[attr-defined]
    assert len(passes) == 3
    with pytest.raises(HookjacError, match=r"sample 4 was asked for, but the batch has 4"):
        step(model, lambda: model(x), random_loss, hookjac.GradSample(subsample=[4]))
    step(model, lambda: model(x), random_loss, "grad_sample", "hess_diag")
    assert len(passes) == 4
    assert not any(p._backward_hooks for p in model.parameters())


def test_retain_graph_and_a_backward_that_makes_a_graph(passes: list[int]) -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    stepped(model, x)
    wanted = each_gradient(model, random_loss, lambda: model(x))
    with extend(model, "grad_sample"):
        loss = random_loss(model(x))
        loss.backward(retain_graph=True)
        loss.backward(create_graph=True)
        for name, p in trainable(model).items():
            close(p.grad_sample, wanted[name], name)  # type: ignore[attr-defined]
            assert not p.grad_sample.requires_grad  # type: ignore[attr-defined]
            p.grad = None
    assert len(passes) == 3


def test_gradients_accumulate_as_ever(passes: list[int]) -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    stepped(model, x)
    model.zero_grad()
    for _ in range(3):
        with extend(model, "grad_sample_norm"):
            random_loss(model(x)).backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    (3 * random_loss(twin(x))).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad, "grad")  # type: ignore[arg-type]
    assert len(passes) == 4


def test_hooks_on_parameters_and_tensors(passes: list[int]) -> None:
    """Gradient hooks on parameters never change ours; those on tensors outside the forward neither."""
    model: Any = mlp(nn.Tanh)
    x = torch.randn(N, D)
    stepped(model, x)
    wanted = each_gradient(model, random_loss, lambda: model(x))
    seen = []
    handles = [p.register_hook(lambda g: seen.append(1) or 2 * g) for p in model.parameters()]
    model.zero_grad()
    with extend(model, "grad_sample"):
        random_loss(model(x)).backward()
    for name, p in trainable(model).items():
        close(p.grad_sample, wanted[name], name)
        close(p.grad, 2 * wanted[name].sum(0), name)
    assert len(seen) == 6
    for handle in handles:
        handle.remove()
    assert len(passes) == 2
    with extend(model, "grad_sample"):
        out = model(x)
        out.register_hook(lambda g: 3 * g)
        random_loss(out).backward()
    for name, p in trainable(model).items():
        close(p.grad_sample, wanted[name], name)
    assert len(passes) == 2, "a hook of the block's own: not this time"


def test_hooks_of_the_models_own_are_never_obeyed(passes: list[int]) -> None:
    """Registered as it runs, on tensors and by module: results are the same at the first step and at the third."""

    def way(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        if tensors:
            h.register_hook(lambda g: 2 * g)
        h = h.tanh()
        if nodes:
            h.grad_fn.register_prehook(lambda gs: (5 * gs[0],))  # type: ignore[union-attr]
        return m.b(h)

    tensors = nodes = False
    model, x = Fn(way, a=nn.Linear(D, 4), b=nn.Linear(4, C)), torch.randn(N, D)
    wanted = each_gradient(model, random_loss, lambda: model(x))
    for hooks in ("", "tensors", "nodes", "modules"):
        tensors, nodes = hooks == "tensors", hooks == "nodes"
        if hooks == "modules":
            model.b.register_full_backward_hook(lambda module, gi, go: (3 * gi[0],))  # type: ignore[union-attr,operator]
        for _ in range(3):
            step(model, lambda: model(x), random_loss, "grad_sample")
            for name, p in trainable(model).items():
                close(p.grad_sample, wanted[name], (hooks, name))  # type: ignore[attr-defined]
    assert len(passes) == 3


@pytest.mark.parametrize("asked", [("grad_sample",), ("grad_sample", "hess_diag")])
def test_an_error_in_the_users_backward_leaves_nothing_behind(asked: tuple[str, ...], passes: list[int]) -> None:
    model: Any = mlp(nn.Tanh)
    x = torch.randn(N, D)
    stepped(model, x)

    def fail(g: Tensor) -> Tensor:
        raise RuntimeError("the user's")

    handle = model[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="the user's"), extend(model, *asked):
        random_loss(model(x)).backward()
    handle.remove()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    stepped(model, x)


def test_a_freed_graph_says_what_torch_says(passes: list[int]) -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    stepped(model, x)
    with extend(model, "grad_sample"):
        loss = random_loss(model(x))
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    stepped(model, x)


def test_a_weight_changed_in_place_says_what_torch_says(passes: list[int]) -> None:
    model: Any = mlp(nn.Tanh)
    x = torch.randn(N, D)
    stepped(model, x)
    with extend(model, "grad_sample"):
        loss = random_loss(model(x))
        with torch.no_grad():
            model[2].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    stepped(model, x)


def test_no_parameter_is_met_by_a_detached_part(passes: list[int]) -> None:
    model = Fn(lambda m, x: m.b(m.a(x).detach().tanh()), a=nn.Linear(D, 4), b=nn.Linear(4, C))
    for _ in range(3):
        with extend(model, "grad_sample", "grad_var"):
            random_loss(model(torch.randn(N, D))).backward()
        assert not model.a.weight.grad_sample.any()  # type: ignore[union-attr]
        assert model.b.weight.grad_sample.any()  # type: ignore[union-attr]
    assert len(passes) == 3


def test_nothing_is_kept_alive(passes: list[int]) -> None:
    model: Any = mlp(nn.Tanh)
    outs: list[weakref.ref[Tensor]] = []
    for _ in range(4):
        with extend(model, "grad_sample_norm"):
            out = model(torch.randn(N, D))
            outs.append(weakref.ref(out))
            random_loss(out).backward()
        del out
    assert len(passes) == 4
    assert all(ref() is None for ref in outs), "without the garbage collector"
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


def test_copies_and_threads(passes: list[int]) -> None:
    model = mlp(nn.Tanh)
    stepped(model, torch.randn(N, D))
    twins = [copy.deepcopy(model) for _ in range(4)]
    failed: list[BaseException] = []

    def work(twin: nn.Module) -> None:
        try:
            torch.set_default_dtype(torch.float64)
            for _ in range(10):
                stepped(twin, torch.randn(N, D))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(twin,)) for twin in twins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    assert passes


def test_explain_tells_of_the_road_that_was_planned(passes: list[int]) -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    first = step(model, lambda: model(x)).explain()
    again = step(model, lambda: model(x)).explain()
    assert passes
    assert first.to_dict() == again.to_dict()


def test_autocast(passes: list[int]) -> None:
    model, x = mlp(nn.Tanh).float(), torch.randn(N, D).float()
    found = []
    for _ in range(3):
        with extend(model, "grad_sample"):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            out.float().square().sum().backward()
        found.append([p.grad_sample.clone() for p in model.parameters()])  # type: ignore[attr-defined]
    for a, b in zip(found[0], found[2], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2)


def test_a_parameter_of_its_own_that_is_both_weight_and_data(passes: list[int]) -> None:
    model = Fn(lambda m, x: (x @ m.w).tanh() @ m.w.T, w=par(D, C))
    for _ in range(3):
        stepped(model, torch.randn(N, D))
