"""The site file: written by the hospital, beside its data.

``policy`` and ``privacy`` limit what leaves the site. The server never sees these two sections; the site tells the
server the noise to expect, and the reason when the site refuses a request (decision 014).
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from common.config.outcome import KeepConfig
from common.config.section import SERVER, Digest, ModelSource, Name, Quantization, Section, SiteDataConfig, resolve
from common.config.strategy import names
from common.errors import ConfigError

MARK = "delivered.json"  # in a folder for a federation's models; a folder without it is somebody else's
_Names = Annotated[list[str], Field(min_length=1)]
#: ``model: models/x`` is short for ``model: {path: models/x}``.
_Model = Annotated[
    ModelSource,
    BeforeValidator(
        lambda value: {"path": value} if isinstance(value, str) else value, json_schema_input_type=str | ModelSource
    ),
]


class PolicyConfig(Section):
    """Limits on the site's federations, and on what may leave it. An absent key without a default limits nothing."""

    federations: _Names | None = Field(None, description="Names of the federations that the site takes part in.")
    strategies: _Names | None = Field(None, description="Strategies under which the site trains.")
    tensors: _Names | None = Field(
        None,
        description="Patterns of the tensors that may be trained and sent, e.g. model.layers.*.mlp.*; `*` stands for "
        "anything. For LoRA too: leave out the prefix base_model.model. that LoRA's tensors have.",
    )
    max_rounds: int | None = Field(
        None,
        ge=1,
        description="Most rounds that the site trains for one federation, over all runs; a round that is asked for "
        "again counts again.",
    )
    max_rounds_per_day: int | None = Field(
        None, ge=1, description="Most rounds that the site trains in a day (UTC), for all federations together."
    )
    max_upload_bytes_per_day: int | None = Field(
        None, ge=1, description="Most bytes of tensors in a day (UTC); a round counts with the most that it can send."
    )
    min_examples: int | None = Field(
        None, ge=1, description="Fewest training rows with which the site takes part; with fewer it refuses."
    )
    min_rows_per_update: int = Field(8, ge=1, description="Fewest distinct training rows of a round.")
    min_held_out: int = Field(10, ge=1, description="Fewest held-out rows whose scores leave; with fewer none do.")
    max_evaluations: int | None = Field(
        None,
        ge=1,
        description="Most evaluations on held-out rows for one federation, over all runs; null: for each agreement "
        "three times as many as its file plans.",
    )
    score_step: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Held-out scores leave as multiples of this number; null: 1 / rows, rounded up to 1, 2 or 5 times "
        "a power of ten.",
    )
    max_update_norm: float | None = Field(
        None, gt=0, description="L2 norm over all tensors of an update; the site does not send an update above it."
    )
    share_metrics: bool | None = Field(
        None, description="Whether losses and held-out scores leave; null: yes, but not with `privacy`."
    )

    @field_validator("strategies")
    @classmethod
    def _known(cls, strategies: list[str] | None) -> list[str] | None:
        for name in strategies or []:
            if name not in names():
                raise ValueError(f"{name!r} is no strategy; allowed: {', '.join(names())}")
        return strategies


class PrivacyConfig(Section):
    """Differential privacy of the whole shard: every update is clipped and noised before it leaves."""

    clip: float = Field(
        gt=0, description="Clipping norm: L2 norm over all tensors of an update; larger updates are scaled down to it."
    )
    noise_multiplier: float = Field(
        gt=0, description="Standard deviation of the noise on every number that leaves, in units of `clip`."
    )
    noise: Literal["local", "shared"] = Field(
        "local",
        description="local: the site adds all of the noise itself. shared: it adds the federation's "
        "`secure_aggregation.noise`, and the noise of all honest sites of a masked sum must reach `noise_multiplier`.",
    )
    colluders: int = Field(
        0,
        ge=0,
        description="With `noise` shared: how many other sites may work together with the server without the budget's "
        "epsilon being exceeded.",
    )
    delta: float = Field(gt=0, le=1e-3, description="Delta of the guarantee.")
    max_epsilon: float = Field(gt=0, description="Budget: the site stops before a round that would exceed it.")


def check_site(policy: PolicyConfig, privacy: PrivacyConfig | None, precision: str) -> None:
    """Raise a ValueError when parts of a site file contradict each other."""
    if privacy is None:
        return
    if precision == "float16":
        raise ValueError(
            "`precision` float16 leaves out steps whose gradients overflow, so that the decay of the weights, which "
            "leaves without noise, tells of the rows; allowed with `privacy`: auto, float32, bfloat16"
        )
    if policy.share_metrics:
        raise ValueError(
            "`policy.share_metrics` is true, but losses and scores carry no noise; allowed with `privacy`: false"
        )
    if policy.max_update_norm is not None:
        raise ValueError(
            "`policy.max_update_norm` would tell by a refusal how long an update is; with `privacy` leave it out, "
            "`privacy.clip` limits every update"
        )
    private = names(lambda section: section.private)
    for name in policy.strategies or []:
        if name not in private:
            raise ValueError(
                f"`policy.strategies` has {name}, which sends more than an update; allowed with `privacy`: "
                f"{', '.join(private)}"
            )


