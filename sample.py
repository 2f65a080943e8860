"""Euler sampling, classifier-free guidance and Flow-NRG; writes videos; win rates.

    python sample.py --prompt "a red circle moving left"                         videos of the toy base
    python sample.py --ckpt runs/dpo --prompt "a red circle moving left" --nrg assets/noisy --dim_w 0.5,0.5,0
    python sample.py --nrg assets/noisy --dim_w 0,0,1 --eval 512                 win rates of guidance
    python sample.py --compare runs/sft runs/rwr runs/dpo                        one table, one picture
    python sample.py --compare runs/beta_* --x beta --out beta.png               one figure
    python sample.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --lora lora.safetensors --prompt "a cat, asleep"
    python sample.py --ckpt runs/dpo --prompts prompts.csv --against base --reward runs/videoreward
    python sample.py --ckpt runs/dpo --prompts train.csv --n_per_prompt 4 --reward RUN        on-policy pairs

A velocity is a function of (x, t), t a number; cfg and nrg take velocities and return one. Sampling runs from
t = 1 (noise) to t = 0 (data): x <- x - (t - t_next) v.
"""
import csv
import json
import re
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from os.path import commonprefix
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from data import (DIMS, FRAMES, HERE, PROMPTS, RANK, SIZE, WORLD, ShapesCodec, WanCodec, attributes, caption_of,
                  check_clip_args, check_counts, check_out, check_world, clean_videos, collect, contact_sheet,
                  embed_text, fail, find, fingerprint, launch, markdown, on_rank_0, oracle, read_json, read_table, rng,
                  split_of, start_ranks, start_run, to_float, to_uint8, user_errors, with_overall, write_json,
                  write_video)
from model import VideoDiT, load_lora, lora_disabled, merge_lora, read_metadata, read_tensors, save_tensors
from reward import (LatentReward, and_overall, check_reward, load_reward, overall, print_accuracies, score_clean,
                    score_videos, spread)


# ---- the sampler ----

def timesteps(n, shift=1.0):
    """n + 1 decreasing times from 1 to 0: evenly spaced, then shift t / (1 + (shift - 1) t), as official Wan.

    shift > 1 spends more of the steps near noise.
    """
    t = torch.linspace(1, 0, n + 1)
    return shift * t / (1 + (shift - 1) * t)


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
        norm = lambda y: y.reshape(len(y), -1).norm(dim=1)
        ratio = norm(push) / norm(v.float()).clamp(min=1e-12)                   # (B,)
        if ratios is not None:
            ratios.append(ratio.mean().item())
        keep = (max_ratio / ratio.clamp(min=1e-12)).clamp(max=1).view(-1, *[1] * (x.dim() - 1))
        return v - (keep * push).type_as(v)
    return guided


# ---- models and videos ----

def find_model(path):
    """The local folder at path, as given or beside this file, or path itself where it can only be a hub repository."""
    for folder in (Path(str(path)), HERE / str(path)):
        if folder.is_dir():
            return find(folder, "transformer", "lora.safetensors", "config.json")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not Path(path).parent.is_dir() and str(path)[:5] != "runs/":
        return path
    fail(f"{path} does not exist: --model and --ckpt take a run folder, a Wan folder or a hub repository")


@user_errors()
def lineage(path):
    """[folder of the model at path, of the one it was aligned from, .., of the pretrained one]: an aligned run names in
    its config.json the model that it started from.
    """
    folder = Path(find_model(path))
    args = read_json(folder / "config.json").get("args") if (folder / "config.json").exists() else None
    aligned = isinstance(args, dict) and args.get("loss") != "pretrain"
    return [folder, *(lineage(args.get("model")) if aligned else [])]


def weights_of(folder):
    """The file with the weights that a run trained, or a pretrained toy's."""
    lora = Path(folder) / "lora.safetensors"
    return lora if lora.exists() else Path(folder) / "transformer" / "diffusion_pytorch_model.safetensors"


