"""A data set in batches against the same in one backward; and runs that are killed half-way."""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D
from oracle import close, trainable
from test_quantities import MODELS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hookjac
from hookjac import KFAC, GGNDiagMC, HookjacError, Kronecker, accumulate, extend

SAMPLES, BATCH = 11, 4  # the last batch is smaller
ADDS = ("grad_sq_sum", "grad_var", "ggn_diag", "hess_diag", "ggn_block", "hess_block")


def data(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(2)
    model = MODELS[name].build()
    x = torch.cat([MODELS[name].inputs() for _ in range(4)])[:SAMPLES]
    return model, x, torch.randint(C, (SAMPLES,))


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_one_backward(name: str, reduction: Any) -> None:
    model, x, y = data(name)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        value = F.cross_entropy(out, y, reduction=reduction)
        penalty = MODELS[name].penalty
        return value + penalty(model) if penalty and reduction == "mean" else value

    found = accumulate(model, loss, batches(x, y), *ADDS, reduction=reduction)
    assert (found.samples, found.batches, list(found)) == (SAMPLES, 3, list(ADDS))
    mine = {q: {k: getattr(p, q) for k, p in trainable(model).items()} for q in ADDS}
    with hookjac.extend(model, *ADDS):
        loss(model(x), y).backward()
    for q in ADDS:
        for k, p in trainable(model).items():
            close(mine[q][k], getattr(p, q), (q, k))
            assert mine[q][k] is found[q][k]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["MLP", "CNN", "transformer"])
def test_kronecker_factors(name: str, reduction: Any, fisher: Any, sharing: Any) -> None:
    model, x, y = data(name)
    asked = KFAC(fisher=fisher, sharing=sharing)
    loss = lambda out, y: F.cross_entropy(out, y, reduction=reduction)
    found = accumulate(model, loss, batches(x, y), asked, reduction=reduction)["kfac"]
    with hookjac.extend(model, asked):
        loss(model(x), y).backward()
    for k, p in trainable(model).items():
        wanted: Kronecker = p.kfac  # type: ignore[attr-defined]
        close(found[k].B, wanted.B, k)
        assert (found[k].A is None) == (wanted.A is None)
        if wanted.A is not None:
            close(found[k].A, wanted.A, k)
        assert (found[k].shape, found[k].swapped, found[k].rows) == (wanted.shape, wanted.swapped, wanted.rows)


def test_a_parameter_that_only_some_batches_reach() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.never = nn.Linear(D, C), nn.Linear(D, C), nn.Linear(D, C)

        def forward(self, x: Tensor, which: int) -> Tensor:
            return self.a(x) if which == 0 else self.b(x)  # type: ignore[no-any-return]

    model, y = Choice(), torch.randint(C, (4,))
    x = torch.randn(3, 4, D)
    loader = [((x[0], 1), y), ((x[1], 0), y), ((x[2], 1), y)]
    found = accumulate(model, F.cross_entropy, loader, KFAC(fisher="exact"), "ggn_diag")
    for layer, of in (("a", [1]), ("b", [0, 2])):
        A = sum(x[k].T @ x[k] for k in of) / (4 * len(of))
        close(found["kfac"][f"{layer}.weight"].A, A, layer)  # type: ignore[arg-type]
    assert found["kfac"]["never.weight"].B.eq(0).all()
    assert found["ggn_diag"]["never.weight"].eq(0).all()


def test_forms_of_batches() -> None:
    model, x, y = data("MLP")
    wanted = accumulate(model, F.cross_entropy, batches(x, y), "ggn_diag")
    dicts = [{"x": a, "y": b} for a, b in batches(x, y)]
    step = lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"])
    by_step = accumulate(model, None, iter(dicts), "ggn_diag", step=step)
    by_name = accumulate(model, F.cross_entropy, [({"input": a}, b) for a, b in batches(x, y)], "ggn_diag")
    as_tuples = accumulate(model, nn.CrossEntropyLoss(), [((a,), b) for a, b in batches(x, y)], "ggn_diag")
    for found in (by_step, by_name, as_tuples):
        for k in trainable(model):
            assert torch.equal(found["ggn_diag"][k], wanted["ggn_diag"][k])


