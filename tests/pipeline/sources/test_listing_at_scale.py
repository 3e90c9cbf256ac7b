"""Listings that grow on the disk are those of short lists, and a shard's images are computed as well as looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.sources.columns as columns
import pipeline.sources.remote_listing as remote_listing
from pipeline.dataset.dataset import ShardSet
from pipeline.sampling.order import sharding_order
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from pipeline.sources.labels import label_by_folder
from pipeline.sources.listing import Listing, ListingBuilder
from pipeline.sources.readers import list_folder
from tests.helpers.servers import BUCKET, s3_here

PART = st.sampled_from(["a", "a-b", "a.b", "b", "B", "ä", "a b", "zz"])
NAMES = st.lists(st.builds(lambda parts: "/".join(parts) + ".jpg", st.lists(PART, min_size=1, max_size=3)), max_size=40)


def as_lists(listing: Listing) -> tuple[Any, ...]:
    names = [listing.name(i) for i in range(len(listing))]
    return names, listing.lengths.tolist(), listing.labels.tolist(), listing.classes, listing.rejected


@pytest.mark.parametrize("in_memory", [0, columns.KEPT_IN_MEMORY])
@given(names=NAMES.filter(bool), cut=st.integers(0, 40))
def test_any_names_are_sorted_and_the_last_of_a_name_counts(in_memory: int, names: list[str], cut: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "KEPT_IN_MEMORY", in_memory)
        one, first, second = ListingBuilder("one"), ListingBuilder("first"), ListingBuilder("second")
        for number, name in enumerate(names):
            one.add(name, number, number)
        first.add_files(names[:cut], range(len(names[:cut])), [1] * len(names[:cut]))
        second.add_files(names[cut:], range(cut, len(names)), [1] * len(names[cut:]))
        first.extend(second)
        assert len(first) == len(names)
        listing, joined = one.build(), first.build()
        assert as_lists(listing) == as_lists(joined)
        last = {name: number for number, name in enumerate(names)}
        expected = sorted(last, key=str.encode)
        assert as_lists(listing)[:2] == (expected, [last[name] for name in expected])
        labelled = label_by_folder(listing, "here", "folders") if any("/" in name for name in names) else None
    if labelled is not None:
        inside = [name for name in expected if "/" in name]
        tops = sorted({name.partition("/")[0] for name in inside})
        assert as_lists(labelled)[0] == inside
        assert labelled.classes == tuple(tops)
        assert labelled.labels.tolist() == [tops.index(name.partition("/")[0]) for name in inside]
        assert len(labelled.rejected) == len(listing.rejected) + len(expected) - len(inside)


def test_a_folder_is_walked_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("a.b/1.jpg", "a/2.jpg", "a/b/3.jpg", "a-b/4.jpg", "a.jpg", "b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    builder = list_folder(tmp_path, quiet=True)
    assert builder._in_order
    assert as_lists(builder.build())[0] == sorted(
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jpg")
    )


def test_the_prefixes_of_a_bucket_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{top}/{n}.jpg" for top in ("a", "a-b", "b/c", "b/d/e", ".hidden", "@eaDir") for n in range(3)]
    names += ["a.jpg", "x.jpg", "y.txt", "b.jpg", ".z.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    here = list_folder(tmp_path, quiet=True).build()
    with s3_here(tmp_path, "many") as client:
        folder = remote_listing.RemotePath("", remote_listing.RemotePath.of(_url("many")).url)
        remote = remote_listing.remote_folder(folder.root)
        assert {part for part in remote_listing.s3_parts(remote, "") if isinstance(part, str)} == {"b/d/e/"}
        monkeypatch.setattr(remote_listing, "_FEW_OBJECTS", 2)
        assert remote_listing.s3_parts(remote, "") == [""]  # many objects: listed as it is
        monkeypatch.setattr(remote_listing, "_FEW_OBJECTS", 4)
        monkeypatch.setattr(remote_listing, "_DEEPEST", 1)
        whole = remote_listing.s3_parts(remote, "")
        assert whole == [""] or {part for part in whole if isinstance(part, str)} >= {"a/", "a-b/", "b/"}
        builder = remote_listing.list_remote_folder(folder, quiet=True)
        assert builder._in_order
        there = builder.build()
        assert client.list_objects_v2(Bucket=BUCKET, Prefix="many/")["KeyCount"] == len(names)
    assert as_lists(there) == as_lists(here)
    assert there.versions is not None
    assert (there.versions != 0).all()


def _url(folder: str) -> Any:
    from pipeline.common.locations import Url

    return Url(f"s3://{BUCKET}/{folder}")


def test_a_computed_order_is_a_permutation_and_makes_a_dataset(photo_folder: Path, tmp_path: Path) -> None:
    order = sharding_order(1000, 7, np.arange(1000))
    assert sorted(order.tolist()) == list(range(1000))
    assert np.array_equal(order[300:310], sharding_order(1000, 7, np.arange(300, 310)))
    assert not np.array_equal(order, sharding_order(1000, 8, np.arange(1000)))
    for out, options in (("all", {}), ("some", {"limit": 20})):
        chosen = ShardingOptions(samples_per_shard=10, shuffle="permutation", **options)  # type: ignore[arg-type]
        make_dataset(str(photo_folder), tmp_path / out, chosen, quiet=True, in_process=True)
    whole, some = ShardSet.open(tmp_path / "all"), ShardSet.open(tmp_path / "some")
    assert whole.info["recipe"]["shuffle"] == "permutation"
    keys = [whole.key(i) for i in range(48)]
    assert len(set(keys)) == 48
    assert keys != sorted(keys)
    assert [some.key(i) for i in range(20)] == keys[:20]
