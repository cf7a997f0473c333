"""Test-time adaptation with SAM: BatchNorm's weights follow the entropy of each batch, and are reset by deep copies.

    python examples/test_time_adaptation.py

Batches whose gradient is not finite or whose loss is high are skipped: restore() goes before `continue`.
"""

import copy
import math

import torch
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import nn

from fastsam import SAM


def entropy(scores: torch.Tensor) -> torch.Tensor:
    """Of each sample, ``[n]``."""
    return -(scores.softmax(1) * scores.log_softmax(1)).sum(1)


def main() -> tuple[float, float]:
    """Accuracy on shifted digits, before the adaptation and with it."""
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    source = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(15):
        for batch in torch.randperm(1200).split(100):
            source.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            source.step()
    shifted = 0.5 * images[1200:] + 0.4  # another camera's
    model.eval()
    before = float((model(shifted).argmax(1) == labels[1200:]).float().mean())

    model.train()  # BatchNorm uses the statistics of each batch
    sam = SAM(model[1].parameters(), torch.optim.SGD, rho=0.05, lr=0.01, momentum=0.9)
    saved = copy.deepcopy((model.state_dict(), sam.state_dict()))
    right = 0
    for batch in torch.arange(597).split(100):
        scores = model(shifted[batch])
        right += int((scores.argmax(1) == labels[1200:][batch]).sum())
        reliable = entropy(scores) < 0.4 * math.log(10)
        if not reliable.any():
            continue
        sam.zero_grad()
        entropy(scores)[reliable].mean().backward()
        sam.first_step(zero_grad=True)
        loss = entropy(model(shifted[batch]))[reliable].mean()
        if not loss.isfinite():
            sam.restore()
            continue
        loss.backward()
        sam.second_step(zero_grad=True)
    model.load_state_dict(saved[0])  # the next domain starts from the source model again
    sam.load_state_dict(saved[1])
    after = right / 597
    print(f"accuracy on shifted digits: {before:.3f} before, {after:.3f} adapted")
    return before, after


if __name__ == "__main__":
    main()
