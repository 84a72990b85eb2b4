"""What a pre-trained encoder is good for.

    python finetune.py --data ESC-50 --checkpoint out/last.pt                fine-tune, and test
    python finetune.py --data ESC-50 --checkpoint out/last.pt --mode linear  frozen features; or knn
    python finetune.py predict CLIP... --checkpoint out-finetune/last.pt     labels of any sound
    python finetune.py embed FOLDER --checkpoint out/last.pt --out x.npz     features of any sound
    python finetune.py look CLIP                                             a clip as EAT sees it
    python finetune.py look CLIP --checkpoint out/last.pt                    what the encoder sees

All recipes but `small` are the release's. Without --checkpoint the encoder has random weights: the
baseline.
"""

import collections
import contextlib
import csv
import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn

import eat
from data import (SAMPLE_RATE, SHIFT, STATS, WINDOW, Clips, Parser, UsageError, describe_skipped,
                  loading, lock, loudness, make_folder, open_clips, open_labelled, part_size,
                  printable, read_lines, run, seed_of, shares, shuffled, spectrogram)
from eat import MEL_BINS, PATCH, EATConfig, Encoder, Machine, option

# ---- The classifier ------------------------------------------------------------------------------


class Classifier(nn.Module):
    """An encoder with a head: (B, 1, T, 128) -> logits (B, classes). `classes`: names, or how many.
    The head reads "CLS", as the release's does, or "patches", which tells more of what a small
    encoder knows (see eat.readings): over the first `filled` (B,) time steps of 16 frames, those
    that hold sound; by default over all."""

    def __init__(self, encoder, classes, drop_path=0.0, reading="CLS"):
        super().__init__()
        self.encoder, self.reading = encoder, reading
        names = map(str, range(classes)) if isinstance(classes, int) else classes
        self.classes, self.multi_label = list(names), False
        D = encoder.config.dim
        width = D if reading == "CLS" else 2 * (MEL_BINS // PATCH) * D
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, len(self.classes))
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        rates = torch.linspace(0, drop_path, len(encoder.blocks)).tolist()
        for block, rate in zip(encoder.blocks, rates):  # rises linearly over the blocks
            block.drop_path = rate

    def forward(self, x, filled=None):
        if filled is None:
            filled = torch.full((len(x),), x.shape[2] // PATCH, device=x.device)
        features = (self.encoder(x)[:, 0] if self.reading == "CLS" else
                    eat.readings(self.encoder, x, filled)[self.reading])
        # In float32: rounded to 16 bits, many of a class's scores are the same, which can cost mAP.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.fc_norm(features.float()))


def load_classifier(path):
    """-> the fine-tuned Classifier of a checkpoint, in eval mode."""
    state = eat.read_checkpoint(path)
    if "classes" not in state:
        raise UsageError(f"{path}: an encoder without a classifier; fine-tune it first")
    encoder = Encoder(EATConfig(**state["config"]))
    model = Classifier(encoder, state["classes"], reading=state.get("head_reads", "CLS"))
    model.multi_label = state["multi_label"]
    return eat.fill(model, state["model"], path).eval()

# ---- Recipes -------------------------------------------------------------------------------------


@dataclasses.dataclass
class FineTune:
    """How fine-tuning and probing go. Defaults are the release's; RECIPES differ by data set."""

    data: str = option(None, "ESC-50, ESC-10, Speech Commands, the release's AudioSet manifests, a "
                       "folder of classes: the folder as it lies on disk, or a pack of it; 'demo'")
    checkpoint: str = option(None, "a pre-trained encoder; without, random weights")
    mode: str = option("finetune", "train everything, or test frozen features",
                       choices=("finetune", "linear", "knn"))
    recipe: str = option(None, "a row of settings; default: by --data; 'small' is a short one, "
                         "for a CPU", choices=("as2m", "as20k", "esc50", "spc2", "small"))
    out: str = option(None, "where results go; default: out-finetune, out-linear, out-knn")
    resume: bool = option(False, "go on with the run in --out, after its last finished fold")
    esc10: bool = option(False, "use the ten classes of ESC-10 out of ESC-50")
    fold: int = option(None, "run one fold of ESC-50 instead of all five")
    shots: str = option(None, "with --mode linear: accuracy with so many labelled clips of each "
                       "class, such as 1,2,4,8")
    preset: str = option("tiny", "sizes of an encoder with random weights",
                         choices=tuple(eat.PRESETS))
    frames: int = option(None, "length of a clip, in frames of 10 ms; default: by --data and "
                             "--recipe")
    stats: str = option(None, "mean and deviation to normalise with; default: the recipe's, for "
                        "frozen features the checkpoint's", choices=(*STATS, "checkpoint"))
    reading: str = option("CLS", "what fine-tuning's head reads", choices=("CLS", "patches"))
    steps: int = option(4000, "optimizer updates")
    batch_size: int = option(48, "clips an update")
    accumulate: int = option(1, "parts of a batch, one after the other, for less memory; mixup "
                            "then stays within each")
    lr: float = option(5e-5, "peak learning rate")
    min_lr: float = option(1e-6, "learning rate at the end of the cosine")
    warmup: float = option(0.1, "share of the updates that warms up", most=1)
    weight_decay: float = option(0.05, "decoupled; none on biases and other 1-D tensors")
    layer_decay: float = option(0.65, "learning rate of a block in units of the next one's; 1 from "
                                "random weights")
    drop_path: float = option(0.1, "how often the last block is skipped; from 0 at the first",
                              most=0.99)
    roll: bool = option(True, "roll the waveform by a random shift, scale it by Beta(10, 10) + 0.5")
    mixup: float = option(0.0, "a of mixup's Beta(a, a); 0 is none")
    mixup_prob: float = option(0.9, "share of the batches that are mixed", most=1)
    spec_augment: float = option(0.2, "largest masked share of the mel bins, and of the frames",
                                 most=1)
    noise: bool = option(False, "add uniform noise, and roll the spectrogram by -10 to 9 frames")
    label_smoothing: float = option(0.0, "without effect under mixup", most=1)
    loss: str = option("ce", "cross entropy, or binary cross entropy", choices=("ce", "bce"))
    weighted: bool = option(False, "draw clips by their sampling weights, 200,000 at a time")
    neighbours: int = option(10, "k of --mode knn")
    l2: float = option(None, "--mode linear: penalty l2 / 2 * |w|^2 beside the summed loss; "
                       "default: the best of 1, 10, 100, 1000 on a quarter of the training clips",
                       least=1e-6)
    seed: int = option(0, "of random weights, data order, augmentation, held-out clips", least=0)
    log_every: int = option(10, "steps between lines of log.jsonl")

    __post_init__ = eat.check_numbers

    def learning_rate(self, update):
        """At update 1, 2, ...: linear warm-up from 0, then one cosine to min_lr at the last."""
        warmup = self.warmup * self.steps
        if update <= warmup:
            return self.lr * update / warmup
        progress = (update - warmup) / max(1.0, self.steps - warmup)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2


RECIPES = {
    "as2m": dict(frames=1024, stats="audioset", steps=300_000, batch_size=96, mixup=0.8, loss="bce",
                 weighted=True),
    "as20k": dict(frames=1024, stats="audioset", steps=40_000, mixup=0.8, loss="bce"),
    "esc50": dict(frames=512, stats="esc50", spec_augment=0.4, label_smoothing=0.1),
    "spc2": dict(frames=128, stats="spc2", steps=40_000, batch_size=256, lr=2e-4, mixup=0.8,
                 label_smoothing=0.1, loss="bce", noise=True),
    "small": dict(frames=512, stats="checkpoint", reading="patches", steps=800, batch_size=16,
                  lr=1e-3, label_smoothing=0.1),
}


def recipe_for(data):
    """The row of a Labelled data set, or None where the release has none: ESC-50's, then."""
    if data.kind == "AudioSet manifests":
        return "as2m" if sum(len(train) for train, _ in data.folds.values()) > 100_000 else "as20k"
    return {"Speech Commands": "spc2", "ESC-50": "esc50", "ESC-10": "esc50"}.get(data.kind)

# ---- Augmentation: training only. All draws follow from one generator, of (seed, fold, step) -----


def roll_and_gain(waveforms, lengths, rng):
    """Each clip rolled within itself by a random shift and scaled by Beta(10, 10) + 0.5."""
    B, samples = waveforms.shape
    shift = torch.from_numpy(rng.random(B)).to(waveforms) * lengths
    gain = torch.from_numpy(rng.beta(10, 10, B) + 0.5).to(waveforms)
    place = torch.arange(samples, device=waveforms.device).expand(B, -1)
    rolled = waveforms.gather(1, (place + shift[:, None].long()) % lengths[:, None])
    return torch.where(place < lengths[:, None], rolled, 0.0) * gain[:, None]


def add_noise_and_roll(x, rng):
    """For each clip anew: uniform noise, up to 0.1 high, and a roll by -10 to 9 frames."""
    height = torch.from_numpy(rng.random(len(x)) / 10).to(x)[:, None, None, None]
    x = x + height * torch.from_numpy(rng.random(x.shape, dtype=np.float32)).to(x)
    shifts = rng.integers(-10, 10, len(x)).tolist()
    return torch.stack([clip.roll(shift, dims=1) for clip, shift in zip(x, shifts)])


def mixup(x, targets, alpha, rng):
    """Batch and labels, each mixed with itself flipped; one lambda ~ Beta(alpha, alpha) for all."""
    share = rng.beta(alpha, alpha)
    return share * x + (1 - share) * x.flip(0), share * targets + (1 - share) * targets.flip(0)


def spec_augment(x, ratio, seed):
    """Of each clip, set one band of mel bins and one of frames, each below `ratio`, to 0."""
    torch.manual_seed(seed)
    for axis in (3, 2):
        x = torchaudio.functional.mask_along_axis_iid(x, int(ratio * x.shape[axis]), 0.0, axis)
    return x


def augmented(waveforms, lengths, targets, config, recipe, rng):
    """A training batch -> spectrogram (B, 1, T, 128), the time steps that hold sound (B,), targets
    (B, classes). As in the release noise comes before mixup and SpecAugment, so that masked bands
    are exactly 0."""
    filled = eat.time_steps(lengths, config.frames)
    if recipe.roll:
        waveforms = roll_and_gain(waveforms, lengths, rng)
    x = spectrogram(waveforms, lengths, config.frames, config.mean, config.std)
    if recipe.noise:
        x = add_noise_and_roll(x, rng)
    if recipe.mixup and rng.random() < recipe.mixup_prob:
        x, targets = mixup(x, targets, recipe.mixup, rng)
        filled = torch.maximum(filled, filled.flip(0))
    elif recipe.label_smoothing and not recipe.mixup:
        targets = targets * (1 - recipe.label_smoothing) + recipe.label_smoothing / targets.shape[1]
    if recipe.spec_augment:
        x = spec_augment(x, recipe.spec_augment, int(rng.integers(2**62)))
    return x, filled, targets

# ---- Metrics -------------------------------------------------------------------------------------


def average_precision(scores, targets):
    """scores, targets: (clips, classes) -> (classes,) float, nan for a class without positives. The
    mean of the precision at each positive, where clips of equal score count as found together."""
    scores, targets = np.asarray(scores, dtype=np.float64), np.asarray(targets) > 0.5
    result = np.full(scores.shape[1], np.nan)
    for k in np.flatnonzero(targets.any(0)):
        order = np.argsort(-scores[:, k], kind="stable")
        ranked, hits = scores[order, k], targets[order, k]
        last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of each group of ties
        found = np.cumsum(hits)[last]
        result[k] = np.sum(np.diff(found, prepend=0) * found / (last + 1)) / found[-1]
    return result


def metric(scores, targets, multi_label):
    """Accuracy; or of clips with several labels the mAP, the mean over classes with positives."""
    if multi_label:
        return float(np.nanmean(average_precision(scores, targets)))
    return (scores.argmax(1) == targets.argmax(1)).float().mean().item()


def evaluate(scores, targets, classes, multi_label):
    """-> {"metric", "value", "per_class" (None for a class that has no clip, which counts nowhere),
    and, where each clip has one label, "confusion"}."""
    result = {"metric": "mAP" if multi_label else "accuracy",
              "value": metric(scores, targets, multi_label)}
    if multi_label:
        each = average_precision(scores, targets)
    else:
        pairs = targets.argmax(1) * len(classes) + scores.argmax(1)  # rows: what it is
        confusion = pairs.bincount(minlength=len(classes) ** 2).view(len(classes), -1)
        each = confusion.diag() / confusion.sum(1)
        result["confusion"] = confusion.tolist()
    each = {name: None if math.isnan(x) else x for name, x in zip(classes, each.tolist())}
    return {**result, "per_class": each}

# ---- Fine-tuning ---------------------------------------------------------------------------------


def make_optimizer(model, recipe):
    """AdamW; block i of L learns at layer_decay^(L + 1 - i) of the rate. As in the release the
    patch embedding, CLS, the first norm and the head learn at the full rate."""
    L, groups = len(model.encoder.blocks), collections.defaultdict(list)
    for name, p in model.named_parameters():
        scale = 1.0
        if name.startswith("encoder.blocks."):
            scale = recipe.layer_decay ** (L - int(name.split(".")[2]))
        groups[scale, recipe.weight_decay if p.ndim > 1 else 0.0].append(p)
    groups = [{"params": ps, "weight_decay": decay, "scale": scale}
              for (scale, decay), ps in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)


def training_order(train, data, recipe, seed):
    """The clips to train on, without end, each as its position in `train`."""
    if recipe.weighted:
        generator = torch.Generator().manual_seed(seed_of(seed))
        weights = data.weights[train].double()
        while True:  # the release draws 200,000 at a time
            yield from torch.multinomial(weights, 200_000, True, generator=generator).tolist()
    else:
        yield from shuffled(len(train), seed)


def fit(model, data, fold, config, recipe, machine, log, caught):
    """Train a Classifier on one fold -> True at its end, False if a signal came first."""
    device, train = machine.device, data.folds[fold][0]
    clips = Clips(data.clips.source, config.frames, data.clips.file[train.numpy()])
    clips.skipped = data.clips.skipped
    clips.replace = True  # another clip to train on takes the place of one that cannot be read
    # A fold draws the same with --fold as among the others.
    number = max(1, int(fold.removeprefix("fold "))) - 1 if fold.startswith("fold ") else 0
    optimizer, scaler = make_optimizer(model, recipe), machine.scaler()
    net, parameters = machine.prepare(model), list(model.parameters())
    order = training_order(train, data, recipe, seed_of(recipe.seed, number))
    parts = shares(order, recipe.batch_size, part_size(recipe.batch_size, recipe.accumulate))
    step, bad_in_a_row, rows = 0, torch.zeros((), device=device), []
    model.train()
    with (contextlib.closing(log.bar),
          loading(clips, parts, machine.workers, device) as batches):
        while step < recipe.steps and not caught:
            rng, losses = np.random.default_rng((recipe.seed, number, step)), []
            for _ in range(recipe.accumulate):
                batch = next(batches)
                clips.skipped |= batch.skipped
                if not len(batch.numbers):
                    raise UsageError(f"{fold}: no clip to train on can be read; "
                                     + describe_skipped(batch.skipped))
                waveforms = batch.waveforms.to(device, non_blocking=True)
                lengths = batch.lengths.to(device, non_blocking=True)
                targets = data.targets(train[batch.numbers].tolist()).to(device, non_blocking=True)
                x, filled, targets = augmented(waveforms, lengths, targets, config, recipe, rng)
                torch.manual_seed(int(rng.integers(2**62)))  # DropPath's
                with machine.autocast():
                    logits = net(x, filled)
                loss = (F.cross_entropy if recipe.loss == "ce" else
                        F.binary_cross_entropy_with_logits)(logits, targets)
                scaler.scale(loss / recipe.accumulate).backward()
                losses.append(loss.detach())

            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step + 1) * group["scale"]
            scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
            scaler.step(optimizer)  # does nothing where a gradient is not finite
            scaler.update()
            optimizer.zero_grad()
            step += 1

            bad_in_a_row = torch.where(norm.isfinite(), 0, bad_in_a_row + 1)
            rows.append(torch.stack([torch.stack(losses).mean(), norm]))
            if step % recipe.log_every == 0 or step == recipe.steps:
                line = log.write(step, ("loss", "grad_norm"), rows, fold=fold,
                                 lr=recipe.learning_rate(step))
                rows = []
                eat.check_health(line, int(bad_in_a_row), config, recipe)
    return step == recipe.steps


