"""Folders of the repository, the official numbers and the real data."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHOLE_GOLDEN, SOME_GOLDEN = ROOT / "../shared/golden", ROOT / "tests/golden/numbers"
GOLDEN = Path(os.environ.get("PROMCSE_GOLDEN", WHOLE_GOLDEN if WHOLE_GOLDEN.is_dir() else SOME_GOLDEN)).resolve()
DATA = Path(os.environ.get("PROMCSE_DATA", ROOT / "../shared/data")).resolve()
