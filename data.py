"""Everything between files and tensors: the toy world, videos, preference pairs, run folders, arguments,
logs.

    python data.py                   writes shapes.png: good and bad videos of Shapes world with their oracle scores
    python data.py encode --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --pairs pairs.csv        fills the latent cache

Shapes world is a world small enough for two CPU cores in which the true quality of a video is known exactly:
one soft-edged shape on a dark ground, 6 colours x 3 shapes x 4 directions, twelve renderers with different
flaws in the place of twelve text-to-video models, and an oracle that measures VQ, MQ and TA from the pixels
alone. Pixels are (B, 3, T, H, W) in [-1, 1]; files hold uint8 (T, H, W, 3).
"""
import argparse
import atexit
import csv
import difflib
import hashlib
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import timedelta
from functools import lru_cache, wraps
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent

DIMS = ("VQ", "MQ", "TA")    # visual quality, motion quality, text alignment: the columns of every r (B, 3)


# ---- several processes, started by torchrun; alone, all of this changes nothing ----

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_ranks():
    """Join the other processes, on this one's GPU if there are any; only rank 0 prints."""
    if WORLD == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=12))
    atexit.register(dist.destroy_process_group)
    if RANK:
        sys.stdout = open(os.devnull, "w")
        init = tqdm.__init__
        tqdm.__init__ = lambda *args, **kwargs: init(*args, **kwargs | {"disable": True})


def gather(x):
    """[x of rank 0, x of rank 1, ..], of anything that can be pickled; all ranks wait for each other."""
    everyone = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(everyone, x)
    return everyone


def collect(mine):
    """A list of which each rank made its share, items[RANK::WORLD], whole and in order."""
    parts = gather(mine)
    whole = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank::WORLD] = part
    return whole


def on_rank_0(function):
    """The function, called by rank 0 alone; the others wait for it and return what it returned there."""
    @wraps(function)
    def call(*args, **kwargs):
        return gather(None if RANK else function(*args, **kwargs))[0]
    return call


def add_gradients(parameters):
    """Give every rank the sum of all ranks' gradients: once a step, so that micro-batches cost no messages."""
    if WORLD > 1:
        sums = [dist.all_reduce(p.grad, async_op=True) for p in parameters if p.grad is not None]
        for s in sums:
            s.wait()


def shard(model):
    """Split the weights over the ranks block by block (FSDP2): a block is whole only while it computes. A backward
    pass then gives the mean of all ranks' gradients.
    """
    from torch.distributed.fsdp import fully_shard
    for module in (*model.blocks, model):
        fully_shard(module)


# ---- arguments, run folders, logs: one way for all scripts ----

def fail(message):
    """Say in one line what is wrong and how to mend it, and leave with exit status 2."""
    print("error:", *str(message).splitlines(), file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def user_errors():
    """Inside, or in a function with this decorator, a ValueError is the user's to mend: it fails in one line."""
    try:
        yield
    except ValueError as e:
        fail(e)


def parse_args(cls, doc, argv=None):
    """An instance of the dataclass cls from the command line. Annotations give the types, trailing comments
    the help.

    Literal is a choice, bool makes --flag and --no-flag, tuple reads numbers with commas, list takes several
    words, `X | None` is left to the recipe. A wrong flag or value ends in one line and exit status 2.
    """
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=style, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (--help lists every flag)")
    hints = typing.get_type_hints(cls)
    notes = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", inspect.getsource(cls), re.M))
    for f in fields(cls):
        kind = hints[f.name]
        if type(None) in typing.get_args(kind):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        note = notes.get(f.name, "").replace("%", "%%")
        options = dict(default=f.default, help=note if f.default in (None, (), "") else f"{note} [{f.default}]")
        if f.default is MISSING:
            options = dict(required=True, help=note)
        if typing.get_origin(kind) is typing.Literal:
            options |= dict(choices=typing.get_args(kind))
        elif kind is bool:
            options |= dict(action=argparse.BooleanOptionalAction)
        elif kind is tuple:
            options |= dict(type=numbers, metavar="A,B,..")
        elif kind is list:
            options |= dict(nargs="+", metavar=f.name.upper())
        else:
            options |= dict(type=kind, metavar=kind.__name__.upper())
        parser.add_argument(f"--{f.name}", **options)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{f.name}" for f in fields(cls)], 1)
        hint = f", did you mean {near[0]}?" if near else ""
        fail(f"unknown argument {unknown[0]}{hint} (--help lists every flag)")
    return cls(**vars(args))


def launch(main, cls, doc, argv=None):
    """Run main with the arguments of the command line. A file or disk that fails ends in one line, exit status 2."""
    try:
        return main(parse_args(cls, doc, argv))
    except OSError as e:
        fail(e)


def numbers(text):
    """'0.5,0.5,0' as a tuple of numbers."""
    return tuple(int(x) if x.strip().isdigit() else float(x) for x in text.split(","))


def find(path, *names):
    """The folder at path, as given or beside this file, so that `assets/base` works from anywhere.

    names: files or folders of which it must hold one; else, one line and exit status 2.
    """
    found = Path(path) if Path(path).exists() or Path(path).is_absolute() else HERE / path
    if not found.exists():
        fail(f"{path} does not exist")
    if names and not any((found / name).exists() for name in names):
        fail(f"{path} holds no {' or '.join(names)}: is it the folder of a finished run?")
    return found


def fetch(name, wanted):
    """The folder at name, as given or beside this file; else the wanted files of the hub repository of that name.
    ValueError where there is neither.
    """
    if Path(name).is_absolute() or Path(name).exists() or (HERE / name).exists():
        return find(name)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted))
    except (OSError, ValueError) as e:
        why = str(e).splitlines()[0]
        raise ValueError(f"{name} does not exist here and cannot be had from the hub: {why}") from None


def check_counts(args, *names):
    """Refuse a number below 1 of the flags that count something, and a negative seed."""
    if args.seed < 0:
        fail(f"--seed {args.seed}: give 0 or a whole number above it")
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: give a whole number above 0")


