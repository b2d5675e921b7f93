"""What the loop sees of a data set: random crops, labels of the seen classes, the teacher's view, batches by step.

Which files and classes there are is in sources/. As a command this file fetches and checks a data set:

    python data.py --dataset voc --download     # brings VOC 2012 and SBD, makes SegmentationClassAug
    python data.py --dataset my_data            # the whole check: every file, counts, mask values, a picture

Symbols: B images, H×W pixels, h×w the dense grid, N = h·w.
"""
import math

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import ColorJitter, Compose, InterpolationMode, RandomApply
from torchvision.transforms.v2 import functional as TF

from losses import IGNORE
from sources import INVALID
from sources.files import read_pair
from support.command import Signals

PAD_COLOUR = [124, 116, 104]  # ImageNet's mean, where a crop is larger than the image
PADDING = INVALID  # label of such pixels, which no mask has, until `split_padding`
DISTORT = Compose([RandomApply([ColorJitter(**one)], p=0.5) for one in (
    {"brightness": 0.125}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.1})])  # FIELD: these four, each in half
MAX_ONE_CLASS = 0.75  # FIELD: crops with more of one class, or with none, are drawn again, ten draws at most


def augment(image, labels, recipe, view_size):
    """Random scale, crop, flip and photometric distortion (FIELD) of an image and its labels together.

    image uint8 (3, H, W), labels uint8 (H, W) -> three uint8 tensors:
      crop    (3, crop, crop); if the scaled image is smaller, padded on the right and at the bottom
      labels  (crop, crop), PADDING in the padding
      view    (3, view_size, view_size), what the teacher sees: the same window, flip and colours, without padding.
              OURS: squeezed to CLIP's square, so the aspect ratio is not kept: views stack, and all of the crop is seen
    The window is cut out first and then resized: the same result for a fraction of the work."""
    H, W = labels.shape
    factor = recipe.crop / min(H, W) * torch.empty(()).uniform_(*recipe.scale).item()  # pixels out per pixel in
    side = math.ceil(recipe.crop / factor)  # of the window, in the image's pixels
    h, w = min(side, H), min(side, W)
    for _ in range(10):
        top, left = int(torch.randint(H - h + 1, ())), int(torch.randint(W - w + 1, ()))
        part = labels[top:top + h, left:left + w]
        count = torch.bincount(part[::2, ::2].flatten().long(), minlength=256)[:INVALID]
        if 0 < count.max() <= MAX_ONE_CLASS * count.sum():
            break
    image, labels = TF.crop(image, top, left, h, w), labels[None]
    if recipe.jitter:  # before the resize: mostly fewer pixels, never more than were decoded
        image = DISTORT(image)
    size = [min(round(h * factor), recipe.crop), min(round(w * factor), recipe.crop)]
    # plain "nearest" reads half an output pixel to the upper left of where the image was read
    labels = TF.resized_crop(labels, top, left, h, w, size, InterpolationMode.NEAREST_EXACT)
    if torch.rand(()) < 0.5:
        image, labels = TF.horizontal_flip(image), TF.horizontal_flip(labels)
    view = TF.resize(image, [view_size, view_size], antialias=True)
    crop = TF.resize(image, size, antialias=True)
    pad = [0, 0, recipe.crop - size[1], recipe.crop - size[0]]  # right and below
    return TF.pad(crop, pad, fill=PAD_COLOUR), TF.pad(labels, pad, fill=PADDING)[0], view


def split_padding(labels, grid):
    """Labels (B, H, W) of crops, the size (h, w) of a grid -> labels with IGNORE in the padding, and bool (B, h, w):
    which positions lie in the image."""
    padding = labels == PADDING
    outside = F.interpolate(padding[:, None].float(), grid, mode="nearest-exact")[:, 0]
    return labels.masked_fill(padding, IGNORE), outside == 0


class TrainSet(Dataset):
    """Item (position, i): the crop, labels and view of image i, drawn from (seed, position) alone.

    So a batch depends on neither the workers, nor the number of processes, nor an interruption. Labels are indexes
    among the seen classes: the look-up table makes unseen ones IGNORE before anything else reads them."""

    def __init__(self, source, recipe, view_size, seed=0):
        self.files, self.table, self.classes = source.train, source.table(training=True), len(source.classes)
        self.recipe, self.view_size, self.seed = recipe, view_size, seed

    def __getitem__(self, item):
        position, i = item
        _, image, labels = read_pair(self.files[i], self.table, self.classes)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed * 1_000_003 + position)  # torch.manual_seed asks all devices
            return augment(image, labels, self.recipe, self.view_size)


class Steps(Sampler):
    """Endless shuffled epochs cut into batches: step s takes positions s·B … s·B + B − 1, each process its part."""

    def __init__(self, images, batch_size, first, last, seed=0, rank=0, ranks=1):
        self.images, self.batch_size, self.first, self.last = images, batch_size, first, last
        self.seed, self.rank, self.ranks = seed, rank, ranks

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        local = self.batch_size // self.ranks
        for step in range(self.first, self.last):
            yield self.batch(step)[self.rank * local:(self.rank + 1) * local]

    def batch(self, step):
        """The batch of all processes together: [(position, index of the image)]."""
        places = (divmod(p, self.images) for p in range(step * self.batch_size, (step + 1) * self.batch_size))
        return [(epoch * self.images + i, self.order(epoch)[i]) for epoch, i in places]

    def order(self, epoch):
        if getattr(self, "epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.shuffled = epoch, torch.randperm(self.images, generator=generator).tolist()
        return self.shuffled


def train_loader(dataset, steps, workers, device):
    """Batches of (crops (B, 3, H, W), labels (B, H, W), views (B, 3, V, V)), all uint8, in the order of `steps`."""
    return DataLoader(dataset, batch_sampler=steps, num_workers=workers, pin_memory=device.type == "cuda",
                      worker_init_fn=Signals.ignore)


class ValSet(Dataset):
    """Whole images with all classes: uint8 image (3, H, W), labels (H, W), name. Each rank its part, no repeats."""

    def __init__(self, source, rank=0, ranks=1):
        self.files, self.classes = source.val[rank::ranks], len(source.classes)
        self.table = source.table(training=False)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        name, image, labels = read_pair(self.files[i], self.table, self.classes)
        return image, labels, name


if __name__ == "__main__":
    from sources import check
    from support.command import run_command
    run_command(check.main, check.parse)
