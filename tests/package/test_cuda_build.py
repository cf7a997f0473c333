"""csrc/cuda compiled by nvcc, where it is there, and its machine code: no GPU and no torch with CUDA is needed.

`make cuda-build-check` builds and imports the whole library, against a torch that is built for CUDA.
"""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from tests.package.machine_code import aligned_loops, body_loops, count, facts

SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "sam_cuda.cu"
CAPABILITIES = [80, 90]
ADAPTIVE_FORMS = 2

MOST_REGISTERS = 48
"""Of every kernel: 40 warps on a multiprocessor."""


def compile_source(capability, into):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed; make cuda-build-check needs it too")
    torch_headers = Path(torch.__file__).parent / "include"
    python_headers = sysconfig.get_path("include")
    flags = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
    includes = [f"-I{torch_headers}", f"-I{python_headers}"]
    command = ["nvcc", *flags, *includes, "-cubin", f"-arch=sm_{capability}", str(SOURCE), "-o", str(into)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return facts(into.read_bytes())


@pytest.fixture(scope="module", params=CAPABILITIES, ids="sm_{}".format)
def kernels(request, tmp_path_factory):
    return compile_source(request.param, tmp_path_factory.mktemp("cuda") / "sam.cubin")


def named(kernels, name):
    found = {symbol: kernel for symbol, kernel in kernels.items() if f"{name}_kernel" in symbol}
    assert found
    return found


def test_every_dtype_has_its_kernels(kernels):
    counts = {name: len(named(kernels, name)) for name in ("norm", "perturb", "restore", "combine")}
    assert counts == {"norm": 8, "perturb": 8, "restore": 4, "combine": 2}  # dtypes x ascent dtypes


def test_nothing_spills(kernels):
    for symbol, kernel in kernels.items():
        assert kernel["stack"] == kernel["local"] == 0, symbol
        assert kernel["registers"] <= MOST_REGISTERS, symbol
        assert not [op for op in kernel["opcodes"] if op.startswith(("LDL", "STL"))], symbol


def test_all_memory_is_said_to_be_global(kernels):
    for symbol, kernel in kernels.items():
        assert not [op for op in kernel["opcodes"] if re.match(r"(LD|ST)(\.|$)", op)], symbol


def test_norm_loads_vectors(kernels):
    for symbol, kernel in named(kernels, "norm").items():
        loops = aligned_loops(kernel)
        assert len(loops) >= ADAPTIVE_FORMS, symbol
        assert all(count(loop, "LDG") >= 2 and count(loop, "ST") == count(loop, "SHFL") == 0 for loop in loops), symbol


def test_perturb_moves_vectors_several_in_flight(kernels):
    for symbol, kernel in named(kernels, "perturb").items():
        loops = aligned_loops(kernel)
        assert len(loops) >= ADAPTIVE_FORMS, symbol
        for loop in loops:
            assert count(loop, "LDG") == count(loop, "STG") >= 4, symbol
            first_store = next(i for i, op in enumerate(loop) if op.startswith("STG"))
            assert count(loop[:first_store], "LDG") >= 4, symbol


def test_perturb_keeps_vectors_for_w_where_the_gradient_is_misaligned(kernels):
    for symbol, kernel in named(kernels, "perturb").items():
        loops = [loop for loop in body_loops(kernel) if loop not in aligned_loops(kernel)]
        assert loops, symbol
        assert all(op.endswith(".128") for loop in loops for op in loop if op.startswith("STG")), symbol


def test_restore_moves_vectors(kernels):
    for symbol, kernel in named(kernels, "restore").items():
        assert any(count(loop, "LDG") == count(loop, "STG") >= 2 for loop in aligned_loops(kernel)), symbol


def test_perturb_rounds_every_operation(kernels):
    for symbol, kernel in named(kernels, "perturb").items():
        assert not [op for op in kernel["opcodes"] if re.match(r"[FD]FMA|HFMA2\.(?!MMA)", op)], symbol


def test_the_last_block_sees_every_partial(kernels):
    for symbol, kernel in named(kernels, "norm").items():
        assert [op for op in kernel["opcodes"] if op.startswith("MEMBAR")], symbol
        assert [op for op in kernel["opcodes"] if op.startswith("CCTL.IVALL")], symbol
        assert [op for op in kernel["opcodes"] if re.match(r"ATOMG.*INC", op)], symbol


def test_it_compiles_for_blackwell(tmp_path):
    compile_source(100, tmp_path / "sam.cubin")
