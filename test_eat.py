"""Every test, grouped by the file it tests:  pytest test_eat.py

Those that need the released code's fixtures or real sound look for them in ../shared and skip
without it. Those that take minutes (kills at random moments, a run of 2,000 steps) are run by
pytest -m slow test_eat.py  alone.
"""

import contextlib
import copy
import io
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
fixtures = pytest.mark.skipif(not (SHARED / "fixtures").exists(), reason="needs ../shared/fixtures")
real_sound = pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs ../shared/data")
linux = pytest.mark.skipif(not os.path.exists("/proc/self/cmdline"), reason="looks into /proc")
full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ here")
with warnings.catch_warnings():  # there is no file to register it in
    warnings.simplefilter("ignore")
    slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def slow_only_when_asked(request):
    if request.node.get_closest_marker("slow") and "slow" not in request.config.getoption("-m"):
        pytest.skip("takes minutes: pytest -m slow test_eat.py")


# The model of the fixtures, and one small enough to train in a test.
FIXTURE = dict(dim=64, depth=3, heads=4, frames=256, clones=4, mask_noise_std=0.0,
               utterance_weight=1.0)
SMALL = dict(dim=32, depth=2, heads=2, frames=64, clones=2, decoder_layers=2)
SMALL_FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
CPU_FLAGS = ["--device=cpu", "--precision=float32", "--workers=0"]


def small(**changes):
    return EATConfig(**{**SMALL, **changes})


def cpu(precision="float32", compile=False):
    return eat.Machine(device="cpu", precision=precision, compile=compile, workers=0)


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


def visible(mask):
    """The numbers of the visible patches of each mask, as EAT.forward finds them."""
    return (~mask).nonzero()[:, 2].view(*mask.shape[:2], -1)


# ---- eat.py: parity with the release -------------------------------------------------------------


def release_name(name):
    """A parameter of EAT -> what the release calls it; the teacher's as the student's."""
    place = "modality_encoders.IMAGE."
    name = name.removeprefix("student.").removeprefix("teacher.")
    if name.startswith("decoder.convs."):
        _, _, layer, kind = name.split(".")
        return f"{place}decoder.blocks.{layer}.0.{kind}"
    for ours, theirs in {"cls": "extra_tokens", "patches.proj": "local_encoder.proj",
                         "pre_norm": "context_encoder.norm", "decoder": "decoder"}.items():
        if name == ours or name.startswith(ours + "."):
            return place + theirs + name.removeprefix(ours)
    return name


@pytest.fixture(scope="module")
def formula():
    """Model, spectrogram and mask that formulas give, on which the released code printed the
    figures below."""
    model = EAT(EATConfig(**FIXTURE))
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


# How far each way of computing may be from the release: losses; norms of gradients, relative and
# absolute.
@pytest.mark.parametrize("precision, compile, near_loss, near_norm, nearly_no_norm", [
    ("float32", False, 1e-6, 1e-5, 0), ("bfloat16", False, 1e-2, 2e-2, 0.05),
    pytest.param("float32", True, 1e-6, 1e-5, 0, marks=needs_compiler)])
