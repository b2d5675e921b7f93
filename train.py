"""Trains Chimera-Seg: L = L_seg + λ_sgd · L_sgd + λ_sam · L_sam, on masks of seen classes only.

    python train.py                                           # the embedded default
    python train.py --dataset my_data --body resnet50         # own data, see README
    torchrun --nproc-per-node 4 train.py --dataset my_data    # one process a GPU

Writes last.pt and former.pt (checkpoint.py), config.json, log.jsonl, curves.png, metrics.json, preview.png and data.png
(a training sample as the losses see it, and a test sample) into runs/<dataset>/. Ctrl-C saves; the same command with
--resume goes on.
"""
import argparse
import json
import os
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

import bodies
from support import checkpoint
import clip
import data
from sources import check as datacheck
import evaluate
from support import command as guard
import inference
import losses
import model as models
import sources

WEIGHT_DECAY = 0.01  # FIELD; none on norms, biases and other vectors
UNDECAYED = ("relative_position_bias_table", "layer_scale")  # Swin's and ConvNeXt's biases and scales, no vectors there
POLY_POWER = 0.9  # FIELD
BACKBONE_LR = 0.1  # OURS: pretrained backbones learn at a tenth of the rate of new parts
MAX_GRADIENT_NORM = 1.0  # OURS
LOG_EVERY = 20  # steps
RANGES = {"steps": (1, 10**8), "batch_size": (1, 10**5), "crop": (8, 10**4), "save_every": (1, 10**8), "lr": (0, 100),
          "workers": (0, 256), "seed": (0, 10**9), "k_end": (0, 1), "temperature": (1e-6, 1e6),
          "sgd_weight": (0, 1e6), "sam_weight": (0, 1e6)}  # of flags: outside, nothing sensible can happen
NOT_SAVED = ("workers", "device", "deterministic", "out_dir", "resume", "save_every")  # flags that change no batch


