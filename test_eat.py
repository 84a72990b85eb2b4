"""Every test, grouped by the file it tests:  pytest test_eat.py

Those that need the released code's fixtures or real sound look for them in ../shared and skip without it. Those that take
minutes (kills at random moments, a run of 2,000 steps) are run by  pytest -m slow test_eat.py  alone.
"""

import contextlib
import io
import json
import math
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

import data
import eat
import finetune
from data import AudioError, fbank, load_audio, open_clips, spectrogram
from eat import EAT, EATConfig, Encoder, Recipe, inverse_block_mask
from finetune import Classifier, FineTune, average_precision

HERE = Path(__file__).parent
torch.set_num_threads(1)  # small models gain nothing from more, and runs compare bit by bit
SHARED = HERE.parent / "shared"
fixtures = pytest.mark.skipif(not (SHARED / "fixtures").exists(), reason="needs ../shared/fixtures")
with warnings.catch_warnings():  # there is no file to register it in
    warnings.simplefilter("ignore")
    slow = pytest.mark.slow
real_sound = pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs ../shared/data")

@pytest.fixture(autouse=True)
def slow_only_when_asked(request):
    if request.node.get_closest_marker("slow") and "slow" not in request.config.getoption("-m"):
        pytest.skip("takes minutes: pytest -m slow test_eat.py")


# The model of the fixtures, and one small enough to train in a test.
FIXTURE = dict(dim=64, depth=3, heads=4, frames=256, clones=4, mask_noise_std=0.0, utterance_weight=1.0)
SMALL = dict(dim=32, depth=2, heads=2, frames=64, clones=2, decoder_layers=2)
SMALL_FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]


def release_name(name):
    """A parameter of EAT -> what the release calls it (student and decoder; the teacher's as the student's)."""
    place = "modality_encoders.IMAGE."
    name = name.removeprefix("student.").removeprefix("teacher.")
    if name.startswith("decoder.convs."):
        _, _, layer, kind = name.split(".")
        return f"{place}decoder.blocks.{layer}.0.{kind}"
    for ours, theirs in {"cls": "extra_tokens", "patches.proj": "local_encoder.proj", "norm": "context_encoder.norm",
                         "decoder": "decoder"}.items():
        if name == ours or name.startswith(ours + "."):
            return place + theirs + name.removeprefix(ours)
    return name


def relative_error(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


# ---------------------------------------------------------------------------------------------------------
# eat.py: parity with the release
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def formula():
    """Model, spectrogram and mask that formulas give, on which the released code printed the figures below."""
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
    t, f = torch.arange(256, dtype=torch.float64)[:, None], torch.arange(128, dtype=torch.float64)
    x = torch.sin(0.05 * t + 0.11 * f + 0.7 * b + 0.001 * t * f).float()
    b, c, n = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(128), indexing="ij")
    return model, x, (37 * n + 11 * c + 5 * b) % 128 >= 25


# How far each way of computing may be from the release: losses; norms of gradients, relative and absolute.
WAYS = {"float32": (1e-6, 1e-5, 0), "compiled": (1e-6, 1e-5, 0), "bfloat16": (1e-2, 2e-2, 0.05)}
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ here")
every_way = pytest.mark.parametrize("way", ["float32", pytest.param("compiled", marks=needs_compiler), "bfloat16"])


@every_way
def test_losses_and_gradients_equal_the_release(way, formula):
    model, x, mask = formula
    machine = eat.Machine(Recipe(device="cpu", compile=way == "compiled", precision="bfloat16" if way == "bfloat16" else "float32"))
    model.zero_grad()
    with machine.arithmetic():
        losses = machine.wrap(model)(x, mask)
    losses["loss"].backward()
    near_loss, near_norm, nearly_no_norm = WAYS[way]
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
    for got, want, within in (  # some channels vary by 5e-4 only: normalising them magnifies float32's rounding
        (targets[0, 0, :4], [-1.0623108, -0.4307056, 0.5188150, 0.9966463], 2e-4),
        (targets[1, 100, 60:], [-1.5293593, -1.2909735, -0.1522195, 0.4014070], 2e-4),
        (tokens[0, 0, :4], [-1.3777491, -1.1289545, -0.7422174, -0.1943505], 5e-6),
        (tokens[1, 77, :4], [-0.4975727, 0.8869479, 0.5765868, -0.2733991], 5e-6),
        (tokens.abs().mean(), 0.82830022, 5e-6),
    ):
        torch.testing.assert_close(got, torch.tensor(want), atol=within, rtol=0)


GRADIENT_NORMS = {
    "student.patches": 141.73095,
    "student.cls": 0.58477002,
    "student.norm": 18.628572,
    "student.blocks.0": 74.760225,
    "student.blocks.1": 81.628987,
    "student.blocks.2": 87.775928,
    "decoder.convs": 1031.6760,
    "decoder.proj": 21.953758,
}


