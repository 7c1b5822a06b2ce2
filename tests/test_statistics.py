"""Statistics: every kind of layer against brute force in double precision, nothing left changed, wrong counts found, stale files refused."""
import copy
import itertools

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lowrank_distill.adapters.lora import LoRA
from lowrank_distill.core.errors import DamagedFile, InputError, RunFailed
from lowrank_distill.core.files import load_tensors, save_tensors
from lowrank_distill.core.layers import sites, view
from lowrank_distill.shapes import statistics
from lowrank_distill.shapes.adapter import adapt
from lowrank_distill.shapes.procedure import Batches
from lowrank_distill.shapes.statistics import KINDS, collect, counted, load_statistics, rows

def seeded(make, seed=0):
    "What `make()` builds, the same at each call."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()

def randn(*shape, seed=0, dtype=torch.double): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def mse(model, batch): return (model(batch['inputs']) - 1).square().mean()

def mlp(seed=0): return seeded(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(.5), nn.Linear(7, 3)).double(), seed)

def cut(x, size): return list(x.split(size))


# Each kind of layer

@given(dims=st.integers(1, 3), stride=st.integers(1, 2), dilation=st.integers(1, 2), groups=st.integers(1, 2), kernel=st.integers(1, 3),
       padding=st.sampled_from([0, 1, 2, 'same', 'valid']), mode=st.sampled_from(['zeros', 'reflect', 'circular', 'replicate']))
def test_rows_of_convolutions(dims, stride, dilation, groups, kernel, padding, mode):
    if padding == 'same': stride = 1
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2 * groups, 3 * groups, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=mode, bias=False).double()
    x = randn(2, 2 * groups, *[6] * dims)
    found = rows(view(layer), x)
    products = [r @ m.T for r, m in zip(found, view(layer).matrix(layer.weight).chunk(groups), strict=True)]
    torch.testing.assert_close(torch.cat(products, -1).movedim(-1, 1), layer(x))
    assert torch.equal(rows(view(layer), x[0]), found[:, :1])  # without a batch

LAYERS = {'linear': (lambda: nn.Linear(4, 3), (4,)), 'tokens': (lambda: nn.Linear(4, 3), (6, 4)), 'conv1d_hf': (lambda: Conv1D(3, 4), (6, 4)),
          'conv1d': (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 7)), 'conv2d': (lambda: nn.Conv2d(4, 6, 2, stride=2, groups=2), (4, 5, 5)),
          'conv3d': (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 3)), 'depthwise': (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 5, 5))}

@pytest.mark.parametrize('sizes', [(1,), (3, 1), (4, 4, 3)])
@pytest.mark.parametrize('kind', LAYERS)
def test_kinds(kind, sizes):
    make, shape = LAYERS[kind]
    layer, x = seeded(lambda: make().double()), randn(sum(sizes), *shape)
    net = nn.Sequential(layer, nn.Tanh())
    site = collect(net, x.split(sizes), KINDS, loss=mse, dtype=torch.float64)['0']
    grads = [torch.autograd.grad(mse(net, {'inputs': v[None]}), layer.weight)[0] for v in x]
    patches = rows(view(layer), x).flatten(1, -2)
    moment = torch.stack([torch.einsum('ni,nj->ij', p, p) / len(p) for p in patches]).squeeze(0)
    expected = dict(second_moment=moment, activation_scale=patches.square().mean(1).sqrt().squeeze(0),
                    gradient=view(layer).matrix(torch.stack(grads).mean(0)), fisher=view(layer).matrix(torch.stack(grads).square().mean(0)))
    for what, value in expected.items(): torch.testing.assert_close(site[what], value, atol=1e-12, rtol=1e-10)
    assert site.rows == patches.shape[1] and site.weight == len(x) and site.shape == tuple(layer.weight.shape)

def test_embedding():
    net = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 2)).double()
    x = torch.tensor([[0, 2, 2], [5, 2, 1], [0, 0, 4]])
    site = collect(net, cut(x, 2), {'activation_scale', 'gradient', 'fisher'}, targets='0*', loss=mse, dtype=torch.float64)['0']
    torch.testing.assert_close(site.activation_scale ** 2, x.flatten().bincount(minlength=6) / 9, check_dtype=False)
    torch.testing.assert_close(site.gradient, torch.autograd.grad(mse(net, {'inputs': x}), net[0].weight)[0].T)
    mean = collect(net, [x], {'activation_scale'}, targets='0*', scale_norm=1., dtype=torch.float64)['0'].activation_scale
    torch.testing.assert_close(mean, site.activation_scale ** 2)

