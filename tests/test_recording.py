"""A recording under kills, resumes, merges, full disks, other writers, and all ways in which its files can be wrong."""
import errno
import gc
import json
import math
import shutil
import string
import subprocess
import sys
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st

from lowrank_distill.core import recording
from lowrank_distill.core.errors import DamagedFile, InputError, RunFailed
from lowrank_distill.core.recording import COLUMNS, VOCABULARY, Recorder, compact, emit, read


def record(folder, start=0, stop=30, run='run', seed=0, **options):
    "Five rows a step, 30 steps: a loss and four gates, in parts of about 20 rows."
    with Recorder(folder, run, seed, **{'flush_every': 20, **options}) as recorder:
        for step in range(start, stop):
            recorder.scalar('loss', 1 / (1 + step), step)
            recorder.vector('gate', torch.arange(4) * .9**step, step, layer='fc1')
    return folder


@pytest.fixture
def folder(tmp_path): return record(tmp_path/'run')

def part_files(folder): return sorted(folder.glob('*.parquet'))

def same(folder, frame): pd.testing.assert_frame_equal(read(folder).frame, frame)


# Rows

texts = st.text(st.characters(exclude_categories=['Cs']), max_size=6)
rows = st.lists(st.tuples(st.integers(0, 9), texts, texts.map('own_1'.__add__), texts,
                          st.integers(-1, 2**63 - 1), st.floats()), max_size=40)

@given(rows=rows, run=texts, seed=st.integers(-2**63, 2**63 - 1), every=st.integers(1, 12), cut=st.integers(0, 10))
def test_rows_come_back(rows, run, seed, every, cut):
    "Whatever was recorded is read, bit for bit and in order; merging changes nothing; a resume keeps what came before."
    with tempfile.TemporaryDirectory() as folder:
        record(folder, run=run + '_other', stop=3)
        others = len(read(folder).frame)
        with Recorder(folder, run, seed, flush_every=every) as recorder:
            for step, stage, name, layer, index, value in rows: recorder.scalar(name, value, step, layer, index, stage)
        def check(expected):
            frame = read(folder).frame
            assert frame.dtypes.astype(str).to_dict() == dict(COLUMNS) and len(frame) == others + len(expected)
            frame = frame[(frame['run'] == run) & (frame['seed'] == seed)]
            assert list(zip(*(frame[c] for c in ('step', 'stage', 'name', 'layer', 'index')), strict=True)) == [
                row[:5] for row in expected]
            assert frame['value'].to_numpy().tobytes() == np.array([row[5] for row in expected], dtype=float).tobytes()
        check(rows)
        compact(folder)
        check(rows)
        Recorder(folder, run, seed, resume_at=cut)
        kept = [row for row in rows if row[0] < cut]
        check(kept)
        assert compact(folder) == 0
        check(kept)


def test_order_is_by_run_and_seed(tmp_path):
    "Whatever the files are called: runs by name, seeds by number, rows as they were written (not by step)."
    for run, seed in (('b', 10), ('b', 2), ('a', 7), ('b', -1)):
        with Recorder(tmp_path, run, seed, flush_every=1) as recorder:
            for step in (5, 3, 4): recorder.scalar('loss', 0., step)
    frame = read(tmp_path).frame
    assert list(zip(frame['run'], frame['seed'], frame['step'], strict=True)) == [
        (run, seed, step) for run, seed in (('a', 7), ('b', -1), ('b', 2), ('b', 10)) for step in (5, 3, 4)]
    assert frame.index.equals(pd.RangeIndex(12))


