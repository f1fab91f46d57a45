"""Makes what lies in `scripts/` importable, as `make compare-torchgfn` does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
