"""The section of a federation file for experiment trackers, which the server alone reads."""

import re
from typing import Literal

from pydantic import Field, field_validator

from common.config.section import Section

_SECRET = re.compile(r"://[^/@]*:[^/@]*@")


class MLflowConfig(Section):
    """MLflow; user name, password or token come from MLflow's own environment variables."""

    uri: str | None = Field(
        None,
        description="Tracking server or database: https://..., sqlite:////absolute/path.db; null: MLFLOW_TRACKING_URI "
        "in the server's environment.",
    )
    experiment: str | None = Field(None, min_length=1, description="Experiment; null: the federation's name.")

    @field_validator("uri")
    @classmethod
    def _names_a_service(cls, uri: str | None) -> str | None:
        if uri is None:
            return uri
        if _SECRET.search(uri):
            raise ValueError(
                "the address holds a password; leave it out and set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI, in the server's environment"
            )
        if "://" not in uri or re.match(r"sqlite:///[^/]", uri):
            raise ValueError(f"{uri!r} is no address; allowed: https://..., sqlite:////absolute/path.db")
        return uri


class WandbConfig(Section):
    """Weights & Biases; the key comes from WANDB_API_KEY in the server's environment."""

    project: str | None = Field(None, min_length=1, description="Project; null: the federation's name.")
    mode: Literal["online", "offline"] = Field(
        "online", description="`offline`: into the run's folder, for `wandb sync`; nothing is sent."
    )


class TrackingConfig(Section):
    """Trackers beside TensorBoard. They get the numbers of every site by its name, and the settings that sites see."""

    mlflow: MLflowConfig | None = Field(None, description="MLflow; needs the extra `mlflow`.")
    wandb: WandbConfig | None = Field(None, description="Weights & Biases; needs the extra `wandb`.")