def test_targets_of_the_last_blocks():
    """All blocks' targets are, up to the last norm, the mean of what each number of blocks alone contributes."""
    torch.manual_seed(0)
    model, x = EAT(EATConfig(**{**SMALL, "depth": 3})), torch.randn(2, 1, 64, 128)
    tokens, outputs = model.teacher.embed(x), []
    for block in model.teacher.blocks:
        tokens, f = block(tokens)
        f = f[:, 1:]  # each channel to mean 0 and variance 1 over the patches of its clip
        outputs.append((f - f.mean(1, keepdim=True)) / (f.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt())
    for count in (1, 2, 3):
        model.config.target_blocks = count
        wanted = torch.stack(outputs[3 - count :]).mean(0)
        wanted = (wanted - wanted.mean(2, keepdim=True)) / (wanted.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(model.targets(x), wanted, atol=1e-5, rtol=1e-5)
    every = model.targets(x)
    model.config.target_blocks = None
    assert torch.equal(model.targets(x), every)


def test_each_loss_can_be_had_alone():
    x = torch.randn(2, 1, 64, 128)
    for weights, alone in (({"frame_weight": 0.0}, "utterance_loss"), ({"utterance_weight": 0.0}, "frame_loss")):
        model = EAT(EATConfig(**{**SMALL, "utterance_weight": 3.0, **weights}))
        losses = model(x)
        factor = 3 if alone == "utterance_loss" else 1
        assert losses["loss"].item() == pytest.approx(factor * losses[alone].item())
        losses["loss"].backward()
        assert model.decoder.proj.weight.grad.any() == (alone == "frame_loss")


@fixtures
def test_a_whole_step_equals_the_release():
    fixture = torch.load(SHARED / "fixtures/tiny/pretrain.pt", weights_only=True)
    views = fixture["mask"].shape[0] * fixture["mask"].shape[1]  # the release sums the utterance loss over views
    model = EAT(EATConfig(**{**FIXTURE, "utterance_weight": float(views)}))

    def load(states):
        for part, state in states.items():
            for name, p in getattr(model, part).named_parameters(part):
                p.data.copy_(state[release_name(name)])

    load({"student": fixture["student"], "decoder": fixture["student"], "teacher": fixture["teacher"]})
    x, mask = fixture["spectrogram"], fixture["mask"]
    visible, _ = eat.split_mask(mask, 25)
    tokens = model.student(x, visible)
    close = dict(atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(model.targets(x), fixture["targets"], **close)
    # The release keeps the visible patches in whatever order its sort leaves them.
    order = torch.cdist(fixture["student_tokens"], tokens).argmin(2)
    assert (order.sort(1).values == torch.arange(26)).all() and (order[:, 0] == 0).all()
    torch.testing.assert_close(eat.take(tokens, order), fixture["student_tokens"], **close)
    torch.testing.assert_close(model.decode(tokens[:, 1:], visible, (16, 8)), fixture["decoder_tokens"], **close)

    losses = model(x, mask)
    assert losses["frame_loss"].item() == pytest.approx(fixture["frame_loss"], rel=1e-6)
    assert losses["utterance_loss"].item() * views == pytest.approx(fixture["utterance_loss_summed_over_views"], rel=1e-6)
    assert losses["loss"].item() == pytest.approx(fixture["total_loss"], rel=1e-6)
    losses["loss"].backward()
    grads = {release_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == fixture["grads"].keys()
    for name, grad in grads.items():
        assert relative_error(grad, fixture["grads"][name]) < 1e-4, name

    load({"student": fixture["student_after_step"]})
    model.update_teacher(fixture["ema_decay_of_that_step"])
    for name, p in model.teacher.named_parameters():
        torch.testing.assert_close(p, fixture["teacher_after_ema"][release_name(name)], atol=1e-7, rtol=1e-6)


def test_base_is_the_size_the_paper_says():
    with torch.device("meta"):
        model = EAT(EATConfig())
    sizes = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("student", "decoder")}
    assert round(sum(sizes.values()) / 1e6) == 88


# ---------------------------------------------------------------------------------------------------------
# eat.py: the parts
# ---------------------------------------------------------------------------------------------------------


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
    short, long = (Encoder(EATConfig(**{**SMALL, "frames": frames})) for frames in (32, 128))
    long.load_state_dict(short.state_dict())
    x = torch.randn(2, 1, 96, 128)
    torch.testing.assert_close(short(x), long(x))


def test_masked_patches_never_reach_the_student():
    config = EATConfig(**SMALL)
    encoder, x = Encoder(config), torch.randn(3, 1, 64, 128)
    mask = eat.draw_masks(config, 3, (4, 8))
    visible, masked = eat.split_mask(mask, config.visible)
    tokens = encoder(x, visible)
    assert tokens.shape == (6, 1 + config.visible, 32)
    hidden = mask[:, 1].view(3, 1, 4, 8).repeat_interleave(16, 2).repeat_interleave(16, 3)
    other = encoder(torch.where(hidden, torch.randn_like(x), x), visible).view(3, 2, -1, 32)
    torch.testing.assert_close(other[:, 1], tokens.view(3, 2, -1, 32)[:, 1])
    assert not torch.allclose(other[:, 0], tokens.view(3, 2, -1, 32)[:, 0])


@pytest.mark.parametrize("masking", ["inverse_block", "block", "random"])
@pytest.mark.parametrize("grid", [(64, 8), (32, 8), (8, 8), (4, 8)])
def test_every_mask_keeps_exactly_K(masking, grid):
    N = grid[0] * grid[1]
    mask = inverse_block_mask(40, 3, grid, masking=masking)
    assert mask.shape == (40, 3, N) and mask.dtype == torch.bool
    assert set((~mask).sum(-1).flatten().tolist()) == {{512: 102, 256: 51, 64: 12, 32: 6}[N]}


def slow_inverse_block_mask(H, W, rng):
    """One mask as REFERENCE says it, patch by patch -> visible (H, W) bool."""
    keep, visible = int(H * W * (1 - 0.8)), np.zeros((H, W), bool)
    for _ in range(int(H * W * (0.2 + 0.07) / 25)):
        row, column = rng.integers(H), rng.integers(W)
        for r in range(-2, 3):
            for c in range(-2, 3):
                visible[min(max(row + r, 0), H - 1), min(max(column + c, 0), W - 1)] = True
    flat = visible.ravel()
    while flat.sum() > keep:
        flat[rng.choice(np.flatnonzero(flat))] = False
    while flat.sum() < keep:
        flat[rng.choice(np.flatnonzero(~flat))] = True
    return visible


def neighbours(visible):
    """Mean count of visible neighbour pairs along time and along frequency, and the frequency of each patch."""
    time_pairs = (visible[:, 1:] & visible[:, :-1]).sum((1, 2)).double()
    frequency_pairs = (visible[:, :, 1:] & visible[:, :, :-1]).sum((1, 2)).double()
    return time_pairs, frequency_pairs, visible.double().mean(0)


def test_inverse_block_masks_are_distributed_as_a_slow_version():
    rng, n = np.random.default_rng(0), 2000
    slow = neighbours(torch.from_numpy(np.stack([slow_inverse_block_mask(32, 8, rng) for _ in range(n)])))
    fast = neighbours(~inverse_block_mask(n, 1, (32, 8), generator=torch.Generator().manual_seed(0)).view(n, 32, 8))
    for a, b in zip(slow[:2], fast[:2]):
        assert abs(a.mean() - b.mean()) < 4 * math.sqrt((a.var() + b.var()) / n)
    error = (slow[2] * (1 - slow[2]) * 2 / n).sqrt()
    assert ((slow[2] - fast[2]).abs() < 4.5 * error).all()


@fixtures
def test_inverse_block_masks_are_distributed_as_the_release():
    release = torch.load(SHARED / "fixtures/mask_statistics.pt", weights_only=True)
    n = release["n"]
    visible = ~inverse_block_mask(n // 16, 16, (64, 8), generator=torch.Generator().manual_seed(0)).view(n, 64, 8)
    time_pairs, frequency_pairs, frequency = neighbours(visible)
    for pairs, name in ((time_pairs, "time"), (frequency_pairs, "freq")):
        error = release[f"{name}_neighbour_pairs_std"] * math.sqrt(2 / n)
        assert abs(pairs.mean().item() - release[f"{name}_neighbour_pairs_mean"]) < 3.5 * error
    error = (frequency * (1 - frequency) * 2 / n).sqrt()
    assert ((frequency - release["visible_frequency"]).abs() < 4.5 * error).all()


def test_masking_kinds_cluster_what_their_names_say():
    def clusters(kind, of_masked):
        mask = inverse_block_mask(500, 1, (32, 8), masking=kind, generator=torch.Generator().manual_seed(0)).view(-1, 32, 8)
        return neighbours(mask if of_masked else ~mask)[0].mean()

    assert clusters("inverse_block", False) > 1.8 * clusters("random", False)
    assert clusters("block", True) > 1.03 * clusters("random", True)


def test_a_short_clip_still_gets_a_block():
    """The release's count of 5 x 5 blocks in 1 s of sound is 0, which would leave the masks random."""
    visible = ~inverse_block_mask(500, 1, (8, 8), generator=torch.Generator().manual_seed(0)).view(-1, 8, 8)
    squares = F.avg_pool2d(visible[:, None].float(), 3, stride=1) == 1
    inner = squares.flatten(1).any(1).float().mean()
    assert inner > 0.5  # a 3 x 3 block is whole unless its centre lies at the edge (28 of 64)


def test_a_mask_of_another_size_is_refused():
    model = EAT(EATConfig(**SMALL))
    mask = torch.ones(1, 2, 32, dtype=torch.bool)
    mask[..., :7] = False
    with pytest.raises(ValueError, match="exactly 6 of 32"):
        model(torch.randn(1, 1, 64, 128), mask)


def test_the_standard_deviations_show_collapse():
    model, x = EAT(EATConfig(**SMALL)), torch.randn(4, 1, 64, 128)
    assert min(model(x)[name] for name in ("target_std", "prediction_std")) > 0.05
    torch.nn.init.zeros_(model.decoder.proj.weight)
    assert model(x)["prediction_std"] < 1e-6


def test_silence_gives_a_finite_loss():
    assert EAT(EATConfig(**SMALL))(torch.zeros(2, 1, 64, 128))["loss"].isfinite()


@pytest.mark.parametrize("wrong, says", [
    (dict(heads=5), "heads"), (dict(frames=100), "frames"), (dict(mask_ratio=1.0), "mask_ratio"),
    (dict(mask_ratio=0.0), "mask_ratio"), (dict(std=0.0), "std"), (dict(dim=36, heads=2), "decoder_groups"),
])
def test_impossible_sizes_are_refused(wrong, says):
    with pytest.raises(eat.UsageError, match=says):
        EATConfig(**wrong)


# ---------------------------------------------------------------------------------------------------------
# eat.py: the recipe
# ---------------------------------------------------------------------------------------------------------


def test_learning_rate_and_teacher_decay_of_the_release():
    recipe = Recipe()
    assert recipe.learning_rate(53_333) == pytest.approx(5e-4)
    assert recipe.learning_rate(1) == pytest.approx(5e-4 / 53_333)
    assert recipe.learning_rate((400_000 + 53_333) // 2) == pytest.approx(2.5e-4, rel=1e-4)
    assert recipe.learning_rate(400_000) == pytest.approx(0, abs=1e-12)
    assert recipe.teacher_decay(50_000) == pytest.approx((0.9998 + 0.99999) / 2)
    assert recipe.teacher_decay(300_000) == 0.99999


def test_other_steps_and_batches_keep_the_proportions():
    recipe = Recipe().scaled(steps=4000, batch_size=12)
    assert (recipe.warmup_steps, recipe.ema_anneal_steps, recipe.lr) == (533, 1000, 1.25e-4)
    recipe = Recipe().scaled(steps=4000, batch_size=12, lr=1e-3, warmup_steps=10)
    assert (recipe.warmup_steps, recipe.ema_anneal_steps, recipe.lr) == (10, 1000, 1e-3)


def test_weight_decay_spares_biases_and_norms():
    model = EAT(EATConfig(**SMALL))
    decayed, spared = eat.make_optimizer(model, Recipe()).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[-1] for p in decayed["params"]} == {"weight", "cls"}
    assert all(names[id(p)].endswith("bias") or ".norm" in names[id(p)] for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == sum(p.requires_grad for p in model.parameters())


def test_an_epoch_is_every_clip_once_and_processes_share_it():
    recipe = Recipe(steps=5, batch_size=8, accumulate=2, seed=3)
    alone = [sum(parts, []) for parts in pairs(eat.Shares(eat.shuffled(20, 3), recipe, 0, rank=0, world=1))]
    assert sorted(sum(alone, [])[:20]) == sorted(sum(alone, [])[20:40]) == list(range(20))
    assert sum(alone, [])[:20] != sum(alone, [])[20:40]
    both = [pairs(eat.Shares(eat.shuffled(20, 3), recipe, 0, rank, world=2)) for rank in (0, 1)]
    together = [a[0] + b[0] + a[1] + b[1] for a, b in zip(*both)]
    assert together == alone
    resumed, whole = (pairs(eat.Shares(eat.shuffled(20, 3), recipe, step, rank=0, world=1)) for step in (3, 0))
    assert resumed == whole[3:]


def pairs(parts):
    parts = list(parts)
    return list(zip(parts[::2], parts[1::2]))


def test_what_a_row_draws_does_not_depend_on_its_share():
    config, recipe = EATConfig(**SMALL), Recipe(batch_size=6, seed=1)
    mask, noise = eat.draw_views(config, recipe, 7, range(6), "cpu")
    part_mask, part_noise = eat.draw_views(config, recipe, 7, range(2, 5), "cpu")
    assert torch.equal(part_mask, mask[2:5]) and torch.equal(part_noise, noise[2:5])
    assert noise.std().item() == pytest.approx(1, abs=0.05) and not torch.equal(noise[0], noise[1])
    assert not torch.equal(eat.draw_views(config, recipe, 8, range(6), "cpu")[0], mask)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns_what_float32_learns(precision, sounds, whole_run, tmp_path):
    assert eat.main(flags(sounds, tmp_path, f"--precision={precision}")) == 0
    lines = [[line["loss"] for line in logged(out)] for out in (tmp_path, whole_run)]
    assert lines[0] == pytest.approx(lines[1], rel=2e-2) and lines[0] != lines[1]
    _, state = weights(tmp_path)
    assert all(x.dtype == torch.float32 for x in state.values())  # weights, teacher and Adam stay whole


def test_flops_are_those_of_the_paper_recipe():
    """REFERENCE's count of multiply-adds: teacher 48 G, student 143 G forward, decoder 21 G; backward is twice as much."""
    assert eat.step_flops(EATConfig(), 1) == pytest.approx(2 * (48e9 + 429e9 + 63e9), rel=0.01)
    assert eat.step_flops(EATConfig(), 12) == 12 * eat.step_flops(EATConfig(), 1)


def test_bench_reports_the_step_and_its_parts(capsys):
    assert eat.main(["bench", "--device=cpu", "--batch-size=2", "--steps=2", "--frames=64", *SMALL_FLAGS]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["parts"]) == {"fbank", "masks, noise", "teacher", "student", "decoder", "backward", "optimizer", "EMA"}
    assert sum(result["parts"].values()) == pytest.approx(1)
    flops = eat.step_flops(EATConfig(**SMALL), 2)
    assert result["model_tflops"] * result["seconds_per_step"] == pytest.approx(flops / 1e12)
    assert result["clips_per_second"] * result["seconds_per_step"] == pytest.approx(2)


# ---------------------------------------------------------------------------------------------------------
# eat.py: runs
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Twelve files of real lengths and loudness: tones in noise, one of them much longer than a clip."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for k in range(12):
        t = np.arange(60_000 if k == 0 else 9000 + 500 * k) / 16_000
        wave = np.sin(2 * np.pi * 200 * (k + 1) * t) * 0.1 + 0.01 * rng.standard_normal(len(t))
        soundfile.write(folder / f"{k:02}.wav", wave, 16_000)
    return folder


def flags(sounds, out, *more):
    return [f"--data={sounds}", f"--out={out}", "--steps=8", "--batch-size=4", "--log-every=1", "--lr=1e-3",
            "--device=cpu", "--precision=float32", "--workers=0", *SMALL_FLAGS, *more]


def logged(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def weights(out):
    state = torch.load(Path(out) / "last.pt", weights_only=True)
    return state["step"], state["model"]


def assert_same_weights(a, b):
    (step, a), (other_step, b) = weights(a), weights(b)
    assert step == other_step and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole_run(sounds, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert eat.main(flags(sounds, out)) == 0
    return out


def start(*arguments):
    return subprocess.Popen([sys.executable, *arguments], cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process, out, step):
    """Until the run in `out` has logged `step`."""
    while process.poll() is None:
        path = Path(out) / "log.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"ended before step {step}: {process.stdout.read()}")


def test_a_run_learns_logs_and_leaves_an_encoder(whole_run, sounds):
    lines = logged(whole_run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"loss", "frame_loss", "utterance_loss", "target_std", "prediction_std", "grad_norm", "lr", "teacher_decay",
            "clips_per_second", "skipped"} <= lines[0].keys()
    encoder, model = eat.load_encoder(whole_run / "last.pt"), eat.load_pretrained(whole_run / "last.pt")
    x = torch.randn(1, 1, 64, 128)
    torch.testing.assert_close(encoder(x), model.student(x))
    teacher, student = model.teacher.state_dict(), model.student.state_dict()
    assert any(not torch.equal(teacher[name], student[name]) for name in teacher)


def torchrun(*arguments):
    return start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments)


def processes(word):
    """Those, other than this one and torchrun itself, whose command line has a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            line = path.read_bytes()
            if str(word).encode() in line and b"torch.distributed.run" not in line and path.parent.name != str(os.getpid()):
                found.append(int(path.parent.name))
    return sorted(found)


def left_over(word):
    """Those that are still there after a moment to end in."""
    for _ in range(50):
        if not processes(word):
            break
        time.sleep(0.1)
    return processes(word)


linux = pytest.mark.skipif(not os.path.exists("/proc/self/cmdline"), reason="looks for processes in /proc")


@linux
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_resumes_exactly(number, status, whole_run, sounds, tmp_path):
    """In the middle, then with another number of loader workers: bit by bit the undisturbed run."""
    process = start("eat.py", *flags(sounds, tmp_path, "--workers=2", "--save-every=1"))
    wait_for_step(process, tmp_path, 2)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status and "--resume" in said and "Traceback" not in said, said
    assert 2 <= weights(tmp_path)[0] < 8 and not left_over(tmp_path)
    assert eat.main(flags(sounds, tmp_path, "--resume")) == 0
    assert_same_weights(tmp_path, whole_run)
    lines = [line["step"] for line in logged(tmp_path)]
    assert lines == list(range(1, 9))


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_that_is_told_to_stop_saves(number, sounds, whole_run, tmp_path, capsys):
    process = torchrun("eat.py", *flags(sounds, tmp_path, "--workers=1", "--steps=100000"))
    wait_for_step(process, tmp_path, 2)
    if number == signal.SIGINT:  # as a terminal does: to all its processes
        for child in processes(tmp_path):
            os.kill(child, number)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "stopped by" in said and not left_over(tmp_path), said
    step, _ = weights(tmp_path)
    assert step >= 2
    # One process goes on where two stopped, and says so.
    state = torch.load(tmp_path / "last.pt")
    state["recipe"]["steps"] = step + 2
    torch.save(state, tmp_path / "last.pt")
    assert eat.main(flags(sounds, tmp_path, "--resume", f"--steps={step + 2}")) == 0
    assert "2 processes before, 1 now" in capsys.readouterr().out and weights(tmp_path)[0] == step + 2


@linux
def test_a_process_that_dies_ends_the_others(sounds, tmp_path):
    process = torchrun("eat.py", *flags(sounds, tmp_path, "--steps=100000"))
    wait_for_step(process, tmp_path, 2)
    os.kill(processes(tmp_path)[-1], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "Signal 9" in said and not left_over(tmp_path), said
    assert "eat.py\", line" not in said, said  # no traceback but torchrun's


def test_a_run_that_is_killed_resumes_exactly(whole_run, sounds, tmp_path):
    process = start("eat.py", *flags(sounds, tmp_path, "--save-every=2"))
    wait_for_step(process, tmp_path, 4)
    process.kill()
    process.communicate()
    os.rename(tmp_path / "last.pt", tmp_path / "previous.pt")  # as if killed between the two renames
    assert eat.main(flags(sounds, tmp_path, "--resume")) == 0
    assert_same_weights(tmp_path, whole_run)


@slow
def test_twenty_kills_at_random_moments_change_nothing(sounds, tmp_path):
    rng = np.random.default_rng(0)
    run = [*flags(sounds, tmp_path / "cut", "--save-every=1", "--steps=300", "--workers=1", "--batch-size=8"), "--resume"]
    kills = 0
    while kills < 20:
        process, part = start("eat.py", *run), tmp_path / "cut" / "last.pt.part"
        began, lines = time.monotonic(), 0
        if kills % 3 == 0:  # in start-up
            time.sleep(rng.uniform(0, 4))
        else:
            log = tmp_path / "cut" / "log.jsonl"
            before = log.stat().st_mtime if log.exists() else 0
            while process.poll() is None and not (log.exists() and log.stat().st_mtime > before):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.5))
            while kills % 3 == 1 and process.poll() is None and not part.exists():  # in a checkpoint write
                pass
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
    assert kills == 20, process.communicate()[0]
    assert eat.main([flag for flag in run if flag != "--workers=1"]) == 0
    assert eat.main(flags(sounds, tmp_path / "whole", "--save-every=1", "--steps=300", "--batch-size=8")) == 0
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    steps = [[line["step"] for line in logged(tmp_path / name)] for name in ("cut", "whole")]
    assert steps[0] == steps[1] == list(range(1, 301))


@slow
@linux
def test_a_long_run_is_flat(sounds, tmp_path):
    """2,000 steps: memory of the main process and its worker, open files, lines of the log."""
    process = start("eat.py", *flags(sounds, tmp_path, "--steps=2000", "--workers=1", "--save-every=100"))
    seen = {}
    for step in (500, 1990):
        wait_for_step(process, tmp_path, step)
        seen[step] = []
        for number in processes(tmp_path):
            memory = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{number}/status").read_text())[1]) / 1024
            seen[step].append((memory, len(os.listdir(f"/proc/{number}/fd"))))
    assert process.wait(timeout=60) == 0
    print(seen)
    assert len(seen[500]) == len(seen[1990]) == 2
    for (early, files), (late, files_late) in zip(seen[500], seen[1990]):
        assert late < early + 10  # MiB
        assert files_late <= files + 20  # each batch on its way from the worker holds some open
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, 2001))


@pytest.mark.parametrize("more", [["--accumulate=2"], []], ids=["accumulated", "two processes"])
def test_a_shared_batch_gives_the_same_gradients(whole_run, sounds, tmp_path, more):
    """One step: Adam's first moment is (1 - beta1) x the gradient, mask and noise included."""
    one, two = tmp_path / "one", tmp_path / "two"
    step = ["--steps=1", "--grad-clip=1e9"]
    assert eat.main(flags(sounds, one, *step)) == 0
    if more:
        assert eat.main(flags(sounds, two, *step, *more)) == 0
    else:
        process = torchrun("eat.py", *flags(sounds, two, *step))
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    moments = [torch.load(out / "last.pt", weights_only=True)["optimizer"]["state"] for out in (one, two)]
    assert len(moments[0]) == len(moments[1]) > 20
    for key in moments[0]:
        assert relative_error(moments[1][key]["exp_avg"], moments[0][key]["exp_avg"]) < 1e-5


def test_a_run_that_goes_wrong_stops_and_keeps_the_last_good_checkpoint(sounds, tmp_path, capsys):
    run = flags(sounds, tmp_path, "--save-every=1", "--lr=1e30", "--grad-clip=1e30", "--warmup-steps=0", "--steps=40")
    assert eat.main(run) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "not finite 10 times in a row" in said and "lower --lr" in said and "last.pt" in said
    step, state = weights(tmp_path)
    assert step == 1 and all(x.isfinite().all() for x in state.values())
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 11
    assert eat.main(flags(sounds, tmp_path / "2", "--collapse-std=100")) == 1
    assert "collapsed" in capsys.readouterr().err


def test_probing_along_the_way_changes_nothing_and_agrees_with_fine_tuning(sounds, whole_run, esc, tmp_path, capsys):
    probed = ["--probe", str(esc), "--probe-every=3"]
    assert eat.main(flags(sounds, tmp_path / "run", *probed)) == 0
    said = capsys.readouterr().out
    assert_same_weights(tmp_path / "run", whole_run)
    found = {line["step"]: line["knn_mean"] for line in logged(tmp_path / "run") if "knn_mean" in line}
    assert list(found) == [0, 3, 6, 8] and all(f"step {step:7}" in said for step in found)
    knn = [f"--data={esc}", f"--checkpoint={tmp_path}/run/last.pt", "--mode=knn", "--frames=64", "--precision=float32"]
    assert finetune.main([*knn, f"--out={tmp_path}/knn", "--device=cpu", "--workers=0"]) == 0
    folds = json.loads((tmp_path / "knn/results.json").read_text())["results"]["mean of patches"]
    assert found[8] == pytest.approx(np.mean([fold["value"] for fold in folds.values()]))
    assert eat.main(["plot", str(tmp_path / "run")]) == 0
    # A finished run that is resumed probes no more.
    assert eat.main(flags(sounds, tmp_path / "run", "--resume", *probed)) == 0
    assert list(found) == [line["step"] for line in logged(tmp_path / "run") if "knn_mean" in line]


def test_a_probe_starts_anew_with_its_run_and_says_what_it_probes_on(sounds, esc, tmp_path, capsys):
    (tmp_path / "run").mkdir()  # killed before its first checkpoint
    (tmp_path / "run/log.jsonl").write_text('{"step": 0, "knn_cls": 9, "knn_mean": 9}\n{"step": 1, "loss": 9}\n')
    assert eat.main(flags(esc, tmp_path / "run", f"--probe={esc}", "--steps=1")) == 0
    assert "the very sound it is trained on" in capsys.readouterr().out
    assert [line["step"] for line in logged(tmp_path / "run")] == [0, 1] and logged(tmp_path / "run")[0]["knn_mean"] <= 1
    make_manifests(tmp_path / "labels")
    assert eat.main(flags(sounds, tmp_path / "other", f"--probe={tmp_path}/labels")) == 2
    assert "one label each" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize("wrong, says", [
    (["--data=nowhere"], "no such file or folder"),
    (["--probe-every=2"], "--probe must name"),
    (["--probe=nowhere"], "no such folder"),
    (["--target-blocks=3"], "at most depth (2)"),
    (["--data={empty}"], "no sound in it"),
    (["--data={broken}"], "none of its files"),
    (["--heads=5"], "heads (5) must divide dim"),
    (["--frames=100"], "multiple of 16"),
    (["--batch-size=1000"], "1000"),
    (["--batch-size=6", "--accumulate=4"], "multiple of 4"),
    (["--out={whole_run}"], "--resume"),
    (["--out={whole_run}", "--resume", "--lr=0.5"], "--lr 0.5"),
    (["--device=cuda"], "--device cuda"),
    (["--mask-ratio=0.999"], "some of the 32 patches visible"),
    (["--mask-ratio=nan"], "mask_ratio (nan)"),
    (["--steps=0"], "steps (0) must be a number of at least 1"),
    (["--heads=0"], "heads (0)"),
    (["--lr=-1"], "lr (-1.0)"),
    (["--workers=-1"], "workers (-1)"),
    (["--preset=bsae"], "did you mean base?"),
    (["--data={whole_run}/../sunds0"], "sounds0?"),
    (["--init={whole_run}/lost.pt"], "last.pt?"),
])
def test_bad_input_gets_one_line_and_status_2(wrong, says, sounds, whole_run, tmp_path, capsys):
    if torch.cuda.is_available() and wrong == ["--device=cuda"]:
        pytest.skip("there is a CUDA device")
    (tmp_path / "broken").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "a.wav").write_text("no sound")
    places = {"empty": tmp_path / "empty", "broken": tmp_path / "broken", "whole_run": whole_run}
    run = flags(sounds, tmp_path / "out", *(flag.format(**places) for flag in wrong))
    try:
        assert eat.main(run) == 2
    except SystemExit as error:  # argparse's way
        assert error.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]


@pytest.mark.parametrize("main, wrong, says", [
    (eat.main, ["plot", "{empty}"], "log.jsonl: no such file"),
    (eat.main, ["export", "{run}/last.pt", "{run}/last.pt"], "expected a folder"),
    (data.main, ["show", "demo", "--seed=-1"], "at least 0"),
    (data.main, ["show", "demo", "--out={empty}/a.xyz"], "Format 'xyz' is not supported"),
    (data.main, ["bench", "demo", "--frames=0"], "at least 1"),
    (data.main, ["bench", "demo", "--clips=0"], "at least 1"),
    (data.main, ["pack", "{empty}", "{empty}/pack", "--workers=-1"], "at least 0"),
    (finetune.main, ["look", "demo", "--checkpoint={run}/last.pt", "--out={empty}/a.xyz"], "Format 'xyz' is not supported"),
    (finetune.main, ["look", "demo", "--checkpoint={run}/last.pt", "--seed=x"], "invalid number value"),
    (finetune.main, ["embed", "{empty}", "--checkpoint={run}/last.pt", "--workers=-1"], "at least 0"),
    (finetune.main, ["embed", "demo.wav", "--checkpoint={run}/last.pt", "--out={run}/last.pt/x.npz"], "expected a folder"),
    (finetune.main, ["predict", "{empty}", "--checkpoint={run}/last.pt", "--top=0"], "at least 1"),
])
def test_bad_input_to_the_other_commands_too(main, wrong, says, whole_run, tmp_path, capsys):
    try:
        assert main([flag.format(empty=tmp_path, run=whole_run) for flag in wrong]) == 2
    except SystemExit as error:
        assert error.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]


def test_too_little_memory_is_one_line(sounds, tmp_path, capsys):
    assert eat.main(flags(sounds, tmp_path, "--clones=1000000000")) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "out of memory" in said[0] and "fewer --clones" in said[0]


# ---------------------------------------------------------------------------------------------------------
# eat.py: what goes wrong
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_poisoned_batch_leaves_the_weights_untouched(precision):
    config, recipe = EATConfig(**SMALL), Recipe(batch_size=2, lr=1e-3, warmup_steps=0)
    machine = eat.Machine(Recipe(device="cpu", precision=precision))
    model = EAT(config)
    optimizer, scaler = eat.make_optimizer(model, recipe), eat.make_scaler(machine)
    not_finite = eat.NotFinite(machine)

    def step(loudness):
        sound = torch.rand(2, 10_480) * torch.tensor([[1.0], [loudness]]), torch.tensor([10_480, 10_480])
        eat.add_gradients(model, config, recipe, machine, scaler, sound, 0, range(2))
        not_finite.add(eat.update(model, optimizer, scaler, recipe, 1))

    def state():
        parts = model.state_dict()
        for key, moments in optimizer.state_dict()["state"].items():
            parts |= {f"{key}.{name}": value for name, value in moments.items()}
        return {name: value.clone() for name, value in parts.items()}

    step(1.0)
    while not_finite.take():  # the scaler of float16 looks for its scale
        step(1.0)
    before = state()
    step(1e30)
    after = state()
    assert not_finite.take() == 1 and len(before) == len(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    step(1.0)
    assert not_finite.take() == 0 and not torch.equal(state()["student.cls"], before["student.cls"])
    not_finite.check()
    for _ in range(26 if precision == "float16" else 10):
        step(1e30)
    with pytest.raises(eat.TrainingStopped, match="in a row"):
        not_finite.check()


@pytest.mark.parametrize("scale", [2.0**24, 2.0**-40], ids=["overflow", "underflow"])
def test_the_scaler_of_float16_survives(scale):
    config, recipe = EATConfig(**SMALL), Recipe(batch_size=2, lr=1e-3, warmup_steps=0)
    machine = eat.Machine(Recipe(device="cpu", precision="float16"))
    model = EAT(config)
    optimizer, scaler = eat.make_optimizer(model, recipe), torch.amp.GradScaler("cpu", init_scale=scale)
    before, sound = model.student.cls.clone(), (torch.rand(2, 10_480), torch.tensor([10_480, 10_480]))
    for step in range(24):
        eat.add_gradients(model, config, recipe, machine, scaler, sound, step, range(2))
        eat.update(model, optimizer, scaler, recipe, step + 1)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.student.cls, before)


def test_a_clip_that_is_far_too_loud_costs_its_steps_only(sounds, tmp_path, capsys):
    folder = shutil.copytree(sounds, tmp_path / "loud")
    soundfile.write(folder / "loud.wav", np.full(10_000, 1e30) * np.random.default_rng(0).standard_normal(10_000), 16_000, "DOUBLE")
    assert eat.main(flags(folder, tmp_path / "out", "--stats=measure")) == 0
    lines = logged(tmp_path / "out")
    assert 1 <= sum(line["not_finite"] for line in lines) <= 2  # 27 clips, 32 drawn
    assert all((line["loss"] is None) == (line["not_finite"] == 1) for line in lines)
    assert all(x.isfinite().all() for x in weights(tmp_path / "out")[1].values())
    assert "changed nothing" in capsys.readouterr().err


def test_a_run_whose_sound_goes_away_is_saved(sounds, whole_run, tmp_path, capsys):
    folder = shutil.copytree(sounds, tmp_path / "sound")
    process = start("eat.py", *flags(folder, tmp_path / "out", "--steps=100000"))
    wait_for_step(process, tmp_path / "out", 3)
    folder.rename(tmp_path / "unmounted")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "no clip can be used any more" in said and "Traceback" not in said, said
    steps = len((tmp_path / "out" / "log.jsonl").read_text().splitlines())
    assert weights(tmp_path / "out")[0] == steps >= 3  # nothing computed is lost


full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@full_disk
def test_a_full_disk_costs_a_checkpoint_not_the_run(sounds, whole_run, tmp_path, capsys):
    (tmp_path / "last.pt.part").symlink_to("/dev/full")  # the first checkpoint meets it
    assert eat.main(flags(sounds, tmp_path, "--save-every=3")) == 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "No space left" in said[0] and "none yet; going on" in said[0]
    assert_same_weights(tmp_path, whole_run)


def test_a_run_whose_last_checkpoint_cannot_be_saved_says_so(sounds, tmp_path, capsys):
    (tmp_path / "last.pt.part" / "in the way").mkdir(parents=True)
    assert eat.main(flags(sounds, tmp_path)) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "could not save" in said[0] and "--resume" in said[0]
    assert eat.main(flags(sounds, "/dev/null/out")) == 2


@full_disk
def test_the_log_never_loses_a_line(tmp_path):
    path = tmp_path / "log.jsonl"
    spoilt = b'\0\0\0\n{"\xff": 1}\n{"step" 2}\n[2]\n{"step": 1, "lo'  # as after a power failure
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n' + spoilt)
    lines = eat.JsonLines(str(path), lambda line: line["step"] <= 2)
    disk = tmp_path / "disk"
    path.rename(disk)
    path.symlink_to("/dev/full")
    lines.append({"step": 3})
    lines.append({"step": 4})
    path.unlink()
    disk.rename(path)
    lines.append({"step": 5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_deleted_folder_is_made_again(sounds, whole_run, tmp_path):
    out = tmp_path / "out"
    process = start("eat.py", *flags(sounds, out, "--save-every=2", "--workers=1"))
    wait_for_step(process, out, 3)
    shutil.rmtree(out, ignore_errors=True)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in said, said
    assert_same_weights(out, whole_run)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, sounds, whole_run, tmp_path, capsys):
    assert eat.main(flags(sounds, tmp_path, "--save-every=4")) == 0
    path = tmp_path / "last.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    assert eat.main(flags(sounds, tmp_path, "--resume")) == 0
    said = capsys.readouterr()
    assert "going on from" in said.err and "previous.pt" in said.err and "resumed  at step 4" in said.out
    assert_same_weights(tmp_path, whole_run)
    assert (tmp_path / "damaged.pt").exists() and eat.read_checkpoint(tmp_path / "previous.pt")["step"] == 4
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
        except eat.UsageError:
            noticed += 1
            continue
        assert all(torch.equal(state["model"][name], tensor) for name, tensor in whole["model"].items())  # it was padding
        assert state["config"] == whole["config"] and state["step"] == whole["step"]
    assert noticed > 50


@pytest.mark.parametrize("size", [{"embed_dim": 10**9}, {"depth": 10**9}, {"mlp_ratio": 1e9}, {"img_size": [10**12, 128]},
                                  {"num_heads": 10**9}, {"norm_eps": -1.0}, {"embed_dim": "many"}])
def test_absurd_sizes_are_refused_before_memory_is_asked_for(size, whole_run, tmp_path):
    eat.export(whole_run / "last.pt", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **size}))
    with pytest.raises(eat.UsageError, match=re.escape(str(tmp_path))):
        eat.load_encoder(tmp_path)


@pytest.mark.parametrize("main", [eat.main, finetune.main])
def test_a_misspelt_flag_is_answered_with_the_nearest(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--data=demo", "--stepz=3"])
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in said and "did you mean --steps?" in said
    with pytest.raises(SystemExit) as stop:
        data.main(["show", "x.wav", "--sede=1"])
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in said and "--sede=1" in said


def test_a_damaged_checkpoint_is_named(tmp_path):
    whole = io.BytesIO()
    torch.save({"config": {}, "model": {"x": torch.zeros(1000)}}, whole)
    for content in (b"", b"<html>not found</html>", b"PK\x03\x04 cut short", whole.getvalue()[:3000]):
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(eat.UsageError, match="last.pt: not a whole checkpoint"):
            eat.load_encoder(tmp_path / "last.pt")
    (tmp_path / "last.pt").write_bytes(whole.getvalue())
    with pytest.raises(eat.UsageError, match="last.pt: no encoder in it; it has x"):
        eat.load_encoder(tmp_path / "last.pt")
    with pytest.raises(eat.UsageError, match="no such file"):
        eat.load_encoder(tmp_path / "nowhere.pt")


TINY = SHARED / "fixtures/tiny"
FORMATS = ["fairseq_pretrained.pt", "fairseq_finetuned.pt", "hf_pretrained", "hf_finetuned", "hf_finetuned/model.safetensors"]


@fixtures
@pytest.mark.parametrize("name", FORMATS)
def test_the_release_checkpoints_give_its_figures(name):
    expected = torch.load(TINY / "expected.pt", weights_only=True)
    encoder = eat.load_encoder(TINY / name)
    classifier = finetune.load_classifier(TINY / name) if "finetuned" in name else None
    for clip in expected.values():  # of the model's length, half of it, twice it
        torch.testing.assert_close(encoder(clip["spectrogram"]), clip["tokens"], atol=1e-5, rtol=0)
        if classifier:
            torch.testing.assert_close(classifier(clip["spectrogram"]), clip["logits"], atol=1e-5, rtol=0)


@fixtures
def test_a_fairseq_file_brings_student_decoder_and_teacher(sounds, tmp_path):
    model, fixture = eat.load_pretrained(TINY / "fairseq_pretrained.pt"), torch.load(TINY / "pretrain.pt", weights_only=True)
    model.config.utterance_weight = fixture["mask"].shape[0] * fixture["mask"].shape[1]  # the views it is summed over
    losses = model(fixture["spectrogram"], fixture["mask"])
    losses["loss"].backward()
    assert losses["frame_loss"].item() == pytest.approx(fixture["frame_loss"], rel=1e-6)
    assert losses["loss"].item() == pytest.approx(fixture["total_loss"], rel=1e-6)
    for name, p in model.named_parameters():
        want = fixture["teacher" if name.startswith("teacher") else "student"][release_name(name)]
        assert torch.equal(p, want), name
        if p.requires_grad:
            assert relative_error(p.grad, fixture["grads"][release_name(name)]) < 1e-4, name
    # Continued with a learning rate of 0, the student stays what it was and the teacher nears it.
    run = [f"--data={sounds}", f"--out={tmp_path}", f"--init={TINY}/fairseq_pretrained.pt", "--steps=1", "--batch-size=4",
           "--lr=0", "--device=cpu", "--workers=0"]
    assert eat.main(run) == 0
    after = eat.load_pretrained(tmp_path / "last.pt")
    assert after.config.frames == 256 and after.config.clones == 4
    torch.testing.assert_close(after.student.state_dict(), model.student.state_dict())
    model.update_teacher(0.99999)
    torch.testing.assert_close(after.teacher.state_dict(), model.teacher.state_dict())


@fixtures
@pytest.mark.parametrize("name", ["hf_pretrained", "hf_finetuned"])
def test_a_hugging_face_folder_comes_out_as_it_went_in(name, tmp_path):
    assert eat.main(["export", str(TINY / name), str(tmp_path / "out")]) == 0
    ours, theirs = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (tmp_path / "out", TINY / name))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-7, rtol=0)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", TINY / name)]
    assert configs[0] == configs[1]


def test_our_encoder_survives_export(whole_run, tmp_path):
    assert eat.main(["export", str(whole_run / "last.pt"), str(tmp_path / "hf")]) == 0
    ours, back = eat.load_encoder(whole_run / "last.pt"), eat.load_encoder(tmp_path / "hf")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), back.state_dict().values()))
    with pytest.raises(eat.UsageError, match="an encoder alone"):
        eat.load_pretrained(tmp_path / "hf")
    settings = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(settings | {"depth": 10**9}))
    with pytest.raises(eat.UsageError, match="depth 1000000000 .tensors: 2."):
        eat.load_encoder(tmp_path / "hf")
    for absurd in ({"img_size": [16 * 10**9, 128]}, {"img_size": ["x", 128]}, {"num_heads": 10**9}, {"norm_eps": None}):
        (tmp_path / "hf/config.json").write_text(json.dumps(settings | absurd))
        if absurd == {"norm_eps": None}:
            assert eat.load_encoder(tmp_path / "hf").config.norm_eps == 1e-6
            continue
        with pytest.raises(eat.UsageError, match="hf: "):
            eat.load_encoder(tmp_path / "hf")
    (tmp_path / "hf/config.json").unlink()  # sizes from the shapes alone; heads as in base, 64 channels each
    assert (eat.load_encoder(tmp_path / "hf").config.dim, eat.load_encoder(tmp_path / "hf").config.depth) == (32, 2)


