"""What a run shows of itself to the outside: Prometheus, TensorBoard, Grafana, memory, load of the samplers."""
