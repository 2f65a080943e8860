"""Everything between files and tensors: Shapes world, preference pairs, videos, the two worlds, runs.

    python data.py                      shapes.webp: good and bad videos of Shapes world, with oracle scores
    python data.py label pairs.csv      a page on which a person says which of two videos is better

Shapes world is a world small enough for two CPU cores in which the true quality of a video is known exactly:
one soft-edged shape on a dark ground, 6 colours x 3 shapes x 4 directions, twelve renderers with different
flaws in the place of twelve text-to-video models, and an oracle that measures VQ, MQ and TA from the pixels
alone. Pixels are (B, 3, T, H, W) in [-1, 1]; files hold uint8 (T, H, W, 3).
"""
import argparse
import csv
import filecmp
import hashlib
import inspect
import io
import json
import math
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import lru_cache, partial, wraps
from itertools import chain, count, pairwise
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as state_dicts
import torch.nn.functional as F
from tqdm import tqdm

from model import (HERE, PRESETS, UserError, check_pointer, fetch, find, read_config, read_json, read_tensors,
                   write_whole)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DIMS = ("VQ", "MQ", "TA")    # visual quality, motion quality, text alignment: the columns of every r (B, 3)


def overall(r, dim_w=(1, 1, 1)):
    """The scalar reward (...): weighted mean of normalised scores r (..., 3) over the dimensions. Sec. 5.2.
    """
    dim_w = torch.tensor(dim_w, dtype=r.dtype, device=r.device)
    return (r * dim_w).sum(-1) / dim_w.abs().sum()


def check_dim_w(dim_w):
    """UserError where these are no weights of the dimensions."""
    if len(dim_w) != len(DIMS) or not any(dim_w):
        raise UserError(f"--dim_w {as_word(dim_w)}: give 3 numbers, not all 0, for {', '.join(DIMS)}")


def with_overall(r):
    """Normalised scores r (..., 3) and their mean, Overall: (..., 4)."""
    return torch.cat([r, overall(r)[..., None]], dim=-1)


# ---- Shapes world: prompts and text ----

FRAMES, SIZE, FPS = 8, 24, 8
GROUND, GREY = 0.06, 0.45               # the dark ground, and what a washed-out colour fades to, in [0, 1]
COLOURS = {"red": (1, .1, .1), "yellow": (1, 1, .1), "green": (.1, 1, .1),
           "cyan": (.1, 1, 1), "blue": (.1, .1, 1), "purple": (1, .1, 1)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}   # (x, y), y downwards
PROMPTS = [f"a {c} {s} moving {d}" for c in COLOURS for s in SHAPES for d in DIRECTIONS]
TEXT_LEN, TEXT_DIM = 8, 32         # word slots, zero after the last word as Wan pads its prompts; their width


def attributes(prompts):
    """(colour, shape, direction) of each prompt as indices (B, 3). UserError names a prompt outside the
    world.
    """
    rows = []
    for prompt in prompts:
        words = prompt.lower().split()
        row = [[i for i, name in enumerate(kind) if name in words] for kind in (COLOURS, SHAPES, DIRECTIONS)]
        if any(len(found) != 1 for found in row):
            raise UserError(f"'{prompt}' is not a prompt of Shapes world; write one like '{PROMPTS[0]}'")
        rows.append([found[0] for found in row])
    return torch.tensor(rows)


def split_of(prompt):
    """'eval' for 18 of the 72 combinations, 'val' for 9, 'train' for 45: spread evenly over their parts."""
    c, s, d = attributes([prompt])[0].tolist()
    return {0: "eval", 4: "eval", 2: "val"}.get((c + 2 * s + 3 * d) % 8, "train")


def prompts_of(split, n=None):
    """The prompts of a split; with n, that many of them in turn."""
    names = [p for p in PROMPTS if split_of(p) == split]
    return [names[i % len(names)] for i in range(len(names) if n is None else n)]


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
EDGES = torch.tensor([1.0, 3.0, 5.5, 8.0], dtype=torch.float64)     # px from full to none: 1 is sharp
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
    """Videos (B, 3, T, H, W) in [-1, 1], float64, of wanted attributes (B, 3) with defects (B, 8); g:
    generator.
    """
    B = len(wanted)

    def uniform(*shape):
        return torch.rand(B, *shape, generator=g, dtype=torch.float64)
    blur, wash, jitter, stutter, teleport = (defects[:, i].double() for i in range(5))
    sizes = torch.tensor([len(COLOURS), len(SHAPES), len(DIRECTIONS)])
    other = (wanted + 1 + (uniform(3) * (sizes - 1)).long()) % sizes            # never the wanted one
    colour, shape, direction = torch.where(uniform(3) < defects[:, 5:], other, wanted).T

    # where: constant velocity through a point near the middle, then the flaws of motion
    speed = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float64)[direction]
    speed = speed * (1.0 + 0.5 * uniform(1))                                    # (B, 2), px / frame
    middle = (SIZE - 1) / 2 + (uniform(2) - 0.5) * (10 - 7 * speed.abs().sign())  # +-1.5 px along, +-5 across
    clock = torch.arange(FRAMES, dtype=torch.float64).repeat(B, 1)
    held = uniform(FRAMES) < 0.6 * stutter[:, None]
    for f in range(1, FRAMES):                                                 # a held frame repeats the last
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
    """n videos of random renderers, (n, 3, T, H, W) in [-1, 1], and their prompts; split None is every
    prompt.
    """
    names = PROMPTS if split is None else prompts_of(split)
    prompts = [names[i] for i in torch.randint(len(names), (n,), generator=g)]
    who = torch.randint(len(RENDERERS), (n,), generator=g)
    return render_as(who, prompts, g), prompts


def render_as(who, prompts, g):
    """Videos of prompts by the renderers who (B,); each strength is drawn between half and all of its value.
    """
    defects = torch.tensor(list(RENDERERS.values()), dtype=torch.float64)[who]
    defects[:, :5] *= 0.5 + 0.5 * torch.rand(len(who), 5, generator=g, dtype=torch.float64)
    return render(attributes(prompts), defects, g)


def clean_videos(prompts, g=None):
    """A flawless video (n, 3, T, H, W) in [-1, 1], fp32, of each prompt; without a generator always the
    same.
    """
    return render(attributes(prompts), torch.zeros(len(prompts), 8), g or rng("clean")).float()


# ---- Shapes world: the oracle ----

ORACLE_STD = (0.166, 0.272, 0.218)    # of VQ, MQ, TA over the flawed mixture: what Overall divides by


def oracle(video, prompts):
    """The true VQ, MQ and TA in [0, 1], (B, 3) fp32, measured from the pixels (B, 3, T, H, W) in [-1, 1] and
    the prompt alone.

    Each frame is compared with every shape of the world drawn where its light is: 3 shapes, 6 radii, 4 edge
    widths.
      presence  share of the frame's energy that the best of them explains (0 for nothing, near 0 for noise)
      VQ        exp(-4 R), R the energy of the difference to the nearest flawless frame, over that frame's own
      MQ        presence * smooth * moving * steady: a constant-velocity path, at speed, equal frames
      TA        presence * (colour + shape + direction) / 3, each the degree to which it is the prompted one
    """
    eights = range(0, len(video), 8)                                            # which stay in a CPU's cache
    return torch.cat([_oracle(video[i:i + 8], prompts[i:i + 8]) for i in eights]).float()


def _oracle(video, prompts):
    light = (video.clamp(-1, 1).transpose(1, 2) + 1) / 2 - GROUND               # (B, T, 3, H, W), 0 is ground
    energy = light.square().sum(2)                                                         # (B, T, H, W)
    total = energy.sum((2, 3)) + 1e-6                                                      # (B, T)
    grid = torch.arange(SIZE, dtype=video.dtype, device=video.device)
    weight = energy
    for _ in range(3):                                                         # centre of light, then near it
        mass = weight.sum((2, 3)) + 1e-6
        centre = torch.stack([(weight.sum(axis) * grid).sum(2) / mass for axis in (2, 3)], dim=-1)
        x, y = centre[..., :1], centre[..., 1:]                                            # (B, T, 1) each
        far = (grid - x).square()[..., None, :] + (grid - y).square()[..., :, None]
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

    def pick(y, i):
        return y.gather(2, i[..., None, None].expand(-1, -1, 1, y.shape[-1]))[:, :, 0]
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
    three decimals. It stands in the metadata of all weights trained on this world.
    """
    video, prompts = flawed_videos(8, None, rng(0))
    facts = [PROMPTS, [split_of(p) for p in PROMPTS], ORACLE_STD] + [
        (1000 * x).round().int().tolist() for x in (embed_text(PROMPTS[:1]), video, _oracle(video, prompts))]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def check_world(metadata, path):
    """Refuse weights that were trained on another Shapes world than this file's."""
    found = metadata.get("world")
    if found != world_hash():
        raise UserError(f"{path} is of another Shapes world ({found}, here {world_hash()}): train it again")


