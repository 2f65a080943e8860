"""Everything between files and tensors: Shapes world, preference pairs, videos, the two worlds, runs.

    python data.py                      shapes.webp: good and bad videos of Shapes world, with oracle scores
    python data.py label pairs.csv      a page on which a person says which of two videos is better
    python data.py label runs/a runs/b  the same of two folders, file by file of equal name

Shapes world is a world small enough for two CPU cores in which the true quality of a video is known exactly:
one soft-edged shape on a dark ground, 6 colours x 3 shapes x 4 directions, twelve renderers with different
flaws in the place of twelve text-to-video models, and an oracle that measures VQ, MQ and TA from the pixels
alone. Pixels are (B, 3, T, H, W) in [-1, 1]; files hold uint8 (T, H, W, 3).
"""
import argparse
import csv
import difflib
import hashlib
import inspect
import io
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
import unicodedata
import zlib
from collections import Counter, defaultdict
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


def clean_videos(prompts):
    """A flawless video (n, 3, T, H, W) in [-1, 1], fp32, of each prompt."""
    return render(attributes(prompts), torch.zeros(len(prompts), 8), rng("clean")).float()


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
    Rao-Kupper.

    score_a, score_b: oracle scores (B, 3); g: generator; noise divides the sharpness. With noise 1, 40 to 60
    % are ties.
    """
    d = with_overall(normalised(score_a)) - with_overall(normalised(score_b))
    d = d * torch.tensor(SHARPNESS) / noise
    u, log_tie = torch.rand(d.shape, generator=g), np.log(5)
    return (u < torch.sigmoid(d - log_tie)).float() - (u > 1 - torch.sigmoid(-d - log_tie)).float()


def likert(score, g, noise=1.0):
    """An annotator's 1 to 5 points for oracle scores (..., 3): half a point of noise, or noise times that,
    then whole points.
    """
    return (1 + 4 * score + 0.5 * noise * torch.randn(score.shape, generator=g)).round().clamp(1, 5)


@dataclass
class Pairs:
    """n preference pairs: two videos of each prompt, A first.

    videos: a sequence of (A, B), paths of files or uint8 (3, T, H, W); those in memory are one tensor. label
    (n, 4): VQ, MQ, TA, Overall as +1 A, 0 same, -1 B, nan unlabelled; mos (n, 2, 3): Likert points of A and
    B, nan where there are none. lines: where each pair stands in its file, or its number.
    """
    prompts: list
    videos: typing.Sequence
    label: torch.Tensor
    mos: torch.Tensor
    lines: list

    def __len__(self):
        return len(self.prompts)

    def where(self, rows):
        """The lines of these rows in their file, for messages."""
        return [self.lines[i] for i in rows]

    def subset(self, rows):
        """The Pairs of these rows."""
        def pick(x):
            return x[rows] if torch.is_tensor(x) else [x[i] for i in rows]
        return Pairs(**{f.name: pick(getattr(self, f.name)) for f in fields(self)})

    def winner_first(self, order):
        """The Pairs with A and B of each in this order (n, 2) of 0 and 1."""
        rows = torch.arange(len(self))[:, None]
        if torch.is_tensor(self.videos):
            videos = self.videos[rows, order]
        else:
            videos = [tuple(pair[i] for i in turn) for pair, turn in zip(self.videos, order)]
        label = self.label * (1 - 2 * order[:, :1])                          # the other way round where B won
        return Pairs(self.prompts, videos, label, self.mos[rows, order], self.lines)


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
# won it}, or a or b where that one always did. Rapidata's hold A's share of the votes.
LAYOUTS = [
    ("VideoAlign and VideoGen-RewardBench", "prompt", "path_A", "path_B", {x: x for x in (*DIMS, "Overall")}),
    ("GenAI-Bench", "prompt", "left_video", "right_video", {"Overall": "vote_type"}),
    ("VisionRewardDB-Video", "prompt", "video1_path", "video2_path", {"Overall": "standard_answer"}),
    ("MJ-Bench-Video", "caption", "video_0_path", "video_1_path", {"Overall": "overall_preference"}),
    ("Rapidata", "prompt", "file_name1", "file_name2", {
        "Overall": "weighted_results1_Preference", "MQ": "weighted_results1_Coherence",
        "TA": "weighted_results1_Alignment"}),
    ("VideoDPO", "frame_caption", "video2", "video1", {"Overall": "b"}),   # numbers of clips in metadata.json
    ("a winner and a loser", "prompt", "chosen", "rejected", {"Overall": "a"}),
]
LABELS = {1.0: ("a", "left", "leftvote", "video1", "video 1 better"),
          -1.0: ("b", "right", "rightvote", "video2", "video 2 better"),
          0.0: ("same", "tie", "tievote", "bothbad_vote"), float("nan"): ("", "nan", "none", "invalid")}
LABELS = {word: label for label, words in LABELS.items() for word in words}


def read_table(path):
    """[(line, {column: value})] of a file in UTF-8, whatever its name: JSON, JSON lines, or texts with a
    separator and a header; a .txt is one prompt a line. A list of texts is a column `prompt`. UserError names
    a bad row.
    """
    path = Path(path)
    content = b"PAR1" if path.suffix == ".parquet" else path.read_bytes()
    if content[:4] == b"PAR1":
        code = f"import pandas; pandas.read_parquet('{path}').to_csv('{path.with_suffix('.csv')}')"
        raise UserError(f"{path} is Parquet: with pandas, make it a CSV by python -c {shlex.quote(code)}")
    try:
        text = content.decode("utf-8-sig")
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        first, is_txt = text.strip()[:1], path.suffix.lower() == ".txt"
        if first in ("[", "{") and (not is_txt or text.strip()[-1] in "]}"):   # a prompt may begin with [
            if first == "[":
                table = [*enumerate(json.loads(text), 1)]
            else:
                table = [(n, json.loads(line)) for n, line in lines]
        elif is_txt:
            table = lines
        else:
            return read_csv(text)
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}): save it as CSV or JSONL") from None
    except (ValueError, RecursionError, csv.Error) as e:
        raise UserError(f"{path} cannot be read as CSV or JSON: {e}") from None
    table = [(n, {"prompt": row} if isinstance(row, str) else row) for n, row in table]
    if not all(isinstance(row, dict) for _, row in table):
        raise UserError(f"{path} must hold one JSON object per row, with its columns as keys")
    return table


def read_csv(text):
    """The rows of read_table of texts with a separator and a header. ValueError names a bad row."""
    separator = max(",;\t|", key=text.partition("\n")[0].count)
    reader, table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True), []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"row {reader.line_num} has more or fewer fields than the header: texts that "
                             f"hold the separator {separator!r} must stand in quotes")
        table.append((reader.line_num, row))
    return table


def text_of(path, line, row, column):
    """The text in a row's column, "" where there is none. UserError where it is something else."""
    value = row.get(column)
    value = str(value) if type(value) in (int, float) and value == value else value        # but not nan
    if not isinstance(value, str | None):
        raise UserError(f"{path}, row {line}: {column} is {json.dumps(value)[:40]} and must be a text")
    if any("\ud800" <= x <= "\udfff" for x in value or ""):
        raise UserError(f"{path}, row {line}: {column} holds half a character, as of an emoji that was cut")
    return (value or "").strip()


