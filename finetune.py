"""What a pre-trained encoder is good for.

    python finetune.py --data ESC-50 --checkpoint out/last.pt                  fine-tune, and test
    python finetune.py --data ESC-50 --checkpoint out/last.pt --mode linear    frozen features; or --mode knn
    python finetune.py predict CLIP... --checkpoint out-finetune/last.pt       labels of any sound
    python finetune.py embed FOLDER --checkpoint out/last.pt --out x.npz       features of any sound
    python finetune.py look CLIP --checkpoint out/last.pt --out look.png       what the encoder sees, as a picture

The recipes are the release's. Without --checkpoint the encoder starts from random weights: the baseline.
"""

import collections
import csv
import dataclasses
import json
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import eat
from data import (SAMPLE_RATE, SHIFT, STATS, WINDOW, AudioError, Pack, as_float, clip_samples, describe_few,
                  describe_skipped, draw_spectrogram, existing_audio, first_clip, is_pack, load_audio, open_labelled,
                  printable, pyplot, save_picture, spectrogram)
from eat import MEL_BINS, PATCH, EATConfig, Encoder, UsageError, option

# ---------------------------------------------------------------------------------------------------------
# The classifier
# ---------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """An encoder with a head on its CLS token: (B, 1, T, 128) -> logits (B, classes). `classes`: names, or how many."""

    def __init__(self, encoder, classes, drop_path=0.0):
        super().__init__()
        self.encoder = encoder
        self.classes = [str(k) for k in range(classes)] if isinstance(classes, int) else list(classes)
        self.fc_norm = nn.LayerNorm(encoder.config.dim, eps=1e-6)
        self.head = nn.Linear(encoder.config.dim, len(self.classes))
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        for block, rate in zip(encoder.blocks, torch.linspace(0, drop_path, len(encoder.blocks)).tolist()):
            block.drop_path = rate  # rises linearly over the blocks

    def forward(self, spectrogram):
        return self.head(self.fc_norm(self.encoder(spectrogram)[:, 0]))


def load_classifier(path):
    """-> the fine-tuned Classifier of a checkpoint, in eval mode; `.classes`, `.multi_label`, `.encoder.config`."""
    state = eat.read_checkpoint(path)
    if "classes" not in state:
        raise UsageError(f"{path}: a pre-trained encoder without a classifier; fine-tune it first (finetune.py --data)")
    model = eat.fill(Classifier(Encoder(EATConfig(**state["config"])), state["classes"]), state["model"], path)
    model.multi_label = state["multi_label"]
    return model.eval()


# ---------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class FineTune:
    """How it is fine-tuned. Defaults are the release's; those that depend on the data are in RECIPES."""

    data: str = option(None, "ESC-50, ESC-10, Speech Commands, the release's AudioSet manifests, a folder of classes: "
                             "the folder as it lies on disk; or 'demo'")
    checkpoint: str = option(None, "a pre-trained encoder; without, random weights")
    mode: str = option("finetune", "train everything, or test the frozen features", choices=("finetune", "linear", "knn"))
    recipe: str = option(None, "a data set's row of settings; default: that of --data", choices=("as2m", "as20k", "esc50", "spc2"))
    out: str = option(None, "folder for results.json, confusion.png, last.pt [out-finetune, out-linear, out-knn]")
    resume: bool = option(False, "go on with the run in --out, exactly where its last checkpoint stands")
    esc10: bool = option(False, "of ESC-50, the ten classes of ESC-10")
    fold: int = option(None, "of ESC-50, one fold instead of all five")
    preset: str = option("tiny", "sizes of an encoder with random weights", choices=tuple(eat.PRESETS))
    frames: int = option(None, "length of a clip in frames of 10 ms; by recipe, else the checkpoint's")
    stats: str = option(None, "mean and std to normalise with; by recipe, frozen features the checkpoint's",
                        choices=(*STATS, "checkpoint"))
    steps: int = option(4000, "optimizer updates")
    batch_size: int = option(48, "clips per update")
    accumulate: int = option(1, "parts a batch is split into, for less memory")
    lr: float = option(5e-5, "peak learning rate")
    min_lr: float = option(1e-6, "learning rate at the end of the cosine")
    warmup: float = option(0.1, "share of the updates that warms up")
    weight_decay: float = option(0.05, "decoupled; none on biases and other 1-D tensors")
    beta1: float = option(0.9, "Adam")
    beta2: float = option(0.95, "Adam")
    adam_eps: float = option(1e-8, "Adam")
    layer_decay: float = option(0.65, "learning rate of a block in units of the next one's; 1 from random weights")
    drop_path: float = option(0.1, "how often the last block is skipped; linear from 0 at the first")
    roll: bool = option(True, "roll the waveform by a random shift, and scale it by Beta(10, 10) + 0.5")
    mixup: float = option(0.0, "a of mixup's Beta(a, a); 0 is none")
    mixup_prob: float = option(0.9, "share of the batches that are mixed")
    spec_augment: float = option(0.2, "largest masked share of the mel bins, and of the frames")
    noise: bool = option(False, "add uniform noise, and roll the spectrogram by up to 10 frames")
    label_smoothing: float = option(0.0, "without effect under mixup")
    loss: str = option("ce", "cross entropy, or binary cross entropy per class", choices=("ce", "bce"))
    weighted: bool = option(False, "draw 200,000 clips an epoch by their sampling weights")
    neighbours: int = option(10, "k of --mode knn")
    l2: float = option(1.0, "--mode linear: penalty l2 / 2 * |w|^2 beside the summed loss")
    seed: int = option(0, "of the head, data order and augmentation", least=0)
    workers: int = option(None, eat.WORKERS_HELP, least=0)
    device: str = option("auto", "where to train", choices=("auto", "cuda", "cpu", "mps"))
    precision: str = option(None, eat.PRECISION_HELP, choices=tuple(eat.PRECISIONS))
    compile: bool = option(None, eat.COMPILE_HELP)
    log_every: int = option(10, "steps between lines of log.jsonl")
    save_every: int = option(500, "steps between checkpoints")

    def __post_init__(self):
        eat.check_numbers(self)

    def learning_rate(self, update):
        """Of update 1, 2, ...: linear warm-up from 0, then one cosine to min_lr at the last."""
        warmup = self.warmup * self.steps
        if update <= warmup:
            return self.lr * update / warmup
        progress = (update - warmup) / max(1.0, self.steps - warmup)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2


