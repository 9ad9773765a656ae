"""`benchmark model` gives every contestant a rate, or says why it has none."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fat_train.__main__ import main
from fat_train.command.benchmark_model import published_top1
from fat_train.config.resolve import resolve
from fat_train.config.zoo import load_model_node


def _words(out: Path, *others: str) -> list[str]:
    small = ["model=fat_nano", "image_px=32", "batch_size=4", "rounds=2", "seconds=0.05", "device=cpu", f"out={out}"]
    return ["benchmark", "model", *small, *others]


@pytest.mark.slow  # six processes that import torch, one after another
def test_every_contestant_and_peer_has_a_rate_beside_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "speed.json"
    words = _words(out, "contestants=[reference,ours]", "modes=[latency]", "peers=[regnety_002]")
    assert main(words) == 0
    assert "fat_nano latency of one image: " in capsys.readouterr().out
    kept = json.loads(out.read_text())
    names = [("fat_nano", "reference"), ("fat_nano", "ours"), ("regnety_002", "peer")]
    assert [(one["model"], one["contestant"]) for one in kept["results"]] == names
    for one in kept["results"]:
        assert one["why_not"] == ""
        assert len(one["rates"]) == 2
        assert one["samples_per_s"] > 0
        assert one["ratio_to_reference"] > 0
        assert (one["mode"], one["batch_size"]) == ("latency", 1)
    assert min(kept["device"].values()) > 0
    with out.with_suffix(".csv").open() as file:
        assert [(line["model"], line["contestant"]) for line in csv.DictReader(file)] == names
    assert out.with_suffix(".md").read_text().count("| latency | ") == 3
    assert [path.name for path in out.parent.glob("*.png")] == ["speed_speed.png"]


@pytest.mark.slow  # five processes that import torch, one after another
def test_a_model_of_another_family_is_timed_without_a_plain_reference(
    tmp_path: Path, second_family: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speed.json"
    words = [word for word in _words(out) if word != "model=fat_nano"]
    assert main([*words, *second_family, "modes=[infer]"]) == 0
    said = capsys.readouterr().out
    assert "reference: left out of plainnet; the plain equations are written for FAT alone" in said
    kept = json.loads(out.read_text())["results"]
    assert [one["contestant"] for one in kept if not one["why_not"]][:2] == ["ours", "ours_folded"]
    assert {one["reference"] for one in kept} == {"plainnet ours"}
    assert kept[0]["ratio_to_reference"] == 1
    assert kept[0]["gmacs_per_s"] > 0


def test_the_plain_reference_is_not_to_be_had_of_another_family(
    second_family: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", "model", *second_family, "contestants=[reference,ours]"]) == 2
    said = capsys.readouterr().err
    assert (
        "contestants=reference: the plain equations are written for FAT alone; leave out reference, or plainnet" in said
    )


@pytest.mark.slow  # fifteen processes that import torch, one after another
def test_scaling_follows_batch_resolution_and_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    assert main(_words(out, "contestants=[ours]", "modes=[infer]", "scaling=true")) == 0
    assert "fat_nano ours: the time of a step grows as pixels^" in capsys.readouterr().out
    grown = {one["axis"]: one for one in json.loads(out.read_text())["scaling"]}
    assert grown["batch"]["sizes"] == [1, 2, 4]
    assert grown["blocks"]["sizes"] == [5, 10, 15, 20]
    assert grown["pixels"]["sizes"] == [32**2, 48**2, 64**2, 80**2]
    assert all(min(one["step_ms"]) > 0 for one in grown.values())
    assert (tmp_path / "speed_scaling.png").is_file()


def test_the_published_top1_is_that_of_the_paper_and_of_no_changed_model() -> None:
    node = load_model_node("fat_b0")
    assert published_top1(resolve(node, where="model")) == 77.6
    node.depths = [1, 1, 1, 1]
    assert published_top1(resolve(node, where="model")) is None
    assert published_top1(resolve(load_model_node("fat_nano"), where="model")) is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model=fat_b9"], "model=fat_b9: no such choice; did you mean fat_b"),
        (["models=[fat_b0,fat_bb]"], "unknown model fat_bb; did you mean fat_b"),
        (["contestants=[our]"], "contestants=our is not known; did you mean ours?"),
        (["contestants=[ours,ours]"], "contestants must name at least one, and none twice"),
        (["contestants=[ours_folded]"], "a folded model only evaluates; give modes=[infer] or add ours"),
        (["modes=[training]"], "modes=training is not known; did you mean train?"),
        (["peers=[deit_small_patch16]"], "did you mean deit_small_patch16_224?"),
        (["peers=al"], "peers=al is not a model of timm; did you mean all?"),
        (["image_px=16"], "image_px must be at least 32"),
        (["batch_size=0"], "batch_size must be at least 1; got 0"),
        (["seconds=0"], "seconds must be positive"),
        (["precision=fp16"], "precision=fp16 is not known"),
        (["device=cpu", "precision=16-mixed"], "precision=16-mixed needs a GPU"),
        (["compile=fast"], "compile=fast is not known"),
        (["batchsize=2"], "unknown key batchsize; did you mean batch_size?"),
        (["model.widths=[8]"], "model.widths must be 4 numbers"),
        (["out=speed.txt"], "out=speed.txt must be a file that ends in .json"),
    ],
)
def test_a_wrong_word_is_one_message(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "model", *words]) == 2
    assert expected in capsys.readouterr().err