def test_bare_parameters_and_attention():
    net, x = seeded(lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0., batch_first=True).double()), randn(3, 5, 4)
    found = collect(net, [x], {'gradient'}, targets=['*.in_proj_weight', '*.out_proj', 'linear*'], loss=mse, dtype=torch.float64)
    for n, s in found.items():
        p = net.get_parameter(n if n.endswith('weight') else f'{n}.weight')
        torch.testing.assert_close(s.gradient, torch.autograd.grad(mse(net.eval(), {'inputs': x}), p)[0])
    assert all(s.rows == 15 for s in collect(net, [x], {'second_moment'}, targets='linear*').values())  # torch leaves its fused path where a hook is

@pytest.mark.parametrize('p', [1., 2., 3.5])
def test_scale_norms(p):
    x = randn(9, 5)
    found = collect(mlp(), cut(x, 4), {'activation_scale'}, targets='0', scale_norm=p, dtype=torch.float64)['0'].activation_scale
    torch.testing.assert_close(found, x.abs().pow(p).mean(0) ** (1 / p))


# Counting

@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_batches_do_not_matter(sizes):
    x, net = randn(sum(sizes), 5), mlp()
    for kinds in (KINDS, ['gradient']):  # sample by sample, and whole batches
        one, many = (collect(net, b, kinds, loss=mse, dtype=torch.float64) for b in ([x], x.split(sizes)))
        for n, k in itertools.product(one, kinds): torch.testing.assert_close(many[n][k], one[n][k], atol=1e-12, rtol=1e-9)

def test_twins_differ():
    x, net = randn(9, 5), mlp()
    right = collect(net, [x], KINDS, loss=mse, dtype=torch.float64)['3']
    parts = [collect(net, [b], KINDS, loss=mse, dtype=torch.float64)['3'] for b in cut(x, 8)]
    for k in ('second_moment', 'gradient'):
        assert not torch.allclose(sum(p[k] for p in parts) / 2, right[k], rtol=1e-2)
        torch.testing.assert_close((8 * parts[0][k] + parts[1][k]) / 9, right[k])
    batch = collect(net, cut(x, 8), {'fisher'}, loss=mse, fisher_of='batch', dtype=torch.float64)['3'].fisher
    torch.testing.assert_close(batch, (8 * parts[0].gradient ** 2 + parts[1].gradient ** 2) / 9)  # n_b g_b^2, over all n
    assert batch.sum() < .9 * right.fisher.sum()

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()

@pytest.mark.parametrize(('places', 'counts'), [((3, 4), 4), ((12,), 4), ((3,), 2), ((3, 4, 2), 8)])
def test_masks_fit(places, counts): assert counted(MASK, places, 'layer').shape == (torch.Size(places).numel(),) and counted(MASK, places, 'layer').sum() == counts

@pytest.mark.parametrize('places', [(3, 5), (4, 3), (11,), (2, 4)])
def test_masks_that_do_not_fit(places):
    with pytest.raises(InputError, match="'layer'"): counted(MASK, places, 'layer')

def test_padding_changes_nothing():
    net, x = mlp(), randn(3, 4, 5)
    def loss(model, batch): return ((model(batch['inputs']) - 1).square().mean(-1) * batch['mask']).sum() / batch['mask'].sum().clamp(min=1)
    found = [collect(net, [{'inputs': torch.where(MASK[..., None], x, noise), 'mask': MASK}], KINDS, loss=loss, dtype=torch.float64) for noise in (torch.zeros(()).double(), 100 * randn(3, 4, 5, seed=1))]
    tokens = x[MASK]
    plain = collect(net, [tokens], ['second_moment', 'activation_scale', 'gradient'], loss=mse, dtype=torch.float64)
    for n in found[0]:
        assert all(torch.equal(found[0][n][k], found[1][n][k]) for k in KINDS) and found[0][n].rows == 4 == found[0][n].weight
        for k in plain[n].tensors: torch.testing.assert_close(found[0][n][k], plain[n][k], atol=1e-12, rtol=1e-9)
    everything = collect(net, [{'inputs': x, 'mask': MASK}], {'second_moment'}, mask=lambda batch: None, dtype=torch.float64)
    assert everything['0'].rows == 12 and not torch.allclose(everything['0'].second_moment, plain['0'].second_moment)

