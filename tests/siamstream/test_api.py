"""The public names: cheap to import, documented, and the same code as the commands."""

from __future__ import annotations

import ast
import inspect
import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import siamstream
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import open_images
from pipeline.sampling.sampler import World
from pipeline.sampling.views import ViewRecipe
from train.config.recipes import config_of, parse_config
from train.evaluation.encoder import Preprocess, extract_features, load_encoder


def test_importing_takes_no_library() -> None:
    code = "import siamstream, sys; print(*sorted({'torch', 'numpy', 'PIL', 'tyro'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_type_checkers_and_python_see_the_same_names() -> None:
    tree = ast.parse(inspect.getsource(siamstream))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.name: node.module for node in checked.body for alias in node.names}  # type: ignore[attr-defined]
    assert imported == siamstream._MODULE_OF
    assert sorted(imported) == sorted(siamstream.__all__)
    assert set(siamstream.__all__) <= set(dir(siamstream))


@pytest.mark.parametrize("name", siamstream.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(siamstream, name)
    assert inspect.getdoc(value)
    assert value is getattr(sys.modules[value.__module__], name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'open_data'"):
        _ = siamstream.open_data  # type: ignore[attr-defined]


def test_keywords_are_the_flags() -> None:
    words = ["--data", "d", "--run-dir", "r", "--recipe", "demo", "--epochs", "3", "--no-sync-bn"]
    words += ["--dali.prefetch", "5", "--dali.no-smooth-chroma", "--mean", "0.5", "0.5", "0.5", "--max-steps", "None"]
    flags = {"recipe": "demo", "epochs": 3, "sync_bn": False, "mean": (0.5, 0.5, 0.5), "max_steps": None}
    assert config_of(
        data="d", run_dir="r", **flags, **{"dali.prefetch": 5, "dali.smooth_chroma": False}
    ) == parse_config(words)


@pytest.mark.parametrize(
    ("wrong", "told"), [({"epoch": 3}, "--epochs"), ({"epochs": "many"}, "many"), ({"recipe": "imagenet"}, "recipe")]
)
def test_a_keyword_that_is_no_flag_is_a_users_mistake(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        siamstream.pretrain("data", "run", **wrong)


def test_preprocessing_is_that_of_the_evaluation(photo_dataset: ShardSet, tmp_path: Path) -> None:
    recipe = ViewRecipe(image_size=96, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    preprocess = pickle.loads(pickle.dumps(Preprocess(recipe)))
    world, ids = World.alone(torch.device("cpu")), np.arange(len(photo_dataset))
    reference = LoaderConfig(backend="torchvision")
    with open_images(photo_dataset, recipe, reference, world, ids=ids, batch=len(ids)) as batches:
        (expected, _) = next(batches)
    for sample in ids:
        (tmp_path / "image").write_bytes(photo_dataset.read(int(sample)))
        assert torch.equal(preprocess(str(tmp_path / "image")), expected[sample])
        assert torch.equal(preprocess(Image.open(tmp_path / "image")), expected[sample])


def test_what_is_no_image_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    for path in (tmp_path / "text.jpg", tmp_path / "missing.jpg"):
        with pytest.raises(UserError, match=f"{path} cannot be read as an image"):
            Preprocess(ViewRecipe())(path)


def test_features_of_a_dataset_are_those_of_its_images(photo_dataset: ShardSet) -> None:
    module, preprocess = load_encoder("untrained:resnet_tiny", image_size=32)
    assert not module.training
    ids = np.array([5, 0, 17])
    loader = LoaderConfig(backend="torchvision")
    features = extract_features(module, preprocess, photo_dataset, ids, device="cpu", loader=loader)
    with torch.no_grad():
        expected = torch.cat(
            [module(preprocess(Image.open(io.BytesIO(photo_dataset.read(int(i)))))[None]) for i in ids]
        )
    torch.testing.assert_close(features, expected)
    everything = extract_features(module, preprocess, str(photo_dataset.path), device="cpu", loader=loader)
    assert everything.shape == (len(photo_dataset), 192)
    torch.testing.assert_close(everything[ids], features)
