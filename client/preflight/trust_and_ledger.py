"""What the site promises itself: whose code runs, and a record that nobody has changed."""

from client.connect.trust import read_trust
from client.preflight.context import Subject
from client.preflight.finding import Finding, Skip
from client.privacy.guard import ledger_of
from client.privacy.ledger import verify


def trust(subject: Subject) -> Finding:
    """Whose code may run here."""
    found = read_trust(subject.site_file)
    if found is None:
        mend = "list keys or digests under `trust` in the site file, so that only code somebody has read runs here"
        return Finding("warning", "every app bundle that the operator sends is run", mend)
    return Finding("ok", f"{len(found.keys)} key(s) and {len(found.bundles)} pinned bundle(s) are trusted")


def ledger(subject: Subject) -> Finding:
    """The ledger is whole."""
    file = ledger_of(subject.site, subject.site_file)
    if not file.exists():
        raise Skip(f"{file} is begun with the first message")
    checked = verify(file)
    return Finding("ok", f"{file}: {checked.lines} lines, none changed; head {checked.head}")
