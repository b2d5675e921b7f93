"""A line every few seconds while something long runs."""
import time
from datetime import timedelta

EVERY = 5  # seconds


class Progress:
    """`say(done)` prints how much is done and the time left, at most every few seconds.

    total, done: whole numbers of `unit`. first: what was done before, which tells nothing about the pace."""

    def __init__(self, what, total, unit, first=0):
        self.what, self.total, self.unit, self.first = what, total, unit, first
        self.start = self.said = time.monotonic()

    def say(self, done):
        now = time.monotonic()
        if now - self.said >= EVERY and done > self.first:
            self.said, pace = now, (done - self.first) / (now - self.start)
            left = timedelta(seconds=round((self.total - done) / pace))
            print(f"    {self.what}: {done:,} of {self.total:,} {self.unit}, {left} left", flush=True)