def test_what_does_not_fit_is_named(whole_run, tmp_path):
    state = torch.load(whole_run / "last.pt", weights_only=True)
    state["model"]["student.extra"] = torch.zeros(1)
    state["model"]["student.norm.weight"] = torch.zeros(5)
    del state["model"]["student.cls"]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(eat.UsageError, match=r"1 missing \(cls\); 1 unexpected \(extra\); 1 of another shape \(norm.weight \(5,\)"):
        eat.load_encoder(tmp_path / "x.pt")


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stranger:
    pass


def write_zip(path, pickled, storages={}):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, content in storages.items():
            archive.writestr(f"x/data/{name}", content)


@pytest.mark.parametrize("kind", ["os.system", "eval", "getattr", "subprocess", "nested torch.load", "numpy load",
                                  "reach beyond", "negative stride", "wrong storage", "huge storage"])
def test_no_code_in_a_checkpoint_runs(kind, tmp_path, monkeypatch):
    trace, path = tmp_path / "ran", tmp_path / "evil.pt"
    nested = io.BytesIO()
    torch.save(Calls(os.system, f"touch {trace}"), nested)
    rebuild = torch._utils._rebuild_tensor_v2
    evil = {
        "os.system": Calls(os.system, f"touch {trace}"),
        "eval": Calls(eval, f"open({str(trace)!r}, 'w')"),
        "getattr": Calls(getattr, "x", "upper"),
        "subprocess": Calls(subprocess.Popen, ["touch", str(trace)]),
        "nested torch.load": Calls(torch.storage._load_from_bytes, nested.getvalue()),
        "numpy load": Calls(np.load, str(trace)),
        "reach beyond": Calls(rebuild, torch.zeros(4).storage(), 0, (5,), (1,), False, {}),
        "negative stride": Calls(rebuild, torch.zeros(4).storage(), 3, (4,), (-1,), False, {}),
        "wrong storage": Calls(rebuild, "no storage", 0, (4,), (1,), False, {}),
        "huge storage": None,
    }[kind]
    if kind == "huge storage":  # claims more elements than its bytes hold

        class Pickler(pickle.Pickler):
            def persistent_id(self, thing):
                return ("storage", torch.FloatStorage, "0", "cpu", 10**12) if isinstance(thing, Stranger) else None

        buffer = io.BytesIO()
        Pickler(buffer, 2).dump({"cfg": None, "model": {"x": Stranger()}})
        write_zip(path, buffer.getvalue(), {"0": b"\0" * 16})
    else:
        torch.save({"cfg": evil, "model": {"x": torch.zeros(2)}}, path)
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    with pytest.raises(eat.UsageError) as caught:
        eat.load_encoder(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not ran and not trace.exists()


def test_unknown_classes_become_stand_ins_that_keep_their_fields(tmp_path):
    stranger = Stranger()
    stranger.rate, stranger.kind = 0.5, {"a": [1, 2]}
    half = torch.ones(2, dtype=torch.bfloat16)
    torch.save({"cfg": stranger, "x": torch.arange(6.0).view(2, 3).T, "half": half}, tmp_path / "x.pt")
    found = eat.unpickle_inert(tmp_path / "x.pt")
    assert type(found["cfg"]) is not Stranger and found["cfg"].fields == {"rate": 0.5, "kind": {"a": [1, 2]}}
    assert torch.equal(found["x"], torch.arange(6.0).view(2, 3).T) and found["half"].dtype == torch.bfloat16


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit):
        eat.main(["--help"])
    said = capsys.readouterr().out
    for kind in (Recipe, EATConfig):
        assert all("--" + name.replace("_", "-") in said for name in kind.__dataclass_fields__)


