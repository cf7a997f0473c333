"""FusedSAM in mmengine: a registered optimizer, built from a config, in an optimizer wrapper that takes both passes.

    python examples/train_mmengine.py

The stock OptimWrapper steps after one backward; SAMWrapper runs the model a second time at w + e_w.
"""

import torch
from mmengine.model import BaseModel  # pip install mmengine
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import Tensor, nn

from fastsam import FusedSAM

OPTIMIZERS.register_module(module=FusedSAM, force=True)

CONFIG = {
    "type": "SAMWrapper",
    "optimizer": {"type": "FusedSAM", "base_optimizer": torch.optim.SGD, "rho": 0.1, "lr": 0.1, "momentum": 0.9},
}


@OPTIM_WRAPPERS.register_module(force=True)
class SAMWrapper(OptimWrapper):
    """An optimizer wrapper whose update takes a function that computes the loss, and runs it in each pass."""

    def update_params(self, loss_of) -> Tensor:
        """One step; returns the loss at w."""
        loss = loss_of()
        self.backward(loss)
        if self.optimizer.first_step(zero_grad=True):
            self.backward(loss_of())
        self.optimizer.second_step(zero_grad=True)
        return loss.detach()


class Digits(BaseModel):
    """A small network with mmengine's train_step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor, labels: Tensor | None = None, mode: str = "loss"):
        """The loss, or the scores."""
        scores = self.layers(images)
        return {"loss": nn.functional.cross_entropy(scores, labels)} if mode == "loss" else scores

    def train_step(self, data: dict[str, Tensor], optim_wrapper: SAMWrapper) -> dict[str, Tensor]:
        """One step, by a wrapper that may run the model twice."""
        return {"loss": optim_wrapper.update_params(lambda: self.parse_losses(self(**data))[0])}


def main() -> float:
    """Accuracy on the last 297 digits."""
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    model = Digits()
    wrapper = build_optim_wrapper(model, CONFIG)
    for _ in range(10):
        for batch in torch.randperm(1500).split(100):
            model.train_step({"images": images[batch], "labels": labels[batch]}, wrapper)
    accuracy = float((model(images[1500:], mode="tensor").argmax(1) == labels[1500:]).float().mean())
    print(f"accuracy {accuracy:.3f} by {type(wrapper.optimizer).__name__}")
    return accuracy


if __name__ == "__main__":
    main()