# ---- Shapes world: annotators and preference pairs ----

SHARPNESS = (1.5, 1.5, 1.5, 2.5)      # logits per standard deviation of the oracle, for VQ, MQ, TA, Overall


def normalised(score):
    """Oracle scores (..., 3) in units of their standard deviation on the flawed mixture."""
    return score / torch.tensor(ORACLE_STD)


def annotate(score_a, score_b, g, noise=1.0):
    """Human labels (B, 4) for VQ, MQ, TA, Overall: +1 A, 0 same, -1 B, drawn from the oracle's margins by
    Rao-Kupper; with noise 1, 40 to 60 % are ties.

    score_a, score_b: oracle scores (B, 3); g: generator; noise divides the sharpness.
    """
    d = with_overall(normalised(score_a)) - with_overall(normalised(score_b))
    d = d * torch.tensor(SHARPNESS) / noise
    u, log_tie = torch.rand(d.shape, generator=g), np.log(5)
    return (u < torch.sigmoid(d - log_tie)).float() - (u > 1 - torch.sigmoid(-d - log_tie)).float()


def likert(score, g, noise=1.0):
    """An annotator's points for oracle scores (..., 3): 1 to 5 in whole points, with half a point of noise,
    or noise times that.
    """
    return (1 + 4 * score + 0.5 * noise * torch.randn(score.shape, generator=g)).round().clamp(1, 5)


@dataclass
class Pairs:
    """n preference pairs: two videos of each prompt, A first.

    videos: an array (n, 2) of the paths of files, or uint8 (n, 2, 3, T, H, W) of those in memory. label
    (n, 4): VQ, MQ, TA, Overall as +1 A, 0 same, -1 B, nan unlabelled; mos (n, 2, 3): Likert points of A and
    B, nan where there are none. lines: where each pair stands in its file, or its number.
    """
    prompts: list
    videos: typing.Any
    label: torch.Tensor
    mos: torch.Tensor
    lines: list

    def __len__(self):
        return len(self.prompts)

    def subset(self, rows):
        """The Pairs of these rows, a list."""
        def pick(x):
            return [x[i] for i in rows] if isinstance(x, list) else x[rows]
        return Pairs(**{f.name: pick(getattr(self, f.name)) for f in fields(self)})

    def winner_first(self, order):
        """The Pairs with A and B of each in this order (n, 2) of 0 and 1."""
        rows, turn = np.arange(len(self))[:, None], order.numpy()
        label = self.label * (1 - 2 * order[:, :1])                          # the other way round where B won
        return Pairs(self.prompts, self.videos[rows, turn], label, self.mos[rows, turn], self.lines)


def toy_pairs(n, split, seed, noise=1.0, labelled=True):
    """n Pairs of Shapes world for the prompts of a split, A and B by two different renderers, labelled by
    annotators of this noise. Unlabelled they cost a quarter of the time.
    """
    g = rng("pairs", split, seed)
    names = prompts_of(split)
    prompts = [names[i] for i in torch.randint(len(names), (n,), generator=g)]
    a = torch.randint(len(RENDERERS), (n,), generator=g)
    b = (a + torch.randint(1, len(RENDERERS), (n,), generator=g)) % len(RENDERERS)
    chunks = [slice(i, i + 256) for i in range(0, n, 256)]
    videos = torch.stack([torch.cat([to_uint8(render_as(who[chunk], prompts[chunk], g)) for chunk in chunks])
                          for who in (a, b)], dim=1)
    unknown = torch.full((n, 4), torch.nan), torch.full((n, 2, 3), torch.nan)
    pairs = Pairs(prompts, videos, *unknown, lines=list(range(n)))
    if labelled:
        score = true_scores(pairs)
        pairs.label, pairs.mos = annotate(score[:, 0], score[:, 1], g, noise), likert(score, g, noise)
    return pairs


def true_scores(pairs):
    """The oracle's scores (n, 2, 3) of A and B of Pairs in memory."""
    return torch.stack([oracle(to_float(pairs.videos[:, k]), pairs.prompts) for k in (0, 1)], dim=1)


# ---- preference pairs from files ----

# The layouts that are understood: the columns of prompt, A, B, and {dimension: the column that says which one
# won it}; "a" is no column: A always did.
LAYOUTS = (
    ("prompt", "path_A", "path_B", {x: x for x in (*DIMS, "Overall")}),     # VideoAlign, VideoGen-RewardBench
    ("prompt", "left_video", "right_video", {"Overall": "vote_type"}),      # GenAI-Bench
    ("prompt", "chosen", "rejected", {"Overall": "a"}),
)
LABELS = {"a": 1, "leftvote": 1, "b": -1, "rightvote": -1, "same": 0, "tievote": 0, "bothbad_vote": 0,
          "": math.nan, "nan": math.nan, "none": math.nan, "invalid": math.nan}


def read_table(path):
    """[(line, {column: value})] of a file in UTF-8: a CSV with a header and any separator, a JSON list of
    rows, or JSON lines; a .txt has one prompt a line. A row that is a text alone is a prompt. UserError names
    a bad row.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        if path.suffix.lower() == ".txt":
            rows = lines
        elif text.lstrip()[:1] == "[":
            rows = [*enumerate(json.loads(text), 1)]
        elif text.lstrip()[:1] == "{":
            rows = [(n, json.loads(line)) for n, line in lines]
        else:
            return read_csv(text)
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}): save it as CSV or JSON lines") from None
    except (ValueError, RecursionError, csv.Error) as e:
        raise UserError(f"{path} is no CSV, JSON list of rows (not under a key) or JSON lines: {e}") from None
    rows = [(n, {"prompt": row} if isinstance(row, str) else row) for n, row in rows]
    if not all(isinstance(row, dict) for _, row in rows):
        raise UserError(f"{path} must hold one JSON object per row, with its columns as keys")
    return rows


def read_csv(text):
    """The rows of read_table of a CSV. ValueError names a bad row."""
    csv.field_size_limit(2**30)
    separator = max(",;\t|", key=text.partition("\n")[0].count)
    reader, rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True), []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"row {reader.line_num} has more or fewer fields than the header: texts with "
                             f"the separator {separator!r} must stand in quotes")
        rows.append((reader.line_num, row))
    return rows


def text_of(path, line, row, column):
    """The text in a row's column, "" where there is none. UserError where it is something else."""
    value = row.get(column)
    if value is None or value != value:                                         # JSON's null and NaN
        return ""
    value = str(value) if type(value) in (int, float) else value
    if not isinstance(value, str) or any("\ud800" <= x <= "\udfff" for x in value):     # half an emoji
        raise UserError(f"{path}, row {line}: {column} is {json.dumps(value)[:40]} and must be a text")
    return value.strip()


