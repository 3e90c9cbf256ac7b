"""make_shards --channels N: from .npy and TIFF files through pretraining to features, against plain numpy and torch."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from model.backbone import build_backbone
from pipeline.checking.check_dataset import inspect_dataset
from pipeline.checking.check_shard import CheckOptions
from pipeline.checking.repair import repair_dataset
from pipeline.common.arrays import MAGIC, read_array, write_array
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.dataset.mixture import Mixture
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import open_images, open_views
from pipeline.sampling.sampler import BatchSampler, World
from pipeline.sampling.views import ViewGroup, ViewRecipe, draw_views
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from train.evaluation.encoder import load_encoder
from train.pretrain import pretrain

BANDS, SIDE, IMAGES = 5, 24, 24
FLAGS = {
    "backbone": "resnet_tiny",
    "image_size": 16,
    "global_batch": 8,
    "epochs": 1,
    "device": "cpu",
    "knn_k": 3,
}


def bands(number: int) -> np.ndarray:
    """A 16-bit image of BANDS channels; each channel has a range of its own."""
    noise = np.random.default_rng(number).random((SIDE, SIDE + 4, BANDS))
    return (noise * 2000 * (1 + np.arange(BANDS)) + 500 * (number % 2)).astype(np.uint16)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes; .npy, in both memory orders and as big-endian, and TIFF with bands last and first."""
    root = tmp_path_factory.mktemp("bands")
    for number in range(IMAGES):
        folder = root / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        values = bands(number)
        match number % 4:
            case 0:
                np.save(folder / f"{number:02d}.npy", values)
            case 1:
                np.save(folder / f"{number:02d}.npy", np.asfortranarray(values.astype(">u2")))
            case 2:
                tifffile.imwrite(folder / f"{number:02d}.tif", values, photometric="minisblack", planarconfig="contig")
            case 3:
                tifffile.imwrite(folder / f"{number:02d}.tif", values.transpose(2, 0, 1), photometric="minisblack")
    return root


@pytest.fixture(scope="module")
def data(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "data"
    make_dataset(str(source), out, ShardingOptions(channels=BANDS, samples_per_shard=10), quiet=True, in_process=True)
    return out


def number_of(dataset: ShardSet, sample: int) -> int:
    assert dataset.names is not None
    return int(Path(dataset.names[sample]).stem)


def test_every_value_is_kept_and_mean_and_std_are_those_of_numpy(data: Path) -> None:
    dataset = ShardSet.open(data)
    assert (dataset.num_samples, dataset.channels, dataset.has_labels) == (IMAGES, BANDS, True)
    for sample in range(IMAGES):
        stored = np.load(io.BytesIO(dataset.read(sample)))
        np.testing.assert_array_equal(stored, bands(number_of(dataset, sample)))
        assert dataset.sizes([sample]).tolist() == [[SIDE, SIDE + 4]]
    every = np.stack([bands(number) for number in range(IMAGES)]) / 65535
    np.testing.assert_allclose(dataset.info["pixels"]["mean"], every.mean(axis=(0, 1, 2)), atol=1e-8)
    np.testing.assert_allclose(dataset.info["pixels"]["std"], every.std(axis=(0, 1, 2)), atol=1e-8)
    with tarfile.open(data / dataset.shards[0].name) as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".npy", ".cls"}


def test_the_bytes_do_not_depend_on_workers(source: Path, data: Path, tmp_path: Path) -> None:
    options = ShardingOptions(channels=BANDS, samples_per_shard=10, workers=2)
    make_dataset(str(source), tmp_path / "again", options, quiet=True)
    files = sorted(path.name for path in data.iterdir() if path.is_file())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir() if path.is_file())
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (data / name).read_bytes(), name


def test_check_finds_nothing_and_finds_a_changed_byte(source: Path, tmp_path: Path) -> None:
    options = ShardingOptions(channels=BANDS, samples_per_shard=10)
    make_dataset(str(source), tmp_path / "data", options, quiet=True, in_process=True)
    assert inspect_dataset(tmp_path / "data", CheckOptions(decode="full"), quiet=True).damage == ()
    tar = tmp_path / "data" / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(MAGIC) + 200] ^= 1
    tar.write_bytes(content)
    assert any(
        damage.where == tar.name for damage in inspect_dataset(tmp_path / "data", CheckOptions(), quiet=True).damage
    )
    tar.unlink()
    with pytest.raises(UserError, match="run the make_shards command of it again"):
        repair_dataset(tmp_path / "data", 1)
    made = make_dataset(str(source), tmp_path / "data", options, quiet=True, in_process=True)
    assert made.restored == 1
    assert inspect_dataset(tmp_path / "data", CheckOptions(decode="full"), quiet=True).damage == ()


