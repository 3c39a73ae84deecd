"""A picture of who holds how much of what: a bar per site, hatched by label, readable without color."""

from pathlib import Path

_MOST_LABELS = 10  # the rest is drawn as one
_HATCHES = ("", "///", "...", "\\\\\\", "xx", "---", "++", "oo", "|||", "**")
_GREYS = ("0.35", "0.85", "1.0", "0.6", "0.92", "0.75", "1.0", "0.85", "0.65", "0.95")


def draw(file: Path, names: list[str], rows: list[int], labels: list[dict[str, int]]) -> None:
    """Write an SVG.

    Args:
        file: to be written.
        names: of the sites.
        rows: how many each holds.
        labels: by site, how many rows of each label; empty mappings when there are none.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    totals: dict[str, int] = {}
    for counts in labels:
        for label, count in counts.items():
            totals[label] = totals.get(label, 0) + count
    shown = sorted(sorted(totals), key=lambda label: -totals[label])
    shown, rest = sorted(shown[:_MOST_LABELS]), set(shown[_MOST_LABELS:])
    bars = [(label, [counts.get(label, 0) for counts in labels]) for label in shown]
    if rest:
        bars.append((f"{len(rest)} more", [sum(c.get(label, 0) for label in rest) for c in labels]))
    bars = bars or [("rows", rows)]
    with mpl.rc_context(
        {"svg.hashsalt": "fedspan", "hatch.linewidth": 0.6, "svg.fonttype": "none", "text.parse_math": False}
    ):
        figure = Figure(figsize=(8, 1.4 + 0.38 * len(names)), layout="constrained")
        axes = figure.subplots()
        begin = [0] * len(names)
        for number, (label, held) in enumerate(bars):
            hatch, grey = ("", "0.5") if len(bars) == 1 else (_HATCHES[number % 10], _GREYS[number % 10])
            color = "0.2" if label.endswith(" more") and rest and number == len(bars) - 1 else grey
            axes.barh(names, held, left=begin, height=0.7, color=color, edgecolor="black", hatch=hatch, label=label)
            begin = [a + b for a, b in zip(begin, held, strict=True)]
        for row, total in enumerate(rows):
            axes.text(total, row, f" {total:,}", va="center", fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel("rows")
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        if len(bars) > 1:
            figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        figure.savefig(file, metadata={"Date": None, "Creator": "FedSpan"})