def read_pairs(path, skip_bad=False, labelled=True):
    """Pairs of a file in one of LAYOUTS; video paths are relative to the file, with / or Windows' \\.

    Labels are A, B or same in any case, or another of LABELS; MOS_A_VQ .. MOS_B_TA, where they stand, are
    Likert points from 1 to 5. UserError names a missing column, and the first row with a missing prompt, a
    word that is no label or, without skip_bad, a missing video. labelled: whether there must be labels.
    """
    table, folder = read_table(path), Path(path).parent
    if not table:
        raise UserError(f"{path} holds no pairs: give it a header and one row per pair")
    columns = set().union(*(row for _, row in table))
    fitting = [x for x in LAYOUTS if columns.issuperset(x[:3])
               and (not labelled or "a" in x[3].values() or columns.intersection(x[3].values()))]
    if not fitting:
        raise UserError(f"{path} has the columns {', '.join(sorted(map(str, columns)))}: wanted are prompt, "
                        "chosen, rejected, or path_A, path_B, prompt and one of VQ, MQ, TA, Overall")
    *names, won = fitting[0]
    prompts, videos, label, mos = [], [], [], []
    for line, row in table:
        cell, where = partial(text_of, path, line, row), f"{path}, row {line}"
        prompt, *files = map(cell, names)
        files = [folder / (x if os.path.isfile(folder / x) else x.replace("\\", "/")) for x in files]
        words = {dim: column if column == "a" else cell(column).lower() for dim, column in won.items()}
        points = [[number(cell(f"MOS_{side}_{dim}")) for dim in DIMS] for side in "AB"]
        missing = [file for file in files if not os.path.isfile(file)]
        if not prompt:
            raise UserError(f"{where} has no prompt")
        if missing and not skip_bad:
            raise UserError(f"{where}: {missing[0]} is no file; paths are relative to the folder of {path}")
        for dim, word in words.items():
            if word not in LABELS:
                raise UserError(f"{where}: {dim} is {word[:20]!r}: write A, B, same, or nothing")
        if any(x < 1 or x > 5 for x in chain(*points)):
            raise UserError(f"{where} has points off the scale of 1 to 5: map 0 to 100 by 1 + 4 x / 100")
        prompts.append(prompt)
        videos.append(files)
        label.append([LABELS[words.get(dim, "")] for dim in (*DIMS, "Overall")])
        mos.append(points)
    return Pairs(prompts, np.array(videos), torch.tensor(label), torch.tensor(mos), [n for n, _ in table])


