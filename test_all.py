"""Executable specification: what the method, the model and the toy world are, stated as facts. CPU, no network.

    pytest test_all.py
    python test_all.py --bench                                          how fast it is, beside diffusers
    python test_all.py --bench --preset wan-1.3b --frames 81 --size 480,832 --dtype bf16 --checkpointing
"""
import contextlib
import csv
import importlib.util
import inspect
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import data
import losses
import model as model_file
import reward
import sample
import train_align
import train_reward
from data import DEFECTS, DIMS, GROUND, PROMPTS, attributes, oracle, render, rng, to_uint8
from losses import beta_schedule, bt, btt, flow_dpo, flow_rwr, flow_sft, masked_mean, mix, regression, velocity_error
from data import normalised, with_overall
from model import PRESETS, UserError, VideoDiT, add_lora, load_lora, lora_disabled, rotary, rotate, save_lora
from sample import cfg, euler, nrg, timesteps

HERE = Path(__file__).parent
TINY = replace(PRESETS["toy"], dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16)


def random_model(config=TINY, seed=0):
    """A model whose head is not zero, so that its output says something."""
    torch.manual_seed(seed)
    m = VideoDiT(config)
    torch.nn.init.normal_(m.head.head.weight, std=0.1)
    return m.eval()


def random_batch(n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 3, 4, 8, 8, generator=g), torch.rand(n, generator=g), torch.randn(n, 8, 32, generator=g))


# ---- losses ----

def test_convention_t0_is_data_t1_is_noise_and_v_is_the_derivative():
    x0, eps = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64), torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    assert torch.equal(mix(x0, eps, torch.zeros(2)), x0) and torch.equal(mix(x0, eps, torch.ones(2)), eps)
    h = 1e-6
    assert torch.allclose((mix(x0, eps, t + h) - mix(x0, eps, t - h)) / (2 * h), eps - x0, atol=1e-8)


def test_eps_error_is_one_minus_t_squared_times_the_velocity_error():
    x0, eps, v_pred = (torch.randn(4, 3, 2, 4, 4) for _ in range(3))
    t = torch.rand(4)
    eps_pred = mix(x0, eps, t) + (1 - t).view(-1, 1, 1, 1, 1) * v_pred
    assert torch.allclose(velocity_error(eps_pred, eps), (1 - t) ** 2 * velocity_error(v_pred, eps - x0), rtol=1e-4)


def test_dpo_is_log_2_at_the_reference_and_its_gradient_fits_the_winner_and_unfits_the_loser():
    v_w, v_l, v_theta_w, v_theta_l = (torch.randn(3, 2, 2, 4, 4) for _ in range(4))
    ref_w, ref_l = velocity_error(v_theta_w, v_w), velocity_error(v_theta_l, v_l)
    for v in (v_theta_w, v_theta_l):
        v.requires_grad_()
    loss = flow_dpo(velocity_error(v_theta_w, v_w), velocity_error(v_theta_l, v_l), ref_w, ref_l, beta=500.0)
    assert torch.allclose(loss, torch.full((3,), np.log(2.0), dtype=torch.float32), atol=1e-6)
    loss.sum().backward()
    toward_w, toward_l = (-(v.grad * (target - v)).sum() for v, target in ((v_theta_w, v_w), (v_theta_l, v_l)))
    assert toward_w > 0 > toward_l
    # the closed form of the gradient: d loss / d err_w = beta / 2 * sigmoid(beta / 2 * difference)
    err = torch.tensor([0.31], requires_grad=True)
    flow_dpo(err, torch.tensor([0.30]), torch.tensor([0.30]), torch.tensor([0.30]), 100.0).backward()
    assert torch.allclose(err.grad, 50 * torch.sigmoid(torch.tensor([0.5])), rtol=1e-4)


def test_beta_schedules():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert beta_schedule(8.0, t, "constant").tolist() == [8, 8, 8]
    assert beta_schedule(8.0, t, "(1-t)^2").tolist() == [8, 4.5, 0]
    assert beta_schedule(8.0, t, "t^2").tolist() == [0, 0.5, 8]
    assert torch.allclose(beta_schedule(8.0, t, "(1-t)/t"), torch.tensor([8 / 0.05, 24, 0]))
    with pytest.raises(ValueError, match="constant"):
        beta_schedule(8.0, t, "cosine")


def test_rwr_with_equal_rewards_is_sft_and_weights_have_mean_1_before_the_clip():
    err = torch.rand(5, requires_grad=True)
    assert torch.allclose(flow_rwr(err, torch.full((5,), 3.0)), flow_sft(err))
    r = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    loss = flow_rwr(err, r)
    assert torch.allclose(loss / err, torch.exp(r) / torch.exp(r).mean())
    loss.sum().backward()
    assert r.grad is None
    assert flow_rwr(torch.ones(100), torch.cat([torch.zeros(99), torch.tensor([1000.0])])).tolist() == [0.0] * 99 + [10.0]


def test_btt_probabilities_sum_to_one_and_tie_1_gives_bt():
    d, one = torch.randn(50, dtype=torch.float64) * 4, torch.ones(50)
    total = sum(torch.exp(-btt(d, label * one, tie=5.0)) for label in (1, 0, -1))
    assert torch.allclose(total, torch.ones(50, dtype=torch.float64))
    for label in (1, -1):
        assert torch.allclose(btt(d, label * one, tie=1.0), bt(d, label * one))
    p_a, p_b = torch.exp(d) / (torch.exp(d) + 5), 1 / (5 * torch.exp(d) + 1)    # Rao and Kupper's own form, r_B = 0
    assert torch.allclose(torch.exp(-btt(d, one)), p_a) and torch.allclose(torch.exp(-btt(d, -one)), p_b)
    assert abs(torch.exp(-btt(torch.zeros(1), torch.zeros(1))).item() - 24 / 36) < 1e-6


def test_unlabelled_entries_leave_loss_and_gradient_untouched():
    nan = float("nan")
    label, score = torch.tensor([1.0, nan, -1.0, 0.0, nan]), torch.tensor([1.0, nan, 2.0, 0.5, nan])
    for loss, target, counted in ((bt, label, [0, 2]), (btt, label, [0, 2, 3]), (regression, score, [0, 2, 3])):
        d = torch.tensor([0.3, nan, -0.2, 5.0, 1e30], requires_grad=True)
        out = loss(d, target)
        assert all(out[i] == 0 for i in range(5) if i not in counted)
        out.sum().backward()
        assert all((d.grad[i] != 0) == (i in counted) for i in range(5)) and d.grad.isfinite().all()
    assert masked_mean(torch.tensor([1.0, 7.0, 3.0]), torch.tensor([1.0, nan, 0.0])) == 2.0
    assert masked_mean(torch.tensor([nan]), torch.tensor([nan])) == 0.0
    assert btt(torch.zeros(1, dtype=torch.float64), torch.ones(1)).dtype == torch.float64
    assert velocity_error(torch.zeros(1, 2).bfloat16(), torch.ones(1, 2).bfloat16()).dtype == torch.float32


def test_each_loss_works_after_copy_and_paste():
    source = "import torch\nimport torch.nn.functional as F\n"
    ones = torch.ones(2)
    calls = {"flow_sft": (ones,), "flow_rwr": (ones, ones), "flow_dpo": (ones, ones, ones, ones, 500.0), "bt": (ones, ones), "btt": (ones, ones),
             "beta_schedule": (500.0, ones, "t^2"), "regression": (ones, ones), "masked_mean": (ones, ones), "mix": (ones, ones, ones),
             "velocity_error": (ones[:, None], ones[:, None])}
    for name, arguments in calls.items():
        scope = {}
        exec(source + inspect.getsource(getattr(losses, name)), scope)
        assert torch.equal(scope[name](*arguments), getattr(losses, name)(*arguments))


# ---- the model ----

def test_presets_have_the_published_sizes():
    sizes = {}
    for name, config in PRESETS.items():
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in VideoDiT(config).parameters())
    assert round(sizes["wan-1.3b"] / 1e9, 3) == 1.419 and round(sizes["wan-14b"] / 1e9, 3) == 14.288


def test_parameter_names_are_official_wan():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in VideoDiT(PRESETS["wan-1.3b"]).state_dict().items()}
    official = {"patch_embedding.weight": (1536, 16, 1, 2, 2), "text_embedding.0.weight": (1536, 4096), "time_embedding.2.bias": (1536,),
                "time_projection.1.weight": (9216, 1536), "blocks.29.self_attn.norm_q.weight": (1536,), "blocks.0.cross_attn.k.weight": (1536, 1536),
                "blocks.0.norm3.weight": (1536,), "blocks.0.ffn.0.weight": (8960, 1536), "blocks.0.modulation": (1, 6, 1536),
                "head.modulation": (1, 2, 1536), "head.head.weight": (64, 1536)}
    assert {k: shapes.get(k) for k in official} == official
    assert len(shapes) == 30 * 27 + 15


def test_a_batch_of_two_is_two_batches_of_one_and_no_input_is_ignored():
    m, (x, t, text) = random_model(), random_batch()
    with torch.no_grad():
        both = m(x, t, text)
        assert both.shape == x.shape
        for i in (0, 1):
            assert torch.allclose(both[i:i + 1], m(x[i:i + 1], t[i:i + 1], text[i:i + 1]), atol=1e-5)
        for changed in ((x.flip(2), t, text), (x, t * 0.5, text), (x, t, text.flip(0))):
            assert (m(*changed) - both).abs().max() > 1e-3
        assert m(x, t, text, depth=1).shape == (2, 2 * 2 * 2, TINY.dim)


def test_patches_come_back_where_they_were():
    m, (x, t, text) = random_model(replace(TINY, num_layers=0)), random_batch(1)
    with torch.no_grad():
        a = m(x, t, text)
        x[:, :, 2:, :4, 4:] += 1.0                                              # one patch: frames 2-3, rows 0-3, columns 4-7
        changed = (m(x, t, text) - a).abs() > 1e-6
    assert changed[:, :, 2:, :4, 4:].any() and changed.sum() == changed[:, :, 2:, :4, 4:].sum()


def test_rotary_positions_are_relative():
    cos, sin = rotary((6, 6, 6), 24, torch.device("cpu"))
    q, k = torch.randn(2, 24, dtype=torch.float64)
    at = lambda y, f, h, w: rotate(y[None, None, None].float(), *(x[[f * 36 + h * 6 + w]] for x in (cos, sin))).flatten()
    for axis in range(3):
        place = lambda n: [1 + n * (axis == i) for i in range(3)]
        near, moved, further = (at(q, *place(i)) @ at(k, *place(j)) for i, j in ((0, 2), (1, 3), (0, 3)))
        assert torch.allclose(near, moved, atol=1e-5) and not torch.allclose(near, further, atol=1e-3)


def test_lora_off_is_bitwise_the_base_and_its_file_is_the_same_model(tmp_path):
    m, batch = random_model(), random_batch()
    with torch.no_grad():
        base = m(*batch)
        add_lora(m, rank=4, alpha=8.0)
        assert torch.equal(m(*batch), base)                                     # B starts at zero
        for name, p in m.named_parameters():
            assert p.requires_grad == ("lora" in name)
            if "lora" in name:
                p.normal_(std=0.1)
        tuned = m(*batch)
        assert (tuned - base).abs().max() > 1e-3
        with lora_disabled(m):
            assert torch.equal(m(*batch), base)
        assert torch.equal(m(*batch), tuned)
        save_lora(m, tmp_path / "lora.safetensors")
        again = load_lora(random_model(), tmp_path / "lora.safetensors")
        assert torch.allclose(again(*batch), tuned, atol=1e-5)
    keys = set(model_file.read_tensors(tmp_path / "lora.safetensors")[0])
    assert keys == {f"diffusion_model.blocks.{i}.{a}_attn.{n}.lora_{ab}.weight"
                    for i in (0, 1) for a in ("self", "cross") for n in "qkvo" for ab in "AB"}


def test_diffusers_wan_gives_the_same_output_and_reads_what_we_write(tmp_path, monkeypatch):
    from diffusers import WanTransformer3DModel
    monkeypatch.setattr(WanTransformer3DModel, "_keep_in_fp32_modules", None)   # else its loader asks for accelerate
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24,
                                   freq_dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads").eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "diffusers" / "transformer")
    ours = VideoDiT.from_pretrained(tmp_path / "diffusers").eval()
    ours.save_pretrained(tmp_path / "ours")
    back = WanTransformer3DModel.from_pretrained(tmp_path / "ours").eval()
    official = tmp_path / "official"                                            # Wan's own names and config keys
    official.mkdir()
    model_file.save_tensors(ours.state_dict(), official / "diffusion_pytorch_model.safetensors")
    (official / "config.json").write_text(json.dumps(dict(_class_name="WanModel", model_type="t2v", dim=32, ffn_dim=48, freq_dim=32, in_dim=4,
                                                          out_dim=4, num_heads=2, num_layers=2, text_len=512, eps=1e-6, text_dim=24)))
    official = VideoDiT.from_pretrained(official).eval()
    for grid, words in (((1, 4, 4), 512), ((3, 6, 10), 7), ((5, 2, 14), 512)):
        x, t, text = torch.randn(2, 4, *grid), torch.rand(2), torch.randn(2, words, 24)
        text[:, 5:] = 0                                                         # Wan's padding, visible to attention
        with torch.no_grad():
            reference = theirs(x, 1000 * t, text, return_dict=False)[0]
            for output in (ours(x, t, text), official(x, t, text), back(x, 1000 * t, text, return_dict=False)[0]):
                assert (output - reference).norm() < 1e-5 * reference.norm()
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**ours.config.to_diffusers(), "image_dim": 1280}))
    with pytest.raises(ValueError, match="text-to-video"):
        VideoDiT.from_pretrained(tmp_path / "ours")


def test_light_imports_stay_light():
    code = "import sys, model, losses, data; print(sorted({'transformers', 'diffusers', 'av', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True).stdout.strip() == "[]"


# ---- sampling ----

def test_timesteps():
    assert timesteps(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert torch.allclose(timesteps(4, shift=3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0]))


def gaussian(mu=0.7, s=0.5):
    """The exact velocity of data N(mu, s^2), and E[x0 | xt]."""
    def mean_x0(x, t):
        return mu + (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2) * (x - (1 - t) * mu)
    def velocity(x, t):
        x0 = mean_x0(x, t)
        return ((x - (1 - t) * x0) / t) - x0
    return velocity, mean_x0


def test_euler_hits_a_gaussian_and_nrg_its_tilted_mean_but_not_with_the_wrong_sign():
    velocity, mean_x0 = gaussian()
    eps, ts = torch.randn(20000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64), timesteps(200).double()
    x = euler(velocity, eps, ts)
    assert abs(x.mean() - 0.700) < 0.01 and abs(x.std() - 0.496) < 0.01
    # r(x0) = 2 x0, w = 2: the target is N(0.7 + w a s^2, s^2) = N(1.7, s^2); the exact noisy reward is E[r | xt] plus a constant
    exact = lambda x, t: 2 * mean_x0(x, t).float()
    ratios = []
    x = euler(nrg(velocity, exact, rg_scale=2.0, dim_w=(1.0,), ratios=ratios), eps, ts)
    assert abs(x.mean() - 1.7) < 0.02 and abs(x.std() - 0.496) < 0.01
    assert len(ratios) == 199                                                   # t = 1 is skipped
    assert euler(nrg(velocity, exact, rg_scale=-2.0, dim_w=(1.0,)), eps, ts).mean() < -0.2
    # a limit keeps the guidance within its share of the velocity
    v, guided = velocity(eps, ts[9]), nrg(velocity, exact, 1000.0, (1.0,), max_ratio=0.1)(eps, ts[9])
    assert torch.allclose((guided - v).abs(), 0.1 * v.abs(), rtol=1e-3)


