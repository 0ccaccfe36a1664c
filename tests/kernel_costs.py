"""What the CUDA kernels cost: instructions, registers and bytes under way, from their machine code.

Compiles the kernels for one architecture and follows, in the disassembly, the path through each
main loop that has the most 16-byte accesses. Nothing runs and no GPU is needed. The tests keep the
counts from growing; as a script it writes a record of those that docs/performance.md shows:

    python tests/kernel_costs.py benchmarks/results/kernels_sm_90.json
    python tests/kernel_costs.py OLD.json --csrc ../old/csrc --commit 94c56cf
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
RULES = sorted(path.stem for path in (CSRC / "rules").glob("*.h") if path.stem != "common")
NAMES = [*RULES, "reduce"]
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"]
THREADS = 256
ACCESS_BYTES = 16
SIZES = {
    "float": 4,
    "double": 8,
    "fusedopt::Float16": 2,
    "fusedopt::BFloat16": 2,
    "fusedopt::cuda::Mixed<float>": 4,
    "fusedopt::cuda::Mixed<double>": 8,
}
TYPE_NAMES = {
    "float": "float32",
    "double": "float64",
    "fusedopt::Float16": "float16",
    "fusedopt::BFloat16": "bfloat16",
    "fusedopt::cuda::Mixed<float>": "mixed, in float32",
    "fusedopt::cuda::Mixed<double>": "mixed, in float64",
}


@dataclass(frozen=True)
class Device:
    """What bounds a kernel on one GPU."""

    name: str = "H200"
    multiprocessors: int = 132
    issue_slots: int = 4  # warp instructions a cycle and multiprocessor
    hertz: float = 1.98e9
    bytes_per_second: float = 4.8e12
    registers: int = 65536  # of a multiprocessor
    warps: int = 64

    def blocks(self, registers: int) -> int:
        """How many blocks of THREADS threads a multiprocessor holds; registers come by 256."""
        of_a_warp = (registers * 32 + 255) // 256 * 256
        warps = min(self.warps, self.registers // of_a_warp // 4 * 4)
        return warps // (THREADS // 32)

    def issue_share(self, instructions: float, bytes_moved: float) -> float:
        """The share of all issue slots that a thread's instructions for its bytes take."""
        warps_per_second = self.bytes_per_second / (32 * bytes_moved)
        slots = self.multiprocessors * self.issue_slots * self.hertz
        return warps_per_second * instructions / slots


H200 = Device()


@dataclass(frozen=True)
class Cost:
    """One main loop."""

    kernel: str  # rule and variant, or "reduce"
    # Of parameter, gradient, state; of the gradient alone for reduce. A kernel for mixed types is
    # followed with all operands in the type that it computes in.
    types: str
    registers: int
    blocks: int  # on a multiprocessor
    kilobytes: float  # under way on a multiprocessor before the first value is used
    instructions: float  # for each element
    issue_share: float


class MissingToolError(Exception):
    """A program that is not on this machine; its name."""


def find(name: str, *places: str | Path | None) -> str:
    """Returns the path of a program; raises MissingToolError."""
    found = shutil.which(name) or next((p for p in places if p and shutil.which(p)), None)
    if found is None:
        raise MissingToolError(name)
    return str(found)


def find_nvcc() -> str:
    """Returns the path of nvcc; raises MissingToolError."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return find("nvcc", os.environ.get("CUDACXX"), "/usr/local/bin/nvcc", f"{home}/bin/nvcc")


def compile_all(folder: Path, csrc: Path = CSRC, architecture: int = 90) -> dict[str, Path]:
    """Compiles every kernel for one architecture; returns {rule or "reduce": object file}."""
    nvcc = find_nvcc()
    code = f"arch=compute_{architecture},code=[sm_{architecture},compute_{architecture}]"
    (folder / "rules_list.inc").write_text("".join(f"FUSEDOPT_RULE({rule})\n" for rule in RULES))

    def compile_one(name: str) -> Path:
        source, target = "reduce.cu", folder / f"{name}.o"
        flags = [*FLAGS, "-gencode", code, f"-I{csrc}"]
        if name != "reduce":
            source = "apply.cu"
            flags += [f"-DFUSEDOPT_RULE={name}", f'-DFUSEDOPT_RULE_HEADER="rules/{name}.h"']
        command = [nvcc, *flags, "-c", str(csrc / "cuda" / source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return dict(zip(NAMES, pool.map(compile_one, NAMES), strict=True))


def dump(path: Path, *options: str) -> str:
    """Returns what cuobjdump says of an object file; raises MissingToolError."""
    wheel = importlib.util.find_spec("triton")
    folder = Path(str(wheel.origin)).parent / "backends" / "nvidia" / "bin" if wheel else Path()
    command = [find("cuobjdump", folder / "cuobjdump"), *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dump_hopper(path: Path, *options: str) -> str:
    """The same for one architecture of those in the file: Hopper's, if it is there."""
    found = set(re.findall(r"\bsm_\d+a?\b", dump(path, "--list-elf")))
    one = "sm_90" if "sm_90" in found else min(found)
    return dump(path, "--gpu-architecture", one, *options)


