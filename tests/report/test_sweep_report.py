"""A sweep's runs beside each other: what is counted, what is said, what is drawn."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fat_train.__main__ import main
from fat_train.config.sweep import sweep_cells
from fat_train.report.curves import BLUE, GREEN, ORANGE
from fat_train.report.manifest import Manifest, read_manifest, write_manifest
from fat_train.report.sweep import write_sweep_report
from fat_train.report.sweep_plot import _is_logarithmic
from fat_train.report.sweep_rows import best_row, group, read_result

WriteSweep = Callable[..., Path]
CONFIGURED_EPOCHS = 3


@pytest.fixture
def write_sweep(tmp_path: Path, write_run: Callable[..., Path]) -> WriteSweep:
    """`write_sweep(words, {cell name: top-1 of each epoch})`; a cell that is left out has not started."""

    def write(words: list[str], top1: dict[str, list[float]], ema: float | None = None) -> Path:
        cells = sweep_cells(words)
        folder = tmp_path / "my_sweep"
        assert set(top1) <= {cell.name for cell in cells}
        write_manifest(folder, Manifest(sorted(cells[0].values), cells))
        for name, values in top1.items():
            averaged = None if ema is None else [value + ema for value in values]
            run = write_run(name, top1=values, top1_ema=averaged, steps=5)
            config = (run / "config.yaml").read_text().replace("epochs: 20", f"epochs: {CONFIGURED_EPOCHS}")
            (run / "config.yaml").write_text(config)
            shutil.move(run, folder / name)
        return folder

    return write


def cells_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def colours_of(picture: Path) -> set[str]:
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(maxcolors=image.width * image.height)
    return {"#" + bytes(colour).hex().upper() for _, colour in colours}


def test_seeds_are_averaged_and_their_spread_is_told(write_sweep: WriteSweep) -> None:
    folder = write_sweep(
        ["model.drop_path_rate=0.1,0", "seed=0,1"],
        {
            "drop_path_rate=0,seed=0": [50.0, 70.0, 60.0],
            "drop_path_rate=0,seed=1": [50.0, 74.0, 62.0],
            "drop_path_rate=0.1,seed=0": [50.0, 60.0, 71.0],
            "drop_path_rate=0.1,seed=1": [50.0, 60.0, 71.0],
        },
    )
    table, (md, numbers, _) = write_sweep_report(folder)
    assert cells_of(table)[0] == ["model.drop_path_rate", "seeds", "best val/top1", "last val/top1", "epochs", "state"]
    assert cells_of(table)[2:] == [
        ["0", "2", "**72.00 ± 2.83**", "61.00 ± 1.41", "3/3", "finished"],
        ["0.1", "2", "71.00 ± 0.00", "71.00 ± 0.00", "3/3", "finished"],
    ]
    assert table in md.read_text()
    assert "standard deviation over seeds" in md.read_text()
    (first, _) = csv.DictReader(numbers.read_text().splitlines())
    assert first["model.drop_path_rate"] == "0"
    assert float(first["best val/top1 mean"]) == 72.0
    assert float(first["best val/top1 std"]) == pytest.approx(np.std([70, 74], ddof=1))
    assert (first["runs"], first["runs finished"]) == ("2", "2")


def test_an_unfinished_run_does_not_pull_its_finished_sisters_mean(write_sweep: WriteSweep) -> None:
    folder = write_sweep(
        ["model.drop_path_rate=0,0.1,0.2", "seed=0,1"],
        {
            "drop_path_rate=0,seed=0": [50.0, 70.0, 80.0],
            "drop_path_rate=0,seed=1": [10.0],
            "drop_path_rate=0.1,seed=0": [40.0, 50.0],
        },
    )
    table, _ = write_sweep_report(folder)
    assert cells_of(table)[2:] == [
        ["0", "1", "**80.00**", "80.00", "1–3/3", "1 of 2 finished"],
        ["0.1", "2", "50.00", "50.00", "0–2/3", "0 of 2 finished"],
        ["0.2", "2", "–", "–", "–", "not started"],
    ]


def test_a_sweep_in_which_nothing_has_happened_has_a_report(write_sweep: WriteSweep) -> None:
    table, paths = write_sweep_report(write_sweep(["seed=0,1"], {}))
    assert cells_of(table)[2] == ["2", "–", "–", "–", "not started"]
    assert all(path.is_file() for path in paths)


def test_a_run_in_its_first_epoch_is_unfinished(write_sweep: WriteSweep) -> None:
    folder = write_sweep(["seed=0,1"], {"seed=1": []})
    results = [read_result(folder, cell) for cell in read_manifest(folder).cells]
    assert [(one.state, one.progress) for one in results] == [("not started", "–"), ("unfinished", "0/3")]


def test_numbers_are_sorted_by_size_and_words_come_after_them(write_sweep: WriteSweep) -> None:
    folder = write_sweep(["optim.base_lr=1e-3,null,2e-4,10"], {})
    rows = group(read_manifest(folder), [read_result(folder, cell) for cell in read_manifest(folder).cells])
    assert [row.values["optim.base_lr"] for row in rows] == ["2e-4", "1e-3", "10", "null"]
    assert best_row(rows, "val/top1") is None


def test_averaged_weights_have_columns_and_a_panel_of_their_own(write_sweep: WriteSweep) -> None:
    words = ["model.drop_path_rate=0,0.1"]
    plain = write_sweep(words, {"drop_path_rate=0": [1.0, 2.0, 3.0]})
    with Image.open(write_sweep_report(plain)[1][2]) as image:
        width = image.width
    shutil.rmtree(plain)
    table, (_, _, picture) = write_sweep_report(write_sweep(words, {"drop_path_rate=0": [1.0, 2.0, 3.0]}, ema=5.0))
    assert cells_of(table)[0][3:5] == ["best val/top1_ema", "last val/top1_ema"]
    assert cells_of(table)[2][3] == "**8.00**"
    with Image.open(picture) as image:
        assert image.width == 2 * width


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.drop_path_rate=0,0.1,0.2"], {BLUE}),
        (["model.drop_path_rate=0,0.1", "optim.base_lr=1e-4,1e-3,1e-2"], {BLUE, ORANGE}),
        (["model=fat_b0,fat_b1,fat_b2", "augment=deit,light,none"], {BLUE, ORANGE, GREEN}),
        (["seed=0,1,2"], {BLUE}),
        (["model.drop_path_rate=choice(0.1)"], {BLUE}),
        (["schedule.epochs=range(1,31)"], {BLUE}),
    ],
    ids=["numbers", "two keys", "words", "seeds alone", "one value", "many values"],
)
def test_one_line_is_drawn_for_each_value_of_the_other_keys(
    words: list[str], expected: set[str], write_sweep: WriteSweep
) -> None:
    names = [cell.name for cell in sweep_cells(words)]
    folder = write_sweep(words, {name: [10.0, 20.0, 30.0 + at] for at, name in enumerate(names)})
    assert colours_of(write_sweep_report(folder)[1][2]) & {BLUE, ORANGE, GREEN} == expected


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [
        ([1e-4, 1e-3, 1e-2], True),
        ([1e-4, 3e-4, 1e-3], True),
        ([0, 1e-3, 1e-2], False),
        ([1, 5, 10], False),
        ([1], False),
    ],
)
def test_the_axis_is_logarithmic_where_that_spreads_the_values_evenly(values: list[float], logarithmic: bool) -> None:
    assert _is_logarithmic(np.array(values, dtype=float)) == logarithmic


def test_the_command_prints_the_table_and_wants_exactly_one_folder(
    write_sweep: WriteSweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sweep(["seed=0,1"], {"seed=0": [1.0, 2.0, 3.0]})
    assert main(["report", f"sweep={folder}"]) == 0
    printed = capsys.readouterr().out
    assert "| seeds | best val/top1 |" in printed
    assert f"picture        {folder / 'sweep.png'}" in printed
    for words in (["report"], ["report", f"run={folder}", f"sweep={folder}"]):
        assert main(words) == 2
        assert "wants run=<a run's folder> or sweep=<a sweep's folder>" in capsys.readouterr().err
    assert main(["report", f"sweep={tmp_path}"]) == 2
    assert "holds no sweep.yaml" in capsys.readouterr().err
