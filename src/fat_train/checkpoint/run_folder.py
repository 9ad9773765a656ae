"""A run's folder: stable, named by the run and not by the clock, so that the same command finds it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fat_train.checkpoint.io import write_atomically
from fat_train.types import UserError


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of last.ckpt and its like."""
        return self.root / "checkpoints"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.checkpoints / "last.ckpt"

    @property
    def metrics(self) -> Path:
        """One row an epoch and every so many updates."""
        return self.root / "metrics.csv"

    @property
    def config(self) -> Path:
        """The resolved configuration of the newest start."""
        return self.root / "config.yaml"

    def starting_point(self, resume: str, overwrite: bool) -> Path | None:
        """The checkpoint to go on from, or None for a fresh start.

        Raises:
            UserError: resume=never over an existing run without overwrite=true.
        """
        if resume == "auto":
            return self.last if self.last.is_file() else None
        if self.files() and not overwrite:
            raise UserError(
                f"resume=never would overwrite the run in {self.root} "
                f"({len(list(self.checkpoints.glob('*.ckpt')))} checkpoints). "
                "Add overwrite=true to delete it, or give another name=<name>"
            )
        return None

    def files(self) -> list[Path]:
        """What a former run left here that a fresh start would mix with its own."""
        return [*self.checkpoints.glob("*.ckpt"), *(file for file in (self.metrics, self.config) if file.exists())]

    def clear(self) -> None:
        """Delete a former run's files; what this project did not write stays."""
        for file in self.files():
            file.unlink()

    def write_config(self, values: dict[str, Any]) -> None:
        """Keep the resolved configuration."""
        write_atomically(self.config, OmegaConf.to_yaml(OmegaConf.create(values), sort_keys=False))

    def config_diff(self, values: dict[str, Any]) -> list[str]:
        """Lines "key: old -> new" for what changed since the run's former start; empty if nothing or no former one."""
        if not self.config.exists():
            return []
        old = _flat(OmegaConf.to_container(OmegaConf.load(self.config)))
        new = _flat(values)
        gone = object()
        return [
            f"{key}: {_shown(old.get(key, gone), gone)} -> {_shown(new.get(key, gone), gone)}"
            for key in sorted({*old, *new})
            if old.get(key, gone) != new.get(key, gone)
        ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _shown(value: Any, gone: object) -> str:
    return "(not there)" if value is gone else str(value)
