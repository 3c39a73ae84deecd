"""Compares strategies: plans trials, runs them, writes one page."""
