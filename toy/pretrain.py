"""Trains what the toy data set starts from: its tiny CLIP, toy/clip.pt, and its body, toy/body.pt.

    python -m toy.pretrain     # one to two hours on one core without AMX; its record is toy/pretrained.json

CLIP learns all nouns of toy/sprites.txt, unseen classes too, from scenes and their captions, without masks, in three
stages: small scenes of one emoji, larger ones, scenes as the data set's. Most patches are left out of each image (FLIP,
arXiv 2212.00794): that is faster, and single patches know more, as what is left must name the image.
The body learns to name the 268 nouns that are no class of any world, so it knows no unseen class.
The scores are of new scenes of the same drawings. The files are state dicts in fp16. (Another processor rounds
otherwise and makes other files.)
"""
import argparse
import ctypes
import functools
import json
import math
import platform
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import normalize

import clip
from bodies import build_body
from model import IMAGENET_MEAN, IMAGENET_STD, text_embeddings
from support.checkpoint import atomic, write_json
from support.processes import autocast, fast_precision
from toy import world

CONFIG = dict(embed_dim=128, image_resolution=world.SIZE, vision_layers=4, vision_width=128, vision_patch_size=8,
              context_length=77, vocab_size=49408, transformer_width=64, transformer_layers=3)
LR, WARMUP, WEIGHT_DECAY = 2e-3, 50, 0.1  # peak rate; steps of warm-up at the start of each stage
KEPT = 0.4  # share of an image's patches that CLIP sees in training
SHIFT = 3  # pixels, at most, that a scene is moved each time it is shown
tokens_of = functools.cache(lambda text: clip.tokenize(text)[0])


class Stage(NamedTuple):
    steps: int
    batch: int
    pool: int  # scenes, drawn beforehand
    ground: float  # share of captions that name the ground too
    scenes: dict  # arguments of world.draw


STAGES = (Stage(700, 256, 40000, 0, dict(others=0.8, things=(1, 1), sides=(20, 36), size=world.SIZE // 2)),
          Stage(1500, 192, 30000, 0.1, dict(others=0.8, things=(1, 1), sides=(20, 52))),
          Stage(2000, 128, 30000, 0.1, dict(others=0.6, things=(1, 3), sides=(20, 52))))
BODY = Stage(1500, 96, 30000, 0, dict(others=1.0, things=(1, 1), sides=(20, 52)))


def draw(numbers, seed, scenes):
    """Scenes of these numbers -> [(image, names in it)]; seed: a list of numbers; scenes: arguments of world.draw."""
    return [world.draw(np.random.RandomState([*seed, i]), **scenes)[::2] for i in numbers]


def draw_all(count, seed, scenes):
    """-> images uint8 (count, 3, side, side), a list of names for each"""
    loader = DataLoader(range(count), 64, num_workers=2, collate_fn=functools.partial(draw, seed=seed, scenes=scenes))
    images, names = zip(*(scene for batch in loader for scene in batch))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), names


def progress(name, step, steps, loss):
    """Every 50 steps a line, and glibc gives back what was freed: it keeps it in pieces, 13 GB after 2,000 steps."""
    if step % 50 == 0:
        print(f"{name}  step {step:4d}/{steps}  loss {loss.item():.3f}", flush=True)
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)


def percent(right):
    return round(100 * right.float().mean().item(), 1)


# ---------------------------------------------------------------- CLIP


def caption(names, ground, rng):
    """A scene in words: "a photo of dog and car". A share `ground` of them goes on: "… on grass"."""
    things = [name for name in names if name not in world.GROUNDS]
    grounds = [name for name in names if name in world.GROUNDS]
    words = " and ".join(things[i] for i in rng.permutation(len(things)))
    if grounds and (rng.rand() < ground or not words):
        words = " on ".join(filter(None, (words, " and ".join(grounds))))
    return world.TEMPLATES[rng.randint(len(world.TEMPLATES))].format(words)


