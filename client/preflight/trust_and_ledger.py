"""Checks of trust, agreement and ledger: trusted code, agreed settings, an unchanged record."""

from client.connect.trust import read_trust
from client.preflight.context import Subject
from client.preflight.finding import Finding, Skip
from client.privacy.agreement import agreements_of, make_agreement, read_agreements
from client.privacy.guard import ledger_of
from client.privacy.ledger import verify


def trust(subject: Subject) -> Finding:
    """The keys and bundles whose code may run at the site."""
    found = read_trust(subject.site_file)
    if found is None:
        mend = "list keys or digests under `trust` in the site file, so that only code somebody has read runs here"
        return Finding("warning", "every app bundle that the operator sends is run", mend)
    return Finding("ok", f"{len(found.keys)} key(s) and {len(found.bundles)} pinned bundle(s) are trusted")


def agreement(subject: Subject) -> Finding:
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


def ledger(subject: Subject) -> Finding:
    """The ledger's chain of lines is intact, and the ledger is this site's."""
    file = ledger_of(subject.site, subject.site_file)
    if not file.exists():
        raise Skip(f"{file} is begun with the first message")
    checked = verify(file)
    if checked.begun_by not in (None, subject.site.name):
        mend = "give this site another `ledger` in its site file"
        return Finding("FAIL", f"{file} is the ledger of {checked.begun_by}", mend)
    return Finding("ok", f"{file}: {checked.lines} lines, none changed; head {checked.head}")
