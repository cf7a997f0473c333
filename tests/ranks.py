"""Runs checks on several ranks: real processes, joined by gloo, started once for each world size and kept."""

import multiprocessing
import multiprocessing.connection
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TIMEOUT = 60.0
"""Seconds for one check, and for starting the processes: what takes longer hangs, and is ended."""

ROOT = Path(__file__).parent.parent
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
PRELOAD = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "fastsam"]


class Ranks:
    """Processes that share a process group."""

    def __init__(self, world_size: int) -> None:
        # One server imports torch and forks the ranks, which would else import it each, in many seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder = tempfile.TemporaryDirectory()
        store = Path(self.folder.name, "store")
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, store, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        self.answers("the start")

    def run(self, check: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((check, args))
        return self.answers(check.__name__)

    def answers(self, what: str) -> list[Any]:
        """Of every rank, in order. A rank that fails leaves others waiting for it: the first failure ends them all."""
        answers: dict[Any, Any] = {}
        deadline = time.monotonic() + TIMEOUT
        while len(answers) < len(self.pipes):
            waiting = [pipe for pipe in self.pipes if pipe not in answers]
            ready = multiprocessing.connection.wait(waiting, deadline - time.monotonic())
            try:
                assert ready, f"{what} took longer than {TIMEOUT} s on ranks {[self.pipes.index(p) for p in waiting]}"
                for pipe in ready:
                    failure, answers[pipe] = pipe.recv()
                    assert failure is None, f"{what} failed on rank {self.pipes.index(pipe)}:\n{failure}"
            except (AssertionError, EOFError):
                self.end()
                raise
        return [answers[pipe] for pipe in self.pipes]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()
        running.pop(len(self.pipes), None)


running: dict[int, Ranks] = {}


def on_ranks(world_size: int, check: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls ``check(*args)``, a function of a test module, on every rank; gives what each returned."""
    if world_size not in running:
        running[world_size] = Ranks(world_size)
    return running[world_size].run(check, *args)


def torchrun(example: str, *args: str) -> dict[str, str]:
    """Runs a file of examples/ on 2 ranks, as its first lines say; gives the "name: value" lines that it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
    command += [f"examples/{example}", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its workers; killed, it would leave them running
            out, err = process.communicate()
    assert process.returncode == 0, err
    return dict(re.findall(r"^(.*): (.*)$", out, flags=re.MULTILINE))


def _serve(rank: int, world_size: int, store: Path, pipe: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    timeout = timedelta(seconds=TIMEOUT)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout
    )
    pipe.send((None, None))
    while True:
        try:
            check, args = pipe.recv()
        except EOFError:  # the tests are over
            return
        try:
            torch.manual_seed(0)
            pipe.send((None, check(*args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))


class PlainSAM:
    """Sharpness-aware minimization in a few lines of torch, in one process: the oracle."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer, rho: float, adaptive: bool = False) -> None:
        self.params = list(model.parameters())
        self.base = base
        self.rho = rho
        self.adaptive = adaptive

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True))

    def gradients_above(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        """The gradients at w + e_w; w is as before."""
        saved = [p.detach().clone() for p in self.params]
        pairs = list(zip(self.params, self.gradients(loss()), strict=True))
        with torch.no_grad():
            terms = flat([w.abs() * g if self.adaptive else g for w, g in pairs])
            self.norm = terms.double().square().sum().sqrt()
            for w, g in pairs:
                w += (w.square() if self.adaptive else 1) * g * self.rho / self.norm
        gradients = self.gradients(loss())
        with torch.no_grad():
            for w, before in zip(self.params, saved, strict=True):
                w.copy_(before)
        return gradients

    def step(self, gradients: list[Tensor]) -> None:
        for p, g in zip(self.params, gradients, strict=True):
            p.grad = g
        self.base.step()


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def assert_same_bits(t: Tensor, group: torch.distributed.ProcessGroup | None = None) -> None:
    """t is the same on all ranks of the group."""
    bits = t.detach().reshape(-1).view(torch.uint8)
    others = [torch.empty_like(bits) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(others, bits, group=group)
    assert all(torch.equal(bits, other) for other in others)
