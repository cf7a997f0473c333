"""Which gradients step(closure) takes for those at w, against SAM by hand: gradients from before, ways to say."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

from fastsam import FusedSAM, notices
from tests.oracle import PlainSAM, copies, same_bits

BACKENDS = ["foreach", "cpp"]  # what is tested here depends on no arithmetic

RHO, LR, MOMENTUM, STEPS = 0.5, 0.1, 0.9, 5


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    monkeypatch.setattr(notices, "told", set())


class Task:
    """A model with a batch for each step, and an attack on it: another loss, whose gradients reach the weights too."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.batches = [torch.randn(5, 4, dtype=torch.float64) for _ in range(2 * STEPS)]
        self.base = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM)

    def loss(self, i):
        return self.model(self.batches[i]).pow(2).mean()

    def backward(self, i, scale=1.0):
        loss = self.loss(i) * scale
        loss.backward()
        return loss

    def attack(self, i):
        self.backward(i, scale=-3.0)

    def closure(self, i, clear):
        def run():
            if clear == "optimizer":
                self.base.zero_grad()
            elif clear == "zeros":
                self.base.zero_grad(set_to_none=False)
            elif clear == "model":
                self.model.zero_grad()
            return self.backward(i)

        return run


class ByHand(PlainSAM):
    """The same task, trained by the oracle."""

    def __init__(self):
        self.task = Task()
        super().__init__(self.task.model, self.task.base, RHO)

    def gradient(self, i, scale=1.0):
        return self.gradients(self.task.loss(i) * scale)

    def sam_step(self, i, ascent=None):
        """`ascent`: the gradients to climb by; None computes them. Returns those that the step was made with."""
        grads = self.gradients_above(lambda: self.task.loss(i), ascent)
        self.step(grads)
        return grads

    def plain_step(self, i):
        self.step(self.gradient(i))


def wrap(task, backend, passes, **options):
    return FusedSAM(task.base, RHO, closure_passes=passes, backend=backend, **options)


def assert_same_weights(task, hand):
    for p, q in zip(task.model.parameters(), hand.params, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)


each_way = pytest.mark.parametrize("passes", ["auto", "two"])
each_clearing = pytest.mark.parametrize("clear", ["optimizer", "zeros", "model"])


@each_way
def test_gradients_from_before_construction_are_stale(backend, passes):
    task, hand = Task(), ByHand()
    task.backward(9)
    sam = wrap(task, backend, passes)
    for i in range(STEPS):
        assert sam.step(task.closure(i, "optimizer")) is not None
        hand.sam_step(i)
        assert_same_weights(task, hand)


def test_what_restore_leaves_is_stale(backend):
    task, hand = Task(), ByHand()
    sam = wrap(task, backend, "auto")
    task.backward(9)
    sam.first_step(zero_grad=True)
    task.backward(9)
    sam.restore()
    assert sam.step(task.closure(0, "optimizer")) is not None  # the loss at w, which the closure computed
    hand.sam_step(0)
    assert_same_weights(task, hand)


@each_way
@pytest.mark.parametrize("interval", [1, 2])
def test_switched_on_after_steps_of_the_base_optimizer(backend, passes, interval):
    """Late SAM; or a notebook cell that runs again. With an interval, no batch is skipped either."""
    task, hand = Task(), ByHand()
    for i in range(3):
        task.base.step(task.closure(i, "optimizer"))
        hand.plain_step(i)
    sam = wrap(task, backend, passes, interval=interval)
    for i in range(3, 3 + STEPS):
        assert sam.step(task.closure(i, "optimizer")) is not None
        hand.sam_step(i) if sam.param_groups[0]["sam_step"] % interval == 0 else hand.plain_step(i)
        assert_same_weights(task, hand)


