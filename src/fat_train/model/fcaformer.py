"""FcaFormer (Zhang et al., "FcaFormer: Forward Cross Attention in Hybrid Vision Transformer").

Module names are those of the authors' code, so that its checkpoints load as they are. LN is over the channels of one
token. Maps are channels-last, and tokens [B, N, C] are views of them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from fat_train.layer.conv import DepthwiseConv2d, PointwiseConv2d
from fat_train.layer.drop_path import DropPath, rates_of_blocks
from fat_train.model.backbone import Backbone, Stage, StageOutput
from fat_train.op.pointwise import pointwise_conv
from fat_train.types import UserError, one_of

CONV, WINDOW, GLOBAL, CROSS = MIXERS = ("conv", "window", "global", "cross")
STEM_STRIDE = {"conv": 4, "patch": 16}
POSITION_BIASES = ("distance", "offset")
TOKENS = ("tme", "pooled")
SCALES = ("before_norm", "after_norm", "none")
REACHES = ("released", "paper")
WINDOW_SIDE = 7
MERGE_STRIDE = 4  # s of section 3.1


@dataclass(frozen=True, kw_only=True)
class CrossConfig:
    """Cross tokens: what a block takes from earlier blocks of its stage."""

    tokens: str = "tme"
    """`tme`: by depth-wise convolutions (Fig. 2). `pooled`: means of 4×4 tokens, nothing enhanced (Table 5, row 4)."""
    scale: str = "before_norm"
    """Where LSFs multiply: `before_norm` (released), `after_norm` (Eq. 2 and 3), `none` (Table 5, row 4)."""
    reach: str = "released"
    """`released`: a block reads all earlier ones. `paper`: all but the one right before it (Eq. 2 and 3)."""
    max_sets: int = 12
    """A block reads the newest so many of the blocks within its reach; the released code's `cab_max_d`."""

    def __post_init__(self) -> None:
        one_of("model.cross.tokens", self.tokens, TOKENS)
        one_of("model.cross.scale", self.scale, SCALES)
        one_of("model.cross.reach", self.reach, REACHES)
        if self.max_sets < 1:
            raise UserError(f"model.cross.max_sets must be at least 1; got {self.max_sets}")

    def read_by(self, index: int) -> range:
        """Indices of the blocks whose cross tokens block `index` reads, in a stage, from 0."""
        last = index if self.reach == "released" else max(0, index - 1)
        return range(max(0, last - self.max_sets), last)


@dataclass(frozen=True, kw_only=True)
class FcaFormerConfig:
    """A size of FcaFormer (section 3.2). Lists have one entry a stage; each stage but the first halves the map."""

    name: str
    """What `create_model` and timm call it, and what a checkpoint says it holds."""
    widths: list[int]
    """Channels D; the first one is even where the stem is `conv` (its first conv has half of it)."""
    depths: list[int]
    """Blocks L."""
    num_heads: list[int]
    """Attention heads, each dividing its stage's width; 0 in a stage of convolutions."""
    mixers: list[str] = field(default_factory=lambda: [CONV, CONV, CROSS, CROSS])
    """What mixes tokens: `conv` (ConvNeXt's block), `window` (Swin's 7×7 ones), `global` or `cross` attention."""
    stem: str = "conv"
    """`conv`: two 3×3 convs of stride 2. `patch`: one 16×16 conv of stride 16, for the plain FcaFormer."""
    mlp_ratio: int = 4
    """Hidden channels of the feed-forward part over D."""
    image_px: int = 224
    """Side of the images that the tables of position biases and LSFs are made for; at others they are interpolated."""
    position_bias: str = "distance"
    """A bias for each (|Δy|, |Δx|), LeViT's `distance`, or for each (Δy, Δx), Swin's `offset`."""
    layer_scale_init: float = 1e-6
    """First value of γ, the factors of each branch's channels."""
    drop_path_rate: float = 0.0
    """Probability that the last block's branches are skipped for an image; rises linearly from 0 at the first block."""
    cross: CrossConfig = field(default_factory=CrossConfig)
    """What blocks of `cross` attention read."""

    def __post_init__(self) -> None:
        stages = len(self.mixers)
        for mixer in self.mixers:
            one_of("model.mixers", mixer, MIXERS)
        for name in ("widths", "depths"):
            values = getattr(self, name)
            if len(values) != stages or min(values, default=0) < 1:
                raise UserError(f"model.{name} must be {stages} numbers of at least 1, one a mixer; got {values}")
        if len(self.num_heads) != stages or not all(map(_fits, self.widths, self.num_heads, self.mixers)):
            raise UserError(
                f"model.num_heads must divide model.widths {self.widths} and be 0 in stages of convolutions "
                f"{self.mixers}; got {self.num_heads}"
            )
        one_of("model.stem", self.stem, tuple(STEM_STRIDE))
        one_of("model.position_bias", self.position_bias, POSITION_BIASES)
        if self.stem == "conv" and self.widths[0] % 2:
            raise UserError(f"model.widths must start with an even number; got {self.widths}")
        if self.mlp_ratio < 1:
            raise UserError(f"model.mlp_ratio must be at least 1; got {self.mlp_ratio}")
        if self.image_px < 32:
            raise UserError(f"model.image_px must be at least 32; got {self.image_px}")
        if self.layer_scale_init <= 0:
            raise UserError(f"model.layer_scale_init must be positive; got {self.layer_scale_init}")
        if not 0 <= self.drop_path_rate < 1:
            raise UserError(f"model.drop_path_rate must be in [0, 1); got {self.drop_path_rate}")

    def stride(self, stage: int) -> int:
        """Of the stage's maps, against the image."""
        return STEM_STRIDE[self.stem] * 2**stage

    def build(self, num_classes: int, in_chans: int = 3) -> FcaFormer:
        """A network of this size with fresh weights."""
        return FcaFormer(self, num_classes=num_classes, in_chans=in_chans)


