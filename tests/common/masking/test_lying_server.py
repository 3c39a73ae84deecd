"""A server that lies is refused by the site, which names the peer and the round; a member that lies, by the server."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import AggregationError, PolicyError, RefusedUpdate, WireError
from common.masking import parts, primitives
from common.masking.parts import ALIVE, DROPPED, Advert, Listing, SumId, shown
from common.masking.primitives import PUBLIC_BYTES
from common.masking.server import ServerSum
from common.masking.site import SiteSum
from tests.harness.masking import ABOUT, Together, identity, peers, uniform


def masked(count: int = 4, threshold: int = 3) -> Together:
    """A sum whose vectors are with the server."""
    together = Together(count, threshold, 6)
    together.share()
    together.mask(uniform(1, count, 6))
    return together


def refused(text: str, ask: Callable[[], object]) -> None:
    with pytest.raises(PolicyError, match=re.escape(text)):
        ask()


def named(together: Together, number: int) -> str:
    return f"site-{number} ({shown(together.ids[number])})"


def test_invented_peers() -> None:
    together = Together(3, 2, 6)
    stranger = SiteSum(together.sum_id, ec.generate_private_key(ec.SECP384R1()), {}, 0)
    invented = Advert.read(stranger.advert)
    listing = Listing([*together.server.listing.members.values(), invented])
    refused(
        f"round 3: {shown(invented.id)} is no peer that this site has agreed to",
        lambda: together.sites[0].share(listing.raw),
    )


def test_too_few_known_peers() -> None:
    together = Together(3, 2, 6, least=3)
    refused(
        "round 3: 2 known peers take part; this site asks for at least 3",
        lambda: together.sites[0].share(together.server.listing.raw),
    )
    together = Together(3, 2, 6, least=2)
    together.share(lost={2})
    refused(
        "round 3: 1 known peers have shared; this site asks for at least 2", lambda: together.mask(uniform(0, 3, 6))
    )
    together = Together(3, 2, 6, least=2)
    together.share()
    together.mask(uniform(0, 3, 6), lost={2})
    refused("round 3: 1 known peers survive; this site asks for at least 2", together.sign)


def test_keys_of_another_round() -> None:
    earlier = Together(3, 2, 6, SumId(run=1, server_round=2, attempt=0, threshold=2))
    for which in (SumId(1, 3, 0, 2), SumId(1, 2, 1, 2), SumId(2, 2, 0, 2), SumId(1, 2, 0, 3)):
        now = Together(3, 2, 6, which)
        replayed = Advert.read(earlier.sites[1].advert)
        listing = Listing([one for one in now.server.listing.members.values() if one.id != replayed.id] + [replayed])
        refused(
            f"round {which.server_round}: the keys of {named(now, 1)} are not signed for this round",
            lambda site=now.sites[0], raw=listing.raw: site.share(raw),  # type: ignore[misc]
        )


def test_keys_exchanged_by_the_server() -> None:
    together = Together(3, 2, 6)
    true = Advert.read(together.sites[1].advert)
    ours = primitives.public_bytes(primitives.exchange_key(primitives.new_seed(), b""))
    for false in (
        Advert(true.identity, ours, true.seal_key, true.signature),
        Advert(true.identity, true.mask_key, ours, true.signature),
    ):
        listing = Listing([one for one in together.server.listing.members.values() if one.id != true.id] + [false])
        refused(
            f"round 3: the keys of {named(together, 1)} are not signed",
            lambda raw=listing.raw: together.sites[0].share(raw),
        )  # type: ignore[misc]


def test_own_keys_left_out_or_exchanged() -> None:
    together = Together(3, 2, 6)
    others = list(together.server.listing.members.values())
    without = Listing(one for one in others if one.id != together.ids[0])
    again = Advert.read(SiteSum(together.sum_id, identity(0), peers(3), 0).advert)
    for listing in (without, Listing([*without.members.values(), again])):
        refused(
            "round 3: the list of keys does not have this site's own",
            lambda raw=listing.raw: together.sites[0].share(raw),
        )  # type: ignore[misc]


def test_key_that_hides_nothing() -> None:
    together = Together(3, 2, 6)
    own = Advert.read(together.sites[1].advert)
    zero = bytes(PUBLIC_BYTES)
    for keys in ((zero, own.seal_key), (own.mask_key, zero)):
        signature = primitives.sign(identity(1), parts.signed_text(together.sum_id, *keys))
        raw = Advert(own.identity, *keys, signature).raw
        with pytest.raises(WireError, match="has a key that hides nothing"):
            Listing.read(raw)


def test_threshold_that_half_of_the_members_reach() -> None:
    """Else two halves could unmask two sums of one round."""
    together = Together(4, 2, 6)
    refused("round 3: 4 members and threshold 2; allowed: 2 to 3", together.share)


def test_more_members_than_the_sites_noise_is_good_for() -> None:
    together = Together(5, 4, 6)
    site = SiteSum(together.sum_id, identity(0), peers(5), 0, most_members=4)
    others = [one for one in together.server.listing.members.values() if one.id != together.ids[0]]
    listing = Listing([*others, Advert.read(site.advert)])
    refused("round 3: 5 members and threshold 4; allowed: 4 to 4", lambda: site.share(listing.raw))


def test_withheld_shares_do_not_change_what_numbers_are_encoded_for() -> None:
    """A site that knew of fewer members would round to a finer grid, in which the others' shared noise is less."""
    together = Together(5, 3, 6)
    together.share()
    kept = dict(list(parts.read_sealed(together.server.shares_for(together.ids[0])).items())[:2])
    together.sites[0].receive(parts.write_sealed(kept))
    together.sites[1].receive(together.server.shares_for(together.ids[1]))
    assert together.sites[0].members == together.sites[1].members == 5


