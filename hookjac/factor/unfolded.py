"""What a convolution multiplies its weight with: patches of its input, unfolded only when somebody looks at them.

N samples · B groups · C channels · L positions · k kernel · o output channels of a group
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hookjac.memory import fresh

_BLOCK = 16  # channels that oneDNN's convolutions take at once with AVX-512
_CACHED = 1 << 20  # entries of the columns that one call takes, and half of what it makes


@dataclass(eq=False)
class Unfolded:
    """x as what each position of a kernel's slide sees, [N, B, L, C/B k]. sizes: of the output, whose product is L."""

    x: Tensor  # [N, C, *space]
    groups: int
    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    _patches: Tensor | None = field(init=False, default=None)

    @property
    def features(self) -> int:
        """C/B k: of one patch."""
        return self.x.shape[1] // self.groups * torch.Size(self.kernel).numel()

    @property
    def patches(self) -> Tensor:
        if self._patches is None:
            self._patches = patches(
                self.x, self.groups, self.sizes, self.kernel, self.stride, self.padding, self.dilation
            )
        return self._patches

    def map(self, f: Callable[[Tensor], Tensor]) -> Unfolded:
        return replace(self, x=f(self.x))

    def samples(self, index: Tensor | slice) -> Unfolded:
        return replace(self, x=self.x[index])

    def products(self, g: Tensor) -> Tensor | None:  # [V, N, B, L, o] -> [N, V, B, o, C/B k]
        """Products with all patches, by PyTorch's own convolution: each sample's input is a group of channels of one
        image. Where oneDNN has kernels for that it takes half the time of unfolding, and no memory; None where
        it would be slower."""
        V, N, B, L, o = g.shape
        C, x = self.x.shape[1] // B, self.x
        if V == 0 or C % _BLOCK or o % _BLOCK or len(self.kernel) != 2 or (B > 1 and V > 1) or not _able(x, g):
            return None
        step = max(1, _CACHED // max(1, V * B * o * L, V * B * o * self.features // 2))
        image, out = x.reshape(1, N * B * C, *x.shape[2:]), None
        if step < N:
            out = fresh((N, V, B, o, self.features), g)
        for start in range(0, N, step):
            some = g[:, start : start + step].permute(1, 2, 0, 4, 3)  # [n, B, V, o, L]
            n = len(some)
            every = torch.ops.aten.convolution_backward(
                some.reshape(1, n * B * V * o, *self.sizes),
                image[:, start * B * C : (start + n) * B * C],
                g.new_empty(n * B * V * o, C, *self.kernel),
                None,
                self.stride,
                self.padding,
                self.dilation,
                False,
                [0] * len(self.kernel),
                n * B,
                [False, True, False],
            )[1]  # fmt: skip; of the weight, only the shape matters
            every = every.view(n, B, V, o, self.features).transpose(1, 2)
            if out is None:
                return every
            out[start : start + n].copy_(every)
        return out


def _able(x: Tensor, g: Tensor) -> bool:
    graph = torch.is_grad_enabled() and (x.requires_grad or g.requires_grad)
    plain = x.dtype == g.dtype == torch.float32 and x.device.type == "cpu"
    return plain and not graph and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def patches(
    t: Tensor,
    groups: int,
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """What each position of a kernel's slide sees: [M, C, *space] -> [M, B, L, C/B k], L = prod(sizes)."""
    n = len(kernel)
    t = torch.nn.functional.pad(t, [p for size in reversed(padding) for p in (size, size)])
    steps = t.stride()[2:]
    slides = [s * d for s, d in zip(steps, stride, strict=True)]
    reaches = [s * d for s, d in zip(steps, dilation, strict=True)]
    M, C = t.shape[:2]
    split = (M, groups, C // groups, *sizes, *kernel)
    view = t.as_strided(split, (t.stride(0), t.stride(1) * (C // groups), t.stride(1), *slides, *reaches))
    order = (0, 1, 2, *range(3 + n, 3 + 2 * n), *range(3, 3 + n))  # positions last: they are next to each other
    return view.permute(order).flatten(2, 2 + n).flatten(3).transpose(2, 3)
