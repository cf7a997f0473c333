"""Builds fastsam, and with it the native libraries: fastsam._C wherever that is possible, fastsam._C_cuda with nvcc.

Both use the LibTorch stable ABI and Python's limited API: one library for every torch >= 2.10 and every Python >= 3.10;
`fastsam._C_cuda` for one major version of CUDA. They need torch at build time, so `pip install --no-build-isolation .`
builds them, while a plain, isolated `pip install .` sees no torch and makes a pure Python wheel that uses the `foreach`
backend. What counts for the CUDA library is a torch built for CUDA, not a GPU: machines that build often have none.

Environment: CXX names the compiler, MAX_JOBS bounds the parallel compilations, FASTSAM_BUILD_NATIVE=0 asks for the
pure wheel; CUDA_HOME and TORCH_CUDA_ARCH_LIST are torch's.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from typing import Any

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones cannot read pyproject.toml's SPDX license
    sys.exit(f"fastsam: setuptools >= 77 is needed, found {setuptools.__version__}: pip install 'setuptools>=77,<82'")

CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-ffp-contract=off",  # perturb must equal the reference bit for bit, and an FMA rounds once where it rounds twice
    "-fvisibility=hidden",
    f"-ffile-prefix-map={os.getcwd()}/=",  # messages name csrc/..., not the folder that pip built in
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the oldest torch that the library runs on: 2.10
]
NVCC_FLAGS = ["-std=c++20", "-O3", CXX_FLAGS[-1], f"-Xcompiler={','.join(f for f in CXX_FLAGS if f.startswith('-f'))}"]

PROBE = """
#include <concepts>
template <std::integral T> T twice(T x) { return x + x; }
extern "C" int probe(int x) { return twice(x); }
"""


def find_compiler() -> str | None:
    """The first of $CXX (alone, when set), c++, g++ and clang++ that builds a C++20 shared library."""
    chosen = os.environ.get("CXX")
    with tempfile.TemporaryDirectory() as folder:
        source, library = os.path.join(folder, "probe.cpp"), os.path.join(folder, "probe.so")
        with open(source, "w") as file:
            file.write(PROBE)
        for compiler in [chosen] if chosen else ["c++", "g++", "clang++"]:
            command = [*shlex.split(compiler), "-std=c++20", "-shared", "-fPIC", source, "-o", library]
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                continue
            return compiler
    return None


def native_obstacle() -> str | None:
    """Why no native library can be built here, or None. Sets $CXX to the compiler that can."""
    if os.environ.get("FASTSAM_BUILD_NATIVE") == "0":
        return "FASTSAM_BUILD_NATIVE=0"
    if sys.platform == "win32":
        return "Windows is not supported by the native library"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded Python has no limited API"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "Python's headers are not installed (Debian: apt install python3-dev)"
    try:
        import torch
    except (ImportError, OSError):
        return "torch cannot be imported at build time: install torch >= 2.10, then pip install --no-build-isolation"
    if torch.__version__ < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    compiler = find_compiler()
    if compiler is None:
        return f"no C++20 compiler was found (CXX={os.environ.get('CXX', '')})"
    os.environ["CXX"] = compiler  # torch compiles with $CXX or c++, setuptools links with $CXX or g++: say one for both
    return None


def cpu_library() -> setuptools.Extension:
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        name="fastsam._C",
        sources=[*sorted(glob.glob("csrc/*.cpp")), *sorted(glob.glob("csrc/cpu/*.cpp"))],
        depends=sorted(glob.glob("csrc/**/*.h", recursive=True)),
        extra_compile_args=CXX_FLAGS,
        py_limited_api=True,  # torch then defines Py_LIMITED_API and leaves libtorch_python out
    )


def cuda_home() -> str | None:
    """The CUDA toolkit's folder, from $CUDA_HOME, from nvcc itself (the one on the PATH may be a wrapper elsewhere), or
    where torch finds it.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return home
    if shutil.which("nvcc") is not None:
        answer = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.*)$", answer.stderr, flags=re.MULTILINE)
        if top:
            return os.path.realpath(top[1])
    from torch.utils.cpp_extension import CUDA_HOME  # not before: its value stays for the process

    return CUDA_HOME


def cuda_obstacle() -> str | None:
    """Why no CUDA library can be built here, or None. Sets $CUDA_HOME and $TORCH_CUDA_ARCH_LIST where they are not."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    home = cuda_home()
    nvcc = os.path.join(home or "", "bin", "nvcc")
    if home is None or not os.path.exists(nvcc):
        return "there is no nvcc (CUDA_HOME, PATH, or where torch.utils.cpp_extension looks)"
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version[0] != int(torch.version.cuda.split(".")[0]):
        return f"nvcc is of CUDA {version[0]}.{version[1]}, torch is built for {torch.version.cuda}"
    os.environ["CUDA_HOME"] = home
    if not torch.cuda.is_available():  # torch would build for the GPUs that it sees
        newest = "9.0;10.0;12.0+PTX" if version >= (12, 8) else "9.0+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;{newest}")  # the kernels are bounded for sm_80 on
    return None


def cuda_library() -> setuptools.Extension:
    from torch.utils.cpp_extension import CUDAExtension

    return CUDAExtension(
        name="fastsam._C_cuda",
        sources=["csrc/cuda/sam_cuda.cu"],
        depends=sorted(glob.glob("csrc/**/*.*h", recursive=True)),
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        py_limited_api=True,
    )


def native_build() -> dict[str, Any]:
    """The arguments for setup() that build the native libraries; none where they cannot be built."""
    obstacle = native_obstacle()
    if obstacle is not None:
        print(f"fastsam: pure Python build, without the native library: {obstacle}", file=sys.stderr)
        return {}
    without_cuda = cuda_obstacle()  # before cpp_extension looks for CUDA by itself
    if without_cuda is not None:
        print(f"fastsam: without the CUDA library: {without_cuda}", file=sys.stderr)
    from torch.utils.cpp_extension import BuildExtension

    return {
        "ext_modules": [cpu_library(), *([cuda_library()] if without_cuda is None else [])],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setuptools.setup(**native_build())
