"""A language model that is what its formulas say, never sees what comes next, and is scored so that every token counts once."""
import json
import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lowrank_distill.core.errors import DamagedFile, InputError
from lowrank_distill.core.files import asset, load_tensors, save_tensors
from lowrank_distill.core.layers import select
from lowrank_distill.core.streams import Streams
from lowrank_distill.core.taps import watch
from lowrank_distill.data.text import state_of_the_union
from lowrank_distill.data.tokenizers import speech_tokens, tokenizer
from lowrank_distill.models import language_model
from lowrank_distill.models.language_model import (
    FILE, SIZES, Config, LanguageModel, Pretraining, Recipe, Score, _windows, angles, causal_attention, draw, generate, main,
    next_token_loss, ngram_nats, perplexity, pretrained, rotate, score_addresses, together)
from lowrank_distill.shapes.procedure import Progress
from lowrank_distill.shapes.train import train

ADDRESSES = state_of_the_union('validation')
TINY = dict(vocab=11, dim=8, depth=2, heads=2, hidden=12, context=16)
SHAPES = [TINY, TINY | dict(depth=1, heads=1), TINY | dict(heads=4, dim=16, hidden=5), TINY | dict(vocab=1, context=1)]
shapes = pytest.mark.parametrize('sizes', SHAPES, ids=range(len(SHAPES)))

def made(seed: int = 0, **chosen) -> LanguageModel: return LanguageModel(Config(**TINY | chosen), Streams(seed).generator('init')).eval()
def drawn(*shape: int, vocab: int = 11, seed: int = 0) -> torch.Tensor: return torch.randint(vocab, shape, generator=Streams(seed).generator('eval'))

@pytest.fixture(scope='module')
def loud() -> LanguageModel:
    "A model with opinions: weights twenty times as large as at the start."
    model = made()
    for p in model.parameters():
        if p.dim() > 1: p.data *= 20
    return model


# What it is made of

@shapes
def test_the_formula_counts_the_numbers(sizes):
    config = Config(**sizes)
    model = LanguageModel(config, Streams(0).generator('init'))
    assert sum(p.numel() for p in model.parameters()) == config.parameters and not list(model.buffers())
    assert list(select(model, '*attn*')) == [f'blocks.{i}.attn.{p}_proj' for i in range(config.depth) for p in 'qkvo']
    assert list(select(model, '*mlp*')) == [f'blocks.{i}.mlp.{p}_proj' for i in range(config.depth) for p in ('gate', 'up', 'down')]
    out = model(drawn(3, config.context, vocab=config.vocab))
    assert out.logits.shape == (3, config.context, config.vocab) and out.hidden.shape == (3, config.context, config.dim)
    assert torch.equal(model.head(out.hidden), out.logits)

@pytest.mark.parametrize('wrong', [
    dict(vocab=0), dict(dim=6), dict(heads=3), dict(depth=-1), dict(hidden=1.5), dict(context=True), dict(dropout=1.), dict(dropout=-.1), dict(base=1.), dict(base=math.nan)])
def test_sizes_that_make_no_model(wrong):
    with pytest.raises(InputError, match=f'Config: {next(iter(wrong))}|Config: dim'): Config(**TINY | wrong)

def test_the_start_follows_the_generator_alone():
    before = torch.get_rng_state()
    one, two, other = made(), made(), made(1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)) and not torch.equal(one.head.weight, other.head.weight)
    big = LanguageModel(Config(vocab=256, dim=128, hidden=256, depth=8), Streams(0).generator('init'))
    assert math.isclose(big.embed.weight.std().item(), .02, rel_tol=.02) and math.isclose(big.blocks[3].mlp.down_proj.weight.std().item(), .02 / 4, rel_tol=.02)

def test_every_layer_is_called():
    model = made()
    layers = [n for n, m in model.named_modules() if n and next(m.parameters(recurse=False), None) is not None]
    with torch.no_grad(), watch(model, layers) as seen: model(drawn(2, 5))
    assert set(seen) == set(layers)

@pytest.mark.parametrize('tokens', [torch.zeros(3, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 17, dtype=torch.int64)])
def test_tokens_that_do_not_fit(tokens):
    with pytest.raises(InputError, match='1 to 16'): made()(tokens)

