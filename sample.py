"""Euler sampling, classifier-free guidance and Flow-NRG; writes videos; win rates, comparison of runs.

    python sample.py --prompt "a red circle moving left"                         videos of the toy base
    python sample.py --ckpt runs/dpo --prompt "a red circle moving left" --nrg assets/noisy --dim_w 0.5,0.5,0
    python sample.py --nrg assets/noisy --dim_w 0,0,1 --eval 512                 win rates of guidance
    python sample.py --prompts train --n_per_prompt 4 --reward assets/reward     on-policy pairs
    python sample.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --lora lora.safetensors --prompt "a cat, asleep"
    python sample.py --ckpt runs/dpo --prompts prompts.csv --against base --reward runs/videoreward
    python sample.py --compare runs/sft runs/rwr runs/dpo                        one table, one picture
    python sample.py --compare runs/beta_* --x beta --out beta.png               one figure
    python sample.py --compare runs/dpo --x step --y loss implicit_acc           a run's log over its steps

A velocity is a function of (x, t), t a number; cfg and nrg take velocities and return one. Sampling runs from
t = 1 (noise) to t = 0 (data): x <- x - (t - t_next) v. After alignment keep the guidance that suits the base,
or a little less: above it what was learnt is lost (assets/results.md).
"""
import csv
import json
import re
import sys
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data import (DIMS, DTYPES, FRAMES, PROMPTS, RANK, RANKS, SIZE, Count, Numbers, Run, Shapes,
                  check_dim_w, check_world, clean_videos, fill_unset, free_folder, gather_rows, label_page, launch, lineage,
                  markdown, metadata_of, moving_sheet, normalised, on_rank_0, oracle, overall, progress,
                  read_log, read_table, recipes, rng, run_args, start_ranks, text_of, thumbnails,
                  to_float, to_uint8, toy_weights, weights_hash, whole_weights, with_overall, world_of, write_json, write_video)
from model import (Experts, UserError, VideoDiT, find, load_lora, lora_disabled, read_json, read_tensors,
                   save_tensors)
from reward import LatentReward, check_reward, load_reward


# ---- the sampler ----

def timesteps(n, shift=1.0):
    """n + 1 decreasing times from 1 to 0: evenly spaced, then shift t / (1 + (shift - 1) t), as official Wan.

    shift > 1 spends more of the steps near noise.
    """
    t = torch.linspace(1, 0, n + 1)
    t = shift * t / (1 + (shift - 1) * t)
    t[0], t[-1] = 1, 0                                                          # whatever the rounding
    return t


def euler(velocity, eps, ts):
    """x at the last of the decreasing times ts, from noise eps at the first: x <- x - (t - t_next)
    velocity(x, t). App. C.
    """
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


def nrg(velocity, reward, rg_scale, dim_w=(1.0, 1.0, 1.0), max_ratio=float("inf"), ratios=None):
    """Flow-NRG: v - rg_scale t / (1 - t) grad_x sum_k dim_w_k r_k(x, t). Eq. 11 and App. C.

    reward(x, t): normalised scores (B, K) of the noisy x, differentiable. The minus sign raises r, because
    sampling steps along -v. The gradient is of the sum over the batch, so that no sample depends on its
    neighbours, and in fp32. At t = 1 the factor is infinite and guidance is skipped, as in the paper.
    max_ratio: each sample's guidance is shortened to at most this multiple of its velocity's norm (not in the
    paper: a reward trained with shared noise has a gradient that grows like 1 / (1 - t), see README). ratios:
    a list that receives, per step, the mean of the unshortened ratio.
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
        if ratios is not None:
            ratios.append(ratio.mean().item())
        keep = (max_ratio / ratio.clamp(min=1e-12)).clamp(max=1).view(-1, *[1] * (x.dim() - 1))
        return v - (keep * push).type_as(v)
    return guided


# ---- models and drawing ----

def expert_of(path):
    """Which expert of Wan 2.2 A14B the run at path is of; None of others and of a pretrained model."""
    return run_args(path).get("expert")


def load_model(path, dtype=torch.float32, expert=None, base=None):
    """The VideoDiT at path, eval mode, its adapters on where it was trained with LoRA; dtype of its linear
    maps; expert: which of a pretrained Wan 2.2 A14B, a run knows its own; base: see lineage.
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
            raise UserError(f"{path} was trained on top of {start}, which is another model now: bring that "
                            "one back, or train again")
        load_lora(model, lora)
    return model.eval().requires_grad_(False)


