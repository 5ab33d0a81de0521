"""Find the input files of a corpus: files, folders and patterns."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from promcse_pl.corpus.folder import is_corpus
from promcse_pl.data.arrow import STATE, is_saved_dataset
from promcse_pl.utils.errors import DataError
from promcse_pl.utils.paths import SUFFIXES, expand, file_suffix, is_folder, is_there

_WILDCARD = re.compile(r"[*?\[]")
_DATASET_INFO = "dataset_info.json"
"""`save_to_disk` writes it beside state.json, a name that other programs use too."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of a corpus, or a folder written by `save_to_disk` of the datasets library.

    Attributes:
        name: Prefix of its shard names: the path below the given folder or pattern, with -- in place of /.
        path: Path of the file or folder.
    """

    name: str
    path: Path


def find_inputs(given: Sequence[str | Path], *, out: Path) -> list[InputFile]:
    """Return the input files, sorted by name.

    Args:
        given: Files, folders (all data files and saved datasets below them) and patterns such as `corpus/*.parquet` or
            `corpus/**/*.jsonl`. Folders and patterns skip names that start with . or _; folders skip encoded corpora.
        out: Output folder; files in it are not inputs.

    Raises:
        DataError: An entry matches nothing, a folder cannot be read, a file has an unknown format, or two files would have
            the same shard names.
    """
    inputs: dict[Path, InputFile] = {}
    for entry in given:
        if str(entry) == "-":
            raise DataError(
                "standard input cannot be read again after an interruption. Try: a file instead of -, or --out FILE.npy"
            )
        matches = list(_matches(entry))
        found = [file for file in matches if not file.path.resolve().is_relative_to(out.resolve())]
        if matches and not found:
            elsewhere = shlex.quote(f"{out}-embeddings")
            raise DataError(
                f"{entry} is inside the output folder {out}, whose files are not read. Try: --out {elsewhere}"
            )
        if not found:
            raise DataError(
                f"{entry} matches no data file. Allowed: {', '.join(SUFFIXES)}, each also with .gz; names that start with . or _ "
                "are skipped in folders and patterns"
            )
        for file in found:
            inputs.setdefault(file.path.resolve(), file)
    by_name: dict[str, Path] = {}
    for file in inputs.values():
        if not is_folder(file.path) and file_suffix(file.path) not in SUFFIXES:
            raise DataError(f"{file.path}: unknown format. Allowed: {', '.join(SUFFIXES)}, each also with .gz")
        if file.name in by_name:
            common = shlex.quote(f"{_common(by_name[file.name], file.path)}/**/{file.path.name}")
            raise DataError(
                f"{by_name[file.name]} and {file.path} would have the same output names. Try: {common} (one pattern in quotes, "
                "so that the names contain the folders)"
            )
        by_name[file.name] = file.path
    return sorted(inputs.values(), key=lambda file: file.name)


def _matches(entry: str | Path) -> Iterator[InputFile]:
    path = expand(entry)
    if is_folder(path) and not is_saved_dataset(path):
        for file in sorted(_below(path)):
            yield InputFile(_name(file.relative_to(path)), file)
    elif is_there(path):
        yield InputFile(path.name, path)
    elif _WILDCARD.search(str(entry)):
        first = next(position for position, part in enumerate(path.parts) if _WILDCARD.search(part))
        base = Path(*path.parts[:first])
        for found in sorted(base.glob(str(path.relative_to(base)))):
            below = found.relative_to(base)
            if (found.is_file() or is_saved_dataset(found)) and not _is_skipped(below):
                yield InputFile(_name(below), found)
    else:
        where = "" if path.is_absolute() else f"; the current folder is {Path.cwd()}"
        raise DataError(f"{entry} does not exist{where}")


def _below(folder: Path) -> Iterator[Path]:
    """Yield the data files and saved datasets below a folder.

    Links to folders are followed after all other folders: what has a path without links is found under it, and a loop ends.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"the folder {error.filename} cannot be read: {error.strerror}. Try: a pattern such as "
            f"{shlex.quote(f'{folder}/*.txt')} instead of the folder"
        ) from error

    pending: list[Path] = [folder]
    seen: set[str] = set()
    while pending:
        for name, folders, files in os.walk(pending.pop(0), onerror=refuse):
            parent, real = Path(name), os.path.realpath(name)
            is_dataset = (parent / STATE).is_file() and (parent / _DATASET_INFO).is_file()
            if real in seen or is_dataset or (parent != folder and is_corpus(parent)):
                folders.clear()
                if is_dataset and real not in seen:
                    yield parent
            else:
                folders[:] = sorted(entry for entry in folders if not _is_skipped(Path(entry)))
                pending += [parent / entry for entry in folders if (parent / entry).is_symlink()]
                for file in (parent / entry for entry in files if not _is_skipped(Path(entry))):
                    if file_suffix(file) in SUFFIXES and file.is_file():
                        yield file
            seen.add(real)


def _is_skipped(below: Path) -> bool:
    """Return whether a part of a path starts with . or _, which marks hidden and temporary files, or is that of a file system."""
    return any(part.startswith((".", "_")) or part == "lost+found" for part in below.parts)


def _name(below: Path) -> str:
    return "--".join(below.parts)


def _common(first: Path, second: Path) -> Path:
    pairs = zip(first.parts[:-1], second.parts[:-1], strict=False)
    return Path(*(part for part, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
