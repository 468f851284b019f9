"""What structure says of samples and losses, against what values say: on every case, and where it must keep silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, Fn, mlp, par, random_loss
from oracle import compare, expected
from test_exact import prepare
from test_losses import LOSSES, SEQUENCES
from test_models import OWN
from torch import Tensor, nn

from hookjac import HookjacError, curvature, extend, layouts, loss, plan, roads, structure
from hookjac.graph import Bend, Edge
from hookjac.samples import Layout

N, D, C = 4, 5, 3


class Witness:
    """Asks values, too, whenever structure is asked, and counts."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.told = self.silent = self.separable = 0
        patch.setattr(layouts, "placed", self.placed)
        patch.setattr(loss, "separable", self.sums)
        self._placed, self._sums = structure.placed, structure.separable

    def placed(self, route: Any, starts: list[Edge], N: int, needed: set[Any]) -> dict[Edge, Layout | None] | None:
        found = self._placed(route, starts, N, needed)
        if found is None:
            self.silent += 1
            return None
        self.told += 1
        names = {id(leaf): "p" for key in route.order if (leaf := route.leaf(key)) is not None}
        probed, _ = layouts.probe(route, starts, N, needed, names, {})
        for edge, layout in found.items():
            if layout is not None and edge in probed:  # where a probe vanished, nothing is known
                assert layout == probed[edge], (type(edge.node).__name__, edge.shape)
        return found

    def sums(self, route: Any, above: list[Any], frontier: list[Edge], N: int) -> bool:
        if not self._sums(route, above, frontier, N):
            return False
        self.separable += 1
        heads = [route.real(e) for e in frontier]
        with torch.enable_grad(), loss.fenced(heads):
            (total,) = self._losses
            slopes = loss.gradients([total], heads, [None], create_graph=True)
        part = loss.Top(total, N, list(frontier), heads, slopes, {})
        if any(g.requires_grad for g in slopes):
            loss._check_rows(part, route.rounding)
        assert loss.crossing(route, above, heads, N, route.rounding) is None
        return True

    _losses: list[Tensor]


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> Witness:
    seen = Witness(monkeypatch)
    top = plan.top

    def remembered(loss: Tensor, *rest: Any, **more: Any) -> Any:
        seen._losses = [loss]
        return top(loss, *rest, **more)

    monkeypatch.setattr(plan, "top", remembered)
    return seen


def step(model: nn.Module, run: Callable[[], Tensor], **options: Any) -> None:
    with extend(model, "grad_sample_norm", **options):
        run().backward()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case, witness: Witness) -> None:
    model, run, pick = prepare(case, 0)
    step(model, lambda: (case.loss or random_loss)(pick(run())), output=case.output)


@pytest.mark.parametrize("name", OWN)
def test_models(name: str, witness: Witness) -> None:
    torch.manual_seed(0)
    build, inputs = OWN[name]
    model, given = build(), inputs()
    step(model, lambda: random_loss(model(*given)))
    assert witness.told + witness.silent


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, witness: Witness) -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    step(model, lambda: LOSSES[name](model(x)))
    assert witness.told, "two linear layers and an activation are no riddle"


@pytest.mark.parametrize("name", SEQUENCES)
def test_losses_of_sequences(name: str, witness: Witness) -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, 2, D)
    step(model, lambda: SEQUENCES[name](model(x)))
    assert witness.told


def test_the_usual_losses_are_known(witness: Witness) -> None:
    y, soft = torch.tensor([0, 2, 1, 2]), torch.rand(N, C)
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda z: F.cross_entropy(z, y),
        lambda z: F.cross_entropy(z, soft, reduction="sum"),
        lambda z: F.mse_loss(z, soft),
        lambda z: F.binary_cross_entropy_with_logits(z, soft),
        lambda z: (z - soft).square().sum(1).mean(),
    ]
    for number, own in enumerate(losses, 1):
        model, x = mlp(nn.ReLU), torch.randn(N, D)
        step(model, lambda own=own, model=model, x=x: own(model(x)))  # type: ignore[misc]
        assert witness.separable == 2 * number  # by layers and by nodes


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "root of the mean": lambda z: z.mean().abs().sqrt(),
    "log of the sum": lambda z: z.exp().sum().log(),
    "softmax over the batch": lambda z: z.log_softmax(0)[:, 0].sum(),
    "softmax over everything": lambda z: z.reshape(-1).softmax(0).square().sum(),
    "pairs": lambda z: (z.unsqueeze(0) - z.unsqueeze(1)).square().sum(),
    "contrast": lambda z: F.cross_entropy(z @ z.T, torch.arange(N)),
    "product of sums": lambda z: z.sum() * z[:, 0].sum(),
    "quotient": lambda z: z.sum() / z.square().sum(),
    "variance": lambda z: z.var(0).sum(),
    "norm": lambda z: z.norm(),
    "blocks across rows": lambda z: z.reshape(2, -1).log_softmax(1)[:, 0].sum(),
    "reversed": lambda z: (z.flatten() * z.flip(0).flatten()).sum(),
    "shifted": lambda z: (z.flatten()[1:] * z.flatten()[:-1]).sum(),
    "largest": lambda z: z.max(),
    "transposed": lambda z: (z.T.reshape(-1) * z.reshape(-1)).sum(),
}


