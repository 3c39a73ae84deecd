"""The cryptography of masked sums, all of it from `cryptography` and pycryptodome.

Every secret is a seed of 16 bytes: X25519 has the strength of 128 bits, and a Shamir share of pycryptodome holds 16.
A key is used for one purpose in one round, because its derivation names both.
"""

import hashlib
import os
from collections.abc import Mapping

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, ssh_key_fingerprint

from common.masking.fixed_point import WORD_BYTES, Words

SEED_BYTES = 16
PUBLIC_BYTES = 32  # a public X25519 key
IDENTITY_BYTES = 49  # a compressed P-384 point
SIGNATURE_BYTES = 96  # r and s
ID_BYTES = 32
_NONCE_BYTES, _TAG_BYTES = 12, 16
DIGEST_BYTES = 32
SEALED_BYTES = _NONCE_BYTES + 2 * SEED_BYTES + _TAG_BYTES + 2 * DIGEST_BYTES  # two shares, and what commits to each
_WIDTH = SIGNATURE_BYTES // 2
_CHUNK = 2**18  # words that are masked at a time
_ZEROS = memoryview(bytes(WORD_BYTES * _CHUNK))


def new_seed() -> bytes:
    """A fresh secret."""
    return os.urandom(SEED_BYTES)


def derived(secret: bytes, purpose: bytes, size: int = 32) -> bytes:
    """A key for one purpose, by HKDF-SHA256."""
    return HKDF(hashes.SHA256(), size, None, purpose).derive(secret)


def exchange_key(seed: bytes, purpose: bytes) -> X25519PrivateKey:
    """The X25519 key of a seed."""
    return X25519PrivateKey.from_private_bytes(derived(seed, purpose))


def public_bytes(key: X25519PrivateKey) -> bytes:
    """The public half, raw."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def agreed(own: X25519PrivateKey, other: bytes) -> bytes:
    """The secret that two keys share.

    Raises:
        ValueError: the other's public key is of low order, so that the secret would be known to everybody.
    """
    return own.exchange(X25519PublicKey.from_public_bytes(other))


def add_mask(vector: Words, key: bytes, *, negative: bool = False) -> None:
    """Add uniform words to a vector, in place, modulo 2^32; or subtract them. The key is used for this alone.

    AES-256 in counter mode gives the words, a chunk at a time.
    """
    encryptor = Cipher(AES(key), CTR(bytes(16))).encryptor()
    for first in range(0, len(vector), _CHUNK):
        part = vector[first : first + _CHUNK]
        words = np.frombuffer(encryptor.update(_ZEROS[: WORD_BYTES * len(part)]), "<u4")
        (np.subtract if negative else np.add)(part, words, out=part)


def seal(key: bytes, shares: tuple[bytes, bytes]) -> bytes:
    """Encrypt two shares for whoever has the key: AES-256-GCM, the nonce first; then each share's digest, in the open.

    The digests commit to the shares. They tell nothing of them, because a share is 128 uniform bits.
    """
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, b"".join(shares), None) + b"".join(map(digest, shares))


def unseal(key: bytes, sealed: bytes) -> tuple[bytes, bytes] | None:
    """The two shares; None: they were sealed with another key, or changed, or are not those that the digests are of."""
    hidden, digests = sealed[: -2 * DIGEST_BYTES], committed(sealed)
    try:
        plain = AESGCM(key).decrypt(hidden[:_NONCE_BYTES], hidden[_NONCE_BYTES:], None)
    except InvalidTag:
        return None
    shares = plain[:SEED_BYTES], plain[SEED_BYTES:]
    return shares if (digest(shares[0]), digest(shares[1])) == digests else None


def committed(sealed: bytes) -> tuple[bytes, bytes]:
    """The digests of two sealed shares."""
    return sealed[-2 * DIGEST_BYTES : -DIGEST_BYTES], sealed[-DIGEST_BYTES:]


def digest(share: bytes) -> bytes:
    """SHA-256."""
    return hashlib.sha256(share).digest()


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shamir's shares of a seed, for members 1 to ``count``; any ``threshold`` of them give it back."""
    return [share for _, share in Shamir.split(threshold, count, secret, ssss=False)]


def combined(shares: Mapping[int, bytes]) -> bytes:
    """The seed of exactly as many shares as its threshold, by member."""
    return bytes(Shamir.combine(list(shares.items()), ssss=False))


def sign(key: ec.EllipticCurvePrivateKey, text: bytes) -> bytes:
    """A signature with a P-384 key: ECDSA over SHA-384, r and s one after the other."""
    return b"".join(n.to_bytes(_WIDTH) for n in decode_dss_signature(key.sign(text, ec.ECDSA(hashes.SHA384()))))


def signed(key: ec.EllipticCurvePublicKey, signature: bytes, text: bytes) -> bool:
    """Whether a signature is the key's, of this text."""
    r, s = (int.from_bytes(half) for half in (signature[:_WIDTH], signature[_WIDTH:]))
    try:
        key.verify(encode_dss_signature(r, s), text, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def identity_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """A P-384 key, compressed."""
    return key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)


def identity_of(raw: bytes) -> ec.EllipticCurvePublicKey:
    """The inverse of ``identity_bytes``.

    Raises:
        ValueError: this is no point of the curve.
    """
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), raw)


def id_of(key: ec.EllipticCurvePublicKey) -> bytes:
    """The SHA-256 of a key, raw; ``parts.shown`` shows it as ``ssh-keygen -l`` does."""
    return ssh_key_fingerprint(key, hashes.SHA256())
