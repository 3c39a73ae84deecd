"""Federated strategies: one file each says what is sent, how replies are combined, what is reported."""
