"""The sampler beside transformers and beside its roofline, in one run.

    python -m bench sampler --model DIR        a real checkpoint on GSM8K questions, 64 new tokens, beside transformers generate (CPU or GPU), and
                                               how far the trainer's log-probs are from the sampler's; without a GPU the default
    python -m bench sampler                    one GPU, random weights of the 0.5B and 1.5B shapes: GRPO rollouts, nano-vllm's workload, decode steps
    python -m bench sampler --smoke            the second on tiny shapes, on any machine: shows that the bench runs, its figures mean nothing

Roofline: the schedule of the very rollouts that were sampled, every step at the larger of bytes / copy bandwidth and operations / matrix rate (both
measured at the start), body, head and attention one after another, each prompt's keys and values read once for all its samples, plus prefill.
"""

import runtime.cpu  # noqa: F401 (before torch)

# isort: split

import argparse
import copy
import json
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from dataclasses import replace

import torch

import model as model_file
from batches import Sequence, score
from bench.kernels import measured_ceilings
from runtime import hugging_face
from runtime.exact import make_exact
from sampler import Request, Sampler

SHAPES = {  # hidden, intermediate, layers, query heads, KV heads, head dim, vocabulary
    "0.5B": (896, 4864, 24, 14, 2, 64, 151_936),
    "1.5B": (1536, 8960, 28, 12, 2, 128, 151_936),
    "smoke": (128, 256, 2, 6, 2, 32, 512),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def timed(run):
    """(wall seconds, CPU seconds, result)"""
    start, cpu = time.perf_counter(), time.process_time()
    result = run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu, result


# A real checkpoint beside transformers generate


def question_cases(tokenizer, new, data):
    """name -> requests; the same questions for every case. Nothing stops early, so both sides draw the same number of tokens."""
    from tasks.problems import load_problems

    problems = load_problems("gsm8k", "test", data=data)[:64]
    prompts = [tokenizer.encode_chat([{"role": "user", "content": p.question}]) for p in problems]
    ask = lambda count, n: [
        Request(p, n=n, max_new_tokens=new, id=i) for i, p in enumerate(prompts[:count])
    ]
    return {"1": ask(1, 1), "16": ask(16, 1), "64": ask(64, 1), "4 x 16": ask(4, 16)}


def generate_with(peer, requests):
    """transformers generate on the same work: left padding, sampling from the whole softmax, every sample a row of its own."""
    rows = [r.prompt for r in requests for _ in range(r.n)]
    width, new = max(map(len, rows)), requests[0].max_new_tokens
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=DEVICE)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=DEVICE)
    with torch.inference_mode():
        return peer.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )


def bench_checkpoint(options):
    from transformers import AutoModelForCausalLM

    from runtime.tokenizer import ChatTokenizer

    ours = Sampler(
        hugging_face.load_model(options.model, DTYPE, DEVICE).requires_grad_(False), slots=64
    )
    peer = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPE).to(DEVICE).eval()
    cases = question_cases(ChatTokenizer(options.model), options.new, options.data)
    warm = [
        replace(cases["16"][0], max_new_tokens=2)
    ]  # weights are packed, allocators filled, kernels compiled
    ours.generate(warm), generate_with(peer, warm)
    print(
        f"{'sequences':>10} {'ours tok/s':>12} {'generate tok/s':>15} {'ratio':>7} {'ratio of CPU s':>15}   (medians of {options.rounds}, taken in turn)"
    )
    rows = []
    for name in options.cases.split(","):
        requests = cases[name]
        tokens = sum(r.n for r in requests) * options.new
        times = [
            (timed(lambda: ours.generate(requests)), timed(lambda: generate_with(peer, requests)))
            for _ in range(options.rounds)
        ]
        median = lambda side, clock: statistics.median(t[side][clock] for t in times)
        row = {
            "case": name,
            "ours": tokens / median(0, 0),
            "generate": tokens / median(1, 0),
            "ratio": median(1, 0) / median(0, 0),
        }
        row |= {
            "cpu_ratio": median(1, 1) / median(0, 1),
            "prefill_share": ours.stats["prefill_seconds"] / ours.stats["seconds"],
        }
        rows.append(row)
        print(
            f"{name:>10} {row['ours']:12.1f} {row['generate']:15.1f} {row['ratio']:7.2f} {row['cpu_ratio']:15.2f}",
            flush=True,
        )
    return rows + [gap(ours.model, cases["16"], ours.generate(cases["16"]), "real weights")]