def main(args):
    # ---- processes and device: torchrun sets the environment; without it there is one process
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = inference.pick_device(args.device)
    if ranks > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=guard.TIMEOUT)
    first_rank = rank == 0
    say = print if first_rank else lambda *_, **__: None
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may round differently each time
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)

    # ---- data, its recipe, and what the flags change of it
    source = sources.open_dataset(args.dataset, args.data_root)
    for key in ("clip", "body", "steps", "batch_size", "lr", "crop"):
        if getattr(args, key) is None:
            setattr(args, key, getattr(source.recipe, key))
    args.precision = args.precision or checkpoint.from_first_process(lambda: fast_precision(device))
    for key, (low, high) in RANGES.items():
        if getattr(args, key) is not None and not low <= getattr(args, key) <= high:
            raise sources.DataError(f"--{key.replace('_', '-')} is {getattr(args, key)}: expected {low} to {high}")
    torch.manual_seed(args.seed)
    recipe = source.recipe = source.recipe.at_crop(args.crop)
    warmup = recipe.warmup * args.steps / recipe.steps  # another number of steps, the same shape of the schedule
    mode = ("inductive: pixels of unseen classes are hidden from every loss, their images kept" if source.unseen else
            "closed: no class is unseen")
    if args.strict:
        kept = checkpoint.from_first_process(lambda: data.without_unseen(source, args.workers))
        mode = f"strict: {len(source.train) - len(kept)} images that hold unseen classes are dropped"
        source.train = kept
    if args.batch_size % ranks:
        raise sources.DataError(f"--batch-size {args.batch_size} does not divide among {ranks} processes: "
                                f"use {max(args.batch_size // ranks, 1) * ranks}")
    config = {key: value for key, value in vars(args).items() if key not in NOT_SAVED}
    config |= {"classes": source.classes, "unseen": sorted(source.unseen), "templates": list(source.templates),
               "test": {"sides": recipe.sides, "window": recipe.window, "stride": recipe.stride}}  # predict.py needs it
    remarks = []
    out = args.out_dir or Path("runs") / Path(args.dataset).resolve().name
    if first_rank:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.clear(out)
        checkpoint.atomic(out / "data.png", lambda partial: remarks.extend(datacheck.check(source, partial)))

    # ---- frozen teacher and trainable student; unseen names play no part in training
    teacher = clip.load(args.clip)
    if first_rank and (remark := clip.doubt(args.clip)):
        remarks.append(remark)
    config["clip_hash"] = clip.fingerprint(teacher)
    model = models.build(teacher, **config).to(device)
    model.set_classes([source.classes[k] for k in source.seen], source.templates)
    teacher.visual.to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr, args.body_weights != "none"), fused=True)
    full_lr = [group["lr"] for group in optimizer.param_groups]
    first_step, bank = 0, torch.empty(0, model.t.shape[1])
    if args.resume:
        first_step, bank, changes = checkpoint.resume(out, model, optimizer, config)
        remarks += changes
    bank = bank.to(device)  # (M, D), CLS embeddings of earlier images
    if ranks > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        warnings.filterwarnings("ignore", "`broadcast_buffers`")  # newer torch renames it; this name works in all
        student = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    else:
        student = model

    batches = data.Steps(len(source.train), args.batch_size, first_step, args.steps, args.seed, rank, ranks)
    loader = DataLoader(data.TrainSet(source, recipe, args.seed), batch_sampler=batches, num_workers=args.workers,
                        pin_memory=device.type == "cuda", worker_init_fn=guard.Signals.ignore)
    if first_rank:
        checkpoint.atomic(out / "config.json", lambda path: path.write_text(json.dumps(config, indent=1) + "\n"))
        if not args.resume:
            if (out / "last.pt").exists():
                os.replace(out / "last.pt", out / "former.pt")
                remarks.append(f"{out}/last.pt of the run before is now former.pt, until this one's second save")
            checkpoint.atomic(out / "log.jsonl", lambda path: path.touch())
            for name in ("metrics.json", "preview.png", "curves.png"):  # of the run before
                (out / name).unlink(missing_ok=True)
        log = open(out / "log.jsonl", "a", buffering=1)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    for remark in remarks:
        say(remark)
    names = [source.classes[k].split(",")[0] for k in sorted(source.unseen)]
    say(f"data    {source.name}: {len(source.train)} training images, {len(source.val)} test images\n"
        f"split   {len(source.seen)} seen classes, {len(names)} unseen"
        f"{': ' * bool(names)}{', '.join(names[:6])}{' …' * (len(names) > 6)}\n"
        f"mode    {mode}\n"
        f"model   {args.body} body, {args.head} head: {trained / 1e6:.2f} M parameters trained, {frozen / 1e6:.2f} M "
        f"frozen; teacher {args.clip}\n"
        f"run     {args.steps} steps of {args.batch_size} images on {ranks} × {device.type}, "
        f"{args.precision}, into {out}/", flush=True)

    def save(step, gamma=None):
        if first_rank:
            checkpoint.save(out, model, optimizer, step, bank, gamma, config)

    def rescue(bad, now):
        """Step `bad` was not finite, which is seen at step `now`: saves weights and optimiser from before `bad`, and
        what is left of the bank from then.

        -> what the user may do"""
        nonlocal bank
        bank = bank[(now - bad) * args.batch_size:]  # newest first
        try:
            save(bad)
            saved = f"the state before it is in {out}/last.pt"
        except bodies.ModelError as error:  # batch norm's statistics are not finite either, or the disk is full
            saved = str(error)
        batch = next(iter(data.Steps(len(source.train), args.batch_size, bad, args.steps, args.seed)))
        return (f"{saved}. Look at its images, or go on with --resume and a lower --lr: "
                + ", ".join(source.train[i][1].name for _, i in batch))

    # ---- the loop
    signals, finite = guard.Signals(device), guard.Finite(optimizer, device)
    segmentation_loss = losses.cross_entropy_loss if args.seg_loss == "ce" else losses.nel_loss
    model.train()
    start, warm, stopping = time.time(), None, False
    for step, (images, labels) in enumerate(loader, first_step):
        torch.manual_seed((args.seed * 1_000_003 + step) * ranks + rank)  # a body that draws does so alike when resumed
        for group, full in zip(optimizer.param_groups, full_lr):
            group["lr"] = full * warmup_poly(step, args.steps, warmup)
        images = images.to(device, non_blocking=True).float() / 255  # (B, 3, H, W)
        labels = labels.to(device, non_blocking=True)  # (B, H, W), index among the seen classes or 255

        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z = student(images)  # (B, D, h, w)
            c = cls_embeddings(teacher, images) if args.sgd_weight else None  # (B, D)
        labels, inside = data.split_padding(labels, z.shape[2:])  # (B, N), the positions that are not padding
        k = losses.k_at(step, args.steps, inside.shape[1], args.k_end, args.k_schedule)
        loss_seg = segmentation_loss(z, model.t, labels, model.tau)
        loss_sgd = loss_sam = torch.zeros((), device=device)
        if args.sgd_weight:
            loss_sgd = losses.sgd_loss(z, c, k, bank, inside=inside)
        if args.sam_weight:
            loss_sam = losses.sam_loss(z, model.t, labels, model.tau)
        loss = loss_seg + args.sgd_weight * loss_sgd + args.sam_weight * loss_sam

        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        finite.admit(step, (loss, loss_seg, loss_sgd, loss_sam), norm)
        optimizer.step()

        stopping, last = signals.heard(), step == args.steps - 1
        saving = stopping or last or (step + 1) % args.save_every == 0
        logging = last or step % LOG_EVERY == 0
        if saving or logging or device.type == "cpu":
            try:
                total, seg, sgd, sam = finite.look()
            except guard.NotFinite as error:
                raise bodies.ModelError(f"{error}; {rescue(error.step, step)}") from None
        if args.sgd_weight:
            bank = losses.push(bank, c, losses.BANK)
        if logging:
            seconds = time.time() - start
            pace = (seconds - warm[1]) / (step - warm[0]) if warm else seconds / (step + 1 - first_step)  # s a step
            eta = timedelta(seconds=round(pace * (args.steps - step - 1)))
            if warm and step - warm[0] <= LOG_EVERY:  # the first step, which starts all up, is left out
                say(f"time    {pace:.2f} s a step, about {eta} to go, then the test")
            warm = warm or (step, seconds)
            lr = optimizer.param_groups[-1]["lr"]
            say(f"step {step:5d}/{args.steps}  loss {total:.3f}  seg {seg:.3f}  sgd {sgd:.3f}  sam {sam:.3f}  "
                f"k {k:4d}  lr {lr:.1e}  eta {eta}", flush=True)
            if first_rank:
                log.write(json.dumps({"step": step, "loss": total, "loss_seg": seg, "loss_sgd": sgd, "loss_sam": sam,
                                      "k": k, "lr": lr, "seconds": round(seconds, 2)}) + "\n")
        if saving:
            save(step + 1)
            if first_rank:
                evaluate.curves(out)
        if stopping:
            say(f"stopped after step {step}, saved as {out}/last.pt: the same command with --resume goes on")
            break
    signals.restore()

    result = None
    if not stopping:  # ---- all classes now: calibrate on seen training labels, save, score, draw
        model.set_classes(source.classes, source.templates)
        if ranks > 1:  # batch norm's statistics on CPUs are each process's own: the first one's are saved and tested
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        gamma = checkpoint.from_first_process(lambda: evaluate.calibrate(model, source, device))
        save(args.steps, gamma)
        result = evaluate.evaluate(model, source, device, gamma)
        result["checkpoint"] = str(out / "last.pt")
        if first_rank:
            scores = {key: result["gamma_0"][key] for key in ("mIoU_seen", "mIoU_unseen", "hIoU")}
            log.write(json.dumps({"step": args.steps, **scores, "seconds": round(time.time() - start, 2)}) + "\n")
            evaluate.report(result, model, source, device, out)
            evaluate.curves(out)
            print(f"trained and tested in {time.time() - start:.0f} s; next: python predict.py PICTURE --run {out}")
    return result


