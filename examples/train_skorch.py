"""FusedSAM in skorch, as it is: skorch passes step() a closure that clears the gradients and computes them.

python examples/train_skorch.py
"""

import numpy as np  # pip install numpy
import torch
from sklearn.datasets import load_digits  # pip install scikit-learn
from skorch import NeuralNetClassifier  # pip install skorch
from skorch.callbacks import Callback, PassthroughScoring
from torch import nn

from fastsam import FusedSAM


class PerturbedLoss(Callback):
    """Writes the loss at w + e_w to the history, beside train_loss, the loss at w."""

    def on_batch_end(self, net: NeuralNetClassifier, training: bool = False, **kwargs: object) -> None:
        """Called by skorch after each batch."""
        if training:
            net.history.record_batch("perturbed_loss", float(net.optimizer_.perturbed_loss))


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
        callbacks=[PerturbedLoss(), PassthroughScoring("perturbed_loss", on_train=True)],
    )
    net.fit(images[:1500], labels[:1500])
    accuracy = float((net.predict(images[1500:]) == labels[1500:]).mean())
    print(f"accuracy {accuracy:.3f} after {net.optimizer_.param_groups[0]['sam_step']} steps")
    loss, perturbed_loss = net.history[-1, ("train_loss", "perturbed_loss")]
    print(f"sharpness {perturbed_loss - loss:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
