"""Find similar images: a grid of the nearest ones to some queries, near-duplicates of a set, or leaks between two.

    python tools/neighbours.py photos-embeddings data/photos grid.png --query 17 --query cats/12.jpg --query ~/new.jpg
    python tools/neighbours.py runs/photos data/photos grid.png
    python tools/neighbours.py photos-embeddings data/photos twins.png --duplicates 0.97
    python tools/neighbours.py train-embeddings data/train leaks.png --duplicates 0.97 --against val-embeddings data/val

The first argument is a folder that tools/embed.py wrote (--format npy), or an encoder, with which the images are
embedded first (into OUT's name with -embeddings behind it). Similarity is the cosine between features.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import csv
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float
from matplotlib.figure import Figure

from pipeline.backends.reference import decode
from pipeline.common.errors import UserError, check_at_least_1, check_seed, exit_on_user_error, require
from pipeline.common.files import atomic_file, check_writable, disk_errors
from pipeline.common.flags import group
from pipeline.common.locations import DatasetPlace, LocalPath, PathText, input_path
from pipeline.dataset.dataset import BadSampleError, ShardSet, require_rgb
from pipeline.loader.config import LoaderConfig
from tools.common.plot_style import save_png
from tools.embed import EmbedConfig, embed, sample_names
from tools.embedding.search import near_duplicates, nearest
from tools.embedding.store import RECORD, UNFINISHED, Embeddings, escaped
from train.distributed.process_group import distributed
from train.evaluation.encoder import Preprocess, decode_file
from train.evaluation.features import EncoderConfig, open_frozen, open_indexed

MOST_ROWS = 40  # of a grid
CELL_INCHES = 1.4


@dataclass(frozen=True)
class NeighboursConfig:
    """Find similar images of a dataset."""

    source: Annotated[PathText, tyro.conf.Positional, tyro.conf.arg(metavar="EMBEDDINGS|CHECKPOINT")]
    """A folder that embed.py wrote, or an encoder: a run folder, a checkpoint, untrained:BACKBONE."""
    data: Annotated[DatasetPlace, tyro.conf.Positional]
    """The dataset that was embedded."""
    out: Annotated[LocalPath, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.png")]
    """The image to write; --duplicates writes a table beside it, OUT.csv."""
    query: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """An image file, a name of the dataset, or a sample's number; repeatable. Default: --samples drawn at random."""
    k: int = 8
    """Neighbours of each query."""
    samples: int = 8
    """Queries drawn at random where no --query is given."""
    seed: int = 0
    """Seed of that draw."""
    duplicates: float | None = None
    """Find all pairs of at least this cosine similarity instead, as in 0.97."""
    against: tuple[PathText, DatasetPlace] | None = None
    """EMBEDDINGS DATA of a second dataset: with --duplicates, pairs between the two (training images in a test set)."""
    checkpoint: PathText | None = None
    """The encoder of the embeddings, to embed a --query that is a file; default: as _embeddings.json records it."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device that computes; auto: a GPU if there is one."""
    loader: Annotated[LoaderConfig, group("loader")] = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        check_at_least_1("--k", self.k)
        check_at_least_1("--samples", self.samples)
        check_seed(self.seed)
        if self.duplicates is not None:
            require("--duplicates", self.duplicates, 0 < self.duplicates <= 1, "a cosine similarity above 0, up to 1")
            require("--duplicates with --query", ", ".join(self.query), not self.query, "use one or the other")
        if self.against is not None and self.duplicates is None:
            raise UserError("--against goes with --duplicates: add the similarity that counts, as in --duplicates 0.97")
        if self.out.suffix.lower() != ".png":
            raise UserError(f"{self.out}: the grid is written as PNG; give a name that ends in .png")


def main() -> None:
    """Parse the command line, search, draw."""
    config = tyro.cli(NeighboursConfig, description=__doc__)
    check_writable("OUT", config.out)
    dataset = open_indexed(config.data, config.loader)
    require_rgb(dataset, "a grid of neighbours")
    embeddings = open_embeddings(config, dataset)
    if config.duplicates is None:
        draw_neighbours(config, dataset, embeddings)
    else:
        draw_duplicates(config, dataset, embeddings)


