"""`.grad` is what autograd makes of it, whoever computes it: every choice of whom, every kind of step and parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, mlp
from oracle import close, expected, trainable
from torch import Tensor, nn

from hookjac import KFAC, GGNDiagMC, extend
from hookjac.passing import Pass

Y = torch.tensor([0, 2, 1, 1])
ASKED: list[tuple[Any, ...]] = [
    ("grad_sample",),
    ("grad_sample_norm",),
    ("grad_sample_gram",),
    ("grad_sq_sum",),
    ("grad_var",),
    ("jac",),
    ("ggn_diag",),
    ("ggn_diag_sample", "grad_var"),
    (GGNDiagMC(samples=2), "grad_sample"),
    (KFAC(fisher="exact"),),
    (KFAC(fisher="empirical"), "ntk"),
    ("jac", "ggn_diag", "grad_sample_norm"),
    ("hess_diag",),
]


def told(asked: tuple[Any, ...]) -> str:
    return ", ".join(q if isinstance(q, str) else q.name for q in asked)


def loss(output: Tensor) -> Tensor:
    return F.cross_entropy(output, Y[: len(output)])


def convolutional(act: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2, padding=1), act(), nn.Conv2d(4, 2, 3, groups=2), nn.Flatten(),
                         nn.Linear(18, C))  # fmt: skip


def image() -> Tensor:
    return torch.randn(N, 2, 4, 4)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "relu": (lambda: mlp(nn.ReLU), lambda: torch.randn(N, D)),
    "tanh": (lambda: mlp(nn.Tanh), lambda: torch.randn(N, D)),
    "convolution, relu": (lambda: convolutional(nn.ReLU), image),
    "convolution, tanh": (lambda: convolutional(nn.Tanh), image),
    "table": (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(9, C)),
              lambda: torch.randint(5, (N, 3))),
    "tied": (lambda: Fn(lambda m, x: m.a(m.b(m.a(x).tanh()).tanh())[:, :C], a=nn.Linear(D, D), b=nn.Linear(D, D)),
             lambda: torch.randn(N, D)),
    "no bias": (lambda: mlp(nn.ReLU, bias=False), lambda: torch.randn(N, D)),
}  # fmt: skip


class Chosen:
    """Whose gradients autograd computes: nobody's, some, all; and what became of it."""

    which: Any = None

    def __init__(self) -> None:
        self.rode: list[bool] = []


