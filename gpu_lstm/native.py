"""torch's own LSTM (ATen on the CPU, cuDNN on CUDA), with lengths and resets.

It takes neither, but it takes packed batches. A sequence falls into *pieces* at its resets; every piece becomes a
sequence of its own in one packed batch, which ends where the sequence ends. So no step is taken in padding, and
there is no Python loop over steps.
"""

import torch
from torch import Tensor, _VF

from .sequences import positions_of_steps, resets_before_steps, valid_steps
from .weights import Weights


class Pieces:
    """The pieces that lengths and resets cut a padded batch [T, B] into, longest first, as a packed batch.

    Attributes:
        batch_sizes: int64 [longest piece] on the CPU; how many pieces go on at each step, as in a PackedSequence.
        rows: int64 [N], for each packed step its row time * B + batch in the padded batch.
    """

    def __init__(self, steps: int, batch: int, lengths: Tensor | None, resets: Tensor | None, device: torch.device):
        valid = valid_steps(steps, lengths)  # [T, B]
        if valid is None:
            valid = torch.ones(steps, batch, dtype=torch.bool, device=device)
        first = torch.zeros_like(valid) if resets is None else resets.clone()
        first[0] = True
        first &= valid  # [T, B] where a piece begins

        # Pieces are numbered row by row, in order of time.
        piece = first.T.flatten().cumsum(0).view(batch, steps).T - 1  # [T, B]
        owner, start = first.T.nonzero().unbind(1)  # [pieces] each: batch index, first time
        length = torch.bincount(piece[valid], minlength=len(owner))  # [pieces]
        by_length = length.argsort(descending=True, stable=True)
        rank = torch.empty_like(by_length)
        rank[by_length] = torch.arange(len(by_length), device=device)  # [pieces] place in the packed batch

        longest = int(length.max()) if len(length) else 0
        going_on = torch.arange(longest, device=device)[:, None] < length  # [longest, pieces]
        sizes = going_on.sum(1)
        self.batch_sizes = sizes.cpu()
        time, row_batch = valid.nonzero().unbind(1)  # [N] each
        of = piece[time, row_batch]
        packed_at = (sizes.cumsum(0) - sizes)[time - start[of]] + rank[of]
        self.rows = torch.empty_like(packed_at)
        self.rows[packed_at] = time * batch + row_batch

        self._steps, self._batch = steps, batch
        self._owner = owner[by_length]  # [pieces], in packed order from here on
        not_reset = True if resets is None else ~resets[0, owner]
        # The forward direction starts in a sequence's first piece and ends in its last, the reverse the other way.
        ends = start + length
        stop = valid.sum(0)  # [B] length of each sequence
        is_first, is_last = start == 0, ends == stop[owner]
        self._starts = ((is_first & not_reset)[by_length], is_last[by_length])  # [pieces] bool, by direction
        self._finals = (self._piece_of(is_last, owner, rank), self._piece_of(is_first, owner, rank))  # [B]
        self._empty = (stop == 0)[:, None]  # [B, 1]

    def _piece_of(self, chosen: Tensor, owner: Tensor, rank: Tensor) -> Tensor:
        """For each sequence the place of its one chosen piece; 0 for an empty sequence, which has none."""
        place = torch.zeros(self._batch, dtype=torch.long, device=owner.device)
        place[owner[chosen]] = rank[chosen]
        return place

    def pack(self, x: Tensor) -> Tensor:
        """[T, B, F] -> packed [N, F]."""
        return x.flatten(0, 1).index_select(0, self.rows)

    def unpack(self, data: Tensor) -> Tensor:
        """Packed [N, F] -> [T, B, F], zeros in padding."""
        padded = data.new_zeros(self._steps * self._batch, data.shape[1])
        return padded.index_copy(0, self.rows, data).view(self._steps, self._batch, data.shape[1])

    def initial(self, state: Tensor, directions: int) -> Tensor:
        """Initial states [L*D, B, H] of the sequences -> [L*D, pieces, H] of the pieces: zeros after a reset."""
        starts = torch.stack(self._starts[:directions])[:, :, None].repeat(len(state) // directions, 1, 1)
        return torch.where(starts, state.index_select(1, self._owner), 0)

    def final(self, state: Tensor, initial: Tensor, directions: int) -> Tensor:
        """Final states [L*D, pieces, H] of the pieces -> [L*D, B, H] of the sequences: `initial` of empty ones."""
        if state.shape[1] == 0:
            return initial
        per_direction = [state[d::directions].index_select(1, self._finals[d]) for d in range(directions)]
        final = torch.stack(per_direction, dim=1).flatten(0, 1)
        return torch.where(self._empty, initial.to(final.dtype), final)  # they differ under autocast


def lstm(
    x: Tensor,  # [T, B, I]; packed [N, I] with batch_sizes
    h0: Tensor,  # [L*D, B, P]
    c0: Tensor,  # [L*D, B, H]
    layers: list[list[Weights]],  # [L][D], all of one size
    batch_sizes: Tensor | None,  # as in a PackedSequence
    dropout: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own LSTM over layers of one size: output [T, B, D*P] (packed [N, D*P]), h_n, c_n."""
    flat = [tensor for layer in layers for weights in layer for tensor in weights.present()]
    bias = layers[0][0].bias_ih is not None
    bidirectional = len(layers[0]) == 2
    if batch_sizes is None:
        return _VF.lstm(x, (h0, c0), flat, bias, len(layers), dropout, training, bidirectional, False)
    return _VF.lstm(x, batch_sizes, (h0, c0), flat, bias, len(layers), dropout, training, bidirectional)


def lstm_in_pieces(
    x: Tensor,  # packed [N, I]
    h0: Tensor,  # [L*D, B, P]
    c0: Tensor,  # [L*D, B, H]
    layers: list[list[Weights]],  # [L][D], all of one size
    pieces: Pieces,
    dropout: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lstm` over the pieces of a batch: output packed [N, D*P], h_n and c_n of the sequences."""
    directions = len(layers[0])
    if len(pieces.batch_sizes) == 0:  # no step at all
        return x.new_empty(0, directions * h0.shape[2]), h0, c0
    initial = pieces.initial(h0, directions), pieces.initial(c0, directions)
    output, h_n, c_n = lstm(x, *initial, layers, pieces.batch_sizes, dropout, training)
    return output, pieces.final(h_n, h0, directions), pieces.final(c_n, c0, directions)


def lstm_layer(
    x: Tensor,  # [T, B, I]
    h0: Tensor,  # [B, P]
    c0: Tensor,  # [B, H]
    weights: Weights,
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, one direction: h [T, B, P], h_n [B, P], c_n [B, H].

    torch has the reverse direction only beside the forward one, so for `reverse` time is turned round and back.
    """
    steps, batch, _ = x.shape
    if reverse:
        position = positions_of_steps(steps, batch, lengths, reverse, x.device)  # [T, B]
        resets = resets_before_steps(resets, position, valid_steps(steps, lengths), reverse)
        x = x.gather(0, position[:, :, None].expand_as(x))
    if lengths is None and resets is None:
        h, h_n, c_n = lstm(x, h0[None], c0[None], [[weights]], None, 0.0, False)
    else:
        pieces = Pieces(steps, batch, lengths, resets, x.device)
        packed, h_n, c_n = lstm_in_pieces(pieces.pack(x), h0[None], c0[None], [[weights]], pieces, 0.0, False)
        h = pieces.unpack(packed)
    if reverse:
        h = h.gather(0, position[:, :, None].expand_as(h))
    return h, h_n[0], c_n[0]
