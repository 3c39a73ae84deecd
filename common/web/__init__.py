"""Pages in a browser: one shell, one style, how numbers are written. Stay at home."""