def _fits(width: int, heads: int, mixer: str) -> bool:
    return heads == 0 if mixer == CONV else heads > 0 and width % heads == 0


class ConvNorm(nn.Sequential):
    """A convolution without bias and its BatchNorm."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(OrderedDict(c=conv, bn=nn.BatchNorm2d(conv.out_channels)))


class PixelLinear(nn.Linear):
    """A linear layer of every pixel's channels, then the activation: a 1×1 convolution whose weight has two axes."""

    def __init__(self, in_features: int, out_features: int, activation: str = "none") -> None:
        super().__init__(in_features, out_features)
        self.activation = activation

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c H W"]:
        """Every pixel by itself."""
        return pointwise_conv(x, self.weight[:, :, None, None], self.bias, self.activation)


class ConvStem(nn.Module):
    """Image to tokens at a quarter of its sides: two 3×3 convs of stride 2, BN after each, GELU between them.

    Deviates from the paper: it does not describe the stem; this is the released code's.
    """

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        first = nn.Conv2d(in_chans, width // 2, 3, stride=2, padding=1, bias=False)
        second = nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False)
        self.seq = nn.Sequential(ConvNorm(first), nn.GELU(), ConvNorm(second))

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """H = ceil(h / 4), W = ceil(w / 4)."""
        return self.seq(x)


class PatchStem(nn.Module):
    """Image to tokens at a sixteenth of its sides: a linear map of each patch of 16×16 pixels (section 3.2)."""

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        side = STEM_STRIDE["patch"]
        self.proj = nn.Conv2d(in_chans, width, side, stride=side)

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """H = ceil(h / 16), W = ceil(w / 16): the last patches are filled up with zeros."""
        side = STEM_STRIDE["patch"]
        below, right = -x.shape[2] % side, -x.shape[3] % side
        return self.proj(F.pad(x, (0, right, 0, below)) if below or right else x)


class Downsample(nn.Sequential):
    """Half the sides and C' channels: "pointwise and depthwise convolutions" (section 3.2).

    1×1 from C to C' channels, DW 3×3 of stride 2, 1×1, with BN after each and GELU between them.

    Deviates from the paper: the order, the kernel and the activations are the released code's.
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(PointwiseConv2d(width, out_width, bias=False))
        self.act1 = nn.GELU()
        self.conv2 = ConvNorm(DepthwiseConv2d(out_width, 3, stride=2, bias=False))
        self.act2 = nn.GELU()
        self.conv3 = ConvNorm(PointwiseConv2d(out_width, out_width, bias=False))


class ConvBlock(nn.Module):
    """ConvNeXt's block (Liu et al., 2022): X + γ ⊙ W₂ GELU(W₁ LN(DWConv7×7(X)))."""

    def __init__(self, config: FcaFormerConfig, stage: int, drop_path_rate: float) -> None:
        super().__init__()
        width = config.widths[stage]
        self.gamma = nn.Parameter(torch.full((width,), config.layer_scale_init))
        self.dwconv = DepthwiseConv2d(width, 7)
        self.norm = LayerNorm2d(width)
        self.pwconv1 = PixelLinear(width, config.mlp_ratio * width, activation="gelu")
        self.pwconv2 = PixelLinear(config.mlp_ratio * width, width)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], None]:
        """The same shape, and no cross tokens."""
        branch = self.pwconv2(self.pwconv1(self.norm(self.dwconv(x))))
        return self.drop_path(x, self.gamma[:, None, None] * branch), None


