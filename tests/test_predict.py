"""predict.py: pictures of every kind, words, what is written."""
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, command, run_inside
from PIL import Image
from trees import own_data

import clip
import evaluate
import predict
import train
from bodies import ModelError
from sources import DataError
from sources.files import read_image
from support import UserError, pictures, processes, progress, windows
from support.checkpoint import CheckpointError


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setattr(processes, "fast_precision", lambda _: "fp32")  # on every machine


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_clip_file):
    """A run of one step on own data, whose test picture c.jpg has many colours."""
    root = tmp_path_factory.mktemp("predict")
    data = own_data(root / "own", (0, 2), ("tv monitor", "sofa, couch", "brick wall"), ["sofa, couch"])
    torch.manual_seed(1)
    colours = F.interpolate(torch.rand(1, 3, 9, 6), (70, 80), mode="bicubic")[0].clamp(0, 1)
    Image.fromarray((255 * colours).byte().permute(1, 2, 0).numpy()).save(data / "images/c.jpg")
    status, _, words = run_inside(train, "--dataset", data, "--clip", tiny_clip_file, "--body", "small", "--steps", 1,
                                  "--lr", 3e-5, "--batch-size", 2, "--crop", 64, "--workers", 0, "--device", "cpu",
                                  "--precision", "fp32", "--out-dir", root / "run")
    assert status == 0, words
    saved = torch.load(root / "run/last.pt", weights_only=True)
    saved["model"]["head.adapter.norm.bias"].zero_()  # and a small rate: else one label everywhere, after one step
    torch.save(saved, root / "run/last.pt")
    return root / "run"


@pytest.fixture(scope="module")
def photo(run):
    return run.parent / "own/images/c.jpg"


def test_every_kind_of_file_is_read_as_what_it_shows(tmp_path):
    y, x = np.mgrid[:60, :100]  # a gradient that tells left from right and top from bottom
    photo = Image.fromarray(np.stack([x * 2, y * 4, 200 - x - y], -1).astype(np.uint8))
    grey, clear, white, exif = photo.convert("L"), photo.convert("RGBA"), np.array(photo), Image.Exif()
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    clear.putalpha(Image.fromarray(np.where(x < 50, 255, 0).astype(np.uint8)))
    white[:, 50:] = 255  # what is transparent
    for turn, quarters, stored in ((6, 1, (100, 60)), (3, 2, (60, 100))):  # a camera that was turned
        exif[0x112] = turn
        Image.fromarray(np.rot90(np.asarray(photo), quarters).copy()).save(tmp_path / f"{turn}.png", exif=exif)
        assert read_image(tmp_path / f"{turn}.png").shape == (3, *stored)  # masks do not follow, nor does training
    for name, stored, shown, tolerance in (
            ("grey.png", grey, grey.convert("RGB"), 0), ("deep.png", deep, grey.convert("RGB"), 0.5),
            ("deep.tif", deep, grey.convert("RGB"), 0.5), ("cmyk.jpg", photo.convert("CMYK"), photo, 6),
            ("palette.gif", photo.quantize(256), photo, 6), ("clear.png", clear, white, 0), ("3.png", None, photo, 0),
            ("6.png", None, photo, 0)):
        if stored:
            stored.save(tmp_path / name)
        got = read_image(tmp_path / name, upright=True).permute(1, 2, 0).numpy().astype(int)
        assert got.shape == (60, 100, 3) and abs(got - np.asarray(shown)).mean() <= tolerance, name


def test_it_is_the_prediction_of_evaluate(run, photo, tmp_path, monkeypatch):
    """By default at the run's test size, whatever the picture's; γ is taken off what the run trained on."""
    monkeypatch.setattr(progress, "EVERY", -1)
    flags = "--run", run, "--save-predictions", tmp_path, "--out-dir", tmp_path, "--device", "cpu"
    status, words, _ = run_inside(evaluate, *flags)
    assert status == 0 and words.startswith("    test: 1 of 1 images, 0:00:00 left\n")
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["device"] == "cpu" and found["torch"] == torch.__version__ and len(found["commit"] or 40 * ".") > 39
    theirs = torch.from_numpy(np.array(Image.open(tmp_path / "c.png")))
    ours, names = predict.segment(str(photo), run=run, device="cpu")
    assert torch.equal(ours, theirs) and names == ["tv monitor", "sofa", "brick wall"]
    larger = predict.segment(photo, run=run / "last.pt", device="cpu", short_side=150)[0]
    assert not torch.equal(larger, theirs)
    net, config = evaluate.load_run(run / "last.pt", torch.device("cpu"))
    net.set_classes(config["classes"], config["templates"])
    off = torch.tensor([[5.0, 0, 5.0]])
    lowered = windows.label(net.logits, [read_image(photo)], 64, 64, config["test"]["stride"], off)[0][0]
    assert torch.equal(predict.segment(photo, run=run, gamma=5.0, device="cpu")[0], lowered)
    assert not torch.equal(lowered, theirs)
    assert predict.segment(torch.zeros(3, 1, 1, dtype=torch.uint8), run=run, device="cpu")[0].shape == (1, 1)