@user_errors()
def origin(path):
    """(the pretrained model at the root of path, whether that is a toy of Shapes world, which its weights say)."""
    folder = lineage(path)[-1]
    return str(folder), "world" in read_metadata(weights_of(folder))


def start_of(path):
    """A short hash of the weights at path, by which a run that was trained on top of them knows them again; "" of a Wan
    in several files or on the hub.
    """
    file = weights_of(find_model(path))
    return fingerprint(file) if file.exists() else ""


@user_errors()
def load_model(path, dtype=torch.float32):
    """The VideoDiT at path, eval mode, its adapters on where it was trained with LoRA; dtype of its linear maps."""
    folder = find_model(path)
    file = weights_of(folder)
    metadata = read_metadata(file)
    if file.name == "lora.safetensors":
        start = (read_json(file.parent / "config.json").get("args") or {}).get("model")
        if metadata.get("start") not in (None, start_of(start)):
            fail(f"{path} was trained on top of {start}, which is another model now: bring that one back, or train "
                 "again")
        model = load_lora(merge_lora(load_model(start, dtype)), file)
    else:
        if "world" in metadata:
            check_world(metadata, file)
        model = VideoDiT.from_pretrained(folder, dtype)
    return model.eval().requires_grad_(False)


def check_not_model(out, path):
    """Refuse to write a run over the model at path or over one that it started from."""
    if any(Path(out).resolve() == folder.resolve() for folder in lineage(path)):
        fail(f"--out {out} is the model itself or one that it started from: name another folder")


@torch.no_grad()
def generate(model, codec, prompts, texts, seed, ts, size=(FRAMES, SIZE, SIZE), cfg_scale=1.0, negative="", reward=None,
             rg_scale=1.0, dim_w=(1, 1, 1), max_ratio=float("inf"), ratios=None, batch=64):
    """Yield (latents (C, T', H', W'), video (3, T, H, W) in [-1, 1]) of each prompt, on the CPU.

    texts: embed_all of prompts and negative; size: frames, height, width of the videos; ts: decreasing times from 1 to
    0. The i-th noise is a function of (seed, i). Of several ranks each draws its share, prompts[RANK::WORLD].
    """
    device, shape = next(model.parameters()).device, codec.latent_shape(size[0], size[1:])
    at = lambda x, t: t.to(x).expand(len(x))                                    # one time for the whole batch
    mine = range(RANK, len(prompts), WORLD)
    for ids in tqdm([mine[i:i + batch] for i in range(0, len(mine), batch)], desc="sampling", leave=False):
        text = torch.stack([texts[prompts[i]] for i in ids]).to(device)
        null = texts[negative].to(device).expand_as(text)
        eps = torch.stack([torch.randn(shape, generator=rng("eval", seed, i)) for i in ids]).to(device)
        velocity = lambda x, t: model(x, at(x, t), text)
        if cfg_scale != 1:
            velocity = cfg(velocity, lambda x, t: model(x, at(x, t), null), cfg_scale)
        if reward is not None:
            velocity = nrg(velocity, lambda x, t: reward.score(x, at(x, t), text), rg_scale, dim_w, max_ratio, ratios)
        for x in euler(velocity, eps, ts):
            yield x.cpu(), codec.decode(x[None])[0]


def embed_all(codec, prompts, negative=""):
    """{prompt: its embedding (S, text_dim)} of the distinct ones of prompts and negative."""
    distinct = list(dict.fromkeys([*prompts, negative]))
    return dict(zip(distinct, codec.embed(distinct)))


def toy_videos(model, prompts, seed, steps=16, shift=3.0, **settings):
    """Videos (n, 3, T, H, W) in [-1, 1] of prompts of Shapes world."""
    codec = ShapesCodec()
    drawn = generate(model, codec, prompts, embed_all(codec, prompts), seed, timesteps(steps, shift), **settings)
    return torch.stack(collect([video for _, video in drawn]))


# ---- win rates ----

