"""The benchmarks' own parts, and what a step costs in counts: calls, parallel regions, allocations, table refreshes."""

import functools
import json
import operator
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import fastsam
from bench import __main__ as command_line, driver, kernels, measures, plots, results, step_suite, timing
from bench.cases import DATA, Case, all_cases
from bench.contestants import CONTESTANTS, CPU_YARDSTICKS, GPU_YARDSTICKS, Contestant, EmptyBase, ForeachKept, Walk
from bench.inputs import Inputs, Setting, Turn, check, set_gradients
from bench.measures import allocations
from bench.plan import SLOW_START
from fastsam import misuse, places
from fastsam.backends import reference

CPU = torch.device("cpu")
CASE = Case("few", "few", "small", ((7, 5), (), (0,), (129,), (3, 2, 2)))
CHECKED = [name for name in CONTESTANTS if name != SLOW_START]

# In millions, with the digits that the publication gives.
PUBLISHED = {
    "resnet18": "11.689512",  # torchvision's table of weights
    "resnet50": "25.557032",
    "densenet121": "7.978856",
    "vit-b16": "86.567656",
    "wideresnet28-10": "36.5",  # arXiv 1605.07146, table 4
    "mixer-b16": "59.88",  # timm's results table; "59" in arXiv 2105.01601, table 1
    "bert-base": "109.48",  # Hugging Face, bert-base-uncased without the head; "110" in arXiv 1810.04805
    "gpt2": "124",  # OpenAI's repository, gpt-2
    "gpt2-medium": "355",
    "llama-1b": "1236",  # "1.23B" on the model card of Llama 3.2 1B; 1,235,814,400 in its weights
}


def test_sizes_are_the_published_ones() -> None:
    assert set(PUBLISHED) == {file.stem for file in DATA.glob("*.json")}
    for name, published in PUBLISHED.items():
        digits = len(published.partition(".")[2])
        assert f"{all_cases()[name].numel / 1e6:.{digits}f}" == published, name
        assert all_cases()[name].numel == json.loads((DATA / f"{name}.json").read_text())["total"]


def test_sweeps_have_the_size_in_their_name() -> None:
    cases = all_cases()
    assert [cases[f"size-1e{k}"].numel for k in range(4, 10)] == [10**k for k in range(4, 10)]
    assert [(len(cases[f"count-{n}"].shapes), cases[f"count-{n}"].numel) for n in (1, 10000)] == [
        (1, 10**7),
        (10000, 10**7),
    ]


def setting(dtype: torch.dtype = torch.float32, adaptive: bool = False) -> Setting:
    return Setting(dtype, adaptive, torch.get_num_threads(), CPU)


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.filterwarnings("ignore:FusedSAM perturbs torch.bfloat16")
def test_every_contestant_computes_the_step(name: str, dtype: torch.dtype, adaptive: bool) -> None:
    inputs = Inputs(CASE, setting(dtype, adaptive))
    kind = CONTESTANTS[name]
    if adaptive and name == "composer":
        with pytest.raises(NotImplementedError, match="no adaptive form"):
            kind(inputs.parameters(kind), inputs.rho, adaptive)
        return
    contestant = kind(inputs.parameters(kind), inputs.rho, adaptive)
    for gradients, scale in zip(inputs.gradients, inputs.scales, strict=True):
        check(contestant, gradients, scale)


class ForgetsOne(ForeachKept):
    def restore(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.weights[1:], self.backup[1:])


class StepsTooFar(ForeachKept):
    def perturb(self) -> None:
        rho, self.rho = self.rho, 1.1 * self.rho
        super().perturb()
        self.rho = rho


class IgnoresAdaptive(ForeachKept):
    def perturb(self) -> None:
        self.adaptive = False
        super().perturb()
        self.adaptive = True


@pytest.mark.parametrize(
    ("kind", "adaptive", "message"),
    [(ForgetsOne, False, "restored"), (StepsTooFar, False, "perturbed"), (IgnoresAdaptive, True, "perturbed")],
)
def test_check_finds_wrong_results(kind: type[Contestant], adaptive: bool, message: str) -> None:
    inputs = Inputs(CASE, setting(adaptive=adaptive))
    with pytest.raises(ArithmeticError, match=message):
        check(kind(inputs.parameters(kind), inputs.rho, adaptive), inputs.gradients[0], inputs.scales[0])


