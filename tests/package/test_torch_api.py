"""torch's private names that fastsam uses: each is there in this torch, and `import fastsam` survives their loss."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

FASTSAM = Path(__file__).parents[2] / "fastsam"


def optimizer():
    return torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)


def dtensor():
    return pytest.importorskip("torch.distributed.tensor").DTensor


KINDS = ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")

NAMES = {
    "torch._compile._disable_dynamo": lambda: torch._compile._disable_dynamo,
    "torch._C._dynamo.eval_frame.set_eval_frame": lambda: torch._C._dynamo.eval_frame.set_eval_frame,
    "torch._C._autograd._profiler_enabled": lambda: torch._C._autograd._profiler_enabled,
    "torch.nn.modules.batchnorm._NormBase": lambda: torch.nn.modules.batchnorm._NormBase,
    "torch.nn.modules.instancenorm._InstanceNorm": lambda: torch.nn.modules.instancenorm._InstanceNorm,
    "GradScaler._get_scale_async": lambda: GradScaler._get_scale_async,
    "GradScaler._per_optimizer_states": lambda: GradScaler("cpu")._per_optimizer_states,
    "DTensor._local_tensor": lambda: dtensor()._local_tensor,
    "Tensor._version": lambda: torch.ones(1)._version,
    "Optimizer.profile_hook_step": lambda: torch.optim.Optimizer.profile_hook_step,
    "Optimizer.step.hooked": lambda: type(optimizer()).step.hooked,
} | {
    f"Optimizer._optimizer_{kind}_hooks": lambda kind=kind: getattr(optimizer(), f"_optimizer_{kind}_hooks")
    for kind in KINDS
}


@pytest.mark.parametrize("name", NAMES)
def test_there(name):
    NAMES[name]()


def test_the_stage_of_a_scaler_that_has_unscaled():
    model = nn.Linear(2, 1)
    base, scaler = torch.optim.SGD(model.parameters(), lr=0.1), GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.unscale_(base)
    state = scaler._per_optimizer_states[id(base)]
    assert state["stage"].name == "UNSCALED"
    assert list(map(float, state["found_inf_per_device"].values())) == [0.0]


def test_private_operators():
    text = "".join(path.read_text() for path in FASTSAM.rglob("*.py"))
    names = set(re.findall(r"torch\.(_foreach_\w+)", text))
    assert {"_foreach_add_", "_foreach_copy_"} <= names
    assert not [name for name in names if not hasattr(torch, name)]


def test_no_private_module_is_imported_elsewhere():
    found = {
        path.name
        for path in FASTSAM.rglob("*.py")
        if re.search(r"torch\._C\b|torch\._compile|from torch[\w.]* import (?:\w+, )*_", path.read_text())
    }
    assert found == {"torch_api.py"}


WITHOUT = """
import torch._dynamo  # torch's own modules have their names by now
del torch._compile._disable_dynamo, torch._C._dynamo.eval_frame.set_eval_frame, torch._C._autograd._profiler_enabled
del torch.nn.modules.batchnorm._NormBase, torch.nn.modules.instancenorm._InstanceNorm
import fastsam
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
sam = fastsam.FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1)
def closure():
    sam.zero_grad()
    loss = model(torch.arange(6.0).reshape(3, 2)).pow(3).sum()
    loss.backward()
    return loss
for _ in range(2):
    with fastsam.frozen_running_stats(model):
        sam.step(closure)
assert not model[1].running_mean.any() and model[1].track_running_stats
print("stepped")
"""


def test_without_any():
    result = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=FASTSAM.parent)
    assert result.stdout.split() == ["stepped"], result.stderr
