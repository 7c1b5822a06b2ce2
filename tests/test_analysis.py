"""Analysis: estimators that do not praise noise, survive offsets and dead layers, and say what should be doubted."""
import itertools
import math

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_distill.analysis.affinity import _dealt, affinity, as_map, contrast, contrast_networks, match, overlay
from lowrank_distill.analysis.affinity import figure as affinity_figure
from lowrank_distill.analysis.cka import Grams, centre, cka, cka_map, compare, gram, grams, hsic, rbf
from lowrank_distill.core.errors import InputError
from lowrank_distill.core.taps import Tap

def noise(n, p, seed): return torch.randn(n, p, generator=torch.Generator().manual_seed(seed))

def related(n=128, p=20, q=30, seed=0):
    "Features that share a part."
    x = noise(n, p, seed)
    return x, x @ noise(p, q, seed + 1) + noise(n, q, seed + 2)

def as_grams(*features):
    matrices = torch.stack([gram(x) for x in features])
    return Grams(tuple(map(str, range(len(features)))), tuple(x[0].numel() for x in features), matrices)

def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(.5), nn.Linear(4 * 36, 5))

IMAGES = noise(40, 36, 9).view(40, 1, 6, 6)

def song(x, y):
    "The three terms of Song et al. 2012, equation 5."
    k, m = ((v @ v.T).fill_diagonal_(0) for v in (x, y))
    n, one = len(k), torch.ones(len(k), dtype=k.dtype)
    middle = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return ((k * m).sum() + middle - 2 / (n - 2) * (one @ k @ (m @ one))) / (n * (n - 3))

def brute(x, y):
    "The U-statistic itself: means over all choices of different rows."
    k, m = x @ x.T, y @ y.T
    def mean(size, f): return sum(f(*c).item() for c in itertools.permutations(range(len(k)), size)) / math.perm(len(k), size)
    pair, apart = mean(2, lambda i, j: k[i, j] * m[i, j]), mean(4, lambda i, j, q, r: k[i, j] * m[q, r])
    return pair + apart - 2 * mean(3, lambda i, j, q: k[i, j] * m[i, q])


# ANCHORS D2: the traps, with their numbers

@pytest.mark.parametrize(('n', 'p', 'biased'), [(64, 512, .885), (64, 4096, .984), (256, 4096, .941)])
def test_noise_is_not_alike(n, p, biased):
    x, y = noise(n, p, 1), noise(n, p, 2)
    assert abs(cka(x, y, 'biased').item() - biased) < .01 and abs(cka(x, y, 'biased').item() - p / (p + n)) < .01
    assert abs(cka(x, y).item()) < .06

@pytest.mark.parametrize('n', [64, 100])
@pytest.mark.parametrize('p', [8, 512])
def test_null_mean(n, p):
    "P6: unbiased, 200 draws."
    draws = torch.stack([cka(noise(n, p, 2 * s), noise(n, p, 2 * s + 1)) for s in range(200)])
    assert draws.mean().abs() < .02 and draws.std() > 0

@pytest.mark.parametrize('estimator', ['biased', 'unbiased'])
@pytest.mark.parametrize('offset', [0, 1, 10, 100, 1000])
def test_an_offset_in_single_precision(estimator, offset):
    x, y = related()
    true = cka(x.double(), y.double(), estimator)
    shifted = cka(x + offset, y / y.std() + offset, estimator)
    assert abs(shifted - true) < 1e-4
    net = compare(*(as_grams(v.relu() + offset) for v in (x, y)), estimator=estimator).matrix
    assert abs(net - cka(x.relu().double(), y.relu().double(), estimator)).max() < 1e-4

def test_the_written_out_formula_fails_there():
    x, y = related()
    assert abs(song(x.double(), y.double()) - hsic(x, y)) < 1e-5 * hsic(x, y)
    assert abs(song(x + 1000, y + 1000) - hsic(x, y)) > .1 * hsic(x, y)