def test_nearest_neighbours_by_hand():
    bank = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
    targets = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    scores = eat.nearest_neighbours(bank, targets, torch.tensor([[2.0, 0.0], [-3.0, 0.01]]), k=2)
    assert scores.argmax(1).tolist() == [0, 1]
    scores = eat.nearest_neighbours(bank, targets, torch.tensor([[1.0, 0.1]]), k=4)
    assert scores[0].sum().item() == pytest.approx(0, abs=1e-5)  # the four neighbours lie opposite in pairs


@real_sound
@pytest.mark.parametrize("folder", ["esc10", "pool"])
def test_real_sound_trains(folder, tmp_path):
    run = flags(SHARED / "data" / folder, tmp_path, "--frames=512", "--steps=3", "--stats=measure", "--workers=1")
    assert eat.main(run) == 0
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert -8 < state["config"]["mean"] < -6 and 4.5 < state["config"]["std"] < 6.5


# ---------------------------------------------------------------------------------------------------------
# data.py
# ---------------------------------------------------------------------------------------------------------


def test_fbank_equals_kaldi_for_every_row():
    waveforms = torch.randn(4, 12_345, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 0.1, 1e-3, 0])[:, None]
    waveforms[1] += torch.sin(torch.arange(12_345) * 0.2)
    ours = fbank(waveforms)
    for row, waveform in zip(ours, waveforms):
        kaldi = torchaudio.compliance.kaldi.fbank(
            waveform[None], htk_compat=True, sample_frequency=16000, use_energy=False, window_type="hanning",
            num_mel_bins=128, dither=0, frame_shift=10)
        torch.testing.assert_close(row, kaldi, atol=1e-4, rtol=0)