def load_all(paths, world, dtype, loras=(), base=None):
    """The model of a path or, of Wan 2.2 A14B, its Experts: runs of one or both, the plain one beside a
    single run; loras: files to put on it, of experts the high one's first.
    """
    if world.boundary is None:
        if len(paths) > 1:
            raise UserError("two runs make a model of Wan 2.2 A14B alone, one of each expert")
        models = [load_model(paths[0], dtype, base=base)]
    else:
        runs = {expert_of(path) or "both": path for path in paths}
        if len(runs) < len(paths):
            raise UserError(f"{' and '.join(paths)} are of the same expert: give one of each")
        plain = lineage(paths[0], base)[-1]
        models = [load_model(runs.get(expert, plain), dtype, expert, base) for expert in ("high", "low")]
        high, low = runs.get("high", plain), runs.get("low", plain)
        print(f"two experts: {high} for t from {world.boundary} up, {low} below")
    for model, file in zip(models, loras):
        load_lora(model, file)
    return models[0] if world.boundary is None else Experts(*models, world.boundary)


@torch.no_grad()
def generate(model, world, prompts, texts, seed, ts, size=(FRAMES, SIZE, SIZE), cfg_scale=1.0, negative="",
             batch=64, cfg_low=None, reward=None, **guidance):
    """Yield (latents (C, T', H', W'), video (3, T, H, W) in [-1, 1]) of each prompt, on the CPU.

    texts: embed_all of prompts and negative; size: frames, height, width of the videos; ts: decreasing times
    from 1 to 0. The i-th noise is a function of (seed, i). Of several ranks each draws its share,
    prompts[RANK::RANKS].
    """
    shape = world.latent_shape(size[0], size[1:])
    device = next((p.device for p in model.parameters() if p.is_cuda), torch.device("cpu"))   # of an expert's
    mine = range(RANK, len(prompts), RANKS)
    for ids in progress([mine[i:i + batch] for i in range(0, len(mine), batch)], "sampling"):
        text = world.pad_text([texts[prompts[i]] for i in ids]).to(device)
        null = world.pad_text([texts[negative]]).to(device).expand_as(text)
        eps = torch.stack([torch.randn(shape, generator=rng("eval", seed, i)) for i in ids]).to(device)

        def at(x, t):                                                           # one time for the whole batch
            return t.to(x).expand(len(x))
        def scale(t):                                                           # of the expert that t asks
            return cfg_low if cfg_low is not None and world.boundary and t < world.boundary else cfg_scale

        conditional = velocity = lambda x, t: model(x, at(x, t), text)
        if cfg_scale != 1:
            unconditional = lambda x, t: model(x, at(x, t), null)
            velocity = lambda x, t: cfg(conditional, unconditional, scale(t))(x, t)
        if reward is not None:
            velocity = nrg(velocity, lambda x, t: reward.score(x, at(x, t), text), **guidance)
        for x in euler(velocity, eps, ts):
            yield x.cpu(), world.decode(x[None])[0]


def embed_all(world, prompts, negative=""):
    """{prompt: its embedding (S, text_dim), unpadded} of the distinct ones of prompts and negative."""
    distinct = list(dict.fromkeys([*prompts, negative]))
    return dict(zip(distinct, [*world.embed_rows(distinct)]))


def toy_videos(model, prompts, seed, steps=16, guided=True, **settings):
    """Videos (n, 3, T, H, W) in [-1, 1] of prompts of Shapes world, by its default sampler or without
    classifier-free guidance.
    """
    world, ts = Shapes(), timesteps(steps, RECIPES["shapes"]["shift"])
    scale = RECIPES["shapes"]["cfg"] if guided else 1.0
    drawn = generate(model, world, prompts, embed_all(world, prompts), seed, ts, cfg_scale=scale,
                     **settings)
    return torch.stack(gather_rows([video for _, video in drawn]))


# ---- win rates ----

def win_rate(r, r_start):
    """Share of samples (n,) with r > r_start, exact ties dropped as in the paper's numbers; 0.5 if none is
    left.
    """
    wins, losses = (r > r_start).sum().item(), (r < r_start).sum().item()
    return wins / (wins + losses) if wins + losses else 0.5


