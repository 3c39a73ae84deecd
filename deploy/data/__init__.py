"""Recipes that make shards, and partitions of them."""
