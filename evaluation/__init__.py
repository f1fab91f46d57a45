"""How good a policy is, by play and exactly."""
