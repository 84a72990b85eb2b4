"""Sound in, spectrograms out.

    python data.py show CLIP --out clip.png     a clip as EAT sees it: waveform, spectrogram, patches, masks
    python data.py pack PATH OUT                a folder's sound decoded once, for every run after: --data OUT
    python data.py bench PATH                   how many clips a second a core reads

`load_audio` reads any file that soundfile reads; `fbank` is Kaldi's log-mel filterbank for a batch;
`open_clips` turns a path into a data set of clips of equal length, and `spectrogram` those clips into what
the model eats.
"""

import concurrent.futures
import csv
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import sys
import time
from fractions import Fraction

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

SAMPLE_RATE = 16000
WINDOW, SHIFT, FFT = 400, 160, 512  # samples: 25 ms windows every 10 ms, padded to a power of two
MEL_BINS = 128
AUDIO_ENDINGS = (".wav .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .snd .caf .w64 .rf64").split()

# Mean and standard deviation of the log-mel spectrogram, as the release has them.
STATS = {"audioset": (-4.268, 4.569), "esc50": (-6.627, 5.359), "spc2": (-6.846, 5.565)}


class AudioError(ValueError):
    """A path that cannot be used as sound, and the reason."""

    def __init__(self, path, reason):
        super().__init__(path, reason)
        self.path, self.reason = str(path), reason

    def __str__(self):
        return f"{printable(self.path)}: {self.reason}"


def printable(name):
    """A file's name in one line that any terminal takes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


# ---------------------------------------------------------------------------------------------------------
# Reading sound
# ---------------------------------------------------------------------------------------------------------


def load_audio(path):
    """A sound file, whole -> 1-D float32 waveform, mono, 16 kHz, finite. Raises AudioError."""
    return _read(path)


def _read(path, start=0.0, seconds=math.inf):
    """The same for `seconds` seconds from second `start`."""
    waveform, rate = _decode(path, start, seconds)
    if rate != SAMPLE_RATE:
        waveform = _resampler(rate)(waveform)
    if not waveform.isfinite().all():
        raise AudioError(path, "holds samples that are not finite numbers")
    return waveform


def _decode(path, start, seconds):
    """That part, mono, found by seeking, so that it costs no more memory than it has samples -> waveform, its rate."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise AudioError(path, "no such file")
    try:
        with soundfile.SoundFile(_any_name(path)) as file:
            rate = file.samplerate
            _check_rate(path, rate)
            first, count = round(start * rate), file.frames
            if seconds < math.inf:
                count = math.ceil(seconds * rate)
            if first:
                file.seek(first)
            blocks, most = [], (1 << 22) // file.channels  # block by block: a damaged header may claim any length
            while count > 0 and len(block := file.read(min(count, most), dtype="float32", always_2d=True)):
                with np.errstate(all="ignore"):  # not finite: found below
                    blocks.append(block.mean(axis=1))
                count -= len(block)
    except AudioError:
        raise
    except Exception as error:  # whatever is wrong with the file, it is this file's problem alone
        raise AudioError(path, f"cannot be read as sound ({_short(error)})") from None
    if not blocks:
        raise AudioError(path, "holds no samples")
    return torch.from_numpy(np.concatenate(blocks)), rate


def _check_rate(path, rate):
    if not 1000 <= rate <= 1_000_000:
        raise AudioError(path, f"sample rate {rate} Hz, expected 1000 to 1000000 Hz")


def _any_name(path):
    """As bytes, which need not be UTF-8, where the system's names are bytes."""
    return path if os.name == "nt" else os.fsencode(path)


def _short(error):
    """soundfile's "Error opening 'path': reason" without the path."""
    return str(error).rsplit(": ", 1)[-1].rstrip(".")


@functools.lru_cache(maxsize=32)
def _resampler(rate):
    """To 16 kHz. The filter grows with the terms of the ratio of the rates, and from 44,101 Hz (real files have
    it) would take 80 s to build; so the ratio is rounded to terms of at most 1,000. That shifts the pitch by
    less than a cent (6e-4), by 2e-5 for 44,101 Hz, and by nothing for the usual rates."""
    ratio = Fraction(*sorted((rate, SAMPLE_RATE))).limit_denominator(1000)
    terms = (ratio.numerator, ratio.denominator)
    return torchaudio.transforms.Resample(*(terms if rate < SAMPLE_RATE else reversed(terms)))


# ---------------------------------------------------------------------------------------------------------
# Spectrograms
# ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _mel_banks(device):
    banks, _ = torchaudio.compliance.kaldi.get_mel_banks(MEL_BINS, FFT, SAMPLE_RATE, 20.0, 0.0, 100.0, -500.0, 1.0)
    return F.pad(banks, (0, 1)).T.to(device)  # (257, 128); the Nyquist bin belongs to no band


def as_float(waveforms):
    """int16 samples are packed ones, in units of 1 / 32768."""
    return waveforms / 32768 if waveforms.dtype == torch.int16 else waveforms


