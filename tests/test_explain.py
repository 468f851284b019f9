"""Roads and costs: what is said before anything walks is what then happens."""

from __future__ import annotations

import contextlib
import gc
import json
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, mlp, par
from leftovers import state
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import hookjac
from hookjac import HookjacError, explain, extend
from hookjac.quantity import names
from hookjac.survey import Count, size_of

Y = torch.tensor([0, 2, 1, 2])


def entropy(out: Tensor) -> Tensor:
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[1])


class Sentence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(20, 8)
        self.t = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.h = nn.Linear(8, 5)
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.h(self.t(self.e(x)).mean(1))
        return out


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(36, C)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "MLP": (
        lambda: nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)),
        lambda: torch.randn(24, 32),
    ),
    "CNN": (cnn, lambda: torch.randn(N, 3, 8, 8)),
    "sentence": (Sentence, lambda: torch.randint(20, (N, 6))),
    "bare": (
        lambda: Fn(lambda m, x: torch.atan2(m.w, x.unsqueeze(1)).sum(2) @ m.v, w=par(D, D), v=par(D, C)),
        lambda: torch.randn(N, D),
    ),
}


def left(model: nn.Module, q: str) -> float:
    return sum(size_of(getattr(p, q)) for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_of_the_results(name: str) -> None:
    """Of every quantity that is not refused; where a rank of C - 1 is enough, C is what was said."""
    build, inputs = MODELS[name]
    model, x = build(), inputs()
    bills = explain(model, x, loss_fn=entropy).quantities
    assert list(bills) == names()
    for q, bill in bills.items():
        assert not bill.refused, (q, bill.refused)
        with extend(model, q):
            entropy(model(x)).backward()
        found = left(model, q)
        assert bill.bytes == sum(price.bytes for price in bill.each.values())
        if q == "ggn_sqrt":
            C = model(x).shape[1]
            assert found == bill.bytes * (C - 1) / C or found == bill.bytes
        elif q == "jac":
            assert 0.5 * bill.bytes <= found <= bill.bytes, "columns shared by all samples are kept once"
        else:
            assert found == bill.bytes, q


def counted(run: Callable[[], Any]) -> float:
    with Count() as count:
        run()
    return count.cost.flops


@pytest.mark.parametrize("name", ["MLP", "sentence"])
def test_flops_are_about_those_that_run(name: str) -> None:
    """Counted operation by operation; by how much they may differ is said of each."""
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model, x = build().eval(), inputs()
    told = explain(model, x, loss_fn=entropy)
    plain = counted(entropy(model(x)).backward)
    for q, bill in told.quantities.items():
        if q.endswith("_mp") or q.startswith("hess"):
            continue  # products come later; the bills of the Hessian count overheads, too
        for _ in range(2):  # the first looks at the structure, too
            with extend(model, q):
                loss = entropy(model(x))
                ours = counted(loss.backward) - plain
        # one column's walk, and its gradients, may be the step's own
        assert 0.4 * ours <= bill.flops <= 2.6 * ours + 1.7 * plain, (q, bill.flops, ours)


def test_more_columns_and_samples_cost_more() -> None:
    model = mlp(nn.Tanh)
    few, many = (explain(model, torch.randn(n, D)).quantities for n in (4, 40))
    for q in ("grad_sample", "jac", "ggn_diag", "kfac"):
        assert 8 < many[q].flops / few[q].flops < 11, q
    assert 80 < many["ntk"].bytes / few["ntk"].bytes < 120
    one, two = (explain(model, torch.randn(N, D), hookjac.GGNDiagMC(samples=k)).quantities for k in (1, 2))
    assert two["ggn_diag_mc"].columns == 2 * one["ggn_diag_mc"].columns == 2
    assert two["ggn_diag_mc"].flops == pytest.approx(2 * one["ggn_diag_mc"].flops, rel=0.3)


def test_layers_are_all_there_in_their_order() -> None:
    told = explain(cnn(), torch.randn(N, 3, 8, 8), "grad_sample")
    kinds = [(layer.layer, layer.kind, layer.shape) for layer in told.layers if layer.layer]
    assert kinds == [
        ("0", "Conv2d", (N, 4, 6, 6)), ("1", "GroupNorm", (N, 4, 6, 6)), ("2", "ReLU", (N, 4, 6, 6)),
        ("3", "MaxPool2d", (N, 4, 3, 3)), ("4", "Flatten", (N, 36)), ("5", "Dropout", (N, 36)),
        ("6", "Linear", (N, C)),
    ]  # fmt: skip
    roads = {layer.layer: layer.road for layer in told.layers}
    assert roads["0"] == "rule 'convolution'"
    assert roads["3"] == "autograd's nodes"
    cost = {layer.layer: layer.flops for layer in told.layers}
    assert cost["6"] == N * C * (2 * 36 + 2)
    assert cost["0"] == 2 * 27 * N * 4 * 36


def test_roads_and_reasons() -> None:
    build, inputs = MODELS["bare"]
    told = explain(build(), inputs(), "grad_sample", "hess_diag").to_dict()
    assert told["parameters"]["w"]["road"] == "masked columns"
    assert told["parameters"]["w"]["hessian"] == "entries"
    assert told["quantities"]["hess_diag"]["each"]["w"]["flops"] > 0
    assert "1 by entries" in told["quantities"]["hess_diag"]["note"]
    assert [layer["layer"] for layer in told["layers"]] == ["(model)", ""]
    sentence, words = MODELS["sentence"]
    told = explain(sentence(), words(), "grad_sample").to_dict()
    assert "not reached" in told["parameters"]["spare.weight"]["why"]
    (spare,) = [layer for layer in told["layers"] if layer["layer"] == "spare"]
    assert (spare["road"], spare["shape"]) == ("none", ())
    assert "not called" in spare["why"]
    assert {layer["columns"] for layer in told["layers"] if layer["road"] != "none"} == {"V"}


def test_a_layer_called_twice_has_two_rows() -> None:
    model = Fn(lambda m, x: m.a(m.a(x).tanh()), a=nn.Linear(D, D))
    told = explain(model, torch.randn(N, D), "kfac")
    assert [layer.layer for layer in told.layers] == ["a", "a", ""]
    assert "2 uses" in told.rows[0].why


@pytest.mark.parametrize("asked", [("grad_sample",), ("grad_sample", "hess_diag"), ("ggn_mp",)])
@pytest.mark.parametrize("name", MODELS)
def test_after_a_backward_it_says_the_same(name: str, asked: tuple[str, ...]) -> None:
    """Of every layer, every parameter and every quantity."""
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model, x = build().eval(), inputs()
    before = explain(model, x, *asked, loss_fn=entropy)
    for _ in range(2):
        with extend(model, *asked) as ext:
            entropy(model(x)).backward()
        after = ext.explain()
        assert after.rows == before.rows
        assert [a for a in after.layers if a.layer] == [b for b in before.layers if b.layer]
        assert after.quantities == before.quantities


def layers(told: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(layer.layer, layer.kind, layer.shape) for layer in told.layers if layer.layer]


def after(model: nn.Module, x: Tensor, *asked: str) -> Any:
    with extend(model, *asked) as ext:
        model(x).square().sum().backward()
    return ext.explain()


def test_a_quick_step_lists_every_layer_as_well() -> None:
    """Such a one does not look at layers; nor is its graph like the one that was met before."""
    model = cnn()
    wanted = [(name, kind, (2, *shape[1:])) for name, kind, shape in layers(after(model, torch.randn(N, 3, 8, 8)))]
    told = after(model, torch.randn(2, 3, 8, 8), "grad_sample")
    assert layers(told) == wanted
    assert {layer.layer: layer.why for layer in told.layers}["2"] == "quick step: nodes only"
    assert {layer.columns for layer in told.layers} == {"V"}
    assert sum(layer.flops for layer in told.layers) > 0


def a_checkpoint(model: Any, x: Tensor, reentrant: bool, last: bool) -> Tensor:
    found: Tensor = checkpoint(model.b, model.a(x), use_reentrant=reentrant)
    return found if last else model.c(found)  # type: ignore[no-any-return]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_within_a_checkpoint(reentrant: bool, last: bool) -> None:
    """Once each, in their places: those of a reentrant one make their nodes when they run again."""
    parts = {"a": nn.Linear(D, D), "b": nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.MaxPool1d(1))}
    parts |= {} if last else {"c": nn.Linear(D, D)}
    model, x = Fn(lambda m, x: a_checkpoint(m, x, reentrant, last), **parts), torch.randn(N, D)
    for told in (explain(model, x, "grad_sample"), after(model, x, "grad_sample"), after(model, x, "kfac")):
        assert [name for name, _, _ in layers(told)] == ["a", "b.0", "b.1", "b.2", *([] if last else ["c"])]
        by = {layer.layer: layer for layer in told.layers}
        assert {layer.columns for layer in told.layers} == {"V"}
        assert by["b.2"].why == "no rule for its class"
        assert by["b.1"].why == ("rule for its class" if reentrant else "within a checkpoint")