def functions(text: str) -> list[tuple[str, str]]:
    """Splits a dump into (name of the kernel, its part)."""
    parts = re.split(r"\bFunction\s*:?\s+(\S+?):?\s", text)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    text: str  # opcode and operands
    conditional: bool

    @property
    def opcode(self) -> str:
        """The name with its suffixes."""
        return self.text.split()[0]

    @property
    def wide(self) -> bool:
        """Whether it is an access of 16 bytes to global memory."""
        return self.opcode.startswith(("LDG.E.128", "STG.E.128"))

    @property
    def first_half(self) -> bool:
        """The same, but for the second half of a longer access."""
        return self.wide and "+0x10]" not in self.text

    @property
    def adds(self) -> bool:
        """Whether it widens or adds up what was read: work that no short cut may leave out."""
        return self.opcode.startswith(("F2F.F64.F32", "DADD", "DFMA"))

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"(0x[0-9a-f]+)$", self.text) if self.opcode == "BRA" else None
        return int(found[1], 16) if found else None

    def registers(self) -> set[int]:
        """The numbers of the registers that are named, two for those named as 64 bits."""
        return {int(number) for number in re.findall(r"\bR(\d+)\b", self.text)}

    def loaded(self) -> set[int]:
        """The registers that a wide load fills."""
        found = re.match(r"LDG\.E\.128\S* R(\d+)", self.text)
        return set(range(int(found[1]), int(found[1]) + 4)) if found else set()