def test_batches_without_a_sample_count_for_nothing() -> None:
    model, x, y = data("MLP")
    wanted = accumulate(model, F.cross_entropy, batches(x, y), "ggn_diag", "grad_var")
    found = accumulate(model, F.cross_entropy, [(x[:0], y[:0]), *batches(x, y), (x[:0], y[:0])], "ggn_diag", "grad_var")
    assert (found.samples, found.batches) == (SAMPLES, 5)
    for q in found:
        for k in trainable(model):
            assert torch.equal(found[q][k], wanted[q][k])
    with pytest.raises(HookjacError, match="no batch of the loader had a sample"):
        accumulate(model, F.cross_entropy, [(x[:0], y[:0])], "ggn_diag")


def test_ones_own_quantity_adds_up() -> None:
    model, x, y = data("MLP")

    def cubes(got: hookjac.Received) -> Tensor:
        return got.columns()[0].pow(3).sum(0)

    mine = hookjac.Quantity(name="cubes", columns="loss", reduce=cubes, adds=hookjac.Adds(powers=(3,)))
    found = accumulate(model, F.cross_entropy, batches(x, y), mine)
    with hookjac.extend(model, "grad_sample"):
        F.cross_entropy(model(x), y).backward()
    for k, p in trainable(model).items():
        close(found["cubes"][k], p.grad_sample.pow(3).sum(0), k)  # type: ignore[attr-defined]


def test_it_leaves_the_rest_alone() -> None:
    model, x, y = data("MLP")
    with hookjac.extend(model, "ggn_diag"):
        model(x).sum().backward()
    before = {k: (p.grad.clone(), p.ggn_diag) for k, p in trainable(model).items()}  # type: ignore

    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield x[:4], y[:4]
        yield x[:4], torch.full((4,), C + 7)

    with pytest.raises(IndexError):
        accumulate(model, F.cross_entropy, broken(), "ggn_diag", "hess_diag")
    for k, p in trainable(model).items():
        assert torch.equal(p.grad, before[k][0])  # type: ignore
        assert p.ggn_diag is before[k][1]  # type: ignore
        assert not hasattr(p, "hess_diag")
    accumulate(model, F.cross_entropy, batches(x, y), "hess_diag")
    for k, p in trainable(model).items():
        assert torch.equal(p.grad, before[k][0])  # type: ignore
        assert p.ggn_diag is before[k][1]  # type: ignore


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), F.nll_loss])
def test_targets_that_are_ignored_are_refused_under_a_mean(loss: Any) -> None:
    model, x = nn.Linear(D, C), torch.randn(6, D)
    y = torch.tensor([0, 1, 2, 0, -100, 1])
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    with pytest.raises(HookjacError, match=r"targets of a batch hold -100, which \w+ leaves out"):
        accumulate(model, loss, batches, "ggn_diag" if loss is not F.nll_loss else "grad_sq_sum")
    found = accumulate(model, functools.partial(F.cross_entropy, reduction="sum"), batches, "ggn_diag", reduction="sum")
    with extend(model, "ggn_diag"):
        F.cross_entropy(model(x), y, reduction="sum").backward()
    close(found["ggn_diag"]["weight"], model.weight.ggn_diag, "sum")


def test_checkpoints_of_names_that_look_like_numbers(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(C, D))
            self.register_parameter("w/0", nn.Parameter(torch.randn(C)))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.T + getattr(self, "w/0")

    model, x, y = Named(), torch.randn(6, D), torch.randint(C, (6,))
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    start = hookjac.Quantity(name="start", columns="loss", reduce=lambda got: got.sum(), adds=hookjac.Adds())
    asked = ("ggn_diag", KFAC(fisher="exact"), start)
    path = tmp_path / "run"
    whole = accumulate(model, F.cross_entropy, batches, *asked)
    accumulate(model, F.cross_entropy, batches[:1], *asked, checkpoint=path, every=1)
    found = accumulate(model, F.cross_entropy, batches, *asked, checkpoint=path, every=1)
    for q in ("ggn_diag", "start"):
        for name in ("w", "w/0"):
            assert torch.equal(found[q][name], whole[q][name]), (q, name)


def test_memory_does_not_grow() -> None:
    model, x, y = data("MLP")
    alive: list[int] = []

    def many() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(40):
            gc.collect()
            alive.append(sum(isinstance(o, Tensor) for o in gc.get_objects()))
            yield x[:4], y[:4]

    accumulate(model, F.cross_entropy, many(), "ggn_diag", "kfac")
    assert max(alive[2:]) == min(alive[2:])


