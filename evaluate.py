"""Evaluates a run: one joint confusion matrix over all labelled pixels, seen and unseen classes together.

    python evaluate.py                      # the newest run under runs/
    python evaluate.py --run runs/voc --unseen-only --save-predictions maps
    torchrun --nproc-per-node 4 evaluate.py --checkpoint runs/voc/last.pt   # torchrun takes --run for its own

Prints a line a class, γ = 0 beside the calibrated column; writes metrics.json and preview.png.
"""
import argparse
import dataclasses
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

import data
from support import command as guard
from support import pictures
import sources
from support.checkpoint import atomic, from_first_process, newest_run
from inference import load_run, open_run_dataset, pick_device, predict, side_at_test
from losses import world_size

UNSEEN_ALONE = 1e9  # as γ: no seen class can win


# ---------------------------------------------------------------- scores


def confusion(truth, prediction, classes):
    """Label maps -> int64 (K, K), rows truth, columns prediction; IGNORE in the truth is left out."""
    valid = truth != sources.IGNORE
    index = truth[valid].long() * classes + prediction[valid].long()
    return torch.bincount(index, minlength=classes ** 2).reshape(classes, classes)


def metrics(matrix, classes, unseen):
    """Joint confusion matrix -> {"pAcc", "mIoU_seen", "mIoU_unseen", "hIoU", "IoU": {class: value}}, in percent.

    IoU of a class that is in neither truth nor prediction is None and left out of the means. hIoU = 2SU / (S + U);
    without unseen classes mIoU_unseen and hIoU are None."""
    matrix = matrix.double()
    hit = matrix.diag()
    union = matrix.sum(0) + matrix.sum(1) - hit
    iou = [100 * (h / u).item() if u > 0 else None for h, u in zip(hit, union)]

    def mean(indexes):
        values = [iou[k] for k in indexes if iou[k] is not None]
        return sum(values) / len(values) if values else None

    S, U = mean([k for k in range(len(classes)) if k not in unseen]), mean(sorted(unseen))
    harmonic = None if S is None or U is None else 2 * S * U / (S + U) if S + U else 0.0
    accuracy = 100 * (hit.sum() / matrix.sum()).item() if matrix.sum() else None
    return {"pAcc": accuracy, "mIoU_seen": S, "mIoU_unseen": U, "hIoU": harmonic, "IoU": dict(zip(classes, iou))}


def label(model, image, source, device, gammas=(0.0,)):
    """`predict` by the source's recipe: uint8 image (3, H, W) -> {γ: labels (H, W)}."""
    seen = torch.tensor([k not in source.unseen for k in range(len(source.classes))], device=device)
    recipe = source.recipe
    side = side_at_test(image, recipe.sides)
    return predict(model, image.to(device), seen, gammas, side, recipe.window, recipe.stride)


