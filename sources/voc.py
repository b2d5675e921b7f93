"""PASCAL VOC 2012 with SBD's masks ("aug"), 15 seen and 5 unseen classes. Background is ignored, as void is.

Training images are all names of SegmentationClassAug that val.txt does not name. That folder is in no official archive:
`download` makes it from SBD's files. Pictures that VOC labels itself keep VOC's masks, as in the field.
"""
import os
import shutil

from PIL import Image

from sources.dataset import PROTOCOL, benchmark, locate, places
from sources.download import Archive, bring
from sources.files import MASKS, list_files, pair_up, read_lines
from sources.matlab import read_segmentation
from support.progress import Progress

INSIDE = "VOCdevkit/VOC2012"  # where the archive's files lie
VAL, AUG = "ImageSets/Segmentation/val.txt", "SegmentationClassAug"
TREE = {"JPEGImages": "17,125 .jpg of VOC 2012",
        "SegmentationClass": "2,913 .png of VOC 2012, palette as it comes: the test masks",
        AUG: "12,031 .png of VOC and SBD together: all that val.txt does not name are for training",
        VAL: "1,449 names"}
SBD_MASKS = "benchmark_RELEASE/dataset/cls"
VOC = Archive("VOCtrainval_11-May-2012.tar", 1_999_639_040, "6cd6e144f989b92b3379bac3b3de84fd", (
    "http://thor.robots.ox.ac.uk/pascal/VOC/voc2012/", "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    "https://d2l-data.s3-accelerate.amazonaws.com/"), unpacked=1_950_000_000)
SBD = Archive("benchmark.tgz", 1_419_539_633, "82b4d87ceb2ed10f6038a1cba92111cb", (
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/",), unpacked=200_000_000)


def open_voc(root, name):
    where = locate(root, INSIDE, TREE, f"python data.py --dataset {name} --data-root {root} --download makes it")
    protocol, val = PROTOCOL[name], read_lines(where[VAL])
    images, masks = list_files(where["JPEGImages"], (".jpg",)), list_files(where[AUG], MASKS)
    train = pair_up(sorted(masks.keys() - set(val)), images, masks, where[AUG])
    test = pair_up(val, images, list_files(where["SegmentationClass"], MASKS), where[VAL])
    return benchmark(name, protocol, protocol["unseen"], {k + 1: k for k in range(20)}, (0, 255), train, test)


def download(root, folder):
    """Brings what is missing of the tree; `folder` is for what comes between."""
    where, theirs = places(root, INSIDE, TREE), root / SBD_MASKS  # the user's, unpacked
    sbd = theirs if theirs.exists() else folder / "SBD"
    bring("voc", root, {VOC: {f"{INSIDE}/{part}": where[part] for part in TREE if part != AUG},
                        SBD: {} if where[AUG].exists() else {SBD_MASKS: sbd}}, folder)
    if not where[AUG].exists():
        write_masks(list_files(sbd, (".mat",)), list_files(where["SegmentationClass"], MASKS), folder / "masks")
        os.replace(folder / "masks", where[AUG])


def write_masks(sbd, official, folder):
    """{name: SBD's file}, {name: VOC's own mask} -> a folder of masks."""
    palette = Image.open(next(iter(official.values()))).getpalette()
    progress = Progress("SegmentationClassAug", len(sbd | official), "masks")
    shutil.rmtree(folder, ignore_errors=True)  # of a killed call
    folder.mkdir()
    for done, (name, path) in enumerate((sbd | official).items()):
        progress.say(done)
        if name in official:
            shutil.copyfile(path, folder / f"{name}.png")
        else:
            image = Image.fromarray(read_segmentation(path.read_bytes(), path))
            image.putpalette(palette)  # VOC's own colours
            image.save(folder / f"{name}.png")
