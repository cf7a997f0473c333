"""Streams, devices and waiting: kernels run where the caller is, nobody waits, and no memory is used again too soon."""

import gc
import random
from contextlib import nullcontext, suppress

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastsam import FusedSAM
from tests.oracle import copies, same_bits

DEVICE = "cuda"
LONG = 50_000_000
"""Cycles: some 30 ms."""


def make(backend, n=3, numel=10_000, device=DEVICE):
    params = [nn.Parameter(torch.randn(numel + i, device=device)) for i in range(n)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params, FusedSAM(params, torch.optim.SGD, rho=0.3, backend=backend, lr=0.1)


def ascend(sam):
    sam.first_step()
    sam.restore()


def expected_ascent(params, backend="reference"):
    """What w + e_w is."""
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    for twin, p in zip(twins, params, strict=True):
        twin.grad = p.grad
    sam = FusedSAM(twins, torch.optim.SGD, rho=0.3, backend=backend, lr=0.1)
    sam.first_step()
    return copies(twins)  # while sam is held: one that is collected restores


def test_nothing_waits_for_the_device(gpu_backend):
    params, sam = make(gpu_backend)
    ascend(sam)
    kept = [p.grad for p in params]
    fresh = [torch.randn_like(p) for p in params]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for grads in (kept, fresh, kept):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            sam.param_groups[0]["rho"] *= 2
            ascend(sam)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_runs_ahead_of_the_device(fused_backend):
    _, sam = make(fused_backend)
    ascend(sam)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(LONG)
    ascend(sam)
    done.record()
    assert not done.query()


def test_three_launches_a_step_whatever_the_number_of_tensors(fused_backend):
    _, sam = make(fused_backend, n=161)
    ascend(sam)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        ascend(sam)
        torch.cuda.synchronize()
    launched = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == 3, launched


def test_the_current_stream_is_used(gpu_backend):
    params, sam = make(gpu_backend)
    ascend(sam)
    fresh = [torch.randn_like(p) for p in params]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        for p, g in zip(params, fresh, strict=True):
            p.grad.copy_(g)
        sam.first_step()
    side.synchronize()
    found = copies(params)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sam.restore()
    side.synchronize()
    # Another norm may round otherwise, and a stale gradient is off by a hundred times the tolerance.
    for w, expected in zip(found, expected_ascent(params), strict=True):
        torch.testing.assert_close(w, expected)


def test_restore_runs_on_the_current_stream(gpu_backend):
    params, sam = make(gpu_backend)
    ascend(sam)
    before = copies(params)
    sam.first_step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        for p in params:
            p.detach().fill_(float("nan"))
        sam.restore()
    torch.cuda.synchronize()
    assert same_bits(params, before)


@pytest.mark.parametrize("how", ["by the caller", "after a move"])
def test_the_backup_outlives_a_restore_on_another_stream(any_backend, how):
    params, sam = make(any_backend, numel=1_000_000)
    before = copies(params)
    side = torch.cuda.Stream()
    sam.first_step()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        if how == "after a move":
            for p in params:
                p.data = p.data.clone()
        torch.cuda._sleep(LONG)
        sam.restore()
    del sam
    # The first stream takes what memory it can get, and writes to it before the restore has run.
    taken = [torch.full_like(p, float("nan")) for p in params for _ in range(4)]
    torch.cuda.synchronize()
    assert same_bits(params, before)
    assert taken


@pytest.mark.parametrize("how", ["by with", "by collection", "after a move"])
def test_restore_waits_for_a_perturb_on_another_stream(any_backend, how):
    """As an exception, Ctrl-C or a signal leads out of a block on a side stream, and nobody waits for it."""
    params, sam = make(any_backend)
    ascend(sam)
    torch.cuda.synchronize()
    before = copies(params)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with suppress(ZeroDivisionError), sam if how == "by with" else nullcontext(), torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        sam.first_step()
        if how == "after a move":
            for p in params:
                p.data = p.data.clone()
        raise ZeroDivisionError
    if how == "by collection":
        with pytest.warns(UserWarning, match="was deleted while the weights were perturbed"):
            del sam
            gc.collect()
    elif how == "after a move":
        sam.restore()
    torch.cuda.current_stream().synchronize()  # whatever waits for `side` runs after what does not
    torch.cuda.synchronize()
    assert same_bits(params, before)


@pytest.mark.parametrize("how", ["deleted", "laid out anew"])
def test_tables_outlive_a_step_on_another_stream(any_backend, how):
    """They belong to the stream of the first step, as of a warm-up, which may use their memory again."""
    params, sam = make(any_backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ascend(sam)
    torch.cuda.synchronize()
    before = copies(params)
    torch.cuda._sleep(LONG)
    ascend(sam)
    if how == "laid out anew":
        late = nn.Parameter(torch.ones(50, device=DEVICE))
        late.grad = torch.ones_like(late)
        sam.add_param_group({"params": [late]})
        ascend(sam)
    else:
        del sam
        gc.collect()
    with torch.cuda.stream(side):
        sizes = (1, 3, 12, 64, 512, 4096, 20_000)
        taken = [torch.full((n,), 7, dtype=torch.int64, device=DEVICE) for n in sizes for _ in range(20)]
    side.synchronize()
    torch.cuda.synchronize()
    assert same_bits(params, before)
    assert all(bool((t == 7).all()) for t in taken)


@pytest.mark.parametrize("seed", range(8))
def test_the_halves_of_steps_on_any_stream(gpu_backend, seed):
    """Each after the last, as CUDA asks of whoever changes the stream; other streams take what memory is freed."""
    rng = random.Random(seed)
    params, sam = make(gpu_backend, numel=rng.choice([7, 5000]))
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = FusedSAM(twins, torch.optim.SGD, rho=0.3, backend=gpu_backend, lr=0.1)
    streams = [torch.cuda.Stream() for _ in range(3)]
    last, kept = torch.cuda.current_stream(), []
    torch.cuda.synchronize()
    for step in range(6):
        grads = [[torch.full_like(p, rng.random()) for p in params] for _ in range(2)]
        kept.append(grads)  # a stream may read them that their memory does not belong to
        for p, twin_p, g in zip(params, twins, grads[0], strict=True):
            p.grad = twin_p.grad = None if step == 3 and p is params[0] else g
        torch.cuda.synchronize()
        twin.first_step()
        expected = [*copies(twins), twin.grad_norm]
        for half in (sam.first_step, sam.second_step):
            stream = rng.choice(streams)
            stream.wait_stream(last)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(LONG // 30)
                half()
                if sam.perturbed:
                    found = [*copies(params), sam.grad_norm]
            last = stream
            with torch.cuda.stream(rng.choice(streams)):
                kept.append([torch.full((n,), -1, device=DEVICE) for n in (1, 64, 512, 5000, 20_000) for _ in range(4)])
            for p, g in zip(params, grads[1], strict=True):
                p.grad = g
        torch.cuda.synchronize()
        assert same_bits(found, expected)
        for twin_p, g in zip(twins, grads[1], strict=True):
            twin_p.grad = g
        twin.second_step()
        assert same_bits(params, twins)


def test_many_tables_in_flight(fused_backend):
    params, sam = make(fused_backend)
    sets = [[torch.full_like(p, float(k + 1)) for p in params] for k in range(7)]
    numel = sum(p.numel() for p in params)
    ascend(sam)
    torch.cuda._sleep(LONG)
    norms = []
    for k in range(300):
        for p, g in zip(params, sets[k % 7], strict=True):
            p.grad = g
        sam.first_step()
        norms.append(sam.grad_norm)
        sam.restore()
    for k, norm in enumerate(norms):
        assert float(norm) == pytest.approx((k % 7 + 1) * numel**0.5, rel=2e-6)


def test_the_host_runs_ahead_with_new_gradients_every_step(fused_backend):
    """The tables of all steps are written while none of them has run."""
    params, sam = make(fused_backend, n=120, numel=100)
    ascend(sam)
    numel = sum(p.numel() for p in params)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(20 * LONG)
    norms, kept = [], []
    for k in range(20):
        # A gradient's memory is used again for that of two steps later.
        flat = torch.full((numel,), float(k + 1), device=DEVICE)
        for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = g
        kept = [*kept[-1:], flat]
        sam.first_step()
        norms.append(sam.grad_norm)
        sam.restore()
    done.record()
    assert not done.query()
    for k, norm in enumerate(norms):
        assert float(norm) == pytest.approx((k + 1) * numel**0.5, rel=2e-6)


def test_deterministic_algorithms_add_no_launch(fused_backend):
    _, sam = make(fused_backend, n=5)
    ascend(sam)
    torch.use_deterministic_algorithms(True)
    try:
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            ascend(sam)
            torch.cuda.synchronize()
    finally:
        torch.use_deterministic_algorithms(False)
    launched = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == 3, launched


def test_the_backup_lives_between_perturb_and_restore_only(fused_backend):
    params, sam = make(fused_backend, numel=4_000_000)
    ascend(sam)
    size = sum(p.numel() for p in params) * 4
    idle = torch.cuda.memory_allocated()
    sam.first_step()
    # The allocator splits no block of which 1 MiB or less would be left.
    assert size <= torch.cuda.memory_allocated() - idle <= size * 1.01 + 2**20
    sam.restore()
    assert torch.cuda.memory_allocated() == idle


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no GPU beside the first")
def test_parameters_over_two_devices(gpu_backend):
    params = [nn.Parameter(torch.ones(1000 + i, device=f"cuda:{i % 2}")) for i in range(4)]
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    before = copies(params)
    sam = FusedSAM(params, torch.optim.SGD, rho=0.3, backend=gpu_backend, lr=0.1)
    for current in (0, 1):
        with torch.cuda.device(current):
            sam.first_step()
            norm = float(sam.grad_norm)
            assert norm == pytest.approx(0.5 * sum(p.numel() for p in params) ** 0.5, rel=2e-6)
            for p, w in zip(params, before, strict=True):
                torch.testing.assert_close(p.detach(), w + 0.5 * 0.3 / norm)
            sam.restore()
    for device in (0, 1):
        torch.cuda.synchronize(device)
    assert same_bits(params, before)
