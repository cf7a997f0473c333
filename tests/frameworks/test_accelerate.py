"""FusedSAM prepared by the real Accelerator, in both forms of call, against SAM written out in torch."""

import copy
import functools
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples import train_accelerate
from fastsam import FusedSAM
from tests.frameworks.huggingface import fresh_state, launched, scale_losses
from tests.oracle import PlainSAM, copies, same_bits
from tests.ranks import assert_same_bits, flat, launch, on_ranks
from tests.scaled import make_scaler

RHO, LR, CLIP, GAMMA = 0.1, 0.1, 1.0, 0.9
Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    with fresh_state():
        yield


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype)


def make_data(n: int, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 6, generator=generator).to(dtype), torch.arange(n) % 5)


def prepare(accelerator: Accelerator, n: int = 36, dtype: torch.dtype = torch.float64, **options: Any) -> list[Any]:
    model = make_model(dtype)
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(sam, GAMMA)
    return list(accelerator.prepare(model, sam, scheduler, DataLoader(make_data(n, dtype), batch_size=4)))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train_by_closure(accelerator: Accelerator, model: Any, sam: Any, scheduler: Any, loader: Any) -> list[float]:
    losses = []
    for batch in loader:

        def closure(batch: Batch = batch) -> None:
            sam.zero_grad()
            loss = loss_of(model, batch)
            losses.append(loss.item())
            accelerator.backward(loss)

        sam.step(closure)
        scheduler.step()
    return losses


def train_by_hand(
    steps: list[list[Batch]],
    divisor: int = 1,
    interval: int = 1,
    clip: float = math.inf,
    ranks: int = 1,
    dtype: torch.dtype = torch.float64,
    autocast: bool = False,
    start: int = 0,
) -> nn.Module:
    """SAM around SGD in plain torch; a step is a list of micro-batches, their losses are summed and divided."""
    model = make_model(dtype)
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    sam = PlainSAM(model, base, RHO, interval=interval, start=start)
    for k, step in enumerate(steps):

        def loss(step: list[Batch] = step) -> Tensor:
            total = torch.zeros((), dtype=dtype)
            for x, y in step:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    logits = model(x)
                total = total + nn.functional.cross_entropy(logits.to(dtype), y)
            return total / divisor

        gradients = sam.gradients_above(loss) if sam.is_sam_step else sam.gradients(loss())
        base.param_groups[0]["lr"] = LR * GAMMA ** (k * ranks)
        norm = flat(gradients).norm()
        sam.step([g * (clip / (norm + 1e-6)).clamp(max=1) for g in gradients])
    return model


def windows(n: int, size: int, dtype: torch.dtype = torch.float64) -> list[list[Batch]]:
    """What a loader with micro-batches of 4 gives, `size` of them a step, the last step of the epoch shorter."""
    micro_batches = list(DataLoader(make_data(n, dtype), batch_size=4))
    return [micro_batches[i : i + size] for i in range(0, len(micro_batches), size)]