def test_padding_comes_before_the_normalisation():
    waveform = torch.randn(16_000)
    padded = F.pad(waveform, (0, 24_000))
    x = spectrogram(torch.stack([padded, padded]), torch.tensor([16_000, 40_000]), 256, mean=-4.0, std=3.0)
    assert x.shape == (2, 1, 256, 128)
    torch.testing.assert_close(x[0, 0, :98], (fbank(waveform[None])[0] + 4) / 6)
    assert (x[0, 0, 98:] == 4 / 6).all()  # one second has 98 whole windows
    assert (x[1, 0, 98:248] != 4 / 6).all()  # digital silence is sound; padding is not


def tone(path, rate, seconds=2.0, hertz=440.0, **how):
    t = np.arange(int(rate * seconds)) / rate
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * t), rate, **how)
    return path


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 44_100, 44_101, 47_999, 48_000, 96_000, 192_000])
def test_any_rate_becomes_16_kHz(rate, tmp_path):
    waveform = load_audio(tone(tmp_path / "a.wav", rate))
    assert waveform.dtype == torch.float32 and abs(len(waveform) - 32_000) <= 32_000 * 5e-4 + 1
    want = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(len(waveform)).double() / 16_000).float()
    middle = slice(1000, 5000)  # away from the edges, and before a rounded ratio has drifted far
    torch.testing.assert_close(waveform[middle], want[middle], atol=0.02, rtol=0)


def test_channels_are_averaged_and_formats_agree(tmp_path):
    left, right = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 16_000))
    for name, subtype in (("a.wav", "PCM_16"), ("b.flac", "PCM_24"), ("c.aiff", "PCM_16"), ("d.wav", "DOUBLE")):
        soundfile.write(tmp_path / name, np.stack([left, right], 1), 16_000, subtype)
        torch.testing.assert_close(load_audio(tmp_path / name), torch.from_numpy((left + right) / 2).float(),
                                   atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["text.wav", "empty.wav", "none.wav", "nan.wav", "slow.wav", "nowhere.wav", "folder.wav"])
def test_what_is_no_sound_raises_the_one_error(name, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan] * 500), 16_000, "FLOAT")
    tone(tmp_path / "slow.wav", 7, seconds=100, hertz=1)
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(AudioError, match=name):
        load_audio(tmp_path / name)


