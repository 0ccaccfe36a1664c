"""The first stories of the fuzzer; `make fuzz` searches on. See tests/fuzz."""

from __future__ import annotations

import pytest
from cases import INTERPRETED, backends
from fuzz.play import COMMAND, StoryError, play, shorten, story_of

#: How many stories one test plays.
STORIES = 10 if INTERPRETED else 50


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("first", [STORIES * test for test in range(6)])
def test_stories(backend, first):
    """Whatever happens in them, ours trains as torch does, and its twin to the bit."""
    for seed in range(first, first + STORIES):
        try:
            play(story_of(seed, backend), backend)
        except StoryError as error:
            failure = error
            break
    else:
        return
    command = f"{COMMAND} --backend {backend} --seed {failure.story.seed}"
    pytest.fail(f"{shorten(failure)}\nreplay: {command}", pytrace=False)
