"""RandLoRA: the suite passes and finds broken twins, the update is the formula's and PEFT's, the bases are one memory and in no file, baselines are what they say."""
import copy
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_distill.adapters import randlora as m
from lowrank_distill.core.errors import InputError
from lowrank_distill.core.evidence import check_study
from lowrank_distill.core.files import fingerprint
from lowrank_distill.core.layers import LayerView
from lowrank_distill.shapes import conform
from lowrank_distill.shapes.adapter import adapt, load_adapter
from torch import nn

def g(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0): return torch.randn(*shape, generator=g(seed), dtype=torch.double)
def linear(out, inp): return LayerView(kind='linear', shape=(out, inp))

def layer(out, inp, spec, seed=0):
    part = spec.joint({'': linear(out, inp)}, {'': spec.rank}).build(linear(out, inp), torch.zeros(out, inp), g()).double()
    with torch.no_grad(): [p.normal_(generator=g(seed + i)) for i, p in enumerate(part.parameters())]
    return part

def literal(part):
    "The formula of the paper, one product after the other."
    (a, b), n = part.pair(), part.lam.shape[1]
    total = torch.zeros(part.most, part.d, dtype=torch.double)
    for j in range(n): total += b[:, j::n] @ torch.diag(part.lam[:, j]) @ a @ torch.diag(part.gamma[j])
    return part.factor * (total if part.layer.inp <= part.layer.out else total.T)


# The adapter

@pytest.mark.parametrize('kind', m.KINDS)
def test_adapter_suite(kind):
    conform.adapter(lambda r: m.RandLoRA(rank=r, kind=kind, scale='peft' if kind == 'sparse' else 'authors'), examples=40, others=None if kind == 'dense' else ())

class Crossed(m.RandLoRALayer):
    "A twin whose delta reads the columns of B in the other order."
    def delta(self):
        (a, b), (r, n) = self.pair(), self.lam.shape
        u = m.mix(a, self.lam, self.gamma).view(r, n, self.d).transpose(0, 1).flatten(0, 1)
        return self.factor * (b @ u if self.tall else u.mT @ b.mT)

class CrossedSpec(m.RandLoRA):
    def build(self, layer, weight, generator, statistics=None): return Crossed(layer, self.joint({'': layer}, {'': self.rank}))

def test_the_suite_finds_a_crossed_order():
    with pytest.raises(AssertionError, match='delta'): conform.adapter(CrossedSpec, examples=60, others=())

@settings(deadline=None, max_examples=60)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 14), st.sampled_from(m.KINDS), st.sampled_from([1, 300]))
def test_the_formula_both_ways(out, inp, r, kind, rows):
    part = layer(out, inp, m.RandLoRA(rank=min(r, out, inp), kind=kind, seed=3))
    x, want = randn(rows, inp).requires_grad_(), literal(part)
    torch.testing.assert_close(part.delta(), want, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(part(x), x @ want.T, atol=1e-9, rtol=1e-9)
    named = [x, *part.parameters()]
    got = torch.autograd.grad(part(x).sin().sum(), named)
    for a, b in zip(got, torch.autograd.grad((x @ literal(part).T).sin().sum(), named), strict=True): torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)

def test_forms_is_the_count_of_multiplications():
    part = layer(12, 9, m.RandLoRA(rank=4))
    for grad in (True, False):
        with torch.set_grad_enabled(grad): ways = [part.forms(rows) for rows in range(1, 60)]
        assert ways == sorted(ways) and not ways[0] and ways[-1]  # few rows: through the bases
    long = layer(48, 12, m.RandLoRA(rank=4))
    assert not long.forms(10**6)  # where D >= 3 d, forming never pays on the way back
    with torch.no_grad(): assert long.forms(10**6)

@pytest.mark.parametrize('tall', [True, False])
@pytest.mark.parametrize('formed', [True, False])
def test_gradients(tall, formed):
    a, b, lam, gamma = randn(2, 4), randn(5, 6), randn(2, 3).requires_grad_(), randn(3, 4).requires_grad_()
    x = randn(3, 4 if tall else 5 if formed else 6).requires_grad_()
    if not tall and not formed: x = randn(3, 6).requires_grad_()
    def f(x, lam, gamma): return m.Applied.apply(x, a, b if formed else None, lam, gamma, tall)
    assert torch.autograd.gradcheck(f, (x, lam, gamma)) and torch.autograd.gradgradcheck(f, (x, lam, gamma))
    assert torch.autograd.gradcheck(lambda lam, gamma: m.Mixed.apply(a, lam, gamma), (lam, gamma))