def gap(model, requests, completions, label):
    """How far the trainer's forward is from the log-probs the sampler returned, over every sampled token: mean and largest difference, k3."""
    pairs = [(r, c) for r, group in zip(requests, completions) for c in group]
    trainer = score(
        model,
        [Sequence(r.prompt, c.tokens) for r, c in pairs],
        16_384,
        DEVICE,
        requests[0].temperature,
    )
    ours, theirs = (
        torch.tensor([p for row in rows for p in row])
        for rows in (trainer, [c.logprobs for _, c in pairs])
    )
    difference = (ours - theirs).double()
    k3 = difference.expm1() - difference  # rho - 1 - log rho: without rounding a tiny one to 0
    row = {
        "gap": label,
        "tokens": len(ours),
        "mean": float(difference.abs().mean()),
        "max": float(difference.abs().max()),
        "k3": float(k3.mean()),
    }
    print(
        f"log-prob, trainer - sampler, {label}: mean {row['mean']:.2e}, max {row['max']:.2e}, k3 {row['k3']:.2e} over {len(ours)} tokens",
        flush=True,
    )
    return row


# Random weights: workloads and roofline


def random_weights(name):
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = SHAPES[name]
    config = model_file.Config(vocabulary, hidden, intermediate, layers, heads, kv_heads, head_dim)
    return model_file.random_model(config, seed=0, dtype=DTYPE).to(DEVICE).requires_grad_(False)


