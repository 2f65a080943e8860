"""Euler sampling, classifier-free guidance and Flow-NRG; writes videos; win rates, comparison of runs.

    python sample.py --prompt "a red circle moving left"                         videos of the toy base
    python sample.py --ckpt runs/dpo --prompt "a red circle moving left" --nrg assets/noisy --dim_w 0.5,0.5,0
    python sample.py --nrg assets/noisy --dim_w 0,0,1 --eval 512                 win rates of guidance
    python sample.py --prompts train --n_per_prompt 4 --reward assets/reward     on-policy pairs
    python sample.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --lora lora.safetensors --prompt "a cat asleep"
    python sample.py --ckpt runs/wan --prompts prompts.csv --against base --reward runs/videoreward
    python sample.py --compare runs/sft runs/rwr runs/dpo                        one table, one picture
    python sample.py --compare runs/beta_* --x beta --out beta.png               one figure
    python sample.py --compare runs/dpo --x step --y loss implicit_acc           a run's log over its steps

A velocity is a function of (x, t), t a number; cfg and nrg take velocities and return one. Sampling runs from
t = 1 (noise) to t = 0 (data): x <- x - (t - t_next) v. Each model has a guidance scale that suits it, and
alignment moves that: sweep --cfg with --split val, and give --compare those runs and the held-out ones.
"""
import csv
import json
import re
from collections import defaultdict
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data import (DIMS, DTYPES, FRAMES, RANK, RANKS, SIZE, Count, Numbers, Run, Shapes, check_dim_w,
                  check_world, clean_videos, fill_unset, free_folder, gather_rows, label_page, launch,
                  lineage, markdown, merged, metadata_of, moving_sheet, normalised, on_rank_0, oracle,
                  overall, progress, read_log, read_table, recipes, rng, run_args, start_ranks, text_of,
                  thumbnails, to_float, to_uint8, toy_weights, weights_hash, whole_weights, with_overall,
                  world_of, write_json, write_video)
from model import (Experts, UserError, VideoDiT, find, load_lora, lora_disabled, read_json, read_tensors,
                   save_tensors)
from reward import LatentReward, check_reward, load_reward

# What unset flags fall to: the toy's, and of Wan its own README's. The converter to diffusers writes a shift
# of 3 into the folder of 2.2 A14B, whose own is 12.
RECIPES = recipes(("shapes", "wan", "wan-14b", "wan-2.2-a14b", "wan-2.2-5b"), {
    "steps":   (16,           50,         50,         40,         50),
    "shift":   (3.0,          8.0,        5.0,        12.0,       5.0),
    "cfg":     (4.5,          6.0,        5.0,        4.0,        5.0),
    "cfg_low": (None,         None,       None,       3.0,        None),
    "frames":  (FRAMES,       81,         81,         81,         121),
    "size":    ((SIZE, SIZE), (480, 832), (480, 832), (480, 832), (704, 1280)),
    "batch":   (64,           1,          1,          1,          1),
})
BEST_CFG = RECIPES["shapes"]["cfg"]           # at which the shipped base draws best, on validation prompts


# ---- the sampler ----

def timesteps(n, shift=1.0):
    """n + 1 decreasing times from 1 to 0: evenly spaced, then shift t / (1 + (shift - 1) t), as official Wan.

    A shift above 1 spends more of the steps near noise.
    """
    t = torch.linspace(1, 0, n + 1)
    t = shift * t / (1 + (shift - 1) * t)
    t[0], t[-1] = 1, 0                                                          # whatever the rounding
    return t


def euler(velocity, eps, ts):
    """x at the last of the decreasing times ts, from noise eps at the first. App. C."""
    x = eps
    for t, t_next in zip(ts[:-1], ts[1:]):
        x = x - (t - t_next) * velocity(x, t)
    return x


