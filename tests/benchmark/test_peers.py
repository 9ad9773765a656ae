"""The peers are models that timm has."""

from __future__ import annotations

import pytest

from fat_train.benchmark.peers import PEERS, Peer, peers_of
from fat_train.types import UserError


def test_all_are_the_table_and_timm_has_each() -> None:
    assert peers_of(["all"], 224) == PEERS
    assert len(PEERS) > 25
    assert all(peer.top1 and 70 < peer.top1 < 84 and peer.image_px for peer in PEERS.values())


def test_a_model_without_a_published_number_here_is_timed_at_the_size_asked_for() -> None:
    assert peers_of(["resnet18", "pit_s_224"], 160) == {"resnet18": Peer(160, None), "pit_s_224": Peer(224, 80.9)}
    assert peers_of([], 224) == {}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["swin_tiny_patch4_window7"], "did you mean swin_tiny_patch4_window7_224"),
        (["resnet19"], "peers=resnet19 is not a model of timm; did you mean resnet"),
        (["all", "pit_s_224"], "peers must name none twice"),
    ],
)
def test_a_wrong_name_is_answered_by_the_nearest(words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        peers_of(words, 224)
