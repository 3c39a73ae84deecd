"""Site files on this machine, checked before anything is started."""

from collections.abc import Iterable
from pathlib import Path

from common.config.federation import FederationConfig
from common.config.load import load
from common.config.section import resolve
from common.config.site import SiteConfig
from common.errors import ConfigError, DataError, ModelError


def check_sites(files: Iterable[Path], federation: FederationConfig, source: Path) -> dict[str, Path]:
    """Read and check site files; return the files by the sites' names.

    Args:
        files: absolute paths.
        federation: the federation, with absolute paths.
        source: the federation file's path, for errors.

    Raises:
        ConfigError: a file is wrong, two sites share a name, a ledger or a folder for models, or there are too few.
        DataError: a shard does not exist.
        ModelError: a model's folder does not exist.
    """
    sites: dict[str, Path] = {}
    ledgers: dict[Path, Path] = {}
    models: dict[Path, Path] = {}
    for path in files:
        site = load(path, SiteConfig)
        if site.name in sites:
            raise ConfigError(f"{path}: `name` {site.name!r} is also the name of {sites[site.name]}")
        shard = resolve(site.data.path, path)
        if not shard.exists():
            raise DataError(f"{path}: shard {shard} does not exist")
        if site.model is None:
            _check_model(federation.model.path, source)
        elif site.model.path is not None:
            _check_model(str(resolve(site.model.path, path)), path)
        if (ledger := site.ledger_file(path)) in ledgers:
            raise ConfigError(f"{path}: `ledger` {ledger} is also that of {ledgers[ledger]}; each site needs its own")
        site.check_model_folder(path, federation.name)
        if (folder := site.model_folder(path, federation.name)) is not None:
            if folder in models:
                raise ConfigError(f"{path}: `keep.model` is also that of {models[folder]}; each site needs its own")
            models[folder] = path
        sites[site.name] = ledgers[ledger] = path
    _check_enough(federation, len(sites), source)
    return sites


def _check_enough(federation: FederationConfig, sites: int, source: Path) -> None:
    for key in ("min_clients", "size"):
        if (needed := getattr(federation.cohort, key) or 0) > sites:
            raise ConfigError(f"{source}: `cohort.{key}` is {needed}, but `local.sites` lists {sites}")


def _check_model(path: str | None, file: Path) -> None:
    if path is not None and not (Path(path) / "config.json").is_file():
        raise ModelError(f"{file}: model folder {path} does not exist or holds no config.json")
