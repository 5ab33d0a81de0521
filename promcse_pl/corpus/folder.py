"""The output folder of an encoded corpus: a manifest, shards, and a description of every finished shard."""

# Each finished shard has its own description, so that any number of processes can write to one folder without a lock. The list in
# the manifest is a copy for readers outside this package.

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from promcse_pl.utils.errors import AdapterError, ConfigError, DataError
from promcse_pl.utils.files import own_description, refuse_taken, write_text
from promcse_pl.version import __version__

FORMAT = 1
"""Incremented when older versions could misread a newer folder."""
MANIFEST, INDEX_DESCRIPTION = "manifest.json", "corpus-index.json"
ShardFormat = Literal["parquet", "npy"]
SHARD_FORMATS: tuple[ShardFormat, ...] = get_args(ShardFormat)
OutputType = Literal["float32", "float16"]
OUTPUT_TYPES: tuple[OutputType, ...] = get_args(OutputType)
_OPTIONS = {
    "prompt": "--prompt",
    "precision": "--precision",
    "text_column": "--text",
    "on_bad_row": "--on-bad-row",
    "rows_per_shard": "--rows-per-shard",
    "output_dtype": "--output-dtype",
    "shard_format": "--format",
}
"""Settings of a corpus and the options that set them."""
_NAMED_SHARDS = 20
"""Most shards that a message names; longer messages are truncated."""


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """Everything but the input files that determines the content of the shards.

    Attributes:
        adapter: Hash of the adapter.
        encoder: Name of the frozen encoder.
        width: D, the dimension of an embedding.
        prompt: Text that is prepended to every text.
        precision: Dtype of the encoder's computation.
        text_column, on_bad_row, rows_per_shard: See `rows.RowSettings`.
        output_dtype: Type of the stored embeddings.
        shard_format: `parquet`: one file with all columns; `npy`: the embeddings alone, with the other columns in a parquet file.
    """

    adapter: str
    encoder: str
    width: int
    prompt: str
    precision: str
    text_column: str | None
    on_bad_row: str
    rows_per_shard: int
    output_dtype: str
    shard_format: str

    @property
    def sha256(self) -> str:
        """Hash that is stored with each shard."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished shard.

    Attributes:
        name: Name of its files without the suffix.
        input: Name of its input file.
        number: Its number in the input file.
        is_last: Whether it holds the last rows of the input file.
        input_sha256: Hash of the input file.
        settings_sha256: Hash of the settings.
        rows: Number of rows.
        bad_rows: Number of input rows that were skipped.
        text_column: Name of the text column.
        columns: Names of all columns.
        files: Size and hex sha256 of each file.
    """

    name: str
    input: str
    number: int
    is_last: bool
    input_sha256: str
    settings_sha256: str
    rows: int
    bad_rows: int
    text_column: str
    columns: list[str]
    files: dict[str, dict[str, Any]]

    def is_intact(self, folder: Path) -> bool:
        """Return whether its files exist with their sizes."""
        return all(
            (folder / name).is_file() and (folder / name).stat().st_size == about["bytes"]
            for name, about in self.files.items()
        )


def shard_name(input_name: str, number: int) -> str:
    """Return the name of a shard's files without the suffix."""
    return f"{input_name}-{number:05d}"


def check_out(folder: Path) -> None:
    """Check that a corpus may be written to a folder: it is absent, empty or a folder of this package.

    Raises:
        DataError: It has other content.
    """
    if _manifest(folder) is None:
        try:
            refuse_taken(folder)
        except DataError:
            if _manifest(folder) is None:  # else a concurrent task has just created the folder
                raise


def _manifest(folder: Path) -> dict[str, Any] | None:
    return own_description(folder, MANIFEST, {"format", "promcse_pl", "settings", "inputs"})


def is_corpus(folder: Path) -> bool:
    """Return whether a folder is an encoded corpus or an index of one."""
    is_index = own_description(folder, INDEX_DESCRIPTION, {"format", "promcse_pl", "adapter"}) is not None
    return is_index or _manifest(folder) is not None


def read_settings(folder: Path) -> CorpusSettings | None:
    """Return the settings of an encoded corpus; None if the folder is not one.

    Raises:
        DataError: It has another format.
    """
    about = _manifest(folder)
    if about is None:
        return None
    names = {field.name for field in fields(CorpusSettings)}
    if about["format"] != FORMAT or not isinstance(about["settings"], dict) or set(about["settings"]) != names:
        raise DataError(
            f"{folder / MANIFEST} has format {about['format']!r} (written by promcse_pl {about['promcse_pl']}); this version "
            f"({__version__}) reads {FORMAT}. Try: pip install --upgrade promcse_pl, or another --out"
        )
    return CorpusSettings(**about["settings"])


