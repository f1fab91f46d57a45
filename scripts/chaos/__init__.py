"""A real job on a Ray cluster of several nodes on this machine, with parts killed at random: `make chaos`.

`schedule` says what dies when, `nodes` is the cluster, `job` the run's driver, `killing` does it, `records` reads what
the run has written and `proof` decides from that alone whether anything was lost, doubled or left out.
"""
