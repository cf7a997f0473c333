"""norm + perturb + restore, by everybody, on one list of parameters."""

from collections.abc import Callable, Sequence

import torch

from bench.cases import Case
from bench.contestants import CONTESTANTS, FASTSAM, FLOOR_PASSES, Contestant, Copy, yardsticks
from bench.inputs import GRADIENT_SETS, Inputs, Setting, Turn, check
from bench.measures import available_memory, count_launches, extra_memory, peak_bandwidth
from bench.results import Row
from bench.timing import Samples, interleave, median_ratio, quartiles

COPY = "copy"
MEMORY_SHARE = 0.9
WRONG = "wrong results"


def memory_needed(case: Case, setting: Setting, kinds: Sequence[type[Contestant]]) -> int:
    """Bytes for the weights, the gradients, the yardsticks, and what the contestants hold and allocate."""
    lists = (
        1
        + GRADIENT_SETS
        + sum(kind.held for kind in yardsticks(setting.device).values())
        + sum(kind.held for kind in kinds)
    )
    # The check holds the saved weights besides.
    temporary = 1 + max(kind.temporary for kind in kinds)
    return case.numel * setting.dtype.itemsize * (lists + temporary)


def no_room(case: Case, setting: Setting, names: Sequence[str]) -> str | None:
    """Why `case` cannot be measured here with the contestants `names`; None where it can."""
    needed = memory_needed(case, setting, [CONTESTANTS[name] for name in names])
    available = available_memory(setting.device)
    if needed <= MEMORY_SHARE * available:
        return None
    return f"with these contestants it needs {needed / 1e9:.1f} GB of memory; {available / 1e9:.1f} GB are free"


def enter(kind: type[Contestant], inputs: Inputs, setting: Setting) -> tuple[Contestant, Row]:
    """Builds a contestant and checks it; also what it allocates at the most and launches in a step."""
    params = inputs.parameters(kind)
    contestant: Contestant | None = None

    def two_steps() -> None:
        nonlocal contestant
        contestant = kind(params, inputs.rho, setting.adaptive)
        turn = Turn(contestant, inputs.gradients)
        for _ in range(2):
            turn.prepare()
            turn.run()

    extra = extra_memory(two_steps, setting.device)
    assert contestant is not None
    check(contestant, inputs.gradients[0], inputs.scales[0])
    found: Row = {"extra_bytes": extra}
    if setting.device.type == "cuda":
        turn = Turn(contestant, inputs.gradients, first=1)
        turn.prepare()  # other addresses than the check's, as in every step that is timed
        if (launches := count_launches(turn.run)) > 0:  # a step has some: else the profiler saw nothing
            found["launches"] = launches
    return contestant, found


def measure(
    case: Case,
    setting: Setting,
    names: Sequence[str],
    *,
    seconds: float,
    on_turn: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Checks the contestants `names` on `case`, then times them in turn.

    Returns:
        A row for each. One that could not be measured says why under "left_out".
    """
    reason = no_room(case, setting, names)
    if reason is not None:
        return [describe(case, setting, name) | {"left_out": reason} for name in names]
    if setting.device.type == "cpu":
        torch.set_num_threads(setting.threads)
    inputs = Inputs(case, setting)
    turns: dict[str, Turn] = {}
    found: dict[str, Row] = {}
    for name in names:
        on_turn(f"checking {name}")
        try:
            contestant, found[name] = enter(CONTESTANTS[name], inputs, setting)
        except ArithmeticError as error:
            found[name] = {"left_out": f"{WRONG}: {error}"}
        except Exception as error:
            found[name] = {"left_out": f"{type(error).__name__}: {error}".splitlines()[0]}
        else:
            turns[name] = Turn(contestant, inputs.gradients, first=len(turns))
    kinds = yardsticks(setting.device)
    measured: dict[str, Copy] = {}
    for name, kind in kinds.items():
        try:
            measured[name] = kind(case.numel, setting.dtype, setting.device)
        except (OSError, RuntimeError, ImportError) as error:  # a machine without a compiler
            found[name] = {"left_out": f"{type(error).__name__}: {error}".splitlines()[0]}
    samples = interleave({**measured, **turns}, setting.device, seconds=seconds, on_turn=on_turn)
    for name in samples:
        found.setdefault(name, {}).update(figures(case, setting, name, samples))
        if name in measured and (way := measured[name].way) is not None:
            found[name]["way"] = way
    return [describe(case, setting, name) | found[name] for name in found]


def describe(case: Case, setting: Setting, name: str) -> Row:
    """What was measured; `key` tells it from every other measurement on this device."""
    dtype = str(setting.dtype).removeprefix("torch.")
    form = "adaptive" if setting.adaptive else "plain"
    threads = setting.threads if setting.device.type == "cpu" else 0
    return {
        "key": "/".join(["step", case.name, dtype, form, f"threads{threads}", name]),
        "suite": "step",
        "case": case.name,
        "title": case.title,
        "kind": case.kind,
        "tensors": len(case.shapes),
        "numel": case.numel,
        "dtype": dtype,
        "adaptive": setting.adaptive,
        "threads": threads,
        "contestant": name,
    }


def describe_times(samples: Samples) -> Row:
    """Quartiles in microseconds, [first, median, third]."""
    found: Row = {"rounds": len(samples.wall), "wall_us": microseconds(samples.wall)}
    if samples.device:
        found["device_us"] = microseconds(samples.device)
        found["host_us"] = microseconds(samples.host)
    return found


def microseconds(seconds: Sequence[float]) -> list[float]:
    return [round(value * 1e6, 2) for value in quartiles(seconds)]


def figures(case: Case, setting: Setting, name: str, samples: dict[str, Samples]) -> Row:
    """Times of contestant `name` and what follows from them. Ratios are taken within a round, then their median."""
    own, copy = samples[name].best, samples[COPY].best
    kinds = yardsticks(setting.device)
    floor = COPY if setting.device.type == "cpu" else min(kinds, key=lambda kind: quartiles(samples[kind].best)[1])
    row = describe_times(samples[name])
    passes = (kinds | CONTESTANTS)[name].passes
    if passes is not None:
        moved = passes[setting.adaptive] * case.numel * setting.dtype.itemsize
        row["bytes"] = moved
        row["gb_per_s"] = round(moved / quartiles(own)[1] / 1e9, 3)
        row["share_of_copy_bandwidth"] = round(passes[setting.adaptive] / Copy.passes[0] * median_ratio(copy, own), 4)
        if (peak := peak_bandwidth(setting.device)) is not None:
            row["share_of_peak"] = round(moved / quartiles(own)[1] / peak, 4)
    if name in kinds:
        return row
    row["floor"] = floor
    fastest = samples[floor].best
    row["share_of_floor"] = round(FLOOR_PASSES[setting.adaptive] / Copy.passes[0] * median_ratio(fastest, own), 4)
    if name.startswith(FASTSAM):
        others = [other for other in samples if other not in (name, *kinds)]
        row["speedup_over"] = {other: round(median_ratio(samples[other].best, own), 3) for other in others}
        if samples[name].device:
            wall = samples[name].wall
            row["wall_speedup_over"] = {o: round(median_ratio(samples[o].wall, wall), 3) for o in others}
    return row
