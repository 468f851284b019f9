"""Our operators in other libraries' clothes: scipy's, linear_operator's and curvlinops'; imported when asked for.

An operator has `shape`, `T`, and `@` with a vector or several.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hookjac.errors import needed_by


def to_scipy(operator: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A `scipy.sparse.linalg.LinearOperator`."""
    with needed_by("to_scipy", "scipy"):
        from scipy.sparse.linalg import LinearOperator

    def through(one: Any) -> Callable[[Any], Any]:
        return lambda v: (one @ torch.as_tensor(v, dtype=dtype, device=device)).detach().cpu().numpy()

    name, forward, back = str(dtype).removeprefix("torch."), through(operator), through(operator.T)
    return LinearOperator(operator.shape, matvec=forward, rmatvec=back, matmat=forward, rmatmat=back, dtype=name)


def as_linear_operator(operator: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A `linear_operator.LinearOperator`."""
    return _kind()(torch.empty(0, dtype=dtype, device=device), operator=operator)


def to_curvlinops(
    operator: Any, columns: Sequence[torch.Size], rows: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> Any:
    """A `PyTorchLinearOperator` of curvlinops. columns, rows: shapes of the tensors that the two sides consist of."""
    return _torch_kind()(operator, columns, rows, dtype, device)


@functools.cache
def _torch_kind() -> Any:
    with needed_by("to_curvlinops", "curvlinops-for-pytorch<4"):
        from curvlinops._torch_base import PyTorchLinearOperator

    class Wrapped(PyTorchLinearOperator):  # type: ignore[misc]
        dtype: Any = None  # properties of the class above, which raise
        device: Any = None

        def __init__(self, operator: Any, columns: Any, rows: Any, dtype: torch.dtype, device: torch.device) -> None:
            super().__init__([tuple(shape) for shape in columns], [tuple(shape) for shape in rows])
            self.operator, self.dtype, self.device = operator, dtype, device
            self.SELF_ADJOINT = operator.T is operator

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:  # [*column, K] -> [*row, K]
            K = X[0].shape[-1]
            found = self.operator @ torch.cat([t.reshape(-1, K) for t in X])
            parts = found.split(self._out_shape_flat)
            return [t.reshape(*shape, K) for t, shape in zip(parts, self._out_shape, strict=True)]

        def _adjoint(self) -> Any:
            return Wrapped(self.operator.T, self._out_shape, self._in_shape, self.dtype, self.device)

    return Wrapped


@functools.cache
def _kind() -> Any:
    with needed_by("as_linear_operator", "linear_operator"):
        from linear_operator import LinearOperator

    class Wrapped(LinearOperator):  # type: ignore[misc]
        """Its one tensor says of which type and where it is; the operator itself is no tensor."""

        def __init__(self, like: Tensor, operator: Any) -> None:
            super().__init__(like, operator=operator)
            self.operator = operator

        def _matmul(self, rhs: Tensor) -> Tensor:
            return self.operator @ rhs  # type: ignore[no-any-return]

        def _size(self) -> torch.Size:
            return torch.Size(self.operator.shape)

        def _transpose_nonbatch(self) -> Any:
            return Wrapped(self._args[0], operator=self.operator.T)

    return Wrapped
