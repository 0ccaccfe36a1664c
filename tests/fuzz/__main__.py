"""Searches for a story that fails: `python -m fuzz --seconds 3600`, or replays `--seed 17`."""

from __future__ import annotations

import argparse
import sys
import time

import emulated_cuda
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if emulated_cuda.EMULATED:
    emulated_cuda.install()

from cases import backends  # noqa: E402

from .play import COMMAND, StoryError, play, shorten, story_of


def main() -> int:
    """Plays seeds until one fails, the cases or the time are used up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cpu", choices=backends())
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--cases", type=int, help="how many; 1 if only --seed is given")
    parser.add_argument("--seconds", type=float, help="for how long, instead of --cases")
    arguments = parser.parse_args()
    cases = arguments.cases or (None if arguments.seconds else 1)
    end = time.monotonic() + (arguments.seconds or float("inf"))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task(f"stories on {arguments.backend}", total=cases)
        seed = arguments.seed
        while time.monotonic() < end and (cases is None or seed < arguments.seed + cases):
            try:
                play(story_of(seed, arguments.backend), arguments.backend)
            except StoryError as failure:
                progress.stop()
                print(f"{failure}\n\nshortened:\n{shorten(failure)}")
                print(f"\nreplay: {COMMAND} --backend {arguments.backend} --seed {seed}")
                return 1
            seed += 1
            progress.update(task, advance=1)
    print(f"{seed - arguments.seed} stories from seed {arguments.seed} on: all pass")
    return 0


if __name__ == "__main__":
    sys.exit(main())
