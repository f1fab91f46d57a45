"""The parts of `gflowvlm bench`: each measures one thing and starts nothing that it does not need."""
