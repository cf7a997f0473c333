"""LightningCLI builds FusedSAM from a YAML file, by its signature."""

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from fastsam import FusedSAM
from tests.frameworks.trainer import Module, loader

TRAINER = """
trainer: {max_epochs: 1, logger: false, enable_checkpointing: false, enable_progress_bar: false, accelerator: cpu,
          devices: 1, enable_model_summary: false}
"""
OPTIMIZER = """
optimizer:
  class_path: fastsam.FusedSAM
  init_args:
    base_optimizer:
      class_path: torch.optim.SGD
      init_args: {lr: 0.1, momentum: 0.9}
    rho: 0.2
    interval: 2
    closure_passes: two
"""


class FromFile(Module):
    """The optimizer comes from the configuration."""

    configure_optimizers = None

    def __init__(self) -> None:
        super().__init__()
        self.before = copy.deepcopy(self.layers.state_dict())

    def train_dataloader(self) -> object:
        return loader()


@pytest.mark.filterwarnings("ignore")
def test_a_yaml_file_trains(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(TRAINER + OPTIMIZER)
    cli = LightningCLI(FromFile, save_config_callback=None, args=["fit", "--config", str(path)])
    (sam,) = cli.trainer.optimizers
    assert type(sam) is FusedSAM
    assert type(sam.base_optimizer) is torch.optim.SGD
    group = sam.param_groups[0]
    assert (group["rho"], sam.interval, sam.closure_passes) == (0.2, 2, "two")
    assert (group["lr"], group["momentum"]) == (0.1, 0.9)
    assert group["sam_step"] == cli.trainer.global_step > 0
    assert any(not torch.equal(p, cli.model.before[name]) for name, p in cli.model.layers.named_parameters())
