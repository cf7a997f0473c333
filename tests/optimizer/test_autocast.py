"""autocast caches its casts of the weights: both passes in one block must see their own weights."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from fastsam import FusedSAM
from tests.oracle import copies, same_bits
from tests.scaled import RHO, PlainTorch, batches, make_model, make_scaler, nothing, two_calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fresh", [False, True], ids=["closure runs twice", "closure runs once"])
def test_one_autocast_block_around_the_step_uses_the_perturbed_weights(dtype: torch.dtype, fresh: bool) -> None:
    """autocast caches its casts of w; the second forward must not find them, nor the next step those of w + e_w."""
    model = make_model(torch.float32)
    passes = "one" if fresh else "auto"  # the closure clears
    sam = FusedSAM(model.parameters(), SGD, rho=1.0, lr=0.1, closure_passes=passes)
    x, y = next(batches(1, torch.float32))
    outputs: list[Tensor] = []
    expected: list[Tensor] = []

    def closure() -> Tensor:
        sam.zero_grad()
        out = model(x)
        with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
            expected.append(copy.deepcopy(model)(x).detach())
        outputs.append(out.detach())
        loss = nn.functional.cross_entropy(out.float(), y)
        loss.backward()
        return loss

    with torch.autocast("cpu", dtype=dtype):
        for _ in range(2):
            if fresh:
                closure()
            sam.step(closure)
    assert len(outputs) == 4
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(outputs))


def test_fp16_autocast_finds_its_scale_as_plain_torch_does() -> None:
    """A scale that overflows fp16 by itself: it backs off until it fits, then training goes on."""
    plain, model, scaler = PlainTorch(SGD, {"lr": 0.1}, torch.float32), make_model(torch.float32), make_scaler()
    for each in (plain.scaler, scaler):
        each.load_state_dict({**each.state_dict(), "scale": 2.0**22})
    sam = FusedSAM(model.parameters(), SGD, rho=RHO, lr=0.1)
    scales = []
    for batch in batches(12, torch.float32):
        with torch.autocast("cpu", dtype=torch.float16, cache_enabled=False):
            plain.step(batch)
        with torch.autocast("cpu", dtype=torch.float16):
            two_calls(sam, model, scaler, batch, nothing)
        scales.append(scaler.get_scale())
        assert scales[-1] == plain.scaler.get_scale()
    assert scales[0] == 2.0**21
    assert max(scales) > min(scales)
    assert not same_bits(copies(model.parameters()), copies(make_model(torch.float32).parameters()))
    torch.testing.assert_close(list(model.parameters()), list(plain.model.parameters()), rtol=1e-2, atol=1e-3)