def test_norm_by_hand():
    x = torch.randn(3, 8, generator=Streams(0).generator('eval'))
    norm = made().norm
    norm.weight.data = torch.arange(8.)
    assert torch.allclose(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight, atol=1e-6)

@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 50))
def test_positions_count_by_their_difference(m, n, further):
    q, k = torch.randn(2, 1, 8, generator=Streams(0).generator('eval'))
    def product(m: int, n: int) -> float: return (rotate(q, *angles(torch.tensor([m]), 8, 100.)) @ rotate(k, *angles(torch.tensor([n]), 8, 100.)).T).item()
    assert math.isclose(product(m + further, n + further), product(m, n), abs_tol=2e-4)

def test_rotation_by_hand():
    "The pair (x_i, x_{i + 2}) of four units turns by position times base^(-i/2)."
    turned = rotate(torch.tensor([[1., 2., 3., 4.]]), *angles(torch.tensor([3]), 4, 100.))[0]
    pairs = [complex(1, 3) * complex(math.cos(3), math.sin(3)), complex(2, 4) * complex(math.cos(.3), math.sin(.3))]
    assert torch.allclose(turned, torch.tensor([pairs[0].real, pairs[1].real, pairs[0].imag, pairs[1].imag]), atol=1e-6)
    half = torch.randn(2, 4, generator=Streams(0).generator('eval')).bfloat16()
    assert rotate(half, *angles(torch.arange(2), 4, 100.)).dtype == torch.bfloat16 and torch.equal(rotate(half, *angles(torch.zeros(2), 4, 100.)), half)

@pytest.mark.parametrize('new', [1, 2, 5, 6])
def test_attention_by_hand(new):
    q, k, v = torch.randn(3, 2, 2, 6, 4, generator=Streams(0).generator('eval'))
    for i in range(6 - new, 6):
        alone = (q[:, :, i:i + 1] @ k[:, :, :i + 1].mT / 2).softmax(-1) @ v[:, :, :i + 1]
        assert torch.allclose(causal_attention(q[:, :, 6 - new:], k, v)[:, :, i - 6 + new], alone[:, :, 0], atol=1e-6)


# What it may see

@pytest.mark.parametrize('place', [0, 1, 7, 15])
def test_no_token_changes_what_was_before(loud, place):
    tokens = drawn(2, 16)
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % 11
    moved = (loud(changed).logits - loud(tokens).logits).abs().amax((0, 2))
    assert not moved[:place].any() and (moved[place:] > 1e-4).all()

@given(st.lists(st.integers(1, 6), min_size=1, max_size=6).filter(lambda cuts: sum(cuts) <= 16))
def test_reading_in_pieces_changes_nothing(cuts):
    model, tokens = made(), drawn(3, sum(cuts))
    for p in model.parameters(): p.data *= 5 if p.dim() > 1 else 1
    cache = model.cache()
    with torch.no_grad(): apart = torch.cat([model(part, cache).logits for part in tokens.split(cuts, 1)], 1)
    assert torch.allclose(apart, model(tokens).logits, atol=1e-5, rtol=1e-5) and len(cache[0]) == len(cache[1]) == sum(cuts)

def test_a_full_cache_takes_no_more():
    model, cache = made(), made().cache()
    model(drawn(1, 12), cache)
    with pytest.raises(InputError, match='1 to 4'): model(drawn(1, 5), cache)
    assert model(drawn(1, 4), cache).logits.shape == (1, 4, 11) and len(cache[0]) == 16


# How it is scored

@given(st.integers(1, 60), st.integers(1, 16), st.data())
def test_every_token_counts_once(n, context, data):
    stride, batch = data.draw(st.integers(1, context)), data.draw(st.integers(1, 5))
    counted, row = [], torch.arange(n + 1)
    for rows, new in _windows(row, context, stride, batch):
        assert rows.shape[1] == min(context, n) + 1 and len(rows) <= batch and (rows.diff(dim=1) == 1).all()
        for window, mask in zip(rows, new, strict=True):
            before = window[1:][mask] - window[0]  # tokens in sight of each that counts
            assert window[0] == 0 or before.min() > context - stride
            counted += window[1:][mask].tolist()
    assert counted == list(range(1, n + 1))

