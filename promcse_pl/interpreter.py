"""Python subprocesses of this package, which import nothing from the current folder.

`python -m` and `python -c` put the current folder first on the module search path, so a user's `json.py` or `wandb.py` there
would replace the library of that name. This file is run as a script with `-P` instead, loads the package from its own location
(it need not be installed) and calls one function.
"""

from __future__ import annotations

import importlib.util
import os
import site
import sys
from pathlib import Path


def python_command(target: str, *arguments: str) -> list[str]:
    """Return the command of a subprocess that exits with what `target` returns.

    Args:
        target: "module:function"; the function takes the list of arguments and returns an exit code.
        arguments: Passed to the function; `sys.argv` holds them too.
    """
    return [sys.executable, "-P", __file__, target, *arguments]


def _load_package() -> None:
    """Make `promcse_pl` importable, and nothing else that lies beside it."""
    package = Path(__file__).parent
    spec = importlib.util.spec_from_file_location(
        package.name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec
    assert spec.loader
    module = sys.modules[package.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # an editable install puts the clone on the path, and the clone may be the current folder
    wanted = [*site.getsitepackages(), site.getusersitepackages(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if str(package.parent) not in wanted:
        sys.path[:] = [entry for entry in sys.path if entry != str(package.parent)]


def main() -> int:
    """Load the package and call the function that the command line names."""
    target, *arguments = sys.argv[1:]
    _load_package()
    module, _, function = target.partition(":")
    sys.argv = [module, *arguments]
    code: int = getattr(importlib.import_module(module), function)(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
