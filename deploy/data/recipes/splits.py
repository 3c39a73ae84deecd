"""What a recipe makes of a data set."""

import hashlib
from dataclasses import dataclass

from common.data.shards import Cells


@dataclass(frozen=True)
class Splits:
    """Rows to train on, rows to test on, and how many of the source were left out."""

    train: list[Cells]
    test: list[Cells]
    left_out: int = 0


def by_group(rows: list[Cells], column: str, share: float, left_out: int = 0) -> Splits:
    """About ``share`` of the rows as test: all rows that agree in ``column`` are on one side, everywhere the same."""

    def drawn(row: Cells) -> bool:
        digest = hashlib.sha256(str(row[column]).casefold().encode()).hexdigest()
        return int(digest[:13], 16) / 16**13 < share

    return Splits([row for row in rows if not drawn(row)], [row for row in rows if drawn(row)], left_out)
