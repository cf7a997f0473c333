"""What only the native CPU library has: instruction sets chosen at run time, and streaming stores in large buckets."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastsam import FusedSAM, backends
from tests.oracle import copies, perturbed, same_bits

ROOT = Path(__file__).parents[2]
STREAMED = 33 << 20  # bytes of a bucket that is written past the caches


@pytest.fixture(autouse=True)
def native():
    if (reason := backends.missing("cpp")) is not None:
        pytest.skip(f"backend cpp is missing: {reason}")


def test_the_kernels_are_of_the_instruction_set_that_is_asked_for():
    from fastsam import _C

    sets = {"baseline": {"baseline"}, "avx2": {"baseline", "avx2"}}
    assert _C.instruction_set() in sets.get(os.environ.get("FASTSAM_CPU_ISA"), {"baseline", "avx2", "avx512"})


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets(isa):
    """All tests of the kernels again, on a processor that is told to have less."""
    files = [f"tests/kernels/{file}.py" for file in ("test_native", "test_kernels")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "asked_for or cpp"]
    # pytest's plugins take as long to load as torch does.
    environment = {**os.environ, "FASTSAM_CPU_ISA": isa, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streaming_stores(dtype, adaptive):
    """At every alignment, by two threads; the reads after the step must see what was streamed."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(STREAMED // dtype.itemsize, generator=generator).to(dtype)
    cuts = [0, 1, 4, 99, 1_000_003, 2_500_000, len(memory)]
    params = [nn.Parameter(memory[a:b]) for a, b in itertools.pairwise(cuts)]
    grad = torch.randn(len(memory) + 1, generator=generator).to(dtype)[1:]
    for p, (a, b) in zip(params, itertools.pairwise(cuts), strict=True):
        p.grad = grad[a:b]
    before = memory.clone()
    sam = FusedSAM(params, torch.optim.SGD, rho=100.0, adaptive=adaptive, backend="cpp", lr=0.1)
    sam.first_step()
    assert torch.equal(memory, perturbed(before, grad, sam.grad_norm, 100.0, 1e-12, adaptive))
    assert float((memory != before).double().mean()) > 0.5
    sam.restore()
    assert same_bits(memory, before)
    assert same_bits(copies(params), [before[a:b] for a, b in itertools.pairwise(cuts)])
