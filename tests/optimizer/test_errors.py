"""Wrong arguments, parameters and gradients: an error that names what is wrong, before any weight is touched."""

import math

import pytest
import torch
from torch import nn

from fastsam import FusedSAM
from tests.oracle import copies, same_bits


def params():
    return [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))]


def by_class(**options):
    return FusedSAM(params(), torch.optim.SGD, **{"lr": 0.1, **options})


def around(**options):
    return FusedSAM(torch.optim.SGD(params(), lr=0.1), **options)


both_forms = pytest.mark.parametrize("construct", [by_class, around])

WRONG_OPTIONS = [
    ({"rho": -0.1}, ValueError, r"rho must be finite and >= 0, but got -0\.1"),
    ({"rho": math.nan}, ValueError, "rho must be finite and >= 0, but got nan"),
    ({"rho": math.inf}, ValueError, "rho must be finite"),
    ({"rho": "0.05"}, TypeError, "rho must be a float, but got '0.05'"),
    ({"rho": None}, TypeError, "rho must be a float"),
    ({"rho": True}, TypeError, "rho must be a float"),
    ({"rho": torch.tensor(-1.0)}, ValueError, "rho must be finite and >= 0"),
    ({"rho": torch.tensor(math.nan)}, ValueError, "rho must be finite"),
    ({"rho": torch.ones(2)}, ValueError, r"rho must be a float or a 0-d .*shape \(2,\)"),
    ({"rho": torch.tensor(1)}, ValueError, "rho must be a float or a 0-d floating point tensor"),
    ({"epsilon": -1e-12}, ValueError, "epsilon must be finite and >= 0, but got -1e-12"),
    ({"epsilon": math.nan}, ValueError, "epsilon must be finite"),
    ({"epsilon": torch.tensor(1e-12)}, TypeError, "epsilon must be a float"),
    ({"adaptive": 2}, TypeError, "adaptive must be True or False, but got 2"),
    ({"adaptive": None}, TypeError, "adaptive must be True or False"),
    ({"interval": 0}, ValueError, "interval must be >= 1, but got 0"),
    ({"interval": -2}, ValueError, "interval must be >= 1"),
    ({"interval": 2.0}, TypeError, r"interval must be an int, but got 2\.0"),
    ({"interval": True}, TypeError, "interval must be an int"),
    ({"backend": "cudnn"}, ValueError, "backend must be one of .*'reference'.* got 'cudnn'"),
]


@both_forms
@pytest.mark.parametrize(("options", "error", "message"), WRONG_OPTIONS)
def test_options(construct, options, error, message):
    with pytest.raises(error, match=message):
        construct(**options)


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [("rho", -1.0, ValueError), ("epsilon", math.inf, ValueError), ("adaptive", "yes", TypeError)],
)
def test_options_of_a_group(key, value, error):
    a, b = params()
    message = rf"{key} of param group 1 must be"
    with pytest.raises(error, match=message):
        FusedSAM([{"params": [a]}, {"params": [b], key: value}], torch.optim.SGD, lr=0.1)
    sam = FusedSAM([a, b], torch.optim.SGD, lr=0.1)
    extra = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=message):
        sam.add_param_group({"params": [extra], key: value})
    assert len(sam.param_groups) == 1
    sam.add_param_group({"params": [extra]})  # the refused group left no trace


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("rho", -1.0, ValueError),
        ("rho", math.nan, ValueError),
        ("rho", "large", TypeError),
        ("epsilon", -1.0, ValueError),
        ("adaptive", 2, TypeError),
    ],
)
def test_options_that_go_wrong_while_training(key, value, error):
    sam = by_class()
    ps = sam.param_groups[0]["params"]
    for p in ps:
        p.grad = torch.ones_like(p)
    sam.first_step()
    sam.restore()
    right = sam.param_groups[0][key]
    for _ in range(2):
        sam.param_groups[0][key] = value
        with pytest.raises(error, match=f"{key} of param group 0 must be"):
            sam.first_step()
        assert not sam.perturbed
        assert all(bool((p == 1).all()) for p in ps)
    sam.param_groups[0][key] = right
    assert sam.first_step()


