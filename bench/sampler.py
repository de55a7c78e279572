"""The sampler beside transformers and beside its roofline, in one run.

    python -m bench sampler --model DIR    a real checkpoint on GSM8K questions, 64 new tokens,
                                           beside transformers generate (CPU or GPU), and how far
                                           the trainer's log-probs are from the sampler's; without
                                           a GPU the default
    python -m bench sampler                one GPU, random weights of the 0.5B and 1.5B shapes: GRPO
                                           rollouts, nano-vllm's workload, decode steps
    python -m bench sampler --smoke        the second on tiny shapes, on any machine: shows that the
                                           bench runs, its figures mean nothing

The first call of everything stands apart (cold: it compiles kernels and records graphs); warm is
the median of --rounds calls after it, with their spread.

Roofline: the schedule of the very rollouts that were sampled, every step at the larger of
bytes / copy bandwidth and operations / matrix rate (both measured at the start), body, head and
attention one after another, each prompt's keys and values read once for all its samples, plus
prefill.
"""

import runtime.cpu  # noqa: F401 (before torch)

# isort: split

import argparse
import copy
import json
import os
import random
import resource
import tempfile
from dataclasses import dataclass
from functools import partial

import torch

import model as model_file
from batches import Sequence, score
from bench.clock import Timing, call, device_name
from bench.kernels import measured_ceilings
from bench.predict import shape_config
from runtime import hugging_face
from runtime.exact import make_exact
from runtime.tokenizer import ChatTokenizer
from sampler import Request, Sampler
from tasks.problems import load_problems

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@dataclass
class Running:
    """A sample on its way through the roofline's schedule."""

    request: int
    length: int  # tokens that it will have
    done: int = 0


# ---- a real checkpoint beside transformers generate ----


