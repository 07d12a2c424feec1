"""Randomness that is handed in: every draw is a function of the seed and of what it is for."""

import random


def keyed_rng(seed: int, *key: object) -> random.Random:
    """A generator for one purpose, such as `keyed_rng(seed, epoch, index, "crop")`.

    Equal keys give equal draws, whatever the workers, ranks or restarts; different keys independent ones.
    """
    return random.Random("/".join(map(str, (seed, *key))))  # a string seeds through SHA-512, the same everywhere
