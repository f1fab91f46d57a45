"""What makes a model trainable, or not: found before any run. `report.check_model` is the whole of it.

Each finding is a small function in `inputs`, `network` or `engine`; a new one is written there and listed in `report`.
"""
