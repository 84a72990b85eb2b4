"""EAT, the Efficient Audio Transformer, in one file: self-supervised pre-training on sound.

    python eat.py --data demo                 watch one learn, about three minutes on a laptop
    python eat.py --data path/to/sound        your own folder; every flag: python eat.py --help

The method is that of *EAT: Self-Supervised Pre-Training with Efficient Audio Transformer* (Chen, Liang,
Ma, Zheng, Chen; IJCAI 2024; arXiv 2401.03497). The file runs in the paper's order: patch embedding,
transformer encoder, inverse block multi-mask, CNN decoder, EMA teacher, utterance-frame objective; then
checkpoints, the training loop and the command line. Where the paper and the released code differ, the
code follows "the release" and says so.

Letters in the shape comments:
    B clips    C clones of each    T frames of 10 ms    H x W = N patches    K kept (visible)    D channels
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import difflib
import io
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import typing
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------
# Configuration and presets
# ---------------------------------------------------------------------------------------------------------


class UsageError(ValueError):
    """Something the user can mend: one line, exit status 2."""


class TrainingStopped(RuntimeError):
    """A run that has gone wrong: one line, exit status 1."""


MEL_BINS = 128  # height of the spectrogram
PATCH = 16  # a patch is 16 frames (0.16 s) x 16 mel bins; patches do not overlap
TARGET_EPS = 1e-5  # of the parameter-free norms: targets and decoder


def option(default, help, **more):
    """A dataclass field that is a command-line flag too: `mask_ratio` is `--mask-ratio`."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


def check_numbers(settings):
    """Refuse numbers that cannot be: an int is at least 1 and a float at least 0, unless its option says `least`."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.type in (int, float) and value is not None:
            least = field.metadata.get("least", 1 if field.type is int else 0)
            if not (least <= value < math.inf):
                raise UsageError(f"{field.name} ({value}) must be a number" + f" of at least {least}" * (least > -math.inf))


@dataclasses.dataclass
class EATConfig:
    """What the model is. Every default is the released recipe's (base, AudioSet-2M)."""

    dim: int = option(768, "channels D of the encoder")
    depth: int = option(12, "transformer blocks")
    heads: int = option(12, "attention heads")
    mlp_ratio: float = option(4.0, "hidden width of a block's MLP, in units of D")
    norm_eps: float = option(1e-6, "epsilon of the encoder's LayerNorms")
    decoder_layers: int = option(6, "convolutions in the CNN decoder")
    decoder_kernel: int = option(3, "their kernel size")
    decoder_groups: int = option(16, "their groups")
    masking: str = option("inverse_block", "which patches stay visible", choices=("inverse_block", "block", "random"))
    clones: int = option(16, "differently masked copies C of each clip")
    mask_ratio: float = option(0.8, "share of the patches that is masked")
    mask_block: int = option(5, "side of a mask block, in patches")
    mask_adjust: float = option(0.07, "share of the patches added when counting blocks, as blocks overlap")
    mask_noise_std: float = option(0.01, "standard deviation of what the decoder gets at masked places")
    # The paper writes L = L_f + lambda * L_u with lambda = 1. The release *sums* the utterance term over the
    # clips x clones on a GPU (12 x 16) and takes the mean of the frame term over masked patches, so its
    # lambda = 1 weighs two means as 1 : 192. Both terms are means here, hence 192, whatever the batch.
    utterance_weight: float = option(192.0, "lambda: weight of the utterance loss; both losses are means")
    frame_weight: float = option(1.0, "weight of the frame loss; 0 leaves the utterance loss alone")
    target_blocks: int = option(None, "how many of the teacher's blocks, from the last one down, make the targets; default: all")
    frames: int = option(1024, "length T of a training clip, in frames of 10 ms; a multiple of 16")
    mean: float = option(-4.268, "mean of the log-mel spectrogram (the release's for AudioSet)", least=-math.inf)
    std: float = option(4.569, "standard deviation of the log-mel spectrogram, likewise")

    def __post_init__(self):
        check_numbers(self)
        for bad, why in (
            (self.dim % self.heads, f"heads ({self.heads}) must divide dim ({self.dim})"),
            (self.dim % 4, f"dim ({self.dim}) must be a multiple of 4, for the 2-D positions"),
            (self.dim % self.decoder_groups, f"decoder_groups ({self.decoder_groups}) must divide dim ({self.dim})"),
            (self.frames % PATCH or not PATCH <= self.frames <= 2**17, f"frames ({self.frames}) must be a multiple of "
             f"{PATCH}, at most {2**17}"),
            (self.mask_block % 2 == 0, f"mask_block ({self.mask_block}) must be odd"),
            (not 0 < self.visible < self.patches, f"mask_ratio ({self.mask_ratio}) must leave some of the "
             f"{self.patches} patches visible, and some masked"),
            (self.std == 0, "std must not be 0"),
            ((self.target_blocks or 1) > self.depth, f"target_blocks ({self.target_blocks}) must be at most depth ({self.depth})"),
        ):
            if bad:
                raise UsageError(why)

    @property
    def patches(self):
        """N of a clip of `frames` frames: 512 for 10 s."""
        return self.frames // PATCH * (MEL_BINS // PATCH)

    @property
    def visible(self):
        """K of those N: 102 of 512."""
        return visible_patches(self.patches, self.mask_ratio)

    @classmethod
    def preset(cls, name, **changes):
        return cls(**{**fields_of(cls, PRESETS[name]), **changes})


def fields_of(kind, values):
    """Those of `values` that are fields of a dataclass."""
    return {field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values}


# What a preset does not name is the default, here and in `Recipe` below. "tiny" is for a CPU and some thousand steps.
# There the release's utterance weight drowns the frame loss (600 steps of 4 clips of 5 s from an hour of sound, then
# nearest neighbours and a linear probe on ESC-10: 48 and 34 % with weight 192, 63 and 70 % with 1), and with the
# release's decays the teacher would end as 84 % the random network it began as.
PRESETS = {
    "tiny": dict(dim=192, depth=6, heads=3, clones=8, frames=256, utterance_weight=1.0, steps=5000, batch_size=8,
                 lr=1e-3, ema_decay=0.9995, ema_end_decay=0.9995, stats="measure"),
    "small": dict(dim=384, heads=6),
    "base": dict(),
    "large": dict(dim=1024, depth=24, heads=16),
}
PRESETS["demo"] = {**PRESETS["tiny"], "dim": 128, "depth": 4, "heads": 2, "steps": 600, "lr": 3e-3, "ema_decay": 0.998}

# ---------------------------------------------------------------------------------------------------------
# Patch embedding ("CNN encoder") and positions
# ---------------------------------------------------------------------------------------------------------


