"""Trains Chimera-Seg: L = L_seg + λ_sgd · L_sgd + λ_sam · L_sam, on masks of seen classes only.

    python train.py                                           # the embedded default
    python train.py --dataset my_data --body resnet50         # own data, see README
    torchrun --nproc-per-node 4 train.py --dataset my_data    # one process a GPU

Writes last.pt, config.json, log.jsonl, metrics.json, preview.png and data.png (a training sample as the losses
see it, and a test sample) into runs/<dataset>/.
"""
import argparse
import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

import clip
import data
import evaluate
import losses
import model as models

WEIGHT_DECAY = 0.01  # FIELD; none on norms, biases and other vectors
POLY_POWER = 0.9  # FIELD
BACKBONE_LR = 0.1  # OURS: pretrained backbones learn at a tenth of the rate of new parts
MAX_GRADIENT_NORM = 1.0  # OURS
LOG_EVERY, SAVE_EVERY = 20, 500  # steps


def main(args):
    # ---- processes and device: torchrun sets the environment; without it there is one process
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = evaluate.pick_device(args.device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    first_rank = rank == 0
    say = print if first_rank else lambda *_, **__: None
    torch.manual_seed(args.seed)

    # ---- data, its recipe, and what the flags change of it
    source = data.open_dataset(args.dataset, args.data_root, args.split)
    for key in ("clip", "body", "steps", "batch_size", "lr", "crop"):
        if getattr(args, key) is None:
            setattr(args, key, getattr(source.recipe, key))
    recipe = dataclasses.replace(source.recipe, crop=args.crop)
    inductive = "pixels of unseen classes are hidden from every loss, their images kept"
    if args.strict:
        kept = [data.without_unseen(source, args.workers) if first_rank else None]
        if ranks > 1:
            dist.broadcast_object_list(kept)
        inductive = f"strict: {len(source.train) - len(kept[0])} images that hold unseen classes are dropped"
        source.train = kept[0]
    if args.batch_size % ranks:
        raise data.DataError(f"--batch-size {args.batch_size} does not divide among {ranks} processes: "
                             f"use {max(args.batch_size // ranks, 1) * ranks}")
    config = {key: value for key, value in vars(args).items() if key not in ("workers", "device", "out_dir", "resume")}
    out = args.out_dir or Path("runs") / Path(args.dataset).name
    if first_rank:
        out.mkdir(parents=True, exist_ok=True)
        for remark in data.check(source, out / "data.png"):
            print(remark, flush=True)

    # ---- frozen teacher and trainable student; unseen names play no part in training
    teacher = clip.load(args.clip)
    model = models.build(teacher, **config).to(device)
    model.set_classes([source.classes[k] for k in source.seen], source.templates)
    teacher.visual.to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr), fused=True)
    full_lr = [group["lr"] for group in optimizer.param_groups]
    first_step, bank = resume(out, model, optimizer, config) if args.resume else (0, torch.empty(0, model.t.shape[1]))
    bank = bank.to(device)  # (M, D), CLS embeddings of earlier images
    if ranks > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        student = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    else:
        student = model

    batches = data.Steps(len(source.train), args.batch_size, first_step, args.steps, args.seed, rank, ranks)
    loader = DataLoader(data.TrainSet(source, recipe, args.seed), batch_sampler=batches, num_workers=args.workers,
                        pin_memory=device.type == "cuda")
    if first_rank:
        evaluate.atomic(out / "config.json", lambda path: path.write_text(json.dumps(config, indent=1) + "\n"))
        log = open(out / "log.jsonl", "a" if args.resume else "w", buffering=1)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    say(f"data    {args.dataset}: {len(source.train)} training images, {len(source.val)} test images, "
        f"{len(source.seen)} seen classes, {len(source.unseen)} unseen\n"
        f"        {inductive}\n"
        f"model   {args.body} body, {args.head} head: {trained / 1e6:.2f} M trained, {frozen / 1e6:.2f} M frozen; "
        f"teacher {args.clip}\n"
        f"run     {args.steps} steps of {args.batch_size} images on {ranks} × {device.type} "
        f"({'bf16' if device.type == 'cuda' else 'fp32'}), into {out}/", flush=True)

    # ---- the loop
    stop = []  # a first Ctrl-C or SIGTERM saves and ends after the step under way, a second one ends at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (stop.append(number), signal.signal(number, signal.SIG_DFL)))
    segmentation_loss = losses.cross_entropy_loss if args.seg_loss == "ce" else losses.nel_loss
    model.train()
    start = time.time()
    for step, (images, labels) in enumerate(loader, first_step):
        torch.manual_seed((args.seed * 1_000_003 + step) * ranks + rank)  # a body that draws does so alike when resumed
        for group, full in zip(optimizer.param_groups, full_lr):
            group["lr"] = full * warmup_poly(step, args.steps, recipe.warmup)
        images = images.to(device, non_blocking=True).float() / 255  # (B, 3, H, W)
        labels = labels.to(device, non_blocking=True)  # (B, H, W), index among the seen classes, or 255

        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z = student(images)  # (B, D, h, w)
        c = cls_embeddings(teacher, images) if args.sgd_weight else None  # (B, D)
        k = losses.k_at(step, args.steps, z.shape[2] * z.shape[3], args.k_end, args.k_schedule)
        loss_seg = segmentation_loss(z, model.t, labels, args.temperature)
        loss_sgd = loss_sam = torch.zeros((), device=device)
        if args.sgd_weight:
            loss_sgd = losses.sgd_loss(z, c, k, bank)
            bank = losses.push(bank, c, args.bank)
        if args.sam_weight:
            loss_sam = losses.sam_loss(z, model.t, labels, args.temperature)
        loss = loss_seg + args.sgd_weight * loss_sgd + args.sam_weight * loss_sam

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()

        stopping = bool(stop) and ranks == 1
        if step % LOG_EVERY == 0 or step == args.steps - 1:
            numbers = torch.stack([x.detach().float() for x in (loss, loss_seg, loss_sgd, loss_sam)]
                                  + [torch.tensor(float(len(stop)), device=device)])
            if ranks > 1:  # all ranks hear of a signal at the same step
                dist.all_reduce(numbers)
                stopping = numbers[-1] > 0
                numbers /= ranks
            total, seg, sgd, sam, _ = numbers.tolist()
            seconds = time.time() - start
            eta = seconds / (step + 1 - first_step) * (args.steps - step - 1)
            lr = optimizer.param_groups[-1]["lr"]
            say(f"step {step:5d}/{args.steps}  loss {total:.3f}  seg {seg:.3f}  sgd {sgd:.3f}  sam {sam:.3f}  "
                f"k {k:4d}  lr {lr:.1e}  eta {eta // 60:.0f}:{eta % 60:02.0f}", flush=True)
            if not total == total < float("inf"):
                raise models.ModelError(f"loss {total} at step {step} (seg {seg}, sgd {sgd}, sam {sam}): lower --lr")
            if first_rank:
                log.write(json.dumps({"step": step, "loss": total, "loss_seg": seg, "loss_sgd": sgd, "loss_sam": sam,
                                      "k": k, "lr": lr, "seconds": round(seconds, 2)}) + "\n")
        if first_rank and (stopping or step % SAVE_EVERY == SAVE_EVERY - 1):
            save(out / "last.pt", model, optimizer, step + 1, bank, None, config)
        if stopping:
            say(f"stopped after step {step}, saved as {out}/last.pt: the same command with --resume goes on")
            return None

    # ---- all classes now: calibrate on seen training labels, save, score, draw
    model.set_classes(source.classes, source.templates)
    gamma = evaluate.calibrate(model, source, device)
    if first_rank:
        save(out / "last.pt", model, optimizer, args.steps, bank, gamma, config)
    result = evaluate.evaluate(model, source, device, gamma)
    result |= {"dataset": source.name, "checkpoint": str(out / "last.pt")}
    if first_rank:
        evaluate.report(result, model, source, device, out)
        print(f"trained and tested in {time.time() - start:.0f} s")
    if ranks > 1:
        dist.destroy_process_group()
    return result


