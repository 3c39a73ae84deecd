"""What a SuperLink tells somebody whom it does not know: how fast it takes bytes, and what time it is. Flower 1.39.

Its Fleet API reads a request as a whole before it refuses it, so an unsigned request with a large body measures the way
up. It checks a request's signature and time before it looks up whose key it is, so a fresh key that nobody has
registered learns whether a time is accepted: times up to 5 seconds ahead of the server's are, which tells its clock.
Nothing is registered or changed at the server. The way down cannot be measured: a stranger is sent nothing large.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import grpc  # type: ignore[import-untyped]
from flwr.common.constant import PUBLIC_KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER
from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import MAX_TIMESTAMP_DIFF, MIN_TIMESTAMP_DIFF
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message

from common.errors import LinkError

_METHOD = "/flwr.proto.Fleet/SendNodeHeartbeat"
_UNSIGNED, _LATE_OR_EARLY, _STRANGER = "Missing authentication metadata", "Invalid timestamp", "Invalid node ID"
_SIZES = (1 << 18, 1 << 20, 1 << 22, 1 << 24)  # bytes
_LONG_ENOUGH = 0.5  # seconds that a transfer should take to be believed
_MOST = 15 * 3600  # seconds; no time zone is farther off


class Stranger:
    """Requests that a SuperLink refuses.

    Args:
        channel: to the SuperLink.
        address: for messages.
        deadline: seconds that all requests together may take.
    """

    def __init__(self, channel: grpc.Channel, address: str, deadline: float) -> None:
        self._call = channel.unary_unary(_METHOD)
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

    def _accepts(self, offset: float) -> bool:
        """Whether the server accepts a time that many seconds ahead of this machine's."""
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
        """Why the server refuses a request."""
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
def stranger(address: str, root_certificates: Path, deadline: float) -> Iterator[Stranger]:
    """A connection to a SuperLink as somebody whom it does not know.

    Raises:
        LinkError: it does not answer in time, or not as a SuperLink does.
    """
    options = [("grpc.max_send_message_length", -1)]
    credentials = grpc.ssl_channel_credentials(root_certificates.read_bytes())
    with grpc.secure_channel(address, credentials, options=options) as channel:
        yield Stranger(channel, address, deadline)
