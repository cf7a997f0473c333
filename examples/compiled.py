"""torch.compile: compile the model, or the whole training function. Each call of FusedSAM is one graph break.

    python examples/compiled.py

What FusedSAM itself computes is fused already, and is never traced.
"""

import torch
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import Tensor, nn

from fastsam import FusedSAM


def train(what: str, compiler: str = "inductor", epochs: int = 4) -> float:
    """Compiles ``"model"`` or ``"function"``; the loss of the last batch."""
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    if what == "model":
        model = torch.compile(model, backend=compiler)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        sam.first_step(zero_grad=True)
        nn.functional.cross_entropy(model(x), y).backward()
        sam.second_step(zero_grad=True)
        return loss.detach()

    if what == "function":
        step = torch.compile(step, backend=compiler)
    for _ in range(epochs):
        for batch in torch.randperm(1500).split(100):
            loss = step(images[batch], labels[batch])
    print(f"compiled {what}: loss {loss:.4f}")
    return loss.item()


if __name__ == "__main__":
    train("model")
    train("function")
