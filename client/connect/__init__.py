"""A site's connection to a federation: link, worker, agreement, verification of bundles. Stays at home."""
