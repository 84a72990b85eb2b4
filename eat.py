"""EAT, the Efficient Audio Transformer, in one file: self-supervised pre-training on sound.

    python eat.py --data demo                 watch one learn, three to five minutes on a laptop
    python eat.py --data path/to/sound        your own folder; every flag: python eat.py --help

The method is that of *EAT: Self-Supervised Pre-Training with Efficient Audio Transformer* (Chen,
Liang, Ma, Zheng, Chen; IJCAI 2024; arXiv 2401.03497). The file runs in the paper's order: CNN
encoder, transformer, inverse block multi-mask, CNN decoder, teacher, utterance-frame objective;
then the recipe, the training loop, a probe. From `Machine` on it is engineering. Where the paper
and the released code differ, this file follows "the release" and says so.

Letters in the shape comments:
    B clips    C clones of each    views = B * C    T frames of 10 ms    D channels
    H x W = N patches (H along time, W along frequency)    K visible patches of each clone
"""

import collections
import contextlib
import copy
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from tqdm import tqdm

# These are for the recipe and what follows it. The model needs torch alone.
from data import (STATS, Clips, Parser, RunStopped, UsageError, count_cores, count_frames,
                  describe_skipped, loading, lock, loudness, make_folder, measure_stats, open_clips,
                  open_labelled, part_size, run, seed_of, shares, shuffled, spectrogram, whole_name)

# ---- Configuration -------------------------------------------------------------------------------

MEL_BINS = 128  # width of the spectrogram; a frame is a row of it
PATCH = 16  # a patch is 16 frames (0.16 s) x 16 mel bins; patches do not overlap
TARGET_EPS = 1e-5  # epsilon of the norms without parameters, in targets and decoder


def option(default, help, **more):
    """A field that is a flag too, mask_ratio --mask-ratio; `more`: its least, most, or choices."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


def check_numbers(settings):
    """Raise ValueError where a number is not finite or out of its limits; an int's begin at 1."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        least = field.metadata.get("least", 1 if field.type is int else 0)
        most = field.metadata.get("most", sys.float_info.max)
        if field.type in (int, float) and value is not None and not least <= value <= most:
            limit = f", at most {most}" if "most" in field.metadata else ""
            raise ValueError(f"{field.name} ({value}) must be finite, at least {least}{limit}")


@dataclasses.dataclass
class EATConfig:
    """What the model is. Defaults are the release's base on AudioSet-2M; other presets differ."""

    dim: int = option(768, "channels D of the encoder")
    depth: int = option(12, "transformer blocks")
    heads: int = option(12, "attention heads")
    mlp_ratio: float = option(4.0, "hidden width of the MLPs, in units of D", least=0.25, most=64)
    norm_eps: float = option(1e-6, "epsilon of the encoder's LayerNorms")
    decoder_layers: int = option(6, "convolutions in the CNN decoder", most=99)
    decoder_kernel: int = option(3, "their kernel size", most=99)
    decoder_groups: int = option(16, "their groups")
    masking: str = option("inverse_block", "which patches stay visible",
                          choices=("inverse_block", "block", "random"))
    clones: int = option(16, "differently masked copies C of each clip")
    mask_ratio: float = option(0.8, "share of the patches that is masked")
    mask_block: int = option(5, "side of a block, in patches")
    mask_adjust: float = option(0.07, "added to the share that blocks are drawn for: they overlap")
    mask_noise_std: float = option(0.01, "deviation of the decoder's input at masked places")
    utterance_weight: float = option(192.0, "lambda; see the loss for why it is not the paper's 1")
    frame_weight: float = option(1.0, "weight of the frame loss (the release has none)")
    target_blocks: int = option(None, "make targets of this many last blocks; default: of all")
    frames: int = option(1024, "length T of a clip, in frames of 10 ms; a multiple of 16")
    mean: float = option(-4.268, "mean of the log-mel spectrogram", least=-sys.float_info.max)
    std: float = option(4.569, "standard deviation of the log-mel spectrogram", least=1e-6)

    def __post_init__(self):
        check_numbers(self)
        for name, fits, wanted in (
            ("heads", self.dim % self.heads == 0, f"must divide dim {self.dim}"),
            ("dim", self.dim % 4 == 0, "must be a multiple of 4, for the positions"),
            ("decoder_groups", self.dim % self.decoder_groups == 0, f"must divide dim {self.dim}"),
            ("frames", self.frames % PATCH == 0 and self.frames <= 2**17,
             f"must be a multiple of {PATCH}, at most {2**17}"),
            ("decoder_kernel", self.decoder_kernel % 2 == 1, "must be odd"),
            ("mask_block", self.mask_block % 2 == 1, "must be odd"),
            ("mask_ratio", 0 < self.visible < self.patches,
             f"must leave some of the {self.patches} patches visible, and some masked"),
            ("target_blocks", (self.target_blocks or 1) <= self.depth, "exceeds depth"),
        ):
            if not fits:
                raise ValueError(f"{name} ({getattr(self, name)}) {wanted}")

    @property
    def patches(self):
        """N of a clip of `frames` frames: 512 for 10 s."""
        return self.frames // PATCH * (MEL_BINS // PATCH)

    @property
    def visible(self):
        """K of those N: 102 of 512."""
        return count_visible(self.patches, self.mask_ratio)

    @classmethod
    def preset(cls, name, **changes):
        return cls(**{**PRESETS[name], **changes})


# What a preset does not name is the default. "demo" and "tiny" are for short runs, which the
# release's utterance weight harms: on ESC-10, after 600 steps, a linear probe found 34 % with 192,
# 70 % with 1. "tiny": 8 clones of 1.28 s beat 4 of 2.56 s, 70 to 64 % (ESC-50's fold 1, linear).
# "demo": 0.5 masked in 4 clones beats 0.8 in 8 (seed 0: the mean of patches finds 87, not 70 %).
PRESETS = {
    "demo": dict(dim=128, depth=4, heads=2, clones=4, mask_ratio=0.5, frames=256,
                 utterance_weight=1.0),
    "tiny": dict(dim=192, depth=6, heads=3, clones=8, frames=128, utterance_weight=1.0),
    "small": dict(dim=384, heads=6),
    "base": dict(),
    "large": dict(dim=1024, depth=24, heads=16),
}

# ---- CNN encoder (patch embedding) and positions -------------------------------------------------


