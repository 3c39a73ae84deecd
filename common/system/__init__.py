"""Processes, files, locks, logs, keys and memory of this machine."""
