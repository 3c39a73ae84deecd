"""Base models: loading, families, which weights are trained."""
