"""examples/train_classic.py in whole runs: against a loop without fastsam, stopped and resumed, on two processes."""

import argparse
import importlib
import math
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.oracle import copies, same_bits
from tests.ranks import assert_same_bits, flat, launch, on_ranks

CHANCE = 0.1
TOL = 1e-5
"""Seen: 5e-7 after 15 steps."""
BATCH, STEPS = 50, 5
"""Of an epoch in most tests; an odd number, so that interval=2 does not begin anew with an epoch."""

script = importlib.import_module("examples.train_classic")


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "TRAINING_IMAGES", BATCH * STEPS)


def run(output: Path, *flags: str) -> dict[str, Any]:
    """The checkpoint that the script leaves."""
    script.main(["--device", "cpu", "--output", str(output), *flags])
    return torch.load(output)


# -- the oracle: the same training in plain torch ----------------------------------------------------------------------


def oracle(flags: list[str], ranks: int = 1) -> dict[str, Any]:
    """As the script's flags ask for it, in fp32: state dicts of the network and of its EMA, the last epoch's mean loss.

    Of several ranks each climbs by the gradient of its own samples. Their statistics of BatchNorm are not kept apart.
    """
    args = script.parse(flags)
    torch.manual_seed(args.seed)
    net = script.cnn()
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim == 1]
    sgd = torch.optim.SGD(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors}], args.lr, args.momentum
    )
    average: dict[str, Tensor] = {}
    losses = []
    for step, shares in enumerate(zip(*(list(batches(args, ranks, rank)) for rank in range(ranks)), strict=True)):
        for group in sgd.param_groups:
            group["lr"] = args.lr * rate(step, args.warmup_epochs * STEPS, args.epochs * STEPS)
        climbs = args.sam and (step + 1) % args.interval == 0
        passes = [gradients(net, x, y, args.rho if climbs else 0.0, args) for x, y in shares]
        losses.append(passes[0][0])
        for p, *g in zip(net.parameters(), *(g for _, g in passes), strict=True):
            p.grad = sum(g) / ranks
        if args.clip_grad_norm is not None:
            norm = flat([p.grad for p in net.parameters()]).norm()
            for p in net.parameters():
                p.grad *= min(1.0, args.clip_grad_norm / norm)
        sgd.step()
        for name, t in net.state_dict().items():
            rest = 1 - args.ema_decay if step else 1.0
            average[name] = (average.get(name, 0) * (1 - rest) + t * rest).to(t.dtype)
    return {"model": dict(net.state_dict()), "ema": average, "loss": sum(losses[-STEPS:]) / STEPS}


