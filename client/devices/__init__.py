"""Several devices of one site: a process for each, and their part in a round (decision 037)."""
