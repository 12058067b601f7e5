"""Contexts of text and images: questions about an image, and editing, where the image to change comes first.

A document is an ordered list of parts. Text is causal; an image is full inside and sees what came before it; documents
are isolated. Every image stands between vision_start and vision_end and takes one rope position. Latent tokens of a
clean image (t = 0) go through the generation expert, everything else through the understanding expert. A noised image
is no part: it sees its document through `BagelPolicy.velocity`, and nothing sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.bagel.decoder import Context, Packing
from common.bagel.policy import BagelPolicy


@dataclass(frozen=True)
class Latents:
    """A clean image as latent tokens [N, D], N = rows * columns of grid."""

    tokens: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class Patches:
    """An image as the understanding tower sees it: patches [N, p*p*C], N = rows * columns of grid."""

    pixels: Tensor
    grid: tuple[int, int]


Part = list[int] | Latents | Patches
"""Text as token ids, wrapped as the chat wants it, or an image."""


@dataclass(frozen=True)
class Layout:
    """How B documents of T tokens in all lie flat: ids [T] (-1 at image tokens), positions [T], latents and patches
    [T] bool, packing, mask [B, L, L] (True: the query of this row may see the key of this column), and after [B], the
    rope position that follows each document."""

    ids: Tensor
    positions: Tensor
    latents: Tensor
    patches: Tensor
    packing: Packing
    mask: Tensor
    after: Tensor


def lay_out(documents: Sequence[Sequence[Part]], markers: tuple[int, int], device: torch.device) -> Layout:
    """markers: ids of vision_start and vision_end."""
    ids: list[int] = []
    positions: list[int] = []
    # Per token: its part, counted through all documents, and what it is made of.
    parts: list[int] = []
    kinds: list[type] = []
    lengths, after, number = [], [], 0
    for document in documents:
        place, begin = 0, len(ids)
        for part in document:
            number += 1
            if isinstance(part, list):
                ids += part
                positions += range(place, place + len(part))
                kinds += [list] * len(part)
                place += len(part)
            else:
                count = part.grid[0] * part.grid[1]
                ids += [markers[0], *[-1] * count, markers[1]]
                positions += [place] * (count + 2)
                kinds += [list, *[type(part)] * count, list]
                place += 1
            parts += [0 if isinstance(part, list) else number] * (len(ids) - len(parts))
        lengths.append(len(ids) - begin)
        after.append(place)
    packing = Packing.of(lengths, device)
    image = packing.pad(torch.tensor(parts, device=device))
    same_image = (image[:, :, None] == image[:, None, :]) & (image[:, :, None] > 0)
    length = image.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    # Padding is on the right: no real token sees it, and each of its own rows sees something.
    mask = causal | (same_image & packing.present[:, None, :])
    return Layout(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        torch.tensor([kind is Latents for kind in kinds], device=device),
        torch.tensor([kind is Patches for kind in kinds], device=device),
        packing,
        mask,
        torch.tensor(after, device=device),
    )


def read(policy: BagelPolicy, documents: Sequence[Sequence[Part]]) -> tuple[Tensor, Context, Layout]:
    """hidden [T, H] of every token after its expert's final norm, the context that noised images attend to, and how
    both lie. ValueError if a document shows an image to a policy that was loaded without its understanding tower."""
    layout = lay_out(documents, policy.markers, policy.device)
    x = policy.language_model.model.embed_tokens(layout.ids.clamp(min=0))
    parts = [part for document in documents for part in document]
    latents = [part for part in parts if isinstance(part, Latents)]
    if latents:
        clean = torch.zeros(1, device=policy.device)
        embedded = [policy.embed_latents(part.tokens[None], clean, part.grid)[0] for part in latents]
        x = x.index_put((layout.latents.nonzero()[:, 0],), torch.cat(embedded))
    patches = [part for part in parts if isinstance(part, Patches)]
    if patches:
        seen = policy.embed_patches([part.pixels for part in patches], [part.grid for part in patches])
        x = x.index_put((layout.patches.nonzero()[:, 0],), seen)
    hidden, context = policy.language_model.model.read_interleaved(
        x, layout.latents, layout.positions, layout.packing, layout.mask, layout.after
    )
    return hidden, context, layout
