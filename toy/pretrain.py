"""Trains the tiny CLIP of the toy data set, toy/clip.pt, from scratch: scenes and their captions, no masks.

    python -m toy.pretrain     # 18 minutes on one core with AMX; writes toy/clip.pt and its record toy/clip.json

It learns all nouns of toy/sprites.txt and the eight grounds, in three stages (STAGES below): small scenes of one emoji
whose captions name that alone, larger ones, then scenes as the world's. If captions speak of grounds from the start, it
learns grounds but no nouns. Names of unseen classes occur in captions, as in the real CLIP's; which classes
are unseen plays no part here. The scores are of new scenes of the same drawings. The file is a state dict in OpenAI's
names in fp16: `clip.load` reads it like any other. (Another processor rounds otherwise and makes another file.)

Needs PyTorch 2.9 or newer for its Muon; nothing else here does.
"""
import argparse
import functools
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

import clip
from support.checkpoint import atomic
from support.processes import autocast, fast_precision
from toy import world

CONFIG = dict(embed_dim=128, image_resolution=world.SIZE, vision_layers=4, vision_width=128, vision_patch_size=8,
              context_length=77, vocab_size=49408, transformer_width=64, transformer_layers=3)
NOUNS = world.THINGS + world.OTHERS
LR, WARMUP, WEIGHT_DECAY = 2e-3, 50, 0.1  # peak rate; steps of warm-up at the start of each stage
EMPTY = 10  # every tenth scene is a ground without a thing
SHIFT = 3  # pixels, at most, that a scene is moved each time it is shown
TEST = dict(others=0.8, things=(1, 1))  # scenes of one thing; the scores are of these
tokens_of = functools.cache(lambda text: clip.tokenize(text)[0])


class Stage(NamedTuple):
    steps: int
    batch: int
    pool: int  # scenes, drawn beforehand
    about: tuple  # odds that a caption names the things, the grounds, both
    scenes: dict  # arguments of world.draw


