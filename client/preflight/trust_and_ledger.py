"""Checks of trust, agreement, peers, ledger, noise and limits: what the site promises itself, and what may leave."""

import math
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from client.connect.trust import read_trust
from client.preflight.context import CheckContext
from client.preflight.finding import Finding, Skip
from client.privacy.agreement import agreements_of, make_agreement, read_agreements
from client.privacy.guarantee import in_federation
from client.privacy.guard import Gate, ledger_of
from client.privacy.ledger import verify
from common.accountant import cost, epsilon
from common.config.federation import FederationConfig
from common.config.site import PrivacyConfig
from common.protocol import wire
from common.protocol.messages import Declared, TrainRequest
from common.system.keys import fingerprint, read_private
from strategies.admission.bounds import noised_numbers
from strategies.flower.named import make_rule

#: Signal against noise of a whole run, below which nothing was learnt in docs/privacy.md: not at 0.11, but at 0.17.
LEAST = 0.15


def trust(subject: CheckContext) -> Finding:
    """The keys and bundles whose code may run at the site."""
    found = read_trust(subject.site_file)
    if found is None:
        mend = "list keys or digests under `trust` in the site file, so that only code somebody has read runs here"
        return Finding("warning", "every app bundle that the operator sends is run", mend)
    return Finding("ok", f"{len(found.keys)} key(s) and {len(found.bundles)} pinned bundle(s) are trusted")


def agreement(subject: CheckContext) -> Finding:
    """The site has agreed to the federation's present settings."""
    agreed = read_agreements(agreements_of(subject.site, subject.site_file))
    mend = f"fedspan site agree FEDERATION.yaml --site {subject.site_file.name}"
    if subject.federation is None:
        known = ", ".join(f"{name} ({one.digest[:12]})" for name, one in agreed.items())
        return Finding("ok", f"agreed to {known}") if known else Finding("warning", "agreed to no federation yet", mend)
    wanted = make_agreement(subject.federation)
    pinned = agreed.get(subject.federation.name)
    if pinned is None:
        return Finding("FAIL", f"not agreed to federation {subject.federation.name}", mend)
    if pinned.digest != wanted.digest:
        return Finding(
            "FAIL", f"agreed to settings {pinned.digest[:12]} of it; the file's are {wanted.digest[:12]}", mend
        )
    return Finding("ok", f"agreed to federation {subject.federation.name}, settings {wanted.digest}")


def peers(subject: CheckContext) -> Finding:
    """The peers in the agreement, without the site itself, and the key with which the site signs.

    Raises:
        ConfigError: the private key cannot be read.
    """
    secure = subject.settings.secure_aggregation
    if secure is None:
        raise Skip("the federation has no `secure_aggregation`")
    agreed = read_agreements(agreements_of(subject.site, subject.site_file)).get(subject.settings.name)
    if agreed is None:
        raise Skip("not agreed to the federation yet")
    if subject.private_key is None:
        raise Skip("needs --auth-supernode-private-key")
    key = read_private(subject.private_key)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        mend = "make one: fedspan keys site; then send its .pub to the operator"
        return Finding("FAIL", f"{subject.private_key} is no ECDSA P-384 key, which signs a masked sum's keys", mend)
    own = fingerprint(key.public_key())
    others = sorted(name for name, mark in agreed.peers.items() if mark != own)
    needed = max(secure.threshold - 1, agreed.least_peers)
    found = f"{len(others)} other site(s) known ({', '.join(others)})" if others else "no other site is known"
    if len(others) < needed:
        again = f"fedspan site agree FEDERATION.yaml --site {subject.site_file.name} --peer FILE.pub"
        return Finding("FAIL", f"{found}; a sum needs {needed} beside this one", f"{again}, for each of them")
    return Finding("ok", f"{found}; at least {needed} of them are in every sum beside this one")


def ledger(subject: CheckContext) -> Finding:
    """The ledger's chain of lines is intact, and the ledger is this site's."""
    file = ledger_of(subject.site, subject.site_file)
    if not file.exists():
        raise Skip(f"{file} is begun with the first message")
    checked = verify(file)
    if checked.begun_by not in (None, subject.site.name):
        mend = "give this site another `ledger` in its site file"
        return Finding("FAIL", f"{file} is the ledger of {checked.begun_by}", mend)
    return Finding("ok", f"{file}: {checked.lines} lines, none changed; head {checked.head}")