@pytest.mark.parametrize("by", ["FusedSAM", "another FusedSAM", "the base"])
def test_gradients_of_a_group_that_comes_later_are_stale(backend, by):
    """Those that a parameter brings along, from when another optimizer had it."""
    task, hand = Task(), ByHand()
    last = list(task.model[2].parameters())
    task.base = torch.optim.SGD(task.model[0].parameters(), lr=LR, momentum=MOMENTUM)
    sam, other = wrap(task, backend, "auto"), wrap(task, backend, "auto")
    task.backward(9)
    for p in task.model[0].parameters():
        p.grad = None
    {"FusedSAM": sam, "another FusedSAM": other, "the base": task.base}[by].add_param_group({"params": last})
    assert other.is_sam_step  # which completes what came past it
    for i in range(STEPS):
        assert sam.step(task.closure(i, "optimizer")) is not None
        hand.sam_step(i)
        assert_same_weights(task, hand)


@each_way
def test_steps_of_the_base_optimizer_in_between(backend, passes):
    task, hand = Task(), ByHand()
    sam = wrap(task, backend, passes)
    for i in range(STEPS):
        sam.step(task.closure(i, "optimizer"))
        hand.sam_step(i)
        task.base.step(task.closure(i + STEPS, "optimizer"))
        hand.plain_step(i + STEPS)
        assert_same_weights(task, hand)


@each_clearing
def test_an_attack_before_the_step_two(backend, clear):
    task, hand = Task(), ByHand()
    sam = wrap(task, backend, "two")
    for i in range(STEPS):
        task.attack(i)
        assert sam.step(task.closure(i, clear)) is not None
        hand.sam_step(i)
        assert_same_weights(task, hand)


