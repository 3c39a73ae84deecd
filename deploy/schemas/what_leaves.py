"""``docs/what-leaves.md``: all that a site sends and receives, for its data-protection officer; made from the code."""

from collections.abc import Iterable, Iterator

from flwr.common.constant import ErrorCode

from common import errors
from common.protocol.exchanges import ExchangeReply, ExchangeRequest, MaskedTrainReply, MaskedTrainRequest
from common.protocol.fields import Arrays, Content, Entry, Measure, Numbered, Numbers, Part
from common.protocol.messages import (
    DeliverReply,
    DeliverRequest,
    EvaluateReply,
    Hello,
    HelloRequest,
    Reply,
    State,
    TrainReply,
    TrainRequest,
    failures,
)

_HEAD = """# What leaves a site, and what comes in

Made from [messages.py](../common/protocol/messages.py) and [exchanges.py](../common/protocol/exchanges.py) in
common/protocol by `fedspan schemas`; a test holds them together.

Server and site exchange the messages below, and nothing else through FedSpan. Flower itself needs a site's public key,
its address and heartbeats. The receiver of a message rejects keys that are not listed here, and values that are not
allowed here. No message holds a row, a prompt, an answer, generated text, or counts by label. Before a site sends a
message, it takes out the values that the site file's `policy` or `privacy` keeps at the site. A site sends the trained
tensors that the server asks for and `policy.tensors` allows; with `optimizer_state: averaged` second moments are among
these tensors, and a site with `privacy` does not take part.

## From the site
"""
_ERRORS = """
### When it cannot do its part

A code, and a sentence of up to 1024 bytes, on one line, that says why: with counts, names of files, columns and
tensors, and values of the site file, never with a row. Once a round or an evaluation is charged, what may come from the
rows gets a fixed sentence for its code; and a site with `privacy` then answers with an update, of noise alone if need
be.

"""
_FIXED = "a fixed sentence, as code 1000"
_LEAVES, _STAYS = "leaves", "stays"
Row = tuple[str, ...]
_REPLIES: dict[str, type[Content]] = {
    "In every answer": Reply,
    "When it says who it is": Hello,
    "When it has evaluated": EvaluateReply,
    "When it has trained, and evaluated before if it was asked to": TrainReply,
    "When it has trained under `secure_aggregation`: masked numbers, beside all but the tensors of the above": (
        MaskedTrainReply
    ),
    "When it takes part in the other exchanges of `secure_aggregation`": ExchangeReply,
    "When it was to write the model that it keeps": DeliverReply,
}
_REQUESTS: dict[str, type[Content]] = {
    "In every request, and nothing else to learn who it is": HelloRequest,
    "To train, to evaluate, or to write the model": State,
    "To train": TrainRequest,
    "To train under `secure_aggregation`": MaskedTrainRequest,
    "To take part in the other exchanges of `secure_aggregation`": ExchangeRequest,
    "To write the model": DeliverRequest,
}


def what_leaves() -> str:
    """The page, as Markdown."""
    page, head = _HEAD, ("key", "what it is", "allowed", "with `share_metrics: false`", "with `privacy`")
    for title, reply in _REPLIES.items():
        page += f"\n### {title}\n\n" + _table(head, _rows(reply))
    page += _ERRORS + _table(("code", "kind", "what it says", "with `privacy`"), _failures()) + "\n## To the site\n"
    for title, request in _REQUESTS.items():
        page += f"\n### {title}\n\n" + _table(head[:3], (row[:3] for row in _rows(request)))
    return page


def _table(head: Row, rows: Iterable[Row]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ("---",) * len(head), *rows))


def _rows(content: type[Content]) -> Iterator[Row]:
    """Key, meaning, and what is allowed, of everything that a message adds to its base, and when it leaves."""
    for name, place in content.places().items():
        if name not in content.__annotations__:
            continue
        if isinstance(place, Entry):
            yield _row(place.key, place, place.instead)
        elif isinstance(place, Numbers):
            yield from (_row(place.prefix + name, measure) for name, measure in place.measures.items())
        elif isinstance(place, Part):
            yield from ((key, f"{place.what}: {what}", *more) for key, what, *more in _rows(place.of))
        elif isinstance(place, Arrays | Numbered):
            key = place.key if isinstance(place, Arrays) else place.pattern
            yield f"`{key}`", place.what, "tensors", _LEAVES, f"{_LEAVES}, clipped and noised"


def _row(key: str, one: Entry | Measure, instead: object = None) -> Row:
    stays = _STAYS if instead is None else f"{_STAYS}; {instead} leaves"
    scores, private = one.stays == "without scores", one.stays != "never"
    return f"`{key}`", one.what, one.kind.allowed, stays if scores else _LEAVES, stays if private else _LEAVES


def _failures() -> Iterator[Row]:
    for code, name in sorted(failures().items()):
        error = getattr(errors, name, None)
        if error is errors.FedSpanError:
            yield str(code), name, "Anything else.", _FIXED
        elif error is not None:
            says = str(error.__doc__).partition("\n")[0].replace("``", "`")
            yield str(code), name, says, "the same" if issubclass(error, errors.PUBLIC) else _FIXED
        elif code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
            yield str(code), name, "An unexpected error: its type, and the place in the code.", _FIXED
        else:
            yield str(code), name, "Flower's own.", "the same"
