"""README and the pages under docs/: every block of Python runs, in order, as a reader would paste it.

The names that a page leaves to its reader (model, loss_fn, data, ...) are small stand-ins, made anew for each section.
"""

import contextlib
import importlib
import itertools
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastsam
from fastsam import FusedSAM
from fastsam.distributed import local

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def sections(page: Path) -> list[list[str]]:
    """The Python of each section, each block behind as many empty lines as are above it, for tracebacks."""
    text = page.read_text()
    starts = [0, *(match.start() for match in re.finditer(r"^## ", text, flags=re.MULTILINE)), len(text)]
    found = [
        ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in BLOCK.finditer(text, *bounds)]
        for bounds in itertools.pairwise(starts)
    ]
    return [blocks for blocks in found if blocks]


def names(path: Path) -> dict[str, Any]:
    """What the pages use without saying where it comes from."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    data = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(4)]
    x, y = data[0]
    return {
        "__name__": "page",
        "DistributedDataParallel": DistributedDataParallel,
        "FusedSAM": FusedSAM,
        "batches": [data[:2], data[2:]],
        "data": data,
        "fastsam": fastsam,
        "loss_fn": nn.CrossEntropyLoss(),
        "model": model,
        "loader": torch.utils.data.DataLoader(data, batch_size=None),
        "nullcontext": contextlib.nullcontext,
        "forget": data,
        "path": path / "checkpoint.pt",
        "sam": FusedSAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1),
        "step": 0,
        "torch": torch,
        "x": x,
        "y": y,
    }


@pytest.fixture
def process_group(tmp_path: Path) -> Generator[None, None, None]:
    """One process of gloo's, for the pages on many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("page", [page for page in PAGES if sections(page)], ids=lambda page: page.stem)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for blocks in sections(page):
        space = names(tmp_path)
        if page.stem == "frameworks":
            lightning = importlib.import_module("lightning")
            space |= {"LightningModule": lightning.LightningModule, "Trainer": lightning.Trainer}
        for block in blocks:
            exec(compile(block, str(page), "exec"), space)
        assert all(bool(local(p).isfinite().all()) for p in space["model"].parameters())
        assert not space["sam"].perturbed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_local_files_and_links_exist(page: Path) -> None:
    """Whatever a page names of this tree is there. (mkdocs looks at the links between pages, not README.)"""
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text)
    named = re.findall(r"`((?:examples|csrc|tests|bench|docs)/[\w./-]*)`", text)
    for path in [page.parent / link for link in links] + [ROOT / name for name in named]:
        assert path.exists(), f"{page.name}: {os.path.relpath(path, ROOT)}"


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    for name in set(fastsam.__all__) - {"__version__"}:
        assert f"::: fastsam.{name}\n" in text + "\n", name
