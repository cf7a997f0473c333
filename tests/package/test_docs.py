"""README and the pages under docs/: every block of Python runs by itself, as a reader would paste it.

The names that a page leaves to its reader (model, loss_fn, data, sam, ...) are small stand-ins, new for each block.
"""

import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastsam
from fastsam import FusedSAM
from fastsam.distributed import local

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
WIDEST = 90
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    """The blocks of Python, each behind as many empty lines as are above it, for tracebacks."""
    text = page.read_text()
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in BLOCK.finditer(text)]


def names(path: Path) -> dict[str, Any]:
    """What the pages use without saying where it comes from."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    data = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(4)]
    x, y = data[0]
    return {
        "__name__": "page",
        "batches": [data[:2], data[2:]],
        "data": data,
        "loss_fn": nn.CrossEntropyLoss(),
        "model": model,
        "loader": torch.utils.data.DataLoader(data, batch_size=None),
        "forget": data,
        "path": path / "checkpoint.pt",
        "sam": FusedSAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1),
        "step": 0,
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
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        space = names(tmp_path)
        exec(compile(block, str(page), "exec"), space)
        assert all(bool(local(p).isfinite().all()) for p in space["model"].parameters())
        assert not space["sam"].perturbed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_fits_the_column(page: Path) -> None:
    """At 1280 pixels a built page shows WIDEST characters of a block; what is wider is cut off."""
    for block in re.findall(r"^ *```.*?^ *```$", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            assert len(line) <= WIDEST, f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_local_files_and_links_exist(page: Path) -> None:
    """Whatever a page names of this tree is there. (mkdocs looks at the links between pages, not README.)"""
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text)
    named = re.findall(r"`((?:examples|csrc|tests|bench|docs)/[\w./-]*)`", text)
    for path in [page.parent / link for link in links] + [ROOT / name for name in named]:
        assert path.exists(), f"{page.name}: {os.path.relpath(path, ROOT)}"


OTHER_PROJECT = re.compile(r"(?m)(?<!un)install\b[^\n`]*[\s'\"]fastsam(?=[\s'\"\[=~]|$)|\bfastsam\[[a-z]")


def test_no_text_has_the_other_project_called_fastsam_installed() -> None:
    """The distribution is fused-sam: whoever installs fastsam gets the code of strangers."""
    for wrong in ("pip install fastsam", "pip install -U 'fastsam'", "pip install x fastsam==1", "fastsam[demo]"):
        assert OTHER_PROJECT.search(wrong), wrong
    suffixes = {".py", ".md", ".toml", ".yml", ".yaml", ".cff", ".cpp", ".h", ".cu", ".cuh", ""}
    folders = ["bench", "csrc", "docs", "examples", "fastsam", "tests"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    for path in [*ROOT.glob("*"), *files]:
        if path.is_file() and path.suffix in suffixes and path != Path(__file__):
            found = OTHER_PROJECT.search(path.read_text())
            assert found is None, f"{path.relative_to(ROOT)}: {found[0]}"


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    for name in set(fastsam.__all__) - {"__version__"}:
        assert f"::: fastsam.{name}\n" in text + "\n", name
