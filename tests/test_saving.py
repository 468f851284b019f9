"""Results in files and back, to the last bit; what a file is refused for; pickle, torch.save and deepcopy."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, random_loss
from oracle import trainable
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_kfac import tied_table
from test_quantities import MODELS
from torch import Tensor, nn

import hookjac
from hookjac import HookjacError, JacTensor, Kronecker, KroneckerEigen, KroneckerSum, files
from hookjac.factor import Dense, Lookup, Outer, Sum, Unfolded

ROOT = Path(__file__).resolve().parents[1]
EVERY = [q for q in hookjac.quantity.names() if q not in ("ggn_mp", "hess_mp", "hesscale")]  # the last: not if tied


def parts(value: Any) -> list[Tensor]:
    """All tensors that a result is made of."""
    found: dict[str, Tensor] = {}
    files.pack(value, "it", found)
    return list(found.values())


def same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    assert len(parts(a)) == len(parts(b)) > 0
    for s, t in zip(parts(a), parts(b), strict=True):
        assert s.dtype == t.dtype
        # on whatever device; and one copy may have along an axis what the other has once
        assert torch.equal(*torch.broadcast_tensors(s.cpu(), t.cpu()))
    assert getattr(a, "shape", None) == getattr(b, "shape", None)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))


def filled(*asked: Any, model: nn.Module | None = None, x: Tensor | None = None) -> nn.Module:
    model = net() if model is None else model
    with hookjac.extend(model, *asked):
        random_loss(model(torch.randn(N, D) if x is None else x)).backward()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_every_quantity_comes_back(name: str, tmp_path: Path) -> None:
    case, path = MODELS[name], tmp_path / "found.safetensors"
    model = filled(*EVERY, model=case.build(), x=case.inputs())
    hookjac.save(model, path)
    found = hookjac.load(path)
    assert list(found) == EVERY
    fresh = copy.deepcopy(model)
    assert not any(vars(p) for p in fresh.parameters())
    hookjac.load(path, fresh)
    its = trainable(fresh)
    for key, p in trainable(model).items():
        for q in EVERY:
            same(found[q][key], vars(p)[q])
            same(vars(its[key])[q], vars(p)[q])
        assert torch.equal(found["jac"][key].to_dense(), p.jac.cpu().to_dense())  # type: ignore[attr-defined]
    assert [f.name for f in tmp_path.iterdir()] == ["found.safetensors"]


def unreached() -> nn.Module:
    return Fn(lambda m, x: m.a(x), a=nn.Linear(D, C), b=nn.Linear(D, C))


FACTORS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str, type]] = {
    "positions": (net, lambda: torch.randn(N, 3, D), "0.weight", Outer),
    "bias": (net, lambda: torch.randn(N, D), "0.bias", Dense),
    "unreached": (unreached, lambda: torch.randn(N, D), "b.weight", Dense),
    "table": (
        lambda: nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, C)),
        lambda: torch.randint(6, (N, 2)),
        "0.weight",
        Lookup,
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2, groups=2, padding=1, stride=2), nn.Flatten(), nn.Linear(16, C)),
        lambda: torch.randn(N, 2, 3, 3),
        "0.weight",
        Outer,
    ),
    "table that is a weight": (tied_table, lambda: torch.randint(C, (N, 3)), "e.weight", Sum),
}


@pytest.mark.parametrize("name", FACTORS)
def test_jacobians_as_their_factors(name: str, tmp_path: Path) -> None:
    build, inputs, which, kind = FACTORS[name]
    model = filled("jac", "kfac", model=build(), x=inputs())
    p = dict(model.named_parameters())[which]
    assert type(p.jac.factor) is kind
    if name == "convolution":
        assert isinstance(p.jac.factor.inputs, Unfolded)
    hookjac.save(model, tmp_path / "factors")
    found = hookjac.load(tmp_path / "factors")
    jac = found["jac"][which]
    assert isinstance(jac, JacTensor)
    assert type(jac.factor) is kind
    assert torch.equal(jac.to_dense(), p.jac.cpu().to_dense())
    assert torch.equal(jac.gram(), p.jac.cpu().gram())
    same(found["kfac"][which], p.kfac)
    assert isinstance(found["kfac"][which], KroneckerSum if kind is Sum else Kronecker)
    hookjac.save(model, tmp_path / "dense", "jac", dense=True)
    stored = load_file(tmp_path / "dense")
    assert torch.equal(stored[f"jac/{which}"], p.jac.to_dense().cpu())
    assert type(hookjac.load(tmp_path / "dense")["jac"][which]) is Tensor
    if name == "unreached":
        with safe_open(tmp_path / "factors", framework="pt") as file:
            assert file.get_tensor(f"jac/{which}/factor/t").numel() == 1, "zeros are stored once"


def test_in_the_basis_of_eigenvectors(tmp_path: Path) -> None:
    model = filled(hookjac.KFAC(fisher="exact", corrected=True))
    hookjac.save(model, tmp_path / "found")
    other = loaded_on(tmp_path / "found", copy.deepcopy(model))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert isinstance(q.kfac, KroneckerEigen)
        same(q.kfac, p.kfac)
        assert torch.equal(q.kfac.solve(p.grad, 0.1), p.kfac.solve(p.grad, 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    model = filled("grad_sample", "jac", model=net().to(dtype), x=torch.randn(N, D, dtype=dtype))
    hookjac.save(model, tmp_path / "found")
    for name, p in trainable(loaded_on(tmp_path / "found", net().to(dtype))).items():
        wanted = dict(model.named_parameters())[name]
        assert p.grad_sample.dtype == p.jac.dtype == dtype  # type: ignore[attr-defined]
        assert torch.equal(p.jac.to_dense(), wanted.jac.to_dense())  # type: ignore[attr-defined]


def loaded_on(path: Path, model: nn.Module) -> nn.Module:
    hookjac.load(path, model)
    return model


def test_some_of_them_and_ones_own(tmp_path: Path) -> None:
    mine = hookjac.Quantity(name="mine", columns="loss", reduce=lambda got: got.columns()[0].abs().sum(0))
    model = filled(mine, "grad_sample", "hess_mp", "kfac")
    hookjac.save(model, tmp_path / "found", "kfac", "mine")
    assert list(hookjac.load(tmp_path / "found")) == ["kfac", "mine"]
    hookjac.load(tmp_path / "found").save(tmp_path / "again")
    hookjac.save(hookjac.load(tmp_path / "again"), tmp_path / "third", "mine")
    found = hookjac.load(tmp_path / "third")
    assert repr(found) == "Results(mine; 4 parameters)"
    assert len(found) == 1
    for name, p in model.named_parameters():
        same(found["mine"][name], p.mine)


def test_those_of_accumulate(tmp_path: Path) -> None:
    model, batches = net(), [(torch.randn(N, D), torch.randint(C, (N,))) for _ in range(2)]
    found = hookjac.accumulate(model, F.cross_entropy, batches, "kfac", "ggn_diag")
    hookjac.save(found, tmp_path / "one", "kfac")
    again = hookjac.load(tmp_path / "one", fresh := copy.deepcopy(model))
    assert repr(again) == "Accumulated(kfac; 8 samples in 2 batches)"
    for name, p in fresh.named_parameters():
        assert set(vars(p)) == {"kfac"}
        same(p.kfac, found["kfac"][name])


def test_only_listed_parameters(tmp_path: Path) -> None:
    """Others lose what they had: results of two backwards shall not be read together."""
    model = net()
    with hookjac.extend(model, "grad_sample"):
        random_loss(model(torch.randn(N, D))).backward(inputs=[model[0].weight])
    hookjac.save(model, tmp_path / "found")
    other = filled("grad_sample", "jac")
    hookjac.load(tmp_path / "found", other)
    assert [name for name, p in other.named_parameters() if hasattr(p, "grad_sample")] == ["0.weight"]
    assert all(hasattr(p, "jac") for p in other.parameters())


def test_graphs_are_left_behind(tmp_path: Path) -> None:
    model = net()
    with hookjac.extend(model, "jac", create_graph=True):
        random_loss(model(torch.randn(N, D))).backward()
    assert model[0].weight.jac.requires_grad
    hookjac.save(model, tmp_path / "found")
    assert not hookjac.load(tmp_path / "found")["jac"]["0.weight"].requires_grad


# What it refuses -----------------------------------------------------------------------------------------------


def test_results_that_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "found"
    with pytest.raises(TypeError, match="expects a model, or what accumulate or load returned, got dict"):
        hookjac.save({"kfac": {}}, path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expects names of quantities after the path"):
        hookjac.save(net(), path, hookjac.KFAC())  # type: ignore[arg-type]
    with pytest.raises(HookjacError, match="there are no results to save"):
        hookjac.save(net(), path)
    with pytest.raises(HookjacError, match="there are no 'kfac' to save"):
        hookjac.save(filled("jac"), path, "kfac")
    with pytest.raises(HookjacError, match="in a folder that does not exist"):
        hookjac.save(filled("jac"), tmp_path / "none" / "found")
    with pytest.raises(HookjacError, match=r"hess_mp of 0\.weight is a Block: products with the hessian block"):
        hookjac.save(filled("hess_mp"), path)
    model = filled("grad_sample")
    model[0].weight.grad_sample = [model[0].weight.grad_sample]
    with pytest.raises(HookjacError, match=r"grad_sample of 0\.weight is a list"):
        hookjac.save(model, path)
    model[0].weight.grad_sample = torch.eye(3).to_sparse()
    with pytest.raises(HookjacError, match=r"grad_sample of 0\.weight is a Tensor"):
        hookjac.save(model, path)
    assert not list(tmp_path.iterdir())


def test_names_that_fall_together(tmp_path: Path) -> None:
    clash = Fn(lambda m, x: x, **{"w": nn.Parameter(torch.ones(2)), "w/B": nn.Parameter(torch.ones(2))})
    clash.w.kfac = Kronecker(None, torch.eye(2), torch.Size([2]))
    dict(clash.named_parameters())["w/B"].kfac = torch.ones(2)  # type: ignore[attr-defined]
    with pytest.raises(HookjacError, match="two results would have the name 'kfac/w/B'"):
        hookjac.save(clash, tmp_path / "found")


def test_an_input_that_was_written_to(tmp_path: Path) -> None:
    x = torch.randn(N, D)
    model = filled("jac", x=x)
    x.add_(1)
    with pytest.raises(HookjacError, match="was modified in place since"):
        hookjac.save(model, tmp_path / "found")


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "found"
    hookjac.save(filled("kfac"), path)
    kept = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        hookjac.save(filled("jac"), path)
    assert path.read_bytes() == kept
    assert [f.name for f in tmp_path.iterdir()] == ["found"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: nn.Linear(D, C),
            r"results of a parameter '0\.weight', which the model does not have; it has \['weight', 'bias'\]",
        ),
        (
            lambda: nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C)),
            r"'0\.weight' \[4, 5\] of torch\.float64, but the model's is \[5, 5\] of torch\.float64",
        ),
        (
            lambda: net().float(),
            r"'0\.weight' \[4, 5\] of torch\.float64, but the model's is \[4, 5\] of torch\.float32",
        ),
    ],
)
def test_another_model(build: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    hookjac.save(filled("kfac"), tmp_path / "found")
    model = build()
    with pytest.raises(HookjacError, match=message):
        hookjac.load(tmp_path / "found", model)
    assert not any(vars(p) for p in model.parameters())
    with pytest.raises(TypeError, match="expects a model after the path, got str"):
        hookjac.load(tmp_path / "found", "model")  # type: ignore[arg-type]


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "found"
    path.write_bytes(b"PK\x03\x04 not one of ours")
    with pytest.raises(HookjacError, match="no whole safetensors file"):
        hookjac.load(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(HookjacError, match="was not written by hookjac"):
        hookjac.load(path)
    save_file({"a": torch.ones(2)}, path, metadata={"format": "hookjac 1", "about": "{}"})
    with pytest.raises(HookjacError, match="has the format 'hookjac 1', this version reads 'hookjac 2'"):
        hookjac.load(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda about: about["results"]["kfac"]["0.weight"].update({"is": "os.system"}),
        lambda about: about["results"]["kfac"]["0.weight"].update({"more": 1}),
        lambda about: about["results"]["kfac"]["0.weight"]["B"].update(tensor="elsewhere"),
        lambda about: about["results"]["kfac"]["0.weight"]["B"].update(shape=[7, 7]),
        lambda about: about["results"]["jac"]["0.weight"].update(dtype="system"),
        lambda about: about["results"]["jac"]["0.weight"].update(factor=3),
        lambda about: about.pop("parameters"),
        lambda about: about["parameters"].pop("0.weight"),
        lambda about: about["results"].update(data={"0.weight": about["results"]["kfac"]["0.weight"]["B"]}),
        lambda about: about["results"].update(grad={}),
        lambda about: about.update(results=[]),
    ],
)
def test_a_note_that_was_tampered_with(spoil: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    path = tmp_path / "found"
    hookjac.save(filled("kfac", "jac"), path)
    tensors, about = files.read(path, "results")
    spoil(about)
    save_file(tensors, path, metadata={"format": "hookjac 2", "about": json.dumps(about)})
    model = net()
    with pytest.raises(HookjacError, match="is damaged: its note does not fit its tensors"):
        hookjac.load(path, model)
    assert not any(vars(p) for p in model.parameters())


# Other ways to keep a model ------------------------------------------------------------------------------------


def test_pickle_carries_results_and_deepcopy_leaves_them() -> None:
    """As PyTorch has it: a parameter's attributes are pickled with it, and not copied. `p.jac` becomes dense."""
    model = filled("jac", "kfac", "grad_sample", "hess_mp")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert set(vars(q)) == {"jac", "kfac", "grad_sample", "hess_mp"}
            assert type(q.jac) is Tensor
            assert torch.equal(q.jac, p.jac.to_dense())
            same(q.kfac, p.kfac)
            assert torch.equal(q.grad_sample, p.grad_sample)
            with pytest.raises(HookjacError, match="needed the graph of their backward, which was not saved"):
                q.hess_mp(p)
    for p, q in zip(model.parameters(), copy.deepcopy(model).parameters(), strict=True):
        assert not vars(q)
        for value in (p.jac, p.kfac, p.grad_sample):
            same(copy.deepcopy(value), value)
            assert {t.data_ptr() for t in parts(copy.deepcopy(value))}.isdisjoint(t.data_ptr() for t in parts(value))


def test_state_dicts_know_nothing_of_results() -> None:
    model = filled("jac", "kfac")
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    found = torch.load(buffer)  # weights only, the default
    assert list(found) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not any(vars(t) for t in found.values())


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    said, names = io.StringIO(), {"__name__": "page"}
    with contextlib.redirect_stdout(said):
        for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "saving.md").read_text(), re.S):
            exec(snippet, names)
    assert said.getvalue().splitlines() == [
        "Results(jac, kfac; 4 parameters)",
        "JacTensor(shape=(32, 3, 16, 8), Outer, dtype=torch.float32)",
        "True",
        "Accumulated(ggn_diag; 32 samples in 4 batches)",
    ]
