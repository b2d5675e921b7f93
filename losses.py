"""The losses of Chimera-Seg, one function per equation. They do not depend on the model.

Symbols: B images, N = h·w dense positions, D joint width, K classes, z dense features (B, D, h, w) of unit length,
t text embeddings (K, D) of unit length, τ temperatures. Of the teacher, the full frozen CLIP: c the CLS embeddings
(B, D), d the dense features of its g×g patches (B, g·g, D), both of unit length.
Labels are integers 0..K-1. IGNORE marks void pixels, padding and pixels of unseen classes, so no label of an unseen
class reaches a loss. (L_sgd reads no labels: it selects among all positions of the image.)

Half-precision input is converted to fp32: call the losses outside autocast, which would undo that.
With several processes every loss is scaled so that DDP's mean of the gradients is the gradient of the loss over the
whole batch: the result does not depend on their number. No loss copies values to the CPU, so none waits for a GPU.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from support.processes import rank, world_size

IGNORE = 255
TAU_G = 0.07  # τ_g, of whole images and prototypes. LINE: the group's earlier InfoNCE; OURS: SAM's too
BANK = 256  # M, earlier CLS embeddings kept as negatives. LINE: a bank; OURS: its size
HELD = {"cuda": 2**26}  # upsampled logits held at a time; elsewhere 2^21


def fp32(x):
    """Half precisions to float32; float64 stays, for the tests."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def global_mean(total, count):
    """Sum over this process / mean count over processes; DDP's average of it over processes is the mean over all."""
    count = count.to(total.dtype)
    if world_size() > 1:
        dist.all_reduce(count)
    return total * world_size() / count.clamp(min=1)


def gather(x):
    """(B, D) of every process -> (processes · B, D) in the order of ranks, without gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


# ---------------------------------------------------------------- pixel-text classification: L_seg


def pixel_text_logits(z, t, tau):
    """logits_iy = z_i · t_y / τ:  (B, D, h, w), (K, D) -> (B, K, h, w)."""
    return torch.einsum("bdhw,kd->bkhw", z, t) / tau


def seg_loss(z, t, labels, tau):
    """L_seg: softmax cross-entropy of the upsampled logits, mean over labelled pixels. labels (B, H, W). FIELD

    Upsampled logits of many classes are large: if a batch has too many, a few images are taken at a time and computed
    again in the backward pass (checkpoint), so that (B, K, H, W) is never held."""
    logits = pixel_text_logits(fp32(z), fp32(t), tau)  # (B, K, h, w)
    of_one = logits.shape[1] * labels[0].numel()  # upsampled logits of one image
    at_once = max(HELD.get(z.device.type, 2**21) // of_one, 1)  # images
    if at_once >= len(labels):
        total = upsampled_cross_entropy(logits, labels)
    else:
        total = sum(checkpoint(upsampled_cross_entropy, *group, use_reentrant=False, preserve_rng_state=False)
                    for group in zip(logits.split(at_once), labels.split(at_once)))
    return global_mean(total, (labels != IGNORE).sum())


def upsampled_cross_entropy(logits, labels):
    """Sum over the labelled pixels. logits (B, K, h, w), labels (B, H, W) -> scalar"""
    logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)  # (B, K, H, W)
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum")


# ---------------------------------------------------------------- Selective Global Distillation: L_sgd


def teacher_similarity(c, d):
    """d · c, how similar each of the teacher's patches is to the CLS embedding. OURS, see docs/choices.md

    c (B, D), d (B, g·g, D) -> (B, g, g)"""
    a = torch.einsum("bnd,bd->bn", fp32(d), fp32(c))
    return a.unflatten(1, (round(a.shape[1] ** 0.5), -1))


def at_positions(a, inside):
    """The teacher's grid -> the student's: bilinear, to those positions that lie inside the image.

    a (B, g, g); inside: bool (B, h, w), True in the first rows and columns of each image, False in the padding to the
    right and below, of which the teacher sees nothing -> (B, N); outside the image the values mean nothing."""
    h, w = inside.shape[1:]
    high, wide = inside.any(2).sum(1), inside.any(1).sum(1)  # (B,), the image's size in whole positions
    # centre of row 0, 1, …, as grid_sample counts: the image, which is all that the teacher sees, goes from -1 to 1
    y = (2 * torch.arange(h, device=a.device) + 1) / high[:, None] - 1  # (B, h)
    x = (2 * torch.arange(w, device=a.device) + 1) / wide[:, None] - 1  # (B, w)
    places = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=3)  # (B, h, w, 2)
    return F.grid_sample(a[:, None], places.to(a.dtype), padding_mode="border", align_corners=False).flatten(1)


def k_at(step, steps, inside, end_share):
    """k_b = ⌈share · N_b⌉, N_b the positions of image b; share falls with the step from 1 to `end_share`.

    inside: bool (B, h, w), the positions that lie in the image and not in the padding -> int (B,).
    FACT: k falls. OURS: linearly; a share of each image's own positions. end_share = 1 distils all of them."""
    share = 1 - (1 - end_share) * step / max(steps - 1, 1)
    return (share * inside.sum((1, 2)) - 1e-3).ceil().clamp(min=1).long()  # 1e-3: 0.1 · 10 is 1, despite rounding