def recipe_of(dataset: ShardSet, **fields: object) -> ViewRecipe:
    pixels = dataset.info["pixels"]
    recipe = ViewRecipe(image_size=16, **fields)  # type: ignore[arg-type]
    return recipe.of_channels(tuple(pixels["mean"]), tuple(pixels["std"]))


def plain(dataset: ShardSet, sample: int) -> torch.Tensor:
    return torch.from_numpy(bands(number_of(dataset, sample)).astype(np.float32) / np.float32(65535)).permute(2, 0, 1)


def normalised(image: torch.Tensor, dataset: ShardSet) -> torch.Tensor:
    mean, std = (torch.tensor(dataset.info["pixels"][name])[:, None, None] for name in ("mean", "std"))
    return (image - mean) / std


def test_views_are_crops_flips_and_blurs_of_the_values(data: Path) -> None:
    dataset = ShardSet.open(data)
    recipe = recipe_of(dataset, more_views=(ViewGroup(image_size=12, solarize_prob=1.0, jitter_prob=1.0),))
    with open_views(
        dataset, recipe, LoaderConfig(), BatchSampler(0, 8, 1), World.alone(torch.device("cpu"))
    ) as batches:
        batch = next(batches)
    assert [tuple(view.shape) for view in batch.views] == [(8, BANDS, 16, 16)] * 2 + [(8, BANDS, 12, 12)]
    params = draw_views(recipe, 0, 0, batch.ids, dataset.sizes(batch.ids))
    blurred = flipped = 0
    for row, sample in enumerate(batch.ids.tolist()):
        for view, made in enumerate(batch.views):
            top, left, height, width = params.crop[row, view].tolist()
            cut = plain(dataset, sample)[:, top : top + height, left : left + width]
            side = made.shape[-1]
            expected = F.resize(cut, [side, side], antialias=True)
            if (sigma := float(params.sigma[row, view])) > 0:
                window = recipe.per_view[view].blur_window
                expected, blurred = F.gaussian_blur(expected, [window, window], [sigma, sigma]), blurred + 1
            if params.flip[row, view]:
                expected, flipped = expected.flip(-1), flipped + 1
            torch.testing.assert_close(made[row], normalised(expected, dataset), rtol=1e-4, atol=1e-4)
    assert min(blurred, flipped) > 0


def test_evaluation_takes_the_centre(data: Path) -> None:
    dataset, ids = ShardSet.open(data), np.arange(IMAGES)
    alone = World.alone(torch.device("cpu"))
    with open_images(dataset, recipe_of(dataset), LoaderConfig(), alone, ids=ids, batch=IMAGES) as batches:
        made, _ = next(batches)
    shown = F.center_crop(F.resize(plain(dataset, 3), [16], antialias=True), [16, 16])
    torch.testing.assert_close(made[3], normalised(shown, dataset), rtol=1e-4, atol=1e-4)


def test_pretraining_resumes_and_leaves_an_encoder_of_these_channels(data: Path, tmp_path: Path) -> None:
    flags = {**FLAGS, "data": data}
    assert pretrain(run_dir=tmp_path / "whole", **flags)
    pretrain(run_dir=tmp_path / "parts", **flags, max_steps=2)
    assert pretrain(run_dir=tmp_path / "parts", **flags, resume=True)
    whole, parts = (load_encoder(tmp_path / name) for name in ("whole", "parts"))
    for (name, one), other in zip(whole.module.state_dict().items(), parts.module.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)
    assert whole.module.conv1.weight.shape[1] == BANDS  # type: ignore[union-attr, operator]
    views = json.loads((tmp_path / "whole" / "config.json").read_text())["views"]
    assert views["mean"] == json.loads((data / "dataset.json").read_text())["pixels"]["mean"]
    assert views["jitter_prob"] == views["gray_prob"] == 0
    assert "knn_top1" in (tmp_path / "whole" / "metrics.jsonl").read_text()
    np.save(tmp_path / "one.npy", bands(7))
    feature = whole.module(whole.preprocess(tmp_path / "one.npy")[None])
    assert feature.shape == (1, 192)
    assert feature.isfinite().all()
    with pytest.raises(UserError, match="3 channels, and the encoder takes 5"):
        whole.preprocess(Image.new("RGB", (20, 20)))
    exported = load_encoder(tmp_path / "whole" / "backbone.safetensors")
    torch.testing.assert_close(exported.module(whole.preprocess(tmp_path / "one.npy")[None]), feature)


