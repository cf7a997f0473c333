"""Mixed precision with an unmodified torch.amp.GradScaler, in both forms of call.

    python examples/mixed_precision.py

Only the second gradient needs unscaling: rho * g / ||g|| is the same at any scale. Clipping goes after the second
backward.
"""

import torch
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import Tensor, nn

from fastsam import FusedSAM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(form: str, epochs: int = 8) -> float:
    """Accuracy on the last 297 digits."""
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(a, device=DEVICE) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(DEVICE)
    scaler = torch.amp.GradScaler(DEVICE)
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, grad_scaler=scaler)

    def backward(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        return loss

    for _ in range(epochs):
        for batch in torch.randperm(1500).split(100):
            x, y = images[batch], labels[batch]
            if form == "two calls":
                backward(x, y)
                sam.first_step(zero_grad=True)
                backward(x, y)
                scaler.unscale_(sam)  # only because of the clipping
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(sam)
            else:  # grad_scaler= makes this possible: scaler.step(sam, closure) is not

                def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                    sam.zero_grad()
                    return backward(x, y)

                sam.step(closure)
            scaler.update()
            sam.zero_grad()
    right = model(images[1500:]).argmax(1) == labels[1500:]
    print(f"{form}: accuracy {right.float().mean():.3f}, loss scale {scaler.get_scale():g}")
    return right.float().mean().item()


if __name__ == "__main__":
    train("two calls")
    train("closure")
