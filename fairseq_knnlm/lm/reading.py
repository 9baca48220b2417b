"""Texts that a language model reads a few tokens at a time, each at its own pace.

Layers that do nothing between positions but attend can read more than a token at a time: they
attend to whatever their state holds. So a prompt is read at once, a draft is checked at once, and
what a text took back is hidden from it.

The state of a layer is columns, one for each token of a read. A column is hidden from texts that
read fewer tokens then, or took theirs back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_knnlm.lm.contexts import CONTEXT, Encoded, only

#: Hidden columns that are put up with before the others move together, over those that are seen.
SLACK = 1.25, 16
#: Where a layer of fairseq's is given its incremental state, among its arguments.
STATE = 3


class InColumns(ABC):
    """B texts, of which a language model has read the beginnings; see ``contract.Reads``.

    Args:
        model: whose layers are read into.
        texts: B.
        pad: the padding token's id.
    """

    def __init__(self, model: nn.Module, texts: int, pad: int) -> None:
        device = next(model.parameters()).device
        self.pad = pad
        self.lengths = torch.zeros(texts, dtype=torch.int64, device=device)
        self._tokens = torch.full((texts, 0), -1, device=device)
        self._hidden = torch.zeros((texts, 0), dtype=torch.bool, device=device)

    @abstractmethod
    def _run(self, tokens: Tensor, places: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Has the layers read n more columns.

        Args:
            tokens: (B, n) int64, padding in columns that are hidden.
            places: (B, n) int64, where they stand in their texts.
            hidden: (B, C) bool, of all columns, these among them.

        Returns:
            Features (B, n, C) and keys (B, n, D); None where no keys are captured.
        """

    @abstractmethod
    def _reorder(self, order: Tensor) -> None:
        """Has text i go on where text ``order[i]`` stood, in the layers' state."""

    @abstractmethod
    def _move(self, order: Tensor) -> None:
        """Has column i of each text be where column ``order[:, i]`` was, (B, C') int64."""

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Encoded:
        """Reads on in every text.

        Args:
            tokens: (B, n) int64; -1 behind the last one of a text that goes on by fewer than n.

        Returns:
            What was made of these tokens, text by text; N of them.
        """
        there = tokens >= 0
        places = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self._remember(tokens, places)
        hidden = torch.cat([self._hidden, ~there], dim=1)
        features, keys = self._run(tokens.where(there, self.pad), places, hidden)
        self._hidden = hidden
        self.lengths = self.lengths + there.sum(dim=1)
        self._tidy()
        keys = None if keys is None else only(keys, there)
        return Encoded(only(features, there), keys, only(self._before(places), there), there)

    def forget(self, counts: Tensor) -> None:
        """Takes back the last ``counts[i]`` tokens of text i, (B,) int64."""
        if not bool(counts.any()):
            return
        seen = ~self._hidden
        left = seen.flip(1).cumsum(dim=1).flip(1)  # tokens from each column on
        self._hidden = self._hidden | (left <= counts[:, None])
        self.lengths = self.lengths - counts
        self._tidy()

    def keep(self, order: Tensor) -> None:
        """Has text i go on where text ``order[i]`` stood, (B',) int64."""
        self.lengths, self._tokens = self.lengths[order], self._tokens[order]
        self._hidden = self._hidden[order]
        self._reorder(order)

    def _remember(self, tokens: Tensor, places: Tensor) -> None:
        """Writes the new tokens behind those of each text, and -1 behind its end."""
        wanted = int(places.max()) + 1 - self._tokens.shape[1]
        self._tokens = nn.functional.pad(self._tokens, (0, max(0, wanted)), value=-1)
        self._tokens.scatter_(1, places, tokens)

    def _before(self, places: Tensor) -> Tensor:
        """(B, n, CONTEXT): the tokens up to each place, the nearest first, else -1."""
        steps = torch.arange(CONTEXT, device=places.device)
        wanted = (places[:, :, None] - steps).flatten(1)
        found = self._tokens.gather(1, wanted.clamp_min(0)).masked_fill(wanted < 0, -1)
        return found.view(*places.shape, CONTEXT)

    def _tidy(self) -> None:
        """Drops columns that are hidden from all texts, and closes gaps where there are many."""
        seen = int((~self._hidden).sum(dim=1).max())
        wide = self._hidden.shape[1]
        if wide == seen:
            return
        if len(self._hidden) == 1 or wide > SLACK[0] * seen + SLACK[1]:
            order = self._hidden.int().argsort(dim=1, stable=True)[:, :seen]
            self._move(order)
            self._hidden = self._hidden.gather(1, order)


