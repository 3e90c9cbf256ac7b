"""The paper's ablations: the variants of each table as flags of train/pretrain.py, and the paper's accuracies.

Chen & He 2020 (arXiv:2011.10566): ResNet-50, ImageNet at 224 px, linear top-1 in percent after 100 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

PAPER_SCALE = "ResNet-50 at 224 px on ImageNet (1.28 million images), batch 512, 100 epochs, about 250,000 steps"


@dataclass(frozen=True)
class Variant:
    """One row of a table."""

    name: str  # of the run folder
    label: str
    flags: tuple[str, ...]
    paper_top1: float | None  # linear, percent; None: there is no number to compare with
    cost: float = 1.0  # time of an epoch / that of the pilot's, estimated
    batch: int | None = None  # global batch, where the table varies it
    paper_text: str = "unstable"  # what the paper has in place of a number
    method: str | None = None  # trained with its own recipe (method_flags.py), where the table compares methods


@dataclass(frozen=True)
class PaperTable:
    """One table or figure; the others are compared with the first variant."""

    title: str
    source: str  # where in the paper
    variants: tuple[Variant, ...]
    least_epochs: int = 1  # with fewer the variants do not differ


def _batch(size: int, top1: float) -> Variant:
    # The fixed cost of a step weighs more in small batches.
    return Variant(f"batch-{size}", f"batch {size}", (), top1, cost=1.3 if size < 128 else 1.0, batch=size)


DECAYED = ("--predictor-lr", "cosine")  # the baseline of figure 2 and table 1 decays the predictor's rate too
NO_PREDICTOR = ("--predictor", "none")
FROZEN = ("--targets", "frozen", "--target-steps")
FROZEN_COST = 1.4  # two more passes forward


TABLES: dict[str, PaperTable] = {
    "stop-gradient": PaperTable(
        "With and without stop-gradient",
        "figure 2",
        (
            Variant("with", "with stop-gradient", DECAYED, 67.7),
            Variant("without", "without stop-gradient", (*DECAYED, "--no-stop-gradient"), 0.1),
        ),
    ),
    "predictor": PaperTable(
        "The predictor",
        "table 1",
        (
            Variant("learned", "learned, rate decayed", DECAYED, 67.7),
            Variant("none", "no predictor", (*DECAYED, *NO_PREDICTOR), 0.1),
            Variant("fixed-random", "fixed random", (*DECAYED, "--predictor", "fixed-random"), 1.5),
            Variant("constant-lr", "learned, constant rate", ("--predictor-lr", "constant"), 68.1),
        ),
    ),
    "batch-size": PaperTable(
        "The batch size",
        "table 2",
        (
            _batch(256, 68.1),
            _batch(64, 66.1),
            _batch(128, 67.3),
            _batch(512, 68.1),
            _batch(1024, 68.0),
            _batch(2048, 67.9),
            _batch(4096, 64.0),
        ),
    ),
    "bn": PaperTable(
        "Batch norm in projector and predictor",
        "table 3",
        (
            Variant("default", "default", (), 68.1),
            Variant("none", "none", ("--projector-bn", "none", "--predictor-bn", "none"), 34.6),
            Variant("hidden", "hidden layers only", ("--projector-bn", "hidden", "--predictor-bn", "hidden"), 67.4),
            Variant("all", "all, predictor's output too", ("--projector-bn", "all", "--predictor-bn", "all"), None),
        ),
    ),
    "similarity": PaperTable(
        "The similarity",
        "section 4.5",
        (
            Variant("cosine", "cosine", (), 68.1),
            Variant("cross-entropy", "cross-entropy", ("--similarity", "cross-entropy"), 63.2),
        ),
    ),
    "symmetrisation": PaperTable(
        "Symmetrisation of the loss",
        "section 4.6",
        (
            Variant("symmetric", "symmetric", (), 68.1),
            Variant("asymmetric", "asymmetric", ("--no-symmetric",), 64.8),
            Variant("asymmetric-2x", "asymmetric, two pairs", ("--no-symmetric", "--pairs", "2"), 67.3, cost=2.0),
        ),
    ),
    "alternation": PaperTable(
        "Steps between two renewals of the targets",
        "section 5.2, multi-step alternation",
        (
            Variant("1-step", "1 step (SimSiam)", (), 68.1),
            Variant("10-steps", "10 steps", (*FROZEN, "10"), 68.7, FROZEN_COST),
            Variant("100-steps", "100 steps", (*FROZEN, "100"), 68.9, FROZEN_COST),
            Variant("1-epoch", "1 epoch", (*FROZEN, "epoch"), 67.0, FROZEN_COST),
        ),
        least_epochs=4,
    ),
    "moving-average": PaperTable(
        "No predictor, but targets averaged over each image's views",
        "section 5.2, expectation over augmentations",
        (
            Variant("predictor", "predictor (SimSiam)", (), 68.1),
            Variant("none", "no predictor", NO_PREDICTOR, 0.1),
            Variant("average", "no predictor, averaged", (*NO_PREDICTOR, "--targets", "moving-average"), 55.0),
        ),
        least_epochs=3,  # an average needs a past
    ),
    "output-dimension": PaperTable(
        "The width of z and p",
        "appendix B",
        tuple(
            Variant(f"dim-{dim}", f"d = {dim}", ("--dim", str(dim)), top1)
            for dim, top1 in ((2048, 68.1), (1024, 67.5), (512, 67.2), (256, 65.3))
        ),
    ),
}

METHODS_TABLE = PaperTable(
    "SimSiam and its relatives",
    "table 4 and sections 6.2, 6.3",
    (
        Variant("simsiam", "SimSiam", (), 68.1, method="simsiam"),
        Variant("simclr", "SimCLR", (), 66.5, method="simclr"),
        Variant("moco-v2", "MoCo v2", (), 67.4, cost=1.4, method="moco-v2"),
        Variant("byol", "BYOL", (), 66.5, cost=1.4, method="byol"),
        Variant("swav", "SwAV", (), 66.5, method="swav"),
        Variant("dino", "DINO", (), None, cost=1.5, paper_text="not compared", method="dino"),
        Variant("simclr-predictor", "SimCLR, predictor", ("--predictor",), 66.4, method="simclr"),
        Variant(
            "simclr-stop-gradient",
            "SimCLR, predictor and stop-gradient",
            ("--predictor", "--stop-gradient"),
            66.0,
            method="simclr",
        ),
        Variant("swav-predictor", "SwAV, predictor", ("--predictor",), 65.2, method="swav"),
        Variant(
            "swav-no-stop-gradient",
            "SwAV, no stop-gradient",
            ("--no-stop-gradient",),
            None,
            paper_text="diverges",
            method="swav",
        ),
        # Grill et al. 2020, appendix I, table 21: 300 epochs
        Variant(
            "byol-no-momentum",
            "BYOL, no momentum encoder, predictor rate x 10",
            ("--no-momentum-encoder", "--predictor-lr-scale", "10"),
            None,
            paper_text="66.6 after 300 epochs",
            method="byol",
        ),
    ),
)
