"""Sampling: distribution, key, truncation, statistics and refusals, on both paths."""

import math

import pytest
import torch
from kernel_inputs import BACKENDS, DEVICE, TRUNCATIONS, draw_keys, draw_tokens
from marks import slow
from sodfast_kernels import gumbel_noise, sample_tokens
from sodfast_kernels.philox import WORD, philox
from sodfast_kernels.sampling import draw

INF, NAN = math.inf, math.nan


def draws(logits, count, **given):
    """`count` tokens of one row of logits, one for each sample."""
    return draw_tokens(logits.expand(count, -1), draw_keys(count), **given).token


def chi_square(tokens, probs):
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    expected = len(tokens) * probs
    assert counts[probs == 0].sum() == 0
    drawn = probs > 0
    return ((counts - expected)[drawn] ** 2 / expected[drawn]).sum().item(), int(drawn.sum()) - 1


def nucleus(logits, temperature, top_p, top_k):
    """The distribution by hand, in fp64: loops over the tokens from the most probable down."""
    probs = (logits.double() / temperature).softmax(0).tolist()
    order = sorted(range(len(probs)), key=lambda v: (-logits[v].item(), v))[:top_k]
    total, before, kept = sum(probs[v] for v in order), 0.0, {}
    for v in order:
        if before < top_p * total:
            kept[v] = probs[v]
        before += probs[v]
    mass = sum(kept.values())
    return torch.tensor([kept.get(v, 0.0) / mass for v in range(len(probs))], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.6, *slow(1.0)])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, None), (0.7, 9), *slow((0.8, None), (1.0, 5))])
