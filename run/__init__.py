"""A run's folder: its paths, settings, log, checkpoints and results, and the presets and models that ship with us."""
