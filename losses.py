"""The losses of Chimera-Seg, one function per equation. They do not depend on the model.

Symbols: B images, N = h·w dense positions, D joint width, K classes, z dense features (B, D, h, w) of unit length,
t text embeddings (K, D) of unit length, c the teacher's CLS embeddings (B, D) of unit length, τ temperatures.
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
TAU_G = 0.07  # τ_g. LINE: the group's earlier InfoNCE
BANK = 256  # M, earlier CLS embeddings kept as negatives. LINE: a bank; OURS: its size
BAND = {"cpu": 2**21, "cuda": 2**26}  # upsampled logits held at a time: on GPUs fewer and larger kernels


def fp32(x):
    """Half precisions to float32; float64 stays, for the tests."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def global_mean(total, count):
    """Sum over this process / mean count over processes; the mean of it over processes is the mean over all."""
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
    """logits_ik = z_i · t_k / τ:  (B, D, h, w), (K, D) -> (B, K, h, w)."""
    return torch.einsum("bdhw,kd->bkhw", z, t) / tau


def cross_entropy_loss(z, t, labels, tau):
    """L_seg: softmax cross-entropy of the upsampled logits, mean over labelled pixels. labels (B, H, W). FIELD

    Taken in bands of rows, recomputed in the backward pass: (B, K, H, W) logits are never held in full."""
    logits = pixel_text_logits(fp32(z), fp32(t), tau)
    total = sum(checkpoint(_cross_entropy_of_rows, logits, labels, rows, use_reentrant=False, preserve_rng_state=False)
                for rows in bands(logits, labels.shape[1:]))
    return global_mean(total, (labels != IGNORE).sum())


def _cross_entropy_of_rows(logits, labels, rows):
    logits = upsampled_rows(logits, labels.shape[1:], rows).flatten(0, 2)  # (B · rows · W, K)
    return F.cross_entropy(logits, labels[:, rows].flatten().long(), ignore_index=IGNORE, reduction="sum")


def bands(logits, size):
    """Logits (B, K, h, w) and (H, W) -> slices of the H rows, each of at most BAND upsampled logits."""
    (H, W), (B, K) = size, logits.shape[:2]
    height = max(BAND.get(logits.device.type, BAND["cpu"]) // (B * K * W), 1)
    return [slice(y, min(y + height, H)) for y in range(0, H, height)]


def upsampled_rows(logits, size, rows):
    """F.interpolate(logits, size, mode="bilinear")[:, :, rows], made without the other rows and with classes last.

    logits (B, K, h, w), size (H, W), rows a slice of the H rows -> (B, number of rows, W, K)"""
    h, (H, W) = logits.shape[2], size
    if h == H:
        logits = logits[:, :, rows]
    else:
        place = [min(max((y + 0.5) * h / H - 0.5, 0), h - 1) for y in (rows.start, rows.stop - 1)]  # in rows of logits
        first, last = int(place[0]), min(int(place[1]) + 2, h)  # those that reach these rows
        y, x = (torch.arange(*r, device=logits.device) for r in ((rows.start, rows.stop), (first, last)))
        at = ((y + 0.5) * (h / H) - 0.5).clamp(0, h - 1)
        weights = (1 - (at[:, None] - x).abs()).clamp(min=0)  # (number of rows, last − first)
        logits = torch.einsum("yh,bkhw->bkyw", weights.to(logits.dtype), logits[:, :, first:last])
    logits = logits.contiguous(memory_format=torch.channels_last)  # the softmax over K is twice as fast so
    return F.interpolate(logits, (logits.shape[2], W), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


# ---------------------------------------------------------------- Selective Global Distillation: L_sgd


def k_at(step, steps, inside, end_share):
    """k_b(t) = ⌈share(t) · N_b⌉, N_b the positions of image b; share falls from 1 to `end_share` = r_end.

    inside: bool (B, N), the positions that lie in the image and not in the padding -> int (B,).
    FACT: k falls. OURS: linearly; a share of each image's own positions. end_share = 1 distils all of them."""
    share = 1 - (1 - end_share) * step / max(steps - 1, 1)
    return (share * inside.sum(1) - 1e-3).ceil().clamp(min=1).long()  # 1e-3: 0.1 · 10 is 1, despite rounding


def select(a, k, inside):
    """S_t: the k_b positions of largest a inside each image. a (B, N), k (B,), inside (B, N) -> 1 or 0, (B, N)."""
    order = a.masked_fill(~inside, -torch.inf).argsort(dim=1, descending=True)
    chosen = torch.arange(a.shape[1], device=a.device) < k[:, None]  # the first k_b of that order
    return torch.zeros_like(a).scatter(1, order, chosen.to(a.dtype)) * inside


def sgd_loss(z, c, k, inside, bank):
    """L_sgd: the k_b dense features most similar to the CLS embedding c are pulled towards it. FACT

    a_i = z_i · c,  S = the k_b positions of largest a_i,  p = normalise(mean of z_i over S),
    L_sgd = −log exp(p_b·c_b/τ_g) / Σ_j exp(p_b·c_j/τ_g),  j over the batch of all processes and the bank.  LINE
    c (B, D), k (B,), inside (B, N), bank (M, D) -> scalar"""
    z, c = fp32(z).flatten(2), fp32(c)  # (B, D, N)
    a = torch.einsum("bdn,bd->bn", z.detach(), c)
    p = F.normalize(torch.einsum("bdn,bn->bd", z, select(a, k, inside)), dim=1)  # (B, D)
    keys = torch.cat([gather(c), bank])  # (processes · B + M, D)
    target = torch.arange(len(p), device=p.device) + rank() * len(p)
    return F.cross_entropy(p @ keys.T / TAU_G, target)


def push(bank, c):
    """The bank of earlier CLS embeddings, newest first, at most BANK. bank (M, D), c (B, D) -> (M', D)."""
    return torch.cat([gather(fp32(c)), bank])[:BANK]


# ---------------------------------------------------------------- Semantic Alignment Module: L_sam


def sam_loss(z, t, labels, tau):
    """L_sam: class prototypes are aligned with text. FACT: dense features are aligned with text; LINE: by prototypes

    r_bk = normalise(mean of z_i over the pixels of class k in image b),  cross-entropy of r_bk · t / τ against k.  OURS
    Labels (B, H, W) are read at the features' grid by nearest neighbour -> scalar"""
    z, t = fp32(z), fp32(t)
    B, D, h, w = z.shape
    K = len(t)
    grid = F.interpolate(labels[:, None].to(z.dtype), (h, w), mode="nearest-exact").long().flatten(1)  # (B, N)
    row = torch.arange(B, device=z.device)[:, None] * K + grid  # image b, class k -> b·K + k
    row = row.where(grid != IGNORE, B * K).flatten()  # a last row takes what is ignored
    features = z.permute(0, 2, 3, 1).reshape(-1, D)  # (B·N, D)
    r = F.normalize(z.new_zeros(B * K + 1, D).index_add(0, row, features)[:-1], dim=1)  # (B·K, D), 0 where absent
    present = z.new_zeros(B * K + 1).index_fill(0, row, 1)[:-1]
    k = torch.arange(K, device=z.device).repeat(B)
    return global_mean((F.cross_entropy(r @ t.T / tau, k, reduction="none") * present).sum(), present.sum())