def number(text):
    """The number in a cell, nan where there is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def report_pairs(pairs, held_out=()):
    """Print what a set of pairs is made of: how many of its prompts are among the held_out ones, how many
    pairs occur more than once, and the labels and ties of each dimension.
    """
    names = [[v if isinstance(v, Path) else hash(v.numpy().tobytes()) for v in pair] for pair in pairs.videos]
    prompts, videos = set(pairs.prompts), {video for pair in names for video in pair}
    shared = f", {len(prompts & set(held_out))} of which are evaluated on too" if held_out else ""
    print(f"{len(pairs)} pairs of {len(videos)} videos and {len(prompts)} prompts" + shared)
    times = Counter((prompt, *sorted(pair)) for prompt, pair in zip(pairs.prompts, names))
    repeated = sum(n > 1 for n in times.values())
    if repeated:
        print(f"{repeated} pairs occur more than once")
    for name, column in zip((*DIMS, "Overall"), pairs.label.T):
        label = column[~column.isnan()]
        if len(label):
            a, b, ties = ((label == x).float().mean() for x in (1, -1, 0))
            print(f"{name}: {len(label) / len(pairs):.0%} labelled; A {a:.0%}, B {b:.0%}, ties {ties:.0%}")


# ---- video files and pictures ----

def to_uint8(video):
    """[-1, 1] to 0..255."""
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(video):
    """0..255 to [-1, 1], fp32."""
    return video.float() / 127.5 - 1


@contextmanager
def open_video(path):
    """(PyAV's container, its best video stream: not a cover picture). UserError names a file that is no
    video.
    """
    import av
    check_pointer(path)
    try:
        with av.open(os.path.abspath(path)) as container:                 # a name with a colon is no URL then
            stream = container.streams.best("video")
            if stream is None or not (stream.average_rate or stream.guessed_rate):
                raise UserError(f"{path} has no video in it, or no frame rate")
            yield container, stream
    except (av.FFmpegError, OSError, AttributeError) as e:              # a stream without a codec has no size
        raise UserError(f"{path} cannot be read as a video: {e}") from None


def upright(frame, stream):
    """A decoded frame as players show it, uint8 (H, W, 3): with square pixels, and turned as its file
    says.
    """
    if max(frame.height, frame.width) > 8192:
        raise UserError(f"{stream.container.name} is {frame.width} x {frame.height}: more than 8192 a side")
    shape = float(stream.sample_aspect_ratio or 1)
    frame = frame.reformat(width=round(frame.width * shape) if shape > 0 else None, format="rgb24")
    return np.rot90(frame.to_ndarray(), round(frame.rotation / 90)) if frame.rotation else frame.to_ndarray()


def video_times(path):
    """(times (n,) in seconds at which a video's frames come on screen, from 0; when the last one ends; frames
    per second; height; width). One frame is decoded. UserError names a file that is no video.
    """
    first, stamps = None, []
    with open_video(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                stamps.append(packet.pts)
            if first is None:
                first = next((upright(frame, stream) for frame in packet.decode()), None)
        if first is None:
            raise UserError(f"{path} is cut short or damaged: no frame can be decoded")
        fps, n = float(stream.average_rate or stream.guessed_rate), len(stamps)
        times = np.arange(n) / fps if None in stamps else np.sort(stamps) * float(stream.time_base)
    times = times - times[0]
    if n > 1 and abs(times[-1] * fps - (n - 1)) > 1:                            # the file tells another rate
        fps = (n - 1) / times[-1]
    return times, times[-1] + 1 / fps, fps, *first.shape[:2]


def video_info(path):
    """(frames, fps, height, width) of a video file, as it is shown. UserError names a file that is no
    video.
    """
    times, _, *rest = video_times(path)
    return len(times), *rest


def decode(path, indices=None):
    """Yield the frames of a video file, uint8 (H, W, 3), as they are shown; indices: those that are wanted,
    ascending (all of them if None). Decoding stops after the last one.

    UserError names a file that cannot be read, has too few frames or changes its size on the way.
    """
    import av
    wanted, n, size = None if indices is None else {int(i) for i in indices}, 0, None
    with open_video(path) as (container, stream), suppress(av.FFmpegError):
        stream.thread_type = "AUTO"
        for n, frame in enumerate(container.decode(stream), 1):
            if wanted is None or n - 1 in wanted:
                frame = upright(frame, stream)
                if size not in (None, frame.shape):
                    raise UserError(f"{path} changes its size on the way")
                size = frame.shape
                yield frame
            if wanted is not None and n > max(wanted):
                return
        if wanted is None and n:
            return                                                              # this is its regular end
    raise UserError(f"{path} is cut short or damaged: {n} of {video_info(path)[0]} frames can be decoded")


def read_video(path, indices=None):
    """(frames, fps): uint8 (T, H, W, 3), as they are shown, and the frame rate; indices: see decode, but one
    may come twice.
    """
    frames = np.stack([*decode(path, indices)])
    places = slice(None) if indices is None else np.unique(indices, return_inverse=True)[1]
    return frames[places], video_info(path)[1]


def write_video(path, video, fps, zoom=1):
    """Write an mp4 (H.264) from a video (3, T, H, W) in [-1, 1] or uint8 frames (T, H, W, 3), even in H and
    W; it appears whole or not at all.
    """
    import av
    if torch.is_tensor(video):
        video = video if video.dtype == torch.uint8 else to_uint8(video).permute(1, 2, 3, 0)
        video = video.cpu().numpy()
    video = video.repeat(zoom, axis=1).repeat(zoom, axis=2)
    T, H, W, _ = video.shape
    assert H % 2 == 0 and W % 2 == 0, f"H.264 needs even sides, not {H} x {W}"
    with av.open(f"{path}.tmp", "w", format="mp4") as container:
        options = {"crf": "12", "mbtree": "0"}                        # with mbtree the bytes depend on chance
        stream = container.add_stream("libx264", rate=int(round(fps)), options=options)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        for frame in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    os.replace(f"{path}.tmp", path)


def thumbnails(video, height=132, n=16):
    """At most n frames of a video (3, T, H, W) in [-1, 1], evenly spaced, as pictures of this height."""
    from PIL import Image
    some = np.linspace(0, video.shape[1] - 1, min(n, video.shape[1])).round().astype(int)
    frames = to_uint8(video[:, some]).permute(1, 2, 3, 0).cpu().numpy()                    # (T, H, W, 3)
    size = round(video.shape[3] * height / video.shape[2]), height
    sharp = Image.NEAREST if video.shape[2] < height else Image.LANCZOS
    return [Image.fromarray(frame).resize(size, sharp) for frame in frames]


def moving_sheet(path, tiles, seconds):
    """Write an animated WebP that plays tiles (title, videos as thumbnails, caption) for some seconds, again
    and again: the videos of a tile stand side by side, beginning together, under its title.
    """
    from PIL import Image, ImageDraw, ImageFont
    font, gap, line = ImageFont.load_default(12), 8, 18                                    # px
    w, h = tiles[0][1][0][0].size
    width = max(w, 132) * len(tiles[0][1]) + 2 * gap
    height, columns = h + 2 * line + gap, max(1, 900 // width)
    places = [(i % columns * width, i // columns * height) for i in range(len(tiles))]
    ground = Image.new("RGB", (min(columns, len(tiles)) * width, -(-len(tiles) // columns) * height), "white")
    pen = ImageDraw.Draw(ground)
    for (x, y), (title, _, caption) in zip(places, tiles):
        for text, top in ((title, y), (caption, y + line + h)):
            while font.getlength(text) > width - gap:
                text = text[:-3] + ".."
            pen.text((x, top + 2), text, fill="black", font=font)
    sheets = []
    for k in range(max(len(frames) for _, videos, _ in tiles for frames in videos)):
        sheets.append(ground.copy())
        for (x, y), (_, videos, _) in zip(places, tiles):
            for c, frames in enumerate(videos):
                sheets[-1].paste(frames[min(k, len(frames) - 1)], (x + c * (w + gap // 2), y + line))
    sheets[0].save(path, save_all=True, append_images=sheets[1:], loop=0, quality=80,
                   duration=int(1000 * seconds / len(sheets)))


def label_page(path, pairs, sides=("A", "B")):
    """Write an HTML page on which a person judges pairs [(prompt, A, B)] of video files in a browser, and
    saves a CSV that read_pairs reads; sides: what A and B are, for its count of wins.
    """
    def address(file):
        return quote(Path(os.path.relpath(Path(file).resolve(), path.resolve().parent)).as_posix())
    rows = [{"prompt": prompt, "videos": [address(file) for file in videos]} for prompt, *videos in pairs]
    files = [content_hash(file) for _, *videos in pairs for file in videos]  # drawn anew, judged anew
    page = json.dumps({"id": short_hash(rows, files), "sides": sides, "pairs": rows}).replace("<", "\\u003c")
    template = (HERE / "assets" / "label.html").read_text(encoding="utf-8")
    path.write_text(template.replace(">PAIRS<", f">{page}<"), encoding="utf-8")
    print(f"wrote {path}: open it in a browser to say which of {len(rows)} pairs' videos is better")


def caption_of(score):
    """'VQ 0.98  MQ 0.91  TA 0.66' from oracle scores (3,)."""
    return "  ".join(f"{dim} {x:.2f}" for dim, x in zip(DIMS, score.tolist()))


def markdown(head, rows):
    """A Markdown table from the cells of its head and of each row."""
    text = ["|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in [head, *rows]]
    return "\n".join([text[0], "|---" * len(head) + "|", *text[1:]])


# ---- the cache: tensors that are computed once, each named by what went into it ----

def content_hash(path):
    """A name for a file's content: a hash of all of it or, above 256 MiB, of its size and of 4,096 pages
    spread evenly.
    """
    with open(path, "rb") as file:
        size, page = os.fstat(file.fileno()).st_size, 4096
        if size <= 2**28:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
        digest = hashlib.sha256(str(size).encode())
        for place in range(page):
            file.seek(place * (size - page) // (page - 1))
            digest.update(file.read(page))
        return digest.hexdigest()[:32]


def known_hash(cache, path):
    """The content_hash of a file. The folder cache knows it by path, size and time of change, so that no
    video is read through a second time.
    """
    stat = os.stat(path)
    memory = Path(cache) / f"hash-{short_hash(os.path.realpath(path), stat.st_size, stat.st_mtime_ns)}"
    if not memory.exists():
        write_whole(memory, content_hash(path).encode())
    return memory.read_text()


def short_hash(*facts):
    """A name for some facts that JSON can hold."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def cached_file(cache, kind, *facts):
    """The file in the folder cache of a tensor of this kind that was made from these facts."""
    return Path(cache) / f"{kind}-{short_hash(*facts)}.safetensors"


def is_cached(file):
    """Whether the file is there: it appears whole or not at all."""
    return Path(file).is_file()


def save_cached(x, file):
    """Write one tensor, on whatever device it is."""
    from safetensors.torch import save
    write_whole(file, save({"x": x.cpu().contiguous()}))


def load_cached(file):
    """The one tensor of a file of the cache."""
    return read_tensors(file)[0]["x"]


# ---- the two worlds: what differs between Shapes world and Wan, behind one interface ----

class World:
    """What both worlds do alike."""
    boundary = None                                               # the time that parts two experts, if any

    def t_range(self, expert):
        """The times that an expert, high or low, is for; of a model without experts all. UserError where an
        expert must be named, or cannot be.
        """
        if bool(expert) != bool(self.boundary):
            raise UserError("Wan 2.2 A14B, and it alone, has two experts: give --expert, or leave it out")
        return {None: (0.0, 1.0), "high": (self.boundary, 1.0), "low": (0.0, self.boundary)}[expert]


class Shapes(World):
    """Shapes world: its latents are pixels, its text encoder a table of words, and its truth is known."""
    name, fps, zoom, text_len = "shapes", FPS, 8, TEXT_LEN                # zoom: 24 pixels are few to look at
    recipe, reward_inputs = "shapes", ("shapes",)                         # what a reward may read here
    prompts, check_prompts = staticmethod(prompts_of), staticmethod(attributes)   # of a split; refuses others
    embed, embed_rows, oracle = staticmethod(embed_text), staticmethod(embed_text), staticmethod(oracle)
    pad_text = staticmethod(torch.stack)

    @property
    def metadata(self):
        """What the weights trained on this world say of it."""
        return {"world": world_hash()}

    def read(self, args, labelled=True):
        """The Pairs of the file args.pairs, or args.n_pairs drawn ones. UserError names a bad row."""
        if not args.pairs:
            return toy_pairs(args.n_pairs, "train", args.seed, labelled=labelled)
        pairs = read_pairs(args.pairs, args.skip_bad)
        self.check_prompts(pairs.prompts)
        return without_twins(pairs)

    def encode(self, pairs, args):
        """The pairs with their videos in memory. UserError names a bad one, unless args.skip_bad."""
        if torch.is_tensor(pairs.videos):
            return pairs
        pairs, clips = look_into(pairs, args.skip_bad, lambda path: to_uint8(read_shapes(path)))
        pairs.videos = torch.stack([torch.stack([clips[path] for path in pair]) for pair in pairs.videos])
        return pairs

    def latents(self, pairs, rows):
        """x0 (len(rows), 2, 3, T, H, W) of A and B, fp32 in [-1, 1]."""
        return to_float(pairs.videos[rows])

    def text(self, pairs, rows):
        """Prompt embeddings (len(rows), TEXT_LEN, TEXT_DIM)."""
        return embed_text([pairs.prompts[i] for i in rows])

    def latent_shape(self, frames, size):
        """(C, T, H, W) of the latents of a video. UserError for another size than this world's."""
        if (frames, *size) != (FRAMES, SIZE, SIZE):
            raise UserError("--frames and --size are for Wan: videos of Shapes world have one size")
        return 3, frames, *size

    def decode(self, latents):
        """Videos (n, 3, T, H, W) in [-1, 1] on the CPU."""
        return latents.clamp(-1, 1).cpu()


def read_shapes(path):
    """Pixels (3, FRAMES, SIZE, SIZE) in [-1, 1] of a video file of Shapes world: frames taken evenly, pixels
    averaged down.
    """
    frames, _ = read_video(path)
    frames = frames[np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)]
    x = to_float(torch.from_numpy(frames)).permute(0, 3, 1, 2)                  # (T, 3, H, W)
    return F.interpolate(x, (SIZE, SIZE), mode="area").transpose(0, 1)


def look_into(pairs, skip_bad, look, use=lambda path, found: found):
    """(the pairs whose videos can all be used, {video: what use made of what look found in it}).

    look runs in a thread, one video ahead of use. Of several ranks each sees its share. UserError names the
    first bad video by its row; with skip_bad such pairs are left out and counted.
    """
    lines, bad, found = {}, {}, {}
    for line, pair in zip(pairs.lines, pairs.videos):
        for path in pair:
            lines.setdefault(path, line)
    mine = list(lines)[RANK::RANKS]
    for future, path in progress(zip(prefetch(look, mine), mine), "videos", total=len(mine)):
        try:
            found[path] = use(path, future.result())
        except (UserError, OSError) as e:
            bad[path] = f"row {lines[path]}: {e}"
            if not skip_bad:
                raise UserError(f"{bad[path]}; mend it, or leave such pairs out with --skip_bad") from None
    bad, found = merged(bad), merged(found)
    good = [i for i, pair in enumerate(pairs.videos) if not bad.keys() & set(pair)]
    if bad:
        such = next(iter(bad.values()))
        print(f"skipped {len(pairs) - len(good)} pairs with {len(bad)} bad videos, such as {such}")
    if not good:
        raise UserError("no pair is left: every one has a video that cannot be used")
    return pairs.subset(good), found


