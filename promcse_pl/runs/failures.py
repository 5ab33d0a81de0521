"""Turns out-of-memory, disk-full and lost-rank errors into messages that say what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from promcse_pl.training.context import RunContext
from promcse_pl.utils.errors import DataError, LostRankError, OutOfMemoryError, PromcseError
from promcse_pl.utils.paths import run_command

_OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@contextmanager
def actionable_errors(run: RunContext) -> Iterator[None]:
    """Convert out-of-memory, disk and lost-rank errors into a PromcseError whose message has a command to continue with."""
    try:
        yield
    except LostRankError as error:
        raise LostRankError(f"rank {run.ranks.rank} of {run.ranks.size} {error}") from error
    except PromcseError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        raise OutOfMemoryError(f"out of memory. Try: {_command_with_less_memory(run)}") from error
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise DataError(f"cannot write {error.filename or 'a file of the run'}: {error.strerror}") from error


def _command_with_less_memory(run: RunContext) -> str:
    """Return a command that needs less memory, preferring settings that do not change the result."""
    config, tokens = run.config, run.config.trainer.chunk_tokens
    resume = run_command(f"resume={run.folder}")
    if not isinstance(tokens, int):
        return f"{resume} trainer.recompute=always trainer.chunk_tokens=512"
    if config.trainer.recompute != "always":
        return f"{resume} trainer.recompute=always"
    if tokens > config.data.max_length:
        return f"{resume} trainer.chunk_tokens={max(config.data.max_length, tokens // 2)}"
    return (
        f"a new run with data.batch_size={max(2, config.data.batch_size // 2)}; it affects training, so this run cannot be "
        "resumed with it"
    )
