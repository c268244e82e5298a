# SPDX-License-Identifier: Apache-2.0
"""Training batches drawn on the training device; the same distribution as chain_recall.make_example, vectorised."""

from __future__ import annotations

import torch
from torch import Tensor

from evals.tasks.chain_recall import (
    BOS_ID,
    FIRST_FILLER_ID,
    FIRST_NODE_ID,
    LINK_END_ID,
    NUM_FILLERS,
    NUM_NODES,
    QUERY_ID,
)


def _shuffles(batch: int, size: int, generator: torch.Generator) -> Tensor:
    """[batch, size] int64, each row a random permutation of 0..size-1."""
    return torch.rand(batch, size, device=generator.device, generator=generator).argsort(dim=1)


def copy_batch(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """`<bos> x1..xL ? xs..xe`: ids [batch, length + span + 3] and the number of answer tokens, span = length // 2.

    The repeated part starts at a random place, another in each row: were it always the whole sequence, a model could
    copy from a fixed distance without looking at any token. Finding the token after an earlier copy of the present one
    is the look-up that chain recall is made of; a model that can do it learns chains quickly.
    """
    span = length // 2
    device = generator.device
    sequence = _shuffles(batch, NUM_NODES, generator)[:, :length] + FIRST_NODE_ID
    start = torch.randint(length - span, (batch, 1), device=device, generator=generator)
    repeated = sequence.gather(1, start + torch.arange(span + 1, device=device))
    column = torch.ones(batch, 1, dtype=torch.int64, device=device)
    return torch.cat([column * BOS_ID, sequence, column * QUERY_ID, repeated], dim=1), span


def chain_batch(
    batch: int, links: int, hops: int, filler_tokens: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Chain recall: ids [batch, 1 + 3 * links + filler_tokens + 2 + hops] and the number of answer tokens, hops."""
    device = generator.device
    cycle = _shuffles(batch, NUM_NODES, generator)[:, :links] + FIRST_NODE_ID
    order = _shuffles(batch, links, generator)
    slots = _shuffles(batch, links + filler_tokens, generator)[:, :links].sort(dim=1).values
    # A link takes three tokens and a filler one, so each earlier link shifts a slot by two more tokens.
    first = slots + 2 * torch.arange(links, device=device)
    size = (batch, 3 * links + filler_tokens)
    body = torch.randint(FIRST_FILLER_ID, FIRST_FILLER_ID + NUM_FILLERS, size, device=device, generator=generator)
    body.scatter_(1, first, cycle.gather(1, order))
    body.scatter_(1, first + 1, cycle.gather(1, (order + 1) % links))
    body.scatter_(1, first + 2, LINK_END_ID)
    start = torch.randint(links, (batch, 1), device=device, generator=generator)
    walk = cycle.gather(1, (start + torch.arange(hops + 1, device=device)) % links)
    column = torch.ones(batch, 1, dtype=torch.int64, device=device)
    return torch.cat([column * BOS_ID, body, column * QUERY_ID, walk], dim=1), hops
