"""Breaks the kernels, and what leads to them, on purpose: each mutant has to turn a test red.

    python tests/gpu/mutants.py [--gpu] [--seconds S] [--list] [NAME ...]

Works on a copy of the tree. Here the judges are the emulator of the CUDA kernels, Triton's interpreter and the machine
code (with nvcc on the path, of the CUDA kernels too); with --gpu, the tests on the device, each with a build of its own
where C++ is mutated. A judge has to be green on the tree as it is. The exit status is 0 where no mutant survived and
none went unjudged that has a judge here.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
KERNELS = "tests/kernels/test_kernels.py"
CUDA, MATH, HOST = "csrc/cuda/sam_kernels.cuh", "csrc/sam_math.h", "csrc/cuda/sam_cuda.cu"
TRITON = "fastsam/backends/triton.py"
FAILED = 1
"""pytest's exit status where tests failed; a crash, which counts as well, is negative."""


@dataclass(frozen=True)
class Judge:
    """Tests: those of `path` whose names contain `chosen`."""

    kind: str
    path: str
    chosen: str

    def command(self) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--disable-warnings"]
        return [*command, *(["-m", "gpu"] if self.kind == "gpu" else []), self.path, "-k", self.chosen]

    def environment(self) -> dict[str, str]:
        chosen = {"interpreted": {"TRITON_INTERPRET": "1"}, "gpu": {"CI": "true", "FASTSAM_REQUIRE_GPU": "1"}}
        kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "CI")}
        # Without byte code: two mutants of one size may be written within one tick of the clock.
        return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **chosen.get(self.kind, {})}


@dataclass(frozen=True)
class Mutant:
    """`old`, which is there once, becomes `new`."""

    name: str
    path: str
    old: str
    new: str
    judges: tuple[Judge, ...]


def emulated(tests: str) -> tuple[Judge, ...]:
    """The CUDA kernels, by the emulator and on the device."""
    return Judge("emulated", KERNELS, f"emulated and ({tests})"), Judge("gpu", KERNELS, f"cuda-cuda and ({tests})")


def interpreted(tests: str) -> tuple[Judge, ...]:
    """The Triton kernels, by the interpreter and on the device."""
    one_type = f"({tests}) and not (float64 or float16)"
    return Judge("interpreted", KERNELS, f"triton and {one_type}"), Judge("gpu", KERNELS, f"triton-cuda and {one_type}")


def on_gpu(file: str, tests: str) -> tuple[Judge, ...]:
    return (Judge("gpu", f"tests/gpu/test_{file}.py", tests),)


def compiled(tests: str) -> tuple[Judge, ...]:
    return (Judge("compiled", "tests/package/test_triton_compile.py", tests),)


def by_nvcc(tests: str) -> tuple[Judge, ...]:
    return (Judge("nvcc", "tests/package/test_cuda_build.py", tests),)