def eval_prompts(n, split="eval"):
    """n prompts of Shapes world: those of the split in turn."""
    names = [p for p in PROMPTS if split_of(p) == split]
    return [names[i % len(names)] for i in range(n)]


def win_rate(r, r_start):
    """Share of samples (n,) with r > r_start, exact ties dropped as in the paper's numbers; 0.5 if none is left."""
    wins, losses = (r > r_start).sum().item(), (r < r_start).sum().item()
    return wins / (wins + losses) if wins + losses else 0.5


def win_rates(r, r_start):
    """{"VQ", "MQ", "TA", "Overall"}: win rates of normalised scores r over r_start (n, 3); Overall is their mean."""
    r, r_start = and_overall(r), and_overall(r_start)
    return {dim: round(win_rate(r[:, k], r_start[:, k]), 4) for k, dim in enumerate((*DIMS, "Overall"))}


def look(videos):
    """What a hacked reward likes to spoil, of videos (.., 3, T, H, W): means of motion (change from frame to frame),
    saturation and brightness, in [0, 1].
    """
    x = (videos + 1) / 2
    values = {"motion": x.diff(dim=-3).abs(), "saturation": x.amax(-4) - x.amin(-4), "brightness": x}
    return {name: round(x.mean().nan_to_num().item(), 4) for name, x in values.items()}


def hacking(result):
    """A warning if a reward prefers the new videos but the oracle does not, or a mean of look fell by 30 %; else, or
    where no reward was asked, "".
    """
    asked = result.get("win_rate_reward", result["win_rate"] if "judge" in result else None)
    if asked is None:
        return ""
    fell = [f"{name} fell from {x:.3f} to {result['look'][name]:.3f}" for name, x in result["look_start"].items()
            if result["look"][name] < 0.7 * x]
    if (truth := result["win_rate"]["Overall"]) < 0.5:
        fell.append(f"the oracle prefers them in {truth:.0%} only")
    hacked = asked["Overall"] > 0.5 and fell
    said = f"reward hacking? The reward prefers the videos in {asked['Overall']:.0%}, but {', '.join(fell)}"
    return said if hacked else ""


def evaluate(videos, start, prompts, reward=None):
    """Win rates on Shapes world of videos over start, made from the same noise: by the oracle, and by the reward
    that labelled the pairs; and how much of the way from start to flawless videos the oracle's scores went.

    Returns "win_rate", "win_rate_reward" and "gap_closed", each {"VQ", "MQ", "TA", "Overall"}; the oracle's mean scores
    "oracle", "oracle_start" and "oracle_clean", each {"VQ", "MQ", "TA"}; the means of look, "look" and "look_start";
    "n".
    """
    new, old, clean = (oracle(x, prompts) for x in (videos, start, clean_videos(prompts)))
    result = {"win_rate": win_rates(with_overall(new)[:, :3], with_overall(old)[:, :3])}
    if reward is not None:
        text = embed_text(prompts)
        result["win_rate_reward"] = win_rates(*(score_clean(reward, x, text) for x in (videos, start)))
    means = [with_overall(score).mean(0) for score in (new, old, clean)]
    closed = ((means[0] - means[1]) / (means[2] - means[1])).tolist()
    result["gap_closed"] = {dim: round(x, 4) for dim, x in zip((*DIMS, "Overall"), closed)}
    for name, score in (("oracle", new), ("oracle_start", old), ("oracle_clean", clean)):
        result[name] = {dim: round(score[:, k].mean().item(), 4) for k, dim in enumerate(DIMS)}
    return {**result, "look": look(videos), "look_start": look(start), "n": len(prompts)}


