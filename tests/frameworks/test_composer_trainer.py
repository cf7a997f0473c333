"""fastsam.composer in Composer's own Trainer, beside Composer's own SAM."""

import copy
import inspect
import os
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("composer.core", reason="Composer is not installed: make composer-check")
from composer import ComposerModel, Trainer
from composer.algorithms import sam as theirs
from composer.core import Event
from composer.loggers import InMemoryLogger
from composer.optim import CosineAnnealingScheduler, DecoupledAdamW, DecoupledSGDW
from composer.trainer._scaler import ClosureGradScaler
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastsam
from fastsam import composer as ours, notices
from tests.oracle import copies, same_bits
from tests.ranks import assert_same_bits, flat, on_ranks

BATCH = 16
LR, MOMENTUM = 0.1, 0.9
FP32 = {"rtol": 1e-4, "atol": 2e-6}
BASES = {
    "SGD": lambda params: torch.optim.SGD(params, lr=LR, momentum=MOMENTUM),
    "DecoupledSGDW": lambda params: DecoupledSGDW(params, lr=LR, momentum=MOMENTUM, weight_decay=1e-3),
    "DecoupledAdamW": lambda params: DecoupledAdamW(params, lr=1e-2, weight_decay=1e-3),
}


class Digits(ComposerModel):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1])


def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.as_tensor(images[:320]).float() / 16, torch.as_tensor(labels[:320])


class Run:
    """One training: the weights it ended at, and the losses it logged."""

    def __init__(self, algorithm=None, base="SGD", batches=12, wrap=lambda base: base, device="cpu", **options):
        torch.manual_seed(0)
        self.model = Digits()
        self.start = copy.deepcopy(self.model)
        data = TensorDataset(*digits())
        ranks = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        sampler = DistributedSampler(data, shuffle=False) if ranks else None
        log = InMemoryLogger()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Composer's own, many
            self.trainer = Trainer(
                model=self.model,
                train_dataloader=DataLoader(data, BATCH, sampler=sampler),
                optimizers=wrap(BASES[base](self.model.parameters())),
                algorithms=algorithm,
                max_duration=f"{batches}ba",
                device=device,
                loggers=log,
                progress_bar=False,
                seed=1,
                **options,
            )
            self.trainer.fit()
        self.optimizer = self.trainer.state.optimizers[0]
        self.weights = copies(self.model.parameters())
        self.losses = [loss for _, loss in log.data["loss/train/total"]]
        self.perturbed = [(int(time.batch), loss) for time, loss in log.data.get("loss/train/perturbed", [])]
        self.trainer.close()


def assert_same_training(a, b, **tolerance):
    torch.testing.assert_close(a.weights, b.weights, **tolerance)
    torch.testing.assert_close(a.losses, b.losses, **tolerance)


@pytest.mark.parametrize("name", ["SAM", "SAMOptimizer"])
def test_the_signature_is_composers(name):
    def parameters(module):
        found = inspect.signature(getattr(module, name)).parameters.values()
        return [(p.name, p.kind, p.default) for p in found]

    expected = parameters(theirs)
    assert parameters(ours)[: len(expected)] == expected
    assert {name for name, _, _ in parameters(ours)[len(expected) :]} <= {"start", "kwargs"}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("rho", "interval"), [(0.05, 1), (0.5, 10)])
@pytest.mark.parametrize("microbatch", [None, 6])
def test_it_trains_as_composers_sam(base, rho, interval, microbatch):
    options = {"base": base, "batches": 20 if interval == 10 else 12, "device_train_microbatch_size": microbatch}
    a = Run(ours.SAM(rho, interval=interval), **options)
    b = Run(theirs.SAM(rho, interval=interval), **options)
    plain = Run(**options)
    assert type(a.optimizer) is ours.SAMOptimizer
    assert_same_training(a, b, **FP32)
    with pytest.raises(AssertionError):
        assert_same_training(a, plain, **FP32)
    assert a.optimizer.global_step == options["batches"]


