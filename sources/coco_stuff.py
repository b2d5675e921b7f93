"""COCO-Stuff 164K, 156 seen and 15 unseen classes; the masks are stuffthingmaps, as they come (0-based, 255 void)."""
from sources.dataset import PROTOCOL, benchmark, locate, places
from sources.download import Archive, bring
from sources.files import MASKS, list_files, pair_up

INSIDE = "images"  # a folder that many put around the images
PARTS = "train2017", "val2017"
TREE = {"train2017": "118,287 .jpg", "val2017": "5,000 .jpg",
        "stuffthingmaps/train2017": "118,287 .png of stuffthingmaps_trainval2017.zip, as they come",
        "stuffthingmaps/val2017": "5,000 .png of the same"}
COCO = "http://images.cocodataset.org/zips/", "https://s3.amazonaws.com/images.cocodataset.org/zips/"
TRAIN = Archive("train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2", COCO, unpacked=19_600_000_000)
VAL = Archive("val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80", COCO, unpacked=830_000_000)
MAPS = Archive("stuffthingmaps_trainval2017.zip", 690_000_000, None, (  # no checksum is published, size is rounded
    "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/",), unpacked=1_000_000_000)


def open_coco_stuff(root, name):
    where = locate(root, INSIDE, TREE, f"python data.py --dataset {name} --data-root {root} --download makes it")
    protocol, splits = PROTOCOL[name], []
    for part in PARTS:
        images, masks = list_files(where[part], (".jpg",)), list_files(where[f"stuffthingmaps/{part}"], MASKS)
        splits.append(pair_up(list(images), images, masks, where[part]))
    values = {value: k for k, value in enumerate(protocol["raw_ids"])}
    return benchmark(name, protocol, protocol["unseen"], values, (255,), *splits)


def download(root, folder):
    """Brings what is missing of the tree; `folder` is for what comes between."""
    place = {part: path if path.exists() else root / part for part, path in places(root, INSIDE, TREE).items()}
    bring("coco-stuff", root, {TRAIN: {"train2017": place["train2017"]}, VAL: {"val2017": place["val2017"]},
                               MAPS: {part: place[f"stuffthingmaps/{part}"] for part in PARTS}}, folder)
