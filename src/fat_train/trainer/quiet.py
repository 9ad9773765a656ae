"""What third parties print at every start and nobody needs to read; each silence has its reason."""

from __future__ import annotations

import logging
import warnings

MESSAGES = (
    # Lightning asks torch a question in words that torch has since changed.
    r".*treespec, LeafSpec.* is deprecated.*",
    # Resuming a run into its own folder is what these folders are for.
    r"Checkpoint directory .* exists and is not empty.*",
    # An epoch shorter than `log_every_n_steps` has its epoch's row in metrics.csv all the same.
    r"The number of training batches .* is smaller than the logging interval.*",
    # Our loaders have their own threads and processes, which this advice does not know of.
    r"The '.*_dataloader' does not have many workers.*",
    # On a login node, or inside one's own allocation, a run without srun is what was asked for.
    r"The `srun` command is available on your system but is not used.*",
    # torchmetrics has summed the counts over the ranks before they are logged.
    r"It is recommended to use `self.log\(.*sync_dist=True\)`.*",
)


def silence() -> None:
    """Leave warnings and errors of Lightning, and none of its notes (devices found, tips, what `fit` will do)."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # A run of one update (a test, a first try) has no curve: timm says so to everybody.
    logging.getLogger("timm.scheduler").setLevel(logging.ERROR)
    for message in MESSAGES:
        warnings.filterwarnings("ignore", message=message)
