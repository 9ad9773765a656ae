"""A family of models beside FAT, as small as one can be: what is not FAT's alone has to work with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fat_train.model.backbone import Backbone, Stage, StageOutput


@dataclass(frozen=True, kw_only=True)
class PlainNetConfig:
    """Stages of 3×3 convolutions."""

    name: str = "plainnet"
    widths: list[int] = field(default_factory=lambda: [8, 12, 16, 24])
    depths: list[int] = field(default_factory=lambda: [1, 1, 1, 1])
    drop_path_rate: float = 0.0

    def build(self, num_classes: int, in_chans: int = 3) -> PlainNet:
        return PlainNet(self, num_classes=num_classes, in_chans=in_chans)


class PlainStage(Stage):
    def __init__(self, in_width: int, width: int, depth: int, stride: int) -> None:
        super().__init__()
        steps = [(in_width, stride), *[(width, 1)] * (depth - 1)]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 3, step, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            for channels, step in steps
        )

    def forward(self, x: Tensor) -> StageOutput:
        for block in self.blocks:
            x = self.run_block(block, x)
        return StageOutput(x, x)


class PlainNet(Backbone):
    def __init__(self, config: PlainNetConfig, *, num_classes: int, in_chans: int) -> None:
        levels = [
            {"num_chs": width, "reduction": 4 * 2**stage, "module": f"stages.{stage}", "hook_type": "forward"}
            for stage, width in enumerate(config.widths)
        ]
        super().__init__(
            num_classes=num_classes, in_chans=in_chans, num_features=config.widths[-1], feature_info=levels
        )
        self.stem = nn.Conv2d(in_chans, config.widths[0], 4, stride=4)
        self.stages = nn.ModuleList(
            PlainStage(config.widths[max(0, stage - 1)], width, depth, stride=2 if stage else 1)
            for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True))
        )
        self.norm: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def run_stage(self, stage: int, x: Tensor) -> StageOutput:
        return self.stages[stage](x)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def drop_after(self, stage: int) -> None:
        self.stages = self.stages[: stage + 1]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"}
