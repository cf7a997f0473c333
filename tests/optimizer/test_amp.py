"""GradScaler with FusedSAM: both forms against plain torch with SAM's two passes written out."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam import FusedSAM
from tests.oracle import copies, same_bits
from tests.scaled import (
    NAMES,
    OPTIMIZERS,
    RHO,
    SCALE,
    STEPS,
    PlainTorch,
    backward,
    batches,
    by_closure,
    leftovers,
    make_model,
    make_scaler,
    nothing,
    plant,
    states,
    two_calls,
)

OVERFLOWS = {2: plant(0), 3: plant(2, math.nan), 7: plant(-1)}
"""Steps whose second gradient is not finite."""


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize(("base", "kwargs"), OPTIMIZERS, ids=NAMES)
@pytest.mark.parametrize("form", [two_calls, by_closure])
def test_training_equals_plain_torch(
    form: Callable[..., None], base: type[Optimizer], kwargs: dict[str, object], interval: int
) -> None:
    """Weights, the optimizer's state and the scale's growth and backoff, with infinities in between."""
    plain = PlainTorch(base, kwargs)
    model, scaler = make_model(), make_scaler()
    known = scaler if form is by_closure else None
    sam = FusedSAM(model.parameters(), base, rho=RHO, interval=interval, grad_scaler=known, **kwargs)
    fired: list[int] = []
    sam.register_step_post_hook(lambda *_: fired.append(1))
    scales = []
    for i, batch in enumerate(batches()):
        second = OVERFLOWS.get(i, nothing)
        plain.step(batch, plain=(i + 1) % interval != 0, second=second)
        form(sam, model, scaler, batch, second)
        scales.append(scaler.get_scale())
        assert scales[-1] == plain.scaler.get_scale()
        torch.testing.assert_close(list(model.parameters()), list(plain.model.parameters()), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(states(sam), states(plain.base), rtol=1e-8, atol=1e-12)
        assert not leftovers(sam)
        assert not leftovers(sam.base_optimizer)
    assert min(scales) < SCALE < max(scales)  # it did grow and back off
    # A plain optimizer's hooks see no step that the scaler skips. Those of step(closure) run before it knows.
    assert len(fired) == (STEPS - len(OVERFLOWS) if form is two_calls else STEPS)
    assert sam.param_groups[0]["sam_step"] == STEPS  # those that the scaler skipped count


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 3, -1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", [two_calls, by_closure])
def test_infinite_second_gradient_changes_nothing_but_the_scale(
    form: Callable[..., None], fused: bool, where: int, value: float
) -> None:
    model, scaler = make_model(torch.float32), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, rho=RHO, grad_scaler=scaler, lr=0.1, momentum=0.9, fused=fused)
    ordinary, overflowing = batches(2, torch.float32)
    form(sam, model, scaler, ordinary, nothing)
    w, momentum = copies(model.parameters()), copies(states(sam))
    form(sam, model, scaler, overflowing, plant(where, value))
    assert not sam.perturbed
    assert same_bits(w, copies(model.parameters()))
    assert same_bits(momentum, states(sam))
    assert scaler.get_scale() == SCALE / 2


@pytest.mark.parametrize("where", [0, 3, -1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("known", [False, True])
def test_infinite_first_gradient_perturbs_nothing_and_the_second_decides(known: bool, where: int) -> None:
    plain = PlainTorch(SGD, {"lr": 0.1})
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, rho=RHO, lr=0.1, grad_scaler=scaler if known else None)
    w = copies(model.parameters())
    for batch in batches(2):
        plain.step(batch, first=plant(where))
        backward(model, scaler, batch, plant(where))
        assert sam.first_step(zero_grad=True)
        assert same_bits(w, copies(model.parameters()))
        assert sam.grad_norm is not None
        assert not sam.grad_norm.isfinite()
        backward(model, scaler, batch)
        scaler.step(sam)
        scaler.update()
        sam.zero_grad()
        torch.testing.assert_close(list(model.parameters()), list(plain.model.parameters()), rtol=1e-12, atol=0)
        w = copies(model.parameters())
    assert scaler.get_scale() == plain.scaler.get_scale() == 2 * SCALE


@pytest.mark.parametrize(("base", "kwargs"), OPTIMIZERS, ids=NAMES)
@pytest.mark.parametrize("known", [False, True])
def test_clipping_after_unscale(known: bool, base: type[Optimizer], kwargs: dict[str, object]) -> None:
    plain = PlainTorch(base, kwargs)
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), base, rho=RHO, interval=2, grad_scaler=scaler if known else None, **kwargs)
    for i, batch in enumerate(batches()):
        second = plant(1) if i == 4 else nothing
        plain.step(batch, plain=i % 2 == 0, second=second, max_norm=0.05)
        backward(model, scaler, batch, second if i % 2 == 0 else nothing)
        if sam.first_step(zero_grad=True):
            backward(model, scaler, batch, second)
        scaler.unscale_(sam)
        norm = clip_grad_norm_(model.parameters(), 0.05)
        assert norm > 0.05  # it did clip
        if known:
            sam.second_step(zero_grad=True)
        else:
            scaler.step(sam)
            sam.zero_grad()
        scaler.update()
        assert scaler.get_scale() == plain.scaler.get_scale()
        torch.testing.assert_close(list(model.parameters()), list(plain.model.parameters()), rtol=1e-9, atol=1e-12)


def test_clipping_in_the_closure_form_by_a_hook_of_the_base_optimizer() -> None:
    plain = PlainTorch(SGD, {"lr": 0.1})
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, rho=RHO, lr=0.1, grad_scaler=scaler)
    sam.base_optimizer.register_step_pre_hook(lambda *_: clip_grad_norm_(model.parameters(), 0.05) and None)
    for batch in batches():
        plain.step(batch, max_norm=0.05)
        by_closure(sam, model, scaler, batch, nothing)
        torch.testing.assert_close(list(model.parameters()), list(plain.model.parameters()), rtol=1e-9, atol=1e-12)


def test_grad_norm_is_without_the_scale_where_it_is_known() -> None:
    (batch,) = batches(1)
    plain = make_model()
    nn.functional.cross_entropy(plain(batch[0]).float(), batch[1]).backward()
    expected = math.sqrt(sum(p.grad.square().sum().item() for p in plain.parameters()))
    for known in (True, False):
        model, scaler = make_model(), make_scaler(growth_interval=1)
        sam = FusedSAM(model.parameters(), SGD, lr=0.1, grad_scaler=scaler if known else None)
        assert sam.grad_norm is None
        two_calls(sam, model, scaler, batch, nothing)
        assert scaler.get_scale() == 2 * SCALE  # after the norm was taken
        assert sam.grad_norm is not None
        torch.testing.assert_close(sam.grad_norm.item(), expected if known else SCALE * expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("known", [False, True])
def test_disabled_scaler_is_no_scaler(known: bool) -> None:
    scaler = GradScaler("cpu", enabled=False)
    results = []
    for end in ("second_step", "scaler.step", "sam.step(closure)", "scaler.step(sam, closure)"):
        model = make_model()
        sam = FusedSAM(model.parameters(), SGD, lr=0.1, grad_scaler=scaler if known else None)
        for batch in batches(3):

            def closure(model: nn.Module = model, sam: FusedSAM = sam, batch: tuple[Tensor, Tensor] = batch) -> Tensor:
                sam.zero_grad()
                return backward(model, scaler, batch)

            if end == "sam.step(closure)":
                sam.step(closure)
            elif end == "scaler.step(sam, closure)":
                scaler.step(sam, closure)
            else:
                closure()
                sam.first_step(zero_grad=True)
                closure()
                sam.second_step() if end == "second_step" else scaler.step(sam)
            scaler.update()
        results.append(copies(model.parameters()))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_copies_know_no_norm_and_those_of_pickle_no_scaler() -> None:
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, lr=0.1, grad_scaler=scaler)
    two_calls(sam, model, scaler, next(batches(1)), nothing)
    for copied, kept in ((pickle.loads(pickle.dumps(sam)), None), (copy.deepcopy(sam), scaler)):
        assert copied.grad_scaler is kept
        assert copied.grad_norm is None
    assert sam.grad_scaler is scaler


def test_scheduler_warns_of_nothing_when_the_scaler_skips_the_first_step() -> None:
    for form in (two_calls, by_closure):
        model, scaler = make_model(), make_scaler()
        sam = FusedSAM(model.parameters(), SGD, lr=0.1, grad_scaler=scaler)
        scheduler = torch.optim.lr_scheduler.StepLR(sam, 1, gamma=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for i, batch in enumerate(batches(2)):
                form(sam, model, scaler, batch, plant(0) if i == 0 else nothing)
                scheduler.step()
        assert sam.param_groups[0]["lr"] == 0.025


class HostReads(TorchDispatchMode):
    """Counts tensors that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("fused", "reads"), [(False, 1), (True, 0)])
