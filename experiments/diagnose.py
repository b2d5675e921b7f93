"""Why a row of the study ends where it does: what SGD selects, where dense features point, which are alike.

    python -m experiments.diagnose     # results/similarity.png from the runs that python -m experiments.study left under runs/study

`Probe` looks at a run while it trains; nothing that it does reaches the training.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from support import checkpoint
import clip
import data
from support import command as guard
import inference
import losses
import model as models
from support import pictures
import sources
import train
from toy import world

ROOT = Path(__file__).parent.parent
IMAGES, EVERY = 100, 250  # test images that the probe looks at, steps between looks
MAPS = {"qk": "full", "vv": "attention-vv", "self": "attention-self"}  # attention kind: row of the study


class Probe:
    """Writes probe.jsonl into a run's folder: at step 0, each EVERY steps and the last one an object of

    step, k               and, all but these in percent or as cosines, over IMAGES test images with all their labels:
    unseen_things, seen_things, unseen_grounds, seen_grounds    shares of the k positions most similar to c
    all_unseen_things, …  the same shares of all positions
    cosine_seen, cosine_unseen     mean z_i · t of the position's own class
    unseen_as_seen, seen_as_unseen  share of unseen positions labelled as a seen class, and the other way round
    """

    def __init__(self, args):
        self.source = sources.open_dataset(args.dataset, args.data_root)
        view = data.ValSet(self.source)
        pairs = [view[i] for i in range(min(IMAGES, len(view)))]
        self.images = torch.stack([image for image, _, _ in pairs]).float() / 255
        self.labels = torch.stack([labels for _, labels, _ in pairs])
        self.file = args.out_dir / "probe.jsonl"

    def watch(self):
        """From here on train.main shows its model and teacher to the probe, and each step's k."""
        build, load, k_at = models.build, clip.load, losses.k_at
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("")

        def built(*args, **config):
            self.model = build(*args, **config)
            return self.model

        def loaded(path):
            self.clip = load(path)
            return self.clip

        def counted(step, steps, *rest):
            k = k_at(step, steps, *rest)
            if step % EVERY == 0 or step == steps - 1:
                with open(self.file, "a") as file:
                    file.write(json.dumps({"step": step, "k": k, **self.look(self.model, self.clip, k)}) + "\n")
            return k

        models.build, clip.load, losses.k_at = built, loaded, counted

    @torch.inference_mode()
    def look(self, model, clip_model, k):
        source = self.source
        was_training = model.training
        model.eval()
        z = torch.cat([model(part) for part in self.images.split(50)]).flatten(2)  # (B, D, N)
        model.train(was_training)
        c = train.cls_embeddings(clip_model, self.images)  # (B, D)
        t = models.text_embeddings(clip_model, source.classes, source.templates)  # (K, D)
        side = round(z.shape[2] ** 0.5)
        truth = F.interpolate(self.labels[:, None].float(), (side, side), mode="nearest-exact")
        truth = truth.long().flatten(1)  # (B, N)

        chosen = torch.zeros_like(truth, dtype=torch.bool)
        chosen.scatter_(1, torch.einsum("bdn,bd->bn", z, c).topk(k, dim=1).indices, True)
        unseen = torch.isin(truth, torch.tensor(sorted(source.unseen)))
        thing = truth < len(world.THINGS)
        kinds = {"unseen_things": unseen & thing, "seen_things": ~unseen & thing, "unseen_grounds": unseen & ~thing,
                 "seen_grounds": ~unseen & ~thing}
        cosine = torch.einsum("bdn,kd->bkn", z, t)
        own = cosine.gather(1, truth[:, None])[:, 0]
        as_unseen = torch.isin(cosine.argmax(1), torch.tensor(sorted(source.unseen)))

        def share(what, of):
            return round(100 * (what & of).sum().item() / of.sum().item(), 2)

        return ({name: share(kind, chosen) for name, kind in kinds.items()}
                | {f"all_{name}": share(kind, chosen | True) for name, kind in kinds.items()}
                | {"cosine_seen": round(own[~unseen].mean().item(), 4),
                   "cosine_unseen": round(own[unseen].mean().item(), 4),
                   "unseen_as_seen": share(~as_unseen, unseen), "seen_as_unseen": share(as_unseen, ~unseen)})


@torch.inference_mode()
def similarity_maps(runs, source, images=5):
    """{title: run folder} -> a sheet: a test image with a mark on an unseen thing, then z_i · z_mark under each run."""
    view, rows = data.ValSet(source), []
    loaded = [inference.load_run(folder / "last.pt", torch.device("cpu"))[0] for folder in runs.values()]
    things = torch.tensor([k for k in sorted(source.unseen) if k < len(world.THINGS)])
    for image, labels, _ in (view[i] for i in range(len(view))):
        inside = torch.isin(labels, things).float()
        depth = F.avg_pool2d(inside[None], 9, 1, 4)[0]  # largest where the mark is well inside
        if depth.max() < 0.99:
            continue
        y, x = divmod(int(depth.argmax()), labels.shape[1])
        marked = image.clone()
        marked[:, y - 2:y + 2, x - 2:x + 2] = torch.tensor([255, 255, 255], dtype=torch.uint8)[:, None, None]
        row = [marked]
        for model in loaded:
            z = model(image[None].float() / 255)[0]  # (D, h, w)
            like = torch.einsum("dhw,d->hw", z, z[:, y * z.shape[1] // len(labels), x * z.shape[2] // len(labels[0])])
            grey = F.interpolate(like.clamp(0, 1)[None, None], labels.shape, mode="bilinear")[0]
            row.append((255 * grey).byte().expand(3, -1, -1))
        rows.append(row)
        if len(rows) == images:
            break
    return pictures.sheet(rows, ("image, marked", *runs), set(), source)


def main(args):
    folders = {kind: args.runs / f"{row}-world0-seed0" for kind, row in MAPS.items()}
    sheet = similarity_maps(folders, sources.open_dataset("toy"))
    checkpoint.atomic(args.out, lambda path: sheet.save(path, "PNG"))
    print(f"wrote {args.out}")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study", metavar="FOLDER",
                        help=f"holds the runs of seed 0 of {', '.join(MAPS.values())} (default: runs/study)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "similarity.png", metavar="FILE",
                        help="(default: results/similarity.png)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    guard.run_command(main, parse)