@pytest.mark.parametrize("name", MIXING)
def test_losses_that_mix_are_refused(name: str, witness: Witness) -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    with pytest.raises(HookjacError, match=r"mixes samples|does not count|couples"):
        step(model, lambda: MIXING[name](model(x)))


NETS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "graph": lambda m, x: torch.arange(N * N).view(N, N).sin() @ m.f(x),
    "rows shuffled": lambda m, x: m.f(x)[torch.tensor([1, 0, 3, 2])] + x,
    "rows rolled": lambda m, x: m.f(x).roll(1, 0),
    "rows flipped": lambda m, x: m.f(x).flip(0),
    "rows summed up": lambda m, x: m.f(x).cumsum(0),
    "against the batch mean": lambda m, x: m.f(x) - m.f(x).mean(0),
    "attention over the batch": lambda m, x: torch.softmax(m.f(x) @ m.f(x).T, 1) @ x,
    "pairs on a diagonal": lambda m, x: (m.f(x)[:, None] * torch.arange(N * N).view(N, N, 1).cos()).sum(0),
    "shifted by padding": lambda m, x: F.pad(m.f(x), (0, 0, 1, -1)),
    "scatter": lambda m, x: torch.zeros(N, D).index_add(0, torch.tensor([1, 0, 0, 2]), m.f(x)),
    "convolution over the batch": lambda m, x: F.conv1d(m.f(x).T[None], torch.ones(D, 1, 3), padding=1, groups=D)[0].T,
    "layer norm over all": lambda m, x: F.layer_norm(m.f(x), (N, D)),
    "reshaped across rows": lambda m, x: m.f(x).reshape(2, -1).softmax(1).reshape(N, D),
}


@pytest.mark.parametrize("name", NETS)
def test_nets_that_mix_are_exact(name: str) -> None:
    """Samples are the rows of the output, whatever they are made of: what structure seems to say must not matter."""
    torch.manual_seed(0)
    model, x = Fn(NETS[name], f=nn.Linear(D, D)), torch.randn(N, D)
    wanted = expected(model, lambda: model(x), random_loss)
    with extend(model, "grad_sample", "jac", "ggn_diag", "hess_diag"):
        random_loss(model(x)).backward()
    compare(model, wanted, ("grad_sample", "jac", "ggn_diag", "hess_diag"))


def test_what_is_masked_to_a_diagonal_is_probed(witness: Witness) -> None:
    """The same nodes mix or do not, depending on a constant: structure must not speak."""
    model = Fn(lambda m, x: torch.eye(N) @ m.f(x), f=nn.Linear(D, D))
    step(model, lambda: model(torch.randn(N, D)).square().sum())
    assert witness.silent
    assert not witness.told


def test_graphs_side_by_side(witness: Witness) -> None:
    """Samples are graphs, nodes of all in one matrix: blocks of a constant keep them apart, and rules serve."""
    A = torch.block_diag(*torch.rand(N, 3, 3))
    model = Fn(lambda m, x: (A @ m.f(x.flatten(0, 1))).view(N, 3, D).sum(1), f=nn.Linear(D, D))
    with extend(model, "grad_sample") as ext:
        model(torch.randn(N, 3, D)).square().sum().backward()
    assert {row.road for row in ext.explain().rows} == {"rule"}


def test_a_dead_layer_has_its_samples_all_the_same(witness: Witness) -> None:
    """Where probes vanish, structure still tells."""
    model = Fn(lambda m, x: m.g(m.f(x) * m.s).relu() - 1e9, f=nn.Linear(D, D), g=nn.Linear(D, C), s=par(D))
    nn.init.zeros_(model.g.weight)
    step(model, lambda: model(torch.randn(N, D)).square().sum())
    assert witness.told
    assert all(p.grad_sample_norm.shape == (N,) for p in model.parameters())


@pytest.mark.parametrize("case", [c for c in CASES if c.loss is None], ids=str)
def test_what_kinds_of_nodes_say_of_their_bend_is_what_values_say(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(plan: Any, key: Any, grads: dict[int, Tensor], edges: list[Edge]) -> bool:
        said = structure.bend(key, plan.route.raw(key, edges))
        found = bends(plan, key, grads, edges)
        if said is not None:
            told.append(type(key).__name__)
            with monkeypatch.context() as patch:
                patch.setattr(structure, "bend", lambda node, edges: None)
                assert bends(plan, key, grads, edges) == found
                looked_at = Bend(key, grads, plan.route.raw(key, edges))
                if not looked_at.flat:
                    rows, is_diagonal = curvature._try_diagonal(looked_at, grads, edges)
                    assert is_diagonal
                    assert said == "diagonal" or not any(bool(t.any()) for t in rows)
        return found

    bends, told = roads.bends, []
    monkeypatch.setattr(roads, "bends", asked)
    model, run, pick = prepare(case, 0)
    with extend(model, "hess_diag", output=case.output):
        random_loss(pick(run())).backward()
