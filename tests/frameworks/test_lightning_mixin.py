"""SAMMixin: each batch counts once, and 16-mixed works; what automatic optimization does without it."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from fastsam.lightning import SAMMixin
from tests.frameworks.trainer import (
    BATCHES,
    EPOCHS,
    Batch,
    MixedModule,
    Module,
    assert_close,
    fit,
    fp16,
    loader,
    momentum_by_hand,
    plain,
    trainer,
)
from tests.oracle import same_bits
from tests.ranks import flat

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")

FP16 = partial(torch.autocast, "cpu", torch.float16, cache_enabled=False)


class Normalised(Module):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.losses: list[Tensor] = []

    def build(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        self.log_dict({"loss": loss.detach()}, on_step=True, on_epoch=True)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("at_w", float(not optimizer.perturbed))


class Once(SAMMixin, Normalised):
    pass


class Logged(Callback):
    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.epochs: list[Tensor] = []
        self.at_w: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.steps.append(trainer.callback_metrics["loss_step"].clone())
        self.at_w.append(float(trainer.callback_metrics["at_w"]))

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.epochs.append(trainer.callback_metrics["loss_epoch"].clone())


@pytest.mark.parametrize("interval", [1, 2])
def test_what_is_logged_is_the_loss_at_w(interval: int, tmp_path: Path) -> None:
    def at_w(losses: list[Tensor]) -> list[Tensor]:
        """Of the SAM steps only the first pass, of the plain ones the only pass."""
        kept, rest = [], list(losses)
        for step in range(BATCHES * EPOCHS):
            kept.append(rest.pop(0))
            if (step + 1) % interval == 0:
                rest.pop(0)
        assert not rest
        return kept

    modules = [Normalised(interval=interval), Once(interval=interval)]
    logged = [Logged(), Logged()]
    runs = [fit(module, tmp_path, log) for module, log in zip(modules, logged, strict=True)]
    assert same_bits(runs[0].weights, runs[1].weights)
    expected = at_w(modules[0].losses)
    torch.testing.assert_close(logged[1].steps, expected, rtol=0, atol=0)
    means = [torch.stack(expected[e * BATCHES : (e + 1) * BATCHES]).mean() for e in range(EPOCHS)]
    torch.testing.assert_close(logged[1].epochs, means)
    assert logged[1].at_w == [float((step + 1) % interval > 0) for step in range(BATCHES * EPOCHS)]
    last = modules[0].losses[-1]  # of a SAM step
    torch.testing.assert_close(logged[0].steps[-1], last, rtol=0, atol=0)
    assert not torch.allclose(last, expected[-1], rtol=1e-3)  # without the mixin: the loss at w + e_w


class PerturbedLoss(Callback):
    """What on_train_batch_end may log, and the loss of the second pass as Lightning hands it out."""

    def __init__(self) -> None:
        self.seen: list[Tensor | None] = []
        self.outputs: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(module.optimizers().perturbed_loss)
        self.outputs.append(outputs["loss"])


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("options", [{}, {"interval": 2}, {"direction": "momentum"}], ids=str)
def test_the_perturbed_loss(precision: str, options: dict[str, Any], tmp_path: Path) -> None:
    module, seen = MixedModule(**options), PerturbedLoss()
    fit(module, tmp_path, seen, **({"plugins": fp16()} if precision == "16-mixed" else {}))
    for k, (loss, expected) in enumerate(zip(seen.seen, seen.outputs, strict=True)):
        plain = (k + 1) % options.get("interval", 1) != 0 or ("direction" in options and k == 0)
        assert (loss is None) is plain
        if not plain:
            torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    assert len(seen.seen) == BATCHES * EPOCHS


def test_running_statistics_count_each_batch_once(tmp_path: Path) -> None:
    module, without = Once(), Normalised()
    norm = copy.deepcopy(module.layers[1])
    inputs: list[Tensor] = []
    module.layers[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    fit(module, tmp_path)
    fit(without, tmp_path)
    for x in inputs[::2]:  # of the first passes
        norm(x)
    assert same_bits(list(module.layers[1].buffers()), list(norm.buffers()))
    assert without.layers[1].num_batches_tracked == 2 * norm.num_batches_tracked
    assert module.layers[1].track_running_stats


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
def test_16_mixed(interval: int, algorithm: str | None, tmp_path: Path) -> None:
    def clip(gradients: list[Tensor]) -> None:
        if algorithm == "norm":
            scale = min(1.0, bound / torch.cat([g.flatten() for g in gradients]).norm())
            for g in gradients:
                g.mul_(scale)
        elif algorithm == "value":
            for g in gradients:
                g.clamp_(-bound, bound)

    bound = 0.1 if algorithm == "norm" else 0.01
    module = MixedModule(interval=interval)
    expected = plain(module, interval, clip, FP16)
    options = {} if algorithm is None else {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm}
    run = fit(module, tmp_path, plugins=fp16(), **options)
    assert_close(run.weights, expected, 1e-3)
    assert run.steps == list(range(1, BATCHES * EPOCHS + 1))


@pytest.mark.parametrize("kind", [Module, MixedModule])
@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("clipped", [False, True])
def test_along_the_momentum(kind: type[Module], start: int, clipped: bool, tmp_path: Path) -> None:
    """training_step runs once a step, at w + e_w; nothing needs the mixin but 16-mixed."""

    def clip(gradients: list[Tensor]) -> None:
        for g in gradients:
            g.clamp_(-0.01, 0.01)

    module = kind(direction="momentum", start=start)
    expected, _ = momentum_by_hand(module, start, clip if clipped else None)
    options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"} if clipped else {}
    run = fit(module, tmp_path, **options)
    assert_close(run.weights, expected)
    assert run.steps == list(range(1, BATCHES * EPOCHS + 1))


def test_along_the_momentum_in_16_mixed(tmp_path: Path) -> None:
    module = MixedModule(direction="momentum")
    expected, _ = momentum_by_hand(module, autocast=FP16)
    run = fit(module, tmp_path, plugins=fp16())
    assert_close(run.weights, expected, 1e-3)
    assert run.steps == list(range(1, BATCHES * EPOCHS + 1))


def test_along_the_momentum_each_batch_is_logged_once(tmp_path: Path) -> None:
    module = Once(direction="momentum")
    logged = Logged()
    fit(module, tmp_path, logged)
    assert len(module.losses) == BATCHES * EPOCHS
    torch.testing.assert_close(logged.steps, module.losses, rtol=0, atol=0)
    assert module.layers[1].num_batches_tracked == BATCHES * EPOCHS


def test_along_the_momentum_16_mixed_without_the_mixin_is_an_error(tmp_path: Path) -> None:
    module = Module(direction="momentum")
    start = flat(module.parameters())
    with pytest.raises(RuntimeError, match=r"fastsam\.lightning\.SAMMixin"):
        fit(module, tmp_path, plugins=fp16())
    assert same_bits([flat(module.parameters())], [start])


@pytest.mark.parametrize("kind", [Module, MixedModule])
def test_late_sam(kind: type[Module], tmp_path: Path) -> None:
    module = kind(start=7)
    expected = plain(module, start=7)
    run = fit(module, tmp_path)
    assert_close(run.weights, expected)
    assert run.steps == list(range(1, BATCHES * EPOCHS + 1))


def test_16_mixed_skips_what_overflows(tmp_path: Path) -> None:
    module = MixedModule()
    start = flat(module.parameters())
    plugins = fp16(init_scale=2.0**40)
    run = fit(module, tmp_path, plugins=plugins)
    assert same_bits(run.weights, [start] * (BATCHES * EPOCHS))
    assert plugins[0].scaler.get_scale() == 2.0 ** (40 - BATCHES * EPOCHS)


def test_16_mixed_restores_w_after_an_exception(tmp_path: Path) -> None:
    """Lightning runs the closure outside of step() then."""

    class Failing(MixedModule):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if self.sam.perturbed:
                raise KeyError("data")
            return self.loss(batch)

    module = Failing()
    start = flat(module.parameters())
    with pytest.raises(KeyError, match="data"):
        fit(module, tmp_path, plugins=fp16())
    assert same_bits(flat(module.parameters()), start)


@pytest.mark.parametrize("interval", [1, 3])
def test_16_mixed_without_the_mixin_is_refused(interval: int, tmp_path: Path) -> None:
    module = Module(interval=interval)
    start = flat(module.parameters())
    runner = trainer(tmp_path, plugins=fp16())
    with pytest.raises(
        RuntimeError, match=r"16-mixed runs its closure only once: it needs fastsam\.lightning\.SAMMixin"
    ):
        runner.fit(module, loader())
    assert runner.global_step == interval - 1
    assert same_bits(flat(module.parameters()), start) == (interval == 1)
    assert not module.sam.perturbed


def test_the_wrong_order_of_bases_is_refused() -> None:
    with pytest.raises(TypeError, match="name SAMMixin before LightningModule in Wrong's bases"):

        class Wrong(Module, SAMMixin):
            pass

    class Right(MixedModule):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    class Wrong(SAMMixin, Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(TypeError, match=r"SAMMixin needs a FusedSAM from configure_optimizers, but got SGD"):
        trainer(tmp_path).fit(Wrong(), loader())
