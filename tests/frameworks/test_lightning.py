"""Lightning's automatic optimization, with FusedSAM from configure_optimizers and nothing else."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader

from tests.frameworks.trainer import (
    BATCHES,
    EPOCHS,
    Batch,
    MixedModule,
    Module,
    Recorder,
    assert_close,
    fit,
    loader,
    plain,
    samples,
    trainer,
)
from tests.oracle import same_bits
from tests.ranks import flat

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")

BF16 = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)
MODULES = pytest.mark.parametrize("kind", [Module, MixedModule])


@MODULES
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("base", [None, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_trajectory(kind: type[Module], interval: int, base: Any, tmp_path: Path) -> None:
    module = kind(interval=interval, **({} if base is None else {"base": partial(base, lr=0.01)}))
    expected = plain(module, interval)
    run = fit(module, tmp_path)
    assert_close(run.weights, expected)
    assert run.steps == list(range(1, BATCHES * EPOCHS + 1))


@MODULES
def test_trajectory_in_bf16_mixed(kind: type[Module], tmp_path: Path) -> None:
    """A weight whose last bit differs may round to another bfloat16, so this is not as close as in fp32."""
    module = kind()
    expected, in_fp32 = plain(module, autocast=BF16), plain(module)
    run = fit(module, tmp_path, precision="bf16-mixed")
    assert_close(run.weights, expected, 1e-3)
    with pytest.raises(AssertionError):
        assert_close(run.weights, in_fp32, 1e-3)


@MODULES
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_of_the_second_gradient_alone(
    kind: type[Module], precision: str, algorithm: str, tmp_path: Path
) -> None:
    def clip(gradients: list[Tensor]) -> None:
        params = [nn.Parameter(torch.empty_like(g)) for g in gradients]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        if algorithm == "norm":
            nn.utils.clip_grad_norm_(params, bound)
        else:
            nn.utils.clip_grad_value_(params, bound)

    bound = 0.1 if algorithm == "norm" else 0.01  # most elements are larger: the ascent would turn
    module = kind()
    expected = plain(module, clip=clip, autocast=BF16 if precision == "bf16-mixed" else torch.enable_grad)
    options = {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm, "precision": precision}
    run = fit(module, tmp_path, **options)
    assert_close(run.weights, expected, 1e-3 if precision == "bf16-mixed" else 2e-5)


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_schedulers(every: str, tmp_path: Path) -> None:
    if every == "step":
        schedule = partial(StepLR, step_size=3, gamma=0.5)
        module = Module(scheduler=lambda sam: {"scheduler": schedule(sam), "interval": "step"})
    else:
        schedule = partial(CosineAnnealingLR, T_max=EPOCHS)
        module = Module(scheduler=schedule)
    expected = plain(module, scheduler=schedule, every=1 if every == "step" else BATCHES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(module, tmp_path)
    assert not [w for w in caught if "scheduler" in str(w.message)]
    assert_close(run.weights, expected)
    assert len(set(run.rates)) == (4 if every == "step" else 3)


@pytest.mark.parametrize("kind", [Module, MixedModule])
def test_hooks_and_validation_see_w(kind: type[Module], tmp_path: Path) -> None:
    """on_before_optimizer_step comes once a step. Validation in mid-epoch sees what the last step came to."""
    events = []

    class Validating(kind):  # type: ignore[misc, valid-type]
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            assert optimizer is self.sam
            events.append(("step", optimizer.perturbed))

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            events.append(("validation", flat(self.parameters())))

    module, recorder = Validating(interval=2), Recorder()
    start = flat(module.parameters())
    runner = trainer(tmp_path, recorder, val_check_interval=2, num_sanity_val_steps=1)
    runner.fit(module, loader(), loader(1))
    steps = [perturbed for kind, perturbed in events if kind == "step"]
    assert steps == [i % 2 == 1 for i in range(BATCHES * EPOCHS)]
    seen = [w for kind, w in events if kind == "validation"]
    after = [recorder.weights[i] for i in (1, 3, 6, 8)]
    assert same_bits(seen, [start, *after])


class Resumable(DataLoader):
    """Knows where it is, so that Lightning can resume within an epoch."""

    done = 0

    def __iter__(self) -> Any:
        start, self.done = self.done % BATCHES, self.done
        for i, batch in enumerate(super().__iter__()):
            if i >= start:
                self.done += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


@MODULES
@pytest.mark.parametrize(("interval", "step"), [(1, 3), (3, 4), (3, 5)])
def test_resume_equals_not_stopping(kind: type[Module], interval: int, step: int, tmp_path: Path) -> None:
    """Within the first epoch, and at its end; to the bit."""

    def module() -> Module:
        return kind(interval=interval, scheduler=lambda sam: {"scheduler": StepLR(sam, 2, 0.7), "interval": "step"})

    class Stop(Exception):
        pass

    class StopAt(Callback):
        def on_train_batch_start(self, runner: Trainer, *_: Any) -> None:
            if runner.global_step == step + 1:
                raise Stop

    data = partial(Resumable, samples(), batch_size=4)
    whole = Recorder()
    trainer(tmp_path, whole).fit(module(), data())

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
    with pytest.raises(Stop):
        trainer(tmp_path, saving, StopAt(), enable_checkpointing=True).fit(module(), data())
    resumed = Recorder()
    trainer(tmp_path, resumed).fit(module(), data(), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert resumed.steps == whole.steps[step:]
    assert same_bits(resumed.weights, whole.weights[step:])


@MODULES
def test_an_exception_at_w_plus_e_w_is_checkpointed_at_w(kind: type[Module], tmp_path: Path) -> None:
    class Failing(kind):  # type: ignore[misc, valid-type]
        passes = 0

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            self.passes += 1
            if self.passes == 6:
                assert self.sam.perturbed
                raise KeyError("data")
            return self.loss(batch)

    module, recorder = Failing(), Recorder()
    saving = OnExceptionCheckpoint(tmp_path, "failed")
    with pytest.raises(KeyError, match="data"):
        trainer(tmp_path, recorder, saving, enable_checkpointing=True).fit(module, loader())
    saved = torch.load(tmp_path / "failed.ckpt", weights_only=True)
    assert same_bits(flat(saved["state_dict"].values()), recorder.weights[-1])
    assert saved["global_step"] == 2


@MODULES
@pytest.mark.parametrize("skipped", ["both passes", "second pass"])
def test_a_batch_that_training_step_skips(kind: type[Module], skipped: str, tmp_path: Path) -> None:
    """Lightning lets it return None. The base optimizer then does nothing, as it would alone."""

    class Skipping(kind):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            again = self.optimizers().perturbed
            return None if batch_idx == 1 and (again or skipped == "both passes") else self.loss(batch)

    module = Skipping()
    run = fit(module, tmp_path)
    assert same_bits(run.weights[0], run.weights[1])
    assert not same_bits(run.weights[1], run.weights[2])


@MODULES
def test_gradients_that_are_there_do_not_count(kind: type[Module], tmp_path: Path) -> None:
    """Lightning's closure clears them in any case; zeros must not be taken for the gradient at w."""

    class Zeroing(kind):  # type: ignore[misc, valid-type]
        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
            self.zero_grad(set_to_none=False)

    module = Zeroing()
    expected = plain(module)
    assert_close(fit(module, tmp_path).weights, expected)
