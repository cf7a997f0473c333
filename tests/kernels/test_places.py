"""Where tensors lie: the native library against Python, and against the rule said in words."""

import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fastsam import FusedSAM, places as places_module
from fastsam.bucket import PointerTable
from fastsam.places import Places

CPU = torch.device("cpu")
native = pytest.mark.skipif(places_module.native() is None, reason="needs the native library, and torch >= 2.11")


@pytest.fixture(params=[pytest.param("native", marks=native), "python"])
def way(request, monkeypatch):
    """By which of the two it is found out."""
    if request.param == "python":
        monkeypatch.setattr(places_module, "native", lambda: None)
    return request.param


def moves():
    """(name, what it does to a (2, 3) tensor, whether its memory is another, whether its shape or strides are)."""
    return [
        ("nothing", lambda t: None, False, False),
        ("other memory", lambda t: setattr(t, "data", t.clone()), True, False),
        ("fewer elements", lambda t: setattr(t, "data", t.data[:1]), True, True),
        ("other dtype", lambda t: setattr(t, "data", t.data.view(torch.int32).view(torch.bfloat16)[:, :3]), True, True),
        ("flat", lambda t: setattr(t, "data", t.data.view(6)), False, True),
        ("transposed", lambda t: setattr(t, "data", t.data.t()), False, True),
        ("one dimension more", lambda t: setattr(t, "data", t.data[None]), False, True),
    ]


@pytest.mark.parametrize(("name", "move", "elsewhere", "otherwise"), moves(), ids=lambda x: x if type(x) is str else "")
def test_places(way, name, move, elsewhere, otherwise):
    tensors = [torch.zeros(4), torch.nn.Parameter(torch.zeros(2, 3)), torch.zeros(())]
    places = Places(tensors)
    assert places.in_place(tensors)
    assert not places.moved(tensors)
    memory = tensors[1].detach()  # alive, so that it does not come again
    with torch.no_grad():
        move(tensors[1])
    assert places.in_place(tensors) == (not elsewhere)
    assert places.moved(tensors) == (elsewhere or otherwise)
    del memory


LAYOUTS = {
    "contiguous": lambda shape, dtype: torch.ones(shape, dtype=dtype),
    "reversed": lambda shape, dtype: torch.ones(shape[::-1], dtype=dtype).permute([*range(len(shape))][::-1]),
    "gaps": lambda shape, dtype: torch.ones((*shape, 2), dtype=dtype)[..., 0],
    "ones": lambda shape, dtype: torch.ones((*shape, 1), dtype=dtype).squeeze(-1),
    "none": lambda shape, dtype: None,
    "parameter": lambda shape, dtype: torch.nn.Parameter(torch.ones(shape, dtype=dtype)),
}
shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
kinds = st.tuples(shapes, dtypes, st.sampled_from([name for name in LAYOUTS if name not in ("none", "parameter")]))


def lies_as(grad, weight):
    """The rule: strides of dimensions of size 1 mean nothing."""
    if grad is None:
        return True
    strides = zip(grad.shape, grad.stride(), weight.stride(), strict=False)
    return (
        type(grad) is torch.Tensor
        and grad.dtype is weight.dtype
        and grad.shape == weight.shape
        and all(n == 1 or a == b for n, a, b in strides)
    )


@native
@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(kinds, st.none() | kinds, st.sampled_from(list(LAYOUTS))), min_size=1, max_size=6))
def test_gradients_are_taken_where_they_lie_as_their_weights_do(pairs):
    weights, grads = [], []
    for (shape, dtype, layout), other, grad_layout in pairs:
        weights.append(LAYOUTS[layout](shape, dtype))
        grad_shape, grad_dtype = (shape, dtype) if other is None else other[:2]
        grads.append(LAYOUTS[grad_layout](grad_shape, grad_dtype))
    table = PointerTable([7] * len(weights), CPU)
    expected = [0 if g is None else g.data_ptr() for g in grads]
    if all(map(lies_as, grads, weights)):
        assert table.take(grads, Places(weights))
        assert table.pointers == expected
        refreshes = table.refreshes
        assert table.take(grads, Places(weights))
        assert table.refreshes == refreshes
        assert table.complete == all(expected)
    else:
        assert not table.take(grads, Places(weights))
        assert table.pointers == [7] * len(weights)


@native
@pytest.mark.parametrize(
    "grad", [torch.ones(3).to_sparse(), torch.ones(3, device="meta"), 3, "x", torch.ones(3, dtype=torch.complex64)]
)
def test_what_is_no_gradient_is_not_taken(grad):
    table = PointerTable([7], CPU)
    assert not table.take([grad], Places([torch.ones(3)]))
    assert table.pointers == [7]


