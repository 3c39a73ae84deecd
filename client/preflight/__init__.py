"""The checks that a site makes before it joins, one function each. Stays at home."""
