"""Low-rank algebra."""
