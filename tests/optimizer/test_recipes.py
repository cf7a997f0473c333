"""The recipes of docs/method.md, as they stand there: against a peer's own class, or against plain PyTorch."""

import copy
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from pytorch_optimizer import GSAM, SAM, WSAM, FriendlySAM
from pytorch_optimizer.lr_scheduler import ProportionScheduler
from temperon import Temperon
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastsam import FusedSAM
from tests.oracle import PlainSAM, same_bits
from tests.training import FORMS, STEPS, Training, train_two_calls

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # a recipe is no misuse

LR, RHO = 0.05, 0.3
SGD = {"lr": LR, "momentum": 0.5}

each_form = pytest.mark.parametrize("form", FORMS)
frozen_or_not = pytest.mark.parametrize("frozen", [False, True], ids=["", "a frozen layer"])


def recipe(start, *replacements):
    """The block of docs/method.md that has a line which begins so, with a test's values in the place of its own."""
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"\n{start}" in f"\n{block}"]
    for old, new in replacements:
        assert block.count(old) == 1
        block = block.replace(old, new)
    return block


def two_trainings(frozen=False):
    trainings = Training(torch.float64), Training(torch.float64)
    for training in trainings:
        training.model[0].requires_grad_(not frozen)
    return trainings


def run(block, training, sam, **names):
    """Runs a recipe over the batches of a training."""
    space = {"sam": sam, "model": training.model, "data": training.batches, "torch": torch, "FusedSAM": FusedSAM}
    exec(block, space | {"loss_fn": cross_entropy} | names)


def fused(training, backend, rho=RHO):
    return FusedSAM(training.model.parameters(), torch.optim.SGD, rho=rho, backend=backend, **SGD)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


def differs_from_sam(training):
    """Whether a training came elsewhere than SAM does: else a recipe that does nothing would pass."""
    plain = two_trainings(frozen=not training.model[0].weight.requires_grad)[0]
    train_two_calls(plain, fused(plain, "reference"))
    return any(
        not torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(training.weights(), plain.weights(), strict=True)
    )


def plain_sam(training, **options):
    return PlainSAM(training.model, torch.optim.SGD(training.model.parameters(), **options), RHO)


def losses(training):
    """For each batch a function that computes the loss."""
    for x, y in training.batches:
        yield lambda x=x, y=y: cross_entropy(training.model(x), y)


def unit(grads):
    norm = sum((g * g).sum() for g in grads).sqrt()
    return [g / norm for g in grads]


def total(directions):
    return [sum(of_parameter) for of_parameter in zip(*directions, strict=True)]


class ConstantRho:
    def step(self):
        return RHO


def train_gsam(training, peer, after_step=lambda: None):
    for x, y in training.batches:
        peer.set_closure(cross_entropy, x, y)
        peer.step()
        after_step()


@frozen_or_not
def test_wsam(backend, frozen):
    ours, theirs = two_trainings(frozen)
    run(recipe("gamma"), ours, fused(ours, backend))
    params = theirs.model.parameters()
    peer = WSAM(theirs.model, params, torch.optim.SGD, rho=RHO, gamma=0.9, decouple=False, **SGD)
    train_two_calls(theirs, peer)
    assert_same(ours.weights(), theirs.weights())
    assert differs_from_sam(ours)


@frozen_or_not
def test_gsam(backend, frozen):
    ours, theirs = two_trainings(frozen)
    run(recipe("alpha"), ours, fused(ours, backend))
    params = list(theirs.model.parameters())
    train_gsam(theirs, GSAM(params, torch.optim.SGD(params, **SGD), theirs.model, ConstantRho(), alpha=0.4))
    assert_same(ours.weights(), theirs.weights())
    assert differs_from_sam(ours)


@frozen_or_not
def test_friendly_sam(backend, frozen):
    ours, theirs = two_trainings(frozen)
    run(recipe("sigma"), ours, fused(ours, backend))
    train_two_calls(theirs, FriendlySAM(theirs.model.parameters(), torch.optim.SGD, rho=RHO, **SGD))
    assert_same(ours.weights(), theirs.weights())
    assert differs_from_sam(ours)


RHO_BY_GROUP = 'for group in sam.param_groups:\n    group["rho"] = '


