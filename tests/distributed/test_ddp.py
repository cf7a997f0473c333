"""DistributedDataParallel: the gradient of the ascent each rank's own or all ranks', the replicas equal to the bit."""

import copy
import functools
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from fastsam import FusedSAM
from tests.oracle import PlainSAM
from tests.ranks import assert_same_bits, flat, on_ranks, torchrun

RHO = 0.1
BASES = {
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
}


class Model(nn.Module):
    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 17)
        self.unused = nn.Linear(6, 5) if unused else None
        self.outer = nn.Linear(17, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def make_model(unused: bool = False, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model(unused).to(dtype)


def batches(steps: int, rank: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """A batch of 4 samples a step, another on each rank."""
    generator = torch.Generator().manual_seed(rank)
    return [
        (torch.randn(4, 6, generator=generator, dtype=dtype), torch.randn(4, 3, generator=generator, dtype=dtype))
        for _ in range(steps)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def count_reductions(model: DistributedDataParallel) -> list[int]:
    """A list of one number: how many buckets DDP has reduced."""
    count = [0]

    def hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        count[0] += 1
        return allreduce_hook(group, bucket)

    model.register_comm_hook(dist.group.WORLD, hook)
    return count


def train(sam: FusedSAM, model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    for batch in data:

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            sam.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        sam.step(closure)


def check_replicas(base: str, ddp_options: dict[str, bool]) -> None:
    model = DistributedDataParallel(make_model("find_unused_parameters" in ddp_options), **ddp_options)
    reductions = count_reductions(model)
    steps = 0

    def first_pass():
        # DDP learns a static graph in the first backward, which has to be synchronised.
        return nullcontext() if "static_graph" in ddp_options and steps == 0 else model.no_sync()

    optimizer, options = BASES[base]
    sam = FusedSAM(model.parameters(), optimizer, rho=RHO, first_pass_context=first_pass, **options)
    before = flat(list(model.parameters()))
    for batch in batches(50, dist.get_rank()):
        train(sam, model, [batch])
        steps += 1
    assert_same_bits(flat(list(model.parameters())))
    assert not torch.equal(flat(list(model.parameters())), before)
    assert reductions[0] == 50 + ("static_graph" in ddp_options)
    # Each rank has climbed by a gradient of its own.
    norms = [torch.zeros(()) for _ in range(dist.get_world_size())]
    dist.all_gather(norms, sam.grad_norm)
    assert len({n.item() for n in norms}) == dist.get_world_size()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("option", ["", "gradient_as_bucket_view", "find_unused_parameters", "static_graph"])
def test_replicas_stay_equal_when_each_climbs_by_its_own_gradient(world_size, base, option):
    on_ranks(world_size, check_replicas, base, {option: True} if option else {})


def check_part() -> None:
    """The outer layer alone is perturbed; on all ranks' samples as in one process."""

    def make(model: Model) -> FusedSAM:
        groups = [{"params": model.inner.parameters(), "perturb": False}, {"params": model.outer.parameters()}]
        return FusedSAM(groups, torch.optim.SGD, rho=RHO, lr=0.05, momentum=0.9)

    inside, twin = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    model = DistributedDataParallel(inside)
    sam, plain = make(inside), make(twin)
    data = [batches(6, rank, torch.float64) for rank in range(2)]
    for mine, *all_ranks in zip(data[dist.get_rank()], *data, strict=True):
        train(sam, model, [mine])
        train(plain, twin, [tuple(torch.cat(parts) for parts in zip(*all_ranks, strict=True))])
        assert_same_bits(flat(list(inside.parameters())))
        torch.testing.assert_close(flat(list(inside.parameters())), flat(list(twin.parameters())), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sam.grad_norm, plain.grad_norm, rtol=1e-9, atol=0)


def test_a_part_of_the_model_is_perturbed():
    on_ranks(2, check_part)


def check_momentum(base: str, options: dict[str, object]) -> None:
    """One gradient a step, all ranks'; the replicas climb alike, along a momentum that is the same on all."""
    model = DistributedDataParallel(make_model(), static_graph=bool(options.pop("static_graph", False)))
    reductions = count_reductions(model)
    optimizer, own = BASES[base]
    sam = FusedSAM(model.parameters(), optimizer, rho=RHO, direction="momentum", **own, **options)
    twin = make_model()
    plain = FusedSAM(twin.parameters(), optimizer, rho=RHO, direction="momentum", **own, **options)
    world = dist.get_world_size()
    everyone = [batches(10, rank) for rank in range(world)]
    for k, batch in enumerate(batches(10, dist.get_rank())):
        train(sam, model, [batch])
        train(plain, twin, [tuple(torch.cat([data[k][i] for data in everyone]) for i in range(2))])
    assert_same_bits(flat(list(model.parameters())))
    assert reductions[0] == 10, reductions
    torch.testing.assert_close(flat(list(model.parameters())), flat(list(twin.parameters())), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "options", [{}, {"adaptive": True}, {"start": 4, "interval": 2}, {"static_graph": True}], ids=str
)
def test_along_the_momentum(base, options):
    on_ranks(2, check_momentum, base, dict(options))


def check_late(static_graph: bool) -> None:
    """Plain steps before `start`, synchronised; then each rank climbs by its own gradient."""
    model = DistributedDataParallel(make_model(dtype=torch.float64), static_graph=static_graph)
    reductions = count_reductions(model)
    optimizer, own = BASES["momentum"]
    sam = FusedSAM(model.parameters(), optimizer, rho=RHO, first_pass_context=model.no_sync, start=6, **own)
    twin = make_model(dtype=torch.float64)
    base = optimizer(twin.parameters(), **own)
    everyone = [batches(6, rank, torch.float64) for rank in range(dist.get_world_size())]
    for k, batch in enumerate(batches(6, dist.get_rank(), torch.float64)):
        train(sam, model, [batch])
        base.zero_grad()
        loss_of(twin, tuple(torch.cat([data[k][i] for data in everyone]) for i in range(2))).backward()
        base.step()
    assert_same_bits(flat(list(model.parameters())))
    torch.testing.assert_close(flat(list(model.parameters())), flat(list(twin.parameters())), rtol=1e-9, atol=1e-12)
    assert reductions[0] == 6
    train(sam, model, batches(4, 10 + dist.get_rank(), torch.float64))
    assert_same_bits(flat(list(model.parameters())))
    assert reductions[0] == 10
    norms = [torch.zeros((), dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(norms, sam.grad_norm)
    assert len({n.item() for n in norms}) == dist.get_world_size()


@pytest.mark.parametrize("static_graph", [False, True])
def test_late_sam(static_graph):
    on_ranks(2, check_late, static_graph)


def check_m_sharpness(interval: int, infinite_rank: int | None) -> None:
    """Against one process that computes every rank's ascent in turn; in fp64, to compare closely."""
    rank, world_size, steps = dist.get_rank(), dist.get_world_size(), 9
    model = DistributedDataParallel(make_model(dtype=torch.float64))
    reductions = count_reductions(model)
    optimizer, options = BASES["momentum"]
    sam = FusedSAM(
        model.parameters(), optimizer, rho=RHO, interval=interval, first_pass_context=model.no_sync, **options
    )

    plain_model = make_model(dtype=torch.float64)
    plain = PlainSAM(plain_model, optimizer(plain_model.parameters(), **options), RHO)
    data = [batches(steps, r, torch.float64) for r in range(world_size)]

    def step(k: int, is_sam_step: bool, infinite: bool) -> None:
        calls = 0

        def closure() -> None:
            nonlocal calls
            calls += 1
            sam.zero_grad()
            factor = torch.inf if infinite and rank == infinite_rank and calls == 1 else 1
            (loss_of(model, data[rank][k]) * factor).backward()

        sam.step(closure)
        assert calls == (2 if is_sam_step else 1)

    def plain_step(k: int, is_sam_step: bool, infinite: bool) -> None:
        gradients = []
        for r in range(world_size):
            loss = functools.partial(loss_of, plain_model, data[r][k])
            stays = not is_sam_step or (infinite and r == infinite_rank)
            gradients.append(plain.gradients(loss()) if stays else plain.gradients_above(loss))
        plain.step([torch.stack(g).mean(0) for g in zip(*gradients, strict=True)])

    for k in range(steps):
        kind = {"is_sam_step": (k + 1) % interval == 0, "infinite": k == 5 and infinite_rank is not None}
        step(k, **kind)
        plain_step(k, **kind)
        assert not kind["infinite"] or sam.grad_norm.isfinite() == (rank != infinite_rank)
        torch.testing.assert_close(flat(list(model.parameters())), flat(plain.params), rtol=1e-10, atol=1e-12)
        assert_same_bits(flat(list(model.parameters())))
    assert reductions[0] == steps  # the last pass of every step, and no other


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("interval", [1, 3])
def test_no_sync_climbs_by_each_ranks_own_gradient(world_size, interval):
    on_ranks(world_size, check_m_sharpness, interval, None)


@pytest.mark.parametrize("world_size", [2, 4])
def test_rank_with_infinite_first_gradient_stays_at_w_and_the_others_climb(world_size):
    on_ranks(world_size, check_m_sharpness, 1, 1)


def check_sharded_base_optimizer() -> None:
    """A base optimizer that keeps a part of the state on each rank, against one that keeps all."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns, of torch's own deprecations

    models = [DistributedDataParallel(make_model()) for _ in range(2)]
    optimizer, options = BASES["adamw"]
    bases = [
        ZeroRedundancyOptimizer(models[0].parameters(), optimizer, **options),
        optimizer(models[1].parameters(), **options),
    ]
    for model, base in zip(models, bases, strict=True):
        sam = FusedSAM(base, rho=RHO, first_pass_context=model.no_sync)
        train(sam, model, batches(10, dist.get_rank()))
        assert_same_bits(flat(list(model.parameters())))
    assert torch.equal(*(flat(list(model.parameters())) for model in models))


def test_zero_redundancy_optimizer_as_the_base():
    on_ranks(2, check_sharded_base_optimizer)


def check_zero(form: str) -> None:
    """direction="gradient" around ZeroRedundancyOptimizer, on all ranks' samples: as one process on their union."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    rank, world_size, steps = dist.get_rank(), dist.get_world_size(), 8
    model = DistributedDataParallel(make_model(dtype=torch.float64))
    optimizer, options = BASES["adamw"]
    sam = FusedSAM(ZeroRedundancyOptimizer(model.parameters(), optimizer, **options), rho=RHO, interval=2)
    assert len(sam.base_optimizer.optim.param_groups[0]["params"]) < len(list(model.parameters()))
    alone = make_model(dtype=torch.float64)
    plain = PlainSAM(alone, optimizer(alone.parameters(), **options), RHO)
    data = [batches(steps, r, torch.float64) for r in range(world_size)]
    for k in range(steps):
        if form == "closure":
            train(sam, model, data[rank][k : k + 1])
        else:
            loss_of(model, data[rank][k]).backward()
            if sam.first_step(zero_grad=True):
                loss_of(model, data[rank][k]).backward()
            sam.second_step(zero_grad=True)
        union = tuple(torch.cat(parts) for parts in zip(*(d[k] for d in data), strict=True))
        loss = functools.partial(loss_of, alone, union)
        plain.step(plain.gradients_above(loss) if (k + 1) % 2 == 0 else plain.gradients(loss()))
        torch.testing.assert_close(
            flat(list(model.parameters())), flat(list(alone.parameters())), rtol=1e-9, atol=1e-10
        )
    assert sam.param_groups[0]["sam_step"] == steps
    assert_same_bits(flat(list(model.parameters())))


@pytest.mark.parametrize("form", ["two calls", "closure"])
def test_around_zero_redundancy_optimizer_equals_one_process(form):
    on_ranks(2, check_zero, form)


def check_zero_refused() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params = list(make_model().parameters())
    with pytest.raises(ValueError, match=r"optimizer_class=FusedSAM.*: put FusedSAM around it"):
        ZeroRedundancyOptimizer(params, FusedSAM, base_optimizer=torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"can't use ZeroRedundancyOptimizer.*use direction='gradient'"):
        FusedSAM(ZeroRedundancyOptimizer(params, torch.optim.SGD, lr=0.1, momentum=0.9), direction="momentum")
    FusedSAM(ZeroRedundancyOptimizer(params, torch.optim.SGD, lr=0.1))


def test_what_zero_redundancy_optimizer_cannot_do_is_refused():
    on_ranks(2, check_zero_refused)


def check_gradients_under_way(which: str) -> None:
    """Averaged by hand with functional collectives, whose results have no memory until somebody waits."""
    import torch.distributed._functional_collectives as funcol

    rank, world_size, steps = dist.get_rank(), dist.get_world_size(), 3
    for backend in ("cpp", "foreach", "reference"):
        model, alone = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
        sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1, backend=backend)
        plain = PlainSAM(alone, torch.optim.SGD(alone.parameters(), lr=0.1), RHO)
        data = [batches(steps, r, torch.float64) for r in range(world_size)]

        def average(model: nn.Module = model) -> None:
            for p in model.parameters():
                if which == "all" or p.dim() == 2:
                    p.grad = funcol.all_reduce(p.grad, "sum", dist.group.WORLD)
                    assert type(p.grad) is funcol.AsyncCollectiveTensor
                else:
                    dist.all_reduce(p.grad)

        for k in range(steps):
            (loss_of(model, data[rank][k]) / world_size).backward()
            average()
            sam.first_step()
            sam.zero_grad()
            (loss_of(model, data[rank][k]) / world_size).backward()
            average()
            sam.second_step(zero_grad=True)
            union = tuple(torch.cat(parts) for parts in zip(*(d[k] for d in data), strict=True))
            plain.step(plain.gradients_above(functools.partial(loss_of, alone, union)))
            assert float(sam.grad_norm) == pytest.approx(float(plain.norm))
            torch.testing.assert_close(
                flat(list(model.parameters())), flat(list(alone.parameters())), rtol=1e-9, atol=1e-10
            )


@pytest.mark.parametrize("which", ["all", "the matrices"])
def test_gradients_whose_collective_is_under_way_are_waited_for(which):
    on_ranks(2, check_gradients_under_way, which)


def check_union_batch(micro_batches: int, two_calls: bool) -> None:
    """Without first_pass_context: the same as one process on all ranks' samples."""
    rank, world_size, steps = dist.get_rank(), dist.get_world_size(), 10
    model = DistributedDataParallel(make_model(dtype=torch.float64))
    reductions = count_reductions(model)
    optimizer, options = BASES["adamw"]
    sam = FusedSAM(model.parameters(), optimizer, rho=RHO, **options)
    plain_model = make_model(dtype=torch.float64)
    plain = PlainSAM(plain_model, optimizer(plain_model.parameters(), **options), RHO)
    data = [batches(steps, r, torch.float64) for r in range(world_size)]

    def backward(batch: tuple[Tensor, Tensor]) -> Tensor:
        parts = list(zip(*(t.chunk(micro_batches) for t in batch), strict=True))
        total = torch.zeros((), dtype=torch.float64)
        for i, part in enumerate(parts):
            with nullcontext() if i == len(parts) - 1 else model.no_sync():
                loss = loss_of(model, part) / len(parts)
                loss.backward()
            total += loss.detach()
        return total

    for k in range(steps):
        if two_calls:
            backward(data[rank][k])
            sam.first_step(zero_grad=True)
            backward(data[rank][k])
            sam.second_step(zero_grad=True)
        else:

            def closure(batch: tuple[Tensor, Tensor] = data[rank][k]) -> Tensor:
                sam.zero_grad()
                return backward(batch)

            loss_at_w = loss_of(plain_model, data[rank][k])
            torch.testing.assert_close(sam.step(closure), loss_at_w.detach(), rtol=1e-10, atol=0)
        union = tuple(torch.cat(parts) for parts in zip(*(data[r][k] for r in range(world_size)), strict=True))
        plain.step(plain.gradients_above(lambda union=union: loss_of(plain_model, union)))
        torch.testing.assert_close(sam.grad_norm, plain.norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(flat(list(model.parameters())), flat(plain.params), rtol=1e-9, atol=1e-12)
    assert_same_bits(flat(list(model.parameters())))
    assert reductions[0] == 2 * steps


@pytest.mark.parametrize("two_calls", [False, True], ids=["closure", "two calls"])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("world_size", [2, 4])
def test_synchronised_first_pass_equals_one_process_on_the_union_batch(world_size, micro_batches, two_calls):
    on_ranks(world_size, check_union_batch, micro_batches, two_calls)


def test_example_learns_and_keeps_the_replicas_equal():
    printed = torchrun("train_ddp.py")
    for form in ("two calls", "closure"):
        assert printed[f"{form}, replicas equal to the bit"] == "True"
        assert float(printed[f"{form}, accuracy"]) > 0.85


# -- without processes -------------------------------------------------------------------------------------------------


class Recorder:
    """A factory of context managers that notes what ran inside."""

    def __init__(self) -> None:
        self.inside = False
        self.passes: list[bool] = []

    def __call__(self) -> "Recorder":
        return self

    def __enter__(self) -> None:
        assert not self.inside
        self.inside = True

    def __exit__(self, *exc_info: object) -> None:
        self.inside = False


def recorded_steps(n: int, **options) -> tuple[FusedSAM, list[list[bool]]]:
    recorder = Recorder()
    w = nn.Parameter(torch.ones(3))
    sam = FusedSAM([w], torch.optim.SGD, lr=0.1, first_pass_context=recorder, **options)
    steps = []
    for _ in range(n):
        passes: list[bool] = []

        def closure(passes: list[bool] = passes) -> Tensor:
            passes.append(recorder.inside)
            sam.zero_grad()
            loss = w.square().sum()
            loss.backward()
            return loss

        sam.step(closure)
        steps.append(passes)
    return sam, steps


def test_context_is_around_the_first_of_two_passes_only():
    assert recorded_steps(2)[1] == [[True, False], [True, False]]


def test_context_is_not_around_the_only_pass_of_a_plain_step():
    assert recorded_steps(4, interval=3)[1] == [[False], [False], [True, False], [False]]


def test_context_is_not_around_the_second_pass_when_gradients_are_there():
    recorder = Recorder()
    w = nn.Parameter(torch.ones(3))
    sam = FusedSAM(torch.optim.SGD([w], lr=0.1), first_pass_context=recorder)
    w.square().sum().backward()
    inside = []

    def closure() -> None:
        inside.append(recorder.inside)
        w.square().sum().backward()

    sam.step(closure)
    assert inside == [False]


def test_context_is_left_when_the_first_pass_raises():
    recorder = Recorder()
    w = nn.Parameter(torch.ones(3))
    sam = FusedSAM([w], torch.optim.SGD, lr=0.1, first_pass_context=recorder)

    def closure() -> None:
        raise KeyError("here")

    with pytest.raises(KeyError):
        sam.step(closure)
    assert not recorder.inside
    assert not sam.perturbed


@pytest.mark.parametrize("wrong", [nullcontext(), 3, "no_sync"])
def test_context_that_is_no_factory_is_refused(wrong):
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=r"first_pass_context must be a function .*without calling it"):
        FusedSAM([w], torch.optim.SGD, lr=0.1, first_pass_context=wrong)
    with pytest.raises(TypeError, match=r"first_pass_context must be a function"):
        FusedSAM(torch.optim.SGD([w], lr=0.1), first_pass_context=wrong)


def test_pickle_leaves_the_context_behind():
    w = nn.Parameter(torch.ones(3))
    # A lambda can't be pickled, and a bound no_sync would bring its model along.
    sam = FusedSAM([w], torch.optim.SGD, lr=0.1, first_pass_context=lambda: nullcontext())
    assert pickle.loads(pickle.dumps(sam)).first_pass_context is None
    assert copy.deepcopy(sam).first_pass_context is sam.first_pass_context
