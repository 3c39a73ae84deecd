"""What a site keeps on its disk from one run to the next."""
