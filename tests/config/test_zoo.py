"""Models by name, through fat_train and through timm."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

import fat_train
from fat_train.config import zoo
from fat_train.types import MissingPathError, UserError


def test_the_papers_models_and_ours_are_listed():
    assert set(fat_train.list_models()) >= {"fat_b0", "fat_b1", "fat_b2", "fat_b3", "fat_b3_st", "fat_nano"}
    assert fat_train.list_models("fat_b3*") == ["fat_b3", "fat_b3_st"]
    assert fat_train.list_models("nothing*") == []


def test_the_package_says_its_version():
    assert fat_train.__version__[0].isdigit()


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown model fat_b00; did you mean fat_b0\?"):
        fat_train.create_model("fat_b00")


def test_pretrained_is_refused_with_the_way_to_load_own_weights():
    with pytest.raises(UserError, match=r"no weights are published for fat_nano.*checkpoint_path"):
        fat_train.create_model("fat_nano", pretrained=True)
    with pytest.raises(UserError, match="no weights are published"):
        timm.create_model("fat_nano", pretrained=True)


def test_arguments_reach_the_model():
    model = fat_train.create_model("fat_nano", num_classes=7, in_chans=1, drop_path_rate=0.3)
    assert model.num_classes == 7
    assert model.eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 7)
    assert model.layers[3].blocks[0].drop_path.drop_prob == pytest.approx(0.3)
    assert fat_train.create_model("fat_nano").num_classes == 1000


def test_fields_of_the_config_can_be_overridden_one_by_one():
    model = fat_train.create_model("fat_nano", num_classes=10, interaction={"gate": "paper"}, depths=(1, 1, 1, 1))
    assert model.layers[0].blocks[0].attn.gate == "paper"
    assert len(model.layers[2].blocks) == 1
    assert model.config.widths == [16, 32, 48, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop_path": 0.1}, "unknown key model.drop_path; did you mean drop_path_rate?"),
        ({"drop_path_rate": 1.5}, "model.drop_path_rate must be in"),
        ({"interaction": {"gate": "none"}}, "model.interaction.gate must be one of released, paper; got none"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"in_chans": 0}, "in_chans must be at least 1"),
        ({"out_indices": (0, 1)}, "set features_only=True"),
    ],
)
def test_a_wrong_argument_is_refused_by_its_name(arguments, message):
    with pytest.raises(UserError, match=message):
        fat_train.create_model("fat_nano", **arguments)


@pytest.mark.parametrize("create", [fat_train.create_model, timm.create_model], ids=["fat_train", "timm"])
@pytest.mark.parametrize(("out_indices", "kept"), [(None, [0, 1, 2, 3]), ((1, 3), [1, 3]), ((0, 1), [0, 1])])
def test_features_only_gives_the_maps_that_its_feature_info_states(create, out_indices, kept):
    model = create("fat_nano", features_only=True, out_indices=out_indices).eval()
    maps = model(torch.zeros(2, 3, 64, 128))
    assert model.feature_info.reduction() == [[4, 8, 16, 32][index] for index in kept]
    assert model.feature_info.channels() == [[16, 32, 48, 64][index] for index in kept]
    shapes = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    assert [tuple(level.shape) for level in maps] == [(2, chans, 64 // step, 128 // step) for chans, step in shapes]


def test_timms_hooks_find_the_same_maps():
    torch.manual_seed(0)
    getter = timm.create_model("fat_nano", features_only=True).eval()
    hooks = timm.create_model("fat_nano", features_only=True, feature_cls="hook").eval()
    hooks.body.load_state_dict(getter.model.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    assert all(map(torch.equal, hooks(x), getter(x)))


def test_timm_knows_every_model():
    assert set(timm.list_models("fat_*")) == set(fat_train.list_models("fat_*"))
    model = timm.create_model("fat_nano", num_classes=10, drop_path_rate=0.1, drop_rate=0.0, global_pool="avg")
    assert model.num_classes == 10
    assert model.layers[3].blocks[0].drop_path.drop_prob == pytest.approx(0.1)
    assert type(model) is type(fat_train.create_model("fat_nano"))
    headless = timm.create_model("fat_nano", num_classes=0, global_pool="").eval()
    assert headless(torch.zeros(1, 3, 64, 64)).shape == (1, 64, 2, 2)


def test_timm_is_told_what_pictures_the_model_expects():
    data = resolve_model_data_config(timm.create_model("fat_nano"))
    assert data["input_size"] == (3, 224, 224)
    assert data["crop_pct"] == 0.875
    assert data["interpolation"] == "bicubic"
    assert data["mean"] == (0.485, 0.456, 0.406)
    assert data["std"] == (0.229, 0.224, 0.225)
    model = timm.create_model("fat_nano", pretrained_cfg_overlay={"crop_pct": 1.0})
    assert resolve_model_data_config(model)["crop_pct"] == 1.0
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()


def test_a_dropout_that_the_model_has_not_is_refused():
    with pytest.raises(UserError, match=r"leave out drop_rate; got 0\.2"):
        timm.create_model("fat_nano", drop_rate=0.2)


def test_a_checkpoint_brings_its_number_of_classes_and_its_weights(tmp_path):
    torch.manual_seed(0)
    trained = fat_train.create_model("fat_nano", num_classes=7).eval()
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    x = torch.randn(1, 3, 64, 64)

    loaded = fat_train.create_model("fat_nano", checkpoint_path=tmp_path / "trained.pth").eval()
    assert loaded.num_classes == 7
    assert torch.equal(loaded(x), trained(x))
    extractor = fat_train.create_model("fat_nano", features_only=True, checkpoint_path=tmp_path / "trained.pth").eval()
    assert all(map(torch.equal, extractor(x), trained.pyramid(x).maps))
    with pytest.raises(UserError, match="checkpoint has 7 classes, model 10"):
        fat_train.create_model("fat_nano", num_classes=10, checkpoint_path=tmp_path / "trained.pth")


def test_the_configs_of_an_installed_package_come_first(tmp_path, monkeypatch):
    package = tmp_path / "src" / "fat_train"
    (tmp_path / "conf" / "model").mkdir(parents=True)
    monkeypatch.setattr(zoo, "__file__", str(package / "config" / "zoo.py"))
    assert zoo.conf_dir() == tmp_path / "conf"
    (package / "conf" / "model").mkdir(parents=True)
    assert zoo.conf_dir() == package / "conf"


def test_an_installation_without_configs_says_so(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "src" / "fat_train" / "config" / "zoo.py"))
    with pytest.raises(MissingPathError, match="the folder conf/ is neither in"):
        zoo.list_models()
