"""FAT, the Fully Adaptive Transformer (Fan et al., "Lightweight Vision Transformer with Bidirectional Interaction").

Module names are those of the authors' code, so that its checkpoints load as they are. "LN" of the paper is everywhere
`GroupNorm(1, C)`, mean and variance over C, H and W of one image together, where the paper writes LN without more.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from fat_train.layer.conv import DepthwiseConv2d, PointwiseConv2d
from fat_train.layer.drop_path import DropPath, rates_of_blocks
from fat_train.layer.norm import WholeMapNorm
from fat_train.model.backbone import Backbone, Stage, StageOutput
from fat_train.op.attention import attention
from fat_train.op.interaction import interaction
from fat_train.types import UserError

GATES = ("released", "paper")
NUM_STAGES = 4
CONV_FFN_KERNEL = POOL_KERNEL = 5


@dataclass(frozen=True, kw_only=True)
class InteractionConfig:
    """How FASA's local and global parts modulate each other (Eq. 9 to 11)."""

    gate: str = "released"
    """`released`: the global part gates the local one, not the other way round. `paper`: both ways, all of Eq. 11."""

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise UserError(f"model.interaction.gate must be one of {', '.join(GATES)}; got {self.gate}")


@dataclass(frozen=True, kw_only=True)
class FATConfig:
    """A size of FAT (Table 6). Lists have one entry for each of the four stages."""

    name: str
    """What `create_model` and timm call it, and what a checkpoint says it holds."""
    widths: list[int]
    """Channels C; the first one is even (the stem's first conv has half of it)."""
    depths: list[int]
    """Blocks; the last block of stages 1 to 3 halves the map."""
    num_heads: list[int]
    """Attention heads M; each divides its stage's width."""
    kernel_sizes: list[int] = field(default_factory=lambda: [3, 5, 7, 9])
    """Side of the depth-wise kernel of the positional encoding and of FASA's local part; odd."""
    kv_reductions: list[int] = field(default_factory=lambda: [8, 4, 2, 1])
    """Factor by which keys and values are down-sampled, along each side; a power of two."""
    mlp_ratios: list[int] = field(default_factory=lambda: [4, 4, 4, 4])
    """Hidden channels of ConvFFN over C."""
    drop_path_rate: float = 0.0
    """Probability that the last block's branches are skipped for an image; rises linearly from 0 at the first block."""
    interaction: InteractionConfig = field(default_factory=InteractionConfig)
    """Gating between the local and the global part."""

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "num_heads", "kernel_sizes", "kv_reductions", "mlp_ratios"):
            values = getattr(self, name)
            if len(values) != NUM_STAGES or min(values) < 1:
                raise UserError(f"model.{name} must be {NUM_STAGES} numbers of at least 1, one a stage; got {values}")
        if self.widths[0] % 2:
            raise UserError(f"model.widths must start with an even number; got {self.widths}")
        if any(width % heads for width, heads in zip(self.widths, self.num_heads, strict=True)):
            raise UserError(f"model.num_heads must divide model.widths {self.widths}; got {self.num_heads}")
        if any(size % 2 == 0 for size in self.kernel_sizes):
            raise UserError(f"model.kernel_sizes must be odd; got {self.kernel_sizes}")
        if any(reduction & (reduction - 1) for reduction in self.kv_reductions):
            raise UserError(f"model.kv_reductions must be powers of two; got {self.kv_reductions}")
        if not 0 <= self.drop_path_rate < 1:
            raise UserError(f"model.drop_path_rate must be in [0, 1); got {self.drop_path_rate}")

    def build(self, num_classes: int, in_chans: int = 3) -> FAT:
        """A network of this size, initialised by PyTorch's defaults."""
        return FAT(self, num_classes=num_classes, in_chans=in_chans)


