"""Base models: loading, model families, choice of the trained tensors."""
