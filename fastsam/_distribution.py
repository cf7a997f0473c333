"""Where this fastsam comes from, and what it lacks here: the native library, a compiler, a GPU.

The distribution is called fused-sam: on PyPI, ``fastsam`` is another project, whose folder has the same name.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

__all__ = ["build_command", "compiler", "no_gpu", "warn_of_another_owner", "why_missing"]

NAME = "fused-sam"
HERE = Path(__file__).parent
CLONE = HERE.parent if (HERE.parent / "setup.py").exists() else None
"""The folder of the sources, where they are what is imported."""

COMPILERS = {
    "xcode-select": "xcode-select --install",
    "apt-get": "apt install g++",
    "dnf": "dnf install gcc-c++",
    "zypper": "zypper install gcc-c++",
    "pacman": "pacman -S gcc",
    "apk": "apk add g++",
}
"""The command that installs a C++ compiler, by the program that runs it, in the order in which they are looked for."""


def warn_of_another_owner() -> None:
    """Warns where a distribution called ``fastsam`` has files in this folder, which then are no longer one's own."""
    try:
        other = metadata.distribution("fastsam")
    except metadata.PackageNotFoundError:
        return
    if any(Path(str(other.locate_file(file))).parent == HERE for file in other.files or ()):
        warnings.warn(
            f"the distribution fastsam {other.version} is installed into the folder of fused-sam, {HERE}; it is "
            "another project, or an old name of this one: pip uninstall fastsam, then install fused-sam again with "
            "--force-reinstall --no-deps",
            stacklevel=3,
        )


def why_missing(error: ImportError) -> str:
    """Why ``fastsam._C`` cannot be imported, and the command that gets it.

    pip shows nothing of a build that went well without the library, so the cause is looked for here.

    Args:
        error: what the import raised.
    """
    if sys.platform == "win32":
        return "the native library is not built for Windows"
    if torch.__version__ < "2.10":
        return (
            f"torch {torch.__version__} is older than 2.10, which the native library needs: pip install --upgrade "
            f"torch, and then {build_command()}"
        )
    if not isinstance(error, ModuleNotFoundError):
        return f"the native library cannot be loaded ({error}). Build it again: {build_command()}"
    installed = installed_elsewhere()
    if installed is not None:
        return (
            f"{HERE} holds the sources, without the native library, and hides the installed package, {installed}. Run "
            f"Python in another folder than {CLONE}, or install in place: {build_command()}"
        )
    if compiler() is None:
        wanted = next((command for program, command in COMPILERS.items() if shutil.which(program)), "g++ or clang++")
        if "CXX" in os.environ:
            wanted = f"unset CXX ({os.environ['CXX']} does not run)"
        return f"the native library was not built, for want of a C++20 compiler: {wanted}, and then {build_command()}"
    return (
        "the native library was not built: pip hides torch from the build unless it is told not to. Build "
        f"it: {build_command()} (with -v the build says what else it lacks)"
    )


def build_command() -> str:
    """The command that builds the native libraries, from the source that fastsam was installed from."""
    if CLONE is not None:
        return f"pip install --no-build-isolation -e {shlex.quote(str(CLONE))}"
    return f"pip install --no-build-isolation --no-deps --force-reinstall {source()}"


def source() -> str:
    """What pip was given when it installed this, where that can be built again."""
    for distribution in metadata.distributions(name=NAME):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        url = origin.get("url", "")
        if "vcs_info" in origin:
            return shlex.quote(f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}")
        if url and not url.endswith(".whl"):
            return shlex.quote(url2pathname(urlsplit(url).path) if url.startswith("file:") else url)
    return "<the source of fastsam>"


def installed_elsewhere() -> Path | None:
    """The package as pip installed it, where the sources hide it: Python looks in the folder it runs in first."""
    if CLONE is None:
        return None
    for distribution in metadata.distributions(name=NAME):
        folder = Path(str(distribution.locate_file("fastsam")))
        if folder != HERE and folder.is_dir():
            return folder
    return None


def no_gpu() -> str | None:
    """Why there is no GPU for a backend; None where there is one. It initialises nothing: the devices are NVML's."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA: https://pytorch.org/get-started/locally"
    if torch.cuda.device_count() == 0:
        return "no CUDA device here (nvidia-smi shows those that the driver finds)"
    return None


def compiler() -> str | None:
    """The C++ compiler that a build would take, with its version; None where there is none that runs."""
    chosen = os.environ.get("CXX")
    for command in [chosen] if chosen else ["c++", "g++", "clang++"]:
        path = shutil.which(shlex.split(command)[0])
        if path is None:
            continue
        answer = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout:
            return f"{answer.stdout.splitlines()[0]} ({path})"
    return None
