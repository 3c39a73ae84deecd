"""Read the ``trust`` section of a site file: the keys and bundles whose code may run at the site."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from client.connect.verify import Trust
from common.config.load import load
from common.config.section import resolve
from common.config.site import SiteConfig
from common.errors import ConfigError
from common.system.keys import read_public


def read_trust(site_file: Path) -> Trust | None:
    """The section ``trust`` of a site file, with the public keys read; None when the file has no such section.

    Raises:
        ConfigError: the site file, or a key, is wrong.
    """
    site = load(site_file, SiteConfig)
    if site.trust is None:
        return None
    keys = {}
    for name in site.trust.keys:
        key = read_public(resolve(name, site_file))
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(f"{site_file}: `trust.keys`: {name} is no Ed25519 key, as `fedspan code key` makes them")
        keys[name] = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return Trust(site.name, keys, site.trust.bundles)
