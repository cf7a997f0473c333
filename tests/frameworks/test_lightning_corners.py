"""Lightning's corners: what runs training_step without a step, skips batches, fetches its own or wraps the step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn

from fastsam.lightning import SAMMixin
from tests.frameworks.trainer import (
    BATCHES,
    EPOCHS,
    Batch,
    Manual,
    MixedModule,
    Module,
    assert_close,
    fit,
    flat,
    fp16,
    loader,
    plain,
    trainer,
)
from tests.oracle import same_bits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")

KINDS = [Module, MixedModule]
STEPS = BATCHES * EPOCHS


@pytest.mark.parametrize("kind", KINDS)
def test_averaging_recomputes_the_statistics_without_a_step(kind: type[Module], tmp_path: Path) -> None:
    """StochasticWeightAveraging ends with a forward pass over all batches, for BatchNorm; it has no gradients."""

    class Normalised(kind):  # type: ignore[misc, valid-type]
        def build(self) -> nn.Sequential:
            return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))

    module = Normalised()
    callback = StochasticWeightAveraging(0.05, swa_epoch_start=1)
    trainer(tmp_path, callback, max_epochs=4).fit(module, loader())
    mean = torch.stack([module.layers[0](x).mean(0) for x, _ in loader()]).mean(0)
    torch.testing.assert_close(module.layers[1].running_mean, mean)
    assert not module.sam.perturbed


class WarmUp(Module):
    """As Lightning's documentation has it: an optimizer_step of one's own."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        self.steps = getattr(self, "steps", 0) + 1


@pytest.mark.parametrize("plugins", [None, fp16], ids=["fp32", "16-mixed"])
def test_an_optimizer_step_behind_the_mixin_runs(plugins: Any, tmp_path: Path) -> None:
    class Mixed(SAMMixin, WarmUp):
        pass

    module = Mixed()
    autocast = partial(torch.autocast, "cpu", torch.float16, cache_enabled=False) if plugins else torch.enable_grad
    expected = plain(module, autocast=autocast)
    run = fit(module, tmp_path, plugins=plugins and plugins())
    assert module.steps == STEPS
    assert_close(run.weights, expected, 1e-3 if plugins else 2e-5)


def test_an_optimizer_step_that_goes_past_the_mixin_is_refused(tmp_path: Path) -> None:
    class Past(MixedModule):
        optimizer_step = WarmUp.optimizer_step

    module = Past()
    start = flat(module.parameters())
    with pytest.raises(RuntimeError, match=r"Past\.optimizer_step goes past SAMMixin's: call super\(\)"):
        fit(module, tmp_path)
    assert same_bits(flat(module.parameters()), start)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_that_fetches_its_batches_is_refused(kind: type[Module], tmp_path: Path) -> None:
    class Fetching(kind):  # type: ignore[misc, valid-type]
        def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

    module = Fetching()
    start = flat(module.parameters())
    with pytest.raises(RuntimeError, match=r"training_step\(dataloader_iter\) can't work"):
        fit(module, tmp_path)
    assert same_bits(flat(module.parameters()), start)


@pytest.mark.parametrize("form", ["fp32", "fp32 mixin", "16-mixed"])
@pytest.mark.parametrize("skipped", ["w", "w + e_w"])
@pytest.mark.parametrize("interval", [1, 3])
def test_a_skipped_batch_counts_and_changes_nothing(form: str, skipped: str, interval: int, tmp_path: Path) -> None:
    """training_step returns None for one batch, in one of its passes; clipping, where there are no gradients, waits."""

    class Skipping(Module if form == "fp32" else MixedModule):  # type: ignore[misc]
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            if batch_idx == at and self.sam.perturbed == (skipped == "w + e_w"):
                return None
            return self.loss(batch)

    at = 1 if skipped == "w" else 2  # of an interval of 3: a plain step, a SAM step
    module = Skipping(interval=interval)
    options = {"plugins": fp16()} if form == "16-mixed" else {}
    run = fit(module, tmp_path, max_epochs=1, gradient_clip_val=0.5, **options)
    assert same_bits(run.weights[at], run.weights[at - 1])
    assert not same_bits(run.weights[at + 1], run.weights[at])
    assert module.sam.param_groups[0]["sam_step"] == BATCHES
    assert not module.sam.perturbed


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_mixin_clips_under_manual_optimization(precision: str, algorithm: str, tmp_path: Path) -> None:
    class Clipping(SAMMixin, Manual):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            sam = self.optimizers()
            self.manual_backward(self.loss(batch))
            sam.first_step(zero_grad=True)
            self.manual_backward(self.loss(batch))
            self.clip_gradients(sam, bound, algorithm)
            sam.second_step(zero_grad=True)

    def clip(gradients: list[Tensor]) -> None:
        norm = flat(gradients).norm()
        for g in gradients:
            if algorithm == "norm":
                g.mul_(min(1.0, bound / norm))
            else:
                g.clamp_(-bound, bound)

    bound = 0.1 if algorithm == "norm" else 0.01
    module = Clipping()
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    expected = plain(module, clip=clip, autocast=partial(torch.autocast, "cpu", dtype, cache_enabled=False))
    options = {"precision": precision} if precision == "bf16-mixed" else {"plugins": fp16()}
    assert_close(fit(module, tmp_path, **options).weights, expected, 1e-3)


def test_the_hook_before_a_manual_step_may_use_gradients(tmp_path: Path) -> None:
    class Hooked(Manual):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            enabled.append(torch.is_grad_enabled())

    enabled: list[bool] = []
    fit(Hooked(interval=2), tmp_path)
    assert enabled == [True] * STEPS
