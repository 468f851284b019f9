"""Kronecker factors against expectations that are built by loops, and what one does with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, par, random_loss
from oracle import close, grad, trainable
from test_quantities import MODELS
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hookjac
from hookjac import KFAC, HookjacError, Kronecker, KroneckerEigen, KroneckerSum, extend

Y = torch.tensor([0, 2, 1, 1])


def cross_entropy(output: Tensor) -> Tensor:
    return F.cross_entropy(output, Y[: len(output)])


def watched(model: nn.Module, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's input and output, and the model's output."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda m, args, out: seen.extend([args[0].detach(), out]))
    output = model(x)
    handle.remove()
    return seen[0], seen[1], output


def arriving(model: nn.Module, layer: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Input, d output / d z [N, C, *z], Hessians [N, C, C], and d loss / d z of a layer's output z."""
    a, z, output = watched(model, layer, x)
    J = torch.stack([torch.stack([grad(o, z)[n].detach() for o in output[n]]) for n in range(len(x))])
    free = output.detach().requires_grad_()
    slope = grad(loss(free), free)
    H = torch.stack([torch.stack([grad(s, free)[n].detach() for s in slope[n]]) for n in range(len(x))])
    return a, J, H, grad(loss(output), z).detach()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))


def with_positions() -> nn.Module:
    return Fn(lambda m, x: m.b(torch.tanh(m.a(x)).mean(1)), a=nn.Linear(D, 4), b=nn.Linear(4, C))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 2, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(C))