def win_rates(r, r_start):
    """{"VQ", "MQ", "TA", "Overall"}: win rates of normalised scores r over r_start (n, 3); Overall is their
    mean.
    """
    columns = zip((*DIMS, "Overall"), with_overall(r).T, with_overall(r_start).T)
    return {dim: round(win_rate(new, old), 4) for dim, new, old in columns}


def pixel_statistics(videos):
    """What a hacked reward likes to spoil, of videos (.., 3, T, H, W): means of motion (change from frame to
    frame), saturation and brightness, in [0, 1].
    """
    x = (videos + 1) / 2
    values = {"motion": x.diff(dim=-3).abs(), "saturation": x.amax(-4) - x.amin(-4), "brightness": x}
    return {name: round(x.mean().nan_to_num().item(), 4) for name, x in values.items()}


def hacking(result):
    """A warning if a reward prefers the new videos but the oracle does not, or a pixel statistic fell by 30
    %; else, or where no reward was asked, "".
    """
    asked = result.get("win_rate_reward", result["win_rate"] if "judge" in result else None)
    if asked is None or asked["Overall"] <= 0.5:
        return ""
    changes = [(name, x, result["pixels"][name]) for name, x in result["pixels_start"].items()]
    faults = [f"{name} fell from {old:.3f} to {new:.3f}" for name, old, new in changes if new < 0.7 * old]
    if result["win_rate"]["Overall"] < 0.5:
        faults.append(f"the oracle prefers them in {result['win_rate']['Overall']:.0%} only")
    said = f"reward hacking? The reward prefers the videos in {asked['Overall']:.0%}, but {', '.join(faults)}"
    return said if faults else ""


def evaluate(videos, start, prompts, reward=None):
    """Win rates on Shapes world of videos over start, made from the same noise: by the oracle, and by the
    reward that labelled the pairs; and how much of the way from start to flawless videos the oracle's scores
    went.

    Returns "win_rate", "win_rate_reward" and "gap_closed", each {"VQ", "MQ", "TA", "Overall"}; the oracle's
    mean scores "oracle", "oracle_start" and "oracle_clean", each {"VQ", "MQ", "TA"}; "pixels" and
    "pixels_start", the pixel_statistics; "n".
    """
    new, old, clean = (oracle(x, prompts) for x in (videos, start, clean_videos(prompts)))
    result = {"win_rate": win_rates(normalised(new), normalised(old))}
    if reward is not None:
        text = Shapes().embed(prompts)
        r, r_start = (reward.score_drawn(x, text, None, prompts) for x in (videos, start))
        result["win_rate_reward"] = win_rates(r, r_start)
    end, begin, goal = (with_overall(normalised(score)).mean(0) for score in (new, old, clean))
    closed = ((end - begin) / (goal - begin)).tolist()
    result["gap_closed"] = {dim: round(x, 4) for dim, x in zip((*DIMS, "Overall"), closed)}
    for name, score in (("oracle", new), ("oracle_start", old), ("oracle_clean", clean)):
        result[name] = {dim: round(score[:, k].mean().item(), 4) for k, dim in enumerate(DIMS)}
    pixels = {"pixels": pixel_statistics(videos), "pixels_start": pixel_statistics(start)}
    return {**result, **pixels, "n": len(prompts)}


@on_rank_0
def report(folder, result, prompts, videos, start):
    """Print a result of evaluate; write eval.json, samples.safetensors and samples.webp into a run's folder.
    """
    keep = min(12, len(prompts))
    prompts, videos, start = prompts[:keep], videos[:keep], start[:keep]
    save_tensors({"videos": to_uint8(videos), "start": to_uint8(start)}, folder / "samples.safetensors",
                 {"prompts": json.dumps(prompts)})
    tiles, scores = [], (oracle(x, prompts) for x in (start, videos))
    for prompt, a, b, old, new in zip(prompts, start, videos, *scores):
        changes = [f"{dim} {x:.2f} -> {y:.2f}" for dim, x, y in zip(DIMS, old, new)]
        tiles.append((prompt, [thumbnails(a), thumbnails(b)], "  ".join(changes)))
    moving_sheet(folder / "samples.webp", tiles, FRAMES / Shapes.fps)
    write_result(folder, result)


def write_result(folder, result):
    """Write eval.json; print its win rates, and a warning where they look like reward hacking."""
    write_json(folder / "eval.json", result)
    results = {folder.name: [result]}
    if "unguided" in result:
        results[f"{folder.name}, unguided"] = [result["unguided"]]
    print_wins(results)
    if "gap_closed" in result:
        print_scores(results)
    if hacking(result):
        print(hacking(result))


