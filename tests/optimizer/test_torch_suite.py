"""What torch's own optimizer suite checks, for FusedSAM around every optimizer of torch.optim.

With rho = 0 a SAM step is the base optimizer's: a plain twin of each is the oracle.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

from fastsam import FusedSAM
from tests.oracle import copies, same_bits

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "SGD maximize": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "SGD foreach": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "SGD fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "SGD tensor lr": (torch.optim.SGD, {"lr": torch.tensor(0.1), "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "Adam fused": (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    "Adam tensor lr": (torch.optim.Adam, {"lr": torch.tensor(0.01)}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "AdamW foreach": (torch.optim.AdamW, {"lr": 0.01, "foreach": True}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make_model():
    """Dense, transposed, sliced, 0-d and unused parameters."""
    torch.manual_seed(0)
    return nn.ParameterDict(
        {
            "weight": torch.randn(5, 4),
            "transposed": torch.randn(4, 3).t(),
            "sliced": torch.randn(3, 8)[:, ::2],
            "scale": torch.tensor(1.5),
            "unused": torch.randn(7),
        }
    )


def backward(model, i):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(i))
    y = (x @ model["weight"].t()).tanh() * model["scale"]
    z = x @ model["transposed"].t() + x @ model["sliced"].t()
    loss = y.pow(2).mean() + z.sin().pow(2).mean()
    loss.backward()
    return loss


def groups(model, lr):
    """Two groups; the second has a learning rate of its own."""
    params = list(model.values())
    return [{"params": params[:2]}, {"params": params[2:], "lr": lr * 0.5}]


def construct(model, name, **options):
    base, base_options = OPTIMIZERS[name]
    base_options = copy.deepcopy(base_options)
    return FusedSAM(groups(model, base_options["lr"]), base, **options, **base_options)


def construct_plain(model, name):
    base, base_options = OPTIMIZERS[name]
    base_options = copy.deepcopy(base_options)
    return base(groups(model, base_options["lr"]), **base_options)


def step(model, sam, i):
    def closure():
        sam.zero_grad()
        return backward(model, i)

    return sam.step(closure)


def plain_step(model, optimizer, i):
    optimizer.zero_grad()
    loss = backward(model, i)
    optimizer.step()
    return loss


def tensors(optimizer):
    return [
        value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
        for entry in optimizer.state.values()
        for value in entry.values()
        if value is not None
    ]


@each_optimizer
def test_with_rho_0_it_is_the_base_optimizer(name, backend):
    model, twin = make_model(), make_model()
    sam, plain = construct(model, name, rho=0.0, backend=backend), construct_plain(twin, name)
    for i in range(5):
        assert torch.equal(step(model, sam, i), plain_step(twin, plain, i))
        assert same_bits(copies(model.values()), copies(twin.values()))
    assert same_bits(tensors(sam), tensors(plain))
    assert [p in sam.state for p in model.values()] == [p in plain.state for p in twin.values()]


@each_optimizer
def test_state_dict_round_trip(name):
    model = make_model()
    sam = construct(model, name, rho=0.3, adaptive=True)
    for i in range(3):
        step(model, sam, i)
    twin = make_model()
    other = construct(twin, name, rho=0.1)
    other.load_state_dict(copy.deepcopy(sam.state_dict()))
    with torch.no_grad():
        for p, q in zip(twin.values(), model.values(), strict=True):
            p.copy_(q)
    for i in range(3, 6):
        step(model, sam, i)
        step(twin, other, i)
    assert same_bits(copies(twin.values()), copies(model.values()))
    assert same_bits(tensors(other), tensors(sam))


# torch's fused CPU kernels take a parameter with gaps for a dense one; its copy is dense.
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "fused" not in name])
def test_deepcopy(name):
    model = make_model()
    sam = construct(model, name, rho=0.3)
    step(model, sam, 0)
    twin, other = copy.deepcopy((model, sam))
    for i in range(1, 3):
        step(model, sam, i)
        step(twin, other, i)
    # Not bit for bit: a copy of a slice is dense, and is multiplied by another routine.
    torch.testing.assert_close(copies(twin.values()), copies(model.values()))


@each_optimizer
def test_schedulers_change_any_kind_of_lr(name):
    model = make_model()
    sam = construct(model, name, rho=0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(sam, 1, 0.5)
    before = [float(group["lr"]) for group in sam.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, sam, 0)
        scheduler.step()
    assert [float(group["lr"]) for group in sam.param_groups] == pytest.approx([lr * 0.5 for lr in before])
    for group, kind in zip(sam.param_groups, construct_plain(make_model(), name).param_groups, strict=True):
        assert type(group["lr"]) is type(kind["lr"])
    step(model, sam, 1)


def test_state_dict_and_load_hooks():
    model = make_model()
    sam = construct(model, "SGD nesterov")
    step(model, sam, 0)
    log = []

    def replace(optimizer, state_dict):
        log.append("post")
        return {**state_dict, "extra": 1}

    def change(optimizer, state_dict):
        log.append("load pre")
        return {**state_dict, "param_groups": [{**group, "lr": 0.5} for group in state_dict["param_groups"]]}

    handles = [
        sam.register_state_dict_pre_hook(lambda optimizer: log.append("pre")),
        sam.register_state_dict_post_hook(replace),
        sam.register_load_state_dict_pre_hook(change),
        sam.register_load_state_dict_post_hook(lambda optimizer: log.append("load post")),
    ]
    state_dict = sam.state_dict()
    assert state_dict["extra"] == 1
    sam.load_state_dict(state_dict)
    assert log == ["pre", "post", "load pre", "load post"]
    assert sam.param_groups[0]["lr"] == 0.5
    for handle in handles:
        handle.remove()
    assert "extra" not in sam.state_dict()


def test_a_load_hook_that_writes_leaves_the_callers_state_dict():
    model = make_model()
    sam = construct(model, "SGD nesterov")
    step(model, sam, 0)
    state_dict = sam.state_dict()
    keys = set(state_dict)

    def drop(optimizer, loaded):
        del loaded["fastsam_settings"]

    sam.register_load_state_dict_pre_hook(drop)
    sam.load_state_dict(state_dict)
    assert set(state_dict) == keys


def test_a_step_pre_hook_may_change_the_arguments():
    model = make_model()
    sam = construct(model, "SGD")
    ran = []

    def closure():
        ran.append(1)
        sam.zero_grad()
        return backward(model, 0)

    handle = sam.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, closure), {}))
    sam.step()
    handle.remove()
    assert len(ran) == 2


@pytest.mark.parametrize("names", [False, True])
def test_params_may_be_any_iterable(names):
    model = make_model()
    given = ((k, v) for k, v in model.items()) if names else iter(model.values())
    sam = FusedSAM(given, torch.optim.SGD, lr=0.1)
    step(model, sam, 0)
    for p in (model["weight"], "weight"):
        with pytest.raises(TypeError):
            FusedSAM(p, torch.optim.SGD, lr=0.1)


def test_profiler_shows_the_step():
    model = make_model()
    sam = construct(model, "SGD")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(model, sam, 0)
        sam.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#FusedSAM.step", "Optimizer.step#SGD.step", "Optimizer.zero_grad#SGD.zero_grad"} <= names


def test_zero_grad_is_the_optimizers_own_where_it_is_not_torchs(monkeypatch):
    """torch's is done without a call of it; but not one that a subclass, or somebody in torch's class, put there."""
    calls = []

    class Own(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            calls.append(type(self).__name__)
            super().zero_grad(set_to_none)

    def patched(self, set_to_none=True):
        calls.append("patched")

    model = make_model()
    for base_class in (Own, torch.optim.SGD):
        sam = FusedSAM(model.values(), base_class, lr=0.1)
        step(model, sam, 0)
        sam.zero_grad()
        assert all(p.grad is None for p in model.values())
    assert set(calls) == {"Own"}
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", patched)
    sam.zero_grad()
    assert calls[-1] == "patched"


@pytest.mark.parametrize("enabled", [False, True])
def test_grad_mode_is_left_as_it_was(enabled):
    model = make_model()
    sam = construct(model, "SGD")

    def closure():
        assert torch.is_grad_enabled()
        raise ArithmeticError

    with torch.set_grad_enabled(enabled):
        with pytest.raises(ArithmeticError):
            sam.step(closure)
        assert torch.is_grad_enabled() is enabled
        with pytest.raises(RuntimeError, match="no parameter has a gradient"):
            sam.first_step()
        assert torch.is_grad_enabled() is enabled
