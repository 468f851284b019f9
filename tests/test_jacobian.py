"""The Jacobian that stays factors: whatever one does with it, it is the tensor that loops build."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from cases import C, D, Fn, N, random_loss
from oracle import close, jacobian, trainable
from scipy.sparse.linalg import lsqr
from test_quantities import MODELS
from torch import Tensor, nn

import hookjac
from benchmarks.peak import Peak
from hookjac import HookjacError, JacTensor, Kronecker, KroneckerEigen, KroneckerSum, extend


def found(model: nn.Module, x: Tensor, *asked: Any) -> hookjac.extend:
    with extend(model, *(asked or ("jac",))) as ext:
        random_loss(model(x)).backward()
    return ext


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))


def table() -> nn.Module:
    return Fn(lambda m, i: m.o(torch.tanh(m.e(i)).flatten(1)), e=nn.Embedding(5, 3), o=nn.Linear(6, C))


def picture() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 1), nn.Flatten(2))  # out [3, 4]


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "dense layer": (perceptron, lambda: torch.randn(N, D), "0.weight"),
    "bias": (perceptron, lambda: torch.randn(N, D), "0.bias"),
    "table": (table, lambda: torch.randint(5, (N, 2)), "e.weight"),
    "convolution": (picture, lambda: torch.randn(N, 2, 3, 3), "0.weight"),
}  # fmt: skip


def one(kind: str) -> tuple[JacTensor, Tensor]:
    build, inputs, name = KINDS[kind]
    model, x = build(), inputs()
    found(model, x)
    p = trainable(model)[name]
    return p.jac, jacobian(model(x), p)


every = pytest.mark.parametrize("kind", KINDS)


@every
def test_it_is_a_tensor(kind: str) -> None:
    jac, wanted = one(kind)
    assert isinstance(jac, Tensor)
    assert (jac.shape, jac.dtype, jac.device, jac.dim(), len(jac)) == (wanted.shape, wanted.dtype, wanted.device,
                                                                       wanted.dim(), N)  # fmt: skip
    assert not jac.requires_grad
    assert jac.numel() == wanted.numel()
    assert jac.size(1) == wanted.size(1)
    close(jac.to_dense(), wanted, "to_dense")
    assert type(jac.to_dense()) is Tensor
    close(jac + 1, wanted + 1, "+")
    close(2 * jac, 2 * wanted, "*")
    close(torch.stack([jac, jac]).sum(0), 2 * wanted, "stack")
    close(jac.abs().amax(), wanted.abs().amax(), "amax")
    close(jac.reshape(N, -1), wanted.reshape(N, -1), "reshape")
    close(jac.flatten(1).T, wanted.flatten(1).T, "T")
    close(torch.from_numpy(jac.numpy()), wanted, "numpy")
    close(torch.from_numpy(numpy.asarray(jac)), wanted, "asarray")
    close(torch.tensor(jac.tolist()), wanted, "tolist")
    close(torch.linalg.norm(jac), torch.linalg.norm(wanted), "norm")
    assert torch.equal(jac, jac.to_dense())
    assert "JacTensor" in repr(jac)
    assert f"{jac.sum():.3f}" == f"{wanted.sum():.3f}" or abs(float(jac.sum() - wanted.sum())) < 1e-9


@every
def test_copies_and_files(kind: str) -> None:
    jac, wanted = one(kind)
    for made in (copy.deepcopy(jac), copy.copy(jac), jac.clone(), jac.detach(), jac.to("cpu"), jac.double()):
        assert isinstance(made, JacTensor)
        close(made, wanted, "copy")
    close(jac.float(), wanted.float(), "float", 1e-5)
    assert jac.float().dtype == torch.float32
    assert jac.to(torch.float32).dtype == torch.float32
    file = io.BytesIO()
    torch.save({"jac": jac}, file)
    file.seek(0)
    loaded = torch.load(file)["jac"]
    assert type(loaded) is Tensor
    close(loaded, wanted, "file")


INDICES = [0, -1, slice(1, 3), slice(None), slice(None, None, 2), torch.tensor([2, 0, 2]), (slice(None), 1),
           (slice(None), slice(1, 3)), (1, 2), (slice(1, 3), -1), (slice(None), slice(None, None, 2), 0), (2, 1, 0),
           (slice(None), slice(0, 2), slice(None)), ..., (..., 0), None, [0, 2],
           torch.tensor([True, False, True, False]),
           (slice(None), torch.tensor([1, 0])), (torch.tensor([0, 1]), torch.tensor([1, 0])),
           (slice(3, 1),)]  # fmt: skip


@every
@pytest.mark.parametrize("k", range(len(INDICES)))
def test_indices(kind: str, k: int) -> None:
    jac, wanted = one(kind)
    close(jac[INDICES[k]], wanted[INDICES[k]], INDICES[k])


def test_picked_samples_stay_factors() -> None:
    jac, _ = one("dense layer")
    for picked in (jac[1:3], jac[torch.tensor([0, 2])], jac[:, 1], jac[:, :2], jac[1:, 0]):
        assert isinstance(picked, JacTensor)
    with pytest.raises(IndexError):
        jac[N]
    assert type(jac[0]) is Tensor


@every
def test_products_and_sums(kind: str) -> None:
    jac, J = one(kind)
    out, p = jac.out, jac.factor.param
    rows, params = "nab"[: 1 + len(out)], "opqr"[: len(p)]
    v, u = torch.randn(p), torch.randn(N, *out)
    many_v, many_u = torch.randn(3, *p), torch.randn(3, N, *out)
    flat = J.reshape(N * out.numel(), -1)
    close(jac.times(v), (flat @ v.reshape(-1)).reshape(N, *out), "times")
    close(jac.back(u), (u.reshape(-1) @ flat).reshape(p), "back")
    close(jac.times(many_v), (many_v.reshape(3, -1) @ flat.T).reshape(3, N, *out), "times many")
    close(jac.back(many_u), (many_u.reshape(3, -1) @ flat).reshape(3, *p), "back many")
    close(jac.gram(), (flat @ flat.T).reshape(N, *out, N, *out), "gram")
    close(jac.gram(jac[1:3]), (flat @ flat.T).reshape(N, *out, N, *out)[(slice(None),) * len(rows) + (slice(1, 3),)],
          "gram of parts")  # fmt: skip
    close(jac.norms(), flat.norm(dim=1).reshape(N, *out), "norms")
    close(jac.sq_sum(), flat.square().sum(0).reshape(p), "sq_sum")
    close(torch.tensordot(jac, v, v.dim()), torch.tensordot(J, v, v.dim()), "tensordot")
    close(torch.tensordot(u, jac, u.dim()), torch.tensordot(u, J, u.dim()), "tensordot")
    close(torch.tensordot(jac, torch.randn(jac.shape[-1], 2) * 0, 1), J.new_zeros(*J.shape[:-1], 2), "last axis only")
    other = rows.translate(str.maketrans("nab", "mcd"))
    whole = f"{rows}{params}"
    for equation, b in [
        (f"{whole},{params}->{rows}", v), (f"{whole},k{params}->k{rows}", many_v), (f"{whole},{rows}->{params}", u),
        (f"{whole},k{rows}->k{params}", many_u), (f"{whole},{other}{params}->{rows}{other}", jac),
        (f"{whole},{whole}->{rows}", jac), (f"{whole},{whole}->{params}", jac), (f"{whole},{whole}->", jac),
        (f"{whole},{rows}->{rows}{params}", u), (f"{whole},{params}->{rows}{params}", v),
        (f"{whole},{params}k->k{rows}", many_v.movedim(0, -1)), (f"{whole},{rows}->n{params}", u),
    ]:  # fmt: skip
        dense = J if b is jac else b
        close(torch.einsum(equation, jac, b), torch.einsum(equation, J, dense), equation)
        if b is not jac:
            left, right = equation.split("->")[0].split(",")
            turned = f"{right},{left}->{equation.split('->')[1]}"
            close(torch.einsum(turned, b, jac), torch.einsum(turned, b, J), turned)


def test_matrix_products_of_a_vector_parameter() -> None:
    jac, J = one("bias")
    v, M = torch.randn(4), torch.randn(4, 2)
    close(jac @ v, J @ v, "@")
    close(jac @ M, J @ M, "@")
    close(torch.matmul(jac, v), J @ v, "matmul")
    close(torch.randn(5, C) @ jac * 0, torch.zeros(N, 5, 4), "from the left")


def test_structured_products_build_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    jac, _ = one("dense layer")
    monkeypatch.setattr(JacTensor, "to_dense", None)
    monkeypatch.setattr(hookjac.factor.Outer, "dense", None)
    v = torch.randn(4, D)
    for result in (torch.einsum("ncoi,oi->nc", jac, v), torch.einsum("ncoi,mdoi->ncmd", jac, jac), jac.norms(),
                   jac.sq_sum(), torch.tensordot(jac, v, 2), jac[1:].gram(jac), jac.double().times(v)):  # fmt: skip
        assert torch.isfinite(result).all()
    with pytest.raises(TypeError):
        jac + 1


def test_it_cannot_be_written_to() -> None:
    jac, wanted = one("dense layer")
    writes: list[Callable[[], Any]] = [
        lambda: jac.mul_(2),
        lambda: jac.__imul__(2),
        lambda: jac.__setitem__(0, 1.0),
        lambda: torch.add(wanted, 1, out=jac),
        lambda: torch._foreach_mul_([jac], 0.0),
        lambda: torch.relu_(jac),
        lambda: nn.functional.relu(jac, inplace=True),
        lambda: setattr(jac, "data", wanted),
        lambda: jac.set_(wanted),
    ]
    for write in writes:
        with pytest.raises(HookjacError, match=r"cannot be written to .* Take p\.jac\.to_dense\(\)"):
            write()
    with pytest.raises(ValueError, match="read-only"):
        jac.numpy().fill(0)
    close(jac, wanted, "as before")


@every
def test_integers_of_numpy_and_other_indices(kind: str) -> None:
    jac, wanted = one(kind)
    n = numpy.argmax([1, 3, 2])
    indices: list[Any] = [n, (n, 1), (slice(None), n), (), numpy.array([2, 0]), torch.arange(4) % 2 == 0,
                          torch.tensor([1, 0, 1, 1], dtype=torch.uint8), torch.tensor([-1, 2]), [1, 1]]  # fmt: skip
    for index in indices:
        close(jac[index].to_dense(), wanted[index], (kind, index))
    for outside in (torch.tensor([N]), torch.tensor([-N - 1]), N, -N - 1, numpy.int64(N)):
        with pytest.raises(IndexError, match=r"out of (bounds|range)"):
            jac[outside]


def test_vectors_of_another_shape_are_refused() -> None:
    """A transposed vector has as many entries, and would be wrong."""
    jac, wanted = one("dense layer")  # [N, C, 4, D]
    bias, _ = one("bias")
    uses: list[Callable[[Any], Any]] = [
        lambda j: torch.einsum("ncpq,pq->nc", j, torch.ones(D, 4)),
        lambda j: torch.einsum("ncpq,nc->pq", j, torch.ones(C, N)),
        lambda j: torch.tensordot(j, torch.ones(D, 4), 2),
        lambda j: torch.tensordot(torch.ones(C, N), j, 2),
        lambda j: j.times(torch.ones(D, 4)),
        lambda j: j.times(torch.ones(2, 2, 4, D)),
        lambda j: j.back(torch.ones(C, N)),
        lambda j: j.back(torch.ones(N * C, 2)),
    ]
    for use in uses:
        with pytest.raises((ValueError, RuntimeError)):
            use(jac)
    for v in (torch.ones(8), torch.ones(1, 2), torch.ones(2, 4)):
        with pytest.raises(RuntimeError):
            bias @ v
    for equation, v in (("ncpq,pq->nc", torch.randn(4, 1)), ("ncpq,nc->pq", torch.randn(1, C))):
        close(torch.einsum(equation, jac, v), torch.einsum(equation, wanted, v), equation)  # broadcast, as torch does


def test_complex_vectors() -> None:
    jac, wanted = one("dense layer")
    v, u = torch.randn(4, D, dtype=torch.complex128), torch.randn(N, C, dtype=torch.complex128)
    full = wanted.to(torch.complex128)
    close(jac.times(v), torch.einsum("ncpq,pq->nc", full, v), "times")
    close(torch.einsum("ncpq,pq->nc", jac, v), torch.einsum("ncpq,pq->nc", full, v), "einsum")
    close(jac.back(u), torch.einsum("ncpq,nc->pq", full, u), "back")
    model, x = perceptron(), torch.randn(N, D)
    J = found(model, x).jacobian
    w, z = torch.randn(J.shape[1], dtype=torch.complex128), torch.randn(J.shape[0], 2, dtype=torch.complex128)
    close(J @ w, J.to_dense().to(torch.complex128) @ w, "operator")
    close(J.T @ z, J.to_dense().T.to(torch.complex128) @ z, "transposed")


def test_casts_are_those_of_the_product() -> None:
    """A narrower type may hold the product, and not its factors."""
    model, x = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)), torch.tensor([[1e6]])
    nn.init.constant_(model[1].weight, 1e-6)  # type: ignore[arg-type]
    found(model, x)
    jac: JacTensor = model[0].weight.jac  # type: ignore[assignment, union-attr]
    for dtype in (torch.float16, torch.int64, torch.float32, torch.complex128):
        assert torch.equal(jac.to(dtype).to_dense(), jac.to_dense().to(dtype)), dtype
    assert isinstance(jac.float().double(), torch.Tensor)


def test_an_input_modified_since_is_noticed() -> None:
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)), torch.randn(N, D)
    found(model, x)
    kept = model[0].weight.jac.to_dense()
    copied = copy.deepcopy(model[0].weight.jac)
    upper = jacobian(model(x), model[2].weight)
    x.mul_(2)
    for read in (
        lambda j: j + 1,
        lambda j: j.gram(),
        lambda j: j[0],
        lambda j: j.times(torch.ones(4, D)),
        lambda j: j.data.to_dense(),
        copy.deepcopy,
    ):
        with pytest.raises(HookjacError, match="holds a layer's input by reference, and that was modified in place"):
            read(model[0].weight.jac)
    close(copied, kept, "a copy is its own")
    close(model[2].weight.jac, upper, "another layer")


def test_a_step_of_the_optimizer_changes_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)), torch.randn(N, D)
    wanted = {name: jacobian(model(x), p) for name, p in trainable(model).items()}
    found(model, x)
    torch.optim.SGD(model.parameters(), 0.1).step()
    for name, p in trainable(model).items():
        close(p.jac, wanted[name], name)


# The whole model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_operator(name: str) -> None:
    case = MODELS[name]
    model, x, y = case.build(), case.inputs(), case.inputs()
    J, K = (torch.cat([jacobian(model(t), p).reshape(N * C, -1) for p in model.parameters()], 1) for t in (x, y))
    jac, other = found(model, x).jacobian, found(model, y).jacobian
    P = J.shape[1]
    assert jac.shape == (N * C, P)
    close(jac.to_dense(), J, "to_dense")
    v, V, u, U = torch.randn(P), torch.randn(P, 3), torch.randn(N * C), torch.randn(N * C, 2)
    close(jac @ v, J @ v, "@")
    close(jac @ V, J @ V, "@")
    close(jac.T @ u, J.T @ u, "T @")
    close(jac.T @ U, J.T @ U, "T @")
    assert jac.T.T is jac
    for b, M in ((jac, J), (other, K)):
        full = (J @ M.T).reshape(N, C, N, C)
        close(jac.gram(b), full, "gram")
        close(jac.gram(b, kind="outputs"), full.diagonal(dim1=1, dim2=3).permute(2, 0, 1), "outputs")
        close(jac.gram(b, kind="trace"), full.diagonal(dim1=1, dim2=3).sum(2), "trace")
    rows = J.reshape(N, C, P)
    for metric in (torch.rand(N, C), torch.randn(N, C, C)):
        L = torch.diag_embed(metric) if metric.dim() == 2 else metric + metric.transpose(1, 2)
        close(jac.diagonal(metric if metric.dim() == 2 else L), torch.einsum("ncp,ncd,ndp->p", rows, L, rows), "JᵀΛJ")
    S = torch.rand(P)
    close(jac.variance(S), torch.einsum("ncp,p,ndp->ncd", rows, S, rows), "J Σ Jᵀ")


@pytest.mark.parametrize("name", ["MLP", "CNN", "residual", "tied"])
def test_variance_under_kronecker_covariance(name: str) -> None:
    case = MODELS[name]
    model, x = case.build(), case.inputs()
    ext = found(model, x, "jac", hookjac.KFAC(fisher="exact"))
    sides: list[Any] = [p.kfac for p in model.parameters()]
    rows = torch.cat([jacobian(model(x), p).reshape(N, C, -1) for p in model.parameters()], 2)
    S = torch.block_diag(*[K.to_dense() for K in sides])
    wanted = torch.einsum("ncp,pq,ndq->ncd", rows, S, rows)
    close(ext.jacobian.variance(sides), wanted, "J Σ Jᵀ")
    eigen = [K.eigen() if isinstance(K, Kronecker) else K for K in sides]  # a sum has none
    close(ext.jacobian.variance(eigen), wanted, "by eigenvectors")
    turned = [(isinstance(E, KroneckerEigen) and E.facing()) or E for E in eigen]
    close(torch.block_diag(*[E.to_dense() for E in turned]), S, "sides called by each other's names")
    close(ext.jacobian.variance(turned), wanted, "by eigenvectors of turned sides")


def test_variance_by_eigenvectors_builds_no_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of a layer with sides; and of what has none, a few samples at a time."""
    model, x = perceptron(), torch.randn(N, D)
    ext = found(model, x, "jac", hookjac.KFAC(fisher="exact"))
    eigen = [p.kfac.eigen() for p in trainable(model).values()]
    wanted = ext.jacobian.variance(eigen)
    monkeypatch.setattr(hookjac.factor.Outer, "dense", None)
    close(ext.jacobian.variance(eigen), wanted, "by eigenvectors")
    monkeypatch.setattr("hookjac.jacobian.CHUNK", 1)
    close(ext.jacobian.variance(eigen), wanted, "sample by sample")


