"""predict.py and pictures.py: pictures of every kind, names, what is written; the curves of a run."""
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_inside
from PIL import Image

import bodies
from support import checkpoint
import clip
import data
import evaluate
import inference
import model as models
from support import pictures
import predict
import sources
from toy import world

ROOT = Path(__file__).parent.parent
NAMES = ("red ring", "green cross", "dark sand")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_clip_file):
    """A run folder as train.py leaves it, of an untrained model."""
    out = tmp_path_factory.mktemp("predict") / "run"
    out.mkdir()
    config = {"clip": str(tiny_clip_file), "body": "small", "head": "csh", "dataset": "nowhere", "data_root": None,
              "stride": None, "frozen_blocks": 1, "attention": "qk", "temperature": None,
              "classes": ["red ring", "green cross, green plus", "dark sand"], "unseen": [1],
              "templates": list(world.TEMPLATES), "crop": 64, "test": {"sides": [48, 96], "window": 64, "stride": 48}}
    torch.manual_seed(0)
    clip_model = clip.load(tiny_clip_file)
    config["clip_hash"] = clip.fingerprint(clip_model)
    net = models.build(clip_model, **config)
    checkpoint.save(out, net, torch.optim.AdamW(net.parameters()), 1, torch.empty(0, 128), 0.0, config)
    return out


@pytest.fixture(scope="module")
def photo():
    """A gradient that tells left from right and top from bottom, 60 high and 100 wide."""
    y, x = np.mgrid[:60, :100]
    return Image.fromarray(np.stack([x * 2, y * 4, 200 - x - y], -1).astype(np.uint8))


def same(path, photo, tolerance):
    got = data.read_image(path, upright=True).numpy().transpose(1, 2, 0).astype(int)
    assert got.shape == np.asarray(photo).shape
    assert abs(got - np.asarray(photo)).mean() < tolerance


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_camera_held_in_any_way(turn, photo, tmp_path):
    """EXIF orientation by its own definition: where the stored picture's rows and columns lie in the seen one."""
    stored = np.asarray(photo)
    undo = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
            6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1)}
    exif = Image.Exif()
    exif[0x112] = turn
    Image.fromarray(np.ascontiguousarray(undo[turn](stored))).save(tmp_path / "a.png", exif=exif)
    same(tmp_path / "a.png", photo, 1e-9)
    if turn > 4:  # masks do not follow the note, so neither does what training reads
        assert data.read_image(tmp_path / "a.png").shape == (3, 100, 60)


def test_every_kind_of_file_is_read_as_what_it_shows(photo, tmp_path):
    grey = photo.convert("L").convert("RGB")
    photo.convert("L").save(tmp_path / "grey.png")
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    for name in ("deep.png", "deep.tif"):
        deep.save(tmp_path / name)
    for name in ("grey.png", "deep.png", "deep.tif"):
        same(tmp_path / name, grey, 0.51)
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    photo.quantize(256).save(tmp_path / "palette.gif")
    for name in ("cmyk.jpg", "palette.gif"):
        same(tmp_path / name, photo, 6)
    clear = photo.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(100) < 50, 255, 0).astype(np.uint8)[None].repeat(60, 0)))
    clear.save(tmp_path / "clear.png")
    white = np.asarray(photo).copy()
    white[:, 50:] = 255
    same(tmp_path / "clear.png", white, 1e-9)


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (100, 60), (5, 300), (700, 500)])
def test_pictures_of_any_size_get_labels_of_that_size(size, run, photo):
    image = torch.from_numpy(np.array(photo.resize(size))).permute(2, 0, 1)
    labels, names = predict.segment(image, run=run, device="cpu")
    assert labels.shape == size[::-1] and labels.dtype == torch.uint8 and names == list(NAMES)
    assert set(labels.unique().tolist()) <= {0, 1, 2}
    drawn = pictures.overlay(image, labels, names)
    assert max(drawn.width, drawn.height) <= 1700 and drawn.width >= 100


def test_it_is_the_prediction_of_evaluate(run, photo):
    """At a size that training knows, predict.py gives what evaluate.py's argmax gives."""
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    net, config, _ = inference.load_run(run / "last.pt", torch.device("cpu"))
    net.set_classes(config["classes"], config["templates"])
    for gamma in (0.0, 0.5):
        want = inference.predict(net, image, torch.tensor([True, False, True]), (gamma,), None, 64, 48)[gamma]
        assert torch.equal(predict.segment(image, run=run, gamma=gamma, device="cpu")[0], want.byte())


