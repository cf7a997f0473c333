"""Running statistics of normalisation layers: frozen for one pass, and as they were afterwards."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import fastsam
from fastsam import FusedSAM, notices


class OwnNorm(_NormBase):
    """A normalisation layer of somebody's own, with a layer of the kind inside."""

    def __init__(self, features):
        super().__init__(features)
        self.inner = nn.BatchNorm1d(features)

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        momentum = self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked += 1
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        x = nn.functional.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training,
            momentum,
            self.eps,
        )
        return self.inner(x)


LAYERS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (8, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (2, 3, 2, 2, 2)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), (8, 3)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, track_running_stats=True), (4, 3, 5, 5)),
    "momentum None": (lambda: nn.BatchNorm1d(3, momentum=None), (8, 3)),
    "no affine": (lambda: nn.BatchNorm1d(3, affine=False), (8, 3)),
    "own subclass": (lambda: OwnNorm(3), (8, 3)),
    "lazy": (lambda: nn.LazyBatchNorm1d(), (8, 3)),
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


def make(layer):
    torch.manual_seed(0)
    construct, shape = LAYERS[layer]
    model = nn.Sequential(construct())
    batches = [torch.randn(shape) * (i + 1) + i for i in range(4)]
    model(batches[0])
    return model, batches


def buffers(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def settings(model):
    return [(m.momentum, m.track_running_stats) for m in model.modules() if isinstance(m, _NormBase)]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@each_layer
def test_frozen_layers_normalise_by_the_batch_and_keep_their_statistics(layer):
    model, batches = make(layer)
    twin = copy.deepcopy(model)
    before, settings_before = buffers(model), settings(model)
    with fastsam.frozen_running_stats(model):
        output = model(batches[1])
    assert_same(buffers(model), before)
    assert settings(model) == settings_before
    assert torch.equal(output, twin(batches[1]))
    # Thawed, the next batch counts as if the frozen one had not been.
    untouched, _ = make(layer)
    model(batches[2])
    untouched(batches[2])
    assert_same(buffers(model), buffers(untouched))
    changed = [name for name, b in buffers(model).items() if not torch.equal(b, before[name])]
    assert changed


@each_layer
def test_evaluation_uses_the_statistics_while_frozen(layer):
    model, batches = make(layer)
    model.eval()
    expected = model(batches[1])
    with fastsam.frozen_running_stats(model):
        assert torch.equal(model(batches[1]), expected)


@each_layer
def test_repeated_and_nested_use(layer):
    model, batches = make(layer)
    before, settings_before = buffers(model), settings(model)
    fastsam.disable_running_stats(model)
    fastsam.disable_running_stats(model)
    with fastsam.frozen_running_stats(model):
        with fastsam.frozen_running_stats(model):
            model(batches[1])
        model(batches[1])
    model(batches[1])  # what the blocks did not freeze they do not thaw
    assert_same(buffers(model), before)
    fastsam.enable_running_stats(model)
    assert settings(model) == settings_before
    fastsam.enable_running_stats(model)
    assert settings(model) == settings_before
    model(batches[1])
    assert any(not torch.equal(b, before[name]) for name, b in buffers(model).items())


def test_a_part_that_was_frozen_before_stays_frozen():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    fastsam.disable_running_stats(model[0])
    with fastsam.frozen_running_stats(model):
        pass
    model(torch.randn(5, 3))
    assert int(model[0].num_batches_tracked) == 0
    assert int(model[1].num_batches_tracked) == 1
    own = OwnNorm(3)
    fastsam.disable_running_stats(own.inner)
    with fastsam.frozen_running_stats(own):
        pass
    own(torch.randn(5, 3))
    assert int(own.inner.num_batches_tracked) == 0
    assert int(own.num_batches_tracked) == 1


def test_thaws_after_an_exception():
    model, _ = make("BatchNorm1d")
    with pytest.raises(ZeroDivisionError), fastsam.frozen_running_stats(model):
        raise ZeroDivisionError
    assert settings(model) == [(0.1, True)]


def test_layers_without_statistics_stay_without():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3), nn.LayerNorm(3))
    x = torch.randn(4, 3, 3)
    expected = model(x)
    with fastsam.frozen_running_stats(model):
        assert torch.equal(model(x), expected)
    assert settings(model) == [(0.1, False), (0.1, False)]
    model.eval()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_a_frozen_model_can_be_thawed(copied):
    model, batches = make("BatchNorm1d")
    fastsam.disable_running_stats(model)
    twin = copied(model)
    fastsam.enable_running_stats(twin)
    before = buffers(twin)
    twin(batches[1])
    assert int(twin[0].num_batches_tracked) == int(before["0.num_batches_tracked"]) + 1
    model(batches[1])
    assert_same(buffers(model), before)


def test_state_dicts_do_not_show_it():
    model, _ = make("BatchNorm1d")
    plain = model.state_dict()
    with fastsam.frozen_running_stats(model):
        frozen = model.state_dict()
        model.load_state_dict(frozen)
    assert plain.keys() == frozen.keys()
    assert settings(model) == [(0.1, True)]


@pytest.mark.parametrize("form", ["two calls", "closure"])
def test_a_sam_step_counts_each_batch_once(form):
    """The statistics after a step are those of one plain forward."""
    model, batches = make("BatchNorm2d")
    twin = copy.deepcopy(model)
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)

    def closure():
        sam.zero_grad()
        if sam.perturbed:
            with fastsam.frozen_running_stats(model):
                loss = model(batches[1]).pow(3).mean()
        else:
            loss = model(batches[1]).pow(3).mean()
        loss.backward()
        return loss

    if form == "closure":
        sam.step(closure)
    else:
        closure()
        sam.first_step()
        closure()
        sam.second_step()
    twin(batches[1])
    assert_same(buffers(model), buffers(twin))


def test_a_scripted_layer_says_that_it_cannot_be_frozen(monkeypatch):
    """Once; the layers beside it are frozen."""
    monkeypatch.setattr(notices, "told", set())
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model = nn.Sequential(scripted, nn.BatchNorm1d(4))
    before = model[1].running_mean.clone()
    x = torch.randn(8, 4) + 3
    with pytest.warns(UserWarning, match="BatchNorm1d in a scripted model can't be frozen") as caught:
        for _ in range(2):
            with fastsam.frozen_running_stats(model):
                model(x)
    assert len(caught) == 1
    assert torch.equal(model[1].running_mean, before)


def test_scripted_layers_without_statistics_are_none_of_its_business(monkeypatch):
    monkeypatch.setattr(notices, "told", set())
    layers = [nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False)]
    scripted = torch.jit.script(nn.Sequential(*layers))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fastsam.frozen_running_stats(scripted):
            pass
