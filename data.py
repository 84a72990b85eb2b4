"""Sound in, spectrograms out.

    python data.py pack PATH OUT     a folder's sound decoded once, for every run after: --data OUT

`load_audio` reads any file that soundfile reads; `fbank` is Kaldi's log-mel filterbank for a batch;
`open_clips` turns a path into a data set of clips of equal length, `open_labelled` into one with
labels and folds; `loading` reads their batches, and `spectrogram` makes of those what a model eats.
At the end stands what the command lines of all three programs share.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import math
import os
import signal
import sys
import typing
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

SAMPLE_RATE = 16000
WINDOW, SHIFT, FFT = 400, 160, 512  # samples: 25 ms every 10 ms, padded to a power of two
MEL_BINS = 128
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au",
                 ".snd", ".caf", ".w64", ".rf64")

# Mean and standard deviation of the log-mel spectrogram, as the release has them.
STATS = {"audioset": (-4.268, 4.569), "esc50": (-6.627, 5.359), "spc2": (-6.846, 5.565)}


class UsageError(Exception):
    """Something the user can mend: one line, exit status 2."""


class AudioError(UsageError):
    """A path that cannot be used as sound, and the reason."""

    def __init__(self, path, reason):
        self.path, self.reason = str(path), reason
        super().__init__(f"{printable(self.path)}: {reason}")


def printable(name):
    """A file's name in one line that any terminal takes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def describe_skipped(skipped, most=3):
    named = [printable(f"{path} ({reason})") for path, reason in list(skipped.items())[:most]]
    return ", ".join(named) + (f" and {len(skipped) - most} more" if len(skipped) > most else "")

# ---- Reading sound -------------------------------------------------------------------------------


def load_audio(path, start=0.0, seconds=math.inf):
    """A sound file, or `seconds` of it from second `start` -> 1-D float32 waveform, mono, 16 kHz,
    finite. A part is found by seeking, where the format can seek, and then costs no more memory
    than it has samples. Raises AudioError."""
    blocks = []
    with opened(path) as file, np.errstate(all="ignore"):  # what is not finite is found below
        rate = file.samplerate
        if file.seekable():
            file.seek(round(start * rate))
        else:  # as GSM's are
            file.read(round(start * rate), "float32")
        left = math.ceil(seconds * rate) if seconds < math.inf else file.frames
        most = (1 << 22) // file.channels  # block by block: a header may claim any length
        while left > 0 and len(block := file.read(min(left, most), "float32", always_2d=True)):
            blocks.append(block.mean(axis=1))
            left -= len(block)
    if not blocks:
        raise AudioError(path, "holds no samples")
    waveform = _resampled(torch.from_numpy(np.concatenate(blocks)), rate)
    if not waveform.abs().max() < 1e12:  # no sound; far above, its spectrogram is not finite
        raise AudioError(path, "holds samples that are not finite, or above 1e12")
    return waveform