def fbank(waveforms):
    """(B, samples) at 16 kHz, float or int16 -> (B, frames, 128) log-mel energies, on the waveforms' device.

    Equals torchaudio.compliance.kaldi.fbank(htk_compat=True, sample_frequency=16000, use_energy=False,
    window_type="hanning", num_mel_bins=128, dither=0, frame_shift=10) of each row, whole windows only. The release takes
    a clip's mean off first; as each window's own comes off here, that changes nothing.
    """
    x = as_float(waveforms).unfold(1, WINDOW, SHIFT)  # (B, frames, 400)
    x = x - x.mean(dim=2, keepdim=True)
    previous = torch.cat([x[..., :1], x[..., :-1]], dim=2)
    x = (x - 0.97 * previous) * torch.hann_window(WINDOW, periodic=False, device=x.device)  # pre-emphasis, window
    power = torch.fft.rfft(x, FFT).abs().square()
    return (power @ _mel_banks(x.device)).clamp(min=torch.finfo(torch.float32).eps).log()


def clip_samples(frames):
    """How many samples fill `frames` frames."""
    return (frames - 1) * SHIFT + WINDOW


def spectrogram(waveforms, lengths, frames, mean, std):
    """(B, samples), of which `lengths` (B,) are sound and the rest padding -> (B, 1, frames, 128), normalised.

    As the release: padded or cut to `frames` with zeros *before* (x - mean) / (2 std)."""
    x = fbank(waveforms)[:, :frames]
    x = F.pad(x, (0, 0, 0, frames - x.shape[1]))
    whole = (lengths - WINDOW) // SHIFT + 1  # windows that hold sound only
    x = torch.where(torch.arange(frames, device=x.device)[:, None] < whole[:, None, None], x, 0.0)
    return ((x - mean) / (2 * std))[:, None]


