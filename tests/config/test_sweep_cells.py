"""Words with several values become runs with names that stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from fat_train.config.sweep import NAME_AT_MOST, sweep_cells
from fat_train.types import UserError


def names(*words: str) -> list[str]:
    return [cell.name for cell in sweep_cells(words)]


def test_the_last_words_values_vary_fastest() -> None:
    cells = sweep_cells(["model.drop_path_rate=0,0.05", "schedule.epochs=3", "seed=1,2"])
    assert [list(cell.values.values()) for cell in cells] == [["0", "1"], ["0", "2"], ["0.05", "1"], ["0.05", "2"]]
    assert cells[2].words == ["model.drop_path_rate=0.05", "schedule.epochs=3", "seed=1"]
    assert cells[2].values == {"model.drop_path_rate": "0.05", "seed": "1"}


def test_a_name_does_not_depend_on_the_order_of_the_words_or_on_other_values() -> None:
    assert names("seed=1,2", "model.drop_path_rate=0.05,0.1")[0] == "drop_path_rate=0.05,seed=1"
    assert names("model.drop_path_rate=0.3,0.05", "optim.eps=1e-8", "seed=choice(1)")[1] == "drop_path_rate=0.05,seed=1"


def test_the_sweeps_name_and_folder_are_not_a_cells() -> None:
    assert sweep_cells(["name=mine", "seed=0,1", "folder=/tmp/x"])[1].words == ["seed=1"]


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("optim.base_lr=1e-3,0.002", ["1e-3", "0.002"]),
        ("seed=choice( 1 , 2 )", ["1", "2"]),
        ("seed=range(3)", ["0", "1", "2"]),
        ("seed=range(5,0,-2)", ["5", "3", "1"]),
        ("model.drop_path_rate=range(0.0,0.2,0.05)", ["0.0", "0.05", "0.1", "0.15"]),
        ("optim.betas=[0.9,0.95],[0.9,0.999]", ["[0.9,0.95]", "[0.9,0.999]"]),
        ("data.root=/a/b,/c/d", ["/a/b", "/c/d"]),
        ("data.root='/a,b',\"it's\"", ["'/a,b'", '"it\'s"']),
        ("trainer.compile=true,false", ["true", "false"]),
        ("seed=sort(3,1,2)", ["1", "2", "3"]),
        ("model=glob(fat_b3*)", ["fat_b3", "fat_b3_st"]),
    ],
)
def test_values_are_hydras_and_spelt_as_they_were(word: str, values: list[str]) -> None:
    cells = sweep_cells([word])
    assert [next(iter(cell.values.values())) for cell in cells] == values
    assert [cell.words for cell in cells] == [[f"{word.partition('=')[0]}={value}"] for value in values]


def test_glob_sees_a_users_own_yamls(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine_a.yaml").write_text("# @package _global_\nseed: 7\n")
    assert [cell.name for cell in sweep_cells(["experiment=glob(mine_*)"], tmp_path)] == ["experiment=mine_a"]


def test_names_are_plain_folder_names_that_stay_apart() -> None:
    assert names("a.rate=1,2", "b.rate=3")[0] == "rate=1"
    assert names("a.rate=1,2", "b.rate=3,4")[0] == "a.rate=1,b.rate=3"
    odd = names("data.root=/a/b,/a-b,a-b,ab,'/a b',../a")
    assert len(set(odd)) == len(odd)
    assert all(not set(name) & set("/ '\"[]") for name in odd)
    long = names(*(f"group.{'x' * 30}{number}=1,2" for number in range(3)))
    assert len(set(long)) == 8
    assert {len(name) for name in long} == {NAME_AT_MOST}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=0", "optim.betas=[0.9,0.95]"], "no word has several"),
        (["seed=1,2,1"], r"twice \(1 and 1\)"),
        (["optim.base_lr=1e-3,0.001"], r"twice \(1e-3 and 0\.001\)"),
        (["seed=1,2", "seed=3,4"], "another word sets seed too"),
        (["model=fat_b0", "model=fat_b1,fat_b2"], "another word sets model too"),
        (["seed=shuffle(1,2)"], "random order"),
        (["seed=interval(0,1)"], "no list of values"),
        (["seed=range(0,0)"], "range is empty"),
        (["seed=glob(*)"], "seed is no group"),
        (["model=glob(vit*)"], "no such choice\nAllowed: .*fat_b0"),
        (["name=a,b"], "one for the whole sweep"),
        (["debug.overfit_images=1,2"], "one for the whole sweep"),
        (["seed=choice(a=1,2)"], "no word has several"),
    ],
)
def test_what_makes_no_list_of_runs_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sweep_cells(words)