def find_video(folder, name):
    """The file of this name in a folder, or in its videos/, in the spelling of another system; else its plain
    path.
    """
    other = name.replace("\\", "/")
    spellings = [name, other, unicodedata.normalize("NFC", other), unicodedata.normalize("NFD", other)]
    paths = [folder / part / spelling for spelling in spellings for part in ("", "videos", "Videos")]
    return next((path for path in paths if os.path.exists(path)), folder / name)


def read_pairs(path, skip_bad=False):
    """Pairs of a file in one of LAYOUTS; video paths are relative to the file.

    Labels are A, B or same in any case, or another of LABELS; anything else is unlabelled, and how many are
    is printed. Numbers are refused: whether 1 and 0, 1 and 2 or 1 and -1 are meant can't be known. MOS_A_VQ
    .. MOS_B_TA, where they stand, are Likert points from 1 to 5. All rows are checked at once: UserError
    names a missing column, prompt or, without skip_bad, video.
    """
    table, folder = read_table(path), Path(path).parent
    if not table:
        raise UserError(f"{path} holds no pairs: give it a header and one row per pair")
    columns = set().union(*(row for _, row in table))
    labelled = columns | LABELS.keys()
    fitting = [x for x in LAYOUTS if columns.issuperset(x[1:4]) and labelled.intersection(x[4].values())]
    if not fitting:
        known = "; ".join(f"{x[0]}: {', '.join([*x[1:4], *x[4].values()])}" for x in LAYOUTS)
        found = ", ".join(sorted(map(str, columns)))
        raise UserError(f"{path} has the columns {found}; understood are: {known}")
    _, prompt, a, b, labels = fitting[0]
    clips = read_clips(folder) if prompt == "frame_caption" else {}

    prompts, videos, label, mos, odd, bad = [], [], [], [], [], []
    for line, row in table:
        cell = partial(text_of, path, line, row)
        prompts.append(cell(prompt))
        videos.append(tuple(find_video(folder, clips.get(cell(x), cell(x))) for x in (a, b)))
        bad += [] if prompts[-1] else [f"row {line} has no prompt"]
        for video in videos[-1]:
            if not (os.path.isfile(video) or skip_bad):
                why = "is a folder, a video file is needed" if os.path.isdir(video) else "does not exist"
                bad.append(f"row {line}: {video} {why}")
        words = {dim: who_won(cell, column) for dim, column in labels.items()}
        odd += [word for word in words.values() if word not in LABELS]
        label.append([LABELS.get(words.get(dim), float("nan")) for dim in (*DIMS, "Overall")])
        mos.append([[number(cell(f"MOS_{side}_{dim}")) for dim in DIMS] for side in "AB"])
        off = [x for points in mos[-1] for x in points if x < 1 or x > 5]
        if off:
            raise UserError(f"{path}, row {line} gives {off[0]:g} points, and the scale is 1 to 5: map them "
                            "all, by 1 + 4 x / 100 if they are 0 to 100, or 1 + 4 x / 10 if they are 0 to 10")
    if bad:
        more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
        raise UserError(f"{path}, {bad[0]}{more}: mend the file; paths are relative to its folder")
    numeric = sorted({word for word in odd if number(word) == number(word)})    # not nan
    if numeric:
        raise UserError(f"{path} has the labels {', '.join(numeric[:5])}: write A, B or same, as numbers do "
                        "not say which one won")
    if odd:
        seen = ", ".join(sorted({repr(word) for word in odd})[:5])
        print(f"{path}: {len(odd)} labels are neither A, B nor same ({seen}): taken as unlabelled")
    return Pairs(prompts, videos, torch.tensor(label), torch.tensor(mos), [line for line, _ in table])


def number(text):
    """The number in a cell, nan where there is none."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def who_won(cell, column):
    """The label in a column of LAYOUTS, in small letters; of votes, who has the larger share."""
    if column in LABELS:
        return column
    if not column.startswith("weighted_results1"):
        return cell(column).lower()
    a, b = (number(cell(column.replace("1", side))) for side in "12")
    if a == b:
        return "same"
    return "a" if a > b else "b" if a < b else ""                               # a share may be missing


def read_clips(folder):
    """{number: path} of VideoDPO's clips, from the metadata.json beside its pairs."""
    rows = read_table(folder / "metadata.json")
    return {str(n - 1): (row.get("basic") or {}).get("clip_path", "") for n, row in rows}


def report_pairs(pairs, held_out=()):
    """Print what a set of pairs is made of: repeated pairs, whether their labels contradict each other, and
    how many of its prompts are among the held_out ones; ties of each dimension, and how often it agrees with
    others.
    """
    names = [[v if isinstance(v, Path) else hash(v.numpy().tobytes()) for v in pair] for pair in pairs.videos]
    prompts, videos = set(pairs.prompts), {video for pair in names for video in pair}
    shared = f", {len(prompts & set(held_out))} of which are evaluated on too" if held_out else ""
    print(f"{len(pairs)} pairs of {len(videos)} videos and {len(prompts)} prompts" + shared)
    report_repeats(pairs, names)
    columns = (*DIMS, "Overall")
    for k, name in enumerate(columns):
        label = pairs.label[:, k][~pairs.label[:, k].isnan()]
        if not len(label):
            continue
        a, b, ties = ((label == x).float().mean() for x in (1, -1, 0))
        line = f"{name}: {len(label) / len(pairs):.0%} labelled; A {a:.0%}, B {b:.0%}, ties {ties:.0%}"
        agrees = []
        for other, column in zip(columns, pairs.label.T):
            same = (pairs.label[:, k] * column).nan_to_num()                  # +1 where both decide and agree
            if other != name and same.any():
                agrees.append(f"{other} {(same > 0).sum() / (same != 0).sum():.0%}")
        print(line + (f"; where both decide, it agrees with {', '.join(agrees)}" if agrees else ""))


