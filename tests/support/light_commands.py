"""`python run.py ...` in processes that start in milliseconds, for commands that end before torch is imported.

Each is forked from a process that has imported what every command imports.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.folders import ROOT

_SERVER = """
import json, os, runpy, sys
import promcse_pl.cli.main, promcse_pl.cli.train, hydra.main, promcse_pl.data.readers
HEAVY = ("torch", "transformers", "pytorch_lightning", "datasets")
assert not set(HEAVY) & set(sys.modules)
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(task["cwd"])
    os.environ.clear()
    os.environ.update(task["environment"])
    for number in (1, 2):
        os.dup2(os.open(task["output"] + str(number), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [task["script"], *task["arguments"]]
    code = 1
    try:
        runpy.run_path(task["script"], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        with open(task["output"] + "3", "w") as file:
            json.dump(sorted(set(HEAVY) & set(sys.modules)), file)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended, what it printed, and which of the slow libraries it imported."""

    returncode: int
    stdout: str
    stderr: str
    heavy: list[str]


class LightCommands:
    """Starts commands one after the other."""

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        self._server, self._folder = server, folder

    def run(self, cwd: Path, arguments: list[str], environment: dict[str, str]) -> Ended:
        """Run `python run.py ARGUMENTS` to its end."""
        output = str(self._folder / "output")
        for part in "123":
            Path(output + part).unlink(missing_ok=True)
        task = {
            "cwd": str(cwd),
            "arguments": arguments,
            "environment": environment,
            "output": output,
            "script": str(ROOT / "run.py"),
        }
        print(json.dumps(task), file=self._server.stdin, flush=True)
        code = int(self._server.stdout.readline())
        stdout, stderr, heavy = (Path(output + part).read_text() for part in "123")
        return Ended(code, stdout, stderr, json.loads(heavy))


@contextmanager
def light_commands(folder: Path) -> Iterator[LightCommands]:
    """Start the process that the commands are forked from; it writes to an existing folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        yield LightCommands(server, folder)
