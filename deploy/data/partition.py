"""Split one data set among sites: ``fedspan data partition DATA --by HOW ... --out DIR``; see ``--help``.

Writes into DIR a shard and a site file for every site, ``partition.json`` (rows per site and label; with ``--by
column`` also the column's values) and ``partition.svg``, a picture of these counts. flwr-datasets splits the rows; the
same seed gives the same shards.
"""

import argparse
import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from common.config.federation import FederationConfig
from common.config.load import load, parse
from common.config.site import SiteConfig
from common.data.rows import Template, check_columns, filled
from common.data.shards import Cells, load_cells
from common.errors import ConfigError, DataError, LaunchError
from common.system.command import Command
from common.system.files import built
from deploy.data.partition_picture import write_svg
from deploy.data.split import By, Plan, cell, split


def check_labels(labels: list[str], known: list[str], federation: Path) -> None:
    """Check that every label of the data is among the labels of a federation's task.

    Raises:
        ConfigError: the federation's task is no classification.
        DataError: a label is not listed.
    """
    if not known:
        raise ConfigError(f"{federation}: its `task` has no labels")
    unknown = sorted(set(labels) - set(known))
    if unknown:
        some = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise DataError(f"label(s) {some} of the data are not in `task.labels` of {federation}: {known}")


def _from_anywhere(template: str, prompts: list[str], folder: Path, reads_files: bool | None) -> str:
    """The prompt's template for site files: prefixed with ``folder`` when the prompts are file paths relative to it.

    Prompts are file paths when the task reads files (``reads_files``); where the task is not known, when every prompt
    names an existing file.
    """
    if reads_files is None:
        reads_files = all(os.path.isfile(folder / p) for p in prompts)  # noqa: PTH113 - Path's raises for long texts
    if not reads_files or any(Path(prompt).is_absolute() for prompt in prompts):
        return template
    absolute = f"{folder}/".replace("{", "{{").replace("}", "}}") + (template if "{" in template else f"{{{template}}}")
    Template(absolute, "--prompt")  # a column's name may be one that cannot stand in braces
    return absolute


def write(rows: list[Cells], parts: list[list[int]], plan: Plan, source: Path, site: dict[str, Any], out: Path) -> None:
    """Write shards, site files, ``partition.json`` and the picture; all of it or nothing.

    Args:
        rows: the rows of the whole data set.
        parts: row numbers of every site.
        plan: the plan by which the rows were split.
        source: the data set, for the record.
        site: ``data`` section of every site file, without ``path``.
        out: a folder that does not exist yet.

    Raises:
        LaunchError: ``out`` exists or cannot be written.
    """
    if out.exists():
        raise LaunchError(f"{out} exists already; name another folder with --out")
    names = [f"site-{number}" for number in range(1, len(parts) + 1)]
    counts = [
        dict(sorted(Counter(cell(source, rows[i], plan.label, i + 1) for i in part).items())) if plan.label else {}
        for part in parts
    ]
    told: list[dict[str, object]] = [
        {"name": n, "rows": len(p), "labels": c} for n, p, c in zip(names, parts, counts, strict=True)
    ]
    if plan.by == "column" and plan.column:
        for site_, part in zip(told, parts, strict=True):
            site_["value"] = cell(source, rows[part[0]], plan.column, part[0] + 1)
    settings = {key: value for key, value in asdict(plan).items() if value is not None}
    record = {"source": source.name, "rows": len(rows), "rows_sha256": _digest(rows), "plan": settings, "sites": told}
    try:
        with built(out) as folder:
            for name, part in zip(names, parts, strict=True):
                (folder / f"{name}.jsonl").write_text("".join(_line(rows[i]) for i in part), encoding="utf-8")
                file = {"name": name, "data": {"path": f"{name}.jsonl", **site}}
                parse(file, SiteConfig, f"{name}.yaml")
                (folder / f"{name}.yaml").write_text(yaml.safe_dump(file, sort_keys=False), encoding="utf-8")
            (folder / "partition.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            held = zip(names, parts, counts, strict=True)
            write_svg(folder / "partition.svg", {name: count or {"rows": len(part)} for name, part, count in held})
    except OSError as error:
        raise LaunchError(f"{out} cannot be written: {error.strerror or error}") from None


def _line(row: Cells) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _digest(rows: list[Cells]) -> str:
    return hashlib.sha256("".join(map(_line, rows)).encode()).hexdigest()


_NEEDS: dict[By, tuple[str, ...]] = {
    "iid": ("sites",),
    "dirichlet": ("sites", "label", "alpha"),
    "label": ("sites", "label", "labels_per_site"),
    "column": ("column",),
    "quantity": ("sizes",),
}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", type=Path, metavar="DATA", help="JSONL, CSV, Parquet, a folder saved by `datasets`, or of images"
    )
    parser.add_argument("--by", choices=list(_NEEDS), required=True, help="how rows are split")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new folder for shards, site files and the picture"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the random draws (default: %(default)s)"
    )
    parser.add_argument("--sites", type=int, metavar="N", help="number of sites (for iid, dirichlet, label)")
    parser.add_argument("--label", metavar="COLUMN", help="the labels' column; with any split, for the counts")
    parser.add_argument(
        "--alpha", type=float, metavar="A", help="dirichlet: small for unequal sites, e.g. 0.1; large for equal ones"
    )
    parser.add_argument("--labels-per-site", type=int, metavar="N", help="label: how many labels a site has")
    parser.add_argument("--column", help="column: whose values are the sites, e.g. a hospital's number")
    parser.add_argument("--sizes", help="quantity: the sites' sizes relative to each other, e.g. 6,3,1")
    parser.add_argument("--prompt", help="for the site files: column or template; of images: image")
    parser.add_argument("--answer", help="for the site files: column or template; of images: label")
    parser.add_argument(
        "--held-out", type=float, default=0.1, metavar="SHARE", help="for the site files (default: %(default)s)"
    )
    parser.add_argument(
        "--federation", type=Path, metavar="FILE", help="hold the labels against this federation file's task.labels"
    )