def probabilities_of(model, x, filled):
    logits = model(x, filled)
    return {"probabilities": logits.sigmoid() if model.multi_label else logits.softmax(1)}


def fine_tune(data, start, config, recipe, machine, resumed):
    """Every fold from the same encoder `start`: train, then test once -> {fold: its results}. A
    finished fold is saved before its result is printed; one that a signal stops begins anew."""
    done = resumed["done"] if resumed else {}
    data.clips.skipped |= (resumed or {}).get("skipped", {})
    with eat.stop_signals() as caught:
        for fold in [fold for fold in data.folds if fold not in done]:
            tested = data.folds[fold][1].tolist()
            if not any(len(data.clips[[number]].numbers) for number in tested):
                raise UsageError(f"{fold}: none of the clips to test on can be read, such as "
                                 + printable(data.clips.name(tested[0])))
            torch.manual_seed(seed_of(recipe.seed))
            encoder = Encoder(config)
            if start is not None:
                encoder.load_state_dict(start)
            model = Classifier(encoder, data.classes, recipe.drop_path, recipe.reading)
            model.to(machine.device)
            model.multi_label = data.multi_label
            log = eat.Log(recipe.out, 0, recipe.steps, machine, data.clips, f"training, {fold}",
                          keep=lambda line: line.get("fold") in done)
            if not fit(model, data, fold, config, recipe, machine, log, caught):
                raise KeyboardInterrupt(caught[0], "; --resume goes on, with this fold anew")
            found, used = eat.features(model.eval(), config, data.clips, tested, machine,
                                       probabilities_of)
            done[fold] = evaluate(found["probabilities"], data.targets(used.tolist()),
                                  data.classes, data.multi_label)
            state = {"config": vars(config), "recipe": vars(recipe), "model": model.state_dict(),
                     "classes": data.classes, "multi_label": data.multi_label, "start": start,
                     "head_reads": recipe.reading, "step": recipe.steps, "done": done,
                     "skipped": data.clips.skipped}
            eat.save_checkpoint(recipe.out, state, must=data.folds.keys() <= done.keys())
            print(f"{fold}: {done[fold]['metric']} {done[fold]['value']:.1%}", flush=True)
    return done

