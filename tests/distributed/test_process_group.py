"""process_group: the norm over ranks that hold different parameters, as the stages of a pipeline do."""

import copy
import functools
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor.debug import CommDebugMode

from fastsam import FusedSAM
from tests.distributed.test_fsdp import RHO, batch, full, loss_of, make_model, make_plain, make_sam
from tests.oracle import PlainSAM
from tests.ranks import assert_same_bits, flat, on_ranks

SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
CUT = 3
"""The first layer of the second stage."""


def samples(step: int) -> tuple[Tensor, Tensor]:
    """Of two ranks: 8."""
    parts = zip(batch(step, 0), batch(step, 1), strict=True)
    return tuple(torch.cat(part) for part in parts)


def stage_of(model: nn.Sequential, index: int) -> nn.Sequential:
    return model[CUT:] if index else model[:CUT]


def assert_equal_stage(module: nn.Module, index: int, plain: PlainSAM, sam: FusedSAM) -> None:
    first = len(list(make_model()[:CUT].parameters()))
    torch.testing.assert_close(full(module), flat(plain.params[first:] if index else plain.params[:first]), **CLOSE)
    torch.testing.assert_close(sam.grad_norm.double(), plain.norm, rtol=1e-9, atol=0)
    assert_same_bits(sam.grad_norm)


