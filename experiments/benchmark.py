"""Speed, memory and cost of training and test beside dense CLIP and ZegCLIP, in one run. All weights are random.

    python -m experiments.benchmark                                    # CPU or the GPU that is there; VOC's recipe
    python -m experiments.benchmark --bodies segnext-b --classes 171 --batch-size 16 --device cuda
    python -m experiments.benchmark --bodies small --clip toy/clip.pt --crop 64 --batch-size 32 --image 64 64

train   train.py itself on crops of a drawn 640×480 image: images/s, the loader's share of the time, peak GPU memory
test    an image's label map as evaluate.py makes it, by the same function for peers: images/s, peak GPU memory
cost    GFLOPs of one crop (a multiply-add counted as 2; papers mostly count it as 1)
"""
import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import bodies
import clip
import data
import evaluate
import model as models
import train
from experiments.dense_clip import DenseCLIP
from experiments.study import ROOT, product
from sources import open_dataset
from support import processes, windows
from support.checkpoint import write_json
from support.command import run_command

VIT_B16 = dict(embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=16,
               context_length=77, vocab_size=49408, transformer_width=512, transformer_layers=12)


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


PEERS = {"dense-clip": lambda teacher: DenseCLIP(teacher, "clip"), "zegclip": ZegCLIP}


def build(name, teacher, classes):
    """A body's or a peer's name -> the model on the teacher's device, with random text embeddings."""
    net = PEERS[name](teacher) if name in PEERS else models.build(teacher, body=name, body_weights="none")
    t = torch.randn(classes, teacher.visual.output_dim, device=teacher.logit_scale.device)
    net.to(t.device).t = F.normalize(t, dim=1)
    return net.eval()


# ---------------------------------------------------------------- measuring


@torch.no_grad()
def gflops(net, side):
    """{module: GFLOPs} of one crop, "Global" for all. Fused attention on CPUs is off: the counter misses it."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net.logits(torch.rand(1, 3, side, side, device=net.t.device))
    return {name: sum(ops.values()) / 1e9 for name, ops in counter.get_flop_counts().items()}


def now(device):
    """Wall time in seconds, once the device's queue is empty."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def held(device):
    """Bytes that PyTorch holds on the GPU now, 0 on a CPU; `peak_mb` counts from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_mb(device, others=0):
    """MB of the GPU's memory that were held at most, without `others` bytes; None on a CPU."""
    return round((torch.cuda.max_memory_allocated() - others) / 1e6) if device.type == "cuda" else None


def drawn(folder, classes):
    """Own data: one drawn 640×480 image, a JPEG and a PNG mask. No class is unseen."""
    rng = np.random.RandomState(0)
    image, mask = rng.randint(256, size=(15, 20, 3)), rng.randint(classes, size=(12, 16))
    for values, how, file in ((image, Image.BICUBIC, "images/drawn.jpg"), (mask, Image.NEAREST, "masks/drawn.png")):
        (folder / file).parent.mkdir(parents=True)
        Image.fromarray(values.astype(np.uint8)).resize((640, 480), how).save(folder / file)
    (folder / "train.txt").write_text("drawn\n")
    (folder / "val.txt").write_text("drawn\n")
    (folder / "classes.txt").write_text("".join(f"class {k}\n" for k in range(classes)))
    return str(folder)


def training(flags, args, device):
    """train.py with these flags -> {"images_per_s", "peak_mb", "loader": share of the time}.

    The clock is in the loader. It starts when the batches that were made in advance are used up, and stops `repeats`
    steps later, before the last step, which saves."""
    first = 2 + 2 * args.workers
    last, read, waited = first + args.repeats, [], []

    class Timed(DataLoader):
        def __iter__(self):
            asked = now(device)
            for i, batch in enumerate(super().__iter__()):
                waited.append(time.perf_counter() - asked)
                if i in (first, last):
                    read.append((now(device), peak_mb(device)))
                yield batch
                asked = time.perf_counter()

    held(device)
    with mock.patch.object(data, "DataLoader", Timed):
        train.main(train.parse([*flags, "--steps", str(last + 1)]))
    (start, _), (end, peak) = read
    return {"images_per_s": args.batch_size * args.repeats / (end - start), "peak_mb": peak,
            "loader": sum(waited[first + 1:last + 1]) / (end - start)}


def testing(nets, recipe, args, device):
    """{name: model} -> {name: {"images_per_s", "peak_mb"}}; in each round all label the same images in turn, as many at
    a time as evaluate.py."""
    n, nothing = evaluate.PICTURES[device.type], torch.zeros(1, args.classes, device=device)
    image = torch.from_numpy(np.random.RandomState(0).randint(256, size=(3, *args.image)).astype(np.uint8))
    times, peaks = {name: [] for name in nets}, {}
    with torch.inference_mode(), processes.autocast(device, args.precision):
        for name, net in (args.repeats + 1) * [*nets.items()]:
            others, start = held(device) - sum(p.nbytes for p in net.parameters()), now(device)
            windows.label(net.logits, n * [image], recipe.short_side, recipe.window, recipe.stride, nothing)
            times[name].append((now(device) - start) / n)
            peaks[name] = peak_mb(device, others)
    return {name: {"images_per_s": 1 / median(times[name][1:]), "peak_mb": peaks[name]} for name in nets}


def main(args):
    device = processes.start(args.device)
    args.precision = args.precision or processes.fast_precision(device)
    args.batch_size = args.batch_size or (2 if device.type == "cpu" else 16)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    result = {"device": where, "torch": torch.__version__, "cuda": torch.version.cuda, "commit": product(),
              "settings": {key: str(value) for key, value in vars(args).items()}, "train": {}}
    with tempfile.TemporaryDirectory() as folder:
        root, file = drawn(Path(folder, "data"), args.classes), args.clip or f"{folder}/clip.pt"
        if not args.clip:
            torch.save({key: value.half() for key, value in clip.CLIP(**VIT_B16).state_dict().items()}, file)
        teacher = clip.load(file).to(device)
        nets = {name: build(name, teacher, args.classes) for name in (*PEERS, *args.bodies)}
        result["cost"] = {name: {"gflops": gflops(net, args.crop)["Global"]} for name, net in nets.items()}
        result["test"] = testing(nets, open_dataset(root).recipe.at_crop(args.crop), args, device)
        del nets, teacher
        numbers = (f"--crop {args.crop} --batch-size {args.batch_size} --workers {args.workers} --precision "
                   f"{args.precision} --device {device.type} --save-every 1000000 --body-weights none").split()
        for name in args.bodies:
            flags = [*numbers, "--dataset", root, "--clip", file, "--body", name, "--out-dir", f"{folder}/{name}"]
            result["train"][name] = training(flags, args, device)
    write_json(args.out, result)
    print(f"{json.dumps(result, indent=1)}\nwrote {args.out}")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    group("--precision", choices=("bf16", "fp16", "fp32"), help="(default: the fastest here)")
    group("--out", type=Path, default=ROOT / "experiments/results/benchmark.json", metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse)
