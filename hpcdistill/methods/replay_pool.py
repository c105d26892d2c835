"""CycleGAN's pool of earlier generated images (Shrivastava et al., CVPR 2017), one for all ranks.

Images are gathered, and what happens to one is drawn by its number in the run: every rank holds the same pool,
whatever the number of ranks, and a resumed run goes on with the same decisions. The host reads nothing back.
"""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor, nn

from hpcdistill.data.counter import POOL, below, draw


class ReplayPool(nn.Module):
    """`size` images `[channels, height, width]`; only buffers, to be listed in `Method.memory`.

    Pools that see the same numbers (one for each domain) take different decisions when their `part` differs.
    Query it once a step (`Phase.before`), with all micro-batches of a rank's share together: else the order in which
    the images pass, and with it the pool, would depend on how `train.accumulation` cuts the shares.
    Images are kept in the dtype of the buffer, float32: bfloat16 goes through it unchanged.
    """

    images: Tensor  # [size, C, H, W]
    filled: Tensor  # 0-dim: how many of them are there

    def __init__(
        self, size: int = 50, channels: int = 3, height: int = 256, width: int = 256, *, seed: int = 0, part: int = 0
    ) -> None:
        super().__init__()
        assert size >= 0
        self.size, self.seed, self.part = size, seed, part
        self.register_buffer("images", torch.zeros(size, channels, height, width))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def query(self, fakes: Tensor, numbers: Tensor) -> Tensor:
        """Images to judge instead of this rank's `fakes` [B, C, H, W], of the same dtype and memory format, detached.

        `numbers` [B] (int64, on the device of `fakes`) are the running numbers of the samples, all different; in
        their order the images of all ranks, which come with the same B each, pass the pool one after the other. Until
        it is full, an image is kept and handed back; then, with probability 1/2, it changes places with a kept one.
        With size 0 the fakes come back. ValueError when the shapes do not fit the pool's.
        """
        if self.size == 0:
            return fakes.detach()
        if fakes.shape[1:] != self.images.shape[1:] or numbers.shape != fakes.shape[:1]:
            raise ValueError(
                f"this pool takes [B, {', '.join(map(str, self.images.shape[1:]))}] and [B] numbers, "
                f"not {list(fakes.shape)} and {list(numbers.shape)}"
            )
        all_numbers = gather(numbers)
        order = torch.argsort(all_numbers)
        new = gather(fakes.detach()).index_select(0, order).to(self.images.dtype)
        returned = self._passed(new, all_numbers.index_select(0, order))
        share = len(fakes)
        mine = torch.argsort(order).narrow(0, _rank() * share, share)
        return torch.empty_like(fakes).copy_(returned.index_select(0, mine))

    def _passed(self, new: Tensor, numbers: Tensor) -> Tensor:
        """`new` [N, C, H, W] pass the pool in this order, all at once."""
        turns, slots, *_ = draw(self.seed, POOL, numbers, self.part)
        turn = torch.arange(len(new), device=new.device)
        place = self.filled + turn
        full = place >= self.size
        slot = torch.where(full, below(slots, self.size), place)
        exchanges = full & (below(turns, 2) == 1)
        # written[i, j]: image j goes to the slot that image i looks at.
        written = (slot[:, None] == slot) & (exchanges | ~full)
        kept = self.images.index_select(0, slot)
        # What image i finds in its slot: the last of this batch put there before it, else what the pool held.
        found = _last(written & (turn < turn[:, None]), turn, new, kept)
        # Each image writes what its slot holds in the end, also the ones that change nothing: so those that share a
        # slot write the same, in whatever order.
        self.images.index_copy_(0, slot, _last(written, turn, new, kept))
        self.filled.copy_((self.filled + len(new)).clamp_max(self.size))
        return torch.where(exchanges[:, None, None, None], found, new)


def _last(mask: Tensor, turn: Tensor, new: Tensor, otherwise: Tensor) -> Tensor:
    """For each row of `mask` [N, N] the image of its last true column, or `otherwise` where there is none."""
    last = torch.where(mask, turn, -1).amax(1)
    return torch.where((last >= 0)[:, None, None, None], new.index_select(0, last.clamp_min(0)), otherwise)


def _rank() -> int:
    rank: int = PartialState().process_index
    return rank
