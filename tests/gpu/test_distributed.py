"""Processes: NCCL and what is offloaded to the CPU, at world size 1; two ranks that share a GPU; and forks."""

import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from fastsam import FusedSAM
from tests.oracle import PlainSAM, copies, same_bits
from tests.ranks import assert_same_bits, flat, on_ranks

DEVICE = "cuda"
GROUP = "cpu:gloo,cuda:nccl"
RHO = 0.1
OPTIONS = {"lr": 0.05, "momentum": 0.9}


def make_model(device=DEVICE):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double().to(device)


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64).to(DEVICE) for n in (6, 3))
    return (model(x) - y).square().mean()


def wrap(model, how, group):
    if how == "ddp":
        return DistributedDataParallel(model, process_group=group)
    policy = CPUOffloadPolicy(pin_memory=DEVICE == "cuda") if how == "offload" else OffloadPolicy()
    mesh = DeviceMesh.from_group(group, DEVICE, mesh_dim_names=("shard",))
    for layer in (model[0], model):
        fully_shard(layer, mesh=mesh, offload_policy=policy)
    return model


def check_one_rank(how, backend):
    group = dist.new_group(backend=GROUP)
    model = make_model("cpu" if how == "offload" else DEVICE)
    wrapped = wrap(model, how, group)
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, backend=backend, **OPTIONS)
    plain_model = make_model()
    plain = PlainSAM(plain_model, torch.optim.SGD(plain_model.parameters(), **OPTIONS), RHO)
    for step in range(5):
        loss_of(wrapped, step).backward()
        assert sam.first_step(zero_grad=True)
        loss_of(wrapped, step).backward()
        sam.second_step(zero_grad=True)
        plain.step(plain.gradients_above(partial(loss_of, plain_model, step)))
        torch.testing.assert_close(float(sam.grad_norm), float(plain.norm), rtol=1e-9, atol=0)
        found = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        torch.testing.assert_close(flat(found).to(DEVICE), flat(plain.params), rtol=1e-9, atol=1e-9)
    dist.destroy_process_group(group)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_nccl_on_one_rank(gpu_backend, how):
    on_ranks(1, check_one_rank, how, gpu_backend)


def test_parameters_offloaded_to_the_cpu_on_one_rank():
    on_ranks(1, check_one_rank, "offload", None)


def check_two_ranks_on_one_device(backend):
    """One parameter in shards, one on both ranks; the norm takes a sum over the ranks, by gloo, of device memory."""
    rank = dist.get_rank()
    mesh = DeviceMesh(DEVICE, [0, 1], mesh_dim_names=("shard",))
    generator = torch.Generator().manual_seed(7)
    sizes = [(9, 4), (5,)]
    w, g = ([torch.randn(size, generator=generator).to(DEVICE) for size in sizes] for _ in range(2))

    def distributed(pair):
        whole, same = pair
        shard = (whole[:5] if rank == 0 else whole[5:]).clone()
        shape, stride = whole.shape, whole.stride()
        return [
            DTensor.from_local(shard, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride),
            DTensor.from_local(same.clone(), mesh, [Replicate()], run_check=False),
        ]

    params = [nn.Parameter(t) for t in distributed(w)]
    sam = FusedSAM(params, torch.optim.SGD, lr=0.1, rho=RHO, backend=backend)
    for _ in range(3):
        for p, grad in zip(params, distributed(g), strict=True):
            p.grad = grad
        before = copies([p.to_local() for p in params])
        sam.first_step()
        norm = flat(g).double().norm()
        assert_same_bits(sam.grad_norm.cpu())
        torch.testing.assert_close(sam.grad_norm.double(), norm, rtol=2e-6, atol=0)
        for p, b, e in zip(params, before, distributed(g), strict=True):
            torch.testing.assert_close(p.to_local().detach(), b + e.to_local() * float(RHO / norm))
        sam.restore()
        assert same_bits([p.to_local().detach() for p in params], before)


def test_two_ranks_on_one_gpu(gpu_backend):
    on_ranks(2, check_two_ranks_on_one_device, gpu_backend)


FORK = """
import os
import torch
import fastsam

available = fastsam.available_backends()
sam = fastsam.FusedSAM([torch.nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1)
assert "triton" in available and "cuda" in available, available
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    assert float(torch.ones(3, device="cuda").sum()) == 3
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
"""


def test_processes_may_be_forked_after_the_import():
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