def assert_close(actual: list[Tensor], expected: nn.Module) -> None:
    for p, q in zip(actual, expected.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_two_calls(accumulated: int, interval: int) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    model, sam, scheduler, loader = prepare(accelerator, interval=interval)
    train_accelerate.train(accelerator, model, sam, scheduler, loader, epochs=2)
    steps = 2 * windows(36, accumulated)
    assert len(steps) == sam.param_groups[0]["sam_step"] == {1: 18, 2: 10}[accumulated]
    expected = train_by_hand(steps, accumulated, interval, CLIP)
    assert_close(copies(model.parameters()), expected)


@pytest.mark.parametrize("form", ["two calls", "closure"])
def test_late_sam(form: str) -> None:
    accelerator = Accelerator(cpu=True)
    model, sam, scheduler, loader = prepare(accelerator, start=5, interval=2)
    if form == "two calls":
        for batch in loader:
            one_step(model, sam, scheduler, batch)
    else:
        losses = train_by_closure(accelerator, model, sam, scheduler, loader)
        assert len(losses) == 9 + 2
    assert_close(copies(model.parameters()), train_by_hand(windows(36, 1), interval=2, start=5))


@pytest.mark.parametrize(("form", "accumulated"), [("two calls", 1), ("two calls", 2), ("closure", 1)])
def test_along_the_momentum(form: str, accumulated: int) -> None:
    """first_step() comes before the first backward of a window; against the same loop without Accelerate."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    model, sam, scheduler, loader = prepare(accelerator, direction="momentum")
    if form == "closure":
        train_by_closure(accelerator, model, sam, scheduler, loader)
    else:
        for i, batch in enumerate(loader):
            with accelerator.accumulate(model):
                if i % accumulated == 0:
                    assert sam.optimizer.first_step() is (i > 0)
                accelerator.backward(loss_of(model, batch))
                sam.step()
                scheduler.step()
                sam.zero_grad()
    twin = make_model()
    plain = FusedSAM(twin.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9, direction="momentum")
    for k, window in enumerate(windows(36, accumulated)):
        plain.param_groups[0]["lr"] = LR * GAMMA**k
        plain.first_step()
        for batch in window:
            (loss_of(twin, batch) / accumulated).backward()
        plain.second_step(zero_grad=True)
    assert_close(copies(model.parameters()), twin)


def test_along_the_momentum_step_without_first_step_says_what_to_do() -> None:
    accelerator = Accelerator(cpu=True)
    model, sam, _, loader = prepare(accelerator, direction="momentum")
    accelerator.backward(loss_of(model, next(iter(loader))))
    with pytest.raises(RuntimeError, match="call first_step"):
        sam.step()


@pytest.mark.parametrize("interval", [1, 2])
def test_closure(interval: int) -> None:
    accelerator = Accelerator(cpu=True)
    model, sam, scheduler, loader = prepare(accelerator, interval=interval)
    losses = train_by_closure(accelerator, model, sam, scheduler, loader)
    assert len(losses) == 9 + 9 // interval
    assert losses[interval] > losses[interval - 1]  # the first SAM step's batch, at w + e_w and at w
    assert_close(copies(model.parameters()), train_by_hand(windows(36, 1), interval=interval))


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_a_closure_while_gradients_are_accumulated_is_refused(direction: str) -> None:
    """It would be run for the last micro-batch of each step alone."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, sam, _, loader = prepare(accelerator, direction=direction)
    ran = []

    def closure() -> None:
        ran.append(1)

    for i, _ in zip(range(2), loader, strict=False):
        w = copies(model.parameters())
        with accelerator.accumulate(model):
            if i == 0:
                sam.step(closure)  # Accelerate does nothing
            else:
                with pytest.raises(
                    RuntimeError, match=r"gradient_accumulation_steps=2 can't work with a closure.*pass"
                ):
                    sam.step(closure)
        assert same_bits(copies(model.parameters()), w)
    assert not ran


def test_a_closure_of_all_micro_batches_goes_past_the_prepared_optimizer() -> None:
    """As the error says."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, sam, scheduler, loader = prepare(accelerator)
    window: list[Batch] = []

    def closure() -> None:
        sam.optimizer.zero_grad()
        for batch in window:
            accelerator.backward(loss_of(model, batch))

    for batch in loader:
        window.append(batch)
        with accelerator.accumulate(model):
            if accelerator.sync_gradients:
                sam.optimizer.step(closure)
                window.clear()
            scheduler.step()
    assert_close(copies(model.parameters()), train_by_hand(windows(36, 2), 2))


@pytest.mark.parametrize("form", ["two calls", "closure"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_around_a_prepared_optimizer(form: str, how: str) -> None:
    """FusedSAM(accelerator.prepare(optimizer)), of a script that was finished before SAM came; and copies of it."""
    accelerator = Accelerator(cpu=True)
    model = make_model()
    model, prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9))
    sam = FusedSAM(prepared, rho=RHO)

    def train(model: nn.Module, sam: FusedSAM, batch: Batch) -> None:
        def closure() -> None:
            sam.zero_grad()
            accelerator.backward(loss_of(model, batch))

        if form == "closure":
            sam.step(closure)
            return
        closure()
        sam.first_step(zero_grad=True)
        closure()
        sam.second_step()

    steps = [[*window] for window in windows(36, 1)]
    for (batch,) in steps[:4]:
        train(model, sam, batch)
    copied = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
    twin, other = copied((model, sam))
    for m in (model, twin):
        accelerator.backward(loss_of(m, steps[4][0]))
    other.base_optimizer.zero_grad()
    assert all(p.grad is None for p in twin.parameters())
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    for m, s in ((model, sam), (twin, other)):
        for (batch,) in steps[4:]:
            train(m, s, batch)
    assert same_bits(copies(model.parameters()), copies(twin.parameters()))
    hand = make_model()
    plain = PlainSAM(hand, torch.optim.SGD(hand.parameters(), lr=LR, momentum=0.9), RHO)
    for (batch,) in steps:
        plain.step(plain.gradients_above(lambda batch=batch: loss_of(hand, batch)))
    assert_close(copies(model.parameters()), hand)


def test_step_without_first_step_says_what_to_do() -> None:
    accelerator = Accelerator(cpu=True)
    model, sam, _, loader = prepare(accelerator)
    accelerator.backward(loss_of(model, next(iter(loader))))
    with pytest.raises(RuntimeError, match="call first_step"):
        sam.step()


@pytest.mark.parametrize("form", ["two calls", "closure"])
def test_bf16(form: str) -> None:
    """The same bf16 passes around fp32 weights: within 1 % of the way that the weights went."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, sam, scheduler, loader = prepare(accelerator, dtype=torch.float32)
    if form == "two calls":
        train_accelerate.train(accelerator, model, sam, scheduler, loader, epochs=1)
    else:
        train_by_closure(accelerator, model, sam, scheduler, loader)
    clip = CLIP if form == "two calls" else math.inf
    plain = train_by_hand(windows(36, 1, torch.float32), clip=clip, dtype=torch.float32)
    expected = train_by_hand(windows(36, 1, torch.float32), clip=clip, dtype=torch.float32, autocast=True)
    start, end = (flat(list(m.parameters())) for m in (make_model(torch.float32), expected))
    actual = flat(list(model.parameters()))
    assert (actual - end).norm() < 0.01 * (end - start).norm()
    assert (actual - end).norm() < 0.3 * (actual - flat(list(plain.parameters()))).norm()


@pytest.mark.parametrize("interval", [1, 2])
def test_save_state_and_load_state(interval: int, tmp_path: Path) -> None:
    """Resumed after step 5, in the middle of an interval, in objects made anew."""
    accelerator = Accelerator(cpu=True)
    model, sam, scheduler, loader = prepare(accelerator, interval=interval)
    batches = list(loader)
    for i, batch in enumerate(batches):
        one_step(model, sam, scheduler, batch)
        if i == 4:
            accelerator.save_state(str(tmp_path))
    with fresh_state():
        accelerator = Accelerator(cpu=True)
        resumed, sam, scheduler, loader = prepare(accelerator, interval=interval)
        with torch.no_grad():
            for p in resumed.parameters():
                p.zero_()
        accelerator.load_state(str(tmp_path))
        assert sam.param_groups[0]["sam_step"] == 5
        for batch in batches[5:]:
            one_step(resumed, sam, scheduler, batch)
    assert same_bits(copies(resumed.parameters()), copies(model.parameters()))


def one_step(model: nn.Module, sam: Any, scheduler: Any, batch: Batch) -> None:
    loss_of(model, batch).backward()
    if sam.optimizer.first_step(zero_grad=True):
        loss_of(model, batch).backward()
    sam.step()
    scheduler.step()
    sam.zero_grad()


def test_fp16_scaler_skips_a_step_and_does_not_say_so() -> None:
    """Accelerate takes no fp16 on CPU: this is its optimizer with the real scaler. The scaler always calls an optimizer
    that handles infinities itself, as FusedSAM and torch's fused=True ones do, and Accelerate takes that for a step.
    """
    Accelerator(cpu=True)
    steps = windows(36, 1)
    skipped = {}
    for name in ("fused", "sam"):
        model = make_model()
        base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, fused=name == "fused")
        wrapped = AcceleratedOptimizer(FusedSAM(base, rho=RHO) if name == "sam" else base, scaler=make_scaler())
        skipped[name] = []
        for k, [batch] in enumerate(steps):
            before = copies(model.parameters())
            wrapped.scaler.scale(loss_of(model, batch)).backward()
            if name == "sam":
                wrapped.optimizer.first_step(zero_grad=True)
                wrapped.scaler.scale(loss_of(model, batch)).backward()
            if k == 3:
                next(model.parameters()).grad[0, 0] = math.inf
            wrapped.step()
            assert same_bits(copies(model.parameters()), before) == (k == 3)
            skipped[name].append(wrapped.step_was_skipped)
            wrapped.zero_grad()
    assert skipped == {"fused": [False] * 9, "sam": [False] * 9}
    expected = make_model()
    base = torch.optim.SGD(expected.parameters(), lr=LR, momentum=0.9)
    plain = PlainSAM(expected, base, RHO)
    for k, [batch] in enumerate(steps):
        gradients = plain.gradients_above(functools.partial(loss_of, expected, batch))
        if k != 3:
            plain.step(gradients)
    assert_close(copies(model.parameters()), expected)


