"""Files that a site keeps from one run to the next."""
