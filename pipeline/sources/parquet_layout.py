"""Which parquet files of a folder belong together: splits and configurations as Hugging Face lays them out.

    data/train-00000-of-00002.parquet    my-data-train.parquet    default/train/0000.parquet    train/part-7.parquet

A dataset is one split of one configuration; where a folder holds several, the user chooses with --split or --subtree.
The keywords are those of the datasets library (data_files.py, "KEYWORDS_IN_...").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipeline.common.errors import UserError
from pipeline.sources.remote_path import SourcePath, open_file

_KEYWORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARDED = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?:-\w+)?")  # SPLIT-00000-of-00002, older ones with a hash behind
_PIECE = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
_SEPARATORS = re.compile(r"[-._ 0-9]+")
_MAGIC = b"PAR1"


def is_parquet(path: SourcePath) -> bool:
    """Whether a file is parquet, by its ending or its first bytes."""
    if path.suffix.lower() == ".parquet":
        return True
    with open_file(path) as file:
        return file.read(len(_MAGIC)) == _MAGIC


def parquet_files(path: Path, subtree: str) -> list[Path]:
    """The parquet files of SOURCE: itself, or those in the folder and its data/ whose path begins with ``subtree``."""
    if path.is_file():
        return [path] if is_parquet(path) else []
    files = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    return [file for file in files if file.relative_to(path).as_posix().startswith(subtree)]


def choose_files(
    path: SourcePath, files: Sequence[SourcePath], subtree: str, split: str | None
) -> Sequence[SourcePath]:
    """The files of one split and configuration among ``files`` below ``path``.

    ``split``: as --split, SPLIT or SPLIT+SPLIT. Raises UserError where the choice is open, or nothing is chosen.
    """
    if path.is_file():
        return files
    splits = {file: split_of(_below(file, path)) for file in files}
    names = sorted({name or "(none)" for name in splits.values()})
    wanted = {_KEYWORDS.get(word.lower(), word) for word in (split or "").split("+") if word}
    chosen: Sequence[SourcePath] = [file for file in files if splits[file] in wanted]
    if not chosen:
        known = set(names) | set(_KEYWORDS.values())
        if len(names) > 1 or (split is not None and names != ["(none)"] and wanted & known):
            example = "train" if "train" in names else next(name for name in names if name != "(none)")
            problem = "" if split is None else f", and none of --split {split}"
            raise UserError(
                f"{path} holds parquet files of the splits {', '.join(names)}: choose with --split {example}, or with "
                f"--subtree, a prefix of the names{problem}"
            )
        chosen = files
    _check_configurations(path, chosen, subtree)
    return chosen


def absent_pieces(files: Sequence[SourcePath]) -> list[str]:
    """What is not among ``files`` of sets that are numbered NAME-00000-of-00003, as "00001 of NAME-...-of-00003"."""
    sets: dict[tuple[str, str], set[int]] = {}
    for file in files:
        if (piece := _PIECE.match(str(file))) is not None:
            sets.setdefault((piece[1], piece[3]), set()).add(int(piece[2]))
    absent = []
    for (name, total), numbers in sorted(sets.items()):
        missing = [number for number in range(int(total)) if number not in numbers]
        if missing:
            shown = ", ".join(f"{number:05d}" for number in missing[:3]) + (", ..." if len(missing) > 3 else "")
            absent.append(f"{shown} of {PurePosixPath(name).name}-...-of-{total}")
    return absent


def split_of(relative: Path | PurePosixPath) -> str | None:
    """The split that a file's path names; None if it names none, or several."""
    sharded = _SHARDED.fullmatch(relative.stem)
    if sharded is not None:
        return _KEYWORDS.get(sharded[1].lower(), sharded[1])
    for part in (*reversed(relative.parent.parts), relative.stem):
        if kinds := _keywords(part):
            return kinds.pop() if len(kinds) == 1 else None
    if re.fullmatch(r"\d+", relative.stem) and len(relative.parent.parts) > 1:  # CONFIGURATION/SPLIT/0000.parquet
        return relative.parent.name
    return None


def _keywords(part: str) -> set[str]:
    words = _SEPARATORS.split(part.lower())
    return {_KEYWORDS[word] for word in (*words, *(w for word in words for w in word.split("_"))) if word in _KEYWORDS}


def _below(file: SourcePath, folder: SourcePath) -> PurePosixPath:
    return PurePosixPath(file.relative_to(folder))  # type: ignore[arg-type]  # both are of one kind


def _check_configurations(path: SourcePath, files: Sequence[SourcePath], subtree: str) -> None:
    """Raise UserError if the files lie in several folders that are neither splits nor numbered pieces."""
    tops = {_below(file, path).parts[0] for file in files if len(_below(file, path).parts) > 1}
    folders = sorted(top for top in tops if not _keywords(top))
    pieces = all("=" in folder for folder in folders) or len({re.sub(r"\d+$", "", folder) for folder in folders}) == 1
    if len(folders) > 1 and not pieces and not subtree:
        raise UserError(
            f"{path} holds parquet files in the folders {', '.join(folders)}, as configurations of a dataset are laid "
            f"out: choose one with --subtree {folders[0]}/"
        )
