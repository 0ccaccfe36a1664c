"""Trains a network on handwritten digits with torch.optim and with fusedopt, and compares.

Shows a table and a picture of loss curves and step times for six optimizers, and says plainly
where the curves diverge or fusedopt is slower. It ends with status 1 when a curve diverges.

Two curves never agree to the last bit: rounding differs, and training amplifies the difference.
By how much is measured, not assumed: torch is also trained from weights moved by one rounding, and
with `fused=True`. A fusedopt curve agrees when it strays from torch's no more than ALLOWANCE times
as far as torch strays from itself (or FLOOR, if that is more). Beyond CHAOS nothing can be told.
"""

import argparse
import math
import statistics
from pathlib import Path

import matplotlib
import torch
from _common import pick_device, progress_bars
from _digits import NUDGED, OURS, RECIPES, TORCH, TORCH_FUSED, Digits, Run, make_runs
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fusedopt import backends

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ALLOWANCE = 10.0
FLOOR = 1e-5
CHAOS = 0.1


class Comparison:
    """What the runs of one optimizer showed."""

    def __init__(self, name: str, runs: dict[str, Run], digits: Digits) -> None:
        last_epoch = digits.batches_per_epoch()
        self.name = name
        self.curves = {
            label: torch.stack(run.losses).double().cpu().numpy() for label, run in runs.items()
        }
        self.final_loss = {
            label: curve[-last_epoch:].mean() for label, curve in self.curves.items()
        }
        self.accuracy = {label: run.accuracy(digits) for label, run in runs.items()}
        self.milliseconds = {
            label: 1000 * statistics.median(run.seconds)
            for label, run in runs.items()
            if label != NUDGED
        }
        self.gap = self._gap_to_torch(OURS)
        self.torch_gap = max(self._gap_to_torch(k) for k in runs if k not in (TORCH, OURS))

    def _gap_to_torch(self, label: str) -> float:
        """Returns the largest difference of the loss from torch's at any step, relative to it."""
        ours, reference = self.curves[label], self.curves[TORCH]
        largest = float((abs(ours - reference) / reference).max())
        return math.inf if math.isnan(largest) else largest

    def speed_up(self, over: str) -> float | None:
        """Returns how many times faster fusedopt's step is, None where there is no such rival."""
        if over not in self.milliseconds:
            return None
        return self.milliseconds[over] / self.milliseconds[OURS]

    @property
    def bound(self) -> float:
        """How far fusedopt's curve may stray from torch's, relative to the loss."""
        return max(ALLOWANCE * self.torch_gap, FLOOR)

    @property
    def diverges(self) -> bool:
        """Whether fusedopt's curve strays further than it may, where that can be told at all."""
        return self.bound < CHAOS and self.gap > self.bound

    def verdicts(self) -> list[str]:
        """Returns what has to be said plainly, a sentence each; nothing when all is well."""
        found = []
        if self.bound >= CHAOS:
            found.append(
                f"{self.name}: this training is chaotic, torch strays by {self.torch_gap:.0e} from "
                "itself: the curves prove nothing; take fewer --epochs or another --seed"
            )
        elif self.diverges:
            found.append(
                f"{self.name}: the curves DIVERGE: the gap of {self.gap:.1e} is above "
                f"{self.bound:.1e} ({ALLOWANCE:g} times what torch strays from itself)"
            )
        ours = self.milliseconds[OURS]
        for rival, theirs in self.milliseconds.items():
            if theirs < ours:
                found.append(
                    f"{self.name}: fusedopt is SLOWER than {rival}: {ours:.3f} ms a step "
                    f"against {theirs:.3f} ms"
                )
        return found


def train(
    name: str, args: argparse.Namespace, digits: Digits, device: torch.device, bars: Progress
) -> Comparison:
    """Trains all runs of one optimizer in lockstep, taking turns at being the first."""
    runs = make_runs(name, args.seed, device, args.backend)
    bar = bars.add_task(name, total=args.epochs * digits.batches_per_epoch(), note="")
    order = list(runs.values())
    for step, (images, labels) in enumerate(digits.batches(args.epochs, args.seed)):
        first = step % len(order)
        for run in order[first:] + order[:first]:
            run.train_on(images, labels)
        bars.update(bar, advance=1)
    comparison = Comparison(name, runs, digits)
    bars.update(bar, note=f"loss {comparison.final_loss[OURS]:.4f}")
    return comparison


def backend_text(choice: str, device: torch.device) -> str:
    """Says which backend takes fusedopt's steps on a device."""
    backend = backends.for_device(choice, device)
    if backend is not None:
        return f"its {backend.NAME} kernels"
    return "torch's own rules, not with kernels of its own: it cannot be faster than torch"


