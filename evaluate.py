"""Evaluates a run: one joint confusion matrix over all labelled pixels, seen and unseen classes together.

    python evaluate.py                      # the newest run under runs/
    python evaluate.py --run runs/voc --save-predictions maps
    torchrun --nproc-per-node 4 evaluate.py --checkpoint runs/voc/last.pt   # torchrun has its own --run

Prints a line per class; writes metrics.json and preview.png. hIoU = 2su / (s + u) of the seen (s) and unseen (u) mIoU.
"""
import argparse
import dataclasses
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import clip
import data
import sources
from bodies import ModelError
from losses import IGNORE
from model import build
from support import UserError, first_line, pictures, processes, windows
from support.checkpoint import CheckpointError, find_checkpoint, read_checkpoint, write_json
from support.command import run_command
from support.progress import Progress

UNSEEN_ALONE = 1e9  # as γ: no seen class can win
PICTURES = {"cpu": 1, "cuda": 8}  # whose windows are seen together
FIGURES = {"pAcc": "pAcc", "mIoU_seen": "mIoU seen", "mIoU_unseen": "mIoU unseen", "hIoU": "hIoU"}


# ---------------------------------------------------------------- scores


def confusion(truth, prediction, classes):
    """Label maps -> int64 (K, K), rows truth, columns prediction; IGNORE in the truth is left out."""
    index = truth.long() * classes + prediction
    index = index.where(truth != IGNORE, classes**2).flatten()  # a last place takes what is left out
    count = torch.zeros(classes**2 + 1, dtype=torch.long, device=index.device)
    return count.index_add_(0, index, torch.ones_like(index))[:-1].view(classes, classes)  # bincount waits for a GPU


def metrics(matrix, classes, unseen):
    """Joint confusion matrix -> {"pAcc", "mIoU_seen", "mIoU_unseen", "hIoU", "IoU": {class: value}}, in percent.

    IoU of a class that is in neither truth nor prediction is None and left out of the means. Without unseen classes
    mIoU_unseen and hIoU are None."""
    matrix = matrix.cpu().double()
    hit = matrix.diag()
    union = matrix.sum(0) + matrix.sum(1) - hit
    iou = [100 * (h / u).item() if u > 0 else None for h, u in zip(hit, union)]

    def mean(indexes):
        values = [iou[k] for k in indexes if iou[k] is not None]
        return sum(values) / len(values) if values else None

    s, u = mean([k for k in range(len(classes)) if k not in unseen]), mean(sorted(unseen))
    harmonic = None if s is None or u is None else 2 * s * u / (s + u) if s + u else 0.0
    accuracy = 100 * (hit.sum() / matrix.sum()).item() if matrix.sum() else None
    return {"pAcc": accuracy, "mIoU_seen": s, "mIoU_unseen": u, "hIoU": harmonic, "IoU": dict(zip(classes, iou))}


def evaluate(model, source, device, precision, gamma=None, unseen_only=False, predictions=None, workers=None):
    """Scores `model` on the source's test images; several processes take a part each, without repeats.

    -> {"gamma_0": metrics, "images": their number, "dataset", "unseen": names, "short_side"}; leaves the model in eval
    mode.
    gamma        adds "calibrated": metrics with γ subtracted from the seen classes' logits. FIELD: some code subtracts
                 0.1 from seen sigmoid scores; compare scores at γ = 0
    unseen_only  adds "unseen_only": {"pAcc", "mIoU", "IoU"} of the unseen classes' pixels, labelled with unseen
                 classes only: a far easier task, not comparable with the joint scores
    predictions  folder that gets NAME.png of every image: class indexes in a palette, γ = 0
    workers      loader processes, at most 4, on a CPU none; by default this process's share of the cores"""
    if gamma is not None and not abs(gamma) <= UNSEEN_ALONE:  # NaN neither
        raise UserError(f"--gamma {gamma}: expected a number up to {UNSEEN_ALONE:g}")
    K, recipe = len(source.classes), source.recipe
    seen = torch.tensor([k not in source.unseen for k in range(K)], device=device)
    gammas = [0.0]
    if gamma is not None:
        gammas.append(gamma)
    if unseen_only:
        gammas.append(UNSEEN_ALONE)
    lower_by = torch.tensor(gammas, device=device)[:, None] * seen  # (G, K)
    matrices = torch.zeros(len(gammas), K, K, dtype=torch.long, device=device)
    part = data.ValSet(source, processes.rank(), processes.world_size())
    workers = 0 if device.type == "cpu" else min(processes.loader_workers() if workers is None else workers, 4)
    items = iter(DataLoader(part, batch_size=None, num_workers=workers, pin_memory=device.type == "cuda"))
    progress, done = Progress("test", len(part), "images"), 0
    if predictions and (kept := [name for name, *_ in source.val if pictures.foreign(predictions / f"{name}.png")]):
        raise UserError(f"{predictions}/{kept[0]}.png was not written by this command: choose another folder")
    model.eval()
    with torch.inference_mode(), processes.autocast(device, precision):
        while some := list(islice(items, PICTURES.get(device.type, 1))):
            found = windows.label(model.logits, [image for image, *_ in some], recipe.short_side, recipe.window,
                                  recipe.stride, lower_by)
            for (_, truth, name), maps in zip(some, found):
                truth = truth.to(device, non_blocking=True)
                for matrix, labels in zip(matrices, maps):  # maps (G, H, W)
                    matrix += confusion(truth, labels, K)
                if predictions:
                    pictures.save_mask(maps[0].cpu(), predictions / f"{name}.png", pictures.MARK)
            done += len(some)
            if processes.rank() == 0:
                progress.say(done)
    if processes.world_size() > 1:
        dist.all_reduce(matrices)
    unseen = sorted(source.unseen)
    names = [source.classes[k] for k in unseen]
    result = {"images": len(source.val), "dataset": source.name, "unseen": names, "short_side": recipe.short_side,
              "gamma_0": metrics(matrices[0], source.classes, source.unseen)}
    if gamma is not None:
        result["calibrated"] = metrics(matrices[1], source.classes, source.unseen) | {"gamma": gamma}
    if unseen_only:
        alone = metrics(matrices[-1][unseen][:, unseen], names, range(len(names)))
        result["unseen_only"] = {"pAcc": alone["pAcc"], "mIoU": alone["mIoU_unseen"], "IoU": alone["IoU"]}
    return result


