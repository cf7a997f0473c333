"""The files under examples/ run, and come to what they say."""

import ast
import importlib
import os
import runpy
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tests.oracle import copies, same_bits

pytestmark = pytest.mark.usefixtures("hears_nothing")

ROOT = Path(__file__).parents[2]
CHANCE = 0.1

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads({threads})
passes = 0
def kill(module, *_):
    global passes
    passes += isinstance(module, torch.nn.Sequential)
    if passes == {at} and isinstance(module, torch.nn.Sequential):
        os.kill(os.getpid(), signal.SIGTERM)
torch.nn.modules.module.register_module_forward_hook(kill)
from examples.checkpoint import train
train(Path(sys.argv[1]), steps=20)
"""


DISTRIBUTIONS = {"composer": "mosaicml", "omegaconf": "hydra-core", "tokenizers": "transformers"}
"""What to install for a module, where the name of its distribution does not say so here."""


def others_modules(path: Path) -> dict[str, int]:
    """The modules of other projects that a file imports at its top, each with the line of its first import."""
    own = {"bench", "examples", "fastsam", "torch", *sys.stdlib_module_names}
    found: dict[str, int] = {}
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in {name.partition(".")[0] for name in names} - own:
            found.setdefault(module, node.lineno)
    return found


SCRIPTS = [*sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "bench").glob("[!t]*.py"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_import_that_fails_says_what_to_install(path: Path) -> None:
    """A traceback shows the line of the import, and its comment with it."""
    lines = path.read_text().splitlines()
    for module, number in others_modules(path).items():
        name = DISTRIBUTIONS.get(module) or metadata.packages_distributions().get(module, [module])[0]
        comment = lines[number - 1].partition("  # pip install ")[2].split()
        assert name in comment, f"{path.name}:{number}: {lines[number - 1]}"


@pytest.mark.parametrize("form", ["two calls", "closure"])
def test_mixed_precision(form: str) -> None:
    assert importlib.import_module("examples.mixed_precision").train(form, epochs=4) > 5 * CHANCE


@pytest.mark.parametrize("what", ["model", "function"])
def test_compiled(what: str) -> None:
    torch.compiler.reset()
    compiled = importlib.import_module("examples.compiled").train(what, "aot_eager", epochs=2)
    torch.compiler.reset()
    torch.compiler.set_stance("force_eager")
    try:
        eager = importlib.import_module("examples.compiled").train(what, epochs=2)
    finally:
        torch.compiler.set_stance("default")
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert compiled < 1.5


def test_averaging() -> None:
    last, averaged = importlib.import_module("examples.averaging").main()
    assert min(last, averaged) > 8 * CHANCE


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:mmengine")
@pytest.mark.parametrize("name", ["train_skorch", "train_fabric", "train_hydra", "train_mmengine"])
def test_frameworks_that_take_it_as_it_is(name: str) -> None:
    assert importlib.import_module(f"examples.{name}").main() > 8 * CHANCE


def test_late_sam_comes_to_the_same_weights_either_way() -> None:
    train = importlib.import_module("examples.late_sam").train
    started, wrapped = train("start"), train("wrap")
    assert same_bits(copies(started.parameters()), copies(wrapped.parameters()))


def test_test_time_adaptation() -> None:
    before, after = importlib.import_module("examples.test_time_adaptation").main()
    assert after > before + 0.3


@pytest.mark.parametrize("name", ["train_ddp", "train_fsdp2"])
def test_examples_for_torchrun_say_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert str(end.value).startswith(f"start it by torchrun --standalone --nproc-per-node 2 examples/{name}.py")


@pytest.mark.parametrize("at", [11, 12], ids=["first pass", "second pass"])
def test_checkpoint_after_sigterm_resumes_bit_for_bit(at: int, tmp_path: Path) -> None:
    """Interval is 2, so passes 11 and 12 are those of the SAM step 7. The signal is a real one, in another process.

    That has as many threads as this one: on some processors the bits of matrix products depend on it.
    """
    train = importlib.import_module("examples.checkpoint").train
    before = signal.getsignal(signal.SIGTERM)
    try:
        whole = train(tmp_path / "whole.pt", steps=20)
        path = tmp_path / "killed.pt"
        killed = subprocess.run(
            [sys.executable, "-c", KILLED.format(at=at, threads=torch.get_num_threads()), path],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert killed.returncode == (1 if at == 12 else 0), killed.stderr
        assert ("stopped within step 7" in killed.stderr) == (at == 12)
        assert torch.load(path, weights_only=True)["done"] == (7 if at == 12 else 8)
        resumed = train(path, steps=20)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert same_bits(copies(resumed.parameters()), copies(whole.parameters()))