@on_rank_0
def report(run, result, prompts, videos, start):
    """Print a result of evaluate; write eval.json, samples.safetensors and samples.png into the run folder."""
    write_json(run / "eval.json", result)
    keep = min(12, len(prompts))
    prompts, videos, start = prompts[:keep], videos[:keep], start[:keep]
    save_tensors({"videos": to_uint8(videos), "start": to_uint8(start)}, run / "samples.safetensors",
                 {"prompts": json.dumps(prompts)})
    rows = zip(prompts, start, oracle(start, prompts), videos, oracle(videos, prompts))
    contact_sheet(run / "samples.png", [[(f"start: {prompt}  {caption_of(score_a)}", a),
                                         (f"{run.name}:  {caption_of(score_b)}", b)]
                                        for prompt, a, score_a, b, score_b in rows])
    print(table({run.name: [result]}))
    if said := hacking(result):
        print(said)


def table(results):
    """Markdown of {name: [result of each seed]}: one row per run and judge, win rates in per cent, mean ± spread."""
    names, rows = ("Overall", *DIMS), []
    for run, seeds in results.items():
        n = seeds[0]["n"] if len(seeds) == 1 else f"{len(seeds)} x {seeds[0]['n']}"
        for judge, key in (("oracle", "win_rate"), ("reward", "win_rate_reward")):
            if key in seeds[0]:
                rates = [spread([100 * result[key][dim] for result in seeds]) for dim in names]
                rows.append([run, seeds[0].get("judge", judge), *rates, n])
    return markdown(["wins, %", "judge", *names, "n"], rows)


def score_table(results):
    """Markdown of {name: [result of each seed]} of Shapes world: the oracle's mean scores, in brackets the share in per
    cent of the gap from the start model to flawless videos that was closed, and the distance from the reference.
    """
    def plain(name, key):
        """Rows of the starts or of flawless videos: one of most runs, and of those that have another."""
        rows = defaultdict(list)
        for run, seeds in results.items():
            rows[tuple(spread([result[key][dim] for result in seeds], 2) for dim in DIMS)].append(run)
        most = max(rows.values(), key=len)
        whose = lambda runs: "" if runs is most else f" of {', '.join(runs)}"
        return [[name + whose(runs), *row, "", ""] for row, runs in rows.items()]

    rows = plain("start", "oracle_start")
    for run, seeds in results.items():
        closed = lambda dim: "(" + spread([100 * result["gap_closed"][dim] for result in seeds], 0) + ")"
        cells = [spread([result["oracle"][dim] for result in seeds], 2) + " " + closed(dim) for dim in DIMS]
        moved = [result["distance"] for result in seeds if "distance" in result]
        rows.append([run, *cells, closed("Overall"), spread(moved, 4) if moved else ""])
    head = ["oracle's score (gap closed, %)", *DIMS, "Overall", "distance"]
    return markdown(head, rows + plain("flawless", "oracle_clean"))


def difference_table(results):
    """Markdown of {name: [result of each seed]} of toy rewards: medians of the score differences of tied and of other
    pairs, and how often the tied of two such pairs has the smaller one, in per cent.
    """
    rows = []
    for run, seeds in results.items():
        found = {dim: [result["differences"][dim] for result in seeds] for dim in DIMS}
        rows.append([run, *(" / ".join(spread([x[kind][1] for x in found[dim]], 2) for kind in ("tied", "other"))
                            + " (" + spread([100 * x["separation"] for x in found[dim]], 0) + ")" for dim in DIMS)])
    return markdown(["median difference tied / other (separation, %)", *DIMS], rows)


