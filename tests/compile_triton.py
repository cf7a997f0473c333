"""Compiles every Triton kernel for GPUs that need not be here, and prints what the machine code is like, as JSON.

Run by test_triton_compile.py in a process of its own: under TRITON_INTERPRET=1 there is nothing to compile.

    python compile_triton.py [80 90 100]
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsam.backends import triton as kernels

NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

TABLES = {"chunks": "*i64", "weights": "*i64", "grads": "*i64"}


def variants():
    """(name, kernel, signature, constants, options) of every kernel, as its launcher calls it."""
    for dtype, name in NAMES.items():
        shape = kernels.shape(dtype)
        options = {"num_warps": shape.pop("num_warps")}
        real = "*fp64" if name == "fp64" else "*fp32"
        scalars = {"rho": real, "epsilon": real, "n_groups": "i32", "norm": real, "scale": real}
        saved = {"backup": f"*{name}", "saved": "*i32"}
        for adaptive in (False, True):
            form = "asam" if adaptive else "sam"
            signature = {
                "chunks": "*i64",
                "n_chunks": "i32",
                "per_program": "i32",
                "weights": "*i64",
                "grads": "*i64",
                "adaptive": "*i32",
                "partials": "*fp64",
                "counter": "*i32",
                "saved": "*i32",
                "square_sums": "*fp64",
                "index": "i32",
                **scalars,
            }
            constants = {"DTYPE": kernels.DTYPES[dtype], "ADAPTIVE": adaptive, "FINISH": True, **shape}
            yield f"norm {name} {form}", kernels._norm, signature, constants, options
            signature = {**TABLES, "adaptive": "*i32", "norm": real, "scale": real, **saved}
            constants = {"ADAPTIVE": adaptive, **shape}
            yield f"perturb {name} {form}", kernels._perturb, signature, constants, options | kernels.UNFUSED
        yield f"restore {name}", kernels._restore, {**TABLES, **saved}, shape, options
    for real in ("*fp32", "*fp64"):
        signature = {"square_sums": "*fp64", "n_buckets": "i32", "rho": real, "epsilon": real, "n_groups": "i32"}
        yield f"combine {real[1:]}", kernels._combine, {**signature, "norm": real, "scale": real}, {}, {"num_warps": 1}


def build(kernel, signature, constants, options, capability):
    assert list(signature) + list(constants) == kernel.arg_names, kernel.arg_names
    # What the JIT finds out at a call: torch's allocations start at multiples of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def inner_loops(sass):
    """The instructions of each loop that holds no other, from the backward branches."""
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    ranges = []
    for at, text in code:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            ranges.append((int(branch[1], 16), at))
    inner = [r for r in ranges if not any(o != r and r[0] <= o[0] and o[1] <= r[1] for o in ranges)]
    return [[text for at, text in code if first <= at <= last] for first, last in inner]


def facts(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        run = [str(CUOBJDUMP), "--dump-resource-usage", "--dump-sass", cubin.name]
        dump = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump)
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", dump, re.MULTILINE)
    loops = [re.findall(r"\b((?:LDG|STG|LD|ST|SHFL|BAR)\b[\w.]*)", "\n".join(loop)) for loop in inner_loops(dump)]
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "local": int(usage[4]),
        "opcodes": sorted(set(opcodes)),
        "loops": loops,
        "ptx": sorted(
            set(re.findall(r"^\s+(?:@\S+\s+)?((?:fma|mul|add|sqrt|div|rcp|atom)\.[\w.]+)", compiled.asm["ptx"], re.M))
        ),
    }


def main():
    found = {}
    for capability in map(int, sys.argv[1:]):
        for name, *variant in variants():
            found[f"sm_{capability} {name}"] = facts(build(*variant, capability))
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