class Stage:
    """One of two stages, trained by a schedule of torch's."""

    def __init__(self, schedule: str = "GPipe", **options: object) -> None:
        self.rank = dist.get_rank()
        self.module = stage_of(make_model(), self.rank)
        stage = PipelineStage(self.module, self.rank, 2, torch.device("cpu"))
        self.schedule = SCHEDULES[schedule](stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
        options = {"process_group": dist.group.WORLD, "rho": RHO, "lr": 0.05, "momentum": 0.9, **options}
        self.sam = FusedSAM(self.module.parameters(), torch.optim.SGD, **options)

    def run(self, step: int) -> Tensor | None:
        x, y = samples(step)
        losses: list[Tensor] = []
        if self.rank == 0:
            self.schedule.step(x)
            return None
        self.schedule.step(target=y, losses=losses)
        return torch.stack(losses).mean()

    def two_calls(self, step: int) -> None:
        self.run(step)
        assert self.sam.first_step(zero_grad=True)
        self.run(step)
        self.sam.second_step(zero_grad=True)

    def closure(self, step: int) -> None:
        def closure() -> Tensor | None:
            self.sam.zero_grad()
            return self.run(step)

        self.sam.step(closure)


# -- two stages --------------------------------------------------------------------------------------------------------


def check_two_stages(schedule: str, form: str, adaptive: bool, backend: str | None) -> None:
    stage = Stage(schedule, adaptive=adaptive, backend=backend)
    plain_model, plain = make_plain("momentum", adaptive)
    for step in range(6):
        getattr(stage, form)(step)
        plain.step(plain.gradients_above(functools.partial(loss_of, plain_model, samples(step))))
        assert_equal_stage(stage.module, stage.rank, plain, stage.sam)


@pytest.mark.parametrize("form", ["two_calls", "closure"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_stages_equal_one_process(schedule, adaptive, form):
    on_ranks(2, check_two_stages, schedule, form, adaptive, None)


def test_every_backend(backend):
    on_ranks(2, check_two_stages, "GPipe", "two_calls", False, backend)


def check_momentum() -> None:
    options = {"direction": "momentum", "rho": 1.0}
    stage = Stage(**options)
    twin = make_model()
    plain = FusedSAM(twin.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, **options)
    for step in range(5):
        assert stage.sam.first_step() is plain.first_step() is (step > 0)
        stage.run(step)
        loss_of(twin, samples(step)).backward()
        for sam in (stage.sam, plain):
            sam.second_step(zero_grad=True)
        torch.testing.assert_close(full(stage.module), flat(stage_of(twin, stage.rank).parameters()), **CLOSE)
    torch.testing.assert_close(stage.sam.grad_norm, plain.grad_norm, rtol=1e-9, atol=0)


def test_along_the_momentum():
    on_ranks(2, check_momentum)


def check_rho_by_hand() -> None:
    """The recipe of docs/many-processes.md for sums that no process group makes."""
    stage = Stage(process_group=None)
    plain_model, plain = make_plain("momentum")
    for step in range(4):
        stage.run(step)
        n = stage.sam._grad_norm()
        square = n**2
        dist.all_reduce(square)
        stage.sam.rho = RHO * n / square.sqrt()
        stage.sam.first_step(zero_grad=True)
        stage.run(step)
        stage.sam.second_step(zero_grad=True)
        plain.step(plain.gradients_above(functools.partial(loss_of, plain_model, samples(step))))
        expected = flat(stage_of(plain_model, stage.rank).parameters())
        torch.testing.assert_close(full(stage.module), expected, **CLOSE)


def test_rho_by_hand():
    on_ranks(2, check_rho_by_hand)


# -- two stages, each on two shards ------------------------------------------------------------------------------------


@functools.cache
def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))


def passes_by_hand(module: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Forward and backward through both stages; activations and their gradients go from rank to rank."""
    group = square().get_group("stage")
    x, y = data
    hidden = torch.zeros(len(x), 10, dtype=x.dtype)
    if square().get_local_rank("stage") == 0:
        out = module(x)
        dist.send(out.detach(), group=group, group_dst=1)
        dist.recv(hidden, group=group, group_src=1)
        out.backward(hidden)
    else:
        dist.recv(hidden, group=group, group_src=0)
        hidden.requires_grad_()
        nn.functional.mse_loss(module(hidden), y).backward()
        dist.send(hidden.grad, group=group, group_dst=0)


def check_stages_and_shards(adaptive: bool) -> None:
    mesh = square()
    index, shard = mesh.get_local_rank("stage"), mesh.get_local_rank("shard")
    module = stage_of(make_model(), index)
    for layer in (module[0], module):
        fully_shard(layer, mesh=mesh["shard"])
    sam = make_sam(module, "momentum", adaptive=adaptive, process_group=mesh.get_group("stage"))
    plain_model, plain = make_plain("momentum", adaptive)
    for step in range(6):
        passes_by_hand(module, batch(step, shard))
        with CommDebugMode() as communication:
            assert sam.first_step(zero_grad=True)
        assert communication.get_total_counts() == 2  # over the shards, over the stages
        passes_by_hand(module, batch(step, shard))
        sam.second_step(zero_grad=True)
        plain.step(plain.gradients_above(functools.partial(loss_of, plain_model, samples(step))))
        assert_equal_stage(module, index, plain, sam)
    passes_by_hand(module, batch(0, shard))
    norm = sam._grad_norm()
    sam.first_step()
    assert torch.equal(norm, sam.grad_norm)
    sam.restore()


@pytest.mark.parametrize("adaptive", [False, True])
def test_two_stages_on_two_shards_equal_one_process(adaptive):
    on_ranks(4, check_stages_and_shards, adaptive)


# -- ranks that have nothing -------------------------------------------------------------------------------------------


def check_rank_without_gradients(when: str) -> None:
    """A rank that has none takes part in the sum, knows the norm, and moves nothing."""
    stage = Stage()
    if when == "later":
        stage.two_calls(0)
    w = full(stage.module)
    stage.run(1)
    norm = flat([p.grad for p in stage.module.parameters()]).norm()
    dist.broadcast(norm, src=0)
    if stage.rank == 1:
        stage.sam.zero_grad()
    torch.testing.assert_close(stage.sam._grad_norm().double(), norm, rtol=1e-6, atol=0)
    assert stage.sam.first_step(zero_grad=True)
    assert torch.equal(full(stage.module), w) is (stage.rank == 1)
    torch.testing.assert_close(stage.sam.grad_norm.double(), norm, rtol=1e-6, atol=0)
    stage.run(1)
    stage.sam.second_step(zero_grad=True)
    assert not torch.equal(full(stage.module), w)
    stage.two_calls(2)


@pytest.mark.parametrize("when", ["from the start", "later"])
def test_rank_without_gradients(when):
    on_ranks(2, check_rank_without_gradients, when)


def check_gradients_of_zeros() -> None:
    """They are gradients: what one rank has is no error on the other, which has none, and their norm is 0."""
    w = nn.Parameter(torch.ones(4))
    sam = FusedSAM([w], torch.optim.SGD, lr=0.1, process_group=dist.group.WORLD)
    for step in range(4):
        w.grad = torch.zeros(4) if step % 2 == dist.get_rank() else None
        with CommDebugMode() as communication:
            assert sam.first_step()
        assert communication.get_total_counts() == 1
        assert torch.equal(w.detach(), torch.ones(4))
        assert float(sam.grad_norm) == 0
        sam.restore()


def test_gradients_of_zeros_on_one_rank():
    on_ranks(2, check_gradients_of_zeros)


def check_one_stage_alone() -> None:
    """Only the second stage is perturbed, as where SAM is for the output head."""
    stage = Stage()
    stage.sam.param_groups[0]["perturb"] = stage.rank == 1
    for step in range(2):
        w = full(stage.module)
        stage.run(step)
        norm = flat([p.grad for p in stage.module.parameters()]).norm()
        dist.broadcast(norm, src=1)
        torch.testing.assert_close(stage.sam._grad_norm().double(), norm, rtol=1e-6, atol=0)
        assert stage.sam.first_step(zero_grad=True)
        torch.testing.assert_close(stage.sam.grad_norm.double(), norm, rtol=1e-6, atol=0)
        assert torch.equal(full(stage.module), w) is (stage.rank == 0)
        stage.run(step)
        stage.sam.second_step(zero_grad=True)
        assert not torch.equal(full(stage.module), w)


def test_one_stage_alone_is_perturbed():
    on_ranks(2, check_one_stage_alone)


def check_none() -> None:
    stage = Stage()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no parameter has a gradient"):
            stage.sam.first_step()
        assert not stage.sam.perturbed
        stage.two_calls(0)
    plain = Stage(start=1)  # a plain step sums nothing, and meets on one rank alone what would be refused
    with CommDebugMode() as communication:
        assert not plain.sam.first_step()
    assert communication.get_total_counts() == 0


def test_no_gradients_on_any_rank_is_an_error_on_each():
    on_ranks(2, check_none)


# -- groups ------------------------------------------------------------------------------------------------------------


def norms(sam: FusedSAM) -> tuple[float, int]:
    """The norm of one ascent, and its collectives."""
    with CommDebugMode() as communication:
        sam.first_step()
    norm = float(sam.grad_norm)
    sam.restore()
    return norm, communication.get_total_counts()


def check_groups() -> None:
    w = nn.Parameter(torch.ones(4))
    w.grad = torch.full((4,), float(dist.get_rank() + 1))
    own, both = 2.0 * (dist.get_rank() + 1), 2.0 * 5**0.5
    singles = [dist.new_group([rank]) for rank in range(2)]
    mine, other = singles[dist.get_rank()], singles[1 - dist.get_rank()]

    # Both forms of call; set at any time; None costs nothing.
    sam = FusedSAM([w], torch.optim.SGD, lr=0.1)
    assert sam.process_group is None
    assert norms(sam) == (own, 0)
    for _ in range(2):
        sam.process_group = dist.group.WORLD
        assert norms(sam) == (pytest.approx(both, rel=1e-6), 1)
        sam.process_group = mine
        assert norms(sam) == (own, 1)
        sam.process_group = None
        assert norms(sam) == (own, 0)
    sam = FusedSAM(torch.optim.SGD([w], lr=0.1), process_group=dist.group.WORLD)
    assert norms(sam) == (pytest.approx(both, rel=1e-6), 1)

    def set_it(value: object) -> None:
        sam.process_group = value

    refused = {
        "is no member: its parameters belong to another group": other,
        r"pass its get_group\(\)": init_device_mesh("cpu", (2,)),
        "but got 'gloo'": "gloo",
        "but got <class 'torch.distributed.distributed_c10d.ProcessGroup'>": dist.ProcessGroup,
    }
    for message, value in refused.items():
        for call in (
            functools.partial(FusedSAM, [w], torch.optim.SGD, lr=0.1, process_group=value),
            lambda v=value: set_it(v),
        ):
            with pytest.raises(
                TypeError, match=rf"process_group must be a torch\.distributed\.ProcessGroup .*{message}"
            ):
                call()
    assert sam.process_group is dist.group.WORLD

    # A pickle leaves it behind, and says so at the next ascent, not before; a deepcopy shares it.
    copied = copy.deepcopy(sam)
    assert copied.process_group is dist.group.WORLD
    copied.param_groups[0]["params"][0].grad = w.grad.clone()
    assert norms(copied) == (pytest.approx(both, rel=1e-6), 1)
    for group, expected in ((dist.group.WORLD, both), (None, own)):
        loaded = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(sam))))
        assert loaded.process_group is None
        (p,) = loaded.param_groups[0]["params"]
        p.grad = w.grad.clone()
        for call in (loaded.first_step, loaded._grad_norm, copy.deepcopy(loaded)._grad_norm):
            with pytest.raises(RuntimeError, match=r"set sam\.process_group again"):
                call()
        assert not loaded.perturbed
        loaded.process_group = group
        assert norms(loaded)[0] == pytest.approx(expected, rel=1e-6)


def test_groups():
    on_ranks(2, check_groups)


def check_mixed_with_plain_steps() -> None:
    stage = Stage(interval=2)
    plain_model, plain = make_plain("momentum")
    for step in range(4):
        stage.run(step)
        if stage.sam.first_step(zero_grad=True):
            stage.run(step)
        stage.sam.second_step(zero_grad=True)
        loss = functools.partial(loss_of, plain_model, samples(step))
        plain.step(plain.gradients_above(loss) if step % 2 else plain.gradients(loss()))
    assert_equal_stage(stage.module, stage.rank, plain, stage.sam)


def test_interval():
    on_ranks(2, check_mixed_with_plain_steps)
