"""The modules of tools/ are not part of the package."""

import sys

from support.folders import ROOT

sys.path.insert(0, str(ROOT / "tools"))