def test_tokens_follow_the_distribution(temperature, top_p, top_k):
    logits = torch.randn(24, generator=torch.Generator().manual_seed(1))
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    statistic, freedom = chi_square(draws(logits, 100_000, **given), nucleus(logits, **given))
    # Mean f, variance 2f. At 5 standard deviations one seed in about 10^5 fails, and ours is fixed.
    assert freedom > 0 and statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_noise_is_the_documented_function_of_the_key():
    seed, step, sample, position = 2**63 + 5, 2**32 - 3, 2**31 + 7, 9
    noise = gumbel_noise(
        seed=seed,
        step=step,
        sample=torch.tensor([sample]),
        position=torch.tensor([position]),
        vocabulary=7,
    )
    words = [philox((v // 4, position, sample, step), seed)[v % 4] for v in range(7)]
    exact = [-math.log(-math.log1p(-(word + 0.5) / 2**32)) for word in words]
    torch.testing.assert_close(noise[0], torch.tensor(exact), rtol=1e-6, atol=1e-6)


def test_noise_broadcasts_samples_against_positions():
    sample, position = torch.arange(3)[:, None], torch.arange(5)
    block = gumbel_noise(seed=1, step=2, sample=sample, position=position, vocabulary=6)
    assert block.shape == (3, 5, 6)
    one = gumbel_noise(
        seed=1, step=2, sample=torch.tensor([2]), position=torch.tensor([4]), vocabulary=6
    )
    assert torch.equal(block[2, 4], one[0])


def test_without_numpy_the_noise_has_the_same_bits(monkeypatch):
    """torch needs no NumPy, so an installation of the kernels alone has none."""
    key = {"sample": torch.arange(3)[:, None], "position": torch.arange(5), "vocabulary": 9}
    with_numpy = gumbel_noise(seed=2**63 + 5, step=2**32 - 3, **key)
    monkeypatch.setattr(draw, "NUMPY", False)
    assert gumbel_noise(seed=2**63 + 5, step=2**32 - 3, **key).equal(with_numpy)


def test_both_tails_of_the_noise_are_exact():
    edges = [0, 1, 2, 1000, 2**23, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 2**20, WORD - 1, WORD]
    words = torch.tensor(edges + torch.randint(0, 2**32, (5000,)).tolist())
    wait = torch.exp(-draw._gumbel(words).double())
    exact = -torch.log1p(-(words.double() + 0.5) * 2.0**-32)
    # An error of log E by an ulp of its size, at most 23, is a relative one of E.
    torch.testing.assert_close(wait, exact, rtol=2e-6, atol=0)


@pytest.mark.slow
def test_rare_tokens_win_at_the_right_rate():
    # Token 0 against 255 others of probability 10^-6 each, 2^16 times: 16.7 wins expected.
    logits = torch.full((256,), math.log(1e-6))
    logits[0] = math.log1p(-255e-6)
    wins = 0
    for start in range(0, 2**16, 2**12):
        given = draw_keys(2**12) | {"sample": torch.arange(start, start + 2**12)}
        wins += (draw_tokens(logits.expand(2**12, -1), given).token > 0).sum().item()
    # Poisson: outside with probability 2e-4; 24-bit uniforms make 10^-6 a multiple of 6·10^-8.
    assert 4 <= wins <= 34


@pytest.mark.parametrize("name", ["seed", "step", "sample", "position"])
def test_noise_of_neighbouring_keys_is_uncorrelated(name):
    key = {"seed": 5, "step": 5, "sample": torch.tensor([5]), "position": torch.tensor([5])}
    first, second = (
        gumbel_noise(**key | {name: key[name] + i}, vocabulary=40_000)[0] for i in (0, 1)
    )
    correlation = torch.corrcoef(torch.stack((first, second)))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(40_000)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_those_of_the_untruncated_softmax(backend):
    logits = 3 * torch.randn(2, 9001, generator=torch.Generator().manual_seed(2))
    logits[1] += 200
    out = draw_tokens(logits, draw_keys(2), temperature=0.7, backend=backend)
    exact = (logits.double() / 0.7).log_softmax(1)
    assert torch.equal(out.token, sample_tokens(logits, **draw_keys(2), temperature=0.7).token)
    torch.testing.assert_close(
        out.logprob.double(), exact.gather(1, out.token[:, None])[:, 0], rtol=2e-6, atol=2e-6
    )
    torch.testing.assert_close(
        out.entropy.double(), -(exact.exp() * exact).sum(1), rtol=2e-6, atol=2e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_over_the_largest_vocabulary(backend):
    vocabulary = draw.MAX_VOCABULARY
    logits = 2 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(10))
    out = draw_tokens(logits, draw_keys(1), top_p=0.9, backend=backend)
    exact = logits.double().log_softmax(1)[0]
    torch.testing.assert_close(out.logprob.double(), exact[out.token], rtol=0, atol=4e-6)
    assert out.entropy.item() == pytest.approx(-(exact.exp() * exact).sum().item(), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_p", [0.3, 0.95, *slow(0.1, 0.5, 0.6, 0.7, 0.9)])
def test_among_equal_logits_the_lower_indices_stay(backend, top_p):
    # 20 equal tokens: the nucleus is the first ⌈20·top_p⌉ of them, all of which are drawn.
    logits = torch.zeros(1, 21)
    logits[0, 0] = -INF
    kept = set(range(1, 1 + math.ceil(round(20 * top_p, 9))))
    interpreted = backend == "triton" and DEVICE.type == "cpu"
    count = 4 if interpreted else 600  # the interpreter is slow
    out = draw_tokens(logits.expand(count, -1), draw_keys(count), top_p=top_p, backend=backend)
    tokens = set(out.token.tolist())
    assert tokens <= kept and (interpreted or tokens == kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [*slow(*TRUNCATIONS[:-2]), *TRUNCATIONS[-2:]], ids=str)
def test_rows_that_are_not_finite_have_entropy_nan_and_a_valid_token(backend, given):
    logits = torch.randn(5, 60, generator=torch.Generator().manual_seed(7))
    logits[0, 7], logits[1, 7], logits[2], logits[3, 1:] = NAN, INF, -INF, -INF
    out = draw_tokens(logits, draw_keys(5), **given, backend=backend)
    assert out.entropy.isnan().tolist() == [True, True, True, False, False]
    assert ((out.token >= 0) & (out.token < 60)).all()
    assert out.token[3] == 0 and out.entropy[3] == 0 and out.logprob[3] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [{"top_p": 0.9}, *slow({}, {"top_k": 7})], ids=str)
def test_a_draw_depends_on_its_key_and_row_alone(backend, given):
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(3))
    key = draw_keys(5, position=4)
    whole = draw_tokens(logits, key, **given, backend=backend)
    order = torch.tensor([3, 1])
    part = key | {name: key[name][order] for name in ("sample", "position")}
    few = draw_tokens(logits[order], part, **given, backend=backend)
    for one, other in zip(whole, few, strict=True):
        assert torch.equal(one[order], other)


def test_noise_computed_ahead_draws_the_same():
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(8))
    noise = gumbel_noise(**draw_keys(9), vocabulary=50)
    for options in ({}, {"top_p": 0.9}, {"temperature": 0}):
        own = sample_tokens(logits, **draw_keys(9), **options)
        ahead = sample_tokens(logits, **draw_keys(9), **options, noise=noise)
        assert torch.equal(own.token, ahead.token)


def test_temperature_0_takes_the_greatest_and_reports_temperature_1():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    out = draw_tokens(logits, draw_keys(1), temperature=0)
    exact = logits.double().log_softmax(1)
    assert out.token.item() == 1
    assert out.logprob.item() == pytest.approx(exact[0, 1].item(), rel=1e-6)
    assert out.entropy.item() == pytest.approx(-(exact.exp() * exact).sum().item(), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_no_tokens(backend):
    out = draw_tokens(torch.empty(0, 9), draw_keys(0), top_p=0.9, backend=backend)
    assert [len(entry) for entry in out] == [0, 0, 0] and out.token.dtype == torch.int64


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_into_one_graph(backend):
    def call(logits):
        return draw_tokens(logits, draw_keys(2), top_p=0.9, backend=backend)

    logits = torch.randn(2, 30)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(logits), call(logits), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("logits", {"logits": torch.zeros(3)}),
        ("logits", {"logits": torch.zeros(2, 4, dtype=torch.float64)}),
        ("logits", {"logits": torch.zeros(2, 0)}),
        ("logits", {"logits": torch.zeros(4, 2).T}),
        ("seed", {"seed": 2**64}),
        ("seed", {"seed": -1}),
        ("step", {"step": 2**32}),
        ("sample", {"sample": torch.zeros(3, dtype=torch.int64)}),
        ("sample", {"sample": torch.zeros(2)}),
        ("sample", {"sample": torch.tensor([0, 2**32])}),
        ("position", {"position": torch.tensor([0, -1])}),
        ("position", {"position": 3}),
        ("temperature", {"temperature": -1.0}),
        ("temperature", {"temperature": 1e-9}),
        ("temperature", {"temperature": NAN}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.5}),
        ("top_p", {"top_p": NAN}),
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": 2.0}),
        ("top_k", {"top_k": True}),
        ("backend", {"backend": "cuda"}),
        ("noise", {"noise": torch.zeros(2, 5)}),
        ("noise", {"noise": torch.zeros(2, 4).double()}),
        pytest.param(
            "noise", {"noise": torch.zeros(2, 4), "backend": "triton"}, marks=pytest.mark.triton
        ),
    ],
)
def test_wrong_arguments_are_named(name, wrong):
    given = {"logits": torch.zeros(2, 4), **draw_keys(2)} | wrong
    given = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=name):
        sample_tokens(given.pop("logits"), **given)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("vocabulary", {"vocabulary": 0}),
        ("vocabulary", {"vocabulary": 2**18 + 1}),
        ("position", {"position": torch.arange(3)}),
        ("sample", {"sample": 1}),
        ("step", {"step": -1}),
    ],
)
def test_wrong_arguments_of_the_noise_are_named(name, wrong):
    with pytest.raises(ValueError, match=name):
        gumbel_noise(**{"vocabulary": 4, **draw_keys(2)} | wrong)
