"""CLIP alone, without any training: the cosine of its own patches with text (arXiv 2112.01071, MaskCLIP).

    python -m experiments.dense_clip                     # the toy data set and its CLIP, by the values path
    python -m experiments.dense_clip --attention clip    # with the attention of CLIP's last block
    python -m experiments.dense_clip --dataset voc       # ViT-B/16. Sizes, windows and scores are evaluate.py's
"""
import argparse
from pathlib import Path

import torch.nn as nn
import torch.nn.functional as F

import clip
import evaluate
import sources
from losses import pixel_text_logits
from model import text_embeddings
from support import processes
from support.command import run_command


class DenseCLIP(nn.Module):
    """The whole image tower as a segmenter. attention: of its last block, "clip" or "values" (a patch's own value)."""

    def __init__(self, clip_model, attention="values"):
        super().__init__()
        self.visual, self.tau, self.attention = clip_model.visual, 1 / clip_model.logit_scale.exp().item(), attention

    def logits(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, K, H / patch, W / patch): cosine / τ with `self.t` (K, D)"""
        h, w = (side // self.visual.patch_size for side in images.shape[2:])
        z = self.visual.cls_and_patches(images)[1] if self.attention == "values" else self.visual(images)[:, 1:]
        z = F.normalize(z.float(), dim=-1).transpose(1, 2).unflatten(2, (h, w))  # (B, D, h, w)
        return pixel_text_logits(z, self.t, self.tau)


def main(args):
    device, source = processes.start(args.device), sources.open_dataset(args.dataset, args.data_root)
    clip_model = clip.load(source.recipe.clip).to(device)
    net = DenseCLIP(clip_model, args.attention)
    net.t = text_embeddings(clip_model, source.classes, source.templates)
    result = evaluate.evaluate(net, source, device, "fp32") | {"precision": "fp32"}
    evaluate.report(result, net, source, device, "fp32", args.out_dir)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="toy", help=f"{', '.join(sources.NAMES)} or a folder (default: toy)")
    parser.add_argument("--data-root", help="its folder (default: data/NAME)")
    parser.add_argument("--attention", choices=("clip", "values"), default="values", help="(default: values)")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="(default: cuda if there is one, else cpu)")
    parser.add_argument("--out-dir", type=Path, default="runs/dense_clip", help="(default: runs/dense_clip)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse)
