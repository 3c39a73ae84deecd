"""How a federation is started: local launcher, demo, example files."""