def test_second_sum_of_a_round_without_one_site() -> None:
    """The difference of two sums of the same updates would be that site's."""
    first = masked(4, 3)
    first.sign()
    first.unmask()
    alive = first.sites[0].unmasked
    assert alive == frozenset(first.ids)
    again = Together(4, 3, 6, SumId(run=1, server_round=3, attempt=1, threshold=3))
    again.sites = [SiteSum(again.sum_id, identity(k), peers(4), 0, only=alive) for k in range(4)]
    again.server = ServerSum(again.sum_id)
    again.server.expect(6)
    again.ids = [again.server.add_keys(f"site-{k}", site.advert) for k, site in enumerate(again.sites)]
    again.share()
    again.mask(uniform(1, 4, 6), lost={3})
    refused("round 3: this site has helped to unmask the sum of other survivors already", again.sign)
    again.server.add_vector(again.ids[3], uniform(9, 1, 6)[0])
    assert again.sites[0].sign(again.server.survivors)  # the same survivors again


def test_every_exchange_once() -> None:
    together = Together(3, 2, 6)
    listing = together.server.listing.raw
    together.share()
    refused("round 3: shares asked for out of turn, or twice", lambda: together.sites[0].share(listing))
    together.mask(uniform(0, 3, 6))
    refused(
        "round 3: a masked vector asked for out of turn, or twice",
        lambda: together.sites[0].mask(uniform(0, 1, 6)[0], ABOUT),
    )
    refused("round 3: shares that unmask asked for out of turn", lambda: together.sites[0].unmask(b""))
    together.sign()
    together.unmask()
    refused(
        "shares that unmask asked for out of turn, or twice",
        lambda: together.sites[0].unmask(together.server.signatures),
    )
    refused("a signature asked for out of turn, or twice", lambda: together.sites[0].sign(together.server.survivors))


