"""Roads and costs: what is said before anything walks is what then happens."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, mlp, par
from torch import Tensor, nn

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
    assert "spare" not in {layer["layer"] for layer in told["layers"]}, "it was not called"
    assert {layer["columns"] for layer in told["layers"]} == {"V"}


def test_a_layer_called_twice_has_two_rows() -> None:
    model = Fn(lambda m, x: m.a(m.a(x).tanh()), a=nn.Linear(D, D))
    told = explain(model, torch.randn(N, D), "kfac")
    assert [layer.layer for layer in told.layers] == ["a", "a", ""]
    assert "2 uses" in told.rows[0].why


def test_after_a_backward_it_says_the_same() -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    before = explain(model, x, "grad_sample", "hess_diag", loss_fn=entropy)
    for _ in range(2):
        with extend(model, "grad_sample", "hess_diag") as ext:
            entropy(model(x)).backward()
        after = ext.explain()
        assert [(r.parameter, r.road, r.hessian) for r in after.rows] == [
            (r.parameter, r.road, r.hessian) for r in before.rows
        ]
        assert after.quantities == before.quantities


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
