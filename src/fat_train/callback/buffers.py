"""The buffers of a model as they were before an update, put back on the device where the update is left out."""

from __future__ import annotations

from collections import defaultdict

import torch
from jaxtyping import Float
from torch import Tensor, nn


class BuffersBefore:
    """A copy of all saved buffers (BatchNorm's running statistics and their counts) in one flat tensor a data type.

    A forward pass changes them before anybody knows whether its update is good. Copying takes a few kernels.

    Args:
        model: on its device; its buffers are changed in place from here on, as torch does, and never replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds: dict[torch.dtype, dict[str, Tensor]] = defaultdict(dict)
        saved = model.state_dict()  # without constants, such as drop path's probabilities
        for name, buffer in model.named_buffers():
            if name in saved and buffer.numel():
                kinds[buffer.dtype][name] = buffer
        self._kinds = [_Kind(buffers) for buffers in kinds.values()]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy all of them."""
        for kind in self._kinds:
            torch._foreach_copy_(kind.kept, kind.buffers)

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo what has happened since `keep`."""
        for kind in self._kinds:
            torch._foreach_copy_(kind.buffers, kind.kept)

    @torch.no_grad()
    def put_back_where(self, bad: Float[Tensor, ""]) -> None:
        """Undo it where `bad` is not 0, while the host need not know which it is."""
        for kind in self._kinds:
            torch._foreach_copy_(kind.chosen, kind.buffers)
            torch.where(bad.bool(), kind.flat_kept, kind.flat_chosen, out=kind.flat_chosen)
            torch._foreach_copy_(kind.buffers, kind.chosen)

    def kept(self) -> dict[str, Tensor]:
        """The copies by the buffers' names."""
        return {name: copy for kind in self._kinds for name, copy in zip(kind.names, kind.kept, strict=True)}


class _Kind:
    """The buffers of one data type, and two flat tensors with a view for each of them."""

    def __init__(self, buffers: dict[str, Tensor]) -> None:
        self.names = list(buffers)
        self.buffers = list(buffers.values())
        self.flat_kept = torch.cat([buffer.detach().flatten() for buffer in self.buffers])
        self.flat_chosen = torch.empty_like(self.flat_kept)
        self.kept, self.chosen = (self._views(flat) for flat in (self.flat_kept, self.flat_chosen))

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([buffer.numel() for buffer in self.buffers])
        return [part.view(buffer.shape) for part, buffer in zip(parts, self.buffers, strict=True)]
