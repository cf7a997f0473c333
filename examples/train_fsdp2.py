"""Sharded training with FSDP2 (fully_shard), mixed precision, micro-batches, and a distributed checkpoint.

    torchrun --standalone --nproc-per-node 2 examples/train_fsdp2.py /tmp/checkpoint

FusedSAM sees that the parameters are DTensors: it perturbs and restores each rank's shard, and sums the norm over the
ranks, one all-reduce of one number a step. Both passes need their gradients synchronised, so first_pass_context= is not
for FSDP2; and both need the weights resharded after backward, which is fully_shard's default. After
set_reshard_after_backward(False), call reshard() on each sharded module after first_step and second_step.

The checkpoint is loaded on any number of ranks, and training goes on where it was, also between the steps of interval=.
"""

import gc
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits  # pip install scikit-learn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fastsam import FusedSAM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MICRO_BATCHES = 2


def build() -> tuple[nn.Sequential, FusedSAM]:
    """The parameters stay fp32, and so do the perturbed ones; bf16 copies of them compute."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(DEVICE)
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))  # of two dimensions: replicated, then sharded (HSDP)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    # After fully_shard, which replaces the parameters.
    return model, FusedSAM(model.parameters(), torch.optim.AdamW, rho=0.1, interval=2, lr=1e-2)


def train(model: nn.Sequential, sam: FusedSAM, images: Tensor, labels: Tensor, epochs: int) -> None:
    for _ in range(epochs):
        for batch in torch.randperm(1500).split(100):  # the same on all ranks
            mine = batch.chunk(dist.get_world_size())[dist.get_rank()]

            def closure(mine: Tensor = mine) -> None:
                sam.zero_grad()
                for part in (parts := mine.chunk(MICRO_BATCHES)):
                    model.set_requires_gradient_sync(part is parts[-1])
                    loss = nn.functional.cross_entropy(model(images[part]), labels[part]) * len(part) / len(mine)
                    loss.backward()

            sam.step(closure)


def main(folder: str) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    images, labels = (torch.as_tensor(a, device=DEVICE) for a in load_digits(return_X_y=True))
    images = images.float() / 16

    model, sam = build()
    train(model, sam, images, labels, epochs=3)
    model_state, sam_state = get_state_dict(model, sam)
    dcp.save({"model": model_state, "sam": sam_state}, checkpoint_id=folder)

    model, sam = build()
    model_state, sam_state = get_state_dict(model, sam)
    dcp.load({"model": model_state, "sam": sam_state}, checkpoint_id=folder)
    set_state_dict(model, sam, model_state_dict=model_state, optim_state_dict=sam_state)
    train(model, sam, images, labels, epochs=5)

    right = model(images[1500:]).argmax(1) == labels[1500:]
    if dist.get_rank() == 0:
        print(f"steps: {sam.param_groups[0]['sam_step']}")
        print(f"accuracy: {right.float().mean():.3f}")
    gc.collect()  # the model, a cycle, lets go of the group
    dist.barrier()  # gloo's threads let go of their last tensors, before Python exits
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" not in os.environ:
        raise SystemExit("start it by torchrun --standalone --nproc-per-node 2 examples/train_fsdp2.py [FOLDER]")
    main(folder=sys.argv[1] if len(sys.argv) > 1 else "fsdp2-checkpoint")
