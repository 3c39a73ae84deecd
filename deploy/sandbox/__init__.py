"""Small federations on real processes: what tests and benchmarks run on."""
