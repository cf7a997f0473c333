"""FusedSAM in Lightning Fabric: two calls, the first on the optimizer inside Fabric's wrapper.

python examples/train_fabric.py
"""

import torch
from lightning.fabric import Fabric  # pip install lightning
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import nn

from fastsam import FusedSAM


def main(precision: str = "32-true") -> float:
    """Accuracy on the last 297 digits."""
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model, sam = fabric.setup(model, FusedSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9))
    for _ in range(10):
        for batch in torch.randperm(1500).split(100):
            x, y = images[batch], labels[batch]
            fabric.backward(nn.functional.cross_entropy(model(x), y))
            sam.optimizer.first_step(zero_grad=True)
            fabric.backward(nn.functional.cross_entropy(model(x), y))
            sam.step()  # restores w; Fabric unscales and steps
            sam.zero_grad()
    accuracy = float((model(images[1500:]).argmax(1) == labels[1500:]).float().mean())
    print(f"{precision}: accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
    main("bf16-mixed")