@pytest.mark.parametrize("start", [8, "8ba", "0.66dur"])
def test_start(start):
    """From step 8 of 12 on: before it plain steps, from it on SAM steps."""
    late = Run(ours.SAM(0.1, start=start))
    assert late.losses[:8] == Run().losses[:8]
    wrapped = Run(wrap=lambda base: ours.SAMOptimizer(base, 0.1, start=8))
    assert_same_training(late, wrapped, rtol=0, atol=0)
    for other in (Run(), Run(ours.SAM(0.1)), Run(ours.SAM(0.1, start=9))):
        with pytest.raises(AssertionError):
            assert_same_training(late, other, **FP32)


@pytest.mark.parametrize("interval", [1, 3])
def test_the_perturbed_loss_is_logged(interval):
    """The first SAM step's by hand; that of plain steps not at all."""
    run = Run(ours.SAM(0.5, interval=interval), batches=6)
    assert len(run.perturbed) == 6 // interval
    assert run.perturbed[-1][1] == pytest.approx(float(run.optimizer.perturbed_loss))
    assert all(loss > run.losses[interval - 1 :: interval][i] for i, (_, loss) in enumerate(run.perturbed))
    if interval == 1:
        x, y = (t[:BATCH] for t in digits())
        params = list(run.start.parameters())
        loss = nn.functional.cross_entropy(run.start([x]), y)
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p += 0.5 * g / flat(grads).norm()
            expected = nn.functional.cross_entropy(run.start([x]), y)
        assert run.losses[0] == pytest.approx(float(loss), rel=1e-5)
        assert run.perturbed[0][1] == pytest.approx(float(expected), rel=1e-5)
    assert not Run(ours.SAM(0.1, direction="momentum"), batches=3).perturbed


def test_a_part_of_the_model():
    """Groups of the optimizer that the Trainer was given."""

    def groups(params):
        params = list(params)
        return torch.optim.SGD([{"params": params[:2], "perturb": False}, {"params": params[2:]}], lr=LR)

    BASES["part"] = groups
    try:
        run = Run(ours.SAM(0.5), base="part", batches=3)
    finally:
        del BASES["part"]
    assert [group["perturb"] for group in run.optimizer.param_groups] == [False, True]
    ((_, bucket),) = run.optimizer._state.perturbation.buckets
    assert len(bucket.params) == 2


@pytest.mark.parametrize("start", ["soon", "-1", "0.7"])
def test_a_start_that_is_no_time(start):
    with pytest.raises(ValueError, match="time strings"):
        ours.SAM(start=start)


def test_momentum():
    """One gradient a step, at w~, whose loss is the one that is logged; against Momentum-SAM by hand."""
    run = Run(ours.SAM(0.1, direction="momentum"))
    model = copy.deepcopy(run.start)
    base = BASES["SGD"](model.parameters())
    x, y = digits()
    losses = []
    for i in range(12):
        w = copies(model.parameters())
        v = [base.state[p].get("momentum_buffer") for p in model.parameters()]
        if i:
            norm = torch.stack([t.norm() for t in v]).norm()
            with torch.no_grad():
                for p, t in zip(model.parameters(), v, strict=True):
                    p.sub_(0.1 / norm * t)
        base.zero_grad()
        batch = x[BATCH * i : BATCH * (i + 1)], y[BATCH * i : BATCH * (i + 1)]
        loss = model.loss(model(batch), batch)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p, t in zip(model.parameters(), w, strict=True):
                p.copy_(t)
        base.step()
    torch.testing.assert_close(run.weights, copies(model.parameters()), **FP32)
    torch.testing.assert_close(run.losses, losses, **FP32)


def test_the_optimizer_may_be_wrapped_beforehand():
    wrapped = Run(wrap=lambda base: ours.SAMOptimizer(base, 0.1, interval=2))
    assert_same_training(wrapped, Run(ours.SAM(0.1, interval=2)), rtol=0, atol=0)


def test_fused_sam_itself_says_what_to_use(monkeypatch):
    """In Composer's Trainer it trains well, but both gradients are synchronised, and the logs count both losses."""
    monkeypatch.setattr(notices, "told", set())
    said = []
    monkeypatch.setattr(notices.warnings, "warn", lambda text, **_: said.append(text))
    run = Run(wrap=lambda base: fastsam.FusedSAM(base, 0.1))
    assert len([text for text in said if "use fastsam.composer.SAM" in text]) == 1
    expected = Run(ours.SAM(0.1))
    torch.testing.assert_close(run.weights, expected.weights, **FP32)
    assert run.losses[0] > 1.5 * expected.losses[0]


