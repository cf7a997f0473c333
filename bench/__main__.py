"""`python -m bench`: the command line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console  # pip install rich matplotlib pytorch_optimizer

from bench import driver, plan, results
from bench.cases import all_cases, select
from bench.contestants import CONTESTANTS
from bench.small_models import MODELS

EXAMPLES = """\
examples:
  python -m bench                                       everything, on the CPU and on a GPU where there is one
  python -m bench --quick                               a few small cases, under a minute; kept in a file of its own
  python -m bench --cases resnet50 'size-*'             some cases
  python -m bench --contestants 'fastsam-*' foreach-item --dtype bfloat16 --threads 1 2
  python -m bench --suite training                      whole training steps
  python -m bench plot                                  plots of all results in bench/results

Results: one row a measurement in bench/results/<device>.json and a table beside it. A row that is measured again
takes the place of the older one; Ctrl-C keeps what was measured. Contestants take turns in one process and are
checked against an fp64 oracle first. The floor is what a fused step must move (28 bytes a parameter in fp32, 32 in the
adaptive form) at the bandwidth of a plain copy in the same run; on a GPU, of the fastest copy of four.
"""
QUICK_SECONDS = 1.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="What a SAM step costs on this machine, against what, and how far from the hardware's limit.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("action", nargs="?", choices=["run", "plot"], default="run", help="measure (default), or plot what is measured")
    add("--suite", nargs="+", choices=["step", "training"], default=["step", "training"], help="default: both")
    cases = ", ".join([*all_cases(), *MODELS])
    add("--cases", nargs="+", metavar="CASE", help=f"names or patterns; the last {len(MODELS)} are training: {cases}")
    add(
        "--contestants",
        nargs="+",
        metavar="NAME",
        help=f"of the step suite, names or patterns: {', '.join(CONTESTANTS)}",
    )
    add("--dtype", nargs="+", choices=list(plan.DTYPES), help="default: float32, and bfloat16 in representative cases")
    add("--form", nargs="+", choices=list(plan.FORMS), help="default: plain, and adaptive in representative cases")
    add(
        "--threads",
        nargs="+",
        type=positive,
        metavar="N",
        help="on CPU; default: all cores, and 1 in representative cases",
    )
    add("--device", nargs="+", choices=["cpu", "cuda"], help="default: cpu, and cuda where there is one")
    add("--seconds", type=float, default=3.0, help="for each measurement; at least 5 rounds are taken (default: 3)")
    add("--quick", action="store_true", help="small cases only, under a minute")
    add("files", nargs="*", type=Path, help="for plot: results files (default: all in bench/results)")
    add("--output", type=Path, help="results file, or for plot the folder; default: in bench/results")
    options = parser.parse_args(arguments)
    try:
        known = [*all_cases(), *MODELS]
        options.cases = select(options.cases, known, "case") if options.cases else None
        options.asked = bool(options.contestants)
        options.contestants = select(options.contestants or ["*"], list(CONTESTANTS), "contestant")
    except ValueError as error:
        parser.error(str(error))
    if options.quick:
        options.seconds = QUICK_SECONDS
        options.cases = options.cases or [*plan.QUICK_CASES, "digits-cnn"]
        options.contestants = [name for name in options.contestants if options.asked or name != plan.SLOW_START]
    if options.device is None:
        options.device = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    elif "cuda" in options.device and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return options


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but got {number}")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(soft_wrap=True)
    if options.action == "plot":
        from bench.plots import plot_all

        for path in plot_all(options.files or sorted(results.RESULTS.glob("*.json")), options.output):
            console.print(f"wrote {path}")
        return 0
    status = 0
    for name in options.device:
        status = max(status, driver.run(torch.device(name), options, console))
        if status == driver.INTERRUPTED:
            break
    return status


if __name__ == "__main__":
    sys.exit(main())