def bench_checkpoint(options):
    """Both sides on GSM8K questions, then how far the trainer is from the sampler -> rows."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise SystemExit("--model compares with transformers: pip install transformers") from None

    model = hugging_face.load_model(options.model, DTYPE, DEVICE).requires_grad_(False)
    sampler = Sampler(model, slots=64)
    peer = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPE).to(DEVICE).eval()
    cases = question_cases(ChatTokenizer(options.model), options.new, options.data)

    print(f"tokens/s, medians of {options.rounds} warm calls, taken in turn")
    print(
        f"{'sequences':>10} {'ours cold':>10} {'warm':>8} {'spread':>7}"
        f" {'generate cold':>14} {'warm':>8} {'spread':>7} {'ratio':>7} {'of CPU s':>9}"
    )
    rows = []
    for name in options.cases.split(","):
        rows.append(bench_case(name, sampler, peer, cases[name], options.rounds))
    completions = sampler.generate(cases["16"])
    rows.append(log_prob_gap(model, cases["16"], completions, "real weights"))
    return rows


def question_cases(tokenizer, new, data):
    """name -> requests; the same questions for every case.

    Nothing stops early, so both sides draw the same number of tokens.
    """
    problems = load_problems("gsm8k", "test", data=data)[:64]
    prompts = [tokenizer.encode_chat([{"role": "user", "content": p.question}]) for p in problems]

    def ask(count, n):
        return [
            Request(prompt, n=n, max_new_tokens=new, id=i)
            for i, prompt in enumerate(prompts[:count])
        ]

    return {"1": ask(1, 1), "16": ask(16, 1), "64": ask(64, 1), "4 x 16": ask(4, 16)}


def bench_case(name, sampler, peer, requests, rounds):
    """One line of the table: both sides on the same requests."""
    our_calls = []
    peer_calls = []
    for _ in range(1 + rounds):
        our_calls.append(call(partial(sampler.generate, requests)))
        peer_calls.append(call(partial(generate_with, peer, requests)))
    ours = Timing([c.wall for c in our_calls])
    theirs = Timing([c.wall for c in peer_calls])
    our_cpu = Timing([c.cpu for c in our_calls])
    their_cpu = Timing([c.cpu for c in peer_calls])

    tokens = sum(r.n for r in requests) * requests[0].max_new_tokens
    row = {
        "case": name,
        "tokens": tokens,
        "ours": ours.columns(),
        "generate": theirs.columns(),
        "ratio": theirs.warm / ours.warm,
        "cpu_ratio": their_cpu.warm / our_cpu.warm,
        "prefill_share": sampler.stats["prefill_seconds"] / sampler.stats["seconds"],
    }
    print(
        f"{name:>10} {tokens / ours.cold:10.1f} {tokens / ours.warm:8.1f} {percent(ours)}"
        f" {tokens / theirs.cold:14.1f} {tokens / theirs.warm:8.1f} {percent(theirs)}"
        f" {row['ratio']:7.2f} {row['cpu_ratio']:9.2f}",
        flush=True,
    )
    return row


def percent(timing):
    """The spread of the warm calls, for a column of 7."""
    return f"{timing.spread / timing.warm:7.1%}"


def generate_with(peer, requests):
    """transformers generate on the same work.

    Left padding, sampling from the whole softmax, every sample a row of its own.
    """
    prompts = []
    for request in requests:
        prompts += [request.prompt] * request.n
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = [[0] * pad + prompt for pad, prompt in zip(padding, prompts)]
    mask = [[0] * pad + [1] * len(prompt) for pad, prompt in zip(padding, prompts)]
    new = requests[0].max_new_tokens
    with torch.inference_mode():
        return peer.generate(
            torch.tensor(ids, device=DEVICE),
            attention_mask=torch.tensor(mask, device=DEVICE),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )


def log_prob_gap(model, requests, completions, label):
    """How far the trainer's forward is from the log-probs that the sampler returned -> row.

    Over every sampled token: mean and largest difference, and k3.
    """
    sequences = []
    sampled = []
    for request, group in zip(requests, completions):
        for completion in group:
            sequences.append(Sequence(request.prompt, completion.tokens))
            sampled += completion.logprobs
    scored = []
    for logprobs in score(model, sequences, 16_384, DEVICE, requests[0].temperature):
        scored += logprobs

    difference = (torch.tensor(scored) - torch.tensor(sampled)).double()
    k3 = difference.expm1() - difference  # rho - 1 - log rho: without rounding a tiny one to 0
    row = {
        "gap": label,
        "tokens": len(sampled),
        "mean": float(difference.abs().mean()),
        "max": float(difference.abs().max()),
        "k3": float(k3.mean()),
    }
    print(
        f"log-prob, trainer - sampler, {label}: mean {row['mean']:.2e}, max {row['max']:.2e}, "
        f"k3 {row['k3']:.2e} over {row['tokens']} tokens",
        flush=True,
    )
    return row


# ---- random weights: workloads, decode steps and peers beside the roofline ----


def bench_random(options):
    ceilings = measured_ceilings(512 if options.smoke else 8192)
    print(
        f"copy {ceilings.bandwidth / 1e12:.3f} TB/s, "
        f"matrix product {ceilings.rate / 1e12:.1f} TFLOP/s"
    )
    rows = []
    for name in ["smoke"] if options.smoke else options.shapes.split(","):
        print(f"\n{name}")
        found = bench_shape(name, options, ceilings)
        rows += [row | {"model": name} for row in found]
    return rows


def bench_shape(name, options, ceilings):
    """All that is measured of one shape -> rows."""
    if options.smoke:
        config = model_file.Config(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
        )
        slots, batches, context = 8, (4,), 48
    else:
        config = shape_config(name)
        slots, batches, context = 0, (64, 256, 512), 1024  # 0: all that memory holds
    model = model_file.random_model(config, seed=0, dtype=DTYPE).to(DEVICE).requires_grad_(False)

    workloads = make_workloads(config.vocab_size, options.smoke)
    if name == "135M":
        workloads = small_run(config.vocab_size)
    print(
        f"{'workload':>20} {'tokens':>9} {'cold tok/s':>11} {'warm tok/s':>11} {'spread':>7}"
        f" {'roofline tok/s':>15} {'warm of it':>11}"
    )
    rows = []
    for label, requests in workloads.items():
        rows += bench_workload(label, model, requests, slots, ceilings, options.rounds)

    print(
        f"{'decode step, rows':>20} {'per prompt':>11} {'cold ms':>9} {'warm ms':>9} {'spread':>7}"
        f" {'floor ms':>9} {'ratio':>6}"
    )
    for batch in batches:
        for n in (1, min(16, batch)):
            rows.append(bench_step(model, batch, n, context, ceilings, options.rounds))

    if options.no_peers:
        return rows
    return rows + bench_peers(model, next(iter(workloads.values())))


def make_workloads(vocabulary, smoke):
    """name -> requests.

    GRPO: 64 prompts of 512 tokens x 16 samples, ragged to 1,024. Random weights draw almost
    uniformly, so a stop set of V / 400 ids ends responses after 400 tokens on average.
    nano-vllm: its own bench, 256 requests of 100 to 1,024 tokens in and out.
    """
    if smoke:
        groups, samples, length, new, mean = 4, 4, 40, 30, 20
        count, shortest, longest = 8, 10, 40
    else:
        groups, samples, length, new, mean = 64, 16, 512, 1024, 400
        count, shortest, longest = 256, 100, 1024
    chance = random.Random(0)
    stop_ids = tuple(range(max(1, vocabulary // mean)))

    grpo = []
    for i in range(groups):
        prompt = [chance.randrange(vocabulary) for _ in range(length)]
        request = Request(prompt, n=samples, max_new_tokens=new, stop_ids=stop_ids, id=i)
        grpo.append(request)

    nano_vllm = []
    for i in range(count):
        length = chance.randint(shortest, longest)
        prompt = [chance.randrange(vocabulary) for _ in range(length)]
        new = chance.randint(shortest, longest)
        nano_vllm.append(Request(prompt, max_new_tokens=new, id=i))
    return {"GRPO": grpo, "nano-vllm": nano_vllm}


def small_run(vocabulary):
    """name -> requests: a step of the 135M model's GSM8K run, completions of 110 tokens on average.

    64 prompts of 400 tokens x 16 samples, ragged to 256.
    """
    chance = random.Random(0)
    stop_ids = tuple(range(vocabulary // 110))
    requests = []
    for i in range(64):
        prompt = [chance.randrange(vocabulary) for _ in range(400)]
        requests.append(Request(prompt, n=16, max_new_tokens=256, stop_ids=stop_ids, id=i))
    return {"135M run": requests}


def bench_workload(name, model, requests, slots, ceilings, rounds):
    """The workload as it is; GRPO's also with every prompt prefilled per sample, and exact."""
    variants = {name: {}}
    if requests[0].n > 1:
        variants[f"{name}, sharing off"] = {"share_prefix": False}
        variants[f"{name}, exact"] = {"exact": True}

    rows = []
    for label, options in variants.items():
        sampler = Sampler(model, slots=slots, **options)
        calls = [call(partial(sampler.generate, requests)) for _ in range(1 + rounds)]
        timing = Timing([c.wall for c in calls])
        completions = calls[-1].result
        tokens = sum(len(c.tokens) for group in completions for c in group)
        floor = roofline(model.config, requests, completions, sampler.slots, ceilings)
        row = {
            "workload": label,
            "tokens": tokens,
            **timing.columns(),
            "tok_s": tokens / timing.warm,
            "roofline_tok_s": tokens / floor,
            "prefill_share": sampler.stats["prefill_seconds"] / sampler.stats["seconds"],
        }
        rows.append(row)
        print(
            f"{label:>20} {tokens:9} {tokens / timing.cold:11.0f} {row['tok_s']:11.0f}"
            f" {percent(timing)} {row['roofline_tok_s']:15.0f} {floor / timing.warm:11.1%}",
            flush=True,
        )

        sampler.release()
        if requests[0].n > 1:
            trainer = exact_twin(model) if "exact" in options else model
            rows.append(log_prob_gap(trainer, requests[:4], completions[:4], label))
    return rows