# ---------------------------------------------------------------- what people see


def cell(value):
    return f"{value:8.1f}" if value is not None else f"{'–':>8}"


def table(result, source):
    """The result as text: one line per class, then the four scores; a second column if γ was given."""
    columns = [result[key] for key in ("gamma_0", "calibrated") if key in result]
    width = max(len(name) for name in [*source.classes, *FIGURES.values()]) + 2
    lines = [f"{'IoU, %':<{width}}" + "".join(f"  γ={c.get('gamma', 0):<4g}" for c in columns)]
    for k, name in enumerate(source.classes):
        mark = " *" if k in source.unseen else ""
        lines.append(f"{name + mark:<{width}}" + "".join(cell(c["IoU"][name]) for c in columns))
    lines.append("-" * (width + 8 * len(columns)))
    lines += [f"{name:<{width}}" + "".join(cell(c[key]) for c in columns) for key, name in FIGURES.items()]
    lines.append("* unseen in training; " * bool(source.unseen) + f"{result['images']} test images")
    if "unseen_only" in result:
        alone = result["unseen_only"]
        lines.append(f"a different task, pixels of unseen classes labelled with these only: mIoU "
                     f"{cell(alone['mIoU']).strip()}, pAcc {cell(alone['pAcc']).strip()}")
    if result.get("departures"):
        lines.append(f"not the benchmark's protocol: {result['departures']}")
    return "\n".join(lines)


def preview(model, source, device, precision):
    """Six test images, two per row: image | truth | prediction (γ = 0), legend below; unseen classes have a *.

    Of the first fifty those that show an unseen class come first. Void is white, in the prediction too."""
    view, recipe, samples, shown = data.ValSet(source), source.recipe, [], set()
    nothing = torch.zeros(1, len(source.classes), device=device)  # taken off the logits
    first = [view[i] for i in range(min(50, len(view)))]
    first.sort(key=lambda item: not source.unseen & set(item[1].unique().tolist()))  # else in their own order
    for image, truth, _ in first[:6]:
        with processes.autocast(device, precision):
            labels = windows.label(model.logits, [image], recipe.short_side, recipe.window, recipe.stride, nothing)[0]
        labels = labels[0].cpu().masked_fill(truth == IGNORE, IGNORE)
        shown |= set(truth.unique().tolist()) | set(labels.unique().tolist())
        samples.append([image, pictures.coloured(truth), pictures.coloured(labels)])
    names = {k: name.split(",")[0] + " *" * (k in source.unseen) for k, name in enumerate(source.classes) if k in shown}
    rows = [sum(samples[i:i + 2], []) for i in range(0, len(samples), 2)]
    return pictures.sheet(rows, ("image", "truth", "prediction") * 2, names, side=128)


def report(result, model, source, device, precision, out):
    """Prints the table, writes metrics.json and preview.png into `out`."""
    write_json(out / "metrics.json", result | processes.provenance(device))
    pictures.save(preview(model, source, device, precision), out / "preview.png")
    print(f"{table(result, source)}\nwrote {out}/metrics.json and preview.png", flush=True)


# ---------------------------------------------------------------- a run, opened again