class Within(nn.Module):
    """Parameters of its own, and all the work done by a child."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.spare = nn.Linear(D, D), par(D)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.child(x)
        return out


def without_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = m.a(x)
    return m.b(x)  # type: ignore[no-any-return]


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, C))
    return model.requires_grad_(False).append(nn.Linear(C, C))


def modified(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    found: Tensor = m.b(h)
    h.mul_(2)  # nobody saved it but our note
    return found


def forces(m: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    energy = m.b(m.a(x).tanh()).sum()
    return torch.autograd.grad(energy, x, create_graph=True)[0]


def halved(model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(lambda module, args: (args[0] / 2,))
    return model


REASONS: dict[str, tuple[Callable[[], nn.Module], str, str, str]] = {
    "a closed form": (lambda: mlp(nn.Tanh), "0", "rule 'linear'", "rule for its class"),
    "no rule": (lambda: nn.Sequential(nn.Linear(D, 4), nn.MaxPool1d(1), nn.Linear(4, C)), "1", "autograd's nodes",
                "no rule for its class"),
    "a rule for its node": (lambda: Fn(lambda m, x: m.b(x, x), b=nn.Bilinear(D, D, C)), "b",
                            "rules 'bilinear form', 'sum' and autograd's nodes",
                            "by its nodes TrilinearBackward0, AddBackward0; no rule for its class"),
    "in place": (lambda: nn.Sequential(nn.Linear(D, 4), nn.ReLU(inplace=True), nn.Linear(4, C)), "1",
                 "autograd's nodes", "an option that its rule does not cover"),
    "pruned": (lambda: nn.Sequential(prune.identity(nn.Linear(D, C), "weight")), "0",
               "rule 'linear map'", "by its node AddmmBackward0; its parameters are not those of its class"),
    "its own forward": (lambda: nn.Sequential(type("Mine", (nn.Linear,), {"forward": lambda m, x: F.linear(
                        x, m.weight, m.bias)})(D, C)), "0", "rule 'linear map'",
                        "by its node AddmmBackward0; has a forward of its own"),
    "modified": (lambda: Fn(modified, a=nn.Linear(D, 4), b=nn.Tanh()), "b", "autograd's nodes",
                 "its input or weight was modified in place"),
    "hooked": (lambda: nn.Sequential(nn.Linear(D, 4), halved(nn.Linear(4, C))), "1",
               "rule 'linear' and autograd's nodes", "rule for its class; nodes of hooks beside it"),
    "of weights": (lambda: Fn(lambda m, x: m.b(x.unsqueeze(1) + m.p(torch.arange(3).unsqueeze(0))).mean(1),
                              p=nn.Embedding(3, D), b=nn.Linear(D, C)), "p", "autograd's nodes",
                   "made of weights alone: served where it is used"),
    "forces": (lambda: Fn(forces, a=nn.Linear(D, 4), b=nn.Linear(4, 1)), "b", "autograd's nodes",
               "made of weights alone: served where it is used"),
    "frozen": (frozen, "1", "none", "no graph: frozen, no grad, or its input handed on"),
    "without grad": (lambda: Fn(without_grad, a=nn.Linear(D, D), b=nn.Linear(D, C)), "a", "none",
                     "no graph: frozen, no grad, or its input handed on"),
    "handed on": (lambda: nn.Sequential(nn.Identity(), nn.Linear(D, C)), "0", "none",
                  "no graph: frozen, no grad, or its input handed on"),
    "unused": (lambda: Fn(lambda m, x: (m.u(x), m.a(x))[1], u=nn.Linear(D, C), a=nn.Linear(D, C)), "u", "none",
               "the loss does not depend on it"),
    "only calls others": (lambda: nn.Sequential(Within(), nn.Linear(D, C)), "0", "none",
                          "all of it is of layers within"),
    "a bare parameter": (lambda: Fn(lambda m, x: x @ m.w, w=par(D, C)), "(model)", "rule 'matrix product'",
                         "by its node MmBackward0; no rule for its class"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_every_layer_has_a_road_and_a_reason(name: str) -> None:
    build, layer, road, why = REASONS[name]
    model, x = build(), torch.randn(N, D)
    for told in (explain(model, x, "grad_sample", "ggn_mp"), after(model, x, "grad_sample", "ggn_mp")):
        by = {one.layer: one for one in told.layers}
        assert (by[layer].road, by[layer].why) == (road, why)
        assert all(one.why for one in told.layers)


def test_a_layer_that_makes_a_penalty() -> None:
    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = par(D)

        def forward(self) -> Tensor:
            return self.w.square().sum()

    model = Fn(lambda m, x: {"logits": m.a(x), "penalty": m.p()}, a=nn.Linear(D, C), p=Penalty())
    told = explain(model, torch.randn(N, D), "grad_sample", output="logits",
                   loss_fn=lambda out: entropy(out["logits"]) + out["penalty"])  # fmt: skip
    assert [(one.layer, one.columns, one.why) for one in told.layers[:2]] == [
        ("a", "V", "rule for its class"), ("p", "", "no column passes it"),
    ]  # fmt: skip
    assert told.to_dict()["parameters"]["p.w"]["road"] == "shared equally"


def test_nothing_is_to_be_differentiated_below() -> None:
    """Inputs that want a gradient: there is a graph above them, and no column of ours."""
    (first, *_) = explain(frozen(), torch.randn(N, D, requires_grad=True), "grad_sample").layers
    assert (first.layer, first.columns) == ("0", "")
    assert first.why == "rule for its class; no trainable parameter in it or below"


def test_under_autocast_and_with_several_inputs() -> None:
    model = mlp(nn.Tanh).float()
    with torch.autocast("cpu", torch.bfloat16):
        told = explain(model, torch.randn(N, D, dtype=torch.float32), "grad_sample", loss_fn=entropy)
    assert told.layers[0].why.endswith("called with several inputs, or under autocast")


def test_layers_of_parts_that_are_called_by_themselves() -> None:
    model, x = nn.Sequential(nn.Linear(D, 4), nn.MaxPool1d(1), nn.Linear(4, C)), torch.randn(N, D)
    with extend(model, "grad_sample") as ext:
        model[2](model[:2](x)).square().sum().backward()  # model[:2] is no module of the model's
    assert [name for name, _, _ in layers(ext.explain())] == ["0", "1", "2"]


def test_layers_of_two_calls_of_a_model() -> None:
    model = mlp(nn.Tanh)
    for asked in ("grad_sample", "ggn_mp"):
        with extend(model, asked) as ext:
            (model(torch.randn(N, D)) + model(torch.randn(N, D))).square().sum().backward()
        assert [name for name, _, _ in layers(ext.explain())] == 2 * [name for name, m in model.named_children()]


def test_a_forward_that_was_interrupted_is_forgotten() -> None:
    def stop(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    model, x = mlp(nn.Tanh), torch.randn(N, D)
    wanted = layers(explain(model, x, "grad_sample"))
    with extend(model, "grad_sample") as ext:
        handle = list(model.children())[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        handle.remove()
        model(x).square().sum().backward()
    assert layers(ext.explain()) == wanted


def test_calls_are_forgotten_with_their_graph() -> None:
    """However long a block is open: each forward begins anew, and nothing but its graph has what was noted."""
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    with extend(model, "grad_sample") as ext:
        for _ in range(5):
            with torch.no_grad():
                model(x)
        assert ext._service is not None
        calls = ext._service._tape._calls
        assert not calls.over
        assert not calls.begun


def test_a_compiled_model() -> None:
    """The hooks on its layers are called uncompiled; of what was compiled before, only nodes are seen."""
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)), torch.randn(N, D)
    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of global hooks
        told = explain(torch.compile(model, backend="eager"), x, "grad_sample")  # type: ignore[arg-type]
        assert [name for name, _, _ in layers(told)] == ["_orig_mod.0", "_orig_mod.1", "_orig_mod.2"]
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, backend="eager")
        compiled(x)
        *unseen, between = explain(compiled, x, "grad_sample").layers
        assert [(one.layer, one.road) for one in unseen] == [(f"_orig_mod.{k}", "none") for k in range(3)]
    assert (between.layer, between.columns) == ("", "V")
    assert state() == before
    torch._dynamo.reset()


def test_what_the_forward_raises_comes_through_and_nothing_is_left() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("broken")

    model, before = nn.Sequential(nn.Linear(D, D), Fails(), nn.Linear(D, C)), state()
    with pytest.raises(KeyError, match="broken"):
        explain(model, torch.randn(N, D))
    with pytest.raises(KeyError, match="broken"):
        hookjac.check(model, torch.randn(N, D), entropy)
    assert state() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_samples_cost_no_backwards() -> None:
    """A plain one of none has nothing to do: there is no ratio to it."""
    told = explain(mlp(nn.Tanh), torch.zeros(0, D))
    assert {bill.backwards for bill in told.quantities.values()} == {None}
    assert "nan" not in str(told)
    json.dumps(told.to_dict(), allow_nan=False)
    assert explain(mlp(nn.Tanh), torch.zeros(1, D), "jac").quantities["jac"].backwards


def test_what_would_be_refused_says_why() -> None:
    model = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, C))
    told = explain(model, torch.randn(N, 300))
    assert "60000² entries" in told.quantities["ggn_block"].refused
    assert "ggn_block would be refused: ggn_block of parameter '0.weight'" in str(told)
    assert not told.quantities["ggn_diag"].refused
    limited = explain(model, torch.randn(N, 300), hookjac.HessDiag(flop_limit=1.0))
    assert "limit of 1e+00" in limited.quantities["hess_diag"].refused
    wide = explain(nn.Linear(2, 1 << 16), torch.randn(16, 2), "ggn_sqrt", "ggn_diag_mc")
    assert "columns" in wide.quantities["ggn_sqrt"].refused
    assert not wide.quantities["ggn_diag_mc"].refused


def test_nothing_is_left_and_nothing_is_made() -> None:
    model, x = cnn(), torch.randn(N, 3, 8, 8)
    model.insert(0, nn.BatchNorm2d(3))
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: set(vars(p)) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    explain(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {name: set(vars(p)) for name, p in model.named_parameters()} == attributes
    assert all(p.grad is None for p in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks
    with pytest.raises(HookjacError, match="statistics of the batch"):
        explain(model.train(), x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [nn.Tanh, nn.ReLU])
def test_no_graph_is_kept(kind: type[nn.Module]) -> None:
    model, x = mlp(kind), torch.randn(N, D)
    told = []
    for quantity in ("hess_diag", "ggn_mp", "grad_sample"):
        with extend(model, quantity) as ext:
            loss = entropy(model(x))
            loss.backward()
        told.append(ext.explain())
        loss.grad_fn.metadata["alive"] = witness = mlp(kind)  # type: ignore[union-attr]  # dies with the graph
        node = weakref.ref(witness)
        for p in model.parameters():
            vars(p).clear()
        del loss, ext, witness
        gc.collect()
        assert node() is None, quantity
    assert all(e.quantities for e in told)


def test_it_prints_and_shows_in_a_notebook() -> None:
    told = explain(mlp(nn.Tanh), torch.randn(N, D), "grad_sample", "ggn_mp")
    text, html = str(told), told._repr_html_()
    for words in ("FLOPs of one", "backwards", "each product: about 4 backwards", "rule 'linear'", "hess_diag"):
        assert words in text
    assert html.count("<table>") == html.count("</table>") == 3
    assert "&#x27;linear&#x27;" in html
    assert max(map(len, text.splitlines())) <= 100
    starts = {line.index("rule") for line in text.split("\n\n")[0].splitlines() if "rule" in line}
    assert len(starts) == 1, "columns stand below each other"


def test_inputs_and_losses_of_all_kinds() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(D, C)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": self.a(x) * scale, "features": self.a(x).tanh()}

    model, x = Two(), torch.randn(N, D)
    for inputs in ((x, torch.ones(1)), [x, torch.ones(1)], {"x": x, "scale": torch.ones(1)}):
        assert explain(model, inputs, "jac", output="logits").quantities["jac"].columns == C
    both = explain(model, (x, torch.ones(1)), "ggn_diag", output="logits",
                   loss_fn=lambda out: entropy(out["logits"]) + out["features"].square().sum())  # fmt: skip
    assert both.quantities["ggn_diag"].columns == 2 * C
    with pytest.raises(HookjacError, match="2 tensors that require grad"):
        explain(model, (x, torch.ones(1)))
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        explain(model, x, loss_fn=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss_fn must return the loss"):
        explain(mlp(nn.Tanh), x, loss_fn=lambda out: 3.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="unknown quantity"):
        explain(mlp(nn.Tanh), x, "hess")
    with pytest.raises(HookjacError, match="no trainable parameter"):
        explain(nn.Tanh(), x)


@pytest.mark.parametrize("N", [1, 2, 3, 7])
def test_any_number_of_samples(N: int) -> None:
    """A survey's single column is told from samples, positions and groups of the same number."""
    model, x = cnn(), torch.randn(N, 3, 8, 8)
    bills = explain(model, x, "grad_sample", "ggn_sqrt", "jac").quantities
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert bills["grad_sample"].bytes == N * size
    assert bills["ggn_sqrt"].bytes == N * C * size