def positions(layer: nn.Module, a: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [N, L, i] and outputs [..., N, ?, L, o] of a layer, position by position."""
    if isinstance(layer, nn.Conv2d):
        patches = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        return patches.transpose(1, 2), z.flatten(-2).transpose(-1, -2)
    return a.reshape(len(a), -1, a.shape[-1]), z.reshape(*z.shape[: z.dim() - a.dim() + 1], -1, z.shape[-1])


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[Any], nn.Module]]] = {
    "linear": (net, (D,), lambda m: m[0]),
    "top": (net, (D,), lambda m: m[2]),
    "positions": (with_positions, (3, D), lambda m: m.a),
    "convolution": (convolutional, (2, 4, 4), lambda m: m[0]),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("name", NETS)
def test_factors(name: str, fisher: Any, sharing: Any) -> None:
    build, shape, pick = NETS[name]
    model, x = build(), torch.randn(N, *shape)
    model(x)
    layer: Any = pick(model)
    a, J, H, slope = arriving(model, layer, x, random_loss)
    a, J = positions(layer, a, J)
    _, slope = positions(layer, torch.zeros_like(watched(model, layer, x)[0]), slope)
    if sharing == "reduce":
        a, J, slope = a.mean(1, keepdim=True), J.sum(2, keepdim=True), slope.sum(1, keepdim=True)
    L = a.shape[1]
    A = sum(torch.outer(a[n, k], a[n, k]) for n in range(N) for k in range(L)) / (N * L)
    if fisher == "exact":
        B = sum(J[n, :, k].T @ H[n] @ J[n, :, k] for n in range(N) for k in range(L))
    else:
        B = sum(torch.outer(slope[n, k], slope[n, k]) for n in range(N) for k in range(L))
    with extend(model, KFAC(fisher=fisher, sharing=sharing)):
        random_loss(model(x)).backward()
    found = layer.weight.kfac
    close(found.A, A, "A")
    close(found.B, B, "B")
    close(found.to_dense(), torch.kron(B, A), "dense")
    if L == 1 and sharing == "expand":
        assert layer.bias.kfac.A is None
        close(layer.bias.kfac.B, B, "bias")


@pytest.mark.parametrize("name", MODELS)
def test_factors_on_whole_models(name: str) -> None:
    """Linear layers called once by the definition; what has no input side is its own exact block."""
    case = MODELS[name]
    model, x = case.build(), case.inputs()
    calls: dict[nn.Module, int] = {}
    handles = [m.register_forward_hook(lambda m, *_: calls.update({m: calls.get(m, 0) + 1})) for m in model.modules()]
    model(x)
    for handle in handles:
        handle.remove()
    with extend(model, KFAC(fisher="exact"), "ggn_block"):
        random_loss(model(x)).backward()
    checked = 0
    for layer in model.modules():
        tied = sum(layer is not m and getattr(m, "weight", 0) is getattr(layer, "weight", 1) for m in model.modules())
        if type(layer) is nn.Linear and calls.get(layer) == 1 and not tied and isinstance(layer.weight.kfac, Kronecker):  # type: ignore
            with sdpa_kernel(SDPBackend.MATH):
                a, J, H, _ = arriving(model, layer, x, random_loss)
            a, J = positions(layer, a, J)
            L = a.shape[1]
            B = sum(J[n, :, k].T @ H[n] @ J[n, :, k] for n in range(N) for k in range(L))
            close(layer.weight.kfac.A, torch.einsum("nki,nkj->ij", a, a) / (N * L), (name, "A"))  # type: ignore
            close(layer.weight.kfac.B, B, (name, "B"))  # type: ignore
            checked += 1
    for key, p in trainable(model).items():
        if isinstance(p.kfac, Kronecker) and p.kfac.A is None:  # type: ignore[attr-defined]
            close(p.kfac.B, p.ggn_block, (name, key))  # type: ignore[attr-defined]
            checked += 1
    assert checked


def tied_table() -> nn.Module:
    model = Fn(lambda m, i: m.o(torch.tanh(m.e(i)).mean(1)), e=nn.Embedding(C, 4), o=nn.Linear(4, C, bias=False))
    model.o.weight = model.e.weight
    return model


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_table_that_is_a_weight_as_well(sharing: Any) -> None:
    """The sum of what each of its uses alone would have."""
    model, ids = tied_table(), torch.randint(C, (N, 3))
    apart = Fn(model._forward, e=nn.Embedding(C, 4), o=nn.Linear(4, C, bias=False))
    apart.load_state_dict({"e.weight": model.e.weight, "o.weight": model.e.weight})
    for net in (model, apart):
        with extend(net, KFAC(fisher="exact", sharing=sharing)):
            random_loss(net(ids)).backward()
    found, wanted = model.e.weight.kfac, apart.e.weight.kfac.to_dense() + apart.o.weight.kfac.to_dense()
    assert isinstance(found, KroneckerSum)
    close(found.to_dense(), wanted, "dense")
    v = torch.randn(2, C, 4)
    close((found @ v).reshape(2, -1), v.reshape(2, -1) @ wanted, "product")
    close(found.trace(), wanted.trace(), "trace")
    raised = wanted + 0.3 * torch.eye(4 * C)
    close(found.logdet(0.3), torch.logdet(raised), "logdet")
    close(found.solve(v, 0.3).reshape(2, -1), torch.linalg.solve(raised, v.reshape(2, -1).T).T, "solve")
    close(found.solve(v[0], 0.3), found.solve(v, 0.3)[0], "one vector", 1e-9)
    close(found.lerp(found, 0.3).to_dense(), wanted, "moving average")
    with extend(model, "jac") as ext:
        random_loss(model(ids)).backward()
    J = ext.jacobian.to_dense().reshape(N, C, -1)
    close(ext.jacobian.variance([found]), J @ wanted @ J.transpose(1, 2), "variance")
    singular = Kronecker(None, torch.diag(torch.tensor([1.0, 0.0])), torch.Size([2]))
    with pytest.raises(HookjacError, match="nearly singular"):
        KroneckerSum((singular, singular)).solve(torch.ones(2), steps=5)
    with pytest.raises(ValueError, match="expected a vector"):
        found.solve(torch.ones(3))
    with pytest.raises(HookjacError, match="corrected=False"), extend(model, KFAC(fisher="exact", corrected=True)):
        random_loss(model(ids)).backward()


def test_factors_of_a_tied_table_add_up_over_batches(tmp_path: Path) -> None:
    model, ids, y = tied_table(), torch.randint(C, (7, 3)), torch.randint(C, (7,))
    batches = list(zip(ids.split(3), y.split(3), strict=True))
    found = hookjac.accumulate(model, F.cross_entropy, batches, KFAC(fisher="exact"), checkpoint=tmp_path / "run")
    with extend(model, KFAC(fisher="exact")):
        F.cross_entropy(model(ids), y).backward()
    wanted = model.e.weight.kfac.to_dense()
    close(found["kfac"]["e.weight"].to_dense(), wanted, "accumulated")
    found.save(tmp_path / "found")
    close(hookjac.load(tmp_path / "found")["kfac"]["e.weight"].to_dense(), wanted, "read back")
    again = hookjac.accumulate(model, F.cross_entropy, batches, KFAC(fisher="exact"), checkpoint=tmp_path / "run")
    assert torch.equal(again["kfac"]["e.weight"].to_dense(), found["kfac"]["e.weight"].to_dense())


def test_factors_of_an_lstm() -> None:
    """Time steps are positions: inputs and hidden states on one side, the gates' slopes on the other."""
    model = Fn(lambda m, x: m.o(m.r(x)[0][:, -1]), r=nn.LSTM(2, 3, batch_first=True), o=nn.Linear(3, C))
    x, T = torch.randn(N, 4, 2), 4
    r, h, c = model.r, torch.zeros(N, 3), torch.zeros(N, 3)
    states, gates = [], []
    for t in range(T):
        states.append(h.detach())
        z = x[:, t] @ r.weight_ih_l0.T + r.bias_ih_l0 + h @ r.weight_hh_l0.T + r.bias_hh_l0
        gates.append(z)
        i, f, g, o = z.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    output = model.o(h)
    close(output.detach(), model(x).detach(), "the same net")
    slopes = [grad(random_loss(output), z).detach() for z in gates]
    B = sum(torch.outer(row, row) for g in slopes for row in g)
    with extend(model, KFAC(fisher="empirical")):
        random_loss(model(x)).backward()
    for key, inputs in (("weight_ih_l0", [x[:, t] for t in range(T)]), ("weight_hh_l0", states)):
        found = getattr(r, key).kfac
        close(found.A, sum(torch.outer(row, row) for a in inputs for row in a) / (N * T), (key, "A"))
        close(found.B, B, (key, "B"))


def test_groups_are_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(6, C))
    x = torch.randn(N, 4, 2, 2)
    a, J, H, _ = arriving(model, model[0], x, random_loss)
    a, J = a.reshape(N, 2, 8), J.reshape(N, C, 2, 3)
    with extend(model, KFAC(fisher="exact")):
        random_loss(model(x)).backward()
    found = model[0].weight.kfac
    blocks = []
    for b in range(2):
        A = sum(torch.outer(row, row) for row in a[:, b]) / N
        B = sum(J[n, :, b].T @ H[n] @ J[n, :, b] for n in range(N))
        close(found.A[b], A, "A")
        close(found.B[b], B, "B")
        blocks.append(torch.kron(B, A))
    close(found.to_dense(), torch.block_diag(*blocks), "dense")


