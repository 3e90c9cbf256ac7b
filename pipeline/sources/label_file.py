"""Read a file of labels (--labels FILE): CSV of any delimiter, `name class` lines, or one class per line.

    filename,label             x/a.jpg 3            dog
    a.jpg,"crane, bird"        x/b.jpg 7            cat

The delimiter, the header and the columns are found by comparing cells with the names of the images. Whatever is
ambiguous is refused with the number of its line. Images that no line names stay without a label.
"""

from __future__ import annotations

import codecs
import csv
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.errors import UserError
from pipeline.common.files import read_regular
from pipeline.sources.class_names import is_number
from pipeline.sources.image_file import IMAGE_SUFFIXES
from pipeline.sources.listing import suffix

_DELIMITERS = ("\t", ",", ";", "|")
_NO_DELIMITER = "\x1f"  # does not occur: the whole line is one cell
_SNIFFED = 1000  # lines that decide about delimiter and columns
# words of a header, without case, blanks, hyphens and underscores
_NAME_WORD = re.compile(r"(image|img|file|imagefile|imgfile)(name|id|path)?|name|id|path|fname|key|photo|picture")
_LABEL_WORD = re.compile(
    r"(label|class|category)(es|s|name|id|label)?|categories|target|species|breed|(ground)?truth|predictionstring"
)
_CAPTION_WORD = re.compile(r"captions?|alttext|text|description|prompt|title|sentence|comment")
_PREDICTION = "predictionstring"  # ImageNet's LOC_val_solution.csv: `n01440764 85 1 499 272`, the class and its box
_CAPTION_LENGTH = 4  # words; classes that are mostly longer and mostly different are captions
_FRACTION = re.compile(r"[-+]?\d*[.,]\d*[1-9]\d*(e[-+]?\d+)?", re.IGNORECASE)  # and not 1.0, which is a whole number
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark begins alike
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True)
class FileLabels:
    """What a file says about the images, in the order of their sorted names."""

    words: list[str | None]  # the class of each image; None: no line names it
    lines: dict[str, int]  # the first line of each class
    notes: list[str]


@dataclass(frozen=True)
class _Line:
    number: int  # from 1 on
    text: str


@dataclass(frozen=True)
class _Row:
    line: int
    name: str
    word: str


class ImageNames:
    """The names of a source's images, to be found by path, by base name, or by base name without ending."""

    def __init__(self, names: Sequence[str]) -> None:
        """``names``: paths with slashes, unique."""
        self.names = names
        self._parts = [_parts(name) for name in names]
        self._by_base: dict[str, list[int]] = {}
        self._by_stem: dict[str, list[int]] = {}
        for index, parts in enumerate(self._parts):
            self._by_base.setdefault(parts[-1], []).append(index)
            self._by_stem.setdefault(_stem(parts[-1]), []).append(index)

    def find(self, text: str) -> list[int]:
        """The images that ``text`` may name: those that end with this path, or whose path it ends with."""
        parts = _parts(text)
        if not parts:
            return []
        found = [i for i in self._by_base.get(parts[-1], ()) if _same_end(self._parts[i][:-1], parts[:-1])]
        if not found:
            found = [i for i in self._by_stem.get(parts[-1], ()) if _same_end(self._parts[i][:-1], parts[:-1])]
        exact = [i for i in found if len(self._parts[i]) == len(parts)]
        return exact if len(exact) == 1 else found


def _parts(name: str) -> list[str]:
    """Components of a path in composed Unicode, whichever slashes it has, without "." and empty ones."""
    plain = name if name.isascii() else unicodedata.normalize("NFC", name)
    return [part for part in plain.replace("\\", "/").split("/") if part not in ("", ".")]


def _stem(base: str) -> str:
    return base.rpartition(".")[0] if suffix(base) in IMAGE_SUFFIXES else base


def _same_end(one: list[str], other: list[str]) -> bool:
    count = min(len(one), len(other))
    return count == 0 or one[-count:] == other[-count:]


