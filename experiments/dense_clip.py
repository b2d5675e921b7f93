"""CLIP alone, without any training: its own patch tokens against text, as segmentation (arXiv 2112.01071, MaskCLIP).

    python -m experiments.dense_clip                                         # the toy data set and its CLIP
    python -m experiments.dense_clip --values                                # MaskCLIP: no attention in the last block
    python -m experiments.dense_clip --dataset voc --clip ViT-B/16 --values

Says what CLIP's last block, which CSH borrows, knows of single positions. Sizes, windows and scores are evaluate.py's.
"""
import argparse

import torch.nn as nn
import torch.nn.functional as F

import clip
import evaluate
import sources
from clip_head import clip_tokens
from losses import pixel_text_logits
from model import ChimeraSeg, text_embeddings
from support import processes
from support.command import run_command


class DenseCLIP(nn.Module):
    """The whole image tower. values: in the last block each patch token gets its own value instead of attention."""

    label = ChimeraSeg.label

    def __init__(self, clip_model, values=False):
        super().__init__()
        self.visual, self.tau, self.values = clip_model.visual, 1 / clip_model.logit_scale.exp().item(), values
        self.mean = clip_model.visual.mean  # `label` looks there for the device

    def forward(self, images):
        """(B, 3, H, W) in [0, 1] -> patch features (B, N, D)"""
        visual, last, W = self.visual, self.visual.transformer.resblocks[-1], self.visual.width
        if not self.values:
            return visual(images)[:, 1:]
        x = clip_tokens(visual, images, 1)  # (B, N, W)
        values = F.linear(last.ln_1(x), last.attn.in_proj_weight[2 * W:], last.attn.in_proj_bias[2 * W:])
        x = x + last.attn.out_proj(values)
        return visual.ln_post(x + last.mlp(last.ln_2(x))) @ visual.proj

    def logits(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, K, H / patch, W / patch): cosine / τ"""
        h, w = (side // self.visual.patch_size for side in images.shape[2:])
        z = F.normalize(self(images).float(), dim=-1)
        return pixel_text_logits(z.transpose(1, 2).unflatten(2, (h, w)), self.t, self.tau)


def main(args):
    device = processes.start()
    source = sources.open_dataset(args.dataset, args.data_root)
    clip_model = clip.load(args.clip or source.recipe.clip).to(device)
    net = DenseCLIP(clip_model, args.values).eval()
    net.t = text_embeddings(clip_model, source.classes, source.templates)
    result = evaluate.evaluate(net, source, device, "fp32", unseen_only=True)
    print(evaluate.table(result, source))
    return result


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.dense_clip", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument
    group("--dataset", default="toy", metavar="NAME", help=f"{', '.join(sources.NAMES)} or a folder (default: toy)")
    group("--data-root", metavar="FOLDER", help="its folder (default: data/NAME)")
    group("--clip", metavar="NAME|FILE", help="(default: the data set's)")
    group("--values", action="store_true", help="no attention in the last block, each token's value in its place")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse)
