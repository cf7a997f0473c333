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


KINDS = [("", ""), ("", "1"), ("", "3"), ("avx2", "8"), ("baseline", "4")]  # instruction set, parts
BITS = """
import hashlib, itertools, multiprocessing, os, sys, warnings, torch, torch._dynamo
warnings.simplefilter("ignore")
streamed, threads = (25 << 20) // 4, torch.get_num_threads()
def bytes_of(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)
def digest(tensor):
    return hashlib.sha256(bytes_of(tensor).numpy()).hexdigest()
sizes = [1, 63, 3, 4930, 7000, 16384, 41616, 300_000]  # at all sorts of alignments
def show(isa, parts):
    os.environ.update(FASTSAM_CPU_ISA=isa, FASTSAM_CPU_PARTS=parts)
    from fastsam import FusedSAM, _C
    assert not isa or _C.instruction_set() in ("baseline", isa)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for adaptive in (False, True):
            for last in (sizes[-1], streamed) if dtype is torch.float32 else (sizes[-1],):
                ends = [*itertools.accumulate([3, *sizes[:-1], last])]
                generator = torch.Generator().manual_seed(0)
                memory, grad = (torch.randn(ends[-1], generator=generator).to(dtype) for _ in range(2))
                before = memory.clone()
                params = [torch.nn.Parameter(memory[a:b]) for a, b in itertools.pairwise(ends)]
                for p, (a, b) in zip(params, itertools.pairwise(ends)):
                    p.grad = grad[a - 1 : b - 1]
                for n in (1, 2, 3):
                    torch.set_num_threads(n)
                    sam = FusedSAM(params, torch.optim.SGD, rho=100.0, adaptive=adaptive, backend="cpp", lr=0.1)
                    sam.first_step()
                    assert not torch.equal(memory, before)
                    [(_, bucket)] = sam._state.perturbation.buckets
                    print(*map(digest, (sam.grad_norm, bucket.partials, memory)))
                    sam.restore()
                    assert torch.equal(bytes_of(memory), bytes_of(before))
                torch.set_num_threads(threads)
for kind in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    assert "fastsam" not in sys.modules
    process = multiprocessing.get_context("fork").Process(target=show, args=kind)
    process.start()
    process.join()
    assert process.exitcode == 0, kind
"""


def test_bits_depend_on_nothing_but_the_layout():
    """Norm and perturbed weights by every instruction set, by any number of threads and of parts.

    The library is of one kind in a process, from its import on: each has one, forked off one that has imported torch.
    """
    command = [sys.executable, "-c", BITS, *itertools.chain(*KINDS)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    n = (4 * 2 + 2) * 3
    assert len(lines) == n * len(KINDS)
    for kind, first in zip(KINDS, range(0, len(lines), n), strict=True):
        found = lines[first : first + n]
        assert found[::3] == found[1::3] == found[2::3], f"threads, {kind}"
        assert found == lines[:n], kind


CHUNK = 16384


def norm_of(gradient, numel):
    """The norm of `gradient`, [CHUNK], over and over up to `numel` elements: chunks that all lie at one address."""
    starts = torch.arange(0, numel, CHUNK)
    zeros = torch.zeros_like(starts)
    chunks = torch.stack([zeros, (numel - starts).clamp(max=CHUNK), zeros, starts], dim=1)
    address = torch.tensor([gradient.data_ptr()])
    partials, square_sums = torch.zeros(len(chunks), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    adaptive, saved, counter = (torch.zeros(1, dtype=torch.int32) for _ in range(3))
    one, norm, scale = (torch.ones(1) for _ in range(3))
    op = torch.ops.fastsam.norm
    tables = chunks, address, address, gradient.dtype, 0, True, partials, adaptive
    op(*tables, one, one, square_sums, norm, scale, saved, counter)
    return float(norm)


def test_norm_of_1e9_elements():
    """The worst that a lane of fp32 can meet, by analysis: 1, and then squares of 2^-24, half a unit in the last place
    of 1. 31 of them are lost; the sum of squares may be short by 32 * 2^-24, and the norm by half of that.
    """
    bound = (32 / 2 + 1) * 2**-24  # the norm is rounded once more
    assert bound < 2e-6
    worst = torch.full((CHUNK,), 2.0**-12)
    worst[:32] = 1
    exact = float(worst.double().square().sum().sqrt())
    assert norm_of(worst, CHUNK) == pytest.approx(exact, rel=bound, abs=0)
    assert norm_of(worst, CHUNK * 61_035) == pytest.approx(exact * 61_035**0.5, rel=bound, abs=0)
    for equal in (0.1, 1 / 3, 1.7):
        gradient = torch.full((CHUNK,), equal)
        exact = float(gradient[0].double()) * 1e9**0.5
        assert norm_of(gradient, 10**9) == pytest.approx(exact, rel=bound, abs=0)


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
