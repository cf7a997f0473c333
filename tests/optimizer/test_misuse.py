"""Loops that go wrong between the calls: what the user is told, and that the weights are not lost."""

import functools
import gc
import linecache
import sys
import threading
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import fastsam
from fastsam import FusedSAM, closures, notices
from fastsam.state import Phase
from tests.oracle import PlainSAM, copies, same_bits

BACKENDS = ["foreach", "cpp"]  # what is tested here depends on no arithmetic

X = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
SECOND_GRADIENT = r"a second gradient was added .*`if sam\.first_step\(zero_grad=True\)"


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    monkeypatch.setattr(notices, "told", {"native"})  # not whether this machine has the library


def make(backend, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    return model, FusedSAM(
        model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9, backend=backend, **options
    )


def loss_of(model):
    return model(X).square().mean()


def backward(model):
    loss = loss_of(model)
    loss.backward()
    return loss


# -- a plain step that first_step() announces by False -----------------------------------------------------------------


@pytest.mark.parametrize("end", [FusedSAM.second_step, FusedSAM.step])
@pytest.mark.parametrize("between", ["nothing", "clip", "unscale"])
def test_a_second_gradient_on_a_plain_step_is_an_error(backend, end, between):
    """davda54/sam's loop with an interval, which does not look at what first_step returns."""
    model, sam = make(backend, interval=2)
    w = copies(model.parameters())
    backward(model)
    sam.first_step(zero_grad=True)
    backward(model)
    if between == "clip":
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    elif between == "unscale":
        torch._foreach_mul_([p.grad for p in model.parameters()], 0.5)
    with pytest.raises(RuntimeError, match=SECOND_GRADIENT):
        end(sam)
    assert same_bits(copies(model.parameters()), w)
    assert not sam.state
    assert sam.param_groups[0]["sam_step"] == 0


@pytest.mark.parametrize(
    "between",
    [
        "nothing",
        "clip",
        "sam.zero_grad",
        "sam.zero_grad False",
        "model.zero_grad",
        "model.zero_grad False",
    ],
)
def test_what_is_no_second_gradient(backend, between):
    """One gradient, however it is written to, or another one in its place."""
    (model, sam), (other, plain) = make(backend, interval=2), make(backend)
    for m in (model, other):
        backward(m)
    assert not sam.first_step(zero_grad=True)
    for m, optimizer in ((model, sam), (other, plain)):
        if between == "clip":
            nn.utils.clip_grad_norm_(m.parameters(), 0.1)
        elif between.startswith("sam.zero_grad"):
            backward(m)  # a second one, but it is cleared with the first
            optimizer.zero_grad(set_to_none=not between.endswith("False"))
            backward(m)
        elif between.startswith("model.zero_grad"):
            m.zero_grad(set_to_none=not between.endswith("False"))
            backward(m)
    sam.second_step()
    plain.base_optimizer.step()
    assert same_bits(copies(model.parameters()), copies(other.parameters()))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter_is_not_watched(backend, frozen):
    """Its gradient is from before."""
    model, sam = make(backend, interval=2)
    backward(model)
    getattr(model, frozen).requires_grad_(False)
    assert not sam.first_step()
    backward(model)
    with pytest.raises(RuntimeError, match=SECOND_GRADIENT):
        sam.second_step()


def test_micro_batches_before_first_step_are_no_second_gradient(backend):
    model, sam = make(backend, interval=2)
    for _ in range(4):
        backward(model)
        backward(model)
        if sam.first_step(zero_grad=True):
            backward(model)
            backward(model)
        sam.second_step(zero_grad=True)
    assert sam.param_groups[0]["sam_step"] == 4


@pytest.mark.parametrize("end", ["second_step", "a failure", "the base's step", "restore"])
def test_the_watch_ends_with_the_step(backend, end):
    """No hook stays on a parameter, whichever way the step ends."""
    model, sam = make(backend, interval=2)
    backward(model)
    sam.first_step(zero_grad=True)
    assert any(p._post_accumulate_grad_hooks for p in model.parameters())
    if end == "a failure":
        sam.register_step_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sam.second_step()
    else:
        {"second_step": sam.second_step, "the base's step": sam.base_optimizer.step, "restore": sam.restore}[end]()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_first_step_again_watches_anew(backend):
    """A loop that goes on with `continue` on a plain step."""
    model, sam = make(backend, interval=2)
    backward(model)
    sam.first_step()
    backward(model)
    sam.first_step()  # the sum of two micro-batches is the gradient now
    sam.second_step()
    assert sam.param_groups[0]["sam_step"] == 1
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())  # nor does the first watch go on


