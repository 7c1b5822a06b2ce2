"""GaLore against torch's optimizers, against the official package where it is installed, and through stops, files and odd shapes."""
import copy
import math
import warnings

import pytest
import torch
from lowrank_distill.core.errors import InputError, RunFailed
from lowrank_distill.core.files import load_tensors, save_tensors
from lowrank_distill.core.linalg import subspace_overlap
from lowrank_distill.optimizers.galore import (
    CHOICES,
    GaLore,
    basis,
    dequantise,
    dynamic_map,
    galore_groups,
    in_backward,
    project,
    quantise,
    side,
    state_table,
    state_values,
    unprojected,
)
from lowrank_distill.shapes.procedure import Batches, Procedure, Stage
from lowrank_distill.shapes.train import pack, train, unpack
from torch import nn
from torch.nn import functional as F

SHAPES = [(9, 5), (5, 9), (6, 6)]

def gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(steps, *shape, generator=torch.Generator().manual_seed(seed)))

def followed(make, grads: list[torch.Tensor]) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    "A matrix of ones after `grads`, and its optimizer."
    w = nn.Parameter(torch.ones_like(grads[0]))
    opt = make([w])
    for grad in grads:
        w.grad = grad.clone()
        opt.step()
    return w, opt


# Projection

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('kind', CHOICES['kind'])
def test_every_kind_of_projection(shape, kind):
    grad, = gradients(shape, 1)
    held = basis(grad, 3, kind)
    which = side(shape, kind)
    assert set(held) == ({'left', 'right'} if which == 'full' else {which})
    m, n = shape
    low = project(grad, held)
    assert low.shape == (3 if 'left' in held else m, 3 if 'right' in held else n)
    if 'left' in held: torch.testing.assert_close(held['left'].T @ held['left'], torch.eye(3))
    if 'right' in held: torch.testing.assert_close(held['right'] @ held['right'].T, torch.eye(3))
    w, opt = followed(lambda p: GaLore(p, rank=3, kind=kind), [grad.double()])
    assert torch.linalg.matrix_rank(w.detach() - 1, atol=1e-9) == 3
    held = [v for v in opt.state[w].values() if isinstance(v, torch.Tensor)]
    assert sum(v.numel() for v in held) == state_values(shape, 3, kind)

def test_the_shorter_side_is_the_standard():
    assert [side(s) for s in SHAPES] == ['right', 'left', 'right']
    assert [side(s, 'reverse_std') for s in SHAPES] == ['left', 'right', 'left']

def test_randomized_basis_spans_nearly_the_same():
    g = torch.Generator().manual_seed(0)
    grad = torch.randn(60, 4, generator=g) @ torch.randn(4, 40, generator=g) + .01 * torch.randn(60, 40, generator=g)
    exact, near = basis(grad, 4), basis(grad, 4, generator=torch.Generator().manual_seed(1))
    assert subspace_overlap(exact['right'].T, near['right'].T) > .9999

@pytest.mark.parametrize('kind', ['left', 'right', 'full'])
def test_a_basis_holds_no_larger_storage(kind):
    for v in basis(torch.randn(40, 30), 3, kind).values(): assert v.untyped_storage().nbytes() == 4 * v.numel()

def test_a_gradient_in_16_bits_is_decomposed_in_32():
    w = nn.Parameter(torch.ones(9, 5, dtype=torch.bfloat16))
    opt = GaLore([w], rank=2)
    w.grad = torch.randn(9, 5).bfloat16()
    opt.step()
    state = opt.state[w]
    assert state['right'].dtype == torch.bfloat16 and state['m'].dtype == torch.float32 and w.isfinite().all()


# Rules

RULES = {'adamw': (dict(weight_decay=.1), lambda p: torch.optim.AdamW(p, .01, eps=1e-12, weight_decay=.1)),
         'adam': (dict(weight_decay=.1), lambda p: torch.optim.Adam(p, .01, eps=1e-12, weight_decay=.1)),
         'sgd': (dict(weight_decay=.1, momentum=.9), lambda p: torch.optim.SGD(p, .01, .9, weight_decay=.1))}

