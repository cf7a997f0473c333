"""What a first user on a GPU meets: moves and failures between the calls, threads, and whole steps without a wait."""

import threading

import pytest
import torch
from torch import nn

from fastsam import FusedSAM
from tests.oracle import copies, same_bits

DEVICE = "cuda"


def make(backend, **options):
    params = [nn.Parameter(torch.randn(10 + i, device=DEVICE)) for i in range(5)]
    set_grads(params)
    return params, FusedSAM(params, torch.optim.SGD, lr=0.1, backend=backend, **options)


def set_grads(params):
    for p in params:
        p.grad = torch.randn_like(p)


def network():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).to(DEVICE)


@pytest.mark.parametrize("to", [torch.float16, "cpu"], ids=str)
def test_a_model_that_is_moved_while_perturbed(gpu_backend, to):
    model = network()
    sam = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1, backend=gpu_backend)
    model(torch.ones(2, 8, device=DEVICE)).sum().backward()
    before = copies(model.parameters())
    sam.first_step(zero_grad=True)
    assert not same_bits(copies(model.parameters()), before)
    model.to(to)
    sam.restore()
    assert same_bits(copies(model.parameters()), [w.to(to) for w in before])


def test_a_model_that_comes_to_the_gpu_after_a_step():
    model, x = network().cpu(), torch.ones(2, 8)
    sam = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for device in ("cpu", DEVICE):
        model.to(device)
        before = copies(model.parameters())
        model(x.to(device)).sum().backward()
        sam.first_step(zero_grad=True)
        model(x.to(device)).sum().backward()
        sam.second_step(zero_grad=True)
        assert not same_bits(copies(model.parameters()), before)


def test_parameters_on_both_devices():
    params = [nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(9, device=DEVICE))]
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    sam = FusedSAM(params, torch.optim.SGD, lr=0.1, rho=0.3)
    sam.first_step()
    assert float(sam.grad_norm) == pytest.approx(2.0, rel=2e-6)
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, 1 + 0.5 * 0.3 / 2))
    sam.restore()
    assert all(bool((p == 1).all()) for p in params)


@pytest.mark.parametrize("pinned", [False, True])
def test_rho_may_be_a_tensor_of_the_host(gpu_backend, pinned):
    params, sam = make(gpu_backend, rho=0.2)
    twins, twin = make(gpu_backend, rho=torch.tensor(0.2).pin_memory() if pinned else torch.tensor(0.2))
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p.data)
        q.grad = p.grad
    sam.first_step()
    twin.first_step()
    assert same_bits(copies(params), copies(twins))
    sam.restore()
    twin.restore()


def test_threads_with_optimizers_and_streams_of_their_own(gpu_backend):
    errors = []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                params, sam = make(gpu_backend)
                for _ in range(10):
                    before = copies(params)
                    set_grads(params)
                    sam.first_step()
                    sam.restore()
                    assert same_bits(copies(params), before)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_step_in_a_hook_of_the_backward(gpu_backend):
    """It runs in autograd's thread of the device."""
    p = nn.Parameter(torch.ones(64, device=DEVICE))
    sam = FusedSAM([p], torch.optim.SGD, lr=0.1, rho=0.8, backend=gpu_backend)
    found = []

    def hook(q):
        sam.first_step()
        found.append(q.detach().clone())
        sam.restore()

    p.register_post_accumulate_grad_hook(hook)
    (p * 2).sum().backward()
    torch.testing.assert_close(found[0], torch.full_like(p, 1.1))
    assert bool((p == 1).all())


def test_no_memory_for_the_backup(gpu_backend):
    p = nn.Parameter(torch.ones(25_000_000, device=DEVICE))
    p.grad = torch.ones_like(p)
    sam = FusedSAM([p], torch.optim.SGD, lr=0.1, backend=gpu_backend)
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 50_000_000
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(torch.OutOfMemoryError):
            sam.first_step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not sam.perturbed
    assert bool((p == 1).all())
    sam.first_step()
    assert not bool((p == 1).any())
    sam.restore()
    assert bool((p == 1).all())


KINDS = ("two calls", "closure", "scaler", "momentum", "dtypes")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")
def test_a_whole_step_waits_for_nothing(gpu_backend, kind):
    model, x = network(), torch.randn(4, 8, device=DEVICE)
    if kind == "dtypes":
        model.extra = nn.Parameter(torch.ones(3, device=DEVICE, dtype=torch.bfloat16))
    # The usual scale, 2**16, overflows fp16 for some of these random networks: the norm would not be finite.
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8) if kind == "scaler" else None
    options = {"direction": "momentum"} if kind == "momentum" else {"grad_scaler": scaler}
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=kind == "scaler")
    sam = FusedSAM(base, backend=gpu_backend, rho=0.1, **options)

    def backward():
        with torch.autocast(DEVICE, torch.float16, enabled=kind == "scaler"):
            loss = model(x).float().square().mean()
        if kind == "dtypes":
            loss = loss + model.extra.float().square().sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    def step():
        if kind == "closure":
            sam.step(lambda: (sam.zero_grad(), backward())[1])
            return
        if kind != "momentum":
            backward()
        sam.first_step(zero_grad=True)
        backward()
        sam.second_step(zero_grad=True)
        if scaler is not None:
            scaler.update()

    for _ in range(2):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
            sam.param_groups[0]["rho"] *= 1.5
        norm = sam.grad_norm
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(norm) > 0