def test_variance_under_the_kronecker_covariance_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = table(), torch.randint(5, (N, 2))
    for sharing in ("expand", "reduce"):
        ext = found(model, ids, "jac", hookjac.KFAC(fisher="exact", sharing=sharing))  # type: ignore[arg-type]
        sides = [p.kfac for p in model.parameters()]
        rows = torch.cat([jacobian(model(ids), p).reshape(N, C, -1) for p in model.parameters()], 2)
        S = torch.block_diag(*[K.to_dense() for K in sides])
        wanted = torch.einsum("ncp,pq,ndq->ncd", rows, S, rows)
        close(ext.jacobian.variance(sides), wanted, sharing)
        close(ext.jacobian.variance([K.eigen() for K in sides]), wanted, (sharing, "by eigenvectors"))
        with monkeypatch.context() as small:
            small.setattr("hookjac.jacobian.CHUNK", 1)
            close(ext.jacobian.variance([K.eigen() for K in sides]), wanted, (sharing, "sample by sample"))


@pytest.mark.parametrize("name", MODELS)
def test_the_kernel(name: str) -> None:
    case = MODELS[name]
    model, x = case.build(), case.inputs()
    ext = found(model, x, "ntk")
    total = torch.zeros(N, C, N, C)
    for key, p in trainable(model).items():
        J = jacobian(model(x), p).reshape(N * C, -1)
        close(p.ntk, (J @ J.T).reshape(N, C, N, C), key)
        total += p.ntk
    close(ext.ntk, total, "sum")


