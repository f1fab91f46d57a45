"""Everything that uses trajectories: log P_F scoring, losses, LoRA model, optimisation. Imports no Ray."""
