"""The parts of a site that answer one message."""

from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context

from client.kept.models import KeptModels
from client.kept.own_tensors import OwnTensors
from client.masked import Member
from client.privacy.guard import Gate
from client.progress import Progress
from client.received import Held, receive
from client.session import Session
from common.protocol.messages import EvaluateRequest, HelloRequest, TrainRequest


@dataclass(frozen=True)
class Site:
    """The parts that answer a message.

    The session does the work, the gate checks, Flower's context keeps state, the site's people see the progress; the
    member takes part in masked sums.
    """

    session: Session
    gate: Gate
    context: Context
    progress: Progress
    member: Member

    @property
    def unmasked(self) -> int:
        """The run's last round whose sum the site has helped to unmask, as its ledger tells."""
        return self.gate.totals.unmasked[str(self.member.run)]

    def own(self, request: HelloRequest) -> OwnTensors:
        """The tensors that the site trains and never sends, in a request's run."""
        return OwnTensors(self.gate.own / self.session.federation.name, request.run)

    def receive(self, request: TrainRequest | EvaluateRequest, active: list[str]) -> Held:
        """Bring the session to a request's state, and to what the site has kept for itself; see ``client.received``."""
        self.session.kept = self.own(request).after(request.server_round - isinstance(request, TrainRequest))
        return receive(request, active, self.session, self.gate, self.context)

    def models(self, request: HelloRequest) -> KeptModels | None:
        """The models that the site keeps of a request's federation; None: it keeps none, as in an experiment."""
        if self.context.node_config.get("ledgers") is not None:
            return None
        folder = self.gate.site.model_folder(Path(str(self.context.node_config["site"])), self.session.federation.name)
        return None if folder is None else KeptModels(folder, request.run)
