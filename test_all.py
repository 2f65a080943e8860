"""Executable specification: the method, the model, Shapes world and the scripts, stated as facts.

    pytest test_all.py                                                  on a CPU, without network
    python test_all.py --bench                                          how fast it is, beside diffusers
    python test_all.py --bench --preset wan-1.3b --dtype bf16 --checkpointing
    python test_all.py --gpu                                ten minutes on a GPU: tables, and gpu.json
"""
import ast
import contextlib
import copy
import csv
import gc
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
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import pytest
import torch
from torch import tensor

import data
import losses
import model as model_file
import reward
import sample
import train_align
import train_reward
from data import DEFECTS, DIMS, DTYPES, GROUND, PROMPTS, attributes, clean_videos, normalised, oracle, render
from data import rng
from losses import beta_schedule, bt, btt, flow_dpo, flow_rwr, flow_sft, masked_mean, mix, regression
from losses import velocity_error
from model import PRESETS, UserError, VideoDiT, add_lora, load_lora, lora_disabled, read_tensors, save_lora
from sample import euler, nrg, timesteps

HERE, NAN = Path(__file__).parent, float("nan")
torch.set_num_threads(1)                        # what is so small takes longer on two
TINY = replace(PRESETS["toy"], dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16)

# How others spell the adapters of a layer: its prefix, A, B, and where alpha stands; in ours it is part of B.
LORA_LAYOUTS = {"ours": ("diffusion_model.", "lora_A.weight", "lora_B.weight", "B"),
                "diffusers": ("transformer.", "lora_A.weight", "lora_B.weight", "header"),
                "peft": ("base_model.model.", "lora_A.weight", "lora_B.weight", "adapter_config.json"),
                "ComfyUI": ("diffusion_model.", "lora_down.weight", "lora_up.weight", "tensor"),
                "kohya": ("lora_unet_", "lora_down.weight", "lora_up.weight", "tensor")}
LORA_SETTINGS = {"r": 2, "lora_alpha": 4, "use_rslora": False, "alpha_pattern": {}, "rank_pattern": {}}

# ---- the method in nine facts ----
# What the paper's method is, exact where the theory is. A change that breaks one changes what is taught.

def test_1_t_0_is_data_t_1_is_noise_and_v_is_the_derivative_of_xt():
    x0, eps = torch.randn(2, 2, 3, 2, 4, 4, dtype=torch.float64)
    t, h = tensor([0.3, 0.8], dtype=torch.float64), 1e-6
    assert torch.equal(mix(x0, eps, torch.zeros(2)), x0) and torch.equal(mix(x0, eps, torch.ones(2)), eps)
    assert torch.allclose((mix(x0, eps, t + h) - mix(x0, eps, t - h)) / (2 * h), eps - x0, atol=1e-8)

def test_2_the_eps_error_is_one_minus_t_squared_times_the_velocity_error():
    (x0, eps, v), t = torch.randn(3, 4, 3, 2, 4, 4), torch.rand(4)
    err = velocity_error(v, eps - x0)
    eps_pred = mix(x0, eps, t) + (1 - t).view(-1, 1, 1, 1, 1) * v
    assert torch.allclose(velocity_error(eps_pred, eps), (1 - t) ** 2 * err, rtol=1e-4)
    assert velocity_error(v.bfloat16(), eps.bfloat16()).dtype == torch.float32  # DPO subtracts near errors

def test_3_dpo_is_log_2_at_the_reference_and_fits_the_winner_and_unfits_the_loser():
    (target_w, target_l), v = torch.randn(2, 3, 2, 2, 4, 4), torch.randn(2, 3, 2, 2, 4, 4)
    v_w, v_l = (x.clone().requires_grad_() for x in v)
    err_w, err_l = velocity_error(v_w, target_w), velocity_error(v_l, target_l)
    loss = flow_dpo(err_w, err_l, err_w.detach(), err_l.detach(), beta=500.0)
    assert torch.allclose(loss, torch.full((3,), math.log(2)), atol=1e-6)
    loss.sum().backward()
    assert (v_w.grad * (target_w - v_w)).sum() < 0 < (v_l.grad * (target_l - v_l)).sum()
    # the closed form of the gradient: d loss / d err_w = beta / 2 * sigmoid(beta / 2 * difference)
    err, ref = tensor([0.31], requires_grad=True), tensor([0.30])
    flow_dpo(err, ref, ref, ref, 100.0).backward()
    assert torch.allclose(err.grad, 50 * torch.sigmoid(tensor([0.5])), rtol=1e-4)

def test_4_beta_over_time_is_constant_or_what_a_derivation_gives():
    t = tensor([0.0, 0.25, 1.0])
    for kind, betas in {"constant": [8, 8, 8], "(1-t)^2": [8, 4.5, 0], "t^2": [0, 0.5, 8]}.items():
        assert beta_schedule(8.0, t, kind).tolist() == betas
    assert torch.allclose(beta_schedule(8.0, t, "(1-t)/t"), tensor([8 / 0.05, 24, 0]))  # finite at data
    with pytest.raises(ValueError, match="constant"):
        beta_schedule(8.0, t, "cosine")