# ---- Frozen features: linear probe and nearest neighbours ----------------------------------------


def linear_probe(bank, targets, queries, penalties, multi_label):
    """Logistic regression on standardised features, for each l2 of some penalties: to the optimum
    of the summed loss + l2 / 2 * |w|^2, by L-BFGS in float64 -> {l2: scores of the queries}."""
    mean, std = bank.mean(0), bank.std(0, correction=min(1, len(bank) - 1)) + 1e-6  # of one clip 0
    bank, queries = (((x - mean) / std).double() for x in (bank, queries))
    # The best weights lie in the span of the clips, so they are sought along its principal axes:
    # there are no more of those than clips, however many features there are.
    left, size, axes = torch.linalg.svd(bank, full_matrices=False)
    loss = F.binary_cross_entropy_with_logits if multi_label else F.cross_entropy
    (clips, classes), targets, scores = targets.shape, targets.double(), {}
    for l2 in penalties:
        # Each axis in units in which the loss is about equally curved along all of them: 15 times
        # as fast on ESC-50 (1,600 clips, 3,072 features), to the same optimum.
        unit = (size.square() / (4 * classes) + l2).sqrt()
        x, penalty = left * (size / unit), l2 / unit.square()
        weight = torch.zeros(len(unit), classes, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_grad=1e-6,
                                   tolerance_change=1e-12, line_search_fn="strong_wolfe")

        def closure():
            solver.zero_grad()
            total = loss(x @ weight + bias, targets, reduction="sum")
            total = (total + (penalty @ weight.square()).sum() / 2) / clips
            total.backward()
            return total

        solver.step(closure)
        scores[l2] = (queries @ (axes.T @ (weight / unit[:, None])) + bias).detach()
    return scores


