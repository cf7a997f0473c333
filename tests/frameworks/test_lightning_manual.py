"""Lightning's manual optimization; gradient accumulation, which automatic optimization can't do."""

from __future__ import annotations

import copy
import importlib
import itertools
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import notices
from tests.frameworks.trainer import (
    BATCHES,
    EPOCHS,
    Batch,
    Manual,
    MixedModule,
    Module,
    Recorder,
    assert_close,
    fit,
    fp16,
    loader,
    plain,
    trainer,
)
from tests.oracle import PlainSAM, same_bits
from tests.ranks import flat

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")

CAST = partial(torch.autocast, "cpu", cache_enabled=False)
AUTOCAST = {
    "32-true": partial(CAST, enabled=False),
    "bf16-mixed": partial(CAST, dtype=torch.bfloat16),
    "16-mixed": partial(CAST, dtype=torch.float16),
}
TOLERANCE = {"32-true": 2e-5, "bf16-mixed": 1e-3, "16-mixed": 1e-3}


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *itertools.product([Module, MixedModule], ["32-true", "bf16-mixed"]),
        (MixedModule, "16-mixed"),  # refused without the mixin, whether it accumulates or not
    ],
)
def test_accumulation_is_refused(kind: type[Module], precision: str, tmp_path: Path) -> None:
    module = kind()
    start = flat(module.parameters())
    runner = trainer(tmp_path, accumulate_grad_batches=2, **in_precision(precision))
    with pytest.raises(RuntimeError, match=r"accumulate_grad_batches=2 can't work.* at w \+ e_w\. Use manual"):
        runner.fit(module, loader())
    assert runner.global_step == 0
    assert same_bits(flat(module.parameters()), start)


@pytest.mark.parametrize("kind", [Module, MixedModule])
def test_accumulation_is_refused_from_the_epoch_on_that_has_it(kind: type[Module], tmp_path: Path) -> None:
    module, recorder = kind(), Recorder()
    expected = plain(module)
    runner = trainer(tmp_path, recorder, GradientAccumulationScheduler({1: 3}))
    with pytest.raises(RuntimeError, match="accumulate_grad_batches=3 can't work"):
        runner.fit(module, loader())
    assert_close(recorder.weights[:BATCHES], expected[:BATCHES])
    assert same_bits(flat(module.parameters()), recorder.weights[BATCHES - 1])

    module = kind()
    assert_close(fit(module, tmp_path, GradientAccumulationScheduler({0: 1, 1: 1})).weights, expected)


def in_precision(precision: str) -> dict[str, Any]:
    """The trainer's options."""
    return {"plugins": fp16()} if precision == "16-mixed" else {"precision": precision}


class ByClosure(Manual):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        sam = self.optimizers()

        def closure() -> Tensor:
            sam.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        sam.step(closure=closure)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize(
    ("kind", "precision"),
    [(Manual, "32-true"), (Manual, "16-mixed"), (ByClosure, "32-true")],  # in 16-mixed a closure runs but once
)
def test_trajectory(kind: type[Module], interval: int, precision: str, tmp_path: Path) -> None:
    """By Lightning's wrapper of the optimizer: its count goes up, and its hook comes, once a step."""
    hooks = []

    class Counting(kind):  # type: ignore[misc, valid-type]
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            hooks.append(optimizer.perturbed)

    module = Counting(interval=interval)
    expected = plain(module, interval, autocast=AUTOCAST[precision])
    run = fit(module, tmp_path, **in_precision(precision))
    assert_close(run.weights, expected, TOLERANCE[precision])
    assert run.steps == list(range(1, BATCHES * EPOCHS + 1))
    assert hooks == [(i + 1) % interval == 0 for i in range(BATCHES * EPOCHS)]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_step_without_a_second_gradient_is_refused(precision: str, tmp_path: Path) -> None:
    """As a plain optimizer's users write it: it would step by no gradient at all."""

    class Wrong(Manual):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            sam = self.optimizers()
            sam.zero_grad()
            self.manual_backward(self.loss(batch))
            sam.step()

    module = Wrong()
    start = flat(module.parameters())
    with pytest.raises(RuntimeError, match=r"call first_step\(\) and compute the gradients again"):
        fit(module, tmp_path, **in_precision(precision))
    assert same_bits(flat(module.parameters()), start)


def test_the_wrapper_shows_what_the_optimizer_has(tmp_path: Path) -> None:
    """Lightning's wrapper inherits from FusedSAM, but holds none of its attributes."""
    shown: list[Any] = []

    class Known(Manual):
        def configure_optimizers(self) -> Any:
            self.options["grad_scaler"] = self.trainer.precision_plugin.scaler
            return super().configure_optimizers()

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            wrapper = self.optimizers()
            super().training_step(batch, batch_idx)
            shown.append((wrapper.grad_scaler, wrapper.first_pass_context, wrapper.perturbed, wrapper.interval))

    plugins = fp16()
    run = fit(Known(), tmp_path, plugins=plugins)
    assert shown == [(plugins[0].scaler, None, False, 1)] * len(run.steps)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_clipping(precision: str, tmp_path: Path) -> None:
    """By torch: Lightning's clip_gradients refuses an optimizer that unscales, in any mixed precision."""

    class Clipping(Manual):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            sam = self.optimizers()
            self.manual_backward(self.loss(batch))
            sam.first_step(zero_grad=True)
            self.manual_backward(self.loss(batch))
            if precision == "16-mixed":
                self.trainer.precision_plugin.scaler.unscale_(sam.optimizer)
            nn.utils.clip_grad_norm_(self.parameters(), 0.1)
            sam.second_step(zero_grad=True)

    def clip(gradients: list[Tensor]) -> None:
        scale = min(1.0, 0.1 / flat(gradients).norm())
        for g in gradients:
            g.mul_(scale)

    module = Clipping()
    expected = plain(module, clip=clip, autocast=AUTOCAST[precision])
    assert_close(fit(module, tmp_path, **in_precision(precision)).weights, expected, TOLERANCE[precision])