def prefetch(load, items):
    """A future of load(item) for each item in turn, the next one being loaded while this one is in use."""
    with ThreadPoolExecutor(1) as pool:
        futures = (pool.submit(load, item) for item in items)
        for future, _ in pairwise(chain(futures, [None])):                      # which is one ahead
            yield future


def without_twins(pairs):
    """The pairs but for those of a video with itself or its copy, which say nothing; they are counted."""
    twins = [a == b or os.path.isfile(a) and os.path.isfile(b) and filecmp.cmp(a, b, shallow=False)
             for a, b in pairs.videos]
    if any(twins):
        line = pairs.lines[twins.index(True)]
        print(f"left out {sum(twins)} pairs of a video with itself or its copy, such as row {line}")
    if all(twins):
        raise UserError("no pair is left: in each, both sides are the same video")
    return pairs.subset([i for i, same in enumerate(twins) if not same])


WAN_FPS, WAN_TEXT_LEN = 16, 512


class Wan(World):
    """The autoencoder and UMT5 text encoder of a Wan 2.1 or 2.2 folder or hub repository in diffusers'
    layout; each is loaded when it is needed and never both. What was encoded lies in a cache, and self.cached
    knows where. Which Wan it is, the folder's own files tell: recipe; fps; boundary, the time that parts the
    two experts of 2.2 A14B, else None.
    """
    name, zoom, text_len = "wan", 1, WAN_TEXT_LEN
    reward_inputs, metadata, oracle = ("wan", "files"), {}, None                # nobody knows the truth

    def __init__(self, path, device="cpu"):
        self.path, self.device, self.loaded_vae = path, device, None
        self.cached = {}                                                # {video or prompt: its cached file}
        names = "vae", "text_encoder", "tokenizer", "transformer"
        folder = fetch(path, ["model_index.json", *(f"{name}/*.json" for name in names)])
        for name in names[:3]:
            if not (folder / name).is_dir():
                raise UserError(f"{path} holds no {name}: take a Wan in diffusers' layout, such as "
                                "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
            for file in (folder / name).iterdir():
                check_pointer(file)                                             # they are loaded late
        self.config = read_json(folder / "vae/config.json")
        self.channels = self.config.get("z_dim", 16)
        index, dit = folder / "model_index.json", folder / "transformer/config.json"
        index = read_json(index) if index.exists() else {"_class_name": "WanPipeline"}
        if index.get("_class_name") != "WanPipeline":
            raise UserError(f"{path} is a {index.get('_class_name')}: only a WanPipeline is supported")
        large = dit.exists() and read_config(read_json(dit), dit).dim == PRESETS["wan-14b"].dim
        self.recipe, self.fps = "wan-14b" if large else "wan", WAN_FPS
        if (index.get("transformer_2") or [None])[0]:
            self.recipe, self.boundary = "wan-2.2-a14b", index.get("boundary_ratio")
            if not isinstance(self.boundary, float):
                raise UserError(f"{path}/model_index.json has a transformer_2 and no boundary_ratio")
        if index.get("expand_timesteps"):                              # of the time of each token, here equal
            self.recipe, self.fps = "wan-2.2-5b", 24

    def part(self, name):
        """The folder of one of the models, downloaded when it is needed."""
        return fetch(self.path, [f"{name}/*"]) / name

    def facts(self, *names):
        """What encodings by these models depend on: their files, and the device, where sums are rounded."""
        files = [file for name in names for file in sorted(self.part(name).iterdir()) if file.is_file()]
        return [self.device, *map(content_hash, files)]

    def read(self, args, labelled=True):
        """The Pairs of the file args.pairs whose videos are good: those not in the cache are looked into,
        before anything is loaded. UserError names a bad one by its row, unless args.skip_bad.
        """
        if not args.pairs:
            raise UserError(f"{args.model} has no pairs of its own: give a file by --pairs, such as "
                            "sample.py --n_per_prompt 4 --reward RUN writes")
        facts, small = self.facts("vae"), {}

        def look(path):
            content = known_hash(args.cache, path)
            file = cached_file(args.cache, "video", content, args.frames, args.size, facts)
            if not is_cached(file):
                _, seconds, _, *size = video_times(path)
                check_length(path, seconds, args.frames, self.fps)
                small[path] = share_kept(size, args.size) < 2 / 3
            return file
        pairs = without_twins(read_pairs(args.pairs, args.skip_bad))
        pairs, files = look_into(pairs, args.skip_bad, look)
        self.cached |= files
        small = merged(small)
        if any(small.values()):
            print(f"{sum(small.values())} of {len(small)} videos lose more than a third of the picture at "
                  f"--size {as_word(args.size)}; --size {as_word(args.size[::-1])} may suit them")
        return pairs

    def prompts(self, split, n=None):
        raise UserError("--eval and splits are of Shapes world: Wan takes --prompts FILE --against base")

    def check_prompts(self, prompts):
        """Wan knows every prompt."""

    def latents(self, pairs, rows):
        """x0 (len(rows), 2, C, T, H, W) of A and B, fp32, from the cache."""
        pair = [torch.stack([load_cached(self.cached[path]) for path in pairs.videos[i]]) for i in rows]
        return torch.stack(pair).float()

    def text(self, pairs, rows):
        """Prompt embeddings (len(rows), 512, text_dim), fp32, from the cache."""
        return self.pad_text([load_cached(self.cached[pairs.prompts[i]]) for i in rows])

    def embed(self, prompts):
        """Text (n, 512, text_dim) fp32 on the CPU, with zeros after the last token as in official Wan."""
        return self.pad_text(self.embed_rows(prompts))

    @torch.no_grad()
    def embed_rows(self, prompts, batch=8):
        """Yield (S, text_dim) of each prompt on the CPU, S its own length, in the encoder's dtype; prompts
        are cleaned as diffusers' WanPipeline does. The encoder leaves memory at the end.
        """
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean
        from transformers import AutoTokenizer, UMT5EncoderModel
        if not len(prompts):
            return
        self.loaded_vae = None
        tokenizer = load_part(AutoTokenizer, self.part("tokenizer"))
        cleaned = [prompt_clean(prompt) for prompt in prompts]
        cut = [p for p, ids in zip(prompts, tokenizer(cleaned).input_ids) if len(ids) > WAN_TEXT_LEN]
        if cut:
            print(f"{len(cut)} of {len(prompts)} prompts are cut at {WAN_TEXT_LEN} tokens: '{cut[0][:60]}..'")
        dtype = torch.bfloat16 if self.device != "cpu" else torch.float32
        encoder = load_part(UMT5EncoderModel, self.part("text_encoder"), dtype=dtype).to(self.device).eval()
        for i in progress(range(0, len(prompts), batch), "prompts"):
            words = tokenizer(cleaned[i:i + batch], padding="max_length", truncation=True,
                              max_length=WAN_TEXT_LEN, return_tensors="pt").to(self.device)
            states = encoder(words.input_ids, words.attention_mask).last_hidden_state.cpu()
            for row, n in zip(states, words.attention_mask.sum(1).tolist()):
                yield row[:n].clone()
        del encoder
        torch.cuda.empty_cache()

    def pad_text(self, rows):
        """Embeddings [(S, text_dim)] as one fp32 tensor (n, 512, text_dim) with zeros after the last
        token.
        """
        return torch.stack([F.pad(row.float(), (0, 0, 0, WAN_TEXT_LEN - len(row))) for row in rows])

    def latent_shape(self, frames, size):
        """(C, T, H, W) of the latents of a video. UserError for frames and sizes that cannot be."""
        time = self.config.get("scale_factor_temporal") or 4
        space = self.config.get("scale_factor_spatial") or 8
        if frames % time != 1:
            raise UserError(f"--frames {frames}: Wan's autoencoder takes {time}k + 1 frames, such as 81")
        if len(size) != 2 or any(x <= 0 or x % (2 * space) for x in size):
            raise UserError(f"--size {as_word(size)}: give multiples of {2 * space}, such as 480,832")
        return self.channels, (frames - 1) // time + 1, size[0] // space, size[1] // space

    def vae(self):
        """(autoencoder, mean, std): the statistics (1, C, 1, 1, 1) that its latents are normalised with."""
        if self.loaded_vae is None:
            from diffusers import AutoencoderKLWan
            vae = load_part(AutoencoderKLWan, self.part("vae"), torch_dtype=torch.float32)
            stats = [torch.tensor(x, device=self.device).view(1, -1, 1, 1, 1)
                     for x in (vae.config.latents_mean, vae.config.latents_std)]
            self.loaded_vae = vae.to(self.device).eval().requires_grad_(False), *stats
        return self.loaded_vae

    @torch.no_grad()
    def encode_video(self, video):
        """Latents (B, C, T', H', W') of pixels (B, 3, T, H, W) in [-1, 1]: the posterior's mode,
        normalised.
        """
        vae, mean, std = self.vae()
        return (vae.encode(video.to(self.device)).latent_dist.mode() - mean) / std

    @torch.no_grad()
    def decode(self, latents):
        """Videos (n, 3, T, H, W) in [-1, 1] on the CPU, one at a time."""
        vae, mean, std = self.vae()
        latents = latents.to(self.device)
        return torch.cat([vae.decode(x[None] * std + mean).sample.clamp(-1, 1).cpu() for x in latents])

    def encode(self, pairs, args):
        """The pairs that read returned, but for videos that break while they are decoded; their latents and
        texts are in the folder args.cache, in bf16.

        Every distinct video and prompt is encoded once, and what another run left there is used. Each file
        appears whole or not at all, so an interrupted encode goes on where it stopped. Each rank takes its
        share.
        """
        prompts, facts = sorted(set(pairs.prompts)), self.facts("text_encoder", "tokenizer")
        self.cached |= {prompt: cached_file(args.cache, "text", prompt, facts) for prompt in prompts}
        files = {self.cached[x] for x in (*prompts, *chain(*pairs.videos))}
        there = sum(map(is_cached, files))
        print(f"{args.cache} holds {there} of {len(files)} videos and prompts; the rest is encoded now")
        texts = [prompt for prompt in prompts[RANK::RANKS] if not is_cached(self.cached[prompt])]
        for x, prompt in zip(self.embed_rows(texts), texts):                    # to the generator's own end
            save_cached(x.bfloat16(), self.cached[prompt])

        def read(path):
            return None if is_cached(self.cached[path]) else read_clip(path, args.frames, args.size, self.fps)

        def keep(path, clip):
            if clip is not None and not is_cached(self.cached[path]):           # nor a copy of it, meanwhile
                save_cached(self.encode_video(clip[None])[0].bfloat16(), self.cached[path])
        pairs, _ = look_into(pairs, args.skip_bad, read, keep)
        self.loaded_vae = None
        torch.cuda.empty_cache()
        return pairs


WanCodec = Wan                                                                # an older name that others call


def load_part(cls, folder, **settings):
    """An instance of a class of transformers or diffusers from a folder. UserError where it cannot be, or
    where tensors are missing, left over or of another shape.
    """
    is_model = issubclass(cls, torch.nn.Module)
    try:
        part = cls.from_pretrained(folder, **settings, **({"output_loading_info": True} if is_model else {}))
    except Exception as e:                                                      # theirs are of every kind
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"{folder} cannot be loaded, is its download complete? {why}") from None
    part, faults = part if is_model else (part, {})
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(map(str, faults.get(f"{kind}_keys", ())))
        if names:
            raise UserError(f"{folder} has {len(names)} {kind} tensors, as {names[0]}: download it again")
    return part


