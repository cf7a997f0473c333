"""Lightning: FusedSAM under automatic optimization, and by manual optimization with micro-batches and in 16-mixed.

    python examples/train_lightning.py

Automatic optimization needs nothing but FusedSAM in configure_optimizers; SAMMixin makes each batch count once in the
logs and in batch normalisation. Adding up gradients over micro-batches takes manual optimization: all of them have to
run again at w + e_w.
"""

import torch
from lightning.pytorch import LightningModule, Trainer  # pip install lightning
from lightning.pytorch.plugins.precision import MixedPrecision
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import FusedSAM, frozen_running_stats
from fastsam.lightning import SAMMixin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPOCHS = 6
Batch = tuple[Tensor, Tensor]


class Digits(SAMMixin, LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.layers(x), y)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.log("training loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.layers(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> dict:
        sam = FusedSAM(self.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
        # Under DDP each rank climbs by its own samples with first_pass_context=lambda: self.trainer.model.no_sync()
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sam, EPOCHS)
        return {"optimizer": sam, "lr_scheduler": cosine}


class ManualDigits(Digits):
    """Steps once every few batches, by the gradients of all their samples; in any precision."""

    def __init__(self, micro_batches: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.micro_batches = micro_batches
        self.waiting: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.waiting.append(batch)
        if len(self.waiting) < self.micro_batches and not self.trainer.is_last_batch:
            return
        samples = sum(len(y) for _, y in self.waiting)
        with self.optimizers() as sam:  # whatever ends this block leaves the weights at w
            loss = self.backward_all(samples)
            if sam.first_step(zero_grad=True):  # False on a step that `interval` leaves plain
                with frozen_running_stats(self):
                    self.backward_all(samples)
            sam.second_step(zero_grad=True)  # by way of Lightning: it counts the step and, in 16-mixed, unscales
        self.log("training loss", loss, on_step=False, on_epoch=True, batch_size=samples)
        self.waiting.clear()

    def backward_all(self, samples: int) -> Tensor:
        total = torch.zeros((), device=self.device)
        for batch in self.waiting:
            loss = self.loss(batch) * len(batch[1]) / samples
            self.manual_backward(loss)
            total += loss.detach()
        return total

    def on_train_epoch_start(self) -> None:
        self.waiting.clear()  # of a run that was interrupted

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()  # manual optimization leaves schedulers to you


def train(form: str) -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.as_tensor(images).float() / 16, torch.as_tensor(labels))
    training, held_out = (
        torch.utils.data.Subset(digits, range(1500)),
        torch.utils.data.Subset(digits, range(1500, 1797)),
    )

    model, batch_size, options = Digits(), 100, {}
    if form == "automatic":
        options["gradient_clip_val"] = 1.0  # clips the second gradient
    elif form == "micro-batches":
        model, batch_size = ManualDigits(micro_batches=4), 25
    else:  # on a GPU just precision="16-mixed"; on CPU Lightning would take bf16-mixed for that
        model = ManualDigits()
        options["plugins"] = [MixedPrecision("16-mixed", DEVICE, torch.amp.GradScaler(DEVICE))]
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="gpu" if DEVICE == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, DataLoader(training, batch_size, shuffle=True), DataLoader(held_out, 297))
    print(f"{form}, steps: {trainer.global_step}")
    print(f"{form}, training loss: {trainer.callback_metrics['training loss']:.4f}")
    print(f"{form}, accuracy: {trainer.callback_metrics['accuracy']:.3f}")


if __name__ == "__main__":
    train("automatic")
    train("micro-batches")
    train("16-mixed")