# ---- comparison and figures ----

def look_up(result, path):
    """The number under a path of keys, such as win_rate/VQ."""
    for key in path.split("/"):
        result = result[int(key)] if isinstance(result, list) else result[key]
    return result


def spread(values, digits=1):
    """'61.2', or of several values their mean and standard deviation, '61.2 ± 0.9'."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def cell(template, seeds):
    """The template with {path:digits} filled in from the results of some seeds, in per cent for
    {path:%digits}; "" where they hold no such number.
    """
    def number(match):
        path, percent, digits = match.groups()
        return spread([look_up(result, path) * (100 if percent else 1) for result in seeds], int(digits))
    try:
        return re.sub(r"\{(.+?):(%?)(\d)\}", number, template)
    except (KeyError, TypeError):
        return ""


def table(title, results, **columns):
    """Markdown of {run: [result of each seed]}: a row a run, a cell for each of the columns {head: template}.
    """
    rows = [[run, *(cell(x, seeds) for x in columns.values())] for run, seeds in results.items()]
    return markdown([title, *columns], rows)


def print_accuracies(results):
    """Print {name: [accuracies of each seed]}, in per cent."""
    columns = {dim: f"{{{dim}/without:%1}} / {{{dim}/with:%1}}" for dim in (*DIMS, "Overall")}
    print(table("accuracy without / with ties, %", results, **columns))


def print_wins(results):
    """Print the win rates of {run: [result of each seed]}, in per cent, by each judge."""
    rows = []
    for run, seeds in results.items():
        n = f"{len(seeds)} x {seeds[0]['n']}" if len(seeds) > 1 else seeds[0]["n"]
        for judge, key in ((seeds[0].get("judge", "oracle"), "win_rate"), ("reward", "win_rate_reward")):
            if key in seeds[0]:
                rates = [cell(f"{{{key}/{dim}:%1}}", seeds) for dim in ("Overall", *DIMS)]
                rows.append([run, judge, *rates, n])
    print(markdown(["wins, %", "judge", "Overall", *DIMS, "n"], rows))


def print_scores(results):
    """Print, of {run: [result of each seed]} of Shapes world, the share in per cent of the gap from the start
    model's videos to flawless ones that was closed, the oracle's mean scores before and after, and the
    distance from the reference. A mean can rise though most videos lose a little.
    """
    columns = {"Overall": "{gap_closed/Overall:%0}"}
    columns |= {dim: f"{{gap_closed/{dim}:%0}} ({{oracle_start/{dim}:2}} to {{oracle/{dim}:2}})"
                for dim in DIMS}
    columns |= {"distance": "{distance:4}"}
    print("\n" + table("gap closed, % (mean score)", results, **columns))


def group_runs(folders):
    """{name: folders of runs whose arguments differ in nothing but seed and folder}, under what their names
    begin with.
    """
    groups, named = defaultdict(list), {}
    for folder in folders:
        args = read_json(folder / "config.json")["args"] | dict.fromkeys(("seed", "out", "resume"))
        groups[json.dumps(args)].append(folder)
    for group in groups.values():
        name = commonprefix([folder.name for folder in group]).rstrip("_-")
        named[name if name and name not in named else str(group[0])] = group
    return named


def compare(args):
    """Print tables of the runs' results, seeds together; draw their first samples side by side, after the
    start model's. With args.x, draw a figure instead and return its lines.
    """
    folders = [find(run) or Path(run) for run in args.compare]
    out = Path(args.out) if args.out else folders[-1].parent / ("plot.png" if args.x else "compare.webp")
    kind = ".png" if args.x else ".webp"
    if out.suffix != kind or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: --compare draws one {kind}, in a folder that exists")
    try:
        if args.x:
            return figure(folders, args.x, args.y, args.by, out)
        groups = group_runs(folders)
        results = {name: [read_json(run / "eval.json") for run in group] for name, group in groups.items()}
        everyone = [result for seeds in results.values() for result in seeds]
        if all("by_t" in result for result in everyone):
            return compare_rewards(results, everyone)
        print_wins(results)
    except (KeyError, TypeError) as e:
        raise UserError(f"--compare takes runs that have win rates, and one has none: no {e}") from None
    if all("gap_closed" in result for result in everyone):
        print_scores(results)
    files = {name: group[0] / "samples.safetensors" for name, group in groups.items()}
    if all(file.exists() for file in files.values()):                    # Wan's videos are files of their own
        compare_samples({name: read_tensors(file) for name, file in files.items()}, out)


def compare_samples(samples, out):
    """Draw the first samples {run: (tensors, metadata)} of the prompts that all runs share, beside the first
    run's start.
    """
    places = {run: {} for run in samples}
    for run, (_, metadata) in samples.items():
        for i, prompt in enumerate(json.loads(metadata["prompts"])):
            places[run].setdefault(prompt, i)
    first = next(iter(samples))
    shared = [prompt for prompt in places[first] if all(prompt in place for place in places.values())]
    if not shared:
        print("no picture: these runs share no prompt")
        return
    tiles = []
    for prompt in shared[:6]:
        videos = [samples[first][0]["start"][places[first][prompt]]]
        videos += [tensors["videos"][places[run][prompt]] for run, (tensors, _) in samples.items()]
        names = ", ".join(["start", *samples])
        tiles.append((prompt, [thumbnails(to_float(video)) for video in videos], names))
    moving_sheet(out, tiles, FRAMES / Shapes.fps)
    print(f"wrote {out}")


def compare_rewards(results, everyone):
    """Print the accuracies and score differences at t = 0 of toy runs of train_reward.py."""
    ceilings = {json.dumps(result["ceiling"]): result["ceiling"] for result in everyone}   # one for each seed
    print_accuracies({"ceiling": list(ceilings.values())} | {
        name: [result["by_t"]["0.0"] for result in seeds] for name, seeds in results.items()})
    columns = {dim: f"{{differences/{dim}/tied/1:2}} / {{differences/{dim}/other/1:2}} "
                    f"({{differences/{dim}/separation:%0}})" for dim in DIMS}
    print("\n" + table("median difference tied / other (separation, %)", results, **columns))


def figure(folders, x, ys, by, out):
    """Draw numbers ys of runs over their number x, a line for each y and each value of the arguments by; of
    several seeds the mean and standard deviation. matplotlib is imported here alone.

    A number is an argument (`beta`) or a path into eval.json (`win_rate/Overall`); with x "step" it is a
    field of log.jsonl, which has a panel, with a line for each run. Returns {(y, line): {x: [each y]}}.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def tell_apart(name, value):
        if isinstance(value, list) and value:                                   # of runs
            return Path(value[0]).name
        value = f"{value:g}" if isinstance(value, float) else value
        return str(value) if name == "run" else f"{name.replace('_', ' ')} {value}"

    lines, over_steps = defaultdict(lambda: defaultdict(list)), x == "step"
    for folder in folders:
        args = read_json(folder / "config.json")["args"] | {"run": folder.name}
        events = read_log(folder) if over_steps else [read_json(folder / "eval.json")]
        names = by or (["run"] if over_steps else [])
        for found in (args | event for event in events):
            try:
                own = [tell_apart(name, look_up(found, name)) for name in names]
                place = float(look_up(found, x))
                for y in ys:
                    lines[y, ", ".join(own)][place].append(float(look_up(found, y)))
            except (KeyError, ValueError, TypeError) as e:
                raise UserError(f"{folder}: {', '.join([x, *ys, *names])} cannot be drawn: {e}") from None
    shares = all(y.startswith(("win_rate", "gap_closed", "by_t")) for y in ys)  # drawn in per cent
    panels = len(ys) if over_steps else 1
    canvas, axes = plt.subplots(1, panels, figsize=(5 if panels == 1 else 3 * panels, 3.4), squeeze=False,
                                layout="constrained")
    for (y, own), points in lines.items():
        values = [(100 if shares else 1) * np.array(points[place]) for place in sorted(points)]
        panel = axes[0][ys.index(y) if over_steps else 0]
        words = y.replace("_", " ").replace("/", " ")
        if over_steps or len(ys) == 1:
            panel.set_title(words, fontsize=10)
            label = own or words
        else:
            label = f"{words} {own}"
        panel.errorbar(sorted(points), [v.mean() for v in values], [v.std(ddof=len(v) > 1) for v in values],
                       fmt="-" if over_steps else "o-", ms=4, label=label)
        panel.set(xlabel=x, ylabel="per cent" if shares else "")
        panel.grid(alpha=0.3)
    places = sorted({place for points in lines.values() for place in points})
    if not over_steps and 0 < 10 * places[0] < places[-1]:
        axes[0][0].set_xscale("log")
        if all(place == round(place, 2) for place in places):                   # few digits each
            axes[0][0].set_xticks(places, [f"{place:g}" for place in places])
    canvas.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    canvas.savefig(out, dpi=100)
    print(f"wrote {out}")
    return lines


