"""The SAMTrainer of examples/train_transformers.py, with the real Trainer, against SAM written out in torch."""

import copy
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from examples import train_transformers
from examples.train_transformers import SAMTrainer
from fastsam import FusedSAM
from tests.frameworks.huggingface import fresh_state, launched, scale_losses
from tests.oracle import PlainSAM, copies, same_bits
from tests.ranks import assert_same_bits, flat, launch, on_ranks

RHO = 0.1
LR, DECAY, CLIP = 5e-3, 0.1, 0.3
WARMUP = 2
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    with fresh_state():
        yield


class Recording(SAMTrainer):
    """Keeps the micro-batches of every step, and the random numbers' state before it."""

    def get_batch_samples(self, *args: Any) -> tuple[list[Batch], Any]:
        window, num_items_in_batch = super().get_batch_samples(*args)
        vars(self).setdefault("steps", []).append((copy.deepcopy(window), torch.get_rng_state()))
        return window, num_items_in_batch


def make_model(task: str = "masked", dropout: float = 0.1, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        is_decoder=task == "causal",
    )
    if task == "causal":  # its loss is the sum over num_items_in_batch
        model = BertLMHeadModel(config).to(dtype)
        model.loss_type = "ForCausalLM"  # else the Trainer counts the first label, which no logits predict
        return model
    model = BertForMaskedLM(config).to(dtype)
    model.accepts_loss_kwargs = False  # its loss is the mean over the micro-batch
    return model


def make_data(n: int, task: str = "masked") -> list[dict[str, list[int]]]:
    """Characters of Python's language reference; the labels differ in number from one example to the next."""
    text = topics["while"].encode()
    blocks = [[c % 128 for c in text[16 * i : 16 * i + 16]] for i in range(n)]
    if task == "causal":
        return [{"input_ids": b, "labels": [-100 if c == 32 else c for c in b]} for b in blocks]
    masked = [[i % 5 == 0 or c == 101 for i, c in enumerate(b)] for b in blocks]
    return [
        {
            "input_ids": [1 if m else c for c, m in zip(b, ms, strict=True)],
            "labels": [c if m else -100 for c, m in zip(b, ms, strict=True)],
        }
        for b, ms in zip(blocks, masked, strict=True)
    ]


