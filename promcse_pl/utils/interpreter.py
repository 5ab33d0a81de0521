"""Start Python subprocesses that do not import modules from the current folder.

`python -m` and `python -c` put the current folder first on the module search path, so that a `json.py` or `wandb.py` in it
shadows the library of that name. Instead this file is run as a script with `-P`, loads the package from its own location
(without installation) and calls one function.
"""

from __future__ import annotations

import importlib.util
import os
import site
import sys
from collections.abc import Sequence
from pathlib import Path


def python_command(target: str, *arguments: str) -> list[str]:
    """Return the command of a subprocess that calls `target` and exits with its return value.

    Args:
        target: "module:function"; the function takes the list of arguments and returns an exit code.
        arguments: Passed to the function; `sys.argv` holds them too.
    """
    return [sys.executable, "-P", __file__, target, *arguments]


def _load_package() -> None:
    """Make `promcse_pl` importable without adding its parent folder to the module search path."""
    package = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location(
        package.name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec
    assert spec.loader
    module = sys.modules[package.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # an editable install puts the clone on the path, and the clone may be the current folder
    allowed = [*site.getsitepackages(), site.getusersitepackages(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if str(package.parent) not in allowed:
        sys.path[:] = [entry for entry in sys.path if entry != str(package.parent)]


def call(target: str, arguments: Sequence[str]) -> int:
    """Call a "module:function" with arguments, which `sys.argv` then holds too; return its exit code."""
    module, _, function = target.partition(":")
    sys.argv = [module, *arguments]
    code: int = getattr(importlib.import_module(module), function)(arguments)
    return code


def main() -> int:
    """Load the package and call the function given on the command line."""
    target, *arguments = sys.argv[1:]
    _load_package()
    processes = importlib.import_module("promcse_pl.utils.processes")
    if given := os.environ.pop(processes.PARENT, None):
        processes.end_with_parent(*map(int, given.split()))
    return call(target, arguments)


if __name__ == "__main__":
    sys.exit(main())
