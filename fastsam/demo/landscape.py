"""The loss around a minimum, along two random directions (Li et al. 2018, arXiv 1712.09913), and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

COLOURS = "viridis"


def filter_normalised_direction(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A random direction whose filters have the norms of the filters of `model` that they move (section 4 there).

    A filter is a slice of a weight along its first dimension: all that feeds one channel or unit. Without the scaling,
    a network would look flat for having large weights and sharp for having small ones. Biases are not moved, as in the
    authors' code.

    Args:
        model: the network that will be moved.
        generator: of the normal numbers that are then scaled.

    Returns:
        A tensor for each parameter, by name, in its shape and dtype.
    """
    direction = {}
    for name, w in model.named_parameters():
        if w.dim() <= 1:
            direction[name] = torch.zeros_like(w, requires_grad=False)
            continue
        d = torch.randn(w.shape, dtype=w.dtype, generator=generator)
        filter_dims = tuple(range(1, w.dim()))
        w_norms = torch.linalg.vector_norm(w.detach(), dim=filter_dims, keepdim=True)
        direction[name] = d * w_norms / torch.linalg.vector_norm(d, dim=filter_dims, keepdim=True)
    return direction


@torch.no_grad()
def loss_surface(model: nn.Module, images: Tensor, labels: Tensor, offsets: Tensor, seed: int) -> Tensor:
    """The loss at w + a d1 + b d2 for each pair of `offsets`; `model` is left as it is.

    Args:
        model: the network at w.
        images: where the loss is measured.
        labels: their classes; the loss is the mean cross entropy.
        offsets: the values (n,) that a and b take; 1 moves each filter by its own norm.
        seed: of the directions: models of the same architecture get the same ones, up to their filters' norms.

    Returns:
        The losses (n, n), b along the first dimension, a along the second.
    """
    generator = torch.Generator().manual_seed(seed)
    d1 = filter_normalised_direction(model, generator)
    d2 = filter_normalised_direction(model, generator)
    w = dict(model.named_parameters())

    def loss(a: float, b: float) -> Tensor:
        moved = {name: w[name] + a * d1[name] + b * d2[name] for name in w}
        return cross_entropy(functional_call(model, moved, (images,)), labels)

    steps = offsets.tolist()
    return torch.stack([torch.stack([loss(a, b) for a in steps]) for b in steps])


@dataclass(frozen=True)
class Panel:
    """One surface of the picture: its heights (n, n), b along the first dimension, and the two lines above it."""

    title: str
    caption: str
    heights: Tensor


@dataclass(frozen=True)
class Costs:
    """Accuracy over cost: by method the time of a step, and (mean, standard error) with each learning rate."""

    names: Sequence[str]
    times: Sequence[float]
    constant: Sequence[tuple[float, float]]
    decaying: Sequence[tuple[float, float]]


def draw(panels: Sequence[Panel], offsets: Tensor, costs: Costs, heading: str, height_label: str, path: Path) -> None:
    """Writes the surfaces side by side as a PNG, with the same axes and the same colours, and the costs beside them.

    Args:
        panels: the surfaces, from left to right.
        offsets: the values (n,) of a and b.
        costs: the points of the last panel.
        heading: one line over all panels.
        height_label: what the heights are.
        path: the file to write.
    """
    b, a = (grid.numpy() for grid in torch.meshgrid(offsets, offsets, indexing="ij"))
    heights = torch.stack([panel.heights for panel in panels])
    colours = Normalize(heights.min().item(), heights.max().item())
    columns = len(panels) + 1
    figure = Figure(figsize=(6.5 * columns, 5.8), dpi=100, layout="constrained")
    figure.suptitle(heading, fontsize=16)
    plots = []
    for column, panel in enumerate(panels, start=1):
        plot = figure.add_subplot(1, columns, column, projection="3d")
        plot.plot_surface(
            a,
            b,
            panel.heights.numpy(),
            norm=colours,
            cmap=COLOURS,
            rcount=len(offsets),
            ccount=len(offsets),
            edgecolor=(0, 0, 0, 0.3),
            linewidth=0.3,
        )
        plot.set_zlim(colours.vmin, colours.vmax)
        plot.locator_params(nbins=5)
        plot.view_init(elev=20, azim=-55)
        plot.set_box_aspect((4, 4, 3), zoom=1.08)
        plot.set_xlabel("random direction 1", labelpad=8)
        plot.set_ylabel("random direction 2", labelpad=8)
        plot.set_title(f"{panel.title}\n{panel.caption}", fontsize=14, pad=0)
        plots.append(plot)
    bar = figure.colorbar(ScalarMappable(colours, COLOURS), ax=plots, shrink=0.7, pad=0.05)
    bar.set_label(height_label, fontsize=13)
    _draw_costs(figure.add_subplot(1, columns, columns), costs)
    figure.savefig(path, format="png")


def _draw_costs(plot: Axes, costs: Costs) -> None:
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for i, (name, time) in enumerate(zip(costs.names, costs.times, strict=True)):
        colour = colours[i % len(colours)]
        for (mean, error), marker, face in ((costs.constant[i], "o", colour), (costs.decaying[i], "s", "white")):
            label = name if marker == "o" else None
            plot.errorbar(time, mean, error, fmt=marker, color=colour, mfc=face, capsize=3, label=label)
    plot.set_xlabel("time of a step, SGD's = 1")
    plot.set_ylabel("test accuracy, % (± standard error)")
    plot.set_title("filled: constant learning rate; hollow: decaying", fontsize=12)
    plot.grid(alpha=0.3)
    plot.legend(fontsize=9, loc="lower right")