def damage(folder, count):
    """`count` damaged files, mutated from real sound where there is some, and some odd but sound ones."""
    rng = np.random.default_rng(0)
    originals = []
    for suffix, kind in (("wav", "PCM_16"), ("wav", "PCM_U8"), ("wav", "PCM_24"), ("wav", "DOUBLE"), ("flac", "PCM_16"),
                         ("ogg", "VORBIS"), ("ogg", "OPUS"), ("mp3", "MPEG_LAYER_III"), ("aiff", "PCM_16"), ("au", "ULAW")):
        for rate, channels in ((16_000, 1), (44_100, 2)):
            path = folder / f"original.{suffix}"
            rate = 48_000 if kind == "OPUS" else rate
            soundfile.write(path, 0.3 * rng.standard_normal((rate // 5, channels)), rate, kind)
            originals.append((suffix, path.read_bytes()))
            path.unlink()
    real = sorted((SHARED / "data").glob("*/audio/*"))[::400]
    originals += [(path.suffix[1:], path.read_bytes()[:60_000]) for path in real]
    for k in range(count):
        suffix, content = originals[k % len(originals)]
        content, way = bytearray(content), rng.integers(6)
        if way == 0:  # cut
            content = content[: rng.integers(len(content))]
        elif way == 1:  # bits flipped anywhere
            for place in rng.integers(len(content), size=rng.integers(1, 50)):
                content[place] ^= 1 << rng.integers(8)
        elif way == 2:  # a header that lies
            for place in rng.integers(min(64, len(content)), size=rng.integers(1, 5)):
                content[place] = rng.integers(256)
        elif way == 3:  # its length, rate or channels, in the wav header's places, as absurd as they come
            place = rng.choice([22, 24, 40])
            content[place : place + 4] = int(rng.choice([2**32 - 1, 2**16 - 1, 1, 0])).to_bytes(4, "little")
        elif way == 4:  # a hole
            content[(place := rng.integers(len(content))) : place + rng.integers(1, 5000)] = b""
        else:  # noise behind the header
            place = rng.integers(100)
            content[place:] = rng.bytes(max(0, len(content) - place))
        (folder / f"{k:04}.{suffix}").write_bytes(content)
    sound = 0.3 * rng.standard_normal(16_000)
    for name, (samples, rate, kind) in {
        "nan.wav": (np.where(np.arange(16_000) == 99, np.nan, sound), 16_000, "FLOAT"), "one hertz.wav": (sound, 1, "PCM_16"),
        "inf.wav": (np.where(np.arange(16_000) == 99, np.inf, sound), 16_000, "DOUBLE"), "none.flac": (sound[:0], 16_000, "PCM_16"),
        "beyond float32.wav": (sound * 1e300, 16_000, "DOUBLE"), "high.wav": (sound, 384_000, "PCM_24"),
        "odd.wav": (sound, 44_101, "PCM_U8"), "many.wav": (np.tile(sound[:, None], 32), 16_000, "PCM_16"),
        "prime.wav": (sound, 999_983, "PCM_16"), "one sample.wav": (sound[:1], 16_000, "PCM_16"),
        "line\nbreak.wav": (sound, 16_000, "PCM_16"),
    }.items():
        soundfile.write(folder / name, samples, rate, kind)
    soundfile.write(os.fsencode(folder) + b"/not utf-8 \xff.wav", sound, 16_000)
    (folder / "text.wav").write_text("This is not sound.")
    (folder / "nothing.wav").touch()
    (folder / "folder.wav").mkdir()
    (folder / "dangling.wav").symlink_to(folder / "nowhere.wav")
    os.mkfifo(folder / "pipe.wav")


CORPUS = """
import collections, resource, sys, torch, data
folder = sys.argv[1]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
torch.set_num_threads(1)
before, read, refused = peak(), 0, collections.Counter()
for path in [*data.find_audio(folder), folder + "/folder.wav"]:
    try:
        waveform = data.load_audio(path)
    except data.AudioError as error:
        assert error.path == path and "\\n" not in str(error), str(error)
        str(error).encode()
        refused[error.reason] += 1
    else:
        assert waveform.dtype == torch.float32 and waveform.ndim == 1 and len(waveform) and waveform.isfinite().all()
        read += 1
print(read, sum(refused.values()), peak() - before)
print(refused.most_common(8), file=sys.stderr)
"""


def test_a_thousand_damaged_files_harm_nothing(tmp_path, capfd):
    folder = tmp_path / "corpus"
    folder.mkdir()
    damage(folder, 1000)
    said = subprocess.run([sys.executable, "-c", CORPUS, str(folder)], cwd=HERE, capture_output=True, text=True, timeout=240)
    assert said.returncode == 0, said.stderr
    read, refused, memory = map(int, said.stdout.split())
    assert read > 100 and refused > 100 and read + refused == 1017 and memory < 500, said  # MiB

    clips = open_clips(str(folder), 64)  # every clip, by hand: which files have something wrong with them?
    broken = set(clips.skipped)
    for k in range(len(clips)):
        try:
            clips.usable(k)
        except AudioError as error:
            broken.add(error.path)
    run = flags(folder, tmp_path / "out", "--epochs=1", "--batch-size=32", "--log-every=5", "--workers=1")
    assert eat.main([flag for flag in run if flag != "--steps=8"]) == 0
    lines = logged(tmp_path / "out")
    said = " ".join(line for line in capfd.readouterr().err.splitlines() if " so far; new: " in line)
    named = re.findall(rf"{folder}/(\S+) \(", said)  # each once, when it is met
    assert len(named) == len(set(named)) > 3
    assert lines[-1]["skipped"] == len(broken) > 100 and not {"nan.wav", "pipe.wav"} - {Path(path).name for path in broken}
    assert all(x.isfinite().all() for x in weights(tmp_path / "out")[1].values())


def test_a_long_file_becomes_clips_that_hold_all_of_it(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 100_000)
    soundfile.write(tmp_path / "long.wav", samples, 16_000, "FLOAT")
    clips = open_clips(str(tmp_path), 128)
    assert len(clips) == math.ceil(100_000 / clips.samples)
    whole = torch.from_numpy(samples).float()
    seen = torch.zeros(100_000, dtype=torch.bool)
    for k in range(len(clips)):
        start = round(clips.start[k] * 16_000)
        torch.testing.assert_close(clips.read(k), whole[start : start + clips.samples])
        seen[start : start + clips.samples] = True
    assert seen.all()


def test_a_path_is_a_folder_a_file_or_a_list(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    a, b = tone(tmp_path / "a.WAV", 16_000), tone(tmp_path / "deep" / "er" / "b.flac", 16_000)
    (tmp_path / "notes.md").write_text("not sound")
    (tmp_path / "deep" / "up").symlink_to(tmp_path)  # in a circle
    (tmp_path / "twice").symlink_to(tmp_path / "deep")
    (tmp_path / "list.txt").write_text("a.WAV\n\ndeep/er/b.flac\nmissing.wav\n")
    (tmp_path / "train.tsv").write_text(f"{tmp_path}\na.WAV\t32000\ndeep/er/b.flac\t32000\n")
    both = [str(a), str(b)]
    assert data.find_audio(str(tmp_path)) == both
    assert data.find_audio(str(tmp_path / "train.tsv")) == both
    assert data.find_audio(str(a)) == [str(a)]
    clips = open_clips(str(tmp_path / "list.txt"), 256)
    assert clips.paths == both and list(clips.skipped) == [str(tmp_path / "missing.wav")]


def test_unusable_clips_give_way_to_the_next_and_are_named(tmp_path):
    for k in range(4):
        tone(tmp_path / f"{k}.wav", 16_000, seconds=1, hertz=100 * (k + 1))
    soundfile.write(tmp_path / "1.wav", np.full(16_000, 0.25), 16_000)
    clips = open_clips(str(tmp_path), 128)
    (tmp_path / "2.wav").unlink()  # after the headers were read
    waveforms, lengths, _, skipped = clips.__getitems__([0, 1])
    torch.testing.assert_close(waveforms[1, :16_000], clips.usable(3))
    assert lengths.tolist() == [16_000] * 2
    assert {Path(path).name for path in skipped} == {"1.wav", "2.wav"} and skipped[str(tmp_path / "1.wav")] == "silent"
    for k in (0, 3):
        (tmp_path / f"{k}.wav").unlink()
    waveforms, *_, skipped = clips.__getitems__([0])
    assert len(waveforms) == 0 and len(skipped) == 4


def test_measured_statistics_leave_the_padding_out(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 20_000), 16_000, "FLOAT")
    x = fbank((load_audio(tmp_path / "a.wav") - load_audio(tmp_path / "a.wav").mean())[None])
    mean, std = data.measure_stats(open_clips(str(tmp_path), 1024))
    assert mean == pytest.approx(x.mean().item(), abs=1e-3) and std == pytest.approx(x.std().item(), abs=1e-3)


def test_the_demo_is_made_from_its_seed():
    demo, same, other, held_out = (data.Demo(128, *arguments) for arguments in ((0,), (0,), (1,), (0, 4000, True)))
    assert torch.equal(demo.read(5), same.read(5))
    assert not any(torch.equal(demo.read(5), x.read(5)) for x in (other, held_out))
    assert len(demo.classes) >= 10 and demo.read(5).isfinite().all()


def test_the_demo_classes_do_not_differ_in_mean_spectrum():
    """Nearest neighbours on each mel band's mean power stay near chance (8 %), so features must see movement."""
    demo = data.Demo(256, seed=0, size=360, held_out=True)
    waveforms, *_ = demo.__getitems__(range(360))
    means, labels = fbank(waveforms).exp().mean(1).log(), torch.as_tensor(demo.labels)
    scores = eat.nearest_neighbours(means[:240], F.one_hot(labels[:240]).float(), means[240:])
    assert (scores.argmax(1) == labels[240:]).float().mean() < 0.25


def pack(source, out):
    assert data.main(["pack", str(source), str(out), "--workers=0"]) == 0
    return data.Pack(str(out))


@pytest.fixture
def several(tmp_path):
    """16-bit, float over 1, another rate, stereo; one broken, one empty, one with a strange name."""
    folder = tmp_path / "several"
    folder.mkdir()
    rng = np.random.default_rng(0)
    soundfile.write(folder / "a.wav", rng.integers(-32768, 32768, 50_000).astype(np.int16), 16_000)
    soundfile.write(folder / "b.wav", rng.uniform(-3, 3, 9000), 16_000, "FLOAT")
    soundfile.write(folder / "c.flac", rng.uniform(-0.5, 0.5, (44_100, 2)), 44_100)
    (folder / "d.wav").write_text("no sound")
    soundfile.write(folder / "e.wav", np.zeros(0), 16_000)
    soundfile.write(os.fsencode(folder) + b"/f\n\xff.wav", rng.uniform(-0.5, 0.5, 20_000), 16_000)
    return folder


def test_a_pack_holds_what_the_files_hold(several, tmp_path, capsys):
    packed = pack(several, tmp_path / "pack")
    names = [packed.name(k) for k in range(6)]
    assert names == data.find_audio(str(several))
    assert torch.equal(packed.read(0), torch.from_numpy(soundfile.read(names[0], dtype="int16")[0]))  # bit by bit
    for k in (1, 2, 5):
        within = 0.51 * max(1, load_audio(names[k]).abs().max()) / 32768  # half a step of 16 bits of its peak
        torch.testing.assert_close(data.as_float(packed.read(k)), load_audio(names[k]), atol=within, rtol=0)
    assert packed.read(1).dtype == torch.float32 and packed.read(2).dtype == torch.int16
    assert list(packed.skipped) == [names[3], names[4]] and packed.lengths[3] == packed.lengths[4] == 0
    assert "skipped 2" in capsys.readouterr().out
    flat = np.memmap(tmp_path / "pack" / "samples", "<i2", mode="r")  # a plain file of samples, for whoever wants one
    assert len(flat) == packed.lengths.sum() and (flat[:50_000] == packed.read(0).numpy()).all()


def test_clips_of_a_pack_are_those_of_its_files(several, tmp_path):
    pack(several, tmp_path / "pack")
    clips, files = open_clips(str(tmp_path / "pack"), 128), open_clips(str(several), 128)
    assert len(clips) == len(files) == 6 and clips.skipped.keys() == files.skipped.keys()
    numbers = [0, 1, 2, 5]
    (waveforms, lengths, *_), (wanted, wanted_lengths, *_) = clips.__getitems__(numbers), files.__getitems__(numbers)
    assert waveforms.dtype == torch.int16 and torch.equal(lengths, wanted_lengths)
    assert torch.equal(waveforms[:3] / 32768, wanted[:3])  # 16 kHz and 16 bits: the same sound
    shape = (128, -4.268, 4.569)
    torch.testing.assert_close(spectrogram(waveforms[:3], lengths[:3], *shape), spectrogram(wanted[:3], lengths[:3], *shape))
    (mixed, *_), (wanted, *_) = clips.__getitems__([0, 3]), files.__getitems__([0, 3])  # one of them is scaled, so all are floats
    torch.testing.assert_close(mixed, wanted, atol=3 / 32768, rtol=0)


def test_packing_goes_on_where_it_was_stopped(several, tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pack(several, whole)
    monkeypatch.setattr(data, "load_audio", lambda path, read=load_audio: read(path) if path < f"{several}/c" else 1 / 0)
    monkeypatch.setattr(data, "PACK_BATCH", 1)
    with pytest.raises(ZeroDivisionError):
        data.pack(str(several), str(cut), 0)
    assert eat.main(flags(cut, tmp_path / "out")) == 2
    assert "2 of 6 files are packed" in capsys.readouterr().err
    monkeypatch.undo()
    for name in ("samples", "names", "skipped.jsonl"):  # killed between these and the index
        with open(cut / name, "ab") as file:
            file.write(b"half a file")
    pack(several, cut)
    for name in ("samples", "names", "index", "pack.json", "skipped.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    (several / "a.wav").unlink()
    assert data.main(["pack", str(several), str(cut)]) == 2
    assert data.main(["pack", str(several), str(several)]) == 2
    assert [end in line for end, line in zip(("of other files", "not empty"), capsys.readouterr().err.splitlines())] == [True] * 2


def test_a_pack_that_breaks_costs_its_clips(several, tmp_path):
    pack(several, tmp_path / "pack")
    clips = open_clips(str(tmp_path / "pack"), 128)
    os.truncate(tmp_path / "pack" / "samples", 2 * 40_000)
    waveforms, lengths, numbers, skipped = clips.__getitems__([0, 5])
    assert numbers.tolist() == [0, 0] and "samples: ends before the index" in next(iter(skipped.values()))


def test_training_on_a_pack_is_training_on_its_files(whole_run, sounds, tmp_path):
    pack(sounds, tmp_path / "pack")
    assert eat.main(flags(tmp_path / "pack", tmp_path / "out")) == 0
    assert_same_weights(tmp_path / "out", whole_run)


def test_two_million_packed_clips_take_little_memory(tmp_path):
    """A pack of 2,000,000 clips of 10 s, its samples a hole of 640 GB."""
    count, folder = 2_000_000, tmp_path / "pack"
    folder.mkdir()
    rows = np.zeros(count, data.INDEX_ROW)
    rows["samples"], rows["name"], rows["unit"] = np.arange(1, count + 1) * 160_000, np.arange(1, count + 1) * 8, 1 / 32768
    rows.tofile(folder / "index")
    np.char.mod("%08d", np.arange(count)).astype("S8").tofile(folder / "names")
    (folder / "skipped.jsonl").touch()
    (folder / "pack.json").write_text(json.dumps({"root": "/sound", "source": "/sound", "files": count}))
    try:
        with open(folder / "samples", "wb") as file:
            file.truncate(count * 320_000)
    except OSError:
        pytest.skip("no file of 640 GB here, not even one with a hole")
    said = subprocess.run([sys.executable, "-c", f"""
import resource, data, eat
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
clips = data.open_clips({str(folder)!r}, 1024)
order = eat.shuffled(len(clips), 0)(3)
assert len(clips) == len(order) == 2_000_000 and clips.name(1_234_567) == "/sound/01234567"
assert not clips.read(1_999_999).any()
print(peak() - before)"""], cwd=HERE, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert int(said.stdout) < 300  # MiB


def test_bench_reads_files_and_packs(several, tmp_path, capsys):
    pack(several, tmp_path / "pack")
    for path, parts in ((several, {"decode", "resample", "fbank", "loader"}), (tmp_path / "pack", {"read", "fbank", "loader"})):
        assert data.main(["bench", str(path), "--frames=128", "--clips=40"]) == 0
        assert set(json.loads(capsys.readouterr().out.splitlines()[-1])["clips_per_second"]) == parts


def test_show_draws_a_picture(tmp_path, capsys):
    assert data.main(["show", str(tone(tmp_path / "a.wav", 16_000)), "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    figure, axes = data.pyplot().subplots()
    data.draw_spectrogram(axes, np.zeros((128, 100)))
    banks, centres = torchaudio.compliance.kaldi.get_mel_banks(128, 512, 16_000, 20.0, 0.0, 100.0, -500.0, 1.0)
    for place, hertz in zip(axes.get_yticks(), [125, 500, 1000, 2000, 4000]):  # bin k is drawn from k to k + 1
        assert np.interp(hertz, centres.flatten(), np.arange(128) + 0.5) == pytest.approx(place, abs=0.05)
    assert data.main(["show", str(tmp_path / "nowhere.wav")]) == 2
    assert "no such file" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# data.py: labelled data sets
# ---------------------------------------------------------------------------------------------------------


def make_esc(folder, folds=(1, 2), esc10=("True", "False")):
    """ESC-50's layout: two classes, of which the first is in ESC-10; two clips a class and fold, easy to tell apart."""
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in folds:
        for k, (target, name) in enumerate(((41, "chainsaw"), (7, "rooster"))):
            for take in "AB":
                file = f"{fold}-{fold}{k}-{take}-{target}.wav"
                tone(folder / "audio" / file, 16_000, seconds=0.7, hertz=(300, 2500)[k] + 20 * fold + 5 * (take == "A"))
                rows.append(f"{file},{fold},{target},{name},{esc10[k]},0,{take}")
    (folder / "meta" / "esc50.csv").write_text("\n".join(rows))
    return folder


def test_esc_folders_have_folds(tmp_path):
    esc = data.open_labelled(str(make_esc(tmp_path / "esc")), 64)
    assert (esc.kind, len(esc.clips), esc.classes, esc.multi_label) == ("ESC-50", 8, ["rooster", "chainsaw"], False)
    assert list(esc.folds) == ["fold 1", "fold 2"]
    for k, (train, test) in enumerate(esc.folds.values(), 1):
        assert all(Path(esc.clips.name(n)).name.startswith(f"{k}-") for n in test.tolist())
        assert sorted(train.tolist() + test.tolist()) == list(range(8))
    for n in range(8):
        assert esc.classes[esc.targets([n])[0].argmax()] == ("chainsaw" if "-41.wav" in esc.clips.name(n) else "rooster")
    only = data.open_labelled(str(tmp_path / "esc"), 64, esc10=True)
    assert (only.kind, len(only.clips), only.classes) == ("ESC-10", 4, ["chainsaw"])


def test_labels_without_clips_and_clips_without_labels_are_named(tmp_path):
    folder = make_esc(tmp_path / "esc")
    os.remove(folder / "audio" / "1-10-A-41.wav")
    tone(folder / "audio" / "stray.wav", 16_000)
    esc = data.open_labelled(str(folder), 64)
    assert len(esc.clips) == 7 and len(esc.notes) == 3 and "no clips of fold 3, 4, 5" in esc.notes[2]
    assert "1 labels have no clip" in esc.notes[0] and "1-10-A-41.wav" in esc.notes[0]
    assert "1 clips have no label" in esc.notes[1] and "stray.wav" in esc.notes[1]


def test_a_broken_clip_is_never_replaced_by_one_of_another_fold(tmp_path):
    esc = data.open_labelled(str(make_esc(tmp_path / "esc")), 64)
    broken = esc.folds["fold 2"][0][-1].item()  # the last to train on, before the clips of the test fold
    Path(esc.clips.name(broken)).write_text("no sound")
    waveforms, _, numbers, skipped = esc.clips.__getitems__([broken - 1, broken])
    assert numbers.tolist() == [broken - 1] and len(waveforms) == 1 and list(skipped) == [esc.clips.name(broken)]


def test_speech_commands_has_its_lists(tmp_path):
    for word in ("bed", "cat", "_background_noise_"):
        (tmp_path / word).mkdir()
        for k in range(3):
            tone(tmp_path / word / f"{k}.wav", 16_000, seconds=0.5)
    (tmp_path / "validation_list.txt").write_text("bed/0.wav\ncat/0.wav\n")
    (tmp_path / "testing_list.txt").write_text("bed/1.wav\ncat/1.wav\n")
    speech = data.open_labelled(str(tmp_path), 64)
    assert (speech.kind, speech.classes, len(speech.clips)) == ("Speech Commands", ["bed", "cat"], 6)
    train, test = ([Path(speech.clips.name(n)).name for n in part.tolist()] for part in speech.folds["test list"])
    assert train == ["2.wav"] * 2 and test == ["1.wav"] * 2


def make_manifests(folder, weights=True):
    """The release's manifests: three labels, several a clip."""
    folder.mkdir()
    for k in range(6):
        tone(folder / f"{k}.wav", 16_000, seconds=0.7, hertz=300 * (k + 1))
    (folder / "label_descriptors.csv").write_text("0,/m/a,A\n1,/m/b,B\n2,/m/c,C\n")
    for part, clips in (("train", range(4)), ("eval", (4, 5))):
        (folder / f"{part}.tsv").write_text("\n".join([str(folder), *(f"{k}.wav\t11200" for k in clips)]))
        (folder / f"{part}.lbl").write_text("\n".join(f"{k}\t{'/m/b,/m/a' if k % 2 else '/m/a'}" for k in clips))
    if weights:
        (folder / "weight_train_all.csv").write_text("0\n0\n1\n3\n")
    return folder


def test_manifests_have_several_labels_a_clip(tmp_path):
    audioset = data.open_labelled(str(make_manifests(tmp_path / "as")), 64)
    assert audioset.multi_label and audioset.classes == ["/m/a", "/m/b", "/m/c"]
    assert audioset.targets([2, 3]).tolist() == [[1, 0, 0], [1, 1, 0]]
    train, test = audioset.folds["eval"]
    assert (train.tolist(), test.tolist()) == ([0, 1, 2, 3], [4, 5])
    drawn = finetune.training_order(train, audioset, FineTune(weighted=True), seed=0)(0)
    assert len(drawn) == 200_000 and set(drawn.tolist()) == {2, 3}
    assert (drawn == 3).float().mean().item() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"a\n", b"a,b\nc,d\n", b"index,mid,name\n", b"-1\n0\n1\n3\n"])
def test_lists_of_labels_in_another_form_are_one_line(content, tmp_path):
    lists = [make_esc(tmp_path / "esc") / "meta" / "esc50.csv"]
    folder = make_manifests(tmp_path / "as")
    lists += [folder / name for name in ("train.tsv", "train.lbl", "eval.lbl", "label_descriptors.csv", "weight_train_all.csv")]
    for path in lists:
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(AudioError) as error:
            data.open_labelled(str(tmp_path / ("esc" if path is lists[0] else "as")), 64)
        assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)
        path.write_bytes(before)
    assert len(data.open_labelled(str(folder), 64).clips) == 6  # only the lists were at fault


def test_folders_of_classes_with_and_without_parts(tmp_path):
    for part in ("train", "test"):
        for name in ("one", "two"):
            (tmp_path / "parts" / part / name).mkdir(parents=True)
            tone(tmp_path / "parts" / part / name / "a.wav", 16_000)
    parts = data.open_labelled(str(tmp_path / "parts"), 64)
    assert parts.classes == ["one", "two"] and [len(x) for x in parts.folds["test"]] == [2, 2]
    for name, count in (("many", 10), ("few", 2)):
        (tmp_path / "flat" / name).mkdir(parents=True)
        for k in range(count):
            tone(tmp_path / "flat" / name / f"{k}.wav", 16_000, seconds=0.1)
    flat, again = (data.open_labelled(str(tmp_path / "flat"), 64, seed=1) for _ in range(2))
    ((train, test),), ((_, same),) = flat.folds.values(), again.folds.values()
    assert torch.equal(test, same) and flat.targets(test.tolist()).sum(0).tolist() == [1, 2]
    assert not set(train.tolist()) & set(test.tolist()) and len(train) + len(test) == 12


def test_what_is_no_labelled_data_set_says_so(tmp_path):
    tone(tmp_path / "a.wav", 16_000)
    with pytest.raises(AudioError, match="no labelled data set"):
        data.open_labelled(str(tmp_path), 64)
    with pytest.raises(AudioError, match="no such folder"):
        data.open_labelled(str(tmp_path / "nowhere"), 64)
    with pytest.raises(AudioError, match="one fold"):
        data.open_labelled(str(make_esc(tmp_path / "esc", folds=(2,))), 64)


# ---------------------------------------------------------------------------------------------------------
# finetune.py
# ---------------------------------------------------------------------------------------------------------


def slow_average_precision(scores, targets):
    """The mean over the positives of the share of positives among all clips that score no lower."""
    found = [np.mean(targets[scores >= score]) for score in scores[targets > 0]]
    return np.mean(found) if found else np.nan


def test_average_precision_by_hand_with_ties_and_against_a_slow_version():
    by_hand = average_precision(np.array([[0.9, 1], [0.8, 1], [0.7, 1], [0.6, 1]]), np.array([[1, 1], [0, 0], [1, 0], [0, 0]]))
    assert by_hand.tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 4])  # all equal: the share of positives
    assert np.isnan(average_precision(np.ones((3, 1)), np.zeros((3, 1)))[0])
    rng = np.random.default_rng(0)
    scores, targets = rng.integers(0, 6, (50, 20)) / 5, rng.random((50, 20)) < 0.2
    slow = [slow_average_precision(scores[:, k], targets[:, k]) for k in range(20)]
    np.testing.assert_allclose(average_precision(scores, targets), slow)


def test_results_leave_out_classes_without_positives_and_say_so():
    scores, targets = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5]]), torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    result = finetune.evaluate(scores, targets, ["a", "b", "c"], multi_label=True)
    assert result["value"] == 1.0 and result["per_class"]["c"] is None and "1 classes have no positive" in result["note"]
    result = finetune.evaluate(scores, torch.tensor([[1.0, 0, 0], [1, 0, 0]]), ["a", "b", "c"], multi_label=False)
    assert result["value"] == 0.5 and result["confusion"] == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert result["per_class"] == {"a": 0.5, "b": None, "c": None}


