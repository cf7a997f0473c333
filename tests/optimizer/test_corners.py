"""Corners that plain training can reach: odd gradients, odd bases, failures beside the step itself."""

import math

import pytest
import torch
from torch.nn import Parameter

from fastsam import FusedSAM
from tests.linear import backward, make
from tests.oracle import copies, same_bits

BACKENDS = ["reference", "foreach", "cpp"]  # not the interpreted Triton: the GPU kernels square in fp32


def test_gradient_with_the_negative_bit(backend):
    """Autograd hands out lazily negated gradients: their memory holds the opposite of their values."""
    a, b = Parameter(torch.tensor([1.0])), Parameter(torch.tensor([2.0]))
    z = torch.complex(a, b).conj()
    (z * z).real.sum().backward()  # a^2 - b^2
    assert b.grad.is_neg()
    negated = b.grad
    sam = FusedSAM([a, b], torch.optim.SGD, rho=1.0, backend=backend, lr=0.1)
    norm = math.hypot(2, 4)
    for gradient in (negated, torch.tensor([-4.0, 0.0])[::2], negated):  # also where its strides are known
        b.grad = gradient
        sam.first_step()
        torch.testing.assert_close(a.detach(), torch.tensor([1 + 2 / norm]))
        torch.testing.assert_close(b.detach(), torch.tensor([2 - 4 / norm]))
        sam.restore()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e25])
def test_norm_of_gradients_whose_squares_leave_fp32(backend, size):
    p = Parameter(torch.zeros(5000))
    p.grad = torch.full((5000,), size)
    sam = FusedSAM([p], torch.optim.SGD, rho=1.0, epsilon=0.0, backend=backend, lr=0.1)
    sam.first_step()
    assert sam.grad_norm.item() == pytest.approx(size * math.sqrt(5000), rel=2e-6)
    torch.testing.assert_close(p.detach(), torch.full((5000,), 1 / math.sqrt(5000)))


def test_default_device_is_nobodys_business(backend):
    torch.set_default_device("meta")
    try:
        p = Parameter(torch.ones(3, device="cpu"))
        p.grad = torch.tensor([3.0, 0.0, 4.0], device="cpu")
        sam = FusedSAM([p], torch.optim.SGD, rho=5.0, backend=backend, lr=0.1)
        sam.first_step()
        assert p.tolist() == [4.0, 1.0, 5.0]
        sam.restore()
    finally:
        torch.set_default_device(None)
    assert p.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_calls_in_inference_mode(backend, direction):
    """They leave no inference tensor behind, which the next step could not write to."""

    def train(*modes):
        model, sam = make(direction=direction, backend=backend, momentum=0.9)

        def closure():
            sam.zero_grad()
            return backward(model)

        for mode in modes:
            if direction == "gradient":
                backward(model)
            with mode():
                sam.first_step(zero_grad=True)
            backward(model)
            with mode():
                sam.second_step(zero_grad=True)
                sam.step(closure)
        return copies(model.parameters())

    for mode in (torch.no_grad, torch.inference_mode):
        assert same_bits(train(mode, torch.enable_grad), train(torch.enable_grad, torch.enable_grad))


@pytest.mark.parametrize("when", ["pre", "post"])
def test_hook_that_raises_leaves_w(backend, when):
    p = Parameter(torch.ones(3))
    sam = FusedSAM([p], torch.optim.SGD, backend=backend, lr=0.0)

    def fail(*args):
        raise OSError("disk full")

    getattr(sam, f"register_step_{when}_hook")(fail)
    p.grad = torch.ones(3)
    sam.first_step()
    with pytest.raises(OSError, match="disk full"):
        sam.second_step()
    assert not sam.perturbed
    assert p.tolist() == [1.0, 1.0, 1.0]


