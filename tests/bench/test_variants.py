"""bench.variants: each method does what its name says, and the search takes the best value to the test set."""

import json

import pytest
import torch
from torch import nn

from bench import variants
from fastsam.demo.training import step

IMAGES, LABELS = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8)


def training(method, steps):
    model = variants.normalised_small_network(0)
    return model, method.optimizer(model, steps)


def test_rho_ramps():
    model, sam = training(variants.Ramped(0.4, ramp=0.5), 8)
    seen = []
    for _ in range(8):
        step(variants.Ramped(0.4), model, sam, IMAGES, LABELS)
        seen.append(sam.rho)
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4])


def test_only_normalisation_layers_are_perturbed():
    method = variants.OnNormalisation(0.5)
    model, sam = training(method, 1)
    before = [p.detach().clone() for p in model.parameters()]
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    with sam:
        sam.first_step()
        moved = [not torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True)]
        distance = sum(((p - w) ** 2).sum() for p, w in zip(model.parameters(), before, strict=True)) ** 0.5
    of_normalisation = [isinstance(layer, nn.BatchNorm2d) for layer in model for _ in layer.parameters()]
    assert moved == of_normalisation
    assert float(distance.detach()) == pytest.approx(0.5, rel=1e-5)


def test_along_the_step_before():
    """One gradient a step, in which BatchNorm sees the batch."""
    method = variants.StepBefore(0.5)
    model, sam = training(method, 4)
    perturbed = []
    model[0].register_forward_pre_hook(lambda *_: perturbed.append(sam.perturbed))
    for _ in range(3):
        step(method, model, sam, IMAGES, LABELS)
    assert perturbed == [False, True, True]
    assert method.gradients == 1
    assert int(model[1].num_batches_tracked) == 3


def test_the_search_and_its_tables(monkeypatch, tmp_path, capsys):
    """In the place of trainings: the second value of every grid is the best, and test images are harder."""

    def run_all(jobs, what):
        found = []
        for load, _, method, seed, validate in jobs:
            (grid,) = [
                s.grid
                for s in variants.SEARCHES
                if (variants.DATA[s.data], s.method.tuned(0)) == (load, method.tuned(0))
            ]
            found.append(0.5 + 0.2 * (method.rho == grid[1]) - 0.1 * (not validate) + seed % 2 / 100)
        return found

    monkeypatch.setattr(variants, "run_all", run_all)
    variants.main(["--seeds", "4", "--folder", str(tmp_path)])
    rows = json.loads((tmp_path / "variants.json").read_text())["rows"]
    assert len(rows) == 2 * len(variants.SEARCHES)
    text = (tmp_path / "variants.md").read_text()
    for row in rows:
        (search,) = [s for s in variants.SEARCHES if (s.data, s.title) == (row["data"], row["method"])]
        assert row["rho"] == search.grid[1]
        assert len(row["accuracies"]) == 4
        means = ", ".join(f"{rho:g}: {70.5 if rho == search.grid[1] else 50.5}" for rho in search.grid)
        line = f"| {search.title} | {search.method.gradients:g} | {means} | {search.grid[1]:g} | 60.5 ± 0.3 | 4 |"
        assert text.count(line) == 2 * sum((s.title, s.grid) == (search.title, search.grid) for s in variants.SEARCHES)


def test_searching_and_testing_share_no_seed():
    assert not set(variants.TUNING_SEEDS) & set(range(variants.SEEDS))