@each_form
def test_rho_in_proportion_to_the_learning_rate(backend, form):
    """Against GSAM with alpha=0, which is SAM with the rho of a scheduler."""
    ours, theirs = two_trainings()
    sam = FusedSAM(torch.optim.SGD(ours.model.parameters(), **SGD), backend=backend)
    schedule = CosineAnnealingLR(sam, STEPS)
    block = recipe(RHO_BY_GROUP + '0.05 * group["lr"]', ("0.05", str(RHO)), ("/ 0.1", f"/ {LR}"))
    rhos = []

    def before_step(i):
        if i > 0:
            schedule.step()
        run(block, ours, sam)
        rhos.append(sam.rho)

    FORMS[form](ours, sam, before_step)

    params = list(theirs.model.parameters())
    base = torch.optim.SGD(params, **SGD)
    peers_schedule = CosineAnnealingLR(base, STEPS)
    proportion = ProportionScheduler(peers_schedule, max_lr=LR, min_lr=0.0, max_value=RHO, min_value=0.0)
    peer = GSAM(params, base, theirs.model, proportion, alpha=0.0)
    expected = [peer.rho_t]

    def after_step():
        peers_schedule.step()
        expected.append(peer.update_rho_t())

    train_gsam(theirs, peer, after_step)
    assert rhos == pytest.approx(expected[:-1], rel=1e-12)
    assert_same(ours.weights(), theirs.weights())
    assert differs_from_sam(ours)


RISING_RHO = recipe(RHO_BY_GROUP + "0.05 * min", ("0.05", str(RHO)), ("1000", "6"))


@each_form
def test_a_rising_rho(backend, form):
    ours, theirs = two_trainings()
    sam = FusedSAM(ours.model.parameters(), torch.optim.SGD, backend=backend, **SGD)
    FORMS[form](ours, sam, lambda i: run(RISING_RHO, ours, sam, step=i))
    peer = Temperon(torch.optim.SGD(theirs.model.parameters(), **SGD), STEPS, 1.0, RHO, rho_ramp_steps=6)
    for i in range(STEPS):

        def closure(i=i):
            peer.zero_grad()
            return theirs.backward(i)

        peer.step(closure)
    assert_same(ours.weights(), theirs.weights())
    assert differs_from_sam(ours)


