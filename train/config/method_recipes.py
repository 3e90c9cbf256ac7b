"""The recipes of the methods beside SimSiam, by method and name; recipes.py has SimSiam's and reads both.

What a recipe leaves out is as in the configurations' own defaults, which are each method's paper's for ImageNet.
``imagenet-100ep`` and ``imagenet-200ep`` are the runs that Chen & He 2020 compare in table 4, with two views;
``imagenet-multicrop-*`` are the methods' own, with small crops beside the two views.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tyro

from model.methods.base import MethodConfig
from model.methods.byol import BYOLConfig
from model.methods.dino import DINOConfig
from model.methods.moco import MoCoConfig
from model.methods.simclr import SimCLRConfig
from model.methods.swav import SwAVConfig
from pipeline.sampling.views import ViewGroup, ViewRecipe
from train.config.run_config import PretrainConfig, RecipeName
from train.evaluation.knn_monitor import KnnConfig
from train.optimization.optimizer import OptimConfig

# Head and width of the demo's methods, as of SimSiam's demo recipe.
TINY: dict[str, Any] = {"backbone": "resnet_tiny", "projector_hidden": 512}
CIFAR: dict[str, Any] = {"backbone": "resnet18", "stem": "cifar"}  # Chen & He 2020, appendix D


def recipe(
    name: RecipeName,
    epochs: int,
    batch: int,
    model: MethodConfig,
    optim: OptimConfig,
    views: ViewRecipe | None = None,
    knn: KnnConfig = KnnConfig(),  # noqa: B008  # frozen
) -> PretrainConfig:
    """A run of a method; ``views`` are the method's own by default."""
    return PretrainConfig(
        data=tyro.MISSING,
        run_dir=tyro.MISSING,
        method=model.name,
        recipe=name,
        epochs=epochs,
        global_batch=batch,
        sync_bn=not model.own_batch_norm,
        model=model,
        views=model.default_views() if views is None else views,
        optim=optim,
        knn=knn,
    )


def _imagenet(model: MethodConfig, optim: dict[int, OptimConfig], batch: int) -> list[PretrainConfig]:
    names: dict[int, RecipeName] = {100: "imagenet-100ep", 200: "imagenet-200ep"}
    return [recipe(names[epochs], epochs, batch, model, settings) for epochs, settings in optim.items()]


def _small(views: ViewRecipe) -> ViewRecipe:
    """A method's views for images of 32 px: without blur, as Chen & He 2020, appendix D."""
    more = tuple(replace(group, blur_prob=0.0) for group in views.more_views)
    return replace(views, image_size=32, blur_prob=0.0, more_views=more)


def cifar(model: MethodConfig, optim: OptimConfig) -> PretrainConfig:
    """The run on CIFAR-10 of Chen & He 2020, appendix D."""
    knn = KnnConfig(every=10)  # one evaluation costs about as much as half an epoch
    return recipe("cifar10-800ep", 800, 512, model, optim, _small(model.default_views()), knn)


def demo(model: MethodConfig, optim: OptimConfig) -> PretrainConfig:
    """The run of tools/demo.py."""
    return recipe("demo", 12, 128, model, optim, ViewRecipe(image_size=32, blur_prob=0.0))


# Their 10 epochs of warm-up at batch 4096 are OptimConfig's rule.
# SimCLR. Chen et al. 2020, section 2: "LARS with learning rate of 4.8 (= 0.3 x BatchSize/256) and weight decay of 1e-6
# ... batch size 4096 for 100 epochs ... linear warmup for the first 10 epochs". Below 1,000 images or so its README's
# rule suits better: --lr-scaling sqrt --base-lr 1.2
_SIMCLR = OptimConfig(base_lr=0.3, weight_decay=1e-6, optimizer="lars")
# MoCo v2. main_moco.py --cos: lr 0.03 at 256, weight decay 1e-4 on everything, the cosine moves once an epoch
_MOCO = OptimConfig(base_lr=0.03, weight_decay=1e-4, warmup_epochs=0, schedule_unit="epoch")
# BYOL. configs/byol.py; Chen & He 2020, footnote 6: 100 epochs follow its presets for 100, 200 epochs those for 300
_BYOL = OptimConfig(base_lr=0.45, weight_decay=1e-6, optimizer="lars")
# SwAV. scripts/swav_400ep_2x224_pretrain.sh: lr 4.8 to 0.0048, 10 epochs of warm-up from 0.3, LARC adapts everything
_SWAV = OptimConfig(base_lr=0.3, weight_decay=1e-6, optimizer="lars", warmup_start=0.3 / 4.8, lr_end=0.001)
# DINO. main_dino.py: AdamW, lr 0.0005 at 256 to 1e-6 (at batch 512), weight decay 0.04 to 0.4 along half a cosine
_DINO = OptimConfig(
    base_lr=0.0005, weight_decay=0.04, weight_decay_end=0.4, optimizer="adamw", warmup_epochs=10, lr_end=0.001
)
_SGD = OptimConfig(base_lr=0.03, weight_decay=5e-4)  # Chen & He 2020, appendix D