class Mlp(nn.Sequential):
    """The feed-forward part, W₂ GELU(W₁ LN(X)), with a norm of its own behind the block's."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(width, eps=1e-5)
        self.fc1 = PixelLinear(width, hidden, activation="gelu")
        self.fc2 = PixelLinear(hidden, width)


class FcaBlock(nn.Module):
    """A block with attention: CMHA, TME and FFN (section 3.1, Fig. 1 and 2).

    Eq. 1:  Q = W^Q x^{l−1}
    Eq. 2:  K = W^K [x^{l−1}, (1 α^l)ᵀ ⊗ (x̄^{l−2}, …, x̄^1)]
    Eq. 3:  V = W^V [x^{l−1}, (1 α^l)ᵀ ⊗ (x̄^{l−2}, …, x̄^1)]
    Eq. 4:  y^l = x^{l−1} + W^P [softmax(Q Kᵀ / √d + B) V]
    TME:    x̄^l = DWConv7×7, stride 4 (y^l),   z^l = DWConv3×3(y^l)
    FFN:    x^l = z^l + W₂ GELU(W₁ LN(z^l))

        x^l, y^l, z^l   n = H·W tokens, maps [B, C, H, W]
        x̄^l             cross tokens [B, m, C], m = ceil(H / 4) · ceil(W / 4)
        α^l             `s_scale_factors`, LSFs: a number for each cross token that the block reads
        B               `attention_biases`, of two tokens' relative position, and `s_token_bias`, of a cross token
        W^Q, W^K, W^V   rows of `qkv`;  W^P  `proj`

    Deviates from the paper, as the released code does: a block reads the tokens of all earlier blocks, x̄^{l−1} too
    (`cross.reach`; the multiply-adds of Table 5 need it); LN stands before the projections, another one over the cross
    tokens, and LSFs multiply before it, where it takes a positive factor out again (`cross.scale`: after it they act as
    Eq. 2 and 3 say); logits are divided by the root of a head's channels; BN follows the 3×3 DWConv; each branch is
    multiplied by γ and passes through drop path; two LNs follow each other in the FFN.

    Args:
        config: the network's.
        stage: which of its stages, from 0.
        index: which of the stage's blocks, from 0.
        drop_path_rate: probability in [0, 1) that a branch is skipped for an image, in training.
    """

    def __init__(self, config: FcaFormerConfig, stage: int, index: int, drop_path_rate: float) -> None:
        super().__init__()
        width, mixer, cross = config.widths[stage], config.mixers[stage], config.cross
        self.num_heads, self.position_bias, self.cross = config.num_heads[stage], config.position_bias, cross
        self.side = WINDOW_SIDE if mixer == WINDOW else -(-config.image_px // config.stride(stage))
        self.shift = (WINDOW_SIDE // 2) * (index % 2) if mixer == WINDOW else None
        self.reads = cross.read_by(index) if mixer == CROSS else range(0)
        is_read = any(index in cross.read_by(later) for later in range(index + 1, config.depths[stage]))
        self.makes_tokens = mixer == CROSS and is_read

        self.gamma_1 = nn.Parameter(torch.full((width,), config.layer_scale_init))
        self.gamma_2 = nn.Parameter(torch.full((width,), config.layer_scale_init))
        entries = self.side**2 if self.position_bias == "distance" else (2 * self.side - 1) ** 2
        self.attention_biases = nn.Parameter(torch.zeros(self.num_heads, entries))
        if self.reads:
            num_cross = len(self.reads) * _merged(self.side) ** 2
            self.s_token_bias = nn.Parameter(torch.zeros(1, self.num_heads, 1, num_cross))
            if cross.scale != "none":
                self.s_scale_factors = nn.Parameter(torch.ones(1, num_cross, 1))
            self.s_norm = nn.LayerNorm(width)
        if self.makes_tokens and cross.tokens == "tme":
            self.dw_conv = nn.Conv2d(width, width, 7, stride=MERGE_STRIDE, padding=3, groups=width, bias=False)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        enhances = mixer == CROSS and cross.tokens == "tme"
        self.local_conv = ConvNorm(DepthwiseConv2d(width, 3, bias=False)) if enhances else nn.Identity()
        self.norm2 = LayerNorm2d(width, eps=1e-5)
        self.mlp = Mlp(width, config.mlp_ratio * width)
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self, x: Float[Tensor, "B C H W"], *cross: Float[Tensor, "B m C"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B m C"] | None]:
        """x^l, and x̄^l where a later block reads it; `cross` holds the sets of cross tokens that this block reads."""
        mixed = self.mix(x, *cross) if self.shift is None else self.mix_windows(x, self.shift)
        y = self.drop_path(x, self.gamma_1[:, None, None] * mixed)
        tokens = self.merge(y) if self.makes_tokens else None
        z = self.local_conv(y)
        return self.drop_path(z, self.gamma_2[:, None, None] * self.mlp(self.norm2(z))), tokens

    def mix(self, x: Float[Tensor, "B C H W"], *cross: Float[Tensor, "B m C"]) -> Float[Tensor, "B C H W"]:
        """What Eq. 4 adds to x^{l−1}: attention of all tokens to all tokens and to the cross tokens."""
        height, width = x.shape[2:]
        tokens, size = self.norm1(x.flatten(2).transpose(1, 2)), height * width  # [B, n, C]
        bias = self.bias(height, width)  # [M, n, n]
        if cross:
            tokens = torch.cat([tokens, self.calibrate(torch.cat(cross, dim=1), height, width)], dim=1)  # [B, n+lm, C]
            depth_bias = self._for_cells(self.s_token_bias, height, width)  # [M, lm]
            bias = torch.cat([bias, depth_bias[:, None].expand(-1, size, -1)], dim=2)  # [M, n, n+lm]
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind()  # views [B, M, n+lm, D]; cross tokens ask nothing
        out = F.scaled_dot_product_attention(q[:, :, :size], k, v, attn_mask=bias[None].to(q.dtype))  # [B, M, n, D]
        out = self.proj(out.transpose(1, 2).flatten(2))  # [B, n, C]
        return out.transpose(1, 2).unflatten(2, (height, width))

    def calibrate(self, cross: Float[Tensor, "B N C"], height: int, width: int) -> Float[Tensor, "B N C"]:
        """LSFs and LN of the cross tokens of maps of `height` × `width`."""
        if self.cross.scale == "none":
            return self.s_norm(cross)
        factors = self._for_cells(self.s_scale_factors, height, width)[0, :, None]  # [N, 1]
        if self.cross.scale == "after_norm":
            return factors * self.s_norm(cross)
        return self.s_norm(factors * cross)

    def merge(self, y: Float[Tensor, "B C H W"]) -> Float[Tensor, "B m C"]:
        """Cross tokens x̄^l of the map y^l."""
        if self.cross.tokens == "pooled":  # the mean of what is there where the map ends within 4×4
            return F.avg_pool2d(y, MERGE_STRIDE, ceil_mode=True).flatten(2).transpose(1, 2)
        below, right = (max(0, MERGE_STRIDE - side) for side in y.shape[2:])
        if below or right:  # the same tokens; of a narrower map oneDNN's bfloat16 gives weight gradients that are NaN
            y = F.pad(y, (0, right, 0, below))
        return self.dw_conv(y).flatten(2).transpose(1, 2)

    def bias(self, height: int, width: int) -> Float[Tensor, "M n n"]:
        """B of Eq. 4 for each pair of a map's tokens: a query's row, a key's column.

        The table, resized where the map is not of the size that it was made for, holds the bias of every (Δy, Δx);
        a query's row of B is the stretch of it that starts at the query, so that B is a view of overlapping stretches.
        """
        table = self.attention_biases.unflatten(1, (round(self.attention_biases.shape[1] ** 0.5), -1))
        if self.position_bias == "distance":
            table = torch.cat([table[:, 1:].flip(1), table], dim=1)
            table = torch.cat([table[:, :, 1:].flip(2), table], dim=2)
        middle = slice(self.side - 1, self.side)  # the offset 0: all there is in a map of one row or column
        table = table[:, middle if height == 1 else slice(None), middle if width == 1 else slice(None)]
        table = _resize(table[None], 2 * height - 1, 2 * width - 1, corners=True)[0]  # [M, 2H-1, 2W-1]
        stretches = table.unfold(1, height, 1).unfold(2, width, 1)  # [M, H, W, H, W], from the last query to the first
        return stretches.flip(1, 2).flatten(3).flatten(1, 2)

    def mix_windows(self, x: Float[Tensor, "B C H W"], shift: int) -> Float[Tensor, "B C H W"]:
        """Swin's attention within windows of 7×7 tokens, which start `shift` tokens later in every other block.

        Windows that reach across the map's rim, to what lies on its other side, attend to each side alone, and what
        fills up a map whose sides 7 does not divide is attended to by nobody. A map of one window is not shifted.
        """
        side, (height, width) = self.side, x.shape[2:]
        rows, columns = -(-height // side), -(-width // side)  # of windows
        shifts = (shift * (rows > 1), shift * (columns > 1))
        x = self.norm1(x.permute(0, 2, 3, 1))  # [B, H, W, C]
        if (rows * side, columns * side) != (height, width):
            x = F.pad(x, (0, 0, 0, columns * side - width, 0, rows * side - height))
        if any(shifts):
            x = x.roll((-shifts[0], -shifts[1]), (1, 2))
        qkv = self.qkv(x).unflatten(1, (rows, side)).unflatten(3, (columns, side)).unflatten(5, (3, self.num_heads, -1))
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)  # [3, B, rows, columns, M, 7, 7, D]
        q, k, v = qkv.flatten(5, 6).flatten(2, 4).unbind()  # [B, windows*M, 49, D] each
        bias = self.bias(side, side).expand(rows * columns, -1, -1, -1)
        if any(shifts) or (rows * side, columns * side) != (height, width):
            across = _part(height, rows, shifts[0], x.device)[:, None, :, None]
            parts = (3 * across + _part(width, columns, shifts[1], x.device)[None, :, None, :]).flatten(0, 1).flatten(1)
            bias = bias.masked_fill((parts[:, None] != parts[:, :, None])[:, None], float("-inf"))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1)[None].to(q.dtype))
        out = out.unflatten(1, (rows, columns, self.num_heads)).unflatten(4, (side, side)).permute(0, 1, 4, 2, 5, 3, 6)
        out = self.proj(out.flatten(5).flatten(3, 4).flatten(1, 2))  # [B, rows*7, columns*7, C]
        if any(shifts):
            out = out.roll(shifts, (1, 2))
        return out[:, :height, :width].permute(0, 3, 1, 2)

    def _for_cells(self, values: Tensor, height: int, width: int) -> Float[Tensor, "K N"]:
        """A number for each cross token, [K, N] for maps of `height` × `width`, from one for each of `self.side`²."""
        sets, side = len(self.reads), _merged(self.side)
        cells = values.view(-1, sets, side, side)  # [K, l, h, w]
        return _resize(cells, _merged(height), _merged(width), corners=False).flatten(1)


def _merged(side: int) -> int:
    """Cross tokens along a side of a map."""
    return -(-side // MERGE_STRIDE)


def _resize(values: Float[Tensor, "K L h w"], height: int, width: int, *, corners: bool) -> Float[Tensor, "K L H W"]:
    """Bilinearly; as they are where the size is theirs.

    With `corners` the first and last number stay at the ends, as offsets from one end of a map to the other do; else a
    number is its cell's, and the cells cover the same image.
    """
    if values.shape[2:] == (height, width):
        return values
    return F.interpolate(values, size=(height, width), mode="bilinear", align_corners=corners)


def _part(size: int, windows: int, shift: int, device: torch.device) -> Tensor:
    """Which part of the map each place in a row of windows is of, [windows, 7]: 0, beyond the rim 1, filled up 2."""
    place = torch.arange(windows * WINDOW_SIDE, device=device)
    wrapped = (place >= windows * WINDOW_SIDE - shift).long()
    filled_up = (place + shift) % (windows * WINDOW_SIDE) >= size
    return wrapped.masked_fill(filled_up, 2).view(windows, WINDOW_SIDE)


class FcaFormerStage(Stage):
    """Blocks of one width, then half the sides and the next width, if there is a next stage."""

    def __init__(self, config: FcaFormerConfig, stage: int, drop_path_rates: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ConvBlock(config, stage, rate) if config.mixers[stage] == CONV else FcaBlock(config, stage, index, rate)
            for index, rate in enumerate(drop_path_rates)
        )
        is_last = stage + 1 == len(config.depths)
        self.downsample = nn.Identity() if is_last else Downsample(*config.widths[stage : stage + 2])

    def forward(self, x: Float[Tensor, "B C H W"]) -> StageOutput:
        """The last block's map, and that map down-sampled."""
        made: list[Tensor] = []  # cross tokens of the blocks so far
        for block in self.blocks:
            read = [made[index] for index in block.reads] if isinstance(block, FcaBlock) else []
            x, tokens = self.run_block(block, x, *read)
            if tokens is not None:
                made.append(tokens)
        return StageOutput(x, self.downsample(x))


