"""Weighted means and robust means of updates."""