def test_a_run_whose_clip_has_moved_takes_it_from_elsewhere_but_takes_no_other(run, tiny_clip_file, tmp_path):
    out, elsewhere, other = tmp_path / "run", tmp_path / "moved.pt", tmp_path / "other.pt"
    saved = torch.load(run / "last.pt", weights_only=True)
    saved["config"]["clip"] = str(tmp_path / "gone.pt")
    out.mkdir()
    torch.save(saved, out / "last.pt")
    elsewhere.write_bytes(tiny_clip_file.read_bytes())
    state = torch.load(tiny_clip_file, weights_only=True)
    block = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    torch.save(state | {block: -state[block]}, other)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    with pytest.raises(clip.CLIPError, match="no CLIP file .*gone.pt"):
        predict.segment(image, run=out, device="cpu")
    moved = predict.segment(image, run=out, device="cpu", clip_file=elsewhere)[0]
    assert torch.equal(moved, predict.segment(image, run=run, device="cpu")[0])
    with pytest.raises(bodies.ModelError, match="other.pt is not the CLIP that .* was trained with"):
        predict.segment(image, run=out, device="cpu", clip_file=other)


def test_other_words_do_not_load_the_run_again(run, photo, monkeypatch):
    calls, load_run = [], inference.load_run
    monkeypatch.setattr(inference, "load_run", lambda *args: calls.append(args) or load_run(*args))
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    predict.load_run.cache_clear()
    predict.load.cache_clear()
    first, other, again = (predict.segment(image, words, run=run, device="cpu")
                           for words in ("ring", "sand, cross", "ring"))
    assert len(calls) == 1 and other[1] == ["sand", "cross"]
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])


def test_large_pictures_are_tested_at_the_size_that_evaluate_tests_them_at(run):
    torch.manual_seed(1)
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 6), (225, 150), mode="bicubic")[0].clamp(0, 1)
    image = (255 * image).byte()
    net, config, _ = inference.load_run(run / "last.pt", torch.device("cpu"))
    net.set_classes(config["classes"], config["templates"])
    recipe = sources.Recipe(1, crop=64, scale=(0.75, 1.5), short_side=None, window=64, stride=48)
    source = sources.DataSource("own", config["classes"], {1}, {}, [], [], (), recipe)
    ours = predict.segment(image, run=run, device="cpu")[0]
    assert torch.equal(ours, evaluate.label(net, image, source, torch.device("cpu"))[0.0].byte())
    native = inference.predict(net, image, torch.tensor([True, False, True]), (0.0,), None, 64, 48)[0.0].byte()
    assert not torch.equal(ours, native)


def test_gamma_does_not_touch_the_threshold(run, photo):
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    both = [predict.segment(image, "red ring, dark sand", run=run, device="cpu", gamma=gamma, threshold=-0.99)[0]
            for gamma in (0.0, 500.0)]  # the run trained on both names
    assert torch.equal(*both) and (both[0] != 255).all()


def test_a_checkpoint_does_not_say_where_a_world_is_drawn(run, tmp_path):
    saved = torch.load(run / "last.pt", weights_only=True)
    saved["config"] |= {"dataset": "toy", "data_root": str(tmp_path / "anywhere")}
    torch.save(saved, tmp_path / "last.pt")
    for module, flag in ((predict, "--run"), (evaluate, "--checkpoint")):
        status, _, words = run_inside(module, flag, tmp_path / "last.pt", "--device", "cpu")
        assert status == 1 and "no longer in" in words and not (tmp_path / "anywhere").exists()


