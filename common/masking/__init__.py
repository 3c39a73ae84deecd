"""Masked sums: the server learns the sum of the sites' vectors, and no single vector (Bonawitz et al., CCS 2017).

Bytes in, bytes out: no Flower, no torch. ``site`` and ``server`` are the two sides of one round, ``parts`` what travels
between them, ``primitives`` the cryptography, ``fixed_point`` how numbers become integers.
"""
