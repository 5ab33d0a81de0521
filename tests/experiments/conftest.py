"""Put folders of experiments/, which is not part of the package, on the import path."""

import sys

from support.folders import ROOT

sys.path[:0] = [str(ROOT / "experiments" / name) for name in ("paper", "speed")]
