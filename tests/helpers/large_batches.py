"""Decodes large batches, each with an image that DALI cannot decode, and prints how each ended, as JSON.

A script of its own, because DALI 2.4 would end the process. Several threads look at
batches of 32 and more only.
"""

from __future__ import annotations

import json

import numpy as np
import torch

from pipeline.backends.base import DaliConfig, UndecodableBatchError
from pipeline.backends.dali_backend import DaliImages
from pipeline.sampling.views import ViewRecipe
from tests.helpers.encoded import bad_images, batch_of, good_images, only_pil_decodes

BATCHES, SIZE, THREADS = 60, 128, 4

if __name__ == "__main__":
    good = list(good_images().values())
    bad = bad_images() | only_pil_decodes()
    rng = np.random.default_rng(0)
    batches, kinds = [], []
    for step in range(BATCHES):
        encoded = [good[i % len(good)] for i in range(SIZE)]
        kinds.append(list(bad)[step // 2 % len(bad)] if step % 2 else "good")
        if kinds[-1] != "good":
            encoded[rng.integers(SIZE)] = bad[kinds[-1]]
        batches.append(batch_of(encoded, ViewRecipe(image_size=8), step=step))
    decoded = DaliImages(iter(batches), SIZE, THREADS, torch.device("cpu"), DaliConfig())
    outcomes = []
    for batch in batches:
        try:
            made, images = next(decoded)
            outcomes.append("good" if made is batch and len(images) == SIZE else "mixed up")
        except UndecodableBatchError as error:
            outcomes.append("refused" if error.batch is batch else "mixed up")
    ended = next(decoded, None) is None
    print(json.dumps({"kinds": kinds, "outcomes": outcomes, "ended": ended}))
