"""Certificates, keys and signatures of the app bundle."""
