"""Train, resume or sweep: the same as `promcse train`. See `python run.py --help`."""

import signal
import sys

if __name__ == "__main__":
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback
    from promcse_pl.cli.main import main

    signal.signal(signal.SIGINT, handler)
    sys.exit(main(["train", *sys.argv[1:]]))
