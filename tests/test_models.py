"""Networks with the numbers that their formulas say, and teachers that are never another one's: whatever was done to the file, and however many ask."""
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from lowrank_distill.core.errors import DamagedFile, InputError
from lowrank_distill.core.files import asset, fingerprint, load_tensors, save_tensors
from lowrank_distill.core.streams import Streams
from lowrank_distill.core.taps import watch
from lowrank_distill.data.images import Labelled, digits, fashion_mnist
from lowrank_distill.models import teachers
from lowrank_distill.models.small import accuracy
from lowrank_distill.models.teachers import (
    Recipe, Request, augment, cache_folder, default_recipe, embedded, make, small_options, stored, teacher, trained)
from lowrank_distill.models.vision import (
    NETWORKS, Attention, ConvNet, Mixer, ResNet, ViT, build, multiply_adds, norm_layer, options, start)

IMAGES = [(1, 28, 28), (1, 8, 8), (3, 32, 32)]
networks, images = pytest.mark.parametrize('name', NETWORKS), pytest.mark.parametrize('image', IMAGES, ids=str)

def count(net: nn.Module) -> int: return sum(p.numel() for p in net.parameters())
def made(name: str, image=(1, 8, 8), seed: int = 0, **chosen): return build(name, image, 10, Streams(seed).generator('init'), **chosen).eval()
def drawn(*shape: int) -> torch.Tensor: return torch.rand(*shape, generator=Streams(0).generator('eval'))
def same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# Networks: counts by formula

@pytest.mark.parametrize(('image', 'classes', 'depth', 'known'), [
    ((3, 32, 32), 10, 3, 320_010), ((3, 32, 32), 100, 3, 504_420), ((1, 28, 28), 10, 3, 317_706), ((3, 64, 64), 200, 4, 857_160)])
def test_convnet_has_the_numbers_of_the_papers(image, classes, depth, known):
    assert count(ConvNet(image, classes, depth=depth)) == known