def make_trainer(
    folder: Path,
    model: nn.Module,
    data: Any,
    kind: type[Trainer] = Recording,
    options: dict[str, Any] | None = None,
    **args: Any,
) -> Any:
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": LR,
        "weight_decay": DECAY,
        "max_grad_norm": CLIP,
        "warmup_steps": WARMUP,
        "lr_scheduler_type": "linear",
        "use_cpu": True,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if options is None:
        options = {"rho": RHO}
    trainer = kind(model, TrainingArguments(str(folder), **{**defaults, **args}), train_dataset=data, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def loss_by_hand(model: nn.Module, window: list[Batch], task: str) -> Tensor:
    losses = []
    for batch in window:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        labels = batch["labels"]
        if task == "causal":
            logits, labels = logits[:, :-1].float(), labels[:, 1:]  # float() as in the library's loss
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    if task == "causal":
        return sum(losses) / sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
    counts = [(batch["labels"] != -100).sum() for batch in window]
    return sum(loss / count for loss, count in zip(losses, counts, strict=True)) / len(window)


def train_by_hand(
    model: nn.Module,
    steps: list[tuple[list[Batch], Tensor]],
    task: str = "masked",
    interval: int = 1,
    adaptive: bool = False,
    start: int = 0,
    direction: str = "gradient",
) -> list[float]:
    """SAM around AdamW in plain torch, over the same micro-batches with the same dropout; gives the losses at w.

    Along the momentum those at w + e_w.
    """
    params = list(model.parameters())
    model.train()
    decayed = [p for p in params if p.ndim > 1]  # neither biases nor LayerNorm's weights
    rest = [p for p in params if p.ndim == 1]
    base = torch.optim.AdamW([{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}])
    sam = PlainSAM(model, base, RHO, adaptive, interval=interval, start=start, direction=direction)
    losses = []
    for k, (window, rng) in enumerate(steps):
        torch.set_rng_state(rng)
        at_w: list[Tensor] = []

        def loss(window: list[Batch] = window, at_w: list[Tensor] = at_w) -> Tensor:
            at_w.append(loss_by_hand(model, window, task))
            return at_w[-1]

        gradients = sam.gradients_above(loss) if sam.is_sam_step else sam.gradients(loss())
        norm = flat(gradients).norm()
        factor = LR * (k / WARMUP if k < WARMUP else (len(steps) - k) / (len(steps) - WARMUP))
        for group in base.param_groups:
            group["lr"] = factor
        sam.step([g * (CLIP / (norm + 1e-6)).clamp(max=1) for g in gradients])
        losses.append(at_w[0].item())
    return losses


def assert_close(model: nn.Module, expected: nn.Module, tolerance: float = 1e-9) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


CHECKPOINTING = next(  # Transformers 5.17 knows the second alone
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)


@pytest.mark.parametrize(
    ("task", "options", "accumulated", "checkpointing"),
    [
        ("masked", {}, 1, False),
        ("masked", {}, 2, False),
        ("causal", {}, 2, False),
        ("masked", {"interval": 2}, 2, False),
        ("masked", {"adaptive": True}, 2, False),
        ("masked", {}, 3, True),
        ("masked", {"start": 3}, 2, False),
        ("masked", {"direction": "momentum"}, 1, False),
        ("causal", {"direction": "momentum", "start": 2}, 2, False),
    ],
    ids=[
        "no accumulation",
        "accumulation",
        "num_items_in_batch",
        "interval",
        "adaptive",
        "gradient checkpointing",
        "start",
        "momentum",
        "momentum with start",
    ],
)
def test_same_trajectory_as_by_hand(
    task: str, options: dict[str, Any], accumulated: int, checkpointing: bool, tmp_path: Path
) -> None:
    model = make_model(task)
    expected = copy.deepcopy(model)
    args = {"gradient_accumulation_steps": accumulated, CHECKPOINTING: checkpointing}
    trainer = make_trainer(tmp_path, model, make_data(9, task), options={"rho": RHO, **options}, **args)
    mean_loss = trainer.train().training_loss
    micro_batches = 5  # an epoch; the last window of each is shorter
    assert [len(window) for window, _ in trainer.steps[-2:]] == [accumulated, micro_batches % accumulated or 1]
    losses = train_by_hand(expected, trainer.steps, task, **options)
    assert mean_loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert_close(model, expected)


def test_bf16(tmp_path: Path) -> None:
    """The same bf16 passes around fp32 weights: within 1 % of the way that the weights went."""
    model = make_model(dtype=torch.float32)
    start, expected = flat(list(model.parameters())).clone(), copy.deepcopy(model)
    trainer = make_trainer(tmp_path, model, make_data(9), bf16=True, optim="sgd", weight_decay=0.0, learning_rate=0.1)
    trainer.train()
    base = torch.optim.SGD(expected.parameters(), lr=0.1)
    sam = PlainSAM(expected, base, RHO)
    expected.train()
    for k, (window, rng) in enumerate(trainer.steps):
        torch.set_rng_state(rng)

        def loss(window: list[Batch] = window) -> Tensor:
            total = torch.zeros(())
            for batch in window:
                with torch.autocast("cpu", torch.bfloat16):
                    logits = expected(input_ids=batch["input_ids"]).logits
                total = total + nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())
            return total / len(window)

        gradients = sam.gradients_above(loss)
        steps = len(trainer.steps)
        base.param_groups[0]["lr"] = 0.1 * (k / WARMUP if k < WARMUP else (steps - k) / (steps - WARMUP))
        sam.step([g * (CLIP / (flat(gradients).norm() + 1e-6)).clamp(max=1) for g in gradients])
    way = flat(list(expected.parameters())) - start
    assert (flat(list(model.parameters())) - start - way).norm() < 0.01 * way.norm()


@pytest.mark.parametrize("interval", [1, 2])
def test_loss_scaling(interval: int, tmp_path: Path) -> None:
    model, expected = make_model(), make_model()
    trainer = make_trainer(tmp_path, model, make_data(9), options={"rho": RHO, "interval": interval})
    scale_losses(trainer.accelerator)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() > 1
    train_by_hand(expected, trainer.steps, interval=interval)
    assert_close(model, expected)