def compare(runs, out):
    """Print tables of the runs' results; draw their first samples side by side, after the start model's.

    Runs whose arguments differ in nothing but seed and folder are one row, with mean and standard deviation, under
    what their names begin with. Toy runs of train_reward.py have their accuracies and score differences at t = 0
    compared.
    """
    folders, groups = [find(run, "eval.json") for run in runs], {}
    try:
        for folder in folders:
            args = read_json(folder / "config.json")["args"]
            key = json.dumps({k: v for k, v in args.items() if k not in ("seed", "out", "resume")})
            groups.setdefault(key, []).append(folder)
        results = {}
        for group in groups.values():
            name = commonprefix([folder.name for folder in group]).rstrip("_-")
            name = name if name and name not in results else str(group[0])
            results[name] = [read_json(folder / "eval.json") for folder in group]
        everyone = [result for seeds in results.values() for result in seeds]
        if all("by_t" in result for result in everyone):
            ceilings = {json.dumps(result["ceiling"]): result["ceiling"] for result in everyone}    # the seeds differ
            print_accuracies({"ceiling": list(ceilings.values())} | {
                name: [result["by_t"]["0.0"] for result in seeds] for name, seeds in results.items()})
            if all("differences" in result for result in everyone):
                print(f"\n{difference_table(results)}")
            return
        if bare := [name for name, seeds in results.items() if not all("win_rate" in result for result in seeds)]:
            raise KeyError(f"{bare[0]} has none")
        print(table(results))
        if all("gap_closed" in result for result in everyone):
            print(f"\n{score_table(results)}")
        files = [group[0] / "samples.safetensors" for group in groups.values()]
        if not all(file.exists() for file in files):                            # a Wan's videos are files of their own
            return
        samples = [read_tensors(file) for file in files]
    except (ValueError, KeyError) as e:
        fail(f"--compare takes runs with win rates, of train_align.py or sample.py: {e}")
    prompts = json.loads(samples[0][1]["prompts"])
    columns = [("start", samples[0][0]["start"])]
    columns += [(name, tensors["videos"]) for name, (tensors, _) in zip(results, samples)]
    contact_sheet(out, [[(f"{prompt}: {name}" if name == "start" else name, to_float(videos[i]))
                         for name, videos in columns] for i, prompt in enumerate(prompts[:6])], max_frames=4)
    print(f"wrote {out}")