@each_clearing
@pytest.mark.parametrize("passes", ["auto", "one"])
def test_an_attack_before_the_step_is_the_ascent_and_auto_says_so(backend, passes, clear):
    """Once: a closure that clears is then known to compute both passes."""
    task, hand = Task(), ByHand()
    sam = wrap(task, backend, passes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(STEPS):
            task.model.zero_grad()
            task.attack(i)
            taken = passes == "one" or i == 0
            assert (sam.step(task.closure(i, clear)) is None) == taken
            hand.sam_step(i, ascent=hand.gradient(i, scale=-3.0) if taken else None)
            assert_same_weights(task, hand)
    assert sam.closure_passes == ("two" if passes == "auto" else "one")
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == (passes == "auto"), texts
    assert all("closure_passes='two'" in text and "closure_passes='one'" in text for text in texts)


@each_clearing
@pytest.mark.parametrize("passes", ["auto", "one", "two"])
def test_clipping_after_the_step(backend, passes, clear):
    """The gradients that the step left are written to, so they look new."""
    task, hand = Task(), ByHand()
    sam = wrap(task, backend, passes)
    task.base.zero_grad()
    task.backward(0)
    grads = None if passes == "two" else hand.gradient(0)
    for i in range(STEPS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sam.step(task.closure(i, clear))
        grads = hand.sam_step(i, ascent=grads)
        assert_same_weights(task, hand)
        nn.utils.clip_grad_norm_(task.model.parameters(), 1e-3)
        norm = sum(float(g.square().sum()) for g in grads) ** 0.5
        grads = None if passes != "one" else [g * min(1.0, 1e-3 / (norm + 1e-6)) for g in grads]


@pytest.mark.parametrize("passes", ["auto", "one"])
def test_gradients_at_w_and_a_closure_for_the_second_pass(backend, passes):
    """davda54/sam's way: nothing is said."""
    task, hand = Task(), ByHand()
    sam = wrap(task, backend, passes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(STEPS):
            sam.zero_grad()
            task.backward(i)
            assert sam.step(task.closure(i, clear=None)) is None
            hand.sam_step(i)
            assert_same_weights(task, hand)


def test_one_takes_gradients_from_before_construction(backend):
    task, hand = Task(), ByHand()
    task.backward(0)
    sam = wrap(task, backend, "one")
    sam.step(task.closure(0, clear=None))
    hand.sam_step(0)
    assert_same_weights(task, hand)


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("left", ["nothing", "the last step's", "the base's step's"])
def test_one_without_gradients_is_an_error(backend, left, interval):
    task = Task()
    sam = wrap(task, backend, "one", interval=interval)
    if left == "the last step's":
        task.backward(0)
        sam.step(task.closure(0, clear=None))
    elif left == "the base's step's":
        task.base.step(task.closure(0, "optimizer"))
    before = copies(task.model.parameters())
    with pytest.raises(RuntimeError, match="closure_passes='one' takes the gradients at w that are there"):
        sam.step(task.closure(1, "optimizer"))
    assert same_bits(copies(task.model.parameters()), before)


def test_two_on_a_plain_step_runs_the_closure(backend):
    """Whatever gradients are there: those of an attack must not be stepped by."""
    task, hand = Task(), ByHand()
    sam = wrap(task, backend, "two", interval=2)
    for i in range(STEPS):
        task.attack(i)
        assert sam.step(task.closure(i, "optimizer")) is not None
        hand.sam_step(i) if i % 2 else hand.plain_step(i)
        assert_same_weights(task, hand)


@pytest.mark.parametrize("frozen", [[1], [0, 1]], ids=["one layer", "all"])
def test_layers_that_were_frozen_since_the_backward(backend, frozen):
    """Their gradients are still climbed along, and no hook can be hung on them."""
    task = Task()
    sam = wrap(task, backend, "auto")
    task.backward(0)
    for i in frozen:
        task.model[2 * i].requires_grad_(False)
    perturbed = []
    sam.step(lambda: perturbed.append(sam.perturbed))
    assert perturbed == [True]
    assert not sam.perturbed


@pytest.mark.parametrize("interval", [1, 2])
def test_a_result_that_retains_its_gradient(backend, interval):
    """torch's optimizers take it, and no hook can be hung on it."""
    p = torch.ones(2, requires_grad=True) * 1
    p.retain_grad()
    sam = FusedSAM([p], torch.optim.SGD, RHO, backend=backend, interval=interval, lr=LR)
    p.sum().backward()
    if interval == 1:
        assert sam.step(lambda: p.detach().sum()) is None
        assert torch.equal(p.detach(), torch.ones(2))  # without a second gradient
    else:
        assert not sam.first_step()
        sam.second_step()
        torch.testing.assert_close(p.detach(), torch.full((2,), 1 - LR))


def test_the_stand_in_is_no_gradient(backend):
    """A parameter that takes no part in the second pass has no gradient there, and the base leaves it alone."""
    model = nn.ParameterDict({"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(3))})
    base = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=0.5)
    sam = FusedSAM(base, RHO, backend=backend)
    (model["a"].sum() + model["b"].sum()).backward()
    sam.step(lambda: model["b"].square().sum().backward())
    assert model["a"].grad is None
    assert not any(p._post_accumulate_grad_hooks for p in model.values())
    assert torch.equal(model["a"].detach(), torch.ones(2))
    assert not torch.equal(model["b"].detach(), torch.ones(3))


@pytest.mark.parametrize("interval", [1, 2])
def test_a_gradient_of_a_group_that_is_left_out_is_not_the_one_at_w(backend, interval):
    """As of an auxiliary loss."""
    model = nn.ParameterDict({"head": nn.Parameter(torch.ones(2)), "body": nn.Parameter(torch.ones(2))})
    groups = [{"params": [model["head"]]}, {"params": [model["body"]], "perturb": False}]
    sam = FusedSAM(groups, torch.optim.SGD, lr=LR, interval=interval, backend=backend)
    passes = []

    def closure():
        passes.append(sam.perturbed)
        sam.zero_grad()
        (model["head"] * model["body"]).sum().square().backward()

    model["body"].square().sum().backward()
    sam.step(closure)
    assert passes == [False, True][: 3 - interval]


def test_where_all_groups_are_left_out_theirs_is_the_gradient_of_a_plain_step(backend):
    task, hand = Task(), ByHand()
    sam = wrap(task, backend, "auto", interval=3)
    sam.step(task.closure(0, "optimizer"))
    hand.plain_step(0)
    sam.param_groups[0]["perturb"] = False
    task.base.zero_grad()
    task.backward(1)
    assert sam.step(task.closure(1, clear=None)) is None
    hand.plain_step(1)
    assert_same_weights(task, hand)


@pytest.mark.parametrize("value", ["three", None, 1])
def test_an_unknown_word_is_an_error(value):
    with pytest.raises(ValueError, match="closure_passes must be one of 'auto', 'one', 'two', but got"):
        FusedSAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, closure_passes=value)
    sam = FusedSAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="closure_passes must be one of"):
        sam.closure_passes = value


def test_copies_keep_the_word():
    sam = wrap(Task(), None, "two")
    for copied in (copy.deepcopy(sam), pickle.loads(pickle.dumps(sam))):
        assert copied.closure_passes == "two"


# -- the marks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def _swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.usefixtures("_swapping")
@pytest.mark.parametrize("passes", ["auto", "two"])
def test_a_model_can_be_converted_by_swapping_after_a_step(passes):
    """torch.utils.swap_tensors, which this does, refuses tensors that have weak references."""
    task = Task()
    sam = wrap(task, None, passes)
    sam.step(task.closure(0, "optimizer"))
    task.model.to(torch.float32)
    task.batches = [batch.float() for batch in task.batches]
    assert all(p.dtype is p.grad.dtype is torch.float32 for p in task.model.parameters())
    if passes == "auto":  # a converted gradient is another one
        sam.zero_grad()
    assert sam.step(task.closure(1, "optimizer")) is not None


def test_marks_hold_no_gradient_alive():
    task = Task()
    sam = wrap(task, None, "auto")
    sam.step(task.closure(0, "optimizer"))
    refs = [weakref.ref(p.grad) for p in task.model.parameters()]
    task.model.zero_grad()
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


def test_a_saved_gradient_brings_no_mark_to_another_optimizer():
    task = Task()
    wrap(task, None, "auto").step(task.closure(0, "optimizer"))
    file = io.BytesIO()
    torch.save([p.grad for p in task.model.parameters()], file)
    file.seek(0)
    other = Task()
    sam = wrap(other, None, "auto")
    for p, g in zip(other.model.parameters(), torch.load(file, weights_only=True), strict=True):
        p.grad = g
    assert sam.step(other.closure(0, clear=None)) is None  # fresh: taken for those at w


def test_marks_are_one_optimizers_own():
    """As for two optimizers on one network: what is done with for one is new to the other."""
    task = Task()
    first, second = (wrap(task, None, "auto") for _ in range(2))
    first.step(task.closure(0, "optimizer"))
    assert not first._state.stale.any_fresh(task.model.parameters())
    task.model.zero_grad()
    task.backward(1)
    first._mark_stale()
    assert second._state.stale.any_fresh(task.model.parameters())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_marks_once(set_to_none, monkeypatch):
    """What second_step(zero_grad=True) lets go of needs no mark; zeros do."""
    task = Task()
    sam = wrap(task, None, "auto")
    marks = []
    mark = sam._state.stale.mark
    monkeypatch.setattr(sam._state.stale, "mark", lambda params: (marks.append(1), mark(params)))
    for zero_grad in (True, False):
        task.base.zero_grad()
        task.backward(0)
        sam.first_step(zero_grad=True)
        task.backward(0)
        marks.clear()
        sam.second_step(zero_grad=zero_grad)
        assert len(marks) == (not zero_grad)
    sam.zero_grad(set_to_none=set_to_none)
    assert sam.step(task.closure(0, "optimizer")) is not None


@pytest.mark.parametrize("closure_passes", ["auto", "one", "two"])
def test_gradients_of_inference_mode(backend, closure_passes):
    """They have no version, as zeroth-order methods make them; each is new once."""
    w = nn.Parameter(torch.ones(2))
    sam = FusedSAM([w], torch.optim.SGD, rho=RHO, lr=LR, backend=backend, closure_passes=closure_passes)
    passes = []

    def closure():
        passes.append(sam.perturbed)
        with torch.inference_mode():
            g = w.detach() * 2
        w.grad = g
        return 1.0

    above = 1 + RHO / 2**0.5
    if closure_passes == "one":
        closure()
        passes.clear()
    sam.step(closure)
    assert passes == ([True] if closure_passes == "one" else [False, True])
    torch.testing.assert_close(w.detach(), torch.full((2,), 1 - LR * 2 * above))
    assert not sam._state.stale.any_fresh([w])
    closure()
    assert sam._state.stale.any_fresh([w])
    assert sam.first_step()
    closure()
    sam.second_step()