@torch.no_grad()
def cls_embeddings(teacher, images):
    """The teacher sees the student's own crop at CLIP's input size: (B, 3, H, W) -> c (B, D), unit length.

    In bf16 where that is faster: on CUDA, and on CPUs with instructions for it."""
    side = teacher.visual.input_size
    if images.shape[-2:] != (side, side):
        images = F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
    fast = images.is_cuda or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=fast):
        return F.normalize(teacher.encode_image(images).float(), dim=-1)


def parameter_groups(model, lr):
    """Explicit AdamW groups: pretrained backbone or new part, decayed (matrices) or not (norms, biases)."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((name.startswith("body.backbone."), p.ndim >= 2), []).append(p)
    return [dict(params=params, lr=lr * (BACKBONE_LR if pretrained else 1), weight_decay=WEIGHT_DECAY * decayed)
            for (pretrained, decayed), params in groups.items()]


def warmup_poly(step, steps, warmup):
    """Share of the full learning rate: a linear ramp, then (1 − progress)^0.9. FIELD."""
    return min((step + 1) / max(warmup, 1), 1) * (1 - step / steps) ** POLY_POWER


def save(path, model, optimizer, step, bank, gamma, config):
    """Tensors and plain types only, so that `weights_only=True` loads it; written whole or not at all."""
    checkpoint = {"model": model.trained_state(), "optimizer": optimizer.state_dict(), "step": step, "bank": bank,
                  "gamma": gamma, "config": config}
    evaluate.atomic(path, lambda partial: torch.save(checkpoint, partial))


def resume(out, model, optimizer, config):
    """Loads out/last.pt into model and optimiser -> (next step, CLS bank). Raises ModelError.

    Batches and crops follow from the seed and the step, so nothing else has to be restored."""
    saved = evaluate.read_checkpoint(out / "last.pt")
    if changed := [key for key in config if saved["config"].get(key) != config[key]]:
        changes = ", ".join(f"{key} was {saved['config'].get(key)}, is {config[key]}" for key in changed)
        raise models.ModelError(f"{out}/last.pt cannot be resumed with other settings: {changes}")
    model.load_trained_state(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    log = out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    lines = [line for line in lines if json.loads(line)["step"] < saved["step"]]
    evaluate.atomic(log, lambda partial: partial.write_text("".join(lines)))
    return saved["step"], saved["bank"]


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe = "default: the data set's recipe"

    group = parser.add_argument_group("data and run").add_argument
    group("--dataset", default="toy", help="toy, voc, coco-stuff, context, or a folder in the README's layout "
          "(default: toy)")
    group("--data-root", help="where the data set lies (default: data/NAME)")
    group("--split", choices=data.CONTEXT_SPLITS, help="of context's unseen classes (default: zs3)")
    group("--strict", action="store_true", help="drop training images that hold unseen pixels, instead of hiding those")
    group("--out-dir", type=Path, help="run folder (default: runs/<dataset>)")
    group("--resume", action="store_true", help="go on from last.pt in the run folder")
    group("--seed", type=int, default=0, help="of weights, order and crops (default: 0)")
    group("--workers", type=int, default=2, help="loader processes for each training process (default: 2)")
    group("--device", help="cpu or cuda (default: cuda if there is one)")

    group = parser.add_argument_group("model").add_argument
    group("--clip", metavar="NAME|FILE", help=f"{', '.join(clip.MODELS)} or a file; {recipe}")
    group("--body", choices=models.BODIES, help=recipe)
    group("--stride", type=int, choices=(8, 16), help="output stride of any body but small (default: 16)")
    group("--body-weights", default="default", metavar="default|none|FILE", help="ImageNet weights (default: default)")
    group("--head", choices=("csh", "linear", "random"), default="csh",
          help="csh; controls: linear (no CLIP in it), random (CSH's shape, random frozen weights)")
    group("--frozen-blocks", type=int, default=1, metavar="N", help="CLIP blocks in the head (default: 1)")
    group("--attention", choices=("qk", "vv", "self"), default="qk", help="inside those blocks (default: qk)")
    group("--positional", action="store_true", help="add CLIP's positional table to the head's tokens")

    group = parser.add_argument_group("schedule").add_argument
    group("--steps", type=int, help=recipe)
    group("--batch-size", type=int, help=f"images a step, over all processes; {recipe}")
    group("--lr", type=float, help=f"AdamW's peak rate; {recipe}")
    group("--crop", type=int, help=f"training crop, pixels a side; {recipe}")

    group = parser.add_argument_group("losses").add_argument
    group("--seg-loss", choices=("ce", "nel"), default="ce", help="cross-entropy, or focal + dice (default: ce)")
    group("--temperature", type=float, default=losses.TAU, help=f"τ of text logits (default: {losses.TAU})")
    group("--sgd-weight", type=float, default=1.0, help="λ_sgd; 0 switches SGD and its teacher off (default: 1)")
    group("--k-schedule", choices=("linear", "cosine", "constant"), default="linear",
          help="how k falls from all positions (default: linear)")
    group("--k-end", type=float, default=0.1, help="share of the positions at the end (default: 0.1)")
    group("--bank", type=int, default=256, help="earlier CLS embeddings kept as negatives (default: 256)")
    group("--sam-weight", type=float, default=1.0, help="λ_sam; 0 switches SAM off (default: 1)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    evaluate.run_command(main, parse)
