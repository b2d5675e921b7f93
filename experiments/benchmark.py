"""Speed, memory and cost of training and test beside dense CLIP and ZegCLIP, in one run. All weights are random.

    python -m experiments.benchmark                                    # CPU or the GPU that is there; VOC's recipe
    python -m experiments.benchmark --bodies segnext-b --classes 171 --batch-size 16 --device cuda
    python -m experiments.benchmark --bodies small --clip toy/clip.pt --crop 64 --batch-size 32 --image 64 64

train   train.py's step on crops of a drawn 640×480 image: images/s, share of each part, peak memory
test    an image's label map, as evaluate.py makes it: images/s, peak memory
cost    GFLOPs of one crop (a multiply-add counted as 2; papers mostly count it as 1), parameters
`step` is the loop of train.py, with its losses and defaults and a clock. Writes experiments/results/benchmark.json.
"""
import argparse
import ctypes
import gc
import json
import platform
import re
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bodies
import clip
import data
import losses
import model as models
import train
from experiments.dense_clip import DenseCLIP
from experiments.study import ROOT, commit
from sources import DataSource, Recipe
from support import checkpoint, processes
from support.command import run_command

VIT_B16 = dict(embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=16,
               context_length=77, vocab_size=49408, transformer_width=512, transformer_layers=12)
PARTS = ("data", "teacher", "body", "head", "losses", "backward", "optimiser")


# ---------------------------------------------------------------- peers, rebuilt from their published graphs


