"""A run's folder: what it holds, who writes it and how it is read."""