def select(a, k, inside):
    """S: the k_b positions of largest a inside each image. a (B, N), k (B,), inside (B, h, w) -> 1 or 0, (B, N)."""
    inside = inside.flatten(1)
    order = a.masked_fill(~inside, -torch.inf).argsort(dim=1, descending=True)
    chosen = torch.arange(a.shape[1], device=a.device) < k[:, None]  # the first k_b of that order
    return torch.zeros_like(a).scatter(1, order, chosen.to(a.dtype)) * inside


def sgd_loss(z, c, a, k, inside, bank):
    """L_sgd: the mean of the dense features where a is largest is pulled towards the CLS embedding c. FACT: selection,
    falling k

    S = the k_b positions of largest a_i,  p = normalise(mean of z_i over S),  mean over images b of
    L_sgd = −log exp(p_b·c_b/τ_g) / Σ_j exp(p_b·c_j/τ_g),  j over the batch of all processes and the bank.  LINE
    c (B, D), a (B, N), k (B,), inside (B, h, w), bank (M, D) -> scalar"""
    z, c, a = fp32(z).flatten(2), fp32(c), fp32(a)  # z (B, D, N)
    p = F.normalize(torch.einsum("bdn,bn->bd", z, select(a, k, inside)), dim=1)  # (B, D); the sum's direction
    keys = torch.cat([gather(c), bank])  # (processes · B + M, D)
    target = torch.arange(len(p), device=p.device) + rank() * len(p)  # where its own c stands among the keys
    return F.cross_entropy(p @ keys.T / TAU_G, target)


def push(bank, c):
    """The bank of earlier CLS embeddings, newest first, at most BANK. bank (M, D), c (B, D) -> (M', D).

    What is not finite (fp16 overflowed) enters as 0."""
    return torch.cat([gather(fp32(c)).nan_to_num(0, 0, 0), bank])[:BANK]


# ---------------------------------------------------------------- Semantic Alignment Module: L_sam


def sam_loss(z, t, labels):
    """L_sam: class prototypes are aligned with text. FACT: dense features are aligned with text; LINE: by prototypes

    r_by = normalise(mean of z_i over the positions of class y in image b),  cross-entropy of r_by · t / τ_g with y,
    mean over the classes present in each image.  OURS
    Labels (B, H, W) are read at the features' grid by nearest neighbour -> scalar"""
    z, t = fp32(z), fp32(t)
    classes = torch.arange(len(t), device=z.device)
    labels = F.interpolate(labels[:, None].to(z.dtype), z.shape[2:], mode="nearest-exact").flatten(1)  # (B, N)
    own = labels[:, :, None] == classes  # (B, N, K), is position i of class k?
    r = F.normalize(torch.einsum("bdn,bnk->bkd", z.flatten(2), own.to(z.dtype)), dim=2)  # (B, K, D), 0 where absent
    present = own.any(1)  # (B, K)
    logits = r @ t.T / TAU_G  # (B, K, K)
    loss = F.cross_entropy(logits.flatten(0, 1), classes.repeat(len(z)), reduction="none").view_as(present)  # (B, K)
    return global_mean((loss * present).sum(), present.sum())