# -- the base optimizer's own step -------------------------------------------------------------------------------------


def test_the_base_step_while_perturbed_is_refused(backend):
    """Code that restores by hand from state[p]["old_p"], if it is there, then steps the base optimizer."""
    model, sam = make(backend)
    w = copies(model.parameters())
    backward(model)
    sam.first_step(zero_grad=True)
    backward(model)
    for p in model.parameters():
        if "old_p" in sam.state[p]:
            p.data = sam.state[p]["old_p"]
    with pytest.raises(RuntimeError, match=r"restore\(\) first"):
        sam.base_optimizer.step()
    assert sam.perturbed
    sam.restore()
    assert same_bits(copies(model.parameters()), w)
    sam.base_optimizer.step()
    assert not same_bits(copies(model.parameters()), w)


class Unhooked(torch.optim.Optimizer):
    """An optimizer that does without the constructor of torch's, and so without its hooks."""

    def __init__(self, params, lr):
        self.defaults, self.state = {"lr": lr}, {}
        self.param_groups = [{"params": list(params), "lr": lr}]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)

    def zero_grad(self):
        for p in self.param_groups[0]["params"]:
            p.grad = None


@pytest.mark.parametrize("with_room", [False, True])
def test_an_optimizer_without_hooks_is_watched_too(backend, with_room):
    """Also where it has, as pytorch_optimizer's wrappers do, room for hooks that nobody calls."""
    model = nn.Linear(4, 2)
    base = Unhooked(model.parameters(), lr=0.1)
    if with_room:
        base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    backward(model)
    base.step()
    sam = FusedSAM(base, rho=0.5, backend=backend)
    passes = []

    def closure():
        passes.append(sam.perturbed)
        base.zero_grad()
        return backward(model)

    sam.step(closure)
    assert passes == [False, True]
    base.step()
    sam.step(closure)
    assert passes == [False, True] * 2
    backward(model)
    sam.first_step()
    with pytest.raises(RuntimeError, match=r"restore\(\) first"):
        base.step()
    sam.restore()


