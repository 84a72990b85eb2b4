"""Every test, grouped by the file it tests:  pytest test_eat.py

Those that need the released code's fixtures or real sound look for them in ../shared and skip
without it. Those that need an NVIDIA card skip without one:  pytest -m cuda test_eat.py  runs them
alone. Those that take minutes (kills at random moments, a run of 2,000 steps) are run only by
pytest -m slow test_eat.py
"""

import contextlib
import copy
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import types
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from matplotlib.figure import Figure
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.utils.flop_counter import FlopCounterMode

import data
import eat
import finetune
from data import AudioError, UsageError, fbank, load_audio, open_clips, spectrogram
from eat import EAT, EATConfig, Encoder, Recipe, inverse_block_mask
from finetune import Classifier, FineTune, average_precision

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
TINY = SHARED / "fixtures/tiny"
torch.set_num_threads(1)  # small models gain nothing from more, and runs compare bit by bit
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # else it imports torch anew for each one it checks
fixtures = pytest.mark.skipif(not (SHARED / "fixtures").exists(), reason="needs ../shared/fixtures")
real_sound = pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs ../shared/data")
linux = pytest.mark.skipif(not os.path.exists("/proc/self/cmdline"), reason="looks into /proc")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ here")
with warnings.catch_warnings():  # there is no file to register them in
    warnings.simplefilter("ignore")
    slow, cuda = pytest.mark.slow, pytest.mark.cuda


@pytest.fixture(autouse=True)
def only_when_asked_and_possible(request):
    if request.node.get_closest_marker("slow") and "slow" not in request.config.getoption("-m"):
        pytest.skip("takes minutes: pytest -m slow test_eat.py")
    if request.node.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA card")


# A model small enough to train in a test.
SMALL = dict(dim=32, depth=2, heads=2, frames=64, clones=2, decoder_layers=2)
SMALL_FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
CPU_FLAGS = ["--device=cpu", "--precision=float32", "--workers=0"]


def small(**changes):
    return EATConfig(**{**SMALL, **changes})


def machine_of(device="cpu", precision="float32", compile=False):
    return eat.Machine(device=device, precision=precision, compile=compile, workers=0)


def refused(main, arguments, says, capsys):
    """A mistake of the user's gets one line, which says what it is, and status 2."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as error:  # argparse's way
        status = error.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and says in lines[0], lines


def relative_error(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


def joined(tensors):
    return torch.cat([x.detach().cpu().flatten() for x in tensors])


def losses_and_gradients(model, x, mask, machine, parts=1):
    """The losses of a batch (of its last part) and its gradients by name, on the CPU."""
    model = copy.deepcopy(model).to(machine.device)
    net = machine.prepare(model)
    for part in zip(x.to(machine.device).chunk(parts), mask.to(machine.device).chunk(parts)):
        with machine.autocast():
            losses = net(*part)
        (losses["loss"] / parts).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, {name: gradient.cpu() for name, gradient in gradients.items()}

# ---- eat.py: parity with the release -------------------------------------------------------------


def release_name(name):
    """A parameter of EAT -> what the release calls it; the teacher's as the student's."""
    name = re.sub(r"^(student|teacher)\.", "", name)
    if name.startswith("blocks."):
        return name
    for ours, theirs in eat.RENAMED.items():
        name = name.replace(ours, theirs)
    name = re.sub(r"^decoder\.convs\.(\d+)", r"decoder.blocks.\1.0", name)
    return "modality_encoders.IMAGE." + name


@pytest.fixture(scope="module")
def formula():
    """Model, spectrogram, mask by formula; the released code printed the figures below for them."""
    model = EAT(EATConfig(dim=64, depth=3, heads=4, frames=256, clones=4, mask_noise_std=0.0,
                          utterance_weight=1.0))
    for name, p in model.named_parameters():
        theirs = release_name(name)
        i = torch.arange(p.numel(), dtype=torch.float64)
        v = torch.cos(0.37 * i + zlib.crc32(theirs.encode()) % 997 + name.startswith("teacher"))
        if theirs.endswith("bias"):
            v = 0.02 * v
        elif p.ndim == 1:
            v = 1 + 0.1 * v
        elif theirs.endswith("extra_tokens"):
            v = 0.5 * v
        else:
            v = v * 0.5 / math.sqrt(p.numel() / p.shape[0])
        p.data = v.float().view(p.shape)
    b = torch.arange(2, dtype=torch.float64)[:, None, None, None]
    t = torch.arange(256, dtype=torch.float64)[:, None]
    f = torch.arange(128, dtype=torch.float64)
    x = torch.sin(0.05 * t + 0.11 * f + 0.7 * b + 0.001 * t * f).float()
    b, c, n = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(128), indexing="ij")
    return model, x, (37 * n + 11 * c + 5 * b) % 128 >= 25


GRADIENT_NORMS = {
    "student.patches": 141.73095, "student.cls": 0.58477002, "student.pre_norm": 18.628572,
    "student.blocks.0": 74.760225, "student.blocks.1": 81.628987, "student.blocks.2": 87.775928,
    "decoder.convs": 1031.6760, "decoder.proj": 21.953758,
}


# How far each way of computing may be from the release's losses, and from its gradients.
@pytest.mark.parametrize("device, precision, compile, near, near_gradient", [
    ("cpu", "float32", False, 1e-6, 1e-5), ("cpu", "bfloat16", False, 1e-2, 2e-2),
    pytest.param("cpu", "float32", True, 1e-6, 1e-5, marks=needs_compiler),
    *(pytest.param("cuda", *how, marks=cuda) for how in (
        ("float32", False, 2e-5, 1e-3), ("float32", True, 2e-5, 1e-3),
        ("bfloat16", False, 1e-2, 0.1), ("bfloat16", True, 1e-2, 0.1),
        ("float16", False, 1e-2, 0.1)))])
def test_losses_and_gradients_equal_the_release(device, precision, compile, near, near_gradient,
                                                formula):
    machine = machine_of(device, precision, compile)
    losses, found = losses_and_gradients(*formula, machine)
    assert losses["frame_loss"].item() == pytest.approx(22.156864, rel=near)
    assert losses["utterance_loss"].item() == pytest.approx(7.8057818, rel=near)
    if device == "cuda":
        _, wanted = losses_and_gradients(*formula, machine_of())
        assert found.keys() == wanted.keys()
        assert relative_error(joined(found.values()), joined(wanted.values())) < near_gradient
        return
    norms = {}
    for name, gradient in found.items():  # none of the teacher
        group = next(group for group in GRADIENT_NORMS if name.startswith(group))
        norms[group] = math.hypot(norms.get(group, 0), gradient.norm().item())
    nearly_none = 0.05 if precision == "bfloat16" else 0
    assert norms == pytest.approx(GRADIENT_NORMS, rel=near_gradient, abs=nearly_none)


def test_targets_and_tokens_equal_the_release(formula):
    model, x, mask = formula
    targets, tokens = model.targets(x), model.student(x)
    # Some channels vary by 5e-4 only: normalising them magnifies float32's rounding.
    for got, want, within in (
        (targets[0, 0, :4], [-1.0623108, -0.4307056, 0.5188150, 0.9966463], 2e-4),
        (targets[1, 100, 60:], [-1.5293593, -1.2909735, -0.1522195, 0.4014070], 2e-4),
        (tokens[0, 0, :4], [-1.3777491, -1.1289545, -0.7422174, -0.1943505], 5e-6),
        (tokens[1, 77, :4], [-0.4975727, 0.8869479, 0.5765868, -0.2733991], 5e-6),
        (tokens.abs().mean(), 0.82830022, 5e-6),
    ):
        torch.testing.assert_close(got, torch.tensor(want), atol=within, rtol=0)


def test_targets_of_the_last_blocks():
    """They are, up to the last norm, the mean of what each block contributes alone."""
    torch.manual_seed(0)
    model, x = EAT(small(depth=3)), torch.randn(2, 1, 64, 128)
    tokens, outputs = model.teacher.embed(x), []
    for block in model.teacher.blocks:
        tokens, f = block(tokens)
        # Each channel is normalised over the patches of its clip.
        outputs.append(F.instance_norm(f[:, 1:].transpose(1, 2)).transpose(1, 2))
    for count in (1, 2, 3, None):
        model.config.target_blocks = count
        wanted = torch.stack(outputs[-(count or 3) :]).mean(0)
        torch.testing.assert_close(model.targets(x), F.layer_norm(wanted, (32,)), atol=1e-5,
                                   rtol=1e-5)
    assert not model.train().teacher.training  # whatever the student does


def test_each_loss_has_its_weight_and_can_be_had_alone():
    for frame, utterance in ((0.0, 3.0), (1.0, 0.0), (2.0, 3.0)):
        model = EAT(small(frame_weight=frame, utterance_weight=utterance))
        losses = model(torch.randn(2, 1, 64, 128))
        wanted = frame * losses["frame_loss"] + utterance * losses["utterance_loss"]
        torch.testing.assert_close(losses["loss"], wanted)
        losses["loss"].backward()
        assert model.decoder.proj.weight.grad.any() == (frame > 0)


@fixtures
def test_a_whole_step_equals_the_release():
    """From the student, the decoder and the teacher in a file of fairseq."""
    model = eat.load_pretrained(TINY / "fairseq_pretrained.pt")
    fixture = torch.load(TINY / "pretrain.pt", weights_only=True)
    for name, p in model.named_parameters():
        part = "teacher" if name.startswith("teacher") else "student"
        assert torch.equal(p, fixture[part][release_name(name)]), name
    x, mask = fixture["spectrogram"], fixture["mask"]
    views = mask.shape[0] * mask.shape[1]  # the release sums the utterance loss over views
    model.config.utterance_weight = float(views)
    keep = eat.visible_patches(mask, 25)
    tokens = model.student(x, keep)
    close = dict(atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(model.targets(x), fixture["targets"], **close)
    # The release keeps the visible patches in whatever order its sort leaves them.
    order = torch.cdist(fixture["student_tokens"], tokens).argmin(2)
    assert (order.sort(1).values == torch.arange(26)).all() and (order[:, 0] == 0).all()
    torch.testing.assert_close(tokens.gather(1, order[..., None].expand(-1, -1, 64)),
                               fixture["student_tokens"], **close)
    predicted = model.decode(tokens[:, 1:], keep, (16, 8))
    torch.testing.assert_close(predicted.flatten(0, 1), fixture["decoder_tokens"], **close)

    losses, grads = losses_and_gradients(model, x, mask, machine_of())
    for found, wanted in ((losses["frame_loss"], "frame_loss"), (losses["loss"], "total_loss"),
                          (losses["utterance_loss"] * views, "utterance_loss_summed_over_views")):
        assert found.item() == pytest.approx(fixture[wanted], rel=1e-6)
    assert {release_name(name) for name in grads} == fixture["grads"].keys()
    for name, grad in grads.items():
        assert relative_error(grad, fixture["grads"][release_name(name)]) < 1e-4, name

    for name, p in model.student.named_parameters():
        p.data.copy_(fixture["student_after_step"][release_name(name)])
    model.update_teacher(fixture["ema_decay_of_that_step"])
    for name, p in model.teacher.named_parameters():
        want = fixture["teacher_after_ema"][release_name(name)]
        torch.testing.assert_close(p, want, atol=1e-7, rtol=1e-6)


@fixtures
def test_a_run_goes_on_from_a_fairseq_file(sounds, tmp_path):
    """With a learning rate of 0 the student stays, and the teacher nears it."""
    source = TINY / "fairseq_pretrained.pt"
    run = [f"--data={sounds}", f"--out={tmp_path}", f"--init={source}", "--steps=1", "--lr=0",
           "--batch-size=4", "--ema-decay=0.9", "--ema-end-decay=0.9", *CPU_FLAGS]
    assert eat.main(run) == 0
    before, after = eat.load_pretrained(source), eat.load_pretrained(tmp_path / "last.pt")
    assert after.config.frames == 256 and after.config.clones == 4
    before.update_teacher(0.9)
    torch.testing.assert_close(after.state_dict(), before.state_dict())

# ---- eat.py: the parts ---------------------------------------------------------------------------


@pytest.mark.parametrize("device, near", [("cpu", 1e-5), pytest.param("cuda", 1e-4, marks=cuda)])
def test_a_clip_longer_or_shorter_than_the_table_gets_the_same_positions(device, near):
    short, long = Encoder(small(frames=32)), Encoder(small(frames=128))
    long.load_state_dict(short.state_dict())
    x = torch.randn(2, 1, 96, 128)
    for encoder in (short, long):
        found = copy.deepcopy(encoder).to(device)(x.to(device)).cpu()
        torch.testing.assert_close(found, short(x), atol=near, rtol=near)


def test_masked_patches_never_reach_the_student():
    model, x = EAT(small()), torch.randn(3, 1, 64, 128)
    mask = model.draw_mask(x)
    keep = eat.visible_patches(mask, model.config.visible)
    tokens = model.student(x, keep).view(3, 2, -1, 32)
    assert tokens.shape[2] == 1 + model.config.visible
    hidden = mask[:, 1].view(3, 1, 4, 8).repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = torch.where(hidden, torch.randn_like(x), x)
    other = model.student(changed, keep).view(3, 2, -1, 32)
    torch.testing.assert_close(other[:, 1], tokens[:, 1])
    assert not torch.allclose(other[:, 0], tokens[:, 0])


def test_the_decoder_gets_noise_at_masked_places_only():
    model, keep = EAT(small(mask_noise_std=0.5, clones=1)), torch.tensor([[[1, 5, 9, 13, 17, 31]]])
    model.decoder, tokens = torch.nn.Identity(), torch.full((1, 6, 32), 7.0)
    x = model.decode(tokens, keep, (4, 8)).view(32, 32)
    assert (x[keep.flatten()] == 7).all()
    x[keep.flatten()] = torch.nan
    assert x[~x.isnan()].std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("masking", ["inverse_block", "block", "random"])
@pytest.mark.parametrize("grid, K", [((64, 8), 102), ((32, 8), 51), ((8, 8), 12), ((4, 8), 6)])
def test_every_mask_keeps_exactly_K(masking, grid, K):
    mask = inverse_block_mask(40, 3, grid, masking=masking)
    assert mask.shape == (40, 3, grid[0] * grid[1]) and mask.dtype == torch.bool
    assert ((~mask).sum(-1) == K).all()


def masks(count, grid, **how):
    """Seeded -> what is visible (count, H, W)."""
    torch.manual_seed(0)
    return ~inverse_block_mask(count, 1, grid, **how).view(count, *grid)


def slow_inverse_block_mask(H, W, rng):
    """One mask as REFERENCE says it, patch by patch -> visible (H, W) bool."""
    keep, seen = int(H * W * (1 - 0.8)), np.zeros((H, W), bool)
    for _ in range(int(H * W * (0.2 + 0.07) / 25)):
        row, column = rng.integers(H), rng.integers(W)
        for r in range(-2, 3):
            for c in range(-2, 3):
                seen[min(max(row + r, 0), H - 1), min(max(column + c, 0), W - 1)] = True
    flat = seen.ravel()
    while flat.sum() > keep:
        flat[rng.choice(np.flatnonzero(flat))] = False
    while flat.sum() < keep:
        flat[rng.choice(np.flatnonzero(~flat))] = True
    return seen


def neighbours(seen):
    """Counts of visible neighbour pairs along time and along frequency, and how often each patch is
    visible."""
    along_time = (seen[:, 1:] & seen[:, :-1]).sum((1, 2)).double()
    along_frequency = (seen[:, :, 1:] & seen[:, :, :-1]).sum((1, 2)).double()
    return along_time, along_frequency, seen.double().mean(0)


def test_inverse_block_masks_are_distributed_as_a_slow_version():
    rng, n = np.random.default_rng(0), 2000
    stack = np.stack([slow_inverse_block_mask(32, 8, rng) for _ in range(n)])
    *slow, slow_often = neighbours(torch.from_numpy(stack))
    *fast, often = neighbours(masks(n, (32, 8)))
    for a, b in zip(slow, fast):
        assert abs(a.mean() - b.mean()) < 4 * math.sqrt((a.var() + b.var()) / n)
    error = (slow_often * (1 - slow_often) * 2 / n).sqrt()
    assert ((slow_often - often).abs() < 4.5 * error).all()


@fixtures
def test_inverse_block_masks_are_distributed_as_the_release():
    release = torch.load(SHARED / "fixtures/mask_statistics.pt", weights_only=True)
    n = release["n"]
    *pairs, often = neighbours(masks(n, (64, 8)))
    for found, name in zip(pairs, ("time", "freq")):
        error = release[f"{name}_neighbour_pairs_std"] * math.sqrt(2 / n)
        assert abs(found.mean().item() - release[f"{name}_neighbour_pairs_mean"]) < 3.5 * error
    error = (often * (1 - often) * 2 / n).sqrt()
    assert ((often - release["visible_frequency"]).abs() < 4.5 * error).all()


def test_masking_kinds_cluster_what_their_names_say():
    inverse, block, random = (masks(500, (32, 8), masking=kind)
                              for kind in ("inverse_block", "block", "random"))
    assert neighbours(inverse)[0].mean() > 1.8 * neighbours(random)[0].mean()
    assert neighbours(~block)[0].mean() > 1.03 * neighbours(~random)[0].mean()
    # In 1 s of sound, one block of 3 x 3 is whole unless its centre is at the edge (28 of 64).
    squares = F.avg_pool2d(masks(500, (8, 8))[:, None].float(), 3, stride=1) == 1
    assert squares.flatten(1).any(1).float().mean() > 0.5


def test_silence_is_finite_collapse_shows_and_a_mask_of_another_size_is_refused():
    model, x = EAT(small()), torch.randn(4, 1, 64, 128)
    assert model(torch.zeros(2, 1, 64, 128))["loss"].isfinite()
    assert min(model(x)[name] for name in ("target_std", "prediction_std")) > 0.05
    torch.nn.init.zeros_(model.decoder.proj.weight)
    assert model(x)["prediction_std"] < 1e-6
    with pytest.raises(ValueError, match="exactly 6 of 32"):
        model(x, torch.arange(32).expand(4, 2, -1) >= 7)


def test_base_is_the_size_the_paper_says():
    with torch.device("meta"):
        model = EAT(EATConfig())
    count = sum(p.numel() for part in (model.student, model.decoder) for p in part.parameters())
    assert round(count / 1e6) == 88

# ---- eat.py: the recipe --------------------------------------------------------------------------


def test_every_default_is_the_release_s():
    """All its numbers stand here: users report that small departures move the result a lot."""
    assert vars(EATConfig()) == dict(
        dim=768, depth=12, heads=12, mlp_ratio=4.0, norm_eps=1e-6, decoder_layers=6,
        decoder_kernel=3, decoder_groups=16, masking="inverse_block", clones=16, mask_ratio=0.8,
        mask_block=5, mask_adjust=0.07, mask_noise_std=0.01, utterance_weight=192.0,
        frame_weight=1.0, target_blocks=None, frames=1024, mean=-4.268, std=4.569)
    large = vars(EATConfig.preset("large"))
    assert large == vars(EATConfig()) | dict(dim=1024, depth=24, heads=16)
    recipe, short = vars(Recipe()), Recipe(steps=4000)
    assert recipe == recipe | dict(
        steps=400_000, batch_size=48, lr=5e-4, warmup_steps=53_333, weight_decay=0.05, beta1=0.9,
        beta2=0.95, adam_eps=1e-8, grad_clip=4.0, ema_decay=0.9998, ema_end_decay=0.99999,
        ema_anneal_steps=100_000, stats="audioset")
    assert (short.warmup_steps, short.ema_anneal_steps) == (533, 1000)  # in the same proportions
    assert data.STATS == {"audioset": (-4.268, 4.569), "esc50": (-6.627, 5.359),
                          "spc2": (-6.846, 5.565)}
    always = dict(reading="CLS", accumulate=1, min_lr=1e-6, warmup=0.1, weight_decay=0.05,
                  layer_decay=0.65, drop_path=0.1, roll=True, mixup_prob=0.9)
    names = ("stats", "frames", "batch_size", "steps", "lr", "mixup", "spec_augment",
             "label_smoothing", "loss", "weighted", "noise")
    for name, *wanted in (
        ("as2m", "audioset", 1024, 96, 300_000, 5e-5, 0.8, 0.2, 0.0, "bce", True, False),
        ("as20k", "audioset", 1024, 48, 40_000, 5e-5, 0.8, 0.2, 0.0, "bce", False, False),
        ("esc50", "esc50", 512, 48, 4_000, 5e-5, 0.0, 0.4, 0.1, "ce", False, False),
        ("spc2", "spc2", 128, 256, 40_000, 2e-4, 0.8, 0.2, 0.1, "bce", False, True),
    ):
        found = vars(FineTune(**finetune.RECIPES[name]))
        assert found == found | dict(zip(names, wanted, strict=True)) | always
    for clips, name in ((1_912_134, "as2m"), (20_550, "as20k")):
        manifests = types.SimpleNamespace(kind="AudioSet manifests",
                                          folds={"eval": (range(clips), range(17_000))})
        assert finetune.recipe_for(manifests) == name


def test_weights_begin_as_in_the_release():
    torch.manual_seed(0)
    model = EAT(EATConfig(dim=256, depth=1, heads=4))
    classifier = Classifier(EAT(model.config).student, 400)
    xavier, linear, conv = (2 / (256 + 256)) ** 0.5, (3 * 256) ** -0.5, (3 * 9 * 16) ** -0.5
    block = model.student.blocks[0]
    for x, std in ((model.student.cls, 1.0), (model.student.patches.proj.weight, xavier),
                   (block.attn.qkv.weight, 0.02), (block.mlp.fc2.weight, 0.02),
                   (model.decoder.convs[0].weight, conv), (model.decoder.proj.weight, linear),
                   (classifier.head.weight, 0.02)):
        assert x.mean().abs() < std / 4 and x.std().item() == pytest.approx(std, rel=0.1)
    for name, p in [*model.student.named_parameters(), *classifier.named_parameters()]:
        if p.ndim == 1 and "patches" not in name:
            assert (p == ("norm" in name and name.endswith("weight"))).all(), name
    assert classifier.fc_norm.eps == 1e-6


class SlowAdamW:
    """Adam with decoupled weight decay on all but 1-D tensors, written out in float64."""

    def __init__(self, model):
        self.state = {name: (p.detach().double(), 0.0, 0.0) for name, p in model.named_parameters()}

    def step(self, model, update, rate_of):
        """For gradients of update 1, 2, ..., at a rate for each name."""
        for name, p in model.named_parameters():
            if p.grad is not None:
                x, mean, square = self.state[name]
                rate = rate_of(name)
                mean = 0.9 * mean + 0.1 * p.grad.double()
                square = 0.95 * square + 0.05 * p.grad.double() ** 2
                if p.ndim > 1:
                    x = x - rate * 0.05 * x
                denominator = (square / (1 - 0.95**update)).sqrt() + 1e-8
                x = x - rate * mean / (1 - 0.9**update) / denominator
                self.state[name] = x, mean, square
                p.data.copy_(x)


def assert_near(found, wanted):
    for name, x in wanted.items():
        if not name.endswith("qkv.bias"):  # the keys' has no gradient, but for rounding
            torch.testing.assert_close(found[name], x, atol=1e-5, rtol=1e-4)


def test_the_loop_does_what_a_slow_version_does(tmp_path):
    """Five updates, each in two parts. The rate rises in two of them and falls in three; the
    teacher's decay rises in four."""
    config, clips = small(), open_clips("demo", 64)
    recipe = Recipe(out=str(tmp_path), steps=5, warmup_steps=2, lr=1e-2, batch_size=4, accumulate=2,
                    ema_decay=0.8, ema_end_decay=0.9, ema_anneal_steps=4, log_every=1, seed=7)
    eat.train(config, recipe, clips, machine_of())
    torch.manual_seed(data.seed_of(7))
    model = EAT(config)
    adam, order = SlowAdamW(model), data.shuffled(len(clips), 7)
    for update, rate, decay in ((1, 0.005, 0.825), (2, 0.01, 0.85), (3, 0.0075, 0.875),
                                (4, 0.0025, 0.9), (5, 0.0, 0.9)):
        torch.manual_seed(data.seed_of(7, update - 1, 0))
        model.zero_grad()
        for _ in range(2):
            batch = clips[[next(order), next(order)]]
            x = spectrogram(batch.waveforms, batch.lengths, 64, config.mean, config.std)
            (model(x)["loss"] / 2).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = joined(gradients).norm()
        for gradient in gradients:
            gradient *= 4 / norm
        adam.step(model, update, lambda name: rate)
        for teacher, student in zip(model.teacher.parameters(), model.student.parameters()):
            teacher.data = decay * teacher + (1 - decay) * student
        line = logged(tmp_path)[update - 1]
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 4
        assert (line["lr"], line["teacher_decay"]) == pytest.approx((rate, decay))
    assert_near(weights(tmp_path)[1], model.state_dict())


