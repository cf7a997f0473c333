"""What holds where Triton's interpreter is on: test_triton.py runs this in a process where it is."""

import pytest
import torch

from fastsam import backends


def test_interpreted_triton_serves_the_cpu_only_and_never_by_default():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert backends.missing("triton") is None
    assert backends.default(cpu) != "triton"
    assert backends.default(cuda) != "triton"
    assert backends.load("triton", cpu).__name__ == "fastsam.backends.triton"
    with pytest.raises(ValueError, match="serves cpu tensors"):
        backends.load("triton", cuda)
