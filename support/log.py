"""What a run tells its user while it trains: the first lines, a line every few steps, log.jsonl, curves.png."""
import json
import math
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from support import UserError, pictures, processes


class Log:
    """What the first process prints, and writes into log.jsonl and curves.png; the others are silent.

    steps: how many the run has, for the time that is left."""

    def __init__(self, out, steps):
        self.out, self.steps, self.start, self.warm = out, steps, time.time(), None
        self.silent = processes.rank() > 0

    def say(self, *lines):
        if not self.silent:
            print(*lines, sep="\n", flush=True)

    def write(self, **line):
        if not self.silent:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps({**line, "seconds": round(time.time() - self.start, 2)}) + "\n")

    def opening(self, args, source, model, remarks, departures, device, data_picture):
        """The first lines; what the data check saw goes into data.png."""
        if self.silent:
            return
        pictures.save(data_picture, self.out / "data.png")
        names = [source.classes[k].split(",")[0] for k in sorted(source.unseen)]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad) / 1e6
        if departures:
            remarks = [*remarks, f"not the benchmark's protocol: {departures}"]
        self.say(*remarks,
                 f"data    {source.name}: {len(source.train)} training images, {len(source.val)} test images",
                 f"classes {len(source.seen)} seen, {len(names)} unseen{': ' * bool(names)}{', '.join(names[:6])}"
                 f"{' …' * (len(names) > 6)}; their labels reach no loss",
                 f"model   {args.body} body, {args.head} head: {trained:.2f} M parameters trained, {frozen:.2f} M "
                 f"frozen; teacher {args.clip}",
                 f"run     {args.steps} steps of {args.batch_size} images on {processes.world_size()} × {device.type}, "
                 f"{args.precision}, {args.workers} loader processes each, into {self.out}/")

    def step(self, step, n, k, lr, chance):
        """n: what `read` gives. k: positions that SGD selects, (B,). chance: its loss if it learns nothing."""
        seconds, k = time.time() - self.start, k.float().mean().item()  # of the first process's images
        values = n | {"sgd_chance": chance, "k": k, "lr": lr}
        if self.warm:  # the first step, which starts all up, is left out
            pace = (seconds - self.warm[1]) / (step - self.warm[0])
            eta = timedelta(seconds=round(pace * (self.steps - step - 1)))
        self.say(f"step {step:5d}/{self.steps}  loss {n['loss']:.3f}  seg {n['seg']:.3f}  sgd {n['sgd']:.3f} of "
                 f"{chance:.2f}  sam {n['sam']:.3f}  norm {n['norm']:.2g}  k {k:.0f}  lr {lr:.1e}"
                 + (f"  {pace:.2f} s per step, {eta} left" if self.warm else ""))
        self.warm = self.warm or (step, seconds)
        self.write(step=step, **{key: value for key, value in values.items() if math.isfinite(value)})

    def scores(self, scores):
        self.write(step=self.steps, **{key: scores[key] for key in ("mIoU_seen", "mIoU_unseen", "hIoU")})
        self.curves()
        self.say(f"trained and tested in {time.time() - self.start:.0f} s; next: python predict.py --run {self.out}")

    def curves(self):
        if not self.silent:
            pictures.save(pictures.curves(self.out / "log.jsonl"), self.out / "curves.png")


def read(**values):
    """Scalars of this process, on its device -> {name: float}, means over processes. This waits for the device."""
    stacked = torch.stack([torch.as_tensor(value).detach().float() for value in values.values()])
    if processes.world_size() > 1:
        dist.all_reduce(stacked)
    return dict(zip(values, (stacked / processes.world_size()).tolist()))


def check_finite(numbers, step, saved, norm):
    """Raises UserError unless the losses are finite; with `norm` the gradient's norm too (with fp16's loss scaling a
    step whose gradient is not finite is skipped). saved: the step of the last save, None before the first."""
    if all(math.isfinite(value) for name, value in numbers.items() if norm or name != "norm"):
        return
    parts = ", ".join(f"{name} {numbers[name]:.4g}" for name in numbers if name != "clipped")
    raise UserError(f"not finite at step {step}: {parts}; nothing of it is saved. " + (
        f"--resume continues from step {saved}; try a lower --lr" if saved is not None else
        "Nothing was saved before: --resume starts at step 0; try a lower --lr"))
