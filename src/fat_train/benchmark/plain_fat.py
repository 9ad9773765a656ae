"""FAT as its equations read: what every claim about speed and every fused operation is held against.

Fan et al., "Lightweight Vision Transformer with Bidirectional Interaction", equations 1, 2 and 4 to 11. Each sign of an
equation is one plain PyTorch operation on contiguous NCHW tensors: SiLU is written as its product, attention as two
matrix products with a softmax between them, heads are copied apart. Nothing of `model/fat.py` but its settings is used,
so that a mistake there cannot hide here; where the paper and the authors' code differ, both files follow the latter
("Deviates from the paper:" in `model/fat.py`), and the names of parameters and buffers are the same.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn

from fat_train.model.fat import FATConfig


def conv_bn_relu(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """One step of the stem: conv 3×3, BN, ReLU."""
    steps = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()
    )
    return nn.Sequential(OrderedDict(conv=steps))


def stem(in_chans: int, width: int) -> nn.Sequential:
    """Image [B, c, h, w] -> tokens [B, C, ⌈h / 4⌉, ⌈w / 4⌉] (section 3.1)."""
    return nn.Sequential(
        OrderedDict(
            conv1=conv_bn_relu(in_chans, width // 2, stride=2),
            conv2=conv_bn_relu(width // 2, width, stride=2),
            conv3=conv_bn_relu(width, width, stride=1),
            conv4=conv_bn_relu(width, width, stride=1),
            conv5=nn.Conv2d(width, width, 1),
            layernorm=nn.GroupNorm(1, width),
        )
    )


def fine_grained_pool(width: int, reduction: int) -> nn.Sequential:
    """pool of Eq. 6: log2(reduction) times DWConv 5×5 of stride 2 and BN, with a 1×1 conv between two of them."""
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    halvings = int(math.log2(reduction))
    for step in range(halvings):
        steps[f"conv{step}"] = nn.Conv2d(width, width, 5, stride=2, padding=2, groups=width)
        steps[f"bn{step}"] = nn.BatchNorm2d(width)
        if step < halvings - 1:
            steps[f"linear{step}"] = nn.Conv2d(width, width, 1)
    return nn.Sequential(steps)


class PlainFASA(nn.Module):
    """Equations 7 to 11, an operation a sign."""

    def __init__(self, width: int, num_heads: int, kernel_size: int, kv_reduction: int, gate: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.gates_both_ways = gate == "paper"
        self.q = nn.Conv2d(width, width, 1)
        self.kv = nn.Conv2d(width, 2 * width, 1)
        self.local_mixer = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.mixer = nn.Conv2d(width, width, 1)
        self.pool = fine_grained_pool(width, kv_reduction)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Y of Eq. 11."""
        q = self.q(x)
        k, v = torch.chunk(self.kv(self.pool(x)), 2, dim=1)
        global_ = self.attention(q, k, v)  # Eq. 7
        q_prime = self.local_mixer(q)
        local = q_prime * torch.sigmoid(q_prime)  # Eq. 8
        gated_local = local * torch.sigmoid(global_)  # Eq. 9
        if self.gates_both_ways:
            global_ = global_ * torch.sigmoid(local)  # Eq. 10
        return self.mixer(global_ * gated_local)  # Eq. 11

    def attention(
        self, q: Float[Tensor, "B C H W"], k: Float[Tensor, "B C h w"], v: Float[Tensor, "B C h w"]
    ) -> Float[Tensor, "B C H W"]:
        """Softmax(Q Kᵀ D^−½) V of each head, the logits a tensor of their own."""
        b, c, h, w = q.shape
        q, k, v = self.heads(q), self.heads(k), self.heads(v)
        logits = torch.matmul(q, k.transpose(2, 3)) * (c // self.num_heads) ** -0.5  # [B, M, H*W, N]
        out = torch.matmul(torch.softmax(logits, dim=-1), v)  # [B, M, H*W, D]
        return out.transpose(2, 3).contiguous().reshape(b, c, h, w)

    def heads(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M N D"]:
        """The channels of each head beside its tokens, copied."""
        b, c, h, w = x.shape
        return x.reshape(b, self.num_heads, c // self.num_heads, h * w).transpose(2, 3).contiguous()


class PlainConvFFN(nn.Module):
    """ConvFFN of Eq. 1: at stride 1 the DWConv is added to what it reads."""

    def __init__(self, width: int, out_width: int, ratio: int, stride: int) -> None:
        super().__init__()
        hidden = ratio * width
        self.stride = stride
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 5, stride, padding=2, groups=hidden)
        self.bn = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, out_width, 1)
        self.gelu = nn.GELU()

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """Same map at stride 1; half the sides at stride 2."""
        hidden = self.gelu(self.fc1(x))
        mixed = self.dwconv(hidden)
        if self.stride == 1:
            mixed = hidden + mixed
        return self.fc2(self.bn(mixed))


class PlainBlock(nn.Module):
    """Eq. 1, with drop path on FASA's and ConvFFN's branches."""

    def __init__(self, config: FATConfig, stage: int, *, downsamples: bool, drop_path_rate: float) -> None:
        super().__init__()
        width, kernel_size = config.widths[stage], config.kernel_sizes[stage]
        self.cpe = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.norm1 = nn.GroupNorm(1, width)
        self.attn = PlainFASA(
            width, config.num_heads[stage], kernel_size, config.kv_reductions[stage], config.interaction.gate
        )
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.GroupNorm(1, width)
        out_width, stride = (config.widths[stage + 1], 2) if downsamples else (width, 1)
        self.downsample: nn.Module = nn.Identity()
        if downsamples:
            self.downsample = nn.Sequential(
                nn.Conv2d(width, width, 5, stride=2, padding=2, groups=width),
                nn.BatchNorm2d(width),
                nn.Conv2d(width, out_width, 1),
            )
        self.ffn = PlainConvFFN(width, out_width, config.mlp_ratios[stage], stride)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """Z of Eq. 1."""
        x = self.cpe(x) + x
        y = self.drop_path(self.attn(self.norm1(x))) + x
        return self.drop_path(self.ffn(self.norm2(y))) + self.downsample(y)


class PlainFAT(nn.Module):
    """Stem, four stages, LN, mean over the map, linear classifier (section 3.1).

    Args:
        config: the size.
        num_classes: width of the classifier, at least 1.
        in_chans: channels of the image.
    """

    def __init__(self, config: FATConfig, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.patch_embed = stem(in_chans, config.widths[0])
        num_blocks, block = sum(config.depths), 0
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            blocks = nn.ModuleList()
            for index in range(depth):
                rate = config.drop_path_rate * block / max(1, num_blocks - 1)
                ends = index == depth - 1 and stage < len(config.depths) - 1
                blocks.append(PlainBlock(config, stage, downsamples=ends, drop_path_rate=rate))
                block += 1
            self.layers.append(nn.ModuleDict({"blocks": blocks}))
        self.norm = nn.GroupNorm(1, config.widths[-1])
        self.head = nn.Linear(config.widths[-1], num_classes)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of normalised images."""
        x = self.patch_embed(x)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            blocks = layer["blocks"]
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x)
        return self.head(self.norm(x).mean(dim=(2, 3)))