def report_repeats(pairs, names):
    """Print how many of the pairs, of videos with these names, occur again, and what their labels say then.
    """
    found = defaultdict(list)
    for prompt, (a, b), label in zip(pairs.prompts, names, pairs.label.nan_to_num()):
        turned = b < a
        found[prompt, min(a, b), max(a, b)].append((turned, -label if turned else label))
    repeated = [rows for rows in found.values() if len(rows) > 1]
    if repeated:
        both = sum(len({turned for turned, _ in rows}) == 2 for rows in repeated)
        labels = [torch.stack([label for _, label in rows]) for rows in repeated]
        opposite = sum(((x == 1).any(0) & (x == -1).any(0)).any().item() for x in labels)
        print(f"{len(repeated)} pairs occur more than once: {both} in both orders, "
              f"{opposite} with opposite labels")


# ---- video files and pictures ----

def to_uint8(video):
    """[-1, 1] to 0..255."""
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(video):
    """0..255 to [-1, 1], fp32."""
    return video.float() / 127.5 - 1


@contextmanager
def open_video(path):
    """(PyAV's container, its best video stream: not a cover picture, frames per second). UserError names a
    file that is no video.
    """
    import av
    check_pointer(path)
    try:
        with av.open(os.path.abspath(path)) as container:                 # a name with a colon is no URL then
            stream = container.streams.best("video")
            fps = float(stream.average_rate or stream.guessed_rate or 0) if stream else 0
            if not fps > 0:
                raise UserError(f"{path} has no video in it, or no frame rate")
            yield container, stream, fps
    except (av.FFmpegError, OSError, AttributeError) as e:              # a stream without a codec has no size
        raise UserError(f"{path} cannot be read as a video: {e}") from None


def upright(frame, stream):
    """A decoded frame as players show it, uint8 (H, W, 3): with square pixels, and turned as its file says.
    """
    if max(frame.height, frame.width) > 8192:
        raise UserError(f"{stream.container.name} is {frame.width} x {frame.height}: more than 8192 pixels a "
                        "side are refused")
    shape = float(stream.sample_aspect_ratio or 1)
    frame = frame.reformat(width=round(frame.width * shape) if shape > 0 else None, format="rgb24")
    return np.rot90(frame.to_ndarray(), round(frame.rotation / 90)) if frame.rotation else frame.to_ndarray()


def video_times(path):
    """(times (n,) in seconds at which a video's frames come on screen, from 0; when the last one ends; frames
    per second; height; width). One frame is decoded. UserError names a file that is no video.
    """
    size = read_video(path, [0])[0].shape[1:3]
    with open_video(path) as (container, stream, fps):
        stamps = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        if None in stamps:
            times = np.arange(len(stamps)) / fps
        else:
            times = np.sort(stamps) * float(stream.time_base)
        times = times - times[0]
        return times, times[-1] + 1 / fps, fps, *size


def video_info(path):
    """(frames, fps, height, width) of a video file, as it is shown. UserError names a file that is no video.
    """
    times, _, *rest = video_times(path)
    return len(times), *rest


def read_video(path, indices=None):
    """(frames, fps): uint8 (T, H, W, 3), as they are shown, and the frame rate; indices: the frames wanted,
    ascending (all of them if None).

    Decoding stops after the last one wanted. UserError names a file that cannot be read or is too short.
    """
    wanted, frames = None if indices is None else {int(i) for i in indices}, {}
    with open_video(path) as (container, stream, fps):
        stream.thread_type = "AUTO"
        for i, frame in enumerate(container.decode(stream)):
            if wanted is None or i in wanted:
                frames[i] = upright(frame, stream)
            if len(frames) == len(wanted or ()):
                break
    missing = sorted((wanted or {0}) - frames.keys())
    if missing:
        raise UserError(f"{path} has no frame {missing[0]}")
    if len({frame.shape for frame in frames.values()}) > 1:
        raise UserError(f"{path} changes its size on the way")
    return np.stack([frames[int(i)] for i in (sorted(frames) if indices is None else indices)]), fps


def write_video(path, video, fps, zoom=1):
    """Write an mp4 (H.264) from a video (3, T, H, W) in [-1, 1] or uint8 frames (T, H, W, 3), even in H and
    W.
    """
    import av
    if torch.is_tensor(video):
        video = video if video.dtype == torch.uint8 else to_uint8(video).permute(1, 2, 3, 0)
        video = video.cpu().numpy()
    video = video.repeat(zoom, axis=1).repeat(zoom, axis=2)
    T, H, W, _ = video.shape
    assert H % 2 == 0 and W % 2 == 0, f"H.264 needs even sides, not {H} x {W}"
    with av.open(str(path), "w", format="mp4") as container:
        options = {"crf": "12", "mbtree": "0"}                        # with mbtree the bytes depend on chance
        stream = container.add_stream("libx264", rate=int(round(fps)), options=options)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        for frame in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


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
    files = [fingerprint(file) for _, *videos in pairs for file in videos]  # drawn anew, they are judged anew
    page = json.dumps({"id": short_hash(rows, files), "sides": sides, "pairs": rows}).replace("<", "\\u003c")
    template = (HERE / "assets" / "label.html").read_text(encoding="utf-8")
    path.write_text(template.replace(">PAIRS<", f">{page}<"), encoding="utf-8")
    print(f"wrote {path}: open it in a browser to say which of {len(rows)} pairs' videos is better")


def caption_of(score):
    """'VQ 0.98  MQ 0.91  TA 0.66' from oracle scores (3,)."""
    return "  ".join(f"{dim} {x:.2f}" for dim, x in zip(DIMS, score.tolist()))


