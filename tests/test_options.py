"""Options of layers that are easily forgotten, each held to loops by `check_rule`: all samples and one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Fn
from torch import Tensor, nn

from hookjac import HookjacError, extend
from hookjac.testing import check_rule

N = 3
Row = tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]
IDS = torch.tensor([[0, 1, 1], [2, 3, 0], [1, 1, 4]])


def data(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(N, *shape),)


def ids() -> tuple[Tensor, ...]:
    return (IDS,)


def spatial(d: int, layer: Callable[[], nn.Module], size: int = 3, call: Any = None) -> Row:
    """A layer on pictures of d dimensions, above a convolution."""

    def way(m: Any, x: Tensor) -> Tensor:
        h = m.below(x).sin()
        return (call(m, h) if call else m.l(h)).flatten(2).sum(2)  # type: ignore[no-any-return]

    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
    return lambda: Fn(way, below=kind(1, 2, 1), l=layer()), data(1, *(size,) * d)  # type: ignore[operator]


CONVS = {
    **{f"Conv{d}d, {mode}, groups, stride": spatial(d, lambda k=kind, m=mode, s=size: k(  # type: ignore[misc]
        2, 2, s, padding=1, padding_mode=m, groups=2, stride=2))
       for d, kind, size in ((1, nn.Conv1d, 3), (2, nn.Conv2d, 3), (3, nn.Conv3d, 2))
       for mode in ("reflect", "replicate", "circular")},
    "Conv3d, same, dilation": spatial(3, lambda: nn.Conv3d(2, 2, 2, padding="same", dilation=2)),
    "ConvTranspose2d, output_padding, groups, dilation": spatial(2, lambda: nn.ConvTranspose2d(
        2, 2, 2, stride=2, output_padding=1, dilation=2, groups=2), 2),
    "ConvTranspose3d, output_padding, groups, dilation": spatial(3, lambda: nn.ConvTranspose3d(
        2, 2, 2, stride=2, output_padding=1, dilation=2, groups=2), 2),
    "ConvTranspose2d, output_size": spatial(2, lambda: nn.ConvTranspose2d(2, 2, 3, stride=2), 2,
                                            lambda m, h: m.l(h, output_size=[6, 6])),
}  # fmt: skip
POOLS = {
    "MaxPool, ceil_mode": spatial(2, lambda: nn.MaxPool2d(2, ceil_mode=True), 5),
    "AvgPool, ceil_mode, padding": spatial(2, lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=True), 5),
    "AvgPool3d, divisor": spatial(3, lambda: nn.AvgPool3d(2, ceil_mode=True, divisor_override=3)),
    "LPPool, norm 1": spatial(2, lambda: nn.LPPool2d(1, 2, ceil_mode=True), 5, lambda m, h: m.l(h.abs() + 0.1)),
    "LPPool, norm 3, stride": spatial(2, lambda: nn.LPPool2d(3, 3, stride=1), 5, lambda m, h: m.l(h.abs() + 0.1)),
    "AdaptiveAvgPool, (3, None)": spatial(2, lambda: nn.AdaptiveAvgPool2d((3, None)), 5),
    "AdaptiveMaxPool, (2, 3)": spatial(2, lambda: nn.AdaptiveMaxPool2d((2, 3)), 5),
    "FractionalMaxPool, ratio": spatial(2, lambda: nn.FractionalMaxPool2d(2, output_ratio=0.5), 5),
}
NORMS = {
    "RMSNorm without weight": (lambda: Fn(lambda m, x: m.l(m.b(x).sin()), b=nn.Linear(4, 3),
                                          l=nn.RMSNorm(3, elementwise_affine=False)), data(4)),
    "InstanceNorm, running statistics": spatial(1, lambda: nn.InstanceNorm1d(2, track_running_stats=True).eval()),
    "InstanceNorm, tracking in training": spatial(
        1, lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True), 3, lambda m, h: m.l(h).pow(3)),
}  # fmt: skip


def table(**options: Any) -> Row:
    return lambda: Fn(lambda m, i: m.l(i).sin().sum(1), l=nn.Embedding(5, 2, **options)), ids


TABLES = {
    "max_norm and padding": table(max_norm=0.5, padding_idx=1),
    "scaled by frequency": table(scale_grad_by_freq=True),
    "sparse": table(sparse=True),
    "a table that is the head": (
        lambda: Fn(lambda m, i: m.l(i).sum(1).tanh() @ m.l.weight.T, l=nn.Embedding(5, 2)), ids),
}  # fmt: skip


def recurrent(kind: Any, way: Any, **options: Any) -> Row:
    def state(m: Any, x: Tensor) -> Any:
        h = m.h(x[:, 0]).tanh().reshape(-1, 4, 2).transpose(0, 1).contiguous()
        return (h[..., : options.get("proj_size", 2)].contiguous(), h) if kind is nn.LSTM else h

    def start(m: Any, x: Tensor) -> Any:
        h = m.w.expand(1, len(x), 2).contiguous()
        return (h, h) if kind is nn.LSTM else h

    forward = {
        "state": lambda m, x: m.l(m.b(x), state(m, x))[0][:, -1],
        "start": lambda m, x: m.l(x, start(m, x))[0][:, -1],
        "last": lambda m, x: (lambda h: h[0] + h[1] if isinstance(h, tuple) else h)(m.l(x)[1])[0],
    }[way]
    parts = {"state": lambda: {"b": nn.Linear(2, 2), "h": nn.Linear(2, 8)}, "last": dict,
             "start": lambda: {"w": nn.Parameter(torch.randn(1, 1, 2))}}[way]  # fmt: skip
    return lambda: Fn(forward, l=kind(2, 2, batch_first=True, **options), **parts()), lambda: (torch.randn(2, 2, 2),)


def packed(m: Any, x: Tensor, last: bool) -> Tensor:
    pack = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2])[: len(x)], batch_first=True)
    out, state = m.l(pack)
    return state[0] if last else nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0].sum(1)


RECURRENT = {
    **{f"{kind.__name__}, two layers, both ways, given state, dropout": recurrent(
        kind, "state", num_layers=2, bidirectional=True, dropout=0.3) for kind in (nn.RNN, nn.GRU)},
    "LSTM, two layers, both ways, given state, projected": recurrent(nn.LSTM, "state", num_layers=2, bidirectional=True,
                                                                     proj_size=1),
    **{f"{kind.__name__}, learned start": recurrent(kind, "start") for kind in (nn.RNN, nn.LSTM, nn.GRU)},
    **{f"{kind.__name__}, last state": recurrent(kind, "last") for kind in (nn.RNN, nn.LSTM, nn.GRU)},
    "LSTM, packed, projected": (lambda: Fn(lambda m, x: packed(m, x, False), l=nn.LSTM(2, 2, bidirectional=True,
                                           proj_size=1)), lambda: (torch.randn(2, 3, 2),)),
    "GRU, packed, last state": (lambda: Fn(lambda m, x: packed(m, x, True), l=nn.GRU(2, 2)),
                                lambda: (torch.randn(2, 3, 2),)),
    "LSTMCell without bias": (lambda: Fn(lambda m, x: m.l(x, (m.b(x).tanh(), x))[0], b=nn.Linear(2, 2),
                                         l=nn.LSTMCell(2, 2, bias=False)), data(2)),
    "GRUCell without bias": (lambda: Fn(lambda m, x: m.l(x, m.b(x).tanh()), b=nn.Linear(2, 2),
                                        l=nn.GRUCell(2, 2, bias=False)), data(2)),
}  # fmt: skip


def heads(m: Any, x: Tensor) -> Any:
    return m.l(x).reshape(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)


def attention(learned: bool = False, **options: Any) -> Row:
    def way(m: Any, x: Tensor) -> Tensor:
        more = {"attn_mask": m.w} if learned else options
        return F.scaled_dot_product_attention(*heads(m, x), **more).sum(2).flatten(1)

    return lambda: Fn(way, l=nn.Linear(4, 12), w=nn.Parameter(torch.randn(3, 3))), lambda: (torch.randn(2, 3, 4),)


def grouped(m: Any, x: Tensor) -> Tensor:
    kv = m.l(x).unsqueeze(1)
    q = m.q(x).unflatten(2, (2, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, kv, kv, enable_gqa=True).sum(2).flatten(1)


def multihead(way: Any, **options: Any) -> Row:
    return (lambda: Fn(way, l=nn.MultiheadAttention(4, 2, batch_first=True, **options)),
            lambda: (torch.randn(2, 3, 4),))  # fmt: skip


CAUSAL = torch.triu(torch.ones(3, 3), 1).bool()
ATTENTION = {
    "plain": attention(),
    "causal": attention(is_causal=True),
    "dropout": attention(dropout_p=0.4),
    "causal, dropout, scale": attention(is_causal=True, dropout_p=0.3, scale=0.7),
    "a mask": attention(attn_mask=~CAUSAL),
    "a mask of numbers": attention(attn_mask=torch.randn(3, 3, dtype=torch.float64)),
    "a learned mask": attention(learned=True),
    "grouped queries": (lambda: Fn(grouped, q=nn.Linear(4, 4), l=nn.Linear(4, 2)), lambda: (torch.randn(2, 3, 4),)),
    "multihead, dropout": multihead(lambda m, x: m.l(x, x, x)[0].sum(1), dropout=0.3),
    "multihead, causal": multihead(lambda m, x: m.l(x, x, x, need_weights=False, is_causal=True,
                                                    attn_mask=CAUSAL)[0].sum(1)),
    "multihead, weights of each head": multihead(lambda m, x: m.l(x, x, x, average_attn_weights=False)[1].sum(2)
                                                 .flatten(1)),
}  # fmt: skip
ALL: dict[str, Row] = {**CONVS, **POOLS, **NORMS, **TABLES, **RECURRENT, **ATTENTION}


@pytest.mark.parametrize("name", ALL)
def test_option(name: str) -> None:
    build, inputs = ALL[name]
    assert check_rule(build(), *inputs()).fine


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode: str) -> None:
    """PyTorch has no second derivative of a bag."""
    last = Fn(lambda m, x: m.l(IDS.reshape(-1), torch.tensor([0, 2, 2, 9] if len(x) == N else [0, 9])).sin() * x,
              l=nn.EmbeddingBag(5, 2, mode=mode, include_last_offset=True))  # fmt: skip
    assert check_rule(last, torch.randn(N, 2), hessian=False).fine
    small = Fn(lambda m, i: m.l(i).sin(), l=nn.EmbeddingBag(5, 2, mode=mode, max_norm=0.5))
    assert check_rule(small, IDS, hessian=False).fine
    if mode == "sum":
        weighted = Fn(lambda m, i: m.l(i, per_sample_weights=m.w.expand(len(i), 3)).sin(),
                      w=nn.Parameter(torch.randn(3)), l=nn.EmbeddingBag(5, 2, mode=mode))  # fmt: skip
        assert check_rule(weighted, IDS, hessian=False).fine
    if mode != "max":
        scaled = Fn(lambda m, i: m.l(i).sin(), l=nn.EmbeddingBag(5, 2, mode=mode, scale_grad_by_freq=True))
        assert check_rule(scaled, IDS, hessian=False).fine


@pytest.mark.parametrize(
    "way", [lambda m, x: F.linear(x, m.w), lambda m, x: x @ m.w.T, lambda m, x: x @ m.v.view(4, 3)]
)
@pytest.mark.parametrize("n", [1, 2])
def test_one_sample_takes_the_same_roads(n: int, way: Any) -> None:
    model = Fn(lambda m, x: way(m, x.sin()).sin(), w=nn.Parameter(torch.randn(3, 4)), v=nn.Parameter(torch.randn(12)))
    with extend(model, "grad_sample", "hess_diag") as ext:
        model(torch.randn(n, 4)).square().sum().backward()
    used = [row for row in ext.explain().rows if row.road != "zero"]
    assert [(row.road, row.hessian) for row in used] == [("rule", "columns")]


@pytest.mark.parametrize("groups", [1, 2])
def test_an_unbatched_picture_is_refused(groups: int) -> None:
    model = nn.Conv1d(2, 2, 2, groups=groups)
    with pytest.raises(HookjacError, match="unbatched"), extend(model, "grad_sample"):
        model(torch.randn(2, 5)).sin().sum().backward()
