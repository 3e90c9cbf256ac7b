"""Write one HTML page about a run, or about several side by side: python tools/report.py RUN [RUN ...]

Configuration, curves of everything that was logged, the views of some samples, bad samples, a map of embeddings with
the image of each point, the neighbours of some images, the confusion of kNN, versions, and the commands to repeat it.
The page needs nothing beside it and can be mailed. Where the dataset or the checkpoint is gone, the parts that need it
are left out, and the page says so.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import importlib.util
import json
import math
import platform
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from jaxtyping import Float
from matplotlib.figure import Figure

from pipeline.backends.reference import decode
from pipeline.common.errors import UserError, check_at_least_1, exit_on_user_error
from pipeline.common.files import atomic_file, check_writable, disk_errors, read_object
from pipeline.common.flags import group
from pipeline.common.locations import InputPath, LocalPath, OptionalDataset, Url, location_or_tars
from pipeline.common.mixed_data import weighted_place
from pipeline.common.system import versions
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.loader.bad_samples import BAD_SAMPLES_FILE
from pipeline.loader.config import LoaderConfig
from pipeline.sampling.order import epoch_order
from pipeline.sampling.views import draw_views
from tools.common.plot_style import INK, PALETTE
from tools.embed import sample_names
from tools.embedding.store import escaped
from tools.preview_views import PreviewConfig, backends_of, draw, first_views, views_of_run
from tools.reporting.page import (
    MapPoint,
    commands,
    details,
    embedding_map,
    image,
    page,
    paragraph,
    png_uri,
    scaled,
    section,
    table,
    thumbnail_uri,
)
from train.distributed.process_group import DistContext
from train.evaluation.features import EncoderConfig, ImageSource, extract_features, open_frozen, open_indexed
from train.optimization.precision import choose_precision
from train.storage.run_folder import CONFIG_FILE, METRICS_FILE, PLAN_FILE, SUMMARY_FILE, read_lines

# Curves in this order; whatever else a run has logged follows.
CURVES = {
    "loss": "loss",
    "z_std": "std of l2-normalised z",
    "z_rank": "effective rank of z",
    "knn_top1": "kNN top-1 (%)",
    "probe_top1": "linear probe top-1 (%)",
    "lr": "learning rate",
    "img_per_s": "source images / s",
    "data_wait": "share of time waiting for data",
    "host_bound": "share of time waiting for the host",
    "step_s": "seconds a step",
}
SHARES = ("data_wait", "host_bound")  # which are never below 0
NOT_CURVES = frozenset({"epoch", "step", "time"})
PACKAGES = ("siamstream", "torch", "torchvision", "nvidia-dali-cuda130", "numpy", "timm")
VIEWED = 4  # images whose views are shown
THUMBNAIL_SIDE, NEIGHBOURS, QUERIES, MOST_CLASSES = 48, 6, 6, 20
KNN_K, KNN_TEMPERATURE = 20, 0.07  # Wu et al. 2018 (arXiv:1805.01978), as the online kNN


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML page about runs."""

    runs: Annotated[tuple[InputPath, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders, as train/pretrain.py writes them; several stand side by side."""
    out: LocalPath | None = None
    """The page to write; default: report.html in the (first) run folder."""
    data: OptionalDataset = None
    """Dataset of the run; default: where the run read it."""
    samples: int = 1000
    """Images on the map of embeddings, spread over the dataset."""
    seed: int = 0
    """Seed of the images whose neighbours are shown."""
    loader: Annotated[LoaderConfig, group("loader")] = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        check_at_least_1("--samples", self.samples)
        if not self.runs:
            raise UserError("name at least one run folder (the --run-dir of train/pretrain.py)")


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds."""

    path: Path
    config: dict[str, Any]
    plan: dict[str, Any]
    lines: list[dict[str, Any]]
    summary: dict[str, Any] | None  # None: the run has not ended

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Raises UserError if it is no run folder."""
        if not (path / CONFIG_FILE).is_file():
            raise UserError(f"{path} is no run folder (there is no {CONFIG_FILE}): give the --run-dir of pretrain.py")
        try:
            config, plan = (read_object(path / name) for name in (CONFIG_FILE, PLAN_FILE))
            summary_file = path / SUMMARY_FILE
            summary = read_object(summary_file) if summary_file.is_file() else None
            _check_values(config, plan)
            return cls(path, config, plan, read_lines(path / METRICS_FILE), summary)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a run folder: {error}") from error

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of what was logged as ``key``."""
        points = [(line["step"], line[key]) for line in self.lines if isinstance(line.get(key), int | float)]
        return [step for step, _ in points], [float(value) for _, value in points]


def main() -> None:
    """Parse the command line and write the page."""
    config = tyro.cli(ReportConfig, description=__doc__)
    out = config.out or config.runs[0] / "report.html"
    runs = [RunRecord.read(path) for path in config.runs]
    check_writable("--out", out)
    text = report(config, runs)
    with disk_errors(f"writing {out}", f"cannot write {out}"), atomic_file(out) as file:
        file.write(text.encode())
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {len(text) / 1e6:.1f} MB")


def _check_values(config: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raise ValueError unless what the page shows of them is there."""
    try:
        first = config["data"][0]
        texts = [config["model"]["backbone"], config.get("method", ""), first]
        numbers = [config["views"]["image_size"], plan["num_samples"], plan["total_steps"]]
        versions = config.get("session", {}).get("versions", {})
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{CONFIG_FILE} or {PLAN_FILE} is not what pretrain.py writes ({error!r})") from error
    if not (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(number, int) for number in numbers)
        and isinstance(versions, dict)
    ):
        raise ValueError(f"{CONFIG_FILE} or {PLAN_FILE} holds other values than pretrain.py writes")


def report(config: ReportConfig, runs: list[RunRecord]) -> str:
    """The page as a string."""
    sections = [section("Runs", _overview(runs)), section("Curves", *_curves(runs))]
    for number, run in enumerate(runs):
        sections += _images(config, run, number, prefix=f"{run.name}: " if len(runs) > 1 else "")
    sections.append(section("Configuration", _configuration(runs)))
    sections.append(section("Repeat it", commands([_repeat(run) for run in runs]), _versions(runs)))
    return page("siamstream: " + ", ".join(run.name for run in runs), sections)


def _overview(runs: list[RunRecord]) -> str:
    rows = []
    for run in runs:
        steps = max((line["step"] for line in run.lines), default=0)
        _, knn = run.curve("knn_top1")
        _, loss = run.curve("loss")
        state = "finished" if run.summary is not None else "not finished"
        rows.append(
            [
                run.name,
                run.config.get("method", "simsiam"),
                run.config["model"]["backbone"],
                f"{run.config['views']['image_size']} px",
                f"{run.plan['num_samples']:,} images",
                f"{steps:,} of {run.plan['total_steps']:,} steps",
                f"{loss[-1]:.4f}" if loss else "",
                f"{knn[0]:.1f} to {knn[-1]:.1f} %" if knn else "",
                state,
            ]
        )
    head = ["run", "method", "backbone", "views", "dataset", "steps", "last loss", "kNN, first to last", "state"]
    return table(head, rows)


def _curves(runs: list[RunRecord]) -> list[str]:
    logged = {
        key for run in runs for line in run.lines for key, value in line.items() if isinstance(value, int | float)
    }
    # per-rank values are many, and the slowest rank's is there as data_wait
    others = sorted(key for key in logged - set(CURVES) - NOT_CURVES if "_rank" not in key or key == "z_rank")
    shown = [key for key in (*CURVES, *others) if key in logged]
    if not shown:
        return [paragraph("No step has been logged yet.")]
    columns = 3
    figure = Figure(figsize=(11, 2.6 * math.ceil(len(shown) / columns)), layout="constrained")
    axes = figure.subplots(math.ceil(len(shown) / columns), columns, squeeze=False).ravel()
    for place, key in enumerate(shown):
        for number, run in enumerate(runs):
            steps, values = run.curve(key)
            mark = "o" if key.endswith("_top1") or len(steps) < 3 else None
            colour = PALETTE[number % len(PALETTE)]
            axes[place].plot(steps, values, color=colour, linewidth=1.3, marker=mark, markersize=3, label=run.name)
        axes[place].set_title(CURVES.get(key, key), fontsize=9, color=INK)
        if key in SHARES:
            axes[place].set_ylim(bottom=0)
        axes[place].tick_params(labelsize=7)
        axes[place].grid(color="#e4e7ea", linewidth=0.6)
        axes[place].spines[["top", "right"]].set_visible(False)
    for empty in axes[len(shown) :]:
        empty.set_axis_off()
    if len(runs) > 1:
        axes[0].legend(fontsize=7)
    rows = [[key, *(_last(run, key) for run in runs)] for key in shown]
    numbers = table(["last value", *(run.name for run in runs)], rows, numbers=True)
    return [image(png_uri(figure, 110), "curves over optimizer steps"), details("the last values", numbers)]


def _last(run: RunRecord, key: str) -> str:
    _, values = run.curve(key)
    return f"{values[-1]:.5g}" if values else ""


def _images(config: ReportConfig, run: RunRecord, number: int, prefix: str) -> list[str]:
    """The sections that need the dataset, and those that need the encoder too."""
    try:
        dataset = open_indexed(config.data or data_of(run), config.loader)
    except UserError as error:
        return [section(f"{prefix}Images", paragraph(f"Left out, as the dataset is not there: {error}"))]
    if dataset.channels != 3:
        return [section(f"{prefix}Images", paragraph(f"Left out, as they have {dataset.channels} channels."))]
    sections = [section(f"{prefix}Views", *_views(config, run, dataset))]
    sections.append(section(f"{prefix}Bad samples", _bad_samples(run)))
    chosen = np.sort(epoch_order(len(dataset), 0, 0, np.arange(min(config.samples, len(dataset)))))
    try:
        features, bad = _features(config, run, dataset, chosen)
    except UserError as error:
        return [*sections, section(f"{prefix}Embeddings", paragraph(f"Left out, as there is no encoder: {error}"))]
    kept = ~np.isin(chosen, list(bad))
    chosen, features = chosen[kept], features[kept]
    if len(chosen) < 3:
        return [*sections, section(f"{prefix}Embeddings", paragraph("Left out: fewer than three images can be read."))]
    names = [escaped(name) for name in sample_names(dataset, chosen)]
    labels = dataset.labels(chosen).astype(np.int64)
    pixels = [decode(dataset.read(int(sample))).permute(1, 2, 0).numpy() for sample in chosen]
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    thumbnails = [thumbnail_uri(image, THUMBNAIL_SIDE) for image in pixels]
    positions, method = _two_dimensions(unit)
    words = [escaped(dataset.classes[label]) if 0 <= label < len(dataset.classes) else "" for label in labels]
    points = [
        MapPoint(float(x), float(y), names[i], words[i], PALETTE[max(int(labels[i]), 0) % len(PALETTE)], thumbnails[i])
        for i, (x, y) in enumerate(scaled(positions))
    ]
    about = f"{len(points):,} images by {method}; one colour a class. Point at one to see it."
    sections.append(section(f"{prefix}Map of embeddings", paragraph(about), embedding_map(number, points)))
    sections.append(section(f"{prefix}Neighbours", *_neighbours(config, unit, thumbnails, names)))
    if (labels >= 0).all() and len(dataset.classes) > 1:
        sections.append(section(f"{prefix}Confusion of kNN", *_confusion(unit, labels, dataset.classes)))
    return sections


def _views(config: ReportConfig, run: RunRecord, dataset: ShardSet) -> list[str]:
    """Images and what training makes of them, as siamstream preview draws them."""
    try:
        views, seed = views_of_run(run.path)
        shown = PreviewConfig(
            run.path, run.path, samples=min(VIEWED, len(dataset)), seed=seed, views=views, backend=config.loader.backend
        )
        (backend,) = backends_of(shown)
        batch = first_views(dataset, shown, backend)
        params = draw_views(views, seed, 0, batch.ids, dataset.sizes(batch.sources))
        figure = draw(dataset, views, {backend: batch}, params)
    except (UserError, BadSampleError) as error:
        return [paragraph(f"Left out: {error}")]
    about = f"The first images of the run's first epoch, and their views by {backend}, with what was drawn for each."
    return [paragraph(about), image(png_uri(figure, 90), "images and their views")]


def data_of(run: RunRecord) -> Path | Url:
    """Where the run read its images; of a mixture the first dataset."""
    data = run.config["data"]
    return location_or_tars(data) if isinstance(data, str) else weighted_place(data[0]).place


def _bad_samples(run: RunRecord) -> str:
    lines = read_lines(run.path / BAD_SAMPLES_FILE, "sample")
    if not lines:
        return paragraph("None: every image that was read was as it was written.")
    rows = [
        [line.get("sample"), line.get("shard"), escaped(str(line.get("key"))), line.get("reason")] for line in lines
    ]
    return table(["sample", "shard", "key", "reason"], rows)


def _features(
    config: ReportConfig, run: RunRecord, dataset: ShardSet, chosen: np.ndarray
) -> tuple[Float[np.ndarray, "n d"], set[int]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = open_frozen(EncoderConfig(str(run.path)), device)
    precision = choose_precision("auto", device)
    source = ImageSource(
        encoder.recipe, config.loader, DistContext.alone(device), precision.autocast, precision.view_dtype
    )
    bad: set[int] = set()

    def note(error: BadSampleError) -> None:
        bad.add(error.sample_id)

    features = extract_features(encoder.backbone, dataset, chosen, source, on_bad_sample=note)
    return features.float().cpu().numpy(), bad


def _two_dimensions(unit: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, "n 2"], str]:
    """Two coordinates for every row: UMAP where it is installed (the extra [umap]), else the principal components."""
    if importlib.util.find_spec("umap") is not None and len(unit) > 15:
        import umap

        return umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(unit), "UMAP (cosine)"
    centred = torch.from_numpy(unit - unit.mean(axis=0))
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    return (centred @ axes[:2].T).numpy(), "the first two principal components (pip install umap-learn for UMAP)"


def _neighbours(
    config: ReportConfig, unit: Float[np.ndarray, "n d"], thumbnails: list[str], names: list[str]
) -> list[str]:
    chosen = np.random.default_rng(config.seed).choice(len(unit), min(QUERIES, len(unit)), replace=False)
    rows = []
    for query in chosen.tolist():
        similarity = unit @ unit[query]
        similarity[query] = -np.inf
        nearest = np.argsort(-similarity)[: min(NEIGHBOURS, len(unit) - 1)].tolist()
        cells = [f"<td>{image(thumbnails[query], names[query])}</td>"]
        cells += [f"<td>{image(thumbnails[i], names[i])}<br>{similarity[i]:.3f}</td>" for i in nearest]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return [
        paragraph("An image, then the most similar ones on the map, with the cosine of their features."),
        f"<div class=wide><table>{''.join(rows)}</table></div>",
    ]


def _confusion(unit: Float[np.ndarray, "n d"], labels: np.ndarray, classes: tuple[str, ...]) -> list[str]:
    """Leave one out: every image is classified by its nearest among the others."""
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    k = min(KNN_K, len(unit) - 1)
    nearest = np.argsort(-similarity, axis=1)[:, :k]
    weights = np.exp((np.take_along_axis(similarity, nearest, 1) - 1) / KNN_TEMPERATURE)
    votes = np.zeros((len(unit), len(classes)))
    np.add.at(votes, (np.arange(len(unit))[:, None], labels[nearest]), weights)
    guessed = votes.argmax(axis=1)
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, (labels, guessed), 1)
    right = 100 * float((guessed == labels).mean())
    shown = np.argsort(-counts.sum(axis=1), kind="stable")[:MOST_CLASSES]
    figure = Figure(figsize=(1.6 + 0.36 * len(shown), 1.4 + 0.36 * len(shown)), layout="constrained")
    axes = figure.subplots()
    part = counts[np.ix_(shown, shown)]
    axes.imshow(part / np.maximum(counts[shown].sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(part > 0).tolist():
        axes.text(column, row, str(part[row, column]), ha="center", va="center", fontsize=7, color=INK)
    ticks = [escaped(classes[label])[:16].replace("$", r"\$") for label in shown]
    axes.set_xticks(range(len(shown)), ticks, rotation=90, fontsize=7)
    axes.set_yticks(range(len(shown)), ticks, fontsize=7)
    axes.set_xlabel("class by kNN", fontsize=8)
    axes.set_ylabel("class", fontsize=8)
    text = f"{right:.1f} % of {len(unit):,} images get their own class from their {k} nearest among the others."
    if len(classes) > MOST_CLASSES:
        text += f" Shown are the {MOST_CLASSES} most frequent of {len(classes)} classes."
    return [paragraph(text), image(png_uri(figure), "confusion matrix")]


def _configuration(runs: list[RunRecord]) -> str:
    flat = [_flat(run.config) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    differ = [key for key in keys if len({json.dumps(values.get(key)) for values in flat}) > 1]
    head = ["", *(run.name for run in runs)]
    rows = [[key, *(json.dumps(values.get(key)) for values in flat)] for key in keys]
    whole = details("everything", table(head, rows))
    if len(runs) == 1:
        return whole
    return table(head, [row for row in rows if row[0] in differ]) + whole


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _repeat(run: RunRecord) -> str:
    return shlex.join(["siamstream", "pretrain", "--config", str(run.path / CONFIG_FILE), "--run-dir", "NEW_FOLDER"])


def _versions(runs: list[RunRecord]) -> str:
    here = dict.fromkeys(PACKAGES, "not installed") | versions(PACKAGES)
    rows = [["python", platform.python_version()], *here.items()]
    found = {run.name: run.config.get("session", {}).get("versions", {}) for run in runs}
    recorded = [[f"{run}: {key}", value] for run, of in found.items() for key, value in of.items()]
    return details("versions", table(["", "this page was written with"], rows) + table(["", "recorded"], recorded))


if __name__ == "__main__":
    exit_on_user_error(main)
