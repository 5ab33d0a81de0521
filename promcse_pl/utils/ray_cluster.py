"""Connect to a Ray cluster, or start one on this machine."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from promcse_pl.utils.errors import ConfigError
from promcse_pl.utils.processes import available_cores

_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 30.0
"""Maximum duration of `ray health-check`, most of which is the import of Ray."""
_STORE_BYTES = 10**8
"""Object store of a local cluster: only small messages pass through it, and Ray would reserve 30 % of the memory."""


@contextmanager
def ray_cluster(address: str | None, setting: str) -> Iterator[Any]:
    """Connect this process to a Ray cluster and yield the module `ray`; an existing connection is reused and kept open.

    Args:
        address: `auto` or HOST:PORT; None: start a cluster on this machine, and stop it at the end.
        setting: Prefix of the address in error messages: `--address ` or `sweep.address=`.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("this needs Ray. Try: pip install 'promcse_pl[ray]'") from error
    if address not in (None, "auto"):
        _check_address(str(address), setting)
    if ray.is_initialized():
        yield ray
        return
    if address == "auto":
        _check_recorded_address(setting)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _connect(ray, address, setting)
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray has replaced it
    try:
        yield ray
    finally:
        ray.shutdown()


def cluster_nodes(ray: Any) -> list[tuple[float, float]]:  # noqa: ANN401  (a module)
    """Return the CPUs and GPUs of every node of the cluster."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]


def _connect(ray: Any, address: str | None, setting: str) -> None:  # noqa: ANN401  (a module)
    local = {
        "num_cpus": available_cores(),
        "include_dashboard": False,
        "object_store_memory": _STORE_BYTES,
        "log_to_driver": False,
    }
    try:
        ray.init(address=address or "local", logging_level="error", **({} if address else local))
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
        raise _unreachable(address, setting, reason) from error


def _check_recorded_address(setting: str) -> None:
    """Raise a ConfigError if the cluster of `auto` does not answer: that in RAY_ADDRESS, or what `ray start` has recorded."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    record = Path(folder) / "ray/ray_current_cluster"
    given = os.environ.get("RAY_ADDRESS")
    address = given or (record.read_text().strip() if record.is_file() else "auto")
    if "://" in address or not address.rpartition(":")[2].isdecimal():
        return  # a Ray client's address, or none: then Ray looks for running processes and reports that there are none
    try:
        _check_address(address, setting)
    except ConfigError as error:
        origin, fix = ("RAY_ADDRESS", "unset RAY_ADDRESS") if given else (record, "ray stop")
        raise ConfigError(
            f"{setting}auto: no Ray cluster answers at {address} (from {origin}). Try: {fix}, then ray start --head, or no "
            f"{setting.strip(' =')}, which starts a cluster on this machine"
        ) from error


def _check_address(address: str, setting: str) -> None:
    """Raise a ConfigError if no Ray cluster answers at an address; Ray would retry for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{setting}{address}: an address must be auto or HOST:PORT. Try: {setting}auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, setting, str(error)) from error
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:  # the exit code is not used: `_connect` reports a wrong token or version
        subprocess.run(command, capture_output=True, timeout=_ANSWER_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        reason = f"no answer within {_ANSWER_SECONDS:.0f} s; the default port of a cluster is 6379"
        raise _unreachable(address, setting, reason) from error


def _unreachable(address: str | None, setting: str, reason: str) -> ConfigError:
    if address is None:
        return ConfigError(
            f"a Ray cluster cannot be started on this machine ({reason}). Try: free memory and disk space"
        )
    return ConfigError(
        f"{setting}{address}: cannot connect to a Ray cluster ({reason}). Try: ray start --head on its first node, "
        f"RAY_AUTH_MODE=token if the cluster has a token, or no {setting.strip(' =')}, which starts a cluster on this machine"
    )