def linear_scores(bank, targets, queries, l2, multi_label, seed=0):
    """Scores (m, classes) of queries by a linear probe on the bank, and its penalty: l2, or where
    that is None the one that does best on a quarter of the bank when trained on the rest."""
    if l2 is None and len(bank) < 4:
        l2 = 10.0
    if l2 is None:
        held = torch.from_numpy(np.random.default_rng(seed).permutation(len(bank)) % 4 == 0)
        trial = linear_probe(bank[~held], targets[~held], bank[held], (1.0, 10.0, 100.0, 1000.0),
                             multi_label)
        found = {l2: metric(scores, targets[held], multi_label) for l2, scores in trial.items()}
        l2 = max(found, key=found.get)
    return linear_probe(bank, targets, queries, [l2], multi_label)[l2], l2


def read_all(data, start, config, recipe, machine):
    """Frozen features of all clips, of the encoder with weights `start` and of what it must be
    judged against -> {kind: (clips, F)}, and the clips' numbers."""
    torch.manual_seed(seed_of(recipe.seed))
    random = Encoder(config).to(machine.device).eval()
    encoder = Encoder(config).to(machine.device).eval()
    encoder.load_state_dict(random.state_dict() if start is None else start)

    def read(model, x, filled):
        kinds = eat.read_features(model, x, filled)
        if recipe.checkpoint:
            kinds["random weights, patches"] = eat.read_features(random, x, filled)["patches"]
        # Each mel band's mean and deviation over the same time, weighted likewise.
        weights = loudness(x, config.std, filled * PATCH, 1)
        kinds["no network"] = eat.mean_and_deviation(x[:, 0], weights)
        return kinds

    return eat.features(encoder, config, data.clips, range(len(data.clips)), machine, read)


def probe(data, start, config, recipe, machine):
    """Every kind of frozen features in every fold -> {kind: {fold: its results}}."""
    kinds, used = read_all(data, start, config, recipe, machine)
    targets, results = data.targets(used.tolist()), {}
    for kind, x in kinds.items():
        results[kind] = {}
        for fold in data.folds:
            train, held = data.split(fold, used)
            parts, l2 = (x[train], targets[train], x[held]), None
            if recipe.mode == "knn":
                scores = eat.nearest_neighbours(*parts, recipe.neighbours)
            else:
                scores, l2 = linear_scores(*parts, recipe.l2, data.multi_label, recipe.seed)
            result = evaluate(scores, targets[held], data.classes, data.multi_label)
            results[kind][fold] = {**result, "l2": l2}
        print(f"{recipe.mode}, {kind}: {summary(results[kind])}", flush=True)
    return results


