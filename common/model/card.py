"""The card of a finished model: its facts, and the README.md that model hubs read.

The server collects the facts and sends them to the sites, so that all of them write the same card.
"""

import json
from typing import Annotated, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from common.config.federation import Dtype
from common.config.load import parse
from common.config.section import Digest, Name, Quantization, Section
from common.config.strategy import StrategyConfig
from common.config.task import TaskConfig
from common.errors import ConfigError, WireError
from common.metrics import SCORES
from common.text import SENTENCE, one_line

_LONGEST = 2**16  # characters of a card that comes as JSON
_PIPELINES = {
    "causal-lm": "text-generation",
    "sequence-classification": "text-classification",
    "image-classification": "image-classification",
}


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("control characters are not allowed")
    return value


Line = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_printable)]
Count = Annotated[int, Field(ge=1, le=2**31)]
Number = Annotated[float, Field(ge=-1.0, le=1e15)]


class CardSection(Section):
    """Base of a card's sections: numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)


class Licence(CardSection):
    """The licence of a base model, as its own folder tells it."""

    id: str = Field("unknown", pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$", description="A model hub's name of the licence.")
    name: Line | None = Field(None, description="Name of a licence whose `id` is other.")
    link: Line | None = Field(None, description="Address, or file, of a licence whose `id` is other.")


class BaseFacts(CardSection):
    """The base model."""

    name: Line = Field(description="Hub id, or name of the folder.")
    revision: Line | None = Field(None, description="Commit of a hub model.")
    digest: Digest = Field(description="SHA-256 of the weights in `dtype`.")
    tokenizer_digest: Digest
    dtype: Dtype
    held: list[Quantization] = Field(
        ["whole"], min_length=1, max_length=3, description="Forms of the untrained weights in memory while training."
    )
    licence: Licence = Licence()


class Spread(CardSection):
    """One score over the sites that tell it."""

    mean: Number = Field(description="Unweighted mean over the sites.")
    deviation: Annotated[float, Field(ge=0, le=1e15)] | None = Field(
        None, description="Standard deviation over the sites; null: one site."
    )
    sites: Count
    before: Number | None = Field(None, description="Mean of the base model.")


class PrivacySpent(CardSection):
    """Differential privacy of the sites that add noise to their updates."""

    sites: Count = Field(description="Number of these sites.")
    epsilon: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        description="Largest that any of them has spent in the run; null: it is above 500."
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(description="Largest of theirs.")


class Card(CardSection):
    """Facts about a finished model. No field names a site or a path."""

    federation: Name
    task: TaskConfig
    base: BaseFacts
    strategy: StrategyConfig
    form: Literal["model", "adapter"] = Field(description="A complete model, or an adapter for the base model.")
    round: Annotated[int, Field(ge=0, le=2**31)] = Field(description="Number of rounds that made the model.")
    rounds: Count = Field(description="Rounds that the federation file asks for.")
    chosen: Literal["last", "best"] = Field("last", description="Why this round's model.")
    by: Line | None = Field(None, description="Metric by which the best round was chosen.")
    sites: Count = Field(description="Number of sites whose updates are in the model.")
    trained_digest: Digest = Field(description="Digest of the federation's trained tensors.")
    personal: bool = Field(False, description="true: with what one site has trained for itself, and never sent.")
    scores: dict[str, Spread] = Field({}, description="Scores on the sites' held-out rows, by name.")
    privacy: PrivacySpent | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        unknown = self.scores.keys() - SCORES.keys()
        if unknown:
            raise ValueError(f"{min(unknown)[:64]!r} is no score; allowed: {', '.join(SCORES)}")
        if self.by is not None and self.by not in (allowed := [score.in_text for score in SCORES.values()]):
            raise ValueError(f"`by` is {self.by[:64]!r}, which is no score; allowed: {', '.join(allowed)}")
        if self.round > self.rounds:
            raise ValueError(f"`round` is {self.round}; allowed: up to `rounds`, {self.rounds}")
        if (self.chosen == "best") != (self.by is not None):
            raise ValueError("`by` names the metric of the best round; give it with `chosen` best, and only then")
        return self

    @property
    def kept_at_sites(self) -> str:
        """The part of the model that every site trains and keeps, in words; empty: none."""
        factor, head = self.strategy.stays_at_site, self.strategy.head == "local"
        return " and ".join([f"LoRA factor {factor}"] * (factor is not None) + ["classification head"] * head)

    def to_json(self) -> str:
        """The card as JSON, for a message."""
        return self.model_dump_json()


S = TypeVar("S", bound=Section)


def read_told(text: str, section: type[S]) -> S:
    """Read a section of facts about a model that comes from the other side as JSON.

    Raises:
        WireError: it is too long, no JSON, or holds a key or value that is not allowed.
    """
    if len(text) > _LONGEST:
        raise WireError(f"the model card has {len(text)} characters; allowed: up to {_LONGEST}")
    try:
        return parse(json.loads(text), section, "model card")
    except (ValueError, RecursionError):
        raise WireError("the model card is no JSON") from None
    except ConfigError as error:  # its text quotes values
        raise WireError(one_line(str(error), SENTENCE)) from None


def render(card: Card) -> str:
    """The card as README.md: YAML front matter as model hubs read it, then a page. Same facts, same text."""
    front = yaml.safe_dump(_front_matter(card), sort_keys=True, allow_unicode=True)
    parts = [_about(card), *_scores(card), *_training(card), *_digests(card), _licence(card.base.licence)]
    return f"---\n{front}---\n\n" + "\n".join([*parts, _use(card)])


def _front_matter(card: Card) -> dict[str, object]:
    adapter, licence = card.form == "adapter", card.base.licence
    named = {"license_name": licence.name, "license_link": licence.link} if licence.id == "other" else {}
    return {
        "base_model": card.base.name,
        "base_model_relation": "adapter" if adapter else "finetune",
        "library_name": "peft" if adapter else "transformers",
        "license": licence.id,
        **{key: value for key, value in named.items() if value is not None},
        "pipeline_tag": _PIPELINES[card.task.type],
        "tags": ["fedspan", "federated-learning", card.strategy.name],
    }


def _about(card: Card) -> str:
    what = f"an adapter for {_code(card.base.name)}" if card.form == "adapter" else f"made of {_code(card.base.name)}"
    which = f"the best by {card.by}" if card.by else f"the last of {card.rounds}"
    text = (
        f"# {card.federation}\n\nA {_PIPELINES[card.task.type].replace('-', ' ')} model, {what}: trained by "
        f"{card.sites} site{'s' * (card.sites != 1)} together with FedSpan ({card.strategy.title}, "
        f"{card.strategy.source}). The model is the one after round {card.round}, {which}.\n"
    )
    own = card.kept_at_sites
    if own and card.personal:
        text += f"\nIt holds one site's own {own}, which that site has trained for itself and never sent.\n"
    elif own:
        text += f"\nIt lacks the sites' own {own}, which each site has trained for itself and never sent.\n"
    return text


def _scores(card: Card) -> list[str]:
    if not card.scores:
        return []
    rows = [
        f"| {SCORES[name].title} | {_number(spread.before)} | {_number(spread.mean)} | {_number(spread.deviation)} | "
        f"{spread.sites} |"
        for name in SCORES
        if (spread := card.scores.get(name)) is not None
    ]
    head = ["| score | base model | this model | deviation | sites |", "|---|---|---|---|---|"]
    return [
        "## Scores\n",
        "On the sites' held-out rows: mean and standard deviation over the sites.\n",
        *head,
        *rows,
        "",
    ]


def _training(card: Card) -> list[str]:
    settings = {key: value for key, value in card.strategy.model_dump().items() if key != "name" and value is not None}
    lines = [
        f"- strategy: {card.strategy.title} ({_code(card.strategy.name)})",
        *(f"- {key}: {_code(value)}" for key, value in settings.items()),
        *([f"- untrained weights while training: {_code(card.base.held)}"] if card.base.held != ["whole"] else []),
        f"- rounds: {card.round} of {card.rounds}",
        f"- sites: {card.sites}",
    ]
    if (spent := card.privacy) is not None:
        most = "above 500, which protects nothing" if spent.epsilon is None else f"{spent.epsilon:.4g} at most"
        lines += [
            f"- differential privacy: {spent.sites} of {card.sites} sites added noise to every update; this run has "
            f"spent of the whole shard of each of these epsilon {most}, at delta {spent.delta:g}"
        ]
    return ["## Training\n", *lines, ""]


def _digests(card: Card) -> list[str]:
    base = card.base
    at = f", revision {_code(base.revision)}" if base.revision else ""
    rows = {
        f"base model, {base.dtype}{at}": base.digest,
        "tokenizer": base.tokenizer_digest,
        "trained tensors": card.trained_digest,
    }
    return ["## Digests\n", "| what | SHA-256 |", "|---|---|", *(f"| {w} | `{d}` |" for w, d in rows.items()), ""]


def _licence(licence: Licence) -> str:
    told = " at ".join(_code(text) for text in (licence.name, licence.link) if text)
    name = "is not known" if licence.id == "unknown" else f"is {_code(licence.id)}" + f" ({told})" * bool(told)
    return f"## Licence\n\nThe licence of the base model {name}; it binds the use of this model, too."


def _use(card: Card) -> str:
    question = "image.png" if card.task.type == "image-classification" else "..."
    how = "With FedSpan, in this folder; `fedspan model --help` has the other verbs:"
    return f"\n## Use\n\n{how}\n\n    fedspan model ask . '{question}'\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _code(value: object) -> str:
    """A value as a code span on one line, which no sign in it can end: neither the span nor a table's cell."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    shown = "".join(c if c.isprintable() and c not in "`|" else " " for c in text)
    return f"`{shown.strip()[:256] or '-'}`"