class ZegCLIP(DenseCLIP):
    """Inference of ZegCLIP (Zhou et al., arXiv 2212.03588), from its repository's VOC configuration: 10 prompts in
    each of the tower's blocks, class queries from text and CLS, 3 decoder layers of width 512 without self-attention,
    whose last q·k maps are the masks. (Its COCO configuration has 100 prompts: slower than here.)"""

    def __init__(self, clip_model, prompts=10, layers=3):
        super().__init__(clip_model)
        W, D = self.visual.width, self.visual.output_dim
        self.prompts = nn.Parameter(torch.randn(len(self.visual.transformer.resblocks), prompts, W))
        self.prompt_proj, self.prompt_norm, self.q_proj = nn.Linear(W, W), nn.LayerNorm(W), nn.Linear(2 * D, D)
        self.decoder = nn.ModuleList(nn.ModuleDict(dict(
            q=nn.Linear(D, D), k=nn.Linear(D, D), v=nn.Linear(D, D), out=nn.Linear(D, D), norm2=nn.LayerNorm(D),
            norm3=nn.LayerNorm(D), mlp=nn.Sequential(nn.Linear(D, 4 * D), nn.ReLU(), nn.Linear(4 * D, D)),
        )) for _ in range(layers))

    def logits(self, images):
        """(B, 3, H, W) in [0, 1] -> masks before their sigmoid, (B, K, H / 16, W / 16)"""
        v, B, (h, w) = self.visual, len(images), (side // self.visual.patch_size for side in images.shape[2:])
        x = v.embed(images)  # (B, 1 + N, W)
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


PEERS = {"dense-clip": DenseCLIP, "zegclip": ZegCLIP}


# ---------------------------------------------------------------- measuring


def now(device):
    """Wall time in seconds, once the device's queue is empty."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def gflops(call, images):
    """{module: GFLOPs} of one call, "Global" for all. Fused attention on CPUs is off: the counter misses it."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call(images)
    return {name: sum(ops.values()) / 1e9 for name, ops in counter.get_flop_counts().items()}


class Memory:
    """with Memory(device, *modules) as peak: …; then peak.mb: MB of the modules' parameters and of what came on top of
    everything that was there before. None where the system does not say."""

    def __init__(self, device, *modules):
        self.cuda, self.linux, self.mb = device.type == "cuda", platform.system() == "Linux", None
        self.held = sum(p.numel() * p.element_size() for module in modules for p in module.parameters()) / 1e6

    def __enter__(self):
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 1e6
        elif self.linux:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            self.before = self.resident("VmRSS")
        return self

    def __exit__(self, *_):
        if self.cuda or self.linux:
            peak = torch.cuda.max_memory_allocated() / 1e6 if self.cuda else self.resident("VmHWM")
            self.mb = round(self.held + peak - self.before)

    def resident(self, key):
        return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1.024e-3


# ---------------------------------------------------------------- training


def drawn(folder, classes, crop):
    """A data set of 64 times one drawn 640×480 image, a JPEG and a PNG mask in `folder`, at VOC's recipe."""
    rng = np.random.RandomState(0)
    blobs = Image.fromarray(rng.randint(256, size=(15, 20, 3)).astype(np.uint8)).resize((640, 480), Image.BICUBIC)
    mask = Image.fromarray(rng.randint(classes, size=(12, 16)).astype(np.uint8)).resize((640, 480), Image.NEAREST)
    file = ("drawn", Path(folder, "image.jpg"), Path(folder, "mask.png"))
    blobs.save(file[1])
    mask.save(file[2])
    return DataSource("drawn", [f"class {k}" for k in range(classes)], set(), {k: k for k in range(classes)},
                      [file] * 64, [file], ("a photo of {}",), Recipe(1).at_crop(crop))


def step(model, teacher, optimizer, batch, bank, args, device, mark=lambda part: None):
    """One step of train.py's loop, halfway through the run -> the bank after it. mark(part) is called after each part.

    args: train.parse's, with steps and precision filled in."""
    crops, labels, views = (x.to(device, non_blocking=True) for x in batch)
    with processes.autocast(device, args.precision):
        c = train.cls_embeddings(teacher, views)
        mark("teacher")
        x = model.body((crops.float() / 255 - model.mean) / model.std)
        mark("body")
        z = model.head(x)
        mark("head")
    labels, inside = data.split_padding(labels, z.shape[2:])
    k = losses.k_at(args.steps // 2, args.steps, inside, args.k_end)
    loss = losses.cross_entropy_loss(z, model.t, labels, model.tau)
    loss = loss + args.sgd_weight * losses.sgd_loss(z, c, k, inside, bank)
    loss = loss + args.sam_weight * losses.sam_loss(z, model.t, labels, model.tau)
    mark("losses")
    optimizer.zero_grad()
    loss.backward()
    mark("backward")
    nn.utils.clip_grad_norm_(model.parameters(), train.MAX_GRADIENT_NORM)
    optimizer.step()
    mark("optimiser")
    return losses.push(bank, c)


def training(body, teacher, source, args, device):
    """-> {"images_per_s", "peak_mb", "parts": {part: share of the time}}.

    First steps that use up what the loader made in advance. Then `repeats` steps run as they do in train.py, and give
    images_per_s. Then `repeats` steps are timed part by part; each part waits for the device, so these are slower."""
    first = 2 + 2 * args.workers
    marked = first + args.repeats
    flags = train.parse(["--precision", args.precision, "--steps", str(marked + args.repeats)])
    model = build(body, teacher, args.classes).train()
    optimizer = torch.optim.AdamW(train.parameter_groups(model), lr=source.recipe.lr, weight_decay=0, fused=True)
    dataset = data.TrainSet(source, source.recipe, teacher.visual.input_size)
    order = data.Steps(len(source.train), args.batch_size, 0, flags.steps)
    bank, clock = torch.empty(0, teacher.visual.output_dim, device=device), []

    def mark(_):
        if i >= marked:
            clock.append(now(device))

    with Memory(device, model, teacher.visual) as peak:
        for i, batch in enumerate(data.train_loader(dataset, order, args.workers, device)):
            mark("data")
            bank = step(model, teacher, optimizer, batch, bank, flags, device, mark)
            if i + 1 == first:
                start = now(device)
            elif i + 1 == marked:
                clock.append(now(device))
    parts = torch.tensor(clock, dtype=torch.float64).diff().view(-1, len(PARTS)).mean(0)
    return {"images_per_s": args.batch_size * args.repeats / (clock[0] - start), "peak_mb": peak.mb,
            "parts": dict(zip(PARTS, (parts / parts.sum()).tolist()))}


# ---------------------------------------------------------------- test


def testing(nets, recipe, args, device):
    """{name: model} -> {name: {"images_per_s", "peak_mb"}}; in each round all label the same image in turn."""
    image = torch.from_numpy(np.random.RandomState(0).randint(256, size=(3, *args.image)).astype(np.uint8))
    times, peaks = {name: [] for name in nets}, {}
    for _ in range(args.repeats + 1):
        for name, net in nets.items():
            with Memory(device, net) as peak:
                start = now(device)
                net.label(image, recipe.short_side, recipe.window, recipe.stride, precision=args.precision)
                times[name].append(now(device) - start)
            peaks[name] = peak.mb
    return {name: {"images_per_s": 1 / median(times[name][1:]), "peak_mb": peaks[name]} for name in nets}


def build(name, teacher, classes):
    """A body's or a peer's name -> the model on the teacher's device, with random text embeddings."""
    net = PEERS[name](teacher) if name in PEERS else models.build(teacher, body=name, body_weights="none")
    t = torch.randn(classes, teacher.visual.output_dim, device=teacher.logit_scale.device)
    net.to(t.device).t = F.normalize(t, dim=1)
    return net.eval()


def cost(net, side):
    """-> {"gflops" of one image, "trained_m" and "all_m": millions of parameters}"""
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad) / 1e6
    every = sum(p.numel() for p in net.parameters()) / 1e6
    image = torch.rand(1, 3, side, side, device=net.t.device)
    return {"gflops": gflops(net.logits, image)["Global"], "trained_m": trained, "all_m": every}


def main(args):
    device = processes.start(args.device)
    args.precision = args.precision or processes.fast_precision(device)
    args.batch_size = args.batch_size or (2 if device.type == "cpu" else 16)
    torch.manual_seed(0)
    teacher = (clip.load(args.clip) if args.clip else clip.CLIP(**VIT_B16).eval().requires_grad_(False)).to(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    result = {"device": where, "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit(),
              "settings": {key: str(value) for key, value in vars(args).items()}}
    nets = {name: build(name, teacher, args.classes) for name in (*PEERS, *args.bodies)}
    result["cost"] = {name: cost(net, args.crop) for name, net in nets.items()}
    with tempfile.TemporaryDirectory() as folder:
        source = drawn(folder, args.classes, args.crop)
        result["test"] = testing(nets, source.recipe, args, device)
        nets.clear()
        result["train"] = {name: training(name, teacher, source, args, device) for name in args.bodies}
    text = json.dumps(result, indent=1)
    checkpoint.atomic(args.out, lambda path: path.write_text(text + "\n"))
    print(f"{text}\nwrote {args.out}")
    return result


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument
    group("--bodies", nargs="+", choices=bodies.BODIES, default=["mobilenet-v2", "resnet50", "segnext-b"],
          metavar="BODY", help=f"of {', '.join(bodies.BODIES)} (default: three of them)")
    group("--clip", metavar="NAME|FILE", help="teacher and head (default: ViT-B/16's shape with random weights)")
    group("--crop", type=int, default=512, help="pixels a side in training; the test's sizes follow (default: 512)")
    group("--image", type=int, nargs=2, default=[375, 500], metavar=("H", "W"), help="at test (default: 375 500)")
    group("--classes", type=int, default=20, help="(default: 20, VOC's)")
    group("--batch-size", type=int, help="(default: 2 on a CPU, else 16)")
    group("--workers", type=int, default=2, help="loader processes (default: 2)")
    group("--repeats", type=int, default=10, help="steps and images that are timed (default: 10)")
    group("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one, else cpu)")
    group("--precision", choices=("bf16", "fp32"), help="(default: bf16 where it is faster)")
    group("--out", type=Path, default=ROOT / "experiments/results/benchmark.json", metavar="FILE",
          help="(default: experiments/results/benchmark.json)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse)