def fast_precision(device):
    """bf16 where the hardware multiplies it (CUDA since Ampere; CPUs with AVX512-BF16 or AMX), else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # older versions of torch lack them
    return "bf16" if any(getattr(torch.cpu, name, bool)() for name in asked) else "fp32"


@torch.no_grad()
def cls_embeddings(teacher, images):
    """The teacher sees the student's own crop at CLIP's input size: (B, 3, H, W) -> c (B, D), unit length."""
    side = teacher.visual.input_size
    if images.shape[-2:] != (side, side):
        images = F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return F.normalize(teacher.encode_image(images).float(), dim=-1)


def parameter_groups(model, lr, pretrained=True):
    """Explicit AdamW groups: pretrained backbone or new part, decayed (matrices) or not (norms, biases, scales)."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            backbone = pretrained and name.startswith("body.backbone.")
            decayed = p.ndim >= 2 and not name.endswith(UNDECAYED)
            groups.setdefault((backbone, decayed), []).append(p)
    return [dict(params=params, lr=lr * (BACKBONE_LR if backbone else 1), weight_decay=WEIGHT_DECAY * decayed)
            for (backbone, decayed), params in groups.items()]


def warmup_poly(step, steps, warmup):
    """Share of the full learning rate: a linear ramp, then (1 − progress)^0.9. FIELD."""
    return min((step + 1) / max(warmup, 1), 1) * (1 - step / steps) ** POLY_POWER