def test_schedulers_train_on():
    schedule = CosineAnnealingScheduler(t_max="12ba")
    a = Run(ours.SAM(0.1), schedulers=schedule)
    assert_same_training(a, Run(theirs.SAM(0.1), schedulers=schedule), **FP32)
    assert a.optimizer.param_groups[0]["lr"] < 0.1 * LR


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("interval", [1, 3])
def test_resuming_equals_not_stopping(base, interval, tmp_path):
    """Step 6 of 12 is in the middle of an interval. Momentum, the count of steps and the schedule go on."""
    options = {"base": base, "schedulers": CosineAnnealingScheduler(t_max="12ba")}
    save = {"save_folder": str(tmp_path), "save_interval": "7ba"}
    whole = Run(ours.SAM(0.1, interval=interval), **options, **save)
    resumed = Run(ours.SAM(0.1, interval=interval), **options, load_path=str(tmp_path / "ep0-ba7-rank0.pt"))
    assert same_bits(resumed.weights, whole.weights)
    assert resumed.losses == whole.losses[7:]
    assert resumed.optimizer.global_step == 12


def test_a_checkpoint_of_composers_sam_is_loaded(tmp_path):
    """Theirs holds no state of the base optimizer: the weights go on, momentum and the count of steps start anew."""
    before = Run(theirs.SAM(0.1), batches=7, save_folder=str(tmp_path), save_interval="7ba")
    loaded = Run(ours.SAM(0.1), batches=8, load_path=str(tmp_path / "ep0-ba7-rank0.pt"))
    expected = by_hand(before.model, 0.1, 1, steps=range(7, 8), ranks=1)
    torch.testing.assert_close(loaded.weights, expected, **FP32)
    assert loaded.optimizer.global_step == 1


def test_what_fails_at_w_plus_e_w_leaves_w():
    class Failing(Digits):
        def forward(self, batch):
            if optimizer.perturbed:
                seen.append(copies(self.parameters()))
                raise MemoryError
            return super().forward(batch)

    seen, model = [], Failing()
    optimizer = ours.SAMOptimizer(BASES["SGD"](model.parameters()))
    w = copies(model.parameters())
    data = DataLoader(TensorDataset(*digits()), BATCH)
    trainer = Trainer(model=model, train_dataloader=data, optimizers=optimizer, max_duration="1ba", progress_bar=False)
    with pytest.raises(MemoryError):
        trainer.fit()
    assert not same_bits(seen[0], w)
    assert same_bits(copies(model.parameters()), w)


def test_the_algorithm_by_itself():
    run = Run(batches=1)
    state, sam = run.trainer.state, ours.SAM(0.3, 1e-9, 4)
    base = state.optimizers[0]
    matched = [event for event in Event if sam.match(event, state)]
    assert matched == [Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.BATCH_END]
    sam.apply(Event.BEFORE_LOAD, state, None)
    (wrapped,) = state.optimizers
    scaler = state.scaler
    assert type(scaler) is ClosureGradScaler
    assert wrapped.base_optimizer is base
    assert (wrapped.param_groups[0]["rho"], wrapped.param_groups[0]["epsilon"], wrapped.interval) == (0.3, 1e-9, 4)
    sam.apply(Event.AFTER_LOAD, state, None)
    assert state.optimizers[0] is wrapped
    assert state.scaler is scaler
    assert sam.state_dict() == {"repr": "SAM(rho=0.3, epsilon=1e-09, interval=4, start=0)"}


