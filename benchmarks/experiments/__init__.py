"""Experiments: strategies compared on real models and data; see ``fedspan experiment``."""