def test_a_run_from_a_checkpoint_has_its_recipe(sounds, whole_run, tuned):
    """The release's, where it is no pre-training of our own."""
    for path, dim, preset, batch in (
        (whole_run / "last.pt", 32, "tiny", 16), (tuned / "last.pt", 32, "base", 48),
        (HERE / "assets/tiny.safetensors", 192, "tiny", 16),
    ):
        given = {"data": str(sounds), "init": path, "steps": 1}
        config, recipe, *_ = eat.settle(given, machine_of())
        assert (config.dim, recipe.preset, recipe.batch_size) == (dim, preset, batch)


def waves(loud=(), size=8, frames=64):
    """As many clips of noise as asked for. The batches of two whose numbers are `loud` (in the
    order of reading, from 0) are loud beyond all measure."""
    reads = itertools.count()
    sound = types.SimpleNamespace(packed=False, skipped={}, names=range(size),
                                  lengths=np.full(size, data.clip_samples(frames)))
    sound.read = lambda file, start, count: (
        torch.rand(count) * (1e30 if next(reads) // 2 in loud else 1.0))
    return data.Clips(sound, frames)


@pytest.mark.parametrize("clips, given, steps", [
    (5847, {}, 7308), (2000, {}, 5000), (1_912_134, {"preset": "base"}, 400_000),
    (5847, {"hours": 1.0}, 7200), (5847, {"steps": 7}, 7),
    (4000, {"data": "demo"}, 600), (4000, {"data": "demo", "hours": 0.1}, 720)])
def test_a_run_gets_a_fitting_number_of_steps(clips, given, steps, monkeypatch):
    def trial(config, recipe, clips, machine, saving):
        assert recipe.steps == 30 and not saving
        return {"step": 30, "steps_per_second": 2.0}

    monkeypatch.setattr(eat, "open_clips", lambda *how, **more: waves(size=clips))
    monkeypatch.setattr(eat, "train", trial)
    given = {"data": "somewhere", "out": "nowhere", "stats": "audioset", "warmup_steps": 3, **given}
    recipe = eat.settle(given, machine_of())[1]
    assert (recipe.steps, recipe.warmup_steps) == (steps, 3)
    assert recipe.ema_anneal_steps == round(steps / 4)


@pytest.mark.parametrize("gigabytes, preset, world, compiled, parts", [
    (25.4, "base", 1, False, 4), (25.4, "base", 4, False, 1), (25.4, "large", 1, False, 12),
    (85, "base", 1, False, 2), (85, "base", 1, True, 1), (25.4, "base", 1, True, 3),
    (12, "small", 1, False, 4), (0.1, "base", 2, True, 24)])
def test_a_batch_is_split_by_a_cards_memory(gigabytes, preset, world, compiled, parts,
                                            monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: types.SimpleNamespace(total_memory=gigabytes * 1e9))
    machine = machine_of("cpu", "bfloat16", compiled)
    machine.device, machine.world, machine.reduce = torch.device("cuda"), world, lambda x, how: x
    assert eat.choose_parts(48, EATConfig.preset(preset), machine) == parts
    suits = "base" if gigabytes > 25 else "small"
    assert eat.choose_preset({"data": "sound"}, None, machine) == suits


def test_an_epoch_is_every_clip_once_and_processes_share_it():
    def batches(count, position=0, accumulate=2, rank=0, world=1):
        size = data.part_size(8, accumulate * world)
        parts = data.shares(data.shuffled(20, 3, position), 8, size, rank, world)
        return [[next(parts) for _ in range(accumulate)] for _ in range(count)]

    alone = [sum(parts, []) for parts in batches(5)]
    order = sum(alone, [])
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20)) and order[:20] != order[20:]
    assert all(len(part) == 4 for parts in batches(5) for part in parts)
    both = [batches(5, rank=rank, world=2) for rank in (0, 1)]
    assert all(len(part) == 2 for of_one in both for parts in of_one for part in parts)
    together = [sorted(sum(a + b, [])) for a, b in zip(*both)]
    assert together == [sorted(batch) for batch in alone]
    assert batches(2, position=3 * 8) == batches(5)[3:]


def share_of_a_batch(machine, parts=1):
    """The gradients of this process's share of a batch of 4 on given masks."""
    torch.manual_seed(0)
    model, mine = EAT(small(mask_noise_std=0.0)), slice(machine.rank, None, machine.world)
    x = torch.randn(4, 1, 64, 128)
    mask = model.draw_mask(x)
    return losses_and_gradients(model, x[mine], mask[mine], machine, parts)[1]


@pytest.mark.parametrize("way, near", [
    ("cpu", 1e-5), pytest.param("cuda", 1e-3, marks=cuda),
    pytest.param("two processes", 1e-5, marks=linux)])
def test_a_shared_batch_gives_the_same_gradients(way, near, tmp_path):
    wanted = share_of_a_batch(machine_of())
    if way != "two processes":
        found = share_of_a_batch(machine_of(way), parts=2)
    else:
        in_two(tmp_path, "eat", [], "import test_eat as t; found = t.share_of_a_batch("
               f"t.machine_of()); torch.save(found, '{tmp_path}/' + os.environ['RANK']); "
               "torch.distributed.destroy_process_group(); sys.exit()")
        found = torch.load(tmp_path / "0")
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, gradient in wanted.items():
        assert relative_error(found[name], gradient) < near, name


def test_bench_reports_what_fits_together(capsys):
    assert eat.main(["bench", *CPU_FLAGS, "--batch-size=2", "--steps=2", *SMALL_FLAGS]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "float32, not compiled" in found["machine"]
    assert found["clips_per_second"] * found["seconds_per_step"] == pytest.approx(2)
    share = found["step_tflops"] / found["matrix_tflops"]
    assert share == pytest.approx(found["share_of_matrix_rate"])
    formula = {torch.ops.aten.convolution_backward: eat.flops_of_convolution_backward}
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=formula) as counter:
        x = torch.empty(1, 8, 4, 4, requires_grad=True)
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=4)(x).sum().backward()
    # 16 places, 8 channels out of 2 each, 9 taps, a product and a sum; forward and twice back.
    assert counter.get_total_flops() == 3 * 16 * 8 * 2 * 9 * 2

# ---- eat.py: runs --------------------------------------------------------------------------------


def write(path, samples, rate=16_000, kind=None):
    soundfile.write(os.fsencode(path), samples, rate, kind)
    return path


def tone(path, rate=16_000, seconds=2.0, hertz=440.0):
    t = np.arange(int(rate * seconds)) / rate
    return write(path, 0.5 * np.sin(2 * np.pi * hertz * t), rate)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Twelve files: tones in noise, one of them much longer than a clip."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for k in range(12):
        t = np.arange(60_000 if k == 0 else 9000 + 500 * k) / 16_000
        wave = np.sin(2 * np.pi * 200 * (k + 1) * t) * 0.1 + 0.01 * rng.standard_normal(len(t))
        write(folder / f"{k:02}.wav", wave)
    return folder


def flags(sounds, out, *more, steps=8):
    return [f"--data={sounds}", f"--out={out}", *([f"--steps={steps}"] if steps else []),
            "--batch-size=4", "--log-every=1", "--lr=1e-3", *CPU_FLAGS, *SMALL_FLAGS, *more]


def logged(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def weights(out):
    state = torch.load(Path(out) / "last.pt", weights_only=True)
    return state["step"], state["model"]


def same_runs(a, b):
    (step, a), (other_step, b) = weights(a), weights(b)
    return step == other_step and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole_run(sounds, tmp_path_factory):
    driver()  # which imports torch meanwhile
    out = tmp_path_factory.mktemp("whole")
    assert eat.main(flags(sounds, out, "--save-every=4")) == 0
    return out


def start(*arguments, program=sys.executable, **more):
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **more}
    return subprocess.Popen([program, *arguments], cwd=HERE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


def torchrun(*arguments):
    return start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments)


def wait_for_step(process, out, step):
    """Until the run in `out` has logged so many lines."""
    path = Path(out) / "log.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < step:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def end_of(process, status, says=""):
    """Wait for a process to end with a status (None: any but 0), in words and without traceback."""
    said, _ = process.communicate(timeout=300)
    right = process.returncode == status if status is not None else process.returncode
    assert right and says in said and 'eat.py", line' not in said, said
    return said


def processes(word):
    """Those, other than this one and torchrun itself, whose command line has a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            line = path.read_bytes()
            if str(word).encode() in line and b"torch.distributed.run" not in line:
                found.append(int(path.parent.name))
    return sorted(set(found) - {os.getpid()})


# Every case is a process of its own, forked from one that has imported everything. Its hook puts
# something in the way of it: `at` does it when a function is called for the `count`th time. What a
# case starts holds a pipe open, so the pipe's end tells that nothing is left.
DRIVER = '''
import io, json, multiprocessing, os, select, shutil, signal, sys
import torch._dynamo  # else the optimizer imports it in every case
import torch.utils.data._utils.worker
import data, eat, finetune

torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.2  # s until an orphan knows it is one
for number in (signal.SIGHUP, signal.SIGINT):  # nohup and & have them ignored
    signal.signal(number, signal.SIG_DFL)

def at(owner, name, count, act):
    original, calls = getattr(owner, name), []
    def patched(*arguments, **more):
        calls.append(name)
        if len(calls) == count:
            act()
        return original(*arguments, **more)
    setattr(owner, name, patched)

def send(number):
    return lambda: os.kill(os.getpid(), number)

def rival():
    if not os.fork():
        os._exit(program.main(arguments) + 100)
    print("the rival:", os.waitstatus_to_exitcode(os.wait()[1]) - 100, flush=True)

for line in sys.stdin:
    folder, cases = json.loads(line)
    children, (ended, held) = [], os.pipe()
    for k, (hook, program, arguments, _) in enumerate(cases):
        children.append(os.fork())
        if not children[-1]:
            said = os.open(f"{folder}/said{k}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            signal.alarm(300)  # what hangs is killed by it
            program = globals()[program]
            exec(hook)
            sys.exit(program.main(arguments))
    os.close(held)
    found = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps([*found, bool(select.select([ended], [], [], 60)[0])]), flush=True)
    os.close(ended)
'''


@functools.cache
def driver():
    return start("-c", DRIVER, stdin=subprocess.PIPE, stderr=None)


def driven(folder, *cases):
    """Processes for cases (hook, program, arguments, exit status), which leave nothing behind ->
    what each said."""
    print(json.dumps([str(folder), cases]), file=driver().stdin, flush=True)
    *found, ended = json.loads(driver().stdout.readline())
    said = [(folder / f"said{k}").read_text() for k in range(len(cases))]
    for (hook, *_, expected), status, text in zip(cases, found, said, strict=True):
        assert status == expected and ("Traceback" in text) == ("1 / 0" in hook), text
    assert ended, found
    return said


def in_two(folder, program, arguments, hook="", status=0):
    """A case in two processes, told what torchrun would tell them -> what each said."""
    port = get_free_port()
    place = ("os.environ.update(RANK='{}', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', "
             "MASTER_PORT='{}'); ")
    return driven(folder, *((place.format(rank, port) + hook, program, arguments, status)
                            for rank in (0, 1)))


def test_a_run_learns_logs_and_leaves_an_encoder(whole_run):
    lines = logged(whole_run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0].keys() == {
        "step", "loss", "frame_loss", "utterance_loss", "target_std", "prediction_std", "grad_norm",
        "not_finite", "lr", "teacher_decay", "steps_per_second", "skipped"}
    encoder = eat.load_encoder(whole_run / "last.pt")
    model = eat.load_pretrained(whole_run / "last.pt")
    x = torch.randn(1, 1, 64, 128)
    torch.testing.assert_close(encoder(x), model.student(x))
    teacher, student = model.teacher.state_dict(), model.student.state_dict()
    assert any(not torch.equal(teacher[name], student[name]) for name in teacher)


def test_progress_without_a_terminal_is_plain_lines(sounds, tmp_path, capsys):
    assert eat.main(flags(sounds, tmp_path, "--steps=22", "--log-every=10")) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training: ")]
    for line, step in zip(said, (20, 22), strict=True):  # soon; later every minute; at the end
        pattern = rf"training: step {step} of 22, about 0:00:\d\d to go; loss \S+, frame_loss .*"
        assert re.fullmatch(pattern, line)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_16_bits_learn_what_float32_learns(precision, sounds, whole_run, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # no step is lost to finding it
    monkeypatch.setattr(eat.Machine, "scaler", lambda self: scaler)
    assert eat.main(flags(sounds, tmp_path, f"--precision={precision}")) == 0
    lines = [[line["loss"] for line in logged(out)] for out in (tmp_path, whole_run)]
    assert lines[0] == pytest.approx(lines[1], rel=1e-2) and lines[0] != lines[1]
    _, state = weights(tmp_path)
    assert all(x.dtype == torch.float32 for x in state.values())  # weights and teacher stay whole


def test_a_timestamp_is_a_seed_and_hours_become_steps(sounds, whole_run, tmp_path, monkeypatch):
    sound = data.Demo(64, seed=10**18).read(0)
    monkeypatch.setattr(data.Demo, "read", lambda *_: sound)  # the probes alone read 2,400 of them
    more = ["--hours=1e-9", f"--seed={10**18}"]
    for name, path, stats in (("a", sounds, "measure"), ("b", "demo", "audioset")):
        assert eat.main(flags(path, tmp_path / name, *more, f"--stats={stats}", steps=None)) == 0
        lines = logged(tmp_path / name)  # and nothing of the trial
        assert [line["step"] for line in lines if "loss" in line] == [1]
    assert logged(tmp_path / "a")[0]["loss"] != logged(whole_run)[0]["loss"]


@linux
def test_two_processes_end_together(sounds, tmp_path):
    """One process dies; a terminal tells torchrun and all its processes; torchrun is told to stop.
    The test waits until no process holds torchrun's output open, so nothing is left."""
    more = ["--workers=1", "--log-every=2", "--save-every=90000"]  # a stop may fall between lines
    runs = {}
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        out = tmp_path / number.name
        runs[number] = out, torchrun("eat.py", *flags(sounds, out, *more, steps=100_000))
    for number, (out, process) in runs.items():
        wait_for_step(process, out, 1)
        children = processes(out)
        told = {signal.SIGTERM: [process.pid], signal.SIGINT: [*children, process.pid],
                signal.SIGKILL: children[:1]}
        for one in told[number]:
            os.kill(one, number)
    for number, (_, process) in runs.items():
        end_of(process, None, "Signal 9" if number == signal.SIGKILL else "stopped by")
    assert weights(out)[0]  # the last ones above saved when they were told to stop