def check_queries(config: NeighboursConfig, dataset: ShardSet) -> None:
    """Raise UserError for a --query that is no image of the dataset and no file, before anything is embedded."""
    words = [query for query in config.query if not query.isdecimal()]
    names = frozenset(map(escaped, sample_names(dataset, np.arange(len(dataset))))) if words else frozenset()
    for query in config.query:
        if query.isdecimal():
            require("--query", query, _number(query) < len(dataset), f"samples are numbered 0 .. {len(dataset) - 1}")
        elif query not in names:
            decode_file(_file_of(query))


def _number(query: str) -> int:
    """A sample's number; of one with too many digits the last ones that could be, which is no sample's."""
    return int(query[-18:]) if query[:-18].strip("0") == "" else sys.maxsize


def _file_of(query: str) -> Path:
    path = input_path(query)
    if not path.is_file():
        raise UserError(f"--query {query}: no file, no name of the dataset (names.txt lists them) and no number")
    return path


def open_embeddings(config: NeighboursConfig, dataset: ShardSet) -> Embeddings:
    """The embeddings of ``dataset``, made now if an encoder was named. Raises UserError if they are of another one."""
    folder = Path(config.source)
    if not (folder / RECORD).exists() and not (folder / UNFINISHED).exists():
        check_queries(config, dataset)
        folder = config.out.with_name(f"{config.out.stem}-embeddings")
        wanted = EmbedConfig(config.source, config.data, folder, device=config.device, loader=config.loader)
        with distributed(config.device) as dist:
            embed(wanted, dist)
    return _of_dataset(Embeddings(folder), dataset)


def _of_dataset(embeddings: Embeddings, dataset: ShardSet) -> Embeddings:
    if embeddings.about["dataset"] != dataset.fingerprint:
        raise UserError(
            f"{embeddings.folder} holds embeddings of {embeddings.about.get('data')}, and {dataset.path} is another "
            "dataset: name the one that was embedded, or embed this one"
        )
    return embeddings


def draw_neighbours(config: NeighboursConfig, dataset: ShardSet, embeddings: Embeddings) -> None:
    """A row for each query: the query, then its neighbours, most similar first. A sample is not its own neighbour."""
    queries = config.query or tuple(map(str, _drawn(config, embeddings)))
    found = [_find_query(config, query, embeddings) for query in queries[:MOST_ROWS]]
    vectors = np.stack([vector for _, _, vector in found])
    similarity, rows = nearest(embeddings, vectors, min(config.k + 1, len(embeddings)))
    grid: list[list[tuple[np.ndarray, str]]] = []
    for number, (sample, pixels, _) in enumerate(found):
        kept = [pair for pair in zip(rows[number], similarity[number], strict=True) if pair[0] != sample][: config.k]
        query = _pixels(dataset, sample) if pixels is None else pixels
        title = queries[number] if sample is None else f"{sample}\n{embeddings.names[sample]}"
        shown = [(_pixels(dataset, int(row)), f"{cosine:.3f}\n{embeddings.names[int(row)]}") for row, cosine in kept]
        grid.append([(query, title), *shown])
        print(f"{title.replace(chr(10), ' ')}: " + ", ".join(text.replace("\n", " ") for _, text in shown))
    draw_grid(grid, config.out)
    if len(queries) > MOST_ROWS:
        print(f"{len(queries) - MOST_ROWS} queries more than a grid holds were left out")
    print(f"{config.out}: {len(grid)} queries and their {config.k} nearest of {len(embeddings):,} images")


def _drawn(config: NeighboursConfig, embeddings: Embeddings) -> list[int]:
    good = np.setdiff1d(np.arange(len(embeddings)), list(embeddings.bad))
    if not len(good):
        raise UserError(f"{embeddings.folder}: no image could be read, so there is nothing to compare")
    return np.random.default_rng(config.seed).choice(good, min(config.samples, len(good)), replace=False).tolist()


