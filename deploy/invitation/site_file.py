"""The site file in an invitation: complete but for values that only the hospital knows or may decide."""

from pathlib import Path
from typing import Any

import yaml

from common.config.federation import FederationConfig
from common.config.load import load
from common.config.outcome import KeepConfig
from common.config.site import SiteConfig
from common.errors import ConfigError

FILL_IN = "FILL-IN"
_KEYS = {"name", "data", "model", "trust", "policy", "keep"}
_KEEP = {"model": "models"}  # beside the site file
_HEAD = f"""\
# Site {{site}} in federation {{federation}}. What says {FILL_IN} is yours to fill in:
#   data.path     your rows, relative to this file        data.prompt, data.answer   columns, or templates of columns
#   model         your copy of the base model; its digests are in federation.yaml
# The federation's model comes to the folder that `keep` names, beside this file; without `keep` you get none.
# Limits on what leaves (`policy`, `privacy`) and all other keys: docs/privacy.md and docs/reference.md.
"""


def site_file(site: str, federation: FederationConfig, values: dict[str, Any]) -> str:
    """Make the text of a site file.

    Args:
        site: the site's name.
        federation: the federation that the site takes part in.
        values: known values of the data's `path`, `prompt` and `answer`, of `model` and of `trust`.
    """
    data = {key: values.get(key) or FILL_IN for key in ("path", "prompt", "answer")}
    hub = federation.model.hub
    model = values.get("model") or ({"hub": hub, "revision": federation.model.revision} if hub else FILL_IN)
    content: dict[str, Any] = {"name": site, "data": {**data, "held_out": 0.1}, "model": model}
    if values.get("trust"):
        content["trust"] = values["trust"]
    content["keep"] = _KEEP
    content["policy"] = {"federations": [federation.name]}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return _HEAD.format(site=site, federation=federation.name) + text


def proposed(file: Path) -> SiteConfig:
    """Read a site file that came with an invitation.

    Raises:
        ConfigError: the file is wrong, or sets a key that only the hospital may decide.
    """
    site = load(file, SiteConfig)
    keys = site.model_fields_set - _KEYS | {f"policy.{key}" for key in site.policy.model_fields_set - {"federations"}}
    if keys or (site.model is not None and site.model.path not in (None, FILL_IN)):
        what = min(keys, default="model.path")
        raise ConfigError(f"{file}: sets `{what}`, which is for the site alone to decide")
    if site.keep not in (None, KeepConfig.model_validate(_KEEP)):
        raise ConfigError(f"{file}: `keep` is for the site alone to decide; allowed in an invitation: {_KEEP}")
    return site