def test_layers_learn_at_the_rates_of_the_formula():
    model = Classifier(Encoder(EATConfig(**{**SMALL, "depth": 3})), ["a", "b"], drop_path=0.1)
    groups = finetune.make_optimizer(model, FineTune()).param_groups
    scale = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        want = 0.65 ** (3 + 1 - (int(name.split(".")[2]) + 1)) if ".blocks." in name else 1.0
        assert scale[id(p)] == (pytest.approx(want), 0.05 if p.ndim > 1 else 0.0), name
    assert [block.drop_path for block in model.encoder.blocks] == pytest.approx([0, 0.05, 0.1])
    recipe = FineTune(steps=100)
    assert [recipe.learning_rate(n) for n in (1, 10, 55, 100)] == pytest.approx([5e-6, 5e-5, (5e-5 + 1e-6) / 2, 1e-6])


def test_drop_path_skips_whole_clips_and_keeps_the_mean():
    block = eat.Block(EATConfig(**SMALL))
    block.drop_path = 0.25
    x = block.dropped(torch.ones(4000, 3, 2))
    assert x.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (x == x[:, :1, :1]).all() and x.mean().item() == pytest.approx(1, abs=0.05)
    assert (block.eval().dropped(torch.ones(4, 3, 2)) == 1).all()


def test_mixup_is_one_lambda_with_the_flipped_batch():
    x, targets = torch.randn(4, 1, 16, 128), torch.eye(4)
    mixed, labels = finetune.mixup(x, targets, 0.8, np.random.default_rng(0))
    share = labels[0, 0].item()
    assert share == pytest.approx(np.random.default_rng(0).beta(0.8, 0.8))
    torch.testing.assert_close(mixed[1], share * x[1] + (1 - share) * x[2])
    torch.testing.assert_close(labels[3], share * targets[3] + (1 - share) * targets[0])


def test_spec_augment_masks_one_band_and_one_stretch_a_clip():
    x = finetune.spec_augment(torch.ones(200, 1, 64, 128), 0.4, np.random.default_rng(0))[:, 0] == 0
    for masked, size in ((x.all(1), 128), (x.all(2), 64)):
        edges = masked.int().diff(dim=1, prepend=torch.zeros(200, 1), append=torch.zeros(200, 1)).abs().sum(1)
        assert (edges <= 2).all()  # one piece
        widths = masked.sum(1).float()
        assert 0.36 * size < widths.max() <= 0.4 * size + 1 and widths.mean().item() == pytest.approx(0.2 * size, rel=0.15)
    assert (x == (x.all(1)[:, None, :] | x.all(2)[:, :, None])).all()


def test_roll_and_gain_move_each_clip_within_itself():
    waveforms = torch.zeros(3, 10)
    waveforms[:, :6] = torch.arange(1.0, 7)
    lengths = torch.tensor([6, 6, 6])
    rolled = finetune.roll_and_gain(waveforms, lengths, np.random.default_rng(1))
    assert (rolled[:, 6:] == 0).all()
    for row in rolled:
        gain = row.sum() / 21
        assert 0.5 < gain < 1.5
        shift = int((row / gain).round().argmin())
        order = (row[:6] / gain).round()
        assert (order.roll(-int(order.argmin())) == torch.arange(1.0, 7)).all(), shift
    assert len({tuple(row.div(row.sum()).tolist()) for row in rolled}) > 1


def test_noise_is_small_and_frames_roll_by_up_to_ten():
    x = torch.zeros(50, 1, 64, 128)
    x[:, :, 30] = 10
    y = finetune.add_noise_and_roll(x, np.random.default_rng(0))[:, 0]
    moved = y.mean(2).argmax(1) - 30
    assert moved.abs().max() <= 10 and len(moved.unique()) > 8
    assert 0 <= (y % 10).min() and y.sort(1).values[:, :-1].max() < 0.1