def _find_query(
    config: NeighboursConfig, query: str, embeddings: Embeddings
) -> tuple[int | None, np.ndarray | None, Float[np.ndarray, " d"]]:
    """(sample or None, pixels of a file or None, vector). Raises UserError if there is no such image."""
    sample: int | None = None
    if query.isdecimal():
        sample = _number(query)
        require("--query", query, sample < len(embeddings), f"samples are numbered 0 .. {len(embeddings) - 1}")
    elif query in embeddings.names:
        sample = embeddings.names.index(query)
    if sample is not None:
        if sample in embeddings.bad:
            raise UserError(f"--query {query}: this image could not be read when the dataset was embedded")
        return sample, None, np.asarray(embeddings.vectors[sample], np.float32)
    return (None, *_embed_file(config, _file_of(query), embeddings))


def _embed_file(config: NeighboursConfig, path: Path, embeddings: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    checkpoint = config.checkpoint or embeddings.about["checkpoint"]
    encoder = open_frozen(EncoderConfig(checkpoint, image_size=embeddings.about["image_size"]), torch.device("cpu"))
    if encoder.weights.identity != embeddings.about["encoder"]:
        raise UserError(
            f"{checkpoint} is not the encoder that made {embeddings.folder}: name that one with --checkpoint, or embed "
            "the dataset again"
        )
    image = decode_file(path)
    with torch.no_grad():
        vector = encoder.backbone(Preprocess(encoder.recipe)(path)[None])[0].float().numpy()
    return image.permute(1, 2, 0).numpy(), vector


def draw_duplicates(config: NeighboursConfig, dataset: ShardSet, embeddings: Embeddings) -> None:
    """A table of all pairs, and a grid of the first ones."""
    assert config.duplicates is not None
    others, other_dataset = None, dataset
    if config.against is not None:
        other_dataset = open_indexed(config.against[1], config.loader)
        others = _of_dataset(Embeddings(Path(config.against[0])), other_dataset)
        if others.about["encoder"] != embeddings.about["encoder"]:
            raise UserError("--against: the two datasets were embedded by different encoders; embed both with one")
    pairs = near_duplicates(embeddings, config.duplicates, others)
    other_names = (others or embeddings).names
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["similarity", "sample", "name", "other_sample", "other_name"])
    for one, other, similarity in pairs:
        table.writerow([f"{similarity:.4f}", one, embeddings.names[one], other, other_names[other]])
    listing = config.out.with_suffix(".csv")
    with disk_errors(f"writing {listing}"), atomic_file(listing) as file:
        file.write(text.getvalue().encode())
    where = f"between {len(embeddings):,} and {len(others):,}" if others else f"among {len(embeddings):,}"
    print(f"{listing}: {len(pairs):,} pairs of similarity {config.duplicates} or more {where} images")
    if not pairs:
        config.out.unlink(missing_ok=True)
        return
    grid = [
        [
            (_pixels(dataset, one), f"{similarity:.3f}\n{embeddings.names[one]}"),
            (_pixels(other_dataset, other), f"\n{other_names[other]}"),
        ]
        for one, other, similarity in pairs[:MOST_ROWS]
    ]
    draw_grid(grid, config.out)
    print(f"{config.out}: the {len(grid)} most similar pairs")


def _pixels(dataset: ShardSet, sample: int | None) -> np.ndarray:
    assert sample is not None
    try:
        return decode(dataset.read(sample)).permute(1, 2, 0).numpy()
    except BadSampleError as error:
        print(f"bad sample, shown black: {error}")
        return np.zeros((8, 8, 3), np.uint8)


def draw_grid(grid: list[list[tuple[np.ndarray, str]]], out: Path) -> None:
    """Draw rows of (pixels, title) into a PNG. Raises UserError if it cannot be written."""
    columns = max(map(len, grid))
    figure = Figure(figsize=(CELL_INCHES * columns, (CELL_INCHES + 0.35) * len(grid)), layout="constrained")
    axes = figure.subplots(len(grid), columns, squeeze=False)
    for row, cells in enumerate(grid):
        for column in range(columns):
            axes[row, column].set_axis_off()
            if column < len(cells):
                pixels, title = cells[column]
                axes[row, column].imshow(pixels, interpolation="nearest")
                lines = [line if len(line) < 24 else f"…{line[-23:]}" for line in title.split("\n")]
                axes[row, column].set_title("\n".join(lines).replace("$", r"\$"), fontsize=6)
    save_png(figure, out, dpi=110)


if __name__ == "__main__":
    exit_on_user_error(main)
