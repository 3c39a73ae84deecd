"""Rounds that wait for no slow site: ``cohort.mode`` buffered."""
