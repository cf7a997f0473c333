"""CUDA graphs and torch.compile around a step."""

import copy
import random

import pytest
import torch
from torch import nn

from fastsam import FusedSAM
from tests.oracle import copies, same_bits

DEVICE = "cuda"
SIZES = [(40, 30), (7,), (1000, 33), ()]


class Elementwise(nn.Module):
    """A model whose kernels give the same bits in a graph and out of it: no matrix product may choose another way."""

    def __init__(self, sizes):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(size, generator=generator) for size in sizes)
        self.left_out = frozenset()

    def forward(self, x):
        return sum((w * x).tanh().sum() for i, w in enumerate(self.weights) if i not in self.left_out)


class Training:
    """A model, its SAM around a capturable optimizer, and one whole step of it on fixed addresses."""

    def __init__(self, backend, adaptive=False, sizes=SIZES, **options):
        self.model = Elementwise(sizes).to(DEVICE)
        self.x = torch.ones((), device=DEVICE)
        self.rho = torch.tensor(0.05, device=DEVICE)
        self.lr = torch.tensor(1e-2, device=DEVICE)
        base = torch.optim.Adam(self.model.parameters(), lr=self.lr, capturable=True)
        self.sam = FusedSAM(base, rho=self.rho, adaptive=adaptive, backend=backend, **options)
        self.side = torch.cuda.Stream()  # of the warm-up

    def step(self):
        self.first_half()
        self.second_half()

    def first_half(self):
        self.model(self.x).backward()
        self.sam.first_step(zero_grad=True)

    def second_half(self):
        self.model(self.x).backward()
        self.sam.second_step(zero_grad=True)

    def set(self, x, rho, lr):
        self.x.fill_(x)
        self.rho.fill_(rho)
        self.lr.fill_(lr)

    def warm_up(self):
        """On a stream of its own, as torch asks before a capture."""
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(self.side)

    def capture(self, steps=1, pool=None):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for _ in range(steps):
                self.step()
        return graph

    def weights(self):
        return copies(self.model.parameters())


SETTINGS = [(1.0, 0.05, 1e-2), (0.5, 0.5, 1e-2), (0.7, 0.0, 3e-3), (1.3, 2.0, 1e-3), (1.0, 0.05, 1e-2)]


@pytest.fixture(params=[False, True], ids=["sam", "asam"])
def trainings(request, fused_backend):
    pair = Training(fused_backend, request.param), Training(fused_backend, request.param)
    for training in pair:
        training.warm_up()
    assert same_bits(pair[0].weights(), pair[1].weights())
    return pair


def test_a_whole_step_replayed_equals_eager(trainings):
    captured, eager = trainings
    graph = captured.capture()
    assert same_bits(captured.weights(), eager.weights())  # a capture runs nothing
    for settings in SETTINGS:
        for training in trainings:
            training.set(*settings)
        graph.replay()
        eager.step()
        assert same_bits(captured.weights(), eager.weights())
        assert same_bits(captured.sam.grad_norm, eager.sam.grad_norm)


def test_replays_and_eager_steps_may_alternate(trainings):
    captured, eager = trainings
    graph = captured.capture()
    for i, settings in enumerate(SETTINGS * 2):
        for training in trainings:
            training.set(*settings)
        if i % 3 == 1:
            captured.step()
        else:
            graph.replay()
        if i % 2:  # other memory for the next eager gradients
            kept = [torch.empty(1000, 33, device=DEVICE) for _ in range(3)]
            assert kept
        eager.step()
        assert same_bits(captured.weights(), eager.weights())


def test_a_replay_leaves_the_addresses_of_the_steps_outside(trainings):
    """Nothing else is allocated: the gradients of the eager steps lie where they lay, so no table is written anew."""
    captured, eager = trainings
    graph = captured.capture()
    for _ in range(3):
        for step in (graph.replay, captured.step):
            step()
            eager.step()
            assert same_bits(captured.weights(), eager.weights())


@pytest.mark.parametrize("seed", range(4))
def test_replays_and_eager_steps_on_any_stream(fused_backend, seed):
    rng = random.Random(seed)
    captured, eager = (Training(fused_backend) for _ in range(2))
    for training in (captured, eager):
        training.warm_up()
    graph = captured.capture()
    streams = [torch.cuda.Stream() for _ in range(3)]
    last, kept = torch.cuda.current_stream(), []
    for settings in SETTINGS * 2:
        stream = rng.choice(streams)
        stream.wait_stream(last)
        with torch.cuda.stream(stream):
            captured.set(*settings)
            rng.choice([graph.replay, captured.step])()
        last = stream
        with torch.cuda.stream(rng.choice([*streams, captured.side])):
            kept.append([torch.full((n,), -1, device=DEVICE) for n in (1, 4, 64, 512, 40_000) for _ in range(4)])
        eager.set(*settings)
        eager.step()
    torch.cuda.synchronize()
    assert same_bits(captured.weights(), eager.weights())
    assert all(bool((t == -1).all()) for some in kept for t in some)