def read_label_file(file: Path, images: ImageNames, column: str | None) -> FileLabels:
    """The classes that ``file`` gives to ``images``; ``column``: as --label-column.

    Raises UserError, with the line, for whatever does not say clearly which image is of which class.
    """
    lines = _read_lines(file)
    table = _Table(file, lines, images, column)
    if table.width == 1:
        return _in_order(table, images)
    words: list[str | None] = [None] * len(images.names)
    given_by: dict[int, _Row] = {}
    unknown: list[_Row] = []
    for row in table.rows():
        found = images.find(row.name)
        if not found:
            unknown.append(row)
            continue
        if len(found) > 1:
            some = " and ".join(repr(images.names[index]) for index in found[:2])
            raise _problem(file, row.line, f"{row.name!r} may be {some}: write the whole path")
        earlier = given_by.setdefault(found[0], row)
        if earlier.word != row.word:
            raise _problem(
                file,
                row.line,
                f"{images.names[found[0]]!r} is {row.word!r}, and {earlier.word!r} in line {earlier.line}: give one "
                "class for each image",
            )
        words[found[0]] = row.word
    if not given_by:
        example = unknown[0] if unknown else _Row(1, "", "")
        raise UserError(
            f"{file} names no image of SOURCE (line {example.line}: {example.name!r}; the first image: "
            f"{images.names[0]!r}): write lines of `name,class`, with the images' paths or base names"
        )
    lines_of: dict[str, int] = {}
    for row in given_by.values():
        lines_of.setdefault(row.word, row.line)
    table.check_classes([row.word for row in given_by.values()])
    notes = []
    if unknown:
        notes.append(
            f"{len(unknown):,} lines of {file.name} name no image of SOURCE (the first is line {unknown[0].line}: "
            f"{unknown[0].name!r})"
        )
    return FileLabels(words, lines_of, notes)


def _in_order(table: _Table, images: ImageNames) -> FileLabels:
    rows = list(table.rows())
    if len(rows) != len(images.names):
        raise UserError(
            f"{table.file} has {len(rows)} labels for {len(images.names)} images: a file without names needs one "
            "line for each image, in the order of their sorted names"
        )
    words = [row.word for row in rows]
    if not table.column_is_given:
        _check_one_column(table.file, rows)
    table.check_classes(words)
    lines: dict[str, int] = {}
    for row in rows:
        lines.setdefault(row.word, row.line)
    return FileLabels(list(words), lines, [])


def _check_one_column(file: Path, rows: list[_Row]) -> None:
    """Refuse lines that hold more than a class: a name, or several cells with a delimiter that was not found."""
    for row in rows[:_SNIFFED]:
        if _IMAGE_NAME.search(row.word):
            raise _problem(
                file,
                row.line,
                f"{row.word!r} holds the name of an image, but not one of SOURCE before a comma, semicolon, tab, | or "
                "blank: write `name,class`",
            )
    several = all(_SEVERAL.search(row.word) for row in rows)
    if several and len(rows) > 1 and len({row.word for row in rows}) == len(rows):
        raise _problem(
            file,
            rows[0].line,
            f"every line is a class of its own, as {rows[0].word!r}: write `name,class`, or say --label-column 1 if "
            "each line is the class of one image",
        )


_IMAGE_NAME = re.compile(rf"\.({'|'.join(sorted(IMAGE_SUFFIXES))})\b", re.IGNORECASE)
_JSON = re.compile(r'\s*(\{\s*"|\[\s*[\[{"])')  # an object, or an array of something
_SEVERAL = re.compile(r"\S[\s:=,;|]+\S")


