"""The rounds of a federation: send, wait, aggregate, save."""
