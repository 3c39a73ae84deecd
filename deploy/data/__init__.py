"""Recipes that make rows of public data sets, and partitions of rows among sites."""
