"""A learning rate schedule, gradient clipping and stochastic weight averaging around FusedSAM.

    python examples/averaging.py

They take FusedSAM for the one optimizer that it is. Average and evaluate between steps, never between first_step and
second_step.
"""

import torch
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from fastsam import FusedSAM, frozen_running_stats

EPOCHS, AVERAGED = 12, 5


def main() -> tuple[float, float]:
    """Accuracy on the last 297 digits: of the last weights, of the averaged ones."""
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sam, EPOCHS)
    constant = SWALR(sam, swa_lr=0.05, anneal_epochs=2)
    average = AveragedModel(model)

    for epoch in range(EPOCHS):
        for batch in torch.randperm(1500).split(100):
            x, y = images[batch], labels[batch]
            nn.functional.cross_entropy(model(x), y).backward()
            sam.first_step(zero_grad=True)
            with frozen_running_stats(model):
                nn.functional.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # the first gradient's norm makes no difference
            sam.second_step(zero_grad=True)
        if epoch < EPOCHS - AVERAGED:
            cosine.step()
        else:
            average.update_parameters(model)
            constant.step()
    update_bn(images[:1500].split(100), average)
    accuracies = []
    for name, trained in (("last", model), ("averaged", average)):
        right = trained.eval()(images[1500:]).argmax(1) == labels[1500:]
        accuracies.append(right.float().mean().item())
        print(f"{name} weights: accuracy {accuracies[-1]:.3f}")
    return accuracies[0], accuracies[1]


if __name__ == "__main__":
    main()
