"""Speed and cost at 512×512, in one run on one machine: bodies + CSH beside dense CLIP and ZegCLIP. Random weights.

    python benchmark.py                                     # all parts on this machine, into results/benchmark.md
    python benchmark.py --parts test --bodies resnet50 --repeats 3
    python benchmark.py --device cuda --dtype bf16 --batch 16 --classes 171 --compile

test    an image to its label map, 20 and 171 classes
train   a step, part by part, beside the same body with a linear head and cross-entropy alone
loop    train.py's own loop on the embedded default: what share of its time is not compute
growth  the same over image side, number of classes and processes, with a plot
Timings go round: every repeat measures each model once, so that noise hits all alike; medians (lowest to highest).
GFLOPs count a multiply-add as 2 (torch.utils.flop_counter); the literature mostly counts it as 1.
"""
import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

import bodies
from support import checkpoint
import clip
import clip_head
import data
from support import command as guard
import inference
import losses
import model as models
import sources
import train

SIDE, CLASSES = 512, (20, 171)  # VOC's and COCO-Stuff's numbers
SIDES, MORE_CLASSES = (256, 512, 768, 1024), (20, 171, 1000)
VIT_B16 = dict(embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=16,
               context_length=77, vocab_size=49408, transformer_width=512, transformer_layers=12)
ZEGCLIP_GMACS = 110.4  # as published for 512×512, a multiply-add counted as 1 (fvcore)
STEP = ("teacher", "body", "head", "losses", "backward", "optimiser")


# ---------------------------------------------------------------- peers, rebuilt from their published graphs


