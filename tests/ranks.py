"""Runs checks on several ranks: real processes, joined by gloo, started once for each world size and kept."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import runpy
import socket
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
from torch import Tensor

TIMEOUT = 300.0
"""Seconds for one check, and for starting the processes: what takes longer hangs, and is ended."""

ROOT = Path(__file__).parent.parent
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
PRELOAD = [
    "torch._dynamo",  # imported by the first optimizer
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "fastsam",
]
FRAMEWORKS = ["lightning.pytorch", "sklearn.datasets", "transformers.trainer"]


def forking_server() -> Any:
    """One server imports, and forks the processes, which would import else for many seconds each: of the frameworks
    those that this process has imported.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *(name for name in FRAMEWORKS if name in sys.modules)])
    return context


class Ranks:
    """Processes that share a process group."""

    def __init__(self, world_size: int) -> None:
        context = forking_server()
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
    return printed(out)


def launch(example: str, *args: str) -> dict[str, str]:
    """As `torchrun`, in processes that need not import torch; one example is run by torchrun itself (test_ddp.py)."""
    context = forking_server()
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        files = [Path(folder, str(rank)) for rank in range(2)]
        processes = [
            context.Process(target=_run_example, args=(rank, port, example, args, file), daemon=True)
            for rank, file in enumerate(files)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + TIMEOUT
        waiting = {process.sentinel: process for process in processes}
        failed = False
        while waiting and not failed:  # of one that failed, the other waits in vain
            ready = multiprocessing.connection.wait(waiting, max(deadline - time.monotonic(), 0))
            failed = not ready or any(waiting.pop(sentinel).exitcode != 0 for sentinel in ready)
        for process in processes:
            process.kill()
            process.join()
        texts = [file.read_text() if file.exists() else f"{file.name} did not start" for file in files]
    assert not failed, "\n".join(texts)
    return printed(texts[0])


def printed(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(.*): (.*)$", text, flags=re.MULTILINE))


def _run_example(rank: int, port: int, example: str, args: tuple[str, ...], file: Path) -> None:
    """In a process of its own: the example's file, with the environment that torchrun sets."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launched.items()})
    os.environ.update({"MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": LOOPBACK})
    torch.set_num_threads(1)
    sys.argv = [example, *args]
    sys.path.insert(0, str(ROOT / "examples"))  # as Python does for a script
    with file.open("w", buffering=1) as output, contextlib.redirect_stdout(output):
        try:
            runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
        except BaseException:
            traceback.print_exc(file=output)
            raise


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


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def assert_same_bits(t: Tensor, group: torch.distributed.ProcessGroup | None = None) -> None:
    """t is the same on all ranks of the group."""
    bits = t.detach().reshape(-1).view(torch.uint8)
    others = [torch.empty_like(bits) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(others, bits, group=group)
    assert all(torch.equal(bits, other) for other in others)
