"""What an operator hands to a hospital: one archive, made by the one and taken apart by the other."""
