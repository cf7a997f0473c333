"""Sharpness-aware training with Accelerate: gradient accumulation, clipping, schedule, mixed precision, any launcher.

    python examples/train_accelerate.py
    torchrun --standalone --nproc-per-node 2 examples/train_accelerate.py

prepare() takes FusedSAM for the optimizer that it is; its first_step is reached by `.optimizer`. The second pass runs
over all micro-batches of the step, so keep them.
"""

import gc
from contextlib import nullcontext

import torch
from accelerate import Accelerator  # pip install accelerate
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import FusedSAM


def train(accelerator, model, sam, scheduler, loader, epochs: int) -> None:
    window: list[tuple[Tensor, Tensor]] = []

    def backward(x: Tensor, y: Tensor) -> None:
        accelerator.backward(nn.functional.cross_entropy(model(x), y))

    with sam.optimizer:  # whatever ends this block, Ctrl-C too, leaves the weights at w
        for _ in range(epochs):
            for batch in loader:
                window.append(batch)
                with accelerator.accumulate(model):
                    backward(*batch)
                    if accelerator.sync_gradients:
                        if sam.optimizer.first_step(zero_grad=True):
                            for micro_batch in window:
                                with nullcontext() if micro_batch is window[-1] else accelerator.no_sync(model):
                                    backward(*micro_batch)
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                        window.clear()
                    sam.step()
                    scheduler.step()
                    sam.zero_grad()


def main(epochs: int = 10, mixed_precision: str = "no") -> float:
    torch.manual_seed(0)
    # Without a GPU and without cpu=True, each process that torchrun starts would train by itself.
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=2, mixed_precision=mixed_precision)
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=25, shuffle=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sam, epochs * len(loader) // 2)
    model, sam, loader, scheduler = accelerator.prepare(model, sam, loader, scheduler)
    train(accelerator, model, sam, scheduler, loader, epochs)

    w = nn.utils.parameters_to_vector(model.parameters()).detach()
    replicas = accelerator.gather(w[None])
    right = model(images[1500:].to(accelerator.device)).argmax(1) == labels[1500:].to(accelerator.device)
    accelerator.print(f"accuracy: {right.float().mean():.3f}")
    accelerator.print(f"replicas equal to the bit: {all(torch.equal(w, replica) for replica in replicas)}")
    return right.float().mean().item()


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        gc.collect()  # DistributedDataParallel, a cycle, lets go of the group
        torch.distributed.barrier()  # gloo's threads let go of their last tensors, before Python exits
        torch.distributed.destroy_process_group()
