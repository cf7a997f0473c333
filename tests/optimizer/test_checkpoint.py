"""State dicts: FusedSAM's own, plain ones, other SAM optimizers', and copies by pickle and deepcopy."""

import contextlib
import copy
import io
import pickle

import pytest
import pytorch_optimizer
import torch
import torch.distributed.checkpoint as dcp
from pytorch_optimizer import SAM
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam import FusedSAM, notices
from fastsam.checkpoint import is_state_initialisation
from tests.oracle import copies, same_bits

ADAMW = {"lr": 0.01, "weight_decay": 0.1}


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def make(model, base=torch.optim.AdamW, **options):
    return FusedSAM(model.parameters(), base, **{**ADAMW, "rho": 0.3, **options})


def backward(model, i=0):
    dtype = next(model.parameters()).dtype
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(i)).to(dtype)
    loss = model(x).pow(2).mean()
    loss.backward()
    return loss


def train(model, sam, steps, start=0):
    for i in range(start, start + steps):
        sam.zero_grad()
        backward(model, i)
        if sam.first_step(zero_grad=True):
            backward(model, i)
        sam.second_step(zero_grad=True)


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def moments(optimizer, params):
    return [optimizer.state[p][key] for p in params for key in ("exp_avg", "exp_avg_sq", "step")]


