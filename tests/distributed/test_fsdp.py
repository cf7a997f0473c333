"""FSDP2, hybrid sharding, tensor parallelism and torch.distributed.checkpoint, on 2 and 4 ranks."""

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from fastsam import FusedSAM
from tests.oracle import PlainSAM
from tests.ranks import assert_same_bits, flat, launch, on_ranks

RHO = 0.1
BASES = {
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "stateless": (torch.optim.SGD, {"lr": 0.05}),
}
SHAPES = {"2": (2,), "4": (4,), "2x2": (2, 2)}
"""Of meshes; two dimensions: replicated, then sharded."""


def world_size(shape: str) -> int:
    return torch.Size(SHAPES[shape]).numel()


@functools.cache
def make_mesh(shape: str, *names: str) -> DeviceMesh:
    names = names or ("replicate", "shard")[-len(SHAPES[shape]) :]
    return init_device_mesh("cpu", SHAPES[shape], mesh_dim_names=names)


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Sizes of 10, 5, 3 and 1 rows: over 4 ranks, uneven shards and empty ones."""
    torch.manual_seed(0)
    layers = (
        nn.Linear(6, 10),
        nn.Tanh(),
        nn.LayerNorm(10),
        nn.Linear(10, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
        nn.Linear(3, 1),
    )
    return nn.Sequential(*layers).to(dtype)


def shard(model: nn.Sequential, mesh: DeviceMesh, **options) -> nn.Sequential:
    for layer in (model[0], model[3], model):
        fully_shard(layer, mesh=mesh, **options)
    return model


def batch(step: int, rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(4, 6, generator=generator, dtype=dtype), torch.randn(4, 1, generator=generator, dtype=dtype)


def union(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    parts = zip(*(batch(step, rank, dtype) for rank in range(dist.get_world_size())), strict=True)
    return tuple(torch.cat(part) for part in parts)


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    x, y = data
    return (model(x) - y).square().mean()


def make_sam(model: nn.Module, base: str, **options) -> FusedSAM:
    optimizer, base_options = BASES[base]
    return FusedSAM(model.parameters(), optimizer, rho=RHO, **options, **base_options)


def make_plain(base: str, adaptive: bool = False, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, PlainSAM]:
    """The unsharded model, in this process, and the oracle that trains it on all ranks' samples."""
    model = make_model(dtype)
    optimizer, options = BASES[base]
    return model, PlainSAM(model, optimizer(model.parameters(), **options), RHO, adaptive)


def full(model: nn.Module) -> Tensor:
    return flat([p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()])


def shards(model: nn.Module) -> Tensor:
    return flat([p.to_local() for p in model.parameters()])


def two_calls(sam: FusedSAM, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    loss_of(model, data).backward()
    assert sam.first_step(zero_grad=True)
    loss_of(model, data).backward()
    sam.second_step(zero_grad=True)


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


def check_equals_unsharded(shape: str, base: str, adaptive: bool, dtype: torch.dtype, backend: str | None) -> None:
    model = shard(make_model(dtype), make_mesh(shape))
    sam = make_sam(model, base, adaptive=adaptive, backend=backend)
    plain_model, plain = make_plain(base, adaptive, dtype)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]
    for step in range(8):
        two_calls(sam, model, batch(step, dist.get_rank(), dtype))
        plain.step(plain.gradients_above(functools.partial(loss_of, plain_model, union(step, dtype))))
        assert_same_bits(sam.grad_norm)
        torch.testing.assert_close(sam.grad_norm.double(), plain.norm, rtol=tolerance, atol=0)
        torch.testing.assert_close(full(model), flat(plain.params), rtol=tolerance, atol=tolerance)
    if len(SHAPES[shape]) == 2:
        assert_same_bits(shards(model), make_mesh(shape).get_group("replicate"))