def test_of_some_samples_and_outputs() -> None:
    case = MODELS["CNN"]
    model, x = case.build(), case.inputs()
    ext = found(model, x, hookjac.Jac(outputs=[2, 1], subsample=[3, 0]), hookjac.NTK(outputs=[1], subsample=[2]))
    J = torch.cat([jacobian(model(x), p).reshape(N, C, -1) for p in model.parameters()], 2)
    close(ext.jacobian.to_dense(), J[[3, 0]][:, [2, 1]].reshape(4, -1), "J")
    close(ext.ntk, (J[2, 1] @ J[2, 1]).reshape(1, 1, 1, 1), "ntk")


def test_a_solver_of_somebody_elses() -> None:
    model, x = nn.Linear(D, C), torch.randn(N, D)
    jac = found(model, x).jacobian
    b = jac @ torch.randn(jac.shape[1])
    solution = torch.as_tensor(lsqr(jac.to_scipy(), b.numpy(), atol=1e-14, btol=1e-14)[0])
    close(jac @ solution, b, "solution", 1e-8)


def test_parameters_that_are_not_reached_are_zeros_of_no_size() -> None:
    model = Fn(lambda m, x: m.a(x), a=nn.Linear(D, C), b=nn.Linear(3000, 3000))
    ext = found(model, torch.randn(N, D), "jac", "ntk")
    assert model.b.weight.jac.shape == (N, C, 3000, 3000)
    assert model.b.weight.jac.factor.tensors[0].untyped_storage().nbytes() == 8
    assert not model.b.bias.jac.any()
    close(ext.ntk, model.a.weight.ntk + model.a.bias.ntk, "ntk")


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda j: j @ torch.ones(3), r"expected a vector \[39\]"),
        (lambda j: j.T @ torch.ones(3), r"expected a vector \[12\]"),
        (lambda j: j.gram(kind="all"), "kind must be"),
        (lambda j: j.diagonal(torch.ones(2)), "expected a metric"),
        (lambda j: j.variance([]), r"a Kronecker for each of 4 parameters, got \[\]"),
        (lambda j: j.variance(torch.eye(39)), r"expected the diagonal of a covariance \[39\]"),
        (lambda j: j.variance([Kronecker(None, torch.eye(2), torch.Size([2]))] * 4), r"parameter '0.weight' has shape"),
    ],
)
def test_bad_arguments(use: Callable[[Any], Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
    jac = found(model, torch.randn(N, D)).jacobian
    with pytest.raises(ValueError, match=message):
        use(jac)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda j: j @ [1.0] * 39, r"expected a tensor \[39\]"),
        (lambda j: j.T @ j, r"expected a tensor \[12\] or \[12, K\], got Jacobian"),
        (lambda j: j.gram(torch.ones(3)), "gram takes the ext.jacobian of another batch, got Tensor"),
    ],
)
def test_arguments_of_another_kind(use: Callable[[Any], Any], message: str) -> None:
    jac = found(perceptron(), torch.randn(N, D)).jacobian
    assert repr(jac) == "Jacobian(4 samples of 3 outputs x 39 parameters)"
    close(jac.T.to_dense(), jac.to_dense().T, "transposed")
    with pytest.raises(TypeError, match=message):
        use(jac)


