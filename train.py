"""Trains Chimera-Seg: L = L_seg + λ_sgd · L_sgd + λ_sam · L_sam, on masks of seen classes only.

SGD is Selective Global Distillation, SAM the Semantic Alignment Module: see losses.py.

    python train.py                                           # the toy data set, minutes on two CPU cores
    python train.py --dataset voc                             # docs/data.md says how to get the files
    python train.py --dataset my_data --body segnext-b        # own data
    torchrun --nproc-per-node 4 train.py --dataset voc        # one process per GPU

Writes into runs/<dataset>/: last.pt and former.pt (checkpoints), config.json, log.jsonl, curves.png, data.png (what the
data check saw), metrics.json and preview.png (the test). Ctrl-C saves; the same command with --resume continues.
"""
import argparse
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import bodies
import clip
import data
import evaluate
import losses
import model as models
import sources
from clip_head import clip_tokens
from sources.check import check
from support import UserError, checkpoint, processes
from support.command import Signals, Watch, run_command
from support.log import Log

WEIGHT_DECAY = 0.01  # FIELD; none on norms, biases and other vectors
UNDECAYED = ("relative_position_bias_table", "layer_scale")  # Swin's and ConvNeXt's biases and scales, no vectors there
POLY_POWER = 0.9  # FIELD
BACKBONE_LR = 0.1  # OURS: pretrained backbones learn at a tenth of the rate of new parts
MAX_GRADIENT_NORM = 1.0  # OURS
LOG_EVERY = 20  # steps
RECIPE = ("clip", "body", "steps", "batch_size", "lr", "crop")  # flags whose default the data set says
NOT_SAVED = ("workers", "device", "deterministic", "compile", "out_dir", "resume", "save_every")  # may change
RANGES = {"steps": (1, 10**8), "batch_size": (1, 10**5), "crop": (8, 10**4), "save_every": (1, 10**8), "lr": (0, 100),
          "workers": (0, 256), "seed": (0, 10**9), "k_end": (0, 1), "temperature": (1e-6, 1e6),
          "sgd_weight": (0, 1e6), "sam_weight": (0, 1e6)}  # outside, nothing sensible can happen


def main(args):
    # ---- setup: torchrun's environment or one process, the device, the seed
    device = processes.start(args.device)
    ranks, rank = processes.world_size(), processes.rank()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may round differently each time
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    torch.manual_seed(args.seed)
    out = args.out_dir or Path("runs") / Path(args.dataset).resolve().name

    # ---- the data set; its recipe fills in flags that were not given
    source, remarks = open_source(args, device)
    recipe = source.recipe
    if rank == 0:
        remarks += check(source, out / "data.png")

    # ---- the frozen teacher (all of CLIP), the student (body and head, which starts at CLIP's tokens), the optimiser
    teacher = clip.load(args.clip).to(device)
    model = models.build(teacher, **{name: getattr(args, name) for name in models.SETTINGS}).to(device)
    model.set_classes([source.classes[k] for k in source.seen], source.templates)  # unseen names are not used
    trainset = data.TrainSet(source, recipe, teacher.visual.input_size, args.seed)
    if not args.resume:  # a resumed run has its adapter in last.pt
        start_adapter(model.head.adapter, teacher, trainset, args.frozen_blocks, device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.body_weights != "none"), weight_decay=0,
                                  fused=device.type != "mps")

    # ---- the run folder; --resume goes on from its last.pt
    config = run_config(args, source, teacher)
    bank = torch.empty(0, model.t.shape[1])  # (M, D), CLS embeddings of earlier images
    first, bank, more = checkpoint.begin(out, model, optimizer, bank, config, args.resume)
    bank = bank.to(device)
    log = Log(out, args.steps)
    log.opening(args, source, model, [*remarks, *([teacher.remark] if teacher.remark else []), *more], device)

    # ---- the loop
    student = parallel(model, device, args.compile)
    order = data.Steps(len(source.train), args.batch_size, first, args.steps, args.seed, rank, ranks)
    loader = data.train_loader(trainset, order, args.workers, device)

    def rescue(bad, now):  # step `bad` was not finite, which step `now` found out
        checkpoint.save(out, model, optimizer, bad, bank[(now - bad) * args.batch_size:], config)  # newest first
        return [source.train[i][1].name for _, i in order.batch(bad)]

    signals, watch = Signals(device), Watch(optimizer, device, rescue)
    model.train()
    stopping, t, tau = False, model.t, model.tau
    for step, batch in enumerate(loader, first):
        torch.manual_seed((args.seed * 1_000_003 + step) * ranks + rank)  # random bodies draw the same after a resume
        lr = set_lr(optimizer, args.lr * warmup_poly(step, args.steps, recipe.warmup * args.steps / recipe.steps))
        crops, labels, views = (x.to(device, non_blocking=True) for x in batch)  # (B, 3, H, W), (B, H, W), (B, 3, S, S)

        with processes.autocast(device, args.precision):
            z = student(crops.float() / 255)  # (B, D, h, w)
            c = cls_embeddings(teacher, views) if args.sgd_weight else z.new_empty(0, z.shape[1])  # (B, D)
        labels, inside = data.split_padding(labels, z.shape[2:])  # inside (B, N): positions of the image
        k = losses.k_at(step, args.steps, inside, args.k_end)  # (B,)

        loss_seg = losses.cross_entropy_loss(z, t, labels, tau)
        loss_sgd = losses.sgd_loss(z, c, k, inside, bank) if args.sgd_weight else torch.zeros_like(loss_seg)
        loss_sam = losses.sam_loss(z, t, labels, tau) if args.sam_weight else torch.zeros_like(loss_seg)
        loss = loss_seg + args.sgd_weight * loss_sgd + args.sam_weight * loss_sam

        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        watch.admit(step, {"loss": loss, "loss_seg": loss_seg, "loss_sgd": loss_sgd, "loss_sam": loss_sam}, norm)
        optimizer.step()

        last, stopping = step == args.steps - 1, signals.heard(step)
        logging, saving = last or step % LOG_EVERY == 0, last or stopping or (step + 1) % args.save_every == 0
        if logging or saving:
            numbers = watch.look()  # of this step, means over processes; ends the run if they are not finite
        bank = losses.push(bank, c)
        if logging:
            log.step(step, numbers, k, lr)
        if saving:
            checkpoint.save(out, model, optimizer, step + 1, bank, config)
            log.curves()
        if stopping:
            log.say(f"stopped after step {step}, saved as {out}/last.pt: the same command with --resume goes on")
            break
    signals.restore()

    # ---- the test: all classes, seen and unseen
    if not stopping:
        model.set_classes(source.classes, source.templates)
        share_statistics(model)
        result = evaluate.evaluate(model, source, device, args.precision)
        result |= {"checkpoint": str(out / "last.pt"), "precision": args.precision, "departures": config["departures"]}
        if rank == 0:
            evaluate.report(result, model, source, device, args.precision, out)
            log.scores(result["gamma_0"])
        return result


