"""A fuzzer of whole training stories: steps, and all that people do to optimizers between them.

`story` draws a story from a seed, `world` trains it with ours, a twin of ours elsewhere and stock
torch, `events` and `refusals` are what may happen to it, `judge` compares, `play` runs a story and
shortens one that fails. `python -m fuzz` searches for hours; test_fuzz.py takes the first seeds.
"""
