"""Products by either library: the same numbers, whatever the strides, and the same kind of tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hookjac import gemm


def matrices(m: int, k: int, n: int) -> dict[str, tuple[Tensor, Tensor]]:
    r = torch.randn
    return {
        "plain": (r(m, k), r(k, n)),
        "left transposed": (r(k, m).T, r(k, n)),
        "right transposed": (r(m, k), r(n, k).T),
        "both": (r(k, m).T, r(n, k).T),
        "parts": (r(m, k + 9)[:, 3 : k + 3], r(k, n + 9)[:, 5 : n + 5]),
        "steps": (r(2 * m, 2 * k)[::2, ::2], r(2 * k, 2 * n)[::2, ::2]),
        "off the grid": (r(m * k + 1)[1:].view(m, k), r(k * n + 3)[3:].view(k, n)),
        "stretched": (r(1, k).expand(m, k), r(k, 1).expand(k, n)),
    }


@pytest.fixture(params=["as it is here", "as if oneDNN were faster", "as if it were not"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    if request.param != "as it is here":
        found = torch.ops.mkldnn._linear_pointwise.default if "not" not in request.param else None
        monkeypatch.setattr(gemm, "_onednn", lambda: found)
    return str(request.param)


@pytest.mark.parametrize("kind", list(matrices(1, 1, 1)))
@pytest.mark.parametrize("size", [(192, 160, 96), (3, 5, 2), (1, 2048, 1100), (2100, 1, 1000)])
def test_products(library: str, kind: str, size: tuple[int, int, int]) -> None:
    A, B = matrices(*size)[kind]
    wanted = A.double() @ B.double()
    found = gemm.mm(A, B)
    assert found.dtype == torch.float32
    scale = (A.double().abs() @ B.double().abs()).max()
    assert (found - wanted).abs().max() <= 4 * torch.finfo(torch.float32).eps * scale


def test_rows_and_batches(library: str) -> None:
    X, W = torch.randn(5, 4, 6, 192), torch.randn(192, 160)
    torch.testing.assert_close(gemm.rows(X, W).double(), X.double() @ W.double(), rtol=1e-5, atol=1e-4)
    W, X = torch.randn(160, 192).T, torch.randn(3, 160, 256)
    torch.testing.assert_close(gemm.left(W, X).double(), W.double() @ X.double(), rtol=1e-5, atol=1e-4)
    X = torch.randn(3, 256, 160).mT
    torch.testing.assert_close(gemm.left(W, X).double(), W.double() @ X.double(), rtol=1e-5, atol=1e-4)


def test_empty(library: str) -> None:
    for m, k, n in ((0, 300, 300), (300, 0, 300), (300, 300, 0)):
        assert torch.equal(gemm.mm(torch.randn(m, k), torch.randn(k, n)), torch.zeros(m, n))


def test_what_oneDNN_may_not_be_given(library: str) -> None:
    """A product that shall be differentiable, batched by vmap, rounded as the user wishes, or of another type."""
    A, B = torch.randn(192, 160), torch.randn(160, 96)
    (grad,) = torch.autograd.grad(gemm.mm(A.requires_grad_(), B).sum(), A)
    torch.testing.assert_close(grad, B.sum(1).expand_as(A))
    A = A.detach()
    batched = torch.vmap(lambda a: gemm.mm(a, B))(torch.stack([A, -A]))
    torch.testing.assert_close(batched, torch.stack([A, -A]) @ B)
    assert torch.equal(gemm.mm(A.double(), B.double()), A.double() @ B.double())
    assert gemm.mm(A.bfloat16(), B.bfloat16()).dtype == torch.bfloat16
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(gemm.mm(A, B), A @ B)
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.inference_mode():
        assert gemm.mm(A, B).shape == (192, 96)


def test_nan_and_infinity_go_where_they_belong(library: str) -> None:
    A, B = torch.rand(192, 160) + 1, torch.rand(160, 96) + 1
    A[0, 3], A[1, 5] = torch.nan, torch.inf
    found = gemm.mm(A, B)
    assert found[0].isnan().all()
    assert found[1].isposinf().all()
    assert found[2:].isfinite().all()