def measure_stats(clips, most=1000):
    """Mean and standard deviation of the log-mel spectrogram over at most `most` clips, evenly chosen; padding
    does not count -> (mean, std)."""
    count = total = squares = 0
    chosen = np.linspace(0, len(clips) - 1, min(most, len(clips))).astype(int)
    for numbers in np.array_split(chosen, math.ceil(len(chosen) / 32)):
        waveforms, lengths, _, _ = clips.__getitems__(numbers.tolist())
        x = fbank(waveforms).double()
        sound = torch.arange(x.shape[1]) < ((lengths - WINDOW) // SHIFT + 1)[:, None]
        x = x[sound & x.isfinite().all(2)]
        count, total, squares = count + x.numel(), total + x.sum().item(), squares + x.square().sum().item()
    if not count:
        raise AudioError(clips.name(0), "neither it nor any other clip can be used")
    mean = total / count
    return round(mean, 4), round(math.sqrt(squares / count - mean**2), 4)


# ---------------------------------------------------------------------------------------------------------
# Data sets of clips
# ---------------------------------------------------------------------------------------------------------


class Clips(Dataset):
    """Clips of one length, by number. Children say how many there are and `read` one: 1-D float32 or int16, 16 kHz."""

    packed = False  # whether reading is no more than copying

    def __init__(self, frames):
        self.samples = clip_samples(frames)
        self.replace = True
        self.skipped = {}  # what was left out so far: path -> reason

    def __getitems__(self, numbers):
        """What the DataLoader calls for a batch -> waveforms (B, samples) zero-padded at the end, int16 if all are;
        lengths (B,), the numbers (B,) of the clips, and what could not be used, path -> reason. The next usable clip takes
        the place of one that is not; without `replace`, or where none is left, the batch is the smaller."""
        rows, skipped = [], {}
        for number in numbers:
            for candidate in range(number, number + (len(self) if self.replace else 1)):
                try:
                    rows.append((self.usable(candidate % len(self)), candidate % len(self)))
                    break
                except AudioError as error:
                    skipped[error.path] = error.reason
        packed = all(waveform.dtype == torch.int16 for waveform, _ in rows)
        waveforms = torch.zeros(len(rows), self.samples, dtype=torch.int16 if packed else torch.float32)
        for row, (waveform, _) in zip(waveforms, rows):
            row[: len(waveform)] = waveform if packed else as_float(waveform)
        lengths = torch.tensor([len(waveform) for waveform, _ in rows])
        return waveforms, lengths, torch.tensor([number for _, number in rows]), skipped

    def usable(self, number):
        """Clip `number`. Raises AudioError where there is nothing in it to learn from."""
        waveform = self.read(number)[: self.samples]
        if len(waveform) < WINDOW:
            raise AudioError(self.name(number), "shorter than a window of 25 ms")
        low, high = waveform.aminmax()
        if self.replace and high.item() - low.item() < 2e-5:
            raise AudioError(self.name(number), "silent")
        return waveform


def cut(lengths, size):
    """Files of some lengths cut into pieces of `size`, the last piece of a file ending with it, the only one of a file
    that is shorter -> for each piece the number of its file, and where in it it starts."""
    pieces = np.ceil(lengths / size).astype(np.int64)
    file = np.repeat(np.arange(len(lengths), dtype=np.int32), pieces)
    start = (np.arange(len(file)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * size
    return file, np.minimum(start, np.maximum(lengths - size, 0)[file])


class AudioFiles(Clips):
    """All the sound in some files: a file longer than a clip becomes several, the last one ending with the file.
    Without `whole`, one clip a file, its beginning."""

    def __init__(self, paths, frames, whole=True):
        super().__init__(frames)
        self.ends = {}  # of files that turned out shorter than their headers say: from where on there is nothing
        if not whole:
            self.paths, self.file, self.start = paths, np.arange(len(paths)), np.zeros(len(paths))
            return
        lengths, self.paths = [], []
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            bar = tqdm(pool.map(self._seconds, paths), "reading headers", len(paths), disable=None, leave=False)
            for path, length in zip(paths, bar):
                if isinstance(length, str):
                    self.skipped[path] = length
                    continue
                lengths.append(length)
                self.paths.append(path)
        self.file, self.start = cut(np.array(lengths), self.samples / SAMPLE_RATE)

    @staticmethod
    def _seconds(path):
        """Length from the header, or the reason why there is none."""
        try:
            if not os.path.isfile(path):
                return "no such file"
            info = soundfile.info(_any_name(path))
            _check_rate(path, info.samplerate)
            if info.frames > 64 * os.path.getsize(path):  # over 64 samples a byte: silence, or a header that lies
                waveform, rate = _decode(path, 0.0, math.inf)
                return len(waveform) / rate
        except AudioError as error:
            return error.reason
        except Exception as error:
            return f"cannot be read as sound ({_short(error)})"
        return info.frames / info.samplerate if info.frames > 0 else "holds no samples"

    def __len__(self):
        return len(self.file)

    def name(self, number):
        return self.paths[self.file[number]]

    def read(self, number):
        file, start = self.file[number], float(self.start[number])
        if start >= self.ends.get(file, math.inf):
            raise AudioError(self.paths[file], "ends before its header says")
        try:
            return _read(self.paths[file], start, self.samples / SAMPLE_RATE)
        except AudioError:
            if start:  # a header may claim hours of clips: after the first that is not there, the others are not looked for
                self.ends[file] = start
            raise


def find_audio(path):
    """The sound files `path` stands for, sorted: a folder (searched recursively), a sound file, or a list: a text
    file with a path a line, or the release's manifest (first line the root folder, then `path<tab>samples`)."""
    if os.path.isdir(path):
        found, seen = [], set()
        for folder, below, names in os.walk(path, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:  # links may lead in circles
                below.clear()
                continue
            seen.add(real)
            below.sort()  # whichever way leads to a folder first
            found += [os.path.join(folder, name) for name in names]
        return sorted(name for name in found if os.path.splitext(name)[1].lower() in AUDIO_ENDINGS)
    if os.path.splitext(path)[1].lower() in AUDIO_ENDINGS:
        return [path]
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.split("\t")[0] for line in file.read().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise AudioError(path, "neither a folder, a sound file nor a text file with a path a line") from None
    root = os.path.dirname(path)
    if lines and os.path.isdir(os.path.join(root, lines[0])):
        root = os.path.join(root, lines.pop(0))
    return [os.path.join(root, line) for line in lines]


def open_clips(path, frames, seed=0):
    """`path` ("demo", a pack, or as in `find_audio`) -> Clips of `frames` frames. Raises AudioError where there are none."""
    if path == "demo":
        return Demo(frames, seed)
    clips = PackedClips(Pack(path), frames) if is_pack(path) else AudioFiles(existing_audio(path), frames)
    if not len(clips):
        raise AudioError(path, f"none of its files can be used; {describe_skipped(clips.skipped)}")
    return clips


def did_you_mean(path):
    """The name nearest to that of a path that does not exist."""
    folder, name = os.path.split(os.path.normpath(path))
    near = difflib.get_close_matches(name, os.listdir(folder or ".") if os.path.isdir(folder or ".") else [], 1)
    return f" (did you mean {printable(os.path.join(folder, near[0]))}?)" if near else ""


def existing_audio(path):
    """As find_audio, but a path that leads to no sound is an error."""
    if not os.path.exists(path):
        raise AudioError(path, f"no such file or folder{did_you_mean(path)}; expected a folder, a sound file, a list of files, "
                               "a pack, or 'demo'")
    paths = find_audio(path)
    if not paths:
        raise AudioError(path, f"no sound in it; looked for files ending in {' '.join(AUDIO_ENDINGS)}")
    return paths


def describe_skipped(skipped):
    return describe_few([f"{printable(path)} ({reason})" for path, reason in skipped.items()])


# ---------------------------------------------------------------------------------------------------------
# Packed sound: decoded and resampled once
# ---------------------------------------------------------------------------------------------------------
# A pack is a folder. `samples` holds the samples of all files, 16 kHz mono int16, end to end; `names` their names,
# likewise; `index` a row for each file: where its samples and its name end, and the float value of a sample of 1. A file
# that cannot be read has no samples, and its reason is in `skipped.jsonl`. `pack.json` says what was packed.

PACK_BATCH = 16  # files that a process decodes before they are written
INDEX_ROW = np.dtype([("samples", "<i8"), ("name", "<i8"), ("unit", "<f8")])


def is_pack(path):
    return os.path.exists(os.path.join(path, "pack.json"))


def pack(source, out, workers):
    """Decode all sound in `source` (as in `find_audio`) into the folder `out`, in several processes. Run again, it goes on
    where it stopped. Nothing is lost but what 16 bits at 16 kHz cannot hold: a file whose peak is over 1 is scaled down,
    and its unit says by how much."""
    lists = [os.path.join(source, name) for name in ("train.tsv", "eval.tsv")]  # manifests may list sound that lies elsewhere
    paths = sum(map(find_audio, lists), []) if all(map(os.path.exists, lists)) else existing_audio(source)
    root = os.path.abspath(source if os.path.isdir(source) else os.path.dirname(source))
    names = [os.fsencode(os.path.relpath(path, root)) for path in paths]
    about = {"format": 1, "source": os.path.abspath(source), "root": root, "files": len(paths),
             "digest": hashlib.sha256(b"\0".join(names)).hexdigest()}
    head = os.path.join(out, "pack.json")
    os.makedirs(out, exist_ok=True)
    if is_pack(out):
        with open(head) as file:
            if json.load(file) != about:
                raise AudioError(out, f"holds a pack of other files than {source} has now; choose another folder")
    else:
        if set(os.listdir(out)) - {"pack.json.part"}:
            raise AudioError(out, "not empty; choose another folder")
        with open(head + ".part", "w") as file:
            json.dump(about, file)
        os.replace(head + ".part", head)

    samples, name, index, skipped = (open(os.path.join(out, part), "ab") for part in ("samples", "names", "index", "skipped.jsonl"))
    with samples, name, index, skipped:
        done = index.tell() // INDEX_ROW.itemsize  # after a kill the other files may be longer than the index says
        index.truncate(done * INDEX_ROW.itemsize)
        last = np.fromfile(index.name, INDEX_ROW)[-1:]
        ends = [int(last[part][0]) if done else 0 for part in ("samples", "name")]
        samples.truncate(2 * ends[0])
        name.truncate(ends[1])
        with open(skipped.name, "rb") as file:
            skipped.truncate(file.read().rfind(b"\n") + 1)
        loader = DataLoader(_Decoded(paths[done:]), batch_size=PACK_BATCH, num_workers=workers, collate_fn=lambda batch: batch)
        bar = tqdm(total=len(paths), initial=done, desc="packing", unit="file", disable=None)
        for batch in loader:
            rows = np.zeros(len(batch), INDEX_ROW)
            for row, (sound, unit, reason) in zip(rows, batch):
                if reason:
                    skipped.write(json.dumps([paths[done], reason]).encode() + b"\n")
                samples.write(sound.numpy().tobytes())
                name.write(names[done])
                ends = [ends[0] + len(sound), ends[1] + len(names[done])]
                row["samples"], row["name"], row["unit"] = *ends, unit
                done += 1
            for file in (samples, name, skipped):  # the index last: what it lists is on the disk
                file.flush()
                os.fsync(file.fileno())
            index.write(rows.tobytes())
            index.flush()
            bar.update(len(batch))
        bar.close()
    packed = Pack(out)
    print(f"{out}: {len(paths):,} files, {packed.ends[-1] / SAMPLE_RATE / 3600:.2f} hours, "
          f"{os.path.getsize(samples.name) / 2**30:.2f} GiB")
    if packed.skipped:
        print(f"skipped {len(packed.skipped)}: {describe_skipped(packed.skipped)}")


class _Decoded(Dataset):
    """Files as they go into a pack: int16 samples, their unit, and the reason where there are none."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        try:
            waveform = load_audio(self.paths[number])
        except AudioError as error:
            return torch.zeros(0, dtype=torch.int16), 1 / 32768, error.reason
        unit = max(1.0, waveform.abs().max().item()) / 32768
        return (waveform / unit).round().clamp(-32768, 32767).short(), unit, None


class Pack:
    """An open pack: `lengths` in samples, name(k) and read(k) of its files."""

    def __init__(self, path):
        self.path = path
        try:
            with open(os.path.join(path, "pack.json")) as file:
                self.about = json.load(file)
            index = np.fromfile(os.path.join(path, "index"), INDEX_ROW)
            if len(index) < self.about["files"]:
                raise AudioError(path, f"{len(index)} of {self.about['files']} files are packed; run the same "
                                       "`data.py pack` again, and it will go on")
            with open(os.path.join(path, "skipped.jsonl")) as file:
                self.skipped = dict(map(json.loads, file))
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise AudioError(path, f"not a whole pack ({error})") from None
        self.ends, self.name_ends, self.units = (np.ascontiguousarray(index[part]) for part in INDEX_ROW.names)
        self.lengths = np.diff(self.ends, prepend=0)

    def _read(self, part, dtype, start, end):
        # Read, not mapped into memory: that is as fast, and a mapped file that is cut off meanwhile kills the process.
        try:
            found = np.fromfile(os.path.join(self.path, part), dtype, end - start, offset=start * np.dtype(dtype).itemsize)
        except OSError as error:
            raise AudioError(self.path, f"{part}: {error.strerror}") from None
        if len(found) < end - start:
            raise AudioError(self.path, f"{part}: ends before the index does")
        return found

    def name(self, number):
        """The file's path as it was when packed."""
        name = self._read("names", np.uint8, self.name_ends[number - 1] if number else 0, self.name_ends[number])
        return os.path.join(self.about["root"], os.fsdecode(name.tobytes()))

    def read(self, number, start=0, count=None):
        """Samples of a file, from sample `start` -> int16, or float32 where its unit is not 1 / 32768."""
        first, end = self.ends[number] - self.lengths[number] + start, self.ends[number]
        samples = torch.from_numpy(self._read("samples", "<i2", first, min(end, first + count) if count else end))
        return samples if self.units[number] == 1 / 32768 else samples * self.units[number].item()


class PackedClips(Clips):
    """All the sound in a pack, cut as AudioFiles cuts it; or one clip each of some `files`, their beginnings."""

    packed = True

    def __init__(self, pack, frames, files=None):
        super().__init__(frames)
        self.pack = pack
        if files is None:
            self.file, self.start = cut(pack.lengths, self.samples)
            self.skipped = dict(pack.skipped)
        else:
            self.file, self.start = np.asarray(files), np.zeros(len(files), dtype=np.int64)

    def __len__(self):
        return len(self.file)

    def name(self, number):
        return self.pack.name(self.file[number])

    def read(self, number):
        return self.pack.read(self.file[number], self.start[number], self.samples)


# ---------------------------------------------------------------------------------------------------------
# Demo: sound events made on the fly
# ---------------------------------------------------------------------------------------------------------

# Where the pitch is, from 0 (low) to 1 (high), over one cycle u = 0..1. All shapes spend the same time at every
# height, so only the movement tells the classes apart: the mean spectrum does not.
SHAPES = {
    "rising": lambda u: u,
    "falling": lambda u: 1 - u,
    "zigzag": lambda u: abs(2 * u - 1),
    "leaping": lambda u: (np.array([0, 3, 1, 4, 2])[(5 * u).astype(int)] + 5 * u % 1) / 5,
}
SPEEDS = {"slow": 1.2, "medium": 3.5, "fast": 10.0}  # cycles a second


class Demo(Clips):
    """Labelled sound events made from a seed: pitch, span, timbre, level, position and background vary; a clip's
    class is how its pitch moves. The labels are for evaluation only."""

    classes = [f"{speed} {shape}" for speed in SPEEDS for shape in SHAPES]

    def __init__(self, frames, seed=0, size=4000, held_out=False):
        super().__init__(frames)
        self.stream, self.size = (seed, int(held_out)), size
        self.labels = np.arange(size) % len(self.classes)

    def __len__(self):
        return self.size

    def name(self, number):
        return f"demo clip {number}"

    def read(self, number):
        rng = np.random.default_rng((*self.stream, number))
        speed, shape = self.classes[self.labels[number]].split()
        length = int(self.samples * rng.uniform(0.8, 0.95))
        t = np.arange(length) / SAMPLE_RATE  # seconds
        cycles = t * SPEEDS[speed] * rng.uniform(0.85, 1.15) + rng.uniform()
        height = SHAPES[shape](cycles % 1)
        pitch = 250 * 2 ** (rng.uniform(0, 0.7) + rng.uniform(2.2, 2.8) * height)  # Hz
        phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
        event = sum(a * np.sin(k * phase) for k, a in enumerate(rng.uniform(0.3, 0.7) ** np.arange(4), 1))
        event *= np.minimum(1, np.minimum(t, t[::-1]) / 0.05)  # soft ends
        spectrum = np.fft.rfft(rng.standard_normal(self.samples))  # background: noise of a random colour
        spectrum /= np.maximum(np.arange(len(spectrum)), 20) ** rng.uniform(0.2, 0.5)
        sound = np.fft.irfft(spectrum, self.samples)
        sound *= 10 ** rng.uniform(-1.6, -1.2) * np.std(event) / np.std(sound)  # 24 to 32 dB under the event
        start = rng.integers(self.samples - length)
        sound[start : start + length] += event
        return torch.from_numpy(sound * 10 ** rng.uniform(-1.0, -0.5) / np.abs(sound).max()).float()


# ---------------------------------------------------------------------------------------------------------
# Labelled data sets, as they lie on people's disks
# ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Labelled:
    """Clips with labels, one clip a file. `folds` has the clip numbers to train and to test on, by fold."""

    kind: str  # "ESC-50", "Speech Commands", "AudioSet manifests", "folder of classes", "demo"
    clips: Clips
    labels: list  # of every clip: a tuple of class numbers
    classes: list  # names
    folds: dict  # name -> (train, test), tensors of clip numbers
    notes: list = dataclasses.field(default_factory=list)  # what does not fit, a line each
    weights: torch.Tensor = None  # of every clip, for weighted sampling

    def __post_init__(self):
        self.multi_label = any(len(labels) != 1 for labels in self.labels)
        self.clips.replace = False  # never by a clip of another label, or of the test fold

    def targets(self, numbers):
        """-> (clips, classes), 1 where a clip has a class."""
        targets = torch.zeros(len(numbers), len(self.classes))
        for row, number in enumerate(numbers):
            targets[row, list(self.labels[number])] = 1
        return targets

    def __str__(self):
        sizes = [f"{len(train)} clips to train and {len(test)} to test on" for train, test in self.folds.values()]
        if len(set(sizes)) > 1 or len(sizes) == 1:
            sizes = [f"{name}: {size}" for name, size in zip(self.folds, sizes)]
        else:
            sizes = [f"{len(sizes)} folds, each {sizes[0]}"]
        return f"{self.kind}: {len(self.clips)} clips, {len(self.classes)} classes; {'; '.join(sizes)}"


def open_labelled(path, frames, esc10=False, seed=0):
    """A labelled data set, recognised by what lies in its folder -> Labelled. Raises AudioError."""
    if path == "demo":
        clips = Demo(frames, seed, size=1200, held_out=True)
        tested = stratified_fifth(clips.labels, seed)
        folds = {"held-out fifth": (torch.from_numpy(np.flatnonzero(~tested)), torch.from_numpy(np.flatnonzero(tested)))}
        return Labelled("demo", clips, [(label,) for label in clips.labels.tolist()], clips.classes, folds)
    packed = Pack(path) if is_pack(path) else None
    if packed:  # the labels are where the sound was packed from
        path = packed.about["source"]
    if not os.path.isdir(path):
        raise AudioError(path, f"no such folder{did_you_mean(path)}; expected a labelled data set, a pack of one, or 'demo'")
    for opener, signs in (
        (_esc, ["meta/esc50.csv", "audio"]),
        (_speech_commands, ["validation_list.txt", "testing_list.txt"]),
        (_manifests, ["train.tsv", "train.lbl", "eval.tsv", "eval.lbl", "label_descriptors.csv"]),
        (_class_folders, []),
    ):
        if all(os.path.exists(os.path.join(path, sign)) for sign in signs):
            break
    try:
        kind, rows, classes, folds, *weights = opener(path, esc10, seed)
    except AudioError:
        raise
    except (LookupError, ValueError, csv.Error) as error:
        raise AudioError(path, f"the files that list its labels ({', '.join(signs)}) are not in their form: {error!r}") from None

    if packed:
        number = {os.path.abspath(packed.name(k)): k for k in np.flatnonzero(packed.lengths)}
    missing = {name for name, _, _ in rows if not (os.path.abspath(name) in number if packed else os.path.isfile(name))}
    notes = [f"{len(missing)} labels have no clip and are left out: {describe_few(sorted(missing))}"] if missing else []
    stray = set(find_audio(path)) - {name for name, _, _ in rows} if kind.startswith("ESC-50") else ()
    if stray:
        notes.append(f"{len(stray)} clips have no label and are left out: {describe_few(sorted(stray))}")
    keep = [k for k, (name, _, _) in enumerate(rows) if name not in missing]
    places = np.array([rows[k][2] for k in keep])
    absent = sorted({1, 2, 3, 4, 5} - set(places.tolist())) if kind.startswith("ESC") else []
    if absent:
        notes.append(f"no clips of fold {', '.join(map(str, absent))}: the result is not that of five folds")
    if not folds:
        raise AudioError(path, f"{kind} with one fold or none: nothing to test on")
    numbers = {}
    for fold, (train, test) in folds.items():
        numbers[fold] = tuple(torch.from_numpy(np.flatnonzero(np.isin(places, list(place)))) for place in (train, test))
        if not all(map(len, numbers[fold])):
            raise AudioError(path, f"{kind}: no clips to {'test' if len(numbers[fold][0]) else 'train'} on ({fold})")
    names = [rows[k][0] for k in keep]
    if packed:
        clips = PackedClips(packed, frames, [number[os.path.abspath(name)] for name in names])
    else:
        clips = AudioFiles(names, frames, whole=False)
    return Labelled(kind, clips, [rows[k][1] for k in keep], classes, numbers, notes, weights[0][keep] if weights else None)


# Each opener -> kind, rows of (path, class numbers, place), class names, {fold: (places to train on, to test on)}.


def _esc(path, esc10, _):
    """ESC-50's folder; `meta/esc50.csv` says which clips there are, and which of them are ESC-10."""
    with open(os.path.join(path, "meta", "esc50.csv"), newline="") as file:
        table = list(csv.DictReader(file))
    only_esc10 = all(row["esc10"] == "True" for row in table)
    table = [row for row in table if not esc10 or row["esc10"] == "True"]
    names = dict(sorted((int(row["target"]), row["category"]) for row in table))
    number = {target: k for k, target in enumerate(names)}
    rows = [(os.path.join(path, "audio", row["filename"]), (number[int(row["target"])],), int(row["fold"])) for row in table]
    there = sorted({place for _, _, place in rows})
    folds = {f"fold {k}": ([other for other in there if other != k], [k]) for k in there if len(there) > 1}
    return "ESC-10" if esc10 or only_esc10 else "ESC-50", rows, list(names.values()), folds


def _speech_commands(path, *_):
    """Speech Commands: a folder a word, and the two lists; what is on neither is for training."""
    place = {}
    for name in ("validation", "testing"):
        with open(os.path.join(path, f"{name}_list.txt")) as file:
            place |= {os.path.normpath(line.strip()): name for line in file if line.strip()}
    rows, classes = _folders_of_classes(path)  # _background_noise_ is no class
    rows = [(name, label, place.get(os.path.relpath(name, path), "training")) for name, label in rows]
    there = {name for name, _, _ in rows}
    rows += [(os.path.join(path, name), (0,), where) for name, where in place.items() if os.path.join(path, name) not in there]
    return "Speech Commands", rows, classes, {"test list": (["training"], ["testing"])}


def _manifests(path, *_):
    """The release's manifests: {train,eval}.tsv and .lbl, label_descriptors.csv and, where there is one, the sampling
    weight of each training clip."""
    with open(os.path.join(path, "label_descriptors.csv"), newline="") as file:
        classes = [row[1] for row in sorted((row for row in csv.reader(file) if row), key=lambda row: int(row[0]))]
    number, rows = {name: k for k, name in enumerate(classes)}, []
    for place in ("train", "eval"):
        with open(os.path.join(path, f"{place}.lbl")) as file:
            labels = [line.rstrip("\n").split("\t")[1].split(",") for line in file if line.strip()]
        names = find_audio(os.path.join(path, f"{place}.tsv"))
        if len(names) != len(labels):
            raise AudioError(path, f"{place}.tsv lists {len(names)} clips, {place}.lbl labels {len(labels)}")
        unknown = {label for clip in labels for label in clip} - number.keys()
        if unknown:
            raise AudioError(path, f"{place}.lbl has labels that label_descriptors.csv lacks: {describe_few(sorted(unknown))}")
        rows += [(name, tuple(number[label] for label in clip), place) for name, clip in zip(names, labels)]
    found = sorted(name for name in os.listdir(path) if name.startswith("weight") and name.endswith(".csv"))
    weights = torch.zeros(len(rows))
    trained = sum(place == "train" for _, _, place in rows)
    weights[:trained] = 1.0
    if found:
        with open(os.path.join(path, found[0])) as file:
            given = np.array([float(line) for line in file if line.strip()])
        if len(given) != trained or not (given >= 0).all() or not 0 < given.sum() < math.inf:
            raise AudioError(path, f"{found[0]} must hold {trained} weights, one of at least 0 for each training clip")
        weights[:trained] = torch.from_numpy(given)
    return "AudioSet manifests", rows, classes, {"eval": (["train"], ["eval"])}, weights


def _class_folders(path, _, seed):
    """A folder a class, perhaps within train/ and test/ (or val/); else a stratified fifth is kept to test on."""
    parts = [part for part in ("train", "val", "test") if os.path.isdir(os.path.join(path, part))]
    if "train" in parts and len(parts) > 1:
        found = {part: _folders_of_classes(os.path.join(path, part)) for part in parts}
        classes = sorted({name for _, names in found.values() for name in names})
        rows = [(name, (classes.index(names[label]),), part)
                for part, (clips, names) in found.items() for name, (label,) in clips]
        return "folder of classes", rows, classes, {parts[-1]: (["train"], [parts[-1]])}
    rows, classes = _folders_of_classes(path)
    if len(classes) < 2:
        raise AudioError(path, "no labelled data set: expected ESC-50, Speech Commands, the release's manifests, or a "
                               "folder for each of several classes")
    tested = stratified_fifth([label for _, (label,) in rows], seed)
    rows = [(name, label, "test" if test else "train") for (name, label), test in zip(rows, tested)]
    return "folder of classes", rows, classes, {f"fifth of each class, seed {seed}": (["train"], ["test"])}


def _folders_of_classes(path):
    """-> (clip, (class number,)) of every clip, and the classes' names."""
    found = {name: find_audio(os.path.join(path, name)) for name in sorted(os.listdir(path))
             if os.path.isdir(os.path.join(path, name)) and not name.startswith(("_", "."))}
    classes = [name for name, clips in found.items() if clips]
    return [(clip, (k,)) for k, name in enumerate(classes) for clip in found[name]], classes


def stratified_fifth(labels, seed):
    """A seeded choice of a fifth of each class, at least one clip -> bool array."""
    rng, labels = np.random.default_rng(seed), np.asarray(labels)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: max(1, round(len(members) / 5))]] = True
    return chosen


def describe_few(names, most=3):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------------------------------------------------
# A picture for people who would rather look
# ---------------------------------------------------------------------------------------------------------


def pyplot():
    """matplotlib, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure, path):
    """Write a figure in the format that the path's ending names. Raises AudioError where there is none of that name."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        figure.savefig(path, dpi=100)
    except ValueError as error:
        raise AudioError(path, str(error)) from None
    finally:
        pyplot().close(figure)


def draw_spectrogram(axes, image, labels=True):
    """(128, T) mel bins x frames, or with a last axis of colours, on axes of seconds and hertz."""
    seconds, whole = image.shape[1] * SHIFT / SAMPLE_RATE, np.asarray(image)  # with what a mask hides
    axes.imshow(image, origin="lower", aspect="auto", extent=(0, seconds, 0, MEL_BINS), cmap="magma", interpolation="nearest",
                vmin=whole.min(), vmax=whole.max())
    if not labels:
        axes.set(xticks=[], yticks=[])
        return
    hertz = [125, 500, 1000, 2000, 4000]
    low, place, high = (1127 * np.log1p(np.array(f) / 700) for f in (20, hertz, 8000))  # Kaldi's mel scale
    axes.set_yticks((place - low) / (high - low) * (MEL_BINS + 1) - 0.5, hertz)
    axes.set(xlabel="seconds", ylabel="hertz")


def first_clip(path, frames, mean, std, seed=0):
    """The beginning of a sound file -> its waveform, and its spectrogram (1, 1, T, 128), T as long as the sound, in whole
    patches, and `frames` at most."""
    waveform = as_float(open_clips(path, frames, seed).usable(0))
    frames = max(2, math.ceil(((len(waveform) - WINDOW) // SHIFT + 1) / 16)) * 16  # a patch is 16 frames
    return waveform, spectrogram(waveform[None], torch.tensor([len(waveform)]), frames, mean, std)


def show(clip, out, seed=0):
    """Draw the first 10 s of a sound file: waveform, spectrogram with its patches, and what four clones see of it with each
    kind of mask."""
    from eat import PATCH, EATConfig, draw_masks  # not at the top: eat.py imports this file

    waveform, x = first_clip(clip, 256 if clip == "demo" else 1024, *STATS["audioset"], seed)
    image, frames = x[0, 0].T.numpy(), x.shape[2]
    grid, seconds = (frames // PATCH, MEL_BINS // PATCH), frames / 100
    figure = pyplot().figure(figsize=(12, 11), layout="constrained")
    rows = figure.add_gridspec(5, 4, height_ratios=(0.6, 1, 0.8, 0.8, 0.8))
    axes = figure.add_subplot(rows[0, :])
    axes.plot(np.arange(len(waveform)) / SAMPLE_RATE, waveform, linewidth=0.5)
    axes.set(xlim=(0, seconds), xlabel="seconds", title=printable(os.path.basename(clip)))
    axes = figure.add_subplot(rows[1, :])
    draw_spectrogram(axes, image)
    padded = "; the end is padding" if len(waveform) < clip_samples(frames) else ""
    axes.set_title(f"log-mel spectrogram, {grid[0]} x {grid[1]} patches{padded}")
    axes.vlines(np.arange(1, grid[0]) * PATCH / 100, 0, MEL_BINS, color="white", linewidth=0.4)
    axes.hlines(np.arange(1, grid[1]) * PATCH, 0, seconds, color="white", linewidth=0.4)
    for row, kind in enumerate(("inverse_block", "block", "random"), 2):
        config = EATConfig(frames=frames, masking=kind)
        masks = draw_masks(config, 1, grid, generator=torch.Generator().manual_seed(seed))[0].view(-1, *grid)
        for k in range(4):
            axes = figure.add_subplot(rows[row, k])
            hidden = masks[k].T.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1).numpy()
            draw_spectrogram(axes, np.ma.masked_array(image, hidden), labels=False)
            axes.set(facecolor="lightgray", title=f"{kind.replace('_', ' ')} mask, clone {k + 1}")
    save_picture(figure, out)


# ---------------------------------------------------------------------------------------------------------
# How fast is it?
# ---------------------------------------------------------------------------------------------------------


def bench(path, frames, count):
    """Print how many clips of `path` a second one core decodes, resamples, turns into spectrograms, loads in batches."""
    torch.set_num_threads(1)
    clips = open_clips(path, frames)
    numbers = np.resize(np.linspace(0, len(clips) - 1, min(count, len(clips))).astype(int), count).tolist()
    batches = [numbers[k : k + 32] for k in range(0, count, 32)]

    def rate(work, items):
        """Items a second, once filters are made and files are in the system's cache."""
        for item in items[: len(items) // 8 + 1]:
            work(item)
        start = time.perf_counter()
        for item in items:
            work(item)
        return len(items) / (time.perf_counter() - start)

    rates = {}
    if isinstance(clips, AudioFiles):
        parts = [(clips.name(k), float(clips.start[k]), clips.samples / SAMPLE_RATE) for k in numbers]
        rates["decode"] = rate(lambda part: _decode(*part), parts)
        foreign = [(waveform, hertz) for waveform, hertz in (_decode(*part) for part in parts[:64]) if hertz != SAMPLE_RATE]
        if foreign:
            rates["resample"] = rate(lambda sound: _resampler(sound[1])(sound[0]), foreign)
    else:
        rates["read"] = rate(clips.read, numbers)
    sound = clips.__getitems__(batches[0])[:2]
    rates["fbank"] = len(sound[0]) * rate(lambda _: spectrogram(*sound, frames, *STATS["audioset"]), range(8))
    loader = iter(DataLoader(clips, batch_sampler=batches * 2, num_workers=0 if clips.packed else 1,
                             collate_fn=lambda batch: batch, pin_memory=torch.cuda.is_available()))
    for _ in batches:  # the first time to warm up
        next(loader)
    start = time.perf_counter()
    for _ in loader:
        pass
    rates["loader"] = count / (time.perf_counter() - start)
    print(f"{path}: {len(clips):,} clips of {frames / 100:.2f} s; of {count} of them, clips a second on one core:")
    for name, value in rates.items():
        print(f"    {name:10}{value:8,.0f}")
    print(json.dumps({"clips": len(clips), "frames": frames, "clips_per_second": rates}))


def main(argv=None):
    from eat import Parser, at_least  # not at the top: eat.py imports this file

    parser = Parser(prog="data.py", description="Sound as EAT reads it.")
    commands = parser.add_subparsers(dest="command", required=True)
    shower = commands.add_parser("show", help="draw a clip: waveform, spectrogram, patches, masks")
    shower.add_argument("clip", help="a sound file, or 'demo'")
    shower.add_argument("--out", default="clip.png", help="the picture [clip.png]")
    shower.add_argument("--seed", type=at_least(0), default=0, help="of the masks [0]")
    packer = commands.add_parser("pack", help="decode a folder's sound once, for every run after")
    packer.add_argument("path", help="a folder of sound, a file, or a list of files")
    packer.add_argument("out", help="the folder to write, which is then a --data")
    packer.add_argument("--workers", type=at_least(0), default=os.cpu_count(), help="processes that decode [%(default)s]")
    timer = commands.add_parser("bench", help="how many clips a second a core reads")
    timer.add_argument("path", help="a folder of sound, a file, a list of files, a pack, or 'demo'")
    timer.add_argument("--frames", type=at_least(1), default=1024, help="length of a clip in frames of 10 ms [1024]")
    timer.add_argument("--clips", type=at_least(1), default=512, help="how many to read [512]")
    args = parser.parse_args(argv)
    try:
        if args.command == "show":
            show(args.clip, args.out, args.seed)
            print(args.out)
        elif args.command == "pack":
            pack(args.path, args.out, args.workers)
        else:
            bench(args.path, args.frames, args.clips)
    except AudioError as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    except (OSError, KeyboardInterrupt) as error:
        again = "; the same command goes on from here" * (args.command == "pack")
        print(f"data.py: {error if isinstance(error, OSError) else 'stopped'}{again}", file=sys.stderr)
        return 2 if isinstance(error, OSError) else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
