"""Whether a site may run an app bundle: its SHA-256 is listed at the site, or signed with a key that the site trusts.

Imports neither FedSpan nor Flower: the process that runs a bundle loads this file by its path.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

RECORD_KEY = "bundle-signatures"  # in every message's "config" record: a JSON list of signatures
#: The signed texts. Nothing else that anybody signs has one of these forms, so a signature fits one purpose alone.
BUNDLE = "FedSpan app bundle, signature version 1, sha256 {}\n"
SETTINGS = "FedSpan federation settings, signature version 1, sha256 {}\n"


@dataclass(frozen=True)
class Trust:
    """The keys and bundles that a site trusts.

    Attributes:
        site: the site's name.
        keys: Ed25519 public keys in PEM, by file name.
        bundles: SHA-256 (hex) of bundles that need no signature.
    """

    site: str
    keys: dict[str, str] = field(default_factory=dict)
    bundles: list[str] = field(default_factory=list)


def refusal(content: bytes, signatures: object, trust: Trust) -> str | None:
    """The reason why a bundle must not run; None when it may.

    Args:
        content: the bundle.
        signatures: JSON text from the message: a list of mappings with ``digest`` and ``signature``.
        trust: the keys and bundles that the site trusts.
    """
    digest = hashlib.sha256(content).hexdigest()
    if digest in trust.bundles:
        return None
    listed = _listed(signatures)
    if any(signed_with(key, digest, entry) for entry in listed for key in trust.keys.values()):
        return None
    others = sorted({str(entry.get("digest"))[:16] for entry in listed if entry.get("digest") != digest})
    about = f" (the signatures that came with it are for {', '.join(others[:3])})" if others else ""
    return (
        f"{trust.site}: the app bundle {digest} is not signed by a key in its trust list and not pinned{about}; "
        "nothing of it was run"
    )


def signed_with(key: str, digest: str, entry: Mapping[str, Any], form: str = BUNDLE) -> bool:
    """Whether a signature is valid for a digest and a key.

    Args:
        key: the public key (PEM).
        digest: SHA-256 (hex) of a bundle, or of settings.
        entry: the signature's entry in a file or message.
        form: ``BUNDLE`` or ``SETTINGS``.
    """
    public = load_pem_public_key(key.encode())
    try:
        signature = base64.b64decode(entry["signature"], validate=True)
        assert isinstance(public, Ed25519PublicKey)  # noqa: S101 - checked when the site file was read
        public.verify(signature, form.format(digest).encode())
    except (KeyError, TypeError, ValueError, InvalidSignature):
        return False
    return entry.get("digest") == digest


def _listed(signatures: object) -> list[dict[str, Any]]:
    try:
        found = json.loads(signatures) if isinstance(signatures, str) else []
    except (ValueError, RecursionError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