def plot(runs, x, ys, by, out):
    """Draw numbers ys of runs over their number x, a line for each y and each value of the arguments by; of several
    seeds the mean and standard deviation. matplotlib is imported here alone.

    A number is an argument (`beta`) or a path into eval.json (`win_rate/Overall`). Returns {line: {x: [each y]}}.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator
    lines = defaultdict(lambda: defaultdict(list))
    for folder in (find(run, "eval.json") for run in runs):
        try:
            found = read_json(folder / "config.json")["args"] | read_json(folder / "eval.json")
            value = lambda name: reduce(lambda values, key: values[key], name.split("/"), found)
            for y in ys:
                line = ", ".join([y, *(f"{name} {value(name)}" for name in by)])
                lines[line][float(value(x))].append(float(value(y)))
        except (ValueError, KeyError, TypeError) as e:
            fail(f"{folder}: what it holds under {', '.join([x, *ys, *by])} cannot be drawn: {e}")
    shares = all(y.startswith(("win_rate", "gap_closed", "by_t")) for y in ys)  # drawn in per cent
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for label, points in lines.items():
        places = sorted(points)
        values = [(100 if shares else 1) * np.array(points[p]) for p in places]
        axes.errorbar(places, [v.mean() for v in values], [v.std(ddof=len(v) > 1) for v in values], fmt="o-", ms=4,
                      label=label.replace("/", " ").replace("_", " "))
    places = [p for points in lines.values() for p in points]
    if min(places) > 0 and max(places) > 10 * min(places):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.set_xlabel(x)
    axes.set_ylabel("per cent" if shares else "")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(out, dpi=100)
    print(f"wrote {out}")
    return lines


# ---- the script ----

# What unset flags fall to: (the toy, Wan 2.1 1.3B at 480p by its own README).
RECIPES = {"steps": (16, 50), "shift": (3.0, 8.0), "cfg": (4.5, 6.0), "frames": (FRAMES, 81),
           "size": ((SIZE, SIZE), (480, 832)), "batch": (64, 1)}


@dataclass
class Args:
    model: str = "assets/base"              # the model: a run folder, or a Wan folder or hub repository
    ckpt: str = ""                          # run folder of an aligned model, in place of --model
    lora: str = ""                          # LoRA file to put on --model
    prompt: list = ()                       # what to draw
    prompts: str = ""                       # or a CSV or JSONL file with a column `prompt`
    n_per_prompt: int = 1                   # videos per prompt
    negative: str = ""                      # Wan: the prompt that guidance moves away from
    frames: int | None = None               # Wan: frames, 4k + 1, at 16 per second
    size: tuple | None = None               # Wan: height and width, multiples of 16
    steps: int | None = None                # Euler steps
    shift: float | None = None              # timestep shift
    cfg: float | None = None                # classifier-free guidance scale; 1 is off
    nrg: str = ""                           # run folder of a noisy reward: guide by it (Flow-NRG)
    rg_scale: float = 4.0                   # strength of reward guidance, the paper's w
    dim_w: tuple = (1.0, 1.0, 1.0)          # weights of VQ, MQ, TA in the guiding reward
    max_ratio: float = 0.3                  # longest guidance, in velocity norms
    batch: int | None = None                # videos at once
    dtype: Literal["fp32", "bf16"] | None = None  # of the linear maps; unset: bf16 for a Wan on CUDA
    seed: int = 0                           # of the noise
    eval: int = 0                           # toy: instead of writing videos, win rates on this many held-out draws
    split: Literal["eval", "val"] = "eval"  # toy, with --eval: prompts to draw; val is for tuning
    against: str = ""                       # model to compare with; base: the same without adapters; unset: unguided
    reward: str = ""                        # Wan: who judges --against, and the best and worst of --n_per_prompt
    template: str = ""                      # for the released VideoReward: the authors' prompt_template.py
    compare: list = ()                      # run folders to compare by their eval.json; nothing is sampled
    x: str = ""                             # with --compare: draw the numbers --y of the runs over this one
    y: list = ("win_rate/Overall",)         # arguments, or paths into eval.json
    by: list = ()                           # arguments that tell lines apart
    out: str = "runs/sample"                # folder for the results; with --compare: the picture, a .png


def file_names(args, rows):
    """A file name without ending for each video: 000, 001, .. or, of a prompts file, `<prompt>-<i>` as VBench expects
    (prompt_shorter where the file has that column).
    """
    if not args.prompts:
        return [f"{i:03}" for i in range(len(rows) * args.n_per_prompt)]
    shorts = [re.sub(r"[/\x00-\x1f]", " ", (row.get("prompt_shorter") or row["prompt"]).strip()) for row in rows]
    shorts = [short.encode()[:180].decode(errors="ignore") for short in shorts]  # a file name has 255 bytes at most
    return [f"{short}-{i}" for short in shorts for i in range(args.n_per_prompt)]


def read_prompts(args):
    """[{"prompt": ..}] of the command line or the prompts file, empty ones refused by their line."""
    if not args.prompts:
        return [{"prompt": p} for p in args.prompt]
    lines = read_table(args.prompts)
    if not lines or "prompt" not in lines[0][1]:
        fail(f"{args.prompts} needs a column `prompt` and at least one row")
    for line, row in lines:
        if not (row.get("prompt") or "").strip():
            fail(f"{args.prompts}, row {line} has no prompt")
    rows = [row for _, row in lines]
    names, last = file_names(args, rows), {}
    for k, name in enumerate(names):
        if last.setdefault(name, k) != k:
            fail(f"{args.prompts}: two prompts would both be {name}.mp4; leave one out")
    return rows


def trained_on(ckpt):
    """The prompts of the pairs that the run ckpt was aligned with; none where it or its pairs file can't tell."""
    file = Path(ckpt) / "config.json"
    args = read_json(file).get("args") if ckpt and file.exists() else None
    pairs = args.get("pairs") if isinstance(args, dict) else None
    return {row.get("prompt", "").strip() for _, row in read_table(pairs)} if pairs and Path(pairs).exists() else set()


