"""Quantities as a person reads them, and the versions of packages."""

import importlib.metadata


def size(count: float) -> str:
    """Bytes in readable units (1 kB = 1000 B)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def clock(seconds: float | None) -> str:
    """A duration as h:mm:ss; a dash for one that is not known."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(max(round(seconds), 0), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def installed(package: str) -> str:
    """The version of a package that is installed here, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
