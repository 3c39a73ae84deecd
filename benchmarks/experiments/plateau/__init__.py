"""Runs to the plateau on two cores: small models, trained beforehand on other rows, with enough rows for long runs."""
