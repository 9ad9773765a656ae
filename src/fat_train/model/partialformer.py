"""PartialFormer (X.-T. Vo's doctoral thesis, chapter 5, "Efficient Vision Transformers with Partial Attention").

No code of its author is known. Where the thesis is silent or contradicts itself, the reading here is one that meets the
parameters and FLOPs of Table 5.1 at all five sizes; other readings meet them too, so each open choice is a field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from fat_train.layer.conv import DepthwiseConv2d, PointwiseConv2d
from fat_train.layer.drop_path import DropPath, rates_of_blocks
from fat_train.layer.mlp import ConvHead, ConvMlp
from fat_train.model.backbone import Stage, StagedBackbone, levels_of
from fat_train.types import UserError, one_of

NUM_STAGES = 4
STEMS = ("conv", "depthwise", "patch")
PROJECTED = ("foreground", "all")
ORDERS = ("printed", "query_first")
MIN_CHANNEL_HIDDEN = 8
SCORE_LEVELS = 4096


@dataclass(frozen=True, kw_only=True)
class PartialFormerConfig:
    """A size of PartialFormer (Table 5.1). Lists have one entry for each of the four stages."""

    name: str
    """What `create_model` and timm call it, and what a checkpoint says it holds."""
    widths: list[int]
    """Channels d; the first one is even (the stem's first conv has half of it)."""
    depths: list[int]
    """Blocks L."""
    num_heads: list[int]
    """Heads h; each divides its stage's width."""
    foreground_fractions: list[float] = field(default_factory=lambda: [1 / 64, 1 / 16, 1 / 4, 1 / 4])
    """N_F over N, in (0, 1): 49, 49, 49 and 12 tokens of a 224 px image; never none, never all."""
    head_expansion: int = 1
    """e, of HeadMLP (Eq. 5.5): heads between its two layers over h."""
    reduction: int = 24
    """r, of ChannelMLP (Eq. 5.7): it has max(8, d // r) hidden channels."""
    out_proj: str = "foreground"
    """Tokens that the last projection acts on: `foreground`, as Eq. 5.9 counts it, or `all`."""
    sqa_order: str = "printed"
    """Of SQA's products (Eq. 5.6): `printed`, or `query_first`, the same function without a key or value a token."""
    peg_kernel: int = 3
    """Side of the positional encoding's depth-wise kernel; odd."""
    mlp_ratio: int = 4
    """Hidden channels of the MLP over d."""
    mlp_kernel: int = 3
    """Side of the depth-wise kernel on the MLP's hidden channels, odd; 0 for none, which is the text's MLP."""
    stem: str = "conv"
    """`conv`: three 3×3 convs; `depthwise`: the second of them depth-wise; `patch`: one 4×4 conv."""
    head_width: int = 1280
    """Channels to which a 1×1 conv widens the last map before it is pooled; 0 for none, which is the text's head."""
    drop_path_rate: float = 0.0
    """Probability that the last block's branches are skipped for an image; rises linearly from 0 at the first block."""

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "num_heads"):
            values = getattr(self, name)
            if len(values) != NUM_STAGES or min(values) < 1:
                raise UserError(f"model.{name} must be {NUM_STAGES} numbers of at least 1, one a stage; got {values}")
        if self.widths[0] % 2:
            raise UserError(f"model.widths must start with an even number; got {self.widths}")
        if any(width % heads for width, heads in zip(self.widths, self.num_heads, strict=True)):
            raise UserError(f"model.num_heads must divide model.widths {self.widths}; got {self.num_heads}")
        fractions = self.foreground_fractions
        if len(fractions) != NUM_STAGES or not all(0 < fraction < 1 for fraction in fractions):
            raise UserError(
                f"model.foreground_fractions must be {NUM_STAGES} numbers between 0 and 1, one a stage; got {fractions}"
            )
        for name in ("head_expansion", "reduction", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1; got {getattr(self, name)}")
        if self.peg_kernel % 2 == 0 or self.peg_kernel < 1:
            raise UserError(f"model.peg_kernel must be odd; got {self.peg_kernel}")
        if self.mlp_kernel and (self.mlp_kernel % 2 == 0 or self.mlp_kernel < 1):
            raise UserError(f"model.mlp_kernel must be odd, or 0 for none; got {self.mlp_kernel}")
        if self.head_width < 0:
            raise UserError(f"model.head_width must be at least 0; got {self.head_width}")
        one_of("model.out_proj", self.out_proj, PROJECTED)
        one_of("model.sqa_order", self.sqa_order, ORDERS)
        one_of("model.stem", self.stem, STEMS)
        if not 0 <= self.drop_path_rate < 1:
            raise UserError(f"model.drop_path_rate must be in [0, 1); got {self.drop_path_rate}")

    def build(self, num_classes: int, in_chans: int = 3) -> PartialFormer:
        """A network of this size, initialised by PyTorch's defaults; abstract tokens have a deviation of 0.02."""
        return PartialFormer(self, num_classes=num_classes, in_chans=in_chans)


class Stem(nn.Sequential):
    """Image to tokens at a quarter of its sides, ceil(n / 4); a BN behind each conv, a GELU between two of them.

    The thesis says "convolution-based patch embedding" alone. `conv`: 3×3 convs of C/2, C/2, C channels and strides 2,
    1, 2. `depthwise`: its second one is depth-wise. `patch`: one 4×4 conv of stride 4.
    """

    def __init__(self, in_chans: int, width: int, kind: str) -> None:
        half = width // 2
        if kind == "patch":
            super().__init__(nn.Conv2d(in_chans, width, 4, 4, bias=False), nn.BatchNorm2d(width))
        else:
            middle = nn.Conv2d(half, half, 3, 1, padding=1, bias=False)
            super().__init__(
                nn.Conv2d(in_chans, half, 3, 2, padding=1, bias=False),
                *(nn.BatchNorm2d(half), nn.GELU()),
                DepthwiseConv2d(half, 3, bias=False) if kind == "depthwise" else middle,
                *(nn.BatchNorm2d(half), nn.GELU()),
                nn.Conv2d(half, width, 3, 2, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
        self.multiple = 4 if kind == "patch" else 1

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """H = ceil(h / 4), W = ceil(w / 4); whole patches come from zeros on the right and below."""
        right, below = -x.shape[3] % self.multiple, -x.shape[2] % self.multiple
        return super().forward(F.pad(x, (0, right, 0, below)) if right or below else x)


def num_foreground(fraction: float, num_tokens: int) -> int:
    """N_F: the fraction rounded down, at least one token; but one is always left for the background, all of N = 1."""
    return min(max(1, int(fraction * num_tokens)), num_tokens - 1)


def foreground(x: Float[Tensor, "B C H W"], count: int) -> Int[Tensor, "B F"]:
    """The places i·W + j of the tokens with the highest score, in no particular order.

    Eq. 5.4:  c = Mean(X),   s = Sort(c),   X_G = Gather(X, s),   X_F = X_G[: N_F],   X_B = X_G[N_F :]

        c    mean over the channels, in float32                   [B, N]
        s    places by descending c; those of X_F are returned    [B, F], F = N_F, `count`

    The score chooses and does no more: no gradient passes it. Nothing in the attention depends on the order within X_F
    or X_B, so that the highest N_F are looked for and nothing is sorted. Of equal scores the earlier places are taken:
    torch's top-k promises nothing about equals, so it finds the N_F-th score first, and then works on integers that
    differ among the equals of that one.

    Deviates from the document: it prints X_F = X[:, N_F, :], which is one token. Scores are rounded to whole 4096ths of
    the image's largest |c|. A picture's plain parts have scores that are equal but for rounding errors, and these would
    choose, differently with each kernel and batch: one token more or less moves an untrained B0's logits by a tenth of
    their standard deviation.
    """
    score = x.detach().mean(dim=1, dtype=torch.float32).flatten(1)  # [B, N]
    largest = score.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)  # a black map has 0
    score = (score * (SCORE_LEVELS / largest)).round()
    least = score.topk(max(1, count), dim=1).values[:, -1:]  # [B, 1]
    num_tokens = score.shape[1]
    before = torch.arange(num_tokens, 0, -1, device=x.device)
    return torch.where(score > least, num_tokens + 1, torch.where(score == least, before, 0)).topk(count).indices


def mix_heads(weight: Float[Tensor, "g h"], maps: Float[Tensor, "B h Q N"]) -> Float[Tensor, "B g Q N"]:
    """A fully-connected layer across the heads, for each pair of a query and a key by itself."""
    batch, _, queries, keys = maps.shape
    return (weight.expand(batch, -1, -1) @ maps.flatten(2)).unflatten(2, (queries, keys))


class PartialAttention(nn.Module):
    """Attention among the few foreground tokens; the background is asked by one query that has seen these.

    Of tokens X, separated into X_F and X_B by `foreground`:

    Eq. 5.1, 5.2:  MSA(X) = concat[Softmax(Q Kᵀ / √d_h) V] W_O,   Q, K, V = X W_Q, X W_K, X W_V
    Eq. 5.5:       A_F = HeadMLP(Q_F K_Fᵀ / √d_h),   O_F = concat[A_F V_F] W_O                        `mix_foreground`
    Eq. 5.6:       Y_B = Softmax(Q_A K_Bᵀ / √d_h) V_B                                               `query_background`
    Eq. 5.7:       Y'_B = ChannelMLP(Y_B),   O_B = X_B + Y'_B

        X            map `x`, tokens [B, N, d]; X_F [B, F, d], X_B the other N − F
        W_Q, W_K, W_V  `qkv`, a 1×1 conv with biases, the same for both sets     W_O  `proj`
        HeadMLP      across heads: FC h -> e·h, Softmax over the keys, FC e·h -> h: `before`, `after`
        Q_A          the abstract token's row of O_F, for which `abstract` [d] stands before the foreground tokens in
                     Eq. 5.5, as query, key and value; not projected by W_Q again
        ChannelMLP   FC d -> max(8, d // r), LN, ReLU, FC -> d, added to every background token alike

    O_F and O_B go back to the places that X_F and X_B came from. (Eq. 5.3 is other papers' attention.)

    The background is not gathered: SQA asks all tokens, under a mask. `printed` projects every token, as Eq. 5.8
    counts, though nothing reads the queries of the background. `query_first` projects the foreground alone: of a single
    query, Q_A (X W_K)ᵀ is (Q_A W_Kᵀ) Xᵀ, and its weights times X W_V are (weights times X) W_V, head by head, which
    makes 2·h·d·N products of 3·d²·N. The parameters are the same, and so is the function, up to rounding.

    Deviates from the document: HeadMLP has no biases. The first one's would change nothing, as it is the same for all
    keys; the second one's would weigh by the number of foreground tokens, which grows with the image. ChannelMLP has at
    least 8 hidden channels, as a LN over one (B0's 24 // 24) leaves nothing of it: 0.1 % of B0's parameters.

    Args:
        width: channels d.
        num_heads: heads h of d_h = d / h channels.
        fraction: N_F over N.
        head_expansion: e.
        reduction: r.
        out_proj: whether W_O acts on the `foreground` tokens or, once they are back among the others, on `all`.
        sqa_order: `printed` or `query_first`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        fraction: float,
        head_expansion: int,
        reduction: int,
        out_proj: str,
        sqa_order: str,
    ) -> None:
        super().__init__()
        self.num_heads, self.fraction = num_heads, fraction
        self.project_all, self.query_first = out_proj == "all", sqa_order == "query_first"
        self.abstract = nn.Parameter(0.02 * torch.randn(width))
        self.qkv = PointwiseConv2d(width, 3 * width)
        self.before = nn.Linear(num_heads, head_expansion * num_heads, bias=False)
        self.after = nn.Linear(head_expansion * num_heads, num_heads, bias=False)
        self.proj = nn.Linear(width, width)
        hidden = max(MIN_CHANNEL_HIDDEN, width // reduction)
        self.channel_mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, width)
        )

    def forward(self, x: Float[Tensor, "B C H W"], places: Int[Tensor, "B F"]) -> Float[Tensor, "B C H W"]:
        """O_F and O_B in their places, of the tokens `x` whose foreground is at `places`."""
        size, tokens = x.shape[2:], x.flatten(2).transpose(1, 2)  # [B, N, C], a view
        if self.query_first:
            out = self.mix_foreground(self._project(self._behind(self.abstract, take(tokens, places))))
            y = self.query_projected_back(out[:, 0], tokens, places)
        else:
            qkv = self.qkv(x).flatten(2).transpose(1, 2)  # [B, N, 3C]
            out = self.mix_foreground(self._behind(self._project(self.abstract[None])[0], take(qkv, places)))
            y = self.query_background(out[:, 0], qkv, places)
        o = tokens + self.channel_mlp(y).unsqueeze(1)  # Eq. 5.7, at first for all tokens
        o = o.scatter_(1, _everywhere(places, o), out[:, 1:].to(o.dtype))  # of a sum that nothing else reads
        o = self.proj(o) if self.project_all else o
        return o.transpose(1, 2).unflatten(2, size)

    def _project(self, tokens: Float[Tensor, "*B C"]) -> Float[Tensor, "*B c"]:
        """Queries, keys and values, c = 3·C, of tokens that are no map."""
        return F.linear(tokens, self.qkv.weight.flatten(1), self.qkv.bias)

    def _behind(self, token: Float[Tensor, " c"], tokens: Float[Tensor, "B F c"]) -> Float[Tensor, "B n c"]:
        """n = 1 + F tokens an image, this one first."""
        return torch.cat([token.expand(tokens.shape[0], 1, -1), tokens], dim=1)

    def mix_foreground(self, qkv: Float[Tensor, "B n c"]) -> Float[Tensor, "B n C"]:
        """Eq. 5.5 for n = 1 + F tokens, the abstract one first; c = 3·C."""
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, h, n, d_h] each
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # [B, h, n, n]
        weights = mix_heads(self.after.weight, mix_heads(self.before.weight, logits).softmax(dim=-1))
        out = (weights @ v).transpose(1, 2).flatten(2)
        return out if self.project_all else self.proj(out)

    def query_background(
        self, query: Float[Tensor, "B C"], qkv: Float[Tensor, "B N c"], places: Int[Tensor, "B F"]
    ) -> Float[Tensor, "B C"]:
        """Y_B of Eq. 5.6 as printed."""
        _, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, h, N, d_h] each, views
        q = query.unflatten(1, (self.num_heads, 1, -1))
        is_background = _background(places, k.shape[2])[:, None, None]  # [B, 1, 1, N]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=is_background).flatten(1)

    def query_projected_back(
        self, query: Float[Tensor, "B C"], tokens: Float[Tensor, "B N C"], places: Int[Tensor, "B F"]
    ) -> Float[Tensor, "B C"]:
        """Y_B of Eq. 5.6 from the tokens themselves. The keys' bias is the same for all keys: the softmax has none."""
        assert self.qkv.bias is not None
        _, to_keys, to_values = self.qkv.weight.view(3, self.num_heads, -1, tokens.shape[2])  # [h, d_h, C] each
        q = query.unflatten(1, (self.num_heads, -1)) * to_keys.shape[1] ** -0.5
        logits = torch.einsum("bhd,hdc->bhc", q, to_keys) @ tokens.transpose(1, 2)  # [B, h, N]
        is_background = _background(places, tokens.shape[1])[:, None]
        weights = logits.masked_fill(~is_background, float("-inf")).softmax(dim=-1)
        values = torch.einsum("bhc,hdc->bhd", weights @ tokens, to_values).flatten(1)
        return values + self.qkv.bias.chunk(3)[2]


def take(tokens: Float[Tensor, "B N C"], places: Int[Tensor, "B F"]) -> Float[Tensor, "B F C"]:
    """The tokens at these places."""
    return tokens.gather(1, _everywhere(places, tokens))


def _everywhere(places: Int[Tensor, "B F"], tokens: Float[Tensor, "B N C"]) -> Int[Tensor, "B F C"]:
    """The same places in every channel."""
    return places.unsqueeze(2).expand(-1, -1, tokens.shape[2])


def _background(places: Int[Tensor, "B F"], num_tokens: int) -> Bool[Tensor, "B N"]:
    """True where no foreground token is."""
    everything = torch.ones(places.shape[0], num_tokens, dtype=torch.bool, device=places.device)
    return everything.scatter_(1, places, False)


class PartialFormerBlock(nn.Module):
    """A block of PartialFormer (Fig. 5.3).

        X = X_in + PEG(X_in),   Y = X + PA(LN(X)),   Z = Y + MLP(LN(Y))

        X_in, X, Y, Z   [B, C, H, W]; LN over the channels of each token
        PEG             CPVT's positional encoding, a DWConv
        PA              `PartialAttention`; LN(X) is X of Eq. 5.5 to 5.7, so a background token becomes X + LN(X) + Y'_B
        MLP             W₂ ⊗ GELU(DWConv(W₁ ⊗ X)), here of LN(Y)

    Deviates from the document: it names no DWConv in the MLP, without which the five sizes are 0.06 M to 0.3 M
    parameters short of Table 5.1; nor does it say which X is scored (Eq. 5.4). X of this docstring is: LN(X) as
    initialised has the mean 0 at every token, and its order would be that of rounding errors. Both branches pass
    through drop path ("stochastic depth").

    Args:
        config: the network's.
        stage: which of its stages, from 0.
        drop_path_rate: probability in [0, 1) that a branch is skipped for an image, in training.
    """

    def __init__(self, config: PartialFormerConfig, stage: int, drop_path_rate: float) -> None:
        super().__init__()
        width = config.widths[stage]
        self.peg = DepthwiseConv2d(width, config.peg_kernel, residual=True)
        self.norm1 = LayerNorm2d(width)
        self.attn = PartialAttention(
            width,
            config.num_heads[stage],
            fraction=config.foreground_fractions[stage],
            head_expansion=config.head_expansion,
            reduction=config.reduction,
            out_proj=config.out_proj,
            sqa_order=config.sqa_order,
        )
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = LayerNorm2d(width)
        self.mlp = ConvMlp(width, config.mlp_ratio * width, config.mlp_kernel)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Z."""
        x = self.peg(x)  # with its residual
        places = foreground(x, num_foreground(self.attn.fraction, x.shape[2] * x.shape[3]))
        x = self.drop_path(x, self.attn(self.norm1(x), places))
        return self.drop_path(x, self.mlp(self.norm2(x)))


class PartialFormerStage(Stage):
    """Patch embedding (but of the first stage, which has the stem): 3×3 conv of stride 2, LN. Then the blocks."""

    def __init__(self, config: PartialFormerConfig, stage: int, drop_path_rates: list[float]) -> None:
        super().__init__()
        width = config.widths[stage]
        self.patch_embed: nn.Module = nn.Identity()
        if stage:
            conv = nn.Conv2d(config.widths[stage - 1], width, 3, 2, padding=1)
            self.patch_embed = nn.Sequential(conv, LayerNorm2d(width))
        self.blocks = nn.ModuleList(PartialFormerBlock(config, stage, rate) for rate in drop_path_rates)

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """The last block's Z."""
        x = self.patch_embed(x)
        for block in self.blocks:
            x = self.run_block(block, x)
        return x


class PartialFormer(StagedBackbone):
    """Stem, four stages, head, mean over the map, linear classifier (Fig. 5.3).

    Images may have any sides: a conv of stride 2 turns n into ceil(n / 2), and N_F follows the map. The pyramid's maps,
    the stages' outputs, have strides 4, 8, 16, 32 and `widths` channels.

    Deviates from the document: widths are C, 2C, 4C, 8C, "doubled" as its text says, where the text then prints
    {C, 2C, 3C, 4C}, which would leave B4 at 24 M instead of 64.5 M parameters. The 1×1 conv to 1280 channels before the
    pooling is not in the text; Table 5.1's parameters want it (1.3 M of B0's 5.3 M).

    Args:
        config: the size.
        num_classes: width of the classifier; 0 for none.
        in_chans: channels of the image.
    """

    def __init__(self, config: PartialFormerConfig, *, num_classes: int, in_chans: int = 3) -> None:
        width = config.widths[-1]
        super().__init__(
            num_classes=num_classes,
            in_chans=in_chans,
            num_features=width,
            feature_info=levels_of(config.widths, config.depths),
            head_hidden_size=config.head_width or width,
        )
        self.config = config
        self.stem = Stem(in_chans, config.widths[0], config.stem)
        rates = rates_of_blocks(config.drop_path_rate, config.depths)
        self.stages = nn.ModuleList(PartialFormerStage(config, stage, rates[stage]) for stage in range(NUM_STAGES))
        self.norm: nn.Module = nn.Identity() if config.head_width else LayerNorm2d(width)
        if config.head_width:  # with the norm in it
            self.conv_head = ConvHead(width, config.head_width)
        self.reset_classifier(num_classes)

    def final_norm(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """LN over the channels before the pooling, where no wider head begins with it."""
        return self.norm(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The stem, then each block in order; a patch embedding goes with the block behind it."""
        blocks = [(r"^stages\.(\d+)\.patch_embed", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        stages = [(r"^stages\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": [*(stages if coarse else blocks), (r"^norm|^conv_head", (99999,))]}