def test_minibatch_against_all_rows():
    "Summed unbiased terms stay near the whole; the mean of per-batch biased values does not, the less so the smaller the batch."
    x, y = related(512, 128, 128)
    y = y + 12 * noise(512, 128, 5)
    whole, mean = cka(x, y).item(), {}
    for size in (8, 32, 128):
        told = compare(as_grams(x), as_grams(y), 'minibatch', batch=size)
        torch.testing.assert_close(told.matrix[0, 0], cka(x, y, 'minibatch', batch=size), atol=1e-6, rtol=0)
        assert abs(told.matrix[0, 0] - whole) < 3 * told.error[0, 0] < .3
        mean[size] = torch.stack([cka(a, b, 'biased') for a, b in zip(x.split(size), y.split(size), strict=True)]).mean()
    assert mean[8] > mean[32] > mean[128] > cka(x, y, 'biased') > whole and mean[8] > .8

def test_trace_is_the_sum():
    k, m = (centre(gram(v)) for v in related())
    torch.testing.assert_close(torch.trace(k @ m), (k * m).sum())

def test_all_pairs_equal_the_loop_and_cost_a_tenth():
    left, right = ([noise(32, 600, 20 * s + i) for i in range(16)] for s in (1, 2))
    def loop(): return torch.stack([torch.stack([cka(x, y) for y in right]) for x in left])
    def product(): return compare(as_grams(*left), as_grams(*right)).matrix
    work = []
    for f in (loop, product):
        with FlopCounterMode(display=False) as counter: f()
        work.append(counter.get_total_flops())
    torch.testing.assert_close(product(), loop(), atol=1e-6, rtol=0)
    assert work[0] >= 10 * work[1]


# Exact properties

def test_unbiased_is_the_u_statistic():
    for seed in range(3):
        x, y = noise(6, 3, seed).double() + 2, noise(6, 2, seed + 10).double()
        assert abs(hsic(x, y) - brute(x, y)) < 1e-10 and abs(hsic(x, y) - song(x, y)) < 1e-10

def test_biased_is_the_double_centred_product():
    x, y = (v.double() for v in related(12))
    h = torch.eye(12).double() - 1 / 12
    torch.testing.assert_close(hsic(x, y, 'biased'), torch.trace(x @ x.T @ h @ y @ y.T @ h) / 11**2)

@given(seed=st.integers(0, 10**6), n=st.integers(5, 40), p=st.integers(1, 12), kernel=st.sampled_from(['linear', 'rbf']), estimator=st.sampled_from(['biased', 'unbiased']))
def test_invariances(seed, n, p, kernel, estimator):
    x, y = (v.double() for v in related(n, p, 4, seed))
    turn, order = torch.linalg.qr(noise(p, p, seed)).Q.double(), torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    value = cka(x, y, estimator, kernel)
    for same in (cka(x @ turn, y, estimator, kernel), cka(-7 * x, .01 * y, estimator, kernel), cka(x[order], y[order], estimator, kernel), cka(x + 100, y, estimator, kernel), cka(y, x, estimator, kernel)):
        assert abs(same - value) < 1e-5
    assert abs(cka(x, x, estimator, kernel) - 1) < 1e-6 and -1 - 1e-9 <= value <= 1 + 1e-9

def test_rbf_uses_the_median_and_becomes_linear():
    x, y = related()
    distances = torch.pdist(x.double())
    expected = torch.exp(-torch.cdist(x.double(), x.double()) ** 2 / (2 * (.5 * distances.square().median().sqrt()) ** 2))
    torch.testing.assert_close(rbf(gram(x.double()), .5), expected)
    assert abs(cka(x, y, kernel='rbf', bandwidth=100) - cka(x, y)) < 1e-3
    assert rbf(torch.zeros(3, 3)).eq(1).all()

def test_gradient_reaches_the_features():
    x, y = (v.double() for v in related(10, 3, 2))
    for options in (dict(), dict(estimator='biased'), dict(kernel='rbf'), dict(estimator='minibatch', batch=5)):
        assert torch.autograd.gradcheck(lambda v, o=options: cka(v, y, **o), x.clone().requires_grad_())


# Networks

def test_grams_are_those_of_the_features():
    net = network()
    found = grams(net, IMAGES)
    assert found.layers == ('0', '1', '2', '3', '4') and found.p == (144, 144, 144, 144, 5) and found.n == 40
    with torch.no_grad(): features = net[:3](IMAGES)
    torch.testing.assert_close(found.matrices[2], gram(features), atol=1e-4, rtol=1e-4)
    assert net.training and net[3].training and not any(m._forward_hooks for m in net.modules())

