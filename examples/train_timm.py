"""timm: SAM in the loop of its train.py, with its optimizer, schedule, loss scaler, clipping and model average.

    python examples/train_timm.py

What is new in train.py is marked: FusedSAM around the optimizer that create_optimizer_v2 made, and three lines before
_backward(loss). timm's NativeScaler is left as it is: the ascent does not feel the loss scale, and the scaler unscales,
clips and steps by the second gradient alone.
"""

from contextlib import nullcontext

import timm  # pip install timm scikit-learn
import torch
from sklearn.datasets import load_digits  # pip install scikit-learn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fastsam import FusedSAM

BATCH, CLIP = 64, 5.0


def digits() -> tuple[Tensor, Tensor]:
    """1797 images, 8x8 made 32x32, in three equal channels."""
    images, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return interpolate(images, size=32).expand(-1, 3, -1, -1).contiguous(), torch.as_tensor(labels)


def train(name: str = "sgd", lr: float = 0.05, epochs: int = 8, fp16: bool = False) -> tuple[float, float]:
    """Trains with timm's optimizer of that name; test accuracy of the model, and of its moving average.

    In fp16 it is a transformer, since convolutions in fp16 take minutes a step on a CPU.
    """
    torch.manual_seed(0)
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train_rows, test_rows = order[:1024], order[1024:]
    if fp16:
        model = timm.create_model("test_vit", num_classes=10, img_size=32)
    else:
        model = timm.create_model("test_resnet", num_classes=10)
    ema = ModelEmaV3(model, decay=0.9)
    loss_scaler = NativeScaler(device="cpu") if fp16 else None
    optimizer = create_optimizer_v2(model, opt=name, lr=lr, weight_decay=1e-4)
    optimizer = FusedSAM(optimizer, rho=0.05)  # new
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=epochs, warmup_epochs=1, warmup_lr=lr / 10)
    updates = 0
    for epoch in range(epochs):
        model.train()
        for rows in train_rows[torch.randperm(len(train_rows))].split(BATCH):

            def _forward(rows: Tensor = rows) -> Tensor:
                with torch.autocast("cpu", dtype=torch.float16) if fp16 else nullcontext():
                    return nn.functional.cross_entropy(model(images[rows]), labels[rows])

            def _backward(loss: Tensor) -> None:
                if loss_scaler is not None:
                    loss_scaler(loss, optimizer, clip_grad=CLIP, parameters=model.parameters())
                else:
                    loss.backward()
                    dispatch_clip_grad(model.parameters(), value=CLIP)
                    optimizer.step()

            loss = _forward()
            loss_scaler(loss, optimizer, need_update=False) if loss_scaler else loss.backward()  # new
            optimizer.first_step(zero_grad=True)  # new
            loss = _forward()  # new
            _backward(loss)
            optimizer.zero_grad()
            updates += 1
            ema.update(model, step=updates)
        scheduler.step(epoch + 1)
    return accuracy(model, images[test_rows], labels[test_rows]), accuracy(ema, images[test_rows], labels[test_rows])


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    for name, lr in [("sgd", 0.05), ("adamw", 2e-3), ("muon", 0.02)]:
        last, averaged = train(name, lr)
        print(f"{name}: test accuracy {last:.1%}, of the average {averaged:.1%}")


if __name__ == "__main__":
    main()
