"""What the machine code of CUDA kernels is like: registers, opcodes and loops, from cuobjdump."""

import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def inner_loops(sass):
    """The instructions of each loop that holds no other, from the backward branches."""
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    ranges = []
    for at, text in code:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            ranges.append((int(branch[1], 16), at))
    inner = [r for r in ranges if not any(o != r and r[0] <= o[0] and o[1] <= r[1] for o in ranges)]
    return [[text for at, text in code if first <= at <= last] for first, last in inner]


def prologue(sass):
    """The loads from the first on, up to the next branch."""
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.MULTILINE)
    code = list(itertools.dropwhile(lambda text: "LDG" not in text, code))
    straight = itertools.takewhile(lambda text: not re.search(r"\b(BRA|EXIT)\b", text), code)
    return re.findall(r"\bLDG\b[\w.]*", "\n".join(straight))


def facts(cubin):
    """By symbol of each kernel in a cubin (bytes): what is asserted of it. "loops" and "prologue" hold their memory
    instructions.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [str(CUOBJDUMP), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    used = {symbol: [int(number) for number in numbers] for symbol, *numbers in usage}
    found = {}
    for function in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        symbol = function.split()[0]
        registers, stack, local = used[symbol]
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", function, re.MULTILINE)
        memory = r"\b((?:LDG|STG|LDL|STL|LD|ST|SHFL|BAR)\b[\w.]*)"
        found[symbol] = {
            "registers": registers,
            "stack": stack,
            "local": local,
            "opcodes": sorted(set(opcodes)),
            "prologue": prologue(function),
            "loops": [re.findall(memory, "\n".join(loop)) for loop in inner_loops(function)],
        }
    return found


def body_loops(facts):
    """The memory instructions of the loops over a chunk: those that move vectors."""
    return [loop for loop in facts["loops"] if any(op.endswith(".128") for op in loop)]


def aligned_loops(facts):
    """Of those, the ones for gradients that lie on 16-byte boundaries as their weights do: nothing but vectors."""
    return [loop for loop in body_loops(facts) if all(op.endswith(".128") for op in loop)]


def count(loop, opcode):
    return sum(op.startswith(opcode) for op in loop)
