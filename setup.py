"""Packaging: what pyproject.toml calls dynamic comes from settings.ini, and a wheel carries the notebooks as well."""
import json
from configparser import ConfigParser, SectionProxy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


def read_settings() -> SectionProxy:
    "The facts in settings.ini; only `=` separates, since requirements may hold a colon."
    parser = ConfigParser(delimiters=['='])
    parser.read('settings.ini', encoding='utf-8')
    return parser['DEFAULT']

def listed(key: str) -> list[str]:
    "The words of an entry of settings.ini; none where it is missing."
    return SETTINGS.get(key, '').split()

def without_outputs(notebook: Path) -> str:
    "The notebook as JSON text, its code cells as if they had never been run."
    nb = json.loads(notebook.read_text(encoding='utf-8'))
    for cell in nb['cells']:
        if cell['cell_type'] == 'code': cell.update(outputs=[], execution_count=None)
    return json.dumps(nb, indent=1, ensure_ascii=False)

class WithNotebooks(build_py):
    "Also copies nbs/ and tutorials/, without outputs, into assets/notebooks of the package that is built."

    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return  # there the notebooks lie beside the package
        for path in sorted(p for top in ('nbs', 'tutorials') for p in Path(top).rglob('*.ipynb')):
            if any(part.startswith(('.', '_')) for part in path.parts): continue
            target = Path(self.build_lib, LIB, 'assets', 'notebooks', path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(without_outputs(path), encoding='utf-8')

SETTINGS = read_settings()
LIB = SETTINGS['lib_path']
EXTRAS = {key.removesuffix('_requirements'): listed(key) for key in SETTINGS if key.endswith('_requirements')}
EXTRAS['dev'] = EXTRAS['all'] = sorted({name for names in EXTRAS.values() for name in names})  # tests need all of them

setup(version=SETTINGS['version'], packages=find_packages(include=[LIB, f'{LIB}.*']),
      package_data={LIB: ['assets/**/*']}, cmdclass={'build_py': WithNotebooks},
      install_requires=listed('requirements'), extras_require=EXTRAS,
      entry_points={'console_scripts': listed('console_scripts'), 'nbdev': [f'{LIB}={LIB}._modidx:d']})