@pytest.mark.parametrize("padding", [None, 1])
def test_tables_have_a_diagonal_side(padding: int | None) -> None:
    model = Fn(lambda m, i: m.o(torch.tanh(m.e(i)).flatten(1)), e=nn.Embedding(5, 3, padding_idx=padding),
               o=nn.Linear(6, C))  # fmt: skip
    ids = torch.tensor([[0, 1], [2, 2], [1, 4], [4, 0]])
    _, J, H, _ = arriving(model, model.e, ids, random_loss)  # J [N, C, 2, 3]
    kept = [(n, k) for n in range(N) for k in range(2) if ids[n, k] != padding]
    count = torch.zeros(5)
    for n, k in kept:
        count[ids[n, k]] += 1 / len(kept)
    B = sum(J[n, :, k].T @ H[n] @ J[n, :, k] for n, k in kept)
    with extend(model, KFAC(fisher="exact")):
        random_loss(model(ids)).backward()
    found = model.e.weight.kfac
    close(found.A, count, "A")
    close(found.B, B, "B")
    close(found.to_dense(), torch.kron(torch.diag(count), B), "dense")
    v = torch.randn(2, 5, 3)
    close((found @ v).reshape(2, 15), v.reshape(2, 15) @ found.to_dense(), "@")
    with extend(model, KFAC(fisher="exact", sharing="reduce")):
        random_loss(model(ids)).backward()
    once = [[(n, k) for n, k in kept if n == m] for m in range(N)]
    rows = torch.stack([sum((F.one_hot(ids[n, k], 5) * 1.0 for n, k in pairs), torch.zeros(5)) / max(1, len(pairs))
                        for pairs in once])  # fmt: skip
    close(model.e.weight.kfac.A, rows.T @ rows / N, "A, reduced")


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_exact_for_one_sample(sharing: Any) -> None:
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, C))
    with extend(model, KFAC(fisher="exact", sharing=sharing), "ggn_block"):
        random_loss(model(torch.randn(1, D))).backward()
    for name, p in trainable(model).items():
        close(p.kfac.to_dense(), p.ggn_block, name)


@pytest.mark.parametrize("fisher", ["exact", "kfra"])
def test_exact_for_linear_nets(fisher: Any) -> None:
    model = nn.Sequential(nn.Linear(D, 4), nn.Linear(4, 6), nn.Linear(6, C))
    with extend(model, KFAC(fisher=fisher), "ggn_block"):
        F.mse_loss(model(torch.randn(N, D)), torch.randn(N, C)).backward()
    for name, p in trainable(model).items():
        close(p.kfac.to_dense(), p.ggn_block, name)


def test_reduce_is_exact_where_positions_are_averaged_linearly() -> None:
    """A linear net that averages over positions: the setting in which reduce is exact and expand is not."""
    model = Fn(lambda m, x: m.b(m.a(x)).mean(1), a=nn.Linear(D, 4), b=nn.Linear(4, C))
    x, y = torch.randn(N, 3, D), torch.randn(N, C)
    with extend(model, KFAC(fisher="exact", sharing="reduce"), "ggn_block"):
        F.mse_loss(model(x), y).backward()
    for name, p in trainable(model).items():
        close(p.kfac.to_dense(), p.ggn_block, name)
    with extend(model, KFAC(fisher="exact", sharing="expand"), "ggn_block"):
        F.mse_loss(model(x), y).backward()
    assert (model.a.weight.kfac.to_dense() - model.a.weight.ggn_block).norm() > 0.1 * model.a.weight.ggn_block.norm()


