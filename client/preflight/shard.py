"""Checks of the site's shard. Findings hold counts, row numbers and column names, never content."""

from collections.abc import Iterable

from client.preflight.context import MOST_ROWS, CheckContext
from client.preflight.finding import Finding, Skip

_CUT = 0.05  # a larger share of truncated rows is a warning


def rows(subject: CheckContext) -> Finding:
    """Columns are there, every row has a prompt and an answer."""
    data, loaded = subject.site.data, subject.shard
    what = f"conversations ({data.messages})" if data.messages else f"prompt ({data.prompt}) and answer ({data.answer})"
    found = f"{len(loaded.rows):,} rows with {what}; {loaded.how}"
    if loaded.left_out:
        files = "images that cannot be read" if data.skip_unreadable else "rows with an empty cell"
        return Finding("warning", f"{found}; {loaded.left_out:,} {files} are left out", "mend them")
    if loaded.how.endswith("cp1252"):
        return Finding("warning", f"{found}, as the text is not UTF-8", "look at a few letters; see `data.encoding`")
    return Finding("ok", found)


def duplicates(subject: CheckContext) -> Finding:
    """Rows with the same prompt and answer as an earlier row."""
    seen: set[str] = set()
    copies = []
    for number, row in enumerate(subject.rows, start=1):
        if (key := row.key()) in seen:
            copies.append(number)
        seen.add(key)
    if not copies:
        return Finding("ok", "no row twice")
    found = f"{len(copies):,} of {len(subject.rows):,} rows repeat an earlier one: row {_listed(copies)}"
    return Finding("warning", found, "take them out, unless they are meant to count more than once")


def held_out(subject: CheckContext) -> Finding:
    """Number of rows for training, and of rows held out for evaluation."""
    train, kept = subject.split
    policy, federation = subject.site.policy, subject.federation
    found = f"{len(train):,} rows to train on, {len(kept):,} held out"
    if subject.site.data.held_out > 0 and not kept:
        mend = "raise `data.held_out`, or set it to 0 if this site shall not evaluate"
        return Finding("warning", f"{found}: this site will not evaluate", mend)
    touched = len(train) if federation is None else federation.training.rows_touched(len(train))
    if touched < policy.min_rows_per_update:
        mend = "ask the operator for more `training.local_steps` or a larger `training.batch_size`"
        few = f"a round trains on {touched:,}, fewer than `policy.min_rows_per_update` {policy.min_rows_per_update:,}"
        return Finding("FAIL", f"{found}; {few}: the site will refuse it", mend)
    scored = len(kept) if federation is None else min(len(kept), federation.evaluation.max_examples)
    if 0 < scored < policy.min_held_out:
        mend = "raise `data.held_out`, or ask the operator for a larger `evaluation.max_examples`"
        few = f"{scored:,} would be scored, fewer than `policy.min_held_out` {policy.min_held_out:,}"
        return Finding("warning", f"{found}; {few}: no scores leave", mend)
    return Finding("ok", found)


def lengths(subject: CheckContext) -> Finding:
    """Length of the rows in tokens, and number of truncated rows."""
    if subject.task.reads_files:
        raise Skip("images are brought to the size that the model takes")
    counts = sorted(len(example.input_ids) for example in subject.examples)
    middle, high = counts[len(counts) // 2], counts[min(len(counts) - 1, int(0.95 * len(counts)))]
    found = f"{counts[0]} to {counts[-1]} tokens a row, median {middle}, 95 % up to {high}"
    if len(counts) < len(subject.split[0]):
        found += f" (of {len(counts):,} rows; more than {MOST_ROWS:,} are not counted)"
    if subject.federation is None:
        return Finding("ok", found)
    limit = subject.federation.training.max_length
    cut = sum(count > limit for count in counts) / len(counts)
    found += f"; {cut:.1%} are longer than max_length {limit} and will be cut"
    if cut > _CUT:
        mend = f"shorten the rows, or ask the operator for `training.max_length: {high}`, which takes more memory"
        return Finding("warning", found, mend)
    return Finding("ok", found)


def _listed(numbers: Iterable[int], most: int = 5) -> str:
    some = list(numbers)
    return ", ".join(map(str, some[:most])) + (" ..." if len(some) > most else "")