class FcaFormer(Backbone):
    """Stem, stages, mean over the map, LN, linear classifier (section 3.2, Fig. 3).

    Images may have any sides: every step of stride s turns n into ceil(n / s), and tables are interpolated.

    The pyramid's maps are the outputs of each stage's last block, before it is down-sampled.

    Deviates from the paper: the plain FcaFormer's head reads the mean, not a class token, which has no place in a map
    that TME convolves. Its 5.9 M parameters want Swin's table of biases (5.85 M; LeViT's, which L1 to L4 have, 5.83 M)
    or an embedding of absolute positions, which section 3.1 is against. Table 5's rows 2 to 5 come out 0.01 M lower.

    Args:
        config: the size.
        num_classes: width of the classifier; 0 for none.
        in_chans: channels of the image.
    """

    def __init__(self, config: FcaFormerConfig, *, num_classes: int, in_chans: int = 3) -> None:
        stages = len(config.depths)
        modules = [f"layer_{stage}.downsample" for stage in range(stages - 1)] + ["norm"]
        super().__init__(
            num_classes=num_classes,
            in_chans=in_chans,
            num_features=config.widths[-1],
            feature_info=[
                {"num_chs": width, "reduction": config.stride(stage), "module": module, "hook_type": "forward_pre"}
                for stage, (width, module) in enumerate(zip(config.widths, modules, strict=True))
            ],
        )
        self.config = config
        self.patch_embed = (ConvStem if config.stem == "conv" else PatchStem)(in_chans, config.widths[0])
        for stage, rates in enumerate(rates_of_blocks(config.drop_path_rate, config.depths)):
            self.add_module(f"layer_{stage}", FcaFormerStage(config, stage, rates))
        self.norm: nn.Module = nn.Identity()
        self.norm_head: nn.Module = nn.LayerNorm(config.widths[-1])
        self.reset_classifier(num_classes)
        self.apply(_init_weights)

    def embed(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """Tokens at stride 4, or 16."""
        return self.patch_embed(x)

    def run_stage(self, stage: int, x: Float[Tensor, "B C H W"]) -> StageOutput:
        """The stage's last map, and what the next stage reads."""
        return self.get_submodule(f"layer_{stage}")(x)

    def final_norm(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Nothing: the norm is behind the pooling."""
        return self.norm(x)

    def norm_pooled(self, x: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
        """LN."""
        return self.norm_head(x)

    def drop_after(self, stage: int) -> None:
        """Remove the later stages, and this one's down-sampling."""
        for later in range(stage + 1, len(self.feature_info)):
            delattr(self, f"layer_{later}")
        self.get_submodule(f"layer_{stage}").downsample = nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; the LN before it goes where pooling goes, and comes back with it."""
        pooled = self.global_pool
        super().reset_classifier(num_classes, global_pool)
        if self.global_pool != pooled:
            like = next(self.parameters())
            norm = nn.LayerNorm(self.head_hidden_size, device=like.device, dtype=like.dtype)
            self.norm_head = norm if self.global_pool else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The stem, then each block in order; what halves a stage's map, and the last LN, go with the block before."""
        if coarse:
            blocks = [(r"^layer_(\d+)", None), (r"^norm", (99999,))]
        else:
            downsample = (r"^layer_(\d+)\.downsample", (99999,))
            blocks = [(r"^layer_(\d+)\.blocks\.(\d+)", None), downsample, (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": blocks}


def _init_weights(module: nn.Module) -> None:
    """The released code's: truncated normal, σ = 0.02, and no bias."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
