"""Plots from the results alone: `python -m bench plot` writes them beside the results, one set a device."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib  # pip install matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from bench import results
from bench.results import Row, time_of
from bench.step_suite import COPY
from bench.training_suite import PEER

FASTSAM_COLOUR = "#d1495b"
PEERS = {
    "foreach-item": ("torch foreach, .item(), kept backup", "#00798c"),
    "foreach": ("torch foreach", "#66a5ad"),
    "compile": ("torch.compile", "#8d96a3"),
    "composer": ("Composer's sequence", "#edae49"),
    "davda54": ("davda54's sequence", "#9c6644"),
    "pytorch_optimizer": ("pytorch_optimizer's SAM", "#2e4057"),
}
CARD = {1: 2.0, 10: 1 / 0.93}
"""Step time over the base's as MosaicML's method card states it: half the throughput, and 7 % less at interval=10."""


def plot_all(files: Sequence[Path], folder: Path | None) -> list[Path]:
    """Writes the plots of each results file into `folder` (default: beside it); one without data is left out."""
    written = []
    for file in files:
        rows = [row for row in results.load(file) if "left_out" not in row]
        for draw in (time_over_size, speedup_by_model, share_of_bandwidth, cost_of_interval):
            figure = draw(rows)
            if figure is None:
                continue
            path = (folder or file.parent) / f"{file.stem}-{draw.__name__.replace('_', '-')}.png"
            figure.savefig(path, dpi=150, bbox_inches="tight")
            plt.close(figure)
            written.append(path)
    return written


def base_setting(rows: Sequence[Row], kind: str) -> list[Row]:
    """fp32, plain, the most threads: what every case was measured in."""
    found = [row for row in rows if row["suite"] == "step" and row["kind"] == kind]
    found = [row for row in found if row["dtype"] == "float32" and not row["adaptive"]]
    threads = max((row["threads"] for row in found), default=0)
    return [row for row in found if row["threads"] == threads]


def best_backend(rows: Sequence[Row]) -> str | None:
    """The fastsam backend that is fastest in most of the cases."""
    winners = [
        min(own, key=time_of)["contestant"]
        for of_case in results.groups(rows, "case").values()
        if (own := [row for row in of_case if "speedup_over" in row])
    ]
    return max(set(winners), key=winners.count) if winners else None


def setting_line(row: Row) -> str:
    return f"{row['device']}, {results.setting_of(row)}\n{row['versions']}"


def new_figure(title: str, row: Row, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    figure.text(0.01, -0.005, setting_line(row), fontsize=7.5, color="0.4", va="top")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draws(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Contestants of `rows` to draw -> (label, colour); fastsam's best backend first."""
    present = {row["contestant"] for row in rows}
    best = best_backend(rows)
    own = {best: (best.replace("-", " (") + ")", FASTSAM_COLOUR)} if best else {}
    return own | {name: look for name, look in PEERS.items() if name in present}