class Weights(Callback):
    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: LightningModule, *_: Any) -> None:
        if len(self.steps) < trainer.global_step:
            self.weights.append(flat(module.parameters()))
            self.steps.append(trainer.global_step)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_the_recipe_for_micro_batches(precision: str, tmp_path: Path) -> None:
    """examples/train_lightning.py's module: groups of 3, 3 and 2 micro-batches, the last of them smaller."""
    torch.manual_seed(0)
    module = importlib.import_module("examples.train_lightning").ManualDigits(micro_batches=3)
    x, y = torch.rand(30, 64), torch.randint(0, 10, (30,))
    micro_batches = list(zip(x.split(4), y.split(4), strict=True))
    layers = copy.deepcopy(module.layers)
    base = torch.optim.SGD(layers.parameters(), lr=0.1, momentum=0.9)
    sam = PlainSAM(layers, base, 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, 6)
    expected = []
    for _ in range(EPOCHS):
        losses: list[float] = []  # of an epoch, at w, weighted by samples
        for group in (micro_batches[:3], micro_batches[3:6], micro_batches[6:]):
            n = sum(len(y) for _, y in group)
            at_w: list[Tensor] = []

            def loss(group: list[Batch] = group, n: int = n, at_w: list[Tensor] = at_w) -> Tensor:
                with AUTOCAST[precision]():
                    mean = sum(nn.functional.cross_entropy(layers(x), y, reduction="sum") / n for x, y in group)
                at_w.append(mean.detach())
                return mean

            sam.step(sam.gradients_above(loss))
            losses.append(at_w[0].item() * n)
            expected.append(flat(layers.parameters()))
        schedule.step()

    record = Weights()
    runner = trainer(tmp_path, record, **in_precision(precision))
    runner.fit(module, DataLoader(TensorDataset(x, y), 4))
    assert record.steps == [1, 2, 3, 4, 5, 6]
    assert_close(record.weights, expected, TOLERANCE[precision])
    assert module.layers[1].num_batches_tracked == 8 * EPOCHS
    assert runner.callback_metrics["training loss"].item() == pytest.approx(
        sum(losses) / len(y), rel=TOLERANCE[precision]
    )


def test_the_recipe_leaves_w_after_an_exception(tmp_path: Path) -> None:
    """So that a checkpoint can be saved, and training can go on with a new group of micro-batches."""
    recipe = importlib.import_module("examples.train_lightning").ManualDigits

    class Failing(recipe):  # type: ignore[misc, valid-type]
        def backward_all(self, samples: int) -> Tensor:
            if self.optimizers().perturbed and fail:
                raise KeyError("data")
            return super().backward_all(samples)

    fail, module = True, Failing(micro_batches=3)
    start = flat(module.parameters())
    data = DataLoader(TensorDataset(torch.rand(12, 64), torch.randint(0, 10, (12,))), 4)
    saving = OnExceptionCheckpoint(tmp_path, "failed")
    runner = trainer(tmp_path, saving, enable_checkpointing=True)
    with pytest.raises(KeyError, match="data"):
        runner.fit(module, data)
    saved = torch.load(tmp_path / "failed.ckpt", weights_only=True)["state_dict"]
    assert same_bits(flat(saved[name] for name, _ in module.named_parameters()), start)
    assert same_bits(flat(module.parameters()), start)
    fail = False
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(module, data)
    assert runner.global_step == 1


@pytest.mark.parametrize("form", ["automatic", "micro-batches", "16-mixed"])
def test_example(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("examples.train_lightning").train(form)
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert printed[f"{form}, steps"] == "90"
    assert float(printed[f"{form}, accuracy"]) > 0.85


class CountedTwice(Manual):
    """davda54/sam in Lightning, as public code has it: what steps is not Lightning's, so the loop is told by hand."""

    around = True

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.first_step(zero_grad=True)
        self.manual_backward(self.loss(batch))
        if self.around:
            optimizer._on_before_step()
        optimizer.second_step(zero_grad=True)
        if self.around:
            optimizer._on_after_step()


@pytest.mark.parametrize("around", [True, False])
def test_steps_that_are_counted_twice_are_told(around: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "told", set())
    module = CountedTwice()
    module.around = around
    runner = trainer(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.fit(module, loader())
    told = [str(warning.message) for warning in caught if "_on_before_step" in str(warning.message)]
    assert len(told) == around
    assert runner.global_step == BATCHES * EPOCHS * (2 if around else 1)


def test_options_reach_the_optimizer_through_lightnings_wrapper(tmp_path: Path) -> None:
    """Its attributes are its own; an interval that is set there has to count all the same."""
    seen = []

    class Scheduled(CountedTwice):
        around = False

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            sam = self.optimizers()
            sam.interval, sam.rho, sam.closure_passes = 2, 0.25, "two"
            seen.append((sam.optimizer.interval, sam.optimizer.rho, sam.optimizer.closure_passes))
            self.manual_backward(self.loss(batch))
            if sam.first_step(zero_grad=True):
                self.manual_backward(self.loss(batch))
            sam.second_step(zero_grad=True)

    trainer(tmp_path).fit(Scheduled(), loader())
    assert set(seen) == {(2, 0.25, "two")}
