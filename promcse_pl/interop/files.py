"""Read the JSON and tensor files of other programs' checkpoints; every failure is an AdapterError with the file's name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from promcse_pl.models.encoder_files import first_line
from promcse_pl.models.weights import read_json_object, read_pickle
from promcse_pl.utils.errors import AdapterError
from promcse_pl.utils.paths import is_there, require_regular_file


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: The file.
        kind: Its folder in messages, as in "a PEFT adapter".

    Raises:
        AdapterError: It is missing, cannot be read, or contains something other than an object.
    """
    try:
        return read_json_object(path)
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} is not {kind}: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {first_line(error)}") from error


def read_tensors(folder: Path, safe: str, pickled: str) -> tuple[Path, dict[str, Tensor]]:
    """Return the tensors in a folder's safetensors file, or in its `torch.save` file if there is none; no code is run.

    Args:
        folder: Folder of the checkpoint.
        safe, pickled: Names of the two files.

    Returns:
        Path of the file that was read, and its tensors by name.

    Raises:
        AdapterError: There is neither file, it is damaged, or it contains something other than tensors.
    """
    path = folder / (safe if is_there(folder / safe) else pickled)
    try:
        state = load_file(require_regular_file(path)) if path.name == safe else read_pickle(path)
    except FileNotFoundError:
        raise AdapterError(f"{folder} has neither {safe} nor {pickled}: the checkpoint is incomplete") from None
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "nsupported" in line), first_line(error))
        raise AdapterError(
            f"{path} is refused: it holds more than tensors, and reading that could run code. Nothing in it was run. ({reason})"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        raise AdapterError(f"{path} is damaged or truncated: {first_line(error) or type(error).__name__}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise AdapterError(f"{path} is not a state dict (a dictionary of tensors)")
    return path, state