def _read_lines(file: Path) -> list[_Line]:
    """Lines that are not blank. Bytes that are not UTF-8 are surrogate-escaped, as in file names."""
    try:
        data = read_regular(file)
    except OSError as error:
        raise UserError(f"--labels {file} cannot be read: {error.strerror}") from error
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), None)
    if encoding is None and data[:64].count(0) * 3 >= len(data[:64]) > 1:  # UTF-16 without its mark
        encoding = "utf-16-le" if data[1:64:2].count(0) >= data[0:64:2].count(0) else "utf-16-be"
    try:
        text = data.decode(encoding or "utf-8", "strict" if encoding not in (None, "utf-8") else "surrogateescape")
    except UnicodeDecodeError as error:
        raise UserError(f"--labels {file} is damaged {encoding} text ({error.reason}): save it as UTF-8") from None
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        raise UserError(f"--labels {file} is no text file: give lines of `name,class`, or one class per line")
    lines = [_Line(n, line) for n, line in enumerate(re.split(r"\r\n|\r|\n", text), 1) if line.strip(" \t,;|")]
    if not lines:
        raise UserError(f"--labels {file} is empty: give lines of `name,class`, or one class per line")
    if _JSON.match(text):
        raise UserError(f"--labels {file} is JSON: write it as lines of `name,class`")
    return lines


