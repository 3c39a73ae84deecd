"""Checks of the link to the server: certificate, speed, clock."""

from cryptography.hazmat.primitives.asymmetric import ec

from client.preflight.certificates import validity
from client.preflight.context import CheckContext
from client.preflight.finding import Finding, Skip
from client.preflight.superlink import anonymous_client
from common.errors import ConfigError
from common.system.keys import fingerprint, read_private

_AHEAD, _BEHIND = 5.0, 305.0  # seconds that a SuperNode's clock may be ahead of, or behind, the SuperLink's
_SLOW = 1e6 / 8  # bytes per second


def server(subject: CheckContext) -> Finding:
    """The server answers, its certificate is signed by the CA and remains valid for a while."""
    report = subject.link
    assert report.not_before is not None and report.not_after is not None  # noqa: S101, PT018 - it has spoken TLS
    what = f"{report.host}:{report.port} is {report.subject or 'nameless'} ({', '.join(report.names)}), "
    way = f" through {report.proxy}" if report.proxy is not None else ""
    what += f"{report.round_trip * 1000:.0f} ms away{way}; its certificate"
    return validity(what, report.not_before, report.not_after, "ask the operator to renew the server's certificate")


def upload(subject: CheckContext) -> Finding:
    """Upload rate to the server."""
    rate, empty = subject.upload
    found = f"{rate * 8 / 1e6:.1f} Mbit/s up, {empty * 1000:.0f} ms a request; the way down is not measurable from here"
    if rate < _SLOW:
        return Finding("warning", found, "a faster line, or ask the operator for `wire_precision` or a lower `rank`")
    return Finding("ok", found)


def clock(subject: CheckContext) -> Finding:
    """The clocks agree well enough for signed requests to be accepted."""
    _ = subject.link
    with anonymous_client(*subject.server, subject.deadline) as somebody:
        ahead = somebody.clock_ahead()
    found = f"{abs(ahead):.2f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    mend = "let this machine's clock follow a time server: timedatectl set-ntp true"
    if not -_BEHIND < ahead < _AHEAD:
        allowed = f"a server accepts {_AHEAD:g} s ahead and {_BEHIND:g} s behind"
        return Finding("FAIL", f"{found}; {allowed}", mend)
    return Finding("warning" if not -_BEHIND / 2 < ahead < _AHEAD / 2 else "ok", found, mend if abs(ahead) > 2 else "")


def registered(subject: CheckContext) -> Finding:
    """The server knows the site's key."""
    if subject.private_key is None:
        raise Skip("needs --auth-supernode-private-key")
    _ = subject.link
    try:
        key = read_private(subject.private_key)
    except ConfigError:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Skip("the key cannot be used, see above")
    with anonymous_client(*subject.server, subject.deadline) as somebody:
        known = somebody.knows(key)
    found = f"public key {fingerprint(key.public_key())}"
    if not known:
        return Finding("FAIL", f"{found} is not in the server's register", "give the operator the .pub file")
    return Finding("ok", f"{found} is in the server's register")
