"""One run: its inputs, lifecycle, pipeline and processes, and `promcse_pl.train`. May import every package but cli and sweeps."""
