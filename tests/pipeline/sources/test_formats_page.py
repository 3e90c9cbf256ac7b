"""docs/formats.md says what becomes of each layout, as trying it shows."""

from __future__ import annotations

import re

import pytest

from tests.helpers.formats_page import PAGE, TABLES, section, table


@pytest.mark.parametrize("name", TABLES)
def test_the_page_says_what_happens(name: str) -> None:
    if name == "parquet":
        pytest.importorskip("pyarrow")
    page = PAGE.read_text()
    start, end = section(page, name)
    rows = table(name).splitlines()
    assert page[start:end].splitlines() == rows
    images = sum(bool(re.search(r"\| \d+ images, classes", row)) for row in rows)
    assert len(rows) / 3 < images < len(rows) - 2  # some layouts are read, and some refused
