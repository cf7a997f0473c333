"""Results on disk: one keyed row a measurement in bench/results/<device>.json, and a table of them for people."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
LAUNCH_QUEUE = 1000
"""Launches, about, that a GPU's driver lets the host be ahead of the device."""


def file_of(device: str) -> Path:
    """Where the results of a device go: its name in lower case, other signs made hyphens."""
    slug = re.sub(r"\(r\)|\(tm\)", "", device.lower())
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', slug).strip('-')}.json"


def load(path: Path) -> list[Row]:
    return json.loads(path.read_text()) if path.exists() else []


def save(path: Path, rows: Iterable[Row]) -> None:
    """Adds `rows` to those of `path`, each in the place of an older one with its key. Writes the table beside it."""
    by_key = {row["key"]: row for row in load(path)} | {row["key"]: row for row in rows}
    merged = [by_key[key] for key in sorted(by_key)]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in merged)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(f"[\n{lines}\n]\n")
    unfinished.replace(path)
    path.with_suffix(".md").write_text(table(merged))


def groups(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """`rows` by the values of `names`."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def table(rows: list[Row]) -> str:
    """Markdown: a table for each case and setting, fastest first, with device, versions and commits above."""
    lines = ["# Measured times", ""]
    for name in ("device", "driver", "versions", "commit", "date"):
        values = sorted({row[name] for row in rows})
        lines.append(f"- {name}: {' to '.join(dict.fromkeys([values[0], values[-1]])) if values else ''}")
    lines += ["", "Medians, and in brackets the quartiles. Ratios are medians of the ratios within a round."]
    if any(outruns_the_queue(row) for row in rows):
        lines[-1] += (
            f" \\*: with over {LAUNCH_QUEUE} launches the driver's queue is full, and device time holds host time."
        )
    suites = {suite: of_suite for (suite,), of_suite in groups(rows, "suite").items()}
    for title, suite, describe, columns in (
        ("norm + perturb + restore", "step", step_title, STEP_COLUMNS),
        ("Whole training steps", "training", training_title, TRAINING_COLUMNS),
    ):
        grouped = groups(suites.get(suite, []), "numel", "case", "dtype", "adaptive", "threads")
        lines += ["", f"## {title}"] if grouped else []
        for _, of_case in sorted(grouped.items()):
            lines += ["", f"### {describe(of_case[0])}", "", *markdown(of_case, columns)]
    return "\n".join(lines) + "\n"


def markdown(rows: list[Row], columns: dict[str, Callable[[Row], str]]) -> list[str]:
    """A table of `rows`, fastest first, without empty columns; below it what was left out."""
    measured = sorted((row for row in rows if "left_out" not in row), key=time_of)
    cells = [[column(row) for column in columns.values()] for row in measured]
    used = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    lines = []
    if measured:
        lines += ["| " + " | ".join(list(columns)[i] for i in used) + " |", "|---" * len(used) + "|"]
        lines += ["| " + " | ".join(row[i] for i in used) + " |" for row in cells]
    reasons = groups((row for row in rows if "left_out" in row), "left_out")
    if reasons:
        lines += ["", "Left out:"] if measured else ["Left out:"]
    for (reason,), of_reason in reasons.items():
        lines += [f"- {', '.join(row['contestant'] for row in of_reason)}: {reason}"]
    return lines


def step_title(row: Row) -> str:
    return f"{row['title']}: {row['numel']:,} in {row['tensors']} tensors, {setting_of(row)}"


def training_title(row: Row) -> str:
    return f"{row['title']}: {row['numel']:,} parameters, {setting_of(row)}"


def setting_of(row: Row) -> str:
    threads = f", {row['threads']} thread{'s' * (row['threads'] > 1)}" if row["threads"] else ""
    return f"{row['dtype']}, {'adaptive' if row['adaptive'] else 'plain'}{threads}"


def time_of(row: Row) -> float:
    """Median time in microseconds, the device's own where it is known."""
    return row.get("device_us", row["wall_us"])[1]


def duration(quartiles: list[float] | None) -> str:
    """Quartiles in microseconds in a readable unit, as "12.3 ms (12.1 to 12.6)"."""
    if quartiles is None:
        return ""
    unit, factor = ("us", 1.0) if quartiles[1] < 1000 else ("ms", 1e-3)
    first, median, third = (f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in (value * factor for value in quartiles))
    return f"{median} {unit} ({first} to {third})"


def outruns_the_queue(row: Row) -> bool:
    """Whether a step's device time holds time of the host, as davda54's in DenseNet-121."""
    return row.get("launches", 0) > LAUNCH_QUEUE


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


STEP_COLUMNS: dict[str, Callable[[Row], str]] = {
    "contestant": lambda row: row["contestant"] + (f" ({row['way']})" if "way" in row else ""),
    "device time": lambda row: duration(row.get("device_us")) + r"\*" * outruns_the_queue(row),
    "wall time": lambda row: duration(row["wall_us"]),
    "host time": lambda row: duration(row.get("host_us")),
    "launches": lambda row: str(row.get("launches", "")),
    "GB/s": lambda row: f"{row['gb_per_s']:.1f}" if "gb_per_s" in row else "",
    "share of copy bandwidth": lambda row: percent(row.get("share_of_copy_bandwidth")),
    "share of peak": lambda row: percent(row.get("share_of_peak")),
    "share of floor": lambda row: percent(row.get("share_of_floor")),
    "peak extra memory": lambda row: f"{row['extra_bytes'] / 1e6:.4g} MB" if "extra_bytes" in row else "",
}
TRAINING_COLUMNS: dict[str, Callable[[Row], str]] = {
    "contestant": lambda row: row["contestant"],
    "time a step": lambda row: duration(row["wall_us"]),
    "over the base step": lambda row: f"{row['ratio_to_base']:.3f}",
    "over pytorch_optimizer's SAM step": lambda row: f"{row['ratio_to_peer']:.3f}",
}
