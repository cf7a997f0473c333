"""`python -m fastsam`: versions, devices, and each backend with its state."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform

import torch

from fastsam import __version__, backends
from fastsam._distribution import compiler


def version_of(package: str) -> str:
    """The installed version of `package`, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> dict[torch.device, str]:
    """Each device that fastsam can use, with what there is to say of it."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = {torch.device("cpu"): f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            text = f"{properties.name}, capability {properties.major}.{properties.minor}"
            found[torch.device("cuda", index)] = text
    return found


def backend_states(found: dict[torch.device, str]) -> dict[str, str]:
    """Each backend's state: where it is the default, that it is available, or why it is missing."""
    defaults = {device: backends.default(device) for device in found}
    states = {}
    for name in backends.BACKENDS:
        reason = backends.missing(name)
        on = ", ".join(str(device) for device, default in defaults.items() if default == name)
        if reason is not None:
            states[name] = f"missing: {reason}"
        else:
            states[name] = f"available, default on {on}" if on else "available"
    if backends.missing("cpp") is None:
        states["cpp"] += f", uses {importlib.import_module('fastsam._C').instruction_set()}"
    return states


def override() -> str | None:
    """What FASTSAM_BACKEND does to the defaults; None when it is not set."""
    name = os.environ.get("FASTSAM_BACKEND")
    if not name:
        return None
    if name not in backends.BACKENDS:
        return f"FASTSAM_BACKEND={name} names no backend"
    reason = backends.missing(name)
    return f"FASTSAM_BACKEND={name} takes the place of the default" + (f", but is missing: {reason}" if reason else "")


def table(rows: dict[str, str]) -> str:
    """`rows` in two aligned columns, indented under a heading."""
    width = max(len(key) for key in rows)
    return "\n".join(f"  {key:<{width}}  {value}" for key, value in rows.items())


def main() -> None:
    """Print the report."""
    cuda = torch.version.cuda
    versions = {
        "fastsam": __version__,
        "Python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "torch": f"{torch.__version__} ({f'CUDA {cuda}' if cuda else 'CPU build'})",
        "triton": version_of("triton"),
        "C++ compiler": compiler() or "none that runs",
    }
    found = devices()
    print("Versions", table(versions), sep="\n")
    print("Devices", table({str(device): text for device, text in found.items()}), sep="\n")
    print("Backends", table(backend_states(found)), sep="\n")
    overridden = override()
    if overridden is not None:
        print(overridden)


if __name__ == "__main__":
    main()