class _Table:
    """The lines of a label file as rows of cells, of which one is the name and one the class."""

    def __init__(self, file: Path, lines: list[_Line], images: ImageNames, column: str | None) -> None:
        self.file, self._images = file, images
        self.column_is_given = column is not None
        if (told := re.fullmatch(r"sep=(.)", lines[0].text.strip(' "'))) is not None:  # as Excel writes it
            lines = lines[1:]
        self._lines = lines
        self._header: list[str] = []
        self._delimiter = told[1] if told is not None else self._find_delimiter()  # " ": any blanks
        self._find_header(column)
        self.width = self._width()
        self._name, self._label = (-1, 0) if self.width == 1 else self._choose_columns(column)
        if self.width == 1 and column is not None and column not in ("1", *self._header):
            raise UserError(f"--label-column {column}: {file} has one column, and its number is 1")

    def rows(self) -> Iterator[_Row]:
        """Name and class of each line behind the header. Raises UserError for one that has no class."""
        prediction = _PREDICTION in map(_plain, self._header)
        for line, cells in self._cells(self._body()):
            if len(cells) != self.width:
                raise _problem(
                    self.file,
                    line,
                    f"it has {len(cells)} columns, and others have {self.width}: quote cells that hold the delimiter "
                    f'{self._delimiter!r}, as in "a, b"',
                )
            name, word = cells[self._name] if self.width > 1 else "", cells[self._label]
            word = word.split()[0] if prediction and word else word
            if not word:
                raise _problem(self.file, line, f"the class of {name!r} is empty: leave images without a class out")
            if not word.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in word):
                raise _problem(self.file, line, f"the class {word!a} is not UTF-8: save the file as UTF-8")
            yield _Row(line, name, word)

    def check_classes(self, words: list[str]) -> None:
        """Raise UserError if the classes are sentences or fractional numbers, nearly each of them another."""
        if self.column_is_given or len(words) < 2 or len(set(words)) <= len(words) / 2:
            return
        sentences = [word for word in words if len(word.split()) >= _CAPTION_LENGTH]
        measured = [word for word in words if _FRACTION.fullmatch(word)]
        for found, what, name in ((sentences, "sentences", "captions"), (measured, "fractions", "measurements")):
            if len(found) > len(words) / 2:
                raise UserError(
                    f"{self.file} has {len(set(words)):,} classes for {len(words):,} images, most of them {what} such "
                    f"as {found[0][:80]!r}: these look like {name}; name the column of the classes with --label-column"
                )

    def _body(self) -> list[_Line]:
        return self._lines[1:] if self._header else self._lines

    def _cells(self, lines: list[_Line]) -> Iterator[tuple[int, list[str]]]:
        if self._delimiter == " ":
            for line in lines:
                yield line.number, self._split_blanks(line.text)
            return
        yield from _csv_cells(self.file, lines, self._delimiter)

    def _split_blanks(self, text: str) -> list[str]:
        """[name, class]: at the blank behind the longest beginning that names an image; else at the first blank."""
        if '"' in text and (quoted := _quoted(text)) is not None:
            return quoted
        if len(self._header) > 2 and len(cells := text.split()) == len(self._header):
            return cells
        blanks = [match.span() for match in re.finditer(r"\s+", text.strip())]
        text = text.strip()
        for start, end in reversed(blanks):
            if self._images.find(text[:start]):
                return [text[:start], text[end:]]
        return [text[: blanks[0][0]], text[blanks[0][1] :]] if blanks else [text]

    def _find_delimiter(self) -> str:
        """The delimiter that cuts the most lines into an image's name and something else."""
        sample = self._lines[:_SNIFFED]
        scores = {}
        for delimiter in _DELIMITERS:
            rows = [_plain_cells(line.text, delimiter) for line in sample]
            scores[delimiter] = sum(len(row) > 1 and any(map(self._images.find, row)) for row in rows)
        self._delimiter = " "
        rows = [self._split_blanks(line.text) for line in sample]
        scores[" "] = sum(len(row) > 1 and bool(self._images.find(row[0])) for row in rows)
        best = max(scores, key=lambda delimiter: scores[delimiter])  # the first of equals
        if scores[best]:
            return best
        for delimiter in _DELIMITERS:  # a table all the same, whose names are other images'
            widths = {len(_plain_cells(line.text, delimiter)) for line in sample}
            if len(widths) == 1 and widths != {1}:
                return delimiter
        return _NO_DELIMITER

    def _find_header(self, column: str | None) -> None:
        """The cells of the first line, if it is a header; it may have another delimiter than the lines below."""
        first = self._lines[0].text
        if self._names_an_image(_plain_cells(first, self._delimiter)):  # "IMG 1.jpg,cat" has a word of a header too
            return
        for delimiter in dict.fromkeys((self._delimiter, *_DELIMITERS, " ")):
            cells = first.split() if delimiter == " " else _plain_cells(first, delimiter)
            words = [_plain(cell) for cell in cells]
            known = any(kind.fullmatch(word) for kind in (_NAME_WORD, _LABEL_WORD, _CAPTION_WORD) for word in words)
            named = column is not None and column in cells
            alone = (
                len(cells) == 1
                and bool(_LABEL_WORD.fullmatch(words[0]))
                and len(self._lines) == len(self._images.names) + 1
            )
            is_header = named or (alone if len(cells) == 1 else known)
            if is_header and not self._names_an_image(cells):
                self._header = cells
                return

    def _names_an_image(self, cells: list[str]) -> bool:
        return any(self._images.find(cell) for cell in cells if not _NAME_WORD.fullmatch(_plain(cell)))

    def _width(self) -> int:
        widths = [len(cells) for _, cells in self._cells(self._body()[:_SNIFFED])]
        return max(set(widths), key=lambda width: (widths.count(width), -width)) if widths else len(self._header)

    def _choose_columns(self, column: str | None) -> tuple[int, int]:
        """(column of the names, column of the classes)."""
        header = self._header if len(self._header) == self.width else []
        words = [_plain(cell) for cell in header]
        lines = [(line, cells) for line, cells in self._cells(self._body()[:_SNIFFED]) if len(cells) == self.width]
        sample = [cells for _, cells in lines]
        named = [i for i, word in enumerate(words) if _NAME_WORD.fullmatch(word)] or list(range(self.width))
        name = max(named, key=lambda i: sum(bool(self._images.find(cells[i])) for cells in sample))
        if column is not None:
            return name, self._given_column(column, header, name)
        labels = [i for i, word in enumerate(words) if _LABEL_WORD.fullmatch(word) and i != name]
        others = [i for i in range(self.width) if i != name]
        if len(labels) > 1:
            raise UserError(
                f"{self.file}: the columns {', '.join(header[i] for i in labels)} may all be the class: choose one "
                "with --label-column"
            )
        if labels:
            return name, labels[0]
        captions = [i for i in others if i < len(words) and _CAPTION_WORD.fullmatch(words[i])]
        if len(others) == 1 and not captions:
            self._check_numbers(lines, others[0])
            return name, others[0]
        raise self._no_class_column(header, others, captions, sample)

    def _no_class_column(
        self, header: list[str], others: list[int], captions: list[int], sample: list[list[str]]
    ) -> UserError:
        where = f"{self.file}, line {self._lines[0].number}"
        if captions:
            return UserError(
                f"{where}: the column {header[captions[0]]} looks like captions, not classes; name the column of the "
                "classes with --label-column"
            )
        values = {cells[i] for cells in sample for i in others}
        if all(is_number(value) and float(value) in (0, 1, -1) for value in values):
            shown = ", ".join(header[i] for i in others[:4]) if header else f"{len(others)} of them"
            return UserError(
                f"{where}: the columns ({shown}) hold only 0 and 1, as one-hot labels do: write one column of classes"
            )
        what = f"the columns {', '.join(header)}" if header else f"{self.width} columns and no header"
        return UserError(
            f"{where}: {what}, and none is called label, class, target or category: say which is the class with "
            "--label-column NAME or --label-column NUMBER"
        )

    def _check_numbers(self, lines: list[tuple[int, list[str]]], label: int) -> None:
        """Refuse several numbers behind a name, such as one-hot labels or a box, in lines that are cut at blanks."""
        if self._delimiter != " ":
            return
        behind = [cells[label].split() for _, cells in lines]
        all_several = all(len(values) > 1 and is_number(values[0]) for values in behind)  # `a.jpg 64 48 cat`
        for (line, cells), values in zip(lines, behind, strict=True):
            if len(values) > 1 and (all_several or all(map(is_number, values))):
                raise _problem(
                    self.file,
                    line,
                    f"several values behind the name {cells[0]!r}, {cells[label]!r}: write one class behind each name, "
                    "or a header with the names of all columns",
                )

    def _given_column(self, column: str, header: list[str], name: int) -> int:
        found = [i for i, cell in enumerate(header) if cell == column] or [
            i for i, cell in enumerate(header) if _plain(cell) == _plain(column)
        ]
        if not found and column.isdecimal() and 1 <= int(column) <= self.width:
            found = [int(column) - 1]
        if len(found) != 1:
            there = (
                f"the columns are {', '.join(header)}"
                if header
                else f"there are {self.width} columns, without a header"
            )
            raise UserError(f"--label-column {column}: {self.file} has {len(found) or 'no'} such columns; {there}")
        if found[0] == name:
            raise UserError(f"--label-column {column}: that column of {self.file} has the names of the images")
        return found[0]


