"""The wheel, built from a clean copy and installed alone in a folder: it works without the project around it."""
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import alone

def call(*args: str | Path, **options) -> subprocess.CompletedProcess:
    "Run a program; what it printed is in the message if it fails."
    done = subprocess.run([*map(str, args)], capture_output=True, text=True, check=False, timeout=300, **options)
    assert done.returncode == 0, f'{" ".join(map(str, args))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}'
    return done

@pytest.fixture(scope='module')
def wheel(clean_copy) -> Path:
    call(sys.executable, '-m', 'build', '--wheel', '--no-isolation', cwd=clean_copy, env=alone(clean_copy))
    return next((clean_copy/'dist').glob('*.whl'))

@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory) -> Path:
    "A folder that holds the installed wheel and nothing else; everything else comes from this environment."
    folder = tmp_path_factory.mktemp('installed')
    call(sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--quiet', '--target', folder, wheel)
    return folder

@pytest.fixture
def cli(installed, tmp_path, monkeypatch):
    "Call the installed command line in an empty folder, away from the project."
    monkeypatch.chdir(tmp_path)
    return lambda *args: call(sys.executable, '-m', 'lowrank_distill.cli', *args, env=alone(installed)).stdout

def test_contents(wheel, files):
    "Every module, every asset, every notebook without outputs; no test, no tool, nothing that was generated."
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {p.as_posix() for p in files if p.parts[0] == 'lowrank_distill'}
    notebooks = {f'lowrank_distill/assets/notebooks/{p.as_posix()}' for p in files if p.suffix == '.ipynb'
                 and p.parts[0] in ('nbs', 'tutorials')}
    info = {n for n in names if '.dist-info/' in n}
    assert names - info == package | notebooks
    assert {'LICENSE', 'NOTICE'} <= {Path(n).name for n in info}

def test_notebooks_have_no_outputs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith('.ipynb')]
        cells = [c for n in names for c in json.loads(archive.read(n))['cells'] if c['cell_type'] == 'code']
    assert cells and not [c for c in cells if c['outputs'] or c['execution_count'] is not None]

def test_imported_from_the_wheel(installed, tmp_path):
    "Otherwise the tests below would look at the project again."
    code = 'import lowrank_distill; print(lowrank_distill.__file__)'
    found = call(sys.executable, '-c', code, cwd=tmp_path, env=alone(installed)).stdout
    assert Path(found.strip()).is_relative_to(installed)

def test_list(cli): assert 'dylora' in cli('list')

def test_show(cli): assert '2210.07558' in cli('show', 'dylora')

def test_run(cli, tmp_path):
    "A report of the installed notebook: the executed copy and its page lie in the current folder."
    cli('run', 'dylora', '-p', 'scale=smoke')
    executed = [json.loads(p.read_text(encoding='utf-8')) for p in tmp_path.rglob('*.ipynb')]
    assert executed and any(c.get('outputs') for nb in executed for c in nb['cells'])
    assert list(tmp_path.rglob('*.html'))

def test_a_failing_command_is_found(cli):
    with pytest.raises(AssertionError, match="nearest: 'dylora'"): cli('show', 'dylor')
