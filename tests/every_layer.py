"""A model for every module of torch.nn: what `test_every_layer.py` holds to loops, and the layer table is made of.

Losses, containers and what is refused have no model here; they are named with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cases import ACTIVATIONS, D, Fn, N
from torch import Tensor, nn

Inputs = Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class Row:
    """One way to use a module. way(m, *inputs) calls `m.layer`, made by `layer()`, between layers of other kinds."""

    layer: Callable[[], nn.Module]
    way: Callable[..., Tensor]
    inputs: Inputs
    parts: Callable[[], dict[str, nn.Module]] = dict
    note: str = ""
    hessian: bool = True  # False: PyTorch has no second derivative of it to compare with

    def build(self) -> nn.Module:
        return Fn(self.way, layer=self.layer(), **self.parts())


def each(make: Callable[[Any], Row], *options: Any) -> list[Row]:
    return [make(o) for o in options]


def flat(shape: tuple[int, ...], *layers: Callable[[], nn.Module], hessian: bool = True) -> list[Row]:
    """Above a convolution of kernel one (or a linear layer), so that the layer's input needs a gradient."""

    def below() -> dict[str, nn.Module]:
        kinds = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        kind = kinds[len(shape) - 1]
        return {"below": kind(D, shape[0]) if kind is nn.Linear else kind(1, shape[0], 1)}  # type: ignore[operator]

    outer = (D,) if len(shape) == 1 else (1, *shape[1:])

    def way(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.layer(m.below(x).sin())
        return (out * 1.5).sin().flatten(1)

    return [Row(layer, way, lambda: (torch.randn(N, *outer),), below, hessian=hessian) for layer in layers]


def sequences(*shape: int) -> Inputs:
    return lambda: (torch.randn(N, *shape),)


def looked_up() -> tuple[Any, ...]:
    return (torch.tensor([[0, 1, 1], [2, 3, 0], [1, 1, 1], [4, 4, 2]]),)


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def recurrent(kind: type[nn.Module], *options: dict[str, Any]) -> list[Row]:
    def way(m: Any, x: Tensor) -> Tensor:
        swap = not getattr(m.layer, "batch_first", False)
        x = m.below(x)
        out = first(m.layer(x.transpose(0, 1) if swap else x))
        return (out[-1] if swap else out[:, -1]).sin()

    def packed(m: Any, x: Tensor) -> Tensor:
        lengths = torch.tensor([3, 1, 2, 3])
        pack = nn.utils.rnn.pack_padded_sequence(m.below(x), lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(first(m.layer(pack)), batch_first=True)[0].sum(1)

    def started(m: Any, x: Tensor) -> Tensor:
        h = m.start(x[:, 0]).tanh()[None].contiguous()
        return first(m.layer(m.below(x), (h, h * 0.5) if isinstance(m.layer, nn.LSTM) else h))[:, -1]

    def below() -> dict[str, nn.Module]:
        return {"below": nn.Linear(2, 2)}

    rows = [Row(lambda o=o: kind(2, 2, **o), way, sequences(3, 2), below, str(o)) for o in options]
    rows.append(Row(lambda: kind(2, 2, batch_first=True), packed, sequences(3, 2), below, "packed"))
    rows.append(
        Row(lambda: kind(2, 2, batch_first=True), started, sequences(2, 2),
            lambda: {"below": nn.Linear(2, 2), "start": nn.Linear(2, 2)}, "initial state")
    )  # fmt: skip
    return rows


def cell(kind: type[nn.Module], **options: Any) -> Row:
    def way(m: Any, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = m.layer(x[:, t], state)
        return first(state).sin()

    return Row(lambda: kind(2, 2, **options), way, sequences(2, 2), note=str(options))


def attention(note: str, call: Callable[[Any, Tensor], Tensor], **options: Any) -> Row:
    return Row(lambda: nn.MultiheadAttention(4, 2, **options), lambda m, x: call(m, m.below(x)).sin(), sequences(2, 4),
               lambda: {"below": nn.Linear(4, 4)}, note)  # fmt: skip


def transformer(kind: type[nn.Module], note: str, call: Callable[[Any, Tensor], Tensor], **options: Any) -> Row:
    options = {"dropout": 0.0, "batch_first": True} | options
    return Row(lambda: kind(2, 1, dim_feedforward=2, **options), lambda m, x: call(m, x).sin().sum(1), sequences(2, 2),
               note=note)  # fmt: skip


def _mask(T: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(T).double()


def pooled(kind: str, *options: dict[str, Any], size: int = 6, hessian: bool = True) -> Iterator[tuple[str, list[Row]]]:
    """The same pooling in one, two and three dimensions."""
    for d in (1, 2, 3):
        layer = getattr(nn, f"{kind}{d}d", None)
        if layer is not None:
            rows = flat((1, *(size - d,) * d), *[lambda layer=layer, o=o: layer(**o) for o in options], hessian=hessian)
            yield f"{kind}{d}d", rows


class Unpool(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.pool = getattr(nn, f"MaxPool{d}d")(2, return_indices=True)
        self.unpool = getattr(nn, f"MaxUnpool{d}d")(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x))  # type: ignore[no-any-return]


LAYERS: dict[str, list[Row]] = {
    "Linear": [*flat((4,), lambda: nn.Linear(4, 3), lambda: nn.Linear(4, 3, bias=False)),
               Row(lambda: nn.Linear(2, 3), lambda m, x: m.layer(x).tanh(), sequences(2, 2, 2), note="leading axes")],
    "LazyLinear": [Row(lambda: nn.LazyLinear(3), lambda m, x: m.layer(m.below(x)).tanh(), sequences(D),
                       lambda: {"below": nn.Linear(D, 2)})],
    "Identity": flat((3,), nn.Identity),
    "Bilinear": each(lambda b: Row(lambda: nn.Bilinear(2, 3, 2, bias=b),
                                   lambda m, x: m.layer(m.one(x), m.two(x).tanh()), sequences(D),
                                   lambda: {"one": nn.Linear(D, 2), "two": nn.Linear(D, 3)}), True, False),
    "Embedding": each(lambda o: Row(lambda: nn.Embedding(5, 2, **o), lambda m, i: m.layer(i).sin().sum(1), looked_up,
                                    note=str(o)), {}, {"padding_idx": 1}, {"max_norm": 0.5}),
    "EmbeddingBag": each(lambda mode: Row(lambda: nn.EmbeddingBag(5, 2, mode=mode), lambda m, i: m.layer(i).sin(),
                                          looked_up, note=mode, hessian=False), "sum", "mean", "max"),
    "PReLU": [*flat((3,), nn.PReLU, lambda: nn.PReLU(3)), *flat((2, 3), lambda: nn.PReLU(2))],
    "GLU": flat((4,), nn.GLU), "Softmax": flat((4,), lambda: nn.Softmax(1)),
    "Softmin": flat((4,), lambda: nn.Softmin(1)), "LogSoftmax": flat((4,), lambda: nn.LogSoftmax(1)),
    "Softmax2d": flat((2, 2, 2), nn.Softmax2d),
    "Flatten": flat((2, 3), nn.Flatten, lambda: nn.Flatten(1, -1)),
    "Unflatten": flat((4,), lambda: nn.Unflatten(1, (2, 2))),
    "LayerNorm": [*flat((3,), lambda: nn.LayerNorm(3), lambda: nn.LayerNorm(3, elementwise_affine=False)),
                  *flat((2, 3), lambda: nn.LayerNorm((2, 3)), lambda: nn.LayerNorm(3, bias=False))],
    "RMSNorm": [*flat((3,), lambda: nn.RMSNorm(3)), *flat((2, 3), lambda: nn.RMSNorm((2, 3), eps=0.1))],
    "GroupNorm": flat((4, 2), lambda: nn.GroupNorm(2, 4), lambda: nn.GroupNorm(1, 4, affine=False)),
    "LocalResponseNorm": flat((3, 2), lambda: nn.LocalResponseNorm(2, alpha=0.5)),
    "RNN": recurrent(nn.RNN, {}, {"num_layers": 2, "batch_first": True}, {"bidirectional": True,
        "nonlinearity": "relu"}),
    "LSTM": recurrent(nn.LSTM, {"batch_first": True}, {"num_layers": 2, "bias": False},
                      {"bidirectional": True, "proj_size": 1}),
    "GRU": recurrent(nn.GRU, {}, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "RNNCell": [cell(nn.RNNCell), cell(nn.RNNCell, nonlinearity="relu", bias=False)],
    "LSTMCell": [cell(nn.LSTMCell)], "GRUCell": [cell(nn.GRUCell)],
    "MultiheadAttention": [
        attention("weights", lambda m, x: m.layer(x, x, x)[0], batch_first=True),
        attention("time first, no bias", lambda m, x: m.layer(*[x.transpose(0, 1)] * 3, need_weights=False)[0].mean(0),
                  bias=False),
        attention("causal mask", lambda m, x: m.layer(x, x, x, attn_mask=_mask(2))[0], batch_first=True),
        attention("padding mask", lambda m, x: m.layer(x, x, x, key_padding_mask=torch.tensor([[False, True]]).expand(
            N, -1), need_weights=False)[0], batch_first=True),
        attention("cross, other sizes", lambda m, x: m.layer(x, x[..., :3], x[..., :2])[0], kdim=3, vdim=2,
                  batch_first=True),
        attention("learned key", lambda m, x: m.layer(x, x, x)[0], add_bias_kv=True, add_zero_attn=True,
                  batch_first=True),
    ],
    "TransformerEncoderLayer": [
        transformer(nn.TransformerEncoderLayer, "post norm", lambda m, x: m.layer(x)),
        transformer(nn.TransformerEncoderLayer, "pre norm, gelu", lambda m, x: m.layer(x, src_mask=_mask(2)),
                    norm_first=True, activation="gelu"),
        transformer(nn.TransformerEncoderLayer, "dropout", lambda m, x: m.layer(x), dropout=0.3),
    ],
    "TransformerDecoderLayer": [transformer(nn.TransformerDecoderLayer, "cross", lambda m, x: m.layer(x, x.flip(1)))],
    "TransformerEncoder": [Row(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(2, 1, 2, 0.0,
        batch_first=True), 1,
                                                             nn.LayerNorm(2)), lambda m, x: m.layer(x).sum(1),
                               sequences(2, 2))],
    "TransformerDecoder": [Row(lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(2, 1, 2, 0.0, batch_first=True),
                                                             1), lambda m, x: m.layer(x, x.flip(1)).sin().sum(1),
                               sequences(2, 2))],
    "Transformer": [Row(lambda: nn.Transformer(3, 1, 1, 1, 2, 0.0, batch_first=True),
                        lambda m, x: m.layer(x, x.flip(1)).sin().sum(1), sequences(2, 3))],
    "CosineSimilarity": [Row(lambda: nn.CosineSimilarity(dim=1), lambda m, x: m.layer(m.one(x), m.two(x)).sin(),
                             sequences(D), lambda: {"one": nn.Linear(D, 3), "two": nn.Linear(D, 3)})],
    "PairwiseDistance": [Row(lambda: nn.PairwiseDistance(), lambda m, x: m.layer(m.one(x), m.two(x)).sin(),
                             sequences(D), lambda: {"one": nn.Linear(D, 3), "two": nn.Linear(D, 3)})],
    "PixelShuffle": flat((4, 2, 2), lambda: nn.PixelShuffle(2)),
    "PixelUnshuffle": flat((1, 2, 4), lambda: nn.PixelUnshuffle(2)),
    "ChannelShuffle": flat((4, 2, 2), lambda: nn.ChannelShuffle(2)),
    "Fold": flat((4, 6), lambda: nn.Fold((3, 4), 2)), "Unfold": flat((2, 3, 3), lambda: nn.Unfold(2, padding=1)),
    "Upsample": [*flat((2, 3), lambda: nn.Upsample(scale_factor=2), lambda: nn.Upsample(5, mode="linear")),
                 *flat((1, 2, 3), lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
                       lambda: nn.Upsample(scale_factor=1.5, mode="bilinear", align_corners=True)),
                 *flat((1, 2, 2, 2), lambda: nn.Upsample(scale_factor=2, mode="trilinear"))],
    "UpsamplingBilinear2d": flat((1, 2, 2), lambda: nn.UpsamplingBilinear2d(scale_factor=2)),
    "UpsamplingNearest2d": flat((1, 2, 2), lambda: nn.UpsamplingNearest2d(scale_factor=2)),
    **{f"MaxUnpool{d}d": flat((1, *(4,) * d), lambda d=d: Unpool(d)) for d in (1, 2, 3)},  # type: ignore[misc]
    **dict(pooled("MaxPool", {"kernel_size": 2}, {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 2})),
    **dict(pooled("AvgPool", {"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True,
                                                   "count_include_pad": False})),
    **dict(pooled("LPPool", {"norm_type": 2, "kernel_size": 2}, size=6)),
    **dict(pooled("AdaptiveAvgPool", {"output_size": 2})), **dict(pooled("AdaptiveMaxPool", {"output_size": 2})),
    **dict(pooled("FractionalMaxPool", {"kernel_size": 2, "output_size": 2}, size=8, hessian=False)),
    **dict(pooled("ZeroPad", {"padding": 1})), **dict(pooled("ConstantPad", {"padding": 1, "value": 0.3})),
    **dict(pooled("CircularPad", {"padding": 1})), **dict(pooled("ReflectionPad", {"padding": 1})),
    **dict(pooled("ReplicationPad", {"padding": 1})),
}  # fmt: skip
for name, make in ACTIVATIONS.items():
    LAYERS.setdefault(name.split("-")[0], []).extend(flat((3,), make, hessian=name != "Hardsigmoid"))
LAYERS["Dropout2d"] = flat((2, 2, 2), nn.Dropout2d)
LAYERS["Dropout3d"] = flat((2, 2, 2, 2), nn.Dropout3d)
LAYERS["AvgPool2d"] += flat((1, 4, 4), lambda: nn.AvgPool2d(2, divisor_override=3))
for d in (1, 2, 3):
    space = (3,) * d
    conv, turned = getattr(nn, f"Conv{d}d"), getattr(nn, f"ConvTranspose{d}d")
    LAYERS[f"Conv{d}d"] = flat((2, *space), lambda c=conv: c(2, 2, 2), lambda c=conv: c(2, 2, 2, groups=2, bias=False))
    LAYERS[f"ConvTranspose{d}d"] = flat((2, *space), lambda c=turned: c(2, 1, 2), lambda c=turned: c(2, 2, 2, groups=2))
    lazy, lazy_turned = getattr(nn, f"LazyConv{d}d"), getattr(nn, f"LazyConvTranspose{d}d")
    LAYERS[f"LazyConv{d}d"] = flat((2, *space), lambda c=lazy: c(2, 2))
    LAYERS[f"LazyConvTranspose{d}d"] = flat((2, *space), lambda c=lazy_turned: c(2, 2))
    norm, instance = getattr(nn, f"BatchNorm{d}d"), getattr(nn, f"InstanceNorm{d}d")
    lazy_norm, lazy_instance = getattr(nn, f"LazyBatchNorm{d}d"), getattr(nn, f"LazyInstanceNorm{d}d")
    LAYERS[f"BatchNorm{d}d"] = flat((2, *space), lambda n=norm: n(2).eval(), lambda n=norm: n(2, affine=False).eval())
    LAYERS[f"LazyBatchNorm{d}d"] = flat((2, *space), lambda n=lazy_norm: n().eval())
    LAYERS[f"InstanceNorm{d}d"] = flat((2, *space), lambda n=instance: n(2), lambda n=instance: n(2, affine=True),
                                       lambda n=instance: n(2, affine=True,
                                           track_running_stats=True).eval())  # fmt: skip
    LAYERS[f"LazyInstanceNorm{d}d"] = flat((2, *space), lambda n=lazy_instance: n(affine=True))

CONTAINERS = ("Container", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "RNNBase",
              "RNNCellBase", "Sequential")  # fmt: skip
WITHOUT_LOOPS = {
    "CrossMapLRN2d": "its backward in PyTorch is not its forward's derivative (seen on torch 2.13), and takes no graph",
}
REFUSED = {
    "DataParallel": "runs copies of the model; results would land on the copies",
    "SyncBatchNorm": "batch statistics in training; on CPU it does not run at all",
}
LOSSES = (
    "AdaptiveLogSoftmaxWithLoss", "BCELoss", "BCEWithLogitsLoss", "CTCLoss", "CosineEmbeddingLoss", "CrossEntropyLoss",
    "GaussianNLLLoss", "HingeEmbeddingLoss", "HuberLoss", "KLDivLoss", "L1Loss", "LinearCrossEntropyLoss", "MSELoss",
    "MarginRankingLoss", "MultiLabelMarginLoss", "MultiLabelSoftMarginLoss", "MultiMarginLoss", "NLLLoss", "NLLLoss2d",
    "PoissonNLLLoss", "SmoothL1Loss", "SoftMarginLoss", "TripletMarginLoss", "TripletMarginWithDistanceLoss",
)  # fmt: skip
