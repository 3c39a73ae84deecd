"""Who takes part: every node says hello first, and is refused by name when its base model differs."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from flwr.app import ConfigRecord, ConfigRecordValues, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common.config.federation import AdmissionConfig, CohortConfig
from common.errors import FederationError
from common.protocol.declared_noise import Declared
from common.protocol.records import get_record
from server.loop.inflight import LOST, POLL_SECONDS, Mailbox, failure_in
from server.run import node_owners
from server.run.folder import RunFolder
from server.run.quarantine import Refusals
from strategies.flower.messages import Client, RuleMessages

_GROUP = "hello"
_HELLOS = 3  # so often a node is asked whose hello was lost with a process of its


@dataclass(frozen=True)
class Member:
    """An admitted site; ``privacy`` when it adds noise to its updates."""

    site: str
    train_rows: int
    held_out_rows: int
    device: str
    rank: int
    version: str
    privacy: Declared | None = None


class Roster:
    """The admitted sites by node id.

    Args:
        grid: Flower's grid.
        mailbox: shared with the round loop.
        folder: where joins and refusals are noted.
        settings: what every message's "config" record holds.
        refusals: which sites are left out.
        admission: how much noise a site may add, and how many rows it may have.
        base_digest: of the server's base model.
        tokenizer_digest: of the server's tokenizer.
        expected: how many sites there are at most; once so many have answered, nobody is waited for. None: unknown.
    """

    def __init__(
        self,
        grid: Grid,
        mailbox: Mailbox,
        folder: RunFolder,
        settings: Mapping[str, ConfigRecordValues],
        refusals: Refusals,
        admission: AdmissionConfig,
        *,
        base_digest: str,
        tokenizer_digest: str,
        expected: int | None,
    ) -> None:
        self.members: dict[int, Member] = {}
        self.refused: dict[int, str] = {}
        self._grid, self._mailbox, self._folder = grid, mailbox, folder
        self._settings, self._refusals, self._admission = settings, refusals, admission
        self._digests = {"base model": base_digest, "tokenizer": tokenizer_digest}
        self._expected = expected
        self._greeted: set[int] = set()
        self._lost = Counter[int]()  # hellos by node
        self._up: set[str] = set()  # admitted sites that are connected, as far as it has been noted
        self._namesakes: dict[int, Message] = {}  # hellos of nodes whose name another connected node has

    def greet(self) -> None:
        """Take in whom an operator readmits and who is new: ask for a hello, read the answers. Does not wait.

        A site that was killed and started again comes as a new node while Flower still counts the old one as
        connected, for about a minute; it is taken in as soon as that one is gone.
        """
        for site in self._refusals.readmitted():
            self._folder.event("client_readmitted", client=site, reason=f"{site}: takes part again")
        online = set(self._grid.get_node_ids())
        self._note_connections(online)
        for node_id in self.returned(_GROUP):
            self._mailbox.forget(_GROUP, node_id)
            self._greeted.remove(node_id)
        new = [node_id for node_id in online if node_id not in self._greeted]
        if new:
            content = RecordDict({"config": ConfigRecord({**self._settings})})
            self._mailbox.push([Message(content, node_id, MessageType.QUERY) for node_id in new], _GROUP)
            self._greeted.update(new)
        for sent, reply in self._mailbox.arrived(_GROUP):
            self._take_in(sent.node_id, reply)
        for node_id, reply in list(self._namesakes.items()):
            if node_id not in online:
                del self._namesakes[node_id]
            elif not self._connected_as(str(_told(reply)["site"])):
                del self._namesakes[node_id], self.refused[node_id]
                self._take_in(node_id, reply)

    def returned(self, group: str) -> list[int]:
        """Nodes that connected anew, with the same key, after they had been sent a message that is not answered."""
        waiting = self._mailbox.open(group)
        return [sent.node_id for sent in waiting if node_owners.activated(self._folder.path, sent.node_id) > sent.at]

    def _note_connections(self, online: set[int]) -> None:
        """Note which admitted sites have gone or come back since the last look."""
        up = {self.members[node_id].site for node_id in online & self.members.keys()}
        for site in sorted(up ^ self._up):
            self._folder.event("client_connected" if site in up else "client_disconnected", client=site)
        self._up = up

    def connected(self) -> list[int]:
        """Admitted nodes that are connected now and not left out, in a fixed order (by site name)."""
        excluded = self._refusals.excluded()
        return [node_id for node_id in self._online() if self.members[node_id].site not in excluded]

    def node_of(self, site: str) -> int | None:
        """The connected node of a site."""
        return next((node_id for node_id in self.connected() if self.members[node_id].site == site), None)

    def introduce(self, strategy: RuleMessages) -> None:
        """Tell the strategy of sites that are new."""
        for node_id, member in self.members.items():
            if node_id not in strategy.clients:
                rank = member.rank if strategy.rule.section.mixed_ranks else None
                strategy.clients[node_id] = Client(member.site, rank, has_base=True)

    def gather(self, cohort: CohortConfig) -> None:
        """Wait until ``min_clients`` sites are admitted.

        Raises:
            FederationError: not enough came within ``join_deadline`` seconds; says who was refused and why.
        """
        deadline = time.monotonic() + cohort.join_deadline
        reported = -1
        while True:
            self.greet()
            ready = len(self.connected())
            if ready >= cohort.min_clients:
                return
            if ready != reported:
                left = max(0.0, deadline - time.monotonic())
                self._folder.event("waiting", connected=ready, needed=cohort.min_clients, deadline=round(left))
                reported = ready
            silent = len(self._mailbox.waiting(_GROUP))
            answered = len(self._greeted) - silent
            if time.monotonic() > deadline or (self._expected is not None and answered >= self._expected):
                reasons = [*self.refused.values(), *self._refusals.excluded().values()]
                if silent:
                    reasons.append(f"{silent} connected node(s) did not say hello")
                raise FederationError(
                    f"{ready} of {cohort.min_clients} sites joined within {cohort.join_deadline:g} seconds"
                    + "".join(f"; {reason}" for reason in reasons)
                )
            time.sleep(POLL_SECONDS)

    def _take_in(self, node_id: int, reply: Message) -> None:
        if (failure := failure_in(reply)) is not None:
            self._lost[node_id] += failure.code in LOST
            if failure.code in LOST and self._lost[node_id] < _HELLOS:
                self._greeted.remove(node_id)  # it is asked again if it is still there
            else:
                self._refuse(node_id, f"node {node_id}", failure.reason)
            return
        hello = _told(reply)
        site = str(hello.get("site", f"node {node_id}"))
        owner = node_owners.site_of(self._folder.path, node_id)
        if owner not in (site, None):
            registered = f"its key is registered as {owner}" if owner else "its key is not in the register of sites"
            self._refuse(node_id, site, f"{site}: node {node_id} says that it is {site}, but {registered}")
            return
        for what, key in (("base model", "base_digest"), ("tokenizer", "tokenizer_digest")):
            theirs, ours = str(hello.get(key)), self._digests[what]
            if theirs != ours:
                self._refuse(node_id, site, f"{site}: its {what} differs: digest {theirs}, the federation's is {ours}")
                return
        numbers = [hello.get(key) for key in ("train_rows", "held_out_rows", "rank")]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers) or not numbers[0]:
            self._refuse(
                node_id, site, f"{site}: train_rows, held_out_rows, rank are {numbers}; allowed: whole numbers"
            )
            return
        rows, most = int(numbers[0]), self._admission.max_rows  # type: ignore[arg-type]
        if most is not None and rows > most:
            self._refuse(
                node_id, site, f"{site}: it declares {rows} training rows; allowed by `admission.max_rows`: {most}"
            )
            return
        try:
            privacy = self._privacy(reply)
        except ValueError as reason:
            self._refuse(node_id, site, f"{site}: {reason}")
            return
        if self._connected_as(site):
            self._namesakes[node_id] = reply
            self._refuse(node_id, site, f"{site}: a site of this name has already joined, and is still connected")
            return
        member = Member(
            site,
            rows,
            int(numbers[1]),  # type: ignore[arg-type]
            str(hello.get("device", "")),
            int(numbers[2]),  # type: ignore[arg-type]
            str(hello.get("version", "")),
            privacy,
        )
        self.members[node_id] = member
        self._up.add(site)
        self._folder.event(
            "client_joined",
            client=site,
            num_examples=member.train_rows,
            held_out=member.held_out_rows,
            device=member.device,
            version=member.version,
            privacy=None if privacy is None else asdict(privacy),
        )

    def _privacy(self, reply: Message) -> Declared | None:
        """What noise a site adds.

        Raises:
            ValueError: what it says cannot be, or is more than is allowed.
        """
        privacy = Declared.read(get_record(reply.content, "privacy", ConfigRecord))
        if privacy is not None and privacy.noise > self._admission.max_noise:
            raise ValueError(
                f"it adds noise of standard deviation {privacy.noise:g} to every number (differential privacy); "
                f"allowed by `admission.max_noise`: {self._admission.max_noise:g}"
            )
        return privacy

    def _connected_as(self, site: str) -> bool:
        return any(self.members[node_id].site == site for node_id in self._online())

    def _online(self) -> list[int]:
        """Admitted nodes that are connected now, by site name."""
        online = set(self._grid.get_node_ids()) & self.members.keys()
        return sorted(online, key=lambda node_id: self.members[node_id].site)

    def _refuse(self, node_id: int, site: str, reason: str) -> None:
        self.refused[node_id] = reason
        self._folder.event("client_refused", client=site, reason=reason)


def _told(reply: Message) -> ConfigRecord:
    return get_record(reply.content, "config", ConfigRecord)
