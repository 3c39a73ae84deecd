"""Invitations: the operator packs one archive for a hospital, the hospital checks and unpacks it."""