@images
@pytest.mark.parametrize('width', [1, 7, 128])
@pytest.mark.parametrize('depth', [1, 2, 3])
def test_convnet_count(image, width, depth):
    side = 32 if image == (1, 28, 28) else image[1]
    pixels = (side // 2**depth)**2
    assert count(ConvNet(image, 4, width=width, depth=depth)) == 9 * image[0] * width + (depth - 1) * 9 * width**2 + depth * 3 * width + (width * pixels + 1) * 4

def test_resnet_20_has_the_numbers_of_its_kind(): assert count(ResNet()) == 272_474

@images
@pytest.mark.parametrize(('width', 'blocks'), [(1, 1), (4, 2), (16, 3), (6, 5)])
def test_resnet_count(image, width, blocks):
    total = 9 * image[0] * width + 2 * width + (4 * width + 1) * 10
    for i, w in enumerate([width, 2 * width, 4 * width]):
        total += (2 * blocks - 1) * (9 * w * w + 2 * w)
        before = w // 2 if i else w
        total += 9 * before * w + 2 * w + (before * w + 2 * w if i else 0)
    assert count(ResNet(image, width=width, blocks=blocks)) == total

@images
@pytest.mark.parametrize(('patch', 'dim', 'depth', 'ratio', 'pool'), [(4, 8, 1, 1, 'mean'), (4, 64, 4, 2, 'class'), (2, 12, 3, 4, 'class')])
@pytest.mark.parametrize('packed', [False, True])
def test_vit_count(image, patch, dim, depth, ratio, pool, packed):
    n = image[1] * image[2] // patch**2
    around = (image[0] * patch**2 + 1) * dim + n * dim + 2 * dim * (pool == 'class') + 2 * dim + (dim + 1) * 10
    block = 4 * dim * dim + 4 * dim + 2 * ratio * dim * dim + (ratio + 1) * dim + 4 * dim
    assert count(ViT(image, patch=patch, dim=dim, depth=depth, ratio=ratio, pool=pool, packed=packed)) == around + depth * block

@images
@pytest.mark.parametrize(('patch', 'dim', 'depth', 'across', 'ratio'), [(4, 8, 1, 1, 1), (4, 64, 4, 64, 2), (2, 12, 3, 20, 4)])
def test_mixer_count(image, patch, dim, depth, across, ratio):
    n = image[1] * image[2] // patch**2
    around = (image[0] * patch**2 + 1) * dim + 2 * dim + (dim + 1) * 10
    block = 2 * n * across + n + across + 2 * ratio * dim * dim + (ratio + 1) * dim + 4 * dim
    assert count(Mixer(image, patch=patch, dim=dim, depth=depth, across=across, ratio=ratio)) == around + depth * block

@images
def test_multiply_adds_of_a_convnet(image):
    side, total, c = 32 if image == (1, 28, 28) else image[1], 0, image[0]
    for _ in range(3): total, c, side = total + 9 * c * 16 * side**2, 16, side // 2
    net = ConvNet(image, width=16).train()
    assert multiply_adds(net) == total + 16 * side**2 * 10
    assert net.training

def test_multiply_adds_of_a_vit_counts_attention():
    n, d = 17, 32
    by_hand = 16 * 4 * d + 2 * (4 * n * d * d + 2 * n * n * d + 4 * n * d * d) + d * 10
    assert multiply_adds(ViT((1, 8, 8), patch=2, dim=d, depth=2)) == by_hand


# Networks: what all of them keep

@networks
@images
def test_stages_are_what_taps_find(name, image):
    net = made(name, image)
    with torch.no_grad(), watch(net, net.stages()) as seen: out = net(drawn(3, *image))
    assert out.shape == (3, 10) and out.isfinite().all()
    assert list(seen) == list(net.stages())
    assert {k: tuple(v.shape[1:]) for k, v in seen.items()} == net.stages()
    assert 3 <= len(net.stages()) <= 4

@networks
def test_stages_come_in_the_order_of_the_forward_pass(name):
    net, order = made(name), []
    for stage in net.stages(): net.get_submodule(stage).register_forward_hook(lambda *_, stage=stage: order.append(stage))
    net(drawn(1, 1, 8, 8))
    assert order == list(net.stages())

@networks
def test_every_layer_with_parameters_is_called(name):
    for mode in (True, False):
        net = made(name).train(mode)
        layers = [n for n, m in net.named_modules() if n and next(m.parameters(recurse=False), None) is not None]
        with torch.no_grad(), watch(net, layers) as seen: net(drawn(2, 1, 8, 8))
        assert set(seen) == set(layers)

@networks
def test_same_generator_same_network_and_no_global_draw(name):
    before = torch.get_rng_state()
    one, two, other = made(name), made(name), made(name, seed=1)
    one(drawn(2, 1, 8, 8))
    assert torch.equal(before, torch.get_rng_state())
    assert same(one, two)
    assert not same(one, other)

@networks
def test_every_number_is_drawn(name):
    "`skip_init` leaves what lay in memory: after a start over poisoned memory nothing of it is left."
    net, clean = made(name), made(name)
    for m in net.modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            for p in m.parameters(recurse=False): nn.init.constant_(p, float('nan'))
    start(net, {'resnet': 'he', 'vit': 'narrow'}.get(name, 'torch'), Streams(0).generator('init'))
    assert all(p.isfinite().all() for p in net.parameters())
    assert all(torch.equal(p, q) for (k, p), q in zip(net.named_parameters(), clean.parameters(), strict=True) if k != 'positions')

def test_the_start_is_torchs_own():
    "Uniform within 1 / sqrt(fan in), for weights and biases."
    net = ConvNet((3, 32, 32), generator=Streams(0).generator('init'))
    for m in (net.blocks[1].conv, net.head):
        bound = m.weight[0].numel()**-.5
        for p in (m.weight, m.bias): assert .9 * bound < p.abs().max() <= bound
        assert abs(m.weight.std().item() * 3**.5 / bound - 1) < .02

def test_other_starts():
    "He: normal, variance 2 / fan out. Narrow: standard deviation 0.02, no bias."
    resnet, vit = made('resnet'), made('vit')
    for c in (resnet.groups[1][1].conv1, resnet.groups[2][0].conv2): assert abs(c.weight.std().item() / (2 / (9 * c.out_channels))**.5 - 1) < .03
    for m in (vit.blocks[0].attn.q, vit.blocks[3].mlp.fc1):
        assert abs(m.weight.std().item() / .02 - 1) < .04
        assert not m.bias.any()

@pytest.mark.parametrize(('name', 'image', 'last'), [('resnet', (1, 7, 9), (64, 2, 3)), ('resnet', (2, 1, 1), (64, 1, 1)), ('conv', (1, 15, 9), (128, 1, 1)), ('vit', (1, 4, 8), (3, 64)), ('mixer', (1, 4, 8), (2, 64))])
def test_sizes_that_do_not_come_out_even(name, image, last):
    net = made(name, image)
    with torch.no_grad(), watch(net, net.stages()) as seen: net(drawn(2, *image))
    assert {k: tuple(v.shape[1:]) for k, v in seen.items()} == net.stages()
    assert [*net.stages().values()][-1] == last

@networks
def test_degenerate_batches(name):
    net = made(name)
    assert net(drawn(0, 1, 8, 8)).shape == (0, 10)
    x = drawn(5, 1, 8, 8)
    torch.testing.assert_close(torch.cat([net(x[i:i + 1]) for i in range(5)]), net(x), rtol=1e-4, atol=1e-5)

@networks
@pytest.mark.parametrize('x', [
    torch.zeros(2, 28, 28, 1), torch.zeros(2, 1, 14, 14), torch.zeros(2, 3, 28, 28), torch.zeros(1, 28, 28), torch.zeros(2, 784), torch.zeros(2, 1, 28, 29), torch.zeros(2, 1, 28, 28, dtype=torch.uint8)],
    ids=lambda x: f'{x.dtype} {tuple(x.shape)}')
def test_wrong_images_are_refused_before_the_first_layer(name, x):
    net, called = made(name, (1, 28, 28)), []
    for m in net.modules():
        if m is not net: m.register_forward_hook(lambda m, *_: called.append(m))
    with pytest.raises(InputError, match='wrong images; given: .*expected: float .batch, 1, 28, 28.'): net(x)
    assert not called

@networks
def test_copies_states_and_gradients(name):
    net = made(name)
    twin, fresh = copy.deepcopy(net), made(name, seed=1)
    fresh.load_state_dict(net.state_dict())
    x = drawn(4, 1, 8, 8)
    assert torch.equal(net(x), twin(x)) and torch.equal(net(x), fresh(x))
    with torch.no_grad(): twin.head.bias += 1
    assert not torch.equal(net(x), twin(x))
    assert torch.equal(functional_call(net, dict(twin.named_parameters()), (x,)), twin(x))

@networks
def test_gradients_for_each_image(name):
    net, x, y = made(name, **{'norm': 'group'} if name == 'resnet' else {}).train(), drawn(4, 1, 8, 8), torch.arange(4)
    def loss(parameters, x, y): return F.cross_entropy(functional_call(net, parameters, (x[None],)), y[None])
    each = vmap(grad(loss), in_dims=(None, 0, 0))(dict(net.named_parameters()), x, y)
    F.cross_entropy(net(x), y).backward()
    for k, p in net.named_parameters(): torch.testing.assert_close(each[k].mean(0), p.grad, rtol=1e-4, atol=1e-5)

@networks
def test_the_network_normalises_itself(name):
    x = drawn(3, 3, 8, 8)
    plain, own = (made(name, (3, 8, 8), **kw) for kw in ({}, dict(mean=(.1, .2, .3), std=(.5, 1., 2.))))
    shifted = (x - torch.tensor([.1, .2, .3]).view(3, 1, 1)) / torch.tensor([.5, 1., 2.]).view(3, 1, 1)
    torch.testing.assert_close(own(x), plain(shifted))
    assert not torch.allclose(own(x), plain(x))

@pytest.mark.parametrize('pool', ['class', 'mean'])
def test_packed_attention_is_the_same_function(pool):
    apart, packed = made('vit', pool=pool), made('vit', pool=pool, packed=True, seed=1)
    state = apart.state_dict()
    for name in [n for n, m in apart.named_modules() if isinstance(m, Attention)]:
        for kind in ('weight', 'bias'): state[f'{name}.qkv.{kind}'] = torch.cat([state.pop(f'{name}.{p}.{kind}') for p in 'qkv'])
    packed.load_state_dict(state)
    x = drawn(3, 1, 8, 8)
    torch.testing.assert_close(apart(x), packed(x))

def test_attention_is_torchs_own():
    attn, x = made('vit').blocks[0].attn, 60 * drawn(3, 7, 64) - 30  # large, or all weights would be about equal
    q, k, v = (getattr(attn, p)(x).view(3, 7, 4, 16).transpose(1, 2) for p in 'qkv')
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, 7, 64)
    torch.testing.assert_close(attn(x), attn.proj(mixed))