def test_the_host_reads_what_the_scaler_itself_reads_and_no_more(fused: bool, reads: int) -> None:
    model, scaler = make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), SGD, lr=0.1, fused=fused)
    (batch,) = batches(1)
    backward(model, scaler, batch)
    base = SGD(model.parameters(), lr=0.0, fused=fused)
    with HostReads() as host:
        scaler.step(base)
    assert host.count == reads  # plain torch
    scaler.update()
    base.zero_grad()
    backward(model, scaler, batch)
    with HostReads() as host:
        sam.first_step(zero_grad=True)
    assert host.count == 0
    backward(model, scaler, batch)
    with HostReads() as host:
        scaler.step(sam)
    assert host.count == reads


def test_gradients_that_share_memory_are_unscaled_once() -> None:
    """Autograd may hand one gradient to two parameters; dividing in place would divide it twice."""
    a, b, unused = (nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(3))
    scaler = make_scaler()
    sam = FusedSAM([unused, a, b], SGD, lr=1 / 16, rho=0.0)
    for i in range(2):
        scaler.scale((a.view(2, 2) + b.view(2, 2)).square().sum()).backward()
        assert a.grad.data_ptr() == b.grad.data_ptr()
        if i == 0:
            sam.first_step(zero_grad=True)
    scaler.step(sam)
    assert torch.equal(a, torch.full_like(a, 0.75))
    assert torch.equal(b, torch.full_like(b, 0.75))
    assert torch.equal(unused, torch.ones_like(unused))


class Older(SGD):
    """By a contract that torch gave up, the scaler is an argument of such a step, which no FusedSAM can give it."""

    _step_supports_amp_scaling = True

    def step(self, closure: Callable[[], Tensor] | None = None, *, grad_scaler: GradScaler | None = None) -> None:
        super().step(closure)


def test_a_base_that_asks_for_the_scaler_is_given_unscaled_gradients() -> None:
    plain, model, scaler = PlainTorch(SGD, {"lr": 0.1}), make_model(), make_scaler()
    sam = FusedSAM(model.parameters(), Older, rho=RHO, lr=0.1)
    for batch in batches(3):
        plain.step(batch)
        two_calls(sam, model, scaler, batch, nothing)
    torch.testing.assert_close(list(model.parameters()), list(plain.model.parameters()), rtol=1e-9, atol=1e-12)
