"""The clients of a federation: every node answers a hello first, and is rejected when its base model differs."""

import time
from collections import Counter
from dataclasses import asdict

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from common.config.cohort import AdmissionConfig, CohortConfig
from common.errors import FederationError, WireError, kind_of
from common.protocol.messages import Hello, HelloRequest
from common.text import SENTENCE, one_line
from server.loop.inflight import LOST, POLL_SECONDS, InFlight, failure_in
from server.loop.transport import patient
from server.run import from_supervisor
from server.run.folder import RunFolder
from server.run.quarantine import Quarantine
from strategies.flower.clients import Client
from strategies.flower.messages import RuleMessages

_GROUP = "hello"
_HELLOS = 3  # a node is asked for its hello so many times when its process dies before answering


class Clients:
    """The nodes of sites: which nodes have answered the hello, are admitted, are connected.

    Args:
        grid: Flower's grid.
        in_flight: the messages in flight, shared with the round loop.
        folder: the run folder, where joins and refusals are noted.
        settings: the content of every request.
        quarantine: the sites that are left out.
        admission: limits for a site's noise and number of rows.
        base_digest: digest of the server's base model.
        tokenizer_digest: digest of the server's tokenizer.
        expected: largest number of sites; when so many have answered, the server waits for no more. None: unknown.

    Attributes:
        hellos: hellos of the admitted nodes, by node id.
        refused: reasons why the other nodes are not admitted, by node id.
    """

    def __init__(
        self,
        grid: Grid,
        in_flight: InFlight,
        folder: RunFolder,
        settings: HelloRequest,
        quarantine: Quarantine,
        admission: AdmissionConfig,
        *,
        base_digest: str,
        tokenizer_digest: str,
        expected: int | None,
    ) -> None:
        self.hellos: dict[int, Hello] = {}
        self.refused: dict[int, str] = {}
        self._grid, self._in_flight, self._folder = grid, in_flight, folder
        self._settings, self._quarantine, self._admission = settings, quarantine, admission
        self._digests = {"base model": base_digest, "tokenizer": tokenizer_digest}
        self._expected = expected
        self._kinds: dict[str, str] = {}  # kinds of the errors for which nodes are not admitted, by site
        self._asked: set[int] = set()
        self._lost = Counter[int]()  # number of lost hellos, by node
        self._up: set[str] = set()  # admitted sites that are noted as connected in the run folder
        self._namesakes: dict[int, Hello] = {}  # hellos of nodes whose site name another connected node has

    def poll_hellos(self) -> None:
        """Send hellos to new and readmitted nodes, and read the answers that have arrived. Does not wait.

        A site that was killed and restarted is a new node. Flower counts the old node as connected for about a minute
        more; the new node is admitted as soon as the old one is gone.
        """
        for site in self._quarantine.readmitted():
            self._folder.event("client_readmitted", client=site, reason=f"{site}: takes part again")
        online = set(patient(self._grid.get_node_ids))
        self._note_connections(online)
        for node_id in self.returned(_GROUP):
            self._in_flight.forget(_GROUP, node_id)
            self._asked.remove(node_id)
        new = [node_id for node_id in online if node_id not in self._asked]
        if new:
            content = self._settings.to_record()
            self._in_flight.push([Message(content, node_id, MessageType.QUERY) for node_id in new], _GROUP)
            self._asked.update(new)
        for sent, reply in self._in_flight.arrived(_GROUP):
            self._take_in(sent.node_id, reply)
        for node_id, hello in list(self._namesakes.items()):
            if node_id not in online:
                del self._namesakes[node_id]
            elif not self._connected_as(hello.site):
                del self._namesakes[node_id], self.refused[node_id]
                self._admit(node_id, hello)

    def returned(self, group: str) -> list[int]:
        """Nodes that reconnected with the same key since an unanswered message was sent: the message is lost."""
        waiting = self._in_flight.open(group)
        return [
            sent.node_id for sent in waiting if from_supervisor.activated(self._folder.path, sent.node_id) > sent.at
        ]

    def _note_connections(self, online: set[int]) -> None:
        """Note which admitted sites have disconnected or reconnected since the last call."""
        up = {self.hellos[node_id].site for node_id in online & self.hellos.keys()}
        for site in sorted(up ^ self._up):
            self._folder.event("client_connected" if site in up else "client_disconnected", client=site)
        self._up = up

    def connected(self) -> list[int]:
        """Admitted nodes that are connected now and not left out, in a fixed order (by site name)."""
        excluded = self._quarantine.excluded()
        return [node_id for node_id in self._online() if self.hellos[node_id].site not in excluded]

    def node_of(self, site: str) -> int | None:
        """The connected node of a site."""
        return next((node_id for node_id in self.connected() if self.hellos[node_id].site == site), None)

    def register_with(self, strategy: RuleMessages) -> None:
        """Give the strategy the name, rank and alpha of new sites."""
        for node_id, hello in self.hellos.items():
            if node_id not in strategy.clients:
                rank = hello.rank if strategy.rule.section.mixed_ranks else None
                strategy.clients[node_id] = Client(hello.site, rank, has_base=True)

    def wait_for(self, cohort: CohortConfig) -> None:
        """Wait until ``min_clients`` sites are admitted.

        Raises:
            FederationError: too few joined within ``join_deadline`` seconds; the text gives the reasons of refusals.
        """
        deadline = time.monotonic() + cohort.join_deadline
        reported = -1
        while True:
            self.poll_hellos()
            ready = len(self.connected())
            if ready >= cohort.min_clients:
                return
            if ready != reported:
                left = max(0.0, deadline - time.monotonic())
                self._folder.event("waiting", connected=ready, needed=cohort.min_clients, deadline=round(left))
                reported = ready
            silent = len(self._in_flight.waiting(_GROUP))
            answered = len(self._asked) - silent
            if time.monotonic() > deadline or (self._expected is not None and answered >= self._expected):
                reasons = [*self.refused.values(), *self._quarantine.excluded().values()]
                if silent:
                    reasons.append(f"{silent} connected node(s) did not say hello")
                raise FederationError(
                    f"{ready} of {cohort.min_clients} sites joined within {cohort.join_deadline:g} seconds"
                    + "".join(f"; {reason}" for reason in reasons),
                    self._kinds,
                )
            time.sleep(POLL_SECONDS)

    def _take_in(self, node_id: int, reply: Message) -> None:
        if (failure := failure_in(reply)) is not None:
            self._lost[node_id] += failure.code in LOST
            if failure.code in LOST and self._lost[node_id] < _HELLOS:
                self._asked.remove(node_id)  # it is asked again if it is still there
            else:
                self._refuse(node_id, f"node {node_id}", failure.reason, failure.kind)
            return
        try:
            self._admit(node_id, Hello.read(reply.content))
        except WireError as unreadable:
            site = Hello.site_in(reply.content) or f"node {node_id}"
            self._refuse(node_id, site, f"{site}: {unreadable}", kind_of(unreadable))

    def _admit(self, node_id: int, hello: Hello) -> None:
        """Admit a node, or note the reason why it is rejected."""
        site = hello.site
        if (objection := self._objection(node_id, hello)) is not None:
            self._refuse(node_id, site, f"{site}: {objection}")
            return
        if self._connected_as(site):
            self._namesakes[node_id] = hello
            self._refuse(node_id, site, f"{site}: a site of this name has already joined, and is still connected")
            return
        self.hellos[node_id] = hello
        self._up.add(site)
        if self._folder.fact("keeps", {}).get(site) != hello.keeps:  # also of a site that is away at the delivery
            self._folder.model_info({"keeps": {**self._folder.fact("keeps", {}), site: hello.keeps}})
        self._folder.event(
            "client_joined",
            client=site,
            num_examples=hello.train_rows,
            held_out=hello.held_out_rows,
            device=hello.device,
            version=hello.version,
            privacy=None if hello.privacy is None else asdict(hello.privacy),
        )

    def _objection(self, node_id: int, hello: Hello) -> str | None:
        """The reason why a site cannot take part; None when it can."""
        owner = from_supervisor.site_of(self._folder.path, node_id)
        if owner not in (hello.site, None):
            registered = f"its key is registered as {owner}" if owner else "its key is not in the register of sites"
            return f"node {node_id} says that it is {hello.site}, but {registered}"
        theirs = {"base model": hello.base_digest, "tokenizer": hello.tokenizer_digest}
        for what, digest in theirs.items():
            if digest != self._digests[what]:
                return f"its {what} differs: digest {digest}, the federation's is {self._digests[what]}"
        most = self._admission.max_rows
        if most is not None and hello.train_rows > most:
            return f"it declares {hello.train_rows} training rows; allowed by `admission.max_rows`: {most}"
        if hello.privacy is not None and hello.privacy.noise > self._admission.max_noise:
            return (
                f"it adds noise of standard deviation {hello.privacy.noise:g} to every number (differential privacy); "
                f"allowed by `admission.max_noise`: {self._admission.max_noise:g}"
            )
        return None

    def _connected_as(self, site: str) -> bool:
        return any(self.hellos[node_id].site == site for node_id in self._online())

    def _online(self) -> list[int]:
        """Admitted nodes that are connected now, by site name."""
        online = set(patient(self._grid.get_node_ids)) & self.hellos.keys()
        return sorted(online, key=lambda node_id: self.hellos[node_id].site)

    def _refuse(self, node_id: int, site: str, reason: str, kind: str | None = None) -> None:
        """Note the reason why a node does not take part, and the ``kind`` of its error if it answered with one."""
        reason = one_line(reason, SENTENCE)
        self.refused[node_id] = reason
        self._kinds |= {} if kind is None else {site: kind}
        self._folder.event("client_refused", client=site, reason=reason, kind=kind)
