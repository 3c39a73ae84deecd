"""A small line chart as SVG, drawn of a site's own numbers; colours are the page's."""

from collections.abc import Mapping

from markupsafe import Markup

from common.web.format import score

_WIDTH, _HEIGHT, _LEFT, _BELOW, _ABOVE = 560, 220, 52, 34, 26  # the drawing and its margins


def chart(lines: Mapping[str, Mapping[int, float]], rounds: int, label: str) -> Markup:
    """Lines over rounds, each told apart by its dashes and its name.

    Args:
        lines: values by round, by the line's name.
        rounds: rounds in all, the end of the x axis.
        label: the chart in words.
    """
    values = [value for line in lines.values() for value in line.values()]
    if not values:
        return Markup("")
    low, high = min(values), max(values)
    reach = (high - low) or abs(high) or 1.0
    low, high = low - 0.08 * reach, high + 0.08 * reach

    def x(number: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - 12) * number / max(rounds, 1), 1)

    def y(value: float) -> float:
        return round(_ABOVE + (_HEIGHT - _ABOVE - _BELOW) * (high - value) / (high - low), 1)

    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, _HEIGHT, label)]
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        parts.append(
            Markup('<path class="grid" d="M{} {}H{}"/><text x="{}" y="{}" text-anchor="end">{}</text>').format(
                _LEFT, y(value), _WIDTH - 12, _LEFT - 8, y(value) + 4, score(value)
            )
        )
    for number in sorted({0, rounds // 2, rounds}):
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(x(number), _HEIGHT - 14, number)
        )
    for place, (name, line) in enumerate(lines.items()):
        path = " ".join(f"{'L' if n else 'M'}{x(number)} {y(value)}" for n, (number, value) in enumerate(line.items()))
        dots = Markup("").join(
            Markup('<circle cx="{}" cy="{}" r="3"/>').format(x(number), y(value)) for number, value in line.items()
        )
        left = _LEFT + 230 * place
        parts.append(
            Markup('<g class="line-{}"><path d="{}"/>{}<path d="M{} 10h26"/></g><text x="{}" y="14">{}</text>').format(
                place, path, dots, left, left + 32, name
            )
        )
    return Markup("").join([*parts, Markup("</svg>")])
