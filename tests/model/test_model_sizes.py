"""Every yaml under conf/model keeps what its header says; a new file is found by itself."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fat_train import create_model, list_models
from fat_train.config.zoo import conf_dir, load_model_node


def header(name: str) -> dict[str, float]:
    text = (conf_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    return {key: float(value) for key, value in re.findall(r"^# (\w+): ([\d.]+)$", text, flags=re.MULTILINE)}


@pytest.mark.parametrize("name", list_models())
def test_a_model_has_the_parameters_and_multiply_adds_of_its_header(name):
    with torch.device("meta"):
        model = create_model(name).eval()
        images = torch.empty(1, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    stated = header(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == stated["parameters"]
    assert counter.get_total_flops() / 2e9 == pytest.approx(stated["macs_g"], abs=5e-4)


@pytest.mark.parametrize("name", [name for name in list_models() if "paper_params_m" in header(name)])
def test_the_counts_round_to_the_documents(name):
    stated = header(name)
    digits = 1 if stated["paper_params_m"] % 1 else 0
    if "params_differ_percent" in stated:  # the header says why, and the family's docstring
        differ = abs(stated["parameters"] / 1e6 / stated["paper_params_m"] - 1) * 100
        assert differ <= stated["params_differ_percent"]
    else:
        assert round(stated["parameters"] / 1e6, digits) == stated["paper_params_m"]
    # Papers name no counting rule; attention's products and the rest of the rules differ by less than a tenth.
    if "paper_macs_g" in stated:
        assert math.isclose(stated["macs_g"], stated["paper_macs_g"], rel_tol=0.1)
    assert 0 < stated["paper_top1"] < 100


@pytest.mark.parametrize("name", list_models())
def test_a_model_is_named_as_its_file(name):
    assert load_model_node(name).name == name
