"""Read weight files and JSON files of other programs: no code is run, and no more memory is allocated than they contain."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from promcse_pl.utils.paths import require_regular_file

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_JSON_BYTES, _HEADER_BYTES = 2**24, 100_000_000
"""Maximum sizes of a JSON file and of the header of a safetensors file (safetensors has the same limit)."""


class TensorSpec(NamedTuple):
    """Shape and dtype of a stored tensor; a dtype that torch lacks is kept as its name in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str

    @property
    def numel(self) -> int:
        """Number of entries."""
        return prod(self.shape)


def add_to_digest(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Add names, shapes and float32 values of tensors to a digest, in the order of their names."""
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file's content.

    Raises:
        OSError: It cannot be read, or is a FIFO, a socket or a device.
    """
    with require_regular_file(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of at most 16 MiB.

    Raises:
        OSError: It cannot be read, is larger, or is a FIFO, a socket or a device.
        ValueError: It is not JSON, or contains something other than an object.
    """
    value = _read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must contain an object, got {type(value).__name__}")
    return value


def read_json_list(path: Path) -> list[Any]:
    """Return the list in a JSON file; limits and errors as in `read_json_object`."""
    value = _read_json(path)
    if not isinstance(value, list):
        raise ValueError(f"{path} must contain a list, got {type(value).__name__}")
    return value


def _read_json(path: Path) -> Any:  # noqa: ANN401
    try:
        return json.loads(require_regular_file(path, at_most=_JSON_BYTES).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Return shape and dtype of the tensors in a safetensors file without reading their values.

    Raises:
        OSError: It cannot be read, or is a FIFO, a socket or a device.
        ValueError: It is not a safetensors file, or its header declares more bytes than the file holds.
    """
    size = require_regular_file(path).stat().st_size
    with path.open("rb") as handle:
        header_size = int.from_bytes(handle.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise ValueError("the file is shorter than its header")
        if header_size > _HEADER_BYTES:
            raise ValueError(f"its header has {header_size:,} bytes, the maximum is {_HEADER_BYTES:,}")
        header = json.loads(handle.read(header_size))
    header.pop("__metadata__", None)
    specs = {
        name: TensorSpec(tuple(entry["shape"]), _DTYPES.get(entry["dtype"], entry["dtype"]))
        for name, entry in header.items()
    }
    if sum(spec.numel for spec in specs.values()) > 2 * (size - 8):  # the smallest dtype has half a byte
        raise ValueError("its header declares more values than the file contains")
    return specs


def read_pickle(path: Path) -> Any:  # noqa: ANN401
    """Read the tensors of a `torch.save` file without running code; no tensor may be larger than the file.

    Raises:
        OSError: It cannot be read, or is a FIFO, a socket or a device.
        ValueError: It would take more memory than its size on disk.
        pickle.UnpicklingError, RuntimeError, ...: It contains more than tensors, or is damaged; see `torch.load`.
    """
    size = require_regular_file(path).stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:  # torch.save does not compress
                raise ValueError("it is compressed, unlike files written by torch.save")
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, tensor in state.items() if isinstance(state, dict) else ():
        if isinstance(tensor, Tensor) and not _has_memory(tensor):
            raise ValueError(f"{str(name)[:80]} is sparse, or declares more values than the file contains")
    return state


def _has_memory(tensor: Tensor) -> bool:
    """Return whether the storage covers all entries of a tensor: with stride 0, a small file could declare terabytes."""
    return (
        tensor.layout == torch.strided and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )
