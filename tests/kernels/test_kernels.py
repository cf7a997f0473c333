"""The kernels by themselves, bucket by bucket, against the reference backend: every alignment, edge and flag.

A fused backend runs here on the device that it serves; Triton on the CPU where its interpreter is on (test_triton.py),
and the CUDA kernels also by an emulator (emulated_cuda.py).
"""

import itertools
import os

import pytest
import torch

from fastsam import backends
from fastsam.bucket import ParameterBucket
from fastsam.scalars import Scalars
from tests.kernels import emulated_cuda
from tests.oracle import DTYPES, NORM_TOLERANCE, assert_perturbed, bits, copies, is_exact, norm64, same_bits

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMS = {"sam": [False, False], "asam": [True, True], "mixed": [True, False]}
CHUNK = 256


def pytest_generate_tests(metafunc):
    if "kernels" in metafunc.fixturenames:
        pairs = [("cpp", "cpu"), ("emulated", "cpu"), ("cuda", "cuda"), ("triton", "cpu" if INTERPRETED else "cuda")]
        marks = {"cuda": [pytest.mark.gpu], "cpu": []}
        values = [pytest.param((name, device), id=f"{name}-{device}", marks=marks[device]) for name, device in pairs]
        metafunc.parametrize("kernels", values, indirect=True)


@pytest.fixture
def kernels(request):
    """(name, device, backend)."""
    name, device = request.param
    if name == "emulated":
        return name, torch.device(device), emulated_cuda
    reason = backends.missing(name)
    if reason is not None:
        pytest.skip(f"backend {name} is missing: {reason}")
    return name, torch.device(device), backends.load(name, torch.device(device))