def check_resuming(folder: Path, interval: int, examples: int) -> None:
    """10 steps at once, and stopped after the third, in the middle of an epoch and of an interval of 2."""
    data = make_data(examples)
    options = {"rho": RHO, "interval": interval}
    whole = make_trainer(folder, make_model(), data, SAMTrainer, options, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make_trainer(folder, make_model(), data, SAMTrainer, options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert resumed.state.global_step == whole.state.global_step == 10
    assert same_bits(copies(resumed.model.parameters()), copies(whole.model.parameters()))


@pytest.mark.parametrize("interval", [1, 2])
def test_resuming_equals_not_stopping(interval: int, tmp_path: Path) -> None:
    check_resuming(tmp_path, interval, examples=18)


@pytest.mark.parametrize("how", ["optimizer_cls_and_kwargs", "optimizers", "optimizers, wrapped", "train() twice"])
def test_every_way_to_bring_the_optimizer(how: str, tmp_path: Path) -> None:
    model, expected = make_model(), make_model()
    options: dict[str, Any] = {"rho": RHO}
    params = [{"params": [p for p in model.parameters() if (p.ndim > 1) == d]} for d in (True, False)]
    for group, weight_decay in zip(params, (DECAY, 0.0), strict=True):
        group["weight_decay"] = weight_decay
    adamw = torch.optim.AdamW(params, lr=LR)
    if how == "optimizer_cls_and_kwargs":
        kwargs = {"base_optimizer": torch.optim.AdamW, "rho": RHO, "lr": LR}
        options = {"optimizer_cls_and_kwargs": (FusedSAM, kwargs)}
    elif how == "optimizers":
        options["optimizers"] = (adamw, None)
    elif how == "optimizers, wrapped":
        options = {"optimizers": (FusedSAM(adamw, rho=RHO), None)}
    trainer = make_trainer(tmp_path, model, make_data(9), options=options)
    trainer.train()
    train_by_hand(expected, trainer.steps)
    assert_close(model, expected)
    if how == "train() twice":
        trainer.train()
        assert type(trainer.optimizer.optimizer) is FusedSAM
        assert type(trainer.optimizer.optimizer.base_optimizer) is torch.optim.AdamW


def test_fused_sam_in_an_ordinary_trainer_says_what_to_do(tmp_path: Path) -> None:
    options = {"optimizer_cls_and_kwargs": (FusedSAM, {"base_optimizer": torch.optim.AdamW, "lr": LR})}
    trainer = make_trainer(tmp_path, make_model(), make_data(9), Trainer, options)
    with pytest.raises(RuntimeError, match="call first_step\\(\\) and compute the gradients again"):
        trainer.train()


def test_an_exception_in_the_second_pass_restores_the_weights(tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(tmp_path, model, make_data(9))
    start = copies(model.parameters())
    passes = 0

    def fail(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 4:  # the first step's second pass over its second micro-batch
            assert not same_bits(copies(model.parameters()), start)
            raise KeyboardInterrupt

    handle = model.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert same_bits(copies(model.parameters()), start)
    handle.remove()
    trainer.steps.clear()
    trainer.train()  # as if nothing had happened
    expected = make_model()
    train_by_hand(expected, trainer.steps)
    assert_close(model, expected)


def test_an_exception_before_the_step_restores_the_weights(tmp_path: Path) -> None:
    """The Trainer clips, and calls back, at w + e_w."""

    class Interrupt(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert not same_bits(copies(model.parameters()), start)
            raise KeyboardInterrupt

    model = make_model()
    trainer = make_trainer(tmp_path, model, make_data(9))
    trainer.add_callback(Interrupt())
    start = copies(model.parameters())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert same_bits(copies(model.parameters()), start)
    trainer.remove_callback(Interrupt)
    trainer.train()


class Stream(torch.utils.data.IterableDataset[dict[str, list[int]]]):
    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return iter(make_data(10))


@pytest.mark.parametrize("accumulated", [2, 3])
def test_a_window_that_goes_on_in_the_next_epoch(accumulated: int, tmp_path: Path) -> None:
    """Of a dataset without a length, 5 micro-batches an epoch. With rho=0 it is the ordinary Trainer's training."""
    args = {"max_steps": 6, "gradient_accumulation_steps": accumulated}
    model, expected = make_model(dropout=0.0), make_model(dropout=0.0)
    make_trainer(tmp_path, model, Stream(), SAMTrainer, {"rho": 0.0}, **args).train()
    make_trainer(tmp_path, expected, Stream(), Trainer, {}, **args).train()
    assert_close(model, expected)


def test_batch_normalisation_counts_each_batch_once(tmp_path: Path) -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": nn.functional.cross_entropy(self.last(self.norm(x)), labels)}

    data = [{"x": torch.randn(4), "labels": i % 3} for i in range(16)]
    model = Normalised()
    make_trainer(tmp_path, model, data, SAMTrainer, num_train_epochs=1).train()
    assert model.norm.num_batches_tracked == 8
    assert model.norm.track_running_stats


def test_jit_checkpoint_waits_for_the_end_of_the_step(tmp_path: Path) -> None:
    """On SIGTERM, enable_jit_checkpoint saves just before the optimizer's step, where the weights are w + e_w."""
    data = make_data(18)
    whole = make_model()
    make_trainer(tmp_path / "whole", whole, data).train()
    before = signal.getsignal(signal.SIGTERM)

    class Terminate(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                deadline = time.monotonic() + 30
                while not manager.is_checkpoint_requested:  # by another thread
                    assert time.monotonic() < deadline
                    time.sleep(0.001)

    stopped = make_trainer(tmp_path, make_model(), data, enable_jit_checkpoint=True)
    manager = next(m for c in stopped.callback_handler.callbacks if (m := getattr(c, "jit_manager", None)))
    manager.kill_wait = 0
    stopped.add_callback(Terminate())
    stopped.train()
    assert signal.getsignal(signal.SIGTERM) == before
    assert stopped.state.global_step == 3
    resumed = make_trainer(tmp_path, make_model(), data)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(copies(resumed.model.parameters()), copies(whole.parameters()))


def check_ddp(folder: Path, task: str, interval: int) -> tuple[list[Any], list[Tensor], float]:
    with launched():
        model = make_model(task, dropout=0.0)
        trainer = make_trainer(folder, model, make_data(18, task), options={"rho": RHO, "interval": interval})
        loss = trainer.train().training_loss
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
        for p in model.parameters():
            assert_same_bits(p)
        return trainer.steps, copies(model.parameters()), loss


@pytest.mark.parametrize(("task", "interval"), [("masked", 1), ("causal", 1), ("masked", 2)])
def test_ddp_climbs_by_the_gradient_of_all_ranks(task: str, interval: int, tmp_path: Path) -> None:
    (steps, trained, _), (others, _, _) = on_ranks(2, check_ddp, tmp_path, task, interval)
    expected = make_model(task, dropout=0.0)
    union = [(mine + theirs, rng) for (mine, rng), (theirs, _) in zip(steps, others, strict=True)]
    train_by_hand(expected, union, task, interval)
    for p, q in zip(trained, expected.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=0, atol=1e-9)


def check_resuming_on_ranks(folder: Path) -> None:
    with launched():
        check_resuming(folder, interval=2, examples=36)


def test_ddp_resuming(tmp_path: Path) -> None:
    on_ranks(2, check_resuming_on_ranks, tmp_path)


def test_the_example_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_transformers.main(str(tmp_path), steps=20, interval=1)
    values = dict(re.findall(r"(.*): (.*)", capsys.readouterr().out))
    assert float(values["loss after"]) < float(values["loss before"]) - 0.5


def test_the_example_on_two_ranks() -> None:
    values = launch("train_transformers.py", "--steps", "4", "--interval", "2")
    assert values["replicas equal to the bit"] == "True"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_on_a_gpu(precision: str, tmp_path: Path) -> None:
    model = make_model(dtype=torch.float32)
    options = {precision: True, "use_cpu": False, "num_train_epochs": 20, "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, model, make_data(32), logging_strategy="steps", logging_steps=1, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