@pytest.mark.parametrize('inner', RULES)
def test_without_a_rank_it_is_the_plain_rule(inner):
    options, parent = RULES[inner]
    grads = gradients((9, 5), 6)
    ours, _ = followed(lambda p: GaLore(p, .01, inner=inner, eps=1e-12, **options), grads)
    theirs, _ = followed(parent, grads)
    # torch decays before the step, the official code after it: the same up to the product of both
    torch.testing.assert_close(ours, theirs, atol=2e-4 if inner == 'adamw' else 1e-6, rtol=0)

def test_decoupled_decay_is_of_the_whole_weight():
    w, _ = followed(lambda p: GaLore(p, .1, rank=1, weight_decay=.5), [torch.zeros(4, 3)])
    torch.testing.assert_close(w.detach(), torch.full((4, 3), .95))
    w, _ = followed(lambda p: GaLore(p, .1, rank=1, weight_decay=.5, inner='adafactor'), [torch.zeros(4, 3)])
    torch.testing.assert_close(w.detach(), torch.full((4, 3), .95))

@pytest.mark.parametrize('shape', SHAPES)
def test_sgd_at_full_rank_is_sgd(shape):
    grads = gradients(shape, 6)
    ours, _ = followed(lambda p: GaLore(p, .1, inner='sgd', rank=5, scale=1., gap=2, kind='left' if shape == (5, 9) else 'std'), grads)
    if min(shape) == 5: torch.testing.assert_close(ours, followed(lambda p: torch.optim.SGD(p, .1), grads)[0], atol=1e-5, rtol=0)
    else: assert (ours - followed(lambda p: torch.optim.SGD(p, .1), grads)[0]).abs().max() > 1e-3

def peer(inner: str):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        package = pytest.importorskip('galore_torch', reason='galore-torch is not installed (extra: peers)')
    options = dict(rank=2, update_proj_gap=3, scale=.25, proj_type='std')
    def adamw(p, gap, betas):
        group = options | dict(params=p, update_proj_gap=gap)
        return package.GaLoreAdamW([group], lr=.01, betas=betas, weight_decay=.1, no_deprecation_warning=True)
    def adafactor(p, gap, betas):
        group = options | dict(params=p, update_proj_gap=gap)
        return package.GaLoreAdafactor([group], lr=.01, scale_parameter=False, relative_step=False, weight_decay=.1)
    return dict(adamw=adamw, adafactor=adafactor)[inner]

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('inner', ['adamw', 'adafactor'])
@pytest.mark.parametrize('gap', [3, 100])
def test_step_by_step_as_the_official_package(shape, inner, gap):
    "Within one basis with momentum; over several bases without, since there the signs of a new basis, which are free, meet the old M."
    make, betas = peer(inner), (.9, .999) if gap == 100 else (0., .999)
    grads, options = gradients(shape, 8), dict(rank=2, gap=gap, betas=betas, inner=inner, weight_decay=.1)
    for count in (1, 4, 8):
        ours, _ = followed(lambda p: GaLore(p, .01, **options), grads[:count])
        theirs, _ = followed(lambda p: make(p, gap, betas), grads[:count])
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)

def test_the_official_projector_keeps_the_whole_svd():
    w, opt = followed(lambda p: peer('adamw')(p, 3, (.9, .999)), gradients((30, 20), 1))
    assert opt.state[w]['projector'].ortho_matrix.untyped_storage().nbytes() == 4 * 20 * 20
    w, opt = followed(lambda p: GaLore(p, rank=2), gradients((30, 20), 1))
    assert opt.state[w]['right'].untyped_storage().nbytes() == 4 * 2 * 20


# Eight bits