# ---------------------------------------------------------------- before the loop, in the order of their use


def open_source(args, device):
    """The data set, with its recipe at the run's crop; fills in the flags that are left open -> source, remarks.

    Raises UserError where flags make no sense."""
    source, remarks = sources.open_dataset(args.dataset, args.data_root), []
    for name in RECIPE:
        if getattr(args, name) is None:
            setattr(args, name, getattr(source.recipe, name))
    args.precision = args.precision or processes.fast_precision(device)
    for name, (low, high) in RANGES.items():
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: expected {low} to {high}")
    if args.batch_size % (ranks := processes.world_size()):
        raise UserError(f"--batch-size {args.batch_size} cannot be divided among {ranks} processes: "
                        f"use {max(args.batch_size // ranks, 1) * ranks}")
    args.departures = source.departures(steps=args.steps, batch_size=args.batch_size, lr=args.lr, crop=args.crop)
    if args.strict:
        if source.expected:  # a benchmark
            args.departures = ", ".join(filter(None, (args.departures, "images with unseen classes left out")))
        kept = processes.from_first(lambda: sources.without_unseen(source))
        remarks.append(f"strict: {len(source.train) - len(kept)} of {len(source.train)} training images are left out, "
                       "as they hold unseen classes")
        source.train = kept
    source.recipe = source.recipe.at_crop(args.crop)
    return source, remarks


def start_adapter(adapter, teacher, trainset, blocks, device):
    """The adapter's tokens start like those that CLIP's last `blocks` blocks get from the views of 64 images."""
    views = torch.stack([trainset[i, i % len(trainset.files)][2] for i in range(64)]).to(device)
    adapter.start_like(clip_tokens(teacher.visual, views.float() / 255, blocks))


def parameter_groups(model, pretrained=True):
    """AdamW's groups: pretrained backbone or new part, decayed (matrices) or not (norms, biases, scales)."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            backbone = pretrained and name.startswith("body.backbone.")
            decayed = p.ndim >= 2 and not name.endswith(UNDECAYED)
            groups.setdefault((backbone, decayed), []).append(p)
    return [dict(params=params, rate=BACKBONE_LR if backbone else 1.0, weight_decay=WEIGHT_DECAY * decayed)
            for (backbone, decayed), params in groups.items()]


def run_config(args, source, teacher):
    """All that tells this run from another, as plain values: resume compares it, evaluate.py and predict.py read it."""
    recipe = source.recipe
    return {**{key: value for key, value in vars(args).items() if key not in NOT_SAVED},
            "classes": source.classes, "unseen": sorted(source.unseen), "templates": list(source.templates),
            "test": {"short_side": recipe.short_side, "window": recipe.window, "stride": recipe.stride},
            "clip_hash": clip.fingerprint(teacher)}


def parallel(model, device, compiled):
    """What the loop calls in the model's place: compiled if asked, in DDP with several processes. Same parameters."""
    if processes.world_size() > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    student = torch.compile(model) if compiled else model
    if processes.world_size() > 1:
        warnings.filterwarnings("ignore", "`broadcast_buffers`")  # newer torch renames it; this name works in all
        student = nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)
    return student