@pytest.mark.parametrize("method", ["moco-v2", "byol", "swav"])
def test_every_method_takes_them(data: Path, tmp_path: Path, method: str) -> None:
    more = {"queue": 64, "bn_images": 4} if method == "moco-v2" else {}
    pretrain(data, tmp_path / method, method=method, **{**FLAGS, "knn_every": 0, **more}, max_steps=1)
    assert '"step": 1' in (tmp_path / method / "metrics.jsonl").read_text()


def test_backbones_of_both_libraries_take_them() -> None:
    first, width = build_backbone("resnet_tiny", "default", 2)
    assert first(torch.zeros(2, 2, 16, 16)).shape == (2, width)
    other, width = build_backbone("vit_small_patch16_224", "default", 7)
    assert other(torch.zeros(1, 7, 32, 32)).shape == (1, width)


def test_one_channel_from_gray_images_and_a_window(tmp_path: Path) -> None:
    folder = tmp_path / "gray"
    folder.mkdir()
    deep = np.random.default_rng(0).integers(0, 4096, (20, 30), np.uint16)
    Image.fromarray(deep).save(folder / "a.png")
    Image.fromarray((deep >> 4).astype(np.uint8)).save(folder / "b.png")
    tifffile.imwrite(folder / "c.tif", deep)
    Image.new("RGB", (20, 20)).save(folder / "colour.png")
    np.save(folder / "float.npy", np.zeros((20, 20)))
    np.save(folder / "bands.npy", bands(0))
    (folder / "cut.npy").write_bytes(write_array(deep[..., None])[:-1])
    made = make_dataset(str(folder), tmp_path / "out", ShardingOptions(channels=1), quiet=True, in_process=True)
    assert (made.images, sum(made.rejected.values())) == (3, 4)
    reasons = " ".join(made.rejected)
    for reason in (
        "RGB pixels, not those of one channel",
        "float64",
        "5 channels instead of --channels 1",
        "truncated",
    ):
        assert reason in reasons
    dataset = ShardSet.open(tmp_path / "out")
    assert dataset.names is not None
    kept = {dataset.names[n]: read_array(dataset.read(n))[..., 0] for n in range(3)}
    np.testing.assert_array_equal(kept["a.png"], deep)
    np.testing.assert_array_equal(kept["c.tif"], deep)
    np.testing.assert_array_equal(kept["b.png"], deep >> 4)
    options = ShardingOptions(channels=1, sixteen_bit="window", sixteen_bit_window=(1000, 3000))
    make_dataset(str(folder), tmp_path / "window", options, quiet=True, in_process=True)
    dataset = ShardSet.open(tmp_path / "window")
    assert dataset.names is not None
    kept = {dataset.names[n]: read_array(dataset.read(n))[..., 0] for n in range(3)}
    expected = np.rint(np.clip((deep.astype(np.float64) - 1000) / 2000, 0, 1) * 255)
    np.testing.assert_array_equal(kept["a.png"], expected)
    assert dataset.info["reencoded"] == {"8 bits of more, window 1000 3000": 2}


