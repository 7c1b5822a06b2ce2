"""Explorers without a browser: views are pure, states are strict, texts are texts, errors leave the view as it was, numbers are those of the analysis."""
import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from lowrank_distill.analysis.cka import ESTIMATORS, KERNELS, compare, grams
from lowrank_distill.core.errors import DamagedFile, InputError
from lowrank_distill.core.files import asset
from lowrank_distill.core.recording import Recorder
from lowrank_distill.core.taps import Tap
from lowrank_distill.explorers.base import Control, Panel, checked, extent, film, in_figure, in_plot, parse_state, redraw, spread, state_text, table_html
from lowrank_distill.explorers.cka import STEPS, CKAExplorer, record_grams, sample
from torch import nn

NASTY = ['<img src=x onerror=alert(1)>', '</script><script>alert(1)</script>', '"><svg onload=alert(1)>', '$\\frac{1}{2}$', 'a$b', '%{y}<extra>', '&lt;b&gt;', 'ä…漢\\n', '<b>bold</b>', '<a href="javascript:alert(1)">x</a>']

def net(*names: str, seed: int = 0) -> nn.Sequential:
    "Linear layers with these names; add_module takes no dot."
    generator, sizes, made = torch.Generator().manual_seed(seed), [6, *(5 + i for i in range(len(names)))], nn.Sequential()
    for name, inp, out in zip(names, sizes, sizes[1:], strict=False): made.add_module(name, nn.Linear(inp, out))
    with torch.no_grad(): [p.normal_(std=p.shape[-1]**-.5, generator=generator) for p in made.parameters()]
    return made

ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 3

@pytest.fixture
def folder(tmp_path) -> Path:
    "Two networks; 'small' at three steps, 'other' at one; three classes."
    for step in (0, 10, 20): CKAExplorer.record(tmp_path/'runs', net('a', 'b', 'c', seed=step), ROWS, step=step, run='small', labels=LABELS, classes=['x', 'y', 'z'])
    CKAExplorer.record(tmp_path/'runs', net('p', 'q', seed=9), ROWS, step=0, run='other', labels=LABELS, classes=['x', 'y', 'z'])
    return tmp_path/'runs'

@pytest.fixture
def explorer(folder) -> CKAExplorer: return CKAExplorer(folder)

def refused(call, *words: str, kind: type = InputError):
    with pytest.raises(kind) as caught: call()
    assert all(w in str(caught.value) for w in words), caught.value


# States

def any_state(explorer: CKAExplorer, draw: random.Random) -> dict[str, object]:
    "A state that may be asked for, of a view alone."
    def one(c: Control) -> object:
        if c.kind == 'toggle': return draw.random() < .5
        if c.kind == 'range': return draw.choice(np.arange(c.options[0], c.options[1] + c.options[2] / 2, c.options[2]).tolist())
        return draw.choice(c.options) if c.kind == 'choice' else draw.sample(c.options, draw.randint(1, len(c.options)))
    found = {n: one(c) for n, c in explorer.view.items()}
    return found | dict(layers=list(explorer.view['layers'].options), draws=draw.choice([0, 40]), classes=['x', 'y', 'z'] if draw.random() < .5 else ['x', 'z'])

def test_any_state_restores_its_view(explorer, folder):
    "Random states, pinned or not: the text gives the same settings, frame, figure and sentence in another explorer, with the traces that every state has."
    draw, kinds = random.Random(0), None
    for _ in range(16):
        explorer.change(**any_state(explorer, draw), shows='B')
        if draw.random() < .5: explorer.pin()
        try: explorer.change(**any_state(explorer, draw), shows=draw.choice(['A', 'B', 'difference']) if explorer.settings['pinned'] else 'B', frozen=draw.random() < .5)
        except InputError as e: assert 'share nothing' in str(e); continue
        again = CKAExplorer(folder, explorer.state)
        (state, frame), (_, other) = explorer.shown(), again.shown()
        assert again.settings == explorer.settings and frame.equals(other)
        drawn = explorer.draw(state, frame)
        assert drawn.to_json() == again.draw(*again.shown()).to_json() and explorer.caption(state, frame) == again.caption(*again.shown())
        kinds = kinds or [t.type for t in drawn.data]
        assert kinds == [t.type for t in drawn.data]

