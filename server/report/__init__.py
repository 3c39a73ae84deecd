"""A run's report: one page. Stays at home."""
