"""Train, resume or sweep: the same as `promcse train`. See `python run.py --help`."""

import sys

if __name__ == "__main__":
    from promcse_pl.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