def test_patches_are_a_convolution_of_their_stride():
    net, x = made('mixer', (3, 32, 32)), drawn(2, 3, 32, 32)
    kernel = net.patches.weight.view(64, 3, 4, 4)
    torch.testing.assert_close(net.tokens(x), F.conv2d(x, kernel, net.patches.bias, stride=4).flatten(2).transpose(1, 2))

def test_only_a_mixer_knows_where_its_tokens_are():
    "Attention without positions does not care about the order of the tokens; mixing by fixed weights does."
    x = drawn(2, 16, 64)
    order = torch.randperm(16, generator=Streams(0).generator('eval'))
    vit, mixer = (made(n, patch=2).blocks[0] for n in ('vit', 'mixer'))
    torch.testing.assert_close(vit(x)[:, order], vit(x[:, order]))
    assert not torch.allclose(mixer(x)[:, order], mixer(x[:, order]))

@pytest.mark.parametrize(('make_it', 'said'), [
    (lambda: ConvNet((1, 4, 4)), 'one pixel'), (lambda: ConvNet((1, 8, 8), depth=4), 'one pixel'), (lambda: ConvNet((28, 28)), 'image'),
    (lambda: ConvNet((0, 28, 28)), 'channels'), (lambda: ResNet(classes=0), 'classes'), (lambda: ResNet(width=2.5), 'width'), (lambda: ResNet(norm='layr'), 'batch'),
    (lambda: ViT(patch=5), 'divisor'), (lambda: ViT(heads=5), 'heads'), (lambda: ViT(pool='cls'), 'class'), (lambda: Mixer(depth=0), 'depth'),
    (lambda: Mixer((3, 32, 32), mean=(1., 2.)), 'mean'), (lambda: Mixer((3, 32, 32), std=(0.,)), 'std'),
    (lambda: build('renset', (1, 8, 8), 10), "nearest: 'resnet'"), (lambda: build('vit', (1, 8, 8), 10, deph=2), "nearest: 'depth'"), (lambda: options('mlp'), 'conv')])
