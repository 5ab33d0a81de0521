#!/usr/bin/env bash
# Write requirements-release.txt: all that a user's install takes, at the versions of constraints.txt, each file with its hash.
# Run it after tools/write_constraints.sh. It installs uv into an empty environment and asks the package index alone: no file
# of this machine gets into the list. What a version has no hash for is named, and the script fails.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q uv
{
    echo "# Written by tools/write_hashes.sh from pyproject.toml (all extras but dev) and constraints.txt, for every platform."
    echo "# pip install --require-hashes -r requirements-release.txt && pip install --no-deps promcse_pl"
    "$folder/venv/bin/uv" pip compile pyproject.toml --extra demo --extra faiss --extra peft --extra plots --extra st --extra mteb --extra optuna --extra dashboard \
        --constraints constraints.txt --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet \
        --output-file "$folder/hashed.txt" > /dev/null
    cat "$folder/hashed.txt"
} > "$folder/all.txt"
bare=$(grep '==' "$folder/all.txt" | grep -v '\\$' || true)
if [ -n "$bare" ]; then
    echo "the index gives no hash for: $bare" >&2
    exit 1
fi
mv "$folder/all.txt" requirements-release.txt
