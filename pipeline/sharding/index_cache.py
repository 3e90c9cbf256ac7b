"""``--data wds:s3://BUCKET/{000..146}.tar``: the index of tars of others, made once in the folder of --cache-dir.

    make_indexes(config.loader.cache, config.data)          # slow the first time: each tar is fetched and checked
    dataset = open_data(with_indexes(config.data, config.loader.cache), config.loader)

The index is a folder index-PATTERN-VERSION there, VERSION being a hash of the tars' names, sizes and entity tags, or
times of change on a disk: tars that have changed get another one. One process of a machine makes it, under a lock; the
others wait and use it.
"""

from __future__ import annotations

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from pipeline.common.errors import UserError
from pipeline.common.locations import WDS, TarPattern, Url
from pipeline.common.mixed_data import WeightedPlace, data_parts
from pipeline.dataset.format import DATASET_FILE
from pipeline.dataset.remote_cache import CacheConfig, CacheFolder
from pipeline.dataset.remote_files import RemoteFolder

Data = Path | Url | tuple[WeightedPlace, ...]
_STATUS_THREADS = 32  # that ask for the sizes of tars


def make_indexes(config: CacheConfig, *data: Data | None) -> None:
    """Make the missing indexes of tars in ``data``, before there are ranks, whose waits are limited.

    ``with_index`` and ``with_indexes`` raise what went wrong.
    """
    _index.cache_clear()
    for part in (part for one in data if one is not None for part in data_parts(one)):
        if isinstance(part.place, TarPattern):
            _index(part.place, config)


def with_indexes(data: Data, config: CacheConfig) -> Data:
    """``data`` with the folder of the index in place of tars of others, as ``with_index``."""
    if isinstance(data, tuple):
        return tuple(part._replace(place=with_index(part.place, config)) for part in data)
    return with_index(data, config)


def with_index(place: Path | Url, config: CacheConfig) -> Path | Url:
    """``place``, or of tars of others the folder of their index, made now if need be.

    Raises UserError if the tars cannot be read, hold no usable image, or their URL has secrets.
    """
    if not isinstance(place, TarPattern):
        return place
    found = _index(place, config)
    if isinstance(found, UserError):
        raise found
    return found


@cache
def _index(tars: TarPattern, config: CacheConfig) -> Path | UserError:
    """The folder of the index, or why there is none: found once in a process, and raised later, on all ranks."""
    try:
        return _make(tars, config)
    except UserError as error:
        return error


def _make(tars: TarPattern, config: CacheConfig) -> Path:
    # Most runs read no such tars, and importing these takes a while
    from pipeline.sharding.make_dataset import make_dataset
    from pipeline.sharding.options import ShardingOptions

    folder = CacheFolder(config)
    versions, what = _on_disk(tars) if tars.is_local else _behind_url(tars, config)
    name = f"index-{_hash(tars.secret)}-{_hash(repr(versions))}"
    out = folder.path / name
    with folder.locked(f"{name}.lock"):
        if not (out / DATASET_FILE).exists():
            print(f"note: {what}, into {out}", file=sys.stderr)
            make_dataset(f"{WDS}{tars.secret}", out, ShardingOptions(index_only=True))
    return out


def _on_disk(tars: TarPattern) -> tuple[object, str]:
    """(what changes with the tars, what is done with them)."""
    from pipeline.sharding.index_tars import open_tars

    paths = open_tars(tars.secret)
    found = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return found, f"{len(paths):,} tars, {tars}, are indexed once"


def _behind_url(tars: TarPattern, config: CacheConfig) -> tuple[object, str]:
    from pipeline.sharding.index_tars import expand_braces
    from pipeline.sharding.remote_tars import refuse_globs, split_urls

    if str(Url(tars.secret)) != tars.secret:
        raise UserError(
            f"{tars}: an index records no password or signature, so it is of no use without: make it with siamstream "
            f"shard '{tars}' OUT, copy the files of OUT beside the tars and train with --data of that URL"
        )
    refuse_globs(tars.secret)
    folder, names = split_urls(expand_braces(tars.secret))
    remote = RemoteFolder(folder, config.retry_minutes)
    with ThreadPoolExecutor(_STATUS_THREADS) as pool:
        versions = list(pool.map(remote.status, names))
    return (names, versions), f"{len(names):,} tars at {folder} are indexed once; each is fetched and checked"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
