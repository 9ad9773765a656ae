"""MAT, Mixing Abstract Tokens: windows that attend inside themselves and tell each other by one token each.

The document is chapter 4 of the thesis on EMSNet, MAT and PartialFormer, "Exchanging Information across Non-overlapped
Local Self-Attentions via Mixing Abstract Tokens"; no code was released. What its text leaves open is read off its 24
printed counts (Tables 4.2, 4.3 and 4.9, to 0.001 M and 0.001 G), all of which these modules meet. Each such reading
stands under "Deviates from the document:"; where the tables have another one, it is a field of `MATConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from fat_train.layer.conv import DepthwiseConv2d, PointwiseConv2d
from fat_train.layer.drop_path import DropPath, rates_of_blocks
from fat_train.layer.mlp import ConvHead, ConvMlp
from fat_train.model.backbone import Stage, StagedBackbone, levels_of
from fat_train.op.attention import attention
from fat_train.types import UserError, one_of

NUM_STAGES = 4
TOKEN_MIXERS = ("mat", "window", "none")
PATCH_EMBEDS = ("bilinear", "conv", "merging")
Windows = Float[Tensor, "B C G L"]  # a map as G windows of L tokens


@dataclass(frozen=True, kw_only=True)
class MATConfig:
    """A size of MAT (Tables 4.3 and 4.12). Lists have one entry for each of the four stages."""

    name: str
    """What `create_model` and timm call it, and what a checkpoint says it holds."""
    widths: list[int]
    """Channels C; the first one is even (the stem's first conv has half of it)."""
    depths: list[int]
    """Blocks."""
    num_heads: list[int]
    """Attention heads M; each divides its stage's width. 0 where the stage has no token mixer."""
    token_mixers: list[str] = field(default_factory=lambda: ["none", "none", "mat", "mat"])
    """`mat`: windows exchange what their abstract tokens hold. `window`: they do not. `none`: the MLP alone."""
    window_size: int = 7
    """Side w of a window, in tokens; maps are padded to multiples of it."""
    cpe_kernel: int = 3
    """Side of the depth-wise kernel that encodes positions before each token mixer, odd; 0: no encoding."""
    mlp_ratio: int = 4
    """Hidden channels of the MLP over C."""
    mlp_kernel: int = 3
    """Side of the depth-wise kernel on the MLP's hidden channels, odd; 0: none."""
    patch_embed: str = "bilinear"
    """What halves the map between stages. `conv`: 3×3, stride 2. `merging`: Swin's, a linear layer of 2×2 tokens."""
    head_width: int = 1280
    """Channels that the last map is widened to before its pooling; 0: it is normalised, pooled and classified as is."""
    drop_path_rate: float = 0.0
    """Probability that the last block's branches are skipped for an image; rises linearly from 0 at the first block."""

    def __post_init__(self) -> None:
        for name in ("widths", "depths"):
            values = getattr(self, name)
            if len(values) != NUM_STAGES or min(values) < 1:
                raise UserError(f"model.{name} must be {NUM_STAGES} numbers of at least 1, one a stage; got {values}")
        if self.widths[0] % 2:
            raise UserError(f"model.widths must start with an even number; got {self.widths}")
        self._check_mixers()
        for name, least in (("window_size", 1), ("mlp_ratio", 1), ("head_width", 0)):
            if getattr(self, name) < least:
                raise UserError(f"model.{name} must be at least {least}; got {getattr(self, name)}")
        for name in ("cpe_kernel", "mlp_kernel"):
            size = getattr(self, name)
            if size < 0 or (size and size % 2 == 0):
                raise UserError(f"model.{name} must be odd, or 0 for none; got {size}")
        one_of("model.patch_embed", self.patch_embed, PATCH_EMBEDS)
        if not 0 <= self.drop_path_rate < 1:
            raise UserError(f"model.drop_path_rate must be in [0, 1); got {self.drop_path_rate}")

    def _check_mixers(self) -> None:
        mixers, heads = self.token_mixers, self.num_heads
        if len(mixers) != NUM_STAGES:
            raise UserError(f"model.token_mixers must be {NUM_STAGES} words, one a stage; got {mixers}")
        for mixer in mixers:
            one_of("model.token_mixers", mixer, TOKEN_MIXERS)
        if len(heads) != NUM_STAGES or [many == 0 for many in heads] != [mixer == "none" for mixer in mixers]:
            raise UserError(
                f"model.num_heads must be {NUM_STAGES} numbers, 0 where model.token_mixers {mixers} has none and "
                f"nowhere else; got {heads}"
            )
        if min(heads) < 0 or any(many and width % many for width, many in zip(self.widths, heads, strict=True)):
            raise UserError(f"model.num_heads must divide model.widths {self.widths}; got {heads}")

    def build(self, num_classes: int, in_chans: int = 3) -> MAT:
        """A network of this size, initialised by PyTorch's defaults (but `MATAttention.abstract_token`)."""
        return MAT(self, num_classes=num_classes, in_chans=in_chans)


class Stem(nn.Sequential):
    """Image to tokens at a quarter of its sides (Table 4.12): 3×3 conv of stride 2 and 3×3 DWConv, of C / 2 channels,
    then a 3×3 conv of stride 2.

    Deviates from the document: it names the convs alone. Each has a bias and a BN behind it (counts), GELU stands
    between them (nothing determines it).
    """

    def __init__(self, in_chans: int, width: int) -> None:
        half = width // 2
        super().__init__(
            nn.Conv2d(in_chans, half, 3, stride=2, padding=1),
            nn.BatchNorm2d(half),
            nn.GELU(),
            DepthwiseConv2d(half, 3),
            nn.BatchNorm2d(half),
            nn.GELU(),
            nn.Conv2d(half, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
        )


class BilinearPatchEmbed(nn.Module):
    """The halving of a map at places that follow from what it shows (section 4.3.2, Fig. 4.3).

    The document has no equation for it. Read from its text and figure, and written in its style:

        ΔP = W_o ⊗ GELU(LN(DWConv_o(X))),   F = DWConv_f(X),   Y = LN(W ⊗ Sample(F, P + ΔP))

        X           argument                                          [B, C, H, W]
        DWConv      3×3, stride 2: `offset[0]`, `feature`             H -> h = ceil(H / 2)
        ΔP          `offset`, in pixels of F: to the right, then down [B, 2, h, w]
        P           the middles of the pixels of F                    [h, w, 2]
        Sample      the bilinear mean of the four pixels of F round each place; F goes on as its edge outside itself
        W_o, W      1×1 convs `offset[3]`, `reduction`                C -> 2, C -> C' (`out_width`)

    Places are float32 whatever the map's type: bfloat16's have steps of a whole pixel from pixel 128 on, and as numbers
    from −1 to 1 steps of 1/256, a fifth of a pixel in a map of 96.

    Deviates from the document: a DWConv each for places and features (one for both would lack 1.5 to 4.1 thousand
    parameters a net), two norms, the biases (counts); that the norms are LN, the unit of ΔP, the edge and GELU (nothing
    determines them).
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.offset = nn.Sequential(
            DepthwiseConv2d(width, 3, stride=2), LayerNorm2d(width), nn.GELU(), PointwiseConv2d(width, 2)
        )
        self.feature = DepthwiseConv2d(width, 3, stride=2)
        self.reduction = PointwiseConv2d(width, out_width)
        self.norm = LayerNorm2d(out_width)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """h = ceil(H / 2), w = ceil(W / 2)."""
        return self.norm(self.reduction(self.sample(self.feature(x), self.offset(x))))

    @staticmethod
    def sample(x: Float[Tensor, "B C h w"], offset: Float[Tensor, "B 2 h w"]) -> Float[Tensor, "B C h w"]:
        """`x` at the middle of each pixel moved by `offset` pixels; channels-last, of the type of `x`.

        torch's kernels read `x` by its strides, without a copy, but write an NCHW map: the way back to channels-last
        and to the type of `x` is one pass.
        """
        exact = torch.promote_types(x.dtype, torch.float32)
        (height, width), device = x.shape[2:], x.device
        right, down = offset.to(exact).unbind(1)  # [B, h, w]
        column = torch.arange(width, dtype=exact, device=device) + 0.5
        row = torch.arange(height, dtype=exact, device=device).unsqueeze(1) + 0.5
        # grid_sample calls the map's left and top edge −1, its right and bottom edge 1
        place = torch.stack(((column + right) * (2 / width) - 1, (row + down) * (2 / height) - 1), dim=3)
        # of float32 arguments autocast, too, computes this in float32
        sampled = F.grid_sample(x.to(exact), place, mode="bilinear", padding_mode="border", align_corners=False)
        return sampled.to(x.dtype, memory_format=torch.channels_last)


class PatchMerging(nn.Module):
    """Swin's halving of a map (Table 4.9): the 4·C numbers of 2×2 tokens, LN, and a linear layer without bias; an odd
    side is padded by zeros."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(4 * width)
        self.reduction = PointwiseConv2d(4 * width, out_width, bias=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """h = ceil(H / 2), w = ceil(W / 2)."""
        sides = [-(-side // 2) for side in x.shape[2:]]
        tokens = to_windows(x, 2).permute(0, 2, 3, 1).flatten(2).unflatten(1, sides)  # [B, h, w, 4·C]
        return self.reduction(self.norm(tokens.permute(0, 3, 1, 2)))


class ConvPatchEmbed(nn.Sequential):
    """The halving of a map by a 3×3 conv of stride 2 with a bias, then LN (Table 4.9)."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__(nn.Conv2d(width, out_width, 3, stride=2, padding=1), LayerNorm2d(out_width))


def to_windows(x: Float[Tensor, "B C H W"], side: int) -> Windows:
    """The map's G windows of L = side² tokens, both row by row; padded by zeros at the right and the bottom.

    One copy, as the rows of a window do not lie side by side; channels-last, as `x` is. A single window is a view.
    """
    height, width = x.shape[2:]
    padding = (0, -width % side, 0, -height % side)
    if any(padding):
        x = F.pad(x, padding)
    tokens = x.permute(0, 2, 3, 1).unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [B, Gh, side, Gw, side, C]
    return tokens.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def from_windows(x: Windows, side: int, height: int, width: int) -> Float[Tensor, "B C H W"]:
    """What `to_windows` made, as the map of `height` × `width` that it was; what was padded is cut off."""
    across = -(-width // side)
    tokens = x.permute(0, 2, 3, 1).unflatten(2, (side, side)).unflatten(1, (-1, across))  # [B, Gh, Gw, side, side, C]
    return tokens.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width].permute(0, 3, 1, 2)


class WindowAttention(nn.Module):
    """Multi-head self-attention inside non-overlapped windows ("Window Attn" of Table 4.9).

    Windows that reach over the map's right or bottom edge are filled up by tokens of zeros, whose keys and values are
    the biases of `qkv`; they are attended, as Swin's are. (At 224 px there are none; the document does not say.)

    Args:
        width: channels C.
        num_heads: heads M of D = C / M channels; attention logits are scaled by D^−½.
        window_size: side w of a window; it has L = w² tokens.
    """

    def __init__(self, width: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = PointwiseConv2d(width, 3 * width)
        self.proj = PointwiseConv2d(width, width)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The same shape."""
        windows = to_windows(x, self.window_size)  # [B, C, N_w, L]
        return from_windows(self.attend(*self.qkv(windows).chunk(3, dim=1)), self.window_size, *x.shape[2:])

    def attend(self, q: Windows, k: Windows, v: Windows) -> Windows:
        """Every window's tokens to each other, then the projection."""
        return self.proj(self._map(attention(self._heads(q), self._heads(k), self._heads(v)), q.shape[2]))

    def _heads(self, x: Windows) -> Float[Tensor, "BG M L D"]:
        """Views alone: in channels_last the D numbers of a head lie side by side, as the fused kernels want them."""
        return x.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _map(self, x: Float[Tensor, "BG M L D"], groups: int) -> Float[Tensor, "B C {groups} L"]:
        """The way back from `_heads`: a view too, of heads that lie as it made them."""
        return x.transpose(1, 2).flatten(2).unflatten(0, (-1, groups)).permute(0, 3, 1, 2)


class MATAttention(WindowAttention):
    """Windows, each with a learnable abstract token; the tokens of all windows mix, and the map reads the mixture.

    1. Token merging: X in N_w windows X^w, each of which gets an abstract token A: x_i^A = [X_i^w; A]
    2. Token abstraction, in every window i (`abstract`):
       Eq. 4.1:  MHSA(x_i^A) = Concat(SA_1, …, SA_h)
       Eq. 4.2:  SA_j(x_{i,j}^A) = softmax(QKᵀ / √(C/h)) V
    3. Mixing the windows' abstract tokens A' (`mix`):
       Eq. 4.3:  MHSA(A') = Concat(SA_1, …, SA_h)
       Eq. 4.4:  SA_j(A'_j) = softmax(Q_A K_Aᵀ / √(C/h)) V_A
    4. Token fusion, a head's (`fuse`), added to the windows' own output X':
       Eq. 4.5:  CA(X, Ã') = softmax(Q_I K_{A'}ᵀ / √(C/h)) V_{A'}

        X              argument, in windows                       [B, C, N_w, L], L = w²
        A              `abstract_token`                           [C], the same in all windows
        Q, K, V        W^Q, W^K, W^V of X^w (`qkv`), and A        [B·N_w, M, L + 1, D], M = h, D = C/h
        A'             what A's queries get                       [B, C, 1, N_w]
        Q_A, K_A, V_A  `mix_qkv` of A'                            [B, M, N_w, D]
        Ã'             `mix_proj` of Eq. 4.3                      [B, C, 1, N_w]
        Q_I            the queries of X^w, of Eq. 4.2 once more   [B, M, N_w·L, D]
        K_A', V_A'     `fuse_kv` of Ã'                            [B, M, N_w, D]

    Deviates from the document, by its counts unless said otherwise: W^Q, W^K and W^V are C × C, not the C/h × C/h under
    Eq. 4.2 (MAT-2 would have 5.9 M); A is one vector a block, not one a window (1.5 thousand parameters), and joins the
    queries, keys and values as it is, not projected (0.002 to 0.013 G); Eq. 4.1 for the image and Eq. 4.3 end in a
    projection, Eq. 4.5 does not, and Q_I has none of its own (counts want one of these three on image tokens: that of
    Eq. 4.1 is the one that "Window Attn" has too). A starts as class tokens do, by a deviation of 0.02 (nothing
    determines it).
    """

    def __init__(self, width: int, num_heads: int, window_size: int) -> None:
        super().__init__(width, num_heads, window_size)
        self.abstract_token = nn.Parameter(torch.empty(width))
        self.mix_qkv = PointwiseConv2d(width, 3 * width)
        self.mix_proj = PointwiseConv2d(width, width)
        self.fuse_kv = PointwiseConv2d(width, 2 * width)
        nn.init.trunc_normal_(self.abstract_token, std=0.02)

    def attend(self, q: Windows, k: Windows, v: Windows) -> Windows:
        """X' + CA(X, Ã')."""
        x, abstract = self.abstract(q, k, v)
        return self.proj(x) + self.fuse(q, self.mix(abstract))

    def abstract(self, q: Windows, k: Windows, v: Windows) -> tuple[Windows, Float[Tensor, "B C 1 G"]]:
        """Eq. 4.1 for the windows' tokens and for their abstract tokens.

        The queries go apart: the tokens' then need no copy, nor does their result, and A's is the same in all windows.
        """
        a = self.abstract_token.to(q.dtype)  # under autocast one float32 key would make all keys float32
        k, v = (self._heads(_with_token(x, a)) for x in (k, v))  # [B·N_w, M, L + 1, D]
        a_query = a.view(1, self.num_heads, 1, -1).expand(k.shape[0], -1, -1, -1)  # [B·N_w, M, 1, D]
        x, learned = (self._map(attention(query, k, v), q.shape[2]) for query in (self._heads(q), a_query))
        return x, learned.flatten(2).unsqueeze(2)

    def mix(self, abstract: Float[Tensor, "B C 1 G"]) -> Float[Tensor, "B C 1 G"]:
        """Ã' of A'."""
        q, k, v = map(self._heads, self.mix_qkv(abstract).chunk(3, dim=1))  # [B, M, N_w, D]
        return self.mix_proj(self._map(attention(q, k, v), groups=1))

    def fuse(self, q: Windows, mixed: Float[Tensor, "B C 1 G"]) -> Windows:
        """Eq. 4.5: every token, whatever its window, attends to the mixed tokens of all windows."""
        k, v = map(self._heads, self.fuse_kv(mixed).chunk(2, dim=1))  # [B, M, N_w, D]
        queries = q.flatten(2).unsqueeze(2)  # [B, C, 1, N_w·L]
        return self._map(attention(self._heads(queries), k, v), groups=1).squeeze(2).unflatten(2, q.shape[2:])


def _with_token(x: Windows, token: Float[Tensor, " C"]) -> Float[Tensor, "B C G l"]:
    """Each of the G rows with `token` as its last, l = L + 1; channels-last."""
    rows = x.permute(0, 2, 3, 1)  # [B, G, L, C]
    return torch.cat((rows, token.expand(*rows.shape[:2], 1, -1)), dim=2).permute(0, 3, 1, 2)


class MATBlock(nn.Module):
    """A block (Fig. 4.2 a), X -> Z:

        Y = X' + Attention(LN(X')),   X' = X + DWConv(X);      Y = X in a stage without token mixer
        Z = Y + MLP(LN(Y)),           MLP(Y) = W₂ ⊗ GELU(DWConv(W₁ ⊗ Y))

        X, X', Y, Z   [B, C, H, W];   W₁, W₂ to and from `mlp_ratio` × C channels

    Deviates from the document, by its counts: it shows neither DWConv (3×3). Together they are worth 0.09 (MAT-1) to
    0.32 million parameters (MAT-5). That of the MLP is lacking in the "Pure MLP" row of Table 4.9 alone; that of X', a
    conv position encoding, belongs to the token mixers. Both branches pass through drop path (Table 4.10).

    Args:
        config, stage: the network's, and which of its stages, from 0.
        drop_path_rate: probability in [0, 1) that a branch is skipped for an image, in training.
    """

    def __init__(self, config: MATConfig, stage: int, drop_path_rate: float) -> None:
        super().__init__()
        width = config.widths[stage]
        self.attn: nn.Module | None = None
        if config.token_mixers[stage] != "none":
            mixer = MATAttention if config.token_mixers[stage] == "mat" else WindowAttention
            self.cpe = DepthwiseConv2d(width, config.cpe_kernel, residual=True) if config.cpe_kernel else nn.Identity()
            self.norm1 = LayerNorm2d(width)
            self.attn = mixer(width, config.num_heads[stage], config.window_size)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = LayerNorm2d(width)
        self.mlp = ConvMlp(width, config.mlp_ratio * width, config.mlp_kernel)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Z."""
        if self.attn is not None:
            x = self.cpe(x)  # X'
            x = self.drop_path(x, self.attn(self.norm1(x)))
        return self.drop_path(x, self.mlp(self.norm2(x)))


class MATStage(Stage):
    """A patch embedding, but in the first stage, then blocks of one width."""

    def __init__(self, config: MATConfig, stage: int, drop_path_rates: list[float]) -> None:
        super().__init__()
        embed = {"bilinear": BilinearPatchEmbed, "conv": ConvPatchEmbed, "merging": PatchMerging}[config.patch_embed]
        self.patch_embed = embed(config.widths[stage - 1], config.widths[stage]) if stage else nn.Identity()
        self.blocks = nn.ModuleList(MATBlock(config, stage, rate) for rate in drop_path_rates)

    def forward(self, x: Float[Tensor, "B _C _H _W"]) -> Float[Tensor, "B C H W"]:
        """The last block's output."""
        x = self.patch_embed(x)
        for block in self.blocks:
            x = self.run_block(block, x)
        return x


class MAT(StagedBackbone):
    """Stem, four stages, a 1×1 conv that widens the map, its mean, linear classifier (Fig. 4.1, Table 4.12).

    Images may have any sides: whatever halves n gives ceil(n / 2), and windows are padded. The pyramid's maps are the
    stages' outputs, strides 4, 8, 16, 32 and `widths` channels, not normalised; `forward_features` gives the last of
    them as it is, unless `head_width` is 0: `conv_head` begins with the LN.

    Deviates from the document: it does not name the head. LN, 1×1 conv to 1280 channels, BN and GELU before the pooling
    are worth 1.35 of MAT-2's 10.77 million parameters, and their 16 M multiply-adds are those of a 7 × 7 map.

    Args:
        config: the size.
        num_classes: width of the classifier; 0 for none.
        in_chans: channels of the image.
    """

    def __init__(self, config: MATConfig, *, num_classes: int, in_chans: int = 3) -> None:
        last = config.widths[-1]
        super().__init__(
            num_classes=num_classes,
            in_chans=in_chans,
            num_features=last,
            head_hidden_size=config.head_width or last,
            feature_info=levels_of(config.widths, config.depths),
        )
        self.config = config
        self.stem = Stem(in_chans, config.widths[0])
        rates = rates_of_blocks(config.drop_path_rate, config.depths)
        self.stages = nn.ModuleList(MATStage(config, stage, rates[stage]) for stage in range(NUM_STAGES))
        self.norm: nn.Module = nn.Identity() if config.head_width else LayerNorm2d(last)
        if config.head_width:
            self.conv_head = ConvHead(last, config.head_width)
        self.reset_classifier(num_classes)

    def final_norm(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """LN where no `conv_head`, which begins with one, follows."""
        return self.norm(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The stem, then each block in order: a stage's first with its patch embedding, the last with the head."""
        embeds, blocks = (r"^stages\.(\d+)\.patch_embed", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)
        last = (r"^norm|^conv_head", (99999,))
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), last] if coarse else [embeds, blocks, last]}