@pytest.mark.parametrize("options", [{"rho": -0.1}, {"epsilon": float("nan")}, {"interval": 0}])
def test_bad_options_are_refused_at_once(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ours.SAM(**options)


# -- loss scaling ------------------------------------------------------------------------------------------------------


def scaled_training(make, steps, scale, overflow=()):
    """As the Trainer does under amp_fp16, which it refuses on CPU: its ClosureGradScaler, its order of calls.

    `overflow` names passes, (step, pass), whose loss is infinite.
    """
    torch.manual_seed(0)
    model = Digits()
    sam = make(BASES["SGD"](model.parameters()))
    scaler = ClosureGradScaler("cpu", init_scale=scale)
    x, y = digits()
    trajectory, passes = [], []

    def closure(**kwargs):
        sam.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model.loss(model((x, y)), (x, y))
        if (len(trajectory), len(passes)) in overflow:
            loss = loss * float("inf")
        passes.append(kwargs)
        scaler.scale(loss).backward()
        scaler.unscale_(sam)
        return loss.detach()

    for _ in range(steps):
        passes.clear()
        scaler.step(sam, closure=closure)
        scaler.update()
        trajectory.append(copies(model.parameters()))
    return trajectory, scaler.get_scale()


def test_loss_scaling_trains_as_composers_sam():
    a, scale = scaled_training(lambda base: ours.SAMOptimizer(base, 0.1), 8, 1024.0)
    b, _ = scaled_training(lambda base: theirs.SAMOptimizer(base, 0.1), 8, 1024.0)
    assert scale == 1024
    torch.testing.assert_close(a[-1], b[-1], rtol=1e-3, atol=1e-4)  # autocast rounds to fp16
    moved = flat(a[-1]) - flat(a[0])
    assert moved.norm() > 0.1


@pytest.mark.parametrize("failing", [0, 1], ids=["at w", "at w + e_w"])
def test_an_overflow_skips_the_step_and_lowers_the_scale(failing):
    trajectory, scale = scaled_training(lambda base: ours.SAMOptimizer(base, 0.1), 6, 1024.0, overflow={(3, failing)})
    assert scale == 512
    assert same_bits(trajectory[3], trajectory[2])
    assert not same_bits(trajectory[4], trajectory[3])


# -- two ranks ---------------------------------------------------------------------------------------------------------


def two_ranks(interval, microbatch):
    rank = str(torch.distributed.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2", NODE_RANK="0")  # as Composer's launcher does
    options = {"device_train_microbatch_size": microbatch, "batches": 8}
    a = Run(ours.SAM(0.5, interval=interval), **options)
    assert_same_bits(flat(a.weights))
    b = Run(theirs.SAM(0.5, interval=interval), **options)
    torch.testing.assert_close(a.weights, b.weights, **FP32)
    oracle = by_hand(a.start, 0.5, interval, steps=range(8), ranks=2)
    torch.testing.assert_close(a.weights, oracle, **FP32)


def by_hand(model, rho, interval, steps, ranks):
    """Each rank climbs by the gradient of its own samples; the step is by the mean of the ranks' second gradients."""
    params = list(model.parameters())
    momentum = [torch.zeros_like(p) for p in params]
    x, y = digits()

    def gradients(rank, k):
        batch = x[rank::ranks].split(BATCH)[k], y[rank::ranks].split(BATCH)[k]
        return torch.autograd.grad(model.loss(model(batch), batch), params)

    for k in steps:
        w, mean = copies(params), [torch.zeros_like(p) for p in params]
        for rank in range(ranks):
            if (k + 1) % interval == 0:
                g = gradients(rank, k)
                with torch.no_grad():
                    for p, t in zip(params, g, strict=True):
                        p += rho * t / flat(g).norm()
            for m, t in zip(mean, gradients(rank, k), strict=True):
                m += t / ranks
            with torch.no_grad():
                for p, before in zip(params, w, strict=True):
                    p.copy_(before)
        with torch.no_grad():
            for p, b, m in zip(params, momentum, mean, strict=True):
                b.mul_(MOMENTUM).add_(m)
                p -= LR * b
    return [p.detach() for p in params]


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("microbatch", [None, 8])
def test_two_ranks_climb_by_their_own_gradients(interval, microbatch):
    on_ranks(2, two_ranks, interval, microbatch)


# -- GPU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "amp_fp16"])
@pytest.mark.parametrize("interval", [1, 3])
def test_on_a_gpu_it_trains_as_composers_sam(precision, interval):
    a = Run(ours.SAM(0.1, interval=interval), device="gpu", precision=precision)
    b = Run(theirs.SAM(0.1, interval=interval), device="gpu", precision=precision)
    tolerance = FP32 if precision == "fp32" else {"rtol": 5e-2, "atol": 5e-3}
    torch.testing.assert_close(a.weights, b.weights, **tolerance)
    assert a.losses[-1] < a.losses[0]
