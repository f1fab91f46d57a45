"""`python -m gflowvlm COMMAND`: the command line."""

import sys
from pathlib import Path

# Python puts the working directory first. Where that is not how this package was found, a user's own modules lie there.
if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
    del sys.path[0]

from gflowvlm.cli.main import main

if __name__ == "__main__":
    main()