# Interrupted and resumed ---------------------------------------------------------------------------------------


def noisy() -> nn.Module:
    torch.manual_seed(9)
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, C))


def everything(generator: torch.Generator) -> tuple[Any, ...]:
    return KFAC(samples=2), GGNDiagMC(generator=generator), "hess_diag", "grad_var"


def stopping(loader: Any, at: int) -> Any:
    class Stopping:
        generator = loader.generator

        def __iter__(self) -> Iterator[Any]:
            for k, batch in enumerate(loader):
                if k == at:
                    raise KeyboardInterrupt
                yield batch

    return Stopping()


def same(a: hookjac.Accumulated, b: hookjac.Accumulated) -> bool:
    assert (list(a), a.samples, a.batches) == (list(b), b.samples, b.batches)
    pairs = [(a[q][k], b[q][k]) for q in a for k in a[q]]
    flat = [(t, s) for f, g in pairs for t, s in ([(f.A, g.A), (f.B, g.B)] if isinstance(f, Kronecker) else [(f, g)])]
    return all((t is None and s is None) or torch.equal(t, s) for t, s in flat)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("at", [0, 1, 5, 8, 10])
def test_resumed_runs_are_equal_to_the_last_bit(tmp_path: Path, at: int, own: bool) -> None:
    x, y = torch.randn(43, D), torch.randint(C, (43,))

    def run(stop: int | None, path: Path | None) -> hookjac.Accumulated:
        torch.manual_seed(3)
        order = torch.Generator().manual_seed(5) if own else None
        loader: Any = DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=order)
        loader = loader if stop is None else stopping(loader, stop)
        drawn = torch.Generator().manual_seed(8)
        return accumulate(noisy_model, F.cross_entropy, loader, *everything(drawn), checkpoint=path, every=3)

    noisy_model = noisy()
    wanted = run(None, None)
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(at, path)
    assert path.exists() == (at >= 3)
    assert same(run(None, path), wanted)
    assert same(run(None, path), wanted)  # a finished run gives what it found
    assert [f.name for f in tmp_path.iterdir()] == ["run.safetensors"]


PROGRAM = """
import sys, time, torch, torch.nn.functional as F, hookjac
from torch.utils.data import DataLoader, TensorDataset
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
data = TensorDataset(torch.randn(80, 5), torch.randint(3, (80,)))
slow = float(sys.argv[2])
def loss(out, y):
    time.sleep(slow)
    return F.cross_entropy(out, y)
loader = DataLoader(data, 2, shuffle=True)
found = hookjac.accumulate(model, loss, loader, "ggn_diag_mc", "kfac", checkpoint=sys.argv[1], every=1)
found.save(sys.argv[1] + ".result")
"""


@pytest.mark.skipif(os.name != "posix", reason="kills with a signal of POSIX")
def test_a_killed_process(tmp_path: Path) -> None:
    def start(path: Path, slow: float) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(path), str(slow)])

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, 0).wait(120) == 0
    process = start(killed, 0.2)
    deadline = time.monotonic() + 60
    while not killed.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not Path(f"{killed}.result").exists()
    assert start(killed, 0).wait(120) == 0
    assert same(hookjac.load(f"{whole}.result"), hookjac.load(f"{killed}.result"))


def test_results_are_saved_and_read_back(tmp_path: Path) -> None:
    model, x, y = data("transformer")
    found = accumulate(model, F.cross_entropy, batches(x, y), "kfac", "ggn_diag")
    found.save(tmp_path / "found.safetensors")
    again = hookjac.load(tmp_path / "found.safetensors")
    assert same(found, again)
    assert repr(again) == repr(found) == "Accumulated(kfac, ggn_diag; 11 samples in 3 batches)"
    for k, one in found["kfac"].items():
        other = again["kfac"][k]
        assert (one.shape, one.swapped, one.rows) == (other.shape, other.swapped, other.rows)