def test_a_layer_that_fails_and_is_caught() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.wrong, self.b = nn.Linear(D, 4), nn.Linear(7, 4), nn.Linear(4, C)

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(RuntimeError):
                self.wrong(x)
            out: Tensor = self.b(self.a(x).tanh())
            return out

    told = explain(Careful(), torch.randn(N, D), "grad_sample")
    assert [(layer.layer, layer.road) for layer in told.layers[:2]] == [("a", "rule 'linear'"), ("b", "rule 'linear'")]


def test_what_depends_on_the_data_has_a_price_all_the_same() -> None:
    """Which rows of a table meet is not to be known from sizes."""
    bills = explain(Sentence(), torch.randint(20, (N, 6)), "grad_sample_gram").quantities
    price = bills["grad_sample_gram"].each["e.weight"]
    assert price.flops == N * 6 * (8 + 2), "once over what was looked up, and where"
    assert price.bytes == 8 * N * N


def test_a_bill_does_not_depend_on_who_was_billed_before() -> None:
    """A convolution's patches, say, which the first to ask would pay for."""
    model, x = cnn(), torch.randn(N, 3, 8, 8)
    asked = ("grad_sample", "jac", "kfac", "grad_sq_sum")
    together = explain(model, x, *asked).quantities
    for q in asked:
        for _ in range(2):
            assert explain(model, x, q).quantities[q] == together[q]
    for _ in range(2):
        (q,) = after(model.eval(), x, "grad_sample").quantities.values()
        assert q == explain(model, x, "grad_sample").quantities["grad_sample"]