class ConvBNReLU(nn.Module):
    """Conv 3×3, BatchNorm, ReLU: one step of the stem."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()
        )

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """Convolve, normalise, clip at 0."""
        return self.conv(x)


class Stem(nn.Module):
    """Image to tokens at a quarter of its sides (section 3.1; Table 6, "Conv Stem").

    Four 3×3 convs of C/2, C, C, C channels and strides 2, 2, 1, 1, each with BN and ReLU; then a 1×1 conv and LN.
    """

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        self.conv1 = ConvBNReLU(in_chans, width // 2, stride=2)
        self.conv2 = ConvBNReLU(width // 2, width, stride=2)
        self.conv3 = ConvBNReLU(width, width, stride=1)
        self.conv4 = ConvBNReLU(width, width, stride=1)
        self.conv5 = PointwiseConv2d(width, width)
        self.layernorm = WholeMapNorm(width)

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """H = ceil(h / 4), W = ceil(w / 4)."""
        x = self.conv2(self.conv1(x))  # [B, C, H, W]
        return self.layernorm(self.conv5(self.conv4(self.conv3(x))))


class FineGrainedPool(nn.Sequential):
    """The down-sampling of keys and values.

    Eq. 6:  BaseUnit(X) ≜ Conv1×1(BN(DWConv(X))),   pool(X) ≜ BN(DWConv(BaseUnit⁽ⁿ⁾(X)))

        X  argument      [B, C, H, W]
        n  base units    log2(reduction) − 1, each halving both sides, as does the DWConv that ends the pool

    DWConv is 5×5 with stride 2, so a side of n pixels becomes ceil(n / reduction). Reduction 1 is the identity.

    Deviates from the paper: nothing in Eq. 6; the text above it ends each unit with a 1×1 conv, the last one too, which
    neither Eq. 6 nor the released code has.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        units = reduction.bit_length() - 1
        steps: OrderedDict[str, nn.Module] = OrderedDict()
        for unit in range(units):
            steps[f"conv{unit}"] = DepthwiseConv2d(channels, POOL_KERNEL, stride=2)
            steps[f"bn{unit}"] = nn.BatchNorm2d(channels)
            if unit + 1 < units:
                steps[f"linear{unit}"] = PointwiseConv2d(channels, channels)
        super().__init__(steps)


