"""Measure upload rate and clock of a SuperLink without being registered there (Flower 1.39, decision 015).

The Fleet API reads a complete request before it rejects the request, so an unsigned request with a large body measures
the upload. The Fleet API checks a request's signature and time before it looks up the key, so requests with a new,
unregistered key show which times the server accepts: times up to 5 seconds ahead of its clock, which gives the clock.
Nothing is registered or changed at the server. The download cannot be measured: an unregistered client is sent nothing
large.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import grpc  # type: ignore[import-untyped]
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import PUBLIC_KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import MAX_TIMESTAMP_DIFF, MIN_TIMESTAMP_DIFF
from flwr.supercore.date import now
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message

from common.errors import LinkError

_METHOD = "/flwr.proto.Fleet/SendNodeHeartbeat"
_ACTIVATE = "/flwr.proto.Fleet/ActivateNode"
_UNSIGNED, _LATE_OR_EARLY, _STRANGER = "Missing authentication metadata", "Invalid timestamp", "Invalid node ID"
_SIZES = (1 << 18, 1 << 20, 1 << 22, 1 << 24)  # bytes
_LONG_ENOUGH = 0.5  # seconds: shorter transfers give no exact rate
_MOST = 15 * 3600  # seconds; a clock set to a wrong time zone is not farther off


class AnonymousClient:
    """Sends requests that the SuperLink rejects, and measures the rejections.

    Args:
        channel: gRPC channel to the SuperLink.
        address: the SuperLink's address, for messages.
        deadline: seconds that all requests together may take.
    """

    def __init__(self, channel: grpc.Channel, address: str, deadline: float) -> None:
        self._call, self._activate = channel.unary_unary(_METHOD), channel.unary_unary(_ACTIVATE)
        self._address, self._seconds = address, deadline
        self._end = time.monotonic() + deadline
        self._key, public = generate_key_pairs()
        self._public = public_key_to_bytes(public)

    def upload_rate(self) -> tuple[float, float]:
        """Bytes per second on the way up, and seconds that an empty request takes."""
        self._refusal(b"")  # opens the connection
        empty = min(self._timed(b"") for _ in range(3))
        for size in _SIZES:
            took = self._timed(bytes(size))
            if took - empty >= _LONG_ENOUGH:
                break
        return size / max(took - empty, 1e-6), empty

    def clock_ahead(self) -> float:
        """Seconds by which this machine's clock is ahead of the server's; off by at most half a round trip."""
        window = MAX_TIMESTAMP_DIFF - MIN_TIMESTAMP_DIFF
        tries = (sign * step for step in range(0, _MOST, 300) for sign in (1, -1))
        accepted = next((offset for offset in tries if self._accepts(offset)), None)
        if accepted is None:
            raise LinkError(f"this machine's clock and that of {self._address} are more than 15 hours apart")
        low, high = float(accepted), float(accepted) + window
        while high - low > 0.02:
            middle = (low + high) / 2
            low, high = (middle, high) if self._accepts(middle) else (low, middle)
        way = statistics.median(self._timed(b"") for _ in range(3)) / 2
        return -(low + MIN_TIMESTAMP_DIFF - way)

    def knows(self, key: ec.EllipticCurvePrivateKey) -> bool:
        """Whether a SuperNode of this key is registered.

        It asks to be activated with a pause between heartbeats that no SuperLink allows, which is looked at after the
        key: so nothing is activated.
        """
        public, text = public_key_to_bytes(key.public_key()), now().isoformat()
        signature = sign_message(key, text.encode("ascii"))
        signed = ((PUBLIC_KEY_HEADER, public), (TIMESTAMP_HEADER, text), (SIGNATURE_HEADER, signature))
        request = ActivateNodeRequest(public_key=public, heartbeat_interval=-1.0).SerializeToString()
        try:
            self._activate(request, timeout=max(self._end - time.monotonic(), 0.0), metadata=signed)
        except grpc.RpcError as error:
            told = FlowerError.from_json(str(error.details() or ""))
            code = None if told is None else told.code
            if code in (ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL, ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED):
                return bool(code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL)
            raise self._unlike(str(error.details() or error.code().name)) from None
        raise self._unlike("accepted")

    def _accepts(self, offset: float) -> bool:
        """Whether the server accepts a time ``offset`` seconds ahead of this machine's clock."""
        text = (now() + timedelta(seconds=offset)).isoformat()
        signature = sign_message(self._key, text.encode("ascii"))
        answer = self._refusal(
            b"", ((PUBLIC_KEY_HEADER, self._public), (TIMESTAMP_HEADER, text), (SIGNATURE_HEADER, signature))
        )
        if answer not in (_LATE_OR_EARLY, _STRANGER):
            raise self._unlike(answer)
        return answer == _STRANGER

    def _timed(self, body: bytes) -> float:
        started = time.monotonic()
        if (answer := self._refusal(body)) != _UNSIGNED:
            raise self._unlike(answer)
        return time.monotonic() - started

    def _refusal(self, body: bytes, metadata: tuple[tuple[str, str | bytes], ...] = ()) -> str:
        """Send a request; returns the reason why the server rejects it."""
        try:
            self._call(body, timeout=max(self._end - time.monotonic(), 0.0), metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return str(error.details())
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise LinkError(f"{self._address} did not answer within {self._seconds:g} seconds") from None
            raise self._unlike(error.code().name) from None
        return "accepted"

    def _unlike(self, answer: str) -> LinkError:
        return LinkError(f"{self._address} answers {answer!r}, not as the Fleet API of a Flower 1.39 SuperLink does")


@contextmanager
def anonymous_client(address: str, root_certificates: Path, deadline: float) -> Iterator[AnonymousClient]:
    """Connect to a SuperLink as an unregistered client.

    Raises:
        LinkError: the SuperLink does not answer in time, or does not answer like one.
    """
    options = [("grpc.max_send_message_length", -1)]
    credentials = grpc.ssl_channel_credentials(root_certificates.read_bytes())
    with grpc.secure_channel(address, credentials, options=options) as channel:
        yield AnonymousClient(channel, address, deadline)
