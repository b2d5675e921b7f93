"""Trains Chimera-Seg: L = L_seg + λ_sgd · L_sgd + λ_sam · L_sam on masks of seen classes only.

    python train.py                                         # the embedded default
    python train.py --dataset path/to/my_data --body resnet50
    torchrun --nproc-per-node 4 train.py --dataset path/to/my_data

Writes runs/<dataset>/: last.pt, config.json, log.jsonl, metrics.json, preview.png.
"""
import argparse
import json
import os
import signal
import sys
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
BACKBONE_LR = 0.1  # OURS: pretrained backbones learn at a tenth of the rate of new parts
CLIP_GRADIENT = 1.0  # OURS: largest gradient norm
LOG_EVERY, SAVE_EVERY = 20, 500  # steps


def parameter_groups(model, lr):
    """Explicit AdamW groups: pretrained backbone or new part, decayed (matrices) or not (norms, biases)."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            old, decayed = name.startswith("body.backbone."), p.ndim >= 2
            groups.setdefault((old, decayed), []).append(p)
    return [dict(params=params, lr=lr * (BACKBONE_LR if old else 1), weight_decay=WEIGHT_DECAY if decayed else 0.0)
            for (old, decayed), params in groups.items()]


def warmup_poly(step, steps, warmup):
    """Share of the full learning rate: a linear ramp, then (1 − progress)^0.9. FIELD."""
    return min((step + 1) / max(warmup, 1), 1) * (1 - step / steps) ** 0.9


def resume(out, model, optimizer, config):
    """Continues out/last.pt: loads it into model and optimiser -> (next step, CLS bank). Raises ModelError."""
    saved = evaluate.read_checkpoint(out / "last.pt")
    differ = [key for key in config if saved["config"].get(key) != config[key]]
    if differ:
        changes = ", ".join(f"{key} was {saved['config'].get(key)}, is {config[key]}" for key in differ)
        raise models.ModelError(f"{out}/last.pt cannot be resumed with other settings: {changes}")
    model.load_trained_state(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    lines = [line + "\n" for line in lines if json.loads(line)["step"] < saved["step"]]
    evaluate.atomic(log, lambda partial: partial.write_text("".join(lines)))
    return saved["step"], saved["bank"]


def save(path, model, optimizer, step, bank, gamma, config):
    """Plain types and tensors only, so that `weights_only=True` loads it; written whole or not at all."""
    checkpoint = {"model": model.trained_state(), "optimizer": optimizer.state_dict(), "step": step, "bank": bank,
                  "gamma": gamma, "config": config}
    evaluate.atomic(path, lambda partial: torch.save(checkpoint, partial))


def main(args):
    # ---- processes and device: torchrun sets the environment, alone there is one process
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    say = print if rank == 0 else lambda *a, **k: None
    torch.manual_seed(args.seed)

    # ---- data, its recipe, and what the flags change of it
    source = data.open_dataset(args.dataset, args.data_root)
    recipe = source.recipe
    steps = args.steps or recipe.steps
    batch_size = args.batch_size or recipe.batch_size
    lr = args.lr or recipe.lr
    if batch_size % ranks:
        raise data.DataError(f"--batch-size {batch_size} does not divide by {ranks} processes: "
                             f"use {batch_size // ranks * ranks or ranks}")
    config = {"dataset": args.dataset, "data_root": args.data_root, "clip": args.clip or recipe.clip,
              "body": args.body or recipe.body, "head": args.head, "frozen_blocks": args.frozen_blocks,
              "attention": args.attention, "positional": args.positional, "tau": args.temperature,
              "steps": steps, "batch_size": batch_size, "lr": lr, "seed": args.seed, "sgd_weight": args.sgd_weight,
              "k_schedule": args.k_schedule, "k_end": args.k_end, "bank": args.bank, "sam_weight": args.sam_weight,
              "seg_loss": args.seg_loss}
    out = args.out_dir or Path("runs") / Path(args.dataset).name
    out.mkdir(parents=True, exist_ok=True)

    # ---- the frozen teacher, the trainable student
    teacher = clip.load(config["clip"])
    keys = ("body", "head", "frozen_blocks", "attention", "positional", "tau")
    model = models.build(teacher, body_weights=args.body_weights, **{key: config[key] for key in keys}).to(device)
    model.set_classes([source.classes[k] for k in source.seen], source.templates)  # unseen names are not in training
    teacher_visual = teacher.visual.to(device)
    if ranks > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr), lr=lr)
    full_lr = [group["lr"] for group in optimizer.param_groups]
    bank = torch.empty(0, teacher.visual.output_dim, device=device)
    first = 0
    if args.resume:
        first, bank = resume(out, model, optimizer, config)
        bank = bank.to(device)
    student = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if ranks > 1 else model

    train_set = data.TrainSet(source, recipe, args.seed)
    batches = data.Steps(len(source.train), batch_size, first, steps, args.seed, rank, ranks)
    loader = DataLoader(train_set, batch_sampler=batches, num_workers=args.workers, pin_memory=device.type == "cuda")
    count = lambda trained: sum(p.numel() for p in model.parameters() if p.requires_grad == trained) / 1e6  # noqa: E731
    say(f"{args.dataset}: {len(source.train)} training images, {len(source.val)} test images, {len(source.classes)} "
        f"classes, {len(source.unseen)} unseen (their pixels are hidden in training)\n"
        f"{config['body']} + {args.head}, {count(True):.2f} M trained and {count(False):.2f} M frozen parameters, "
        f"teacher {config['clip']}\n{steps} steps of {batch_size} images on {ranks} × {device.type}, "
        f"{'bf16' if device.type == 'cuda' else 'fp32'}, into {out}/", flush=True)
    if rank == 0:
        evaluate.atomic(out / "config.json", lambda path: path.write_text(json.dumps(config, indent=1) + "\n"))
        log = open(out / "log.jsonl", "a" if args.resume else "w", buffering=1)

    # ---- the loop
    stop = []  # a first Ctrl-C or SIGTERM saves after the step under way, a second one ends at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (stop.append(number), signal.signal(number, signal.SIG_DFL)))
    model.train()
    start = time.time()
    for step, (images, labels) in enumerate(loader, first):
        for group, full in zip(optimizer.param_groups, full_lr):
            group["lr"] = full * warmup_poly(step, steps, recipe.warmup)
        images = images.to(device, non_blocking=True).float() / 255  # (B, 3, H, W)
        labels = labels.to(device, non_blocking=True)  # (B, H, W), index among the seen classes or 255

        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z = student(images)  # (B, D, h, w)
            with torch.no_grad():  # the teacher sees the same crop, at CLIP's own size
                side = teacher_visual.input_size
                if args.sgd_weight:
                    view = F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
                    c = F.normalize(teacher.encode_image(view).float(), dim=-1)  # (B, D)

        seg = losses.cross_entropy_loss if args.seg_loss == "ce" else losses.nel_loss
        loss_seg = seg(z, model.t, labels, args.temperature)
        loss_sgd = loss_sam = torch.zeros((), device=device)
        k = losses.k_at(step, steps, z.shape[2] * z.shape[3], args.k_end, args.k_schedule)
        if args.sgd_weight:
            loss_sgd = losses.sgd_loss(z, c, k, bank)
            bank = losses.push(bank, c, args.bank)
        if args.sam_weight:
            loss_sam = losses.sam_loss(z, model.t, labels, args.temperature)
        loss = loss_seg + args.sgd_weight * loss_sgd + args.sam_weight * loss_sam

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRADIENT)
        optimizer.step()

        if step % LOG_EVERY == 0 or step == steps - 1:
            parts = torch.stack([loss.detach(), loss_seg.detach(), loss_sgd.detach(), loss_sam.detach()])
            if ranks > 1:
                dist.all_reduce(parts)
                parts /= ranks
            total, seg_, sgd_, sam_ = parts.tolist()
            if total != total:
                raise models.ModelError(f"the loss is not a number at step {step} (seg {seg_}, sgd {sgd_}, sam {sam_}): "
                                        f"lower --lr; {out}/last.pt keeps the last good state")
            now = time.time()
            left = (now - start) / (step + 1 - first) * (steps - step - 1)
            line = {"step": step, "loss": total, "loss_seg": seg_, "loss_sgd": sgd_, "loss_sam": sam_, "k": k,
                    "lr": optimizer.param_groups[-1]["lr"], "seconds": now - start}
            say(f"step {step:5d}/{steps}  loss {total:.3f}  seg {seg_:.3f}  sgd {sgd_:.3f}  sam {sam_:.3f}  k {k}  "
                f"lr {line['lr']:.1e}  eta {left // 60:.0f}:{left % 60:02.0f}", flush=True)
            if rank == 0:
                log.write(json.dumps(line) + "\n")
        if stop or step % SAVE_EVERY == SAVE_EVERY - 1:
            if rank == 0:
                save(out / "last.pt", model, optimizer, step + 1, bank, None, config)
            if stop:
                say(f"stopped after step {step}, saved to {out}/last.pt; the same command with --resume goes on")
                return None

    # ---- the table and the picture
    model.set_classes(source.classes, source.templates)
    gamma = evaluate.calibrate(model, source, device)
    if rank == 0:
        save(out / "last.pt", model, optimizer, steps, bank, gamma, config)
    result = evaluate.evaluate(model, source, device, gamma)
    result |= {"dataset": source.name, "checkpoint": str(out / "last.pt")}
    if rank == 0:
        evaluate.atomic(out / "metrics.json", lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
        evaluate.preview(model, source, device, out / "preview.png")
        print(evaluate.table(result, source))
        print(f"wrote {out}/last.pt, metrics.json, log.jsonl and preview.png after {time.time() - start:.0f} s")
    if ranks > 1:
        dist.destroy_process_group()
    return result


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="toy")
    add("--data-root")
    add("--clip")
    add("--body")
    add("--body-weights", default="default")
    add("--head", choices=("csh", "linear", "random"), default="csh")
    add("--frozen-blocks", type=int, default=1)
    add("--attention", choices=("qk", "vv", "self"), default="qk")
    add("--positional", action="store_true")
    add("--steps", type=int)
    add("--batch-size", type=int)
    add("--lr", type=float)
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=2)
    add("--device")
    add("--out-dir", type=Path)
    add("--resume", action="store_true")
    add("--seg-loss", choices=("ce", "nel"), default="ce")
    add("--temperature", type=float, default=losses.TAU)
    add("--sgd-weight", type=float, default=1.0)
    add("--k-schedule", choices=("linear", "cosine", "constant"), default="linear")
    add("--k-end", type=float, default=0.1)
    add("--bank", type=int, default=256)
    add("--sam-weight", type=float, default=1.0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(parse())
    except evaluate.ERRORS as error:
        sys.exit(f"error: {evaluate.one_line(error)}")