def test_kfra_is_its_recursion() -> None:
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, C)), None
    x = torch.randn(N, D)
    _, _, H, _ = arriving(model, model[4], x, cross_entropy)
    z1 = model[0](x).detach()
    z2 = model[2](torch.tanh(z1)).detach()
    G = H.mean(0)
    wanted = [N * G]
    for layer, slope in ((model[4], z2.sigmoid() * (1 - z2.sigmoid())), (model[2], 1 - z1.tanh() ** 2)):
        W = layer.weight.detach()
        G = (W.T @ G @ W) * (slope.T @ slope / N)
        wanted.append(N * G)
    with extend(model, KFAC(fisher="kfra")):
        cross_entropy(model(x)).backward()
    for layer, B in zip((model[4], model[2], model[0]), wanted, strict=True):
        close(layer.weight.kfac.B, B, "B")
        close(layer.bias.kfac.B, B, "bias")


def test_kfra_of_a_weight_used_twice_is_refused() -> None:
    model = Fn(lambda m, x: m.o(torch.tanh(m.a(torch.tanh(m.a(x))))), a=nn.Linear(D, D), o=nn.Linear(D, C))
    with pytest.raises(HookjacError, match=r"kfac of parameter 'a\.\w+': kfra is defined for parameters that are used"):
        with extend(model, KFAC(fisher="kfra")):
            cross_entropy(model(torch.randn(N, D))).backward()


def test_uses_of_one_weight_are_positions() -> None:
    model = Fn(lambda m, x: m.o(torch.tanh(m.a(torch.tanh(m.a(x))))), a=nn.Linear(D, D), o=nn.Linear(D, C))
    x = torch.randn(N, D)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.a.register_forward_hook(lambda m, args, out: seen.append((args[0].detach(), out)))
    output = model(x)
    handle.remove()
    A = sum(torch.outer(row, row) for a, _ in seen for row in a) / (2 * N)
    slope = [grad(cross_entropy(output), z).detach() for _, z in seen]
    # through the second use, the first output's gradient is a partial derivative: exactly what autograd gives
    B = sum(torch.outer(row, row) for g in slope for row in g)
    with extend(model, KFAC(fisher="empirical")):
        cross_entropy(model(x)).backward()
    close(model.a.weight.kfac.A, A, "A")
    close(model.a.weight.kfac.B, B, "B")


@pytest.mark.parametrize("cross", [False, True])
def test_attention_projections_have_factors(cross: bool) -> None:
    parts = {"t": nn.MultiheadAttention(4, 2, batch_first=True), "o": nn.Linear(4, C)}
    model = Fn(lambda m, x, y: m.o(m.t(x, y, y)[0].mean(1)) if cross else m.o(m.t(x, x, x)[0].mean(1)), **parts)
    with extend(model, KFAC(fisher="exact"), "ggn_diag"):
        cross_entropy(model(torch.randn(N, 3, 4), torch.randn(N, 2, 4))).backward()
    found = model.t.in_proj_weight.kfac
    assert found.A.shape == (4, 4)
    assert found.B.shape == (12, 12)
    assert model.t.out_proj.weight.kfac.A.shape == (4, 4)


@pytest.mark.parametrize("name", ["linear", "positions"])
def test_sampled_factors_are_unbiased(name: str) -> None:
    build, shape, pick = NETS[name]
    model, x = build(), torch.randn(N, *shape)
    layer: Any = pick(model)
    torch.manual_seed(1)
    drawn = []
    with extend(model, "kfac"):
        for _ in range(400):
            cross_entropy(model(x)).backward()
            drawn.append(layer.weight.kfac.B)
    with extend(model, KFAC(fisher="exact")):
        cross_entropy(model(x)).backward()
    t = torch.stack(drawn)
    assert ((t.mean(0) - layer.weight.kfac.B).abs() <= 5 * t.std(0) / 20 + 1e-12).all()


def one_weight(name: str) -> tuple[Any, Tensor, Any]:
    """A net or a table, its input, and the weight to look at."""
    if name == "table":
        table: Any = Fn(lambda m, i: m.o(torch.tanh(m.e(i)).flatten(1)), e=nn.Embedding(5, 3), o=nn.Linear(6, C))
        return table, torch.randint(5, (N, 2)), table.e.weight
    build, shape, pick = NETS[name]
    model, x = build(), torch.randn(N, *shape)
    model(x)
    return model, x, pick(model).weight