def test_synonyms_others_and_threshold(run, photo):
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)

    def ask(*args, **more):
        return predict.segment(image, *args, run=run, device="cpu", **more)

    assert torch.equal(ask("red ring, green cross|green plus , dark sand,")[0], ask()[0])
    assert ask(["sofa | couch", "cat"])[1] == ["sofa", "cat"]
    net, config, _ = inference.load_run(run / "last.pt", torch.device("cpu"))
    net.set_classes(["sofa,couch", "cat", predict.OTHER], config["templates"])
    three = inference.predict(net, image, torch.zeros(3, dtype=torch.bool), (0.0,), None, 64, 48)[0.0]
    assert torch.equal(ask("sofa|couch, cat", other=True)[0], three.where(three < 2, torch.tensor(255)).byte())
    first = net.logits(image[None, :, :, :64].float() / 255)  # window; the second begins at column 36
    cosine = torch.nn.functional.interpolate(first, (60, 64), mode="bilinear")[0, :2].max(0).values * net.tau
    middle = cosine.median().item()
    kept = ask("sofa|couch, cat", threshold=middle)[0][:, :36] != 255
    assert 0 < kept.float().mean() < 1 and torch.equal(kept, cosine[:, :36] >= middle)
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
    assert done.returncode == 1
    assert done.stderr.startswith("skipped: cannot read the image ") and "broken.jpg" in done.stderr
    assert done.stderr.endswith("error: 1 of 3 pictures skipped\n") and "Traceback" not in done.stderr
    out = run / "predictions"
    assert {p.name for p in out.iterdir()} == {f"{stem}.{kind}" for stem in ("a", "a-2")
                                               for kind in ("overlay.png", "mask.png", "json")}
    assert f"wrote {out}/a-2.overlay.png" in done.stdout
    mask = Image.open(out / "a.mask.png")
    assert mask.mode == "P" and mask.size == (100, 60)
    found = json.loads((out / "a.json").read_text())
    assert found["picture"] == str(folder / "a.jpg") and (found["width"], found["height"]) == (100, 60)
    assert list(found["classes"]) == ["cat", "café"] and found["none"] == 0
    for k, name in enumerate(found["classes"]):
        assert found["classes"][name] == pytest.approx((np.asarray(mask) == k).mean())


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("thin", [False, True])
def test_an_overlay_names_its_regions_without_overlap(thin):
    labels = torch.full((200, 300), 255, dtype=torch.uint8)
    if thin:  # two stripes lower than a name: side by side in the middle the names would overlap
        labels[86:101], labels[101:116] = 0, 1
    else:
        labels[:, :150], labels[:90, 170:], labels[110:, 170:] = 0, 1, 1  # one region of 0, two of 1
        labels[0, 160] = 2  # too small for a name
    found = pictures.places(labels, {0: (60, 20), 1: (80, 20), 2: (60, 20)})
    assert sorted(k for k, _ in found) == ([0, 1] if thin else [0, 1, 1])
    boxes = []
    for k, (x, y) in found:
        assert labels[round(y), round(x)] == k
        width = 60 if k == 0 else 80
        boxes.append((x - width / 2, x + width / 2, y - 10, y + 10))
    for i, (a, b, c, d) in enumerate(boxes):
        assert 0 <= a and b <= 300 and 0 <= c and d <= 200
        assert all(b <= e or f <= a or d <= g or h <= c for e, f, g, h in boxes[:i])
    if thin:
        return
    middle = next(place for k, place in found if k == 0)
    assert abs(middle[0] - 75) < 25 and abs(middle[1] - 100) < 40  # well inside, not on an edge


def test_an_overlay_keeps_the_picture_where_no_class_is(photo):
    image = torch.from_numpy(np.array(photo.resize((640, 384)))).permute(2, 0, 1)
    labels = torch.full((384, 640), 255, dtype=torch.uint8)
    labels[:, 400:] = 3
    drawn = np.asarray(pictures.overlay(image, labels, ["a", "b", "c", "dog"]))[:384].astype(int)
    picture = image.permute(1, 2, 0).numpy().astype(int)
    assert np.array_equal(drawn[:, :398], picture[:, :398])
    corner = picture[370:, 620:] * (1 - pictures.PAINT) + np.array(pictures.COLOURS[3]) * pictures.PAINT
    assert abs(drawn[370:, 620:] - corner).max() <= 1


def test_colours_differ():
    colours = np.array(pictures.COLOURS[:20], float)
    gaps = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 999 * np.eye(20)
    assert gaps.min() > 64 and len(set(pictures.COLOURS)) == 256


LOGS = {"nothing": [], "one step": [{"step": 0, "loss": 2.0, "loss_seg": 2.0, "loss_sgd": 0.0, "lr": 1e-4, "k": 9}],
        "constant": [{"step": s, "loss": 1.0, "loss_seg": 1.0, "lr": 1e-3, "k": 1} for s in (0, 20)],
        "not finite": [{"step": 0, "loss": 1.0, "lr": 0.1}, {"step": 20, "loss": float("nan"), "lr": float("inf")}],
        "scored": [{"step": 0, "loss": 90.0, "lr": 0.1, "k": 4}, {"step": 80000, "loss": 1e-4, "lr": 0.0, "k": 4},
                   {"step": 80000, "mIoU_seen": 50.0, "mIoU_unseen": None, "hIoU": None, "seconds": 4}]}


@pytest.mark.parametrize("case", LOGS)
def test_curves_of_any_log(case, tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOGS[case]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = pictures.curves(tmp_path / "log.jsonl")
    panels = {"nothing": 0, "one step": 3, "constant": 3, "not finite": 2, "scored": 4}[case]
    assert drawn.size == (1120, max(300 * -(-panels // 2), 1))
    evaluate.curves(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.name != "log.jsonl"] == ["curves.png"]


def test_a_curve_goes_where_its_values_are(tmp_path):
    """k falls from 256 to 26 in a straight line: the red line of its panel, read back from the pixels."""
    log = [{"step": s, "k": 256 - 230 * s // 100} for s in range(101)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    drawn = np.asarray(pictures.curves(tmp_path / "log.jsonl")).astype(int)[44:262, :560]
    rows, columns = np.nonzero(abs(drawn - np.array(pictures.LINES[0])).sum(-1) < 30)
    slope, start = np.polyfit(columns, rows, 1)
    assert slope == pytest.approx(224 * 230 / 300 / 476, rel=0.02)  # axis from 0 to 300 over 224 × 476 pixels
    assert abs(rows - (slope * columns + start)).max() < 3
