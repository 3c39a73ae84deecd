"""Sites that have agreed to what a federation file asks of them, for tests that start no launcher."""

from pathlib import Path

import yaml

from client.privacy.agreement import agree_for_own_sites, agreements_of
from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.config.site import SiteConfig


def agree_all(file: Path) -> Path:
    """Let every site of a federation file's ``local.sites`` agree to it; the file."""
    federation = resolved(load(file, FederationConfig), file)
    for name in yaml.safe_load(file.read_text())["local"]["sites"]:
        site = file.parent / name
        agree_for_own_sites(agreements_of(load(site, SiteConfig), site), federation)
    return file