class Around(torch.optim.Optimizer):
    """An optimizer around another, as Accelerate's: torch puts no hooks around its step."""

    def __init__(self, inner):
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize("options", [{}, {"interval": 2}, {"start": 2}, {"direction": "momentum"}], ids=str)
def test_restore_and_the_base_step_are_a_step(backend, options, hooked):
    """Loops that clip, or add a gradient at w, before they step: SAM comes when it is due, and schedulers know."""
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    other.load_state_dict(model.state_dict())
    params = list(model.parameters())
    base, plain = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, other))
    hand = PlainSAM(other, plain, rho=0.5, **options)
    loss = functools.partial(loss_of, other)
    if not hooked:
        base = Around(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sam = FusedSAM(base, rho=0.5, backend=backend, **options)
        scheduler = torch.optim.lr_scheduler.StepLR(sam, 3, 0.5)
        due = []
        for k in range(5):
            if sam.direction == "gradient":
                backward(model)
            due.append(sam.is_sam_step)
            climbed = sam.first_step(zero_grad=True)
            if climbed or sam.direction == "momentum":
                backward(model)
            sam.restore()
            nn.utils.clip_grad_norm_(params, 0.1)
            base.step()
            sam.zero_grad()
            scheduler.step()

            plain.param_groups[0]["lr"] = 0.1 * 0.5 ** (k // 3)
            gradients = hand.gradients_above(loss) if hand.is_sam_step else hand.gradients(loss())
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            hand.step([g * (0.1 / (norm + 1e-6)).clamp(max=1) for g in gradients])
    start, interval = options.get("start", 0), options.get("interval", 1)
    assert due == [k >= start and (k + 1) % interval == 0 for k in range(5)]
    assert sam.param_groups[0]["sam_step"] == 5
    torch.testing.assert_close(copies(params), copies(other.parameters()))


def test_a_step_of_somebody_elses_optimizer_is_none(backend):
    model, sam = make(backend, start=2)
    other, _ = make(backend)
    backward(model)
    backward(other)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert sam.param_groups[0]["sam_step"] == 0


def test_a_lone_step_names_the_base_optimizers(monkeypatch):
    monkeypatch.setattr(closures, "advice", lambda in_scaler_step: "")  # of a trainer that another test imported
    _, sam = make("reference")
    with pytest.raises(RuntimeError, match=r"call first_step\(\).*for a plain step, sam\.base_optimizer\.step\(\)"):
        sam.step()


# -- a pass that is missing --------------------------------------------------------------------------------------------


def test_a_forgotten_second_backward_is_told_once(backend):
    model, sam = make(backend)
    w = copies(model.parameters())
    with pytest.warns(UserWarning, match="found no gradient") as caught:
        for _ in range(2):
            backward(model)
            sam.first_step(zero_grad=True)
            sam.second_step(zero_grad=True)
    assert len(caught) == 1
    assert same_bits(copies(model.parameters()), w)


def test_a_forgotten_second_backward_without_zero_grad_is_told_once(backend):
    """The base optimizer then steps by the gradients at w: no SAM at all."""
    (model, sam), (other, plain) = make(backend), make(backend)
    with pytest.warns(UserWarning, match="the very gradients that first_step") as caught:
        for _ in range(2):
            backward(model)
            sam.first_step()
            sam.second_step(zero_grad=True)
            backward(other)
            plain.base_optimizer.step()
            plain.zero_grad()
    assert len(caught) == 1
    assert same_bits(copies(model.parameters()), copies(other.parameters()))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_summed_gradients_are_told_once(backend, micro_batches):
    """As in davda54/sam: without a clearing in between, the base optimizer steps by both gradients' sum."""
    (model, sam), (other, plain) = make(backend), make(backend)
    hand = PlainSAM(other, plain.base_optimizer, rho=0.5)
    with pytest.warns(UserWarning, match="the gradients at w were not cleared") as caught:
        for _ in range(2):
            for half in range(2):
                for _ in range(micro_batches):
                    (loss_of(model) / micro_batches).backward()
                sam.second_step(zero_grad=True) if half else sam.first_step()
            at_w = hand.gradients(loss_of(other))
            above = hand.gradients_above(lambda: loss_of(other), at_w)
            hand.step([a + b for a, b in zip(at_w, above, strict=True)])
    assert len(caught) == 1
    torch.testing.assert_close(copies(model.parameters()), copies(other.parameters()))


CLEARINGS = {
    "first_step": lambda model, sam: None,
    "sam": lambda model, sam: sam.zero_grad(),
    "zeros by sam": lambda model, sam: sam.zero_grad(set_to_none=False),
    "base": lambda model, sam: sam.base_optimizer.zero_grad(),
    "model": lambda model, sam: model.zero_grad(),
    "zeros by the model": lambda model, sam: model.zero_grad(set_to_none=False),
    "by hand": lambda model, sam: [setattr(p, "grad", None) for p in model.parameters()],
}


@pytest.mark.parametrize("clearing", CLEARINGS)
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("clip", [False, True])
def test_every_clearing_between_the_calls_is_right_and_hears_nothing(backend, clearing, clip, micro_batches):
    (model, sam), (other, plain) = make(backend), make(backend)
    hand = PlainSAM(other, plain.base_optimizer, rho=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            backward(model)
            sam.first_step(zero_grad=clearing == "first_step")
            CLEARINGS[clearing](model, sam)
            for _ in range(micro_batches):
                (loss_of(model) / micro_batches).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            sam.second_step(zero_grad=True)
            gradients = hand.gradients_above(lambda: loss_of(other))
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            hand.step([g * (0.01 / (norm + 1e-6)).clamp(max=1) if clip else g for g in gradients])
    torch.testing.assert_close(copies(model.parameters()), copies(other.parameters()))


@pytest.mark.parametrize("reached", [0, 1])
def test_a_second_backward_that_reaches_a_part_hears_nothing(backend, reached):
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    sam = FusedSAM(params, torch.optim.SGD, lr=0.1, backend=backend)
    sum(p.square().sum() for p in params).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sam.first_step()
        params[reached].square().sum().backward()
        sam.second_step()


def test_zeros_that_nothing_was_added_to_are_no_sum(backend):
    model, sam = make(backend)
    backward(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sam.first_step()
        sam.zero_grad(set_to_none=False)
        sam.second_step()


def test_a_single_layer_trained_by_one_loss_twice_meets_no_word_of_ours(backend):
    """retain_graph on a linear model: torch lets it pass, and so do we; see docs/caveats.md."""
    model, sam = make(backend)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    sam.first_step(zero_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.backward()
        sam.second_step()


@pytest.mark.parametrize("kept", ["the loss", "the loss, retained", "a hidden state"])
@pytest.mark.parametrize("form", ["closure", "with"])
def test_a_graph_that_is_kept_over_both_passes_is_explained(backend, form, kept):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    sam = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1, backend=backend)
    w = copies(model.parameters())
    hidden = model[:2](X)
    loss = model[2](hidden).square().mean()

    def closure():
        sam.zero_grad()
        again = model[2](hidden).square().mean() if kept == "a hidden state" else loss
        again.backward(retain_graph=kept == "the loss, retained")

    def step():
        if form == "closure":
            sam.step(closure)
            return
        with sam:
            closure()
            sam.first_step(zero_grad=True)
            closure()

    with pytest.raises(RuntimeError, match=r"second time|inplace operation") as caught:
        step()
    notes = getattr(caught.value, "__notes__", [])  # from Python 3.11 on
    assert ["a graph of its own" in note for note in notes] == [True] * hasattr(BaseException, "add_note")
    assert same_bits(copies(model.parameters()), w)


def test_the_same_error_elsewhere_is_left_as_it_is(backend):
    """In the pass at w, and where another error is raised in the pass at w + e_w."""
    model, sam = make(backend)
    loss = loss_of(model)
    loss.backward()
    sam.zero_grad()
    with pytest.raises(RuntimeError, match="second time") as caught:
        sam.step(loss.backward)
    assert not hasattr(caught.value, "__notes__")

    def fail():
        with sam:
            backward(model)
            sam.first_step()
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") as caught:
        fail()
    assert not hasattr(caught.value, "__notes__")


class Stats(nn.Module):
    """A small network with BatchNorm and Dropout, as davda54/sam's example trains one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.usefixtures("hears_nothing")
@pytest.mark.parametrize("form", ["both calls", "step", "gradients first", "zero_grad first"])
@pytest.mark.parametrize("on", ["sam", "base", "none"])
def test_the_loops_of_davda54_hear_nothing(backend, form, on):
    """Its two calls, with running statistics off in the second pass and a schedule by hand; and its closures."""
    torch.manual_seed(0)
    model = Stats()
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=2.0, adaptive=True, lr=0.1, momentum=0.9, backend=backend)
    scheduler = None if on == "none" else torch.optim.lr_scheduler.StepLR(sam if on == "sam" else sam.base_optimizer, 2)
    for epoch in range(3):
        model.train()
        for _ in range(2):

            def closure():
                loss = model(X).square().mean()
                loss.backward()
                return loss

            if form == "both calls":
                fastsam.enable_running_stats(model)
                model(X).square().mean().backward()
                sam.first_step(zero_grad=True)
                fastsam.disable_running_stats(model)
                model(X).square().mean().backward()
                sam.second_step(zero_grad=True)
            elif form == "step":
                sam.step(lambda: (sam.zero_grad(), closure())[1])
            elif form == "gradients first":
                model(X).square().mean().backward()
                sam.step(closure)
                sam.zero_grad()
            else:
                model.zero_grad()
                closure()
                sam.first_step(zero_grad=True)
                closure()
                sam.second_step()
        model.eval()
        with torch.no_grad():
            model(X)
        if scheduler is None:
            for group in sam.param_groups:
                group["lr"] = 0.1 / (epoch + 2)
        else:
            scheduler.step()
    assert sam.param_groups[0]["sam_step"] == 6


# -- several FusedSAMs -------------------------------------------------------------------------------------------------


def two_heads(backend):
    """Two FusedSAMs that share a backbone."""
    torch.manual_seed(0)
    nets = [nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)]
    sams = [
        FusedSAM([*nets[0].parameters(), *head.parameters()], torch.optim.SGD, rho=0.3, lr=0.1, backend=backend)
        for head in nets[1:]
    ]
    return nn.ModuleList(nets), sams


def loss_of_head(nets, i):
    return nets[1 + i](nets[0](X)).square().mean()


@pytest.mark.parametrize("form", ["two calls", "closure"])
def test_one_of_shared_parameters_waits_until_the_other_has_ended(backend, form):
    """It would save the other's w + e_w as w."""
    nets, (first, second) = two_heads(backend)
    w = copies(nets.parameters())
    (loss_of_head(nets, 0) + loss_of_head(nets, 1)).backward()
    first.first_step()
    above = copies(nets.parameters())
    with pytest.raises(RuntimeError, match=r"another FusedSAM holds .* restore\(\), before this first_step"):
        second.first_step() if form == "two calls" else second.step(lambda: None)
    assert same_bits(copies(nets.parameters()), above)
    assert not second.perturbed
    first.restore()
    assert same_bits(copies(nets.parameters()), w)
    assert second.first_step()
    second.restore()


def test_one_after_the_other_is_right(backend):
    nets, sams = two_heads(backend)
    other, plains = two_heads(backend)
    hands = [PlainSAM(nn.ModuleList([other[0], other[1 + i]]), plains[i].base_optimizer, rho=0.3) for i in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in [0, 1, 0, 1]:
            nets.zero_grad()
            loss_of_head(nets, i).backward()
            sams[i].first_step(zero_grad=True)
            loss_of_head(nets, i).backward()
            sams[i].second_step()

            hands[i].train(lambda i=i: loss_of_head(other, i))
    torch.testing.assert_close(copies(nets.parameters()), copies(other.parameters()))


def test_many_are_built_in_threads_while_others_step():
    """Each looks at those that are alive."""
    alive = [make("reference")[1] for _ in range(300)]
    failed = []

    def work():
        try:
            for _ in range(50):
                model, sam = make("reference")
                backward(model)
                sam.first_step()
                sam.restore()
        except RuntimeError as error:  # "Set changed size during iteration"
            failed.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed
    assert len(alive) == 300


# -- which line a warning names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["the call", "a scheduler", "collection"])
def test_a_warning_names_the_line_of_the_loop(backend, through):
    """Not one of fastsam's, nor of torch's around it."""
    model, sam = make(backend)
    if through == "a scheduler":  # it puts a function of torch's around sam.step, which second_step calls
        torch.optim.lr_scheduler.StepLR(sam, 1)
    backward(model)
    sam.first_step()
    with pytest.warns(UserWarning, match=r"very gradients|are restored") as caught:
        if through == "collection":
            del sam
            line = "del sam"
        else:
            sam.second_step()
            line = "sam.second_step()"
    assert [warning.filename for warning in caught] == [__file__]
    assert linecache.getline(__file__, caught[0].lineno).strip() == line


@pytest.mark.parametrize("what", ["16 bits", "left over"])
def test_a_notice_of_the_parameters_names_the_line_of_the_loop(backend, what):
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    sam = FusedSAM([p], torch.optim.SGD, lr=0.1, backend=backend)
    p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="16 bits" if what == "16 bits" else "an earlier one left") as caught:
        if what == "16 bits":
            sam.first_step()
        else:
            FusedSAM(sam.base_optimizer, rho=0.3)
    assert [warning.filename for warning in caught] == [__file__]
    assert linecache.getline(__file__, caught[0].lineno).strip() in (
        "sam.first_step()",
        "FusedSAM(sam.base_optimizer, rho=0.3)",
    )


# -- a FusedSAM that nobody finishes -----------------------------------------------------------------------------------


def test_a_new_one_restores_what_an_earlier_one_left_perturbed(backend):
    """A notebook cell that was interrupted between the calls, and runs again: the old one is still there by then."""
    model, sam = make(backend)
    w = copies(model.parameters())
    backward(model)
    sam.first_step(zero_grad=True)
    old = sam
    with pytest.warns(UserWarning, match="are restored"):
        sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    assert same_bits(copies(model.parameters()), w)
    backward(model)
    sam.first_step(zero_grad=True)
    above = copies(model.parameters())
    old.restore()
    del old
    gc.collect()
    assert same_bits(copies(model.parameters()), above)
    sam.restore()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("who", ["a new one", "collection"])
@pytest.mark.parametrize("loaded", [["weight"], ["bias"], ["weight", "bias"]], ids=str)
def test_what_was_loaded_since_stays(backend, who, loaded):
    """An interrupted cell, then load_state_dict of all or a part of the model: the rest goes back to w."""
    model, sam = make(backend)
    w = {name: p.detach().clone() for name, p in model.named_parameters()}
    best = {name: p + 1 for name, p in w.items() if name in loaded}
    backward(model)
    sam.first_step(zero_grad=True)
    model.load_state_dict(best, strict=False)
    with pytest.warns(UserWarning, match="written to since, which stay as written"):
        if who == "a new one":
            FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1, backend=backend)
        else:
            del sam
            gc.collect()
    for name, p in model.named_parameters():
        assert same_bits(p.detach(), best.get(name, w[name]))


def test_loading_before_second_step_is_told_once(backend):
    """second_step() goes back to w, whatever was loaded."""
    model, sam = make(backend)
    with pytest.warns(UserWarning, match="all weights were written to between first_step") as caught:
        for _ in range(2):
            w = copies(model.parameters())
            backward(model)
            sam.first_step(zero_grad=True)
            model.load_state_dict({name: p + 1 for name, p in model.state_dict().items()})
            sam.base_optimizer.param_groups[0]["lr"] = 0.0
            backward(model)
            sam.second_step(zero_grad=True)
            assert same_bits(copies(model.parameters()), w)
    assert len(caught) == 1


def test_one_of_other_parameters_is_left_alone(backend):
    """As in a GAN."""
    model, sam = make(backend)
    backward(model)
    sam.first_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedSAM(nn.Linear(2, 2).parameters(), torch.optim.SGD, lr=0.1, backend=backend)
    assert sam.perturbed
    sam.restore()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("written", [False, True])
def test_a_collected_one_restores_unless_somebody_wrote_since(backend, written):
    model, sam = make(backend)
    w = copies(model.parameters())
    backward(model)
    sam.first_step(zero_grad=True)
    if written:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
    with pytest.warns(UserWarning, match="stay as written" if written else "are restored"):
        del sam
        gc.collect()
    after = [torch.zeros_like(p) for p in w] if written else w
    assert same_bits(copies(model.parameters()), after)


@pytest.mark.filterwarnings("default")
def test_an_ascent_that_was_cut_short_is_restored_by_the_next_construction(backend):
    """An interrupt between two lines: the phase says that perturb writes, and it has not begun."""
    model, sam = make(backend)
    w = copies(model.parameters())
    backward(model)
    sam._state.perturbation.measure(sam.param_groups)
    sam._state.phase = Phase.CLIMBING
    with pytest.warns(UserWarning, match="an earlier FusedSAM had been left"):
        FusedSAM(sam.base_optimizer)
    assert not sam.perturbed
    assert same_bits(copies(model.parameters()), w)
