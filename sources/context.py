"""PASCAL Context, 49 seen and 10 unseen of its 59 classes. Two lists of the ten are published: a name for each."""
from sources.dataset import PROTOCOL, benchmark, locate
from sources.files import MASKS, list_files, pair_up, read_lines

SPLITS = {"context": "unseen_zs3_lineage", "context-cascade-clip": "unseen_cascade_clip"}
INSIDE = "VOCdevkit/VOC2010"
LISTS = "ImageSets/SegmentationContext/train.txt", "ImageSets/SegmentationContext/val.txt"
TREE = {"JPEGImages": ".jpg of VOC 2010",
        "SegmentationClassContext": ".png as mmsegmentation's pascal_context.py writes them: 0 rest, 1 to 59 classes",
        LISTS[0]: "4,998 names, by the same script", LISTS[1]: "5,105 names, by the same script"}


def open_context(root, name):
    where, protocol = locate(root, INSIDE, TREE, "docs/data.md says how to make it"), PROTOCOL["context"]
    images, masks = list_files(where["JPEGImages"], (".jpg",)), list_files(where["SegmentationClassContext"], MASKS)
    splits = [pair_up(read_lines(where[part]), images, masks, where[part]) for part in LISTS]
    return benchmark(name, protocol, protocol[SPLITS[name]], {k + 1: k for k in range(59)}, (0, 255), *splits)
