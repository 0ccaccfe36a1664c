"""Plays a story, and shortens one that fails to what it needs to fail."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from random import Random

from machine import threads

from .events import WEIGHTS
from .judge import InaccurateError
from .refusals import refuse
from .steps import step
from .story import Story, draw
from .world import World

#: What may happen, by name, and how often.
EVENTS: dict[str, Callable[[World, Random], None]] = {
    "step": step,
    "refuse": refuse,
    **{event.__name__: event for event in WEIGHTS},
}
FREQUENCY = {
    "step": 18.0,
    "refuse": 3.0,
    **{event.__name__: weight for event, weight in WEIGHTS.items()},
}
#: How often a step that looks inaccurate is repeated with other inputs.
SHAKES = 4
#: Replays a seed.
COMMAND = "cd tests && ../.venv/bin/python -m fuzz"


@dataclasses.dataclass
class StoryError(Exception):
    """What went wrong in a story, and all that happened before."""

    story: Story
    backend: str
    log: list[str]
    cause: str

    def __str__(self) -> str:
        story = self.story
        lines = [
            f"seed {story.seed}: {story.entry.name}({story.options}) on {self.backend},"
            f" {story.settings}; the twin: {story.threads} threads, instructions"
            f" {story.instructions}"
        ]
        for group, params in zip(story.groups, story.params, strict=True):
            lines.append(f"  group {group}")
            lines += [f"    {p.shape} {p.dtype} {p.layout}" for p in params]
        lines += [f"  {i}. {text}" for i, text in enumerate(self.log, 1)]
        return "\n".join([*lines, self.cause])


def play(story: Story, backend: str, shakes: int = 0) -> None:
    """Trains and compares; raises StoryError.

    Where an error is too large, once more: now with a look at how sensitive the numbers are.
    """
    log: list[str] = ["made"]
    try:
        world = World(story, backend, shakes)
        world.log = log
        for event in story.events:
            log.append(event.name)
            # Threads are for the sides alone; elsewhere they would wait for each other.
            with threads(1):
                EVENTS[event.name](world, Random(event.seed))
                world.agree()
            world.let_go()
    except Exception as error:
        if not isinstance(error, InaccurateError) or shakes > 0:
            raise StoryError(story, backend, log, traceback.format_exc()) from None
    else:
        return
    play(story, backend, SHAKES)


def story_of(seed: int, backend: str) -> Story:
    """Returns the story of a seed, small where the backend takes its time."""
    return draw(seed, FREQUENCY, small=backend == "triton")


def _shorter(story: Story) -> Iterator[Story]:
    """Yields stories with one thing less."""
    events = story.events
    for i in reversed(range(len(events))):
        yield dataclasses.replace(story, events=(*events[:i], *events[i + 1 :]))
    for i in reversed(range(len(story.groups))):
        if len(story.groups) > 1:
            groups = (*story.groups[:i], *story.groups[i + 1 :])
            params = (*story.params[:i], *story.params[i + 1 :])
            yield dataclasses.replace(story, groups=groups, params=params)
        for k in range(len(story.params[i])):
            if len(story.params[i]) > 1:
                members = (*story.params[i][:k], *story.params[i][k + 1 :])
                params = (*story.params[:i], members, *story.params[i + 1 :])
                yield dataclasses.replace(story, params=params)
        for key in story.groups[i]:
            group = {k: v for k, v in story.groups[i].items() if k != key}
            groups = (*story.groups[:i], group, *story.groups[i + 1 :])
            yield dataclasses.replace(story, groups=groups)


def shorten(failure: StoryError) -> StoryError:
    """Returns the failure of a story from which nothing can be left out any more."""
    shorter: StoryError | None = failure
    while shorter is not None:
        failure, shorter = shorter, None
        for story in _shorter(failure.story):
            try:
                play(story, failure.backend)
            except StoryError as found:
                shorter = found
                break
    return failure
