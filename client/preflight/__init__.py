"""One function per thing that a site checks before it joins. Stays at home."""
