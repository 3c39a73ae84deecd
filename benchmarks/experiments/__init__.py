"""Experiments: strategies compared on real models and data; see ``deploy.experiment.run``."""
