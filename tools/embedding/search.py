"""Nearest neighbours and near-duplicates among embeddings by cosine similarity: exact by torch, or by faiss.

Exact search compares every query with every row, some rows at a time. Above FAISS_FROM rows faiss is used where it is
installed (pip install 'siamstream[faiss]'): an inverted file of sqrt(n) lists, of which a sixteenth is searched.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64

from tools.embedding.store import Embeddings

ROWS_AT_ONCE = 1 << 16
FAISS_FROM = 1_000_000  # rows
TRAIN_PER_LIST = 64  # rows that faiss trains a list's centre from; it wants 39 or more


def nearest(
    embeddings: Embeddings, queries: Float[np.ndarray, "q d"], k: int
) -> tuple[Float[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
    """The ``k`` rows most similar to each query: cosine similarities, largest first, and row numbers.

    Rows of nan are similar to nothing (0). Needs k <= len(embeddings).
    """
    if len(embeddings) >= FAISS_FROM and importlib.util.find_spec("faiss") is not None:
        return _by_faiss(embeddings, _unit(queries), k)
    asked = torch.from_numpy(_unit(queries))
    best = torch.full((len(asked), 0), 0.0)
    rows = torch.full((len(asked), 0), 0)
    for start, part in embeddings.normalised(ROWS_AT_ONCE):
        similarity = asked @ torch.from_numpy(part).T
        numbers = torch.arange(start, start + len(part)).expand(len(asked), -1)
        best, order = torch.cat([best, similarity], dim=1).topk(min(k, best.shape[1] + len(part)), dim=1)
        rows = torch.cat([rows, numbers], dim=1).gather(1, order)
    return best.numpy(), rows.numpy()


def _unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    rows = np.nan_to_num(np.asarray(rows, np.float32))
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _by_faiss(
    embeddings: Embeddings, queries: Float[np.ndarray, "q d"], k: int
) -> tuple[Float[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
    import faiss

    lists = math.isqrt(len(embeddings))
    index: Any = faiss.index_factory(queries.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    chosen = np.linspace(0, len(embeddings) - 1, min(len(embeddings), lists * TRAIN_PER_LIST)).astype(np.int64)
    index.train(_unit(embeddings.vectors[chosen]))
    for _, part in embeddings.normalised(ROWS_AT_ONCE):
        index.add(part)
    index.nprobe = max(1, lists // 16)
    similarity, rows = index.search(queries, k)
    return similarity, rows


def near_duplicates(
    embeddings: Embeddings, threshold: float, others: Embeddings | None = None
) -> list[tuple[int, int, float]]:
    """Pairs (row, row, similarity) of at least ``threshold``, most similar first.

    Within ``embeddings`` each pair once, the smaller row first; with ``others``, (row of ``embeddings``, row of
    ``others``). Every row is compared with every other, so time grows with the square of the number of rows.
    """
    found: list[tuple[int, int, float]] = []
    at_once = 1 << 12
    for start, part in embeddings.normalised(at_once):
        rows = torch.from_numpy(part)
        for other_start, other_part in (others or embeddings).normalised(at_once):
            if others is None and other_start < start:
                continue
            similarity = rows @ torch.from_numpy(other_part).T
            if others is None and other_start == start:
                similarity = similarity.triu(diagonal=1)
            for i, j in (similarity >= threshold).nonzero().tolist():
                found.append((start + i, other_start + j, float(similarity[i, j])))
    return sorted(found, key=lambda pair: -pair[2])