def test_cfg_interpolates_and_extrapolates():
    a, b = (lambda x, t: x + 1), (lambda x, t: x - 1)
    x = torch.zeros(2)
    assert cfg(a, b, 0.0)(x, 1).tolist() == [-1, -1] and cfg(a, b, 1.0)(x, 1).tolist() == [1, 1] and cfg(a, b, 3.0)(x, 1).tolist() == [5, 5]


def test_sampling_is_a_function_of_seed_and_index():
    videos = lambda seed, batch: sample.toy_videos(random_model(), PROMPTS[:3], seed, steps=2, batch=batch)
    a = videos(1, 3)
    assert torch.equal(a, videos(1, 3)) and torch.allclose(a, videos(1, 2), atol=1e-5)
    assert (a - videos(2, 3)).abs().max() > 0.1


def test_win_rate_drops_exact_ties():
    assert sample.win_rate(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 0.0, 1.0])) == 2 / 3
    assert sample.win_rate(torch.ones(3), torch.ones(3)) == 0.5


# ---- the toy world ----

def test_each_oracle_score_falls_with_its_own_defect_and_hardly_moves_with_the_others():
    prompts = PROMPTS
    wanted = attributes(prompts)
    own = {"blur": 0, "wash": 0, "jitter": 1, "stutter": 1, "teleport": 1, "colour": 2, "shape": 2, "direction": 2}
    for defect, dim in own.items():
        rows = []
        for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
            defects = torch.zeros(len(prompts), len(DEFECTS))
            defects[:, DEFECTS.index(defect)] = strength
            rows.append(oracle(render(wanted, defects, rng(1)).float(), prompts).mean(0))
        table = torch.stack(rows)                                               # (strength, dimension)
        assert (table[0] > 0.96).all()
        assert (table.diff(dim=0)[:, dim] < -0.02).all() and table[-1, dim] < 0.7, f"{defect}\n{table}"
        assert all((table[:, k] - table[0, k]).abs().max() < 0.08 for k in range(3) if k != dim), f"{defect}\n{table}"


def test_the_oracle_is_not_fooled_off_the_manifold():
    prompts = PROMPTS[:48]
    clean = render(attributes(prompts), torch.zeros(48, 8), rng(1)).float()
    flicker = clean.clone()
    flicker[:, :, ::2] = 2 * GROUND - 1
    g = torch.Generator().manual_seed(0)
    mean = lambda video: dict(zip(DIMS, oracle(video, prompts).mean(0).tolist()))
    empty, noise, white = torch.full_like(clean, 2 * GROUND - 1), torch.rand(clean.shape, generator=g) * 2 - 1, torch.ones_like(clean)
    for video in (empty, noise, white):
        assert max(mean(video).values()) < 0.05
    assert mean(clean[:, :, :1].expand_as(clean))["MQ"] < 0.01                  # static
    assert mean(flicker)["MQ"] < 0.01 and mean(flicker)["VQ"] < 0.6
    assert mean(clean.flip(2))["TA"] < 0.7                                      # backwards: one of three attributes is wrong
    assert oracle(clean * 5, prompts).isfinite().all()


def test_the_split_is_even_and_disjoint():
    splits = [data.split_of(p) for p in PROMPTS]
    assert [splits.count(s) for s in ("train", "val", "eval")] == [45, 9, 18]
    held_out = attributes([p for p, s in zip(PROMPTS, splits) if s == "eval"])
    assert [held_out[:, k].bincount().tolist() for k in (0, 1)] == [[3] * 6, [6] * 3] and held_out[:, 2].bincount().min() >= 4


def test_annotators_tie_as_often_as_people_and_mostly_agree_with_the_oracle():
    pairs = data.toy_pairs(600, "train", seed=0)
    assert all(0.4 <= x <= 0.6 for x in (pairs.label == 0).float().mean(0).tolist())
    score = data.true_scores(pairs)
    d = with_overall(normalised(score[:, 0])) - with_overall(normalised(score[:, 1]))
    assert all(0.8 < reward.accuracy_without_ties(pairs.label[:, k], d[:, k]) < 0.97 for k in range(4))
    assert pairs.mos.unique().tolist() == [1, 2, 3, 4, 5]
    assert np.corrcoef(pairs.mos[..., 1].flatten(), score[..., 1].flatten())[0, 1] > 0.8
    assert {data.split_of(p) for p in pairs.prompts} == {"train"}
    again = data.toy_pairs(600, "train", seed=0)
    assert torch.equal(pairs.videos, again.videos) and torch.equal(pairs.label, again.label)


def test_winner_and_loser_one_after_the_other_give_the_same_gradient():
    m, g = random_model(), torch.Generator().manual_seed(0)
    x0, (eps, t, text) = torch.randn(2, 2, 3, 4, 8, 8, generator=g), random_batch()
    grads = []
    for together in (True, False):
        err = train_align.velocity_errors(m, x0, text, t, eps, together)
        assert err.shape == (2, 2)
        grads.append((err, *torch.autograd.grad((err[:, 0] - 2 * err[:, 1]).sum(), list(m.parameters()))))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads))


def test_label_noise_blurs_labels_and_points():
    right, error = {}, {}
    for noise in (0.1, 1.0, 10.0):
        pairs = data.toy_pairs(400, "train", seed=0, noise=noise)
        score = data.true_scores(pairs)
        d = score[:, 0, 1] - score[:, 1, 1]
        right[noise] = reward.accuracy_without_ties(pairs.label[:, 1], d)
        error[noise] = (pairs.mos - (1 + 4 * score)).abs().mean().item()
    assert right[0.1] > 0.94 > right[1.0] > 0.75 > right[10.0] and error[0.1] < 0.3 < error[1.0] < 1 < error[10.0]


def test_noise_and_order_are_functions_of_seed_step_and_sample():
    t, eps = data.draw_noise((3, 2), 0, 5, [7, 8, 9])
    t2, eps2 = data.draw_noise((3, 2), 0, 5, [9])
    assert t[2] == t2[0] and torch.equal(eps[2], eps2[0]) and not torch.equal(eps[1], eps[2])
    rows = torch.cat([data.step_rows(10, 4, 0, step) for step in range(5)])     # two epochs
    assert rows[:10].sort().values.tolist() == rows[10:].sort().values.tolist() == list(range(10))


def test_videos_survive_their_file(tmp_path):
    video = render(attributes(PROMPTS[:1]), torch.zeros(1, 8), rng(0))[0].float().repeat_interleave(8, 2).repeat_interleave(8, 3)
    data.write_video(tmp_path / "a.mp4", video, fps=8)
    frames, fps = data.read_video(tmp_path / "a.mp4")
    assert frames.shape == (8, 192, 192, 3) and frames.dtype == np.uint8 and fps == 8
    assert np.abs(frames.astype(float) - to_uint8(video).permute(1, 2, 3, 0).numpy()).mean() < 2
    some, _ = data.read_video(tmp_path / "a.mp4", [1, 6])
    assert np.array_equal(some, frames[[1, 6]])
    (tmp_path / "bad.mp4").write_text("not a video")
    for path, indices in (("bad.mp4", None), ("none.mp4", None), ("a.mp4", [99])):
        with pytest.raises(ValueError, match=path):
            data.read_video(tmp_path / path, indices)


# ---- pairs from files ----

def write_clips(folder, names, frames=12, size=(32, 48), fps=8):
    """Small mp4 files of Shapes world's colours, for tests that need real video files."""
    for k, name in enumerate(names):
        video = torch.zeros(3, frames, *size) - 0.5
        video[k % 3, :, 8:20, 8 + k:24 + k] = 0.9
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data.write_video(folder / name, video, fps)


def test_read_pairs_understands_the_authors_csv_genai_bench_and_chosen_rejected(tmp_path):
    write_clips(tmp_path, ["v/a.mp4", "v/b.mp4"])
    (tmp_path / "authors.csv").write_text(
        "path_A,path_B,prompt,VQ,MQ,TA,MOS_A_VQ,MOS_B_VQ\n"
        'v/a.mp4,v/b.mp4,"a cat, asleep",A,same,invalid,4,2.5\nv/b.mp4,v/a.mp4,a dog,B,,A,,\n')
    nan = float("nan")
    pairs = data.read_pairs(tmp_path / "authors.csv")
    assert pairs.prompts == ["a cat, asleep", "a dog"] and pairs.lines == [2, 3]
    assert pairs.videos[0] == (tmp_path / "v/a.mp4", tmp_path / "v/b.mp4")
    assert torch.equal(pairs.label.nan_to_num(9), torch.tensor([[1, 0, nan, nan], [-1, nan, 1, nan]]).nan_to_num(9))
    assert pairs.mos[0, :, 0].tolist() == [4, 2.5] and pairs.mos.isnan().sum() == 10

    (tmp_path / "genai.csv").write_text("prompt,left_model,left_video,right_model,right_video,vote_type\n" + "".join(
        f"p,x,v/a.mp4,y,v/b.mp4,{vote}\n" for vote in ("leftvote", "rightvote", "tievote", "bothbad_vote")))
    label = data.read_pairs(tmp_path / "genai.csv").label
    assert label[:, 3].tolist() == [1, -1, 0, 0] and label[:, :3].isnan().all()

    (tmp_path / "vision.csv").write_text("prompt,video1_path,video2_path,standard_answer\n" + "".join(
        f"p,v/a.mp4,v/b.mp4,{word}\n" for word in ("video1", "video2", "tie", "")))
    assert data.read_pairs(tmp_path / "vision.csv").label[:, 3].nan_to_num(9).tolist() == [1, -1, 0, 9]

    row = {"prompt": "p", "chosen": "v/b.mp4", "rejected": "v/a.mp4"}
    (tmp_path / "dpo.json").write_text(json.dumps([row, row]))
    assert data.read_pairs(tmp_path / "dpo.json").lines == [1, 2]
    (tmp_path / "dpo.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    pairs = data.read_pairs(tmp_path / "dpo.jsonl")
    assert pairs.label[:, 3].tolist() == [1, 1] and pairs.lines == [1, 3]


@pytest.mark.parametrize("text, says", [
    ("", "holds no pairs"), ("path_A,path_B,prompt,VQ\n", "holds no pairs"),
    ("video,caption\na,b\n", "has the columns caption, video; understood are"),
    ("path_A,path_B,prompt\na.mp4,a.mp4,p\n", "understood are"),
    ("path_A,path_B,prompt,VQ\na.mp4,gone.mp4,p,A\na.mp4,a.mp4,,A\n", "row 2: .*gone.mp4 does not exist \\(and 1 more"),
    ("path_A,path_B,prompt,VQ\na.mp4,a.mp4,\xff,A\n", "is not UTF-8"),
    ("path_A,path_B,prompt,VQ\na.mp4,a.mp4,p,1\na.mp4,a.mp4,p,0\n", "has the labels 0, 1: write A, B or same"),
    (f"path_A,path_B,prompt,VQ\n{'x' * 5000}.mp4,a.mp4,p,A\n", "xxx.mp4 does not exist"),
    ("path_A,path_B,prompt,VQ\n\"a\nb.mp4\",a.mp4,p,A\n", "b.mp4 does not exist"),
    (f"path_A,path_B,prompt,VQ\na.mp4,a.mp4,{'long ' * 30000},A\n", "field larger than field limit"),
    ('path_A,path_B,prompt,VQ\na.mp4,a.mp4,"open,A\n', "cannot be read as CSV"),
])
def test_a_bad_pairs_file_ends_in_one_line(text, says, tmp_path, capsys):
    write_clips(tmp_path, ["a.mp4"])
    (tmp_path / "pairs.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as stop:
        data.read_pairs(tmp_path / "pairs.csv")
    said = str(stop.value)
    assert "\n" not in said.replace("a\nb.mp4", "") and re.search(says, said), said


def test_video_info_counts_without_decoding(tmp_path):
    write_clips(tmp_path, ["a.mp4"], frames=11, fps=24)
    assert data.video_info(tmp_path / "a.mp4") == (11, 24.0, 32, 48)
    (tmp_path / "b.mp4").write_text("no video")
    with pytest.raises(ValueError, match="b.mp4 cannot be read as a video"):
        data.video_info(tmp_path / "b.mp4")


# ---- rewards ----

def test_accuracies_are_the_exact_maximum_over_thresholds():
    assert reward.accuracy_with_ties(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])) == 1.0    # "no ties" counts too
    assert reward.accuracy_without_ties(torch.tensor([1.0, -1.0, 0.0, float("nan")]), torch.tensor([0.0, -1.0, 5.0, 5.0])) == 0.5
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        label = torch.randint(-1, 2, (12,), generator=g).float()
        d = torch.randint(-3, 4, (12,), generator=g).float()                    # many equal |d|
        brute = max((torch.where(d.abs() <= e, 0, d.sign()) == label).float().mean().item() for e in (-1, 0, 1, 2, 3))
        assert abs(reward.accuracy_with_ties(label, d) - brute) < 1e-6


def test_a_latent_reward_starts_from_the_base_and_survives_its_file(tmp_path):
    base = random_model()
    r = reward.LatentReward.from_base(base, depth=1)
    x, t, text = random_batch()
    with torch.no_grad():
        assert torch.equal(r.dit(x, t, text, depth=1), base(x, t, text, depth=1))
        r.mean.fill_(0.5)
        r.std.fill_(2.0)
        assert torch.allclose(r.score(x, t, text), (r(x, t, text) - 0.5) / 2)
        r.half().float().save(tmp_path, {"world": data.world_hash()})             # the file is 16 bit
        assert torch.equal(reward.LatentReward.from_pretrained(tmp_path).score(x, t, text), r.score(x, t, text))


# ---- VideoReward: the VLM reward on a tiny random Qwen2-VL with a tiny tokenizer, in the real file layouts ----

