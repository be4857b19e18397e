"""Images that every machine with scikit-learn has: crops of its two photographs, a temple and a flower."""

from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


@cache
def _originals() -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def photograph(number: int) -> Image.Image:
    """A square of 200 to 400 pixels a side, always the same for the same number."""
    rng = np.random.default_rng(number)
    whole = _originals()[number % 2]
    side = int(rng.integers(200, 401))
    left, top = (int(rng.integers(0, length - side + 1)) for length in whole.size)
    return whole.crop((left, top, left + side, top + side))
