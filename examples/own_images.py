"""From a folder of images to an encoder, and which images it finds alike: python examples/own_images.py IMAGES OUT

IMAGES is anything that `siamstream shard` takes; OUT is a folder for the dataset and the run. The settings are small
enough for a laptop; for a real run take a larger backbone, larger images and more epochs.
"""

import sys
from pathlib import Path

import torch.nn.functional as F

import siamstream


def main(images: str, out: Path) -> None:
    """Write a dataset, train on it, and print the most similar image of the first few."""
    made = siamstream.make_dataset(images, out / "data")
    batch = min(128, made.images)
    siamstream.pretrain(
        out / "data", out / "run", recipe="demo", epochs=10, global_batch=batch, resume=True, device="cpu"
    )
    module, preprocess = siamstream.load_encoder(out / "run")
    dataset = siamstream.open_dataset(out / "data")
    features = F.normalize(siamstream.extract_features(module, preprocess, dataset, device="cpu"), dim=1)
    similarity = features @ features.T
    similarity.fill_diagonal_(-1)
    for sample in range(min(5, len(dataset))):
        nearest = int(similarity[sample].argmax())
        print(f"{dataset.key(sample)} is most like {dataset.key(nearest)}: {similarity[sample, nearest]:.2f}")


if __name__ == "__main__":  # worker processes import this file
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except (IndexError, siamstream.UserError) as error:
        sys.exit(f"error: {error}" if isinstance(error, siamstream.UserError) else __doc__)