@pytest.mark.parametrize('size', [1, 7, 16, 39])
def test_blocks_equal_the_whole(size):
    whole, parts = grams(network(), IMAGES + 50), grams(network(), (IMAGES + 50).split(size))
    for k, m in zip(whole.matrices, parts.matrices, strict=True): torch.testing.assert_close(centre(k), centre(m), atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(compare(whole, estimator='biased').matrix, compare(parts, estimator='biased').matrix, atol=1e-5, rtol=0)

def test_features_are_never_kept():
    "Outputs of earlier layers are gone when a later layer runs."
    import weakref
    net, alive = nn.Sequential(*[nn.Linear(36, 36) for _ in range(6)]), []
    seen = []
    def look(module, args, output):
        alive.append(sum(r() is not None for r in seen))
        seen.append(weakref.ref(output))
    hooks = [m.register_forward_hook(look) for m in net]
    grams(net, IMAGES.flatten(1), taps=[str(i) for i in range(6)])
    for h in hooks: h.remove()
    assert len(alive) == 6 and max(alive) <= 1

def test_map_of_networks():
    a, b = network(0), network(1)
    loader = list(zip(IMAGES.split(15), torch.arange(40).split(15), strict=True))  # with labels, as training takes them
    told = cka_map(a, loader, b, taps=['1', '4'], permutations=20)
    assert told.rows == told.columns == ('1', '4') and told.matrix.isfinite().all() and told.null.shape == (3, 2, 2)
    torch.testing.assert_close(told.matrix, cka_map(a, IMAGES, b, taps=['1', '4']).matrix, atol=1e-6, rtol=0)
    assert abs(cka_map(a, loader).matrix.diagonal() - 1).max() < 1e-6
    streamed = cka_map(a, loader, b, taps=['1', '4'], estimator='minibatch', permutations=5)
    assert streamed.n == 40 and streamed.error.shape == (2, 2) and streamed.null.shape == (3, 2, 2)
    torch.testing.assert_close(streamed.matrix, compare(grams(a, loader, ['1', '4']), grams(b, loader, ['1', '4']), 'minibatch', batch=15).matrix, atol=1e-6, rtol=0)

def test_a_shuffling_loader_shows_both_the_same_rows():
    class Shuffling:
        seed = 0
        def __iter__(self):
            self.seed += 1
            yield IMAGES[torch.randperm(40, generator=torch.Generator().manual_seed(self.seed))]
    assert abs(cka_map(network(), Shuffling(), network()).matrix.diagonal() - 1).max() < 1e-6

def test_taps_input_select_and_tokens():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)
        def forward(self, x): return x, self.inner(x)
    net = nn.Sequential(nn.Unflatten(1, (6, 6)), Two())
    taps = [Tap('1.inner', side='input', name='in'), Tap('1', select=1, name='out'), Tap('1', select=lambda o: o[1][:, 0], name='first')]
    found = grams(net, IMAGES.flatten(1), taps)
    assert found.layers == ('in', 'out', 'first') and found.p == (36, 18, 3)
    torch.testing.assert_close(found.matrices[0], gram(IMAGES), atol=1e-4, rtol=1e-4)

def test_rows_and_layers_of_grams():
    x, y = related()
    g, index = as_grams(x, y), torch.arange(0, 128, 3)
    torch.testing.assert_close(compare(g.rows(index)).matrix[0, 1], cka(x[index], y[index]), atol=1e-6, rtol=0)
    torch.testing.assert_close(compare(g.rows(torch.arange(128) < 50)).matrix[0, 1], cka(x[:50], y[:50]), atol=1e-6, rtol=0)
    assert g.pick(['1']).p == (30,) and compare(g.pick(['1', '0'])).rows == ('1', '0')


# Doubt

