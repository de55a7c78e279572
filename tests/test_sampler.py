"""What must always hold of rollouts (DESIGN.md, invariants 1, 3, 6, 9).

On random models, and to the last bit where it says so.
"""

import dataclasses
import gc
import random
import weakref

import pytest
import torch

import decode
from kernels import native
from kernels.logprob import token_logprobs
from kernels.sampling import sample_tokens, uniforms_reference
from model import Config, make_segments, random_model
from pages import StalePageError
from runtime.tokenizer import train_bpe
from sampler import Request, Sampler, StopSearch

CONFIG = Config(
    vocab_size=331,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=2048,
)
STOP_IDS = (3, 5, 8, 13, 21, 34, 55, 89)
LENGTHS = (1, 2, 15, 16, 17, 40, 65, 90)  # of prompts: around pages of 16 tokens
PAGE_BYTES = 2 * 2 * 2 * 32 * 16 * 4  # keys and values, layers, KV heads, head dim, tokens, fp32


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, seed=1, std=0.15).requires_grad_(False)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # tiny tensors: a second thread only costs time


def make_requests(n=4, new=40, stop_ids=STOP_IDS, lengths=LENGTHS, **more):
    generator = torch.Generator().manual_seed(7)
    made = []
    for i, length in enumerate(lengths):
        prompt = torch.randint(0, 331, (length,), generator=generator).tolist()
        identity = {"seed": 11, "id": 100 + i}
        made.append(Request(prompt, n=n, max_new_tokens=new, stop_ids=stop_ids, **identity, **more))
    return made


def sample(model, requests, **options):
    return Sampler(model, **options).generate(requests)


def kernels_way(model, **options):
    """A sampler that goes CUDA's way: kernels/, packed prefill, fixed sizes, a chunk behind.

    Here the kernels are their torch references.
    """
    sampler = Sampler(model, page_size=32, **options)
    sampler.cpu = False
    sampler.chunk, sampler.lag = 3, 1
    return sampler


def drawn(groups):
    """All that must be the same, without the position in the list of requests."""
    anywhere = []
    for group in groups:
        anywhere.append([dataclasses.replace(completion, request=0) for completion in group])
    return anywhere


def tokens_of(groups):
    return [[completion.tokens for completion in group] for group in groups]


def forward(model, tokens):
    """Hidden states of one sequence, as the trainer computes them."""
    segments = make_segments([len(tokens)])
    return model.hidden(torch.tensor(tokens), torch.arange(len(tokens)), segments)


def predictions(model, request, completion):
    """Hidden states from which the completion's tokens are predicted, [new, D]."""
    hidden = forward(model, request.prompt + completion.tokens)
    return hidden[len(request.prompt) - 1 : -1]


def same_logprobs(model, requests, groups):
    """As the trainer's, up to fp32's rounding.

    On these requests the trainer's own are up to 1.4e-5 and in the mean 2e-6 from float64.
    """
    gaps = []
    for request, group in zip(requests, groups):
        for completion in group:
            hidden = predictions(model, request, completion)
            targets = torch.tensor(completion.tokens)
            temperature = request.temperature or 1.0
            logprobs, _ = token_logprobs(hidden, model.head_weight, targets, temperature)
            gaps.append(logprobs - torch.tensor(completion.logprobs))
    gaps = torch.cat(gaps).abs()
    return gaps.max() < 2e-5 and gaps.mean() < 4e-6


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_are_the_trainers(model, temperature):
    requests = make_requests(temperature=temperature)
    groups = sample(model, requests)
    reasons = {completion.finish_reason for group in groups for completion in group}
    assert reasons == {"stop", "length"} or temperature == 0
    assert same_logprobs(model, requests, groups)


def test_logprobs_of_long_sequences_are_the_trainers(model):
    requests = make_requests(n=2, new=410, stop_ids=(), lengths=(380, 400, 800))
    groups = sample(model, requests)
    assert same_logprobs(model, requests, groups)
    assert sample(model, requests, slots=2, page_size=64) == groups