@linux
def test_two_processes_resume_exactly_and_one_goes_on(sounds, tmp_path, capsys):
    run = flags(sounds, tmp_path, "--save-every=3", steps=5)
    assert "the encoder is in" in in_two(tmp_path, "eat", run)[0]
    os.rename(tmp_path / "last.pt", tmp_path / "whole.pt")  # what is left is of step 3
    end_of(torchrun("eat.py", *run, "--resume"), 0, "resumed  at step 3")
    whole = torch.load(tmp_path / "whole.pt")["model"]
    assert all(torch.equal(x, whole[name]) for name, x in weights(tmp_path)[1].items())
    os.replace(tmp_path / "previous.pt", tmp_path / "last.pt")
    apart = f"arguments.append('--out={tmp_path}' + '/none' * int(os.environ['RANK']))"
    for said in in_two(tmp_path, "eat", [*run, "--resume"], apart, status=2):
        assert "not the same checkpoint" in said
    assert eat.main([*run, "--resume"]) == 0 and weights(tmp_path)[0] == 5
    assert "2 processes, and now has 1" in capsys.readouterr().err


@slow
@pytest.mark.parametrize("program, kills", [("eat", 20), ("finetune", 10)])
def test_kills_at_random_moments_change_nothing(program, kills, sounds, esc, start_from, tmp_path):
    """In start-up, while it runs, and, of pre-training, in a write."""
    cut, whole, rng = tmp_path / "cut", tmp_path / "whole", np.random.default_rng(0)
    log, part, pretrains = cut / "log.jsonl", cut / "last.pt.part", program == "eat"

    def run(out):
        if pretrains:
            return flags(sounds, out, "--save-every=1", "--batch-size=8", steps=300)
        return [f"--data={esc}", f"--out={out}", *FINE, start_from, "--steps=150"]

    for kill in range(kills):
        before = log.stat().st_mtime if log.exists() else 0
        process = start(f"{program}.py", *run(cut), "--resume", f"--workers={int(pretrains)}")
        if kill % 3 == 0:
            time.sleep(rng.uniform(0, 4))
        else:
            while process.poll() is None and not (log.exists() and log.stat().st_mtime > before):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.5))
            while pretrains and kill % 3 == 1 and process.poll() is None and not part.exists():
                pass
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        process.communicate()
    main = sys.modules[program].main
    assert main([*run(cut), "--resume"]) == 0 and main(run(whole)) == 0
    assert same_runs(cut, whole)
    steps = [[line["step"] for line in logged(out)] for out in (cut, whole)]
    assert steps[0] == steps[1] and (not pretrains or steps[0] == list(range(1, 301)))
    assert pretrains or results(cut) == results(whole)


@slow
@linux
def test_a_long_run_is_flat(sounds, tmp_path):
    """2,000 steps: memory of the main process and its worker, open files, lines of the log."""
    more = ["--workers=1", "--save-every=100"]
    process = start("eat.py", *flags(sounds, tmp_path, *more, steps=2000))
    seen = []
    for step in (500, 1990):
        wait_for_step(process, tmp_path, step)
        for number in processes(tmp_path):
            status = Path(f"/proc/{number}/status").read_text()
            memory = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # MiB
            seen.append((memory, len(os.listdir(f"/proc/{number}/fd"))))
    end_of(process, 0)
    for (early, files), (late, files_late) in zip(seen[:2], seen[2:], strict=True):
        assert late < early + 10
        assert files_late <= files + 20  # each batch on its way from the worker holds some open
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, 2001))