def cfg(velocity, velocity_null, scale):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): v_null + scale (v - v_null)."""
    def guided(x, t):
        v_null = velocity_null(x, t)
        return v_null + scale * (velocity(x, t) - v_null)
    return guided


def nrg(velocity, reward, rg_scale, dim_w=(1.0, 1.0, 1.0), max_ratio=float("inf")):
    """Flow-NRG: v - rg_scale t / (1 - t) grad_x sum_k dim_w_k r_k(x, t). Eq. 11 and App. C.

    reward(x, t): normalised scores (B, K) of the noisy x, differentiable. The minus sign raises r, because
    sampling steps along -v. The gradient is of the sum over the batch, so that no sample depends on its
    neighbours, and in fp32. At t = 1 the factor is infinite and guidance is skipped, as in the paper.
    max_ratio: each sample's guidance is shortened to at most this multiple of its velocity's norm (not in the
    paper: a reward trained with shared noise has a gradient that grows like 1 / (1 - t), see README).
    """
    def guided(x, t):
        v = velocity(x, t)
        if t >= 1:
            return v
        with torch.enable_grad():
            x = x.detach().float().requires_grad_()
            r = reward(x, t)
            grad, = torch.autograd.grad((r * torch.as_tensor(dim_w, dtype=r.dtype, device=r.device)).sum(), x)
        push = rg_scale * t / (1 - t) * grad
        ratio = push.flatten(1).norm(dim=1) / v.float().flatten(1).norm(dim=1).clamp(min=1e-12)     # (B,)
        keep = (max_ratio / ratio.clamp(min=1e-12)).clamp(max=1).view(-1, *[1] * (x.dim() - 1))
        return v - (keep * push).type_as(v)
    return guided


# ---- models and drawing ----

def expert_of(path):
    """Which expert of Wan 2.2 A14B the run at path is of; None of others and of a pretrained model."""
    return run_args(path).get("expert")


def load_model(path, dtype=torch.float32, expert=None, base=None):
    """The VideoDiT at path, in eval mode, with its adapters on where it was trained with LoRA.

    dtype: of its linear maps; expert: high or low, of a pretrained Wan 2.2 A14B, as a run knows its own;
    base: where the model that the run started from is now.
    """
    folders, expert = lineage(path, base), expert_of(path) or expert
    start = whole_weights(folders)
    whole = metadata_of(toy_weights(start))
    if "world" in whole:
        check_world(whole, toy_weights(start))
    low = expert == "low" and start == folders[-1]                              # not of a run of all weights
    model = VideoDiT.from_pretrained(start, dtype, "transformer_2" if low else "transformer")
    if start != folders[0]:
        lora = folders[0] / "lora.safetensors"
        if metadata_of(lora).get("start") not in (None, weights_hash(start)):
            raise UserError(f"{path} was trained on another model than {start} is now: bring that one back")
        load_lora(model, lora)
    return model.eval().requires_grad_(False)


def load_all(paths, world, dtype, loras=(), base=None, device="cpu"):
    """The model of a path on the device or, of Wan 2.2 A14B, its Experts, which come there in their turn;
    paths may be runs of one expert, beside which the other is the plain one, or of both. loras: files that go
    on the model one after the other or, of two experts, one on each, the high-noise one first.
    """
    runs = {expert_of(path): path for path in paths}                            # None: of both experts
    if len(runs) < len(paths):
        raise UserError(f"{' and '.join(paths)}: two runs must be one of each expert of Wan 2.2 A14B")
    plain = runs.get(None, lineage(paths[0], base)[-1])
    experts = ("high", "low") if world.boundary else (None,)
    models = [load_model(runs.get(expert, plain), dtype, expert, base) for expert in experts]
    for i, file in enumerate(loras):
        load_lora(models[i % len(models)], file)
    models[0].to(device)
    if not world.boundary:
        return models[0]
    high, low = (runs.get(expert, plain) for expert in experts)
    print(f"two experts: {high} for t from {world.boundary} up, {low} below")
    return Experts(*models, world.boundary)


def start_model(args, model, world, device):
    """A context manager that gives the model to compare with: the run that --against names; for base, the
    model without its adapters; unset, the model. A run takes the model's place, so that memory never holds
    the weights of both.
    """
    if args.against == "base":
        return lora_disabled(model)
    if args.against:
        model.to("meta")                                                # frees it, whoever still names it
        model = load_all([args.against], world, DTYPES[args.dtype], device=device)
    return nullcontext(model)


@torch.no_grad()
def generate(model, world, prompts, texts, seed, ts, size=(FRAMES, SIZE, SIZE), cfg_scale=1.0, negative="",
             batch=64, cfg_low=None, done=frozenset(), reward=None, **guidance):
    """Yield (i, latents (C, T', H', W'), video (3, T, H, W) in [-1, 1]) of each prompts[i], on the CPU.

    texts: embed_all of prompts and negative; size: frames, height, width of the videos; ts: decreasing times
    from 1 to 0; cfg_low: the guidance scale of the low-noise one of two experts. The i-th noise is a function
    of (seed, i). Of several ranks each draws its share, prompts[RANK::RANKS]. done: a set of i that need not
    be drawn; a batch is left out only as a whole, so that the others keep their bits. UserError names the
    prompt of a video that is not finite.
    """
    shape = world.latent_shape(size[0], size[1:])
    device = next((p.device for p in model.parameters() if p.is_cuda), torch.device("cpu"))   # of an expert's
    mine = range(RANK, len(prompts), RANKS)
    batches = [mine[i:i + batch] for i in range(0, len(mine), batch)]
    for ids in progress([ids for ids in batches if not done.issuperset(ids)], "sampling"):
        text = world.pad_text([texts[prompts[i]] for i in ids]).to(device)
        null = world.pad_text([texts[negative]]).to(device).expand_as(text)
        eps = torch.stack([torch.randn(shape, generator=rng("eval", seed, i)) for i in ids]).to(device)

        def given(text, ask=model):                                             # one time for the whole batch
            return lambda x, t: ask(x, t.to(x).expand(len(x)), text)

        def velocity(x, t):
            scale = cfg_low if world.boundary and t < world.boundary else cfg_scale     # of the expert of t
            return given(text)(x, t) if scale == 1 else cfg(given(text), given(null), scale)(x, t)

        guided = velocity if reward is None else nrg(velocity, given(text, reward.score), **guidance)
        for i, x in zip(ids, euler(guided, eps, ts)):
            video = world.decode(x[None])[0]
            if not (x.isfinite().all() and video.isfinite().all()):
                raise UserError(f"the video of '{prompts[i]}' is not finite: look for nan in the weights")
            yield i, x.cpu(), video


def embed_all(world, prompts, negative=""):
    """{prompt: its embedding (S, text_dim), unpadded} of the distinct ones of prompts and negative."""
    distinct = list(dict.fromkeys([*prompts, negative]))
    return dict(zip(distinct, [*world.embed_rows(distinct)]))


def toy_videos(model, prompts, seed, steps=16, cfg_scale=BEST_CFG):
    """Videos (n, 3, T, H, W) in [-1, 1] of prompts of Shapes world by its default sampler."""
    world, ts = Shapes(), timesteps(steps, RECIPES["shapes"]["shift"])
    texts = embed_all(world, prompts)
    return stacked(generate(model, world, prompts, texts, seed, ts, cfg_scale=cfg_scale))


def stacked(drawn):
    """The videos (n, 3, T, H, W) of what generate yields, of all ranks in order."""
    return torch.stack(gather_rows([video for _, _, video in drawn]))


# ---- win rates ----

def win_rate(r, r_start):
    """Share of samples (n,) with r > r_start; exact ties are dropped as in the paper. 0.5 if none is left."""
    wins, losses = (r > r_start).sum().item(), (r < r_start).sum().item()
    return wins / (wins + losses) if wins + losses else 0.5


def by_dimension(values):
    """{"VQ", "MQ", "TA", "Overall": value} of three or four numbers, rounded to four digits."""
    return {dim: round(float(x), 4) for dim, x in zip((*DIMS, "Overall"), values)}


def win_rates(r, r_start):
    """The win rates by_dimension of normalised scores r over r_start (n, 3); Overall is of their means."""
    return by_dimension(map(win_rate, with_overall(r).T, with_overall(r_start).T))


def gap_closed(score, start, clean):
    """The share of the way from the start's mean score to that of clean videos that was gone, by_dimension,
    of oracle scores (n, 3) each.
    """
    end, begin, goal = (with_overall(normalised(x)).mean(0) for x in (score, start, clean))
    return by_dimension((end - begin) / (goal - begin))


def pixel_statistics(videos):
    """What a hacked reward likes to spoil, of videos (.., 3, T, H, W): means of motion (change from frame to
    frame), saturation and brightness, in [0, 1].
    """
    x = (videos + 1) / 2
    values = {"motion": x.diff(dim=-3).abs(), "saturation": x.amax(-4) - x.amin(-4), "brightness": x}
    return {name: round(x.mean().nan_to_num().item(), 4) for name, x in values.items()}


def hacking(result):
    """A warning where the reward prefers the new videos, but the oracle does not, or a pixel statistic fell
    by 30 %. "" where all is well or no reward was asked.
    """
    reward, truth = (result.get(key, {"Overall": 0})["Overall"] for key in ("win_rate_reward", "win_rate"))
    changes = [(name, old, result["pixels"][name]) for name, old in result["pixels_start"].items()]
    faults = [f"{name} fell from {old:.3f} to {new:.3f}" for name, old, new in changes if new < 0.7 * old]
    if truth < 0.5:
        faults.append(f"the oracle prefers them in {truth:.0%} only")
    said = f"reward hacking? The reward prefers the videos in {reward:.0%}, but {', '.join(faults)}"
    return said if reward > 0.5 and faults else ""


def evaluate(videos, start, prompts, reward=None, best=None):
    """Judge videos of Shapes world against the start model's, made from the same noise: by the oracle, and by
    the reward that labelled the pairs. best: the start's videos at the guidance where it draws best, if start
    was drawn at another.

    Returns "win_rate", "win_rate_reward", "gap_closed" on the way from start to flawless videos, and
    "gap_closed_best" on the way from best, each {"VQ", "MQ", "TA", "Overall"}; the oracle's mean scores
    "oracle", "oracle_start" and "oracle_clean", each {"VQ", "MQ", "TA"}; "pixels" and "pixels_start", the
    pixel_statistics; and "n", the number of videos.
    """
    new, old, clean = (oracle(x, prompts) for x in (videos, start, clean_videos(prompts)))
    result = {"win_rate": win_rates(normalised(new), normalised(old))}
    if reward is not None:
        text = Shapes().embed(prompts)
        r, r_start = (reward.score_drawn(x, text, None, prompts) for x in (videos, start))
        result["win_rate_reward"] = win_rates(r, r_start)
    return result | {
        "gap_closed": gap_closed(new, old, clean),
        "gap_closed_best": gap_closed(new, old if best is None else oracle(best, prompts), clean),
        "oracle": by_dimension(new.mean(0)), "oracle_start": by_dimension(old.mean(0)),
        "oracle_clean": by_dimension(clean.mean(0)), "pixels": pixel_statistics(videos),
        "pixels_start": pixel_statistics(start), "n": len(prompts)}


@on_rank_0
def report(folder, result, prompts=(), videos=None, start=None):
    """Print a result, with a warning where it looks like reward hacking, and write it into a run's folder, as
    eval.json; of Shapes world also the first videos, as samples.safetensors and as samples.webp.
    """
    write_json(folder / "eval.json", result)
    print_results([(run_args(folder).get("cfg", BEST_CFG), [folder])], {folder: result})
    if videos is not None:
        if hacking(result):
            print(hacking(result))
        save_tensors({"videos": to_uint8(videos[:12]), "start": to_uint8(start[:12])},
                     folder / "samples.safetensors", {"prompts": json.dumps(prompts[:12])})
        draw_samples([folder], folder / "samples.webp")


# ---- comparison and figures ----

def words(x):
    """An argument as text, of paths their last part: runs/0/dpo and runs/1/dpo are called alike."""
    return " ".join(Path(str(y)).name for y in (x if isinstance(x, list) else [x]))


def rows_of(folders, results):
    """[(guidance, run folders)], the rows of a table of runs with these results.

    Runs are seeds of one row if the words of their arguments differ in the seed alone. Where two have equal
    seeds too, something else was changed, such as the code: each is then a row of its own.

    A method's best guidance is chosen on validation prompts. Where runs that differ in --cfg, --split,
    --eval and seeds alone were drawn at some guidance on both, validation and held-out prompts, one row is
    left: the held-out one at that guidance whose validation runs have the largest mean Overall
    gap_closed_best.
    """
    methods, rows = defaultdict(lambda: defaultdict(list)), []
    all_args = {folder: run_args(folder) for folder in folders}
    for folder, args in all_args.items():
        varied = "seed", "out", "resume", "cfg", "split", "eval"
        method = str({flag: words(x) for flag, x in args.items() if flag not in varied})
        methods[method][args.get("split", "eval"), args.get("cfg", BEST_CFG)].append(folder)
    for points in methods.values():
        closed = {cfg: np.mean([results[run]["gap_closed_best"]["Overall"] for run in points["val", cfg]])
                  for split, cfg in points if split == "eval" and ("val", cfg) in points}
        for split, cfg in [("eval", max(closed, key=closed.get))] if closed else points:
            runs = points[split, cfg]
            seeds = {all_args[run].get("seed") for run in runs}
            sizes = {results[run].get("n") for run in runs}
            are_seeds = len(seeds) == len(runs) and len(sizes) == 1
            rows += [(cfg, runs)] if are_seeds else [(cfg, [run]) for run in runs]
    return rows


def spread(values, digits=1):
    """'61.2', or of several values their mean and standard deviation, '61.2 ± 0.9'."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


MEASURES = (                       # what a row says, who judged, its place in eval.json, factor and digits
    ("wins, %", "oracle", "win_rate", 100, 1), ("wins, %", "reward", "win_rate_reward", 100, 1),
    ("gap closed, %", "oracle", "gap_closed", 100, 0),
    (f"gap closed from {BEST_CFG:g}, %", "oracle", "gap_closed_best", 100, 0),
    ("mean score before", "oracle", "oracle_start", 1, 2), ("mean score after", "oracle", "oracle", 1, 2),
    ("distance", "", "distance", 1, 4))


def print_results(rows, results):
    """Print the rows of rows_of as one table: win rates; of Shapes world how much was closed of the gap that
    the start leaves at this guidance, and of the one that it leaves at its best; the oracle's mean scores,
    which can rise though most videos lose a little; and the distance from the reference.
    """
    table, dims = [], ("Overall", *DIMS)
    for measure, judge, key, factor, digits in MEASURES:
        if key == "gap_closed_best" and all(guidance == BEST_CFG for guidance, _ in rows):
            continue                                                            # it would say the same
        for guidance, runs in rows:
            found = [results[run][key] for run in runs if key in results[run]]
            found = [x if isinstance(x, dict) else {"Overall": x} for x in found]
            if found:
                cells = [spread([factor * x[dim] for x in found], digits) if dim in found[0] else ""
                         for dim in dims]
                who, n = results[runs[0]].get("judge", judge), results[runs[0]]["n"]
                table.append([measure, who, str(runs[0]), f"{guidance:g}", *cells, f"{len(runs)} x {n}"])
    print(markdown(["measure", "judge", "run", "guidance", *dims, "seeds x n"], table))


def print_accuracies(results):
    """Print a table of {name: [accuracies of each seed]}, in per cent."""
    def cell(seeds, dim):
        both = (spread([100 * seed[dim][ties] for seed in seeds]) for ties in ("without", "with"))
        return " / ".join(both) if dim in seeds[0] else ""
    dims = (*DIMS, "Overall")
    rows = [[name, *(cell(seeds, dim) for dim in dims)] for name, seeds in results.items()]
    print(markdown(["accuracy without / with ties, %", *dims], rows))


def compare_runs(args):
    """Print the results of runs as one table, see rows_of for its rows, and draw the first videos of each
    row side by side. With args.x, draw a figure instead and return its lines.
    """
    folders = list(dict.fromkeys(find(run) or Path(run) for run in args.compare))
    kind = ".png" if args.x else ".webp"
    out = Path(args.out or folders[-1].parent / f"compare{kind}")
    if out.suffix != kind or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: --compare draws one {kind}, in a folder that exists")
    if args != Args(compare=args.compare, x=args.x, y=args.y, by=args.by, out=args.out):
        raise UserError("--compare samples nothing: beside it stand --x, --y, --by and --out alone")
    if args.x:
        return figure(folders, args.x, args.y, args.by, out)
    results = {folder: read_json(folder / "eval.json") for folder in folders}
    rows = rows_of(folders, results)
    if all("by_t" in result for result in results.values()):
        found = {str(runs[0]): [results[run]["by_t"]["0.0"] for run in runs] for _, runs in rows}
        return print_accuracies({"ceiling": [result["ceiling"] for result in results.values()]} | found)
    if not all("win_rate" in result for result in results.values()):
        raise UserError("--compare takes runs with win rates, or rewards of Shapes world: one is neither")
    print_results(rows, results)
    draw_samples([runs[0] for _, runs in rows], out)


def draw_samples(folders, out):
    """Draw the first videos of runs of Shapes world side by side, after those of the first run's start, and
    below them the true scores of the start's and of the last run's.
    """
    files = [folder / "samples.safetensors" for folder in folders]
    if not all(file.exists() for file in files):                         # Wan's videos are files of their own
        return
    found, all_metadata = zip(*map(read_tensors, files))
    if len({metadata["prompts"] for metadata in all_metadata}) > 1:
        return
    sides = [found[0]["start"], *(tensors["videos"] for tensors in found)]
    prompts = json.loads(all_metadata[0]["prompts"])
    scores = zip(*(oracle(to_float(side), prompts) for side in (sides[0], sides[-1])))
    changes = ["  ".join(f"{dim} {a:.2f} -> {b:.2f}" for dim, a, b in zip(DIMS, *pair)) for pair in scores]
    tiles = [(prompt, [thumbnails(to_float(video)) for video in videos], change)
             for prompt, change, *videos in zip(prompts, changes, *sides)]
    moving_sheet(out, tiles, FRAMES / Shapes.fps)
    print(f"wrote {out}: start, {', '.join(map(str, folders))}")


def figure(folders, x, ys, by, out):
    """Draw each of the numbers ys over the number x, in a panel of its own. A number is an argument (`beta`)
    or a path into eval.json (`win_rate/Overall`) or, with x "step", a field of the logs.

    A line is drawn for each value of the arguments by; where several runs have one x, such as seeds, it shows
    their mean and standard deviation. Returns {(y, line): {x: [y of each run]}}.
    """
    from matplotlib.figure import Figure

    def look_up(found, path):
        for key in path.split("/"):
            found = found[key]
        return found

    lines = defaultdict(lambda: defaultdict(list))
    for folder in folders:
        for event in read_log(folder) if x == "step" else [read_json(folder / "eval.json")]:
            found = run_args(folder) | event
            try:
                line = ", ".join(f"{flag} {words(look_up(found, flag))}" for flag in by)
                for y in ys:
                    lines[y, line][float(look_up(found, x))].append(float(look_up(found, y)))
            except (KeyError, ValueError, TypeError) as e:
                raise UserError(f"{folder}: {', '.join([x, *ys, *by])} cannot be drawn: {e}") from None
    canvas = Figure(figsize=(4 * len(ys), 3.4), layout="constrained")
    panels = canvas.subplots(1, len(ys), squeeze=False)[0]
    for (y, line), points in lines.items():
        panel, places = panels[ys.index(y)], sorted(points)
        means, deviations = [np.mean(points[at]) for at in places], [np.std(points[at]) for at in places]
        panel.errorbar(places, means, deviations, marker=".", label=line or y)
        panel.set(title=y, xlabel=x)
        panel.legend(fontsize=8)
    canvas.savefig(out, dpi=100)
    print(f"wrote {out}")
    return lines


# ---- the script ----

@dataclass
class Args:
    model: str = "assets/base"              # the model: a run folder, or Wan's folder or hub repository
    ckpt: list = ()               # run folder of an aligned model, in place of --model; A14B: of both experts
    lora: list = ()             # LoRA files to put on the model; A14B: two, first the high-noise expert's
    prompt: list = ()                       # what to draw
    prompts: str = ""              # or a CSV or JSONL file with a column `prompt`; toy: also train, val, eval
    n_per_prompt: Count = 1                 # videos per prompt
    negative: str = ""                 # Wan: what guidance moves away from; official Wan has a long text here
    frames: Count | None = None             # Wan: frames, 4k + 1, at 16 per second (2.2 5B: 24)
    size: Numbers | None = None             # Wan: height and width, multiples of 16 (2.2 5B: 32)
    steps: Count | None = None              # Euler steps
    shift: float | None = None              # timestep shift
    cfg: float | None = None                # classifier-free guidance scale; 1 is off
    cfg_low: float | None = None            # A14B: that of the low-noise expert; unset: as --cfg, if given
    nrg: str = ""                           # run folder of a noisy reward: guide by it (Flow-NRG)
    rg_scale: float = 4.0                   # strength of reward guidance, the paper's w
    dim_w: Numbers = (1.0, 1.0, 1.0)        # weights of VQ, MQ, TA in the guiding reward
    max_ratio: float = 0.3                  # longest guidance, in velocity norms
    batch: Count | None = None              # videos at once
    dtype: Literal["fp32", "bf16"] | None = None  # of the linear maps; unset: bf16 for Wan on CUDA
    seed: int = 0                           # of the noise
    eval: Count | None = None          # toy: instead of writing videos, win rates on this many held-out draws
    split: Literal["eval", "val"] = "eval"  # toy, with --eval: prompts to draw; val is for tuning
    against: str = ""       # model to compare with; base: the same without adapters; unset: without --nrg
    reward: str = ""          # who judges --against, and the best and worst of --n_per_prompt; toy: or oracle
    template: str = ""                      # for the released VideoReward: the authors' prompt_template.py
    out: str = ""                           # folder for the results; unset: the next free runs/sample
    resume: bool = False                    # go on drawing into --out; the videos that are there stay
    compare: list = ()              # instead, compare these runs; --out: the picture, .webp, with --x .png
    x: str = ""                             # --compare: draw --y over this number; step: over the logs
    y: list = ("win_rate/Overall",)         # --compare: arguments, or paths into eval.json
    by: list = ()                           # --compare: arguments that tell lines apart


def read_prompts(args, world):
    """[{"prompt": ..}] of the command line, the prompts file or a split of Shapes world. UserError names a
    row of the file without a prompt.
    """
    if args.eval or args.prompts in ("", "train", "val", "eval"):
        split = args.split if args.eval else args.prompts
        return [{"prompt": p} for p in args.prompt or world.prompts(split, args.eval)]
    rows = []
    for line, row in read_table(args.prompts):
        rows.append({name: text_of(args.prompts, line, row, name) for name in ("prompt", "prompt_shorter")})
        if not rows[-1]["prompt"]:
            raise UserError(f"{args.prompts}, row {line} has no prompt: fill the column `prompt`")
    if not rows:
        raise UserError(f"{args.prompts} holds no prompt: give it a header `prompt` and a row for each")
    return rows


def file_names(args, rows):
    """A file name without ending for each video: 000, 001, .. or, of a prompts file, `<prompt>-<i>` as VBench
    expects (prompt_shorter where the file has that column), counted over all prompts that begin alike. A
    character that some system forbids becomes a space, and no name begins with one: so it reads back.
    """
    if not args.prompts:
        return [f"{i:03}" for i in range(len(rows) * args.n_per_prompt)]
    names, counts = [], defaultdict(count)
    for row in rows:
        short = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f\s]', " ", row.get("prompt_shorter") or row["prompt"])
        short = short.lstrip(" .").encode()[:180].decode(errors="ignore")  # a file name has 255 bytes at most
        number = counts[short.casefold()]                        # some systems see no difference in case
        names += [f"{short}-{next(number)}" for _ in range(args.n_per_prompt)]
    return names


def check_args(args, world):
    """The rows of prompts. Sets the flags that are unset, as a run was trained, else as the world's recipe
    says, and refuses what contradicts itself, before a model is loaded.
    """
    if sum(map(bool, (args.prompt, args.prompts, args.eval))) != 1 or args.x or args.by:
        raise UserError("one thing at a time: --prompt TEXT, --prompts FILE, --eval 512 or --compare RUN")
    own = run_args(args.ckpt[0]) if args.ckpt else {}
    dtype = "bf16" if world.name == "wan" and torch.cuda.is_available() else "fp32"
    fill_unset(args, {"frames": own.get("frames"), "size": tuple(own.get("size") or ()) or None})
    fill_unset(args, {"cfg_low": args.cfg if world.boundary else None})  # --cfg alone is of both experts
    fill_unset(args, RECIPES[world.recipe] | {"dtype": dtype})
    args.out = args.out or ("runs/sample" if args.resume else on_rank_0(free_folder)("runs/sample"))
    world.latent_shape(args.frames, args.size)                                  # refuses what cannot be
    rows, paths = read_prompts(args, world), args.ckpt or [args.model]
    world.check_prompts([row["prompt"] for row in rows])
    if args.reward and not (args.against or args.eval) and args.n_per_prompt < 2:
        raise UserError("--reward has nothing to judge: add --against base or --n_per_prompt 4")
    for path, kinds in ((args.nrg, (world.name,)), (args.reward, None)):
        if path:
            check_reward(path, world, kinds, args.template)
    for file in args.lora:
        read_tensors(file, metadata_only=True)
    if args.lora and world.boundary and len(args.lora) != 2:
        raise UserError("--lora takes two files for Wan 2.2 A14B: first the high-noise expert's")
    adapted = args.lora or any(((find(path) or Path(path)) / "lora.safetensors").exists() for path in paths)
    if args.against == "base" and not adapted:
        raise UserError("--against base switches adapters off and this model has none: name another model")
    other = world if args.against in ("", "base") else world_of(args.against)
    if (other.name, other.boundary) != (world.name, world.boundary):
        raise UserError(f"--against {args.against} is another kind of model than {paths[0]}: name its like")
    check_dim_w(args.dim_w)
    return rows


def base_of(args):
    """Where the model that the run --ckpt started from is now, if --model says so."""
    return args.model if args.ckpt and args.model != Args.model else None


def main(args):
    """Sample and judge; returns what eval.json holds, where there is one. With args.compare, compare_runs."""
    if args.compare:
        return compare_runs(args)
    start_ranks()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world = world_of((args.ckpt or [args.model])[0], device, base_of(args))
    rows = check_args(args, world)
    with Run(args, device) as run:
        return draw_and_judge(args, world, rows, run, device)


def draw_and_judge(args, world, rows, run, device):
    """Draw the prompts of rows, write the videos or judge them, or both; returns what eval.json holds, if
    any.
    """
    prompts = [row["prompt"] for row in rows for _ in range(args.n_per_prompt)]
    texts = embed_all(world, prompts, args.negative)                  # first: its encoder needs much memory
    model = load_all(args.ckpt or [args.model], world, DTYPES[args.dtype], args.lora, base_of(args), device)
    guide = LatentReward.from_pretrained(args.nrg).to(device) if args.nrg else None
    for block in guide.dit.blocks if guide else ():
        block.checkpointing = world.name == "wan"                         # a gradient through it takes memory
    reward = load_reward(args.reward, template=args.template, device=device) if args.reward else None
    draw = partial(generate, world=world, prompts=prompts, texts=texts, seed=args.seed, cfg_scale=args.cfg,
                   ts=timesteps(args.steps, args.shift), size=(args.frames, *args.size), batch=args.batch,
                   negative=args.negative, cfg_low=args.cfg_low)
    draw_new = partial(draw, model, reward=guide, rg_scale=args.rg_scale, dim_w=args.dim_w,
                       max_ratio=args.max_ratio)
    if args.eval:
        videos = stacked(draw_new())
        with start_model(args, model, world, device) as start:
            start_videos = stacked(draw(start))
            best = None if args.cfg == BEST_CFG else stacked(draw(start, cfg_scale=BEST_CFG))
        result = evaluate(videos, start_videos, prompts, reward, best)
        report(run.folder, result, prompts, videos, start_videos)
        return result
    files = [run.folder / f"{name}.mp4" for name in file_names(args, rows)]
    pairs, sides = [*zip(prompts[::2], files[::2], files[1::2])], ("A", "B")    # two and two, of one prompt
    r = write_videos(files, draw_new, prompts, world, texts, reward)
    if args.reward and args.n_per_prompt > 1:
        on_rank_0(write_pairs)(run.folder / "pairs.csv", files, prompts, overall(r), args.n_per_prompt)
    if args.against:
        starts = [run.folder / "start" / file.name for file in files]
        with start_model(args, model, world, device) as start:
            r_start = write_videos(starts, partial(draw, start), prompts, world, texts, reward)
        pairs, sides = [*zip(prompts, files, starts)], (run.folder.name, args.against)
    if args.against or args.n_per_prompt % 2 == 0:
        on_rank_0(label_page)(run.folder / "label.html", pairs, sides)
    if args.against and args.reward:
        result = {"win_rate": win_rates(r, r_start), "judge": args.reward, "n": len(prompts)}
        report(run.folder, result)
        return result


def write_videos(files, draw, prompts, world, texts, reward):
    """Write the i-th video that draw yields as files[i] and forget it: it is judged where it was drawn, and a
    line of scores.jsonl says how. Videos that are there with their line stay. samples.webp shows the first of
    the others. Returns the reward's normalised scores (n, 3), or None.
    """
    folder, log, scores, tiles = files[0].parent, files[0].parent / "scores.jsonl", {}, []
    folder.mkdir(exist_ok=True)
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        with suppress(ValueError):                                              # of a line that was cut short
            scores |= json.loads(line)
    done = {i for i, file in enumerate(files) if file.name in scores and file.exists()}
    for i, x, video in draw(done=done):
        write_video(files[i], video, world.fps, world.zoom)
        text = world.pad_text([texts[prompts[i]]])
        r = reward.score_drawn(x[None], text, [files[i]], [prompts[i]])[0].tolist() if reward else None
        with open(log, "a", encoding="utf-8") as lines:
            lines.write("\n" + json.dumps({files[i].name: r}))                  # not onto a cut line
        scores[files[i].name] = r
        if len(tiles) < 12:
            tiles.append((prompts[i], [thumbnails(video)], files[i].stem))
    if tiles and RANK == 0:
        moving_sheet(folder / "samples.webp", tiles, video.shape[1] / world.fps)
    print(f"{folder} has its {len(files)} mp4, {len(done)} of them from before, and samples.webp")
    scores = merged(scores)
    return torch.tensor([scores[file.name] for file in files]) if reward else None


def write_pairs(path, files, prompts, r, n):
    """Write on-policy pairs for train_align.py: of every four of the n videos of a prompt, or of all if there
    are fewer than eight, the best and the worst by rewards r (len(files),).
    """
    with open(path, "w", newline="", encoding="utf-8") as table:
        rows = csv.writer(table)
        rows.writerow(["prompt", "chosen", "rejected"])
        for i in range(0, len(files), n):
            for ids in torch.arange(i, i + n).tensor_split(max(1, n // 4)):
                best, worst = ids[r[ids].argmax()], ids[r[ids].argmin()]
                rows.writerow([prompts[i], files[best].name, files[worst].name])
    print(f"the best and the worst of each prompt: train_align.py --pairs {path}")


if __name__ == "__main__":
    launch(main, Args, __doc__)