def test_strange_texts_are_data(tmp_path):
    "Markup, line breaks and separators in names are kept as they are, and reach no file's name."
    strange = ['<img src=x onerror=alert(1)>', '../../up', 'a/b', 'a b', 'a\nb\0', '"', '', '\N{SNOWMAN}' * 200]
    for run in strange: record(tmp_path, run=run, stop=1)
    with Recorder(tmp_path, 'layers', 0) as recorder:
        for layer in strange: recorder.scalar('rank', 4, 0, layer=layer)
    frame = read(tmp_path).frame
    assert set(frame['run']) == {*strange, 'layers'} and frame.query('run == "layers"')['layer'].tolist() == strange
    assert all(set(p.name) <= {*string.ascii_letters, *string.digits, *'._-'} for p in tmp_path.iterdir())
    assert '<img' not in frame.to_html()


@pytest.mark.parametrize('call', [
    lambda r: r.scalar('loss', 'nan', 0), lambda r: r.scalar('loss', None, 0), lambda r: r.scalar('loss', 1j, 0),
    lambda r: r.scalar('loss', torch.ones(2), 0), lambda r: r.scalar('loss', torch.empty((), device='meta'), 0),
    lambda r: r.scalar('loss', torch.tensor(1j), 0), lambda r: r.scalar('loss', [1.], 0),
    lambda r: r.scalar('loss', 10**400, 0), lambda r: r.scalar('loss', 1., 0, '\ud800'),
    lambda r: r.scalar('loss', 1., -1), lambda r: r.scalar('loss', 1., 1.), lambda r: r.scalar('loss', 1., True),
    lambda r: r.scalar('loss', 1., 2**63), lambda r: r.scalar('loss', 1., 0, index=-2), lambda r: r.scalar(3, 1., 0),
    lambda r: r.scalar('', 1., 0), lambda r: r.scalar('loss', 1., 0, layer=None),
    lambda r: r.vector('gate', torch.ones(()), 0), lambda r: r.vector('gate', torch.ones(2, 2), 0),
    lambda r: r.vector('gate', 3., 0), lambda r: r.vector('gate', ['a'], 0),
    lambda r: r.vector('gate', np.ones((2, 2)), 0),
    lambda r: r.vector('gate', torch.ones(2, dtype=torch.complex64), 0), lambda r: r.vector('gate', {0: 1.}, 0),
    lambda r: r.array('weight', torch.eye(2).to_sparse(), 0), lambda r: r.array('weight', 'abc', 0),
    lambda r: r.array('weight', torch.empty(2, device='meta'), 0), lambda r: r.array('weight', [[1], [1, 2]], 0)])
def test_wrong_input_leaves_no_row(tmp_path, call):
    with Recorder(tmp_path, 'run', 0) as recorder:
        recorder.scalar('loss', 1., 0)
        with pytest.raises(InputError): call(recorder)
    assert len(read(tmp_path).frame) == 1 and read(tmp_path).arrays().empty
    with pytest.raises(InputError, match='closed'): recorder.scalar('loss', 1., 1)


@pytest.mark.parametrize('word', [w for w in VOCABULARY if len(w) > 3])
def test_slips_of_the_vocabulary(word):
    "A letter dropped, doubled, changed or swapped is found; the words themselves are not slips of each other."
    assert recording._check_name(word) == word
    slips = [word[:i] + new + word[i + 1:] for i in range(1, len(word)) for new in ('', 'q', 2 * word[i])]
    slips += [word.upper(), word.capitalize()]
    slips += [word[:i] + word[i + 1] + word[i] + word[i + 2:] for i in range(1, len(word) - 1)]
    for slip in set(slips) - {*VOCABULARY}:
        with pytest.raises(InputError) as caught: recording._check_name(slip)
        assert word in caught.value.nearest
    assert all(recording._check_name(own) == own for own in (f'{word}_kd', f'{word}2', f'teacher_{word}'))


def test_no_graph_is_kept(tmp_path):
    recorder = Recorder(tmp_path, 'run', 0)
    leaf = torch.ones(3, requires_grad=True)
    grown = leaf * 2
    recorder.scalar('loss', grown.sum(), 0)
    recorder.vector('gate', grown, 0)
    recorder.array('weight', grown, 0)
    watch = weakref.ref(grown)
    del grown
    gc.collect()
    assert watch() is None and not read(tmp_path).array('weight', 0).requires_grad