@pytest.mark.parametrize('text', ['', '[]', 'null', '{}', '{"schema": 1}', '{"schema": 2, "explorer": "CKAExplorer"}', '{"schema": 1, "explorer": "Other"}', '{"schema": 1, "explorer": "CKAExplorer", "stpe": 0}',
                                  '{"schema": 1, "explorer": "CKAExplorer", "step": "0"}', '{"schema": 1, "explorer": "CKAExplorer", "step": true}', '{"schema": 1, "explorer": "CKAExplorer", "step": 0, "step": 10}',
                                  '{"schema": 1, "explorer": "CKAExplorer", "shows": "A"}', '{"schema": 1, "explorer": "CKAExplorer", "pinned": {"shows": "A"}}', '{"schema": 1, "explorer": "CKAExplorer", "pinned": []}',
                                  '{"schema": 1, "explorer": "CKAExplorer", "layers": []}', '{"schema": 1, "explorer": "CKAExplorer", "bandwidth": 99}', '{"schema": 1, "explorer": "CKAExplorer", "frozen": 1}'])
def test_a_wrong_state_changes_nothing(explorer, text):
    before = explorer.state
    refused(lambda: explorer.restore(text))
    assert explorer.state == before

@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9), lambda o: st.lists(o, max_size=3) | st.dictionaries(st.text(max_size=9), o, max_size=3), max_leaves=8))
def test_any_json_is_a_state_or_an_input_error(value):
    view = {'step': Control('step', 'choice', 'step', (0, 1)), 'many': Control('many', 'multi', 'many', ('a', 'b'))}
    for text in (json.dumps(value), state_text('X', {'step': value}), state_text('X', {'many': value}), state_text('X', {'pinned': value}), state_text('X', {'frozen': value})):
        try: found = parse_state(text, 'X', view)
        except InputError: continue
        assert checked(found, view) == found


# A and B

def test_difference_is_b_minus_a(explorer):
    explorer.change(rows='small', columns='small', step=0)
    explorer.pin()
    explorer.change(step=20, shows='difference')
    first, state = explorer.shown()[1], explorer.settings
    low, high = explorer.limits(state, first)
    assert low == -high and high >= first.cka.abs().max()
    a, b = (explorer.shown({'step': step, 'shows': 'B'})[1].cka for step in (0, 20))
    known = first.cka.notna()
    assert known.any() and np.allclose(first.cka[known], (b - a)[known]) and first.cka.abs().max() > .01
    assert explorer.limits(explorer.shown({'step': 10})[0], explorer.shown({'step': 10})[1]) == (low, high)
    explorer.change(shows='B')
    explorer.pin()
    explorer.change(step=0, shows='difference')
    assert np.allclose(explorer.shown()[1].cka, -first.cka, equal_nan=True)
    explorer.change(shows='A')
    assert 'small at step 20 (rows)' in explorer.caption(*explorer.shown())

def test_scale_is_frozen(explorer):
    explorer.change(rows='small', columns='small')
    at = [explorer.shown({'step': s, 'frozen': f}) for f in (True, False) for s in (0, 20)]
    found = [explorer.limits(*o) for o in at]
    assert found[0] == found[1] == (0, 1) and found[3] != found[0]
    assert extent([pd.Series([np.nan, 2., 2.])]) == (1.5, 2.5) and extent([pd.Series([-1., .5])], symmetric=True) == (-1, 1)


# Texts

class Tags(HTMLParser):
    def __init__(self, text: str): super().__init__(); self.found = []; self.feed(text)
    def handle_starttag(self, tag, attrs): self.found.append(tag)

