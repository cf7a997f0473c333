"""The class as tools and users see it: signatures, names, options as attributes, what counts as a number."""

import copy
import functools
import inspect
import warnings
from contextlib import nullcontext

import jsonargparse
import numpy as np
import pytest
import torch
from pytorch_optimizer import SAM as Peer
from torch import nn

import fastsam
from fastsam import SAM, FusedSAM
from tests.oracle import NORM_TOLERANCE, copies, norm64, same_bits

X = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def make(model, **options):
    return FusedSAM(model.parameters(), torch.optim.SGD, **{"rho": 0.1, "lr": 0.1, **options})


def two_calls(model, sam):
    model(X).square().mean().backward()
    sam.first_step(zero_grad=True)
    model(X).square().mean().backward()
    sam.second_step(zero_grad=True)


# -- signatures --------------------------------------------------------------------------------------------------------


def test_the_signature_is_the_first_form():
    """Config systems pass the parameters by the name of the first argument, and refuse names that are not there."""
    parameters = inspect.signature(FusedSAM).parameters
    assert list(parameters)[:4] == ["params", "base_optimizer", "rho", "adaptive"]
    assert parameters["rho"].default == 0.05
    assert parameters["adaptive"].default is False
    keywords = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert keywords == [
        "epsilon",
        "interval",
        "backend",
        "first_pass_context",
        "grad_scaler",
        "flatten_parameters",
        "closure_passes",
        "start",
        "direction",
        "process_group",
    ]
    assert list(parameters)[-1] == "base_optimizer_kwargs"
    assert parameters["interval"].annotation is int  # evaluated, not a string


def test_sam_has_the_name_and_signature_of_the_original():
    assert SAM.__name__ == "SAM"
    assert issubclass(SAM, FusedSAM)
    assert fastsam.SAM is SAM
    parameters = inspect.signature(SAM).parameters
    assert list(parameters) == ["params", "base_optimizer", "rho", "adaptive", "kwargs"]
    theirs = inspect.signature(Peer).parameters
    assert parameters["adaptive"].default == theirs["adaptive"].default


def test_sam_is_fused_sam(backend):
    models = [make_model() for _ in range(2)]
    sams = [
        SAM(models[0].parameters(), torch.optim.SGD, 0.2, True, lr=0.1, momentum=0.9, backend=backend),
        FusedSAM(models[1].parameters(), torch.optim.SGD, 0.2, True, lr=0.1, momentum=0.9, backend=backend),
    ]
    for model, sam in zip(models, sams, strict=True):
        for _ in range(3):
            two_calls(model, sam)
    assert same_bits(copies(models[0].parameters()), copies(models[1].parameters()))
    assert copy.deepcopy(sams[0]).__class__.__name__ == "SAM"


def test_a_constructor_by_the_name_of_its_first_argument():
    """What mmengine's optimizer constructor does: cls(**{first_argument: params}, **config)."""
    first = next(iter(inspect.signature(FusedSAM).parameters))
    sam = FusedSAM(**{first: make_model().parameters()}, base_optimizer=torch.optim.SGD, lr=0.1)
    assert type(sam.base_optimizer) is torch.optim.SGD


def test_jsonargparse_builds_it_from_a_configuration():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FusedSAM, "sam", skip={"params"}, instantiate=False)
    config = ["--sam.base_optimizer=torch.optim.SGD", "--sam.rho=0.2", "--sam.interval=2"]
    arguments = parser.parse_args(config).sam
    assert (arguments.rho, arguments.interval, arguments.closure_passes) == (0.2, 2, "auto")


# -- base optimizers that a function makes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factory",
    [
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        lambda params, **options: torch.optim.SGD(params, lr=0.1, momentum=0.9, **options),
    ],
    ids=["partial", "function"],
)
def test_factories(factory):
    """hydra's _partial_: true makes such a one."""
    models = [make_model() for _ in range(2)]
    sams = [
        FusedSAM(models[0].parameters(), factory, rho=0.1, weight_decay=0.01),
        FusedSAM(models[1].parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, weight_decay=0.01),
    ]
    for model, sam in zip(models, sams, strict=True):
        two_calls(model, sam)
    assert same_bits(copies(models[0].parameters()), copies(models[1].parameters()))