def check(args):
    """(rows of prompts, whether the model is the toy): fill unset flags, refuse what cannot work before loading it."""
    if bool(args.prompt) + bool(args.prompts) + (args.eval > 0) != 1 or args.x:
        fail(f"one thing at a time: --prompt \"{PROMPTS[0]}\", --prompts FILE, --eval 512 or --compare RUN RUN")
    check_counts(args, "n_per_prompt", "steps", "batch")
    if len(args.dim_w) != len(DIMS):
        fail(f"--dim_w takes {len(DIMS)} numbers, for {', '.join(DIMS)}; e.g. --dim_w 0.5,0.5,0")
    toy = origin(args.ckpt or args.model)[1]
    for name, columns in RECIPES.items():
        if getattr(args, name) is None:
            setattr(args, name, columns[not toy])
    args.dtype = args.dtype or ("fp32" if toy or not torch.cuda.is_available() else "bf16")
    rows = read_prompts(args)
    if toy:
        if args.reward:
            fail("--reward judges a Wan's videos: those of Shapes world have an oracle, which --eval 512 asks")
        if (args.frames, *args.size) != (FRAMES, SIZE, SIZE):
            fail("--frames and --size are for a Wan: videos of Shapes world have one size")
        with user_errors():
            attributes([row["prompt"] for row in rows])
    else:
        check_clip_args(args)
        if args.eval:
            fail("--eval draws prompts of Shapes world: for a Wan give --prompts FILE --against base --reward RUN")
        if args.reward and not args.against and args.n_per_prompt < 2:
            fail("--reward judges a comparison or picks the best of several: add --against base or --n_per_prompt 4")
        if shared := args.against and trained_on(args.ckpt) & {row["prompt"].strip() for row in rows}:
            print(f"{len(shared)} of the prompts are in the pairs that {args.ckpt} saw: win rates on them flatter it")
    for path in filter(None, (args.nrg, args.reward)):
        check_reward(path, toy)
    if args.lora and not Path(args.lora).is_file():
        fail(f"--lora {args.lora} does not exist")
    folder = Path(find_model(args.ckpt or args.model))
    if args.against == "base" and not (args.lora or (folder / "lora.safetensors").exists()):
        fail("--against base switches adapters off and this model has none: name the model to compare with")
    check_not_model(args.out, args.ckpt or args.model)
    check_out(args.out)
    return rows, toy