def test_two_graphs_of_one_optimizer(trainings):
    captured, eager = trainings
    graphs = [captured.capture(), captured.capture()]
    for i, settings in enumerate(SETTINGS):
        for training in trainings:
            training.set(*settings)
        graphs[i % 2].replay()
        eager.step()
        assert same_bits(captured.weights(), eager.weights())


class EitherKind(Training):
    """Takes SAM steps and plain ones."""

    def step(self):
        along_momentum = self.sam.direction == "momentum"
        if not along_momentum:
            self.model(self.x).backward()
        if self.sam.first_step(zero_grad=True) or along_momentum:
            self.model(self.x).backward()
        self.sam.second_step(zero_grad=True)

    def take_sam_steps(self, yes):
        self.sam.start = 0 if yes else 10**9


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_a_graph_for_each_kind_of_step(fused_backend, direction):
    """As `start` and `interval` want it: the host chooses which one it replays."""
    captured, eager = (EitherKind(fused_backend, direction=direction) for _ in range(2))
    for training in (captured, eager):
        training.warm_up()
    graphs = {}
    for kind in (True, False):
        captured.take_sam_steps(kind)
        graphs[kind] = captured.capture()
    assert same_bits(captured.weights(), eager.weights())
    for kind in (False, True, True, False, True):
        graphs[kind].replay()
        eager.take_sam_steps(kind)
        eager.step()
        assert same_bits(captured.weights(), eager.weights())


def test_two_graphs_in_one_pool(trainings):
    """Replayed in the order of their capture, as torch asks: the second may use what the first has freed."""
    captured, eager = trainings
    first = captured.capture()
    graphs = [first, captured.capture(pool=first.pool())]
    for i, settings in enumerate(SETTINGS * 2):
        for training in trainings:
            training.set(*settings)
        graphs[i % 2].replay()
        eager.step()
        assert same_bits(captured.weights(), eager.weights())


def test_several_steps_in_one_graph(trainings):
    captured, eager = trainings
    graph = captured.capture(steps=3)
    for settings in SETTINGS:
        for training in trainings:
            training.set(*settings)
        graph.replay()
        for _ in range(3):
            eager.step()
        assert same_bits(captured.weights(), eager.weights())
        assert same_bits(captured.sam.grad_norm, eager.sam.grad_norm)


def test_the_halves_of_a_step_in_two_graphs(trainings):
    captured, eager = trainings
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first):
        captured.first_half()
    with torch.cuda.graph(second, pool=first.pool()):
        captured.second_half()
    assert not captured.sam.perturbed
    for settings in SETTINGS:
        for training in trainings:
            training.set(*settings)
        first.replay()
        second.replay()
        eager.step()
        assert same_bits(captured.weights(), eager.weights())


def test_a_graph_of_many_tensors_some_without_a_gradient(fused_backend):
    """Several launches write its table of addresses; who has a gradient differs between it and the steps outside."""
    sizes = [(i % 7 + 1,) for i in range(400)]
    captured, eager = trainings = [Training(fused_backend, sizes=sizes) for _ in range(2)]
    for training in trainings:
        training.warm_up()
        training.model.left_out = frozenset(range(0, 400, 3))
    graph = captured.capture()
    for i, settings in enumerate(SETTINGS):
        for training in trainings:
            training.set(*settings)
            training.model.left_out = frozenset(range(i, 400, 5))
            training.step()
        eager.model.left_out = frozenset(range(0, 400, 3))
        graph.replay()
        eager.step()
        assert same_bits(captured.weights(), eager.weights())


def test_a_graph_outlives_a_new_layout(trainings):
    """A parameter that comes later gets new tables; the graph goes on with those that it was captured with."""
    captured, eager = trainings
    graph = captured.capture()
    for training in trainings:
        late = nn.Parameter(torch.ones(5000, device=DEVICE))
        training.sam.add_param_group({"params": [late], "rho": training.rho})
        late.grad = torch.ones_like(late)
        training.step()
    torch.cuda.synchronize()
    with torch.cuda.stream(captured.side):  # whatever was freed of its memory is written to
        taken = [torch.full((n,), -1, dtype=torch.int64, device=DEVICE) for n in (1, 64, 512, 4096) for _ in range(50)]
    torch.cuda.synchronize()
    for i, settings in enumerate(SETTINGS):
        for training in trainings:
            training.set(*settings)
        eager.step()
        if i % 2:
            captured.step()
        else:
            graph.replay()
        assert same_bits(captured.weights(), eager.weights())
    assert all(bool((t == -1).all()) for t in taken)


def raise_error():
    raise ZeroDivisionError


