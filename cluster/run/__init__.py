"""One run: the driver, what it starts, the learner's loop, and what it leaves in its folder."""