# ---- the script ----

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


@dataclass
class Args:
    model: str = "assets/base"              # the model: a run folder, or Wan's folder or hub repository
    ckpt: list = ()               # run folder of an aligned model, in place of --model; A14B: of both experts
    lora: list = ()                 # LoRA file to put on the model; A14B: the high expert's and the low one's
    prompt: list = ()                       # what to draw
    prompts: str = ""              # or a CSV or JSONL file with a column `prompt`; toy: also train, val, eval
    n_per_prompt: Count = 1                 # videos per prompt
    negative: str = ""                 # Wan: what guidance moves away from; official Wan has a long text here
    frames: Count | None = None             # Wan: frames, 4k + 1, at 16 per second (2.2 5B: 24)
    size: Numbers | None = None                # Wan: height and width, multiples of 16 (2.2 5B: 32)
    steps: Count | None = None              # Euler steps
    shift: float | None = None              # timestep shift
    cfg: float | None = None                # classifier-free guidance scale; 1 is off
    cfg_low: float | None = None            # Wan 2.2 A14B: that of the low-noise expert
    nrg: str = ""                           # run folder of a noisy reward: guide by it (Flow-NRG)
    rg_scale: float = 4.0                   # strength of reward guidance, the paper's w
    dim_w: Numbers = (1.0, 1.0, 1.0)        # weights of VQ, MQ, TA in the guiding reward
    max_ratio: float = 0.3                  # longest guidance, in velocity norms
    batch: Count | None = None              # videos at once
    dtype: Literal["fp32", "bf16"] | None = None  # of the linear maps; unset: bf16 for Wan on CUDA
    seed: int = 0                          # of the noise
    eval: Count | None = None          # toy: instead of writing videos, win rates on this many held-out draws
    split: Literal["eval", "val"] = "eval"  # toy, with --eval: prompts to draw; val is for tuning
    against: str = ""                # model to compare with; base: the same without adapters; unset: unguided
    reward: str = ""          # who judges --against, and the best and worst of --n_per_prompt; toy: or oracle
    template: str = ""                      # for the released VideoReward: the authors' prompt_template.py
    out: str = "runs/sample"                # folder for the results

    def __post_init__(self):                                              # a single one may be given as it is
        self.ckpt, self.lora = ([x] if isinstance(x, str) else list(x) for x in (self.ckpt, self.lora))


