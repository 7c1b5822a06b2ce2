"""The command line: exit codes, one line for a mistake, and what the console script prints."""
import json
import subprocess
import sys

import pytest

from lowrank_distill.cli import main
from lowrank_distill.core import catalog


@pytest.mark.parametrize('line', ['show dilora', 'list --family x', 'run dilora', 'run dylora -p scael=smoke', 'run dylora --seeds two', 'run dylora --device cuda:9', 'run core.linalg',
                                  'run dylora -p a=1 -p a=2', 'evidence dilora', 'evidence dylora --jobs 0', 'evidence dylora --scale big', 'list --pattern', 'nothing', 'run --changed',
                                  'new dilora', 'new dylora', 'new', 'new dylora --family x', 'check dilora', 'check core.linalg', 'check', 'doctor --yaml'])
def test_mistakes_are_one_line_and_code_2(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('lowrank-distill: ') and err.count('\n') == 1 and not list(tmp_path.iterdir())


def test_list_as_json_and_table(capsys):
    assert main(['list', '--json']) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r['key'] for r in rows] == [m.key for m in catalog.methods()]
    assert next(r for r in rows if r['key'] == 'dylora')['state'] == 'evidence'
    assert main(['list', '--pattern', '*DyLoRA*']) == 0
    assert 'dylora' in capsys.readouterr().out


def test_evidence_table_and_smoke_study(capsys):
    assert main(['evidence']) == 0
    out = capsys.readouterr().out
    assert 'dylora' in out and 'margin' in out
    assert main(['evidence', 'dylora', '--scale', 'smoke']) == 0
    assert 'complete' in capsys.readouterr().out


def test_console_script_needs_no_jupyter_for_evidence():
    "The studies run on a machine that has torch and no Jupyter."
    script = ('import sys; from lowrank_distill.cli import main; code = main(["evidence"]);'
              'print([m for m in ("papermill", "nbconvert", "IPython", "jupyter_client", "ipywidgets", "plotly") if m in sys.modules], code)')
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == '[] 0'


def test_version(capsys):
    assert main(['--version']) == 0
    assert capsys.readouterr().out.startswith('lowrank-distill 0.')
