"""Trains the tiny CLIP of the embedded default, toy/clip.pt, on scenes and their captions alone: no mask is used.

Names of unseen classes occur in captions, as in the real CLIP's; which are unseen plays no part but in the scores.
The committed file was made in stages while the world changed: toy/clip.json has the commands.
Saved in OpenAI's state-dict format in fp16, so `clip.load` reads it like any other CLIP.

    python -m toy.pretrain                                     # 9000 steps took 35 minutes on two CPU cores
    python -m toy.pretrain --init toy/clip.pt --steps 1000 --out clip.pt    # goes on, writes clip.pt and clip.json
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import clip
from support.checkpoint import atomic
from toy import world

CONFIG = dict(embed_dim=128, image_resolution=world.SIZE, vision_layers=4, vision_width=96, vision_patch_size=8,
              context_length=77, vocab_size=49408, transformer_width=64, transformer_layers=3)
HERE = Path(__file__).parent


class Scenes(Dataset):
    """Scene i of seed s is drawn from (s, i): image uint8 (64, 64, 3) and the names in it."""

    def __init__(self, count, seed, max_things=3):
        self.count, self.seed, self.max_things = count, seed, max_things

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        rng = np.random.RandomState([self.seed, i])
        image, _, names = world.draw(rng, max_things=1 if i % 2 == 0 else self.max_things)
        return image, names

    def all(self, workers):
        loader = DataLoader(self, batch_size=64, num_workers=workers, collate_fn=list)  # numpy: nothing is shared
        items = [item for batch in loader for item in batch]
        images = torch.from_numpy(np.stack([image for image, _ in items])).permute(0, 3, 1, 2).contiguous()
        return images, [names for _, names in items]


def caption(names, rng):
    """A scene in words: "a photo of red ring and blue cross on dark sand", or its things or its grounds alone."""
    things = [n for n in names if n in world.THINGS]
    stuff = [n for n in names if n in world.STUFF]
    things = [things[i] for i in rng.permutation(len(things))]
    about = rng.rand()  # half speak of the things, a quarter of the grounds, a quarter of both
    parts = [things] if about < 0.5 else [stuff] if about < 0.75 else [things, stuff]
    words = " on ".join(" and ".join(part) for part in parts if part) or " and ".join(stuff or things)
    return world.TEMPLATES[rng.randint(len(world.TEMPLATES))].format(words)


def sincos(grid, width):
    """2-D sine-cosine table (grid², width) to start the positions from: near patches have near rows."""
    frequency = torch.exp(torch.linspace(0, math.log(2 * grid), width // 4)) * math.pi / (2 * grid)
    angle = torch.arange(grid)[:, None] * frequency  # (grid, width / 4)
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, width / 2)
    rows, columns = waves[:, None].expand(-1, grid, -1), waves[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(grid * grid, width)


@torch.no_grad()
def zero_shot(model, images, names):
    """Top-1 among all things on scenes of one thing, in percent: all, seen, unseen."""
    text = torch.stack([model.encode_text(clip.tokenize([t.format(c) for c in world.THINGS])) for t in world.TEMPLATES])
    text = F.normalize(F.normalize(text, dim=-1).mean(0), dim=-1)  # (K, D)
    z = F.normalize(torch.cat([model.encode_image(chunk / 255) for chunk in images.split(256)]), dim=-1)
    truth = torch.tensor([world.THINGS.index(next(n for n in ns if n in world.THINGS)) for ns in names])
    right = (z @ text.T).argmax(-1) == truth
    hidden = torch.isin(truth, torch.tensor([world.THINGS.index(c) for c in world.unseen() if c in world.THINGS]))
    return {key: round(100 * right[part].float().mean().item(), 2)
            for key, part in (("all", hidden >= 0), ("seen", ~hidden), ("unseen", hidden))}


def main(args):
    start = time.time()
    torch.manual_seed(args.seed)
    rng = np.random.RandomState(args.seed)
    images, names = Scenes(args.scenes, args.seed).all(args.workers)
    print(f"{len(images)} scenes drawn in {time.time() - start:.0f} s", flush=True)

    if args.init:
        model = clip.load(args.init).requires_grad_(True)
    else:
        model = clip.CLIP(**CONFIG)
        model.visual.positional_embedding.data[1:] = sincos(8, CONFIG["vision_width"])  # learns shapes much sooner
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)],
                                  lr=args.lr, betas=(0.9, 0.98))
    for step in range(args.steps):
        for group in optimizer.param_groups:  # warm up for a twentieth, then cosine
            group["lr"] = args.lr * min(20 * (step + 1) / args.steps, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        pick = rng.randint(len(images), size=args.batch_size)
        if step < 0.6 * args.steps:
            pick -= pick % 2  # even scenes hold one thing: words are learned one by one, then in company
        batch = images[pick].float() / 255
        batch = torch.rot90(batch, rng.randint(4), (2, 3))  # names do not depend on the side up
        if rng.rand() < 0.5:
            batch = batch.flip(-1)
        tokens = clip.tokenize([caption(names[i], rng) for i in pick])
        tokens, same = tokens.unique(dim=0, return_inverse=True)  # equal captions are no negatives of each other
        z, t = F.normalize(model.encode_image(batch), dim=-1), F.normalize(model.encode_text(tokens), dim=-1)
        logits = z @ t.T * model.logit_scale.clamp(max=math.log(100)).exp()  # (B, P)
        count = torch.bincount(same, minlength=len(t))
        to_text = F.cross_entropy(logits, same)
        own = F.one_hot(same, len(t)).T / count[:, None]  # (P, B): each caption's images share its target
        to_image = -(own * logits.T.log_softmax(-1)).sum(-1).mean()
        loss = (to_text + to_image) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step:5d}/{args.steps}  loss {loss.item():.3f}  scale {model.logit_scale.exp().item():.1f}  "
                  f"{time.time() - start:.0f} s", flush=True)
        if step % 500 == 499 or step == args.steps - 1:
            state = {key: value.half() for key, value in model.state_dict().items()}
            atomic(args.out, lambda partial, state=state: torch.save(state, partial))

    images, names = Scenes(2 * args.test_scenes, args.seed + 1).all(args.workers)
    score = zero_shot(clip.load(args.out), images[::2], names[::2])  # every second scene holds one thing
    command = " ".join(["python -m toy.pretrain", *sys.argv[1:]])
    record = {"command": command, "torch": torch.__version__, "threads": torch.get_num_threads(),
              "seconds": round(time.time() - start), "test_scenes": args.test_scenes, "zero_shot_top1": score,
              "final_loss": round(loss.item(), 3), "sha256": clip.file_sha256(args.out)}
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("schedule").add_argument
    group("--steps", type=int, default=9000, help="optimiser steps (default: %(default)s)")
    group("--batch-size", type=int, default=64, help="scenes a step (default: %(default)s)")
    group("--lr", type=float, default=1e-3, help="AdamW's peak rate (default: %(default)s)")
    group("--init", type=Path, metavar="FILE", help="go on from this CLIP (default: random weights)")
    group = parser.add_argument_group("scenes and run").add_argument
    group("--scenes", type=int, default=30000, help="for training (default: %(default)s)")
    group("--test-scenes", type=int, default=1000, help="of one thing, from another seed (default: %(default)s)")
    group("--seed", type=int, default=0, help="of scenes, weights and order (default: %(default)s)")
    group("--workers", type=int, default=2, help="processes that draw scenes (default: %(default)s)")
    group("--out", type=Path, default=HERE / "clip.pt", metavar="FILE", help="the CLIP; its record goes beside it, "
          "ending in .json (default: toy/clip.pt)")
    main(parser.parse_args())
