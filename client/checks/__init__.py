"""What ``python -m client.check`` looks at: one function per check, by subject."""
