"""FusedSAM from a Hydra configuration: `_partial_` leaves the parameters for the script to fill in.

python examples/train_hydra.py
"""

import hydra  # pip install hydra-core
import torch
from omegaconf import OmegaConf  # pip install hydra-core
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import nn

CONFIG = """
optimizer:
  _target_: fastsam.FusedSAM
  _partial_: true
  rho: 0.1
  interval: 2
  base_optimizer:
    _target_: torch.optim.SGD
    _partial_: true
    lr: 0.1
    momentum: 0.9
"""


def main() -> float:
    """Accuracy on the last 297 digits."""
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    sam = hydra.utils.instantiate(OmegaConf.create(CONFIG)).optimizer(model.parameters())
    for _ in range(10):
        for batch in torch.randperm(1500).split(100):

            def closure(x: torch.Tensor = images[batch], y: torch.Tensor = labels[batch]) -> torch.Tensor:
                sam.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            sam.step(closure)
    accuracy = float((model(images[1500:]).argmax(1) == labels[1500:]).float().mean())
    print(f"accuracy {accuracy:.3f}, rho {sam.rho}, interval {sam.interval}")
    return accuracy


if __name__ == "__main__":
    main()
