"""Euler sampling, classifier-free guidance and Flow-NRG; writes videos; win rates.

    python sample.py --prompt "a red circle moving left"                         videos of the base model
    python sample.py --ckpt runs/dpo --prompt "a red circle moving left" --nrg assets/noisy --dim_w 0.5,0.5,0
    python sample.py --nrg assets/noisy --dim_w 0,0,1 --eval 512                 win rates of guidance
    python sample.py --compare runs/sft runs/rwr runs/dpo                        one table, one picture

A velocity is a function of (x, t), t a number; cfg and nrg take velocities and return one. Sampling runs from
t = 1 (noise) to t = 0 (data): x <- x - (t - t_next) v.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (DIMS, FPS, FRAMES, PROMPTS, SIZE, attributes, caption_of, check_out, check_world, contact_sheet,
                  embed_text, fail, find, oracle, overall, parse_args, rng, split_of, start_run, to_float, to_uint8,
                  with_overall, write_json, write_video)
from model import VideoDiT, load_lora, read_tensors, save_tensors
from reward import LatentReward, score_clean


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
        norm = lambda y: y.flatten(1).norm(dim=1) if y.dim() > 1 else y.abs()
        ratio = norm(push) / norm(v.float()).clamp(min=1e-12)                   # (B,)
        if ratios is not None:
            ratios.append(ratio.mean().item())
        keep = (max_ratio / ratio.clamp(min=1e-12)).clamp(max=1).view(-1, *[1] * (x.dim() - 1))
        return v - (keep * push).type_as(v)
    return guided


# ---- models and videos ----

def load_model(path):
    """The VideoDiT of a run folder, fp32, eval mode, its adapters on where it was trained with LoRA."""
    folder = find(path, "transformer", "lora.safetensors")
    try:
        if (folder / "lora.safetensors").exists():
            start = json.loads((folder / "config.json").read_text())["args"]["model"]
            return load_lora(load_model(start), folder / "lora.safetensors").eval().requires_grad_(False)
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        check_world(read_tensors(file)[1], file)
        return VideoDiT.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    except ValueError as e:
        fail(e)


@torch.no_grad()
def generate(model, prompts, seed, steps=16, shift=3.0, cfg_scale=1.0, reward=None, rg_scale=1.0, dim_w=(1, 1, 1),
             max_ratio=float("inf"), ratios=None, batch=64):
    """Videos (n, 3, T, H, W) in [-1, 1], on the CPU, of n prompts; the i-th noise is a function of (seed, i)."""
    device = next(model.parameters()).device
    videos, ts = [], timesteps(steps, shift)
    for i in tqdm(range(0, len(prompts), batch), desc="sampling", leave=False):
        part = prompts[i:i + batch]
        text = embed_text(part).to(device)
        noise = [rng("eval", seed, i + j) for j in range(len(part))]
        eps = torch.stack([torch.randn(3, FRAMES, SIZE, SIZE, generator=g) for g in noise]).to(device)
        at = lambda x, t: t.to(x).expand(len(x))                                # one time for the whole batch
        velocity = lambda x, t: model(x, at(x, t), text)
        if cfg_scale != 1:
            velocity = cfg(velocity, lambda x, t: model(x, at(x, t), torch.zeros_like(text)), cfg_scale)
        if reward is not None:
            r = lambda x, t: reward.score(x, at(x, t), text)
            velocity = nrg(velocity, r, rg_scale, dim_w, max_ratio, ratios)
        videos.append(euler(velocity, eps, ts).clamp(-1, 1).cpu())
    return torch.cat(videos)


# ---- win rates ----

def eval_prompts(n, split="eval"):
    """n prompts: those of the split in turn."""
    names = [p for p in PROMPTS if split_of(p) == split]
    return [names[i % len(names)] for i in range(n)]


def win_rate(r, r_start):
    """Share of samples (n,) with r > r_start, exact ties dropped as in the paper's numbers; 0.5 if none is left."""
    wins, losses = (r > r_start).sum().item(), (r < r_start).sum().item()
    return wins / (wins + losses) if wins + losses else 0.5


def evaluate(videos, start, prompts, reward=None):
    """Win rates of videos over start, made from the same noise: by the oracle, and by the reward that
    labelled the pairs.

    Returns {"win_rate": {"VQ", "MQ", "TA", "Overall"}, "win_rate_reward": ditto, "oracle": mean scores,
    "oracle_start", "n"}.
    """
    names, result = (*DIMS, "Overall"), {}
    score, score_start = oracle(videos, prompts), oracle(start, prompts)
    judges = {"win_rate": (with_overall(score), with_overall(score_start))}
    if reward is not None:
        text = embed_text(prompts)
        judged = [score_clean(reward, x, text) for x in (videos, start)]
        judges["win_rate_reward"] = [torch.cat([r, overall(r)[:, None]], dim=1) for r in judged]
    for name, (r, r_start) in judges.items():
        result[name] = {dim: round(win_rate(r[:, k], r_start[:, k]), 4) for k, dim in enumerate(names)}
    for name, s in (("oracle", score), ("oracle_start", score_start)):
        result[name] = {dim: round(s[:, k].mean().item(), 4) for k, dim in enumerate(DIMS)}
    return {**result, "n": len(prompts)}


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
    print(table({run.name: result}))