RECIPES = {
    "as2m": dict(frames=1024, stats="audioset", steps=300_000, batch_size=96, mixup=0.8, loss="bce", weighted=True),
    "as20k": dict(frames=1024, stats="audioset", steps=40_000, batch_size=48, mixup=0.8, loss="bce"),
    "esc50": dict(frames=512, stats="esc50", spec_augment=0.4, label_smoothing=0.1),
    "spc2": dict(frames=128, stats="spc2", steps=40_000, batch_size=256, lr=2e-4, mixup=0.8, label_smoothing=0.1,
                 loss="bce", noise=True),
}


def recipe_for(data):
    """The row of a Labelled data set; {} for one the release has none for, which gets ESC-50's without its frames."""
    if data.kind == "AudioSet manifests" and data.multi_label:
        return "as2m" if sum(len(train) for train, _ in data.folds.values()) > 100_000 else "as20k"
    return {"Speech Commands": "spc2", "ESC-50": "esc50", "ESC-10": "esc50"}.get(data.kind)


# ---------------------------------------------------------------------------------------------------------
# Augmentation: training only. Every draw comes from one generator, made from (seed, fold, step)
# ---------------------------------------------------------------------------------------------------------


def roll_and_gain(waveforms, lengths, rng):
    """Each clip rolled within itself by a random shift and scaled by Beta(10, 10) + 0.5."""
    B, samples = waveforms.shape
    shift = torch.from_numpy(rng.random(B)).to(waveforms) * lengths
    gain = torch.from_numpy(rng.beta(10, 10, B) + 0.5).to(waveforms)
    place = torch.arange(samples, device=waveforms.device).expand(B, -1)
    rolled = waveforms.gather(1, (place + shift[:, None].long()) % lengths[:, None])
    return torch.where(place < lengths[:, None], rolled, 0.0) * gain[:, None]


def mixup(x, targets, alpha, rng):
    """The batch mixed with itself flipped, one lambda ~ Beta(alpha, alpha) for all; the labels likewise."""
    share = rng.beta(alpha, alpha)
    return share * x + (1 - share) * x.flip(0), share * targets + (1 - share) * targets.flip(0)


def spec_augment(x, ratio, rng):
    """One band of up to ratio * 128 mel bins and one of up to ratio * T frames set to 0, each clip its own."""
    for axis in (3, 2):
        size = x.shape[axis]
        width = rng.random(len(x)) * ratio * size
        start = rng.random(len(x)) * (size - width)
        low, high = (torch.from_numpy(edge.astype(np.int64)).to(x.device)[:, None] for edge in (start, start + width))
        place = torch.arange(size, device=x.device)
        masked = (low <= place) & (place < high)  # (B, size)
        x = x.masked_fill(masked[:, None, None, :] if axis == 3 else masked[:, None, :, None], 0.0)
    return x


def add_noise_and_roll(x, rng):
    """Uniform noise of a random height up to 0.1, and a roll of up to 10 frames, each clip its own."""
    height = torch.from_numpy(rng.random(len(x)) / 10).to(x)[:, None, None, None]
    x = x + height * torch.from_numpy(rng.random(x.shape, dtype=np.float32)).to(x)
    return torch.stack([clip.roll(int(shift), dims=1) for clip, shift in zip(x, rng.integers(-10, 11, len(x)))])