@pytest.fixture(params=["as measured", "all", "none", "the first", "every other"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Chosen:
    return choose(request.param, monkeypatch)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    """No gradient is left to autograd."""
    return choose("none", monkeypatch)


def choose(how: str, monkeypatch: pytest.MonkeyPatch) -> Chosen:
    found = Chosen()
    found.which = how
    by_engine: Callable[[int], list[int] | None] = {
        "all": lambda P: None, "none": lambda P: [], "the first": lambda P: [0],
        "every other": lambda P: list(range(1, P, 2)), "as measured": lambda P: None,
    }[how]  # fmt: skip
    if how != "as measured":
        monkeypatch.setattr("hookjac.passing.slower", lambda costs, params, *_, **__: by_engine(len(params)))
    real = Pass.run

    def run(self: Pass, *args: Any) -> Any:
        out = real(self, *args)
        found.rode.append(self.rode)
        return out

    monkeypatch.setattr(Pass, "run", run)
    return found


def plain(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Autograd's own gradients, of a copy."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    loss(twin(x)).backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def same(model: nn.Module, wanted: dict[str, Tensor], times: float = 1.0) -> None:
    assert {name for name, p in model.named_parameters() if p.grad is not None} == wanted.keys()
    for name, g in wanted.items():
        found = model.get_parameter(name).grad
        assert found is not None
        assert found.layout == g.layout, name
        close(found.to_dense(), times * g.to_dense(), name, rtol=1e-13)


def apart(tensors: list[Tensor]) -> None:
    """None lies in another's memory."""
    places = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("asked", ASKED, ids=told)
@pytest.mark.parametrize("name", NETS)
def test_every_quantity(name: str, asked: tuple[Any, ...], chosen: Chosen) -> None:
    build, data = NETS[name]
    model = build()
    for _ in range(3):
        x = data()
        wanted = plain(model, x)
        model.zero_grad()
        with extend(model, *asked):
            loss(model(x)).backward()
        same(model, wanted)
        found = [p.grad for p in model.parameters() if p.grad is not None]
        names = [q if isinstance(q, str) else q.name for q in asked]
        results = [getattr(p, q) for p in model.parameters() for q in names]
        apart(found + [r for r in results if type(r) is Tensor])
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["relu", "tanh", "convolution, relu", "no bias"])
def test_the_loss_gradient_rides_with_other_columns(name: str, ours: Chosen) -> None:
    build, data = NETS[name]
    model, x = build(), data()
    wanted = expected(model, lambda: model(x), loss, hessian=False)
    for asked in (("ggn_diag", "grad_sample"), ("jac", "grad_sample"), ("jac", "ggn_diag", "grad_sample")):
        ours.rode.clear()
        for _ in range(2):
            model.zero_grad()
            with extend(model, *asked, "grad_sample_norm", KFAC(fisher="mc")):
                loss(model(x)).backward()
            for key, p in trainable(model).items():
                close(p.grad, wanted[key]["grad"], (key, "grad"))  # type: ignore[arg-type]
                for q in asked:
                    close(getattr(p, q), wanted[key][q], (key, q))
                norms = wanted[key]["grad_sample"].flatten(1).norm(dim=1)
                close(p.grad_sample_norm, norms, (key, "norm"))  # type: ignore[attr-defined]
        assert ours.rode == [True, True]


@pytest.mark.parametrize("kind", ["after", "before"])
@pytest.mark.parametrize("asked", [("grad_sample",), ("ggn_diag", "grad_sample_norm"), ("jac",)], ids=told)
def test_hooks_on_parameters(asked: tuple[str, ...], kind: str, chosen: Chosen) -> None:
    """Called once for each backward, with the gradient, or the parameter that has it; what they return counts."""
    model, x = mlp(nn.ReLU), torch.randn(N, D)
    wanted = plain(model, x)
    seen: dict[str, list[Tensor]] = {name: [] for name in wanted if kind == "after" or name != "0.bias"}
    for name in seen:
        p = model.get_parameter(name)
        if kind == "after":
            p.register_post_accumulate_grad_hook(lambda p, name=name: seen[name].append(p.grad.clone()))
        else:
            p.register_hook(lambda g, name=name: seen[name].append(g.clone()) or 3 * g)
    for k in range(1, 3):
        model.zero_grad()
        with extend(model, *asked):
            loss(model(x)).backward()
        same(model, {n: 3 * g if kind == "before" and n in seen else g for n, g in wanted.items()})
        for name, calls in seen.items():
            assert len(calls) == k, name
            close(calls[-1], wanted[name], name)


def test_an_optimizer_in_the_backward(chosen: Chosen) -> None:
    """As the hook after accumulation is mostly used: step and forget the gradient, within the backward."""
    model, x = mlp(nn.ReLU), torch.randn(N, D)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = plain(model, x)

    def step(p: Tensor) -> None:
        assert p.grad is not None
        with torch.no_grad():
            p.sub_(p.grad)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    with extend(model, "ggn_diag", "grad_sample"):
        loss(model(x)).backward()
    for name, p in model.named_parameters():
        assert p.grad is None
        close(p.detach(), start[name] - wanted[name], name)


@pytest.mark.parametrize("asked", [("grad_sample",), ("ggn_diag",), ("jac", "grad_var")], ids=told)
def test_gradients_add_up(asked: tuple[str, ...], chosen: Chosen) -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    wanted = plain(model, x)
    model.zero_grad()
    first: list[Tensor | None] = []
    for k in range(1, 4):
        with extend(model, *asked):
            loss(model(x)).backward()
        same(model, wanted, k)
        now = [p.grad for p in model.parameters()]
        assert k == 1 or all(a is b for a, b in zip(first, now, strict=True)), "in place, as ever"
        first = now


@pytest.mark.parametrize("asked", [("grad_sample",), ("ggn_diag",), ("jac", "grad_var")], ids=told)
def test_backward_again(asked: tuple[str, ...], chosen: Chosen) -> None:
    model, x = mlp(nn.ReLU), torch.randn(N, D)
    wanted = plain(model, x)
    for _ in range(2):
        model.zero_grad()
        with extend(model, *asked):
            value = loss(model(x))
            value.backward(retain_graph=True)
            same(model, wanted)
            value.backward(retain_graph=True)
            same(model, wanted, 2)
            value.backward()
            same(model, wanted, 3)
            with pytest.raises(RuntimeError, match="through the graph a second time"):
                value.backward()
            same(model, wanted, 3)
        with pytest.raises(RuntimeError, match="through the graph a second time"):
            value.backward()


def test_the_graph_is_freed(ours: Chosen) -> None:
    """What its nodes saved can no longer be read, but that of the lowest."""
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    for asked in ("grad_sample", "ggn_diag"):
        with extend(model, asked):
            value = loss(model(x))
            tanh = value.grad_fn.next_functions[0][0].next_functions[0][0].next_functions[1][0]  # type: ignore
            assert tanh.name() == "TanhBackward0"
            assert tanh._saved_result is not None
            value.backward()
            with pytest.raises(RuntimeError, match="after they have already been freed"):
                _ = tanh._saved_result


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "4.bias"])
def test_frozen_parameters(frozen: str, chosen: Chosen) -> None:
    model, x = mlp(nn.ReLU), torch.randn(N, D)
    model.get_parameter(frozen).requires_grad_(False)
    wanted = plain(model, x)
    for _ in range(2):
        model.zero_grad()
        with extend(model, "ggn_diag", "grad_sample"):
            loss(model(x)).backward()
        same(model, wanted)
    assert frozen not in wanted


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.T.contiguous().T if t.dim() == 2 else t,
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "one number": lambda t: t[..., :1].expand_as(t) if t.dim() == 1 else t,
}