def test_without_the_flag_npy_files_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "in" / "a.png")
    np.save(tmp_path / "in" / "b.npy", bands(0))
    made = make_dataset(str(tmp_path / "in"), tmp_path / "out", quiet=True, in_process=True)
    assert made.rejected == {"not an image file": 1}
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert "pixels" not in info
    assert "channels" not in info["recipe"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"channels": 3}, "--channels 3.*without the flag"),
        ({"channels": 0}, "--channels 0"),
        ({"channels": 4, "shorter_side": 32}, "--shorter-side does not go with --channels 4"),
        ({"channels": 4, "hold_out": 0.1}, "--hold-out does not go with --channels 4"),
        ({"channels": 4, "reencode": True}, "--reencode does not go with --channels 4"),
    ],
)
def test_options_that_do_not_go_with_it(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ShardingOptions(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["synthetic:4", "wds:/nowhere/{0..1}.tar", "images.tar"])
def test_sources_that_do_not_go_with_it(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError, match=r"--channels.* takes a folder of images"):
        make_dataset(source, tmp_path / "out", ShardingOptions(channels=4), quiet=True, in_process=True)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_tiff_without_tifffile(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match=r"siamstream\[tiff\]"):
        make_dataset(str(source), tmp_path / "out", ShardingOptions(channels=BANDS), quiet=True, in_process=True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"backend": "dali"}, "--backend dali takes images of 3 channels"),
        ({"mean": (0.5, 0.5), "std": (0.2, 0.2), "jitter_prob": 0.0, "gray_prob": 0.0}, "have 5 channels"),
        ({"mean": (0.5,), "std": (0.2,)}, "--jitter-prob is of images of 3 channels"),
        ({"mean": (0.5, 0.5)}, "--std .*as many numbers as --mean"),
    ],
)
def test_pretraining_refuses(data: Path, tmp_path: Path, flags: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        pretrain(data, tmp_path / "run", **{**FLAGS, **flags})
    assert not (tmp_path / "run").exists()


def test_an_encoder_of_other_channels_is_refused(data: Path, tmp_path: Path) -> None:
    dataset = ShardSet.open(data)
    with (
        pytest.raises(UserError, match="images of 5 channels, and they are read for an encoder of 3"),
        open_images(
            dataset, ViewRecipe(), LoaderConfig(), World.alone(torch.device("cpu")), ids=np.arange(4), batch=4
        ) as batches,
    ):
        next(batches)
    with pytest.raises(UserError, match="a mixture of several --data takes images of 3 channels"):
        Mixture([dataset, dataset], [1.0, 1.0])


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    pretrain(data, folder, **{**FLAGS, "knn_every": 0})
    return folder


def ours(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "siamstream", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_knn_embed_and_finetune_work_on_them(data: Path, run: Path, tmp_path: Path) -> None:
    knn = ours("knn", "--data", data, "--val-data", data, "--checkpoint", run, "--k", 3, "--device", "cpu")
    assert knn.returncode == 0, knn.stdout + knn.stderr
    embedded = ours("embed", run, data, tmp_path / "features", "--device", "cpu")
    assert embedded.returncode == 0, embedded.stdout + embedded.stderr
    flags = [
        "--checkpoint",
        run,
        "--run-dir",
        tmp_path / "tuned",
        "--global-batch",
        8,
        "--epochs",
        1,
        "--device",
        "cpu",
    ]
    tuned = ours("finetune", "--data", data, "--val-data", data, *flags)
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    np.save(tmp_path / "one.npy", bands(7))
    Image.new("RGB", (20, 20)).save(tmp_path / "rgb.png")
    predicted = ours("predict", tmp_path / "tuned", tmp_path / "one.npy", tmp_path / "rgb.png")
    assert "3 channels, and the classifier takes 5" in predicted.stderr
    assert "one.npy" in predicted.stdout
    assert predicted.returncode == 1


def test_linear_and_onnx_work_on_them(data: Path, run: Path, tmp_path: Path) -> None:
    sets = ["--data", data, "--val-data", data]
    linear = ours(
        "linear", *sets, "--checkpoint", run, "--epochs", 1, "--run-dir", tmp_path / "linear", "--device", "cpu"
    )
    assert linear.returncode == 0, linear.stdout + linear.stderr
    onnxruntime = pytest.importorskip("onnxruntime")
    exported = ours("export", run, tmp_path / "encoder.onnx", "--format", "onnx")
    assert exported.returncode == 0, exported.stdout + exported.stderr
    encoder = load_encoder(run)
    np.save(tmp_path / "one.npy", bands(7))
    image = encoder.preprocess(tmp_path / "one.npy")[None]
    session = onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
    np.testing.assert_allclose(found, encoder.module(image).detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        ["preview", "DATA", "OUT.png"],
        ["neighbours", "RUN", "DATA", "OUT.png", "--query", "0"],
        ["export", "RUN", "OUT.pth", "--format", "timm"],
        ["knn", "--data", "DATA", "--val-data", "DATA", "--checkpoint", "untrained:resnet_tiny"],
    ],
)
def test_other_commands_refuse_them(data: Path, run: Path, tmp_path: Path, words: list[str]) -> None:
    places = {
        "DATA": str(data),
        "RUN": str(run),
        "OUT.png": str(tmp_path / "o.png"),
        "OUT.pth": str(tmp_path / "o.pth"),
    }
    done = ours(*[places.get(word, word) for word in words])
    assert done.returncode == 2, done.stdout + done.stderr
    assert "3 channels" in done.stderr
    assert "Traceback" not in done.stderr