def parse(argv=None):
    parser = argparse.ArgumentParser(usage="python train.py [flags]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe = "(default: the data set's recipe)"

    group = parser.add_argument_group("data and run").add_argument
    group("--dataset", default="toy", metavar="NAME", help=f"{', '.join(sources.NAMES)}, or a folder in the README's "
          "layout (default: toy)")
    group("--data-root", metavar="FOLDER", help="where the data set lies (default: data/NAME, or the folder itself)")
    group("--strict", action="store_true", help="drop training images that hold unseen pixels, instead of hiding those")
    group("--out-dir", type=Path, metavar="FOLDER", help="run folder (default: runs/<dataset>)")
    group("--resume", action="store_true", help="go on from last.pt in the run folder")
    group("--save-every", type=int, default=500, metavar="STEPS", help="steps between saves (default: 500)")
    group("--deterministic", action="store_true", help="same figures each time on a GPU too, slower; PyTorch warns of "
          "operations that it has no such version of")
    group("--seed", type=int, default=0, help="of weights, order and crops (default: 0)")
    group("--workers", type=int, default=2, help="loader processes for each training process (default: 2)")
    group("--device", choices=("cpu", "cuda"), help="cpu or cuda (default: cuda if there is one)")
    group("--precision", choices=("bf16", "fp32"), help="of body, head and teacher; losses stay fp32 (default: bf16 "
          "where the hardware multiplies it)")

    group = parser.add_argument_group("model").add_argument
    group("--clip", metavar="NAME|FILE", help=f"{', '.join(clip.MODELS)} or a file {recipe}")
    group("--body", choices=bodies.BODIES, metavar="NAME", help=f"{', '.join(bodies.BODIES)} {recipe}")
    group("--stride", type=int, choices=(8, 16), help="pixels a dense feature, any body but small (default: 16)")
    group("--body-weights", default="default", metavar="default|none|FILE", help="ImageNet weights (default: default)")
    group("--head", choices=("csh", "linear", "random"), default="csh",
          help="controls: linear (no CLIP in it), random (CSH's shape, random frozen weights) (default: csh)")
    group("--frozen-blocks", type=int, default=1, metavar="N", help="CLIP blocks in the head (default: 1)")
    group("--attention", choices=("qk", "vv", "self"), default="qk", help="inside those blocks (default: qk)")

    group = parser.add_argument_group("schedule").add_argument
    group("--steps", type=int, help=f"optimiser steps; warm-up keeps its share of them {recipe}")
    group("--batch-size", type=int, help=f"images a step, over all processes {recipe}")
    group("--lr", type=float, help=f"AdamW's peak rate {recipe}")
    group("--crop", type=int, help=f"training crop, pixels a side {recipe}")

    group = parser.add_argument_group("losses").add_argument
    group("--seg-loss", choices=("ce", "nel"), default="ce", help="cross-entropy, or focal + dice (default: ce)")
    group("--temperature", type=float, help="τ of text logits (default: CLIP's own)")
    group("--sgd-weight", type=float, default=0.2, help="λ_sgd; 0 switches SGD and its teacher off (default: 0.2)")
    group("--k-schedule", choices=("linear", "cosine", "constant"), default="linear",
          help="how k falls from all positions (default: linear)")
    group("--k-end", type=float, default=0.1, help="share of the positions at the end (default: 0.1)")
    group("--sam-weight", type=float, default=1.0, help="λ_sam; 0 switches SAM off (default: 1)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    guard.run_command(main, parse)
