"""What was learned of a graph serves only graphs of its structure: whatever changes, results are right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, par
from oracle import close, expected, trainable
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from hookjac import extend, passing
from hookjac.passage import known

Y = torch.tensor([0, 2, 1, 1, 0, 2])
Loss = Callable[[Tensor], Tensor]


def entropy(output: Tensor) -> Tensor:
    return F.cross_entropy(output, Y[: len(output)])


class Model(nn.Module):
    """A net with switches: what it does next differs in one respect only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, 4), nn.Linear(4, 4), nn.Linear(4, C)
        self.norm, self.drop, self.act = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU()
        self.norm.eval()
        self.times, self.slope, self.turn, self.swap, self.cast = 1, 0.0, 0, False, False
        self.by_value = self.in_place = self.dropped = self.normed = self.detached = self.cut = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.normed:
            h = self.norm(h)
        if self.in_place:
            h = h.relu_()
        elif self.slope:
            h = F.leaky_relu(h, self.slope)
        else:
            h = self.act(h)
        if self.dropped:
            h = self.drop(h)
        for _ in range(self.times):
            h = self.b(h).tanh()
        if self.by_value and x.sum() > 0:
            h = 2 * h.roll(1, 1)
        if self.turn:
            h = h.roll(self.turn, 1)
        if self.detached:
            h = h + self.b(h.detach())
        if self.swap:
            h = h.reshape(len(x), 2, 2).transpose(1, 2).reshape(len(x), 4)
        if self.cut:
            h = torch.cat([h[:, 1:], h[:, :1]], 1)
        return self.c(h)  # type: ignore[no-any-return]


Change = Callable[[Model], Any]


def put(**values: Any) -> Change:
    return lambda m: [setattr(m, name, value) for name, value in values.items()]


def free(name: str, on: bool) -> Change:
    return lambda m: m.get_parameter(name).requires_grad_(on)


def turned(m: Model) -> None:
    """A parameter in other memory."""
    m.b.weight = nn.Parameter(m.b.weight.detach().T.contiguous().T)


def tie(m: Model) -> None:
    m.b.weight = nn.Parameter(m.b.weight.detach().clone())
    m.norm.weight = m.b.bias


def weight_norm(m: Model) -> None:
    parametrizations.weight_norm(m.b)


CHANGES: dict[str, tuple[Change, ...]] = {
    "nothing": (put(), put()),
    "dropout": (put(dropped=True), lambda m: m.drop.eval(), lambda m: m.drop.train(), put(dropped=False)),
    "chance of dropout": (put(dropped=True), lambda m: setattr(m.drop, "p", 0.2), lambda m: setattr(m.drop, "p", 0.0)),
    "statistics": (put(normed=True), lambda m: m.norm.running_var.fill_(3), lambda m: setattr(m.norm, "eps", 0.5)),
    "frozen": (free("a.weight", False), free("c.bias", False), free("a.weight", True), free("c.bias", True)),
    "frozen below": (free("a.weight", False), free("a.bias", False), free("a.bias", True)),
    "another frozen": (free("a.weight", False), lambda m: (free("a.weight", True)(m), free("b.weight", False)(m))),
    "uses": (put(times=2), put(times=3), put(times=0), put(times=1)),
    "in place": (put(in_place=True), put(in_place=False)),
    "slope": (put(slope=0.1), put(slope=0.3), put(slope=-0.5), put(slope=0.0)),
    "turns": (put(turn=1), put(turn=2), put(turn=-1)),
    "views": (put(swap=True), put(cut=True), put(swap=False)),
    "detached": (put(detached=True), put(detached=False)),
    "tied": (tie, put(normed=True)),
    "activation": (put(act=nn.Softplus()), put(act=nn.Tanh()), put(act=nn.Identity()), put(act=nn.GELU("tanh")),
                   put(act=nn.GELU())),
    "other layers": (lambda m: setattr(m, "a", nn.Linear(D, 4, bias=False)),
                     lambda m: setattr(m, "a", nn.Sequential(nn.Linear(D, 7), nn.Linear(7, 4)))),
    "other parameters": (lambda m: setattr(m.b, "weight", nn.Parameter(torch.randn(4, 4))), turned,
                         lambda m: setattr(m.b, "bias", None)),
    "new values": (lambda m: m.b.weight.data.mul_(-2), lambda m: setattr(m.b.weight, "data", torch.randn(4, 4))),
    "weight norm": (weight_norm, put(times=2)),
}  # fmt: skip
ASKED = [("grad_sample",), ("ggn_diag", "jac"), ("hess_diag", "grad_sample")]