class Arena:
    """Tensors at chosen misalignments in one allocation, with a pattern between them that nobody may write to."""

    def __init__(self, device, dtype, sizes, misalignments, seed):
        line = 64 // dtype.itemsize
        starts, end = [], line
        for size, misalignment in zip(sizes, misalignments, strict=True):
            starts.append(end + misalignment)
            end += -(-(misalignment + size + 1) // line) * line
        generator = torch.Generator().manual_seed(seed)
        self.memory = torch.randn(end + line, generator=generator, dtype=torch.float64).to(dtype).to(device)
        assert self.memory.data_ptr() % 64 == 0
        # .data: a version of its own
        self.tensors = [self.memory[start : start + size].data for start, size in zip(starts, sizes, strict=True)]
        self.gaps = torch.ones(len(self.memory), dtype=torch.bool, device=device)
        for start, size in zip(starts, sizes, strict=True):
            self.gaps[start : start + size] = False
        self.pattern = self.memory[self.gaps].clone()

    def intact(self):
        return same_bits(self.memory[self.gaps], self.pattern)


class Case:
    """One bucket of the backend under test, and its twin for the reference."""

    def __init__(self, kernels, dtype, sizes, form="sam", places=None, missing=(), chunk=CHUNK, rho=(0.3, 2.0)):
        self.name, device, self.backend = kernels
        places = places or [(0, 0)] * len(sizes)
        self.w = Arena(device, dtype, sizes, [a for a, _ in places], seed=0)
        self.g = Arena(device, dtype, sizes, [b for _, b in places], seed=1)
        self.groups = [i % 2 for i in range(len(sizes))]
        self.adaptive = FORMS[form]
        self.missing = missing
        self.before = copies(self.w.tensors)
        self.bucket = self._bucket(self.w.tensors, self.g.tensors, lambda numel: chunk)
        self.twin = self._bucket(copies(self.w.tensors), copies(self.g.tensors), lambda numel: max(numel, 1))
        self.scalars, self.expected = (self._scalars(device, dtype, rho) for _ in range(2))

    def _bucket(self, weights, grads, chunk_size):
        for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
            w.grad = None if i in self.missing else g
        bucket = ParameterBucket(weights, self.groups, ["w"] * len(weights), 0, chunk_size)
        bucket.gather()
        return bucket

    def _scalars(self, device, dtype, rho):
        scalars = Scalars(device, torch.float64 if dtype is torch.float64 else torch.float32, 2, 1)
        scalars.set_groups([*rho], [1e-12, 0.5], self.adaptive)
        return scalars

    def norm(self):
        self.backend.norm(self.bucket, self.scalars, True)
        backends.load("reference", self.bucket.device).norm(self.twin, self.expected, True)

    def perturb(self):
        """Perturbs both by the scale that the backend under test came to."""
        self.expected.norm.copy_(self.scalars.norm)
        self.expected.scale.copy_(self.scalars.scale)
        self.backend.perturb(self.bucket, self.scalars)
        backends.load("reference", self.bucket.device).perturb(self.twin, self.expected)

    def check(self):
        """A whole ascent and its restore."""
        self.norm()
        flags = [self.adaptive[group] for group in self.groups]
        grads = [None if i in self.missing else g for i, g in enumerate(self.g.tensors)]
        tolerance = 1e-14 if self.bucket.dtype is torch.float64 else NORM_TOLERANCE
        assert float(self.scalars.norm) == pytest.approx(norm64(self.before, grads, flags), rel=tolerance)
        assert int(self.bucket.saved) == int(self.bucket.counter) == 0
        reciprocal = (self.scalars.norm + self.scalars.epsilon).reciprocal()
        assert same_bits(self.scalars.scale, reciprocal * self.scalars.rho)

        self.perturb()
        assert int(self.bucket.saved) == self.bucket.generation != 0
        for i, (w, twin) in enumerate(zip(self.w.tensors, self.twin.weights, strict=True)):
            if i in self.missing:
                assert same_bits(w, self.before[i])
            else:
                assert_perturbed(self.name, w, twin)
        saved = zip(self.bucket.live(), self.bucket.live_views(self.bucket.backup), strict=True)
        assert all(same_bits(view, self.before[i]) for i, view in saved)

        self.backend.restore(self.bucket)
        assert same_bits(self.w.tensors, self.before)
        assert self.w.intact()
        assert self.g.intact()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_alignment_of_weight_and_gradient(kernels, dtype, form):
    vector = 16 // dtype.itemsize
    places = list(itertools.product(range(vector), repeat=2))
    case = Case(kernels, dtype, [5 * vector + 3] * len(places), form, places)
    case.check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_up_to_some_vectors(kernels, dtype, form):
    sizes = list(range(2 * 16 // dtype.itemsize + 2))
    case = Case(kernels, dtype, sizes, form, [(1, 1)] * len(sizes))
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_that_begin_and_end_anywhere(kernels, dtype):
    sizes = [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 1]
    for place in [(0, 0), (1, 1), (1, 0)]:
        Case(kernels, dtype, sizes, "mixed", [place] * len(sizes)).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_than_one_block_of_vectors(kernels, dtype):
    Case(kernels, dtype, [5000, 4999], "mixed", [(1, 1), (0, 1)], chunk=4096).check()


@pytest.mark.parametrize("missing", [(0,), (1, 3), (4,), (0, 1, 2, 3)], ids=str)
def test_slots_without_gradient_stay(kernels, missing):
    Case(kernels, torch.float32, [40, 300, 7, 256, 33], "mixed", missing=missing).check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("at", [0, 150, 299], ids=["first", "middle", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_that_is_not_finite_moves_nothing(kernels, dtype, at, value):
    case = Case(kernels, dtype, [40, 300, 7], "mixed", [(1, 1), (1, 1), (0, 1)])
    case.w.tensors[0][:2] = torch.tensor([-0.0, float("nan")])
    case.g.tensors[1][at] = value
    before = copies(case.w.tensors)
    case.norm()
    assert not bool(case.scalars.norm.isfinite())
    assert case.scalars.scale.tolist() == [0.0, 0.0]
    case.backend.perturb(case.bucket, case.scalars)
    assert same_bits(case.w.tensors, before)
    case.backend.restore(case.bucket)
    assert same_bits(case.w.tensors, before)


@pytest.mark.parametrize("rho", [(0.0, 0.0), (float("inf"), float("nan"))], ids=["zero", "not_finite"])
def test_a_scale_that_is_zero_or_not_finite_moves_nothing(kernels, rho):
    case = Case(kernels, torch.float32, [40, 300], rho=rho)
    case.norm()
    assert case.scalars.scale.tolist() == [0.0, 0.0]
    case.perturb()
    assert all(map(torch.equal, case.w.tensors, case.before))


def test_nothing_is_restored_where_nothing_was_saved(kernels):
    case = Case(kernels, torch.float32, [40, 300])
    case.norm()
    case.bucket.backup = torch.full_like(case.bucket.allocate_backup(), 7.0)
    case.backend.restore(case.bucket)
    assert same_bits(case.w.tensors, case.before)


@pytest.mark.parametrize("tables", ["kept", "unwritten"])
def test_nothing_is_restored_where_perturb_never_ran(kernels, tables):
    """The capture of a CUDA graph that failed, after a step: the host believes perturbed, and nothing has run since.

    The flag is the last step's, the backup and the tables may hold anything: addresses that would be written to.
    """
    case = Case(kernels, torch.float32, [300, 7])
    case.check()
    bucket = case.bucket
    bucket.next_generation()
    bucket.backup = torch.full_like(bucket.allocate_backup(), float("nan"))
    if tables == "unwritten":
        victim = torch.zeros(300, device=bucket.device)
        bucket.weight_table.tensor = torch.full_like(bucket.weight_table.tensor, victim.data_ptr())
    case.backend.restore(bucket)
    assert same_bits(case.w.tensors, case.before)
    if tables == "unwritten":
        assert not victim.any()


def test_a_step_after_a_failed_one_restores_its_own_weights(kernels):
    case = Case(kernels, torch.float32, [40, 300])
    case.norm()
    case.perturb()
    case.backend.restore(case.bucket)
    for w in case.w.tensors:
        w.add_(1)
    before = copies(case.w.tensors)
    case.norm()  # and perturb fails before its launch
    case.bucket.backup = torch.full_like(case.bucket.allocate_backup(), float("nan"))
    case.backend.restore(case.bucket)
    assert same_bits(case.w.tensors, before)


def test_versions_tell_of_every_write(kernels):
    case = Case(kernels, torch.float32, [40, 300, 7], missing=(1,))

    def versions():
        return [w._version for w in case.w.tensors]

    case.norm()
    first = versions()
    case.backend.perturb(case.bucket, case.scalars)
    second = versions()
    case.backend.restore(case.bucket)
    third = versions()
    assert [b - a for a, b in zip(first, second, strict=True)] == [1, 0, 1]
    assert [b - a for a, b in zip(second, third, strict=True)] == [1, 0, 1]


def test_a_bucket_of_empty_parameters(kernels):
    case = Case(kernels, torch.float32, [0, 0])
    case.norm()
    assert float(case.scalars.norm) == 0
    case.backend.perturb(case.bucket, case.scalars)
    case.backend.restore(case.bucket)


@pytest.mark.parametrize("n_groups", [1, 33, 70])
@pytest.mark.parametrize("n_buckets", [1, 4, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_combine(kernels, dtype, n_buckets, n_groups):
    _, device, backend = kernels
    scalars = Scalars(device, dtype, n_groups, n_buckets)
    rho = [0.1 * i for i in range(n_groups)]
    scalars.set_groups(rho, [1e-3 * i for i in range(n_groups)], [False] * n_groups)
    sums = torch.rand(n_buckets, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scalars.square_sums.copy_(sums)
    backend.combine(scalars)
    norm = float(sums.sum().sqrt())
    assert float(scalars.norm) == pytest.approx(norm, rel=1e-15 if dtype is torch.float64 else 1e-7)
    assert same_bits(scalars.scale, (scalars.norm + scalars.epsilon).reciprocal() * scalars.rho)


def test_many_chunks_to_a_program(kernels, monkeypatch):
    name, _, backend = kernels
    limit = {"triton": "MOST_PROGRAMS", "emulated": "MOST_BLOCKS"}.get(name)
    if limit is not None:
        monkeypatch.setattr(backend, limit, 4)
    sizes = [1000, 3, 700, 64, 129]
    for chunk in (64, 100, 1000):
        case = Case(kernels, torch.float32, sizes, "mixed", [(1, 1), (0, 0), (1, 0), (0, 0), (2, 2)], chunk=chunk)
        case.bucket.partials.fill_(float("nan"))
        case.check()
        # One chunk more than there may be programs does not halve their number.
        programs = len(case.bucket.chunks) if limit is None else 4
        assert int(case.bucket.partials.isfinite().sum()) == programs
    Case(kernels, torch.float32, [40_000, 4096], "mixed", [(1, 1), (0, 0)], chunk=4096).check()


def test_more_partial_sums_than_the_last_block_takes_at_once(kernels):
    case = Case(kernels, torch.float32, [4110], chunk=8)
    case.norm()
    expected = norm64(case.before, case.g.tensors, [False])
    assert float(case.scalars.norm) == pytest.approx(expected, rel=NORM_TOLERANCE)


def test_norm_does_not_depend_on_what_ran_before(kernels):
    norms = []
    for _ in range(3):
        case = Case(kernels, torch.float32, [5000, 3, 700])
        case.bucket.partials.fill_(float("nan"))
        case.norm()
        norms.append(bits(case.scalars.norm).item())
    assert len(set(norms)) == 1


def test_16_bits_are_rounded_to_nearest_even(kernels):
    for dtype in (torch.bfloat16, torch.float16):
        if not is_exact(kernels[0], dtype):
            continue
        case = Case(kernels, dtype, [4096], rho=(1.0, 1.0), chunk=4096)
        case.check()
