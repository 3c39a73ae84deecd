"""A site's training loop and its optimizers."""
