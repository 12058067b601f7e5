"""Image understanding: BAGEL's SigLIP tower for images of any size (NaViT), its connector, and patches of pixels.

Patches of all images lie flat; attention is full inside each image. What leaves here are embeddings for the decoder's
understanding expert. Weights have the released names `vit_model.*`, `connector.*`, `vit_pos_embed.*`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from common.bagel.config import ViTConfig
from common.bagel.decoder import Packing, attend

# Most pixels of an image that the released preprocessing keeps.
MAX_PIXELS = 14 * 14 * 9 * 1024


class Embeddings(nn.Module):
    """Pixels of a patch and its place in the grid -> [T, V]. The places' numbers are a tensor of the checkpoint."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(config.patch_dim, config.hidden_size)
        places = (config.image_size // config.patch_size) ** 2
        self.position_embedding = nn.Embedding.from_pretrained(torch.empty(places, config.hidden_size), freeze=False)

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        return self.patch_embedding(patches) + self.position_embedding(places)


class Attention(nn.Module):
    """Full attention inside each image."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        q, k, v = (
            packing.pad(project(x).unflatten(-1, (self.heads, -1)))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(q, k, v, mask=packing.present[:, None, None, :])
        return self.out_proj(packing.flatten(out).flatten(-2))


class MLP(nn.Module):
    """Two linear layers with GELU's tanh form between them; the tower's and, with other sizes, the connector."""

    def __init__(self, inside: int, between: int, outside: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inside, between)
        self.fc2 = nn.Linear(between, outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Layer(nn.Module):
    """One pre-norm encoder layer."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), packing)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        # BAGEL takes the features before SigLIP's last layer, which its checkpoints leave out.
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers - 1))


class VisionModel(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)


class VisionTower(nn.Module):
    """The encoder (`vit_model.*`)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.vision_model = VisionModel(config)

    def forward(self, patches: Tensor, places: Tensor, packing: Packing) -> Tensor:
        """patches [T, p*p*C] of all images, places [T] rows of the position table -> features [T, V]."""
        x = self.vision_model.embeddings(patches, places)
        for layer in cast(Iterable[Layer], self.vision_model.encoder.layers):
            x = layer(x, packing)
        return self.vision_model.post_layernorm(x)


def patchify(pixels: Tensor, patch: int) -> tuple[Tensor, tuple[int, int]]:
    """pixels [C, H, W] -> patches [N, p*p*C] row-major, inside a patch (row, column, channel), and the grid."""
    c, h, w = pixels.shape
    grid = h // patch, w // patch
    x = pixels.reshape(c, grid[0], patch, grid[1], patch)
    return x.permute(1, 3, 2, 4, 0).reshape(grid[0] * grid[1], patch * patch * c), grid


def fitted(image: NDArray[np.uint8], longest: int, shortest: int, stride: int) -> Tensor:
    """uint8 [H, W, 3] -> pixels [3, h, w] in [-1, 1], resized."""
    pixels = torch.from_numpy(resized(image, longest, shortest, stride))
    return pixels.permute(2, 0, 1).float() / 255 * 2 - 1


def resized(image: NDArray[np.uint8], longest: int, shortest: int, stride: int) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] -> uint8 [h, w, 3], with PIL's bicubic filter if it does not fit.

    Sides become multiples of stride, the long one at most `longest`, the short one at least `shortest` where that
    allows it. The release uses 980, 224, 14 before the tower and 1024, 512, 16 before the autoencoder.
    """
    height, width = image.shape[:2]
    scale = max(min(1.0, longest / max(height, width)), shortest / min(height, width))
    size = _scaled(height, width, scale, stride)
    if size[0] * size[1] > MAX_PIXELS:
        size = _scaled(*size, MAX_PIXELS / (size[0] * size[1]), stride)
    if max(size) > longest:
        size = _scaled(*size, longest / max(size), stride)
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def _scaled(height: int, width: int, scale: float, stride: int) -> tuple[int, int]:
    rows, cols = (max(1, round(round(side * scale) / stride)) * stride for side in (height, width))
    return rows, cols
