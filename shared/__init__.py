"""What makers and users of trajectories must agree on: schema, configuration, response format, metric names."""
