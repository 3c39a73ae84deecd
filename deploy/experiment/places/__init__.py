"""Where the trials of an experiment run: on this machine, on a Ray cluster, or on a Slurm cluster."""