def test_zero_grad_that_raises_in_first_step_leaves_w(backend):
    class Base(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            raise OSError("no")

    p = Parameter(torch.ones(3))
    sam = FusedSAM([p], Base, backend=backend, lr=0.1)
    p.grad = torch.ones(3)
    with pytest.raises(OSError, match="no"):
        sam.first_step(zero_grad=True)
    assert not sam.perturbed
    assert p.tolist() == [1.0, 1.0, 1.0]


def test_zero_grad_that_raises_in_second_step_leaves_nothing_fresh(backend):
    """The step was taken, so the gradient that stays is not the one at w of the next step."""

    class Base(torch.optim.SGD):
        fails = False

        def zero_grad(self, set_to_none=True):
            if self.fails:
                raise OSError("no")
            super().zero_grad(set_to_none)

    p = Parameter(torch.ones(3))
    sam = FusedSAM([p], Base, backend=backend, lr=0.1)
    p.grad = torch.ones(3)
    sam.first_step(zero_grad=True)
    p.grad = torch.ones(3)
    sam.base_optimizer.fails = True
    with pytest.raises(OSError, match="no"):
        sam.second_step(zero_grad=True)
    sam.base_optimizer.fails = False
    calls = []

    def closure():
        calls.append(sam.perturbed)
        p.grad = torch.ones(3)

    sam.step(closure)
    assert calls == [False, True]


def test_base_whose_zero_grad_takes_no_argument():
    class Base(torch.optim.SGD):
        def zero_grad(self):
            super().zero_grad()

    p = Parameter(torch.ones(3))
    sam = FusedSAM([p], Base, lr=0.1)
    p.grad = torch.ones(3)
    assert sam.first_step(zero_grad=True)
    assert p.grad is None


def test_two_wrappers_of_one_base_both_learn_of_its_zeros():
    p = Parameter(torch.ones(3))
    base = torch.optim.SGD([p], lr=0.1)
    first, _second = FusedSAM(base), FusedSAM(base)
    p.grad = torch.ones(3)
    base.zero_grad(set_to_none=False)
    calls = []

    def closure():
        calls.append(p.tolist())
        p.grad = torch.ones(3)

    first.step(closure)
    assert len(calls) == 2  # zeros are no gradient at w


def test_plain_step_counts_also_where_a_warm_up_starts_at_zero():
    """lr 0 and zero gradients are also what torch.distributed.checkpoint's initialisation looks like."""
    p = Parameter(torch.ones(3))
    sam = FusedSAM([p], torch.optim.SGD, interval=2, lr=0.0)
    p.grad = torch.zeros(3)
    assert not sam.first_step()
    sam.second_step()
    assert sam.first_step()  # the next one is a SAM step
    sam.restore()


def test_memory_that_comes_back_with_another_dtype_is_not_overrun(backend):
    p = Parameter(torch.ones(1000))
    sam = FusedSAM([p], torch.optim.SGD, backend=backend, lr=0.1)
    p.grad = torch.ones(1000)
    sam.first_step()
    memory = p.data
    p.data = memory.view(torch.bfloat16)[:1000]  # the same address, half the bytes
    beyond = memory.view(torch.bfloat16)[1000:].clone()
    sam.restore()
    assert p.tolist() == [1.0] * 1000
    assert torch.equal(memory.view(torch.bfloat16)[1000:], beyond)


def test_failed_ascent_holds_no_gradient(backend):
    p = Parameter(torch.ones(3))
    sam = FusedSAM([p], torch.optim.SGD, backend=backend, lr=0.1)
    p.grad = torch.ones(3)
    sam.param_groups[0]["rho"] = -1.0
    with pytest.raises(ValueError, match="rho of param group 0"):
        sam.first_step()
    assert all(g is None for _, bucket in sam._state.perturbation.buckets for g in bucket.grads)


def test_gradient_of_another_16_bit_dtype_is_refused_at_any_step(backend):
    """The two are of one size, so only the dtype tells them apart."""
    p = Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.warns(UserWarning, match="16 bits"):
        sam = FusedSAM([p], torch.optim.SGD, backend=backend, lr=0.1)
        p.grad = torch.ones_like(p)
        sam.first_step()
    sam.restore()
    p.grad = None
    p.grad_dtype = torch.float16
    p.grad = torch.ones(3, dtype=torch.float16)
    with pytest.raises(TypeError, match="the parameter is torch"):
        sam.first_step()
    assert p.tolist() == [1.0] * 3


def test_kept_backup_of_an_earlier_step_is_never_restored(backend):
    """A norm that is not finite saves nothing; then the parameter gets other memory."""
    p = Parameter(torch.ones(3))
    sam = FusedSAM([p], torch.optim.SGD, backend=backend, lr=0.1)
    p.grad = torch.ones(3)
    sam.first_step()
    sam.restore()
    with torch.no_grad():
        p.fill_(2.0)
    p.grad = torch.full((3,), math.inf)
    sam.first_step()
    p.data = p.data.double()
    sam.restore()
    assert p.tolist() == [2.0] * 3


def test_groups_that_are_taken_out_and_added_again_keep_their_options_and_the_count():
    """As Composer's FSDP2 does, to put other parameters in."""
    model, sam = make(interval=2)
    backward(model)
    assert not sam.first_step()
    sam.second_step(zero_grad=True)
    groups = list(sam.param_groups)
    sam.param_groups.clear()
    for group in groups:
        sam.add_param_group(group)
    assert sam.param_groups[0]["rho"] == 0.5
    assert sam.param_groups[0]["sam_step"] == 1
    assert sam.is_sam_step
    sam.param_groups.clear()
    assert sam.rho == 0.5  # what a group that is added without one takes
    sam.add_param_group({"params": list(model.parameters())})
    assert sam.param_groups[0]["sam_step"] == 1  # training goes on
    again = FusedSAM(sam.base_optimizer)
    again.param_groups.clear()
    again.add_param_group({"params": list(model.parameters())})
    assert again.param_groups[0]["sam_step"] == 1
    saved = sam.state_dict()
    model, sam = make(interval=2)
    sam.load_state_dict(saved)
    sam.param_groups.clear()
    sam.add_param_group({"params": list(model.parameters())})
    assert sam.param_groups[0]["sam_step"] == 1  # also where it was resumed


def test_groups_that_were_replaced_past_fused_sam_go_on_with_the_count():
    model, sam = make(interval=2)
    backward(model)
    assert not sam.first_step()
    sam.second_step(zero_grad=True)
    sam.base_optimizer.param_groups = torch.optim.SGD(model.parameters(), lr=0.1).param_groups
    assert sam.is_sam_step
    assert sam.param_groups[0]["sam_step"] == 1


def test_an_option_that_is_set_is_one_of_fused_sams_in_a_group_that_came_past_too():
    """So what a new FusedSAM is given wins over it, as over those of the other groups."""
    _, sam = make()
    sam.base_optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    sam.rho = 0.2
    with pytest.warns(UserWarning, match="replaced what an earlier one left"):
        again = FusedSAM(sam.base_optimizer, rho=0.3)
    assert again.rho == 0.3


def test_what_the_coming_step_is_may_be_asked_after_the_base_optimizer_loaded_a_plain_state():
    model, sam = make(interval=2)
    plain = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    sam.base_optimizer.load_state_dict(plain)
    assert not sam.is_sam_step
    backward(model)
    sam.second_step(zero_grad=True)
    sam.base_optimizer.load_state_dict(plain)
    assert sam.is_sam_step  # the count goes on


def test_a_count_that_was_saved_of_one_group_is_loaded_into_each():
    model, sam = make()
    sam.base_optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
    saved = sam.base_optimizer.state_dict()  # past FusedSAM: the new group has no count yet
    backward(model)
    sam.first_step(zero_grad=True)
    backward(model)
    sam.second_step(zero_grad=True)
    sam.load_state_dict(saved)
    assert [group["sam_step"] for group in sam.param_groups] == [0, 0]


def test_a_group_that_came_past_the_class_is_saved_with_the_count_of_the_others():
    model, sam = make()
    for _ in range(2):
        backward(model)
        sam.first_step(zero_grad=True)
        backward(model)
        sam.second_step(zero_grad=True)
    sam.base_optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    saved = sam.state_dict()
    assert [group["sam_step"] for group in saved["param_groups"]] == [2, 2]
    sam.load_state_dict(saved)
    assert [group["sam_step"] for group in sam.param_groups] == [2, 2]
