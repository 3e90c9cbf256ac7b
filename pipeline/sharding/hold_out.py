"""--hold-out: which images of a source become the validation set.

    chosen = held_out(thumbnails(...), labels, 0.1, seed)       # bool[n]

Near-duplicates stay together: a validation image whose twin is in the training set measures nothing. Two images are
near-duplicates if the difference hashes (dHash) of their thumbnails differ in at most 5 of 64 bits and the thumbnails,
their mean removed, by at most 8 of 255 (root mean square): the same file twice, saved again, resized, made brighter.
Mirrored, turned and cropped copies are not found; `siamstream neighbours --duplicates --against` finds more with a
trained encoder. The choice is stratified by class, and a pure function of the images, their order, labels and the seed.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt8, UInt64

from pipeline.common.errors import UserError
from pipeline.common.system import cores, progress
from pipeline.sharding.workers import keep_torch_out
from pipeline.sharding.write_shard import WriteJob, read_image
from pipeline.sources.image_file import BadImageError, gray_thumbnail

ROWS, COLUMNS = 8, 9  # of a thumbnail; neighbours in a row give 8 x 8 bits
THUMBNAIL_BYTES = ROWS * COLUMNS
MOST_BITS = 5  # by which the hashes of near-duplicates differ
MOST_RMS = 8.0  # of 255, by which their thumbnails do
BANDS, EQUAL_BANDS = 8, 3  # with 5 bits changed, at least 3 of the 8 rows of the hash stay as they are
COMPARED = 32  # following images of equal bands with which each is compared: a bound for sets of look-alikes
_CHUNK = 256  # images of one task of a worker process


class Thumbnails(NamedTuple):
    """Gray thumbnails of images 0 .. n - 1."""

    pixels: UInt8[np.ndarray, "n 72"]
    readable: Bool[np.ndarray, " n"]  # False: the image will be refused


def thumbnails(job: WriteJob, indices: Int64[np.ndarray, " n"], quiet: bool, in_process: bool) -> Thumbnails:
    """The thumbnails of images ``indices`` of the job's listing, by ``options.workers`` processes. Raises UserError."""
    chunks = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
    parts = []
    with progress(quiet, total=len(indices), unit=" images", desc="comparing images for --hold-out") as bar:
        for part in _made(job, chunks, in_process):
            parts.append(part)
            bar.update(len(part))
    pixels = np.concatenate(parts)
    return Thumbnails(pixels[:, :-1], pixels[:, -1] > 0)


def _made(
    job: WriteJob, chunks: list[Int64[np.ndarray, " _"]], in_process: bool
) -> Iterator[UInt8[np.ndarray, "_ 73"]]:
    if in_process:
        yield from (_of_chunk(job, chunk) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")
    workers = min(job.options.workers or cores(), len(chunks))
    try:
        with ProcessPoolExecutor(workers, context, keep_torch_out) as pool:
            yield from pool.map(_of_chunk, itertools.repeat(job), chunks)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely for lack of memory: run the same command again with fewer "
            "--workers"
        ) from error


def _of_chunk(job: WriteJob, chunk: Int64[np.ndarray, " n"]) -> UInt8[np.ndarray, "n 73"]:
    """Each image's thumbnail, and 1; zeros for one that cannot be decoded."""
    rows = np.zeros((len(chunk), THUMBNAIL_BYTES + 1), np.uint8)
    for row, index in zip(rows, chunk.tolist(), strict=True):
        try:
            data = read_image(job.reader, job.listing, index)
            row[:-1] = gray_thumbnail(data, COLUMNS, ROWS, job.options.max_pixels).ravel()
            row[-1] = 1
        except BadImageError:
            continue  # sharding refuses it with the reason
    return rows