# Kills and resumes

RUN = """
import json, os, random, signal, sys, time
from lowrank_distill.core.files import read_json, write_json
from lowrank_distill.core.recording import Recorder, compact, read
folder, saved, steps, luck = sys.argv[1], sys.argv[2], 400, random.Random(int(sys.argv[3]))

def train():
    at = read_json(saved)['step'] if os.path.exists(saved) else 0
    with Recorder(folder, 'run', 0, flush_every=11, resume_at=at) as recorder:
        for step in range(at, steps):
            if step == at + 60: time.sleep(600)  # on a machine of any speed it takes several lives
            if step % 9 == 0: recorder.flush(); write_json(saved, {'step': step})
            recorder.scalar('loss', 1 / (1 + step), step)
            recorder.vector('gate', [step, float('nan')], step, layer='fc1')
            if step % 50 == 0: recorder.array('weight', [[step]], step)
    write_json(saved, {'step': steps})

kills = 0
while not os.path.exists(saved) or read_json(saved)['step'] < steps:
    if not (child := os.fork()): train(); os._exit(0)
    time.sleep(luck.uniform(.01, .25))
    if luck.random() < .3: compact(folder)
    os.kill(child, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
print(json.dumps(kills))
"""

def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    "A run killed at random points, resumed from its checkpoint and merged meanwhile leaves what an unbroken one does."
    with Recorder(tmp_path/'whole', 'run', 0) as recorder:
        for step in range(400):
            recorder.scalar('loss', 1 / (1 + step), step)
            recorder.vector('gate', [step, math.nan], step, layer='fc1')
            if step % 50 == 0: recorder.array('weight', [[step]], step)
    (tmp_path/'broken').mkdir()
    command = [sys.executable, '-c', RUN, str(tmp_path/'broken'), str(tmp_path/'checkpoint.json'), '3']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout) >= 5, done.stderr
    whole, broken = read(tmp_path/'whole'), read(tmp_path/'broken')
    pd.testing.assert_frame_equal(broken.frame, whole.frame)
    pd.testing.assert_frame_equal(broken.arrays(), whole.arrays())
    assert broken.array('weight', 350).tolist() == [[350]]


@pytest.mark.parametrize('fails_at', range(7))
@pytest.mark.parametrize('work', ['compact', 'resume'])
def test_death_at_every_removal(folder, monkeypatch, work, fails_at):
    "Merging or resuming dies before removal number `fails_at`: readers see the end or the beginning, never a mixture."
    before = read(folder).frame
    after = before if work == 'compact' else before[before['step'] < 12]
    unlink, count = Path.unlink, [0]
    def dying(self, missing_ok=False):
        if self.suffix == '.parquet':
            count[0] += 1
            if count[0] > fails_at: raise KeyboardInterrupt
        unlink(self, missing_ok=missing_ok)
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'unlink', dying)
        with pytest.raises(KeyboardInterrupt):
            compact(folder) if work == 'compact' else Recorder(folder, 'run', 0, resume_at=12)
    same(folder, after)
    compact(folder)
    same(folder, after)
    assert len(part_files(folder)) == 1
    record(folder, 12, resume_at=12)
    same(folder, before)


def test_reading_while_parts_are_merged_and_cut(folder, monkeypatch):
    "Files that go between listing and reading make the reader look again."
    frame, load = read(folder).frame, recording._load
    works = [lambda: compact(folder), lambda: record(folder, 12, resume_at=12)]
    def disturbed(part):
        if works: works.pop()()
        return load(part)
    monkeypatch.setattr(recording, '_load', disturbed)
    same(folder, frame)
    same(folder, frame)
    assert not works