def test_two_lists_of_survivors() -> None:
    together = masked()
    states = dict(parts.read_survivors(together.server.survivors))
    first = together.sites[0].sign(together.server.survivors)
    assert together.sites[0].sign(together.server.survivors) != b""  # asked again, as when an answer was lost
    refused(
        "round 3: a second list of survivors came",
        lambda: together.sites[0].sign(parts.write_survivors({**states, together.ids[1]: DROPPED})),
    )
    assert first


def test_list_of_survivors_that_contradicts_itself() -> None:
    together = masked()
    states, (own, other, *_) = dict(parts.read_survivors(together.server.survivors)), together.ids
    both = together.server.survivors + other + DROPPED
    refused(f"round 3: {named(together, 1)} is named both alive and dropped", lambda: together.sites[0].sign(both))
    left_out = parts.write_survivors({m: s for m, s in states.items() if m != other})
    refused(f"round 3: {named(together, 1)} is neither alive nor dropped", lambda: together.sites[0].sign(left_out))
    dropped = parts.write_survivors({**states, own: DROPPED})
    refused("round 3: this site has sent its vector, but is named dropped", lambda: together.sites[0].sign(dropped))
    few = parts.write_survivors({m: ALIVE if m in (own, other) else DROPPED for m in states})
    refused("round 3: 2 survivors, 3 are needed", lambda: together.sites[0].sign(few))
    refused("has not shared, but is in the list", lambda: together.sites[0].sign(together.server.survivors + bytes(33)))


def test_list_of_survivors_without_signatures() -> None:
    together = masked()
    together.sign(lost={3})
    few = dict(list(parts.read_signatures(together.server.signatures).items())[:2])
    refused(
        "round 3: 2 have signed the list of survivors, 3 are needed",
        lambda: together.sites[0].unmask(parts.write_signatures(few)),
    )
    one, two = (together.ids[k] for k in (1, 2))
    swapped = parts.read_signatures(together.server.signatures)
    swapped[one], swapped[two] = swapped[two], swapped[one]
    refused("has not signed this list of survivors", lambda: together.sites[0].unmask(parts.write_signatures(swapped)))
    stranger = {**swapped, bytes(32): swapped[one]}
    refused("has signed, but is no survivor", lambda: together.sites[0].unmask(parts.write_signatures(stranger)))


def test_two_lists_shown_to_two_halves() -> None:
    """Of five sites with threshold 3, no two lists are signed by three, so nobody unmasks the one or the other."""
    together = masked(5, 3)
    states, victim = dict(parts.read_survivors(together.server.survivors)), together.ids[4]
    lists = [parts.write_survivors({**states, victim: state}) for state in (ALIVE, DROPPED)]
    signed: list[dict[bytes, bytes]] = [{}, {}]
    for k in range(4):
        signed[k % 2][together.ids[k]] = together.sites[k].sign(lists[k % 2])
    for k in range(4):
        refused(
            "2 have signed the list of survivors, 3 are needed",
            lambda k=k: together.sites[k].unmask(parts.write_signatures(signed[k % 2])),
        )  # type: ignore[misc]


def test_shares_of_somebody_else() -> None:
    together = Together(3, 2, 6)
    together.share()
    for_first, for_second = (parts.read_sealed(together.server.shares_for(together.ids[k])) for k in (0, 1))
    exchanged = {**for_first, together.ids[2]: for_second[together.ids[2]]}
    ask = lambda sealed: together.sites[0].receive(parts.write_sealed(sealed))  # noqa: E731
    refused(f"the shares of {named(together, 2)} were not sealed for this site", lambda: ask(exchanged))
    refused("has shares, but no keys", lambda: ask({**for_first, bytes(32): for_first[together.ids[2]]}))


@pytest.mark.parametrize("raw", [b"", b"x", bytes(209), bytes(208)])
def test_lists_of_another_form(raw: bytes) -> None:
    with pytest.raises(WireError):
        Together(3, 2, 6).sites[0].share(raw)


