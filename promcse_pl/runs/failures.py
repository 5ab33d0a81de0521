"""What a run's machine runs out of, told so that a person knows what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from promcse_pl.config import Config
from promcse_pl.training.distributed import Ranks
from promcse_pl.utils.errors import DataError, LostRankError, OutOfMemoryError, PromcseError
from promcse_pl.utils.paths import run_command


@contextmanager
def plain_errors(config: Config, ranks: Ranks, folder: Path) -> Iterator[None]:
    """Convert out-of-memory, disk-full and lost-rank errors into errors with a command for the run in a folder."""
    try:
        yield
    except LostRankError as error:
        raise LostRankError(f"rank {ranks.rank} of {ranks.size} {error}") from error
    except PromcseError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _MEMORY.search(str(error)):
            raise
        raise OutOfMemoryError(f"out of memory. Try: {_less_memory(config, folder)}") from error
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise DataError(f"cannot write {error.filename or 'a file of the run'}: {error.strerror}") from error


_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def _less_memory(config: Config, folder: Path) -> str:
    """Return a command that needs less memory, preferring settings that do not change the result."""
    tokens = config.trainer.chunk_tokens
    resume = run_command(f"resume={folder}")
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