def main(args):
    """Sample, evaluate or compare; returns what eval.json holds, where there is one, or the lines of a figure."""
    if args.compare:
        unset = Path(find(args.compare[-1])).parent / ("plot.png" if args.x else "compare.png")
        out = unset if args.out == Args.out else Path(args.out)
        if out.suffix != ".png" or not out.absolute().parent.is_dir():
            fail(f"--out {args.out}: --compare draws one .png, in a folder that exists")
        return plot(args.compare, args.x, args.y, args.by, out) if args.x else compare(args.compare, out)
    start_ranks()
    rows, toy = check(args)
    device, path = "cuda" if torch.cuda.is_available() else "cpu", args.ckpt or args.model
    dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    model = load_model(path, dtype)
    if args.lora:
        with user_errors():
            load_lora(model, args.lora)
    model.to(device)
    guide = LatentReward.from_pretrained(args.nrg).to(device) if args.nrg else None
    for block in guide.dit.blocks if guide else ():
        block.checkpointing = not toy                                           # a gradient through a Wan takes memory
    judge = load_reward(args.reward, template=args.template).to(device) if args.reward else None
    codec = ShapesCodec() if toy else WanCodec(origin(path)[0], device)
    run, ratios = start_run(args, device), []
    prompts = [row["prompt"] for row in rows for _ in range(args.n_per_prompt)] or eval_prompts(args.eval, args.split)
    texts = embed_all(codec, prompts, args.negative)
    settings = dict(codec=codec, prompts=prompts, texts=texts, seed=args.seed, ts=timesteps(args.steps, args.shift),
                    size=(args.frames, *args.size), cfg_scale=args.cfg, negative=args.negative, batch=args.batch)
    drawn = generate(model, **settings, reward=guide, rg_scale=args.rg_scale, dim_w=args.dim_w,
                     max_ratio=args.max_ratio, ratios=ratios)
    if args.against == "base":
        start = lambda: lora_disabled(model)
    else:
        other = load_model(args.against, dtype).to(device) if args.against else model
        start = lambda: nullcontext(other)

    if args.eval:
        videos = torch.stack(collect([video for _, video in drawn]))
        with start() as start_model:
            start_videos = torch.stack(collect([video for _, video in generate(start_model, **settings)]))
        result = evaluate(videos, start_videos, prompts)
        report(run, result, prompts, videos, start_videos)
    else:
        names, result = file_names(args, rows), None
        write = partial(write_videos, names=names, fps=codec.fps, toy=toy, keep=isinstance(judge, LatentReward))
        latents, looks = write(run, drawn)
        if args.against:
            with start() as start_model:
                start_latents, start_looks = write(run / "start", generate(start_model, **settings))
        if args.reward:
            r = on_rank_0(judged)(judge, run, names, latents, prompts, texts)
            if args.n_per_prompt > 1:
                on_rank_0(write_pairs)(run / "pairs.csv", names, prompts, overall(r), args.n_per_prompt)
        if args.reward and args.against:
            r_start = on_rank_0(judged)(judge, run / "start", names, start_latents, prompts, texts)
            result = {"win_rate": win_rates(r, r_start), "judge": args.reward, "look": looks, "look_start": start_looks,
                      "n": len(prompts)}
            on_rank_0(write_json)(run / "eval.json", result)
            print(table({run.name: [result]}))
            if said := hacking(result):
                print(said)
    if ratios:
        by_step = [np.mean(ratios[k::args.steps - 1]) for k in range(args.steps - 1)]
        print("guidance / velocity, by step:", " ".join(f"{ratio:.2f}" for ratio in by_step))
    return result


def write_videos(folder, drawn, names, fps, toy, keep):
    """Write drawn (latents, video) pairs as <name>.mp4 and the first of them as samples.png; returns the latents, None
    unless they are to keep, and the means of look.
    """
    folder.mkdir(exist_ok=True)
    latents, looks, cells = [], [], []
    for name, (x, video) in zip(names[RANK::WORLD], drawn):
        if keep:
            latents.append(x)
        looks.append(look(video))
        if len(cells) < 12:
            some = np.linspace(0, video.shape[1] - 1, min(8, video.shape[1])).round()
            cells.append([(name, video[:, some])])
        if toy:                                                                 # 24 pixels are few to look at
            video = video.repeat_interleave(8, 2).repeat_interleave(8, 3)
        write_video(folder / f"{name}.mp4", video, fps)
    on_rank_0(contact_sheet)(folder / "samples.png", collect(cells)[:12])
    print(f"wrote {len(names)} mp4 and samples.png to {folder}")
    looks = collect(looks)
    latents = torch.stack(collect(latents)) if keep else None
    return latents, {name: round(np.mean([x[name] for x in looks]), 4) for name in looks[0]}


def judged(reward, folder, names, latents, prompts, texts):
    """Normalised scores (n, 3) of generated videos: of their latents, or of their files by a VideoReward."""
    if isinstance(reward, LatentReward):
        return score_clean(reward, latents, torch.stack([texts[prompt] for prompt in prompts]))
    return score_videos(reward, [folder / f"{name}.mp4" for name in names], prompts, folder / "scores.jsonl")


def write_pairs(path, names, prompts, r, n):
    """Write on-policy pairs for train_align.py: of the n videos of each prompt the best and the worst by rewards r."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "chosen", "rejected"])
        for i in range(0, len(names), n):
            best, worst = i + r[i:i + n].argmax().item(), i + r[i:i + n].argmin().item()
            rows.writerow([prompts[i], f"{names[best]}.mp4", f"{names[worst]}.mp4"])
    print(f"the best and the worst of each prompt: train_align.py --pairs {path}")


if __name__ == "__main__":
    launch(main, Args, __doc__)