NEVER_RAN = "nothing_is_restored or failed_one"
MUTANTS = (
    # -- norm
    Mutant("cuda: norm leaves saved", CUDA, "    *saved = 0;\n", "", emulated(NEVER_RAN)),
    Mutant("triton: norm leaves saved", TRITON, "        tl.store(saved, 0)\n", "", interpreted(NEVER_RAN)),
    Mutant(
        "cuda: last block sums one stride",
        CUDA,
        "for (uint32_t i = threadIdx.x; i < gridDim.x; i += kThreads) sum += __ldcg(partials + i);",
        "if (threadIdx.x < gridDim.x) sum += __ldcg(partials + threadIdx.x);",
        emulated("last_block"),
    ),
    Mutant(
        "triton: last block sums one stride",
        TRITON,
        "for i in range(0, tl.num_programs(0), SUMS):",
        "for i in range(0, SUMS, SUMS):",
        interpreted("last_block"),
    ),
    Mutant(
        "cuda: the first blocks take no chunk more",
        CUDA,
        "first + per_block + (block < longer ? 1 : 0)",
        "first + per_block",
        emulated("many_chunks"),
    ),
    Mutant(
        "cuda: norm goes on into the next parameter",
        CUDA,
        " && bucket.chunks[i + 1].slot == c.slot)",
        ")",
        emulated("many_chunks"),
    ),
    Mutant("cuda: norm goes on into the next block", CUDA, " && i + 1 < end &&", " &&", emulated("many_chunks")),
    Mutant(
        "triton: the first programs take no chunk more",
        TRITON,
        "range(per_program + (pid < longer).to(tl.int32))",
        "range(per_program)",
        interpreted("many_chunks"),
    ),
    Mutant("triton: counter stays", TRITON, "        tl.store(counter, 0)\n", "", interpreted("alignment")),
    Mutant(
        "cuda: counter stays",
        CUDA,
        '"r"(gridDim.x - 1)',
        '"r"(0x7fffffffu)',
        (Judge("gpu", KERNELS, "cuda-cuda and alignment"),),
    ),
    Mutant("triton: counts without order", TRITON, 'sem="acq_rel"', 'sem="relaxed"', compiled("sees_every_partial")),
    Mutant(
        "cuda: counts without order", CUDA, "atom.acq_rel.gpu.global", "atom.relaxed.gpu.global", by_nvcc("last_block")
    ),
    Mutant(
        "cuda: norm takes a missing gradient",
        CUDA,
        "    if (grad == 0) continue;\n",
        "",
        emulated("without_gradient"),
    ),
    Mutant(
        "triton: norm takes a missing gradient",
        TRITON,
        "        n *= (g != 0).to(tl.int32)\n",
        "",
        interpreted("without_gradient"),
    ),
    Mutant(
        "cuda: norm adaptive for all groups",
        CUDA,
        "    if (adaptive[c.group()] != 0)\n      sum += square_chunk<true>",
        "    if (adaptive[0] != 0)\n      sum += square_chunk<true>",
        emulated("mixed"),
    ),
    Mutant(
        "triton: norm adaptive for all groups",
        TRITON,
        "t = tl.where(adaptive != 0, tl.abs(w) * t, t)",
        "t = tl.abs(w) * t",
        interpreted("mixed"),
    ),
    Mutant(
        "cuda: divides", MATH, "mul(reciprocal(add(norm, epsilon)), rho)", "rho / (norm + epsilon)", emulated("size")
    ),
    Mutant(
        "triton: divides",
        TRITON,
        "        s = reciprocal * tl.load(rho + k, mask=inside, other=0.0)\n",
        "        s = tl.load(rho + k, mask=inside, other=0.0) / divisor\n",
        interpreted("combine"),
    ),
    Mutant("cuda: no epsilon", MATH, "reciprocal(add(norm, epsilon))", "reciprocal(norm)", emulated("combine")),
    Mutant(
        "triton: norm of 32-bit offsets",
        TRITON,
        "        g += offset * SIZE\n        w = g\n",
        "        g += (offset * SIZE).to(tl.int32)\n        w = g\n",
        on_gpu("steps", "triton and 2_to_31"),
    ),
    # -- perturb
    Mutant(
        "cuda: contracts", MATH, "  return add(w, mul(g, scale));", "  return std::fma(g, scale, w);", emulated("size")
    ),
    Mutant(
        "triton: contracts",
        TRITON,
        'UNFUSED = {"enable_fp_fusion": False}',
        "UNFUSED: dict[str, bool] = {}",
        (*compiled("rounds_every"), Judge("gpu", KERNELS, "triton-cuda and alignment")),
    ),
    Mutant(
        "cuda: may be contracted",
        MATH,
        "  return add(w, mul(g, scale));",
        "  return w + g * scale;",
        by_nvcc("rounds_every"),
    ),
    Mutant("cuda: writes where not finite", CUDA, "if (finite) store(w", "if (true) store(w", emulated("not_finite")),
    Mutant("cuda: writes edges where not finite", CUDA, "if (finite) w[i]", "if (true) w[i]", emulated("not_finite")),
    Mutant(
        "triton: writes where not finite",
        TRITON,
        "    n_written = n * finite\n",
        "    n_written = n\n",
        interpreted("not_finite"),
    ),
    Mutant(
        "triton: writes edges where not finite",
        TRITON,
        "< (n - body) * finite\n",
        "< n - body\n",
        interpreted("not_finite"),
    ),
    Mutant("cuda: another group's scale", CUDA, "scale[c.group()]", "scale[0]", emulated("alignment")),
    Mutant(
        "triton: another group's scale", TRITON, "tl.load(scale + group)", "tl.load(scale)", interpreted("alignment")
    ),
    Mutant(
        "cuda: perturb says nothing of it",
        CUDA,
        "  if (blockIdx.x == 0 && threadIdx.x == 0) *saved = generation;\n",
        "",
        emulated("alignment"),
    ),
    Mutant(
        "triton: perturb says nothing of it",
        TRITON,
        "    if pid == 0:\n        tl.store(saved, generation)\n",
        "",
        interpreted("alignment"),
    ),
    Mutant(
        "triton: perturb takes a missing gradient",
        TRITON,
        "    n *= (g != 0).to(tl.int32)  # not",
        "    # not",
        interpreted("without_gradient"),
    ),
    Mutant(
        "cuda: backup of the wrong slot",
        CUDA,
        "perturb_chunk<false>(w, g, backup + c.backup,",
        "perturb_chunk<false>(w, g, backup + c.offset,",
        emulated("alignment"),
    ),
    Mutant(
        "cuda: no edge after the body",
        CUDA,
        "return i < peeled.head ? i : i + ",
        "return true ? i : i + ",
        emulated("size"),
    ),
    Mutant(
        "triton: no edge after the body", TRITON, "tl.where(k < head, k, k + body)", "k", interpreted("some_vectors")
    ),
    Mutant(
        "cuda: truncates",
        CUDA,
        "__float2bfloat16_rn(x)",
        "__float2bfloat16_rz(x)",
        (Judge("gpu", KERNELS, "cuda-cuda and even"),),
    ),
    Mutant(
        "triton: vectors by hint only",
        TRITON,
        "g_body = tl.multiple_of((g + head * SIZE).to(POINTER), 16)\n        if",
        "g_body = (g + head * SIZE).to(POINTER)\n        if",
        compiled("loads_vectors"),
    ),
    # -- restore
    Mutant(
        "cuda: restores any generation",
        CUDA,
        "if (*saved != generation) return;",
        "if (*saved == 0) return;",
        emulated(NEVER_RAN),
    ),
    Mutant(
        "triton: restores any generation",
        TRITON,
        "if tl.load(saved) == generation:",
        "if tl.load(saved) != 0:",
        interpreted(NEVER_RAN),
    ),
    Mutant(
        "triton: restores without a gradient",
        TRITON,
        "        if g != 0:\n            b = backup",
        "        if w != 0:\n            b = backup",
        interpreted("without_gradient"),
    ),
    Mutant(
        "cuda: restores without a gradient",
        CUDA,
        "  if (grad == 0) return;\n  const T* b",
        "  const T* b",
        emulated("without_gradient"),
    ),
    # -- what leads to them
    Mutant(
        "one generation",
        "fastsam/bucket.py",
        "self.generation % (2**31 - 1) + 1",
        "1",
        (*emulated(NEVER_RAN), *interpreted(NEVER_RAN)),
    ),
    *(
        Mutant(
            f"cuda: {op} on the default stream",
            HOST,
            old,
            old.replace("stream_of(chunks)", "nullptr"),
            on_gpu("streams", tests),
        )
        for op, old, tests in (
            (
                "norm",
                "norm_kernel<T, A><<<static_cast<uint32_t>(blocks), kThreads, 0, stream_of(chunks)>>>",
                "cuda and current_stream_is_used",
            ),
            (
                "perturb",
                "perturb_kernel<T, A><<<static_cast<uint32_t>(bucket.n_chunks), kThreads, 0, stream_of(chunks)>>>",
                "cuda and current_stream_is_used",
            ),
            (
                "restore",
                "restore_kernel<T><<<static_cast<uint32_t>(bucket.n_chunks), kThreads, 0, stream_of(chunks)>>>",
                "cuda and restore_runs_on",
            ),
        )
    ),
    Mutant(
        "triton: on the default stream",
        TRITON,
        "return torch.cuda.device(device) if",
        "return torch.cuda.stream(torch.cuda.default_stream(device)) if",
        on_gpu("streams", "triton and (current_stream_is_used or restore_runs_on)"),
    ),
    Mutant(
        "backup freed too soon",
        "fastsam/bucket.py",
        "backup.record_stream(torch.cuda.current_stream(self.device))",
        "pass",
        on_gpu("streams", "outlives_a_restore"),
    ),
    Mutant(
        "reference: backup freed too soon",
        "fastsam/backends/reference.py",
        "        w.copy_(view)\n    bucket.free_backup()\n",
        "        w.copy_(view)\n    bucket.backup = None\n",
        on_gpu("streams", "outlives_a_restore and reference"),
    ),
    Mutant(
        "backup of what has moved freed too soon",
        "fastsam/bucket.py",
        "            local(self.params[i]).copy_(view)\n        self.free_backup()\n",
        "            local(self.params[i]).copy_(view)\n        self.backup = None\n",
        on_gpu("streams", "outlives_a_restore and move"),
    ),
    Mutant(
        "restore overtakes a perturb on another stream",
        "fastsam/bucket.py",
        "        wait_for(self.stream)\n",
        "",
        on_gpu("streams", "waits_for_a_perturb"),
    ),
    Mutant(
        "tables freed too soon",
        "fastsam/bucket.py",
        "        self.weight_table.record_stream(stream)\n        self.grad_table.record_stream(stream)\n",
        "",
        on_gpu("streams", "tables_outlive and (triton or cuda)"),
    ),
    Mutant(
        "chunks freed too soon",
        "fastsam/bucket.py",
        "        for t in (self.chunks, self.partials, self.counter, self.saved, *staged):\n",
        "        for t in staged:\n",
        on_gpu("streams", "tables_outlive and (triton or cuda)"),
    ),
    Mutant(
        "scalars freed too soon",
        "fastsam/scalars.py",
        "            t.record_stream(stream)\n",
        "            pass\n",
        on_gpu("streams", "tables_outlive and (triton or cuda)"),
    ),
    Mutant(
        "foreach: buffers of another stream",
        "fastsam/backends/foreach.py",
        " and plan.stream == bucket.stream)",
        ")",
        on_gpu("streams", "tables_outlive and foreach"),
    ),
    Mutant(
        "tables uploaded from memory that changes",
        "fastsam/device.py",
        "target.copy_(source.pin_memory(), non_blocking=True)",
        "kept = vars(upload).setdefault(str(len(source)), source.pin_memory())\n"
        "        target.copy_(kept.copy_(source), non_blocking=True)",
        on_gpu("streams", "many_tables or new_gradients"),
    ),
    Mutant(
        "tables uploaded with a wait",
        "fastsam/device.py",
        "target.copy_(source.pin_memory(), non_blocking=True)",
        "target.copy_(source)",
        on_gpu("streams", "nothing_waits"),
    ),
    Mutant(
        "a graph takes the table of the steps outside",
        "fastsam/bucket.py",
        "        if capturing(self._eager.device):\n            self.tensor",
        "        if False:\n            self.tensor",
        on_gpu("graphs", "alternate or several_steps or equals_eager"),
    ),
    Mutant(
        "a graph writes the table of the steps outside",
        "fastsam/bucket.py",
        "self.tensor = torch.zeros_like(self._eager)",
        "self.tensor = self._eager.zero_()",
        on_gpu("graphs", "leaves_the_addresses"),
    ),
    Mutant(
        "a graph reads options that change",
        "fastsam/scalars.py",
        "            if graphs != self._graphs:\n",
        "            if False:\n",
        on_gpu("graphs", "keeps_the_options and nothing"),
    ),
    Mutant(
        "a new layout frees what a graph reads",
        "fastsam/perturbation.py",
        "self._in_graphs.append((self.buckets, self._scalars))",
        "pass",
        on_gpu("graphs", "outlives_a_new_layout"),
    ),
    Mutant(
        "half a step in a capture",
        "fastsam/perturbation.py",
        "and capturing(bucket.device) and not bucket.grad_table.captured:",
        "and False:",
        on_gpu("graphs", "second_step_alone"),
    ),
    Mutant(
        "the backup is filled",
        "fastsam/bucket.py",
        "return torch.empty(0, dtype=self.dtype, device=self.device).set_(storage)",
        "return torch.empty(self.numel, dtype=self.dtype, device=self.device)",
        (Judge("emulated", "tests/kernels/test_memory.py", "deterministic"), *on_gpu("streams", "deterministic")),
    ),
)