def exact_twin(model):
    """The same weights with the exact mode's forward."""
    twin = copy.copy(model)  # shallow: parameters are shared
    make_exact(twin)
    return twin


def roofline(config, requests, completions, slots, ceilings):
    """Seconds of the floor for these rollouts.

    Rows are filled in the sampler's order and refilled at every step.
    """
    # Prefill is one product over all prompt tokens: its floor per token is that of many.
    prompt_tokens = sum(len(request.prompt) for request in requests)
    many = 10**6
    seconds = prompt_tokens * step_floor(config, many, 0, ceilings) / many

    longest_first = sorted(
        range(len(requests)),
        key=lambda i: (-requests[i].max_new_tokens, -len(requests[i].prompt)),
    )
    queue = []
    for i in longest_first:
        queue += [Running(i, len(completion.tokens)) for completion in completions[i]]
    queue.reverse()  # the next one is the last

    rows = []
    while queue or rows:
        while queue and len(rows) < slots:
            rows.append(queue.pop())
        prompts = {row.request for row in rows}  # read once for all their samples
        cached = sum(len(requests[i].prompt) for i in prompts) + sum(row.done for row in rows)
        seconds += step_floor(config, len(rows), cached, ceilings)
        for row in rows:
            row.done += 1
        rows = [row for row in rows if row.done < row.length]
    return seconds


