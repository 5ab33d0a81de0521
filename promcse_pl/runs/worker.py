"""Entry point of one rank's process."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from promcse_pl.runs.launcher import STARTER
from promcse_pl.runs.lifecycle import run_rank
from promcse_pl.utils import errors
from promcse_pl.utils.errors import PromcseError
from promcse_pl.utils.processes import end_with
from promcse_pl.utils.signals import Stopped


def main(arguments: Sequence[str]) -> int:
    """Run one rank of the run in the given folder; return its exit code."""
    end_with(int(os.environ[STARTER]), signal.SIGKILL)
    try:
        run_rank(Path(arguments[0]))
    except PromcseError as error:
        if os.environ["RANK"] != "0":  # rank 0's is in status.json, and the starter tells it
            errors.write_error(error)
        return 2
    except Stopped as stopped:
        return stopped.exit_code
    except KeyboardInterrupt:
        return 130
    return 0