@contextlib.contextmanager
def opened(path):
    """A sound file, open. Whatever is wrong with it is an AudioError: this file's problem alone."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise AudioError(path, "no such file")
    # As bytes, which need not be UTF-8, where the system's names are bytes.
    name = path if os.name == "nt" else os.fsencode(path)
    try:
        with soundfile.SoundFile(name) as file:
            if not 1000 <= file.samplerate <= 1_000_000:
                raise ValueError(f"{file.samplerate} samples a second, expected 1000 to 1000000")
            if file.frames <= 0:
                raise ValueError("no samples in it")
            yield file
    except MemoryError:
        raise
    except Exception as error:  # soundfile says "Error opening 'path': reason."
        reason = str(error).rsplit(": ", 1)[-1].rstrip(".")
        raise AudioError(path, f"cannot be read as sound ({reason})") from None


def _resampled(waveform, rate):
    """To 16 kHz, in pieces, as torchaudio takes many times the memory of what it resamples. `old`
    samples become `new`. Around each piece are 32 * old more, so that the filter, which is
    narrower, finds what it needs."""
    resampler, pieces = _resampler(rate), []
    old, new = resampler.orig_freq // resampler.gcd, resampler.new_freq // resampler.gcd
    size = (1 << 22) // old * old
    for start in range(0, len(waveform), size):
        before = min(start, 32 * old)
        piece = resampler(waveform[start - before : start + size + 32 * old])
        pieces.append(piece[before // old * new :][: size // old * new])
    return torch.cat(pieces)


@functools.lru_cache(maxsize=32)
def _resampler(rate):
    """To 16 kHz. The filter grows with the terms of the ratio of the rates, and from 44,101 Hz
    (real files have it) takes 80 s to build. So the ratio is rounded to terms of at most 1,000.
    That shifts the pitch by less than a cent (6e-4), and by nothing for the usual rates."""
    low, high = Fraction(*sorted((rate, SAMPLE_RATE))).limit_denominator(1000).as_integer_ratio()
    terms = (low, high) if rate < SAMPLE_RATE else (high, low)
    return torchaudio.transforms.Resample(*terms)

# ---- Spectrograms --------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _mel_banks(device):
    banks, _ = torchaudio.compliance.kaldi.get_mel_banks(
        MEL_BINS, FFT, SAMPLE_RATE, 20.0, 0.0, 100.0, -500.0, 1.0)
    return F.pad(banks, (0, 1)).T.to(device)  # (257, 128); the Nyquist bin belongs to no band


def fbank(waveforms):
    """(B, samples) at 16 kHz -> (B, frames, 128) log-mel energies.

    Equals torchaudio.compliance.kaldi.fbank(htk_compat=True, sample_frequency=16000,
    use_energy=False, window_type="hanning", num_mel_bins=128, dither=0, frame_shift=10) of each
    row. The release takes a clip's mean off first. As each window's own comes off here, that
    changes nothing."""
    x = waveforms.unfold(1, WINDOW, SHIFT)  # (B, frames, 400)
    x = x - x.mean(dim=2, keepdim=True)
    previous = torch.cat([x[..., :1], x[..., :-1]], dim=2)
    window = torch.hann_window(WINDOW, periodic=False, device=x.device)
    x = (x - 0.97 * previous) * window  # pre-emphasis
    power = torch.fft.rfft(x, FFT).abs().square()
    return (power @ _mel_banks(x.device)).clamp(min=torch.finfo(torch.float32).eps).log()


def clip_samples(frames):
    """How many samples fill `frames` frames."""
    return (frames - 1) * SHIFT + WINDOW


def count_frames(samples):
    """How many whole windows fit into that many samples; numbers or tensors."""
    return (samples - WINDOW) // SHIFT + 1


def spectrogram(waveforms, lengths, frames, mean, std):
    """(B, samples), of which `lengths` (B,) are sound and the rest padding -> (B, 1, frames, 128).
    As in the release, cut, or padded with zeros *before* the normalisation (x - mean) / (2 std)."""
    x = fbank(waveforms)[:, :frames]
    x = F.pad(x, (0, 0, 0, frames - x.shape[1]))
    place = torch.arange(frames, device=x.device)[:, None]
    x = torch.where(place < count_frames(lengths)[:, None, None], x, 0.0)
    return ((x - mean) / (2 * std))[:, None]


def loudness(x, std, filled, size):
    """How loud the stretches of `size` frames of spectrograms (B, 1, T, 128) are, by Stevens' law
    power ** 0.3 -> as shares (B, T / size), which sum to 1 over the first `filled` (B,) stretches
    and are 0 in the padding behind them."""
    level = (2 * std * x[:, 0]).unflatten(1, (-1, size)).logsumexp((2, 3))  # log of the power
    padding = torch.arange(level.shape[1], device=x.device) >= filled[:, None]
    return (0.3 * level).masked_fill(padding, -math.inf).softmax(1)


def measure_stats(clips):
    """Mean and standard deviation of the log-mel spectrogram over at most 1,000 clips, evenly
    chosen -> (mean, std). Padding does not count."""
    count = total = squares = 0
    for number in np.linspace(0, len(clips) - 1, min(1000, len(clips))).astype(int).tolist():
        batch = clips[[number]]
        if not len(batch.numbers):
            raise UsageError(f"no clip can be used: {describe_skipped(batch.skipped)}")
        x = fbank(batch.waveforms[:, : batch.lengths.item()]).double()
        count += x.numel()
        total += x.sum().item()
        squares += x.square().sum().item()
    mean = total / count
    std = round(math.sqrt(max(0.0, squares / count - mean**2)), 4)
    if not std:
        raise AudioError(clips.name(0), "it and all other clips are too quiet to learn from")
    return round(mean, 4), std

# ---- Clips, their order, and batches of them -----------------------------------------------------


class Batch(typing.NamedTuple):
    waveforms: torch.Tensor  # (B, samples), zeros at the end
    lengths: torch.Tensor  # (B,): how many samples are sound
    numbers: torch.Tensor  # (B,) of the clips
    skipped: dict  # what could not be used: path -> reason


class Clips(Dataset):
    """Clips of `frames` frames, by number, out of a source of sound: all of it, where a long file
    becomes several clips, the last of which ends with it; or the beginnings of some of its `files`.

    A source (SoundFiles, Pack, Demo) has the `names` of its files, their `lengths` in samples, 0
    where one cannot be read, then `skipped` with the reason, and read(file, start, count): 1-D
    float32, at 16 kHz. If it is `packed`, reading is no more than copying."""

    def __init__(self, source, frames, files=None):
        self.source, self.frames, self.samples = source, frames, clip_samples(frames)
        self.packed = source.packed
        self.skipped = {}  # what was left out so far: path -> reason
        self.named = 0  # how many of those the log has named
        self.replace = files is None  # does another clip take the place of one of no use?
        self.silence = files is not None  # may a clip be silent?
        if files is None:
            pieces = np.ceil(source.lengths / self.samples).astype(np.int64)
            self.file = np.repeat(np.arange(len(pieces), dtype=np.int32), pieces)
            number = np.arange(len(self.file)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            last = np.maximum(source.lengths - self.samples, 0)[self.file]
            self.start = np.minimum(number * self.samples, last)
            self.skipped |= source.skipped
        else:
            self.file, self.start = np.asarray(files), np.zeros(len(files), dtype=np.int64)

    def __len__(self):
        return len(self.file)

    def name(self, number):
        return self.source.names[self.file[number]]

    def usable(self, number):
        """Clip `number`. Raises AudioError where there is nothing in it to learn from."""
        waveform = self.source.read(self.file[number], self.start[number], self.samples)
        if len(waveform) < WINDOW:
            raise AudioError(self.name(number), "shorter than a window of 25 ms")
        low, high = waveform.aminmax()
        if not self.silence and high.item() - low.item() < 2e-5:  # the release keeps silence
            raise AudioError(self.name(number), "a clip of it is silent")
        return waveform

    def __getitem__(self, numbers):
        """The batch of some clips; smaller where one is of no use, and none takes its place."""
        rows, used, skipped = [], [], {}
        for number in numbers:
            for k in range(len(self) if self.replace else 1):
                # The next one may lie in the same bad file. By steps of a prime all come in turn.
                candidate = (number + k * (2**31 - 1)) % len(self)
                try:
                    rows.append(self.usable(candidate)[: self.samples])
                    used.append(candidate)
                    break
                except AudioError as error:
                    skipped[error.path] = error.reason
            if self.replace and not used:
                break  # none of all the clips can be used
        waveforms = torch.zeros(len(rows), self.samples)
        for waveform, row in zip(waveforms, rows):
            waveform[: len(row)] = row
        lengths = torch.tensor([len(row) for row in rows])
        return Batch(shared(waveforms), lengths, torch.tensor(used), skipped)

    def advice(self):
        """A remark on the length of a clip, where many are much shorter, or where only the
        beginnings of longer files are used."""
        lengths = []
        for number in np.linspace(0, len(self) - 1, min(100, len(self))).astype(int):
            with contextlib.suppress(AudioError):
                place = self.file[number], self.start[number]
                lengths.append(len(self.source.read(*place, 2 * self.samples)))
        # Labelled files are cut, not split: there a shorter clip must hold nearly all of them.
        share, many = (0.5, "half") if self.replace else (0.95, "nearly all")
        most, median = np.quantile(lengths or [self.samples], (share, 0.5))
        if most < 0.6 * self.samples:
            frames = 16 * math.ceil(count_frames(max(most, 3000)) / 16)
            return (f"; {many} of the clips hold no more than {most / SAMPLE_RATE:.2f} s of sound, "
                    f"and the rest of them is padding: try --frames {frames}")
        if median > 1.5 * self.samples and not self.start.any():
            seconds = 1.5 * self.samples / SAMPLE_RATE
            return (f"; half of the files are longer than {seconds:.2f} s, and of each only the "
                    "beginning is used: see --frames")
        return ""


def shared(x):
    """What a worker sends goes through shared memory. If that is full, the error comes here, and
    reaches the main process, which would otherwise wait for ever."""
    return x.share_memory_() if torch.utils.data.get_worker_info() else x


class SoundFiles:
    """Sound files as a source of clips. Their headers tell their lengths, unless they lie."""

    packed = False

    def __init__(self, names):
        self.names, self.skipped = names, {}

    @functools.cached_property
    def lengths(self):
        numbers = tqdm(range(len(self.names)), "reading headers", disable=None, leave=False)
        return np.array([self._length(number) for number in numbers])

    def _length(self, file):
        path = self.names[file]
        try:
            with opened(path) as sound:
                if sound.frames <= 64 * os.path.getsize(path):  # samples a byte
                    return math.ceil(sound.frames * SAMPLE_RATE / sound.samplerate)
            return len(load_audio(path))  # its header lies
        except AudioError as error:
            self.skipped[path] = error.reason
            return 0

    def read(self, file, start, count):
        return load_audio(self.names[file], start / SAMPLE_RATE, count / SAMPLE_RATE)

    def __getitem__(self, file):
        """All of a file, for a pack: int16 samples, the value of a sample of 1, what is wrong."""
        try:
            waveform = load_audio(self.names[file])
        except AudioError as error:
            return torch.zeros(0, dtype=torch.int16), 1 / 32768, error.reason
        unit = max(1.0, waveform.abs().max().item()) / 32768
        samples = (waveform / unit).round().clamp(-32768, 32767).short()
        return shared(samples), unit, None


_real_folder = functools.lru_cache(maxsize=None)(os.path.realpath)


def whole_name(path):
    """From the root on, and the same whichever links lead to its folder."""
    folder, name = os.path.split(path)
    return os.path.join(_real_folder(folder), name)


def _warn(error):
    print(f"skipped  {printable(error.filename)}: {error.strerror}", file=sys.stderr)


def find_audio(path):
    """The sound files that `path` stands for: a folder, searched recursively, and sorted; a sound
    file; or a list, with one path a line, relative to the list's folder, or the release's manifest
    (first line the root folder, then `path<tab>samples`). Raises AudioError where there is none."""
    if os.path.isdir(path):
        found, seen = [], set()
        for folder, below, names in os.walk(path, onerror=_warn, followlinks=True):
            if os.path.realpath(folder) in seen:  # links may lead in circles
                below.clear()
                continue
            seen.add(os.path.realpath(folder))
            below.sort()  # whichever way leads to a folder first
            found += [os.path.join(folder, name) for name in names
                      if name.lower().endswith(AUDIO_ENDINGS) and not name.startswith("._")]
        found.sort()
    elif str(path).lower().endswith(AUDIO_ENDINGS):
        found = [path]
    else:
        root, found = os.path.dirname(path), [line.split("\t")[0] for line in read_lines(path)]
        if found and os.path.isdir(os.path.join(root, found[0])):
            root = os.path.join(root, found.pop(0))
        found = [os.path.join(root, name) for name in found]
    if not found:
        raise AudioError(path, f"no sound in it, or an empty list; looked for "
                               f"{' '.join(AUDIO_ENDINGS)}")
    return found


def read_lines(path):
    """The lines of a text file that are not empty, whatever ends them; no byte-order mark."""
    try:
        return [line for line in Path(path).read_text("utf-8-sig").split("\n") if line.strip()]
    except FileNotFoundError:
        raise AudioError(path, "no such file or folder") from None
    except (OSError, UnicodeDecodeError):
        raise AudioError(path, "no folder, no sound, and no text that can be read") from None


def open_clips(path, frames, seed=0, training=False):
    """`path` ("demo", a pack, or as in `find_audio`) -> Clips of `frames` frames."""
    if path == "demo":
        return Clips(Demo(frames, seed), frames)
    packed = os.path.exists(os.path.join(path, "pack.json"))
    clips = Clips(Pack(path) if packed else SoundFiles(find_audio(path)), frames)
    if packed and training:  # not on eval.tsv, which is in the pack too
        mine = clips.file < clips.source.trained
        clips.file, clips.start = clips.file[mine], clips.start[mine]
    if not len(clips):
        raise AudioError(path, "none of its files can be used; " + describe_skipped(clips.skipped))
    return clips


def seed_of(*numbers):
    """One 64-bit seed out of whole numbers of any size."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def shuffled(clips, seed, position=0):
    """Clip numbers without end, each epoch in an order of its own, from a `position` on."""
    while True:
        epoch, place = divmod(position, clips)
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        yield from torch.randperm(clips, generator=generator)[place:].tolist()
        position += clips - place


