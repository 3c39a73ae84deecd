"""Fields of messages: each is declared once, with its place in Flower's records, its kind, and when it stays at a site.

``Content`` makes a writer and a strict reader from such declarations. Flower is imported only when a message is written
or read: training code uses these classes without Flower.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self

from common.errors import WireError
from common.protocol.kinds import Kind, short

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, RecordDict

CONFIG, METRICS = "config", "metrics"  # Flower's names for the record of settings and the record of numbers
Records = dict[str, Any]  # by the record's key: tensors (Flower's ArrayRecord), or a dict of values
#: When a field of a reply stays at the site: never, with its `privacy`, or also with `policy.share_metrics: false`.
Stays = Literal["never", "with privacy", "without scores"]


class Place(ABC):
    """The place of a field in a message. All places have ``what``, a description of the field for people."""

    what: str

    @abstractmethod
    def _put(self, value: Any, records: Records) -> None:  # noqa: ANN401 - the field's
        """Write the field's value into the records of a message."""

    @abstractmethod
    def _take(self, records: Records) -> Any:  # noqa: ANN401 - the field's
        """Read the field's value and remove it from the records."""

    @abstractmethod
    def _known(self) -> dict[str, list[str]]:
        """The field's keys, by the key of the record that holds them."""

    def _shared(self, value: Any, staying: set[Stays]) -> Any:  # noqa: ANN401 - the field's
        """The part of the field's value that may leave the site."""
        del staying
        return value


@dataclass(frozen=True)
class Entry(Place):
    """A field that is one value.

    Attributes:
        key: key of the value in the record.
        kind: kind of the value.
        what: description of the field, for people.
        record: the record's key.
        optional: whether the value may be absent; the field is then None.
        stays: when the value stays at the site.
        instead: value that is sent when the field's value stays at the site.
    """

    key: str
    kind: Kind
    what: str
    record: str = CONFIG
    optional: bool = False
    stays: Stays = "never"
    instead: object = None

    def _put(self, value: object, records: Records) -> None:
        values = records.setdefault(self.record, {})
        if value is not None or not self.optional:
            values[self.key] = self.kind.check(self.key, value)

    def _take(self, records: Records) -> Any:  # noqa: ANN401 - the field's
        values = _values(self.record, records)
        if self.key in values:
            return self.kind.check(self.key, values.pop(self.key))
        if self.optional:
            return None
        raise WireError(f"{self.key} is missing; allowed: {self.kind.allowed}")

    def _known(self) -> dict[str, list[str]]:
        return {self.record: [self.key]}

    def _shared(self, value: object, staying: set[Stays]) -> object:
        return self.instead if self.stays in staying else value


@dataclass(frozen=True)
class Measure:
    """One number of a group.

    Attributes:
        what: description of the number, for people.
        kind: kind of the number.
        stays: when the number stays at the site.
    """

    what: str
    kind: Kind
    stays: Stays = "never"


@dataclass(frozen=True)
class Numbers(Place):
    """A field that is a group of numbers by name.

    Attributes:
        prefix: prefix of the numbers' keys in the record of numbers.
        measures: all numbers of the group, by name.
        what: description of the group, for people.
    """

    prefix: str
    measures: Mapping[str, Measure]
    what: str

    def _put(self, value: Mapping[str, float], records: Records) -> None:
        values = records.setdefault(METRICS, {})
        for name, number in value.items():
            if name not in self.measures:
                raise WireError(f"{self.prefix}{name} is not declared; allowed: {', '.join(self.measures)}")
            values[self.prefix + name] = float(self.measures[name].kind.check(self.prefix + name, number))

    def _take(self, records: Records) -> dict[str, float]:
        values = _values(METRICS, records)
        came = {name: key for name in self.measures if (key := self.prefix + name) in values}
        return {name: float(self.measures[name].kind.check(key, values.pop(key))) for name, key in came.items()}

    def _known(self) -> dict[str, list[str]]:
        return {METRICS: [self.prefix + name for name in self.measures]}

    def _shared(self, value: Mapping[str, float], staying: set[Stays]) -> dict[str, float]:
        return {name: number for name, number in value.items() if self.measures[name].stays not in staying}


@dataclass(frozen=True)
class Arrays(Place):
    """A field that is a record of tensors."""

    key: str
    what: str

    def _put(self, value: "ArrayRecord", records: Records) -> None:
        records[self.key] = value

    def _take(self, records: Records) -> Any:  # noqa: ANN401 - an ArrayRecord
        return _arrays(self.key, records)

    def _known(self) -> dict[str, list[str]]:
        return {self.key: []}


