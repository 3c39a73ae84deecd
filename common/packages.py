"""Which version of a package is installed here."""

import importlib.metadata


def installed(package: str) -> str:
    """The version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
