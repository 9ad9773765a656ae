"""Models of timm that FAT is set beside, and the top-1 that their authors published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import timm

from fat_train.types import UserError, nearest


class Peer(NamedTuple):
    """What is known of a model before it is timed."""

    image_px: int | None
    """Height and width of the images that its top-1 was published for; None where no top-1 is known here."""
    top1: float | None
    """On ImageNet-1K's validation images, percent."""


PEERS = {
    "mobilevit_xs": Peer(256, 74.8),
    "edgenext_x_small": Peer(256, 75.0),
    "xcit_tiny_12_p16_224": Peer(224, 77.1),
    "poolformer_s12": Peer(224, 77.2),
    "coat_lite_tiny": Peer(224, 77.5),
    "regnety_016": Peer(224, 78.0),
    "mobilevit_s": Peer(256, 78.4),
    "pvt_v2_b1": Peer(224, 78.7),
    "coat_lite_mini": Peer(224, 79.1),
    "efficientnet_b1": Peer(240, 79.2),
    "edgenext_small": Peer(256, 79.4),
    "xcit_tiny_24_p16_224": Peer(224, 79.4),
    "deit_small_patch16_224": Peer(224, 79.9),
    "pit_s_224": Peer(224, 80.9),
    "swin_tiny_patch4_window7_224": Peer(224, 81.3),
    "poolformer_s36": Peer(224, 81.4),
    "efficientnet_b3": Peer(300, 81.6),
    "deit_base_patch16_224": Peer(224, 81.8),
    "coat_lite_small": Peer(224, 81.9),
    "pvt_v2_b2": Peer(224, 82.0),
    "pit_b_224": Peer(224, 82.0),
    "focalnet_tiny_srf": Peer(224, 82.1),
    "poolformer_m48": Peer(224, 82.5),
    "davit_tiny": Peer(224, 82.8),
    "swin_small_patch4_window7_224": Peer(224, 83.0),
    "convnext_small": Peer(224, 83.1),
    "pvt_v2_b3": Peer(224, 83.2),
    "efficientformer_l7": Peer(224, 83.3),
    "focalnet_small_srf": Peer(224, 83.4),
}
"""Every model of the FAT paper's Table 14 that timm has, by its name there, with the top-1 of that table and the image
sizes of Table 1. Where the two tables differ (FocalNet-T: 82.0 and 82.1) it is Table 1's, which is the authors' own."""
ALL = "all"


def peers_of(words: Sequence[str], otherwise_px: int) -> dict[str, Peer]:
    """Name -> what is known of it; a model that is not in the table is timed at `otherwise_px` and has no top-1.

    Args:
        words: names that timm knows; "all" stands for the whole table.
        otherwise_px: image size of a model that is not in it.

    Raises:
        UserError: a name that timm does not know, or one given twice.
    """
    names = [name for word in words for name in (PEERS if word == ALL else [word])]
    known = timm.list_models()
    for name in names:
        if name not in known:
            raise UserError(f"peers={name} is not a model of timm{nearest(name, [*PEERS, *known, ALL])}")
    if len(set(names)) < len(names):
        raise UserError(f"peers must name none twice; got {', '.join(words)}")
    return {name: PEERS.get(name, Peer(otherwise_px, None)) for name in names}
