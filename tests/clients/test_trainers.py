"""Lightning and Hugging Face's Trainer, by the classes of docs/trainers.md: the numbers of a plain loop, and training
that nobody notices."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hookjac

PAGE: dict[str, Any] = {"__name__": "page"}
for snippet in re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "trainers.md").read_text(), re.S
):
    exec(snippet, PAGE)
import lightning as L  # noqa: E402

D, C, BATCH = 5, 3, 4


@pytest.fixture(autouse=True)
def single(double: None) -> None:
    """Trainers work in float32."""
    torch.set_default_dtype(torch.float32)


def noted(into: list[dict[str, Tensor]], model: nn.Module) -> None:
    """The numbers of one step."""
    found = {}
    for name, p in model.named_parameters():
        found |= {f"{name} norm": p.grad_sample_norm.clone(), f"{name} ggn": p.ggn_diag.clone()}  # type: ignore[attr-defined]
        found[f"{name} B"] = p.kfac.B.clone()  # type: ignore[attr-defined]
    into.append(found)


def equal(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(wanted) > 1
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key
            assert a[key].abs().max() > 0, key


def same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


# Lightning --------------------------------------------------------------------------------------------------


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def loader() -> DataLoader[Any]:
    torch.manual_seed(2)
    return DataLoader(TensorDataset(torch.randn(22, D), torch.randint(C, (22,))), BATCH)


def lit(tmp_path: Path, *callbacks: Any, **options: Any) -> Lit:
    module = Lit()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 2}
    options = quiet | options
    torch.manual_seed(3)
    L.Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **options).fit(module, loader())
    return module


LIT: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.1},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("name", LIT)
def test_lightning(name: str, tmp_path: Path) -> None:
    options, found = LIT[name], list[dict[str, Tensor]]()
    torch.manual_seed(4)
    kfac = hookjac.KFAC(fisher="exact")
    callback = PAGE["Extended"]("grad_sample_norm", "ggn_diag", kfac, part="net", see=lambda m: noted(found, m.net))
    module = lit(tmp_path, callback, **options)
    assert callback.block is None
    same_weights(module, lit(tmp_path, **options))

    plain, wanted = Lit(), list[dict[str, Tensor]]()
    optimizer = plain.configure_optimizers()
    share = options.get("accumulate_grad_batches", 1)
    for _ in range(2):
        for k, (x, y) in enumerate(batches := list(loader())):
            with hookjac.extend(plain.net, "grad_sample_norm", "ggn_diag", kfac):
                with torch.autocast("cpu", torch.bfloat16, enabled="precision" in options):
                    loss = F.cross_entropy(plain.net(x), y)
                (loss / share).backward()
            noted(wanted, plain.net)
            if "gradient_clip_val" in options:
                nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            if (k + 1) % share == 0 or k + 1 == len(batches):
                optimizer.step()
                optimizer.zero_grad()
    same_weights(module, plain)
    equal(found, wanted)


def test_lightning_numbers_are_those_of_loops(tmp_path: Path) -> None:
    """Of the first step, sample by sample, without hookjac."""
    found: list[Tensor] = []
    see = lambda m: found.append(torch.stack([p.grad_sample_norm for p in m.parameters()]).norm(dim=0))
    lit(tmp_path, PAGE["Extended"]("grad_sample_norm", part="net", see=see), max_steps=1)
    model, (x, y) = Lit().net, next(iter(loader()))
    for n in range(BATCH):
        grads = torch.autograd.grad(
            F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) / BATCH, list(model.parameters())
        )
        wanted = torch.cat([g.reshape(-1) for g in grads]).norm()
        assert found[0][n] == pytest.approx(wanted.item(), rel=1e-5)


def test_lightning_closes_the_block_after_an_error(tmp_path: Path) -> None:
    class Broken(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise ArithmeticError("mine")

    callback = PAGE["Extended"]("grad_sample_norm", part="net")
    module = Broken()
    trainer = L.Trainer(
        callbacks=[callback], max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ArithmeticError, match="mine"):
        trainer.fit(module, loader())
    assert callback.block is None
    module.net(torch.randn(2, D)).sum().backward()
    assert not any(vars(p).get("grad_sample_norm") is not None for p in module.parameters())


# Hugging Face -----------------------------------------------------------------------------------------------


def bert() -> nn.Module:
    torch.manual_seed(1)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.BertConfig(vocab_size=13, max_position_embeddings=6, num_labels=C, **size)
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    torch.manual_seed(1)
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=13, n_positions=6, **size))


def data(model: nn.Module) -> list[dict[str, Tensor]]:
    torch.manual_seed(2)
    ids = torch.randint(13, (12, 5))
    if isinstance(model, transformers.GPT2LMHeadModel):
        return [{"input_ids": t, "labels": t} for t in ids]
    return [{"input_ids": t, "labels": k} for t, k in zip(ids, torch.randint(C, (12,)), strict=True)]


def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """From what the model returns: what accelerate casts to float32 on the way out is no part of its own loss."""
    logits = outputs.logits if labels.dim() == 1 else outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels if labels.dim() == 1 else labels[:, 1:].flatten())


HF: dict[str, dict[str, Any]] = {
    "plain": {"max_grad_norm": 0.0},
    "accumulated": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0},
    "clipped": {"max_grad_norm": 0.1},
    "bf16": {"bf16": True, "compute_loss_func": loss_of},
}


def fit(kind: Any, model: nn.Module, tmp_path: Path, compute_loss_func: Any = None, **options: Any) -> None:
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=BATCH, num_train_epochs=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no", seed=5, learning_rate=0.01, **options,
    )  # fmt: skip
    kind(model=model, args=args, train_dataset=data(model), compute_loss_func=compute_loss_func).train()


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("build", [bert, gpt2])
def test_transformers(build: Any, name: str, tmp_path: Path) -> None:
    """Per-sample gradients add up to what the batch adds to `.grad`. Dropout is on: nothing of ours may draw random
    numbers, either."""
    options, found = HF[name], []

    class Mine(PAGE["ExtendedTrainer"]):  # type: ignore[misc]
        quantities = ("grad_sample", "grad_sample_norm")

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            before = {k: torch.zeros(()) if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            top = max(float(p.grad.abs().max()) for p in model.parameters())
            for key, p in model.named_parameters():
                off = (p.grad_sample.sum(0) - (p.grad - before[key])).abs().max()
                assert off <= (2e-2 if "bf16" in options else 1e-6) * top, key
            return loss

        def see(self, model: Any) -> None:
            for p in model.parameters():
                wanted = p.grad_sample.flatten(1).norm(dim=1)
                assert torch.allclose(p.grad_sample_norm, wanted, rtol=2e-2 if "bf16" in options else 1e-4, atol=1e-6)
            found.append(torch.stack([p.grad_sample_norm for p in model.parameters()]).norm(dim=0))

    model, other = build(), build()
    fit(Mine, model, tmp_path, **options)
    fit(transformers.Trainer, other, tmp_path, **options)
    same_weights(model, other)
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), build().parameters(), strict=True))
    assert len(found) == 6
    assert all(len(norms) == BATCH and (norms > 0).all() for norms in found)


def test_a_loss_that_does_not_pass_through_the_answer_is_refused(tmp_path: Path) -> None:
    """As the page says of mixed precision: accelerate casts what the model returns."""
    with pytest.raises(hookjac.HookjacError, match="the loss is not connected to an output of the model"):
        fit(PAGE["ExtendedTrainer"], gpt2(), tmp_path, bf16=True)


@pytest.mark.parametrize("build", [bert, gpt2])
def test_transformers_numbers_are_those_of_loops(build: Any, tmp_path: Path) -> None:
    """Of every step, sample by sample, by a plain loop over copies of the weights. Without dropout."""
    steps: list[tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], Any]] = []

    class Mine(PAGE["ExtendedTrainer"]):  # type: ignore[misc]
        quantities = ("grad_sample_norm",)

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            weights = {k: t.clone() for k, t in model.state_dict().items()}
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            norms = {k: p.grad_sample_norm for k, p in model.named_parameters()}
            steps.append((dict(inputs), weights, norms, num_items_in_batch))
            return loss

    model = build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fit(Mine, model, tmp_path)
    plain = build().eval()
    assert len(steps) == 6
    for inputs, weights, norms, items in steps:
        plain.load_state_dict(weights)
        for n in range(BATCH):
            loss = plain(**{k: t[n : n + 1] for k, t in inputs.items()}).loss  # a mean over its own labels
            # Transformers divides by the number of labels in the batch, the first of each sequence among them
            loss = loss / BATCH if build is bert else loss * 4 / items
            grads = torch.autograd.grad(loss, list(plain.parameters()))
            for key, g in zip(norms, grads, strict=True):
                assert float(norms[key][n]) == pytest.approx(float(g.norm()), rel=1e-4, abs=1e-6), key