@pytest.mark.parametrize('signed', [True, False])
def test_the_map_is_that_of_bitsandbytes(signed):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        functional = pytest.importorskip('bitsandbytes.functional', reason='bitsandbytes is not installed (extra: peers)')
    torch.testing.assert_close(dynamic_map(signed), functional.create_dynamic_map(signed), atol=1e-7, rtol=0)

@pytest.mark.parametrize('signed', [True, False])
def test_levels(signed):
    levels = dynamic_map(signed)
    assert len(levels) == 256 and levels.max() == 1 and 0 in levels and (levels.diff() > 0).all() and (levels.min() < 0) == signed

@pytest.mark.parametrize('shape', [(1,), (256,), (257,), (3, 5, 7), (0,)])
def test_nearest_level_in_each_block(shape):
    x, levels = torch.randn(shape, generator=torch.Generator().manual_seed(0)), dynamic_map(True)
    codes, largest = quantise(x, levels, 64)
    back = dequantise(codes, largest, levels, 64)
    assert codes.shape == x.shape and codes.dtype == torch.uint8 and len(largest) == math.ceil(x.numel() / 64)
    by_hand = [min((v * big for v in levels.tolist()), key=lambda y, v=value: abs(y - v))
               for value, big in zip(x.flatten().tolist(), largest.repeat_interleave(64).tolist(), strict=False)]
    torch.testing.assert_close((back - x).abs().flatten(), (torch.tensor(by_hand) - x.flatten()).abs() if by_hand else x.flatten())

def test_a_block_of_zeros_stays_zero():
    levels = dynamic_map(False)
    assert (dequantise(*quantise(torch.zeros(300), levels), levels) == 0).all()

@pytest.mark.parametrize(('bits', 'expected'), [(32, 4.), (16, 2.), (8, 1 + 4 / 256)])
def test_bytes_of_the_moments(bits, expected):
    w, opt = followed(lambda p: GaLore(p, rank=32, bits=bits), gradients((256, 128), 1))
    layer = nn.Linear(128, 256, bias=False)
    layer.weight = w
    held = state_table(opt, layer).bytes.item()
    assert held == 4 * 32 * 128 + 2 * 256 * 32 * expected

@pytest.mark.parametrize('bits', [16, 8])
def test_fewer_bits_take_nearly_the_same_steps(bits):
    grads = [.03 + .1 * g for g in gradients((256, 128), 30)]
    (exact, _), (coarse, _) = (followed(lambda p, b=b: GaLore(p, rank=32, gap=10, bits=b), grads) for b in (32, bits))
    assert 0 < (exact - coarse).norm() / (exact - 1).norm() < .05


# Groups

