"""A compiled model is one graph, gives eager code's numbers, and is compiled as often as that takes and no more.

`aot_eager` traces forward and backward pass as the real compiler has them, and makes no machine code of them: seconds.
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, distributed, multiprocessing, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from fat_train.model.backbone import Backbone
from fat_train.model.compiled import compile_copy, compile_model, graphs_of, is_compiled
from fat_train.model.fat import FATConfig

pytestmark = [
    pytest.mark.compile,
    # the tracer asks each tensor that enters a block for its gradient, and torch says that it has none
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def build(drop_path_rate: float = 0.0, depths: tuple[int, ...] = (1, 1, 1, 1)) -> Backbone:
    torch.manual_seed(0)
    size = {"name": "tiny", "widths": [8, 12, 16, 24], "depths": list(depths), "num_heads": [2, 3, 4, 6]}
    return FATConfig(**size, drop_path_rate=drop_path_rate).build(10).train()  # type: ignore[arg-type]


def step(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    logits = model(images)
    logits.float().square().mean().backward()
    return logits.detach()


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-4) -> None:
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=tolerance, atol=0.1 * tolerance, msg=name)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("checkpointing", "autocast"), [(False, False), (True, True)], ids=["float32", "recomputed in bf16-mixed"]
)
def test_a_training_step_with_drop_path_is_one_graph_that_is_made_once(checkpointing: bool, autocast: bool) -> None:
    """Then evaluation is another, and going back to training needs none."""
    model = build(drop_path_rate=0.3)
    model.set_grad_checkpointing(checkpointing)
    compile_model(model, "default", "aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for number in range(3):
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                step(model)
        assert graphs() == 1
        model.eval()
        with torch.inference_mode():
            model(IMAGES)
        assert graphs() == 2
        with torch.compiler.set_stance("fail_on_recompile"):
            step(model.train())


def test_recomputed_blocks_draw_their_drop_path_once() -> None:
    """Another mask in the backward pass would give other gradients than the activations kept."""
    models = [build(drop_path_rate=0.5) for _ in range(2)]
    models[1].set_grad_checkpointing()
    for model in models:
        compile_model(model, "default", "aot_eager")
        torch.manual_seed(3)
        step(model)
    assert_same_gradients(*models)


def test_blocks_compiled_alone_share_a_graph_where_their_shapes_are_equal() -> None:
    """Whatever their drop path: of six blocks five are of shapes of their own. Evaluation needs as many more, beyond
    torch's own limit of 8."""
    model = build(drop_path_rate=0.3, depths=(1, 1, 3, 1))
    compile_model(model, "regional", "aot_eager")
    for number in range(2):
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            step(model)
    assert graphs() == 5
    with torch.inference_mode():
        model.eval()(IMAGES)
    assert graphs() == 10


@pytest.mark.parametrize("way", ["default", "regional"])
def test_values_and_gradients_are_those_of_eager_code(way: str) -> None:
    eager, compiled = build(), build()
    compile_model(compiled, way, "aot_eager")
    torch.testing.assert_close(step(compiled), step(eager), rtol=1e-4, atol=1e-5)
    assert_same_gradients(compiled, eager)
    for (name, ours), theirs in zip(compiled.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("way", ["default", "regional"])
def test_a_smaller_last_batch_of_validation_and_the_average_need_no_graph_of_their_own(way: str) -> None:
    model = build().eval()
    compile_model(model, way, "aot_eager")
    average = ModelEmaV3(model)
    assert not average.module._compiled_call_impl, "a copy of a compiled module is a plain one"
    compile_copy(average.module)
    assert is_compiled(average.module)
    wanted = build().eval()
    made = []
    with torch.inference_mode():
        for number, images in enumerate((IMAGES, IMAGES, IMAGES[:3])):
            for one in (model, average.module):
                with graphs_of(one, number):
                    torch.testing.assert_close(one(images), wanted(images), rtol=1e-4, atol=1e-5)
                made.append(graphs())
    assert set(made) == {1 if way == "default" else 4}


def test_state_dict_and_copies_are_the_plain_models() -> None:
    plain = build()
    for way in ("default", "regional"):
        model = build()
        compile_model(model, way, "aot_eager")
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
        assert type(copy.deepcopy(model)) is type(plain)


def _rank(rank: int, port: int, folder: str) -> None:
    """One of two processes, each with half of the images: three steps in each way."""
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        results = {}
        for way in ("off", "default", "regional"):
            counters.clear()
            # drop path that drops nothing: the ways draw different numbers, and each block's probability is another
            model = build(drop_path_rate=1e-9)
            compile_model(model, way, "aot_eager")
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
            for number in range(3):
                with torch.compiler.set_stance("fail_on_recompile" if number and way != "off" else "default"):
                    logits = step(wrapped, IMAGES[rank::2] + number)
            gradients = {name: p.grad for name, p in model.named_parameters()}
            results[way] = (logits, gradients, counters["stats"]["unique_graphs"], dict(counters["graph_break"]))
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_inside_ddp_two_processes_train_as_with_eager_code(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)  # ends both where one fails
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank in ranks:
        eager_logits, eager_gradients, *_ = rank.pop("off")
        for way, (logits, gradients, made, breaks) in rank.items():
            torch.testing.assert_close(logits, eager_logits, rtol=1e-3, atol=1e-4)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, eager_gradients[name], rtol=1e-3, atol=1e-4, msg=name)
            assert made == (1 if way == "default" else 4)
            assert not breaks
    for way, (_, gradients, *_) in ranks[0].items():
        assert all(torch.equal(gradient, ranks[1][way][1][name]) for name, gradient in gradients.items())