@pytest.mark.parametrize("name", [*NETS, "table"])
def test_corrected_eigenvalues_are_the_curvature_in_that_basis(name: str) -> None:
    model, x, weight = one_weight(name)
    with extend(model, KFAC(fisher="exact"), "ggn_block"):
        cross_entropy(model(x)).backward()
    plain, block = weight.kfac, weight.ggn_block
    with extend(model, KFAC(fisher="exact", corrected=True)):
        cross_entropy(model(x)).backward()
    found = weight.kfac
    Q = hookjac.KroneckerEigen(found.Q_A, found.Q_B, torch.ones_like(found.values), plain)
    P = weight.numel()
    basis = Q.source._close(Q.rotate(Q.source._open(torch.eye(P).reshape(P, *weight.shape)), back=True),
                            torch.eye(P).reshape(P, *weight.shape)).reshape(P, P)  # fmt: skip
    close(basis @ basis.T, torch.eye(P), "orthogonal")
    rotated = (basis @ block @ basis.T).diagonal()  # rows of `basis` are eigenvectors, in the order of [b, o, i]
    close(found._apply(torch.eye(P).reshape(P, *weight.shape), found.values).reshape(P, P),
          basis.T @ torch.diag(rotated) @ basis, "values")  # fmt: skip
    assert (found.to_dense() - block).norm() <= (plain.to_dense() - block).norm() * (1 + 1e-9)


@pytest.mark.parametrize("name", [*NETS, "table"])
def test_corrected_in_a_basis_that_is_given(name: str) -> None:
    """A moving average's: the eigenvalues are the exact curvature's diagonal there, the source is this batch's."""
    model, x, weight = one_weight(name)
    with extend(model, KFAC(fisher="exact"), "ggn_block"):
        cross_entropy(model(x)).backward()
    plain = {p: p.kfac for p in model.parameters()}
    blocks = {p: p.ggn_block for p in model.parameters()}
    with extend(model, KFAC(fisher="empirical")):  # another matrix: the basis is not the batch's own
        cross_entropy(model(x)).backward()
    bases = {p: p.kfac.eigen() for p in model.parameters()}
    assert any((bases[p].Q_B - plain[p].eigen().Q_B).abs().max() > 1e-2 for p in bases)
    with extend(model, KFAC(fisher="exact", corrected=bases)):
        cross_entropy(model(x)).backward()
    for p, basis in bases.items():
        units = torch.eye(p.numel()).reshape(-1, *p.shape)
        # a matrix whose eigenvectors are the basis, its eigenvalues apart: its eigenvectors in row-major order
        apart = hookjac.KroneckerEigen(basis.Q_A, basis.Q_B, torch.arange(1.0, 1 + p.numel()).reshape_as(basis.values),
                                       plain[p])  # fmt: skip
        _, Q = torch.linalg.eigh((apart @ units).reshape(p.numel(), p.numel()))
        close(p.kfac.values.flatten(), (Q.T @ blocks[p] @ Q).diagonal(), "values")
        close(p.kfac.source.to_dense(), plain[p].to_dense(), "source")
    assert weight.kfac.Q_B is bases[weight].Q_B


def test_bases_that_do_not_fit() -> None:
    model, x = net(), torch.randn(N, D)
    with extend(model, KFAC(fisher="exact")):
        cross_entropy(model(x)).backward()
    first, second = (p.kfac.eigen() for p in (model[0].weight, model[2].weight))  # type: ignore[index]
    wanted = {"0.weight": first, model[2].weight: second}  # type: ignore[index]
    with extend(model, KFAC(fisher="exact", corrected=wanted)):
        cross_entropy(model(x)).backward()
    assert model[0].weight.kfac.Q_B is first.Q_B  # type: ignore[index]
    assert model[2].weight.kfac.Q_B is second.Q_B  # type: ignore[index]
    late: dict[Any, Any] = {}
    asked = KFAC(fisher="exact", corrected=late)
    late["0.weight"] = first
    with extend(model, asked):
        cross_entropy(model(x)).backward()
    assert model[0].weight.kfac.Q_B is first.Q_B  # type: ignore[index]
    for given, kind, says in (
        ({net()[0].weight: first}, HookjacError, r"a basis for a tensor \[4, 5\], which is no trainable parameter"),  # type: ignore[index]
        ({"0.wieght": first}, HookjacError, "a basis for '0.wieght'"),
        ({"0.weight": first.source}, TypeError, "wants a KroneckerEigen for '0.weight', got Kronecker"),
        ({"0.weight": second}, HookjacError, r"'0.weight': the basis that corrected= has for it is of sides"),
    ):
        with pytest.raises(kind, match=says), extend(model, KFAC(fisher="exact", corrected=given)):  # type: ignore[arg-type]
            cross_entropy(model(x)).backward()


def test_moving_averages_of_one_form_only() -> None:
    """A depthwise convolution that a batch does not reach has factors of another form: nothing to average with."""
    torch.manual_seed(0)
    a, b = (
        Kronecker(torch.eye(2).expand(3, 2, 2), torch.ones(3, 1, 1), torch.Size([3, 1, 2])),
        Kronecker(torch.zeros(2, 2), torch.zeros(3, 3), torch.Size([3, 1, 2])),
    )
    with pytest.raises(ValueError, match="of different forms"):
        a.lerp(b, 0.1)


