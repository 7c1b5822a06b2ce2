"""SMoRA: the suites pass and find broken twins, both products and a plain loop agree, gates and balance are the card's, checkpointing moves nothing, the rivals are what they are called."""
import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_distill.adapters import smora as m
from lowrank_distill.adapters.lora import LoRA
from lowrank_distill.core.errors import InputError
from lowrank_distill.core.evidence import check_study
from lowrank_distill.core.layers import LayerView
from lowrank_distill.core.recording import Recorder, read
from lowrank_distill.shapes import conform, conform_procedure
from lowrank_distill.shapes.adapter import adapt, capabilities, handle_of
from lowrank_distill.shapes.objective import CrossEntropy, Distillation
from lowrank_distill.shapes.procedure import Batches
from lowrank_distill.shapes.train import train
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VIEW = LayerView(kind='linear', shape=(7, 9))

def g(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0): return torch.randn(*shape, generator=g(seed), dtype=torch.double)
def layer(spec, seed=0):
    made = spec.build(VIEW, torch.empty(0), g(seed)).double()
    with torch.no_grad(): [p.normal_(generator=g(seed + i)) for i, p in enumerate(made.parameters())]
    return made


# The suites

@pytest.mark.parametrize('make', [lambda r: m.SMoRA(rank=r, active=2), lambda r: m.SMoRA(rank=r, active=1, gathered='always'), lambda r: m.SMoRA(rank=r, active=2, gathered='never', bias_in_gate=False)],
                         ids=['auto', 'gathered', 'dense'])
def test_adapter_suite(make):
    conform.adapter(make, examples=40, others=('gpt2', 'llama', 'bert', 'transformer', 'unet'))  # the suite's ViT offers no linear layer by name

@pytest.mark.parametrize('chosen', [dict(active=1), dict(active=2, balance=.1), dict(active=3), dict(active=3, smear=True)], ids=str)
def test_suite_of_the_rivals(chosen):
    conform.adapter(lambda r: m.LoRAMoE(rank=r, experts=3, **chosen), examples=20, others=('gpt2',))

class Restless(m.SMoRALayer):
    "A twin whose bias moves in evaluation too."
    def balanced(self, index, gate): self._even(index.flatten().bincount(minlength=len(self.bias)), gate)

class RestlessSpec(m.SMoRA):
    def build(self, layer, weight, generator, statistics=None): return Restless(layer, self, generator)

def test_the_suite_finds_a_bias_that_moves_in_evaluation():
    with pytest.raises(AssertionError, match='differs|changed|saved'): conform.adapter(lambda r: RestlessSpec(rank=r, active=1, balance=.5), examples=60, others=())

def made():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    with torch.no_grad(): [p.copy_(torch.randn(p.shape, generator=g(p.numel()))) for p in net.parameters()]
    adapt(net, m.SMoRA(rank=4, active=2, balance=1e-3))
    data = {'inputs': torch.randn(32, 6, generator=g()), 'labels': torch.arange(32) % 4}
    return Distillation(net, {}, {'labels': CrossEntropy()}, loader=Batches(data, 8), steps=9, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))

def test_procedure_suite():
    run = made()
    train(run)
    biases = [p.bias for p in handle_of(run.student).layers.values()]
    assert all(b.any() for b in biases) and all((b / 1e-3).round().abs().max() <= 9 for b in biases)
    conform_procedure.procedure(made, tries=3)


# The layer

@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([(), (5,), (2, 3), (0,)]), st.booleans(), st.integers(0, 9))
def test_products_and_loop(p, blocks, active, shape, bias_in_gate, seed):
    "Dense, gathered and a loop over tokens and ranks."
    spec = m.SMoRA(rank=p * blocks, active=p * active, partition=p, alpha=3., bias_in_gate=bias_in_gate, overcomplete=True)
    part, x = layer(spec, seed), randn(*shape, 9, seed=seed)
    part.bias += .1 * randn(blocks, seed=seed).repeat_interleave(p)
    outs = []
    for how in ('never', 'always', 'auto'):
        part.spec = replace(spec, gathered=how)
        outs.append(part(x))
        assert outs[-1].shape == (*shape, 7)
    looped = torch.stack([by_loop(part, v) for v in x.reshape(-1, 9)]).reshape(*shape, 7) if x.numel() else x.new_zeros(*shape, 7)
    for out in outs: torch.testing.assert_close(out, looped, atol=1e-9, rtol=1e-9)