@pytest.mark.parametrize(('r', 'count'), [(32, 19200), (30, 20748), (64, 9984)])
def test_counts_of_the_card(r, count): assert m.RandLoRA(rank=r).count(linear(768, 768)) == count

def test_scales():
    part = linear(30, 20)
    assert m.RandLoRA(rank=5, alpha=10.).factor(part) == 10 / (5 * 2) and m.RandLoRA(rank=5, alpha=10., scale='peft').factor(part) == 2

def test_equal_gammas_degenerate():
    part = layer(12, 12, m.RandLoRA(rank=4))
    assert torch.linalg.matrix_rank(part.delta()) == 12
    with torch.no_grad(): part.gamma.copy_(part.gamma[:1].expand_as(part.gamma))
    assert torch.linalg.matrix_rank(part.delta()) == 4

def test_step_one_moves_lambda_only():
    net = nn.Sequential(nn.Linear(6, 9))
    part = adapt(net, m.RandLoRA(rank=2)).layers['0']
    net(torch.randn(4, 6, generator=g())).square().sum().backward()
    assert (part.gamma.grad == 0).all() and (part.lam.grad != 0).all() and (part.lam == 0).all() and (part.gamma == 1 / 6).all()

@pytest.mark.parametrize('wrong', [dict(kind='thin'), dict(scale='paper'), dict(dropout=1.)])
def test_what_does_not_fit(wrong):
    with pytest.raises(InputError): m.RandLoRA(**wrong)

def test_half_precision_shares_its_copy():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.bfloat16)
    parts = list(adapt(net, m.RandLoRA(rank=2)).layers.values())
    net(torch.ones(3, 8, dtype=torch.bfloat16)).sum().backward()
    assert {k[1] for k in parts[0].bases.copies} >= {torch.bfloat16} and parts[0].bases is parts[1].bases
    assert all(p.lam.grad.dtype == torch.float32 for p in parts)

def test_rank_zero_trains_nothing():
    net, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6, generator=g()).requires_grad_()
    handle, base = adapt(net, m.RandLoRA(rank=0)), copy.deepcopy(net[0])
    net(x).sum().backward()
    assert not sum(p.numel() for p in handle.parameters()) and torch.equal(net(x), base(x))

def test_dropout_and_zero_rows():
    net = nn.Sequential(nn.Linear(6, 5))
    handle = adapt(net, m.RandLoRA(rank=2, dropout=.5))
    with torch.no_grad(): [p.normal_(generator=g()) for p in handle.parameters()]
    x = torch.randn(4, 6, generator=g())
    with torch.random.fork_rng(): assert not torch.equal(net(x), net(x))
    assert torch.equal(net.eval()(x), net(x)) and net(x[:0]).shape == (0, 5)


# The bases

def models():
    net = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20), nn.Linear(20, 30), nn.Conv2d(2, 4, 3))
    return net, adapt(net, m.RandLoRA(rank=4, seed=5), rank_pattern={'3': 3})

def addresses(handle): return {(p.pair()[0].data_ptr(), p.pair()[1].data_ptr()) for p in handle.layers.values()}

def test_one_memory():
    from lowrank_distill.shapes.adapter import handle_of
    (net, handle), (_, other) = models(), models()
    assert addresses(handle) == addresses(other) == addresses(handle_of(copy.deepcopy(net))) and len(addresses(handle)) == 1
    double = handle_of(copy.deepcopy(net).double())
    assert len(addresses(double)) == 1 and addresses(double) != addresses(handle)
    assert not [k for k in net.state_dict() if 'adapters' in k and not k.endswith(('lam', 'gamma'))]
    assert {len(p.bases.copies) for p in handle.layers.values()} == {2}  # single and double, for all layers together

