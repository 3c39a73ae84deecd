"""The result of a recipe: training rows and test rows."""

import hashlib
from dataclasses import dataclass

from common.data.shards import Cells


@dataclass(frozen=True)
class Splits:
    """Training rows, test rows, and the number of source rows left out."""

    train: list[Cells]
    test: list[Cells]
    left_out: int = 0


def by_group(rows: list[Cells], column: str, share: float, left_out: int = 0) -> Splits:
    """Take about ``share`` of the rows as test. Rows with the same ``column`` stay together; no randomness."""

    def drawn(row: Cells) -> bool:
        digest = hashlib.sha256(str(row[column]).casefold().encode()).hexdigest()
        return int(digest[:13], 16) / 16**13 < share

    return Splits([row for row in rows if not drawn(row)], [row for row in rows if drawn(row)], left_out)
