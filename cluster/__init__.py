"""What runs on a cluster: launch, the driver and its parts, scaling, serving, monitoring."""