@pytest.mark.filterwarnings('ignore:Glyph')  # letters that matplotlib's font lacks are boxes there
def test_names_are_texts_everywhere(tmp_path, monkeypatch):
    "Layers, runs and classes with names that were meant to do harm: figure, twin, table, page, picture, sentence and controls hold no markup of theirs."
    layers = [o.replace('.', '') for o in NASTY]
    for run in NASTY[:2]: CKAExplorer.record(tmp_path/'odd', net(*layers), ROWS, [Tap(re.compile(re.escape(o)), name=o) for o in layers], step=0, run=run, labels=LABELS, classes=NASTY[:3])
    odd = CKAExplorer(tmp_path/'odd')
    for layer in layers:
        odd.change(row=layer, column=layer, table=True)
        drawn = json.dumps(json.loads(odd.draw(*odd.shown()).to_json())) + json.dumps(json.loads(odd.figure().to_json()))
        assert not re.search(r'<(?!br>|i>|/i>|extra>|/extra>)', drawn)
    page = odd.export(tmp_path/'odd.html').read_text()
    visible = re.sub(r'<script[^>]*>.*?</script>', '', page, flags=re.S)
    assert set(Tags(visible).found) <= {'html', 'head', 'meta', 'title', 'style', 'body', 'h1', 'div', 'p', 'details', 'summary', 'table', 'thead', 'tbody', 'tr', 'th', 'td', 'code'}
    assert '<script>alert' not in page
    monkeypatch.chdir(tmp_path)
    for path in ('odd.svg', 'odd.png'): assert odd.export(path).stat().st_size > 1000
    panel = Panel(odd)
    assert not {'img', 'svg', 'script', 'a', 'b'} & set(Tags(panel.caption.value + panel.table.value).found)

@given(st.text(max_size=40))
def test_escapes(text):
    assert '<' not in in_figure(text) and '$' not in in_figure(text)
    assert not set(Tags(table_html(pd.DataFrame({text: [text]}))).found) - {'table', 'thead', 'tbody', 'tr', 'th', 'td'}
    assert not re.search(r'(?<!\\)\$', in_plot(text))

def test_no_name_is_lost(explorer):
    "What the figure cannot write out, the table and the sentence do."
    assert set(explorer.shown()[1].row) == {'p', 'q'} and 'p (shape 5' in explorer.caption(*explorer.shown())


# Recordings that cannot be shown

def test_open_fails_as_a_whole(explorer, folder, tmp_path):
    before, shown = explorer.state, explorer.shown()[1]
    (tmp_path/'empty').mkdir()
    with Recorder(tmp_path/'loss', 'r', 0) as recorder: recorder.scalar('loss', 1., 0)
    for name in ('rows', 'array'):
        shutil.copytree(folder, tmp_path/name)
        path = next((tmp_path/name).glob('*.parquet' if name == 'rows' else 'other-*.safetensors'))
        path.write_bytes(path.read_bytes()[:-40])
    for name, word, kind in (('gone', 'cannot read', InputError), ('empty', 'nothing is recorded', InputError), ('loss', 'no Gram', InputError), ('rows', 'truncated', DamagedFile), ('array', 'not a', DamagedFile)):
        refused(lambda name=name: explorer.open(tmp_path/name), word, kind=kind)
        refused(lambda name=name: CKAExplorer(tmp_path/name), word, kind=kind)
        assert explorer.state == before and explorer.shown()[1].equals(shown)

def test_open_keeps_the_settings_that_fit(explorer, tmp_path):
    explorer.change(estimator='biased', step=10, row='p')
    explorer.pin()
    for step in (0, 10): CKAExplorer.record(tmp_path/'new', net('u', 'v', seed=3), ROWS, step=step)
    explorer.open(tmp_path/'new')
    assert (explorer.settings['estimator'], explorer.settings['step'], explorer.settings['row'], explorer.settings['pinned']) == ('biased', 10, 'u', None)

def test_a_damaged_step_leaves_the_view(folder):
    "One array is damaged: its step says so, the others are shown, a frozen scale of differences as well."
    path = next(p for p in folder.glob('small-*.safetensors') if '.a000000000010.' in p.name)
    path.write_bytes(path.read_bytes()[:-40])
    explorer = CKAExplorer(folder)
    explorer.change(step=0)
    before = explorer.state
    refused(lambda: explorer.change(step=10), kind=DamagedFile)
    assert explorer.state == before
    panel = Panel(explorer)
    panel.inputs['step'].value = 10
    assert 'role="alert"' in panel.error.value and panel.inputs['step'].value == 0
    explorer.pin()
    explorer.change(step=20, shows='difference')
    assert explorer.limits(*explorer.shown())[1] > 0


# The widget, without a browser

