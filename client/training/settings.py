"""Settings that follow from site file and federation file together: base model, rank, optimizer, device, autocast."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from client.training.galore import GaLore
from client.training.inner import SecondMoments
from common.config.federation import FederationConfig
from common.config.section import ModelSource, Quantization, resolve
from common.config.site import SiteConfig
from common.config.strategy import StrategyConfig, names
from common.config.training import TrainingConfig
from common.errors import ModelError, TrainingError
from common.linalg.subspace import SharedBasis
from common.model.quantization import Held

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def model_source(site: SiteConfig, site_file: Path, model: ModelSource) -> tuple[str, str | None]:
    """Folder, or hub id and revision, of the base model: from the site file, else from the federation file.

    Raises:
        ModelError: neither file names the base model.
    """
    own = site.model
    if own is not None and own.path is not None:
        return str(resolve(own.path, site_file)), None
    source = own or model
    if source.hub is not None:
        return source.hub, source.revision
    if source.path is None:
        raise ModelError("the federation file does not say where the base model is; give `model` in the site file")
    return source.path, None


def held(site: SiteConfig, federation: FederationConfig) -> Held:
    """How a site holds the base model: as the federation file says, or as the site chooses where that file lets it.

    Raises:
        ModelError: the site's choice is not allowed.
    """
    model, own = federation.model, site.quantization
    allowed = {model.quantization, *model.site_quantization}
    if own is not None and own not in allowed:
        raise ModelError(
            f"the site file asks for `quantization` {own}; the federation's `model.quantization` and "
            f"`model.site_quantization` allow: {', '.join(sorted(allowed))}"
        )
    return Held(own or model.quantization, federation.strategy, str(pick_device(site.device)))


def lora_rank(site: SiteConfig, strategy: StrategyConfig) -> int:
    """The LoRA rank that a site trains with.

    Raises:
        ModelError: the site caps the rank, but the strategy needs equal ranks.
    """
    wanted, cap = strategy.rank, site.max_rank
    if cap is None or cap >= wanted or strategy.trains == "weights":
        return wanted
    if not strategy.mixed_ranks:
        allow = " and ".join(names(lambda section: section.mixed_ranks))
        raise ModelError(
            f"max_rank {cap} is below the federation's rank {wanted}, and {strategy.name} needs equal ranks; only "
            f"{allow} allow mixed ones"
        )
    return cap


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter],
    training: TrainingConfig,
    strategy: StrategyConfig,
    server_round: int,
    basis: SharedBasis | None,
    moments: SecondMoments | None,
) -> torch.optim.Optimizer:
    """Make the optimizer of a round.

    Args:
        parameters: the parameters that the round trains, by name.
        training: the federation's training section.
        strategy: the federation's strategy section.
        server_round: the round, from 1.
        basis: the basis that all sites share in the round; None: GaLore computes bases from the gradients.
        moments: the second moments that the round starts with under ``optimizer_state`` averaged.

    Raises:
        TrainingError: GaLore cannot train these parameters.
    """
    optimizer = _optimizer(parameters, training, strategy, server_round, basis, moments)
    head = [parameter for name, parameter in parameters.items() if training.rate(name) != training.learning_rate]
    if head:
        rest = optimizer.param_groups[0]["params"]
        rest[:] = [parameter for parameter in rest if all(parameter is not one for one in head)]
        optimizer.add_param_group({"params": head, "lr": training.head_learning_rate})
    return optimizer


def _optimizer(
    parameters: Mapping[str, torch.nn.Parameter],
    training: TrainingConfig,
    strategy: StrategyConfig,
    server_round: int,
    basis: SharedBasis | None,
    moments: SecondMoments | None,
) -> torch.optim.Optimizer:
    """The optimizer with one learning rate for all parameters; see ``make_optimizer``."""
    if strategy.trains == "weights":
        return GaLore(
            parameters,
            lr=training.learning_rate,
            rank=strategy.rank if strategy.projection == "galore" else None,
            update_proj_gap=strategy.update_proj_gap,
            scale=strategy.scale,
            inner=training.optimizer,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            moments=strategy.moments,
            basis=basis,
            second_moments=moments,
            refresh_batches=strategy.refresh_batches,
            unprojected=[name for name in parameters if not strategy.projects(name)],
            seed=training.seed + server_round,
        )
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters.values(), lr=training.learning_rate, weight_decay=training.weight_decay)
    return torch.optim.AdamW(
        parameters.values(),
        lr=training.learning_rate,
        betas=training.betas,
        weight_decay=training.weight_decay,
        fused=True,
    )


def pick_device(device: str) -> torch.device:
    """The device that a site file asks for; ``auto`` is CUDA when present.

    Raises:
        TrainingError: the site file asks for a CUDA device that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    picked = torch.device(device)
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise TrainingError(
            f"device {device} is asked for; this machine has {torch.cuda.device_count()} CUDA device(s)"
        )
    return picked