@pytest.mark.parametrize(('context', 'stride'), [(16, 1), (8, 3), (8, 8), (1, 1), (5, None)])
def test_perplexity_by_brute_force(loud, context, stride):
    text, total = drawn(21, seed=1), 0.
    row, end = torch.cat([torch.tensor([4]), text]), context
    step = stride or context // 2
    for i in range(21):
        while i >= end: end = min(end + step, 21)
        seen = row[max(0, end - context):i + 1]
        total += F.cross_entropy(loud(seen[None]).logits[0, -1:], row[i + 1:i + 2]).item()
    found = perplexity(loud, text, context=context, stride=stride, start=4, batch=3)
    assert math.isclose(found.nats, total, rel_tol=1e-5) and found.tokens == 21
    with pytest.raises(InputError, match='bytes'): found.bits_per_byte  # noqa: B018

def test_no_opinion_costs_the_vocabulary():
    model = made(vocab=256)
    model.head.weight.data.zero_()
    found = perplexity(model, tokenizer('bytes').encode('Fellow-citizens é'), tokenizer('bytes'))
    assert math.isclose(found.perplexity, 256, rel_tol=1e-5) and math.isclose(found.bits_per_byte, 8, rel_tol=1e-5) and found.bytes == found.tokens == 18

def test_scoring_leaves_the_model_as_it_was():
    model = made(dropout=.5).train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    assert perplexity(model, drawn(30)) == perplexity(model, drawn(30)) and modes == [m.training for m in model.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())

@pytest.mark.parametrize('wrong', [dict(tokens=drawn(0)), dict(tokens=drawn(2, 3)), dict(tokens=torch.tensor([11])), dict(stride=17), dict(stride=-1), dict(context=4, stride=5)])
def test_what_cannot_be_scored(wrong):
    with pytest.raises(InputError): perplexity(made(), **{'tokens': drawn(5)} | wrong)

def test_scores_add_up():
    assert together({'a': Score(1., 2, 3), 'b': Score(4., 5, 6)}) == Score(5., 7, 9) and Score(math.log(2) * 6, 3, 6).bits_per_byte == 1 and math.isclose(Score(3 * math.log(7), 3).perplexity, 7)

def test_loss_by_hand(loud):
    tokens = drawn(3, 9)
    share = loud(tokens).logits.log_softmax(-1)
    by_hand = -torch.stack([share[b, i, tokens[b, i + 1]] for b in range(3) for i in range(8)]).mean()
    assert torch.allclose(next_token_loss(loud, tokens), by_hand, atol=1e-6)

@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_counts_by_brute_force(train_row, test_row):
    "Witten-Bell with dictionaries."
    order, found = 3, ngram_nats(torch.tensor(train_row), torch.tensor(test_row), 5, 3)
    counts: dict[tuple, dict] = defaultdict(lambda: defaultdict(int))
    padded, asked = [0] * (order - 1) + train_row, [0] * (order - 1) + test_row
    for n in range(order):
        for i in range(order - 1, len(padded)): counts[tuple(padded[i - n:i])][padded[i]] += 1
    def share(context: tuple, x: int, n: int) -> float:
        lower = share(context[1:], x, n - 1) if n else 1 / 5
        seen = counts.get(context)
        return lower if seen is None else (seen.get(x, 0) + len(seen) * lower) / (sum(seen.values()) + len(seen))
    for n in range(order):
        total = -sum(math.log(share(tuple(asked[i - n:i]), asked[i], n)) for i in range(order - 1, len(asked)))
        assert math.isclose(found[n], total, rel_tol=1e-9)

@pytest.mark.parametrize('order', [0, 7])
def test_counts_have_an_order_that_fits(order):
    with pytest.raises(InputError, match='1 to 6'): ngram_nats(drawn(5), drawn(5), 1024, order)


# What it writes