CHAT = ("{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'video' %}"
        "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
THEIRS = "Rate: <|VQ_reward|> then <|MQ_reward|> for '{text_prompt}' so {{it}} is <|TA_reward|>.\n"
CONSTANTS = {f"{dim}_{k}": v for dim, mean in zip(DIMS, (3.7, 1.2, 2.8)) for k, v in (("mean", mean), ("std", 2.0))}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with: base/, a tiny Qwen2-VL of 700 vocabulary rows; clips a, b; prompt_template.py; released/, a
    VideoReward in the authors' layout, whole, LoRA not merged; and `truth`, the tensors in it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
    root = tmp_path_factory.mktemp("qwen")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words.train_from_iterator([reward.RUBRIC], trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<|endoftext|>", chat_template=CHAT)
    tokenizer.save_pretrained(root / "base")
    torch.manual_seed(0)
    text = dict(vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                bos_token_id=0, eos_token_id=2, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]))
    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2)
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), range(3, 7)))
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, initializer_range=0.2, **ids))
    for p in model.parameters():                                                # so that every part matters to a score
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.2)
    model.save_pretrained(root / "base")
    write_clips(root, ["a.mp4", "b.mp4"], frames=20, size=(64, 96), fps=10)
    (root / "prompt_template.py").write_text(f'raise SystemExit("ran")\n{reward.THEIR_TEMPLATE} = """{THEIRS}"""\n')

    own = reward.VideoReward.from_base(str(root / "base")).trainable()
    for name, p in own.named_parameters():
        if "lora_B" in name or name in ("rm_head.weight", "rows"):
            torch.nn.init.normal_(p, 0, 0.3)
    truth = {k: v.detach().clone() for k, v in own.state_dict().items()}
    truth["qwen.language_model.embed_tokens.weight"][own.token_ids] = truth.pop("rows")
    step = root / "released" / "checkpoint-30"
    step.mkdir(parents=True)
    torch.save({theirs(k): v for k, v in truth.items()} | {"base_model.model.lm_head.weight": torch.zeros(503, 32)}, step / "model.pth")
    own.tokenizer.save_pretrained(step / "tokenizer")
    settings = {"data_config": {"fps": 2.0, "num_frames": None, "max_frame_pixels": 200704, "sample_type": "uniform",
                                "prompt_template_type": "detailed_special"},
                "model_config": {"model_name_or_path": str(root / "base"), "output_dim": 1, "use_special_tokens": True, "reward_token": "last"},
                "peft_lora_config": {"lora_r": 64, "lora_alpha": 128, "use_rslora": False}, "training_args": {"learning_rate": 2e-6}}
    data.write_json(root / "released" / "model_config.json", settings | {"inference_config": CONSTANTS})
    return root, truth


def theirs(key, new=False, adapter=False):
    """A tensor's name in the authors' files: peft's marks, transformers' names before or after they changed."""
    lora = re.search(r"\.lora_[AB]$", key)
    if lora:
        key += ".weight" if adapter else ".default.weight"
    elif any(f".{name}." in key for name in reward.LINEARS) and "language_model" in key:
        key = re.sub(r"\.(weight|bias)$", r".base_layer.\1", key)
    if not new:
        key = key.replace("qwen.language_model.", "model.").replace("qwen.visual.", "visual.")
    return "base_model.model." + key.replace("qwen.", "model.")


def released(qwen, folder="released"):
    return reward.VideoReward.from_pretrained(qwen[0] / folder, template=qwen[0] / "prompt_template.py")


def clips(qwen, *names):
    return [qwen[0] / f"{name}.mp4" for name in names]


def test_loading_gives_the_scores_of_the_unmerged_model_in_every_layout(qwen, tmp_path):
    root, truth = qwen
    prompts = ["a cat", "a dog"]
    whole = released(qwen)
    r = whole.score(clips(qwen, "a", "b"), prompts, normalise=False)
    assert r.std() > 0.1 and whole.qwen.get_input_embeddings().num_embeddings == len(whole.tokenizer) == 503 < 700
    mean, std = (torch.tensor([CONSTANTS[f"{dim}_{k}"] for dim in DIMS]) for k in ("mean", "std"))
    assert torch.allclose(whole.score(clips(qwen, "a", "b"), prompts), (r - mean) / std)

    unmerged = reward.VideoReward.from_base(root / "base", template=root / "prompt_template.py").trainable().eval()
    unmerged.load_state_dict(truth | {"rows": truth[reward.EMBEDDING][unmerged.token_ids]})
    assert torch.allclose(unmerged.score(clips(qwen, "a", "b"), prompts, normalise=False), r, atol=1e-4)

    for name, new in (("new", True), ("adapter", False), ("adapter_new", True)):
        shutil.copytree(root / "released", tmp_path / name)
        step = tmp_path / name / "checkpoint-30"
        shutil.copytree(step, tmp_path / name / "checkpoint-4")                 # an older step, and of the wrong weights
        (tmp_path / name / "checkpoint-4" / "model.pth").write_bytes(b"")
        tensors = {k: v for k, v in truth.items()}
        if "adapter" in name:
            (step / "model.pth").unlink()
            trained = {k: v for k, v in tensors.items() if "visual" in k or "rm_head" in k or "embed_tokens" in k}
            torch.save({theirs(k, new): v for k, v in trained.items()}, step / "non_lora_state_dict.pth")
            kept = {k: v for k, v in tensors.items() if "lora_" in k or "embed_tokens" in k}
            model_file.save_tensors({theirs(k, new, adapter=True): v for k, v in kept.items()} | {"base_model.model.lm_head.weight": torch.zeros(503, 32)},
                                    step / "adapter_model.safetensors")
        else:
            torch.save({theirs(k, new): v for k, v in tensors.items()}, step / "model.pth")
        again = reward.VideoReward.from_pretrained(tmp_path / name, base=root / "base", template=root / "prompt_template.py")
        assert torch.allclose(again.score(clips(qwen, "a", "b"), prompts, normalise=False), r, atol=1e-5), name


def test_positions_are_plain_and_not_the_three_dimensional_ones(qwen):
    """transformers' own forward, with plain positions, gives our scores; with its default M-RoPE it gives others."""
    own = released(qwen)
    ids, mask, patches, grids = own.inputs(clips(qwen, "a"), ["a cat"])
    embedded = own.qwen.get_input_embeddings()(ids)
    assert torch.equal(embedded[0, (ids[0] == own.token_ids[0])], own.rows[:1])
    at = torch.stack([(ids == i).int().argmax(1) for i in own.token_ids], dim=1)[0]
    scores = {}
    for name, positions in (("plain", torch.arange(ids.shape[1]).expand(3, 1, -1)), ("mrope", None)):
        h = own.qwen(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values_videos=patches, video_grid_thw=grids,
                     mm_token_type_ids=2 * (ids == own.video_id).int()).last_hidden_state
        scores[name] = own.rm_head(h)[0, at, 0]
    r = own(ids, mask, patches, grids)[0]
    assert torch.allclose(r, scores["plain"], atol=1e-5) and (r - scores["mrope"]).abs().min() > 1e-3


def test_vq_and_mq_cannot_see_the_prompt_and_a_batch_is_one_by_one(qwen):
    own, videos, prompts = released(qwen), clips(qwen, "a", "b", "a"), ["a cat", "a very long tale of two dogs in the snow", "sea"]
    r = own.score(videos, prompts)
    assert torch.allclose(r, torch.cat([own.score([v], [p]) for v, p in zip(videos, prompts)]), atol=1e-5)
    assert (r[0, :2] - r[2, :2]).abs().max() < 1e-5 < 1e-3 < (r[0, 2] - r[2, 2]).abs()
    assert (r[0] - r[1]).abs().min() > 1e-4


@pytest.mark.parametrize("how", ["diagonal", "last"])
def test_three_outputs_and_the_other_reward_tokens(qwen, how):
    own = reward.VideoReward.from_base(qwen[0] / "base", "special" if how == "diagonal" else how)
    own.rm_head.weight.data = torch.nn.init.normal_(torch.empty(3, 32))
    own.settings["output_dim"] = 3
    ids, mask, patches, grids = own.inputs(clips(qwen, "a", "b"), ["a cat", "one, two, three dogs"])
    h = own.rm_head(own.qwen(input_ids=ids, attention_mask=mask, pixel_values_videos=patches, video_grid_thw=grids,
                             position_ids=torch.arange(ids.shape[1]).expand(3, 2, -1)).last_hidden_state)
    for b, n in enumerate(mask.sum(1).tolist()):
        at = [ids[b].tolist().index(i) for i in own.token_ids]
        expected = {"diagonal": lambda: h[b, at, [0, 1, 2]], "last": lambda: h[b, n - 1]}[how]()
        assert torch.allclose(own(ids, mask, patches, grids)[b], expected, atol=1e-4)
    assert mask.sum(1).unique().numel() == 2 and (how == "diagonal") == (reward.TOKENS[0] in own.settings["template"])


def test_the_input_is_the_default_system_turn_the_video_and_the_prompt(qwen):
    own = released(qwen)
    ids, _, patches, grids = own.inputs(clips(qwen, "a"), ["a cat"])
    said = own.tokenizer.decode(ids[0]).replace("<|video_pad|>" * (len(patches) // 4), "<|video_pad|>")
    assert said == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
                    + THEIRS.replace("{text_prompt}", "a cat").replace("{{it}}", "{it}") + "<|im_end|>\n<|im_start|>assistant\n")
    assert grids.tolist() == [[2, 20, 28]]                                      # 4 frames of 280 x 392: 2 s at 2 a second
    with pytest.raises(ValueError, match="special token"):
        own.inputs(clips(qwen, "a"), ["a cat <|TA_reward|>"])


def test_how_many_frames_and_which():
    for total, fps, n in ((60, 24, 4), (60, 23.976, 6), (150, 30, 10), (126, 24, 10), (1, 24, 2), (2, 24, 2), (3, 24, 2), (5, 1, 4), (24 * 600, 24, 768)):
        got = reward.frame_indices(total, fps)
        assert len(got) == n and got[0] == 0 and got[-1] == total - 1, (total, fps, got)
    assert reward.frame_indices(7, 1) == [0, 1, 2, 4, 5, 6] and reward.frame_indices(9, 24, count=40) == [0, 1, 2, 3, 5, 6, 7, 8]


def test_frame_sizes_follow_the_authors_bounds():
    for size, fitted in (((576, 1024), (336, 588)), ((1280, 720), (588, 336)), ((64, 96), (280, 392)), ((448, 448), (448, 448)),
                         ((336, 336), (336, 336)), ((100, 8000), (28, 4004)), ((300, 310), (336, 336))):
        assert reward.frame_size(*size) == fitted, size
    assert reward.frame_size(300, 310, max_pixels=64 * 28 * 28) == (196, 224)  # shrunk, never enlarged again
    assert reward.frame_size(100, 100, max_pixels=20_000) == (336, 336)         # enlarged past its own bound
    for size, most in (((10, 3000), 200704), ((30, 4000), 20000)):
        with pytest.raises(ValueError, match=f"v.mp4 is {size[0]} x {size[1]}"):
            reward.frame_size(*size, most, "v.mp4")


def test_patches_are_those_of_transformers_own_processor():
    """A frame shown twice gives the patches of the image processor; two frames, an independent reading of the layout."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    g = np.random.default_rng(0)
    frames = g.integers(0, 256, (2, 280, 364, 3), dtype=np.uint8)               # no resize: 101,920 pixels
    processor = Qwen2VLImageProcessorPil(min_pixels=reward.MIN_PIXELS, max_pixels=reward.MAX_PIXELS)
    out = processor(Image.fromarray(frames[0]), return_tensors="pt")
    x, grid = reward.patchify(frames[[0, 0]], (280, 364))
    assert torch.allclose(x, out["pixel_values"], atol=1e-5) and grid.tolist() == out["image_grid_thw"][0].tolist()
    x, grid = reward.patchify(frames, (280, 364))
    x = x.view(-1, 3, 2, 14, 14) * reward.PIXEL_STD[None, :, None] + reward.PIXEL_MEAN[None, :, None]
    for n in (0, 1, 2, 3, 4, 200, 519):                                         # patch n: token n // 4, corner n % 4 of it
        row, column = n // 4 // 13 * 2 + n % 4 // 2, n // 4 % 13 * 2 + n % 2
        seen = frames[:, row * 14:row * 14 + 14, column * 14:column * 14 + 14].transpose(3, 0, 1, 2) / 255
        assert np.abs(x[n].numpy() - seen).max() < 1e-5, n
    for height, width in ((97, 131), (900, 700)):                               # resized by Pillow there, by torch here
        frame = g.integers(90, 166, (height, width, 3), dtype=np.uint8)         # mid greys: Pillow clamps between its two passes
        out = processor(Image.fromarray(frame), return_tensors="pt")
        x, grid = reward.patchify(frame[None].repeat(2, 0), reward.frame_size(height, width))
        assert grid.tolist() == out["image_grid_thw"][0].tolist() and (x - out["pixel_values"]).abs().max() * 0.27 * 255 < 1.5
    grey = (x.view(-1, 3, 2, 14, 14) * reward.PIXEL_STD[None, :, None] + reward.PIXEL_MEAN[None, :, None]) * 255
    assert (grey - grey.round()).abs().max() < 1e-3 and grey.min() > -0.01 and grey.max() < 255.01


def test_odd_videos_are_scored_or_refused_by_name(qwen, tmp_path):
    import av
    own = released(qwen)
    write_clips(tmp_path, ["portrait.mp4"], frames=8, size=(96, 32))
    write_clips(tmp_path, ["one.mp4"], frames=1)
    with av.open(str(tmp_path / "variable.mkv"), "w") as container:             # frames at uneven times
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i, ms in enumerate((0, 40, 80, 500, 1500, 1540, 2000)):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 30 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    odd = [tmp_path / name for name in ("portrait.mp4", "one.mp4", "variable.mkv")]
    assert own.score(odd, ["p"] * 3).isfinite().all()
    write_clips(tmp_path, ["narrow.mp4"], frames=4, size=(10, 2400))
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("narrow.mp4", "text.mp4"):
        with pytest.raises(ValueError, match=name):
            own.score([tmp_path / name], ["p"])


def test_a_template_is_parsed_and_never_executed(qwen, tmp_path):
    assert reward.read_template(qwen[0] / "prompt_template.py") == THEIRS       # its first line would end the tests
    for text in ("x = 1", f"{reward.THEIR_TEMPLATE} = open('x').read()", f"{reward.THEIR_TEMPLATE} = 'no tokens {{text_prompt}}'",
                 f"{reward.THEIR_TEMPLATE} = 1", "def (", f"{reward.THEIR_TEMPLATE} = '''{THEIRS.replace('{text_prompt}', '{text_prompt.x}')}'''",
                 f"{reward.THEIR_TEMPLATE} = '''{{text_prompt}} {THEIRS.replace('{text_prompt}', '')}'''"):
        (tmp_path / "t.py").write_text(text)
        with pytest.raises(ValueError, match="t.py"):
            reward.read_template(tmp_path / "t.py")


def test_interrupted_scoring_goes_on_and_nothing_is_scored_twice(qwen, tmp_path, monkeypatch, capsys):
    own, cache, scored = released(qwen), tmp_path / "scores.jsonl", []
    videos, prompts = clips(qwen, "a", "b", "a", "a"), ["x", "x", "x", "y"]
    plain = own.score(videos, prompts)

    def score(paths, prompts, normalise):
        if len(scored) == 2:
            raise RuntimeError("interrupted")
        scored.append((Path(paths[0]).stem, prompts[0]))
        return reward.VideoReward.score(own, paths, prompts, normalise)
    monkeypatch.setattr(own, "score", score)
    with pytest.raises(RuntimeError):
        reward.score_videos(own, videos, prompts, cache)
    cache.write_text(cache.read_text() + '{"key": "cut sho')                    # as a power cut would leave it
    scored.pop(), scored.pop()
    assert torch.allclose(reward.score_videos(own, videos, prompts, cache), plain, atol=1e-5) and scored == [("a", "y")]
    scored.clear()
    assert torch.allclose(reward.score_videos(own, videos, prompts, cache), plain, atol=1e-5) and not scored
    shutil.copy(videos[1], tmp_path / "a.mp4")
    other = reward.VideoReward.from_pretrained(qwen[0] / "released", template=qwen[0] / "prompt_template.py", dtype=torch.bfloat16)
    assert other.identity != own.identity and (reward.score_videos(other, videos, prompts, cache) - plain).abs().max() > 1e-6
    with pytest.raises(UserError, match="gone.mp4 cannot be read"):
        reward.score_videos(own, [tmp_path / "gone.mp4"], ["x"], cache)


def prefs(qwen, path, mos=True):
    """A file of pairs in the authors' format: a beats b on VQ and TA whatever the prompt, MQ is unlabelled or a tie."""
    lines = ["path_A,path_B,prompt,VQ,MQ,TA" + ",MOS_A_VQ,MOS_B_VQ" * mos]
    for i in range(8):
        a, b, label = ("a", "b", "A") if i % 2 else ("b", "a", "B")
        lines.append(f"{a}.mp4,{b}.mp4,prompt {i},{label},{'same' if i == 3 else 'invalid'},{label}" + (",5,1" if i % 2 else ",1,5") * mos)
    (qwen[0] / path).write_text("\n".join(lines) + "\n")
    return str(qwen[0] / path)


@pytest.mark.parametrize("changes", [{}, dict(loss="bt", reward_token="last"), dict(loss="regression")], ids=["btt", "bt last", "regression"])
def test_training_a_video_reward_lowers_its_loss_and_moves_only_what_the_paper_trains(qwen, changes, tmp_path):
    pairs, base = prefs(qwen, "prefs.csv"), str(qwen[0] / "base")
    args = train_reward.Args(model=base, pairs=pairs, steps=8, batch=2, accumulate=2, lr=2e-3, out=str(tmp_path / "run"), **changes)
    result = train_reward.main(args)
    assert result["loss_last"] < result["loss_first"] and result["n"] == 1 and set(result["reward"]) == {"VQ", "TA"}
    saved, _ = model_file.read_tensors(tmp_path / "run" / "reward.safetensors")
    torch.manual_seed(0)
    before = reward.VideoReward.from_base(base, args.reward_token).trainable().state_dict()
    moved = {k for k in before if not torch.equal(before[k], saved[k])}
    assert set(saved) == set(before)
    assert moved == {k for k in before if "lora" in k or "visual" in k or k in ("rm_head.weight", "rows")[:2 - ("last" in changes.values())]}
    assert before["rows"].shape == ((0 if "last" in changes.values() else 3), 32)

    again, memory = reward.VideoReward.from_pretrained(tmp_path / "run"), reward.VideoReward.from_base(base, args.reward_token).trainable().eval()
    memory.load_state_dict(saved)
    raw = memory.score(clips(qwen, "a", "b"), ["p", "q"], normalise=False)
    assert torch.allclose(again.score(clips(qwen, "a", "b"), ["p", "q"], normalise=False), raw, atol=1e-5)
    assert torch.allclose(again.score(clips(qwen, "a", "b"), ["p", "q"]), (raw - again.mean) / again.std, atol=1e-4)


def test_a_step_in_parts_is_a_step_in_one(qwen, tmp_path):
    for name, parts in (("one", 1), ("two", 2)):
        train_reward.main(train_reward.Args(model=str(qwen[0] / "base"), pairs=prefs(qwen, "prefs.csv"), steps=1, batch=2, accumulate=parts, lr=1e-3,
                                            out=str(tmp_path / name)))
    one, two = (json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("one", "two"))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4) and one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_the_benchmark_counts_what_is_labelled_and_writes_every_pair(qwen, tmp_path, capsys):
    args = train_reward.Args(eval=str(qwen[0] / "released"), template=str(qwen[0] / "prompt_template.py"), pairs=prefs(qwen, "prefs.csv"),
                             cache=str(tmp_path), out=str(tmp_path / "eval"))
    result = train_reward.main(args)
    own = released(qwen)
    better = own.score(clips(qwen, "a", "b"), ["", ""])[:, 0]
    assert result["reward"]["VQ"]["without"] == float(better[0] > better[1]) and set(result["reward"]) == {*DIMS}
    assert np.isnan(result["reward"]["MQ"]["without"]) and result["reward"]["MQ"]["with"] == 1.0        # its one label is a tie
    assert len((tmp_path / "scores.jsonl").read_text().split()) > 0 and "| the paper's, VideoGen-RewardBench | 75.7 / 59.7 |" in capsys.readouterr().out
    rows = list(csv.DictReader(open(tmp_path / "eval" / "pairs.csv")))
    assert len(rows) == 8 and rows[0]["VQ"] == "B" and rows[0]["MQ"] == "" and float(rows[1]["score_A_VQ"]) == pytest.approx(better[0].item(), abs=1e-3)
    (qwen[0] / "genai.csv").write_text("prompt,left_model,left_video,right_model,right_video,vote_type\nprompt 1,x,a.mp4,y,b.mp4,leftvote\n")
    result = train_reward.main(replace(args, pairs=str(qwen[0] / "genai.csv")))
    assert set(result["reward"]) == set(result["TA alone"]) == {"Overall"} and "| 72.9 / 49.4 |" in capsys.readouterr().out


