"""fat_train: train lightweight vision transformers on ImageNet from scratch, and get the paper's number.

Importing it makes the models' names known to `timm.create_model` too.
"""

import os
from importlib.metadata import PackageNotFoundError, version

# Pages of 2 MiB for torch's larger tensors in main memory, where the system has them: a fresh batch costs more in page
# faults of 4 KiB than in arithmetic (docs/log.md). torch reads this when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from fat_train.checkpoint.weights import load_weights
from fat_train.config.loaders import create_loader, list_recipes
from fat_train.config.zoo import create_model, list_models, register_with_timm

try:
    __version__ = version("fat_train")
except PackageNotFoundError:
    __version__ = "0+not.installed"

__all__ = ["__version__", "create_loader", "create_model", "list_models", "list_recipes", "load_weights"]

register_with_timm()