@pytest.mark.parametrize(
    ("factory", "error", "match"),
    [
        (lambda params: "SGD", TypeError, "base_optimizer must make a torch.optim.Optimizer"),
        (functools.partial(torch.optim.LBFGS, lr=0.1), ValueError, "LBFGS evaluates its closure many times"),
        (functools.partial(torch.optim.Adadelta, lr=0.1), ValueError, "has an option 'rho' of its own"),
    ],
)
def test_factories_of_something_else(factory, error, match):
    with pytest.raises(error, match=match):
        FusedSAM(make_model().parameters(), factory)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_numbers():
    sam = make(
        make_model(), rho=np.float32(0.5), epsilon=np.float64(1e-6), interval=np.int64(2), adaptive=np.bool_(True)
    )
    group = sam.param_groups[0]
    assert [type(group[key]) for key in ("rho", "epsilon", "adaptive")] == [float, float, bool]
    assert (sam.rho, sam.epsilon, sam.interval, sam.adaptive) == (0.5, 1e-6, 2, True)
    assert type(sam.interval) is int
    group["rho"] = np.float32(0.25)  # a schedule's
    for _ in range(2):
        two_calls_with_interval(sam)


def two_calls_with_interval(sam):
    for p in sam._parameters():
        p.grad = torch.ones_like(p)
    if sam.first_step(zero_grad=True):
        for p in sam._parameters():
            p.grad = torch.ones_like(p)
    sam.second_step(zero_grad=True)


@pytest.mark.parametrize("adaptive", [1, 0])
def test_adaptive_may_be_a_number(adaptive):
    assert make(make_model(), adaptive=adaptive).adaptive is bool(adaptive)


def test_rho_may_be_a_tensor_of_one_element(backend):
    """It is read at each step, as a 0-d one is."""
    model, other = make_model(), make_model()
    rho = torch.tensor([0.1])
    sam, expected = make(model, rho=rho, backend=backend), make(other, backend=backend)
    two_calls(model, sam)
    two_calls(other, expected)
    rho.fill_(0.3)
    expected.rho = 0.3
    two_calls(model, sam)
    two_calls(other, expected)
    assert same_bits(copies(model.parameters()), copies(other.parameters()))


@pytest.mark.parametrize("adaptive", [2, "yes", None, torch.tensor(True)])
def test_adaptive_is_no_other_thing(adaptive):
    with pytest.raises(TypeError, match="adaptive must be True or False"):
        make(make_model(), adaptive=adaptive)


# -- options as attributes ---------------------------------------------------------------------------------------------


def test_options_are_attributes_of_all_groups(backend):
    """davda54/sam has defaults only; who sets sam.rho means the step."""
    model, other = make_model(), make_model()
    sam = FusedSAM([{"params": [p]} for p in model.parameters()], torch.optim.SGD, lr=0.1, backend=backend)
    assert (sam.rho, sam.epsilon, sam.adaptive) == (0.05, 1e-12, False)
    two_calls(model, sam)
    two_calls(other, make(other, rho=0.05, backend=backend))
    sam.rho, sam.epsilon, sam.adaptive = 0.5, 1e-3, True
    assert {group["rho"] for group in sam.param_groups} == {0.5}
    two_calls(model, sam)
    two_calls(other, make(other, rho=0.5, epsilon=1e-3, adaptive=True, backend=backend))
    assert same_bits(copies(model.parameters()), copies(other.parameters()))
    sam.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert (sam.rho, sam.adaptive) == (0.5, True)