def noise(subject: CheckContext) -> Finding:
    """Clip against noise in the mean of ``cohort.min_clients`` sites that all add as much: of a round, of the run.

    Raises:
        PolicyError: the sites' shared noise is less than the site asks for.
    """
    privacy, settings = subject.site.privacy, subject.settings
    if privacy is None:
        raise Skip("the site file has no `privacy`")
    rule, tensors = make_rule(settings.strategy, seed=settings.training.seed), dict(subject.tuned.parameters)
    active = [{name: tensors[name] for name in rule.active(number, list(tensors))} for number in (1, 2)]
    numbers = max(noised_numbers(sent, settings.strategy) for sent in active)
    rounds, part = affordable(privacy, settings), in_federation(privacy, settings).part * math.sqrt(numbers)
    found = f"{numbers:,} numbers a round; signal at most {privacy.clip:g}, noise {part:.3g}"
    if rounds == 0:
        mend = "a larger `privacy.max_epsilon` or `privacy.noise_multiplier` in the site file"
        return Finding("FAIL", f"{found}; not one round stays within epsilon {privacy.max_epsilon:g}", mend)
    sites = settings.cohort.min_clients
    found += f", in the mean of {sites} sites {part / math.sqrt(sites):.3g}"
    # Signals of rounds add up at best, noise by its square.
    ratio = math.sqrt(rounds * sites) * privacy.clip / part
    found += (
        f"; {rounds} of {settings.rounds} rounds within epsilon {privacy.max_epsilon:g}, over them {ratio:.2g} to 1"
    )
    if ratio < LEAST:
        enough = math.ceil(sites * (LEAST / ratio) ** 2)
        mend = f"{enough:,} sites, fewer numbers (`rank`, `modules`, `blocks`) or a larger epsilon; see docs/privacy.md"
        return Finding("warning", f"{found}: too little to learn from", mend)
    if rounds < settings.rounds:
        return Finding("warning", found, "a larger `privacy.noise_multiplier`, or fewer `rounds` of the operator's")
    return Finding("ok", found)


def affordable(privacy: PrivacyConfig, federation: FederationConfig) -> int:
    """How many of a federation's rounds a budget that nothing was spent of allows."""
    low, high, one = 0, federation.rounds, cost(in_federation(privacy, federation).noise_multiplier)
    while low < high:
        middle = (low + high + 1) // 2
        if epsilon(middle * one, privacy.delta) <= privacy.max_epsilon:
            low = middle
        else:
            high = middle - 1
    return low


def limits(subject: CheckContext) -> Finding:
    """The site's own limits allow this federation, and the federation admits a site with these."""
    settings, site = subject.settings, subject.site
    with tempfile.TemporaryDirectory() as empty:  # so that a look begins no ledger
        begun = ledger_of(site, subject.site_file).exists()
        gate = Gate(site, subject.site_file, "hello", 0, ledgers=None if begun else Path(empty))
        for number in (1, 2):  # strategies that alternate have done so then
            active = make_rule(settings.strategy, seed=0).active(number, subject.tuned.parameters)
            request = TrainRequest(
                federation="",
                signatures=None,
                server_round=number,
                active=active,
                arrays=wire.encode({}),
                evaluate=False,
            )
            gate.check(settings, request)
    rows = len(subject.split[0])
    gate.check_rows(rows)
    most, admitted = settings.admission.max_rows, max(settings.admission.max_noise, settings.shared_noise)
    if most is not None and rows > most:
        return Finding("FAIL", f"{rows} training rows; the federation admits up to {most}", "ask the operator")
    own = 0.0 if site.privacy is None else Declared.of(site.privacy, settings.shared_noise).noise
    if own > admitted:
        mend = f"ask the operator for `admission.max_noise: {own:g}`, or lower `privacy` in the site file"
        return Finding("FAIL", f"noise of {own:g} is added to every number; the federation admits {admitted:g}", mend)
    noisy = f", with noise of {own:g} on all that leaves" if own else ""
    return Finding("ok", f"federation {settings.name} is allowed{noisy}")
