"""Sweeps: many runs that differ by some settings."""