def load_run(checkpoint, device, clip_file=None):
    """last.pt of train.py -> (model in eval mode without CLIP's image tower, the run's config).

    clip_file: where the run's CLIP lies now, by default where it lay in training. Says so if the run is not finished.
    Raises CheckpointError, ModelError, CLIPError."""
    saved = processes.from_first(lambda: read_checkpoint(checkpoint))
    config = saved["config"]
    try:
        texts = [*config["classes"], *config["templates"]]
        if not all(isinstance(text, str) and text.strip(" ,_") for text in texts) or min(config["test"].values()) < 1 \
                or not all("{}" in text for text in config["templates"]):
            raise ValueError("a class without a word, a prompt without {}, or a test size below 1")
        clip_model = clip.load(clip_file or config["clip"])
        if clip.fingerprint(clip_model) != config["clip_hash"]:
            raise ModelError(f"{clip_file or config['clip']} is not the CLIP that {checkpoint} was trained with: "
                             "give --clip")
        model = build(clip_model, **config["model"] | {"body_weights": "none"})
        unfinished = saved["step"] < config["steps"]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint}: its settings were changed after the training, or are of another version "
                              f"({type(error).__name__}: {first_line(error)})") from None
    model.load_trained_state(saved["model"])
    del clip_model.visual  # what the head needs of it, it has copied
    clip_model.to(device)  # the text tower
    if unfinished and processes.rank() == 0:
        print(f"the run is not finished: this is its state at step {saved['step']} of {config['steps']}",
              file=sys.stderr, flush=True)
    return model.to(device).eval(), config


def open_run_dataset(config, name=None, root=None):
    """The run's own data set, or another one: with the run's prompts and test sizes.

    Unseen are the classes that had no masks in the run. Raises DataError."""
    own = None if name else config["data_root"]
    if own and not root and not Path(own).is_dir():
        raise sources.DataError(f"the run's data set is no longer in {own}: give --data-root")
    source = sources.open_dataset(name or config["dataset"], root or own)
    source.templates = tuple(config["templates"])
    source.recipe = dataclasses.replace(source.recipe, **config["test"])
    source.unseen = {k for k, trained in enumerate(trained_on(config, source.classes)) if not trained}
    return source


def trained_on(config, classes):
    """[bool], did the run have masks of this class? If the class lists differ, a shared word decides."""
    if list(classes) == config["classes"]:
        return [k not in config["unseen"] for k in range(len(classes))]
    words = {sources.plain(word) for k, name in enumerate(config["classes"]) if k not in config["unseen"]
             for word in name.split(",")}
    return [any(sources.plain(word) in words for word in name.split(",")) for name in classes]


# ---------------------------------------------------------------- command


def main(args):
    device = processes.start(args.device)
    checkpoint = processes.from_first(lambda: find_checkpoint(args.checkpoint or args.run))
    model, config = load_run(checkpoint, device, args.clip)
    source, other = open_run_dataset(config, args.dataset, args.data_root), args.dataset or args.data_root
    if args.unseen_only and not source.unseen:
        raise UserError(f"no class of {source.name} was unseen in training: drop --unseen-only")
    resized = args.short_side is not None and args.short_side != source.recipe.short_side
    if resized:
        source.recipe = dataclasses.replace(source.recipe, short_side=args.short_side)
    model.set_classes(source.classes, source.templates)
    precision = args.precision or config["precision"]
    result = evaluate(model, source, device, precision, args.gamma, args.unseen_only, args.save_predictions,
                      args.workers)
    departures = [config["departures"], f"test short side {args.short_side}" * bool(resized and source.expected)]
    result |= {"checkpoint": str(checkpoint), "precision": precision, "departures": ", ".join(filter(None, departures))}
    if processes.rank() == 0:
        if source.classes != config["classes"]:
            print(f"{len(source.unseen)} of {len(source.classes)} classes are unseen: training named no word of them",
                  flush=True)
        inside = [Path(other).resolve().name] if other else []
        inside += [f"short_side_{args.short_side}"] * resized
        out = args.out_dir or checkpoint.parent.joinpath(*inside)  # leaves the run's own figures alone
        report(result, model, source, device, precision, out)
    return result


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, one = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    one("--run", type=Path, metavar="FOLDER", help="run folder (default: the newest under runs/)")
    one("--checkpoint", type=Path, metavar="FILE", help="a checkpoint instead of a run's last.pt")
    add("--clip", metavar="FILE", help="path of the run's CLIP now (default: as in training)")
    add("--dataset", metavar="NAME", help=f"{', '.join(sources.NAMES)} or a folder (default: the run's own)")
    add("--data-root", metavar="FOLDER", help="its folder (default: as in training, or data/NAME)")
    add("--short-side", type=int, metavar="PIXELS", help="test images are resized to it (default: as in training)")
    add("--gamma", type=float, help="adds a column with γ subtracted from the seen classes' logits (cosine / τ); try "
        "1 (default: γ = 0 alone)")
    add("--unseen-only", action="store_true", help="also score unseen classes' pixels among unseen classes only")
    add("--device", choices=("cpu", "cuda", "mps"), help="(default: cuda if there is one, else cpu)")
    add("--precision", choices=("bf16", "fp16", "fp32"), help="(default: as in training)")
    add("--workers", type=int, choices=range(5), help="loader processes on a GPU (default: this process's share of the "
        "cores, at most 4)")
    add("--save-predictions", type=Path, metavar="FOLDER", help="NAME.png of each test image: class indexes in a "
        "palette, γ = 0 (default: none)")
    add("--out-dir", type=Path, metavar="FOLDER", help="of metrics.json and preview.png (default: the run folder; "
        "with --dataset, --data-root or another --short-side a folder in it)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse)