def clip_frames(path, frames, fps=WAN_FPS):
    """Indices (frames,) of the frames of a video file that are on screen at multiples of 1 / fps second.

    UserError names a file that is no video or too short, see check_length.
    """
    times, seconds, *_ = video_times(path)
    check_length(path, seconds, frames, fps)
    return np.searchsorted(times, np.arange(frames) / fps + 1e-6, side="right") - 1


def check_length(path, seconds, frames, fps):
    """UserError names a video that lasts less than (frames - 1) / fps seconds, and the frames that would
    fit.
    """
    if seconds < (frames - 1) / fps:
        fits = int(seconds * fps) // 4 * 4 + 1
        raise UserError(f"{path} lasts {seconds:.2f} s, too short for {frames} frames at {fps} a second "
                        f"(--frames {fits} would fit)")


def share_kept(size, wanted):
    """The share of a picture of this size (h, w) that is left when it covers another (H, W) and is
    cropped.
    """
    (h, w), (H, W) = size, wanted
    return min(h * W, w * H) / max(h * W, w * H)


def read_clip(path, frames, size, fps=WAN_FPS):
    """Pixels (3, frames, H, W) in [-1, 1] of a video file: at fps frames per second, scaled to cover
    size = (H, W), centre-cropped. UserError names a file that cannot be used.
    """
    wanted, places = np.unique(clip_frames(path, frames, fps), return_inverse=True)
    clip = torch.stack([cover(frame, size) for frame in decode(path, wanted)])  # (T, 3, H, W), one by one
    return to_float(clip[places]).transpose(0, 1)


def cover(frame, size):
    """A frame, uint8 (h, w, 3), scaled to cover size = (H, W) and cropped around its centre: (3, H, W) from 0
    to 255, fp32.
    """
    x = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
    (h, w), (H, W) = x.shape[2:], size
    scale = max(H / h, W / w)
    h, w = max(H, round(h * scale)), max(W, round(w * scale))
    top, left = (h - H) // 2, (w - W) // 2
    x = F.interpolate(x, (h, w), mode="bicubic", antialias=True).clamp(0, 255)
    return x[0, :, top:top + H, left:left + W]


# ---- where a model comes from ----

def lineage(path, base=None):
    """[folder of the model at path, of the one that it was aligned from, .., of the pretrained one]: an
    aligned run names in its config.json the model that it started from, unless base says where that is now. A
    hub repository stays its name.
    """
    folder = find(path)
    if folder is None:
        return [path]
    if not any((folder / name).exists() for name in ("transformer", "lora.safetensors", "config.json")):
        raise UserError(f"{path} holds no transformer, lora.safetensors or config.json: is the run finished?")
    args = run_args(path)
    if args.get("loss", "pretrain") == "pretrain" and not (folder / "lora.safetensors").exists():
        return [folder]
    start = base or args.get("model")
    if not isinstance(start, str):
        raise UserError(f"{folder / 'config.json'} does not say what the run started from")
    try:
        return [folder, *lineage(start)]
    except UserError as e:
        raise UserError(f"{path} started from {start}: {e}; if it moved, say where with --model") from None


def whole_weights(folders):
    """The first folder of a lineage that has whole weights, not adapters."""
    return next(folder for folder in folders if not (Path(folder) / "lora.safetensors").exists())


def run_args(path):
    """The arguments of the run at path; {} of a model that is no run."""
    file = (find(path) or Path(path)) / "config.json"
    args = read_json(file).get("args") if file.exists() else None
    return args if isinstance(args, dict) else {}


def metadata_of(file):
    """The metadata of a safetensors file, {} where it does not exist."""
    return read_tensors(file, metadata_only=True)[1] if file.exists() else {}


def toy_weights(folder):
    """The file with a toy's whole weights; it does not exist of Wan in several files or on the hub."""
    return Path(folder) / "transformer" / "diffusion_pytorch_model.safetensors"


def weights_hash(path):
    """A hash of a file, or of the weights in a folder, by which adapters know the model that they were
    trained on again; of a hub repository its name.
    """
    place = Path(path) if Path(path).exists() else HERE / path
    kinds = "lora.*", "reward.*", "transformer*/*", "checkpoint-*/*"
    files = [place] if place.is_file() else [file for kind in kinds for file in sorted(place.glob(kind)) if
                                             file.suffix in (".safetensors", ".pth")]
    return short_hash(*map(content_hash, files)) if files else str(path)


def world_of(path, device="cpu", base=None):
    """The world of the model at path, which its pretrained weights tell; base: see lineage."""
    root = lineage(path, base)[-1]
    return Shapes() if "world" in metadata_of(toy_weights(root)) else Wan(root, device)