def test_base_optimizer_that_is_none():
    with pytest.raises(TypeError, match=r"base_optimizer must be a subclass of torch\.optim\.Optimizer"):
        FusedSAM(params(), torch.optim.SGD(params(), lr=0.1))
    with pytest.raises(TypeError, match="base_optimizer must be a subclass"):
        FusedSAM(params(), nn.Linear, lr=0.1)
    with pytest.raises(TypeError, match="base_optimizer must be a subclass"):
        FusedSAM(params(), 0.05, lr=0.1)
    with pytest.raises(TypeError, match="base_optimizer"):
        FusedSAM(params())
    with pytest.raises(TypeError):
        FusedSAM()


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (torch.optim.Adadelta, {}, "Adadelta has an option 'rho' of its own"),
        (torch.optim.LBFGS, {}, "LBFGS evaluates its closure many times"),
        (torch.optim.SparseAdam, {}, "SparseAdam needs sparse gradients.*Adam"),
    ],
)
def test_base_optimizers_that_cannot_work(base, options, message):
    with pytest.raises(ValueError, match=message):
        FusedSAM(params(), base, **options)
    with pytest.raises(ValueError, match=message):
        FusedSAM(base(params(), **options))


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        with torch.enable_grad():
            closure()
        return super().step()


class NeedsMore(torch.optim.SGD):
    def step(self, closure=None, *, loss):
        return super().step(closure)


class TakesAnything(torch.optim.SGD):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


