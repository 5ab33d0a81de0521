"""Sweeps: every job a process of its own, planned and checked before the first one starts, and resumable."""
