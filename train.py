"""Trains Chimera-Seg: L = L_seg + λ_sgd · L_sgd + λ_sam · L_sam, on masks of seen classes only.

SGD is Selective Global Distillation, SAM the Semantic Alignment Module: see losses.py.

    python train.py                                           # the toy data set, minutes on two CPU cores
    python train.py --dataset voc                             # docs/data.md says how to get the files
    python train.py --dataset my_data --body segnext-b        # own data
    torchrun --nproc-per-node 4 train.py --dataset voc        # one process per GPU

Makes a folder runs/NAME (or runs/NAME-2, …) with last.pt (the checkpoint), config.json, log.jsonl, curves.png,
data.png (what the data check saw), metrics.json and preview.png (the test). Ctrl-C saves; the same command with
--resume goes on.
"""
import json
import math
import os
from functools import partial
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
from clip_head import HEADS, clip_tokens
from sources.check import check
from support import UserError, checkpoint, processes
from support.command import Signals, run_command
from support.log import Log, check_finite, read
from support.settings import RECIPE, Setting, check_spans, of_part, parser

WEIGHT_DECAY = 0.01  # FIELD; none on norms, biases and other vectors
UNDECAYED = ("relative_position_bias_table", "layer_scale")  # Swin's biases and ConvNeXt's scales, which are no vectors
POLY_POWER = 0.9  # FIELD
BACKBONE_LR = 0.1  # OURS: pretrained backbones learn at a tenth of the rate of new parts
MAX_GRADIENT_NORM = 1.0  # OURS
LOG_EVERY = 20  # steps

SETTINGS = (  # name, default, type or choices, part, help, least and largest value, may --resume change it?
    Setting("dataset", "toy", str, "data", f"{', '.join(sources.NAMES)}, or a folder of own data"),
    Setting("data_root", None, str, "data", "its folder (default: data/NAME, or the folder itself)", may_change=True),
    Setting("strict", False, bool, "data", "leave out training images with unseen pixels, not these pixels alone"),
    Setting("crop", RECIPE, int, "data", "side of a training crop, pixels; test sizes scale with it", (8, 10**4)),
    Setting("body", RECIPE, bodies.BODIES, "model", ", ".join(bodies.BODIES)),
    Setting("body_weights", "default", str, "model", "none, a file, or default: ImageNet's; for `small` toy/body.pt "
            "on the toy data set, else none"),
    Setting("head", "csh", tuple(HEADS), "model", "csh; the controls: linear (no weights of CLIP), "
            "random (CSH's shape, random frozen weights)"),
    Setting("head_attention", "clip", ("clip", "values"), "model", "of the frozen blocks: clip (CLIP's own), values "
            "(none: each position keeps its own value)"),
    Setting("frozen_blocks", 1, int, "model", "CLIP blocks in the head; the adapter starts at their input in CLIP"),
    Setting("clip", RECIPE, str, "method", f"{', '.join(clip.MODELS)}, a file or a folder", may_change=True),
    Setting("sgd_weight", 1.0, float, "method", "λ_sgd; 0: no SGD, the teacher does not run", (0, 1e6)),
    Setting("select", "teacher", ("teacher", "student"), "method", "whose dense features choose SGD's positions: "
            "teacher (CLIP's patches) or student (a control)"),
    Setting("k_end", 0.1, float, "method", "share of the positions that SGD selects at the end; 1: always all", (0, 1)),
    Setting("sam_weight", 0.3, float, "method", "λ_sam; 0: no SAM", (0, 1e6)),
    Setting("steps", RECIPE, int, "run", "optimiser steps; warm-up scales with them", (1, 10**8)),
    Setting("batch_size", RECIPE, int, "run", "images per step, all processes together", (1, 10**5)),
    Setting("lr", None, float, "run", "AdamW's peak rate (default: the body's own for crops of 512 pixels, if its "
            f"publisher gives one, else {RECIPE})", (0, 100), may_change=True),
    Setting("seed", 0, int, "run", "of weights, order and crops", (0, 10**9)),
    Setting("precision", None, (*processes.PRECISIONS,), "run", "bf16, fp16 or fp32, of body, head and teacher; losses "
            "are fp32 (default: the fastest here: bf16 on GPUs since Ampere and CPUs with AMX, fp16 on older GPUs)",
            may_change=True),
    Setting("out_dir", None, Path, "machine", "the run's folder (default: a new one, runs/NAME, runs/NAME-2, …)"),
    Setting("resume", False, bool, "machine", "go on with the run in --out-dir, or with the newest of these settings"),
    Setting("save_every", 500, int, "machine", "steps between saves", (1, 10**8)),
    Setting("device", None, ("cpu", "cuda", "mps"), "machine", "cpu, cuda or mps (default: cuda if there is one)"),
    Setting("workers", None, int, "machine", "loader processes for each training process (default: its share of the "
            "cores, at most 8)", (0, 256)),
    Setting("compile", False, bool, "machine", "torch.compile the student: a slow start, then faster steps"),
    Setting("deterministic", False, bool, "machine", "PyTorch's deterministic kernels where it has them, slower"),
)
MAY_CHANGE = {s.name for s in SETTINGS if s.may_change} | {"departures", "made_with"}