def pick_devices(site: SiteConfig, rows_per_step: int | None) -> list[torch.device]:
    """The devices that a site trains on, that of the process that answers first.

    Args:
        site: the site file's content.
        rows_per_step: rows of an optimizer step, which the devices share; None: not known yet.

    Raises:
        TrainingError: this machine does not have as many, or a step has fewer rows than there are devices with a copy
            of the model each.
    """
    first = pick_device(site.device)
    if site.devices == 1:
        return [first]
    there, rows = torch.cuda.device_count(), None if site.split else rows_per_step
    if site.devices == "auto":
        count = min(there, rows or there) if first.type == "cuda" else 1
        return [torch.device("cuda", i) for i in range(count)] if count > 1 else [first]
    if first.type == "cpu" and site.device != "cpu":
        raise TrainingError(
            f"`devices` is {site.devices}, but this machine has no CUDA device; allowed: `devices` 1 or auto"
            + ("" if site.split else ", or with `device` cpu so many processes on the CPU")
        )
    if first.type == "cuda" and site.devices > there:
        raise TrainingError(
            f"`devices` is {site.devices}; this machine has {there} CUDA device(s); allowed: 1 to {there}, auto"
        )
    if rows is not None and rows < site.devices:
        raise TrainingError(
            f"`devices` is {site.devices}, but the federation's steps have {rows} row(s), so that a device "
            f"would have none; allowed: `devices` 1 to {rows}, auto"
        )
    return [torch.device("cpu") if first.type == "cpu" else torch.device("cuda", i) for i in range(site.devices)]


def pick_autocast(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The autocast type of forward and backward; None for the weights' own type.

    Raises:
        TrainingError: float16 is asked for on a CPU.
    """
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    if precision == "float16" and device.type == "cpu":
        raise TrainingError("precision float16 needs a CUDA device; on a CPU use float32 or bfloat16")
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def state_bytes(name: str, weight: Tensor, strategy: StrategyConfig, training: TrainingConfig, bases: int = 1) -> int:
    """Bytes of the optimizer's state for one trained tensor.

    Args:
        name: the tensor's name.
        weight: the tensor.
        strategy: the federation's strategy section.
        training: the federation's training section.
        bases: number of bases that GaLore uses in a round.
    """
    moments = 2 if training.optimizer == "adamw" else 0
    if strategy.trains != "weights":
        return moments * weight.nbytes
    if strategy.projects(name):
        long, short, rank = max(weight.shape), min(weight.shape), strategy.rank
    else:  # the same sums, without basis, over the complete tensor
        long, short, rank, bases = weight.numel(), 0, 1, 1
    moment = {"float32": 4, "8bit": 1}[strategy.moments]
    # bases and updates of every term, moments, the projected gradient
    state = rank * (4 * bases * (long + short) + moments * moment * long + 4 * long)
    return state + (0 if weight.dtype == torch.float32 else weight.nbytes)


def describe(devices: Sequence[torch.device], quantization: Quantization = "whole", *, split: bool = False) -> str:
    """The devices' names, for people, and how the base model is held there."""
    names = Counter(torch.cuda.get_device_name(one) if one.type == "cuda" else "cpu" for one in devices)
    told = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items())
    if split and len(devices) > 1:
        told = f"one model over {told}"
    return told if quantization == "whole" else f"{told}, base model in {quantization}"