def part_size(batch_size, parts):
    """How many clips are in each part of a batch. Raises UsageError where the parts differ."""
    if batch_size % parts:
        raise UsageError(f"--batch-size {batch_size}: must be a multiple of {parts}, processes x "
                         "--accumulate")
    return batch_size // parts


def shares(numbers, batch_size, size, rank=0, world=1):
    """The stream of clip numbers cut into batches -> those of process `rank`, `size` by `size`."""
    while True:
        mine = list(itertools.islice(numbers, batch_size))[rank::world]
        for start in range(0, len(mine), size):
            yield mine[start : start + size]


@contextlib.contextmanager
def loading(clips, batches, workers, device):
    """-> an iterator over what `clips` makes of each list of numbers, read by worker processes (or
    by none), which end when the block is left, however that happens."""
    # To read a pack is to copy: not worth a process, unless this one is busy driving a card.
    workers = 0 if clips.packed and device.type == "cpu" else workers
    # Python 3.14's default is a fork server, whose workers would outlive a killed parent.
    how = "fork" if workers and sys.platform == "linux" else None
    loader = iter(DataLoader(  # without a batch size: `clips` itself makes the batches
        clips, batch_size=None, sampler=batches, num_workers=workers, multiprocessing_context=how,
        worker_init_fn=_settle_worker, pin_memory=device.type == "cuda"))
    try:
        yield loader
    finally:
        if workers:  # an error's traceback may hold the loader until the end of the process
            loader._shutdown_workers()
            for worker in loader._workers:
                if worker.is_alive():  # amid a long file
                    worker.kill()


