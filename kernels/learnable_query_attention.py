"""Attention of learned queries over the tokens of each sample: one query per head, no matter how many tokens.

For sample i and head h, with scores s_t = q_h . k_t / sqrt(K) over the sample's tokens t:
    max = max_t s_t     sum = sum_t e^(s_t - max)     acc = sum_t e^(s_t - max) v_t     output = acc / sum
The triple (max, sum, acc) of any partition of the tokens merges exactly (log-sum-exp), which is how context-parallel ranks share one softmax.
This file holds the reference in torch, differentiable, with statistics in at least fp32.
"""

import math

import torch
from torch import Tensor


def learnable_query_attention(q: Tensor, k: Tensor, v: Tensor, sample: Tensor | None, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Partial softmax attention of q over the tokens at hand.

    Args:
        q: (H, K) one learned query per head.
        k, v: (n, s, H, K) when all samples are equally long, else packed (T, H, K).
        sample: (T,) sample of each packed token; None for the (n, s, H, K) form.
        samples: n.

    Returns:
        max (n, H), detached; sum (n, H); acc (n, H, K). Samples without tokens have max = -inf, sum = 0, acc = 0.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    q = q.to(wide) / math.sqrt(q.shape[-1])
    scores = torch.einsum("...hk,hk->...h", k.to(wide), q)
    if sample is None:
        top = scores.detach().amax(1)
        weights = torch.exp(scores - top[:, None])
        return top, weights.sum(1), torch.einsum("nsh,nshk->nhk", weights, v.to(wide))
    top = scores.new_full((samples, scores.shape[-1]), -torch.inf)
    top = top.scatter_reduce(0, sample[:, None].expand_as(scores), scores.detach(), "amax")
    weights = torch.exp(scores - top.index_select(0, sample))
    total = weights.new_zeros(samples, weights.shape[-1]).index_add(0, sample, weights)
    acc = weights.new_zeros(samples, *v.shape[1:]).index_add(0, sample, weights.unsqueeze(-1) * v.to(wide))
    return top, total, acc
