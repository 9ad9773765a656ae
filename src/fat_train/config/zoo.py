"""The models by name: every yaml under conf/model is one, here and in timm."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from fat_train.checkpoint.weights import apply_state_dict, num_classes_of, read_state_dict
from fat_train.config.resolve import resolve
from fat_train.model.backbone import Backbone
from fat_train.types import MissingPathError, UserError, nearest

IMAGENET_CLASSES = 1000
PRINTED = ("paper_params_m", "paper_macs_g", "paper_top1", "top1")
DIFFER = "params_differ_percent"
COUNTED = "Counted at"
"""With this begins what a header says of how it counts."""
TIMM_OPTIONS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "feature_cls")


def conf_dir() -> Path:
    """The folder of yaml files: inside an installed package, at the root of a checkout.

    Raises:
        MissingPathError: it is in neither place, so the installation is not whole.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / "model").is_dir():
            return folder
    raise MissingPathError(f"the folder conf/ is neither in {package} nor in {package.parents[1]}: install again")


def list_models(pattern: str = "") -> list[str]:
    """Names that `create_model` knows, sorted; `pattern` ("fat_b*") chooses among them."""
    names = sorted(file.stem for file in (conf_dir() / "model").glob("*.yaml"))
    return [name for name in names if fnmatch(name, pattern or "*")]


def load_model_node(name: str) -> DictConfig:
    """The yaml of a model, not yet typed.

    Raises:
        UserError: no such name; says the nearest and all of them.
    """
    names = list_models()
    if name not in names:
        raise UserError(f"unknown model {name}{nearest(name, names)}\nModels: {', '.join(names)}")
    node = OmegaConf.load(conf_dir() / "model" / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    return node


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the header of a model's yaml states: `# key: value` lines, at 1000 classes and 224 px."""

    name: str
    family: str
    """As its document calls it: FATConfig is of FAT."""
    parameters: int
    """Counted."""
    macs_g: float
    """Counted, billions of multiply-adds of one image."""
    paper_params_m: Decimal | None
    """The document's, millions, with the digits that it prints; None where it has no number."""
    paper_macs_g: Decimal | None
    """The document's, billions."""
    paper_top1: Decimal | None
    """The document's, percent of ImageNet-1K's validation images."""
    top1: Decimal | None
    """This code's, percent; None before the model has been trained."""
    params_differ_percent: float | None
    """Largest difference from the document's parameters that is allowed; None where ours round to them."""
    differ_because: str
    """The reason, from the comment lines below that key."""

    @property
    def differs(self) -> bool:
        """Whether our parameters do not round to the document's."""
        printed = self.paper_params_m
        return printed is not None and round(Decimal(self.parameters).scaleb(-6), _decimals(printed)) != printed


def _decimals(number: Decimal) -> int:
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)
    return -exponent


