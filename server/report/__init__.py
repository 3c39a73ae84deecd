"""The page that a run leaves. Stays at home."""
