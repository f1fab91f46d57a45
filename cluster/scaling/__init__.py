"""More or fewer rollout workers and policy server replicas while a run runs: asked for, or by load."""
