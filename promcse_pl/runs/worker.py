"""Entry point of the process of a rank that `promcse_pl.runs.launcher` starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from promcse_pl.runs.launcher import ERROR_PIPE, send_error
from promcse_pl.runs.lifecycle import run_rank
from promcse_pl.utils.errors import PromcseError, RankError, write_error
from promcse_pl.utils.signals import Stopped


def main(arguments: Sequence[str]) -> int:
    """Run one rank of the run in a folder (the only argument); report its error to the launcher and return its exit code."""
    errors = Connection(int(os.environ.pop(ERROR_PIPE)), readable=False)
    try:
        run_rank(Path(arguments[0]))
    except PromcseError as error:
        send_error(errors, error)
        if os.environ["RANK"] != "0":  # the launcher prints the error of rank 0
            write_error(error)
        return 2
    except Stopped as stopped:
        return stopped.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        send_error(errors, RankError(f"{type(error).__name__}: {error}"))
        raise
    return 0
