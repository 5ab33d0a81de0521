"""The modules of experiments/paper are not part of the package."""

import sys

from support.folders import ROOT

sys.path.insert(0, str(ROOT / "experiments" / "paper"))
