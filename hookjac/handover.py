"""Our operators in other libraries' clothes: scipy's and linear_operator's. Both are imported when asked for.

An operator has `shape`, `T`, and `@` with a vector or several.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def to_scipy(operator: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A `scipy.sparse.linalg.LinearOperator`."""
    from scipy.sparse.linalg import LinearOperator

    def through(one: Any) -> Callable[[Any], Any]:
        return lambda v: (one @ torch.as_tensor(v, dtype=dtype, device=device)).detach().cpu().numpy()

    name, forward, back = str(dtype).removeprefix("torch."), through(operator), through(operator.T)
    return LinearOperator(operator.shape, matvec=forward, rmatvec=back, matmat=forward, rmatmat=back, dtype=name)


def as_linear_operator(operator: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A `linear_operator.LinearOperator`."""
    return _kind()(torch.empty(0, dtype=dtype, device=device), operator=operator)


@functools.cache
def _kind() -> Any:
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