def encode_some_patches(visual, images):
    """CLS embeddings (B, D) of what a random share KEPT of each image's patches shows."""
    x = visual.embed(images)  # (B, 1 + N, W)
    kept = torch.rand(len(x), x.shape[1] - 1).argsort(1)[:, :int(KEPT * (x.shape[1] - 1))] + 1
    x = torch.cat([x[:, :1], x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))], dim=1)
    return (visual.ln_post(visual.transformer(x, first=1)) @ visual.proj)[:, 0]


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
    return torch.cat([waves.repeat_interleave(grid, 0), waves.repeat(grid, 1)], dim=1)  # of the row, of the column


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) as torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but in fp32: its products in
    bf16 take longer than all the rest of a step on a CPU without AMX."""

    def __init__(self, matrices):
        super().__init__(matrices, dict(lr=LR))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                x = p.grad.lerp(momentum, 0.95)  # Nesterov's
                x = x / x.norm().clamp(min=1e-7)
                for _ in range(5):  # Newton-Schulz: all singular values go to about 1
                    gram = x @ x.T if len(x) <= len(x.T) else x.T @ x
                    gram = -4.775 * gram + 2.0315 * gram @ gram
                    x = 3.4445 * x + (gram @ x if len(x) <= len(x.T) else x @ gram)
                p.mul_(1 - group["lr"] * WEIGHT_DECAY).sub_(x, alpha=0.2 * max(p.shape) ** 0.5 * group["lr"])


def make_optimizers(model):
    """Muon for the blocks' matrices, AdamW for what is left: top-1 rises several times sooner than with AdamW alone."""
    blocks = [p for name, p in model.named_parameters() if p.ndim == 2 and "resblocks" in name]
    rest = [p for name, p in model.named_parameters() if p.ndim >= 2 and "resblocks" not in name]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [Muon(blocks), torch.optim.AdamW([dict(params=rest, weight_decay=WEIGHT_DECAY),
                                             dict(params=vectors, weight_decay=0)], betas=(0.9, 0.98), fused=True)]