@pytest.mark.parametrize('kernel', ['linear', 'rbf'])
@pytest.mark.parametrize('estimator', ['biased', 'unbiased', 'minibatch'])
def test_a_dead_layer_is_masked_and_nothing_is_nan(kernel, estimator):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.dead, self.b = nn.Linear(36, 8), nn.Identity(), nn.Identity()
        def forward(self, x):
            x = self.a(x)
            return self.b(x) + self.dead(torch.full_like(x, .1))
    told = cka_map(Net(), IMAGES.flatten(1).split(10), estimator=estimator, kernel=kernel, permutations=10)
    dead = told.rows.index('dead')
    assert not told.trusted[dead].any() and not told.trusted[:, dead].any() and (told.matrix[dead] == 0).all()
    assert told.trusted.sum() == 4 and told.matrix.isfinite().all() and told.null.isfinite().all()
    assert told.error is None or told.error.isfinite().all()
    assert {n.kind: n.layers for n in told.notes}['constant'] == ('dead',)
    assert told.table().notna().all(axis=None) and set(told.best_match().row) == {'a', 'b'}
    figure, _ = told.figure()
    z = figure.data[0].z
    assert z[dead][0] is None or z[dead][0] != z[dead][0]  # a gap, which shows the grey behind it

@pytest.mark.parametrize('size', [40, 8])
def test_what_varies_by_rounding_alone_is_constant(size):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.still, self.moving = nn.Identity(), nn.Identity()
        def forward(self, x): return self.still(100 + 1e-5 * x), self.moving(100 + .1 * x)
    told = cka_map(Net(), IMAGES.flatten(1).split(size), taps=['still', 'moving'], estimator='biased')
    assert told.trusted.tolist() == [[False, False], [False, True]] and told.matrix[0].tolist() == [0, 0]
    with pytest.raises(InputError, match='do not vary'): cka(100 + 1e-5 * IMAGES, IMAGES)

@pytest.mark.parametrize('estimator', ['biased', 'unbiased'])
def test_what_centring_leaves_by_rounding_is_zero(estimator):
    for n in (5, 7, 11, 40): assert (centre(torch.full((n, n), .3).double() + torch.linspace(0, 1, n)[:, None] + torch.linspace(0, 1, n), estimator) == 0).all()

def test_hsic_below_zero_is_not_trusted():
    values = [compare(as_grams(noise(20, 5, s)), as_grams(noise(20, 5, s + 50))) for s in range(20)]
    low = [v for v in values if v.matrix[0, 0] <= 0]
    assert 3 < len(low) < 17 and not any(v.trusted[0, 0] for v in low) and all('not positive' in [n.kind for n in v.notes] for v in low)
    assert low[0].figure()[0].layout.title.text.startswith('No cell')

def test_band_of_shuffled_rows():
    x, y = related(64, 400, 400)
    for estimator in ('biased', 'unbiased'):
        told = compare(as_grams(x, noise(64, 400, 7)), as_grams(y, noise(64, 400, 8)), estimator, permutations=200)
        assert not told.chance[0, 0] and (told.null[0] <= told.null[1]).all() and (told.null[1] <= told.null[2]).all()
        low, _, high = told.null[:, 1, 1]
        assert low - .05 < told.matrix[1, 1] < high + .05
        expected = [cka(x[torch.randperm(64, generator=g)], y, estimator) for g in [torch.Generator().manual_seed(0)] for _ in range(200)]
        torch.testing.assert_close(told.null[1, 0, 0], torch.stack(expected).mean(), atol=1e-6, rtol=0)
    assert abs(compare(as_grams(x), as_grams(y), permutations=200).null[1]).max() < .02

def test_band_keeps_its_promise():
    "Of unrelated pairs, about 2.5 % lie above the band."
    above = [not compare(as_grams(noise(24, 6, s)), as_grams(noise(24, 6, s + 1000)), permutations=100).chance.item() for s in range(200)]
    assert sum(above) / 200 < .08

def test_notes_name_few_rows_and_short_batches():
    told = compare(as_grams(noise(18, 40, 1), noise(18, 3, 2)), estimator='minibatch', batch=8)
    kinds = {n.kind: n for n in told.notes}
    assert kinds['n < p'].layers == ('0',) and kinds['short batch'].said.startswith('2 rows') and told.n == 16
    assert not compare(as_grams(noise(18, 3, 2))).notes

def test_tables_and_matches():
    x, y = related()
    told = compare(as_grams(x, y, noise(128, 9, 30)), as_grams(y, x), permutations=10)
    assert told.table().shape == (6, 10) and told.table().cka.tolist() == told.matrix.flatten().tolist()
    assert told.best_match().iloc[:2][['row', 'column']].to_numpy().tolist() == [['0', '1'], ['1', '0']]
    assert compare(as_grams(x, y)).diagonal().cka.tolist() == pytest.approx([1, 1])
    with pytest.raises(InputError, match='different numbers of layers'): told.diagonal()
    with pytest.raises(InputError, match='permutations=100'): _ = compare(as_grams(x)).chance

