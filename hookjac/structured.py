"""The Jacobian in one parameter: a tensor that stays factors until it is read.

N samples · C entries of one sample's output · p the parameter's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hookjac import given
from hookjac.errors import HookjacError
from hookjac.factor import Dense, Factor, Lookup, Sum, gram, root
from hookjac.memory import available, said

_NOTICED = 1 << 28  # bytes of a dense one, from which on memory is asked for beforehand


class JacTensor(Tensor):
    """`p.jac` [N, *out, *p]: a tensor to whoever uses it, kept as what it is made of.

    These never build it: `gram`, `norms`, `sq_sum`, `times` and `back`; the `torch.einsum` and `torch.tensordot`
    forms of those; picking samples, or outputs when there is one axis of them; `to` and `detach`, `clone`, `deepcopy`.
    All other operations build the dense tensor and work on that copy; `to_dense()` does so on purpose (torch.func.grad
    and jvp need it). It cannot be written to. It holds layer inputs by reference: if one was modified in place since,
    reading raises.
    """

    factor: Factor
    out: torch.Size
    _versions: tuple[int, ...]

    @staticmethod
    def __new__(cls, factor: Factor, out: torch.Size, dtype: torch.dtype) -> JacTensor:
        if not isinstance(factor, Factor):
            raise TypeError(
                f"a JacTensor is made by a backward inside extend(model, 'jac'), not of {given.said(factor)}"
            )
        if not isinstance(out, torch.Size) or not isinstance(dtype, torch.dtype):
            raise TypeError(
                f"out must be a torch.Size and dtype a torch.dtype, got {given.said(out)}, {given.said(dtype)}"
            )
        shape = (factor.N, *out, *factor.param)
        made: JacTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=factor.tensors[0].device, requires_grad=False
        )
        made.factor, made.out = factor, torch.Size(out)
        made._versions = _versions(factor)
        return made

    def __init__(self, *args: Any) -> None:
        super().__init__()

    @property
    def intact(self) -> Factor:
        """The factor; an error if what it holds was modified since."""
        if _versions(self.factor) != self._versions:
            raise HookjacError(
                f"p.jac of shape {tuple(self.shape)} holds a layer's input by reference, and that was modified in "
                "place since. Read it before, take to_dense(), or avoid the in-place operation."
            )
        return self.factor

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """[N, *out, *p] as an ordinary tensor, in memory of its own."""
        factor = self.intact
        size = float(self.numel()) * self.dtype.itemsize
        if size > _NOTICED and size > (left := available(self.device)):
            raise HookjacError(
                f"p.jac of shape {list(self.shape)} would take {said(size)} as a dense tensor, and {said(left)} are "
                "available. Take a part of it (p.jac[:8], p.jac[:, 0]) or products (gram, times, back, einsum), which "
                "stay factors, or ask for some outputs only: Jac(outputs=...)."
            )
        t = factor.dense().transpose(0, 1).reshape(self.shape).to(self.dtype)
        held = t.untyped_storage().data_ptr() in {x.untyped_storage().data_ptr() for x in factor.tensors}
        return t.clone(memory_format=torch.contiguous_format) if held else t.contiguous()

    def gram(self, other: JacTensor | None = None) -> Tensor:
        """[N, *out, N', *out']: inner products of all rows with those of another Jacobian in the same parameter."""
        other = self if other is None else other
        if not isinstance(other, JacTensor):
            raise TypeError(f"gram takes the p.jac of another batch, got {given.said(other)}")
        A, B = self.intact, other.intact
        if A.param != B.param:
            raise ValueError(f"gram of Jacobians in parameters of shapes {tuple(A.param)} and {tuple(B.param)}")
        return gram(A, B).reshape(A.N, *self.out, B.N, *other.out).to(self.dtype)

    def norms(self) -> Tensor:
        """[N, *out]: the length of each row."""
        return root(self.intact.norms()).T.reshape(self.shape[0], *self.out).to(self.dtype)

    def sq_sum(self) -> Tensor:
        """[*p]: squares summed over samples and outputs."""
        factor = self.intact
        ones = torch.ones(factor.N, factor.V, dtype=factor.tensors[0].dtype, device=self.device)
        return factor.quad(ones).to(self.dtype)

    def times(self, v: Tensor) -> Tensor:
        """J v: [*p] -> [N, *out], or [K, *p] -> [K, N, *out]."""
        factor = self.intact
        many = _many(v, factor.param, "p")
        if v.is_complex():
            return torch.complex(self.times(v.real), self.times(v.imag))
        rows = given.real("v", v, factor.tensors[0].dtype, self.device).reshape(-1, *factor.param)
        found = factor.times(rows).transpose(1, 2)  # [K, N, V]
        found = found.reshape(len(rows), factor.N, *self.out).to(self.dtype)
        return found if many else found[0]

    def back(self, u: Tensor) -> Tensor:
        """Jᵀ u: [N, *out] -> [*p], or [K, N, *out] -> [K, *p]."""
        factor = self.intact
        many = _many(u, torch.Size([factor.N, *self.out]), "[N, *out]")
        if u.is_complex():
            return torch.complex(self.back(u.real), self.back(u.imag))
        rows = given.real("u", u, factor.tensors[0].dtype, self.device).reshape(-1, factor.N, factor.V).transpose(1, 2)
        found = factor.back(rows).to(self.dtype)
        return found if many else found[0]

    def _like(self, factor: Factor, out: torch.Size | None = None) -> JacTensor:
        return JacTensor(factor, self.out if out is None else out, self.dtype)

    def __copy__(self) -> JacTensor:
        return self._like(self.intact)

    def __deepcopy__(self, memo: Any) -> JacTensor:
        return self._like(self.intact.map(torch.clone))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.to_dense().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"JacTensor(shape={tuple(self.shape)}, {type(self.factor).__name__}, dtype={self.dtype})"

    def __format__(self, spec: str) -> str:
        return object.__format__(self, spec)  # as it is printed: a line of a log shall not build it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func == _REQUIRES_GRAD:
            return any(t.requires_grad for t in args[0].factor.tensors)
        if name in _ABOUT or name == "__get__":
            # in one call: an interrupt (Ctrl-C) can leave a `with` without its end, and the state disabled for good
            return torch._C._disabled_torch_function_impl(func, types, tuple(args), kwargs)
        if name in _STRUCTURED:
            found = _STRUCTURED[name](*args, **kwargs)
            if found is not NotImplemented:
                return found
        writes = name in _WRITING or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
        if (writes and args and _has_one(args[0])) or _has_one(kwargs.get("out")):
            raise _written_to(name)
        args, kwargs = pytree.tree_map_only(cls, cls.to_dense, (args, kwargs))
        found = func(*args, **kwargs)
        if name == "numpy":
            found.flags.writeable = False  # what is written there would reach nothing
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]._like(args[0].intact)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and _has_one(value):
                raise _written_to(func.__name__)
        args, kwargs = pytree.tree_map_only(cls, cls.to_dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def _has_one(value: Any) -> bool:
    return any(isinstance(t, JacTensor) for t in (value if isinstance(value, (list, tuple)) else (value,)))


def _written_to(name: str) -> HookjacError:
    return HookjacError(f"p.jac is made of factors and cannot be written to ({name}). Take p.jac.to_dense().")


def _many(v: Tensor, one: torch.Size, what: str) -> bool:
    """Is it several vectors? Other shapes are refused: a transposed vector has as many entries, and is wrong."""
    if not isinstance(v, Tensor):
        raise TypeError(f"expected a tensor, got {type(v).__name__}")
    if v.shape == one or (v.dim() == len(one) + 1 and v.shape[1:] == one):
        return v.dim() > len(one)
    raise ValueError(f"expected a tensor of shape {what} = {list(one)}, or [K, ...] of those, got {list(v.shape)}")


def _versions(factor: Factor) -> tuple[int, ...]:
    return tuple(0 if t.is_inference() else t._version for t in factor.tensors)


_REQUIRES_GRAD: Any = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
# what a tensor says of itself, without being read
_ABOUT = {"dim", "size", "numel", "nelement", "ndimension", "element_size", "is_floating_point", "is_complex", "stride",
          "get_device", "__len__", "__hash__", "is_inference", "is_contiguous", "is_same_size", "storage_offset",
          "__repr__", "__reduce_ex__", "__deepcopy__"}  # fmt: skip
_WRITING = {"__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__imod__",
            "__ifloordiv__", "__idiv__"}  # fmt: skip


# Operations with a structured form: each may decline -----------------------------------------------------------


def _getitem(jac: JacTensor, index: Any) -> Any:
    """Samples, and outputs where they have one axis, are picked before anything is built."""
    if not isinstance(jac, JacTensor):
        return NotImplemented
    given = index if isinstance(index, tuple) else (index,)
    # numpy's integers are integers, too
    items = tuple(int(item) if isinstance(item, Integral) and not isinstance(item, bool) else item for item in given)
    if not items:
        return NotImplemented
    first, rest = items[0], items[1:]
    several = isinstance(first, Tensor) and first.dim() == 1 and first.dtype in (torch.int64, torch.int32)
    if isinstance(first, bool) or not (several or isinstance(first, (int, slice))):
        return NotImplemented
    if any(isinstance(item, bool) or not isinstance(item, (int, slice)) for item in rest):
        return NotImplemented
    factor = jac.intact
    if isinstance(first, int):
        if not -factor.N <= first < factor.N:
            raise IndexError(f"index {first} is out of bounds for {factor.N} samples")
        return jac._like(factor.samples(slice(first % factor.N, first % factor.N + 1))).to_dense()[(0, *rest)]
    picked = jac._like(factor.samples(_positive(first, factor.N)))
    if not rest:
        return picked
    if len(jac.out) == 1 and isinstance(rest[0], slice):
        picked = picked._like(picked.factor.columns(_positive(rest[0], factor.V)))
        picked = picked._like(picked.factor, torch.Size([picked.factor.V]))
        return picked if len(rest) == 1 else picked.to_dense()[(slice(None), slice(None), *rest[1:])]
    if len(jac.out) == 1 and isinstance(rest[0], int) and -factor.V <= rest[0] < factor.V:
        c = rest[0] % factor.V
        one = picked._like(picked.factor.columns(slice(c, c + 1)), torch.Size([]))
        return one if len(rest) == 1 else one.to_dense()[(slice(None), *rest[1:])]
    return picked.to_dense()[(slice(None), *rest)]


def _positive(index: Any, size: int) -> Any:
    """As a slice with a positive step, or as numbers."""
    if isinstance(index, slice):
        start, stop, step = index.indices(size)
        if step < 0:
            raise ValueError("step must be greater than zero")
        return slice(start, max(start, stop), step)
    if bool(((index < -size) | (index >= size)).any()):
        raise IndexError(f"an index out of bounds for {size} samples: {index.tolist()}")
    return index % size


def _einsum(equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return NotImplemented
    left, result = equation.replace(" ", "").split("->")
    labels = left.split(",")
    if len(labels) != 2 or any(len(set(term)) != len(term) for term in (*labels, result)):
        return NotImplemented
    pairs = list(zip(labels, operands, strict=True))
    if any(len(term) != t.dim() for term, t in pairs):
        return NotImplemented
    sizes = {c: n for term, t in pairs for c, n in zip(term, t.shape, strict=True)}
    if any(sizes[c] != n for term, t in pairs for c, n in zip(term, t.shape, strict=True)):
        return NotImplemented  # broadcast, or an error, as torch has it
    if not isinstance(operands[0], JacTensor):
        pairs.reverse()
    (mine, jac), (its, other) = pairs
    rows, params = mine[: 1 + len(jac.out)], mine[1 + len(jac.out) :]
    if isinstance(other, JacTensor):
        return _both(jac, rows, params, other, its, result)
    batch = "".join(c for c in its if c not in mine)
    if set(its) == set(batch + params) and result in (batch + rows,) and its == batch + params and len(batch) <= 1:
        return jac.times(other)
    if set(its) == set(batch + rows) and result == batch + params and its == batch + rows and len(batch) <= 1:
        return jac.back(other)
    return NotImplemented


def _both(jac: JacTensor, rows: str, params: str, other: JacTensor, its: str, result: str) -> Any:
    head = its[: 1 + len(other.out)]
    if its[len(head) :] == params and not set(head) & set(rows) and result == rows + head:
        return jac.gram(other)
    if other is jac and its == rows + params and result in (rows, params):
        return jac.norms().square() if result == rows else jac.sq_sum()
    return NotImplemented


def _tensordot(a: Any, b: Any, dims: Any = 2, out: Any = None) -> Any:
    if out is not None or not isinstance(dims, int):
        return NotImplemented
    if isinstance(a, JacTensor) and not isinstance(b, JacTensor):
        return a.times(b) if dims == b.dim() and b.shape == a.factor.param else NotImplemented
    if isinstance(b, JacTensor) and not isinstance(a, JacTensor):
        return b.back(a) if dims == a.dim() and a.shape == b.shape[:dims] == (len(b), *b.out) else NotImplemented
    return NotImplemented


def _matmul(a: Any, b: Any, **out: Any) -> Any:
    if out or not isinstance(a, JacTensor) or isinstance(b, JacTensor) or len(a.factor.param) != 1:
        return NotImplemented
    if b.dim() not in (1, 2) or b.shape[0] != a.shape[-1]:
        return NotImplemented
    return a.times(b) if b.dim() == 1 else a.times(b.T).movedim(0, -1)


def _to(jac: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(jac, JacTensor):
        return NotImplemented
    like = torch.empty(0, dtype=jac.dtype, device=jac.device).to(*args, **kwargs)
    if torch.promote_types(jac.dtype, like.dtype) != like.dtype or like.is_complex():
        return jac.to_dense().to(like)  # a narrower type may hold the product, and not the factors
    moved = _moved(jac.intact, like)
    return JacTensor(moved, jac.out, like.dtype)


def _moved(factor: Factor, like: Tensor) -> Factor:
    if isinstance(factor, Sum):
        parts = [_moved(part, like) for part in factor.parts]
        return Sum(tuple(part for part in parts if not isinstance(part, Sum)))
    moved = factor.map(lambda t: t.to(like))
    if isinstance(moved, Lookup):
        moved = Lookup(moved.g, moved.row.to(like.device), moved.sample.to(like.device), moved.N, moved.param)
    return moved


def _as(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda jac, *args, **kwargs: _to(jac, dtype)


_STRUCTURED: dict[str, Callable[..., Any]] = {
    "__getitem__": _getitem,
    "einsum": _einsum,
    "tensordot": _tensordot,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "to": _to,
    "cpu": lambda jac: _to(jac, "cpu"),
    "cuda": lambda jac, *args, **kwargs: _to(jac, "cuda" if not args else args[0]),
    "double": _as(torch.float64),
    "float": _as(torch.float32),
    "half": _as(torch.float16),
    "bfloat16": _as(torch.bfloat16),
    "detach": lambda jac: jac._like(jac.intact.map(Tensor.detach)),
    "clone": lambda jac, **kwargs: jac._like(jac.intact.map(torch.clone)),
    "to_dense": lambda jac, *args, **kwargs: jac.to_dense(),
}


def zero(param: Tensor, N: int, out: torch.Size) -> JacTensor:
    """The Jacobian in a parameter that the output does not depend on; takes no memory."""
    t = torch.zeros((), dtype=param.dtype, device=param.device)
    return JacTensor(Dense(t.expand(out.numel(), N, *param.shape)), out, param.dtype)
