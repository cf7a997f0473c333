"""Pointer tables: written when an address changed, and apart for each CUDA graph."""

import pytest
import torch

from fastsam import bucket
from fastsam.ascent import Ascent
from fastsam.bucket import PointerTable

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
    ascent = Ascent(CPU, torch.float32, 1, 1)
    ascent.set_groups([0.1], [0.0], [False])
    monkeypatch.setattr("fastsam.ascent.capturing", lambda device: True)
    ascent.set_groups([0.1], [0.0], [False])
    with pytest.raises(RuntimeError, match="take a step with them first"):
        ascent.set_groups([0.2], [0.0], [False])
    assert ascent.rho.tolist() == pytest.approx([0.1])


def test_no_bucket_is_laid_out_under_capture(capture):
    capture(True)
    with pytest.raises(RuntimeError, match="take a step with these before the capture"):
        bucket.ParameterBucket([torch.ones(3)], [0], ["w"], 0, lambda numel: 8)