# ---- runs: several processes, started by torchrun; alone, all of this changes nothing ----

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_ranks():
    """Join the other processes, on this one's GPU if there are any; only rank 0 prints."""
    if RANKS == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        if torch.cuda.device_count() <= int(os.environ["LOCAL_RANK"]):
            raise UserError(f"{torch.cuda.device_count()} GPUs are there: --nproc_per_node wants one each")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=12))
    if RANK:
        sys.stdout = open(os.devnull, "w")


def progress(items, desc, **settings):
    """tqdm over items, on rank 0 alone and where somebody looks: not in a file."""
    return tqdm(items, desc=desc, **{"leave": False, "disable": True if RANK else None, **settings})


def all_gather(x):
    """[x of rank 0, x of rank 1, ..], of anything that can be pickled; all ranks wait for each other."""
    everyone = [x] * RANKS
    if RANKS > 1:
        dist.all_gather_object(everyone, x)
    return everyone


def merged(mine):
    """The dictionaries of all ranks as one."""
    return {key: value for share in all_gather(mine) for key, value in share.items()}


def gather_rows(mine):
    """A list of which each rank made its share, rows[RANK::RANKS], put together in order."""
    rows = merged({RANK + i * RANKS: row for i, row in enumerate(mine)})
    return [rows[i] for i in sorted(rows)]


def on_rank_0(function):
    """The function, called by rank 0 alone; the others wait for it and return what it returned there."""
    @wraps(function)
    def call(*args, **kwargs):
        return all_gather(None if RANK else function(*args, **kwargs))[0]
    return call


def add_gradients(parameters):
    """Give every rank the sum of all ranks' gradients: once a step, so that micro-batches cost no messages.
    Those of sharded weights are summed already.
    """
    if RANKS > 1:
        for p in parameters:
            if p.grad is not None and not hasattr(p.grad, "full_tensor"):
                dist.all_reduce(p.grad)


def shard(model):
    """Split the weights over the ranks block by block (FSDP2): a block is whole only while it computes, and
    its backward pass sums the gradients of all ranks.
    """
    from torch.distributed.fsdp import fully_shard
    for module in (*model.blocks, model):
        fully_shard(module)
        module.set_gradient_divide_factor(1.0)                                  # a sum, not a mean
        module.set_force_sum_reduction_for_comms(True)                          # which gloo can do too


def micro_batches(rows, accumulate):
    """[(rows, samples)] of the micro-batches that go through the model in turn: this rank's share of the rows
    (n,) of a step, and their samples for draw_noise: the k-th repetition of a row is (row, k), which has
    noise of its own.
    """
    times, samples = Counter(), []
    for row in rows.tolist():
        samples.append((row, times[row]) if times[row] else row)
        times[row] += 1
    places = torch.arange(len(rows))[RANK::RANKS].split(-(-len(rows) // accumulate))
    return [(rows[own], [samples[i] for i in own]) for own in places]


# ---- runs: randomness ----

def rng(*key):
    """A torch.Generator that is a function of its key, such as ("noise", seed, step, sample)."""
    key = [zlib.crc32(k.encode()) if isinstance(k, str) else k % 2**64 for k in key]        # a seed may be -1
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0]))


def draw_noise(shape, seed, step, samples, logit_normal=False, t_range=(0.0, 1.0)):
    """t (B,) and eps (B, *shape) for the samples with these indices: t uniform in t_range, or logit-normal,
    eps normal.

    A function of (seed, step, sample) alone, so that resuming, splitting a batch and several ranks agree by
    construction.
    """
    draws = [rng("noise", seed, step, *(i if isinstance(i, tuple) else (i,))) for i in samples]
    if logit_normal:
        t = torch.stack([torch.randn((), generator=g) for g in draws]).sigmoid()
    else:
        low, high = t_range
        t = low + (high - low) * torch.stack([torch.rand((), generator=g) for g in draws])
    return t, torch.stack([torch.randn(shape, generator=g) for g in draws])


