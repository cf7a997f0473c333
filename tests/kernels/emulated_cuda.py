"""The kernels of csrc/cuda as a backend on CPU tensors, by the emulator of this folder: their arithmetic, indices and
alignment without a GPU. What it cannot tell: races, speed, and what nvcc makes of them.
"""

import ctypes
import functools
import re
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch

EMULATOR = Path(__file__).parent / "emulator"
KERNELS = Path(__file__).parents[2] / "csrc" / "cuda" / "sam_kernels.cuh"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
MOST_BLOCKS = 2048


@functools.cache
def library():
    source = KERNELS.read_text()
    # Fewer threads take more turns of each loop; the one instruction that is written in assembler gets a name.
    source, threads = re.subn(r"kThreads = 256;", "kThreads = 64;", source)
    source, atomics = re.subn(
        r"asm volatile\(.*?\);", "before = atomic_inc(counter, gridDim.x - 1);", source, flags=re.S
    )
    assert threads == atomics == 1
    source = source.replace('"../sam_math.h"', f'"{KERNELS.parent.parent / "sam_math.h"}"')
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sam_kernels.cuh").write_text(source)
        target = Path(folder, "emulated.so")
        headers = [f"-I{path}" for path in (folder, EMULATOR, Path(torch.__file__).parent / "include")]
        flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-w"]
        compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
        command = [compiler, *flags, *headers, str(EMULATOR / "sam.cpp"), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return ctypes.CDLL(str(target))


def call(function, *arguments):
    """Calls with the addresses of tensors."""
    getattr(library(), function)(
        *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int(a) for a in arguments)
    )


def combined(scalars):
    return scalars.rho, scalars.epsilon, len(scalars.rho), scalars.norm, scalars.scale


def bucket_arguments(bucket):
    return bucket.chunks, len(bucket.chunks), bucket.weight_table.tensor, bucket.grad_table.tensor


def is_fp64(scalars):
    return scalars.dtype is torch.float64


def norm(bucket, scalars, finish):
    blocks = min(max(len(bucket.chunks), 1), MOST_BLOCKS)
    sums = bucket.partials, bucket.counter, bucket.saved, scalars.square_sums[bucket.index :]
    arguments = *bucket_arguments(bucket), blocks, scalars.adaptive, *sums, finish, *combined(scalars)
    call("norm", DTYPES[bucket.dtype], is_fp64(scalars), *arguments)


def combine(scalars):
    call("combine", is_fp64(scalars), scalars.square_sums, len(scalars.square_sums), *combined(scalars))


def perturb(bucket, scalars):
    bucket.backup = bucket.allocate_backup()
    arguments = *bucket_arguments(bucket), scalars.adaptive, scalars.norm, scalars.scale, bucket.backup, bucket.saved
    call("perturb", DTYPES[bucket.dtype], is_fp64(scalars), *arguments, bucket.next_generation())
    torch.autograd.graph.increment_version(bucket.live_weights())


def restore(bucket):
    if bucket.backup is not None:
        call("restore", DTYPES[bucket.dtype], *bucket_arguments(bucket), bucket.backup, bucket.saved, bucket.generation)
        torch.autograd.graph.increment_version(bucket.live_weights())
        bucket.backup = None
