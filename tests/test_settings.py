"""settings.ini holds the packaging facts that setup.py reads; pyproject.toml must not say otherwise."""
import configparser
import tomllib

from conftest import ROOT


def disagreements(ini: str, toml: str) -> list[str]:
    "What the texts of settings.ini and pyproject.toml say differently."
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read_string(ini)
    settings, project = parser['DEFAULT'], tomllib.loads(toml)
    nbdev = project['tool']['nbdev']
    pairs = {'name': (settings['lib_name'], project['project']['name']),
             'python': ('>=' + settings['min_python'], project['project']['requires-python']),
             'test flags': (settings['tst_flags'].split(), nbdev['tst_flags'])}
    pairs |= {key: (settings[key], nbdev[key]) for key in ('lib_path', 'nbs_path', 'doc_path')}
    return [f'{key}: {a!r} in settings.ini, {b!r} in pyproject.toml' for key, (a, b) in pairs.items() if a != b]

def texts() -> tuple[str, str]:
    return (ROOT/'settings.ini').read_text(encoding='utf-8'), (ROOT/'pyproject.toml').read_text(encoding='utf-8')

def test_settings_agree():
    assert not disagreements(*texts())

def test_a_difference_is_found():
    ini, toml = texts()
    changed = ini.replace('min_python = 3.11', 'min_python = 3.9').replace('nbs_path = nbs', 'nbs_path = notebooks')
    assert [d.split(':')[0] for d in disagreements(changed, toml)] == ['python', 'nbs_path']

def test_nbdev_keeps_tags_and_links():
    "`nbdev-clean` deletes the tag that Papermill needs, and backticks do not link, unless these are set."
    nbdev = tomllib.loads(texts()[1])['tool']['nbdev']
    assert {'tags', 'jupyter'} <= set(nbdev['allowed_cell_metadata_keys'])
    assert nbdev['strip_libs'] == nbdev['lib_path']