def test_the_command_line_scores_videos_and_says_that_negative_is_normal(qwen, capsys):
    own, videos = released(qwen), [str(v) for v in clips(qwen, "a", "b")]
    args = reward.Args(video=videos, prompt="a cat", ckpt=str(qwen[0] / "released"), template=str(qwen[0] / "prompt_template.py"))
    assert torch.allclose(reward.main(args), own.score(videos, ["a cat"] * 2)) and "negative is normal" in capsys.readouterr().out
    own.mean.fill_(float("nan"))
    assert torch.equal(own.score(videos, ["a cat"] * 2), own.score(videos, ["a cat"] * 2, normalise=False))
    own.score(videos[:1], ["a cat"])
    assert capsys.readouterr().out.count("no normalisation constants") == 1


BAD_QWEN = [
    (reward, "--video {clip} --prompt p --ckpt {released}", "KwaiVGI/VideoAlign"),
    (reward, "--video {clip} --prompt p --ckpt {released} --template {base}/config.json", "must set DETAILED_PROMPT"),
    (reward, "--video {clip} --ckpt {released}", "--prompt"),
    (reward, "--video {clip} --prompt p --ckpt nobody/nothing", "does not exist"),
    (reward, "--video {clip} --prompt p --ckpt {base}", "finished run"),
    (reward, "--video {clip} --prompt p --ckpt {released} --template {template} --base {root}/released", "is not a Qwen2-VL"),
    (reward, "--video {clip} --prompt p --ckpt {odd} --template {template}", "only sample_type = 'uniform' is known, not 'multi_pts'"),
    (reward, "--video {clip} --prompt p --ckpt {cut} --template {template}", "model.pth cannot be read"),
    (reward, "--video {clip} --prompt p --ckpt {short} --template {template}", "does not fit the model: missing"),
    (reward, "--video {clip} --prompt p --ckpt {evil} --template {template}", "model.pth cannot be read"),
    (train_reward, "--model {base}", "with --pairs"),
    (train_reward, "--pairs {prefs}", "--model"),
    (train_reward, "--model {base} --pairs {prefs} --noisy", "on latents"),
    (train_reward, "--model {base} --pairs {plain} --loss regression", "MOS_A_VQ"),
    (train_reward, "--model {base} --pairs {broken}", "text.mp4 cannot be read as a video"),
    (train_reward, "--eval {released} --template {template}", "with --pairs"),
    (train_reward, "--eval {released} --pairs {prefs}", "KwaiVGI/VideoAlign"),
    (train_reward, "--eval nobody/nothing --pairs {prefs}", "does not exist"),
]


@pytest.mark.parametrize("script, argv, says", BAD_QWEN, ids=[f"{s.__name__} {a}" for s, a, _ in BAD_QWEN])
def test_bad_input_of_a_video_reward_ends_in_one_line_and_status_2(script, argv, says, qwen, tmp_path, capsys):
    root, truth = qwen
    names = dict(root=root, base=root / "base", released=root / "released", clip=root / "a.mp4", template=root / "prompt_template.py",
                 prefs=prefs(qwen, "prefs.csv"), plain=prefs(qwen, "plain.csv", mos=False), broken=root / "broken.csv")
    (root / "text.mp4").write_text("no video")
    (root / "broken.csv").write_text("path_A,path_B,prompt,VQ\na.mp4,text.mp4,p,A\n")
    for name in ("odd", "cut", "short", "evil"):
        names[name] = shutil.copytree(root / "released", tmp_path / name)
        file = tmp_path / name / "checkpoint-30" / "model.pth"
        if name == "odd":
            config = tmp_path / name / "model_config.json"
            config.write_text(config.read_text().replace("uniform", "multi_pts"))
        elif name == "cut":
            file.write_bytes(file.read_bytes()[:1000])
        else:
            torch.save({} if name == "short" else {"x": Path("a class that no tensor file needs")}, file)
    with pytest.raises(SystemExit) as stop:
        data.launch(script.main, script.Args, script.__doc__, shlex.split(argv.format(**names)) + ["--out", str(tmp_path / "run")] * (script is train_reward))
    said = re.sub(r"[^\n]*\r", "", capsys.readouterr().err).strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith("error:") and says in said[0], said


def test_importing_reward_needs_neither_transformers_nor_av():
    code = "import sys, reward; assert not {'transformers', 'av', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)


# ---- scripts ----

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tiny base and a tiny reward, made by the scripts themselves."""
    root, toy = tmp_path_factory.mktemp("runs"), PRESETS["toy"]
    PRESETS["toy"] = TINY
    try:
        base = train_align.main(train_align.Args(loss="pretrain", steps=50, batch=8, warmup=5, eval_n=18, eval_steps=2, out=str(root / "base")))
    finally:
        PRESETS["toy"] = toy
    first, last = ends(root / "base")
    assert last < 0.8 * first and set(base["oracle"]) == set(DIMS)
    for name, extra in (("reward", {}), ("noisy", {"noisy": True, "shared_noise": False})):
        result = train_reward.main(train_reward.Args(model=str(root / "base"), depth=1, n_pairs=32, steps=80, batch=16, lr=3e-3, n_eval=60,
                                                     out=str(root / name), **extra))
        first, last = ends(root / name)
        assert last < first and 0 <= result["by_t"]["0.0"]["VQ"]["with"] <= 1 and len(result["by_t"]) == (5 if name == "noisy" else 1)
    return root


def ends(run):
    """The first and the last loss in a run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return lines[0]["loss"], lines[-1]["loss"]


def align_args(runs, out, **changes):
    return train_align.Args(**{**dict(model=str(runs / "base"), reward=str(runs / "reward"), n_pairs=24, steps=20, batch=8, lr=3e-3, lora_rank=4,
                                      eval_n=18, eval_steps=2, out=str(runs / out)), **changes})


@pytest.mark.parametrize("name, changes", [
    ("dpo", {}), ("dpo_full", dict(lora_rank=0, lr=3e-4)), ("dpo_ta", dict(dim_w=(0.0, 0.0, 1.0), labels="oracle", beta_schedule="(1-t)^2")),
    ("sft", dict(loss="sft", labels="human", lora_rank=0, steps=40)), ("rwr", dict(loss="rwr", lora_rank=0, steps=40))])
def test_each_objective_trains_and_its_loss_falls(runs, name, changes):
    result = train_align.main(align_args(runs, name, **changes))
    assert set(result["win_rate"]) == {*DIMS, "Overall"} and json.loads((runs / name / "eval.json").read_text()) == result
    first, last = ends(runs / name)
    assert last < first
    events = [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]
    assert len(events[0]["loss_by_t"]) == 10
    if "dpo" in name:
        assert {"implicit_acc", "margin", "gap_w", "gap_l"} <= set(events[0]) and events[-1]["implicit_acc"] > 0.5
    config = json.loads((runs / name / "config.json").read_text())
    again = data.parse_args(train_align.Args, "", shlex.split(config["command"])[2:])
    train_align.check(again, data.Shapes())
    assert json.loads(json.dumps(vars(again))) == config["args"]
    assert {p.name for p in (runs / name).iterdir()} >= {"config.json", "log.jsonl", "eval.json", "samples.png"}
    assert sample.load_model(runs / name)(*random_batch()).isfinite().all()


def test_rwr_accumulated_over_micro_batches_is_rwr_in_one(runs):
    for name, parts in (("one", 1), ("four", 4)):
        train_align.main(align_args(runs, name, loss="rwr", steps=2, batch=4, accumulate=parts, eval_n=2))
    one, four = (model_file.read_tensors(runs / name / "lora.safetensors")[0] for name in ("one", "four"))
    assert all(torch.allclose(one[k], four[k], atol=1e-5) for k in one)


def torchrun(folder, runs):
    """Align with each of these arguments in two processes, all in one torchrun: starting it is most of the time."""
    (folder / "two.py").write_text("import sys, train_align as t\nfor args in eval(sys.argv[1], vars(t)):\n    t.main(args)\n")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                    folder / "two.py", repr(runs)], env=os.environ | {"PYTHONPATH": str(HERE)}, check=True, capture_output=True)


def test_two_processes_give_the_losses_and_videos_of_one(runs, tmp_path):
    methods = {"dpo": {}, "rwr": dict(loss="rwr", accumulate=2)}
    one, two = ([align_args(runs, f"{name}_ranks{n}", steps=2, eval_n=5, **changes) for name, changes in methods.items()] for n in (1, 2))
    for args in one:
        train_align.main(args)
    torchrun(tmp_path, two)
    for args in zip(one, two):
        logs = [json.loads((Path(a.out) / "log.jsonl").read_text()) for a in args]
        assert all(np.isclose(logs[0][k], logs[1][k], rtol=1e-4) for k in ("loss", "grad_norm"))
        for file, near in (("lora.safetensors", 1e-5), ("samples.safetensors", 1)):     # weights; pixels of 256 levels
            a, b = (model_file.read_tensors(Path(a.out) / file)[0] for a in args)
            assert a.keys() == b.keys() and all((a[k].float() - b[k].float()).abs().max() <= near for k in a)


def test_human_labels_decide_by_sign_and_drop_ties():
    pairs = data.toy_pairs(60, "train", 0)
    args = train_align.Args(labels="human", dim_w=(0.0, 1.0, 0.0))
    ordered, rows, r = train_align.label(args, data.Shapes(), pairs, "cpu")
    assert r is None and torch.equal(rows, (pairs.label[:, 1] != 0).nonzero()[:, 0])
    b_wins = (pairs.label[:, 1] < 0).long()
    assert (ordered.label[rows, 1] == 1).all()
    assert all(torch.equal(ordered.videos[i, 0], pairs.videos[i, b_wins[i]]) for i in rows)
    args.labels = "oracle"
    ordered, rows, r = train_align.label(args, data.Shapes(), pairs, "cpu")
    assert len(rows) == 60 and (r[:, 0] >= r[:, 1]).all()