def test_resume_from_nothing_and_arrays(tmp_path):
    record(tmp_path, resume_at=0)
    with Recorder(tmp_path, 'run', 0, resume_at=30) as recorder:
        for step in (30, 31, 40): recorder.array('weight', [[step]], step, layer='fc1')
    (tmp_path/'.run-other.part').touch()
    (tmp_path/f'.{recorder._stem}.g0.part').touch()
    Recorder(tmp_path, 'run', 0, resume_at=31)
    assert read(tmp_path).arrays()['step'].tolist() == [30] and len(read(tmp_path).frame) == 150
    assert [p.name for p in tmp_path.glob('.*')] == ['.run-other.part']
    Recorder(tmp_path, 'run', 0, resume_at=0)
    assert read(tmp_path).frame.empty


# Other writers, full disks, exceptions

def test_many_runs_write_into_one_folder(tmp_path):
    "Four runs at once, with names that look alike as file names, and a fifth thread that merges and reads."
    names = 'a b', 'a/b', 'a-b', 'a.b'
    def merge(_):
        for _ in range(15):
            if part_files(tmp_path): compact(tmp_path); read(tmp_path)
    with ThreadPoolExecutor(5) as pool:
        jobs = [pool.submit(record, tmp_path, run=name, stop=60) for name in names] + [pool.submit(merge, 0)]
        for job in jobs: job.result()
    frame = read(tmp_path).frame
    assert frame.groupby('run').size().to_dict() == dict.fromkeys(names, 300)
    for _, own in frame.groupby('run'): assert own['step'].tolist() == [step for step in range(60) for _ in range(5)]


def test_two_writers_of_one_run(tmp_path):
    "Both were opened before either wrote: the second to write is stopped, and the first one's rows are whole."
    first, second = (Recorder(tmp_path, 'run', 0, flush_every=1) for _ in range(2))
    for step in range(3): first.scalar('loss', step, step)
    with pytest.raises(RunFailed, match='another recorder'): second.scalar('loss', -1., 0)
    assert read(tmp_path).frame['value'].tolist() == [0, 1, 2]
    with pytest.raises(InputError, match='already recorded'): Recorder(tmp_path, 'run', 0)
    Recorder(tmp_path, 'run', 1)
    Recorder(tmp_path/'arrays', 'run', 0).array('weight', [1.], 0)
    with pytest.raises(InputError, match='already recorded'): Recorder(tmp_path/'arrays', 'run', 0)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path, 'run', 0, flush_every=2)
    recorder.scalar('loss', 0., 0)
    with monkeypatch.context() as patch:
        def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')
        patch.setattr(recording, 'atomic', full)
        with pytest.raises(RunFailed, match='No space left'): recorder.scalar('loss', 1., 1)
        patch.setattr(recording, 'save_tensors', full)
        with pytest.raises(RunFailed, match='No space left'): recorder.array('weight', [1.], 1)
        with pytest.raises(ZeroDivisionError) as caught, Recorder(tmp_path, 'other', 0) as other:
            other.scalar('loss', 2., 0)
            raise ZeroDivisionError
        assert 'No space left' in caught.value.__notes__[0]
        with pytest.raises(RunFailed), Recorder(tmp_path, 'third', 0) as third: third.scalar('loss', 2., 0)
    recorder.flush()
    assert read(tmp_path).frame['value'].tolist() == [0, 1]


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_flushes(tmp_path, error):
    with pytest.raises(error), Recorder(tmp_path, 'run', 0) as recorder:
        recorder.scalar('loss', math.nan, 0)
        raise error
    assert read(tmp_path).frame['value'].isna().tolist() == [True]


