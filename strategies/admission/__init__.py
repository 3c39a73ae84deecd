"""Admission: which updates are aggregated."""
