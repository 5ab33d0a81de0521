#!/usr/bin/env bash
# Resolve pyproject.toml with all extras in an empty environment and write what pip chose.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 '.[dev]'
{
    echo "# Written by tools/write_constraints.sh: the versions that pip resolved for all extras on Python $(python3 -c 'import platform; print(platform.python_version())')."
    "$folder/venv/bin/pip" freeze --exclude promcse_pl | sed 's/+cpu$//'
} > constraints.txt
