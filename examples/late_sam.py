"""SAM in the last part of training: from the beginning by `start`, or around an optimizer when the time has come.

python examples/late_sam.py
"""

import torch
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import nn

from fastsam import FusedSAM

EPOCHS, STEPS_AN_EPOCH = 10, 15
SAM_FROM = round(0.7 * EPOCHS)


def train(how: str) -> nn.Module:
    """Trains a small network on digits; `how`: "start" or "wrap". Both come to the same weights, bit for bit."""
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if how == "start":
        optimizer = FusedSAM(optimizer, rho=0.1, start=SAM_FROM * STEPS_AN_EPOCH)
    for epoch in range(EPOCHS):
        if how == "wrap" and epoch == SAM_FROM:
            optimizer = FusedSAM(optimizer, rho=0.1)
        for batch in torch.randperm(1500).split(100):

            def closure(batch: torch.Tensor = batch, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                loss.backward()
                return loss

            optimizer.step(closure)
    right = model(images[1500:]).argmax(1) == labels[1500:]
    print(f"{how}: accuracy {right.float().mean():.3f}")
    return model


if __name__ == "__main__":
    train("start")
    train("wrap")