def test_no_copy_in_a_slice():
    _, handle = models()
    for part in handle.layers.values():
        whole, piece = part.bases.first[1], part.pair()[1]
        assert piece.data_ptr() == whole.data_ptr() and piece.untyped_storage().nbytes() == whole.untyped_storage().nbytes()

def test_bases_go_with_their_last_user():
    net, handle = models()
    before = len(m._alive)
    del handle, net
    assert len(m._alive) < before

def test_nothing_of_a_transform_is_kept():
    net = nn.Sequential(nn.Linear(6, 5)).double()
    part = adapt(net, m.RandLoRA(rank=2, seed=99)).layers['0']
    part.bases.copies.clear()
    params = {k: v.detach() for k, v in net.named_parameters() if v.requires_grad}
    torch.func.grad(lambda p, x: torch.func.functional_call(net, p, (x,)).sum())(params, randn(3, 6))
    assert not part.bases.copies
    with torch.inference_mode(): net(randn(3, 6))
    net(randn(3, 6)).sum().backward()  # what inference mode made can be used in training

@pytest.mark.parametrize(('kind', 'zeros'), [('sparse', 2 / 3), ('very_sparse', 1 - 1 / 20)])
def test_ternary(kind, zeros):
    a, b = m.shared_bases(1, kind, (40, 400), (500, 600)).first
    share = (b == 0).double().mean().item()
    assert len(b.unique()) == 3 and abs(share - zeros) < 3 * math.sqrt(zeros * (1 - zeros) / b.numel())
    assert abs(a.std() - 1) < 1e-4 and abs(b.std() - 1) < 1e-4

def test_standardised_as_a_whole_before_slicing():
    a, b = m.shared_bases(0, 'dense', (4, 50), (60, 52)).first
    assert abs(a.std() - 1) < 1e-5 and abs(b.std() - 1) < 1e-5 and (b.std(0) - 1).abs().max() > 1e-3

def test_same_seed_in_a_new_process():
    code = ("from lowrank_distill.adapters.randlora import shared_bases; from lowrank_distill.core.files import fingerprint;"
            "print(fingerprint([fingerprint(list(shared_bases(s, k, (4, 9), (12, 20)).first)) for s in (0, 7) for k in ('dense', 'sparse')]))")
    child = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()
    here = fingerprint([fingerprint(list(m.shared_bases(s, k, (4, 9), (12, 20)).first)) for s in (0, 7) for k in ('dense', 'sparse')])
    assert child == here

def test_file_holds_coefficients(tmp_path):
    net = nn.Sequential(*[nn.Linear(768, 768) for _ in range(4)], nn.Linear(768, 3072), nn.Linear(3072, 768))
    handle = adapt(net, m.RandLoRA(rank=32, seed=4))
    with torch.no_grad(): [p.normal_(generator=g()) for p in handle.parameters()]
    path, coefficients = handle.save(tmp_path/'a.safetensors'), 4 * sum(p.numel() for p in handle.parameters())
    assert path.stat().st_size <= 1.05 * coefficients and coefficients == 4 * 6 * 19200
    x, twin = torch.randn(2, 768, generator=g()), copy.deepcopy(net)
    out = net(x)
    from lowrank_distill.shapes.adapter import handle_of
    handle_of(twin).remove()
    again = load_adapter(twin, path)
    assert torch.equal(twin(x), out) and next(iter(again.layers.values())).bases is next(iter(handle.layers.values())).bases

def test_sizes_are_global_and_can_be_given():
    _, handle = models()
    specs = {n: p.spec for n, p in handle.layers.items()}
    assert {(s.a_rows, s.a_columns, s.b_rows, s.b_columns) for s in specs.values()} == {(4, 20, 30, 20)}
    with pytest.raises(InputError, match='too small'): adapt(nn.Sequential(nn.Linear(20, 40)), specs['0'])
    assert m.RandLoRA(rank=4).bases_of(linear(30, 20)) == 5 and m.RandLoRA(rank=6).bases_of(linear(30, 20)) == 4 and m.RandLoRA(rank=0).count(linear(3, 3)) == 0

