"""The losses of Chimera-Seg, one function an equation. None of them knows a model. Half-precision input is taken to
fp32; call them outside autocast, which would undo that.

Symbols: B images, N = h·w dense positions, D joint width, K classes, z dense features (B, D, h, w) of unit length,
t text embeddings (K, D) of unit length, c the teacher's CLS embeddings (B, D) of unit length, τ temperatures.
Labels are integers 0..K-1; IGNORE marks void pixels and pixels of unseen classes: no loss comes from them.

With torch.distributed running, every loss is scaled so that DDP's mean of gradients over ranks is the gradient of
the loss over the whole batch: the result does not depend on the number of processes. No loss looks at a number of its
tensors, so that a GPU is never waited for.
"""
import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

IGNORE = 255
TAU = 0.07  # τ_g, and τ unless given. LINE: the group's earlier InfoNCE; train.py gives text logits CLIP's own τ
BANK = 256  # OURS: earlier CLS embeddings kept as negatives
BAND = {"cpu": 2 ** 20, "cuda": 2 ** 26}  # logits that cross-entropy holds at a time: a cache's fill, a few launches
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # FIELD: the peers' focal loss


def fp32(x):
    """Half precisions to float32; float64 stays, for the tests."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_mean(total, count):
    """Σ over this rank / mean count over ranks: averaged over ranks, that is Σ over all / count over all."""
    count = count.to(total.dtype)
    if world_size() > 1:
        dist.all_reduce(count)
    return total * world_size() / count.clamp(min=1)


def gather(x):
    """(B, D) of every rank -> (ranks · B, D) in rank order, without gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


# ---------------------------------------------------------------- pixel-text classification (METHOD: L_seg)


def pixel_text_logits(z, t, tau=TAU):
    """logits_ik = z_i · t_k / τ:  (B, D, h, w), (K, D) -> (B, K, h, w)."""
    return torch.einsum("bdhw,kd->bkhw", z, t) / tau


def cross_entropy_loss(z, t, labels, tau=TAU):
    """Softmax cross-entropy at the labels' own resolution. labels int (B, H, W) -> scalar."""
    total = UpsampledCrossEntropy.apply(pixel_text_logits(fp32(z), fp32(t), tau), labels)
    return global_mean(total, (labels != IGNORE).sum())


@functools.lru_cache(maxsize=8)
def linear_weights(n, size, dtype=torch.double, device="cpu"):
    """The matrix (size, n) of F.interpolate's linear mode from n values to `size`, align_corners=False."""
    return F.interpolate(torch.eye(n, dtype=torch.double)[None], size, mode="linear")[0].T.to(device, dtype)


class UpsampledCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(F.interpolate(logits, (H, W), mode="bilinear"), labels, reduction="sum"), in bands of rows.

    (B, K, H, W) never exists: each band's gradient is taken while the band is there. Sizes and results are the same."""

    @staticmethod
    def forward(ctx, logits, labels):
        """logits (B, K, h, w), labels int (B, H, W) -> scalar"""
        B, K, h, w = logits.shape
        H, W = labels.shape[1:]
        rows, columns = (linear_weights(*sides, logits.dtype, logits.device) for sides in ((h, H), (w, W)))  # (H, h), …
        tall = torch.einsum("yh,bkhw->bywk", rows, logits)
        gradient, total = torch.empty_like(tall), logits.new_zeros(())
        height = max(BAND[logits.device.type] // (B * W * K), 1)
        for y in range(0, H, height):
            band = slice(y, y + height)
            truth = labels[:, band, :, None].long()  # (B, y, W, 1)
            valid = (truth != IGNORE).to(logits.dtype)
            truth = truth.where(valid > 0, 0)
            log_p = (columns @ tall[:, band]).log_softmax(-1)  # (B, y, W, K)
            total -= (log_p.gather(-1, truth) * valid).sum()
            error = log_p.exp_().scatter_add_(-1, truth, -torch.ones_like(valid)).mul_(valid)  # p − truth
            gradient[:, band] = columns.T @ error
        ctx.save_for_backward(torch.einsum("yh,bywk->bkhw", rows, gradient))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        return ctx.saved_tensors[0] * scale, None


def nel_loss(z, t, labels, tau=TAU):
    """Non-mutually-exclusive loss of the field: sigmoid focal + dice, each class against the rest.

    Ignored pixels are left out of both; in the peers' code they are negatives of every class."""
    logits = pixel_text_logits(fp32(z), fp32(t), tau)
    logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)  # (B, K, H, W)
    valid = (labels != IGNORE)[:, None]  # (B, 1, H, W)
    truth = F.one_hot(labels.long().where(valid[:, 0], 0), len(t)).permute(0, 3, 1, 2) * valid  # (B, K, H, W)
    truth, p = truth.to(logits.dtype), logits.sigmoid()
    error = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    weight = (FOCAL_ALPHA * truth + (1 - FOCAL_ALPHA) * (1 - truth)) * (p - truth).abs() ** FOCAL_GAMMA
    focal = global_mean((weight * error * valid).sum(), valid.sum())
    p = p * valid
    dice = 1 - (2 * (p * truth).sum((2, 3)) + 1) / ((p * p).sum((2, 3)) + truth.sum((2, 3)) + 1)  # (B, K)
    present = truth.sum((2, 3)) > 0  # OURS: classes absent from an image are left to the focal term
    return focal + global_mean((dice * present).sum(), present.sum())