def batches(args: argparse.Namespace, ranks: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = (torch.as_tensor(a)[: ranks * BATCH * STEPS] for a in load_digits(return_X_y=True))
    images = images.float().reshape(-1, 1, 8, 8) / 16
    data = TensorDataset(images, labels)
    sampler = DistributedSampler(data, ranks, rank, seed=args.seed)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        torch.manual_seed(args.seed + epoch * ranks + rank)
        for x, y in DataLoader(data, BATCH, sampler=sampler):
            yield script.augment(x), y


def rate(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def gradients(
    net: nn.Module, images: Tensor, labels: Tensor, rho: float, args: argparse.Namespace
) -> tuple[float, list[Tensor]]:
    """The loss at w; the gradients at w + e_w where rho is not 0. Only the pass at w moves BatchNorm's statistics."""
    weights = list(net.parameters())

    def at_these_weights() -> tuple[float, list[Tensor]]:
        total = torch.zeros(())
        for x, y in zip(images.chunk(args.accumulate), labels.chunk(args.accumulate), strict=True):
            losses = nn.functional.cross_entropy(net(x), y, label_smoothing=args.label_smoothing, reduction="none")
            total = total + losses.sum() / len(labels)
        return total.item(), list(torch.autograd.grad(total, weights))

    loss, g = at_these_weights()
    if not rho:
        return loss, g
    saved, statistics = copies(weights), copies(net.buffers())
    with torch.no_grad():
        climb = [w.abs() * g if args.adaptive else g for w, g in zip(weights, g, strict=True)]
        norm = flat(climb).double().norm()
        for w, c in zip(weights, climb, strict=True):
            w += (w.abs() if args.adaptive else 1) * c * (rho / norm)
    _, g = at_these_weights()
    with torch.no_grad():
        for t, before in zip([*weights, *net.buffers()], saved + statistics, strict=True):
            t.copy_(before)
    return loss, g


def averaged(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The EMA's entries, by the network's own names."""
    return {name.removeprefix("module."): t for name, t in checkpoint["ema"].items() if name != "n_averaged"}


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--clip-grad-norm 1 --label-smoothing 0.1",
        "--sam --rho 0.1",
        "--sam --rho 0.1 --interval 2 --clip-grad-norm 1 --label-smoothing 0.1",
        "--sam --rho 0.1 --accumulate 3",  # of 17, 17 and 16 images
        "--sam --rho 0.5 --adaptive --accumulate 5",
    ],
)
@pytest.mark.usefixtures("few_images")
def test_same_as_a_loop_without_fastsam(flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--epochs", "3", *flags.split()]
    checkpoint, expected = run(tmp_path / "run.pt", *flags), oracle(flags)
    if flags == ["--epochs", "3"]:
        assert_equal(dict(checkpoint["model"]), expected["model"])
    torch.testing.assert_close(dict(checkpoint["model"]), expected["model"], rtol=TOL, atol=TOL)
    torch.testing.assert_close(averaged(checkpoint), expected["ema"], rtol=TOL, atol=TOL)
    (printed,) = re.findall(r"epoch 3: loss ([\d.]+)", capsys.readouterr().out)
    assert float(printed) == pytest.approx(expected["loss"], abs=1e-4)


@pytest.mark.parametrize("interval", ["1", "2"])
@pytest.mark.parametrize("clip", ["", "--clip-grad-norm 1"])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.usefixtures("few_images")
def test_mixed_precision_stays_near_fp32(amp: str, clip: str, interval: str, tmp_path: Path) -> None:
    """A gradient that is not unscaled, or clipped before it is, would go somewhere else altogether."""
    flags = f"--epochs 1 --sam --rho 0.1 --interval {interval} {clip}".split()
    actual = run(tmp_path / "run.pt", *flags, "--amp", amp)["model"]
    expected = oracle(flags)["model"]
    torch.manual_seed(0)
    way = {name: t - expected[name] for name, t in script.cnn().named_parameters()}
    off = flat([actual[name] - expected[name] for name in way]).norm() / flat(list(way.values())).norm()
    assert off < 0.1


@pytest.mark.parametrize("flags", ["", "--sam --rho 0.1"])
def test_learns(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(["--device", "cpu", "--epochs", "5", *flags.split()])
    check_accuracies(dict(line.split(": ") for line in capsys.readouterr().out.splitlines()))


def check_accuracies(printed: dict[str, str]) -> None:
    assert float(printed["accuracy"]) > 8 * CHANCE
    assert float(printed["ema accuracy"]) > 8 * CHANCE


class Stopped(Exception):
    pass


class StopAtPass:
    """Calls `stop` in the n-th forward pass in training mode, and keeps the weights of the pass before."""

    def __init__(self, n: int, stop: Callable[[], None]) -> None:
        self.n, self.stop = n, stop
        self.passes = 0
        self.before: list[Tensor] = []

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if isinstance(module, nn.Sequential) and module.training:
            self.passes += 1
            if self.passes == self.n - 1:
                self.net, self.before = module, copies(module.parameters())
            elif self.passes == self.n:
                assert not same_bits(copies(module.parameters()), self.before)  # they are at w + e_w
                self.stop()

    def __enter__(self) -> "StopAtPass":
        self.hook = nn.modules.module.register_module_forward_hook(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def fail() -> None:
    raise Stopped


@pytest.mark.parametrize(
    ("stop", "raised"), [(fail, Stopped), (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt)]
)
@pytest.mark.usefixtures("few_images", "sigint")
def test_stopped_in_the_second_pass_the_network_is_at_w(stop: Callable[[], None], raised: type) -> None:
    with StopAtPass(8, stop) as stopped, pytest.raises(raised):
        script.main(["--device", "cpu", "--sam", "--rho", "0.1"])
    assert same_bits(copies(stopped.net.parameters()), stopped.before)
    assert all(m.momentum == 0.1 and m.track_running_stats for m in stopped.net if isinstance(m, nn.BatchNorm2d))


@pytest.mark.usefixtures("few_images")
def test_batchnorm_counts_each_batch_once(tmp_path: Path) -> None:
    for flags, passes in (("--sam", 1), ("--sam --interval 2", 1), ("--sam --accumulate 3", 3)):
        model = run(tmp_path / "run.pt", "--epochs", "2", *flags.split())["model"]
        assert model["1.num_batches_tracked"] == 2 * STEPS * passes


def check_resume(folder: Path, flags: list[str], at_pass: int) -> None:
    """Stopped in the second pass of a step of the last epoch, then resumed; against a run without a stop."""
    flags = ["--device", "cpu", "--epochs", "3", *flags]
    script.TRAINING_IMAGES = BATCH * STEPS * world_size()
    script.main([*flags, "--output", str(folder / "whole.pt")])
    with StopAtPass(at_pass, fail), pytest.raises(Stopped):
        script.main([*flags, "--output", str(folder / "run.pt")])
    if dist.is_initialized():
        dist.barrier()
    assert torch.load(folder / "run.pt")["epochs"] == 2
    script.main([*flags, "--output", str(folder / "run.pt"), "--resume", str(folder / "run.pt")])
    if dist.is_initialized():
        dist.barrier()
    whole, resumed = (torch.load(folder / name) for name in ("whole.pt", "run.pt"))
    assert whole["epochs"] == resumed["epochs"] == 3
    assert_equal(whole, resumed)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def assert_equal(a: Any, b: Any) -> None:
    """To the bit, whatever is inside."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_resuming_equals_not_stopping(amp: str, tmp_path: Path, few_images: None) -> None:
    # Of 10 steps every second one has two passes: 15. Then come 16, of a plain step, and 17 and 18.
    check_resume(tmp_path, ["--sam", "--rho", "0.1", "--interval", "2", "--amp", amp], at_pass=18)


@pytest.mark.usefixtures("few_images")
def test_going_on_with_sam_where_a_plain_run_ended(tmp_path: Path) -> None:
    """And the other way round: fastsam's keys in the param groups do no harm to SGD."""
    path = tmp_path / "run.pt"
    for epochs, flags in ((1, []), (2, ["--sam", "--rho", "0.1", "--amp", "fp16"]), (3, [])):
        run(path, "--epochs", str(epochs), *(["--resume", str(path)] if epochs > 1 else []), *flags)
    assert torch.load(path)["optimizer"]["param_groups"][0]["sam_step"] == STEPS


def check_replicas(flags: list[str]) -> list[Tensor]:
    nets: list[nn.Module] = []

    def cnn() -> nn.Module:
        nets.append(make())
        return nets[-1]

    make, script.cnn = script.cnn, cnn
    script.TRAINING_IMAGES = 2 * BATCH * STEPS
    try:
        script.main(["--device", "cpu", *flags])
    finally:
        script.cnn = make
    for t in nets[0].state_dict().values():
        assert_same_bits(t)
    return copies(nets[0].parameters())


@pytest.mark.parametrize("interval", ["1", "2"])
def test_replicas_stay_equal_and_climb_by_their_own_gradients(interval: str) -> None:
    flags = ["--sam", "--rho", "0.1", "--interval", interval, "--epochs", "1"]
    trained, _ = on_ranks(2, check_replicas, flags)
    expected = oracle(flags, ranks=2)["model"]
    for (name, _), p in zip(script.cnn().named_parameters(), trained, strict=True):
        torch.testing.assert_close(p, expected[name], rtol=TOL, atol=TOL)


def test_resuming_two_processes_equals_not_stopping(tmp_path: Path) -> None:
    # Two micro-batches make twice as many: 32, then 33 and 34 at w, 35 and 36 above it.
    on_ranks(2, check_resume, tmp_path, ["--sam", "--rho", "0.1", "--interval", "2", "--accumulate", "2"], 35)


def test_learns_on_two_processes() -> None:
    flags = "--device cpu --sam --rho 0.1 --lr 0.1 --batch-size 25 --epochs 5 --clip-grad-norm 5"
    check_accuracies(launch("train_classic.py", *flags.split()))
