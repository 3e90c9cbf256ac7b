"""A linear classifier trained beside the method, on features that it takes from the method's own passes (--probe).

It shows between two kNN evaluations, and at almost no cost, how well the classes can be told apart. The features are
detached: the method's losses and gradients are those of a run without it. Online evaluation as in the code of BYOL
(Grill et al. 2020, byol_experiment.py) and SimCLR; here each image's features are standardised and Adam trains the
classifier, so that no rate has to be found for each backbone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from pipeline.common.errors import UserError
from pipeline.dataset.mixture import Dataset, Mixture
from train.distributed.collectives import sum_over_ranks
from train.distributed.process_group import DistContext
from train.evaluation.features import Samples
from train.optimization.precision import SkipNonFinite

NO_LABEL = -1
RATE = 1e-3  # Adam's default
SMOOTHING = 0.95  # of the accuracy: an average over about the last 20 steps


class OnlineProbe:
    """The classifier, its optimizer and its accuracy, alike on all ranks.

    In a pass the hook takes the features of the first view; ``add`` joins them to their labels; ``step`` ends the step.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        classes: int,
        labels: Callable[[Int64[np.ndarray, " n"]], np.ndarray],
        dist: DistContext,
    ) -> None:
        """``backbone`` gives ``width`` features; ``labels`` gives the class numbers of samples, -1 for none.

        The classifier starts at zero: no random number is drawn, so the run's own stay what they are.
        """
        self._labels, self._dist = labels, dist
        self._linear = nn.utils.skip_init(nn.Linear, width, classes, device=dist.device)
        for parameter in self._linear.parameters():
            nn.init.zeros_(parameter)
        self._optimizer = torch.optim.Adam(self._linear.parameters(), RATE, fused=True)
        self._guard = SkipNonFinite(self._linear, self._optimizer, dist.device)
        self._no_scaler = torch.amp.GradScaler(dist.device.type, enabled=False)
        self._right_and_seen = torch.zeros(2, device=dist.device)  # of the last steps, with weights that decay
        self._new = torch.zeros(2, device=dist.device)  # of this step's passes on this rank
        self._features: Tensor | None = None
        backbone.register_forward_hook(self._take)

    def _take(self, backbone: nn.Module, _: Any, features: Float[Tensor, "rows d"]) -> None:
        """Keep what the backbone's first pass gives: of one view, or of several, one after the other."""
        if backbone.training and self._features is None:
            self._features = features.detach()

    def add(self, sources: Int64[np.ndarray, " n"]) -> None:
        """Add a pass over these samples to the step's gradient, and count those that are classified rightly."""
        assert self._features is not None, "the method has called its backbone"
        labels = torch.from_numpy(self._labels(sources).astype(np.int64)).to(self._dist.device, non_blocking=True)
        logits = self._logits(self._features[: len(sources)])
        self._features = None
        F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum").backward()
        right = (logits.detach().argmax(dim=1) == labels).sum()
        self._new += torch.stack((right, (labels != NO_LABEL).sum()))

    def _logits(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        with torch.autocast(features.device.type, enabled=False):
            wide = features.float()
            return self._linear(F.layer_norm(wide, wide.shape[1:]))

    def step(self, applied: Shaped[Tensor, ""]) -> Float[Tensor, ""]:
        """Move the classifier by the mean over all ranks' labelled images; returns its accuracy in percent.

        ``applied`` is 0 where the method's step was skipped; then nothing changes. The accuracy is that of the last
        steps, each before it was trained on; nan before the first label. A collective.
        """
        gradients = [parameter.grad for parameter in self._linear.parameters()]
        assert all(gradient is not None for gradient in gradients)
        total = sum_over_ranks(self._dist, torch.cat([*(g.flatten() for g in gradients), self._new]))
        *sums, new = total.split([*(g.numel() for g in gradients), 2])
        seen = new[1].clamp(min=1)
        for parameter, added in zip(self._linear.parameters(), sums, strict=True):
            parameter.grad = torch.where(applied.bool(), added / seen, torch.nan).view_as(parameter)
        trained = self._guard.step(self._no_scaler)
        moved = self._right_and_seen * SMOOTHING + new
        self._right_and_seen.copy_(torch.where(trained.bool(), moved, self._right_and_seen))
        self._optimizer.zero_grad()
        self._new.zero_()
        right, labelled = self._right_and_seen.unbind()
        return 100 * right / labelled

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it; tensors on the device."""
        return {
            "linear": self._linear.state_dict(),
            "optimizer": self._optimizer.state_dict()["state"],
            "accuracy": self._right_and_seen,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self._linear.load_state_dict(state["linear"])
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state["optimizer"]})
        self._right_and_seen.copy_(state["accuracy"])


def open_probe(backbone: nn.Module, width: int, dataset: Dataset, dist: DistContext) -> OnlineProbe:
    """The probe of a run on ``dataset``, of a mixture on the first dataset with labels.

    Raises UserError if no sample has a label.
    """
    labels: Callable[[Int64[np.ndarray, " n"]], np.ndarray]
    if isinstance(dataset, Mixture):
        labelled = [number for number, part in enumerate(dataset.parts) if len(Samples.labelled(part).ids)]
        number = labelled[0] if labelled else 0
        labels, dataset = partial(dataset.labels_in, number), dataset.parts[number]
    else:
        labels = dataset.labels
    if not len(Samples.labelled(dataset).ids):
        raise UserError(
            f"--probe: {dataset.path} has no labels to train a classifier with: leave --probe out, or write the "
            "dataset with --labels"
        )
    return OnlineProbe(backbone, width, len(dataset.classes), labels, dist)