def shots(data, start, config, recipe, machine):
    """What is pre-training worth? Accuracy of a linear probe (l2 of 10 unless given) against the
    number of labelled clips a class, three draws each -> {kind: {shots: [accuracies]}}."""
    kinds, used = read_all(data, start, config, recipe, machine)
    kinds = {kind: x for kind, x in kinds.items() if kind not in ("CLS", "mean of patches")}
    targets, results = data.targets(used.tolist()), {}
    for kind, x in kinds.items():
        results[kind] = {}
        for count in map(int, recipe.shots.split(",")):
            found = []
            for draw in range(3):
                for fold in data.folds:
                    train, held = data.split(fold, used)
                    rng = np.random.default_rng((recipe.seed, draw))
                    few = [rng.permutation(torch.nonzero(train & mine).flatten())[:count]
                           for mine in targets.T.bool()]
                    few = torch.from_numpy(np.concatenate(few))
                    scores, _ = linear_scores(x[few], targets[few], x[held], recipe.l2 or 10.0,
                                              False)
                    found.append(metric(scores, targets[held], False))
            results[kind][count] = found
            print(f"{count} clips a class, {kind}: {100 * np.mean(found):.1f} %", flush=True)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, found in results.items():
        y = 100 * np.array(list(found.values()))  # (numbers of shots, draws in folds)
        label = "pre-trained, patches" if recipe.checkpoint and kind == "patches" else kind
        axes.errorbar(list(found), y.mean(1), y.std(1), label=label, marker=".", capsize=3)
    axes.set(xscale="log", xlabel="labelled clips a class", ylabel="accuracy, %", title=data.kind)
    axes.set_xticks(list(found), list(found))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(os.path.join(recipe.out, "shots.png"))
    return results

# ---- Results -------------------------------------------------------------------------------------


def summary(folds):
    """Mean ± standard deviation over the folds, in words."""
    values = np.array([result["value"] for result in folds.values()])
    said = f"{next(iter(folds.values()))['metric']} {100 * values.mean():.1f} %"
    if len(values) > 1:
        said += f" ± {100 * values.std(ddof=1):.1f} over {len(values)} folds"
    return said


def write_results(results, data, recipe, config, **more):
    """results.json, and confusion.png where clips have one label each."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    said = json.dumps({"data": str(data), "skipped": data.clips.skipped, "results": results,
                       "recipe": vars(recipe), "config": vars(config),
                       "versions": versions, **more}, indent=1, allow_nan=False)
    Path(recipe.out, "results.json").write_text(said)
    kind = "fine-tuned" if recipe.mode == "finetune" else "patches"
    if data.multi_label or recipe.shots:
        return
    from matplotlib.figure import Figure

    confusion = np.sum([result["confusion"] for result in results[kind].values()], axis=0)
    size = min(30, 3 + 0.3 * len(data.classes))
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(confusion, cmap="Blues")
    names = [printable(name) for name in data.classes]
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set(xlabel="predicted", ylabel="label", title=f"{kind}: {summary(results[kind])}")
    for (row, column), count in np.ndenumerate(confusion):
        if count and len(data.classes) <= 100:
            colour = "white" if count > confusion.max() / 2 else "black"
            axes.text(column, row, count, ha="center", va="center", fontsize=7, color=colour)
    figure.savefig(os.path.join(recipe.out, "confusion.png"))

# ---- Any sound: predict and embed ----------------------------------------------------------------


def read_files(model, config, path, machine, read, every=None, average=False):
    """Run `read`, a function (model, x, filled) -> dict, on all files in `path`: on windows that
    follow each other, the last one padded; or on one for every `every` seconds, around their
    middle -> for each file its name, where its windows begin and end (seconds), and what was read:
    a row a window; or the rows' `average` by how much sound each window holds."""
    if path == "demo":
        raise UsageError("demo: has no files; expected sound")
    hop, least = config.frames * SHIFT, WINDOW  # samples: from window to window; the fewest in one
    if every and 100 * every > config.frames:
        raise UsageError(f"--every {every}: at most {config.frames / 100}, what the model hears at "
                         "a time")
    if every:  # each hears twice its time (at least 1 s): an event on an edge is whole in one
        hop, least = every * SAMPLE_RATE, 1
        frames = PATCH * math.ceil(max(200 * every, 100) / PATCH)
        config = dataclasses.replace(config, frames=min(config.frames, frames),
                                     mask_ratio=EATConfig.mask_ratio)  # right for any length
    clips = open_clips(path, config.frames)
    clips.replace, clips.silence = False, True
    lengths = clips.source.lengths
    counts = np.maximum(1, np.floor((lengths - least) / hop) + 1).astype(int)
    counts[lengths == 0] = 0  # what could not be read
    clips.file = np.repeat(np.arange(len(counts)), counts)
    begins = hop * np.concatenate([np.arange(count) for count in counts])
    clips.start = begins.astype(np.int64)
    if every:
        last = np.maximum(lengths[clips.file] - clips.samples, 0)
        clips.start = np.clip(begins + (hop - clips.samples) / 2, 0, last).astype(np.int64)
    found, used = eat.features(model.to(machine.device), config, clips, range(len(clips)), machine,
                               read)
    if clips.skipped:
        print(f"skipped {len(clips.skipped)}: {describe_skipped(clips.skipped)}", file=sys.stderr)
    used = used.numpy()
    files = clips.file[used]
    held = np.minimum(lengths[files] - clips.start[used], clips.samples).astype(int)
    edges = np.flatnonzero(np.diff(files)) + 1  # between the windows of one file and the next
    for mine in np.split(np.arange(len(used)), edges):
        rows = {name: x[mine].numpy() for name, x in found.items()}
        if average:
            rows = {name: np.average(x, 0, held[mine])[None] for name, x in rows.items()}
        starts = begins[used[mine]] / SAMPLE_RATE
        ends = np.minimum(starts + (every or math.inf), lengths[files[mine[0]]] / SAMPLE_RATE)
        yield clips.name(used[mine[0]]), starts, ends, rows


