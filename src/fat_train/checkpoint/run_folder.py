"""A run's folder: stable, named by the run and not by the clock, so that the same command finds it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

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
            UserError: resume=never over an existing run without overwrite=true; or a run whose last.ckpt is gone while
                others are there, which a fresh start would delete.
        """
        if resume == "auto" and self.last.is_file():
            return self.last
        others = sorted(file.name for file in self.checkpoints.glob("*.ckpt"))
        if resume == "auto" and others and not overwrite:
            raise UserError(
                f"{self.last} is not there, but {', '.join(others)} {'is' if len(others) == 1 else 'are'}. "
                "Copy one of them to last.ckpt to go on from it; or give resume=never overwrite=true to start again, "
                "or another name=<name>"
            )
        if resume == "never" and self.files() and not overwrite:
            raise UserError(
                f"resume=never would overwrite the run in {self.root} "
                f"({len(list(self.checkpoints.glob('*.ckpt')))} checkpoints). "
                "Add overwrite=true to delete it, or give another name=<name>"
            )
        return None

    def files(self) -> list[Path]:
        """What a former run left here that a fresh start would mix with its own."""
        beside = (
            self.root / name for name in ("metrics.csv", "config.yaml", "curves.png", "report.md", "wandb_id.txt")
        )
        events = (self.root / "tensorboard").glob("events.out.tfevents.*")
        faults = (file for pattern in ("nonfinite_update_*.pt", "hang_rank*.txt") for file in self.root.glob(pattern))
        return [*self.checkpoints.glob("*.ckpt"), *events, *faults, *(file for file in beside if file.exists())]

    def clear(self) -> None:
        """Delete a former run's files; what this project did not write stays."""
        for file in self.files():
            file.unlink()

    def sweep(self) -> None:
        """Delete halves of files whose writer was killed."""
        for folder in (self.root, self.checkpoints):
            for half in folder.glob(".*.part"):
                half.unlink(missing_ok=True)

    def write_config(self, values: dict[str, Any]) -> None:
        """Keep the resolved configuration."""
        write_atomically(self.config, OmegaConf.to_yaml(OmegaConf.create(values), sort_keys=False))

    def config_diff(self, values: dict[str, Any]) -> list[str]:
        """Lines "key: old -> new" for what changed since the run's former start; empty if nothing or no former one."""
        if not self.config.exists():
            return []
        try:
            old = _flat(OmegaConf.to_container(OmegaConf.load(self.config)))
        except (YAMLError, OSError, UnicodeDecodeError):
            return [f"{self.config}: cannot be read, so what has changed is not known"]
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