def test_wrong_requests_are_named(make_it, said):
    with pytest.raises(InputError) as refused: make_it()
    assert said in str(refused.value)

def test_instance_normalisation_is_the_same_in_both_modes():
    norm, x = norm_layer('instance', 6), drawn(2, 6, 5, 5)
    assert torch.equal(norm.train()(x), norm.eval()(x))
    torch.testing.assert_close(norm(x), F.instance_norm(x), rtol=1e-4, atol=1e-5)
    assert not list(norm.buffers())


# Teachers

QUICK = Recipe(epochs=2, batch=50, shift=1, flip=False)
TINY = dict(patch=2, dim=8, depth=1, heads=2)

def small_digits(n: int = 200) -> dict[str, Labelled]: return {s: digits(s).first(n) for s in ('train', 'validation')}
def ask(folder: Path, seed: int = 0, data=None, recipe: Recipe = QUICK, **chosen): return teacher('vit', data or small_digits(), seed, recipe=recipe, folder=folder, **(TINY | chosen))
def request(data=None, seed: int = 0, recipe: Recipe = QUICK, **chosen) -> Request: return Request('vit', data or small_digits(), recipe, small_options('vit', (1, 8, 8), TINY | chosen), seed)
def key(r: Request) -> str: return fingerprint(r.says())