def test_a_run_whose_clip_has_moved_takes_it_from_elsewhere_but_takes_no_other(run, photo, tiny_clip_file, tmp_path):
    elsewhere, other = shutil.copy(tiny_clip_file, tmp_path / "moved.pt"), tmp_path / "other.pt"
    saved, weights = (torch.load(path, weights_only=True) for path in (run / "last.pt", tiny_clip_file))
    saved["config"]["clip"] = str(tmp_path / "gone.pt")
    torch.save(saved, tmp_path / "last.pt")
    block = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    torch.save(weights | {block: -weights[block]}, other)
    with pytest.raises(clip.CLIPError, match="no CLIP file .*gone.pt"):
        predict.segment(photo, run=tmp_path, device="cpu")
    moved = predict.segment(photo, run=tmp_path, device="cpu", clip_file=elsewhere)[0]
    assert torch.equal(moved, predict.segment(photo, run=run, device="cpu")[0])
    with pytest.raises(ModelError, match="other.pt is not the CLIP that .* was trained with"):
        predict.segment(photo, run=tmp_path, device="cpu", clip_file=other)
    saved["config"]["classes"][1] = ","
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="a class without a word"):
        predict.segment(photo, "cat", run=tmp_path / "last.pt", device="cpu", clip_file=elsewhere)


def test_other_words_do_not_load_the_run_again_but_a_newer_checkpoint_does(run, photo, monkeypatch):
    calls = []
    monkeypatch.setattr(predict, "load_run", lambda *args: calls.append(args) or evaluate.load_run(*args))
    predict.loaded_run.cache_clear()
    found = [predict.segment(photo, words, run=run, device="cpu") for words in ("dog, tree", "sand, cat", "dog, tree")]
    assert len(calls) == 1 and [names for _, names in found] == [["dog", "tree"], ["sand", "cat"], ["dog", "tree"]]
    assert torch.equal(found[0][0], found[2][0]) and not torch.equal(found[0][0], found[1][0])
    (run / "last.pt").touch()
    predict.segment(photo, "dog", run=run, device="cpu")
    assert len(calls) == 2


def test_synonyms_others_gamma_and_threshold(run, photo):
    def ask(*args, **more):
        return predict.segment(photo, *args, run=run, device="cpu", **more)

    def label(*classes):
        net.set_classes(classes, config["templates"])
        return windows.label(net.logits, [image], 64, 64, config["test"]["stride"], torch.zeros(1, len(classes)))[0][0]

    (net, config), image = evaluate.load_run(run / "last.pt", torch.device("cpu")), read_image(photo)
    for words in ("tv monitor, sofa|couch , brick_wall,", "tv monitor，sofa｜couch、brick_wall"):
        assert torch.equal(ask(words)[0], ask()[0])
    assert ask(["sofa | couch", "cat"])[1] == ["sofa", "cat"]
    three = label("sofa,couch", "cat", predict.OTHER)
    assert torch.equal(ask("sofa|couch, cat", other=True)[0], three.masked_fill(three == 2, 255))
    label("sofa,couch", "cat")
    middle = net.logits(image[None] / 255).amax(1).median().item() * net.tau  # a cosine that half of the pixels reach
    assert 0.2 < (ask("sofa|couch, cat", threshold=middle)[0] != 255).float().mean() < 0.8
    both = [ask("tv monitor, brick wall", gamma=gamma, threshold=-0.99)[0] for gamma in (0.0, 500.0)]
    assert torch.equal(*both) and (both[0] != 255).all()  # γ lowers both names' logits, not the cosine that is asked
    for wrong in ("", "cat, Cat", "sofa|couch, couch", "a_b, A b", ["sofa, couch", "sofa, bed"], ["|", "_"],
                  [f"thing {i}" for i in range(254)]):
        with pytest.raises(UserError, match="different ones: expected 1 to 253"):
            ask(wrong)
    for wrong in ({"threshold": 30}, {"gamma": float("nan")}, {"short_side": 0}):
        with pytest.raises(UserError, match="expected"):
            ask("cat, dog", **wrong)


def test_what_people_hold_in_their_hands(run, photo):
    """Paths, PIL images, arrays and tensors of one picture give one label map; anything else is refused."""
    image = Image.open(photo)
    array = np.array(image)
    tensor, grey = torch.from_numpy(array).permute(2, 0, 1), np.array(image.convert("L"))
    want, grey_want = (predict.segment(x, run=run, device="cpu")[0] for x in (photo, image.convert("L").convert("RGB")))
    for same in (str(photo), image, array, array[:, ::-1][:, ::-1], tensor):
        assert torch.equal(predict.segment(same, run=run, device="cpu")[0], want)
    for same in (image.convert("L"), grey, np.stack([grey] * 3, -1)):
        assert torch.equal(predict.segment(same, run=run, device="cpu")[0], grey_want)
    for wrong in (tensor / 255, array / 255, array.astype(np.uint16), tensor[:1], tensor[None], array[..., :2], [array],
                  array[:0], tensor[:, :, :0], None, b"photo.jpg", tensor.permute(1, 2, 0)):
        with pytest.raises(DataError, match="^found .*expected a path, a PIL image, a uint8 array"):
            predict.segment(wrong, run=run, device="cpu")