def facts_of(name: str) -> ModelFacts:
    """The header of `conf/model/<name>.yaml`.

    Raises:
        UserError: no such model, or a header without its counts.
    """
    target = str(load_model_node(name)["_target_"])
    values: dict[str, str] = {}
    remarks: dict[str, list[str]] = {}
    key = ""
    for line in (conf_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        found = re.fullmatch(r"# (\w+): ([\d.]+)", line)
        if found:
            key = found[1]
            values[key] = found[2]
        else:
            remarks.setdefault(key, []).append(line.removeprefix("#").strip())
    for wanted in ("parameters", "macs_g"):
        if wanted not in values:
            raise UserError(f"conf/model/{name}.yaml must state `# {wanted}: <number>` in the comments it begins with")
    printed = {key: Decimal(values[key]) if key in values else None for key in PRINTED}
    reason = takewhile(lambda line: not line.startswith(COUNTED), remarks.get(DIFFER, []))
    return ModelFacts(
        name=name,
        family=target.rpartition(".")[2].removesuffix("Config"),
        parameters=int(values["parameters"]),
        macs_g=float(values["macs_g"]),
        params_differ_percent=float(values[DIFFER]) if DIFFER in values else None,
        differ_because=" ".join(reason),
        **printed,
    )


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    drop_path_rate: float | None = None,
    global_pool: str = "avg",
    features_only: bool = False,
    out_indices: Sequence[int] | int | None = None,
    checkpoint_path: str | Path | None = None,
    pretrained: bool = False,
    **overrides: Any,
) -> nn.Module:
    """Build a model of the zoo.

    Args:
        name: one of `list_models()`.
        num_classes: width of the classifier, 0 for none; unless given the checkpoint's, or 1000 without one.
        in_chans: channels of the image.
        drop_path_rate: instead of the yaml's; in [0, 1).
        global_pool: "avg", or "" to leave the features a map (with `num_classes=0`).
        features_only: give a module that maps images to a list of feature maps, with timm's `feature_info`.
        out_indices: levels of that list, from 0 (stride 4); an int means the last so many; all unless given.
        checkpoint_path: weights to load, as `load_weights` does.
        pretrained: refused, as no weights are published.
        overrides: other fields of the model's config, such as `interaction={"gate": "paper"}`; and timm's
            `pretrained_cfg`, `pretrained_cfg_overlay`, `cache_dir` and `feature_cls`.

    Returns:
        A `Backbone`, or timm's feature extractor around one.

    Raises:
        UserError: an unknown name or field, an impossible value, a checkpoint of another model.
        MissingPathError: no such checkpoint.
    """
    if pretrained:
        raise UserError(
            f"no weights are published for {name}: train it, then "
            f'fat_train.create_model("{name}", checkpoint_path=...) or fat_train.load_weights(model, path)'
        )
    options: dict[str, Any] = {key: overrides.pop(key) for key in TIMM_OPTIONS if key in overrides}
    if out_indices is not None:
        if not features_only:
            raise UserError("out_indices chooses among feature maps: set features_only=True")
        options["out_indices"] = out_indices
    if drop_path_rate is not None:
        overrides["drop_path_rate"] = drop_path_rate
    node = OmegaConf.merge(load_model_node(name), overrides)
    assert isinstance(node, DictConfig)
    config = resolve(node, where="model")
    state = None if checkpoint_path is None else read_state_dict(checkpoint_path)
    if num_classes is None:
        num_classes = IMAGENET_CLASSES if state is None else num_classes_of(state)

    def build(num_classes: int, in_chans: int) -> Backbone:
        model = config.build(num_classes, in_chans)
        if global_pool != model.global_pool:  # a second head would draw other weights than `config.build` does
            model.reset_classifier(num_classes, global_pool)
        if state is not None:
            apply_state_dict(model, state, source=str(checkpoint_path))
        return model

    return build_model_with_cfg(
        build,
        name,
        pretrained=False,
        feature_cfg={"feature_cls": "getter", "out_indices": tuple(range(len(config.depths)))},
        features_only=features_only,
        num_classes=num_classes,
        in_chans=in_chans,
        **options,
    )


def register_with_timm() -> None:
    """Make every name known to `timm.create_model`; a name that timm has already would be replaced, with a warning."""
    for name in list_models():
        # timm appends each name to this module's __all__, as it does to those of its own modules.
        setattr(sys.modules[__name__], name, register_model(_entrypoint(name)))


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def entrypoint(drop_rate: float = 0.0, **kwargs: Any) -> nn.Module:
        if drop_rate:
            raise UserError(f"{name} has no dropout before its classifier: leave out drop_rate; got {drop_rate}")
        return create_model(name, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f'`fat_train.create_model("{name}", ...)`, by timm\'s signature.'
    return entrypoint


# Where timm's `register_model` looks for what a model expects of its images.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 224, 224),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "num_classes": IMAGENET_CLASSES,
            "classifier": "head",
        }
        for name in list_models()
    }
)