@dataclass(frozen=True)
class Numbered(Place):
    """A field that is several records of tensors by number; ``key`` is a format with the number in braces."""

    key: str
    what: str

    def _put(self, value: "Mapping[int, ArrayRecord]", records: Records) -> None:
        records |= {self.key.format(number): one for number, one in value.items()}

    def _take(self, records: Records) -> Any:  # noqa: ANN401 - ArrayRecords by number
        prefix = self.key.partition("{")[0]
        ends = (key.removeprefix(prefix) for key in records if key.startswith(prefix))
        numbers = sorted({int(end) for end in ends if end.isascii() and end.isdecimal()})
        keys = {number: self.key.format(number) for number in numbers}
        return {number: _arrays(key, records) for number, key in keys.items() if key in records}

    def _known(self) -> dict[str, list[str]]:
        return {self.pattern: []}

    @property
    def pattern(self) -> str:
        """The pattern of the keys, for people: N stands for the number."""
        return self.key.format(0).replace("0", "N")


@dataclass(frozen=True)
class Part(Place):
    """A field whose value is another ``Content`` with its own record; the record is absent when the value is None."""

    record: str
    of: "type[Content]"
    what: str

    def _put(self, value: "Content | None", records: Records) -> None:
        if value is not None:
            value._put(records)

    def _take(self, records: Records) -> "Content | None":
        return self.of._take(records) if self.record in records else None

    def _known(self) -> dict[str, list[str]]:
        return self.of.known()


class Content:
    """Base of the dataclasses for messages and parts of messages; each field is annotated with its ``Place``."""

    def to_record(self) -> "RecordDict":
        """Write the fields into the content of a Flower message.

        Raises:
            WireError: a field holds a value that the reader would reject.
        """
        from flwr.app import ConfigRecord, MetricRecord, RecordDict

        records: Records = {}
        self._put(records)
        for key, values in records.items():
            if isinstance(values, dict):
                records[key] = MetricRecord(values) if key == METRICS else ConfigRecord(values)
        return RecordDict(records)

    @classmethod
    def read(cls, content: "RecordDict") -> Self:
        """Read the fields from the content of a Flower message.

        Raises:
            WireError: a record, key or value is missing, unknown, or not allowed.
        """
        records = plain(content)
        found, known = cls._take(records), cls.known()
        for record, left in records.items():
            if record not in known:
                raise WireError(f"unknown record {short(record)}; allowed: {', '.join(known)}")
            if left:
                allowed = ", ".join(known[record])
                raise WireError(f"unknown key {short(min(left))} in {record!r}; allowed: {allowed}")
        return found

    def shared(self, *, scores: bool, private: bool) -> Self:
        """A copy without the values that stay at the site.

        Args:
            scores: whether losses and scores may leave the site.
            private: whether the site has `privacy`: then only the noised update depends on rows.
        """
        staying: set[Stays] = {"with privacy", "without scores"} if private else set() if scores else {"without scores"}
        left = {name: place._shared(getattr(self, name), staying) for name, place in self.places().items()}
        return dataclasses.replace(self, **left)  # type: ignore[type-var]

    @classmethod
    def places(cls) -> dict[str, Place]:
        """The place of each field in a message, by the field's name."""
        return {one.name: one.type.__metadata__[0] for one in fields(cls)}  # type: ignore[arg-type, union-attr]

    @classmethod
    def known(cls) -> dict[str, list[str]]:
        """All fields' keys, by the key of the record that holds them."""
        found: dict[str, list[str]] = {}
        for place in cls.places().values():
            for record, keys in place._known().items():
                found.setdefault(record, []).extend(keys)
        return found

    def _put(self, records: Records) -> None:
        for name, place in self.places().items():
            place._put(getattr(self, name), records)

    @classmethod
    def _take(cls, records: Records) -> Self:
        return cls(**{name: place._take(records) for name, place in cls.places().items()})


def plain(content: "RecordDict") -> Records:
    """The records of a message; records of values become dicts.

    Raises:
        WireError: numbers came in a record of settings, or settings in the record of numbers.
    """
    from flwr.app import ArrayRecord, MetricRecord

    records: Records = {}
    for key, part in content.items():  # not `content.array_records`, see ``common.protocol.records``
        if isinstance(part, ArrayRecord):
            records[key] = part
        elif isinstance(part, MetricRecord) == (key == METRICS):
            records[key] = dict(part)
        else:
            raise WireError(
                f"record {short(key)} is a {type(part).__name__}; allowed: numbers in {METRICS!r}, and only there"
            )
    return records


def _values(record: str, records: Records) -> dict[str, Any]:
    values = records.get(record)
    if not isinstance(values, dict):
        raise WireError(f"the message has no {record!r} record")
    return values


def _arrays(record: str, records: Records) -> Any:  # noqa: ANN401 - an ArrayRecord
    if record not in records or isinstance(records[record], dict):
        raise WireError(f"the message has no {record!r} record")
    return records.pop(record)
