"""Which updates are let into the average."""
