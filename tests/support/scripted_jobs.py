"""Tasks for the tests of pools and searches, in place of runs that take seconds."""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from promcse_pl.run_folder import Status, write_status


def patient(arguments: Sequence[str]) -> int:
    """Wait for NAME.go; on SIGTERM save and exit, after a second if the second argument is "slowly", never if "stubborn"."""
    name, received = arguments[0], []

    def stop(*_: object) -> None:
        received.append(1)
        if "slowly" in arguments and len(received) == 1 and not Path(f"{name}.quick").exists():
            time.sleep(1)
        Path(f"{name}.saved").write_text(str(len(received)))
        sys.exit(143)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in arguments else stop)
    Path(f"{name}.began").write_text(str(os.getpid()))
    while not Path(f"{name}.go").exists():
        time.sleep(0.01)
    print("threads", os.environ.get("OMP_NUM_THREADS"), sys.argv[1:], sys.stdin.read())
    return 0


def sleeping_rank(arguments: Sequence[str]) -> int:
    """In place of a rank: write its pid to RANK.pid in the run's folder, and exit on SIGTERM like a run that has saved."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (Path(arguments[0]) / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    time.sleep(60)
    return 1


def broken(arguments: Sequence[str]) -> int:
    """Raise an error that the package does not."""
    raise LookupError(f"broken {arguments[0]}")


def quick_run(arguments: Sequence[str]) -> int:
    """Write the files of a run that a search reads; with another second argument than "good", run until SIGTERM."""
    run, good = Path(arguments[0]), arguments[1] == "good"

    def stop(*_: object) -> None:
        write_status(run, Status(state="stopped", step=30, steps=100))
        sys.exit(143)

    signal.signal(signal.SIGTERM, stop)
    write_status(run, Status(state="running", step=30, steps=100))
    score = 80.0 if good else 20.0
    with (run / "metrics.jsonl").open("a") as stream:
        for step in (10, 30):
            stream.write(json.dumps({"step": step, "dev/spearman": score}) + "\n")
    if not good:
        time.sleep(30)
    (run / "results.json").write_text(json.dumps({"dev_spearman": score}))
    write_status(run, Status(state="finished", step=100, steps=100))
    return 0