def augmented(waveforms, lengths, targets, config, recipe, rng):
    """A training batch -> spectrogram (B, 1, T, 128), targets (B, classes)."""
    waveforms = as_float(waveforms)
    if recipe.roll:
        waveforms = roll_and_gain(waveforms, lengths, rng)
    x = spectrogram(waveforms, lengths, config.frames, config.mean, config.std)
    if recipe.mixup and rng.random() < recipe.mixup_prob:
        x, targets = mixup(x, targets, recipe.mixup, rng)
    elif recipe.label_smoothing and not recipe.mixup:
        targets = targets * (1 - recipe.label_smoothing) + recipe.label_smoothing / targets.shape[1]
    if recipe.spec_augment:
        x = spec_augment(x, recipe.spec_augment, rng)
    return add_noise_and_roll(x, rng) if recipe.noise else x, targets


# ---------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------


def average_precision(scores, targets):
    """scores, targets: (clips, classes) -> (classes,) float, nan for a class without positives. The mean of the
    precision at each positive, where clips of equal score count as found together."""
    scores, targets = np.asarray(scores, dtype=np.float64), np.asarray(targets) > 0.5
    result = np.full(scores.shape[1], np.nan)
    for k in np.flatnonzero(targets.any(0)):
        order = np.argsort(-scores[:, k], kind="stable")
        ranked, hits = scores[order, k], targets[order, k]
        last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # last clip of each group of ties
        found = np.cumsum(hits)[last]
        result[k] = np.sum(np.diff(found, prepend=0) * found / (last + 1)) / found[-1]
    return result


def evaluate(scores, targets, classes, multi_label):
    """-> {"metric", "value", "per_class", "confusion" (single label), "note"}, plain numbers. mAP is the mean over the
    classes with positives."""
    if multi_label:
        each = average_precision(scores, targets)
        empty = [name for name, value in zip(classes, each) if np.isnan(value)]
        return {
            "metric": "mAP", "value": float(np.nanmean(each)),
            "per_class": {name: None if np.isnan(value) else float(value) for name, value in zip(classes, each)},
            "note": f"{len(empty)} classes have no positive and are left out: {describe_few(empty)}" if empty else "",
        }
    predicted, label = scores.argmax(1), targets.argmax(1)
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.long)
    confusion.index_put_((label, predicted), torch.tensor(1), accumulate=True)  # rows: what it is
    tested = confusion.sum(1)
    return {
        "metric": "accuracy", "value": (predicted == label).float().mean().item(), "confusion": confusion.tolist(),
        "per_class": {name: (confusion[k, k] / tested[k]).item() if tested[k] else None for k, name in enumerate(classes)},
        "note": "",
    }


# ---------------------------------------------------------------------------------------------------------
# Fine-tuning
# ---------------------------------------------------------------------------------------------------------


def make_optimizer(model, recipe):
    """AdamW; block i of L learns at layer_decay^(L + 1 - i) of the rate. As in the release the patch embedding, CLS, the
    first norm and the head learn at the full rate."""
    L, groups = len(model.encoder.blocks), collections.defaultdict(list)
    for name, p in model.named_parameters():
        scale = 1.0
        if name.startswith("encoder.blocks."):
            scale = recipe.layer_decay ** (L - int(name.split(".")[2]))
        groups[scale, recipe.weight_decay if p.ndim > 1 else 0.0].append(p)
    groups = [{"params": ps, "weight_decay": decay, "scale": scale} for (scale, decay), ps in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(recipe.beta1, recipe.beta2), eps=recipe.adam_eps, fused=True)


def training_order(train, data, recipe, seed):
    """-> a function from an epoch to the clips it trains on."""
    if not recipe.weighted:
        order = eat.shuffled(len(train), seed)
        return lambda epoch: train[order(epoch)]
    if data.weights is None:
        raise UsageError(f"{recipe.data}: --weighted needs sampling weights (a weight*.csv beside train.tsv)")
    weights = data.weights[train].double()
    return lambda epoch: train[torch.multinomial(
        weights, 200_000, replacement=True, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))]