def tables(comparisons: list[Comparison]) -> list[Table]:
    """Returns one table about the training and one about its cost, both 80 characters wide."""
    curves = Table(title="The same training", title_justify="left")
    for heading in ("", "loss\ntorch", "loss\nfusedopt", "accuracy\ntorch", "accuracy\nfusedopt"):
        curves.add_column(heading, justify="right" if heading else "left")
    curves.add_column("largest gap\nfusedopt", justify="right")
    curves.add_column("of torch\nto itself", justify="right")
    times = Table(title="One optimizer.step(), median in milliseconds", title_justify="left")
    for heading in ("", "torch", "torch\nfused", "fusedopt", "speed-up\nover torch"):
        times.add_column(heading, justify="right" if heading else "left")
    times.add_column("speed-up over\ntorch fused", justify="right")
    for item in comparisons:
        curves.add_row(
            item.name,
            *(f"{item.final_loss[label]:.5f}" for label in (TORCH, OURS)),
            *(f"{item.accuracy[label]:.1%}" for label in (TORCH, OURS)),
            f"{item.gap:.1e}",
            f"{item.torch_gap:.1e}",
        )
        milliseconds = [item.milliseconds.get(label) for label in (TORCH, TORCH_FUSED, OURS)]
        ratios = [item.speed_up(label) for label in (TORCH, TORCH_FUSED)]
        times.add_row(
            item.name,
            *("-" if value is None else f"{value:.3f}" for value in milliseconds),
            *("-" if value is None else f"{value:.1f} x" for value in ratios),
        )
    return [curves, times]


def plot(comparisons: list[Comparison], path: Path, subtitle: str) -> None:
    """Draws six panels of loss curves and, beside them, the step times; writes `path`."""
    colours = {TORCH: "#8fa3b8", TORCH_FUSED: "#3f7fbf", OURS: "#d9480f"}
    figure = plt.figure(figsize=(15, 7.5), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(2, 1))[0]
    panels = left.subplots(2, 3, sharex=True, sharey=True)
    for panel, item in zip(panels.flat, comparisons, strict=False):
        panel.plot(item.curves[TORCH], color=colours[TORCH], linewidth=5, label="torch")
        panel.plot(item.curves[OURS], color=colours[OURS], linewidth=1.2, label="fusedopt")
        panel.set(title=item.name, yscale="log")
        panel.text(
            0.97,
            0.95,
            f"largest gap {item.gap:.0e}",
            ha="right",
            va="top",
            transform=panel.transAxes,
        )
        panel.grid(alpha=0.25)
    panels[0, 0].legend(loc="lower left")
    left.supxlabel("step")
    left.supylabel("training loss")
    diverging = [item.name for item in comparisons if item.diverges]
    left.suptitle(
        f"The curves DIVERGE: {', '.join(diverging)}" if diverging else "The same training"
    )

    bars = right.subplots()
    labels = (TORCH, TORCH_FUSED, OURS)
    for offset, label in enumerate(labels):
        rows = [
            (y, c.milliseconds[label]) for y, c in enumerate(comparisons) if label in c.milliseconds
        ]
        drawn = bars.barh(
            [y + (offset - 1) * 0.27 for y, _ in rows],
            [ms for _, ms in rows],
            height=0.25,
            color=colours[label],
            label=label,
        )
        bars.bar_label(drawn, fmt="%.3f", padding=3, fontsize=9)
    bars.set_yticks(range(len(comparisons)), [item.name for item in comparisons])
    bars.invert_yaxis()
    bars.margins(x=0.15)
    bars.set_xlabel("milliseconds per optimizer.step(), median")
    bars.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    right.suptitle("The cost of a step")
    figure.suptitle(subtitle)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Trains, compares, prints; returns 1 when a curve diverges, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="of weights and data order")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--backend", default="auto", help="of fusedopt: auto, cpu, cuda, ...")
    parser.add_argument("--threads", type=int, default=1, help="of torch and of fusedopt")
    parser.add_argument("--out", type=Path, default=Path("build/demo.png"), help="the picture")
    args = parser.parse_args()
    device = pick_device(args.device)
    # One thread by default: on work this small a second one mostly waits, and on a busy machine
    # waiting threads make everything ten times slower.
    torch.set_num_threads(args.threads)
    # TF32 drops 13 bits of every weight, which would hide what is compared here.
    torch.backends.cudnn.allow_tf32 = False

    digits = Digits(args.seed, device)
    console = Console(highlight=False)
    console.print(f"fusedopt steps with {backend_text(args.backend, device)}")
    with progress_bars() as bars:
        comparisons = [train(name, args, digits, device, bars) for name in RECIPES]
    for table in tables(comparisons):
        console.print(table)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    plot(comparisons, args.out, f"fusedopt and torch {torch.__version__} on {where}")
    verdicts = [verdict for item in comparisons for verdict in item.verdicts()]
    for verdict in verdicts:
        console.print(verdict, style="bold red")
    if any("SLOWER" in verdict for verdict in verdicts):
        console.print("`python -m fusedopt` tells which backends work here, and why others do not.")
    if not verdicts:
        console.print("All curves agree, and fusedopt is the faster one everywhere.", style="green")
    console.print(f"picture: {args.out}")
    return int(any(item.diverges for item in comparisons))


if __name__ == "__main__":
    raise SystemExit(main())
