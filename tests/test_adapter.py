"""The adapter contract over many layers, with real networks of others, and every way in which a file can be wrong."""
import copy
import json
import struct
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lowrank_distill.adapters.dylora import DyLoRA, set_rank
from lowrank_distill.adapters.lora import LoRA
from lowrank_distill.core.errors import DamagedFile, InputError
from lowrank_distill.shapes.adapter import adapt, adapted, capabilities, handle_of, load_adapter

SPECS = {'lora': lambda r: LoRA(rank=r), 'rslora': lambda r: LoRA(rank=r, rslora=True), 'dylora': lambda r: DyLoRA(max_rank=r, min_rank=min(1, r)),
         'frozen': lambda r: DyLoRA(max_rank=r, min_rank=min(1, r), frozen=True),
         'strict': lambda r: DyLoRA(max_rank=r, min_rank=min(1, r), strict_masking=True)}


def shake(handle, g):
    "Numbers other than the start in every trainable parameter."
    with torch.no_grad(): [p.normal_(generator=g) for p in handle.parameters()]


@pytest.mark.parametrize('spec', SPECS)
def test_rank_beyond_the_layer_is_refused(spec):
    net = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(InputError, match='rank 4 does not fit') as caught: adapt(net, SPECS[spec](4))
    assert '\n' not in str(caught.value) and not adapted(net) and net[0].weight.requires_grad
    adapt(net, SPECS[spec](4), rank_pattern={'0': 3})


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)).eval()


def test_hidden_saves_what_the_base_saved(tmp_path):
    "Inside `hidden()` save_pretrained writes the same bytes, and modules and keys are the base's, one by one."
    net, tokens = gpt2(), torch.arange(6)[None]
    net.save_pretrained(tmp_path/'before')
    modules, keys, logits = [n for n, _ in net.named_modules()], list(net.state_dict()), net(tokens).logits
    handle = adapt(net, LoRA(rank=2), ['*.c_attn', '*.c_fc'])
    shake(handle, torch.Generator().manual_seed(0))
    assert not torch.equal(net(tokens).logits, logits)
    with handle.hidden():
        assert [n for n, _ in net.named_modules()] == modules and list(net.state_dict()) == keys
        assert torch.equal(net(tokens).logits, logits)
        net.save_pretrained(tmp_path/'after')
        net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()})
    files = {p.name: p.read_bytes() for p in (tmp_path/'before').iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path/'after').iterdir()} and 'model.safetensors' in files
    with handle.use(): assert torch.equal(net.generate(tokens, max_new_tokens=4, do_sample=False), gpt2().generate(tokens, max_new_tokens=4, do_sample=False))


def test_hidden_puts_back_after_an_error():
    net = nn.Sequential(nn.Linear(3, 3))
    handle = adapt(net, LoRA(rank=1))
    with pytest.raises(KeyError), handle.hidden(): raise KeyError
    assert list(handle.layers) == ['0']


def test_named_adapters_patterns_and_state():
    net, tokens = gpt2(), torch.arange(6)[None]
    first = adapt(net, LoRA(rank=2), '*.c_attn', name='first', rank_pattern={'*.h.1.*': 4}, alpha_pattern={'*.h.0.*': 1.})
    second = adapt(net, DyLoRA(max_rank=3), '*.c_fc', exclude='*.h.1.*', name='second')
    assert first.table()['rank'].tolist() == [2, 4] and second.table()['rank'].tolist() == [3]
    assert [a.spec.alpha for a in first.layers.values()] == [1., 16.]
    [shake(h, torch.Generator().manual_seed(i)) for i, h in enumerate((first, second))]
    state, out = {k: v.clone() for k, v in net.state_dict().items()}, net(tokens).logits
    twin = copy.deepcopy(net)
    shake(handle_of(twin, 'first'), torch.Generator().manual_seed(9))
    assert not torch.equal(twin(tokens).logits, out) and torch.equal(net(tokens).logits, out)
    twin.load_state_dict(state)
    assert torch.equal(twin(tokens).logits, out)
    with first.use('first'):
        alone = net(tokens).logits
        first.merge()
        torch.testing.assert_close(net(tokens).logits, alone, atol=1e-4, rtol=1e-4)
        first.unmerge()
    first.remove()
    assert not net.lm_head.weight.requires_grad and list(second.layers) == ['transformer.h.0.mlp.c_fc']
    second.remove()
    assert all(p.requires_grad for p in net.parameters())


def test_tied_weights_are_an_error_unless_said():
    net = gpt2()
    with pytest.raises(InputError, match='shared'): adapt(net, LoRA(rank=2), 'lm_head')
    handle = adapt(net, LoRA(rank=2), 'lm_head', tied='separate')
    shake(handle, torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match='shared'): handle.merge()
    assert not handle.merged


@pytest.mark.parametrize('spec', SPECS)
def test_capabilities_are_those_of_a_mergeable_adapter(spec):
    found = capabilities(SPECS[spec](3))
    assert found == dict(has_delta=True, mergeable=True, input_dependent=False, identity_at_start=True, base_changes=False, needs_statistics=False)


# ---- files