def test_panel_follows_and_keeps_its_traces(explorer):
    panel = Panel(explorer)
    uids = [t.uid for t in panel.figure.data]
    panel.inputs['step'].value = 10
    panel.inputs['estimator'].value = 'biased'
    assert 'step 10' in panel.caption.value and 'Biased' in panel.caption.value and [t.uid for t in panel.figure.data] == uids
    shown = explorer.draw(*explorer.shown())
    assert np.allclose(panel.figure.data[1].z, shown.data[1].z) and panel.figure.layout.xaxis.title.text == shown.layout.xaxis.title.text
    panel.play.value = 2
    assert explorer.settings['step'] == 20 == panel.inputs['step'].value
    panel.inputs['table'].value = True
    assert panel.table.value.count('<tr') == len(explorer.shown()[1]) + 2 + len(explorer.detail(explorer.settings))
    text = panel.text.value
    panel.inputs['kernel'].value = 'rbf'
    panel.text.value = text
    assert explorer.settings['kernel'] == 'linear' == panel.inputs['kernel'].value
    panel.text.value = '{"stpe": 1}'
    assert 'role="alert"' in panel.error.value and panel.text.value == explorer.state

def test_panel_pins_clicks_and_saves(explorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    panel = Panel(explorer)
    panel.inputs['shows'].value = 'difference'
    assert 'no view is pinned' in panel.error.value and panel.inputs['shows'].value == 'B'
    explorer.pin()
    panel.inputs['step'].value = 0
    panel.inputs['shows'].value = 'difference'
    assert 'B minus A' in panel.caption.value and not panel.error.value
    panel._click(1, type('Points', (), dict(point_inds=[(1, 2)], xs=[2], ys=[1])))
    assert (explorer.settings['row'], explorer.settings['column']) == ('q', 'c') == (panel.inputs['row'].value, panel.inputs['column'].value)
    for name, said in (('view.csv', 'Saved view.csv'), ('view.doc', 'no format'), ('gone\0.csv', 'alert')):
        panel.file.value = name
        panel._try(panel._save)
        assert said in panel.error.value
    assert pd.read_csv('view.csv').columns.tolist() == ['row', 'column', 'A', 'B', 'cka']

def test_other_traces_are_found(explorer):
    panel, other = Panel(explorer), explorer.draw(*explorer.shown())
    with pytest.raises(RuntimeError, match='other traces'): redraw(panel.figure, type(other)(other.data[:3]))

def test_ipywidgets_and_plotly_come_late():
    code = 'import sys, lowrank_distill.explorers.base; print([m for m in ("ipywidgets", "plotly", "matplotlib", "seaborn") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == '[]'


# Without a kernel

def test_twin_has_at_most_24_frames_and_the_present_step(tmp_path):
    with Recorder(tmp_path, 'r', 0) as recorder:
        for step in range(30): record_grams(recorder, net('a', 'b', seed=step), ROWS, step=step)
    explorer = CKAExplorer(tmp_path)
    for step in (0, 14, 29):
        explorer.change(step=step)
        twin = explorer.figure()
        names = [f.name for f in twin.frames]
        assert len(names) <= 24 and {'0', '29', str(step)} <= set(names) and twin.layout.sliders[0].active == names.index(str(step))
        assert np.allclose(twin.data[1].z, twin.frames[names.index(str(step))].data[1].z) and 'need one: rows' in twin.layout.title.text
    assert spread(list(range(100)), 3) == [0, 50, 99] or len(spread(list(range(100)), 3)) == 3

def test_twin_of_a_wide_map_is_small(tmp_path):
    "64 x 64 layers: within 1.5 MB for five steps, without plotly.js."
    names = [f'blocks.{i}.mlp'.replace('.', '_') for i in range(64)]
    for step in range(5): CKAExplorer.record(tmp_path, net(*names, seed=step), ROWS, step=step)
    explorer = CKAExplorer(tmp_path)
    assert explorer.settings['draws'] == 0 and len(explorer.shown()[1]) == 64 * 64
    assert len(explorer.figure().to_json()) < 1_500_000

def test_one_step_has_no_player(tmp_path):
    CKAExplorer.record(tmp_path, net('a', 'b'), ROWS, step=7)
    twin = CKAExplorer(tmp_path).figure()
    assert not twin.frames and not twin.layout.sliders and film({'1': twin}, {'1': 'x'}, '1').layout.title.text == 'x'

def test_page_needs_nothing_else(explorer, tmp_path):
    page = explorer.export(tmp_path/'page.html').read_text()
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)=', page) and 'The numbers as a table' in page and json.dumps(explorer.settings['row']).strip('"') in page


# Numbers