def test_holds_the_base_optimizers_state_and_the_options():
    model = make_model()
    sam = make(model, rho=torch.tensor(0.3), adaptive=True, interval=2)
    train(model, sam, 3)
    state_dict = saved_and_loaded(sam.state_dict())
    assert set(state_dict) == {"state", "param_groups", "fastsam_settings"}
    assert set(state_dict["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    (group,) = state_dict["param_groups"]
    assert group["lr"] == 0.01
    assert group["adaptive"] is True
    assert group["epsilon"] == 1e-12
    assert torch.equal(group["rho"], torch.tensor(0.3))
    assert group["sam_step"] == 3


def test_loading_changes_what_training_does_and_nothing_else():
    """Saved options win over those of the construction; the dict that was given stays as it was."""
    model, other = make_model(), make_model()
    sam = make(model, rho=0.7, adaptive=True)
    train(model, sam, 3)
    state_dict = sam.state_dict()
    kept = copy.deepcopy(state_dict)
    loaded = make(other, rho=0.1)
    loaded.load_state_dict(state_dict)
    other.load_state_dict(model.state_dict())
    assert loaded.param_groups[0]["rho"] == 0.7
    assert loaded.param_groups[0]["adaptive"] is True
    assert state_dict["param_groups"] == kept["param_groups"]
    for i, entry in kept["state"].items():
        assert all(torch.equal(state_dict["state"][i][key], value) for key, value in entry.items())
    loaded.load_state_dict(kept)  # torch keeps the tensors that it is given: let the two not share them
    train(other, loaded, 2, start=3)
    train(model, sam, 2, start=3)
    assert same_bits(list(other.parameters()), list(model.parameters()))


def test_plain_state_dicts_both_ways():
    """From a run without SAM to one with, and back."""
    model = make_model()
    params = list(model.parameters())
    plain = torch.optim.AdamW(params, **ADAMW)
    for i in range(3):
        plain.zero_grad()
        backward(model, i)
        plain.step()
    sam = make(model, rho=0.1, interval=2)
    sam.param_groups[0]["rho"] = 0.3
    sam.load_state_dict(saved_and_loaded(plain.state_dict()))
    assert same_bits(moments(sam, params), moments(plain, params))
    assert sam.param_groups[0]["rho"] == 0.3
    train(model, sam, 2)
    back = torch.optim.AdamW(params, **ADAMW)
    back.load_state_dict(saved_and_loaded(sam.state_dict()))
    assert same_bits(moments(back, params), moments(sam, params))
    backward(model)
    back.step()


class OwnLoad(torch.optim.AdamW):
    """Its load_state_dict calls none of torch's hooks."""

    def load_state_dict(self, state_dict):
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            params = group["params"]
            group.clear()
            group.update(saved, params=params)


@pytest.mark.parametrize("base", [torch.optim.AdamW, OwnLoad])
def test_a_state_dict_loaded_past_fused_sam_keeps_the_options_that_it_lacks(base):
    """By whoever knows the base optimizer only."""
    model = make_model()
    rho = torch.tensor(0.4)
    groups = [{"params": model[0].parameters(), "rho": rho}, {"params": model[2].parameters(), "perturb": False}]
    sam = FusedSAM(groups, base, rho=0.3, interval=2, **ADAMW)
    sam.adaptive = True
    train(model, sam, 3)
    plain = base([{"params": list(layer.parameters())} for layer in (model[0], model[2])], lr=0.5).state_dict()
    for saved, expected in ((None, 0.4), (0.7, 0.7)):
        if saved is not None:
            plain["param_groups"][0]["rho"] = saved
        sam.base_optimizer.load_state_dict(plain)
        first, second = sam.param_groups
        assert first["lr"] == 0.5
        assert first["rho"] is rho
        assert float(rho) == pytest.approx(expected)
        assert (second["rho"], first["perturb"], second["perturb"]) == (0.3, True, False)
        assert [(group["adaptive"], group["sam_step"]) for group in sam.param_groups] == [(True, 3)] * 2
    before = copies(model[2].parameters())
    backward(model)
    assert sam.first_step(zero_grad=True)
    assert same_bits(copies(model[2].parameters()), before)
    sam.restore()


def test_a_plain_state_dict_for_a_group_that_came_past_fused_sam():
    first, _, second = make_model()
    sam = FusedSAM(first.parameters(), torch.optim.SGD, lr=0.1, rho=0.3)
    sam.base_optimizer.add_param_group({"params": list(second.parameters())})
    sam.load_state_dict(torch.optim.SGD([{"params": list(m.parameters())} for m in (first, second)]).state_dict())
    assert [(group["rho"], group["sam_step"], group["lr"]) for group in sam.param_groups] == [(0.3, 0, 0.001)] * 2


@pytest.mark.parametrize("mid_step", [False, True])
def test_state_dict_of_pytorch_optimizers_sam(mid_step):
    model, twin = make_model(), make_model()
    peer = SAM(twin.parameters(), torch.optim.AdamW, rho=0.2, adaptive=True, **ADAMW)
    for i in range(3):
        backward(twin, i)
        peer.first_step(zero_grad=True)
        backward(twin, i)
        peer.second_step(zero_grad=True)
    if mid_step:
        backward(twin)
        peer.first_step(zero_grad=True)
    state_dict = saved_and_loaded(peer.state_dict())
    assert ("old_p" in state_dict["state"][0]) is mid_step
    sam = make(model)
    sam.load_state_dict(state_dict)
    params = list(model.parameters())
    assert same_bits(moments(sam, params), moments(peer, list(twin.parameters())))
    assert set(sam.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert sam.param_groups[0]["rho"] == 0.2
    assert sam.param_groups[0]["adaptive"] is True
    train(model, sam, 2)


@pytest.mark.parametrize("kept", ["old_p", "e_w"])
def test_state_dict_of_davda54_or_composer(kept):
    """Theirs holds a copy of the weights (old_p), or the perturbation (e_w), and no state of the base optimizer."""
    model = make_model()
    options = {"old_p": {"rho": 0.2, "adaptive": False}, "e_w": {"rho": 0.2, "epsilon": 1e-10}}[kept]
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict()
    state_dict = {
        "state": {**{i: {kept: torch.ones_like(p)} for i, p in enumerate(model.parameters())}, "epochs": 3},
        "param_groups": [{**plain["param_groups"][0], **options}],
    }
    sam = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.5, momentum=0.5)
    sam.load_state_dict(saved_and_loaded(state_dict))
    assert dict(sam.state) == {"epochs": 3}  # what is of no parameter stays
    assert sam.param_groups[0]["rho"] == 0.2
    assert sam.param_groups[0]["epsilon"] == options.get("epsilon", 1e-12)
    assert sam.param_groups[0]["lr"] == 0.1
    train(model, sam, 2)
    assert set(sam.state[model[0].weight]) == {"momentum_buffer"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch")
def test_state_follows_the_dtype_of_the_parameters(dtype):
    model, other = make_model(), make_model(dtype)
    sam, loaded = make(model), make(other)
    train(model, sam, 2)
    loaded.load_state_dict(sam.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert loaded.state[q]["exp_avg"].dtype is dtype
        torch.testing.assert_close(loaded.state[q]["exp_avg"], sam.state[p]["exp_avg"].to(dtype))
        assert torch.equal(loaded.state[q]["step"], sam.state[p]["step"])
        assert loaded.state[q]["step"].dtype is torch.float32
    train(other, loaded, 1)


def test_tensor_rho_keeps_its_identity():
    model = make_model()
    rho = torch.tensor(0.1)
    sam = make(model, rho=rho)
    for saved in (0.4, torch.tensor(0.5)):
        state_dict = sam.state_dict()
        state_dict["param_groups"][0]["rho"] = saved
        sam.load_state_dict(state_dict)
        assert sam.param_groups[0]["rho"] is rho
        assert float(rho) == pytest.approx(float(saved))
    sam.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    assert sam.param_groups[0]["rho"] is rho
    assert float(rho) == 0.5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rho": -1.0}, ValueError, "rho of param group 0 of the state dict"),
        ({"epsilon": "small"}, TypeError, "epsilon of param group 0 of the state dict"),
        ({"adaptive": None}, TypeError, "adaptive of param group 0 of the state dict"),
        ({"params": [0]}, ValueError, "doesn't match the size"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change, error, message):
    model = make_model()
    rho = torch.tensor(0.25)
    sam = make(model, rho=rho)
    train(model, sam, 1)
    wrong = sam.state_dict()
    wrong["param_groups"] = [{**wrong["param_groups"][0], "rho": 0.75, "lr": 5.0, **change}]
    with pytest.raises(error, match=message):
        sam.load_state_dict(wrong)
    assert sam.param_groups[0]["lr"] == 0.01
    assert sam.param_groups[0]["rho"] is rho
    assert float(rho) == 0.25
    with pytest.raises(ValueError, match="different number of parameter groups"):
        sam.load_state_dict({**wrong, "param_groups": []})


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("form", ["class", "optimizer"])
def test_copies_train_on_by_themselves(how, form, backend):
    model = make_model()
    options = {"rho": 0.3, "adaptive": True, "interval": 3, "backend": backend, "flatten_parameters": True}
    if form == "class":
        sam = make(model, **options)
    else:
        sam = FusedSAM(torch.optim.AdamW(model.parameters(), **ADAMW), **options)
    train(model, sam, 4)
    twin, copied = COPIES[how]((model, sam))
    assert copied.param_groups[0]["params"][0] is twin[0].weight
    assert same_bits(list(twin.parameters()), list(model.parameters()))
    before = copies(model.parameters())
    train(twin, copied, 5, start=4)
    assert same_bits(list(model.parameters()), before)
    train(model, sam, 5, start=4)
    assert same_bits(list(twin.parameters()), list(model.parameters()))
    assert type(copied.base_optimizer) is torch.optim.AdamW
    # zero_grad of the copy's base optimizer still says what is stale
    backward(twin)
    copied.base_optimizer.zero_grad(set_to_none=False)
    passes = []
    copied.step(lambda: passes.append(1) or backward(twin))
    assert len(passes) == 1  # step 9, from 0, is plain: a fresh gradient would have been used as it is


def scaled_step(model, sam, scaler):
    def closure():
        sam.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        scaler.scale(loss).backward()
        return loss

    sam.step(closure)
    scaler.update()


def test_a_shallow_copy_is_another_one_around_the_same_base():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = make_model()
    sam = make(model, grad_scaler=scaler, first_pass_context=contextlib.nullcontext)
    copied = copy.copy(sam)
    assert copied.base_optimizer is sam.base_optimizer
    assert copied.grad_scaler is scaler
    assert copied.first_pass_context is contextlib.nullcontext
    copied.grad_scaler = None
    copied.interval = 2
    assert (sam.grad_scaler, sam.interval) == (scaler, 1)
    scaled_step(model, sam, scaler)
    assert [s.param_groups[0]["sam_step"] for s in (sam, copied)] == [1, 1]


def test_deepcopy_shares_the_scaler_and_the_context():
    """A closure step of the copy is the original's; without the scale it would be longer by it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    context = contextlib.nullcontext
    model = make_model()
    sam = make(model, first_pass_context=context, grad_scaler=scaler)
    twin, copied = copy.deepcopy((model, sam))
    assert copied.grad_scaler is scaler
    assert copied.first_pass_context is context
    assert copied.base_optimizer is not sam.base_optimizer
    copied.first_pass_context = None
    assert sam.first_pass_context is context  # each has its own name for what they share
    scaled_step(model, sam, scaler)
    scaled_step(twin, copied, scaler)
    assert same_bits(copies(model.parameters()), copies(twin.parameters()))


def test_pickle_leaves_the_scaler_behind_and_a_closure_step_says_so():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = make_model()
    sam = make(model, grad_scaler=scaler)
    twin, copied = pickle.loads(pickle.dumps((model, sam)))
    copied = copy.deepcopy(pickle.loads(pickle.dumps(copied)))  # a copy of a copy knows it too
    copied.param_groups[0]["params"] = list(twin.parameters())
    assert copied.grad_scaler is None
    before = copies(twin.parameters())
    with pytest.raises(RuntimeError, match=r"set sam\.grad_scaler = scaler"):
        scaled_step(twin, copied, scaler)
    assert same_bits(copies(twin.parameters()), before)
    copied.grad_scaler = scaler
    scaled_step(model, sam, scaler)
    scaled_step(twin, copied, scaler)
    assert same_bits(copies(model.parameters()), copies(twin.parameters()))


def test_pickle_leaves_the_context_behind_and_a_closure_step_says_so_once(monkeypatch):
    monkeypatch.setattr(notices, "told", set())
    model = make_model()
    sam = pickle.loads(pickle.dumps(make(model, first_pass_context=contextlib.nullcontext)))
    with pytest.warns(UserWarning, match="set it again") as caught:
        for _ in range(2):
            sam.step(lambda: sum(p.square().sum() for p in sam._parameters()).backward())
    assert len(caught) == 1


def test_a_disabled_scaler_is_not_missed():
    sam = make(make_model(), grad_scaler=torch.amp.GradScaler("cpu", enabled=False))
    copied = pickle.loads(pickle.dumps(sam))
    copied.step(lambda: sum(p.square().sum() for p in copied._parameters()).backward())


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_distributed_checkpoint_initialises_state(base):
    """torch.distributed.checkpoint calls step() with zero gradients and lr 0: no step, and no gradient is marked."""
    model, other = make_model(), make_model()
    options = {"lr": 0.01, "interval": 2, "rho": 0.3}
    sam = FusedSAM(model.parameters(), base, **options)
    before = copies(model.parameters())
    state_dict = get_optimizer_state_dict(model, sam)
    assert same_bits(copies(model.parameters()), before)
    assert sam.param_groups[0]["sam_step"] == 0
    assert sam.param_groups[0]["lr"] == 0.01

    train(model, sam, 3)
    backward(model)
    state_dict = copy.deepcopy(get_optimizer_state_dict(model, sam))
    assert sam.param_groups[0]["sam_step"] == 3
    ran = []
    sam.step(lambda: ran.append(sam.perturbed) or backward(model))
    assert ran == [True]  # the gradients from before the save are fresh still
    saved = [v for entry in state_dict["state"].values() for v in entry.values() if v is not None]

    other.load_state_dict(model.state_dict())
    loaded = FusedSAM(other.parameters(), base, **options)
    set_optimizer_state_dict(other, loaded, state_dict)
    assert loaded.param_groups[0]["sam_step"] == 3
    got = [v for p in other.parameters() for v in loaded.state[p].values() if v is not None]
    assert same_bits(got, saved)
    assert len(got) == (12 if base is torch.optim.AdamW else 0)


@pytest.mark.parametrize(("lr", "gradient"), [(0.0, 1.0), (0.1, 0.0), (0.1, None)])
def test_what_is_no_initialisation(lr, gradient):
    """One of the two signs alone, where there is no state either: a step of the user's own, by mistake or past sam."""
    model = make_model()
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=lr)
    for p in model.parameters():
        p.grad = None if gradient is None else torch.full_like(p, gradient)
    with pytest.raises(RuntimeError, match="not perturbed"):
        sam.step()
    sam.base_optimizer.step()
    assert sam.param_groups[0]["sam_step"] == 1


def test_rates_that_cant_be_looked_at():
    base = torch.optim.SGD(make_model().parameters(), lr=torch.zeros(()))
    assert is_state_initialisation(base)
    base.param_groups[0]["lr"] = torch.zeros((), device="meta")  # to look at one on a device is to wait for it
    assert not is_state_initialisation(base)
    del base.param_groups[0]["lr"]
    assert is_state_initialisation(base)


@pytest.mark.parametrize("interval", [1, 2])
def test_a_step_in_two_calls_is_no_initialisation(interval):
    """The first one of a schedule from lr 0 on may have zero gradients: first_step() says that it is one."""
    model = make_model()
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.3, interval=interval, lr=0.0)
    before = copies(model.parameters())
    backward(model)
    assert sam.first_step() is (interval == 1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    sam.second_step()
    assert same_bits(copies(model.parameters()), before)
    assert sam.param_groups[0]["sam_step"] == 1


class HostReads(TorchDispatchMode):
    """Counts values that the host reads: on a GPU each waits for it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_plain_step_at_lr_0_reads_no_gradient():
    """A schedule may begin at 0; only torch.distributed.checkpoint's step, which finds no state, looks like it."""
    model = make_model()
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.1, interval=4, lr=0.1, momentum=0.9)
    backward(model)
    sam.step()
    sam.param_groups[0]["lr"] = 0.0
    before = copies(model.parameters())
    with HostReads() as reads:
        sam.step()
    assert reads.count == 0
    assert sam.param_groups[0]["sam_step"] == 2
    for p in model.parameters():
        p.grad.zero_()
    sam.step()  # zeros are a gradient like others, once there is state
    assert sam.param_groups[0]["sam_step"] == 3
    assert same_bits(copies(model.parameters()), before)


class OfParts(torch.optim.SGD):
    """As an optimizer made of others has it: a state dict for each, and nothing else among them."""

    def state_dict(self):
        return {"part": super().state_dict()}

    def load_state_dict(self, state_dict):
        (part,) = state_dict.values()
        super().load_state_dict(part)


NESTED = {
    "of parts": lambda params: OfParts(params, lr=0.1, momentum=0.9),
    "lookahead": lambda params: pytorch_optimizer.Lookahead(torch.optim.SGD(params, lr=0.1, momentum=0.9), k=2),
    "schedule-free": lambda params: pytorch_optimizer.ScheduleFreeWrapper(
        torch.optim.SGD(params, lr=0.1), momentum=0.9
    ),
    "magma": lambda params: pytorch_optimizer.Magma(torch.optim.AdamW(params, lr=0.1)),
}


@pytest.mark.parametrize("name", NESTED)
def test_state_dicts_of_another_layout(name):
    """Nested, without "state" or "param_groups" on top: what the base loads, FusedSAM loads, its own beside it."""

    def new():
        model = make_model()
        base = NESTED[name](model.parameters())
        sam = FusedSAM(base, rho=0.3, interval=2, epsilon=1e-6)
        if hasattr(sam, "train"):
            sam.train()
        return model, sam

    torch.manual_seed(1)
    model, sam = new()
    train(model, sam, 3)
    sam.param_groups[0]["rho"] = 0.25
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": sam.state_dict()}, file)
    other, loaded = new()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    loaded.load_state_dict(saved["optimizer"])
    group = loaded.param_groups[0]
    assert (group["rho"], group["epsilon"], group["sam_step"]) == (0.25, 1e-6, 3)
    assert loaded.is_sam_step
    for m, s in ((model, sam), (other, loaded)):
        torch.manual_seed(2)  # Magma draws at random
        train(m, s, 4, start=3)
    assert same_bits(copies(model.parameters()), copies(other.parameters()))


# -- from other versions, and with other settings ----------------------------------------------------------------------


@pytest.mark.parametrize("missing", [["start"], ["direction"], ["steps"], ["start", "direction", "steps"]], ids=str)
@pytest.mark.parametrize("defaults", [[], ["perturb"], ["perturb", "adaptive"]], ids=str)
def test_pickles_from_before_an_option(missing, defaults):
    """They take the option's default, as those of torch.optim do."""
    model = make_model()
    sam = make(model, interval=2)
    train(model, sam, 3)
    state = sam.__getstate__()
    state["_settings"] = {key: value for key, value in state["_settings"].items() if key not in missing}
    state["defaults"] = {key: value for key, value in state["defaults"].items() if key not in defaults}
    for name in defaults:
        for group in sam.param_groups:
            del group[name]
    del state["_lost"]
    twin, state = pickle.loads(pickle.dumps((model, state)))
    old = FusedSAM.__new__(FusedSAM)
    old.__setstate__(state)
    assert (old.interval, old.start, old.direction, old.closure_passes) == (2, 0, "gradient", "auto")
    assert old._steps == 3
    train(twin, old, 3, start=3)
    assert all(group["perturb"] is True and group["adaptive"] is False for group in old.param_groups)
    fresh = make_model()
    expected = make(fresh, interval=2)
    train(fresh, expected, 6)
    assert same_bits(copies(twin.parameters()), copies(fresh.parameters()))


def test_a_checkpoint_of_other_settings_is_told_once(monkeypatch):
    """They are no part of a state dict: what was given here stays."""
    monkeypatch.setattr(notices, "told", set())
    saved = make(make_model(), direction="momentum", interval=3, start=5).state_dict()
    sam = make(make_model(), interval=3)
    with pytest.warns(
        UserWarning, match="was saved with start=5 .here 0., direction='momentum' .here 'gradient'."
    ) as told:
        sam.load_state_dict(saved_and_loaded(saved))
        sam.load_state_dict(saved)
    assert len(told) == 1
    assert (sam.direction, sam.start, sam.interval) == ("gradient", 0, 3)


@pytest.mark.parametrize("where", ["before", "partial"])
def test_a_plain_runs_distributed_checkpoint(where, tmp_path):
    """The two ways of docs/checkpoints.md; the direct one misses FusedSAM's keys, which a plain run does not have."""
    model = make_model()
    plain = torch.optim.AdamW(model.parameters(), **ADAMW)
    for i in range(3):
        plain.zero_grad()
        backward(model, i)
        plain.step()
    dcp.save({"optimizer": get_optimizer_state_dict(model, plain)}, checkpoint_id=tmp_path)

    other = make_model()
    other.load_state_dict(model.state_dict())
    base = torch.optim.AdamW(other.parameters(), **{**ADAMW, "lr": 1.0})
    if where == "before":
        state = {"optimizer": get_optimizer_state_dict(other, base)}
        dcp.load(state, checkpoint_id=tmp_path)
        set_optimizer_state_dict(other, base, state["optimizer"])
        sam = FusedSAM(base, rho=0.3)
    else:
        sam = FusedSAM(base, rho=0.3)
        state = {"optimizer": get_optimizer_state_dict(other, sam)}
        with pytest.raises(CheckpointException, match=r"Missing key .*\.param_groups\.0\."):
            dcp.load(state, checkpoint_id=tmp_path)
        dcp.load(state, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
        set_optimizer_state_dict(other, sam, state["optimizer"])
    assert same_bits(moments(sam, list(other.parameters())), moments(plain, list(model.parameters())))
    assert sam.param_groups[0]["lr"] == ADAMW["lr"]
    assert sam.rho == 0.3
    train(other, sam, 1, start=3)
    assert sam.param_groups[0]["sam_step"] == 1
