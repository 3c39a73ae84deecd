"""Base models of sites that share a process: read from disk once, and what no site changes is in memory once."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import nn

from common.model.base_model import Base
from common.protocol.digest import base_digest, tokenizer_digest

Digests = tuple[str, str]  # of a base model, and of its tokenizer
Read = Callable[[], Base]  # from disk


class Bases:
    """The base models that were read, as they are on disk; the first who asks for one reads it."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Base, Digests]] = {}

    def view(self, key: str, read: Read) -> Base:
        """The base model of ``key``: modules of the taker's own, weights that all takers share.

        Before a weight is changed it must be taken apart with `own`.
        """
        base, _ = self._get(key, read)
        shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in base.model.parameters()}
        return replace(base, model=copy.deepcopy(base.model, shared))

    def digests(self, key: str, read: Read) -> Digests:
        """Of the base model of ``key``."""
        return self._get(key, read)[1]

    def _get(self, key: str, read: Read) -> tuple[Base, Digests]:
        if key not in self._known:
            base = read()
            self._known[key] = base, digests(base)
        return self._known[key]


def own(parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters memory that nobody shares."""
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def digests(base: Base) -> Digests:
    """Of a base model that is as it was read."""
    return base_digest(base.model), tokenizer_digest(base.tokenizer)