def test_what_has_no_factors() -> None:
    """A large parameter that no rule explains, and a table that is a weight as well under `corrected`."""
    model: Any = Fn(lambda m, x: x @ torch.sinc(m.w) @ torch.ones(80, C), w=par(120, 80))
    x = torch.randn(N, 120)
    with pytest.raises(HookjacError, match="known factors"), extend(model, KFAC(fisher="exact")):
        random_loss(model(x)).backward()
    with extend(model, KFAC(fisher="exact", otherwise="none")):
        random_loss(model(x)).backward()
    assert model.w.kfac is None
    model.last = nn.Linear(C, C)
    forward = model._forward
    model._forward = lambda m, x: m.last(forward(m, x))
    batches = [(x, Y[:N]), (x[:2], Y[:2])]
    added = hookjac.accumulate(model, F.cross_entropy, batches, KFAC(fisher="exact", otherwise="none"))["kfac"]
    assert added["w"] is None
    with extend(model, KFAC(fisher="exact", otherwise="none")):
        F.cross_entropy(model(torch.cat([x, x[:2]])), torch.cat([Y[:N], Y[:2]])).backward()
    close(added["last.weight"].to_dense(), model.last.weight.kfac.to_dense(), "beside it")
    tied, ids = tied_table(), torch.randint(C, (N, 3))
    with extend(tied, KFAC(fisher="exact", otherwise="none")):
        random_loss(tied(ids)).backward()
    assert isinstance(tied.e.weight.kfac, KroneckerSum)
    with extend(tied, KFAC(fisher="exact", otherwise="none", corrected=True)):
        random_loss(tied(ids)).backward()
    assert tied.e.weight.kfac is None
    with pytest.raises(ValueError, match="'refuse' or 'none'"):
        KFAC(otherwise="skip")  # type: ignore[arg-type]


# The objects -----------------------------------------------------------------------------------------------------


def positive(size: int) -> Tensor:
    t = torch.randn(size, size + 2)
    return t @ t.T


def kroneckers() -> dict[str, Kronecker]:
    pair = torch.Size((3, 4))
    return {
        "matrix": Kronecker(positive(4), positive(3), pair),
        "swapped": Kronecker(positive(3), positive(4), pair, swapped=True),
        "vector": Kronecker(None, positive(3), torch.Size((3,))),
        "table": Kronecker(torch.rand(5) + 0.1, positive(2), torch.Size((5, 2)), swapped=True),
        "groups": Kronecker(torch.stack([positive(2), positive(2)]), torch.stack([positive(3), positive(3)]),
                            torch.Size((6, 2))),
        "kernel": Kronecker(positive(8), positive(3), torch.Size((3, 2, 2, 2))),
    }  # fmt: skip


@pytest.mark.parametrize("kind", kroneckers())
def test_everything_is_what_the_dense_matrix_says(kind: str) -> None:
    K = kroneckers()[kind]
    M, P = K.to_dense(), K.shape.numel()
    one, many = torch.randn(*K.shape), torch.randn(3, *K.shape)
    close((K @ one).reshape(P), M @ one.reshape(P), "@ one")
    close((K @ many).reshape(3, P), many.reshape(3, P) @ M, "@ many")
    close(K.trace(), M.trace(), "trace")
    close(K.logdet(0.3), torch.logdet(M + 0.3 * torch.eye(P)), "logdet")
    close(K.solve(many, 0.3).reshape(3, P), torch.linalg.solve(M + 0.3 * torch.eye(P), many.reshape(3, P).T).T, "solve")
    close(K.inverse().to_dense(), torch.linalg.inv(M), "inverse", 1e-8)
    close(K.inverse(0.3).to_dense(), torch.linalg.inv(K.damped(0.3).to_dense()), "damped inverse", 1e-8)
    close(K.inverse(0.3, pi=False).to_dense(), torch.linalg.inv(K.damped(0.3, pi=False).to_dense()), "no pi", 1e-8)
    E = K.eigen()
    close(E.to_dense(), M, "eigen")
    close(E @ one, K @ one, "eigen @")
    close(E.trace(), M.trace(), "eigen trace")


def test_pi_balances_the_sides() -> None:
    K = Kronecker(positive(4) * 100, positive(3), torch.Size((3, 4)))
    pi = ((K.A.trace() / 4) / (K.B.trace() / 3)).sqrt()  # type: ignore[union-attr]
    close(K.damped(0.25).A - K.A, 0.5 * pi * torch.eye(4), "A")  # type: ignore[operator]
    close(K.damped(0.25).B - K.B, 0.5 / pi * torch.eye(3), "B")
    zero = Kronecker(torch.zeros(4, 4), torch.zeros(3, 3), torch.Size((3, 4)))
    close(zero.damped(0.25).to_dense(), 0.25 * torch.eye(12), "nothing to balance")