class Model(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed, self.place = nn.Embedding(20, 8), nn.Parameter(torch.zeros(1, 5, 8))
        self.conv, self.attn = nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.up, self.head = nn.LayerNorm(8), nn.Linear(8, 20), nn.Linear(20 if not tied else 8, 20, bias=False)
        if tied: self.head.weight = self.embed.weight

    def forward(self, words):
        x = self.embed(words) + self.place
        x = self.norm(self.conv(x.mT).mT)
        x = x + self.attn(x, x, x)[0]
        return self.head(self.up(x)) if self.head.in_features == 20 else self.head(x)

def test_what_is_left_whole():
    assert unprojected(Model()) == {'embed': 'an embedding', 'place': 'a bare parameter', 'head': 'the head'}
    assert unprojected(Model(tied=True))['head'] == 'the weight of an embedding'

def test_groups_hold_each_parameter_once():
    model = Model()
    groups = galore_groups(model, 2, rank_pattern={'up': 3}, gap=7)
    assert [g.get('rank') for g in groups] == [None, 2, 3] and groups[1]['gap'] == 7
    assert sorted(map(id, (p for g in groups for p in g['params']))) == sorted(map(id, model.parameters()))
    projected = {id(p) for g in groups[1:] for p in g['params']}
    assert {n for n, p in model.named_parameters() if id(p) in projected} == {'conv.weight', 'attn.in_proj_weight', 'attn.out_proj.weight', 'up.weight'}

def test_frozen_parameters_are_in_no_group():
    model = Model()
    model.up.weight.requires_grad_(False)
    assert all(p is not model.up.weight for g in galore_groups(model, 2) for p in g['params'])

@pytest.mark.parametrize(('call', 'says'), [
    (lambda: galore_groups(Model(), 2, 'head'), "'head' is the head"),
    (lambda: galore_groups(Model(), 2, 'embed'), 'an embedding'),
    (lambda: galore_groups(Model(), 2, 'upp'), "nearest: 'up'"),
    (lambda: galore_groups(Model(), 2, exclude='upp'), "nearest: 'up'"),
    (lambda: galore_groups(nn.Embedding(3, 4), 2), 'nothing to project'),
    (lambda: GaLore(Model().parameters(), rank=2), 'cannot be projected'),
    (lambda: GaLore(galore_groups(Model(), 9)), 'a rank from 1 to'),
    (lambda: GaLore(galore_groups(Model(), 2), update_proj_gap=3), "no option 'update_proj_gap'"),
    (lambda: GaLore(galore_groups(Model(), 2), kind='sdt'), "expected: ('std'"),
    (lambda: GaLore(galore_groups(Model(), 2), gap=0), 'gap'),
    (lambda: GaLore(galore_groups(Model(), 2), bits=4), 'bits'),
])
def test_errors_name_the_thing(call, says):
    with pytest.raises(InputError) as e: call()
    assert says in str(e.value), e.value

def test_sparse_gradients_are_refused():
    embed = nn.Embedding(5, 3, sparse=True)
    opt = GaLore(embed.parameters())
    embed(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match='sparse'): opt.step()

def test_kernels_and_strange_memory():
    grad, = gradients((6, 4, 3, 3), 1)
    plain, _ = followed(lambda p: GaLore(p, rank=2), [grad])
    w = nn.Parameter(torch.ones(6, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    opt = GaLore([w], rank=2)
    w.grad = grad.contiguous(memory_format=torch.channels_last)
    opt.step()
    torch.testing.assert_close(w, plain)
    flat, _ = followed(lambda p: GaLore(p, rank=2), [grad.reshape(6, 36)])
    torch.testing.assert_close(flat.view_as(plain), plain)

def test_a_parameter_without_gradient_stays():
    model = Model()
    opt, before = GaLore(galore_groups(model, 2)), model.up.weight.clone()
    assert opt.step(lambda: torch.tensor(3.)) == 3 and not opt.state and torch.equal(model.up.weight, before)


# Backward

def loss_of(model: nn.Module, words: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(words).flatten(0, 1), words.flatten())

@pytest.mark.parametrize('options', [{}, dict(refresh='randomized', bits=8), dict(inner='adafactor', kind='full')])
def test_in_backward_takes_the_same_steps(options):
    words, models = torch.randint(20, (4, 5), generator=torch.Generator().manual_seed(0)), []
    first, most, alive = Model(), 0, []
    for layerwise in (False, True):
        model = copy.deepcopy(first)
        opt = GaLore(galore_groups(model, 2, gap=2, **{k: v for k, v in options.items() if k != 'inner'}), inner=options.get('inner', 'adamw'))
        if layerwise:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(lambda _, model=model: alive.append(sum(p.grad is not None for p in model.parameters())))
        for _ in range(5):
            if layerwise:
                with in_backward(opt): loss_of(model, words).backward(), opt.step()
            else: loss_of(model, words).backward(), opt.step()
            opt.zero_grad()
        models.append(model)
    most = max(alive)
    assert most == 1
    for a, b in zip(*(m.parameters() for m in models), strict=True): torch.testing.assert_close(a, b, atol=1e-6, rtol=0)

def test_accumulation_in_backward_is_an_error():
    model, words = Model(), torch.randint(20, (4, 5))
    opt = GaLore(galore_groups(model, 2))
    with in_backward(opt):
        loss_of(model, words).backward()
        with pytest.raises(RunFailed, match='second gradient'): loss_of(model, words).backward()
    loss_of(model, words).backward()  # the hooks are gone
    assert model.up.weight.grad is not None


# Resume

OPTIONS = [{}, dict(refresh='randomized'), dict(refresh='random', bits=8), dict(bits=16, kind='full'), dict(inner='sgd', momentum=.9), dict(inner='adafactor')]

def walk(model: nn.Module, opt: GaLore, steps: range):
    for k in steps:
        opt.zero_grad()
        loss_of(model, torch.randint(20, (4, 5), generator=torch.Generator().manual_seed(k))).backward()
        opt.step()

def assert_same(a, opt_a, b, opt_b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        assert opt_a.state[p].keys() == opt_b.state[q].keys()
        for k, v in opt_a.state[p].items():
            w = opt_b.state[q][k]
            assert torch.equal(v, w) and v.dtype == w.dtype if isinstance(v, torch.Tensor) else v == w

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_stop_and_go_on_through_a_file(options, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr('lowrank_distill.optimizers.galore.SMALL', 1)
    start = Model().to(dtype)
    def make(model):
        return GaLore(galore_groups(model, 2, gap=3), **options)
    whole, stopped, resumed = (copy.deepcopy(start) for _ in range(3))
    opt_whole, opt_stopped, opt_resumed = map(make, (whole, stopped, resumed))
    walk(whole, opt_whole, range(9))
    walk(stopped, opt_stopped, range(4))
    tensors = {f'net/{k}': v for k, v in stopped.state_dict().items()}
    tree = pack(opt_stopped.state_dict(), tensors, 'state')
    tensors, header = load_tensors(save_tensors(tmp_path/'x.safetensors', tensors, dict(tree=tree)))
    resumed.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith('net/')})
    saved = unpack(header['tree'], tensors)
    opt_resumed.load_state_dict(saved)
    kept = copy.deepcopy(saved)
    walk(resumed, opt_resumed, range(4, 9))
    assert_same(whole, opt_whole, resumed, opt_resumed)
    for i, state in saved['state'].items():  # what was loaded is not written into
        for k, v in state.items(): assert torch.equal(v, kept['state'][i][k]) if isinstance(v, torch.Tensor) else v == kept['state'][i][k]

def test_state_is_loaded_without_pickles(tmp_path):
    model = Model()
    opt = GaLore(galore_groups(model, 2))
    walk(model, opt, range(2))
    torch.save(opt.state_dict(), tmp_path/'x.pt')
    assert torch.load(tmp_path/'x.pt', weights_only=True)['state'].keys() == opt.state_dict()['state'].keys()

class Words(Procedure):
    method = 'test.words'
    def __init__(self, optimizer=GaLore, **options):
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(0)
            self.net = Model()
        self.data = torch.randint(20, (32, 5), generator=torch.Generator().manual_seed(1))
        self.opt = optimizer(galore_groups(self.net, 2, gap=3), lr=1e-2, **options)
    def networks(self): return {'net': self.net}
    def optimizers(self): return {'all': self.opt}
    def stages(self): return [Stage('train', 10, Batches(self.data, 4))]
    def losses(self, batch, at): return {'all': {'loss': loss_of(self.net, batch)}}

class Stop(Exception): pass

@pytest.mark.parametrize('options', OPTIONS[:4], ids=str)
@pytest.mark.parametrize('at', [1, 4, 9])
def test_a_killed_training_goes_on_to_the_same_bits(options, at, tmp_path, monkeypatch):
    monkeypatch.setattr('lowrank_distill.optimizers.galore.SMALL', 1)
    whole = Words(**options)
    train(whole)
    def kill(progress, losses):
        if progress.step == at: raise Stop
    with pytest.raises(Stop): train(Words(**options), checkpoint=tmp_path, every=1, progress=kill)
    again = Words(**options)
    train(again, checkpoint=tmp_path, every=1)
    assert_same(whole.net, whole.opt, again.net, again.opt)
