"""Every yaml composes and resolves, and a mistyped word is answered by the right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fat_train.config.compose import compose, group_choices
from fat_train.config.run import Problems, plain, resolve_run
from fat_train.config.zoo import conf_dir
from fat_train.types import UserError

CHOICES = [
    (group, choice)
    for group, choices in group_choices([conf_dir()]).items()
    for choice in choices
    if (group, choice) != ("data", "as_trained")  # the placeholder of `evaluate`
    and group != "slurm"  # of `submit`, which hands the rest of its words on to a run
]


def run_of(*overrides: str) -> object:
    problems = Problems()
    config = resolve_run(plain(compose("train", overrides)), problems)
    problems.raise_if_any()
    return config


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_of_every_group_composes_into_a_valid_run(group: str, choice: str) -> None:
    assert run_of(f"{group}={choice}") is not None


@pytest.mark.parametrize("command", sorted(file.stem for file in conf_dir().glob("*.yaml")))
def test_every_command_composes(command: str) -> None:
    assert compose(command, [])


def test_defaults_are_the_papers_recipe() -> None:
    run = run_of()
    assert (run.optim.base_lr, run.optim.lr_per_images, run.optim.weight_decay) == (5e-4, 512, 0.05)
    assert (run.optim.betas, run.optim.eps, run.optim.clip_grad_norm) == ([0.9, 0.999], 1e-8, 5.0)
    assert (run.schedule.epochs, run.schedule.warmup_epochs, run.schedule.warmup_prefix) == (300, 20, False)
    assert (run.schedule.warmup_lr, run.schedule.min_lr) == (5e-7, 5e-6)
    assert run.trainer.global_batch == 1024
    assert run.loss.label_smoothing == 0.1
    assert run.augment.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (run.augment.mixup_alpha, run.augment.cutmix_alpha) == (0.8, 1.0)
    assert (run.augment.mix_prob, run.augment.mix_switch_prob) == (1.0, 0.5)
    assert (run.augment.erase_prob, run.augment.erase_mode) == (0.25, "pixel")
    assert (run.augment.interpolation, run.data.eval_resize_px, run.data.image_px) == ("bicubic", 256, 224)


@pytest.mark.parametrize(
    ("experiment", "rate"),
    [("fat_b0_300e", 0.05), ("fat_b1_300e", 0.1), ("fat_b2_300e", 0.1), ("fat_b3_300e", 0.15)],
)
def test_each_experiment_has_its_models_drop_path(experiment: str, rate: float) -> None:
    run = run_of(f"experiment={experiment}")
    assert run.model.drop_path_rate == rate
    assert run.name == experiment


def test_a_value_that_no_yaml_names_can_be_set() -> None:
    assert run_of("callback.ema.decay=0.9999").callback.ema.decay == 0.9999


@pytest.mark.parametrize(
    ("word", "way"),
    [("true", "default"), ("false", "off"), ("off", "off"), ("auto", "off"), ("regional", "regional")],
)
def test_compiling_is_a_word_or_what_it_was_before(word: str, way: str) -> None:
    run = run_of(f"trainer.compile={word}", "trainer.accelerator=cpu")
    assert run.trainer.way_to_compile == way


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["modle=fat_b1"], "unknown key modle; did you mean model"),
        (["model=fat_b9"], r"model=fat_b9: no such choice; did you mean fat_b\d\?\nAllowed: .*fat_b0, fat_b1"),
        (["model.drop_pth_rate=0.1"], "unknown key model.drop_pth_rate; did you mean drop_path_rate"),
        (["trainer.devises=8"], "unknown key trainer.devises; did you mean devices"),
        (["seeed=1"], "unknown key seeed; did you mean seed"),
        (["optim.base_lr"], "could not read the word 'optim.base_lr'"),
        (["trainer.precision=16"], "trainer.precision=16 is not known; did you mean 16-mixed"),
        (["resume=nver"], "resume=nver is not known; did you mean never"),
        (["name=a/b"], "name must be a plain folder name"),
        (["model.drop_path_rate=0,0.1"], "several values make several runs"),
        (["optim.base_lr=x", "seed=-1"], "2 things to mend first"),
        (["name=${nowhere}"], "nowhere"),
    ],
)
def test_a_wrong_word_is_answered_by_the_right_one(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run_of(*words)


def test_a_users_own_folder_of_yamls_joins_the_choices(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\nseed: 7\n")
    assert compose("train", ["experiment=mine"], extra_dir=tmp_path).seed == 7
    with pytest.raises(UserError, match="experiment=mine: no such choice"):
        compose("train", ["experiment=mine"])


@pytest.mark.parametrize("word", ["hydra/launcher=submitit_slurm", "hydra.run.dir=x", "+hydra.job.name=y"])
def test_words_for_hydras_own_machinery_are_refused_with_what_does_it_here(word: str) -> None:
    with pytest.raises(UserError, match="its launchers, sweepers and folders are not used"):
        compose("train", [word])