def test_a_scripted_model() -> None:
    """Its layers call no hooks, and its buffers are kept in no dict."""
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, C)).eval()
    x = torch.randn(N, D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        scripted: Any = torch.jit.script(model)
    for _ in range(3):  # the graph that it optimises is another one
        told = explain(scripted, x, "grad_sample")
        assert [layer.layer for layer in told.layers] == ["0", "1", "2", "3", ""]
        assert all("compiled" in layer.why for layer in told.layers[:-1])
        scripted.zero_grad()
        with extend(scripted, "grad_sample", "ggn_diag"):
            scripted(x).square().sum().backward()
        with extend(model, "grad_sample", "ggn_diag"):
            model(x).square().sum().backward()
        for p, right in zip(scripted.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p.grad_sample, right.grad_sample)
            torch.testing.assert_close(p.ggn_diag, right.ggn_diag)


def test_what_a_layer_within_returns_is_the_models_own_affair() -> None:
    class Shy(dict[str, Tensor]):
        def items(self) -> Any:
            raise RuntimeError("do not look")

        __iter__ = keys = values = items  # type: ignore[assignment]

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.own = nn.Linear(D, C), par(C)

        def forward(self, x: Tensor) -> Shy:
            return Shy(h=self.a(x) * self.own)

    model = Fn(lambda m, x: m.inner(x)["h"], inner=Inner())
    for told in (explain(model, torch.randn(N, D), "grad_sample"), after(model, torch.randn(N, D), "grad_sample")):
        assert layers(told) == [("inner.a", "Linear", (N, C)), ("inner", "Inner", ())]


class Tree(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bent, self.last = nn.Conv1d(2, 2, 1), nn.Tanh(), nn.Linear(4, 4)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        h = self.bent(self.first(x))
        return self.last(h + self(h, depth - 1) if depth else h)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_model_that_calls_itself(interrupted: bool) -> None:
    """All of its layers are listed, in the order of the forward; also if one before was interrupted."""
    model, x = Tree(), torch.randn(3, 2, 4)
    wanted = ["first", "bent"] * 3 + ["last"] * 3
    told = hookjac.explain(model, x, "grad_sample").layers
    assert [layer.layer for layer in told if layer.layer] == wanted
    with hookjac.extend(model, "grad_sample") as ext:
        for step in range(3):
            if interrupted and step == 0:
                handle = model.last.register_forward_hook(_interrupt)
                with pytest.raises(KeyboardInterrupt):
                    model(x)
                handle.remove()
            model(x).square().sum().backward()
            assert [layer.layer for layer in ext.explain().layers if layer.layer] == wanted


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
