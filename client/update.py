"""A round's work at a site, and the site's update in the form to send, clipped and noised with `privacy`."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from client.privacy.noise import norm_of, private
from client.site_model import SiteModel
from client.training.galore import GaLore
from client.training.inner import SecondMoments
from client.training.settings import make_optimizer
from client.training.trainer import schedule
from common.config.federation import FederationConfig
from common.config.site import PrivacyConfig
from common.linalg.subspace import projects_right
from common.model import second_moments
from common.protocol.factors import Exchange, Factors, pack, packed_bytes, rounding_error
from common.protocol.tensors import Tensors


@dataclass(frozen=True)
class PreparedUpdate:
    """An update, prepared for sending.

    Attributes:
        tensors: the tensors to send, by name.
        norm: L2 norm of the whole change, with clipping and noise.
        wire_error: relative error of rounded factors; None: nothing is rounded.
    """

    tensors: Tensors
    norm: float
    wire_error: float | None = None


def trained_tensors(
    trained: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    privacy: PrivacyConfig | None,
    *,
    in_float32: bool = False,
) -> PreparedUpdate:
    """Prepare an update of dense tensors.

    Args:
        trained: the tensors after training, by name.
        received: the same tensors before training.
        privacy: the site file's section ``privacy``; None: the exact tensors are sent.
        in_float32: send float32, also where training used another dtype.
    """
    changes = {name: tensor.detach().cpu().float() - received[name].float() for name, tensor in trained.items()}
    if privacy is None:
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in trained.items()}
    else:
        changes = private(changes, privacy)
        tensors = {name: (received[name].float() + change).to(trained[name].dtype) for name, change in changes.items()}
    if in_float32:
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    return PreparedUpdate(tensors, norm_of(changes.values()))


def changed_weights(
    optimizer: GaLore,
    names: Sequence[str],
    start: Mapping[str, Tensor],
    exchange: Exchange,
    privacy: PrivacyConfig | None,
    *,
    moments: bool,
) -> PreparedUpdate:
    """Prepare an update of base weights that GaLore trained: projected weights in factors, a head dense.

    Args:
        optimizer: the optimizer after training.
        names: names of the trained tensors that are sent.
        start: the tensors before training, by name.
        exchange: the form in which factors are sent.
        privacy: the site file's section ``privacy``; None: the exact change is sent.
        moments: whether to send Adam's second moments, too.
    """
    changes = {name: optimizer.factors(name) for name in names if name in optimizer.projected}
    whole = {name: optimizer.whole(name, start[name]) for name in names if name not in optimizer.projected}
    update = factored_weights(changes, whole, start, exchange, privacy)
    if not moments:
        return update
    sent = {second_moments.name_of(name): optimizer.second_moment(name) for name in changes}
    return replace(update, tensors=update.tensors | sent)


def factored_weights(
    changes: Mapping[str, Factors],
    whole: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    exchange: Exchange,
    privacy: PrivacyConfig | None,
) -> PreparedUpdate:
    """Prepare an update of changes in factors and of dense tensors beside them.

    With ``privacy`` the whole update is clipped jointly and noised, except for the factors' decay, which depends only
    on the federation file and the number of rows. With a shared basis the numbers R get the noise, and only they are
    sent. An own basis comes from the gradients, so it must not leave: the product P R is formed, noised and sent dense
    (decision 014).

    Args:
        changes: the changes of projected weights, by name.
        whole: the other tensors after training, in float32 on the CPU.
        start: all tensors before training.
        exchange: the form in which factors are sent.
        privacy: the site file's section ``privacy``; None: the exact change is sent.
    """
    moved = {name: tensor - start[name] for name, tensor in whole.items()}
    if privacy is not None and exchange.basis is None:
        terms = {name: Factors(1.0, change.terms).change(start[name]) for name, change in changes.items()}
        noised = private(terms | moved, privacy)
        decays = {name: change.decay for name, change in changes.items()}
        tensors = {name: term.add_(start[name], alpha=decays.get(name, 1.0)) for name, term in noised.items()}
        return PreparedUpdate(tensors, norm_of(tensor - start[name] for name, tensor in tensors.items()))
    if privacy is not None:
        changes, moved = _noised_in_basis(changes, moved, start, exchange, privacy)
        whole = {name: start[name] + change for name, change in moved.items()}
    tensors = {k: t for n, change in changes.items() for k, t in pack(n, change, start[n], exchange).items()}
    tensors |= whole
    norm = math.hypot(norm_of(moved.values()), *(change.square(start[name]) ** 0.5 for name, change in changes.items()))
    if exchange.precision == "float32":
        return PreparedUpdate(tensors, norm)
    shapes = {name: tuple(start[name].shape) for name in changes}
    return PreparedUpdate(tensors, norm, rounding_error(changes, shapes, exchange))


def _noised_in_basis(
    changes: Mapping[str, Factors],
    moved: Tensors,
    start: Mapping[str, Tensor],
    exchange: Exchange,
    privacy: PrivacyConfig,
) -> tuple[dict[str, Factors], Tensors]:
    """Clip and noise changes in the round's shared bases P, and changes of dense tensors.

    Only R depends on data: every machine draws P from the seed. P's rows (columns) are orthonormal, so R has the norm
    of P R.
    """
    assert exchange.basis is not None  # noqa: S101 - the caller has checked
    numbers, bases = {}, {}
    for name, change in changes.items():
        shape = tuple(start[name].shape)
        right, rank = projects_right(shape), exchange.basis.rank
        bases[name] = exchange.basis(name, shape)
        sums = [(a if right else b).cpu() for a, b in change.terms]  # one, or none when the weight got no gradient
        numbers[name] = sum(sums, torch.zeros((shape[0], rank) if right else (rank, shape[1])))
    noised, result = private(numbers | moved, privacy), {}
    for name, change in changes.items():
        pair = (noised[name], bases[name]) if projects_right(start[name].shape) else (bases[name], noised[name])
        result[name] = Factors(change.decay, [pair], common=True)
    return result, {name: noised[name] for name in moved}


class Work:
    """One round's work, planned and checked completely before a row is read.

    Args:
        model: the site's model, in the state that the round starts from.
        federation: the federation's settings.
        privacy: the site file's section ``privacy``.
        server_round: the round, from 1.
        active: names of the tensors that are trained and sent.
        rows: number of the shard's training rows.

    Attributes:
        server_round: the round, from 1.
        parameters: the parameters that are trained and sent, by name.
        mine: all parameters that are trained, those that stay at the site included, by name.
        steps: number of optimizer steps.
    """

    def __init__(
        self,
        model: SiteModel,
        federation: FederationConfig,
        privacy: PrivacyConfig | None,
        server_round: int,
        active: list[str],
        rows: int,
    ) -> None:
        self._model, self._federation, self._privacy = model, federation, privacy
        self.server_round, self._active = server_round, active
        self.parameters = {name: model.tuned.parameters[name] for name in second_moments.without(active)}
        self.mine = self.parameters | model.tuned.local
        self.steps = federation.training.steps(rows)

    def begin(self, site: str) -> str:
        """Prepare the model for training and seed dropout; returns the seed for the order of rows."""
        training = self._federation.training
        if training.gradient_checkpointing:
            self._model.tuned.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        seed = f"{training.seed}/{site}/{self.server_round}"
        torch.manual_seed(random.Random(seed).getrandbits(63))  # noqa: S311 - dropout
        return seed

    def optimizer(self, moments: Mapping[str, Tensor] | None = None) -> torch.optim.Optimizer:
        """Make the round's optimizer; among the tensors that are sent, only ``parameters`` are trained.

        Args:
            moments: the second moments that the round starts with, where they are averaged; None: those held.

        Raises:
            TrainingError: the settings do not match the weights.
        """
        for name, parameter in self._model.tuned.parameters.items():
            parameter.requires_grad_(name in self.parameters)
        training, strategy = self._federation.training, self._federation.strategy
        basis = self._model.exchange(self.server_round).basis if strategy.trains == "weights" else None
        return make_optimizer(self.mine, training, strategy, self.server_round, basis, self.second_moments(moments))

    def second_moments(self, known: Mapping[str, Tensor] | None = None) -> SecondMoments | None:
        """The second moments that the round starts with; None without ``optimizer_state`` averaged."""
        if self._federation.strategy.optimizer_state != "averaged":
            return None
        tensors = self._model.weights.tensors if known is None else known
        return SecondMoments(tensors, (self.server_round - 1) * self.steps)

    def most_bytes(self) -> int:
        """Upper limit of the bytes of the update's tensors; depends on shapes and settings alone.

        Raises:
            TrainingError: see ``optimizer``.
        """
        self.optimizer()  # mistakes in the settings must show before anything is charged
        strategy = self._federation.strategy
        if strategy.trains != "weights":
            return sum(p.numel() * (4 if strategy.changes_base else p.element_size()) for p in self.parameters.values())
        weights, exchange = self._model.weights.tensors, self._model.exchange(self.server_round)
        whole = {name: 4 * weights[name].numel() for name in self._active}
        if self._privacy is not None and exchange.basis is None:
            return sum(whole.values())
        directions = strategy.rank * strategy.bases(self.steps)
        factored = [name for name in self.parameters if strategy.projects(name)]
        return sum({**whole, **{n: packed_bytes(weights[n].shape, directions, exchange) for n in factored}}.values())

    def start(self) -> Tensors:
        """Copies of the tensors that the update will be relative to; empty for GaLore, which records changes itself."""
        if self._federation.strategy.trains == "weights":
            return {}
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def update(self, optimizer: torch.optim.Optimizer, start: Mapping[str, Tensor]) -> PreparedUpdate:
        """Prepare the update after training."""
        if isinstance(optimizer, GaLore):
            weights, exchange = self._model.weights.tensors, self._model.exchange(self.server_round)
            moments = self._federation.strategy.optimizer_state == "averaged"
            return changed_weights(optimizer, list(self.parameters), weights, exchange, self._privacy, moments=moments)
        # Strategies that change base weights keep the state in float32, factors included.
        in_float32 = self._federation.strategy.changes_base
        return trained_tensors(self.parameters, start, self._privacy, in_float32=in_float32)

    def nothing(self, start: Mapping[str, Tensor]) -> tuple[PreparedUpdate, dict[str, float]]:
        """The update to send when training with `privacy` has failed: noise alone, in the form of an honest update.

        Names, shapes, dtypes, factors, decay and the reported numbers are the same as after training. So the operator
        cannot tell that training failed, and cannot learn which rows make it fail.
        """
        training, strategy = self._federation.training, self._federation.strategy
        factors = schedule(training, self.server_round, self._federation.rounds, self.steps)
        rates = [training.learning_rate * factor for factor in factors]
        numbers = {"steps": float(self.steps), "learning_rate": rates[-1]}
        for parameter in self.mine.values():
            parameter.grad = None
        if strategy.trains != "weights":
            return trained_tensors(start, start, self._privacy, in_float32=strategy.changes_base), numbers
        weights, decay = self._model.weights.tensors, 1.0
        for rate in rates:
            decay *= 1.0 - rate * training.weight_decay
        changes = {name: Factors(decay, [], common=True) for name in self.parameters if strategy.projects(name)}
        whole = {name: weights[name] for name in self.parameters if not strategy.projects(name)}
        return factored_weights(
            changes, whole, weights, self._model.exchange(self.server_round), self._privacy
        ), numbers