def fit(model, data, fold, config, recipe, machine, stop, log, save, resumed=None):
    """Train a Classifier on one fold, calling save(step, optimizer, scaler) on the way -> whether it got to the end."""
    device, train = machine.device, data.folds[fold][0]
    number = list(data.folds).index(fold)
    optimizer = make_optimizer(model, recipe)
    scaler = eat.make_scaler(machine)
    step = 0
    if resumed:
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        step = resumed["step"]
    net = machine.wrap(model)
    order = training_order(train, data, recipe, recipe.seed * 100 + number)
    batches = iter(DataLoader(data.clips, batch_sampler=eat.Shares(order, recipe, step), num_workers=machine.workers,
                              collate_fn=lambda batch: batch, pin_memory=device.type == "cuda",
                              worker_init_fn=eat.ignore_signals))
    bar = tqdm(total=recipe.steps, initial=step, desc=fold, unit="step", disable=None)
    not_finite = eat.NotFinite(machine)
    model.train()
    while step < recipe.steps and not stop.agreed:
        rng = np.random.default_rng((recipe.seed, number, step))
        torch.manual_seed(int(rng.integers(2**62)))  # DropPath's
        for _ in range(recipe.accumulate):
            waveforms, lengths, numbers, skipped = next(batches)
            data.clips.skipped |= skipped
            if not len(numbers):
                raise AudioError(recipe.data, f"no clip of a batch can be read; {describe_skipped(skipped)}")
            waveforms, lengths = waveforms.to(device, non_blocking=True), lengths.to(device, non_blocking=True)
            targets = data.targets(numbers.tolist()).to(device, non_blocking=True)
            x, targets = augmented(waveforms, lengths, targets, config, recipe, rng)
            with machine.arithmetic():
                logits = net(x).float()
            if recipe.loss == "ce":
                loss = F.cross_entropy(logits, targets)
            else:
                loss = F.binary_cross_entropy_with_logits(logits, targets)
            scaler.scale(loss / recipe.accumulate).backward()
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step) * group["scale"]
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        eat.skip_unless_finite(optimizer, norm)
        not_finite.add(norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if step % recipe.log_every == 0 or step == recipe.steps:
            value = loss.item()
            log.append({"fold": fold, "step": step, "loss": value if math.isfinite(value) else None,
                        "lr": recipe.learning_rate(step), "not_finite": not_finite.take()})
            not_finite.check()
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{value:.3f}")
        if stop.agree(True) or step % recipe.save_every == 0 and step < recipe.steps:
            save(step, optimizer, scaler)
    bar.close()
    return step == recipe.steps


def chosen_folds(data, recipe):
    return [fold for fold in data.folds if recipe.fold is None or fold == f"fold {recipe.fold}"]


def fine_tune(data, encoder, config, recipe, machine, resumed):
    """Every fold: train, then test once -> {fold: its results}, or the number of the signal that stopped it."""
    done = resumed["done"] if resumed else {}
    seen = {fold: recipe.steps for fold in done} | ({resumed["fold"]: resumed["step"]} if resumed else {})
    log = eat.JsonLines(os.path.join(recipe.out, "log.jsonl"), lambda line: line["step"] <= seen.get(line.get("fold"), 0))
    stop = eat.StopSignal(machine)
    for fold in chosen_folds(data, recipe):
        if fold in done:
            continue
        torch.manual_seed(recipe.seed)
        model = Classifier(encoder(), data.classes, recipe.drop_path).to(machine.device)
        resumed = resumed if resumed and resumed["fold"] == fold else None
        if resumed:
            model.load_state_dict(resumed["model"])

        def save(step, optimizer=None, scaler=None):
            eat.try_to_save(recipe.out, {
                "config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe), "classes": data.classes,
                "multi_label": data.multi_label, "fold": fold, "step": step, "done": done, "model": model.state_dict(),
                "optimizer": optimizer and optimizer.state_dict(), "scaler": scaler and scaler.state_dict()},
                last=stop.agreed or len(done) == len(chosen_folds(data, recipe)))

        if not fit(model, data, fold, config, recipe, machine, stop, log, save, resumed):
            return stop.agreed
        model.eval()
        tested = eat.outputs(machine.compiled(model), config, data.clips, data.folds[fold][1], machine)
        scores, used = zip(*((x.float().cpu(), used) for x, used in tested))
        done[fold] = evaluate(torch.cat(scores), data.targets(torch.cat(used).tolist()), data.classes, data.multi_label)
        say_fold(fold, done[fold])
        save(recipe.steps)
    stop.restore()
    return done


# ---------------------------------------------------------------------------------------------------------
# Frozen features: linear probe and nearest neighbours
# ---------------------------------------------------------------------------------------------------------


def linear_scores(bank, targets, queries, l2, multi_label):
    """Logistic regression on standardised features, to the optimum: L-BFGS in float64 on the summed loss
    + l2 / 2 * |w|^2 -> scores (m, classes) of the queries."""
    mean, std = bank.mean(0), bank.std(0) + 1e-6
    bank, queries = (((x - mean) / std).double() for x in (bank, queries))
    targets = targets.double()
    weight = torch.zeros(bank.shape[1], targets.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(targets.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_change=1e-10, line_search_fn="strong_wolfe")
    loss = F.binary_cross_entropy_with_logits if multi_label else F.cross_entropy

    def closure():
        solver.zero_grad()
        total = loss(bank @ weight + bias, targets, reduction="sum") + l2 / 2 * weight.square().sum()
        total = total / len(bank)
        total.backward()
        return total

    solver.step(closure)
    return (queries @ weight + bias).detach()


def mel_statistics(data, config, machine):
    """What no network gives: mean and standard deviation over time of each mel band -> (n, 256). Padding does not count."""
    padding = (torch.zeros(1, device=machine.device) - config.mean) / (2 * config.std)  # as `spectrogram` computes it

    def statistics(x):  # (B, 1, T, 128)
        x = x[:, 0]
        sound = (x != padding).any(2, keepdim=True)
        count = sound.sum(1)
        mean = (x * sound).sum(1) / count
        return torch.cat([mean, ((x - mean[:, None]).square() * sound).sum(1).div(count).sqrt()], dim=1)

    return torch.cat([x.float().cpu() for x, _ in eat.outputs(statistics, config, data.clips, range(len(data.clips)), machine)])


def probe(data, encoder, config, recipe, machine):
    """Frozen features of all clips once, then every fold -> {kind of features: {fold: its results}}."""
    kinds, used = eat.features(encoder().to(machine.device), config, data.clips, range(len(data.clips)), machine)
    kinds["no network"] = mel_statistics(data, config, machine)
    targets, results = data.targets(used.tolist()), {}
    for kind, x in kinds.items():
        results[kind] = {}
        for fold in chosen_folds(data, recipe):
            train, test = (torch.isin(used, numbers) for numbers in data.folds[fold])
            if recipe.mode == "knn":
                scores = eat.nearest_neighbours(x[train], targets[train], x[test], recipe.neighbours)
            else:
                scores = linear_scores(x[train], targets[train], x[test], recipe.l2, data.multi_label)
            results[kind][fold] = evaluate(scores, targets[test], data.classes, data.multi_label)
    return results


# ---------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------


def say_fold(fold, result):
    print(f"{fold}: {result['metric']} {result['value']:.1%}" + (f" ({result['note']})" if result["note"] else ""), flush=True)


def summary(folds):
    """Mean ± standard deviation over the folds, in words."""
    values = np.array([result["value"] for result in folds.values()])
    spread = f" ± {100 * values.std(ddof=1):.1f} over {len(values)} folds" if len(values) > 1 else ""
    return f"{next(iter(folds.values()))['metric']} {100 * values.mean():.1f} %{spread}"


def write_results(results, data, recipe, config):
    """results.json, and confusion.png where clips have one label each."""
    with open(os.path.join(recipe.out, "results.json"), "w") as file:
        json.dump({
            "data": str(data), "results": results, "skipped": data.clips.skipped, "notes": data.notes,
            "recipe": dataclasses.asdict(recipe), "config": dataclasses.asdict(config), "command": sys.argv,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "torchaudio": torchaudio.__version__},
        }, file, indent=1)
    if data.multi_label:
        return
    best = results.get("fine-tuned") or results["mean of patches"]
    confusion = np.sum([result["confusion"] for result in best.values()], axis=0)
    size = 3 + 0.3 * len(data.classes)
    figure, axes = pyplot().subplots(figsize=(size, size), layout="constrained")
    axes.imshow(confusion, cmap="Blues")
    axes.set_xticks(range(len(data.classes)), data.classes, rotation=90)
    axes.set_yticks(range(len(data.classes)), data.classes)
    axes.set(xlabel="predicted", ylabel="label", title=summary(best))
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            axes.text(column, row, count, ha="center", va="center", fontsize=7,
                      color="white" if count > confusion.max() / 2 else "black")
    save_picture(figure, os.path.join(recipe.out, "confusion.png"))


# ---------------------------------------------------------------------------------------------------------
# Any sound: predict and embed
# ---------------------------------------------------------------------------------------------------------


class Windows(Dataset):
    """Sound of any length as a model's windows: file k -> waveforms (n, samples), lengths (n,), and the reason if there are
    none. Windows follow each other every `frames` frames; the last one is padded, as short clips are."""

    def __init__(self, paths, frames):
        self.files, self.frames = [], frames  # (pack, its file's number), or (None, path)
        for path in paths:
            pack = Pack(path) if is_pack(path) else None
            self.files += [(pack, k) for k in np.flatnonzero(pack.lengths)] if pack else [(None, k) for k in existing_audio(path)]

    def __len__(self):
        return len(self.files)

    def name(self, k):
        pack, file = self.files[k]
        return pack.name(file) if pack else file

    def __getitem__(self, k):
        pack, file = self.files[k]
        try:
            waveform = as_float(pack.read(file)) if pack else load_audio(file)
        except AudioError as error:
            return None, None, error.reason
        if len(waveform) < WINDOW:
            return None, None, "shorter than a window of 25 ms"
        hop, samples = self.frames * SHIFT, clip_samples(self.frames)
        count = 1 + (len(waveform) - WINDOW) // hop
        lengths = torch.tensor([min(samples, len(waveform) - k * hop) for k in range(count)])
        waveform = F.pad(waveform, (0, max(0, (count - 1) * hop + samples - len(waveform))))
        return waveform.unfold(0, samples, hop)[:count], lengths, None


@torch.no_grad()
def run_windows(model, config, paths, machine, batch_size=32):
    """Yields (name, model's output for each of its windows, their lengths) of the files that can be read, working in
    batches across files; says which cannot be read."""
    model = machine.compiled(model.eval().to(machine.device))
    files = Windows(paths, config.frames)
    loader = DataLoader(files, batch_size=None, num_workers=machine.workers)
    waiting, ready, batch, skipped = collections.deque(), [], [], {}  # files whose windows are not all through; outputs

    def run(batch):
        waveforms, lengths = (torch.stack(part).to(machine.device) for part in zip(*batch))
        ready.extend(eat.run_batch(model, config, waveforms, lengths, machine, batch_size).float().cpu())

    for k, (waveforms, lengths, reason) in enumerate(tqdm(loader, "files", disable=None)):
        if reason:
            skipped[files.name(k)] = reason
        else:
            waiting.append((files.name(k), lengths))
            batch += zip(waveforms, lengths)
        while len(batch) >= batch_size or batch and k == len(files) - 1:
            run(batch[:batch_size])
            del batch[:batch_size]
        while waiting and len(ready) >= len(waiting[0][1]):
            name, lengths = waiting.popleft()
            yield name, torch.stack(ready[: len(lengths)]), lengths
            del ready[: len(lengths)]
    if skipped:
        print(f"skipped {len(skipped)}: {describe_skipped(skipped)}", file=sys.stderr)


def predict(args):
    """A table of the likeliest labels of each file; a long file's windows are averaged by what they hold."""
    model = load_classifier(args.checkpoint)
    if args.labels:
        model.classes = read_labels(args.labels, len(model.classes))
    rows = []
    for path, logits, lengths in run_windows(model, model.encoder.config, args.clips, eat.Machine(args)):
        likely = logits.sigmoid() if model.multi_label else logits.softmax(1)
        likely = (likely * lengths[:, None]).sum(0) / lengths.sum()
        value, number = likely.topk(min(args.top, len(likely)))
        rows.append({"clip": path, "labels": [{"label": model.classes[k], "probability": round(v, 4)}
                                              for k, v in zip(number.tolist(), value.tolist())]})
    if args.json:
        print(json.dumps(rows, indent=1))
    for row in [] if args.json else rows:
        print(row["clip"], *(f"    {label['probability']:6.1%}  {label['label']}" for label in row["labels"]), sep="\n")
    return 0 if rows else 1


def read_labels(path, count):
    """Names of `count` classes, from a csv of index, id, name (with a heading or not), or a name a line."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--labels {path}: {error}") from None
    table = all(len(row) >= 3 for row in rows)
    if table:
        rows = sorted((row for row in rows if row[0].strip().isdigit()), key=lambda row: int(row[0]))
    names = [row[2].strip() if table else ",".join(row).strip() for row in rows]
    if len(names) != count:
        raise UsageError(f"--labels {path}: {len(names)} names for {count} classes")
    return names


def embed(args):
    """Features of every file into an .npz: CLS and mean of patches, a row a file; with --frames a row every 0.16 s."""
    encoder, out = eat.load_encoder(args.checkpoint), args.out.removesuffix(".npz") + ".npz"
    eat.make_folder(os.path.dirname(out) or ".")
    paths, columns = [], collections.defaultdict(list)
    for path, tokens, lengths in run_windows(encoder, encoder.config, [args.path], eat.Machine(args)):
        # A window holds as many time steps of 16 frames as its sound reaches into.
        steps = ((lengths - WINDOW) // SHIFT).div(PATCH, rounding_mode="floor") + 1
        grid = tokens[:, 1:].unflatten(1, (-1, MEL_BINS // PATCH))  # (windows, H, W, D)
        if args.frames:
            grid = grid.flatten(2) if args.join else grid.mean(2)
            columns["features"].append(torch.cat([window[:count] for window, count in zip(grid, steps)]))
            columns["path_index"].append(torch.full((len(columns["features"][-1]),), len(paths)))
            columns["seconds"].append(torch.arange(len(columns["path_index"][-1])) * PATCH * SHIFT / SAMPLE_RATE)
        else:
            share = (lengths / lengths.sum())[:, None]
            columns["cls"].append((tokens[:, 0] * share).sum(0, keepdim=True))
            columns["mean"].append((tokens[:, 1:].mean(1) * share).sum(0, keepdim=True))
        paths.append(path)
    if not paths:
        raise AudioError(args.path, "no file in it can be read")
    np.savez(out, paths=np.array(paths), **{name: torch.cat(parts).numpy() for name, parts in columns.items()})
    shapes = ", ".join(f"{name} {tuple(torch.cat(parts).shape)}" for name, parts in columns.items())
    print(f"{out}: {len(paths)} files; {shapes}")
    return 0


@torch.no_grad()
def look(args):
    """Draw what an encoder makes of a clip, and what one with random weights makes of it: the first three principal components
    of its patches as red, green and blue, and how CLS attends to them in the last block."""
    encoder = eat.load_encoder(args.checkpoint)
    config = encoder.config
    torch.manual_seed(args.seed)
    encoders = {"random weights": Encoder(config), os.path.basename(args.checkpoint): encoder}
    _, x = first_clip(args.clip, config.frames, config.mean, config.std)
    image, grid = x[0, 0].T.numpy(), (x.shape[2] // PATCH, MEL_BINS // PATCH)
    light = ((image - image.min()) / (image.max() - image.min() + 1e-6))[..., None]

    def per_patch(values):  # (N, ...) -> (128, T, ...)
        return values.unflatten(0, grid).transpose(0, 1).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1).numpy()

    figure = pyplot().figure(figsize=(12, 8), layout="constrained")
    rows = figure.add_gridspec(3, 2)
    draw_spectrogram(axes := figure.add_subplot(rows[0, :]), image)
    axes.set_title(printable(os.path.basename(args.clip)))
    for row, (name, model) in enumerate(encoders.items(), 1):
        patches = model.eval()(x)[0, 1:]
        patches = patches - patches.mean(0)
        components = patches @ torch.linalg.svd(patches, full_matrices=False).Vh[:3].T  # (N, 3)
        low, high = components.quantile(0.02, 0), components.quantile(0.98, 0)
        colour = ((components - low) / (high - low + 1e-6)).clamp(0, 1)
        draw_spectrogram(axes := figure.add_subplot(rows[row, 0]), per_patch(colour) * (0.25 + 0.75 * light))
        axes.set_title(f"{name}: principal components")
        attention = cls_attention(model, x)
        draw_spectrogram(axes := figure.add_subplot(rows[row, 1]), per_patch(attention / attention.max()))
        axes.set_title(f"{name}: attention of CLS")
    save_picture(figure, args.out)
    print(args.out)
    return 0


def cls_attention(encoder, spectrogram):
    """How much the last block's CLS attends to each patch of one clip, averaged over the heads -> (N,)."""
    tokens = encoder.embed(spectrogram)
    for block in encoder.blocks[:-1]:
        tokens, _ = block(tokens)
    attn = encoder.blocks[-1].attn
    q, k, _ = attn.qkv(tokens).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)  # each (1, heads, 1 + N, D/heads)
    weights = (q[:, :, :1] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # (1, heads, 1, 1 + N)
    return weights[0, :, 0, 1:].mean(0)


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------

MAY_CHANGE = {"data", "checkpoint", "out", "resume", "workers", "device", "precision", "compile", "log_every", "save_every"}


def settle(given):
    """Flags -> (FineTune, EATConfig, Labelled, a function that makes the encoder, the checkpoint to go on from or None)."""
    given = {"out": f"out-{given.get('mode', FineTune.mode)}", **given}
    out = given["out"]
    found, resumed = eat.find_checkpoints(out), None
    if found and given.get("resume"):
        resumed = eat.newest_checkpoint(out)
        if "classes" not in resumed:
            raise UsageError(f"{out}: not a fine-tuning run")
        eat.keep_settings(given, resumed["recipe"], MAY_CHANGE, out)
        given = {**resumed["recipe"], **given}
    elif found or os.path.exists(os.path.join(out, "results.json")):
        raise UsageError(f"{out} holds results already: " + "--resume goes on with it, " * bool(found)
                         + "another --out starts beside it")
    if not given.get("data"):
        raise UsageError("--data is missing: a labelled data set, or 'demo'")

    checkpoint, seed = given.get("checkpoint"), given.get("seed", FineTune.seed)
    preset = given.get("preset", FineTune.preset)
    start = eat.load_encoder(checkpoint).config if checkpoint else EATConfig.preset(preset)
    data = open_labelled(given["data"], start.frames, given.get("esc10", False), seed)
    name = given.get("recipe") or recipe_for(data)
    row = RECIPES.get(name, {k: v for k, v in RECIPES["esc50"].items() if k not in ("frames", "stats")})
    recipe = FineTune(**{"frames": start.frames, "stats": "checkpoint", **({} if checkpoint else {"layer_decay": 1.0}),
                         **row, **given, "recipe": name})
    if recipe.mode != "finetune" and checkpoint and "stats" not in given:
        recipe.stats = "checkpoint"
    mean, std = STATS.get(recipe.stats, (start.mean, start.std))
    config = dataclasses.replace(start, frames=recipe.frames, mean=mean, std=std)
    if recipe.frames != start.frames:
        data = open_labelled(recipe.data, recipe.frames, recipe.esc10, seed)
    if recipe.fold is not None:
        if f"fold {recipe.fold}" not in data.folds:
            raise UsageError(f"--fold {recipe.fold}: {recipe.data} has {', '.join(data.folds)}")
    if recipe.batch_size % recipe.accumulate:
        raise UsageError(f"--batch-size {recipe.batch_size}: must be a multiple of --accumulate {recipe.accumulate}")

    def encoder():
        model = Encoder(config)
        if checkpoint:
            model.load_state_dict(eat.load_encoder(checkpoint).state_dict())
        return model

    return recipe, config, data, encoder, resumed


def train_or_probe(given):
    """The main job -> exit status."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("fine-tuning and probing run in one process: start them without torchrun")
    recipe, config, data, encoder, resumed = settle(given)
    machine = eat.Machine(recipe, data.clips.packed)
    eat.make_folder(recipe.out)
    print(f"data     {data}", *(f"note     {note}" for note in data.notes), sep="\n")
    print(f"encoder  {recipe.checkpoint or 'random weights'}: D {config.dim}, {config.depth} blocks; clips of "
          f"{config.frames / 100:.2f} s, mean {config.mean}, std {config.std}")
    if recipe.mode == "finetune":
        print(f"recipe   {recipe.recipe or 'as esc50'}: {recipe.steps:,} steps x {recipe.batch_size} clips, learning rate "
              f"{recipe.lr:.3g}, layer decay {recipe.layer_decay}, {recipe.loss}, mixup {recipe.mixup}; seed {recipe.seed}",
              flush=True)
        folds = fine_tune(data, encoder, config, recipe, machine, resumed)
        if isinstance(folds, int):
            print(f"stopped; the same command with --resume goes on from {recipe.out}")
            return 128 + folds
        results = {"fine-tuned": folds}
        print(f"fine-tuned: {summary(folds)}")
    else:
        torch.manual_seed(recipe.seed)
        results = probe(data, encoder, config, recipe, machine)
        for kind, folds in results.items():
            print(f"{recipe.mode}, {kind}: {summary(folds)}")
    if data.clips.skipped:
        print(f"skipped {len(data.clips.skipped)}: {describe_skipped(data.clips.skipped)}")
    write_results(results, data, recipe, config)
    print(f"written to {recipe.out}")
    return 0


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = eat.Parser(prog="finetune.py", description=__doc__)
    if argv[:1] == ["look"]:
        parser = eat.Parser(prog="finetune.py look", description=look.__doc__)
        parser.add_argument("clip", help="a sound file, or 'demo'")
        parser.add_argument("--checkpoint", required=True, help="a checkpoint")
        parser.add_argument("--out", default="look.png", help="the picture [look.png]")
        parser.add_argument("--seed", type=eat.at_least(0), default=0, help="of the random weights [0]")
        job, given = look, parser.parse_args(argv[1:])
    elif argv[:1] in (["predict"], ["embed"]):
        parser = eat.Parser(prog=f"finetune.py {argv[0]}", description=globals()[argv[0]].__doc__)
        if argv[0] == "predict":
            parser.add_argument("clips", nargs="+", help="sound files, folders, lists or packs")
            parser.add_argument("--top", type=eat.at_least(1), default=5, help="labels a file [5]")
            parser.add_argument("--labels", help="names of the classes: a csv of index, id, name, or a name a line")
            parser.add_argument("--json", action="store_true", help="JSON instead of a table")
        else:
            parser.add_argument("path", help="a sound file, a folder, a list or a pack")
            parser.add_argument("--out", default="features.npz", help="[features.npz]")
            parser.add_argument("--frames", action="store_true", help="a row every 0.16 s instead of one a file")
            parser.add_argument("--join", action="store_true", help="with --frames: join the 8 frequency patches, not average")
        parser.add_argument("--checkpoint", required=True, help="a checkpoint")
        parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu", "mps"), help="[auto]")
        parser.add_argument("--precision", choices=tuple(eat.PRECISIONS), help=eat.PRECISION_HELP)
        parser.add_argument("--compile", action="store_true", help="pays for many files, on CUDA")
        parser.add_argument("--workers", type=eat.at_least(0), default=0, help="processes that read sound, for many files [0]")
        job, given = globals()[argv[0]], parser.parse_args(argv[1:])
    else:
        eat.add_flags(parser, FineTune)
        job, given = train_or_probe, vars(parser.parse_args(argv))
    return eat.guarded("finetune.py", job, given)


if __name__ == "__main__":
    sys.exit(main())
