"""Short rows laid into fewer, longer ones, in which rows do not see each other and equal beginnings stand once.

A packed row is a tree: a token's parent is the token before it in its row, and rows that begin alike (a system message,
a template) share the nodes of what they have in common. A token sees its ancestors and has its depth as its position,
so hidden states, loss and gradients are those of the rows by themselves, to rounding (decision 038). The layout depends
on the tokens alone.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.config.training import PackingMode
from common.errors import ModelError
from common.model.families import kind_of

log = logging.getLogger(__name__)
_WIDTHS = (128, 256, 512)  # packed rows may be this wide where the longest row is shorter; attention costs their square
_SQUARE, _LEAST_SQUARE = 8, 512  # width at which attention costs as much as the rest: times the hidden size, at least
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # in configurations: how far a token sees
_EXACT, _ROUNDED = 1e-3, 0.05  # most that the logits of packed rows differ, in float32 and in other arithmetic


class Encoded(Protocol):
    """A row's tokens, and where in them those that the loss counts begin and end."""

    @property
    def input_ids(self) -> Sequence[int]:
        """The tokens."""

    def counted(self) -> Iterator[tuple[int, int]]:
        """Begin and end of every span of counted tokens."""


@dataclass(frozen=True)
class Packing:
    """The kind of packed rows that a model takes.

    Attributes:
        additive: whether its masks are added to attention's scores; else they say what is seen.
        share: whether equal beginnings stand once; not with dropout, which must fall on each row by itself.
        window: tokens that its attention sees back, at least; a packed row is no longer.
        square: width at which attention costs as much as everything else.
    """

    additive: bool
    share: bool
    window: int | None
    square: int = 1024

    def cost(self, rows: int, width: int) -> float:
        """Cost of a forward pass, compared with others."""
        return rows * width * (1 + width / self.square)


@dataclass(frozen=True)
class _Place:
    """A row's place: its tree, the nodes of its tokens (tokens,), and how many of them stood there before."""

    tree: int
    nodes: NDArray[np.int64]
    known: int


def pack(examples: Sequence[Encoded], padding: int, packing: Packing) -> dict[str, Tensor] | None:
    """A batch of packed rows; None where packing saves nothing.

    Returns:
        input_ids and position_ids (packed rows, width); attention_mask (packed rows, 1, width, width); sources and
        labels as in ``common.data.chat.collate``; tokens (), the number of tokens of all rows.
    """
    rows = [np.array(example.input_ids) for example in examples]
    longest = max(map(len, rows))
    if packing.window is not None and longest > packing.window:
        return None
    rooms = [longest, *(width for width in _WIDTHS if longest < width <= (packing.window or width))]
    alike = _alike(rows, longest) if packing.share else [[0] * len(rows)] * len(rows)
    layouts: list[tuple[list[_Place], tuple[int, int]]] = []
    for room in rooms:
        if not layouts or layouts[-1][1][0] > 1:  # else a wider room changes nothing
            layouts.append(_lay([len(row) for row in rows], alike, room))
    places, shape = min(layouts, key=lambda one: packing.cost(*one[1]))
    if packing.cost(*shape) >= packing.cost(len(rows), longest):
        return None
    ids, positions = np.full(shape, padding), np.zeros(shape, np.int64)
    seen = np.broadcast_to(np.eye(shape[1], dtype=bool), (*shape, shape[1])).copy()  # padding sees itself
    causal = np.tri(longest, dtype=bool)
    for row, at in zip(rows, places, strict=True):
        if at.known == len(row):
            continue
        new = at.tree, slice(at.nodes[at.known], at.nodes[-1] + 1)
        ids[new], positions[new] = row[at.known :], np.arange(at.known, len(row))
        seen[new][:, at.nodes] = causal[at.known : len(row), : len(row)]
    mask = torch.from_numpy(seen)[:, None]
    if packing.additive:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    spans = [(row, at, span) for row, at, one in zip(rows, places, examples, strict=True) for span in one.counted()]
    sources = [at.tree * shape[1] + at.nodes[start - 1 : end - 1] for _, at, (start, end) in spans]
    labels = [row[start:end] for row, _, (start, end) in spans]
    none = np.zeros(0, np.int64)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "attention_mask": mask,
        "sources": torch.from_numpy(np.concatenate([none, *sources])),
        "labels": torch.from_numpy(np.concatenate([none, *labels])),
        "tokens": torch.tensor(sum(map(len, rows))),
    }


def _alike(rows: Sequence[NDArray[np.int64]], longest: int) -> list[list[int]]:
    """The number of tokens with which two rows begin alike, for every two."""
    tokens = np.repeat(-1 - np.arange(len(rows))[:, None], longest + 1, axis=1)  # (rows, longest + 1); ends are unlike
    for line, row in enumerate(rows):
        tokens[line, : len(row)] = row
    return [(tokens == line).argmin(axis=1).tolist() for line in tokens]