class Reading(InColumns):
    """Of fairseq's plain Transformer layers.

    Args:
        lm: a ``TransformerLM``, and one that ``reads_ahead``.
        texts: B.
        pad: the padding token's id.
    """

    def __init__(self, lm: Any, texts: int, pad: int) -> None:
        assert lm.reads_ahead
        super().__init__(lm.model, texts, pad)
        self.lm = lm
        self._state: dict[str, Any] = {}
        self._table: Tensor | None = None

    def _run(self, tokens: Tensor, places: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        with self._going_on(places, hidden), self.lm.reading_keys() as captured:
            features, _ = self.lm.decoder(tokens, incremental_state=None, features_only=True)
        # fairseq's layers run time first.
        return features, captured[-1].transpose(0, 1) if captured else None

    def _reorder(self, order: Tensor) -> None:
        self.lm.reorder(self._state, order)

    @contextmanager
    def _going_on(self, places: Tensor, hidden: Tensor) -> Iterator[None]:
        """While the block runs, the decoder takes its tokens for later ones of the texts."""
        old, new = self._hidden.shape[1], places.shape[1]
        mask = self._ahead(old, new) if new > 1 else None
        padding = hidden[:, old:] if bool(hidden.any()) else None
        self._hide(self._hidden if padding is not None else None)

        def go_on(_: nn.Module, given: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            more = {"self_attn_mask": mask, "self_attn_padding_mask": padding}
            return (*given[:STATE], self._state, *given[STATE + 1 :]), kwargs | more

        handles = [
            layer.register_forward_pre_hook(go_on, with_kwargs=True)
            for layer in self.lm.decoder.layers
        ]
        positions = self.lm.decoder.embed_positions
        if positions is not None:
            there = self._positions(self._tokens.shape[1])[places]
            handles.append(positions.register_forward_hook(lambda *_: there))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _ahead(self, old: int, new: int) -> Tensor:
        """(new, old + new): -inf where a new column would see one behind it."""
        like = next(self.lm.model.parameters())
        ahead = torch.full((new, new), -torch.inf, dtype=like.dtype, device=like.device)
        return nn.functional.pad(ahead.triu(1), (old, 0))

    def _positions(self, count: int) -> Tensor:
        """(count or more, C) what the decoder adds to tokens at places 0, 1, ..."""
        if self._table is None or len(self._table) < count:
            positions = self.lm.decoder.embed_positions
            most = positions.max_positions
            most = int(most() if callable(most) else most)
            text = self.lengths.new_full((1, max(count, min(2 * count, most))), self.pad + 1)
            self._table = positions(text)[0]
        return self._table

    def _buffers(self) -> Iterator[tuple[Any, dict[str, Tensor | None]]]:
        """The attention of each layer, and its part of the state."""
        for layer in self.lm.decoder.layers:
            yield layer.self_attn, layer.self_attn._get_input_buffer(self._state)

    def _hide(self, hidden: Tensor | None) -> None:
        """Has all layers know what is hidden, (B, C) bool, of what they hold."""
        for attention, buffer in self._buffers():
            if buffer and buffer["prev_key_padding_mask"] is not hidden:
                buffer["prev_key_padding_mask"] = hidden
                attention._set_input_buffer(self._state, buffer)

    def _move(self, order: Tensor) -> None:
        for attention, buffer in self._buffers():
            for name in ("prev_key", "prev_value"):
                held = buffer[name]
                assert held is not None  # (B, heads, C, width)
                places = order[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
                buffer[name] = held.gather(2, places)
            buffer["prev_key_padding_mask"] = None  # told anew before the next read
            attention._set_input_buffer(self._state, buffer)
