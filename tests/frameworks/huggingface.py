"""Accelerate's singletons in tests: anew for each, in this process and on ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from tests.scaled import make_scaler

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


@contextmanager
def fresh_state() -> Iterator[None]:
    _reset()
    try:
        yield
    finally:
        _reset()


@contextmanager
def launched() -> Iterator[None]:
    """On a rank of distributed.py: the process group is there, the environment that torchrun sets is not."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    before = {name: os.environ.get(name) for name in LAUNCHER}
    os.environ.update(dict(zip(LAUNCHER, (rank, rank, size, size, "localhost", "29500", "1"), strict=True)))
    try:
        with fresh_state():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def scale_losses(accelerator: Accelerator) -> None:
    """What mixed_precision="fp16" sets on a GPU; Accelerate refuses it on CPU. Autocast leaves fp64 models alone."""
    accelerator.scaler = make_scaler()
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"


def _reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