def held_out(thumbs: Thumbnails, labels: Integer[np.ndarray, " n"], share: float, seed: int) -> Bool[np.ndarray, " n"]:
    """Which images are held out: ``share`` of each class, -1 (no label) being one, and groups of near-duplicates whole.

    A class of at least two groups keeps some of them on each side. Groups of several classes count for that of their
    first image. Raises UserError where no image, or all, would be held out.
    """
    groups = near_duplicates(thumbs)
    first, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    shuffled = np.argsort(np.random.PCG64(seed).random_raw(len(first)), kind="stable")
    chosen = np.zeros(len(first), bool)
    label_of = np.asarray(labels)[first]
    for label in np.unique(label_of):
        own = shuffled[label_of[shuffled] == label]
        wanted = max(1, round(share * int(sizes[own].sum())))
        taken = 0
        for number in own[: len(own) - 1]:  # the last one stays for training
            if taken + sizes[number] <= wanted or taken == 0:
                chosen[number] = True
                taken += int(sizes[number])
            if taken >= wanted:
                break
    held = chosen[group]
    if held.all() or not held.any():
        raise UserError(
            f"--hold-out {share:g} leaves one side of {len(labels)} images empty, since near-duplicates stay together: "
            "add images, or shard a validation set of its own"
        )
    return held


def near_duplicates(thumbs: Thumbnails) -> Int64[np.ndarray, " n"]:
    """The group of each image: the smallest number of an image in it. Unreadable images are groups of one."""
    numbers = np.flatnonzero(thumbs.readable)
    groups = np.arange(len(thumbs.readable))
    if len(numbers) == 0:
        return groups
    unique, inverse = np.unique(thumbs.pixels[numbers], axis=0, return_inverse=True)
    joined = _components(len(unique), _similar_pairs(unique))
    own = joined[inverse.reshape(-1)]
    smallest = np.full(len(unique), len(groups))
    np.minimum.at(smallest, own, numbers)
    groups[numbers] = smallest[own]
    return groups


def _similar_pairs(pixels: UInt8[np.ndarray, "n 72"]) -> list[Int64[np.ndarray, "_ 2"]]:
    """Pairs of near-duplicates. Candidates are images in which three of the eight rows of the hash are equal."""
    gray = pixels.reshape(-1, ROWS, COLUMNS)
    rows = np.packbits(gray[:, :, 1:] > gray[:, :, :-1], axis=2)[..., 0]  # uint8 [n, 8]: the hash, a byte a row
    pairs = []
    for bands in itertools.combinations(range(BANDS), EQUAL_BANDS):
        key = _key(rows[:, bands])
        order = np.argsort(key, kind="stable")
        key = key[order]
        for apart in range(1, COMPARED + 1):
            at = np.flatnonzero(key[apart:] == key[:-apart])
            if len(at) == 0:
                break
            found = np.stack((order[at], order[at + apart]), axis=1)
            pairs.append(found[_alike(rows, pixels, found)])
    return pairs


def _key(rows: UInt8[np.ndarray, "n 3"]) -> UInt64[np.ndarray, " n"]:
    parts = rows.astype(np.uint64)
    return parts[:, 0] << np.uint64(16) | parts[:, 1] << np.uint64(8) | parts[:, 2]


def _alike(
    rows: UInt8[np.ndarray, "n 8"], pixels: UInt8[np.ndarray, "n 72"], pairs: Int64[np.ndarray, "m 2"]
) -> Bool[np.ndarray, " m"]:
    """Which of the pairs are near-duplicates, some thousand at a time."""
    alike = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), 1 << 16):
        one, other = pairs[start : start + (1 << 16)].T
        bits = _BITS[rows[one] ^ rows[other]].sum(axis=1)
        rms = (pixels[one].astype(np.float32) - pixels[other]).std(axis=1)  # without the difference of their means
        alike[start : start + len(one)] = (bits <= MOST_BITS) & (rms <= MOST_RMS)
    return alike


_BITS = np.array([bin(byte).count("1") for byte in range(256)], np.int64)


def _components(count: int, pairs: list[Int64[np.ndarray, "_ 2"]]) -> Int64[np.ndarray, " count"]:
    """The smallest member of each one's connected component."""
    smallest = np.arange(count)
    edges = np.concatenate([np.zeros((0, 2), np.int64), *pairs])
    while True:
        before = smallest.copy()
        low = np.minimum(smallest[edges[:, 0]], smallest[edges[:, 1]])
        for end in range(2):
            np.minimum.at(smallest, edges[:, end], low)
        smallest = smallest[smallest]
        if (smallest == before).all():
            return smallest
