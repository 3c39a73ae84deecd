"""A site's side: ClientApp, training loop, GaLore, private data."""