@torch.inference_mode()
def calibrate(model, source, device, images=100, loss=0.01):
    """γ from the training images' seen labels alone: at most `loss` of the rightly labelled pixels turn unseen.

    OURS. γ is that quantile of (best seen logit − best unseen logit), at the dense grid, classes set to all K.
    No unseen label and no test image is looked at. The model is left in eval mode."""
    if not source.unseen or not source.seen:
        return 0.0
    seen = torch.tensor(source.seen, device=device)
    unseen = torch.tensor(sorted(source.unseen), device=device)
    margins = []
    model.eval()
    step = max(len(source.train) // images, 1)
    for image, labels, _ in data.ValSet(dataclasses.replace(source, val=source.train[::step][:images])):
        short = side_at_test(image, source.recipe.sides)
        image = TF.resize(image, [round(side * short / min(image.shape[1:])) for side in image.shape[1:]])
        logits = model.logits(image[None].to(device).float() / 255)[0]  # (K, h, w)
        truth = F.interpolate(labels[None, None].float(), logits.shape[1:], mode="nearest-exact")[0, 0]
        top, k = logits[seen].max(0)
        margin = top - logits[unseen].max(0).values
        margins.append(margin[seen[k] == truth.to(device)].cpu())
    margins = torch.cat(margins)
    margins = margins[margins > 0]
    return margins.kthvalue(max(int(loss * len(margins)), 1)).values.item() if len(margins) else 0.0


def evaluate(model, source, device, gamma, predictions=None, unseen_only=False):
    """Scores `model` on the source's val images; with several processes each takes its part, without repeats.

    Returns {"gamma_0": metrics, "calibrated": metrics and gamma, "images": their number, "dataset", "unseen": names};
    leaves the model in eval mode.
    predictions    folder that gets NAME.png of every image: class indexes in a palette, γ = 0
    unseen_only    adds "unseen_only": {"pAcc", "mIoU", "IoU"} of the unseen classes' pixels, labelled among the unseen
                   classes alone: a far easier task, whose figures compare with no joint one"""
    if unseen_only and not source.unseen:
        raise sources.DataError(f"no class of {source.name} was unseen in training: --unseen-only would score nothing")
    if predictions:
        predictions.mkdir(parents=True, exist_ok=True)
    rank = dist.get_rank() if world_size() > 1 else 0
    K = len(source.classes)
    loader = DataLoader(data.ValSet(source, (rank, world_size())), batch_size=None,
                        num_workers=0 if device.type == "cpu" else 4)
    gammas = (0.0, gamma, UNSEEN_ALONE) if unseen_only else (0.0, gamma)
    matrices = {g: torch.zeros(K, K, dtype=torch.long, device=device) for g in gammas}
    model.eval()
    for image, truth, name in loader:
        maps = label(model, image, source, device, tuple(matrices))
        for g, prediction in maps.items():
            matrices[g] += confusion(truth.to(device), prediction, K)
        if predictions:
            pictures.save_mask(maps[0.0].byte().cpu().numpy(), predictions / f"{name}.png")
    if world_size() > 1:
        for matrix in matrices.values():
            dist.all_reduce(matrix)
    if unseen_only:
        matrices[UNSEEN_ALONE][source.seen] = 0  # the rows of pixels whose truth is a seen class
    score = {g: metrics(matrix, source.classes, source.unseen) for g, matrix in matrices.items()}
    names = [source.classes[k] for k in sorted(source.unseen)]
    result = {"gamma_0": score[0.0], "calibrated": {**score[gamma], "gamma": gamma}, "images": len(source.val),
              "dataset": source.name, "unseen": names}
    if unseen_only:
        alone = score[UNSEEN_ALONE]
        result["unseen_only"] = {"pAcc": alone["pAcc"], "mIoU": alone["mIoU_unseen"],
                                 "IoU": {name: alone["IoU"][name] for name in names}}
    return result


# ---------------------------------------------------------------- what people see


def table(result, source):
    """The result as text: a line a class, then the four figures, γ = 0 beside the calibrated column."""
    plain, calibrated = result["gamma_0"], result["calibrated"]
    number = lambda value: f"{value:6.1f}" if value is not None else "     –"  # noqa: E731
    width = max(len(name) for name in source.classes) + 2
    lines = [f"{'IoU, %':<{width}}  γ = 0   γ = {calibrated['gamma']:.2f}"]
    for k, name in enumerate(source.classes):
        mark = "*" if k in source.unseen else " "
        lines.append(f"{name + ' ' + mark:<{width}} {number(plain['IoU'][name])}   {number(calibrated['IoU'][name])}")
    lines.append("-" * (width + 20))
    for key, name in (("pAcc", "pAcc"), ("mIoU_seen", "mIoU seen"), ("mIoU_unseen", "mIoU unseen"), ("hIoU", "hIoU")):
        lines.append(f"{name:<{width}} {number(plain[key])}   {number(calibrated[key])}")
    if source.unseen:
        lines.append(f"* unseen in training.  {result['images']} images; γ is taken off the seen classes' logits")
    if "unseen_only" in result:
        lines.append("another task, unseen pixels labelled among unseen classes alone: mIoU "
                     f"{number(result['unseen_only']['mIoU']).strip()}, pAcc "
                     f"{number(result['unseen_only']['pAcc']).strip()}")
    return "\n".join(lines)


def preview(model, source, device, path, images=6):
    """Writes a picture, a row an image: image | truth | prediction (γ = 0), legend below; unseen classes have a *."""
    view, rows, shown = data.ValSet(source), [], set()
    model.eval()
    for i in range(min(images, len(view))):
        image, truth, _ = view[i]
        prediction = label(model, image, source, device)[0.0].cpu()
        shown |= set(truth.unique().tolist()) | set(prediction.unique().tolist())
        rows.append([image, pictures.coloured(truth), pictures.coloured(prediction)])
    sheet = pictures.sheet(rows, ("image", "truth", "prediction"), shown, source)
    atomic(path, lambda partial: sheet.save(partial, "PNG"))


def curves(out):
    """Draws a run's log.jsonl as curves.png."""
    atomic(out / "curves.png", lambda partial: pictures.curves(out / "log.jsonl").save(partial, "PNG"))


# ---------------------------------------------------------------- command


def report(result, model, source, device, out):
    """Writes metrics.json and preview.png into `out`, prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    atomic(out / "metrics.json", lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    preview(model, source, device, out / "preview.png")
    print(table(result, source))
    print(f"wrote {out}/metrics.json and preview.png", flush=True)


def main(args):
    device = pick_device(args.device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    checkpoint = args.checkpoint or (args.run / "last.pt" if args.run else from_first_process(newest_run))
    model, config, gamma = load_run(checkpoint, device, args.clip)
    source, other = open_run_dataset(config, args.dataset, args.data_root), args.dataset or args.data_root
    model.set_classes(source.classes, source.templates)
    first_rank = world_size() == 1 or dist.get_rank() == 0
    if first_rank and source.classes != config["classes"]:
        names = [source.classes[k] for k in sorted(source.unseen)]
        print(f"{len(names)} of {len(source.classes)} classes are unseen: no word of them was trained on by name"
              f"{': ' * bool(names)}{', '.join(names)}", flush=True)
    if args.gamma is not None:
        gamma = args.gamma
    elif gamma is None or other:  # an unfinished run, or other classes
        gamma = from_first_process(lambda: calibrate(model, source, device))
    result = evaluate(model, source, device, gamma, args.save_predictions, args.unseen_only)
    result["checkpoint"] = str(checkpoint)
    if first_rank:
        inside = Path(other).resolve().name if other else "."  # leaves the run's own figures alone
        report(result, model, source, device, args.out_dir or checkpoint.parent / inside)
    return result


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what is tested").add_argument
    group("--run", type=Path, metavar="FOLDER", help="run folder (default: the newest under runs/)")
    group("--checkpoint", type=Path, metavar="FILE", help="a checkpoint instead of a run's last.pt")
    group("--clip", metavar="FILE", help="where the run's CLIP lies now (default: where it lay in training)")
    group("--dataset", metavar="NAME", help=f"{', '.join(sources.NAMES)} or a folder (default: the run's own)")
    group("--data-root", metavar="FOLDER", help="where it lies (default: as in training, or data/NAME)")
    group("--device", help="cpu or cuda (default: cuda if there is one)")
    group = parser.add_argument_group("how it is scored, what is written").add_argument
    group("--gamma", type=float, help="taken off seen classes' logits in the calibrated column (default: the run's "
          "own, from seen training labels)")
    group("--unseen-only", action="store_true", help="score also the unseen classes' pixels among the unseen classes "
          "alone, under that name: no joint figure")
    group("--save-predictions", type=Path, metavar="FOLDER", help="write NAME.png of each test image, class indexes in "
          "a palette, γ = 0 (default: none)")
    group("--out-dir", type=Path, metavar="FOLDER", help="of metrics.json and preview.png (default: the run folder; "
          "with --dataset or --data-root a folder of that name in it)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    guard.run_command(main, parse)