@pytest.mark.parametrize('shapes', [[(30, 20)], [(20, 30)], [(21, 21)], [(30, 20), (12, 30), (12, 12)]])
@pytest.mark.parametrize('kind', m.KINDS)
def test_equals_peft(shapes, kind):
    peft = pytest.importorskip('peft', reason='the peer is not installed')
    net = nn.Sequential(*[nn.Linear(inp, out) for out, inp in shapes])
    names = [str(i) for i in range(len(shapes))]
    config = peft.RandLoraConfig(r=5, randlora_alpha=10, target_modules=names, randlora_dropout=0., sparse=kind == 'sparse', very_sparse=kind == 'very_sparse')
    theirs = peft.get_peft_model(copy.deepcopy(net), config).base_model.model
    ours = adapt(net, m.RandLoRA(rank=5, alpha=10., scale='peft')).layers
    for name in names:
        part, other = ours[name], theirs.get_submodule(name)
        part.bases = m.Bases(other.randlora_A['default'][:, 0].float(), other.randlora_B['default'].flatten(1).float())
        assert torch.equal(part.gamma, other.randlora_gamma['default']) and torch.equal(part.lam, other.randlora_lambda['default'])
        with torch.no_grad():
            other.randlora_lambda['default'].copy_(part.lam.normal_(generator=g(1)))
            other.randlora_gamma['default'].copy_(part.gamma.normal_(generator=g(2)))
        torch.testing.assert_close(part.delta(), other.get_delta_weight('default'), atol=1e-4, rtol=1e-5)
    for rows in (1, 90):
        x = torch.randn(rows, shapes[0][1], generator=g())
        want = theirs(x)
        assert (net(x) - want).abs().max() <= 1e-5 * want.abs().max()


# Baselines, fit, study

def test_baselines_conform():
    conform.adapter(m.NoLA, examples=30, others=())
    for promise in (conform.training, conform.copies, conform.files, conform.functional, conform.precisions): promise(lambda r: m.VeRA(rank=r))
    for shape in ((5, 7), (7, 5)): conform.algebra(lambda r: m.VeRA(rank=r), nn.Linear(*shape).double(), randn(3, shape[0]), 9, g())

def test_baselines_are_their_formulas():
    vera = layer(14, 9, m.VeRA(rank=20))
    a, b = vera.bases.on(vera.d.device, torch.double)
    torch.testing.assert_close(vera.delta(), vera.b.diag() @ b @ vera.d.diag() @ a / (math.sqrt(3 * 9) * math.sqrt(3 * 20)))
    nola = layer(14, 9, m.NoLA(rank=3, coefficients=7))
    a, b = nola.bases.on(nola.ca.device, torch.double)
    down = a[7] / math.sqrt(27) + sum(nola.ca[i] * a[i] for i in range(7)) / math.sqrt(21)
    torch.testing.assert_close(nola.delta(), 8 / 3 * sum(nola.cb[i] * b[i] for i in range(7)) / math.sqrt(21) @ down)
    assert vera.spec.count(vera.layer) == 34 and nola.spec.count(nola.layer) == 14
    assert torch.linalg.matrix_rank(vera.delta()) == 9 and torch.linalg.matrix_rank(nola.delta()) == 3

def test_fit_falls_and_is_exact_with_enough_numbers():
    target = randn(12, 12)
    fitted, errors = m.fit_matrix(target, 4, 6)
    assert errors == sorted(errors, reverse=True) and ((fitted - target).norm() / target.norm()).item() == pytest.approx(errors[-1])
    assert m.fit_matrix(target, 1, 3)[1][-1] < 1e-6  # r = 1: more numbers than entries

@pytest.mark.parametrize('arm', m.study.arms)
def test_run_arm(arm):
    found = m.run_arm(arm, m.study.configs(arm)[0], 0, 'smoke')
    assert all(math.isfinite(v) for v in found.values()) and 0 <= found['accuracy'] <= 1
    method, _, budget = arm.partition('_')
    wanted = {'small': 1172, 'large': 2344}.get(budget, 64 * 128 + 128 * 128 + 128 * 10)
    assert abs(found['trained'] - wanted) <= .01 * wanted and (found['rank_fc2'] == 128 if method == 'randlora' else True)

def test_study():
    check_study(m.study)
    a, b = ({k: v for k, v in m.run_arm('randlora_small', {'lr': 1e-2}, 1, 'smoke').items() if k != 'training_seconds'} for _ in range(2))
    assert a == b
