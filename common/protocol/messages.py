"""All messages between server and site; nothing else is sent.

A message holds records, as in Flower's own apps: "arrays" and "step-NNNNNN" hold tensors, "config" and "privacy"
settings, "metrics" numbers. Every message is a class here; each field declares its key, its kind, and when its value
stays at the site. The sender makes an instance and calls ``to_record``; the receiver calls ``read``, which rejects
everything that is not declared. ``docs/what-leaves.md`` is made from these declarations.

The server sends requests (``HelloRequest``, ``TrainRequest``, ``EvaluateRequest``), the site sends replies (``Hello``,
``TrainReply``, ``EvaluateReply``, or a ``Failure``). A ``State`` brings a site to the state of a round: ``active``
names the tensors to train and return; for frozen tensors that the site has kept, ``frozen_digest`` is the digest of all
of them (decision 003). Where a strategy makes each state from the last one by a step, ``arrays`` is empty, and
``steps`` lead from the version that the site holds to the state's version (decision 005).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated

from common.config.section import NAME, SERVER
from common.config.site import PrivacyConfig
from common.errors import AT_A_SITE, FedSpanError, WireError
from common.protocol.fields import (
    CONFIG as CONFIG,
    METRICS as METRICS,
    Arrays,
    Content,
    Entry,
    Numbered,
    Numbers,
    Part,
    plain,
)
from common.protocol.kinds import FLAG, POSITIVE, line, matching, names, text, whole
from common.protocol.measures import CLOCK, EVALUATED as EVALUATED, SECONDS, TRAINING as TRAINING, WITHOUT_SCORES
from common.text import SENTENCE, one_line

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Error, RecordDict

ARRAYS, PRIVACY, STEP = "arrays", "privacy", "step-{:06}"
NUM_EXAMPLES, LORA_ALPHA = "num-examples", "lora-alpha"  # Flower's name, and ours beside it
SIGNATURES = "bundle-signatures"  # ``client.connect.verify`` has a copy, because it imports nothing of a bundle
_JSON, _LINE = text(2**20), line(256)
_DIGEST, _ABOUT = line(64), text(2**17)
_KEEPS = matching("end|best|every", "end, best or every")
_SITE = matching(rf"(?!{SERVER}$){NAME}", f"letters, digits, '.', '_' and '-', up to 64, but not {SERVER}")
_NAMES = names(longest=512, most=2**17)


@dataclass(frozen=True, kw_only=True)
class HelloRequest(Content):
    """Ask a site for its hello, the handshake before a site takes part. All requests have these fields, too."""

    federation: Annotated[
        str, Entry("federation", _JSON, "the federation file, but for what concerns the server alone")
    ]
    signatures: Annotated[str | None, Entry(SIGNATURES, _JSON, "who vouches for the code that came", optional=True)]
    run: Annotated[
        str | None, Entry("run-identity", _DIGEST, "which run it is, also when it was resumed", optional=True)
    ] = None


@dataclass(frozen=True, kw_only=True)
class State(Content):
    """The state of a round, or the tensors or steps that a site lacks to make it."""

    server_round: Annotated[int, Entry("server-round", whole(0), "number of the round")]
    active: Annotated[list[str], Entry("active", _NAMES, "names of the tensors to train and return")]
    version: Annotated[str | None, Entry("version", _DIGEST, "version of the state", optional=True)] = None
    since: Annotated[str | None, Entry("since", _DIGEST, "version before the steps", optional=True)] = None
    frozen_digest: Annotated[str | None, Entry("frozen-digest", _DIGEST, "digest of frozen tensors", optional=True)] = (
        None
    )
    arrays: Annotated["ArrayRecord", Arrays(ARRAYS, "tensors of the state that the site lacks")]
    steps: Annotated[Mapping[int, "ArrayRecord"], Numbered(STEP, "steps by round")] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.version is None and self.since is not None) or (self.since is None and self.steps):
            raise WireError("steps come without the version that they lead from (since), or to (version)")

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors (without Flower's envelope)."""
        from common.protocol import wire

        return sum(map(wire.num_bytes, [self.arrays, *self.steps.values()]))


