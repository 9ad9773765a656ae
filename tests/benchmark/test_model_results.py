"""Ratios, shares, exponents and sentences of networks side by side, and the pictures of them."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from fat_train.benchmark.model import ModelJob
from fat_train.benchmark.model_cost import DeviceRates
from fat_train.benchmark.model_heats import heats_of, scaling_heats
from fat_train.benchmark.model_plot import draw_accuracy, draw_growth, draw_speed
from fat_train.benchmark.model_result import Result, growths_of
from fat_train.benchmark.model_table import as_csv, bases, exceptions, markdown, terminal_tables, verdicts
from fat_train.benchmark.peers import Peer
from fat_train.benchmark.race import Outcome
from fat_train.model.fat import FATConfig
from second_family import PlainNetConfig

CONFIG = FATConfig(name="fat_x", widths=[8, 12, 16, 24], depths=[1, 1, 2, 1], num_heads=[2, 3, 4, 6])
JOB = ModelJob(
    contestant="ours",
    name="fat_x",
    config=CONFIG,
    mode="train",
    batch_size=8,
    image_px=224,
    precision="32",
    device="cpu",
    compile_mode="default",
)
DEVICE = DeviceRates(flops_per_s=2e9, bytes_per_s=1e9)


def outcome(rates: list[float], **facts: Any) -> Outcome:
    known = {"batch_size": 8, "flops_per_step": 1e8, "bytes_per_step": 2e8, "gmacs": 0.5, "parameters": 2_000_000}
    return Outcome("", rates, {**known, "peak_memory_mib": 300.0, "cold_start_s": 1.5, **facts})


REFERENCE = replace(outcome([10.0, 20.0, 10.0]), name="fat_x reference")
RESULTS = [
    Result(replace(JOB, contestant="reference"), REFERENCE, REFERENCE, 77.6),
    Result(JOB, outcome([20.0, 20.0, 40.0]), REFERENCE, 77.6),
    Result(replace(JOB, contestant="ours_compiled"), outcome([30.0] * 3, batch_size=2), REFERENCE, 77.6),
    Result(replace(JOB, contestant="peer", name="slow", config=None), outcome([5.0] * 3), REFERENCE, 79.0),
    Result(replace(JOB, contestant="peer", name="weak", config=None), outcome([90.0] * 3), REFERENCE, 71.0),
    Result(replace(JOB, contestant="peer", name="gone", config=None), Outcome("", why_not="it died"), REFERENCE, 80.0),
]


def test_a_result_is_a_median_over_rounds_and_a_share_of_what_the_device_allows() -> None:
    ours = RESULTS[1]
    assert ours.ratio == 2.0  # of 2, 1 and 4: the median of ratios, where the ratio of medians would be 2 by chance
    assert ours.ratio_span == (1.0, 4.0)
    assert ours.step_ms == 400.0
    assert ours.gmacs_per_s == pytest.approx(0.05 / 0.4)
    assert ours.base == "the plain reference"
    assert ours.share(DEVICE) == pytest.approx(0.2 / 0.4)  # 2e8 bytes at 1e9 a second, and less time to compute
    assert math.isnan(RESULTS[-1].share(DEVICE))
    assert RESULTS[-1].as_dict(DEVICE)["ratio_to_reference"] is None


def test_sentences_name_the_fastest_of_ours_and_who_is_better_in_both() -> None:
    ours, peers = verdicts(RESULTS)
    assert ours == "fat_x training: 3.00 x the plain reference (ours_compiled; 1.50 to 3.00 in single rounds)"
    assert peers == "fat_x training: of 2 peers none is both as fast and as accurate (77.6 % top-1)"
    better = Result(replace(JOB, contestant="peer", name="best", config=None), outcome([99.0] * 3), REFERENCE, 80.0)
    assert "of 3 peers best is both" in verdicts([*RESULTS, better])[1]
    assert verdicts(RESULTS[3:]) == []


OTHER = PlainNetConfig()
BASE = replace(outcome([20.0, 40.0, 20.0]), name="fat_x ours")
LARGE = replace(CONFIG, name="fat_y")
OF_TWO_FAMILIES = [
    Result(JOB, BASE, BASE, None),
    Result(replace(JOB, name="fat_y", config=LARGE), outcome([2.0, 4.0, 2.0], gmacs=5.0), BASE, None),
    Result(
        replace(JOB, name="plainnet", config=OTHER),
        outcome([60.0, 120.0, 60.0], gmacs=0.25, flops_per_step=5e7),
        BASE,
        None,
    ),
]


def test_a_multiply_add_of_another_family_is_set_beside_one_of_the_fat_with_as_many() -> None:
    assert bases(OF_TWO_FAMILIES) == ["fat_x ours"]
    smaller, other, each = verdicts(OF_TWO_FAMILIES)
    assert smaller == "fat_y training: 0.10 x fat_x ours (ours; 0.10 to 0.10 in single rounds)"
    assert other == "plainnet training: 3.00 x fat_x ours (ours; 3.00 to 3.00 in single rounds)"
    assert each == "plainnet training: 0.67 x fat_x's time at equal multiply-adds (ours)"  # half of them, in a third
    slow = replace(OF_TWO_FAMILIES[2], outcome=replace(OF_TWO_FAMILIES[2].outcome, rates=[60.0, 60.0, 60.0]))
    assert "plainnet training: 0.67 x fat_x's" in verdicts([*OF_TWO_FAMILIES[:2], slow])[2], "of 3, 1.5 and 3"
    folded = replace(OF_TWO_FAMILIES[2], job=replace(OF_TWO_FAMILIES[2].job, contestant="ours_folded"))
    assert verdicts([*OF_TWO_FAMILIES[:2], folded])[2].endswith("(ours_folded beside ours)")
    assert not any("multiply-adds" in line for line in verdicts(OF_TWO_FAMILIES[2:]))


def test_tables_say_what_they_divide_by() -> None:
    for results, words in ((OF_TWO_FAMILIES, "fat_x ours"), (RESULTS, "the plain reference")):
        console = Console(file=io.StringIO(), width=120)
        console.print(*terminal_tables(results, DEVICE))
        assert f"Training (x ref: over {words})" in console.file.getvalue()  # type: ignore[attr-defined]
        assert f"- x ref: over {words}\n" in markdown(results, DEVICE, [])
        assert results[1].as_dict(DEVICE)["reference"] == words
    assert "| 3.00 | 0.2 |" in markdown(OF_TWO_FAMILIES, DEVICE, []), "0.025 GMAC in 8 / 60 s"


def test_a_smaller_batch_a_failure_and_a_floor_that_was_beaten_are_said() -> None:
    floor, halved, failed = exceptions(RESULTS, DEVICE)
    assert floor.startswith("floor: over 100 %")  # of "weak", whose 8 images took 89 of 200 ms
    assert halved == "fat_x ours_compiled, training: no memory for a batch of 8, timed with 2"
    assert failed == "gone, training: not timed: it died"
    assert exceptions(RESULTS[:2], DEVICE) == []


def test_tables_hold_every_result_and_csv_has_timms_columns() -> None:
    console = Console(file=io.StringIO(), width=120)
    for table in terminal_tables(RESULTS, DEVICE):
        console.print(table)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    text = markdown(RESULTS, DEVICE, ["machine: one"])
    for result in RESULTS:
        assert result.who in printed
        assert f"| {result.job.name} | {result.job.contestant} |" in text
    assert "| 2 (of 8) |" in text
    (reference, ours, *_) = csv.DictReader(io.StringIO(as_csv(RESULTS)))
    assert ours["train_samples_per_sec"] == "20.0"
    assert (ours["train_step_time"], ours["train_batch_size"], ours["train_img_size"]) == ("400.0", "8", "224")
    assert (ours["infer_gmacs"], ours["param_count"]) == ("0.5", "2.0")
    assert reference["contestant"] == "reference"


def grown(axis: str, exponent: float) -> list[Result]:
    jobs = scaling_heats(replace(JOB, batch_size=32), CONFIG, ["ours"])[axis]
    results = []
    for job in jobs:
        size = {"batch": job.batch_size, "pixels": job.image_px**2, "blocks": sum(job.config.depths)}[axis]
        rate = job.batch_size / size**exponent
        results.append(Result(job, outcome([rate, 2 * rate, 3 * rate], batch_size=job.batch_size), None, None))
    return results


@pytest.mark.parametrize("axis", ["batch", "pixels", "blocks"])
@pytest.mark.parametrize(("exponent", "verdict"), [(0.8, "better than"), (1.01, "linear"), (1.4, "worse than")])
def test_the_exponent_of_a_power_law_is_found_whatever_a_round_was_slowed_by(axis, exponent, verdict) -> None:
    (growth,) = growths_of(axis, grown(axis, exponent))
    assert growth.exponent == pytest.approx(exponent)
    assert growth.verdict.startswith(verdict)
    assert f"{axis}^{exponent:.2f}" in growth.line()


def test_sizes_that_did_not_fit_are_left_out_of_the_exponent() -> None:
    results = grown("batch", 0.5)
    results[-1] = replace(results[-1], outcome=outcome([1.0] * 3, batch_size=1))
    (growth,) = growths_of("batch", results)
    assert growth.exponent == pytest.approx(0.5)
    assert len(growth.sizes) == len(results) - 1
    (growth,) = growths_of("batch", results[:2])
    assert "too few sizes of batch" in growth.line()


def test_heats_have_the_reference_in_each_and_count_it_once() -> None:
    peers = {f"peer{number}": Peer(256, 75.0) for number in range(6)}
    heats = heats_of(JOB, [CONFIG], ["reference", "ours", "ours_folded"], ["train", "latency"], peers)
    train, few, rest, latency = heats[:4]
    assert [job.contestant for job in train.jobs] == ["reference", "ours"]
    assert [job.contestant for job in latency.jobs] == ["reference", "ours", "ours_folded"]
    assert {job.batch_size for job in latency.jobs} == {1}
    assert [len(heat.jobs) for heat in (few, rest)] == [5, 3]
    assert all(heat.reference is heat.jobs[0] for heat in heats)
    assert [heat.counts_reference for heat in heats[:3]] == [True, False, False]
    assert {job.image_px for job in few.jobs[1:]} == {256}


def test_without_a_plain_reference_of_each_model_all_are_divided_by_the_first_ones_ours() -> None:
    forms = ["reference", "ours", "ours_compiled"]
    peers = {"peer": Peer(None, None)}
    fat, other, peer = heats_of(JOB, [CONFIG, OTHER], forms, ["train"], peers)
    assert [(job.name, job.contestant) for job in fat.jobs] == [("fat_x", form) for form in forms]
    assert [(job.name, job.contestant) for job in other.jobs] == [
        ("fat_x", "ours"),
        *(("plainnet", f) for f in forms[1:]),
    ]
    assert [job.name for job in peer.jobs] == ["fat_x", "peer"]
    assert fat.reference is fat.jobs[1]
    assert other.reference == peer.reference == fat.reference
    assert [heat.counts_reference for heat in (fat, other, peer)] == [True, False, False]
    assert [heat.asks_device for heat in (fat, other, peer)] == [True, False, False]
    (alone,) = heats_of(JOB, [OTHER], forms, ["train"], {})
    assert [job.contestant for job in alone.jobs] == forms[1:]
    assert (alone.reference, alone.counts_reference) == (alone.jobs[0], True)
    grown = scaling_heats(replace(JOB, batch_size=32), OTHER, ["ours"])["blocks"]
    assert [sum(job.config.depths) for job in grown] == [4, 8, 12, 16]


def test_pictures_hold_a_panel_a_mode_and_need_a_published_number_for_the_first(tmp_path: Path) -> None:
    infer = [replace(result, job=replace(result.job, mode="infer")) for result in RESULTS]
    both = draw_accuracy([*RESULTS, *infer], "title", tmp_path / "accuracy.png")
    assert both is not None
    assert imread(both).shape[1] == 1650
    assert np.ptp(imread(both)) > 0.5
    assert draw_accuracy([replace(result, top1=None) for result in RESULTS], "", tmp_path / "none.png") is None
    assert imread(draw_speed(RESULTS, "title", tmp_path / "speed.png")).shape[1] == 825
    growths = {axis: growths_of(axis, grown(axis, 0.9)) for axis in ("batch", "pixels", "blocks")}
    assert imread(draw_growth(growths, "title", tmp_path / "scaling.png")).shape[1] == 2475
