"""Where the samples lie below the steps between layers: arithmetic, reshaping, reductions, pooling, attention.

A row for each kind of node whose answer does not depend on values. What is not here (a gather along unknown axes, an
in-place write to a slice) is probed.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hookjac.graph import Node, signed
from hookjac.places import Placed, Shapes, dims_of, kept, leading, place, reduced, same, view
from hookjac.samples import Layout
from hookjac.talkers import NODES


def _names(*short: str) -> list[str]:
    return [f"{name}Backward0" for name in short]


# Entry by entry ---------------------------------------------------------------------------------------------------

_POINTWISE = [
    "Abs",
    "Acos",
    "Add",
    "Addcdiv",
    "Addcmul",
    "Alias",
    "Asin",
    "Atan",
    "Atan2",
    "Celu",
    "Clamp",
    "ClampMax",
    "ClampMin",
    "Clone",
    "Cos",
    "Cosh",
    "Div",
    "Elu",
    "Erf",
    "Erfc",
    "Exp",
    "Exp2",
    "Expand",
    "Expm1",
    "Gelu",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "Hypot",
    "LeakyRelu",
    "Lerp",
    "Log",
    "Log10",
    "Log1P",
    "Log2",
    "LogSigmoid",
    "MaskedFill",
    "Maximum",
    "Minimum",
    "Mish",
    "Mul",
    "NanToNum",
    "NativeDropout",
    "Neg",
    "Pow",
    "PreluKernel",
    "Reciprocal",
    "Relu",
    "RreluWithNoise",
    "Rsqrt",
    "Sigmoid",
    "Sign",
    "Silu",
    "Sin",
    "Sinc",
    "Sinh",
    "Softplus",
    "Softshrink",
    "Sqrt",
    "Sub",
    "Tan",
    "Tanh",
    "Threshold",
    "ToCopy",
    "Where",
    "Xlogy",
]
_WITH_A_NUMBER = ("Add", "Sub", "Mul", "Div", "Pow", "Clamp", "Lerp", "Elu")  # overloads
place(*_names(*_POINTWISE), *(f"{name}Backward1" for name in _WITH_A_NUMBER), "PowBackward2", into=same)

# Losses that were not reduced yet
place(*_names("MseLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "HuberLoss", "SmoothL1Loss"), into=same)
place(*_names("NllLoss", "NllLoss2D"), into=lambda node, la, out, s: [la] if la.axis == 0 else None)

# The same entries in the same order, and other orders -------------------------------------------------------------

place(
    *_names("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze"),
    "SqueezeBackward1",
    "SqueezeBackward2",
    into=view,
)


def _permuted(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    return [replace(layout, axis=dims_of(node, "_saved_dims", len(out))[layout.axis])]


def _transposed(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    a, b = (signed(getattr(node, name)) % len(out) for name in ("_saved_dim0", "_saved_dim1"))
    return [replace(layout, axis={a: b, b: a}.get(layout.axis, layout.axis))]


place("PermuteBackward0", into=_permuted)
place("TransposeBackward0", into=_transposed)
place("TBackward0", into=lambda node, la, out, s: [replace(la, axis=1 - la.axis) if len(out) == 2 else la])


def _handed_on(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    return [layout] if len(shapes) == 1 else None


place(*NODES, into=_handed_on)

# Parts ------------------------------------------------------------------------------------------------------------


def _selected(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    """One entry of an axis, or all of them one by one: the axis is gone."""
    dim = signed(node._saved_dim) % (len(out) + 1)
    return [replace(layout, axis=layout.axis + (layout.axis >= dim))]


def _stacked(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    dim = signed(node._saved_dim) % len(out)
    if dim == layout.axis:
        return None
    return [None if s is None else replace(layout, axis=layout.axis - (layout.axis > dim)) for s in shapes]


def _padded(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    pad, k = node._saved_pad, 2 * (len(out) - 1 - layout.axis)  # in pairs, the last axis first
    return None if any(pad[k : k + 2]) else [layout]


def _indexed(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    """x[:, index]: the axes before the first index stay."""
    before = next((k for k, index in enumerate(node._saved_indices) if index is not None), 0)
    return [layout] if layout.axis < before else None


_along = kept()


def _sliced(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    whole = shapes[0] == out and signed(node._saved_step) == 1
    return [layout] if whole else _along(node, layout, out, shapes)


place(*_names("Select", "Unbind"), into=_selected)
place("SliceBackward0", into=_sliced)
place(
    *_names("Split", "SplitWithSizes", "UnsafeSplit", "UnsafeSplitWithSizes", "Cat", "Gather", "IndexSelect"),
    into=_along,
)
place("StackBackward0", into=_stacked)
place("ConstantPadNdBackward0", into=_padded)
place("IndexBackward0", into=_indexed)

# Along other axes -------------------------------------------------------------------------------------------------

place(*_names("Softmax", "SafeSoftmax", "LogSoftmax", "Cumsum", "Cumprod", "Glu", "Logcumsumexp"), into=_along)
place("FlipBackward0", "RollBackward0", into=kept("_saved_dims"))
place("SumBackward1", "MeanBackward1", "MaxBackward0", "MinBackward0", "ProdBackward1", "NormBackward1", into=reduced())
place(*_names("Amax", "Amin", "Logsumexp", "LinalgVectorNorm", "Var", "Std"), into=reduced())

# Images: what happens, happens behind samples and channels --------------------------------------------------------

place(*_names("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AvgPool2D", "AvgPool3D"), into=leading(1))
place(*_names("AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D"), into=leading(1))
place(*_names("ReflectionPad1D", "ReflectionPad2D", "ReflectionPad3D"), into=leading(1))
place(*_names("ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D"), into=leading(1))
place(*_names(*(f"UpsampleNearest{d}D" for d in (1, 2, 3)), "UpsampleBilinear2D", "UpsampleLinear1D"), into=leading(1))
place(*_names("UpsampleBicubic2D", "UpsampleTrilinear3D"), into=leading(1))


def _of_images(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    """Channels become positions, or positions channels: the samples must lie before both."""
    return [layout] if layout.axis == 0 and shapes[0] is not None and len(shapes[0]) == 4 else None


place(*_names("PixelShuffle", "PixelUnshuffle", "Im2Col"), into=_of_images)

# Attention: samples and heads are the first axes of [N, H, L, E] --------------------------------------------------

place("ScaledDotProductFlashAttentionForCpuBackward0", into=leading(2))


def _lower(node: Node, layout: Layout, out: torch.Size, shapes: Shapes) -> Placed:
    return [layout] if layout.axis < len(out) - 2 else None


place(*_names("Tril", "Triu"), into=_lower)
