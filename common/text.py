"""Texts for people: text from the other side, quantities, versions of packages."""

import importlib.metadata

SENTENCE = 1024  # bytes (UTF-8): longer sentences from the other side are cut
_CUT = " ..."


def one_line(text: str, longest: int | None = None) -> str:
    """Text from the other side on one line; control characters are escaped, so that they cannot command a terminal.

    Args:
        text: the text, of any length.
        longest: most bytes (UTF-8) of the result; a longer one is cut. None: no limit.
    """
    some = " ".join(
        (text if longest is None else text[: longest + 1]).split()
    )  # cut first: the text may have megabytes
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in some)
    if longest is None or (len(text) <= longest and len(shown.encode()) <= longest):
        return shown
    return shown.encode()[: longest - len(_CUT)].decode(errors="ignore").rstrip() + _CUT


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