@pytest.mark.parametrize("how", MEMORY)
def test_parameters_in_other_memory(how: str, chosen: Chosen) -> None:
    for name in ("relu", "convolution, relu"):
        build, data = NETS[name]
        model, x = build(), data()
        for p in model.parameters():
            p.data = MEMORY[how](p.data)
        twin = copy.deepcopy(model)
        loss(twin(x)).backward()
        for _ in range(2):
            model.zero_grad()
            with extend(model, "ggn_diag", "grad_sample"):
                loss(model(x)).backward()
            for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
                assert p.grad is not None
                assert q.grad is not None
                close(p.grad, q.grad, (name, key))
                assert p.grad.stride() == q.grad.stride(), (name, key)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_stay_sparse(kind: Any, sparse: bool, ours: Chosen) -> None:
    bag = kind is nn.EmbeddingBag
    table = kind(5, 3, sparse=sparse, mode="sum") if bag else kind(5, 3, sparse=sparse)
    model, x = nn.Sequential(table, nn.Flatten(), nn.Linear(3 if bag else 9, C)), torch.randint(5, (N, 3))
    wanted = plain(model, x)
    assert wanted["0.weight"].is_sparse == sparse
    for asked in (("grad_var",), ("grad_sample", "ggn_diag")):
        model.zero_grad()
        with extend(model, *asked):
            loss(model(x)).backward()
        same(model, wanted)


def test_leaves_that_are_not_served(chosen: Chosen) -> None:
    """The input's gradient, and that of a tensor of the user's, arrive as ever."""
    model, x, shift = mlp(nn.ReLU), torch.randn(N, D).requires_grad_(), torch.randn(C).requires_grad_()
    for _ in range(2):
        x.grad = shift.grad = None
        model.zero_grad()
        with extend(model, "grad_sample", "ggn_diag"):
            loss(model(x) + shift).backward()
        wanted = torch.autograd.grad(loss(model(x) + shift), [x, shift, *model.parameters()])
        for t, g in zip([x, shift, *model.parameters()], wanted, strict=True):
            close(t.grad, g, "grad")  # type: ignore[arg-type]


def test_single_precision(chosen: Chosen) -> None:
    """Where the products may be another library's."""
    model = nn.Sequential(nn.Linear(192, 160), nn.ReLU(), nn.Linear(160, 128), nn.ReLU(), nn.Linear(128, C))
    x, y = torch.randn(96, 192), torch.randint(C, (96,))
    F.cross_entropy(model(x), y).backward()
    wanted = [p.grad for p in model.parameters()]
    small = copy.deepcopy(model).float()
    for asked in (("grad_sample_norm",), ("ggn_diag",), ("jac", "grad_var"), ("grad_sample",)):
        small.zero_grad()
        with extend(small, *asked):
            F.cross_entropy(small(x.float()), y).backward()
        for p, g in zip(small.parameters(), wanted, strict=True):
            assert p.grad is not None
            assert g is not None
            assert p.grad.dtype == torch.float32
            assert (p.grad - g).abs().max() <= 64 * torch.finfo(torch.float32).eps * g.abs().max()
