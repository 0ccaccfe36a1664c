"""Turns the committed records into the README's table, docs/performance.md's tables, and plots.

Every figure in those pages stands between two markers and is written by this file; none is typed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import kernel_tables
import plots
from records import TORCH, Cell, Machine, Record, best, load, load_committed, speed_up
from targets import targets_of

ROOT = Path(__file__).parent.parent
PLOTS = ROOT / "docs" / "plots"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
OPENING = "<!-- opening:begin -->", "<!-- opening:end -->"

#: The README shows these, where a machine has them; the page shows everything.
_HEADLINES = {
    "AdamW-chain-gpt2-float32": "unscale, inf check, clip, decay, AdamW; GPT-2, 124 M parameters",
    "AdamW-chain-tiny1000-float32": "unscale, inf check, clip, decay, AdamW; 1000 tensors of 64",
    "AdamW-groups-tiny300-float32": "AdamW; 300 groups of one tensor of 64",
    "Adam-bare-tiny1000-float32": "Adam; 1000 tensors of 64",
    "AdamW-bare-gpt2-float32": "AdamW; GPT-2",
    "SGD-bare-gpt2-float32": "SGD with momentum; GPT-2",
    "RMSprop-bare-gpt2-float32": "RMSprop; GPT-2",
    "Adagrad-bare-gpt2-float32": "Adagrad; GPT-2",
    "Adadelta-bare-gpt2-float32": "Adadelta; GPT-2",
    "Lion-bare-gpt2-float32": "Lion; GPT-2",
}
#: The README opens with these of the first machine.
_OPENING = {
    "AdamW-chain-gpt2-float32": "for unscaling, inf check, clipping, decay and AdamW of GPT-2",
    "AdamW-chain-tiny1000-float32": "with 1000 small tensors instead",
    "RMSprop-bare-gpt2-float32": "for RMSprop",
    "Adadelta-bare-gpt2-float32": "for Adadelta",
}


def duration(seconds: float) -> str:
    """Returns three significant digits with the unit that suits them."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            return f"{_digits(seconds / size)} {unit}"
    raise AssertionError("unreachable")


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; the first column is text, the others figures."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _ours(machine: Machine, cell: Cell) -> Record | None:
    return best(cell, (machine.backend(), "fusedopt-triton"))


def headline_table(machine: Machine) -> str:
    """Returns the README's table for a machine."""
    rows = []
    for case, label in _HEADLINES.items():
        cell = machine.cell(case)
        ours, other = _ours(machine, cell), best(cell, TORCH)
        if ours is None or other is None:
            continue
        rows.append(
            [
                label,
                duration(ours.seconds),
                f"{duration(other.seconds)} ({other.name.removeprefix('torch-')})",
                f"{_digits(speed_up(ours, other))}x",
            ]
        )
    head = ["one step, float32", "fusedopt", "best of torch.optim", "speed-up"]
    return table(head, rows)


def opening(machine: Machine) -> str:
    """Returns the README's first figures: how many times as fast as the best of torch.optim."""
    ratios = []
    for case, label in _OPENING.items():
        cell = machine.cell(case)
        ours, other = _ours(machine, cell), best(cell, TORCH)
        if ours is not None and other is not None:
            ratios.append(f"{_digits(speed_up(ours, other))} times {label}")
    return (
        f"A step is faster than the best of torch.optim ({machine.name}):\n"
        f"{', '.join(ratios)} ([all figures](#how-fast))."
    )


def target_table(machine: Machine) -> str:
    """Returns what was aimed at beside what was measured."""
    rows = []
    for target in targets_of(machine):
        value = target.measure(machine)
        aim = "" if target.aim is None else f"{target.aim:g}{target.unit}"
        sign = "at most " if target.at_most else ""
        shown = "not measured" if value is None else f"{_digits(value)}{target.unit}"
        verdict = "" if value is None else "yes" if target.met(value) else "**no**"
        bound = f"{sign}{target.bound:g}{target.unit}"
        rows.append([target.work, target.against, bound, aim, shown, verdict])
    return table(["target", "against", "at least", "aim", "measured", "met"], rows)


def case_tables(machine: Machine) -> str:
    """Returns every case of a machine with every implementation, one table a workload."""
    parts = []
    workloads: dict[str, list[str]] = {}
    for case in machine.cells:
        workloads.setdefault(case.split("-")[1], []).append(case)
    for workload, cases in workloads.items():
        present = {name for case in cases for name in machine.cells[case]}
        names = sorted(present, key=_column_order)
        rows = []
        for case in cases:
            cell = machine.cells[case]
            any_record = next(iter(cell.values()))
            fastest = min(record.seconds for record in cell.values())
            times = []
            for name in names:
                record = cell.get(name)
                text = "" if record is None else duration(record.seconds)
                times.append(f"**{text}**" if record and record.seconds == fastest else text)
            memory = "in cache" if any_record.in_cache else duration(any_record.memory_seconds)
            algorithm, _, *rest = case.split("-")
            rows.append([f"{algorithm}, {', '.join(rest)}", memory, *times])
        parts.append(f"#### {workload}\n\n{table(['case', 'memory', *names], rows)}")
    return "\n\n".join(parts)