@pytest.mark.parametrize(("base", "argument"), [(NeedsClosure, "closure"), (NeedsMore, "loss")])
def test_base_optimizers_whose_step_needs_an_argument(base, argument):
    message = rf"{base.__name__} can't step without '{argument}'.*step\(self, {argument}=None\)"
    for construct in (lambda: FusedSAM(params(), base, lr=0.1), lambda: FusedSAM(base(params(), lr=0.1))):
        with pytest.raises(ValueError, match=message):
            construct()
    optimizer = TakesAnything(params(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts another step in its place
    FusedSAM(FusedSAM(optimizer).base_optimizer)


def test_fused_sam_is_no_base_optimizer():
    with pytest.raises(TypeError, match=r"FusedSAM is a SAM optimizer already.*pass its base_optimizer"):
        FusedSAM(by_class())


class PCGrad:
    """Around an optimizer, and none itself."""

    def __init__(self, optimizer):
        self._optim = optimizer
        self.param_groups = optimizer.param_groups

    def step(self):
        self._optim.step()


class Alone:
    __slots__ = ()

    def step(self):
        pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: FusedSAM(nn.Linear(2, 2), torch.optim.SGD, lr=0.1),
            r"but got the Linear itself: pass model\.parameters\(\)",
        ),
        (lambda: FusedSAM(torch.optim.SGD(params(), lr=0.1), lr=0.1), "give an option of the base optimizer to SGD"),
        (
            lambda: FusedSAM(torch.optim.SGD(params(), lr=0.1), torch.optim.SGD, rho=0.1),
            r"FusedSAM\(SGD\(\.\.\.\), SGD, \.\.\.\) gives two base optimizers",
        ),
        (
            lambda: FusedSAM(PCGrad(torch.optim.SGD(params(), lr=0.1))),
            r"PCGrad .* is not a torch\.optim\.Optimizer.* its \._optim, and put PCGrad around FusedSAM",
        ),
        (lambda: FusedSAM(PCGrad(by_class())), r"its \._optim"),
        (lambda: FusedSAM(Alone()), r"Alone .* is not a torch\.optim\.Optimizer.*: pass an optimizer$"),
    ],
)
def test_slips_of_the_first_argument(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_parameter_list_is_parameters():
    FusedSAM(nn.ParameterList(params()), torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("interval", [1, 2])
def test_the_loss_is_no_closure(interval):
    """sam.step(closure())"""
    ps = params()
    sam = FusedSAM(ps, torch.optim.SGD, lr=0.1, interval=interval)
    before = copies(ps)

    def closure():
        loss = sum(p.square().sum() for p in ps)
        loss.backward()
        return loss

    with pytest.raises(TypeError, match=r"got a Tensor: pass the function itself, as in sam\.step\(closure\), not"):
        sam.step(closure())
    with pytest.raises(TypeError, match="got a float"):
        sam.step(closure().item())
    assert same_bits(copies(ps), before)
    assert sam.param_groups[0]["sam_step"] == 0


@pytest.mark.parametrize("result", [3, (1, 2, 3), [(), {}]], ids=str)
def test_a_step_pre_hook_that_returns_something_else(result):
    """As torch says it."""
    ps = params()
    sam = FusedSAM(ps, torch.optim.SGD, lr=0.1)
    ps[0].grad = torch.ones_like(ps[0])
    before = copies(ps)
    sam.first_step()
    sam.register_step_pre_hook(lambda *_: result)
    with pytest.raises(RuntimeError, match=r"must return None or a tuple of \(new_args, new_kwargs\), but got "):
        sam.second_step()
    assert same_bits(copies(ps), before)


def test_unknown_options_are_the_base_optimizers_to_refuse():
    with pytest.raises(TypeError, match="nesterow"):
        by_class(nesterow=True)
    with pytest.raises(TypeError, match="no option 'lr'; give an option of the base optimizer to SGD"):
        around(lr=0.1)


def test_no_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        FusedSAM([], torch.optim.SGD, lr=0.1)


def test_a_group_that_came_past_fused_sam_is_refused_each_time():
    """As FullyShardedDataParallel marks its parameters."""
    (w, v), shard = params(), nn.Parameter(torch.ones(2))
    shard._fsdp_flattened = True
    sam = FusedSAM([w, v], torch.optim.SGD, lr=0.1)
    sam.base_optimizer.add_param_group({"params": [shard], "rho": 0.5})
    for p in (w, shard):
        p.grad = torch.ones_like(p)
    for _ in range(2):
        with pytest.raises(TypeError, match="parameter 0 of param group 1 belongs to FullyShardedDataParallel"):
            sam.first_step()
    assert same_bits([w, shard], [torch.ones(2, 3), torch.ones(2)])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters(dtype):
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    message = rf"parameter 1 of param group 0 is {dtype}; FusedSAM perturbs .*a param group with perturb=False"
    with pytest.raises(TypeError, match=message):
        FusedSAM([params()[0], p], torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"\(phase\) is torch"):
        FusedSAM([("w", params()[0]), ("phase", p)], torch.optim.SGD, lr=0.1)


def test_a_parameter_in_two_groups_or_twice():
    a, b = params()
    with pytest.raises(ValueError, match="more than one parameter group"):
        FusedSAM([{"params": [a]}, {"params": [a, b]}], torch.optim.SGD, lr=0.1)
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="parameter 2 of param group 0 is in the group twice"),
    ):
        FusedSAM([a, b, a], torch.optim.SGD, lr=0.1)
    sam = FusedSAM([a], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        sam.add_param_group({"params": [b, a]})
    assert len(sam.param_groups) == 1


@pytest.mark.parametrize("form", ["first_step", "closure"])
def test_sparse_gradients(backend, form):
    torch.manual_seed(0)
    embedding = nn.Embedding(5, 3, sparse=True)
    linear = nn.Linear(3, 2)
    names = [*linear.named_parameters(prefix="linear"), *embedding.named_parameters(prefix="embedding")]
    sam = FusedSAM(names, torch.optim.SGD, backend=backend, lr=0.1)
    before = copies(p for _, p in names)

    def closure():
        loss = linear(embedding(torch.tensor([1, 3]))).sum()
        loss.backward()
        return loss

    def step():
        if form == "closure":
            sam.step(closure)
        else:
            closure()
            sam.first_step()

    for _ in range(2):
        sam.zero_grad()
        with pytest.raises(TypeError, match=r"gradient of parameter 2 .*\(embedding.weight\) is sparse.*sparse=False"):
            step()
        assert not sam.perturbed
        assert same_bits([p.detach() for _, p in names], before)


class Elsewhere(torch.Tensor):
    """Values in another tensor: there is no memory at data_ptr(), and no dequantize() that tells them."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, strides=values.stride(), dtype=values.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_a_gradient_that_cant_be_read(backend):
    """Taken for none, it would leave its parameter out in silence."""
    w, v = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    sam = FusedSAM([w, v], torch.optim.SGD, backend=backend, lr=0.1)
    w.grad, v.grad = torch.ones(3), Elsewhere(torch.ones(3))
    with pytest.raises(TypeError, match=r"gradient of parameter 1 .* is a Elsewhere, which has no memory of its own"):
        sam.first_step()
    assert same_bits([w, v], [torch.ones(3)] * 2)


def test_a_parameter_that_came_past_the_class_is_checked():
    p, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    sam = FusedSAM([p], torch.optim.SGD, lr=0.1)
    other._fsdp_flattened = True
    sam.base_optimizer.add_param_group({"params": [other]})
    p.grad = torch.ones(2)
    with pytest.raises(TypeError, match="parameter 0 of param group 1 belongs to FullyShardedDataParallel"):
        sam.first_step()
    assert torch.equal(p.detach(), torch.ones(2))


def test_sparse_gradient_after_dense_ones(backend):
    p = nn.Parameter(torch.ones(4, 2))
    sam = FusedSAM([p], torch.optim.SGD, backend=backend, lr=0.1)
    p.grad = torch.ones_like(p)
    sam.first_step()
    sam.second_step()
    p.grad = torch.ones(4, 2).to_sparse()
    before = copies([p])
    with pytest.raises(TypeError, match="sparse"):
        sam.first_step()
    assert same_bits([p.detach()], before)


def test_a_backend_that_is_missing_says_why(monkeypatch):
    """By name it is an error, also through the environment; a device that it does not serve is another."""
    monkeypatch.setenv("FASTSAM_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="cudnn"):
        by_class()
    monkeypatch.setenv("FASTSAM_BACKEND", "reference")
    by_class()
    monkeypatch.delenv("FASTSAM_BACKEND")
    with pytest.raises(ValueError, match="serves cpu tensors, but a parameter is on meta"):
        FusedSAM([nn.Parameter(torch.ones(2, device="meta"))], torch.optim.SGD, backend="cpp", lr=0.1)


def test_parameters_without_memory():
    p = nn.Parameter(torch.ones(2, device="meta"))
    sam = FusedSAM([p], torch.optim.SGD, backend="reference", lr=0.1)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"parameter 0 .* has no memory .*meta"):
        sam.first_step()


def test_uninitialised_parameters_of_a_lazy_module():
    lazy = nn.LazyLinear(3)
    sam = FusedSAM(lazy.parameters(), torch.optim.SGD, lr=0.1)
    lazy(torch.ones(2, 4)).sum().backward()
    before = copies(lazy.parameters())
    sam.first_step()
    assert not same_bits(copies(lazy.parameters()), before)
    sam.restore()
    assert same_bits(copies(lazy.parameters()), before)


class Failing(torch.optim.SGD):
    fails = True

    def step(self, closure=None):
        if self.fails:
            raise ZeroDivisionError
        return super().step(closure)


@pytest.mark.parametrize("form", ["two calls", "closure"])
def test_an_error_in_the_base_optimizer(backend, form):
    """w is restored, and the step can be made again."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    sam = FusedSAM([p], Failing, backend=backend, lr=0.1)

    def closure():
        sam.zero_grad()
        (p**3).sum().backward()

    def step():
        if form == "closure":
            sam.step(closure)
        else:
            closure()
            sam.first_step()
            closure()
            sam.second_step()

    with pytest.raises(ZeroDivisionError):
        step()
    assert not sam.perturbed
    assert torch.equal(p.detach(), torch.tensor([1.0, 2.0]))
    sam.base_optimizer.fails = False
    step()
    assert not torch.equal(p.detach(), torch.tensor([1.0, 2.0]))
