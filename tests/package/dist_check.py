"""What `make dist` runs: installs each sdist and wheel into a fresh environment, as a user would, and takes a step.

Arguments: TORCH SETUPTOOLS FILE..., the first two requirements, as in the Makefile.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

SMOKE = """
import torch, fastsam
from fastsam import FusedSAM

w = torch.nn.Parameter(torch.ones(5))
sam = FusedSAM([w], torch.optim.SGD, lr=0.5)
w.grad = torch.full_like(w, 2.0)
sam.first_step(zero_grad=True)
assert not torch.equal(w, torch.ones(5))
w.grad = torch.ones_like(w)
sam.second_step()
assert torch.equal(w, torch.full_like(w, 0.5)), w
assert ("cpp" in fastsam.available_backends()) is {native}, fastsam.available_backends()
print(fastsam.__version__, fastsam.__file__, *fastsam.available_backends())
"""


def run(*command, cwd, **environment):
    environment = {key: value for key, value in {**os.environ, **environment}.items() if not key.startswith("PYTHON")}
    subprocess.run(command, cwd=cwd, env=environment, check=True)


def check(file, torch, setuptools):
    native = not file.name.endswith("none-any.whl")
    print(f"== {file.name}, with the native library: {native}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "env"
        venv.create(environment, with_pip=True)
        binaries = environment / "bin"
        pip = [binaries / "python", "-m", "pip", "-qq", "--disable-pip-version-check", "install"]
        run(*pip, torch, "numpy", cwd=folder)
        path = os.pathsep.join([str(binaries), os.environ["PATH"]])
        if file.suffix == ".whl":
            run(*pip, file, cwd=folder)
        else:
            run(*pip, "ninja", setuptools, cwd=folder)
            run(*pip, "--no-build-isolation", file, cwd=folder, PATH=path)
        run(binaries / "python", "-c", SMOKE.format(native=native), cwd=folder)
        run(binaries / "python", "-m", "fastsam", cwd=folder)


def check_unpacked(sdist):
    """The tests of the unpacked sdist, by the environment of `make`: all are found, and those of the package pass."""
    print(f"== tests of the unpacked {sdist.name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (root,) = Path(folder).iterdir()
        python = [sys.executable, "-m"]
        run(*python, "pytest", "-q", "--collect-only", "-o", "addopts=", "--no-summary", "-qq", cwd=root)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        run(*build, cwd=root, PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        run(*python, "pytest", "-q", "tests/package/test_package.py", "tests/optimizer/test_optimizer.py", cwd=root)


def main():
    torch, setuptools, *files = sys.argv[1:]
    for file in map(Path, files):
        check(file.resolve(), torch, setuptools)
        if file.suffix != ".whl":
            check_unpacked(file.resolve())


if __name__ == "__main__":
    main()