def test_linear_probe_reaches_the_optimum():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    x[:, 0] += labels
    targets = F.one_hot(labels).float()
    scores = finetune.linear_scores(x, targets, x, 1.0, multi_label=False)
    z = ((x - x.mean(0)) / x.std(0)).double()
    weight = torch.linalg.lstsq(torch.cat([z, torch.ones(60, 1)], 1), scores).solution[:5]
    # At the optimum the loss's gradient on the weights balances the penalty's, and that on the bias is zero.
    residual = scores.softmax(1) - targets
    torch.testing.assert_close(z.T @ residual, -weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(residual.sum(0), torch.zeros(3).double(), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def esc(tmp_path_factory):
    return make_esc(tmp_path_factory.mktemp("labelled") / "esc")


def test_mel_statistics_leave_the_padding_out(esc):
    short = data.open_labelled(str(esc), 128)  # 0.7 s in clips of 1.28 s
    machine = eat.Machine(FineTune(device="cpu", workers=0))
    found = finetune.mel_statistics(short, EATConfig(**{**SMALL, "frames": 128}), machine)
    x = (fbank(short.clips.usable(3)[None])[0] + 4.268) / (2 * 4.569)
    torch.testing.assert_close(found[3], torch.cat([x.mean(0), x.std(0, unbiased=False)]), atol=1e-4, rtol=1e-4)


FINE = ["--steps=2", "--batch-size=4", "--device=cpu", "--precision=float32", "--workers=0", "--log-every=1"]


def fine(dataset, out, *more):
    return finetune.main([f"--data={dataset}", f"--out={out}", *FINE, *more])


@pytest.mark.parametrize("recipe", list(finetune.RECIPES))
def test_every_recipe_trains_and_tests(recipe, whole_run, esc, tmp_path):
    dataset = make_manifests(tmp_path / "as", weights=recipe == "as2m") if recipe.startswith("as") else esc
    out = tmp_path / "out"
    assert fine(dataset, out, f"--recipe={recipe}", f"--checkpoint={whole_run}/last.pt", "--frames=64") == 0
    results = json.loads((out / "results.json").read_text())
    row = finetune.RECIPES[recipe]
    assert all(results["recipe"][k] == v for k, v in row.items() if k not in ("steps", "batch_size", "frames"))
    for result in results["results"]["fine-tuned"].values():
        assert 0 <= result["value"] <= 1 and len(result["per_class"]) == (3 if recipe.startswith("as") else 2)
    assert (out / "confusion.png").exists() != recipe.startswith("as")


def test_fine_tuning_learns_and_the_classifier_predicts(esc, whole_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert fine(esc, out, f"--checkpoint={whole_run}/last.pt", "--steps=60", "--lr=3e-3", "--frames=64", "--layer-decay=1",
                "--fold=1") == 0
    assert "fold 1: accuracy 100.0%" in capsys.readouterr().out
    clip = str(esc / "audio" / "1-10-A-41.wav")
    assert finetune.main(["predict", clip, f"--checkpoint={out}/last.pt", "--json", "--device=cpu"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["clip"] == clip and row["labels"][0]["label"] == "chainsaw"
    assert sum(label["probability"] for label in row["labels"]) == pytest.approx(1, abs=1e-3)
    assert finetune.main(["predict", str(esc), f"--checkpoint={out}/last.pt", "--top=1", "--device=cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("%  chainsaw") == said.count("%  rooster") == 4
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n1,/m/b,Saw\n0,/m/a,\"Bird, big\"\n")
    for content in ((tmp_path / "labels.csv").read_text(), "Bird, big\nSaw\n"):
        (tmp_path / "labels.csv").write_text(content)
        assert finetune.main(["predict", clip, f"--checkpoint={out}/last.pt", f"--labels={tmp_path}/labels.csv"]) == 0
        said = capsys.readouterr().out
        assert "%  Saw" in said and "%  Bird, big" in said
    (tmp_path / "labels.csv").write_text("Saw")
    assert finetune.main(["predict", clip, f"--checkpoint={out}/last.pt", f"--labels={tmp_path}/labels.csv"]) == 2
    model = finetune.load_classifier(out / "last.pt")
    assert eat.main(["export", str(out / "last.pt"), str(tmp_path / "hf")]) == 0
    back = finetune.load_classifier(tmp_path / "hf")
    assert (back.classes, back.multi_label, back.encoder.config.mean) == (["rooster", "chainsaw"], False, -6.627)
    torch.testing.assert_close(back(torch.ones(1, 1, 64, 128)), model(torch.ones(1, 1, 64, 128)))
    torch.testing.assert_close(eat.load_encoder(out / "last.pt").state_dict(), model.encoder.state_dict())


def test_fine_tuning_resumes_exactly_across_folds(esc, whole_run, tmp_path):
    run = [f"--checkpoint={whole_run}/last.pt", "--frames=64", "--steps=6"]
    assert fine(esc, tmp_path / "whole", *run) == 0
    process = start("finetune.py", f"--data={esc}", f"--out={tmp_path}/cut", *FINE, *run, "--save-every=1")
    while process.poll() is None:
        path = tmp_path / "cut" / "log.jsonl"
        if path.exists() and '"fold 2", "step": 3' in path.read_text():
            process.kill()
            break
        time.sleep(0.005)
    process.communicate()
    assert fine(esc, tmp_path / "cut", *run, "--resume", "--workers=1") == 0
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    results = [json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("cut", "whole")]
    assert results[0] == results[1]


@linux
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_fine_tuning_that_is_told_to_stop_resumes_exactly(number, status, esc, whole_run, tmp_path):
    run = [f"--checkpoint={whole_run}/last.pt", "--frames=64", "--steps=12"]
    assert fine(esc, tmp_path / "whole", *run) == 0
    process = start("finetune.py", f"--data={esc}", f"--out={tmp_path}/cut", *FINE, *run, "--workers=2")
    wait_for_step(process, tmp_path / "cut", 14)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status and "--resume" in said and "Traceback" not in said, said
    assert not left_over(f"{tmp_path}/cut")
    assert fine(esc, tmp_path / "cut", *run, "--resume") == 0
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    logs = [logged(tmp_path / name) for name in ("cut", "whole")]
    assert logs[0] == logs[1] and len(logs[0]) == 24


@slow
def test_ten_kills_of_fine_tuning_change_nothing(esc, whole_run, tmp_path):
    rng, kills = np.random.default_rng(0), 0
    run = [f"--checkpoint={whole_run}/last.pt", "--frames=64", "--steps=150", "--save-every=1"]
    while kills < 10:
        process = start("finetune.py", f"--data={esc}", f"--out={tmp_path}/cut", *FINE, *run, "--resume")
        log = tmp_path / "cut" / "log.jsonl"
        before = log.stat().st_mtime if log.exists() else 0
        while kills % 4 and process.poll() is None and not (log.exists() and log.stat().st_mtime > before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 1 if kills % 4 else 4))
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        process.communicate()
        kills += 1
    assert fine(esc, tmp_path / "cut", *run, "--resume") == 0 and fine(esc, tmp_path / "whole", *run) == 0
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    results = [json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("cut", "whole")]
    assert results[0] == results[1]


def test_a_poisoned_batch_costs_fine_tuning_its_step(whole_run, tmp_path, capsys):
    folder = make_esc(tmp_path / "esc")
    soundfile.write(folder / "audio" / "1-10-A-41.wav", np.random.default_rng(0).standard_normal(11_200) * 1e30, 16_000, "DOUBLE")
    assert fine(folder, tmp_path / "out", f"--checkpoint={whole_run}/last.pt", "--frames=64", "--steps=4", "--batch-size=2") == 0
    lines = logged(tmp_path / "out")
    assert 1 <= sum(line["not_finite"] for line in lines) < 8
    assert all((line["loss"] is None) == line["not_finite"] for line in lines)
    assert all(x.isfinite().all() for x in weights(tmp_path / "out")[1].values())


@pytest.mark.parametrize("mode", ["linear", "knn"])
def test_frozen_features_are_probed(mode, esc, whole_run, tmp_path, capsys):
    assert fine(esc, tmp_path / "out", f"--checkpoint={whole_run}/last.pt", f"--mode={mode}", "--neighbours=1", "--frames=64") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert set(results) == {"CLS", "mean of patches", "no network"}
    assert all(result["value"] == 1.0 for result in results["no network"].values())  # two tones far apart
    assert "over 2 folds" in capsys.readouterr().out


def test_embed_writes_rows_for_files_and_for_time_steps(whole_run, tmp_path):
    for k, seconds in enumerate((0.3, 0.64, 3.0)):
        tone(tmp_path / f"{k}.wav", 16_000, seconds=seconds)
    (tmp_path / "zz.wav").write_text("no sound")
    where = [str(tmp_path), f"--checkpoint={whole_run}/last.pt", "--device=cpu", "--precision=float32",
             f"--out={tmp_path}/new/x"]
    assert finetune.main(["embed", *where]) == 0
    found = np.load(tmp_path / "new" / "x.npz")
    assert [Path(path).name for path in found["paths"]] == ["0.wav", "1.wav", "2.wav"]
    assert found["cls"].shape == found["mean"].shape == (3, 32)
    encoder = eat.load_encoder(whole_run / "last.pt")
    waveform = load_audio(tmp_path / "0.wav")
    x = spectrogram((waveform - waveform.mean())[None], torch.tensor([len(waveform)]), 64, encoder.config.mean, encoder.config.std)
    tokens = encoder(x).detach()[0]
    np.testing.assert_allclose(found["cls"][0], tokens[0], atol=1e-5)

    assert finetune.main(["embed", *where, "--frames"]) == 0
    averaged = np.load(tmp_path / "new" / "x.npz")
    steps = [math.ceil((int(seconds * 16_000) - 400) // 160 / 16 + 1e-9) for seconds in (0.3, 0.64, 3.0)]
    assert np.bincount(averaged["path_index"]).tolist() == steps
    assert averaged["seconds"][-1] == pytest.approx((steps[-1] - 1) * 0.16, abs=1e-5)
    np.testing.assert_allclose(averaged["features"][0], tokens[1:9].mean(0), atol=1e-5)
    assert finetune.main(["embed", *where, "--frames", "--join"]) == 0
    joined = np.load(tmp_path / "new" / "x.npz")["features"]
    np.testing.assert_allclose(joined.reshape(-1, 8, 32).mean(1), averaged["features"], atol=1e-5)


def test_look_draws_where_CLS_attends(whole_run, tmp_path, capsys):
    encoder = eat.load_encoder(whole_run / "last.pt")
    x = torch.randn(1, 1, 64, 128)
    attention, last = finetune.cls_attention(encoder, x), encoder.blocks[-1]
    assert attention.shape == (32,) and 0 < attention.sum() < 1  # the rest is CLS's attention to itself
    with torch.no_grad():  # a head whose keys are all alike attends to all of the 33 tokens alike
        last.attn.qkv.weight[32:64], last.attn.qkv.bias[32:64] = 0, 0
    torch.testing.assert_close(finetune.cls_attention(encoder, x), torch.full((32,), 1 / 33))
    clip = tone(tmp_path / "a.wav", 16_000)
    assert finetune.main(["look", str(clip), f"--checkpoint={whole_run}/last.pt", f"--out={tmp_path}/look.png"]) == 0
    assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")
    assert finetune.main(["look", "nowhere.wav", f"--checkpoint={whole_run}/last.pt"]) == 2


def test_plot_draws_the_learning_curves(whole_run, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_bytes((whole_run / "log.jsonl").read_bytes() + b'{"step": 9, "loss": null}\n{"step"')
    assert eat.main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")
    assert eat.main(["plot", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "log.jsonl").write_text("")
    assert eat.main(["plot", str(tmp_path)]) == 2 and "nothing in it yet" in capsys.readouterr().err


@pytest.mark.parametrize("wrong, says", [
    (["--data=nowhere"], "no such folder"), (["--fold=9"], "--fold 9"), (["--checkpoint=nowhere.pt"], "no such file"),
    (["--weighted"], "sampling weights"), (["--batch-size=5", "--accumulate=2"], "multiple"),
])
def test_bad_input_to_fine_tuning_gets_one_line_and_status_2(wrong, says, esc, tmp_path, capsys):
    assert fine(esc, tmp_path / "out", "--frames=64", *wrong) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert says in lines[-1] and "Traceback" not in "".join(lines)


def test_an_encoder_is_no_classifier(whole_run, esc, capsys):
    assert finetune.main(["predict", str(esc), f"--checkpoint={whole_run}/last.pt"]) == 2
    assert "without a classifier" in capsys.readouterr().err
    assert finetune.main(["embed", "nowhere", f"--checkpoint={whole_run}/last.pt"]) == 2


def test_packed_sound_gives_the_same_results(esc, whole_run, tmp_path, capsys):
    pack(esc, tmp_path / "pack")
    results, features = [], []
    for path, out in ((esc, tmp_path / "files"), (tmp_path / "pack", tmp_path / "packed")):
        run = [f"--checkpoint={whole_run}/last.pt", "--frames=64"]
        assert fine(path, out, *run) == 0 and fine(path, f"{out}-knn", *run, "--mode=knn") == 0
        results += [[json.loads((Path(f"{out}{kind}") / "results.json").read_text())["results"] for kind in ("", "-knn")]]
        assert finetune.main(["embed", str(path), run[0], f"--out={out}.npz", "--device=cpu", "--workers=1"]) == 0
        features.append(dict(np.load(f"{out}.npz")))
    assert results[0] == results[1]
    assert_same_weights(tmp_path / "files", tmp_path / "packed")
    for name in features[0]:
        np.testing.assert_array_equal(features[0][name], features[1][name])


@real_sound
def test_esc10_is_recognised():
    esc10 = data.open_labelled(str(SHARED / "data/esc10"), 512)
    assert (esc10.kind, len(esc10.clips), len(esc10.classes)) == ("ESC-10", 400, 10)
    assert [(len(train), len(test)) for train, test in esc10.folds.values()] == [(320, 80)] * 5
