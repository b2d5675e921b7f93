"""predict.py: pictures of every kind, words, what is written."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from trees import own_data

import clip
import evaluate
import model as models
import predict
import sources
from bodies import ModelError
from sources.files import read_image
from support import checkpoint, processes
from toy import world

CPU = torch.device("cpu")
NAMES = ["tv monitor", "sofa", "brick wall"]


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setattr(processes, "fast_precision", lambda _: "fp32")  # on every machine


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_clip_file):
    """A run folder as train.py leaves it, of an untrained model."""
    out = tmp_path_factory.mktemp("predict") / "run"
    config = {"clip": str(tiny_clip_file), "body": "small", "body_weights": "default", "head": "csh", "crop": 64,
              "dataset": "nowhere", "data_root": None, "frozen_blocks": 1, "temperature": None,
              "classes": ["tv monitor", "sofa, couch", "brick wall"], "unseen": [1], "departures": "",
              "templates": list(world.TEMPLATES), "test": {"short_side": 64, "window": 64, "stride": 48}}
    torch.manual_seed(0)
    clip_model = clip.load(tiny_clip_file)
    config["clip_hash"] = clip.fingerprint(clip_model)
    net = models.build(clip_model)
    checkpoint.save(out, net, torch.optim.AdamW(net.parameters()), 1, torch.empty(0, 128), config)
    return out


@pytest.fixture(scope="module")
def photo():
    """A gradient that tells left from right and top from bottom, 60 high and 100 wide."""
    y, x = np.mgrid[:60, :100]
    return Image.fromarray(np.stack([x * 2, y * 4, 200 - x - y], -1).astype(np.uint8))


@pytest.fixture(scope="module")
def image(photo):
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)


def gap(path, photo):
    got = read_image(path, upright=True).numpy().transpose(1, 2, 0).astype(int)
    assert got.shape == np.asarray(photo).shape
    return abs(got - np.asarray(photo)).mean()


def test_a_camera_that_was_turned(photo, tmp_path):
    """EXIF 6 and 3: what is stored lies on its side, upside down. Masks do not follow, nor does what training reads."""
    for turn, quarters, stored in ((6, 1, (100, 60)), (3, 2, (60, 100))):
        exif = Image.Exif()
        exif[0x112] = turn
        Image.fromarray(np.rot90(np.asarray(photo), quarters).copy()).save(tmp_path / "a.png", exif=exif)
        assert gap(tmp_path / "a.png", photo) == 0 and read_image(tmp_path / "a.png").shape == (3, *stored)


def test_every_kind_of_file_is_read_as_what_it_shows(photo, tmp_path):
    grey, clear, white = photo.convert("L"), photo.convert("RGBA"), np.array(photo)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    clear.putalpha(Image.fromarray(np.where(np.arange(100) < 50, 255, 0).astype(np.uint8)[None].repeat(60, 0)))
    white[:, 50:] = 255  # what is transparent
    cmyk, palette = photo.convert("CMYK"), photo.quantize(256)
    for name, stored, shown, tolerance in (
            ("grey.png", grey, grey.convert("RGB"), 0), ("deep.png", deep, grey.convert("RGB"), 0.5),
            ("deep.tif", deep, grey.convert("RGB"), 0.5), ("cmyk.jpg", cmyk, photo, 6),
            ("palette.gif", palette, photo, 6), ("clear.png", clear, white, 0)):
        stored.save(tmp_path / name)
        assert gap(tmp_path / name, shown) <= tolerance, name


def test_pictures_of_any_size_get_labels_of_that_size(run, photo):
    for size in ((1, 1), (5, 300), (700, 500)):
        image = torch.from_numpy(np.array(photo.resize(size))).permute(2, 0, 1)
        labels, names = predict.segment(image, run=run, device="cpu")
        assert labels.shape == size[::-1] and labels.dtype == torch.uint8 and names == NAMES
        assert set(labels.unique().tolist()) <= {0, 1, 2}


def test_it_is_the_prediction_of_evaluate(run, tmp_path):
    """By default at the run's test size, whatever the picture's; γ is taken off what the run trained on."""
    net, config = models.load_run(run / "last.pt", CPU)
    path = own_data(tmp_path / "own", classes=config["classes"]) / "images/c.jpg"
    torch.manual_seed(1)
    colours = F.interpolate(torch.rand(1, 3, 9, 6), Image.open(path).size[::-1], mode="bicubic")[0].clamp(0, 1)
    Image.fromarray((255 * colours).byte().permute(1, 2, 0).numpy()).save(path)
    source = evaluate.open_run_dataset(config, tmp_path / "own")
    assert (source.recipe.short_side, source.unseen) == (64, {1})
    net.set_classes(config["classes"], config["templates"])
    evaluate.evaluate(net, source, CPU, "fp32", predictions=tmp_path / "maps")
    theirs = torch.from_numpy(np.array(Image.open(tmp_path / "maps/c.png")))
    assert torch.equal(predict.segment(str(path), run=run, device="cpu")[0], theirs)
    larger = predict.segment(path, run=run / "last.pt", device="cpu", short_side=150)[0]
    assert not torch.equal(larger, theirs)
    lowered = net.label(read_image(path), 64, 64, source.recipe.stride, torch.tensor([[5.0, 0, 5.0]]))[0]
    assert torch.equal(predict.segment(path, run=run, gamma=5.0, device="cpu")[0], lowered)
    assert not torch.equal(lowered, theirs)


def test_a_run_whose_clip_has_moved_takes_it_from_elsewhere_but_takes_no_other(run, image, tiny_clip_file, tmp_path):
    out, elsewhere, other = tmp_path / "run", tmp_path / "moved.pt", tmp_path / "other.pt"
    saved = torch.load(run / "last.pt", weights_only=True)
    saved["config"]["clip"] = str(tmp_path / "gone.pt")
    out.mkdir()
    torch.save(saved, out / "last.pt")
    elsewhere.write_bytes(tiny_clip_file.read_bytes())
    weights = torch.load(tiny_clip_file, weights_only=True)
    block = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    torch.save(weights | {block: -weights[block]}, other)
    with pytest.raises(clip.CLIPError, match="no CLIP file .*gone.pt"):
        predict.segment(image, run=out, device="cpu")
    moved = predict.segment(image, run=out, device="cpu", clip_file=elsewhere)[0]
    assert torch.equal(moved, predict.segment(image, run=run, device="cpu")[0])
    with pytest.raises(ModelError, match="other.pt is not the CLIP that .* was trained with"):
        predict.segment(image, run=out, device="cpu", clip_file=other)


def test_other_words_do_not_load_the_run_again_but_a_newer_checkpoint_does(run, image, monkeypatch):
    calls = []
    monkeypatch.setattr(predict, "load_run", lambda *args: calls.append(args) or models.load_run(*args))
    predict.loaded_run.cache_clear()
    predict.load.cache_clear()
    first, other, again = (predict.segment(image, words, run=run, device="cpu")
                           for words in ("dog", "sand, cat", "dog"))
    assert len(calls) == 1 and other[1] == ["sand", "cat"]
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    (run / "last.pt").touch()
    predict.segment(image, "dog", run=run, device="cpu")
    assert len(calls) == 2


def test_synonyms_others_gamma_and_threshold(run, image):
    def ask(*args, **more):
        return predict.segment(image, *args, run=run, device="cpu", **more)

    assert torch.equal(ask("tv monitor, sofa|couch , brick_wall,")[0], ask()[0])
    assert ask(["sofa | couch", "cat"])[1] == ["sofa", "cat"]
    net, config = models.load_run(run / "last.pt", CPU)
    net.set_classes(["sofa,couch", "cat", predict.OTHER], config["templates"])
    three = net.label(image, 64, 64, 48)[0]
    assert torch.equal(ask("sofa|couch, cat", other=True)[0], three.masked_fill(three == 2, 255))
    net.set_classes(["sofa,couch", "cat"], config["templates"])
    middle = net.logits(image[None] / 255).amax(1).median().item() * net.tau  # a cosine that half of the pixels reach
    assert 0.2 < (ask("sofa|couch, cat", threshold=middle)[0] != 255).float().mean() < 0.8
    both = [ask("tv monitor, brick wall", gamma=gamma, threshold=-0.99)[0] for gamma in (0.0, 500.0)]
    assert torch.equal(*both) and (both[0] != 255).all()  # γ lowers both names' logits, not the cosine that is asked
    for wrong in ("", "cat, cat", [f"thing {i}" for i in range(254)]):
        with pytest.raises(sources.DataError, match="different ones: expected 1 to 253"):
            ask(wrong)


def test_the_command_writes_three_files_and_skips_what_is_no_picture(run, photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    photo.save(folder / "a.jpg")
    photo.save(tmp_path / "a.png")
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:400])
    (folder / "notes.txt").write_text("not looked at")
    done = subprocess.run([sys.executable, ROOT / "predict.py", folder, tmp_path / "a.png", "--run", run, "--device",
                           "cpu", "--classes", "cat, café|coffee house"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("skipped: cannot read the image ") and "broken.jpg" in done.stderr
    assert done.stderr.endswith("error: 1 of 3 images skipped\n")
    out = run / "predictions"
    assert {p.name for p in out.iterdir()} == {f"{stem}.{kind}" for stem in ("a", "a-2")
                                               for kind in ("overlay.png", "mask.png", "json")}
    assert f"wrote {out}/a-2.overlay.png" in done.stdout
    mask, found = Image.open(out / "a.mask.png"), json.loads((out / "a.json").read_text())
    assert mask.mode == "P" and mask.size == (100, 60)
    assert found["picture"] == str(folder / "a.jpg") and (found["width"], found["height"]) == (100, 60)
    assert list(found["classes"]) == ["cat", "café"] and found["none"] == 0
    for k, name in enumerate(found["classes"]):
        assert found["classes"][name] == pytest.approx((np.asarray(mask) == k).mean())