def stepped(model: nn.Module, x: Tensor, loss: Loss, asked: tuple[str, ...], what: Any = None) -> None:
    """One step, against loops over a model that remembers nothing."""
    state, fresh = torch.get_rng_state(), copy.deepcopy(model)

    def run(m: nn.Module) -> Tensor:
        torch.set_rng_state(state)
        return m(x)  # type: ignore[no-any-return]

    wanted = expected(fresh, lambda: run(fresh), loss, hessian="hess_diag" in asked)
    model.zero_grad()
    with extend(model, *asked):
        loss(run(model)).backward()
    for key, p in trainable(model).items():
        for q in asked:
            close(getattr(p, q), wanted[key][q], (what, key, q))
        close(torch.zeros_like(p) if p.grad is None else p.grad, wanted[key]["grad"], (what, key, "grad"))
    torch.manual_seed(int(torch.randint(1000, ())))


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_the_model(name: str, asked: tuple[str, ...]) -> None:
    """Each change is met at once, is learned, and is undone by going back to where the model was first."""
    model, x = Model(), torch.randn(N, D)
    for k, change in enumerate((put(), *CHANGES[name])):
        with torch.no_grad():
            change(model)
        for _ in range(2):
            stepped(model, torch.randn(N, D), entropy, asked, k)
    assert any(passage is not None for passage in known(model))
    stepped(model, x, entropy, asked)


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_branches_that_depend_on_data(asked: tuple[str, ...]) -> None:
    model = Model()
    model.by_value = True
    sides = set()
    for _ in range(12):
        x = torch.randn(N, D)
        sides.add(bool(x.sum() > 0))
        stepped(model, x, entropy, asked)
    assert sides == {True, False}