_ALL = [
    *_imagenet(SimCLRConfig(), {100: _SIMCLR, 200: _SIMCLR}, 4096),  # 66.5, 68.3 % in table 4
    # Appendix D compares with SimCLR, 91.1 %; the temperature is Chen et al. 2020's for CIFAR-10, appendix B.9
    cifar(SimCLRConfig(**CIFAR, projector_layers=2, temperature=0.5), _SGD),
    demo(SimCLRConfig(**TINY, projector_layers=2, temperature=0.2), OptimConfig(base_lr=2.0, weight_decay=5e-4)),
    *_imagenet(MoCoConfig(), {100: _MOCO, 200: _MOCO}, 256),  # 67.4, 69.9 % in table 4
    # moco's notebook for CIFAR-10: 512 images in 8 groups, momentum 0.99, 4096 keys, temperature 0.1
    cifar(MoCoConfig(**CIFAR, queue=4096, teacher_momentum=0.99, temperature=0.1, bn_images=64), _SGD),
    # In trials of 60 steps z_std rose at a rate of 0.03; at 0.1 all queries became one in the first 12 steps
    demo(MoCoConfig(**TINY, queue=1024, teacher_momentum=0.99), OptimConfig(base_lr=0.06, weight_decay=1e-4)),
    # 66.5, 70.6 % in table 4
    *_imagenet(BYOLConfig(), {100: _BYOL, 200: replace(_BYOL, base_lr=0.3)}, 4096),
    cifar(BYOLConfig(**CIFAR), _SGD),  # ours, after SimSiam's
    demo(BYOLConfig(**TINY, predictor_hidden=512, teacher_momentum=0.95), OptimConfig(base_lr=3.0, weight_decay=1e-4)),
    *_imagenet(SwAVConfig(), {100: _SWAV, 200: _SWAV}, 4096),  # 66.5, 69.1 % in table 4
    # scripts/swav_200ep_pretrain.sh: 2 x 224 + 6 x 96 px, 73.9 % with the original's projector of 2 layers
    recipe(
        "imagenet-multicrop-200ep",
        200,
        4096,
        SwAVConfig(projector_layers=2),
        _SWAV,
        replace(
            SwAVConfig.default_views(),
            crop_scale=(0.14, 1.0),
            more_views=(ViewGroup(count=6, image_size=96, crop_scale=(0.05, 0.14)),),
        ),
    ),
    cifar(SwAVConfig(**CIFAR, prototypes=300), replace(_SGD, base_lr=0.1)),  # ours
    demo(
        SwAVConfig(**TINY, projector_layers=2, prototypes=64, epsilon=0.02, freeze_prototypes=0),
        OptimConfig(base_lr=6.0, weight_decay=1e-4),
    ),
    # README, "Vanilla DINO training": ViT-S/16, 8 GPUs x 64 images, 100 epochs; here without its small crops
    recipe("imagenet-100ep", 100, 512, DINOConfig("vit_small_patch16_224"), _DINO),
    # The same with them, 2 x 224 + 8 x 96 px: 74.0 % linear
    recipe(
        "imagenet-multicrop-100ep",
        100,
        512,
        DINOConfig("vit_small_patch16_224"),
        _DINO,
        replace(
            DINOConfig.default_views(),
            crop_scale=(0.4, 1.0),
            more_views=(
                *DINOConfig.default_views().more_views,
                ViewGroup(count=8, image_size=96, crop_scale=(0.05, 0.4), blur_prob=0.5),
            ),
        ),
    ),
    # ours
    cifar(DINOConfig(**CIFAR, prototypes=4096), OptimConfig(base_lr=5e-4, weight_decay=0.04, optimizer="adamw")),
    demo(
        DINOConfig(
            "resnet_tiny",
            prototypes=1024,
            head_hidden=512,
            head_layers=2,
            head_batch_norm=True,
            dim=128,
            teacher_momentum=0.95,
            freeze_prototypes=0,
            clip_gradient=0.0,
        ),
        OptimConfig(base_lr=5e-3, weight_decay=0.04, optimizer="adamw"),
    ),
]
METHOD_RECIPES: dict[str, dict[RecipeName, PretrainConfig]] = {}
for _entry in _ALL:
    assert _entry.recipe is not None
    METHOD_RECIPES.setdefault(_entry.method, {})[_entry.recipe] = _entry