class TrustConfig(Section):
    """An app bundle may run at the site when its digest is listed, or when it is signed with one of the keys."""

    keys: list[str] = Field([], description="Public keys of the people who review code (`fedspan code key`).")
    bundles: list[Digest] = Field([], description="SHA-256 of single bundles (`fedspan code digest`).")
    settings: bool = Field(
        False,
        description="Agree to a federation only with a signature of its settings by one of the keys "
        "(`fedspan code sign --federation`).",
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.keys and not self.bundles:
            raise ValueError("give `keys` or `bundles`; with neither, no bundle could run")
        return self


class SiteConfig(Section):
    """One site: its name, its private shard, its device."""

    name: Name = Field(description="The site's name, as the operator sees it; not `server`.")
    data: SiteDataConfig
    model: _Model | None = Field(
        None, description="This site's copy of the base model: a folder, or a section; default: the federation's."
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: CUDA when present.")
    devices: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = Field(
        1,
        description="Number of devices that train together, each with a copy of the model and its part of a step's "
        "rows; auto: all CUDA devices, as long as each gets a row.",
    )
    split: bool = Field(
        False,
        description="`devices` hold one model together, each some of its blocks, in place of a copy each: for a model "
        "that fits no single one.",
    )
    device_deadline: float = Field(
        600.0,
        gt=0,
        le=604800,
        description="Longest wait for another device's process, in seconds, up to a week; then the round fails.",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Arithmetic of forward and backward; auto: bfloat16 on CUDA that has it, else float32.",
    )
    quantization: Quantization | None = Field(
        None,
        description="How the site holds linear weights that nobody trains, where `model.site_quantization` of the "
        "federation file allows it: `whole`, `nf4` or `int8`; null: as the federation file says.",
    )
    max_batch_size: int | None = Field(
        None,
        ge=1,
        description="Most rows per forward pass; gradient accumulation keeps the rows per optimizer step the same.",
    )
    max_rank: int | None = Field(None, ge=1, description="Cap on the LoRA rank, where the strategy allows mixed ranks.")
    trust: TrustConfig | None = Field(
        None, description="Code that may run at the site; null: any bundle that the operator sends."
    )
    policy: PolicyConfig = PolicyConfig()
    privacy: PrivacyConfig | None = None
    keep: KeepConfig | None = Field(
        None, description="Where the site keeps the federation's model; null: it keeps none."
    )
    agreements: str | None = Field(
        None,
        min_length=1,
        description="File with the site's agreements (`fedspan site agree`), relative to this file; default: "
        "<name>-agreements.json beside this file.",
    )
    ledger: str | None = Field(
        None,
        min_length=1,
        description="File with the record of all that leaves the site, relative to this file; default: "
        "<name>-ledger.jsonl beside this file.",
    )

    @field_validator("name")
    @classmethod
    def _not_the_servers(cls, name: str) -> str:
        if name == SERVER:
            raise ValueError(f"{name!r} is the server's name in records and pages; choose another name")
        return name

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        check_site(self.policy, self.privacy, self.precision)
        if self.devices != 1 and ":" in self.device:
            raise ValueError(
                f"`device` {self.device} is one device, `devices` {self.devices} are several; allowed with `devices`: "
                "`device` auto, cuda, cpu"
            )
        if self.split and (self.devices == 1 or self.device == "cpu"):
            raise ValueError(
                f"`split` lays a model over several CUDA devices, but `device` is {self.device} and `devices` "
                f"{self.devices}; allowed with `split`: `device` auto or cuda, `devices` auto or a number from 2"
            )
        return self

    @property
    def ledger_name(self) -> str:
        """Default name of the site's ledger file."""
        return f"{self.name}-ledger.jsonl"

    def ledger_file(self, site_file: Path) -> Path:
        """Path of the site's ledger, behind all links; ``site_file`` is the file that relative paths refer to."""
        return resolve(self.ledger or self.ledger_name, site_file).resolve()

    def model_folder(self, site_file: Path, federation: str) -> Path | None:
        """Folder for a federation's models; None: the site keeps none. ``site_file`` as above."""
        return None if self.keep is None else resolve(self.keep.model, site_file) / federation

    def check_model_folder(self, site_file: Path, federation: str) -> None:
        """Raise a ConfigError when the folder for a federation's models holds something else."""
        folder = self.model_folder(site_file, federation)
        try:
            free = folder is None or (folder / MARK).is_file() or not folder.exists() or not any(folder.iterdir())
        except OSError as error:
            raise ConfigError(f"{site_file}: `keep.model`: {folder} cannot be read ({error.strerror})") from None
        if not free:
            raise ConfigError(
                f"{site_file}: `keep.model`: {folder} exists and holds no model of a federation; move it away, or name "
                "another folder"
            )

    @property
    def shares_metrics(self) -> bool:
        """Whether losses and held-out scores leave the site."""
        return self.privacy is None and self.policy.share_metrics is not False