def predict(args):
    """The likeliest labels of each file, or with --every of each so many seconds of it. The windows
    of a long file are averaged, weighted by how much sound each holds."""
    model, machine = load_classifier(args.checkpoint), eat.settings(Machine, vars(args))
    if args.labels:
        model.classes = read_labels(args.labels, len(model.classes))
    status = 0
    for path in args.clips:
        files = read_files(model, model.encoder.config, path, machine, probabilities_of, args.every,
                           average=not args.every)
        try:
            for name, starts, ends, found in files:
                for start, end, row in zip(starts, ends, found["probabilities"]):
                    print(printable(name) + (f" {start:.2f} to {end:.2f} s" if args.every else ""))
                    for k in np.argsort(-row)[: args.top]:
                        print(f"    {row[k]:6.1%}  {model.classes[k]}")
        except UsageError as error:  # the other paths' labels are not lost for it
            print(f"finetune.py: {error}", file=sys.stderr)
            status = 2
    return status


def read_labels(path, count):
    """Names of `count` classes, from a csv of index, id, name (with a heading or not), or a name a
    line."""
    try:
        rows = list(csv.reader(read_lines(path)))
    except csv.Error as error:
        raise UsageError(f"--labels {path}: {error}") from None
    table = all(len(row) >= 3 for row in rows) and any(row[0].isdecimal() for row in rows)
    if table:
        rows = sorted((row for row in rows if row[0].isdecimal()), key=lambda row: int(row[0]))
    names = [row[2].strip() if table else ",".join(row).strip() for row in rows]
    if len(names) != count:
        raise UsageError(f"--labels {path}: {len(names)} names for {count} classes")
    return names


def time_rows(encoder, x, filled):
    """A row every 0.16 s, the 8 frequencies of a time step side by side, averaged over the blocks
    -> {"rows": (B, H, 8 * D), "filled": (B, 1), how many of them hold sound}."""
    rows = x.new_zeros(len(x), x.shape[2] // PATCH, MEL_BINS // PATCH * encoder.config.dim)
    for count in filled.unique().tolist():  # as eat.read_features: padding changes nothing
        mine = filled == count
        average, _ = eat.average_of_blocks(encoder, x[mine, :, : count * PATCH])
        rows[mine, :count] = average[:, 1:].unflatten(1, (count, -1)).flatten(2)
    return {"rows": rows, "filled": filled[:, None]}


def embed(args):
    """Features of every file into an .npz, a row a file in three readings; with --frames a row
    every 0.16 s."""
    encoder, machine = eat.load_encoder(args.checkpoint), eat.settings(Machine, vars(args))
    config, out = encoder.config, args.out.removesuffix(".npz") + ".npz"
    if not args.frames:  # at least 5 s: means and deviations over 1 s say less
        config = dataclasses.replace(config, frames=max(512, config.frames))
    make_folder(os.path.dirname(out) or ".")
    columns = collections.defaultdict(list)
    read = time_rows if args.frames else eat.read_features
    files = read_files(encoder, config, args.path, machine, read, average=not args.frames)
    for name, starts, _, found in files:
        columns["paths"].append(name)
        if not args.frames:
            for kind, x in found.items():
                columns[kind.replace(" ", "_")].append(x[0].astype(np.float32))
            continue
        for rows, begin, filled in zip(found["rows"], starts, found["filled"][:, 0].astype(int)):
            columns["features"].extend(rows[:filled])
            columns["path_index"].extend([len(columns["paths"]) - 1] * filled)
            columns["seconds"].extend(begin + np.arange(filled) * PATCH * SHIFT / SAMPLE_RATE)
    columns = {name: np.array(rows) for name, rows in columns.items()}
    np.savez(out, **columns)
    shapes = ", ".join(f"{name} {x.shape}" for name, x in columns.items() if name != "paths")
    print(f"{out}: {len(columns['paths'])} files; {shapes}")

# ---- Pictures ------------------------------------------------------------------------------------


def draw(figure, place, image, title, labels=False):
    """(128, T) mel bins x frames, or with a last axis of colours, on axes of seconds and hertz."""
    axes = figure.add_subplot(place, title=title, facecolor="lightgray")  # where a mask hides it
    whole = np.asarray(image)
    axes.imshow(image, origin="lower", aspect="auto", cmap="magma", interpolation="nearest",
                extent=(0, image.shape[1] / 100, 0, MEL_BINS), vmin=whole.min(), vmax=whole.max())
    if not labels:
        axes.set(xticks=[], yticks=[])
        return axes
    hertz = [125, 500, 1000, 2000, 4000]
    low, place, high = (1127 * np.log1p(np.array(f) / 700) for f in (20, hertz, 8000))  # mel
    axes.set_yticks((place - low) / (high - low) * (MEL_BINS + 1) - 0.5, hertz)
    axes.set(xlabel="seconds", ylabel="hertz")
    return axes


def per_patch(values, grid):
    """(N, ...) -> (128, T, ...), each value where its patch is."""
    x = values.unflatten(0, grid).transpose(0, 1)
    return x.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1).numpy()


def colours(vectors, *others):
    """The first three principal components of some vectors (N, D), as red, green and blue; those of
    others in the same colours."""
    mean = vectors.mean(0)
    axes = torch.linalg.svd(vectors - mean, full_matrices=False).Vh[:3].T
    low, high = ((vectors - mean) @ axes).quantile(torch.tensor([0.02, 0.98]), 0)
    return [(((x - mean) @ axes - low) / (high - low + 1e-6)).clamp(0, 1)
            for x in (vectors, *others)]


def cls_attention(encoder, x):
    """The last block's attention from CLS to each patch of a clip, mean over heads -> (N,)."""
    tokens = encoder.embed(x)
    for block in encoder.blocks[:-1]:
        tokens, _ = block(tokens)
    attn = encoder.blocks[-1].attn
    q, k, _ = attn.qkv(tokens).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q[:, :, :1] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return weights[0, :, 0, 1:].mean(0)