def test_batches_of_a_procedure():
    x, net = randn(9, 5), mlp()
    a = collect(net, Batches(x, 4, drop_last=False), {'second_moment'}, dtype=torch.float64)
    torch.testing.assert_close(a['0'].second_moment, x.T @ x / 9)
    assert collect(net, Batches(x, 4), {'second_moment'})['0'].rows == 8


# Order

def halve(name, site, found): site.weight.data.mul_(.5)

def test_sequence_is_what_is_seen_afterwards():
    net, x, seen = mlp(), [randn(6, 5), randn(2, 5, seed=1)], []
    start = collect(net, x, {'second_moment'}, dtype=torch.float64)
    def change(name, site, found):
        seen.append((name, float(site.weight.detach().abs().sum())))
        halve(name, site, found)
    along = collect(net, x, {'second_moment'}, order='sequential', change=change, dtype=torch.float64)
    after = collect(net, x, {'second_moment'}, dtype=torch.float64)
    assert [n for n, _ in seen] == ['0', '3'] and all(torch.equal(along[n].second_moment, after[n].second_moment) for n in after)
    assert torch.equal(along['0'].second_moment, start['0'].second_moment) and not torch.allclose(along['3'].second_moment, start['3'].second_moment)
    assert all(k == {'model': start.about['model'], 'data': start.about['data']}[w] for w, k in along.about.items() if w in ('model', 'data'))

def test_groups_change_together():
    net = nn.ModuleDict({'late': nn.Linear(3, 3), 'a': nn.Linear(3, 3), 'b': nn.Linear(3, 3)}).double()
    net.forward = lambda x: net['late'](net['a'](x).tanh() + net['b'](net['a'](x)))
    x, calls = [randn(4, 3)], []
    def change(name, site, found): calls.append(name), halve(name, site, found)
    grouped = collect(net, x, {'second_moment'}, order='sequential', groups=['[ab]', 'late'], change=change, dtype=torch.float64)
    assert calls == ['a', 'b', 'late']  # as they are called, not as they are listed
    net['a'].weight.data.mul_(2.)  # as it was when the group was collected
    torch.testing.assert_close(grouped['b'].second_moment, collect(net, x, {'second_moment'}, targets='b', dtype=torch.float64)['b'].second_moment)
    with pytest.raises(InputError, match='no group means'): collect(net, x, {'second_moment'}, order='sequential', groups=['a'])

def test_sequence_may_attach_adapters():
    net, x = mlp(), [randn(6, 5)]
    def compensate(name, site, found):
        handle = adapt(net, LoRA(rank=2), name, name=f'site{name}')
        for p in handle.parameters(): p.data.fill_(.3)
    along = collect(net, x, {'second_moment'}, order='sequential', change=compensate, dtype=torch.float64)
    after = collect(net, x, {'second_moment'}, targets=['0', '3'], dtype=torch.float64)
    assert list(along) == list(after) == ['0', '3'] and all(torch.equal(along[n].second_moment, after[n].second_moment) for n in after)


# Nothing is left behind

@pytest.mark.parametrize('fails', [False, True])
def test_everything_is_put_back(fails):
    net = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(.5), nn.Linear(4, 2)).double()).train()
    net[1].eval(), net[0].weight.requires_grad_(False)
    net[3].weight.grad = torch.ones(2, 4).double()
    grad, state, generator = net[3].weight.grad, copy.deepcopy(net.state_dict()), torch.get_rng_state()
    x = [randn(4, 5), torch.full((1, 5), torch.nan).double()] if fails else [randn(4, 5)]
    if fails:
        with pytest.raises(RunFailed, match='part 4'): collect(net, x, KINDS, loss=mse)
    else: collect(net, x, KINDS, loss=mse)
    assert [m.training for m in net.modules()] == [True, True, False, True, True] and [p.requires_grad for p in net.parameters()] == [False, *[True] * 5]
    assert net[3].weight.grad is grad and torch.equal(grad, torch.ones(2, 4).double()) and all(p.grad is None for p in net.parameters() if p is not net[3].weight)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and torch.equal(generator, torch.get_rng_state())
    assert not any(m._forward_pre_hooks for m in net.modules()) and not any(p._post_accumulate_grad_hooks for p in net.parameters() if p._post_accumulate_grad_hooks is not None)

def test_one_gradient_at_a_time(monkeypatch):
    net, alive, pull = seeded(lambda: nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)])), [], statistics.Sums.pull
    def look(self, *args):
        alive.append(sum(p.grad is not None for p in net.parameters()))
        return pull(self, *args)
    monkeypatch.setattr(statistics.Sums, 'pull', look)
    collect(net, [torch.randn(3, 4)], {'gradient'}, loss=mse)
    assert alive == [1] * 5