def test_gradients_are_fresh_in_every_turn() -> None:
    inputs = Inputs(CASE, setting())
    contestant = ForeachKept(inputs.parameters(ForeachKept), inputs.rho, False)
    turn = Turn(contestant, inputs.gradients)
    seen = []
    for i in range(4):
        turn.prepare()
        seen.append([p.grad for p in contestant.params])
        for p, g in zip(contestant.params, inputs.gradients[i % 3], strict=True):
            assert p.grad.data_ptr() == g.data_ptr()
            assert torch.equal(p.grad, g)
    assert len({id(g) for grads in seen for g in grads}) == 4 * len(CASE.shapes)


class Counted:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def prepare(self) -> None:
        self.calls.append("prepare")

    def run(self) -> None:
        self.calls.append("run")


def test_contestants_take_turns_and_the_first_round_does_not_count() -> None:
    contestants = {"a": Counted(), "b": Counted()}
    order: list[str] = []
    samples = timing.interleave(contestants, CPU, seconds=0, min_rounds=5, on_turn=order.append)
    assert {name: len(found.wall) for name, found in samples.items()} == {"a": 5, "b": 5}
    assert all(set(order[i : i + 2]) == {"a", "b"} for i in range(0, 12, 2))
    assert contestants["a"].calls == ["prepare", "run"] * 6


def test_ratios_are_taken_within_a_round() -> None:
    assert timing.median_ratio([2.0, 20.0, 600.0], [1.0, 10.0, 100.0]) == 2.0
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timing.quartiles([7.0]) == (7.0, 7.0, 7.0)


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[results.Row]]:
    path = tmp_path / "found.json"
    status = command_line.main([*arguments, "--seconds", "0", "--output", str(path)])
    return status, results.load(path)


def test_the_driver_keeps_one_row_a_measurement(tmp_path: Path) -> None:
    status, rows = run(
        tmp_path, "--cases", "161x64", "digits-cnn", "--contestants", "fastsam-cpp", "composer", "--threads", "1"
    )
    assert status == 0
    step = {row["contestant"]: row for row in rows if row["suite"] == "step"}
    assert set(step) == {*CPU_YARDSTICKS, "fastsam-cpp", "composer"}
    assert step["fastsam-cpp"]["bytes"] == 28 * 161 * 64
    assert step["composer"]["bytes"] == 36 * 161 * 64
    assert set(step["fastsam-cpp"]["speedup_over"]) == {"composer"}
    training = {row["contestant"]: row for row in rows if row["suite"] == "training"}
    assert training["base"]["ratio_to_base"] == 1.0
    others = {"first pass on 25%", "along the momentum", "interval=1, foreach backend", "pytorch_optimizer"}
    assert {"interval=1", "interval=10", *others} < set(training)
    assert all({"device", "driver", "versions", "commit", "date", "wall_us", "rounds"} <= set(row) for row in rows)
    assert len({row["key"] for row in rows}) == len(rows)

    status, again = run(tmp_path, "--cases", "161x64", "--contestants", "composer", "--threads", "1")
    assert {row["key"] for row in again} == {row["key"] for row in rows}
    table = (tmp_path / "found.md").read_text()
    assert "161 tensors of 64: 10,304 in 161 tensors, float32, plain, 1 thread" in table
    assert "| fastsam-cpp |" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "resnet5"], "no case is called 'resnet5'; there are: 161x64, densenet121"),
        (["--contestants", "fastsam-gpu"], "no contestant is called 'fastsam-gpu'; there are: fastsam-"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_wrong_names_list_the_right_ones(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command_line.main(arguments)
    assert message in capsys.readouterr().err


def test_help_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--help"])
    text = capsys.readouterr().out
    assert "resnet50" in text
    assert "pytorch_optimizer" in text
    assert "python -m bench plot" in text


def test_what_does_not_fit_is_left_out_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_suite, "available_memory", lambda device: 100_000)
    status, rows = run(tmp_path, "--cases", "161x64", "--contestants", "composer", "--threads", "1")
    assert status == 0
    assert [row["contestant"] for row in rows] == ["composer"]
    assert "needs 0.0 GB of memory; 0.0 GB are free" in rows[0]["left_out"]
    assert "Left out:\n- composer: with these" in (tmp_path / "found.md").read_text()


def test_wrong_results_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTESTANTS, "composer", StepsTooFar)
    status, rows = run(tmp_path, "--cases", "161x64", "--contestants", "composer", "foreach-item", "--threads", "1")
    assert status == 1
    left_out = {row["contestant"]: row.get("left_out") for row in rows}
    assert left_out["composer"].startswith("wrong results: perturbed parameter 0 is off by up to ")
    assert left_out["foreach-item"] is None


