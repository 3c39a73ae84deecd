"""Split the rows of one data set among sites, by flwr-datasets; the same seed gives the same shards."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.data.shards import Cells
from common.errors import DataError

By = Literal["iid", "dirichlet", "label", "column", "quantity"]


@dataclass(frozen=True)
class Plan:
    """Plan by which rows are split among sites.

    Attributes:
        by: ``iid``; ``dirichlet``: every label's rows in shares drawn from Dirichlet(``alpha``); ``label``: a site has
            ``labels_per_site`` labels, or fewer when no more are left; ``column``: one site per value of ``column``;
            ``quantity``: sites with sizes in the ratio of ``sizes``.
        sites: number of sites; None for ``column`` and ``quantity``, which determine the number.
        label: the column with labels; None: rows have no labels.
    """

    by: By
    seed: int
    sites: int | None = None
    label: str | None = None
    column: str | None = None
    alpha: float | None = None
    labels_per_site: int | None = None
    sizes: tuple[float, ...] | None = None


def split(rows: list[Cells], plan: Plan, source: Path) -> list[list[int]]:
    """Row numbers, from 0 and ascending, of every site; errors name ``source``.

    Raises:
        DataError: a site would be empty, or a row would be nobody's.
    """
    import datasets
    from flwr_datasets import partitioner as by

    sites = plan.sites or 0
    if sites > len(rows):
        raise DataError(f"{sites} sites for {len(rows)} rows: some would be empty; take fewer sites")
    partitioner: by.Partitioner
    match plan.by:
        case "iid":
            partitioner = by.IidPartitioner(sites)
        case "dirichlet":
            partitioner = by.DirichletPartitioner(sites, "key", plan.alpha, min_partition_size=1, seed=plan.seed)
        case "label":
            partitioner = by.PathologicalPartitioner(sites, "key", 1, "deterministic", seed=plan.seed)
        case "column":
            partitioner = by.NaturalIdPartitioner("key")
        case "quantity":
            partitioner = by.SizePartitioner(_rows_each(plan.sizes or (), len(rows)))
    table = datasets.Dataset.from_dict({"key": _keys(rows, plan, source), "row": list(range(len(rows)))})
    partitioner.dataset = table if plan.by == "column" else table.shuffle(seed=plan.seed)
    try:
        with warnings.catch_warnings(action="ignore"):  # about draws that left a site empty
            found = [sorted(partitioner.load_partition(i)["row"]) for i in range(partitioner.num_partitions)]
    except ValueError as error:
        raise DataError(f"the {len(rows)} rows cannot be split so: {' '.join(str(error).split())[:300]}") from None
    empty = [number for number, part in enumerate(found, start=1) if not part]
    if empty:
        raise DataError(f"site(s) {_listed(empty)} of {len(found)} would be empty; take fewer sites, or another split")
    lost = len(rows) - sum(map(len, found))
    if lost:
        raise DataError(f"{lost} of {len(rows)} rows would be at no site; take more sites, or more labels per site")
    return found


def _keys(rows: list[Cells], plan: Plan, source: Path) -> list[str]:
    """The key of every row by which the partitioner assigns rows to sites."""
    column = plan.column if plan.by == "column" else plan.label
    if column is None:
        return [""] * len(rows)
    keys = [cell(source, row, column, number) for number, row in enumerate(rows, start=1)]
    if plan.by != "label" or plan.labels_per_site is None:
        return keys
    place = {label: number // plan.labels_per_site for number, label in enumerate(sorted(set(keys)))}
    return [f"{place[key]:06}" for key in keys]  # labels that follow each other stay together


def _rows_each(sizes: tuple[float, ...], rows: int) -> list[int]:
    """Whole numbers in the ratio of ``sizes`` that add up to ``rows``."""
    ends = [round(rows * sum(sizes[: i + 1]) / sum(sizes)) for i in range(len(sizes))]
    each = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    if 0 in each:
        raise DataError(f"site(s) {_listed([i for i, n in enumerate(each, start=1) if n == 0])} would be empty")
    return each


def cell(source: Path, row: Cells, column: str, number: int) -> str:
    """The text in a column of row ``number``.

    Raises:
        DataError: the column is empty.
    """
    value = row.get(column)
    if value is None or not str(value).strip():
        raise DataError(f"{source}, row {number}: column {column!r} is empty")
    return str(value).strip()


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
