"""Stop at any step, by SIGTERM too, and resume bit for bit.

    python examples/checkpoint.py run.pt      # start it, kill it, start it again

Between first_step and second_step the model holds w + e_w. A signal handler calls restore() before it saves: the
interrupted step then ends without a step of the base optimizer, and is done again after resuming.
"""

import signal
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import Tensor, nn

from fastsam import FusedSAM


def train(path: Path, steps: int = 60) -> nn.Module:
    """Trains up to `steps`, from the checkpoint where there is one."""
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.1, interval=2, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sam, steps)
    parts = {"model": model, "sam": sam, "scheduler": scheduler}
    done, stop = 0, False
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        done = checkpoint.pop("done")
        for name, state in checkpoint.items():
            parts[name].load_state_dict(state)

    def save() -> None:
        torch.save({"done": done, **{name: part.state_dict() for name, part in parts.items()}}, path)

    def on_sigterm(*_: object) -> None:
        nonlocal stop
        stop = True
        if sam.perturbed:  # w was not touched yet by this step: no need to wait for its end
            sam.restore()
            save()
            sys.exit(f"stopped within step {done}")

    signal.signal(signal.SIGTERM, on_sigterm)
    while done < steps and not stop:
        batch = torch.randint(len(images), (64,), generator=torch.Generator().manual_seed(done))

        def closure(batch: Tensor = batch) -> Tensor:
            sam.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            return loss

        sam.step(closure)
        scheduler.step()
        done += 1
    save()
    print(f"{path}: {done} of {steps} steps, sum of all weights {sum(p.sum() for p in model.parameters()):.9f}")
    return model


if __name__ == "__main__":
    train(Path(sys.argv[1] if len(sys.argv) > 1 else "run.pt"))
