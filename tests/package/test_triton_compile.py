"""The machine code of every Triton kernel, compiled ahead of time: no GPU is needed.

What is asserted is what bandwidth and bits hang on: vector width, registers, spills, contraction to FMA. Times are not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton

from tests.package.machine_code import aligned_loops, body_loops, count

HERE = Path(__file__).parent
FORMS = ["sam", "asam"]
DTYPES = ["fp32", "fp64", "bf16", "fp16"]
CAPABILITIES = [80, 90]

MOST_REGISTERS = 48
"""Of every kernel: 40 warps on a multiprocessor."""

OLD_ASSEMBLER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5)

FULL_OCCUPANCY = 32
"""Registers that let 64 warps, all of them, on a multiprocessor of sm_80 and sm_90."""


def compile_all(*capabilities):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent.parent)
    command = [sys.executable, str(HERE / "compile_triton.py"), *map(str, capabilities)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def compiled():
    return compile_all(*CAPABILITIES, 100)


def aligned_loop(facts):
    (loop,) = aligned_loops(facts)
    return loop


def each(kernel, forms=FORMS):
    names = [f"{kernel} {dtype} {form}".strip() for dtype in DTYPES for form in forms]
    return [
        pytest.param(f"sm_{c} {name}", id=f"sm_{c}-{name.replace(' ', '-')}") for c in CAPABILITIES for name in names
    ]


def test_nothing_spills(compiled):
    """The assembler of Triton before 3.5 spills 8 bytes of the fp32 norm, outside of the loops over elements."""
    for name, facts in compiled.items():
        assert facts["local"] == 0, name
        if OLD_ASSEMBLER and name.endswith(" norm fp32 sam"):
            assert facts["stack"] <= 8, name
            assert not [op for loop in body_loops(facts) for op in loop if op.startswith(("LDL", "STL"))], name
            continue
        assert facts["stack"] == 0, name
        assert not [op for op in facts["opcodes"] if op.startswith(("LDL", "STL"))], name


def test_registers_leave_room_for_many_warps(compiled):
    for name, facts in compiled.items():
        assert facts["registers"] <= MOST_REGISTERS, name
        if "fp32" in name and "norm fp32 asam" not in name and not name.startswith("sm_100"):
            assert facts["registers"] <= FULL_OCCUPANCY, name


@pytest.mark.parametrize("name", each("norm"))
def test_norm_loads_vectors_and_shuffles_nothing_in_its_loop(compiled, name):
    loop = aligned_loop(compiled[name])
    assert count(loop, "LDG") >= 2
    assert count(loop, "ST") == count(loop, "SHFL") == count(loop, "BAR") == 0


@pytest.mark.parametrize("name", [*each("norm"), *each("perturb")])
def test_a_chunk_s_record_and_addresses_are_loaded_without_a_branch(compiled, name):
    """Each wait costs a trip to memory: for the record, for what its slot and group tell of, and then for the data."""
    adaptive = name.endswith("asam")
    if " norm " in name:
        expected = 3 + 1 + 2 * adaptive  # slot, length, offset; g; w and the flag
    else:
        expected = 4 + 2 + 2 + adaptive  # offset in the backup too; g and w; norm and scale; the flag
    assert len(compiled[name]["prologue"]) >= expected


@pytest.mark.parametrize("name", each("perturb"))
def test_perturb_moves_vectors_several_in_flight(compiled, name):
    loop = aligned_loop(compiled[name])
    assert count(loop, "LDG") >= 4
    assert count(loop, "STG") == count(loop, "LDG")  # w, g -> backup, w
    first_store = next(i for i, op in enumerate(loop) if op.startswith("STG"))
    assert count(loop[:first_store], "LDG") >= 4


@pytest.mark.parametrize("name", each("perturb"))
def test_perturb_keeps_vectors_for_w_where_the_gradient_is_misaligned(compiled, name):
    (loop,) = [loop for loop in body_loops(compiled[name]) if not all(op.endswith(".128") for op in loop)]
    stores = [op for op in loop if op.startswith("STG")]
    assert stores
    assert all(op.endswith(".128") for op in stores)
    assert sum(op.endswith(".128") for op in loop if op.startswith("LDG")) * 2 == len(stores)


@pytest.mark.parametrize("name", each("restore", forms=[""]))
def test_restore_moves_vectors(compiled, name):
    loop = aligned_loop(compiled[name])
    assert count(loop, "LDG") == count(loop, "STG") >= 2


@pytest.mark.parametrize("name", each("perturb"))
def test_perturb_rounds_every_operation(compiled, name):
    facts = compiled[name]
    assert not [op for op in facts["opcodes"] if op.startswith(("FFMA", "DFMA"))]
    assert not [op for op in facts["ptx"] if op.startswith("fma.") or ".ftz" in op]


@pytest.mark.parametrize("name", each("norm"))
def test_norm_is_finished_as_torch_would(compiled, name):
    ptx = compiled[name]["ptx"]
    assert "sqrt.rn.f64" in ptx
    assert [op for op in ptx if op.startswith("div.") and "f" in op] == ["div.rn.f64"]
    assert not [op for op in ptx if ".approx" in op or ".ftz" in op]


@pytest.mark.parametrize("name", each("norm"))
def test_the_last_block_sees_every_partial(compiled, name):
    """The count releases and acquires; each of the two is an instruction of its own in the machine code."""
    facts = compiled[name]
    assert "atom.global.gpu.acq_rel.add.u32" in facts["ptx"]
    assert [op for op in facts["opcodes"] if op.startswith("MEMBAR")]
    assert [op for op in facts["opcodes"] if op.startswith("CCTL.IVALL")]


def test_all_compile_for_blackwell(compiled):
    assert len([name for name in compiled if name.startswith("sm_100 ")]) == len(DTYPES) * 5 + 2
