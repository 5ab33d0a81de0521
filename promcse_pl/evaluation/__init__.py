"""Scores, as pure functions over an `encode` callable."""
