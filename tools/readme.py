"""README.md from nbs/index.ipynb (nbconvert to Markdown; cells are folded by their tags, pictures lie in nbs/pictures).

Run from anywhere: `python tools/readme.py`, or `python tools/readme.py --check` to only compare."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent


def readme() -> tuple[str, dict[str, bytes]]:
    "The text of README.md and the pictures that it shows, by path."
    c = Config()
    c.TagRemovePreprocessor.enabled = True
    c.TagRemovePreprocessor.remove_cell_tags = {'hide-cell'}
    c.TagRemovePreprocessor.remove_input_tags = {'hide-input'}
    text, more = MarkdownExporter(config=c).from_filename(str(ROOT/'nbs'/'index.ipynb'),
                                                         resources={'output_files_dir': 'nbs/pictures', 'unique_key': 'index'})
    text = re.sub(r'^```\n(?=from |import |handle)', '```python\n', text, flags=re.M)
    cells = nbformat.read(ROOT/'nbs'/'index.ipynb', 4).cells
    said = iter(o.metadata['image/jpeg'].get('alt', '') for c in cells for o in c.get('outputs', []) if 'image/jpeg' in o.get('data', {}))
    text = re.sub(r'!\[jpeg\]', lambda _: f'![{next(said)}]', text)
    text = re.sub(r'^[ ]+$', '', text, flags=re.M)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', more['outputs']


def main(check: bool = False) -> int:
    text, pictures = readme()
    files = {'README.md': text.encode(), **pictures}
    if check: return sum((ROOT/name).read_bytes() != data for name, data in files.items())
    for name, data in files.items():
        (ROOT/name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT/name).write_bytes(data)
    return 0


if __name__ == '__main__': sys.exit(main('--check' in sys.argv))