def _lay(lengths: Sequence[int], alike: list[list[int]], room: int) -> tuple[list[_Place], tuple[int, int]]:
    """Rows into trees of at most ``room`` tokens: the longest first, each where it adds least; shape of all trees."""
    sizes, members = list[int](), list[list[int]]()
    places: dict[int, _Place] = {}
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        best, least, twin = len(sizes), room + 1, -1
        for tree, (size, others) in enumerate(zip(sizes, members, strict=True)):
            like = max(others, key=alike[row].__getitem__)
            new = lengths[row] - alike[row][like]
            if new < least and size + new <= room:
                best, least, twin = tree, new, like
        if best == len(sizes):
            sizes.append(0)
            members.append([])
        known = 0 if twin < 0 else alike[row][twin]
        begin, end = sizes[best], sizes[best] + lengths[row] - known
        before = places[twin].nodes[:known] if known else ()
        places[row] = _Place(best, np.concatenate([before, np.arange(begin, end)]).astype(np.int64), known)
        sizes[best] = end
        members[best].append(row)
    return [places[row] for row in range(len(lengths))], (len(sizes), max(sizes))


@dataclass(frozen=True)
class _Made:
    """A row of the probe; all its tokens but the first count."""

    input_ids: list[int]

    def counted(self) -> Iterator[tuple[int, int]]:
        yield 1, len(self.input_ids)


def choose(model: nn.Module, wanted: PackingMode, autocast: torch.dtype | None, *, packs: bool) -> Packing | None:
    """How rows of one forward pass are packed; None: they are padded.

    Args:
        model: the model, on its device.
        wanted: `training.packing`.
        autocast: dtype of forward and backward; None: the weights' own.
        packs: whether the task packs rows at all.

    Raises:
        ModelError: ``wanted`` is on, and the task or the model cannot.
    """
    if wanted == "off":
        return None
    try:
        if not packs:
            raise ModelError("only the task causal-lm packs rows")
        return packing_of(model, autocast)
    except ModelError as error:
        if wanted == "on":
            raise ModelError(f"`training.packing` is on, but {error}; allowed here: auto, off") from None
        log.info("rows are padded: %s", error)
    return None


def packing_of(model: Any, autocast: torch.dtype | None) -> Packing:  # noqa: ANN401
    """How a causal model takes packed rows: tried with a few tokens on the model itself.

    Args:
        model: the model, on its device.
        autocast: dtype of forward and backward; None: the weights' own.

    Raises:
        ModelError: it does not keep packed rows apart, or takes no positions or masks; the text says which model.
    """
    settings = model.config.get_text_config()
    config, attention = settings.to_dict(), str(settings._attn_implementation)
    what = f"this {kind_of(model)} model takes no packed rows"
    if config.get("alibi") or (config.get("attn_config") or {}).get("alibi"):
        raise ModelError(f"{what}: its attention goes by places in a row (ALiBi)")
    if attention not in ("sdpa", "eager"):
        raise ModelError(f"{what} with attention {attention!r}")
    dropout = any(
        isinstance(value, float) and value > 0
        for key, value in config.items()
        if "drop" in key and "classifier" not in key
    )
    dropout |= any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    windows = [config[key] for key in _WINDOWS if isinstance(config.get(key), int) and config[key] > 0]
    square = max(_SQUARE * model.get_input_embeddings().weight.shape[1], _LEAST_SQUARE)
    packing = Packing(attention == "eager", not dropout, min(windows, default=None), square)
    was_training = model.training
    model.eval()
    try:
        wrong = _probe(model, replace(packing, window=None), autocast)
    except Exception as error:  # noqa: BLE001 - what a model's code raises at a mask or positions that it cannot take
        raise ModelError(f"{what}: {type(error).__name__}") from None
    finally:
        model.train(was_training)
    whole = autocast is None and {p.dtype for p in model.parameters()} == {torch.float32}
    if not wrong < (_EXACT if whole else _ROUNDED):
        raise ModelError(
            f"{what}: they see each other, or its positions cannot be given (logits differ by {wrong:.1g})"
        )
    return packing


@torch.no_grad()
def _probe(model: Any, packing: Packing, autocast: torch.dtype | None) -> float:  # noqa: ANN401
    """Relative difference of the logits of packed rows to those of the same rows, one by one."""
    vocabulary = model.get_input_embeddings().num_embeddings
    drawn = torch.randint(vocabulary, (3, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [_Made(ids) for ids in (drawn[0] + drawn[1], drawn[0] + drawn[2][:5], drawn[2][:4])]
    device = model.get_input_embeddings().weight.device
    batch = pack(rows, 0, packing)
    assert batch is not None  # noqa: S101 - three rows that begin alike or are short
    inputs = {key: batch[key].to(device) for key in ("input_ids", "position_ids", "attention_mask")}
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        packed = model(**inputs, use_cache=False).logits.flatten(0, 1)
        packed = packed[batch["sources"].to(packed.device)].float()
        alone = torch.cat(
            [model(input_ids=torch.tensor([row.input_ids], device=device)).logits[0, :-1] for row in rows]
        )
    return float((packed - alone).norm() / (alone - alone.mean(-1, keepdim=True)).norm())
