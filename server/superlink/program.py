"""``flower-superlink`` for one account: its Control API and Runtime API on a Unix socket, its nodes on the disk.

    python -P server/superlink/program.py --socket PATH [options of flower-superlink]

The database keeps the nodes when the SuperLink dies, and nothing else (``server.superlink.state``). With
``--fleet-api-address unix:PATH`` sites of this machine connect over a socket, too, and nothing listens on a port
(decision 025).
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.server.superlink.fleet.message_handler import message_handler
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.exit import add_exit_handler
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import FederationManager

from common.system import flower_socket
from common.system.files import keep_private
from server.superlink.state import Objects, State

_cli: Any = import_module("flwr.superlink.cli.flower_superlink")  # the package has a function of the same name
_main: Any = import_module("flwr.superlink.main")
_grpc: Any = import_module("flwr.supercore.grpc")
_parse, _in_use, _pull = _cli._format_address, _grpc.is_port_in_use, message_handler.pull_messages


def _factories(database: str, manager: FederationManager) -> tuple[ObjectStoreFactory, LinkStateFactory]:
    """Flower's ``get_objectstore_linkstate_factories``, with FedSpan's state."""
    objects = ObjectStoreFactory()
    links = LinkStateFactory(database, manager, objects)
    objects.store_instance = store = Objects()
    links.state_instance = state = State(database, manager, store)
    add_exit_handler(state.let_go)

    def pull_messages(request: PullMessagesRequest, **parts: Any) -> PullMessagesResponse:  # noqa: ANN401
        """Flower's ``pull_messages``; a node for which there is no message waits for one."""
        found = _pull(request=request, **parts)
        if not found.messages_list and state.await_message(request.node.node_id):
            found = _pull(request=request, **parts)
        return found

    message_handler.pull_messages = pull_messages  # type: ignore[assignment]
    return objects, links


def _address(address: str) -> tuple[str, str, int]:
    """Flower's ``_format_address``, extended by Unix sockets."""
    if address.startswith("unix:/"):
        return address, address, 0
    parsed: tuple[str, str, int] = _parse(address)
    return parsed


def _is_in_use(address: str) -> bool:
    """Flower's ``is_port_in_use``, extended by Unix sockets; a socket left by an earlier SuperLink counts as free."""
    return not address.startswith("unix:/") and bool(_in_use(address))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="server.superlink.program", add_help=False, allow_abbrev=False)
    parser.add_argument("--socket", type=Path, required=True)
    options, rest = parser.parse_known_args()
    sys.argv = ["flower-superlink", *rest]
    keep_private()
    flower_socket.serve("flower-superlink", options.socket)
    _main.get_objectstore_linkstate_factories = _factories
    _cli._format_address, _grpc.is_port_in_use = _address, _is_in_use
    _cli.flower_superlink()


if __name__ == "__main__":
    main()