def test_options_that_differ_have_no_one_value():
    model = make_model()
    sam = FusedSAM(
        [{"params": model[0].parameters(), "rho": 0.1}, {"params": model[2].parameters()}], torch.optim.SGD, lr=0.1
    )
    with pytest.raises(ValueError, match=r"rho differs between the param groups: read param_groups\[i\]\['rho'\]"):
        _ = sam.rho
    sam.rho = 0.2
    assert sam.rho == 0.2


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("rho", -1, ValueError),
        ("rho", "a", TypeError),
        ("epsilon", float("nan"), ValueError),
        ("adaptive", 3, TypeError),
        ("interval", 0, ValueError),
        ("interval", 1.5, TypeError),
        ("grad_scaler", 1024.0, TypeError),
        ("first_pass_context", 1, TypeError),
        ("process_group", 0, TypeError),
    ],
)
def test_options_are_checked_when_they_are_set(name, value, error):
    sam = make(make_model())
    before = getattr(sam, name)
    with pytest.raises(error, match=name):
        setattr(sam, name, value)
    assert getattr(sam, name) == before


def test_a_rho_on_a_device_is_not_looked_at():
    """That would be to wait for the device; a meta tensor refuses it."""
    rho = torch.tensor(0.1, device="meta")
    sam = FusedSAM([{"params": [p]} for p in make_model().parameters()], torch.optim.SGD, rho=rho, lr=0.1)
    assert sam.rho is rho


def test_interval_changes_while_training():
    model = make_model()
    sam = make(model)
    sam.interval = 2
    model(X).sum().backward()
    assert not sam.first_step()
    sam.second_step()
    assert sam.is_sam_step


# -- what other loops ask for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_grad_norm_of_the_original(backend, adaptive):
    """Of the gradients that are there: before first_step, after it, and between the steps."""
    model = make_model()
    sam = make(model, adaptive=adaptive, backend=backend)

    def by_hand():
        terms = [(p.detach().abs() if adaptive else 1.0) * p.grad for p in model.parameters()]
        return torch.norm(torch.stack([t.norm(p=2) for t in terms]), p=2)

    model(X).square().mean().backward()
    torch.testing.assert_close(sam._grad_norm(), by_hand())
    sam.first_step()
    w = copies(model.parameters())
    torch.testing.assert_close(sam._grad_norm(), by_hand())
    sam.zero_grad()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        sam._grad_norm()
    assert same_bits(copies(model.parameters()), w)
    model(X).square().mean().backward()
    torch.testing.assert_close(sam._grad_norm(), by_hand())
    sam.second_step()
    torch.testing.assert_close(sam._grad_norm(), by_hand())


NORMS = [
    (torch.float32, 1.0, 1e-3, False),
    (torch.float16, 1e-3, 1e-5, True),
    (torch.float16, 100.0, 1e3, True),
    (torch.bfloat16, 1.0, 1e-2, False),
    (torch.float64, 1.0, 1e-60, False),
    (torch.float64, 1.0, 1e60, False),
]


@pytest.mark.parametrize(("dtype", "w", "g", "adaptive"), NORMS, ids=str)
def test_grad_norm_of_the_original_is_the_ascents(backend, dtype, w, g, adaptive):
    """Its bits; and not a word of 16-bit parameters, before they are perturbed."""
    params = [nn.Parameter(torch.full((n,), w, dtype=dtype)) for n in (5, 2)]
    sam = FusedSAM(params, torch.optim.SGD, adaptive=adaptive, backend=backend, lr=0.1)
    for p in params:
        p.grad = torch.full_like(p, g)
    assert sam.grad_norm is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm = sam._grad_norm()
    assert sam.grad_norm is None
    expected = norm64(params, [p.grad for p in params], [adaptive] * 2)
    assert float(norm) == pytest.approx(expected, rel=NORM_TOLERANCE)
    short = dtype.itemsize == 2
    with pytest.warns(UserWarning, match="16 bits") if short else nullcontext():
        sam.first_step()
    assert same_bits([norm], [sam.grad_norm])
    sam.restore()


def test_grad_norm_of_the_original_refuses_what_an_ascent_does():
    embedding = nn.Embedding(4, 2, sparse=True)
    sam = FusedSAM(embedding.parameters(), torch.optim.SGD, lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="is sparse"):
        sam._grad_norm()


class Modal(torch.optim.SGD):
    """As schedule-free optimizers have it: weights that differ between training and evaluation."""

    mode = None

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


