"""Owns the package's metadata and its dependencies. Settings of the development tools are in pyproject.toml."""

from setuptools import find_packages, setup

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
]
PARQUET = ["pyarrow>=15"]
FAISS, UMAP = ["faiss-cpu>=1.8"], ["umap-learn>=0.5"]
S3, GCS, HF = ["s3fs>=2024.6"], ["gcsfs>=2024.6"], ["huggingface_hub"]
TEST = [
    *PARQUET,
    *S3,
    "moto[server]",  # an S3 server of one's own
    "pytest>=8",
    "hypothesis>=6.100",
    "beartype>=0.18",
    "ruff>=0.12",
    "mypy>=1.13",
    "import-linter>=2.1",
]

setup(
    name="siamstream",
    version="0.1.0",
    description="SimSiam pretraining whose loop is bound by the GPU, not by the data",
    python_requires=">=3.10",
    packages=find_packages(include=["pipeline*", "model*", "train*", "tools*"]),
    install_requires=RUNTIME,
    extras_require={"parquet": PARQUET, "faiss": FAISS, "umap": UMAP, "s3": S3, "gcs": GCS, "hf": HF, "test": TEST},
)
