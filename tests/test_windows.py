"""Whole pictures from windows: their labels against a plain loop, and the memory that they take."""
import itertools
import resource

import pytest
import torch
import torch.nn.functional as F
from conftest import finish, start

from support import UserError, windows

WEIGHT = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))


def by_colour(images):
    """Logits that are fixed random functions of colour at stride 4: every class wins somewhere."""
    small = F.avg_pool2d(images, 4, ceil_mode=True)
    return torch.einsum("kc,bchw->bkhw", WEIGHT, small - 0.5) * (1 + small.mean(dim=(1, 2, 3), keepdim=True))


def plain(picture, short_side):
    """Resized, windows of 64 every 40, their logits at their pixels, mean, the picture's own size -> (20, H, W)."""
    factor = min(short_side / min(picture.shape[1:]), 8)
    h, w = (round(side * factor) for side in picture.shape[1:])
    small = F.interpolate(picture[None].float() / 255, (h, w), mode="bilinear", antialias=True)
    total, count = torch.zeros(20, h, w), torch.zeros(h, w)
    tops, lefts = ([*[i for i in range(0, side, 40) if i + 64 < side], max(side - 64, 0)] for side in (h, w))
    for top, left in itertools.product(tops, lefts):
        place = ..., slice(top, top + 64), slice(left, left + 64)
        total[place] += F.interpolate(by_colour(small[place]), count[place].shape, mode="bilinear")[0]
        count[place] += 1
    return F.interpolate((total / count)[None], picture.shape[1:], mode="bilinear")[0]


@pytest.mark.parametrize("held", [60_000, 2**26])  # one class at a time or some, all
def test_labels_against_a_loop(held, monkeypatch):
    """Pictures of five sizes together: the same labels as one by one, lowered, and with a least logit."""
    monkeypatch.setitem(windows.HELD, "cpu", held)
    monkeypatch.setitem(windows.WINDOWS, "cpu", 5)
    torch.manual_seed(0)
    pictures = [(255 * F.interpolate(torch.rand(1, 3, 6, 8), size, mode="bicubic").clamp(0, 1)[0]).byte()
                for size in ((64, 64), (30, 90), (101, 77), (5, 70), (200, 260))]
    lower_by, sizes = torch.stack([torch.zeros(20), 0.3 * (torch.arange(20) < 15)]), []
    found = windows.label(lambda x: sizes.append(len(x)) or by_colour(x), pictures, 90, 64, 40, lower_by)
    assert max(sizes) == 5 and len(sizes) < len(pictures) * 4  # windows of several pictures at a time
    for picture, maps in zip(pictures, found):
        scores = plain(picture, 90)
        assert maps.shape == (2, *picture.shape[1:]) and maps.dtype == torch.uint8 and (maps[0] != maps[1]).any()
        for labels, off in zip(maps, lower_by):
            assert (labels == (scores - off[:, None, None]).argmax(0)).float().mean() > 0.999  # ties in rounding aside
        best = scores.gather(0, maps[1:].long())[0]  # of the winner after it was lowered
        kept = windows.label(by_colour, [picture], 90, 64, 40, lower_by[1:], best.median().item())[0][0]
        assert (kept != 255).eq(best >= best.median()).float().mean() > 0.999 and (kept == 255).any()
        assert torch.equal(kept[kept != 255], maps[1][kept != 255])
    for wrong in ((0, 64, 40), (64, 64, 0), (64, 64, 65), (64, 0, 0)):
        with pytest.raises(UserError, match="expected 1 or more, and 0 < stride"):
            windows.label(by_colour, pictures, *wrong, lower_by)


def large(H, W):
    def logits(images):  # the worst case: any class may win anywhere
        return torch.randn(len(images), 100, images.shape[2] // 16, images.shape[3] // 16)

    picture = torch.randint(0, 256, (3, H, W), dtype=torch.uint8)
    assert windows.label(logits, [picture], 512, 512, 426, torch.zeros(1, 100))[0].shape == (1, H, W)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2)  # GiB


@pytest.mark.parametrize("size, most", [((1200, 1500), 0.75), pytest.param((4000, 5000), 1.1, marks=pytest.mark.slow),
                                        pytest.param((200, 20000), 1.6, marks=pytest.mark.slow)])
def test_a_large_picture_takes_little_memory(size, most, tmp_path):
    """100 score maps of these pictures would be 0.7, 7.5 and (at the size of the test) 9.8 GiB."""
    assert float(finish(*start(tmp_path, large, *size)).stdout) < most
