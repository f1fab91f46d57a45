"""How a run is put together: command line, presets, placement, driver, checkpoints, monitoring."""
