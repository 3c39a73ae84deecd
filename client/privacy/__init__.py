"""What may leave a site: policy, noise and the ledger of what left."""
