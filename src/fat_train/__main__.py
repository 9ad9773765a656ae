"""`python -m fat_train [command] [group=choice] [key=value] …`: compose, then run the command. No logic of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from textwrap import fill

from omegaconf import OmegaConf

from fat_train.command.say import complain
from fat_train.config.compose import compose, group_choices
from fat_train.config.zoo import conf_dir
from fat_train.types import UnfinishedRunError, UserError, nearest

# A command of two words is the module and the yaml whose name has "_" between them.
COMMANDS = {
    "train": "the main job, and the default where no command is named",
    "evaluate": "top-1 and top-5 of a checkpoint on a data set",
    "export": "a trained model as one file that runs without fat_train: torch.export or ONNX",
    "preview": "a picture of what the pipeline really feeds the model",
    "check": "look before a long run: data set, machine, configuration, hours it will take",
    "check augment": "the augmentation against timm's: picture by picture, draw by draw",
    "pack": "the data set as tar shards of smaller pictures, read and decoded faster",
    "replay": "an update at which a run stopped, computed again: where the first number is not finite",
    "submit": "the run as a SLURM job, a sweep as an array of them",
    "report": "curves and a table of a run, or of a sweep",
    "models": "every model there is, its parameters and multiply-adds beside the document's",
    "benchmark loader": "images per second of our loaders beside timm's, torchvision's and DALI's own",
    "benchmark step": "where the time of a training step goes, what bounds the run, what to change",
    "benchmark op": "every way of computing each operation at a model's sizes: what op=auto takes, and why",
    "benchmark all": "tests and benchmarks of a machine with a GPU, their tables appended to a log",
    "benchmark model": "images per second in training and inference, beside the plain equations and timm's models",
    "benchmark checkpoint": "how long a training stands still for a checkpoint, and what saving costs it",
}
OPTIONS = ("--help", "--cfg", "--config-dir", "-m", "--multirun", "--cell")
TRACEBACK = "FAT_TRAIN_TRACEBACK"
HELP_WIDTH = 110

HELP = """usage: python -m fat_train [command] [group=choice] [key=value] ...

commands:
{commands}

groups and their choices (group=choice; any value below them as group.key=value):
{groups}

  --cfg              print the composed configuration and stop
  --config-dir DIR   a folder of your own yamls, laid out as conf/ is
  -m, --multirun     train once per value of words such as seed=0,1 or model=glob(fat_b*), one run after another
  --cell N           with -m: train only run N of them, counted from 0, in this process (for job arrays)
  {traceback}=1  show the stack trace of an error
"""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 after an error that the user can mend, 75 after leaving early,
    1 after a sweep of which some runs failed."""
    words = list(sys.argv[1:] if words is None else words)
    try:
        return _run(words)
    except UserError as error:
        if os.environ.get(TRACEBACK):
            raise
        complain(str(error))
        return 2
    except UnfinishedRunError as stop:
        return stop.status
    except KeyboardInterrupt:
        return 130


def _run(words: list[str]) -> int:
    multirun = _take_multirun(words)
    cell = _take_option(words, "--cell", "a number")
    command = _take_command(words)
    if "--help" in words or "-h" in words:
        print(_help(group_choices([conf_dir()])))
        return 0
    show = "--cfg" in words
    if show:
        words.remove("--cfg")
    given = _take_option(words, "--config-dir", "a folder")
    extra_dir = None if given is None else Path(given)
    for word in words:
        if word.startswith("-"):
            raise UserError(f"unknown option {word}{nearest(word, OPTIONS)} (allowed: {', '.join(OPTIONS)})")
    if command == "submit" and cell is None and not show:  # it wants the words themselves: they are what the job runs
        import_module("fat_train.command.submit").run(words, extra_dir, multirun)
        return 0
    if multirun or cell is not None:
        return _sweep(command, words, extra_dir, multirun, cell, show)
    module = command.replace(" ", "_")
    tree = compose(module, words, extra_dir=extra_dir)
    if show:
        print(OmegaConf.to_yaml(tree, resolve=True), end="")
        return 0
    import_module(f"fat_train.command.{module}").run(tree)
    return 0


def _take_command(words: list[str]) -> str:
    if not words or words[0].startswith("-") or "=" in words[0] or words[0].startswith("~"):
        return "train"
    command = words.pop(0)
    if any(name.startswith(f"{command} ") for name in COMMANDS) and words and words[0].isalpha():
        command = f"{command} {words.pop(0)}"
    if command not in COMMANDS:
        raise UserError(
            f"unknown command {command!r}{nearest(command, COMMANDS)} (allowed: {', '.join(COMMANDS)}; "
            "settings are written key=value)"
        )
    return command


def _take_option(words: list[str], option: str, what: str) -> str | None:
    if option not in words:
        return None
    at = words.index(option)
    if at + 1 == len(words):
        raise UserError(f"{option} wants {what} after it")
    value = words[at + 1]
    del words[at : at + 2]
    return value


def _take_multirun(words: list[str]) -> bool:
    taken = [word for word in words if word in ("-m", "--multirun")]
    for word in taken:
        words.remove(word)
    return bool(taken)


def _sweep(command: str, words: list[str], extra_dir: Path | None, multirun: bool, cell: str | None, show: bool) -> int:
    if not multirun:
        raise UserError("--cell takes one run of a sweep: give -m and words with several values too")
    if command != "train":
        raise UserError(f"-m trains one run per value; {command} has no use for it")
    if cell is not None and not cell.isdecimal():
        raise UserError(f"--cell wants the number of a run, 0 or more; got {cell}")
    sweep = import_module("fat_train.command.sweep")
    only = None if cell is None else int(cell)
    if show:
        print(sweep.show(words, extra_dir, only), end="")
        return 0
    status: int = sweep.run(words, extra_dir, only)
    return status


def _help(choices: dict[str, list[str]]) -> str:
    return HELP.format(
        commands="\n".join(f"  {name:<22}{text}" for name, text in COMMANDS.items()),
        groups="\n".join(
            fill(", ".join(names), HELP_WIDTH, initial_indent=f"  {group:<11}", subsequent_indent=" " * 13)
            for group, names in choices.items()
        ),
        traceback=TRACEBACK,
    )


if __name__ == "__main__":
    sys.exit(main())