def test_5_rwr_with_equal_rewards_is_sft_and_its_weights_have_mean_1_before_the_clip():
    err, r = torch.rand(5, requires_grad=True), tensor([-1.0, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    assert torch.allclose(flow_rwr(err, torch.full((5,), 3.0)), flow_sft(err))
    loss = flow_rwr(err, r)
    assert torch.allclose(loss / err, torch.exp(r) / torch.exp(r).mean())
    loss.sum().backward()
    assert r.grad is None
    one_great = torch.cat([torch.zeros(99), tensor([1000.0])])
    assert flow_rwr(torch.ones(100), one_great).tolist() == [0.0] * 99 + [10.0]

def test_6_btt_is_rao_and_kuppers_model_its_probabilities_sum_to_one_and_tie_1_gives_bt():
    d, one = torch.randn(50, dtype=torch.float64) * 4, torch.ones(50)
    p_a, p_tie, p_b = (torch.exp(-btt(d, label * one, tie=5.0)) for label in (1, 0, -1))
    assert torch.allclose(p_a + p_tie + p_b, one.double())
    odds = torch.exp(d)
    assert torch.allclose(p_a, odds / (odds + 5)) and torch.allclose(p_b, 1 / (5 * odds + 1))
    assert abs(torch.exp(-btt(torch.zeros(1), torch.zeros(1))).item() - 24 / 36) < 1e-6
    assert all(torch.allclose(btt(d, label * one, tie=1.0), bt(d, label * one)) for label in (1, -1))

def test_7_what_is_not_labelled_leaves_loss_and_gradient_untouched():
    label, score = tensor([1.0, NAN, -1.0, 0.0, NAN]), tensor([1.0, NAN, 2.0, 0.5, NAN])
    for loss, y, counted in ((bt, label, [0, 2]), (btt, label, [0, 2, 3]), (regression, score, [0, 2, 3])):
        d = tensor([0.3, NAN, -0.2, 5.0, 1e30], requires_grad=True)
        out = loss(d, y)
        assert all(out[i] == 0 for i in range(5) if i not in counted)
        out.sum().backward()
        assert all((d.grad[i] != 0) == (i in counted) for i in range(5)) and d.grad.isfinite().all()
        assert loss(d.double(), y).dtype == torch.float64
    assert masked_mean(tensor([1.0, 7.0, 3.0]), tensor([1.0, NAN, 0.0])) == 2.0
    assert masked_mean(tensor([NAN]), tensor([NAN])) == 0.0

def test_8_euler_hits_a_gaussian_and_nrg_its_tilted_mean_but_not_with_the_wrong_sign():
    mu, s = 0.7, 0.5                                        # the data are N(mu, s^2): all is known exactly

    def mean_x0(x, t):
        return mu + (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2) * (x - (1 - t) * mu)

    def velocity(x, t):
        return (x - (1 - t) * mean_x0(x, t)) / t - mean_x0(x, t)

    def noisy_reward(x, t):                                 # E[r | xt] of r(x0) = 2 x0, up to a constant
        return 2 * mean_x0(x, t).float()
    eps, ts = torch.randn(20000, 1, generator=rng(0), dtype=torch.float64), timesteps(200).double()
    x = euler(velocity, eps, ts)
    assert abs(x.mean() - 0.700) < 0.01 and abs(x.std() - 0.496) < 0.01
    # the target of guidance by w = 2 is N(mu + 2 w s^2, s^2) = N(1.7, s^2)
    guided = nrg(velocity, noisy_reward, rg_scale=2.0, dim_w=(1.0,))
    x = euler(guided, eps, ts)
    assert abs(x.mean() - 1.7) < 0.02 and abs(x.std() - 0.496) < 0.01
    assert torch.equal(guided(eps, ts[0]), velocity(eps, ts[0]))                # t = 1 is skipped
    assert euler(nrg(velocity, noisy_reward, rg_scale=-2.0, dim_w=(1.0,)), eps, ts).mean() < -0.2
    v, guided = velocity(eps, ts[9]), nrg(velocity, noisy_reward, 1000.0, (1.0,), max_ratio=0.1)(eps, ts[9])
    assert torch.allclose((guided - v).abs(), 0.1 * v.abs(), rtol=1e-3)         # no more than its share

def test_9_the_model_with_its_adapters_off_is_bitwise_the_reference():
    m, batch = random_model(), random_batch()
    with torch.no_grad():
        base = m(*batch)
        assert torch.equal(add_lora(m, rank=4, alpha=8.0)(*batch), base)        # B starts at zero
        assert all(p.requires_grad == ("lora" in name) for name, p in m.named_parameters())
        tuned = shake_lora(m)(*batch)
        with lora_disabled(m):
            assert torch.equal(m(*batch), base)
        assert torch.equal(m(*batch), tuned) and (tuned - base).abs().max() > 1e-3

# ---- the model ----
# VideoDiT is Wan 2.1's transformer, number for number and name for name; the toy is a small one of it.

def test_each_loss_works_after_copy_and_paste():
    own = {"kind": "t^2", "beta": 500.0, "d": tensor([0.5, 2.0])}
    for name, function in inspect.getmembers(losses, inspect.isfunction):
        needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        arguments = [own.get(key, torch.ones(2, 1)) for key in needed]
        scope = {"torch": torch, "F": torch.nn.functional}
        exec(inspect.getsource(function), scope)
        assert torch.equal(scope[name](*arguments), function(*arguments))

def test_imports_stay_light_so_that_a_loss_or_the_model_can_be_copied_out():
    heavy = {"transformers", "diffusers", "av", "PIL", "huggingface_hub"}
    code = f"import sys, model, losses, data, reward; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)

def test_the_code_stays_small():
    """Lines of code are those that are not blank, comment or docstring; whoever adds, removes."""
    budgets = dict(model=380, losses=56, data=1059, reward=417, sample=448, train_reward=242, train_align=382)
    in_all, tests, function, width = 2984, 2310, 62, 110
    found, over, files = {}, [], {name: (HERE / f"{name}.py").read_text() for name in (*budgets, "test_all")}
    for name, text in files.items():
        lines, docs = text.splitlines(), set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                docs |= set(range(node.body[0].lineno - 1, node.body[0].end_lineno))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= function:
                over.append(f"{name}.{node.name} has more than {function} lines")
        found[name] = sum(i not in docs and not re.match(r"\s*(#|$)", line) for i, line in enumerate(lines))
        over += [f"{name}.py has a line of {len(line)}" for line in lines if len(line) > width]
    assert not over, "\n".join(over)
    assert len(files["test_all"].splitlines()) <= tests and found.pop("test_all")
    assert all(found[name] <= budgets[name] for name in budgets) and sum(found.values()) <= in_all, found

def test_presets_have_the_published_sizes_and_official_names():
    for name, billions in (("wan-14b", 14.288), ("wan-2.2-5b", 5.000), ("wan-1.3b", 1.419)):
        with torch.device("meta"):
            shapes = {k: tuple(p.shape) for k, p in VideoDiT(PRESETS[name]).state_dict().items()}
        assert round(sum(map(math.prod, shapes.values())) / 1e9, 3) == billions
    D = 1536
    official = {"patch_embedding.weight": (D, 16, 1, 2, 2), "text_embedding.0.weight": (D, 4096),
                "time_embedding.2.bias": (D,), "time_projection.1.weight": (6 * D, D),
                "blocks.29.self_attn.norm_q.weight": (D,), "blocks.0.cross_attn.k.weight": (D, D),
                "blocks.0.norm3.weight": (D,), "blocks.0.ffn.0.weight": (8960, D),
                "blocks.0.modulation": (1, 6, D), "head.modulation": (1, 2, D), "head.head.weight": (64, D)}
    assert official.items() <= shapes.items() and len(shapes) == 30 * 27 + 15

def test_diffusers_wan_gives_the_same_output_and_reads_what_we_write(wan, tmp_path):
    m, official = VideoDiT.from_pretrained(wan).eval(), tmp_path / "official"
    official.mkdir()                                                            # Wan's own names and keys
    model_file.save_tensors(m.state_dict(), official / "diffusion_pytorch_model.safetensors")
    own = dict(_class_name="WanModel", model_type="t2v", out_dim=16, text_len=512)
    data.write_json(official / "config.json", vars(m.config) | own)
    toy, batches = random_model(), []
    for name, ours in (("ours", m), ("toy", toy)):
        ours.save_pretrained(tmp_path / name / "transformer")
    for grid, words in (((1, 4, 4), 512), ((3, 6, 10), 7), ((5, 2, 14), 512)):
        text = torch.randn(2, words, 24)
        text[:, 5:] = 0                                                        # padding, which attention sees
        batches.append((torch.randn(2, 16, *grid), torch.rand(2), text))
    theirs, back = diffusers_dit(wan), diffusers_dit(tmp_path / "ours")
    for batch in batches:
        assert_close(m(*batch), velocity_of(theirs, *batch))
        assert_close(velocity_of(back, *batch), m(*batch))
    assert_close(VideoDiT.from_pretrained(official).eval()(*batch), m(*batch))
    batch = random_batch()                                                      # patches of two frames
    assert_close(toy(*batch), velocity_of(diffusers_dit(tmp_path / "toy"), *batch))

def lora_metadata(folder, alpha, **changes):
    """The metadata of a LoRA file whose alpha stands in its header, or {} and the file beside it."""
    settings = LORA_SETTINGS | changes
    beside = settings if alpha == "adapter_config.json" else {"use_dora": True}         # read for peft alone
    data.write_json(folder / "adapter_config.json", beside)
    header = {f"transformer.{key}": value for key, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps(header)} if alpha == "header" else {}

@pytest.mark.parametrize("layout", LORA_LAYOUTS)
def test_lora_files_of_every_trainer_load_to_the_same_model_and_a_second_one_adds_up(layout, tmp_path):
    m, batch, tensors, file = shake_lora(add_lora(random_model(), 2, 4.0)), random_batch(), {}, tmp_path / "x"
    prefix, a, b, alpha = LORA_LAYOUTS[layout]
    for name, layer in m.named_modules():
        if isinstance(layer, model_file.LoRALinear):
            name = name.replace(".", "_") if layout == "kohya" else name
            name = prefix + (model_file.to_diffusers(name) if layout in ("diffusers", "peft") else name)
            tensors |= {f"{name}.{a}": layer.lora_A, f"{name}.{b}": layer.lora_B * (2 if alpha == "B" else 1)}
            tensors |= {f"{name}.alpha": tensor(4.0)} if alpha == "tensor" else {}
    model_file.save_tensors(tensors, file, lora_metadata(tmp_path, alpha))
    if layout == "ours":
        save_lora(m, file)
        assert_near(weights(file), tensors, 0)
        assert tensors.keys() == LORA_NAMES
    assert "transformer.blocks.0.attn1.to_out.0.lora_A.weight" in tensors or layout != "diffusers"
    base, once, again = random_model()(*batch), m(*batch), load_lora(random_model(), file)
    assert torch.allclose(again(*batch), once, atol=1e-5)
    assert (load_lora(again, file)(*batch) - once).norm() > 0.1 * (once - base).norm()

def test_a_lora_tensor_that_has_no_place_is_named(tmp_path):
    q, x = "diffusion_model.blocks.0.self_attn.q", torch.ones(2, 48)
    pair = {f"{q}.lora_A.weight": x, f"{q}.lora_B.weight": x.T}
    for tensors, says in (
            *((pair | {f"diffusion_model.blocks.{name}": x}, f"blocks.{name} has no place") for name in (
                "0.self_attn.q.dora_scale", "0.self_attn.q.alpha", "0.self_attn.k.lokr_w1",
                "0.self_attn.k.hada_w1_a", "0.ffn.0.diff_b", "9.self_attn.q.lora_A.weight")),
            (pair | {q.replace("q", "k") + ".lora_A.weight": x}, "blocks.0.self_attn.k is no pair"),
            (pair | {f"{q}.lora_A.weight": torch.ones(2, 49)}, r"is no pair of this model: A \[2, 49\]"),
            (pair | {f"{q}.lora_down.weight": x}, "lora_(A|down).weight has no place"),  # A for a second time
            ({}, "no adapters"), (pair | {f"{q}.lora_A.weight": x / 0}, "lora_A.weight .* not finite")):
        model_file.save_tensors({name: y.clone() for name, y in tensors.items()}, tmp_path / "x")
        with refusing(says):
            load_lora(random_model(), tmp_path / "x")

@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_a_strength_that_is_not_one_alpha_over_rank_is_refused_by_name(layout, tmp_path):
    prefix, a, b, alpha = LORA_LAYOUTS[layout]
    q, x = f"{prefix}blocks.0.attn1.to_q", torch.ones(2, 48)
    pair = {f"{q}.{a}": x, f"{q}.{b}": x.T}
    for name, value in (("use_rslora", True), ("use_dora", True), ("rank_pattern", {"to_k": 2}),
                        ("alpha_pattern", {"to_k": 2}), ("lora_alpha", None)):
        model_file.save_tensors(pair, tmp_path / "x", lora_metadata(tmp_path, alpha, **{name: value}))
        with refusing(f"{'x' if alpha == 'header' else alpha}: .*{name}"):
            load_lora(random_model(), tmp_path / "x")
    (tmp_path / "adapter_config.json").unlink()
    model_file.save_tensors(pair, tmp_path / "x")
    with contextlib.nullcontext() if layout == "diffusers" else refusing("adapter_config.json"):
        load_lora(random_model(), tmp_path / "x")                               # diffusers: alpha is the rank

def test_the_index_says_which_shards_are_the_weights(tmp_path):
    name, m, other = "diffusion_pytorch_model", random_model(), VideoDiT(TINY)
    other.save_pretrained(tmp_path)
    m.save_pretrained(tmp_path / "m")
    tensors = weights(tmp_path / f"m/{name}.safetensors")
    shards = {key: f"{name}-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for shard in set(shards.values()):
        model_file.save_tensors({k: x for k, x in tensors.items() if shards[k] == shard}, tmp_path / shard)
    assert_near(VideoDiT.from_pretrained(tmp_path).state_dict(), other.state_dict(), 0)
    data.write_json(tmp_path / f"{name}.safetensors.index.json", {"weight_map": shards})
    assert_near(VideoDiT.from_pretrained(tmp_path).state_dict(), m.state_dict(), 0)
    (tmp_path / shard).unlink()
    with refusing(shard):
        VideoDiT.from_pretrained(tmp_path)
    data.write_json(tmp_path / f"{name}.safetensors.index.json", {"weight_map": [shard]})
    with refusing("index.json holds no weight_map"):
        VideoDiT.from_pretrained(tmp_path)

def test_weights_and_videos_that_are_not_finite_end_the_run_by_their_names(tmp_path):
    m = random_model()
    m.blocks[1].self_attn.v.weight.data[0, 0] = NAN
    m.save_pretrained(tmp_path)
    with refusing("diffusion_pytorch_model.safetensors: blocks.1.attn1.to_v.weight .* not finite"):
        VideoDiT.from_pretrained(tmp_path)
    with refusing(f"the video of '{PROMPTS[0]}' is not finite"):
        sample.toy_videos(m, PROMPTS[:1], 0, steps=1)

def test_decoupled_gives_the_same_gradient_in_half_of_the_memory():
    m = shake_lora(add_lora(random_model(replace(TINY, num_layers=3)), 2, 4.0))
    x0, eps, t = torch.randn(1, 2, 3, 8, 24, 24), torch.randn(1, 3, 8, 24, 24), torch.tensor([0.4])
    batch, ref = (m, x0, torch.randn(1, 8, 32), t, eps), torch.tensor([1.0])

    def backward(pairs):
        m.zero_grad()
        for err_w, err_l in pairs():
            flow_dpo(err_w, err_l, ref, 1.01 * ref, 100.0).sum().backward()
        return [p.grad.clone() for p in m.parameters() if p.requires_grad]
    a, most = kept_for_backward(m, lambda: backward(lambda: [train_align.velocity_errors(*batch).unbind(1)]))
    b, half = kept_for_backward(m, lambda: backward(lambda: train_align.error_pairs(*batch)))
    largest = max(x.norm() for x in a)
    assert all((x - y).norm() < 1e-6 * largest for x, y in zip(a, b)) and half <= 0.55 * most

def test_checkpointing_keeps_of_a_block_its_input_and_what_self_attention_gives():
    batch, kept = (torch.randn(2, 3, 8, 24, 24), torch.rand(2), torch.randn(2, 8, 32)), []
    for layers in (2, 3):
        m = add_lora(random_model(replace(TINY, num_layers=layers)), 2, 4.0)
        for block in m.blocks:
            block.checkpointing = True
        m(*batch)                                                               # fills the cache of angles
        with torch.profiler.profile(profile_memory=True) as profile:
            v = m(*batch)                                                       # holds what was kept
        kept.append(sum(event.self_cpu_memory_usage for event in profile.key_averages()))
        del v
    x = 4 * 2 * 4 * 6 * 6 * TINY.dim                                            # bytes of all tokens
    assert 2 * x < kept[1] - kept[0] < 2.3 * x

def test_compiled_blocks_stay_compiled_for_all_sizes_with_and_without_gradients_and_adapters(monkeypatch):
    compile, counters = torch.nn.Module.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **how: compile(m, backend="eager", **how))
    m = shake_lora(add_lora(random_model(), 2, 4.0))
    plain, m.blocks[0].checkpointing, m.blocks[1].checkpointing = copy.deepcopy(m), True, True
    with torch._dynamo.config.patch(recompile_limit=4):                       # half of torch's, to save time
        m.compile_blocks()
        counters.clear()
        for b in (1, 2):
            batch = torch.randn(b, 3, 2, 8, 8), torch.rand(b), torch.randn(b, 8, 32)
            with torch.no_grad():
                with lora_disabled(m):
                    m(*batch)
                m(*batch)
            for each in (m, plain):
                each(*batch).square().mean().backward()
    torch._dynamo.reset()
    assert counters["frames"]["total"] == counters["frames"]["ok"] > 4
    assert all(p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-7)
               for p, q in zip(m.parameters(), plain.parameters()))

# ---- sampling ----
# A sample is a function of the seed and its number; guidance, win rates and tables are plain arithmetic.

def test_timesteps_are_even_then_shifted_as_in_official_wan_from_exactly_1_to_exactly_0():
    assert timesteps(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert torch.allclose(timesteps(4, shift=3.0), tensor([1, 0.9, 0.75, 0.5, 0]))
    for shift in range(102, 2001):
        ts = timesteps(7, shift / 100)
        assert ts[0] == 1 and ts[-1] == 0 and (ts.diff() < 0).all()

def test_the_start_of_an_alignment_is_drawn_once_and_kept_by_its_inputs(runs, tmp_path, monkeypatch):
    drawn, own = [], train_align.toy_videos
    monkeypatch.setattr(train_align, "toy_videos", lambda *args: drawn.append(1) or own(*args))
    for i, (changes, n) in enumerate((({}, 2), (dict(loss="sft"), 1), (dict(seed=1), 2),
                                      (dict(dtype="bf16"), 2), (dict(model=f"{tmp_path}/0"), 2))):
        align(runs, tmp_path / f"{i}", **SHORT | changes | dict(cache=f"{tmp_path}/cache"))
        assert len(drawn) == n, changes
        drawn.clear()

def test_the_anchor_holds_the_winner_near_the_reference(runs, tmp_path):
    for anchor in (0, 5):
        align(runs, tmp_path / f"{anchor}", **SHORT | dict(batch=4, steps=10, anchor=float(anchor)))
    free, held = (data.read_log(tmp_path / name)[-1]["gap_w"] for name in "05")
    assert held < free

def test_a_win_rate_drops_exact_ties():
    assert sample.win_rate(tensor([1.0, 2.0, 3.0, 0.0]), tensor([0.0, 2.0, 0.0, 1.0])) == 2 / 3
    assert sample.win_rate(torch.ones(3), torch.ones(3)) == 0.5

def test_flawless_videos_close_the_whole_gap_and_the_start_none_of_it():
    prompts = PROMPTS[::2]
    flawed, clean = data.render_as(torch.arange(36) % 12, prompts, rng(0)).float(), clean_videos(prompts)
    half = torch.cat([clean[:18], flawed[18:]])
    whole, none, part = (sample.evaluate(videos, flawed, prompts) for videos in (clean, flawed, half))
    assert all(x == pytest.approx(1, abs=0.03) for x in whole["gap_closed"].values())
    assert set(none["gap_closed"].values()) == {0.0}
    start, now, end = (part[name]["TA"] for name in ("oracle_start", "oracle", "oracle_clean"))
    assert part["gap_closed"]["TA"] == pytest.approx((now - start) / (end - start), abs=1e-3)
    assert whole["oracle"]["TA"] == pytest.approx(end, abs=0.01)
    assert part["gap_closed_best"] == part["gap_closed"]                        # start is at its best
    best = sample.evaluate(half, flawed, prompts, best=half)
    assert set(best["gap_closed_best"].values()) == {0.0} and best["gap_closed"] == part["gap_closed"]

def test_the_start_is_also_drawn_at_its_best_guidance_from_the_same_noise(runs, tmp_path):
    here, there = (sample.main(job("win rates", runs, tmp_path / f"{cfg}", cfg=cfg)[1]) for cfg in (4.5, 2.5))
    assert here["gap_closed_best"] == here["gap_closed"] and there["gap_closed_best"] != there["gap_closed"]
    end, begin, goal = (x["VQ"] for x in (there["oracle"], here["oracle_start"], there["oracle_clean"]))
    assert there["gap_closed_best"]["VQ"] == pytest.approx((end - begin) / (goal - begin), abs=1e-2)

def write_run(folder, result, **args):
    """A finished run's folder with these results and arguments."""
    folder.mkdir(parents=True)
    data.write_json(folder / "config.json", {"args": args | {"out": str(folder)}})
    result = {"win_rate": (0.5,) * 4, "n": 4} | result
    data.write_json(folder / "eval.json", {
        key: dict(zip((*DIMS, "Overall"), x)) if isinstance(x, tuple) else x for key, x in result.items()})
    return folder

def rows_of_table(capsys, *folders):
    """The cells of the rows that --compare prints of these runs, without the table's head."""
    capsys.readouterr()
    sample.main(sample.Args(compare=list(map(str, folders))))
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[0] == "|"][2:]

def test_a_table_has_each_measure_with_means_and_spreads(tmp_path, capsys):
    closed, far = ((1, .03, .3, -.2), (0, .01, .5, -.1)), (0.25, 0.5)
    runs = [write_run(tmp_path / f"{seed}", dict(gap_closed=closed[seed], distance=far[seed]), seed=seed)
            for seed in (0, 1)]
    where = [str(runs[0]), "4.5"]
    assert rows_of_table(capsys, *runs) == [
        ["wins, %", "oracle", *where, *["50.0 ± 0.0"] * 4, "2 x 4"],
        ["gap closed, %", "oracle", *where, "-15 ± 7", "50 ± 71", "2 ± 1", "40 ± 14", "2 x 4"],
        ["distance", "", *where, "0.3750 ± 0.1768", "", "", "", "2 x 4"]]

def test_runs_are_one_row_if_seeds_alone_tell_them_apart_however_far_back(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / f"{seed}/dpo", {}, seed=seed, lr=1.0)
        write_run(tmp_path / f"{seed}/sft", {}, seed=seed, lr=2.0)
        write_run(tmp_path / f"{seed}/own", {}, seed=seed, lr=1.0, pairs=f"{tmp_path}/{seed}/dpo/pairs.csv")
        (tmp_path / f"{seed}/dpo/pairs.csv").touch()
    write_run(tmp_path / "again", {}, seed=0, lr=1.0)                           # by other code
    for i, (seed, place) in enumerate(((0, "0/dpo"), (1, "1/dpo"), (0, "0/sft"))):
        write_run(tmp_path / f"drawn{i}", {}, seed=seed, cfg=1.0, ckpt=[f"{tmp_path}/{place}"])
    write_run(tmp_path / "more", {"n": 8}, seed=1, cfg=1.0, ckpt=[f"{tmp_path}/1/dpo"])
    for names, count in (("0/dpo 1/dpo", ["2 x 4"]), ("drawn0 drawn1", ["2 x 4"]), ("0/own 1/own", ["2 x 4"]),
                         ("again again", ["1 x 4"]), ("0/dpo again", ["1 x 4"] * 2),
                         ("0/dpo 0/sft", ["1 x 4"] * 2), ("drawn0 drawn2", ["1 x 4"] * 2),
                         ("drawn0 more", ["1 x 4", "1 x 8"])):
        rows = rows_of_table(capsys, *(tmp_path / name for name in names.split()))
        assert [row[-1] for row in rows] == count, names

def test_validation_runs_choose_the_guidance_at_which_held_out_ones_are_shown(tmp_path, capsys):
    def run(cfg, split, seed, closed):
        result = {"gap_closed_best": (0, 0, 0, closed)}
        own = dict(cfg=cfg, split=split, seed=seed, eval=64 if split == "val" else 128)
        return write_run(tmp_path / f"{cfg}{split}{seed}", result, **own)
    scores = {1.5: (.1, .9), 2.5: (.6, .7), 4.5: (.3, .3)}
    val = [run(cfg, "val", seed, x) for cfg, seeds in scores.items() for seed, x in enumerate(seeds)]
    held_out = [run(cfg, "eval", seed, .2) for cfg in scores for seed in (0, 1)]
    shown = [row[2:4] + row[-1:] for row in rows_of_table(capsys, *val, *held_out)]
    assert shown == [[str(held_out[2]), "2.5", "2 x 4"]] * 2                    # wins, and the gap from 4.5
    assert {row[3] for row in rows_of_table(capsys, *held_out)} == {"1.5", "2.5", "4.5"}
    assert {row[3] for row in rows_of_table(capsys, *val)} == {"1.5", "2.5", "4.5"}

def test_a_hacked_reward_is_named_and_a_good_run_is_not():
    video, look = clean_videos(PROMPTS[::4]), sample.pixel_statistics
    grey, still = video.mean(1, keepdim=True).expand_as(video), video[:, :, :1].expand_as(video)
    assert look(video).keys() == {"motion", "saturation", "brightness"}
    for now, wins, reward_wins, says in (
            (video, 0.8, 0.9, "^$"), (grey, 0.8, 0.4, "^$"),
            (video, 0.3, 0.9, "the oracle prefers them in 30% only"),
            (grey, 0.8, 0.9, r"in 90%, but saturation fell from 0\.\d+ to 0.000$"),
            (still, 0.8, 0.9, r"but motion fell from 0\.\d+ to 0.000$")):
        rates = {"win_rate": {"Overall": wins}, "win_rate_reward": {"Overall": reward_wins}}
        said = sample.hacking(rates | {"pixels": look(now), "pixels_start": look(video)})
        assert re.search(says, said or "")

def test_runs_are_drawn_side_by_side_or_over_a_number_and_rewards_beside_a_ceiling(runs, capsys):
    results = {x: sample.main(job("win rates", runs, runs / f"scale{x:g}", rg_scale=x)[1])
               for x in (1.0, 30.0)}
    args = sample.Args(compare=[f"{runs}/scale1", f"{runs}/scale30"])
    sample.main(args)
    assert "| wins, % | oracle |" in capsys.readouterr().out and (runs / "compare.webp").exists()
    args = replace(args, x="rg_scale", by=["steps"], y=["win_rate/VQ", "oracle/VQ"], out=f"{runs}/drawn.png")
    assert sample.main(args) == {(y, "steps 2"): {x: [result[y.split("/")[0]]["VQ"]]
                                                  for x, result in results.items()} for y in args.y}
    lines = sample.main(replace(args, compare=[f"{runs}/base"], x="step", by=[], y=["loss"]))
    assert lines == {("loss", ""): {e["step"]: [e["loss"]] for e in data.read_log(runs / "base")}}
    sample.main(sample.Args(compare=[f"{runs}/reward", f"{runs}/noisy"]))
    assert re.search(r"ceiling.*\n\| \S*/reward \|.*\n\| \S*/noisy \|", capsys.readouterr().out)

ODD = ("/", "..", " . ", "\u3000", "\\", "C:\\", "\n", "\u2028", '? "<*>" |', "\x00", "\x85", "é.", "x" * 400)

def test_every_name_that_is_written_reads_back_and_is_allowed_everywhere(runs, tmp_path):
    odd = [" ".join((x, "a", x, PROMPTS[0], x)) for x in ODD]
    odd += [PROMPTS[0], PROMPTS[0].upper(), f"{PROMPTS[0]} .", f"/ {PROMPTS[0]}"]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in odd))
    sample.main(sample.Args(model=f"{runs}/base", prompts=f"{tmp_path}/odd.jsonl", n_per_prompt=2, steps=1,
                            cfg=1.0, reward="oracle", out=f"{tmp_path}/out"))
    pairs = data.read_pairs(tmp_path / "out/pairs.csv")                         # or it says what is not there
    names = {path.name for pair in pairs.videos for path in pair}
    assert names == {file.name for file in (tmp_path / "out").glob("*.mp4")} and len(pairs) == len(odd)
    assert len({name.lower() for name in names}) == 2 * len(odd)                # no case tells two apart
    assert {f"{PROMPTS[0]}-0.mp4", f"{PROMPTS[0]} .-0.mp4"} <= names            # as VBench has them
    assert not any(re.search(r'[<>:"/\\|?*\x00-\x1f]|^[ .]', name) for name in names)