def test_interrupted_between_writing_and_noting(tmp_path, monkeypatch):
    "The part is on disk, the recorder does not know: it writes the rows again, and they count once."
    recorder, write = Recorder(tmp_path, 'run', 0), recording._write
    def interrupted(*args):
        write(*args)
        raise KeyboardInterrupt
    recorder.scalar('loss', 0., 0)
    with monkeypatch.context() as patch:
        patch.setattr(recording, '_write', interrupted)
        with pytest.raises(KeyboardInterrupt): recorder.flush()
    recorder.scalar('loss', 1., 1)
    recorder.flush()
    assert read(tmp_path).frame['value'].tolist() == [0, 1] and len(part_files(tmp_path)) == 2
    assert compact(tmp_path) == 1
    assert read(tmp_path).frame['value'].tolist() == [0, 1]


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path/'file').write_text('')
    for place in (tmp_path/'file', tmp_path/'file'/'below'):
        with pytest.raises(InputError): Recorder(place, 'run', 0)
        with pytest.raises(InputError): read(place)
    for what in (read, compact):
        with pytest.raises(InputError, match='cannot read'): what(tmp_path/'nowhere')
    with pytest.raises(InputError, match='nothing is recorded'): read(tmp_path)
    for bad in (dict(run=3), dict(run='\ud800'), dict(seed=1.5), dict(seed=2**63), dict(flush_every=0),
                dict(resume_at=-1)):
        with pytest.raises(InputError): Recorder(tmp_path/'new', **{'run': 'run', 'seed': 0, **bad})
    assert not (tmp_path/'new').exists()


# Damage

def test_every_flipped_byte_and_every_cut(tmp_path):
    record(tmp_path, stop=2)
    part, = part_files(tmp_path)
    whole = part.read_bytes()
    for i in range(0, len(whole), 3):
        for bad in (whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:], whole[:i]):
            part.write_bytes(bad)
            with pytest.raises(DamagedFile) as caught: read(tmp_path)
            assert part.name in str(caught.value)
    part.write_bytes(whole)
    assert len(read(tmp_path).frame) == 10


def test_every_flipped_byte_of_an_array(tmp_path):
    Recorder(tmp_path, 'run', 0).array('weight', torch.arange(6.).reshape(2, 3), 4, layer='fc1')
    path, = tmp_path.iterdir()
    whole = path.read_bytes()
    for i in range(len(whole)):
        for bad in (whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:], whole[:i]):
            path.write_bytes(bad)
            with pytest.raises(DamagedFile) as caught: read(tmp_path).array('weight', 4, 'fc1')
            assert path.name in str(caught.value)
    path.write_bytes(whole)
    assert read(tmp_path).array('weight', 4, 'fc1').shape == (2, 3)


def test_foreign_files(folder):
    frame, part = read(folder).frame, part_files(folder)[1]
    for name in ('notes.txt', '._x.parquet', '.x.parquet.abc.part', 'model.safetensors', 'x.parquet.part'):
        (folder/name).write_bytes(b'x')
    same(folder, frame)
    frame.to_parquet(folder/'mine.parquet')
    for act in (read, compact, lambda f: Recorder(f, 'new', 0)):
        with pytest.raises(DamagedFile, match='mine.parquet'): act(folder)
    (folder/'mine.parquet').unlink()

    record(folder/'other', run='other')
    stolen = part_files(folder/'other')[0]
    renamed = folder/stolen.name.replace(stolen.name.split('.')[0], 'third-000000000000')
    shutil.copy(stolen, renamed)
    with pytest.raises(DamagedFile, match='third'): read(folder)
    renamed.unlink()

    part.rename(folder/'away')
    with pytest.raises(DamagedFile, match='rows .* are missing'): read(folder)


@pytest.mark.parametrize('change', [
    lambda t: t.drop_columns(['stage']), lambda t: t.replace_schema_metadata(None), lambda t: t.slice(1),
    lambda t: t.set_column(7, 'value', recording.pa.array([1] * len(t))), lambda t: recording.pa.concat_tables([t, t]),
    lambda t: t.set_column(7, recording._SCHEMA.field(7), recording.pa.array([None] * len(t), 'float64')),
    lambda t: t.replace_schema_metadata({'lowrank-distill': '{"schema": 2, "kind": "rows"}'})])
