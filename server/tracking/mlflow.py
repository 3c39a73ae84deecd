"""MLflow: a run with the federation's settings as parameters, found again by its tag when the run is resumed."""

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from common.config.tracking import MLflowConfig
from server.tracking.sink import Tracked

_STATUS = {"completed": "FINISHED", "failed": "FAILED"}
_TAG = "fedspan.run"
_PARAMS, _METRICS, _LONGEST = 100, 1000, 500  # most in one request; characters of a parameter that every store takes
#: No telemetry; a server that does not answer is given up after seconds, not minutes.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
}


class MLflow:
    """See ``Sink``.

    Args:
        config: the section ``tracking.mlflow``.
        run: the run.
    """

    def __init__(self, config: MLflowConfig, run: Tracked) -> None:
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=config.uri or os.environ["MLFLOW_TRACKING_URI"])
        name = config.experiment or run.federation
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known is not None else self._client.create_experiment(name)
        begun = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{run.id}'", max_results=1)
        if begun:
            self._run = begun[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        made = self._client.create_run(experiment, tags={_TAG: run.id}, run_name=run.name)
        self._run = made.info.run_id
        for some in _parts(run.settings.items(), _PARAMS):
            self._client.log_batch(self._run, params=[Param(key, str(value)[:_LONGEST]) for key, value in some])

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See ``Sink``."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for some in _parts(numbers.items(), _METRICS):
            self._client.log_batch(self._run, metrics=[Metric(tag, value, now, step) for tag, value in some])

    def end(self, status: str) -> None:
        """See ``Sink``."""
        self._client.set_terminated(self._run, _STATUS.get(status, "KILLED"))


def _parts(items: Iterable[tuple[str, Any]], size: int) -> Iterator[tuple[tuple[str, Any], ...]]:
    left = iter(items)
    while some := tuple(itertools.islice(left, size)):
        yield some
