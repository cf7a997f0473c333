"""Weights and gradients of the contestants, and the oracle that their results are checked against."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.contestants import EPSILON, Contestant

GRADIENT_SETS = 3
WEIGHT_SCALE, GRADIENT_SCALE = 0.02, 0.001
RELATIVE_STEP = 0.1
"""||e_w|| over ||w||: large enough for 16-bit weights to move. The time does not depend on it."""


@dataclass(frozen=True)
class Setting:
    """How a case is measured."""

    dtype: torch.dtype
    adaptive: bool
    threads: int
    device: torch.device

    def __str__(self) -> str:
        """As in "float32, plain, 2 threads"."""
        words = [str(self.dtype).removeprefix("torch."), "adaptive" if self.adaptive else "plain"]
        if self.device.type == "cpu":
            words.append(f"{self.threads} thread{'s' * (self.threads > 1)}")
        return ", ".join(words)


class Inputs:
    """Weights, shared by all contestants, and sets of gradients that they meet in turn."""

    def __init__(self, case: Case, setting: Setting) -> None:
        generator = torch.Generator(setting.device).manual_seed(0)

        def normal(scale: float) -> list[Tensor]:
            empty = (torch.empty(shape, dtype=setting.dtype, device=setting.device) for shape in case.shapes)
            return [t.normal_(0, scale, generator=generator) for t in empty]

        self.weights = normal(WEIGHT_SCALE)
        self.gradients = [normal(GRADIENT_SCALE) for _ in range(GRADIENT_SETS)]
        # ||e_w|| is rho; adaptive: rho || w^2 g || / || w g ||, which for normal w and g is sqrt(3) WEIGHT_SCALE rho.
        self.rho = RELATIVE_STEP * case.numel**0.5 * (3**-0.5 if setting.adaptive else WEIGHT_SCALE)
        self.scales = [oracle_scale(self.weights, g, self.rho, setting.adaptive) for g in self.gradients]

    def parameters(self, kind: type[Contestant]) -> list[nn.Parameter]:
        return [nn.Parameter(w.clone() if kind.owns_weights else w) for w in self.weights]


def set_gradients(params: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Lets autograd set p.grad, as training does: new objects each time, at the addresses of `gradients`, no copy."""
    for p in params:
        p.grad = None
    torch.autograd.backward([p.view_as(p) for p in params], list(gradients))


class Turn:
    """A contestant and the gradients that it meets in turn: at each measurement other ones than at the last."""

    def __init__(self, contestant: Contestant, gradients: Sequence[Sequence[Tensor]], first: int = 0) -> None:
        self.contestant = contestant
        self.gradients = gradients
        self.next = first
        self.run = contestant.run

    def prepare(self) -> None:
        set_gradients(self.contestant.params, self.gradients[self.next % len(self.gradients)])
        self.next += 1


def oracle_scale(weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float, adaptive: bool) -> Tensor:
    """rho / (norm + epsilon) in fp64, 0-d."""
    terms = (w.double() * g if adaptive else g.double() for w, g in zip(weights, gradients, strict=True))
    return rho / (torch.stack([term.square().sum() for term in terms]).sum().sqrt() + EPSILON)


def check(contestant: Contestant, gradients: Sequence[Tensor], scale: Tensor) -> None:
    """Compares the perturbed weights with an fp64 oracle, given its `scale`, and the restored ones with the saved.

    A perturbed weight may be off by 2 roundings of its own, 4 of e_w's (16-bit arithmetic that rounds after every
    operation needs that many) and the norm's error; a restored one not at all or, where e_w is subtracted again, by 2
    roundings.

    Raises:
        ArithmeticError: it is off by more.
    """
    params = contestant.params
    rounding = torch.finfo(params[0].dtype).eps
    error_of_e_w = 4 * rounding + contestant.norm_error
    saved = [p.detach().clone() for p in params]
    set_gradients(params, gradients)
    contestant.perturb()
    for i, (p, w, g) in enumerate(zip(params, saved, gradients, strict=True)):
        e_w = (w.double().square() if contestant.adaptive else 1.0) * g.double() * scale
        error = (p.detach() - (w.double() + e_w)).abs()
        if not bool((error <= 2 * rounding * w.abs() + error_of_e_w * e_w.abs()).all()):
            raise ArithmeticError(f"perturbed parameter {i} is off by up to {error.max().item():.3g}")
    contestant.restore()
    for i, (p, w, g) in enumerate(zip(params, saved, gradients, strict=True)):
        if torch.equal(p, w):
            continue
        error = (p.detach().double() - w).abs()
        bound = 2 * rounding * (w.double().abs() + (g * scale).abs())
        if contestant.exact or not bool((error <= bound).all()):
            raise ArithmeticError(f"restored parameter {i} is off by up to {error.max().item():.3g}")
