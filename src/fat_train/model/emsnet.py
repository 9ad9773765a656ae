"""EMSNet, the Efficient Multi-scale Spatial interaction Network: chapter 3 of "the thesis" below, Vo, "Efficient Vision
Transformers with Multi-Scale and Partial Attentions for Object Recognition", University of Ulsan.

No code was released. Where the thesis is silent, or says two things, the reading here is the one that its parameters
and GFLOPs bear out, named under "Deviates from the thesis:"; what they do not settle is a field of the config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fat_train.layer.conv import DepthwiseConv2d, PointwiseConv2d
from fat_train.layer.drop_path import DropPath, rates_of_blocks
from fat_train.model.backbone import Backbone, Stage, StageOutput
from fat_train.op.attention import attention
from fat_train.op.pointwise import pointwise_conv
from fat_train.types import UserError, one_of

NUM_STAGES = 4
WHITENINGS = ("channels", "positions", "none")


@dataclass(frozen=True, kw_only=True)
class StaticConfig:
    """The static operator, convolutions on the first C_s channels (Eq. 3.1 to 3.5)."""

    whiten: str = "channels"
    """What Eq. 3.1's mean is over: `channels` of a pixel (the text), `positions` of a channel (Eq. 3.12, Fig. 3.8);
    `none` leaves Eq. 3.1 out."""
    kernel_size: int = 7
    """Side of the DWConv behind it, odd; 0 leaves it out."""
    patch_sizes: list[int] = field(default_factory=lambda: [2, 4])
    """Patch size p of each branch that mixes patches; [] for none."""
    patch_shares: list[float] = field(default_factory=lambda: [0.25, 0.25])
    """Share of C_s that each of these branches gets; the rest passes, and lies behind the first one."""
    coord_kernel_size: int = 11
    """k_d, length of the coordinate DWConv's two kernels; odd."""
    expansion: int = 2
    """Channels of the patches over those of the branch, m."""
    gated: bool = True
    """Fuse the branches and gate by them (Eq. 3.4's convolution and Eq. 3.5); else Y_s is the concatenation."""

    def __post_init__(self) -> None:
        one_of("model.static.whiten", self.whiten, WHITENINGS)
        if self.kernel_size < 0 or (self.kernel_size and self.kernel_size % 2 == 0):
            raise UserError(f"model.static.kernel_size must be odd, or 0 for none; got {self.kernel_size}")
        if self.coord_kernel_size < 1 or self.coord_kernel_size % 2 == 0:
            raise UserError(f"model.static.coord_kernel_size must be odd; got {self.coord_kernel_size}")
        if any(size < 1 for size in self.patch_sizes):
            raise UserError(f"model.static.patch_sizes must be at least 1; got {self.patch_sizes}")
        shares = self.patch_shares
        if len(shares) != len(self.patch_sizes) or any(share <= 0 for share in shares) or sum(shares) >= 1:
            raise UserError(
                "model.static.patch_shares must be positive, one a patch size, and sum to less than 1; "
                f"got {shares} for patch_sizes {self.patch_sizes}"
            )
        if self.expansion < 1:
            raise UserError(f"model.static.expansion must be at least 1; got {self.expansion}")


@dataclass(frozen=True, kw_only=True)
class DynamicConfig:
    """The dynamic operator, attention on the other C_d channels (Eq. 3.6 to 3.10)."""

    conv_share: float = 0.5
    """Share of C_d that C-MHSA gets, in [0, 1]; G-MHSA gets the rest."""
    conv_patch_size: int = 4
    """Patch size p of C-MHSA."""
    global_patch_size: int = 6
    """Patch size p of G-MHSA."""
    conv_kernel_size: int = 3
    """k, side of C-MHSA's windows; odd, at least 3, as they are two patches apart."""
    expansion: int = 1
    """Channels of the patches over those of the branch, m."""

    def __post_init__(self) -> None:
        if not 0 <= self.conv_share <= 1:
            raise UserError(f"model.dynamic.conv_share must be in [0, 1]; got {self.conv_share}")
        for name in ("conv_patch_size", "global_patch_size", "expansion"):
            if getattr(self, name) < 1:
                raise UserError(f"model.dynamic.{name} must be at least 1; got {getattr(self, name)}")
        if self.conv_kernel_size < 3 or self.conv_kernel_size % 2 == 0:
            raise UserError(f"model.dynamic.conv_kernel_size must be odd and at least 3; got {self.conv_kernel_size}")


