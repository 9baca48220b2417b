"""The loop of Hugging Face's page on perplexity, as it stands there but for what it counts.

Source: "Perplexity of fixed-length models", https://huggingface.co/docs/transformers/perplexity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

#: A label that PyTorch's cross entropy leaves out.
IGNORED = -100
#: From ids (1, n) and labels (1, n) to the mean loss of the labels, each moved one place forward,
#: and logits (1, n, V): what a causal model of transformers does.
Model = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Page:
    """What the loop finds.

    Attributes:
        nll_sum: negative log-likelihood of all tokens that are predicted, natural.
        n_tokens: how many these are.
        last: tokens that the last window predicts.
        log_probs: (n_tokens,) of each, by the logits alone, in the order of the text.
    """

    nll_sum: float
    n_tokens: int
    last: int
    log_probs: torch.Tensor


@torch.no_grad()
def page(model: Model, ids: torch.Tensor, max_length: int, stride: int) -> Page:
    """Reads a text (1, T) in windows.

    The page takes one label from each window, for those that the shift within the model leaves out.
    Only the first window has one: of later ones the first label that counts has a token before it.
    Here they are counted as they are, so that the sum is that of the whole text.
    """
    seq_len = ids.size(1)
    nll_sum, n_tokens, last = 0.0, 0, 0
    each: list[torch.Tensor] = []
    prev_end_loc = 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc  # may be different from stride on last loop
        input_ids = ids[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = IGNORED

        neg_log_likelihood, logits = model(input_ids, target_ids)

        labels = target_ids[0, 1:]
        scored = labels != IGNORED
        if scored.any():  # a window of one token has nothing to predict, and its mean is none
            last = int(scored.sum())
            nll_sum += float(neg_log_likelihood) * last
            n_tokens += last
            log_probs = logits[0, :-1][scored].log_softmax(dim=1)
            each.append(log_probs.gather(1, labels[scored, None])[:, 0])

        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return Page(nll_sum, n_tokens, last, torch.cat(each))