@pytest.mark.parametrize('estimator', ESTIMATORS)
@pytest.mark.parametrize('kernel', KERNELS)
def test_map_is_that_of_the_networks(explorer, estimator, kernel):
    "Another step for the columns, a subset of classes: as computed from the networks on these rows, to what half precision costs."
    explorer.change(rows='other', columns='small', step=0, columns_at=20, estimator=estimator, kernel=kernel, batch=8, classes=['x', 'z'])
    rows = ROWS[LABELS != 1]
    a, b = grams(net('p', 'q', seed=9), rows, ['p', 'q']), grams(net('a', 'b', 'c', seed=20), rows, ['a', 'b', 'c'])
    wanted = compare(a, b, estimator, kernel, batch=8 if estimator == 'minibatch' else None)
    found = explorer.map(explorer.shown()[0])
    assert found.n == len(rows) == 16 and torch.allclose(found.matrix, wanted.matrix, atol=2e-2 if kernel == 'rbf' else 5e-3) and not torch.allclose(found.matrix, found.matrix.flip(0), atol=5e-3)

def test_the_frame_says_what_the_map_says(explorer):
    state, frame = explorer.shown()
    found = explorer.map(state)
    assert frame.cka.tolist() == found.matrix.flatten().tolist() and frame[frame.best].column.tolist() == found.best_match().column.tolist()
    assert frame.chance.tolist() == (frame.cka <= frame.null_high).tolist()

def test_too_few_rows_is_said(tmp_path):
    CKAExplorer.record(tmp_path, net('a', 'b'), ROWS[:12], step=0, labels=torch.tensor([0] * 3 + [1] * 9), classes=['few', 'many'])
    explorer = CKAExplorer(tmp_path)
    refused(lambda: explorer.change(classes=['few']), 'too few rows')
    explorer.change(classes=['many'])
    assert explorer.shown()[1].n.iloc[0] == 9

def test_recording_is_checked(tmp_path):
    refused(lambda: CKAExplorer.record(tmp_path/'a', net('a'), ROWS, step=0, labels=LABELS[:5]), 'one label a row')
    refused(lambda: CKAExplorer.record(tmp_path/'b', net('a'), ROWS, ['aa'], step=0), 'no layer')
    refused(lambda: CKAExplorer.record(tmp_path/'c', net('a'), ROWS, step=0, limit=10), 'too many rows')
    CKAExplorer.record(tmp_path/'d', net('a'), ROWS, step=0, run='one')
    CKAExplorer.record(tmp_path/'d', net('a'), ROWS.flip(0), step=0, run='two')
    refused(lambda: CKAExplorer(tmp_path/'d'), 'did not see the same inputs')

def test_a_run_is_recorded_on_from_a_step(folder):
    CKAExplorer.record(folder, net('a', 'b', 'c', seed=5), ROWS, step=10, run='small', labels=LABELS, classes=['x', 'y', 'z'])
    explorer = CKAExplorer(folder)
    assert explorer.steps_of('small') == [0, 10] and explorer.steps_of('other') == [0]

def test_seeds_are_runs_of_their_own(tmp_path):
    for seed in (0, 1): CKAExplorer.record(tmp_path, net('a', seed=seed), ROWS, step=0, seed=seed)
    assert CKAExplorer(tmp_path).runs == ('run, seed 0', 'run, seed 1')

def test_batches_are_rows(tmp_path):
    "A network recorded on three batches is that recorded on all rows at once; the fingerprint of the inputs keeps them apart."
    CKAExplorer.record(tmp_path/'a', net('a', 'b'), ROWS, step=0)
    CKAExplorer.record(tmp_path/'b', net('a', 'b'), list(ROWS.split(9)), step=0)
    a, b = (CKAExplorer(tmp_path/o) for o in 'ab')
    assert np.allclose(a.shown()[1].cka, b.shown()[1].cka, atol=1e-3)

def test_the_embedded_sample(tmp_path):
    path = asset('recordings/cka')
    assert sum(p.stat().st_size for p in path.iterdir()) < 1_200_000 and 'recordings/cka/' in (ROOT/'NOTICE').read_text()
    assert CKAExplorer(path).recorded_steps() == list(STEPS)
    sample(tmp_path, steps=(0, 2), each=4)
    made = CKAExplorer(tmp_path)
    assert made.recorded_steps() == [0, 2] and made.view['layers'].options == CKAExplorer(path).view['layers'].options