def _settle_worker(_):
    """The main process decides when to stop: a signal that reaches its workers too (from a
    terminal, or to all that is called eat.py) does nothing. They end when the loader is shut down,
    or when they find that their parent has gone."""
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        signal.signal(number, signal.SIG_IGN)  # Windows has no SIGHUP

# ---- Packed sound: decoded and resampled once ----------------------------------------------------
# A pack is a folder of two files. `samples` holds the samples of all files, 16 kHz mono int16, end
# to end. `pack.json`, written last, has the names of the files, where in `samples` each ends, and
# the float value of a sample of 1 in each; what was packed, and what was skipped; and how many
# files, the first ones, pre-training may use: not those of eval.tsv. A file that cannot be read has
# no samples.


def pack(source, out, workers):
    """Decode all sound in `source` (as in `find_audio`) into the folder `out`. Of a file that
    cannot be read only the name is kept. Of the others nothing is lost but what 16 bits at 16 kHz,
    mono, cannot hold: one whose peak is over 1 is scaled down, and its unit says by how much."""
    lists = [os.path.join(source, name) for name in ("train.tsv", "eval.tsv")]
    manifests = all(map(os.path.exists, lists))  # they may list sound that lies elsewhere
    paths = find_audio(lists[0] if manifests else source)
    held_out = find_audio(lists[1]) if manifests else []
    names = [whole_name(path) for path in paths + held_out]
    ends, units, skipped = [], [], {}
    if os.path.isdir(out) and set(os.listdir(out)) - {"samples", "lock", "pack.json.part"}:
        raise AudioError(out, "holds a pack, or something else, already; choose another folder")
    with (lock(out), open(os.path.join(out, "samples"), "wb") as samples,
          loading(SoundFiles(names), range(len(names)), workers, torch.device("cpu")) as decoded):
        for name, (sound, unit, reason) in zip(tqdm(names, "packing", disable=None), decoded):
            samples.write(sound.numpy().tobytes())
            ends.append(samples.tell() // 2)
            units.append(unit)
            if reason:
                skipped[name] = reason
        if not ends[-1]:
            raise AudioError(source, "nothing in it can be read; " + describe_skipped(skipped))
        samples.flush()
        os.fsync(samples.fileno())
        about = {"source": os.path.abspath(source), "names": names, "trained": len(paths),
                 "ends": ends, "units": units, "skipped": skipped}
        Path(out, "pack.json.part").write_text(json.dumps(about))
        os.replace(os.path.join(out, "pack.json.part"), os.path.join(out, "pack.json"))
    print(f"{out}: {len(names):,} files, {ends[-1] / SAMPLE_RATE / 3600:.2f} hours")
    if skipped:
        print(f"skipped {len(skipped)}: {describe_skipped(skipped)}")


class Pack:
    """An open pack, a source of clips."""

    packed = True

    def __init__(self, path):
        self.path, self.samples = path, os.path.join(path, "samples")
        try:
            about = json.loads(Path(path, "pack.json").read_text())
            self.source, self.names, self.skipped = (
                about[part] for part in ("source", "names", "skipped"))
            self.ends, self.units = np.array(about["ends"]), np.array(about["units"])
            self.trained = about.get("trained", len(self.names))  # behind these are eval.tsv's
            if os.path.getsize(self.samples) != 2 * self.ends[-1]:
                raise ValueError("`samples` is longer or shorter than it was")
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise AudioError(path, f"not a whole pack ({error}); pack the sound again") from None
        self.lengths = np.diff(self.ends, prepend=0)

    def read(self, file, start, count):
        if self.names[file] in self.skipped:
            raise AudioError(self.names[file], self.skipped[self.names[file]])
        first = self.ends[file] - self.lengths[file] + start
        count = min(count, self.lengths[file] - start)
        # Read, not mapped into memory: as fast, and a mapped file that is cut off meanwhile kills.
        try:
            samples = np.fromfile(self.samples, "<i2", count, offset=2 * first)
        except OSError as error:
            raise AudioError(self.path, f"samples: {error.strerror}") from None
        if len(samples) < count:
            raise AudioError(self.path, "samples: ends before pack.json says")
        return torch.from_numpy(samples) * self.units[file].item()

# ---- Demo: sound events made on the fly ----------------------------------------------------------

# Where the pitch is, from 0 (low) to 1 (high), over one cycle u = 0..1. All shapes spend the same
# time at every height, so only the movement tells them apart: the mean spectrum does not.
SHAPES = {
    "rising": lambda u: u,
    "falling": lambda u: 1 - u,
    "zigzag": lambda u: abs(2 * u - 1),
    "leaping": lambda u: (np.array([0, 3, 1, 4, 2])[(5 * u).astype(int)] + 5 * u % 1) / 5,
}
SPEEDS = {"slow": 1.2, "medium": 3.5, "fast": 10.0}  # cycles a second


class Demo:
    """Labelled sound events made from a seed, a source of clips: pitch, span, timbre, level,
    position and background vary; a clip's class is how its pitch moves. The labels are for
    evaluation only."""

    packed, skipped = False, {}
    classes = [f"{speed} {shape}" for speed in SPEEDS for shape in SHAPES]

    def __init__(self, frames, seed=0, size=4000, held_out=False):
        self.stream, self.samples = (seed, int(held_out)), clip_samples(frames)
        self.lengths = np.full(size, self.samples)
        self.names = [f"demo clip {k}" for k in range(size)]
        self.labels = np.arange(size) % len(self.classes)

    def read(self, file, *_):
        rng = np.random.default_rng((*self.stream, file))
        speed, shape = self.classes[self.labels[file]].split()
        length = int(self.samples * rng.uniform(0.8, 0.95))
        t = np.arange(length) / SAMPLE_RATE  # seconds
        cycles = t * SPEEDS[speed] * rng.uniform(0.85, 1.15) + rng.uniform()
        height = SHAPES[shape](cycles % 1)
        pitch = 250 * 2 ** (rng.uniform(0, 0.7) + rng.uniform(2.2, 2.8) * height)  # Hz
        phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
        levels = rng.uniform(0.3, 0.7) ** np.arange(4)
        event = sum(a * np.sin(k * phase) for k, a in enumerate(levels, 1))
        event *= np.minimum(1, np.minimum(t, t[::-1]) / 0.05)  # soft ends
        spectrum = np.fft.rfft(rng.standard_normal(self.samples))  # noise of a random colour
        spectrum /= np.maximum(np.arange(len(spectrum)), 20) ** rng.uniform(0.2, 0.5)
        sound = np.fft.irfft(spectrum, self.samples)
        sound *= 10 ** rng.uniform(-1.6, -1.2) * np.std(event) / np.std(sound)  # 24 to 32 dB below
        start = rng.integers(self.samples - length)
        sound[start : start + length] += event
        return torch.from_numpy(sound * 10 ** rng.uniform(-1.0, -0.5) / np.abs(sound).max()).float()

# ---- Labelled data sets, as they lie on people's disks -------------------------------------------


@dataclasses.dataclass
class Labelled:
    """Clips with labels, one clip a file. Where one cannot be used, no other takes its place, but
    in fine-tuning's training part."""

    kind: str  # "demo", or what its opener below calls it: "ESC-50", "ESC-10", ...
    clips: Clips
    labels: list  # of every clip: a tuple of class numbers
    classes: list  # names
    places: np.ndarray  # of every clip: "train", or the name of the fold that alone tests on it
    weights: torch.Tensor = None  # of every clip, for weighted sampling

    def __post_init__(self):
        self.multi_label = self.kind == "AudioSet manifests"
        self.folds = {}  # name -> (train, test), tensors of clip numbers
        for fold in sorted(set(self.places.tolist()) - {"train"}):
            parts = self.places != fold, self.places == fold
            self.folds[fold] = tuple(torch.from_numpy(np.flatnonzero(part)) for part in parts)

    def split(self, fold, used):
        """Which of the clips `used` a fold trains on, and which it tests on. Raises UsageError."""
        train, test = (torch.isin(used, numbers) for numbers in self.folds[fold])
        if not train.any() or not test.any():
            raise UsageError(f"{fold}: no clip to train on, or none to test on, can be read; "
                             + describe_skipped(self.clips.skipped))
        return train, test

    def targets(self, numbers):
        """-> (clips, classes), 1 where a clip has a class."""
        targets = torch.zeros(len(numbers), len(self.classes))
        for row, number in enumerate(numbers):
            targets[row, list(self.labels[number])] = 1
        return targets

    def __str__(self):
        first, (train, test) = next(iter(self.folds.items()))
        return (f"{self.kind}: {len(self.clips)} clips, {len(self.classes)} classes; "
                f"{len(self.folds)} fold(s), of which {first} has {len(train)} clips to train and "
                f"{len(test)} to test on")


def open_labelled(path, frames, esc10=False, seed=0):
    """A labelled data set, known by what lies in its folder -> Labelled. Raises AudioError."""
    if path == "demo":
        demo = Demo(frames, seed, size=1200, held_out=True)
        places = np.where(stratified_fifth(demo.labels, seed), "held-out fifth", "train")
        labels = [(label,) for label in demo.labels.tolist()]
        clips = Clips(demo, frames, range(1200))
        return Labelled("demo", clips, labels, demo.classes, places)
    source = Pack(path) if os.path.exists(os.path.join(path, "pack.json")) else None
    if source:  # the labels are where the sound was packed from
        path = source.source
    if not os.path.isdir(path):
        raise AudioError(path, "no such folder; expected a labelled data set, a pack of one, or "
                               "'demo'")
    for sign, opener in (("meta/esc50.csv", _esc), ("testing_list.txt", _speech_commands),
                         ("label_descriptors.csv", _manifests), ("", _class_folders)):
        if os.path.exists(os.path.join(path, sign)):
            break
    try:
        kind, rows, classes, *weights = opener(path, esc10, seed)
        number = {name: k for k, name in enumerate(classes)}
        labels = [tuple(number[label] for label in names) for _, names, _ in rows]
    except (LookupError, TypeError, ValueError, csv.Error) as error:
        raise AudioError(path, f"the lists of labels are not in their form: {error!r}") from None
    names = [whole_name(name) for name, _, _ in rows]
    source = source or SoundFiles([name for name in names if os.path.isfile(name)])
    file_of = {whole_name(name): k for k, name in enumerate(source.names)}
    keep = [k for k, name in enumerate(names) if name in file_of]
    places = np.array([rows[k][2] for k in keep])
    reason = "not in the pack" if source.packed else "no such file"
    missing = {name: reason for name in names if name not in file_of}
    if len(np.unique(places)) < 2:
        raise AudioError(path, f"{kind}: no clips to train on, or to test on (one fold or none); "
                               f"clips missing: {describe_skipped(missing) or 'none'}")
    clips = Clips(source, frames, [file_of[names[k]] for k in keep])
    clips.skipped = missing
    weights = weights[0][keep] if weights else None
    return Labelled(kind, clips, [labels[k] for k in keep], classes, places, weights)


# Each opener -> kind, rows of (path, names of its classes, place as in Labelled), and the names of
# all classes.


def _esc(path, esc10, _):
    """ESC-50's folder: `meta/esc50.csv` says which clips there are, and which are ESC-10's."""
    table = list(csv.DictReader(read_lines(os.path.join(path, "meta", "esc50.csv"))))
    kind = "ESC-10" if esc10 or all(row["esc10"] == "True" for row in table) else "ESC-50"
    table = [row for row in table if kind == "ESC-50" or row["esc10"] == "True"]
    classes = sorted({(int(row["target"]), row["category"]) for row in table})
    rows = [(os.path.join(path, "audio", row["filename"]), [row["category"]],
             f"fold {int(row['fold'])}") for row in table]
    return kind, rows, [name for _, name in classes]


def _speech_commands(path, *_):
    """Speech Commands: a folder a word, and lists of clips to test on and to leave out."""
    places = {}
    for part, place in (("testing", "test list"), ("validation", None)):
        for line in read_lines(os.path.join(path, f"{part}_list.txt")):
            places[os.path.normpath(os.path.join(path, line.strip()))] = place
    rows = [(name, words, places.get(os.path.normpath(name), "train"))
            for name, words in _folders_of_classes(path)]  # _background_noise_ is no class
    rows = [row for row in rows if row[2]]  # without those of the validation list
    return "Speech Commands", rows, sorted({word for _, (word,), _ in rows})


def _manifests(path, *_):
    """The release's manifests: {train,eval}.tsv and .lbl, label_descriptors.csv and, where there is
    one, the sampling weight of each training clip."""
    table = csv.reader(read_lines(os.path.join(path, "label_descriptors.csv")))
    classes = [row[1] for row in sorted(table, key=lambda row: int(row[0]))]
    rows = []
    for part in ("train", "eval"):
        labels = [line.split("\t")[1].split(",") for line in read_lines(Path(path, part + ".lbl"))]
        names = find_audio(os.path.join(path, f"{part}.tsv"))
        if len(names) != len(labels):
            raise AudioError(path, f"{part}.tsv lists {len(names)} clips, {part}.lbl labels "
                                   f"{len(labels)}; is the folder in the first line there?")
        rows += [(name, clip, part) for name, clip in zip(names, labels)]
    found = sorted(Path(path).glob("weight*.csv"))
    if not found:
        return "AudioSet manifests", rows, classes
    weights = torch.tensor([float(line) for line in read_lines(found[0])])
    trained = sum(part == "train" for _, _, part in rows)
    if len(weights) != trained or not (weights >= 0).all() or not 0 < weights.sum() < math.inf:
        raise AudioError(found[0], f"must hold {trained} weights, one of at least 0 for each "
                                   "training clip")
    return "AudioSet manifests", rows, classes, F.pad(weights, (0, len(rows) - trained))


def _class_folders(path, _, seed):
    """A folder a class, perhaps within train/ and test/ (under any of their usual names); else a
    stratified fifth is kept to test on."""
    parts = {name.lower(): os.path.join(path, name) for name in os.listdir(path)
             if os.path.isdir(os.path.join(path, name))}
    train = [name for name in ("train", "training") if name in parts]
    test = [name for name in ("test", "testing", "eval", "val", "valid", "validation", "dev")
            if name in parts]
    if train and test:
        rows = [(*clip, place) for place, name in (("train", train[0]), (test[0], test[0]))
                for clip in _folders_of_classes(parts[name])]
    else:
        clips = _folders_of_classes(path)
        tested = stratified_fifth([name for _, (name,) in clips], seed)
        fold = f"fifth of each class, seed {seed}"
        rows = [(*clip, fold if test else "train") for clip, test in zip(clips, tested)]
    classes = sorted({name for _, (name,), _ in rows})
    if len(classes) < 2:
        raise AudioError(path, "no labelled data set: expected ESC-50, Speech Commands, the "
                               "release's manifests, or a folder for each of several classes")
    return "folder of classes", rows, classes


def _folders_of_classes(path):
    """-> (clip, [name of its class]) of every clip."""
    clips = []
    for name in sorted(os.listdir(path)):
        left_out = name.startswith((".", "__", "_background_noise_"))
        if os.path.isdir(os.path.join(path, name)) and not left_out:
            with contextlib.suppress(AudioError):  # no sound in it
                clips += [(clip, [name]) for clip in find_audio(os.path.join(path, name))]
    return clips


def stratified_fifth(labels, seed):
    """A seeded choice of a fifth of each class, at least one clip, but not all -> bool array."""
    rng, labels = np.random.default_rng(seed), np.asarray(labels)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: min(max(1, round(len(members) / 5)), len(members) - 1)]] = True
    return chosen