STAGES = (Stage(700, 256, 40000, (1, 0, 0), dict(others=0.8, things=(1, 1), sides=(20, 36), size=world.SIZE // 2)),
          Stage(900, 192, 30000, (0.84, 0.06, 0.1), dict(others=0.8, things=(1, 1), sides=(20, 52))),
          Stage(700, 128, 20000, (0.45, 0.2, 0.35), dict(others=0.6, things=(0, 3), sides=(20, 52))))


class Scenes(Dataset):
    """Scene i of a seed (a list of numbers): image uint8 (side, side, 3), names in it. scenes: for world.draw."""

    def __init__(self, count, seed, scenes):
        self.count, self.seed, self.scenes = count, seed, scenes

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        what = self.scenes | (dict(things=(0, 0)) if i % EMPTY == 0 else {})
        image, _, names = world.draw(np.random.RandomState([*self.seed, i]), **what)
        return image, names

    def all(self):
        """-> images uint8 (count, 3, side, side), a list of names for each"""
        items = [item for batch in DataLoader(self, 64, num_workers=2, collate_fn=list) for item in batch]
        images = torch.from_numpy(np.stack([image for image, _ in items])).permute(0, 3, 1, 2).contiguous()
        return images, [names for _, names in items]


def caption(names, about, rng):
    """A scene in words: "a photo of dog and car on grass", or its things or its grounds alone. about: their odds."""
    stuff = [name for name in names if name in world.STUFF]
    things = [name for name in names if name not in world.STUFF]
    things = [things[i] for i in rng.permutation(len(things))]
    parts = ([things], [stuff], [things, stuff])[rng.choice(3, p=about)]
    words = " on ".join(" and ".join(part) for part in parts if part) or " and ".join(stuff or things)
    return world.TEMPLATES[rng.randint(len(world.TEMPLATES))].format(words)


def contrastive_loss(z, tokens, model):
    """CLIP's symmetric loss of image embeddings z (B, D) and their captions, tokens (B, L).

    Equal captions are no negatives of each other: their images share one target."""
    tokens, same = tokens.unique(dim=0, return_inverse=True)
    z, t = F.normalize(z.float(), dim=-1), F.normalize(model.encode_text(tokens).float(), dim=-1)
    logits = z @ t.T * model.logit_scale.clamp(max=math.log(100)).exp()  # (B, P)
    own = F.one_hot(same, len(t)).T / torch.bincount(same)[:, None]  # (P, B)
    return (F.cross_entropy(logits, same) - (own * logits.T.log_softmax(-1)).sum(-1).mean()) / 2


def sincos(grid, width):
    """2-D sine-cosine table (grid², width) to start the positions from: near patches have near rows."""
    frequency = torch.exp(torch.linspace(0, math.log(2 * grid), width // 4)) * math.pi / (2 * grid)
    angle = torch.arange(grid)[:, None] * frequency  # (grid, width / 4)
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, width / 2)
    rows, columns = waves[:, None].expand(-1, grid, -1), waves[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(grid * grid, width)


def make_optimizers(model):
    """Muon for the blocks' matrices, AdamW for what is left: top-1 rises several times sooner than with AdamW alone."""
    blocks = [p for name, p in model.named_parameters() if p.ndim == 2 and "resblocks" in name]
    rest = [p for name, p in model.named_parameters() if p.ndim >= 2 and "resblocks" not in name]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [torch.optim.Muon(blocks, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([dict(params=rest, weight_decay=WEIGHT_DECAY), dict(params=vectors, weight_decay=0)],
                              betas=(0.9, 0.98), fused=True)]


@torch.no_grad()
def zero_shot(model, images, scenes):
    """Top-1 in percent on scenes of one thing: of all nouns, of the world's 20 things among all nouns and among
    themselves, and of the grounds among themselves (either counts where there are two)."""
    z = F.normalize(torch.cat([model.encode_image(chunk / 255) for chunk in images.split(256)]), dim=-1)

    def right(words, rows):
        t = torch.stack([model.encode_text(clip.tokenize([t.format(w) for w in words])) for t in world.TEMPLATES])
        best = (z[rows] @ F.normalize(F.normalize(t, dim=-1).mean(0), dim=-1).T).argmax(-1)
        return round(100 * sum(words[k] in scenes[i] for k, i in zip(best, rows)) / len(rows), 1)

    things = [i for i, names in enumerate(scenes) if set(names) & set(NOUNS)]
    own = [i for i in things if set(scenes[i]) & set(world.THINGS)]
    return {"nouns": right(NOUNS, things), "things among nouns": right(NOUNS, own), "things": right(world.THINGS, own),
            "grounds": right(world.STUFF, range(len(scenes)))}


def main(args):
    start, device = time.time(), torch.device("cpu")
    precision = fast_precision(device)
    torch.manual_seed(args.seed)
    model = clip.CLIP(**CONFIG)
    grid = world.SIZE // CONFIG["vision_patch_size"]
    model.visual.positional_embedding.data[1:] = sincos(grid, CONFIG["vision_width"])  # learns shapes much sooner
    optimizers = make_optimizers(model)
    steps, step = sum(stage.steps for stage in STAGES), 0
    for number, stage in enumerate(STAGES):
        images, names = Scenes(stage.pool, [args.seed, number], stage.scenes).all()
        size = images.shape[-1]
        print(f"stage {number}: {len(images)} scenes of {size} pixels  {time.time() - start:.0f} s", flush=True)
        for i in range(stage.steps):
            rate = LR * min((i + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
                group["lr"] = rate
            rng = np.random.RandomState([args.seed, step])
            pick = rng.randint(len(images), size=stage.batch)
            top, left = rng.randint(2 * SHIFT + 1, size=2)
            batch = F.pad(images[pick] / 255, [SHIFT] * 4, mode="replicate")[..., top:top + size, left:left + size]
            if rng.rand() < 0.5:
                batch = batch.flip(-1)
            tokens = torch.stack([tokens_of(caption(names[i], stage.about, rng)) for i in pick])
            with autocast(device, precision), sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward is slower
                z = model.encode_image(batch)
            loss = contrastive_loss(z, tokens, model)
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            if step % 50 == 0:
                print(f"step {step:4d}/{steps}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)
            step += 1
    state = {key: value.half() for key, value in model.state_dict().items()}
    atomic(args.out, lambda partial: torch.save(state, partial))

    test = Scenes(args.test_scenes, [args.seed, len(STAGES)], TEST).all()
    record = {"command": f"python -m toy.pretrain --seed {args.seed}", "torch": torch.__version__,
              "precision": precision, "threads": torch.get_num_threads(), "seconds": round(time.time() - start),
              "zero_shot_top1": zero_shot(clip.load(args.out), *test), "test_scenes": args.test_scenes,
              "sha256": clip.file_sha256(args.out)}
    atomic(args.out.with_suffix(".json"), lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of scenes, weights and order (default: 0)")
    parser.add_argument("--test-scenes", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "clip.pt", metavar="FILE",
                        help="its record goes beside it (default: toy/clip.pt)")
    main(parser.parse_args())
