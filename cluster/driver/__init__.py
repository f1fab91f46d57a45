"""One run while it runs: the driver, what it starts, and the learner's loop."""