def test_moving_averages() -> None:
    first, second = kroneckers()["matrix"], kroneckers()["matrix"]
    mean = first.lerp(second, 0.25)
    close(mean.B, 0.75 * first.B + 0.25 * second.B, "B")
    close(mean.A, 0.75 * first.A + 0.25 * second.A, "A")  # type: ignore[operator]


def test_a_vector_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a vector of shape \[\*p\] or \[k, \*p\] with p = \(3, 4\)"):
        kroneckers()["matrix"] @ torch.randn(4, 3)


def test_a_parameter_without_factors_is_small_or_refused() -> None:
    model = Fn(lambda m, x: torch.atan2(m.w, x.unsqueeze(1)).sum(2) @ m.v, w=par(D, D), v=par(D, C))
    with extend(model, KFAC(fisher="exact"), "ggn_block"):
        cross_entropy(model(torch.randn(N, D))).backward()
    close(model.w.kfac.to_dense(), model.w.ggn_block, "w")
    large = Fn(lambda m, x: torch.atan2(m.w, x).sum(1).reshape(-1, 1), w=par(1, 10_000))
    with pytest.raises(HookjacError, match=r"kfac of parameter 'w': .* without known factors"):
        with extend(large, "kfac"):
            large(torch.randn(2, 10_000)).square().sum().backward()


def test_a_parameter_that_is_not_used_has_zeros() -> None:
    model = Fn(lambda m, x: m.a(x), a=nn.Linear(D, C), b=nn.Linear(D, C))
    for corrected in (False, True):
        with extend(model, KFAC(corrected=corrected)):
            cross_entropy(model(torch.randn(N, D))).backward()
        assert not model.b.weight.kfac.to_dense().any()
        assert model.b.weight.kfac.to_dense().shape == (D * C, D * C)


