"""MosaicML Composer's Trainer with SAM as one of its algorithms.

    python examples/train_composer.py
    composer -n 2 examples/train_composer.py

Needs `pip install mosaicml`. The only change to a script that uses Composer's own SAM is the import. Each rank climbs
by the gradient of its own samples; checkpoints (save_folder=, load_path=) resume where they stopped.
"""

import torch
from composer import ComposerModel, Trainer  # pip install mosaicml
from composer.optim import CosineAnnealingScheduler, DecoupledSGDW
from composer.utils import dist
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from fastsam.composer import SAM  # instead of: from composer.algorithms import SAM


class Digits(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, batch: list[Tensor]) -> Tensor:
        return self.net(batch[0])

    def loss(self, outputs: Tensor, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


def main() -> None:
    dist.initialize_dist("gpu" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    digits = TensorDataset(images.float() / 16, labels)
    training = Subset(digits, range(1500))
    model = Digits()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(training, 50, sampler=dist.get_sampler(training, shuffle=True)),
        optimizers=DecoupledSGDW(model.parameters(), lr=0.1, momentum=0.9),
        algorithms=[SAM(rho=0.5, interval=10)],  # rho grows with interval, says its method card
        schedulers=CosineAnnealingScheduler(),
        max_duration="8ep",
        progress_bar=False,
    )
    trainer.fit()
    model.eval()
    x, y = (t.to(next(model.parameters()).device) for t in digits[1500:])
    print(f"accuracy: {(model([x]).argmax(1) == y).float().mean():.3f}")


if __name__ == "__main__":
    main()