def test_variance_under_corrected_factors() -> None:
    model, x = perceptron(), torch.randn(N, D)
    J = found(model, x, "jac", hookjac.KFAC(fisher="exact", corrected=True)).jacobian
    factors = [p.kfac for p in trainable(model).values()]
    S = torch.block_diag(*[K.to_dense() for K in factors])
    rows = J.to_dense().reshape(N, C, -1)
    close(J.variance(factors), torch.einsum("ncp,pq,ndq->ncd", rows, S, rows), "EKFAC")


def test_gram_of_different_parameters_is_refused() -> None:
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
    jac = found(model, torch.randn(N, D)).jacobian
    with pytest.raises(ValueError, match="shapes"):
        model[0].weight.jac.gram(model[2].weight.jac)
    other = found(nn.Linear(D, C), torch.randn(N, D)).jacobian
    with pytest.raises(ValueError, match="two Jacobians of one model"):
        jac.gram(other)


def test_the_kernel_of_a_large_net_fits_in_a_tenth_of_its_jacobian() -> None:
    """N = 256, C = 10, a million parameters: N C P is 10 GB in float32; what lives at once stays under a tenth."""
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512),
                          nn.Tanh(), nn.Linear(512, 10))  # fmt: skip
    P = sum(p.numel() for p in model.parameters())
    assert P > 900_000
    n = 256
    x = torch.randn(n, 784)
    with Peak() as peak:
        kernel = found(model, x, "ntk").ntk
    assert kernel.shape == (n, 10, n, 10)
    assert peak.bytes < n * 10 * P * 4 / 10
    some = found(model, x[:2]).jacobian.to_dense()
    close(kernel[:2, :, :2, :].reshape(20, 20), some @ some.T, "kernel", 1e-4)


