"""Every yaml under conf/model keeps what its header says; a new file is found by itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fat_train import create_model, list_models
from fat_train.config.zoo import facts_of, load_model_node

DOCUMENTED = [name for name in list_models() if facts_of(name).paper_params_m is not None]


@pytest.mark.parametrize("name", list_models())
def test_a_model_has_the_parameters_and_multiply_adds_of_its_header(name):
    with torch.device("meta"):
        model = create_model(name).eval()
        images = torch.empty(1, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    stated = facts_of(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == stated.parameters
    assert counter.get_total_flops() / 2e9 == pytest.approx(stated.macs_g, abs=5e-4)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_counts_round_to_the_documents(name):
    stated = facts_of(name)
    if stated.params_differ_percent is None:
        assert not stated.differs
    else:
        differ = abs(stated.parameters / 1e6 / float(stated.paper_params_m) - 1) * 100
        assert differ <= stated.params_differ_percent
        assert stated.differ_because, "below params_differ_percent its header says why"
    # Papers name no counting rule; attention's products and the rest of the rules differ by less than a tenth.
    if stated.paper_macs_g is not None:
        assert math.isclose(stated.macs_g, stated.paper_macs_g, rel_tol=0.1)
    assert 0 < stated.paper_top1 < 100


@pytest.mark.parametrize("name", list_models())
def test_a_model_is_named_as_its_file(name):
    assert load_model_node(name).name == name