@dataclass(frozen=True, kw_only=True)
class TrainRequest(HelloRequest, State):
    """A round's work: train from a state."""

    evaluate: Annotated[bool, Entry("evaluate", FLAG, "whether to evaluate the state first")]
    best: Annotated[int | None, Entry("best-round", whole(1), "the best round so far", optional=True)] = None
    about: Annotated[
        str | None, Entry("about-model", _ABOUT, "the state's model card, for a site that keeps all", optional=True)
    ] = None

    @classmethod
    def of(
        cls, settings: HelloRequest, state: State, best: int | None = None, about: str | None = None, *, evaluate: bool
    ) -> "TrainRequest":
        """Make the request to train from a state; ``settings`` gives the fields of every request."""
        return cls(**vars(settings), **vars(state), evaluate=evaluate, best=best, about=about)


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(HelloRequest, State):
    """Evaluate a state; nothing is trained."""

    @classmethod
    def of(cls, settings: HelloRequest, state: State) -> "EvaluateRequest":
        """Make the request to evaluate a state; ``settings`` gives the fields of every request."""
        return cls(**vars(settings), **vars(state))


@dataclass(frozen=True, kw_only=True)
class DeliverRequest(HelloRequest, State):
    """Write a round's model to keep; the state is empty unless the site has answered that it lacks it."""

    about: Annotated[
        str, Entry("about-model", _ABOUT, "how the model is used, and its card with the digest of its tensors")
    ]


@dataclass(frozen=True)
class Declared(Content):
    """The noise and limits of a site's differential privacy, as the site declares them to the server."""

    clip: Annotated[float, Entry("clip", POSITIVE, "L2 norm to which an update is clipped", PRIVACY)]
    noise: Annotated[float, Entry("noise", POSITIVE, "standard deviation of the noise on every number", PRIVACY)]
    delta: Annotated[float, Entry("delta", POSITIVE, "delta of the guarantee", PRIVACY)]
    max_epsilon: Annotated[float, Entry("max_epsilon", POSITIVE, "budget, after which the site stops", PRIVACY)]

    @classmethod
    def of(cls, config: PrivacyConfig, part: float = 0.0) -> "Declared":
        """Make the declaration from a site file's section ``privacy``; ``part``: a site's part of a shared noise."""
        noise = part if config.noise == "shared" else config.noise_multiplier * config.clip
        return cls(config.clip, noise, config.delta, config.max_epsilon)


@dataclass(frozen=True, kw_only=True)
class Reply(Content):
    """The fields of every reply."""

    seconds: Annotated[Mapping[str, float], Numbers("seconds.", SECONDS, "by what they were spent on")] = field(
        default_factory=dict
    )
    clock: Annotated[Mapping[str, float], Numbers("clock.", CLOCK, "Unix times of the site")] = field(
        default_factory=dict
    )


@dataclass(frozen=True, kw_only=True)
class Hello(Reply):
    """A site's answer to the hello request, before it takes part."""

    site: Annotated[str, Entry("site", _SITE, "the site's name")]
    train_rows: Annotated[int, Entry("train_rows", whole(1), "number of training rows")]
    held_out_rows: Annotated[
        int, Entry("held_out_rows", whole(0), "number of held-out rows", stays=WITHOUT_SCORES, instead=0)
    ]
    device: Annotated[str, Entry("device", _LINE, "the device")]
    rank: Annotated[int, Entry("rank", whole(0), "rank of LoRA or GaLore here")]
    base_digest: Annotated[str, Entry("base_digest", _DIGEST, "digest of the base model")]
    tokenizer_digest: Annotated[str, Entry("tokenizer_digest", _DIGEST, "digest of the tokenizer")]
    version: Annotated[str, Entry("version", _LINE, "version of FedSpan that is installed here")]
    keeps: Annotated[str | None, Entry("keeps-model", _KEEPS, "which models it keeps (`keep.when`)", optional=True)] = (
        None
    )
    privacy: Annotated[Declared | None, Part(PRIVACY, Declared, "its `privacy`")] = None

    @classmethod
    def site_in(cls, content: "RecordDict") -> str | None:
        """The site's name in a hello that is otherwise unreadable, for the error; None: the name is unreadable, too."""
        site = dict(content.get(CONFIG, {})).get("site")
        return str(site) if _SITE.holds(site) else None


@dataclass(frozen=True, kw_only=True)
class DeliverReply(Reply):
    """A site's answer when it was to write a model."""

    files: Annotated[
        str | None,
        Entry(
            "files-digest", _DIGEST, "digest of all files of the model as written; absent: not written", optional=True
        ),
    ] = None
    reason: Annotated[str | None, Entry("not-written", _LINE, "why it is not written", optional=True)] = None