def test_what_a_jacobian_is_multiplied_with_is_converted_or_refused() -> None:
    model, x = perceptron().float(), torch.randn(N, D).float()
    J = found(model, x, hookjac.KFAC(fisher="exact"), "jac").jacobian
    S, metric = torch.rand(J.shape[1]), torch.rand(N, C)
    close(J.variance(S), J.variance(S.float()), "variance", 1e-6)
    close(J.diagonal(metric), J.diagonal(metric.float()), "diagonal", 1e-6)
    for wrong in (lambda: J.variance(S.cfloat()), lambda: J.diagonal(metric.cfloat())):
        with pytest.raises(TypeError, match="must be real"):
            wrong()
    pairs = [p.kfac for p in model.parameters()]
    wide = pairs[0].to(torch.float64)
    for other in (wide, wide.eigen(), KroneckerSum((wide,))):
        with pytest.raises(
            TypeError, match=r"'0.weight' has a Jacobian of torch.float32 .* Kronecker is of torch.float64"
        ):
            J.variance([other, *pairs[1:]])


def test_it_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perceptron()
    found(model, torch.randn(N, D))
    jac: Any = model[0].weight.jac
    monkeypatch.setattr(JacTensor, "to_dense", lambda self: pytest.fail("it was built"))
    wanted = f"JacTensor(shape=({N}, {C}, 4, {D}), Outer, dtype=torch.float64)"
    assert str(jac) == f"{jac}" == repr(jac) == wanted
    with pytest.raises(TypeError, match="unsupported format string"):
        f"{jac:.3f}"