def workloads(vocabulary, smoke):
    """GRPO: 64 prompts of 512 tokens x 16 samples, ragged to 1,024: random weights draw almost uniformly, so a stop set of V / 400 ids ends responses after
    400 tokens on average. nano-vllm: its own bench, 256 requests of 100 to 1,024 tokens in and out."""
    rng = random.Random(0)
    prompt = lambda length: [rng.randrange(vocabulary) for _ in range(length)]
    stop = tuple(range(max(1, vocabulary // (20 if smoke else 400))))
    groups, samples, length, new = (4, 4, 40, 30) if smoke else (64, 16, 512, 1024)
    grpo = [
        Request(prompt(length), n=samples, max_new_tokens=new, stop_ids=stop, id=i)
        for i in range(groups)
    ]
    count, low, high = (8, 10, 40) if smoke else (256, 100, 1024)
    nano = [
        Request(prompt(rng.randint(low, high)), max_new_tokens=rng.randint(low, high), id=i)
        for i in range(count)
    ]
    return {"GRPO": grpo, "nano-vllm": nano}


def step_floor(config, rows, tokens, bandwidth, rate):
    """Seconds of one decode step of `rows` rows that reads `tokens` cached tokens (kernels.md, section 4: phases do not overlap)."""
    c, size = config, DTYPE.itemsize
    width = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    body = c.num_hidden_layers * (
        c.hidden_size * width
        + c.num_attention_heads * c.head_dim * c.hidden_size
        + 3 * c.hidden_size * c.intermediate_size
    )
    head, kv = (
        c.vocab_size * c.hidden_size,
        2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size,
    )
    product = lambda weights: max(weights * size / bandwidth, 2 * weights * rows / rate)
    return product(body) + product(head) + tokens * kv / bandwidth


def roofline(config, requests, completions, slots, bandwidth, rate):
    """Seconds of the floor for these rollouts: rows are filled in the sampler's order and refilled at every step."""
    order = sorted(
        range(len(requests)), key=lambda i: (-requests[i].max_new_tokens, -len(requests[i].prompt))
    )
    queue = [(i, len(c.tokens)) for i in order for c in completions[i]][::-1]
    prefill = (
        sum(len(r.prompt) for r in requests) * step_floor(config, 10**6, 0, bandwidth, rate) / 10**6
    )
    seconds, rows = prefill, []
    while queue or rows:
        while queue and len(rows) < slots:
            request, length = queue.pop()
            rows.append((request, 0, length))
        cached = sum(len(requests[i].prompt) for i in {row[0] for row in rows}) + sum(
            row[1] for row in rows
        )
        seconds += step_floor(config, len(rows), cached, bandwidth, rate)
        rows = [(i, done + 1, length) for i, done, length in rows if done + 1 < length]
    return seconds


def bench_workload(name, model, requests, slots, bandwidth, rate, rounds):
    """The workload as it is; GRPO's also with each sample's prompt prefilled alone, and in the exact mode."""
    rows, variants = [], {name: {}}
    if requests[0].n > 1:
        variants |= {
            f"{name}, sharing off": dict(share_prefix=False),
            f"{name}, exact": dict(exact=True),
        }
    for label, options in variants.items():
        sampler = Sampler(model, slots=slots, **options)
        sampler.generate(requests[:2])  # records graphs and compiles kernels
        runs = [timed(lambda: sampler.generate(requests)) for _ in range(rounds)]
        seconds, completions = statistics.median(r[0] for r in runs), runs[-1][2]
        tokens = sum(len(c.tokens) for group in completions for c in group)
        floor = roofline(model.config, requests, completions, slots, bandwidth, rate)
        share = sampler.stats["prefill_seconds"] / sampler.stats["seconds"]
        rows.append(
            {
                "workload": label,
                "tokens": tokens,
                "tok_s": tokens / seconds,
                "roofline_tok_s": tokens / floor,
                "prefill_share": share,
            }
        )
        print(
            f"{label:>20} {tokens:9} tokens {tokens / seconds:10.0f} tok/s, {floor / seconds:5.1%} of the roofline {tokens / floor:10.0f}",
            flush=True,
        )
        sampler.release()
        if requests[0].n > 1:
            rows.append(
                gap(
                    exactly(model) if "exact" in options else model,
                    requests[:4],
                    completions[:4],
                    label,
                )
            )
    return rows


def exactly(model):
    """The same weights with the exact mode's forward."""
    other = copy.copy(model)  # shallow: parameters are shared
    make_exact(other)
    return other


def bench_steps(model, batches, context, bandwidth, rate):
    """Milliseconds of a decode step, 64 of them around `context` tokens: rows on their own, and in groups of 16 that share half of it."""
    rows, vocabulary = [], model.config.vocab_size
    for batch in batches:
        for n in (1, min(16, batch)):
            new = 64 if context > 64 else 8
            length = context - new // 2 if n == 1 else context // 2
            requests = [
                Request(
                    [(7 * i + j) % vocabulary for j in range(length)], n=n, max_new_tokens=new, id=i
                )
                for i in range(batch // n)
            ]
            sampler = Sampler(model, slots=batch)
            sampler.generate(requests)
            sampler.generate(requests)
            step = sampler.stats["decode_seconds"] / sampler.stats["steps"]
            cached = batch // n * length + batch * new // 2 if n > 1 else batch * context
            floor = step_floor(model.config, batch, cached, bandwidth, rate)
            rows.append(
                {"batch": batch, "samples_per_prompt": n, "ms": 1e3 * step, "floor_ms": 1e3 * floor}
            )
            print(
                f"decode step, {batch:4} rows, {n:2} per prompt: {1e3 * step:8.2f} ms, floor {1e3 * floor:7.2f} ms, ratio {step / floor:5.2f}",
                flush=True,
            )
            sampler.release()
    return rows


def bench_peers(name, model, workload):
    """transformers on the GRPO workload: continuous batching and generate, 1/8 of the prompts, from a saved copy of the random weights."""
    try:
        from transformers import AutoModelForCausalLM, GenerationConfig
    except ImportError:
        return []
    requests, rows = workload["GRPO"][: max(1, len(workload["GRPO"]) // 8)], []
    with tempfile.TemporaryDirectory() as folder:
        hugging_face.save_model(model.state_dict(), model.config, folder, dtype=DTYPE)
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(DEVICE).eval()
    limits = dict(
        max_new_tokens=requests[0].max_new_tokens,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
    )
    prompts = [r.prompt for r in requests for _ in range(r.n)]
    config = GenerationConfig(eos_token_id=list(requests[0].stop_ids), **limits)
    batch = torch.tensor(prompts, device=DEVICE)
    mask = torch.ones_like(batch)
    with torch.no_grad():  # not inference_mode: continuous batching works in threads of its own
        runs = {
            "transformers generate": lambda: peer.generate(
                batch, attention_mask=mask, generation_config=config
            )[:, len(prompts[0]) :].tolist(),
        }
        if (
            DEVICE.type == "cuda"
        ):  # on a CPU the first would compile for minutes, the second fill all memory with its cache
            static = GenerationConfig(
                eos_token_id=list(requests[0].stop_ids), cache_implementation="static", **limits
            )
            runs["transformers generate, static"] = lambda: peer.generate(
                batch, attention_mask=mask, generation_config=static
            )[:, len(prompts[0]) :].tolist()
            runs["transformers continuous batching"] = lambda: [
                r.generated_tokens
                for r in peer.generate_batch(prompts, generation_config=config).values()
            ]
        for label, run in runs.items():
            rows.append(attempt(label, run, set(requests[0].stop_ids)))
    return rows


def attempt(label, run, stop):
    """A peer's rate, or the reason that there is none."""
    try:
        run()
        seconds, _, sequences = timed(run)
        if not all(sequences):
            raise RuntimeError("some requests came back empty")
    except Exception as problem:
        print(
            f"{label}: {type(problem).__name__}: {str(problem).splitlines()[0][:100] if str(problem) else ''}"
        )
        return {"peer": label, "failed": type(problem).__name__}
    tokens = sum(next((i + 1 for i, t in enumerate(s) if t in stop), len(s)) for s in sequences)
    print(f"{label:>34} {tokens:9} tokens {tokens / seconds:10.0f} tok/s", flush=True)
    return {"peer": label, "tokens": tokens, "tok_s": tokens / seconds}


def bench_random(options):
    bandwidth, rate = measured_ceilings(512 if options.smoke else 8192)
    print(f"copy {bandwidth / 1e12:.3f} TB/s, matrix product {rate / 1e12:.1f} TFLOP/s")
    rows = []
    for name in ["smoke"] if options.smoke else options.shapes.split(","):
        model = random_weights(name)
        workload = workloads(model.config.vocab_size, options.smoke)
        print(f"{name}:")
        found = [
            r
            for w, requests in workload.items()
            for r in bench_workload(
                w, model, requests, 8 if options.smoke else 512, bandwidth, rate, options.rounds
            )
        ]
        found += bench_steps(
            model,
            (4,) if options.smoke else (64, 256, 512),
            48 if options.smoke else 1024,
            bandwidth,
            rate,
        )
        rows += [row | {"model": name} for row in found + bench_peers(name, model, workload)]
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench sampler",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="checkpoint folder or hub id: the first bench")
    parser.add_argument(
        "--cases", default="1,16,64,4 x 16", help="of the first bench, comma-separated"
    )
    parser.add_argument("--new", type=int, default=64, help="new tokens of the first bench")
    parser.add_argument(
        "--data", help="folder of the GSM8K questions (default: where tasks.py looks)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of both sides"
    )
    parser.add_argument("--shapes", default="0.5B,1.5B", help="of the second bench")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any machine")
    options = parser.parse_args(arguments)
    if DEVICE.type == "cpu" and not options.smoke:
        options.model = options.model or os.environ.get("RARECODE_MODEL", "../models/smollm2-135m")
    torch.set_num_threads(options.threads)
    device = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"CPU ({platform.machine()}), {options.threads} threads"
    )
    print(f"{device}, torch {torch.__version__}")
    rows = bench_checkpoint(options) if options.model else bench_random(options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KB on Linux
    print(
        json.dumps(
            {
                "device": device,
                "torch": torch.__version__,
                "peak_host_memory_gb": round(peak, 2),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