# What it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantities": ("grad_sample",)}, r"'grad_sample' do not add up"),
        ({"quantities": ("jac",)}, r"'jac' do not add up"),
        ({"quantities": (KFAC(corrected=True),)}, r"basis of their own"),
        ({"quantities": (hookjac.GGNDiag(subsample=[0]),)}, r"subsample= picks samples of a batch"),
        ({"reduction": "none"}, r"reduction must be"),
        ({"every": 0}, r"every must be a positive integer"),
        ({"quantities": (KFAC(fisher="kfra"),)}, r"averages of averages"),
        ({"quantities": ()}, r"needs the names of quantities whose batches add up"),
        ({"loss_fn": nn.CrossEntropyLoss(weight=torch.ones(C))}, r"class weights or ignore_index"),
        ({"loss_fn": nn.CrossEntropyLoss(ignore_index=0)}, r"class weights or ignore_index"),
        ({"loss_fn": None}, r"either a loss_fn"),
        ({"loss_fn": nn.CrossEntropyLoss(reduction="sum")}, r"loss_fn has reduction='sum'"),
        ({"loader": []}, r"the loader gave 0 batches"),
        ({"loader": [torch.ones(3, D)]}, r"a batch is a Tensor, expected \(inputs, \*targets\)"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    model, x, y = data("MLP")
    given: dict[str, Any] = {
        "loss_fn": F.cross_entropy,
        "loader": batches(x, y),
        "quantities": ("ggn_diag",),
        **options,
    }
    loss_fn, loader, quantities = (given.pop(k) for k in ("loss_fn", "loader", "quantities"))
    with pytest.raises((ValueError, HookjacError), match=message):
        accumulate(model, loss_fn, loader, *quantities, **given)


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    model, x, y = data("MLP")
    path = tmp_path / "run"

    def run(*asked: Any, loader: Any = None, **options: Any) -> None:
        accumulate(model, F.cross_entropy, loader or batches(x, y), *asked, checkpoint=path, **options)

    run("ggn_diag")
    kept = path.read_bytes()
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("of another run", lambda: run("hess_diag")),
        ("of another run", lambda: run("ggn_diag", "kfac")),
        ("of another run", lambda: run("ggn_diag", reduction="sum")),
        ("does not repeat itself", lambda: run("ggn_diag", loader=batches(x + 1, y))),
        ("the loader gave 2 batches, expected at least 3", lambda: run("ggn_diag", loader=batches(x, y)[:2])),
    ]
    for message, again in refused:
        with pytest.raises(HookjacError, match=message):
            again()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(HookjacError, match="of another run"):
        run("ggn_diag")
    assert path.read_bytes() == kept
    path.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(HookjacError, match="no whole safetensors file"):
        run("ggn_diag")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, path)
    for read in (lambda: run("ggn_diag"), lambda: hookjac.load(path)):
        with pytest.raises(HookjacError, match="was not written by hookjac"):
            read()
    save_file({"a": torch.ones(2)}, path, metadata={"format": "hookjac 2", "about": json.dumps({"results": {}})})
    with pytest.raises(HookjacError, match="is a saved result, not a checkpoint"):
        run("ggn_diag")


def test_files_that_cannot_be_written_are_said_before_the_work(tmp_path: Path) -> None:
    model, x, y = data("MLP")
    seen: list[int] = []

    def loader() -> Any:
        seen.append(1)
        yield from batches(x, y)

    with pytest.raises(HookjacError, match="in a folder that does not exist"):
        accumulate(model, F.cross_entropy, loader(), "ggn_diag", checkpoint=tmp_path / "none" / "a")
    with pytest.raises(HookjacError, match="is a folder"):
        accumulate(model, F.cross_entropy, loader(), "ggn_diag", checkpoint=tmp_path)
    assert not seen
    found = accumulate(model, F.cross_entropy, batches(x, y), "ggn_diag", checkpoint=tmp_path / "run")
    with pytest.raises(HookjacError, match="in a folder that does not exist"):
        found.save(tmp_path / "none" / "a")
    with pytest.raises(HookjacError, match="is a checkpoint of accumulate, not a saved result"):
        hookjac.load(tmp_path / "run")


def test_a_penalty_would_be_counted_for_each_batch() -> None:
    model, x, y = data("MLP")

    def step(model: nn.Module, batch: Any) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum") + penalty

    with pytest.raises(HookjacError, match="which a sum over batches would count once for each"):
        accumulate(model, None, batches(x, y), "hess_diag", reduction="sum", step=step)


def test_arguments_in_another_order() -> None:
    model, x, y = data("MLP")
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module, got function"):
        accumulate(F.relu, F.cross_entropy, batches(x, y), "ggn_diag")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expects a loader of batches after the loss, got function"):
        accumulate(model, batches(x, y), F.cross_entropy, "ggn_diag")  # type: ignore[arg-type]
