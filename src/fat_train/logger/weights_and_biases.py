"""A run on Weights & Biases: online where it can be reached, else a file that `wandb sync` sends later."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from pathlib import Path
from typing import Any, Literal

from fat_train.logger.background import Standing

PROBE_BYTES = 1 << 16


class WandbService:
    """One row of metrics.csv is one line of W&B's history, drawn over `step`, the number of finished updates.

    Resumed, the run goes on under its id. Online, W&B says how far it has got, and gets the rows after that: each once.
    Rows that a killed process sent after the checkpoint that the run goes on from stay as they are; with unchanged
    settings the resumed run would make the same ones. Offline, `wandb sync` puts a later file of a run in the place of
    an earlier one instead of appending it; so each start writes the whole history, and the newest folder
    `wandb/offline-run-*` is all that is to be sent.

    A stop asked for on W&B's page comes as a SIGINT, as Ctrl-C does.

    Args:
        folder: the run's.
        name: the run's.
        run_id: the run's on W&B.
        project: there.
        entity: user or team there; None for the account's own.
        config: plain values of the whole configuration.
        wait_s: longest wait for the server, at the start and at the end.
    """

    name = "W&B"

    def __init__(
        self,
        *,
        folder: Path,
        name: str,
        run_id: str,
        project: str,
        entity: str | None,
        config: dict[str, Any],
        wait_s: float,
    ) -> None:
        self._folder = folder
        self._wait_s = wait_s
        self._config = config
        self._words: dict[str, Any] = {
            "name": name,
            "id": run_id,
            "project": project,
            "entity": entity,
            "resume": "allow",
        }
        self._mode: Literal["offline"] | None = None  # None: W&B's own choice
        self._why_offline = ""
        self._run: Any = None

    def open(self) -> tuple[Standing, str]:
        """Online if W&B can be reached within `wait_s`, else offline for the rest of this process."""
        # Its reports about itself hold up our exit by ten seconds where nothing can be reached, and are printed then.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # noqa: PLC0415  # seconds of import, for those who asked for it

        wandb.setup(settings=wandb.Settings(silent=True))  # where to find the run is said by us, in one line
        if not self._why_offline and not os.environ.get("WANDB_MODE") and not wandb.login(prompt=False, verify=False):
            self._mode, self._why_offline = "offline", "nobody is logged in"
        try:
            self._run = self._init()
        except Exception as error:
            if self._mode == "offline":
                raise
            self.abandon()
            self._mode = "offline"
            self._why_offline = f"no answer within {self._wait_s:g} s ({str(error).splitlines()[-1]})"
            self._run = self._init()
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        had = self._run.summary if self._run.resumed else {}
        return Standing(int(had.get("step", -1)), int(had.get("epoch", -1))), self._word()

    def _init(self) -> Any:
        import wandb  # noqa: PLC0415

        if self._mode == "offline":
            self._probe()
        settings = wandb.Settings(
            silent=True,
            console="off",  # it would put itself between the live display and the terminal
            init_timeout=self._wait_s,
            finish_timeout=self._wait_s,
        )
        return wandb.init(dir=str(self._folder), config=self._config, mode=self._mode, settings=settings, **self._words)

    def _word(self) -> str:
        if self._run.settings.mode == "disabled":
            return ""
        if not self._is_offline:
            return self._run.url
        why = f": {self._why_offline}" if self._why_offline else ""
        return f"offline{why}; send it later with: wandb sync {self._run.settings.sync_dir}"

    @property
    def _is_offline(self) -> bool:
        return self._run.settings.mode in ("offline", "dryrun")

    def write(self, values: dict[str, float]) -> None:
        """One step of the history."""
        self._run.log(values)

    def check(self) -> None:
        """Offline, W&B tells nobody of a full disk: see whether there is room."""
        if self._is_offline:
            self._probe()

    def _probe(self) -> None:
        folder = self._folder / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())

    def close(self, succeeded: bool) -> None:
        """Finish the run; what has not arrived within `wait_s` stays in its folder."""
        self._run.finish(exit_code=0 if succeeded else 1)

    def abandon(self) -> None:
        """End W&B's process, which after a failure of its own would be waited for at our exit."""
        import wandb  # noqa: PLC0415

        for process in _children("wandb-core"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(Exception, SystemExit):  # its word on a process that is gone
            wandb.teardown(exit_code=1)


def _children(name: str) -> list[int]:
    """Ids of this process's children of that name, where the system tells (Linux)."""
    found = []
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in file.read_text().split():
                if Path(f"/proc/{child}/comm").read_text().strip() == name:
                    found.append(int(child))
    return found