class Tree:
    """A copy of the sources, and of the libraries that are built.

    Attributes:
        built: the C++ sources that the libraries are of.
        sane: what judges said without a mutant.
    """

    def __init__(self, path: Path) -> None:
        left_out = shutil.ignore_patterns(".*", "build", "dist", "site", "__pycache__", "*.egg-info", "shared")
        shutil.copytree(ROOT, path, ignore=left_out)
        self.path = path
        self.built = self.sources()
        self.sane: dict[Judge, str] = {}

    def sources(self) -> str:
        return "".join(path.read_text() for path in sorted((self.path / "csrc").rglob("*.*")))


def kinds(gpu: bool) -> set[str]:
    """The judges that can be called here."""
    if gpu:
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", capability)  # to build for this device alone
        return {"gpu"}
    return {"emulated", "interpreted", "compiled", *(["nvcc"] if shutil.which("nvcc") else [])}


def ask(judge: Judge, tree: Tree) -> str:
    """ "red", "green", or why neither."""
    environment = {**judge.environment(), "PYTHONPATH": str(tree.path)}
    if judge.kind == "gpu" and tree.built != (sources := tree.sources()):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree.path, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"does not build: {done.stderr.strip().splitlines()[-1:]}"
        tree.built = sources
    result = subprocess.run(
        judge.command(), cwd=tree.path, env=environment, capture_output=True, text=True, check=False
    )
    if "assert result.returncode == 0" in result.stdout:  # of the emulator's and nvcc's compilers
        return "does not compile"
    if result.returncode == 0 and " passed" in result.stdout:
        return "green"
    if result.returncode == FAILED or result.returncode < 0:
        return "red"
    return f"status {result.returncode}: {result.stdout.strip().splitlines()[-1:]}"