def check_settings(folder: Path, settings: CorpusSettings) -> CorpusSettings:
    """Check that the shards in a folder, if there are any, have the same settings.

    Returns:
        The settings, with the encoder's name in the stored ones: an encoder that was renamed or moved gives equal shards.

    Raises:
        AdapterError: They were computed with another adapter.
        ConfigError: Another setting differs.
        DataError: See `read_settings`.
    """
    stored = read_settings(folder)
    if stored is None:
        return settings
    if stored.adapter != settings.adapter:
        raise AdapterError(
            f"the shards in {folder} were computed with another adapter ({stored.adapter[:12]}…, encoder {stored.encoder}; "
            f"this one is {settings.adapter[:12]}…, encoder {settings.encoder}). Load that adapter, or give another --out"
        )
    for key, option in _OPTIONS.items():
        old, new = getattr(stored, key), getattr(settings, key)
        if old != new:
            advice = f"leave {option} out" if old is None else f"{option} {shlex.quote(str(old))}"
            raise ConfigError(
                f"the shards in {folder} were written with {key}={old!r}, now it is {new!r}. Try: {advice}, or another --out"
            )
    return replace(settings, encoder=stored.encoder)


def write_shard(folder: Path, shard: Shard) -> None:
    """Record that a shard is finished; its files must be complete."""
    write_text(folder / f"{shard.name}.json", json.dumps(asdict(shard), indent=2) + "\n")


def read_shard(folder: Path, name: str) -> Shard | None:
    """Return the description of a finished shard; None if it is not finished or its files are incomplete."""
    about = own_description(folder, f"{name}.json", {field.name for field in fields(Shard)})
    shard = None if about is None else Shard(**{field.name: about[field.name] for field in fields(Shard)})
    return shard if shard is not None and shard.name == name and shard.is_intact(folder) else None


def finished_shards(folder: Path) -> list[Shard]:
    """Return the finished shards, sorted by input and number."""
    names = (path.stem for path in folder.glob("*-[0-9][0-9][0-9][0-9][0-9]*.json"))
    found = (read_shard(folder, name) for name in names)
    return sorted((shard for shard in found if shard is not None), key=lambda shard: (shard.input, shard.number))


def matching_shards(folder: Path, settings: CorpusSettings) -> list[Shard]:
    """Return the finished shards, sorted by input and number.

    Raises:
        DataError: Some were written with other settings, by a concurrent command.
    """
    shards = finished_shards(folder)
    others = [shard.name for shard in shards if shard.settings_sha256 != settings.sha256]
    if others:
        remove = f"{remove_command(folder, others)} and the promcse encode command again, or "
        raise DataError(
            f"{folder}: {len(others)} shards were written with other settings than those in {MANIFEST}, by a command that ran "
            f"at the same time. Try: {remove if len(others) <= _NAMED_SHARDS else ''}another --out"
        )
    return shards


def remove_command(folder: Path, names: Iterable[str]) -> str:
    """Return the shell command that removes shards, so that they can be written again."""
    return "rm " + " ".join(f"{shlex.quote(str(folder / name))}.*" for name in names)


def remove_input_command(folder: Path, name: str) -> str:
    """Return the shell command that removes all shards of an input, and none of `NAME-more`."""
    return f"rm {shlex.quote(str(folder / name))}-{'[0-9]' * 5}.*"


def complete_shards(folder: Path) -> list[Shard]:
    """Return the shards of a corpus that has been encoded completely.

    Raises:
        DataError: It is not an encoded corpus, a shard is missing, or shards were written with different settings.
    """
    about, settings = _manifest(folder), read_settings(folder)
    if about is None or settings is None:
        raise DataError(
            f"{folder} is not an encoded corpus: it has no {MANIFEST}. promcse encode --out FOLDER writes one"
        )
    shards = matching_shards(folder, settings)
    of_inputs: dict[str, list[Shard]] = {name: [] for name in about["inputs"]}
    for shard in shards:
        of_inputs.setdefault(shard.input, []).append(shard)
    for name, found in of_inputs.items():
        if not _is_complete(found):
            remove = f"{remove_input_command(folder, name)}; " if found else ""
            raise DataError(
                f"{folder}: the input {name} has {len(found)} finished shards, and others are missing. Run the same promcse "
                f"encode command again to finish it. To leave it out: {remove}promcse encode with the other inputs"
            )
    return shards


def _is_complete(shards: list[Shard]) -> bool:
    return [shard.number for shard in shards] == list(range(len(shards))) and bool(shards) and shards[-1].is_last


def write_manifest(folder: Path, settings: CorpusSettings, inputs: Iterable[str]) -> None:
    """Write the settings, the names of the inputs, and a copy of the descriptions of all finished shards.

    It is written again if another process has finished a shard in the meantime, so that the last copy is complete.

    Args:
        folder: Output folder; created if needed.
        settings: Settings of the corpus.
        inputs: Names of input files, in addition to those in the manifest that have finished shards.
    """
    listed: list[Shard] | None = None
    while listed is None or listed != finished_shards(folder):
        about = _manifest(folder) or {"inputs": []}
        listed = finished_shards(folder)
        content = {
            "format": FORMAT,
            "promcse_pl": __version__,
            "settings": asdict(settings),
            "inputs": sorted({*inputs, *({shard.input for shard in listed} & {*about["inputs"]})}),
            "rows": sum(shard.rows for shard in listed),
            "shards": [asdict(shard) for shard in listed],
        }
        write_text(folder / MANIFEST, json.dumps(content, indent=2) + "\n")
