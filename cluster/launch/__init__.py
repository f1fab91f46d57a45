"""Where a run happens: Ray's start, placement on nodes, jobs on a cluster."""