def table(results):
    """Markdown: one row per run and judge, win rates in per cent."""
    names = ("Overall", *DIMS)
    lines = ["| run | judge | " + " | ".join(names) + " | n |", "|---|---|" + "---|" * 5]
    for run, result in results.items():
        for judge, key in (("oracle", "win_rate"), ("reward", "win_rate_reward")):
            if key in result:
                rates = " | ".join(f"{100 * result[key][dim]:.1f} %" for dim in names)
                lines.append(f"| {run} | {judge} | {rates} | {result['n']} |")
    return "\n".join(lines)


def compare(runs, out):
    """Print one table of the runs' win rates; draw their first samples side by side, after the start model's."""
    folders = [find(run, "eval.json") for run in runs]
    print(table({folder.name: json.loads((folder / "eval.json").read_text()) for folder in folders}))
    samples = [read_tensors(folder / "samples.safetensors") for folder in folders]
    prompts = json.loads(samples[0][1]["prompts"])
    columns = [("start", samples[0][0]["start"])]
    columns += [(folder.name, tensors["videos"]) for folder, (tensors, _) in zip(folders, samples)]
    contact_sheet(out, [[(f"{prompt}: {name}" if name == "start" else name, to_float(videos[i]))
                         for name, videos in columns] for i, prompt in enumerate(prompts[:6])], max_frames=4)
    print(f"wrote {out}")


# ---- the script ----

@dataclass
class Args:
    ckpt: str = "assets/base"               # run folder of the model
    prompt: list = ()                       # what to draw; several prompts make several videos
    n: int = 1                              # videos per prompt
    steps: int = 16                         # Euler steps
    shift: float = 3.0                      # timestep shift
    cfg: float = 4.5                        # classifier-free guidance scale; 1 is off
    nrg: str = ""                           # run folder of a noisy reward: guide by it (Flow-NRG)
    rg_scale: float = 4.0                   # strength of reward guidance, the paper's w
    dim_w: tuple = (1.0, 1.0, 1.0)          # weights of VQ, MQ, TA in the guiding reward
    max_ratio: float = 0.3                  # longest guidance, in velocity norms
    seed: int = 0                           # of the noise
    eval: int = 0                           # instead of writing videos, win rates on this many held-out draws
    against: str = ""                       # with --eval: the run to beat; unset, the same one unguided
    split: str = "eval"                     # with --eval: prompts to draw, eval or val
    compare: list = ()                      # run folders to compare by their eval.json; nothing is sampled
    out: str = "runs/sample"                # folder for the results


def main(args):
    """Sample, evaluate or compare; returns the videos or the result of evaluate."""
    if args.compare:
        return compare(args.compare, Path(find(args.compare[-1])).parent / "compare.png")
    if not (args.prompt or args.eval):
        fail(f"nothing to draw: give --prompt \"{PROMPTS[0]}\", --eval 512 or --compare RUN RUN")
    if len(args.dim_w) != len(DIMS):
        fail(f"--dim_w takes {len(DIMS)} numbers, for {', '.join(DIMS)}; e.g. --dim_w 0.5,0.5,0")
    try:
        attributes(args.prompt)
    except ValueError as e:
        fail(e)
    check_out(args.out)
    model = load_model(args.ckpt)
    reward = LatentReward.from_pretrained(args.nrg) if args.nrg else None
    start = load_model(args.against) if args.against else model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for module in (model, start, reward):
        module is not None and module.to(device)
    run, ratios = start_run(args, device), []
    prompts = [p for p in args.prompt for _ in range(args.n)] or eval_prompts(args.eval, args.split)
    settings = dict(seed=args.seed, steps=args.steps, shift=args.shift, cfg_scale=args.cfg)
    videos = generate(model, prompts, **settings, reward=reward, rg_scale=args.rg_scale, dim_w=args.dim_w,
                      max_ratio=args.max_ratio, ratios=ratios)
    if ratios:
        by_step = [np.mean(ratios[k::args.steps - 1]) for k in range(args.steps - 1)]
        print("guidance / velocity, by step:", " ".join(f"{ratio:.2f}" for ratio in by_step))
    if args.eval:
        start_videos = generate(start, prompts, **settings)
        result = evaluate(videos, start_videos, prompts)
        report(run, result, prompts, videos, start_videos)
        return result
    score = oracle(videos, prompts)
    for i, video in enumerate(videos):
        write_video(run / f"{i:03}.mp4", video.repeat_interleave(8, 2).repeat_interleave(8, 3), FPS)
    contact_sheet(run / "samples.png", [[(f"{p}  {caption_of(s)}", v)] for p, s, v in zip(prompts, score, videos)])
    print(f"wrote {len(videos)} mp4 and samples.png to {run}")
    return videos


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