def test_the_command_writes_three_files_and_skips_what_is_no_picture(run, photo, tmp_path):
    folder, out = tmp_path / "photos", run / "predictions"
    folder.mkdir()
    shutil.copy(photo, folder / "a.jpg")
    Image.open(photo).save(tmp_path / "a.png")
    (folder / "broken.jpg").write_bytes(photo.read_bytes()[:400])
    for name in ("notes.txt", "b.HEIC", "._a.jpg"):
        (folder / name).write_text("not looked at")
    done = command(tmp_path, "predict.py", folder, tmp_path / "a.png", "--run", run, "--device", "cpu", "--classes",
                   "cat, café|coffee house", ok=False)
    left, skipped, end = done.stderr.splitlines()
    assert left.startswith(f"left out of {folder}: b.HEIC, notes.txt; expected files that end in .jpg, .jpeg")
    assert skipped.startswith("skipped: cannot read the image ") and "broken.jpg" in skipped
    assert end == "error: 1 of 3 images skipped"
    assert {p.name for p in out.iterdir()} == {f"{stem}.{kind}" for stem in ("a", "a-2")
                                               for kind in ("overlay.png", "mask.png", "json")}
    assert f"wrote {out}/a-2.overlay.png" in done.stdout
    mask, found = Image.open(out / "a.mask.png"), json.loads((out / "a.json").read_text())
    labels = torch.from_numpy(np.array(mask))
    assert mask.mode == "P" and mask.size == (80, 70)
    assert np.array_equal(np.array(mask.convert("RGB")), pictures.coloured(labels).permute(1, 2, 0))
    assert found["picture"] == str(folder / "a.jpg") and (found["width"], found["height"]) == (80, 70)
    assert list(found["classes"]) == ["cat", "café"] and found["none"] == 0
    assert predict.write(read_image(photo), labels * 0, ["none", "cat"], tmp_path, "x", {})["none"] == 1
    for k, share in enumerate(found["classes"].values()):
        assert share == pytest.approx((labels == k).float().mean().item())


def test_nothing_of_the_users_is_labelled_twice_or_lost(run, photo, tmp_path):
    """Into the folder of the pictures, twice: only what the command wrote is replaced. One bad name ends nothing."""
    names = ["a.jpg", "b.jpg", "x" * 245 + ".jpg", os.fsdecode(b"caf\xe9.jpg"), "zz.jpg"]
    for name in names:
        shutil.copy(photo, tmp_path / name)
    (tmp_path / "a.json").write_text('{"shapes": ["of a labelling tool"]}')
    (tmp_path / "b.mask.png").mkdir()
    want = {*names, "a.json", "b.mask.png", *(f"{stem}.{kind}" for kind in predict.KINDS
                                              for stem in ("a-2", "b-2", names[3][:-4], "zz"))}
    for _ in range(2):
        status, words, end = run_inside(predict, tmp_path, "--out-dir", tmp_path, "--run", run, "--device", "cpu",
                                        "--classes", "cat")
        assert status == 1 and end == f"error: 1 of {len(names)} images skipped" and ".jpg: File name too long" in words
        assert words.count("here cat, as no other is named: --other adds one") == 1
        assert {path.name for path in tmp_path.iterdir()} == want
        assert "labelling tool" in (tmp_path / "a.json").read_text()
    status, words, _ = run_inside(predict, tmp_path / "zz.mask.png", "--run", run, "--device", "cpu")
    assert status == 1 and "zz.mask.png was written by predict.py or evaluate.py" in words
    (run.parent / "maps").mkdir()
    shutil.copy(photo, run.parent / "maps/c.png")  # a mask, perhaps, that a person drew
    words = run_inside(evaluate, "--run", run, "--device", "cpu", "--save-predictions", run.parent / "maps")[2]
    assert "maps/c.png was not written by this command: choose another folder" in words


def test_the_document_on_deployment(run, tmp_path, monkeypatch):
    """Its blocks as they stand, for this run: onnxruntime gives the model's logits for the words baked in."""
    blocks = re.findall("```python\n(.*?)```", (ROOT / "docs/deploy.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    inside = {}
    exec("".join(blocks).replace("runs/voc", str(run)), inside)
    images = torch.rand(1, 3, 64, 64)
    found = inside["session"].run(None, {"images": images.numpy()})[0]
    model, config = evaluate.load_run(run / "last.pt", torch.device("cpu"))
    model.set_classes(["cat", "sofa, couch", "potted plant"], config["templates"])
    assert torch.allclose(torch.from_numpy(found), model.logits(images), atol=1e-3) and found.shape[1] == 3