def saved(tmp_path, spec=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    handle = adapt(net, spec or DyLoRA(max_rank=3))
    shake(handle, torch.Generator().manual_seed(0))
    return net, handle, handle.save(tmp_path/'a.safetensors')


@pytest.mark.parametrize('spec', SPECS)
def test_round_trip_finds_its_method_by_key(tmp_path, spec):
    net, handle, path = saved(tmp_path, SPECS[spec](3))
    x, out = torch.randn(3, 6), net(torch.ones(3, 6))
    handle.remove()
    again = load_adapter(net, path)
    assert torch.equal(net(torch.ones(3, 6)), out) and again.table()['rank'].tolist() == [3, 3]
    with torch.no_grad(): [p.zero_() for p in again.parameters()]
    again.load(path)
    assert torch.equal(net(torch.ones(3, 6)), out) and len(x)


def rewritten(path, change):
    "The file with its header document changed, and a checksum that agrees with it."
    from lowrank_distill.core.files import load_tensors, save_tensors
    tensors, header = load_tensors(path)
    change(tensors, header)
    return save_tensors(path.with_name('b.safetensors'), tensors, header)


def test_a_file_older_than_a_setting_is_read_with_its_default(tmp_path):
    net, handle, path = saved(tmp_path, LoRA(rank=2))
    old = rewritten(path, lambda t, h: [o['config'].pop('rslora') for o in h['layers'].values()])
    x, out = torch.ones(3, 6), net(torch.ones(3, 6))
    handle.load(old)
    handle.remove()
    load_adapter(net, old)
    assert torch.equal(net(x), out)


CHANGES = {
    'layer missing': lambda t, h: h['layers'].update(nine=h['layers'].pop('0')),
    'other shape': lambda t, h: h['layers']['0'].update(shape=[7, 6]),
    'unknown setting': lambda t, h: h['layers']['0']['config'].update(rang=3),
    'ill-typed setting': lambda t, h: h['layers']['0']['config'].update(max_rank='3'),
    'unknown method': lambda t, h: h.update(method='dilora'),
    'not an adapter': lambda t, h: h.pop('layers'),
    'newer': lambda t, h: h.update(schema=2),
    'other base': lambda t, h: h['layers']['2'].update(base='0' * 16),
    'tensor missing': lambda t, h: t.pop('0:a'),
    'tensor too many': lambda t, h: t.update({'0:c': torch.ones(1)}),
    'tensor misshapen': lambda t, h: t.update({'0:a': t['0:a'][:1]}),
    'nan': lambda t, h: t['2:b'].fill_(torch.nan),
}


@pytest.mark.parametrize('change', CHANGES)
def test_foreign_files_are_refused_and_nothing_is_left(tmp_path, change):
    net, handle, path = saved(tmp_path)
    handle.remove()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(InputError) as caught: load_adapter(net, rewritten(path, CHANGES[change]))
    assert '\n' not in str(caught.value) and not adapted(net) and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and list(before) == list(net.state_dict())


def test_damaged_files_are_refused(tmp_path):
    "Cuts at every boundary, flips anywhere, a name given twice, a header that claims to be huge."
    net, handle, path = saved(tmp_path)
    handle.remove()
    whole = path.read_bytes()
    size, = struct.unpack('<Q', whole[:8])
    g = torch.Generator().manual_seed(0)
    places = torch.randint(len(whole), (150,), generator=g).tolist()
    bad = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:] for i in places]
    bad += [whole[:i] for i in (0, 7, 8, 9, 8 + size // 2, 8 + size - 1, 8 + size, 8 + size + 1, len(whole) - 1)] + [whole + b'\0']
    table = whole[8:8 + size].replace(b'"0:b"', b'"0:a"')
    bad += [struct.pack('<Q', len(table)) + table + whole[8 + size:], struct.pack('<Q', 2**62) + whole[8:], b'hello', json.dumps({}).encode()]
    for data in bad:
        path.write_bytes(data)
        with pytest.raises(DamagedFile) as caught: load_adapter(net, path)
        assert '\n' not in str(caught.value) and not adapted(net)
    with pytest.raises(InputError, match='cannot read'): load_adapter(net, tmp_path/'none.safetensors')


def test_a_merged_model_saves_the_adapter_of_its_base(tmp_path):
    net, handle, path = saved(tmp_path)
    handle.merge()
    handle.save(tmp_path/'merged.safetensors')
    assert (tmp_path/'merged.safetensors').read_bytes() == path.read_bytes()


def test_unwritable_place(tmp_path):
    _, handle, _ = saved(tmp_path)
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError, match='cannot write'): handle.save(tmp_path/'file'/'a.safetensors')


def test_set_rank_bounds():
    _, handle = (net := nn.Sequential(nn.Linear(6, 5))), adapt(net, DyLoRA(max_rank=3))
    with pytest.raises(InputError, match='expected: 0 to 3'): set_rank(handle, 4)
    with pytest.raises(InputError): DyLoRA(max_rank=2, min_rank=3)

def test_a_parameter_in_a_layer_that_checkpoints_itself_is_refused_in_training():
    "transformers' checkpointed layers run `forward` again without hooks, hence without the adapter of their own parameter."
    class Block(GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.eye(4))

        def forward(self, x): return x @ self.w.T

    block = nn.Sequential(Block())
    adapt(block, LoRA(rank=1), ['0.w'])
    x, expected = torch.ones(2, 4), block(torch.ones(2, 4))
    block[0].gradient_checkpointing = True
    block[0]._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    with pytest.raises(InputError, match="'w' has no adapter"): block.train()(x)
    assert torch.equal(block.eval()(x), expected) and isinstance(block[0].w, nn.Parameter)