@torch.no_grad()
def look(args):
    """A clip as EAT sees it: spectrogram, patches, and what four clones see under each kind of
    mask. With --checkpoint, what its encoder makes of it, beside one with random weights: patches
    of similar content in similar colours, and how CLS attends to them; of a pre-training
    checkpoint also the teacher's targets, and what student and decoder predict of them."""
    from matplotlib.figure import Figure

    torch.manual_seed(seed_of(abs(args.seed)))
    state = eat.read_checkpoint(args.checkpoint) if args.checkpoint else None
    config = EATConfig(**state["config"]) if state else EATConfig()
    clips = open_clips(args.clip, 256 if args.clip == "demo" else 1024)  # the first 10 s
    clips.silence = True
    waveform = clips.usable(0)
    filled = eat.time_steps(torch.tensor(len(waveform)), clips.frames).item()
    grid = (max(2, filled), MEL_BINS // PATCH)
    x = spectrogram(waveform[None], torch.tensor([len(waveform)]), grid[0] * PATCH, config.mean,
                    config.std)
    image = x[0, 0].T.numpy()
    figure = Figure(figsize=(12, 11), layout="constrained")
    if state:
        look_at_encoder(figure, args.checkpoint, state, config, x, image, grid)
    else:
        look_at_masks(figure, waveform, image, grid)
    figure.suptitle(printable(os.path.basename(args.clip)), parse_math=False)
    out = args.out
    if os.path.isdir(out) or out.endswith("/"):
        out = os.path.join(out, "look")
    if not os.path.splitext(out)[1]:
        out += ".png"
    make_folder(os.path.dirname(out) or ".")
    try:
        figure.savefig(out)
    except ValueError as error:  # its ending is of no kind of picture
        raise UsageError(f"{out}: {error}") from None
    print(out)


def look_at_masks(figure, waveform, image, grid):
    rows = figure.add_gridspec(5, 4, height_ratios=(0.6, 1, 0.8, 0.8, 0.8))
    axes = figure.add_subplot(rows[0, :])
    axes.plot(np.arange(len(waveform)) / SAMPLE_RATE, waveform, linewidth=0.5)
    axes.set(xlim=(0, image.shape[1] / 100), title="waveform")
    title = f"log-mel spectrogram, {grid[0]} x {grid[1]} patches"
    axes = draw(figure, rows[1, :], image, title, labels=True)
    axes.vlines(np.arange(1, grid[0]) * PATCH / 100, 0, MEL_BINS, color="white", lw=0.4)
    axes.hlines(np.arange(1, grid[1]) * PATCH, 0, image.shape[1] / 100, color="white", lw=0.4)
    for row, kind in enumerate(("inverse_block", "block", "random"), 2):
        masks = eat.inverse_block_mask(1, 4, grid, masking=kind)[0]
        for k, mask in enumerate(masks):
            seen = np.ma.masked_array(image, per_patch(mask, grid))
            draw(figure, rows[row, k], seen, f"{kind.replace('_', ' ')} mask, clone {k + 1}")


def look_at_encoder(figure, name, state, config, x, image, grid):
    pretrained = "teacher.cls" in state["model"]
    rows = figure.add_gridspec(4 if pretrained else 3, 6)
    draw(figure, rows[0, :], image, "log-mel spectrogram", labels=True)
    light = 0.25 + 0.75 * ((image - image.min()) / (image.max() - image.min() + 1e-6))[..., None]
    random, encoder = Encoder(config).eval(), Encoder(config).eval()
    eat.fill(encoder, eat.encoder_of(state["model"]), name)
    for row, title, model in (1, "random weights", random), (2, "this checkpoint", encoder):
        (colour,) = colours(model(x)[0, 1:])
        content = per_patch(colour, grid) * light
        draw(figure, rows[row, :3], content, f"{title}: principal components")
        attention = per_patch(cls_attention(model, x), grid)
        draw(figure, rows[row, 3:], attention, f"{title}: attention of CLS")
    if pretrained:
        model = eat.fill(eat.EAT(config), state["model"], name).eval()
        mask = model.draw_mask(x)[:, :1]
        keep, seen = eat.visible_patches(mask, (~mask).sum()), ~mask[0, 0]
        targets = model.targets(x)[0]
        prediction = model.decode(model.student(x, keep)[:, 1:], keep, grid)[0, 0]
        error = (prediction - targets).square().sum(1) / config.dim**0.5
        wanted, predicted = colours(targets, prediction)
        predicted[seen] = 0.5
        draw(figure, rows[3, :2], per_patch(wanted, grid), "the teacher's targets")
        draw(figure, rows[3, 2:4], per_patch(predicted, grid), "predicted; gray: what was seen")
        loss = np.ma.masked_array(per_patch(error, grid), per_patch(seen, grid))
        axes = draw(figure, rows[3, 4:], loss, f"frame loss, mean {error[~seen].mean():.2f}")
        axes.set_facecolor("gray")

# ---- Command line --------------------------------------------------------------------------------


def settle(given):
    """Flags -> (FineTune, EATConfig, Labelled, the encoder's tensors or None, the checkpoint to go
    on from or None)."""
    given = {"out": f"out-{given.get('mode', FineTune.mode)}", **given}
    out, resumed = given["out"], eat.resume(given, "start")
    if resumed:
        given = {**resumed["recipe"], **given}
    asked = eat.settings(FineTune, given)  # refuses what cannot be, before the sound is looked for
    if not asked.data:
        raise UsageError("--data is missing: a labelled data set, or 'demo'")
    start, tensors = EATConfig.preset(asked.preset), None
    if resumed:
        start, tensors = EATConfig(**resumed["config"]), resumed["start"]
    elif asked.checkpoint is not None:  # read once: it may be replaced while pre-training goes on
        encoder = eat.load_encoder(asked.checkpoint)
        start, tensors = encoder.config, encoder.state_dict()
    data = open_labelled(asked.data, start.frames, asked.esc10, asked.seed)
    name = asked.recipe or recipe_for(data)
    if resumed and resumed["classes"] != data.classes:
        raise UsageError(f"--data {asked.data}: not the classes that the run in {out} has; start "
                         "another with another --out")
    row = dict(RECIPES[name or "esc50"])
    if name is None:
        row |= {"stats": "checkpoint", "frames": max(512, start.frames)}
    if data.multi_label:
        row |= {"loss": "bce", "label_smoothing": 0.0}
    if data.kind == "demo":
        row["frames"] = start.frames
    if tensors is None:
        row["layer_decay"] = 1.0
    recipe = eat.settings(FineTune, row, given, {"recipe": name})
    if recipe.mode != "finetune" and recipe.checkpoint and "stats" not in given:
        recipe.stats = "checkpoint"
    mean, std = STATS.get(recipe.stats, (start.mean, start.std))
    # Masks are not used here, and the default ratio fits clips of any length.
    sound = {"frames": recipe.frames, "mean": mean, "std": std, "mask_ratio": EATConfig.mask_ratio}
    config = eat.settings(EATConfig, vars(start), sound)
    if recipe.frames != start.frames:
        data = open_labelled(recipe.data, recipe.frames, recipe.esc10, recipe.seed)
    if recipe.esc10 and data.kind != "ESC-10":
        raise UsageError(f"--esc10: {recipe.data}: expected ESC-50, found {data.kind}")
    if recipe.fold:
        chosen = f"fold {recipe.fold}"
        if chosen not in data.folds:
            raise UsageError(f"--fold {recipe.fold}: {recipe.data} has {', '.join(data.folds)}")
        data.folds = {chosen: data.folds[chosen]}
    part_size(recipe.batch_size, recipe.accumulate)  # refuses now what cannot be
    if recipe.weighted and recipe.mode == "finetune":
        if data.weights is None or not data.weights.any():
            raise UsageError(f"{recipe.data}: --weighted needs sampling weights, a weight*.csv "
                             "beside train.tsv; --no-weighted does without")
        data.folds = {fold: (train[data.weights[train] > 0], test)
                      for fold, (train, test) in data.folds.items()}
    if recipe.shots and (recipe.mode != "linear" or data.multi_label
                         or not all(n.isdecimal() and int(n) for n in recipe.shots.split(","))):
        raise UsageError(f"--shots {recipe.shots}: numbers as 1,2,4, with --mode linear, for clips "
                         "of one label each")
    return recipe, config, data, tensors, resumed


def train_or_probe(given, command):
    """The main job. `command`: how it was asked for, which stands in results.json."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("fine-tuning and probing run in one process: start them without torchrun")
    machine = eat.settings(Machine, given)
    recipe, config, data, start, resumed = settle(given)
    machine.compile &= recipe.mode == "finetune"  # else nothing runs compiled
    print(f"data     {data}")
    print(f"encoder  {recipe.checkpoint or 'random weights'}: D {config.dim}, {config.depth} "
          f"blocks; clips of {config.frames / 100:.2f} s, mean {config.mean}, deviation "
          f"{config.std}{data.clips.advice()}", flush=True)
    with lock(recipe.out):
        if not resumed:  # has another run written here since we looked?
            eat.resume({"out": recipe.out}, "start")
            if recipe.resume:
                print(f"warning  {recipe.out} has no checkpoint: a new run begins", file=sys.stderr)
        if recipe.mode == "finetune":
            advice = "" if recipe.recipe == "small" else " (for a CPU there is 'small')"
            print(f"recipe   {recipe.recipe or 'as esc50'}{advice}: {recipe.steps:,} steps x "
                  f"{recipe.batch_size} clips a fold, learning rate {recipe.lr:.3g}, layer decay "
                  f"{recipe.layer_decay}, {recipe.loss}, mixup {recipe.mixup}; head on "
                  f"{recipe.reading}; seed {recipe.seed}", flush=True)
            results = {"fine-tuned": fine_tune(data, start, config, recipe, machine, resumed)}
            print(f"fine-tuned: {summary(results['fine-tuned'])}")
        else:
            results = (shots if recipe.shots else probe)(data, start, config, recipe, machine)
        if data.clips.skipped:
            print(f"skipped {len(data.clips.skipped)}: {describe_skipped(data.clips.skipped)}")
        write_results(results, data, recipe, config, command=command, machine=str(machine))
    print(f"written to {recipe.out}")


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    jobs = {"predict": predict, "embed": embed, "look": look}
    command = words[0] if words and words[0] in jobs else None
    if not command:
        parser = Parser(prog="finetune.py", description=__doc__)
        parser.add_fields(FineTune, Machine)
        given = vars(parser.parse_args(words))
        return run("finetune.py", lambda: train_or_probe(given, ["finetune.py", *words]))
    parser = Parser(prog=f"finetune.py {command}", description=jobs[command].__doc__)
    parser.add_argument("--checkpoint", required=command != "look", help="a checkpoint")
    if command == "look":
        parser.add_argument("clip", help="a sound file, or 'demo'")
        parser.add_argument("--out", default="look.png", help="the picture [look.png]")
        parser.add_argument("--seed", type=int, default=0, help="of masks and random weights [0]")
    else:
        parser.add_fields(Machine)
    if command == "predict":
        parser.add_argument("clips", nargs="+", help="sound files, folders, lists or packs")
        parser.add_argument("--top", type=int, default=5, help="how many labels to print [5]")
        parser.add_argument("--every", type=float, help="a row for every so many seconds")
        parser.add_argument("--labels", help="names of the classes: a csv of index, id, name, or a "
                                             "name a line")
    if command == "embed":
        parser.add_argument("path", help="a sound file, a folder, a list or a pack")
        parser.add_argument("--out", default="features.npz", help="[features.npz]")
        parser.add_argument("--frames", action="store_true", help="a row every 0.16 s, not a file")
    args = parser.parse_args(words[1:])
    for name in ("top", "every"):
        if getattr(args, name, None) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} {getattr(args, name)}: must be above 0")
    return run("finetune.py", lambda: jobs[command](args))


if __name__ == "__main__":
    sys.exit(main())