def sincos_positions(H, W, D):
    """Fixed 2-D sin-cos positions -> (H * W, D). The first D/2 channels tell the frequency column, the last
    D/2 the time row; they depend on the row and column only, so any length works."""
    omega = 1 / 10000.0 ** (torch.arange(D // 4) / (D // 4))

    def encode(p):
        return torch.cat([(p[:, None] * omega).sin(), (p[:, None] * omega).cos()], dim=1)

    row, column = torch.arange(H).repeat_interleave(W), torch.arange(W).repeat(H)
    return torch.cat([encode(column), encode(row)], dim=1)


class PatchEmbedding(nn.Module):
    """One 16 x 16 convolution of stride 16, plus positions: (B, 1, T, 128) -> (B, N, D), time-major."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(1, config.dim, PATCH, stride=PATCH)
        table = sincos_positions(config.frames // PATCH, MEL_BINS // PATCH, config.dim)
        self.register_buffer("positions", table, persistent=False)

    def forward(self, spectrogram):
        x = self.proj(spectrogram)  # (B, D, H, W)
        H, W = x.shape[2:]
        positions = self.positions[: H * W]  # patches run row by row, so a shorter clip is a prefix
        if len(positions) < H * W:
            positions = sincos_positions(H, W, x.shape[1]).to(x.device)
        return x.flatten(2).transpose(1, 2) + positions  # (B, N, D)


# ---------------------------------------------------------------------------------------------------------
# Transformer encoder
# ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x):  # (B, L, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, L, D/heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.dim, hidden)
        self.fc2 = nn.Linear(hidden, config.dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Post-norm transformer block -> (its output, its *target output*: the MLP's, before residual and norm)."""

    def __init__(self, config):
        super().__init__()
        self.attn, self.mlp = Attention(config), MLP(config)
        self.norm1 = nn.LayerNorm(config.dim, config.norm_eps)
        self.norm2 = nn.LayerNorm(config.dim, config.norm_eps)
        self.drop_path = 0.0  # fine-tuning only: how often, in training, a clip skips attention or MLP

    def forward(self, x):
        x = self.norm1(x + self.dropped(self.attn(x)))
        f = self.mlp(x)
        return self.norm2(x + self.dropped(f)), f

    def dropped(self, x):
        if not self.training or not self.drop_path:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * kept / (1 - self.drop_path)


class Encoder(nn.Module):
    """The network that student and teacher share, and that pre-training is for."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patches = PatchEmbedding(config)
        self.cls = nn.Parameter(torch.empty(1, 1, config.dim))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.apply(self._init)

    def _init(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, PatchEmbedding):
            nn.init.xavier_uniform_(module.proj.weight.flatten(1))
        elif isinstance(module, Encoder):
            nn.init.normal_(module.cls)

    def forward(self, spectrogram, visible=None):
        """(B, 1, T, 128), T any multiple of 16 -> tokens (B, 1 + N, D), CLS first.

        visible: (B, C, K) indices of the patches each clone keeps -> tokens (B * C, 1 + K, D).
        """
        x = self.embed(spectrogram, visible)
        for block in self.blocks:
            x, _ = block(x)
        return x  # post-norm blocks: no final norm

    def embed(self, spectrogram, visible=None):
        """The same up to the first block."""
        x = self.patches(spectrogram)  # (B, N, D)
        if visible is not None:
            B, N, D = x.shape
            rows = visible + N * torch.arange(B, device=x.device)[:, None, None]
            x = F.embedding(rows.flatten(0, 1), x.flatten(0, 1))  # (B * C, K, D): a gather with a fast backward
        x = torch.cat([self.cls.expand(len(x), -1, -1).to(x.dtype), x], dim=1)  # CLS has no position
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------------
# Inverse block multi-mask
# ---------------------------------------------------------------------------------------------------------


def visible_patches(patches, mask_ratio):
    """K: how many of N patches every mask keeps. In floats, as the release counts: 102 of 512, 12 of 64."""
    return int(patches * (1 - mask_ratio))


def inverse_block_mask(clips, clones, grid, mask_ratio=0.8, mask_block=5, mask_adjust=0.07,
                       masking="inverse_block", device=None, generator=None):
    """Masks for `clones` views of each of `clips` clips on a grid of (H, W) patches.

    -> (clips, clones, H * W) bool on `device` (the generator's must be the same), True = masked, with exactly
    K False in every mask. "inverse_block" (EAT): random blocks stay visible; "block": random blocks are
    masked; "random": every patch for itself. The last two are the paper's comparison.
    """
    H, W = grid
    N, views = H * W, clips * clones
    K = visible_patches(N, mask_ratio)
    draw = {"device": device, "generator": generator}
    score = torch.rand(views, N, **draw)  # the K highest stay visible
    if masking != "random":
        area = (mask_ratio if masking == "block" else 1 - mask_ratio) + mask_adjust
        # The release finds no room for a block in 64 patches (1 s of sound) and silently turns to random
        # masks; blocks shrink here until one fits.
        while N * area < mask_block**2 and mask_block > 1:
            mask_block -= 2
        blocks = int(N * area / mask_block**2)
        row = torch.randint(H, (views, blocks, 1, 1), **draw)
        column = torch.randint(W, (views, blocks, 1, 1), **draw)
        offset = torch.arange(mask_block, device=device) - mask_block // 2
        row = (row + offset[:, None]).clamp(0, H - 1)  # (views, blocks, side, 1): blocks end at the edge
        column = (column + offset).clamp(0, W - 1)  # (views, blocks, 1, side)
        covered = torch.zeros(views, N, device=device).scatter_(1, (row * W + column).flatten(1), 1.0)
        # Exactly K: covered patches come first (last, for "block"), and chance decides within each kind.
        score = score - covered if masking == "block" else score + covered
    visible = score.topk(K, dim=1, sorted=False).indices
    return torch.ones(views, N, dtype=torch.bool, device=device).scatter_(1, visible, False).view(clips, clones, N)


# ---------------------------------------------------------------------------------------------------------
# CNN decoder
# ---------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Lightweight: 3 x 3 grouped convolutions over the patch grid, (views, N, D) -> (views, N, D), or only the patches
    of interest, (views, M) -> (views, M, D)."""

    def __init__(self, config):
        super().__init__()
        D, kernel = config.dim, config.decoder_kernel
        self.convs = nn.ModuleList(
            nn.Conv2d(D, D, kernel, padding=kernel // 2, groups=config.decoder_groups)
            for _ in range(config.decoder_layers)
        )
        self.proj = nn.Linear(D, D)

    def forward(self, x, grid, patches=None):
        x = x.unflatten(1, grid).permute(0, 3, 1, 2)  # (views, D, H, W), already channels-last in memory
        for conv in self.convs:
            y = conv(x).permute(0, 2, 3, 1)
            y = F.gelu(F.layer_norm(y, y.shape[-1:], eps=TARGET_EPS))  # over channels, without affine
            x = x + y.permute(0, 3, 1, 2)
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        return self.proj(x if patches is None else take(x, patches))


# ---------------------------------------------------------------------------------------------------------
# EAT: student, teacher, utterance-frame objective
# ---------------------------------------------------------------------------------------------------------


class EAT(nn.Module):
    """Student and decoder learn to predict, from a masked clip, what the teacher makes of the whole clip."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.student = Encoder(config)
        self.decoder = Decoder(config)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)  # an average of students, in float32

    @torch.no_grad()
    def update_teacher(self, decay, skip=None):
        """EMA: teacher <- decay * teacher + (1 - decay) * student; call it after each optimizer step. Where the tensor `skip`
        is 1, nothing happens."""
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        # As a number, or as tensors on the device, of which it wants one for each parameter.
        weight = 1 - decay if skip is None else [(1 - decay) * (1 - skip)] * len(teacher)
        torch._foreach_lerp_(teacher, student, weight)

    @torch.no_grad()
    def targets(self, spectrogram):
        """(B, 1, T, 128) -> (B, N, D): once a clip, unmasked. Average of all blocks' target outputs, each
        instance-normalised over the patches of its clip, then layer-normalised over channels."""
        x, total, averaged = self.teacher.embed(spectrogram), 0, self.config.target_blocks or self.config.depth
        for number, block in enumerate(self.teacher.blocks, 1):
            x, f = block(x)  # f: (B, 1 + N, D)
            if number > self.config.depth - averaged:
                total = total + F.instance_norm(f[:, 1:].float().transpose(1, 2), eps=TARGET_EPS)
        average = (total / averaged).transpose(1, 2)
        return F.layer_norm(average, average.shape[2:], eps=TARGET_EPS)

    def forward(self, spectrogram, mask=None, noise=None):
        """One step of the objective: (B, 1, T, 128), normalised -> dict of scalars
        {loss, frame_loss, utterance_loss, target_std, prediction_std}.

        mask: (B, C, N) bool, True = masked, equally many in every view; None draws one.
        noise: (B, C, N, D) standard normal, what the decoder sees at masked places before scaling; None draws it.
        """
        config, B = self.config, len(spectrogram)
        grid = (spectrogram.shape[2] // PATCH, MEL_BINS // PATCH)
        if mask is None:
            mask = draw_masks(config, B, grid, device=spectrogram.device)
        visible, masked = split_mask(mask, visible_patches(mask.shape[2], config.mask_ratio))  # (B, C, K), (B, C, N - K)

        targets = self.targets(spectrogram)  # (B, N, D)
        tokens = self.student(spectrogram, visible)  # (B * C, 1 + K, D)

        # Frame loss: masked patches only. The release divides squared errors by sqrt(D) and so do both terms here.
        prediction = self.decode(tokens[:, 1:], visible, grid, noise, masked.flatten(0, 1)).float()  # (B * C, N - K, D)
        wanted = take(targets, masked.flatten(1)).view_as(prediction)
        frame_loss = (prediction - wanted).square().sum(-1).mean() / config.dim**0.5
        # Utterance loss: every clone's CLS against the mean of the clip's targets.
        cls = tokens[:, 0].float().unflatten(0, mask.shape[:2])  # (B, C, D)
        utterance_loss = (cls - targets.mean(1, keepdim=True)).square().sum(-1).mean() / config.dim**0.5
        return {
            "loss": config.frame_weight * frame_loss + config.utterance_weight * utterance_loss,
            "frame_loss": frame_loss.detach(),
            "utterance_loss": utterance_loss.detach(),
            "target_std": targets.flatten(0, 1).std(0).mean(),  # either falling towards 0 is collapse
            "prediction_std": prediction.detach().flatten(0, 1).std(0).mean(),
        }

    def decode(self, tokens, visible, grid, noise=None, patches=None):
        """Visible patches (B * C, K, D) back at their places, noise at the masked ones, through the decoder -> its
        prediction for all patches, (B * C, N, D), or for some, (B * C, M)."""
        views, K, D = tokens.shape
        shape = (views, grid[0] * grid[1], D)
        x = torch.randn(shape, device=tokens.device) if noise is None else noise.view(shape)
        x = (x * self.config.mask_noise_std).to(tokens.dtype)
        return self.decoder(x.scatter(1, visible.view(views, K, 1).expand(-1, -1, D), tokens), grid, patches)


def draw_masks(config, clips, grid, **draw):
    return inverse_block_mask(clips, config.clones, grid, config.mask_ratio, config.mask_block,
                              config.mask_adjust, config.masking, **draw)


def split_mask(mask, K):
    """(B, C, N) bool -> indices of the visible (B, C, K) and of the masked patches (B, C, N - K), in order."""
    if not torch.compiler.is_compiling() and not (mask.sum(-1) == mask.shape[-1] - K).all():
        raise ValueError(f"every mask must leave exactly {K} of {mask.shape[-1]} patches visible")
    order = mask.to(torch.uint8).argsort(dim=-1, stable=True)
    return order[..., :K], order[..., K:]


def take(x, index):
    """x (B, N, D), index (B, M) -> (B, M, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


# ---------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------


def save_checkpoint(folder, state):
    """Write folder/last.pt; the one before stays as folder/previous.pt. At every moment one of them is whole. Raises
    OSError, and leaves both as they were."""
    last, previous = os.path.join(folder, "last.pt"), os.path.join(folder, "previous.pt")
    os.makedirs(folder, exist_ok=True)
    try:
        with open(last + ".part", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer has its own word for a full disk
        with contextlib.suppress(OSError):
            os.remove(last + ".part")
        raise error if isinstance(error, OSError) else OSError(str(error).split("\n")[0]) from None
    if os.path.exists(last):
        os.replace(last, previous)
    os.replace(last + ".part", last)


def read_checkpoint(path):
    """Any checkpoint, of this file's own or the release's (see there) -> dict: "config", the fields of an EATConfig;
    "model", tensors named student.*, decoder.*, teacher.* of an EAT, or encoder.*, fc_norm.*, head.* of a classifier,
    which also has "classes" and "multi_label". No code in a file ever runs. Raises UsageError."""
    path = str(path)
    if not os.path.exists(path):
        raise UsageError(f"{path}: no such file{did_you_mean(path)}; a checkpoint is the last.pt in the --out folder of a run, a "
                         "fairseq .pt, or a Hugging Face folder or .safetensors")
    try:
        if os.path.isdir(path) or path.endswith(".safetensors"):
            state = read_hugging_face(path)
        else:
            if zipfile.is_zipfile(path):  # torch writes checksums, but does not read them
                with zipfile.ZipFile(path) as archive:
                    if damaged := archive.testzip():
                        raise UsageError(f"damaged: {damaged} is not what was written")
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:  # holds more than tensors and plain values
                state = unpickle_inert(path)
            if "config" not in state:
                state = translate(state["model"], state["model"].pop("_ema", {}), fairseq_settings(state.get("cfg")))
        check_sizes(state)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except Exception as error:  # damaged files fail in many ways
        reason = str(error).split("\n")[0]
        raise UsageError(f"{path}: not a whole checkpoint ({type(error).__name__}: {reason})") from None
    return state


def check_sizes(state):
    """Hold the config against the tensors, before anything is made of its sizes."""
    sizes, config = sizes_of(state["model"]), state["config"]
    wrong = [f"{name} {config[name]} (tensors: {value})" for name, value in sizes.items() if config[name] != value]
    if wrong:
        raise UsageError(f"config and tensors differ: {', '.join(wrong)}")
    EATConfig(**config)  # refuses impossible ones


def sizes_of(model):
    """What the shapes of a model's tensors tell of its EATConfig."""
    part = next((part for part in ("student.", "encoder.") if f"{part}patches.proj.weight" in model), None)
    if part is None:
        raise UsageError(f"no encoder in it; it has {', '.join(sorted(model)[:3]) or 'no tensors'}")
    D = len(model[f"{part}patches.proj.weight"])
    sizes = {"dim": D, "depth": len({name.split(".")[2] for name in model if name.startswith(f"{part}blocks.")})}
    if f"{part}blocks.0.mlp.fc1.weight" in model:
        sizes["mlp_ratio"] = len(model[f"{part}blocks.0.mlp.fc1.weight"]) / D
    if "decoder.convs.0.weight" in model:
        _, width, kernel, _ = model["decoder.convs.0.weight"].shape
        sizes |= {"decoder_kernel": kernel, "decoder_groups": D // width,
                  "decoder_layers": sum(name.startswith("decoder.convs.") for name in model) // 2}
    return sizes


def fill(module, state, path):
    """Load tensors into a module, or say what is missing, what is too much and whose shape is another."""
    wanted = module.state_dict()
    faults = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "of another shape": [f"{name} {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"
                             for name in wanted if name in state and state[name].shape != wanted[name].shape],
    }
    if any(faults.values()):
        raise UsageError(f"{path}: " + "; ".join(f"{len(names)} {what} ({', '.join(names[:3])}{' ...' * (len(names) > 3)})"
                                                 for what, names in faults.items() if names))
    module.load_state_dict(state)
    return module


def part_of(state, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in state["model"].items() if name.startswith(prefix)}


def find_checkpoints(folder):
    """Those of a run, the newest first. Only a run killed between two renames has no last.pt."""
    paths = (os.path.join(folder, name) for name in ("last.pt", "previous.pt"))
    return [path for path in paths if os.path.exists(path)]


def newest_checkpoint(folder):
    """The newest of a run that is whole. A newer one that is not is set aside as damaged.pt, and said to be."""
    *newer, oldest = find_checkpoints(folder)
    for path in newer:
        try:
            return read_checkpoint(path)
        except UsageError as error:
            print(f"warning  {error}; going on from {oldest}", file=sys.stderr)
    state = read_checkpoint(oldest)
    for path in newer:
        with contextlib.suppress(FileNotFoundError):  # another process of the run was quicker
            os.replace(path, os.path.join(folder, "damaged.pt"))
    return state


def load_pretrained(path):
    """-> EAT with student, decoder and teacher of a pre-training checkpoint, our own or fairseq's."""
    state = read_checkpoint(path)
    if not part_of(state, "decoder.") or not part_of(state, "teacher."):
        raise UsageError(f"{path}: an encoder alone, without the decoder and teacher of pre-training; see load_encoder")
    return fill(EAT(EATConfig(**state["config"])), state["model"], path)


def load_encoder(path):
    """-> the Encoder of any checkpoint (the student's, of a pre-trained one), in eval mode; its `config` has the length
    and the statistics it was trained with."""
    state = read_checkpoint(path)
    encoder = Encoder(EATConfig(**state["config"]))
    return fill(encoder, part_of(state, "student.") or part_of(state, "encoder."), path).eval()


# ---------------------------------------------------------------------------------------------------------
# Training: the recipe
# ---------------------------------------------------------------------------------------------------------

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402  the method above needs torch alone and can be lifted out
from tqdm import tqdm  # noqa: E402

from data import (STATS, AudioError, clip_samples, describe_skipped, did_you_mean, measure_stats, open_clips,  # noqa: E402
                  open_labelled, pyplot, save_picture, spectrogram)


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISION_HELP = "of the model's arithmetic; default: bfloat16 where the device multiplies it natively, on CUDA else float16"
WORKERS_HELP = "processes that read sound; default: none for a pack, else what the machine has, 8 at most"
# Not on a CPU: on two cores compiling took 80 s, and a step then 0.58 s for 0.48 s (D 192, 12 blocks, 4 clips of 5 s x 8).
COMPILE_HELP = "torch.compile the model; default: on CUDA"


@dataclasses.dataclass
class Recipe:
    """How it is trained. Every default is the released recipe's (AudioSet-2M, base)."""

    data: str = option(None, "sound: a folder, a file, a list of files (one a line, or a release .tsv), or 'demo'")
    preset: str = option(None, "sizes and recipe; default demo for the demo, else base", choices=tuple(PRESETS))
    out: str = option("out", "folder for checkpoints (last.pt, previous.pt) and log.jsonl; the demo's is out-demo")
    init: str = option(None, "start from the weights of a checkpoint, ours or the release's, teacher included")
    resume: bool = option(False, "go on with the run in --out, exactly where its last checkpoint stands")
    steps: int = option(400_000, "optimizer updates")
    epochs: float = option(None, "the same, in passes over the data")
    batch_size: int = option(48, "clips per update, over all processes")
    accumulate: int = option(1, "parts a process splits its share of the batch into, for less memory")
    lr: float = option(5e-4, "peak learning rate; in proportion to --batch-size unless given")
    warmup_steps: int = option(53_333, "linear warm-up; in proportion to --steps unless given", least=0)
    weight_decay: float = option(0.05, "decoupled; none on biases and other 1-D tensors")
    beta1: float = option(0.9, "Adam")
    beta2: float = option(0.95, "Adam")
    adam_eps: float = option(1e-8, "Adam")
    grad_clip: float = option(4.0, "largest norm of the gradient")
    ema_decay: float = option(0.9998, "teacher's decay tau at the start")
    ema_end_decay: float = option(0.99999, "teacher's decay tau after annealing")
    ema_anneal_steps: int = option(100_000, "updates from one to the other; in proportion to --steps unless given", least=0)
    collapse_std: float = option(0.01, "stop when targets or predictions vary less than this")
    stats: str = option("audioset", "mean and std to normalise with: a data set's, or measured on --data",
                        choices=("audioset", "esc50", "spc2", "measure"))
    seed: int = option(0, "of weights, data order, masks and noise", least=0)
    workers: int = option(None, WORKERS_HELP, least=0)
    device: str = option("auto", "where to train", choices=("auto", "cuda", "cpu", "mps"))
    precision: str = option(None, PRECISION_HELP, choices=tuple(PRECISIONS))
    compile: bool = option(None, COMPILE_HELP)
    log_every: int = option(10, "steps between lines of log.jsonl")
    save_every: int = option(1000, "steps between checkpoints")
    probe: str = option(None, "labelled sound, as finetune.py takes it, to watch nearest neighbours on: before the first step, "
                              "along the way and at the end; the demo brings its own")
    probe_every: int = option(None, "steps between those along the way; default: none there")

    def __post_init__(self):
        check_numbers(self)

    def scaled(self, **changes):
        """The recipe with `changes`; what they do not name keeps its proportion to the steps and the batch."""
        new = dataclasses.replace(self, **changes)
        for name in ("warmup_steps", "ema_anneal_steps"):
            if name not in changes:
                setattr(new, name, round(getattr(self, name) * new.steps / self.steps))
        if "lr" not in changes:
            new.lr = self.lr * new.batch_size / self.batch_size
        return new

    def learning_rate(self, update):
        """Of update 1, 2, ...: linear warm-up from 0, then one cosine to 0 at the last."""
        if update <= self.warmup_steps:
            return self.lr * update / self.warmup_steps
        progress = (update - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * (1 + math.cos(math.pi * progress)) / 2

    def teacher_decay(self, update):
        """After update 1, 2, ...: rises linearly, then stays."""
        progress = min(1.0, update / max(1, self.ema_anneal_steps))
        return self.ema_decay + (self.ema_end_decay - self.ema_decay) * progress


def make_optimizer(model, recipe):
    """AdamW over student and decoder; no weight decay on biases and other 1-D tensors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(recipe.beta1, recipe.beta2), eps=recipe.adam_eps, fused=True)


# ---------------------------------------------------------------------------------------------------------
# Training: the loop
# ---------------------------------------------------------------------------------------------------------
# A run is a function of its settings, its data and its seed. What each step draws depends on (seed, step, row
# of the batch) alone: not on the number of processes or loader workers, nor on where the run was interrupted.


class Shares:
    """Clip numbers for the DataLoader: this process's parts of each step's batch, from step `start` on.

    The clips come in an endless stream of epochs, each in the order that `order(epoch)` gives; step s takes the
    batch_size positions from s * batch_size. Part m of process r is the rows from (m * world + r) * part_size.
    """

    def __init__(self, order, recipe, start=0, rank=0, world=1):
        self.order, self.recipe, self.start, self.rank, self.world = order, recipe, start, rank, world
        self.part_size = recipe.batch_size // (recipe.accumulate * world)

    def rows(self, part):
        first = (part * self.world + self.rank) * self.part_size
        return range(first, first + self.part_size)

    def __iter__(self):
        epoch, order = 0, self.order(0)
        for step in range(self.start, self.recipe.steps):
            for part in range(self.recipe.accumulate):
                share = []
                for row in self.rows(part):
                    wanted, place = divmod(step * self.recipe.batch_size + row, len(order))
                    if wanted != epoch:
                        epoch, order = wanted, self.order(wanted)
                    share.append(order[place].item())
                yield share


def shuffled(count, seed):
    """-> a function from an epoch to its order of `count` clips."""
    return lambda epoch: torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def draw_views(config, recipe, step, rows, device):
    """Masks (B, C, N) and decoder noise (B, C, N, D) for `rows` of the batch of a step."""
    generator = torch.Generator(device)
    seed = (recipe.seed * 1_000_003 + step) * 65_536
    grid = (config.frames // PATCH, MEL_BINS // PATCH)
    mask = draw_masks(config, recipe.batch_size, grid, device=device, generator=generator.manual_seed(seed))
    noise = torch.empty(len(rows), config.clones, config.patches, config.dim, device=device)
    for part, row in zip(noise, rows):
        part.normal_(generator=generator.manual_seed(seed + 1 + row))
    return mask[rows.start : rows.stop], noise


def ignore_signals(_):
    """For loader workers: the main process decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Machine:
    """Where the run is: device, arithmetic, and this process's place among those that torchrun started."""

    def __init__(self, recipe, packed=False):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = next(kind for kind in here if here[kind]) if recipe.device == "auto" else recipe.device
        if not here[kind]:
            raise UsageError(f"--device {kind}: there is none here")
        self.device, precision = torch.device(kind), "float32"
        if kind == "cuda":
            self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            precision = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        elif kind == "cpu" and {"avx512_bf16", "amx_bf16"} & {k for k, has in torch.cpu.get_capabilities().items() if has}:
            precision = "bfloat16"  # 1.4 to 1.9 times as fast as float32
        self.dtype = PRECISIONS[recipe.precision or precision]
        self.compile = recipe.compile if recipe.compile is not None else kind == "cuda"
        self.workers = recipe.workers
        if self.workers is None:
            self.workers = 0 if packed else min(8, max(1, os.cpu_count() // self.world - 1))
        if self.world > 1:
            torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")

    def compiled(self, model):
        return torch.compile(model, dynamic=False) if self.compile else model  # all shapes are fixed

    def wrap(self, model):
        """The model as the loop calls it."""
        model = self.compiled(model)
        return nn.parallel.DistributedDataParallel(model) if self.world > 1 else model

    @contextlib.contextmanager
    def arithmetic(self):
        """Mixed precision, unless it is float32."""
        with contextlib.ExitStack() as stack:
            if self.dtype != torch.float32:
                stack.enter_context(torch.autocast(self.device.type, self.dtype))
                if self.device.type == "cpu":  # its fused attention is slow in 16 bits: 19 ms for 5 ms (32 x 3 heads, 52 tokens)
                    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # "cuda", but the CPU's too
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    def total(self, values):
        """Sum of a tensor over the processes."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def most(self, number):
        """Largest of a number over the processes."""
        value = torch.tensor(float(number), device=self.device)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return value.item()

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)


def make_scaler(machine):
    return torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)


def add_gradients(net, config, recipe, machine, scaler, sound, step, rows):
    """Forward and backward for some `rows` of a step's batch, sound (waveforms, lengths) -> losses. Neither this nor
    `update` makes the host wait for the device."""
    waveforms, lengths = (x.to(machine.device, non_blocking=True) for x in sound)
    x = spectrogram(waveforms, lengths, config.frames, config.mean, config.std)  # (B, 1, T, 128)
    mask, noise = draw_views(config, recipe, step, rows, machine.device)
    with machine.arithmetic():
        losses = net(x, mask, noise)
    scaler.scale(losses["loss"] / recipe.accumulate).backward()
    return losses


def skip_unless_finite(optimizer, norm):
    """Have the next optimizer step do nothing if the gradients' norm is not finite -> 1 then, else 0. `found_inf` is how a
    GradScaler tells a fused optimizer so, in float16: on the device, without the host's waiting to know."""
    skip = (~norm.isfinite()).float()
    if skip.device.type != "mps":  # untested there
        optimizer.found_inf = skip
    return skip


def update(model, optimizer, scaler, recipe, step):
    """Update 1, 2, ... of student, decoder and teacher from the gradients -> their norm. Where that is not finite, all stay
    as they are."""
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate(step)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
    skip = skip_unless_finite(optimizer, norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    model.update_teacher(recipe.teacher_decay(step), skip)
    return norm


def train(config, recipe, clips, machine, resumed=None, labelled=None):
    """Pre-train on `clips` -> the number of the signal that stopped it, or 0. `labelled`: what to probe the encoder on."""
    device, step = machine.device, 0
    torch.manual_seed(recipe.seed)
    model = EAT(config).to(device)
    if recipe.init and not resumed:
        machine.say(load_initial(model, recipe.init))
    optimizer, scaler = make_optimizer(model, recipe), make_scaler(machine)
    if resumed:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        step = resumed["step"]
    net = machine.wrap(model)
    shares = Shares(shuffled(len(clips), recipe.seed), recipe, step, machine.rank, machine.world)
    batches = iter(DataLoader(
        clips, batch_sampler=shares, num_workers=machine.workers, collate_fn=lambda batch: batch,
        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals))
    stop = StopSignal(machine)
    log = Log(recipe, step, machine, dict(clips.skipped))
    if labelled and not resumed and machine.rank == 0:
        log.lines.append({"step": 0, **probe(model.student, labelled, machine)})

    def save(last):
        if machine.rank == 0:
            try_to_save(recipe.out, {
                "config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe), "step": step,
                "clips": len(clips), "processes": machine.world, "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}, last)

    while step < recipe.steps and not stop.agreed:
        for part in range(recipe.accumulate):
            *sound, _, skipped = next(batches)
            log.skipped |= skipped
            if len(sound[0]) < shares.part_size:
                save(last=True)
                raise AudioError(recipe.data, f"no clip can be used any more; {describe_skipped(skipped)}")
            if machine.world > 1:  # gradients meet after the last part of the batch only
                net.require_backward_grad_sync = part == recipe.accumulate - 1
            log.add(add_gradients(net, config, recipe, machine, scaler, sound, step, shares.rows(part)))
        step += 1
        log.add_update(update(model, optimizer, scaler, recipe, step))

        look = step % recipe.log_every == 0 or step == recipe.steps
        last = stop.agree(look) or step == recipe.steps
        due = step % recipe.save_every == 0 and not log.not_finite.row  # amid such steps the weights may be spoilt
        probed = labelled and (step % (recipe.probe_every or recipe.steps) == 0 or step == recipe.steps)
        if look or last or due or probed:
            # Stops a run that has gone wrong, so that it is not saved.
            log.write(step, (lambda: probe(model.student, labelled, machine)) if probed else dict)
        if last or due:
            save(last)
    log.close()
    stop.restore()
    return stop.agreed if step < recipe.steps else 0


def try_to_save(folder, state, last):
    """Save a checkpoint; if that fails the run goes on, as the next one may succeed, unless there will be none."""
    try:
        save_checkpoint(folder, state)
    except OSError as error:
        why = f"could not save to {folder}: {error.strerror or error}; the last good checkpoint is {last_good(folder)}"
        if last:
            raise TrainingStopped(f"{why}. Mend that, and --resume does the steps since then again") from None
        print(f"{why}; going on, to try again at the next one", file=sys.stderr, flush=True)


def last_good(folder):
    return next(iter(find_checkpoints(folder)), "none yet")


def load_initial(model, path):
    """Start from a checkpoint: with all that pre-training has, or an encoder, from which the teacher then starts too."""
    state = read_checkpoint(path)
    if part_of(state, "decoder.") and part_of(state, "teacher."):
        fill(model, state["model"], path)
        return f"init     student, decoder and teacher of {path}"
    fill(model.student, part_of(state, "student.") or part_of(state, "encoder."), path)
    model.teacher.load_state_dict(model.student.state_dict())
    return f"init     the encoder of {path} as student and teacher; it has no decoder, which starts from random weights"


class StopSignal:
    """Ctrl-C and SIGTERM end the run after the step at hand, with a checkpoint; the second one ends it at once."""

    def __init__(self, machine):
        self.machine, self.caught, self.agreed = machine, 0, 0
        self.before = {number: signal.signal(number, self.catch) for number in (signal.SIGINT, signal.SIGTERM)}

    def catch(self, number, frame):
        self.caught = number
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun passes on what its processes had from the terminal already
            signal.signal(number, signal.SIG_DFL)

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agree(self, look):
        """The signal to stop for, or 0. Several processes must stop at the same step; where asking makes the host wait for
        the device they ask when they `look`."""
        if self.machine.world == 1:
            self.agreed = self.caught
        elif look or self.machine.device.type == "cpu":
            self.agreed = int(self.machine.most(self.caught))
        return self.agreed


class JsonLines:
    """A file of JSON, a line each. What a full disk does not take now is written with the next line."""

    def __init__(self, path, keep):
        """`keep`: which of the lines that are there already; those after the checkpoint of a resumed run will come again."""
        self.path, self.waiting = path, b""
        if os.path.exists(path):
            with open(path + ".part", "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.read(path) if keep(line))
            os.replace(path + ".part", path)

    @staticmethod
    def read(path):
        """The lines, without those that a kill or a power cut spoilt."""
        lines = []
        with open(path, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict) and "step" in line]

    def append(self, line):
        self.waiting += json.dumps(line).encode() + b"\n"
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.tell()
                if file.write(self.waiting) < len(self.waiting):
                    file.truncate(end)
                    raise OSError("disk full")
            self.waiting = b""
        except OSError as error:
            if self.waiting.count(b"\n") == 1:
                print(f"{self.path}: {error.strerror or error}; its lines wait until that is mended", file=sys.stderr, flush=True)


class NotFinite:
    """Counts the updates that did nothing, as their gradients were not finite; on the device, so that the host need not wait."""

    def __init__(self, machine):
        self.count = self.row = self.longest = torch.zeros((), device=machine.device)
        # The scaler of float16 may need 16 such updates, halving its scale from 65536, to find the right one.
        self.most = 26 if machine.dtype == torch.float16 else 10

    def add(self, norm):
        bad = ~norm.isfinite()
        self.count, self.row = self.count + bad, (self.row + 1) * bad
        self.longest = torch.maximum(self.longest, self.row)

    def take(self):
        """-> how many since the last call."""
        count, self.count = int(self.count), torch.zeros_like(self.count)
        return count

    def check(self):
        """Raises TrainingStopped where too many came in a row."""
        if self.longest >= self.most:
            raise TrainingStopped(f"the gradients were not finite {int(self.longest)} times in a row. Try a lower --lr or a "
                                  "longer warm-up, and look for clips that are far too loud")


class Log:
    """log.jsonl, a line every few steps with the averages since the last; and a progress bar on a terminal."""

    def __init__(self, recipe, step, machine, skipped):
        self.recipe, self.machine, self.skipped, self.named = recipe, machine, skipped, len(skipped)
        self.last_step, self.since = step, time.monotonic()
        self.sums, self.counts = {}, {}
        self.not_finite = NotFinite(machine)
        self.bar = tqdm(total=recipe.steps, initial=step, unit="step", disable=None if machine.rank == 0 else True)
        if machine.rank == 0:
            # Of a run that was killed before its first checkpoint nothing is kept: it begins anew.
            self.lines = JsonLines(os.path.join(recipe.out, "log.jsonl"), lambda line: step > 0 and line["step"] <= step)

    def add(self, values):
        """Scalars of a step, summed on the device, so that the host need not wait; those that are not finite left out."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums.get(name, 0) + value.nan_to_num(0, 0, 0)
            self.counts[name] = self.counts.get(name, 0) + value.isfinite()

    def add_update(self, norm):
        self.add({"grad_norm": norm})
        self.not_finite.add(norm)

    def write(self, step, measure=dict):
        """A line, with what `measure` finds; the time that takes is not the steps'."""
        sums, counts = self.machine.total(torch.stack([*self.sums.values(), *self.counts.values()])).view(2, -1).cpu()
        values = dict(zip(self.sums, (sums / counts).tolist()))
        steps, seconds = step - self.last_step, time.monotonic() - self.since
        line = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()},
                "lr": self.recipe.learning_rate(step), "teacher_decay": self.recipe.teacher_decay(step),
                "clips_per_second": steps * self.recipe.batch_size / seconds, "skipped": len(self.skipped),
                "not_finite": self.not_finite.take()}
        if self.machine.rank == 0:
            line |= measure()
            self.lines.append(line)
            shown = ("loss", "frame_loss", "utterance_loss", "target_std", "prediction_std", "lr", "clips_per_second", "knn_mean")
            short = {name: "none" if line[name] is None else f"{line[name]:.4g}" for name in shown if name in line}
            self.bar.update(steps)
            self.bar.set_postfix(short)
            every = max(self.recipe.log_every, self.recipe.steps // 40)
            if self.bar.disable and (step // every > self.last_step // every or step == self.recipe.steps):
                print(f"step {step}/{self.recipe.steps}", *(f"{k} {v}" for k, v in short.items()), flush=True)
            if new := dict(list(self.skipped.items())[self.named :]):
                self.bar.write(f"skipped {len(self.skipped)} so far; new: {describe_skipped(new)}", file=sys.stderr)
                self.named = len(self.skipped)
            if line["not_finite"]:
                self.bar.write(f"step {step}: the gradients of {line['not_finite']} of the last {steps} steps were not finite, "
                               "and changed nothing", file=sys.stderr)
        self.last_step, self.since, self.sums, self.counts = step, time.monotonic(), {}, {}
        try:
            self.check(values)
        except TrainingStopped as error:
            self.close()
            raise TrainingStopped(f"stopped at step {step}: {error}; the last good checkpoint is "
                                  f"{last_good(self.recipe.out)}") from None

    def check(self, values):
        """Stop a run that has gone wrong, before it is saved."""
        self.not_finite.check()
        if min(values["target_std"], values["prediction_std"]) < self.recipe.collapse_std:
            raise TrainingStopped(
                f"collapsed: target_std {values['target_std']:.2g}, prediction_std {values['prediction_std']:.2g}. Try a slower "
                "teacher (--ema-decay nearer 1), a lower --lr or a larger --batch-size")

    def close(self):
        self.bar.close()


# ---------------------------------------------------------------------------------------------------------
# Did it learn? A probe: nearest neighbours on frozen features
# ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(model, config, clips, numbers, machine, batch_size=32):
    """Yields (what `model` makes of a batch of clips' spectrograms, the clips' numbers), in order, with a progress bar;
    clips that cannot be read are missing, and named in clips.skipped."""
    clips = copy.copy(clips)
    clips.replace = False
    chunks = [chunk.tolist() for chunk in torch.as_tensor(numbers).split(batch_size)]
    loader = DataLoader(clips, batch_sampler=chunks, num_workers=machine.workers, collate_fn=lambda batch: batch,
                        worker_init_fn=ignore_signals)
    for waveforms, lengths, used, skipped in tqdm(loader, "clips", disable=None, leave=False):
        clips.skipped |= skipped
        if len(used):
            yield run_batch(model, config, waveforms.to(machine.device), lengths.to(machine.device), machine, batch_size), used


def run_batch(model, config, waveforms, lengths, machine, batch_size):
    """What `model` makes of at most `batch_size` clips; a compiled one always gets so many, to be compiled once."""
    count = len(waveforms)
    if machine.compile:
        waveforms = F.pad(waveforms, (0, 0, 0, batch_size - count))
        lengths = F.pad(lengths, (0, batch_size - count), value=waveforms.shape[1])
    x = spectrogram(waveforms, lengths, config.frames, config.mean, config.std)
    with machine.arithmetic():
        return model(x)[:count]


def features(encoder, config, clips, numbers, machine):
    """Frozen features of some clips -> {"CLS": (n, D), "mean of patches": (n, D)} and their numbers, on the CPU."""
    rows = [(x[:, 0].float().cpu(), x[:, 1:].float().mean(1).cpu(), used)
            for x, used in outputs(machine.compiled(encoder.eval()), config, clips, numbers, machine)]
    cls, mean, used = map(torch.cat, zip(*rows))
    return {"CLS": cls, "mean of patches": mean}, used


def nearest_neighbours(bank, bank_targets, queries, k=10):
    """Scores (m, classes) of queries (m, D): the k nearest of the bank (n, D) vote for what they are, bank_targets
    (n, classes), weighted by cosine similarity; features are standardised by the bank's mean and deviation."""
    mean, std = bank.mean(0), bank.std(0) + 1e-6
    bank, queries = (F.normalize((x - mean) / std, dim=1) for x in (bank, queries))
    similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    return (similarity[..., None] * bank_targets[nearest]).sum(1)


PROBED = {"knn_cls": "CLS", "knn_mean": "mean of patches"}  # names in log.jsonl, and of the features


def open_probe(recipe, frames):
    """The Labelled clips, cut to `frames`, that --probe names, or None."""
    if not recipe.probe:
        if recipe.probe_every:
            raise UsageError("--probe-every: --probe must name the labelled sound to probe on")
        return None
    labelled = open_labelled(recipe.probe, frames, seed=recipe.seed)
    if labelled.multi_label:
        raise UsageError(f"--probe {recipe.probe}: nearest neighbours need clips of one label each")
    return labelled


def probe(encoder, labelled, machine):
    """kNN accuracy averaged over the folds of a Labelled data set -> {"knn_cls", "knn_mean"}."""
    machine = copy.copy(machine)
    machine.compile = False  # it would be, anew each time
    # A copy, as the student in training must not be put in eval mode.
    kinds, used = features(copy.deepcopy(encoder), encoder.config, labelled.clips, range(len(labelled.clips)), machine)
    targets, accuracy = labelled.targets(used.tolist()), collections.defaultdict(list)
    for fold in labelled.folds.values():
        train, test = (torch.isin(used, numbers) for numbers in fold)
        for name, kind in PROBED.items():
            scores = nearest_neighbours(kinds[kind][train], targets[train], kinds[kind][test])
            accuracy[name].append((scores.argmax(1) == targets[test].argmax(1)).float().mean().item())
    return {name: np.mean(each).item() for name, each in accuracy.items()}


# ---------------------------------------------------------------------------------------------------------
# Learning curves
# ---------------------------------------------------------------------------------------------------------


def plot(out):
    """Draw the learning curves of a run from its log.jsonl -> the picture's path."""
    path = os.path.join(out, "log.jsonl")
    if not os.path.exists(path):
        raise UsageError(f"{path}: no such file; a run writes it into its --out folder")
    if not (lines := JsonLines.read(path)):
        raise UsageError(f"{path}: nothing in it yet")
    panels = {"loss": ("frame_loss", "utterance_loss"), "standard deviation": ("target_std", "prediction_std"),
              "gradient norm": ("grad_norm",), "learning rate": ("lr",), "teacher decay": ("teacher_decay",),
              "clips a second": ("clips_per_second",)}
    if any("knn_mean" in line for line in lines):
        panels |= {"accuracy of nearest neighbours": ("knn_cls", "knn_mean")}
        del panels["clips a second"]
    figure, grid = pyplot().subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axes, (title, names) in zip(grid.flat, panels.items()):
        for name in names:
            if known := [(line["step"], line[name]) for line in lines if line.get(name) is not None]:
                axes.plot(*zip(*known), label=name.replace("_", " "), marker="." if "knn" in name else None)
        axes.set(title=title, xlabel="step", yscale="log" if title in ("loss", "gradient norm") else "linear")
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_formatter("{x:.5g}")
        if len(axes.lines) > 1:
            axes.legend()
    picture = os.path.join(out, "log.png")
    save_picture(figure, picture)
    return picture


# ---------------------------------------------------------------------------------------------------------
# Benchmark: how near to the rate of this device's matrix products?
# ---------------------------------------------------------------------------------------------------------


def step_flops(config, clips):
    """Floating-point operations of a training step on `clips` clips: those of the matrix products, attention and
    convolutions; a backward pass counts as two forward."""
    D, N, K = config.dim, config.patches, config.visible

    def encoder(L):  # multiply-adds of the blocks for L tokens
        return config.depth * (L * D * D * (4 + 2 * config.mlp_ratio) + 2 * L * L * D)

    embed = N * PATCH * PATCH * D
    decoder = N * config.decoder_layers * D * D // config.decoder_groups * config.decoder_kernel**2 + N * D * D
    return 2 * clips * (embed + encoder(1 + N) + 3 * embed + 3 * config.clones * (encoder(1 + K) + decoder))


def seconds(work, machine, times=1):
    """Of one call, on the average of some in a row."""
    start = time.perf_counter()
    for _ in range(times):
        work()
    if machine.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def bench(given):
    """Time the training step on random sound, and what it is made of, beside a large matrix product."""
    given = {"preset": "base", "steps": 10, **given}
    config = EATConfig.preset(given["preset"], **fields_of(EATConfig, given))
    machine = Machine(Recipe(**fields_of(Recipe, given)))
    cuda = machine.device.type == "cuda"
    recipe = Recipe(**{"batch_size": 12 if cuda else 1, **fields_of(Recipe, given)})
    B, samples = recipe.batch_size, clip_samples(config.frames)
    torch.manual_seed(recipe.seed)
    model = EAT(config).to(machine.device)
    net, optimizer, scaler = machine.wrap(model), make_optimizer(model, recipe), make_scaler(machine)
    sound = [x.to(machine.device) for x in (0.1 * torch.randn(B, samples), torch.full((B,), samples))]

    def step():
        add_gradients(net, config, recipe, machine, scaler, sound, 0, range(B))
        update(model, optimizer, scaler, recipe, 1)

    for _ in range(3):
        seconds(step, machine)
    memory = peak_memory(machine)
    size = 8192 if cuda else 2048
    square = torch.randn(size, size, device=machine.device)
    squares = (square.to(machine.dtype), square)
    rounds = []  # in turn, as other work on the machine comes and goes
    for _ in tqdm(range(5), "bench", disable=None, leave=False):
        rounds.append([2 * size**3 / seconds(lambda x=x: x @ x, machine, 5) for x in squares]
                      + [seconds(step, machine, max(1, recipe.steps // 5))])
    rate, rate32, taken = np.median(rounds, axis=0).tolist()
    flops = step_flops(config, B)
    share = np.median([flops / took / product for product, _, took in rounds]).item()
    parts = time_parts(model, net, optimizer, config, recipe, machine, sound)
    device = torch.cuda.get_device_name() if cuda else f"{machine.device}, {torch.get_num_threads()} threads"
    result = {
        "device": device, "precision": str(machine.dtype).split(".")[1], "compiled": machine.compile, "torch": torch.__version__,
        "preset": given["preset"], "dim": config.dim, "depth": config.depth, "frames": config.frames, "clones": config.clones,
        "batch_size": B, "matrix_tflops": rate / 1e12, "float32_matrix_tflops": rate32 / 1e12, "seconds_per_step": taken,
        "clips_per_second": B / taken, "model_tflops": flops / taken / 1e12, "share_of_matrix_rate": share,
        "peak_memory_gib": memory / 2**30, "parts": parts,
    }
    print(f"machine   {device}; {result['precision']}, {'' if machine.compile else 'not '}compiled; torch {torch.__version__}\n"
          f"model     {given['preset']}: D {config.dim}, {config.depth} blocks; {B} clips of {config.frames / 100:.2f} s x "
          f"{config.clones} clones; peak memory {memory / 2**30:.1f} GiB\n"
          f"matrix    {rate / 1e12:.3f} TFLOP/s, a product of {size} x {size}; in float32 {rate32 / 1e12:.3f}\n"
          f"step      {taken:.3f} s, {B / taken:.3g} clips/s, {flops / taken / 1e12:.3f} TFLOP/s: {share:.0%} of the matrix rate\n"
          "parts     " + ", ".join(f"{name} {part:.1%}" for name, part in parts.items()) + "\n" + json.dumps(result))
    return 0


def peak_memory(machine):
    """Bytes: on the GPU, or of this process."""
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def time_parts(model, net, optimizer, config, recipe, machine, sound):
    """The parts of a step, each timed by itself on the same inputs -> their shares of the sum."""
    B, grid = recipe.batch_size, (config.frames // PATCH, MEL_BINS // PATCH)
    x = spectrogram(*sound, config.frames, config.mean, config.std)
    mask, noise = draw_views(config, recipe, 0, range(B), machine.device)
    visible, masked = split_mask(mask, config.visible)
    targets, student, decode = map(machine.compiled, (model.targets, model.student, model.decode))
    with machine.arithmetic():
        tokens = model.student(x, visible)[:, 1:].detach().requires_grad_()

    def in_precision(work, *inputs):
        def run():
            with machine.arithmetic():
                return work(*inputs)
        return run

    forward = in_precision(net, x, mask, noise)
    works = {
        "fbank": lambda: spectrogram(*sound, config.frames, config.mean, config.std),
        "masks, noise": lambda: draw_views(config, recipe, 0, range(B), machine.device),
        "teacher": in_precision(targets, x),
        "student": in_precision(student, x, visible),
        "decoder": in_precision(decode, tokens, visible, grid, noise, masked.flatten(0, 1)),
        "forward": forward,
        "backward": lambda: forward()["loss"].backward(),
        "optimizer": lambda: (nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip), optimizer.step()),
        "EMA": lambda: model.update_teacher(recipe.ema_decay),
    }
    parts = {}
    for name, work in works.items():
        seconds(work, machine)
        parts[name] = np.median([seconds(work, machine) for _ in range(5)]).item()
    parts["backward"] = max(0.0, parts["backward"] - parts.pop("forward"))
    return {name: part / sum(parts.values()) for name, part in parts.items()}


# ---------------------------------------------------------------------------------------------------------
# Checkpoints of the release: fairseq files and Hugging Face folders
# ---------------------------------------------------------------------------------------------------------

# Our names of an encoder's parts, fairseq's and Hugging Face's; blocks.*, fc_norm.* and head.* are the same in all.
PLACE = "modality_encoders.IMAGE."
RELEASE_NAMES = (
    ("cls", PLACE + "extra_tokens", "extra_tokens"),
    ("patches.proj.", PLACE + "local_encoder.proj.", "local_encoder.proj."),
    ("norm.", PLACE + "context_encoder.norm.", "pre_norm."),
    ("decoder.", PLACE + "decoder.", None),
)
POSITIONS = ("fixed_positional_encoder.positions", PLACE + "fixed_positional_encoder.positions")  # computed here


def our_name(name):
    """`blocks.0.norm1.weight`, `decoder.convs.0.weight` ... of a name in fairseq's or Hugging Face's layout."""
    name = name.removeprefix("model.")
    for ours, *theirs in RELEASE_NAMES:
        for prefix in filter(None, theirs):
            if name.startswith(prefix):
                return re.sub(r"^decoder\.blocks\.(\d+)\.0\.", r"decoder.convs.\1.", ours + name.removeprefix(prefix))
    return name


def translate(model, teacher, settings):
    """Tensors in the release's names, the teacher's, and what its config says -> as read_checkpoint returns it."""
    model, teacher = ({our_name(name): tensor for name, tensor in tensors.items() if name.removeprefix("model.") not in POSITIONS}
                      for tensors in (model, teacher))
    encoder = "encoder." if "head.weight" in model else "student."
    model = {name if name.startswith(("decoder.", "fc_norm.", "head.")) else encoder + name: x for name, x in model.items()}
    model |= {f"teacher.{name}": tensor for name, tensor in teacher.items()}
    known = dataclasses.asdict(EATConfig()) | sizes_of(model)
    known["heads"] = max(1, known["dim"] // 64)  # base, large and their kin; where the file says so, what it says
    state = {"config": known | {k: v for k, v in settings.items() if v is not None}, "model": model}
    if "head.weight" in model:
        classes = len(model["head.weight"])
        state |= {"classes": [str(k) for k in range(classes)], "multi_label": classes == 527}  # AudioSet's
    return state


def fairseq_settings(config):
    """What a fairseq config (stand-ins of omegaconf's classes) says of an EATConfig's fields."""
    config = plain(config) or {}
    while "pretrained_model_args" in config.get("model", {}):  # a fine-tuned file has that of pre-training inside
        config = config["model"]["pretrained_model_args"]
    model = config.get("model") or {}
    sound = (model.get("modalities") or {}).get("image") or {}
    names = {"embed_dim": "dim", "depth": "depth", "num_heads": "heads", "mlp_ratio": "mlp_ratio", "norm_eps": "norm_eps",
             "clone_batch": "clones", "target_length": "frames", "mask_prob": "mask_ratio", "mask_length": "mask_block",
             "mask_prob_adjust": "mask_adjust", "mask_noise_std": "mask_noise_std"}
    return {ours: place[theirs] for place in (model, sound) for theirs, ours in names.items() if theirs in place}


def read_hugging_face(path):
    """A folder of config.json and model.safetensors, or the latter with the former beside it."""
    from safetensors.torch import load_file

    folder, file = (path, os.path.join(path, "model.safetensors")) if os.path.isdir(path) else (os.path.dirname(path), path)
    if not os.path.exists(file):
        raise UsageError("no model.safetensors in it")
    config, settings = {}, os.path.join(folder, "config.json")
    if os.path.exists(settings):
        with open(settings) as text:
            config = json.load(text)
    names = {"embed_dim": "dim", "depth": "depth", "num_heads": "heads", "mlp_ratio": "mlp_ratio", "norm_eps": "norm_eps"}
    names |= {"norm_mean": "mean", "norm_std": "std"}  # ours: the release's files leave them to their reader
    found = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    state = translate(load_file(file), {}, found | {"frames": config.get("img_size", [None])[0]})
    if "classes" in state and "id2label" in config:
        state["classes"] = [config["id2label"][k] for k in state["classes"]]
        state["multi_label"] = config.get("problem_type") == "multi_label_classification"
    return state


def export(source, folder):
    """Write any checkpoint's encoder, or classifier, in the Hugging Face layout: config.json and model.safetensors."""
    from safetensors.torch import save_file

    state = read_checkpoint(source)
    config, tensors = EATConfig(**state["config"]), {}
    for name, tensor in (part_of(state, "student.") or part_of(state, "encoder.")).items():
        for ours, _, theirs in RELEASE_NAMES:
            if theirs and name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        tensors["model." + name] = tensor.contiguous()
    tensors["model." + POSITIONS[0]] = sincos_positions(768, MEL_BINS // PATCH, config.dim)[None]  # as the release: 2 minutes
    tensors |= {f"model.{name}": tensor.contiguous() for name, tensor in state["model"].items()
                if name.startswith(("fc_norm.", "head."))}
    more = {}  # what the release's files do not say, and its own checkpoints need not
    if (config.mean, config.std) != (EATConfig.mean, EATConfig.std):
        more |= {"norm_mean": config.mean, "norm_std": config.std}
    if "classes" in state and state["classes"] != [str(k) for k in range(len(state["classes"]))]:
        kind = "multi_label_classification" if state["multi_label"] else "single_label_classification"
        more |= {"id2label": dict(enumerate(state["classes"])), "problem_type": kind}
    make_folder(folder)
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({
            "architectures": ["EATModel"], "model_type": "eat", "embed_dim": config.dim, "depth": config.depth,
            "num_heads": config.heads, "patch_size": PATCH, "stride": PATCH, "in_chans": 1, "mel_bins": MEL_BINS,
            "max_length": 768, "mlp_ratio": config.mlp_ratio, "qkv_bias": True, "drop_rate": 0.0, "attn_drop_rate": 0.0,
            "activation_dropout": 0.0, "post_mlp_drop": 0.0, "start_drop_path_rate": 0.0, "end_drop_path_rate": 0.0,
            "layer_norm_first": False, "norm_eps": config.norm_eps, "norm_affine": True, "fixed_positions": True,
            "img_size": [config.frames, MEL_BINS], "torch_dtype": "float32",
            "model_variant": "finetune" if "classes" in state else "pretrain",
            "num_classes": len(state["classes"]) if "classes" in state else 527, **more,
        }, file, indent=1)
    return folder


# A fairseq file is a zip of raw tensors and a pickle of objects whose modules nobody has. Reading it calls nothing:
# tensors and plain containers are rebuilt here, every other class becomes an Inert that keeps what it was given,
# and what would call a function of Python's or torch's is refused.


class Inert:
    """Stands in for an object of an unknown class."""

    def __new__(cls, *args):
        if cls.refused:
            raise UsageError(f"refused: it would call {cls.__module__}.{cls.__name__}")
        self = object.__new__(cls)
        self.args, self.fields = args, {}
        return self

    def __init__(self, *args):
        pass

    def __setstate__(self, fields):
        self.fields = fields if isinstance(fields, dict) else {}

    def append(self, item):
        pass

    def __setitem__(self, key, value):
        pass


def plain(value):
    """Settings out of omegaconf's nested containers, as dicts, lists and values."""
    if isinstance(value, Inert):
        return plain(value.fields.get("_content", value.fields.get("_val")))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if isinstance(key, str)}
    return [plain(item) for item in value] if isinstance(value, list) else value


class InertUnpickler(pickle.Unpickler):
    """Unpickles the data.pkl of a zip that torch.save wrote, without calling anything from it."""

    HARMLESS = {"argparse", "datetime", "enum", "pathlib", "typing"}  # classes of theirs that settings may hold

    def __init__(self, archive, folder):
        super().__init__(io.BytesIO(archive.read(folder + "data.pkl")))
        self.archive, self.folder = archive, folder

    def find_class(self, module, name):
        if (module, name) in (("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2")):
            return collections.OrderedDict if name == "OrderedDict" else self.tensor
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name.removesuffix("Storage").lower(), None)  # its dtype, as FloatStorage's
        known = module.split(".")[0] in {*sys.stdlib_module_names, "__builtin__", "copy_reg", "torch"}
        made_here = {"refused": known and module.split(".")[0] not in self.HARMLESS, "__module__": module}
        if (module, name) == ("collections", "defaultdict"):
            made_here["refused"] = False
        return type(name, (Inert,), made_here)

    def persistent_load(self, key):
        """("storage", dtype, name in the zip, device, elements) -> 1-D tensor."""
        _, dtype, name, _, count = key
        data = bytearray(self.archive.read(f"{self.folder}data/{name}"))
        if not isinstance(dtype, torch.dtype) or len(data) != count * dtype.itemsize:
            raise UsageError(f"tensor {name} is not whole")
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    @staticmethod
    def tensor(storage, offset, size, stride, *_):
        """A view of a storage; as_strided itself refuses one that reaches beyond."""
        if not isinstance(storage, torch.Tensor) or len(size) != len(stride):
            raise UsageError("refused: a tensor made of something else")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        if min((offset, *size, *stride)) < 0 or 0 not in size and last >= len(storage):
            raise UsageError("refused: a tensor that reaches beyond its data")
        return storage.as_strided(size, stride, offset).contiguous()


def unpickle_inert(path):
    """A file that torch.save wrote, other than plain -> its object."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1 or any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise UsageError("not a file that torch.save wrote")
        return InertUnpickler(archive, names[0].removesuffix("data.pkl")).load()


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------

# What a resumed run may be given anew: where it runs, not what it computes.
MAY_CHANGE = {"data", "out", "resume", "accumulate", "workers", "device", "precision", "compile", "log_every", "save_every",
              "probe", "probe_every"}


class Parser(argparse.ArgumentParser):
    """Flags in full, and one line for a wrong one, with the nearest right one."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def error(self, message):
        for word in message.split():
            near = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, 1) if word.startswith("--") else []
            if near and near[0] != word.rstrip(":"):
                message += f"; did you mean {near[0]}?"
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            near = difflib.get_close_matches(choice[1], re.findall(r"\w+", choice[2]), 1)
            message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: {message}\n")


def at_least(least):
    """An argparse type: a whole number of at least so many."""
    def number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be a number of at least {least}")
        return int(text)
    return number


def add_flags(parser, *kinds):
    """A flag for every field of some dataclasses; the parsed result holds only those that were given."""
    for kind in kinds:
        group = parser.add_argument_group(kind.__name__, kind.__doc__)
        types = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            default = "" if field.default in (None, False) else f" [{field.default}]"
            how = {"type": types[field.name], "choices": field.metadata.get("choices")}
            if types[field.name] is bool:
                how = {"action": argparse.BooleanOptionalAction}
            elif not how["choices"]:
                how["metavar"] = types[field.name].__name__.upper().replace("STR", "TEXT")
            group.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                               help=field.metadata["help"] + default, **how)


def keep_settings(given, settings, may_change, out):
    """A resumed run computes what it began to compute."""
    for name, value in given.items():
        if name not in may_change and value != settings[name]:
            raise UsageError(f"--{name.replace('_', '-')} {value}: the run in {out} has {settings[name]}, and a resumed run "
                             "keeps its settings; start another with another --out")


def settle(given):
    """Flags -> (EATConfig, Recipe, Clips, the checkpoint to go on from or None)."""
    given = {**({"out": "out-demo", "probe": "demo"} if given.get("data") == "demo" else {"out": Recipe.out}), **given}
    out, found = given["out"], find_checkpoints(given["out"])
    if found and given.get("resume"):
        resumed = newest_checkpoint(out)
        config, recipe = EATConfig(**resumed["config"]), Recipe(**resumed["recipe"])
        keep_settings(given, {**dataclasses.asdict(config), **dataclasses.asdict(recipe)}, MAY_CHANGE, out)
        recipe = dataclasses.replace(recipe, **{k: v for k, v in given.items() if k in MAY_CHANGE})
        return config, recipe, open_clips(recipe.data, config.frames, recipe.seed), resumed
    if found:
        raise UsageError(f"{out} holds a run already: --resume goes on with it, another --out starts beside it")
    if "data" not in given:
        raise UsageError("--data is missing: a folder of sound, or 'demo'")

    preset = given.get("preset", "demo" if given["data"] == "demo" else "base")
    sizes = read_checkpoint(given["init"])["config"] if "init" in given else fields_of(EATConfig, PRESETS[preset])
    config = EATConfig(**{**sizes, **fields_of(EATConfig, given)})
    clips = open_clips(given["data"], config.frames, given.get("seed", Recipe.seed))
    recipe = Recipe().scaled(**fields_of(Recipe, PRESETS[preset]))
    changes = {"preset": preset, **fields_of(Recipe, given)}
    if changes.get("epochs"):
        changes["steps"] = math.ceil(changes["epochs"] * len(clips) / changes.get("batch_size", recipe.batch_size))
    recipe = recipe.scaled(**changes)
    if not {"mean", "std"} & given.keys() and ("init" not in given or "stats" in given):
        mean, std = STATS[recipe.stats] if recipe.stats in STATS else measure_stats(clips)
        config = dataclasses.replace(config, mean=mean, std=std)
    return config, recipe, clips, None


def pretrain(given):
    """The main job -> exit status."""
    config, recipe, clips, resumed = settle(given)
    machine = Machine(recipe, clips.packed)
    parts = recipe.accumulate * machine.world
    if recipe.batch_size % parts or recipe.batch_size > len(clips):
        raise UsageError(f"--batch-size {recipe.batch_size}: must be at most the {len(clips)} clips of {recipe.data}"
                         + f", and a multiple of {parts} (parts x processes)" * (parts > 1))
    labelled = open_probe(recipe, config.frames)
    make_folder(recipe.out)
    machine.say(describe(config, recipe, clips, machine, resumed, labelled))
    stopped = train(config, recipe, clips, machine, resumed, labelled)
    path = os.path.join(recipe.out, "last.pt")
    if stopped:
        machine.say(f"stopped by {signal.Signals(stopped).name}; the same command with --resume goes on from {path}")
        return 128 + stopped
    if labelled and machine.rank == 0:
        print(f"\nk-nearest-neighbour accuracy (chance {1 / len(labelled.classes):.0%}):", *(
            f"    step {line['step']:7,}" + "".join(f"   {kind} {line[name]:6.1%}" for name, kind in PROBED.items())
            for line in JsonLines.read(os.path.join(recipe.out, "log.jsonl")) if "knn_mean" in line), sep="\n")
    machine.say(f"the encoder is in {path}")
    return 0


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; expected a folder to write to") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"{path}: cannot be written to")


def describe(config, recipe, clips, machine, resumed, labelled):
    """The run in a few lines, every number that was derived among them."""
    size = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in
            (("encoder", Encoder(config)), ("decoder", Decoder(config)))}
    lines = [
        f"data     {recipe.data}: {len(clips):,} clips of {config.frames / 100:.2f} s; spectrogram mean {config.mean}, "
        f"std {config.std}",
        f"model    {recipe.preset}: encoder {size['encoder']:.1f} M parameters, decoder {size['decoder']:.1f} M; "
        f"{config.visible} of {config.patches} patches visible in each of {config.clones} clones",
        f"recipe   {recipe.steps:,} steps x {recipe.batch_size} clips = "
        f"{recipe.steps * recipe.batch_size / len(clips):.1f} epochs; learning rate {recipe.lr:.3g} after "
        f"{recipe.warmup_steps:,} steps of warm-up; teacher decay {recipe.ema_decay} to {recipe.ema_end_decay} over "
        f"{recipe.ema_anneal_steps:,} steps; seed {recipe.seed}",
        f"machine  {machine.device}, {str(machine.dtype).split('.')[1]}, {'' if machine.compile else 'not '}compiled, "
        f"{machine.world} process(es) of {machine.workers} loader workers",
    ]
    if labelled:
        same = recipe.probe == recipe.data != "demo"
        lines.append(f"probe    {labelled}" + ", the very sound it is trained on" * same)
    if clips.skipped:
        lines.append(f"skipped  {len(clips.skipped)} files: {describe_skipped(clips.skipped)}")
    if resumed:
        lines.append(f"resumed  at step {resumed['step']:,}")
        if resumed["clips"] != len(clips):
            lines.append(f"warning  the run began with {resumed['clips']:,} clips: their order changes from here on")
        if resumed.get("processes", machine.world) != machine.world:
            lines.append(f"note     {resumed['processes']} processes before, {machine.world} now: the same batches, masks and "
                         "noise, shared out differently; results differ by rounding")
    elif recipe.resume:
        lines.append(f"resumed  nothing, as {recipe.out} holds no checkpoint: starting anew")
    return "\n".join(lines)


def guarded(program, job, given):
    """Run a job -> exit status. What the user can mend gets one line and 2, a run that has gone wrong one line and 1."""
    try:
        status = job(given)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return status
    except (UsageError, AudioError) as error:
        said, status = error, 2
    except (TrainingStopped, OSError) as error:
        said, status = error, 1
    except KeyboardInterrupt:
        said, status = "stopped", 130
    except (MemoryError, RuntimeError) as error:  # torch's own words, where they are about the machine and not about the code
        said, status = str(error).split("\n")[0], 1
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in said:
            said = f"out of memory: {said}. Try --accumulate 2 or more, a smaller --batch-size, fewer --clones, a smaller --preset"
        elif said.startswith("DataLoader worker"):
            said += " Try fewer --workers; --resume goes on from the last checkpoint"
        elif torch.distributed.is_initialized() and re.search("gloo|nccl|peer", said, re.IGNORECASE):
            said = f"another process of the run has ended: {said}"
        else:
            raise
    print(f"{program}: {said}", file=sys.stderr)
    return status


def main(argv=None):
    parser = Parser(
        prog="eat.py", description="Pre-train an EAT on a folder of sound.",
        epilog="examples:\n  python eat.py --data demo\n  python eat.py --data path/to/sound --preset tiny\n"
               "  python eat.py export out/last.pt FOLDER      as config.json and model.safetensors\n"
               "  python eat.py plot out                       its learning curves, as out/log.png\n"
               "  python eat.py bench --preset base            how fast is a training step here?")
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["export"]:
        parser = Parser(prog="eat.py export", description=export.__doc__)
        parser.add_argument("checkpoint", help="ours, or the release's")
        parser.add_argument("folder", help="where to write it")
        return guarded("eat.py", lambda args: print(export(args.checkpoint, args.folder)) or 0, parser.parse_args(argv[1:]))
    if argv[:1] == ["plot"]:
        parser = Parser(prog="eat.py plot", description=plot.__doc__)
        parser.add_argument("out", help="the --out folder of a run")
        return guarded("eat.py", lambda args: print(plot(args.out)) or 0, parser.parse_args(argv[1:]))
    if argv[:1] == ["bench"]:
        parser = Parser(prog="eat.py bench", description=bench.__doc__)
        add_flags(parser, Recipe, EATConfig)
        return guarded("eat.py", bench, vars(parser.parse_args(argv[1:])))
    add_flags(parser, Recipe, EATConfig)
    return guarded("eat.py", pretrain, vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
