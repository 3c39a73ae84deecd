"""Aggregation of updates: weighted mean, robust means."""
