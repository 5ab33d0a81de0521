"""Sweeps and searches: plan and check all jobs, execute each in its own process, resume, rank and report.

Imports everything below except the command line; Hydra is not imported here.
"""