# ---------------------------------------------------------------- in the loop


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]
    return lr


def warmup_poly(step, steps, warmup):
    """Share of the full learning rate: a linear ramp times (1 − progress)^0.9. FIELD"""
    return min((step + 1) / max(warmup, 1), 1) * (1 - step / steps) ** POLY_POWER


@torch.no_grad()
def cls_embeddings(teacher, views):
    """c: the full CLIP's CLS embeddings. uint8 (B, 3, S, S) -> (B, D), unit length."""
    return F.normalize(teacher.encode_image(views.float() / 255).float(), dim=-1)


# ---------------------------------------------------------------- after the loop


def share_statistics(model):
    """On CPUs each process has its own batch norm statistics. All test with the saved ones, the first process's."""
    if processes.world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def parse(argv=None):
    parser = argparse.ArgumentParser(usage="python train.py [flags]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe = "(default: the data set's recipe)"

    group = parser.add_argument_group("data").add_argument
    group("--dataset", default="toy", metavar="NAME", help=f"{', '.join(sources.NAMES)}, or a folder of own data "
          "(default: toy)")
    group("--data-root", metavar="FOLDER", help="its folder (default: data/NAME, or the folder itself)")
    group("--strict", action="store_true", help="leave out training images with unseen pixels, instead of ignoring "
          "those pixels")
    group("--crop", type=int, metavar="PIXELS", help=f"side of a training crop; test sizes scale with it {recipe}")

    group = parser.add_argument_group("method").add_argument
    group("--clip", metavar="NAME|FILE", help=f"{', '.join(clip.MODELS)}, a file or a folder {recipe}")
    group("--body", choices=bodies.BODIES, metavar="NAME", help=f"{', '.join(bodies.BODIES)} {recipe}")
    group("--body-weights", default="default", metavar="default|none|FILE", help="ImageNet weights (default: default)")
    group("--head", choices=("csh", "linear", "random"), default="csh", help="csh; the controls: linear (no weights "
          "of CLIP), random (CSH's shape, random frozen weights) (default: csh)")
    group("--frozen-blocks", type=int, default=1, metavar="N", help="CLIP blocks in the head; the adapter starts "
          "at what these blocks get inside CLIP (default: 1)")
    group("--temperature", type=float, metavar="TAU", help="τ of the text logits (default: CLIP's own)")
    group("--sgd-weight", type=float, default=0.2, metavar="λ", help="λ_sgd; 0: no SGD, the teacher does not run "
          "(default: 0.2)")
    group("--k-end", type=float, default=0.1, metavar="SHARE", help="share of the positions that SGD selects at the "
          "end; 1: all of them throughout (default: 0.1)")
    group("--sam-weight", type=float, default=0.3, metavar="λ", help="λ_sam; 0: no SAM (default: 0.3)")

    group = parser.add_argument_group("run").add_argument
    group("--steps", type=int, help=f"optimiser steps; warm-up scales with them {recipe}")
    group("--batch-size", type=int, help=f"images per step, all processes together {recipe}")
    group("--lr", type=float, help=f"AdamW's peak rate {recipe}")
    group("--seed", type=int, default=0, help="of weights, order and crops (default: 0)")
    group("--out-dir", type=Path, metavar="FOLDER", help="run folder (default: runs/<dataset>)")
    group("--resume", action="store_true", help="go on from last.pt in the run folder")
    group("--save-every", type=int, default=500, metavar="STEPS", help="steps between saves (default: 500)")
    group("--device", choices=("cpu", "cuda", "mps"), help="(default: cuda if there is one, else cpu)")
    group("--precision", choices=("bf16", "fp32"), help="of body, head and teacher; losses are fp32 (default: bf16 "
          "where it is faster: CUDA since Ampere, CPUs with AMX)")
    group("--workers", type=int, default=2, help="loader processes for each training process (default: 2)")
    group("--compile", action="store_true", help="torch.compile the student: a slow start, then faster steps")
    group("--deterministic", action="store_true", help="PyTorch's deterministic kernels where it has them, slower")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse)
