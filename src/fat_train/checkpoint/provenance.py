"""What travels beside the weights: configuration, versions, git state, the data's fingerprint."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("fat_train", "torch", "torchvision", "timm", "pytorch-lightning", "nvidia-dali-cuda130", "numpy", "pillow")


def provenance(
    config: dict[str, Any],
    *,
    model: str,
    classes: tuple[str, ...],
    steps_per_epoch: int,
    fingerprints: dict[str, str],
) -> dict[str, Any]:
    """Plain values only, so that `torch.load(weights_only=True)` reads them.

    Args:
        config: the resolved configuration of the run.
        model: name of the model's yaml.
        classes: class names in the order of the head's outputs.
        steps_per_epoch: updates an epoch, from which a resumed run finds its place.
        fingerprints: split -> fingerprint of its list of files.
    """
    return {
        "config": config,
        "model": model,
        "num_classes": len(classes),
        "classes": list(classes),
        "steps_per_epoch": steps_per_epoch,
        "data": fingerprints,
        "versions": versions(),
        "git": git_state(),
    }


def versions() -> dict[str, str]:
    """Version of Python and of each package that a result depends on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, str | bool] | None:
    """Commit of the checkout that the code runs from, and whether files differ from it; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder.parents[2]:
            return None  # installed into somebody else's checkout
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