def test_train_and_eval_reach_a_base_optimizer_that_has_them():
    model = make_model()
    sam = FusedSAM(model.parameters(), Modal, lr=0.1)
    sam.train()
    assert sam.base_optimizer.mode == "train"
    sam.eval()
    assert sam.base_optimizer.mode == "eval"
    assert not hasattr(sam, "mode")  # nothing else is passed on
    model(X).sum().backward()
    sam.first_step()
    with pytest.raises(RuntimeError, match=r"eval\(\) while the weights are perturbed"):
        sam.eval()
    sam.restore()


def test_train_and_eval_are_not_there_otherwise():
    """Trainers ask hasattr."""
    sam = make(make_model())
    assert not hasattr(sam, "train")
    assert not hasattr(sam, "eval")
    with pytest.raises(AttributeError, match="'FusedSAM' object has no attribute 'trian'"):
        _ = sam.trian


# -- an optimizer that was wrapped before ------------------------------------------------------------------------------


def test_given_options_win_over_left_over_ones():
    base = torch.optim.SGD(make_model().parameters(), lr=0.1)
    FusedSAM(base, 0.5, adaptive=True)
    with pytest.warns(UserWarning, match="rho=0.5 of param group 0 by 0.1"):
        sam = FusedSAM(base, rho=0.1)
    assert (sam.rho, sam.adaptive) == (0.1, True)  # adaptive was not given
    again = FusedSAM(base)
    assert again.rho == 0.1


LEFT_OVER = [
    ({"rho": 0.3, "adaptive": True}, {}, r"rho=0\.3 of .* \(a new group gets 0\.05\), adaptive=True .* gets False"),
    ({}, {"direction": "momentum"}, r"rho=0\.05 of param group 0 \(a new group gets 1\)"),
    ({"rho": torch.tensor(0.25)}, {}, r"rho=0\.25 of param group 0"),
]


@pytest.mark.parametrize("through_a_checkpoint", [False, True])
@pytest.mark.parametrize(("first", "second", "told"), LEFT_OVER)
def test_options_that_an_earlier_one_left_stay_and_it_says_so_once(
    hears_nothing, first, second, told, through_a_checkpoint
):
    """A notebook cell that is edited and run again: nobody gave these options to this FusedSAM."""
    base = torch.optim.SGD(make_model().parameters(), lr=0.1, momentum=0.9)
    earlier = FusedSAM(base, **first)
    if through_a_checkpoint:
        base = torch.optim.SGD(make_model().parameters(), lr=0.1, momentum=0.9)
        base.load_state_dict(earlier.state_dict())
    with pytest.warns(UserWarning, match=told) as caught:
        sams = [FusedSAM(base, **second) for _ in range(2)]
    assert len(caught) == 1
    assert [(sam.rho, sam.adaptive) for sam in sams] == [(earlier.rho, earlier.adaptive)] * 2


def test_what_a_call_would_give_anyway_is_not_told(hears_nothing):
    """Nor perturb, which no call gives, nor what is given."""
    model = make_model()
    base = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), "perturb": False}])
    FusedSAM(base)
    FusedSAM(base)
    FusedSAM(base, rho=0.05, adaptive=False)


@pytest.mark.parametrize("refused", [{"backend": "cuda"}, {"backend": "numpy"}, {"process_group": 1}])
def test_a_call_that_was_refused_leaves_no_options(hears_nothing, refused):
    base = torch.optim.SGD(make_model().parameters(), lr=0.1)
    keys = set(base.param_groups[0])
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        FusedSAM(base, rho=0.5, adaptive=True, **refused)
    assert set(base.param_groups[0]) == keys
    sam = FusedSAM(base)
    assert (sam.rho, sam.adaptive) == (0.05, False)


def test_options_of_the_groups_own_stay():
    model = make_model()
    base = torch.optim.SGD([{"params": model[0].parameters(), "rho": 0.3}, {"params": model[2].parameters()}], lr=0.1)
    sam = FusedSAM(base, rho=0.1)
    assert [group["rho"] for group in sam.param_groups] == [0.3, 0.1]