def set_rate(optimizers, peak, step, start, steps):
    """A ramp of WARMUP steps from `start` on, under a cosine over all steps."""
    rate = peak * min((step - start + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def shifted(images, rng):
    """uint8 (B, 3, S, S) -> [0, 1]; all moved by some pixels and mirrored half of the time."""
    size, (top, left) = images.shape[-1], rng.randint(2 * SHIFT + 1, size=2)
    images = F.pad(images / 255, [SHIFT] * 4, mode="replicate")[..., top:top + size, left:left + size]
    return images.flip(-1) if rng.rand() < 0.5 else images


def train_clip(seed, precision):
    model = clip.CLIP(**CONFIG)
    grid = world.SIZE // CONFIG["vision_patch_size"]
    model.visual.positional_embedding.data[1:] = sincos(grid, CONFIG["vision_width"])  # learns shapes much sooner
    optimizers = make_optimizers(model)
    steps, start = sum(stage.steps for stage in STAGES), 0
    for number, stage in enumerate(STAGES):
        images, names = draw_all(stage.pool, [seed, number], stage.scenes)
        for step in range(start, start + stage.steps):
            set_rate(optimizers, LR, step, start, steps)
            rng = np.random.RandomState([seed, step])
            pick = rng.randint(len(images), size=stage.batch)
            batch = shifted(images[pick], rng)
            tokens = torch.stack([tokens_of(caption(names[i], stage.ground, rng)) for i in pick])
            with autocast(batch.device, precision), sdpa_kernel(SDPBackend.MATH):  # the fused backward is slower
                z = encode_some_patches(model.visual, batch)
            loss = contrastive_loss(z, tokens, model)
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            progress("clip", step, steps, loss)
        start += stage.steps
    return model


@torch.no_grad()
def zero_shot(model, seed, count=2000):
    """Top-1 among all nouns on scenes of one thing, in percent: of all of them, and of those that show a class."""
    images, scenes = draw_all(count, [seed, len(STAGES)], dict(others=0.8, things=(1, 1)))
    z = F.normalize(torch.cat([model.encode_image(chunk / 255) for chunk in images.split(256)]), dim=-1)
    t = text_embeddings(model, world.NOUNS, world.TEMPLATES)
    right = torch.tensor([world.NOUNS[k] in names for k, names in zip((z @ t.T).argmax(1), scenes)])
    own = torch.tensor([bool(set(names) & set(world.CLASSES)) for names in scenes])
    things = torch.tensor([bool(set(names) & set(world.NOUNS)) for names in scenes])
    return {"nouns": percent(right[things]), "classes among nouns": percent(right[own])}


# ---------------------------------------------------------------- the body


def train_body(seed, precision):
    """-> SmallBody, top-1 in percent on scenes that it was not trained on"""
    images, names = draw_all(BODY.pool, [seed, len(STAGES) + 1], BODY.scenes)
    visible = [i for i, held in enumerate(names) if set(held) & set(world.OTHERS)]
    y = torch.tensor([world.OTHERS.index(next(n for n in names[i] if n in world.OTHERS)) for i in visible])
    images, kept = images[visible], len(visible) - BODY.pool // 30  # the last ones are for the test
    body = build_body("small", "none")
    classifier = nn.Linear(body.out_channels, len(world.OTHERS))
    optimizer = torch.optim.AdamW([*body.parameters(), *classifier.parameters()], weight_decay=0.05, fused=True)

    def logits(images):  # what is anywhere, and what is everywhere
        with autocast(images.device, precision):
            x = body(normalize(images, IMAGENET_MEAN, IMAGENET_STD)).float()
        return classifier((x.amax((2, 3)) + x.mean((2, 3))) / 2)

    for step in range(BODY.steps):
        set_rate([optimizer], 3e-3, step, 0, BODY.steps)
        rng = np.random.RandomState([seed, step])
        pick = rng.randint(kept, size=BODY.batch)
        loss = F.cross_entropy(logits(shifted(images[pick], rng)), y[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress("body", step, BODY.steps, loss)
    with torch.no_grad():
        found = torch.cat([logits(chunk / 255).argmax(1) for chunk in images[kept:].split(100)])
    return body, percent(found == y[kept:])


def write(model, path):
    def save(partial):
        with open(partial, "wb") as file:  # given a name, torch writes it into the file, which changes its hash
            torch.save({key: x.half() for key, x in model.state_dict().items()}, file)

    atomic(path, save)
    return clip.file_sha256(path)


def main(args):
    start, precision = time.time(), fast_precision(torch.device("cpu"))
    torch.manual_seed(args.seed)
    file = args.out / "pretrained.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    record |= {"torch": torch.__version__, "precision": precision, "threads": torch.get_num_threads()}
    # of each file, as the body that is trained after CLIP is another than the one trained alone
    command = f"python -m toy.pretrain --seed {args.seed}" + f" --only {args.only}" * bool(args.only)
    if args.only != "body":
        record["command of clip.pt"] = command
        record["clip.pt"] = write(train_clip(args.seed, precision), args.out / "clip.pt")
        record["top1 of clip.pt"] = zero_shot(clip.load(args.out / "clip.pt"), args.seed)
        record["seconds of clip.pt"] = round(time.time() - start)
    if args.only != "clip":
        start, record["command of body.pt"] = time.time(), command
        body, top1 = train_body(args.seed, precision)
        record |= {"body.pt": write(body, args.out / "body.pt"), "top1 of body.pt": top1}
        record["seconds of body.pt"] = round(time.time() - start)
    write_json(file, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("clip", "body"), help="one of the two files (default: both)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, weights and order (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="FOLDER", help="(default: toy/)")
    main(parser.parse_args())
