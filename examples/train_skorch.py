"""FusedSAM in skorch, as it is: skorch passes step() a closure that clears the gradients and computes them.

python examples/train_skorch.py
"""

import numpy as np  # pip install numpy
import torch
from sklearn.datasets import load_digits  # pip install scikit-learn
from skorch import NeuralNetClassifier  # pip install skorch
from torch import nn

from fastsam import FusedSAM


def main() -> float:
    """Accuracy on the last 297 digits."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    net = NeuralNetClassifier(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        criterion=nn.CrossEntropyLoss,
        max_epochs=10,
        batch_size=100,
        train_split=None,
        verbose=0,
        lr=0.1,
        optimizer=FusedSAM,
        optimizer__base_optimizer=torch.optim.SGD,
        optimizer__rho=0.1,
        optimizer__momentum=0.9,
    )
    net.fit(images[:1500], labels[:1500])
    accuracy = float((net.predict(images[1500:]) == labels[1500:]).mean())
    print(f"accuracy {accuracy:.3f} after {net.optimizer_.param_groups[0]['sam_step']} steps")
    return accuracy


if __name__ == "__main__":
    main()
