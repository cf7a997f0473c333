"""A small training, the same for the same seed, and its loop in each form: what the tests against peers share."""

import torch
from torch import nn

STEPS = 20


class Training:
    """A model and the batches of every step."""

    def __init__(self, dtype):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)).to(dtype)
        self.batches = [
            (
                torch.randn(8, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype),
                torch.randint(0, 5, (8,), generator=generator),
            )
            for _ in range(STEPS)
        ]

    def backward(self, i):
        x, y = self.batches[i]
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        return loss

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]


def train_two_calls(training, sam, before_step=lambda i: None):
    """The perturbed and the stepped weights of all steps, of ours or a peer."""
    trajectory = []
    for i in range(STEPS):
        before_step(i)
        training.backward(i)
        sam.first_step(zero_grad=True)
        trajectory.append(training.weights())
        training.backward(i)
        sam.second_step(zero_grad=True)
        trajectory.append(training.weights())
    return trajectory


def train_closure(training, sam, before_step=lambda i: None):
    trajectory = []
    for i in range(STEPS):
        before_step(i)
        weights_seen = []

        def closure(i=i, seen=weights_seen):
            sam.zero_grad()
            seen.append(training.weights())
            return training.backward(i)

        sam.step(closure)
        assert len(weights_seen) == 2  # at w and at w + e_w
        trajectory += [weights_seen[1], training.weights()]
    return trajectory


def train_closure_after_backward(training, sam, before_step=lambda i: None):
    trajectory = []
    for i in range(STEPS):
        before_step(i)
        sam.zero_grad()
        training.backward(i)

        def closure(i=i):
            trajectory.append(training.weights())
            return training.backward(i)

        sam.step(closure)
        trajectory.append(training.weights())
    return trajectory


FORMS = {"two_calls": train_two_calls, "closure": train_closure, "closure_after_backward": train_closure_after_backward}