# ---- What the three programs' command lines share ------------------------------------------------


class RunStopped(RuntimeError):
    """A run that has gone wrong: one line, exit status 1."""


class Parser(argparse.ArgumentParser):
    """Flags in full, and one line for a wrong one."""

    def __init__(self, **more):
        super().__init__(allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists what there is\n")

    def add_fields(self, *kinds):
        """A flag for every field of some dataclasses. The result holds those that were given."""
        for kind in kinds:
            group = self.add_argument_group(kind.__name__, kind.__doc__)
            for field in dataclasses.fields(kind):
                how = {"type": field.type, "choices": field.metadata.get("choices")}
                if field.type is bool:
                    how = {"action": argparse.BooleanOptionalAction}
                elif not how["choices"]:
                    how["metavar"] = field.type.__name__.upper()
                hidden = field.default is None or field.default is False  # 0 is neither
                default = "" if hidden else f" [{field.default}]"
                group.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                                   help=field.metadata["help"] + default, **how)


def harmless(method):
    """A stream may go away, as a closed pipe or a full disk does: then what is written to it is
    lost, and the run is not."""

    def call(*arguments):
        with contextlib.suppress(OSError, ValueError):
            return method(*arguments)

    return call


def run(program, job):
    """A program's job -> exit status: 2 and one line for what the user can mend, 1 and one line for
    a run that has gone wrong."""
    if "pytest" not in sys.modules:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name) or open(os.devnull, "w")
            if hasattr(stream, "reconfigure"):  # a notebook's has not
                # Names need not be in its encoding.
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
            if "write" not in vars(stream):  # else an earlier call has done it
                # Not as attributes, which some streams hand on to another.
                vars(stream).update(write=harmless(stream.write), flush=harmless(stream.flush))
            setattr(sys, name, stream)
    try:
        return job() or 0
    except KeyboardInterrupt as error:
        number, more = error.args or (signal.SIGINT, "")  # train's own, or Python's, without args
        said, status = f"stopped by {signal.Signals(number).name}{more}", 128 + number
    except UsageError as error:
        said, status = error, 2
    except (ConnectionError, EOFError) as error:  # a worker died amid what it was sending
        said, status = f"a process that reads sound has died ({error}). Run it again", 1
    except (RunStopped, OSError) as error:
        said, status = error, 1
    except (MemoryError, RuntimeError) as error:
        said, status = str(error).strip().split("\n")[0], 1
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            said = f"torch.compile failed: {said}. --no-compile does without"
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in said:
            said = (f"out of memory: {said}. In training, try a smaller --batch-size, or "
                    "--accumulate 2")
        elif "no kernel image" in said:
            said = "this build of torch does not know the card, which may be too old: --device cpu"
        elif "shared memory(shm)" in str(error):  # Docker gives 64 MB
            said = "too little shared memory (/dev/shm) for --workers; --workers 0 needs none"
        elif said.startswith("DataLoader worker"):
            said += " Run it again, with fewer --workers; a run goes on with --resume"
        elif torch.distributed.is_initialized() and "eer" in said:  # "closed by peer", "Peer"
            said = f"another process of the run has ended: {said}"
        else:
            raise
    print(f"{program}: {said}", file=sys.stderr)
    return status


def count_cores():
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; expected a folder to write to") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"{path}: cannot be written to")


@contextlib.contextmanager
def lock(folder):
    """Make a folder, into which only one process at a time writes. The system itself lets go of the
    lock of one that has died."""
    make_folder(folder)
    with open(os.path.join(folder, "lock"), "w") as file:
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UsageError(f"{folder}: another process is writing into it; wait for it, or "
                             "choose another folder") from None
        except (ImportError, OSError):  # Windows, or a file system that knows no locks
            pass
        yield


def main(argv=None):
    parser = Parser(prog="data.py", description="Decode sound once, for every run after.")
    parser.add_argument("command", choices=["pack"])
    parser.add_argument("path", help="a folder of sound, a file, or a list of files")
    parser.add_argument("out", help="the folder to write, which is then a --data")
    parser.add_argument("--workers", type=int, default=min(64, count_cores()), metavar="INT",
                        help="processes that decode [%(default)s]")
    args = parser.parse_args(argv)
    if not 0 <= args.workers <= 64:
        parser.error(f"--workers {args.workers}: must be at least 0, at most 64")
    return run("data.py", lambda: pack(args.path, args.out, args.workers))


if __name__ == "__main__":
    sys.exit(main())
