"""Entry points: Hydra (run.py, promcse train) and argparse (promcse)."""