def test_writing_is_the_likeliest_of_the_whole_text(loud):
    "Temperature 0 with the cache is argmax on the whole text without it; so is the likeliest one of one."
    text = drawn(2, 4)
    found = generate(loud, text, 12, torch.Generator(), temperature=0)
    for _ in range(12): text = torch.cat([text, loud(text).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, text) and torch.equal(generate(loud, text[:, :4], 12, torch.Generator().manual_seed(1), top_k=1), text)

def test_writing_follows_the_generator_alone(loud):
    before = torch.get_rng_state()
    one, two, other = (generate(loud.train(), drawn(5), 11, Streams(s).generator('eval'), temperature=3.) for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other) and torch.equal(before, torch.get_rng_state()) and one.shape == (16,) and loud.training

def test_rows_end_each_for_itself(loud):
    prompt = drawn(6, 3)
    found = generate(loud, prompt, 13, Streams(0).generator('eval'), temperature=4., end=2)
    for row in found[:, 3:].tolist():
        if 2 in row: assert set(row[row.index(2):]) == {2}
    silent = made()
    silent.head.weight.data.zero_()
    assert generate(silent, prompt, 13, torch.Generator(), temperature=0, end=0).shape == (6, 4)  # all have ended at once

def test_shares_of_what_is_drawn():
    logits = torch.tensor([[0., 1., 2., -1.]]).expand(20_000, 4)
    for temperature, top_k in [(1., None), (2., None), (.5, 3), (1., 2)]:
        drawn_ = draw(logits, Streams(0).generator('eval'), temperature, top_k).bincount(minlength=4) / 20_000
        kept = logits[0].masked_fill(logits[0].argsort(descending=True).argsort() >= (top_k or 4), -math.inf)
        assert torch.allclose(drawn_, (kept / temperature).softmax(0), atol=.015)

@pytest.mark.parametrize('wrong', [dict(steps=13), dict(temperature=-1.), dict(temperature=math.nan), dict(top_k=0), dict(top_k=12)])
def test_what_cannot_be_written(wrong):
    with pytest.raises(InputError, match='generate'): generate(made(), drawn(4), **{'steps': 2, 'generator': torch.Generator()} | wrong)


# Training, and the embedded file

def test_training_is_repeated_and_resumed_to_the_same_bits(tmp_path):
    "Dropout and the order of the windows follow the seed, also after a stop."
    row = drawn(200)
    def run(steps: int, folder: str, stop: int | None = None) -> LanguageModel:
        model = made(dropout=.2).train()
        procedure = Pretraining(model, row, Recipe(steps=steps, batch=4))
        if stop is not None:
            whole = procedure.after_step
            def halt(at):
                whole(at)
                if at.step == stop: raise RuntimeError('stopped')
            procedure.after_step = halt
        train(procedure, seed=3, checkpoint=tmp_path/folder, every=2)
        return model
    one = run(6, 'one')
    with pytest.raises(RuntimeError, match='stopped'): run(6, 'two', stop=4)
    two = run(6, 'two')
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, made().head.weight)

def test_a_step_sees_the_windows_of_its_batch(loud):
    row, starts = drawn(60, seed=2), torch.tensor([0, 31, 43])
    rows = torch.stack([row[i:i + 17] for i in starts.tolist()])
    found = Pretraining(loud, row, Recipe(steps=1, batch=3)).losses(starts, Progress(0, 1))['all']['loss']
    assert torch.equal(found, next_token_loss(loud, rows)) and len(Pretraining(loud, row, Recipe(steps=1, batch=1)).stages()[0].loader) == 60 - 16

def test_it_learns_a_text():
    row = torch.arange(300) % 7
    model = made()
    train(Pretraining(model, row, Recipe(steps=80, batch=8, lr=1e-2)), seed=0)
    assert perplexity(model, row[:50]).perplexity < 2 < perplexity(made(), row[:50]).perplexity

def test_scales_and_norms_do_not_decay():
    decays = [(g['weight_decay'], {p.dim() for p in g['params']}) for g in Pretraining(made(), drawn(50), Recipe(steps=1, batch=1)).optimizer.param_groups]
    assert decays == [(.1, {2}), (0., {1})]

