"""Limits on the data that leaves a site: agreement, policy, noise; and the ledger of all that left."""
