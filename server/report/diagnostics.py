"""Titles and meanings of the strategies' diagnostics, and the shading of their tables."""

from typing import Any

from server.run import records

MEANINGS = {
    "client-cosine": (
        "Agreement of the sites",
        "mean cosine between two sites' updates; 1: the same direction, 0: unrelated, below 0: against each other",
    ),
    "wire-error": (
        "What rounding on the wire did",
        "relative error of each site's update, and of the mean that went down, in the federation's wire_precision",
    ),
    "waiting": (
        "What waits at the server",
        "norm of what later rounds will send (`downlink_rank`), relative to the round's mean change",
    ),
    "client-norm": ("Size of the sites' updates", "mean L2 norm of a site's change of what it trains"),
    "truncation-loss": (
        "Truncation loss",
        "share of the averaged product's energy that the federation's rank leaves out",
    ),
    "numerical-rank": ("Numerical rank", "of the averaged product: singular values above a millionth of the largest"),
    "stable-rank": ("Stable rank", "of the averaged product: its energy over that of its largest singular value"),
    "aggregation-error": (
        "Aggregation error",
        "distance of the product of averages from the average of products, relative; 0: exact",
    ),
    "residual": (
        "Residual",
        "what the averages of A and B lose and the base weights take, relative to the average of products",
    ),
    "clip-factor": ("Norm clipping", "what a site's change was multiplied by; 1: not clipped"),
    "clipped": ("Sites clipped", "sites whose change was longer than clip_norm medians"),
    "krum-selected": ("Krum's choice", "1: the site's update was taken, 0: it was left out"),
    "trimmed": ("Values trimmed", "updates left out at either end of every coordinate"),
}
_DARKEST = 35  # per cent of --shade in the cell with the largest number


def shaded(table: records.Diagnostic) -> dict[str, Any]:
    """A diagnostic as a table: per layer group (value, shade in per cent)."""
    title, meaning = MEANINGS.get(table.name, (table.name.replace("-", " ").capitalize(), ""))
    values = [v for cells in table.groups.values() for v in cells.values() if v is not None]
    low, high = min(values, default=0.0), max(values, default=0.0)

    def shade(value: float | None) -> int:
        return round(_DARKEST * (value - low) / (high - low)) if value is not None and high > low else 0

    lines = [(g, [(cells.get(n), shade(cells.get(n))) for n in table.rounds]) for g, cells in table.groups.items()]
    return {"title": title, "meaning": meaning, "rounds": table.rounds, "lines": lines}
