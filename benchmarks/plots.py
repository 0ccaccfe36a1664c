"""Draws a machine's records: speed-ups, bandwidth, cost against numbers of tensors and elements.

Backgrounds are transparent and every colour keeps its contrast on white and on near-black, so that
one file serves both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from records import TORCH, Machine, Record, best, speed_up

TITLES = {
    "speedup": "Speed-up over the best of torch.optim",
    "bandwidth": "Bandwidth reached, beside the memory's own",
    "tensors": "Cost of a step against the number of tensors",
    "elements": "Cost of a step against the number of elements",
}

_INK = "#768390"
_COLOURS = {
    "fusedopt-cpu": "#2f81f7",
    "fusedopt-cuda": "#2f81f7",
    "fusedopt-triton": "#a371f7",
    "fusedopt-torch": "#539bf5",
    "torch-fused": "#d1731d",
    "torch-foreach": "#bb8009",
    "torch-forloop": "#8f7a54",
    "torch-compiled": "#db6161",
}
_OTHER_COLOURS = ("#3fa45b", "#2a9d9d", "#c05fa8", "#6e8b3d", "#a8745a", "#5c7cba", "#999944")
_MARKERS = {"fusedopt": "o", "torch": "s"}
_STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "legend.frameon": False,
    # The same records give the same file.
    "svg.hashsalt": "fusedopt",
    "svg.fonttype": "none",
}


def _colour(name: str) -> str:
    return _COLOURS.get(name, _OTHER_COLOURS[sum(name.encode()) % len(_OTHER_COLOURS)])


def _label(case: str) -> str:
    algorithm, workload, parameter_set, dtype = case.split("-")
    return f"{algorithm} {parameter_set}" + ("" if dtype == "float32" else f" {dtype}")


def draw(machine: Machine, folder: Path) -> list[str]:
    """Draws what the records allow, as PNG and SVG, and returns the names of the plots."""
    painters: dict[str, Callable[[Machine], Any]] = {
        "speedup": _draw_speed_ups,
        "bandwidth": _draw_bandwidth,
        "tensors": _draw_tensors,
        "elements": _draw_elements,
    }
    drawn = []
    with pyplot.rc_context(_STYLE):
        for name, paint in painters.items():
            figure = paint(machine)
            if figure is None:
                continue
            figure.suptitle(f"{TITLES[name]}\n{machine.name}", fontsize=11)
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                figure.savefig(
                    folder / f"{machine.slug}-{name}.{kind}",
                    dpi=160,
                    bbox_inches="tight",
                    metadata=metadata,
                )
            pyplot.close(figure)
            drawn.append(name)
    return drawn


def _draw_speed_ups(machine: Machine) -> Any:
    workloads: dict[str, list[tuple[str, float]]] = {}
    for case, cell in machine.cells.items():
        ours, other = cell.get(machine.backend()), best(cell, TORCH)
        if ours is not None and other is not None:
            workloads.setdefault(case.split("-")[1], []).append(
                (_label(case), speed_up(ours, other))
            )
    if not workloads:
        return None
    counts = [len(bars) for bars in workloads.values()]
    figure, columns = pyplot.subplots(
        len(counts),
        1,
        figsize=(7.5, 0.24 * sum(counts) + 0.8 * len(counts) + 0.8),
        gridspec_kw={"height_ratios": [count + 1 for count in counts]},
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    for axes, (workload, bars) in zip(columns[:, 0], workloads.items(), strict=True):
        names, ratios = zip(*reversed(bars), strict=True)
        # Bars grow from 1, where both are equally fast: to the left, we lose.
        colours = [_colour(machine.backend() if r >= 1 else "torch-fused") for r in ratios]
        axes.barh(names, [r - 1 for r in ratios], left=1, color=colours, height=0.7)
        for row, ratio in enumerate(ratios):
            axes.annotate(
                f"{ratio:.3g}x",
                (max(ratio, 1), row),
                (3, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_title(workload, loc="left", fontsize=10)
        axes.axvline(1, color=_INK, linewidth=1)
        axes.set_xscale("log")
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.tick_params(axis="x", which="minor", labelbottom=False)
    columns[-1, 0].set_xlabel("times as fast as the fastest of torch.optim (logarithmic)")
    columns[-1, 0].margins(x=0.12)
    return figure


def _draw_bandwidth(machine: Machine) -> Any:
    cases = [
        case
        for case, cell in machine.cells.items()
        if case.split("-")[2] in ("gpt2", "one1G") and machine.backend() in cell
    ]
    if not cases:
        return None
    names = [
        name
        for name in (machine.backend(), "fusedopt-triton", *reversed(TORCH))
        if any(name in machine.cells[case] for case in cases)
    ]
    figure, axes = pyplot.subplots(
        figsize=(7.5, 0.17 * len(cases) * (len(names) + 1) + 1.6), layout="constrained"
    )
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        rows = [row for row, case in enumerate(cases) if name in machine.cells[case]]
        rates = [machine.cells[cases[row]][name].gb_per_s for row in rows]
        places = [row - 0.4 + (i + 0.5) * height for row in rows]
        axes.barh(places, rates, height=height * 0.9, color=_colour(name), label=name)
    for row, case in enumerate(cases):
        record = machine.cells[case][machine.backend()]
        for key, style, label in (
            ("inplace_gb_per_s", "-", "memory, updated in place"),
            ("copy_gb_per_s", ":", "memory, copied"),
        ):
            axes.plot(
                [record.info[key]] * 2,
                [row - 0.45, row + 0.45],
                color=_INK,
                linestyle=style,
                linewidth=2,
                label=label if row == 0 else None,
            )
    labels = [f"{case.split('-')[1]}: {_label(case)}" for case in cases]
    axes.set_yticks(range(len(cases)), labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("bytes that the rule has to move, over time (GB/s)")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _sweep(machine: Machine, pattern: str) -> dict[str, list[Record]]:
    """Returns, for each implementation, its records in the sets that a pattern matches."""
    series: dict[str, list[Record]] = {}
    for case, cell in machine.cells.items():
        if re.fullmatch(rf"AdamW-bare-{pattern}-float32", case):
            for name, record in cell.items():
                series.setdefault(name, []).append(record)
    return {name: records for name, records in series.items() if len(records) > 1}


def _draw_tensors(machine: Machine) -> Any:
    series = _sweep(machine, r"tiny\d+")
    if not series:
        return None
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    _draw_lines(axes, series, "tensors")
    axes.set_xlabel("tensors of 64 float32 elements, AdamW alone")
    _note(axes, "host work, and launches, for every tensor")
    return figure


def _draw_elements(machine: Machine) -> Any:
    series = _sweep(machine, r"one\d+[KMG]?")
    if not series:
        return None
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    _draw_lines(axes, series, "elements")
    records = sorted(next(iter(series.values())), key=lambda record: record.info["elements"])
    axes.plot(
        [record.info["elements"] for record in records],
        [record.memory_seconds for record in records],
        color=_INK,
        linestyle="--",
        label="bytes over the memory's speed",
    )
    cache = records[0].info["last_level_cache_bytes"]
    if cache is not None:
        edge = cache * records[0].info["elements"] / records[0].info["resident_bytes"]
        axes.axvline(edge, color=_INK, linewidth=1, linestyle=":")
        axes.annotate(
            "cache | memory",
            (edge, 0.02),
            xycoords=("data", "axes fraction"),
            ha="center",
            fontsize=8,
        )
    axes.set_xlabel("float32 elements in one tensor, AdamW alone")
    _note(axes, "left, where lines are level: host work; right, along the dashes: memory")
    axes.legend(fontsize=8)
    return figure


def _draw_lines(axes: Axes, series: dict[str, list[Record]], key: str) -> None:
    for name, records in series.items():
        ordered = sorted(records, key=lambda record: record.info[key])
        axes.plot(
            [record.info[key] for record in ordered],
            [record.seconds for record in ordered],
            color=_colour(name),
            marker=_MARKERS.get(name.split("-")[0], "^"),
            markersize=4,
            linestyle="--" if name == "fusedopt-torch" else "-",
            label=name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylabel("seconds per step")
    axes.legend(fontsize=8)


def _note(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9)