@dataclass(frozen=True, kw_only=True)
class EvaluateReply(Reply):
    """A site's scores of a state."""

    scores: Annotated[Mapping[str, float], Numbers("evaluate.", EVALUATED, "on held-out rows")] = field(
        default_factory=dict
    )


@dataclass(frozen=True, kw_only=True)
class TrainReply(EvaluateReply):
    """A site's update in a round, and its scores of the round's state if the server asked for an evaluation."""

    server_round: Annotated[int, Entry("server-round", whole(1), "number of the round")]
    arrays: Annotated["ArrayRecord", Arrays(ARRAYS, "the tensors that were asked for, as trained")]
    num_examples: Annotated[int, Entry(NUM_EXAMPLES, whole(1), "number of training rows", METRICS)]
    lora_alpha: Annotated[float | None, Entry(LORA_ALPHA, POSITIVE, "LoRA's alpha", METRICS, optional=True)] = None
    training: Annotated[Mapping[str, float], Numbers("train.", TRAINING, "of the training")] = field(
        default_factory=dict
    )
    version: Annotated[str | None, Entry("version", _DIGEST, "version of the state kept here", optional=True)] = None
    frozen_digest: Annotated[
        str | None, Entry("frozen-digest", _DIGEST, "digest of frozen tensors kept here", optional=True)
    ] = None

    @classmethod
    def of_any_client(
        cls, content: "RecordDict", server_round: int, arrays_key: str, config_key: str, weight_key: str
    ) -> "TrainReply":
        """Read a training reply of any Flower app's client: unknown keys are ignored, few keys are required.

        Args:
            content: the reply's content.
            server_round: the round to assume when the reply names none.
            arrays_key: key of the record of tensors.
            config_key: key of the record of settings.
            weight_key: key of the number of examples.

        Raises:
            WireError: the reply has no tensors or no number of examples, or a value is not allowed.
        """
        records = plain(content)
        arrays, config, metrics = (records.get(key) for key in (arrays_key, config_key, METRICS))
        if arrays is None or isinstance(arrays, dict):
            raise WireError(f"the reply has no {arrays_key!r} record")
        settings, numbers = (part if isinstance(part, dict) else {} for part in (config, metrics))
        digest, alpha = settings.get("frozen-digest"), numbers.get(LORA_ALPHA)
        return cls(
            arrays=arrays,
            server_round=whole(0).check("server-round", settings.get("server-round", server_round)),
            num_examples=whole(1).check(weight_key, numbers.get(weight_key)),
            lora_alpha=None if alpha is None else float(POSITIVE.check(LORA_ALPHA, alpha)),
            frozen_digest=digest if isinstance(digest, str) else None,
        )


@dataclass(frozen=True)
class Failure:
    """A reply that is an error.

    Attributes:
        code: code of the error's class, or one of Flower's own codes.
        reason: the sentence for the operator, on one line and cut; empty when there is none.
    """

    code: int
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", one_line(self.reason, SENTENCE))

    @property
    def kind(self) -> str:
        """The error's name in a run's records."""
        return failures()[self.code]

    @classmethod
    def of(cls, error: FedSpanError) -> "Failure":
        """Make the failure for an error, with the error's own text."""
        return cls(next(kind.code for kind in type(error).__mro__ if kind in AT_A_SITE), str(error))

    def to_error(self) -> "Error":
        """As Flower sends it."""
        from flwr.app import Error

        return Error(self.code, self.reason)

    @classmethod
    def read(cls, error: "Error") -> "Failure":
        """Read the failure in an error reply.

        Raises:
            WireError: nothing has this code.
        """
        if error.code not in failures():
            raise WireError(f"its error has code {error.code}; allowed: {', '.join(map(str, sorted(failures())))}")
        return cls(error.code, error.reason or "")


@cache
def failures() -> dict[int, str]:
    """Names of all errors that a reply may hold, by code: FedSpan's classes, and Flower's own codes."""
    from flwr.common.constant import ErrorCode

    flowers = {code: name for name, code in vars(ErrorCode).items() if name.isupper()}
    return flowers | {error.code: error.__name__ for error in AT_A_SITE}
