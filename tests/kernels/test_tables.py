"""Pointer tables: written when an address changed, and apart for each CUDA graph."""

import gc
import weakref

import pytest
import torch

from fastsam import FusedSAM, bucket
from fastsam.bucket import PointerTable
from fastsam.places import Places
from fastsam.scalars import Scalars

CPU = torch.device("cpu")
A, B, C = [2**47 + 16, 0, 2**62 + 1], [0, 64, 2**63 - 1], [1, 2, 3]


@pytest.fixture
def capture(monkeypatch):
    """Makes the tables believe, or not, that the current stream is being captured."""
    return lambda on: monkeypatch.setattr(bucket, "capturing", lambda device: on)


def test_a_table_is_written_only_when_an_address_changed():
    table = PointerTable(A, CPU)
    for pointers, refreshes in [(A, 1), (B, 2), (list(B), 2), (A, 3)]:
        table.update(pointers)
        assert table.tensor.tolist() == table.pointers == pointers
        assert table.refreshes == refreshes


@pytest.mark.parametrize("native", [False, True])
def test_an_upload_that_failed_is_made_up_for(monkeypatch, native):
    tensors = [torch.ones(3), torch.ones(2, 2)]
    pointers = [t.data_ptr() for t in tensors]
    table = PointerTable([0, 0], torch.device("meta"))
    uploads = []

    def fails(target, source):
        raise RuntimeError("out of memory")

    def gather():
        if not (native and table.take(tensors, Places(tensors))):
            table.update(pointers)

    monkeypatch.setattr(bucket, "upload", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        gather()
    monkeypatch.setattr(bucket, "upload", lambda target, source: uploads.append(source.tolist()))
    for _ in range(2):  # the same addresses: once is enough
        gather()
        assert uploads == [pointers]
    assert table.complete
    assert table.refreshes == 2


def test_a_capture_gets_a_table_of_its_own(capture):
    table = PointerTable(A, CPU)
    eager = table.tensor
    capture(True)
    table.update(B)
    captured = table.tensor
    assert captured.tolist() == table.pointers == B
    assert eager.tolist() == A
    table.update(B)  # a second graph
    assert table.tensor.data_ptr() != captured.data_ptr()
    capture(False)
    table.update(A)  # what the table of eager steps still holds
    assert table.tensor is eager
    assert table.tensor.tolist() == table.pointers == A
    table.update(C)
    assert eager.tolist() == C
    assert captured.tolist() == B


def test_a_graph_reads_its_options_from_the_last_step(monkeypatch):
    scalars = Scalars(CPU, torch.float32, 1, 1)
    scalars.set_groups([0.1], [0.0], [False])
    monkeypatch.setattr("fastsam.scalars.capturing", lambda device: True)
    scalars.set_groups([0.1], [0.0], [False])
    with pytest.raises(RuntimeError, match="take a step with them first"):
        scalars.set_groups([0.2], [0.0], [False])
    assert scalars.rho.tolist() == pytest.approx([0.1])


@pytest.fixture
def stepped(backend):
    """A FusedSAM after a step, and its parameters, with gradients: the second has gaps, so kernels work on a copy."""
    params = [torch.nn.Parameter(t) for t in (torch.arange(5.0), torch.arange(8.0).view(2, 4)[:, :3])]
    sam = FusedSAM(params, torch.optim.SGD, lr=0.1, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    sam.first_step()
    sam.second_step()
    return sam, params


def test_a_capture_that_failed_leaves_the_weights_alone(stepped, capture):
    sam, params = stepped
    ((_, made),) = sam._state.perturbation.buckets
    device = [*params, *made.weights, made.saved]
    sam_before = [p.detach().clone() for p in params]
    made.weights[1].fill_(9.0)  # not brought up to date by what did not run
    before = [t.detach().clone() for t in device]
    capture(True)
    sam.first_step()
    capture(False)
    with torch.no_grad():  # the device ran nothing of it
        for t, was in zip(device, before, strict=True):
            t.copy_(was)
    made.backup.fill_(7.0)
    sam.restore()
    assert not sam.perturbed
    assert all(map(torch.equal, params, sam_before))
    sam.first_step()  # as any other
    assert not any(map(torch.equal, params, sam_before))
    sam.restore()
    assert all(map(torch.equal, params, sam_before))


def test_a_captured_ascent_that_ran_is_restored(stepped, capture):
    sam, params = stepped
    before = [p.detach().clone() for p in params]
    capture(True)
    sam.first_step()
    capture(False)
    assert not any(map(torch.equal, params, before))
    sam.restore()
    assert all(map(torch.equal, params, before))


def test_first_step_outside_and_second_step_inside_a_capture(monkeypatch):
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    sam = FusedSAM([p], torch.optim.SGD, lr=0.1)
    sam.first_step()
    monkeypatch.setattr("fastsam.perturbation.capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="first_step\\(\\) ran before the capture"):
        sam.second_step()
    monkeypatch.undo()
    assert sam.perturbed
    sam.restore()
    assert torch.equal(p.detach(), torch.ones(5))


def test_what_a_graph_reads_outlives_a_new_layout(monkeypatch):
    """As when a frozen parameter first gets a gradient."""
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    sam = FusedSAM([a, b], torch.optim.SGD, lr=0.1)
    a.grad = torch.ones(3)
    sam.first_step()
    sam.restore()
    with monkeypatch.context() as context:
        context.setattr(bucket, "capturing", lambda device: True)
        sam.first_step()
        sam.restore()
    ((_, captured),) = sam._state.perturbation.buckets
    alive = weakref.ref(captured)
    del captured
    b.grad = torch.ones(3)
    sam.first_step()
    sam.restore()
    gc.collect()
    assert len(sam._state.perturbation.buckets[0][1].params) == 2
    assert alive() is not None


def test_no_bucket_is_laid_out_under_capture(capture):
    capture(True)
    with pytest.raises(RuntimeError, match="take a step with these before the capture"):
        bucket.ParameterBucket([torch.ones(3)], [0], ["w"], 0, lambda numel: 8)