def main(args):
    # ---- setup: torchrun's environment or one process, the device, the seed
    device = processes.start(args.device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may round differently each time
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    torch.manual_seed(args.seed)

    # ---- the data set; its recipe fills in the settings that were not given
    source, remarks, data_picture = open_data(args, device)

    # ---- the frozen teacher (all of CLIP), the student (body and head), the optimiser
    teacher = clip.load(args.clip).to(device)
    model = models.build(teacher, **of_part(SETTINGS, args, "model")).to(device)
    model.set_classes([source.classes[k] for k in source.seen], source.templates)  # unseen names are not used
    optimizer = torch.optim.AdamW(parameter_groups(model, args.body_weights != "none"), weight_decay=0,
                                  fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    trainset = data.TrainSet(source, source.recipe, teacher.visual.input_size, args.seed)

    start_adapter(model.head.adapter, teacher, trainset, args.frozen_blocks, device)

    # ---- the run's folder, made when nothing else can fail; with --resume its last checkpoint
    config, name = run_config(args, source, teacher, device), Path(args.dataset).resolve().name
    out, state, resumed = checkpoint.open_run(args.out_dir, name, config, MAY_CHANGE, args.resume)
    first, bank = 0, torch.empty(0, model.t.shape[1])  # (M, D), CLS embeddings of earlier images
    if state:
        first, bank = checkpoint.restore(state, model, optimizer, scaler)
    log = Log(out, args.steps)
    log.opening(args, source, model, [*remarks, *filter(None, [teacher.remark]), *resumed], config["departures"],
                device, data_picture)

    # ---- the loop; then the test: all classes, seen and unseen
    order = data.Steps(len(source.train), args.batch_size, first, args.steps, args.seed, processes.rank(),
                       processes.world_size())
    loader = data.train_loader(trainset, order, args.workers, device)
    save = partial(checkpoint.save, out, config, model, optimizer, scaler)
    warmup = source.recipe.warmup * args.steps / source.recipe.steps
    if train(args, device, loader, teacher, model, optimizer, scaler, bank.to(device), warmup, log, save):
        return test(args, device, source, model, config, log)


def train(args, device, loader, teacher, model, optimizer, scaler, bank, warmup, log, save):
    """The loop -> True at the last step, False if a signal ended it before. save(step, bank) writes a checkpoint."""
    first = loader.batch_sampler.first
    student, signals, saved = processes.parallel(model, device, args.compile), Signals(device), first or None
    stopping, clipped = False, []  # of each step since the last line of the log: was its gradient clipped?
    t, tau = model.t, model.tau  # (K, D), the seen classes
    model.train()
    for step, batch in enumerate(loader, first):
        seed_step(args.seed, step)
        lr = set_lr(optimizer, args.lr * warmup_poly(step, args.steps, warmup))
        crops, labels, views = (x.to(device, non_blocking=True) for x in batch)  # (B, 3, H, W), (B, H, W), (B, 3, V, V)

        with processes.autocast(device, args.precision):
            z = student(crops.float() / 255)  # (B, D, h, w)
        labels, inside = data.split_padding(labels, z.shape[2:])  # inside (B, h, w): positions of the image
        k = losses.k_at(step, args.steps, inside, args.k_end)  # (B,)

        loss_seg = losses.seg_loss(z, t, labels, tau)
        loss_sgd = loss_sam = torch.zeros_like(loss_seg)
        chance = math.log(args.batch_size + len(bank))  # L_sgd of features that know nothing of their image
        if args.sgd_weight:
            c, d = teacher_features(teacher, views, args.precision)  # (B, D), (B, g·g, D)
            a = similarity(args.select, z, c, d, inside)  # (B, N)
            loss_sgd = losses.sgd_loss(z, c, a, k, inside, bank)
            bank = losses.push(bank, c)
        if args.sam_weight:
            loss_sam = losses.sam_loss(z, t, labels)
        loss = loss_seg + args.sgd_weight * loss_sgd + args.sam_weight * loss_sam

        optimizer.zero_grad()
        scaler.scale(loss).backward()  # the scaler works in fp16 alone
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        scaler.step(optimizer)
        scaler.update()

        clipped.append(norm > MAX_GRADIENT_NORM)
        last, stopping = step == args.steps - 1, signals.heard(step)
        logging, saving = last or step % LOG_EVERY == 0, last or stopping or (step + 1) % args.save_every == 0
        if logging or saving:
            numbers = read(loss=loss, seg=loss_seg, sgd=loss_sgd, sam=loss_sam, norm=norm,
                           clipped=torch.stack(clipped).float().mean())
            check_finite(numbers, step, saved, norm=not scaler.is_enabled())
        if logging:
            log.step(step, numbers, k, lr, chance)
            clipped = []
        if saving:
            save(step + 1, bank)
            saved = step + 1
            log.curves()
        if stopping:
            log.say(f"stopped after step {step}, saved in {log.out}/: the same command with --resume goes on")
            break
    signals.restore()
    return not stopping


# ---------------------------------------------------------------- before the loop, in the order of their use


def open_data(args, device):
    """The data set, with its recipe at the run's crop -> source, remarks, what the data check saw as a picture.

    Fills in the settings that were left open. Raises UserError where settings make no sense."""
    source = sources.open_dataset(args.dataset, args.data_root)
    remarks = fill_in(args, source, device)
    if args.strict:
        kept = processes.from_first(lambda: sources.without_unseen(source))
        remarks.append(f"strict: {len(source.train) - len(kept)} of {len(source.train)} training images are left out, "
                       "as they hold unseen classes")
        source.train = kept
    found, picture = check(source) if processes.rank() == 0 else ([], None)
    source.recipe = source.recipe.at_crop(args.crop)
    return source, remarks + found, picture


def fill_in(args, source, device):
    """Fills in the settings that were left open, from the data set's recipe, the body and the machine -> remarks."""
    recipe, remarks, ranks = source.recipe, [], processes.world_size()
    for s in SETTINGS:
        if s.default == RECIPE and getattr(args, s.name) is None:
            setattr(args, s.name, getattr(recipe, s.name))
    rate = bodies.LEARNING_RATES.get(args.body, recipe.lr) if recipe.crop == 512 else recipe.lr
    args.lr = rate if args.lr is None else args.lr
    args.precision = args.precision or processes.fast_precision(device)
    args.workers = processes.loader_workers() if args.workers is None else args.workers
    if args.body == "small" and args.body_weights == "default" and args.dataset != "toy":
        args.body_weights = "none"
        remarks.append("the body starts from random weights: toy/body.pt knows the toy data set alone")
    check_spans(SETTINGS, args)
    if args.batch_size % ranks:
        raise UserError(f"--batch-size {args.batch_size} cannot be divided among {ranks} processes: "
                        f"use {max(args.batch_size // ranks, 1) * ranks}")
    departures = [source.departures(steps=args.steps, batch_size=args.batch_size, crop=args.crop)]
    if source.expected:  # a benchmark
        departures += [f"lr {args.lr} instead of {rate}"] * (args.lr != rate)
        departures += ["images with unseen classes left out"] * args.strict
    args.departures = ", ".join(filter(None, departures))
    if device.type == "cuda" and recipe.crop == args.crop == 512 and args.body in bodies.MEASURED:
        memory, speed = bodies.MEASURED[args.body]
        remarks.append(f"needs   about {memory * args.batch_size / ranks / 16:.0f} GB on each GPU; an H200 can take "
                       f"{speed} images/s, {args.workers} loader processes bring about {60 * args.workers}")
    return remarks


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


def run_config(args, source, teacher, device):
    """All that tells this run from another, as plain values: resume compares it, evaluate.py and predict.py read it."""
    recipe = source.recipe
    config = {**of_part(SETTINGS, args, "data", "method", "run"), "model": of_part(SETTINGS, args, "model"),
              "departures": args.departures, "classes": source.classes, "unseen": sorted(source.unseen),
              "templates": list(source.templates), "clip_hash": clip.fingerprint(teacher),
              "test": {"short_side": recipe.short_side, "window": recipe.window, "stride": recipe.stride},
              "made_with": processes.provenance(device)}
    return json.loads(json.dumps(config))


def start_adapter(adapter, teacher, trainset, blocks, device):
    """The adapter's tokens start like those that CLIP's last `blocks` blocks get from the views of 64 images."""
    views = torch.stack([trainset[i, i % len(trainset.files)][2] for i in range(64)]).to(device)
    adapter.start_like(clip_tokens(teacher.visual, views.float() / 255, blocks))


# ---------------------------------------------------------------- in the loop


def seed_step(seed, step):
    """What a body draws (drop path, bases) depends on step and process alone: after --resume it draws the same."""
    torch.manual_seed((seed * 1_000_003 + step) * processes.world_size() + processes.rank())


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]
    return lr


def warmup_poly(step, steps, warmup):
    """Share of the full learning rate: a linear ramp times (1 − progress)^0.9. FIELD"""
    return min((step + 1) / max(warmup, 1), 1) * (1 - step / steps) ** POLY_POWER


@torch.no_grad()
def teacher_features(teacher, views, precision):
    """uint8 (B, 3, V, V) -> the full CLIP's CLS embeddings c (B, D), its patches' dense features d (B, g·g, D), both of
    unit length in fp32."""
    with processes.autocast(views.device, precision):
        return [F.normalize(x.float(), dim=-1) for x in teacher.visual.cls_and_patches(views.float() / 255)]


def similarity(by, z, c, d, inside):
    """a_i, by which SGD selects: how similar each position is to c -> (B, N).

    by: whose dense features, "teacher" (d · c, brought to the student's grid) or "student" (z · c)."""
    if by == "student":
        return torch.einsum("bdn,bd->bn", losses.fp32(z.detach()).flatten(2), c)
    return losses.at_positions(losses.teacher_similarity(c, d), inside)


# ---------------------------------------------------------------- after the loop


def test(args, device, source, model, config, log):
    model.set_classes(source.classes, source.templates)
    if processes.world_size() > 1:  # on CPUs each process has its own batch norm statistics; the first one's are saved
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    result = evaluate.evaluate(model, source, device, args.precision, workers=args.workers)
    result |= {"checkpoint": str(log.out / "last.pt"), "precision": args.precision, "departures": config["departures"]}
    if processes.rank() == 0:
        evaluate.report(result, model, source, device, args.precision, log.out)
        log.scores(result["gamma_0"])
    return result


def parse(argv=None):
    return parser(SETTINGS, "python train.py [flags]", __doc__).parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse)