def _column_order(name: str) -> tuple[int, str]:
    first = ("fusedopt-c", "fusedopt-tri", "fusedopt-", "torch-")
    return next((i for i, start in enumerate(first) if name.startswith(start)), len(first)), name


def losses(machine: Machine) -> str:
    """Returns the cases in which somebody is faster than our native backend."""
    found = []
    for case, cell in machine.cells.items():
        ours = _ours(machine, cell)
        others = [name for name in cell if not name.startswith("fusedopt")]
        other = best(cell, others)
        if ours is None or other is None:
            continue
        ratio = speed_up(ours, other)
        if ratio < 1:
            found.append(f"- {case}: {other.name} is {1 / ratio:.2f} times as fast.")
    return "\n".join(found) or "None in these records."


def pipeline_details(machine: Machine) -> str:
    """Returns what the wall clock does not show: memory, and a GPU's own time, host, launches."""
    rows = []
    for case, cell in machine.cells.items():
        on_gpu = machine.device_type == "cuda"
        # Nothing but memory is seen on a CPU, and of that nothing where there is little data.
        if not case.startswith("AdamW-") or (not on_gpu and next(iter(cell.values())).in_cache):
            continue
        for name in sorted(cell, key=_column_order):
            info = cell[name].info
            extra = info["peak_extra_bytes"]
            row = [case, name, "" if extra is None else f"{extra / 2**20:.1f} MiB"]
            if on_gpu:
                row += [duration(info["device_seconds"]), duration(info["host_seconds"])]
                row += [str(info["launches"]), str(info["copies"])]
            compiled = info.get("compile_seconds")
            rows.append([*row, "" if compiled is None else duration(compiled)])
    head = ["case", "implementation", "extra memory"]
    if machine.device_type == "cuda":
        head += ["device", "host", "launches", "copies"]
    return table([*head, "compiling"], rows)


def _pictures(machine: Machine, names: Iterable[str], prefix: str) -> str:
    return "\n\n".join(
        f"![{plots.TITLES[name]}, {machine.name}]({prefix}plots/{machine.slug}-{name}.svg)"
        for name in names
    )


def readme_block(machines: list[Machine]) -> str:
    """Returns what stands between the README's markers."""
    parts = []
    for machine in machines:
        drawn = plots.draw(machine, PLOTS)
        parts.append(f"**{machine.name}**\n\n{headline_table(machine)}")
        parts.append(_pictures(machine, [n for n in drawn if n == "speedup"], "docs/"))
    return "\n\n".join(parts)


def page_block(machines: list[Machine]) -> str:
    """Returns what stands between the markers of docs/performance.md."""
    parts = []
    for machine in machines:
        drawn = plots.draw(machine, PLOTS)
        runs = "\n".join(f"- {run}" for run in machine.runs)
        parts += [
            f"## {machine.name}\n\n{runs}",
            f"### Targets\n\n{target_table(machine)}",
            f"### Pictures\n\n{_pictures(machine, drawn, '')}",
            f"### Where we lose\n\n{losses(machine)}",
            f"### Every case\n\n{case_tables(machine)}",
            f"### Beside the clock, AdamW\n\n{pipeline_details(machine)}",
        ]
    return "\n\n".join(parts)


def insert(path: Path, block: str, begin: str = BEGIN, end: str = END) -> bool:
    """Writes a block between the markers of a page; returns whether the page has them."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if begin not in text or end not in text:
        return False
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{begin}\n\n{block}\n\n{end}{after}", encoding="utf-8")
    return True


def write_all() -> None:
    """Writes pages and plots from the records under ``benchmarks/results``."""
    page = ROOT / "docs" / "performance.md"
    insert(page, kernel_tables.kernel_table(), kernel_tables.BEGIN, kernel_tables.END)
    machines = load_committed()
    if not machines:
        print("no records under benchmarks/results; `python benchmarks/run.py cpu` makes them")
        return
    PLOTS.mkdir(parents=True, exist_ok=True)
    blocks = {"README.md": readme_block, "docs/performance.md": page_block}
    insert(ROOT / "README.md", opening(machines[0]), *OPENING)
    for name, make in blocks.items():
        if insert(ROOT / name, make(machines)):
            print(f"wrote the tables of {name}")
        else:
            print(f"{name} has no {BEGIN} ... {END}; left as it is")
    print(f"wrote plots to {PLOTS.relative_to(ROOT)}")


def print_summary(machines: Iterable[Machine]) -> None:
    """Prints targets, losses and headlines."""
    for machine in machines:
        print(f"\n{machine.name}\n\n{headline_table(machine)}\n")
        print(f"faster than ours:\n{losses(machine)}\n")
        print(target_table(machine))


def main(arguments: list[str]) -> None:
    """Writes pages and plots; with record files as arguments, only prints what is in those."""
    if arguments:
        print_summary(load([Path(argument) for argument in arguments]))
    else:
        write_all()
        print_summary(load_committed())


if __name__ == "__main__":
    main(sys.argv[1:])
