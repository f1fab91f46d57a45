"""Models that are no folder are asked of the hub once."""

import os
import subprocess
import sys
from pathlib import Path

LOAD = """
import sys, time
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs
started = time.monotonic()
try:
    PolicyInputs.load(sys.argv[1])
except UserError as error:
    print(f"{time.monotonic() - started:.1f} {error}")
"""


def test_a_hub_that_does_not_answer_is_one_line_at_once(tmp_path: Path) -> None:
    # Port 9 of this machine refuses connections; a hub that cannot be reached is tried by libraries for minutes.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", LOAD, "models/nothere"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout
    seconds, _, line = said.strip().partition(" ")
    assert line.startswith("model 'models/nothere': is no folder here, and cannot be had from the hub (")
    assert line.count("\n") == 0
    assert float(seconds) < 20