def test_the_command_trains_writes_and_scores(monkeypatch, tmp_path, capsys):
    row = speech_tokens('validation')[:3000]
    monkeypatch.setattr(language_model, 'speech_tokens', lambda split: row)
    monkeypatch.setattr(language_model, 'SIZES', SIZES | dict(dim=8, heads=2, hidden=8, depth=1, context=32))
    monkeypatch.setitem(language_model.SCALES, 'smoke', Recipe(steps=2, batch=2, dropouts=(0., .1), addresses=1))
    monkeypatch.setattr(language_model, 'state_of_the_union', lambda split: [a._replace(text=a.text[:500]) for a in ADDRESSES[:3]])
    assert main(['--scale', 'smoke', '--out', str(tmp_path/'lm.safetensors')]) == 0
    said, model = json.loads(capsys.readouterr().out.splitlines()[-1]), pretrained(tmp_path/'lm.safetensors')
    assert set(said['tried']) == {'0.0', '0.1'} and said['bits_per_byte']['validation'] == min(said['tried'].values())
    assert model.config.dropout == 0 and not model.training and model.card['dropout'] in (0., .1) and all(p.half().float().equal(p) for p in model.parameters())
    found = score_addresses(model, 'test', 1)
    assert {k: Score(*v) for k, v in model.card['scores']['test'].items()} == found and len(found) == 1

@pytest.mark.parametrize('wrong', [['--scale', 'large'], ['--device', 'abacus', '--scale', 'smoke'], ['--seed', 'x']])
def test_the_command_says_what_it_cannot_do(monkeypatch, wrong, capsys):
    monkeypatch.setattr(language_model, 'speech_tokens', lambda split: drawn(3000))
    with pytest.raises(SystemExit) as stopped: main(wrong)
    assert stopped.value.code == 2 and 'error' in capsys.readouterr().err

def test_the_embedded_file_is_small_and_scored_as_it_says():
    model, path = pretrained(), asset(FILE)
    assert path.stat().st_size <= 3_000_000 and model.config == Config(**SIZES) and set(model.card['scores']) == {'validation', 'test'}
    assert all(t.dtype == torch.float16 for t in load_tensors(path)[0].values())
    found = {k: Score(*v) for k, v in model.card['scores']['validation'].items()}
    name = min(found, key=lambda k: found[k].bytes)
    text = next(a.text for a in ADDRESSES if f'{a.year}, {a.name}' == name)
    now = perplexity(model, tokenizer().row([text]), tokenizer())
    assert now[1:] == found[name][1:] and math.isclose(now.nats, found[name].nats, rel_tol=2e-3)
    assert together(found).bits_per_byte < 1.4  # the page sets it beside simpler models

@pytest.mark.parametrize('damage', ['kind', 'schema', 'sizes', 'shape', 'lacking', 'nan', 'cut'])
def test_damaged_weights_are_refused(tmp_path, damage):
    model, path = made(), tmp_path/'x.safetensors'
    weights, header = dict(model.state_dict()), dict(schema=1, model='language_model', config=TINY | dict(base=1e4, dropout=0.))
    if damage == 'kind': header['model'] = 'mlp'
    if damage == 'schema': header['schema'] = 2
    if damage == 'sizes': header['config'] = dict(vocab=0)
    if damage == 'shape': header['config'] = TINY | dict(hidden=13)
    if damage == 'lacking': weights.pop('head.weight')
    if damage == 'nan': weights['head.weight'] = weights['head.weight'] * math.nan
    save_tensors(path, weights, header)
    if damage == 'cut': path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DamagedFile): pretrained(path)

def test_weights_go_to_disk_and_back(tmp_path):
    model = made()
    save_tensors(tmp_path/'x.safetensors', model.state_dict(), dict(schema=1, model='language_model', config=TINY))
    assert torch.equal(pretrained(tmp_path/'x.safetensors')(drawn(1, 4)).logits, model(drawn(1, 4)).logits)

def test_half_precision_runs():
    model = made().bfloat16()
    assert isinstance(model, nn.Module) and model(drawn(2, 9)).logits.dtype == torch.bfloat16 and math.isfinite(perplexity(model, drawn(40)).nats)
