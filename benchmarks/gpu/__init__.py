"""Memory and speed of training on a GPU, with weights that are made here."""