def step_floor(config, rows, cached, ceilings):
    """Seconds of one decode step of `rows` rows that reads `cached` tokens of the cache.

    Body, head and attention do not overlap.
    """
    hidden = config.hidden_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention = hidden * (heads + 2 * kv_heads) * config.head_dim  # q, k, v
    attention += heads * config.head_dim * hidden  # output
    mlp = 3 * hidden * config.intermediate_size
    body = config.num_hidden_layers * (attention + mlp)
    head = config.vocab_size * hidden
    token_bytes = 2 * config.num_hidden_layers * kv_heads * config.head_dim * DTYPE.itemsize
    return (
        product_seconds(body, rows, ceilings)
        + product_seconds(head, rows, ceilings)
        + cached * token_bytes / ceilings.bandwidth
    )


def product_seconds(weights, rows, ceilings):
    """Floor of a product of `rows` rows with so many weights: reading them, or the arithmetic."""
    reading = weights * DTYPE.itemsize / ceilings.bandwidth
    return max(reading, 2 * weights * rows / ceilings.rate)


def bench_step(model, batch, n, context, ceilings, rounds):
    """Milliseconds of a decode step of `batch` rows, of 64 around `context` tokens -> row.

    n: samples of a prompt; 1: rows on their own; else the prompt that they share is half of the
    context.
    """
    vocabulary = model.config.vocab_size
    new = 64 if context > 64 else 8
    length = context - new // 2 if n == 1 else context // 2
    requests = []
    for i in range(batch // n):
        prompt = [(7 * i + j) % vocabulary for j in range(length)]
        requests.append(Request(prompt, n=n, max_new_tokens=new, id=i))

    sampler = Sampler(model, slots=batch)
    steps = []
    for _ in range(1 + rounds):
        sampler.generate(requests)
        steps.append(sampler.stats["decode_seconds"] / sampler.stats["steps"])
    timing = Timing(steps)
    sampler.release()

    cached = batch * context
    if n > 1:  # prompts once, and half of the new tokens on average
        cached = batch // n * length + batch * new // 2
    floor = step_floor(model.config, batch, cached, ceilings)
    print(
        f"{batch:20} {n:11} {1e3 * timing.cold:9.2f} {1e3 * timing.warm:9.2f} {percent(timing)}"
        f" {1e3 * floor:9.2f} {timing.warm / floor:6.2f}",
        flush=True,
    )
    return {"batch": batch, "samples_per_prompt": n, **timing.columns(), "floor_s": floor}


def bench_peers(model, requests):
    """transformers on 1/8 of the GRPO workload, from a saved copy of the random weights -> rows.

    generate, and on a GPU also generate with a static cache and continuous batching. One warm call
    each: they take minutes.
    """
    try:
        from transformers import AutoModelForCausalLM, GenerationConfig
    except ImportError:
        return []
    with tempfile.TemporaryDirectory() as folder:
        hugging_face.save_model(model.state_dict(), model.config, folder, dtype=DTYPE)
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(DEVICE).eval()

    requests = requests[: max(1, len(requests) // 8)]
    stop_ids = requests[0].stop_ids
    limits = {
        "max_new_tokens": requests[0].max_new_tokens,
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "pad_token_id": 0,
        "eos_token_id": list(stop_ids),
    }
    prompts = []
    for request in requests:
        prompts += [request.prompt] * request.n
    batch = torch.tensor(prompts, device=DEVICE)

    def generate(**more):
        config = GenerationConfig(**limits, **more)
        mask = torch.ones_like(batch)
        found = peer.generate(batch, attention_mask=mask, generation_config=config)
        return found[:, batch.shape[1] :].tolist()

    def continuous_batching():
        config = GenerationConfig(**limits)
        found = peer.generate_batch(prompts, generation_config=config)
        return [request.generated_tokens for request in found.values()]

    peers = {"generate": generate}
    if DEVICE.type == "cuda":
        # On a CPU the first would compile for minutes, the second fill all memory with its cache.
        peers["generate, static"] = partial(generate, cache_implementation="static")
        peers["continuous batching"] = continuous_batching
    print(f"{'transformers':>20} {'tokens':>9} {'cold tok/s':>11} {'warm tok/s':>11}")
    with torch.no_grad():  # not inference_mode: continuous batching works in threads of its own
        return [attempt(label, run, set(stop_ids)) for label, run in peers.items()]


def attempt(label, run, stop_ids):
    """A peer's rate, or the reason that there is none -> row."""
    try:
        calls = [call(run), call(run)]
        if not all(calls[-1].result):
            raise RuntimeError("some requests came back empty")
    except Exception as problem:
        sentence = (str(problem).splitlines() or [""])[0]
        print(f"{label:>20} {type(problem).__name__}: {sentence[:100]}")
        return {"peer": label, "failed": type(problem).__name__}

    timing = Timing([c.wall for c in calls])
    tokens = sum(until_stop(ids, stop_ids) for ids in calls[-1].result)
    print(
        f"{label:>20} {tokens:9} {tokens / timing.cold:11.0f} {tokens / timing.warm:11.0f}",
        flush=True,
    )
    return {"peer": label, "tokens": tokens, **timing.columns(), "tok_s": tokens / timing.warm}


def until_stop(ids, stop_ids):
    """How many tokens there are up to the first stop token, the padding behind it left out."""
    for count, token in enumerate(ids, 1):
        if token in stop_ids:
            return count
    return len(ids)


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
        "--data", help="folder of the GSM8K questions (default: where tasks/data.py looks)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of both sides"
    )
    parser.add_argument("--shapes", default="0.5B,1.5B", help="of the second bench")
    parser.add_argument("--rounds", type=int, default=3, help="warm calls of each measurement")
    parser.add_argument("--no_peers", action="store_true", help="leave transformers out")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any machine")
    options = parser.parse_args(arguments)
    if DEVICE.type == "cpu" and not options.smoke:
        options.model = options.model or os.environ.get("RARECODE_MODEL", "../models/smollm2-135m")
    torch.set_num_threads(options.threads)

    print(f"{device_name()}, torch {torch.__version__}")
    rows = bench_checkpoint(options) if options.model else bench_random(options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KB on Linux
    found = {
        "device": device_name(),
        "torch": torch.__version__,
        "peak_host_memory_gb": round(peak, 2),
        "rows": rows,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
