"""One run: lifecycle, pipeline, worker processes."""
