"""Many light sites on a real supervised server: the cost of a round beside training."""
