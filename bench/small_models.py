"""Models small enough to train in a benchmark."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise

from torch import Tensor, nn

from fastsam.demo.training import network


class SmallResNet(nn.Module):
    """Three residual stages of two convolutions each, for 3x32x32 images."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width, width, 2 * width, 4 * width]
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stages = nn.ModuleList(self.stage(i, o) for i, o in pairwise(widths))
        self.shortcuts = nn.ModuleList(nn.Conv2d(i, o, 1, stride=o // i, bias=False) for i, o in pairwise(widths))
        self.head = nn.Linear(widths[-1], 10)

    @staticmethod
    def stage(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, outputs, 3, stride=outputs // inputs, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage, shortcut in zip(self.stages, self.shortcuts, strict=True):
            x = stage(x) + shortcut(x)
        return self.head(x.mean((2, 3)))


def mlp() -> nn.Module:
    hidden = 512
    return nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))


@dataclass(frozen=True)
class Model:
    title: str
    construct: Callable[[], nn.Module]
    batch: tuple[int, ...]


def installed_models() -> dict[str, Model]:
    """A real model, where a package that defines one is installed and fits this torch."""
    try:
        from torchvision.models import resnet18
    except (ImportError, RuntimeError):
        return {}
    title = f"torchvision {version('torchvision')}'s ResNet-18, 16 images 3x32x32"
    return {"torchvision-resnet18": Model(title, resnet18, (16, 3, 32, 32))}


MODELS = {
    "digits-cnn": Model("the demo's CNN, 64 images 1x8x8", partial(network, seed=0), (64, 1, 8, 8)),
    "mlp": Model("MLP, 128 vectors of 784", mlp, (128, 784)),
    "small-resnet": Model("small ResNet, 64 images 3x32x32", SmallResNet, (64, 3, 32, 32)),
    **installed_models(),
}