@dataclass
class Compare:
    """Compare runs by their eval.json; nothing is sampled."""
    compare: list = ()                      # run folders
    x: str = ""                             # draw the numbers --y of the runs over this one; step: their logs
    y: list = ("win_rate/Overall",)         # arguments, or paths into eval.json
    by: list = ()                           # arguments that tell lines apart
    out: str = ""                           # the picture, .webp, with --x .png; unset: beside the last run


def read_prompts(args, world):
    """[{"prompt": ..}] of the command line, the prompts file or a split of Shapes world; empty ones are
    refused.
    """
    if args.eval:
        return [{"prompt": p} for p in world.prompts(args.split, args.eval)]
    if args.prompts in ("train", "val", "eval"):
        return [{"prompt": p} for p in world.prompts(args.prompts)]
    if not args.prompts:
        return [{"prompt": p} for p in args.prompt]
    lines = read_table(args.prompts)
    if not lines or "prompt" not in lines[0][1]:
        raise UserError(f"{args.prompts} needs a column `prompt` and at least one row")
    names = "prompt", "prompt_shorter"
    rows = [(line, {name: text_of(args.prompts, line, row, name) for name in names}) for line, row in lines]
    for line, row in rows:
        if not row["prompt"]:
            raise UserError(f"{args.prompts}, row {line} has no prompt")
    return [row for _, row in rows]


def file_names(args, rows):
    """A file name without ending for each video: 000, 001, .. or, of a prompts file, `<prompt>-<i>` as VBench
    expects (prompt_shorter where the file has that column), counted over all prompts that begin alike.
    """
    if not args.prompts:
        return [f"{i:03}" for i in range(len(rows) * args.n_per_prompt)]
    names, count = [], Counter()
    for row in rows:
        short = re.sub(r"[/\x00-\x1f]", " ", row.get("prompt_shorter") or row["prompt"])
        short = short.encode()[:180].decode(errors="ignore")               # a file name has 255 bytes at most
        for _ in range(args.n_per_prompt):
            names.append(f"{short}-{count[short]}")
            count[short] += 1
    return names


