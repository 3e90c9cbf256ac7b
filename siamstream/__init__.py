"""Self-supervised pretraining of image encoders on sharded datasets: the public names.

    import siamstream

    siamstream.make_dataset("photos", "data/photos")
    siamstream.pretrain("data/photos", "runs/photos", recipe="demo", epochs=10)
    module, preprocess = siamstream.load_encoder("runs/photos")
    features = siamstream.extract_features(module, preprocess, siamstream.open_dataset("data/photos"))

Each name is imported when it is first used, so `import siamstream` takes milliseconds and loads no torch. The console
command `siamstream` does the same jobs; `siamstream --help` lists them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from siamstream.naming import install_in_checkout, prefix

__version__ = "0.2.0"

if TYPE_CHECKING:
    from model.methods.simsiam import SimSiam, SimSiamConfig
    from pipeline.backends.base import ViewBatch
    from pipeline.common.errors import UserError
    from pipeline.dataset.dataset import ShardSet
    from pipeline.loader.config import LoaderConfig
    from pipeline.loader.loader import open_dataset, open_views
    from pipeline.sampling.sampler import BatchSampler, World
    from pipeline.sampling.views import ViewRecipe
    from pipeline.sharding.make_dataset import make_dataset
    from pipeline.sharding.options import ShardingOptions
    from train.evaluation.encoder import extract_features, load_encoder
    from train.pretrain import pretrain

__all__ = [
    "BatchSampler",
    "LoaderConfig",
    "ShardSet",
    "ShardingOptions",
    "SimSiam",
    "SimSiamConfig",
    "UserError",
    "ViewBatch",
    "ViewRecipe",
    "World",
    "extract_features",
    "load_encoder",
    "make_dataset",
    "open_dataset",
    "open_views",
    "pretrain",
]

# Where each public name is defined; the imports above say the same to type checkers.
_MODULES = {
    "model.methods.simsiam": ("SimSiam", "SimSiamConfig"),
    "pipeline.backends.base": ("ViewBatch",),
    "pipeline.common.errors": ("UserError",),
    "pipeline.dataset.dataset": ("ShardSet",),
    "pipeline.loader.config": ("LoaderConfig",),
    "pipeline.loader.loader": ("open_dataset", "open_views"),
    "pipeline.sampling.sampler": ("BatchSampler", "World"),
    "pipeline.sampling.views": ("ViewRecipe",),
    "pipeline.sharding.make_dataset": ("make_dataset",),
    "pipeline.sharding.options": ("ShardingOptions",),
    "train.evaluation.encoder": ("extract_features", "load_encoder"),
    "train.pretrain": ("pretrain",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

install_in_checkout()


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(prefix() + _MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
