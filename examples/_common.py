"""What the examples share: the choice of a device, waiting for it, and the progress bars."""

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def pick_device(name: str) -> torch.device:
    """Returns the device called `name`, or ends the program when it is not here."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {name}: this torch sees no GPU here; use --device cpu")
    return device


def synchronize(device: torch.device) -> None:
    """Waits until `device` has done all its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def progress_bars() -> Progress:
    """Returns progress bars with a name before them and a remark (`note=`) behind them."""
    return Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