def trained_on(ckpt):
    """The prompts of the pairs files that the runs ckpt were aligned with, as far as they can tell."""
    files = [run_args(path).get("pairs") for path in ckpt]
    return {text_of(file, line, row, "prompt") for file in files if file and Path(file).exists()
            for line, row in read_table(file)}


def check(args, world):
    """The rows of prompts. Fill unset flags, and refuse what contradicts itself, before a model is loaded."""
    if bool(args.prompt) + bool(args.prompts) + bool(args.eval) != 1:
        raise UserError(f"one thing at a time: --prompt \"{PROMPTS[0]}\", --prompts FILE, --eval 512 or "
                        "--compare RUN")
    if args.ckpt:                                                               # as it was trained
        own = run_args(args.ckpt[0])
        fill_unset(args, {"frames": own.get("frames"), "size": tuple(own.get("size") or ()) or None})
    fill_unset(args, RECIPES[world.recipe])
    fill_unset(args, {"dtype": "bf16" if world.name == "wan" and torch.cuda.is_available() else "fp32"})
    world.latent_shape(args.frames, args.size)                                  # refuses what cannot be
    rows = read_prompts(args, world)
    world.check_prompts([row["prompt"] for row in rows])
    if args.reward and not (args.against or args.eval) and args.n_per_prompt < 2:
        raise UserError("--reward judges a comparison or picks the best of several: add --against base or "
                        "--n_per_prompt 4")
    shared = trained_on(args.ckpt) & {row["prompt"].strip() for row in rows} if args.against else None
    if shared:
        print(f"{len(shared)} of the prompts are in the pairs of {args.ckpt[0]}: that flatters its win rates")
    if args.nrg:
        check_reward(args.nrg, world, (world.name,))
    if args.reward:
        check_reward(args.reward, world, template=args.template)
    for file in args.lora:
        if not Path(file).is_file():
            why = "is a folder: name the file in it" if Path(file).exists() else "does not exist"
            raise UserError(f"--lora {file} {why}")
    paths, base = args.ckpt or [args.model], base_of(args)
    plain = not args.lora and all(whole_weights(x) == x[0] for x in (lineage(path, base) for path in paths))
    if args.against == "base" and plain:
        raise UserError("--against base switches adapters off and this model has none: name another model")
    return rows


def base_of(args):
    """Where the model that the run --ckpt started from is now, if --model says so."""
    return args.model if args.ckpt and args.model != Args.model else None


def main(args):
    """Sample and judge; returns what eval.json holds, where there is one."""
    start_ranks()
    device, paths = "cuda" if torch.cuda.is_available() else "cpu", args.ckpt or [args.model]
    world = world_of(paths[0], device, base_of(args))
    rows = check(args, world)
    model = to_device(load_all(paths, world, DTYPES[args.dtype], args.lora, base_of(args)), device)
    guide = LatentReward.from_pretrained(args.nrg).to(device) if args.nrg else None
    for block in guide.dit.blocks if guide else ():
        block.checkpointing = world.name == "wan"                         # a gradient through it takes memory
    start = lora_disabled if args.against == "base" else nullcontext
    start_model = model
    if args.against not in ("", "base"):
        start_model = to_device(load_all([args.against], world, DTYPES[args.dtype]), device)
    reward = load_reward(args.reward, template=args.template, device=device) if args.reward else None

    prompts = [row["prompt"] for row in rows for _ in range(args.n_per_prompt)]
    texts = embed_all(world, prompts, args.negative)
    run, ratios, result = Run(args, device), [], None
    settings = dict(world=world, prompts=prompts, texts=texts, seed=args.seed, cfg_scale=args.cfg,
                    ts=timesteps(args.steps, args.shift), size=(args.frames, *args.size), batch=args.batch,
                    negative=args.negative, cfg_low=args.cfg_low)
    drawn = generate(model, **settings, reward=guide, rg_scale=args.rg_scale, dim_w=args.dim_w,
                     max_ratio=args.max_ratio, ratios=ratios)
    if args.eval:
        videos = torch.stack(gather_rows([video for _, video in drawn]))
        with start(start_model) as m:
            start_videos = torch.stack(gather_rows([video for _, video in generate(m, **settings)]))
        result = evaluate(videos, start_videos, prompts, reward)
        report(run.folder, result, prompts, videos, start_videos)
    else:
        rest = file_names(args, rows), prompts, world, texts, reward
        r, pixels = write_videos(run.folder, drawn, *rest)
        if args.reward and args.n_per_prompt > 1:
            on_rank_0(write_pairs)(run.folder / "pairs.csv", rest[0], prompts, overall(r), args.n_per_prompt)
        if args.against:
            with start(start_model) as m:
                r_start, pixels_start = write_videos(run.folder / "start", generate(m, **settings), *rest)
            if args.reward:
                result = {"win_rate": win_rates(r, r_start), "judge": args.reward, "n": len(prompts),
                          "pixels": pixels, "pixels_start": pixels_start}
                on_rank_0(write_result)(run.folder, result)
        to_label = pairs_to_label(run.folder, rest[0], prompts, args.n_per_prompt, args.against)
        if to_label:
            sides = (run.folder.name, args.against) if args.against else ("A", "B")
            on_rank_0(label_page)(run.folder / "label.html", to_label, sides)
    if ratios:
        by_step = [np.mean(ratios[k::args.steps - 1]) for k in range(args.steps - 1)]
        print("guidance / velocity, by step:", " ".join(f"{ratio:.2f}" for ratio in by_step))
    return result


