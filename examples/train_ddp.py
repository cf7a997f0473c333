"""Data parallel training with DistributedDataParallel in both forms of call, micro-batches included.

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py

Each rank climbs by the gradient of its own samples (m-sharpness, section 4.1 of the paper): the first pass runs under
no_sync and costs no communication. The second one is synchronised, and since w is restored to the bit before the step,
the replicas stay equal. Without no_sync all ranks climb together, by the gradient of all samples.
"""

import gc
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsam import FusedSAM

MICRO_BATCHES = 2


def train(form: str, epochs: int = 6) -> None:
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(a, device=device) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device))
    # With static_graph=True the very first backward has to be synchronised: give a function that makes nullcontext()
    # then, and model.no_sync() afterwards.
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, first_pass_context=model.no_sync)

    def backward(batch: Tensor) -> Tensor:
        """The mean loss over the batch; its gradient is summed up over micro-batches and synchronised with the last."""
        total = torch.zeros((), device=device)
        for part in (parts := batch.chunk(MICRO_BATCHES)):
            with nullcontext() if part is parts[-1] else model.no_sync():
                loss = nn.functional.cross_entropy(model(images[part]), labels[part]) * len(part) / len(batch)
                loss.backward()
            total += loss.detach()
        return total

    for _ in range(epochs):
        for batch in torch.randperm(1500).split(100):  # the same on all ranks
            mine = batch.chunk(dist.get_world_size())[dist.get_rank()]
            if form == "two calls":
                # With an interval there are plain steps, whose only gradient has to be synchronised.
                with model.no_sync() if sam.is_sam_step else nullcontext():
                    backward(mine)
                if sam.first_step(zero_grad=True):
                    backward(mine)
                sam.second_step(zero_grad=True)
            else:  # first_pass_context= puts no_sync around the first of the two calls of closure

                def closure(mine: Tensor = mine) -> Tensor:
                    sam.zero_grad()
                    return backward(mine)

                sam.step(closure)

    w = nn.utils.parameters_to_vector(model.parameters()).detach()
    replicas = [torch.empty_like(w) for _ in range(dist.get_world_size())]
    dist.all_gather(replicas, w)
    right = model(images[1500:]).argmax(1) == labels[1500:]
    if dist.get_rank() == 0:
        print(f"{form}, replicas equal to the bit: {all(torch.equal(w, replica) for replica in replicas)}")
        print(f"{form}, accuracy: {right.float().mean():.3f}")


if __name__ == "__main__":
    if "RANK" not in os.environ:
        raise SystemExit("start it by torchrun --standalone --nproc-per-node 2 examples/train_ddp.py")
    dist.init_process_group()
    train("two calls")
    train("closure")
    gc.collect()  # DistributedDataParallel, a cycle, lets go of the group
    dist.barrier()  # gloo's threads let go of their last tensors, before Python exits
    dist.destroy_process_group()
