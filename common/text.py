"""Texts as a person reads them: what somebody else has written, quantities, versions of packages."""

import importlib.metadata

SENTENCE = 1024  # bytes (UTF-8) of a sentence that the other side has written; a longer one is cut
_CUT = " ..."


def one_line(text: str, longest: int | None = None) -> str:
    """What somebody else has written, on one line; a control character is shown, not sent to a terminal or page.

    Args:
        text: of any length.
        longest: bytes (UTF-8) after which it is cut; None: it is not cut.
    """
    some = " ".join((text if longest is None else text[: longest + 1]).split())  # of megabytes only what is shown
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
