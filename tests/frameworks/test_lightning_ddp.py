"""Lightning's DDP strategy on 2 ranks, by gloo."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from tests.frameworks.trainer import (
    BATCH,
    BATCHES,
    EPOCHS,
    RHO,
    Manual,
    MixedModule,
    Module,
    assert_close,
    fit,
    samples,
)
from tests.oracle import PlainSAM
from tests.ranks import assert_same_bits, flat, on_ranks

KINDS = {"automatic": Module, "mixin": MixedModule, "manual": Manual}


def train(kind: str, own_ascent: bool, interval: int) -> list[Tensor]:
    """On every rank, as torchrun would start it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    launched |= {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    module = KINDS[kind](interval=interval)
    contexts = []

    def no_sync() -> Any:
        assert isinstance(module.trainer.model, DistributedDataParallel)
        contexts.append(module.sam.perturbed)
        return module.trainer.model.no_sync()

    if own_ascent:
        module.options["first_pass_context"] = no_sync
    with (
        patch.dict(os.environ, {name: str(value) for name, value in launched.items()}),
        tempfile.TemporaryDirectory() as folder,
    ):
        # Lightning's own sampler would shuffle.
        options = {"strategy": "ddp", "devices": ranks, "use_distributed_sampler": False}
        mine = DataLoader(Subset(samples(), range(rank, BATCHES * BATCH, ranks)), BATCH)
        run = fit(module, Path(folder), data=mine, plugins=[TorchElasticEnvironment()], **options)
    assert contexts == [False] * (len(run.weights) // interval if own_ascent else 0)
    for w in run.weights:
        assert_same_bits(w)
    return run.weights


def expected(own_ascent: bool, interval: int) -> list[Tensor]:
    """In one process: sample i is rank i % 2's."""
    layers = copy.deepcopy(Module().layers)
    sam = PlainSAM(layers, torch.optim.SGD(layers.parameters(), lr=0.1, momentum=0.9), RHO)
    x, y = samples().tensors
    weights = []
    for epoch in [range(0, BATCH * BATCHES // 2, BATCH)] * EPOCHS:
        for start in epoch:
            shares = []
            for rank in (0, 1):
                mine = slice(2 * start + rank, 2 * (start + BATCH), 2)
                shares.append(lambda mine=mine: nn.functional.cross_entropy(layers(x[mine]), y[mine]))

            def union(shares: list[Callable[[], Tensor]] = shares) -> Tensor:
                return (shares[0]() + shares[1]()) / 2

            if (len(weights) + 1) % interval:
                gradients = sam.gradients(union())
            elif own_ascent:
                both = [sam.gradients_above(share) for share in shares]
                gradients = [(a + b) / 2 for a, b in zip(*both, strict=True)]
            else:
                gradients = sam.gradients_above(union)
            sam.step(gradients)
            weights.append(flat(layers.parameters()))
    return weights


@pytest.mark.parametrize(
    ("kind", "own_ascent", "interval"),
    [
        ("automatic", False, 1),
        ("automatic", True, 1),
        ("automatic", True, 2),
        ("mixin", True, 2),
        ("manual", False, 2),
    ],
)
def test_replicas_stay_equal(kind: str, own_ascent: bool, interval: int) -> None:
    runs = on_ranks(2, train, kind, own_ascent, interval)
    assert_close(runs[0], expected(own_ascent, interval))