def by_loop(part, x):
    spec, k = part.spec, min(part.spec.active, part.spec.rank)
    s = [torch.sigmoid(part.router[i // spec.partition] @ x) for i in range(spec.rank)]
    t = [v + c for v, c in zip(s, part.bias, strict=True)]
    picked = sorted(range(spec.rank), key=lambda i: (-t[i].item(), i))[:k]
    weigh = t if spec.bias_in_gate else s
    total = sum(weigh[i] for i in picked)
    return spec.alpha / k * sum(k * weigh[i] / total * (part.a[i] @ x) * part.b[:, i] for i in picked)

def test_gates_of_the_card():
    index, gate = m.gates(torch.tensor([1., -1, .5, 0]).sigmoid(), torch.tensor([0, 0, 0, .2]), 2)
    assert index.tolist() == [0, 3]
    torch.testing.assert_close(gate, torch.tensor([1.0217032, .9782968]))

def test_ties_go_to_the_first():
    assert m.choose(torch.ones(2, 6), torch.zeros(6), 3).tolist() == [[0, 1, 2]] * 2

def test_whole_blocks_are_picked():
    part = layer(m.SMoRA(rank=12, active=6, partition=3, overcomplete=True))
    assert (part.route(randn(40, 9))[0].sort().values.view(40, 2, 3) % 3 == torch.arange(3)).all()

def test_all_ranks_and_no_router_is_lora():
    part, x = layer(m.SMoRA(rank=6, active=6)), randn(5, 9)
    with torch.no_grad(): part.router.zero_()
    torch.testing.assert_close(part(x), 16 / 6 * x @ part.a.T @ part.b.T)

def test_counts_of_the_card():
    large, spec = LayerView(kind='linear', shape=(4096, 4096)), m.SMoRA()
    assert (spec.count(large), spec.touched(large)) == (524288 + 262144, 65536 + 262144)
    assert m.LoRAMoE(experts=4, rank=8, active=4).touched(large) == m.LoRAMoE(experts=4, rank=8).count(large)

def test_nothing_reaches_ranks_that_nobody_picks():
    part, x = layer(m.SMoRA(rank=6, active=2)), randn(1, 9)
    part(x).square().sum().backward()
    index = part.route(x)[0][0].tolist()
    for grad in (part.a.grad, part.b.grad.T, part.router.grad): assert (grad.abs().sum(1) > 0).nonzero().flatten().tolist() == sorted(index)

@pytest.mark.parametrize('wrong', [dict(active=0), dict(partition=0), dict(rank=6, partition=4), dict(active=3, partition=2, rank=4), dict(dropout=1.), dict(balance=-1.), dict(gathered='sometimes')], ids=str)
def test_refused(wrong):
    with pytest.raises(InputError): m.SMoRA(**wrong)

def test_more_ranks_than_rows():
    with pytest.raises(InputError, match='does not fit'): adapt(nn.Sequential(nn.Linear(4, 3)), m.SMoRA(rank=5, active=2))
    assert adapt(nn.Sequential(nn.Linear(4, 3)), m.SMoRA(rank=5, active=2, overcomplete=True)).ranks() == {'0': 5}

def test_merge_is_refused():
    handle = adapt(nn.Sequential(nn.Linear(4, 4)), m.SMoRA(rank=3, active=2))
    with pytest.raises(InputError, match='depends on its input'): handle.merge()
    assert capabilities(m.SMoRA(rank=4, active=2)) == dict(has_delta=False, mergeable=False, input_dependent=True, identity_at_start=True, base_changes=False, needs_statistics=False)


# Balance

def test_balance_step():
    assert m.balance_step(torch.tensor([3, 1, 3, 1])).tolist() == [-1, 1, -1, 1]
    assert m.balance_step(torch.tensor([6, 2, 4])).tolist() == [-1, 1, 0] and not m.balance_step(torch.zeros(3, dtype=torch.long)).any()

def test_balance_moves_in_training_only():
    part, x = layer(m.SMoRA(rank=6, active=2, balance=.5)), randn(8, 9)
    counts = part.route(x)[0].flatten().bincount(minlength=6)
    part.eval()(x).sum().backward()
    with torch.no_grad(): part.train()(x)
    part(x)  # no backward pass
    assert not part.bias.any()
    part(x).sum().backward()
    assert part.bias.tolist() == (.5 * m.balance_step(counts)).tolist()

@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing(reentrant):
    part, x = layer(m.SMoRA(rank=6, active=2, balance=.05)), randn(8, 9)
    found = []
    for again in (False, True):
        p, v = copy.deepcopy(part), x.clone().requires_grad_()
        (checkpoint(p, v, use_reentrant=reentrant) if again else p(v)).square().sum().backward()
        found.append([p.a.grad, p.router.grad, v.grad, p.bias])
    assert all(torch.equal(u, v) for u, v in zip(*found, strict=True)) and found[0][3].any()

def test_balance_evens_loads():
    "A router that always picks the same two ranks is turned away from them."
    part, x = layer(m.SMoRA(rank=6, active=2, balance=.02)), randn(64, 9)
    with torch.no_grad(): part.router.mul_(.01)
    part.bias[:2] = .3
    before = m.unevenness(part.route(x)[0].flatten().bincount(minlength=6))
    for _ in range(60): part(x).sum().backward()
    assert m.unevenness(part.route(x)[0].flatten().bincount(minlength=6)) < .6 * before

def test_functional_training_needs_no_balance():
    from torch.func import functional_call, grad, vmap
    x = torch.randn(5, 9, generator=g())
    for balance in (0., 1e-3):
        net = nn.Sequential(nn.Linear(9, 7))
        handle = conform_shaken(net, balance)
        params = {k: v.detach() for k, v in net.named_parameters() if v.requires_grad}
        each = vmap(grad(lambda p, v, net=net: functional_call(net, p, (v,)).square().sum()), (None, 0))
        if balance:
            with pytest.raises(RuntimeError, match='mutate'), pytest.warns(UserWarning, match='bincount'): each(params, x[:, None])
        else: assert all(v.shape[0] == 5 for v in each(params, x[:, None]).values()) and handle.layers

def conform_shaken(net, balance):
    handle = adapt(net, m.SMoRA(rank=4, active=2, balance=balance))
    conform.shake(handle, g())
    return handle


# The rivals

@pytest.mark.parametrize('active', [1, 2, 4])
@pytest.mark.parametrize('shape', [(5,), (2, 3), (0,)])
def test_mixture_is_a_loop_over_experts(active, shape):
    part, x = layer(m.LoRAMoE(rank=2, experts=4, active=active, alpha=6.)), randn(*shape, 9)
    p = F.linear(x, part.router).softmax(-1)
    keep = (p[..., None] < p[..., None, :]).sum(-1) < active
    looped = sum((p * keep)[..., e:e + 1] * 3 * x @ part.a[2 * e:2 * e + 2].T @ part.b[:, 2 * e:2 * e + 2].T for e in range(4))
    torch.testing.assert_close(part(x), looped)

def test_smear_averages_parameters():
    part, x = layer(m.LoRAMoE(rank=2, experts=4, active=4, alpha=6., smear=True)), randn(5, 9)
    p = F.linear(x, part.router).softmax(-1)
    a, b = torch.einsum('te,eri->tri', p, part.a.view(4, 2, 9)), torch.einsum('te,oer->tor', p, part.b.view(7, 4, 2))
    torch.testing.assert_close(part(x), 3 * torch.einsum('tor,tri,ti->to', b, a, x))

def test_one_expert_is_lora():
    part, x = layer(m.LoRAMoE(rank=3, experts=1)), randn(5, 9)
    torch.testing.assert_close(part(x), 16 / 3 * x @ part.a.T @ part.b.T)


# The study

def test_tasks():
    parts = m.tasks('test', 50)
    assert len(parts) == 6 and len({p.name for p in parts}) == 6 and len(m.mixed(parts)) == 300
    assert len({tuple(p.labels.tolist()) for p in parts}) == 6, 'two tasks call the digits alike'
    again = m.tasks('test', 50)
    assert all(torch.equal(p.images, q.images) and torch.equal(p.labels, q.labels) for p, q in zip(parts, again, strict=True))
    assert torch.allclose(parts[0].images, 1 - parts[1].images)

def test_study():
    check_study(m.study)
    assert m.attach(nn.Sequential(nn.Linear(64, 128)), 'lora_4', 8.).layers['0'].spec == LoRA(rank=4, alpha=8.)

def test_lora_keeps_its_scale_in_the_last_layer():
    handle = m.attach(m.pretrained('digits'), 'lora_32', 64.)
    assert {n: (p.spec.rank, p.scale) for n, p in handle.layers.items()} == {'fc1': (32, 2.), 'fc2': (32, 2.), 'fc3': (10, 2.)}

def test_record(tmp_path):
    net = nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 6))
    handle, x = adapt(net, m.SMoRA(rank=4, active=2)), torch.randn(10, 9, generator=g())
    with Recorder(tmp_path, 'run', 0) as recorder: m.record_gates(recorder, handle, x, 0)
    frame = read(tmp_path).frame
    for n in ('0', '2'):
        of = frame[frame.layer == n].groupby('name').value.sum()
        assert of['gate'] == pytest.approx(2) == of['load'] and 0 < of['entropy'] <= .6932
    assert net.training and all(c.sum() == 20 for c in m.loads(handle, x).values())
