"""Trackers, which get a run's numbers: TensorBoard always, MLflow and Weights & Biases on request."""