def check_out(out):
    """Refuse an --out that cannot become a folder, before any work is done."""
    parent = next(p for p in (Path(out).absolute(), *Path(out).absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "read-only" if parent.is_dir() else "a file"
        fail(f"--out {out} cannot be written ({parent} is {why}): name another folder")


def read_json(path):
    """The object in a JSON file. ValueError names a file that holds none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def write_json(path, value):
    """Write value as JSON, to a temporary name and then renamed."""
    Path(f"{path}.tmp").write_text(json.dumps(value, indent=1))
    os.replace(f"{path}.tmp", path)


@on_rank_0
def start_run(args, device="cpu"):
    """Make the run folder args.out and its config.json; returns it. An older run there is renamed and kept, or with
    args.resume gone on with, if it had the same arguments.
    """
    run = Path(args.out)
    if getattr(args, "resume", False) and (run / "config.json").exists():
        with user_errors():
            own = (read_json(run / "config.json").get("args") or {}) | {"resume": True}
        now = json.loads(json.dumps(asdict(args)))
        if other := [f"--{k} was {own.get(k)}, not {v}" for k, v in now.items() if own.get(k) != v]:
            fail(f"--resume: {run} was made by another command ({'; '.join(other[:3])}): give the same arguments")
        return run
    try:
        if (run / "config.json").exists():
            n = next(n for n in range(1, 10**6) if not Path(f"{run}.{n}").exists())
            run.rename(f"{run}.{n}")
            print(f"{run} held an earlier run: it is now {run}.{n}")
        run.mkdir(parents=True, exist_ok=True)
        git = shutil.which("git") and subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"],
                                                     capture_output=True, text=True)
        write_json(run / "config.json", {
            "command": command(args), "args": asdict(args), "commit": git.stdout.strip() if git else "",
            "world": world_hash(), "torch": torch.__version__, "python": sys.version.split()[0],
            "device": str(device), "threads": torch.get_num_threads()})
    except OSError as e:
        fail(f"--out {args.out} cannot be written ({e.strerror}): name a folder that can")
    return run


def markdown(head, rows):
    """A Markdown table from the cells of its head and of each row."""
    line = lambda cells: "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])


def command(args):
    """The command line that makes these arguments again."""
    words = ["python", Path(inspect.getfile(type(args))).name]
    for name, value in asdict(args).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value not in (None, (), ""):
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


@on_rank_0
def log(run, **event):
    """Append one JSON object to the run's log.jsonl."""
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps({"time": round(time.time(), 1), **event}) + "\n")


def read_log(run):
    """The events in the run's log.jsonl; a last line that was cut short when the run was killed is left out."""
    lines = (run / "log.jsonl").read_text().split("\n")[:-1] if (run / "log.jsonl").exists() else []
    return [json.loads(line) for line in lines]


@contextmanager
def ctrl_c():
    """Inside, Ctrl-C does not stop the program: it makes the function that this gives return True. Twice stops it."""
    asked = threading.Event()

    def handler(*_):
        asked.set()
        signal.signal(signal.SIGINT, before)
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def prefetch(load, keys):
    """load(*key) of each key in turn, the next one being loaded by a thread while this one is in use."""
    with ThreadPoolExecutor(1) as pool:
        following = None
        for key in keys:
            current, following = following, pool.submit(load, *key)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()


@on_rank_0
def save_state(run, step, parts):
    """Write what training needs to go on after step into run/state-<step>-<hash>.pt; the last two are kept.

    parts: {name: module, optimizer, list or None}; of a module, its trained parameters. The file gets its name, with
    the hash of its content in it, when it is complete.
    """
    state = {"step": step}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            state[name] = {k: p.data for k, p in part.named_parameters() if p.requires_grad}
        elif part is not None:
            state[name] = part if isinstance(part, list) else part.state_dict()
    try:
        torch.save(state, run / "state.tmp")
    except RuntimeError as e:                                                   # torch's answer to a full disk
        raise OSError(f"{run / 'state.tmp'} cannot be written: {e}") from None
    os.replace(run / "state.tmp", run / f"state-{step:07}-{content_hash(run / 'state.tmp')}.pt")
    for old in sorted(run.glob("state-*-*.pt"))[:-2]:
        old.unlink()


def load_state(run, parts):
    """Bring parts to the newest whole state in run, and the log back to it; returns its step, 0 if there is none."""
    for file in sorted(run.glob("state-*-*.pt"), reverse=True):
        if content_hash(file) != file.stem.split("-")[2]:
            print(f"{file} is damaged: going back to the one before it")
            continue
        state = torch.load(file, weights_only=True, map_location="cpu")
        for name, part in parts.items():
            if isinstance(part, list):
                part[:] = state[name]
            elif isinstance(part, torch.nn.Module):
                part.load_state_dict(state[name], strict=False)                 # what is frozen is not in it
            elif part is not None:
                part.load_state_dict(state[name])
        step = state["step"]
        print(f"going on after step {step} of {file}")
        break
    else:
        step = 0
        print(f"{run} holds no whole state: starting at step 0")
    cut_log(run, step)
    return step


@on_rank_0
def cut_log(run, step):
    """Take the events after step out of the run's log."""
    events = [json.dumps(event) + "\n" for event in read_log(run) if event["step"] <= step]
    Path(run / "log.tmp").write_text("".join(events))
    os.replace(run / "log.tmp", run / "log.jsonl")


def content_hash(path):
    """The first 16 digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def stop_broken(run, **facts):
    """Write the facts of a step whose loss or gradient is not finite to broken.json, and stop: exit status 2."""
    facts = json.loads(json.dumps(facts), parse_constant=str)                   # JSON has no nan
    on_rank_0(write_json)(run / "broken.json", facts)
    fail(f"step {facts['step']}: loss or gradient is not finite; {run / 'broken.json'} has its rows, t and losses, and "
         "--resume repeats it: look at those rows, or start again with a lower --lr")


# ---- randomness ----

def rng(*key):
    """A torch.Generator that is a function of its key, such as ("noise", seed, step, sample): no hidden state."""
    key = [zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0]))


def draw_noise(shape, seed, step, samples, logit_normal=False):
    """t (B,) and eps (B, *shape) for the samples with these indices: t uniform in [0, 1), or logit-normal,
    eps normal.

    A function of (seed, step, sample) alone, so that resuming, splitting a batch and several ranks agree by
    construction.
    """
    draws = [rng("noise", seed, step, i) for i in samples]
    if logit_normal:
        t = torch.stack([torch.randn((), generator=g) for g in draws]).sigmoid()
    else:
        t = torch.stack([torch.rand((), generator=g) for g in draws])
    return t, torch.stack([torch.randn(shape, generator=g) for g in draws])


def step_rows(n, batch, seed, step):
    """The rows (batch,) of an optimizer step: each epoch is a fresh permutation of n, a function of (seed, epoch)."""
    places = torch.arange(step * batch, (step + 1) * batch)
    orders = {e: torch.randperm(n, generator=rng("order", seed, e)) for e in (places // n).unique().tolist()}
    return torch.stack([orders[p // n][p % n] for p in places.tolist()])


# ---- Shapes world: prompts and text ----

FRAMES, SIZE, FPS = 8, 24, 8
GROUND, GREY = 0.06, 0.45               # the dark ground, and what a washed-out colour fades to, in [0, 1]
COLOURS = {"red": (1, .1, .1), "yellow": (1, 1, .1), "green": (.1, 1, .1),
           "cyan": (.1, 1, 1), "blue": (.1, .1, 1), "purple": (1, .1, 1)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}   # (x, y), y downwards
PROMPTS = [f"a {c} {s} moving {d}" for c in COLOURS for s in SHAPES for d in DIRECTIONS]
TEXT_LEN, TEXT_DIM = 8, 32              # word slots, zero after the last word as Wan pads its prompts; their width


def attributes(prompts):
    """(colour, shape, direction) of each prompt as indices (B, 3). ValueError names a prompt outside the
    world.
    """
    rows = []
    for prompt in prompts:
        words = prompt.lower().split()
        row = [[i for i, name in enumerate(kind) if name in words] for kind in (COLOURS, SHAPES, DIRECTIONS)]
        if any(len(found) != 1 for found in row):
            raise ValueError(f"'{prompt}' is not a prompt of Shapes world; write one like '{PROMPTS[0]}'")
        rows.append([found[0] for found in row])
    return torch.tensor(rows)


def split_of(prompt):
    """'eval' for 18 of the 72 combinations, 'val' for 9, 'train' for 45: spread evenly over colours, shapes
    and directions.
    """
    c, s, d = attributes([prompt])[0].tolist()
    return {0: "eval", 4: "eval", 2: "val"}.get((c + 2 * s + 3 * d) % 8, "train")


def embed_text(prompts):
    """Frozen word embeddings (B, TEXT_LEN, TEXT_DIM): each word is a normal vector seeded by its letters."""
    out = torch.zeros(len(prompts), TEXT_LEN, TEXT_DIM)
    for b, prompt in enumerate(prompts):
        for s, word in enumerate(prompt.lower().split()[:TEXT_LEN]):
            out[b, s] = torch.randn(TEXT_DIM, generator=rng(word))
    return out


# ---- Shapes world: the renderers ----

DEFECTS = ("blur", "wash", "jitter", "stutter", "teleport", "colour", "shape", "direction")
# Strength in [0, 1] of the first five, which spoil VQ (blur, wash) and MQ (jitter, stutter, teleport);
# probability of the last three, which draw something else than the prompt says and spoil TA.
RENDERERS = {
    "sharp":   (.05, .05, .05, .00, .0, .05, .05, .05),
    "soft":    (.90, .10, .05, .00, .0, .10, .10, .10),
    "pale":    (.10, .80, .05, .00, .0, .10, .10, .10),
    "foggy":   (.60, .60, .00, .10, .0, .05, .10, .05),
    "shaky":   (.30, .20, .80, .00, .0, .10, .10, .10),
    "jerky":   (.20, .30, .05, .90, .0, .05, .10, .10),
    "jumpy":   (.20, .20, .05, .10, .9, .10, .05, .10),
    "gaudy":   (.30, .10, .10, .10, .0, .90, .10, .10),
    "clumsy":  (.10, .30, .10, .10, .0, .10, .90, .10),
    "lost":    (.20, .20, .10, .00, .1, .10, .10, .90),
    "worn":    (.50, .45, .40, .30, .0, .10, .10, .10),
    "wild":    (.40, .40, .50, .20, .3, .40, .40, .40),
}
EDGES = torch.tensor([1.0, 3.0, 5.5, 8.0], dtype=torch.float64)     # px from full to none at a border: 1 is sharp
RADII = torch.linspace(3.4, 5.4, 6, dtype=torch.float64)            # px, of the circle of the same area


def gauges(centres):
    """How far each pixel is from a centre, as each of the three shapes measures it: (..., 3, SIZE, SIZE) from
    (..., 2).

    A shape of radius r is the set where its gauge is below r; all three then have the area of a circle of
    radius r, and `(r - gauge) / edge + 0.5`, clipped to [0, 1], draws it with a soft edge.
    """
    grid = torch.arange(SIZE, dtype=centres.dtype, device=centres.device)
    x = (grid - centres[..., :1])[..., None, :].expand(*centres.shape[:-1], SIZE, SIZE)
    y = (grid - centres[..., 1:])[..., :, None].expand(*centres.shape[:-1], SIZE, SIZE)
    circle = (x.square() + y.square()).sqrt()
    square = torch.maximum(x.abs(), y.abs()) / (np.pi**0.5 / 2)
    triangle = torch.maximum(y, 3**0.5 / 2 * x.abs() - y / 2) / (np.pi / 27**0.5) ** 0.5    # equilateral
    return torch.stack([circle, square, triangle], dim=-3)


def draw(gauge, radius, edge):
    """Coverage in [0, 1] of the shape with this gauge, radius and edge width (all broadcast)."""
    return ((radius - gauge) / edge + 0.5).clamp(0, 1)


def render(wanted, defects, g):
    """Videos (B, 3, T, H, W) in [-1, 1], float64, of wanted attributes (B, 3) with defects (B, 8); g: generator."""
    B = len(wanted)
    uniform = lambda *shape: torch.rand(B, *shape, generator=g, dtype=torch.float64)
    blur, wash, jitter, stutter, teleport = (defects[:, i].double() for i in range(5))
    sizes = torch.tensor([len(COLOURS), len(SHAPES), len(DIRECTIONS)])
    other = (wanted + 1 + (uniform(3) * (sizes - 1)).long()) % sizes            # never the wanted one
    colour, shape, direction = torch.where(uniform(3) < defects[:, 5:], other, wanted).T

    # where: constant velocity through a point near the middle, then the flaws of motion
    speed = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float64)[direction]
    speed = speed * (1.0 + 0.5 * uniform(1))                                    # (B, 2), px / frame
    middle = (SIZE - 1) / 2 + (uniform(2) - 0.5) * (10 - 7 * speed.abs().sign())    # +-1.5 px along, +-5 px across
    clock = torch.arange(FRAMES, dtype=torch.float64).repeat(B, 1)
    held = uniform(FRAMES) < 0.6 * stutter[:, None]
    for f in range(1, FRAMES):                                                  # a held frame repeats the last
        clock[:, f] = torch.where(held[:, f], clock[:, f - 1], clock[:, f])
    path = middle[:, None] + speed[:, None] * (clock - (FRAMES - 1) / 2)[..., None]        # (B, T, 2)
    path = path + 1.5 * jitter[:, None, None] * torch.randn(B, FRAMES, 2, generator=g, dtype=torch.float64)
    angle, when = 2 * np.pi * uniform(1), 2 + (uniform(1) * (FRAMES - 3)).floor()
    jump = 5 * teleport[:, None] * torch.cat([angle.cos(), angle.sin()], dim=1)
    path = path + jump[:, None] * (torch.arange(FRAMES) >= when)[..., None]
    path = path.clamp(4, SIZE - 5)

    # what: colour over ground, faded and softened
    ink = torch.tensor(list(COLOURS.values()), dtype=torch.float64)[colour]
    ink = ink + 0.8 * wash[:, None] * (GREY - ink)
    radius = 3.8 + 1.2 * uniform(1)
    gauge = gauges(path)[torch.arange(B), :, shape]                             # (B, T, SIZE, SIZE)
    mask = draw(gauge, radius[..., None, None], (1 + 7 * blur)[:, None, None, None])
    pixels = GROUND + mask[:, None] * (ink - GROUND)[:, :, None, None, None]
    return 2 * pixels - 1


def flawed_videos(n, split, g):
    """n videos of random renderers, (n, 3, T, H, W) in [-1, 1], and their prompts; split None is every prompt."""
    names = [p for p in PROMPTS if split in (None, split_of(p))]
    prompts = [names[i] for i in torch.randint(len(names), (n,), generator=g)]
    who = torch.randint(len(RENDERERS), (n,), generator=g)
    return render_as(who, prompts, g), prompts


def render_as(who, prompts, g):
    """Videos of prompts by the renderers who (B,); each strength is drawn between half and all of its value."""
    defects = torch.tensor(list(RENDERERS.values()), dtype=torch.float64)[who]
    defects[:, :5] *= 0.5 + 0.5 * torch.rand(len(who), 5, generator=g, dtype=torch.float64)
    return render(attributes(prompts), defects, g)


def clean_videos(prompts):
    """A flawless video (n, 3, T, H, W) in [-1, 1], fp32, of each prompt."""
    return render(attributes(prompts), torch.zeros(len(prompts), 8), rng("clean")).float()


# ---- Shapes world: the oracle ----

ORACLE_STD = (0.166, 0.272, 0.218)    # of VQ, MQ, TA over the flawed mixture: what Overall divides by


def oracle(video, prompts):
    """The true VQ, MQ and TA in [0, 1], (B, 3) fp32, measured from the pixels (B, 3, T, H, W) in [-1, 1] and
    the prompt alone.

    Each frame is compared with every shape of the world drawn where its light is: 3 shapes, 6 radii, 4 edge widths.
      presence  share of the frame's energy that the best of them explains (0 for nothing, near 0 for noise)
      VQ        exp(-4 R), R the energy of the difference to the nearest flawless frame, over that frame's own
      MQ        presence * smooth * moving * steady: near a constant-velocity path, at speed, with equal frames
      TA        presence * (colour + shape + direction) / 3, each the degree to which it is the prompted one
    """
    parts = [_oracle(video[i:i + 8], prompts[i:i + 8]) for i in range(0, len(video), 8)]    # 8 stay in a CPU's cache
    return torch.cat(parts).float()


def _oracle(video, prompts):
    light = (video.clamp(-1, 1).transpose(1, 2) + 1) / 2 - GROUND               # (B, T, 3, H, W), 0 is ground
    energy = light.square().sum(2)                                                         # (B, T, H, W)
    total = energy.sum((2, 3)) + 1e-6                                                      # (B, T)
    grid = torch.arange(SIZE, dtype=video.dtype, device=video.device)
    weight = energy
    for _ in range(3):                                                          # centre of light, then near it
        mass = weight.sum((2, 3)) + 1e-6
        centre = torch.stack([(weight.sum(axis) * grid).sum(2) / mass for axis in (2, 3)], dim=-1)   # (B, T, 2)
        far = (grid - centre[..., :1]).square()[..., None, :] + (grid - centre[..., 1:]).square()[..., :, None]
        weight = energy * torch.exp(-far / 50)

    radii, edges = RADII.to(video), EDGES.to(video)
    gauge = gauges(centre)[:, :, :, None, None]                                 # (B, T, 3, 1, 1, H, W)
    masks = draw(gauge, radii[:, None, None, None], edges[:, None, None]).flatten(5)  # (B, T, 3, R, E, HW)
    power = masks.square().sum(-1)                                                         # (B, T, 3, R, E)
    match = torch.einsum("btsrep,btcp->btsrec", masks, light.flatten(3))        # (B, T, 3, R, E, 3)
    explained = match.square().sum(-1) / power / total[..., None, None, None]
    presence = explained.flatten(2).amax(2)                                                # (B, T)
    by_shape = explained.flatten(3).amax(3).mean(1)                                        # (B, 3)

    # colour: of the light under the best mask, its chroma against the six of the palette
    best = explained.flatten(2).argmax(2)
    pick = lambda y, i: y.gather(2, i[..., None, None].expand(-1, -1, 1, y.shape[-1]))[:, :, 0]
    ink = pick((match / power[..., None]).flatten(2, 4), best)                  # (B, T, 3)
    palette = torch.tensor(list(COLOURS.values())).to(video)
    chroma, hues = ink - ink.mean(-1, keepdim=True), palette - palette.mean(-1, keepdim=True)
    likeness = F.cosine_similarity(chroma[..., None, :], hues, dim=-1, eps=0.05)           # (B, T, 6)

    # VQ: against the same shape drawn sharp, at its best radius, in the nearest colour of the palette
    sharp = explained[..., 0].flatten(2).argmax(2)                              # over (shape, radius)
    mask = pick(masks[..., 0, :].flatten(2, 3), sharp)                          # (B, T, HW)
    clean = mask[:, :, None] * (palette - GROUND)[likeness.argmax(-1)][..., None]          # (B, T, 3, HW)
    R = (light.flatten(3) - clean).square().sum((2, 3)) / clean.square().sum((2, 3))
    vq = torch.exp(-4 * R).mean(1)

    # MQ: the path of the centre against its least-squares line
    f = torch.arange(FRAMES, dtype=video.dtype, device=video.device) - (FRAMES - 1) / 2
    velocity = (centre * f[:, None]).sum(1) / f.square().sum()                  # (B, 2), px / frame
    off = centre - centre.mean(1, keepdim=True) - velocity[:, None] * f[:, None]
    smooth = torch.exp(-off.square().sum(-1).mean(1))                           # off the line by 1 px: 1 / e
    speed = velocity.norm(dim=1)
    moving = ((speed - 0.2) / 0.5).clamp(0, 1)
    amount = light.sum((3, 4))                                                             # (B, T, 3)
    usual = amount.mean(1, keepdim=True)
    change = (amount - usual).norm(dim=-1).mean(1) / (usual[:, 0].norm(dim=-1) + 1e-6)
    steady = torch.exp(-(change / 0.3).square())
    presence = presence.mean(1)
    mq = presence * smooth * moving * steady

    # TA: is it what the prompt says?
    c, s, d = attributes(prompts).to(video.device).T
    rows = torch.arange(len(video), device=video.device)
    is_colour = (likeness.mean(1) / 0.1).softmax(-1)[rows, c] * likeness.amax(-1).mean(1).clamp(0, 1)
    is_shape = (by_shape / 0.01).softmax(-1)[rows, s]
    aim = (velocity * torch.tensor(list(DIRECTIONS.values())).to(video)[d]).sum(1) / (speed + 1e-6)
    is_direction = torch.sigmoid((aim - 0.7) / 0.05) * moving
    ta = presence * (is_colour + is_shape + is_direction) / 3
    return torch.stack([vq, mq, ta], dim=1)


@lru_cache
def world_hash():
    """Fingerprint of Shapes world: prompts, split, word embeddings, rendered pixels and oracle scores, to
    three decimals.

    It stands in the metadata of all weights trained on this world: change the world and they must be trained
    again.
    """
    video, prompts = flawed_videos(8, None, rng(0))
    parts = [PROMPTS, [split_of(p) for p in PROMPTS], ORACLE_STD] + [
        (1000 * x).round().int().tolist() for x in (embed_text(PROMPTS[:1]), video, _oracle(video, prompts))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def check_world(metadata, path):
    """Refuse weights that were trained on another Shapes world than this file's."""
    if metadata.get("world") != world_hash():
        found = metadata.get("world")
        fail(f"{path} was trained on another Shapes world ({found}, here {world_hash()}): train it again")


# ---- Shapes world: annotators and preference pairs ----

def with_overall(score):
    """Oracle scores (B, 3) in units of their standard deviation on the flawed mixture, and their mean: (B, 4)."""
    z = score / torch.tensor(ORACLE_STD)
    return torch.cat([z, z.mean(1, keepdim=True)], dim=1)


SHARPNESS = (1.5, 1.5, 1.5, 2.5)      # logits per standard deviation of the oracle, for VQ, MQ, TA, Overall


def annotate(score_a, score_b, g, noise=1.0):
    """Human labels (B, 4) for VQ, MQ, TA, Overall: +1 A, 0 same, -1 B, drawn from the oracle's margins by
    Rao-Kupper.

    score_a, score_b: oracle scores (B, 3); g: generator; noise divides the sharpness. With noise 1, 40 to 60 % are
    ties.
    """
    d = (with_overall(score_a) - with_overall(score_b)) * torch.tensor(SHARPNESS) / noise
    u, log_tie = torch.rand(d.shape, generator=g), np.log(5)
    return (u < torch.sigmoid(d - log_tie)).float() - (u > 1 - torch.sigmoid(-d - log_tie)).float()


def likert(score, g, noise=1.0):
    """An annotator's 1 to 5 points for oracle scores (..., 3): half a point of noise, or noise times that, then whole
    points.
    """
    return (1 + 4 * score + 0.5 * noise * torch.randn(score.shape, generator=g)).round().clamp(1, 5)


@dataclass
class Pairs:
    """n preference pairs: two videos of each prompt, A first.

    label (n, 4): VQ, MQ, TA, Overall as +1 A, 0 same, -1 B, nan unlabelled; mos (n, 2, 3): Likert points of A and
    B, nan where there are none. Of Shapes world also videos, uint8 (n, 2, 3, T, H, W), and score (n, 2, 3), the
    oracle's; read from a file also paths [(A, B)] and lines, the lines of the file, and, once encode has been there,
    files [(A's latents, B's latents, the prompt's embedding)] in the cache.
    """
    prompts: list
    label: torch.Tensor
    mos: torch.Tensor
    videos: torch.Tensor = None
    score: torch.Tensor = None
    paths: list = None
    lines: list = None
    files: list = None

    def latents(self, rows):
        """x0 (len(rows), 2, C, T, H, W) of A and B, fp32: from the cache, or the toy's own pixels in [-1, 1]."""
        if self.files is None:
            return to_float(self.videos[rows])
        return torch.stack([torch.stack([load_cached(file) for file in self.files[i][:2]]) for i in rows]).float()

    def text(self, rows):
        """Prompt embeddings (len(rows), S, text_dim), fp32."""
        if self.files is None:
            return embed_text([self.prompts[i] for i in rows])
        return pad_text([load_cached(self.files[i][2]) for i in rows])

    def subset(self, rows):
        """The Pairs of these rows."""
        pick = lambda x: x if x is None else x[rows] if torch.is_tensor(x) else [x[i] for i in rows]
        return Pairs(**{f.name: pick(getattr(self, f.name)) for f in fields(self)})


def toy_pairs(n, split, seed, judge=True, noise=1.0):
    """n Pairs of Shapes world for the prompts of a split, A and B by two different renderers, labelled by
    annotators of this noise; with judge=False they stay unlabelled, which saves most of the time.
    """
    g = rng("pairs", split, seed)
    names = [p for p in PROMPTS if split_of(p) == split]
    prompts = [names[i] for i in torch.randint(len(names), (n,), generator=g)]
    a = torch.randint(len(RENDERERS), (n,), generator=g)
    b = (a + torch.randint(1, len(RENDERERS), (n,), generator=g)) % len(RENDERERS)
    parts = [slice(i, i + 256) for i in range(0, n, 256)]
    videos = torch.stack([torch.cat([to_uint8(render_as(who[part], prompts[part], g)) for part in parts])
                          for who in (a, b)], dim=1)
    if not judge:
        return Pairs(prompts, torch.full((n, 4), torch.nan), torch.full((n, 2, 3), torch.nan), videos)
    score = torch.stack([oracle(to_float(videos[:, k]), prompts) for k in (0, 1)], dim=1)
    label, mos = annotate(score[:, 0], score[:, 1], g, noise=noise), likert(score, g, noise)
    return Pairs(prompts, label, mos, videos, score)


def report_pairs(pairs, held_out=()):
    """Print what a set of pairs is made of: repeated pairs, whether their labels contradict each other, and how many of
    its prompts are among the held_out ones; ties of each dimension, and how often it agrees with the others.
    """
    videos = pairs.paths or [[hash(video.numpy().tobytes()) for video in pair] for pair in pairs.videos]
    prompts, sign, verdicts = set(pairs.prompts), pairs.label.nan_to_num(), {}  # +1 A, -1 B, 0 says nothing
    for prompt, (a, b), label in zip(pairs.prompts, videos, sign.tolist()):
        turn = 1 if a < b else -1                                               # both orders have one key
        verdicts.setdefault((prompt, *sorted((a, b))), []).append([turn, *(turn * x for x in label)])
    print(f"{len(videos)} pairs of {len({x for pair in videos for x in pair})} videos and {len(prompts)} prompts"
          + f", {len(prompts & set(held_out))} of which are evaluated on too" * bool(held_out))
    if repeated := [list(zip(*rows)) for rows in verdicts.values() if len(rows) > 1]:
        both, opposite = (sum(any({1, -1} <= set(column) for column in columns[part]) for columns in repeated)
                          for part in (slice(1), slice(1, None)))
        print(f"{len(repeated)} pairs occur more than once: {both} in both orders, {opposite} with opposite labels")
    names = (*DIMS, "Overall")
    for k, name in enumerate(names):
        label, same = pairs.label[:, k][~pairs.label[:, k].isnan()], sign[:, k:k + 1] * sign    # same > 0: they agree
        if len(label):
            share = [f"{other} {(x > 0).sum() / (x != 0).sum():.0%}" for other, x in zip(names, same.T)
                     if other != name and x.any()]
            print(f"{name}: {len(label) / len(videos):.0%} labelled; A {(label > 0).float().mean():.0%}, "
                  f"B {(label < 0).float().mean():.0%}, ties {(label == 0).float().mean():.0%}"
                  + f"; where both decide, it agrees with {', '.join(share)}" * bool(share))


# ---- preference pairs from files ----

# The layouts that are understood, each known by its columns: prompt, A, B and, for some, their verdict.
LAYOUTS = {
    ("prompt", "path_A", "path_B"): "VideoAlign and VideoGen-RewardBench: labels in VQ, MQ, TA, Overall",
    ("prompt", "left_video", "right_video", "vote_type"): "GenAI-Bench",
    ("prompt", "video1_path", "video2_path", "standard_answer"): "VisionRewardDB-Video",
    ("prompt", "chosen", "rejected"): "a winner and a loser",
}
LABELS = {1.0: ("a", "left", "leftvote", "video1"), -1.0: ("b", "right", "rightvote", "video2"),
          0.0: ("same", "tie", "tievote", "bothbad_vote"), float("nan"): ("", "nan", "none", "invalid")}
LABELS = {word: label for label, words in LABELS.items() for word in words}


def read_table(path):
    """[(line, {column: text})] of a CSV, JSONL or JSON file, in UTF-8; one line and exit status 2 if it is none."""
    path = Path(path)
    if path.suffix == ".parquet":
        code = f"import pandas; pandas.read_parquet('{path}').to_csv('{path.with_suffix('.csv')}', index=False)"
        fail(f"{path} is Parquet: where pandas is installed, make it a CSV by python -c {shlex.quote(code)}")
    try:
        if path.suffix in (".jsonl", ".json"):
            text = path.read_text("utf-8-sig")
            if path.suffix == ".json":
                table = list(enumerate(json.loads(text), 1))
            else:
                table = [(n, json.loads(line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            if not all(isinstance(row, dict) for _, row in table):
                fail(f"{path} must hold one JSON object per row, with its columns as keys")
            return [(n, {k: "" if v is None else str(v) for k, v in row.items()}) for n, row in table]
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="", restval="", strict=True)
            return [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as e:
        fail(f"{path} is not UTF-8 text (byte {e.start}): save it as a CSV or JSONL file in UTF-8")
    except (OSError, ValueError, TypeError, RecursionError, csv.Error) as e:
        fail(f"{path} cannot be read as {path.suffix[1:].upper() if path.suffix[:5] == '.json' else 'CSV'}: {e}")


def read_pairs(path):
    """Pairs of a file in one of LAYOUTS, CSV, JSONL or JSON; video paths are relative to the file.

    Labels are A, B or same in any case, or another of LABELS; anything else is unlabelled, and how many are is
    printed. Numbers are refused: whether 1 and 0, 1 and 2 or 1 and -1 are meant can't be known. MOS_A_VQ .. MOS_B_TA,
    where they stand, are Likert points. All rows are checked at once: a missing column, prompt or video ends in one
    line that names it, and exit status 2.
    """
    table, folder = read_table(path), Path(path).parent
    if not table:
        fail(f"{path} holds no pairs: give it a header and one row per pair")
    columns = set().union(*(row for _, row in table))
    layout = next((names for names in LAYOUTS if columns.issuperset(names)), None)
    labelled = [dim for dim in (*DIMS, "Overall") if dim in columns]
    if layout is None or (layout[1] == "path_A" and not labelled):
        known = "; ".join(f"{', '.join(names)} ({what})" for names, what in LAYOUTS.items())
        fail(f"{path} has the columns {', '.join(sorted(map(str, columns)))}; understood are: {known}")

    paths, label, mos, odd, bad = [], [], [], [], []
    points = lambda text: float(text) if re.fullmatch(r"\s*[1-5](\.\d+)?\s*", text or "") else float("nan")
    for line, row in table:
        if not (row.get("prompt") or "").strip():
            bad.append(f"row {line} has no prompt")
        pair = tuple(folder / (row.get(name) or "") for name in layout[1:3])
        bad += [f"row {line}: {video} does not exist" for video in pair if not os.path.isfile(video)]
        words = {"Overall": row.get(layout[3]) if layout[3:] else "A"}
        words = {dim: row.get(dim) for dim in labelled} if layout[1] == "path_A" else words
        words = {dim: (word or "").strip().lower() for dim, word in words.items()}
        odd += [word for word in words.values() if word not in LABELS]
        label.append([LABELS.get(words.get(dim), float("nan")) for dim in (*DIMS, "Overall")])
        mos.append([[points(row.get(f"MOS_{side}_{dim}")) for dim in DIMS] for side in "AB"])
        paths.append(pair)
    if bad:
        more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
        fail(f"{path}, {bad[0]}{more}: mend the file; paths are relative to its folder")
    if numeric := sorted({word for word in odd if re.fullmatch(r"[-+]?\d+(\.\d*)?", word)}):
        fail(f"{path} has the labels {', '.join(numeric[:5])}: write A, B or same, numbers do not say which one won")
    if odd:
        seen = ", ".join(sorted({repr(word) for word in odd})[:5])
        print(f"{path}: {len(odd)} labels are neither A, B nor same ({seen}): taken as unlabelled")
    return Pairs([row["prompt"].strip() for _, row in table], torch.tensor(label), torch.tensor(mos),
                 paths=paths, lines=[line for line, _ in table])


# ---- videos and pictures ----

def to_uint8(video):
    """[-1, 1] to 0..255."""
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(video):
    """0..255 to [-1, 1], fp32."""
    return video.float() / 127.5 - 1


@contextmanager
def open_video(path):
    """(PyAV's container, its video stream, frames per second or 0). ValueError names a file that is no video."""
    import av
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video in it")
            stream = container.streams.video[0]
            yield container, stream, float(stream.average_rate or stream.guessed_rate or 0)
    except (av.FFmpegError, OSError, AttributeError) as e:                      # a stream without a codec has no size
        raise ValueError(f"{path} cannot be read as a video: {e}") from None


def video_info(path):
    """(frames, fps, height, width) of a video file, without decoding it. ValueError names a file that is no video."""
    with open_video(path) as (container, stream, fps):
        size = stream.height, stream.width
        count = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
    if count < 1 or not fps > 0:
        raise ValueError(f"{path} has {count} frames at {fps:g} frames per second")
    if max(size) > 8192:
        raise ValueError(f"{path} is {size[1]} x {size[0]}: more than 8192 pixels a side are refused")
    return count, fps, *size


def read_video(path, indices=None):
    """(frames, fps): uint8 (T, H, W, 3) and the frame rate; indices: the frames wanted, ascending (all of
    them if None).

    Decoding stops after the last one wanted. ValueError names a file that cannot be read or is too short.
    """
    wanted, frames = None if indices is None else set(int(i) for i in indices), {}
    with open_video(path) as (container, stream, fps):
        stream.thread_type = "AUTO"
        for i, frame in enumerate(container.decode(stream)):
            if wanted is None or i in wanted:
                frames[i] = frame.to_ndarray(format="rgb24")
            if wanted is not None and len(frames) == len(wanted):
                break
    missing = sorted((wanted or set()) - set(frames))
    if missing or not frames:
        raise ValueError(f"{path} has no frame {missing[0] if missing else 0}")
    if len({frame.shape for frame in frames.values()}) > 1:
        raise ValueError(f"{path} changes its size on the way")
    return np.stack([frames[i] for i in (sorted(frames) if indices is None else map(int, indices))]), fps


def write_video(path, video, fps):
    """Write an mp4 (H.264) from a video (3, T, H, W) in [-1, 1] or uint8 frames (T, H, W, 3), even in H and W."""
    import av
    if torch.is_tensor(video):
        video = video if video.dtype == torch.uint8 else to_uint8(video).permute(1, 2, 3, 0)
        video = video.cpu().numpy()
    T, H, W, _ = video.shape
    assert H % 2 == 0 and W % 2 == 0, f"H.264 needs even sides, not {H} x {W}"
    with av.open(str(path), "w", format="mp4") as container:
        options = {"crf": "12", "mbtree": "0"}                                  # with mbtree the bytes depend on chance
        stream = container.add_stream("libx264", rate=int(round(fps)), options=options)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        for frame in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def contact_sheet(path, rows, max_frames=8):
    """Write a PNG of rows of cells (caption, video (3, T, H, W) in [-1, 1]): strips of frames over their captions."""
    from PIL import Image, ImageDraw
    strips = []
    for row in rows:
        for caption, video in row:
            frames = to_uint8(video).permute(1, 2, 3, 0)                                   # (T, H, W, 3)
            some = np.linspace(0, len(frames) - 1, min(max_frames, len(frames))).round()
            frames = frames[some].cpu().numpy()
            strips.append((caption, Image.fromarray(np.concatenate(frames, axis=1))))
    height = 48                                                                 # px of a strip
    scale = height / strips[0][1].height
    width = max(int(max(strip.width for _, strip in strips) * scale), 200) + 12
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * width, len(rows) * (height + 20)), "white")
    pen, place = ImageDraw.Draw(sheet), [(c, r) for r, row in enumerate(rows) for c in range(len(row))]
    for (caption, strip), (c, r) in zip(strips, place):
        strip = strip.resize((int(strip.width * scale), height), Image.NEAREST if scale >= 1 else Image.LANCZOS)
        sheet.paste(strip, (c * width + 4, r * (height + 20) + 2))
        pen.text((c * width + 4, r * (height + 20) + height + 3), caption, fill="black")
    sheet.save(path, optimize=True)


def caption_of(score):
    """'VQ 0.98  MQ 0.91  TA 0.66' from oracle scores (3,)."""
    return "  ".join(f"{dim} {x:.2f}" for dim, x in zip(DIMS, score.tolist()))


# ---- codecs: between pixels and latents, prompts and embeddings ----

WAN_FPS, WAN_TEXT_LEN = 16, 512


class ShapesCodec:
    """Shapes world needs no autoencoder: its latents are pixels, its text encoder a table of words."""
    fps = FPS

    def latent_shape(self, frames, size):
        return 3, frames, *size

    def embed(self, prompts):
        """Text (n, TEXT_LEN, text_dim); the empty prompt is all zeros."""
        return embed_text(prompts)

    def decode(self, latents):
        """Videos (n, 3, T, H, W) in [-1, 1] on the CPU."""
        return latents.clamp(-1, 1).cpu()


class WanCodec:
    """The VAE and UMT5 text encoder of a Wan 2.1 folder or hub repository in diffusers' layout; each is loaded when
    it is needed and never both.
    """
    fps = WAN_FPS

    def __init__(self, path, device="cpu"):
        self.device, self.loaded_vae = device, None
        with user_errors():
            self.folder = fetch(path, ["vae/*", "text_encoder/*", "tokenizer/*"])
            missing = [name for name in ("vae", "text_encoder", "tokenizer") if not (self.folder / name).is_dir()]
            if missing:
                fail(f"{path} holds no {', '.join(missing)}: take a folder or hub repository in diffusers' layout "
                     "(Wan-AI/Wan2.1-T2V-1.3B-Diffusers, for example)")
            self.config = read_json(self.folder / "vae" / "config.json")

    def embed(self, prompts):
        """Text (n, 512, text_dim) fp32 on the CPU, with zeros after the last token as in official Wan."""
        return pad_text(self.embed_rows(prompts))

    @torch.no_grad()
    def embed_rows(self, prompts, batch=8):
        """[(S, text_dim)] fp32 on the CPU, S the prompt's own length; prompts are cleaned as diffusers' WanPipeline
        does. The encoder leaves memory before this returns.
        """
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean
        from transformers import AutoTokenizer, UMT5EncoderModel
        self.loaded_vae = None
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        dtype = torch.bfloat16 if self.device != "cpu" else torch.float32
        encoder = UMT5EncoderModel.from_pretrained(self.folder / "text_encoder", dtype=dtype).to(self.device).eval()
        rows = []
        for i in tqdm(range(0, len(prompts), batch), desc="prompts", leave=False):
            words = tokenizer([prompt_clean(p) for p in prompts[i:i + batch]], padding="max_length", truncation=True,
                              max_length=WAN_TEXT_LEN, return_tensors="pt").to(self.device)
            states = encoder(words.input_ids, words.attention_mask).last_hidden_state.float().cpu()
            rows += [row[:n].clone() for row, n in zip(states, words.attention_mask.sum(1).tolist())]
        del encoder
        torch.cuda.empty_cache()
        return rows

    def latent_shape(self, frames, size):
        time, space = self.config.get("scale_factor_temporal") or 4, self.config.get("scale_factor_spatial") or 8
        return self.config.get("z_dim", 16), (frames - 1) // time + 1, size[0] // space, size[1] // space

    def vae(self):
        """(autoencoder, mean, std): the statistics (1, C, 1, 1, 1) that its latents are normalised with."""
        if self.loaded_vae is None:
            from diffusers import AutoencoderKLWan
            vae = AutoencoderKLWan.from_pretrained(self.folder / "vae", torch_dtype=torch.float32)
            stats = [torch.tensor(x, device=self.device).view(1, -1, 1, 1, 1)
                     for x in (vae.config.latents_mean, vae.config.latents_std)]
            self.loaded_vae = vae.to(self.device).eval().requires_grad_(False), *stats
        return self.loaded_vae

    @torch.no_grad()
    def encode(self, video):
        """Latents (B, C, T', H', W') of pixels (B, 3, T, H, W) in [-1, 1]: the posterior's mode, normalised."""
        vae, mean, std = self.vae()
        return (vae.encode(video.to(self.device)).latent_dist.mode() - mean) / std

    @torch.no_grad()
    def decode(self, latents):
        """Videos (n, 3, T, H, W) in [-1, 1] on the CPU, one at a time."""
        vae, mean, std = self.vae()
        return torch.cat([vae.decode(x[None].to(self.device) * std + mean).sample.clamp(-1, 1).cpu() for x in latents])


def pad_text(rows):
    """Embeddings [(S, text_dim)] as one fp32 tensor (n, 512, text_dim) with zeros after the last token."""
    return torch.stack([F.pad(row.float(), (0, 0, 0, WAN_TEXT_LEN - len(row))) for row in rows])


def clip_frames(path, frames):
    """Indices (frames,) of the frames of a video file that stand at multiples of 1/16 second.

    ValueError names a file that is no video or lasts less than (frames - 1) / 16 seconds.
    """
    count, fps, _, _ = video_info(path)
    if count / fps < (frames - 1) / WAN_FPS:
        raise ValueError(f"{path} lasts {count / fps:.2f} s, too short for {frames} frames at {WAN_FPS} per second")
    return (np.arange(frames) * fps / WAN_FPS).round().astype(int).clip(max=count - 1)


def read_clip(path, frames, size):
    """Pixels (3, frames, H, W) in [-1, 1] of a video file: at 16 frames per second, scaled to cover size = (H, W),
    centre-cropped. ValueError names a file that cannot be used.
    """
    wanted, places = np.unique(clip_frames(path, frames), return_inverse=True)
    x = torch.from_numpy(read_video(path, wanted)[0][places]).permute(0, 3, 1, 2).float()      # (T, 3, H, W)
    (h, w), (H, W) = x.shape[2:], size
    scale = max(H / h, W / w)
    h, w = max(H, round(h * scale)), max(W, round(w * scale))
    x = F.interpolate(x, (h, w), mode="bicubic", antialias=True).clamp(0, 255)
    top, left = (h - H) // 2, (w - W) // 2
    return to_float(x[:, :, top:top + H, left:left + W]).transpose(0, 1)


# ---- the latent cache ----

def load_cached(file):
    """The one tensor of a file of the cache."""
    from safetensors.torch import load_file
    return load_file(file)["x"]


def is_cached(file):
    """Whether the file is there and whole: safetensors' header knows how long it must be."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


def save_cached(x, file):
    """Write one tensor in bf16, to a temporary name and then renamed."""
    from safetensors.torch import save
    Path(f"{file}.tmp").write_bytes(save({"x": x.to(torch.bfloat16).contiguous()}))
    os.replace(f"{file}.tmp", file)


def fingerprint(path, *settings):
    """A name for a file's content under some settings: its size, its first and last 1 MiB, and the settings."""
    size, edge = os.path.getsize(path), 2**20
    with open(path, "rb") as file:
        ends = file.read(edge)
        file.seek(max(size - edge, 0))
        ends += file.read()
    return hashlib.sha256(ends + json.dumps([size, *settings]).encode()).hexdigest()[:32]


def encode(pairs, codec, cache, frames, size, skip_bad=False):
    """The pairs with .files in the folder cache: every distinct video and prompt is encoded once, in bf16.

    What is there from another run is used; each file appears whole or not at all, so an interrupted encode goes on
    where it stopped. All videos are opened before the encoder is loaded. A bad one ends in one line that names its
    row and exit status 2, or with skip_bad its pairs are left out and counted.
    """
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    parts = {part: [fingerprint(file) for file in sorted((codec.folder / part).iterdir()) if file.is_file()]
             for part in ("vae", "text_encoder", "tokenizer")}
    bad, videos = {}, {}                                                        # by path: the error; (file, line)

    def attempt(path, line, function):
        try:
            return function()
        except ValueError as e:
            if not skip_bad:
                fail(f"row {line}: {e}; mend it, or leave such pairs out with --skip_bad")
            bad[path] = e

    for line, pair in zip(pairs.lines, pairs.paths):
        for path in pair:
            if path not in videos and path not in bad:
                name = attempt(path, line, lambda: fingerprint(path, frames, size, parts["vae"]))
                videos[path] = cache / f"video-{name}.safetensors", line
    todo = {path: x for path, x in videos.items() if not is_cached(x[0])}
    for path, (_, line) in todo.items():
        attempt(path, line, lambda: clip_frames(path, frames))
    names = [parts["text_encoder"], parts["tokenizer"]]
    texts = {p: cache / f"text-{hashlib.sha256(json.dumps([p, names]).encode()).hexdigest()[:32]}.safetensors"
             for p in dict.fromkeys(pairs.prompts)}
    todo_text = [p for p, file in texts.items() if not is_cached(file)]
    todo, todo_text = gather((todo, todo_text))[0]                              # the same list for all ranks
    print(f"{cache}: {len(videos) - len(todo)} of {len(videos)} videos and {len(texts) - len(todo_text)} of "
          f"{len(texts)} prompts are there; encoding the rest")
    mine = todo_text[RANK::WORLD]
    for i in range(0, len(mine), 1024):
        for p, x in zip(mine[i:i + 1024], codec.embed_rows(mine[i:i + 1024])):
            save_cached(x, texts[p])
    for path, (file, line) in tqdm(list(todo.items())[RANK::WORLD], desc="videos"):
        if path not in bad:
            clip = attempt(path, line, lambda: read_clip(path, frames, size))
            if clip is not None:
                save_cached(codec.encode(clip[None])[0], file)
    codec.loaded_vae = None
    torch.cuda.empty_cache()
    bad = {path: e for errors in gather(bad) for path, e in errors.items()}
    good = [i for i, pair in enumerate(pairs.paths) if not bad.keys() & set(pair)]
    if bad:
        first = next(iter(bad.values()))
        print(f"skipped {len(pairs.paths) - len(good)} pairs with {len(bad)} bad videos, such as: {first}")
    if not good:
        fail("no pair is left: every one has a video that cannot be used")
    pairs = pairs.subset(good)
    pairs.files = [(videos[a][0], videos[b][0], texts[p]) for (a, b), p in zip(pairs.paths, pairs.prompts)]
    return pairs


# ---- the script ----

@dataclass
class Args:
    """`python data.py encode`: fill the latent cache that train_align.py and train_reward.py read."""
    model: str                              # Wan 2.1 folder or hub repository in diffusers' layout
    pairs: str                              # CSV or JSONL of preference pairs
    frames: int = 81                        # of each video, at 16 per second; 4k + 1
    size: tuple = (480, 832)                # height and width, multiples of 16
    cache: str = "runs/cache"               # folder of the latents
    skip_bad: bool = False                  # leave out pairs whose videos cannot be used


def check_clip_args(args):
    """Refuse --frames and --size that Wan's autoencoder and patches do not divide."""
    if args.frames < 1 or args.frames % 4 != 1:
        fail(f"--frames {args.frames}: Wan's autoencoder takes 4k + 1 frames, such as 81, 33 or 1")
    if len(args.size) != 2 or any(x <= 0 or x % 16 for x in args.size):
        fail(f"--size {','.join(map(str, args.size))}: give height and width, multiples of 16, such as 480,832")


def fill_cache(args):
    """Encode all that a pairs file names."""
    start_ranks()
    check_clip_args(args)
    check_out(args.cache)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encode(read_pairs(args.pairs), WanCodec(args.model, device), args.cache, args.frames, args.size, args.skip_bad)


def shapes_sheet(path):
    """Draw the twelve renderers, and the same prompts without flaws, with their oracle scores."""
    prompts = PROMPTS[::6]                                                      # 12 of them, one for each renderer
    bad = render_as(torch.arange(len(RENDERERS)), prompts, rng(0)).float()
    good = clean_videos(prompts)
    cells = [(RENDERERS, bad, oracle(bad, prompts)), (["flawless"] * len(prompts), good, oracle(good, prompts))]
    contact_sheet(path, list(zip(*[[(f"{name}: {prompt}  {caption_of(score)}", video)
                                    for name, prompt, video, score in zip(names, prompts, videos, scores)]
                                   for names, videos, scores in cells])))


if __name__ == "__main__":
    if sys.argv[1:2] == ["encode"]:
        launch(fill_cache, Args, Args.__doc__, sys.argv[2:])
    elif sys.argv[1:]:
        fail(f"unknown argument {sys.argv[1]}: python data.py draws shapes.png, python data.py encode fills the cache")
    else:
        shapes_sheet("shapes.png")
        print("wrote shapes.png: the twelve renderers, and the same prompts without flaws, with their oracle scores")