def test_layer_names_are_escaped():
    g = as_grams(*related())
    evil = Grams(('<img onerror=x>', 'b'), g.p, g.matrices)
    layout = compare(evil, permutations=3).figure(('<b onclick>', 'b'))[0].layout
    texts = [*layout.xaxis.ticktext, *layout.yaxis.ticktext, layout.title.text.replace('<br>', ''), layout.xaxis.title.text, layout.yaxis.title.text]
    assert not any('<' in t for t in texts) and '&lt;img onerror=x&gt;' in texts

BAD = {
    'estimator': lambda x, y: cka(x, y, 'unbised'), 'kernel': lambda x, y: cka(x, y, kernel='poly'),
    'bandwidth': lambda x, y: cka(x, y, kernel='rbf', bandwidth=0), 'batch without minibatch': lambda x, y: cka(x, y, batch=8),
    'minibatch without batch': lambda x, y: cka(x, y, 'minibatch'), 'rows': lambda x, y: cka(x, y[:-1]),
    'rows of hsic': lambda x, y: hsic(x, y[:-1]), 'three rows': lambda x, y: cka(x[:3], y[:3]), 'constant': lambda x, y: cka(x * 0 + .1, y),
    'constant, rbf': lambda x, y: cka(x * 0 + .1, y, kernel='rbf'), 'NaN': lambda x, y: cka(x * math.nan, y), 'complex': lambda x, y: cka(x + 1j, y),
    'scalar': lambda x, y: gram(torch.tensor(1.)), 'grams of other rows': lambda x, y: compare(as_grams(x), as_grams(y[:-1])),
    'no layer': lambda x, y: as_grams(x).pick(['9']), 'endless': lambda x, y: grams(network(), itertools.repeat(IMAGES), limit=100),
    'no data': lambda x, y: grams(network(), []), 'not finite': lambda x, y: grams(network(), IMAGES * math.inf),
    'unknown tap': lambda x, y: cka_map(network(), IMAGES, taps=['9']), 'short batches': lambda x, y: cka_map(network(), IMAGES[:3], estimator='minibatch'),
    'rows of a layer': lambda x, y: grams(nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Flatten(0)), IMAGES, taps=['1', '2'])}

@pytest.mark.parametrize('wrong', BAD.values(), ids=BAD)
def test_wrong_input_is_named(wrong):
    with pytest.raises(InputError): wrong(*related())


# Affinity

def maps(n=3, c=8, h=4, w=5, seed=0): return noise(n, c * h * w, seed).view(n, c, h, w)

def slow_affinity(x, kind, normalise):
    "Entry by entry."
    rows = {'spatial': lambda o: o.flatten(1).T, 'channel': lambda o: o.flatten(1)}
    stacks = [x.flatten(1)] if kind == 'batch' else [rows[kind](o) for o in x]
    def cell(v, i, j):
        if normalise == 'cosine': return (v[i] @ v[j] / (v[i].norm() * v[j].norm())).item()
        return (v[i] @ v[j]).item() / (1 if normalise == 'raw' else (v @ v[i]).norm().item())
    found = torch.stack([torch.tensor([[cell(v, i, j) for j in range(len(v))] for i in range(len(v))]) for v in stacks])
    return found[0] if kind == 'batch' else found

@pytest.mark.parametrize('kind', ['spatial', 'channel', 'batch'])
@pytest.mark.parametrize('normalise', ['cosine', 'row', 'raw'])
def test_affinity_entry_by_entry(kind, normalise):
    x = maps(h=2, w=3)
    torch.testing.assert_close(affinity(x, kind, normalise), slow_affinity(x, kind, normalise), atol=1e-5, rtol=1e-5)
    assert affinity(x.half(), kind, normalise).dtype == torch.float32

