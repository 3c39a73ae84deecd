"""A site's connection to the SuperLink: reached, judged, tried again, and what it does otherwise than Flower."""
