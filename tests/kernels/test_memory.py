"""Extra memory of a step: one copy of the perturbed parameters, counted by torch's own allocator."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastsam import FusedSAM

BACKENDS = ["reference", "foreach", "cpp"]  # not the interpreted Triton: it holds on to the tensors of its last call

SIZES = [200_000, 50_000, 3, 50_000]
PARAMETERS = 4 * sum(SIZES)  # bytes
LARGEST = 4 * max(SIZES)

# Bytes above what there was: at the peak of first_step, and after it.
PEAK = {
    "reference": PARAMETERS + 3 * LARGEST,  # temporaries of one parameter at a time
    "foreach": PARAMETERS + PARAMETERS // 64,  # the norms of rows
    "cpp": PARAMETERS,
}
KEPT = {"reference": 0, "foreach": PARAMETERS, "cpp": PARAMETERS}
SMALL = 10_000


def allocated(call):
    """(peak, end) of the bytes that `call` has allocated on CPU, less what it freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak, total


def test_the_count_counts():
    kept = []
    peak, end = allocated(lambda: (torch.ones(1000) + torch.ones(1000), kept.append(torch.ones(500))))
    assert 12_000 <= peak <= 12_500
    assert 2_000 <= end <= 2_100


@pytest.mark.parametrize("frozen", [False, True])
def test_one_copy_of_the_parameters(backend, frozen):
    params = [nn.Parameter(torch.randn(n)) for n in SIZES]
    extra = [nn.Parameter(torch.randn(500_000))] if frozen else []  # takes no gradient: costs nothing
    sam = FusedSAM([*params, *extra], torch.optim.SGD, backend=backend, lr=0.1)
    for p in params:
        p.grad = torch.randn_like(p)
    sam.first_step()
    sam.restore()  # tables, and a backup that is kept, are there from here on

    peak, end = allocated(sam.first_step)
    kept = KEPT[backend]
    assert peak <= PEAK[backend] - kept + SMALL
    assert abs(end - (PARAMETERS - kept)) <= SMALL
    _, freed = allocated(sam.restore)
    assert abs(freed + PARAMETERS - kept) <= SMALL


def test_the_first_step_lays_out_in_little_more(backend):
    params = [nn.Parameter(torch.randn(n)) for n in SIZES]
    sam = FusedSAM(params, torch.optim.SGD, backend=backend, lr=0.1)
    for p in params:
        p.grad = torch.randn_like(p)
    peak, end = allocated(sam.first_step)
    assert peak <= PEAK[backend] + SMALL
    assert abs(end - PARAMETERS) <= SMALL


def test_gradients_are_let_go(backend):
    """Between the passes no bucket holds a gradient, nor a copy of one in other strides."""
    p = nn.Parameter(torch.randn(300, 400))
    sam = FusedSAM([p], torch.optim.SGD, backend=backend, lr=0.1)
    for make in (lambda: torch.randn(300, 400), lambda: torch.randn(400, 300).t()):
        p.grad = make()
        sam.first_step(zero_grad=True)
        sam.restore()

        def step(make=make):
            p.grad = make()
            sam.first_step(zero_grad=True)
            sam.restore()

        _, end = allocated(step)
        assert end <= SMALL


def test_deterministic_algorithms_fill_no_backup(backend):
    """torch.empty would fill it, with NaN: one more pass over the memory."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    for p in params:
        p.grad = torch.ones(3)
    sam = FusedSAM(params, torch.optim.SGD, backend=backend, lr=0.1)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        sam.first_step()
        filled = torch.empty(3)
    finally:
        torch.use_deterministic_algorithms(before)
    assert filled.isnan().all()
    ((_, bucket),) = sam._state.perturbation.buckets
    assert not bucket.backup[3 : bucket.offsets[1]].isnan().all()  # between the slots
    sam.restore()
    assert all(torch.equal(p.detach(), torch.ones(3)) for p in params)