def test_the_recipe_leaves_w_after_an_exception() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, sam, scheduler, loader = prepare(accelerator)
    start = copies(model.parameters())

    def interrupt(*_: Any) -> None:
        if sam.optimizer.perturbed:
            assert not same_bits(copies(model.parameters()), start)
            raise KeyboardInterrupt

    model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_accelerate.train(accelerator, model, sam, scheduler, loader, epochs=1)
    assert same_bits(copies(model.parameters()), start)


@pytest.mark.parametrize("known", [False, True])
def test_loss_scaling_with_accumulation_and_clipping(known: bool) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    scale_losses(accelerator)
    options = {"grad_scaler": accelerator.scaler} if known else {}
    model, sam, scheduler, loader = prepare(accelerator, **options)
    train_accelerate.train(accelerator, model, sam, scheduler, loader, epochs=1)
    assert accelerator.scaler.get_scale() > 1
    assert_close(copies(model.parameters()), train_by_hand(windows(36, 2), 2, clip=CLIP))


def test_fp16_closures_go_past_accelerate() -> None:
    Accelerator(cpu=True)
    scaler = make_scaler()
    model = make_model()
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9, grad_scaler=scaler)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(sam, GAMMA)
    wrapped = AcceleratedOptimizer(sam, scaler=scaler)
    for k, [batch] in enumerate(windows(36, 1)):

        def closure(batch: Batch = batch) -> None:
            sam.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()

        if k == 1:
            with pytest.raises(RuntimeError, match="grad_scaler=scaler"):
                wrapped.step(closure)
        wrapped.optimizer.step(closure)
        scaler.update()
        scheduler.step()
    assert_close(copies(model.parameters()), train_by_hand(windows(36, 1)))


