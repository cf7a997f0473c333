"""Compiles every Triton kernel for GPUs that need not be here, and prints what the machine code is like, as JSON.

Run by test_triton_compile.py in a process of its own: under TRITON_INTERPRET=1 there is nothing to compile.

    python compile_triton.py [80 90 100]
"""

import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsam.backends import triton as kernels
from tests.package import machine_code

NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}

TABLES = {"chunks": "*i64", "weights": "*i64", "grads": "*i64"}


def variants():
    """(name, kernel, signature, constants, options) of every kernel, as its launcher calls it."""
    for dtype, name in NAMES.items():
        shape = kernels.shape(dtype)
        options = {"num_warps": shape.pop("num_warps")}
        real = "*fp64" if name == "fp64" else "*fp32"
        scalars = {"rho": real, "epsilon": real, "n_groups": "i32", "norm": real, "scale": real}
        saved = {"backup": f"*{name}", "saved": "*i32", "generation": "i32"}
        for adaptive in (False, True):
            form = "asam" if adaptive else "sam"
            signature = {
                "chunks": "*i64",
                "per_program": "i32",
                "longer": "i32",
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


def facts(compiled):
    (found,) = machine_code.facts(compiled.asm["cubin"]).values()
    arithmetic = r"^\s+(?:@\S+\s+)?((?:fma|mul|add|sqrt|div|rcp|atom)\.[\w.]+)"
    return {**found, "ptx": sorted(set(re.findall(arithmetic, compiled.asm["ptx"], re.MULTILINE)))}


def main():
    found = {}
    for capability in map(int, sys.argv[1:]):
        for name, *variant in variants():
            found[f"sm_{capability} {name}"] = facts(build(*variant, capability))
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
