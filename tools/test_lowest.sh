#!/usr/bin/env bash
# Run a part of the tests with the lowest versions of the direct dependencies that pyproject.toml allows.
# The extras are not installed, so the tests chosen are those that need none of them.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q uv
"$folder/venv/bin/uv" pip install -q --python "$folder/venv/bin/python" --resolution lowest-direct -e '.[demo]'
"$folder/venv/bin/uv" pip install -q --python "$folder/venv/bin/python" pytest pytest-xdist hypothesis
"$folder/venv/bin/python" -m pytest tests/config tests/losses tests/models tests/test_adapter.py tests/test_embedder.py \
    tests/training/test_training_module.py tests/runs/test_lifecycle.py tests/cli/test_train.py