def test_a_run_that_goes_wrong_stops_and_keeps_the_last_good_checkpoint(sounds, tmp_path, capsys):
    more = ["--save-every=1", "--lr=1e30", "--grad-clip=1e30", "--warmup-steps=0"]
    assert eat.main(flags(sounds, tmp_path, *more, steps=40)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    for words in ("not finite 26 times in a row", "lower --lr", f"is one, is in {tmp_path}"):
        assert words in said
    step, state = weights(tmp_path)
    assert step == 1 and all(x.isfinite().all() for x in state.values())
    assert len(logged(tmp_path)) == 27


def test_probing_changes_nothing_and_agrees_with_knn(sounds, whole_run, esc, tmp_path, capsys):
    run = flags(sounds, tmp_path / "run", f"--probe={esc}", "--probe-every=3", "--log-every=2")
    assert eat.main(run) == 0
    # A line of averages ends where a probe begins: its time does not count as the steps'.
    assert [line["step"] for line in logged(tmp_path / "run")] == [0, 2, 3, 3, 4, 6, 6, 8, 8]
    said = capsys.readouterr().out
    assert same_runs(tmp_path / "run", whole_run)
    found = {line["step"]: line for line in logged(tmp_path / "run") if "knn_patches" in line}
    assert list(found) == [0, 3, 6, 8] and all(f"step {step:7}: nearest" in said for step in found)
    assert fine(esc, tmp_path / "knn", f"--checkpoint={tmp_path}/run/last.pt", "--mode=knn",
                "--frames=64") == 0
    knn = results(tmp_path / "knn")
    for reading in ("patches", "CLS", "mean of patches"):
        mean = np.mean([fold["value"] for fold in knn[reading].values()])
        assert found[8]["knn_" + reading.lower().replace(" ", "_")] == pytest.approx(mean)
    # A finished run that is resumed probes only where a kill prevented it.
    path = tmp_path / "run/log.jsonl"
    whole = path.read_text().splitlines()
    for lines in (whole, whole[:-1]):
        path.write_text("\n".join([*lines, ""]))
        assert eat.main([*run, "--resume"]) == 0
        assert path.read_text().splitlines() == whole


def test_a_probe_whose_sound_goes_does_not_end_the_run(sounds, tmp_path, capsys, monkeypatch):
    folder, probe = make_esc(tmp_path / "esc"), eat.probe
    (folder / "audio/1-1000-A-41.wav").write_text("no sound")

    def last_probe(*how):
        found = probe(*how)
        shutil.rmtree(folder / "audio", ignore_errors=True)
        return found

    monkeypatch.setattr(eat, "probe", last_probe)
    out = tmp_path / "out"
    assert eat.main(flags(sounds, out, f"--probe={folder}", "--probe-every=4")) == 2
    shown, said = capsys.readouterr()
    assert "are trained on" not in shown
    assert re.search(r"the probe skipped 1 so far; new: \S+/1-1000-A-41.wav \(cannot be read", said)
    assert "step 4: not probed: no clip can be read" in said
    assert [line["step"] for line in logged(out) if "knn_cls" in line] == [0]
    assert weights(out)[0] == 8


def test_a_probe_starts_anew_says_what_it_probes_on_and_hears_what_finetune_hears(
        sounds, esc, tmp_path, capsys):
    (tmp_path / "run").mkdir()  # killed before its first checkpoint
    (tmp_path / "run/log.jsonl").write_text('{"step": 0, "knn_cls": 9}\n{"step": 1, "loss": 9}\n')
    assert eat.main(flags(esc, tmp_path / "run", f"--probe={esc}", steps=1)) == 0
    assert "chance 50%; 8 of its files are trained on" in capsys.readouterr().out
    for part, name in (("train", "1-1000-A-41.wav"), ("eval", "1-1000-B-41.wav")):
        (tmp_path / f"{part}.tsv").write_text(f"{esc}/audio\n{name}\t11200\n")
    pack(tmp_path, tmp_path / "packed")
    assert eat.main(flags(tmp_path / "packed", tmp_path / "a", f"--probe={esc}", steps=1)) == 0
    assert "; 1 of its files are trained on" in capsys.readouterr().out
    lines = logged(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1] and lines[0]["knn_cls"] <= 1
    run = flags(sounds, tmp_path / "other", f"--probe={make_manifests(tmp_path / 'labels')}")
    refused(eat.main, run, "one label a clip", capsys)
    assert not (tmp_path / "other").exists()
    for config, frames in ((small(), 512), (small(frames=1024), 1024)):
        assert eat.open_probe(Recipe(probe=str(esc)), config).clips.frames == frames
        assert eat.open_probe(Recipe(probe="demo"), config).clips.frames == config.frames


def test_a_run_that_came_and_went_meanwhile_is_not_written_over(sounds, whole_run, esc, tuned,
                                                                tmp_path, capsys, monkeypatch):
    fine_tuning = [f"--data={esc}", f"--out={tmp_path / 'finetune'}", "--mode=knn", *FINE]
    for program, opener, run, other in (
        (eat, "open_clips", flags(sounds, tmp_path / "eat", "--resume"), whole_run),
        (finetune, "open_labelled", fine_tuning, tuned),
    ):
        out, opened = tmp_path / program.__name__, getattr(data, opener)

        def open_late(*how, **more):
            shutil.copytree(other, out, dirs_exist_ok=True)
            return opened(*how, **more)

        monkeypatch.setattr(program, opener, open_late)
        refused(program.main, run, "holds a run already", capsys)
        assert same_runs(out, other)


def test_more_processes_than_cards_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    refused(eat.main, ["--data=demo", "--device=cuda"], "2 card(s), but torchrun", capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(finetune.main, ["--data=demo"], "start them without torchrun", capsys)


def test_a_trial_comes_after_all_that_may_be_refused_and_can_be_stopped(sounds, tmp_path, capsys,
                                                                        monkeypatch):
    monkeypatch.setattr(eat, "spectrogram", lambda *_: os.kill(os.getpid(), 15) or spectrogram(*_))
    run = flags(sounds, tmp_path / "out", "--hours=1", "--stats=audioset", steps=None)
    refused(eat.main, [*run, "--probe=nowhere"], "no such folder", capsys)
    for job in (run, ["bench", *CPU_FLAGS, *SMALL_FLAGS]):
        assert eat.main(job) == 143
        assert capsys.readouterr().err.splitlines()[-1] == "eat.py: stopped by SIGTERM"


BAD_INPUT = {
    "eat": [
        ("--data=nowhere", "no such file or folder"), ("--probe-every=2", "--probe must name"),
        ("--probe=nowhere", "no such folder"), ("--target-blocks=3", "exceeds depth"),
        ("--data={empty}", "no sound in it"), ("--data={broken}", "none of its files"),
        ("--data={silent} --stats=measure", "no clip can be used: "),
        ("--heads=5", "heads (5) must divide dim"), ("--frames=100", "multiple of 16"),
        ("--batch-size=6 --accumulate=4", "must be a multiple of 4"),
        ("--out={run} --resume --accumulate=3 --workers=2", "must be a multiple of"),
        ("bench --preset=tiny --batch-size=3 --accumulate=2", "must be a multiple of"),
        ("--out={run}", "--resume"), ("--out={run} --resume --lr=0.5", "--lr 0.5"),
        ("--out={tuned} --resume", "not a run of"), ("--init={run}/lost.pt", "no such file"),
        ("--out=/dev/null/out", "expected a folder"), ("--device=cuda", "device cuda"),
        ("--mask-ratio=0.999", "some of the 32 patches visible"), ("--lr=-1", "lr (-1.0)"),
        ("--init={last} --dim=64", "size mismatch for student.cls"),
        ("--mean=-inf", "mean (-inf)"), ("--hours=1", "--hours and --steps"),
        ("--data={faint} --stats=measure --frames=128", "too quiet to learn from"),
        ("--beta2=1", "beta2 (1.0) must be finite, at least 0, at most 0.9999"),
        ("--grad-clip=0", "grad_clip (0.0) must be finite, at least 1e-09"),
        ("--mask-ratio=nan", "mask_ratio (nan)"), ("--mask-ratio=1", "mask_ratio (1.0)"),
        ("--mask-ratio=0", "mask_ratio (0.0)"), ("--mask-block=4", "mask_block (4) must be odd"),
        ("--std=0", "std (0.0)"), ("--norm-eps=nan", "norm_eps (nan)"), ("--heads=0", "heads (0)"),
        ("--dim=36", "decoder_groups (16)"), ("--workers=-1", "workers (-1)"),
        ("--mlp-ratio=0.001", "mlp_ratio (0.001)"),
        ("--steps=0", "steps (0) must be finite, at least 1"), ("--step=3", "--step=3"),
        ("--preset=bsae", "--preset: invalid choice: 'bsae'"),
        ("plot {empty}", "log.jsonl: no log"),
        ("export {last} {last}", "expected a folder"), ("bench --frames=100", "multiple of 16"),
        ("export {last} {last}/x.safetensors", "expected a folder")],
    "data": [
        ("pack {empty} {empty}/pack --workers=-1", "at least 0"),
        ("pack {broken} {empty}/pack", "nothing in it can be read; "),
        ("pack x.wav y --sede=1", "--sede=1")],
    "finetune": [
        ("--stepz=3", "--stepz=3"), ("--data=nowhere", "no such folder"),
        ("--fold=9", "--fold 9"), ("--checkpoint=nowhere.pt", "no such file"),
        ("--data=demo --esc10", "expected ESC-50, found demo"),
        ("--drop-path=1", "drop_path (1.0)"), ("--l2=0", "l2 (0.0)"),
        ("embed demo --checkpoint={last}", "has no files"),
        ("--checkpoint={broken}/a.wav", "a.wav: not a whole checkpoint"),
        ("--out={run} --resume", "not a run of"), ("--weighted", "sampling weights"),
        ("--out={tuned} --resume --lr=0.5", "--lr 0.5"),
        ("--out={tuned} --resume --checkpoint=other.pt", "--checkpoint other.pt"),
        ("--out={tuned} --resume --data=demo", "not the classes that the run in"),
        ("--batch-size=5 --accumulate=2", "multiple"), ("--shots=1", "--shots 1"),
        ("--mode=linear --shots=0,x", "--shots 0,x"), ("look nowhere.wav", "no such file"),
        ("look demo --out={empty}/a.xyz", "Format 'xyz' is not supported"),
        ("look demo --out=/dev/null/x.png", "expected a folder"),
        ("predict a.wav --checkpoint={tuned}/last.pt --every=1e307", "at most 0.64, what"),
        ("look demo --seed=x", "invalid int value"), ("--checkpoint=", "no such file"),
        ("predict a.wav --checkpoint={tuned}", "model.safetensors: no such file"),
        ("predict a.wav --checkpoint={tuned}/last.pt --every=2", "at most 0.64, what"),
        ("embed {empty} --checkpoint={last} --workers=-1", "at least 0"),
        ("embed a.wav --checkpoint={last} --out={last}/x.npz", "expected a folder"),
        ("embed nowhere --checkpoint={last}", "no such file or folder"),
        ("predict {empty} --checkpoint={last} --top=0", "--top 0: must be above 0"),
        ("predict a.wav --checkpoint={tuned}/last.pt --every=nan", "nan: must be above 0"),
        ("predict {empty} --checkpoint={last}", "without a classifier"),
        ("predict {broken} --checkpoint={tuned}/last.pt --labels={broken}/a.wav",
         "1 names for 2 classes"), ("--data={broken}", "no labelled data set")],
}


@pytest.mark.parametrize("program, wrong, says", [
    (program, *row) for program, rows in BAD_INPUT.items() for row in rows])
def test_bad_input_gets_one_line_and_status_2(program, wrong, says, sounds, whole_run, esc, tuned,
                                              tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    places = {"empty": tmp_path / "empty", "broken": tmp_path / "broken", "run": whole_run,
              "last": whole_run / "last.pt", "tuned": tuned,
              "silent": write(tmp_path / "silent.wav", np.zeros(20_000)),
              "faint": write(tmp_path / "faint.wav", np.where(np.arange(20_720) % 97, 0, 2**-15))}
    for name in ("empty", "broken"):
        places[name].mkdir()
    (tmp_path / "broken/a.wav").write_text("no sound")
    words = wrong.format(**places).split()
    if wrong.startswith("--"):
        words = [*(flags(sounds, "out") if program == "eat" else [f"--data={esc}"]), *words]
    if program != "data":  # packing reads before it knows
        monkeypatch.setattr(data, "DataLoader", lambda *_, **__: pytest.fail("it reads already"))
    refused(sys.modules[program].main, words, says, capsys)


@pytest.mark.parametrize("device, more", [
    ("cpu", ["--clones=1000000000"]),
    pytest.param("cuda", ["--dim=768", "--heads=12", "--depth=12", "--no-compile"], marks=cuda)])
def test_too_little_memory_is_one_line(device, more, sounds, tmp_path, capsys):
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        assert eat.main(flags(sounds, tmp_path, f"--device={device}", *more)) == 1
    finally:
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("eat.py: out of memory") and "--accumulate 2" in said


def test_help_names_every_field(capsys):
    for main, kinds in ((eat.main, (Recipe, EATConfig, eat.Machine)),
                        (finetune.main, (FineTune, eat.Machine))):
        with pytest.raises(SystemExit):
            main(["--help"])
        said = capsys.readouterr().out
        names = [name for kind in kinds for name in kind.__dataclass_fields__]
        assert all("--" + name.replace("_", "-") in said for name in names)
        assert "[0]" in said  # a default of 0 is told

# ---- eat.py: what goes wrong ---------------------------------------------------------------------


def train(out, machine, clips, resumed=None, config=small(), **more):
    """A run of eat.train with batches of 2 -> its last checkpoint, and the one before."""
    how = dict(batch_size=2, lr=1e-3, warmup_steps=0, log_every=1, save_every=1)
    resumed = resumed and {**resumed}
    eat.train(config, Recipe(out=str(out), **how, **more), clips, machine, resumed)
    return [eat.read_checkpoint(path) for path in eat.find_checkpoints(out)]


@pytest.mark.parametrize("device, precision", [
    ("cpu", "float32"), ("cpu", "bfloat16"), ("cpu", "float16"),
    pytest.param("cuda", "bfloat16", marks=cuda), pytest.param("cuda", "float16", marks=cuda)])
def test_a_poisoned_batch_leaves_the_weights_untouched(device, precision, tmp_path, capsys):
    machine, last = machine_of(device, precision), 20  # float16 has found its scale by then
    after, before = train(tmp_path, machine, waves(loud={last - 1}), steps=last)
    assert (before["step"], after["step"]) == (last - 1, last)
    assert logged(tmp_path)[-1]["not_finite"] == 1 and logged(tmp_path)[-1]["loss"] is None
    assert f"step {last}: the gradients of 1 of the last 1 steps" in capsys.readouterr().err
    assert precision == "float16" or after["scaler"]["scale"] == 1
    decay = Recipe(steps=last).teacher_decay(last)
    for name, x in before["model"].items():
        if name.startswith("teacher."):  # nears the unchanged student
            student = before["model"][name.replace("teacher.", "student.")]
            x = decay * x + (1 - decay) * student
            torch.testing.assert_close(after["model"][name], x, atol=1e-7, rtol=1e-6)
        else:
            assert torch.equal(after["model"][name], x), name
    moments = [state["optimizer"]["state"] for state in (after, before)]
    torch.testing.assert_close(*moments, atol=0, rtol=0)
    further, _ = train(tmp_path, machine, waves(), resumed=after, steps=last + 2)
    assert not torch.equal(further["model"]["student.cls"], after["model"]["student.cls"])
    other = "float16" if precision != "float16" else "bfloat16"  # another scaler's state is no use
    further, _ = train(tmp_path, machine_of(device, other), waves(), resumed=after, steps=last + 2)
    assert (further["scaler"]["scale"] > 1) == (other == "float16")
    with pytest.raises(data.RunStopped, match="in a row"):
        train(tmp_path / "2", machine, waves(loud=range(100)), steps=30)


def test_a_decoder_without_a_loss_is_no_collapse():
    line, recipe = {"step": 9, "target_std": 0.9, "prediction_std": 0.001}, Recipe(out="nowhere")
    eat.check_health(line, 0, small(frame_weight=0.0), recipe)
    for config, lower in ((small(), {}), (small(frame_weight=0.0), {"target_std": 0.001})):
        with pytest.raises(data.RunStopped, match="collapsed"):
            eat.check_health({**line, **lower}, 0, config, recipe)


@pytest.mark.parametrize("device, scale", [
    ("cpu", 2.0**24), ("cpu", 2.0**-40), pytest.param("cuda", 2.0**24, marks=cuda)])
def test_the_scale_of_float16_settles(device, scale, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler(device, init_scale=scale)
    monkeypatch.setattr(eat.Machine, "scaler", lambda self: scaler)
    model = train(tmp_path, machine_of(device, "float16"), waves(), steps=40)[0]["model"]
    assert all(x.isfinite().all() for x in model.values())
    wrong = [line["not_finite"] for line in logged(tmp_path)]
    assert wrong[0] == (scale > 1) and not any(wrong[-5:])
    assert scale < 1 or 1 < scaler.get_scale() < scale
    assert model["student.pre_norm.bias"].any()  # it learns


@pytest.mark.parametrize("program", ["eat", "finetune"])
def test_a_clip_beyond_all_measure_is_skipped_and_named(program, sounds, start_from, tmp_path,
                                                        capsys):
    """Its spectrogram, and with it features and gradients, would not be finite."""
    loud, out = 1e30 * np.random.default_rng(0).standard_normal(11_200), tmp_path / "out"
    if program == "eat":
        folder = shutil.copytree(sounds, tmp_path / "loud")
        write(folder / "loud.wav", loud, kind="DOUBLE")
        assert eat.main(flags(folder, out, "--stats=measure")) == 0
    else:
        folder = make_esc(tmp_path / "esc")
        write(folder / "audio/1-1000-A-41.wav", loud, kind="DOUBLE")
        assert fine(folder, out, start_from, "--steps=4", "--batch-size=2") == 0
    assert not any(line["not_finite"] for line in logged(out))
    assert capsys.readouterr().err.count("above 1e12") == 1


def test_poor_gradients_cost_fine_tuning_their_steps_only(esc, start_from, tmp_path, monkeypatch,
                                                          capsys):
    calls, augmented = itertools.count(), finetune.augmented

    def loud_once(*how):
        x, *more = augmented(*how)
        return x * (1e30 if next(calls) == 1 else 1), *more

    monkeypatch.setattr(finetune, "augmented", loud_once)
    assert fine(esc, tmp_path, start_from, "--fold=1", "--steps=4") == 0
    lines = logged(tmp_path)
    assert [line["not_finite"] for line in lines] == [0, 1, 0, 0]
    assert [line["loss"] is None for line in lines] == [False, True, False, False]
    assert all(x.isfinite().all() for x in weights(tmp_path)[1].values())
    assert "taught the model nothing" in capsys.readouterr().err


def test_a_second_signal_ends_a_run_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and & have it ignored
    with pytest.raises(KeyboardInterrupt), eat.stop_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@linux
def test_a_full_disk_does_not_end_the_run(sounds, whole_run, tmp_path, capsys):
    out, path = tmp_path / "out", tmp_path / "log.jsonl"
    out.mkdir()
    (out / "last.pt.part").symlink_to("/dev/full")  # the first checkpoint meets it
    assert eat.main(flags(sounds, out, "--save-every=3")) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert len(said) == 1 and "if any, is unchanged; going on" in said[0]
    assert same_runs(out, whole_run)
    log = eat.Log(str(tmp_path), 0, 9, machine_of(), waves())
    path.symlink_to("/dev/full")
    log.append({"step": 1})
    path.unlink()
    log.append({"step": 2})
    log.append({"step": 3})
    (tmp_path / "log.jsonl.part").symlink_to("/dev/full")
    eat.Log(str(tmp_path), 2, 9, machine_of(), waves())  # cannot take the last one out
    assert [line["step"] for line in logged(tmp_path)] == [2, 3]
    assert "log.jsonl: No space left on device" in capsys.readouterr().err


def test_a_run_goes_on_from_the_checkpoint_before(sounds, whole_run, tmp_path, capsys, monkeypatch):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    content = bytearray((tmp_path / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(content)
    resumed = flags(sounds, tmp_path, "--resume")
    refused(eat.main, resumed, "(BadZipFile); to go on from the one before it, rename", capsys)
    os.replace(tmp_path / "previous.pt", tmp_path / "last.pt")
    with monkeypatch.context() as patch:  # which is not the file's fault
        patch.setattr(eat, "load_inert", lambda _: torch.empty(2**60))
        assert eat.main(resumed) == 1
    assert "out of memory" in capsys.readouterr().err
    assert eat.main(resumed) == 0
    assert "resumed  at step 4" in capsys.readouterr().out
    assert same_runs(tmp_path, whole_run)


def test_no_flipped_bit_goes_unnoticed(whole_run, tmp_path):
    content, rng = (whole_run / "last.pt").read_bytes(), np.random.default_rng(0)
    whole, path, harmless = eat.read_checkpoint(whole_run / "last.pt"), tmp_path / "x.pt", 0
    for place in rng.integers(len(content), size=100):
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with contextlib.suppress(UsageError):
            state = eat.read_checkpoint(path)  # it was padding
            assert state["config"] == whole["config"] and state["step"] == whole["step"]
            torch.testing.assert_close(state["model"], whole["model"], atol=0, rtol=0)
            harmless += 1
    assert harmless < 50

# ---- eat.py: checkpoints -------------------------------------------------------------------------


def test_a_damaged_or_misfitting_checkpoint_is_named(whole_run, tmp_path):
    path, (no_encoder, misfit) = tmp_path / "last.pt", (io.BytesIO(), io.BytesIO())
    torch.save({"config": {}, "model": {"x": torch.zeros(1000)}}, no_encoder)
    state = torch.load(whole_run / "last.pt", weights_only=True)
    state["model"] |= {"student.extra": torch.zeros(1), "student.pre_norm.weight": torch.zeros(5)}
    del state["model"]["student.cls"]
    torch.save(state, misfit)
    whole, wrong = (whole_run / "last.pt").read_bytes(), "not a whole checkpoint"
    for content, says in (
        (b"<html>not found</html>", wrong), (b"PK\x03\x04 cut short", wrong),
        *((whole[: int(share * len(whole))], wrong) for share in (0, 0.01, 0.5, 0.999)),
        (no_encoder.getvalue(), "no encoder in it; it has x"),
        (misfit.getvalue(), 'Missing.*"cls".*Unexpected.*"extra".*pre_norm.weight'),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"last.pt: {says}"):
            eat.load_encoder(path)


@fixtures
@pytest.mark.parametrize("name", [
    "fairseq_pretrained.pt", "fairseq_finetuned.pt", "hf_pretrained", "hf_finetuned",
    "hf_finetuned/model.safetensors"])
def test_the_release_checkpoints_give_its_figures(name):
    models = {"tokens": eat.load_encoder(TINY / name)}
    if "finetuned" in name:
        models["logits"] = finetune.load_classifier(TINY / name)
    expected = torch.load(TINY / "expected.pt", weights_only=True)
    for clip in expected.values():  # of the model's length, half of it, twice it
        for kind, model in models.items():
            torch.testing.assert_close(model(clip["spectrogram"]), clip[kind], atol=1e-5, rtol=0)


@fixtures
@pytest.mark.parametrize("name", ["hf_pretrained", "hf_finetuned"])
def test_a_hugging_face_folder_comes_out_as_it_went_in(name, tmp_path):
    assert eat.main(["export", str(TINY / name), str(tmp_path / "out")]) == 0
    folders = tmp_path / "out", TINY / name
    ours, theirs = (safetensors.torch.load_file(x / "model.safetensors") for x in folders)
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)
    ours, theirs = (json.loads((x / "config.json").read_text()) for x in folders)
    assert ours | theirs == ours  # it says more, such as mean and deviation


@pytest.mark.parametrize("name, dtype", [("hf", torch.float32), ("eat.safetensors", torch.float16)])
def test_our_encoder_survives_export(name, dtype, whole_run, tmp_path):
    source, target = str(whole_run / "last.pt"), tmp_path / name
    assert eat.main(["export", source, str(target), "--note=some tones"]) == 0
    ours, back = eat.load_encoder(source), eat.load_encoder(target)
    for key, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor.to(dtype).float()), key
    assert back.config == ours.config
    with pytest.raises(UsageError, match="an encoder alone"):
        eat.load_pretrained(target)
    if name == "hf":
        (target / "config.json").unlink()  # sizes from the shapes alone, heads of 64 as in base
        config = eat.load_encoder(target).config
        assert (config.dim, config.depth, config.heads) == (32, 2, 1)
        return
    with safetensors.safe_open(target, "pt") as file:
        assert file.metadata()["note"] == "some tones"
        assert all(file.get_tensor(key).dtype == dtype for key in file.keys())


def test_an_encoder_of_uneven_width_can_be_read_back_and_cast(sounds, tmp_path):
    """32 x 3.3 is 105.6: the MLP has 106 channels."""
    assert eat.main(flags(sounds, tmp_path, "--mlp-ratio=3.3", steps=1)) == 0
    encoder = eat.load_encoder(tmp_path / "last.pt").bfloat16()
    assert encoder.blocks[0].mlp.fc1.weight.shape == (106, 32)
    assert encoder(torch.ones(1, 1, 64, 128).bfloat16()).dtype == torch.bfloat16


def test_no_word_of_a_file_can_ask_for_more_memory_than_it_holds(whole_run, tmp_path):
    eat.export(str(whole_run / "last.pt"), str(tmp_path))
    path, state = tmp_path / "config.json", torch.load(whole_run / "last.pt")
    config = json.loads(path.read_text())
    for wrong in ({"num_heads": 10**9}, {"img_size": [10**12, 128]}, {"img_size": ["x", 128]},
                  {"norm_eps": -1.0}):
        path.write_text(json.dumps({**config, **wrong}))
        with pytest.raises(UsageError, match=re.escape(f"{tmp_path}: ") + r"[^\n]*\Z"):
            eat.load_encoder(tmp_path)
    # Of sizes what the tensors say counts.
    said = {"norm_eps": None, "embed_dim": 10**9, "depth": "many", "mlp_ratio": 1e9}
    path.write_text(json.dumps({**config, **said}))
    state["config"] |= {"dim": 10**9, "depth": 10**9}
    torch.save(state, tmp_path / "last.pt")
    for path in (tmp_path, tmp_path / "last.pt"):
        found = eat.load_encoder(path).config
        assert (found.norm_eps, found.dim, found.depth, found.mlp_ratio) == (1e-6, 32, 2, 4)
    state["config"]["mlp_ratio"] = 1e9
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(UsageError, match="mlp_ratio .* at most 64"):
        eat.load_encoder(tmp_path / "last.pt")


class Calls(tuple):
    """Pickles as a call of its first element."""

    def __reduce__(self):
        return self[0], self[1:]


class Stranger:
    pass


class HugeStorage(pickle.Pickler):
    """A Stranger becomes a tensor that claims more elements than its bytes hold."""

    def persistent_id(self, thing):
        if type(thing) is Stranger:
            return ("storage", torch.FloatStorage, "0", "cpu", 10**12)


REBUILD, STORAGE = torch._utils._rebuild_tensor_v2, torch.FloatStorage(4)
HOSTILE = {
    "os.system": Calls((os.system, "touch ran")), "eval": Calls((eval, "open('ran', 'w')")),
    "getattr": Calls((getattr, "x", "upper")), "numpy": Calls((np.load, "ran")),
    "process": Calls((subprocess.Popen, ["touch", "ran"])), "nested": None, "huge storage": None,
    "reach beyond": Calls((REBUILD, STORAGE, 0, (5,), (1,), False, {})),
    "negative stride": Calls((REBUILD, STORAGE, 3, (4,), (-1,), False, {})),
    "wrong storage": Calls((REBUILD, "no storage", 0, (4,), (1,), False, {})),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", ["cfg", "model", "config"])
def test_no_code_in_a_checkpoint_runs(kind, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil, buffer, ran = HOSTILE[kind], io.BytesIO(), []
    if kind == "nested":
        torch.save(Calls((os.system, "touch ran")), buffer)
        evil = Calls((torch.storage._load_from_bytes, buffer.getvalue()))
    if kind == "huge storage":
        HugeStorage(buffer, 2).dump({"cfg": None, "model": {"x": Stranger()}})
        with zipfile.ZipFile("evil.pt", "w") as archive:
            archive.writestr("x/data.pkl", buffer.getvalue())
            archive.writestr("x/data/0", b"\0" * 16)
    else:
        torch.save({"model": {"x": torch.zeros(2)}, place: evil}, "evil.pt")
    monkeypatch.setattr(os, "system", ran.append)
    with pytest.raises(UsageError, match=r"evil\.pt[^\n]*\Z"):
        eat.load_encoder("evil.pt")
    assert not ran and os.listdir() == ["evil.pt"]


def test_unknown_classes_become_stand_ins_that_keep_their_state(tmp_path):
    stranger = Stranger()
    stranger.rate, stranger.kind, stranger.best = 0.5, {"a": [1, 2]}, np.float64(3.5)
    turned, half = torch.arange(6.0).view(2, 3).T, torch.ones(2, dtype=torch.bfloat16)
    torch.save({"cfg": stranger, "x": turned, "half": half}, tmp_path / "x.pt")
    found = eat.load_inert(tmp_path / "x.pt")
    assert type(found["cfg"]) is eat.Stub
    assert vars(found["cfg"]).items() >= {"rate": 0.5, "kind": {"a": [1, 2]}}.items()
    assert type(found["cfg"].best) is eat.Stub  # NumPy's
    assert torch.equal(found["x"], turned) and found["half"].dtype == torch.bfloat16


def test_a_fine_tuned_file_has_its_own_length():
    sound = {"target_length": 1024, "mask_prob": 0.7, "decoder": {"decoder_layers": 4}}
    inner = {"task": {"target_length": 1024}, "model": {"depth": 2, "modalities": {"image": sound}}}
    outer = {"task": {"target_length": 512}, "model": {"pretrained_model_args": inner}}
    for config, length in ((inner, 1024), (outer, 512), ({"model": inner["model"]}, 1024)):
        found = eat.fairseq_settings(config)
        assert (found["target_length"], found["depth"], found["decoder_layers"]) == (length, 2, 4)

# ---- eat.py: frozen features ---------------------------------------------------------------------


def test_loudness_by_hand():
    """Ten times the power is 1.995 times as loud; padding is not heard, however loud it is."""
    std, x = 2.0, torch.zeros(2, 1, 64, 128)
    x[:, :, 16:32] = math.log(10) / (2 * std)
    x[:, :, 48:] = 100.0
    found = data.loudness(x, std, torch.tensor([2, 3]), 16)
    loud = 10**0.3
    wanted = torch.tensor([[1, loud, 0, 0], [1, loud, 1, 0]])
    torch.testing.assert_close(found, wanted / wanted.sum(1, keepdim=True))


def test_nearest_neighbours_by_hand():
    bank = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
    targets = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    queries = torch.tensor([[2.0, 0.0], [-3.0, 0.01]])
    assert eat.nearest_neighbours(bank, targets, queries, k=2).argmax(1).tolist() == [0, 1]
    many = eat.nearest_neighbours(bank, targets, queries.repeat(1000, 1), k=2).argmax(1)
    assert many.tolist() == [0, 1] * 1000  # more than are compared at a time
    scores = eat.nearest_neighbours(bank, targets, torch.tensor([[1.0, 0.1]]), k=4)
    assert eat.nearest_neighbours(bank[:1], targets[:1], queries).isfinite().all()
    # The four neighbours lie opposite in pairs.
    assert scores[0].sum().item() == pytest.approx(0, abs=1e-5)


@real_sound
@pytest.mark.parametrize("folder", ["esc10", "pool"])
def test_real_sound_trains(folder, tmp_path):
    files = sorted(map(str, (SHARED / "data" / folder).rglob("*.ogg")))
    (tmp_path / "list.txt").write_text("\n".join(files[:: len(files) // 100]))
    more = ["--frames=512", "--stats=measure", "--workers=1"]
    assert eat.main(flags(tmp_path / "list.txt", tmp_path, *more, steps=3)) == 0
    config = torch.load(tmp_path / "last.pt", weights_only=True)["config"]
    assert -8 < config["mean"] < -6 and 4 < config["std"] < 6.5
    if folder == "esc10":
        esc10 = labelled(SHARED / "data/esc10")
        assert (esc10.kind, len(esc10.clips), len(esc10.classes)) == ("ESC-10", 400, 10)
        assert [(len(train), len(test)) for train, test in esc10.folds.values()] == [(320, 80)] * 5

# ---- data.py -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, near", [("cpu", 1e-4), pytest.param("cuda", 2e-3, marks=cuda)])
def test_fbank_equals_kaldi_for_every_row(device, near):
    torch.manual_seed(0)
    waveforms = torch.randn(4, 12_345) * torch.tensor([0.1, 0.01, 1e-3, 0])[:, None]
    waveforms[1] += 0.1 * torch.sin(torch.arange(12_345) * 0.2)
    for row, waveform in zip(fbank(waveforms.to(device)).cpu(), waveforms):
        kaldi = torchaudio.compliance.kaldi.fbank(
            waveform[None], htk_compat=True, sample_frequency=16000, use_energy=False,
            window_type="hanning", num_mel_bins=128, dither=0, frame_shift=10)
        torch.testing.assert_close(row, kaldi, atol=near, rtol=0)


def test_padding_comes_before_the_normalisation_and_is_not_measured(tmp_path):
    waveform = torch.randn(16_000)
    padded = F.pad(waveform, (0, 24_000))
    lengths = torch.tensor([16_000, 40_000])
    x = spectrogram(torch.stack([padded, padded]), lengths, 256, mean=-4.0, std=3.0)
    assert x.shape == (2, 1, 256, 128)
    torch.testing.assert_close(x[0, 0, :98], (fbank(waveform[None])[0] + 4) / 6)
    assert (x[0, 0, 98:] == 4 / 6).all()  # one second has 98 whole windows
    assert (x[1, 0, 98:248] != 4 / 6).all()  # digital silence is sound; padding is not
    sound = load_audio(write(tmp_path / "a.wav", (0.1 * waveform).numpy(), kind="FLOAT"))
    x = fbank((sound - sound.mean())[None])
    found = data.measure_stats(open_clips(str(tmp_path), 1024))
    assert found == pytest.approx((x.mean().item(), x.std().item()), abs=1e-3)


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 44_100, 44_101, 47_999, 48_000,
                                  96_000, 192_000])
def test_any_rate_becomes_16_kHz(rate, tmp_path):
    waveform = load_audio(tone(tmp_path / "a.wav", rate))
    assert waveform.dtype == torch.float32
    assert abs(len(waveform) - 32_000) <= 32_000 * 5e-4 + 1
    t = torch.arange(len(waveform)).double() / 16_000
    want = 0.5 * torch.sin(2 * torch.pi * 440 * t).float()
    middle = slice(1000, 5000)  # away from the edges, and before a rounded ratio has drifted far
    torch.testing.assert_close(waveform[middle], want[middle], atol=0.02, rtol=0)


def test_channels_are_averaged_and_parts_can_be_read(tmp_path):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (16_000, 2))
    path = write(tmp_path / "a.flac", sound, kind="PCM_24")
    want = torch.from_numpy(sound.mean(1)).float()
    torch.testing.assert_close(load_audio(path), want, atol=1e-6, rtol=0)
    part = load_audio(path, start=0.25, seconds=0.5)
    torch.testing.assert_close(part, want[4000:12_000], atol=1e-6, rtol=0)
    phone = write(tmp_path / "phone.wav", sound[:, 0], kind="GSM610")  # in which one cannot seek
    assert torch.equal(load_audio(phone, 0.25, 0.5), load_audio(phone)[4000:12_000])


def damaged(content, rng):
    """Cut, with a hole, of noise, lying in its header, or with flipped bits."""
    way, place = rng.integers(6), int(rng.integers(len(content)))
    if way < 2:
        return content[:place] + (content[place + 3000 :] if way else b"")
    if way == 2:
        return content[: place % 100] + rng.bytes(len(content))
    if way == 3:  # about channels, rate or length, where a wav has them
        place = rng.choice([22, 24, 40])
        lie = (b"\0\0\0\0", b"\1\0\0\0", b"\xff\xff\xff\xff")[rng.integers(3)]
        return content[:place] + lie + content[place + 4 :]
    content = bytearray(content)
    for place in rng.integers(64 if way == 4 else len(content), size=20):
        content[place] ^= 1 << rng.integers(8)
    return content


def make_corpus(folder, count):
    """`count` damaged files and 17 odd ones; what is called bad is no sound."""
    rng, whole = np.random.default_rng(0), []
    for suffix, kind in ((".wav", "PCM_16"), (".wav", "DOUBLE"), (".flac", "PCM_16"),
                         (".ogg", "VORBIS"), (".ogg", "OPUS"), (".mp3", "MPEG_LAYER_III"),
                         (".aiff", "PCM_16"), (".au", "ULAW")):
        path = write(folder / f"x{suffix}", 0.3 * rng.standard_normal((9600, 2)), 48_000, kind)
        whole.append((suffix, path.read_bytes()))
        path.unlink()
    for k in range(count):
        suffix, content = whole[k % len(whole)]
        (folder / f"{k:04}{suffix}").write_bytes(damaged(content, rng))
    sound = 0.3 * rng.standard_normal(16_000)
    for name, samples, rate in (
        ("bad nan.wav", np.append(sound, np.nan), 16_000), ("bad none.wav", [], 16_000),
        ("bad inf.wav", np.append(sound, np.inf), 16_000), ("bad rate.wav", sound, 7),
        ("huge.wav", sound * 1e300, 16_000), ("odd.wav", sound, 44_101),
        ("prime.wav", sound, 999_983), ("many.wav", np.tile(sound[:, None], 32), 16_000),
        ("one.wav", sound[:1], 16_000), ("line\nbreak.wav", sound, 16_000),
    ):
        write(folder / name, samples, rate, "DOUBLE")
    write(os.fsencode(folder) + b"/not utf-8 \xff.wav", sound)
    (folder / "bad text.wav").write_text("This is not sound.")
    (folder / "bad nothing.wav").touch()
    (folder / "bad folder.wav").mkdir()
    (folder / "bad link.wav").symlink_to(folder / "nowhere.wav")
    os.mkfifo(folder / "bad pipe.wav")


@linux
def test_a_thousand_damaged_files_harm_nothing(tmp_path, capfd):
    folder, out = tmp_path / "corpus", tmp_path / "out"
    folder.mkdir()
    make_corpus(folder, 1000)
    paths = [*data.find_audio(str(folder)), f"{folder}/bad folder.wav", f"{folder}/bad lost.wav"]
    read, wrong = 0, 0
    tracemalloc.start()  # a header may claim any length
    for path in paths:
        try:
            x = load_audio(path)
            assert x.dtype == torch.float32 and x.ndim == 1 and len(x) and x.isfinite().all()
            assert "/bad" not in path, path
            read += 1
        except AudioError as error:
            assert error.path == path and "\n" not in str(error)
            str(error).encode()
            wrong += 1
    assert tracemalloc.get_traced_memory()[1] < 500e6
    tracemalloc.stop()
    assert read > 100 and wrong > 100 and read + wrong == 1017

    clips = open_clips(str(folder), 64)  # every clip: which files have something wrong with them?
    broken = set(clips.skipped)
    for k in range(len(clips)):
        try:
            clips.usable(k)
        except AudioError as error:
            broken.add(error.path)
    assert {f"{folder}/bad nan.wav", f"{folder}/bad pipe.wav"} <= broken and len(broken) > 100
    more = ["--batch-size=32", "--log-every=5", "--workers=1"]
    assert eat.main(flags(folder, out, *more, steps=math.ceil(len(clips) / 32))) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if " so far; new: " in line]
    named = re.findall(rf"{folder}/([^(]+) \(", " ".join(said))  # each once, when it is met
    assert len(named) == len(set(named)) > 3 and logged(out)[-1]["skipped"] == len(broken)
    assert all(x.isfinite().all() for x in weights(out)[1].values())


def test_a_long_file_becomes_clips_that_hold_all_of_it(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 100_000)
    write(tmp_path / "long.wav", samples, kind="FLOAT")
    clips = open_clips(str(tmp_path), 128)
    assert len(clips) == math.ceil(100_000 / clips.samples)
    whole = torch.from_numpy(samples).float()
    seen = torch.zeros(100_000, dtype=torch.bool)
    for k in range(len(clips)):
        part = slice(int(clips.start[k]), int(clips.start[k]) + clips.samples)
        torch.testing.assert_close(clips.usable(k), whole[part])
        seen[part] = True
    assert seen.all()


@pytest.mark.parametrize("mark, end", [("", "\n"), ("", "\r\n"), ("\ufeff", "\r\n")],
                         ids=["plain", "of Windows", "of Windows with a mark"])
def test_a_path_is_a_folder_a_file_or_a_list(mark, end, tmp_path, monkeypatch, capsys):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/none").mkdir()
    (tmp_path / "._a.wav").touch()  # what macOS puts beside files
    both = [str(tone(tmp_path / name)) for name in ("a.WAV", "deep/er/b.flac")]
    missing, folder = str(tmp_path / "one\x85name.wav"), str(tmp_path)  # and no end of a line
    (tmp_path / "deep/up").symlink_to(tmp_path)  # in a circle
    (tmp_path / "twice").symlink_to(tmp_path / "deep")
    for name, lines in {
        "list.txt": ["a.WAV", "", both[1], "one\x85name.wav"], "none.txt": [],
        "train.tsv": [folder, "a.WAV\t32000", "deep/er/b.flac\t32000"],
    }.items():
        (tmp_path / name).write_bytes((mark + end.join([*lines, ""])).encode())
    for name, wanted in (("", both), ("a.WAV", both[:1]), ("list.txt", [*both, missing]),
                         ("train.tsv", both)):
        assert data.find_audio(str(tmp_path / name)) == wanted
    clips = open_clips(str(tmp_path / "list.txt"), 256)
    assert list(map(clips.name, range(2))) == both and list(clips.skipped) == [missing]
    for name, says in (("no", "no such file"), ("deep/none", "no sound"), ("none.txt", "no sound")):
        with pytest.raises(AudioError, match=says):
            data.find_audio(str(tmp_path / name))
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scan(path if "er" not in path[-2:] else "none"))
    assert data.find_audio(str(tmp_path)) == both[:1]  # a folder that cannot be entered is named
    assert capsys.readouterr().err == "skipped  none: No such file or directory\n"


def test_a_long_file_is_resampled_in_pieces_as_in_one():
    sound = torch.rand((1 << 22) + 5_000)
    for rate in (44_100, 96_001):
        found, wanted = data._resampled(sound, rate), data._resampler(rate)(sound)
        assert abs(len(found) - len(wanted)) <= 1  # torchaudio counts them in float32
        least = min(len(found), len(wanted))
        torch.testing.assert_close(found[:least], wanted[:least], atol=1e-6, rtol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="its workers must fork")
def test_too_little_shared_memory_ends_the_run(sounds, tmp_path, capsys, monkeypatch):
    """Docker gives 64 MB. Found out later, as by torch itself, it would be waited for."""
    def full(x):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    for main, run in ((eat.main, flags(sounds, tmp_path / "out", "--workers=1")),
                      (data.main, ["pack", str(sounds), str(tmp_path / "pack"), "--workers=1"])):
        assert main(run) == 1
        assert "/dev/shm" in capsys.readouterr().err.splitlines()[-1]


def test_short_files_get_advice_that_fits(tmp_path, sounds, capsys):
    for k in range(5):
        tone(tmp_path / f"{k}.wav", seconds=0.7 if k < 4 else 7.0)
    assert eat.main(flags(tmp_path, tmp_path / "out", "--frames=256", "--resume", steps=1)) == 0
    said = capsys.readouterr()
    assert "out has no checkpoint: a new run begins" in said.err
    (line,) = [x for x in said.out.splitlines() if "half of the clips" in x]
    assert line.startswith("data ") and "no more than 0.70 s" in line
    assert line.endswith("try --frames 80")  # 68 windows in 0.7 s, and a multiple of 16
    for path, frames in ((tmp_path, 80), (sounds, 64)):
        assert open_clips(str(path), frames).advice() == ""
    esc = str(make_esc(tmp_path / "esc"))  # of 0.7 s, too
    for path in (esc, pack(esc, tmp_path / "packed").path):
        advice = data.open_labelled(path, 256).clips.advice()
        assert "nearly all of the clips" in advice and "try --frames 80" in advice
        assert data.open_labelled(path, 80).clips.advice() == ""
        long = data.open_labelled(path, 32).clips.advice()
        assert "longer than 0.50 s, and of each only the beginning" in long
    tone(Path(esc) / "audio/1-1000-A-41.wav", seconds=2.5)  # would be cut
    assert data.open_labelled(esc, 256).clips.advice() == ""


def test_unusable_clips_give_way_to_others_and_are_named(tmp_path):
    for k in range(4):
        tone(tmp_path / f"{k}.wav", seconds=1, hertz=100 * (k + 1))
    write(tmp_path / "1.wav", np.full(16_000, 0.25))
    clips = open_clips(str(tmp_path), 128)
    (tmp_path / "0.wav").unlink()  # after the headers were read
    batch = clips[[2, 1]]
    torch.testing.assert_close(batch.waveforms[1, :16_000], clips.usable(3))
    assert batch.lengths.tolist() == [16_000] * 2 and batch.numbers.tolist() == [2, 3]
    assert {Path(path).name for path in batch.skipped} == {"0.wav", "1.wav"}
    assert batch.skipped[str(tmp_path / "1.wav")] == "a clip of it is silent"
    for k in (2, 3):
        (tmp_path / f"{k}.wav").unlink()
    batch = clips[[0]]
    assert len(batch.waveforms) == 0 and len(batch.skipped) == 4


def test_damage_costs_the_clips_it_is_in(tmp_path):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 170_000)
    whole = write(tmp_path / "whole.flac", sound).read_bytes()
    half, hole = len(whole) // 2, len(whole) * 5 // 16
    cut = tmp_path / "cut.flac"
    cut.write_bytes(whole[:half])  # its header still claims all of it
    holed = tmp_path / "holed.flac"
    holed.write_bytes(whole[:hole] + bytes(2000) + whole[hole + 2000 :])
    sound[[60_000, 169_999]] = np.nan
    not_finite = write(tmp_path / "not finite.wav", sound, kind="FLOAT")
    for path, lost in ((cut, range(7, 17)), (holed, (4, 5)), (not_finite, (5, 16))):
        clips = open_clips(str(path), 64)
        numbers = [clips[[number]].numbers.item() for number in range(17)]
        assert set(numbers) == set(range(17)) - set(lost)
        assert all(number == k for k, number in enumerate(numbers) if k not in lost)


def test_the_demo_comes_from_its_seed_and_its_classes_do_not_differ_in_mean_spectrum():
    """By the mean power of mel bands, neighbours find little above chance (8 %)."""
    demo, same, other = (data.Demo(256, seed, size=240, held_out=True) for seed in (0, 0, 1))
    sound = demo.read(5)
    assert torch.equal(sound, same.read(5)) and sound.isfinite().all() and len(demo.classes) >= 10
    figures = [-0.003790, -0.037700, -0.001372, -0.006321]  # README's results are of this sound
    assert sound[[100, 9000, 20_000, 40_000]].tolist() == pytest.approx(figures, abs=1e-5)
    for others in (other, data.Demo(256, 0)):
        assert not torch.equal(sound, others.read(5))
    batch = data.Clips(demo, 256)[range(240)]
    means = fbank(batch.waveforms).exp().mean(1).log()
    labels = torch.as_tensor(demo.labels)
    scores = eat.nearest_neighbours(means[:160], F.one_hot(labels[:160]).float(), means[160:])
    assert (scores.argmax(1) == labels[160:]).float().mean() < 0.25

# ---- data.py: packs ------------------------------------------------------------------------------


def pack(source, out):
    assert data.main(["pack", str(source), str(out), "--workers=0"]) == 0
    return data.Pack(str(out))


@pytest.fixture
def several(tmp_path):
    """16-bit, float over 1, another rate, stereo; one broken, one empty, one of a strange name."""
    folder = tmp_path / "several"
    folder.mkdir()
    rng = np.random.default_rng(0)
    write(folder / "a.wav", rng.integers(-32768, 32768, 50_000).astype(np.int16))
    write(folder / "b.wav", rng.uniform(-3, 3, 9000), kind="FLOAT")
    write(folder / "c.flac", rng.uniform(-0.5, 0.5, (44_100, 2)), 44_100)
    (folder / "d.wav").write_text("no sound")
    write(folder / "e.wav", np.zeros(0))
    write(os.fsencode(folder) + b"/f\n\xff.wav", rng.uniform(-0.5, 0.5, 20_000))
    return folder


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_a_pack_holds_what_the_files_hold_and_is_read_by_whom_it_should(several, tmp_path, capsys):
    packed = pack(several, tmp_path / "pack")
    names, sound_of = packed.names, lambda k: packed.read(k, 0, 10**6)
    assert names == data.find_audio(str(several))
    whole = torch.from_numpy(soundfile.read(names[0], dtype="int16")[0])
    assert torch.equal(sound_of(0), whole / 32768)  # bit by bit
    for k in (1, 2, 5):
        sound = load_audio(names[k])
        within = 0.51 * max(1, sound.abs().max()) / 32768  # half a step of 16 bits of its peak
        torch.testing.assert_close(sound_of(k), sound, atol=within, rtol=0)
    assert list(packed.skipped) == [names[3], names[4]]
    assert packed.lengths[3] == packed.lengths[4] == 0
    assert "skipped 2" in capsys.readouterr().out
    # A plain file of samples, for whoever wants one.
    flat = np.memmap(tmp_path / "pack/samples", "<i2", mode="r")
    assert len(flat) == packed.lengths.sum() and (flat[:50_000] == whole.numpy()).all()

    clips, files = open_clips(str(tmp_path / "pack"), 128), open_clips(str(several), 128)
    assert len(clips) == len(files) == 6 and clips.skipped.keys() == files.skipped.keys()
    ours, theirs = clips[[0, 1, 2, 5]], files[[0, 1, 2, 5]]
    assert torch.equal(ours.lengths, theirs.lengths)
    assert torch.equal(ours.waveforms[:3], theirs.waveforms[:3])  # they were 16 bits
    mixed, wanted = (x[[0, 3]].waveforms for x in (clips, files))  # one of them is scaled
    torch.testing.assert_close(mixed, wanted, atol=3 / 32768, rtol=0)
    read = []
    for device in ("cpu", "cuda"):  # by the process itself, but for a card by workers
        with data.loading(clips, [[1, 0], [2, 3]], 2, torch.device(device)) as loader:
            read.append([batch.waveforms.clone() for batch in loader])
            assert len(getattr(loader, "_workers", [])) == (2 if device == "cuda" else 0)
    assert all(map(torch.equal, *read))


@linux
def test_a_pack_that_was_killed_is_packed_anew(several, tmp_path, capsys):
    cut = tmp_path / "cut"
    pack(several, tmp_path / "whole")
    run = ["pack", str(several), str(cut), "--workers=0"]
    driven(tmp_path, ("at(data, 'load_audio', 3, send(9))", "data", run, -9))
    refused(eat.main, flags(cut, tmp_path / "out"), "no sound in it", capsys)
    for name in ("samples", "pack.json.part"):  # killed just before the end
        with open(cut / name, "ab") as file:
            file.write(b"more than there is")
    pack(several, cut)
    for name in ("samples", "pack.json"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for folder in (cut, several):
        refused(data.main, ["pack", several, folder], "choose another folder", capsys)


def test_a_pack_whose_parts_do_not_fit_is_refused_or_costs_its_clips(several, tmp_path, capsys):
    pack(several, tmp_path / "pack")
    run, path = flags(tmp_path / "pack", tmp_path / "out"), tmp_path / "pack/samples"
    whole, clips = path.read_bytes(), open_clips(str(tmp_path / "pack"), 128)
    for content in (whole + b"\0\0", whole[: 2 * 40_000]):
        path.write_bytes(content)
        refused(eat.main, run, "not a whole pack (`samples` is longer or shorter than it was); "
                "pack the sound again", capsys)
    batch = clips[[0, 5]]  # of the pack that was opened when it was whole
    assert batch.numbers.tolist() == [0, 0]
    assert "samples: ends before pack.json says" in next(iter(batch.skipped.values()))
    (tmp_path / "pack/pack.json").write_text("{")
    refused(eat.main, run, "not a whole pack", capsys)


def test_packed_sound_gives_the_same_results(sounds, esc, whole_run, tuned, start_from, tmp_path):
    pack(sounds, tmp_path / "sounds")
    assert eat.main(flags(tmp_path / "sounds", tmp_path / "out")) == 0
    assert same_runs(tmp_path / "out", whole_run)
    pack(esc, tmp_path / "pack")
    assert fine(tmp_path / "pack", tmp_path / "tuned", start_from, "--steps=12") == 0
    assert same_runs(tmp_path / "tuned", tuned) and results(tmp_path / "tuned") == results(tuned)
    features, out = [], tmp_path / "x.npz"
    for path in (esc, tmp_path / "pack"):
        embed = ["embed", str(path), start_from, f"--out={out}", "--workers=1", "--device=cpu"]
        assert finetune.main(embed) == 0
        features.append(dict(np.load(out)))
    np.testing.assert_equal(*features)


def test_packed_clips_take_little_memory(tmp_path):
    """At most 300 bytes a clip, which is 600 MB for AudioSet-2M. The file of samples is sparse."""
    count, size = 200_000, data.clip_samples(16)
    about = {"source": "/sound", "names": [f"/sound/{k:08}" for k in range(count)], "skipped": {},
             "ends": [size * k for k in range(1, count + 1)], "units": [1 / 32768] * count}
    (tmp_path / "pack.json").write_text(json.dumps(about))
    (tmp_path / "samples").touch()
    os.truncate(tmp_path / "samples", 2 * size * count)
    tracemalloc.start()
    clips = open_clips(str(tmp_path), 16)
    assert len(clips) == count and clips.name(123_456) == "/sound/00123456"
    assert 0 <= next(data.shuffled(count, 0, 3 * count + 7)) < count
    assert not clips.source.read(count - 1, 0, size).any()
    assert tracemalloc.get_traced_memory()[1] < 300 * count
    tracemalloc.stop()

# ---- data.py: labelled data sets -----------------------------------------------------------------


def make_esc(folder, folds=(1, 2)):
    """ESC-50's layout: two classes, the first in ESC-10; two clips a class and fold."""
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in folds:
        for target, kind, hertz in ((41, "chainsaw,True", 300), (7, "rooster,False", 2500)):
            for take, more in (("A", 5), ("B", 0)):
                file = f"{fold}-1000-{take}-{target}.wav"
                tone(folder / "audio" / file, seconds=0.7, hertz=hertz + 20 * fold + more)
                rows.append(f"{file},{fold},{target},{kind},0,{take}")
    (folder / "meta/esc50.csv").write_text("\n".join(rows))
    return folder


def make_manifests(folder, weights=True):
    """The release's manifests: three labels, several a clip."""
    folder.mkdir()
    (folder / "label_descriptors.csv").write_text("0,/m/a,A\n1,/m/b,B\n2,/m/c,C\n")
    for part, clips in (("train", range(4)), ("eval", (4, 5))):
        paths = [tone(folder / f"{k}.wav", seconds=0.7, hertz=300 * (k + 1)).name for k in clips]
        lines = "\n".join([str(folder), *(f"{path}\t11200" for path in paths)])
        (folder / f"{part}.tsv").write_text(lines)
        labels = "\n".join(f"{k}\t{'/m/b,/m/a' if k % 2 else '/m/a'}" for k in clips)
        (folder / f"{part}.lbl").write_text(labels)
    if weights:
        (folder / "weight_train_all.csv").write_text("0\n0\n1\n3\n")
    return folder


def make_classes(folder, **counts):
    """A folder a class."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for k in range(count):
            tone(folder / name / f"{k}.wav", seconds=0.1)
    return folder


def labelled(path, **how):
    return data.open_labelled(str(path), 64, **how)


def names(dataset, numbers):
    return [Path(dataset.clips.name(n)).name for n in numbers.tolist()]


def test_esc_folders_have_folds_and_may_have_broken_missing_or_stray_clips(tmp_path):
    esc = labelled(make_esc(tmp_path / "esc"))
    assert (esc.kind, len(esc.clips), esc.multi_label) == ("ESC-50", 8, False)
    assert esc.classes == ["rooster", "chainsaw"] and list(esc.folds) == ["fold 1", "fold 2"]
    for k, (train, test) in enumerate(esc.folds.values(), 1):
        assert all(name.startswith(f"{k}-") for name in names(esc, test))
        assert sorted(train.tolist() + test.tolist()) == list(range(8))
    for n in range(8):
        is_saw = "-41.wav" in esc.clips.name(n)
        assert esc.targets([n]).tolist() == [[0, 1] if is_saw else [1, 0]]
    only = labelled(tmp_path / "esc", esc10=True)
    assert (only.kind, len(only.clips), only.classes) == ("ESC-10", 4, ["chainsaw"])
    with pytest.raises(AudioError, match="one fold"):
        labelled(make_esc(tmp_path / "2", folds=(2,)))

    folder = tmp_path / "esc"
    broken = esc.folds["fold 2"][0][-1].item()  # the last before the clips of the test fold
    Path(esc.clips.name(broken)).write_text("no sound")
    batch = esc.clips[[broken - 1, broken]]  # none of the other fold in its place
    assert batch.numbers.tolist() == [broken - 1] and len(batch.waveforms) == 1
    assert list(batch.skipped) == [esc.clips.name(broken)]
    os.remove(folder / "audio/1-1000-A-41.wav")
    tone(folder / "audio/stray.wav")
    esc = labelled(folder)
    assert len(esc.clips) == 7 and list(map(Path, esc.clips.skipped)) == [
        folder / "audio/1-1000-A-41.wav"]


def test_folders_of_classes_have_parts_or_lists_or_neither(tmp_path):
    for train, test in (("train", "test"), ("Training", "Validation")):
        for part in (train, test):
            make_classes(tmp_path / train / part, one=1, _two=1)
        parts = labelled(tmp_path / train)
        assert parts.classes == ["_two", "one"]
        assert [len(x) for x in parts.folds[test.lower()]] == [2, 2]

    folder = make_classes(tmp_path / "speech", bed=3, cat=3, _background_noise_=3)
    (folder / "validation_list.txt").write_text("bed/0.wav \n./cat/0.wav\n")
    tested = "bed/1.wav\ncat/1.wav\t\ncat/lost.wav\n_background_noise_/0.wav\n"
    (folder / "testing_list.txt").write_text(tested)
    speech = labelled(folder)
    assert (speech.kind, speech.classes) == ("Speech Commands", ["bed", "cat"])
    train, test = speech.folds["test list"]
    assert len(speech.clips) == 4  # without those of the validation list
    assert (names(speech, train), names(speech, test)) == (["2.wav"] * 2, ["1.wav"] * 2)

    make_classes(tmp_path / "flat", few=2, many=10)
    make_classes(tmp_path / "flat", one=1)  # nothing of it can be tested
    flat, again = (labelled(tmp_path / "flat", seed=1) for _ in range(2))
    ((train, test),), ((_, same),) = flat.folds.values(), again.folds.values()
    assert torch.equal(test, same) and flat.targets(test.tolist()).sum(0).tolist() == [1, 2, 0]
    assert sorted(train.tolist() + test.tolist()) == list(range(13))


def test_links_lead_to_the_same_files(tmp_path):
    make_manifests(tmp_path / "sound")
    (tmp_path / "far/away").mkdir(parents=True)
    lists = shutil.copytree(tmp_path / "sound", tmp_path / "lists",
                            ignore=shutil.ignore_patterns("*.wav"))
    for path in lists.glob("*.tsv"):
        path.write_text(path.read_text().replace(str(tmp_path), ".."))
    (tmp_path / "far/away/link").symlink_to(lists)
    make_classes(tmp_path / "all", one=3, two=3)
    for part in ("train", "test"):
        (tmp_path / "classes" / part).mkdir(parents=True)
        for name in ("one", "two"):
            (tmp_path / "classes" / part / name).symlink_to(tmp_path / "all" / name)
    for path, clips in (("far/away/link", 6), ("classes", 12)):
        packed = pack(tmp_path / path, tmp_path / f"packed{clips}").path
        for found in (labelled(tmp_path / path), labelled(packed)):
            assert len(found.clips) == clips and not found.clips.skipped


def test_manifests_have_several_labels_a_clip(tmp_path, capsys):
    audioset = labelled(make_manifests(tmp_path / "as"))
    pack(tmp_path / "as", tmp_path / "packed")
    for training, count in ((False, 6), (True, 4)):  # pre-training leaves eval.tsv's alone
        assert len(open_clips(str(tmp_path / "packed"), 128, training=training)) == count
    assert audioset.multi_label and audioset.classes == ["/m/a", "/m/b", "/m/c"]
    assert audioset.targets([2, 3]).tolist() == [[1, 0, 0], [1, 1, 0]]
    train, test = audioset.folds["eval"]
    assert (train.tolist(), test.tolist()) == ([0, 1, 2, 3], [4, 5])
    order = finetune.training_order(train, audioset, FineTune(weighted=True), seed=0)
    drawn = [next(order) for _ in range(20_000)]
    assert set(drawn) == {2, 3} and np.mean(np.equal(drawn, 3)) == pytest.approx(0.75, abs=0.02)
    for k in (2, 3):  # those of weight 0 are none to train on
        (tmp_path / f"as/{k}.wav").write_text("no sound")
    assert fine(tmp_path / "as", tmp_path / "out", "--weighted") == 2
    assert "eval: no clip to train on can be read" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe\0", b"a\n", b"a,b\nc,d\n", b"index,mid,name\n", b"-1\n0\n1\n3\n",
    b"filename,fold,target,category,esc10\na.wav,1\n"])
def test_lists_of_labels_in_another_form_are_one_line(content, tmp_path):
    make_esc(tmp_path / "esc")
    make_manifests(tmp_path / "as")
    for name in ("esc/meta/esc50.csv", "as/train.tsv", "as/train.lbl", "as/eval.lbl",
                 "as/label_descriptors.csv", "as/weight_train_all.csv"):
        path = tmp_path / name
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(AudioError, match=rf"\A{tmp_path}[^\n]*\Z"):
            labelled(tmp_path / name.split("/")[0])
        path.write_bytes(before)
    assert len(labelled(tmp_path / "as").clips) == 6  # only the lists were at fault

# ---- finetune.py: metrics, augmentation, probes --------------------------------------------------


def test_metrics_by_hand_with_ties_and_against_a_slow_version():
    scores = np.array([[0.9, 1], [0.8, 1], [0.7, 1], [0.6, 1]])
    by_hand = average_precision(scores, np.array([[1, 1], [0, 0], [1, 0], [0, 0]]))
    assert by_hand.tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 4])  # all equal: the share
    rng = np.random.default_rng(0)
    scores, targets = rng.integers(0, 6, (50, 20)) / 5, rng.random((50, 20)) < 0.2
    for k, found in enumerate(average_precision(scores, targets)):
        # Of each positive, the share of positives among all clips that score no lower.
        slow = [np.mean(targets[scores[:, k] >= score, k]) for score in scores[targets[:, k], k]]
        assert found == pytest.approx(np.mean(slow))
    # Classes without positives are left out.
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5]])
    targets = torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    result = finetune.evaluate(scores, targets, ["a", "b", "c"], multi_label=True)
    assert result["value"] == 1.0 and result["per_class"]["c"] is None
    targets = torch.tensor([[1.0, 0, 0], [1, 0, 0]])
    result = finetune.evaluate(scores, targets, ["a", "b", "c"], multi_label=False)
    assert result["value"] == 0.5 and result["confusion"] == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert result["per_class"] == {"a": 0.5, "b": None, "c": None}


def test_drop_path_skips_whole_clips_and_keeps_the_mean():
    block = eat.Block(small())
    block.drop_path = 0.25
    x = block.drop_some(torch.ones(4000, 3, 2))
    assert x.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (x == x[:, :1, :1]).all() and x.mean().item() == pytest.approx(1, abs=0.05)
    assert (block.eval().drop_some(torch.ones(4, 3, 2)) == 1).all()
    model = Classifier(Encoder(small(depth=3)), 2, drop_path=0.1)
    assert [block.drop_path for block in model.encoder.blocks] == pytest.approx([0, 0.05, 0.1])


def test_a_head_on_patches_leaves_the_padding_out():
    model = finetune.Classifier(Encoder(small()), 3, reading="patches").eval()
    for block in model.encoder.blocks:  # each token stays by itself
        torch.nn.init.zeros_(block.attn.proj.weight)
    x, steps = torch.randn(2, 1, 64, 128), torch.tensor([1, 3])
    padded = x.clone()
    padded[0, :, 16:], padded[1, :, 48:] = 5, -5
    torch.testing.assert_close(model(x, steps), model(padded, steps))
    assert not model(x).allclose(model(padded))
    torch.testing.assert_close(model(x), model(x, torch.tensor([4, 4])))
    model(x, steps).sum().backward()  # one time step does not deviate from itself
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_mixup_is_one_lambda_with_the_flipped_batch_and_takes_the_place_of_smoothing():
    x, targets = torch.randn(4, 1, 16, 128), torch.eye(4)
    mixed, labels = finetune.mixup(x, targets, 0.8, np.random.default_rng(0))
    share = np.random.default_rng(0).beta(0.8, 0.8)
    torch.testing.assert_close(mixed, share * x + (1 - share) * x[[3, 2, 1, 0]])
    torch.testing.assert_close(labels, share * targets + (1 - share) * targets[[3, 2, 1, 0]])
    found = []
    for alpha in (0.0, 0.8):
        recipe, rng = FineTune(mixup=alpha, label_smoothing=0.2), np.random.default_rng(0)
        found.append([finetune.augmented(torch.randn(4, 400), torch.full((4,), 400), targets,
                                         small(), recipe, rng)[2] for _ in range(200)])
    smooth, mixed = torch.stack(found[0]), torch.stack(found[1])
    torch.testing.assert_close(smooth, (0.8 * targets + 0.05).expand(200, -1, -1))
    as_they_were = (mixed == targets).all(2).all(1)
    assert as_they_were.float().mean().item() == pytest.approx(0.1, abs=0.05)


def test_spec_augment_masks_one_band_and_one_stretch_a_clip_after_the_noise():
    recipe = FineTune(**{**finetune.RECIPES["spc2"], "spec_augment": 0.4})
    sound = torch.randn(200, 10_480), torch.full((200,), 10_480), torch.eye(200)
    x, steps, _ = finetune.augmented(*sound, small(), recipe, np.random.default_rng(0))
    assert steps.tolist() == [4] * 200
    masked = x[:, 0] == 0  # exactly
    assert not (masked[0] == masked[1]).all()
    bins, frames = masked.all(1), masked.all(2)
    assert (masked == (bins[:, None] | frames[:, :, None])).all()
    for band in (bins, frames):
        assert (F.pad(band.int(), (1, 1)).diff(dim=1).abs().sum(1) <= 2).all()  # one piece
        widths, most = band.sum(1).float(), 0.4 * band.shape[1]
        assert 0.9 * most < widths.max() <= most + 1
        assert widths.mean().item() == pytest.approx((most - 1) / 2, rel=0.15)


def test_roll_and_gain_move_each_clip_within_itself():
    sound, lengths = torch.arange(1.0, 7), torch.full((50,), 6)
    waveforms = F.pad(sound, (0, 4)).expand(50, -1)
    rolled = finetune.roll_and_gain(waveforms, lengths, np.random.default_rng(1))
    gain = rolled.sum(1, keepdim=True) / 21
    assert 0.5 < gain.min() < gain.max() < 1.5 and len(gain.unique()) > 40
    shifts = (rolled[:, :6] / gain).argmin(1)
    wanted = torch.stack([F.pad(sound.roll(shift), (0, 4)) for shift in shifts.tolist()])
    torch.testing.assert_close(rolled / gain, wanted)
    assert len(shifts.unique()) == 6


def test_noise_is_small_and_frames_roll_by_minus_ten_to_nine():
    x = torch.zeros(200, 1, 64, 128)
    x[:, :, 30] = 10
    y = finetune.add_noise_and_roll(x, np.random.default_rng(0))[:, 0]
    moved = y.mean(2).argmax(1) - 30
    assert moved.unique().tolist() == list(range(-10, 10))
    heights = y.sort(1).values[:, :-1].amax((1, 2))  # without the loud frame
    assert 0 <= y.min() and 0.09 < heights.max() < 0.1 and heights.min() < 0.01


def blobs(clips, features, seed=0):
    """Three classes, a clip each in turn, that one feature tells apart."""
    torch.manual_seed(seed)
    x, labels = torch.randn(clips, features), torch.arange(clips) % 3
    x[:, 0] += labels
    return x, F.one_hot(labels).float()


@pytest.mark.parametrize("clips, features, multi_label", [(60, 5, False), (30, 90, False),
                                                          (30, 90, True)])
def test_the_linear_probe_reaches_the_optimum(clips, features, multi_label):
    """There the gradients of loss and penalty cancel, which gives the weights; what is left of the
    scores, the bias, is the same for every clip."""
    x, targets = blobs(clips, features)
    z = ((x - x.mean(0)) / x.std(0)).double()
    scores, l2 = finetune.linear_scores(x, targets, x, 3.0, multi_label)
    missing = targets - (scores.sigmoid() if multi_label else scores.softmax(1))
    weight = z.T @ missing / 3.0
    bias = scores - z @ weight
    assert l2 == 3.0 and bias.std(0).max() < 0.02 and missing.sum(0).abs().max() < 0.02


def test_the_linear_probe_chooses_its_penalty_on_training_clips():
    """From noisy clips it chooses one far above 1, which is better on other clips, too."""
    (x, targets), (others, right) = blobs(120, 200), blobs(600, 200, seed=1)
    accuracy = {}
    for asked in (None, 1.0):
        scores, l2 = finetune.linear_scores(x, targets, others, asked, False)
        accuracy[l2] = (scores.argmax(1) == right.argmax(1)).float().mean().item()
    chosen = max(accuracy)
    assert chosen in (10.0, 100.0, 1000.0) and accuracy[chosen] > accuracy[1.0]
    scores, _ = finetune.linear_scores(x[:1], targets[:1], others, None, False)
    assert scores.isfinite().all()  # one clip has no deviation


@pytest.fixture(scope="module")
def esc(tmp_path_factory):
    return make_esc(tmp_path_factory.mktemp("labelled") / "esc")


def test_mel_statistics_leave_the_padding_out(esc):
    found = data.open_labelled(str(esc), 128)  # 0.7 s in clips of 1.28 s
    kinds, _ = finetune.read_all(found, None, small(frames=128), FineTune(), machine_of())
    x = fbank(found.clips.usable(3)[None])[0, :64]  # 68 frames, which fill 4 time steps of 16
    x = (x + 4.268) / (2 * 4.569)
    want = torch.cat([x.mean(0), x.std(0, unbiased=False)])
    torch.testing.assert_close(kinds["no network"][3], want, atol=1e-4, rtol=1e-4)

# ---- finetune.py: runs ---------------------------------------------------------------------------

FINE = ["--steps=2", "--batch-size=4", "--log-every=1", "--frames=64", *CPU_FLAGS]


def fine(dataset, out, *more):
    return finetune.main([f"--data={dataset}", f"--out={out}", *FINE, *more])


def results(out, part="results"):
    return json.loads((Path(out) / "results.json").read_text())[part]


@pytest.fixture(scope="module")
def start_from(whole_run):
    return f"--checkpoint={whole_run}/last.pt"


@pytest.fixture(scope="module")
def tuned(esc, start_from, tmp_path_factory):
    """A fine-tuned run of two folds."""
    out = tmp_path_factory.mktemp("tuned")
    assert fine(esc, out, start_from, "--steps=12") == 0
    return out


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_fine_tuning_does_what_a_slow_version_does(loss, esc, tmp_path):
    """Five updates, each in two parts. The rate rises in two of them and falls in three."""
    config, dataset = small(depth=3), labelled(esc)
    recipe = FineTune(out=str(tmp_path), steps=5, warmup=0.4, lr=1e-2, min_lr=1e-3, batch_size=4,
                      accumulate=2, drop_path=0.5, loss=loss, label_smoothing=0.1, seed=7)
    torch.manual_seed(0)
    start = Encoder(config).state_dict()
    finetune.fine_tune(dataset, start, config, recipe, machine_of(), None)
    torch.manual_seed(data.seed_of(7))
    encoder = Encoder(config)
    encoder.load_state_dict(start)
    model = Classifier(encoder, 2, drop_path=0.5)
    train = dataset.folds["fold 2"][0]  # the weights of the last fold are kept
    adam, order = SlowAdamW(model), data.shuffled(len(train), data.seed_of(7, 1))
    for update, rate in enumerate((0.005, 0.01, 0.00775, 0.00325, 0.001), 1):
        rng = np.random.default_rng((7, 1, update - 1))
        model.zero_grad()
        for _ in range(2):
            numbers = train[[next(order), next(order)]].tolist()
            batch = dataset.clips[numbers]
            sound = batch.waveforms, batch.lengths, dataset.targets(numbers)
            x, _, targets = finetune.augmented(*sound, config, recipe, rng)
            torch.manual_seed(int(rng.integers(2**62)))
            logits = model(x)
            if loss == "ce":
                value = -(targets * logits.log_softmax(1)).sum(1).mean()
            else:
                yes, no = logits.sigmoid().log(), (-logits).sigmoid().log()
                value = -(targets * yes + (1 - targets) * no).mean()
            (value / 2).backward()

        def rate_of(name):
            block = re.match(r"encoder\.blocks\.(\d)", name)
            return rate * 0.65 ** (3 - int(block[1])) if block else rate

        adam.step(model, update, rate_of)
    assert_near(weights(tmp_path)[1], model.state_dict())


@pytest.mark.parametrize("recipe, manifests", [
    ("as2m", True), ("as20k", True), ("small", True), ("esc50", False), ("spc2", False),
    ("small", False)])
def test_every_recipe_trains_and_tests(recipe, manifests, start_from, esc, tmp_path):
    dataset, out = esc, tmp_path / "out"
    wanted = {**finetune.RECIPES[recipe], "steps": 2, "batch_size": 4, "frames": 64}  # as in FINE
    if manifests:  # several labels a clip
        dataset = make_manifests(tmp_path / "as", weights=recipe == "as2m")
        wanted |= {"loss": "bce", "label_smoothing": 0.0}
    wanted |= {"reading": "patches" if recipe == "small" else "CLS", "seed": 10**18}
    assert fine(dataset, out, start_from, f"--recipe={recipe}", f"--seed={10**18}") == 0
    assert results(out, "recipe") == results(out, "recipe") | wanted
    for result in results(out)["fine-tuned"].values():
        assert result["metric"] == ("mAP" if manifests else "accuracy")
        assert 0 <= result["value"] <= 1 and len(result["per_class"]) == (3 if manifests else 2)
    assert (out / "confusion.png").exists() != manifests
    assert finetune.load_classifier(out / "last.pt").reading == wanted["reading"]
    if recipe == "small":  # an earlier version did not weigh time by loudness, nor say head_reads
        state = torch.load(out / "last.pt")
        state |= {"reading": state.pop("head_reads"), "by_loudness": None}
        torch.save(state, out / "old.pt")
        with pytest.raises(UsageError, match="size mismatch for fc_norm"):
            finetune.load_classifier(out / "old.pt")


def test_fine_tuning_learns_and_the_classifier_predicts(esc, start_from, tmp_path, capsys):
    out, names = tmp_path / "out", tmp_path / "labels.csv"
    more = ["--steps=60", "--lr=3e-3", "--layer-decay=1", "--fold=1"]
    assert fine(esc, out, start_from, *more) == 0
    assert "fold 1: accuracy 100.0%" in capsys.readouterr().out
    clip = str(esc / "audio/1-1000-A-41.wav")

    where = [f"--checkpoint={out}/last.pt", *CPU_FLAGS]

    def predict(path, *more):
        assert finetune.main(["predict", str(path), *where, *more]) == 0
        return capsys.readouterr().out

    said = predict(clip)
    assert said.startswith(clip + "\n") and said.splitlines()[1].endswith("%  chainsaw")
    assert sum(map(float, re.findall(r"([\d.]+)%", said))) == pytest.approx(100, abs=0.11)
    said = predict(esc, "--top=1")
    assert said.count("%  chainsaw") == said.count("%  rooster") == 4
    table = "index,mid,display_name\n1,/m/b,Saw\n0,/m/a,\"Bird, big\"\n"
    commas = "Bird, big, loud\nSaw, small, loud\n"  # is no table
    for content in (table, commas, "\ufeffBird, big\r\nSaw\r\n"):
        names.write_bytes(content.encode())
        said = predict(clip, f"--labels={names}")
        assert said.index("%  Saw") < said.index("%  Bird, big")
        assert said.count(", loud\n") == 2 * (content == commas)
    names.write_text("x" * 200_000)
    refused(finetune.main, ["predict", clip, *where, f"--labels={names}"], "field larger", capsys)

    # A saw, then a bird: what holds in each 0.5 s of them.
    parts = [load_audio(esc / f"audio/1-1000-A-{target}.wav") for target in (41, 7)]
    both = write(tmp_path / "both.wav", torch.cat(parts).numpy())
    lines = predict(both, "--every=0.5", "--top=1").splitlines()
    spans = ("0.00 to 0.50 s", "0.50 to 1.00 s", "1.00 to 1.40 s")
    assert lines[::2] == [f"{both} {span}" for span in spans]
    assert lines[1].endswith("%  chainsaw") and lines[5].endswith("%  rooster")
    state = torch.load(out / "last.pt")  # of 64 frames a ratio of 0.96 leaves a patch, of 32 none
    torch.save({**state, "config": {**state["config"], "mask_ratio": 0.96}}, out / "last.pt")
    assert "0.20 to 0.40 s" in predict(both, "--every=0.2")
    # A path that cannot be read costs the others nothing but the exit status.
    assert finetune.main(["predict", "nowhere.wav", clip, *where]) == 2
    said = capsys.readouterr()
    assert "%  chainsaw" in said.out and said.err.count("nowhere.wav (no such file)") == 1


def test_a_classifier_survives_export_and_its_encoder_can_be_pre_trained_on(tuned, tmp_path):
    model, x = finetune.load_classifier(tuned / "last.pt"), torch.ones(1, 1, 64, 128)
    for target, close in (("hf", {}), ("one.safetensors", dict(atol=0.02, rtol=0.02))):
        assert eat.main(["export", str(tuned / "last.pt"), str(tmp_path / target)]) == 0
        back = finetune.load_classifier(tmp_path / target)
        assert (back.classes, back.multi_label) == (["rooster", "chainsaw"], False)
        assert back.encoder.config.mean == -6.627
        torch.testing.assert_close(back(x), model(x), **close)
    encoder = eat.load_encoder(tuned / "last.pt")
    begun = EAT(encoder.config)  # as with --init
    eat.start_from(begun, tuned / "last.pt")
    for part in (encoder, begun.student, begun.teacher):
        torch.testing.assert_close(part.state_dict(), model.encoder.state_dict())


@linux
def test_fine_tuning_that_is_stopped_resumes_exactly(esc, start_from, tuned, tmp_path):
    """In its second fold, which then starts again; while the first is tested, or when its result
    is told: that fold is kept."""
    cases = [(f"at(finetune, 'augmented', 14, send({number}))", status)
             for number, status in ((15, 143), (2, 130), (9, -9))]
    told = "finetune.print = lambda said, *_, **more: said.startswith('fold 1:') and send(9)()"
    cases += [("at(finetune, 'evaluate', 1, send(15))", 143), (told, -9)]
    outs = [tmp_path / str(k) for k in range(len(cases))]
    run = [f"--data={esc}", *FINE, start_from, "--steps=12"]
    found = driven(tmp_path, *((hook, "finetune", [*run, f"--out={out}", "--workers=2"], status)
                               for (hook, status), out in zip(cases, outs)))
    for (_, status), said, out in zip(cases, found, outs):
        assert (status > 0) == ("--resume" in said)
        assert list(torch.load(out / "last.pt")["done"]) == ["fold 1"]
        assert not (out / "results.json").exists()
        assert finetune.main([*run, f"--out={out}", "--resume"]) == 0
        assert same_runs(out, tuned) and results(out) == results(tuned)
        logs = [[(line["fold"], line["step"], line["loss"]) for line in logged(path)]
                for path in (out, tuned)]
        assert logs[0] == logs[1] and len(logs[0]) == 24


@pytest.mark.parametrize("mode", ["linear", "knn"])
def test_frozen_features_are_probed(mode, esc, start_from, tmp_path, capsys):
    more = [f"--mode={mode}", "--neighbours=1", f"--seed={10**18}"]
    assert fine(esc, tmp_path / "out", start_from, *more) == 0
    found = results(tmp_path / "out")
    assert found.keys() == {"patches", "CLS", "mean of patches", "no network",
                            "random weights, patches"}
    for fold in found["no network"].values():
        assert fold["value"] == 1.0  # two tones far apart
        assert fold["l2"] == (1.0 if mode == "linear" else None)
    assert "over 2 folds" in capsys.readouterr().out
    assert results(tmp_path / "out", "command")[:2] == ["finetune.py", f"--data={esc}"]
    assert results(tmp_path / "out", "machine").startswith("cpu, 1 threads, float32")


def test_many_classes_of_odd_names_are_drawn(start_from, tmp_path):
    folder = make_classes(tmp_path / "sound", **{f"{k} $_$ \udce9": 2 for k in range(101)})
    assert fine(folder, tmp_path / "out", start_from, "--mode=knn", "--frames=32") == 0
    picture = (tmp_path / "out/confusion.png").read_bytes()
    assert int.from_bytes(picture[16:20], "big") <= 3000  # pixels


def test_shots_tell_what_few_labels_give(esc, start_from, tmp_path):
    assert fine(esc, tmp_path, start_from, "--mode=linear", "--shots=1,2") == 0
    found = results(tmp_path)
    assert found.keys() == {"patches", "random weights, patches", "no network"}
    for of_kind in found.values():  # three draws in two folds
        assert {count: len(values) for count, values in of_kind.items()} == {"1": 6, "2": 6}
    assert found["no network"]["2"] == [1.0] * 6
    assert (tmp_path / "shots.png").read_bytes().startswith(b"\x89PNG")


@torch.no_grad()
def test_embed_writes_rows_for_files_and_for_time_steps(start_from, tmp_path):
    torch.manual_seed(0)
    for k, length in enumerate((400, 5359, 5360, 10_240, 10_480, 105_000)):
        write(tmp_path / f"{k}.wav", 0.1 * torch.randn(length).numpy(), kind="FLOAT")
    (tmp_path / "zz.wav").write_text("no sound")
    where, found = [str(tmp_path), start_from, f"--out={tmp_path}/new/x", *CPU_FLAGS], []
    for more in ([], ["--frames"]):
        assert finetune.main(["embed", *where, *more]) == 0
        found.append(dict(np.load(tmp_path / "new/x.npz")))
        assert [Path(path).name for path in found[-1]["paths"]] == [f"{k}.wav" for k in range(6)]
    files, rows = found
    encoder = eat.load_encoder(start_from.removeprefix("--checkpoint="))
    c = encoder.config

    def slow(wave, hop):
        """Of each window its length; its rows in time, 8 patches side by side, averaged over the
        blocks; and its three readings."""
        for start in range(0, len(wave) - 399, hop):
            window = wave[start : start + hop + 240]
            steps = max(1, ((len(window) - 400) // 160 + 1) // 16)
            x = spectrogram(window[None], torch.tensor([len(window)]), steps * 16, c.mean, c.std)
            tokens, outputs = encoder.embed(x), []
            for block in encoder.blocks:
                tokens, _ = block(tokens)
                outputs.append(tokens[0, 1:])
            rows = torch.stack(outputs).mean(0).view(steps, -1)
            log_mel = x[0, 0].double() * 2 * c.std + c.mean
            loud = log_mel.exp().view(steps, -1).sum(1) ** 0.3
            share = (loud / loud.sum()).float()[:, None]
            mean = (share * rows).sum(0)
            deviation = (share * (rows - mean) ** 2).sum(0).sqrt()
            yield len(window), rows, {"patches": torch.cat([mean, deviation]), "CLS": tokens[0, 0],
                                      "mean of patches": tokens[0, 1:].mean(0)}

    for k, count in enumerate((1, 1, 2, 3, 4, 41)):  # of 16 frames; 5,360 samples fill two
        wave = load_audio(tmp_path / f"{k}.wav")
        lengths, _, readings = zip(*slow(wave, 81_920))  # as probing does: 5.12 s
        for name in readings[0]:
            want = np.average([x[name] for x in readings], axis=0, weights=lengths)
            np.testing.assert_allclose(files[name.replace(" ", "_")][k], want, atol=1e-5)
        mine, features, seconds = rows["path_index"] == k, [], []
        for number, (_, window, _) in enumerate(slow(wave, 10_240)):  # as the encoder: 0.64 s
            features.extend(window)
            seconds.extend(0.64 * number + 0.16 * np.arange(len(window)))
        assert mine.sum() == count
        np.testing.assert_allclose(rows["seconds"][mine], seconds, atol=1e-6)
        np.testing.assert_allclose(rows["features"][mine], features, atol=1e-5)

# ---- Pictures ------------------------------------------------------------------------------------


@torch.no_grad()
def test_look_draws_a_clip_and_what_an_encoder_makes_of_it(start_from, tmp_path):
    clip, out = str(tone(tmp_path / "$_$.wav")), tmp_path / "look.png"  # no formula
    for name, *more in ((out,), (f"{tmp_path}/", "--seed=-9"),
                        (tmp_path / "look", start_from, f"--seed={10**20}")):
        assert finetune.main(["look", clip, f"--out={name}", *more]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
        out.unlink()
    # With hertz where they are; bin k is drawn from k to k + 1.
    axes = finetune.draw(Figure(), 111, np.zeros((128, 100)), "", labels=True)
    size = 128, 512, 16_000, 20.0, 0.0, 100.0, -500.0, 1.0
    centres = torchaudio.compliance.kaldi.get_mel_banks(*size)[1].flatten()
    want = np.interp([125, 500, 1000, 2000, 4000], centres, np.arange(128) + 0.5)
    assert axes.get_yticks() == pytest.approx(want, abs=0.05)
    encoder = eat.load_encoder(start_from.removeprefix("--checkpoint="))
    x, attention = torch.randn(1, 1, 64, 128), encoder.blocks[-1].attn
    found = finetune.cls_attention(encoder, x)
    assert found.shape == (32,) and 0 < found.sum() < 1  # the rest is CLS's attention to itself
    # Heads whose keys are all alike attend to all of the 33 tokens alike.
    attention.qkv.weight[32:64], attention.qkv.bias[32:64] = 0, 0
    torch.testing.assert_close(finetune.cls_attention(encoder, x), torch.full((32,), 1 / 33))


def test_plot_draws_the_learning_curves(whole_run, tuned, tmp_path, monkeypatch):
    more = b'{"step": 9, "loss": null}\n{"step": 9, "knn_patches": 0.5}\n{"step"'
    (tmp_path / "log.jsonl").write_bytes((whole_run / "log.jsonl").read_bytes() + more)
    assert eat.main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    assert eat.main(["plot", str(tuned)]) == 0
    loss = [line for line in drawn[0].axes[0].lines if line.get_label().startswith("loss")]
    assert [list(line.get_xdata()) for line in loss] == [list(range(1, 13))] * 2  # of each fold

# ---- Whatever ends a run, it ends; nothing is lost or mixed up in silence ------------------------

@linux
def test_an_error_anywhere_ends_the_process_and_its_workers(sounds, esc, start_from, tmp_path):
    def run(name, *more):
        return flags(sounds, tmp_path / name, "--workers=2", "--stats=audioset", *more)

    sure = ["--device=cpu", "--workers=2"]
    tuned = [f"--data={esc}", start_from, *FINE, *sure]
    cases = [
        ("eat.EAT, 'update_teacher', 3", "eat", run("loop")),
        ("eat, 'spectrogram', 3", "eat", run("spectrogram")),
        ("data.SoundFiles, 'read', 32", "eat", run("worker")),  # after 26 for the advice
        ("eat, 'nearest_neighbours', 3", "eat", run("probe", f"--probe={esc}", "--probe-every=2")),
        ("finetune, 'augmented', 2", "finetune", [*tuned, f"--out={tmp_path}/fit"]),
        ("eat, 'spectrogram', 1", "finetune", [*tuned, f"--out={tmp_path}/test"]),
        ("eat, 'spectrogram', 1", "finetune",
         ["embed", str(esc), start_from, f"--out={tmp_path}/x.npz", *sure]),
        ("data, 'load_audio', 3", "data", ["pack", str(sounds), f"{tmp_path}/packed", sure[1]]),
    ]
    said = driven(tmp_path, *((f"at({hook}, lambda: 1 / 0)", *more, 1) for hook, *more in cases))
    assert all("ZeroDivisionError: " in text for text in said)


def test_an_error_s_traceback_keeps_no_worker(sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(EAT, "update_teacher", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        eat.main(flags(sounds, tmp_path, "--workers=2"))
    assert error.tb and not multiprocessing.active_children()


@linux
def test_what_goes_wrong_during_a_run_is_one_line(sounds, esc, whole_run, tmp_path):
    shutil.copytree(sounds, tmp_path / "sound")
    shutil.copytree(esc, tmp_path / "probe")
    outs = tmp_path / "out"

    def run(name, *more, data=sounds):
        return flags(data, outs / name, "--workers=2", "--stats=audioset", *more)

    def third(act):
        return f"at(eat.EAT, 'update_teacher', 3, lambda: {act})"

    def moved(name):
        return third(f"os.rename('{tmp_path}/{name}', '{tmp_path}/{name} is gone')")

    deleted = third(f"shutil.rmtree('{outs}/deleted', ignore_errors=True)")
    a_file = third(f"(shutil.rmtree('{outs}/file'), open('{outs}/file', 'w').close())")
    silent = write(tmp_path / "silent.wav", np.zeros(20_000))
    endless = run("unmounted", "--steps=100000", data=tmp_path / "sound")
    packed = ["pack", str(sounds), f"{tmp_path}/packed", "--workers=2"]
    cases = [
        ("", "eat", run("collapse", "--collapse-std=5"), 1, "stopped at step 1: collapsed"),
        (deleted, "eat", flags(sounds, outs / "deleted", "--workers=2"), 0, "the encoder is in"),
        (a_file, "eat", run("file"), 1, "continue with --resume"),
        (moved("sound"), "eat", endless, 2, "no clip is left to use"),
        ("", "eat", run("silent", data=silent), 2, "no clip is left to use"),
        (moved("probe"), "eat", run("probed", f"--probe={tmp_path}/probe"), 2,
         "no clip can be read"),
        ("at(data.SoundFiles, 'read', 35, send(9))", "eat", run("killed"), 1, "Run it again"),
        ("at(data, 'load_audio', 3, send(9))", "data", packed, 1, "Run it again"),
    ]
    found = driven(tmp_path, *(case[:4] for case in cases))
    for (*_, words), said in zip(cases, found):
        assert sum(words in line for line in said.splitlines()) == 1, said
    assert "eat.py: could not save to" in found[2]
    assert weights(outs / "unmounted")[0] == logged(outs / "unmounted")[-1]["step"] >= 3
    assert weights(outs / "probed")[0] == 8  # nothing computed is lost
    assert not (outs / "silent/last.pt").exists()  # nothing was computed
    assert same_runs(outs / "deleted", whole_run)


@linux
def test_a_signal_at_any_moment_saves_and_a_run_resumes_exactly(sounds, whole_run, tmp_path):
    """A lost terminal, and one under nohup; Ctrl-C; told to stop, and killed, amid the writing of
    the second checkpoint; killed between its two renames. SIGTERM to a worker does nothing, nor
    does that to all processes. And the log ends as after a power failure."""
    lost = "at(eat.EAT, 'update_teacher', 3, send(signal.SIGHUP))"
    to_workers = "[os.kill(worker.pid, 15) for worker in multiprocessing.active_children()]"
    cases = [  # each with its exit status and the step that is saved
        (f"at(eat.EAT, 'update_teacher', 3, lambda: {to_workers})", 0, 8),
        (lost, 129, 3), ("signal.signal(signal.SIGHUP, signal.SIG_IGN); " + lost, 0, 8),
        (lost.replace("SIGHUP", "SIGINT"), 130, 3),
        ("os.setsid(); at(eat.EAT, 'update_teacher', 3, lambda: os.killpg(0, 15))", 143, 3),
        ("at(os, 'fsync', 2, send(signal.SIGTERM))", 143, 7),
        ("at(os, 'fsync', 2, send(9))", -9, 3), ("at(os, 'replace', 3, send(9))", -9, None)]
    outs = [tmp_path / str(k) for k in range(len(cases))]
    more = ["--workers=1", "--save-every=3"]
    found = driven(tmp_path, *((hook, "eat", flags(sounds, out, *more), status)
                               for (hook, status, _), out in zip(cases, outs)))
    for (_, status, step), said, out in zip(cases, found, outs):
        assert (status > 0) == ("--resume" in said)
        assert (out / "last.pt.part").exists() == (status == -9)
        assert weights(out)[0] == step if step else not (out / "last.pt").exists()
        with open(out / "log.jsonl", "ab") as file:
            file.write(b'\0\0\0\n{"\xff": 1}\n{"step" 2}\n[2]\n{"step": 1, "lo')
        assert (out / "lock").exists()  # that of a killed process is no obstacle
        assert eat.main(flags(sounds, out, "--resume")) == 0 and same_runs(out, whole_run)
        assert [line["step"] for line in logged(out)] == list(range(1, 9))


@linux
def test_a_stopped_run_does_not_probe_first(sounds, esc, tmp_path):
    out = tmp_path / "out"
    run = flags(sounds, out, f"--probe={esc}", "--probe-every=3")
    driven(tmp_path, ("at(eat.EAT, 'update_teacher', 3, send(15))", "eat", run, 143))
    assert [line["step"] for line in logged(out) if "knn_cls" in line] == [0]
    assert eat.main([*run, "--resume"]) == 0  # makes it up
    assert [line["step"] for line in logged(out) if "knn_cls" in line] == [0, 3, 6, 8]


@linux
def test_a_run_goes_on_without_its_output(sounds, whole_run, tmp_path):
    """Its reader goes; the disk is full; it has no standard error; a notebook's; it has neither."""
    outs = [tmp_path / str(k) for k in range(4)]
    neither = start("-c", f"{sys.executable} eat.py $0 $@ >&- 2>&-", *flags(sounds, outs[3]),
                    program="bash")
    gone = "read, write = os.pipe(); os.dup2(write, 1); os.close(read); os.close(write)"
    full = "[os.dup2(os.open('/dev/full', os.O_WRONLY), number) for number in (1, 2)]"
    mute = "sys.stderr = sys.__stderr__ = None; os.close(2)"
    notebook = "sys.stdout = io.StringIO(); sys.exit(data.run('a notebook', list))"
    runs = [(hook, "eat", flags(sounds, out), 0) for hook, out in zip((gone, full, mute), outs)]
    said = driven(tmp_path, *runs, (notebook, "data", [], 0))
    assert "rror" not in "".join(said) + end_of(neither, 0)
    assert all(same_runs(out, whole_run) for out in outs)


@linux
def test_only_one_process_writes_into_a_folder(several, sounds, whole_run, tmp_path):
    out, packed = tmp_path / "out", tmp_path / "packed"
    pack(several, tmp_path / "alone")
    found = driven(
        tmp_path,
        ["at(eat.EAT, 'update_teacher', 3, rival)", "eat", flags(sounds, out), 0],
        ["at(data, 'load_audio', 3, rival)", "data",
         ["pack", str(several), str(packed), "--workers=0"], 0],
    )
    for said, folder in zip(found, (out, packed)):
        refusal = [line for line in said.splitlines() if "is writing into it" in line]
        assert "the rival: 2" in said, said
        assert len(refusal) == 1 and f"{folder}: another process" in refusal[0]
    assert same_runs(out, whole_run)
    for name in ("samples", "pack.json"):
        assert (packed / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_all_folds_start_from_one_checkpoint(esc, whole_run, tuned, tmp_path, monkeypatch):
    """It is replaced between the folds."""
    used, evaluate = tmp_path / "used.pt", finetune.evaluate
    shutil.copy(whole_run / "last.pt", used)
    model = {f"student.{name}": x for name, x in Encoder(small()).state_dict().items()}

    def replaced(*arguments):
        torch.save({"config": vars(small()), "model": model}, used)
        return evaluate(*arguments)

    monkeypatch.setattr(finetune, "evaluate", replaced)
    run = [f"--checkpoint={used}", "--steps=12"]
    assert fine(esc, tmp_path, *run) == 0
    assert same_runs(tmp_path, tuned) and results(tmp_path) == results(tuned)
    used.unlink()  # a run that goes on has it
    assert fine(esc, tmp_path, *run, "--resume") == 0 and results(tmp_path) == results(tuned)


@pytest.mark.parametrize("mode", ["finetune", "linear", "knn", "linear --shots=1", "probe"])
def test_nothing_to_test_on_is_one_line(mode, sounds, start_from, tmp_path, capsys):
    dataset, out = make_esc(tmp_path / "esc"), tmp_path / "out"
    for path in (dataset / "audio").glob("1-*"):
        path.write_text("no sound")
    if mode == "probe":  # of pre-training
        status = eat.main(flags(sounds, out, f"--probe={dataset}"))
    else:
        status = fine(dataset, out, start_from, "--fold=1", *f"--mode={mode}".split())
    said = capsys.readouterr()
    line = said.err.strip().splitlines()[-1]
    assert status == 2 and ".py: " in line and "1-1000-A-41.wav" in line
    assert "nan" not in said.out.lower()
    assert not (out / "results.json").exists() and not (out / "log.jsonl").exists()


def test_a_batch_of_broken_clips_alone_is_passed_over(start_from, tmp_path, capsys):
    folder = make_esc(tmp_path / "esc")
    broken = folder / "audio/2-1000-A-41.wav"
    broken.write_text("no sound")
    assert fine(folder, tmp_path / "out", start_from, "--batch-size=1", "--steps=9") == 0
    assert capsys.readouterr().err.count("skipped 1 so far") == 1  # in two folds
    assert weights(tmp_path / "out")[0] == 9
    assert list(results(tmp_path / "out", "skipped")) == [str(broken)]


@linux
def test_predict_prints_any_name_on_any_terminal(esc, tuned, tmp_path):
    name = os.fsdecode(bytes(tmp_path / "caf") + b"\xe9 \xc3\xa9.wav")
    shutil.copy(esc / "audio/1-1000-A-41.wav", name)
    strict = "[s.reconfigure(encoding='ascii', errors='strict') for s in (sys.stdout, sys.stderr)]"
    where = [f"--checkpoint={tuned}/last.pt", "--device=cpu"]
    said, _ = driven(tmp_path, *((strict, "finetune", ["predict", path, *where], status)
                                 for path, status in ((name, 0), (name + "\udcff", 2))))
    assert "caf\\udce9 \\xe9.wav" in said and "rooster" in said, said


@linux
def test_open_files_do_not_grow_with_the_clips():
    """A tensor that came from a worker holds a file open for as long as it lives."""
    machine, count = eat.Machine(device="cpu", workers=1), []
    eat.features(None, small(), open_clips("demo", 64), range(384), machine, lambda _, x, steps: (
        count.append(len(os.listdir("/proc/self/fd"))) or {"loudness": x.mean((1, 2, 3))[:, None]}))
    assert len(count) == 12 and count[-1] - count[3] < 4, count


def test_a_run_goes_on_with_other_files_and_says_so(sounds, whole_run, tmp_path, capsys):
    for change, clips in (("added", 30), ("removed", 24)):
        folder, out = (shutil.copytree(path, tmp_path / change / path.name)
                       for path in (sounds, whole_run))
        os.replace(out / "previous.pt", out / "last.pt")
        if change == "added":
            tone(folder / "more.wav")
        else:
            (folder / "03.wav").unlink()
        assert eat.main(flags(folder, out, "--resume")) == 0
        said = capsys.readouterr().err
        assert said.count("warning") == 1
        assert f"the run began with 26 clips, and now has {clips}:" in said
        assert [line["step"] for line in logged(out)] == list(range(1, 9))
        assert weights(out)[0] == 8

# ---- CUDA, as far as it goes without a card ------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_on_a_card_have_the_right_devices_and_precisions(dtype):
    """Without a card, as torch follows them without computing: products and convolutions are in 16
    bits, what the blocks pass on (see Block.forward), targets and losses in 32."""
    model, seen = EAT(small()), {}
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(
                lambda _, inputs, output, name=name: seen.update({name: (*inputs, output)}))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            x = torch.empty(2, 1, 64, 128, device="cuda")
            results = [*model(x).values(), model.targets(x)]
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    for name, tensors in seen.items():
        tensors = [x for x in torch.utils._pytree.tree_leaves(tensors) if x.is_floating_point()]
        assert all(x.device.type == "cuda" for x in tensors), name
        if name.endswith((".qkv", ".fc1", ".fc2", ".proj")) or ".convs." in name:
            assert tensors[-1].dtype == dtype, name
        if "norm" in name or name == "student":
            assert tensors[-1].dtype == torch.float32, name
    assert len([name for name in seen if "norm" in name]) == 11
    assert all(x.dtype == torch.float32 and x.device.type == "cuda" for x in results)


def counted(model):
    """Compiled without code being made, and a counter of the graphs that would be."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    return torch.compile(model, backend=counter, fullgraph=True, dynamic=False), counter


@pytest.mark.parametrize("drawn", [False, True], ids=["mask given", "mask drawn inside"])
def test_pre_training_is_one_graph_that_is_compiled_once(drawn):
    model = EAT(small())
    net, counter = counted(model)
    for _ in range(5):
        mask = None if drawn else model.draw_mask(torch.empty(2, 1, 64, 128))
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(torch.randn(2, 1, 64, 128), mask)["loss"]
        loss.backward()
        model.update_teacher(0.9)
    assert counter.frame_count == 1


@pytest.mark.skipif(sys.version_info[:3] == (3, 13, 0), reason="its dicts hide eval() from torch")
@pytest.mark.parametrize("reading", ["CLS", "patches"])
def test_a_classifier_is_two_graphs_and_its_scores_are_not_rounded_to_16_bits(reading):
    model = Classifier(Encoder(small()), 3, 0.1, reading)
    net, counter = counted(model)
    for training in (True, True, False, True, False, True):
        model.train(training)
        net(torch.randn(2, 1, 64, 128), torch.tensor([2, 4])).sum().backward()
    assert counter.frame_count == 2  # for training, and for testing
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = model.eval()(torch.randn(8, 1, 64, 128))
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())


def test_a_card_that_torch_does_not_know_is_one_line(sounds, tmp_path, monkeypatch, capsys):
    def launch(*_):
        raise RuntimeError("CUDA error: no kernel image is available for execution\nmore words")

    monkeypatch.setattr(EAT, "targets", launch)
    assert eat.main(flags(sounds, tmp_path)) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("too old: --device cpu")


def test_a_compiler_that_fails_is_one_line(sounds, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere/g++"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    small = ["--depth=1", "--decoder-layers=1", "--compile"]
    assert eat.main(flags(sounds, tmp_path / "out", *small)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "torch.compile failed" in said and "/nowhere/g++" in said and "--no-compile" in said

# ---- CUDA, with a card ---------------------------------------------------------------------------


BASE = EATConfig(dim=768, heads=12, depth=2, frames=256, clones=2, decoder_layers=2,
                 mask_noise_std=0.0)


def test_a_batch_in_parts_is_one_line_of_means_and_has_no_cuda_graphs(tmp_path, monkeypatch):
    """A gradient that is kept over calls would be overwritten by the next one's graph."""
    asked, found, modes, prepare = [], [], [], eat.Machine.prepare

    def noted(self, model, graphs=False):
        def net(x, mask):
            found.append(model(x, mask))
            return found[-1]

        asked.append(graphs)
        return net

    monkeypatch.setattr(eat.Machine, "prepare", noted)
    for parts in (1, 2):
        train(tmp_path / str(parts), machine_of(), waves(), steps=2, accumulate=parts)
    assert asked == [True, False]
    for line, parts in zip(logged(tmp_path / "2"), (found[2:4], found[4:]), strict=True):
        for name, first in parts[0].items():
            mean = (first.item() + parts[1][name].item()) / 2
            assert line[name] == pytest.approx(mean, rel=1e-6) and first != parts[1][name]
    monkeypatch.setattr(torch, "compile", lambda model, mode, **_: modes.append(mode))
    machine = machine_of(compile=True)
    for device, graphs in (("cpu", True), ("cuda", False), ("cuda", True)):
        machine.device = torch.device(device)
        prepare(machine, None, graphs)
    assert modes == [None, None, "reduce-overhead"]


@cuda
@pytest.mark.parametrize("masking", ["inverse_block", "block", "random"])
def test_masks_and_noise_of_a_card_come_from_the_seed(masking):
    model = EAT(small(masking=masking)).cuda()
    x, found = torch.ones(64, 1, 64, 128, device="cuda"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        mask = model.draw_mask(x)
        assert mask.is_cuda and ((~mask).sum(2) == 6).all()
        found.append((mask, model(x, mask)["frame_loss"].item()))
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], found[2][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6) and found[0][1] != found[2][1]


@cuda
def test_compiled_steps_of_full_width_are_the_eager_ones_and_the_cpu_s(tmp_path, monkeypatch):
    mask, found = EAT(BASE).draw_mask(torch.empty(2, 1, 256, 128)), []
    monkeypatch.setattr(EAT, "draw_mask", lambda self, x: mask.to(x.device))
    torch.manual_seed(data.seed_of(0))
    begun = joined(EAT(BASE).student.parameters())
    for k, how in enumerate((("cpu",), ("cuda",), ("cuda", "float32", True))):
        out = tmp_path / str(k)  # compiled, the first two steps prepare a CUDA graph
        last, _ = train(out, machine_of(*how), waves(frames=256), config=BASE, steps=6,
                        adam_eps=1e-3)  # tames gradients that are noise
        moved = joined(eat.encoder_of(last["model"]).values()) - begun
        found.append((logged(out)[-1]["loss"], logged(out)[-1]["grad_norm"], moved))
    for loss, norm, moved in found[1:]:
        assert (loss, norm) == pytest.approx(found[0][:2], rel=1e-3)
        assert relative_error(moved, found[0][2]) < 0.02


@cuda
def test_nccl_with_one_process_changes_no_gradient(tmp_path):
    x, model, machine = torch.randn(2, 1, 256, 128), EAT(BASE), machine_of("cuda", compile=True)
    mask = model.draw_mask(x)
    _, alone = losses_and_gradients(model, x, mask, machine)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1,
                                         init_method=f"file://{tmp_path}/store")
    try:
        machine.world = 2  # so that it prepares the model for several
        _, found = losses_and_gradients(model, x, mask, machine)
        assert machine.reduce(3).item() == machine.reduce(torch.tensor(3).cuda()).item() == 3
    finally:
        torch.distributed.destroy_process_group()
    assert relative_error(joined(found.values()), joined(alone.values())) < 1e-3


@cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_never_waits_for_the_card_nor_grows(precision, monkeypatch):
    """Between two lines of the log."""
    taken, update = [], EAT.update_teacher

    def noted(*how):
        update(*how)
        taken.append(torch.cuda.memory_allocated())
        torch.cuda.set_sync_debug_mode("error" if 3 < len(taken) < 24 else "default")

    monkeypatch.setattr(EAT, "update_teacher", noted)
    recipe = Recipe(steps=25, batch_size=2, log_every=25)
    try:
        line = eat.train(BASE, recipe, waves(frames=256), machine_of("cuda", precision),
                         saving=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(line["loss"])
    assert taken[23] - taken[4] < 20 * 1024  # a row of 512 bytes a step, for the log


@cuda
@pytest.mark.parametrize("more", ["--device=cuda", "--device=cpu", "--device=cuda --compile"])
def test_a_run_on_a_card_with_workers_resumes_there_and_on_the_cpu(more, sounds, tmp_path):
    torch.zeros(1, device="cuda")  # workers are forked after CUDA began
    whole, half = tmp_path / "whole", tmp_path / "half"
    card = ["--device=cuda", "--workers=2", "--save-every=4", "--no-compile"]
    assert eat.main(flags(sounds, whole, *card)) == 0
    half.mkdir()
    shutil.copy(whole / "previous.pt", half / "last.pt")
    assert eat.main(flags(sounds, half, "--resume", *more.split())) == 0
    (step, a), (other, b) = weights(whole), weights(half)
    assert step == other == 8 and all(x.isfinite().all() for x in b.values())
    if more == "--device=cuda":  # the others draw other noise
        assert relative_error(joined(b.values()), joined(a.values())) < 1e-3


@cuda
@pytest.mark.parametrize("reading", ["CLS", "patches"])
def test_two_folds_are_fine_tuned_compiled(reading, esc, start_from, tmp_path):
    assert fine(esc, tmp_path, start_from, "--device=cuda", "--compile", "--precision=bfloat16",
                "--steps=20", f"--reading={reading}") == 0
    assert list(results(tmp_path)["fine-tuned"]) == ["fold 1", "fold 2"]
    assert logged(tmp_path)[-1]["not_finite"] == 0


@cuda
def test_attention_on_a_card_is_a_flash_kernel():
    """For the student's 103 tokens and the teacher's 513, forward and backward."""
    block, machine = eat.Block(EATConfig()).cuda(), machine_of("cuda", "bfloat16")
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    for length in (103, 513):
        x = torch.randn(8, length, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with torch.profiler.profile(activities=kinds) as profile, machine.autocast():
            block(x)[0].sum().backward()
            torch.cuda.synchronize()
        names = {event.key for event in profile.key_averages()}
        attention = {name for name in names if "flash" in name.lower() or "sdpa" in name.lower()}
        assert len(attention) >= 2, names


@pytest.mark.parametrize("device, size, kernel, dtype, near", [
    ("cpu", (2, 4, 8, 64), 3, torch.float64, 1e-12),
    ("cpu", (2, 4, 8, 64), 5, torch.float64, 1e-12),
    ("cpu", (2, 4, 8, 64), 3, torch.bfloat16, 0.01),
    pytest.param("cuda", (192, 64, 8, 768), 3, torch.bfloat16, 0.02, marks=cuda)])
def test_the_dense_convolution_equals_the_grouped_one(device, size, kernel, dtype, near):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(size[3], size[3], kernel, padding=kernel // 2, groups=16)
    conv.to(device, dtype)
    x = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
    wanted, up, found = (x, *conv.parameters()), torch.randn_like(x), []
    for y in (eat.dense_convolution(x, conv), conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)):
        found.append(joined([y, *torch.autograd.grad(y, wanted, up)]).double())
    assert relative_error(*found) < near
