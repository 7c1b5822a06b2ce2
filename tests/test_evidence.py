"""What a notebook cannot hold of studies: processes that are killed or meet, files that are damaged, code that changes.

The toy package has a method with a study, a lower floor with one function that is reached and one that is not,
and two files.
"""
import ast
import importlib.util
import inspect
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from lowrank_distill.core.errors import DamagedFile, InputError, Interrupted, RunFailed
from lowrank_distill.core.evidence import Study
from lowrank_distill.core.fingerprints import canonical
from lowrank_distill.core.runs import (
    ENVIRONMENT,
    Ledger,
    check_document,
    config_text,
    evidence_table,
    execute,
    freshness,
    job_of,
    results,
    state,
)

METHOD = '''
"A method."
import os, time
from pathlib import Path
from random import Random
from lowrank_distill.core.evidence import Claim, Study
from lowrank_distill.core.toy_floor import shift
BONUS = .3

def score(arm, rate, seed):
    noise = Random(f'{seed}').gauss(0, .05) + Random(f'{arm}{seed}').gauss(0, .02)
    return shift(1 - abs(rate - .1) + noise)

def run_arm(arm, config, seed, scale, device):
    "One run."
    if log := os.environ.get('TOY_LOG'):
        with Path(log).open('a') as f: f.write(f"{arm} {config['rate']} {seed}\\\\n")
        time.sleep(.02)
    value = score(arm, config['rate'], seed)
    return {'validation': value, 'test': value + (BONUS if arm == 'new' else 0)}

def figure(frame): return frame  # not reached by a run

study = Study('toy', arms=['old', 'new'], space={'rate': [.03, .1, .3]}, run=run_arm, module='adapters.toy', minutes=1,
              data=['toy/data.bin'], teachers=['toy/teacher.bin'],
              claims=[Claim(key='better', text='New is better.', treatment='new:test', baseline='old:test',
                            delta=.05, primary=True)])
'''.replace('\\\\n', '\\n')
FLOOR = 'def shift(x): return x + 0.\ndef unused(x): return -x\n'
DECLARED = 2 * 3 * 2 + 2 * 5  # arms x rates x tuning seeds, and arms x seeds


# A toy package, and studies of it

def write(root: Path, method: str = METHOD, floor: str = FLOOR, data: bytes = b'data',
          teacher: bytes = b'teacher') -> Path:
    "The toy package in the folder `root`."
    files = {'adapters/toy.py': method.encode(), 'core/toy_floor.py': floor.encode(),
             'assets/toy/data.bin': data, 'assets/toy/teacher.bin': teacher}
    for name, content in files.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(content)
    return root

def load_study(root: Path) -> Study:
    "The study of the toy package in `root`; its lower floor is put where the method imports it."
    names = {'lowrank_distill.core.toy_floor': 'core/toy_floor.py', 'toy_method': 'adapters/toy.py'}
    for name, path in names.items():
        spec = importlib.util.spec_from_file_location(name, root/path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    for name in names: del sys.modules[name]  # no worker process could import them: they are sent by value
    return replace(module.study, root=root)

@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch):
    for name in (ENVIRONMENT, 'TOY_LOG'): monkeypatch.delenv(name, raising=False)

@pytest.fixture
def root(tmp_path: Path) -> Path: return write(tmp_path/'package')

@pytest.fixture
def store(tmp_path: Path) -> Path: return tmp_path/'store'

def stored(store: Path) -> dict:
    "The stored document, checked; an empty one where nothing is stored yet."
    path = store/'toy'/'cpu-cpu.json'
    return check_document(json.loads(path.read_text()), path.name) if path.exists() else {'runs': []}

def by_job(document: dict) -> dict: return {job_of(run): run for run in document['runs']}


# Processes

DRIVER = '''
import importlib.util, os, signal, sys
from dataclasses import replace
from pathlib import Path
from lowrank_distill.core.evidence import Study
from lowrank_distill.core.runs import execute
''' + inspect.getsource(load_study) + '''
root, store, kill = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
calls, real = 0, Path.replace
def dying(self, target):  # the new file is written and flushed, the old one not yet replaced
    global calls
    calls += 1
    if calls == kill: os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)
if kill: Path.replace = dying
study = load_study(root)
print('ready', flush=True)
print(execute(study, device='cpu', store=store).ran)
'''

