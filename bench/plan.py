"""What a run measures: every case in its base setting, and the representative ones in each variant of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from bench.cases import Case
from bench.contestants import CONTESTANTS, FASTSAM
from bench.inputs import Setting, set_gradients

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMS = {"plain": False, "adaptive": True}
REPRESENTATIVE = ("161x64", "densenet121", "resnet50", "mixer-b16")
SLOW_START = "compile"
"""A contestant that takes a minute to get ready: only in the representative cases' base setting, unless asked for."""
QUICK_CASES = ("161x64", "resnet18", "size-1e5", "size-1e6")


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line; None where nothing was."""

    dtype: Sequence[str] | None = None
    form: Sequence[str] | None = None
    threads: Sequence[int] | None = None


def settings(
    case: Case, options: Options, device: torch.device, max_threads: int, representative: bool = True
) -> list[Setting]:
    """The settings in which `case` is measured, the base setting first; variants only where `representative`."""
    base = ("float32", "plain", max_threads)
    if options != Options():
        chosen = list(product(options.dtype or base[:1], options.form or base[1:2], options.threads or base[2:]))
    else:
        chosen = [base]
        if representative and case.name in REPRESENTATIVE:
            chosen += [("bfloat16", "plain", max_threads), ("float32", "adaptive", max_threads)]
            chosen += [("float32", "plain", 1)] if device.type == "cpu" and max_threads > 1 else []
    return [Setting(DTYPES[dtype], FORMS[form], threads, device) for dtype, form, threads in chosen]


def contestants(case: Case, setting: Setting, usable: Sequence[str], asked: bool, max_threads: int) -> list[str]:
    """Those of `usable` that are measured on `case`; all of them where they were asked for by name."""
    base = Setting(torch.float32, False, max_threads, setting.device)
    slow_too = asked or (case.name in REPRESENTATIVE and setting == base)
    return [name for name in usable if slow_too or name != SLOW_START]


def unusable(names: Sequence[str], device: torch.device) -> dict[str, str]:
    """Those of fastsam's backends among `names` that do not serve `device`, with the reason."""
    found = {}
    for name in names:
        if not name.startswith(FASTSAM):
            continue
        try:
            params = [torch.nn.Parameter(torch.ones(1, device=device))]
            contestant = CONTESTANTS[name](params, 0.05, False)
            set_gradients(params, [torch.ones(1, device=device)])
            contestant.run()
        except ValueError as error:
            found[name] = str(error).splitlines()[0]
    return found