@pytest.fixture(scope='module')
def one(tmp_path_factory) -> tuple[Path, nn.Module]:
    "A file of the cache, and the teacher that is in it."
    folder = tmp_path_factory.mktemp('cache')
    net = ask(folder)
    path, = folder.glob('*.safetensors')
    return path, net

def test_trained_once_and_read_after_that(one):
    path, first = one
    again = ask(path.parent)
    assert (first.card['origin'], again.card['origin'], again.card['replaced']) == ('trained', 'cache', '')
    assert same(first, again) and not again.training and not first.training
    assert first.card | dict(origin='') == again.card | dict(origin='')
    assert first.card['accuracy'] == {'validation': accuracy(first, small_digits()['validation'])}

def test_trained_twice_is_the_same_bits(one, tmp_path):
    before = torch.get_rng_state()
    assert same(one[1], ask(tmp_path))
    assert torch.equal(before, torch.get_rng_state())
    assert not same(one[1], ask(tmp_path, seed=1))

def test_it_learns():
    net, card = trained(Request('resnet', {s: digits(s) for s in ('train', 'validation')}, Recipe(epochs=5, shift=0, flip=False), small_options('resnet', (1, 8, 8), dict(width=8, blocks=1))))
    assert card['accuracy']['validation'] > .8 and not net.training

def changed(split: str, **fields) -> dict[str, Labelled]:
    data = small_digits()
    d = data[split]
    return data | {split: Labelled(**dict(images=d.images, labels=d.labels, classes=d.classes) | fields)}

def test_what_changes_the_key():
    d = small_digits()
    pixel, label = d['train'].images.clone(), d['validation'].labels.clone()
    pixel[3, 0, 4, 4] += 1 / 16
    label[0] = (label[0] + 1) % 10
    others = [request(changed('train', images=pixel)), request(changed('validation', labels=label)), request(changed('train', classes=tuple('abcdefghij'))), request(seed=1), request(dim=16),
              request(packed=True), request(recipe=Recipe(epochs=3, batch=50, shift=1, flip=False)), request(small_digits(199)), request(d | {'test': digits('test')}), request(mean=[.5])]
    keys = [key(r) for r in [request(), *others]]
    assert len(set(keys)) == len(keys)

def test_what_does_not_change_the_key():
    for r in (request(), request(changed('train', name='other')), request(ratio=2), request(pool='class')): assert key(r) == key(request())

def test_code_changes_the_key(monkeypatch):
    before = key(request())
    monkeypatch.setattr(teachers, 'code_version', lambda: '0' * 16)
    assert key(request()) != before

def refused(path: Path, r: Request | None = None) -> str:
    "Why a file is not used; the network that it was for is as it was."
    r = r or request()
    net = r.build()
    before = copy.deepcopy(net)
    with pytest.raises(DamagedFile) as caught: stored(path, net, r.says())
    assert same(net, before)
    return str(caught.value)

