"""Exit codes of all commands, and the error lines that go with them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from promcse_pl.utils.errors import PromcseError, of_the_system, write_error
from promcse_pl.utils.signals import Stopped
from promcse_pl.utils.streams import drop_output


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code; an error is printed to stderr.

    Args:
        command: Returns 0 or None if all went well, 1 if a job of a sweep did not finish.

    Returns:
        The command's own code, also 0 if the reader of its output has exited (`promcse ... | head`). 2 for an error whose message
        says what to change, 1 for an unexpected one (with its traceback), 130 after Ctrl-C, 143 after SIGTERM or SIGUSR1.
    """
    try:
        try:
            code = command() or 0
        except SystemExit as error:  # Hydra's and argparse's way to end
            code = int(error.code or 0)
        sys.stdout.flush()
    except PromcseError as error:
        write_error(error)
        return 2
    except Stopped as stopped:
        return stopped.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        drop_output()
        return 0
    except OSError as error:
        write_error(of_the_system(error))
        if error.filename is None:
            drop_output()
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return code