def start(root: Path, store: Path, kill: int = 0) -> subprocess.Popen:
    "A process that executes the study; returns when it is about to begin. It kills itself in its `kill`-th write."
    env = os.environ | {'TOY_LOG': str(store.with_name('log'))}
    process = subprocess.Popen([sys.executable, '-c', DRIVER, root, store, str(kill)], env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == 'ready\n', process.communicate()[1]
    return process

def begun(store: Path) -> list[tuple]:
    "Arm, rate and seed of every run that was begun, in order; repeated ones are repeated."
    log = store.with_name('log')
    return [tuple(line.split()) for line in log.read_text().splitlines()] if log.exists() else []

def as_logged(document: dict) -> set[tuple]:
    return {(r['arm'], str(r['config']['rate']), str(r['seed'])) for r in document['runs']}

def finish(process: subprocess.Popen) -> tuple[int, str]:
    "Exit status and what the process said last."
    out, err = process.communicate(timeout=60)
    return process.returncode, (out + err).strip()

def test_killed_and_resumed(root, store):
    "Five kills at random moments: what was stored stays as it was and is never begun again; the sixth start finishes."
    draw, left_over = random.Random(), 0
    for _ in range(5):
        before, seen = stored(store), len(begun(store))
        process = start(root, store)
        time.sleep(draw.uniform(.01, .1))
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL, 'it was killed too late to test anything'
        after = stored(store)
        assert by_job(before).items() <= by_job(after).items(), 'a stored run was lost or changed'
        assert not as_logged(before) & set(begun(store)[seen:]), 'a stored run was begun again'
        left_over += len(begun(store)) - seen - (len(after['runs']) - len(before['runs']))
    half, seen = stored(store), len(begun(store))
    assert 0 <= left_over <= 5, 'a kill costs at most the run that was going on'
    assert len(half['runs']) < DECLARED
    code, said = finish(start(root, store))
    assert (code, said) == (0, str(DECLARED - len(half['runs'])))
    assert by_job(half).items() <= by_job(stored(store)).items() and len(stored(store)['runs']) == DECLARED
    assert len(begun(store)) == DECLARED + left_over and not as_logged(half) & set(begun(store)[seen:])

@pytest.mark.parametrize('write_number', [1, 7])
def test_killed_while_writing(root, store, write_number):
    "Killed between writing the new file and putting it in place: the old one is whole, and the litter is cleared."
    process = start(root, store, kill=write_number)
    assert finish(process)[0] == -signal.SIGKILL
    assert len(stored(store)['runs']) == write_number - 1
    assert list((store/'toy').glob('.*.part')), 'nothing was being written'
    assert finish(start(root, store)) == (0, str(DECLARED - write_number + 1))
    assert not list((store/'toy').glob('.*.part')) and len(begun(store)) == DECLARED + 1

def test_two_processes(root, store):
    "Two at once on one file: both end well, every run is there once, and none is lost."
    both = [start(root, store) for _ in range(2)]
    ends = [finish(p) for p in both]
    assert [code for code, _ in ends] == [0, 0], ends
    document = stored(store)
    assert len(document['runs']) == len(by_job(document)) == DECLARED and as_logged(document) == set(begun(store))
    assert max(Counter(begun(store)).values()) <= 2
    assert not Ledger(document, document['declaration']).missing
    assert not list((store/'toy').glob('.*.part'))

WRITER = '''
import sys, time
from pathlib import Path
from lowrank_distill.core.runs import Book, add_run
store, first, declaration = Path(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3])
book, code = Book('toy', 'cpu', 'cpu', (store,)), dict(own='a', deps={}, data={}, teachers={})
run = dict(phase='final', arm='old', config={'rate': .1}, status='ok', metrics={'test': 1.}, seconds=1., message='')
print('ready', flush=True)
while not store.with_name('go').exists(): time.sleep(.001)
for seed in range(first, first + 40):
    def edit(document):
        document['declaration'] = declaration
        add_run(document, run | dict(seed=seed), code, dict(date='2000-01-01'))
    book.change(edit)
'''

def test_two_writers(root, store):
    "Different runs written at the same time, as fast as it goes: a writer that does not wait for the other loses some."
    declaration = repr(load_study(root).declaration())
    both = [subprocess.Popen([sys.executable, '-c', WRITER, store, str(first), declaration], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for first in (0, 40)]
    for process in both: assert process.stdout.readline() == 'ready\n', process.communicate()[1]
    store.with_name('go').touch()
    ends = [finish(p) for p in both]
    assert ends == [(0, '')] * 2
    assert {run['seed'] for run in stored(store)['runs']} == set(range(80))

def test_interrupted_run_is_not_stored(root, store):
    "Ctrl-C inside a run: what was finished is kept, the exit status is that of an interruption."
    study, calls = load_study(root), []
    def stopping(*job):
        calls.append(job)
        if len(calls) == 4: raise KeyboardInterrupt
        return study.run(*job)
    with pytest.raises(Interrupted) as caught: execute(replace(study, run=stopping), device='cpu', store=store)
    assert caught.value.exit_code == 130 and len(stored(store)['runs']) == 3
    assert execute(study, device='cpu', store=store).ran == DECLARED - 3

def test_torch_is_not_imported(root, store):
    "What a listing asks is answered from text and JSON."
    execute(load_study(root), device='cpu', store=store)
    script = textwrap.dedent('''
        import sys
        from pathlib import Path
        from lowrank_distill.core.runs import evidence_table, freshness, state
        root, store = Path(sys.argv[1]), sys.argv[2]
        where = 'adapters.toy', root, store
        print(state('toy', *where), freshness('toy', *where), len(evidence_table({'toy': where[0]}, *where[1:])))
        print(sorted({'torch', 'plotly'} & set(sys.modules)))
    ''')
    done = subprocess.run([sys.executable, '-c', script, root, store], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ['evidence fresh 1', '[]'], done.stderr


# Changed code

def edited(old: str, new: str) -> dict:
    assert old in METHOD, old
    return {'method': METHOD.replace(old, new)}

NOTHING = {
    'comment': edited('  # not reached by a run', ''),
    'docstring': edited('"One run."', '"A single run of one arm."'),
    'docstring gone': edited('    "One run."\n', ''),
    'annotation': edited('score(arm, rate, seed):', 'score(arm: str, rate: float, seed: int) -> float:'),
    'layout': edited('1 - abs(rate - .1) + noise', '(1 - abs(rate - 0.1)\n                  + noise)'),
    'unreached function': edited('return frame ', 'return len(frame) '),
    'new function': edited('def figure', 'def other(): return 3\n\ndef figure'),
    'order': {'method': METHOD.replace('BONUS = .3\n', '').replace('def figure', 'BONUS = .3\ndef figure')},
    'claim text': edited('New is better.', 'The new one wins.'),
    'minutes': edited('minutes=1', 'minutes=2'),
    'expectation': edited('delta=.05', "delta=.05, expect='A clear win.'"),
    'unreached floor': {'floor': FLOOR.replace('-x', '2 * x')},
    'floor comment': {'floor': FLOOR.replace('0.\n', '0.  # same\n')}}
OWN = {
    'renamed variable': {'method': METHOD.replace('noise', 'luck')},
    'constant': edited('BONUS = .3', 'BONUS = .4'),
    'default': edited('def score(arm, rate, seed)', 'def score(arm, rate, seed=0)'),
    'operator': edited('rate - .1', 'rate + .1'),
    'delta': edited('delta=.05', 'delta=.06'),
    'larger': edited('delta=.05', 'delta=.05, larger=.5'),
    'grid': edited('.03, .1, .3', '.03, .1, .2'),
    'arms': edited("arms=['old', 'new']", "arms=['new', 'old']"),
    'seeds': edited('minutes=1', 'seeds=(0, 1, 2)'),
    'import': edited('import shift', 'import unused as shift')}
DEPS = {'floor': {'floor': FLOOR.replace('+ 0.', '+ 1.')}, 'data': {'data': b'Data'},
        'teacher': {'teacher': b'Teacher'}}
CHANGES = [pytest.param(change, age, id=f'{age}: {name}') for age, cases in
           (('fresh', NOTHING), ('own-stale', OWN), ('deps-stale', DEPS)) for name, change in cases.items()]

@pytest.mark.parametrize(('change', 'age'), CHANGES)
def test_freshness(root, store, change, age):
    "Prose and figures cost nothing; what a run computes, or stands on, does. The evidence itself stays."
    execute(load_study(root), device='cpu', store=store)
    assert freshness('toy', 'adapters.toy', root, store) == 'fresh'
    write(root, **change)
    assert freshness('toy', 'adapters.toy', root, store) == age
    assert state('toy', 'adapters.toy', root, store) == 'evidence'
    assert list(evidence_table({'toy': 'adapters.toy'}, root, store).freshness) == [age]

@pytest.mark.parametrize('change', [OWN['constant'], DEPS['floor']], ids=['own', 'deps'])
def test_stale_runs_again(root, store, change):
    "By default stale runs stand; with `stale` each is run once more, and then all is fresh."
    execute(load_study(root), device='cpu', store=store)
    write(root, **change)
    study = load_study(root)
    assert execute(study, device='cpu', store=store).ran == 0
    assert execute(study, device='cpu', store=store, stale=True).ran == DECLARED
    assert freshness('toy', 'adapters.toy', root, store) == 'fresh' and len(stored(store)['runs']) == DECLARED
    assert execute(study, device='cpu', store=store, stale=True).ran == 0

def test_kept_with_a_reason(root, store):
    "Half a study, then other code: refused; kept with a reason, it goes on, and the verdict tells the reason."
    execute(load_study(root), device='cpu', store=store)
    half = json.loads((store/'toy'/'cpu-cpu.json').read_text())
    half['runs'] = half['runs'][:-4]
    (store/'toy'/'cpu-cpu.json').write_text(json.dumps(half))
    write(root, **OWN['renamed variable'])
    study = load_study(root)
    with pytest.raises(InputError, match='older code'): execute(study, device='cpu', store=store)
    assert execute(study, device='cpu', store=store, keep='only a name changed').ran == 4
    assert freshness('toy', 'adapters.toy', root, store) == 'fresh'
    assert 'only a name changed' in results(study, device='cpu', store=store).verdicts()[0].sentence
    write(root, **OWN['constant'])
    assert freshness('toy', 'adapters.toy', root, store) == 'own-stale'

def test_walker_ignores_what_versions_add(monkeypatch):
    "Python 3.12 gives functions a field `type_params`, a later one may add others: empty, they change no hash."
    tree, added = ast.parse(METHOD), ('type_params', 'added_later')
    before, dumped = canonical(tree), ast.dump(tree)
    for kind in (ast.FunctionDef, ast.ClassDef):
        monkeypatch.setattr(kind, '_fields', tuple(dict.fromkeys([*kind._fields, *added])))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef): node.type_params = node.added_later = []
    assert canonical(tree) == before
    if sys.version_info < (3, 13): assert ast.dump(tree) != dumped  # the careless twin


# Stored documents

DAMAGE = {
    'cut': lambda b: b[:len(b) // 2], 'empty': lambda b: b'',
    'schema': lambda b: b.replace(b'"schema": 1', b'"schema": 2'),
    'status': lambda b: b.replace(b'"ok"', b'"fine"', 1), 'index': lambda b: b.replace(b'"code": 0', b'"code": 7', 1),
    'other study': lambda b: b.replace(b'"key": "toy"', b'"key": "yot"', 1)}

@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_damaged_file_is_never_overwritten(root, store, damage):
    study, path = load_study(root), store/'toy'/'cpu-cpu.json'
    execute(study, device='cpu', store=store)
    path.write_bytes(bad := damage(path.read_bytes()))
    for use in (execute, results):
        with pytest.raises(DamagedFile, match='cpu-cpu.json'): use(study, device='cpu', store=store)
    assert path.read_bytes() == bad

def test_only_selection_metrics_of_tuning_are_stored(root, store):
    execute(load_study(root), device='cpu', store=store)
    kept = {(run['phase'], *sorted(run['metrics'])) for run in stored(store)['runs']}
    assert kept == {('tune', 'validation'), ('final', 'test', 'validation')}

def test_failed_runs_are_tried_again(root, store):
    study = load_study(root)
    def failing(arm, config, seed, scale, device):
        if (arm, seed) == ('new', 3): raise MemoryError('too large')
        return study.run(arm, config, seed, scale, device)
    broken = replace(study, run=failing)
    for made in (DECLARED, 1):
        with pytest.raises(RunFailed, match=f'1 of {made} runs failed'): execute(broken, device='cpu', store=store)
        assert [r['seed'] for r in stored(store)['runs'] if r['status'] == 'failed'] == [3]
    assert state('toy', 'adapters.toy', root, store) == 'built'
    assert execute(study, device='cpu', store=store).ran == 1
    assert state('toy', 'adapters.toy', root, store) == 'evidence'

def test_budget_starts_no_run_after_its_end(root, store):
    summary = execute(load_study(root), device='cpu', store=store, budget=0)
    assert (summary.ran, summary.missing) == (0, DECLARED) and not stored(store)['runs']

def test_worker_processes(root, store):
    "Two workers make the runs that one makes: the same metrics, whatever their order."
    study = load_study(root)
    execute(study, device='cpu', store=store, jobs=2)
    execute(study, device='cpu', store=store.with_name('alone'))
    documents = stored(store), stored(store.with_name('alone'))
    together, alone = ({job: run['metrics'] for job, run in by_job(d).items()} for d in documents)
    assert together == alone and len(alone) == DECLARED

def test_smoke_leaves_no_file(root, store):
    study = load_study(root)
    found = results(study, 'smoke', 'cpu', store=store)
    assert not store.exists() and found.verdicts()[0].verdict == 'illustration' and set(found.frame.phase) == {'final'}

def test_environment_names_the_folder(root, store, monkeypatch):
    "New runs go to the folder that the environment names; packaged ones are read where it has none."
    study = load_study(root)
    monkeypatch.setenv(ENVIRONMENT, str(store))
    execute(study, device='cpu')
    assert len(stored(store)['runs']) == DECLARED and not (root/'assets'/'evidence'/'toy'/'cpu-cpu.json').exists()
    store.rename(root/'assets'/'evidence')
    assert results(study, device='cpu').verdicts()[0].verdict == 'holds' and not store.exists()

def test_states(root, store):
    assert [state('toy', m, root, store) for m in ('adapters.none', 'adapters.toy')] == ['planned', 'built']
    assert freshness('toy', 'adapters.toy', root, store) is None
    assert evidence_table({'toy': 'adapters.toy'}, root, store).empty
    execute(load_study(root), device='cpu', store=store)
    row = evidence_table({'toy': 'adapters.toy'}, root, store).iloc[0]
    assert (row.verdict, row.freshness, row.runs) == ('holds', 'fresh', f'{DECLARED}/{DECLARED}')
    assert row.sentence.startswith('holds: +0.3')

def test_chosen_configuration_is_the_best_on_validation(root, store):
    execute(load_study(root), device='cpu', store=store)
    assert {config_text(r['config']) for r in stored(store)['runs'] if r['phase'] == 'final'} == {'{"rate": 0.1}'}


# What is asked must not be stopped by one file

def test_a_damaged_file_is_named_and_stops_nothing(root: Path, store: Path):
    execute(load_study(root), device='cpu', store=store)
    (store/'toy'/'gpu-h100.json').write_text('{"schema": 1')
    table = evidence_table({'toy': 'adapters.toy'}, root, store)
    assert table.verdict.tolist() == ['holds', 'damaged'] and table.device.tolist() == ['cpu', 'h100']
    assert state('toy', 'adapters.toy', root, store) == 'evidence'
    assert freshness('toy', 'adapters.toy', root, store) == 'fresh'

@pytest.mark.parametrize('gone', ['assets/toy/data.bin', 'assets/toy/teacher.bin', 'adapters/toy.py'])
def test_what_is_gone_makes_runs_old(root: Path, store: Path, gone: str):
    execute(load_study(root), device='cpu', store=store)
    (root/gone).unlink()
    assert freshness('toy', 'adapters.toy', root, store) == 'own-stale'
    assert evidence_table({'toy': 'adapters.toy'}, root, store).freshness.tolist() == ['own-stale']

def test_evidence_of_an_absent_accelerator_is_read(root: Path, store: Path):
    study = load_study(root)
    execute(study, device='cpu', store=store)
    document = stored(store) | dict(scale='gpu', device='h100')
    (store/'toy'/'gpu-h100.json').write_text(json.dumps(document))
    found = results(study, scale='gpu', store=store)
    assert found.verdicts()[0].verdict == 'holds' and len(found.frame) == len(results(study, store=store).frame)

def test_a_dead_worker_is_said(root: Path, store: Path):
    write(root, METHOD.replace('    value = score', "    if arm == 'new' and seed == 101: os._exit(9)\n    value = score"))
    with pytest.raises(RunFailed, match='worker process died'): execute(load_study(root), device='cpu', store=store, jobs=2)