def _csv_cells(file: Path, lines: list[_Line], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((line.text for line in lines), delimiter=delimiter, strict=True)
    done = 0
    try:
        for cells in reader:
            if reader.line_num > done + 1:
                raise _problem(file, lines[done].number, "a quoted cell does not end in its line: close the quote")
            yield lines[done].number, [cell.strip() for cell in cells]
            done = reader.line_num
    except csv.Error as error:
        raise _problem(file, lines[min(done, len(lines) - 1)].number, f"{error}: check its quotes") from None


def _plain_cells(text: str, delimiter: str) -> list[str]:
    """The cells of one line; one cell if its quotes do not match."""
    try:
        return [cell.strip() for cell in next(csv.reader([text], delimiter=delimiter, strict=True), [])]
    except csv.Error:
        return [text.strip()]


def _quoted(text: str) -> list[str] | None:
    """[name, class] of a line whose cells stand in quotes and are separated by blanks; None if it is no such line."""
    cells = [cell for cell in _plain_cells(re.sub(r"\s+", " ", text.strip()), " ") if cell]
    return cells if len(cells) == 2 else None


def _plain(cell: str) -> str:
    """A header's word without case, blanks, hyphens and underscores."""
    return re.sub(r"[\s_-]", "", cell).lower()


def _problem(file: Path, line: int, what: str) -> UserError:
    return UserError(f"{file}, line {line}: {what}")
