"""Stop at any step, resume from files: bit for bit what an uninterrupted run comes to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastsam import FusedSAM
from tests.oracle import copies, same_bits

STEPS = 7
BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (AdamW, {"lr": 0.01}),
}


class Training:
    """All that a checkpoint has to hold: dropout's random numbers too."""

    def __init__(self, seed: int, base: str, flat: bool = False, rho: float | Tensor = 0.1) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        base_class, kwargs = BASES[base]
        self.sam = FusedSAM(
            self.model.parameters(),
            base_class,
            rho=rho,
            interval=3,
            grad_scaler=self.scaler,
            flatten_parameters=flat,
            **kwargs,
        )
        self.scheduler = CosineAnnealingLR(self.sam, STEPS)

    def run(self, start: int, stop: int) -> None:
        for i in range(start, stop):
            generator = torch.Generator().manual_seed(i)
            x, y = torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                self.sam.zero_grad()
                loss = nn.functional.cross_entropy(self.model(x), y)
                self.scaler.scale(loss).backward()
                return loss

            self.sam.step(closure)
            self.scaler.update()
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "sam", "scaler", "scheduler")}
        return {**parts, "random": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("model", "sam", "scaler", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"])

    def tensors(self) -> list[Tensor]:
        state = [t for entry in self.sam.state.values() for t in entry.values() if isinstance(t, Tensor)]
        return copies([*self.model.state_dict().values(), *state])


@pytest.mark.parametrize("stop", range(STEPS))
@pytest.mark.parametrize("base", BASES)
def test_torch_save_resumes_bit_for_bit(base: str, stop: int, tmp_path: Path) -> None:
    """Interval is 3: SAM steps are 2 and 5, so this stops before, between and after them."""
    whole = Training(0, base)
    whole.run(0, STEPS)

    first = Training(0, base)
    first.run(0, stop)
    torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
    second = Training(1, base)
    second.run(0, 1)  # a run of its own, that the checkpoint has to replace
    second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    second.run(stop, STEPS)

    assert same_bits(second.tensors(), whole.tensors())
    assert second.sam.param_groups[0]["sam_step"] == STEPS
    assert second.sam.param_groups[0]["lr"] == whole.sam.param_groups[0]["lr"]
    assert second.scaler.get_scale() == whole.scaler.get_scale()


@pytest.mark.parametrize("saved_flat", [False, True])
@pytest.mark.parametrize("loaded_flat", [False, True])
def test_safetensors_holds_the_model(saved_flat: bool, loaded_flat: bool, tmp_path: Path) -> None:
    """save_file takes flattened parameters, as views that don't overlap; save_model refuses views."""
    whole = Training(0, "sgd", saved_flat)
    whole.run(0, STEPS)

    first = Training(0, "sgd", saved_flat)
    first.run(0, 4)
    save_file(first.model.state_dict(), tmp_path / "model.safetensors")
    torch.save({**first.state_dict(), "model": None}, tmp_path / "rest.pt")
    second = Training(1, "sgd", loaded_flat)
    rest = torch.load(tmp_path / "rest.pt", weights_only=True)
    second.load_state_dict({**rest, "model": load_file(tmp_path / "model.safetensors")})
    second.run(4, STEPS)

    assert same_bits(second.tensors(), whole.tensors())
    storages = {p.untyped_storage().data_ptr() for p in second.model.parameters()}
    assert len(storages) == (1 if loaded_flat else len(list(second.model.parameters())))


def test_tensor_rho_resumes(tmp_path: Path) -> None:
    whole, first, second = (Training(seed, "sgd", rho=torch.tensor(0.2)) for seed in (0, 0, 1))
    rho = second.sam.param_groups[0]["rho"]
    rho.fill_(0.7)
    torch.manual_seed(0)
    whole.run(0, STEPS)
    torch.manual_seed(0)
    first.run(0, 4)
    torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
    second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert second.sam.param_groups[0]["rho"] is rho
    second.run(4, STEPS)
    assert same_bits(second.tensors(), whole.tensors())
