"""`promcse ...` in real processes that can be killed.

Each is forked from one that has imported what a run needs: a start costs a tenth of a second instead of seconds.
"""

import multiprocessing as mp
import os
import sys
from dataclasses import dataclass
from pathlib import Path

PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "promcse_pl.cli.main",
        "promcse_pl.runs.pipeline",
        "promcse_pl.training.fit",
        "promcse_pl.evaluation.suite",
        "transformers.models.auto.modeling_auto",
        "transformers.models.bert.modeling_bert",
        "scipy.stats",
        "pytest",
    ]
)


@dataclass
class Ended:
    """How a process ended, and what it printed."""

    code: int
    stdout: str
    stderr: str


def _go(arguments: list[str], before: str, output: Path) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1 if name == "out" else 2)
    from promcse_pl.cli.main import main
    from support import single_thread  # noqa: F401

    exec(before, {})
    sys.exit(main(arguments))


def begin(output: Path, *arguments: object, before: str = "") -> mp.Process:
    """Start `promcse ARGUMENTS` after some lines of Python; it prints to output.out and output.err."""
    process = PROCESSES.Process(target=_go, args=(list(map(str, arguments)), before, output))
    process.start()
    return process


def end(process: mp.Process) -> int:
    """Wait for a process; return its exit code, negative for a signal."""
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def promcse(output: Path, *arguments: object, before: str = "") -> Ended:
    """Run `promcse ARGUMENTS` to its end."""
    code = end(begin(output, *arguments, before=before))
    return Ended(code, Path(f"{output}.out").read_text(), Path(f"{output}.err").read_text())