def step_rows(n, batch, seed, step):
    """The rows (batch,) of an optimizer step: each epoch is a fresh permutation of n, a function of
    (seed, epoch).
    """
    places = torch.arange(step * batch, (step + 1) * batch)
    orders = {e: torch.randperm(n, generator=rng("order", seed, e)) for e in (places // n).unique().tolist()}
    return torch.stack([orders[p // n][p % n] for p in places.tolist()])


def learning_rate_scale(step, steps, warmup, decay=0.0):
    """The share of the peak learning rate at a step: a linear rise over the first warmup steps, a linear fall
    to 0 over the last share decay of them all.
    """
    rise = (step + 1) / max(warmup, 1)
    fall = (steps - step) / (decay * steps) if decay else 1
    return min(1, rise, fall)


# ---- runs: arguments ----

class Count(int):
    """A flag that counts something: a whole number above 0."""

    def __new__(cls, text):
        if not str(text).isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number, 1 or more")
        return super().__new__(cls, text)


class Numbers(tuple):
    """A flag of several numbers, such as 480,832 or 0.5,0.5,0."""

    def __new__(cls, text):
        try:
            return super().__new__(cls, [float(x) if "." in x else int(x) for x in text.split(",")])
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is not numbers with commas, such as 480,832") from None


def recipes(names, rows):
    """{name: {flag: value}}, what flags that are unset fall to, of a table {flag: a value for each name}."""
    return {name: {flag: row[k] for flag, row in rows.items()} for k, name in enumerate(names)}


def fill_unset(args, values):
    """Set the flags of args that are unset to these values {flag: value}."""
    for flag, value in values.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)


def parse_args(cls, doc, argv=None):
    """An instance of the dataclass cls from the command line. Annotations give the types, trailing comments
    the help.

    Literal is a choice, bool makes --flag and --no-flag, list takes several words, `X | None` is left to the
    recipe. UserError names a wrong flag or value.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, exit_on_error=False)
    hints = typing.get_type_hints(cls)
    notes = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", inspect.getsource(cls), re.M))
    for f in fields(cls):
        kind, note = hints[f.name], notes.get(f.name, "").replace("%", "%%")
        if type(None) in typing.get_args(kind):
            kind = typing.get_args(kind)[0]                                     # X of `X | None`
        usual = "" if f.default in (None, (), "") else f" [{as_word(f.default)}]"
        options = dict(default=f.default, help=note + usual)
        if typing.get_origin(kind) is typing.Literal:
            options |= dict(choices=typing.get_args(kind))
        elif kind is bool:
            options |= dict(action=argparse.BooleanOptionalAction)
        else:
            options |= dict(nargs="+") if kind is list else dict(type=kind)
            options |= dict(metavar=kind.__name__.upper())
        parser.add_argument(f"--{f.name}", **options)
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(f"{e} (--help lists every flag)") from None
    if unknown:
        raise UserError(f"unknown argument {unknown[0]} (--help lists every flag)")
    return cls(**vars(args))


def as_word(value):
    """A flag's value as it is typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def command(args):
    """The command line that makes these arguments again."""
    words = ["python", Path(inspect.getfile(type(args))).name]
    for name, value in vars(args).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value not in (None, (), "", []):
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [as_word(value)])]
    return shlex.join(words)


def launch(main, cls, doc, argv=None):
    """Run main with the arguments of the command line. What the user can mend, a file or disk that fails, and
    memory that runs out end in one line and exit status 2; of several processes the one at fault says it, and
    torchrun ends the rest, which may be waiting for it.
    """
    for stream in (sys.stdout, sys.stderr):                         # a name that it can't print stops nothing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        result = main(parse_args(cls, doc, argv))
    except (UserError, OSError, torch.OutOfMemoryError) as e:
        rank, why = f" rank {RANK}:" if RANKS > 1 else "", str(e).splitlines()
        if isinstance(e, torch.OutOfMemoryError):
            helps = "less --frames, --size or --batch, more --accumulate, --decoupled, --shard"
            why = [f"out of memory: what helps is {helps}. {why[0]}"]
        print(f"error:{rank}", *why, file=sys.stderr)
        raise SystemExit(2) from None
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


# ---- runs: folder, log, states ----

def write_json(path, value):
    """Write value as JSON."""
    write_whole(path, json.dumps(value, indent=1).encode())


def read_log(folder):
    """The events in a run's log.jsonl; a last line without an end is left out."""
    file = Path(folder) / "log.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


# Flags that name files: a run is the same if they hold the same. And flags that can't change what it ends in.
PATHS = {"model", "ckpt", "against", "lora", "pairs", "prompts", "reward", "nrg", "template"}
FREE = {"out", "resume", "cache", "save_every", "accumulate", "decoupled"}


def facts_of(args):
    """What a run depends on, {flag: its value or, of files, hashes of what they hold}; "start": that of the
    whole weights below the model's adapters.
    """
    facts = {flag: value for flag, value in vars(args).items() if flag not in FREE}
    for flag in facts.keys() & PATHS:
        paths = facts[flag] or []
        facts[flag] = [weights_hash(path) for path in (paths if isinstance(paths, list) else [paths])]
    if facts.get("loss", "pretrain") != "pretrain" and facts.get("labels"):
        facts["start"] = weights_hash(whole_weights(lineage(args.model)))
    return facts


def free_folder(name):
    """The first of name, name-2, name-3, .. that does not exist."""
    return next(path for path in chain([name], (f"{name}-{n}" for n in count(2))) if not Path(path).exists())


@on_rank_0
def make_folder(args, device, longer):
    """Make the folder args.out and its config.json; returns whether an earlier run there goes on, and
    facts_of it.

    UserError where the folder exists and args.resume is not set, where it is of another run (with longer it
    may have had fewer steps), or where the cache can't be made.
    """
    folder, facts = Path(args.out), json.loads(json.dumps(facts_of(args)))
    try:
        Path(getattr(args, "cache", ".")).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--cache {args.cache} cannot be made ({e.strerror}): name another folder") from None
    going_on = getattr(args, "resume", False) and folder.exists()
    if going_on:
        before, named = read_json(folder / "config.json").get("facts", {}), run_args(folder)
        for flag, value in facts.items():
            grows = longer and flag == "steps" and (value or 0) >= (before.get(flag) or 0)
            if before.get(flag) != value and not grows:
                raise UserError(f"--resume: --{flag} {vars(args).get(flag, args.model)} is not what {folder} "
                                f"began with, {named.get(flag)}: bring that back")
    elif folder.exists():
        raise UserError(f"{folder} exists: --resume goes on with it, or give another --out")
    folder.mkdir(parents=True, exist_ok=going_on)
    git = ["git", "-C", HERE, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout if shutil.which("git") else ""
    write_json(folder / "config.json", {
        "command": command(args), "args": vars(args), "facts": facts, "commit": commit.strip(),
        "world": world_hash(), "torch": torch.__version__, "python": sys.version.split()[0],
        "device": str(device), "threads": torch.get_num_threads()})
    return going_on, facts


class Run:
    """A run's folder and its step clock. As a context it removes the folder again if nothing was kept in it.

    folder: where it is. events: what its log.jsonl holds. seen: what `see` was told of each step since the
    last log, a list of (B, columns), in the order of the step's rows; names: the columns. bar: its progress
    bar.
    """

    def __init__(self, args, device="cpu", longer=False):
        self.folder, self.args = Path(args.out), args
        self.going_on, self.facts = make_folder(args, device, longer)
        self.events, self.seen, self.now, self.names, self.started = [], [], [], (), time.time()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if RANK == 0 and os.listdir(self.folder) == ["config.json"]:
            shutil.rmtree(self.folder)

    def steps(self, total, model, optimizers, **lists):
        """The numbers of the steps that are left to do. Between them the state of the model, its optimizers
        and the lists is saved: every args.save_every steps, every 20 minutes, and when Ctrl-C or SIGTERM asks
        to stop.
        """
        self.state = model, optimizers, lists | {"seen": self.seen}
        first, saved = self.load() if self.going_on else 0, time.time()
        self.bar = progress(range(first, total), self.folder.name, initial=first, total=total, leave=True,
                            disable=RANK > 0)
        with stop_signals() as asked:
            for self.step in self.bar:
                yield self.step
                done = self.step + 1
                due = done == total or done % self.args.save_every == 0 or time.time() - saved > 20 * 60
                stop, due = map(any, zip(*all_gather((asked.is_set(), due))))   # it reaches each rank in time
                if stop or due:
                    self.save(done)
                    saved = time.time()
                if done < total and stop:
                    self.bar.close()
                    raise UserError(f"stopped after step {done}: the same command with --resume goes on")

    def see(self, **columns):
        """Keep values of this step's micro-batch, each (b,), one a sample."""
        self.names = tuple(columns)
        self.now.append(torch.stack(list(columns.values()), dim=1).detach())

    def check_finite(self, rows, grad_norm):
        """Put together what all ranks saw of this step. If it or the gradient is not finite, stop before a
        weight moves; rows: where the step's samples stand in their file, for the message.
        """
        values, self.now = torch.tensor(gather_rows(torch.cat(self.now).tolist())), []
        finite = values.isfinite().all(1)
        if finite.all() and grad_norm.isfinite():
            self.seen.append(values)
            return
        self.save(self.step)
        self.bar.close()
        bad = [row for row, fine in zip(rows, finite) if not fine] if len(rows) == len(finite) else []
        raise UserError(f"step {self.step + 1}: loss or gradient is not finite, of rows {bad or rows}: look "
                        "at those, or start again with a lower --lr; --resume repeats the step")

    def log(self, **event):
        """Add an event of this step to log.jsonl, and forget what was seen."""
        self.events.append({"time": round(time.time(), 1), "step": self.step + 1, **event})
        self.seen.clear()
        self.write_log()

    def write_log(self):
        """Write log.jsonl, an event a line."""
        if not RANK:
            lines = "".join(json.dumps(event) + "\n" for event in self.events)
            write_whole(self.folder / "log.jsonl", lines.encode())

    def save(self, step):
        """Write state.pt, all that training needs to go on after step."""
        if step == 0:                                                         # the optimizer has no state yet
            return
        model, optimizers, lists = self.state                     # all ranks put together what is sharded
        weights, moments = state_dicts.get_state_dict(model, optimizers, options=WHOLE)
        content = io.BytesIO()
        torch.save({"step": step, "model": weights, "optimizers": moments, **lists}, content)
        on_rank_0(write_whole)(self.folder / "state.pt", content.getbuffer())

    def load(self):
        """Bring the state to that of state.pt, and the log back to it; returns its step, 0 if there is
        none.
        """
        file, (model, optimizers, lists) = self.folder / "state.pt", self.state
        saved = torch.load(file, weights_only=True, map_location="cpu") if file.exists() else {"step": 0}
        print(f"{self.folder}: going on after step {saved['step']}")
        if saved["step"]:
            state_dicts.set_state_dict(model, optimizers, model_state_dict=saved["model"],
                                       optim_state_dict=saved["optimizers"], options=WHOLE)
            for name, values in lists.items():
                values[:] = saved[name]
        self.events = [event for event in read_log(self.folder) if event["step"] <= saved["step"]]
        self.write_log()
        return saved["step"]


# States hold whole tensors on the CPU, and of a module what is trained, however it is spread over the ranks.
WHOLE = state_dicts.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True,
                                     strict=False)


@contextmanager
def stop_signals():
    """An event that the first Ctrl-C or SIGTERM sets; a second one stops at once. Only a main thread hears
    them.
    """
    asked, before = threading.Event(), {}

    def ask(number, _):
        asked.set()
        signal.signal(number, before[number])
        print("\nstopping after this step; once more stops at once", file=sys.stderr)
    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- the script ----

def main(args):
    """Write the labelling page of a pairs file; without one, shapes.webp: videos of the twelve renderers with
    their oracle scores, each beside a flawless one.
    """
    if args.label:
        pairs = read_pairs(args.label, labelled=False)
        rows = [(prompt, *videos) for prompt, videos in zip(pairs.prompts, pairs.videos)]
        label_page(Path(args.label).with_suffix(".html"), rows)
        return
    prompts = PROMPTS[::6]                                                 # 12 of them, one for each renderer
    bad, good = render_as(torch.arange(len(RENDERERS)), prompts, rng(0)).float(), clean_videos(prompts)
    tiles = [(prompt, [thumbnails(a), thumbnails(b)], f"{name}:  {caption_of(score)}")
             for prompt, a, b, name, score in zip(prompts, bad, good, RENDERERS, oracle(bad, prompts))]
    moving_sheet("shapes.webp", tiles, FRAMES / FPS)
    print("wrote shapes.webp: twelve renderers with their oracle scores, each beside a flawless video")


@dataclass
class Args:
    label: str = ""                         # a pairs file: write the page on which a person labels it


if __name__ == "__main__":
    words = sys.argv[1:]
    launch(main, Args, __doc__, ["--label", *words[1:]] if words[:1] == ["label"] else words)