def test_half_precision_is_summed_in_single():
    net, x = mlp().bfloat16(), [randn(1, 5, seed=k).bfloat16() for k in range(300)]
    found, wide = (collect(net, x, KINDS, loss=mse, fisher_of='batch', dtype=d) for d in (torch.float32, torch.float64))
    for n, k in itertools.product(found, KINDS):
        assert found[n][k].dtype == torch.float32
        torch.testing.assert_close(found[n][k].double(), wide[n][k], rtol=1e-5, atol=1e-7)

def test_tied_weights_and_reused_layers():
    x = randn(4, 5)
    twice = nn.Sequential(nn.Linear(5, 5).double(), nn.Linear(5, 5).double())
    twice[1].weight = twice[0].weight
    found = collect(twice, [x], {'gradient', 'second_moment'}, loss=mse, dtype=torch.float64)
    whole = torch.autograd.grad(mse(twice, {'inputs': x}), twice[0].weight)[0]
    for s in found.values(): torch.testing.assert_close(s.gradient, whole)
    layer = nn.Linear(5, 5).double()
    again = collect(nn.Sequential(layer, layer), [x], {'gradient', 'second_moment'}, targets='0', loss=mse, dtype=torch.float64)['0']
    both = torch.cat([x, layer(x)])
    torch.testing.assert_close(again.second_moment, both.T @ both / 8)
    assert again.rows == 8

def test_a_gradient_in_pieces_is_refused():
    from torch.utils.checkpoint import checkpoint
    layer = nn.Linear(5, 5).double()
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.layer = layer
        def forward(self, x):
            x = x.detach().requires_grad_()
            return checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
    with pytest.raises(RunFailed, match='in pieces'): collect(Twice(), [randn(3, 5)], {'gradient'}, loss=mse)


# Networks of others

def gpt2():
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=30, n_positions=16, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return seeded(lambda: GPT2LMHeadModel(config).double())

def test_gpt2_with_padding():
    net, g = gpt2(), torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 30, (n,), generator=g) for n in (4, 9, 7, 2, 5)]
    def batch(some):
        ids = nn.utils.rnn.pad_sequence(some, batch_first=True)
        here = torch.arange(ids.shape[1]) < torch.tensor([[len(t)] for t in some])
        return dict(input_ids=ids, attention_mask=here.long(), labels=ids.masked_fill(~here, -100))
    def inputs(b): return {k: b[k] for k in ('input_ids', 'attention_mask')}
    def loss(model, b): return F.cross_entropy(model(**inputs(b)).logits[:, :-1].flatten(0, 1), b['labels'][:, 1:].flatten())
    def options(): return dict(targets='*.c_*', loss=loss, count=lambda b: (b['labels'][:, 1:] != -100).sum(), inputs=inputs, dtype=torch.float64)
    padded, alone = (collect(net, b, KINDS, **options()) for b in ([batch(texts[:3]), batch(texts[3:])], [batch([t]) for t in texts]))
    assert len(padded) == 8 and all(s.rows == 27 and s.weight == 22 for s in padded.values())
    for n, k in itertools.product(padded, KINDS): torch.testing.assert_close(padded[n][k], alone[n][k], atol=1e-12, rtol=1e-8)

def test_bert_pools():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=20, max_position_embeddings=8)
    net = seeded(lambda: BertForSequenceClassification(config).double())
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    found = collect(net, [dict(input_ids=torch.ones(2, 4, dtype=torch.long), attention_mask=mask)], {'second_moment'}, dtype=torch.float64)
    assert {s.rows for n, s in found.items() if 'layer' in n} == {5} and found['classifier'].rows == found['bert.pooler.dense'].rows == 2

def test_adapters_act_and_keep_their_names():
    net, x = mlp(), [randn(4, 5)]
    plain = collect(net, x, {'second_moment'}, dtype=torch.float64)
    handle = adapt(net, LoRA(rank=2))
    for p in handle.parameters(): p.data.fill_(.5)
    acting = collect(net, x, {'second_moment'}, dtype=torch.float64)
    with handle.use(): off = collect(net, x, {'second_moment'}, dtype=torch.float64)
    assert list(acting) == list(plain) and torch.equal(off['3'].second_moment, plain['3'].second_moment)
    assert not torch.allclose(acting['3'].second_moment, plain['3'].second_moment)
    with pytest.raises(InputError, match='no layer matches'): collect(net, x, {'gradient'}, targets='*.a', loss=mse)  # factors are no layers


