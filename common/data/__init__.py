"""Rows, tasks and the scores of a model on them."""
