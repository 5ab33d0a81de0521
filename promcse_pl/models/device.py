"""The device that a model runs on."""

from __future__ import annotations

import torch

from promcse_pl.utils.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Return the device of a setting; for `auto`, a GPU if there is one.

    Raises:
        ConfigError: This machine does not have the device.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if available["cuda"] else "mps" if available["mps"] else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda or mps, got {name!r}") from None
    if not available.get(device.type, False):
        found = ", ".join(kind for kind, is_available in available.items() if is_available)
        raise ConfigError(f"there is no {device.type} device on this machine (there is: {found}). Try: device auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ConfigError(
            f"there is no {name} on this machine. Allowed: {', '.join(f'cuda:{n}' for n in range(last + 1))}"
        )
    return device
