"""The requests of a federation, in plain words: for ``fedspan site agree``, and for the site's page."""

from collections.abc import Iterator

from client.privacy.agreement import Agreement
from client.privacy.guarantee import in_federation
from common.accountant import cost, epsilon
from common.config.federation import FederationConfig
from common.config.site import SiteConfig
from common.config.task import ClassificationTask
from common.errors import PolicyError
from common.protocol.fields import Stays
from common.protocol.messages import EVALUATED, TRAINING


def asked(site: SiteConfig, agreement: Agreement) -> Iterator[tuple[str, str]]:
    """An agreement in plain words: pairs (subject, words); no subject: it goes on.

    Raises:
        ConfigError: this version of FedSpan does not know the settings.
    """
    federation = agreement.federation
    strategy, training, evaluation = federation.strategy, federation.training, federation.evaluation
    labels = (
        f"; the labels are {', '.join(federation.task.labels)}"
        if isinstance(federation.task, ClassificationTask)
        else ""
    )
    yield "learned", f"{type(federation.task).__doc__ or ''}".partition("\n")[0].rstrip(".").lower() + labels
    source = site.model or agreement.model
    yield "base model", source.path or f"{source.hub} at {source.revision}"
    if agreement.model.digest is not None:
        yield "", f"only with the digest {agreement.model.digest}"
    what = (
        f"weights, of rank {strategy.rank} changes"
        if strategy.trains == "weights"
        else f"LoRA adapters of rank {strategy.rank}"
    )
    where = strategy.modules if isinstance(strategy.modules, str) else ", ".join(strategy.modules)
    yield "trained", f"{strategy.title} ({strategy.source}): {what}, modules {where}, blocks {strategy.blocks}"
    much = f"{training.local_steps} steps" if training.local_steps else f"{training.local_epochs} passes over the shard"
    yield "a round", f"{much} of {training.rows_per_step} rows, up to {training.max_length} tokens each"
    yield "how often", f"{federation.rounds} rounds, with at least {federation.cohort.min_clients} sites"
    yield "evaluated", f"every {evaluation.every} round(s), on up to {evaluation.max_examples} held-out rows"
    if site.privacy is not None:
        noise = f", clipped to norm {site.privacy.clip:g} and noised"
    yield "leaves", f"in every round the trained tensors{noise if site.privacy else ''}; and as numbers:"
    staying: set[Stays] = (
        {"with privacy", "without scores"} if site.privacy else set() if site.shares_metrics else {"without scores"}
    )
    for measures in (TRAINING, EVALUATED):
        said = [measure.what for measure in measures.values() if measure.stays not in staying]
        if said:
            yield "", "; ".join(said)
    yield "", "the number of training rows, the site's name, and digests of the base model"
    yield "stays", "every row, prompt, answer and file" + ("" if site.shares_metrics else "; losses and scores")
    if federation.secure_aggregation is not None:
        least = max(agreement.least_peers, federation.secure_aggregation.threshold - 1)
        yield "seen", f"only the sum of its update and those of at least {least} of these sites, never its own alone:"
        for name, known in agreement.peers.items():
            yield "", f"{name}, key {known}"
        yield from _shared_noise(site, federation)
    yield "reviewed by", agreement.reviewer or "nobody whose signature was given"


def _shared_noise(site: SiteConfig, federation: FederationConfig) -> Iterator[tuple[str, str]]:
    if federation.shared_noise:
        yield "adds", f"noise of standard deviation {federation.shared_noise:g} to every number, as all these sites do"
    if (privacy := site.privacy) is None or privacy.noise == "local":
        return
    try:
        found = in_federation(privacy, federation)
    except PolicyError as error:
        yield "refused", str(error)
        return
    all_, worst = (
        epsilon(federation.rounds * cost(z), privacy.delta) for z in (found.noise_multiplier, found.worst_multiplier)
    )
    who = f"the server and {privacy.colluders} other sites" if privacy.colluders else "the server"
    yield "protects", f"against {who} with epsilon {all_:.3g} in all rounds, delta {privacy.delta:g};"
    yield "", f"if all other sites told the server their noise, with epsilon {worst:.3g}"
