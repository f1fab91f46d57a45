"""Everything that makes trajectories: rollout worker, policy server, adapter store, replay buffer."""