@dataclass(frozen=True, kw_only=True)
class EMSNetConfig:
    """A size of EMSNet (Table 3.1). Lists have one entry for each of the four stages."""

    name: str
    """What `create_model` and timm call it, and what a checkpoint says it holds."""
    widths: list[int]
    """Channels C; `static_share` and the two operators' shares of them are whole numbers."""
    depths: list[int]
    """Blocks."""
    num_heads: list[int]
    """Heads M of both attentions; each divides the channels of their patches."""
    mlp_ratios: list[int] = field(default_factory=lambda: [8, 8, 4, 4])
    """Hidden channels of the MLP over C."""
    drop_path_rate: float = 0.0
    """Probability that the last block's branches are skipped for an image; rises linearly from 0 at the first block."""
    static_share: float = 0.75
    """C_s / C, in [0, 1]: 1 leaves the dynamic operator out, 0 the static one."""
    static: StaticConfig = field(default_factory=StaticConfig)
    """The static operator."""
    dynamic: DynamicConfig = field(default_factory=DynamicConfig)
    """The dynamic operator."""

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "num_heads", "mlp_ratios"):
            values = getattr(self, name)
            if len(values) != NUM_STAGES or min(values) < 1:
                raise UserError(f"model.{name} must be {NUM_STAGES} numbers of at least 1, one a stage; got {values}")
        if not 0 <= self.drop_path_rate < 1:
            raise UserError(f"model.drop_path_rate must be in [0, 1); got {self.drop_path_rate}")
        if not 0 <= self.static_share <= 1:
            raise UserError(f"model.static_share must be in [0, 1]; got {self.static_share}")
        for stage in range(NUM_STAGES):
            self._check_shares(stage)

    def _check_shares(self, stage: int) -> None:
        width, heads, at = self.widths[stage], self.num_heads[stage], f"in stage {stage + 1}"
        static, dynamic = width * self.static_share, width * (1 - self.static_share)
        parts = [("static_share", static), ("dynamic.conv_share", dynamic * self.dynamic.conv_share)]
        parts += [("static.patch_shares", static * share) for share in self.static.patch_shares]
        for name, part in parts:
            if abs(part - round(part)) > 1e-6:
                raise UserError(f"model.{name} must give whole numbers of channels; got {part:g} of {width} {at}")
        for part in self.dynamic_widths(stage):
            channels = part * self.dynamic.expansion
            if channels % heads:
                raise UserError(f"model.num_heads must divide attention's {channels} channels {at}; got {heads}")

    def split(self, stage: int) -> tuple[int, int]:
        """(C_s, C_d) of a stage."""
        static = round(self.widths[stage] * self.static_share)
        return static, self.widths[stage] - static

    def dynamic_widths(self, stage: int) -> tuple[int, int]:
        """Channels of X_d1, which C-MHSA reads, and of X_d2, which G-MHSA reads."""
        _, width = self.split(stage)
        conv = round(width * self.dynamic.conv_share)
        return conv, width - conv

    def build(self, num_classes: int, in_chans: int = 3) -> EMSNet:
        """A network of this size, initialised by PyTorch's defaults."""
        return EMSNet(self, num_classes=num_classes, in_chans=in_chans)


