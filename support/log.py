"""What a run tells its user while it trains: the first lines, a line every few steps, log.jsonl, curves.png."""
import json
import time
from datetime import timedelta

from support import pictures, processes


class Log:
    """What the first process prints, and writes into log.jsonl and curves.png; the others are silent.

    steps: how many the run has, for the time that is left."""

    def __init__(self, out, steps):
        self.out, self.steps, self.start, self.warm = out, steps, time.time(), None
        self.silent = processes.rank() > 0

    def say(self, text):
        if not self.silent:
            print(text, flush=True)

    def write(self, **line):
        if not self.silent:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps({**line, "seconds": round(time.time() - self.start, 2)}) + "\n")

    def opening(self, args, source, model, remarks, device):
        names = [source.classes[k].split(",")[0] for k in sorted(source.unseen)]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        if args.departures:
            remarks = [*remarks, f"not the benchmark's protocol: {args.departures}"]
        for remark in remarks:
            self.say(remark)
        self.say(f"data    {source.name}: {len(source.train)} training images, {len(source.val)} test images\n"
                 f"classes {len(source.seen)} seen, {len(names)} unseen{': ' * bool(names)}{', '.join(names[:6])}"
                 f"{' …' * (len(names) > 6)}; their labels reach no loss\n"
                 f"model   {args.body} body, {args.head} head: {trained / 1e6:.2f} M parameters trained, "
                 f"{frozen / 1e6:.2f} M frozen; teacher {args.clip}\n"
                 f"run     {args.steps} steps of {args.batch_size} images on {processes.world_size()} × {device.type}, "
                 f"{args.precision}, into {self.out}/")

    def step(self, step, numbers, k, lr):
        seconds, k = time.time() - self.start, k.float().mean().item()  # of the first process's images
        if self.warm:  # the first step, which starts all up, is left out
            pace = (seconds - self.warm[1]) / (step - self.warm[0])
            eta = timedelta(seconds=round(pace * (self.steps - step - 1)))
        self.say(f"step {step:5d}/{self.steps}  loss {numbers['loss']:.3f}  seg {numbers['loss_seg']:.3f}  "
                 f"sgd {numbers['loss_sgd']:.3f}  sam {numbers['loss_sam']:.3f}  k {k:.0f}  lr {lr:.1e}"
                 + (f"  {pace:.2f} s per step, {eta} left" if self.warm else ""))
        self.warm = self.warm or (step, seconds)
        self.write(step=step, **{name: numbers[name] for name in numbers if name != "gradient"}, k=k, lr=lr)

    def scores(self, scores):
        self.write(step=self.steps, **{key: scores[key] for key in ("mIoU_seen", "mIoU_unseen", "hIoU")})
        self.curves()
        self.say(f"trained and tested in {time.time() - self.start:.0f} s; next: python predict.py --run {self.out}")

    def curves(self):
        if not self.silent:
            pictures.save(pictures.curves(self.out / "log.jsonl"), self.out / "curves.png")
