"""One backend in a minute: each dtype once, perturb and restore to the bit, and one time beside floor and peak.

python tests/gpu/smoke.py BACKEND DEVICE
"""

import statistics
import sys
import time
import warnings

import torch
from torch import nn

from bench.contestants import Copy, yardsticks
from bench.measures import peak_bandwidth
from fastsam import FusedSAM
from tests.oracle import DTYPES, NORM_TOLERANCE, assert_perturbed, copies, norm64, perturbed, same_bits

SIZES = [(1,), (0,), (3, 5), (4097,), (1000, 129)]
RHO, EPSILON = 0.3, 1e-12
NUMEL = {"cuda": 10**8, "cpu": 10**6}
ROUNDS = 10


def step(backend: str, device: str, dtype: torch.dtype, adaptive: bool) -> None:
    params = [nn.Parameter(torch.randn(size, device=device).to(dtype)) for size in SIZES]
    for p in params:
        p.grad = torch.randn_like(p)
    before, grads = copies(params), [p.grad for p in params]
    options = {"rho": RHO, "adaptive": adaptive, "epsilon": EPSILON, "backend": backend}
    sam = FusedSAM(params, torch.optim.SGD, lr=0.1, **options)
    sam.first_step()
    expected = norm64(before, grads, [adaptive] * len(params))
    assert abs(float(sam.grad_norm) - expected) <= NORM_TOLERANCE * expected, (float(sam.grad_norm), expected)
    for p, w, g in zip(params, before, grads, strict=True):
        assert_perturbed(backend, p, perturbed(w, g, sam.grad_norm, RHO, EPSILON, adaptive))
    sam.restore()
    assert same_bits(params, before)


def seconds(action, device: str) -> float:
    """Median time of `action`, by the device's own clock where it has one."""
    found = []
    for _ in range(3 + ROUNDS):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) * 1e-3)
        else:
            begin = time.perf_counter()
            action()
            found.append(time.perf_counter() - begin)
    return statistics.median(found[3:])


def timing(backend: str, device: str) -> str:
    w = nn.Parameter(torch.randn(NUMEL[device], device=device))
    w.grad = torch.randn_like(w)
    sam = FusedSAM([w], torch.optim.SGD, lr=0.1, rho=RHO, backend=backend)

    def ascend() -> None:
        sam.first_step()
        sam.restore()

    here = torch.device(device)
    kinds = yardsticks(here) if device == "cuda" else {"copy": Copy}
    copies = {name: seconds(kind(NUMEL[device], torch.float32, here).run, device) for name, kind in kinds.items()}
    name = min(copies, key=copies.__getitem__)
    floor = copies[name] * 7 / 2  # a step reads and writes 7 lists, a yardstick 2
    measured = seconds(ascend, device)
    peak = peak_bandwidth(here)
    of_peak = "" if peak is None else f", {7 * w.nbytes / measured / peak:.0%} of the peak"
    found = f"{NUMEL[device]:.0e} fp32: {measured * 1e6:.0f} us, floor ({name}) {floor * 1e6:.0f} us"
    return f"{found} ({floor / measured:.0%}){of_peak}"


def main(backend: str, device: str) -> None:
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="FusedSAM perturbs torch")
    for dtype in DTYPES:
        for adaptive in (False, True):
            step(backend, device, dtype, adaptive)
    print(f"figure: {backend}: {', '.join(str(d).removeprefix('torch.') for d in DTYPES)} to the bit")
    print(f"figure: {backend}: {timing(backend, device)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