class PatchMixer(nn.Module):
    """Prop(Mixer(PE(X))) of Eq. 3.2, 3.3, 3.6 and 3.7: spatial interaction among one token for every p×p window.

        X      argument   [B, C, H, W]
        PE     pooling over windows of p×p, then a 1×1 conv      [B, m·C, h, w], h = ceil(H / p), w = ceil(W / p)
        Mixer  `mixer`, any module that keeps its map's shape
        Prop   depth-wise transposed conv with kernel and stride p: m channels of a token to one channel of its window

    A side that p does not divide ends in a smaller window: its maximum or mean is over the pixels that are there, and
    what Prop gives beyond the map is cut off.

    Deviates from the thesis: it names adaptive pooling "with kernel size p, stride p" for the dynamic operator, which
    is this pooling where p divides the sides. Adaptive windows else overlap, and are not those that Prop writes to. Its
    widening of "a higher dimension" is m = 2 in the static operator (from Table 3.5's second branch, which takes 0.03 M
    away) and m = 1 in the dynamic one (2.56 M parameters and 0.54 G of XXTiny).

    Args:
        width: channels C.
        patch_size: p.
        expansion: m.
        takes_max: whether a token is the maximum of its window (static operator) or the mean (dynamic one).
        mixer: reads and gives m·C channels.
    """

    def __init__(self, width: int, patch_size: int, expansion: int, takes_max: bool, mixer: nn.Module) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.takes_max = takes_max
        self.embed = PointwiseConv2d(width, width * expansion, bias=False)
        self.mixer = mixer
        self.prop = nn.ConvTranspose2d(width * expansion, width, patch_size, patch_size, groups=width)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Every pixel gets what its window's token has learnt."""
        height, width = x.shape[-2:]
        pool = F.max_pool2d if self.takes_max else F.avg_pool2d
        tokens = self.embed(pool(x, self.patch_size, ceil_mode=True))  # [B, m*C, h, w]
        return self.prop(self.mixer(tokens))[:, :, :height, :width]  # [B, C, p*h, p*w], cut