def test_interrupting_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver.training_suite, "measure", interrupted)
    status, rows = run(tmp_path, "--cases", "161x64", "digits-cnn", "--contestants", "composer", "--threads", "1")
    assert status == driver.INTERRUPTED
    assert {row["contestant"] for row in rows} == {*CPU_YARDSTICKS, "composer"}


def test_plots_are_drawn_from_the_results_alone(tmp_path: Path) -> None:
    status, rows = run(
        tmp_path, "--cases", "161x64", "digits-cnn", "--contestants", "fastsam-cpp", "foreach*", "--threads", "1"
    )
    assert status == 0
    models = [row | {"kind": "model", "key": "m" + row["key"]} for row in rows if row["suite"] == "step"]
    sizes = [
        row | {"kind": "size", "numel": numel, "key": f"s{numel}" + row["key"]}
        for row in rows
        for numel in (10**4, 10**5)
        if row["suite"] == "step"
    ]
    results.save(tmp_path / "found.json", [*models, *sizes])
    command_line.main(["plot", str(tmp_path / "found.json")])
    names = {"time-over-size", "speedup-by-model", "share-of-bandwidth", "cost-of-interval"}
    for name in names:
        assert (tmp_path / f"found-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert plots.plot_all([tmp_path / "nothing.json"], None) == []


# -- what a step costs, in counts --------------------------------------------------------------------------------------


def steps(sam: fastsam.FusedSAM, turns: int) -> Callable[[], None]:
    """Takes `turns` SAM steps, each with new gradients at other addresses than the last."""
    params = [p for group in sam.param_groups for p in group["params"]]
    gradients = [[torch.randn_like(p) for p in params] for _ in range(2)]

    def take() -> None:
        for i in range(turns):
            set_gradients(params, gradients[i % 2])
            sam.first_step()
            sam.restore()

    take()  # lays out the buckets and allocates the backup
    return take


def parameters(*dtypes: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(20_000, dtype=dtype)) for dtype in dtypes for _ in range(16)]


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.float64]], ids=["one bucket", "two buckets"])
def test_calls_of_a_step(dtypes: list[torch.dtype]) -> None:
    params = parameters(*dtypes)
    groups = [{"params": params[::2]}, {"params": params[1::2], "rho": 0.1}]
    take = steps(fastsam.FusedSAM(groups, EmptyBase, backend="cpp"), turns=4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        take()
    calls = Counter(event.name() for event in profiler.profiler.kineto_results.events())
    own = {name: count for name, count in calls.items() if name.startswith("fastsam::")}
    buckets = len(dtypes)
    expected = {f"fastsam::{name}": 4 * buckets for name in ("norm", "perturb", "restore")}
    assert own == expected | ({"fastsam::combine": 4} if buckets > 1 else {})


def test_a_step_allocates_nothing() -> None:
    sam = fastsam.FusedSAM(parameters(torch.float32), EmptyBase, backend="cpp")
    assert allocations(steps(sam, turns=4)) == []


def test_table_refreshes_of_a_step() -> None:
    params = parameters(torch.float32)
    sam = fastsam.FusedSAM(params, EmptyBase, backend="cpp")
    take = steps(sam, turns=4)
    ((_, bucket),) = sam._state.perturbation.buckets
    weights, grads = bucket.weight_table.refreshes, bucket.grad_table.refreshes
    take()
    assert (bucket.weight_table.refreshes, bucket.grad_table.refreshes) == (weights, grads + 4)
    gradients = [torch.randn_like(p) for p in params]
    for _ in range(3):
        set_gradients(params, gradients)
        sam.first_step()
        sam.restore()
    assert bucket.grad_table.refreshes == grads + 5
    assert sam._state.perturbation.buckets[0][1] is bucket


def python_calls(tensors: int) -> tuple[Counter[str], Counter[str]]:
    """Of one step: calls of fastsam's functions, and what these call that is written in C."""
    sam = fastsam.FusedSAM([torch.nn.Parameter(torch.ones(64)) for _ in range(tensors)], EmptyBase, backend="cpp")
    take = steps(sam, turns=1)
    folder = str(Path(fastsam.__file__).parent)
    ours: Counter[str] = Counter()
    in_c: Counter[str] = Counter()

    def look(frame: FrameType, event: str, what: Any) -> None:
        name = frame.f_code.co_name
        if not frame.f_code.co_filename.startswith(folder):
            return
        if event == "call" and not name.startswith("<"):  # newer Pythons inline comprehensions
            ours[name] += 1
        if event == "c_call":
            in_c[what.__name__] += 1

    before = sys.getprofile()
    sys.setprofile(look)
    take()
    sys.setprofile(before)
    return ours, in_c


def test_python_calls_of_a_step(monkeypatch: Any) -> None:
    """None for each tensor, but the mark on its gradient."""
    monkeypatch.setattr(misuse, "_alive", [])  # those of other tests are looked at, too
    few, few_in_c = python_calls(4)
    many, many_in_c = python_calls(40)
    assert few == many
    assert sum(few.values()) == 78
    assert many_in_c - few_in_c == {"setattr": 36}


def test_every_yardstick_reads_and_writes_one_list() -> None:
    for name, kind in GPU_YARDSTICKS.items():
        yardstick = kind(1000, torch.float32, torch.device("cpu"))
        before = yardstick.target.clone()
        for _ in range(2):
            if name != "in-place":
                yardstick.target.zero_()
            yardstick.run()
            assert torch.equal(yardstick.target, -before if name == "in-place" else yardstick.source), name
            before = yardstick.target.clone()


@pytest.mark.parametrize("past_caches", [False, True], ids=["plain stores", "past the caches"])
@pytest.mark.parametrize("streams", [1, 2, 4, 8])
def test_every_walk_moves_each_word_once(streams: int, past_caches: bool) -> None:
    Walk(1, torch.float32, CPU)
    walk = torch.ops.fastsam_bench.walk
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(2**62, (6 * 2048,), generator=generator) for _ in range(2))
    for kind in range(4):
        first, second = x.clone(), y.clone()
        found = walk(first, second, kind, streams, past_caches)
        if kind == 0:
            assert found == functools.reduce(operator.xor, [*x.tolist(), *y.tolist()])
        w, g, half = x, y, 3 * 2048
        if kind == 3:  # w and the backup are written
            w, g = torch.cat([x[:half] ^ y[:half], x[half:]]), torch.cat([y[:half], x[:half]])
        assert torch.equal(first, w)
        assert torch.equal(second, [g, x, ~y, g][kind])


