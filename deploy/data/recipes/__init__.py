"""Public data sets as rows of a federation, one function each; ``fedspan data recipe`` runs them."""