@pytest.mark.parametrize(("base", "adaptive"), [("momentum", False), ("adamw", True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_equal_one_unsharded_process(shape, base, adaptive):
    on_ranks(world_size(shape), check_equals_unsharded, shape, base, adaptive, torch.float64, None)


def test_every_backend_equals_one_unsharded_process_in_fp32(backend):
    on_ranks(4, check_equals_unsharded, "4", "adamw", True, torch.float32, backend)


def check_momentum_and_start(shape: str, base: str, adaptive: bool) -> None:
    """Against one process with the whole model; its Momentum-SAM is checked in test_momentum.py."""
    options = {"adaptive": adaptive, "direction": "momentum", "start": 2}
    model = shard(make_model(), make_mesh(shape))
    sam = make_sam(model, base, **options)
    twin = make_model()
    plain = make_sam(twin, base, **options)
    for step in range(10):
        for one, m, data in ((sam, model, batch(step, dist.get_rank())), (plain, twin, union(step))):
            assert one.first_step() is (step >= 2)
            loss_of(m, data).backward()
            one.second_step(zero_grad=True)
        torch.testing.assert_close(full(model), flat(list(twin.parameters())), rtol=1e-9, atol=1e-9)
    assert_same_bits(sam.grad_norm)
    torch.testing.assert_close(sam.grad_norm, plain.grad_norm, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("base", "adaptive"), [("momentum", False), ("adamw", True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_along_the_momentum(shape, base, adaptive):
    on_ranks(world_size(shape), check_momentum_and_start, shape, base, adaptive)


def check_late(shape: str) -> None:
    model = shard(make_model(), make_mesh(shape))
    sam = make_sam(model, "momentum", start=3)
    plain_model, plain = make_plain("momentum")
    for step in range(6):
        loss_of(model, batch(step, dist.get_rank())).backward()
        if sam.first_step(zero_grad=True):
            loss_of(model, batch(step, dist.get_rank())).backward()
        sam.second_step(zero_grad=True)
        loss = functools.partial(loss_of, plain_model, union(step))
        plain.step(plain.gradients(loss()) if step < 3 else plain.gradients_above(loss))
        torch.testing.assert_close(full(model), flat(plain.params), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", ["2", "2x2"])
def test_late_sam(shape):
    on_ranks(world_size(shape), check_late, shape)


def check_step_in_detail(shape: str, options: dict[str, object], forward_dtype: torch.dtype) -> None:
    """Perturbs every shard by Eq. 2 and the whole norm, with one all-reduce of one number; restores to the bit."""
    model = shard(make_model(torch.float32), make_mesh(shape), **options)
    sam = make_sam(model, "momentum")
    for step in range(2):
        w, addresses = shards(model).clone(), [p.to_local().data_ptr() for p in model.parameters()]
        loss_of(model, batch(step, dist.get_rank(), torch.float32)).backward()
        g = flat([p.grad.full_tensor() for p in model.parameters()]).double()
        e_w = flat([p.grad.to_local() for p in model.parameters()]).double() * RHO / g.norm()
        with CommDebugMode() as communication:
            sam.first_step(zero_grad=True)
        assert communication.get_total_counts() == 1
        torch.testing.assert_close(sam.grad_norm.double(), g.norm(), rtol=1e-6, atol=0)
        torch.testing.assert_close(shards(model).double(), w + e_w, rtol=1e-6, atol=1e-7)

        # The second forward sees the perturbed weights, of every rank.
        x, y = batch(step, dist.get_rank(), torch.float32)
        perturbed = make_model(torch.float32)
        nn.utils.vector_to_parameters(full(model), perturbed.parameters())
        expected = loss_of(perturbed.to(forward_dtype), (x.to(forward_dtype), y))
        loss = loss_of(model, (x, y))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)

        loss.backward()
        with CommDebugMode() as communication:
            sam.restore()
        assert communication.get_total_counts() == 0
        assert torch.equal(shards(model), w)
        assert [p.to_local().data_ptr() for p in model.parameters()] == addresses
        sam.base_optimizer.step()
        sam.zero_grad()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"reshard_after_forward": False},
    ],
    ids=["plain", "mixed precision", "offload", "no reshard after forward"],
)
def test_step_on_shards_in_detail(shape, options):
    forward_dtype = torch.bfloat16 if "mp_policy" in options else torch.float32
    on_ranks(world_size(shape), check_step_in_detail, shape, options, forward_dtype)


def check_infinite_shard(value: float) -> None:
    model = shard(make_model(), make_mesh("4"))
    sam = make_sam(model, "momentum")
    w = shards(model).clone()
    loss_of(model, batch(0, dist.get_rank())).backward()
    if dist.get_rank() == 2:
        model[0].weight.grad.to_local()[0, 0] = value
    assert sam.first_step(zero_grad=True)
    assert not sam.grad_norm.isfinite()
    assert torch.equal(shards(model), w)
    loss_of(model, batch(0, dist.get_rank())).backward()
    sam.second_step()
    assert full(model).isfinite().all()
    assert not torch.equal(shards(model), w)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinite_gradient_of_one_shard_perturbs_no_rank(value):
    on_ranks(4, check_infinite_shard, value)


def check_loss_scale(base: str) -> None:
    """The second gradient of one shard overflows: no rank steps, and the scale is lowered on all."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model = shard(make_model(torch.float32), make_mesh("4"))
    sam = make_sam(model, base, grad_scaler=scaler)
    for overflows in (False, True, False):
        w = shards(model).clone()
        data = batch(0, dist.get_rank(), torch.float32)
        scaler.scale(loss_of(model, data)).backward()
        g = flat([p.grad.full_tensor() for p in model.parameters()]) / scaler.get_scale()
        sam.first_step(zero_grad=True)
        torch.testing.assert_close(sam.grad_norm, g.norm())
        scaler.scale(loss_of(model, data)).backward()
        if overflows and dist.get_rank() == 2:
            model[0].bias.grad.to_local()[0] = torch.inf
        scaler.step(sam)
        scaler.update()
        assert torch.equal(shards(model), w) == overflows
    assert scaler.get_scale() == 4


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_overflow_of_one_shard_skips_the_step_on_every_rank(base):
    on_ranks(4, check_loss_scale, base)


def check_rank_without_gradients() -> None:
    model = shard(make_model(), make_mesh("4"))
    sam = make_sam(model, "momentum")
    w = shards(model).clone()
    loss_of(model, batch(0, dist.get_rank())).backward()
    norm = flat([p.grad.to_local() for p in model.parameters()]).square().sum() * (dist.get_rank() != 1)
    dist.all_reduce(norm)
    if dist.get_rank() == 1:
        sam.zero_grad()
    assert sam.first_step()
    assert torch.equal(shards(model), w) == (dist.get_rank() == 1)
    if dist.get_rank() != 1:
        torch.testing.assert_close(sam.grad_norm, norm.sqrt())
    sam.restore()
    assert torch.equal(shards(model), w)


def test_rank_without_gradients_takes_part_in_the_sum():
    on_ranks(4, check_rank_without_gradients)


def check_part(shape: str) -> None:
    """The last layer alone is perturbed, of whose one row most ranks have no shard; against one process."""

    def groups(model: nn.Sequential) -> list[dict[str, object]]:
        params = list(model.parameters())
        return [{"params": params[:-2], "perturb": False}, {"params": params[-2:]}]

    model, twin = shard(make_model(), make_mesh(shape)), make_model()
    sams = [FusedSAM(groups(m), torch.optim.SGD, rho=RHO, lr=0.05, momentum=0.9) for m in (model, twin)]
    for step in range(4):
        two_calls(sams[0], model, batch(step, dist.get_rank()))
        two_calls(sams[1], twin, union(step))
        torch.testing.assert_close(full(model), flat(twin.parameters()), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sams[0].grad_norm, sams[1].grad_norm, rtol=1e-9, atol=0)
        assert_same_bits(sams[0].grad_norm)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_part_of_the_model_is_perturbed(shape):
    on_ranks(world_size(shape), check_part, shape)


def check_no_gradients_anywhere() -> None:
    model = shard(make_model(), make_mesh("2"))
    sam = make_sam(model, "momentum")
    for _ in range(2):
        model.set_requires_gradient_sync(False)
        loss_of(model, batch(0, dist.get_rank())).backward()
        with pytest.raises(RuntimeError, match=r"no parameter has a gradient: .* set_requires_gradient_sync\(True\)"):
            sam.first_step()
        assert not sam.perturbed
        # It is not too late: the next synchronised backward adds what this one has left.
        model.set_requires_gradient_sync(True)
        two_calls(sam, model, batch(0, dist.get_rank()))


def test_gradients_that_were_not_synchronised_are_an_error():
    on_ranks(2, check_no_gradients_anywhere)


def check_accumulation() -> None:
    """Micro-batches, synchronised at the last, in both passes: the same as the whole batch at once."""
    model = shard(make_model(), make_mesh("2"))
    sam = make_sam(model, "adamw")
    plain_model, plain = make_plain("adamw")
    for step in range(5):

        def closure(step: int = step) -> None:
            sam.zero_grad()
            parts = list(zip(*(t.chunk(4) for t in batch(step, dist.get_rank())), strict=True))
            for i, part in enumerate(parts):
                model.set_requires_gradient_sync(i == len(parts) - 1)
                (loss_of(model, part) / len(parts)).backward()

        sam.step(closure)
        plain.step(plain.gradients_above(functools.partial(loss_of, plain_model, union(step))))
        torch.testing.assert_close(full(model), flat(plain.params), rtol=1e-9, atol=1e-9)


def test_accumulated_micro_batches_equal_the_batch():
    on_ranks(2, check_accumulation)


def check_freshness() -> None:
    """FSDP2 adds to a gradient that is there without a trace on the DTensor itself."""
    model = shard(make_model(), make_mesh("2"))
    sam = make_sam(model, "momentum")
    calls = 0

    def closure() -> None:
        nonlocal calls
        calls += 1
        loss_of(model, batch(0, dist.get_rank())).backward()

    sam.step(closure)
    assert calls == 2
    sam.zero_grad(set_to_none=False)
    sam.step(closure)
    assert calls == 4  # the zeros are no gradient
    sam.zero_grad(set_to_none=False)
    loss_of(model, batch(0, dist.get_rank())).backward()
    sam.step(closure)
    assert calls == 5  # the gradient at w was there


def test_gradients_that_fsdp_accumulated_in_place_are_fresh():
    on_ranks(2, check_freshness)


def check_reshard_between_passes() -> None:
    """Without resharding after backward, the second forward uses the old weights, unless they are resharded by hand."""
    model = shard(make_model(), make_mesh("2"))
    model.set_reshard_after_backward(False)
    sam = make_sam(model, "momentum")
    plain_model, plain = make_plain("momentum")
    for step in range(3):
        loss_of(model, batch(step, dist.get_rank())).backward()
        sam.first_step(zero_grad=True)
        for layer in (model[0], model[3], model):
            layer.reshard()
        loss_of(model, batch(step, dist.get_rank())).backward()
        sam.second_step(zero_grad=True)
        for layer in (model[0], model[3], model):
            layer.reshard()
        plain.step(plain.gradients_above(functools.partial(loss_of, plain_model, union(step))))
        torch.testing.assert_close(full(model), flat(plain.params), rtol=1e-9, atol=1e-9)


def test_resharding_by_hand_between_the_passes():
    on_ranks(2, check_reshard_between_passes)


def check_moved_shards() -> None:
    """FSDP2 takes up new shards when a module is converted: twice, and it is as before, but elsewhere."""
    model = shard(make_model(), make_mesh("4"))
    sam = make_sam(model, "momentum")
    two_calls(sam, model, batch(0, dist.get_rank()))
    addresses = [p.to_local().data_ptr() for p in model.parameters()]
    model.float().double()
    assert [p.to_local().data_ptr() for p in model.parameters()] != addresses
    w = shards(model).clone()
    loss_of(model, batch(1, dist.get_rank())).backward()
    g = flat([p.grad.full_tensor() for p in model.parameters()])
    sam.first_step()
    e_w = flat([p.grad.to_local() for p in model.parameters()]) * RHO / g.norm()
    torch.testing.assert_close(shards(model), w + e_w)
    # Also while perturbed.
    model.float()
    sam.restore()
    assert torch.equal(shards(model), w.float())


def test_shards_that_moved_are_found():
    on_ranks(4, check_moved_shards)


def check_refused() -> None:
    with pytest.raises(ValueError, match=r"flatten_parameters can't move DTensors"):
        make_sam(shard(make_model(), make_mesh("2")), "momentum", flatten_parameters=True)
    for use_orig_params in (False, True):
        model = FullyShardedDataParallel(
            make_model(torch.float32), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        with pytest.raises(TypeError, match=r"FullyShardedDataParallel.*fully_shard"):
            make_sam(model, "momentum")
    p = nn.Parameter(distribute_tensor(torch.ones(4), make_mesh("2"), [Shard(0)]))
    sam = FusedSAM([p], torch.optim.SGD, lr=0.1)
    p.grad = torch.ones(4)
    with pytest.raises(TypeError, match=r"the gradient of parameter 0 of param group 0 is a Tensor but .* DTensor"):
        sam.first_step()
    p = nn.Parameter(DTensor.from_local(torch.ones(4), make_mesh("2"), [Partial()]))
    sam = FusedSAM([("w", p)], torch.optim.SGD, lr=0.1)
    p.grad = DTensor.from_local(torch.ones(4), make_mesh("2"), [Partial()])
    with pytest.raises(ValueError, match=r"parameter 0 of param group 0 \(w\) is a DTensor of partial sums"):
        sam.first_step()
    assert not sam.perturbed


def test_what_cannot_work_is_refused():
    on_ranks(2, check_refused)


# -- DTensors of every kind in one optimizer ---------------------------------------------------------------------------


def check_mixed_placements(adaptive: bool, backend: str) -> None:
    """Two meshes; parameters plain, replicated, and sharded over either or both dimensions; partial gradients."""
    line, square = make_mesh("4"), make_mesh("2x2", "a", "b")
    kinds = [
        (None, None, None),
        (line, [Shard(0)], None),
        (line, [Replicate()], None),
        (line, [Replicate()], [Partial()]),
        (line, [Shard(1)], [Replicate()]),
        (line, [Shard(0)], [Partial()]),
        (square, [Shard(0), Shard(1)], None),
        (square, [Shard(0), Shard(0)], None),
        (square, [Replicate(), Shard(0)], None),
        (square, [Shard(1), Replicate()], None),
        (square, [Replicate(), Replicate()], [Partial(), Partial()]),
        (square["b"], [Shard(0)], None),
    ]
    params, fulls, full_grads = [], [], []
    for mesh, placements, grad_placements in kinds:
        for shape in ((5, 3), (1, 4)):
            w, g = torch.randn(shape), torch.randn(shape)
            fulls.append(w)
            full_grads.append(g)
            if mesh is None:
                params.append(nn.Parameter(w.clone()))
                params[-1].grad = g
                continue
            params.append(nn.Parameter(distribute_tensor(w.clone(), mesh, placements)))
            params[-1].grad = distribute_tensor(g, mesh, grad_placements or placements)
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "rho": 2 * RHO}]
    sam = FusedSAM(groups, torch.optim.SGD, rho=RHO, adaptive=adaptive, lr=0.1, foreach=False, backend=backend)

    with CommDebugMode() as communication:
        sam.first_step()
    # One for each set of ranks: all four, and either dimension of the square. (Placing gradients takes others.)
    assert communication.get_comm_counts()[torch.ops.c10d.allreduce_] == 3

    terms = [w.abs() * g if adaptive else g for w, g in zip(fulls, full_grads, strict=True)]
    norm = flat(terms).double().norm()
    torch.testing.assert_close(sam.grad_norm.double(), norm, rtol=1e-6, atol=0)
    assert_same_bits(sam.grad_norm)
    for i, (p, w, g) in enumerate(zip(params, fulls, full_grads, strict=True)):
        rho = RHO if i < half else 2 * RHO
        expected = w + (w.square() if adaptive else 1) * g * rho / norm.float()
        actual = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(actual.detach(), expected, rtol=1e-5, atol=1e-6)
    sam.restore()
    for p, w in zip(params, fulls, strict=True):
        assert torch.equal(p.full_tensor() if isinstance(p, DTensor) else p, w)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_every_placement_in_one_optimizer(adaptive, backend):
    on_ranks(4, check_mixed_placements, adaptive, backend)


def check_gradient_under_way() -> None:
    mesh = make_mesh("2")
    p = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
    partial = DTensor.from_local(torch.tensor([0.0, 1.0, 2.0]), mesh, [Partial()])
    p.grad = partial.redistribute(placements=[Replicate()], async_op=True)
    assert p.grad._local_tensor.data_ptr() == 0
    sam = FusedSAM([p], torch.optim.SGD, rho=RHO, lr=0.1)
    sam.first_step()
    torch.testing.assert_close(p.to_local().detach(), 1 + RHO * torch.tensor([0.0, 1.0, 2.0]) / 5**0.5)


def test_gradient_whose_collective_is_under_way_is_waited_for():
    on_ranks(2, check_gradient_under_way)


# -- tensor parallelism ------------------------------------------------------------------------------------------------

LENGTH = 4  # of a sequence


def make_sequence_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def check_tensor_parallel(data_parallel: bool, adaptive: bool) -> None:
    mesh = make_mesh("2x2", "dp", "tp") if data_parallel else make_mesh("2", "tp")
    tp, rank = mesh["tp"], mesh.get_local_rank("tp")
    plan = {
        "0": SequenceParallel(),  # each rank has a part of the sequence, and of the gradient of the layer's weights
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "3": RowwiseParallel(output_layouts=Replicate()),
    }
    model = parallelize_module(make_sequence_model(), tp, plan)
    if data_parallel:
        fully_shard(model, mesh=mesh["dp"])
    optimizer, options = BASES["momentum"]
    sam = FusedSAM(model.parameters(), optimizer, rho=RHO, adaptive=adaptive, **options)
    plain_model = make_sequence_model()
    plain = PlainSAM(plain_model, optimizer(plain_model.parameters(), **options), RHO, adaptive)

    for _ in range(10):
        x, y = torch.randn(6, LENGTH, 8).double(), torch.randn(6, LENGTH, 3).double()
        rows = slice(None)
        if data_parallel:
            rows = slice(3 * mesh.get_local_rank("dp"), 3 * mesh.get_local_rank("dp") + 3)
        part = x[rows, rank * LENGTH // 2 : (rank + 1) * LENGTH // 2]

        def closure(part: Tensor = part, y: Tensor = y[rows]) -> Tensor:
            sam.zero_grad()
            loss = loss_of(model, (part, y))
            loss.backward()
            return loss

        sam.step(closure)
        plain.step(plain.gradients_above(functools.partial(loss_of, plain_model, (x, y))))
        assert_same_bits(sam.grad_norm)
        torch.testing.assert_close(sam.grad_norm, plain.norm, rtol=1e-9, atol=0)
        torch.testing.assert_close(full(model), flat(plain.params), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("data_parallel", [False, True], ids=["tp", "fsdp and tp"])
def test_tensor_parallel_equals_one_process(data_parallel, adaptive):
    on_ranks(4 if data_parallel else 2, check_tensor_parallel, data_parallel, adaptive)


def check_versions(backend: str) -> None:
    p = nn.Parameter(distribute_tensor(torch.randn(5, 3), make_mesh("2"), [Shard(0)]))
    sam = FusedSAM([p], torch.optim.SGD, lr=0.1, backend=backend)
    loss = p.square().sum()
    loss.backward(retain_graph=True)
    sam.first_step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = p.square().sum()
    sam.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_through_a_graph_of_other_weights_is_an_error(backend):
    on_ranks(2, check_versions, backend)


# -- torch.distributed.checkpoint --------------------------------------------------------------------------------------

INTERVAL = 3


def make_training(base: str) -> tuple[nn.Sequential, FusedSAM]:
    model = shard(make_model(), make_mesh(str(dist.get_world_size())))
    return model, make_sam(model, base, interval=INTERVAL)


def train(model: nn.Module, sam: FusedSAM, steps: range) -> None:
    """On the same 4 samples a step, whatever the number of ranks."""
    for step in steps:
        data = tuple(t.chunk(dist.get_world_size())[dist.get_rank()] for t in batch(step, 0))

        def closure(data: tuple[Tensor, Tensor] = data) -> None:
            sam.zero_grad()
            loss_of(model, data).backward()

        sam.step(closure)


def counters(sam: FusedSAM) -> list[int]:
    return [group["sam_step"] for group in sam.param_groups]


def check_save(base: str, flatten: bool, folder: Path) -> Tensor:
    """Saves after 4 steps, between two SAM steps, and trains on: what one never interrupted comes to."""
    model, sam = make_training(base)
    train(model, sam, range(4))
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model_state, sam_state = get_state_dict(model, sam, options=options)
    dcp.save({"model": model_state, "sam": sam_state}, checkpoint_id=folder)
    assert counters(sam) == [4]
    train(model, sam, range(4, 9))
    return full(model)


def check_load(base: str, flatten: bool, folder: Path) -> Tensor:
    model, sam = make_training(base)
    w = full(model)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    with CommDebugMode() as communication:
        model_state, sam_state = get_state_dict(model, sam, options=options)
    # That took a step of the base optimizer, with lr 0 and gradients of 0, to have a state to load into.
    assert communication.get_total_counts() == 0
    assert torch.equal(full(model), w)
    assert counters(sam) == [0]
    assert not sam.perturbed
    dcp.load({"model": model_state, "sam": sam_state}, checkpoint_id=folder)
    set_state_dict(model, sam, model_state_dict=model_state, optim_state_dict=sam_state, options=options)
    assert counters(sam) == [4]
    train(model, sam, range(4, 9))
    assert counters(sam) == [9]
    return full(model)


@pytest.mark.parametrize(
    ("base", "flatten"), [("momentum", False), ("adamw", False), ("adamw", True), ("stateless", False)]
)
def test_checkpoint_of_4_ranks_resumes_on_4_and_on_2_between_sam_steps(base, flatten, tmp_path):
    never_interrupted, *_ = on_ranks(4, check_save, base, flatten, tmp_path)
    on_4, *_ = on_ranks(4, check_load, base, flatten, tmp_path)
    assert torch.equal(on_4, never_interrupted)
    on_2, *_ = on_ranks(2, check_load, base, flatten, tmp_path)
    torch.testing.assert_close(on_2, never_interrupted, rtol=1e-9, atol=1e-9)


def test_example_learns_and_resumes(tmp_path):
    printed = launch("train_fsdp2.py", str(tmp_path))
    assert printed["steps"] == str(8 * 15)
    assert float(printed["accuracy"]) > 0.85