def test_a_rho_that_rises_from_start_on():
    training = Training(torch.float64)
    sam = FusedSAM(training.model.parameters(), torch.optim.SGD, start=STEPS // 4, **SGD)
    peer = Temperon(sam.base_optimizer, STEPS, 0.75, RHO, rho_ramp_steps=6)
    for i in range(STEPS):
        run(RISING_RHO, training, sam, step=i)
        assert sam.rho == pytest.approx(peer.current_rho(i), rel=1e-12)


def test_a_rho_of_a_cuda_graph_is_written_to(backend):
    """The same bits, and the same tensor, as with a number."""
    numbers, tensors = two_trainings()
    rho = torch.tensor(RHO, dtype=torch.float64)
    a, b = fused(numbers, backend), fused(tensors, backend, rho)

    def set_number(i):
        a.param_groups[0]["rho"] = RHO * (1 + i)

    def write(i):
        b.param_groups[0]["rho"].fill_(RHO * (1 + i))

    train_two_calls(numbers, a, set_number)
    train_two_calls(tensors, b, write)
    assert same_bits(numbers.weights(), tensors.weights())
    assert b.param_groups[0]["rho"] is rho


LOOPS = {
    "two calls": "    loss_fn(model(x), y).backward(inputs=chosen)",
    "closure": "        loss.backward(inputs=chosen if sam.ascending else None)",
}


@pytest.mark.parametrize("form", LOOPS)
def test_normalisation_layers_alone(backend, form):
    ours, theirs = two_trainings()
    for training in (ours, theirs):
        training.model.insert(1, nn.BatchNorm2d(4, dtype=torch.float64))
    computed = Counter()
    for i, layer in enumerate(ours.model):
        for p in layer.parameters():
            p.register_hook(lambda g, i=i: computed.update([i]))
    options = f"rho={RHO}, backend={backend!r}, momentum=0.5"
    run(recipe(LOOPS[form], ("rho=1.0", options)), ours, None)
    assert computed == {0: 2 * STEPS, 1: 2 * 2 * STEPS, 4: 2 * STEPS}  # each has a weight and a bias

    plain = plain_sam(theirs, lr=0.1, momentum=0.5)
    chosen = [id(p) for p in theirs.model[1].parameters()]
    for loss in losses(theirs):
        at_w = zip(plain.params, plain.gradients(loss()), strict=True)
        ascent = [g if id(p) in chosen else torch.zeros_like(g) for p, g in at_w]
        plain.step(plain.gradients_above(loss, ascent))
    assert_same(ours.weights(), theirs.weights())


def test_curves_of_sharpness_and_curvature(backend):
    """Against the losses and Hessian-vector products at the same weights."""
    training = Training(torch.float64)
    sam = fused(training, backend, rho=1e-4)
    expected = []

    class Recorded(list):
        def __iter__(self):
            for x, y in training.batches:
                expected.append(sharpness_and_curvature(training.model, x, y, sam.rho))
                yield x, y

    found = {}
    block = recipe("sharpness, curvature") + "\nfound.update(sharpness=sharpness, curvature=curvature)\n"
    run(block, training, sam, data=Recorded(), found=found)
    sharpness, curvature = zip(*expected, strict=True)
    torch.testing.assert_close(torch.stack(found["sharpness"]), torch.stack(sharpness), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(torch.stack(found["curvature"]), torch.stack(curvature), rtol=1e-3, atol=1e-4)
    assert not any(t.requires_grad for t in found["sharpness"] + found["curvature"])


def sharpness_and_curvature(model, x, y, rho):
    params = list(model.parameters())
    loss = cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, params, create_graph=True)
    along = [g.detach() for g in unit(grads)]
    product = torch.autograd.grad(grads, params, along)
    above = copy.deepcopy(model)
    with torch.no_grad():
        for p, u in zip(above.parameters(), along, strict=True):
            p.add_(rho * u)
        curvature = sum((u * h).sum() for u, h in zip(along, product, strict=True))
        return cross_entropy(above(x), y) - loss, curvature


@frozen_or_not
def test_along_the_gradient_of_the_step_before(backend, frozen):
    ours, theirs = two_trainings(frozen)
    passes = 0

    def loss_fn(*args):
        nonlocal passes
        passes += 1
        return cross_entropy(*args)

    values = ("rho=0.05", f"rho={RHO}"), ("lr=0.1", f"lr=0.1, backend={backend!r}")
    block = recipe("sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.05, start=1", *values)
    run(block, ours, None, loss_fn=loss_fn)
    assert passes == STEPS
    plain, before = plain_sam(theirs, lr=0.1), None
    for loss in losses(theirs):
        before = plain.gradients(loss()) if before is None else plain.gradients_above(loss, before)
        plain.step(before)
    assert_same(ours.weights(), theirs.weights())


@frozen_or_not
def test_several_ascent_steps(backend, frozen):
    ours, theirs = two_trainings(frozen)
    run(recipe("ascents"), ours, fused(ours, backend))
    plain = plain_sam(theirs, **SGD)
    for loss in losses(theirs):
        directions = [unit(plain.gradients(loss()))]
        for _ in range(2):
            directions.append(unit(plain.gradients_above(loss, total(directions))))
        plain.step(plain.gradients_above(loss, total(directions)))
    assert_same(ours.weights(), theirs.weights())
    assert differs_from_sam(ours)


@frozen_or_not
def test_federated_rounds(backend, frozen):
    """Against clients with a copy of the model and a peer's SAM each, whose weights are averaged."""
    ours, theirs = two_trainings(frozen)
    rounds = [ours.batches[i : i + 4] for i in range(0, STEPS, 4)]
    sam = FusedSAM(ours.model.parameters(), torch.optim.SGD, rho=RHO, backend=backend, lr=LR)
    run(recipe("for clients in batches"), ours, sam, batches=rounds)
    for clients in rounds:
        models = [copy.deepcopy(theirs.model) for _ in clients]
        for model, (x, y) in zip(models, clients, strict=True):
            peer = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
            cross_entropy(model(x), y).backward()
            peer.first_step(zero_grad=True)
            cross_entropy(model(x), y).backward()
            peer.second_step(zero_grad=True)
        with torch.no_grad():
            for p, *of_clients in zip(theirs.model.parameters(), *(m.parameters() for m in models), strict=True):
                p.copy_(torch.stack(of_clients).mean(0))
    assert_same(ours.weights(), theirs.weights())
    assert differs_from_sam(ours)


@frozen_or_not
def test_a_loss_to_retain(backend, frozen):
    """Against a peer's SAM, given the gradient at w beside."""
    ours, theirs = two_trainings(frozen)
    forget = [(x, (y + 1) % 5) for x, y in ours.batches]
    run(recipe("for (x, y), (x_retain, y_retain)"), ours, fused(ours, backend), forget=forget)
    peer = SAM(theirs.model.parameters(), torch.optim.SGD, rho=RHO, **SGD)
    for (x, y), (x_retain, y_retain) in zip(forget, theirs.batches, strict=True):
        learnt = [p for p in theirs.model.parameters() if p.requires_grad]
        at_w = torch.autograd.grad(cross_entropy(theirs.model(x_retain), y_retain), learnt)
        (-cross_entropy(theirs.model(x), y)).backward()
        peer.first_step(zero_grad=True)
        (-cross_entropy(theirs.model(x), y)).backward()
        for p, g in zip(learnt, at_w, strict=True):
            p.grad += g
        peer.second_step(zero_grad=True)
    assert_same(ours.weights(), theirs.weights())
    assert differs_from_sam(ours)
