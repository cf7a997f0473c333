"""flatten_parameters=True: parameters as views of one buffer, and the same training."""

import copy
import io

import torch
from torch import nn

from fastsam import FusedSAM
from tests.oracle import copies, same_bits


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))
    return model.to(memory_format=torch.channels_last)


def make(model, backend=None, **options):
    return FusedSAM(model.parameters(), torch.optim.SGD, rho=0.3, backend=backend, lr=0.1, momentum=0.9, **options)


def step(model, sam, i):
    x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(i))

    def closure():
        sam.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        return loss

    return sam.step(closure)


def storages(params):
    return {p.untyped_storage().data_ptr() for p in params}


def test_values_shapes_and_strides_stay():
    model, plain = make_model(), make_model()
    make(model, flatten_parameters=True)
    assert same_bits(list(model.parameters()), list(plain.parameters()))
    assert [p.stride() for p in model.parameters()] == [p.stride() for p in plain.parameters()]
    assert len(storages(model.parameters())) == 1
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())
    assert all(p.is_leaf and p.requires_grad and type(p) is nn.Parameter for p in model.parameters())


def test_training_is_the_same_and_addresses_stay(backend):
    model, plain = make_model(), make_model()
    flat, sam = make(model, backend, flatten_parameters=True), make(plain, backend)
    addresses = [p.data_ptr() for p in model.parameters()]
    for i in range(4):
        step(model, flat, i)
        step(plain, sam, i)
        torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_one_buffer_for_each_dtype():
    params = [nn.Parameter(torch.ones(5, dtype=d)) for d in (torch.float32, torch.float64) for _ in range(3)]
    FusedSAM(params, torch.optim.SGD, flatten_parameters=True, lr=0.1)
    assert len(storages(params[:3])) == len(storages(params[3:])) == 1
    assert len(storages(params)) == 2


def test_across_groups_and_in_later_ones():
    params = [nn.Parameter(torch.full((3,), float(i))) for i in range(5)]
    groups = [{"params": params[:2]}, {"params": params[2:3]}]
    sam = FusedSAM(groups, torch.optim.SGD, flatten_parameters=True, lr=0.1)
    assert len(storages(params[:3])) == 1
    sam.add_param_group({"params": params[3:]})
    assert len(storages(params[3:])) == 1
    assert [p[0].item() for p in params] == [0, 1, 2, 3, 4]


def test_what_cannot_be_moved_is_left_alone(backend):
    memory = torch.arange(12.0).view(3, 4)
    gaps, empty, dense = nn.Parameter(memory[:, 1:3]), nn.Parameter(torch.empty(0)), nn.Parameter(torch.ones(4))
    sam = FusedSAM([gaps, empty, dense], torch.optim.SGD, backend=backend, flatten_parameters=True, lr=0.1)
    assert gaps.data_ptr() == memory[:, 1:].data_ptr()
    for p in (gaps, empty, dense):
        p.grad = torch.ones_like(p)
    sam.first_step()
    sam.restore()
    assert torch.equal(memory, torch.arange(12.0).view(3, 4))


def test_a_frozen_parameter_moves_along():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)
    sam = FusedSAM([a, b], torch.optim.SGD, flatten_parameters=True, lr=0.1)
    assert len(storages([a, b])) == 1
    a.grad = torch.ones(3)
    sam.first_step()
    assert torch.equal(b, torch.ones(3))
    sam.second_step()
    assert torch.equal(b, torch.ones(3))


def test_copies_and_conversions(backend):
    model = make_model()
    sam = make(model, backend, flatten_parameters=True)
    step(model, sam, 0)
    twin, copied = copy.deepcopy((model, sam))
    step(model, sam, 1)
    step(twin, copied, 1)
    torch.testing.assert_close(copies(twin.parameters()), copies(model.parameters()))
    twin.double()  # no longer flat, which is noticed
    for p in twin.parameters():
        p.grad = torch.ones_like(p)
    before = copies(twin.parameters())
    copied.first_step()
    copied.restore()
    assert same_bits(copies(twin.parameters()), before)


def test_a_saved_model_holds_no_more_than_itself(tmp_path):
    model = make_model()
    make(model, flatten_parameters=True)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    plain = make_model()
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    plain.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert same_bits(list(plain.parameters()), list(model.parameters()))


def size_of(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    return file.tell()


def test_saving_a_part_of_the_model_takes_clones():
    """As docs/caveats.md says: a part is a view of the whole buffer, which torch.save writes."""
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(2, 2))
    make(model, flatten_parameters=True)
    assert len(storages(model.parameters())) == 1
    assert size_of(model[1].state_dict()) > 4 * 100 * 100
    assert size_of({k: v.clone() for k, v in model[1].state_dict().items()}) < 4 * 100 * 100 / 10