def test_on_policy_pairs_are_the_best_and_worst_of_the_models_own_videos_round_after_round(runs):
    sample.main(sample.Args(ckpt=str(runs / "base"), prompts="train", n_per_prompt=4, steps=2, cfg=1.0, reward="oracle", out=str(runs / "own")))
    pairs = data.Shapes().encode(data.read_pairs(runs / "own/pairs.csv"), train_align.Args())
    assert pairs.prompts == data.prompts_of("train")
    prompts = [p for p in pairs.prompts for _ in range(4)]
    own = sample.toy_videos(sample.load_model(runs / "base"), prompts, 0, 2)
    r = data.overall(normalised(oracle(own, prompts))).view(-1, 4)
    own = to_uint8(own).view(-1, 4, *own.shape[1:])
    for i in range(len(pairs)):
        assert (pairs.videos[i].float() - own[i, [r[i].argmax(), r[i].argmin()]].float()).abs().mean() < 6
    args = align_args(runs, "round1", pairs=str(runs / "own/pairs.csv"), labels=None, steps=4)
    train_align.main(args)
    again = replace(args, model=str(runs / "round1"), out=str(runs / "round2"))
    result = train_align.main(again)
    assert result["distance"] > 0
    m, start = sample.load_model(runs / "round2"), sample.load_model(runs / "round1")
    xt, t, text = torch.randn(2, 3, 8, 24, 24), torch.rand(2), torch.randn(2, 8, 32)
    with lora_disabled(m):                                                      # the second round's start is the first's end
        assert torch.allclose(m(xt, t, text), start(xt, t, text), atol=1e-5)
    assert not torch.allclose(m(xt, t, text), start(xt, t, text), atol=1e-5)
    assert sample.main(sample.Args(ckpt=str(runs / "round2"), cfg=1.0, steps=2, against=str(runs / "base"), eval=4, out=str(runs / "rounds")))["n"] == 4
    with pytest.raises(UserError):                                              # a third in place of the first, which the second needs
        train_align.main(replace(args, model=str(runs / "round2"), out=str(runs / "round1")))
    train_align.main(replace(args, seed=1))                                     # another first: the second stands on nothing now
    with pytest.raises(UserError, match="which is another model now"):
        sample.load_model(runs / "round2")


def test_the_distance_is_the_mean_squared_difference_of_velocities():
    still = torch.nn.Linear(1, 1)
    still.forward = lambda xt, t, text: xt
    moved = torch.nn.Linear(1, 1)
    moved.forward = lambda xt, t, text: xt + 3 * t.view(-1, 1, 1, 1, 1)
    videos, reference = torch.zeros(100, 3, 2, 2, 2), lambda: contextlib.nullcontext(still)
    assert train_align.distance(still, reference, videos, PROMPTS * 2, 0) == 0
    t, _ = data.draw_noise((), 0, 2**31, list(range(100)))
    assert train_align.distance(moved, reference, videos, PROMPTS * 2, 0) == pytest.approx(9 * t.square().mean().item(), rel=1e-5)


def test_flawless_videos_close_the_whole_gap_and_the_start_none_of_it(capsys):
    prompts, g = PROMPTS[:36], rng(0)
    flawed = data.render_as(torch.arange(36) % 12, prompts, g).float()
    clean = render(attributes(prompts), torch.zeros(36, len(DEFECTS)), g).float()
    result = sample.evaluate(clean, flawed, prompts)
    assert all(x == pytest.approx(1, abs=0.03) for x in result["gap_closed"].values())
    assert set(sample.evaluate(flawed, flawed, prompts)["gap_closed"].values()) == {0.0}
    half = torch.cat([clean[:18], flawed[18:]])
    start, end, way = (result[name]["TA"] for name in ("oracle_start", "oracle_clean", "oracle"))
    part = sample.evaluate(half, flawed, prompts)
    assert part["gap_closed"]["TA"] == pytest.approx((part["oracle"]["TA"] - start) / (end - start), abs=1e-3) and way == pytest.approx(end, abs=0.01)
    other = part | {"oracle": dict(VQ=0.1, MQ=0.2, TA=0.3), "oracle_start": dict(VQ=0.0, MQ=0.5, TA=1.0), "distance": 0.5,
                    "gap_closed": dict(VQ=0.0, MQ=0.01, TA=0.5, Overall=-0.1)}
    part |= {"oracle": dict(VQ=0.3, MQ=0.4, TA=0.5), "oracle_start": dict(VQ=0.2, MQ=0.5, TA=0.8), "oracle_clean": other["oracle_clean"],
             "distance": 0.25, "gap_closed": dict(VQ=1.0, MQ=0.03, TA=0.3, Overall=-0.2)}
    sample.print_scores({"half": [part, other], "alone": [other]})
    said = capsys.readouterr().out.strip().splitlines()
    assert said[2].replace("start of half", "start") == "| start | 0.10 ± 0.14 | 0.50 ± 0.00 | 0.90 ± 0.14 | | |"
    assert said[3] == "| start of alone | 0.00 | 0.50 | 1.00 | | |"
    assert said[4] == "| half | 0.20 ± 0.14 (50 ± 71) | 0.30 ± 0.14 (2 ± 1) | 0.40 ± 0.14 (40 ± 14) | (-15 ± 7) | 0.3750 ± 0.1768 |"
    assert said[5] == "| alone | 0.10 (0) | 0.20 (1) | 0.30 (50) | (-10) | 0.5000 |"
    sample.print_scores({"this": [part], "that": [part]})
    said = capsys.readouterr().out.strip().splitlines()
    assert said[2] == "| start | 0.20 | 0.50 | 0.80 | | |" and len(said) == 6
    assert said[5] == "| flawless | " + " | ".join(f"{part['oracle_clean'][dim]:.2f}" for dim in DIMS) + " | | |"