def parse(code: str) -> list[Instruction]:
    """Returns the instructions of a function's disassembly."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", code)
    return [Instruction(int(at, 16), text, bool(guard)) for at, guard, text in lines]


def main_loops(
    instructions: Sequence[Instruction], mixed: bool = False
) -> Iterator[list[Instruction]]:
    """Yields, for each loop with wide loads, its path with the most wide accesses and additions.

    Of several such paths the shortest: slow ways around (a division of denormals) are left out.

    Args:
        instructions: Of one kernel.
        mixed: Whether it chooses a way for each operand, by its type. One access of it counts, and
            additions do not: the shorter ways are taken, those of the type it computes in.
    """
    index = {each.address: i for i, each in enumerate(instructions)}
    seen: set[int] = set()
    for tail, branch in enumerate(instructions):
        if branch.target is None or branch.target > branch.address:
            continue
        head = index[branch.target]
        # (wide accesses, additions, -length) of the best way from an instruction to the tail, and
        # the next instruction on it.
        best: dict[int, tuple[int, int, int, int]] = {tail: (0, 0, -1, tail)}
        for i in range(tail - 1, head - 1, -1):
            each = instructions[i]
            nexts = []
            target = index.get(each.target) if each.target is not None else None
            if target is not None and target > i:
                nexts.append(target)
            leaves = each.opcode in ("BRA", "EXIT", "RET") and "," not in each.text
            if each.conditional or not leaves:
                nexts.append(i + 1)
            ways = [best[n][:3] + (n,) for n in nexts if n in best]
            if ways:
                wide, adds, rest, following = max(ways)
                wide += each.first_half if mixed else each.wide
                best[i] = (wide, adds + (each.adds and not mixed), rest - 1, following)
        if head not in best:
            continue
        path, at = [instructions[head]], head
        while at != tail:
            at = best[at][3]
            path.append(instructions[at])
        wide = frozenset(each.address for each in path if each.loaded())
        if wide and not wide & seen:
            seen |= wide
            yield path


def bytes_under_way(path: Sequence[Instruction]) -> int:
    """Returns the bytes that a thread has asked for before it waits for the first of them."""
    waiting: set[int] = set()
    total = 0
    for each in path:
        if each.loaded():
            waiting |= each.loaded()
            total += ACCESS_BYTES
        elif waiting & each.registers():
            return total
    return total


def count(path: Sequence[Instruction], opcode: str) -> int:
    """Returns how many instructions of a path have this opcode."""
    return sum(each.opcode.startswith(opcode) for each in path)


def demangle(name: str) -> str:
    """Returns a kernel's name as C++ writes it; raises MissingToolError."""
    command = [find("c++filt"), name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def make_cost(
    kernel: str, types: str, registers: int, path: Sequence[Instruction], elements: int, moved: int
) -> Cost:
    """Puts the figures of one loop together; `moved`: bytes that it moves for each element."""
    blocks = H200.blocks(registers)
    return Cost(
        kernel,
        types,
        registers,
        blocks,
        blocks * THREADS * bytes_under_way(path) / 1024,
        round(len(path) / elements, 2),
        round(H200.issue_share(len(path), elements * moved), 3),
    )


def apply_cost(name: str, registers: int, code: str) -> Cost:
    """Returns the cost of an apply kernel."""
    found = re.search(r"rules::(\w+), \(?(?:int\))?(\d+), (.+?) ?> ?>\(", demangle(name))
    assert found, name
    rule, variant, types = found[1], int(found[2]), found[3].split(", ")
    param, grad, state = (SIZES[each] for each in types)
    (path,) = main_loops(parse(code), mixed="Mixed" in found[3])
    states = count(path, "STG.E.128") * ACCESS_BYTES
    elements = ACCESS_BYTES // min(param, grad, state)
    state_bytes = (states - elements * param) // elements
    label = f"{rule} variant {variant}" if variant else rule
    names = ", ".join(dict.fromkeys(TYPE_NAMES[each] for each in types))
    if len(set(types)) > 1:
        names = "/".join(TYPE_NAMES[each] for each in types)
    moved = 2 * param + grad + 2 * state_bytes
    return make_cost(label, names, registers, path, elements, moved)


def reduce_costs(registers: int, code: str) -> Iterator[Cost]:
    """Yields the costs of the reduce kernel, by type of gradients, with and without a clamp."""
    for path in main_loops(parse(code)):
        moved = count(path, "LDG.E.128") * ACCESS_BYTES
        widened = count(path, "F2F.F64.F32")
        elements = widened or moved // 8
        size = moved // elements
        # Float16 widens by adding 0 to a half of a pair, bfloat16 by moving bits.
        halves = "float16" if count(path, "HADD2.F32") else "bfloat16"
        types = {8: "float64", 4: "float32", 2: halves}[size]
        limits = count(path, "FMNMX") + count(path, "FSETP") + count(path, "DSETP")
        kernel = "reduce, limited" if limits > elements / 2 else "reduce"
        yield make_cost(kernel, types, registers, path, elements, size)


def costs(objects: dict[str, Path]) -> list[Cost]:
    """Returns the costs of all kernels in object files; raises MissingToolError."""
    found: list[Cost] = []
    for name, path in objects.items():
        usage = dict(functions(dump_hopper(path, "--dump-resource-usage")))
        for kernel, code in functions(dump_hopper(path, "--dump-sass")):
            registers = re.search(r"REG:(\d+)", usage[kernel])
            assert registers, kernel
            if name == "reduce":
                found += reduce_costs(int(registers[1]), code)
            else:
                found.append(apply_cost(kernel, int(registers[1]), code))
    return sorted(found, key=lambda cost: (cost.kernel, cost.types))


def main() -> None:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--csrc", type=Path, default=CSRC)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = costs(compile_all(Path(folder), options.csrc.resolve()))
    record = {
        "device": asdict(H200),
        "commit": options.commit,
        "kernels": [asdict(c) for c in found],
    }
    options.target.parent.mkdir(parents=True, exist_ok=True)
    options.target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
