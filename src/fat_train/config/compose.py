"""From the words on the command line to one Hydra tree, with a mistyped word answered by the right one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fat_train.config.zoo import conf_dir
from fat_train.types import UserError, nearest

OPTIONAL_GROUPS = ("experiment",)


def compose(config_name: str, overrides: Sequence[str], extra_dir: Path | None = None) -> DictConfig:
    """Compose `conf/<config_name>.yaml` with overrides.

    A yaml holds only what differs from its dataclass, so any value may be set here whether a yaml names it or not;
    unknown names are refused later, by `resolve`, which knows the dataclass and so the nearest right name.

    Args:
        config_name: a file of `conf/`, without its ending.
        overrides: Hydra's `group=choice`, `key=value`, `~key`.
        extra_dir: a folder of the user's own yamls, laid out as `conf/` is.

    Raises:
        UserError: a word that Hydra cannot read, or a choice that a group does not have.
    """
    choices = group_choices(conf_folders(extra_dir))
    words = [_as_hydra_wants(override, choices) for override in parse_words(overrides)]
    if extra_dir is not None:
        words.append(f"hydra.searchpath=[file://{extra_dir.resolve()}]")
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            return hydra.compose(config_name=config_name, overrides=words)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_first_lines(error)) from error


def conf_folders(extra_dir: Path | None) -> list[Path]:
    """`conf/`, and the user's own folder beside it where one is given.

    Raises:
        UserError: there is no such folder.
    """
    if extra_dir is None:
        return [conf_dir()]
    if not extra_dir.is_dir():
        raise UserError(f"--config-dir {extra_dir} is not a folder")
    return [conf_dir(), extra_dir]


def group_choices(folders: Iterable[Path]) -> dict[str, list[str]]:
    """Group -> its choices, from the folders' yaml files."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/**/*.yaml"):
            found.setdefault(str(file.parent.relative_to(folder)), set()).add(file.stem)
    return {group: sorted(names) for group, names in sorted(found.items())}


def parse_words(words: Sequence[str], sweep: bool = False) -> list[Override]:
    """What each word says, by Hydra's grammar.

    Args:
        words: `group=choice`, `key=value`, `~key`.
        sweep: whether a word may have several values; else a path with a comma in it is one value.

    Raises:
        UserError: a word that Hydra cannot read.
    """
    parser = OverridesParser.create()
    parsed = []
    for word in words:
        key, _, value = word.partition("=")
        # Paths hold what Hydra's grammar refuses in a bare value ("~", "=", non-ASCII letters) or takes for a sweep.
        quoted = key + "='" + value.replace("'", "\\'") + "'"
        try:
            (override,) = parser.parse_overrides([word])
            if override.is_sweep_override() and "/" in value and not sweep:
                (override,) = parser.parse_overrides([quoted])
        except HydraException as error:
            try:
                (override,) = parser.parse_overrides([quoted] if value else [word])
            except HydraException:
                reason = _first_lines(error)
                raise UserError(f"could not read the word {word!r}: write key=value\n{reason}") from error
        parsed.append(override)
    return parsed


def _as_hydra_wants(override: Override, choices: dict[str, list[str]]) -> str:
    key, line = override.key_or_group, override.input_line
    assert line is not None
    if re.match(r"hydra\b", key):
        raise UserError(
            f"{line}: Hydra only composes the configuration here, its launchers, sweepers and folders are not used. "
            "A sweep is -m, a SLURM job is submit (docs/slurm.md), a run's folder is folder= and name="
        )
    if override.is_sweep_override():
        raise UserError(
            f"{line}: several values make several runs, and one command trains one. "
            f"Quote a list as {key}=[a,b]; -m runs one training per value"
        )
    if key not in choices or override.is_delete():
        return line if line[0] in "+~" else f"++{line}"
    value = override.value()
    if value is None and key in OPTIONAL_GROUPS:
        return line
    if value not in choices[key]:
        value = "null" if value is None else str(value)
        raise UserError(f"{key}={value}: no such choice{nearest(value, choices[key])}\nAllowed: {_list(choices[key])}")
    return line


def _first_lines(error: Exception) -> str:
    if isinstance(error, MissingConfigException):
        return f"no configuration file for it: {str(error).splitlines()[0]}"
    return "\n".join(str(error).strip().splitlines()[:2])


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)
