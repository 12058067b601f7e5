"""Images as input, against the reference: the tower, questions about an image, editing, packed training documents."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from golden_numbers import ATOL, CHECKPOINT, COMBINED, GOLDEN, SQUARES, close, described, golden, settings, tensor

from common.bagel import checkpoint as store
from common.bagel import seeing, vae, vit
from common.bagel.cfg import Branches, guided_velocity
from common.bagel.checkpoint import Checkpoint
from common.bagel.config import VAEConfig
from common.bagel.decoder import Packing
from common.bagel.interleaved import Latents, Layout, Part, Patches, lay_out, read
from common.bagel.policy import places
from common.config import Cfg

# token_type of the recording.
TEXT, MARKER, LATENT, PATCH = range(4)
TEXTS = json.loads((GOLDEN / "README.json").read_text())["texts"]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return store.load(CHECKPOINT, understanding=True)


def seen_image(checkpoint: Checkpoint) -> Patches:
    numbers = golden("bagel/vit.npz")
    pixels = vit.fitted(numbers["image_uint8"], *numbers["vit_transform"].tolist())
    assert checkpoint.config.vit_config
    return Patches(*vit.patchify(pixels, checkpoint.config.vit_config.patch_size))


def clean_image(checkpoint: Checkpoint) -> Latents:
    image = golden("bagel/vit.npz")["image_uint8"]
    with torch.no_grad():
        tokens = vae.encode(checkpoint.vae, checkpoint.config, vae.from_uint8(tensor(image)[None]))[0]
    return Latents(tokens, checkpoint.config.grid(*image.shape[:2]))


def token_type(layout: Layout) -> list[int]:
    inside = (layout.ids < 0).long()
    markers = torch.tensor([False, *(inside[1:] > inside[:-1]).tolist()]).roll(-1) | torch.tensor(
        [False, *(inside[1:] < inside[:-1]).tolist()]
    )
    return (markers * MARKER + layout.latents * LATENT + layout.patches * PATCH).tolist()


def test_pixels_and_patches(checkpoint: Checkpoint) -> None:
    numbers, vit_config = golden("bagel/vit.npz"), checkpoint.config.vit_config
    assert vit_config
    pixels = vit.fitted(numbers["image_uint8"], *numbers["vit_transform"].tolist())
    close(pixels, numbers["vit_image"])
    patches, grid = vit.patchify(pixels, vit_config.patch_size)
    close(patches, numbers["packed_vit_tokens"])
    side = checkpoint.config.vit_max_num_patch_per_side
    assert places(grid, side, torch.device("cpu")).tolist() == numbers["packed_vit_position_ids"].tolist()
    close(vae.from_uint8(tensor(numbers["image_uint8"])[None])[0], numbers["vae_image"], atol=1e-6)


def test_sizes_before_the_tower() -> None:
    """Sides are multiples of the stride, the long one bounded, the short one as asked where that leaves room."""
    for height, width, wanted in ((300, 500, (294, 504)), (100, 50, (448, 224)), (4000, 3000, (980, 728))):
        assert vit.fitted(np.zeros((height, width, 3), np.uint8), 980, 224, 14).shape == (3, *wanted)
    tall = vit.fitted(np.zeros((4000, 10, 3), np.uint8), 980, 224, 14)
    assert max(tall.shape) <= 980
    large = vit.fitted(np.zeros((3000, 3000, 3), np.uint8), 2800, 224, 14)
    assert large.shape[1] * large.shape[2] <= vit.MAX_PIXELS * 1.02


@torch.no_grad()
def test_tower_and_connector(checkpoint: Checkpoint) -> None:
    """Alone, and beside a larger image, which it must not see."""
    numbers, policy = golden("bagel/vit.npz"), checkpoint.policy
    patches, at = tensor(numbers["packed_vit_tokens"]), tensor(numbers["packed_vit_position_ids"])
    n = len(patches)
    assert policy.vit_model is not None
    assert policy.connector is not None
    features = policy.vit_model(patches, at, Packing.of([n], policy.device))
    close(features, numbers["vit_features"])
    close(policy.connector(features), numbers["connector_out"])
    image = seen_image(checkpoint)
    larger = torch.cat([patches, patches.flip(0)])
    both = policy.embed_patches([larger, image.pixels], [(2 * image.grid[0], image.grid[1]), image.grid])
    close(both[2 * n :], numbers["vit_embed"])


@torch.no_grad()
def test_questions_about_an_image(checkpoint: Checkpoint) -> None:
    numbers, policy = golden("bagel/vit.npz"), checkpoint.policy
    image, question = seen_image(checkpoint), numbers["und_text_ids"].tolist()
    hidden, _, layout = read(policy, [[image, question]])
    n = len(image.pixels)
    # How the reference packs the same image: rows of the markers and of the patches, and one rope position for all.
    block = layout.ids[: n + 2]
    assert [n + 2] == numbers["packed_seqlens"].tolist() == numbers["und_image_kv_len"].tolist()
    assert block[numbers["packed_text_indexes"]].tolist() == numbers["packed_text_ids"].tolist()
    assert layout.patches.nonzero()[:, 0].tolist() == numbers["packed_vit_token_indexes"].tolist()
    assert layout.positions[: n + 2].tolist() == numbers["packed_position_ids"].tolist()
    assert layout.positions[n + 2 :].tolist() == numbers["und_text_position_ids"].tolist()
    close(policy.language_model.lm_head(hidden[n + 2 :]), numbers["und_logits"])


def test_images_are_resized_in_the_proportions_of_the_release(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    assert config.vit_config
    released = config.model_copy(
        update={
            "max_latent_size": 64,
            "latent_patch_size": 2,
            "vae_config": VAEConfig(),
            "vit_max_num_patch_per_side": 70,
            "vit_config": config.vit_config.model_copy(update={"patch_size": 14}),
        }
    )
    assert seeing.sides(released) == (seeing.Sides(1024, 512, 16), seeing.Sides(980, 224, 14))


@torch.no_grad()
def test_a_look_at_an_image(checkpoint: Checkpoint) -> None:
    """Both halves' inputs; the image is on the autoencoder's stride, the recording resized for the tower alone."""
    numbers, stride = golden("bagel/vit.npz"), checkpoint.config.pixels_per_token
    height, width = numbers["image_uint8"].shape[:2]
    sizes = (
        seeing.Sides(max(height, width), min(height, width), stride),
        seeing.Sides(*numbers["vit_transform"].tolist()),
    )
    latents, patches = seeing.look(checkpoint, numbers["image_uint8"], sizes)
    close(
        vae.unpack(latents.tokens[None], latents.grid, checkpoint.config.latent_patch_size),
        numbers["edit_clean_latent"],
    )
    close(patches.pixels, numbers["packed_vit_tokens"])


@torch.no_grad()
def test_writing_takes_the_likeliest_tokens_or_draws_them(checkpoint: Checkpoint) -> None:
    """As recorded after a text; after an image as one pass over all of it says."""
    text, chat = golden("bagel/text.npz"), checkpoint.chat
    wanted = text["greedy_generated"].tolist()[1:]
    safe = int(np.append(text["greedy_margin"] > 10 * ATOL, False).argmin())
    found = seeing.write(checkpoint, [text["greedy_context_ids"].tolist()], len(wanted))
    assert safe > 3 and found[:safe] == wanted[:safe]
    document: list[Part] = [seen_image(checkpoint), golden("bagel/vit.npz")["und_text_ids"].tolist()]
    ids = seeing.write(checkpoint, document, 8)
    hidden = read(checkpoint.policy, [[*document, [chat.start, *ids]]])[0][-len(ids) - 1 : -1]
    assert checkpoint.policy.language_model.lm_head(hidden).argmax(-1).tolist() == ids
    drawn = [seeing.write(checkpoint, document, 8, 1.0, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def edit_context(checkpoint: Checkpoint) -> list[Part]:
    return [clean_image(checkpoint), seen_image(checkpoint), golden("bagel/vit.npz")["edit_text_ids"].tolist()]


@torch.no_grad()
def test_editing_context(checkpoint: Checkpoint) -> None:
    numbers, config = golden("bagel/vit.npz"), checkpoint.config
    clean = vae.unpack(clean_image(checkpoint).tokens[None], clean_image(checkpoint).grid, config.latent_patch_size)
    close(clean, numbers["edit_clean_latent"])
    _, context, layout = read(checkpoint.policy, [edit_context(checkpoint)])
    assert token_type(layout) == numbers["edit_context_token_type"].tolist()
    assert layout.positions.tolist() == numbers["edit_context_position_ids"].tolist()
    assert context.position.tolist() == numbers["edit_rope"].tolist()
    assert context.present.sum(1).tolist() == numbers["edit_kv_len"].tolist()
    close(context.keys[0][0], numbers["edit_key_cache_l0"])
    close(context.keys[-1][0], numbers["edit_key_cache_last"])


@torch.no_grad()
def test_editing_velocity_with_and_without_guidance(checkpoint: Checkpoint) -> None:
    """The contexts of three branches in one padded batch: the whole, without the instruction, without the image."""
    numbers, policy, recorded = golden("bagel/vit.npz"), checkpoint.policy, settings("bagel/vit.npz", "edit_cfg_v")
    whole = edit_context(checkpoint)
    _, context, _ = read(policy, [whole, whole[:2], whole[2:]])
    full, text, image = (context.take(torch.tensor([row])) for row in range(3))
    t = torch.tensor([float(described("bagel")["vit.npz"]["arrays"]["edit_x"]["meaning"].split("t=")[1])])
    x, grid = tensor(numbers["edit_x"])[None], clean_image(checkpoint).grid
    close(policy.velocity(x, t, full, grid)[0], numbers["edit_v"])
    cfg = Cfg(
        text_scale=recorded["cfg_text_scale"],
        image_scale=recorded["cfg_img_scale"],
        renorm=recorded["cfg_renorm_type"],
        interval=(0.0, 1.0),
    )
    instruction, seen = TEXTS["edit"], (clean_image(checkpoint), seen_image(checkpoint))
    edited = seeing.editing_contexts(checkpoint, "", seen, instruction, [], cfg)
    for branches in (Branches(full, text, image), edited):
        found = guided_velocity(policy, x, t, branches, grid, cfg)
        close(found[0], numbers["edit_cfg_v"], atol=COMBINED)


@torch.no_grad()
def test_an_edit_is_conditioned_on_its_reasoning_which_guidance_leaves_out(checkpoint: Checkpoint) -> None:
    seen, chat = (clean_image(checkpoint), seen_image(checkpoint)), checkpoint.chat
    system, asked = chat.wrap("Plan."), chat.wrap("Paint it.")
    branches = seeing.editing_contexts(checkpoint, "Plan.", seen, "Paint it.", [65, 66], Cfg(text_scale=4))
    assert branches.image is None and branches.text.position.item() == len(system) + 2
    whole: list[Part] = [system, *seen, asked, [chat.start, 65, 66, chat.end]]
    close(branches.full.keys[-1], read(checkpoint.policy, [whole])[1].keys[-1])


def test_an_image_needs_the_tower(golden_checkpoint: Checkpoint, checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="without its understanding tower; load the checkpoint with understanding"):
        read(golden_checkpoint.policy, [[seen_image(checkpoint)]])


class Recorded:
    """The packed documents of a training recording, taken apart: parts of each document, and its noised images."""

    def __init__(self, checkpoint: Checkpoint, file: str = "train_packed2") -> None:
        self.numbers: dict[str, Any] = golden(f"bagel/{file}.npz")
        numbers, self.documents, self.noised = self.numbers, [], []
        ends = np.cumsum(numbers["sample_lens"])
        images = iter(self.images(checkpoint))
        row, self.context_rows = 0, []
        self.documents.append([])
        for length, mode in zip(numbers["split_lens"], numbers["split_modes"], strict=True):
            rows = np.arange(row, row + length)
            kinds = numbers["token_type"][rows]
            if (kinds == PATCH).any():
                patches, side = tensor(numbers["vit_tokens"]), checkpoint.config.vit_max_num_patch_per_side
                corner = divmod(int(numbers["vit_position_ids"].max()), side)
                self.documents[-1].append(Patches(patches, (corner[0] + 1, corner[1] + 1)))
            elif (kinds == LATENT).any():
                x, clean, noise, grid = next(images)
                if mode == 2:
                    t = numbers["token_timestep"][rows[kinds == LATENT]][:1]
                    self.noised.append((len(self.documents) - 1, rows, x, tensor(t), noise - clean, grid))
                else:
                    self.documents[-1].append(Latents(x, grid))
            else:
                self.documents[-1].append(numbers["token_ids"][rows].tolist())
            if mode != 2:
                self.context_rows += rows.tolist()
            row += length
            if row in ends[:-1]:
                self.documents.append([])

    def images(self, checkpoint: Checkpoint):
        """x_t, clean latents, noise and grid of every image in order, from images padded to a common size."""
        numbers, start, patch = self.numbers, 0, checkpoint.config.latent_patch_size
        for latent, grid in zip(tensor(numbers["padded_latent"]), numbers["latent_shapes"].tolist(), strict=True):
            n = grid[0] * grid[1]
            clean = vae.pack(latent[None, :, : grid[0] * patch, : grid[1] * patch], patch)[0]
            yield (
                tensor(numbers["x_t"][start : start + n]),
                clean,
                tensor(numbers["noise"][start : start + n]),
                tuple(grid),
            )
            start += n


FILES = ("train_t2i", "train_packed2")


@pytest.mark.parametrize("file", FILES)
@torch.no_grad()
def test_recorded_documents_lie_as_the_references(checkpoint: Checkpoint, file: str) -> None:
    recorded, numbers, config = Recorded(checkpoint, file), golden(f"bagel/{file}.npz"), checkpoint.config
    layout = lay_out(recorded.documents, checkpoint.policy.markers, torch.device("cpu"))
    rows = np.array(recorded.context_rows)
    assert layout.ids.tolist() == numbers["token_ids"][rows].tolist()
    assert token_type(layout) == numbers["token_type"][rows].tolist()
    assert layout.positions.tolist() == numbers["position_ids"][rows].tolist()
    assert layout.latents.tolist() == numbers["gen_expert"][rows].tolist()
    document = torch.arange(len(layout.packing.lengths)).repeat_interleave(layout.packing.lengths)
    column = torch.cat([torch.arange(n) for n in layout.packing.lengths.tolist()])
    same = document[:, None] == document
    mask = layout.mask[document][torch.arange(len(rows)), column][:, column] & same
    assert (mask.numpy() == numbers["attention_mask"][np.ix_(rows, rows)]).all()
    for owner, at, _, _, _, _ in recorded.noised:
        block = numbers["attention_mask"][at]
        assert (block.sum(1) == len(at) + layout.packing.lengths[owner].item()).all(), "itself and all of its document"
        assert not numbers["attention_mask"][np.ix_(rows, at)].any(), "nothing sees a noised image"
        assert set(numbers["position_ids"][at].tolist()) == {layout.after[owner].item()}
    grids = [tuple(grid) for grid in numbers["latent_shapes"].tolist()]
    at = torch.cat([places(grid, config.max_latent_size, torch.device("cpu")) for grid in grids])
    assert at.tolist() == numbers["latent_position_ids"].tolist()


@pytest.mark.parametrize("file", FILES)
@torch.no_grad()
def test_latents_of_padded_images(checkpoint: Checkpoint, file: str) -> None:
    numbers, recorded = golden(f"bagel/{file}.npz"), Recorded(checkpoint, file)
    posterior = checkpoint.vae.encode(tensor(numbers["padded_images"])).latent_dist.mean
    sizes = checkpoint.config.vae_config
    close(sizes.scale_factor * (posterior - sizes.shift_factor), numbers["padded_latent"])
    times = iter([t for *_, t, _, _ in recorded.noised])
    for x, clean, noise, _ in recorded.images(checkpoint):
        t = torch.zeros(1) if torch.equal(x, clean) else next(times)
        close(x, (1 - t) * clean + t * noise)


def test_recorded_training_forward_and_gradients() -> None:
    """Two documents, one of which shows an image to change: cross entropy plus velocity error, through the tower."""
    policy = (checkpoint := store.load(CHECKPOINT, understanding=True)).policy
    assert policy.vit_model is not None
    assert policy.connector is not None
    policy.vit_model.requires_grad_(True)
    policy.connector.requires_grad_(True)
    recorded, numbers = Recorded(checkpoint), golden("bagel/train_packed2.npz")
    hidden, context, _ = read(policy, recorded.documents)
    at = torch.tensor([recorded.context_rows.index(row) for row in numbers["ce_loss_indexes"].tolist()])
    ce = -policy.score(hidden[at], tensor(numbers["ce_labels"]))[0]
    close(ce, numbers["ce"])
    found, wanted = [], []
    for owner, rows, x, t, target, grid in recorded.noised:
        inside = np.isin(rows, numbers["mse_loss_indexes"])
        assert inside.sum() == len(x)
        found.append(policy.velocity(x[None], t, context.take(torch.tensor([owner])), grid)[0])
        wanted.append(target)
    v, mse = torch.cat(found), (torch.cat(found) - torch.cat(wanted)) ** 2
    close(v, numbers["v_pred"])
    close(mse, numbers["mse"], atol=SQUARES)
    loss = ce.mean() + mse.mean()
    close(loss, numbers["loss"])
    loss.backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    names = described("bagel")["train_packed2.npz"]["grad_names"]
    assert sorted(gradients) == names
    close([gradients[name].norm().item() for name in names], numbers["grad_norms"])
    for key in (key for key in numbers if key.startswith("grad:")):
        close(gradients[key.removeprefix("grad:")], numbers[key])
