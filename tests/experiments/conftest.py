"""Put experiments/paper, which is not part of the package, on the import path."""

import sys

from support.folders import ROOT

sys.path.insert(0, str(ROOT / "experiments" / "paper"))