class FASA(nn.Module):
    """Fully Adaptive Self-Attention: attention and a self-modulated convolution of one query, each gating the other.

    Context-aware aggregation, in general, of a token x_i with its context X: 𝒜 aggregates, ℳ modulates, ℱ is a
    non-linearity.

    Eq. 2:  y_i = 𝒜(ℱ(ℳ(x_i, X)), X)              self-attention: `aggregate_global`
    Eq. 3:  y_i = ℳ(𝒜(x_i, X), x_i)                the modulating ConvNets from which Eq. 4 starts; not in FASA
    Eq. 4:  y_i = ℳ(ℱ(𝒜(x_i, X)), 𝒜(x_i, X))       the local part: 𝒜 is `local_mixer`, ℳ and ℱ are in `interaction`
    Eq. 5:  y_i = ℳ(ℱ(𝒜₁(x_i, X)), 𝒜₂(x_i, X))     the interaction: `interact`

    Args:
        width: channels C.
        num_heads: heads M of D = C / M channels; attention logits are scaled by D^−½.
        kernel_size: side of the local part's DWConv.
        kv_reduction: factor of `FineGrainedPool`.
        gate: `released` or `paper`, see `InteractionConfig`.
    """

    def __init__(self, width: int, num_heads: int, kernel_size: int, kv_reduction: int, gate: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.gate = gate
        self.q = PointwiseConv2d(width, width)
        self.kv = PointwiseConv2d(width, 2 * width)
        self.local_mixer = DepthwiseConv2d(width, kernel_size)
        self.mixer = PointwiseConv2d(width, width)
        self.pool = FineGrainedPool(width, kv_reduction)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Y of Eq. 11."""
        q = self.q(x)
        return self.interact(self.local_mixer(q), self.aggregate_global(q, x))

    def aggregate_global(self, q: Float[Tensor, "B C H W"], x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Attention of every token to the down-sampled map, without a projection after it.

        Eq. 7:  Q, K, V = W₁ ⊗ X,   X'_global = MHSA(Q, pool(K), pool(V))

            X         `x`                    [B, C, H, W]
            Q         `q`, from `self.q`     [B, C, H, W]  -> [B, M, H·W, D]
            K, V      from `self.kv`         [B, 2C, h, w] -> [B, M, N, D] each, N = h·w, h = ceil(H / reduction)
            W₁        the weights of `q` and `kv` (rows of Q; rows of K, then of V)

        Deviates from the paper: X is pooled, and K and V are one 1×1 conv of the pooled map (released code): one pool
        instead of two, and W₁'s rows of K and V act on pool(X).
        """
        height, width = q.shape[-2:]
        k, v = self.kv(self.pool(x)).chunk(2, dim=1)  # [B, C, h, w] each
        out = attention(self._heads(q), self._heads(k), self._heads(v))  # [B, M, H*W, D]
        return out.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width))  # [B, C, H, W]

    def _heads(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M N D"]:
        """Views alone: in channels_last the D numbers of a head lie side by side, as the fused kernels want them."""
        return x.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)  # [B, M, N, D]

    def interact(
        self, q_prime: Float[Tensor, "B C H W"], global_: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B C H W"]:
        """Let the local part weigh itself, gate each part by the other, multiply them, mix the channels.

        Eq. 8:   Q' = DWConv(Q),   X'_local = Q' ⊙ Sigmoid(Q')
        Eq. 9:   X_local  = X'_local ⊙ Sigmoid(X'_global)
        Eq. 10:  X_global = X'_global ⊙ Sigmoid(X'_local)
        Eq. 11:  Y = W₂ ⊗ (X_global ⊙ X_local)

            Q'         `q_prime`, `local_mixer` of the query of Eq. 7   [B, C, H, W]
            X'_global  `global_`, of Eq. 7                              [B, C, H, W]
            W₂         weight of `self.mixer`

        Z ⊙ Sigmoid(Z) is SiLU(Z), so that without Eq. 10's factor Y = W₂ ⊗ (SiLU(X'_global) ⊙ SiLU(Q')).

        Deviates from the paper: `gate="released"` leaves out Eq. 11's last factor, Sigmoid(X'_local), as the text
        below Eq. 11 and the released code do (Table 10: equal accuracy, faster); `gate="paper"` keeps it.
        """
        return self.mixer(interaction(q_prime, global_, both_ways=self.gate == "paper"))


class ConvFFN(nn.Module):
    """The feed-forward part, with a depth-wise conv on the hidden channels, which also does the down-sampling.

    ConvFFN of Eq. 1:  H = GELU(W₁ ⊗ X),   ConvFFN(X) = W₂ ⊗ BN(H + DWConv(H))  at stride 1,
                                           ConvFFN(X) = W₂ ⊗ BN(DWConv(H))      at stride 2

        X          argument                    [B, C, H, W]
        H          hidden, ratio × C channels  [B, R, H, W]
        W₁, W₂     1×1 convs `fc1`, `fc2`      C -> R, R -> C' (the next stage's width at stride 2)
        DWConv     5×5                         H -> ceil(H / stride)

    Deviates from the paper: nothing; the paper fixes the kernel (5) and the strides, the released code the rest.
    """

    conv_norm_pairs = (("dwconv", "bn"),)  # for `reparameterize`

    def __init__(self, width: int, out_width: int, ratio: int, stride: int) -> None:
        super().__init__()
        hidden = width * ratio
        self.fc1 = PointwiseConv2d(width, hidden, activation="gelu")
        self.dwconv = DepthwiseConv2d(hidden, CONV_FFN_KERNEL, stride, residual=stride == 1)
        self.bn = nn.BatchNorm2d(hidden)
        self.fc2 = PointwiseConv2d(hidden, out_width)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """Same map at stride 1; half the sides and `out_width` channels at stride 2."""
        x = self.fc1(x)  # [B, R, H, W]
        x = self.dwconv(x)  # [B, R, h, w]; at stride 1 with its residual
        return self.fc2(self.bn(x))  # [B, c, h, w]


class FATBlock(nn.Module):
    """A block of FAT.

    Eq. 1:  X = CPE(X_in) + X_in
            Y = FASA(LN(X)) + X
            Z = ConvFFN(LN(Y)) + ShortCut(Y)

        X_in, X, Y   [B, C, H, W]     CPE, conditional positional encoding: DWConv of the stage's kernel
        Z            [B, C', h, w]    = [B, C, H, W] in a stage; at its end h = ceil(H / 2), C' the next width
        ShortCut     the identity in a stage; at its end DWConv 5×5 of stride 2, BN, 1×1 conv (`downsample`)

    Deviates from the paper: its text names no BN in the short cut (released code); FASA's and ConvFFN's branches pass
    through drop path ("increasing stochastic depth", section 4.1), which Eq. 1 leaves out.

    Args:
        config: the network's.
        stage: which of its stages, from 0.
        downsamples: whether this block ends its stage and halves the map.
        drop_path_rate: probability in [0, 1) that a branch is skipped for an image, in training.
    """

    def __init__(self, config: FATConfig, stage: int, *, downsamples: bool, drop_path_rate: float) -> None:
        super().__init__()
        width, kernel_size = config.widths[stage], config.kernel_sizes[stage]
        out_width, stride = (config.widths[stage + 1], 2) if downsamples else (width, 1)
        self.cpe = DepthwiseConv2d(width, kernel_size, residual=True)
        self.norm1 = WholeMapNorm(width)
        self.attn = FASA(
            width, config.num_heads[stage], kernel_size, config.kv_reductions[stage], config.interaction.gate
        )
        self.drop_path = DropPath(drop_path_rate)
        self.norm2: nn.Module = WholeMapNorm(width)
        self.downsample: nn.Module = nn.Identity()
        if downsamples:
            self.downsample = nn.Sequential(
                DepthwiseConv2d(width, CONV_FFN_KERNEL, stride),
                nn.BatchNorm2d(width),
                PointwiseConv2d(width, out_width),
            )
        self.ffn: ConvFFN | None = ConvFFN(width, out_width, config.mlp_ratios[stage], stride)

    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B c h w"]]:
        """(Y, Z) of Eq. 1: the next block reads Z; Y of a stage's last block is the pyramid's map."""
        x = self.cpe(x)  # with its residual
        y = self.drop_path(x, self.attn(self.norm1(x)))
        if self.ffn is None:
            return y, y
        z = self.drop_path(self.downsample(y), self.ffn(self.norm2(y)))  # [B, c, h, w]
        return y, z

    def drop_ffn(self) -> None:
        """End at Y."""
        self.norm2, self.downsample, self.ffn = nn.Identity(), nn.Identity(), None


class FATStage(Stage):
    """Blocks of one width; the last one hands a map of half the sides to the next stage, if there is one."""

    def __init__(self, config: FATConfig, stage: int, drop_path_rates: list[float]) -> None:
        super().__init__()
        self.downsamples = stage + 1 < NUM_STAGES
        last = len(drop_path_rates) - 1
        self.blocks = nn.ModuleList(
            FATBlock(config, stage, downsamples=self.downsamples and index == last, drop_path_rate=rate)
            for index, rate in enumerate(drop_path_rates)
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> StageOutput:
        """The last Y and the last Z; where nothing is down-sampled, Z is the last map of this stride too."""
        y = x
        for block in self.blocks:
            y, x = self.run_block(block, x)
        return StageOutput(y if self.downsamples else x, x)

    def drop_last_ffn(self) -> None:
        """End at the last Y, which is all that a feature extractor wants of its last stage."""
        last = self.blocks[-1]
        assert isinstance(last, FATBlock)
        last.drop_ffn()


class FAT(Backbone):
    """Stem, four stages, LN, mean over the map, linear classifier (section 3.1, Fig. 3).

    Images may have any sides: every conv of stride 2 turns n into ceil(n / 2), so nothing is padded or refused.

    The pyramid's maps have strides 4, 8, 16, 32 and `widths` channels. Each stage's last block halves the map, so the
    stages' outputs have strides 8, 16, 32, 32; the map that stands for stride 4, 8, 16 is Y of Eq. 1 in the last
    block of stage 1, 2, 3 (after its attention, before its down-sampling ConvFFN): the last tensor of that stride. The
    one of stride 32 is the output of stage 4, before the final LN.

    Deviates from the paper: the LN before the pooling is the released code's; section 3.1 does not name it.

    Args:
        config: the size.
        num_classes: width of the classifier; 0 for none.
        in_chans: channels of the image.
    """

    def __init__(self, config: FATConfig, *, num_classes: int, in_chans: int = 3) -> None:
        super().__init__(
            num_classes=num_classes,
            in_chans=in_chans,
            num_features=config.widths[-1],
            feature_info=_feature_info(config),
        )
        self.config = config
        self.patch_embed = Stem(in_chans, config.widths[0])
        rates = rates_of_blocks(config.drop_path_rate, config.depths)
        self.layers = nn.ModuleList(FATStage(config, stage, rates[stage]) for stage in range(NUM_STAGES))
        self.norm: nn.Module = WholeMapNorm(config.widths[-1])
        self.reset_classifier(num_classes)

    def embed(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """Tokens at stride 4."""
        return self.patch_embed(x)

    def run_stage(self, stage: int, x: Float[Tensor, "B C H W"]) -> StageOutput:
        """Y of the stage's last block (its output where it does not down-sample), and its output."""
        return self.layers[stage](x)

    def final_norm(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """LN before the pooling."""
        return self.norm(x)

    def drop_after(self, stage: int) -> None:
        """Remove the later stages, and the down-sampling half of this stage's last block."""
        self.layers = self.layers[: stage + 1]
        last = self.layers[stage]
        assert isinstance(last, FATStage)
        last.drop_last_ffn()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The stem, then each block in order; the final LN goes with the last block."""
        blocks = [(r"^layers\.(\d+)" if coarse else r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": blocks}


def _feature_info(config: FATConfig) -> list[dict[str, Any]]:
    """Y of Eq. 1 is what enters the last block's second LN; the last stage's output is what enters the final LN."""
    modules = [f"layers.{stage}.blocks.{config.depths[stage] - 1}.norm2" for stage in range(NUM_STAGES - 1)] + ["norm"]
    return [
        {"num_chs": width, "reduction": 4 * 2**stage, "module": module, "hook_type": "forward_pre"}
        for stage, (width, module) in enumerate(zip(config.widths, modules, strict=True))
    ]