def check_ranks(accumulated: int, interval: int) -> tuple[list[Tensor], int]:
    with launched():
        config = DataLoaderConfiguration(even_batches=False)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated, dataloader_config=config)
        model, sam, scheduler, loader = prepare(accelerator, n=40, interval=interval)
        train_accelerate.train(accelerator, model, sam, scheduler, loader, epochs=1)
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        for p in model.parameters():
            assert_same_bits(p)
        return copies(model.parameters()), sam.param_groups[0]["sam_step"]


@pytest.mark.parametrize(("accumulated", "interval"), [(1, 1), (2, 1), (2, 2)])
def test_ranks_climb_together(accumulated: int, interval: int) -> None:
    """10 micro-batches, every other one on each of 2 ranks; Accelerate makes two steps of the schedule in each."""
    (trained, steps), _ = on_ranks(2, check_ranks, accumulated, interval)
    assert steps == math.ceil(5 / accumulated)
    expected = train_by_hand(windows(40, 2 * accumulated), 2 * accumulated, interval, CLIP, ranks=2)
    assert_close(trained, expected)


def check_each_by_its_own() -> list[Tensor]:
    with launched():
        accelerator = Accelerator(cpu=True)
        model, sam, scheduler, loader = prepare(accelerator, n=40)
        sam.optimizer.first_pass_context = functools.partial(accelerator.no_sync, model)
        train_by_closure(accelerator, model, sam, scheduler, loader)
        for p in model.parameters():
            assert_same_bits(p)
        return copies(model.parameters())


def test_each_rank_climbs_by_its_own_gradient_without_communication() -> None:
    trained, _ = on_ranks(2, check_each_by_its_own)
    expected = make_model()
    base = torch.optim.SGD(expected.parameters(), lr=LR, momentum=0.9)
    sam = PlainSAM(expected, base, RHO)
    for k, pair in enumerate(windows(40, 2)):
        each = [sam.gradients_above(functools.partial(loss_of, expected, batch)) for batch in pair]
        base.param_groups[0]["lr"] = LR * GAMMA ** (2 * k)
        sam.step([(a + b) / 2 for a, b in zip(*each, strict=True)])
    assert_close(trained, expected)


def check_resuming_on_ranks(folder: Path) -> None:
    with launched():
        accelerator = Accelerator(cpu=True)
        model, sam, scheduler, loader = prepare(accelerator, n=40, interval=2)
        batches = list(loader)
        for i, batch in enumerate(batches):
            one_step(model, sam, scheduler, batch)
            if i == 2:
                accelerator.save_state(str(folder))
        whole = copies(model.parameters())
        accelerator.load_state(str(folder))
        for batch in batches[3:]:
            one_step(model, sam, scheduler, batch)
        assert same_bits(copies(model.parameters()), whole)
        dist.barrier()


def test_ranks_resume(tmp_path: Path) -> None:
    on_ranks(2, check_resuming_on_ranks, tmp_path)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_example_alone(mixed_precision: str) -> None:
    assert train_accelerate.main(mixed_precision=mixed_precision) > 0.85


def test_the_example_on_two_ranks() -> None:
    values = launch("train_accelerate.py")
    assert float(values["accuracy"]) > 0.8
    assert values["replicas equal to the bit"] == "True"


@pytest.mark.gpu
@pytest.mark.parametrize("mixed_precision", ["fp16", "bf16"])
def test_mixed_precision_on_a_gpu(mixed_precision: str) -> None:
    assert train_accelerate.main(mixed_precision=mixed_precision) > 0.85
