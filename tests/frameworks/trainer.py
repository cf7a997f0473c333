"""A small LightningModule, a quiet Trainer for it, and what plain torch comes to: the oracle."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import FusedSAM
from fastsam.lightning import SAMMixin
from tests.oracle import PlainSAM
from tests.ranks import flat

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

BATCH, BATCHES, EPOCHS = 4, 5, 2
RHO = 0.3
"""Large, so that a step without it ends up elsewhere."""

Batch = tuple[Tensor, Tensor]


def sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


class Module(LightningModule):
    """What a user writes: FusedSAM in configure_optimizers, and nothing else about it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = self.build()
        self.base = options.pop("base", sgd)
        self.scheduler = options.pop("scheduler", lambda sam: None)
        self.options = {"rho": RHO, **options}

    def build(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        self.sam = FusedSAM(self.base(self.parameters()), **self.options)
        scheduler = self.scheduler(self.sam)
        return self.sam if scheduler is None else {"optimizer": self.sam, "lr_scheduler": scheduler}


class MixedModule(SAMMixin, Module):
    """The same with the mixin."""


class Manual(Module):
    """Two calls, by manual optimization."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        sam = self.optimizers()
        self.manual_backward(self.loss(batch))
        if sam.first_step(zero_grad=True):
            self.manual_backward(self.loss(batch))
        sam.second_step(zero_grad=True)


class Recorder(Callback):
    """The weights, the learning rate and Lightning's count after every step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.rates: list[float] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        assert not module.sam.perturbed
        self.weights.append(flat(module.parameters()))
        self.rates.append(module.sam.param_groups[0]["lr"])
        self.steps.append(trainer.global_step)


def samples(batches: int = BATCHES) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * BATCH, 8, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (len(x),), generator=generator))


def loader(batches: int = BATCHES) -> DataLoader:
    return DataLoader(samples(batches), BATCH)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    quiet |= {"accelerator": "cpu", "devices": 1, "max_epochs": EPOCHS, "default_root_dir": folder}
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(module: Module, folder: Path, *callbacks: Callback, data: DataLoader | None = None, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer(folder, recorder, *callbacks, **options).fit(module, data or loader())
    return recorder


def fp16(init_scale: float = 2.0**10) -> list[MixedPrecision]:
    """Lightning's 16-mixed on CPU, where precision="16-mixed" would give bf16-mixed."""
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3))]


def plain(
    module: Module,
    interval: int = 1,
    clip: Callable[[list[Tensor]], object] | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    scheduler: Callable[[Any], Any] | None = None,
    every: int = 1,
    start: int = 0,
) -> list[Tensor]:
    """The weights after every step of SAM as plain torch has it, from where the module is now.

    Args:
        module: stays as it is.
        interval: every which step is a SAM step.
        clip: changes the gradients that the base optimizer steps by.
        autocast: a context for the forward pass.
        scheduler: made from the optimizer.
        every: after how many steps the scheduler steps.
        start: the first step that may be a SAM step.
    """
    layers = copy.deepcopy(module.layers)
    base = module.base(layers.parameters())
    sam = PlainSAM(layers, base, RHO)
    schedule = scheduler(base) if scheduler is not None else None
    weights = []
    for step, (x, y) in enumerate(list(loader()) * EPOCHS):

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            with autocast():
                return nn.functional.cross_entropy(layers(x), y)

        is_sam_step = step >= start and (step + 1) % interval == 0
        gradients = sam.gradients_above(loss) if is_sam_step else sam.gradients(loss())
        if clip is not None:
            clip(gradients)
        sam.step(gradients)
        if schedule is not None and (step + 1) % every == 0:
            schedule.step()
        weights.append(flat(layers.parameters()))
    return weights


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 2e-5) -> None:
    assert len(actual) == len(expected)
    torch.testing.assert_close(torch.stack(actual), torch.stack(expected), rtol=tolerance, atol=tolerance)


def momentum_by_hand(
    module: Module,
    start: int = 0,
    clip: Callable[[list[Tensor]], object] | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights after every step of Momentum-SAM in plain torch, and the losses at w + e_w; as `plain`."""
    layers = copy.deepcopy(module.layers)
    base = module.base(layers.parameters())
    sam = PlainSAM(layers, base, RHO, start=start, direction="momentum")
    weights, losses = [], []
    for x, y in list(loader()) * EPOCHS:

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            with autocast():
                value = nn.functional.cross_entropy(layers(x), y)
            losses.append(value.detach())
            return value

        gradients = sam.gradients_above(loss) if sam.is_sam_step else sam.gradients(loss())
        if clip is not None:
            clip(gradients)
        sam.step(gradients)
        weights.append(flat(sam.params))
    return weights, losses
