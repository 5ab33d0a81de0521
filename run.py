"""Train, resume or sweep, as `promcse train` does. See `python run.py --help`."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback
    from promcse_pl.cli.run import main

    main()