@given(seed=st.integers(0, 10**6), n=st.integers(1, 4), c=st.integers(1, 6), h=st.integers(1, 4), w=st.integers(1, 4))
def test_what_affinities_cannot_see(seed, n, c, h, w):
    x = maps(n, c, h, w, seed).double()
    generator = torch.Generator().manual_seed(seed)
    turn, order = torch.linalg.qr(noise(c, c, seed)).Q.double(), torch.randperm(h * w, generator=generator)
    shuffled, scale = x.flatten(2)[..., order].view_as(x), torch.rand(n, 1, h, w, generator=generator).double() + .1
    same = [(affinity(torch.einsum('dc,nchw->ndhw', turn, x)), affinity(x)), (affinity(x * scale), affinity(x)), (affinity(shuffled), affinity(x)[:, order][:, :, order]),
            (affinity(shuffled, 'channel', 'raw'), affinity(x, 'channel', 'raw')), (affinity(shuffled, 'batch', 'row'), affinity(x, 'batch', 'row')), (affinity(9 * x, 'batch', 'row'), affinity(x, 'batch', 'row')),
            (affinity(x + noise(c, 1, seed + 1).double()[..., None], centred=True, normalise='raw'), affinity(x, centred=True, normalise='raw'))]
    for a, b in same: torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    a = affinity(x)
    torch.testing.assert_close(a, a.mT)
    assert torch.linalg.eigvalsh(a).min() > -1e-9 and a.abs().max() < 1 + 1e-9

def test_tokens_and_maps_agree():
    x = maps()
    tokens = torch.cat([torch.ones(3, 2, 8), x.flatten(2).mT], 1)
    assert torch.equal(as_map(tokens, (4, 5), skip=2), x)
    for kind in ('spatial', 'channel'): torch.testing.assert_close(affinity(tokens[:, 2:], kind), affinity(x, kind))

def test_batch_affinity_is_the_gram_of_cka():
    x, y = related()
    a, b = (affinity(v, 'batch', 'raw', centred=True).flatten() for v in (x, y))
    torch.testing.assert_close(nn.functional.cosine_similarity(a, b, 0).double(), cka(x, y, 'biased'), atol=1e-5, rtol=0)

def test_temperature_and_dead_places():
    x = maps()
    x[:, :, 0, 0] = 0
    a = affinity(x)
    assert a.isfinite().all() and (a[:, 0] == 0).all() and (a[:, :, 0] == 0).all()
    hot, cold = affinity(x, temperature=1e6), affinity(x[:, :, 1:], temperature=1e-3)
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / 20), atol=1e-4, rtol=0)
    torch.testing.assert_close(cold, torch.eye(15).expand(3, 15, 15), atol=1e-4, rtol=0)
    x.requires_grad_()
    contrast(x, maps(seed=5)).loss.backward()
    assert x.grad.isfinite().all()

@pytest.mark.parametrize('options', [dict(), dict(kind='channel', centred=True), dict(kind='batch', normalise='row'), dict(kind='batch', temperature=.3)])
def test_gradient_of_the_affinity_loss(options):
    x, y = maps(2, 2, 2, 2).double(), maps(2, 2, 2, 2, 1).double()
    assert torch.autograd.gradcheck(lambda v: contrast(v, y, **options).loss, x.requires_grad_())

def test_difference_loss_and_contribution():
    t, s = maps(), maps(c=3, seed=1)
    found = contrast(t, s)
    torch.testing.assert_close(found.loss, (affinity(t) - affinity(s)).square().mean())
    share = found.contribution()
    assert abs(share.sum() - 1) < 1e-9 and share.min() >= 0 and found.grid == (4, 5)
    torch.testing.assert_close(share.max(), (found.difference.abs().max() ** 2 / found.difference.square().sum()).double())
    frame = pd.concat([found.table(i) for i in range(3)])
    assert len(frame) == 3 * 400 and abs(frame.share.sum() - 1) < 1e-9
    torch.testing.assert_close(torch.tensor(frame.difference.to_numpy()), found.difference.flatten().double())
    assert contrast(t, t).loss == 0 and contrast(t, t).contribution().sum() == 0

def test_the_larger_map_is_pooled():
    t, s = maps(h=8, w=4), maps(c=3, h=4, w=6, seed=1)
    a, b = match(t, s)
    assert a.shape[2:] == b.shape[2:] == (4, 4)
    torch.testing.assert_close(a[0, 0, 0, 0], t[0, 0, :2, 0].mean())
    torch.testing.assert_close(contrast(t, s).teacher, affinity(a))
    assert contrast(t, s, 'batch').teacher.shape == (1, 3, 3)

