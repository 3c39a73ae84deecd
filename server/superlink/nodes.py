"""Flower's register of SuperNodes, made to follow the operator's register of sites.

Flower's command line lists nodes without their keys, so this speaks to the SuperLink's Control API, where a node is
known by its key; what was registered before a crash is found again and nothing has to be remembered.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from common.errors import ConfigError, LaunchError
from server.run import from_supervisor
from server.superlink import registry
from server.superlink.control import control
from server.superlink.process import OwnSuperLink

_LOOK_SECONDS = 5.0
_GONE = "unregistered"


class Nodes:
    """Keeps the nodes of a SuperLink in step with the register of sites.

    Args:
        file: the register of sites.
        superlink: the SuperLink.
        run_dir: the run's folder, where the ServerApp reads which site a node's key belongs to.
        tell: called with a sentence about every change.
        keeps: whether this object registers and unregisters nodes; False: it only writes down each node's site.
    """

    def __init__(
        self, file: Path, superlink: OwnSuperLink, run_dir: Path, tell: Callable[[str], None], *, keeps: bool = True
    ) -> None:
        self._file, self._superlink, self._run_dir, self._tell, self._keeps = file, superlink, run_dir, tell, keeps
        self._seen, self._looked = 0, 0.0
        self._registry = registry.Registry()
        self._whose: dict[str, dict[str, str | float]] = {}
        self._told: set[str] = set()

    def begin(self) -> None:
        """Register the file's sites with a SuperLink that has just started.

        Raises:
            ConfigError: the file is wrong.
            LaunchError: the SuperLink does not take it.
        """
        self._read()
        try:
            self._follow()
        except LaunchError as error:
            raise LaunchError(f"the register of sites is not taken: {error}") from None

    def look(self) -> None:
        """Follow changes of the file, expiring keys and returning sites. Call repeatedly."""
        if time.monotonic() < self._looked + _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            if self._file.stat().st_mtime_ns != self._seen:
                self._read()
            self._follow()
        except LaunchError as error:  # a SuperLink that has just died: it is started again
            self._once(f"the register of sites is not taken: {error}; trying on")
            self._seen = 0
        except (ConfigError, OSError) as error:
            self._once(f"{error}; the register of sites stays as it was")

    def _read(self) -> None:
        seen = self._file.stat().st_mtime_ns if self._file.exists() else 0
        self._registry = registry.read(self._file)
        self._seen = seen

    def _follow(self) -> None:
        """Register and unregister nodes until Flower's register equals the file, and write down each node's site."""
        from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest

        active = self._registry.active(datetime.now(UTC))
        whose: dict[str, dict[str, str | float]] = {}
        with control(self._superlink) as client:
            nodes = {node.public_key.decode(): node for node in client.ListNodes(ListNodesRequest()).nodes_info}
            for key, node in nodes.items():
                if key not in active and node.status != _GONE and self._keeps:
                    client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
                    self._tell(f"{self._named(key)} may not connect any more")
            for key, site in active.items():
                if key not in nodes and not self._keeps:
                    continue  # whoever looks after the SuperLink registers it soon
                if key not in nodes:
                    node_id = client.RegisterNode(RegisterNodeRequest(public_key=key.encode(), name=site.name)).node_id
                elif nodes[key].status != _GONE:
                    node_id = nodes[key].node_id
                else:
                    self._once(
                        f"{site.name}: its key was unregistered in this run, and Flower takes no key twice; "
                        "the site makes a new pair"
                    )
                    continue
                whose[str(node_id)] = {"site": site.name, "key": site.fingerprint}
                if key in nodes and nodes[key].last_activated_at:
                    came = datetime.fromisoformat(nodes[key].last_activated_at)
                    whose[str(node_id)]["activated"] = came.timestamp()
        if whose != self._whose:
            from_supervisor.write_owners(self._run_dir, whose)
            self._whose = whose

    def _named(self, key: str) -> str:
        return next((f"{s.name} ({s.fingerprint})" for s in self._registry.sites if s.key == key), "an unknown key")

    def _once(self, text: str) -> None:
        if text not in self._told:
            self._tell(text)
            self._told.add(text)


def following(
    superlink: OwnSuperLink | None, run_dir: Path, tell: Callable[[str], None], *, keeps: bool = True
) -> Nodes | None:
    """The ``Nodes`` of a SuperLink with a register of sites; without a register None, and old records are removed."""
    if superlink is not None and superlink.registry is not None:
        return Nodes(superlink.registry, superlink, run_dir, tell, keeps=keeps)
    from_supervisor.remove_owners(run_dir)
    return None