def test_score_differences_separate_ties_from_preferences():
    label = torch.tensor([[0.0, 1.0, -1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [-1.0, 0.0, 0.0]])
    gap = torch.tensor([[0.1, 0.1, 3.0], [0.3, 0.2, 1.0], [0.2, 0.3, 2.0], [0.4, 0.4, 1.0]])
    found = train_reward.differences(label, gap)
    assert [found[dim]["separation"] for dim in DIMS] == [0.75, 0.25, 1.0]
    assert found["VQ"]["tied"] == [0.15, 0.2, 0.25] and found["TA"]["other"] == [2.25, 2.5, 2.75]


def test_numbers_of_runs_are_drawn_and_a_wrong_name_ends_in_one_line(runs, capsys):
    common = dict(ckpt=str(runs / "base"), steps=1, nrg=str(runs / "noisy"), eval=4)
    for scale in (1.0, 30.0):
        sample.main(sample.Args(**common, rg_scale=scale, out=str(runs / f"scale{scale:g}")))
    args = sample.Compare(compare=[str(runs / "scale1"), str(runs / "scale30")], x="rg_scale", y=["win_rate/VQ", "oracle/VQ"], by=["steps"],
                       out=str(runs / "drawn.png"))
    results = {float(scale): json.loads((runs / f"scale{scale}/eval.json").read_text()) for scale in (1, 30)}
    assert sample.compare(args) == {f"{y}, steps 1": {scale: [result[y.split("/")[0]]["VQ"]] for scale, result in results.items()}
                                 for y in args.y}
    assert (runs / "drawn.png").read_bytes()[:4] == b"\x89PNG"
    sample.compare(replace(args, by=[], out=str(runs / "one.png")))
    (runs / "broken").mkdir()
    (runs / "broken/config.json").write_text('{"args": {}}')
    (runs / "broken/eval.json").write_text("{}")
    capsys.readouterr()
    for wrong, said in ((dict(y=["win_rate/XQ"]), "cannot be drawn: 'XQ'"), (dict(y=["win_rate"]), "cannot be drawn"),
                        (dict(x="nrg"), "could not convert"), (dict(out=str(runs / "drawn")), "draws one .png"),
                        (dict(x="", y=[], compare=[str(runs / "broken")]), "takes runs that have win rates"),
                        (dict(out=str(runs / "gone" / "a.png")), "in a folder that exists")):
        with pytest.raises(UserError) as e:
            sample.compare(replace(args, **wrong))
        assert said in str(e.value)
    sample.compare(sample.Compare(compare=[str(runs / "reward"), str(runs / "noisy")]))
    said = capsys.readouterr().out
    assert re.search(r"ceiling.*\n\| reward \|.*\n\| noisy \|", said)
    ties = json.loads((runs / "noisy/eval.json").read_text())["differences"]["TA"]
    assert said.splitlines()[-1].endswith(f"{ties['tied'][1]:.2f} / {ties['other'][1]:.2f} ({100 * ties['separation']:.0f}) |")


def test_sample_writes_videos_guides_evaluates_and_compares(runs):
    common = dict(ckpt=str(runs / "base"), steps=3)
    sample.main(sample.Args(**common, prompt=["a red circle moving left"], n_per_prompt=2, cfg=2.0, nrg=str(runs / "noisy"), out=str(runs / "videos")))
    frames, _ = data.read_video(runs / "videos" / "001.mp4")
    assert frames.shape == (8, 192, 192, 3)
    result = sample.main(sample.Args(**common, nrg=str(runs / "noisy"), eval=18, dim_w=(0.0, 0.0, 1.0), out=str(runs / "nrg")))
    assert result["n"] == 18
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        sample.compare(sample.Compare(compare=[str(runs / "nrg"), str(runs / "nrg")]))
    assert printed.getvalue().count("| nrg | oracle |") == 1 and (runs / "compare.png").exists()
    assert printed.getvalue().count(" ± 0.0 |") == 4 and "| 2 x 18 |" in printed.getvalue()    # one run twice: one row
    scores = reward.main(reward.Args(ckpt=str(runs / "reward"), video=[str(runs / "videos" / "000.mp4")], prompt="a red circle moving left"))
    assert scores.shape == (1, 3)


def test_without_git_a_run_has_no_commit(runs, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    run = data.Run(sample.Args(out=str(runs / "no_git")))
    assert json.loads((run.folder / "config.json").read_text())["commit"] == ""


def test_an_older_run_is_renamed_and_never_overwritten(runs):
    args = sample.Args(ckpt=str(runs / "base"), steps=1, prompt=PROMPTS[:1], out=str(runs / "again"))
    sample.main(args)
    (runs / "again" / "mine.txt").write_text("keep")
    sample.main(args)
    assert (runs / "again.1" / "mine.txt").read_text() == "keep" and not (runs / "again" / "mine.txt").exists()


def timeless_log(run):
    """The events in a run's log without the clock."""
    return [{k: v for k, v in event.items() if k not in ("time", "seconds")} for event in data.read_log(run)]


@pytest.mark.parametrize("name", ["dpo", "pretrain", "reward", "videos", "win rates"])
def test_the_command_in_config_json_makes_the_same_files_again(name, runs, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", TINY)
    small, base = dict(out=str(tmp_path / "run"), steps=2), str(runs / "base")
    script, args = {
        "dpo": (train_align, replace(align_args(runs, "", n_pairs=8, batch=4, eval_n=2, eval_steps=1), **small)),
        "pretrain": (train_align, train_align.Args(loss="pretrain", batch=2, eval_n=2, eval_steps=1, **small)),
        "reward": (train_reward, train_reward.Args(model=base, depth=1, n_pairs=8, batch=4, n_eval=12, noisy=True, **small)),
        "videos": (sample, sample.Args(ckpt=base, prompt=[PROMPTS[0], PROMPTS[5]], nrg=str(runs / "noisy"), **small)),
        "win rates": (sample, sample.Args(ckpt=base, eval=4, nrg=str(runs / "noisy"), dim_w=(0.0, 0.5, 1.0), **small))}[name]
    script.main(args)
    command = json.loads((tmp_path / "run/config.json").read_text())["command"]
    data.launch(script.main, script.Args, script.__doc__, shlex.split(command)[2:])
    first, again = ({f.relative_to(tmp_path / run): f for f in sorted((tmp_path / run).rglob("*")) if f.is_file()} for run in ("run.1", "run"))
    assert first.keys() == again.keys() and len(first) > 2
    for name in first.keys() - {Path("log.jsonl")}:                             # which has the clock in it
        assert first[name].read_bytes() == again[name].read_bytes(), name
    assert timeless_log(tmp_path / "run.1") == timeless_log(tmp_path / "run")


BAD = [
    (train_align, "--lss dpo", "did you mean --loss"),
    (train_align, "--loss ppo", "choose from"),
    (train_align, "--steps many", "not a whole number above 0"),
    (train_align, "--dim_w 1,1", "is not 3 numbers"),
    (train_align, "--loss rwr --labels human", "use --labels reward"),
    (train_align, "--model runs/nowhere", "does not exist"),
    (train_align, "--model {empty}", "is the run finished"),
    (train_align, "--out {file}/run", "is a file"),
    (train_align, "--model {other}", "does not fit the model"),
    (train_align, "--model {cut}", "cannot be read as safetensors"),
    (train_align, "--model {world}", "another Shapes world"),
    (train_reward, "--tie 1", "above 1"),
    (train_reward, "--depth 99", "blocks"),
    (train_reward, "--model runs/nowhere", "does not exist"),
    (sample, "", "one thing at a time"),
    (sample, "--eval 4 --prompt p", "one thing at a time"),
    (sample, "--eval 4 --x beta", "unknown argument --x"),
    (sample, "--eval 4 --split test", "invalid choice"),
    (train_align, "--lora_rank 0 --dtype bf16", "too coarse"),
    (train_align, "--loss pretrain --lora_rank 4", "trains all weights"),
    (sample, "--prompt 'a dog'", "not a prompt of Shapes world"),
    (sample, "--ckpt runs/nowhere --eval 4", "does not exist"),
    (sample, "--model {cut} --eval 4", "cannot be read as safetensors"),
    (sample, "--compare {empty}", "config.json cannot be read as JSON"),
    (sample, "--prompt 'a red circle moving left' --reward assets/reward", "add --against base or --n_per_prompt 4"),
    (sample, "--eval 4 --against base", "this model has none"),
    (sample, "--compare {wins}", "takes runs that have win rates"),
    (sample, "--prompts gone.csv", "gone.csv"),
    (sample, "--prompts {blank}", "row 3 has no prompt"),
    (train_align, "--steps 0", "above 0"),
    (train_reward, "--save_every 0", "above 0"),
    (sample, "--prompt p --n_per_prompt 0", "above 0"),
    (train_align, "--model {other} --out {other}", "is the model itself"),
    (sample, "--model {other} --out {other} --eval 4", "is the model itself"),
    (sample, "--eval 4 --size 30,30", "are for Wan"),
    (sample, "--eval -1", "not a whole number above 0"),
    (train_align, "--seed -1", "is not 0 or"),
    (train_align, "--lora_rank -1", "give 0 or more"),
    (train_align, "--loss rwr --tau 0", "--tau more than 0"),
    (train_align, "--model {pickle}", "cannot be read as safetensors"),
    (train_align, "--model {layers}", "num_layers = 0 is not a valid size"),
    (train_align, "--resume --out {broken}", "config.json cannot be read as JSON"),
    (train_align, "--pairs gone.csv", "gone.csv"),
    (train_reward, "--label_noise 0", "above 0"),
    (train_align, "--pairs {file}", "holds no pairs"),
    (train_align, "--pairs {blank}", "understood are"),
    (train_align, "--pairs pairs.parquet", "python -c"),
    (reward, "--video {file} --prompt 'a red circle moving left'", "cannot be read as a video"),
]


class Executed:
    """Unpickled, it makes the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("script, argv, says", BAD, ids=[f"{s.__name__} {a}" for s, a, _ in BAD])
def test_bad_input_ends_in_one_line_and_status_2(script, argv, says, tmp_path, runs, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"args": ')
    (tmp_path / "wins").mkdir()
    (tmp_path / "wins/config.json").write_text('{"args": {}}')
    (tmp_path / "wins/eval.json").write_text("{}")
    (tmp_path / "broken/eval.json").write_text("{}")
    (tmp_path / "twice").write_text(f"prompt\n{PROMPTS[0]}\n{PROMPTS[0]}\n")
    (tmp_path / "blank").write_text(f"prompt,x\n{PROMPTS[0]},1\n ,2\n")
    for name in ("other", "cut", "world", "pickle", "layers"):
        shutil.copytree(runs / "base", tmp_path / name)
        file = tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors, metadata = model_file.read_tensors(file)
        if name == "other":
            tensors["proj_out.bias"] = torch.zeros(7)
        if name == "world":
            metadata["world"] = "0"
        model_file.save_tensors({k: v.clone() for k, v in tensors.items()}, file, metadata)
        if name == "cut":
            file.write_bytes(file.read_bytes()[:1000])
        if name == "pickle":
            torch.save({"x": Executed(tmp_path / "executed")}, file)
        if name == "layers":
            config = file.with_name("config.json")
            config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 0'))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        folders = {path.name: path for path in tmp_path.iterdir()} | {"reward": runs / "reward"}
        compares = "--compare" in argv
        data.launch(*((sample.compare, sample.Compare) if compares else (script.main, script.Args)), script.__doc__, shlex.split(argv.format(**folders)))
    said = re.sub(r"[^\n]*\r", "", capsys.readouterr().err).strip().splitlines()
    assert stop.value.code == 2 and says in said[-1] and said[-1].startswith("error:") and len(said) == 1, said
    assert sorted(tmp_path.rglob("*")) == before


# ---- a run one can trust: diagnosis ----

HEALTHY = [dict(step=10 * i, loss=0.693 - 0.02 * i, logit=0.05 * i, grad_factor=0.5 - 0.02 * i, margin=0.0003 * i, gap_w=0.0008 * i,
                gap_l=0.0011 * i, err_ref_w=0.036) for i in range(1, 11)]


@pytest.mark.parametrize("changes, says", [
    (dict(logit=0.001), "the loss is still log 2, with logits of 0.0010"),
    (dict(grad_factor=0.004), "saturated: the gradient has 0.40% of its strength left"),
    (dict(gap_w=0.02, gap_l=0.03), "a worse loser alone: the winner's error is 0.0200 above the reference's 0.0360"),
    (dict(gap_w=0.08, margin=-0.01), "errors explode"), (dict(loss=1.5), "the loss has doubled, to 1.50"), ({}, None)])
def test_the_doctor_names_each_disease_once_and_is_silent_on_health(changes, says):
    events = [HEALTHY[0]] + [e | changes for e in HEALTHY[1:]]
    said = [verdict for i in range(1, 11) for verdict in train_align.diagnose(events[:i])]
    assert len(said) == bool(says) and all(says in verdict for verdict in said), said


def test_the_doctor_reads_logit_and_gradient_factor_off_the_loss():
    logit = torch.tensor([-3.0, 0.0, 0.5, 20.0, 1000.0])
    names = ("t", "loss", "gap_w", "gap_l", "err_ref_w", "logit")
    stats = torch.stack([torch.rand(5), -torch.nn.functional.logsigmoid(logit), *torch.rand(3, 5), logit], dim=1)
    for i in range(4):
        event = train_align.summary(names, stats[i:i + 1])
        assert event["logit"] == pytest.approx(abs(logit[i].item()), abs=1e-4)
        assert event["grad_factor"] == pytest.approx(torch.sigmoid(-logit[i]).item(), rel=1e-3)
    assert np.isfinite(train_align.summary(names, stats)["logit"])                     # a loss of exactly 0
    sft = [dict(step=10 * i, loss=loss) for i, loss in enumerate((0.04, 0.05, 0.09), 1)]
    assert not train_align.diagnose(sft[:2]) and "explode" in train_align.diagnose(sft)[0]
    assert re.search("250 .* 0.0362 .* 13,824 numbers, 0.0181 ", train_align.beta_elsewhere(500.0, 13824))


def test_a_hacked_reward_is_named_and_a_good_run_is_not():
    g = rng(0)
    video = render(attributes(PROMPTS), torch.zeros(len(PROMPTS), len(DEFECTS)), g).float()
    grey, still = video.mean(1, keepdim=True).expand_as(video), video[:, :, :1].expand_as(video)
    rates = lambda x: dict.fromkeys((*DIMS, "Overall"), x)
    result = {"win_rate": rates(0.8), "win_rate_reward": rates(0.9), "pixels": sample.pixel_statistics(video), "pixels_start": sample.pixel_statistics(video)}
    assert not sample.hacking(result) and sample.pixel_statistics(video[0]).keys() == {"motion", "saturation", "brightness"}
    assert re.search(r"in 90%, but saturation fell from 0\.\d+ to 0.000$", sample.hacking(result | {"pixels": sample.pixel_statistics(grey)}))
    assert re.search(r"but motion fell from 0\.\d+ to 0.000$", sample.hacking(result | {"pixels": sample.pixel_statistics(still)}))
    assert "the oracle prefers them in 30% only" in sample.hacking(result | {"win_rate": rates(0.3)})
    assert not sample.hacking(result | {"win_rate_reward": rates(0.4), "pixels": sample.pixel_statistics(grey)})


def test_the_pair_report_counts_ties_agreement_repeats_and_contradictions(tmp_path, capsys):
    rows = ["a,b,x,A,A", "b,a,x,B,B", "c,d,x,A,B", "d,c,x,A,same", "c,d,x,A,same", "a,b,y,same,", "a,d,z,,B"]
    for name in "abcd":
        (tmp_path / f"{name}.mp4").touch()
    lines = [",".join([f"{a}.mp4", f"{b}.mp4", *rest]) for a, b, *rest in (row.split(",") for row in rows)]
    (tmp_path / "pairs.csv").write_text("\n".join(["path_A,path_B,prompt,VQ,TA", *lines]))
    data.report_pairs(data.read_pairs(tmp_path / "pairs.csv"), ["y", "z", "w"])
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "7 pairs of 4 videos and 3 prompts, 2 of which are evaluated on too",
        "2 pairs occur more than once: 2 in both orders, 1 with opposite labels",
        "VQ: 86% labelled; A 67%, B 17%, ties 17%; where both decide, it agrees with TA 67%",
        "TA: 86% labelled; A 17%, B 50%, ties 33%; where both decide, it agrees with VQ 67%"]
    pairs = data.toy_pairs(40, "train", 0)
    data.report_pairs(pairs.subset([*range(40), 3]), data.prompts_of("eval"))
    said = capsys.readouterr().out.splitlines()
    assert re.match("41 pairs of 80 videos and .* prompts, 0 of which", said[0]) and "1 pairs occur more than once: 0 in both" in said[1]


# ---- a run one can trust: resume, faults ----

class Killed(BaseException):
    """In the place of SIGKILL, which leaves no time to clean up either."""


def main_killed(script, args, step, monkeypatch):
    """Run a training script until its process would die in the middle of the step with this number."""
    calls, own = [], script.clip_grad_norm_

    def clip(*x):
        calls.append(1)
        if len(calls) > step:
            raise Killed
        return own(*x)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, "clip_grad_norm_", clip)
        script.main(args)


def result_of(run):
    """What a run leaves: its weights, eval.json, and its log without the clock."""
    files = sorted(f for f in run.rglob("*.safetensors"))
    return [f.relative_to(run) for f in files], [model_file.read_tensors(f)[0] for f in files], (run / "eval.json").read_text(), timeless_log(run)


def assert_same(a, b):
    (names, tensors, *rest), (names_b, tensors_b, *rest_b) = result_of(a), result_of(b)
    assert names == names_b and names and rest == rest_b
    for x, y in zip(tensors, tensors_b):
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("name", ["dpo", "pretrain", "reward"])
def test_a_killed_run_resumes_to_the_same_bits(name, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "toy", TINY)
    if name == "reward":
        script, args = train_reward, train_reward.Args(model=str(runs / "base"), depth=1, n_pairs=16, steps=9, batch=4, n_eval=12)
    else:
        script, args = train_align, align_args(runs, "", loss=name, n_pairs=16, steps=9, batch=4, accumulate=2, eval_n=2, eval_steps=1)
        if name == "pretrain":
            args = replace(args, lora_rank=None, warmup=2)                      # Muon and AdamW, averaged weights, schedule
    args = replace(args, save_every=2)
    script.main(replace(args, out=str(tmp_path / "whole")))
    cut = replace(args, out=str(tmp_path / "cut"))
    main_killed(script, replace(cut), 7, monkeypatch)
    assert [f.name[:13] for f in sorted((tmp_path / "cut").glob("state-*"))] == ["state-0000004", "state-0000006"]
    newest = max((tmp_path / "cut").glob("state-*"))
    newest.write_bytes(newest.read_bytes()[:-100])                              # as a power cut leaves it
    (tmp_path / "cut/state.tmp").write_bytes(b"half a state")
    with open(tmp_path / "cut/log.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    capsys.readouterr()
    script.main(replace(cut, resume=True))
    said = capsys.readouterr().out
    assert f"{newest} is damaged: going back" in said and "going on after step 4" in said
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_resume_starts_anew_without_a_state_and_refuses_other_arguments(runs, tmp_path, capsys, monkeypatch):
    args = replace(align_args(runs, "", n_pairs=8, steps=3, batch=4, eval_n=2, eval_steps=1), out=str(tmp_path / "run"))
    main_killed(train_align, replace(args), 1, monkeypatch)
    train_align.main(replace(args, resume=True))
    assert "holds no whole state: starting at step 0" in capsys.readouterr().out
    with pytest.raises(UserError, match=re.escape("made by another command (--lr was 0.003, not 1.0)")):
        train_align.main(replace(args, resume=True, lr=1.0))


def test_ctrl_c_saves_first(runs, tmp_path, monkeypatch, capsys):
    args = replace(align_args(runs, "", n_pairs=8, steps=5, batch=4, eval_n=2, eval_steps=1), out=str(tmp_path / "run"))
    own = train_align.clip_grad_norm_
    with monkeypatch.context() as patch, pytest.raises(UserError, match="stopped after step 1: the same command with --resume"):
        patch.setattr(train_align, "clip_grad_norm_", lambda *x: (signal.raise_signal(signal.SIGINT), own(*x))[1])
        train_align.main(replace(args))
    train_align.main(replace(args, resume=True))
    assert "going on after step 1" in capsys.readouterr().out


@pytest.mark.parametrize("script", [train_align, train_reward])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_numbers_gone_wrong_stop_the_run_and_are_named(script, what, runs, tmp_path, monkeypatch, capsys):
    args = (align_args(runs, "", n_pairs=16, steps=6, batch=4, eval_n=2) if script is train_align else
            train_reward.Args(model=str(runs / "base"), depth=1, n_pairs=16, steps=6, batch=4, noisy=True))
    args = replace(args, out=str(tmp_path / "run"))
    noise, clip, calls = script.draw_noise, script.clip_grad_norm_, []

    def draw(shape, seed, step, samples, **settings):
        t, eps = noise(shape, seed, step, samples, **settings)
        eps[samples.index(max(samples))] *= float("nan") if step == 3 and what == "loss" else 1
        return t, eps

    def norm(*x):
        calls.append(clip(*x))
        return calls[-1] * (float("inf") if len(calls) == 4 and what == "gradient" else 1)
    monkeypatch.setattr(script, "draw_noise", draw)
    monkeypatch.setattr(script, "clip_grad_norm_", norm)
    with pytest.raises(UserError, match="^step 4: loss or gradient is not finite"):
        script.main(replace(args))
    facts = json.loads((tmp_path / "run/broken.json").read_text(), parse_constant=pytest.fail)
    assert facts["step"] == 4 and len(facts["rows"]) == len(facts["t"]) == 4 and all(0 <= t < 1 for t in facts["t"])
    if script is train_align:
        assert [i for i, loss in zip(facts["rows"], facts["loss"]) if loss == "NaN"] == [max(facts["rows"])] * (what == "loss")
    assert facts["grad_norm"] == ("NaN" if what == "loss" else "Infinity")
    assert [f.name[:13] for f in (tmp_path / "run").glob("state-*")] == ["state-0000003"]


# ---- a run one can trust: bad input ----

@pytest.fixture(scope="module")
def good(runs, tmp_path_factory):
    """A folder of good files of every kind that is read, and how each is read."""
    root = tmp_path_factory.mktemp("good")
    train_align.main(replace(align_args(runs, "", n_pairs=4, steps=1, batch=2, eval_n=2, eval_steps=1), out=str(root / "dpo")))
    for name in ("base", "reward"):
        shutil.copytree(runs / name, root / name)
    write_clips(root, ["a.mp4", "b.mp4"], frames=6)
    (root / "pairs.csv").write_text('path_A,path_B,prompt,VQ,MQ,MOS_A_VQ\na.mp4,b.mp4,"a cat, asleep",A,same,4\nb.mp4,a.mp4,a dog,B,,2\n')
    rows = [{"prompt": "a cat", "path_A": "a.mp4", "path_B": "b.mp4", "TA": "A"}, {"prompt": "é", "path_A": "b.mp4", "path_B": "a.mp4", "TA": None}]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "prompts.csv").write_text("prompt,prompt_shorter\na cat,\na dog that sleeps,dog\n")
    weights = "diffusion_pytorch_model.safetensors"
    model = lambda folder: sample.load_model(folder)(*random_batch())
    video = lambda path: (data.clip_frames(path, 2), data.read_clip(path, 2, (16, 16)), reward.check_videos([path]), data.read_shapes(path))
    return root, {
        "pairs.csv": data.read_pairs, "pairs.jsonl": data.read_pairs, "a.mp4": video,
        "prompts.csv": lambda path: sample.read_prompts(sample.Args(prompts=str(path)), None),
        f"base/transformer/{weights}": lambda path: model(path.parents[1]), "base/transformer/config.json": lambda path: model(path.parents[1]),
        "dpo/config.json": lambda path: (data.lineage(path.parent), model(path.parent)), "dpo/lora.safetensors": lambda path: model(path.parent),
        "reward/reward.safetensors": lambda path: reward.load_reward(path.parent)}


def mutant(content, g):
    """The bytes with some flipped, cut out or put in, more often near the start, where headers are."""
    pick = lambda n: int(torch.randint(max(n, 1), (1,), generator=g))
    at = pick(min(len(content), (len(content), 2000, 200)[pick(3)]))
    noise = bytes(pick(256) for _ in range(1 + pick(4)))
    return (content[:at] + noise + content[at + len(noise):], content[:at] + noise + content[at:], content[:at], content[:at] + content[at + 1 + pick(8):],
            content[:at] + bytes([content[at] ^ 1 << pick(8)]) + content[at + 1:])[pick(5)]


def test_videos_that_cannot_be_used_are_named(tmp_path):
    import av
    write_clips(tmp_path, ["whole.mp4", "cut.mp4"], frames=12, fps=24)
    write_clips(tmp_path, ["enormous.mp4"], frames=1, size=(16, 8208))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:900])
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "nothing.mp4").touch()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        container.mux([*stream.encode(sound), *stream.encode()])
    with av.open(str(tmp_path / "frameless.mp4"), "w") as container:
        container.add_stream("libx264", rate=8, width=32, height=32, pix_fmt="yuv420p")
        container.start_encoding()
    for name, says in (("cut", "cannot be read as a video"), ("text", "cannot be read as a video"), ("nothing", "cannot be read as a video"),
                       ("gone", "cannot be read as a video"), ("sound", "has no video in it"), ("frameless", "frames|has no video|cannot be read"),
                       ("enormous", "8208 x 16: more than 8192")):
        with pytest.raises(ValueError, match=f"{name}.mp4.*({says})"):
            data.read_clip(tmp_path / f"{name}.mp4", 1, (16, 16))
    shutil.copy(tmp_path / "whole.mp4", tmp_path / "whole.txt")                 # what a file is called doesn't matter
    write_clips(tmp_path, ["slow.mp4"], frames=4, fps=8)
    clips = [data.read_clip(tmp_path / name, 5, (16, 16)) for name in ("whole.mp4", "whole.txt", "slow.mp4")]     # half a second each
    assert torch.equal(clips[0], clips[1]) and clips[2].shape == clips[0].shape == (3, 5, 16, 16)


@pytest.mark.parametrize("what", ["state", "weights", "reward", "videos", "cache"])
def test_a_full_disk_ends_in_one_line(what, runs, tmp_path, capsys):
    """Files may grow to 4000 bytes only, which stops writes as a full disk does."""
    out = str(tmp_path / "run")
    if what in ("state", "weights"):
        script, args = train_align, replace(align_args(runs, "", n_pairs=4, steps=3, batch=2, eval_n=2, eval_steps=1), out=out, save_every=1 if what == "state" else 9)
    elif what == "reward":
        script, args = train_reward, train_reward.Args(model=str(runs / "base"), depth=1, n_pairs=4, steps=1, batch=2, n_eval=4, out=out)
    else:
        script, args = sample, sample.Args(ckpt=str(runs / "base"), steps=1, prompt=PROMPTS[:1], out=out)
    main = (lambda args: data.save_cached(torch.zeros(100, 100), tmp_path / "x")) if what == "cache" else script.main
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            data.launch(main, script.Args, script.__doc__, shlex.split(data.command(args))[2:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(said) == 1 and re.search("written|too large", said[0]), said
    assert not [f for f in tmp_path.rglob("*") if f.suffix in (".safetensors", ".pt")]


def test_damaged_files_are_read_or_refused_in_one_line(good, capsys, n=12, seed=0):
    root, readers = good
    outcomes = {"read": 0, "refused": 0}
    for name, read in readers.items():
        content = (root / name).read_bytes()
        for i in range(n):
            (root / name).write_bytes(mutant(content, rng(name, seed, i)))
            capsys.readouterr()
            try:
                read(root / name)
                outcomes["read"] += 1
            except UserError as e:
                said = " ".join(str(e).splitlines())
                assert len(said) > 30, (name, seed, i, said)
                outcomes["refused"] += 1
            finally:
                (root / name).write_bytes(content)
    assert min(outcomes.values()) > n, outcomes


# ---- Wan 2.1: a tiny random pipeline of the real classes, saved by diffusers and transformers themselves ----

@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """The folder of a tiny WanPipeline, with pairs.csv of four mp4 files beside it."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate("<pad> </s> <unk> a cat dog runs sleeps".split())}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    text = UMT5EncoderModel(UMT5Config(vocab_size=8, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    dit = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=24,
                                freq_dim=16, ffn_dim=48, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32)
    with torch.no_grad():
        for q in dit.parameters():                                              # as drawn, some of it is zero
            q.add_(0.1 * torch.randn_like(q))
    folder = tmp_path_factory.mktemp("wan")
    WanPipeline(tokenizer=tokenizer, text_encoder=text, vae=vae, transformer=dit,
                scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(folder)
    write_clips(folder, ["v/a.mp4", "v/b.mp4", "v/c.mp4", "v/d.mp4"])
    (folder / "pairs.csv").write_text("path_A,path_B,prompt,VQ,MQ,TA\nv/a.mp4,v/b.mp4,a cat runs,A,A,same\n"
                                      "v/c.mp4,v/d.mp4,a dog sleeps,A,B,A\nv/d.mp4,v/a.mp4,a cat runs,B,,\n")
    return folder


def pipeline(folder):
    """diffusers' own WanPipeline from that folder, quiet."""
    from diffusers import WanPipeline, WanTransformer3DModel
    WanTransformer3DModel._keep_in_fp32_modules = None                          # else it asks for accelerate
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_sampling_gives_the_latents_and_frames_of_diffusers_pipeline(wan):
    pipe, prompts = pipeline(wan), ["a  cat &amp; dog", "a dog"]
    eps = torch.stack([torch.randn(16, 2, 4, 6, generator=rng("eval", 7, i)) for i in range(2)])
    settings = dict(prompt=prompts, negative_prompt="sleeps", height=32, width=48, num_frames=5, num_inference_steps=3,
                    guidance_scale=4.0, latents=eps)
    theirs = pipe(**settings, output_type="latent").frames
    frames = pipe(**settings, output_type="pt").frames                          # (B, T, 3, H, W) in [0, 1]
    pipe.scheduler.set_timesteps(3)
    codec = data.WanCodec(wan)
    texts = sample.embed_all(codec, prompts, "sleeps")
    ours = list(sample.generate(sample.load_model(wan), codec, prompts, texts, 7, pipe.scheduler.sigmas, (5, 32, 48), cfg_scale=4.0,
                                negative="sleeps", batch=1))
    assert torch.allclose(torch.stack([x for x, _ in ours]), theirs, rtol=0, atol=1e-4)
    videos = torch.stack([video for _, video in ours])
    assert torch.allclose((videos + 1) / 2, frames.transpose(1, 2), rtol=0, atol=1e-4)


def test_latents_are_encoded_once_and_an_interrupted_encode_goes_on(wan, tmp_path, monkeypatch, capsys):
    pairs, codec = data.read_pairs(wan / "pairs.csv"), data.WanCodec(wan)
    encoded, own = [], codec.encode_video
    monkeypatch.setattr(codec, "encode_video", lambda x: encoded.append(1) or own(x))
    args = train_align.Args(cache=str(tmp_path), frames=5, size=(32, 48))
    first = codec.encode(pairs, args)
    x0, text = codec.latents(first, [0, 2]), codec.text(first, [0, 2])
    assert len(encoded) == 4 and x0.shape == (2, 2, 16, 2, 4, 6) and text.shape == (2, 512, 24)
    assert torch.equal(x0[0, 0], x0[1, 1]) and torch.equal(text[0], text[1])    # one video, one prompt, twice
    pixels = data.read_clip(wan / "v/a.mp4", 5, (32, 48))
    assert torch.equal(x0[0, 0], own(pixels[None])[0].bfloat16().float())
    assert text[0].any(1).sum() == 4                                            # three words and the end, then zeros

    before, file = codec.latents(first, [0, 1, 2]), codec.cached[first.videos[1][0]]
    file.write_bytes(file.read_bytes()[:-8])                                    # half a file, as a full disk leaves it
    again = codec.encode(pairs, args)
    assert len(encoded) == 5 and torch.equal(codec.latents(again, [0, 1, 2]), before)
    codec.encode(pairs, replace(args, frames=9))                            # other settings, other latents
    assert len(encoded) == 9


def test_a_bad_video_is_named_with_its_row_and_left_out_on_request(wan, tmp_path, capsys):
    shutil.copytree(wan / "v", tmp_path / "v")
    shutil.copy(wan / "pairs.csv", tmp_path)
    (tmp_path / "v/c.mp4").write_bytes((wan / "v/c.mp4").read_bytes()[:300])
    write_clips(tmp_path, ["v/b.mp4"], frames=1)
    pairs = data.read_pairs(tmp_path / "pairs.csv")
    args = train_align.Args(cache=str(tmp_path / "cache"), frames=5, size=(32, 48))
    with pytest.raises(UserError, match="row 2: .*b.mp4 lasts 0.12 s, too short for 5 frames"):
        data.WanCodec(wan).encode(pairs, args)
    kept = data.WanCodec(wan).encode(pairs, replace(args, skip_bad=True))
    assert kept.prompts == ["a cat runs"] and kept.lines == [4]
    assert "skipped 2 pairs with 2 bad videos" in capsys.readouterr().out


def wan_args(wan, name, **changes):
    return train_align.Args(**{**dict(model=str(wan), pairs=str(wan / "pairs.csv"), frames=5, size=(32, 48), steps=12, batch=3,
                                      accumulate=3, lr=3e-3, beta=2000.0, lora_rank=4, lora_alpha=8.0, dtype="fp32",
                                      cache=str(wan / "cache"), out=str(wan / name)), **changes})


def test_dpo_on_wan_trains_a_lora_that_diffusers_loads_to_the_same_model(wan):
    train_align.main(wan_args(wan, "dpo"))
    first, last = ends(wan / "dpo")
    assert last < first
    tensors = model_file.read_tensors(wan / "dpo/lora.safetensors")[0]
    names = [f"blocks.{i}.{a}.{x}" for i in (0, 1) for a in ("self_attn", "cross_attn") for x in "qkvo"]
    assert set(tensors) == {f"diffusion_model.{name}.lora_{ab}.weight" for name in names for ab in "AB"}

    ours, xt, t, text = sample.load_model(wan / "dpo"), torch.randn(1, 16, 2, 4, 6), torch.tensor([0.3]), torch.randn(1, 7, 24)
    base = sample.load_model(wan)(xt, t, text)
    v = ours(xt, t, text)
    assert (v - base).abs().max() > 1e-3
    pytest.importorskip("peft")
    pipe = pipeline(wan)
    pipe.load_lora_weights(str(wan / "dpo"), weight_name="lora.safetensors")
    theirs = pipe.transformer(xt, 1000 * t, text).sample
    assert (v - theirs).norm() < 1e-5 * theirs.norm()


def test_a_second_round_starts_from_an_aligned_wan(wan):
    train_align.main(wan_args(wan, "first", steps=1))
    train_align.main(wan_args(wan, "second", steps=1, model=str(wan / "first")))
    assert data.lineage(wan / "second") == [wan / "second", wan / "first", wan]
    assert sample.load_model(wan / "second")(torch.randn(1, 16, 2, 4, 6), torch.tensor([0.3]), torch.randn(1, 7, 24)).isfinite().all()


def test_a_model_of_fp32_weights_computes_as_the_autocast_around_it_says():
    m, batch = random_model(), random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert m(*batch, depth=1).dtype == torch.bfloat16
    assert m(*batch, depth=1).dtype == torch.float32 and m(*batch).dtype == torch.float32


def test_sft_and_dpo_in_bf16_and_checkpointing_on_wan(wan):
    """The paper's losses run in the precision and with the memory saving that a real Wan needs."""
    for name, changes in (("sft", dict(loss="sft", dtype="bf16")), ("half", dict(dtype="bf16")), ("plain", dict(checkpointing=False))):
        train_align.main(wan_args(wan, name, steps=2, accumulate=1, batch=2, **changes))
    train_align.main(wan_args(wan, "kept", steps=2, accumulate=1, batch=2, checkpointing=True))
    plain, kept = (model_file.read_tensors(wan / name / "lora.safetensors")[0] for name in ("plain", "kept"))
    assert all(torch.allclose(plain[k], kept[k], atol=1e-6) for k in plain)
    plain, half = (json.loads((wan / name / "log.jsonl").read_text())["err_ref_w"] for name in ("plain", "half"))
    assert plain != half and plain == pytest.approx(half, rel=0.02)


def test_wan_is_sampled_side_by_side_under_the_names_that_vbench_expects(wan, tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt,prompt_shorter\na cat runs and runs,a cat runs\na dog sleeps,\n")
    train_align.main(wan_args(wan, "side", steps=2))
    args = dict(ckpt=str(wan / "side"), prompts=str(tmp_path / "prompts.csv"), n_per_prompt=2, frames=5, size=(32, 48), steps=2)
    sample.main(sample.Args(**args, against="base", out=str(tmp_path / "out")))
    names = {"a cat runs-0.mp4", "a cat runs-1.mp4", "a dog sleeps-0.mp4", "a dog sleeps-1.mp4"}
    for folder in (tmp_path / "out", tmp_path / "out/start"):
        assert {p.name for p in folder.glob("*.mp4")} == names and (folder / "samples.png").exists()
    frames, fps = data.read_video(tmp_path / "out/a dog sleeps-1.mp4")
    assert frames.shape == (5, 32, 48, 3) and fps == 16


def test_a_noisy_reward_grows_from_wan_guides_it_and_judges_it(wan, tmp_path, capsys):
    train_reward.main(train_reward.Args(noisy=True, model=str(wan), pairs=str(wan / "pairs.csv"), frames=5, size=(32, 48),
                                        cache=str(wan / "cache"), depth=1, steps=4, batch=2, accumulate=2, lr=1e-3,
                                        out=str(tmp_path / "noisy")))
    args = dict(model=str(wan), prompt=["a cat runs"], n_per_prompt=2, frames=5, size=(32, 48), steps=3)
    sample.main(sample.Args(**args, out=str(tmp_path / "plain")))
    train_align.main(wan_args(wan, "guided", loss="rwr", labels="reward", reward=str(tmp_path / "noisy"), steps=2))
    result = sample.main(sample.Args(**{**args, "model": "", "ckpt": str(wan / "guided")}, nrg=str(tmp_path / "noisy"),
                                     against="base", reward=str(tmp_path / "noisy"), out=str(tmp_path / "out")))
    assert set(result["win_rate"]) == {*DIMS, "Overall"} and json.loads((tmp_path / "out/eval.json").read_text()) == result
    plain, guided = (data.read_video(tmp_path / x / "001.mp4")[0] for x in ("plain", "out"))
    assert not np.array_equal(plain, guided)
    assert np.array_equal(plain, data.read_video(tmp_path / "out/start/001.mp4")[0])      # the same noise, unguided
    pairs = data.read_pairs(tmp_path / "out/pairs.csv")
    assert pairs.label[0, 3] == 1 and {path.name for path in pairs.videos[0]} == {"000.mp4", "001.mp4"}
    sample.write_pairs(tmp_path / "best.csv", [Path(f"{x}.mp4") for x in "abcdef"], ["x"] * 3 + ["y"] * 3, torch.tensor([1.0, 3, 2, 6, 5, 4]), 3)
    assert (tmp_path / "best.csv").read_text().split() == ["prompt,chosen,rejected", "x,b.mp4,a.mp4", "y,d.mp4,f.mp4"]
    with pytest.raises(UserError, match="is no toy of Shapes world"):
        train_align.main(train_align.Args(model=str(wan), labels="human", out=str(tmp_path / "no")))


def test_videoreward_labels_the_pairs_of_a_wan_and_judges_what_it_draws(wan, qwen, tmp_path, capsys):
    judge = dict(reward=str(qwen[0] / "released"), template=str(qwen[0] / "prompt_template.py"))
    train_align.main(wan_args(wan, "judged", loss="rwr", labels="reward", steps=2, **judge))
    assert "3 of 3 pairs labelled by reward" in capsys.readouterr().out
    assert len((wan / "cache/scores.jsonl").read_text().split()) >= 5           # of 5 distinct videos and prompts
    result = sample.main(sample.Args(ckpt=str(wan / "judged"), prompt=["a dog runs"], n_per_prompt=2, frames=5, size=(32, 48),
                                     steps=2, against="base", out=str(tmp_path / "out"), **judge))
    assert result["n"] == 2 and result["judge"] == judge["reward"]


def test_lora_files_of_diffusers_names_load_too(wan, tmp_path):
    m = add_lora(sample.load_model(wan), 2, 4.0)
    for name, q in m.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(q)
    save_lora(m, tmp_path / "a.safetensors")
    tensors = model_file.read_tensors(tmp_path / "a.safetensors")[0]
    names = {k: "transformer." + model_file.to_diffusers(k.removeprefix("diffusion_model.")) for k in tensors}
    assert "transformer.blocks.0.attn1.to_out.0.lora_A.weight" in names.values()
    model_file.save_tensors({names[k]: v for k, v in tensors.items()}, tmp_path / "b.safetensors")
    a, b = (load_lora(sample.load_model(wan), tmp_path / f"{x}.safetensors").state_dict() for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- what ships ----

def page_commands():
    """The words after `python` of each command of the pages, by a shell that goes through their loops and runs nothing."""
    pages = (HERE / "README.md").read_text() + (HERE / "assets" / "results.md").read_text()
    shell = 'PATH=/nowhere; command_not_found_handle() { :; }; python() { printf "%s\\0" "$@"; echo; }\n'
    said = [subprocess.run(["bash", "-c", shell + block], cwd=HERE, capture_output=True, text=True, check=True).stdout
            for block in re.findall(r"```bash\n(.*?)```", pages, re.S)]
    return [line.split("\0")[:-1] for line in "".join(said).splitlines()]


def test_every_command_of_the_pages_parses():
    scripts = {m.__name__ + ".py": m for m in (train_align, train_reward, sample, reward)}
    documented = [line.strip().split("    ")[0] for m in scripts.values() for line in m.__doc__.splitlines()]
    commands = page_commands()
    assert len(commands) >= 30
    for script, *words in commands + [shlex.split(line)[1:] for line in documented if line.startswith("python ")]:
        assert (HERE / script).exists(), script
        if script in scripts:
            args = sample.Compare if "--compare" in words else scripts[script].Args
            data.parse_args(args, scripts[script].__doc__, words)


def test_the_shipped_weights_are_of_this_world_small_and_good():
    files = sorted((HERE / "assets").rglob("*.safetensors"))
    assert [str(f.parent.relative_to(HERE / "assets")) for f in files] == ["base/transformer", "noisy", "reward"]
    assert sum(f.stat().st_size for f in files) < 8e6
    for f in files:
        metadata = model_file.read_tensors(f)[1]
        assert metadata["world"] == data.world_hash() and metadata["command"].startswith("python train_") and metadata["seed"] == "0"
    prompts = data.prompts_of("eval", 36)
    steps, shift, scale = (sample.RECIPES[name][0] for name in ("steps", "shift", "cfg"))
    videos = sample.toy_videos(sample.load_model("assets/base"), prompts, 0, steps, shift, cfg_scale=scale)
    g = rng(0)
    mixed, captions = data.flawed_videos(500, None, g)
    share = oracle(videos, prompts).mean(0) / oracle(mixed, captions).mean(0)
    assert (share > 0.7).all(), share                                           # 0.8 on 512 draws; 36 leave room for chance
    r = reward.LatentReward.from_pretrained("assets/reward")
    pairs = data.toy_pairs(200, "eval", seed=1)
    text = data.Shapes().text(pairs, range(200)).repeat_interleave(2, dim=0)
    score = r.score_clean(data.Shapes().latents(pairs, slice(None)).flatten(0, 1), text).view(200, 2, 3)
    d = score[:, 0] - score[:, 1]
    assert all(reward.accuracy_without_ties(pairs.label[:, k], d[:, k]) > 0.65 for k in range(3))


# ---- speed: python test_all.py --bench ----

@dataclass
class Bench:
    """Time a forward pass, a training step of all weights and a Flow-DPO step (LoRA) beside diffusers' Wan.

    All take turns in one process. The DPO step around diffusers is the usual one: adapters by peft, the reference is
    the model with them off, winner and loser go through it one after the other.
    """
    preset: Literal["small", "toy", "wan-1.3b", "wan-14b"] = "small"  # small: a Wan that two CPU cores can train
    frames: int = 13                        # of each video; a Wan's is 4k + 1
    size: data.Size = (256, 256)                # height and width of each video
    batch: int = 1                          # videos; pairs in the DPO step
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the linear maps
    compile: bool = True                    # measure with compiled blocks too
    checkpointing: bool = False             # activation checkpointing, each in its own way
    lora_rank: int = 64                     # of the DPO step
    steps: list = ("forward", "train", "dpo")  # which to measure
    rounds: int = 7                         # turns of each after two to warm up; medians are shown
    profile: bool = False                   # print which operations each eager step's time goes to


SMALL = model_file.Config(dim=384, ffn_dim=2240, text_dim=512, num_heads=3, num_layers=4)       # the ratios of 1.3B


def flops(c, shape, words):
    """(linear maps, attention) of one video's forward pass, a multiply-add being two; norms and such are left out."""
    D, patch, S = c.dim, c.in_dim * math.prod(c.patch_size), words
    L = math.prod(shape) // patch
    outside = 4 * L * D * patch + 2 * S * D * (c.text_dim + D)                  # patches in and out; the text
    block = 2 * D * (6 * L * D + 2 * S * D + 2 * L * c.ffn_dim)                 # q k v o; the text's q o, k v; ffn
    return outside + c.num_layers * block, c.num_layers * 4 * L * (L + S) * D   # scores, and the sums they weigh


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A backward pass costs its forward pass twice, once for the inputs and once for the weights, which LoRA's frozen ones
# do not need. DPO: two videos through the policy, there and back, and through the reference. What is computed again
# because of checkpointing does not count.
PASSES = {"forward": (1, 1), "train": (3, 3), "dpo": (2 * (2 + 1), 2 * (3 + 1))}    # of (linear maps, attention)


def contender(args, step, ours, compiled, weights, config, batch):
    """(function of no arguments that does the step, bytes that it holds between steps). Weights are shared by all."""
    from diffusers import WanTransformer3DModel
    (x0, t, text, eps), dpo, dtype = batch, step == "dpo", DTYPES[args.dtype]
    with x0.device:
        m = VideoDiT(config) if ours else WanTransformer3DModel.from_config(config.to_diffusers())
    if ours:
        m.load_state_dict(weights, assign=True)
        velocity = m
    else:                                                                       # fp32 where its own loader keeps it
        fp32 = lambda k: any(part in k for part in m._keep_in_fp32_modules)
        theirs = {model_file.to_diffusers(k): v for k, v in weights.items()}
        m.load_state_dict({k: v if fp32(k) else v.to(dtype) for k, v in theirs.items()}, assign=True)
        velocity = lambda xt, t, text: m(xt.to(dtype), 1000 * t, text.to(dtype), return_dict=False)[0]
    m.train().requires_grad_(not dpo)
    if dpo and ours:
        add_lora(m, args.lora_rank, 2.0 * args.lora_rank)
    elif dpo:
        from peft import LoraConfig
        m.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank,
                                 target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if args.checkpointing and ours:
        for block in m.blocks:
            block.checkpointing = True
    elif args.checkpointing:
        m.enable_gradient_checkpointing()
    if compiled:
        m.compile_blocks() if ours else m.compile_repeated_blocks(dynamic=False)
    trained = [p for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    @contextlib.contextmanager
    def adapters_off():
        m.disable_adapters()
        yield
        m.enable_adapters()

    def errors():
        """Errors of winner and loser: ours in one batch, the usual recipe one after the other."""
        if ours:
            return train_align.velocity_errors(m, x0, text, t, eps).unbind(1)
        return [velocity_error(velocity(mix(x, eps, t), t, text), eps - x) for x in x0.unbind(1)]

    def run():
        if step == "forward":
            with torch.no_grad():
                return velocity(mix(x0[:, 0], eps, t), t, text)
        if dpo:
            err = errors()
            with torch.no_grad(), lora_disabled(m) if ours else adapters_off():
                err_ref = errors()
            loss = flow_dpo(*err, *err_ref, 500.0)
        else:
            loss = velocity_error(velocity(mix(x0[:, 0], eps, t), t, text), eps - x0[:, 0])
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    held = sum(p.numel() * p.element_size() * (1 + 2 * p.requires_grad * (step != "forward")) for p in m.parameters())
    return run, held


def take_turns(functions, rounds, device):
    """Seconds (rounds, n) of n functions that take turns, and the most bytes that each added on a GPU (n). Every other
    turn goes backwards, so that no function always runs in what the same other one left in the caches.
    """
    sync, added = (torch.cuda.synchronize if device == "cuda" else lambda: None), [0] * len(functions)
    seconds = np.zeros((rounds + 2, len(functions)))
    for turn in range(rounds + 2):                                              # two to compile and to warm up
        for i, function in list(enumerate(functions))[::1 - 2 * (turn % 2)]:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            sync()
            tic = time.perf_counter()
            function()
            sync()
            seconds[turn, i] = time.perf_counter() - tic
            if device == "cuda":
                added[i] = torch.cuda.max_memory_allocated() - before
    return seconds[2:], added


def operations(run, device, times=5):
    """{operation: its own milliseconds in one run}, of runs one after the other."""
    from torch.autograd import DeviceType
    from torch.profiler import profile
    with profile() as profiler:
        for _ in range(times):
            run()
    spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    return {event.key: getattr(event, spent) / 1000 / times for event in profiler.key_averages()
            if event.device_type == DeviceType.CPU}                             # which its kernels count towards


def attention_times(config, tokens):
    """A line of the milliseconds that attention in bf16 takes on a GPU, there and back, on one video's tokens."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    shape = 1, config.num_heads, tokens, config.dim // config.num_heads
    q, found = torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True), {}

    def attend():
        with sdpa_kernel(kinds):
            torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(q, q, q).sum(), q)
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    for name, kinds in (("flash", [flash]), ("cuDNN", [cudnn]), ("PyTorch's choice", [flash, cudnn])):
        try:
            found[name] = 1000 * np.median(take_turns([attend], 5, "cuda")[0])
        except RuntimeError:                                                    # this machine hasn't got it
            continue
    return "Attention, ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in found.items())


def bench(args):
    """Print one Markdown table of args.steps, then what the data path does in a second."""
    import diffusers
    device, dtype, toy = "cuda" if torch.cuda.is_available() else "cpu", DTYPES[args.dtype], args.preset == "toy"
    config, peft = SMALL if args.preset == "small" else PRESETS[args.preset], importlib.util.find_spec("peft")
    shape = (3, args.frames, *args.size) if toy else (16, (args.frames - 1) // 4 + 1, *(x // 8 for x in args.size))
    words, n = data.TEXT_LEN if toy else data.WAN_TEXT_LEN, 8192 if device == "cuda" else 2048
    torch.manual_seed(0)
    with torch.device(device):
        m = VideoDiT(config)
        batch = (torch.randn(args.batch, 2, *shape), torch.rand(args.batch),
                 torch.randn(args.batch, words, config.text_dim), torch.randn(args.batch, *shape))
        a, b = torch.randn(2, n, n, dtype=dtype)
    tokens = args.batch * math.prod(shape) // (config.in_dim * math.prod(config.patch_size))
    if device == "cuda":
        print(attention_times(config, tokens // args.batch), end="\n\n")
    fp32 = lambda k: any(part in k for part in model_file.FP32_ISLANDS)
    weights = {k: v if fp32(k) else v.to(dtype) for k, v in m.state_dict().items()}
    del m
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    profiles = []
    print(f"{args.preset}, {args.frames} frames of {args.size[0]} x {args.size[1]}, {tokens:,} tokens, {args.dtype}, "
          f"{where}, torch {torch.__version__}, diffusers {diffusers.__version__}; medians of {args.rounds} turns\n\n"
          "| step | model | s | GB | tokens/s | TFLOP/s | of matmul | time / diffusers | time / compiled diffusers |\n"
          + "|---" * 9 + "|")
    for step in args.steps:
        names = [(who, compiled) for compiled in (False, True)[:1 + args.compile] for who in ("ours", "diffusers")
                 if who == "ours" or step != "dpo" or peft]
        runs, held = zip(*[contender(args, step, who == "ours", compiled, weights, config, batch)
                           for who, compiled in names])
        seconds, added = take_turns([*runs, lambda: a @ b], args.rounds, device)
        median, seen = np.median(seconds, axis=0), tokens * (2 if step == "dpo" else 1)
        matmul = 2e-12 * n**3 / median[-1]
        work = 1e-12 * args.batch * np.dot(PASSES[step], flops(config, shape, words))
        for i, name in enumerate(names):
            ratios = [f"{np.median(seconds[:, i] / seconds[:, names.index(other)]):.2f}" if other in names else ""
                      for other in (("diffusers", False), ("diffusers", True))]
            memory = f"{(held[i] + added[i]) / 1e9:.1f}" if device == "cuda" else ""
            cells = (step, name[0] + ", compiled" * name[1], f"{median[i]:.3f}", memory, f"{seen / median[i]:,.0f}",
                     f"{work / median[i]:.3g}", f"{work / median[i] / matmul:.0%}", *ratios)
            print("| " + " | ".join(cells) + " |", flush=True)
        if args.profile:
            profiles.append((step, [operations(run, device) for run in runs[:len(names) // (1 + args.compile)]]))
        if step == "dpo" and not peft:
            print("| dpo | diffusers needs `pip install peft` |" + " |" * 7)
        del runs
        torch.compiler.reset()
    for step, found in profiles:
        print(f"\n| {step}, ms | ours |" + " diffusers |" * (len(found) - 1) + "\n|---" + "|---" * len(found) + "|")
        for name in sorted(found[0], key=found[0].get)[:-9:-1] + ["all"]:
            cells = [sum(x.values()) if name == "all" else x.get(name, 0) for x in found]
            print(f"| {name} | " + " | ".join(f"{ms:.1f}" for ms in cells) + " |")
    print(f"\nA matmul of {n} x {n} ran at {matmul:.3g} TFLOP/s, taking turns with the last step's rows.")
    bench_data(args, device)


def bench_data(args, device):
    """Print how fast pairs of Shapes world are drawn and judged, and videos are decoded and encoded."""
    from diffusers import AutoencoderKLWan

    def rate(function, n):
        seconds, _ = take_turns([function], 3, device)
        return n / np.median(seconds)
    print(f"Shapes world: {rate(lambda: data.toy_pairs(64, 'train', 0), 64):.0f} pairs/s.", end="")
    if args.preset != "toy":
        with tempfile.TemporaryDirectory() as folder:
            noise = torch.rand(3, 6, *args.size).mul(2).sub(1).repeat_interleave(-(-args.frames // 6), 1)
            data.write_video(f"{folder}/a.mp4", noise, data.WAN_FPS)
            clip = data.read_clip(f"{folder}/a.mp4", args.frames, args.size)
            decode = rate(lambda: data.read_clip(f"{folder}/a.mp4", args.frames, args.size), 1)
        vae = AutoencoderKLWan().to(device).eval().requires_grad_(False)        # Wan 2.1's sizes, random weights
        encode = rate(lambda: vae.encode(clip[None].to(device)), 1)
        print(f" Videos of {args.frames} frames: {decode:.2f}/s decoded and scaled, "
              f"{encode:.3f}/s through the autoencoder.", end="")
    print()


if __name__ == "__main__":
    if "--bench" in sys.argv:
        words = [word for word in sys.argv[1:] if word != "--bench"]
        raise SystemExit(bench(data.parse_args(Bench, Bench.__doc__, words)))
    raise SystemExit(pytest.main([__file__, "-q"]))