def _plan(given: argparse.Namespace) -> Plan:
    """Raises ConfigError: an option is missing, does not belong to ``--by``, or is out of range."""
    options = {"sites", "label", "alpha", "labels_per_site", "column", "sizes"}
    for name in sorted(options):
        flag, needed = f"--{name.replace('_', '-')}", name in _NEEDS[given.by]
        if needed and getattr(given, name) is None:
            raise ConfigError(f"--by {given.by} needs {flag}")
        if not needed and name != "label" and getattr(given, name) is not None:
            raise ConfigError(f"--by {given.by} takes no {flag}")
    for name, least in (("sites", 1), ("labels_per_site", 1)):
        if getattr(given, name) is not None and getattr(given, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(given, name)}; allowed: {least} or more")
    if given.seed < 0:
        raise ConfigError(f"--seed is {given.seed}; allowed: 0 or more")
    if given.alpha is not None and not given.alpha > 0:
        raise ConfigError(f"--alpha is {given.alpha}; allowed: above 0")
    try:
        sizes = None if given.sizes is None else tuple(float(size) for size in given.sizes.split(","))
    except ValueError:
        sizes = (0.0,)
    if sizes is not None and not all(0 < size < float("inf") for size in sizes):
        raise ConfigError(f"--sizes is {given.sizes!r}; allowed: positive numbers with commas between them, e.g. 6,3,1")
    return Plan(given.by, given.seed, given.sites, given.label, given.column, given.alpha, given.labels_per_site, sizes)


def partition(given: argparse.Namespace) -> str:
    """Run the command; return a sentence about the result.

    Raises:
        FedSpanError: the arguments, the data or the folder do not allow it.
    """
    plan = _plan(given)
    source = given.data.resolve()
    columns, rows = load_cells(source)
    header = source.suffix.lower() not in (".csv", ".tsv", ".xlsx", ".xlsm")
    images = columns == ["image", "label"]
    prompt, answer = given.prompt or (images and "image"), given.answer or (images and "label")
    if not prompt or not answer:
        there = f"; columns: {', '.join(columns)}" if header else ""
        raise ConfigError(f"--prompt and --answer are needed for the site files{there}")
    templates = {"--prompt": Template(prompt, "--prompt"), "--answer": Template(answer, "--answer")}
    wanted = {flag: template.columns for flag, template in templates.items()}
    wanted |= {flag: [name] for flag, name in (("--label", plan.label), ("--column", plan.column)) if name is not None}
    check_columns(source, columns, wanted, header=header)
    prompts, answers = (filled(source, template, rows) for template in templates.values())
    reads_files = None
    if given.federation is not None:
        from common.data.tasks import make_task  # takes seconds

        task = make_task(load(given.federation, FederationConfig).task)
        check_labels(answers, task.labels, given.federation)
        reads_files = task.reads_files
    prompt = _from_anywhere(prompt, prompts, source.parent, reads_files)
    parts = split(rows, plan, source)
    site = {"prompt": prompt, "answer": answer, "held_out": given.held_out}
    write(rows, parts, plan, source, site, given.out)
    sizes = sorted(map(len, parts))
    return f"{len(rows):,} rows at {len(parts)} sites ({sizes[0]:,} to {sizes[-1]:,}) in {given.out}"


PARTITION = Command(
    _arguments,
    lambda options: print(partition(options)),  # noqa: T201
    example="rows.csv --by dirichlet --sites 3 --alpha 0.5 --label chapter --prompt note --answer chapter --out sites",
    then="fedspan run FEDERATION.yaml, with the new site files under local.sites",
)
