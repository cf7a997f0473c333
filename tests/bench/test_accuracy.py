"""bench.accuracy: what is tuned and measured, and the table; the training itself is the demo's."""

import json

import pytest
import torch

from bench import accuracy
from fastsam.demo.methods import CHOSEN, CONDITIONS, GRIDS, METHODS
from fastsam.demo.training import Method, digits, split


@pytest.fixture
def by_rule(monkeypatch):
    """In the place of trainings: the middle of every grid is the best, and test images are harder."""

    def run_all(jobs, what):
        found = []
        for _, _, method, seed, validate in jobs:
            title = [t for t, m in METHODS.items() if m.tuned(1.0) == method.tuned(1.0)][-1]
            value = method.weight_decay if method.rho is None else method.rho
            distance = abs(value - GRIDS[title][2]) if title in GRIDS else 0
            found.append(0.9 - distance / 10 - (not validate) * 0.1 + seed % 2 / 100)
        return found

    monkeypatch.setattr(accuracy, "run_all", run_all)


def test_tuning_takes_the_best_of_every_grid(by_rule, capsys):
    for name, conditions in accuracy.WHERE.items():
        chosen = accuracy.tune(name)
        assert chosen == {method: (grid[2],) * len(conditions) for method, grid in GRIDS.items()}


def test_tuning_and_measuring_share_no_seed():
    for name, seeds in accuracy.SEEDS.items():
        assert not set(accuracy.TUNING_SEEDS[name]) & set(range(seeds))


def test_the_results_and_their_table(by_rule, tmp_path, capsys):
    accuracy.main(["--data", "digits", "--seeds", "4", "--folder", str(tmp_path)])
    report = json.loads((tmp_path / "accuracy.json").read_text())
    assert len(report["rows"]) == len(METHODS) * len(CONDITIONS)
    assert all(len(row["accuracies"]) == 4 for row in report["rows"])
    text = (tmp_path / "accuracy.md").read_text()
    for name, method in METHODS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert f"| {method.gradients:g} |" in line
        for value in CHOSEN.get(name, ()):
            assert f"({value:g})" in line


def test_a_training_of_each_kind():
    for validate in (False, True):
        found = accuracy.run((digits, CONDITIONS[1], Method(0.2), 0, validate))
        assert 0.5 < found < 1


def test_the_second_network_learns():
    """On the digits, enlarged: the second data set is not a test dependency."""
    small = digits(seed=0, noise=0.0)
    images = torch.cat([small.images, small.test_images])
    large = torch.nn.functional.interpolate(images, size=(28, 28))
    data = split(large, torch.cat([small.labels, small.test_labels]), 0, 0.0, accuracy.normalised_network)
    model = accuracy.train(METHODS["SAM"], data, 2, 0)
    assert not model.training
    assert accuracy.accuracy(model, data.test_images, data.test_labels) > 0.5