def test_members_that_lie() -> None:
    together = Together(3, 2, 6)
    server, advert = together.server, together.sites[0].advert
    other = SiteSum(SumId(1, 4, 0, 2), identity(1), peers(3), 0)
    for name, raw, text in (
        ("x", advert, "x: site-0 has the same identity key"),
        ("y", other.advert, "y: its keys are not signed for this round"),
        ("z", advert[:-1], "z: keys: 208 bytes"),
    ):
        with pytest.raises(RefusedUpdate, match=text):
            server.add_keys(name, raw)
    sealed = together.sites[0].share(server.listing.raw)
    for raw in (sealed[:-1], sealed[: len(sealed) // 2], sealed + sealed):
        with pytest.raises(RefusedUpdate, match="site-0: "):
            server.add_shares(together.ids[0], raw)
    with pytest.raises(RefusedUpdate, match="site-0: 5 masked numbers; allowed: 6"):
        server.add_vector(together.ids[0], np.zeros(5, np.uint32))
    together = masked(3, 2)
    with pytest.raises(RefusedUpdate, match="site-1: it has not signed the list of survivors"):
        together.server.add_signature(together.ids[1], together.sites[0].sign(together.server.survivors))
    with pytest.raises(RefusedUpdate, match="site-1: its shares are not of all that have shared"):
        together.server.add_unmasking(together.ids[1], b"")


@pytest.mark.parametrize("owner", [0, 1, 3])  # of itself, of another survivor, of a drop-out
def test_false_share_is_refused_by_name_and_the_others_unmask(owner: int) -> None:
    together, vectors = Together(4, 3, 6), uniform(0, 4, 6)
    together.share()
    together.mask(vectors, lost={3})
    together.sign()
    for k in range(3):
        shares = parts.read_shares(together.sites[k].unmask(together.server.signatures))
        false = {**shares, together.ids[owner]: bytes(16)}
        if k == 0:
            with pytest.raises(RefusedUpdate, match=f"site-0: its share of site-{owner}'s secret is false"):
                together.server.add_unmasking(together.ids[k], parts.write_shares(false))
        together.server.add_unmasking(together.ids[k], parts.write_shares(shares))
    assert np.array_equal(together.server.total(ABOUT), np.sum(vectors[:3], axis=0, dtype=np.uint32))


def sealed_falsely(together: Together, liar: int) -> None:
    """Everybody shares; one site's share for the first other is of another secret, and its digest says so."""
    for number, site in enumerate(together.sites):
        sealed = parts.read_sealed(site.share(together.server.listing.raw))
        if number == liar:
            victim = together.ids[liar - 1]
            shares = primitives.new_seed(), primitives.new_seed()
            sealed[victim] = primitives.seal(site._sealing(together.ids[liar], victim), shares)
        together.server.add_shares(together.ids[number], parts.write_sealed(sealed))


@pytest.mark.parametrize("lost", [set[int](), {3}])
def test_who_seals_shares_of_no_one_secret_is_named(lost: set[int]) -> None:
    together = Together(5, 3, 6)
    sealed_falsely(together, 3)
    together.mask(uniform(0, 5, 6), lost=lost)
    together.sign(lost)
    try:
        together.unmask()
    except AggregationError as error:
        assert str(error) == "the shares of site-3, which has dropped out, do not give its key"  # noqa: PT017
    assert together.server.inconsistent() == ["site-3"]


def test_share_that_is_not_what_its_digest_says_is_not_taken() -> None:
    together = Together(3, 2, 6)
    together.share()
    sealed = parts.read_sealed(together.server.shares_for(together.ids[0]))
    record = sealed[together.ids[2]]
    changed = {**sealed, together.ids[2]: record[:-1] + bytes([record[-1] ^ 1])}
    refused(
        f"the shares of {named(together, 2)} were not sealed for this site",
        lambda: together.sites[0].receive(parts.write_sealed(changed)),
    )
