"""What a developer repeats: `pytest bench --benchmark-only`, one group for each case.

Compare two states of the code by `--benchmark-autosave` and `pytest-benchmark compare`. Here contestants do not take
turns: for ratios between them use `python -m bench`.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import Case, all_cases
from bench.contestants import CONTESTANTS
from bench.inputs import Inputs, Setting, Turn, check
from bench.plan import SLOW_START, unusable

CASES = ("161x64", "densenet121", "resnet50", "size-1e5", "size-1e6")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
USABLE = {
    device: [name for name in CONTESTANTS if name != SLOW_START and name not in unusable([name], torch.device(device))]
    for device in DEVICES
}


@pytest.fixture(scope="module", params=[(device, name) for device in DEVICES for name in CASES], ids="-".join)
def inputs(request: pytest.FixtureRequest) -> tuple[Case, Setting, Inputs]:
    device, name = request.param
    setting = Setting(torch.float32, False, torch.get_num_threads(), torch.device(device))
    return all_cases()[name], setting, Inputs(all_cases()[name], setting)


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if any(name in usable for usable in USABLE.values())])
def test_step(benchmark: BenchmarkFixture, inputs: tuple[Case, Setting, Inputs], name: str) -> None:
    case, setting, data = inputs
    if name not in USABLE[setting.device.type]:
        pytest.skip(f"{name} does not run on {setting.device}")
    contestant = CONTESTANTS[name](data.parameters(CONTESTANTS[name]), data.rho, setting.adaptive)
    check(contestant, data.gradients[0], data.scales[0])
    turn = Turn(contestant, data.gradients)

    def step() -> None:
        turn.run()
        if setting.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.title}, {setting}, {setting.device.type}"
    benchmark.extra_info["numel"] = case.numel
    benchmark.pedantic(step, setup=turn.prepare, rounds=20, warmup_rounds=2)
