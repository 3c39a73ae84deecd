"""The files that people write: federation file and site file."""
