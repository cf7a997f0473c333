"""The demo: what it trains, measures, prints and draws."""

import copy
import math
import runpy
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn
from torch.nn.functional import cross_entropy

from fastsam.demo import __main__ as demo, training
from fastsam.demo.landscape import Costs, Panel, draw, filter_normalised_direction, loss_surface
from fastsam.demo.methods import CHOSEN, CONDITIONS, GRIDS, METHODS, tuned
from fastsam.demo.training import Method, accuracy, digits, network, sharpness, step_times, train, with_wrong_labels

SGD, SAM = Method(), Method(rho=0.2)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fp64_loss(model, images, labels, move=None):
    """The loss in fp64, of a copy whose parameters are moved by `move`: name -> difference."""
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, p in double.named_parameters():
            p += 0 if move is None else move[name].double()
    return double, cross_entropy(double(images.double()), labels)


def coloured(image):
    """The pixels that are neither white, grey nor black."""
    return np.ptp(image[..., :3], axis=-1) > 0.1


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_wrong_labels_are_exactly_that_share():
    labels = torch.arange(10).repeat(100)
    before = labels.clone()
    for share in (0.0, 0.4, 0.37, 1.0):
        noisy = with_wrong_labels(labels, share, torch.Generator().manual_seed(0))
        assert (noisy != labels).sum() == round(share * 1000)
        assert noisy.min() >= 0
        assert noisy.max() <= 9
    assert torch.equal(labels, before)


def test_wrong_labels_leave_the_split_and_the_test_labels_alone():
    true, noisy = digits(seed=1, noise=0.0), digits(seed=1, noise=0.4)
    assert torch.equal(true.images, noisy.images)
    assert torch.equal(true.test_images, noisy.test_images)
    assert torch.equal(true.test_labels, noisy.test_labels)
    assert (true.labels != noisy.labels).sum() == 400
    assert true.images.shape == (1000, 1, 8, 8)
    assert true.test_images.shape == (797, 1, 8, 8)
    assert (true.images.min(), true.images.max()) == (0, 1)


