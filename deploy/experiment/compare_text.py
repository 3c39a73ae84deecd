"""The sentences of a comparison, the same on the page and in Markdown."""

from common.config.strategy import title_of
from common.metrics import SCORES
from deploy.experiment.compare_data import Comparison


def headline(found: Comparison) -> list[str]:
    """For each measured headline score: the strategies that were best, and in how many settings."""
    sentences = []
    for how in [score for score in SCORES.values() if score.headline]:
        judged = [group for group in found.groups if how in group.scores() and len(group.lines) > 1]
        wins: dict[str, int] = {}
        for strategy in (strategy for group in judged for strategy in group.best(how)):
            wins[title_of(strategy)] = wins.get(title_of(strategy), 0) + 1
        if judged and not wins:
            sentences.append(f"Mean {how.in_text}: the same of all strategies.")
        elif len(judged) == 1:
            sentences.append(f"Best mean {how.in_text}: {' and '.join(wins)}.")
        elif wins:
            told = ", ".join(f"{who} in {count}" for who, count in sorted(wins.items(), key=lambda w: (-w[1], w[0])))
            sentences.append(f"Best mean {how.in_text} of {len(judged)} settings: {told}.")
    return sentences or ["There is no result to compare yet."]


def notes(found: Comparison) -> list[str]:
    """Notes on how to read the tables: paragraphs."""
    lines = [line for group in found.groups for line in group.lines]
    first = ["After the last round, on the test set: mean ± sample standard deviation over the seeds."]
    seeds = [seed for line in lines for seed in line.seeds]
    judged = _range({seed.examples for seed in seeds if seed.examples})
    generated = _range({seed.generated for seed in seeds if seed.generated})
    if judged:
        first.append(f"Judged on {judged} rows of it{f'; {generated} of them were answered' if generated else ''}.")
    first.append("The best mean of a setting is bold; a difference smaller than the deviations may be chance.")
    tried = [line for line in lines if line.tried]
    if tried:
        name = SCORES[found.select_by].in_text
        several = "" if len(tried) == len(lines) else ", where several were tried"
        first.append(
            f"The learning rate is the one with the best {name} on the validation set, with one seed{several}."
        )
    else:
        first.append("One learning rate was given, and none picked.")
    if any(line.until is not None for line in lines):
        first[0] = (
            "On the test set, in the round that was best on the validation set: mean ± sample standard deviation."
        )
    if any(line.unfinished for line in lines):
        first.append("‡ marks a round that was the last one: no plateau was seen.")
    if any(line.edge for line in lines):
        first.append("† marks the smallest or largest of those tried, beyond which there may be a better one.")
    without = [
        f"{title_of(line.strategy)} with {group.title}: {', '.join(unscored(line.unscored))}"
        for group in found.groups
        for line in group.lines
        if line.unscored
    ]
    return [" ".join(first), *([f"Learning rates without a score: {'; '.join(without)}."] if without else [])]


def unscored(rates: dict[float, str]) -> list[str]:
    """Learning rates that gave no score, each with the reason."""
    return [f"{rate:g} ({why})" for rate, why in rates.items()]


def _range(counts: set[int]) -> str:
    return "–".join(f"{count:,}" for count in sorted({min(counts), max(counts)})) if counts else ""
