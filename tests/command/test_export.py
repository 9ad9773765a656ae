"""A trained model leaves as one file: torch or ONNX Runtime alone give its logits, or there is no file."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fat_train import create_model, list_models, load_weights
from fat_train.__main__ import main
from fat_train.command import export
from fat_train.op.choice import OpConfig
from fat_train.op.native.library import library
from fat_train.types import UserError

Call = Callable[[Tensor], Tensor]
WORDS = ["trainer.accelerator=cpu", "schedule.epochs=1", "optim.base_lr=1e-2", "optim.lr_per_images=8"]
SAID = ("checkpoint ", "input ", "    ", "output ", "file ", "check ")


def train(folder: Path, tiny: list[str], *words: str) -> Path:
    """A checkpoint of four classes, with a moving average that is not the weights."""
    assert main([*tiny, *WORDS, "callback.ema.decay=0.5", "name=tiny", f"folder={folder}", *words]) == 0
    return folder / "tiny" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    return train(tmp_path_factory.mktemp("runs"), tiny)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A file of before, in a folder of its own."""
    file = tmp_path / "model.pt2"
    file.write_text("of before")
    return file


def assert_as_before(out: Path) -> None:
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert out.read_text() == "of before"


def images(batch: int, px: int = 32) -> Tensor:
    return torch.randn(batch, 3, px, px, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def logits(checkpoint: Path, x: Tensor, which: str = "raw", name: str = "fat_nano") -> Tensor:
    """The model's own, as it was trained."""
    model = create_model(name, num_classes=4).eval()
    load_weights(model, checkpoint, which=which)
    return model(x)


def write(checkpoint: Path, out: Path, *words: str) -> int:
    return main(["export", f"checkpoint={checkpoint}", f"out={out}", *words])


def load_pt2(file: Path) -> tuple[Call, dict]:
    extra = {export.ABOUT_FILE: ""}
    return torch.export.load(file, extra_files=extra).module(), json.loads(extra[export.ABOUT_FILE])


def load_onnx(file: Path) -> tuple[Call, dict]:
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    about = {key: _value(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    assert (given.name, given.shape[0], made.name, made.shape) == ("images", "batch", "logits", ["batch", 4])
    return lambda x: torch.from_numpy(session.run([made.name], {given.name: x.numpy()})[0]), about


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def need_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def assert_the_models_logits(
    call: Call, checkpoint: Path, which: str = "raw", name: str = "fat_nano", px: int = 32
) -> None:
    for batch in (1, 2, 5):
        x = images(batch, px)
        torch.testing.assert_close(call(x), logits(checkpoint, x, which, name), rtol=1e-4, atol=1e-5)


def assert_names_no_place(file: Path) -> None:
    """torch writes beside each operation where in the code it stands, unless it is stopped."""
    assert str(Path(export.__file__).parents[1]).encode() not in file.read_bytes()


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the average, in a folder that was not there."""
    file = tmp_path_factory.mktemp("exported") / "new" / "model.pt2"
    assert write(checkpoint, file, "weights=ema") == 0
    return file


@pytest.mark.compile
def test_torchs_file_has_the_models_logits_for_any_batch_and_memory_format(checkpoint, exported):
    call, about = load_pt2(exported)
    assert_the_models_logits(call, checkpoint, which="ema")
    x = images(3)
    torch.testing.assert_close(call(x.to(memory_format=torch.channels_last)), call(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(call(x), logits(checkpoint, x, "raw"), rtol=1e-3)
    assert about["classes"] == [f"class_{number:05d}" for number in range(4)]
    assert (about["model"], about["weights"], about["image_px"], about["resize_px"]) == ("fat_nano", "ema", 32, 32)
    assert about["mean"] == [0.485, 0.456, 0.406]
    assert [path.name for path in exported.parent.iterdir()] == ["model.pt2"]
    assert_names_no_place(exported)


@pytest.mark.compile
def test_onnx_runtime_has_the_models_logits_for_any_batch(checkpoint, tmp_path, capfd):
    need_onnx()
    file = tmp_path / "model.onnx"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert write(checkpoint, file) == 0
    printed = capfd.readouterr()
    assert [str(warning.message) for warning in warned] == []
    assert printed.err == ""
    assert [line for line in printed.out.splitlines() if not line.startswith(SAID)] == []
    call, about = load_onnx(file)
    assert_the_models_logits(call, checkpoint)
    assert about["classes"] == [f"class_{number:05d}" for number in range(4)]
    assert (about["model"], about["image_px"], about["std"]) == ("fat_nano", 32, [0.229, 0.224, 0.225])
    assert f"ONNX opset {about['opset']}" in printed.out
    assert_names_no_place(file)


@pytest.mark.slow
@pytest.mark.compile
def test_batch_norms_another_size_and_one_image_at_a_time_are_a_choice(checkpoint, tmp_path):
    file = tmp_path / "model.pt2"
    assert write(checkpoint, file, "reparameterize=false", "image_px=40", "dynamic_batch=false") == 0
    assert any("batch_norm" in str(node.target) for node in torch.export.load(file).graph.nodes)
    call, about = load_pt2(file)
    x = images(1, px=40)
    torch.testing.assert_close(call(x), logits(checkpoint, x), rtol=1e-4, atol=1e-5)
    assert (about["weights"], about["reparameterized"], about["image_px"]) == ("raw", False, 40)
    for wrong in (images(2, px=40), images(1, px=32)):
        with pytest.raises(Exception, match=r"shape|size"):
            call(wrong)


@pytest.mark.compile
def test_the_file_runs_where_there_is_no_fat_train(checkpoint, exported, tmp_path):
    script = textwrap.dedent("""
        import sys
        sys.modules["fat_train"] = sys.modules["timm"] = None  # an import of either fails
        import torch
        model = torch.export.load(sys.argv[1]).module()
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        torch.save(model(x), sys.argv[2])
    """)
    words = [sys.executable, "-c", script, str(exported), str(tmp_path / "logits.pt")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, logits(checkpoint, images(2), "ema"), rtol=1e-4, atol=1e-5)


@pytest.mark.compile
@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_file_that_computes_something_else_is_not_kept(wrong, checkpoint, exported, out):
    x = images(3)
    wanted = wrong * logits(checkpoint, x, "ema")
    with pytest.raises(UserError, match=r"model.pt2 was not kept: loaded again it computes something else"):
        export._write(exported.read_bytes(), out, [x], [wanted])
    assert_as_before(out)


@pytest.mark.compile
def test_a_disk_without_room_keeps_the_file_of_before(exported, out):
    """The process may write no file beyond 64 kB; Python hears of it as of any refusal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(UserError, match=rf"cannot write {out}: File too large"):
            export._write(exported.read_bytes(), out, [], [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_as_before(out)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_onnx_the_message_names_what_to_install_before_anything_is_read(package, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to make an import fail
    assert write(tmp_path / "nowhere.ckpt", tmp_path / "model.onnx") == 2
    message = capsys.readouterr().err
    assert package in message
    assert 'pip install "fat_train[onnx]"' in message


@pytest.mark.slow
@pytest.mark.compile
def test_without_onnx_runtime_the_file_is_written_and_not_compared(checkpoint, tmp_path, capsys, monkeypatch):
    need_onnx()
    file = tmp_path / "model.onnx"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        assert write(checkpoint, file) == 0
    assert "check          none: onnxruntime" in capsys.readouterr().out
    assert_the_models_logits(load_onnx(file)[0], checkpoint)


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.skipif(library() is None, reason="no C++ compiler here")
def test_a_model_without_an_onnx_form_is_refused_with_the_operation_that_has_none(
    checkpoint, tmp_path, capsys, monkeypatch
):
    """A kernel of ours is such an operation; the definitions are not."""
    need_onnx()
    monkeypatch.setattr(export, "REFERENCE", OpConfig())
    assert write(checkpoint, tmp_path / "model.onnx") == 2
    message = capsys.readouterr().err
    assert "fat_nano cannot be written as ONNX: torch " in message
    assert "has no ONNX form of its operation fat_train." in message
    assert len(message.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["out=model.pth"],
            "out=model.pth must be a file that ends in .pt2 or .onnx, in a folder that is there or can",
        ),
        (["out=model.pt2", "weigths=ema"], "unknown key weigths; did you mean weights?"),
        (["out=model.pt2", "weights=both"], "weights=both is not known"),
        (["out=model.pt2", "image_px=16"], "image_px must be at least 32, the networks' coarsest stride; got 16"),
        (["out=model.pt2", "checkpoint=nowhere.ckpt"], "checkpoint=nowhere.ckpt: no such file"),
        ([], "out is missing: give it as out=<str>"),
    ],
)
def test_a_wrong_word_is_one_message(words, expected, checkpoint, capsys):
    assert main(["export", f"checkpoint={checkpoint}", *words]) == 2
    assert expected in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_said_first(checkpoint, out, capsys):
    assert write(checkpoint, out / "model.pt2") == 2
    assert "in a folder that is there or can be made" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export", "evaluate"])
def test_a_flipped_bit_in_a_weight_is_found(command, checkpoint, tmp_path, capsys):
    damaged = tmp_path / "damaged.ckpt"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    words = [f"out={tmp_path / 'model.pt2'}"] if command == "export" else []
    assert main([command, f"checkpoint={damaged}", *words]) == 2
    assert f"checkpoint={damaged} is damaged: the checksum of its part" in capsys.readouterr().err


def test_weights_without_a_run_are_refused_with_what_to_do_instead(tmp_path, capsys):
    torch.save(create_model("fat_nano").state_dict(), tmp_path / "bare.pth")
    assert write(tmp_path / "bare.pth", tmp_path / "model.pt2") == 2
    assert "In Python: model = fat_train.create_model(<name>)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("ending", ["pt2", "onnx"])
@pytest.mark.parametrize("name", list_models("*_nano"))
def test_every_family_leaves_in_every_form(name, ending, tmp_path, tiny, capfd):
    """At a size that is no multiple of the strides. A form that a family has not is a failure, whose message names the
    operation."""
    if ending == "onnx":
        need_onnx()
    checkpoint = train(tmp_path, tiny, f"model={name}", "data.image_px=72", "data.eval_resize_px=72")
    capfd.readouterr()
    file = tmp_path / f"model.{ending}"
    status = write(checkpoint, file)
    assert (status, capfd.readouterr().err) == (0, "")
    call, _ = {"pt2": load_pt2, "onnx": load_onnx}[ending](file)
    assert_the_models_logits(call, checkpoint, name=name, px=72)
