"""Takes a learner's steps in a process of its own and prints what it held at the peak: ``python FILE CONFIG MODEL``."""

import json
import re
import sys
from pathlib import Path

import torch

from gflowvlm.learner.learner import Learner
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.studies.benchmarks.workload import made_groups

GROUPS = 3


def peak_bytes() -> int:
    # Not `ru_maxrss`, which begins at what the process that started this one held.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024


def main() -> None:
    config, model = RunConfig.model_validate_json(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    batch = [t for group in made_groups(config, PolicyInputs.load(model), GROUPS) for t in group]
    # What a first step loads for good: libraries, and the allocator's own.
    small = config.model_copy(update={"learner": config.learner.model_copy(update={"token_budget": 64})})
    Learner(small, model).step(batch[:2])
    before = peak_bytes()
    learner = Learner(config, model)
    learner.step(batch)
    print(json.dumps({"before": before, "peak": peak_bytes()}))


if __name__ == "__main__":
    main()
