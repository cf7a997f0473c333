"""torch.compile: one graph break for each call of FusedSAM, no recompilation once warm, the same weights."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call

from fastsam import FusedSAM
from tests.oracle import copies, same_bits

STEPS = 6
WARM_UP = 3


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def make(**options: Any) -> tuple[nn.Module, FusedSAM]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, FusedSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, **options)


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(16, 6, generator=generator, dtype=torch.float64)


def breaks(name: str = "") -> int:
    return sum(count for reason, count in counters["graph_break"].items() if name in reason)


def train(step: Callable[[Tensor], object], *, compiled: bool) -> None:
    for i, x in enumerate(batches()):
        if compiled and i == WARM_UP:
            torch.compiler.set_stance("fail_on_recompile")
        step(x)


def backward(model: nn.Module, x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


def two_calls(model: nn.Module, sam: FusedSAM) -> Callable[[Tensor], object]:
    def step(x: Tensor) -> None:
        backward(model, x)
        if sam.first_step(zero_grad=True):
            backward(model, x)
        sam.second_step(zero_grad=True)

    return step


def by_closure(model: nn.Module, sam: FusedSAM) -> Callable[[Tensor], object]:
    def step(x: Tensor) -> object:
        def closure() -> Tensor:
            sam.zero_grad()
            return backward(model, x)

        return sam.step(closure)

    return step


def perturb(model: nn.Module, sam: FusedSAM, x: Tensor) -> None:
    backward(model, x)
    sam.first_step()


CALLS: dict[str, Callable[[nn.Module, FusedSAM, Tensor], object]] = {
    "first_step": lambda model, sam, x: backward(model, x),
    "second_step": perturb,
    "step": perturb,
    "restore": perturb,
    "zero_grad": perturb,
}
"""What comes before each call."""


@pytest.mark.parametrize("scheduled", [False, True], ids=["", "with a scheduler"])
@pytest.mark.parametrize("name", [*CALLS, "step(closure)"])
def test_each_call_is_one_graph_break(name: str, scheduled: bool) -> None:
    method, closed, _ = name.partition("(")
    results = []
    for compiler in (None, "eager"):
        model, sam = make()
        if scheduled:
            torch.optim.lr_scheduler.StepLR(sam, 1)
        call = getattr(sam, method)

        def function(
            x: Tensor, call: Callable[..., object] = call, args: tuple[Callable[[], Tensor], ...] = ()
        ) -> Tensor:
            y = x * 2
            call(*args)
            return y + 1

        run = function if compiler is None else torch.compile(function, backend=compiler)
        for i, x in enumerate(batches()):
            if compiler is not None and i == WARM_UP:
                torch.compiler.set_stance("fail_on_recompile")
            CALLS.get(name, lambda *_: None)(model, sam, x)
            args = ((lambda model=model, x=x: backward(model, x)),) if closed else ()
            assert torch.equal(run(x, args=args), x * 2 + 1)
            results.append(copies(model.parameters()))
            sam.restore()
            sam.zero_grad()
    # A closure's backward is one of its own, at w and at w + e_w.
    assert breaks() == (3 if closed else 1), counters["graph_break"]
    # What is before the call, and what is after it; and the closure's forward, at w and at w + e_w.
    assert counters["stats"]["unique_graphs"] == (4 if closed else 2)
    assert all(same_bits(a, b) for a, b in zip(results[:STEPS], results[STEPS:], strict=True))


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_training_function(compiler: str, interval: int) -> None:
    eager, sam = make(interval=interval)
    train(two_calls(eager, sam), compiled=False)
    model, sam = make(interval=interval)
    train(torch.compile(two_calls(model, sam), backend=compiler), compiled=True)
    assert breaks("FusedSAM.first_step") == 1
    assert breaks("FusedSAM.second_step") == interval  # after one pass, and after two: two ways to come there
    assert same_bits(copies(model.parameters()), copies(eager.parameters()))
    assert not same_bits(copies(model.parameters()), copies(make()[0].parameters()))


@pytest.mark.parametrize("form", [two_calls, by_closure])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_model(compiler: str, form: Callable[..., Callable[[Tensor], object]]) -> None:
    eager, sam = make(interval=2)
    train(form(eager, sam), compiled=False)
    model, sam = make(interval=2)
    train(form(torch.compile(model, backend=compiler), sam), compiled=True)
    assert breaks() == 0
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(list(model.parameters()), list(eager.parameters()), rtol=1e-9, atol=1e-12)


def test_functional_call_with_parameters_that_are_leaves() -> None:
    """The tensors that FusedSAM was given are those that the forward has to use, and that backward has to reach."""
    expected, sam = make()
    train(two_calls(expected, sam), compiled=False)
    model, _ = make()
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    sam = FusedSAM(w.items(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)

    def stateless(x: Tensor) -> Tensor:
        return functional_call(model, w, (x,))

    train(two_calls(stateless, sam), compiled=False)
    assert same_bits(list(w.values()), copies(expected.parameters()))


def test_gradients_of_torch_func_are_assigned() -> None:
    expected, sam = make()
    train(two_calls(expected, sam), compiled=False)
    model, sam = make()
    w = dict(model.named_parameters())

    def loss_fn(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, params, (x,)).square().mean()

    def assign(x: Tensor) -> None:
        grads = torch.func.grad(loss_fn)({name: p.detach() for name, p in w.items()}, x)
        for name, p in w.items():
            p.grad = grads[name]

    def step(x: Tensor) -> None:
        assign(x)
        sam.first_step(zero_grad=True)
        assign(x)
        sam.second_step(zero_grad=True)

    train(step, compiled=False)
    torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), rtol=1e-12, atol=1e-15)
