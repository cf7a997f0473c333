"""csrc's CPU part compiled for 64-bit Arm, by a cross compiler: it stands on nothing that only x86 has."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.parametrize("source", ["csrc/ops.cpp", "csrc/survey.cpp", "csrc/cpu/sam_cpu.cpp"])
def test_it_compiles_and_contracts_nothing(source, tmp_path):
    """Arm has a fused multiply-add in its baseline: the flag that forbids it counts there as nowhere else."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is not installed; make arm-check wants it")
    flags = re.findall(r'^    ("-[^"]*")', (ROOT / "setup.py").read_text(), flags=re.MULTILINE)
    flags = [flag.strip('"') for flag in flags]
    assert "-ffp-contract=off" in flags
    includes = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{sysconfig.get_path('include')}"]
    assembly = tmp_path / "out.s"
    command = [COMPILER, *flags, "-Wall", "-Werror", "-DPy_LIMITED_API=0x030a0000", *includes]
    command += ["-S", source, "-o", str(assembly)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not re.findall(r"^\s+f(?:n?madd|n?msub|mla|mls)\b.*", assembly.read_text(), flags=re.MULTILINE)