def test_well_formed_files_with_wrong_content(folder, change):
    "A part whose bytes match its name but that holds other columns, rows, types or a later schema is refused."
    part = recording._parts(folder)[0]
    new = recording._write(folder, part.stem, 0, 0, change(recording._load(part)))
    part.path.unlink()
    new.rename(folder/new.name.replace(new.name.split('.')[2], f'{part.start:012d}-{part.stop:012d}'))
    with pytest.raises(DamagedFile): read(folder)


def test_overlaps_are_errors(folder):
    parts = recording._parts(folder)
    table = recording._load(parts[0])
    twin = recording._write(folder, parts[0].stem, 0, 0, table.set_column(7, 'value', [[0.] * len(table)]))
    with pytest.raises(DamagedFile, match='overlaps'): read(folder)
    twin.unlink()
    recording._write(folder, parts[0].stem, 0, 5, table)
    with pytest.raises(DamagedFile, match='overlaps'): read(folder)


# Arrays

def test_arrays(tmp_path):
    kinds = {'float': torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), 'scalar': torch.tensor(2.),
             'empty': torch.empty(0, 3), 'half': torch.ones(2, dtype=torch.bfloat16), 'mask': np.array([True, False]),
             'nan': torch.tensor([math.nan, math.inf]), 'view': torch.eye(4)[:, 1], 'list': [[1, 2]]}
    with Recorder(tmp_path, 'run', 0) as recorder:
        for step in (0, 7):
            for name, value in kinds.items(): recorder.array(f'{name}_1', value, step, stage='warm-up')
    found = read(tmp_path)
    assert len(found.arrays()) == 2 * len(kinds) and found.frame.empty and found.names() == []
    for name, value in kinds.items():
        back = found.array(f'{name}_1', 7)
        torch.testing.assert_close(back, torch.as_tensor(value), rtol=0, atol=0, equal_nan=True)
    for wrong in (dict(name='flaot_1', step=7), dict(name='float_1', step=8), dict(name='float_1', step=7, layer='x'),
                  dict(name='float_1', step=7, run='other'), dict(name='float_1', step=7, seed=1)):
        with pytest.raises(InputError) as caught: found.array(**wrong)
        assert caught.value.nearest
    Recorder(tmp_path, 'run', 1).array('float_1', [0.], 7)
    with pytest.raises(InputError, match='several'): found.array('float_1', 7)
    assert found.array('float_1', 7, seed=1).tolist() == [0.]


# Metrics of a page

loop = []
loop.append(loop)

@pytest.mark.parametrize('value', [math.nan, math.inf, np.float32('nan'), torch.tensor(math.nan), None, 1j, {1}, len,
                                   torch.ones(2), np.ones(1), [1., [math.nan]], {'a': {'b': -math.inf}}, {1: 2}, loop,
                                   b'x', '\ud800', ...])
def test_emit_refuses(value):
    with pytest.raises(InputError, match='accuracy'): emit(rank=1, accuracy=value)
    with pytest.raises(InputError, match='no metrics'): emit()

leaves = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), texts)

@given(st.dictionaries(texts, st.recursive(leaves, lambda c: st.lists(c) | st.dictionaries(texts, c), max_leaves=6),
                       min_size=1))
def test_emit_keeps(metrics):
    shown = emit(**metrics)._repr_mimebundle_()
    assert json.loads(json.dumps(shown[recording.METRICS_MIME], allow_nan=False)) == metrics
    assert isinstance(shown['text/plain'], str)

def test_emit_takes_numbers_of_any_kind():
    shown = emit(a=np.float32(.5), b=np.int64(3), c=torch.tensor(2.), d=np.bool_(True), e=(1, 2), f=torch.tensor(True))
    assert [type(v) for v in shown.metrics.values()] == [float, int, float, bool, list, bool]
    assert str(emit(student=dict(loss=.25), n=12)) == 'student.loss  0.25\nn             12'
