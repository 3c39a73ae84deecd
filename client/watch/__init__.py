"""Shows a site to its own people while it takes part. Stays at home."""
