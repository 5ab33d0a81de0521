"""The `promcse` commands, one module each with `add_parser` and `run`; `run.py` is `promcse train`. May import every package."""
