"""Public data sets as rows of a federation, one function each; ``python -m deploy.data.recipe`` runs them."""
