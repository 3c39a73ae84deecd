"""The trials of an experiment file: every run that the file asks for, all checked before the first one starts."""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.config.federation import FederationConfig, resolved
from common.config.load import load, parse
from common.config.section import DataConfig, TableConfig, resolve
from common.config.site import SiteConfig
from common.data.rows import Row, load_rows
from common.errors import ConfigError, DataError, RunFolderError
from common.metrics import SCORES
from deploy.experiment.config import ExperimentConfig, StrategyChoice
from deploy.experiment.summary import SUMMARY, read_summary
from deploy.experiment.trial import refuse_changed
from server.operate.site_files import check_sites
from server.run.folder import refuse_existing


@dataclass(frozen=True)
class Setting:
    """A point of the grid, for which a learning rate is picked; None: not varied.

    Attributes:
        strategy: its label.
    """

    strategy: str
    clients: int
    alpha: float | None
    rank: int | None
    local_steps: int | None

    @property
    def name(self) -> str:
        """The setting's part of its trials' folder names."""
        parts = {"n": self.clients, "a": self.alpha, "r": self.rank, "s": self.local_steps}
        return "_".join([self.strategy, *(f"{key}{value}" for key, value in parts.items() if value is not None)])


@dataclass(frozen=True)
class Cell:
    """One run: a setting with a learning rate and a seed, on the validation set or (``final``) the test set."""

    setting: Setting
    learning_rate: float
    seed: int
    final: bool

    @property
    def folder(self) -> str:
        """Relative to the experiment's folder."""
        kind = "final" if self.final else "select"
        return f"{kind}/{self.setting.name}_lr{self.learning_rate}_seed{self.seed}"

    def facts(self) -> dict[str, Any]:
        """All fields, as plain JSON values."""
        return {**asdict(self.setting), "learning_rate": self.learning_rate, "seed": self.seed, "final": self.final}