def to_device(model, device):
    """The model on the device; of Experts that do not both fit on a GPU, the high-noise one alone."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if isinstance(model, Experts) and device == "cuda" and size > 0.8 * torch.cuda.mem_get_info()[0]:
        model.high.to(device)
        return model
    return model.to(device)


def write_videos(folder, drawn, names, prompts, world, texts, reward):
    """Write drawn (latents, video) pairs as <name>.mp4, and the first as samples.webp, and forget them: a
    video is judged where it was drawn. Returns the reward's normalised scores (n, 3), or None, and mean
    pixel_statistics.
    """
    folder.mkdir(exist_ok=True)
    r, pixels, tiles, seconds = [], [], [], 0                         # of several ranks one may draw nothing
    for i, (x, video) in zip(range(RANK, len(names), RANKS), drawn):
        file = folder / f"{names[i]}.mp4"
        write_video(file, video, world.fps, world.zoom)
        pixels.append(pixel_statistics(video))
        if reward is not None:
            r.append(reward.score_drawn(x[None], world.pad_text([texts[prompts[i]]]), [file], [prompts[i]])[0])
        seconds = video.shape[1] / world.fps
        if i < 12:
            tiles.append((prompts[i], [thumbnails(video)], names[i]))
    on_rank_0(moving_sheet)(folder / "samples.webp", gather_rows(tiles), seconds)
    print(f"wrote {len(names)} mp4 and samples.webp to {folder}")
    pixels = gather_rows(pixels)
    means = {name: round(np.mean([x[name] for x in pixels]), 4) for name in pixels[0]}
    return None if reward is None else torch.stack(gather_rows(r)), means


def write_pairs(path, names, prompts, r, n):
    """Write on-policy pairs for train_align.py: of every four of the n videos of a prompt, or of all if there
    are fewer than eight, the best and the worst by rewards r (len(names),).
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "chosen", "rejected"])
        for i in range(0, len(names), n):
            for ids in torch.arange(i, i + n).tensor_split(max(1, n // 4)):
                best, worst = ids[r[ids].argmax()], ids[r[ids].argmin()]
                rows.writerow([prompts[i], f"{names[best]}.mp4", f"{names[worst]}.mp4"])
    print(f"the best and the worst of each prompt: train_align.py --pairs {path}")


def pairs_to_label(folder, names, prompts, n, against):
    """[(prompt, A, B)] for a person to judge: each video beside the start model's or, of n > 1 videos a
    prompt, beside the next.
    """
    files = [folder / f"{name}.mp4" for name in names]
    if against:
        return [(prompt, file, folder / "start" / file.name) for prompt, file in zip(prompts, files)]
    return [(prompts[i], files[i + k], files[i + k + 1])
            for i in range(0, len(files), n) for k in range(0, n - 1, 2)]


if __name__ == "__main__":
    if any(word.startswith("--compare") for word in sys.argv):
        launch(compare, Compare, __doc__)
    else:
        launch(main, Args, __doc__)
