"""The set-up: modules are what notebooks export, the environment is what is pinned, imports are light, tree clean."""
import os
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from conftest import ATTEMPTS, ROOT, alone
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LIB = 'lowrank_distill'

def python(code: str, **options) -> subprocess.CompletedProcess:
    "Run `code` in a fresh interpreter."
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False, **options)


# Modules and notebooks

def modules(package: Path) -> dict[str, bytes]:
    "Every Python file below a package, by its path: its bytes."
    return {p.relative_to(package).as_posix(): p.read_bytes() for p in sorted(package.rglob('*.py'))
            if 'assets' not in p.relative_to(package).parts}

def differences(kept: dict[str, bytes], made: dict[str, bytes]) -> list[str]:
    "How the modules in the tree differ from those that the notebooks make."
    said = {'no notebook exports it': kept.keys() - made.keys(),
            'a notebook exports it, but it is not there': made.keys() - kept.keys(),
            'it is not what its notebook exports': {k for k in kept.keys() & made.keys() if kept[k] != made[k]}}
    return [f'{name}: {what}; run nbdev-export' for what, names in said.items() for name in sorted(names)]

def test_modules_are_what_the_notebooks_export(clean_copy):
    "Byte for byte, the index of names included; hand-written are only the package's `__init__.py` files."
    package = clean_copy/LIB
    kept = modules(package)
    for name in kept:
        if not name.endswith('__init__.py'): (package/name).unlink()
    done = python('from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=clean_copy, env=alone(clean_copy))
    assert done.returncode == 0, done.stderr
    assert not differences(kept, modules(package))

def test_a_changed_module_is_found():
    kept, made = {'a.py': b'1', 'b.py': b'1', 'old.py': b'1'}, {'a.py': b'1', 'b.py': b'2', 'new.py': b'1'}
    assert [d.split(':')[0] for d in differences(kept, made)] == ['old.py', 'new.py', 'b.py']

def test_every_package_can_be_found(files):
    "A folder with modules but without `__init__.py` is missing from the wheel."
    folders = {p.parent for p in files if p.parts[0] == LIB and p.suffix == '.py' and 'assets' not in p.parts}
    assert folders and not [f for f in folders if f/'__init__.py' not in files]

def test_every_module_can_be_imported():
    "In one fresh process, warnings being errors where they come from our own modules."
    done = python(f'''
import importlib, pkgutil, warnings, {LIB}
warnings.filterwarnings('error', module='{LIB}')
for m in pkgutil.walk_packages({LIB}.__path__, '{LIB}.'):
    try: importlib.import_module(m.name)
    except BaseException as e: print(f'{{m.name}}: {{type(e).__name__}}: {{e}}')
''')
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout


# Light imports

HEAVY = 'torch', 'plotly'

def heavy_after(code: str) -> list[str]:
    "Which heavy packages are imported after `code` has run in a fresh process (it may end with SystemExit)?"
    done = python(f'''
import sys
try: exec({code!r}, {{'__name__': 'start'}})
except SystemExit as e: assert not e.code, e.code
print('\\nheavy:', *[m for m in {HEAVY!r} if m in sys.modules])
''')
    assert done.returncode == 0, done.stderr
    return done.stdout.split('heavy:')[-1].split()

def command(*args: str) -> str:
    "Code that does what `lowrank-distill ARGS` does."
    return f'import sys; sys.argv = {["lowrank-distill", *args]!r}; from {LIB}.cli import main; main()'

LIGHT = {'import': f'import {LIB}', 'catalog': f'from {LIB}.core import catalog; catalog.methods()',
         'list': command('list'), 'show': command('show', 'dylora'), 'help': command('--help')}

@pytest.mark.parametrize('code', LIGHT.values(), ids=LIGHT.keys())
def test_light(code): assert heavy_after(code) == []

def test_a_heavy_import_is_found(): assert heavy_after('import torch.nn') == ['torch']


# The environment

def wrong_versions(pinned: dict[str, str], installed: dict[str, str]) -> list[str]:
    "Where the installed versions differ from the pinned ones, `+cpu` and the like apart."
    said = [f'{n} {v} is installed, but not pinned' for n, v in installed.items() if n not in pinned]
    return said + [f'{n} {v} is installed, {pinned[n]} is pinned' for n, v in installed.items()
                   if n in pinned and v.partition('+')[0] != pinned[n]]

def pins() -> dict[str, str]:
    lines = (ROOT/'constraints.txt').read_text(encoding='utf-8').split()
    assert all(re.fullmatch(r'[\w.-]+==[\w.!]+', line) for line in lines), 'a line is not name==version'
    return {canonicalize_name(n): v for n, v in (line.split('==') for line in lines)}

def test_environment_is_what_is_pinned():
    "Everything that `pip install -c constraints.txt -e '.[dev]'` brought is pinned, at that version."
    installed = {canonicalize_name(d.name): d.version for d in metadata.distributions()}
    wanted = [Requirement(r) for r in metadata.requires('lowrank-distill') or []]
    missing = sorted({r.name for r in wanted if canonicalize_name(r.name) not in installed})
    if missing: pytest.skip(f'not the environment of `make test`: {", ".join(missing)} not installed')
    # the venv brings the first three; a torch for other accelerators brings its own companions
    apart = re.compile(r'pip|setuptools|wheel|lowrank-distill|nvidia-.*|cuda-.*|triton')
    assert not wrong_versions(pins(), {n: v for n, v in installed.items() if not apart.fullmatch(n)})

def test_a_wrong_version_is_found():
    said = wrong_versions({'a': '1', 'b': '2', 'torch': '2.1'}, {'a': '1', 'b': '3', 'c': '1', 'torch': '2.1+cpu'})
    assert [s.split()[0] for s in said] == ['c', 'b']

def test_no_torchvision():
    "Its wheel does not match the CPU torch and breaks transformers and diffusers by being there."
    assert 'torchvision' not in {d.name for d in metadata.distributions()} and 'torchvision' not in pins()

def test_no_network():
    "A connection and a look-up that leave the machine fail here; a loopback connection works."
    with pytest.raises(OSError, match='no network'): socket.create_connection(('192.0.2.1', 80), timeout=1)
    with pytest.raises(socket.gaierror, match='no network'): socket.getaddrinfo('example.org', 80)
    assert len(ATTEMPTS) == 2
    ATTEMPTS.clear()  # or this test would fail as well
    with socket.create_server(('127.0.0.1', 0)) as server, socket.create_connection(server.getsockname()): pass

def test_one_thread():
    import torch
    assert torch.get_num_threads() == 1 and os.environ['OMP_NUM_THREADS'] == '1'


# The tree

def is_pickled(data: bytes) -> bool:
    "Does a file start as a pickle does, or is it torch's archive of one?"
    return re.match(rb'\x80[\x02-\x05]', data) is not None or data[:2] == b'PK' and b'data.pkl' in data

def test_no_pickles(files):
    "Weights are safetensors, arrays are npz without objects."
    assets = [p for p in files if p.parts[:2] == (LIB, 'assets')]
    assert assets and not [p for p in files if p.suffix in {'.pkl', '.pickle', '.pt', '.pth', '.ckpt', '.bin'}]
    assert not [p for p in assets if is_pickled((ROOT/p).read_bytes())]
    for p in (p for p in assets if p.suffix == '.npz'):
        with np.load(ROOT/p, allow_pickle=False) as arrays: assert all(arrays[name].size for name in arrays)

def test_a_pickle_is_found(tmp_path):
    import pickle

    import torch
    torch.save({'a': torch.zeros(1)}, tmp_path/'a.bin')
    assert is_pickled(pickle.dumps([1])) and is_pickled((tmp_path/'a.bin').read_bytes())
    assert not is_pickled(b'{"a": 1}')

def test_tree_is_small(files):
    sizes = {p: (ROOT/p).stat().st_size for p in files}
    largest = sorted(sizes, key=sizes.get, reverse=True)[:5]
    total = sum(sizes.values()) / 2**20
    assert 0 < total < 48, f'{total:.1f} MiB; the largest: {[*map(str, largest)]}'

TEXT = {'.py', '.md', '.toml', '.ini', '.sh', '.txt', '.ipynb', '.json', '.css', '.js', '.yml', '.yaml', '.in', ''}
# With a class of one letter, so that this file has none of what it looks for.
UNFINISHED, MACHINE = r'\b(?:TOD[O]|FIXM[E])\b', r'(?<![\w.])/(?:work|root|home)/\w'

def unclean(text: str) -> list[str]:
    "What a tracked text may not hold: notes of unfinished work, folders of somebody's machine."
    return [m[0] for m in re.finditer(f'{UNFINISHED}|{MACHINE}', text)]

def test_texts_are_clean(files):
    vendored = LIB, 'assets', 'js'
    texts = [p for p in files if p.suffix in TEXT and p.parts[:3] != vendored]
    found = {str(p): unclean((ROOT/p).read_text(encoding='utf-8')) for p in texts}
    assert not {k: v for k, v in found.items() if v}

def test_an_unclean_text_is_found():
    assert len(unclean('# TO' 'DO: see /wo' 'rk/x.py and /ho' 'me/me')) == 3
    assert not unclean('nbs/work/x, https://a.b/home/c')

def verbs(makefile: str) -> set[str]:
    return set(re.findall(r'^([a-z][\w-]*):(?!=)', makefile, re.M))

def test_makefile_has_few_verbs():
    text = (ROOT/'Makefile').read_text(encoding='utf-8')
    assert {'demo', 'test'} <= verbs(text) and len(verbs(text)) <= 8
    assert verbs('a: b\nb:\n.PHONY: a\nX := 1\nx:=1\n') == {'a', 'b'}

def test_readme_names_the_two_commands():
    assert {'make demo', 'make test'} <= set(re.findall(r'make \w+', (ROOT/'README.md').read_text(encoding='utf-8')))

def ruff(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'concise', *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)

def test_ruff():
    done = ruff('.')
    assert done.returncode == 0, '\n'.join(done.stdout.splitlines()[-30:]) + done.stderr

def test_ruff_can_fail(tmp_path):
    (tmp_path/'a.py').write_text('import os\n')
    assert ruff('--config', str(ROOT/'pyproject.toml'), '.', cwd=tmp_path).returncode == 1