def test_without_packed_weights_and_compiler_the_step_is_the_same_model(model, monkeypatch):
    """Where oneDNN is missing (macOS) and without a C compiler: other rounding, same log-probs.

    The products are F.linear's then, and attention is torch's.
    """
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(native, "library", lambda target: None)
    sampler = Sampler(model)
    requests = make_requests()
    assert same_logprobs(model, requests, sampler.generate(requests))
    assert not sampler.decoder.packed


VARIANTS = {
    "one slot": dict(slots=1),
    "few slots": dict(slots=7),
    "large pages": dict(page_size=64),
    "little memory": dict(slots=48, memory=40 * PAGE_BYTES),
    "no sharing": dict(share_prefix=False),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_do_not_depend_on_the_batch(model, variant):
    """Tokens and log-probs are equal to the last bit whatever the slots, pages and sharing."""
    requests = make_requests()
    groups = sample(model, requests, **VARIANTS[variant])
    assert groups == sample(model, requests)


def test_samples_do_not_depend_on_the_batch_without_a_compiler(model, monkeypatch):
    monkeypatch.setattr(native, "library", lambda target: None)
    requests = make_requests(n=2, new=20)
    assert sample(model, requests, slots=3) == sample(model, requests)


def test_looking_at_the_rows_every_few_steps_changes_nothing(model):
    """On CUDA the host looks every 8 steps.

    Rows that ended in between stay dead, write nothing and keep what they drew; and buffers are
    reused.
    """
    requests = make_requests()
    expected = sample(model, requests)
    sampler = Sampler(model, slots=20)
    sampler.chunk = 7
    assert sampler.generate(requests) == expected

    kept = sampler.decoder.rows.values.data_ptr()
    assert sampler.generate(requests[:3]) == expected[:3]
    assert sampler.decoder.rows.values.data_ptr() == kept

    sampler.release()
    assert drawn(sampler.generate(requests[3:])) == drawn(expected[3:])


def test_the_way_through_the_kernels_draws_the_same_tokens(model):
    """What CUDA runs draws the same tokens, with other last bits."""
    requests = make_requests()
    expected = sample(model, requests)
    groups = kernels_way(model, slots=20).generate(requests)
    assert tokens_of(groups) == tokens_of(expected)
    assert groups != expected
    assert same_logprobs(model, requests, groups)


def test_qwen3_takes_both_ways():
    """Its norms of q and k stand before attention, so that neither way knows of them.

    Same draws alone and together, and the trainer's log-probs.
    """
    config = dataclasses.replace(CONFIG, model_type="qwen3")
    model = random_model(config, seed=1, std=0.15).requires_grad_(False)
    for layer in model.layers:  # random norms, or an error in them would not show
        layer.q_norm.data.uniform_(0.5, 2.0)
        layer.k_norm.data.uniform_(0.5, 2.0)

    requests = make_requests()
    expected = sample(model, requests)
    assert same_logprobs(model, requests, expected)
    alone = [sample(model, [request], slots=3)[0] for request in requests]
    assert drawn(alone) == drawn(expected)

    groups = kernels_way(model, slots=20).generate(requests)
    assert tokens_of(groups) == tokens_of(expected)
    assert same_logprobs(model, requests, groups)


def test_samples_do_not_depend_on_order_ranks_or_threads(model):
    requests = make_requests()
    expected = drawn(sample(model, requests))
    assert drawn(sample(model, requests[::-1]))[::-1] == expected

    for rank in range(3):
        groups = sample(model, requests[rank::3])
        assert drawn(groups) == expected[rank::3]

    torch.set_num_threads(2)
    assert drawn(sample(model, requests[-2:])) == expected[-2:]


def test_samples_differ_among_themselves_and_by_seed(model):
    requests = make_requests()
    groups = sample(model, requests)
    different = set()
    for group in tokens_of(groups):
        different |= {tuple(tokens) for tokens in group}
    assert len(different) > 25  # of 32
    other_seed = [dataclasses.replace(request, seed=12) for request in requests]
    assert sample(model, other_seed) != groups


def test_first_token_frequencies_are_the_models_distribution(model):
    """Chi square of 4,000 draws over the tokens expected more than 5 times.

    Its mean is dof, its variance 2 dof.
    """
    (request,) = make_requests(n=4000, new=1, lengths=(9,))
    (group,) = sample(model, [request])
    hidden = forward(model, request.prompt)
    expected = 4000 * (hidden[-1] @ model.head_weight.T).softmax(-1)
    first = torch.tensor([completion.tokens[0] for completion in group])
    seen = torch.bincount(first, minlength=len(expected))

    common = expected > 5
    terms = (seen - expected) ** 2 / expected
    chi2 = terms[common].sum().item()
    dof = int(common.sum())
    deviation = (2 * dof) ** 0.5
    assert dof > 10
    assert abs(chi2 - dof) < 5 * deviation


def test_cpu_draw_is_the_kernels_draw():
    """decode.draw on CPU takes fewer passes than kernels.sampling; the tokens are the same ones."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(64, 32, generator=generator)
    weight = torch.randn(331, 32, generator=generator)
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.3]).repeat(16)
    row = torch.arange(64)
    seed = torch.full((64,), 5)
    uniforms = uniforms_reference(seed, row, row % 4, row + 1000)  # request, sample, position
    tokens, logprobs = sample_tokens(hidden, weight, temperature, uniforms)
    our_tokens, our_logprobs = decode.draw(hidden @ weight.T, temperature, uniforms)
    assert torch.equal(tokens, our_tokens)
    assert (logprobs - our_logprobs).abs().max() < 1e-6


def test_greedy_is_the_argmax_of_a_plain_forward(model):
    (request,) = make_requests(n=1, new=20, stop_ids=(), lengths=(12,), temperature=0.0)
    tokens = list(request.prompt)
    for _ in range(20):
        hidden = forward(model, tokens)
        logits = hidden[-1] @ model.head_weight.T
        tokens.append(int(logits.argmax()))
    assert tokens_of(sample(model, [request])) == [[tokens[12:]]]


def test_stop_token_is_kept_and_any_of_several_stops(model):
    free = sample(model, make_requests(n=2, new=30, stop_ids=()))
    stop_ids = (free[5][0].tokens[11], free[6][1].tokens[4])
    cut = sample(model, make_requests(n=2, new=30, stop_ids=stop_ids))
    for full_group, cut_group in zip(free, cut):
        for full, short in zip(full_group, cut_group):
            ends = [i for i, token in enumerate(full.tokens) if token in stop_ids]
            length = ends[0] + 1 if ends else 30
            assert short.tokens == full.tokens[:length]
            assert short.logprobs == full.logprobs[:length]
            assert short.finish_reason == ("stop" if ends else "length")


# Ids as a byte-level BPE has them: pieces of several characters, of none (special marks), and of
# parts of characters of two, three and four bytes.
PIECES = (
    *(b"", b"a", b"b", b"ab", b"ba", b"\n", b"a\nb"),
    *(b"\xc3", b"\xa9", b"\xe2\x82", b"\xacab", b"\xf0", b"\x9f\x98\x80"),
)
STOP_STRINGS = ("aab", "b\na", "\u00e9b", "\u20aca")


def text_of(ids):
    return b"".join(PIECES[id % len(PIECES)] for id in ids).decode("utf-8", "replace")


def first_stop(tokens, strings):
    """How many tokens it takes until their text has one of the strings; None where it never has."""
    for count in range(1, len(tokens) + 1):
        text = text_of(tokens[:count])
        if any(string in text for string in strings):
            return count
    return None


@pytest.mark.parametrize("way", ["cpu", "few slots", "looking every 3", "looking every 8"])
def test_a_stop_string_ends_with_the_token_that_completes_it(model, way):
    """Tokens and log-probs before are those of a request without, to the last bit.

    Half of the requests have stop strings; the others are not touched by their neighbours' ends.
    (On CUDA's way the torch references stand for the kernels, whose last bits follow the batch.)
    """
    plain = make_requests(new=60)
    free = sample(model, plain)
    asked = []
    for i, request in enumerate(plain):
        strings = STOP_STRINGS if i % 2 else ()
        asked.append(dataclasses.replace(request, stop_strings=strings))

    on_cpu = not way.startswith("looking")
    if on_cpu:
        sampler = Sampler(model, slots=3 if way == "few slots" else 256)
    else:
        sampler = kernels_way(model, slots=9)
        sampler.chunk = int(way[-1])
    groups = sampler.generate(asked, decode=text_of)

    ends = {"string": 0, "token": 0, "length": 0}
    for request, full_group, group in zip(asked, free, groups):
        for full, completion in zip(full_group, group):
            count = first_stop(full.tokens, request.stop_strings)
            how = "string" if count else "token" if full.finish_reason == "stop" else "length"
            ends[how] += 1
            assert completion.tokens == full.tokens[:count]
            near = pytest.approx(full.logprobs[:count], abs=0 if on_cpu else 2e-5, rel=0)
            assert completion.logprobs == near
            assert completion.finish_reason == ("stop" if count else full.finish_reason)
    assert min(ends.values()) > 0, ends
    assert sampler.stats["tokens"] == sum(len(x.tokens) for group in groups for x in group)
    assert len(sampler.pool.free_runs) == sampler.pool.size.runs


def test_stop_strings_need_no_more_steps_than_the_longest_completion(model):
    """One slot: a sample's row is free with the token that completes its stop string."""
    (request,) = make_requests(n=4, new=60, stop_ids=(), lengths=(12,), stop_strings=STOP_STRINGS)
    sampler = Sampler(model, slots=1)
    (group,) = sampler.generate([request], decode=text_of)
    assert sampler.stats["steps"] == sum(len(completion.tokens) for completion in group)
    assert sampler.stats["steps"] < 4 * 60


def found_end(tokens, strings, chunk):
    """What StopSearch finds when it is given `chunk` tokens at a time."""
    search = StopSearch(strings, text_of)
    for start in range(0, len(tokens), chunk):
        search.add(tokens[start : start + chunk])
        if search.end:
            return search.end
    return None


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_the_first_stop_string_of_a_text_is_found(chunk):
    """Whatever the borders of tokens, characters and chunks; 1 to 12 characters of the text itself.

    Against decoding the whole text again after every token.
    """
    rng = random.Random(1)
    found = 0
    while found < 700:
        tokens = rng.choices(range(len(PIECES)), k=120)
        text = text_of(tokens)
        start = rng.randrange(len(text))
        string = text[start : start + rng.randint(1, 12)]
        if "\ufffd" in string:
            continue
        found += 1
        assert found_end(tokens, (string,), chunk) == first_stop(tokens, (string,))


def test_a_stop_string_in_pieces_of_a_real_tokenizer(tmp_path):
    """Alone, sharing its last token with what follows, after a character of three bytes, and cut.

    The texts are encoded from every place in the middle anew, so that borders move.
    """
    tokenizer = train_bpe(["x </answer>)) </answer>)) 3 </answer>"] * 9, 300, tmp_path)
    pieces = [tokenizer.decode([id]) for id in range(300)]
    assert ">))" in pieces
    cases = {
        "x = 3 </answer>": True,
        "x = 3 </answer>)) User: </answer>": True,
        "\u20ac\u20ac</answer>\n": True,
        "</answer": False,
    }
    for text, has_stop in cases.items():
        for middle in range(len(text)):
            ids = tokenizer.encode(text[:middle]) + tokenizer.encode(text[middle:])
            search = StopSearch(("</answer>",), tokenizer.decode)
            for id in ids:
                if not search.end:
                    search.add([id])
            assert bool(search.end) == has_stop
            if has_stop:
                assert "</answer>" in tokenizer.decode(ids[: search.end])
                assert "</answer>" not in tokenizer.decode(ids[: search.end - 1])


def test_only_the_end_of_the_text_is_decoded(model):
    """5,000 tokens of one character, 8 at a time, a string of 9: windows of 32 tokens at most.

    `start` is one border back, borders are 16 tokens apart (two chunks of 8 hold 9 characters),
    so at most 16 + 8 old tokens are decoded with 8 new ones; the whole text would be 2,500.
    """
    sizes = []

    def decode(ids):
        sizes.append(len(ids))
        return "a" * len(ids)

    search = StopSearch(("</answer>",), decode)
    for _ in range(5000 // 8):
        search.add([1] * 8)
    assert len(sizes) == 625 and max(sizes) <= 32


def at_least_the_fifth(probabilities):
    return probabilities >= probabilities.topk(5).values[:, -1:]


def in_the_upper_half(probabilities):
    """The most probable tokens whose mass first reaches 0.5."""
    ordered = probabilities.sort(descending=True).values
    last = (ordered.cumsum(-1) < 0.5).sum(-1, keepdim=True)
    return probabilities >= ordered.gather(1, last)


LIMITS = [({"top_k": 5}, at_least_the_fifth), ({"top_p": 0.5}, in_the_upper_half)]


@pytest.mark.parametrize("limits, allowed", LIMITS)
def test_top_k_and_top_p_draw_from_what_they_allow(model, limits, allowed):
    """And log-probs are those of the distribution that is left."""
    sizes = dict(n=6, new=25, stop_ids=(), lengths=(20,))
    (request,) = make_requests(**sizes, temperature=0.8, **limits)
    (group,) = sample(model, [request])
    for completion in group:
        hidden = predictions(model, request, completion)
        probabilities = (hidden @ model.head_weight.T / 0.8).softmax(-1)
        kept = allowed(probabilities)
        chosen = torch.tensor(completion.tokens)[:, None]
        assert kept.gather(1, chosen).all()
        left = (probabilities * kept).sum(-1)
        drawn_from_all = probabilities.gather(1, chosen).squeeze(1)
        expected = (drawn_from_all / left).log()
        gap = expected - torch.tensor(completion.logprobs)
        assert gap.abs().max() < 1e-4


def test_the_best_of_one_is_greedy(model):
    (request,) = make_requests(n=6, new=25, stop_ids=(), lengths=(20,), temperature=0.8)
    best = dataclasses.replace(request, top_k=1)
    greedy = dataclasses.replace(request, temperature=0.0)
    groups = tokens_of(sample(model, [best, greedy]))
    assert groups[0] == groups[1]


def test_groups_are_handed_over_as_they_finish(model):
    """So that rewards overlap sampling.

    Half of the groups are with the judge before 60 % of the steps are done, and no batch waits for
    its longest row.
    """
    requests = make_requests(n=3)
    handed_over = {}
    at_step = []
    sampler = Sampler(model, slots=5)

    def on_done(index, completions):
        handed_over[index] = completions
        at_step.append(sampler.stats["steps"])

    groups = sampler.generate(requests, on_done)
    assert len(at_step) == len(requests)
    assert [handed_over[index] for index in range(len(requests))] == groups

    steps = sampler.stats["steps"]
    assert at_step[len(at_step) // 2 - 1] < 0.6 * steps
    assert at_step[-1] == steps
    # Without refilling, each group takes the steps of its longest sample.
    static = 0
    count = 0
    for group in tokens_of(groups):
        lengths = [len(tokens) for tokens in group]
        static += max(lengths)
        count += sum(lengths)
    assert steps < 0.8 * static
    assert sampler.stats["tokens"] == count


def test_all_pages_come_back(model):
    sampler = Sampler(model, slots=5)
    sampler.generate(make_requests(n=3))
    pool = sampler.pool
    assert sorted(pool.free_runs) == list(range(pool.size.runs))
    assert len(pool.free_pieces) == pool.size.pieces


def test_the_longest_expected_starts_first(model):
    requests = make_requests(n=1, new=4, stop_ids=(), lengths=(9, 9, 9))
    for request, expected in zip(requests, (1, 3, 2)):
        request.expected_tokens = expected
    order = []
    sampler = Sampler(model, slots=1)
    sampler.generate(requests, on_done=lambda index, _: order.append(index))
    assert order == [1, 2, 0]


def test_memory_is_what_the_requests_need(model):
    """24 rows of 3 pages, and the 6 pages of the longest prompt for each of 7 prompts.

    One has a single token, which is no row's past. Never a share of what happens to be free; held
    until release().
    """
    sampler = Sampler(model)
    sampler.generate(make_requests(n=3))
    assert sampler.held_bytes() == (24 * 3 + 7 * 6) * PAGE_BYTES
    sampler.release()
    assert sampler.held_bytes() == 0


def test_memory_is_at_most_what_is_allowed_or_half_of_what_is_free(model, monkeypatch):
    """30 pages are three rows of 3 pages with a prompt of 6 each; a fourth would make 36."""
    requests = make_requests(n=3)
    expected = sample(model, requests)
    allowed = Sampler(model, memory=30 * PAGE_BYTES)
    assert allowed.generate(requests) == expected
    assert allowed.pool.size.runs == 3
    assert allowed.held_bytes() <= 30 * PAGE_BYTES

    # 60 pages in all, its own included, also when it has some already. The packed copies of the
    # weights, made after the pages, are not for pages.
    scarce = Sampler(model)
    packed = scarce.bytes_to_pack()

    def free(device):
        return 60 * PAGE_BYTES - scarce.held_bytes() + (0 if scarce.pool else packed)

    monkeypatch.setattr("sampler.free_bytes", free)
    for _ in range(2):
        assert scarce.generate(requests) == expected
        assert scarce.pool.size.runs == 3
        assert scarce.held_bytes() <= 30 * PAGE_BYTES


def test_new_weights_are_used_and_old_pages_refused(model):
    requests = make_requests(n=2)
    changing = random_model(CONFIG, seed=1, std=0.15).requires_grad_(False)
    sampler = Sampler(changing, slots=5)
    before = sampler.generate(requests)
    fresh = {}
    for name, parameter in model.named_parameters():
        fresh[name] = parameter + 0.01 * torch.randn_like(parameter)

    # New weights in the middle of a rollout.
    with pytest.raises(StalePageError, match="weight version 0.*now version 1"):
        sampler.generate(requests, on_done=lambda *_: sampler.load(fresh))

    groups = sampler.generate(requests)
    assert groups != before
    assert same_logprobs(changing, requests, groups)
    assert Sampler(changing).generate(requests) == groups

    page = sampler.pool.take(1, version=0)  # a page of the old weights
    with pytest.raises(StalePageError):
        sampler.pool.check(page, sampler.version)


# Changes of a request with a prompt of 40 tokens and 40 new ones -> the sentence.
IMPOSSIBLE = {
    "longer than the model's 2048 positions": dict(max_new_tokens=2020),
    "empty prompt": dict(prompt=[]),
    "outside the model's vocabulary of 331": dict(prompt=[1, 331]),
    "at least 1": dict(n=0),
    "none of them empty": dict(stop_strings=("",)),
    "must be a tuple of texts": dict(stop_strings="</answer>"),
    "half a character": dict(stop_strings=("\ufffd",)),
    "give generate.. the tokenizer's decode": dict(stop_strings=("</answer>",)),
}


@pytest.mark.parametrize("sentence", IMPOSSIBLE)
def test_a_request_that_cannot_run_is_refused_with_a_sentence(model, sentence):
    (request,) = make_requests(lengths=(40,))
    with pytest.raises(ValueError, match=sentence):
        sample(model, [dataclasses.replace(request, **IMPOSSIBLE[sentence])])


def test_what_does_not_fit_is_refused_with_a_sentence(model):
    """3 pages for 39 tokens of the prompt and 3 for 40 new ones."""
    sentence = "need 6 pages of 16 tokens and there is room for 4"
    with pytest.raises(ValueError, match=sentence):
        sample(model, make_requests(lengths=(40,)), memory=4 * PAGE_BYTES)
    with pytest.raises(ValueError, match="multiple of 16"):
        Sampler(model, page_size=24)


def test_no_requests_are_no_completions(model):
    assert sample(model, []) == []


def test_what_is_released_is_freed_at_once(model):
    """Packed weights of a 0.5B model are 2 GB, which the update needs: no cycle may keep them."""
    sampler = Sampler(model)
    sampler.generate(make_requests(n=1))
    decoder = weakref.ref(sampler.decoder)
    gc.disable()
    try:
        sampler.release()
        assert decoder() is None
    finally:
        gc.enable()