@native
def test_misuse_is_an_error_and_no_crash():
    library, one = places_module.native(), torch.ones(3)
    table, places = torch.zeros(1, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)
    assert library.record([one], places)
    for arguments in [(), ([one], places), (one, places, table), ([one], [one], table), ([one], places, 3)]:
        with pytest.raises(TypeError, match="fastsam: "):
            library.survey(*arguments)
    for wrong in (table.float(), torch.zeros(4, dtype=torch.int64)[::2], torch.zeros(2, dtype=torch.int64), table[:0]):
        with pytest.raises(TypeError, match="fastsam: "):
            library.survey([one], places, wrong)
    with pytest.raises(TypeError, match="fastsam: "):
        library.survey([one, one], places, table)
    for size in (0, 3, 6, 8):  # of the 7 that it takes
        short = torch.zeros(size, dtype=torch.int64)
        assert not library.record([one], short)
        assert not library.unmoved([one], short, True)
        assert not library.survey([one], short, table)
    assert library.survey([one], places, table) == 2
    assert library.unmoved([one], places, True)
    assert not library.unmoved([], places, True)
    assert not library.unmoved([one, one], places, True)
    assert not library.unmoved([3], places, True)


@native
def test_nothing_is_kept():
    library, one = places_module.native(), torch.ones(3)
    table, places, tensors = torch.zeros(1, dtype=torch.int64), torch.zeros(7, dtype=torch.int64), [one]
    counts = [sys.getrefcount(x) for x in (one, table, places, tensors, None)]
    for _ in range(1000):
        library.record(tensors, places)
        library.unmoved(tensors, places, True)
        library.survey(tensors, places, table)
    after = [sys.getrefcount(x) for x in (one, table, places, tensors, None)]
    assert all(abs(n - m) < 100 for n, m in zip(after, counts, strict=True))


# -- whole steps -------------------------------------------------------------------------------------------------------


def ascend(sam, params, expected):
    """One ascent, and back; `expected` as in plain arithmetic."""
    before = [p.detach().clone() for p in params]
    sam.first_step()
    for p, w, g in zip(params, before, expected, strict=True):
        assert torch.allclose(p.detach(), w + g, rtol=0, atol=2e-6)  # some roundings of numbers up to 5
    sam.restore()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_tensors_that_change_between_steps(way, backend, direction):
    """Shapes, strides, missing ones: each step is right, whoever looks."""
    params = [torch.nn.Parameter(torch.randn(2, 3)), torch.nn.Parameter(torch.randn(4))]
    base = torch.optim.SGD(params, lr=0.0, momentum=0.9)
    sam = FusedSAM(base, rho=1.0, epsilon=0.0, direction=direction, backend=backend)

    def put(tensors):
        for p, t in zip(params, tensors, strict=True):
            if direction == "gradient":
                p.grad = t
            elif t is None:
                base.state.pop(p, None)
            else:
                base.state[p]["momentum_buffer"] = t

    def look():
        tensors = [torch.randn_like(p) for p in params]
        for given_ in (tensors, [tensors[0], None], [tensors[0].t().contiguous().t(), tensors[1]], tensors):
            if given_[0].shape != params[0].shape:
                continue
            put(given_)
            norm = sum(float(t.double().square().sum()) for t in given_ if t is not None) ** 0.5
            sign = 1 if direction == "gradient" else -1
            e_w = [torch.zeros(()) if t is None else sign * t / norm for t in given_]
            ascend(sam, params, e_w)

    look()
    params[0].grad = None
    params[0].data = params[0].data.view(6)  # the same memory
    look()
    params[0].grad = None
    params[0].data = torch.randn(3, 2)
    look()


@pytest.mark.parametrize(
    "moved", [lambda v: v.to("meta"), lambda v: v.double(), lambda v: v[:2], lambda v: v.to_sparse()]
)
def test_momentum_that_does_not_fit_any_more(way, backend, moved):
    p = torch.nn.Parameter(torch.ones(3))
    base = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    sam = FusedSAM(base, direction="momentum", backend=backend)
    for _ in range(3):
        sam.first_step()
        p.grad = torch.ones(3)
        sam.second_step()
    before = p.detach().clone()
    base.state[p]["momentum_buffer"] = moved(base.state[p]["momentum_buffer"])
    with pytest.raises((TypeError, ValueError), match="the momentum of parameter 0 of param group 0"):
        sam.first_step()
    assert torch.equal(p.detach(), before)