def sincos_positions(H, W, D, device=None):
    """Fixed 2-D sin-cos positions -> (H * W, D). The first D/2 channels tell the frequency column,
    the last D/2 the time row. They depend on row and column alone, so any length works."""
    omega = 1 / 10000.0 ** (torch.arange(D // 4, device=device) / (D // 4))
    place = torch.arange(H * W, device=device)[:, None]  # patches run row by row
    column, row = (place % W) * omega, (place // W) * omega  # (H * W, D / 4)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)


class PatchEmbedding(nn.Module):
    """One 16 x 16 convolution of stride 16, plus positions: (B, 1, T, 128) -> (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(1, config.dim, PATCH, stride=PATCH)

    def forward(self, spectrogram):
        x = self.proj(spectrogram)  # (B, D, H, W)
        D, H, W = x.shape[1:]
        positions = sincos_positions(H, W, D, x.device).to(self.proj.weight.dtype)
        return x.flatten(2).transpose(1, 2) + positions  # (B, N, D)

# ---- Transformer encoder -------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x):  # (B, L tokens, D)
        # Each (B, heads, L, D / heads):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if x.device.type == "cpu" and q.dtype != torch.float32:
            # Written out: the CPU's fused attention took 1.8 to 3.5 times as long in bfloat16.
            weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
            attended = weights.to(v.dtype) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Post-norm transformer block -> its output, and its *target output* (the MLP's, before the
    residual and the norm), of which the teacher's targets are made."""

    def __init__(self, config):
        super().__init__()
        D, hidden = config.dim, round(config.dim * config.mlp_ratio)
        self.attn = Attention(config)
        self.norm1 = nn.LayerNorm(D, config.norm_eps)
        self.mlp = nn.Sequential(collections.OrderedDict(
            fc1=nn.Linear(D, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, D)))
        self.norm2 = nn.LayerNorm(D, config.norm_eps)
        self.drop_path = 0.0  # fine-tuning only: how often a clip skips attention, or MLP

    def forward(self, x):
        # The residual stream x stays in float32 under autocast. To keep it in bfloat16 saved 4 % of
        # a step of base on a card, but CLS's gradient was then 11 % off the release's.
        x = self.norm1(x + self.drop_some(self.attn(x)))
        f = self.mlp(x)
        return self.norm2(x + self.drop_some(f)), f

    def drop_some(self, x):
        """DropPath: zero for some clips, scaled up for the others, so that the mean stays."""
        if not self.training or not self.drop_path:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * kept / (1 - self.drop_path)


class Encoder(nn.Module):
    """The network that student and teacher both are, and that pre-training is for."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patches = PatchEmbedding(config)
        self.cls = nn.Parameter(torch.empty(1, 1, config.dim))
        self.pre_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        nn.init.normal_(self.cls)  # all as in the release
        nn.init.xavier_uniform_(self.patches.proj.weight.flatten(1))  # a view: fills the weight
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, spectrogram, keep=None):
        """What goes into the first block: the normalised CLS token and (visible) patches."""
        x = self.patches(spectrogram)  # (B, N, D)
        if keep is not None:
            # Repeat per clone, then drop what is masked: (B, 1, N, D) is indexed by (B, C, K, 1).
            x = x[:, None].take_along_dim(keep[..., None], dim=2).flatten(0, 1)  # (B * C, K, D)
        cls = self.cls.expand(len(x), -1, -1).to(x.dtype)  # joins after the positions: it has none
        return self.pre_norm(torch.cat([cls, x], dim=1))

    def forward(self, spectrogram, keep=None):
        """(B, 1, T, 128), T any multiple of 16 -> tokens (B, 1 + N, D), CLS first.
        With `keep` (B, C, K), the patches that each clone sees: (B * C, 1 + K, D)."""
        x = self.embed(spectrogram, keep)
        for block in self.blocks:
            x, _ = block(x)
        return x  # post-norm blocks need no final norm

# ---- Inverse block multi-mask --------------------------------------------------------------------


def count_visible(patches, mask_ratio):
    """K, of N patches. In floats, as in the release: of 512 they leave 102; of 80 15, not 16."""
    return int(patches * (1 - mask_ratio))


def visible_patches(mask, K):
    """(B, C, N) bool, K of each N False -> where those K are, in ascending order: (B, C, K)."""
    return mask.byte().argsort(dim=2, stable=True)[..., :K]  # False is 0, and sorts first


def inverse_block_mask(clips, clones, grid, mask_ratio=EATConfig.mask_ratio,
                       mask_block=EATConfig.mask_block, mask_adjust=EATConfig.mask_adjust,
                       masking="inverse_block", device=None):
    """Masks for `clones` views of each of `clips` clips on a grid of (H, W) patches
    -> (clips, clones, H * W) bool, True = masked. In every mask exactly K patches are visible.

    "inverse_block" (EAT): random blocks, of an odd side, stay visible. The paper's comparison:
    "block", where random blocks are masked, and "random", where every patch is drawn for itself.

    Each patch gets a random score below 1, and the K highest stay visible. A patch in a block gets
    1 more, so that it comes first; for "block" 1 less, so that it comes last. Where the blocks are
    too many or too few patches, chance decides, so that K is exact without a loop.
    """
    H, W = grid
    N, views = H * W, clips * clones
    score = torch.rand(views, N, device=device)
    if masking != "random":
        share = (mask_ratio if masking == "block" else 1 - mask_ratio) + mask_adjust
        # Of 64 patches (1 s of sound) a share of 0.27 is less than one block of 25. The release
        # then draws none, which is random masking. Here the blocks shrink until one is left.
        while N * share < mask_block**2 and mask_block > 1:
            mask_block -= 2
        blocks = int(N * share / mask_block**2)
        row = torch.randint(H, (views, blocks), device=device)  # centres of the blocks
        column = torch.randint(W, (views, blocks), device=device)
        covered = torch.zeros_like(score).scatter_(1, row * W + column, 1.0).view(views, 1, H, W)
        # Each centre grows to its block, as far as the grid goes.
        covered = F.max_pool2d(covered, mask_block, stride=1, padding=mask_block // 2).flatten(1)
        score = score - covered if masking == "block" else score + covered
    visible = score.topk(count_visible(N, mask_ratio), dim=1, sorted=False).indices
    mask = torch.ones(views, N, dtype=torch.bool, device=device).scatter_(1, visible, False)
    return mask.view(clips, clones, N)

# ---- CNN decoder ---------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Lightweight: residual steps of a grouped convolution over the patch grid; a linear layer."""

    def __init__(self, config):
        super().__init__()
        D, kernel, groups = config.dim, config.decoder_kernel, config.decoder_groups
        self.convs = nn.ModuleList(nn.Conv2d(D, D, kernel, padding=kernel // 2, groups=groups)
                                   for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(D, TARGET_EPS, elementwise_affine=False)
        self.proj = nn.Linear(D, D)

    def forward(self, x):  # (views, H, W, D)
        for conv in self.convs:
            if x.is_cuda and torch.compiler.is_compiling():
                y = dense_convolution(x, conv)  # the same, and faster on a card when compiled
            else:
                y = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # strides alone change
            # Unlike in a Block, x has 16 bits under autocast: 3 to 13 % faster on a CPU, as exact.
            x = (x + F.gelu(self.norm(y))).to(y.dtype)
        return self.proj(x)

# ---- EAT: student, teacher, utterance-frame objective --------------------------------------------


class EAT(nn.Module):
    """Student and decoder learn to predict, from a masked clip, the teacher's targets for it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.student = Encoder(config)
        self.decoder = Decoder(config)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        # Once: to gather these, and all parameters, at each step cost a small model on a card 15 %.
        self.pairs = list(self.teacher.parameters()), list(self.student.parameters())

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()  # in either mode
        return self

    @torch.no_grad()
    def update_teacher(self, decay):
        """EMA, after each optimizer step: teacher <- decay * teacher + (1 - decay) * student. In
        float32, as bfloat16 would round an update of 1e-5 of the difference away."""
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)  # of all tensors in one call
        average(*self.pairs, None)  # in place; an EMA needs no count of updates, hence None

    @torch.no_grad()
    def targets(self, spectrogram):
        """(B, 1, T, 128) -> (B, N, D), of whole clips: target outputs of all (or the last) blocks,
        instance-normalised over each clip's patches; averaged; layer-normalised over channels."""
        x = self.teacher.embed(spectrogram)
        outputs = []
        for block in self.teacher.blocks:
            x, f = block(x)
            f = f[:, 1:].float().transpose(1, 2)  # (B, D, N): CLS is dropped
            f = f - f.mean(2, keepdim=True)  # less rounding where a channel hardly varies
            outputs.append(F.instance_norm(f, eps=TARGET_EPS))
        chosen = outputs[-self.config.target_blocks:] if self.config.target_blocks else outputs
        average = (sum(chosen) / len(chosen)).transpose(1, 2)  # (B, N, D)
        return F.layer_norm(average, average.shape[2:], eps=TARGET_EPS)

    def draw_mask(self, spectrogram):
        """A mask for each clone of each clip of (B, 1, T, 128) -> (B, C, N) bool."""
        c, grid = self.config, (spectrogram.shape[2] // PATCH, MEL_BINS // PATCH)
        return inverse_block_mask(len(spectrogram), c.clones, grid, c.mask_ratio, c.mask_block,
                                  c.mask_adjust, c.masking, spectrogram.device)

    def decode(self, tokens, keep, grid):
        """The student's visible patches (B * C, K, D) back at their places `keep` (B, C, K), noise
        at the masked ones, through the decoder -> its prediction for all patches (B, C, N, D)."""
        views, K, D = tokens.shape
        noise = torch.randn(views, grid[0] * grid[1], D, device=tokens.device, dtype=tokens.dtype)
        place = keep.view(views, K, 1).expand(-1, -1, D)
        x = (noise * self.config.mask_noise_std).scatter(1, place, tokens)  # (B * C, N, D)
        x = self.decoder(x.unflatten(1, grid))  # (B * C, H, W, D)
        return x.view(*keep.shape[:2], -1, D)

    def forward(self, spectrogram, mask=None):
        """The utterance-frame objective: (B, 1, T, 128), normalised -> dict of scalars
        {loss, frame_loss, utterance_loss, target_std, prediction_std}.
        mask: (B, C, N) bool, True = masked, all but K in each; None draws one."""
        config = self.config
        grid = (spectrogram.shape[2] // PATCH, MEL_BINS // PATCH)
        if mask is None:
            mask = self.draw_mask(spectrogram)
        K = count_visible(mask.shape[2], config.mask_ratio)
        checked = mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if checked and not ((~mask).sum(2) == K).all():  # on a card the host would wait for this
            raise ValueError(f"every mask must leave exactly {K} of {mask.shape[2]} visible")
        keep = visible_patches(mask, K)  # (B, C, K)

        targets = self.targets(spectrogram)  # (B, N, D)
        tokens = self.student(spectrogram, keep)  # (B * C, 1 + K, D)
        prediction = self.decode(tokens[:, 1:], keep, grid).float()  # (B, C, N, D)

        # L_f: squared error at masked patches alone. The release divides both terms by sqrt(D).
        error = (prediction - targets[:, None]).square().sum(-1) / config.dim**0.5  # (B, C, N)
        frame_loss = (error * mask).sum() / mask.sum()
        # L_u: every clone's CLS against the mean of its clip's targets.
        cls = tokens[:, 0].float().unflatten(0, mask.shape[:2])  # (B, C, D)
        error = (cls - targets.mean(1, keepdim=True)).square().sum(-1) / config.dim**0.5  # (B, C)
        utterance_loss = error.mean()
        # L_UFO = L_f + lambda * L_u, with lambda = 1 in the paper. The release takes the *mean* of
        # the frame term over masked patches, but the *sum* of the utterance term over the 12 clips
        # x 16 clones on a GPU. Here both are means, so the release's lambda of 1 is 192.
        loss = config.frame_weight * frame_loss + config.utterance_weight * utterance_loss
        return {
            "loss": loss,
            "frame_loss": frame_loss.detach(),
            "utterance_loss": utterance_loss.detach(),
            # Of each channel over all patches, then averaged: near 0, either is collapse.
            "target_std": targets.flatten(0, 1).std(0).mean(),
            "prediction_std": prediction.detach().flatten(0, 2).std(0).mean(),
        }

# ---- The recipe ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Recipe:
    """How it is trained. Defaults are the release's, unless said; "tiny" and "demo" differ."""

    data: str = option(None, "a folder of sound, a file, a list of files, a pack, or 'demo'")
    preset: str = option(None, "sizes, recipe; default: what fits", choices=tuple(PRESETS))
    out: str = option("out", "folder for last.pt, previous.pt and log.jsonl")
    init: str = option(None, "start from a checkpoint's weights, teacher included")
    resume: bool = option(False, "go on with the run in --out, exactly where its checkpoint stands")
    steps: int = option(400_000, "updates; without it 20 passes over the data, in 5,000 to 400,000")
    hours: float = option(None, "hours, instead of --steps; 30 trial steps come first", least=1e-9)
    batch_size: int = option(48, "clips an update, over all processes")
    accumulate: int = option(1, "parts of a batch, one after the other; more on a small card")
    lr: float = option(5e-4, "peak learning rate")
    warmup_steps: int = option(None, "linear warm-up; default: 2/15 of --steps", least=0)
    weight_decay: float = option(0.05, "decoupled; none on biases and other 1-D tensors")
    beta1: float = option(0.9, "Adam's decay of the mean gradient", most=0.9999)
    beta2: float = option(0.95, "Adam's decay of the mean squared gradient", most=0.9999)
    adam_eps: float = option(1e-8, "Adam's epsilon")
    grad_clip: float = option(4.0, "largest norm of the gradient", least=1e-9)
    ema_decay: float = option(0.9998, "the teacher's decay tau at the start", most=1)
    ema_end_decay: float = option(0.99999, "the teacher's decay tau after annealing", most=1)
    ema_anneal_steps: int = option(None, "updates in between; default: 1/4 of --steps", least=0)
    collapse_std: float = option(0.01, "stop when targets or predictions vary less than this; ours")
    stats: str = option("audioset", "mean and deviation to normalise with: a data set's, or "
                        "measured on --data", choices=(*STATS, "measure"))
    seed: int = option(0, "of weights, data order, masks and noise; of the demo's sound", least=0)
    log_every: int = option(10, "steps between lines of log.jsonl")
    save_every: int = option(1000, "steps between checkpoints")
    probe: str = option(None, "labelled sound: nearest neighbours are found before and after")
    probe_every: int = option(None, "probe after every so many steps, too")

    def __post_init__(self):
        check_numbers(self)
        if self.warmup_steps is None:  # the release's shares
            self.warmup_steps = round(self.steps * 53_333 / 400_000)
        if self.ema_anneal_steps is None:
            self.ema_anneal_steps = round(self.steps * 100_000 / 400_000)

    def learning_rate(self, update):
        """At update 1, 2, ...: linear warm-up from 0, then one cosine to 0 at the last."""
        if update <= self.warmup_steps:
            return self.lr * update / self.warmup_steps
        progress = (update - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * (1 + math.cos(math.pi * progress)) / 2

    def teacher_decay(self, update):
        """tau after update 1, 2, ...: rises linearly, then stays."""
        progress = min(1.0, update / max(1, self.ema_anneal_steps))
        return self.ema_decay + (self.ema_end_decay - self.ema_decay) * progress


# The recipes of "tiny" and "demo" are ours, for short runs. The release's decay, annealed
# in proportion, would leave the teacher after 5,000 steps 84 % the random network that it began as.
SHORT = dict(ema_decay=0.9995, ema_end_decay=0.9995, stats="measure")
RECIPES = {
    "tiny": {**SHORT, "batch_size": 16, "lr": 1e-3},
    "demo": {**SHORT, "batch_size": 8, "lr": 3e-3, "ema_decay": 0.998, "steps": 600},
}


def make_optimizer(model, recipe):
    """Adam with decoupled weight decay over student and decoder; 1-D tensors do not decay."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=recipe.adam_eps, fused=True)

# ---- The training loop ---------------------------------------------------------------------------


def train(config, recipe, clips, machine, resumed=None, labelled=None, saving=True):
    """Pre-train on `clips`, on a Machine (below), from the start or from `resumed`, a checkpoint;
    probe on a Labelled or None, save checkpoints or not -> the log's last line of averages.
    Raises KeyboardInterrupt with the number of a signal that ended it, and what to do next."""
    device, step, stop, line = machine.device, 0, 0, None  # stop: the number of a signal
    torch.manual_seed(seed_of(recipe.seed))
    model = EAT(config).to(device)
    optimizer, scaler = make_optimizer(model, recipe), machine.scaler()
    if resumed:
        model.load_state_dict(resumed.pop("model"))  # popped, so that its memory is given back
        optimizer.load_state_dict(resumed.pop("optimizer"))
        if resumed["scaler"]["growth_interval"] == scaler.get_growth_interval():
            scaler.load_state_dict(resumed["scaler"])  # float16's differs from the others' in that
        step = resumed["step"]
    elif recipe.init:
        start_from(model, recipe.init)
    net = machine.prepare(model, graphs=recipe.accumulate == 1)
    order = shuffled(len(clips), recipe.seed, step * recipe.batch_size)
    size = part_size(recipe.batch_size, recipe.accumulate * machine.world)
    parts = shares(order, recipe.batch_size, size, machine.rank, machine.world)
    parameters = list(model.parameters())  # once, as EAT.pairs
    bad_in_a_row = torch.zeros((), device=device)  # steps whose gradients were not finite
    rows = []  # of each step since the log's last line: its losses, and its gradient's norm
    log = Log(recipe.out if saving else None, step, recipe.steps, machine, clips)
    due = step % (recipe.probe_every or recipe.steps) == 0 or step == recipe.steps
    if due and step not in log.probes:  # not yet: a new run, or a stop came first
        log.probe(step, model.student, labelled)

    def save(must=False):
        if saving and step:
            save_checkpoint(recipe.out, {
                "config": vars(config), "recipe": vars(recipe), "step": step, "clips": len(clips),
                "processes": machine.world, "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}, must)

    with (stop_signals() as caught, contextlib.closing(log.bar),
          loading(clips, parts, machine.workers, device) as batches):
        while step < recipe.steps and not stop:
            # Masks and noise come from (seed, step, process), so a resumed run repeats them.
            torch.manual_seed(seed_of(recipe.seed, step, machine.rank))
            losses = []  # of the batch's parts
            for _ in range(recipe.accumulate):
                batch = next(batches)
                clips.skipped |= batch.skipped
                if not len(batch.numbers):
                    save(must=True)
                    raise UsageError(f"no clip is left to use: {describe_skipped(batch.skipped)}")
                waveforms = batch.waveforms.to(device, non_blocking=True)  # (B, samples)
                lengths = batch.lengths.to(device, non_blocking=True)  # (B,), without padding
                x = spectrogram(waveforms, lengths, config.frames, config.mean, config.std)
                mask = model.draw_mask(x)  # (B, C, N) bool, True = masked
                with machine.autocast():
                    found = net(x, mask)  # x: (B, 1, T, 128)
                scaler.scale(found["loss"] / recipe.accumulate).backward()
                losses.append(torch.stack([*found.values()]).detach())  # a copy, as graphs reuse it

            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step + 1)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, recipe.grad_clip)
            scaler.step(optimizer)  # skipped where a gradient is not finite; it counts as a step
            scaler.update()
            optimizer.zero_grad()
            model.update_teacher(recipe.teacher_decay(step + 1))
            step += 1

            bad_in_a_row = torch.where(norm.isfinite(), 0, bad_in_a_row + 1)  # on the device
            rows.append(torch.cat([torch.stack(losses).mean(0), norm[None]]))
            finished, save_due = step == recipe.steps, step % recipe.save_every == 0
            probe_due = finished or step % (recipe.probe_every or recipe.steps) == 0
            log_due = save_due or probe_due or step % recipe.log_every == 0
            stop = int(machine.reduce(max(caught, default=0), "MAX"))  # all processes, or none
            if log_due or stop:  # here the host waits for the device
                line = log.write(step, (*found, "grad_norm"), rows, lr=recipe.learning_rate(step),
                                 teacher_decay=recipe.teacher_decay(step))
                rows = []
                check_health(line, int(bad_in_a_row), config, recipe)  # before saving
                if finished or stop or (save_due and not bad_in_a_row):
                    save(must=finished or stop)
            if probe_due and (finished or not stop):
                log.probe(step, model.student, labelled)
    if step < recipe.steps:
        raise KeyboardInterrupt(stop, f"; --resume goes on from {recipe.out}" if saving else "")
    return line

# ---- Did it learn? Frozen features, and nearest neighbours among them ----------------------------


def average_of_blocks(encoder, x):
    """-> the average of all blocks' outputs, and the last one: (B, 1 + N, D) in float32, each."""
    tokens, total = encoder.embed(x), 0
    for block in encoder.blocks:
        tokens, _ = block(tokens)
        total = total + tokens.float()
    return total / len(encoder.blocks), tokens.float()


def mean_and_deviation(x, weights):
    """Of the rows of x (B, H, width), with weights (B, H) that sum to 1 -> (B, 2 * width)."""
    # As differences from the first row: rows that are equal then have it as their mean, exactly.
    mean = x[:, 0] + (weights[..., None] * (x - x[:, :1])).sum(1)
    variance = (weights[..., None] * (x - mean[:, None]).square()).sum(1)
    return torch.cat([mean, variance.clamp(min=1e-12).sqrt()], dim=1)  # sqrt's gradient at 0: inf


def readings(encoder, x, filled):
    """What an encoder says of clips (B, 1, T, 128), of which the first `filled` (B,) time steps of
    16 frames hold sound, in three readings:
    "patches" (B, 2 * 8 * D): the blocks' average; the 8 patches of each time step side by side;
        mean and standard deviation over the filled time steps, weighted by how loud they are
    "CLS" and "mean of patches" (B, D): the last block's; `filled` plays no part"""
    average, tokens = average_of_blocks(encoder, x)
    rows = average[:, 1:].unflatten(1, (x.shape[2] // PATCH, -1)).flatten(2)  # (B, H, 8 * D)
    # On ESC-50 these weights are worth 2 points (linear; nearest neighbours 6).
    weights = loudness(x, encoder.config.std, filled, PATCH)  # (B, H)
    return {"patches": mean_and_deviation(rows, weights),
            "CLS": tokens[:, 0], "mean of patches": tokens[:, 1:].mean(1)}


def read_features(encoder, x, filled):
    """`readings` of a frozen encoder. Each clip is cut to its `filled` time steps first, so that
    the padding behind them changes nothing, not through attention either."""
    found = {}
    for count in filled.unique().tolist():  # the clips of one length at a time
        mine = filled == count
        for name, value in readings(encoder, x[mine, :, : count * PATCH], filled[mine]).items():
            found.setdefault(name, value.new_empty(len(x), value.shape[1]))[mine] = value
    return found


def time_steps(samples, frames):
    """How many time steps of 16 frames, of a clip of `frames`, some samples fill; at least 1."""
    return (count_frames(samples) // PATCH).clip(1, frames // PATCH)


@torch.no_grad()
def features(encoder, config, clips, numbers, machine, read=read_features):
    """Call `read` on the clips of some `numbers` -> what it found, {name: (n, ...)}, and the n
    clips' numbers, on the CPU. Those that cannot be read are missing, and in clips.skipped."""
    parts, used = {}, []
    chunks = [chunk.tolist() for chunk in torch.as_tensor(numbers).split(32)]
    with loading(clips, chunks, min(machine.workers, len(chunks) - 1), machine.device) as batches:
        for batch in tqdm(batches, "clips", len(chunks), disable=None, leave=False):
            clips.skipped |= batch.skipped
            if not len(batch.numbers):
                continue
            x = spectrogram(batch.waveforms.to(machine.device), batch.lengths.to(machine.device),
                            clips.frames, config.mean, config.std)
            filled = time_steps(batch.lengths, clips.frames)
            with machine.autocast():
                for name, value in read(encoder, x, filled.to(machine.device)).items():
                    parts.setdefault(name, []).append(value.float().cpu())
            used.append(batch.numbers.clone())  # the original would keep a worker's file open
    if not used:
        raise UsageError(f"no clip can be read; {describe_skipped(clips.skipped)}")
    return {name: torch.cat(values) for name, values in parts.items()}, torch.cat(used)


def nearest_neighbours(bank, bank_targets, queries, k=10):
    """Scores (m, classes) of queries (m, width): each of the k nearest in the bank (n, width) adds
    its cosine similarity, of standardised features, to its classes, bank_targets (n, classes)."""
    mean, std = bank.mean(0), bank.std(0, correction=min(1, len(bank) - 1)) + 1e-6  # of one clip 0
    bank, queries = (F.normalize((x - mean) / std, dim=1) for x in (bank, queries))
    found = [(part @ bank.T).topk(min(k, len(bank))) for part in queries.split(1024)]  # for memory
    similarity, nearest = map(torch.cat, zip(*found))
    return (similarity[..., None] * bank_targets[nearest]).sum(1)


def probe(encoder, labelled, machine):
    """Accuracy of nearest neighbours over the folds of a Labelled data set, for each reading."""
    clips = labelled.clips
    kinds, used = features(encoder, encoder.config, clips, range(len(clips)), machine)
    targets, found = labelled.targets(used.tolist()), {}
    for kind, x in kinds.items():
        right = []
        for fold in labelled.folds:
            train, test = labelled.split(fold, used)
            scores = nearest_neighbours(x[train], targets[train], x[test])
            right.append((scores.argmax(1) == targets[test].argmax(1)).float().mean().item())
        found["knn_" + kind.lower().replace(" ", "_")] = float(np.mean(right))
    return found

# ---- Where a run computes, and what may stop it --------------------------------------------------


@dataclasses.dataclass
class Machine:
    """Where and how it computes; and this process's place among those that torchrun started."""

    device: str = option("auto", "where to compute", choices=("auto", "cuda", "cpu"))
    precision: str = option(None, "of the arithmetic; default: bfloat16 where the device has it, "
                            "else float16 on a card", choices=("float32", "bfloat16", "float16"))
    compile: bool = option(None, "torch.compile the model; default: on CUDA, where Triton is there")
    workers: int = option(None, "processes that read sound; default: by the machine", least=0)

    def __post_init__(self):
        check_numbers(self)
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available() and self.device != "cpu"
        if not cuda and self.device == "cuda":
            raise ValueError("device cuda: torch finds no card, or the card's driver is too old")
        if not cuda and self.device == "auto" and shutil.which("nvidia-smi"):
            print("warning  computing on the CPU: torch cannot use this machine's NVIDIA card (an "
                  "old driver, or a build of torch for CPUs)", file=sys.stderr)
        if cuda:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if self.device.index >= torch.cuda.device_count():
                raise ValueError(f"device: {torch.cuda.device_count()} card(s), but torchrun has "
                                 "started more processes than that")
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True  # all shapes are fixed
            torch.backends.cudnn.allow_tf32 = False  # float32 means float32 in convolutions too
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            self.device = torch.device("cpu")
            able = torch.cpu.get_capabilities()
            native = able.get("avx512_bf16") or able.get("amx_bf16")
        default = "bfloat16" if native else "float16" if cuda else "float32"
        self.dtype = getattr(torch, self.precision or default)
        if self.compile is None:  # on two CPU cores it took 80 s, and the steps then took longer
            self.compile = cuda and importlib.util.find_spec("triton") is not None
        if self.workers is None:
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))  # on this machine
            self.workers = min(8, max(1, count_cores() // processes - 1))
        if self.world > 1:
            # The others wait while the first process probes. Gloo exchanges plain numbers.
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                                 timeout=datetime.timedelta(hours=1))

    def __str__(self):
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
        return (f"{name}, {str(self.dtype).removeprefix('torch.')}, "
                f"{'' if self.compile else 'not '}compiled, {self.world} process(es)")

    def autocast(self):
        """Mixed precision: matrix products and convolutions in `dtype`, weights in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def prepare(self, model, graphs=False):
        """The model as a loop calls it. `graphs` is for a loop where a backward pass follows each
        call, and neither gradients nor results are kept until the next."""
        if self.world > 1:
            model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        if not self.compile:
            return model
        # Forget earlier models: their CUDA graphs keep memory, and after eight torch gives up.
        torch.compiler.reset()
        # On one card the kernels are launched together, as CUDA graphs. One by one they kept the
        # host busy for 17 ms a step of tiny, and the card for 3.
        graphs = graphs and self.world == 1 and self.device.type == "cuda"
        # DDP is compiled too. Torch then cuts the backward pass where DDP exchanges gradients, so
        # that the exchange overlaps with the rest of the pass.
        return torch.compile(model, dynamic=False, mode="reduce-overhead" if graphs else None)

    def scaler(self):
        """A GradScaler skips a step whose gradients are not finite, without the host's waiting to
        know. That is wanted in any precision; a scale other than 1 in float16 alone."""
        if self.dtype == torch.float16:
            return torch.amp.GradScaler(self.device.type)
        return torch.amp.GradScaler(self.device.type, init_scale=1.0, growth_interval=2**30,
                                    backoff_factor=1 - 1e-9)  # so it stays 1; 1 is refused

    def memory(self):
        """Bytes of the smallest card of the run."""
        mine = torch.cuda.get_device_properties(self.device).total_memory
        return int(self.reduce(mine, "MIN"))

    def reduce(self, value, how="SUM"):
        """A tensor's (or number's) sum, or "MAX" or "MIN", over the processes. A plain number is
        exchanged between the hosts, so that none waits for its card."""
        if self.world == 1:
            return value
        value = torch.as_tensor(value)
        torch.distributed.all_reduce(value, getattr(torch.distributed.ReduceOp, how))
        return value


def dense_convolution(x, conv):
    """`conv`, a grouped Conv2d, of x (views, H, W, D), as matrix products. In each group the W
    frequencies of a time step, side by side, are one vector, and a banded matrix mixes them: for
    W = 8 that is 2.7 times the operations, but of the kind that a card is good at. A compiled step
    of base (12 clips, bfloat16, an H100) took 52.0 ms; with cuDNN's grouped convolutions 58.4."""
    (views, H, W, _), groups, size = x.shape, conv.groups, conv.kernel_size[0]
    place, tap = torch.arange(W, device=x.device), torch.arange(size, device=x.device)
    taps = conv.weight.unflatten(0, (groups, -1))  # (groups, out, in, time, frequency)
    # Does tap f lead from frequency i to frequency j?
    leads = place[:, None] - place == tap[:, None, None] - size // 2  # (size, W, W)
    matrix = torch.einsum("fij,goctf->gictjo", leads.to(taps.dtype), taps)
    rows = x.unflatten(3, (groups, -1)).permute(3, 0, 1, 2, 4)  # (groups, views, H, W, in)
    y = rows.flatten(3).flatten(1, 2) @ matrix.flatten(3).flatten(1, 2)
    # What time step t of the kernel makes of row h belongs to row h - t + size // 2.
    y = F.pad(y.view(groups, views, H, size, W, -1), (0, 0) * 3 + (size // 2,) * 2)
    y = sum(y[:, :, t : t + H, t] for t in range(size))  # (groups, views, H, W, out)
    return y.permute(1, 2, 3, 0, 4).flatten(3) + conv.bias.to(y.dtype)


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C, SIGTERM and SIGHUP (a lost terminal) ask a run to end after the step at hand, with a
    checkpoint; the same once more (but not under torchrun) ends it at once -> a list that gets the
    signal's number."""
    caught, before = [], {}

    def catch(number, _):
        caught.append(number)
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun repeats what the terminal sent
            signal.signal(number, before[number])

    with contextlib.ExitStack() as afterwards:
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is under nohup
                before[number] = signal.getsignal(number)
                signal.signal(number, catch)
                afterwards.callback(signal.signal, number, before[number])
        yield caught

# ---- What a run writes: log and checkpoints ------------------------------------------------------


class Log:
    """log.jsonl, a line of averages every few steps; a bar on a terminal, else a line a minute."""

    def __init__(self, out, step, steps, machine, clips, name=None, keep=None):
        self.machine, self.clips = machine, clips
        self.path = os.path.join(out, "log.jsonl") if out else None
        self.step, self.since, self.probes = step, time.perf_counter(), set()
        if machine.rank > 0:
            clips.named = len(clips.skipped)  # the first process names those
        self.name, self.said = name or ("training" if out else "trial"), time.perf_counter()
        self.bar = tqdm(total=steps, initial=step, desc=self.name, unit="step",
                        disable=machine.rank > 0 or not sys.stderr.isatty())
        if self.path and os.path.exists(self.path):
            # Lines after the checkpoint of a resumed run will come again; spoilt ones go, too.
            keep = keep or (lambda line: 0 < step >= line["step"])
            lines = [line for line in read_log(out) if keep(line)]
            self.probes = {line["step"] for line in lines if "knn_cls" in line}
            with contextlib.suppress(OSError):  # a full disk: then they stay
                Path(self.path + ".part").write_text("".join(json.dumps(x) + "\n" for x in lines))
                os.replace(self.path + ".part", self.path)

    def write(self, step, names, rows, **more):
        """A line with the means of some steps' named scalars (of which the gradient's norm is the
        last), over the processes too -> that line."""
        rows = torch.stack(rows)  # (steps, names)
        finite = rows.isfinite()
        sums = torch.stack([rows.nan_to_num(0, 0, 0).sum(0), finite.sum(0)])
        means = {name: total / count if count else None
                 for name, total, count in zip(names, *self.machine.reduce(sums).tolist())}
        steps, seconds = step - self.step, time.perf_counter() - self.since
        line = {"step": step, **means, "not_finite": int((~finite[:, -1]).sum()), **more,
                "steps_per_second": steps / seconds, "skipped": len(self.clips.skipped)}
        self.append(line)
        self.bar.set_postfix({k: x for k, x in means.items() if x}, refresh=False)
        self.bar.update(steps)
        now = time.perf_counter()
        due = step >= 20 > self.step or step == self.bar.total or now > self.said + 60
        if due and self.machine.rank == 0 and not sys.stderr.isatty():
            left = datetime.timedelta(seconds=round((self.bar.total - step) * seconds / steps))
            shown = ", ".join(f"{key} {x:.3g}" for key, x in means.items() if x)
            print(f"{self.name}: step {step:,} of {self.bar.total:,}, about {left} to go; {shown}",
                  file=sys.stderr)
            self.said = now
        who = f"process {self.machine.rank} " if self.machine.world > 1 else ""
        self.name_skipped(self.clips, who)
        if line["not_finite"] and self.machine.rank == 0:
            tqdm.write(f"step {step}: the gradients of {line['not_finite']} of the last {steps} "
                       "steps were not finite, and taught the model nothing", sys.stderr)
        self.step, self.since = step, time.perf_counter()
        return line

    def probe(self, step, encoder, labelled):
        """A line with what a probe on a Labelled (or None) finds, which is printed too."""
        if not labelled or self.machine.rank > 0:
            return
        try:
            found = probe(encoder, labelled, self.machine)
        except UsageError as error:
            if step in (0, self.bar.total):  # else the run goes on: its own sound is there
                raise
            tqdm.write(f"step {step}: not probed: {error}", sys.stderr)
        else:
            self.append({"step": step, **found})
            said = ", ".join(f"{k[4:].replace('_', ' ')} {value:.1%}" for k, value in found.items())
            tqdm.write(f"step {step:7,}: nearest neighbours find {said}")
            self.name_skipped(labelled.clips, "the probe ")
        self.since = time.perf_counter()  # probing is no training

    def name_skipped(self, clips, who):
        """Say which clips have been skipped since this was last said."""
        new = dict(list(clips.skipped.items())[clips.named :])
        if new:
            clips.named += len(new)
            tqdm.write(f"{who}skipped {clips.named} so far; new: {describe_skipped(new)}",
                       sys.stderr)

    def append(self, line):
        """A full disk or a deleted folder costs lines, not the run."""
        if self.path:
            try:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                tqdm.write(f"{self.path}: {error.strerror}; step {line['step']}'s line is lost",
                           sys.stderr)


def check_health(line, bad_in_a_row, config, recipe):
    """Raise RunStopped where a run has gone wrong."""
    # Without a frame loss the decoder is not trained, and its predictions may fade.
    names = ("target_std", "prediction_std") if config.frame_weight else ("target_std",)
    spread = [line[name] for name in names if line.get(name) is not None]
    if bad_in_a_row >= 26:  # in float16 the GradScaler may need 16 to come down to its scale
        why = (f"the gradients were not finite {bad_in_a_row} times in a row. Try a lower --lr, "
               "and look for clips that are far too loud")
    elif spread and min(spread) < recipe.collapse_std:
        why = (f"collapsed: target_std {line['target_std']}, prediction_std "
               f"{line['prediction_std']}. Try a slower teacher (--ema-decay nearer 1), a lower "
               "--lr or a larger --batch-size")
    else:
        return
    raise RunStopped(f"stopped at step {line['step']}: {why}. The last good checkpoint, if there "
                     f"is one, is in {recipe.out}")


def read_log(out):
    """The lines of a run's log.jsonl, without those that a kill or a power cut spoilt."""
    lines = []
    for line in Path(out, "log.jsonl").read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def save_checkpoint(folder, state, must):
    """Write folder/last.pt; the one before stays as previous.pt. At every moment one is whole, and
    where writing fails both are as they were. That ends a run only if it `must` be saved."""
    last, previous = os.path.join(folder, "last.pt"), os.path.join(folder, "previous.pt")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(last + ".part", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(last):
            os.replace(last, previous)
        os.replace(last + ".part", last)
    except (OSError, RuntimeError) as error:  # torch's writer has its own word for a full disk
        with contextlib.suppress(OSError):
            os.remove(last + ".part")
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        text = f"could not save to {folder}: {reason}; an earlier checkpoint, if any, is unchanged"
        if must:
            raise RunStopped(f"{text}. Solve that, then continue with --resume") from None
        print(f"{text}; going on, to try again at the next one", file=sys.stderr, flush=True)


def find_checkpoints(folder):
    """Those of a run, the newest first. A run killed between two renames has no last.pt."""
    paths = (os.path.join(folder, name) for name in ("last.pt", "previous.pt"))
    return [path for path in paths if os.path.exists(path)]


def read_checkpoint(path):
    """Any checkpoint, ours or the release's -> dict: "config", the fields of an EATConfig; "model",
    tensors named student.*, decoder.*, teacher.* of an EAT, or encoder.*, fc_norm.*, head.* of a
    classifier, which has "classes", "multi_label" and perhaps "head_reads" too. No code in a file
    ever runs."""
    path = str(path)
    file = os.path.join(path, "model.safetensors") if os.path.isdir(path) else path
    if not os.path.exists(file):
        raise UsageError(f"{file}: no such file; a checkpoint is the last.pt in a run's --out, a "
                         "fairseq .pt, or a Hugging Face folder or .safetensors")
    try:
        if file.endswith(".safetensors"):
            state = read_hugging_face(file)
        else:
            with zipfile.ZipFile(path) as archive:  # torch writes checksums, but does not read them
                if archive.testzip():
                    raise zipfile.BadZipFile("a checksum does not fit")
            state = load_inert(path)
            if "config" not in state:
                model = state["model"]
                state = translate(model, model.pop("_ema", {}), fairseq_settings(state.get("cfg")))
            state["config"] |= sizes_of(state["model"])
        EATConfig(**state["config"])  # refuses what cannot be
    except Exception as error:  # damaged files fail in many ways, some in torch's many words
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise  # that is not the file's fault
        known = type(error) is ValueError
        reason = str(error) if known else f"not a whole checkpoint ({type(error).__name__})"
        if path.endswith("last.pt") and os.path.exists(path[:-7] + "previous.pt"):
            reason += "; to go on from the one before it, rename previous.pt to last.pt"
        raise UsageError(f"{path}: {reason}") from None
    return state


def encoder_of(model):
    """The encoder among a model's tensors: a pre-trained one's student, or a classifier's."""
    part = "student." if "student.patches.proj.weight" in model else "encoder."
    return {name.removeprefix(part): x for name, x in model.items() if name.startswith(part)}


def fill(module, tensors, path):
    """Load tensors into a module. Raises UsageError, which names what does not fit."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        said = " ".join(str(error).split())  # begins "Error(s) in loading state_dict for EAT: "
        raise UsageError(f"{path}: {said[said.find(':') + 2 :][:400]} ...; was it made with other "
                         "--dim, --depth, or by another version?") from None
    return module


def load_pretrained(path):
    """-> EAT with student, decoder and teacher of a pre-training checkpoint, ours or fairseq's."""
    state = read_checkpoint(path)
    if "teacher.cls" not in state["model"]:
        raise UsageError(f"{path}: an encoder alone, without decoder and teacher; see load_encoder")
    return fill(EAT(EATConfig(**state["config"])), state["model"], path)


def load_encoder(path):
    """-> the Encoder of any checkpoint (the student of a pre-trained one), in eval mode; its
    `config` has the length and the statistics it was trained with."""
    state = read_checkpoint(path)
    encoder = Encoder(EATConfig(**state["config"]))
    return fill(encoder, encoder_of(state["model"]), path).eval()


def start_from(model, path):
    """Begin with a checkpoint's weights: all that pre-training has, or an encoder alone, which then
    is student and teacher, beside a random decoder."""
    state = read_checkpoint(path)
    if "teacher.cls" in state["model"]:
        fill(model, state["model"], path)
    else:
        fill(model.student, encoder_of(state["model"]), path)
        model.teacher.load_state_dict(model.student.state_dict())

# ---- Checkpoints of the release: fairseq files and Hugging Face folders --------------------------

RENAMED = {"cls": "extra_tokens", "patches.proj": "local_encoder.proj",
           "pre_norm": "context_encoder.norm"}  # ours: theirs; Hugging Face's has pre_norm too
FIELDS = {"embed_dim": "dim", "depth": "depth", "num_heads": "heads", "mlp_ratio": "mlp_ratio",
          "norm_eps": "norm_eps", "norm_mean": "mean", "norm_std": "std", "clone_batch": "clones",
          "target_length": "frames", "mask_prob": "mask_ratio", "mask_length": "mask_block",
          "mask_prob_adjust": "mask_adjust", "mask_noise_std": "mask_noise_std",
          "decoder_layers": "decoder_layers", "decoder_kernel": "decoder_kernel",
          "decoder_groups": "decoder_groups",
          "utterance_weight": "utterance_weight"}  # theirs: ours; norm_* and the last: ours alone
POSITIONS = "fixed_positional_encoder.positions"  # computed here


class Stub:
    """Stands in for a class that nobody has: it keeps its attributes, and calls nothing."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        vars(self).update(state if isinstance(state, dict) else {})


def load_inert(path):
    """torch.load of a file that may be a stranger's. A class that torch does not know as harmless
    is a Stub."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(Stub, name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True)


def plain(value):
    """Settings out of omegaconf's containers, as dicts and values."""
    if isinstance(value, Stub):
        value = vars(value).get("_content", vars(value).get("_val"))
    return {k: plain(x) for k, x in value.items()} if isinstance(value, dict) else value


def our_name(name):
    """`cls`, `blocks.0.norm1.weight`, `decoder.convs.0.weight` ... of a name of the release's."""
    name = name.removeprefix("model.").removeprefix("modality_encoders.IMAGE.")  # IMAGE: sound
    for ours, theirs in RENAMED.items():
        name = name.replace(theirs, ours)
    return re.sub(r"^decoder\.blocks\.(\d+)\.0\.", r"decoder.convs.\1.", name)


def sizes_of(model):
    """The width and depth that a model's tensors have. They count, not what the file's words say,
    which could ask for far more memory than it holds."""
    encoder = encoder_of(model)
    if "patches.proj.bias" not in encoder:
        raise ValueError(f"no encoder in it; it has {', '.join(sorted(model)[:3]) or 'no tensors'}")
    blocks = {name.split(".")[1] for name in encoder if name.startswith("blocks.")}
    return {"dim": len(encoder["patches.proj.bias"]), "depth": len(blocks)}


def translate(model, teacher, settings):
    """Tensors and settings in the release's words -> as read_checkpoint returns it."""
    model, teacher = ({our_name(name): tensor for name, tensor in tensors.items()
                       if not name.endswith(POSITIONS)} for tensors in (model, teacher))
    part = "encoder." if "head.weight" in model else "student."
    model = {name if name.startswith(("decoder.", "fc_norm.", "head.")) else part + name: tensor
             for name, tensor in model.items()}
    model |= {"teacher." + name: tensor for name, tensor in teacher.items()}
    sizes = sizes_of(model)
    config = {"heads": max(1, sizes["dim"] // 64)}  # as in base and large, unless the file says
    config |= {FIELDS[k]: x for k, x in settings.items() if k in FIELDS and x is not None}
    config |= {**sizes, "mlp_ratio": len(model[part + "blocks.0.mlp.fc1.bias"]) / sizes["dim"]}
    state = {"config": vars(EATConfig(**config)), "model": model}
    if "head.weight" in model:
        classes = [str(k) for k in range(len(model["head.weight"]))]
        state |= {"classes": classes, "multi_label": len(classes) == 527}  # AudioSet's
    return state


def fairseq_settings(config):
    """What a fairseq config says of the model, and of what it hears."""
    config = plain(config) or {}
    length = (config.get("task") or {}).get("target_length")  # a fine-tuned file has its own
    while "pretrained_model_args" in config.get("model", {}):  # of a fine-tuned file: inside
        config = config["model"]["pretrained_model_args"]
    model = config.get("model") or {}
    sound = (model.get("modalities") or {}).get("image") or {}
    sound = {**sound, "target_length": length or sound.get("target_length")}
    return {**model, **sound, **(sound.get("decoder") or {})}


def read_hugging_face(file):
    """A .safetensors, whose config is in its metadata, or in the config.json beside it."""
    beside = os.path.join(os.path.dirname(file), "config.json")
    with safetensors.safe_open(file, "pt") as tensors:
        config = json.loads((tensors.metadata() or {}).get("config", "{}"))
    if not config and os.path.exists(beside):
        config = json.loads(Path(beside).read_text())
    settings = {**config, "target_length": config.get("img_size", [None])[0]}
    tensors = {name: x.float() for name, x in safetensors.torch.load_file(file).items()}
    state = translate(tensors, {}, settings)
    state["head_reads"] = config.get("head_reads", "CLS")
    if "classes" in state and "id2label" in config:
        state["classes"] = [config["id2label"][k] for k in state["classes"]]
        state["multi_label"] = config.get("problem_type") == "multi_label_classification"
    return state


def export(checkpoint, target, note=""):
    """Write a checkpoint's encoder, or classifier, in the Hugging Face layout: a folder of
    config.json and model.safetensors; or, where `target` ends in .safetensors, one file with 16
    bits a number, and the config and a note in its metadata."""
    state, target = read_checkpoint(checkpoint), str(target)
    config, tensors = EATConfig(**state["config"]), {}
    head = {name: x for name, x in state["model"].items() if name.startswith(("fc_norm.", "head."))}
    for name, tensor in {**encoder_of(state["model"]), **head}.items():
        name = name.replace("cls", RENAMED["cls"]).replace("patches.proj", RENAMED["patches.proj"])
        tensors["model." + name] = tensor.contiguous()
    classes = state.get("classes")
    settings = {
        "architectures": ["EATModel"], "model_type": "eat", "patch_size": PATCH, "stride": PATCH,
        "in_chans": 1, "mel_bins": MEL_BINS, "max_length": 768, "qkv_bias": True, "drop_rate": 0.0,
        "attn_drop_rate": 0.0, "activation_dropout": 0.0, "post_mlp_drop": 0.0,
        "start_drop_path_rate": 0.0, "end_drop_path_rate": 0.0, "layer_norm_first": False,
        "norm_affine": True, "fixed_positions": True, "img_size": [config.frames, MEL_BINS],
        "torch_dtype": "float32", "model_variant": "finetune" if classes else "pretrain",
        "num_classes": len(classes) if classes else 527,
        # The release's files say the sizes and norm_eps alone, and not what the head reads.
        **{theirs: getattr(config, ours) for theirs, ours in FIELDS.items()},
        "head_reads": state.get("head_reads", "CLS"),
    }
    if classes:
        kind = "multi" if state["multi_label"] else "single"
        settings |= {"id2label": dict(enumerate(classes)),
                     "problem_type": f"{kind}_label_classification"}
    if target.endswith(".safetensors"):
        make_folder(os.path.dirname(target) or ".")
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
        about = {"format": "pt", "config": json.dumps(settings), "note": note}
        Path(target).write_bytes(safetensors.torch.save(tensors, about))
    else:
        make_folder(target)
        # The release tabulates the positions of 768 rows, about 2 minutes.
        tensors["model." + POSITIONS] = sincos_positions(768, MEL_BINS // PATCH, config.dim)[None]
        content = safetensors.torch.save(tensors, {"format": "pt"})
        Path(target, "model.safetensors").write_bytes(content)
        Path(target, "config.json").write_text(json.dumps(settings, indent=1))
    print(target)

# ---- Learning curves, and a benchmark ------------------------------------------------------------


def plot(out):
    """Draw the learning curves of a run from its log.jsonl."""
    path = os.path.join(out, "log.jsonl")
    lines = read_log(out) if os.path.exists(path) else []
    if not lines:
        raise UsageError(f"{path}: no log, or nothing in it yet; a run writes it into its --out")
    for line in lines:
        if "teacher_decay" in line:
            line["1 - teacher_decay"] = 1 - line["teacher_decay"]
    panels = (("loss", "frame_loss", "utterance_loss"), ("target_std", "prediction_std"),
              ("grad_norm",), ("lr",), ("1 - teacher_decay",),
              ("knn_patches", "knn_cls", "knn_mean_of_patches"))
    folds = dict.fromkeys(line.get("fold", "") for line in lines)  # of fine-tuning; else none
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, names in zip(figure.subplots(2, 3).flat, panels):
        for name in names:
            for fold in folds:
                known = [line for line in lines
                         if line.get("fold", "") == fold and line.get(name) is not None]
                axes.plot([line["step"] for line in known], [line[name] for line in known],
                          marker="." if len(known) == 1 else None, label=f"{name} {fold}".strip())
        axes.legend()
        axes.set(xlabel="step", yscale="log" if names[0].endswith(("loss", "decay")) else "linear")
    path = os.path.join(out, "log.png")
    figure.savefig(path)
    print(path)


def flops_of_convolution_backward(grad, x, weight, *more, **_):
    """As much as forward for the input, and again for the weight, where the last of `more` wants
    them. torch's own formula forgets the groups."""
    return sum(more[-1][:2]) * conv_flop_count(x, weight, grad)


def random_clip(file, start, count):
    """Sound that takes no time to read."""
    return torch.rand(count)


def bench(**given):
    """Time training on random sound, beside this device's matrix products: unless told otherwise
    base, and 10 steps of 1 clip."""
    config = settings(EATConfig, PRESETS[given.get("preset", "base")], given)
    recipe = settings(Recipe, {"steps": 10, "batch_size": 1}, given)
    machine = settings(Machine, given)
    if machine.world > 1:
        raise UsageError("bench runs in one process: start it without torchrun")
    from torch.utils.benchmark import Timer  # it looks for CUDA's compiler, and may warn

    formula = {torch.ops.aten.convolution_backward: flops_of_convolution_backward}
    # On "meta" nothing is computed. (On a CPU the counter leaves the fused attention out.)
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=formula) as counter:
        EAT(config)(torch.empty(1, 1, config.frames, MEL_BINS))["loss"].backward()
    flops = counter.get_total_flops() * recipe.batch_size
    sound = types.SimpleNamespace(packed=True, read=random_clip)
    clips = Clips(sound, config.frames, np.zeros(10**6, int))
    recipe.log_every, recipe.save_every = math.ceil(recipe.steps / 2), recipe.steps
    line = train(config, recipe, clips, machine, saving=False)
    taken = 1 / line["steps_per_second"]  # in the second half: the first has compiling in it
    found = {"machine": str(machine), "torch": torch.__version__, "seconds_per_step": taken,
             "clips_per_second": recipe.batch_size / taken, "step_tflops": flops / taken / 1e12}
    if machine.device.type == "cuda":
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    size = 8192 if machine.device.type == "cuda" else 2048
    square = torch.randn(size, size, device=machine.device).to(machine.dtype)
    timer = Timer("x @ x", globals={"x": square}, num_threads=torch.get_num_threads())
    rate = 2 * size**3 / timer.blocked_autorange(min_run_time=1).median
    found |= {"matrix_tflops": rate / 1e12, "share_of_matrix_rate": flops / taken / rate}
    print(json.dumps(found, indent=1))

# ---- Command line --------------------------------------------------------------------------------

# Flags that may change when a run is resumed. (With another --accumulate it draws other masks.
# Machine's flags may change, too; then results are rounded differently.)
MAY_CHANGE = {"data", "out", "resume", "accumulate", "log_every", "save_every", "probe",
              "probe_every"}


def settings(kind, *values):
    """A dataclass of those of some dicts' values that are its fields; where several dicts have one,
    the last counts. Raises UsageError."""
    merged = {name: os.fspath(value) if isinstance(value, os.PathLike) else value
              for each in values for name, value in each.items()}
    try:
        return kind(**{name: merged[name] for name in merged if name in kind.__dataclass_fields__})
    except ValueError as error:
        raise UsageError(str(error)) from None


def resume(given, own):
    """The newest checkpoint of the run in --out, which goes on as it began; None where there is no
    run. `own` is what only this program's checkpoints have."""
    out, paths = given["out"], find_checkpoints(given["out"])
    if not paths and not os.path.exists(os.path.join(out, "results.json")):
        return None
    if not paths or not given.get("resume"):
        raise UsageError(f"{out} holds a run already, or its results: --resume goes on with a run "
                         "that has a checkpoint, another --out starts beside it")
    state = read_checkpoint(paths[0])
    if own not in state:
        raise UsageError(f"{out}: not a run of this program")
    known = {**state["config"], **state["recipe"]}
    for name, value in given.items():
        if name in known and name not in MAY_CHANGE and str(value) != str(known[name]):
            raise UsageError(f"--{name.replace('_', '-')} {value}: the run in {out} has "
                             f"{known[name]}, and keeps it; start another with another --out")
    return state


def choose_preset(given, start, machine):
    """The preset, where --preset names none. `start`: the checkpoint of --init, or None."""
    if start and "processes" in start:  # a run of ours
        return start["recipe"].get("preset", "base")
    if start:
        for name in RECIPES:
            if all(start["config"][key] == PRESETS[name][key] for key in ("dim", "depth")):
                return name
        return "base"
    if given["data"] == "demo":
        return "demo"
    if machine.device.type == "cpu":
        return "tiny"
    return "base" if machine.memory() > 20 * 2**30 else "small"


def choose_parts(batch_size, config, machine):
    """Into how many parts a batch is split, where --accumulate does not say. On an H100, 12 clips
    of base took 11.5 GB compiled, and 21 not, in 16 bits. With a margin, all else in proportion."""
    if machine.device.type == "cpu":
        return 1
    size = config.dim * config.depth * config.clones * config.patches / (768 * 12 * 16 * 512)
    clip = (14e9 if machine.compile else 24e9) / 12 * machine.dtype.itemsize / 2 * size  # bytes
    most = max(1, machine.memory() / clip)
    share = max(1, batch_size // machine.world)
    return next(n for n in range(1, share + 1) if share % n == 0 and share / n <= most)


def choose_steps(recipe, config, clips, machine):
    """How many steps: by --hours, or where neither --steps nor the preset says."""
    if recipe.hours:
        trial = dataclasses.replace(recipe, steps=30, log_every=10, save_every=30, probe_every=30)
        rate = train(config, trial, clips, machine, saving=False)["steps_per_second"]
        return max(1, int(recipe.hours * 3600 * machine.reduce(rate, "MAX")))
    # 20 passes over the data, as many as the authors gave their large model, but no fewer than
    # 5,000 steps, which a teacher needs to get ahead of random weights; and no more than the
    # release's 400,000, which are 10 passes over AudioSet-2M.
    return min(Recipe.steps, max(5000, 20 * len(clips) // recipe.batch_size))


def settle(given, machine, resumed=None):
    """Flags, and the checkpoint of a run to go on with -> (EATConfig, Recipe, Clips, and for the
    probe Labelled or None)."""
    if resumed:
        config, recipe = EATConfig(**resumed["config"]), settings(Recipe, resumed["recipe"], given)
        clips = open_clips(recipe.data, config.frames, recipe.seed, training=True)
        return config, recipe, clips, open_probe(recipe, config)
    if "data" not in given:
        raise UsageError("--data is missing: a folder of sound, or 'demo'")
    start = read_checkpoint(given["init"]) if "init" in given else None
    preset = given.get("preset") or choose_preset(given, start, machine)
    values = {**RECIPES.get(preset, {}), **given, "preset": preset}
    recipe = settings(Recipe, values)  # refuses what cannot be, before anything is read
    if recipe.hours and "steps" in given:
        raise UsageError("--hours and --steps: give one of them")
    sizes = start["config"] if start else PRESETS[preset]
    config = settings(EATConfig, sizes, given)
    clips = open_clips(recipe.data, config.frames, recipe.seed, training=True)
    if not start or "stats" in given:
        mean, std = STATS.get(recipe.stats) or measure_stats(clips)
        config = settings(EATConfig, sizes, {"mean": mean, "std": std}, given)
    values.setdefault("accumulate", choose_parts(recipe.batch_size, config, machine))
    labelled = open_probe(recipe, config)  # a mistake there is told before a trial
    if "steps" not in given and (recipe.hours or "steps" not in values):
        values["steps"] = choose_steps(settings(Recipe, values), config, clips, machine)
    return config, settings(Recipe, values), clips, labelled


def open_probe(recipe, config):
    if recipe.probe_every and not recipe.probe:
        raise UsageError("--probe-every: --probe must name the labelled sound to probe on")
    frames = config.frames if recipe.probe == "demo" else max(512, config.frames)  # as embed
    labelled = recipe.probe and open_labelled(recipe.probe, frames, seed=recipe.seed)
    if labelled and labelled.multi_label:
        raise UsageError(f"--probe {recipe.probe}: nearest neighbours need one label a clip")
    return labelled


def describe(config, recipe, clips, machine, labelled, resumed):
    """The run in a few lines, with every number that was derived."""
    size = sum(p.numel() for p in Encoder(config).parameters()) / 1e6
    passes = recipe.steps * recipe.batch_size / len(clips)
    parts = f" in {recipe.accumulate} parts" if recipe.accumulate > 1 else ""
    alone = "'s recipe, on the sizes of --init" if recipe.init else ""
    print(f"preset   {recipe.preset}{alone}; there are {', '.join(PRESETS)}")
    print(f"data     {recipe.data}: {len(clips):,} clips of {config.frames / 100:.2f} s; mean "
          f"{config.mean}, deviation {config.std}{clips.advice()}")
    print(f"model    encoder of {size:.1f} M parameters; "
          f"{config.visible} of {config.patches} patches visible in {config.clones} clones each")
    print(f"recipe   {recipe.steps:,} steps x {recipe.batch_size} clips{parts} = {passes:.1f} "
          f"passes over the data; learning rate {recipe.lr:.3g} after {recipe.warmup_steps:,} "
          f"steps; teacher's decay {recipe.ema_decay} to {recipe.ema_end_decay}; seed "
          f"{recipe.seed}")
    print(f"machine  {machine}")
    if labelled:
        trained_on = {whole_name(clips.name(k)) for k in range(len(clips)) if recipe.data != "demo"}
        both = len(trained_on.intersection(labelled.clips.source.names))
        print(f"probe    {labelled}; chance {1 / len(labelled.classes):.0%}"
              + (f"; {both:,} of its files are trained on, without labels" if both else ""))
    if resumed:
        print(f"resumed  at step {resumed['step']:,}")
        for name, now in (("clips", len(clips)), ("processes", machine.world)):
            if resumed[name] != now:
                print(f"warning  the run began with {resumed[name]:,} {name}, and now has {now:,}: "
                      "from here on it is another than it would have been", file=sys.stderr)
    elif recipe.resume:
        print(f"warning  {recipe.out} has no checkpoint: a new run begins", file=sys.stderr)


def pretrain(**given):
    """Pre-train an EAT on sound."""
    if given.get("data") == "demo":  # its 600 steps are shorter than compiling them
        given = {"out": "out-demo", "probe": "demo", "compile": False, **given}
    given = {"out": Recipe.out, **given}
    machine, resumed = settings(Machine, given), resume(given, "processes")
    found = resumed["step"] if resumed else 0
    if machine.reduce(found, "MIN") != machine.reduce(found, "MAX"):
        raise UsageError(f"{given['out']}: not the same checkpoint for all processes; --out must "
                         "be one folder that all of them see")
    config, recipe, clips, labelled = settle(given, machine, resumed)
    with lock(recipe.out) if machine.rank == 0 else contextlib.nullcontext():
        if machine.rank == 0:
            if not resumed:
                resume({"out": recipe.out}, "processes")  # refuses what another run has left since
            describe(config, recipe, clips, machine, labelled, resumed)
        train(config, recipe, clips, machine, resumed, labelled, saving=machine.rank == 0)
    if machine.world > 1:
        torch.distributed.destroy_process_group()
    if machine.rank == 0:
        path = os.path.join(recipe.out, "last.pt")
        print(f"the encoder is in {path}; what now?\n"
              f"    python finetune.py --data LABELLED --mode linear --checkpoint {path}\n"
              f"    python finetune.py look CLIP --checkpoint {path}\n"
              f"    python eat.py plot {recipe.out}")


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    jobs = {"plot": plot, "export": export, "bench": bench}
    name = words[0] if words and words[0] in jobs else None
    job = jobs.get(name, pretrain)
    parser = Parser(prog=f"eat.py {name}" if name else "eat.py", description=job.__doc__,
                    epilog="also: eat.py plot OUT, export CHECKPOINT TARGET, bench")
    if job is plot:
        parser.add_argument("out", help="the --out folder of a run")
    elif job is export:
        parser.add_argument("checkpoint", help="ours, or the release's")
        parser.add_argument("target", help="a folder, or a file.safetensors")
        parser.add_argument("--note", default="", help="what it was trained on, for the metadata")
    else:
        parser.add_fields(Recipe, EATConfig, Machine)
    given = vars(parser.parse_args(words[1:] if name else words))
    return run("eat.py", lambda: job(**given))


if __name__ == "__main__":
    sys.exit(main())