class Plan:
    """An experiment's settings and cells.

    Args:
        config: the experiment.
        source: its file, which relative paths are relative to.

    Attributes:
        sites: site files by number of sites and alpha.
        partitions: number of rows per site and label; without labels the number of rows per site.

    Raises:
        FedSpanError: the experiment, or one of its cells, is impossible; names key and cell.
    """

    def __init__(self, config: ExperimentConfig, source: Path) -> None:
        self.config, self.source = config, source
        self._further: dict[Setting, list[float]] = {}  # learning rates beyond the file's
        grid = config.grid
        alphas: list[float | None] = [*grid.alphas] if grid.alphas else [None]
        ranks: list[int | None] = [*grid.ranks] if grid.ranks else [None]
        steps: list[int | None] = [*grid.local_steps] if grid.local_steps else [None]
        self._choices: dict[str, StrategyChoice] = {choice.called: choice for choice in grid.strategies}
        self._refuse_what_is_given_twice()
        self.sites = {
            (clients, alpha): self._site_files(clients, alpha)
            for clients, alpha in itertools.product(grid.clients, alphas)
        }
        self.settings = [
            Setting(strategy, clients, alpha, rank, step)
            for clients, alpha, rank, step, strategy in itertools.product(
                grid.clients, alphas, ranks, steps, self._choices
            )
        ]
        judging = resolve(config.data.test.path, source)
        if judging == resolve(config.data.validation.path, source):
            raise ConfigError(f"{source}: `data.validation.path` and `data.test.path` are the same: {judging}")
        checked = set()
        for cell in self.cells():
            federation = self.federation(cell)
            _check_score(config.select_by, federation, source)
            where = (cell.setting.clients, cell.setting.alpha)
            if where not in checked:
                check_sites(self.sites[where], federation, source)
                checked.add(where)
        self._digests: dict[str, str] = {}
        self.partitions = self._read_data()

    def cells(self) -> Iterator[Cell]:
        """All cells that may be run; which final ones are run depends on the selected rates."""
        for setting in self.settings:
            yield from self.selection(setting)
            for rate in self.rates(setting):
                yield from self.final(setting, rate)

    def rates(self, setting: Setting) -> list[float]:
        """The learning rates to pick from: those of the file, then those that were added."""
        given = self._choices[setting.strategy].learning_rates or self.config.grid.learning_rates
        return [*given, *self._further.get(setting, [])]

    def beyond(self, setting: Setting, best: float | None) -> Cell | None:
        """Add a learning rate beyond the best one, if that is the smallest or largest; None when none is to be tried.

        Args:
            setting: the setting.
            best: its best learning rate so far; None: training diverged with all of them.
        """
        rates, added = sorted(self.rates(setting)), self._further.setdefault(setting, [])
        if len(rates) == 1 or len(added) == self.config.grid.extend or best not in (None, rates[0], rates[-1]):
            return None
        end, beside = rates[-1:-3:-1] if best == rates[-1] else rates[:2]
        rate = float(f"{end * (end / beside):.4g}")
        if rate in rates or not 0 < rate < math.inf:  # rates that are nearly the same, or as far as a number goes
            return None
        added.append(rate)
        return Cell(setting, added[-1], self.config.grid.seeds[0], final=False)

    def selection(self, setting: Setting) -> list[Cell]:
        """The cells that pick a setting's learning rate and round; none when there is nothing to pick."""
        rates = self.rates(setting)
        if len(rates) == 1 and self.config.score_at == "last":
            return []
        return [Cell(setting, rate, self.config.grid.seeds[0], final=False) for rate in rates]

    def final(self, setting: Setting, rate: float) -> list[Cell]:
        """The cells that judge a setting."""
        return [Cell(setting, rate, seed, final=True) for seed in self.config.grid.seeds]

    def federation(self, cell: Cell) -> FederationConfig:
        """A cell's federation file, with absolute paths.

        Raises:
            ConfigError: the cell is impossible.
        """
        shared, setting = self.config.federation, cell.setting
        strategy = self._choices[setting.strategy].section
        training = {"learning_rate": cell.learning_rate, "seed": cell.seed}
        if setting.local_steps is not None:
            training["local_steps"] = setting.local_steps
        evaluation: dict[str, Any] = {"server": self.config.data.test.model_dump(mode="json")}
        if not cell.final:
            evaluation["server"] = self.config.data.validation.model_dump(mode="json")
            if (
                SCORES[self.config.select_by].of is None
            ):  # scores of generated answers select no rate, and generation takes long
                evaluation |= {"generate": 0, "samples": 0}
        cohort = _with(shared.get("cohort", {}), {})
        if isinstance(cohort, dict) and cohort.get("fraction", 1.0) == 1.0:
            cohort.setdefault("min_clients", setting.clients)  # a comparison is void when a site is missing
        plain = {
            **shared,
            "name": self.config.name,
            "strategy": strategy if setting.rank is None else {**strategy, "rank": setting.rank},
            "cohort": cohort,
            "training": _with(shared.get("training", {}), training),
            "evaluation": _with(shared.get("evaluation", {}), evaluation),
            "local": {"sites": [str(file) for file in self.sites[setting.clients, setting.alpha]]},
        }
        return resolved(parse(plain, FederationConfig, f"{self.source}, cell {cell.folder}"), self.source)

    def facts(self, cell: Cell) -> dict[str, Any]:
        """Which cell it is, and digests of its sites (file and rows) and of the set that it is evaluated on."""
        used = [*map(str, self.sites[cell.setting.clients, cell.setting.alpha])]
        used.append("data.test" if cell.final else "data.validation")
        return {**cell.facts(), "digests": {what: self._digests[what] for what in used}}

    def refuse_changed(self, out: Path) -> None:
        """Raise a RunFolderError when the folder ``out`` holds something else, or a cell of other settings or data."""
        refuse_existing(out)
        if (out / SUMMARY).exists() and (other := read_summary(out).name) != self.config.name:
            raise RunFolderError(f"{out} holds another experiment, {other!r}; choose another --out")
        for cell in self.cells():
            refuse_changed(out / cell.folder, self.federation(cell), self.facts(cell))

    def _read_data(self) -> list[dict[str, Any]]:
        """Read all rows once as the task will, note their digests, and count what the sites have.

        Raises:
            DataError: rows cannot be used; names the experiment's file, the key and the site file.
        """
        from common.data.tasks import make_task

        task = make_task(self.federation(next(self.cells())).task)
        for key, data in (("data.validation", self.config.data.validation), ("data.test", self.config.data.test)):
            with self._naming(f"`{key}`"):
                self._digests[key] = _digest(task.rows(data, self.source)[0])
        counted: dict[Path, tuple[str, dict[str, int]]] = {}  # by site file, which may be in several partitions
        for (clients, _), files in self.sites.items():
            for file in [file for file in files if file not in counted]:
                site = load(file, SiteConfig)
                with self._naming(f"`data.sites.{clients}`: {file}"):
                    rows = task.rows(site.data, file).rows
                self._digests[str(file)] = _digest(rows, file.read_bytes())
                counted[file] = site.name, self._counts(rows, site, file, labelled=bool(task.labels))
        return [
            {"clients": clients, "alpha": alpha, "sites": dict(counted[file] for file in files)}
            for (clients, alpha), files in self.sites.items()
        ]

    def _counts(self, rows: list[Row], site: SiteConfig, file: Path, *, labelled: bool) -> dict[str, int]:
        """A site's rows by what the report counts; ``labelled``: the answers are labels."""
        label = self.config.data.label
        if label is None and not labelled:
            return {"rows": len(rows)}
        if label is not None:
            wanted = DataConfig(
                **site.data.model_dump(include=set(TableConfig.model_fields) | {"prompt"}), answer=label
            )
            with self._naming(f"`data.label`: {file}"):
                rows = load_rows(wanted, file).rows
        return dict(sorted(Counter(row.answer for row in rows).items()))

    @contextmanager
    def _naming(self, key: str) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.source}: {key}: {error}") from None

    def _site_files(self, clients: int, alpha: float | None) -> list[Path]:
        """The site files of a partition, in the order of their names."""
        where = self.config.data.sites.get(clients)
        if where is None:
            known = ", ".join(map(str, self.config.data.sites))
            raise ConfigError(f"{self.source}: `grid.clients` has {clients}; keys of `data.sites`: {known}")
        key = f"`data.sites.{clients}`"
        if any("{alpha}" in path for path in ([where] if isinstance(where, str) else where)) != (alpha is not None):
            lacks = (
                "has no {alpha}, but there is `grid.alphas`" if alpha is not None else "has {alpha}, but there is no"
            )
            raise ConfigError(f"{self.source}: {key} {lacks}{'' if alpha is not None else ' `grid.alphas`'}")
        if isinstance(where, str):
            folder = resolve(where.replace("{alpha}", str(alpha)), self.source)
            files = sorted(folder.glob("*.yaml"))
            what = f"{folder} holds {len(files)} site files (*.yaml)"
        else:
            files = [resolve(path.replace("{alpha}", str(alpha)), self.source) for path in where]
            what = f"lists {len(files)} site files"
        if len(files) != clients:
            raise ConfigError(f"{self.source}: {key}: {what}, must be {clients}")
        return files

    def _refuse_what_is_given_twice(self) -> None:
        grid, training = self.config.grid, self.config.federation.get("training")
        if grid.local_steps is not None and isinstance(training, Mapping) and "local_steps" in training:
            raise ConfigError(f"{self.source}: `federation.training.local_steps` and `grid.local_steps`; give one")
        for choice in grid.strategies:
            if grid.ranks is not None and "rank" in choice.section:
                raise ConfigError(f"{self.source}: `rank` of {choice.called} and `grid.ranks`; give one of them")


def _check_score(key: str, federation: FederationConfig, source: Path) -> None:
    """Raise a ConfigError when the federation does not measure what learning rates are picked by."""
    from common.data.tasks import make_task

    measured = [s.name for s in make_task(federation.task).scores(federation.evaluation) if s.selectable]
    if key not in measured:
        allowed = ", ".join(measured)
        raise ConfigError(f"{source}: `select_by` is {key!r}; measured by this task and evaluation: {allowed}")


def _digest(rows: list[Row], file: bytes = b"") -> str:
    """SHA-256 (hex) of ``file``, the bytes of a site file, and of rows in their order; images count by content."""
    digest = hashlib.sha256(file)
    for row in rows:
        digest.update(row.key().encode())
    return digest.hexdigest()


def _with(section: object, changes: dict[str, Any]) -> object:
    """A section with changes; a value that is no section is returned, for the federation file's check to reject."""
    return {**section, **changes} if isinstance(section, Mapping) else section