LOSSES: list[Loss] = [
    entropy,
    lambda o: F.cross_entropy(o, Y[: len(o)], reduction="sum"),
    lambda o: F.cross_entropy(o, (Y[: len(o)] + 1) % C),
    lambda o: F.cross_entropy(o, Y[: len(o)], label_smoothing=0.2),
    lambda o: F.cross_entropy(o, Y[: len(o)], label_smoothing=0.7),
    lambda o: F.cross_entropy(o / 2, Y[: len(o)]),
    lambda o: F.cross_entropy(o / 5, Y[: len(o)]),
    lambda o: -F.cross_entropy(o, Y[: len(o)]),
    lambda o: F.cross_entropy(o, Y[: len(o)], ignore_index=1),
    lambda o: F.cross_entropy(o, Y[: len(o)], torch.tensor([1.0, 2, 3])),
    lambda o: F.cross_entropy(o, Y[: len(o)], torch.tensor([3.0, 2, 1])),
    lambda o: F.mse_loss(o, torch.ones_like(o)),
    lambda o: F.huber_loss(o, torch.ones_like(o), delta=0.5),
    lambda o: F.huber_loss(o, torch.ones_like(o), delta=0.1),
    lambda o: o.pow(3).sum(),
    lambda o: o.pow(4).sum(),
    lambda o: o[:, 1].square().sum(),
    lambda o: o[:, 2].square().sum(),
    lambda o: o.sum(),
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_other_losses(asked: tuple[str, ...]) -> None:
    model = Model()
    for _ in range(2):
        for k, loss in enumerate(LOSSES):
            stepped(model, torch.randn(N, D), loss, asked, k)


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_other_batches(asked: tuple[str, ...]) -> None:
    """Sizes that are the width of some layer, or one; and inputs with a gradient of their own."""
    model = Model()
    for n in (6, 4, 3, 1, 5, 6, 1, 4, 2):
        x = torch.randn(n, D).requires_grad_(n % 2 == 0)
        stepped(model, x, entropy, asked, n)


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_axes_of_one_size(asked: tuple[str, ...]) -> None:
    """Time first or samples first, with as many steps as samples: the structure says which."""
    first = [False]

    def way(m: Any, x: Tensor) -> Tensor:
        h = m.a(x.transpose(0, 1) if first[0] else x).tanh()
        return m.b(h.sum(0 if first[0] else 1))  # type: ignore[no-any-return]

    model = Fn(way, a=nn.Linear(D, 4), b=nn.Linear(4, C))
    for first[0] in (False, False, True, True, False):
        stepped(model, torch.randn(N, N, D), entropy, asked, first[0])


def _order(m: Any, x: Tensor, k: int) -> Tensor:
    return (m.b(m.a(x).tanh()) if k else m.a(m.b(x).tanh()))[:, :C]  # type: ignore[no-any-return]


def _wires(m: Any, x: Tensor, k: int) -> Tensor:
    u, v, w = m.a(x), m.b(x), m.c(x)
    return ((u + v) + ((v if k else u) + w))[:, :C]  # type: ignore[no-any-return]


def _halves(m: Any, x: Tensor, k: int) -> Tensor:
    parts = m.d(x).chunk(2, 1)
    return parts[k] * 2  # type: ignore[no-any-return]


def _axes(m: Any, x: Tensor, k: int) -> Tensor:  # x [D, D, D]: samples lie where the permutation has put them
    order = ((0, 1, 2), (1, 0, 2), (0, 2, 1))[k]
    return m.b(m.a(x).permute(order)).permute(order).sum(1)[:, :C]  # type: ignore[no-any-return]


SAME_NODES: dict[str, tuple[Callable[[Any, Tensor, int], Tensor], Callable[[int], Tensor]]] = {
    "layers in another order": (_order, lambda k: torch.randn(N, D)),
    "other wires": (_wires, lambda k: torch.randn(N, D)),
    "the other half": (_halves, lambda k: torch.randn(N, D)),
    "a weight transposed or not": (
        lambda m, x, k: (x @ m.w.transpose(0, k)).tanh()[:, :C],
        lambda k: torch.randn(N, D),
    ),
    "axes": (_axes, lambda k: torch.randn(D, D, D)),
    "samples": (lambda m, x, k: (x * m.s).tanh(), lambda k: torch.randn(2 + k, C)),
}


@pytest.mark.parametrize("asked", [*ASKED, ("ggn_diag", "jac", "grad_sample")], ids=str)
@pytest.mark.parametrize("name", SAME_NODES)
@pytest.mark.parametrize("engine", [0.0, 1e9])
def test_the_same_nodes_otherwise(
    name: str, asked: tuple[str, ...], engine: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs of the same nodes in the same order, told apart by wires, numbers and what was saved; sent either way."""
    monkeypatch.setattr(passing, "_IN_ENGINE", engine)
    way, data = SAME_NODES[name]
    turn = [0]
    parts = {key: nn.Linear(D, D) for key in "abc"}
    model = Fn(lambda m, x: way(m, x, turn[0]), **parts, d=nn.Linear(D, 2 * C), w=par(D, D), s=par(C))
    for turn[0] in (0, 1, 0, 1, 2 if name in ("axes", "samples") else 0, 1):
        stepped(model, data(turn[0]), lambda o: o.sin().square().sum() + (o[:, 0] * 0.3).sum(), asked, turn[0])
        stepped(model, data(turn[0]), entropy, asked, turn[0])


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_single_and_double(asked: tuple[str, ...]) -> None:
    model, x = Model(), torch.randn(N, D)
    for dtype in (torch.float64, torch.float32, torch.float64, torch.float32):
        model.to(dtype)
        wanted = [p.clone() for p in model.parameters()]
        for _ in range(2):
            with extend(model, *asked):
                entropy(model(x.to(dtype))).backward()
        with extend(twin := copy.deepcopy(model).double(), *asked):
            entropy(twin(x.to(dtype).double())).backward()
        for p, q, was in zip(model.parameters(), twin.parameters(), wanted, strict=True):
            assert torch.equal(p, was)
            for name in asked:
                found = getattr(p, name)[:]
                assert found.dtype == dtype
                torch.testing.assert_close(found.double(), getattr(q, name)[:], rtol=1e-4, atol=1e-5)


HOOKS: dict[str, Callable[[Model], Any]] = {
    "forward": lambda m: m.b.register_forward_hook(lambda mod, args, out: 2 * out),
    "before forward": lambda m: m.b.register_forward_pre_hook(lambda mod, args: (3 * args[0],)),
    "forward, in place": lambda m: m.b.register_forward_hook(lambda mod, args, out: out.mul_(2)),
}


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_that_change_the_forward(kind: str, asked: tuple[str, ...]) -> None:
    model = Model()
    for _ in range(2):
        stepped(model, torch.randn(N, D), entropy, asked)
    handle = HOOKS[kind](model)
    for _ in range(2):
        stepped(model, torch.randn(N, D), entropy, asked, "hooked")
    handle.remove()
    stepped(model, torch.randn(N, D), entropy, asked, "no longer")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("hookjac.passage._REMEMBERED", 2)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("few")
def test_what_is_forgotten_is_learned_again() -> None:
    model = Model()
    for times in (1, 2, 3, 1, 3, 2, 1):
        model.times = times
        stepped(model, torch.randn(N, D), entropy, ("grad_sample", "ggn_diag"), times)
        assert len(list(known(model))) <= 2


def test_selected_outputs() -> None:
    """The same graph with another output selected is another structure."""
    model = Fn(lambda m, x: {"h": (h := m.a(x).tanh()), "y": m.b(h)}, a=nn.Linear(D, C), b=nn.Linear(C, C))
    x = torch.randn(N, D)
    for output in ("y", "h", "y", "h"):
        twin = copy.deepcopy(model)
        out = twin(x)[output]
        with extend(model, "jac", output=output):
            found = model(x)
            (entropy(found["y"]) + found["h"].square().sum()).backward()
        rows = [torch.autograd.grad(o, twin.a.weight, retain_graph=True)[0] for o in out.flatten()]  # type: ignore
        close(model.a.weight.jac[:], torch.stack(rows).view(N, C, C, D), output)  # type: ignore[union-attr]
