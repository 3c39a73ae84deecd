"""One rank's part in a round: every device of a site runs the same training on its share of the rows. No Flower."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from client.site_model import SiteModel
from client.training.ranks import Ranks
from client.training.settings import pick_autocast
from client.training.trainer import TrainResult, train
from client.update import Work
from common.config.federation import FederationConfig
from common.config.site import SiteConfig
from common.data.tasks import Task
from common.errors import ModelError
from common.protocol.tensors import Tensors

_SAME = 1e-6  # relative difference of norms that the last bits of unlike devices may make


@dataclass(frozen=True)
class Part:
    """The training of one device.

    Attributes:
        site: the site file's content.
        federation: the federation's settings.
        model: the model, on this rank's device.
        task: the learning task.
        examples: all of the site's encoded training rows.
    """

    site: SiteConfig
    federation: FederationConfig
    model: SiteModel
    task: Task[Any]
    examples: Sequence[Any]

    def train(
        self,
        work: Work,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        max_batch_size: int | None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> TrainResult:
        """Train one round; see ``client.training.trainer.train``."""
        seed = work.begin(self.site.name)
        if ranks.rank:  # each device draws its own dropout
            torch.manual_seed(torch.initial_seed() + ranks.rank)
        return train(
            self.model.tuned.model,
            optimizer,
            self.examples,
            self.task.collater(self.model.base.tokenizer, self.model.packing),
            self.task.loss_sum,
            self.federation.training,
            server_round=work.server_round,
            rounds=self.federation.rounds,
            max_batch_size=max_batch_size,
            ranks=ranks,
            autocast=pick_autocast(self.site.precision, self.model.device),
            seed=seed,
            go_on=self.site.privacy is not None,
            on_step=on_step,
        )

    def share(self, ranks: Ranks, beside: Tensors) -> None:
        """Bring rank 0's trained tensors to all ranks, and ``beside``, on the CPU: what its optimizer starts with.

        Raises:
            ModelError: the ranks have not read the same base model.
        """
        trained = {id(p): p.data for p in (self.model.tuned.parameters | self.model.tuned.local).values()}
        ranks.from_first([*trained.values(), *beside.values()])
        model = self.model.tuned.model
        frozen = (tensor.detach() for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in trained)
        norm = sum(float(torch.linalg.vector_norm(tensor.float())) ** 2 for tensor in frozen) ** 0.5
        norms = [number for (number,) in ranks.gather([norm])]
        if max(norms) - min(norms) > _SAME * max(norms):
            raise ModelError("the devices have not read the same base model; its files have changed, ask again")