def test_flipped_bits_are_found(one, tmp_path):
    data, bad, says = one[0].read_bytes(), tmp_path/'bad.safetensors', request().says()
    stored(one[0], request().build(), says)
    net, found = request().build(), 0
    places = torch.randint(0, 8 * len(data), (500,), generator=Streams(1).generator('eval')).tolist()
    for place in places:
        spoilt = bytearray(data)
        spoilt[place // 8] ^= 1 << place % 8
        bad.write_bytes(spoilt)
        with pytest.raises(DamagedFile): stored(bad, net, says)
        found += 1
    assert found == 500

def test_cut_files_are_found(one, tmp_path):
    data, bad = one[0].read_bytes(), tmp_path/'bad.safetensors'
    for n in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        bad.write_bytes(data[:n])
        refused(bad)

@pytest.mark.parametrize(('change', 'said'), [
    (lambda t, c: (t, c | dict(seed=1)), 'seed'), (lambda t, c: (t, c | dict(code='0' * 16)), 'code'), (lambda t, c: (t, c | dict(model='mixer')), 'model'),
    (lambda t, c: (t, c | dict(recipe=c['recipe'] | dict(lr=1.))), 'recipe'), (lambda t, c: (t, c | dict(data={})), 'data'), (lambda t, c: (t, {}), 'schema'),
    (lambda t, c: (t | {'head.bias': t['head.bias'] * float('nan')}, c), 'NaN'), (lambda t, c: (t | {'head.bias': t['head.bias'].double()}, c), 'head.bias'),
    (lambda t, c: (t | {'head.bias': t['head.bias'][:5]}, c), 'head.bias'), (lambda t, c: ({k: v for k, v in t.items() if k != 'positions'}, c), 'positions'),
    (lambda t, c: (t | {'more': torch.zeros(1)}, c), 'more')])
def test_whole_files_of_something_else_are_found(one, tmp_path, change, said):
    bad = tmp_path/'bad.safetensors'
    save_tensors(bad, *change(*load_tensors(one[0])))
    assert said in refused(bad)

def test_a_spoilt_file_is_replaced_and_said(one, tmp_path):
    first = ask(tmp_path)
    path, = tmp_path.glob('*.safetensors')
    whole = path.read_bytes()
    for spoil in (whole[:-9], b'', one[0].read_bytes()[:-1]):
        path.write_bytes(spoil)
        again = ask(tmp_path)
        assert again.card['origin'] == 'trained' and path.name in again.card['replaced']
        assert same(first, again) and ask(tmp_path).card['origin'] == 'cache'

def test_another_requests_file_under_this_name_is_replaced(tmp_path):
    other = ask(tmp_path, seed=1)
    path, = tmp_path.glob('*.safetensors')
    path.rename(tmp_path/f'vit-{key(request())}.safetensors')
    net = ask(tmp_path)
    assert 'seed differs' in net.card['replaced'] and not same(net, other)

def test_what_a_killed_writer_left_is_cleared(tmp_path):
    litter = tmp_path/f'.vit-{key(request())}.safetensors.abc.part'
    litter.write_bytes(b'half')
    ask(tmp_path)
    assert not litter.exists() and not list(tmp_path.glob('*.part'))

def test_a_failed_training_leaves_nothing(tmp_path, monkeypatch):
    def broken(request): raise RuntimeError('power cut')
    monkeypatch.setattr(teachers, 'trained', broken)
    with pytest.raises(RuntimeError, match='power cut'): ask(tmp_path)
    assert not list(tmp_path.glob('*.safetensors'))
    monkeypatch.undo()
    assert ask(tmp_path).card['origin'] == 'trained'

FOUR = """
import sys
from lowrank_distill.core.files import fingerprint
from lowrank_distill.data.images import digits
from lowrank_distill.models.teachers import Recipe, teacher
data = {s: digits(s).first(200) for s in ('train', 'validation')}
net = teacher('vit', data, recipe=Recipe(epochs=2, batch=50, shift=1, flip=False), folder=sys.argv[1], patch=2, dim=8, depth=1, heads=2)
print(net.card['origin'], fingerprint(net.state_dict()))
"""

def test_four_processes_ask_at_once(tmp_path):
    "One trains, three wait and read; all have the same bits, and the folder holds one whole file."
    asking = [subprocess.Popen([sys.executable, '-c', FOUR, str(tmp_path/'cache')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = []
    for process in asking:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        said.append(out.split())
    assert sorted(origin for origin, _ in said) == ['cache'] * 3 + ['trained']
    assert len({bits for _, bits in said}) == 1
    assert fingerprint(ask(tmp_path/'cache').state_dict()) == said[0][1]
    assert len(list((tmp_path/'cache').glob('*.safetensors'))) == 1 and not list((tmp_path/'cache').glob('.*.part'))

@pytest.mark.parametrize(('ours', 'xdg', 'where'), [('{0}/mine', '{0}/xdg', 'mine'), ('', '{0}/xdg', 'xdg/lowrank-distill'), ('', '', '.cache/lowrank-distill')])
def test_where_the_cache_is(monkeypatch, tmp_path, ours, xdg, where):
    for name, value in dict(LOWRANK_DISTILL_CACHE=ours, XDG_CACHE_HOME=xdg, HOME='{0}').items(): monkeypatch.setenv(name, value.format(tmp_path))
    assert cache_folder() == tmp_path/where

def test_the_environment_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv('LOWRANK_DISTILL_CACHE', str(tmp_path/'mine'))
    ask(None)
    assert len(list((tmp_path/'mine').glob('vit-*.safetensors'))) == 1

@pytest.mark.parametrize(('wrong', 'said'), [
    (lambda: teacher('renset'), "nearest: 'resnet'"), (lambda: teacher('vit', 'fashoin'), "nearest: 'fashion'"), (lambda: teacher('vit', {'train': digits('train')}), "no 'validation'"),
    (lambda: teacher('vit', 'digits', widht=3), "no option 'widht'"), (lambda: Recipe(epochs=0), 'epochs'), (lambda: Recipe(lr=0.), 'lr'), (lambda: Recipe(shift=-1), 'shift'), (lambda: teacher('vit', 'digits', device='cuda:99'), 'cuda:99'),
    (lambda: embedded('mlp'), 'conv'), (lambda: default_recipe('mlp'), 'conv')])
def test_wrong_questions(wrong, said, monkeypatch, tmp_path):
    monkeypatch.setenv('LOWRANK_DISTILL_CACHE', str(tmp_path))
    with pytest.raises(InputError) as caught: wrong()
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())

@networks
@images
def test_small_options_fit_every_image(name, image):
    net = build(name, image, 10, Streams(0).generator('init'), **small_options(name, image)).eval()
    assert net(drawn(2, *image)).shape == (2, 10)
    if name == 'vit': assert net.grid == (4, 4)

def test_augmentation_moves_and_mirrors():
    x = drawn(400, 2, 6, 5)
    out = augment(x, Recipe(shift=2, flip=True), Streams(0).generator('augment'))
    padded = F.pad(x, (2, 2, 2, 2))
    seen = set()
    for i in range(400):
        for mirror in (False, True):
            whole = padded[i].flip(2) if mirror else padded[i]
            seen |= {(mirror, a, b) for a in range(5) for b in range(5) if torch.equal(out[i], whole[:, a:a + 6, b:b + 5])}
    assert len(seen) == 50 and out.is_contiguous()  # every move, and no image that is anything else
    assert all(any(torch.equal(out[i], w[:, a:a + 6, b:b + 5]) for w in (padded[i], padded[i].flip(2)) for a in range(5) for b in range(5)) for i in range(400))


# The embedded ones

@pytest.mark.parametrize('name', teachers.SMALL)
@pytest.mark.parametrize('split', ['validation', 'test'])
def test_stored_accuracy_is_that_of_the_header(name, split):
    net = embedded(name)
    assert not net.training
    assert net.card['accuracy'][split] == pytest.approx(accuracy(net, fashion_mnist(split)), abs=5e-4)
    assert net.card['accuracy'][split] > .85

@pytest.mark.parametrize('name', teachers.SMALL)
def test_embedded_are_small_and_of_the_present_recipe(name):
    path = asset(f'weights/{name}_fashion.safetensors')
    tensors, card = load_tensors(path)
    assert path.stat().st_size <= 300_000
    assert all(v.dtype == torch.float16 for k, v in tensors.items() if v.is_floating_point())
    now = Request(name, teachers.splits('fashion'), default_recipe(name), small_options(name, (1, 28, 28))).says()
    assert {k: v for k, v in card.items() if k in now and k != 'code'} == {k: v for k, v in now.items() if k != 'code'}
    assert card['parameters'] == count(embedded(name))

def test_embedded_are_small_together():
    assert sum(asset(f'weights/{name}_fashion.safetensors').stat().st_size for name in teachers.SMALL) <= 1_200_000

def test_make_writes_what_embedded_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(teachers, 'splits', lambda data: {s: fashion_mnist(s).first(200) for s in ('train', 'validation', 'test')})
    monkeypatch.setattr(teachers, 'EPOCHS', dict.fromkeys(teachers.EPOCHS, 1))
    monkeypatch.setattr(teachers, 'asset', lambda name: tmp_path/Path(name).name)
    make(tmp_path, ('mixer',))
    net = embedded('mixer')
    assert net.card['accuracy']['validation'] == accuracy(net, fashion_mnist('validation').first(200))
    assert [p.name for p in tmp_path.iterdir()] == ['mixer_fashion.safetensors']
