"""What `make cuda-build-check` runs on a wheel with both native libraries, under a torch built for CUDA and another
that is not; a GPU may be there or not.

    python cuda_build_check.py WHEEL
"""

import importlib
import sys
import tempfile
import zipfile


def main(wheel):
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        sys.path.insert(0, folder)
        check(folder)


def check(folder):
    import torch

    import fastsam
    from fastsam import backends

    assert fastsam.__file__.startswith(folder), fastsam.__file__
    gpu = torch.cuda.is_available()
    reason = backends.missing("cuda")
    if torch.version.cuda is None:
        assert reason is not None, "the CUDA library was loaded by a torch without CUDA"
        assert "is a build without CUDA" in reason, reason
    else:
        library = importlib.import_module("fastsam._C_cuda")
        importlib.import_module("fastsam._C")
        assert library.oldest_architecture() >= 75
        for op in ("norm", "combine", "perturb", "restore"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastsam::{op}", "CUDA"), op
        assert (reason is None) == gpu, reason
        assert gpu or "no CUDA device" in reason, reason
        assert gpu or "no CUDA device" in backends.missing("triton"), backends.missing("triton")
    assert ("cuda" in fastsam.available_backends()) == (gpu and torch.version.cuda is not None)

    for device, backend in [("cpu", "cpp"), *([("cuda", "cuda")] if reason is None else [])]:
        w = torch.nn.Parameter(torch.ones(5, device=device))
        sam = fastsam.FusedSAM([w], torch.optim.SGD, lr=0.5, backend=backend)
        w.grad = torch.full_like(w, 2.0)
        sam.first_step(zero_grad=True)
        assert bool((w > 1).all()), w
        w.grad = torch.ones_like(w)
        sam.second_step()
        assert torch.equal(w.detach().cpu(), torch.full((5,), 0.5)), w
    print(f"torch {torch.__version__}: cpp works; cuda: {reason or 'works'}")


if __name__ == "__main__":
    main(sys.argv[1])