def test_chance_deals_every_image_to_another():
    t = maps(6)
    near = contrast(t, t + .01 * maps(6, seed=1))
    assert near.loss < .01 * near.chance() and near.chance() == near.chance(generator=torch.Generator().manual_seed(0))
    strangers = contrast(t, maps(6, seed=2))
    assert .8 < strangers.loss.item() / strangers.chance() < 1.25
    for seed in range(50): assert (_dealt(5, torch.Generator().manual_seed(seed)) != torch.arange(5)).all()
    two = contrast(t[:2], t[:2])
    torch.testing.assert_close(torch.tensor(two.chance()), (affinity(t[:2]) - affinity(t[:2]).flip(0)).square().mean())

def test_sorted_by_class():
    labels = torch.tensor([1, 0, 1, 0, 2])
    found = contrast(maps(5), maps(5, c=2, seed=1), 'batch')
    ordered = found.by_class(labels, ('a', 'b', 'c'))
    assert ordered.names == ('a', 'a', 'b', 'b', 'c')
    order = [1, 3, 0, 2, 4]
    assert torch.equal(ordered.student[0], found.student[0][order][:, order]) and torch.equal(ordered.loss, found.loss)
    assert ordered.table().iloc[2][['name_i', 'name_j']].tolist() == ['a', 'b']

def test_figures_keep_their_scale():
    found = contrast(maps(), maps(seed=1))
    fig, frame = affinity_figure(found, 1)
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (-1, 1) and len(frame) == 400
    assert abs(fig.data[2].z - found.difference[1].numpy()).max() < 1e-6
    raw, _ = affinity_figure(contrast(maps(), 3 * maps(seed=1), normalise='raw'))
    assert raw.layout.coloraxis.cmax > 3
    evil = contrast(maps(2), maps(2), 'batch').by_class(torch.tensor([0, 1]), ('<img src=x>', 'b'))
    assert affinity_figure(evil)[0].layout.xaxis.ticktext == ('&lt;img src=x&gt;', 'b')

def test_a_row_over_the_image():
    found = contrast(maps(h=2, w=2), maps(h=2, w=2, seed=1))
    fig, frame = overlay(found, torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)), (1, 0), index=2)
    assert frame.teacher.tolist() == pytest.approx(found.teacher[2, 2].tolist()) and frame.row.tolist() == [0, 0, 1, 1]
    assert fig.data[3].x[0] == 1.5 and fig.data[3].x[1] == 5.5  # places over the middle of their pixels
    mark = fig.data[1]
    assert (mark.x[0], mark.y[0]) == (1.5, 5.5)

def test_contrast_of_networks():
    a, b = network(0), network(1)
    found = contrast_networks(a, b, IMAGES, '1', '0')
    with torch.no_grad(): torch.testing.assert_close(found.student, affinity(b[0](IMAGES)))
    assert a.training and not any(m._forward_hooks for m in a.modules()) and found.teacher.shape == (40, 36, 36)

WRONG = {
    'kind': lambda x: affinity(x, 'spacial'), 'normalise': lambda x: affinity(x, 'batch', 'l2'), 'temperature': lambda x: affinity(x, temperature=0),
    'a vector an image': lambda x: affinity(x.flatten(1)), 'five dimensions': lambda x: affinity(x[None]), 'NaN': lambda x: affinity(x * math.nan),
    'too many places': lambda x: affinity(torch.zeros(1, 1, 65, 65)), 'images': lambda x: contrast(x, x[:2]), 'channels': lambda x: contrast(x, x[:, :3], 'channel'),
    'tokens': lambda x: contrast(x.flatten(2).mT, x.flatten(2).mT[:, :5]), 'grid': lambda x: as_map(x.flatten(2).mT, (3, 3)), 'one image': lambda x: contrast(x[:1], x[:1]).chance(),
    'labels': lambda x: contrast(x, x, 'batch').by_class(torch.tensor([0])), 'labels of places': lambda x: contrast(x, x).by_class(torch.tensor([0, 1, 2])),
    'no grid': lambda x: overlay(contrast(x, x, 'batch'), x[0, :1], (0, 0)), 'no such place': lambda x: overlay(contrast(x, x), x[0, :1], (4, 0))}

@pytest.mark.parametrize('wrong', WRONG.values(), ids=WRONG)
def test_wrong_affinity_input_is_named(wrong):
    with pytest.raises(InputError): wrong(maps())