class DenseCLIP(nn.Module):
    """What an adaptation of CLIP runs at test, at the least (MaskCLIP, arXiv 2112.01071): the whole image tower."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual

    def logits(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, K, H / 16, W / 16)"""
        h, w = (side // self.visual.patch_size for side in images.shape[2:])
        z = F.normalize(self.visual(images)[:, 1:], dim=-1)  # (B, N, D)
        return losses.pixel_text_logits(z.transpose(1, 2).unflatten(2, (h, w)), self.t)


class ZegCLIP(nn.Module):
    """Inference of ZegCLIP (Zhou et al., arXiv 2212.03588), from its repository's VOC configuration: 10 prompts in
    each of the tower's blocks, class queries from text and CLS, 3 decoder layers of width 512 without self-attention,
    whose last q·k maps are the masks. (Its COCO configuration has 100 prompts: slower than here.)"""

    def __init__(self, visual, prompts=10, layers=3):
        super().__init__()
        W, D = visual.width, visual.output_dim
        self.visual = visual
        self.prompts = nn.Parameter(torch.randn(len(visual.transformer.resblocks), prompts, W))
        self.prompt_proj, self.prompt_norm, self.q_proj = nn.Linear(W, W), nn.LayerNorm(W), nn.Linear(2 * D, D)
        self.decoder = nn.ModuleList(nn.ModuleDict(dict(
            q=nn.Linear(D, D), k=nn.Linear(D, D), v=nn.Linear(D, D), out=nn.Linear(D, D), norm2=nn.LayerNorm(D),
            norm3=nn.LayerNorm(D), mlp=nn.Sequential(nn.Linear(D, 4 * D), nn.ReLU(), nn.Linear(4 * D, D)),
        )) for _ in range(layers))

    def logits(self, images):
        """(B, 3, H, W) in [0, 1] -> masks before their sigmoid, (B, K, H / 16, W / 16)"""
        v = self.visual
        x = v.conv1((images - v.mean) / v.std)
        B, (h, w) = len(x), x.shape[2:]
        table = torch.cat([v.positional_embedding[:1], clip.resize_positions(v.positional_embedding, h, w)])
        x = torch.cat([v.class_embedding.expand(B, 1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        x = v.ln_pre(x + table)  # (B, 1 + N, W)
        for prompts, block in zip(self.prompt_proj(self.prompts), v.transformer.resblocks):
            x = block(torch.cat([x[:, :1], prompts.expand(B, -1, -1), x[:, -h * w:]], dim=1))
        x = F.normalize(v.ln_post(self.prompt_norm(x)) @ v.proj, dim=-1)
        c, z = x[:, :1], x[:, -h * w:]  # (B, 1, D), (B, N, D)
        q = self.q_proj(torch.cat([c * self.t, self.t.expand(B, -1, -1)], dim=-1))  # (B, K, D)
        for layer in self.decoder:
            Q, K, V = (layer[name](y).unflatten(2, (8, -1)).transpose(1, 2) for name, y in zip("qkv", (q, z, z)))
            attention = Q @ K.mT / Q.shape[-1] ** 0.5  # (B, 8, K, N)
            q = layer["norm2"](q + layer["out"]((attention.softmax(-1) @ V).transpose(1, 2).flatten(2)))
            q = layer["norm3"](q + layer["mlp"](q))
        return attention.mean(1).unflatten(2, (h, w))


# ---------------------------------------------------------------- measuring


def texts(K, device):
    return F.normalize(torch.randn(K, VIT_B16["embed_dim"], device=device), dim=-1)


def attention_flops(q, k, v, *_, **__):
    """Shapes -> FLOPs of q·k and of the product with v; torch's counter passes over the CPU's fused kernel."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def gflops(call, images):
    """{module: GFLOPs} of one call, "Global" for all."""
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter, torch.no_grad():
        call(images)
    return {name: sum(ops.values()) / 1e9 for name, ops in counter.get_flop_counts().items()}


def seconds(device, call):
    """Wall time of one call, the device's queue empty before and after."""
    clock = lambda: (device.type == "cuda" and torch.cuda.synchronize(), time.perf_counter())[1]  # noqa: E731
    start = clock()
    call()
    return clock() - start


def go_round(device, calls, repeats):
    """{name: call} -> {name: [seconds]}, after one call each to warm up."""
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(device, call))
    return times


def megabytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def peak_memory(device, call, held):
    """MB at a call's peak: `held`, MB of tensors that are there before it, and what it takes on top of them; None where
    the system does not say."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return held + (torch.cuda.max_memory_allocated() - before) / 1e6
    if platform.system() != "Linux":
        return None
    resident = lambda key: int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) / 1e3  # noqa: E731
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident("VmRSS:")
    call()
    return held + resident("VmHWM:") - before


def lower(amp, call):
    def run(*inputs):
        with amp():
            return call(*inputs)
    return run


def spread(times, scale=1.0, unit=""):
    return f"{scale * median(times):.3g}{unit} ({scale * min(times):.3g}–{scale * max(times):.3g})"


def rate(times, images=1):
    return spread([images / t for t in times])


def markdown(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)) + "\n"


# ---------------------------------------------------------------- parts


def counts(visual, device, names=bodies.BODIES):
    """-> {body: parameters and GFLOPs}, {"peer classes": GFLOPs}; exact, one image each."""
    image, ours, peers = torch.rand(1, 3, SIDE, SIDE, device=device), {}, {}
    for name in names:
        body = bodies.build_body(name, "none")
        net = models.ChimeraSeg(body, clip_head.CSH(visual, body.out_channels), None, losses.TAU).to(device).eval()
        flops = gflops(net, image)
        encoder = flops.get("ChimeraSeg.body.backbone", flops["ChimeraSeg.body"])
        ours[name] = {"trained": sum(p.numel() for p in net.parameters() if p.requires_grad),
                      "total": sum(p.numel() for p in net.parameters()), "encoder": encoder,
                      "decoder": flops["ChimeraSeg.body"] - encoder, "head": flops["ChimeraSeg.head"]}
    for peer in (DenseCLIP, ZegCLIP):
        net = peer(visual).to(device).eval()
        for K in CLASSES:
            net.t = texts(K, device)
            peers[f"{peer.__name__} {K}"] = gflops(net.logits, image)["Global"]
    return ours, peers


def test(args, clip_model, device, amp):
    tower, peers = counts(clip_model.visual, device)
    dense = peers["DenseCLIP 20"]
    report = ["## Parameters and GFLOPs at 512², all bodies\n", markdown(
        ("body", "parameters, trained / at test (M)", "GFLOPs: encoder + decoder + head", "of dense CLIP ViT-B/16's"),
        [(name, f"{c['trained'] / 1e6:.1f} / {c['total'] / 1e6:.1f}",
          f"{c['encoder']:.1f} + {c['decoder']:.1f} + {c['head']:.1f} = {(flops := work(c)):.1f}",
          f"{100 * flops / dense:.0f} %") for name, c in tower.items()])]
    report.append(f"ZegCLIP's graph as rebuilt here: {peers['ZegCLIP 20'] / 2:.1f} GFLOPs with a multiply-add counted "
                  f"as 1, published {ZEGCLIP_GMACS}.\n")

    nets = {"DenseCLIP": DenseCLIP(clip_model.visual), "ZegCLIP": ZegCLIP(clip_model.visual)}
    nets |= {body: build(clip_model, body) for body in args.bodies}
    image = torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8)
    calls, memory, size = {}, {}, 2048 if device.type == "cpu" else 8192
    for name, net in nets.items():
        net.to(device).eval()
        net.logits = lower(amp, torch.compile(net.logits) if args.compile else net.logits)
        for K in CLASSES:
            calls[f"{name} {K}"] = call = partial(label_map, net, texts(K, device), image.to(device))
            call()
            memory[name, K] = peak_memory(device, call, megabytes(net.parameters()))
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if args.dtype == "bf16" else None)
    times = go_round(device, calls | {"product": lambda: matrix @ matrix}, args.repeats)
    reached = 2 * size ** 3 / median(times["product"])
    rows = []
    for name in nets:
        few, many = (times[f"{name} {K}"] for K in CLASSES)
        flops = work(tower[name]) if name in tower else peers[f"{name} 20"]
        faster = [f"{median(times[f'{peer} 20']) / median(few):.2f}" for peer in ("DenseCLIP", "ZegCLIP")]
        peak = " / ".join("–" if memory[name, K] is None else f"{memory[name, K]:.0f}" for K in CLASSES)
        rows.append((name, f"{flops:.1f}", rate(few), rate(many), f"{100 * (median(many) / median(few) - 1):+.0f} %",
                     *faster, f"{100 * flops * 1e9 / median(few) / reached:.0f} %", peak))
    report += ["\n## Test, one 512² image to its label map\n", markdown(
        ("model", "GFLOPs", "images/s, 20 classes", "171 classes", "time, 171 for 20", "× DenseCLIP", "× ZegCLIP",
         "of the matrix product's FLOP/s", "peak MB, 20 / 171 classes"), rows),
        f"A {size}² matrix product reaches {reached / 1e9:.0f} GFLOP/s here, in this run.\n"]
    if args.dtype == "bf16":
        report.append("Under autocast; evaluate.py and predict.py themselves compute in fp32.\n")
    return {"counts": tower, "peers": peers, "seconds": times, "memory": {f"{n} {K}": m for (n, K), m in memory.items()}
            }, report


def label_map(net, t, image):
    net.t = t
    return inference.predict(net, image, torch.ones(len(t), dtype=torch.bool, device=image.device))


def work(count):
    return count["encoder"] + count["decoder"] + count["head"]


def build(clip_model, body, head="csh"):
    torch.manual_seed(0)
    return models.build(clip_model, body=body, body_weights="none", head=head)


def train_step(seen, net, teacher, images, labels, amp, optimizer):
    """A step as train.py does it, {part: seconds} into `seen`. Without a teacher: cross-entropy alone, the control."""
    marks, device = [], images.device

    def mark():
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    mark()
    with amp():
        c = teacher and train.cls_embeddings(teacher, images)
    mark()
    with amp():
        x = net.body((images - net.mean) / net.std)
        mark()
        z = net.head(x)
    mark()
    labels, inside = data.split_padding(labels, z.shape[2:])
    if teacher:
        k = losses.k_at(1, 2, inside.shape[1])
        loss = losses.cross_entropy_loss(z, net.t, labels) + losses.sgd_loss(z, c, k, inside=inside)
        loss = loss + losses.sam_loss(z, net.t, labels)
    else:
        loss = losses.cross_entropy_loss(z, net.t, labels)
    mark()
    optimizer.zero_grad()
    loss.backward()
    mark()
    nn.utils.clip_grad_norm_(net.parameters(), train.MAX_GRADIENT_NORM)
    optimizer.step()
    mark()
    seen.append({part: end - start for part, start, end in zip(STEP, marks, marks[1:])})


def training(args, clip_model, device, amp):
    with tempfile.TemporaryDirectory() as folder:
        return train_bodies(args, clip_model, device, amp, drawn(folder, args.classes))


def train_bodies(args, clip_model, device, amp, view):
    B, K = args.batch, args.classes
    images, labels = (torch.stack(part).to(device) for part in zip(*(view[i, 0] for i in range(B))))
    images = images.float() / 255
    calls, parts, memory = {}, {}, {}
    for body in args.bodies:
        for head in ("csh", "linear"):
            net = build(clip_model, body, head).to(device).train()
            net.t = texts(K, device)
            if args.compile:
                net.body.compile()
                net.head.compile()
            teacher = clip_model if head == "csh" else None
            optimizer = torch.optim.AdamW(train.parameter_groups(net, 1e-4), fused=True)
            parts[body, head] = []
            step = partial(train_step, parts[body, head], net, teacher, images, labels, amp, optimizer)
            step()  # the optimiser's moments, the compiler
            optimizer.zero_grad()
            moments = [x for state in optimizer.state.values() for x in state.values()]
            held = megabytes([*net.parameters(), *moments, *(teacher.visual.parameters() if teacher else ())])
            memory[body, head] = peak_memory(device, step, held)
            calls[body, head] = step
    calls["data"] = lambda: [view[i, 0] for i in range(B)]
    times = go_round(device, calls, args.repeats)
    rows = []
    for body in args.bodies:
        ours, control = times[body, "csh"], times[body, "linear"]
        each = [1e3 * median(step[part] for step in parts[body, "csh"][-args.repeats:]) / B for part in STEP]
        peak = ["–" if memory[body, head] is None else f"{memory[body, head]:.0f}" for head in ("csh", "linear")]
        rows.append((body, *map(round, each), rate(ours, B), rate(control, B),
                     f"{median(ours) / median(control):.2f}", " / ".join(peak)))
    report = [f"\n## Training step, {B} images of 512², {K} classes, ms an image\n", markdown(
        ("body", *STEP, "images/s", "linear head, CE alone: images/s", "time, ours for that", "peak MB, both"), rows),
        f"data, one loader process: {1e3 * median(times['data']) / B:.0f} ms an image (640×480 JPEG, PNG mask; in "
        "training it overlaps with the step).\n"]
    flat = {" ".join(key) if isinstance(key, tuple) else key: value for key, value in times.items()}
    return {"seconds": flat, "parts": {" ".join(key): value for key, value in parts.items()}}, report


def drawn(folder, K):
    """The training view of a data set of one drawn 640×480 picture, a JPEG and a PNG mask in `folder`."""
    blobs = F.interpolate(torch.rand(1, 3, 15, 20), (480, 640), mode="bicubic")[0].clamp(0, 1)
    Image.fromarray((255 * blobs).byte().permute(1, 2, 0).numpy()).save(f"{folder}/image.jpg")
    mask = F.interpolate(torch.randint(min(K, sources.INVALID), (1, 1, 12, 16)).float(), (480, 640))[0, 0].byte()
    Image.fromarray(mask.numpy()).save(f"{folder}/mask.png")
    source = argparse.Namespace(train=[("x", f"{folder}/image.jpg", f"{folder}/mask.png")], classes=range(K),
                                table=lambda training: torch.arange(256).byte())
    return data.TrainSet(source, sources.Recipe(1, crop=SIDE))


def loop(args, clip_model, device, amp, steps=120, skip=20, more=()):
    """train.main as it is, its loader watched; the first `skip` steps and the test after the last one do not count."""
    asked, given = [], []  # when the loop asked for a batch, when it had it

    class Watched(train.DataLoader):
        def __iter__(self):
            batches = super().__iter__()
            while True:
                asked.append(time.perf_counter())
                batch = next(batches, None)
                given.append(time.perf_counter())
                if batch is None:
                    return
                yield batch

    flags = ["--steps", str(steps), "--device", device.type, "--precision", args.dtype, *more]
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(train, "DataLoader", Watched):
        settings = train.parse([*flags, "--out-dir", folder])
        with contextlib.redirect_stdout(None):
            train.main(settings)
    source = sources.open_dataset("toy", settings.data_root)
    view = data.TrainSet(source, source.recipe, 0)
    reading = go_round(device, {"batch": lambda: [view[i, 0] for i in range(settings.batch_size)]}, args.repeats)
    whole = given[steps - 1] - given[skip - 1]  # as many waits as steps; the last step, with its save, not counted
    waits = sum(end - start for start, end in zip(asked[skip:steps], given[skip:steps]))
    step, read = whole / (steps - skip), median(reading["batch"])
    report = [f"\n## The embedded default's loop, {steps - skip} steps\n", markdown(
        ("ms a step", "waiting for data", "reading a batch, ms of one core", "that of all the cores' time"),
        [(f"{1e3 * step:.0f}", f"{100 * waits / whole:.1f} %", f"{1e3 * read:.0f}",
          f"{100 * read / step / os.cpu_count():.1f} %" if device.type == "cpu" else "–")]),
        f"`python train.py {' '.join(flags)}`, {settings.workers} loader processes.\n"]
    return {"step": step, "waiting": waits / whole, "reading": reading["batch"]}, report


def growth(args, clip_model, device, amp):
    """How time grows with the image's side, the number of classes and processes; the first body stands for all."""
    body, repeats = args.bodies[0], max(args.repeats // 3, 1)
    nets = {body: build(clip_model, body).to(device).eval(), "DenseCLIP": DenseCLIP(clip_model.visual)}
    few = texts(CLASSES[0], device)

    def run(net, side):
        net.t = few
        with torch.inference_mode(), amp():
            net.logits(torch.rand(1, 3, side, side, device=device))

    calls = {(name, side): lambda net=net, side=side: run(net, side) for name, net in nets.items() for side in SIDES}
    net, image = nets[body], torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8).to(device)
    with torch.inference_mode(), amp():
        z = net(image[None] / 255)
    labels = torch.randint(20, (1, SIDE, SIDE), device=device)
    noise = F.normalize(torch.randn_like(z), dim=1)
    for K in MORE_CLASSES:
        t = texts(K, device)
        for name, features in (("label map", z), ("label map, noise", noise)):
            grid = argparse.Namespace(logits=lambda _, features=features, t=t: losses.pixel_text_logits(features, t))
            calls[name, K] = partial(label_map, grid, t, image)
        calls["cross-entropy", K] = lambda t=t: losses.cross_entropy_loss(
            z.clone().requires_grad_(), t, labels).backward()
    times = go_round(device, calls, repeats)
    ms = lambda name, n: spread(times[name, n], 1e3)  # noqa: E731
    report = ["\n## Growth\n", markdown(("logits of one image, ms, by side", *SIDES),
                                        [(name, *(ms(name, side) for side in SIDES)) for name in nets]),
              markdown((f"{body} at 512², ms, by classes", *MORE_CLASSES), [
                  (name, *(ms(name, K) for K in MORE_CLASSES))
                  for name in ("label map", "label map, noise", "cross-entropy")]),
              "Label map: from the features on, this network's or independent noise (the worst case: few classes can "
              "be left out). Cross-entropy: forward and backward.\n"]
    most = os.cpu_count() if device.type == "cpu" else torch.cuda.device_count()
    rates = {}
    for ranks in sorted({1, 2, most} & {*range(1, most + 1)}):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(process, (ranks, folder, body, device.type), ranks)
            rates[ranks] = float(Path(folder, "rate").read_text())
    report.append(markdown(("training, processes" + " of one thread" * (device.type == "cpu"), *rates), [
        (f"{body}, 2 × 256² each, images/s", *(f"{value:.3g}" for value in rates.values()))]))
    plot({name: [median(times[name, side]) for side in SIDES] for name in nets}, args.out.with_suffix(".png"))
    report.append(f"![time over side]({args.out.stem}.png)\n")
    return {"seconds": {f"{name} {n}": value for (name, n), value in times.items()}, "processes": rates}, report


def process(rank, ranks, folder, body, kind, steps=5):
    """One of `ranks` training processes; the first writes the images a second of all of them into folder/rate."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", f"file://{folder}/meet", rank=rank, world_size=ranks)
    net = build(clip.CLIP(**VIT_B16), body).to(device).train()
    warnings.filterwarnings("ignore", "`broadcast_buffers`")  # as in train.py
    student = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    t, images = texts(20, device), torch.rand(2, 3, 256, 256, device=device)
    labels = torch.randint(20, (2, 256, 256), device=device)
    step = lambda: losses.cross_entropy_loss(student(images), t, labels).backward()  # noqa: E731
    step()
    taken = seconds(device, lambda: [step() for _ in range(steps)])
    if rank == 0:
        Path(folder, "rate").write_text(str(2 * steps * ranks / taken))
    dist.destroy_process_group()


def plot(curves, path, width=480, height=320, edge=44):
    """{name: seconds for each of SIDES} -> a picture, both axes logarithmic."""
    picture = Image.new("RGB", (width, height), "white")
    pen, log = ImageDraw.Draw(picture), lambda v: torch.tensor(v).log().item()
    times = [t for curve in curves.values() for t in curve]
    x = lambda side: edge + (width - 2 * edge) * log(side / SIDES[0]) / log(SIDES[-1] / SIDES[0])  # noqa: E731
    y = lambda t: height - edge - (height - 2 * edge) * log(t / min(times)) / log(max(times) / min(times))  # noqa: E731
    for side in SIDES:
        pen.line([(x(side), edge), (x(side), height - edge)], fill="lightgrey")
        pen.text((x(side) - 10, height - edge + 6), str(side), fill="black")
    for (name, curve), colour in zip(curves.items(), ("crimson", "navy")):
        pen.line([(x(side), y(t)) for side, t in zip(SIDES, curve)], fill=colour, width=2)
        for side, t in zip(SIDES, curve):
            pen.text((x(side) - 16, y(t) - 14), f"{1e3 * t:.0f}", fill=colour)
        pen.text((x(SIDES[0]) + 8, 8 + 14 * list(curves).index(name)), f"{name}, ms an image over side", fill=colour)
    checkpoint.atomic(path, lambda partial: picture.save(partial, "PNG"))


PARTS = {"test": test, "train": training, "loop": loop, "growth": growth}


def main(args):
    device = inference.pick_device(args.device)
    if unknown := {*args.bodies} - {*bodies.BODIES} or {*args.parts} - {*PARTS}:
        raise bodies.ModelError(f"{unknown.pop()!r} is none of {', '.join(bodies.BODIES)}; {', '.join(PARTS)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.batch = args.batch or (2 if device.type == "cpu" else 16)
    amp = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.dtype == "bf16")
    git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True,  # noqa: E731
                                    cwd=Path(__file__).parent).stdout.strip()
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(": ")[1] for line in cpu.splitlines() if line.startswith("model name")), platform.machine())
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"
    about = {"machine": where, "torch": torch.__version__, "dtype": args.dtype, "compile": args.compile,
             "repeats": args.repeats, "commit": git("rev-parse", "--short", "HEAD") + " and changes" * bool(
                 git("status", "--porcelain", "--", "*.py")),
             "command": " ".join(["python", "benchmark.py", *sys.argv[1:]])}
    torch.manual_seed(0)
    clip_model = clip.CLIP(**VIT_B16).eval().requires_grad_(False).to(device)
    result, report = dict(about), ["# Speed and cost\n", *(f"{key}: {value}  " for key, value in about.items()), ""]
    for part in args.parts:
        start = time.time()
        numbers, lines = PARTS[part](args, clip_model, device, amp)
        result[part] = numbers
        report += lines
        print("\n".join(lines), f"\n[{part}: {time.time() - start:.0f} s]", flush=True)
    checkpoint.atomic(args.out, lambda path: path.write_text("\n".join(report)))
    checkpoint.atomic(args.out.with_suffix(".json"), lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    print(f"wrote {args.out}")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), metavar="PART", help="test, train, loop, growth")
    parser.add_argument("--bodies", nargs="+", default=["mobilenet-v2", "segnext-t", "resnet50", "segnext-b"],
                        metavar="BODY", help=f"of {', '.join(bodies.BODIES)} (default: four of them)")
    parser.add_argument("--repeats", type=int, default=10, help="of each measurement, all in turn (default: 10)")
    parser.add_argument("--batch", type=int, help="images a training step (default: 2 on a CPU, 16 on CUDA)")
    parser.add_argument("--classes", type=int, default=20, help="in training (default: 20)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile all models")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, default=Path("results/benchmark.md"), help="beside it .json and .png "
                        "(default: results/benchmark.md)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    guard.run_command(main, parse)