def test_without_a_compiler_the_walks_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*arguments: object, **options: object) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr("torch.utils.cpp_extension.load", unable)
    status, rows = run(tmp_path, "--cases", "161x64", "--contestants", "composer", "--threads", "1", "--suite", "step")
    assert status == 0
    left_out = {row["contestant"]: row.get("left_out") for row in rows}
    reason = "RuntimeError: Ninja is required to load C++ extensions"
    assert left_out == {"copy": None, "in-place": None, "composer": None, "walk": reason}


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H200", 4.8e12), ("NVIDIA Thing", None)])
def test_on_a_gpu_the_floor_is_the_fastest_yardstick(name: str, peak: float | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(measures, "device_name", lambda device: name)
    times = {"copy": 4.0, "in-place": 3.0, "add": 2.0, "restore": 2.5, "fastsam-cpp": 10.0}
    samples = {k: timing.Samples(wall=[20.0] * 3, device=[t] * 3, host=[1.0] * 3) for k, t in times.items()}
    case = Case("small", "small", "small", ((1000,),))
    setting = Setting(torch.float32, False, 1, torch.device("cuda"))
    row = step_suite.figures(case, setting, "fastsam-cpp", samples)
    assert (row["floor"], row["share_of_floor"]) == ("add", 0.7)
    assert row["share_of_copy_bandwidth"] == 1.4
    assert row["host_us"][1] == 1e6
    assert row.get("share_of_peak") == (None if peak is None else round(28_000 / 10 / peak, 4))
    assert "floor" not in step_suite.figures(case, setting, "add", samples)


def test_a_candidate_changes_a_backend_while_it_is_applied() -> None:
    before = reference.chunk_size(100)
    with kernels.Shape("fastsam-reference", (("chunk_size", 7),)).applied():
        assert reference.chunk_size(100) == 7
    assert reference.chunk_size(100) == before
    with kernels.Shape("fastsam-reference").applied():
        assert reference.chunk_size(100) == before


def test_launches_that_nobody_counted_reach_no_target() -> None:
    names = {"case": "resnet50", "contestant": "fastsam-cuda", "dtype": "float32", "adaptive": False}
    times = {"speedup_over": {"foreach-item": 2.0}, "wall_speedup_over": {"davda54": 30.0}}
    for counted, held in (({}, False), ({"launches": 4}, True), ({"launches": 5}, False)):
        rows = kernels.targets([{**names, **times, **counted}])
        [row] = [r for r in rows if "launches" in r["target"] and r["contestant"] == "fastsam-cuda"]
        assert (row["measured"], row["held"]) == (counted.get("launches"), held)


def test_the_step_suite_needs_no_data_set() -> None:
    code = "import sys; sys.modules['sklearn'] = sys.modules['matplotlib'] = None; import bench.__main__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_foreach_is_measured_without_the_native_library() -> None:
    """As in a plain install; the others go on with it."""
    params = parameters(torch.float32)
    set_gradients(params, [torch.ones_like(p) for p in params])
    by_python = CONTESTANTS["fastsam-foreach"](params, 0.1, False)
    by_python.run()
    usual = fastsam.FusedSAM(params, EmptyBase, backend="foreach")
    usual.first_step()
    usual.restore()
    for sam, expected in ((by_python.sam, None), (usual, places.native())):
        [(_, bucket)] = sam._state.perturbation.buckets
        assert bucket._places._library is expected


COUNT_REGIONS = """
#define _GNU_SOURCE
#include <dlfcn.h>
static long regions;
long parallel_regions(void) { return regions; }
void GOMP_parallel(void (*f)(void*), void* data, unsigned threads, unsigned flags) {
  static void (*real)(void (*)(void*), void*, unsigned, unsigned);
  if (!real) real = dlsym(RTLD_NEXT, "GOMP_parallel");
  ++regions;
  real(f, data, threads, flags);
}
"""
PRINT_REGIONS = """
import ctypes, torch, fastsam
from tests.bench.test_bench import parameters, steps
from bench.contestants import EmptyBase
torch.set_num_threads(2)
regions = ctypes.CDLL(None).parallel_regions
for dtypes in ([torch.float32], [torch.float32, torch.float64]):
    take = steps(fastsam.FusedSAM(parameters(*dtypes), EmptyBase, backend="cpp"), turns=4)
    before = regions()
    take()
    print(regions() - before)
"""


def test_parallel_regions_of_a_step(tmp_path: Path) -> None:
    source, library = tmp_path / "regions.c", tmp_path / "regions.so"
    source.write_text(COUNT_REGIONS)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    root = Path(__file__).parents[2]
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", PRINT_REGIONS]
    found = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(4 * 3), str(4 * 3 * 2)]
