"""Evaluation: targets, tasks, embedding cache, scores with confidence intervals, comparisons, tables and plots.

`suite.evaluate` runs it. May import interop, embedder, models, data and everything below.
"""