# Files

@pytest.fixture
def saved(tmp_path):
    net, x = mlp(), [randn(4, 5), randn(2, 5, seed=1)]
    found = collect(net, x, KINDS, loss=mse, dtype=torch.float64, config={'seed': 1})
    return net, x, found, found.save(tmp_path/'statistics.safetensors')

def test_a_file_gives_everything_back(saved):
    net, x, found, path = saved
    for loader in (x, None):
        again = load_statistics(path, net, loader, {'seed': 1})
        assert again.about == found.about and list(again) == list(found) and all(torch.equal(again[n][k], found[n][k]) for n in found for k in KINDS)
        assert [(s.rows, s.weight, s.shape) for s in again.values()] == [(s.rows, s.weight, s.shape) for s in found.values()]
    assert again.table().equals(found.table())

@pytest.mark.parametrize('what', ['model', 'data', 'order of data', 'config'])
def test_stale_files_are_refused(saved, what):
    net, x, _, path = saved
    config = {'seed': 1}
    if what == 'model': net[0].bias.data[0] += 1e-12
    if what == 'data': x[1][0, 0] += 1e-12
    if what == 'order of data': x = x[::-1]
    if what == 'config': config = {}
    with pytest.raises(InputError, match='stale|another config'): load_statistics(path, net, x, config)

def test_damaged_files(saved, tmp_path):
    net, _, _, path = saved
    tensors, header = load_tensors(path)
    for change in (lambda t, h: t.pop('0:fisher'), lambda t, h: t.update(extra=torch.ones(1)), lambda t, h: h.update(kind='training'), lambda t, h: h['sites']['0'].pop('rows'),
                   lambda t, h: t['0:fisher'].fill_(torch.nan)):
        t, h = {k: v.clone() for k, v in tensors.items()}, copy.deepcopy(header)
        change(t, h)
        with pytest.raises(DamagedFile): load_statistics(save_tensors(tmp_path/'bad.safetensors', t, h), net, config={'seed': 1})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFile): load_statistics(path, net)


# What is refused

def test_refused():
    net, x = mlp(), [randn(4, 5)]
    tries = [('no statistic', lambda: collect(net, x, ['second_moments'])), ('nothing is asked', lambda: collect(net, x, [])), ('need a loss', lambda: collect(net, x, ['fisher'])),
             ('fisher_of', lambda: collect(net, x, ['fisher'], loss=mse, fisher_of='token')), ('order', lambda: collect(net, x, ['second_moment'], order='serial')),
             ('groups and change', lambda: collect(net, x, ['second_moment'], change=halve)), ('scale_norm', lambda: collect(net, x, ['activation_scale'], scale_norm=0.)),
             ('wider', lambda: collect(net, x, ['second_moment'], dtype=torch.bfloat16)), ('no batch', lambda: collect(net, [], ['second_moment'])),
             ('no batch', lambda: collect(net, [], ['second_moment'], order='sequential')), ('scalar', lambda: collect(net, x, ['gradient'], loss=lambda m, b: m(b['inputs']))),
             ('passes over', lambda: collect(net, (b for b in x), ['second_moment'], order='sequential')), ('none of the chosen', lambda: collect(net, x, ['gradient'], loss=lambda m, b: torch.ones(()))),
             ('no layer matches', lambda: collect(net, x, ['second_moment'], targets='7')), ('parameter without', lambda: collect(nn.MultiheadAttention(4, 2), x, ['second_moment'], targets='out_proj')),
             ('no input that counts', lambda: collect(net, x, ['second_moment'], mask=lambda b: torch.zeros(4, dtype=torch.bool))),
             ('diagonal', lambda: collect(nn.Sequential(nn.Embedding(3, 2)), [torch.tensor([1])], ['second_moment'], targets='0*'))]
    for said, wrong in tries:
        with pytest.raises(InputError, match=said): wrong()
    assert sites(net)['0'].weight.grad is None and all(p.requires_grad for p in net.parameters())

def test_what_is_never_reached():
    net = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]).double()
    net.forward = lambda x: net[0](x)
    for what in ('second_moment', 'gradient'):
        with pytest.raises(InputError, match="'1' (is reached by no input|gets no gradient)"): collect(net, [randn(2, 5)], {what}, loss=mse)
    assert collect(net, [randn(2, 5)], {'second_moment'}, exclude='1')['0'].rows == 2
