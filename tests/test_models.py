"""Models that people use, small, with random weights: exact against loops, and on closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Fn, par, random_loss
from oracle import compare, expected, trainable
from torch import Tensor, nn

from hookjac import extend

ALL = ("grad_sample", "jac", "ggn_diag", "hess_diag")
N = 2


class Block(nn.Module):
    """ResNet's basic block: in-place ReLU, `+=`, a downsampling branch."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


def resnet() -> nn.Module:
    """The shape of ResNet-18, with two stages."""
    stem = [nn.Conv2d(1, 2, 3, 1, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    body = [Block(2, 2, 1), Block(2, 3, 2)]
    model = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval()


def _unet(m: Any, x: Tensor) -> Tensor:
    one = m.a(x).relu()
    two = F.silu(m.b(F.max_pool2d(one, 2)))
    return m.o(torch.cat([one, m.up(two)], 1))


def unet() -> nn.Module:
    return Fn(_unet, a=nn.Conv2d(1, 2, 3, padding=1), b=nn.Conv2d(2, 3, 3, padding=1),
              up=nn.ConvTranspose2d(3, 2, 2, 2), o=nn.Conv2d(4, 1, 1))  # fmt: skip


def character_lstm() -> nn.Module:
    return Fn(lambda m, i: m.o(m.r(m.e(i))[0]), e=nn.Embedding(5, 2), r=nn.LSTM(2, 2, batch_first=True),
              o=nn.Linear(2, 5))  # fmt: skip


def _graph(m: Any, x: Tensor, A: Tensor) -> Tensor:
    return (A @ m.b(torch.relu(A @ m.a(x)))).mean(1)


def _operator(m: Any, u: Tensor, y: Tensor) -> Tensor:  # u [N, sensors], y [N, P, 1]
    branch, trunk = m.b2(torch.tanh(m.b1(u))), m.t2(torch.tanh(m.t1(y)))
    return torch.einsum("nk,npk->np", branch, trunk) + m.bias


def _pinn(m: Any, x: Tensor) -> Tensor:
    """u, and the residual u'' + u of an equation, by derivatives in the input."""
    x = x.requires_grad_()
    u = m.c(torch.tanh(m.b(torch.tanh(m.a(x)))))
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    return torch.cat([u, ddu + u], 1)


def _experts(m: Any, x: Tensor) -> Tensor:
    weights, chosen = m.gate(x).softmax(1).topk(2, 1)
    out = torch.zeros(len(x), 2)
    for k, expert in enumerate(m.experts):
        rows, slot = (chosen == k).nonzero(as_tuple=True)
        out = out.index_add(0, rows, expert(x[rows]) * weights[rows, slot, None])
    return out


OWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "ResNet": (resnet, lambda: (torch.randn(N, 1, 8, 8),)),
    "U-Net": (unet, lambda: (torch.randn(N, 1, 4, 4),)),
    "character LSTM": (character_lstm, lambda: (torch.randint(5, (N, 3)),)),
    "graph convolution": (
        lambda: Fn(_graph, a=nn.Linear(3, 4), b=nn.Linear(4, 2)),
        lambda: (torch.randn(N, 4, 3), torch.softmax(torch.randn(N, 4, 4), 2)),
    ),
    "DeepONet": (
        lambda: Fn(_operator, b1=nn.Linear(4, 5), b2=nn.Linear(5, 3), t1=nn.Linear(1, 5), t2=nn.Linear(5, 3),
                   bias=par(1)),
        lambda: (torch.randn(N, 4), torch.randn(N, 3, 1)),
    ),
    "PINN": (lambda: Fn(_pinn, a=nn.Linear(1, 4), b=nn.Linear(4, 3), c=nn.Linear(3, 1)), lambda: (torch.randn(N, 1),)),
    "mixture of experts": (
        lambda: Fn(_experts, gate=nn.Linear(4, 3), experts=nn.ModuleList(nn.Linear(4, 2) for _ in range(3))),
        lambda: (torch.randn(4, 4),),
    ),
}  # fmt: skip


def exact(model: nn.Module, run: Callable[[], Any], output: Any = None) -> extend:
    pick = (lambda o: o) if output is None else (lambda o: o[output])
    wanted = expected(model, lambda: pick(run()), random_loss)
    with extend(model, *ALL, output=output) as ext:
        random_loss(pick(run())).backward()
    compare(model, wanted, ALL)
    return ext


def on_closed_forms(ext: extend) -> None:
    """No parameter down road 3 (columns masked by sample) or 5 (a product for each entry)."""
    assert {(row.road, row.hessian) for row in ext.explain().rows} == {("rule", "columns")}, ext.explain()


@pytest.mark.parametrize("name", OWN)
def test_own(name: str) -> None:
    build, inputs = OWN[name]
    model, args = build(), inputs()
    ext = exact(model, lambda: model(*args))
    if name in ("ResNet", "U-Net", "graph convolution", "DeepONet"):
        on_closed_forms(ext)


def gpt2(**more: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=7, n_positions=6, n_embd=4, n_layer=2, n_head=2, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0,
        bos_token_id=0, eos_token_id=0, **more,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()  # type: ignore[no-any-return]


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=7, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=6, num_labels=3,
        max_position_embeddings=6, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double()  # type: ignore[no-any-return]


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=6, image_size=4, patch_size=2,
        num_channels=1, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).double()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "ViT"])
def test_hugging_face(name: str) -> None:
    build, inputs = {
        "GPT-2": (gpt2, {"input_ids": torch.randint(7, (N, 3))}),  # tied embeddings, [1, T] position ids
        "BERT": (bert, {"input_ids": torch.randint(7, (N, 3))}),
        "ViT": (vit, {"pixel_values": torch.randn(N, 1, 4, 4)}),
    }[name]
    model = build()
    on_closed_forms(exact(model, lambda: model(**inputs), output="logits"))


def test_gpt2_with_lora() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(gpt2(), config).double()
    ids = torch.randint(7, (N, 3))
    assert all("lora" in name for name in trainable(model))
    on_closed_forms(exact(model, lambda: model(input_ids=ids), output="logits"))


class Forces(nn.Module):
    """The gradient of an energy in what it is given, as physicists train it."""

    def __init__(self, norm: nn.Module, *, channels: bool) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.channels = nn.Linear(3, 4), norm, nn.Linear(4, 1), channels

    def forward(self, x: Tensor) -> Tensor:  # [N, L, 3]
        x = x.clone().requires_grad_()
        h = self.a(x)
        h = self.norm(h.transpose(1, 2)).transpose(1, 2) if self.channels else self.norm(h)
        (force,) = torch.autograd.grad(self.b(h.tanh()).sum(), x, create_graph=True)
        return force.flatten(1)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("norm", ["LayerNorm", "GroupNorm", "Softmax"])
def test_a_gradient_that_the_model_returns(norm: str, samples: int) -> None:
    """Of a norm's backward, only the data's part was made: what was not has no shape."""
    norms = {"LayerNorm": lambda: nn.LayerNorm(4), "GroupNorm": lambda: nn.GroupNorm(2, 4)}
    model = Forces(norms.get(norm, lambda: nn.Softmax(-1))(), channels=norm == "GroupNorm")
    x, y = torch.randn(samples, 2, 3), torch.randn(samples, 6)
    asked = ("grad_sample", "jac", "ggn_diag", "hess_diag")
    with extend(model, *asked):
        (model(x) - y).square().mean().backward()
    compare(model, expected(model, lambda: model(x), lambda out: (out - y).square().mean()), asked)