@pytest.mark.parametrize("order", ["restored_after_the_capture", "restored_in_the_capture"])
def test_a_capture_that_fails_restores_nothing(trainings, order):
    """Nothing has run on the device, whose flag says saved since the warm-up: there is no backup to restore from."""
    failed, twin = trainings
    before = failed.weights()
    graph = torch.cuda.graph(torch.cuda.CUDAGraph())
    outer, inner = (failed.sam, graph) if order == "restored_after_the_capture" else (graph, failed.sam)
    failed.second_half = raise_error
    with pytest.raises(ZeroDivisionError), outer, inner:
        failed.step()
    del failed.second_half
    torch.cuda.synchronize()
    assert not failed.sam.perturbed
    assert same_bits(failed.weights(), before)
    for _ in range(2):
        for training in trainings:
            training.step()
        assert same_bits(failed.weights(), twin.weights())
    graph = failed.capture()
    graph.replay()
    twin.step()
    assert same_bits(failed.weights(), twin.weights())


def test_a_capture_of_second_step_alone_is_an_error(fused_backend):
    training = Training(fused_backend)
    training.warm_up()
    before = training.weights()
    training.first_half()
    training.model(training.x).backward()
    with pytest.raises(RuntimeError, match="capture both, or neither"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        training.sam.second_step()
    training.sam.restore()
    assert same_bits(training.weights(), before)


@pytest.mark.parametrize("between", ["nothing", "a new layout"])
def test_a_graph_keeps_the_options_that_it_was_captured_with(fused_backend, between):
    """But for a rho that is a tensor on the device, which it reads at every replay."""
    w, v = (nn.Parameter(torch.ones(4, device=DEVICE)) for _ in range(2))
    rho = torch.tensor(1.0, device=DEVICE)
    groups = [{"params": [w], "rho": 1.0}, {"params": [v], "rho": rho}]
    sam = FusedSAM(groups, torch.optim.SGD, lr=0.0, epsilon=0.0, backend=fused_backend)
    e_w, e_v = torch.zeros(2, 4, device=DEVICE)

    def step():
        (w * 1.0 + v * 1.0).sum().backward()
        norm = 8**0.5
        sam.first_step(zero_grad=True)
        e_w.copy_((w.detach() - 1) * norm)
        e_v.copy_((v.detach() - 1) * norm)
        (w * 1.0 + v * 1.0).sum().backward()
        sam.second_step(zero_grad=True)

    def found(action):
        action()
        return float(e_w.mean()), float(e_v.mean())

    def capture():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph

    first = capture()
    assert found(first.replay) == pytest.approx((1.0, 1.0), rel=1e-5)
    if between == "a new layout":
        late = nn.Parameter(torch.ones(2, device=DEVICE))
        sam.add_param_group({"params": [late], "rho": 0.0})
        late.grad = torch.zeros_like(late)
        sam.first_step()
        sam.restore()
    sam.param_groups[0]["rho"] = 3.0
    rho.fill_(5.0)
    assert found(first.replay) == pytest.approx((1.0, 5.0), rel=1e-5)
    assert found(step) == pytest.approx((3.0, 5.0), rel=1e-5)
    assert found(first.replay) == pytest.approx((1.0, 5.0), rel=1e-5)
    second = capture()
    for group in sam.param_groups:
        group["epsilon"] = 8**0.5
    rho.fill_(7.0)
    assert found(step) == pytest.approx((1.5, 3.5), rel=1e-5)
    for _ in range(2):
        assert found(first.replay) == pytest.approx((1.0, 7.0), rel=1e-5)
        assert found(second.replay) == pytest.approx((3.0, 7.0), rel=1e-5)
        assert found(step) == pytest.approx((1.5, 3.5), rel=1e-5)


def test_options_that_changed_before_a_capture_are_an_error(fused_backend):
    training = Training(fused_backend)
    training.sam.param_groups[0]["rho"] = 0.1
    training.warm_up()
    training.sam.param_groups[0]["rho"] = 0.2
    training.model(training.x).backward()
    with pytest.raises(RuntimeError, match="take a step with them first"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        training.sam.first_step()


def losses(model, inputs, backend):
    sam = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.1, backend=backend, lr=0.05)
    found = []
    for x in inputs:
        loss = model(x).square().mean()
        loss.backward()
        found.append(float(loss))
        sam.first_step(zero_grad=True)
        model(x).square().mean().backward()
        sam.second_step(zero_grad=True)
    return found


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_as_it_does_uncompiled(fused_backend, mode):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1)).to(DEVICE)
    twin = copy.deepcopy(model)
    inputs = [torch.randn(32, 16, device=DEVICE) for _ in range(12)]
    compiled = torch.compile(model, mode=mode)
    found = losses(compiled, inputs[:6], fused_backend)
    recorded = graphs_recorded()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += losses(compiled, inputs[6:], fused_backend)
    assert graphs_recorded() == recorded, "a step records its graphs anew"
    expected = losses(twin, inputs[:6], fused_backend) + losses(twin, inputs[6:], fused_backend)
    assert found == pytest.approx(expected, rel=1e-3)


def graphs_recorded():
    """How many graphs torch.compile's mode reduce-overhead has recorded on the current device."""
    from torch._inductor import cudagraph_trees

    manager = cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return 0 if manager is None else next(copy.copy(manager.graph_counter))
