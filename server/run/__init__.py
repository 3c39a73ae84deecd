"""A run's folder: its files, their writers, their readers."""
