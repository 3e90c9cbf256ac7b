"""The verbs of the console command: which script each one is, and what it is for."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """A script under its verb."""

    module: str  # whose main() runs; the script's path with dots
    summary: str


COMMANDS = {
    "shard": Command("tools.make_shards", "write images as a dataset of WebDataset shards"),
    "check": Command("tools.check_shards", "check a dataset, and repair its sidecar files"),
    "preview": Command("tools.preview_views", "draw images and the views that training makes of them"),
    "pretrain": Command("train.pretrain", "train an encoder without labels"),
    "linear": Command("train.linear", "accuracy of a linear classifier on the frozen encoder"),
    "knn": Command("train.knn", "accuracy of the nearest neighbours in the encoder's features"),
    "finetune": Command("train.finetune", "train the whole network with a classifier, from a pretrained encoder"),
    "predict": Command("tools.predict", "classify image files with a fine-tuned model"),
    "embed": Command("tools.embed", "write the features of every image of a dataset"),
    "neighbours": Command("tools.neighbours", "find similar images, near-duplicates and leaks between datasets"),
    "report": Command("tools.report", "one HTML page about a run, or several side by side"),
    "export": Command("tools.export_backbone", "write the encoder for torchvision, timm, detectron2 and others"),
    "profile": Command("tools.profile_throughput", "measure what limits training on this machine"),
    "plot": Command("tools.plot_run", "plot a run"),
    "reproduce": Command("tools.reproduce", "repeat an experiment of the paper at the scale of this machine"),
    "demo": Command("tools.demo", "all of it at the size of a laptop, in minutes"),
}
# Words that people try, beside the scripts' own names.
SYNONYMS = {"train": "pretrain", "eval": "linear", "evaluate": "linear", "fit": "pretrain", "benchmark": "profile"}
