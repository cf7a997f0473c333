"""Image classification as it is usually written, on scikit-learn's digits; --sam makes the same loop sharpness-aware.

    python examples/train_classic.py --sam --rho 0.1 --output run.pt
    python examples/train_classic.py --sam --rho 0.1 --output run.pt --resume run.pt      # goes on after a stop
    torchrun --standalone --nproc-per-node 2 examples/train_classic.py --sam --rho 0.1 --amp bf16

SAM is where `args.sam` is: the optimizer, the second gradient, and the way back to w if anything fails. Mixed
precision, data parallel training, micro-batches, clipping, schedule, EMA and checkpoints are as they are without it.
"""

import argparse
import gc
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fastsam import FusedSAM, frozen_running_stats

TRAINING_IMAGES = 1500  # of 1797; the others are the test set
DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=50, help="images in a step, on each process")
    add("--accumulate", type=int, default=1, help="micro-batches that a batch is cut into")
    add("--lr", type=float, default=0.05)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=5e-4, help="not for biases and the weights of norm layers")
    add("--warmup-epochs", type=int, default=1)
    add("--label-smoothing", type=float, default=0.0)
    add("--clip-grad-norm", type=float)
    add("--ema-decay", type=float, default=0.95)
    add("--sam", action="store_true", help="sharpness-aware minimization")
    add(
        "--rho",
        type=float,
        default=0.05,
        help="radius of SAM's neighbourhood; a resumed run keeps its own, and --adaptive",
    )
    add("--adaptive", action="store_true", help="ASAM, which wants a larger rho, such as 0.5")
    add("--interval", type=int, default=1, help="every how many steps SAM computes its second gradient")
    add("--amp", choices=DTYPES, default="none")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="the checkpoint to write after each epoch")
    add("--resume", type=Path, help="the checkpoint to go on from")
    return parser.parse_args(arguments)


def cnn() -> nn.Sequential:
    layers = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4 * 4, 10))


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum)
    if args.sam:
        optimizer = FusedSAM(optimizer, rho=args.rho, adaptive=args.adaptive, interval=args.interval)
    return optimizer


def warmup_and_cosine(optimizer: Optimizer, warmup: int, steps: int) -> LambdaLR:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2

    return LambdaLR(optimizer, factor)


def augment(images: Tensor) -> Tensor:
    """Moves the images by up to one pixel each way."""
    down, right = torch.randint(3, (2,)).tolist()
    return nn.functional.pad(images, (1, 1, 1, 1))[..., down : down + 8, right : right + 8]


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    scaler: torch.amp.GradScaler,
    ema: AveragedModel,
    args: argparse.Namespace,
) -> float:
    device, parallel = torch.device(args.device), isinstance(model, DistributedDataParallel)

    def backward(images: Tensor, labels: Tensor, synchronise: bool) -> Tensor:
        """Adds the gradient of the batch's mean loss, which it returns; the gradient carries the loss scale."""
        total = torch.zeros((), device=device)
        parts = list(zip(images.chunk(args.accumulate), labels.chunk(args.accumulate), strict=True))
        for i, (x, y) in enumerate(parts):
            last, share = i == len(parts) - 1, len(y) / len(labels)
            with model.no_sync() if parallel and not (synchronise and last) else nullcontext():
                with torch.autocast(device.type, DTYPES[args.amp], enabled=args.amp != "none"):
                    loss = nn.functional.cross_entropy(model(x), y, label_smoothing=args.label_smoothing)
                scaler.scale(loss * share).backward()
            total += loss.detach() * share
        return total

    model.train()
    mean = torch.zeros((), device=device)
    with optimizer if args.sam else nullcontext():  # whatever ends this block, Ctrl-C too, leaves the weights at w
        for images, labels in loader:
            images, labels = augment(images.to(device)), labels.to(device)
            # SAM climbs by each process's own gradient. That of a plain step is averaged over them, as always.
            climbs = args.sam and optimizer.is_sam_step
            mean += backward(images, labels, synchronise=not climbs) / len(loader)
            if climbs:
                optimizer.first_step(zero_grad=True)
                with frozen_running_stats(model):  # BatchNorm has counted this batch
                    backward(images, labels, synchronise=True)
            if args.clip_grad_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
            ema.update_parameters(model.module if parallel else model)
    return mean.item()


@torch.inference_mode()
def count_right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return (model.eval()(images).argmax(1) == labels).sum()


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))

    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    images = images.float().reshape(-1, 1, 8, 8) / 16
    training = TensorDataset(images[:TRAINING_IMAGES], labels[:TRAINING_IMAGES])
    sampler = DistributedSampler(training, size, rank, seed=args.seed)
    loader = DataLoader(training, args.batch_size, sampler=sampler, drop_last=True)
    test = [t[TRAINING_IMAGES:][rank::size].to(device) for t in (images, labels)]  # this process's share

    torch.manual_seed(args.seed)
    net = cnn().to(device)
    model = DistributedDataParallel(net) if size > 1 else net
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay), use_buffers=True)
    optimizer = make_optimizer(net, args)
    scheduler = warmup_and_cosine(optimizer, args.warmup_epochs * len(loader), args.epochs * len(loader))
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    parts = {"model": net, "ema": ema, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    done = 0
    if args.resume:
        checkpoint = torch.load(args.resume, map_location=device)
        done = checkpoint["epochs"]
        for name, part in parts.items():
            if checkpoint[name]:  # a scaler that was off saved nothing
                part.load_state_dict(checkpoint[name])
        if rank == 0 and done >= args.epochs:
            print(f"nothing to do: {done} epochs are done")

    for epoch in range(done, args.epochs):
        sampler.set_epoch(epoch)
        torch.manual_seed(args.seed + epoch * size + rank)  # of the augmentation, known again after a resume
        loss = train_epoch(model, loader, optimizer, scheduler, scaler, ema, args)
        if size > 1:  # BatchNorm's statistics differ by now; take one process's for all
            for buffer in [*net.buffers(), *ema.buffers()]:
                dist.broadcast(buffer, 0)
        right = torch.stack([count_right(net, *test), count_right(ema, *test)])
        if size > 1:
            dist.all_reduce(right)
        accuracy, ema_accuracy = (right / (len(labels) - TRAINING_IMAGES)).tolist()
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss:.4f}, accuracy {accuracy:.4f}, ema accuracy {ema_accuracy:.4f}")
            if args.output:
                states = {name: part.state_dict() for name, part in parts.items()}
                temporary = args.output.with_suffix(".tmp")
                torch.save({"epochs": epoch + 1, **states}, temporary)
                temporary.replace(args.output)  # at once: a stop while writing leaves the former checkpoint
    if rank == 0 and done < args.epochs:
        print(f"accuracy: {accuracy:.4f}\nema accuracy: {ema_accuracy:.4f}")


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun started this
        dist.init_process_group()
    main()
    if dist.is_initialized():
        gc.collect()  # DistributedDataParallel, a cycle, lets go of the group
        dist.barrier()  # gloo's threads let go of their last tensors, before Python exits
        dist.destroy_process_group()