def time_over_size(rows: Sequence[Row]) -> Figure | None:
    rows = base_setting(rows, "size")
    if not rows:
        return None
    figure, axes = new_figure("Time of norm + perturb + restore, parameters in 100 tensors", rows[0], (7.5, 4.8))

    def line(name: str, time: Callable[[Row], float], **look: object) -> None:
        points = sorted((row["numel"], time(row) * 1e-3) for row in rows if row["contestant"] == name)
        axes.plot([x for x, _ in points], [y for _, y in points], **look)

    for name, (label, colour) in draws(rows).items():
        width = 2.6 if colour == FASTSAM_COLOUR else 1.4
        line(name, time_of, label=label, color=colour, linewidth=width, marker="o", markersize=4)
    line(
        COPY,
        lambda row: 3.5 * time_of(row),
        label="floor: 28 bytes a parameter at copy speed",
        color="k",
        linestyle="--",
    )
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="milliseconds")
    axes.grid(which="major", color="0.9")
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def models_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Title -> rows, the smallest model first."""
    ordered = sorted(results.groups(rows, "numel", "title").items())
    return {f"{title}\n{numel / 1e6:.0f}M": found for (numel, title), found in ordered}


def speedup_by_model(rows: Sequence[Row]) -> Figure | None:
    rows = base_setting(rows, "model")
    best = best_backend(rows)
    models = models_of([row for row in rows if row["contestant"] == best])
    peers = [name for name in draws(rows) if name in PEERS]
    if not models or not peers:
        return None
    figure, axes = new_figure(f"Speed-up of {best} over its peers: norm + perturb + restore", rows[0], (10, 4.6))
    width = 0.84 / len(peers)
    for i, peer in enumerate(peers):
        label, colour = PEERS[peer]
        for j, (own,) in enumerate(models.values()):
            ratio = own["speedup_over"].get(peer)
            if ratio is None:
                continue
            x = j + (i - (len(peers) - 1) / 2) * width
            axes.bar(x, ratio, 0.92 * width, color=colour, label=label if j == 0 or label not in seen(axes) else None)
            axes.text(x, ratio, f" {ratio:.1f}", rotation=90, ha="center", va="bottom", fontsize=6.5)
    axes.axhline(1, color=FASTSAM_COLOUR, linewidth=1.2)
    axes.set_xticks(range(len(models)), models, fontsize=8)
    axes.set_ylabel("times as fast")
    axes.legend(frameon=False, fontsize=8.5, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def seen(axes: Axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def share_of_bandwidth(rows: Sequence[Row]) -> Figure | None:
    rows = base_setting(rows, "model")
    models = models_of(rows)
    if not models:
        return None
    title = "How close to the floor: norm + perturb + restore"
    figure, axes = new_figure(title, rows[0], (8, 0.5 * len(models) + 1.8))
    for name, (label, colour) in draws(rows).items():
        points = [
            (100 * row["share_of_floor"], j)
            for j, found in enumerate(models.values())
            for row in found
            if row["contestant"] == name
        ]
        size = 70 if colour == FASTSAM_COLOUR else 34
        axes.scatter([x for x, _ in points], [y for _, y in points], size, color=colour, label=label, zorder=3)
    axes.axvline(100, color="k", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(models)), [name.replace("\n", ", ") for name in models])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("% of the speed of the floor: 28 bytes a parameter at copy speed (right is better)")
    axes.grid(color="0.92")
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def cost_of_interval(rows: Sequence[Row]) -> Figure | None:
    rows = [row for row in rows if row["suite"] == "training"]
    if not rows:
        return None
    figure, axes = new_figure("Cost of a training step with SAM, over the base optimizer's", rows[0], (7.5, 4.6))
    intervals = (1, 2, 5, 10)
    axes.plot(intervals, [1 + 1 / k for k in intervals], "k--", linewidth=1, label="cost of the second gradient alone")
    for i, ((title,), found) in enumerate(results.groups(rows, "title").items()):
        ratio = {row["contestant"]: row["ratio_to_base"] for row in found}
        colour = ("#d1495b", "#edae49", "#00798c", "#2e4057")[i % 4]
        points = [(k, ratio[f"interval={k}"]) for k in intervals if f"interval={k}" in ratio]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=f"fastsam: {title}")
        if PEER in ratio:
            axes.plot(
                1, ratio[PEER], "x", color=colour, markersize=8, markeredgewidth=2, label=f"pytorch_optimizer: {title}"
            )
    card = "MosaicML's method card (ResNet-50, published)"
    axes.plot(list(CARD), list(CARD.values()), "D", color="0.5", label=card, zorder=0, markersize=7, fillstyle="none")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(intervals))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="interval (a SAM step every k steps)", ylabel="time of a step, base = 1")
    axes.grid(color="0.92")
    axes.legend(frameon=False, fontsize=8)
    return figure
