"""Keeps a run alive, shows it and stops it. Stays at home."""
