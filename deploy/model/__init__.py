"""A finished model put to use: ask it, score it on a file, merge its adapter, read its card. All of it offline."""
