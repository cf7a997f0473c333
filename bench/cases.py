"""The cases: parameter lists of real models, and sweeps over total size and over the number of tensors."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"
MODELS = (
    "densenet121",
    "resnet18",
    "resnet50",
    "wideresnet28-10",
    "mixer-b16",
    "vit-b16",
    "bert-base",
    "gpt2",
    "gpt2-medium",
    "llama-1b",
)
SIZES = tuple(range(4, 10))
COUNTS = (1, 10, 100, 1000, 10000)
SWEEP_TENSORS = 100
COUNT_NUMEL = 10**7


@dataclass(frozen=True)
class Case:
    """One list of parameters.

    Attributes:
        name: as on the command line.
        title: as in tables and plots.
        kind: "model", "size", "count" or "small".
        shapes: one a parameter.
    """

    name: str
    title: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))


def even_split(numel: int, count: int) -> tuple[tuple[int, ...], ...]:
    """`numel` elements in `count` tensors, as even as it gets."""
    small, extra = divmod(numel, count)
    return tuple((small + (i < extra),) for i in range(count))


def load_model(name: str) -> Case:
    model = json.loads((DATA / f"{name}.json").read_text())
    shapes = tuple(tuple(shape) for _, shape in model["parameters"])
    return Case(name, model["title"], "model", shapes)


@cache
def all_cases() -> dict[str, Case]:
    cases = [Case("161x64", "161 tensors of 64", "small", ((64,),) * 161)]
    cases += [load_model(name) for name in MODELS]
    cases += [Case(f"size-1e{k}", f"1e{k} in 100 tensors", "size", even_split(10**k, SWEEP_TENSORS)) for k in SIZES]
    cases += [Case(f"count-{n}", f"1e7 in {n} tensors", "count", even_split(COUNT_NUMEL, n)) for n in COUNTS]
    return {case.name: case for case in cases}


def select(patterns: Sequence[str], names: Sequence[str], what: str) -> list[str]:
    """Those of `names` that any of `patterns` (shell style) matches, in the order of `names`.

    Raises:
        ValueError: a pattern matches nothing; the message lists what there is.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no {what} is called {pattern!r}; there are: {', '.join(names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