def test_killed_sampling_goes_on_to_the_same_files_and_keeps_what_is_there(runs, tmp_path, monkeypatch):
    args = sample.Args(model=f"{runs}/base", prompt=PROMPTS[:3], n_per_prompt=2, steps=1, cfg=1.0, batch=3,
                       reward=f"{runs}/reward", out=f"{tmp_path}/run", resume=True)
    sample.main(replace(args, out=f"{tmp_path}/whole"))
    own, written, log = sample.write_video, [], tmp_path / "run/scores.jsonl"

    def until_the_fifth(file, *rest):
        if len(written) == 4:
            raise Killed
        written.append(file.stem)
        own(file, *rest)
    monkeypatch.setattr(sample, "write_video", until_the_fifth)
    with pytest.raises(Killed):
        sample.main(args)
    log.write_text(log.read_text()[:-20])                                       # the last line is cut short
    written.clear()
    sample.main(args)
    assert written == ["003", "004", "005"]                                     # whole batches
    for name in (*(f"00{i}.mp4" for i in range(6)), "pairs.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()

# ---- the world ----
# Shapes world knows the truth: a score falls with its own flaw alone, and nothing but a good video scores.

OWN = dict(VQ=("blur", "wash"), MQ=("jitter", "stutter", "teleport"), TA=("colour", "shape", "direction"))

@pytest.mark.parametrize("dim", DIMS)
def test_an_oracle_score_falls_with_its_own_defects_and_hardly_moves_with_the_others(dim):
    prompts, k = PROMPTS[::2], DIMS.index(dim)
    for defect in OWN[dim]:
        defects = torch.zeros(5, len(prompts), len(DEFECTS))
        defects[..., DEFECTS.index(defect)] = torch.linspace(0, 1, 5)[:, None]
        videos = (render(attributes(prompts), strength, rng(1)).float() for strength in defects)
        table = torch.stack([oracle(video, prompts).mean(0) for video in videos])  # (strength, dimension)
        assert (table[0] > 0.96).all() and (table[:, k].diff() < -0.02).all() and table[-1, k] < 0.7, table
        assert (table - table[0])[:, [j for j in range(3) if j != k]].abs().max() < 0.08, table

def test_the_oracle_is_not_fooled_off_the_manifold():
    prompts = PROMPTS[:48:2]
    clean = clean_videos(prompts)
    empty, flicker = torch.full_like(clean, 2 * GROUND - 1), clean.clone()
    flicker[:, :, ::2] = 2 * GROUND - 1

    def mean(video):
        return dict(zip(DIMS, oracle(video, prompts).mean(0).tolist()))
    for video in (empty, torch.rand(clean.shape, generator=rng(0)) * 2 - 1, torch.ones_like(clean)):
        assert max(mean(video).values()) < 0.05
    assert mean(clean[:, :, :1].expand_as(clean))["MQ"] < 0.01                  # it stands still
    assert mean(flicker)["MQ"] < 0.01 and mean(flicker)["VQ"] < 0.6
    assert mean(clean.flip(2))["TA"] < 0.7  # backwards: one of three is wrong
    assert oracle(clean * 5, prompts).isfinite().all()

def test_annotators_tie_as_often_as_people_and_mostly_agree_with_the_oracle():
    pairs = data.toy_pairs(200, "train", seed=0)
    score = data.true_scores(pairs)
    d = -data.with_overall(normalised(score)).diff(dim=1)[:, 0]                      # of A over B
    assert all(0.4 <= x <= 0.6 for x in (pairs.label == 0).float().mean(0).tolist())
    assert pairs.mos.unique().tolist() == [1, 2, 3, 4, 5]
    for noise, least, most, off in ((0.1, 0.94, 1, 0.3), (1.0, 0.75, 0.94, 1), (10.0, 0.5, 0.75, 2)):
        label, mos = data.annotate(*score.unbind(1), rng(0), noise), data.likert(score, rng(0), noise)
        assert least < reward.accuracy_without_ties(label[:, 1], d[:, 1]) < most
        assert off / 3 < (mos - (1 + 4 * score)).abs().mean() < off

def test_pairs_noise_and_order_are_functions_of_seed_step_and_sample_and_no_noise_comes_twice():
    a, b, blurred = (data.toy_pairs(24, "train", seed=0, noise=noise) for noise in (1.0, 1.0, 10.0))
    assert torch.equal(a.videos, b.videos) and torch.equal(a.label, b.label) and torch.equal(a.mos, b.mos)
    assert torch.equal(a.videos, blurred.videos) and not torch.equal(a.mos, blurred.mos)
    t, eps = data.draw_noise((3, 2), 0, 5, [7, 8, 9])
    t2, eps2 = data.draw_noise((3, 2), 0, 5, [9])
    assert t[2] == t2[0] and torch.equal(eps[2], eps2[0]) and not torch.equal(eps[1], eps[2])
    epochs = torch.cat([data.step_rows(10, 4, 0, step) for step in range(5)]).view(2, 10)
    assert epochs.sort().values.tolist() == [list(range(10))] * 2
    (_, samples), = data.micro_batches(tensor([3, 5, 3, 3]), 1)             # a row that comes again in a step
    t, eps = data.draw_noise((4,), 0, 1, samples)
    assert samples == [3, 5, (3, 1), (3, 2)] and t.unique().numel() == 4
    assert torch.equal(eps[0], data.draw_noise((4,), 0, 1, [3])[1][0])

def test_the_shipped_weights_are_small_of_this_world_and_good():
    files = sorted((HERE / "assets").rglob("*.safetensors"))
    assert len(files) == 3 and sum(f.stat().st_size for f in files) < 8e6
    assert all(read_tensors(f)[1]["world"] == data.world_hash() for f in files)
    prompts = data.prompts_of("eval", 5)
    videos = sample.toy_videos(sample.load_model("assets/base"), prompts, 0, steps=12)
    share = oracle(videos, prompts).mean(0) / oracle(*data.flawed_videos(40, None, rng(0))).mean(0)
    assert (share > 0.7).all(), share                                           # five leave room for chance
    pairs = data.toy_pairs(60, "eval", seed=1)
    d = -reward.load_reward("assets/reward").score_pairs(data.Shapes(), pairs, None).diff(dim=1)[:, 0]
    assert all(reward.accuracy_without_ties(pairs.label[:, k], d[:, k]) > 0.65 for k in range(3))

# ---- pairs ----
# Preferences come from files in the layouts that people have, from annotators, or from a model's own videos.

def test_pairs_are_read_in_the_layouts_that_are_documented_and_with_the_slashes_of_both_systems(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/a:b").touch()
    authors = read_pairs(tmp_path, "path_A,path_B,prompt,VQ,MQ,TA,MOS_A_VQ,MOS_B_VQ",
                         'a,v/a:b,"a cat, asleep",A,same,invalid,4,2.5', "b,v\\a:b,a dog,B,,A,,")
    assert authors.prompts == ["a cat, asleep", "a dog"] and authors.lines == [2, 3]
    assert authors.videos.tolist() == [[tmp_path / x, tmp_path / "v/a:b"] for x in "ab"]
    assert authors.label.nan_to_num(9).tolist() == [[1, 0, 9, 9], [-1, 9, 1, 9]]
    assert authors.mos[0, :, 0].tolist() == [4, 2.5] and authors.mos.isnan().sum() == 10
    votes = [f"p,x,a,y,b,{vote}" for vote in ("leftvote", "rightvote", "tievote", "bothbad_vote")]
    genai = read_pairs(tmp_path, "prompt,left_model,left_video,right_model,right_video,vote_type", *votes)
    assert genai.label[:, 3].tolist() == [1, -1, 0, 0] and genai.label[:, :3].isnan().all()
    row = '{"prompt": "p", "chosen": "b", "rejected": "a"}'
    for lines, places in (([f"[{row}, {row}]"], [1, 2]), ([row, "", row], [1, 3])):
        assert read_pairs(tmp_path, *lines).lines == places
    assert read_pairs(tmp_path, JSON_ROW.replace('"A"', "NaN").replace(".mp4", "")).label.isnan().all()
    with refusing("wanted are prompt, chosen, rejected"):                       # others are not guessed at
        read_pairs(tmp_path, "prompt,video1_path,video2_path,standard_answer", "p,a,b,video1")

@pytest.mark.parametrize("name, text", [*enumerate([                           # all hold the same two prompts
    '["[a] b, c", "{d} e"]', '{"prompt": "[a] b, c"}\n{"prompt": "{d} e"}\n',
    '\ufeffprompt\n"[a] b, c"\n\n{d} e\n',
    "prompt;n\n[a] b, c;1\n{d} e;2\n", "n\tprompt\n1\t[a] b, c\n2\t{d} e\n",
    f'prompt,n\n"[a] b, c",{"x" * 150_000}\n{{d}} e,1\n', "[a] b, c\n\n {d} e\n"])], ids=str)
def test_the_format_of_a_table_is_in_its_content(name, text, tmp_path):
    (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8")
    file = (tmp_path / f"{name}.csv").rename(tmp_path / "6.txt") if name == 6 else tmp_path / f"{name}.csv"
    assert [row["prompt"].strip() for _, row in data.read_table(file)] == ["[a] b, c", "{d} e"]

def test_the_pair_report_counts_labels_ties_and_repeats(tmp_path, capsys):
    rows = ["a,b,x,A,A", "b,a,x,B,B", "c,d,x,A,B", "d,c,x,A,same", "c,d,x,A,same", "a,b,y,same,", "a,d,z,,B"]
    data.report_pairs(read_pairs(tmp_path, "path_A,path_B,prompt,VQ,TA", *rows), ["y", "z", "w"])
    assert capsys.readouterr().out.splitlines() == [
        "7 pairs of 4 videos and 3 prompts, 2 of which are evaluated on too", "2 pairs occur more than once",
        "VQ: 86% labelled; A 67%, B 17%, ties 17%", "TA: 86% labelled; A 17%, B 50%, ties 33%"]
    data.report_pairs(data.toy_pairs(4, "train", 0).subset([*range(4), 3]), data.prompts_of("eval"))
    assert re.match("5 pairs of 8 videos .* prompts, 0 of .*\n1 pairs occur more", capsys.readouterr().out)

def test_pairs_of_a_video_with_its_copy_are_told_and_left_out(tmp_path, capsys):
    (tmp_path / "copy").write_text("b")
    pairs = read_pairs(tmp_path, "path_A,path_B,prompt,VQ", "a,long,p,A", "a,a,p,A", "b,copy,p,A", "c,d,p,A",
                       long="1234")
    assert data.without_twins(pairs).lines == [2, 5]
    assert capsys.readouterr().out == "left out 2 pairs of a video with itself or its copy, such as row 3\n"
    with refusing("no pair is left"):
        data.without_twins(pairs.subset([1, 2]))

def test_labels_decide_by_their_sign_and_ties_are_dropped():
    pairs, args = data.toy_pairs(60, "train", 0), train_align.Args(labels="human", dim_w=(0.0, 1.0, 0.0))
    ordered, rows, r = train_align.label_pairs(args, data.Shapes(), pairs, "cpu")
    assert r is None and torch.equal(rows, (pairs.label[:, 1] != 0).nonzero()[:, 0])
    b_wins = (pairs.label[rows, 1] < 0).long()
    for place in (0, 1):
        assert torch.equal(ordered.videos[rows, place], pairs.videos[rows, b_wins ^ place])
    _, rows, r = train_align.label_pairs(replace(args, labels="oracle"), data.Shapes(), pairs, "cpu")
    assert len(rows) == 60 and (r[:, 0] >= r[:, 1]).all()
    args = replace(args, labels="oracle", best=0.1)
    _, best, again = train_align.label_pairs(args, data.Shapes(), pairs, "cpu")
    assert torch.equal(r, again) and sorted(r[best, 0]) == sorted(r[:, 0])[-6:] and (best.diff() > 0).all()
    flawless, rows, _ = train_align.label_pairs(replace(args, labels="flawless"), data.Shapes(), pairs, "cpu")
    assert oracle(data.to_float(flawless.videos[:, 0]), pairs.prompts).mean() > 0.96 and len(rows) == 60

def test_on_policy_pairs_are_the_best_and_the_worst_of_what_a_model_drew_and_align_it(runs, tmp_path):
    drawn, out = data.prompts_of("train")[:4], tmp_path / "own"
    sample.main(sample.Args(ckpt=[f"{runs}/base"], prompt=drawn, n_per_prompt=2, steps=2, cfg=1.0,
                            reward="oracle", out=str(out)))
    args = align_args(runs, tmp_path / "run", **SHORT | dict(pairs=f"{out}/pairs.csv", n_pairs=None))
    world = data.world_of(args.model)
    pairs = world.encode(world.read(args), args)
    assert pairs.prompts == drawn and (pairs.label[:, 3] == 1).all()
    prompts = [prompt for prompt in drawn for _ in range(2)]
    own = sample.toy_videos(sample.load_model(runs / "base"), prompts, 0, 2, cfg_scale=1.0)
    r = data.overall(normalised(oracle(own, prompts))).view(4, 2)
    own = data.to_uint8(own).view(4, 2, *own.shape[1:]).float()
    for place, i in ((0, r.argmax(1)), (1, r.argmin(1))):                       # mp4 moves levels a little
        assert (pairs.videos[:, place] - own[torch.arange(4), i]).abs().mean() < 6
    train_align.main(args)
    assert read(tmp_path / "run/config.json")["args"]["labels"] == "human"      # the file's own decide
    files, r = [tmp_path / f"{name}.mp4" for name in "abcdef"], tensor([1, 3, 2, 6, 5, 4])
    sample.write_pairs(tmp_path / "best.csv", files, ["x"] * 3 + ["y"] * 3, r, 3)
    assert (tmp_path / "best.csv").read_text().split()[1:] == ["x,b.mp4,a.mp4", "y,d.mp4,f.mp4"]

def test_videos_survive_their_file(tmp_path):
    video, file = clean_videos(PROMPTS[:1])[0], tmp_path / "a.mp4"
    video = video.repeat_interleave(8, 2).repeat_interleave(8, 3)
    data.write_video(file, video, fps=8)
    frames, fps = data.read_video(file)
    assert frames.shape == (8, 192, 192, 3) and frames.dtype == np.uint8 and fps == 8
    assert np.abs(frames - data.to_uint8(video).permute(1, 2, 3, 0).numpy().astype(float)).mean() < 2
    assert np.array_equal(data.read_video(file, [1, 6])[0], frames[[1, 6]])
    with refusing("a.mp4 is cut short or damaged: 8 of 8 frames"):
        data.read_video(file, [99])

def damaged(path, packets):
    """The bytes of a video with zeros for these packets of its pictures, a slice: it opens, then breaks."""
    import av
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = sorted((packet.pos, packet.size) for packet in container.demux(video=0) if packet.size)
    for place, size in places[packets]:
        content[place:place + size] = bytes(size)
    return bytes(content)

def test_videos_that_cannot_be_used_are_named_with_how_much_of_them_can_be_decoded(tmp_path):
    write_clips(tmp_path, ["whole.mp4"], frames=20)
    write_clips(tmp_path, ["enormous.mp4"], frames=1, size=(16, 8208))
    for name, content in (("cut", (tmp_path / "whole.mp4").read_bytes()[:900]), ("text", b"not a video"),
                          ("late", damaged(tmp_path / "whole.mp4", slice(12, None)))):
        (tmp_path / f"{name}.mp4").write_bytes(content)
    unread, some = "cannot be read as a video", r"is cut short or damaged: \d+ of 20 frames can be decoded"
    for look, name, says in ((data.video_info, "cut", unread), (data.read_video, "text", unread),
                             (data.video_info, "gone", unread), (data.read_video, "late", some),
                             (reward.check_video, "late", some),
                             (data.video_info, "enormous", "is 8208 x 16: more than 8192")):
        with refusing(f"{name}.mp4 {says}"):
            look(tmp_path / f"{name}.mp4")

def test_a_video_is_read_as_players_show_it_and_a_clip_is_a_stretch_of_its_time(tmp_path):
    grey = np.stack([np.full((32, 48, 3), 20 * k, np.uint8) for k in range(12)])
    grey[:, :, 24:] += 30                                                       # darker on the left
    plain, wide, cover, turned, uneven, web = (tmp_path / name for name in (
        "plain.mp4", "wide.mp4", "cover.mkv", "turned.mp4", "uneven.mp4", "browser.webm"))
    film(plain, grey)
    film(wide, grey, aspect=2)
    film(cover, grey, cover=True)
    film(uneven, grey, ms=[0, 100, 200, 300, 320, 340, 360, 380, 400, 700, 800, 900])
    film(web, grey, ms=range(0, 6000, 500), rate=1000)                      # six seconds, says 1,000 a second
    content = bytearray(plain.read_bytes())                                     # as phones do, with a matrix
    place = content.index(b"tkhd") + 44
    content[place:place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    turned.write_bytes(content)
    frames = data.read_video(plain)[0]
    assert np.array_equal(data.read_video(turned)[0], np.rot90(frames, -1, axes=(1, 2)))    # clockwise
    assert np.array_equal(data.read_video(cover)[0], frames)
    assert data.read_video(wide, [3])[0].shape == (1, 32, 96, 3)
    assert [data.video_info(x) for x in (turned, wide)] == [(12, 25.0, 48, 32), (12, 25.0, 32, 96)]
    assert data.clip_frames(uneven, 9).tolist() == [0, 0, 1, 1, 2, 3, 6, 8, 8]  # at k / 16 s
    assert data.video_info(web)[1] == pytest.approx(2)
    for name, frames, fps in (("whole.txt", 12, 24), ("slow.mp4", 4, 8)):       # half a second each
        write_clips(tmp_path, [name], frames=frames, fps=fps)
        assert data.read_clip(tmp_path / name, 5, (16, 16)).shape == (3, 5, 16, 16)

@pytest.mark.parametrize("loss", ["eval", "btt", "dpo"])
def test_a_bad_video_is_left_out_on_request_whatever_reads_it(loss, qwen, wan, tmp_path, capsys):
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(qwen[0] / name, tmp_path)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:900])
    (tmp_path / "late.mp4").write_bytes(damaged(tmp_path / "a.mp4", slice(1, None)))
    write_clips(tmp_path, ["short.mp4"], frames=1)
    pairs = "a,b b,a a,b a,gone cut,b a,late".split() + ["short,b"] * (loss == "dpo")
    rows = [pair.replace(",", ".mp4,") + f".mp4,prompt {pair[0]},A,B,A" for pair in pairs]
    (tmp_path / "p.csv").write_text("\n".join(["path_A,path_B,prompt,VQ,MQ,TA", *rows]))
    own = dict(pairs=f"{tmp_path}/p.csv", skip_bad=True, cache=f"{tmp_path}/cache")
    if loss == "dpo":
        args, world = wan_args(wan, "", **own, frames=9), data.Wan(wan)
        assert world.encode(world.read(args), args).lines == [2, 3, 4]
    else:
        of = qwen_args if loss == "btt" else eval_args
        train_reward.main(of(qwen, tmp_path / "run", **own, **dict(steps=1) if loss == "btt" else {}))
        assert loss == "btt" or len((tmp_path / "run/pairs.csv").read_text().splitlines()) == 4
    assert re.search("skipped . pairs with . bad videos", capsys.readouterr().out)

def test_a_short_clip_is_told_with_the_frames_that_fit_before_anything_loads(wan, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_part", lambda *_: pytest.fail("something was loaded"))
    with refusing(r"row 2: .* lasts 1.50 s, too short for 81 frames .*--frames 25 would fit.*--skip_bad"):
        train_align.main(wan_args(wan, "", frames=81, cache=f"{tmp_path}/c", out=f"{tmp_path}/run"))

# ---- rewards ----
# A reward is as good as its accuracy. The latent one grows from the base; the VLM is the released one.

def test_accuracies_are_the_exact_maximum_over_thresholds():
    assert reward.accuracy_with_ties(tensor([1.0, 1.0]), tensor([1.0, 2.0])) == 1.0         # "no ties" counts
    label, d = tensor([1.0, -1.0, 0.0, NAN]), tensor([0.0, -1.0, 5.0, 5.0])
    assert reward.accuracy_without_ties(label, d) == 0.5                        # d = 0 is wrong
    g = rng(0)
    for _ in range(50):
        label, d = (torch.randint(-n, n + 1, (12,), generator=g).float() for n in (1, 3))   # many equal |d|
        predicted = [torch.where(d.abs() <= e, 0, d.sign()) for e in range(-1, 4)]
        brute = max((p == label).float().mean().item() for p in predicted)
        assert abs(reward.accuracy_with_ties(label, d) - brute) < 1e-6

def test_a_latent_reward_starts_from_the_base_and_survives_its_file(tmp_path):
    base, batch = random_model(), random_batch()
    r = reward.LatentReward.from_base(base, depth=1).requires_grad_(False)
    assert torch.equal(r.dit(*batch, depth=1), base(*batch, depth=1))
    r.mean.fill_(0.5)
    r.std.fill_(2.0)
    assert torch.allclose(r.score(*batch), (r(*batch) - 0.5) / 2)
    r.half().float().save(tmp_path, data.Shapes().metadata)                     # the file is 16 bit
    assert torch.equal(reward.load_reward(tmp_path).score(*batch), r.score(*batch))

def test_loading_gives_the_scores_of_the_unmerged_model_in_every_layout(qwen, tmp_path):
    (root, truth), merged = qwen, released_reward(qwen)
    base, template = root / "base", released(qwen)[1]
    raw, rows = raw_scores(qwen, merged), merged.qwen.get_input_embeddings().num_embeddings
    assert raw.std() > 0.1 and rows == len(merged.tokenizer) == 503             # of 700 in the base
    mean, std = (tensor([CONSTANTS[f"{dim}_{name}"] for dim in DIMS]) for name in ("mean", "std"))
    assert torch.allclose(raw_scores(qwen, merged, normalise=True), (raw - mean) / std)
    unmerged = reward.VideoReward.from_base(base, template=template).trainable()
    unmerged.eval().load_state_dict(truth | {"rows": truth[reward.EMBEDDING][unmerged.token_ids]})
    assert torch.allclose(raw_scores(qwen, unmerged), raw, atol=1e-4)
    lora = {k: v for k, v in truth.items() if "lora_" in k or "embed_tokens" in k}
    rest = {k: v for k, v in truth.items() if "visual" in k or "rm_head" in k or "embed_tokens" in k}
    for layout in ("new", "adapter", "adapter_new"):
        step = shutil.copytree(root / "released", tmp_path / layout) / "checkpoint-30"
        (tmp_path / layout / "checkpoint-4").mkdir()                            # older, and of bad weights
        (tmp_path / layout / "checkpoint-4/model.pth").write_bytes(b"")
        (step / "model.pth").unlink()
        if layout == "new":
            torch.save(theirs(truth, layout), step / "model.pth")
        else:
            torch.save(theirs(rest, layout.replace("adapter", "")), step / "non_lora_state_dict.pth")
            model_file.save_tensors(theirs(lora, layout) | LM_HEAD, step / "adapter_model.safetensors")
        again = reward.VideoReward.from_pretrained(tmp_path / layout, base, template)
        assert torch.allclose(raw_scores(qwen, again), raw, atol=1e-5), layout

def test_a_checkpoint_that_asks_for_another_setting_is_refused_by_its_key(qwen, tmp_path):
    config, template = read(qwen[0] / "released/model_config.json"), qwen[0] / "prompt_template.py"
    for key, value in dict(reward_token="last", output_dim=3, sample_type="multi_pts", num_frames=8,
                           use_rslora=True, prompt_template_type="none").items():
        change = {"use_special_tokens": key != "reward_token", key: value}      # the last section wins
        data.write_json(tmp_path / "model_config.json", config | {"changed": change})
        with refusing(f"only {key} = .* is supported, not {value!r}"):
            reward.read_settings(tmp_path, template)

def test_a_base_is_read_by_its_index_and_no_tensor_is_left_over_or_missing(qwen, tmp_path):
    base = shutil.copytree(qwen[0] / "base", tmp_path / "base")
    file, index = base / "model.safetensors", base / "model.safetensors.index.json"
    own = weights(file)
    data.write_json(index, {"weight_map": {name: "0.safetensors" for name in own}})
    shutil.copy(file, base / "0.safetensors")
    model_file.save_tensors({k: torch.zeros_like(v) for k, v in own.items()}, file)      # of an earlier save
    found, expected = (reward.VideoReward.from_base(x).state_dict() for x in (base, qwen[0] / "base"))
    assert_near(found, expected | {"rm_head.weight": found["rm_head.weight"]}, 0)
    index.unlink()
    name = next(k for k in own if k.endswith("q_proj.weight"))
    fp8 = {name: own[name].to(torch.float8_e4m3fn), name + "_scale": torch.ones(1)}
    for spoiled, says in ((fp8, "Unexpected"), ({name[1:]: own[name]}, "Missing"),
                          ({name: own[name][:1]}, "size mismatch"),
                          ({name: own[name].char()}, "floating point")):
        model_file.save_tensors({k: x for k, x in own.items() if k != name} | spoiled, file)
        with refusing(f"does not fit the model: .*{says}"):
            reward.VideoReward.from_base(base)

def test_scores_that_are_no_numbers_end_with_the_name_of_the_video(qwen, runs):
    own, latent, prompt = released_reward(qwen), reward.load_reward(runs / "reward"), PROMPTS[:1]
    pairs, drawn = data.toy_pairs(3, "val", 0), (clean_videos(prompt), data.embed_text(prompt), ["x"], prompt)
    own.rm_head.weight.data[:] = NAN
    latent.std[1] = 0
    for name, score in ((".*a.mp4", lambda: raw_scores(qwen, own)),
                        ("A of row 0", lambda: latent.score_pairs(data.Shapes(), pairs, None)),
                        ("x", lambda: latent.score_drawn(*drawn))):
        with refusing(f"the scores of {name} are not finite"):
            score()

def test_scores_are_read_at_their_tokens_with_plain_positions_in_a_batch_too(qwen):
    """transformers' own forward gives our scores with plain positions, with its own M-RoPE others."""
    own = reward.VideoReward.from_base(qwen[0] / "base")
    own.rm_head.weight.data = torch.randn(1, 32)
    ids, mask, patches, grids = own.inputs(clips(qwen, "a", "b"), ["a cat", "one, two, three dogs"])
    plain, mrope = (own.rm_head(own.qwen(
        input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values_videos=patches,
        video_grid_thw=grids, mm_token_type_ids=2 * (ids == own.video_id).int()).last_hidden_state)[..., 0]
        for positions in (torch.arange(ids.shape[1]).expand(3, 2, -1), None))
    r, lengths = own(ids, mask, patches, grids), mask.sum(1).tolist()
    for b in range(2):
        at = [ids[b].tolist().index(i) for i in own.token_ids]
        assert torch.allclose(r[b], plain[b, at], atol=1e-4) and (r[b] - mrope[b, at]).abs().max() > 1e-3
    assert lengths[0] != lengths[1]
    alone = own.score(clips(qwen, "a", "b"), ["a cat", "one, two, three dogs"], normalise=False)
    assert torch.allclose(r, alone, atol=1e-5)

def test_vq_and_mq_cannot_see_the_prompt(qwen):
    own, prompts = released_reward(qwen), ["a cat", "a very long tale of two dogs in the snow", "sea"]
    r = own.score(clips(qwen, "a", "b", "a"), prompts)
    assert (r[0] - r[1]).abs().min() > 1e-4
    assert (r[0, :2] - r[2, :2]).abs().max() < 1e-5 < 1e-3 < (r[0, 2] - r[2, 2]).abs()
    write_clips(qwen[0], ["one.mp4"], frames=1, size=(96, 32))                  # odd, but a video
    assert own.score(clips(qwen, "one"), ["p"]).isfinite().all()

def test_the_input_is_the_default_system_turn_the_video_and_the_prompt(qwen):
    own = released_reward(qwen)
    ids, _, patches, grids = own.inputs(clips(qwen, "a"), ["a cat"])
    assert torch.equal(own.qwen.get_input_embeddings()(ids)[0, ids[0] == own.token_ids[0]], own.rows[:1])
    said = own.tokenizer.decode(ids[0]).replace("<|video_pad|>" * (len(patches) // 4), "<|video_pad|>")
    assert said == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                    "<|vision_start|><|video_pad|><|vision_end|>"
                    + THEIRS.replace("{text_prompt}", "a cat").replace("{{it}}", "{it}")
                    + "<|im_end|>\n<|im_start|>assistant\n")
    assert grids.tolist() == [[2, 20, 28]]                                      # 4 frames of 280 x 392
    with refusing("special token"):
        own.inputs(clips(qwen, "a"), ["a cat <|TA_reward|>"])

def test_frames_and_their_sizes_are_chosen_as_by_the_authors():
    for total, fps, n in ((60, 24, 4), (60, 23.976, 6), (150, 30, 10), (126, 24, 10), (1, 24, 2), (3, 24, 2),
                          (5, 1, 4), (24 * 600, 24, 768)):
        got = reward.frame_indices(total, fps)
        assert len(got) == n and got[0] == 0 and got[-1] == total - 1, (total, fps, got)
    assert reward.frame_indices(7, 1) == [0, 1, 2, 4, 5, 6]
    for size, most, fitted in (((576, 1024), 200704, (336, 588)), ((64, 96), 200704, (280, 392)),
                               ((100, 8000), 200704, (28, 4004)), ((300, 310), 200704, (336, 336)),
                               ((300, 310), 64 * 28 * 28, (196, 224)),          # shrunk, not enlarged again
                               ((100, 100), 20_000, (336, 336))):               # enlarged past its own bound
        assert reward.frame_size(*size, max_pixels=most) == fitted, size
    for size, most in (((10, 3000), 200704), ((30, 4000), 20000)):
        with refusing(f"v.mp4 is {size[0]} x {size[1]}"):
            reward.frame_size(*size, most, "v.mp4")

def test_patches_are_those_of_transformers_own_processor():
    """A frame shown twice gives the processor's patches; two frames, an independent reading of the layout."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    processor = Qwen2VLImageProcessorPil(min_pixels=reward.MIN_PIXELS, max_pixels=reward.MAX_PIXELS)
    g = np.random.default_rng(0)
    frames = g.integers(0, 256, (2, 280, 364, 3), dtype=np.uint8)               # of a size that stays
    greys = [g.integers(90, 166, (*size, 3), dtype=np.uint8) for size in ((97, 131), (900, 700))]
    for frame, levels in ((frames[0], 0.01), *((grey, 1.5) for grey in greys)):  # Pillow resizes, and clamps
        out = processor(Image.fromarray(frame), return_tensors="pt")
        x, grid = reward.patchify(frame[None].repeat(2, 0), reward.frame_size(*frame.shape[:2]))
        assert grid.tolist() == out["image_grid_thw"][0].tolist()
        assert (x - out["pixel_values"]).abs().max() * 0.27 * 255 < levels
    x = reward.patchify(frames, (280, 364))[0].view(-1, 3, 2, 14, 14)
    x = (x * reward.PIXEL_STD[None, :, None] + reward.PIXEL_MEAN[None, :, None]).numpy()
    for n in (0, 1, 2, 3, 4, 200, 519):                                     # token n // 4, corner n % 4 of it
        row, column = 14 * (n // 4 // 13 * 2 + n % 4 // 2), 14 * (n // 4 % 13 * 2 + n % 2)
        seen = frames[:, row:row + 14, column:column + 14].transpose(3, 0, 1, 2) / 255
        assert np.abs(x[n] - seen).max() < 1e-5, n

def test_a_template_is_parsed_and_never_executed(qwen, tmp_path):
    assert reward.read_template(qwen[0] / "prompt_template.py") == THEIRS       # it would end the tests
    odd = THEIRS.replace("{text_prompt}", "{text_prompt.x}")
    early = "{text_prompt}" + THEIRS.replace("{text_prompt}", "")
    values = [repr(odd), repr(early), "1", "open('x').read()", "'no tokens {text_prompt}'"]
    for text in ("x = 1", "def (", *(f"{reward.THEIR_TEMPLATE} = {value}" for value in values)):
        (tmp_path / "t.py").write_text(text)
        with refusing("t.py"):
            reward.read_template(tmp_path / "t.py")

def test_interrupted_scoring_goes_on_and_nothing_is_scored_twice(qwen, tmp_path, monkeypatch):
    own, scored, prompts = released_reward(qwen), [], ["x", "x", "x", "y"]
    videos = clips(qwen, "a", "b", "a", "a")
    plain = own.score(videos, prompts)

    def score(paths, prompts, normalise):
        if len(scored) == 2:
            raise Killed
        scored.append((Path(paths[0]).stem, prompts[0]))
        return reward.VideoReward.score(own, paths, prompts, normalise)
    monkeypatch.setattr(own, "score", score)
    with pytest.raises(Killed):
        reward.score_videos(own, videos, prompts, tmp_path)
    for todo in ([("a", "y")], []):
        scored.clear()
        assert torch.allclose(reward.score_videos(own, videos, prompts, tmp_path), plain, atol=1e-5)
        assert scored == todo
    other = released_reward(qwen, torch.bfloat16)                               # another, with other scores
    assert (reward.score_videos(other, videos, prompts, tmp_path) - plain).abs().max() > 1e-6

@pytest.mark.parametrize("loss", ["btt", "regression"])
def test_training_a_video_reward_moves_only_what_the_paper_trains(qwen, loss, tmp_path):
    args = qwen_args(qwen, tmp_path / "run", steps=3, lr=4e-3, loss=loss)
    result = train_reward.main(args)
    assert result["loss_last"] < result["loss_first"] and {"VQ", "TA"} <= set(result["reward"])
    torch.manual_seed(0)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32      # of what is not trained
    memory = reward.VideoReward.from_base(args.model, dtype=dtype).trainable()
    before, saved = copy.deepcopy(memory.state_dict()), weights(tmp_path / "run/reward.safetensors")
    assert saved.keys() == before.keys() and before["rows"].shape == (3, 32)
    assert {k for k in before if not torch.equal(before[k], saved[k])} == {
        k for k in before if "lora" in k or "visual" in k or k in ("rm_head.weight", "rows")}
    memory.eval().float().load_state_dict(saved)                                # it is judged by in fp32
    again, raw = reward.load_reward(tmp_path / "run"), raw_scores(qwen, memory)
    assert torch.allclose(raw_scores(qwen, again), raw, atol=1e-5)
    assert torch.allclose(raw_scores(qwen, again, normalise=True), (raw - again.mean) / again.std, atol=1e-4)

@pytest.mark.parametrize("kind", ["files", "shapes"])
def test_a_reward_goes_on_from_a_reward_and_says_what_it_gained(kind, qwen, runs, tmp_path, capsys):
    own, template = dict(out=f"{tmp_path}/run", steps=2, lr=1e-3, batch=2), dict(template=released(qwen)[1])
    if kind == "files":
        args, start = qwen_args(qwen, **own, **template, model=released(qwen)[0]), released_reward(qwen)
    else:
        args = train_reward.Args(**own, model=f"{runs}/reward", pairs=toy_pairs_file(tmp_path))
        start, drawn = reward.load_reward(runs / "reward"), data.toy_pairs(4, "eval", 0)

    def score(r):
        return raw_scores(qwen, r, True) if kind == "files" else r.score_pairs(data.Shapes(), drawn, None)
    train_reward.check_args(args)
    assert torch.allclose(score(train_reward.new_reward(args, kind, "cpu").eval()), score(start), atol=1e-5)
    result = train_reward.main(args)
    assert result["before"].keys() == result["reward"].keys() and result["n"] >= 2
    assert re.search(r"\n\| before \|.*\n\| reward \|", capsys.readouterr().out)
    again = reward.load_reward(tmp_path / "run")
    assert (score(again) - score(start)).abs().max() > 1e-3 and not torch.equal(again.mean, start.mean)

def test_a_toy_reward_grows_from_the_base_on_labels_and_serves_wherever_a_reward_does(runs, tmp_path, capsys):
    pairs, out = toy_pairs_file(tmp_path), f"{tmp_path}/run"
    args = train_reward.Args(model=f"{runs}/base", depth=1, steps=1, batch=4, pairs=pairs, out=out)
    result = train_reward.main(replace(args))
    assert result["n"] >= 2 and "before" not in result and set(result["reward"]) == set(DIMS)
    found = train_reward.main(train_reward.Args(eval=out, pairs=pairs, out=f"{out}/eval"))
    assert found["reward"].keys() == set(DIMS) and "the paper's" not in capsys.readouterr().out
    assert align(runs, tmp_path / "dpo", **SHORT | dict(reward=out))
    Path(pairs).write_text(Path(pairs).read_text().replace("VQ,MQ,TA", "x,y,Overall"))
    with refusing("labels no pair for --loss btt: it needs columns VQ, MQ, TA"):
        train_reward.main(replace(args, out=f"{out}2"))

def test_validation_holds_two_pairs_or_more_of_prompts_that_are_not_trained_on():
    args, pairs = train_reward.Args(pairs="p.csv"), data.toy_pairs(1, "train", 0)
    for prompts, kept in (("aab", 2), ("abcdefgh", 2), ("aaaaaaab", 7), ("abcdefghij" * 6, 12),
                          ([str(i % 600) for i in range(1200)], 60)):
        split = train_reward.split_prompts(args, replace(pairs, prompts=list(prompts)))
        train, val = (rows.tolist() for rows in split)
        assert sorted(train + val) == list(range(len(prompts))) and len(val) == kept, prompts
        assert not {prompts[i] for i in train} & {prompts[i] for i in val}, prompts
    for prompts in ("aaaa", "ab"):
        with refusing("p.csv has no two pairs to keep for validation: label pairs of more prompts"):
            train_reward.split_prompts(args, replace(pairs, prompts=list(prompts)))

def test_the_benchmark_counts_what_is_labelled_and_writes_every_pair(qwen, tmp_path, capsys):
    args = eval_args(qwen, tmp_path / "eval", pairs=prefs(qwen), cache=str(tmp_path))
    found, better = train_reward.main(args)["reward"], raw_scores(qwen, released_reward(qwen), True)[:, 0]
    assert set(found) == {*DIMS} and found["VQ"]["without"] == float(better[0] > better[1])
    assert math.isnan(found["MQ"]["without"]) and found["MQ"]["with"] == 1.0    # its one label is a tie
    rows = list(csv.DictReader(open(tmp_path / "eval/pairs.csv")))
    assert len(rows) == 8 and rows[0]["VQ"] == "B" and rows[0]["MQ"] == ""
    assert float(rows[1]["score_A_VQ"]) == pytest.approx(better[0].item(), abs=1e-3)
    genai = qwen[0] / "genai.csv"
    genai.write_text("prompt,left_video,right_video,vote_type\np,a.mp4,b.mp4,leftvote\n")
    result = train_reward.main(replace(args, pairs=str(genai), out=f"{tmp_path}/genai"))
    assert set(result["reward"]) == set(result["TA alone"]) == {"Overall"}
    said = capsys.readouterr().out
    assert re.search(r"VideoGen-RewardBench \| 75.7 / 59.7 \|", said)
    assert re.search(r"GenAI-Bench at 256 x 256 .*\| 72.9 / 49.4 \|", said)

def test_a_checkpoint_without_constants_gives_raw_scores_and_says_so_once(qwen, tmp_path, capsys):
    raw, whole = shutil.copytree(released(qwen)[0], tmp_path / "raw"), released_reward(qwen)
    config = read(raw / "model_config.json")
    data.write_json(raw / "model_config.json", config | {"inference_config": {}})
    own = reward.VideoReward.from_pretrained(raw, template=released(qwen)[1])
    for normalise in (True, False):
        assert torch.allclose(raw_scores(qwen, own, normalise), raw_scores(qwen, whole), atol=1e-5)
    assert capsys.readouterr().out.count("has no constants to normalise by") == 1

# ---- runs ----
# A run is its command: it says how it goes, may be cut anywhere, and gives the same numbers all the same.

@pytest.mark.parametrize("name, changes", [
    ("dpo", dict(labels="oracle", beta_schedule="(1-t)^2")),
    ("dpo_ta", dict(dim_w=(0.0, 0.0, 1.0), lora_rank=0)),
    ("sft", dict(loss="sft", labels="human")), ("rwr", dict(loss="rwr", lora_rank=0, steps=20))])
def test_each_objective_trains_and_its_loss_falls(runs, name, changes):
    run, result = runs / name, align(runs, runs / name, **dict(steps=12, eval_n=2) | changes)
    assert set(result["win_rate"]) == {*DIMS, "Overall"} and read(run / "eval.json") == result
    events, config = data.read_log(run), read(run / "config.json")
    assert events[-1]["loss"] < events[0]["loss"] and len(events[0]["loss_by_t"]) == 10
    if "dpo" in name:
        assert {"margin", "gap_w", "gap_l"} <= events[0].keys() and events[-1]["implicit_acc"] > 0.5
    again = data.parse_args(train_align.Args, "", shlex.split(config["command"])[2:])
    train_align.check_args(again, data.Shapes())
    assert json.loads(json.dumps(vars(again))) == config["args"]
    assert (run / "samples.webp").exists() and sample.load_model(run)(*random_batch()).isfinite().all()

def test_pretraining_and_rewards_learn_and_say_how_well(runs):
    for name, most, times in (("base", 0.8, 0), ("reward", 1, 1), ("noisy", 1, 5)):
        events, result = data.read_log(runs / name), read(runs / name / "eval.json")
        assert events[-1]["loss"] < most * events[0]["loss"]
        assert len(result.get("by_t", ())) == times and ("oracle" in result) == (name == "base")

def test_a_step_in_micro_batches_is_a_step_in_one(runs, wan, tmp_path):
    for n in (1, 2):
        align(runs, tmp_path / f"rwr{n}", **SHORT | dict(loss="rwr", batch=4, accumulate=n))
        train_reward.main(replace(noisy_args(wan, tmp_path / f"reward{n}", steps=1), accumulate=n))
    assert_near(*(weights(tmp_path / f"rwr{n}/lora.safetensors") for n in (1, 2)), 1e-5)
    assert_same_log(tmp_path / "reward1", tmp_path / "reward2", rtol=0.05)       # trained in bf16

def test_two_processes_give_the_losses_and_videos_of_one_and_fail_in_one_line(runs, wan, tmp_path):
    toy = align_args(runs, n_pairs=8, steps=2, batch=4, loss="rwr", accumulate=2)
    args = {"dpo": replace(toy, loss="dpo", accumulate=1), "rwr": toy, "wan": wan_args(
        wan, "", steps=2, batch=2, accumulate=1, save_every=1, cache=f"{tmp_path}/cache")}
    for name in args:
        train_align.main(replace(args[name], out=f"{tmp_path}/{name}"))
    two = [replace(args[name], out=f"{tmp_path}/{name}2", shard=name == "wan") for name in args]
    cut = replace(two[2], out=f"{tmp_path}/cut")
    words = shlex.split(data.command(replace(toy, out=f"{tmp_path}/failed")))[2:]
    out = torchrun(tmp_path, f"""
        for args in {[*two, replace(cut, steps=1), replace(cut, resume=True)]}:
            main(args)
        def fails(*args):
            if data.RANK:
                raise OSError('disk full')
        train_align.label_pairs = fails
        data.launch(main, Args, '', {words})""")
    said = [line for line in out.stderr.splitlines() if line.startswith("error:")]
    assert out.returncode and said == ["error: rank 1: disk full"], out.stderr
    for name in args:
        assert_same_log(tmp_path / name, tmp_path / f"{name}2", rtol=1e-3 if name == "wan" else 1e-4)
    for name in ("dpo", "rwr"):
        for file, atol in (("lora.safetensors", 1e-5), ("samples.safetensors", 1)):         # 1 level of 256
            assert_near(*(weights(tmp_path / x / file) for x in (name, f"{name}2")), atol)
    assert_near(*(weights(tmp_path / x / "lora.safetensors") for x in ("wan2", "cut")), 0)    # the same bits

def test_the_distance_is_the_mean_squared_difference_of_velocities():
    still, moved = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    still.forward, moved.forward = lambda x, t, text: x, lambda x, t, text: x + 3 * t.view(-1, 1, 1, 1, 1)
    videos, reference = torch.zeros(100, 3, 2, 2, 2), lambda: contextlib.nullcontext(still)
    far = [train_align.distance(m, reference, videos, PROMPTS * 2, 0) for m in (still, moved)]
    t, _ = data.draw_noise((), 0, 2**31, list(range(100)))
    assert far == [0, pytest.approx(9 * t.square().mean().item(), rel=1e-5)]

@pytest.mark.parametrize("name", ["dpo", "pretrain", "noisy", "videos", "win rates"])
def test_the_command_in_config_json_makes_the_same_files_again(name, runs, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", TINY)
    script, args = job(name, runs, tmp_path / "run")
    script.main(args)
    command = shlex.split(read(tmp_path / "run/config.json")["command"])
    (tmp_path / "run").rename(tmp_path / "first")
    data.launch(script.main, script.Args, script.__doc__, command[2:])
    first, again = ({f.relative_to(run): f.read_bytes() for f in run.rglob("*") if f.is_file()}
                    for run in (tmp_path / "first", tmp_path / "run"))
    assert timeless_log(tmp_path / "first") == timeless_log(tmp_path / "run")
    for files in (first, again):
        files.pop(Path("log.jsonl"), None)                                      # the clock is in it
    assert first == again and len(first) > 2

def test_a_folder_that_exists_is_never_written_into_and_a_run_that_kept_nothing_leaves_none(runs, tmp_path):
    _, args = job("dpo", runs, tmp_path / "run")
    (tmp_path / "run").mkdir()
    with refusing("run exists: --resume goes on with it, or give another --out"):
        train_align.main(replace(args))
    with pytest.raises(OSError, match="gone.csv"):
        train_align.main(replace(args, pairs="gone.csv", out=f"{tmp_path}/other"))
    assert [*tmp_path.rglob("*")] == [tmp_path / "run"]

def test_every_command_of_the_pages_parses():
    """Those of README.md and results.md, by a shell that follows loops and runs nothing, and docstrings'."""
    scripts = {f"{m.__name__}.py": m for m in (train_align, train_reward, sample, reward)}
    pages = (HERE / "README.md").read_text() + (HERE / "assets/results.md").read_text()
    shell = 'PATH=/nowhere; command_not_found_handle() { :; }; python() { printf "%s\\0" "$@"; echo; }\n'
    code = shell + "\n".join(re.findall(r"```bash\n(.*?)```", pages, re.S))
    said = subprocess.run(["bash", "-c", code], cwd=HERE, capture_output=True, text=True, check=True).stdout
    commands = [line.split("\0")[:-1] for line in said.splitlines()]
    assert len(commands) >= 30
    documented = [line.strip().split("    ")[0] for m in scripts.values() for line in m.__doc__.splitlines()]
    for script, *words in commands + [shlex.split(line)[1:] for line in documented if line[:7] == "python "]:
        assert (HERE / script).exists() or f"```python\n# {script} " in pages, script
        if script in scripts:
            data.parse_args(scripts[script].Args, scripts[script].__doc__, words)

HEALTHY = [dict(step=10 * i, loss=0.693 - 0.02 * i, logit=0.05 * i, grad_factor=0.5 - 0.02 * i,
                margin=0.0003 * i, gap_w=0.0008 * i, gap_l=0.0011 * i, err_ref_w=0.036) for i in range(1, 11)]

def test_the_doctor_names_each_disease_once_and_is_silent_on_health():
    for changes, says in (
            (dict(logit=0.001), "the loss is still log 2, with logits of 0.0010"),
            (dict(grad_factor=0.004), "saturated: the gradient has 0.40% of its strength left"),
            (dict(gap_w=0.02, gap_l=0.03), "the winner's error is 0.0200 above the reference's 0.0360"),
            (dict(gap_w=0.08, margin=-0.01), "errors explode"),
            (dict(loss=1.5), "the loss has doubled, to 1.50"), ({}, None)):
        events = [HEALTHY[0]] + [e | changes for e in HEALTHY[1:]]
        said = [verdict for i in range(1, 11) for verdict in train_align.diagnose(events[:i])]
        assert len(said) == bool(says) and all(says in verdict for verdict in said), said
    flat = [HEALTHY[0] | dict(step=8, loss=0.69, logit=0.001)]              # a short run is judged at its end
    assert not train_align.diagnose(flat) and train_align.diagnose(flat, 8)
    sft = [dict(step=10 * i, loss=loss) for i, loss in enumerate((0.04, 0.05, 0.09), 1)]
    assert not train_align.diagnose(sft[:2]) and "explode" in train_align.diagnose(sft)[0]

def test_the_log_tells_the_logit_and_its_gradient_factor_and_beta_in_others_units():
    names = "t", "loss", "gap_w", "gap_l", "err_ref_w", "logit"
    for logit in (-3.0, 0.0, 0.5, 1000.0):
        event = train_align.summary(names, tensor([[0.5, 0.7, 0.1, 0.2, 0.3, logit]]))
        assert event["logit"] == pytest.approx(abs(logit), abs=1e-4)
        assert event["grad_factor"] == pytest.approx(torch.sigmoid(tensor(-logit)).item(), rel=1e-3)
    event = train_align.summary(names[:4], tensor([[0.1, 9.0, 0.1, 0.3], [0.9, 8.0, 0.2, 0.1]]))
    assert event["implicit_acc"] == 0.5 and event["margin"] == pytest.approx(0.05) and "logit" not in event
    assert re.search("250 .* 0.0362 .* 13,824 numbers, 0.0181 ", train_align.beta_elsewhere(500.0, 13824))

@pytest.mark.parametrize("name", ["dpo", "pretrain", "reward"])
def test_a_killed_run_resumes_to_the_same_bits(name, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "toy", TINY)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script, args = job(name, runs, whole, n_pairs=16, steps=5, save_every=2, accumulate=2)
    script.main(replace(args))
    args = replace(args, out=str(cut))
    main_killed(script, replace(args), 3, monkeypatch)
    assert torch.load(cut / "state.pt", weights_only=True)["step"] == 2
    (cut / "state.pt.1f.tmp").write_bytes(b"half a state")
    with open(cut / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    script.main(replace(args, resume=True))
    assert "going on after step 2" in capsys.readouterr().out
    files = [f.relative_to(whole) for f in whole.rglob("*.safetensors")]
    for file in files:
        assert_near(weights(whole / file), weights(cut / file), 0)
    assert files and read(whole / "eval.json") == read(cut / "eval.json")
    assert timeless_log(whole) == timeless_log(cut)

def test_what_changed_under_a_stopped_run_is_told_and_an_ended_run_can_be_made_longer(wan, tmp_path):
    shutil.copytree(wan / "v", tmp_path / "v")
    pairs = shutil.copy(wan / "pairs.csv", tmp_path)
    args = wan_args(wan, "", pairs=pairs, steps=1, out=f"{tmp_path}/run")
    train_align.main(replace(args))
    train_align.main(replace(args, steps=2, resume=True))
    train_align.main(replace(args, steps=2, out=f"{tmp_path}/whole"))
    assert_near(*(weights(tmp_path / name / "lora.safetensors") for name in ("run", "whole")), 0)
    Path(pairs).write_text(Path(pairs).read_text().replace("a cat runs,A", "a cat runs,B"))
    for changed, says in ((replace(args, pairs=f"{wan}/pairs.csv"), "--steps 1 is not what .* began with, 2"),
                          (replace(args, steps=2), "--pairs .*pairs.csv is not what .*run began with")):
        with refusing(says):
            train_align.main(replace(changed, resume=True))

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_goes_on_wherever_its_files_lie(number, runs, tmp_path, monkeypatch):
    for name in ("base", "reward"):
        shutil.copytree(runs / name, tmp_path / "here" / name)
    own, clip, before = SHORT | dict(steps=2), train_align.clip_grad_norm_, signal.getsignal(number)
    with monkeypatch.context() as patch, refusing("stopped after step 1: the same command with --resume"):
        patch.setattr(train_align, "clip_grad_norm_", lambda *x: signal.raise_signal(number) or clip(*x))
        train_align.main(align_args(tmp_path / "here", tmp_path / "here/run", **own))
    assert signal.getsignal(number) is before
    there = shutil.copytree(tmp_path / "here", tmp_path / "there")
    own |= dict(steps=3, save_every=2, accumulate=2, cache=f"{tmp_path}/b")                 # which may change
    moved = align_args(there, f"{there}/run/", **own, resume=True)
    with refusing("--lr 1.0 is not what .*run began with, 0.003: bring that back"):
        train_align.main(replace(moved, lr=1.0))
    train_align.main(replace(moved))
    assert len(data.read_log(there / "run")) == 3
    file = there / "base" / DIT
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1                                             # in the middle of the weights
    file.write_bytes(content)
    with refusing("--model .*base is not what .*run began with"):
        train_align.main(replace(moved))
    with refusing("was trained on another model than .* is now"):
        sample.load_model(there / "run", base=str(there / "base"))

def test_a_large_file_is_known_by_pages_spread_over_it(tmp_path):
    hashes = []
    for text in (b"", b"1" * 2**18):
        with open(tmp_path / "x", "wb") as file:
            file.truncate(300 * 2**20)                                          # of zeros, which take no room
            file.seek(150 * 2**20)
            file.write(text)
        hashes.append(data.content_hash(tmp_path / "x"))
    assert hashes[0] != hashes[1]

@pytest.mark.parametrize("name, what", [("dpo", "loss"), ("noisy", "gradient")])
def test_numbers_gone_wrong_stop_the_run_and_are_named(name, what, runs, tmp_path, monkeypatch):
    script, args = job(name, runs, tmp_path / "run", n_pairs=16, steps=4)
    clip, noise, norms = script.clip_grad_norm_, script.draw_noise, []

    def draw(shape, seed, step, samples, **settings):
        t, eps = noise(shape, seed, step, samples, **settings)
        eps[samples.index(max(samples))] *= NAN if step == 1 and what == "loss" else 1
        return t, eps

    def norm(*x):
        norms.append(clip(*x))
        return norms[-1] * (math.inf if len(norms) == 2 and what == "gradient" else 1)
    monkeypatch.setattr(script, "draw_noise", draw)
    monkeypatch.setattr(script, "clip_grad_norm_", norm)
    with pytest.raises(UserError, match="^step 2: loss or gradient is not finite, of rows") as stop:
        script.main(args)
    assert len(json.loads(re.search(r"\[.*\]", str(stop.value))[0])) == (1 if what == "loss" else 4)
    assert torch.load(tmp_path / "run/state.pt", weights_only=True)["step"] == 1

@pytest.mark.parametrize("what", ["state", "dpo", "videos", "cache"])
def test_a_full_disk_ends_in_one_line(what, runs, tmp_path, capsys):
    """Files may grow to 4000 bytes only, which stops writes as a full disk does."""
    script, args = job("videos" if what == "videos" else "dpo", runs, tmp_path / "run")
    args = replace(args, save_every=1) if what == "state" else args
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    main = script.main if what != "cache" else lambda _: data.save_cached(torch.zeros(9999), tmp_path / "x")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        stopped = refusal(main, script.Args, shlex.split(data.command(args))[2:], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search("written|too large", stopped), stopped
    assert not [f for f in tmp_path.rglob("*") if f.suffix in (".safetensors", ".pt")]

def test_a_rehearsal_tells_time_and_memory_and_moves_nothing(wan, monkeypatch, capsys):
    args, world = wan_args(wan, "rehearsed", cache=f"{wan}/nowhere"), data.world_of(wan)
    train_align.check_args(args, world)
    m, reference = train_align.policy_and_reference(args, "cpu")
    before, state = [p.clone() for p in m.parameters()], torch.get_rng_state()
    for held in (1, 10**12):                                                    # bytes, of 100 GB
        peaks = iter([0, held])
        monkeypatch.setattr(train_align, "memory", lambda device: (next(peaks), 10**11))
        train_align.rehearse(args, world, m, reference, 7, "cpu")
        said = capsys.readouterr().out
        assert re.search("s a micro-batch; 7 steps take about .* minutes and .* of 100 GB", said)
        assert args.decoupled and (held == 1) == ("--no-decoupled is faster" in said)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(m.parameters(), before))
    assert torch.equal(torch.get_rng_state(), state) and not Path(args.cache).exists()

@pytest.mark.skipif(not hasattr(torch.cuda, "standin"), reason="needs a GPU of any size, as the stand-in is")
def test_a_rehearsal_that_does_not_fit_leaves_no_folder(wan, tmp_path):
    words = shlex.split(data.command(wan_args(wan, "", out=f"{tmp_path}/run", cache=f"{tmp_path}/cache")))[1:]
    out = subprocess.run([sys.executable, *words], cwd=HERE, env=os.environ | {"STANDIN_MEMORY_GB": "0.001"},
                         capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr.strip().splitlines()[-1].startswith("error: out of memory: ")
    assert not (tmp_path / "run").exists()

# ---- Wan ----
# The same scripts on Wan 2.1 and 2.2: tiny random pipelines of the real classes, saved by diffusers itself.

@pytest.mark.parametrize("name, size", [("2.1", (5, 32, 48)), ("a14b", (5, 32, 48)), ("5b", (5, 64, 96))])
def test_sampling_gives_the_latents_and_frames_of_diffusers_pipeline(name, size, wans):
    pipe, world, prompts = pipeline(wans[name]), data.world_of(wans[name]), ["a  cat &amp; dog", "a dog"]
    shape = world.latent_shape(size[0], size[1:])
    eps = torch.stack([torch.randn(shape, generator=rng("eval", 7, i)) for i in range(2)])
    settings = dict(prompt=prompts, negative_prompt="sleeps", num_frames=5, height=size[1], width=size[2],
                    num_inference_steps=4, guidance_scale=4.0, latents=eps)
    settings |= {"guidance_scale_2": 3.0} if name == "a14b" else {}
    latents = pipe(**settings, output_type="latent").frames
    frames = pipe(**settings, output_type="pt").frames                          # (B, T, 3, H, W) in [0, 1]
    pipe.scheduler.set_timesteps(4)
    ts = pipe.scheduler.sigmas
    assert (ts[:-1] >= 0.875).unique().numel() == 2                             # both experts are asked
    _, x, videos = zip(*sample.generate(
        sample.load_all([str(wans[name])], world, torch.float32), world, prompts,
        sample.embed_all(world, prompts, "sleeps"), 7, ts, size, cfg_scale=4.0, cfg_low=3.0,
        negative="sleeps", batch=1))
    x, videos = torch.stack(x), torch.stack(videos)
    assert torch.allclose(x, latents, rtol=0, atol=1e-4)
    assert torch.allclose((videos + 1) / 2, frames.transpose(1, 2), rtol=0, atol=1e-4)

def test_a_content_is_encoded_once_and_read_once(wan, tmp_path, monkeypatch):
    shutil.copytree(wan / "v", tmp_path / "v")
    shutil.copy(wan / "v/a.mp4", tmp_path / "v/copy.mp4")
    rows = (wan / "pairs.csv").read_text().replace("v/d.mp4,v/a", "v/d.mp4,v/copy")
    (tmp_path / "pairs.csv").write_text(rows)
    args = wan_args(wan, "", pairs=f"{tmp_path}/pairs.csv", cache=f"{tmp_path}/cache")
    encoded, opened, own, hash_of = [], [], data.Wan.encode_video, data.content_hash
    monkeypatch.setattr(data.Wan, "encode_video", lambda world, x: encoded.append(1) or own(world, x))
    world, again = data.Wan(wan), data.Wan(wan)
    pairs = world.encode(world.read(args), args)
    x0, text = world.latents(pairs, [0, 2, 1]), world.text(pairs, [0, 2])
    assert len(encoded) == 4 and x0.shape == (3, 2, 16, 2, 4, 6) and text.shape == (2, 512, 24)
    assert torch.equal(x0[0, 0], x0[1, 1]) and torch.equal(text[0], text[1])  # one content, one prompt, twice
    pixels = data.read_clip(wan / "v/a.mp4", 5, (32, 48))
    assert torch.equal(x0[0, 0], own(world, pixels[None])[0].bfloat16().float())
    assert text[0].any(1).sum() == 4                                            # three words, the end, zeros
    world.cached[pairs.videos[1][0]].unlink()
    monkeypatch.setattr(data, "content_hash", lambda path: opened.append(Path(path).suffix) or hash_of(path))
    again.encode(again.read(args), args)
    assert len(encoded) == 5 and torch.equal(again.latents(pairs, [0, 2, 1]), x0)
    assert opened and ".mp4" not in opened                                 # remembered by path, size and time
    again.encode(again.read(replace(args, frames=9)), replace(args, frames=9))
    assert len(encoded) == 9                                               # other settings, other latents

def test_what_is_cut_away_of_pictures_and_prompts_is_told(wan, tmp_path, capsys):
    write_clips(tmp_path, ["v/a.mp4", "v/b.mp4"], size=(96, 54))
    long = "a cat runs " * 200
    rows = ["prompt,chosen,rejected", f"{long},v/a.mp4,v/b.mp4", "a cat,v/b.mp4,v/a.mp4"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    world, args = data.Wan(wan), wan_args(wan, "", pairs=f"{tmp_path}/pairs.csv", cache=f"{tmp_path}/cache")
    pairs = world.read(args)
    said = "2 of 2 videos lose more than a third of the picture at --size 32,48; --size 48,32"
    assert said in capsys.readouterr().out
    world.encode(pairs, args)
    assert "1 of 2 prompts are cut at 512 tokens: 'a cat runs" in capsys.readouterr().out

def test_a_lora_of_wan_loads_in_diffusers_and_a_second_round_starts_there_and_holds_both(wan, tmp_path):
    one, batch = wan_args(wan, "", dtype="bf16", steps=6, out=f"{tmp_path}/one"), wan_batch()
    two = replace(one, model=one.out, seed=1, out=f"{tmp_path}/two")
    train_align.main(replace(one))
    train_align.check_args(two, data.world_of(two.model))
    base, first = (sample.load_model(path, torch.bfloat16)(*batch) for path in (wan, one.out))
    policy, reference = train_align.policy_and_reference(two, "cpu")
    with torch.no_grad(), reference() as frozen:
        for v in (policy(*batch), frozen(*batch)):
            assert (v - first).norm() < 1e-2 * (first - base).norm()
    train_align.main(replace(two))
    base, first, ours = (sample.load_model(path) for path in (wan, one.out, two.out))
    assert (ours(*batch) - first(*batch)).norm() > 0.05 * (first(*batch) - base(*batch)).norm()
    for args, m, rank in ((one, first, 4), (two, ours, 8)):
        events, tensors = data.read_log(args.out), weights(f"{args.out}/lora.safetensors")
        assert events[-1]["loss"] < events[0]["loss"] and tensors.keys() == LORA_NAMES
        assert {len(x) for name, x in tensors.items() if "lora_A" in name} == {rank}
        assert_close(m(*batch), velocity_of(pipeline(wan, args.out).transformer, *batch))
        with lora_disabled(m):
            assert torch.equal(m(*batch), base(*batch))                        # the pretrained, not round one

def test_each_expert_is_trained_in_its_range_and_its_lora_loads_in_diffusers(wans, tmp_path, monkeypatch):
    folder, loaded, times = wans["a14b"], [], []
    args = wan_args(folder, "", steps=2, batch=2, accumulate=2, cache=f"{tmp_path}/cache")
    load, noise = VideoDiT.from_pretrained.__func__, data.draw_noise
    monkeypatch.setattr(VideoDiT, "from_pretrained", classmethod(lambda *a: loaded.append(a[-1]) or load(*a)))
    monkeypatch.setattr(train_align, "draw_noise", lambda *a, **k: times.append(noise(*a, **k)) or times[-1])
    for expert, low, high, part in (("high", 0.875, 1, "transformer"), ("low", 0, 0.875, "transformer_2")):
        train_align.main(replace(args, expert=expert, out=f"{tmp_path}/{expert}"))
        assert loaded == [part] and times and all(low <= t <= high for ts, _ in times for t in ts)
        loaded.clear(), times.clear()
    with refusing("--expert high: .*low is a run of the other one"):
        train_align.main(replace(args, model=f"{tmp_path}/low", expert="high", out=f"{tmp_path}/x"))
    runs, world = [f"{tmp_path}/low", f"{tmp_path}/high"], data.world_of(folder)        # in any order
    both, one, plain = (sample.load_all(x, world, torch.float32) for x in (runs, runs[:1], [str(folder)]))
    with refusing("must be one of each expert"):
        sample.load_all(runs[:1] * 2, world, torch.float32)
    pipe = pipeline(folder, runs[1], runs[0])
    for t, theirs in ((0.9, pipe.transformer), (0.3, pipe.transformer_2)):
        assert_close(both(*wan_batch(t)), velocity_of(theirs, *wan_batch(t)))
        assert torch.equal(one(*wan_batch(t)), plain(*wan_batch(t))) == (t == 0.9)  # beside the plain other
    sample.main(sample.Args(ckpt=runs, prompt=["a cat"], steps=2, against="base", out=f"{tmp_path}/out"))
    assert data.video_info(tmp_path / "out/start/000.mp4")[:2] == (5, 16.0)

def test_the_5b_is_trained_and_written_at_its_own_rate_and_grid(wans, tmp_path):
    args = wan_args(wans["5b"], "", size=(64, 96), steps=1, cache=f"{tmp_path}/cache", out=f"{tmp_path}/run")
    train_align.main(args)
    sample.main(sample.Args(ckpt=[args.out], prompt=["a cat"], steps=1, out=f"{tmp_path}/out"))
    assert data.video_info(tmp_path / "out/000.mp4") == (5, 24.0, 64, 96)
    theirs, batch = pipeline(wans["5b"], args.out).transformer, wan_batch(channels=48)
    assert_close(sample.load_model(args.out)(*batch), velocity_of(theirs, *batch))

def test_a_run_is_sampled_as_it_was_trained_and_with_its_base_in_a_new_place(wan, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    shutil.copytree(wan, there, ignore=shutil.ignore_patterns("cache"))
    train_align.main(wan_args(there, "run", cache=f"{tmp_path}/cache", steps=1))
    args = sample.Args(ckpt=[f"{there}/run"], prompt=["a cat"], out=f"{tmp_path}/drawn")
    sample.check_args(args, data.world_of(there / "run"))
    assert (args.frames, *args.size, args.shift, args.cfg) == (5, 32, 48, 8.0, 6.0)
    expected = sample.load_model(there / "run")(*wan_batch())
    there.rename(here)
    with refusing("there is no folder"):
        sample.load_model(here / "run")
    assert torch.equal(sample.load_model(here / "run", base=str(here))(*wan_batch()), expected)
    sample.main(replace(args, ckpt=[f"{here}/run"], model=str(here), steps=1))
    assert data.video_info(tmp_path / "drawn/000.mp4") == (5, 16.0, 32, 48)

def test_wan_trains_in_bf16_or_all_its_weights_in_fp32_and_checkpointing_moves_no_digit(wan, tmp_path):
    for name, changes in (("half", dict(dtype="bf16")), ("plain", dict(checkpointing=False)),
                          ("kept", dict(checkpointing=True)),
                          ("full", dict(loss="sft", lora_rank=0, dtype="bf16"))):
        args = wan_args(wan, "", steps=1, lr=1e-4, out=f"{tmp_path}/{name}", **changes)
        train_align.main(args)
    assert_near(*(weights(tmp_path / name / "lora.safetensors") for name in ("plain", "kept")), 1e-6)
    plain, half = (data.read_log(tmp_path / name)[-1]["err_ref_w"] for name in ("plain", "half"))
    assert plain != half and plain == pytest.approx(half, rel=0.02)
    assert {x.dtype for x in weights(tmp_path / "full" / DIT).values()} == {torch.float32}
    m, _ = train_align.policy_and_reference(args, "cpu")
    v, m.compute_dtype = m(*wan_batch()), None                                  # under bf16 autocast
    assert 1e-5 < (v - m(*wan_batch())).norm() / v.norm() < 0.05

def test_each_expert_has_a_guidance_of_its_own_and_cfg_alone_is_of_both(wans, tmp_path):
    folder, world = str(wans["a14b"]), data.world_of(wans["a14b"])
    model, texts = sample.load_all([folder], world, torch.float32), sample.embed_all(world, ["a cat"])

    def drawn(ts, high, low):
        found = sample.generate(model, world, ["a cat"], texts, 0, tensor(ts), (5, 32, 48), high, cfg_low=low)
        return next(found)[1]
    for ts, guided in (([1, 0.9], False), ([0.8, 0.0], True)):                  # the boundary is 0.875
        one, both, low = (drawn(ts, *scales) for scales in ((1, 1), (3, 3), (1, 3)))
        assert torch.equal(low, both if guided else one) and not torch.equal(one, both)
    for given, found in (({}, (4, 3)), (dict(cfg=1.0), (1, 1)), (dict(cfg=1.0, cfg_low=3.0), (1, 3))):
        args = sample.Args(model=folder, prompt=["a cat"], out=f"{tmp_path}/out", **given)
        sample.check_args(args, world)
        assert (args.cfg, args.cfg_low) == found

def test_all_lora_files_count_and_two_experts_take_two(wan, wans, tmp_path):
    files, a14b = [str(tmp_path / name) for name in "ab"], str(wans["a14b"])
    for file in files:
        save_lora(shake_lora(add_lora(sample.load_model(wan), 2, 2.0)), file)
    both = sample.load_all([str(wan)], data.world_of(wan), torch.float32, files)(*wan_batch())
    joined = load_lora(load_lora(sample.load_model(wan), files[0]), files[1])(*wan_batch())
    assert torch.equal(both, joined)
    world = data.world_of(a14b)
    experts = sample.load_all([a14b], world, torch.float32, files)
    for t, part, file in ((0.9, "high", files[0]), (0.3, "low", files[1])):
        m = load_lora(sample.load_model(a14b, expert=part), file)
        assert torch.equal(experts(*wan_batch(t)), m(*wan_batch(t)))
    with refusing("--lora takes two files"):
        sample.check_args(sample.Args(model=a14b, prompt=["a cat"], lora=files[:1], **CLIP), world)

def test_wan_is_sampled_side_by_side_under_the_names_that_vbench_expects(wan, tmp_path):
    (tmp_path / "prompts.csv").write_text(
        "prompt,prompt_shorter\na cat runs and runs,a cat runs\na dog sleeps,\na cat runs,\n")
    sample.main(sample.Args(model=str(wan), prompts=f"{tmp_path}/prompts.csv", n_per_prompt=2, steps=1,
                            against=str(wan), out=f"{tmp_path}/out", **CLIP))
    names = {f"a cat runs-{i}.mp4" for i in range(4)} | {f"a dog sleeps-{i}.mp4" for i in range(2)}
    for folder in (tmp_path / "out", tmp_path / "out/start"):
        assert {p.name for p in folder.glob("*.mp4")} == names and (folder / "samples.webp").exists()
    files = [tmp_path / folder / "a dog sleeps-1.mp4" for folder in ("out", "out/start")]
    assert files[0].read_bytes() == files[1].read_bytes() and data.video_info(files[0]) == (5, 16.0, 32, 48)

def test_a_noisy_reward_grows_from_wan_guides_it_and_judges_it(wan, tmp_path):
    noisy, run, seen, (x, t, text) = f"{tmp_path}/noisy", f"{tmp_path}/run", [], wan_batch()
    train_reward.main(noisy_args(wan, noisy, steps=2, lr=1e-3))
    train_align.main(wan_args(wan, "", loss="rwr", labels="reward", reward=noisy, steps=1, out=run))
    args = sample.Args(model=str(wan), prompt=["a cat runs"], n_per_prompt=2, steps=2,
                       out=f"{tmp_path}/plain", **CLIP)
    sample.main(replace(args))
    drawn = dict(ckpt=[run], nrg=noisy, against="base", reward=noisy, out=f"{tmp_path}/out")
    result = sample.main(replace(args, **drawn))
    assert set(result["win_rate"]) == {*DIMS, "Overall"} and read(tmp_path / "out/eval.json") == result
    plain, guided, start = (data.read_video(tmp_path / name / "001.mp4")[0]
                            for name in ("plain", "out", "out/start"))
    assert not np.array_equal(plain, guided) and np.array_equal(plain, start)   # the same noise, unguided
    assert data.read_pairs(tmp_path / "out/pairs.csv").label[0, 3] == 1
    r = reward.LatentReward.from_base(sample.load_model(wan), 1)            # in bf16 but at its ends
    r.hidden.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    score = r.score(x.requires_grad_(), t, text)
    gradient, = torch.autograd.grad(score.sum(), x)
    assert seen == [torch.bfloat16] and score.dtype == gradient.dtype == torch.float32

def test_videoreward_labels_the_pairs_of_wan_and_judges_what_it_draws(wan, qwen, tmp_path, capsys):
    judge = dict(zip(("reward", "template"), released(qwen)))
    args = wan_args(wan, "", loss="rwr", labels="reward", steps=1, cache=f"{tmp_path}/c",
                    out=f"{tmp_path}/run", **judge)
    train_align.main(args)
    assert "3 of 3 pairs, of 2 prompts, labelled by reward" in capsys.readouterr().out
    assert len([*(tmp_path / "c").glob("score-*")]) == 5                        # distinct videos and prompts
    result = sample.main(sample.Args(ckpt=[args.out], prompt=["a dog runs"], n_per_prompt=2, steps=1,
                                     against="base", out=f"{tmp_path}/out", **CLIP, **judge))
    assert result["n"] == 2 and result["judge"] == judge["reward"]

# ---- refusals ----
# What the user can mend ends in one line that says how, with exit status 2, before anything is written.

REFUSALS = """
train_align   --lss dpo                                            unknown argument --lss
train_align   --loss ppo                                           choose from
train_align   --steps many                                         is not a whole number, 1 or more
train_align   --dim_w 1,1                                          give 3 numbers, not all 0
train_align   --loss rwr --tau 0                                   --tau above 0
train_align   --loss rwr --labels human                            use --labels reward
train_align   --loss dpo --labels flawless                         is the ceiling of --loss sft
train_align   --best 0.1 --labels human                            go by scores
train_align   --best 0                                             --best above 0
train_align   --loss pretrain --lora_rank 4                        trains all weights
train_reward  --depth 99 --n_pairs 9                               blocks
train_align   --model runs/nowhere                                 is no folder
train_align   --model {empty}                                      is the run finished
train_align   --model {other} --n_pairs 9                          does not fit the model
train_align   --model {world} --n_pairs 9                          another Shapes world
train_align   --model {layers} --n_pairs 9                         text-to-video Wan: {{'num_layers': 0}}
train_align   --out {file}/run                                     Not a directory
train_align   --out {toy}                                          exists: --resume goes on with it
sample        --out x                                              one thing at a time
sample        --compare {won} --cfg 3                              stand --x, --y, --by and --out alone
sample        --eval 4 --against base                              this model has none
sample        --prompt 'a dog'                                     not a prompt of Shapes world
sample        --prompt 'a red circle moving left' --reward oracle  add --against base or --n_per_prompt 4
sample        --prompt 'a red circle moving left' --against {wan}  is another kind of model
sample        --prompts {blank}                                    row 3 has no prompt
sample        --compare {nothing}                                  takes runs with win rates
sample        --compare {won} --x rg_scale --y win_rate/XQ         cannot be drawn: 'XQ'
sample        --compare {won} --out drawn                          draws one .webp
train_align   --pairs gone.csv                                     gone.csv
reward        {ask}                                                KwaiVGI/VideoAlign
reward        {ask} --template {base}/config.json                  must set DETAILED_PROMPT
reward        --video {clip} --ckpt {released} --template {template}  --prompt
reward        {ask} --ckpt nobody/nothing                          does not exist
reward        {ask} --template {template} --base {released}        is not a Qwen2-VL
reward        {ask} --template {template} --ckpt {short}           does not fit the model: Missing
reward        {ask} --template {template} --ckpt {evil}            model.pth cannot be read
train_reward  --model {base}                                       with --pairs
train_reward  --pairs {prefs}                                      is not a prompt of Shapes world
train_reward  --model assets/reward --pairs {prefs} --depth 2      no --depth
train_reward  --model assets/noisy --pairs {prefs}                 --noisy as it was
train_reward  --model {base} --pairs {prefs} --noisy               on latents
train_reward  --model {base} --pairs {plain} --loss regression     MOS_A_VQ
train_reward  --model {base} --pairs {unread}                      row 2: {root}/text.mp4 cannot be read
train_align   --model {wan} --labels human                         has no pairs of its own
train_align   --model {wan} --frames 6                             4k + 1 frames
sample        --model {wan} --prompt p --size 30,30                give multiples of 16
sample        --model {wan} --eval 4                               are of Shapes world
sample        --model {text_encoder} {draw}                        git lfs pull
sample        --model {half} {draw}                                has 2 missing tensors
sample        --model {wan}/{dit} {draw}                           is no folder
train_reward  --model {qwen25} --pairs {prefs}                     only Qwen2-VL
reward        --video {clip} --prompt p --ckpt {released}/checkpoint-30  above checkpoint-<step>/
reward        {ask} --template {template} --video {pointer}        git lfs pull
"""
HEAD = "path_A,path_B,prompt,VQ\n"
JSON_ROW = '{"path_A": "a.mp4", "path_B": "a.mp4", "prompt": "p", "VQ": "A"}'
BAD_PAIRS = {                                                            # a file of pairs: what is said of it
    "": "holds no pairs", HEAD: "holds no pairs", "PAR1\xff": "is not UTF-8 text (byte 4): save it as CSV",
    "video,caption\na,b\n": "columns caption, video: wanted are prompt, chosen, rejected",
    "path_A,path_B,prompt\na.mp4,a.mp4,p\n": "and one of VQ, MQ, TA, Overall",
    f"{HEAD}a.mp4,gone.mp4,p,A\n": "row 2: {root}/gone.mp4 is no file",
    f"{HEAD}a.mp4,a.mp4,,A\n": "row 2 has no prompt",
    f"{HEAD}a.mp4,a.mp4,p,1\na.mp4,a.mp4,p,0\n": "row 2: VQ is '1': write A, B, same, or nothing",
    f"{HEAD}{'x' * 5000}.mp4,a.mp4,p,A\n": "xxx.mp4 is no file",
    f'{HEAD}"a\nb.mp4",a.mp4,p,A\n': "b.mp4 is no file",
    f"{HEAD}a.mp4,empty,p,A\n": "empty is no file", f'{HEAD}a.mp4,a.mp4,"open,A\n': "is no CSV",
    f"{HEAD}a.mp4,a.mp4,{PROMPTS[0]},A\n": "in each, both sides are the same video",
    '{"version": 2, "data": [{"prompt": "p"}]}': "columns data, version: wanted are",
    '{"version": 2,\n"data": []}': "JSON list of rows (not under a key)",
    f"{HEAD}a.mp4,a.mp4,one, two,A\n": "row 2 has more or fewer fields than the header: texts with "
                                       "the separator ',' must stand in quotes",
    JSON_ROW.replace('"p"', '["p"]'): 'row 1: prompt is ["p"] and must be a text',
    JSON_ROW.replace('"p"', "NaN"): "row 1 has no prompt",
    JSON_ROW.replace('"p"', '"\\ud83d"'): "must be a text",
    "path_A,path_B,prompt,VQ,MOS_A_VQ\na.mp4,a.mp4,p,A,80\n": "row 2 has points off the scale of 1 to 5"}

@pytest.mark.parametrize("script", [train_align, train_reward, sample, reward], ids=lambda m: m.__name__)
def test_what_the_user_can_mend_ends_in_one_line_and_status_2(script, spoiled, monkeypatch, capsys):
    root, names = spoiled
    monkeypatch.chdir(root)
    rows = [re.split(r"\s{2,}", line.format(**names)) for line in REFUSALS.strip().splitlines()]
    if script is train_align:
        says = [says.replace("{root}/", "") for says in BAD_PAIRS.values()]
        rows += [("train_align", f"--pairs bad{i}", x) for i, x in enumerate(says)]
    before = sorted(root.rglob("*"))
    for name, line, says in rows:
        if name == script.__name__:
            assert says in refusal(script.main, script.Args, shlex.split(line), capsys), line
            assert sorted(root.rglob("*")) == before, line

def test_a_person_labels_pairs_in_a_browser_and_training_reads_what_was_saved(tmp_path):
    api, chromium = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    prompts = ["say \"hi\", <b>bold</b> & 'x'", "красный круг 赤い丸", "</script><script>alert(1)",
               "a, b; #c?%d"]
    rows = [[prompt, *(f"{side}/{prompt.replace('/', ' ')}.mp4" for side in "ab")] for prompt in prompts]
    write_clips(tmp_path, [name for row in rows for name in row[1:]])
    with open(tmp_path / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], *rows])
    data.main(data.Args(str(tmp_path / "pairs.csv")))
    shown, faults = [], []
    with api.sync_playwright() as play:
        page = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        page.goto((tmp_path / "pairs.html").as_uri())
        page.on("pageerror", lambda fault: faults.append(str(fault)))

        def press(*keys):
            shown.append(page.locator("h1").inner_text())
            for key in keys:
                page.keyboard.press(key)
        page.wait_for_function("[...videos].every(v => v.currentTime > 0)")       # both play
        swapped = page.evaluate("state.swapped")
        press(*"168n")                                                            # VQ A, MQ B, TA same
        page.locator("fieldset").nth(0).get_by_text("B").click()                  # by mouse
        press("n")
        page.reload()                                                             # in the middle
        assert page.locator("#place").inner_text() == "Pair 3 of 4"
        assert page.evaluate("state.swapped") == swapped
        page.locator("#back").click()
        assert page.locator("fieldset").nth(0).get_by_label("B").is_checked()     # it was kept
        page.keyboard.press("n")
        press("1")
        page.locator("#skip").click()                                             # the third is not judged
        press("Tab", "Space", "ArrowRight", "Enter")                           # the first answer, then "same"
        assert page.locator("#results").is_visible() and page.locator("#wins").inner_text().count("%") >= 2
        with page.expect_download() as download:
            page.locator("#save").click()
        download.value.save_as(tmp_path / "labels.csv")                           # beside the page
    assert shown == prompts and not faults
    pairs, turn = data.read_pairs(tmp_path / "labels.csv"), [-1 if swap else 1 for swap in swapped]
    assert pairs.prompts == [prompts[0], prompts[1], prompts[3]]
    assert [path.parent.name for path in map(Path, pairs.videos[0])] == ["a", "b"]
    assert pairs.label[:, :3].nan_to_num(9).tolist() == [[turn[0], -turn[0], 0], [-turn[1], 9, 9], [0, 9, 9]]

def page_data(folder):
    """What the labelling page in a folder knows."""
    page = (folder / "label.html").read_text(encoding="utf-8")
    return json.loads(re.search('json">(.*?)</script>', page)[1])

def test_samples_get_a_labelling_page(tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    for name, own in (("many", dict(n_per_prompt=4)), ("two", dict(against="assets/base"))):
        sample.main(sample.Args(prompt=PROMPTS[:1], steps=1, cfg=1.0, out=f"{tmp_path}/{name}", **own))
    many, two = (page_data(tmp_path / name) for name in ("many", "two"))
    assert [pair["videos"] for pair in many["pairs"]] == [["000.mp4", "001.mp4"], ["002.mp4", "003.mp4"]]
    assert two["pairs"] == [{"prompt": PROMPTS[0], "videos": ["000.mp4", "start/000.mp4"]}]
    assert two["sides"] == ["two", "assets/base"]


# ---- fixtures ----
# Tiny random models in the real layouts, folders good and spoiled, and ways to kill a run. Nothing is mocked.

CLIP = dict(frames=5, size=(32, 48))                                          # what Wan draws and reads here
SHORT = dict(n_pairs=4, steps=1, batch=2, eval_n=1, eval_steps=1)               # the shortest alignment
DIT = "transformer/diffusion_pytorch_model.safetensors"
LORA_NAMES = {f"diffusion_model.blocks.{i}.{a}_attn.{n}.lora_{ab}.weight"
              for i in (0, 1) for a in ("self", "cross") for n in "qkvo" for ab in "AB"}

def random_model(config=TINY):
    """A model whose head is not zero, so that its output says something."""
    torch.manual_seed(0)
    m = VideoDiT(config)
    torch.nn.init.normal_(m.head.head.weight, std=0.1)
    return m.eval()

def random_batch():
    """(x, t, text) of two videos for random_model."""
    g = rng(0)
    return (torch.randn(2, 3, 4, 8, 8, generator=g), torch.rand(2, generator=g),
            torch.randn(2, 8, 32, generator=g))

def wan_batch(t=0.3, channels=16):
    """(x, t, text) of one video for the tiny Wans."""
    g = rng(1)
    return torch.randn(1, channels, 2, 4, 6, generator=g), tensor([t]), torch.randn(1, 7, 24, generator=g)

def shake_lora(m):
    """The model with random adapters."""
    for name, p in m.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p, std=0.1)
    return m

def weights(file):
    return read_tensors(file)[0]

def read(file):
    return json.loads(Path(file).read_text())

def refusing(says):
    return pytest.raises(UserError, match=says)

def refusal(main, cls, words, capsys):
    """The one line that these words of a command line end in, with status 2."""
    with pytest.raises(SystemExit) as stop:
        data.launch(main, cls, "", words)
    said = re.sub(r"[^\n]*(\r|%\|.*\n?)", "", capsys.readouterr().err).strip().splitlines()     # without bars
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith("error:"), (words, said)
    return said[0]

def assert_close(v, expected):
    """Two velocities are the same up to rounding in fp32."""
    assert (v - expected).norm() < 1e-5 * expected.norm()

def assert_near(a, b, atol):
    """Two dictionaries of tensors have the same keys and, within atol, the same values."""
    assert a.keys() == b.keys() and a
    assert all((a[k].float() - b[k].float()).abs().max() <= atol for k in a)

def assert_same_log(a, b, rtol):
    """Two runs logged the same losses and gradients."""
    for x, y in zip(data.read_log(a), data.read_log(b), strict=True):
        assert all(np.isclose(x[key], y[key], rtol=rtol) for key in ("loss", "grad_norm"))

def timeless_log(run):
    """The events in a run's log without the clock."""
    return [{k: v for k, v in event.items() if k not in ("time", "seconds")} for event in data.read_log(run)]

def write_clips(folder, names, frames=12, size=(32, 48), fps=8):
    """Small mp4 files with something in them."""
    for k, name in enumerate(names):
        video = torch.zeros(3, frames, *size) - 0.5
        video[k % 3, :, 8:20, 8 + k:24 + k] = 0.9
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data.write_video(folder / name, video, fps)

def read_pairs(folder, *lines, **files):
    """Pairs of a table of these lines, beside files a, b, c and d, which hold their names, and these."""
    for name, text in (dict(zip("abcd", "abcd")) | files).items():
        (folder / name).write_text(text)
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return data.read_pairs(folder / "pairs.csv")

def film(path, frames, ms=range(0, 4000, 40), aspect=1, cover=False, rate=25):
    """A video file of frames (T, H, W, 3), shown at these ms and said to be of this rate; its pixels are
    aspect times as wide as high; before it a cover picture.
    """
    import av
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mjpeg", width=16, height=16, pix_fmt="yuvj420p") if cover else None
        stream = container.add_stream("libvpx" if path.suffix == ".webm" else "libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        stream.codec_context.time_base = Fraction(1, 1000)
        if cover:
            container.mux(picture.encode(av.VideoFrame(16, 16, "yuvj420p")))
        for time_ms, image in zip(ms, frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

@pytest.fixture(autouse=True, scope="module")
def source_read_once():
    """Comments become a script's --help; to find them takes 40 ms, and the tests parse 300 command lines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", cache(inspect.getsource))
        yield

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

def torchrun(folder, code):
    """What came of this code in two processes that know train_align: one torchrun, as it starts slowly."""
    head = "import data, train_align\nfrom train_align import Args, main\n"
    (folder / "two.py").write_text(head + textwrap.dedent(code))
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("two processes want two GPUs, or none")
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    words = "-m torch.distributed.run --standalone --local-addr localhost --nproc-per-node 2".split()
    return subprocess.run([sys.executable, *words, folder / "two.py"], env=os.environ | {"PYTHONPATH": path},
                          capture_output=True, text=True, timeout=300)

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a tiny base, a reward and a noisy reward, made by the scripts themselves."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "toy", TINY)
        align(root, root / "base", loss="pretrain", steps=30, lora_rank=None, lr=None, warmup=4)
    for name, shared in (("reward", True), ("noisy", False)):
        train_reward.main(job(name, root, root / name, n_pairs=16, steps=24, batch=8, n_eval=30,
                              shared_noise=shared)[1])
    return root

def align_args(runs, out="", **changes):
    return train_align.Args(**dict(
        model=f"{runs}/base", reward=f"{runs}/reward", n_pairs=24, steps=20, batch=8, lr=3e-3, lora_rank=4,
        eval_n=4, eval_steps=2, out=str(out)) | changes)

def align(runs, out, **changes):
    return train_align.main(align_args(runs, out, **changes))

def job(name, runs, out, **changes):
    """(script, its arguments) of a few steps of this kind into out."""
    drawn = dict(ckpt=[f"{runs}/base"], nrg=f"{runs}/noisy")
    measured = train_reward.Args(model=f"{runs}/base", depth=1, lr=3e-3, n_pairs=8, n_eval=12)
    script, args = {
        "dpo": (train_align, align_args(runs, n_pairs=8)),
        "pretrain": (train_align, align_args(runs, loss="pretrain", lora_rank=None, warmup=2)),
        "reward": (train_reward, measured), "noisy": (train_reward, replace(measured, noisy=True)),
        "videos": (sample, sample.Args(prompt=PROMPTS[:9:5], **drawn)),
        "win rates": (sample, sample.Args(eval=4, dim_w=(0.0, 0.5, 1.0), **drawn))}[name]
    small = dict(steps=2, out=str(out)) | ({} if script is sample else {"batch": 4})
    return script, replace(args, **small | changes)

def tiny_dit(channels):
    """diffusers' Wan transformer, small and random."""
    dit = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=channels, out_channels=channels,
        text_dim=24, ffn_dim=48, freq_dim=16, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32)
    for p in dit.parameters():                                                  # as drawn, some of it is zero
        p.data += 0.1 * torch.randn_like(p)
    return dit

@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """The folder of a tiny WanPipeline, with pairs.csv of four mp4 files beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
    torch.manual_seed(0)
    vocabulary = {w: i for i, w in enumerate("<pad> </s> <unk> a cat dog runs sleeps".split())}
    words, root = Tokenizer(models.WordLevel(vocabulary, "<unk>")), tmp_path_factory.mktemp("wan")
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    text = UMT5Config(vocab_size=8, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    diffusers.WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, **special), transformer=tiny_dit(16),
        text_encoder=UMT5EncoderModel(text),
        vae=diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(root)
    write_clips(root, [f"v/{name}.mp4" for name in "abcd"])
    (root / "pairs.csv").write_text("path_A,path_B,prompt,VQ,MQ,TA\nv/a.mp4,v/b.mp4,a cat runs,A,A,same\n"
                                    "v/c.mp4,v/d.mp4,a dog sleeps,A,B,A\nv/d.mp4,v/a.mp4,a cat runs,B,,\n")
    return root

@pytest.fixture(scope="module")
def wans(wan, tmp_path_factory):
    """{"2.1": wan, "a14b", "5b": folder}: tiny random pipelines of both Wan 2.2 too, with wan's clips."""
    old, root = pipeline(wan), tmp_path_factory.mktemp("wan22")
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=[0.1] * 48,
        latents_std=[0.9] * 48)
    for name, parts in (("a14b", dict(vae=old.vae, transformer=old.transformer, transformer_2=tiny_dit(16),
                                      boundary_ratio=0.875)),
                        ("5b", dict(vae=vae, transformer=tiny_dit(48), expand_timesteps=True))):
        diffusers.WanPipeline(tokenizer=old.tokenizer, text_encoder=old.text_encoder, scheduler=old.scheduler,
                              **parts).save_pretrained(root / name)
        shutil.copytree(wan / "v", root / name / "v")
        shutil.copy(wan / "pairs.csv", root / name)
    return {"2.1": wan, "a14b": root / "a14b", "5b": root / "5b"}

def wan_args(wan, name, **changes):
    beta = {"beta": 2000.0} if changes.get("loss", "dpo") == "dpo" else {}
    return train_align.Args(**dict(
        model=str(wan), pairs=f"{wan}/pairs.csv", steps=12, batch=3, accumulate=3, lr=3e-3, lora_rank=4,
        lora_alpha=8.0, dtype="fp32", cache=f"{wan}/cache", out=f"{wan}/{name}") | CLIP | beta | changes)

def noisy_args(wan, out, **changes):
    return train_reward.Args(model=str(wan), pairs=f"{wan}/pairs.csv", noisy=True, depth=1, batch=2,
                             accumulate=2, cache=f"{wan}/cache", out=str(out), **CLIP, **changes)

def diffusers_dit(folder):
    """diffusers' own transformer in a folder."""
    diffusers.WanTransformer3DModel._keep_in_fp32_modules = None                # else it asks for accelerate
    return diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").eval()

def velocity_of(dit, x, t, text):
    """The velocity of diffusers' transformer."""
    return dit(x, 1000 * t, text, return_dict=False)[0]

def pipeline(folder, *runs):
    """diffusers' own WanPipeline in a folder, with the LoRA files of these runs on its transformers."""
    pipe = diffusers.WanPipeline.from_pretrained(folder, transformer=diffusers_dit(folder))
    pipe.set_progress_bar_config(disable=True)
    for run, second in zip(runs, (False, True)):
        pytest.importorskip("peft")
        pipe.load_lora_weights(run, weight_name="lora.safetensors", load_into_transformer_2=second)
    return pipe

CHAT = ("{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
        "{% if c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}"
        "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
THEIRS = "Rate: <|VQ_reward|> then <|MQ_reward|> for '{text_prompt}' so {{it}} is <|TA_reward|>.\n"
CONSTANTS = dict(VQ_mean=3.7, MQ_mean=1.2, TA_mean=2.8, VQ_std=2.0, MQ_std=2.0, TA_std=2.0)
LM_HEAD = {"base_model.model.lm_head.weight": torch.zeros(503, 32)}             # in their files, of no use

@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """(A folder with base/, a tiny Qwen2-VL; clips a, b; prompt_template.py; released/, a VideoReward in the
    authors' layout, whole, LoRA not merged; and the tensors in it.)
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
    root, words = tmp_path_factory.mktemp("qwen"), Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
    words.train_from_iterator([reward.RUBRIC], trainers.BpeTrainer(
        vocab_size=500, special_tokens=[f"<|{name}|>" for name in special], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    own = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<|endoftext|>", chat_template=CHAT)
    own.save_pretrained(root / "base")
    torch.manual_seed(0)
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3])
    text = dict(vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=2, bos_token_id=0,
                eos_token_id=2, num_attention_heads=2, num_key_value_heads=1, rope_parameters=rope)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(
        text_config=text, vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2),
        vision_start_token_id=3, vision_end_token_id=4, image_token_id=5, video_token_id=6))
    for p in model.parameters():                                               # every part matters to a score
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.2)
    model.save_pretrained(root / "base")
    write_clips(root, ["a.mp4", "b.mp4"], frames=20, size=(64, 96), fps=10)
    (root / "prompt_template.py").write_text(f'raise SystemExit\n{reward.THEIR_TEMPLATE} = """{THEIRS}"""\n')
    own, step = reward.VideoReward.from_base(str(root / "base")).trainable(), root / "released/checkpoint-30"
    for name, p in own.named_parameters():
        if "lora_B" in name or name in ("rm_head.weight", "rows"):
            torch.nn.init.normal_(p, 0, 0.3)
    truth = {k: v.detach().clone() for k, v in own.state_dict().items()}
    truth[reward.EMBEDDING][own.token_ids] = truth.pop("rows")
    own.tokenizer.save_pretrained(step / "tokenizer")
    torch.save(theirs(truth) | LM_HEAD, step / "model.pth")
    data.write_json(root / "released/model_config.json", {
        "data_config": {"fps": 2.0, "num_frames": None, "max_frame_pixels": 200704, "sample_type": "uniform",
                        "prompt_template_type": "detailed_special"},
        "model_config": {"model_name_or_path": str(root / "base"), "output_dim": 1, "reward_token": "last",
                         "use_special_tokens": True},
        "peft_lora_config": {"lora_r": 64, "lora_alpha": 128, "use_rslora": False},
        "training_args": {"learning_rate": 2e-6}, "inference_config": CONSTANTS})
    return root, truth

def theirs(tensors, layout=""):
    """Tensors under the authors' names: peft's marks, transformers' names of before, or of after: "new"."""
    def name(key):
        if re.search(r"\.lora_[AB]$", key):
            key += ".weight" if "adapter" in layout else ".default.weight"
        elif any(f".{linear}." in key for linear in reward.LINEARS) and "language_model" in key:
            key = re.sub(r"\.(weight|bias)$", r".base_layer.\1", key)
        if "new" not in layout:
            key = key.replace("qwen.language_model.", "model.").replace("qwen.visual.", "visual.")
        return "base_model.model." + key.replace("qwen.", "model.")
    return {name(key): value for key, value in tensors.items()}

def released(qwen):
    """The released VideoReward and its template, as arguments."""
    return f"{qwen[0]}/released", f"{qwen[0]}/prompt_template.py"

def released_reward(qwen, dtype=torch.float32):
    return reward.VideoReward.from_pretrained(released(qwen)[0], template=released(qwen)[1], dtype=dtype)

def clips(qwen, *names):
    return [str(qwen[0] / f"{name}.mp4") for name in names]

def raw_scores(qwen, own, normalise=False):
    """Scores of both clips by this reward."""
    return own.score(clips(qwen, "a", "b"), ["a cat", "a dog"], normalise)

def prefs(qwen, name="prefs.csv", mos=True):
    """A file of pairs like the authors': a beats b on VQ and TA, and MQ is unlabelled or a tie."""
    lines = ["path_A,path_B,prompt,VQ,MQ,TA" + ",MOS_A_VQ,MOS_B_VQ" * mos]
    for i in range(8):
        pair, label, points = ("a.mp4,b.mp4", "A", ",5,1") if i % 2 else ("b.mp4,a.mp4", "B", ",1,5")
        lines.append(f"{pair},prompt {i},{label},{'same' if i == 3 else 'invalid'},{label}" + points * mos)
    (qwen[0] / name).write_text("\n".join(lines) + "\n")
    return str(qwen[0] / name)

def toy_pairs_file(folder, n=12):
    """A file of n pairs of mp4s of Shapes world, labelled by its annotators."""
    pairs, lines = data.toy_pairs(n, "train", 0), ["path_A,path_B,prompt,VQ,MQ,TA"]
    for i, (prompt, label) in enumerate(zip(pairs.prompts, pairs.label.int().tolist())):
        for side, video in zip("AB", data.to_float(pairs.videos[i])):
            data.write_video(folder / f"{side}{i}.mp4", video, data.Shapes.fps, data.Shapes.zoom)
        words = (("same", "A", "B")[x] for x in label[:3])
        lines.append(f"A{i}.mp4,B{i}.mp4,{prompt},{','.join(words)}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return f"{folder}/pairs.csv"

def qwen_args(qwen, out, **changes):
    own = dict(model=f"{qwen[0]}/base", pairs=prefs(qwen), batch=2, accumulate=2, lr=2e-3, out=str(out))
    return train_reward.Args(**own | changes)

def eval_args(qwen, out, **changes):
    return train_reward.Args(eval=released(qwen)[0], template=released(qwen)[1], out=str(out), **changes)

class Executed:
    """Unpickled, it ends the tests."""

    def __reduce__(self):
        return sys.exit, ("ran",)

def saved_by_torch(x):
    file = io.BytesIO()
    torch.save(x, file)
    return file.getvalue()

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 5676070424\n"
SPOILED_FILES = {
    "unread": f"{HEAD}a.mp4,text.mp4,p,A\n", "file": "", "text.mp4": "no video", "pointer": POINTER.decode(),
    "blank": f"prompt,x\n{PROMPTS[0]},1\n ,2\n",
    "runs/cache/x": "", "nothing/config.json": '{"args": {}}', "nothing/eval.json": "{}",
    "won/config.json": '{"args": {"rg_scale": 1, "nrg": "x"}}', "won/eval.json": '{"win_rate": {"VQ": 1}}'}
CONFIG, STATE = "transformer/config.json", "checkpoint-30/model.pth"
SPOILED_MODELS = [                      # name; a copy of which model, a file in it, and what becomes of it
    ("text_encoder", "wan", "text_encoder/model.safetensors", lambda x: POINTER),
    ("half", "wan", "text_encoder/model.safetensors", lambda x: x.replace(b"Attention.q", b"Attention.z")),
    ("qwen25", "base", "config.json", lambda x: x.replace(b'"qwen2_vl"', b'"qwen2_5_vl"')),
    ("other", "toy", DIT, lambda x: x.replace(b"proj_out.bias", b"proj_out.more")),
    ("world", "toy", DIT, lambda x: x.replace(data.world_hash().encode(), b"0" * len(data.world_hash()))),
    ("layers", "toy", CONFIG, lambda x: x.replace(b'"num_layers": 2', b'"num_layers": 0')),
    ("short", "released", STATE, lambda x: saved_by_torch({})),
    ("evil", "released", STATE, lambda x: saved_by_torch(Executed()))]

@pytest.fixture(scope="module")
def spoiled(runs, qwen, wan, tmp_path_factory):
    """(a folder of bad files and models of every kind, {name: path} of them and of good ones)."""
    root, good = tmp_path_factory.mktemp("spoiled"), dict(
        wan=wan, toy=runs / "base", base=qwen[0] / "base", released=qwen[0] / "released",
        clip=qwen[0] / "a.mp4", template=qwen[0] / "prompt_template.py", prefs=prefs(qwen),
        plain=prefs(qwen, "plain.csv", mos=False))
    write_clips(root, ["a.mp4"])
    (root / "empty").mkdir()
    for name, text in (SPOILED_FILES | {f"bad{i}": text for i, text in enumerate(BAD_PAIRS)}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode("latin-1"))
    for name, source, file, spoil in SPOILED_MODELS:
        file = shutil.copytree(good[source], root / name) / file
        content = file.read_bytes()
        file.write_bytes(spoil(content))
        assert file.read_bytes() != content, name
    names = {path.name: path for path in root.iterdir()} | good | dict(root=root, dit=DIT)
    return root, names | {"ask": f"--video {good['clip']} --prompt p --ckpt {good['released']}",
                          "draw": "--prompt p --frames 5 --size 32,48 --steps 1"}

def kept_for_backward(m, call):
    """(what call returns, the most bytes at a time that autograd keeps in it, the weights left out)."""
    own, now, most = {p.untyped_storage().data_ptr() for p in m.parameters()}, [0], [0]

    class Kept:
        def __init__(self, x):
            self.x, self.size = x, x.nbytes * (x.untyped_storage().data_ptr() not in own)
            now[0] += self.size
            most[0] = max(most[0], now[0])

        def __del__(self):
            now[0] -= self.size
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        return call(), most[0]

# ---- on a GPU ----
# There the same files give in 16 bit what they give on a CPU. python test_all.py --gpu runs these tests too.

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

@on_gpu
@pytest.mark.parametrize("name, expert", [("2.1", None), ("a14b", "high"), ("a14b", "low")])
def test_a_gpu_trains_wan_as_a_cpu_does(name, expert, wans, tmp_path, monkeypatch):
    args = wan_args(wans[name], "", expert=expert, dtype="bf16", beta=10.0, steps=4, checkpointing=True,
                    compile=expert is None, cache=f"{tmp_path}/cache", out=f"{tmp_path}/gpu")
    train_align.main(replace(args, steps=2))
    train_align.main(replace(args, resume=True))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        train_align.main(replace(args, compile=False, cache=f"{tmp_path}/cpu-cache", out=f"{tmp_path}/cpu"))
    for key, rounding in {"loss": 0.01, "err_ref_w": 0.005, "grad_norm": 0.2}.items():
        gpu, cpu = ([event[key] for event in data.read_log(tmp_path / run)] for run in ("gpu", "cpu"))
        assert gpu == pytest.approx(cpu, rel=rounding), key

@on_gpu
def test_a_gpu_draws_from_a_second_round_under_a_noisy_reward(wan, tmp_path):
    args = wan_args(wan, "", dtype="bf16", compile=False, steps=1, out=f"{tmp_path}/one")
    train_align.main(replace(args))
    train_align.main(replace(args, model=args.out, out=f"{tmp_path}/two"))
    train_reward.main(noisy_args(wan, f"{tmp_path}/noisy", steps=1))
    sample.main(sample.Args(ckpt=[f"{tmp_path}/two"], nrg=f"{tmp_path}/noisy", prompt=["a cat"], steps=2,
                            out=f"{tmp_path}/drawn", **CLIP))
    assert data.video_info(tmp_path / "drawn/000.mp4")[0] == 5

@on_gpu
def test_a_gpu_draws_with_both_experts_and_scores_videos_as_a_cpu_does(wans, qwen, tmp_path):
    sample.main(sample.Args(model=str(wans["a14b"]), prompt=["a cat"], n_per_prompt=2, steps=2, **CLIP,
                            reward=f"{qwen[0]}/released", template=f"{qwen[0]}/prompt_template.py",
                            out=f"{tmp_path}/drawn"))
    assert len(data.read_pairs(tmp_path / "drawn/pairs.csv").prompts) == 1
    own = released_reward(qwen, torch.bfloat16)
    cpu, gpu = raw_scores(qwen, own), raw_scores(qwen, own.to("cuda")).cpu()
    assert torch.allclose(gpu, cpu, atol=0.3)

# ---- bench ----
# How fast it is beside diffusers: python test_all.py --bench; and all that a GPU alone can tell: --gpu.

SMALL = model_file.Config(dim=384, ffn_dim=2240, text_dim=512, num_heads=3, num_layers=4)
SHAPES = {                                  # a model's sizes; frames, height and width of its videos
    "tiny": (model_file.Config(dim=96, ffn_dim=192, text_dim=32, num_heads=2, num_layers=2), 5, 64, 64),
    "small": (SMALL, 13, 256, 256), "wan-14b": (PRESETS["wan-14b"], 33, 480, 832),
    "wan-1.3b": (PRESETS["wan-1.3b"], 33, 480, 832), "wan-1.3b-81": (PRESETS["wan-1.3b"], 81, 480, 832)}
# Passes of a video through (linear maps, attention): a backward pass is two of attention and, with LoRA, one.
PASSES = {"forward": (1, 1), "sft": (1 + 1, 1 + 2), "dpo": (2 * (1 + 1 + 1), 2 * (1 + 1 + 2))}

@dataclass
class Bench:
    """Time our Wan beside diffusers' with peft: a forward pass, and LoRA's gradient of SFT and Flow-DPO."""
    preset: Literal[*SHAPES] | None = None  # see SHAPES; unset: small, and with --gpu Wan's
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the linear maps
    checkpointing: bool = False             # activation checkpointing; what it computes again is not counted
    rounds: data.Count = 7                  # turns of each, after one to compile; medians are shown
    minutes: float = 10.0                   # --gpu, which sets the others: what may take longer is not begun

def contender(args, step, who, mode, batch):
    """(model at random weights, function that takes a step) of "ours", "ours, decoupled" or "diffusers"."""
    (x0, text, t, eps), ours, c, dtype = batch, who != "diffusers", SHAPES[args.preset][0], DTYPES[args.dtype]
    with x0.device:
        m = VideoDiT(c) if ours else diffusers.WanTransformer3DModel.from_config(c.to_diffusers())
    for name, p in m.named_parameters():                                        # zeros would be too easy
        wide = ours and any(part in name for part in model_file.FP32_ISLANDS)
        p.data = torch.nn.init.normal_(p.data, std=0.02).to(torch.float32 if wide else dtype)
    for block in m.blocks if ours else []:
        block.checkpointing = args.checkpointing
    if args.checkpointing and not ours:
        m.enable_gradient_checkpointing()
    if args.dtype == "bf16" and x0.is_cuda and not ours:                        # cuDNN's takes 16 bit alone
        m.set_attention_backend("_native_cudnn")
    if mode == "compiled":
        m.compile_blocks() if ours else m.compile_repeated_blocks(dynamic=False)
    if step != "forward" and ours:
        add_lora(m, 64, 128.0)
    elif step != "forward":
        from peft import LoraConfig, get_peft_model
        m = get_peft_model(m, LoraConfig(r=64, lora_alpha=128, target_modules=r".*\.to_([qkv]|out\.0)"))
    def velocity(xt, t, text):
        videos = zip(xt.to(dtype).split(1), t.split(1), text.to(dtype).split(1))  # the usual recipe: in turn
        return m(xt, t, text) if ours else torch.cat([velocity_of(m, *video) for video in videos])
    def run():
        if step == "dpo":
            with torch.no_grad(), lora_disabled(m) if ours else m.disable_adapter():
                reference = train_align.velocity_errors(velocity, x0, text, t, eps).unbind(1)
            apart, batch = who == "ours, decoupled", (velocity, x0, text, t, eps)
            both = [] if apart else [train_align.velocity_errors(*batch).unbind(1)]
            for pair in both or train_align.error_pairs(*batch):
                flow_dpo(*pair, *reference, 500.0).backward()
        else:
            with torch.set_grad_enabled(step == "sft"):
                error = train_align.velocity_errors(velocity, x0[:, :1], text, t, eps)
            if step == "sft":
                error.backward()
    return m, run

def timed(call):
    """(seconds of a call, the most bytes that it added on a GPU)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, tic = torch.cuda.memory_allocated(), time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - tic, torch.cuda.max_memory_allocated() - before

def measure(args, step, whose=("ours", "diffusers"), modes=("eager", "compiled"), cudnn=True):
    """Rows {column: value} of a step by each of whose in each mode, and of a matmul among them."""
    device, (c, frames, *size) = "cuda" if torch.cuda.is_available() else "cpu", SHAPES[args.preset]
    shape, n = (16, (frames - 1) // 4 + 1, *(x // 8 for x in size)), 8192 if "wan" in args.preset else 2048
    if step != "forward" and "diffusers" in whose and not importlib.util.find_spec("peft"):
        print(f"The {step} step of diffusers needs `pip install peft` and is left out.")
        whose = ["ours"]
    torch.compiler.reset()                                                      # its limit is eight variants
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    with torch.device(device):
        batch = [torch.randn(1, *x) for x in ((2, *shape), (512, c.text_dim), (), shape)]
        a, b = torch.randn(2, n, n, dtype=DTYPES[args.dtype])
    names = [(who, mode) for mode in modes for who in whose]
    models, runs = zip(*[contender(args, step, *name, batch) for name in names])
    turns = np.array([[timed(run) for run in (*runs, lambda: a @ b)] for _ in range(args.rounds + 1)])
    seconds, added = np.median(turns[1:, :, 0], axis=0), turns[-1, :, 1]
    D, L, S = c.dim, math.prod(shape) // 64, 512                              # tokens, and words of a prompt
    linear = 2 * D * (6 * L * D + 2 * S * D + 2 * L * c.ffn_dim)              # q k v o; q o, text's k v; ffn
    work = c.num_layers * np.dot(PASSES[step], (linear, 4 * L * (L + S) * D))  # a multiply-add is two
    rows, rate = [], 2 * n**3 / seconds[-1]
    for (who, mode), m, run, s, more in zip(names, models, runs, seconds, added):
        rows.append({"model": f"{who}, {mode}", "s": round(s, 4), "TFLOP/s": round(work / s / 1e12, 4),
                     "of matmul": round(work / s / rate, 3)})
        if device == "cuda":
            rows[-1]["peak GB"] = round((sum(p.nbytes for p in m.parameters()) + more) / 1e9, 3)
        if mode == "eager" and step != "forward" and not args.checkpointing:
            rows[-1]["MB kept for backward"] = round(kept_for_backward(m, run)[1] / 1e6, 1)
        if device == "cuda" and step == "sft":
            with torch.profiler.profile() as seen:
                timed(run)
            kernels = [e.key for e in seen.key_averages() if re.search("scaled_dot|sdpa|fmha|flash", e.key)]
            rows[-1]["attention"] = ", ".join(kernel[:70] for kernel in kernels)
    return [*rows, {"model": f"matmul {n}", "s": round(seconds[-1], 6), "TFLOP/s": round(rate / 1e12, 4)}]

def show(title, rows):
    """Print rows {column: value} as a Markdown table, lists left out."""
    head = list(dict.fromkeys(k for row in rows for k, x in row.items() if not isinstance(x, list)))
    table = data.markdown(head, [[row.get(column, "") for column in head] for row in rows])
    print(f"\n{title}\n\n{table}", flush=True)

def bench(args):
    """Print a table of each step."""
    args.preset = args.preset or "small"
    for step in PASSES:
        show(f"{step}: {args.preset}, {args.dtype}, torch {torch.__version__}", measure(args, step))

def command(*words):
    """The row of a Python command: its seconds and status, and the last lines that it said, also printed."""
    tic = time.time()
    end = subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, text=True, timeout=200)
    said = (end.stdout + end.stderr * bool(end.returncode)).splitlines()[-15:]
    print("", *said, sep="\n")
    return [{"s": round(time.time() - tic, 1), "status": str(end.returncode), "said": said}]

def autoencoder(preset):
    """The row of one video through Wan's autoencoder at random weights, in fp32."""
    frames, *size = SHAPES[preset][1:]
    vae = diffusers.AutoencoderKLWan(base_dim=8 if preset == "tiny" else 96).cuda().requires_grad_(False)
    video = torch.rand(1, 3, frames, *size, device="cuda")
    z = vae.encode(video).latent_dist.mode()                                    # which warms up
    encode, decode = timed(lambda: vae.encode(video))[0], timed(lambda: vae.decode(z))[0]
    return [{"encode, s": round(encode, 3), "decode, s": round(decode, 3)}]

def gpu(args):
    """Print each part, or its error, and keep it in gpu.json. A preset is the shape of all: a rehearsal."""
    if not torch.cuda.is_available():
        raise UserError("--gpu needs a GPU, and PyTorch sees none")
    def steps(name, step, rounds, **settings):
        return partial(measure, Bench(args.preset or name, "bf16", True, rounds), step, **settings)
    driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    found = {"machine": [{"GPU": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__,
                          "cuDNN": torch.backends.cudnn.version(), "diffusers": diffusers.__version__}]}
    show("machine", found["machine"])
    folder, start, eager = tempfile.mkdtemp(), time.time(), dict(whose=["ours"], modes=["eager"])
    paths = f"--cache {folder} --out {folder}/run".split()
    short = "--n_pairs 24 --steps 2 --eval_n 4 --eval_steps 2".split() if args.preset else []
    parts = [
        ("attention as PyTorch chooses", 20, steps("wan-1.3b", "sft", 3, **eager)),
        ("attention without cuDNN's", 20, steps("wan-1.3b", "sft", 3, cudnn=False, **eager)),
        ("it works", 150, partial(command, "-m", "pytest", "test_all.py", "-q", "-k", "test_a_gpu", "-rpfE")),
        *[(f"{name}, {step}", 120, steps(name, step, rounds)) for name, rounds in (
            ("wan-1.3b", 3), ("wan-1.3b-81", 1)) for step in ("dpo", "sft", "forward")],
        *[(f"wan-14b, dpo, {who}", 90, steps("wan-14b", "dpo", 1, whose=[who], modes=["compiled"]))
          for who in ("ours", "ours, decoupled")],
        ("autoencoder", 60, partial(autoencoder, args.preset or "wan-1.3b-81")),
        ("main job", 60, partial(command, "train_align.py", *paths, *short))]
    for name, seconds, part in parts:
        try:
            if time.time() - start + seconds > 60 * args.minutes:
                raise UserError("not begun, as too few minutes are left")
            found[name] = part()
        except Exception as e:
            found[name] = [{"error": f"{type(e).__name__}: {str(e)[:300]}"}]
        show(name, found[name])
        data.write_json("gpu.json", found)
        gc.collect()
        torch.cuda.empty_cache()

if __name__ == "__main__":
    if sys.argv[1:2] in (["--bench"], ["--gpu"]):
        raise SystemExit(data.launch(bench if sys.argv.pop(1) == "--bench" else gpu, Bench, Bench.__doc__))
    raise SystemExit(pytest.main([__file__, "-q"]))