class CoordinateDWConv(nn.Sequential):
    """CoordDWConv of Eq. 3.2 and 3.3: a 1×k_d depth-wise conv along the rows, then a k_d×1 one along the columns."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        padding = kernel_size // 2
        super().__init__(
            nn.Conv2d(channels, channels, (1, kernel_size), padding=(0, padding), groups=channels),
            nn.Conv2d(channels, channels, (kernel_size, 1), padding=(padding, 0), groups=channels),
        )


class StaticOperator(nn.Module):
    """The static operator: high frequencies, by convolutions at full resolution and among patches.

    Eq. 3.1:  X_w = Conv₁ₓ₁(X_s) − mean(Conv₁ₓ₁(X_s))
              X_m = DWConv(X_w), of which X_m1, X_m2, X_m3 are the first ¼, the next ½ and the last ¼ of the channels
    Eq. 3.2:  Y_m1 = Prop(CoordDWConv(PEi₁(X_m1)))
    Eq. 3.3:  Y_m2 = Prop(CoordDWConv(PEi₂(X_m3)))
    Eq. 3.4:  Y_c = Conv₁ₓ₁(Concat(Y_m1, X_m2, Y_m2))
    Eq. 3.5:  Y_s = Conv₁ₓ₁(X_s) ⊙ δ(Y_c)

        X_s         argument          [B, C_s, H, W]
        Conv₁ₓ₁     `whiten`, `fuse`, `linear` of Eq. 3.1, 3.4, 3.5
        PEi₁, PEi₂  in `branches`, with maxima of patches of p = 2 and p = 4
        δ           sigmoid

    A 1×1 conv minus its mean over the channels is one with the columns of its weight centred: no pass over the map.

    Deviates from the thesis: nothing that it says. Its text takes the mean over channels, Eq. 3.12 and Fig. 3.8 over
    positions: `whiten`. DWConv's 7×7 and k_d = 11, and a bias in the depth-wise convs alone, are not stated: they give
    Table 3.5's static rows to 0.01 M and 0.01 G (2.248, 2.408, 2.378, 2.677 M; printed 2.24, 2.41, 2.38, 2.68).
    """

    def __init__(self, width: int, config: StaticConfig) -> None:
        super().__init__()
        self.config = config
        self.whiten: PointwiseConv2d | None = None
        if config.whiten != "none":
            self.whiten = PointwiseConv2d(width, width, bias=False)
        self.dwconv: nn.Module = DepthwiseConv2d(width, config.kernel_size) if config.kernel_size else nn.Identity()
        mixed = [round(width * share) for share in config.patch_shares]
        self.widths = [*mixed[:1], width - sum(mixed), *mixed[1:]]
        self.branches = nn.ModuleList(
            PatchMixer(
                part,
                patch_size,
                config.expansion,
                True,
                CoordinateDWConv(part * config.expansion, config.coord_kernel_size),
            )
            for part, patch_size in zip(mixed, config.patch_sizes, strict=True)
        )
        self.fuse = self.linear = None
        if config.gated:
            self.fuse = PointwiseConv2d(width, width, bias=False)
            self.linear = PointwiseConv2d(width, width, bias=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Y_s of Eq. 3.5."""
        y = self.mix(self.whitened(x))
        return y if self.fuse is None or self.linear is None else self.linear(x) * self.fuse(y).sigmoid()

    def whitened(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """X_w of Eq. 3.1."""
        if self.whiten is None:
            return x
        if self.config.whiten == "positions":
            y = self.whiten(x)
            return y - y.mean(dim=(2, 3), keepdim=True)
        weight = self.whiten.weight  # [C, C, 1, 1]
        return pointwise_conv(x, weight - weight.mean(dim=0), None)

    def mix(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The concatenation of Eq. 3.4."""
        x = self.dwconv(x)
        if not self.branches:
            return x
        parts = list(x.split(self.widths, dim=1))
        passed = parts.pop(1)
        first, *others = (branch(part) for branch, part in zip(self.branches, parts, strict=True))
        return torch.cat([first, passed, *others], dim=1)


class ConvAttention(nn.Module):
    """C-MHSA, convolution-based multi-head self-attention: the weights among the patches of a k×k window follow from
    those around its middle; windows are two patches apart, and are added where they overlap.

    Eq. 3.9:   A = σ(MM(M, DWConv(X'_d1)))
    Eq. 3.10:  Y_d1 = Fold(MM(A, MM(N, Unfold(X'_d1))))

        X'_d1   argument            [B, C₁, H₁, W₁]
        DWConv  3×3 with stride 2   [B, C₁, h, w], h = ceil(H₁ / 2), w = ceil(W₁ / 2): a pixel a window
        M       `weights`, 1×1 conv C₁ -> heads·k²·k²
        A       [B, h·w, heads, k², k²], σ the softmax over the last axis: the patches that are read
        N       `values`, 1×1 conv C₁ -> C₁; it has no bias, so that it may come before Unfold

    Deviates from the thesis: nothing that it says. Eq. 3.9 has no scale and Eq. 3.10 no projection behind Fold: neither
    has this. Without biases in M and N the row "+C-MHSA" of Table 3.5 counts 3.10 M, as printed; with them 3.11.

    Args:
        width: channels C₁.
        num_heads: divides them.
        kernel_size: k.
    """

    def __init__(self, width: int, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dwconv = DepthwiseConv2d(width, 3, stride=2)
        self.weights = PointwiseConv2d(width, num_heads * kernel_size**4, bias=False)
        self.values = PointwiseConv2d(width, width, bias=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Y_d1 before its propagation. Patches beyond the map are 0, and are among those that weights are given to."""
        sides, area = x.shape[-2:], self.kernel_size**2
        window = {"kernel_size": self.kernel_size, "padding": self.kernel_size // 2, "stride": 2}
        logits = self.weights(self.dwconv(x)).flatten(2).transpose(1, 2)  # [B, N, M*k^4], N = h*w
        weights = logits.unflatten(2, (self.num_heads, area, area)).softmax(dim=-1)  # [B, N, M, k^2, k^2]
        columns = F.unfold(self.values(x), **window).transpose(1, 2)  # [B, N, C*k^2]
        values = columns.unflatten(2, (self.num_heads, -1, area)).transpose(3, 4)  # [B, N, M, k^2, D]
        mixed = (weights @ values).transpose(3, 4).flatten(2).transpose(1, 2)  # [B, C*k^2, N]
        return F.fold(mixed, sides, **window).contiguous(memory_format=torch.channels_last)


class GlobalAttention(nn.Module):
    """G-MHSA: every patch attends to all, softmax(q · kᵀ / √D) · v for each head, then a 1×1 conv."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = PointwiseConv2d(width, 3 * width, bias=False)
        self.proj = PointwiseConv2d(width, width, bias=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Views alone between the two convolutions: in channels_last the D numbers of a head lie side by side."""
        heads = self.qkv(x).flatten(2).unflatten(1, (3, self.num_heads, -1)).transpose(3, 4)  # [B, 3, M, N, D]
        out = attention(*heads.unbind(1)).transpose(2, 3).flatten(1, 2)  # [B, C, N]
        return self.proj(out.unflatten(2, x.shape[-2:]))


class DynamicOperator(nn.Module):
    """The dynamic operator: low frequencies, by attention within windows of patches and among all patches.

    Eq. 3.6:  Y_d2 = Prop(G-MHSA(PEi₄(X_d2)))
    Eq. 3.7:  Y_d1 = Prop(C-MHSA(PEi₃(X_d1)))
    Eq. 3.8:  Y_d = Conv₁ₓ₁(Concat(Y_d1, Y_d2))

        X_d1, X_d2  the halves of X_d      [B, C_d/2, H, W] each
        PEi₃, PEi₄  with means of patches of p = 4 and p = 6
        Conv₁ₓ₁     `fuse`

    Args:
        widths: channels of X_d1 and X_d2; one of them may be 0, and its branch is left out.
        num_heads: of both attentions.
        config: the rest.
    """

    def __init__(self, widths: tuple[int, int], num_heads: int, config: DynamicConfig) -> None:
        super().__init__()
        mixers = (
            lambda width: ConvAttention(width, num_heads, config.conv_kernel_size),
            lambda width: GlobalAttention(width, num_heads),
        )
        sizes = (config.conv_patch_size, config.global_patch_size)
        self.widths = [width for width in widths if width]
        self.branches = nn.ModuleList(
            PatchMixer(width, patch_size, config.expansion, False, mixer(width * config.expansion))
            for width, patch_size, mixer in zip(widths, sizes, mixers, strict=True)
            if width
        )
        self.fuse = PointwiseConv2d(sum(widths), sum(widths), bias=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Y_d of Eq. 3.8."""
        parts = x.split(self.widths, dim=1)
        return self.fuse(torch.cat([branch(part) for branch, part in zip(self.branches, parts, strict=True)], dim=1))


class SpatialInteraction(nn.Module):
    """MSI, the multi-scale spatial interaction of a block (Fig. 3.3): both operators, each on its channels.

        X_s, X_d = the first C_s and the other channels of W₁ ⊗ BN(X),   MSI(X) = W₂ ⊗ Concat(Y_s, Y_d)

        X       argument                       [B, C, H, W]
        W₁, W₂  1×1 convs `proj_in`, `proj_out`

    Deviates from the thesis: it names neither W₁ nor W₂, but its Baseline (Table 3.5: both operators the identity)
    needs two C×C matrices a block (2.099 M, 0.48 G; 1.80 M and 0.42 G without them). Nor does it state C_s : C_d. 3 : 1
    gives the GFLOPs of all three sizes (0.545, 0.711, 1.909; with 1 : 1 0.52, 0.67, 1.82), and every parameter count
    but XTiny's; Table 3.5's "+C-MHSA" has its 3.10 M with 1 : 1, and then not its 0.55 G. The norm is not named: BN.
    """

    norm_conv_pairs = (("norm", "proj_in"),)  # for `reparameterize`

    def __init__(self, config: EMSNetConfig, stage: int) -> None:
        super().__init__()
        width, (static, dynamic) = config.widths[stage], config.split(stage)
        self.norm = nn.BatchNorm2d(width)
        self.proj_in = PointwiseConv2d(width, width, bias=False)
        operators: list[nn.Module] = []
        if static:
            operators.append(StaticOperator(static, config.static))
        if dynamic:
            operators.append(DynamicOperator(config.dynamic_widths(stage), config.num_heads[stage], config.dynamic))
        self.widths = [part for part in (static, dynamic) if part]
        self.operators = nn.ModuleList(operators)
        self.proj_out = PointwiseConv2d(width, width, bias=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The same shape."""
        parts = self.proj_in(self.norm(x)).split(self.widths, dim=1)
        mixed = [operator(part) for operator, part in zip(self.operators, parts, strict=True)]
        return self.proj_out(torch.cat(mixed, dim=1))


class EMSBlock(nn.Module):
    """EMS block: X ← X + MSI(X), then X ← X + MLP(X), MLP(X) = W₄ ⊗ GELU(W₃ ⊗ BN(X)), the channel MLP interaction.

        X       argument                        [B, C, H, W]
        W₃, W₄  1×1 convs in `mlp`, C -> R -> C, R = ratio · C

    Deviates from the thesis: it names no activation in the MLP (GELU), no norm (BN) and no drop path rates (linear over
    the blocks, as in Swin, whose stochastic depth it takes over).
    """

    def __init__(self, config: EMSNetConfig, stage: int, drop_path_rate: float) -> None:
        super().__init__()
        width, hidden = config.widths[stage], config.widths[stage] * config.mlp_ratios[stage]
        self.mixer = SpatialInteraction(config, stage)
        self.mlp = nn.Sequential(
            nn.BatchNorm2d(width),
            PointwiseConv2d(width, hidden, activation="gelu", bias=False),
            PointwiseConv2d(hidden, width, bias=False),
        )
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The same shape."""
        x = self.drop_path(x, self.mixer(x))
        return self.drop_path(x, self.mlp(x))


class EMSStage(Stage):
    """What halves the map (nothing in the first stage), then blocks of one width."""

    def __init__(self, config: EMSNetConfig, stage: int, drop_path_rates: list[float]) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if stage:
            self.downsample = conv_bn(config.widths[stage - 1], config.widths[stage])
        self.blocks = nn.ModuleList(EMSBlock(config, stage, rate) for rate in drop_path_rates)

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """H = ceil(h / 2), W = ceil(w / 2) from the second stage on."""
        x = self.downsample(x)
        for block in self.blocks:
            x = self.run_block(block, x)
        return x


class EMSNet(Backbone):
    """Stem, four stages, mean over the map, linear classifier (section 3.3, Fig. 3.2).

    Images may have any sides: every conv of stride 2 turns n into ceil(n / 2), and patches at an edge may be smaller.
    The pyramid's maps have strides 4, 8, 16, 32 and `widths` channels; each is its stage's output.

    Deviates from the thesis: it does not say how stages 2 to 4 begin (3×3 conv of stride 2 and BN, by count), how wide
    the stem's first conv is (C₁, by count) and that a GELU stands between its two. XTiny's printed 3.0 M are not those
    of its row of Table 3.1, which makes 2.32 M and the printed 0.7 G; no reading tried that keeps the other sizes'
    numbers reaches them, and the table is what is built.

    Args:
        config: the size.
        num_classes: width of the classifier; 0 for none.
        in_chans: channels of the image.
    """

    def __init__(self, config: EMSNetConfig, *, num_classes: int, in_chans: int = 3) -> None:
        super().__init__(
            num_classes=num_classes,
            in_chans=in_chans,
            num_features=config.widths[-1],
            feature_info=[
                {"num_chs": width, "reduction": 4 * 2**stage, "module": f"layers.{stage}", "hook_type": "forward"}
                for stage, width in enumerate(config.widths)
            ],
        )
        self.config = config
        width = config.widths[0]
        self.patch_embed = nn.Sequential(conv_bn(in_chans, width), nn.GELU(), conv_bn(width, width))
        rates = rates_of_blocks(config.drop_path_rate, config.depths)
        self.layers = nn.ModuleList(EMSStage(config, stage, rates[stage]) for stage in range(NUM_STAGES))
        self.reset_classifier(num_classes)

    def embed(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """The map at stride 4."""
        return self.patch_embed(x)

    def run_stage(self, stage: int, x: Float[Tensor, "B C H W"]) -> StageOutput:
        """A stage's output, which is the level of the pyramid too."""
        x = self.layers[stage](x)
        return StageOutput(x, x)

    def final_norm(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """None: the thesis names no norm before the pooling."""
        return x

    def drop_after(self, stage: int) -> None:
        """Remove the later stages."""
        self.layers = self.layers[: stage + 1]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The stem, then each block in order; what halves the map goes with the stage's first block."""
        blocks = [(r"^layers\.(\d+)\.downsample", (0,)), (r"^layers\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else blocks}


def conv_bn(in_channels: int, out_channels: int) -> nn.Sequential:
    """3×3 conv of stride 2 and BatchNorm: a side of n pixels becomes ceil(n / 2)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, 2, padding=1, bias=False), nn.BatchNorm2d(out_channels)
    )