@pytest.mark.parametrize("bad", [{"fisher": "true"}, {"sharing": "both"}, {"samples": 0}])
def test_bad_options(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        KFAC(**bad)


def test_what_has_no_inverse_says_so() -> None:
    A, B = torch.eye(2), torch.diag(torch.tensor([1.0, 0.0]))
    singular, indefinite = Kronecker(A, B, torch.Size([2, 2])), Kronecker(A, B - 0.5 * torch.eye(2), torch.Size([2, 2]))
    v = torch.ones(2, 2)
    for K in (singular, indefinite):
        with pytest.raises(HookjacError, match=r"is not positive definite .* Give a larger damping than"):
            K.inverse()
    with pytest.raises(HookjacError, match="has eigenvalues of zero"):
        singular.solve(v)
    with pytest.raises(HookjacError, match="negative eigenvalue"):
        indefinite.logdet()
    assert singular.logdet() == -math.inf
    both = hookjac.KroneckerSum((indefinite, singular))
    with pytest.raises(HookjacError, match=r"KroneckerSum.* has a negative eigenvalue"):
        both.logdet()
    close(both.logdet(1.0), torch.logdet(both.to_dense() + torch.eye(4)), "logdet of a sum")
    for use in (lambda: singular.inverse(-1.0), lambda: singular.solve(v, -1.0), lambda: singular.logdet(math.nan)):
        with pytest.raises(ValueError, match="damping must be"):
            use()
    with pytest.raises(ValueError, match="different forms"):
        singular.lerp(Kronecker(None, B, torch.Size([2])), 0.1)
    assert singular.to(torch.float32).B.dtype == torch.float32
    assert repr(singular) == "Kronecker(A=[2, 2], B=[2, 2], shape=[2, 2], swapped=False)"


def test_singular_to_rounding_is_singular() -> None:
    """Under cross entropy the outputs' curvature has a direction without any, which rounding makes a small number."""
    model, x = nn.Linear(D, C), torch.randn(5 * D, D)
    with extend(model, KFAC(fisher="exact")):
        F.cross_entropy(model(x), torch.randint(C, (5 * D,))).backward()
    K = model.weight.kfac
    for solved in (lambda: K.solve(model.weight), lambda: K.eigen().solve(model.weight), lambda: K.inverse()):
        with pytest.raises(HookjacError, match=r"Give a larger damping than 0\.0"):
            solved()
    raised = K.to_dense() + 1e-3 * torch.eye(D * C)
    close(K.solve(model.weight, 1e-3).reshape(-1), torch.linalg.solve(raised, model.weight.reshape(-1)), "damped")
    few = Kronecker(torch.diag(torch.tensor([1.0, 1e-9])), torch.diag(torch.tensor([1.0, 1e-9])), torch.Size([2, 2]))
    close(few.solve(torch.ones(2, 2)), torch.tensor([[1.0, 1e9], [1e9, 1e18]]), "far apart, but well known", 1e-9)
    table = Kronecker(torch.tensor([1.0, 0.0]), torch.eye(2), torch.Size([2, 2]), swapped=True)
    with pytest.raises(HookjacError, match="has eigenvalues of zero"):
        table.solve(torch.ones(2, 2))


def test_eigenvectors_are_looked_at_and_said() -> None:
    E = kroneckers()["groups"].eigen()
    assert repr(E) == "KroneckerEigen(Q_A=[2, 2, 2], Q_B=[2, 3, 3], shape=[6, 2])"
    assert E.to(torch.float32).values.dtype == E.to(torch.float32).source.B.dtype == torch.float32
    both = hookjac.KroneckerSum((E.source, E.source)).to(torch.float32)
    assert [part.B.dtype for part in both.parts] == [torch.float32] * 2
    assert E.Q_A is not None
    for bad, error, message in (
        ((E.Q_A, E.Q_B[0], E.values, E.source), ValueError, r"Q_B must be a tensor \[b, n, n\], got a tensor \[3, 3\]"),
        ((E.Q_A[:, :1], E.Q_B, E.values, E.source), ValueError, "Q_A must be a tensor"),
        ((E.Q_A, E.Q_B, E.values.mT, E.source), ValueError, r"values must be a tensor \[2, 3, 2\]"),
        ((None, E.Q_B, E.values[0], E.source), ValueError, r"values must be a tensor \[2, 3, i\]"),
        ((E.Q_A, E.Q_B, E.values, E), TypeError, "source must be a Kronecker"),
    ):
        with pytest.raises(error, match=message):
            KroneckerEigen(*bad)  # type: ignore[arg-type]


# Half precision ---------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.layer(self.table(ids)).tanh().mean(1), self.table.weight)


HALVES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "positions": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3), nn.Flatten(), nn.Linear(6, 3)),
        lambda: torch.randn(20, 2, 5),
    ),
    "groups": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(12, 3)
        ),
        lambda: torch.randn(20, 2, 4, 4),
    ),
    "table": (
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.Flatten(), nn.Linear(9, 3)),
        lambda: torch.randint(7, (20, 3)),
    ),
    "tied": (Tied, lambda: torch.randint(7, (20, 3))),
}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("how", ["model", "autocast", "backward under autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALVES)
def test_half_precision(name: str, dtype: torch.dtype, how: str, corrected: bool) -> None:
    """Factors, what is solved with them, and square roots; against the same in float64."""
    if name == "tied" and corrected:
        pytest.skip("a sum has no eigenvectors of that form")
    build, draw = HALVES[name]
    torch.manual_seed(0)
    right, x, y = build().to(dtype).double(), draw(), torch.randint(3, (20,))
    model = copy.deepcopy(right).to(dtype if how == "model" else torch.float32)
    if x.is_floating_point():
        x = x.to(dtype).double()
    asked = (KFAC(fisher="exact", corrected=corrected), hookjac.GGNSqrt())
    with extend(right, *asked):
        F.cross_entropy(right(x), y).backward()
    mine = x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
    for _ in range(2):
        with extend(model, *asked):
            with torch.autocast("cpu", dtype, enabled=how != "model"):
                loss = F.cross_entropy(model(mine), y)
            with torch.autocast("cpu", dtype, enabled=how == "backward under autocast"):
                loss.backward()
    wanted = trainable(right)
    for key, p in trainable(model).items():
        v = torch.randn_like(p)
        one, other = vars(p)["kfac"], vars(wanted[key])["kfac"]
        near(one @ v, other @ v.double())
        near(one.solve(v, 0.05), other.solve(v.double(), 0.05))
        near(one.to_dense(), other.to_dense())
        near(one.logdet(0.05), other.logdet(0.05))
        assert (one @ v).dtype == one.solve(v, 0.05).dtype == p.dtype
        if isinstance(one, Kronecker):
            near(one.inverse(0.1) @ v, other.inverse(0.1) @ v.double())
            near(one.eigen() @ v, other @ v.double())
        root, wide = vars(p)["ggn_sqrt"], vars(wanted[key])["ggn_sqrt"]
        assert root.dtype == p.dtype
        near(root.double().square().sum((0, 1)), wide.square().sum((0, 1)))


def near(found: Tensor, right: Tensor) -> None:
    assert (found.double() - right).norm() <= 0.03 * right.norm()


def test_factors_in_half_precision_are_as_singular_as_they_round() -> None:
    s = torch.randn(6, 2)
    singular = Kronecker(None, (s @ s.T).bfloat16(), torch.Size([6]))
    with pytest.raises(HookjacError, match="eigenvalues of zero, to rounding"):
        singular.solve(torch.ones(6).bfloat16())
    with pytest.raises(HookjacError, match="not positive definite"):
        singular.inverse()
    assert singular.logdet(0.1).isfinite()


def test_large_weights_under_autocast() -> None:
    """A cast of the weight is no way without factors."""
    model, x = nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, C)).float(), torch.randn(4, 100).float()
    with extend(model, "kfac"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(x))
        loss.backward()
    found = vars(model[0].weight)["kfac"]
    assert found.A.shape == found.B.shape == (100, 100)