# ---------------------------------------------------------------- Selective Global Distillation (METHOD: L_sgd)


def k_at(step, steps, positions, end_share=0.1, schedule="linear"):
    """k(t): how many of N positions are distilled at `step` of `steps`. Falls from N to end_share · N.

    FACT: it falls. OURS: linear; `cosine`, and `constant` (end_share · N from the first step on)."""
    progress = min(step / max(steps - 1, 1), 1)
    if schedule == "linear":
        share = 1 - (1 - end_share) * progress
    elif schedule == "cosine":
        share = end_share + (1 - end_share) * (1 + math.cos(math.pi * progress)) / 2
    elif schedule == "constant":
        share = end_share
    else:
        raise ValueError(f"k schedule {schedule!r} is unknown: choose linear, cosine or constant")
    return max(round(share * positions), 1)


def select(a, k, inside=None):
    """S_t, the k positions of largest a (B, N), or all that are `inside` (bool (B, N)) if fewer: -> (B, N), 1 or 0."""
    if inside is None:
        inside = torch.ones_like(a, dtype=torch.bool)
    chosen = a.masked_fill(~inside, -torch.inf).topk(k, dim=1).indices
    return torch.zeros_like(a).scatter(1, chosen, 1) * inside


def global_prototype(z, c, k, inside=None):
    """p = normalise(Σ z_i over S_t), S_t the k positions with the largest a_i = z_i · c. -> (B, D)"""
    z = z.flatten(2)  # (B, D, N)
    a = torch.einsum("bdn,bd->bn", z.detach(), c)
    return F.normalize(torch.einsum("bdn,bn->bd", z, select(a, k, inside)), dim=1)


def sgd_loss(z, c, k, bank=None, tau=TAU, inside=None):
    """L_sgd = −log exp(p_b·c_b/τ_g) / Σ_j exp(p_b·c_j/τ_g); j over the batch of all ranks and `bank` (M, D).

    inside: bool (B, N), the positions that show the picture. OURS: with the grey around small pictures left in, it is
    about half of what is selected there at the end (results/padding.md)."""
    z, c = fp32(z), fp32(c)
    p = global_prototype(z, c, k, inside)
    keys = gather(c) if bank is None else torch.cat([gather(c), bank])  # (ranks·B + M, D)
    rank = dist.get_rank() if world_size() > 1 else 0
    target = torch.arange(len(p), device=p.device) + rank * len(p)
    return F.cross_entropy(p @ keys.T / tau, target)


def push(bank, c, size):
    """The bank of earlier CLS embeddings, newest first, at most `size` rows. bank (M, D), c (B, D) -> (M', D)."""
    return torch.cat([gather(fp32(c)), bank])[:size]


# ---------------------------------------------------------------- Semantic Alignment Module (METHOD: L_sam)


def sam_loss(z, t, labels, tau=TAU, kind="ce"):
    """r_bk = normalise(mean of z_i over seen class k's pixels in image b); aligns r_bk · t / τ with k.

    Labels (B, H, W) are read at the features' grid by nearest neighbour. FACT: dense features are aligned with text
    embeddings; LINE: prototypes, `bce` (each class against the rest); OURS: `ce` (softmax over seen classes)."""
    z, t = fp32(z), fp32(t)
    B, D, h, w = z.shape
    K = len(t)
    grid = F.interpolate(labels[:, None].to(z.dtype), (h, w), mode="nearest-exact").long().flatten(1)  # (B, N)
    row = torch.arange(B, device=z.device)[:, None] * K + grid  # image b, class k -> b·K + k
    row = row.where(grid != IGNORE, B * K).flatten()  # a last row takes what is ignored
    features = z.permute(0, 2, 3, 1).reshape(-1, D)  # (B·N, D)
    sums = z.new_zeros(B * K + 1, D).index_add(0, row, features)[:-1]
    present = z.new_zeros(B * K + 1).index_fill(0, row, 1)[:-1]
    logits = F.normalize(sums, dim=1) @ t.T / tau  # (B·K, K); rows of absent classes are 0 and weigh nothing
    k = torch.arange(K, device=z.device).repeat(B)
    if kind == "ce":
        loss = F.cross_entropy(logits, k, reduction="none")
    elif kind == "bce":
        loss = F.binary_cross_entropy_with_logits(logits, F.one_hot(k, K).to(logits), reduction="none").mean(1)
    else:
        raise ValueError(f"SAM kind {kind!r} is unknown: choose ce or bce")
    return global_mean((loss * present).sum(), present.sum())