def markdown(head, rows):
    """A Markdown table from the cells of its head and of each row."""
    lines = [head, *rows]
    text = ["|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in lines]
    return "\n".join([text[0], "|---" * len(head) + "|", *text[1:]])


# ---- the two worlds: what differs between Shapes world and Wan, behind one interface ----

class World:
    """What both worlds do alike."""
    boundary = None                                               # the time that parts two experts, if any

    def t_range(self, expert):
        """The times that an expert, high or low, is for; of a model without experts all. UserError where an
        expert must be named, or cannot be.
        """
        if self.boundary and not expert:
            raise UserError(f"{self.path} has two experts, each with its own run: give --expert high or low")
        if expert and not self.boundary:
            raise UserError(f"--expert {expert} is for Wan 2.2 A14B, which has two")
        return {None: (0.0, 1.0), "high": (self.boundary, 1.0), "low": (0.0, self.boundary)}[expert]


class Shapes(World):
    """Shapes world: its latents are pixels, its text encoder a table of words, and its truth is known."""
    name, fps, zoom, text_len = "shapes", FPS, 8, TEXT_LEN                # zoom: 24 pixels are few to look at
    judges, recipe = ("shapes",), "shapes"                               # judges: what a reward may read here
    prompts, check_prompts = staticmethod(prompts_of), staticmethod(attributes)   # of a split; refuses others
    embed, embed_rows, truth = staticmethod(embed_text), staticmethod(embed_text), staticmethod(oracle)
    pad = staticmethod(torch.stack)

    @property
    def metadata(self):
        """What the weights trained on this world say of it."""
        return {"world": world_hash()}

    def read(self, args, labelled=True):
        """The Pairs of the file args.pairs, or args.n_pairs drawn ones."""
        if not args.pairs:
            return toy_pairs(args.n_pairs, "train", args.seed, labelled=labelled)
        pairs = read_pairs(args.pairs, args.skip_bad)
        self.check_prompts(pairs.prompts)
        return pairs

    def encode(self, pairs, args):
        """The pairs with their videos in memory. UserError names a bad one, unless args.skip_bad."""
        if torch.is_tensor(pairs.videos):
            return pairs
        pairs, clips = look_into(pairs, args, lambda path: to_uint8(read_shapes(path)))
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


def look_into(pairs, args, look, use=lambda path, found: found):
    """(the pairs whose videos can all be used, {video: what use made of what look found in it}).

    look runs in a thread, one video ahead of use. Of several ranks each sees its share. UserError names the
    first bad video by its row; with args.skip_bad such pairs are left out.
    """
    lines, bad, found = {}, {}, {}
    for line, pair in zip(pairs.lines, pairs.videos):
        for path in pair:
            lines.setdefault(path, line)
    mine = list(lines)[RANK::RANKS]
    for future, path in progress(zip(prefetch(look, mine), mine), "videos", total=len(mine)):
        try:
            found[path] = use(path, future.result())
        except UserError as e:
            if not args.skip_bad:
                raise UserError(f"row {lines[path]}: {e}; mend it, or leave such pairs out with "
                                "--skip_bad") from None
            bad[path] = e
    bad, found = merged(bad), merged(found)
    good = [i for i, pair in enumerate(pairs.videos) if not bad.keys() & set(pair)]
    if bad:
        first = next(iter(bad.values()))
        print(f"skipped {len(pairs) - len(good)} pairs with {len(bad)} bad videos, such as: {first}")
    if not good:
        raise UserError("no pair is left: every one has a video that cannot be used")
    return pairs.subset(good), found


def prefetch(load, items):
    """A future of load(item) for each item in turn, the next one being loaded while this one is in use."""
    with ThreadPoolExecutor(1) as pool:
        futures = (pool.submit(load, item) for item in items)
        for future, _ in pairwise(chain(futures, [None])):                      # which is one ahead
            yield future


WAN_FPS, WAN_TEXT_LEN = 16, 512


class Wan(World):
    """The autoencoder and UMT5 text encoder of a Wan 2.1 or 2.2 folder or hub repository in diffusers'
    layout; each is loaded when it is needed and never both. What was encoded lies in a cache, and self.cached
    knows where. Which Wan it is, the folder's own files tell: recipe; fps; boundary, the time that parts the
    two experts of 2.2 A14B, else None.
    """
    name, zoom, text_len = "wan", 1, WAN_TEXT_LEN
    judges, metadata, truth = ("wan", "files"), {}, None                        # nobody knows the truth

    def __init__(self, path, device="cpu"):
        self.path, self.device, self.loaded_vae = path, device, None
        self.cached = {}                                                # {video or prompt: its cached file}
        names = "vae", "text_encoder", "tokenizer", "transformer"
        folder = fetch(path, ["model_index.json", *(f"{name}/*.json" for name in names)])
        for name in names[:3]:
            if not (folder / name).is_dir():
                raise UserError(f"{path} holds no {name}: take a folder or hub repository in diffusers' "
                                "layout, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
            for file in (folder / name).iterdir():
                check_pointer(file)                                             # they are loaded late
        self.config = read_json(folder / "vae" / "config.json")
        self.channels = self.config.get("z_dim", 16)
        index, dit = folder / "model_index.json", folder / "transformer" / "config.json"
        index = read_json(index) if index.exists() else {}
        pipeline = index.get("_class_name", "WanPipeline")
        if pipeline != "WanPipeline":
            raise UserError(f"{path} is a {pipeline}: only text-to-video is supported, a WanPipeline")
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

    def read(self, args, labelled=True):
        """The Pairs of the file args.pairs whose videos are good, all looked into before anything is loaded.
        UserError names a bad one by its row, unless args.skip_bad.
        """
        if not args.pairs:
            raise UserError(f"{args.model} is no toy of Shapes world: --pairs takes a file of pairs, and "
                            "sample.py --n_per_prompt 4 --reward RUN makes one of its own videos")
        return self.look_into(read_pairs(args.pairs, args.skip_bad), args)

    def look_into(self, pairs, args):
        """The pairs whose videos can be opened and are long enough. What was found is remembered."""
        recall = remembered(Path(args.cache) / "videos.jsonl")

        def look(path):
            name, seconds = recall(file_key(path), lambda: (fingerprint(path), video_times(path)[1]))
            check_length(path, seconds, args.frames, self.fps)
            return name
        pairs, self.prints = look_into(pairs, args, look)
        return pairs

    def prompts(self, split, n=None):
        raise UserError("--eval and named splits are of Shapes world: for Wan give --prompts FILE "
                        "--against base --reward RUN")

    def check_prompts(self, prompts):
        """Wan knows every prompt."""

    def latents(self, pairs, rows):
        """x0 (len(rows), 2, C, T, H, W) of A and B, fp32, from the cache."""
        pair = [torch.stack([load_cached(self.cached[path]) for path in pairs.videos[i]]) for i in rows]
        return torch.stack(pair).float()

    def text(self, pairs, rows):
        """Prompt embeddings (len(rows), 512, text_dim), fp32, from the cache."""
        return self.pad([load_cached(self.cached[pairs.prompts[i]]) for i in rows])

    def embed(self, prompts):
        """Text (n, 512, text_dim) fp32 on the CPU, with zeros after the last token as in official Wan."""
        return self.pad(self.embed_rows(prompts))

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
        dtype = torch.bfloat16 if self.device != "cpu" else torch.float32
        encoder = load_part(UMT5EncoderModel, self.part("text_encoder"), dtype=dtype).to(self.device).eval()
        for i in progress(range(0, len(prompts), batch), "prompts"):
            words = tokenizer([prompt_clean(p) for p in prompts[i:i + batch]], padding="max_length",
                              truncation=True, max_length=WAN_TEXT_LEN, return_tensors="pt").to(self.device)
            states = encoder(words.input_ids, words.attention_mask).last_hidden_state.cpu()
            for row, n in zip(states, words.attention_mask.sum(1).tolist()):
                yield row[:n].clone()
        del encoder
        torch.cuda.empty_cache()

    def pad(self, rows):
        """Embeddings [(S, text_dim)] as one fp32 tensor (n, 512, text_dim) with zeros after the last token.
        """
        return torch.stack([F.pad(row.float(), (0, 0, 0, WAN_TEXT_LEN - len(row))) for row in rows])

    def latent_shape(self, frames, size):
        """(C, T, H, W) of the latents of a video. UserError for frames and sizes that cannot be."""
        time = self.config.get("scale_factor_temporal") or 4
        space = self.config.get("scale_factor_spatial") or 8
        if frames < 1 or frames % time != 1:
            raise UserError(f"--frames {frames}: Wan's autoencoder takes {time}k + 1 frames, such as 81")
        if any(x % (2 * space) for x in size):
            raise UserError(f"--size {size[0]},{size[1]}: give multiples of {2 * space}, such as 480,832")
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
        """Latents (B, C, T', H', W') of pixels (B, 3, T, H, W) in [-1, 1]: the posterior's mode, normalised.
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
        """The pairs whose videos can be decoded; their latents and texts are in the folder args.cache, in
        bf16.

        Every distinct video and prompt is encoded once, and what another run left there is used. Each file
        appears whole or not at all, so an interrupted encode goes on where it stopped. Each rank takes its
        share.
        """
        pairs, cache, prompts = self.look_into(pairs, args), Path(args.cache), sorted(set(pairs.prompts))
        vae, *encoder = (fingerprints(self.part(name)) for name in ("vae", "text_encoder", "tokenizer"))
        for path, content in self.prints.items():
            name = short_hash("on screen", content, args.frames, args.size, vae)
            self.cached[path] = cache / f"video-{name}.safetensors"
        for prompt in prompts:
            self.cached[prompt] = cache / f"text-{short_hash(prompt, encoder)}.safetensors"
        files = set(self.cached.values())
        there = sum(map(is_cached, files))
        print(f"{cache} holds {there} of {len(files)} videos and prompts; the rest is encoded now")
        texts = [prompt for prompt in prompts[RANK::RANKS] if not is_cached(self.cached[prompt])]
        for x, prompt in zip(self.embed_rows(texts), texts):                    # to the generator's own end
            save_cached(x.bfloat16(), self.cached[prompt])

        def read(path):
            return None if is_cached(self.cached[path]) else read_clip(path, args.frames, args.size, self.fps)

        def keep(path, clip):
            if clip is not None and not is_cached(self.cached[path]):           # nor a copy of it, meanwhile
                save_cached(self.encode_video(clip[None])[0].bfloat16(), self.cached[path])
        pairs, _ = look_into(pairs, args, read, keep)
        self.loaded_vae = None
        torch.cuda.empty_cache()
        return pairs


def load_part(cls, folder, **settings):
    """An instance of a class of transformers or diffusers from a folder. UserError where it cannot be, or
    lacks weights that would be filled with random numbers.
    """
    is_model = issubclass(cls, torch.nn.Module)
    try:
        part = cls.from_pretrained(folder, **settings, **({"output_loading_info": True} if is_model else {}))
    except Exception as e:                                                      # theirs are of every kind
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"{folder} cannot be loaded, is its download complete? {why}") from None
    if is_model and part[1]["missing_keys"]:
        missing = sorted(part[1]["missing_keys"])
        raise UserError(f"{folder} lacks {len(missing)} tensors, such as {missing[0]}: download it again")
    return part[0] if is_model else part


WanCodec = Wan                                                                # an older name that others call


def clip_frames(path, frames, fps=WAN_FPS):
    """Indices (frames,) of the frames of a video file that are on screen at multiples of 1 / fps second.

    UserError names a file that is no video or too short, see check_length.
    """
    times, seconds, *_ = video_times(path)
    check_length(path, seconds, frames, fps)
    return np.searchsorted(times, np.arange(frames) / fps + 1e-6, side="right") - 1


def check_length(path, seconds, frames, fps):
    """UserError names a video that lasts less than (frames - 1) / fps seconds, and the frames that would fit.
    """
    if seconds < (frames - 1) / fps:
        fits = int(seconds * fps) // 4 * 4 + 1
        raise UserError(f"{path} lasts {seconds:.2f} s, too short for {frames} frames at {fps} a second "
                        f"(--frames {fits} would fit)")


def read_clip(path, frames, size, fps=WAN_FPS):
    """Pixels (3, frames, H, W) in [-1, 1] of a video file: at fps frames per second, scaled to cover
    size = (H, W), centre-cropped. UserError names a file that cannot be used.
    """
    wanted, places = np.unique(clip_frames(path, frames, fps), return_inverse=True)
    x = torch.from_numpy(read_video(path, wanted)[0][places]).permute(0, 3, 1, 2).float()       # (T, 3, H, W)
    (h, w), (H, W) = x.shape[2:], size
    scale = max(H / h, W / w)
    h, w = max(H, round(h * scale)), max(W, round(w * scale))
    x = F.interpolate(x, (h, w), mode="bicubic", antialias=True).clamp(0, 255)
    top, left = (h - H) // 2, (w - W) // 2
    return to_float(x[:, :, top:top + H, left:left + W]).transpose(0, 1)


def load_cached(file):
    """The one tensor of a file of the cache. UserError names a file whose bytes have changed since."""
    tensors, metadata = read_tensors(file)
    if metadata.get("sha256", "") not in ("", sha256(tensors["x"])):
        raise UserError(f"{file} is damaged: delete it, and the same command with --resume makes it again")
    return tensors["x"]


def is_cached(file):
    """Whether the file is there and whole: safetensors' header knows how long it must be."""
    try:
        return bool(read_tensors(file, metadata_only=True))
    except UserError:
        return False


def save_cached(x, file):
    """Write one tensor."""
    from safetensors.torch import save
    x = x.contiguous()
    write_whole(file, save({"x": x}, {"sha256": sha256(x)}))


def sha256(x):
    """The SHA-256 of a tensor's bytes."""
    return hashlib.sha256(x.view(torch.uint8).numpy().tobytes()).hexdigest()


def short_hash(*facts):
    """A name for some facts that JSON can hold."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def fingerprint(path):
    """A name for a file's content: of its size and its first and last 1 MiB. UserError where it can't be
    read.
    """
    try:
        with open(path, "rb") as file:
            ends, size = file.read(2**20), file.seek(0, os.SEEK_END)
            file.seek(max(size - 2**20, 0))
            ends += file.read()
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    return hashlib.sha256(ends + str(size).encode()).hexdigest()[:32]


def fingerprints(folder):
    """The fingerprints of the files in a folder."""
    return [fingerprint(file) for file in sorted(folder.iterdir()) if file.is_file()]


def file_key(path):
    """(path, size, time of change) of a file, by which what was found out about it is remembered."""
    try:
        stat = os.stat(path)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    return str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns


def remembered(file):
    """A function of a key, a tuple that JSON can hold, and of compute: the value of compute(), which is at
    once added to the file, a line of JSON, and never computed again for this key: an interrupted run goes on
    where it stopped.
    """
    known, text = {}, file.read_text(encoding="utf-8") if file.exists() else ""
    if text and not text.endswith("\n"):                                   # cut short by an interruption
        with open(file, "a", encoding="utf-8") as lines:
            lines.write("\n")
    for line in text.splitlines():
        with suppress(ValueError):                                              # of the line that was cut
            key, value = json.loads(line)
            known[tuple(key)] = value

    def recall(key, compute):
        if key not in known:
            known[key] = compute()
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(f"{json.dumps([key, known[key]])}\n")
        return known[key]
    return recall


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


def whole_of(folders):
    """The first of a lineage that has whole weights, not adapters."""
    return next(folder for folder in folders if not (Path(folder) / "lora.safetensors").exists())


def run_args(path):
    """The arguments of the run at path; {} of a model that is no run."""
    file = (find(path) or Path(path)) / "config.json"
    args = read_json(file).get("args") if file.exists() else None
    return args if isinstance(args, dict) else {}


def weights_file(folder):
    """The file with a toy's whole weights; it does not exist of Wan in several files or on the hub."""
    return Path(folder) / "transformer" / "diffusion_pytorch_model.safetensors"


def metadata_of(file):
    """The metadata of a safetensors file, {} where it does not exist."""
    return read_tensors(file, metadata_only=True)[1] if file.exists() else {}


def start_of(folder):
    """A short hash of the whole weights in a folder, by which adapters trained on them know them again; "" of
    Wan in several files or on the hub.
    """
    file = weights_file(folder)
    return fingerprint(file) if file.exists() else ""


def world_of(path, device="cpu", base=None):
    """The world of the model at path, which its pretrained weights tell; base: see lineage."""
    root = lineage(path, base)[-1]
    return Shapes() if "world" in metadata_of(weights_file(root)) else Wan(root, device)


# ---- runs: several processes, started by torchrun; alone, all of this changes nothing ----

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_ranks():
    """Join the other processes, on this one's GPU if there are any; only rank 0 prints."""
    if RANKS == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
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
    shares = all_gather(mine)
    rows = [None] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        rows[rank::RANKS] = share
    return rows


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
    """[(rows, their noise_samples)] of the micro-batches that go through the model in turn: this rank's share
    of the rows (n,) of a step.
    """
    n, samples = len(rows), noise_samples(rows)
    batches = torch.arange(n)[RANK::RANKS].split(-(-n // accumulate))
    return [(rows[places], [samples[i] for i in places]) for places in batches]


# ---- runs: randomness ----

def rng(*key):
    """A torch.Generator that is a function of its key, such as ("noise", seed, step, sample)."""
    key = [zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key]
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


def noise_samples(rows):
    """The rows of a step as draw_noise takes them: the k-th repetition of a row is (row, k), so that it has
    noise of its own.
    """
    count, samples = Counter(), []
    for row in rows.tolist():
        samples.append((row, count[row]) if count[row] else row)
        count[row] += 1
    return samples


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
    least = 1

    def __new__(cls, text):
        if not str(text).isdecimal() or int(text) < cls.least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number, {cls.least} or more")
        return super().__new__(cls, text)


class Seed(Count):
    """A seed: a whole number, 0 or more."""
    least = 0


class Size(tuple):
    """Height and width in pixels, such as 480,832."""

    def __new__(cls, text):
        if not re.fullmatch(r"[1-9]\d*,[1-9]\d*", text):
            raise argparse.ArgumentTypeError(f"{text} is not height,width in pixels, such as 480,832")
        return super().__new__(cls, map(int, text.split(",")))


class Weights(tuple):
    """The weights of VQ, MQ, TA, not all 0, such as 0.5,0.5,0."""

    def __new__(cls, text):
        numbers = [float(x) for x in text.split(",")]
        if len(numbers) != len(DIMS) or not any(numbers):
            raise argparse.ArgumentTypeError(f"{text} is not 3 numbers, not all 0, for {', '.join(DIMS)}; "
                                             "such as 0.5,0.5,0")
        return super().__new__(cls, numbers)


def recipes(names, rows):
    """{flag: {name: value}} of a table {flag: a value for each of the names}: what flags that are unset fall
    to.
    """
    return {flag: dict(zip(names, row)) for flag, row in rows.items()}


def parse_args(cls, doc, argv=None, recipe={}):
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
        known = [] if f.default in (None, (), "") else [as_word(f.default)]
        known += [f"{name} {as_word(x)}" for name, x in recipe.get(f.name, {}).items() if x is not None]
        options = dict(default=f.default, help=f"{note} [{', '.join(known)}]" if known else note)
        if typing.get_origin(kind) is typing.Literal:
            options |= dict(choices=typing.get_args(kind))
        elif kind is bool:
            options |= dict(action=argparse.BooleanOptionalAction)
        elif kind is list:
            options |= dict(nargs="+", metavar=f.name.upper())
        else:
            options |= dict(type=kind, metavar=kind.__name__.upper())
        parser.add_argument(f"--{f.name}", **options)
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(f"{e} (--help lists every flag)") from None
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{f.name}" for f in fields(cls)], 1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown argument {unknown[0]}{hint} (--help lists every flag)")
    return cls(**vars(args))


def as_word(value):
    """A flag's value as it is typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def fill(args, values):
    """Set the flags of args that are unset to these values {flag: value}."""
    for flag, value in values.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)


def launch(main, cls, doc, argv=None, recipe={}):
    """Run main with the arguments of the command line. What the user can mend, and a file or disk that fails,
    ends in one line and exit status 2; of several processes the one at fault says it, and torchrun ends the
    rest, which may be waiting for it.
    """
    for stream in (sys.stdout, sys.stderr):                         # a name that it can't print stops nothing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        result = main(parse_args(cls, doc, argv, recipe))
    except (UserError, OSError) as e:
        rank = f" rank {RANK}:" if RANKS > 1 else ""
        print(f"error:{rank}", *str(e).splitlines(), file=sys.stderr)
        raise SystemExit(2) from None
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def command(args):
    """The command line that makes these arguments again."""
    words = ["python", Path(inspect.getfile(type(args))).name]
    for name, value in vars(args).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value not in (None, (), "", []):
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [as_word(value)])]
    return shlex.join(words)


def check_out(out, *models, base=None, inputs=()):
    """Refuse an --out that cannot become a folder, that is one of these models or what it started from, or
    that holds one of the inputs.
    """
    parent = next(p for p in (Path(out).absolute(), *Path(out).absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "read-only" if parent.is_dir() else "a file"
        raise UserError(f"--out {out} cannot be written ({parent} is {why}): name another folder")
    for path in filter(None, inputs):
        if Path(out).resolve() in (Path(path).resolve(), Path(path).resolve().parent):
            raise UserError(f"--out {out} holds {path}, which is read: name another folder")
    for folder in [folder for model in models for folder in lineage(model, base)]:
        if Path(out).resolve() == Path(folder).resolve():
            raise UserError(f"--out {out} is the model itself or what it started from: name another folder")


# ---- runs: folder, log, states ----

def write_json(path, value):
    """Write value as JSON."""
    write_whole(path, json.dumps(value, indent=1).encode())


def read_log(folder):
    """The events in a run's log.jsonl; a last line without an end is left out."""
    file = Path(folder) / "log.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def content_hash(path):
    """The first 16 digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def contents(args):
    """{flag: a hash} of what the flags name here: the weights in a folder, or a file; and "start", see
    start_of.
    """
    found = {}
    for flag in ("model", "ckpt", "against", "lora", "pairs", "reward", "nrg", "eval"):
        paths, files = getattr(args, flag, None) or [], []
        for path in [paths] if isinstance(paths, str) else paths if isinstance(paths, list) else []:
            place = Path(path) if Path(path).exists() else HERE / path
            weights = [*place.glob("*.safetensors"), *place.glob("transformer/*.safetensors")]
            files += [place] if place.is_file() else sorted(weights)
        if files:
            found[flag] = short_hash(*(fingerprint(file) for file in files))
    if getattr(args, "loss", "") != "pretrain" and "model" in found and not getattr(args, "ckpt", ""):
        found["start"] = start_of(whole_of(lineage(args.model)))
    return found


@on_rank_0
def make_folder(args, device, longer):
    """Make the folder args.out and its config.json; returns whether an earlier run there is to go on, and
    contents.

    With args.resume it must have had the same arguments, with longer but for more steps, and what they name
    must not have changed; without, it is renamed and kept.
    """
    folder, now = Path(args.out), {"args": vars(args), "contents": contents(args)}
    file, going_on = folder / "config.json", False
    if getattr(args, "resume", False) and file.exists():
        own, before = read_json(file).get("contents", {}), run_args(folder)
        free = {"resume", "steps"} if longer else {"resume"}
        other = [f"--{k} was {before.get(k)}, not {v}" for k, v in json.loads(json.dumps(vars(args))).items()
                 if k not in free and before.get(k) != v]
        if other:
            raise UserError(f"--resume: {folder} was made by another command ({'; '.join(other[:3])}): give "
                            "the same arguments")
        for flag, value in now["contents"].items():
            if own.get(flag, value) != value:
                raise UserError(f"--resume: {getattr(args, flag, args.model)} has changed since {folder} "
                                "began: bring it back, or start anew")
        going_on = True
    if file.exists() and not going_on:
        n = next(n for n in count(1) if not Path(f"{folder}.{n}").exists())
        folder.rename(f"{folder}.{n}")
        print(f"{folder} held an earlier run: it is now {folder}.{n}")
    folder.mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", HERE, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout if shutil.which("git") else ""
    write_json(file, {
        "command": command(args), **now, "commit": commit.strip(), "world": world_hash(),
        "torch": torch.__version__, "python": sys.version.split()[0], "device": str(device),
        "threads": torch.get_num_threads()})
    return going_on, now["contents"]


class Run:
    """A run's folder and its step clock.

    folder: where it is. events: what its log.jsonl holds. seen: what `see` was told of each step since the
    last log, a list of (B, columns), in the order of the step's rows; names: the columns. bar: its progress
    bar.
    """

    def __init__(self, args, device="cpu", longer=False):
        self.folder, self.args = Path(args.out), args
        self.going_on, self.contents = make_folder(args, device, longer)
        self.events, self.seen, self.now, self.names, self.started = [], [], [], (), time.time()

    def steps(self, total, **state):
        """The numbers of the steps that are left to do. Between them the state {name: module, optimizer of
        the module named model, list or None} is saved, every args.save_every steps and when Ctrl-C asks to
        stop.
        """
        self.state = {name: x for name, x in (state | {"seen": self.seen}).items() if x is not None}
        first = self.load() if self.going_on else 0
        asked, before = threading.Event(), signal.getsignal(signal.SIGINT)

        def ask(*_):
            asked.set()
            signal.signal(signal.SIGINT, before)
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        signal.signal(signal.SIGINT, ask)
        try:
            self.bar = progress(range(first, total), self.folder.name, initial=first, total=total, leave=True,
                                disable=RANK > 0)
            for self.step in self.bar:
                yield self.step
                done, stop = self.step + 1, any(all_gather(asked.is_set()))     # it reaches each rank in time
                if stop or done == total or done % self.args.save_every == 0:
                    self.save(done)
                if done < total and stop:
                    self.bar.close()
                    raise UserError(f"stopped after step {done}: the same command with --resume goes on")
        finally:
            signal.signal(signal.SIGINT, before)

    def see(self, **columns):
        """Keep values of this step's micro-batch, each (b,), one a sample."""
        self.names = tuple(columns)
        self.now.append(torch.stack(list(columns.values()), dim=1).detach())

    def check(self, rows, grad_norm, **facts):
        """Put together what all ranks saw of this step. If it or the gradient is not finite, stop before a
        weight moves, and write the facts, with the rows' names, to broken.json.
        """
        values = torch.tensor(gather_rows(torch.cat(self.now).tolist()))
        self.now = []
        if values.isfinite().all() and grad_norm.isfinite():
            self.seen.append(values)
            return
        self.save(self.step)
        facts = {"step": self.step + 1, "grad_norm": grad_norm.item(), "rows": rows,
                 **dict(zip(self.names, values.T.tolist())), **facts}
        file, facts = self.folder / "broken.json", json.loads(json.dumps(facts), parse_constant=str)
        on_rank_0(write_json)(file, facts)                                   # JSON has no nan: they are words
        self.bar.close()
        raise UserError(f"step {facts['step']}: loss or gradient is not finite; {file} has its rows, t and "
                        "losses, and --resume repeats it: look at those, or start again with a lower --lr")

    def log(self, **event):
        """Add an event of this step to log.jsonl, and forget what was seen."""
        self.events.append({"time": round(time.time(), 1), "step": self.step + 1, **event})
        self.seen.clear()
        self.write_log()

    def write_log(self):
        """Write log.jsonl, an event a line."""
        lines = "".join(json.dumps(event) + "\n" for event in self.events)
        on_rank_0(write_whole)(self.folder / "log.jsonl", lines.encode())

    def save(self, step):
        """Write what training needs to go on after step; the last two states are kept."""
        if step == 0:                                                         # the optimizer has no state yet
            return
        saved = {"step": step}
        for name, value in self.state.items():                    # all ranks put together what is sharded
            if isinstance(value, torch.nn.Module):
                saved[name] = state_dicts.get_model_state_dict(value, options=WHOLE)
            elif isinstance(value, torch.optim.Optimizer):
                saved[name] = state_dicts.get_optimizer_state_dict(self.state["model"], value, options=WHOLE)
            else:
                saved[name] = value
        on_rank_0(write_state)(self.folder, saved)

    def load(self):
        """Bring the state to the newest whole one, and the log back to it; returns its step, 0 if there is
        none.
        """
        saved = read_state(self.folder) or {"step": 0}
        for name, value in self.state.items() if saved["step"] else ():
            if isinstance(value, torch.nn.Module):
                state_dicts.set_model_state_dict(value, saved[name], options=WHOLE)
            elif isinstance(value, torch.optim.Optimizer):
                state_dicts.set_optimizer_state_dict(self.state["model"], value, saved[name], options=WHOLE)
            else:
                value[:] = saved[name]
        self.events = [event for event in read_log(self.folder) if event["step"] <= saved["step"]]
        self.write_log()
        return saved["step"]


# States hold whole tensors on the CPU, and of a module what is trained, however it is spread over the ranks.
WHOLE = state_dicts.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True,
                                     strict=False)


def write_state(folder, state):
    """Write a state to folder/state-<step>-<hash>.pt: the file gets its name, with the hash of its content in
    it, when it is complete.
    """
    try:
        torch.save(state, folder / "state.tmp")
    except RuntimeError as e:                                                  # torch's answer to a full disk
        raise OSError(f"{folder / 'state.tmp'} cannot be written: {e}") from None
    name = f"state-{state['step']:07}-{content_hash(folder / 'state.tmp')}.pt"
    os.replace(folder / "state.tmp", folder / name)
    for old in sorted(folder.glob("state-*-*.pt"))[:-2]:
        old.unlink()


def read_state(folder):
    """The newest whole state in folder; None if there is none."""
    for file in sorted(folder.glob("state-*-*.pt"), reverse=True):
        if content_hash(file) == file.stem.split("-")[2]:
            state = torch.load(file, weights_only=True, map_location="cpu")
            print(f"going on after step {state['step']} of {file}")
            return state
        print(f"{file} is damaged: going back to the one before it")
    print(f"{folder} holds no whole state: starting at step 0")
    return None


# ---- the script ----

def shapes_sheet(path):
    """Draw videos of the twelve renderers with their oracle scores, each beside a flawless one."""
    prompts = PROMPTS[::6]                                                 # 12 of them, one for each renderer
    bad, good = render_as(torch.arange(len(RENDERERS)), prompts, rng(0)).float(), clean_videos(prompts)
    tiles = [(prompt, [thumbnails(a), thumbnails(b)], f"{name}:  {caption_of(score)}")
             for prompt, a, b, name, score in zip(prompts, bad, good, RENDERERS, oracle(bad, prompts))]
    moving_sheet(path, tiles, FRAMES / FPS)


def main(args):
    """Write the labelling page of a pairs file or of two folders; without either, shapes.webp."""
    paths = [Path(path) for path in args.label]
    if not paths:
        shapes_sheet("shapes.webp")
        print("wrote shapes.webp: twelve renderers with their oracle scores, each beside a flawless video")
    elif len(paths) == 1:
        pairs = read_pairs(paths[0])
        rows = [(prompt, *videos) for prompt, videos in zip(pairs.prompts, pairs.videos)]
        label_page(paths[0].with_suffix(".html"), rows)
    elif len(paths) == 2:
        names = sorted(set.intersection(*({file.name for file in folder.glob("*.mp4")} for folder in paths)))
        if not names:
            raise UserError(f"{paths[0]} and {paths[1]} share no .mp4 of equal name, such as <prompt>-0.mp4")
        prompts = [re.sub(r"-\d+$", "", Path(name).stem) for name in names]
        pairs = [(prompt, *(folder / name for folder in paths)) for prompt, name in zip(prompts, names)]
        label_page(paths[0].absolute().parent / "label.html", pairs, [str(path) for path in paths])
    else:
        raise UserError("label takes a pairs file or two folders")


@dataclass
class Args:
    label: list = ()       # a pairs file, or two folders of .mp4 with equal names: write the labelling page


if __name__ == "__main__":
    words = sys.argv[1:]
    launch(main, Args, __doc__, ["--label", *words[1:]] if words[:1] == ["label"] else words)