def test_every_method_starts_from_the_same_weights_and_sees_the_same_batches(monkeypatch):
    data = digits(seed=0, noise=0.4)
    seen = []

    def recording_step(method, model, optimizer, images, labels):
        seen.append((weights(model).clone(), images, labels))

    monkeypatch.setattr(training, "step", recording_step)
    runs = []
    for method in (SGD, SAM, Method(rho=1.0, interval=10)):
        train(method, data, epochs=2, seed=3)
        runs.append(seen.copy())
        seen.clear()
    assert len(runs[0]) == 2 * 16
    for run in runs[1:]:
        for theirs, ours in zip(runs[0], run, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert not torch.equal(runs[0][0][2], runs[0][16][2])  # another order in the second epoch
    assert not torch.equal(weights(network(3)), weights(network(4)))


@pytest.mark.parametrize("method", [*METHODS.values(), Method(rho=0.5, interval=3, part=0.5)], ids=str)
def test_training_twice_gives_the_same_bits(method):
    data = digits(seed=0, noise=0.4)
    first, second = (weights(train(method, data, epochs=1, seed=0, decay=True)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("name", "gradients"), [*zip(METHODS, [1, 1, 2, 1.2, 1.25, 1.3, 1.25, 1], strict=True)])
def test_gradients_in_twenty_steps(name, gradients):
    """In images, since a part of the batch counts as a part."""
    data, method = digits(seed=0, noise=0.0), METHODS[name]
    model = network(0)
    optimizer = method.optimizer(model, 20)
    images = []
    model.register_forward_hook(lambda _, args, __: images.append(len(args[0])))
    for _ in range(20):
        training.step(method, model, optimizer, data.images[:8], data.labels[:8])
    assert sum(images) == 20 * 8 * gradients == 20 * 8 * method.gradients


@pytest.mark.parametrize("name", METHODS)
def test_normalisation_layers_count_each_batch_once_and_whole(name):
    method, data = METHODS[name], digits(seed=0, noise=0.0)
    model = nn.Sequential(norm := nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
    optimizer = method.optimizer(model, 4)
    seen = []
    norm.register_forward_hook(lambda m, args, _: seen.append((m.track_running_stats, len(args[0]))))
    for _ in range(4):
        training.step(method, model, optimizer, data.images[:8], data.labels[:8])
    assert norm.num_batches_tracked == 4
    assert [n for counted, n in seen if counted] == [8] * 4


def test_the_learning_rate_decays_along_a_cosine(monkeypatch):
    rates = []

    def recording_step(method, model, optimizer, images, labels):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.base_optimizer.step()

    monkeypatch.setattr(training, "step", recording_step)
    for decay in (False, True):
        train(SAM, digits(seed=0, noise=0.0), 2, 0, decay)
    assert rates[:32] == [training.LR] * 32
    expected = [training.LR * (1 + math.cos(math.pi * k / 32)) / 2 for k in range(32)]
    assert rates[32:] == pytest.approx(expected)


def test_the_validation_split_is_of_the_training_part_alone():
    data = digits(seed=0, noise=0.4)
    inner = data.validation()
    assert torch.equal(torch.cat([inner.images, inner.test_images]), data.images)
    assert torch.equal(torch.cat([inner.labels, inner.test_labels]), data.labels)
    assert len(inner.labels) == 800


def test_what_was_chosen_is_in_the_grids_and_used():
    for name, values in CHOSEN.items():
        assert len(values) == len(CONDITIONS)
        assert set(values) <= set(GRIDS[name])
    for column, condition in enumerate(CONDITIONS):
        for name, method in tuned(CHOSEN, condition).items():
            value = method.weight_decay if method.rho is None else method.rho
            assert value == (CHOSEN[name][column] if name in CHOSEN else 0)
    assert tuned({"SAM": (0.1, 0.3)}, CONDITIONS[2])["SAM"].rho == 0.3  # of the last conditions


def test_sam_resists_wrong_labels():
    data = digits(seed=0, noise=0.4)
    sgd, sam = (train(method, data, 30, 0) for method in (SGD, SAM))
    sgd_accuracy, sam_accuracy = (accuracy(model, data.test_images, data.test_labels) for model in (sgd, sam))
    assert sam_accuracy > sgd_accuracy + 0.1
    sgd_sharpness, sam_sharpness = (sharpness(model, data.images, data.labels, rho=0.2) for model in (sgd, sam))
    assert sam_sharpness < 0.6 * sgd_sharpness


# -- what is measured --------------------------------------------------------------------------------------------------


def test_accuracy():
    data = digits(seed=0, noise=0.0)
    model = network(0)
    right = sum(
        int(model(image[None]).argmax()) == int(label)
        for image, label in zip(data.test_images[:50], data.test_labels[:50], strict=True)
    )
    assert accuracy(model, data.test_images[:50], data.test_labels[:50]) == right / 50


@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_sharpness_against_fp64(rho):
    data = digits(seed=0, noise=0.4)
    model = train(SGD, data, 1, 0)
    before = weights(model).clone()
    found = sharpness(model, data.images, data.labels, rho)
    assert torch.equal(weights(model), before)

    double, loss = fp64_loss(model, data.images, data.labels)
    g = torch.autograd.grad(loss, list(double.parameters()))
    norm = torch.sqrt(sum((one**2).sum() for one in g))
    e_w = {name: rho * one / norm for (name, _), one in zip(double.named_parameters(), g, strict=True)}
    _, climbed = fp64_loss(model, data.images, data.labels, e_w)
    assert found == pytest.approx((climbed - loss).item(), rel=1e-4, abs=2e-6)


def test_step_times_are_relative_to_the_first():
    sgd, sam, sparse = step_times([SGD, SAM, Method(1.0, 4, start=0.5)], rounds=3, data=digits(seed=0, noise=0.0))
    assert sgd.ratio == 1
    assert min(sgd.seconds, sam.seconds, sparse.seconds, sam.ratio, sparse.ratio) > 0


# -- the landscape -----------------------------------------------------------------------------------------------------


def test_directions_are_filter_normalised():
    model = network(0)
    direction = filter_normalised_direction(model, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    for name, w in model.named_parameters():
        d = direction[name].numpy().astype(np.float64)
        assert d.shape == w.shape
        if w.dim() == 1:
            assert not d.any()
            continue
        drawn = torch.randn(w.shape, generator=generator).numpy().astype(np.float64)
        for d_filter, w_filter, drawn_filter in zip(d, w.detach().numpy().astype(np.float64), drawn, strict=True):
            norm = np.sqrt((w_filter**2).sum())
            assert np.sqrt((d_filter**2).sum()) == pytest.approx(norm, rel=1e-6)
            np.testing.assert_allclose(d_filter, drawn_filter / np.sqrt((drawn_filter**2).sum()) * norm, rtol=1e-5)


def test_loss_surface_against_fp64():
    data = digits(seed=0, noise=0.4)
    images, labels = data.images[:100], data.labels[:100]
    model = train(SGD, data, 1, 0)
    before = weights(model).clone()
    offsets = torch.tensor([-0.5, 0.0, 1.0])
    surface = loss_surface(model, images, labels, offsets, seed=7)
    assert torch.equal(weights(model), before)

    generator = torch.Generator().manual_seed(7)
    d1, d2 = (filter_normalised_direction(model, generator) for _ in range(2))
    for row, b in enumerate(offsets.double()):
        for column, a in enumerate(offsets.double()):
            _, loss = fp64_loss(model, images, labels, {name: a * d1[name] + b * d2[name] for name in d1})
            assert surface[row, column].item() == pytest.approx(loss.item(), rel=1e-5)


def test_draw_uses_one_scale(tmp_path):
    offsets = torch.linspace(-1, 1, 5)
    bowl = offsets[:, None] ** 2 + offsets**2
    path = tmp_path / "picture"  # a PNG under any name
    costs = Costs(["only"], [1.0], [(90.0, 1.0)], [(91.0, 0.0)])
    draw([Panel("steep", "", bowl), Panel("flat", "", 0.05 * bowl)], offsets, costs, "heading", "height", path)
    image = imread(path, format="png")
    width = image.shape[1]
    steep, flat = image[:, : width * 30 // 100], image[:, width * 31 // 100 : width * 60 // 100]  # the bar is beyond
    green, blue = 1, 2
    bright = [(coloured(part) & (part[..., green] > part[..., blue] + 0.1)).any() for part in (steep, flat)]
    assert bright == [True, False]  # the top of the scale, green to yellow, is only where the heights are


# -- the command -------------------------------------------------------------------------------------------------------


def test_command_prints_the_tables_and_writes_the_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "QUICK", demo.Size(seeds=2, epochs=1, timing_rounds=1, surface_points=5))
    monkeypatch.setattr(training, "TRAINING_IMAGES", 200)
    path = tmp_path / "demo.png"
    demo.main(["--quick", "--output", str(path)])
    printed = capsys.readouterr().out
    for name, method in METHODS.items():
        lines = [line.removeprefix(f" {name}") for line in printed.splitlines() if line.startswith(f" {name}  ")]
        first, second, chosen = (line.split() for line in lines)
        values = [float(v) for v in first if v != "±"]
        assert len(values) == 6  # mean and standard error of three columns
        assert min(values) >= 0
        gradients, milliseconds, ratio, sharp = map(float, second)
        assert gradients == pytest.approx(method.gradients)
        assert min(milliseconds, ratio) > 0
        assert np.isfinite(sharp)
        assert tuple(map(float, chosen)) == CHOSEN.get(name, (0, 0, 0))
    assert "validation split" in printed
    assert str(path) in printed.replace("\n", "")

    image = imread(path)
    height, width, _ = image.shape
    assert (1000 < width < 3000, 400 < height < 2000) == (True, True)
    for third in (image[:, : width // 3], image[:, width // 3 : 2 * width // 3]):
        assert coloured(third).mean() > 0.02
    assert coloured(image[:, 3 * width // 4 :]).any()


def test_one_seed_has_no_error():
    def results(*accuracies):
        return {(CONDITIONS[0], "SAM"): [demo.Trained(None, accuracy, 0.0) for accuracy in accuracies]}

    assert demo.summary(results(0.9), CONDITIONS[0], "SAM") == (90, 0)
    assert demo.summary(results(0.1, 0.2, 0.3), CONDITIONS[0], "SAM") == pytest.approx((20, 10 / 3**0.5))


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--quick", "--seeds", "--epochs", "--output"):
        assert option in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds is 0"),
        (["--epochs", "-1"], "--epochs is -1"),
        (["--output", "no/such/folder/picture.png"], "no folder"),
    ],
)
def test_options_are_checked_before_anything_runs(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("module", "package"), [("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")])
def test_a_missing_package_is_named(module, package, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fastsam.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("fastsam.demo", alter_sys=True)
    command = "pip install matplotlib rich scikit-learn"
    assert stop.value.code == f"the demo needs {package}, which is not installed: {command}"  # printed, status 1