def test_losses_and_gradients_equal_the_release(precision, compile, near_loss, near_norm,
                                                nearly_no_norm, formula):
    model, x, mask = formula
    machine = cpu(precision, compile)
    model.zero_grad()
    with machine.autocast():
        losses = machine.prepare(model)(x, mask)
    losses["loss"].backward()
    assert losses["frame_loss"].item() == pytest.approx(22.156864, rel=near_loss)
    assert losses["utterance_loss"].item() == pytest.approx(7.8057818, rel=near_loss)
    norms = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            group = next(group for group in GRADIENT_NORMS if name.startswith(group))
            norms[group] = math.hypot(norms.get(group, 0), p.grad.norm().item())
    assert norms == pytest.approx(GRADIENT_NORMS, rel=near_norm, abs=nearly_no_norm)
    assert all(p.grad is None for p in model.teacher.parameters())


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
    """All blocks' targets are, up to the last norm, the mean of what each contributes alone."""

    def normalised(x, axis):
        spread = (x.var(axis, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return (x - x.mean(axis, keepdim=True)) / spread

    torch.manual_seed(0)
    model, x = EAT(small(depth=3)), torch.randn(2, 1, 64, 128)
    tokens, outputs = model.teacher.embed(x), []
    for block in model.teacher.blocks:
        tokens, f = block(tokens)
        outputs.append(normalised(f[:, 1:], 1))  # each channel, over the patches of its clip
    for count in (1, 2, 3):
        model.config.target_blocks = count
        wanted = normalised(torch.stack(outputs[3 - count :]).mean(0), 2)
        torch.testing.assert_close(model.targets(x), wanted, atol=1e-5, rtol=1e-5)
    every = model.targets(x)
    model.config.target_blocks = None
    assert torch.equal(model.targets(x), every)
    assert not model.train().teacher.training  # whatever the student does


def test_each_loss_can_be_had_alone():
    x = torch.randn(2, 1, 64, 128)
    for off, alone, factor in (("frame_weight", "utterance_loss", 3),
                               ("utterance_weight", "frame_loss", 1)):
        model = EAT(small(**{"utterance_weight": 3.0, off: 0.0}))
        losses = model(x)
        assert losses["loss"].item() == pytest.approx(factor * losses[alone].item())
        losses["loss"].backward()
        assert model.decoder.proj.weight.grad.any() == (alone == "frame_loss")


@fixtures
def test_a_whole_step_equals_the_release():
    fixture = torch.load(TINY / "pretrain.pt", weights_only=True)
    x, mask = fixture["spectrogram"], fixture["mask"]
    views = mask.shape[0] * mask.shape[1]  # the release sums the utterance loss over views
    model = EAT(EATConfig(**{**FIXTURE, "utterance_weight": float(views)}))

    def load(**states):
        for part, state in states.items():
            for name, p in getattr(model, part).named_parameters(part):
                p.data.copy_(state[release_name(name)])

    load(student=fixture["student"], decoder=fixture["student"], teacher=fixture["teacher"])
    keep = visible(mask)
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

    losses = model(x, mask)
    summed = losses["utterance_loss"].item() * views
    assert losses["frame_loss"].item() == pytest.approx(fixture["frame_loss"], rel=1e-6)
    assert summed == pytest.approx(fixture["utterance_loss_summed_over_views"], rel=1e-6)
    assert losses["loss"].item() == pytest.approx(fixture["total_loss"], rel=1e-6)
    losses["loss"].backward()
    grads = {release_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == fixture["grads"].keys()
    for name, grad in grads.items():
        assert relative_error(grad, fixture["grads"][name]) < 1e-4, name

    load(student=fixture["student_after_step"])
    model.update_teacher(fixture["ema_decay_of_that_step"])
    for name, p in model.teacher.named_parameters():
        want = fixture["teacher_after_ema"][release_name(name)]
        torch.testing.assert_close(p, want, atol=1e-7, rtol=1e-6)


# ---- eat.py: the parts ---------------------------------------------------------------------------


def test_positions_tell_the_column_first_and_the_row_second():
    D, (H, W) = 16, (5, 8)
    table = eat.sincos_positions(H, W, D)
    for row, column in ((0, 0), (1, 0), (0, 1), (4, 7)):
        want = []
        for p in (column, row):
            omegas = [10000 ** (-i / (D // 4)) for i in range(D // 4)]
            want += [math.sin(p * w) for w in omegas] + [math.cos(p * w) for w in omegas]
        torch.testing.assert_close(table[row * W + column], torch.tensor(want))


def test_a_clip_longer_or_shorter_than_the_table_gets_the_same_positions():
    short, long = Encoder(small(frames=32)), Encoder(small(frames=128))
    long.load_state_dict(short.state_dict())
    x = torch.randn(2, 1, 96, 128)
    torch.testing.assert_close(short(x), long(x))


def test_masked_patches_never_reach_the_student():
    model, x = EAT(small()), torch.randn(3, 1, 64, 128)
    mask = model.draw_mask(3, (4, 8))
    tokens = model.student(x, visible(mask)).view(3, 2, -1, 32)
    assert tokens.shape[2] == 1 + model.config.visible
    hidden = mask[:, 1].view(3, 1, 4, 8).repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = torch.where(hidden, torch.randn_like(x), x)
    other = model.student(changed, visible(mask)).view(3, 2, -1, 32)
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
    # The release counts 0 blocks of 5 x 5 in 1 s of sound, which would leave the masks random. One
    # of 3 x 3 is whole unless its centre lies at the edge (28 of 64).
    squares = F.avg_pool2d(masks(500, (8, 8))[:, None].float(), 3, stride=1) == 1
    assert squares.flatten(1).any(1).float().mean() > 0.5


def test_silence_is_finite_collapse_shows_and_a_mask_of_another_size_is_refused():
    model, x = EAT(small()), torch.randn(4, 1, 64, 128)
    assert model(torch.zeros(2, 1, 64, 128))["loss"].isfinite()
    assert min(model(x)[name] for name in ("target_std", "prediction_std")) > 0.05
    torch.nn.init.zeros_(model.decoder.proj.weight)
    assert model(x)["prediction_std"] < 1e-6
    mask = torch.arange(32).expand(4, 2, -1) >= 7
    with pytest.raises(ValueError, match="exactly 6 of 32"):
        model(x, mask)


@pytest.mark.parametrize("wrong, says", [
    (dict(heads=5), "heads"), (dict(frames=100), "frames"), (dict(mask_ratio=1.0), "mask_ratio"),
    (dict(mask_ratio=0.0), "mask_ratio"), (dict(std=0.0), "std"), (dict(mask_block=4), "odd"),
    (dict(dim=36, heads=2), "decoder_groups"), (dict(norm_eps=math.nan), "norm_eps")])
def test_impossible_sizes_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        EATConfig(**wrong)


def test_base_is_the_size_the_paper_says():
    with torch.device("meta"):
        model = EAT(EATConfig())
    count = sum(p.numel() for part in (model.student, model.decoder) for p in part.parameters())
    assert round(count / 1e6) == 88


# ---- eat.py: the recipe --------------------------------------------------------------------------


def test_learning_rate_and_teacher_decay_of_the_release():
    recipe = Recipe()
    for update, lr in ((1, 5e-4 / 53_333), (53_333, 5e-4), (400_000, 0)):
        assert recipe.learning_rate(update) == pytest.approx(lr, abs=1e-12)
    assert recipe.learning_rate((400_000 + 53_333) // 2) == pytest.approx(2.5e-4, rel=1e-4)
    assert recipe.teacher_decay(50_000) == pytest.approx((0.9998 + 0.99999) / 2)
    assert recipe.teacher_decay(300_000) == 0.99999
    short = recipe.of_length(4000)  # in the same proportions
    assert (short.warmup_steps, short.ema_anneal_steps, short.lr) == (533, 1000, 5e-4)


class Waves(data.Clips):
    """As many clips as asked for, of noise. The batches of two whose numbers are `loud` (in the
    order of reading, from 0) are loud beyond all measure."""

    def __init__(self, loud=(), size=8):
        super().__init__(64)
        self.loud, self.size, self.read_so_far = loud, size, 0

    def __len__(self):
        return self.size

    def name(self, number):
        return f"wave {number}"

    def read(self, number):
        loud = self.read_so_far // 2 in self.loud
        self.read_so_far += 1
        return torch.rand(self.samples) * (1e30 if loud else 1.0)


@pytest.mark.parametrize("clips, given, steps", [
    (5847, {}, 14_617), (2000, {}, 5000), (1_912_134, {"preset": "base"}, 400_000),
    (5847, {"epochs": 2.0}, 1462), (5847, {"epochs": 2.0, "steps": 7}, 7),
    (5847, {"hours": 1.0}, 7200), (4000, {"data": "demo"}, 600)])
def test_a_run_gets_a_fitting_number_of_steps(clips, given, steps, monkeypatch):
    def trial(config, recipe, clips, machine):
        assert recipe.steps == 30
        (Path(recipe.out) / "log.jsonl").write_text('{"step": 30, "steps_per_second": 2.0}\n')

    monkeypatch.setattr(eat, "open_clips", lambda path, frames, seed: Waves(size=clips))
    monkeypatch.setattr(eat, "train", trial)
    given = {"data": "somewhere", "out": "nowhere", "stats": "audioset", "warmup_steps": 3, **given}
    recipe = eat.settle(given, cpu())[1]
    assert (recipe.steps, recipe.warmup_steps) == (steps, 3)
    assert recipe.ema_anneal_steps == round(steps / 4)


def test_weight_decay_spares_biases_and_norms():
    model = EAT(small())
    decayed, spared = eat.make_optimizer(model, Recipe()).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = {names[id(p)].rsplit(".", 1)[-1] for p in decayed["params"]}
    assert kinds == {"weight", "cls"}
    assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in spared["params"])
    trained = sum(p.requires_grad for p in model.parameters())
    assert len(decayed["params"]) + len(spared["params"]) == trained


def test_an_epoch_is_every_clip_once_and_processes_share_it():
    def batches(count, position=0, accumulate=2, rank=0, world=1):
        parts = data.shares(data.shuffled(20, 3, position), 8, accumulate, rank, world)
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


def gradients(machine, accumulate=1):
    """Of this process's share of a batch of 4 on given masks, as the training loop adds them up."""
    torch.manual_seed(0)
    model = EAT(small(mask_noise_std=0.0))
    mine = slice(machine.rank, None, machine.world)
    x, mask = torch.randn(4, 1, 64, 128)[mine], model.draw_mask(4, (4, 8))[mine]
    net = machine.prepare(model)
    for part in zip(x.chunk(accumulate), mask.chunk(accumulate)):
        (net(*part)["loss"] / accumulate).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", ["accumulated", "two processes"])
def test_a_shared_batch_gives_the_same_gradients(way, tmp_path):
    wanted, path = gradients(cpu()), tmp_path / "x.pt"
    if way == "accumulated":
        found = gradients(cpu(), accumulate=2)
    else:
        code = (f"import torch, test_eat as t; torch.save(t.gradients(t.cpu()), {str(path)!r}); "
                "torch.distributed.destroy_process_group()")
        end_of(torchrun("--no-python", sys.executable, "-c", code), 0)
        found = torch.load(path)
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, gradient in wanted.items():
        assert relative_error(found[name], gradient) < 1e-5, name


def test_bench_reports_what_fits_together(capsys, monkeypatch):
    randn = torch.randn  # smaller matrix products
    monkeypatch.setattr(torch, "randn", lambda *shape, **how: randn(*np.minimum(shape, 128), **how))
    assert eat.main(["bench", *CPU_FLAGS, "--batch-size=2", "--steps=2", *SMALL_FLAGS]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["precision"], found["dim"], found["batch_size"]) == ("float32", 32, 2)
    assert found["clips_per_second"] * found["seconds_per_step"] == pytest.approx(2)
    assert found["step_tflops"] / found["matrix_tflops"] == pytest.approx(
        found["share_of_matrix_rate"])


# ---- eat.py: runs --------------------------------------------------------------------------------


def write(path, samples, rate=16_000, kind=None):
    soundfile.write(path, samples, rate, kind)
    return path


def tone(path, rate=16_000, seconds=2.0, hertz=440.0):
    t = np.arange(int(rate * seconds)) / rate
    return write(path, 0.5 * np.sin(2 * np.pi * hertz * t), rate)


def make_too_loud(path):
    return write(path, 1e30 * np.random.default_rng(0).standard_normal(11_200), kind="DOUBLE")


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


def assert_same_weights(a, b):
    assert same_runs(a, b)


@pytest.fixture(scope="module")
def whole_run(sounds, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert eat.main(flags(sounds, out)) == 0
    return out


def start(*arguments):
    return subprocess.Popen([sys.executable, *arguments], cwd=HERE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def torchrun(*arguments):
    return start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments)


def wait_for_step(process, out, step):
    """Until the run in `out` has logged so many lines."""
    path = Path(out) / "log.jsonl"
    while process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"ended before step {step}: {process.stdout.read()}")


def end_of(process, status, says=""):
    """Wait for a process to end with a status (None: any but 0), in words and without traceback."""
    said, _ = process.communicate(timeout=120)
    right = process.returncode == status if status is not None else process.returncode
    assert right and says in said and 'eat.py", line' not in said, said


def processes(word):
    """Those, other than this one and torchrun itself, whose command line has a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            line = path.read_bytes()
            if str(word).encode() in line and b"torch.distributed.run" not in line:
                found.append(int(path.parent.name))
    return sorted(set(found) - {os.getpid()})


def assert_none_left(word):
    for _ in range(50):  # a moment to end in
        if not processes(word):
            return
        time.sleep(0.1)
    pytest.fail(f"still there: {processes(word)}")


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


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns_what_float32_learns(precision, sounds, whole_run, tmp_path,
                                                    monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # no step is lost to finding it
    monkeypatch.setattr(eat.Machine, "scaler", lambda self: scaler)
    assert eat.main(flags(sounds, tmp_path, f"--precision={precision}")) == 0
    lines = [[line["loss"] for line in logged(out)] for out in (tmp_path, whole_run)]
    assert lines[0] == pytest.approx(lines[1], rel=1e-2) and lines[0] != lines[1]
    _, state = weights(tmp_path)
    assert all(x.dtype == torch.float32 for x in state.values())  # weights and teacher stay whole


def test_a_timestamp_is_a_seed_and_hours_and_passes_become_steps(sounds, whole_run, esc, tmp_path):
    seed, clips = f"--seed={10**18}", len(open_clips(str(sounds), 64))
    for name, path, steps, *more in (
        ("a", sounds, 1, "--hours=1e-9", seed), ("b", "demo", 1, "--hours=1e-9", seed),
        ("c", sounds, math.ceil(clips / 4), "--epochs=1"),
    ):
        assert eat.main(flags(path, tmp_path / name, "--log-every=1", *more, steps=None)) == 0
        lines = logged(tmp_path / name)  # and nothing of the trial
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))
    assert logged(tmp_path / "a")[0]["loss"] != logged(whole_run)[0]["loss"]
    for mode in ("finetune", "linear"):
        start = f"--checkpoint={whole_run}/last.pt"
        assert fine(esc, tmp_path / mode, f"--mode={mode}", start, seed) == 0


@linux
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_resumes_exactly(number, status, whole_run, sounds, tmp_path):
    """In the middle, then with other loader workers: bit by bit the undisturbed run."""
    process = start("eat.py", *flags(sounds, tmp_path, "--workers=2", "--save-every=1"))
    wait_for_step(process, tmp_path, 2)
    process.send_signal(number)
    end_of(process, status, "--resume")
    assert 2 <= weights(tmp_path)[0] < 8
    assert_none_left(tmp_path)
    assert eat.main(flags(sounds, tmp_path, "--resume")) == 0
    assert_same_weights(tmp_path, whole_run)
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, 9))


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_that_is_told_to_stop_saves(number, sounds, tmp_path, capsys):
    process = torchrun("eat.py", *flags(sounds, tmp_path, "--workers=1", steps=100_000))
    wait_for_step(process, tmp_path, 2)
    if number == signal.SIGINT:  # as a terminal does: to all its processes
        for child in processes(tmp_path):
            os.kill(child, number)
    process.send_signal(number)
    end_of(process, None, "stopped by")
    assert_none_left(tmp_path)
    step, _ = weights(tmp_path)
    assert step >= 2
    # One process goes on where two stopped, and says so.
    state = torch.load(tmp_path / "last.pt")
    state["recipe"]["steps"] = step + 2
    torch.save(state, tmp_path / "last.pt")
    assert eat.main(flags(sounds, tmp_path, "--resume", steps=step + 2)) == 0
    assert "2 processes before, 1 now" in capsys.readouterr().out
    assert weights(tmp_path)[0] == step + 2


def test_two_processes_resume_exactly(sounds, tmp_path):
    run = ["eat.py", *flags(sounds, tmp_path, "--save-every=3", steps=5)]
    end_of(torchrun(*run), 0, "the encoder is in")
    os.rename(tmp_path / "last.pt", tmp_path / "whole.pt")  # what is left is of step 3
    end_of(torchrun(*run, "--resume"), 0, "resumed  at step 3")
    whole = torch.load(tmp_path / "whole.pt")["model"]
    assert all(torch.equal(x, whole[name]) for name, x in weights(tmp_path)[1].items())


@linux
def test_a_process_that_dies_ends_the_others(sounds, tmp_path):
    process = torchrun("eat.py", *flags(sounds, tmp_path, steps=100_000))
    wait_for_step(process, tmp_path, 2)
    os.kill(processes(tmp_path)[-1], signal.SIGKILL)
    end_of(process, None, "Signal 9")
    assert_none_left(tmp_path)


def test_a_run_that_is_killed_resumes_exactly(whole_run, sounds, tmp_path):
    process = start("eat.py", *flags(sounds, tmp_path, "--save-every=2"))
    wait_for_step(process, tmp_path, 4)
    process.kill()
    process.communicate()
    # As if killed between the two renames.
    os.rename(tmp_path / "last.pt", tmp_path / "previous.pt")
    spoilt = b'\0\0\0\n{"\xff": 1}\n{"step" 2}\n[2]\n{"step": 1, "lo'  # as after a power failure
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(spoilt)
    assert eat.main(flags(sounds, tmp_path, "--resume")) == 0
    assert_same_weights(tmp_path, whole_run)
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, 9))


def kill_at_random(command, out, kills, in_writes):
    """Start a run and kill it, again and again: in start-up, while it runs, and in a write."""
    rng, log, part = np.random.default_rng(0), out / "log.jsonl", out / "last.pt.part"
    for kill in range(kills):
        before = log.stat().st_mtime if log.exists() else 0
        process = start(*command)
        if kill % 3 == 0:
            time.sleep(rng.uniform(0, 4))
        else:
            while process.poll() is None and not (log.exists() and log.stat().st_mtime > before):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.5))
            while in_writes and kill % 3 == 1 and process.poll() is None and not part.exists():
                pass
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        process.communicate()


@slow
def test_twenty_kills_at_random_moments_change_nothing(sounds, tmp_path):
    more = ["--save-every=1", "--batch-size=8"]
    run = [*flags(sounds, tmp_path / "cut", *more, steps=300), "--resume"]
    kill_at_random(["eat.py", *run, "--workers=1"], tmp_path / "cut", 20, in_writes=True)
    assert eat.main(run) == 0
    assert eat.main(flags(sounds, tmp_path / "whole", *more, steps=300)) == 0
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    steps = [[line["step"] for line in logged(tmp_path / name)] for name in ("cut", "whole")]
    assert steps[0] == steps[1] == list(range(1, 301))


@slow
@linux
def test_a_long_run_is_flat(sounds, tmp_path):
    """2,000 steps: memory of the main process and its worker, open files, lines of the log."""
    more = ["--workers=1", "--save-every=100"]
    process = start("eat.py", *flags(sounds, tmp_path, *more, steps=2000))
    seen = {}
    for step in (500, 1990):
        wait_for_step(process, tmp_path, step)
        seen[step] = []
        for number in processes(tmp_path):
            status = Path(f"/proc/{number}/status").read_text()
            memory = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # MiB
            seen[step].append((memory, len(os.listdir(f"/proc/{number}/fd"))))
    assert process.wait(timeout=60) == 0
    assert len(seen[500]) == len(seen[1990]) == 2
    for (early, files), (late, files_late) in zip(seen[500], seen[1990]):
        assert late < early + 10
        assert files_late <= files + 20  # each batch on its way from the worker holds some open
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, 2001))


def test_a_run_that_goes_wrong_stops_and_keeps_the_last_good_checkpoint(sounds, tmp_path, capsys):
    more = ["--save-every=1", "--lr=1e30", "--grad-clip=1e30", "--warmup-steps=0"]
    assert eat.main(flags(sounds, tmp_path, *more, steps=40)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    for words in ("not finite 10 times in a row", "lower --lr", "last.pt"):
        assert words in said
    step, state = weights(tmp_path)
    assert step == 1 and all(x.isfinite().all() for x in state.values())
    assert len(logged(tmp_path)) == 11
    assert eat.main(flags(sounds, tmp_path / "2", "--collapse-std=100")) == 1
    assert "collapsed" in capsys.readouterr().err


def test_probing_changes_nothing_and_agrees_with_fine_tuning(sounds, whole_run, esc, tmp_path,
                                                             capsys):
    run = flags(sounds, tmp_path / "run", f"--probe={esc}", "--probe-every=3")
    assert eat.main(run) == 0
    said = capsys.readouterr().out
    assert_same_weights(tmp_path / "run", whole_run)
    found = {line["step"]: line for line in logged(tmp_path / "run") if "knn_patches" in line}
    assert list(found) == [0, 3, 6, 8] and all(f"step {step:7}" in said for step in found)
    assert fine(esc, tmp_path / "knn", f"--checkpoint={tmp_path}/run/last.pt", "--mode=knn",
                "--frames=64") == 0
    for reading, folds in results(tmp_path / "knn").items():
        name = "knn_" + reading.lower().replace(" ", "_")
        values = [fold["value"] for fold in folds.values()]
        if reading in ("patches", "CLS", "mean of patches"):
            assert found[8][name] == pytest.approx(np.mean(values))
    # A finished run that is resumed probes no more.
    assert eat.main([*run, "--resume"]) == 0
    assert sum("knn_patches" in line for line in logged(tmp_path / "run")) == 4


def test_a_probe_starts_anew_with_its_run_and_says_what_it_probes_on(sounds, esc, tmp_path, capsys):
    (tmp_path / "run").mkdir()  # killed before its first checkpoint
    (tmp_path / "run/log.jsonl").write_text('{"step": 0, "knn_cls": 9}\n{"step": 1, "loss": 9}\n')
    assert eat.main(flags(esc, tmp_path / "run", f"--probe={esc}", steps=1)) == 0
    assert "the very sound it is trained on" in capsys.readouterr().out
    lines = logged(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1] and lines[0]["knn_cls"] <= 1
    run = flags(sounds, tmp_path / "other", f"--probe={make_manifests(tmp_path / 'labels')}")
    refused(eat.main, run, "one label a clip", capsys)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("wrong, says", [
    ("--data=nowhere", "no such file or folder"), ("--probe-every=2", "--probe must name"),
    ("--probe=nowhere", "no such folder"), ("--target-blocks=3", "at most depth (2)"),
    ("--data={empty}", "no sound in it"), ("--data={broken}", "none of its files"),
    ("--heads=5", "heads (5) must divide dim"), ("--frames=100", "multiple of 16"),
    ("--batch-size=1000", "1000"), ("--batch-size=6 --accumulate=4", "multiple of 4"),
    ("--out={run}", "--resume"), ("--out={run} --resume --lr=0.5", "--lr 0.5"),
    ("--out=/dev/null/out", "expected a folder"), ("--device=cuda", "device cuda"),
    ("--mask-ratio=0.999", "some of the 32 patches visible"), ("--lr=-1", "lr (-1.0)"),
    ("--mask-ratio=nan", "mask_ratio (nan)"), ("--heads=0", "heads (0)"),
    ("--steps=0", "steps (0) must be a number of at least 1"), ("--workers=-1", "workers (-1)"),
    ("--preset=bsae", "--preset: invalid choice: 'bsae'"), ("--stepz=3", "--stepz=3"),
    ("--init={run}/lost.pt", "no such file")])
def test_bad_input_gets_one_line_and_status_2(wrong, says, sounds, whole_run, tmp_path, capsys):
    if torch.cuda.is_available() and wrong == "--device=cuda":
        pytest.skip("there is a CUDA device")
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "a.wav").write_text("no sound")
    more = wrong.format(empty=empty, broken=broken, run=whole_run).split()
    refused(eat.main, flags(sounds, tmp_path / "out", *more), says, capsys)


@pytest.mark.parametrize("main, wrong, says", [
    (eat.main, "plot {empty}", "log.jsonl: no log"),
    (eat.main, "export {last} {last}", "expected a folder"),
    (eat.main, "export {last} {last}/x.safetensors", "expected a folder"),
    (eat.main, "bench --frames=100", "multiple of 16"),
    (data.main, "pack {empty} {empty}/pack --workers=-1", "invalid choice"),
    (data.main, "pack x.wav y --sede=1", "--sede=1"),
    (finetune.main, "--data={esc} --stepz=3", "--stepz=3"),
    (finetune.main, "--data=nowhere", "no such folder"),
    (finetune.main, "--data={esc} --fold=9", "--fold 9"),
    (finetune.main, "--data={esc} --checkpoint=nowhere.pt", "no such file"),
    (finetune.main, "--data={esc} --weighted", "sampling weights"),
    (finetune.main, "--data={esc} --batch-size=5 --accumulate=2", "multiple"),
    (finetune.main, "--data={esc} --shots=1", "--shots 1"),
    (finetune.main, "--data={esc} --mode=linear --shots=0,x", "--shots 0,x"),
    (finetune.main, "look nowhere.wav", "no such file"),
    (finetune.main, "look demo --out={empty}/a.xyz", "Format 'xyz' is not supported"),
    (finetune.main, "look demo --seed=x", "invalid int value"),
    (finetune.main, "embed {empty} --checkpoint={last} --workers=-1", "at least 0"),
    (finetune.main, "embed a.wav --checkpoint={last} --out={last}/x.npz", "expected a folder"),
    (finetune.main, "embed nowhere --checkpoint={last}", "no such file or folder"),
    (finetune.main, "predict {empty} --checkpoint={last} --top=0", "--top 0: must be above 0"),
    (finetune.main, "predict {empty} --checkpoint={last} --every=nan", "must be above 0"),
    (finetune.main, "predict {empty} --checkpoint={last}", "without a classifier")])
def test_bad_input_to_the_other_commands_too(main, wrong, says, whole_run, esc, tmp_path, capsys,
                                             monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = wrong.format(empty=tmp_path, last=whole_run / "last.pt", esc=esc).split()
    refused(main, words, says, capsys)


def test_too_little_memory_is_one_line(sounds, tmp_path, capsys):
    assert eat.main(flags(sounds, tmp_path, "--clones=1000000000")) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "out of memory" in said and "fewer --clones" in said


def test_help_names_every_field(capsys):
    for main, kinds in ((eat.main, (Recipe, EATConfig, eat.Machine)),
                        (finetune.main, (FineTune, eat.Machine))):
        with pytest.raises(SystemExit):
            main(["--help"])
        said = capsys.readouterr().out
        names = [name for kind in kinds for name in kind.__dataclass_fields__]
        assert all("--" + name.replace("_", "-") in said for name in names)


# ---- eat.py: what goes wrong ---------------------------------------------------------------------


def train(out, machine, clips, resumed=None, **more):
    """A run of eat.train with batches of 2 -> its last checkpoint, and the one before."""
    how = dict(batch_size=2, lr=1e-3, warmup_steps=0, log_every=1, save_every=1)
    eat.train(small(), Recipe(out=str(out), **how, **more), clips, machine, resumed)
    return [eat.read_checkpoint(path) for path in eat.find_checkpoints(out)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_poisoned_batch_leaves_the_weights_untouched(precision, tmp_path):
    machine, last = cpu(precision), 20  # until then the scaler of float16 has found its scale
    after, before = train(tmp_path, machine, Waves(loud={last - 1}), steps=last)
    assert (before["step"], after["step"]) == (last - 1, last)
    assert logged(tmp_path)[-1]["not_finite"] == 1
    decay = Recipe().teacher_decay(last)
    for name, x in before["model"].items():
        if name.startswith("teacher."):  # nears the unchanged student
            student = before["model"][name.replace("teacher.", "student.")]
            x = decay * x + (1 - decay) * student
            torch.testing.assert_close(after["model"][name], x, atol=1e-7, rtol=1e-6)
        else:
            assert torch.equal(after["model"][name], x), name
    for key, moments in before["optimizer"]["state"].items():
        found = after["optimizer"]["state"][key]
        assert all(torch.equal(found[name], value) for name, value in moments.items())
    further, _ = train(tmp_path, machine, Waves(), resumed=after, steps=last + 2)
    assert not torch.equal(further["model"]["student.cls"], after["model"]["student.cls"])
    with pytest.raises(data.RunStopped, match="in a row"):
        train(tmp_path / "2", machine, Waves(loud=range(100)), steps=30)


@pytest.mark.parametrize("scale", [2.0**24, 2.0**-40], ids=["overflow", "underflow"])
def test_the_scaler_of_float16_survives(scale, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    monkeypatch.setattr(eat.Machine, "scaler", lambda self: scaler)
    model = train(tmp_path, cpu("float16"), Waves(), steps=24)[0]["model"]
    assert all(x.isfinite().all() for x in model.values())
    torch.manual_seed(data.seed_of(0))
    assert not torch.equal(model["student.cls"], EAT(small()).student.cls)


def test_a_clip_that_is_far_too_loud_costs_its_steps_only(sounds, tmp_path, capsys):
    folder = shutil.copytree(sounds, tmp_path / "loud")
    make_too_loud(folder / "loud.wav")
    assert eat.main(flags(folder, tmp_path / "out", "--stats=measure")) == 0
    lines = logged(tmp_path / "out")
    assert 1 <= sum(line["not_finite"] for line in lines) <= 2  # 18 clips, 32 drawn
    assert all((line["loss"] is None) == (line["not_finite"] == 1) for line in lines)
    assert all(x.isfinite().all() for x in weights(tmp_path / "out")[1].values())
    assert "changed nothing" in capsys.readouterr().err


def test_a_run_whose_sound_goes_away_is_saved(sounds, tmp_path):
    folder, out = shutil.copytree(sounds, tmp_path / "sound"), tmp_path / "out"
    process = start("eat.py", *flags(folder, out, steps=100_000))
    wait_for_step(process, out, 3)
    folder.rename(tmp_path / "unmounted")
    end_of(process, 2, "no clip can be used any more")
    assert weights(out)[0] == len(logged(out)) >= 3  # nothing computed is lost


@full_disk
def test_a_full_disk_costs_checkpoints_and_lines_but_not_the_run(sounds, whole_run, tmp_path,
                                                                 capsys):
    out, path = tmp_path / "out", tmp_path / "log.jsonl"
    out.mkdir()
    (out / "last.pt.part").symlink_to("/dev/full")  # the first checkpoint meets it
    assert eat.main(flags(sounds, out, "--save-every=3")) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert len(said) == 1 and "none yet; going on" in said[0]
    assert_same_weights(out, whole_run)
    log = eat.Log(str(tmp_path), 0, 9, cpu(), Waves())
    path.symlink_to("/dev/full")
    log.append({"step": 1})
    path.unlink()
    log.append({"step": 2})
    assert [line["step"] for line in logged(tmp_path)] == [2]
    assert "log.jsonl: No space left on device" in capsys.readouterr().err
    (tmp_path / "2/last.pt.part/in the way").mkdir(parents=True)  # the last one that must be saved
    assert eat.main(flags(sounds, tmp_path / "2")) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "could not save" in said and "--resume" in said


def test_a_deleted_folder_is_made_again(sounds, whole_run, tmp_path):
    out = tmp_path / "out"
    process = start("eat.py", *flags(sounds, out, "--save-every=2", "--workers=1"))
    wait_for_step(process, out, 3)
    shutil.rmtree(out, ignore_errors=True)
    end_of(process, 0, "the encoder is in")
    assert_same_weights(out, whole_run)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, sounds, whole_run, tmp_path,
                                                          capsys):
    assert eat.main(flags(sounds, tmp_path, "--save-every=4")) == 0
    path = tmp_path / "last.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    assert eat.main(flags(sounds, tmp_path, "--resume")) == 0
    said = capsys.readouterr()
    assert "going on from" in said.err and "previous.pt" in said.err
    assert "resumed  at step 4" in said.out
    assert_same_weights(tmp_path, whole_run)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"nothing")
    assert eat.main(flags(sounds, tmp_path, "--resume")) == 2


def test_no_flipped_bit_goes_unnoticed(whole_run, tmp_path):
    content, rng = (whole_run / "last.pt").read_bytes(), np.random.default_rng(0)
    whole, noticed = eat.read_checkpoint(whole_run / "last.pt"), 0
    for place in rng.integers(len(content), size=100):
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:
            state = eat.read_checkpoint(tmp_path / "flipped.pt")
        except UsageError:
            noticed += 1
            continue
        for name, tensor in whole["model"].items():  # it was padding
            assert torch.equal(state["model"][name], tensor)
        assert state["config"] == whole["config"] and state["step"] == whole["step"]
    assert noticed > 50


# ---- eat.py: checkpoints -------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_named(tmp_path):
    path, whole = tmp_path / "last.pt", io.BytesIO()
    torch.save({"config": {}, "model": {"x": torch.zeros(1000)}}, whole)
    wrong = "not a whole checkpoint"
    for content, says in (
        (b"", wrong), (b"<html>not found</html>", wrong), (b"PK\x03\x04 cut short", wrong),
        (whole.getvalue()[:3000], wrong), (whole.getvalue(), "no encoder in it; it has x"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"last.pt: {says}"):
            eat.load_encoder(path)
    with pytest.raises(UsageError, match="no such file"):
        eat.load_encoder(tmp_path / "nowhere.pt")


FORMATS = ["fairseq_pretrained.pt", "fairseq_finetuned.pt", "hf_pretrained", "hf_finetuned",
           "hf_finetuned/model.safetensors"]


@fixtures
@pytest.mark.parametrize("name", FORMATS)
def test_the_release_checkpoints_give_its_figures(name):
    models = {"tokens": eat.load_encoder(TINY / name)}
    if "finetuned" in name:
        models["logits"] = finetune.load_classifier(TINY / name)
    expected = torch.load(TINY / "expected.pt", weights_only=True)
    for clip in expected.values():  # of the model's length, half of it, twice it
        for kind, model in models.items():
            torch.testing.assert_close(model(clip["spectrogram"]), clip[kind], atol=1e-5, rtol=0)


@fixtures
def test_a_fairseq_file_brings_student_decoder_and_teacher(sounds, tmp_path):
    source = TINY / "fairseq_pretrained.pt"
    model, fixture = eat.load_pretrained(source), torch.load(TINY / "pretrain.pt")
    clips, clones, _ = fixture["mask"].shape
    model.config.utterance_weight = clips * clones  # the views it is summed over
    losses = model(fixture["spectrogram"], fixture["mask"])
    losses["loss"].backward()
    assert losses["frame_loss"].item() == pytest.approx(fixture["frame_loss"], rel=1e-6)
    assert losses["loss"].item() == pytest.approx(fixture["total_loss"], rel=1e-6)
    for name, p in model.named_parameters():
        theirs = release_name(name)
        part = "teacher" if name.startswith("teacher") else "student"
        assert torch.equal(p, fixture[part][theirs]), name
        if p.requires_grad:
            assert relative_error(p.grad, fixture["grads"][theirs]) < 1e-4, name
    # Continued with a learning rate of 0, the student stays and the teacher nears it.
    run = [f"--data={sounds}", f"--out={tmp_path}", f"--init={source}", "--steps=1", "--lr=0",
           "--batch-size=4", "--ema-decay=0.9", "--ema-end-decay=0.9", *CPU_FLAGS]
    assert eat.main(run) == 0
    after = eat.load_pretrained(tmp_path / "last.pt")
    assert after.config.frames == 256 and after.config.clones == 4
    torch.testing.assert_close(after.student.state_dict(), model.student.state_dict())
    model.update_teacher(0.9)
    torch.testing.assert_close(after.teacher.state_dict(), model.teacher.state_dict())


@fixtures
@pytest.mark.parametrize("name", ["hf_pretrained", "hf_finetuned"])
def test_a_hugging_face_folder_comes_out_as_it_went_in(name, tmp_path):
    assert eat.main(["export", str(TINY / name), str(tmp_path / "out")]) == 0
    folders = tmp_path / "out", TINY / name
    ours, theirs = (safetensors.torch.load_file(x / "model.safetensors") for x in folders)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-7, rtol=0)
    ours, theirs = (json.loads((x / "config.json").read_text()) for x in folders)
    assert ours == theirs


@pytest.mark.parametrize("name, dtype", [("hf", torch.float32),
                                         ("eat.safetensors", torch.float16)])
def test_our_encoder_survives_export(name, dtype, whole_run, tmp_path):
    source, target = str(whole_run / "last.pt"), tmp_path / name
    assert eat.main(["export", source, str(target), "--note=some tones"]) == 0
    ours, back = eat.load_encoder(source), eat.load_encoder(target)
    for key, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor.to(dtype).float()), key
    for key in ("dim", "depth", "heads", "frames", "mean", "std", "norm_eps"):
        assert getattr(back.config, key) == getattr(ours.config, key), key
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


@pytest.mark.parametrize("wrong", [
    {"embed_dim": 10**9}, {"depth": 10**9}, {"mlp_ratio": 1e9}, {"num_heads": 10**9},
    {"img_size": [10**12, 128]}, {"img_size": ["x", 128]}, {"norm_eps": -1.0},
    {"embed_dim": "many"}, {"norm_eps": None},
])
def test_absurd_sizes_are_refused_before_memory_is_asked_for(wrong, whole_run, tmp_path):
    eat.export(str(whole_run / "last.pt"), str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
    if wrong == {"norm_eps": None}:  # as if it said nothing
        assert eat.load_encoder(tmp_path).config.norm_eps == 1e-6
        return
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path}: ")) as error:
        eat.load_encoder(tmp_path)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_named(whole_run, tmp_path):
    state = torch.load(whole_run / "last.pt", weights_only=True)
    state["model"]["student.extra"] = torch.zeros(1)
    state["model"]["student.pre_norm.weight"] = torch.zeros(5)
    del state["model"]["student.cls"]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UsageError, match='Missing.*"cls".*Unexpected.*"extra".*pre_norm.weight'):
        eat.load_encoder(tmp_path / "x.pt")


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stranger:
    pass


class HugeStorage(pickle.Pickler):
    """A Stranger becomes a tensor that claims more elements than its bytes hold."""

    def persistent_id(self, thing):
        if type(thing) is Stranger:
            return ("storage", torch.FloatStorage, "0", "cpu", 10**12)


REBUILD, STORAGE = torch._utils._rebuild_tensor_v2, torch.FloatStorage(4)
HOSTILE = {
    "os.system": Calls(os.system, "touch ran"), "eval": Calls(eval, "open('ran', 'w')"),
    "getattr": Calls(getattr, "x", "upper"), "process": Calls(subprocess.Popen, ["touch", "ran"]),
    "nested": None, "numpy": Calls(np.load, "ran"), "huge storage": None,
    "reach beyond": Calls(REBUILD, STORAGE, 0, (5,), (1,), False, {}),
    "negative stride": Calls(REBUILD, STORAGE, 3, (4,), (-1,), False, {}),
    "wrong storage": Calls(REBUILD, "no storage", 0, (4,), (1,), False, {}),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", ["cfg", "model", "config"])
def test_no_code_in_a_checkpoint_runs(kind, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil, buffer = HOSTILE[kind], io.BytesIO()
    if kind == "nested":
        torch.save(Calls(os.system, "touch ran"), buffer)
        evil = Calls(torch.storage._load_from_bytes, buffer.getvalue())
    if kind == "huge storage":
        HugeStorage(buffer, 2).dump({"cfg": None, "model": {"x": Stranger()}})
        with zipfile.ZipFile("evil.pt", "w") as archive:
            archive.writestr("x/data.pkl", buffer.getvalue())
            archive.writestr("x/data/0", b"\0" * 16)
    else:
        torch.save({"model": {"x": torch.zeros(2)}, place: evil}, "evil.pt")
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    with pytest.raises(UsageError) as caught:
        eat.load_encoder("evil.pt")
    assert "\n" not in str(caught.value) and "evil.pt" in str(caught.value)
    assert not ran and os.listdir() == ["evil.pt"]


def test_unknown_classes_become_stand_ins_that_keep_their_state(tmp_path):
    stranger = Stranger()
    stranger.rate, stranger.kind = 0.5, {"a": [1, 2]}
    turned, half = torch.arange(6.0).view(2, 3).T, torch.ones(2, dtype=torch.bfloat16)
    torch.save({"cfg": stranger, "x": turned, "half": half}, tmp_path / "x.pt")
    found = eat.load_inert(tmp_path / "x.pt")
    assert type(found["cfg"]) is eat.Stub
    assert found["cfg"].state == {"rate": 0.5, "kind": {"a": [1, 2]}}
    assert torch.equal(found["x"], turned) and found["half"].dtype == torch.bfloat16


# ---- eat.py: frozen features ---------------------------------------------------------------------


def slow_reading(encoder, x):
    """`x`: (1, 1, T, 128), all of it sound -> the three readings, token by token."""
    tokens, outputs = encoder.embed(x), []
    for block in encoder.blocks:
        tokens, _ = block(tokens)
        outputs.append(tokens[0, 1:])
    patches = sum(outputs) / len(outputs)
    rows = []
    for step in range(x.shape[2] // 16):
        rows.append(torch.cat([patches[8 * step + k] for k in range(8)]))
    rows = torch.stack(rows)
    deviation = ((rows - rows.mean(0)) ** 2).mean(0).sqrt()
    return {"patches": torch.cat([rows.mean(0), deviation]), "CLS": tokens[0, 0],
            "mean of patches": outputs[-1].mean(0)}


@torch.no_grad()
def test_features_leave_the_padding_out_and_equal_a_slow_version():
    encoder = Encoder(small()).eval()
    lengths = torch.tensor([400, 2800, 2960, 9000, 10_000, 10_480])
    steps = [1, 1, 2, 4, 4, 4]  # of 16 frames, of which 2,800 samples fill just one
    for frames in (64, 128):  # the same sound, with more and more zeros behind it
        torch.manual_seed(0)
        clips = Waves()
        clips.samples, clips.replace = data.clip_samples(frames), False
        waves = [torch.randn(length) for length in lengths]
        clips.read = lambda number: waves[number]
        config = small(frames=frames)
        found, used = eat.features(encoder, config, clips, range(6), cpu())
        assert used.tolist() == list(range(6))
        for k, (wave, count) in enumerate(zip(waves, steps)):
            x = spectrogram(wave[None], lengths[k, None], count * 16, config.mean, config.std)
            for name, value in slow_reading(encoder, x).items():
                torch.testing.assert_close(found[name][k], value, atol=1e-5, rtol=1e-4)


def test_nearest_neighbours_by_hand():
    bank = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
    targets = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    queries = torch.tensor([[2.0, 0.0], [-3.0, 0.01]])
    assert eat.nearest_neighbours(bank, targets, queries, k=2).argmax(1).tolist() == [0, 1]
    scores = eat.nearest_neighbours(bank, targets, torch.tensor([[1.0, 0.1]]), k=4)
    # The four neighbours lie opposite in pairs.
    assert scores[0].sum().item() == pytest.approx(0, abs=1e-5)


@real_sound
@pytest.mark.parametrize("folder", ["esc10", "pool"])
def test_real_sound_trains(folder, tmp_path):
    more = ["--frames=512", "--stats=measure", "--workers=1"]
    assert eat.main(flags(SHARED / "data" / folder, tmp_path, *more, steps=3)) == 0
    config = torch.load(tmp_path / "last.pt", weights_only=True)["config"]
    assert -8 < config["mean"] < -6 and 4 < config["std"] < 6.5


# ---- data.py -------------------------------------------------------------------------------------


def test_fbank_equals_kaldi_for_every_row():
    torch.manual_seed(0)
    waveforms = torch.randn(4, 12_345) * torch.tensor([1, 0.1, 1e-3, 0])[:, None]
    waveforms[1] += torch.sin(torch.arange(12_345) * 0.2)
    for row, waveform in zip(fbank(waveforms), waveforms):
        kaldi = torchaudio.compliance.kaldi.fbank(
            waveform[None], htk_compat=True, sample_frequency=16000, use_energy=False,
            window_type="hanning", num_mel_bins=128, dither=0, frame_shift=10)
        torch.testing.assert_close(row, kaldi, atol=1e-4, rtol=0)


def test_padding_comes_before_the_normalisation():
    waveform = torch.randn(16_000)
    padded = F.pad(waveform, (0, 24_000))
    lengths = torch.tensor([16_000, 40_000])
    x = spectrogram(torch.stack([padded, padded]), lengths, 256, mean=-4.0, std=3.0)
    assert x.shape == (2, 1, 256, 128)
    torch.testing.assert_close(x[0, 0, :98], (fbank(waveform[None])[0] + 4) / 6)
    assert (x[0, 0, 98:] == 4 / 6).all()  # one second has 98 whole windows
    assert (x[1, 0, 98:248] != 4 / 6).all()  # digital silence is sound; padding is not


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


def test_channels_are_averaged_and_formats_agree(tmp_path):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (16_000, 2))
    want = torch.from_numpy(sound.mean(1)).float()
    for name, kind in (("a.wav", "PCM_16"), ("b.flac", "PCM_24"), ("c.aiff", "PCM_16"),
                       ("d.wav", "DOUBLE")):
        found = load_audio(write(tmp_path / name, sound, kind=kind))
        torch.testing.assert_close(found, want, atol=1e-4, rtol=0)
    part = load_audio(tmp_path / "d.wav", start=0.25, seconds=0.5)
    torch.testing.assert_close(part, want[4000:12_000], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["text.wav", "empty.wav", "none.wav", "nan.wav", "slow.wav",
                                  "nowhere.wav", "folder.wav"])
def test_what_is_no_sound_raises_the_one_error(name, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty.wav").touch()
    write(tmp_path / "none.wav", np.zeros(0))
    write(tmp_path / "nan.wav", np.array([0.1, np.nan] * 500), kind="FLOAT")
    tone(tmp_path / "slow.wav", 7, seconds=100, hertz=1)
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(AudioError, match=name):
        load_audio(tmp_path / name)


def damaged(content, rng):
    """In one of five ways."""
    content, way = bytearray(content), rng.integers(5)
    place, length = rng.integers(len(content)), rng.integers(1, 5000)
    if way == 0:  # cut, or with a hole
        content[place : place + rng.choice([length, len(content)])] = b""
    elif way == 1:  # noise behind the header
        content[place % 100 :] = rng.bytes(len(content))
    elif way == 2:  # length, rate or channels, in a wav header's places, as absurd as they come
        place, value = rng.choice([22, 24, 40]), int(rng.choice([2**32 - 1, 2**16 - 1, 1, 0]))
        content[place : place + 4] = value.to_bytes(4, "little")
    else:  # bits flipped anywhere, or in the header
        for place in rng.integers((0, 64, len(content))[way - 2], size=rng.integers(1, 50)):
            content[place % len(content)] ^= 1 << rng.integers(8)
    return content


def make_corpus(folder, count):
    """`count` damaged files, of real sound too where there is some, and 17 odd ones, some of which
    are sound."""
    rng = np.random.default_rng(0)
    whole = [(path.suffix, path.read_bytes()[:60_000])
             for path in sorted((SHARED / "data").glob("*/audio/*"))[::400]]
    for kind in ("wav PCM_16", "wav PCM_U8", "wav PCM_24", "wav DOUBLE", "flac PCM_16",
                 "ogg VORBIS", "ogg OPUS", "mp3 MPEG_LAYER_III", "aiff PCM_16", "au ULAW"):
        for rate, shape in ((16_000, 3200), (48_000, (9600, 2))):
            path = folder / f"whole.{kind.split()[0]}"
            write(path, 0.3 * rng.standard_normal(shape), rate, kind.split()[1])
            whole.append((path.suffix, path.read_bytes()))
            path.unlink()
    for k in range(count):
        suffix, content = whole[k % len(whole)]
        (folder / f"{k:04}{suffix}").write_bytes(damaged(content, rng))
    sound = 0.3 * rng.standard_normal(16_000)
    for name, samples, rate, kind in (
        ("nan.wav", np.append(sound, np.nan), 16_000, "DOUBLE"), ("0.flac", [], 16_000, "PCM_16"),
        ("inf.wav", np.append(sound, np.inf), 16_000, "DOUBLE"), ("1 Hz.wav", sound, 1, "PCM_16"),
        ("huge.wav", sound * 1e300, 16_000, "DOUBLE"), ("odd.wav", sound, 44_101, "PCM_U8"),
        ("high.wav", sound, 384_000, "PCM_24"), ("prime.wav", sound, 999_983, "PCM_16"),
        ("many.wav", np.tile(sound[:, None], 32), 16_000, "PCM_16"),
        ("one.wav", sound[:1], 16_000, "PCM_16"), ("line\nbreak.wav", sound, 16_000, "PCM_16"),
    ):
        write(folder / name, samples, rate, kind)
    write(os.fsencode(folder) + b"/not utf-8 \xff.wav", sound)
    (folder / "text.wav").write_text("This is not sound.")
    (folder / "nothing.wav").touch()
    (folder / "folder.wav").mkdir()
    (folder / "dangling.wav").symlink_to(folder / "nowhere.wav")
    os.mkfifo(folder / "pipe.wav")


def python(code, *arguments):
    """What a program prints, and by how many MiB its memory grew at its peak -> numbers."""
    peak = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024"
    code = f"import sys, torch, data\nbefore = {peak}\n{code}\nprint({peak} - before)"
    said = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=HERE, text=True,
                          capture_output=True, timeout=240)
    assert said.returncode == 0, said.stderr
    return [int(word) for word in said.stdout.split()]


CORPUS = """
torch.set_num_threads(1)
read, refused, folder = 0, 0, sys.argv[1]
for path in [*data.find_audio(folder), folder + "/folder.wav"]:
    try:
        x = data.load_audio(path)
        assert x.dtype == torch.float32 and x.ndim == 1 and len(x) and x.isfinite().all()
        read += 1
    except data.AudioError as error:
        assert error.path == path and "\\n" not in str(error), str(error)
        str(error).encode()
        refused += 1
print(read, refused)
"""


@linux
def test_a_thousand_damaged_files_harm_nothing(tmp_path, capfd):
    folder, out = tmp_path / "corpus", tmp_path / "out"
    folder.mkdir()
    make_corpus(folder, 1000)
    read, wrong, memory = python(CORPUS, folder)
    assert read > 100 and wrong > 100 and read + wrong == 1017 and memory < 500

    clips = open_clips(str(folder), 64)  # every clip: which files have something wrong with them?
    broken = set(clips.skipped)
    for k in range(len(clips)):
        try:
            clips.usable(k)
        except AudioError as error:
            broken.add(error.path)
    assert {f"{folder}/nan.wav", f"{folder}/pipe.wav"} <= broken and len(broken) > 100
    more = ["--epochs=1", "--batch-size=32", "--log-every=5", "--workers=1"]
    assert eat.main(flags(folder, out, *more, steps=None)) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if " so far; new: " in line]
    named = re.findall(rf"{folder}/(\S+) \(", " ".join(said))  # each once, when it is met
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
        torch.testing.assert_close(clips.read(k), whole[part])
        seen[part] = True
    assert seen.all()


@pytest.mark.parametrize("mark, end", [("", "\n"), ("\ufeff", "\r\n")], ids=["plain", "of Windows"])
def test_a_path_is_a_folder_a_file_or_a_list(mark, end, tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/none").mkdir()
    both = [str(tone(tmp_path / name)) for name in ("a.WAV", "deep/er/b.flac")]
    missing, folder = str(tmp_path / "missing.wav"), str(tmp_path)
    (tmp_path / "deep/up").symlink_to(tmp_path)  # in a circle
    (tmp_path / "twice").symlink_to(tmp_path / "deep")
    for name, lines in {
        "list.txt": ["a.WAV", "", "deep/er/b.flac", "missing.wav"], "none.txt": [],
        "train.tsv": [folder, "a.WAV\t32000", "deep/er/b.flac\t32000"],
    }.items():
        (tmp_path / name).write_bytes((mark + end.join([*lines, ""])).encode())
    for name, wanted in (("", both), ("a.WAV", both[:1]), ("list.txt", [*both, missing]),
                         ("train.tsv", both)):
        assert data.find_audio(str(tmp_path / name)) == wanted
    clips = open_clips(str(tmp_path / "list.txt"), 256)
    assert clips.paths == both and list(clips.skipped) == [missing]
    for name, says in (("no", "no such file"), ("deep/none", "no sound"), ("none.txt", "empty")):
        with pytest.raises(AudioError, match=says):
            data.find_audio(str(tmp_path / name))


def test_short_files_get_advice_that_fits(tmp_path, sounds, capsys):
    for k in range(5):
        tone(tmp_path / f"{k}.wav", seconds=0.7 if k < 4 else 30.0)
    assert eat.main(flags(tmp_path, tmp_path / "out", "--frames=256", steps=1)) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "half of the files" in x]
    assert line.startswith("data ") and "no longer than 0.70 s" in line
    assert line.endswith("try --frames 80")  # 68 windows in 0.7 s, and a multiple of 16
    for path, frames in ((tmp_path, 80), (sounds, 64)):
        assert open_clips(str(path), frames).remark == ""


def test_unusable_clips_give_way_to_the_next_and_are_named(tmp_path):
    for k in range(4):
        tone(tmp_path / f"{k}.wav", seconds=1, hertz=100 * (k + 1))
    write(tmp_path / "1.wav", np.full(16_000, 0.25))
    clips = open_clips(str(tmp_path), 128)
    (tmp_path / "2.wav").unlink()  # after the headers were read
    batch = clips.__getitems__([0, 1])
    torch.testing.assert_close(batch.waveforms[1, :16_000], clips.usable(3))
    assert batch.lengths.tolist() == [16_000] * 2 and batch.numbers.tolist() == [0, 3]
    assert {Path(path).name for path in batch.skipped} == {"1.wav", "2.wav"}
    assert batch.skipped[str(tmp_path / "1.wav")] == "silent"
    for k in (0, 3):
        (tmp_path / f"{k}.wav").unlink()
    batch = clips.__getitems__([0])
    assert len(batch.waveforms) == 0 and len(batch.skipped) == 4 and batch.wanted == 1


def test_measured_statistics_leave_the_padding_out(tmp_path):
    write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 20_000), kind="FLOAT")
    waveform = load_audio(tmp_path / "a.wav")
    x = fbank((waveform - waveform.mean())[None])
    found = data.measure_stats(open_clips(str(tmp_path), 1024))
    assert found == pytest.approx((x.mean().item(), x.std().item()), abs=1e-3)


def test_the_demo_is_made_from_its_seed():
    demo, same, other = (data.Demo(128, seed).read(5) for seed in (0, 0, 1))
    held_out = data.Demo(128, 0, held_out=True).read(5)
    assert torch.equal(demo, same) and demo.isfinite().all()
    assert not torch.equal(demo, other) and not torch.equal(demo, held_out)
    assert len(data.Demo.classes) >= 10


def test_the_demo_classes_do_not_differ_in_mean_spectrum():
    """Nearest neighbours on each mel band's mean power stay near chance (8 %), so features must see
    movement."""
    demo = data.Demo(256, seed=0, size=360, held_out=True)
    means = fbank(demo.__getitems__(range(360)).waveforms).exp().mean(1).log()
    labels = torch.as_tensor(demo.labels)
    scores = eat.nearest_neighbours(means[:240], F.one_hot(labels[:240]).float(), means[240:])
    assert (scores.argmax(1) == labels[240:]).float().mean() < 0.25


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


def test_a_pack_holds_what_the_files_hold(several, tmp_path, capsys):
    packed = pack(several, tmp_path / "pack")
    names = [packed.name(k) for k in range(6)]
    assert names == data.find_audio(str(several))
    whole = torch.from_numpy(soundfile.read(names[0], dtype="int16")[0])
    assert torch.equal(packed.read(0), whole)  # bit by bit
    for k in (1, 2, 5):
        sound = load_audio(names[k])
        within = 0.51 * max(1, sound.abs().max()) / 32768  # half a step of 16 bits of its peak
        torch.testing.assert_close(data.as_float(packed.read(k)), sound, atol=within, rtol=0)
    assert packed.read(1).dtype == torch.float32 and packed.read(2).dtype == torch.int16
    assert list(packed.skipped) == [names[3], names[4]]
    assert packed.lengths[3] == packed.lengths[4] == 0
    assert "skipped 2" in capsys.readouterr().out
    # A plain file of samples, for whoever wants one.
    flat = np.memmap(tmp_path / "pack/samples", "<i2", mode="r")
    assert len(flat) == packed.lengths.sum() and (flat[:50_000] == packed.read(0).numpy()).all()


def test_clips_of_a_pack_are_those_of_its_files(several, tmp_path):
    pack(several, tmp_path / "pack")
    clips, files = open_clips(str(tmp_path / "pack"), 128), open_clips(str(several), 128)
    assert len(clips) == len(files) == 6 and clips.skipped.keys() == files.skipped.keys()
    ours, theirs = clips.__getitems__([0, 1, 2, 5]), files.__getitems__([0, 1, 2, 5])
    assert ours.waveforms.dtype == torch.int16 and torch.equal(ours.lengths, theirs.lengths)
    # 16 kHz and 16 bits: the same sound.
    assert torch.equal(ours.waveforms[:3] / 32768, theirs.waveforms[:3])
    a, b = (spectrogram(x.waveforms[:3], x.lengths[:3], 128, -4.268, 4.569) for x in (ours, theirs))
    torch.testing.assert_close(a, b)
    # One of them is scaled, so all are floats.
    mixed, wanted = (x.__getitems__([0, 3]).waveforms for x in (clips, files))
    torch.testing.assert_close(mixed, wanted, atol=3 / 32768, rtol=0)


def test_a_pack_that_was_killed_is_packed_anew(several, tmp_path, monkeypatch, capsys):
    cut, kept = tmp_path / "cut", ("samples", "names", "index", "pack.json")
    pack(several, tmp_path / "whole")

    def killed(path, *arguments):
        if path > f"{several}/c":
            raise KeyboardInterrupt
        return load_audio(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(data, "load_audio", killed)
        assert data.main(["pack", str(several), str(cut), "--workers=0"]) == 130
    refused(eat.main, flags(cut, tmp_path / "out"), "no sound in it", capsys)
    for name in ("samples", "names", "index"):  # killed just before the end
        with open(cut / name, "ab") as file:
            file.write(b"more than there is")
    pack(several, cut)
    for name in kept:
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for folder in (cut, several):
        refused(data.main, ["pack", several, folder], "choose another folder", capsys)
    content = {name: (cut / name).read_bytes() for name in kept}
    for name, whole in content.items():  # parts that do not fit each other
        (cut / name).write_bytes(whole[:-8])
        with pytest.raises(AudioError, match="not a whole pack"):
            data.Pack(str(cut))
        (cut / name).write_bytes(whole)


def test_a_pack_that_breaks_costs_its_clips(several, tmp_path):
    pack(several, tmp_path / "pack")
    clips = open_clips(str(tmp_path / "pack"), 128)
    os.truncate(tmp_path / "pack/samples", 2 * 40_000)
    batch = clips.__getitems__([0, 5])
    assert batch.numbers.tolist() == [0, 0]
    assert "samples: ends before the index" in next(iter(batch.skipped.values()))


def test_training_on_a_pack_is_training_on_its_files(whole_run, sounds, tmp_path):
    pack(sounds, tmp_path / "pack")
    assert eat.main(flags(tmp_path / "pack", tmp_path / "out")) == 0
    assert_same_weights(tmp_path / "out", whole_run)


@linux
def test_two_million_packed_clips_take_little_memory(tmp_path):
    """A pack of 2,000,000 clips of 10 s, its samples a hole of 640 GB."""
    count = 2_000_000
    ends, rows = np.arange(1, count + 1), np.zeros(count, data.INDEX_ROW)
    rows["samples"], rows["name"], rows["unit"] = ends * 160_000, ends * 8, 1 / 32768
    rows.tofile(tmp_path / "index")
    np.char.mod("%08d", np.arange(count)).astype("S8").tofile(tmp_path / "names")
    about = {"root": "/sound", "source": "/sound", "files": count, "skipped": {}}
    (tmp_path / "pack.json").write_text(json.dumps(about))
    try:
        with open(tmp_path / "samples", "wb") as file:
            file.truncate(count * 320_000)
    except OSError:
        pytest.skip("no file of 640 GB here, not even one with a hole")
    (memory,) = python("""
clips = data.open_clips(sys.argv[1], 1024)
assert len(clips) == 2_000_000 and clips.name(1_234_567) == "/sound/01234567"
assert 0 <= next(data.shuffled(len(clips), 0, 3 * len(clips) + 7)) < 2_000_000
assert not clips.read(1_999_999).any()""", tmp_path)
    assert memory < 300


# ---- data.py: labelled data sets -----------------------------------------------------------------


def make_esc(folder, folds=(1, 2)):
    """ESC-50's layout: two classes, the first of them in ESC-10; two clips a class and fold, easy
    to tell apart."""
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


def test_esc_folders_have_folds(tmp_path):
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


def test_clips_of_esc_that_are_broken_missing_or_unlabelled(tmp_path):
    folder = make_esc(tmp_path / "esc")
    esc = labelled(folder)
    broken = esc.folds["fold 2"][0][-1].item()  # the last before the clips of the test fold
    Path(esc.clips.name(broken)).write_text("no sound")
    batch = esc.clips.__getitems__([broken - 1, broken])  # none of the other fold in its place
    assert batch.numbers.tolist() == [broken - 1] and len(batch.waveforms) == 1
    assert list(batch.skipped) == [esc.clips.name(broken)]
    os.remove(folder / "audio/1-1000-A-41.wav")
    tone(folder / "audio/stray.wav")
    esc = labelled(folder)
    says = ("1 labels have no clip.*1-1000-A-41.wav", "1 clips have no label.*stray.wav",
            "no clips of fold 3, 4, 5")
    assert len(esc.clips) == 7 and all(map(re.match, says, esc.notes)) and len(esc.notes) == 3


def test_speech_commands_has_its_lists(tmp_path):
    make_classes(tmp_path, bed=3, cat=3, _background_noise_=3)
    (tmp_path / "validation_list.txt").write_text("bed/0.wav\ncat/0.wav\n")
    (tmp_path / "testing_list.txt").write_text("bed/1.wav\ncat/1.wav\ncat/lost.wav\n")
    speech = labelled(tmp_path)
    assert (speech.kind, speech.classes) == ("Speech Commands", ["bed", "cat"])
    train, test = speech.folds["test list"]
    assert len(speech.clips) == 6 and "lost.wav" in speech.notes[0]
    assert (names(speech, train), names(speech, test)) == (["2.wav"] * 2, ["1.wav"] * 2)


def test_manifests_have_several_labels_a_clip(tmp_path):
    audioset = labelled(make_manifests(tmp_path / "as"))
    assert audioset.multi_label and audioset.classes == ["/m/a", "/m/b", "/m/c"]
    assert audioset.targets([2, 3]).tolist() == [[1, 0, 0], [1, 1, 0]]
    train, test = audioset.folds["eval"]
    assert (train.tolist(), test.tolist()) == ([0, 1, 2, 3], [4, 5])
    order = finetune.training_order(train, audioset, FineTune(weighted=True), seed=0)
    drawn = [next(order) for _ in range(20_000)]
    assert set(drawn) == {2, 3} and np.mean(np.equal(drawn, 3)) == pytest.approx(0.75, abs=0.02)


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
        with pytest.raises(AudioError) as error:
            labelled(tmp_path / name.split("/")[0])
        assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)
        path.write_bytes(before)
    assert len(labelled(tmp_path / "as").clips) == 6  # only the lists were at fault


def test_folders_of_classes_with_and_without_parts(tmp_path):
    for part in ("train", "test"):
        make_classes(tmp_path / "parts" / part, one=1, two=1)
    parts = labelled(tmp_path / "parts")
    assert parts.classes == ["one", "two"] and [len(x) for x in parts.folds["test"]] == [2, 2]
    make_classes(tmp_path / "flat", few=2, many=10)
    flat, again = (labelled(tmp_path / "flat", seed=1) for _ in range(2))
    ((train, test),), ((_, same),) = flat.folds.values(), again.folds.values()
    assert torch.equal(test, same) and flat.targets(test.tolist()).sum(0).tolist() == [1, 2]
    assert sorted(train.tolist() + test.tolist()) == list(range(12))


def test_what_is_no_labelled_data_set_says_so(tmp_path):
    tone(tmp_path / "a.wav")
    make_esc(tmp_path / "esc", folds=(2,))
    for path, says in (("", "no labelled data set"), ("no", "no such folder"), ("esc", "one fold")):
        with pytest.raises(AudioError, match=says):
            labelled(tmp_path / path)


# ---- finetune.py: metrics, augmentation, probes --------------------------------------------------


def test_average_precision_by_hand_with_ties_and_against_a_slow_version():
    scores = np.array([[0.9, 1], [0.8, 1], [0.7, 1], [0.6, 1]])
    by_hand = average_precision(scores, np.array([[1, 1], [0, 0], [1, 0], [0, 0]]))
    assert by_hand.tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 4])  # all equal: the share
    assert np.isnan(average_precision(np.ones((3, 1)), np.zeros((3, 1)))[0])
    rng = np.random.default_rng(0)
    scores, targets = rng.integers(0, 6, (50, 20)) / 5, rng.random((50, 20)) < 0.2
    for k, found in enumerate(average_precision(scores, targets)):
        # Of each positive, the share of positives among all clips that score no lower.
        slow = [np.mean(targets[scores[:, k] >= score, k]) for score in scores[targets[:, k], k]]
        assert found == pytest.approx(np.mean(slow))


def test_results_leave_out_classes_without_positives_and_say_so():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5]])
    targets = torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    result = finetune.evaluate(scores, targets, ["a", "b", "c"], multi_label=True)
    assert result["value"] == 1.0 and result["per_class"]["c"] is None
    assert "1 classes have no positive" in result["note"]
    targets = torch.tensor([[1.0, 0, 0], [1, 0, 0]])
    result = finetune.evaluate(scores, targets, ["a", "b", "c"], multi_label=False)
    assert result["value"] == 0.5 and result["confusion"] == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert result["per_class"] == {"a": 0.5, "b": None, "c": None}


def test_layers_learn_at_the_rates_of_the_formula():
    model = Classifier(Encoder(small(depth=3)), ["a", "b"], drop_path=0.1)
    found = {id(p): (group["scale"], group["weight_decay"])
             for group in finetune.make_optimizer(model, FineTune()).param_groups
             for p in group["params"]}
    for name, p in model.named_parameters():
        want = 0.65 ** (3 - int(name.split(".")[2])) if ".blocks." in name else 1.0
        assert found[id(p)] == (pytest.approx(want), 0.05 if p.ndim > 1 else 0.0), name
    assert [block.drop_path for block in model.encoder.blocks] == pytest.approx([0, 0.05, 0.1])
    rates = [FineTune(steps=100).learning_rate(n) for n in (1, 10, 55, 100)]
    assert rates == pytest.approx([5e-6, 5e-5, (5e-5 + 1e-6) / 2, 1e-6])


def test_drop_path_skips_whole_clips_and_keeps_the_mean():
    block = eat.Block(small())
    block.drop_path = 0.25
    x = block.dropped(torch.ones(4000, 3, 2))
    assert x.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (x == x[:, :1, :1]).all() and x.mean().item() == pytest.approx(1, abs=0.05)
    assert (block.eval().dropped(torch.ones(4, 3, 2)) == 1).all()


def test_mixup_is_one_lambda_with_the_flipped_batch():
    x, targets = torch.randn(4, 1, 16, 128), torch.eye(4)
    mixed, labels = finetune.mixup(x, targets, 0.8, np.random.default_rng(0))
    share = np.random.default_rng(0).beta(0.8, 0.8)
    torch.testing.assert_close(mixed, share * x + (1 - share) * x[[3, 2, 1, 0]])
    torch.testing.assert_close(labels, share * targets + (1 - share) * targets[[3, 2, 1, 0]])


def check_bands(masked, ratio):
    """`masked` (clips, T, 128) is one band of mel bins and one of frames a clip, up to `ratio`."""
    bins, frames = masked.all(1), masked.all(2)
    assert (masked == (bins[:, None] | frames[:, :, None])).all()
    for band in (bins, frames):
        assert (F.pad(band.int(), (1, 1)).diff(dim=1).abs().sum(1) <= 2).all()  # one piece
        widths, most = band.sum(1).float(), ratio * band.shape[1]
        assert 0.9 * most < widths.max() <= most + 1
        assert widths.mean().item() == pytest.approx((most - 1) / 2, rel=0.15)


def test_spec_augment_masks_one_band_and_one_stretch_a_clip():
    masked = finetune.spec_augment(torch.ones(200, 1, 64, 128), 0.4, 0)[:, 0] == 0
    check_bands(masked, 0.4)
    assert not (masked[0] == masked[1]).all()


def test_the_noise_of_speech_commands_comes_before_the_masks():
    recipe = FineTune(**{**finetune.RECIPES["spc2"], "spec_augment": 0.4})
    sound = torch.randn(200, 10_480), torch.full((200,), 10_480), torch.eye(200)
    x, _ = finetune.augmented(*sound, small(), recipe, np.random.default_rng(0))
    check_bands(x[:, 0] == 0, 0.4)  # exactly 0


def test_roll_and_gain_move_each_clip_within_itself():
    sound = torch.arange(1.0, 7)
    waveforms = F.pad(sound, (0, 4)).expand(50, -1)
    lengths = torch.full((50,), 6)
    rolled = finetune.roll_and_gain(waveforms, lengths, np.random.default_rng(1))
    assert (rolled[:, 6:] == 0).all()
    gain = rolled.sum(1, keepdim=True) / 21
    assert 0.5 < gain.min() < gain.max() < 1.5 and len(gain.unique()) > 40
    shifts = (rolled[:, :6] / gain).argmin(1)
    for row, shift in zip(rolled[:, :6] / gain, shifts.tolist()):
        torch.testing.assert_close(row, sound.roll(shift))
    assert len(shifts.unique()) == 6


def test_noise_is_small_and_frames_roll_by_minus_ten_to_nine():
    x = torch.zeros(200, 1, 64, 128)
    x[:, :, 30] = 10
    y = finetune.add_noise_and_roll(x, np.random.default_rng(0))[:, 0]
    moved = y.mean(2).argmax(1) - 30
    assert moved.unique().tolist() == list(range(-10, 10))
    heights = y.sort(1).values[:, :-1].amax((1, 2))  # without the loud frame
    assert 0 <= y.min() and 0.09 < heights.max() < 0.1 and heights.min() < 0.01


def blobs(clips, features, noise, seed=0):
    """Three classes, a clip each in turn, that one feature tells apart."""
    torch.manual_seed(seed)
    x, labels = noise * torch.randn(clips, features), torch.arange(clips) % 3
    x[:, 0] += labels
    return x, F.one_hot(labels).float()


@pytest.mark.parametrize("clips, features, multi_label", [(60, 5, False), (30, 90, False),
                                                          (30, 90, True)])
def test_the_linear_probe_reaches_the_optimum(clips, features, multi_label):
    """That of L-BFGS in float64 on the standardised features as they are."""
    x, targets = blobs(clips, features, 1.0)
    z = ((x - x.mean(0)) / x.std(0)).double()
    weight = torch.zeros(features, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=2000, tolerance_grad=1e-9,
                               tolerance_change=1e-12, line_search_fn="strong_wolfe")
    loss = F.binary_cross_entropy_with_logits if multi_label else F.cross_entropy

    def closure():
        solver.zero_grad()
        total = loss(z @ weight + bias, targets.double(), reduction="sum")
        total = total + 3.0 / 2 * weight.square().sum()
        total.backward()
        return total

    solver.step(closure)
    found, l2 = finetune.linear_scores(x, targets, x, 3.0, multi_label)
    assert l2 == 3.0
    torch.testing.assert_close(found, (z @ weight + bias).detach(), atol=2e-4, rtol=1e-3)


def test_the_linear_probe_chooses_its_penalty_on_training_clips():
    """Of noisy clips one that is far above 1, and better on others."""
    (x, targets), (others, right) = blobs(120, 200, 1.0), blobs(600, 200, 1.0, seed=1)
    accuracy = {}
    for asked in (None, 1.0):
        scores, l2 = finetune.linear_scores(x, targets, others, asked, False)
        accuracy[l2] = (scores.argmax(1) == right.argmax(1)).float().mean().item()
    chosen = max(accuracy)
    assert chosen in (10.0, 100.0, 1000.0) and accuracy[chosen] > accuracy[1.0]


@pytest.fixture(scope="module")
def esc(tmp_path_factory):
    return make_esc(tmp_path_factory.mktemp("labelled") / "esc")


def test_mel_statistics_leave_the_padding_out(esc):
    clips = data.open_labelled(str(esc), 128).clips  # 0.7 s in clips of 1.28 s
    found, _ = eat.features(None, small(frames=128), clips, [3], cpu(), finetune.mel_statistics)
    x = fbank(clips.usable(3)[None])[0]  # 68 frames, in 5 time steps of 16
    x = (F.pad(x, (0, 0, 0, 80 - 68)) + 4.268) / (2 * 4.569)
    want = torch.cat([x.mean(0), x.std(0, unbiased=False)])
    torch.testing.assert_close(found["no network"][0], want, atol=1e-4, rtol=1e-4)


# ---- finetune.py: runs ---------------------------------------------------------------------------

FINE = ["--steps=2", "--batch-size=4", "--log-every=1", "--frames=64", *CPU_FLAGS]


def fine(dataset, out, *more):
    return finetune.main([f"--data={dataset}", f"--out={out}", *FINE, *more])


def results(out, part="results"):
    return json.loads((Path(out) / "results.json").read_text())[part]


@pytest.fixture(scope="module")
def start_from(whole_run):
    return f"--checkpoint={whole_run}/last.pt"


@pytest.mark.parametrize("recipe", list(finetune.RECIPES))
def test_every_recipe_trains_and_tests(recipe, start_from, esc, tmp_path):
    manifests, out = recipe.startswith("as"), tmp_path / "out"
    dataset = make_manifests(tmp_path / "as", weights=recipe == "as2m") if manifests else esc
    reading = "patches" if recipe == "small" else "CLS"
    assert fine(dataset, out, f"--recipe={recipe}", f"--reading={reading}", start_from) == 0
    used, row = results(out, "recipe"), finetune.RECIPES[recipe]
    assert all(used[k] == v for k, v in row.items() if k not in ("steps", "batch_size", "frames"))
    for result in results(out)["fine-tuned"].values():
        assert 0 <= result["value"] <= 1 and len(result["per_class"]) == (3 if manifests else 2)
    assert (out / "confusion.png").exists() != manifests
    assert finetune.load_classifier(out / "last.pt").reading == reading


def test_fine_tuning_learns_and_the_classifier_predicts(esc, start_from, tmp_path, capsys):
    out, names = tmp_path / "out", tmp_path / "labels.csv"
    more = ["--steps=60", "--lr=3e-3", "--layer-decay=1", "--fold=1"]
    assert fine(esc, out, start_from, *more) == 0
    assert "fold 1: accuracy 100.0%" in capsys.readouterr().out
    clip = str(esc / "audio/1-1000-A-41.wav")

    def predict(path, *more):
        where = [f"--checkpoint={out}/last.pt", *CPU_FLAGS]
        assert finetune.main(["predict", str(path), *where, *more]) == 0
        return capsys.readouterr().out

    (row,) = json.loads(predict(clip, "--json"))
    assert (row["clip"], row["start"], row["end"]) == (clip, 0, 0.7)
    assert row["labels"][0]["label"] == "chainsaw"
    assert sum(label["probability"] for label in row["labels"]) == pytest.approx(1, abs=1e-3)
    said = predict(esc, "--top=1")
    assert said.count("%  chainsaw") == said.count("%  rooster") == 4
    table = "index,mid,display_name\n1,/m/b,Saw\n0,/m/a,\"Bird, big\"\n"
    for content in (table, "Bird, big\nSaw\n", "\ufeffBird, big\r\nSaw\r\n"):
        names.write_bytes(content.encode())
        said = predict(clip, f"--labels={names}")
        assert said.index("%  Saw") < said.index("%  Bird, big")
    names.write_text("Saw")
    refused(finetune.main, ["predict", clip, f"--checkpoint={out}/last.pt", f"--labels={names}"],
            "1 names for 2 classes", capsys)

    # A saw, then a bird: what holds in each 0.5 s of them.
    parts = [load_audio(esc / f"audio/1-1000-A-{target}.wav") for target in (41, 7)]
    write(tmp_path / "both.wav", torch.cat(parts).numpy())
    rows = json.loads(predict(tmp_path / "both.wav", "--json", "--every=0.5"))
    assert [(row["start"], row["end"]) for row in rows] == [(0, 0.5), (0.5, 1.0), (1.0, 1.4)]
    found = [row["labels"][0]["label"] for row in rows]
    assert (found[0], found[2]) == ("chainsaw", "rooster")
    assert "0.50 to 1.00 s" in predict(tmp_path / "both.wav", "--every=0.5")

    model, x = finetune.load_classifier(out / "last.pt"), torch.ones(1, 1, 64, 128)
    for target, close in (("hf", {}), ("one.safetensors", dict(atol=0.02, rtol=0.02))):
        assert eat.main(["export", str(out / "last.pt"), str(tmp_path / target)]) == 0
        back = finetune.load_classifier(tmp_path / target)
        assert (back.classes, back.multi_label) == (["rooster", "chainsaw"], False)
        assert back.encoder.config.mean == -6.627
        torch.testing.assert_close(back(x), model(x), **close)
    encoder = eat.load_encoder(out / "last.pt")
    torch.testing.assert_close(encoder.state_dict(), model.encoder.state_dict())


@linux
@pytest.mark.parametrize("number, status", [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_fine_tuning_that_is_stopped_resumes_exactly(number, status, esc, start_from, tmp_path,
                                                     capsys):
    """In its second fold, which then starts again; the first is kept. And only as it began."""
    cut, whole, other = tmp_path / "cut", tmp_path / "whole", tmp_path / "other.pt"
    assert fine(esc, whole, start_from, "--steps=12") == 0
    run = [f"--data={esc}", f"--out={cut}", *FINE, start_from, "--steps=12"]
    process = start("finetune.py", *run, "--workers=2")
    wait_for_step(process, cut, 14)
    process.send_signal(number)
    end_of(process, status, "--resume" if status > 0 else "fold 1")
    assert_none_left(cut)
    torch.manual_seed(1)
    model = {f"student.{name}": x for name, x in Encoder(small()).state_dict().items()}
    torch.save({"config": vars(small()), "model": model}, other)
    for more, says in ((f"--checkpoint={other}", "not the encoder"), ("--lr=0.5", "--lr 0.5")):
        refused(finetune.main, [*run, "--resume", more], says, capsys)
    assert finetune.main([*run, "--resume"]) == 0
    assert_same_weights(cut, whole)
    logs = [[(line["fold"], line["step"], line["loss"]) for line in logged(out)]
            for out in (cut, whole)]
    assert results(cut) == results(whole) and logs[0] == logs[1] and len(logs[0]) == 24


@slow
def test_ten_kills_of_fine_tuning_change_nothing(esc, start_from, tmp_path):
    run, cut = [start_from, "--steps=150"], tmp_path / "cut"
    command = ["finetune.py", f"--data={esc}", f"--out={cut}", *FINE, *run, "--resume"]
    kill_at_random(command, cut, 10, in_writes=False)
    assert fine(esc, cut, *run, "--resume") == 0 and fine(esc, tmp_path / "whole", *run) == 0
    assert_same_weights(cut, tmp_path / "whole")
    assert results(cut) == results(tmp_path / "whole")


def test_a_poisoned_batch_costs_fine_tuning_its_step(start_from, tmp_path):
    folder, out = make_esc(tmp_path / "esc"), tmp_path / "out"
    make_too_loud(folder / "audio/1-1000-A-41.wav")
    assert fine(folder, out, start_from, "--steps=4", "--batch-size=2") == 0
    lines = logged(out)
    assert 1 <= sum(line["not_finite"] for line in lines) < 8
    assert all((line["loss"] is None) == (line["not_finite"] == 1) for line in lines)
    assert all(x.isfinite().all() for x in weights(out)[1].values())


@pytest.mark.parametrize("mode", ["linear", "knn"])
def test_frozen_features_are_probed(mode, esc, start_from, tmp_path, capsys):
    more = [f"--mode={mode}", "--neighbours=1"]
    assert fine(esc, tmp_path / "out", start_from, *more) == 0
    found = results(tmp_path / "out")
    assert found.keys() == {"patches", "CLS", "mean of patches", "no network",
                            "random weights, patches"}
    for fold in found["no network"].values():
        assert fold["value"] == 1.0  # two tones far apart
        assert fold["l2"] == (1.0 if mode == "linear" else None)
    assert "over 2 folds" in capsys.readouterr().out


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
    for k, length in enumerate((2880, 4800, 10_240, 10_480, 48_000)):
        write(tmp_path / f"{k}.wav", 0.1 * torch.randn(length).numpy(), kind="FLOAT")
    (tmp_path / "zz.wav").write_text("no sound")
    where, found = [str(tmp_path), start_from, f"--out={tmp_path}/new/x", *CPU_FLAGS], []
    for more in ([], ["--frames"]):
        assert finetune.main(["embed", *where, *more]) == 0
        found.append(dict(np.load(tmp_path / "new/x.npz")))
        assert [Path(path).name for path in found[-1]["paths"]] == [f"{k}.wav" for k in range(5)]
    files, rows = found
    encoder = eat.load_encoder(start_from.removeprefix("--checkpoint="))
    for k in range(5):
        wave, readings, seconds = load_audio(tmp_path / f"{k}.wav"), [], []
        windows = [wave[a : a + 10_480] for a in range(0, len(wave), 10_240)]
        windows = [window for window in windows if len(window) >= 400]
        for number, window in enumerate(windows):
            steps = math.ceil(((len(window) - 400) // 160 + 1) / 16)
            seconds.extend(0.64 * number + 0.16 * np.arange(steps))
            c, length = encoder.config, torch.tensor([len(window)])
            x = spectrogram(window[None], length, steps * 16, c.mean, c.std)
            readings.append(slow_reading(encoder, x))
        for name in readings[0]:
            want = np.average([x[name] for x in readings], axis=0, weights=list(map(len, windows)))
            np.testing.assert_allclose(files[name.replace(" ", "_")][k], want, atol=1e-5)
        mine = rows["path_index"] == k
        np.testing.assert_allclose(rows["seconds"][mine], seconds, atol=1e-6)
        if len(windows) == 1:  # the mean of its rows is the first half of the reading
            mean = rows["features"][mine].mean(0)
            np.testing.assert_allclose(mean, files["patches"][k][: 8 * 32], atol=1e-5)


def test_packed_sound_gives_the_same_results(esc, start_from, tmp_path):
    pack(esc, tmp_path / "pack")
    found, features = [], []
    for path, out in ((esc, tmp_path / "files"), (tmp_path / "pack", tmp_path / "packed")):
        assert fine(path, out, start_from) == 0
        assert fine(path, f"{out}-knn", start_from, "--mode=knn") == 0
        found.append([results(out), results(f"{out}-knn")])
        embed = ["embed", str(path), start_from, f"--out={out}.npz", "--workers=1", "--device=cpu"]
        assert finetune.main(embed) == 0
        features.append(dict(np.load(f"{out}.npz")))
    assert found[0] == found[1]
    assert_same_weights(tmp_path / "files", tmp_path / "packed")
    for name in features[0]:
        np.testing.assert_array_equal(features[0][name], features[1][name])


@real_sound
def test_esc10_is_recognised():
    esc10 = data.open_labelled(str(SHARED / "data/esc10"), 512)
    assert (esc10.kind, len(esc10.clips), len(esc10.classes)) == ("ESC-10", 400, 10)
    assert [(len(train), len(test)) for train, test in esc10.folds.values()] == [(320, 80)] * 5


# ---- Pictures ------------------------------------------------------------------------------------


def test_look_draws_a_clip_and_what_an_encoder_makes_of_it(start_from, tmp_path):
    clip, out = str(tone(tmp_path / "a.wav")), tmp_path / "look.png"
    for more in ([], [start_from]):
        assert finetune.main(["look", clip, f"--out={out}", *more]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
        out.unlink()
    axes = Figure().subplots()  # with hertz where they are
    finetune.draw_spectrogram(axes, np.zeros((128, 100)), "", labels=True)
    size = 128, 512, 16_000, 20.0, 0.0, 100.0, -500.0, 1.0
    centres = torchaudio.compliance.kaldi.get_mel_banks(*size)[1].flatten()
    # Bin k is drawn from k to k + 1.
    want = np.interp([125, 500, 1000, 2000, 4000], centres, np.arange(128) + 0.5)
    assert axes.get_yticks() == pytest.approx(want, abs=0.05)


@torch.no_grad()
def test_look_knows_where_CLS_attends(start_from):
    encoder = eat.load_encoder(start_from.removeprefix("--checkpoint="))
    x, attention = torch.randn(1, 1, 64, 128), encoder.blocks[-1].attn
    found = finetune.cls_attention(encoder, x)
    assert found.shape == (32,) and 0 < found.sum() < 1  # the rest is CLS's attention to itself
    # Heads whose keys are all alike attend to all of the 33 tokens alike.
    attention.qkv.weight[32:64], attention.qkv.bias[32:64] = 0, 0
    torch.testing.assert_close(finetune.cls_attention(encoder, x), torch.full((32,), 1 / 33))


def test_plot_draws_the_learning_curves(whole_run, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    more = b'{"step": 9, "loss": null}\n{"step": 9, "knn_patches": 0.5}\n{"step"'
    log.write_bytes((whole_run / "log.jsonl").read_bytes() + more)
    assert eat.main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")
    log.write_text("")
    refused(eat.main, ["plot", tmp_path], "nothing in it yet", capsys)


# ---- Whatever ends a run, it ends; nothing is lost or mixed up in silence ------------------------

# Every case is a process of its own, forked from one that has imported everything. Its hook puts
# something in the way of it: `at` does it when a function is called for the `count`th time.
DRIVER = '''
import json, os, shutil, signal, sys
import data, eat, finetune

def at(owner, name, count, act):
    original, calls = getattr(owner, name), []
    def patched(*arguments, **more):
        calls.append(name)
        if len(calls) == count:
            act()
        return original(*arguments, **more)
    setattr(owner, name, patched)

def fail():
    raise ZeroDivisionError("injected")

def send(number):
    return lambda: os.kill(os.getpid(), number)

def rival():
    if not os.fork():
        os._exit(program.main(arguments) + 100)
    print("the rival:", os.waitstatus_to_exitcode(os.wait()[1]) - 100, flush=True)

children = []
for k, (hook, program, arguments) in enumerate(json.loads(sys.argv[2])):
    children.append(os.fork())
    if not children[-1]:
        said = os.open(f"{sys.argv[1]}/said{k}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        signal.alarm(45)  # what hangs is killed by it
        program = {"eat": eat, "data": data, "finetune": finetune}[program]
        exec(hook)
        sys.exit(program.main(arguments))
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
'''


def driven(folder, *cases):
    """Processes for some cases (hook, program, arguments) -> (exit status, what it said) of each.
    None of their workers may be left behind."""
    process = start("-c", DRIVER, str(folder), json.dumps(cases))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert_none_left(folder)
    texts = [(folder / f"said{k}").read_text() for k in range(len(cases))]
    return list(zip(json.loads(said.splitlines()[-1]), texts))


def some_files(folder, count, seconds=0.2):
    folder.mkdir()
    for k in range(count):
        tone(folder / f"{k:03}.wav", 16_000, seconds, 300 + 10 * k)
    return folder


@linux
def test_an_error_anywhere_ends_the_process_and_its_workers(sounds, esc, whole_run, tmp_path):
    def run(name):
        return flags(sounds, tmp_path / name, "--workers=2", "--stats=audioset")

    encoder, sure = f"--checkpoint={whole_run / 'last.pt'}", ["--device=cpu", "--workers=2"]
    tuned = [f"--data={esc}", encoder, *FINE, "--workers=2"]
    cases = {
        "the loop": ["eat.EAT, 'update_teacher', 3", "eat", run("loop")],
        "spectrograms": ["eat, 'spectrogram', 3", "eat", run("spectrograms")],
        "a worker": ["data.AudioFiles, 'read', 3", "eat", run("worker")],
        "a probe": ["eat, 'nearest_neighbours', 3", "eat",
                    [*run("probe"), f"--probe={esc}", "--probe-every=2"]],
        "fit": ["finetune, 'augmented', 2", "finetune", [*tuned, f"--out={tmp_path}/fit"]],
        "a test": ["eat, 'spectrogram', 1", "finetune", [*tuned, f"--out={tmp_path}/test"]],
        "embed": ["eat, 'spectrogram', 1", "finetune",
                  ["embed", str(esc), encoder, f"--out={tmp_path}/x.npz", *sure]],
        "pack": ["data, 'load_audio', 3", "data",
                 ["pack", str(sounds), f"{tmp_path}/packed", "--workers=2"]],
    }
    found = driven(tmp_path, *([f"at({hook}, fail)", *more] for hook, *more in cases.values()))
    wrong = {name: (status, said[-300:]) for name, (status, said) in zip(cases, found)
             if status != 1 or "ZeroDivisionError: " not in said or "injected" not in said}
    assert not wrong


def test_an_error_s_traceback_keeps_no_worker(sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(EAT, "update_teacher", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        eat.main(flags(sounds, tmp_path, "--workers=2"))
    assert error.tb and not multiprocessing.active_children()


@linux
def test_what_goes_wrong_during_a_run_is_one_line(sounds, esc, tmp_path):
    for name in ("deleted", "probe"):
        shutil.copytree(esc if name == "probe" else sounds, tmp_path / name)
    (tmp_path / "gone").mkdir()

    def run(name, *more, data=sounds):
        return flags(data, tmp_path / "out" / name, "--workers=2", "--stats=audioset",
                     *more)

    def moved(name):
        return f"lambda: os.rename('{tmp_path}/{name}', '{tmp_path}/gone/{name.split('/')[-1]}')"

    def third(act):
        return f"at(eat.EAT, 'update_teacher', 3, {act})"

    out = tmp_path / "out" / "file"
    a_file = f"lambda: (shutil.rmtree('{out}'), open('{out}', 'w').close())"
    found = driven(
        tmp_path,
        ["", "eat", run("collapse", "--collapse-std=5")],
        [third(moved("deleted")), "eat",
         run("deleted", "--steps=100000", data=tmp_path / "deleted")],
        [third(a_file), "eat", run("file")],
        ["at(data.AudioFiles, 'read', 9, send(9))", "eat", run("killed")],
        ["at(data, 'load_audio', 3, send(9))", "data",
         ["pack", str(sounds), f"{tmp_path}/packed", "--workers=2"]],
        [third(moved("probe")), "eat", run("probed", f"--probe={tmp_path}/probe")],
    )
    for (status, said), (expected, words) in zip(found, (
        (1, "eat.py: stopped at step 1: collapsed"), (2, "no clip can be used any more"),
        (1, "eat.py: could not save to"), (1, "Run it again"), (1, "Run it again"),
        (2, "no clip can be read"),
    )):
        told = [line for line in said.splitlines() if words in line]
        assert status == expected and len(told) == 1 and "Traceback" not in said, said
    steps = logged(tmp_path / "out" / "deleted")[-1]["step"]
    assert weights(tmp_path / "out" / "deleted")[0] == steps >= 3
    assert weights(tmp_path / "out" / "probed")[0] == 8  # nothing computed is lost


@linux
def test_a_signal_at_any_moment_saves_and_a_run_resumes_exactly(sounds, whole_run, tmp_path):
    """A lost terminal, and one under nohup; told to stop, and killed, amid the writing of the
    second checkpoint; killed between its two renames."""
    outs = [tmp_path / str(k) for k in range(5)]
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    lost = "at(eat.EAT, 'update_teacher', 3, send(signal.SIGHUP))"
    hooks = [lost, ignored + lost, "at(os, 'fsync', 2, send(signal.SIGTERM))",
             "at(os, 'fsync', 2, send(9))", "at(os, 'replace', 3, send(9))"]
    found = driven(tmp_path, *([hook, "eat", flags(sounds, out, "--workers=1", "--save-every=3")]
                               for hook, out in zip(hooks, outs)))
    assert [status for status, _ in found] == [129, 0, 143, -9, -9], found
    assert not any("Traceback" in said for _, said in found)
    assert [weights(out)[0] for out in outs[:4]] == [3, 8, 7, 3]
    assert os.path.exists(outs[3] / "last.pt.part") and not os.path.exists(outs[4] / "last.pt")
    for out in outs:  # the lock of a killed process is no obstacle
        assert os.path.exists(out / "lock")
        assert eat.main(flags(sounds, out, "--resume")) == 0 and same_runs(out, whole_run)
        assert [line["step"] for line in logged(out)] == list(range(1, 9))


@linux
def test_a_signal_to_all_processes_of_a_run_stops_the_main_one_alone(sounds, tmp_path):
    """Workers end by a SIGTERM of their parent's only: what they read is not lost."""
    process = start("-c", "import os, sys, eat; os.setsid(); sys.exit(eat.main(sys.argv[1:]))",
                    *flags(sounds, tmp_path, "--workers=2", "--steps=100000"))
    wait_for_step(process, tmp_path, 2)
    for worker in set(processes(tmp_path)) - {process.pid}:
        os.kill(worker, signal.SIGTERM)
    wait_for_step(process, tmp_path, logged(tmp_path)[-1]["step"] + 20)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume" in said and "Traceback" not in said, said
    assert weights(tmp_path)[0] == logged(tmp_path)[-1]["step"]
    assert_none_left(tmp_path)


@linux
@full_disk
def test_a_run_goes_on_without_its_output(sounds, whole_run, tmp_path):
    python = f"{sys.executable} eat.py"
    ways = [f"set -o pipefail; {python} $0 $@ | head -1", f"{python} $0 $@ > /dev/full 2>&1",
            f"{python} $0 $@ 2>&-", f"{python} $0 $@ >&- 2>&-"]
    started = [subprocess.Popen(["bash", "-c", way, *flags(sounds, tmp_path / str(k))], cwd=HERE,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
               for k, way in enumerate(ways)]
    for k, process in enumerate(started):
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "rror" not in said, said
        assert same_runs(tmp_path / str(k), whole_run)


def test_fine_tuning_saves_a_fold_before_it_speaks_of_it(esc, whole_run, tmp_path, monkeypatch):
    def silent(*texts, **_):
        if texts[0].startswith("fold 1"):
            raise BrokenPipeError("nobody listens")

    monkeypatch.setattr("builtins.print", silent)
    assert fine(esc, tmp_path, f"--checkpoint={whole_run / 'last.pt'}") == 1
    assert list(torch.load(tmp_path / "last.pt")["done"]) == ["fold 1"]


@linux
def test_only_one_process_writes_into_a_folder(sounds, whole_run, tmp_path):
    out, packed, alone = (tmp_path / name for name in ("out", "packed", "alone"))
    files = some_files(tmp_path / "files", 20)
    assert data.main(["pack", str(files), str(alone), "--workers=0"]) == 0
    found = driven(
        tmp_path,
        ["at(eat.EAT, 'update_teacher', 3, rival)", "eat", flags(sounds, out)],
        ["at(data, 'load_audio', 5, rival)", "data",
         ["pack", str(files), str(packed), "--workers=0"]],
    )
    for (status, said), folder in zip(found, (out, packed)):
        pid = (folder / "lock").read_text()
        refusal = [line for line in said.splitlines() if "is writing into it" in line]
        assert status == 0 and "the rival: 2" in said and "Traceback" not in said, said
        assert len(refusal) == 1 and f"{folder}: process {pid} " in refusal[0]
    assert same_runs(out, whole_run)
    for name in ("samples", "names", "index"):
        assert (packed / name).read_bytes() == (alone / name).read_bytes()


@pytest.mark.parametrize("part, change", [
    ("index", lambda old: old[:-24]), ("samples", lambda old: old + b"\0\0"),
    ("names", lambda old: old[1:]), ("index", lambda old: old[24:48] + old[:24] + old[48:]),
    ("pack.json", lambda old: old.replace(b'"files": 4', b'"files": 5')),
], ids=["a row less", "more samples", "names cut", "rows swapped", "another count"])
def test_a_pack_whose_parts_do_not_fit_is_refused(part, change, tmp_path, capsys):
    files, packed = some_files(tmp_path / "files", 4, seconds=0.7), tmp_path / "packed"
    assert data.main(["pack", str(files), str(packed), "--workers=0"]) == 0
    (packed / part).write_bytes(change((packed / part).read_bytes()))
    capsys.readouterr()
    assert eat.main(flags(packed, tmp_path / "out", "--batch-size=2")) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "not a whole pack" in said[0] and "pack the sound again" in said[0]


def test_all_folds_start_from_one_reading_of_the_checkpoint(esc, whole_run, sounds, tmp_path,
                                                            monkeypatch, capsys):
    """It is replaced between the folds. A run that goes on with another one is refused."""
    other, used = tmp_path / "other", tmp_path / "used.pt"
    assert eat.main(flags(sounds, other, "--steps=1", "--seed=7")) == 0
    shutil.copy(whole_run / "last.pt", used)
    tuned = [f"--checkpoint={used}", "--seed=3"]
    assert fine(esc, tmp_path / "whole", *tuned) == 0
    original, results = finetune.evaluate, {}

    def replaced(*arguments):
        shutil.copy(other / "last.pt", used)
        results["first fold"] = results.get("first fold") or original(*arguments)
        return original(*arguments)

    monkeypatch.setattr(finetune, "evaluate", replaced)
    assert fine(esc, tmp_path / "replaced", *tuned) == 0
    a, b = (torch.load(tmp_path / name / "last.pt") for name in ("whole", "replaced"))
    assert a["done"] == b["done"]
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    capsys.readouterr()
    assert fine(esc, tmp_path / "replaced", *tuned, "--resume") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "not the encoder that the run in" in said[0]


@linux
def test_a_signal_between_folds_costs_nothing(esc, whole_run, tmp_path):
    """While the first fold is tested: it is saved, and the second begins when the run goes on."""
    tuned = [f"--data={esc}", f"--checkpoint={whole_run / 'last.pt'}", *FINE, "--workers=1"]
    (status, said), (whole, _) = driven(
        tmp_path,
        ["at(finetune, 'evaluate', 1, send(signal.SIGTERM))", "finetune",
         [*tuned, f"--out={tmp_path}/out"]],
        ["", "finetune", [*tuned, f"--out={tmp_path}/whole"]],
    )
    assert (status, whole) == (143, 0) and "--resume" in said and "Traceback" not in said, said
    assert list(torch.load(tmp_path / "out" / "last.pt")["done"]) == ["fold 1"]
    assert not (tmp_path / "out" / "results.json").exists()
    assert finetune.main([*tuned, f"--out={tmp_path}/out", "--resume"]) == 0
    a, b = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("out", "whole"))
    assert a["results"] == b["results"] and len(a["results"]["fine-tuned"]) == 2


@pytest.mark.parametrize("mode", ["finetune", "linear", "knn", "shots", "probe"])
def test_nothing_to_test_on_is_one_line_before_any_training(mode, sounds, whole_run, tmp_path,
                                                            capsys):
    dataset, out = make_esc(tmp_path / "esc"), tmp_path / "out"
    for path in (dataset / "audio").glob("1-*"):
        path.write_text("no sound")
    how = ["--mode=linear", "--shots=1"] if mode == "shots" else [f"--mode={mode}"]
    if mode == "probe":  # of pre-training
        assert eat.main(flags(sounds, out, f"--probe={dataset}")) == 2
    else:
        assert fine(dataset, out, f"--checkpoint={whole_run / 'last.pt'}", "--fold=1", *how) == 2
    said = capsys.readouterr()
    line = said.err.strip().splitlines()[-1]
    assert ".py: " in line and "1-1000-A-41.wav" in line
    assert "nan" not in said.out.lower() and "Traceback" not in said.err
    assert not (out / "results.json").exists() and not (out / "log.jsonl").exists()


@pytest.mark.parametrize("main, way", [(eat.main, "fine-tuned"), (finetune.main, "pre-trained")])
def test_a_run_of_the_other_program_is_not_resumed(main, way, sounds, esc, whole_run, tmp_path,
                                                   capsys):
    if way == "fine-tuned":
        assert fine(esc, tmp_path, f"--checkpoint={whole_run / 'last.pt'}", "--fold=1") == 0
    else:
        shutil.copy(whole_run / "last.pt", tmp_path)
    capsys.readouterr()
    assert main([f"--data={esc}", f"--out={tmp_path}", "--resume", "--device=cpu"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "not a run of" in said[0]


@linux
def test_predict_prints_any_name_on_any_terminal(esc, whole_run, tmp_path):
    assert fine(esc, tmp_path / "out", f"--checkpoint={whole_run / 'last.pt'}", "--fold=1") == 0
    name = os.fsdecode(bytes(tmp_path / "caf") + b"\xe9 \xc3\xa9.wav")
    shutil.copy(next((esc / "audio").glob("*.wav")), name)
    strict = "[s.reconfigure(encoding='ascii', errors='strict') for s in (sys.stdout, sys.stderr)]"
    arguments = ["predict", name, f"{tmp_path}/nowhere.wav", "--device=cpu",
                 f"--checkpoint={tmp_path}/out/last.pt"]
    (status, said), (bad_status, bad) = driven(
        tmp_path, [strict, "finetune", [arguments[0], name, *arguments[3:]]],
        [strict, "finetune", [*arguments[:1], name + "\udcff", *arguments[3:]]])
    assert status == 0 and "caf\\udce9 \\xe9.wav" in said and "rooster" in said, said
    assert bad_status == 2 and "Traceback" not in bad, bad


@linux
@pytest.mark.parametrize("program", ["eat.py", "data.py", "finetune.py"])
def test_ctrl_c_while_modules_are_imported_leaves_no_traceback(program, tmp_path):
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run([sys.executable, program, "--help"], cwd=HERE, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert done.returncode in (-signal.SIGINT, 130) and "Traceback" not in done.stderr, done


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_says_so(share, whole_run, esc, tmp_path, capsys):
    content = (whole_run / "last.pt").read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(content[: int(share * len(content))])
    assert fine(esc, tmp_path / "out", f"--checkpoint={path}") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"{path}: not a whole checkpoint" in said[0]


def test_lists_from_windows_name_the_same_files(sounds, tmp_path):
    names = sorted(str(path) for path in sounds.glob("*.wav"))
    for form, text in {"lines": "\r\n".join(names), "mark": "\ufeff" + "\r\n".join(names) + "\r\n",
                       "manifest": f"\ufeff{sounds}\r\n" + "".join(f"{Path(name).name}\t9000\r\n"
                                                                   for name in names)}.items():
        (tmp_path / form).write_bytes(text.encode())
        assert data.find_audio(str(tmp_path / form)) == names


@linux
def test_open_files_do_not_grow_with_the_clips(whole_run, tmp_path, monkeypatch):
    """A tensor that came from a worker holds a file open for as long as it lives."""
    read, count = eat.read_features, []

    def counted(*arguments):
        count.append(len(os.listdir("/proc/self/fd")))
        return read(*arguments)

    monkeypatch.setattr(eat, "read_features", counted)
    folder = some_files(tmp_path / "files", 384, seconds=0.05)
    assert finetune.main(["embed", str(folder), f"--checkpoint={whole_run / 'last.pt'}",
                          f"--out={tmp_path}/x.npz", "--workers=1", "--device=cpu"]) == 0
    assert len(count) == 12 and count[-1] - count[3] < 4, count


def test_padding_changes_no_features(whole_run, tmp_path):
    """A short sound has the same features in a longer clip."""
    encoder = eat.load_encoder(whole_run / "last.pt")
    machine = eat.Machine(device="cpu", precision="float32", workers=0)
    some_files(tmp_path / "files", 3, seconds=0.3)
    short, long = (eat.features(encoder, EATConfig(**{**SMALL, "frames": frames}),
                                data.open_clips(str(tmp_path / "files"), frames), range(3), machine)
                   for frames in (32, 128))
    assert len(short[0]) == 3
    for name, value in short[0].items():
        torch.testing.assert_close(long[0][name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["added", "removed"])
def test_a_run_goes_on_with_other_files_and_says_so(change, sounds, tmp_path, capsys):
    folder, out = shutil.copytree(sounds, tmp_path / "sound"), tmp_path / "out"
    assert eat.main(flags(folder, out, "--save-every=3")) == 0
    os.replace(out / "previous.pt", out / "last.pt")
    if change == "added":
        tone(folder / "more.wav", 16_000)
    else:
        (folder / "03.wav").unlink()
    capsys.readouterr()
    assert eat.main(flags(folder, out, "--resume")) == 0
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "the run began with" in said and "now has" in said
    assert weights(out)[0] == 8 and [line["step"] for line in logged(out)] == list(range(1, 9))


# ---- CUDA, as far as it goes without a card ------------------------------------------------------

with warnings.catch_warnings():  # there is no file to register it in
    warnings.simplefilter("ignore")
    cuda_mark = pytest.mark.cuda


def cuda(test):
    """For tests that need a card:  pytest -m cuda test_eat.py"""
    no_card = not torch.cuda.is_available()
    return cuda_mark(pytest.mark.skipif(no_card, reason="needs an NVIDIA card")(test))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_on_a_card_have_the_right_devices_and_precisions(dtype):
    """Without a card, as torch follows them without computing: products and convolutions are in 16
    bits, what the blocks pass on (see Block.forward), targets and losses in 32."""
    model, seen = EAT(EATConfig(**SMALL)), {}

    def look(name):
        def hook(_, inputs, output):
            seen[name] = [*inputs, *(output if isinstance(output, tuple) else [output])]
        return hook

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(look(name))
    with torch._subclasses.FakeTensorMode():
        state = {name: torch.empty(x.shape, device="cuda", requires_grad=x.requires_grad)
                 for name, x in [*model.named_parameters(), *model.named_buffers()]}
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            x = torch.empty(2, 1, 64, 128, device="cuda")
            losses = torch.func.functional_call(model, state, (x,))
            state = {f"model.{name}": value for name, value in state.items()}
            targets = torch.func.functional_call(Targets(model), state, (x,))
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    seen = {name: [x for x in tensors if x.is_floating_point()] for name, tensors in seen.items()}
    assert all(x.device.type == "cuda" for tensors in seen.values() for x in tensors)
    for name, tensors in seen.items():
        if name.endswith((".qkv", ".fc1", ".fc2", ".proj")) or ".convs." in name:
            assert tensors[-1].dtype == dtype, name
        if "norm" in name or name == "student":
            assert tensors[-1].dtype == torch.float32, name
    assert len([name for name in seen if "norm" in name]) == 11
    assert all(x.dtype == torch.float32 and x.device.type == "cuda"
               for x in (targets, *losses.values()))


class Targets(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.targets(x)


def counted(model):
    """Compiled without code being made, and a counter of the graphs that would be."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    return torch.compile(model, backend=counter, fullgraph=True, dynamic=False), counter


@pytest.mark.parametrize("drawn", [False, True], ids=["mask given", "mask drawn inside"])
def test_pre_training_is_one_graph_that_is_compiled_once(drawn):
    model = EAT(EATConfig(**SMALL))
    net, counter = counted(model)
    for _ in range(5):
        mask = None if drawn else model.draw_mask(2, (4, 8))
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(torch.randn(2, 1, 64, 128), mask)["loss"]
        loss.backward()
        model.update_teacher(0.9)
    assert counter.frame_count == 1


@pytest.mark.parametrize("reading", ["CLS", "patches"])
def test_fine_tuning_is_one_graph_for_training_and_one_for_testing(reading):
    model = finetune.Classifier(Encoder(EATConfig(**SMALL)), 3, 0.1, reading)
    net, counter = counted(model)
    for training in (True, True, False, True, False, True):
        model.train(training)
        net(torch.randn(2, 1, 64, 128)).sum().backward()
    assert counter.frame_count == 2


def test_a_compiler_that_fails_is_one_line(sounds, tmp_path, monkeypatch, capsys):
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere/g++"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    small = ["--depth=1", "--decoder-layers=1", "--compile"]
    assert eat.main(flags(sounds, tmp_path / "out", *small)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "torch.compile failed" in said and "/nowhere/g++" in said and "--no-compile" in said


def stepper(config, machine, lr=1e-3):
    """A model, its optimizer, its scaler and a function that takes a step as eat.train does."""
    torch.manual_seed(0)
    model = EAT(config).to(machine.device)
    optimizer = eat.make_optimizer(model, Recipe(adam_eps=1e-3))  # tames gradients that are noise
    scaler, net = machine.scaler(), machine.prepare(model)
    for group in optimizer.param_groups:
        group["lr"] = lr

    def step(x, mask=None):
        with machine.autocast():
            losses = net(x, mask)
        scaler.scale(losses["loss"]).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 4.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.update_teacher(0.999)
        return losses["loss"].detach(), norm

    return model, optimizer, scaler, step


def machine_of(device, precision="float32", compile=False):
    torch._dynamo.reset()  # it gives up on code that it has compiled for eight models
    return eat.Machine(device=device, precision=precision, compile=compile, workers=0)


POISON = [pytest.param("cpu", precision) for precision in ("float32", "bfloat16")] + [
    pytest.param("cuda", precision, marks=cuda_mark) for precision in ("bfloat16", "float16")]


@pytest.mark.parametrize("device, precision", POISON)
def test_gradients_that_are_not_finite_change_nothing(device, precision):
    """Nor do twenty of them add up: where the scale of the loss is 1, it stays 1."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA card")
    model, optimizer, scaler, step = stepper(EATConfig(**SMALL), machine_of(device, precision))
    x = torch.randn(2, 1, 64, 128, device=device)
    while not step(x)[1].isfinite():  # float16 settles first
        pass
    before = copy.deepcopy([model.student.state_dict(), model.decoder.state_dict(),
                            *optimizer.state_dict()["state"].values()])
    for _ in range(20):
        assert not step(torch.where(x > 3, math.inf, x))[1].isfinite()
    after = [model.student.state_dict(), model.decoder.state_dict(),
             *optimizer.state_dict()["state"].values()]
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert precision == "float16" or scaler.get_scale() == 1


# ---- CUDA, with a card ---------------------------------------------------------------------------

BASE = dict(dim=768, heads=12, depth=2, frames=256, clones=2, decoder_layers=2, mask_noise_std=0.0)


def error_of(x, reference):
    """Of one list of tensors against another, relative to its norm."""
    difference = math.hypot(*((a.cpu() - b.cpu()).norm().item() for a, b in zip(x, reference)))
    return difference / math.hypot(*(b.norm().item() for b in reference))


def losses_and_gradients(model, x, mask, machine):
    """The loss and all gradients of a model on a machine, on the CPU."""
    model.zero_grad()
    with machine.autocast():
        losses = machine.prepare(model)(x.to(machine.device), mask.to(machine.device))
    losses["loss"].backward()
    return losses, [p.grad.cpu() for p in model.parameters() if p.grad is not None]


@cuda
@pytest.mark.parametrize("precision, compile, near, near_grad", [
    ("float32", False, 2e-5, 1e-3), ("float32", True, 2e-5, 1e-3), ("bfloat16", False, 1e-2, 0.1),
    ("bfloat16", True, 1e-2, 0.1), ("float16", False, 1e-2, 0.1)])
def test_a_card_gives_the_figures_of_the_release(precision, compile, near, near_grad, formula):
    cpu, x, mask = formula
    _, reference = losses_and_gradients(copy.deepcopy(cpu), x, mask, machine_of("cpu"))
    machine = machine_of("cuda", precision, compile)
    losses, found = losses_and_gradients(copy.deepcopy(cpu).cuda(), x, mask, machine)
    assert losses["frame_loss"].item() == pytest.approx(22.156864, rel=near)
    assert losses["utterance_loss"].item() == pytest.approx(7.8057818, rel=near)
    assert len(found) == len(reference) and error_of(found, reference) < near_grad


@cuda
def test_a_card_gives_the_spectrograms_of_the_cpu():
    torch.manual_seed(0)
    floats = 0.1 * torch.randn(4, data.clip_samples(256))
    for waveforms in (floats, (floats * 32768).short()):
        found = fbank(waveforms.cuda()).cpu()
        torch.testing.assert_close(found, fbank(waveforms), atol=2e-3, rtol=0)


@cuda
@pytest.mark.parametrize("masking", ["inverse_block", "block", "random"])
def test_masks_and_noise_of_a_card_come_from_the_seed(masking):
    model = EAT(EATConfig(**{**SMALL, "masking": masking})).cuda()
    x, found = torch.ones(64, 1, 64, 128, device="cuda"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        mask = model.draw_mask(64, (4, 8), x.device)
        assert mask.is_cuda and set((~mask).sum(2).flatten().tolist()) == {6}
        found.append((mask, model(x, mask)["frame_loss"].item()))
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], found[2][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6) and found[0][1] != found[2][1]


@cuda
def test_a_compiled_step_of_full_width_is_the_eager_one_and_the_cpu_s():
    x, grid = torch.randn(2, 1, 256, 128), (16, 8)
    mask, found = EAT(EATConfig(**BASE)).draw_mask(2, grid), []
    for machine in (machine_of("cpu"), machine_of("cuda"), machine_of("cuda", compile=True)):
        model, _, _, step = stepper(EATConfig(**BASE), machine)
        before = [p.detach().cpu().clone() for p in model.student.parameters()]
        loss, norm = step(x.to(machine.device), mask.to(machine.device))
        moved = [p.detach().cpu() - old for p, old in zip(model.student.parameters(), before)]
        found.append((loss.item(), norm.item(), moved))
    for loss, norm, moved in found[1:]:
        assert (loss, norm) == pytest.approx(found[0][:2], rel=1e-3)
        assert error_of(moved, found[0][2]) < 0.02


@cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_step_never_waits_for_the_card_nor_grows(precision):
    model, _, _, step = stepper(EATConfig(**BASE), machine_of("cuda", precision))
    waveforms = 0.1 * torch.randn(2, data.clip_samples(256), device="cuda")
    lengths, taken = torch.full((2,), waveforms.shape[1], device="cuda"), []
    for k in range(25):
        torch.cuda.set_sync_debug_mode("error" if k > 2 else "default")
        try:
            x = data.spectrogram(waveforms, lengths, 256, -4.0, 4.0)
            loss, norm = step(x, model.draw_mask(2, (16, 8), x.device))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        taken.append(torch.cuda.memory_allocated())
        del x
    assert loss.isfinite() and taken[4] == taken[24]


@cuda
def test_the_scale_of_float16_settles():
    model, _, scaler, step = stepper(EATConfig(**SMALL), machine_of("cuda", "float16"))
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
    x = torch.randn(2, 1, 64, 128, device="cuda")
    before = model.decoder.proj.weight.detach().clone()
    finite = [step(x)[1].isfinite().item() for _ in range(40)]
    assert not finite[0] and all(finite[-5:]) and 1 < scaler.get_scale() < 2.0**40
    assert not torch.equal(model.decoder.proj.weight, before)


@cuda
@pytest.mark.parametrize("more", [["--device=cuda"], ["--device=cpu"],
                                  ["--device=cuda", "--compile"]], ids=["cuda", "cpu", "compiled"])
def test_a_run_on_a_card_with_workers_resumes_there_and_on_the_cpu(more, sounds, tmp_path, capsys):
    torch.zeros(1, device="cuda")  # workers are forked after CUDA began
    card = ["--device=cuda", "--workers=2", "--save-every=4", "--no-compile"]
    assert eat.main(flags(sounds, tmp_path / "whole", *card)) == 0
    (tmp_path / "half").mkdir()
    shutil.copy(tmp_path / "whole" / "previous.pt", tmp_path / "half" / "last.pt")
    assert eat.main(flags(sounds, tmp_path / "half", "--resume", *more)) == 0
    (step, a), (other, b) = (weights(tmp_path / name) for name in ("whole", "half"))
    assert step == other == 8 and all(x.isfinite().all() for x in b.values())
    if more == ["--device=cuda"]:  # the others draw other noise
        assert error_of(list(b.values()), list(a.values())) < 1e-3
        with capsys.disabled():
            print("\nresumed bit by bit:", all(torch.equal(a[name], b[name]) for name in a))


@cuda
def test_parts_of_a_batch_on_a_card_give_the_gradients_of_the_whole():
    x, model = torch.randn(4, 1, 256, 128), EAT(EATConfig(**BASE)).cuda()
    machine = machine_of("cuda")
    mask = model.draw_mask(4, (16, 8))
    _, whole = losses_and_gradients(model, x, mask, machine)
    parts = [losses_and_gradients(model, x[k:k + 2], mask[k:k + 2], machine)[1] for k in (0, 2)]
    assert error_of([(a + b) / 2 for a, b in zip(*parts)], whole) < 1e-3


@cuda
def test_nccl_with_one_process_changes_no_gradient(tmp_path):
    x, model = torch.randn(2, 1, 256, 128), EAT(EATConfig(**BASE)).cuda()
    mask, machine = model.draw_mask(2, (16, 8)), machine_of("cuda", compile=True)
    _, alone = losses_and_gradients(model, x, mask, machine)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0,
                                         world_size=1)
    try:
        machine.world = 2  # so that it prepares the model for several
        _, found = losses_and_gradients(model, x, mask, machine)
        assert machine.reduce(3).item() == 3
    finally:
        torch.distributed.destroy_process_group()
    assert error_of(found, alone) < 1e-3


@cuda
@pytest.mark.parametrize("reading", ["CLS", "patches"])
def test_two_folds_are_fine_tuned_compiled(reading, esc, whole_run, tmp_path):
    assert fine(esc, tmp_path, f"--checkpoint={whole_run / 'last.pt'}", "--device=cuda",
                "--compile", "--precision=bfloat16", "--steps=20", f"--reading={reading}") == 0
    found = json.loads((tmp_path / "results.json").read_text())["results"]["fine-tuned"]
    assert list(found) == ["fold 1", "fold 2"] and logged(tmp_path)[-1]["not_finite"] == 0


@cuda
def test_a_clip_longer_than_the_table_of_positions_on_a_card():
    encoder, x = Encoder(EATConfig(**SMALL)), torch.randn(2, 1, 96, 128)
    found = copy.deepcopy(encoder).to(machine_of("cuda").device)(x.cuda()).cpu()
    torch.testing.assert_close(found, encoder(x), atol=1e-4, rtol=1e-4)


@cuda
def test_too_little_memory_on_a_card_is_one_line(sounds, tmp_path, capsys):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        assert eat.main(flags(sounds, tmp_path, "--device=cuda", "--dim=768", "--heads=12",
                              "--depth=12", "--no-compile")) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("eat.py: out of memory") and "--accumulate" in said


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


def banded(x, weight, groups):
    """A grouped 3 x 3 convolution of x (views, H, W, D) as three dense products over the time
    taps: in each group the W frequency columns are one vector with the channels, and a banded
    matrix mixes them."""
    (views, H, W, D), C = x.shape, weight.shape[1]
    taps = weight.view(groups, C, C, 3, 3)  # group, channel out, channel in, time, frequency
    matrix = x.new_zeros(3, groups, W, C, W, C)  # tap, group; column and channel in; and out
    for column in range(W):
        for source in range(max(0, column - 1), min(W, column + 2)):
            matrix[:, :, source, :, column] = taps[..., source - column + 1].permute(3, 0, 2, 1)
    matrix = matrix.view(3, groups, W * C, W * C)
    rows = F.pad(x.unflatten(3, (groups, C)).permute(3, 0, 1, 2, 4).flatten(3), (0, 0, 1, 1))
    y = sum(rows[:, :, k : k + H].flatten(1, 2) @ matrix[k] for k in range(3))
    return y.view(groups, views, H, W, C).permute(1, 2, 3, 0, 4).flatten(3)


def channels_last(x, weight, groups):
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1, groups=groups).permute(0, 2, 3, 1)


def contiguous(x, weight, groups):
    y = F.conv2d(x.permute(0, 3, 1, 2).contiguous(), weight, padding=1, groups=groups)
    return y.permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("device, size, dtype, near", [
    ("cpu", (2, 4, 8, 64), torch.float64, 1e-12),
    pytest.param("cuda", (192, 64, 8, 768), torch.bfloat16, 0.02, marks=cuda_mark)])
def test_three_ways_to_convolve_agree(device, size, dtype, near, capsys):
    """On a card it prints how long each takes, forward and backward, for 12 clips of 16 clones."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA card")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    x = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(size[3], size[3] // 16, 3, 3, device=device, dtype=dtype)
    up, reference = torch.randn_like(x), None
    weight.requires_grad_()
    for way in (channels_last, contiguous, banded):
        found = way(x, weight, 16)
        found = [found.detach().double(), *(g.double() for g in
                                            torch.autograd.grad(found, (x, weight), up))]
        reference = reference or found
        assert error_of(found, reference) < near
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(20):
                torch.autograd.grad(way(x, weight, 16), (x, weight), up)
            end.record()
            torch.cuda.synchronize()
            with capsys.disabled():
                print(f"\n{way.__name__}: {begin.elapsed_time(end) / 20:.2f} ms", end="")
