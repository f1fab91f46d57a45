"""Which instance seeds are for what, so that no evaluation plays an instance that anything learned from.

Whatever a task makes of a seed, whoever plays it knows from the seed alone what it is for.
"""

EVALUATION_SEEDS = range(2**30)
"""Evaluations, final reports, and what a person plays."""

TRAINING_SEEDS = range(2**30, 2**31)
"""What rollout workers play to learn from."""

DEMONSTRATION_SEEDS = range(2**31, 2**32)
"""Demonstrations: sets, and those that `gflowvlm sft` plays itself."""
