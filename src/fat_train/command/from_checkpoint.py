"""What a checkpoint says of its run beside the weights; shared by the commands that take a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fat_train.checkpoint.io import find_damage
from fat_train.checkpoint.weights import read_checkpoint
from fat_train.types import MissingPathError, UserError


def about_run(checkpoint: Path) -> dict[str, Any]:
    """Model, classes and configuration of the run that made a checkpoint: `fat_train.checkpoint.provenance`.

    The whole file is read once against its checksums: a flipped bit in a weight would else go unnoticed.

    Raises:
        MissingPathError: no such file.
        UserError: it is damaged, or holds weights alone.
    """
    if not checkpoint.is_file():
        raise MissingPathError(f"checkpoint={checkpoint}: no such file")
    about = read_checkpoint(checkpoint).get("fat_train")
    if about is None:
        raise UserError(
            f"checkpoint={checkpoint} holds weights but not the configuration of a run, so the model is unknown. "
            "In Python: model = fat_train.create_model(<name>); fat_train.load_weights(model, <file>)"
        )
    damage = find_damage(checkpoint)
    if damage:
        raise UserError(f"checkpoint={checkpoint} is damaged: {damage}")
    return about