def together(judge: Judge, mutants: Sequence[Mutant]) -> Judge:
    """All judges of the mutants that run the same file in the same way, as one."""
    alike = {j.chosen: j for m in mutants for j in m.judges if (j.kind, j.path) == (judge.kind, judge.path)}
    return Judge(judge.kind, judge.path, " or ".join(f"({chosen})" for chosen in alike))


def judged(mutant: Mutant, mutants: Sequence[Mutant], tree: Tree, able: set[str]) -> str:
    """ "killed: ...", "SURVIVED", or why it is neither."""
    judges = [judge for judge in mutant.judges if judge.kind in able]
    if not judges:
        return f"not judged: needs {' or '.join(sorted({judge.kind for judge in mutant.judges}))}"
    path = tree.path / mutant.path
    source = path.read_text()
    for judge in judges:
        whole = together(judge, mutants)
        if whole not in tree.sane:
            tree.sane[whole] = ask(whole, tree)
        if tree.sane[whole] != "green":
            return f"BROKEN: {whole.path} ({whole.kind}) without a mutant: {tree.sane[whole]}"
        path.write_text(source.replace(mutant.old, mutant.new))
        try:
            answer = ask(judge, tree)
        finally:
            path.write_text(source)
        if answer == "red":
            return f"killed: {judge.path} -k '{judge.chosen}'"
        if answer != "green":
            return f"BROKEN: {answer}"
    return "SURVIVED"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutants, or parts of names; default: all")
    parser.add_argument("--gpu", action="store_true", help="judge on the device")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no mutant after these")
    parser.add_argument("--list", action="store_true", help="show the mutants, judge none")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    chosen = [m for m in MUTANTS if not options.names or any(name in m.name for name in options.names)]
    if options.list:
        print(*(f"{m.name:<45} {m.path}" for m in chosen), sep="\n")
        return 0
    able, verdicts = kinds(options.gpu), []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(folder, "tree"))
        for mutant in chosen:
            late = time.monotonic() - start > options.seconds
            begin = time.monotonic()
            verdicts.append("NOT RUN: the time is over" if late else judged(mutant, chosen, tree, able))
            print(f"{mutant.name:<45} {time.monotonic() - begin:4.0f} s  {verdicts[-1]}", flush=True)
    states = [verdict.split(":")[0] for verdict in verdicts]
    print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
    return int(any(state.isupper() for state in states))


if __name__ == "__main__":
    sys.exit(main())
